"""`featcache audit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import TerminalProgress, json_option, option, output_option, print_json
from featcache.config import RUNS_DIR, AuditConfig
from featcache.errors import make_printable
from featcache.wording import format_count

if TYPE_CHECKING:
    from featcache.stages.audit import Audit, AuditedGroup, AuditedImage


@click.command("audit", short_help="What is wrong with the data: leaks, duplicates, wrong labels.")
@click.argument("features", type=click.Path(), metavar="FEATURES")
@output_option(f"{RUNS_DIR}/audit", "Folder of the page, audit.json and labels.csv.")
@option("--neighbours", type=click.IntRange(min=1), default=AuditConfig.neighbours, metavar="K",
        help="Nearest images that an outlier is far from.")  # fmt: skip
@option("--threshold", type=float, default=AuditConfig.threshold, metavar="COSINE",
        help="Similarity from which on two images are near-duplicates; 1 is the same.")  # fmt: skip
@option("--folds", type=click.IntRange(min=2), default=AuditConfig.folds,
        help="Of the cross-validation that judges the labels.")  # fmt: skip
@option("--seed", type=click.IntRange(min=0), default=AuditConfig.seed, help="Shuffles the folds.")
@option(
    "--top",
    type=click.IntRange(min=0),
    default=AuditConfig.top,
    metavar="N",
    help="Findings of each kind to print, and outliers to keep.",
)
@option("--strict", is_flag=True, help="Exit code 3 if an image, or nearly the same one, is in several splits.")
@json_option
def command(
    features: str,
    output: str,
    neighbours: int,
    threshold: float,
    folds: int,
    seed: int,
    top: int,
    strict: bool,
    as_json: bool,
) -> int:
    """What is wrong with the data behind FEATURES, a cache: images that are in several splits, duplicates, labels that
    are likely wrong, outliers, classes that overlap.

    Labels are judged by linear heads that learned from other images; nothing is changed.

    \b
    Example:
      featcache audit features.h5
      featcache audit features.h5 --threshold 0.95 --top 30
    """  # noqa: D205
    from featcache.stages.audit import audit

    found = audit(
        features,
        output,
        progress=TerminalProgress(),
        neighbours=neighbours,
        threshold=threshold,
        folds=folds,
        seed=seed,
        top=top,
    )
    if as_json:
        print_json(found.describe())
    else:
        for line in list_lines(found, top):
            click.echo(make_printable(line))
    return LEFT_OUT if strict and found.leakage else DONE


def list_lines(found: Audit, top: int) -> list[str]:
    """The summary for a person."""
    images = found.data["images"]
    counts = " + ".join(f"{n:,} {name}" for name, n in images.items())
    lines = [f"{found.features['cache']}: {counts} images, {len(found.data['classes'])} classes"]
    lines += say_leakage(found, top)
    lines += say_groups("exact duplicates", found.exact_duplicates, top)
    near = f"near-duplicates, similarity {found.settings['threshold']:g} or more"
    lines += say_groups(near, found.near_duplicates, top)
    lines += say_labels(found, top)
    lines.append(f"outliers, the {min(top, len(found.outliers))} least like any other image:")
    lines += [f"  {one.distance:.3f}  {one.path}" for one in found.outliers[:top] if one.distance is not None]
    lines += say_overlaps(found, top)
    lines += [f"note: {remark}" for remark in found.remarks]
    return [*lines, say_next(found), f"report: {found.report}"]


def say_leakage(found: Audit, top: int) -> list[str]:
    """Groups in several splits, first of all as they spoil every number that is measured on them."""
    if not found.leakage:
        return ["leakage: none found between the splits"]
    held_out = [name for name in found.data["images"] if name != "train"]
    leaked = {one.path: one.split for group in found.leakage for one in group.images}
    counts = [f"{sum(split == name for split in leaked.values()):,} of {found.data['images'][name]:,} {name} images"
              for name in held_out]  # fmt: skip
    text = f"LEAKAGE: {format_count(len(found.leakage), 'group')} in several splits, with {', '.join(counts)}"
    return [f"{text}; accuracy on those says little", *list_groups(found.leakage, top)]


def say_groups(what: str, groups: Sequence[AuditedGroup], top: int) -> list[str]:
    """Groups of one kind; those that leak were listed already."""
    if not groups:
        return [f"{what}: none"]
    n, contradictions = sum(len(group.images) for group in groups), sum(group.contradiction for group in groups)
    text = f"{what}: {format_count(len(groups), 'group')} of {n:,} images in all"
    text += f", {contradictions:,} of them under different labels" if contradictions else ""
    return [text, *list_groups([group for group in groups if not group.leak], top)]


def list_groups(groups: Sequence[AuditedGroup], top: int) -> list[str]:
    """A line a group."""
    lines = []
    for group in groups[:top]:
        mark = "exact" if group.kind == "exact" else f"{group.similarity:.3f}"
        paths = " = ".join(one.path for one in group.images[:4])
        more = f" and {len(group.images) - 4} more" if len(group.images) > 4 else ""
        lines.append(f"  {mark}  {paths}{more}{'  DIFFERENT LABELS' if group.contradiction else ''}")
    return lines + ([f"  and {len(groups) - top:,} more"] if len(groups) > top else [])


def say_labels(found: Audit, top: int) -> list[str]:
    """The labels that are most likely wrong."""
    accuracy = found.accuracy
    if accuracy is None:
        return ["likely wrong labels: not judged"]
    low, high = accuracy["interval"]
    agreed = f"{accuracy['correct']:,} of {accuracy['n']:,} labels ({accuracy['accuracy']:.1%}"
    return [
        f"likely wrong labels: {len(found.label_issues):,}",
        *map(say_label, found.label_issues[:top]),
        f"  heads that did not see the image agree with {agreed}, 95 % interval {low:.1%} to {high:.1%})",
    ]


def say_label(one: AuditedImage) -> str:
    """One label that is likely wrong."""
    return f"  {one.path}  {one.label} -> {one.suggested} ({one.probability:.0%})"


def say_overlaps(found: Audit, top: int) -> list[str]:
    """Classes that are taken for one another."""
    if not found.overlapping_classes:
        return []
    return [
        "classes that overlap:",
        *(
            f"  {one.first} / {one.second}: {one.first_as_second:,} {one.first} taken for {one.second}, "
            f"{one.second_as_first:,} the other way"
            for one in found.overlapping_classes[:top]
        ),
    ]


def say_next(found: Audit) -> str:
    """What to do with all this."""
    table = found.folder / "labels.csv"
    if found.accuracy is None:
        return f"next: see what could not be judged; {found.folder / 'audit.json'} holds the rest"
    if found.label_issues:
        return f"next: look through {table} from the top, where the labels are that are best to fix first"
    return f"next: no label is called wrong; {table} has all, the most doubtful first"
