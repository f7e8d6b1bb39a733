"""The leaderboard of backbones: all against the first one, as numbers, in a table, in Markdown and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcache.evidence import SIGNIFICANCE, claim, weigh
from featcache.report.arms import SCHEMA, Arm, choose_split, describe_pair, list_remarks
from featcache.report.tables import escape, format_markdown_table
from featcache.report.verdict import join_words, say_limit, say_share, state_pair
from featcache.wording import format_count, format_p_value, format_points, format_seconds

RANKING_REMARK = (
    "Intervals are Wilson's, at 95 %, for the sampling of the images alone. p: exact McNemar test against the first "
    "row, adjusted for the number of rows (Holm). The first was found on these very images, so its accuracy is "
    "optimistic the more backbones were tried. GFLOPs: multiply-adds of one image, counted once. Extraction seconds "
    "are what all rows took on the machine that computed them."
)


def compare_with_first(arms: Sequence[Arm], split: str = "val") -> list[dict[str, Any]]:
    """What sets the first arm apart from every other, p-values adjusted for their number (Holm)."""
    rights = [arm.find_rights(split) for arm in arms]
    level = SIGNIFICANCE / max(len(arms) - 1, 1)
    evidence = [weigh(rights[0], other, alpha=level) for other in rights[1:]]
    return [
        describe_pair(arms[0], other, one, better, p_adjusted, split)
        for other, one, (better, p_adjusted) in zip(arms[1:], evidence, claim(evidence), strict=True)
    ]


def summarise_ranking(
    arms: Sequence[Arm],
    numbers: Sequence[Mapping[str, Any]],
    *,
    failed: Mapping[str, str],
    remarks: Sequence[str] = (),
    command: str = "",
    created: str = "",
) -> dict[str, Any]:
    """The whole ranking as plain JSON values; see docs/json.md.

    Parameters
    ----------
    arms
        The best first.
    numbers
        Of each: `describe_arm`, and what its features are and cost.
    failed
        Backbones that could not be used, with the reason.
    remarks, command, created
        As in `summarise`.
    """
    split, record = choose_split(arms), arms[0].record
    pairs = compare_with_first(arms, split)
    ranked = [{**one, "against_first": pair} for one, pair in zip(numbers, [None, *pairs], strict=True)]
    return {
        "schema": SCHEMA,
        "kind": "ranking",
        "verdict": state_ranking(ranked),
        "grounds": state_ranking_grounds(ranked),
        "created": created,
        "command": command,
        "data": record.data,
        "reported": {"split": split, "images": ranked[0]["images"]},
        "significance": SIGNIFICANCE,
        "arms": ranked,
        "failed": dict(failed),
        "remarks": [*remarks, *list_remarks(arms, split)],
        "environment": record.environment,
    }


def state_ranking(arms: Sequence[Mapping[str, Any]]) -> str:
    """What a ranking shows of the first arm, and never more, in one sentence."""
    first, others = arms[0], arms[1:]
    images = format_count(first["images"], "image")
    if not others:
        return f"{first['name']}: {say_share(first)} of {images} are right; there is nothing to compare it with."
    alike = _list_alike(others)
    if not alike:
        worse = others[0]["name"] if len(others) == 1 else f"each of the {len(others)} others"
        return f"{first['name']} is better than {worse} on these {images}."
    if all(arm["against_first"]["flattered"] for arm in alike):
        return f"Nothing can be said of {first['name']}: it was chosen on the very images that are reported."
    names = [arm["name"] for arm in alike]
    told = join_words(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
    joined = f"{first['name']} and {told}" if len(names) == 1 else f"{first['name']} and any of {told}"
    return f"No difference between {joined} can be shown on {images}{_say_cheapest(first, alike)}."


def state_ranking_grounds(arms: Sequence[Mapping[str, Any]]) -> str:
    """The numbers behind that, in a few sentences."""
    first, others = arms[0], arms[1:]
    if not others:
        return _say_extraction(arms)
    if len(others) == 1:
        return f"{state_pair(arms, others[0]['against_first'])} {_say_extraction(arms)}".rstrip()
    second, pair, worse = others[0], others[0]["against_first"], len(others) - len(_list_alike(others))
    low, high = (format_points(bound, unit=False) for bound in pair["interval"])
    p_value = format_p_value(pair["p_adjusted"])
    said = (
        f"{first['name']} has the most right, {say_share(first)}, next is {second['name']} with {say_share(second)}: a "
        f"difference of {format_points(pair['difference'])} (95 % interval {low} to {high}; exact McNemar p "
        f"{p_value if p_value.startswith('<') else f'= {p_value}'}, adjusted by Holm for {len(others)} others)."
    )
    several = f"It is shown to be better than {worse} of them." if 0 < worse < len(others) else ""
    limit = say_limit(pair, arms) if pair["claim"] == "none" else ""
    return " ".join(part for part in (said, several, limit, _say_extraction(arms)) if part)


def _list_alike(others: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that the first is not shown to be better than."""
    return [arm for arm in others if arm["against_first"]["claim"] != "first"]


