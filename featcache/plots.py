"""Arrays -> matplotlib figures. The only owner of matplotlib; knows no files and no runs."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from featcache.errors import DeviceError, make_printable
from featcache.wording import make_writable

Pictures = NDArray[np.float32]

# Paul Tol's "bright" scheme, told apart by colour-blind readers too (https://sronpersonalpages.nl/~pault/).
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
RIGHT, WRONG = "#228833", "#CC3311"
INK, FAINT = "#222222", "#DDDDDD"
SPLITS = {"train": "training", "val": "validation", "test": "test"}
QUIET = "#666666"

# Of grids of pictures: up to so many, in so many columns at most, each so many inches wide.
GRIDS = ((1, 1, 4.0), (3, 3, 2.8), (8, 4, 2.4), (24, 6, 2.0), (48, 8, 1.8), (math.inf, 12, 1.6))
TITLE_SIZE, CAPTION_SIZE, HEADING_SIZE = 9, 6.5, 11  # points
LINE, CAPTION_LINE, HEADING_LINE, GAP = 0.16, 0.16, 0.2, 0.1  # inches
HINTED = 1.07  # letters that are fitted to pixels are up to so much wider than drawn in outline
WINDOW = (1500, 850)  # pixels, at most: what most screens have room for
NO_LETTERS = ("Last Resort", "cm", "STIXSize", "STIXNonUnicode")  # fonts whose code points are no letters
NO_WINDOWS = frozenset(
    {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
)  # matplotlib's backends that write files


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    _choose_fonts(figure)
    with ignore_glyphs():
        figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white", metadata={"Software": None})


def draw_curves(history: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Training loss and accuracy by epoch, and those of the images that were watched: validation, or held out."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(_plain(title))
    watched = find_watched(history)
    labels = {"train": "training (augmented)", "val": "validation", "holdout": "held-out training images"}
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, colour in (("train", COLOURS[0]), (watched, COLOURS[1])):
            rows = [row for row in history if row.get(f"{split}_{what}") is not None]
            values = [row[f"{split}_{what}"] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, "o-", ms=4, color=colour, label=labels[split])
        _label(axes, "epoch", f"{what} (nats)" if what == "loss" else what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    figure.axes[0].legend(frameon=False)
    return figure


def find_watched(history: Sequence[Mapping[str, float]]) -> str:
    """What was evaluated after each epoch: "val", or "holdout"."""
    return "holdout" if "holdout_accuracy" in history[0] else "val"


def draw_selection(
    candidates: Sequence[Mapping[str, float]], chosen: Mapping[str, float], criterion: str, title: str
) -> Figure:
    """Loss and accuracy of everything that was tried, against the first value, a line for each of the second.

    Parameters
    ----------
    candidates
        Each with the values by name, "loss" and "accuracy".
    chosen
        The values by name: {"C": 0.1}, or {"k": 20, "temperature": 0.1}.
    criterion
        What the loss is.
    title
        Above all.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(_plain(title))
    first, *others = chosen
    lines = sorted({tuple(one[name] for name in others) for one in candidates})
    axes_of = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    for i, line in enumerate(lines):
        rows = [one for one in candidates if tuple(one[name] for name in others) == line]
        label = ", ".join(f"{name} = {value:g}" for name, value in zip(others, line, strict=True))
        for what, axes in axes_of.items():
            colour = COLOURS[i % len(COLOURS)]
            axes.semilogx(
                [row[first] for row in rows], [row[what] for row in rows], "o-", ms=4, color=colour, label=label or None
            )
    words = ", ".join(f"{name} = {value:g}" for name, value in chosen.items())
    unit = " (nats)" if criterion == "log loss" else ""
    for what, axes in axes_of.items():
        axes.axvline(chosen[first], color=INK, lw=1, ls="--", label=f"chosen: {words}")
        x = "C (weaker penalty to the right)" if first == "C" else first
        _label(axes, x, f"held-out {criterion}{unit}" if what == "loss" else "held-out accuracy")
    axes_of["accuracy"].yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes_of["loss"].legend(frameon=False, fontsize=8)
    return figure


