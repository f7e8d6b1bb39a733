"""Arrays -> matplotlib figures. The only owner of matplotlib; knows no files and no runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

Pictures = NDArray[np.float32]

# Paul Tol's "bright" scheme, told apart by colour-blind readers too (https://sronpersonalpages.nl/~pault/).
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
RIGHT, WRONG = "#228833", "#CC3311"
INK, FAINT = "#222222", "#DDDDDD"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
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


def draw_accuracy_against_time(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation accuracy with its interval against total seconds, one point an arm.

    Each arm has `name`, `seconds`, `val_accuracy` and `interval` (low, high).
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(arms):
        value, (low, high) = arm["val_accuracy"], arm["interval"]
        axes.errorbar(
            arm["seconds"],
            value,
            yerr=[[value - low], [high - value]],
            fmt="o",
            ms=8,
            capsize=5,
            color=COLOURS[i % len(COLOURS)],
            label=f"{_plain(arm['name'])}: {value:.1%} in {arm['seconds']:,.1f} s",
        )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _label(axes, "total seconds, extraction included (log scale)", "validation accuracy, 95 % interval")
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

    Each arm has `name`, `val_accuracy`, `interval` (low, high) and `extraction_seconds` or None.
    """
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = range(len(arms))
    values = [arm["val_accuracy"] for arm in arms]
    low = [arm["val_accuracy"] - arm["interval"][0] for arm in arms]
    high = [arm["interval"][1] - arm["val_accuracy"] for arm in arms]
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


def draw_arm_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], lines: Mapping[str, float]) -> Figure:
    """Accuracy by epoch for the arms that have epochs, on what each watched; a level line for those that have none."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    colours = iter(COLOURS * (1 + (len(histories) + len(lines)) // len(COLOURS)))
    for name, value in lines.items():
        axes.axhline(value, color=next(colours), ls="--", label=f"{_plain(name)}, validation (no epochs)")
    for name, history in histories.items():
        colour = next(colours)
        watched = find_watched(history)
        what = f"{_plain(name)}{', held-out training images' if watched == 'holdout' else ', validation'}"
        for split, style, label in (
            (watched, "o-", what),
            ("train", ":", f"{_plain(name)}, training (augmented)"),
        ):
            rows = [row for row in history if row.get(f"{split}_accuracy") is not None]
            values = [row[f"{split}_accuracy"] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, style, ms=4, color=colour, label=label)
    _label(axes, "epoch", "accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def draw_grid(
    pictures: Pictures, titles: Sequence[str], *, right: Sequence[bool] | None = None, heading: str = ""
) -> Figure:
    """A grid of pictures (N, H, W, 3) in [0, 1] with titles, coloured by whether they are right if that is told."""
    columns = min(4 if len(pictures) <= 8 else 6, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(2.3 * columns, 2.6 * rows + (0.5 if heading else 0)), layout="constrained")
    if heading:
        figure.suptitle(_plain(heading))
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for i, axes in enumerate(grid):
        axes.axis("off")
        if i >= len(pictures):
            continue
        axes.imshow(pictures[i])
        colour = INK if right is None else (RIGHT if right[i] else WRONG)
        axes.set_title(_plain(titles[i]), fontsize=9, color=colour)
    return figure


def _plain(text: str, at_most: int = 1000) -> str:
    """A name as it is, not as a formula; of a long one the end, which is what tells names apart."""
    return (text if len(text) <= at_most else "..." + text[3 - at_most :]).replace("$", r"\$")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
