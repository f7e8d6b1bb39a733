"""RunRecords -> the comparison as numbers, as a table in text and in Markdown, and in one plain sentence.

Knows no files and no figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from featcache.config import is_imported
from featcache.metrics import adjust_holm, mcnemar_test, wilson_interval
from featcache.runs import Predictions, RunRecord

SIGNIFICANCE = 0.05
INTERVALS_REMARK = (
    "Intervals are Wilson's, at 95 %, for the sampling of the validation images alone. Frozen features see no "
    "augmentation; fine-tuning does."
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a classifier, as it enters the comparison."""

    name: str
    run: str
    record: RunRecord
    predictions: Predictions


def describe_arm(arm: Arm) -> dict[str, Any]:
    """An arm's numbers as plain JSON values; see docs/json.md."""
    record, val = arm.record, arm.record.accuracy["val"]
    return {
        "name": arm.name,
        "run": arm.run,
        "kind": record.kind,
        "title": record.title,
        "backbone": record.extractor["backbone"],
        "val_accuracy": val["accuracy"],
        "correct": val["correct"],
        "n_val": val["n"],
        "interval": list(wilson_interval(val["correct"], val["n"])),
        "test_accuracy": record.accuracy["test"]["accuracy"] if "test" in record.accuracy else None,
        "trainable_parameters": record.parameters["trainable"],
        "seconds": record.seconds["total"],
        "seconds_by_stage": {name: value for name, value in record.seconds.items() if name != "total"},
        "peak_memory_bytes": record.peak_memory_bytes,
        "selection": record.selection,
        "notes": record.notes,
    }