def draw_learning_curve(curve: Mapping[str, Any], title: str) -> Figure:
    """Accuracy against the number of training images, with intervals, and what a power law foretells.

    `curve` has `points` and `forecast`, each with `images`, `accuracy`, `low`, `high`, and `law` or None: docs/json.md.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_plain(title), fontsize=11)
    for points, colour, marker, label in (
        (curve["points"], COLOURS[0], "o", "held-out training images, 95 % interval"),
        (curve["forecast"], COLOURS[1], "D", "with 2 and 4 times as many, foretold"),
    ):
        if points:
            values = [one["accuracy"] for one in points]
            errors = [
                [max(one["accuracy"] - one["low"], 0) for one in points],
                [max(one["high"] - one["accuracy"], 0) for one in points],
            ]
            images = [one["images"] for one in points]
            axes.errorbar(images, values, yerr=errors, fmt=marker, ms=5, capsize=3, color=colour, label=label)
    if law := curve["law"]:
        last = curve["forecast"][-1]["images"]
        n = np.geomspace(curve["points"][0]["images"], last, 100)
        axes.plot(n, 1 - law["floor"] - law["factor"] * n ** -law["power"], "--", lw=1, color=INK, label="power law")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _label(axes, "training images (log scale)", "accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_confusions(
    matrices: Mapping[str, NDArray[np.int64]], classes: Sequence[str], *, max_labels: int = 40
) -> Figure:
    """Confusion matrices side by side: true class by row, prediction by column, coloured by the share of the row."""
    n = len(classes)
    side = min(max(2.6, 0.42 * n + 1.2), 10)
    figure = Figure(figsize=((side + 1.2) * len(matrices), side + 0.8), layout="constrained")
    for axes, (title, counts) in zip(np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(textwrap.fill(_plain(title), int(9 * side)), fontsize=11)
        axes.set(xlabel="predicted", ylabel="true")
        if n <= max_labels:
            names = [_plain(name, 16) for name in classes]
            axes.set_xticks(range(n), names, rotation=0 if n <= 3 else 90)
            axes.set_yticks(range(n), names)
        if n <= 20:
            for row, column in np.ndindex(n, n):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else INK
                    axes.text(
                        column,
                        row,
                        str(counts[row, column]),
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=9,
                    )
        axes.tick_params(length=0)
    return figure


def draw_accuracy_against_time(arms: Sequence[Mapping[str, Any]], split: str = "val") -> Figure:
    """Accuracy on a split with its interval against total seconds, one point an arm.

    Each arm has `name`, `accuracy`, `interval` (low, high) and `cost`, of which its `seconds` has a `total`.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(arms):
        value, (low, high), seconds = arm["accuracy"], arm["interval"], arm["cost"]["seconds"]["total"]
        axes.errorbar(
            seconds,
            value,
            yerr=[[max(value - low, 0)], [max(high - value, 0)]],
            fmt="o",
            ms=8,
            capsize=5,
            color=COLOURS[i % len(COLOURS)],
            label=f"{_plain(arm['name'])}: {value:.1%} in {seconds:,.1f} s",
        )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _label(axes, "total seconds, extraction included (log scale)", f"{SPLITS[split]} accuracy, 95 % interval")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def cut_middle(text: str, length: int) -> str:
    """A name of at most so many characters: its beginning and its end.

    >>> cut_middle("resnet18", 12), cut_middle("timm:vit_small_patch16_224.augreg", 12)
    ('resnet18', 'timm:…augreg')
    """
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}…{text[-tail:]}"


