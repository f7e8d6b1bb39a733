"""Numbers -> the geometry of each figure, and its finding in words. Knows no markup.

Every place is in per cent of the figure's width from the left, or of its height from the top, as SVG counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.metrics import N_BINS, Bin
from featcache.pages.scales import Axis, label_number, label_share, make_axis, make_count_axis, make_duration_axis
from featcache.pages.values import FeatureMap
from featcache.plots import find_watched
from featcache.wording import format_points, format_seconds, format_share

Figure = dict[str, Any]  # what a template draws: axes, marks, lines, `words`
SHARES = (0.0, 1.0)
MOST_POINTS = 150  # of a line: more cannot be told apart
NUMBERED_CLASSES, DRAWN_CLASSES = 20, 60  # up to which a confusion matrix has numbers, or is a picture
LEVELS = 5  # of darkness, of a large confusion matrix
STAGES = ("extraction", "selection", "training", "evaluation")


def draw_intervals(arms: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Each arm's accuracy with its interval on one axis for all, from end to end of them."""
    ends = [end for arm in arms for end in arm["interval"]]
    axis = Axis(low=min(ends), high=max(*ends, min(ends) + 1e-9))
    return [
        {
            "at": axis.place(arm["accuracy"]),
            "low": axis.place(arm["interval"][0]),
            "high": axis.place(arm["interval"][1]),
        }
        for arm in arms
    ]


def draw_differences(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Each pair's difference with its interval around zero, to the right where the first is better."""
    blind: list[float] = [pair["detectable_difference"] or 0.0 for pair in pairs]
    wide = [pair.get("interval_with_seeds") or pair["interval"] for pair in pairs]
    ends = [abs(end) for pair, outer in zip(pairs, wide, strict=True) for end in (*pair["interval"], *outer)]
    reach = max([*ends, *blind, 0.01])
    axis = make_axis([-reach, reach], _label_points)
    rows = [
        {
            "pair": pair,
            "at": axis.place(pair["difference"]),
            "low": axis.place(pair["interval"][0]),
            "high": axis.place(pair["interval"][1]),
            "wide": [axis.place(end) for end in outer],
            "blind": [axis.place(-one), axis.place(one)],
            "words": say_difference(pair),
        }
        for pair, one, outer in zip(pairs, blind, wide, strict=True)
    ]
    return {"x": axis, "zero": axis.place(0.0), "rows": rows}


def say_difference(pair: Mapping[str, Any]) -> str:
    """A difference with its interval, in a sentence."""
    low, high = pair.get("interval_with_seeds") or pair["interval"]
    return (
        f"accuracy of {pair['first']} minus that of {pair['second']}: {format_points(pair['difference'])}, 95 % "
        f"interval {format_points(low, unit=False)} to {format_points(high, unit=False)}; "
        + ("the interval holds zero" if low <= 0 <= high else "the interval does not hold zero")
    )


def draw_accuracy_against_time(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy with its interval against the whole time, a point an arm and a faint one for each of its seeds."""
    x = make_duration_axis([run["seconds"] for arm in arms for run in arm["runs"]] + [_total(arm) for arm in arms])
    y = make_axis(
        [end for arm in arms for end in arm["interval"]] + [run["accuracy"] for arm in arms for run in arm["runs"]],
        label_share,
        bounds=SHARES,
        span=0.02,
    )
    points = [
        {
            "x": x.place(_total(arm)),
            "y": _down(y, arm["accuracy"]),
            "low": _down(y, arm["interval"][0]),
            "high": _down(y, arm["interval"][1]),
            "seeds": [(x.place(run["seconds"]), _down(y, run["accuracy"])) for run in arm["runs"]]
            if len(arm["runs"]) > 1
            else [],
        }
        for arm in arms
    ]
    words = "; ".join(
        f"{arm['name']} {format_share(arm['accuracy'])} after {format_seconds(_total(arm))}" for arm in arms
    )
    return {"x": x, "y": y, "points": points, "words": f"accuracy against total time: {words}"}


def draw_leaderboard(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """Each arm's accuracy with its interval on one axis for all; the last row bears its numbers."""
    x = make_axis([end for arm in arms for end in arm["interval"]], label_share, bounds=SHARES, span=0.05, n_ticks=3)
    rows = [
        {
            "at": x.place(arm["accuracy"]),
            "low": x.place(arm["interval"][0]),
            "high": x.place(arm["interval"][1]),
            "words": f"{format_share(arm['accuracy'])}, 95 % interval {format_share(arm['interval'][0])} to "
            f"{format_share(arm['interval'][1])}",
        }
        for arm in arms
    ]
    return {"x": x, "rows": rows}


def draw_accuracy_against_extraction(arms: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy against the time that extraction took, and the line of those that none beats in both; None if unknown.

    Intervals are left to the leaderboard: of thirty arms they would cover one another.
    """
    known = [arm for arm in arms if arm["extraction_seconds"]]
    if not known:
        return None
    x = make_duration_axis([arm["extraction_seconds"] for arm in known])
    y = make_axis([arm["accuracy"] for arm in known], label_share, bounds=SHARES, span=0.05)
    places = [(x.place(arm["extraction_seconds"]), _down(y, arm["accuracy"])) for arm in known]
    points = [
        {"x": place[0], "y": place[1], "i": arm["i"], "side": side}
        for arm, place, side in zip(known, places, place_labels(places), strict=True)
    ]
    best = find_unbeaten([(arm["extraction_seconds"], arm["accuracy"]) for arm in known])
    told = [known[i] for i in best]
    words = ", ".join(
        f"{arm['name']} {format_share(arm['accuracy'])} after {format_seconds(arm['extraction_seconds'])}"
        for arm in told
    )
    unknown = [arm["name"] for arm in arms if not arm["extraction_seconds"]]
    corners = [places[i] for i in best]
    before = [100.0, *(y for _, y in corners)]
    steps = [(corner[0], y) for corner, low in zip(corners, before, strict=False) for y in (low, corner[1])]
    line = [*steps, (100.0, corners[-1][1])]
    return {"x": x, "y": y, "points": points, "line": line, "unbeaten": best, "unknown": unknown, "words": words}


def find_unbeaten(rows: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, gain) those that no other beats in one without losing in the other, the cheapest first.

    >>> find_unbeaten([(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (3.0, 0.8)])
    [1, 0]
    """
    best: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][1])):
        if not best or rows[i][1] > rows[best[-1]][1]:
            best.append(i)
    return best


