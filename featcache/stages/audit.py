"""What is wrong with the data, found from its cached features: leaks, duplicates, wrong labels, outliers, overlaps."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.cache import FeatureCache, check_complete, open_readers, read_cache
from featcache.config import RUNS_DIR, AuditConfig, HeadConfig, name_option
from featcache.dataset import describe_data, reopen_root
from featcache.errors import DatasetError, OutputError
from featcache.extras import import_extra
from featcache.findings import (
    ALWAYS,
    Group,
    LabelRanking,
    Neighbours,
    check_finite,
    find_exact,
    find_near,
    find_neighbours,
    find_overlaps,
    join_contents,
    make_group_folds,
    number_contents,
    rank_labels,
    rank_outliers,
)
from featcache.heads.logistic import choose_c, make_problem, predict_held_out
from featcache.heads.rows import TrainingRows
from featcache.metrics import to_probabilities, wilson_interval
from featcache.pages import AuditPage, render_audit
from featcache.progress import SILENT, Progress, format_bytes
from featcache.runs import describe_environment
from featcache.stages.train_head import settle_scaling
from featcache.storage import Place, locate, locate_local

RECORD, TABLE, PAGE = "audit.json", "labels.csv", "audit.html"
SCHEMA = 1
COPIES = 5  # of the features, float32, that are in memory at the same time
OUTLIER_SHARE = 0.01  # of the images, whose distances are kept
MANY = 0.2  # of the images in groups of near-duplicates, from which on the threshold is doubted


@dataclass(frozen=True, kw_only=True)
class AuditedImage:
    """One image and what its label is worth.

    Attributes
    ----------
    path
        Relative to the data set's folder.
    split, label
        Where it is, and as what.
    suggested
        The most probable class; None where the label was not judged.
    probability
        Of that class.
    quality
        Of the given class: 0 wrong, 1 right.
    is_issue
        Whether the label is called wrong.
    distance
        1 minus the mean similarity to its nearest neighbours; None where it is not known.
    """

    path: str
    split: str
    label: str
    suggested: str | None
    probability: float | None
    quality: float | None
    is_issue: bool
    distance: float | None


@dataclass(frozen=True, kw_only=True)
class AuditedGroup:
    """Images that are the same, or nearly; see `featcache.findings.Group`."""

    kind: str
    similarity: float | None
    contradiction: bool
    leak: bool
    images: tuple[AuditedImage, ...]


@dataclass(frozen=True, kw_only=True)
class AuditedOverlap:
    """Two classes that are taken for one another, and how many of their images."""

    first: str
    second: str
    first_as_second: int
    second_as_first: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found. The lists are ranked, the worst first.

    Attributes
    ----------
    folder
        Where audit.html, audit.json and labels.csv lie.
    features
        The cache: path, digest of its content, backbone, features per image.
    data
        The data set: folder, classes, images and fingerprint of each split.
    settings
        Of the audit.
    accuracy
        Of the labels against a linear head that did not learn from the image or its twins: correct, n, accuracy,
        interval, C; None where no label could be judged.
    leakage
        Groups that are in several splits, exact ones first.
    exact_duplicates, near_duplicates
        All groups.
    label_issues
        Images whose label is called wrong.
    outliers
        The images that are least like any other.
    overlapping_classes
        Pairs of classes that are taken for one another.
    remarks
        What could not be judged, and what to doubt.
    ranking
        All images, the label that is most worth a look first: the rows of labels.csv.
    """

    folder: Path
    features: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    accuracy: dict[str, Any] | None
    leakage: tuple[AuditedGroup, ...]
    exact_duplicates: tuple[AuditedGroup, ...]
    near_duplicates: tuple[AuditedGroup, ...]
    label_issues: tuple[AuditedImage, ...]
    outliers: tuple[AuditedImage, ...]
    overlapping_classes: tuple[AuditedOverlap, ...]
    remarks: tuple[str, ...]
    ranking: tuple[AuditedImage, ...]

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / PAGE

    def describe(self) -> dict[str, Any]:
        """As plain values, those of audit.json (see docs/json.md)."""
        return {
            "schema": SCHEMA,
            "features": self.features,
            "data": self.data,
            "images": self.data["images"],
            "settings": self.settings,
            "accuracy": self.accuracy,
            "leakage": [asdict(group) for group in self.leakage],
            "exact_duplicates": [asdict(group) for group in self.exact_duplicates],
            "near_duplicates": [asdict(group) for group in self.near_duplicates],
            "label_issues": [asdict(image) for image in self.label_issues],
            "outliers": [asdict(image) for image in self.outliers],
            "overlapping_classes": [asdict(pair) for pair in self.overlapping_classes],
            "remarks": list(self.remarks),
        }


