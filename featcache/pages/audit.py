"""An AuditPage as the content of its template: the finding that matters most as a sentence, what to do, the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.metrics import confusion_matrix
from featcache.pages import figures
from featcache.pages.filling import GALLERY_SIDE, MAX_BYTES, Content, fill_template, name_folder, take_thumbnails
from featcache.pages.values import AuditPage
from featcache.wording import format_count, format_share

TEMPLATE = "audit.html.j2"
LEAKS, GROUPS = 16, 12  # groups of one kind that are shown
GROUP_IMAGES = 6  # of one group
LABELS, OUTLIERS, OVERLAPS = 48, 25, 12
WRONG, DOUBTFUL, FINE, UNKNOWN = "tone-wrong", "tone-doubt", "tone-fine", "tone-none"  # of tiles, as page.css has them

Numbers = Mapping[str, Any]


def render_audit(page: AuditPage) -> str:
    """The page as one HTML document of less than 5 MB; thumbnails that would make it larger are left out.

    Parameters
    ----------
    page
        What it shows.

    Returns
    -------
    Text that UTF-8 can encode, whatever the names of files and classes hold.
    """
    content = describe_audit(page)
    bare = fill_template(TEMPLATE, content)
    if page.root is None:
        return bare
    left = MAX_BYTES - len(bare.encode("utf-8"))
    content["thumbnails"], _ = take_thumbnails(page.root, _list_paths(content), GALLERY_SIDE, left)
    return fill_template(TEMPLATE, content)


def describe_audit(page: AuditPage) -> Content:
    """Everything that the template draws; a section that has nothing to show is empty, and left out."""
    summary = page.summary
    leaks = summary["leakage"]
    inside = {kind: [one for one in summary[f"{kind}_duplicates"] if not one["leak"]] for kind in ("exact", "near")}
    content: Content = {
        "summary": summary,
        "name": name_folder(summary["data"]["folder"]),
        "headline": state_findings(summary),
        "detail": state_details(summary),
        "tiles": _list_tiles(summary),
        "steps": list_steps(summary, page.table),
        "leaks": _cut_groups(leaks, LEAKS),
        "labels": _choose_labels(summary["label_issues"], page.ranking),
        "exact": _cut_groups(inside["exact"], GROUPS),
        "near": _cut_groups(inside["near"], GROUPS),
        "outliers": [one for one in summary["outliers"][:OUTLIERS] if one["distance"] is not None],
        "overlaps": {"rows": summary["overlapping_classes"][:OVERLAPS], "n": len(summary["overlapping_classes"])},
        "confusions": _count_confusions(page),
        "agreement": summary["accuracy"] and {**summary["accuracy"], **figures.draw_agreement(summary["accuracy"])},
        "command": page.command,
        "table": page.table,
        "versions": page.versions,
        "thumbnails": {},
    }
    content["sections"] = _list_sections(content)
    return content


# --- in words ---------------------------------------------------------------------------------------------------------


def state_findings(summary: Numbers) -> str:
    """The most important findings in one sentence: leaks first, as they spoil every number, then wrong labels."""
    found = [*say_leakage(summary), *say_contradictions(summary)]
    n = len(summary["label_issues"])
    if n:
        found.append(f"{format_count(n, 'label')} {'is' if n == 1 else 'are'} likely wrong")
    if found:
        before = ", ".join(found[:-1])
        return f"{before}, and {found[-1]}." if before else f"{found[0]}."
    if summary["accuracy"] is None:
        return "No leakage was found; the labels could not be judged."
    return "No leakage was found, and no label is called wrong."


def say_leakage(summary: Numbers) -> list[str]:
    """How many images that are judged can be learned from, too."""
    groups = summary["leakage"]
    if not groups:
        return []
    splits = {one["split"] for group in groups for one in group["images"]}
    kinds = {group["kind"] for group in groups}
    if len(splits) != 2 or "train" not in splits:
        return [f"{format_count(len(groups), 'group')} of copies reach across splits"]
    (other,) = splits - {"train"}
    n = len({one["path"] for group in groups for one in group["images"] if one["split"] == other})
    said = {
        frozenset({"exact"}): "in train too",
        frozenset({"near"}): "nearly in train too",
    }.get(frozenset(kinds), "in train too, or nearly so")
    return [f"{format_count(n, f'{other} image')} {'is' if n == 1 else 'are'} {said}"]


def say_contradictions(summary: Numbers) -> list[str]:
    """How many images are there under several labels."""
    n = sum(group["contradiction"] for group in summary["exact_duplicates"])
    return [f"{format_count(n, 'image')} {'has' if n == 1 else 'have'} two labels"] if n else []


def state_details(summary: Numbers) -> str:
    """What that means, in a sentence or two."""
    said = []
    if summary["leakage"]:
        said.append("Accuracy that is measured on images that are in train too says little.")
    accuracy = summary["accuracy"]
    if accuracy is None:
        said.append("Why no label could be judged is said below.")
    else:
        low, high = (format_share(end) for end in accuracy["interval"])
        said.append(
            f"Heads that did not see an image agree with {format_share(accuracy['accuracy'])} of "
            f"{format_count(accuracy['n'], 'label')} (95 % interval {low} to {high})."
        )
    return " ".join(said)


def list_steps(summary: Numbers, table: str) -> list[Content]:
    """What to do, the most pressing first."""
    steps = []
    leaks, labels = len(summary["leakage"]), len(summary["label_issues"])
    contradictions = sum(group["contradiction"] and not group["leak"] for group in summary["exact_duplicates"])
    inside = sum(not group["leak"] for kind in ("exact", "near") for group in summary[f"{kind}_duplicates"])
    if leaks:
        what = f"Bring {'the group' if leaks == 1 else f'each of the {leaks:,} groups'} below into one split."
        steps.append((what, "Or delete the copies; until then, accuracy is too high."))
    if contradictions:
        one = contradictions == 1
        what = f"Settle the {'image that is' if one else f'{contradictions:,} images that are'} there under two labels."
        steps.append((what, "One of the two is wrong: move one file, or delete it."))
    if labels:
        what = f"Look at the {'label that is' if labels == 1 else f'{labels:,} labels that are'} called wrong."
        steps.append((what, f"Move those that are; go on in {table} from the top until most labels are right."))
    if inside:
        what = f"Look over the {'group' if inside == 1 else f'{inside:,} groups'} of duplicates within a split."
        steps.append((what, "They do no harm to what is measured, but count twice in training."))
    if steps:
        how = "Files that did not change are not computed again: this takes seconds."
        steps.append(("Extract and audit again.", how))
    else:
        steps.append(("Nothing needs to be done.", "Glance at the outliers and the most doubtful labels."))
    return [{"what": what, "how": how} for what, how in steps]


def _list_tiles(summary: Numbers) -> list[Content]:
    """The numbers at the top: how many of each finding."""
    leaks, accuracy, n_images = summary["leakage"], summary["accuracy"], sum(summary["images"].values())
    tiles = [("Leakage", len(leaks), "group", "in several splits", "leakage", WRONG)]
    for kind, name in (("exact", "Exact duplicates"), ("near", "Near-duplicates")):
        groups = [one for one in summary[f"{kind}_duplicates"] if not one["leak"]]
        tone = WRONG if any(one["contradiction"] for one in groups) and kind == "exact" else DOUBTFUL
        tiles.append((name, len(groups), "group", "within a split", kind, tone))
    counted = [
        {
            "name": name,
            "value": f"{n:,}",
            "note": f"{noun if n == 1 else noun + 's'} {note}" if n else "none found",
            "anchor": anchor if n else None,
            "tone": tone if n else FINE,
        }
        for name, n, noun, note, anchor, tone in tiles
    ]
    issues = len(summary["label_issues"])
    judged = {
        "name": "Likely wrong labels",
        "value": f"{issues:,}" if accuracy else "–",
        "note": f"of {accuracy['n']:,} that were judged" if accuracy else f"none of {n_images:,} was judged",
        "anchor": "labels" if accuracy else None,
        "tone": (DOUBTFUL if issues else FINE) if accuracy else UNKNOWN,
    }
    return [counted[0], judged, *counted[1:]]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _cut_groups(groups: Sequence[Numbers], limit: int) -> Content:
    """The first groups, with their first images; of a leak some of each split."""
    shown = [
        {**group, "images": _spread_splits(group["images"])[:GROUP_IMAGES], "n": len(group["images"])}
        for group in groups[:limit]
    ]
    return {"groups": shown, "n": len(groups)}


def _spread_splits(images: Sequence[Numbers]) -> list[Numbers]:
    """In turns from every split, so that the first few show what is shared."""
    turns: dict[str, int] = {}
    order = []
    for i, one in enumerate(images):
        turns[one["split"]] = turns.get(one["split"], -1) + 1
        order.append((turns[one["split"]], i))
    return [images[i] for _, i in sorted(order)]


def _choose_labels(issues: Sequence[Numbers], ranking: Sequence[Numbers]) -> Content:
    """The labels that are called wrong, then the next of the ranking, as many as there is room for."""
    called = issues[:LABELS]
    rest = (one for one in ranking if not one["is_issue"] and one["quality"] is not None)
    following = [one for one, _ in zip(rest, range(LABELS - len(called)), strict=False)]
    return {"called": called, "n": len(issues), "next": following}


def _count_confusions(page: AuditPage) -> Content:
    """Labels by what heads said of them, those that were judged."""
    classes = page.summary["data"]["classes"]
    if len(classes) > figures.DRAWN_CLASSES:
        return {"form": "pairs"}
    numbers = {name: i for i, name in enumerate(classes)}
    judged = [one for one in page.ranking if one["suggested"] is not None]
    labels, said = (np.array([numbers[one[key]] for one in judged], np.int64) for key in ("label", "suggested"))
    return figures.lay_out_confusions(confusion_matrix(labels, said, len(classes)))


def _list_sections(content: Content) -> list[tuple[str, str]]:
    """The (anchor, title) of what there is to show."""
    every = (
        ("next", "What to do", True),
        ("leakage", "Leakage", content["leaks"]["n"]),
        ("labels", "Labels", content["labels"]["called"] or content["labels"]["next"]),
        ("exact", "Exact duplicates", content["exact"]["n"]),
        ("near", "Near-duplicates", content["near"]["n"]),
        ("outliers", "Outliers", content["outliers"]),
        ("overlaps", "Classes", content["overlaps"]["rows"]),
        ("accuracy", "Agreement", content["agreement"]),
        ("run", "What was run", True),
    )
    return [(anchor, title) for anchor, title, there in every if there]


def _list_paths(content: Content) -> Iterator[str]:
    """Of every image that is shown, in the order of the page."""
    shown = [content["leaks"], content["labels"], content["exact"], content["near"]]
    for part in shown:
        for group in part.get("groups", [{"images": [*part.get("called", []), *part.get("next", [])]}]):
            yield from (image["path"] for image in group["images"])
    yield from (image["path"] for image in content["outliers"])