def place_labels(places: Sequence[tuple[float, float]], width: float = 45.0, height: float = 20.0) -> list[str]:
    """On which side of each point its number stands: where it covers no point and no other number, if there is such.

    Parameters
    ----------
    places
        N points, in per cent of a figure.
    width, height
        Of it, in the heights of a number.
    """
    ways = {"above": (0.0, -1.1), "left": (-1.2, 0.0), "right": (1.2, 0.0), "below": (0.0, 1.1)}
    points = [(x * width / 100, y * height / 100) for x, y in places]
    taken, sides = list(points), []
    for x, y in points:
        spots = {side: (x + dx, y + dy) for side, (dx, dy) in ways.items()}
        room = {
            side: min((max(abs(spot[0] - a), abs(spot[1] - b)) for a, b in taken if (a, b) != (x, y)), default=math.inf)
            for side, spot in spots.items()
        }
        side = next((side for side in ways if room[side] >= 1.0), max(ways, key=room.__getitem__))
        taken.append(spots[side])
        sides.append(side)
    return sides


def draw_stages(arms: Sequence[Mapping[str, Any]]) -> Figure:
    """The wall time of each arm as one bar, its stages after one another."""
    longest = max([_total(arm) for arm in arms] + [1e-3])
    rows: list[Figure] = []
    for arm in arms:
        seconds = {name: value for name, value in arm["cost"]["seconds"].items() if name != "total" and value}
        places = [name for name in STAGES if name in seconds] + [name for name in seconds if name not in STAGES]
        start, parts = 0.0, []
        for name in places:
            width = 100 * seconds[name] / longest
            parts.append({"stage": name, "start": round(start, 2), "width": round(width, 2), "seconds": seconds[name]})
            start += width
        rows.append({"parts": parts, "end": round(min(100 * _total(arm) / longest, 100), 2), "total": _total(arm)})
    names = list(dict.fromkeys(part["stage"] for row in rows for part in row["parts"]))
    stages = [name for name in STAGES if name in names] + [name for name in names if name not in STAGES]
    return {"rows": rows, "stages": stages}


