"""report.html in a real browser: nothing is fetched, nothing complains, all can be read, hostile names do nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from page_fixture import (
    HOSTILE,
    draw_insects,
    make_hostile,
    make_hostile_audit,
    make_huge,
    make_insect_audit,
    make_ranking,
    make_realistic,
)

from featcache.pages import AuditPage, render_audit, render_comparison

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

WIDTHS = (1280, 768, 360)
SCHEMES = ("light", "dark")

# Contrast of every text with what is painted behind it. Colours are read back from a canvas, so that color-mix() and
# the like need no parser; SVG text has its colour in `fill`.
CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, .away, title") || !element.checkVisibility?.()) continue;
    const style = getComputedStyle(element);
    const behind = [];
    for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
    const back = paint(["white", getComputedStyle(document.body).backgroundColor, ...behind]);
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const front = paint([`rgb(${back})`, ink]);
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    found.push([(high + 0.05) / (low + 0.05), large ? 3 : 4.5, node.data.trim().slice(0, 40)]);
  }
  return found;
}"""
OVERFLOW = "[document.documentElement.scrollWidth, window.innerWidth]"
IMAGES = "[...document.images].map((one) => [one.alt, one.complete && one.naturalWidth])"


def find_browser() -> str:
    """A Chromium, or a skip that says how to get one."""
    names = (os.environ.get("FEATCACHE_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    for name in names:
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no browser: apt-get install chromium, or say where one is with FEATCACHE_BROWSER")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_browser()
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files, by what is special about them."""
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "realistic": make_realistic(draw_insects(folder / "photos")),
        "hostile": make_hostile(folder / "hostile"),
        "huge": make_huge(n_classes=60, n_images=1500, n_arms=12),
        "ranking": make_ranking(),
        "audit": make_insect_audit(draw_insects(folder / "audited", {"train": 30, "val": 30})),
        "hostile audit": make_hostile_audit(folder / "hostile"),
    }
    files = {}
    for name, page in made.items():
        files[name] = folder / f"{name}.html"
        text = render_audit(page) if isinstance(page, AuditPage) else render_comparison(page)
        files[name].write_bytes(text.encode("utf-8"))
    return files


@dataclass
class Opened:
    """A page in the browser, and what it complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file with the network cut; every complaint of the browser is kept."""
    contexts = []

    def open_file(file: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        one = Opened(context.new_page())
        one.page.on("console", lambda message: one.complaints.append(f"{message.type}: {message.text}"))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.on("dialog", lambda dialog: one.complaints.append(f"dialog: {dialog.message}"))
        one.page.on("requestfailed", lambda request: one.complaints.append(f"failed: {request.url[:80]}"))
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.goto(file.as_uri())
        return one

    yield open_file
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, scheme) for name in ("realistic", "hostile") for scheme in SCHEMES),
        *(("audit", scheme) for scheme in SCHEMES),
        ("huge", "dark"),
        ("ranking", "light"),
        ("hostile audit", "dark"),
    ],
)
def test_every_page_reads_at_every_width_in_both_schemes(
    opened: Callable[..., Opened], pages: dict[str, Path], tmp_path: Path, name: str, scheme: str
) -> None:
    one = opened(pages[name], scheme=scheme)
    for width in WIDTHS:
        one.page.set_viewport_size({"width": width, "height": 900})
        shot = one.page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png")
        assert len(shot) > 10_000
        needed, there = one.page.evaluate(OVERFLOW)
        assert needed <= there, f"scrolls sideways at {width} px"
    contrasts = one.page.evaluate(CONTRAST)
    assert len(contrasts) > 100
    assert [text for text in contrasts if text[0] < text[1]] == []
    assert one.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in one.requests)
    assert sum(url.startswith("file:") for url in one.requests) == 1


@pytest.mark.parametrize("name", ["realistic", "audit"])
def test_every_image_has_its_words_and_loads(opened: Callable[..., Opened], pages: dict[str, Path], name: str) -> None:
    images = opened(pages[name]).page.evaluate(IMAGES)
    assert len(images) > 4
    assert all(alt and width for alt, width in images)


def test_pointing_at_the_map_shows_the_photograph(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    one = opened(pages["realistic"])
    box = one.page.locator(".mapbox").first
    point = box.locator("g[data-class='1'] use.val").first
    assert box.locator(".tip").is_hidden()
    point.scroll_into_view_if_needed()
    place = point.bounding_box()
    one.page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    tip = box.locator(".tip")
    assert tip.is_visible()
    assert "val/bees/" in tip.inner_text()
    assert "head: " in tip.inner_text()
    beside, around = tip.bounding_box(), box.locator(".map").bounding_box()
    assert around["y"] <= beside["y"] + 1 <= around["y"] + around["height"] - beside["height"] + 2
    assert tip.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 20
    one.page.mouse.move(1, 1)
    assert tip.is_hidden()
    assert one.complaints == []


def test_the_map_is_walked_with_the_keys(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    one = opened(pages["realistic"])
    one.page.locator(".map").first.focus()
    tip, seen = one.page.locator(".tip").first, set()
    for key in ("Home", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End"):
        one.page.keyboard.press(key)
        assert tip.is_visible()
        seen.add(tip.inner_text())
    assert len(seen) > 3
    one.page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_tap_shows_the_photograph_on_a_phone(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    one = opened(pages["realistic"], width=360, has_touch=True, is_mobile=True)
    one.page.locator(".map use").nth(3).tap(force=True)
    tip = one.page.locator(".tip").first
    assert tip.is_visible()
    needed, there = one.page.evaluate(OVERFLOW)
    assert needed <= there


def test_columns_sort(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    page = opened(pages["huge"]).page
    table = page.locator("#classes table").first
    table.get_by_role("button", name="F1").first.click()
    cells = table.locator("tbody tr td:nth-child(5)").all_inner_texts()
    values = [float(cell.strip("%")) for cell in cells]
    assert len(set(values)) > 3
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", ["realistic", "hostile", "audit"])
def test_it_prints(opened: Callable[..., Opened], pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    one = opened(pages[name], scheme="dark")
    assert one.page.pdf(path=tmp_path / "page.pdf", format="A4").startswith(b"%PDF-")
    one.page.emulate_media(media="print")
    paper = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert one.page.locator(".toc").is_hidden()
    assert [text for text in one.page.evaluate(CONTRAST) if text[0] < text[1]] == []


def test_what_is_folded_is_open_on_paper(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    page = opened(pages["realistic"]).page
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_hostile_names_are_text_and_nothing_else(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    one = opened(pages["hostile"])
    page = one.page
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("script").count() == 2  # the data of the map, and the page's own
    names = page.locator("#confusions tbody th").all_inner_texts()
    assert "<script>…</script>" in names
    assert any(r"\xe9" in name for name in names)
    page.locator(".map").first.focus()
    for _ in range(len(HOSTILE)):
        page.keyboard.press("ArrowRight")
    assert one.complaints == []


def test_the_policy_stops_what_is_not_the_pages_own(opened: Callable[..., Opened], pages: dict[str, Path]) -> None:
    one = opened(pages["realistic"])
    one.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'ran'";
          document.body.append(script);
          const image = document.createElement("img");
          image.src = "https://example.org/pixel.png";
          document.body.append(image);
        }"""
    )
    assert one.page.title() != "ran"
    assert sum("Content Security Policy" in complaint for complaint in one.complaints) == 2
