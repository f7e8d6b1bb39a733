"""Numbers -> tables, for a terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featcache.config import is_imported
from featcache.errors import make_printable
from featcache.wording import format_large, format_p_value, format_points

MOST_COLUMNS = 5  # arms side by side; more become rows
INTERVALS_REMARK = (
    "Accuracies are means over seeds, ± the standard deviation over them; their intervals are Wilson's, at 95 %, for "
    "the sampling of the images alone. Those of differences are for images and seeds together where there are several "
    "seeds, else from a paired bootstrap over the images."
)

Row = tuple[str, Callable[[Mapping[str, Any]], str]]


def tabulate(summary: Mapping[str, Any]) -> list[list[str]]:
    """The comparison as rows of text: a header, then one row a quantity, one column an arm; many arms are rows."""
    arms = summary["arms"]
    rows = [[name, *map(say, arms)] for name, say in list_rows(summary)]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    table = [["", *(arm["name"] for arm in arms)], *rows]
    return table if len(arms) <= MOST_COLUMNS else [list(row) for row in zip(*table, strict=True)]


def list_rows(summary: Mapping[str, Any]) -> list[Row]:
    """What is told of every arm, and how."""
    split, arms = summary["reported"]["split"], summary["arms"]
    other = "val" if split == "test" else "test"
    whole = [arm for arm in arms if not is_imported(arm["backbone"])]  # whose cost is known
    shortest = min((arm["cost"]["seconds"]["total"] for arm in whole), default=0.0)

    def say_ratio(arm: Mapping[str, Any]) -> str:
        return f"x {arm['cost']['seconds']['total'] / shortest:.1f}" if arm in whole and shortest else "-"

    return [
        (f"{split} accuracy", say_accuracy),
        ("95 % interval", lambda arm: f"{arm['interval'][0]:.1%} to {arm['interval'][1]:.1%}"),
        ("correct", lambda arm: f"{'/'.join(str(run['correct']) for run in arm['runs'])} of {arm['images']}"),
        (f"{other} accuracy", lambda arm: "-" if (a := arm[f"{other}_accuracy"]) is None else f"{a:.1%}"),
        ("trainable parameters", lambda arm: f"{arm['cost']['trainable_parameters']:,}"),
        ("seconds, extraction", lambda arm: say_stage(arm, "extraction")),
        ("seconds, training", lambda arm: say_stage(arm, "head", "selection", "training")),
        ("seconds, total", lambda arm: say_stage(arm, "total")),
        ("CPU seconds, total", lambda arm: say_number((arm["cost"]["cpu_seconds"] or {}).get("total"))),
        ("seconds per epoch", lambda arm: say_number(arm["cost"]["seconds_per_epoch"])),
        ("time ratio", say_ratio),
        ("images per second", lambda arm: say_number(arm["cost"]["images_per_second"], 1)),
        ("floating-point operations", lambda arm: say_large(arm["cost"]["flops"], "")),
        ("energy", lambda arm: say_large(arm["cost"]["energy_joules"], "J")),
        ("peak memory", lambda arm: format_bytes(arm["cost"]["peak_memory_bytes"])),
        ("size of the result", lambda arm: say_large(arm["cost"]["result_bytes"], "B")),
    ]


def say_accuracy(arm: Mapping[str, Any]) -> str:
    """With the standard deviation over seeds."""
    spread = arm["seed_spread"]
    return f"{arm['accuracy']:.1%}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def say_stage(arm: Mapping[str, Any], *names: str) -> str:
    """Seconds of some stages together."""
    seconds = arm["cost"]["seconds"]
    values = [seconds[name] for name in names if name in seconds]
    return f"{sum(values):,.2f}" if values else "-"


def say_number(value: float | None, digits: int = 2) -> str:
    """A number, or a stroke."""
    return "-" if value is None else f"{value:,.{digits}f}"


def say_large(value: float | None, unit: str) -> str:
    """A large number, or a stroke."""
    return "-" if value is None else format_large(value, unit).strip()


def tabulate_pairs(summary: Mapping[str, Any]) -> list[list[str]]:
    """What sets every two arms apart."""
    several = len(summary["pairs"]) > 1
    header = ["", "difference", "95 % interval", "p", *(["p, Holm"] if several else []), "detectable"]
    return [header, *(tabulate_pair(pair, several=several) for pair in summary["pairs"])]


def tabulate_pair(pair: Mapping[str, Any], *, several: bool) -> list[str]:
    """A row of the table above."""
    low, high = (format_points(bound, unit=False) for bound in pair["interval_with_seeds"] or pair["interval"])
    detectable = pair["detectable_difference"]
    return [
        f"{pair['first']} - {pair['second']}",
        format_points(pair["difference"]),
        f"{low} to {high}",
        format_p_value(pair["p_value"]),
        *([format_p_value(pair["p_adjusted"])] if several else []),
        "none" if detectable is None else format_points(detectable).lstrip("+"),
    ]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    rows = [[make_printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_markdown(summary: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """The comparison as a Markdown page for pull requests: verdict, tables, what was run, figures (caption, file)."""
    arms, data = summary["arms"], summary["data"]
    counts = ", ".join(f"{n:,} {name}" for name, n in data["images"].items())
    notes = [f"- **{escape(arm['name'])}**: {escape(arm['title'])}. {escape(arm['selection'])}." for arm in arms]
    notes += [f"- {escape(arm['name'])}: {escape(note)}" for arm in arms for note in arm["notes"]]
    notes += [f"- {escape(remark)}" for remark in summary["remarks"]]
    parts = [
        "# Comparison",
        f"**{escape(summary['verdict'])}**",
        escape(summary["grounds"]),
        f"Data: {escape(data['folder'])}, {counts} images, {len(data['classes'])} classes.",
        format_markdown_table(tabulate(summary)),
        *([format_markdown_table(tabulate_pairs(summary))] if summary["pairs"] else []),
        INTERVALS_REMARK,
        "\n".join(notes),
        *([f"    {make_printable(summary['command'])}"] if summary["command"] else []),
        *(f"![{caption}]({file})" for caption, file in figures),
    ]
    return "\n\n".join(parts) + "\n"


def format_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table, the first of them its head."""
    ruler = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([format_markdown_row(rows[0]), ruler, *map(format_markdown_row, rows[1:])])


def format_markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def escape(text: str) -> str:
    """Names of files and classes must not become Markdown or HTML."""
    marked = re.sub(r"[\\`*\[\]|]", r"\\\g<0>", make_printable(text))
    return marked.replace("&", "&amp;").replace("<", "&lt;")


def format_bytes(n: int | None) -> str:
    """Bytes as a person says them.

    >>> format_bytes(None), format_bytes(812_345_678)
    ('-', '812 MB')
    """
    return "-" if n is None else f"{n / 1e6:,.0f} MB"