def draw_ranking(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation accuracy with its interval, one row an arm, the best on top, and beside it what extraction took.

    Each arm has `name`, `accuracy`, `interval` (low, high) and `extraction_seconds` or None.
    """
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = range(len(arms))
    values = [arm["accuracy"] for arm in arms]
    low = [max(arm["accuracy"] - arm["interval"][0], 0) for arm in arms]
    high = [max(arm["interval"][1] - arm["accuracy"], 0) for arm in arms]
    left.errorbar(values, rows, xerr=[low, high], fmt="o", ms=6, capsize=3, color=COLOURS[0])
    left.set_yticks(rows, [_plain(cut_middle(arm["name"], 34)) for arm in arms])
    left.invert_yaxis()
    left.margins(y=0.5 / len(arms))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(left, "validation accuracy, 95 %", "")
    right.barh(rows, [arm["extraction_seconds"] or 0 for arm in arms], height=0.6, color=COLOURS[1])
    right.tick_params(axis="y", length=0)
    _label(right, "extraction, s", "")
    return figure


def draw_arm_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]], lines: Mapping[str, float], split: str = "val"
) -> Figure:
    """Accuracy by epoch for the arms that have epochs, on what each watched; a level line for those that have none.

    The lines are accuracies on `split`.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    colours = iter(COLOURS * (1 + (len(histories) + len(lines)) // len(COLOURS)))
    for name, value in lines.items():
        axes.axhline(value, color=next(colours), ls="--", label=f"{_plain(name)}, {SPLITS[split]} (no epochs)")
    for name, history in histories.items():
        colour = next(colours)
        watched = find_watched(history)
        what = f"{_plain(name)}{', held-out training images' if watched == 'holdout' else ', validation'}"
        for seen, style, label in (
            (watched, "o-", what),
            ("train", ":", f"{_plain(name)}, training (augmented)"),
        ):
            rows = [row for row in history if row.get(f"{seen}_accuracy") is not None]
            values = [row[f"{seen}_accuracy"] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, style, ms=4, color=colour, label=label)
    _label(axes, "epoch", "accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def draw_grid(
    pictures: Pictures,
    titles: Sequence[str],
    *,
    right: Sequence[bool] | None = None,
    captions: Sequence[str] | None = None,
    heading: str = "",
) -> Figure:
    """A grid of pictures with titles.

    Parameters
    ----------
    pictures
        (N, H, W, 3) in [0, 1].
    titles
        N, of one or more lines; a line that is wider than its picture is cut in its middle.
    right
        N: titles are coloured by it, if it is told.
    captions
        N short lines below the pictures, such as file names, cut as titles are.
    heading
        Above all, over as many lines as it needs.
    """
    n, (height, width) = len(pictures), pictures.shape[1:3]
    rows, columns, side = lay_out_grid(n)
    picture = (side, side * min(max(height / width, 0.25), 4.0))
    above = GAP + LINE * max(title.count("\n") + 1 for title in titles)
    cell = above + picture[1] + (CAPTION_LINE if captions else 0)
    total = columns * (side + GAP) + GAP
    lines = _wrap(heading, total - 2 * GAP, HEADING_SIZE)
    top = HEADING_LINE * len(lines) + GAP * bool(lines)
    figure = Figure(figsize=(total, top + rows * cell + GAP))
    for i in range(n):
        row, column = divmod(i, columns)
        colour = INK if right is None else (RIGHT if right[i] else WRONG)
        corner = (GAP + column * (side + GAP), top + row * cell + above)
        axes = _place_picture(figure, pictures[i], corner, picture)
        title = "\n".join(cut_to_width(line, side, TITLE_SIZE) for line in titles[i].split("\n"))
        axes.set_title(title, fontsize=TITLE_SIZE, color=colour, pad=3, linespacing=1.1, parse_math=False)
        if captions:
            caption = cut_to_width(captions[i], side, CAPTION_SIZE)
            axes.set_xlabel(caption, fontsize=CAPTION_SIZE, color=QUIET, labelpad=2, parse_math=False)
    if lines:
        y = 1 - GAP / figure.get_figheight()
        figure.text(0.5, y, "\n".join(lines), ha="center", va="top", fontsize=HEADING_SIZE, parse_math=False)
    return figure


def lay_out_grid(n: int) -> tuple[int, int, float]:
    """Rows, columns, and the width of a picture in inches: few are large, many are small, and no row is nearly empty.

    >>> [lay_out_grid(n) for n in (1, 5, 8, 9, 96)]
    [(1, 1, 4.0), (2, 3, 2.4), (2, 4, 2.4), (2, 5, 2.0), (8, 12, 1.6)]
    """
    most, side = next((most, side) for at_most, most, side in GRIDS if n <= at_most)
    rows = math.ceil(n / most)
    return rows, math.ceil(n / rows), side


def _place_picture(
    figure: Figure, picture: NDArray[np.float32], corner: tuple[float, float], size: tuple[float, float]
) -> Axes:
    """Draw a picture, its upper left corner so many inches from that of the figure."""
    width, height = figure.get_size_inches()
    left, down = corner
    axes = figure.add_axes((left / width, 1 - (down + size[1]) / height, size[0] / width, size[1] / height))
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def cut_to_width(text: str, inches: float, size: float) -> str:
    """A line as it is, or its beginning and its end if it is wider than that in letters of `size` points.

    >>> cut_to_width("ants 97%", 2.4, 9), cut_to_width("a very long name of a class 97%", 1.2, 9)
    ('ants 97%', 'a very …lass 97%')
    """
    text = make_drawable(text)
    cut, length = text, len(text)
    while length > 1 and (width := measure_width(cut, size)) > inches:
        length = min(length - 1, int(length * inches / width) + 1)  # in proportion, and at least one letter less
        cut = cut_middle(text, length)
    return cut


def measure_width(text: str, size: float) -> float:
    """Width in inches of a line in letters of `size` points."""
    properties = FontProperties(family=list(find_families(text)), size=size)
    with ignore_glyphs():
        width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=False)
    return float(width) * HINTED / 72


def _wrap(text: str, inches: float, size: float) -> list[str]:
    """A heading in lines that are not wider than that; a word that is, is cut."""
    lines: list[str] = []
    for word in make_drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure_width(longer, size) <= inches:
            lines[-1] = longer
        else:
            lines.append(cut_to_width(word, inches, size))
    return lines


def make_drawable(text: str) -> str:
    r"""A name whose every character can be drawn: control characters, and bytes that are no UTF-8, as \xNN.

    >>> make_drawable("a\tb\udce9")
    'a\\x09b\\udce9'
    """
    return make_printable(text).encode(errors="backslashreplace").decode()


@lru_cache(maxsize=4096)
def find_families(text: str) -> tuple[str, ...]:
    """Families of fonts that have every letter of a text, as far as this machine has some: the usual one comes first.

    All fonts are looked at only for letters that the usual one lacks, Chinese ones for example.
    """
    usual = FontProperties().get_name()
    missing = {ord(letter) for letter in text if letter.isprintable()} - _list_letters(findfont(usual))
    families = [usual]
    for font in fontManager.ttflist if missing else ():
        if not font.name.startswith(NO_LETTERS) and (found := missing & _list_letters(font.fname)):
            families.append(font.name)
            missing -= found
    return tuple(families)


@cache
def _list_letters(path: str) -> frozenset[int]:
    """Code points that a font has; none of one that cannot be read."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@contextmanager
def ignore_glyphs() -> Iterator[None]:
    """No warning of letters that no font of this machine has: they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def check_window() -> None:
    """See, before any work is done, that a window can be opened.

    Raises
    ------
    DeviceError
        If there is no display, or no toolkit for windows.
    """
    import matplotlib.pyplot as plt  # here alone: it looks for a display, and files need none

    backend = str(matplotlib.get_backend())
    try:
        plt.switch_backend(backend)
    except ImportError as error:
        raise DeviceError(f"no window can be opened: {error}; without --window a PNG file is written") from error
    if backend.lower() in NO_WINDOWS:
        raise DeviceError(
            f"no window can be opened: expected a display and a toolkit that matplotlib knows (Tk, Qt, GTK, wx), found "
            f"its backend {backend}; without --window a PNG file is written"
        )


def open_window(figure: Figure) -> None:
    """Show a figure in a window, and wait until it is closed. `check_window` has been called before."""
    import matplotlib.pyplot as plt

    def take(*_: Any, **__: Any) -> Figure:
        return figure

    _choose_fonts(figure)
    figure.dpi = min(figure.dpi, WINDOW[0] / figure.get_figwidth(), WINDOW[1] / figure.get_figheight())
    with ignore_glyphs():
        plt.figure(FigureClass=take)  # type: ignore[arg-type]  # pyplot asks for a new figure and is given this one
        plt.show(block=True)
        plt.close(figure)


def _choose_fonts(figure: Figure) -> None:
    """Give each text with unusual letters fonts that have them."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and not text.get_text().isascii():
            text.set_fontfamily(list(find_families(text.get_text())))


def _plain(text: str, at_most: int = 1000) -> str:
    """A name as it is, not as a formula; of a long one the end, which is what tells names apart."""
    text = make_writable(text)
    return (text if len(text) <= at_most else "..." + text[3 - at_most :]).replace("$", r"\$")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
