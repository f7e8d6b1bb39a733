"""A comparison on disk: the page, the numbers, the Markdown, the figures; what of it has to be found out first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache import files
from featcache.backbones.pretraining import warn_of_overlap
from featcache.cache import FeatureCache, open_cache
from featcache.config import HeadConfig
from featcache.dataset import describe_data, reopen_root
from featcache.errors import FeatcacheError
from featcache.heads.rows import gather
from featcache.metrics import confusion_matrix
from featcache.pages import ArmView, ComparisonPage, FeatureMap, render_comparison
from featcache.plots import draw_accuracy_against_time, draw_arm_curves, draw_confusions, save_figure
from featcache.progress import Progress
from featcache.projection import LIMIT, draw_in_proportion, project
from featcache.report import Arm, format_markdown
from featcache.runs import read_history
from featcache.stages.learning_curve import learn_curve
from featcache.stages.plan_comparison import thaw
from featcache.storage import Place

PAGE, NUMBERS, MARKDOWN = "report.html", "compare.json", "compare.md"
FIGURES = (
    ("accuracy against time", "accuracy_vs_time.png"),
    ("accuracy by epoch", "curves.png"),
    ("confusion matrices", "confusions.png"),
)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a report is made from, beside the runs.

    Attributes
    ----------
    features
        A cache of the same images; None if there is none.
    curve
        Whether a learning curve is wanted.
    map
        What draws a second map of the features, beside PCA.
    command
        The command line that makes the comparison again.
    remarks
        What the reader should know of how it was made.
    """

    features: Place | None
    curve: bool
    map: str | None
    command: str
    remarks: tuple[str, ...] = ()


def write_comparison(
    output: Path, arms: Sequence[Arm], summary: Mapping[str, Any], material: Material, progress: Progress
) -> Path:
    """Write the report's folder; gives the page in it."""
    progress.say("report: figures, map and page")
    split, cache = summary["reported"]["split"], find_cache(material.features, arms)
    page = ComparisonPage(
        summary=dict(summary),
        arms=[
            ArmView(name=arm.name, predictions=arm.runs[0].predictions[split], histories=read_histories(arm))
            for arm in arms
        ],
        curve=find_curve(arms, cache, material, progress),
        feature_maps=[] if cache is None else list_maps(cache, split, material.map),
        root=reopen_root(arms[0].record.data["folder"]),
    )
    with files.fill_files(output) as folder:
        draw_figures(folder, arms, summary)
        (folder / MARKDOWN).write_text(format_markdown(summary, FIGURES), encoding="utf-8")
        (folder / NUMBERS).write_text(files.pretty_json(summary), encoding="utf-8")
        (folder / PAGE).write_text(render_comparison(page), encoding="utf-8")
    return output / PAGE


def read_histories(arm: Arm) -> list[list[dict[str, float]]]:
    """Of an arm that has epochs, those of every seed."""
    if arm.record.kind != "finetune":
        return []
    return [read_history(Path(run.run) / "history.csv") for run in arm.runs]


def find_cache(features: Place | None, arms: Sequence[Arm]) -> FeatureCache | None:
    """The cache, if it holds the very images that the arms were trained and validated on."""
    if features is None:
        return None
    try:
        cache = open_cache(features)
    except FeatcacheError:
        return None
    same = describe_data(cache.listing)["fingerprints"] == arms[0].record.data["fingerprints"]
    return cache if same else None


def find_curve(
    arms: Sequence[Arm], cache: FeatureCache | None, material: Material, progress: Progress
) -> dict[str, Any] | None:
    """The learning curve of the first head: the one that its run has, else a new one."""
    heads = [arm for arm in arms if arm.record.kind == "head"]
    if not heads:
        return None
    record = heads[0].record
    if "curve" in record.details:
        return dict(record.details["curve"])
    if not material.curve or cache is None or "shots" in record.settings or "fraction" in record.settings:
        return None
    config = HeadConfig(**{**thaw(record.settings), "views": False, "tta": False, "repeats": 1})
    try:
        return learn_curve(cache, config, progress).describe()
    except FeatcacheError as error:
        progress.say(f"no learning curve: {str(error).splitlines()[0]}")
        return None


def list_maps(cache: FeatureCache, reported: str, method: str | None) -> list[FeatureMap]:
    """The features of training and reported images in the plane, by PCA, and by what else was asked for."""
    splits = [name for name in ("train", reported) if name in cache.splits]
    labels = np.concatenate([cache.splits[name].listing.labels for name in splits])
    rows = draw_in_proportion(labels, LIMIT)
    starts = np.cumsum([0, *(len(cache.splits[name]) for name in splits)])
    features, names, paths = [], list[str](), list[str]()
    for name, start, end in zip(splits, starts[:-1], starts[1:], strict=True):
        own = rows[(rows >= start) & (rows < end)] - start
        features.append(np.asarray(gather(cache.splits[name].features, own), np.float32))
        names += [name] * len(own)
        paths += [cache.splits[name].listing.paths[row] for row in own.tolist()]
    maps = []
    for one in ("pca", *([method] if method else [])):
        projection = project(np.concatenate(features), labels[rows], method=one)
        note = projection.note.rpartition("; ")[0]
        part = f"{len(rows):,} of {len(labels):,}" if len(rows) < len(labels) else f"{len(rows):,}"
        maps.append(
            FeatureMap(
                method=projection.method,
                coordinates=projection.coordinates,
                labels=labels[rows],
                splits=tuple(names),
                paths=tuple(paths),
                note=f"{note}; {part} images",
            )
        )
    return maps


def draw_figures(folder: Path, arms: Sequence[Arm], summary: Mapping[str, Any]) -> None:
    """The figures of the Markdown page, as PNG."""
    split = summary["reported"]["split"]
    histories = {arm.name: read_histories(arm)[0] for arm in arms if arm.record.kind == "finetune"}
    lines = {arm["name"]: arm["accuracy"] for arm in summary["arms"] if arm["kind"] != "finetune"}
    matrices = {
        arm.name: confusion_matrix(predictions.labels, predictions.predicted, len(arm.record.classes))
        for arm in arms
        for predictions in (arm.runs[0].predictions[split],)
    }
    drawings = (
        draw_accuracy_against_time(summary["arms"], split),
        draw_arm_curves(histories, lines, split),
        draw_confusions(matrices, arms[0].record.classes),
    )
    for figure, (_, file) in zip(drawings, FIGURES, strict=True):
        save_figure(figure, folder / file)


def find_remarks(arms: Sequence[Arm]) -> list[str]:
    """What pretraining may have seen, once for each backbone."""
    remarks = [warn_of_overlap(arm.record.extractor, arm.record.data) for arm in arms]
    return [remark for remark in dict.fromkeys(remarks) if remark]
