// The page reads without this. It adds: the section one is in, sorting, copying, and what a point of a map is.
"use strict";

const all = (what, where = document) => [...where.querySelectorAll(what)];

function followSections() {
  const links = new Map(all(".toc a").map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.classList.toggle("here", link === links.get(entry.target.id));
    }
  }, { rootMargin: "-15% 0px -80% 0px" });
  all("section[id]").forEach((section) => watch.observe(section));
}

function openOnPaper() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
}

function sortTable(table, column, button) {
  const head = button.closest("th");
  const down = head.getAttribute("aria-sort") !== "descending";
  all("th[aria-sort]", table).forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    const order = x !== "" && y !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y);
    return down ? -order : order;
  });
  body.append(...rows);
}

function letSort() {
  for (const table of all("table.sortable")) {
    for (const button of all("th button", table)) {
      button.addEventListener("click", () => sortTable(table, Number(button.dataset.column), button));
    }
  }
}

function letCopy() {
  for (const button of all(".copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}

// One map: the nearest point to the pointer is told, arrow keys go from point to point.
class FeatureMap {
  constructor(box, points, data) {
    Object.assign(this, { box, points, data, at: -1 });
    this.svg = box.querySelector(".map");
    this.tip = box.querySelector(".tip");
    this.cursor = box.querySelector(".cursor");
    this.svg.addEventListener("pointermove", (event) => this.point(event, 24));
    this.svg.addEventListener("pointerdown", (event) => this.point(event, 40));
    this.svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.hide(); });
    this.svg.addEventListener("keydown", (event) => this.press(event));
    this.svg.addEventListener("focus", () => { if (this.at < 0 && this.svg.matches(":focus-visible")) this.show(0); });
    this.svg.addEventListener("blur", () => this.hide());
    const select = box.querySelector("select");
    select?.addEventListener("change", () => this.highlight(select.value));
  }

  point(event, reach) {
    const area = this.svg.getBoundingClientRect();
    const [px, py] = [event.clientX - area.left, event.clientY - area.top];
    let [best, nearest] = [-1, reach];
    this.points.forEach(([x, y], i) => {
      const far = Math.hypot((x * area.width) / 100 - px, (y * area.height) / 100 - py);
      if (far < nearest) [best, nearest] = [i, far];
    });
    if (best < 0) this.hide(); else this.show(best);
  }

  press(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") this.hide();
    if (event.key === "Home") this.show(0);
    if (event.key === "End") this.show(this.points.length - 1);
    if (event.key in ways) this.show(this.step(...ways[event.key]));
    if (event.key in ways || event.key === "Home" || event.key === "End") event.preventDefault();
  }

  // The next point in a direction: little sideways, and not far.
  step(dx, dy) {
    if (this.at < 0) return 0;
    const [x0, y0] = this.points[this.at];
    let [best, least] = [this.at, Infinity];
    this.points.forEach(([x, y], i) => {
      const ahead = (x - x0) * dx + (y - y0) * dy;
      const aside = Math.abs((x - x0) * dy) + Math.abs((y - y0) * dx);
      if (ahead > 0 && ahead + 3 * aside < least) [best, least] = [i, ahead + 3 * aside];
    });
    return best;
  }

  show(i) {
    if (i === this.at && !this.tip.hidden) return;
    this.at = i;
    const [x, y, image] = this.points[i];
    const [path, label, split, thumbnail, said] = this.data.images[image];
    const lines = [["true", `${this.data.classes[label]} (${split})`]];
    said.forEach(([guess, sure], arm) => {
      const mark = guess === label ? "\u2713" : "\u2717";
      lines.push(["said", `${mark} ${this.data.arms[arm]}: ${this.data.classes[guess]} ${sure} %`]);
    });
    lines.push(["path", path]);
    this.tip.replaceChildren(...this.picture(thumbnail, path), ...lines.map(([kind, text]) => {
      const line = document.createElement("p");
      line.className = kind;
      line.dir = "auto";
      line.textContent = text;
      return line;
    }));
    this.cursor.setAttribute("cx", `${x}%`);
    this.cursor.setAttribute("cy", `${y}%`);
    this.svg.classList.add("on");
    this.tip.hidden = false;
    this.place(x, y);
  }

  picture(thumbnail, path) {
    if (!thumbnail) return [];
    const image = document.createElement("img");
    image.src = thumbnail;
    image.alt = path;
    return [image];
  }

  place(x, y) {
    const area = this.svg.getBoundingClientRect();
    const home = this.box.getBoundingClientRect();
    const [width, height] = [this.tip.offsetWidth, this.tip.offsetHeight];
    const [left, top] = [(x * area.width) / 100, (y * area.height) / 100];
    // Beside the point where there is room, or else above or below it: never on it.
    const right = left + 18 + width <= area.width;
    const beside = right || left - 18 - width >= 0;
    const across = right ? left + 18 : beside ? left - 18 - width : Math.max(0, (area.width - width) / 2);
    const below = area.top + top + 18 + height <= innerHeight ? top + 18 : top - 18 - height;
    const down = beside ? Math.max(0, Math.min(top - 30, area.height - height)) : below;
    this.tip.style.left = `${area.left - home.left + across}px`;
    this.tip.style.top = `${area.top - home.top + down}px`;
  }

  hide() {
    this.tip.hidden = true;
    this.svg.classList.remove("on");
  }

  highlight(label) {
    all("g[data-class]", this.svg).forEach((group) => {
      group.classList.toggle("dim", label !== "" && group.dataset.class !== label);
    });
  }
}

function letExplore() {
  const source = document.getElementById("map-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  all(".mapbox").forEach((box, i) => new FeatureMap(box, data.maps[i], data));
}

followSections();
openOnPaper();
letSort();
letCopy();
letExplore();