def draw_histories(histories: Sequence[Sequence[Sequence[Mapping[str, float]]]]) -> list[Figure | None]:
    """For each arm that has epochs two figures, loss and accuracy; the axes are the same for all arms."""
    rows = [row for arm in histories for history in arm for row in history]
    if not rows:
        return [None] * len(histories)
    y = {
        "loss": make_axis([0.0, *_values(rows, "loss")], label_number, bounds=(0.0, math.inf), n_ticks=4),
        "accuracy": make_axis([1.0, *_values(rows, "accuracy")], label_share, bounds=SHARES, span=0.02, n_ticks=4),
    }
    return [_draw_history(arm, y) if any(arm) else None for arm in histories]


def _draw_history(arm: Sequence[Sequence[Mapping[str, float]]], y: Mapping[str, Axis]) -> Figure:
    some = next(history for history in arm if history)
    watched = find_watched(some)
    last = max(row["epoch"] for history in arm for row in history)
    first = min(row["epoch"] for history in arm for row in history)
    step = max(1, math.ceil((last - first) / 6))
    x = Axis(low=first - 0.3, high=last + 0.3)
    ticks = tuple((x.place(epoch), f"{epoch:g}") for epoch in range(int(first), int(last) + 1, step))
    x = Axis(low=x.low, high=x.high, ticks=ticks)
    panels = {}
    for what, axis in y.items():
        lines = [
            {"split": split, "points": _trace(history, f"{split}_{what}", x, axis)}
            for history in arm
            for split in ("train", watched)
        ]
        panels[what] = {"x": x, "y": axis, "lines": [line for line in lines if line["points"]]}
    ends = [history[-1].get(f"{watched}_accuracy") for history in arm if history]
    known = [end for end in ends if end is not None]
    where = "held-out training images" if watched == "holdout" else "validation images"
    final = f", {format_share(float(np.mean(known)))} right on {where} at the end" if known else ""
    n = len(arm)
    words = f"{last:g} epoch{'s' if last > 1 else ''}, {n} seed{'s' if n > 1 else ''}{final}"
    return {"panels": panels, "words": words}


def _values(rows: Sequence[Mapping[str, float]], what: str) -> list[float]:
    return [row[name] for row in rows for name in row if name.endswith(f"_{what}") and name.split("_")[0] in _SPLITS]


_SPLITS = ("train", "val", "holdout")


def _trace(history: Sequence[Mapping[str, float]], name: str, x: Axis, y: Axis) -> list[tuple[float, float]]:
    rows = [row for row in history if row.get(name) is not None and math.isfinite(row[name])]
    if len(rows) > MOST_POINTS:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MOST_POINTS).round().astype(int).tolist()]
    return [(x.place(row["epoch"]), _down(y, row[name])) for row in rows]


def draw_reliability(bins: Sequence[Bin], error: float) -> Figure:
    """The share that is right against confidence, and how many predictions each bin holds."""
    ends = (0.0, 0.25, 0.5, 0.75, 1.0)
    axis = Axis(low=0, high=1, ticks=tuple((100 * end, f"{end:.0%}") for end in ends))
    n = sum(one.n for one in bins)
    most = max(one.n for one in bins)
    points = [
        {
            "x": axis.place(one.confidence),
            "y": _down(axis, one.right),
            "low": _down(axis, one.interval[0]),
            "high": _down(axis, one.interval[1]),
            "start": round(100 * one.low, 2),
            "width": round(100 / N_BINS, 2),
            "n": one.n,
            "tall": round(100 * one.n / most, 2),
            "words": f"confidence {one.low:.0%} to {one.high:.0%}: {one.n:,} images, {format_share(one.right)} right",
        }
        for one in bins
    ]
    surplus = sum(one.n * (one.confidence - one.right) for one in bins) / n
    lean = "too sure" if surplus > 0.005 else "not sure enough" if surplus < -0.005 else "about as sure as it is right"
    words = f"on average {format_points(error)[1:]} between confidence and accuracy; {lean} on the whole"
    return {"x": axis, "y": axis, "points": points, "words": words}