def compare_pairs(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The exact McNemar test of every two arms on the same validation images."""
    pairs = []
    for first, second in combinations(arms, 2):
        right = [arm.predictions.labels == arm.predictions.predicted for arm in (first, second)]
        only_first, only_second, p_value = mcnemar_test(*right)
        pairs.append(
            {
                "first": first.name,
                "second": second.name,
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_value": p_value,
            }
        )
    return pairs


def compare_with_first(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The exact McNemar test of the first arm with every other, p-values adjusted for their number (Holm)."""
    pairs = [compare_pairs([arms[0], other])[0] for other in arms[1:]]
    adjusted = adjust_holm([pair["p_value"] for pair in pairs])
    return [{**pair, "p_adjusted": p_value} for pair, p_value in zip(pairs, adjusted, strict=True)]


def state_ranking(arms: Sequence[dict[str, Any]]) -> str:
    """What a ranking shows of the first arm, and never more."""
    first = arms[0]
    best = f"{first['name']}: {first['val_accuracy']:.1%} of {first['n_val']} validation images"
    if len(arms) == 1:
        return f"{best} are right."
    alike = [arm for arm in arms[1:] if arm["against_first"]["p_adjusted"] >= SIGNIFICANCE]
    worse = len(arms) - 1 - len(alike)
    if not alike:
        others = f"any of the {worse} others" if worse > 1 else arms[1]["name"]
        return f"{best} are right, more than with {others} (McNemar, Holm-adjusted p < {SIGNIFICANCE})."
    names = ", ".join(arm["name"] for arm in alike[:4]) + (f" and {len(alike) - 4} more" if len(alike) > 4 else "")
    known = [arm for arm in (first, *alike) if arm["extraction_seconds"] is not None]
    cheap = min(known, key=lambda arm: arm["extraction_seconds"], default=first)
    cost = ""
    if cheap is not first and first["extraction_seconds"]:
        ratio = first["extraction_seconds"] / max(cheap["extraction_seconds"], 1e-9)
        cost = f" Of these {cheap['name']} is the cheapest to extract, {ratio:.1f} times faster than {first['name']}."
    return f"{best} are right; no difference can be shown to {names} (McNemar, Holm-adjusted).{cost}"


def tabulate_ranking(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A ranking as rows of text, one an arm."""
    header = ["", "val accuracy", "95 % interval", "p vs 1st", "width", "params", "GFLOPs", "extraction s", "head s"]
    return [header, *map(_ranking_row, arms)]


def _ranking_row(arm: dict[str, Any]) -> list[str]:
    pair, operations, extraction = arm["against_first"], arm["multiply_adds"], arm["extraction_seconds"]
    return [
        arm["name"],
        f"{arm['val_accuracy']:.1%}",
        f"{arm['interval'][0]:.1%} to {arm['interval'][1]:.1%}",
        "-" if pair is None else f"{pair['p_adjusted']:.2g}",
        f"{arm['width']:,}",
        "-" if arm["parameters"] is None else f"{arm['parameters'] / 1e6:,.1f} M",
        "-" if operations is None else f"{operations / 1e9:,.2f}",
        "-" if extraction is None else f"{extraction:,.1f}",
        f"{arm['head_seconds']:,.2f}",
    ]


def state_verdict(arms: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    """What the comparison shows of the first two arms, and never more."""
    if not pairs:
        return f"One run: {arms[0]['val_accuracy']:.1%} of {arms[0]['n_val']} validation images are right."
    pair, first, second = pairs[0], arms[0], arms[1]
    counts = (
        f"{pair['only_first_right']} images only {first['name']} gets right, {pair['only_second_right']} only "
        f"{second['name']}; exact McNemar p = {pair['p_value']:.2g}"
    )
    if pair["p_value"] < SIGNIFICANCE:
        better = first if first["correct"] > second["correct"] else second
        claim = f"{better['name']} is better on these {first['n_val']} images"
    else:
        claim = f"No difference between {first['name']} and {second['name']} can be shown on {first['n_val']} images"
    cheap, dear = sorted((first, second), key=lambda arm: arm["seconds"])
    cost = f"{cheap['name']} took {format_seconds(cheap['seconds'])}, {dear['name']} {format_seconds(dear['seconds'])}"
    if unknown := [arm["name"] for arm in (first, second) if is_imported(arm["backbone"])]:
        left_out = f"without what it took to make the imported features of {' and '.join(unknown)}"
        return f"{claim} ({counts}). {cost}, {left_out}."
    times = f" ({dear['seconds'] / cheap['seconds']:.3g} times as long)" if cheap["seconds"] else ""
    return f"{claim} ({counts}). {cost}{times}."


def tabulate(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The comparison as rows of text: a header, then one row a quantity, one column an arm."""
    whole = [arm for arm in arms if not is_imported(arm["backbone"])]  # whose cost is known
    shortest = min((arm["seconds"] for arm in whole), default=0.0)
    rows = {
        "val accuracy": [f"{arm['val_accuracy']:.1%}" for arm in arms],
        "95 % interval": [f"{arm['interval'][0]:.1%} to {arm['interval'][1]:.1%}" for arm in arms],
        "correct": [f"{arm['correct']} of {arm['n_val']}" for arm in arms],
        "test accuracy": ["-" if arm["test_accuracy"] is None else f"{arm['test_accuracy']:.1%}" for arm in arms],
        "trainable parameters": [f"{arm['trainable_parameters']:,}" for arm in arms],
        "seconds, extraction": [_stage(arm, "extraction") for arm in arms],
        "seconds, training": [_stage(arm, "selection", "training") for arm in arms],
        "seconds, total": [f"{arm['seconds']:,.2f}" for arm in arms],
        "seconds per epoch": [_stage(arm, "per_epoch") for arm in arms],
        "time ratio": [f"x {arm['seconds'] / shortest:.1f}" if arm in whole else "-" for arm in arms],
        "peak memory": [format_bytes(arm["peak_memory_bytes"]) for arm in arms],
    }
    if all(cell == "-" for cell in rows["test accuracy"]):
        del rows["test accuracy"]
    return [["", *(arm["name"] for arm in arms)], *([name, *cells] for name, cells in rows.items())]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_markdown(
    rows: Sequence[Sequence[str]],
    verdict: str,
    arms: Sequence[dict[str, Any]],
    figures: Sequence[tuple[str, str]],
) -> str:
    """The comparison as a Markdown page: verdict, table, what was run, figures (caption, file)."""
    table = [_markdown_row(rows[0]), "|---|" + "---:|" * (len(rows[0]) - 1), *map(_markdown_row, rows[1:])]
    notes = [f"- **{_escape(arm['name'])}**: {_escape(arm['title'])}. {_escape(arm['selection'])}." for arm in arms]
    notes += [f"- {_escape(arm['name'])}: {_escape(note)}" for arm in arms for note in arm["notes"]]
    images = [f"![{caption}]({file})" for caption, file in figures]
    parts = [
        "# Comparison",
        _escape(verdict),
        "\n".join(table),
        INTERVALS_REMARK,
        "\n".join(notes),
        *images,
    ]
    return "\n\n".join(parts) + "\n"


RANKING_REMARK = (
    "p: exact McNemar test against the first row, adjusted for the number of rows (Holm). The first was found on these "
    "very validation images, so its accuracy is optimistic the more backbones were tried. GFLOPs: multiply-adds of one "
    "image, counted once. Extraction seconds are what all rows took on the machine that computed them."
)


def format_ranking_markdown(
    rows: Sequence[Sequence[str]],
    verdict: str,
    arms: Sequence[dict[str, Any]],
    figures: Sequence[tuple[str, str]],
    *,
    data: dict[str, Any],
    failed: Mapping[str, str],
) -> str:
    """A ranking as a Markdown page.

    `data` is that of the runs' records, `failed` the backbones that could not be used, with the reason.
    """
    counts = ", ".join(f"{n} {name}" for name, n in data["images"].items())
    origin = f"Data: {_escape(data['folder'])}, {counts} images, {len(data['classes'])} classes."
    table = [_markdown_row(rows[0]), "|---|" + "---:|" * (len(rows[0]) - 1), *map(_markdown_row, rows[1:])]
    notes = [f"- **{_escape(arm['name'])}**: {_escape(arm['layer'])}; {_escape(arm['selection'])}." for arm in arms]
    images = [f"![{caption}]({file})" for caption, file in figures]
    remarks = f"{INTERVALS_REMARK} {RANKING_REMARK}"
    notes += [f"- **{_escape(name)}** is left out: {_escape(reason)}" for name, reason in failed.items()]
    notes += [f"- {_escape(arm['name'])}: {_escape(note)}" for arm in arms for note in arm["notes"]]
    title = "# Backbones by their heads"
    parts = [title, origin, _escape(verdict), "\n".join(table), remarks, "\n".join(notes), *images]
    return "\n\n".join(parts) + "\n"


def format_seconds(seconds: float) -> str:
    """Seconds as a person says them.

    >>> format_seconds(0.0123), format_seconds(5.26), format_seconds(3725)
    ('0.012 s', '5.3 s', '1 h 02 min')
    """
    if seconds < 1:
        return f"{seconds:.3f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def format_bytes(n: int | None) -> str:
    """Bytes as a person says them.

    >>> format_bytes(None), format_bytes(812_345_678)
    ('-', '812 MB')
    """
    return "-" if n is None else f"{n / 1e6:,.0f} MB"


def _stage(arm: dict[str, Any], *names: str) -> str:
    values = [arm["seconds_by_stage"][name] for name in names if name in arm["seconds_by_stage"]]
    return f"{sum(values):,.2f}" if values else "-"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Names of files and classes must not become Markdown or HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