def _say_cheapest(first: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """Of those that none is shown to beat, what the cheapest to extract saves."""
    known = [arm for arm in (first, *alike) if arm["extraction_seconds"]]
    cheap = min(known, key=lambda arm: float(arm["extraction_seconds"]), default=first)
    if cheap is first or not first["extraction_seconds"]:
        return ""
    ratio = first["extraction_seconds"] / cheap["extraction_seconds"]
    return f"; {cheap['name']} extracts in 1/{ratio:,.3g} of the time" if ratio >= 1.2 else ""


def _say_extraction(arms: Sequence[Mapping[str, Any]]) -> str:
    """How long extraction took, of few each, of many the ends."""
    known = sorted((arm["extraction_seconds"], arm["name"]) for arm in arms if arm["extraction_seconds"])
    if not known:
        return ""
    if len(known) <= 3:
        return f"Extraction took {', '.join(f'{format_seconds(seconds)} with {name}' for seconds, name in known)}."
    (least, cheap), (most, dear) = known[0], known[-1]
    return f"Extraction took {format_seconds(least)} with {cheap} to {format_seconds(most)} with {dear}."


def tabulate_ranking(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A ranking as rows of text, one an arm."""
    header = ["", "accuracy", "95 % interval", "p vs 1st", "width", "params", "GFLOPs", "extraction s", "head s"]
    return [header, *map(_ranking_row, arms)]


def _ranking_row(arm: Mapping[str, Any]) -> list[str]:
    pair, operations, extraction = arm["against_first"], arm["multiply_adds"], arm["extraction_seconds"]
    return [
        arm["name"],
        f"{arm['accuracy']:.1%}",
        f"{arm['interval'][0]:.1%} to {arm['interval'][1]:.1%}",
        "-" if pair is None else f"{pair['p_adjusted']:.2g}",
        f"{arm['width']:,}",
        "-" if arm["parameters"] is None else f"{arm['parameters'] / 1e6:,.1f} M",
        "-" if operations is None else f"{operations / 1e9:,.2f}",
        "-" if extraction is None else f"{extraction:,.1f}",
        f"{arm['head_seconds']:,.2f}",
    ]


def format_ranking_markdown(summary: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """A ranking as a Markdown page, with figures (caption, file)."""
    arms, data = summary["arms"], summary["data"]
    counts = ", ".join(f"{n:,} {name}" for name, n in data["images"].items())
    notes = [f"- **{escape(arm['name'])}**: {escape(arm['layer'])}; {escape(arm['selection'])}." for arm in arms]
    notes += [f"- **{escape(name)}** is left out: {escape(reason)}" for name, reason in summary["failed"].items()]
    notes += [f"- {escape(arm['name'])}: {escape(note)}" for arm in arms for note in arm["notes"]]
    notes += [f"- {escape(remark)}" for remark in summary["remarks"]]
    parts = [
        "# Backbones by their heads",
        f"**{escape(summary['verdict'])}** {escape(summary['grounds'])}",
        f"Data: {escape(data['folder'])}, {counts} images, {len(data['classes'])} classes.",
        format_markdown_table(tabulate_ranking(arms)),
        RANKING_REMARK,
        "\n".join(notes),
        *(f"![{caption}]({file})" for caption, file in figures),
    ]
    return "\n\n".join(parts) + "\n"