def audit(
    features: Place | str,
    output: Path | str = f"{RUNS_DIR}/audit",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Audit:
    """Look for leaks, duplicates, wrong labels, outliers and overlapping classes in the data behind a cache.

    All splits are judged together; nothing is changed. An audit that lies at the output already is replaced.

    Parameters
    ----------
    features
        A cache that `extract_features` or `import_features` made. Of its views nothing is used.
    output
        Folder of audit.html, the page; audit.json and labels.csv.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.AuditConfig`.

    Returns
    -------
    Audit

    Raises
    ------
    MissingExtraError
        If cleanlab is not installed.
    CacheError
        If the file is not a feature cache, or damaged.
    DatasetError
        If features are no finite numbers, or do not fit into memory.
    SettingsError
        If a setting is out of its range.
    OutputError
        If something other than an audit lies at the output, or it cannot be written.

    Examples
    --------
    >>> audit("features.h5").label_issues[0].path                          # doctest: +SKIP
    'train/ants/1473187633_63ccaacea6.jpg'
    """
    config, output = AuditConfig(**settings), locate_local(output, "an audit")
    import_extra("cleanlab", extra="audit", what="an audit needs")
    check_replaceable(output)
    files.check_folder_writable(output.parent, output)
    check_memory(features)
    cache = read_cache(features)
    check_complete(cache, features)
    found = audit_cache(cache, config, progress, path=locate(features), output=output)
    with files.fill_files(output) as folder:
        write_audit(folder, found)
    return found


def check_replaceable(output: Path) -> None:
    """Raise an OutputError if something lies at `output` that is neither an audit nor an empty folder."""
    if not output.exists() or (output / RECORD).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise OutputError(f"{output} is there and is not an audit; choose another place with -o")


def check_memory(features: Place | str) -> None:
    """Raise a DatasetError if an audit of these features would take more memory than is free, where that is known."""
    with open_readers(features) as readers:
        n_numbers = sum(int(np.prod(reader.shape_of(split))) for reader in readers for split in reader.lengths)
    free, needed = files.find_free_memory(), COPIES * 4 * n_numbers
    if free is not None and needed > free:
        raise DatasetError(
            f"an audit of {features} holds all features in memory: {format_bytes(needed)} are needed and "
            f"{format_bytes(free)} free; extract a part of the images with `featcache extract PART`, and audit that"
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """All splits of a cache, one after the other.

    `paths` N, `splits` N names, `where` (N,) their numbers, `labels` (N,), `contents` (N,) equal where the images'
    digests are, `features` (N, D).
    """

    paths: list[str]
    splits: list[str]
    where: NDArray[np.int64]
    labels: NDArray[np.int64]
    contents: NDArray[np.int64]
    features: NDArray[np.float32]


def join_splits(cache: FeatureCache) -> Table:
    """The rows of all splits, plain features only."""
    splits = cache.splits
    return Table(
        paths=cache.listing.paths(),
        splits=[name for name, split in splits.items() for _ in range(len(split))],
        where=np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()]),
        labels=np.concatenate([split.listing.labels for split in splits.values()]),
        contents=number_contents([digest for split in splits.values() for digest in split.listing.digests]),
        features=np.concatenate([split.features for split in splits.values()]),
    )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What heads say of the labels: probabilities (N, C), which rows they judged (N,), and their C, None without."""

    probabilities: NDArray[np.float64]
    rows: NDArray[np.bool_]
    strength: float | None


def audit_cache(cache: FeatureCache, config: AuditConfig, progress: Progress, *, path: Place, output: Path) -> Audit:
    """Everything that is found in a cache. Writes nothing."""
    table = join_splits(cache)
    check_finite(table.features, table.paths)
    neighbours = find_neighbours(table.features, config.neighbours, config.threshold, progress)
    exact = find_exact(table.contents, table.labels, table.where)
    near = find_near(neighbours, table.contents, table.labels, table.where)
    groups = join_contents(neighbours.groups, table.contents)
    judged = judge_labels(table, groups, cache, config, progress)
    ranking = rank_labels(table.labels, judged.probabilities, judged.rows)
    order, distance = rank_outliers(neighbours)
    n_outliers = max(config.top, round(OUTLIER_SHARE * len(table.labels)))
    images = describe_images(table, cache.classes, judged, ranking, distance)
    leaks = [group for group in (*exact, *near) if group.leak]

    def describe(found: Sequence[Group]) -> tuple[AuditedGroup, ...]:
        return tuple(describe_group(group, images) for group in found)

    return Audit(
        folder=output,
        features=describe_features(cache, path),
        data=describe_data(cache.listing),
        settings=asdict(config),
        accuracy=describe_accuracy(table.labels, ranking, judged),
        leakage=describe(leaks),
        exact_duplicates=describe(exact),
        near_duplicates=describe(near),
        label_issues=tuple(images[i] for i in ranking.order.tolist() if ranking.issues[i]),
        outliers=tuple(images[i] for i in order[:n_outliers].tolist()),
        overlapping_classes=describe_overlaps(table.labels, ranking, judged, cache.classes),
        remarks=tuple(list_remarks(table, neighbours, near, judged, config)),
        ranking=tuple(images[i] for i in ranking.order.tolist()),
    )


def judge_labels(
    table: Table, groups: NDArray[np.int64], cache: FeatureCache, config: AuditConfig, progress: Progress
) -> Judged:
    """Probabilities of every image by a linear head that learned from the other folds, of all splits together.

    C is chosen once, by the log loss of the held-out folds: it is what the wrong labels themselves bear best, and
    leaves the probabilities about calibrated. A class that is in no split is left out of the fits.
    """
    present, labels = np.unique(table.labels, return_inverse=True)
    probabilities = np.zeros((len(labels), len(cache.classes)))
    nobody = Judged(probabilities=probabilities, rows=np.zeros(len(labels), bool), strength=None)
    if len(present) < 2 or not (table.features != table.features[0]).any():
        return nobody
    folds = make_group_folds(labels, groups, config.folds, config.seed)
    rows = folds != ALWAYS
    if not rows.any():
        return nobody
    head = settle_scaling(HeadConfig(solver="lbfgs", folds=config.folds, seed=config.seed), cache)
    training = TrainingRows(
        features=table.features, labels=labels, n_classes=len(present), weights=np.ones(len(labels))
    )
    problem = make_problem(training, head)
    strength = choose_c(problem, head, folds, None, progress).choice["C"]
    logits = predict_held_out(problem, folds, strength)
    probabilities[np.ix_(rows, present)] = to_probabilities(logits[rows])
    return Judged(probabilities=probabilities, rows=rows, strength=strength)


def describe_images(
    table: Table,
    classes: Sequence[str],
    judged: Judged,
    ranking: LabelRanking,
    distance: NDArray[np.float64],
) -> list[AuditedImage]:
    """Every row with names in place of numbers."""
    return [
        AuditedImage(
            path=path,
            split=table.splits[i],
            label=classes[table.labels[i]],
            suggested=classes[ranking.suggested[i]] if judged.rows[i] else None,
            probability=float(judged.probabilities[i].max()) if judged.rows[i] else None,
            quality=float(ranking.quality[i]) if judged.rows[i] else None,
            is_issue=bool(ranking.issues[i]),
            distance=None if np.isnan(distance[i]) else float(distance[i]),
        )
        for i, path in enumerate(table.paths)
    ]


def describe_group(group: Group, images: Sequence[AuditedImage]) -> AuditedGroup:
    """A group with its images in place of their rows."""
    return AuditedGroup(
        kind="exact" if group.exact else "near",
        similarity=group.similarity,
        contradiction=group.contradiction,
        leak=group.leak,
        images=tuple(images[i] for i in group.rows),
    )


def describe_features(cache: FeatureCache, path: Place) -> dict[str, Any]:
    """Which features were looked at."""
    return {
        "cache": str(path),
        "content_sha256": cache.content_sha256,
        "backbone": cache.extractor["backbone"],
        "dim": cache.dim,
    }


def describe_accuracy(labels: NDArray[np.int64], ranking: LabelRanking, judged: Judged) -> dict[str, Any] | None:
    """How many of the judged labels the heads that did not see them would have given, too."""
    n = int(judged.rows.sum())
    if not n:
        return None
    correct = int((ranking.suggested == labels)[judged.rows].sum())
    low, high = wilson_interval(correct, n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "interval": [low, high], "C": judged.strength}


def describe_overlaps(
    labels: NDArray[np.int64], ranking: LabelRanking, judged: Judged, classes: Sequence[str]
) -> tuple[AuditedOverlap, ...]:
    """Pairs of classes by name."""
    pairs = find_overlaps(labels[judged.rows], ranking.suggested[judged.rows], len(classes))
    return tuple(
        AuditedOverlap(
            first=classes[pair.first],
            second=classes[pair.second],
            first_as_second=pair.first_as_second,
            second_as_first=pair.second_as_first,
        )
        for pair in pairs
    )


def list_remarks(
    table: Table, neighbours: Neighbours, near: Sequence[Group], judged: Judged, config: AuditConfig
) -> list[str]:
    """What could not be judged and why, and what to doubt."""
    remarks, n = [], len(table.labels)
    if unknown := n - int(neighbours.known.sum()):
        remarks.append(
            f"{unknown:,} of {n:,} images have features that are all 0, or the mean of all: whether they are "
            f"near-duplicates or outliers cannot be said"
        )
    share = sum(len(group.rows) for group in near) / n
    if share > MANY:
        remarks.append(
            f"{share:.0%} of the images are near-duplicates of another at a similarity of {config.threshold:g}: unless "
            f"they are frames of films, these features need a higher --threshold"
        )
    if not judged.rows.any():
        remarks.append(f"no label was judged: {say_why_not(table)}")
    elif missing := n - int(judged.rows.sum()):
        remarks.append(
            f"{missing:,} of {n:,} labels were not judged: all images of a class are one group of duplicates, "
            f"or a single one, and without it nothing knows the class"
        )
    return remarks


def say_why_not(table: Table) -> str:
    """Why heads say nothing of any label."""
    if len(np.unique(table.labels)) < 2:
        return "there is only one class"
    if not (table.features != table.features[0]).any():
        return "all images have equal features"
    return (
        "all images of each class are one group of duplicates, or a single one; give it more, or a higher --threshold"
    )


def write_audit(folder: Path, found: Audit) -> None:
    """Write everything of an audit into a folder that is being filled; its images are at `found.data["folder"]`."""
    summary = found.describe()
    page = AuditPage(
        summary=summary,
        ranking=[vars(image) for image in found.ranking],
        table=str(found.folder / TABLE),
        command=say_command(found),
        versions={**describe_environment()["versions"], "cleanlab": version("cleanlab")},
        root=reopen_root(found.data["folder"]),
    )
    (folder / TABLE).write_bytes(format_table(found.ranking).encode("utf-8", errors="surrogateescape"))
    (folder / RECORD).write_text(files.pretty_json(summary), encoding="utf-8")
    (folder / PAGE).write_text(render_audit(page), encoding="utf-8")


def say_command(found: Audit) -> str:
    """The command line that makes an audit again."""
    words = ["featcache", "audit", found.features["cache"]]
    for one in fields(AuditConfig):
        value = found.settings[one.name]
        if value != one.default:
            words += [name_option(one.name), str(value)]
    if found.folder != Path(RUNS_DIR) / "audit":
        words += ["-o", str(found.folder)]
    return shlex.join(words)


def format_table(ranking: Sequence[AuditedImage]) -> str:
    """labels.csv: a line an image, best to fix first."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "split", "label", "suggested", "quality", "is_issue"])
    for one in ranking:
        quality = "" if one.quality is None else f"{one.quality:.6f}"
        writer.writerow([one.path, one.split, one.label, one.suggested or "", quality, str(one.is_issue).lower()])
    return text.getvalue()