def draw_agreement(accuracy: Mapping[str, Any]) -> Figure:
    """A share with its interval on an axis of its own that ends at all."""
    low, high = accuracy["interval"]
    x = make_axis([low, high, 1.0], label_share, bounds=SHARES, span=0.1, n_ticks=4)
    words = f"{format_share(accuracy['accuracy'])}, 95 % interval {format_share(low)} to {format_share(high)}"
    return {"x": x, "at": x.place(accuracy["accuracy"]), "low": x.place(low), "high": x.place(high), "words": words}


def shade_confusions(confusions: NDArray[np.int64]) -> NDArray[np.int64]:
    """How dark each cell is, 0 (nothing) to 100, by its share of the true class."""
    totals = np.maximum(confusions.sum(axis=1, keepdims=True), 1)
    shades: NDArray[np.int64] = np.ceil(100 * confusions / totals).astype(np.int64)
    return shades


def lay_out_confusions(confusions: NDArray[np.int64]) -> Figure:
    """A matrix with numbers, or as a picture, or neither, by how many classes there are: `form` says which."""
    n_classes = len(confusions)
    if n_classes <= NUMBERED_CLASSES:
        return {"form": "numbers", "counts": confusions.tolist(), "shades": shade_confusions(confusions).tolist()}
    if n_classes <= DRAWN_CLASSES:
        return {"form": "picture", "n": n_classes, "paths": draw_confusions(confusions)}
    return {"form": "pairs"}


def draw_confusions(confusions: NDArray[np.int64]) -> list[tuple[float, str]]:
    """A large matrix as a path for each level of darkness: (opacity, path), a cell being one unit wide."""
    shade = np.ceil(shade_confusions(confusions) * LEVELS / 100).astype(int)
    paths = []
    for level in range(1, LEVELS + 1):
        cells = np.argwhere(shade == level).tolist()
        if cells:
            paths.append((round(level / LEVELS, 2), "".join(f"M{column} {row}h1v1h-1z" for row, column in cells)))
    return paths


def draw_learning_curve(curve: Mapping[str, Any]) -> Figure:
    """Accuracy against the number of training images, what is foretold, and the law between."""
    points, forecast = curve["points"], curve["forecast"] or []
    rows = [*points, *forecast]
    x = make_count_axis([row["images"] for row in rows])
    y = make_axis([row[name] for row in rows for name in ("low", "high")], label_share, bounds=SHARES, span=0.05)
    line = []
    if law := curve["law"]:
        sizes = np.geomspace(points[0]["images"], rows[-1]["images"], 60)
        values = 1 - law["floor"] - law["factor"] * sizes ** -law["power"]
        line = [(x.place(n), _down(y, v)) for n, v in zip(sizes.tolist(), values.tolist(), strict=True)]
    marks = [
        {
            "x": x.place(row["images"]),
            "y": _down(y, row["accuracy"]),
            "low": _down(y, row["low"]),
            "high": _down(y, row["high"]),
            "foretold": i >= len(points),
            "words": f"{row['images']:,} images: {format_share(row['accuracy'])}",
        }
        for i, row in enumerate(rows)
    ]
    return {"x": x, "y": y, "line": line, "marks": marks, "words": curve["verdict"]}


def lay_out_map(feature_map: FeatureMap) -> tuple[list[list[float]], float]:
    """A place for each of the M images, equal distances being equal in both directions; width / height of it all."""
    finite = np.nan_to_num(feature_map.coordinates.astype(np.float64))
    low, high = finite.min(axis=0), finite.max(axis=0)
    width, height = np.maximum(high - low, 1e-9).tolist()
    # A narrow strip gets more room than it needs, or it could not be pointed at.
    aspect = min(max(width / height, 0.9), 1.8)
    scale = max(width / aspect, height)
    size = np.array([scale * aspect, scale])
    places = 50 + 94 * (finite - (low + high) / 2) / size * np.array([1, -1])
    return places.round(2).tolist(), round(aspect, 3)


def _label_points(value: float, step: float) -> str:
    """A tick of an axis of differences, in points."""
    text = format_points(value, unit=False)
    return text.removesuffix(".0") if step >= 0.00999 else text


def _total(arm: Mapping[str, Any]) -> float:
    return float(arm["cost"]["seconds"]["total"])


def _down(axis: Axis, value: float) -> float:
    return round(100 - axis.place(value), 2)
