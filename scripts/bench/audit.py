"""What `featcache audit` finds of errors that were planted in a data set, and at what price.

    python scripts/bench/audit.py DATA --backbone efficientnet_lite0 --seeds 5

labels      5 % of all labels flipped in memory, to any other class or to the one that a head takes the image for most:
            how many are among the first 5 and 10 % of the ranking, average precision, how many are called wrong and how
            many of those are; by each of cleanlab's scores, with C chosen as usual and with the logits calibrated
copies      every flipped image is there twice, with the same wrong label: folds by group as usual, and by image
duplicates  150 images saved again in six ways: how many are found, at several thresholds, and how many groups more
            there are than without them (none of a data set without twins of its own)
outliers    all but ten images of a class removed, for every class: how far up the ranking those ten are, by the
            number of neighbours
seconds     10,000 random images of as many features, all of it

Deterministic but for the times. Some minutes on two cores for 2,500 images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.metrics import average_precision_score

import featcache
from featcache import findings
from featcache.config import AuditConfig, ExtractConfig
from featcache.findings import LabelRanking, find_neighbours, join_contents, rank_labels, rank_outliers
from featcache.heads.calibration import fit_temperature
from featcache.metrics import to_probabilities
from featcache.progress import SILENT
from featcache.stages.audit import Judged, Table, join_splits, judge_labels

SHARE = 0.05
COPIED = 150
THRESHOLDS = (0.8, 0.85, 0.9, 0.95)
KEPT = 10
NEIGHBOURS = (5, 10, 20, 50)
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def flip(labels: NDArray[np.int64], second: NDArray[np.int64] | None, n_classes: int, seed: int) -> NDArray[np.int64]:
    """Labels of which a share is another class: any, or the `second` most probable one."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), round(SHARE * len(labels)), replace=False)
    flipped = labels.copy()
    flipped[rows] = (
        (labels[rows] + rng.integers(1, n_classes, len(rows))) % n_classes if second is None else second[rows]
    )
    return flipped


def measure(ranking: LabelRanking, wrong: NDArray[np.bool_]) -> tuple[float, ...]:
    """Recall in the first 5 % and 10 %, average precision, and precision and recall of those called wrong."""
    n, called = len(wrong), ranking.issues
    first = [wrong[ranking.order[: round(share * n)]].sum() / wrong.sum() for share in (0.05, 0.1)]
    average = average_precision_score(wrong, -ranking.quality)
    return (*first, average, wrong[called].mean(), wrong[called].mean() * called.sum() / wrong.sum())


def say(name: str, found: list[tuple[float, ...]]) -> None:
    """A row: means over the seeds, and the least recall in the first 10 %."""
    recall5, recall10, average, precision, recall = np.mean(found, axis=0)
    least = min(one[1] for one in found)
    print(f"{name:44s}{recall5:7.1%}{recall10:8.1%}{least:8.1%}{average:8.3f}{precision:9.1%}{recall:9.1%}", flush=True)


def rank_by(score: str, labels: NDArray[np.int64], judged: Judged) -> LabelRanking:
    """The ranking by another score than the usual one."""
    usual, findings.SCORE = findings.SCORE, score
    try:
        return rank_labels(labels, judged.probabilities, judged.rows)
    finally:
        findings.SCORE = usual


def calibrate(judged: Judged, labels: NDArray[np.int64]) -> Judged:
    """The probabilities at the temperature that suits the labels."""
    logits = np.log(np.maximum(judged.probabilities, 1e-300))
    return replace(judged, probabilities=to_probabilities(logits / fit_temperature(logits, labels)))


def bench_labels(cache: featcache.FeatureCache, table: Table, groups: NDArray[np.int64], seeds: int) -> None:
    n_classes, config = len(cache.classes), AuditConfig()
    clean = judge_labels(table, groups, cache, config, SILENT)
    others = clean.probabilities.copy()
    others[np.arange(len(others)), table.labels] = -1
    print(f"{'':44s} top 5%  top 10%   least   av.pr.   of called wrong: precision, recall")
    for kind, second in (("any class", None), ("the most confusable", others.argmax(axis=1))):
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(seeds):
            flipped = flip(table.labels, second, n_classes, seed)
            wrong = flipped != table.labels
            judged = judge_labels(replace(table, labels=flipped), groups, cache, AuditConfig(seed=seed), SILENT)
            for score in SCORES:
                found.setdefault(score, []).append(measure(rank_by(score, flipped, judged), wrong))
            calibrated = rank_by(findings.SCORE, flipped, calibrate(judged, flipped))
            found.setdefault(f"{findings.SCORE}, calibrated", []).append(measure(calibrated, wrong))
        for name, rows in found.items():
            say(f"{kind}, {name}", rows)


def bench_copies(cache: featcache.FeatureCache, table: Table, seeds: int) -> None:
    found: dict[str, list[tuple[float, ...]]] = {"folds by group": [], "folds by image": []}
    for seed in range(seeds):
        flipped = flip(table.labels, None, len(cache.classes), seed)
        rows = np.flatnonzero(flipped != table.labels)
        every = np.concatenate([np.arange(len(flipped)), rows])
        wrong = (flipped != table.labels)[every]
        doubled = replace(table, labels=flipped[every], features=table.features[every])
        for name, groups in (("folds by group", every), ("folds by image", np.arange(len(every)))):
            judged = judge_labels(doubled, groups, cache, AuditConfig(seed=seed), SILENT)
            found[name].append(measure(rank_by(findings.SCORE, doubled.labels, judged), wrong))
    for name, measured in found.items():
        say(f"any class, copied with the label, {name}", measured)


def alter(image: Image.Image) -> Iterator[tuple[str, Image.Image, int]]:
    """An image in six ways, each with the quality of its JPEG."""
    width, height = image.size

    def crop(share: float) -> Image.Image:
        x, y = round(width * share), round(height * share)
        return image.crop((x, y, width - x, height - y))

    yield "JPEG quality 40", image, 40
    yield "resized to 80 %", image.resize((round(width * 0.8), round(height * 0.8)), Image.Resampling.BICUBIC), 90
    yield "mirrored", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 90
    yield "20 % brighter", ImageEnhance.Brightness(image).enhance(1.2), 90
    yield "3 % cut off each side", crop(0.03), 90
    yield "8 % cut off each side", crop(0.08), 90


def extract_copies(table: Table, data: Path, network: dict[str, str]) -> tuple[Table, list[str], NDArray[np.int64]]:
    """Altered copies of some images: their rows, in which way each was altered, and of which row it is a copy."""
    rows = np.random.default_rng(0).choice(len(table.paths), COPIED, replace=False)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows.tolist():
            for kind, picture, quality in alter(Image.open(data / table.paths[row]).convert("RGB")):
                path = Path(folder) / "copies" / kind / f"{row}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=quality)
        extraction = featcache.extract_features(Path(folder) / "copies", Path(folder) / "copies.h5", **network)
        copies = join_splits(featcache.read_cache(extraction.path))
    paths = [Path(path) for path in copies.paths]
    return copies, [path.parent.name for path in paths], np.array([int(path.stem) for path in paths])


def bench_duplicates(table: Table, data: Path, network: dict[str, str]) -> None:
    copies, kinds, originals = extract_copies(table, data, network)
    n, k = len(table.paths), AuditConfig.neighbours
    print(f"\n{'found of copies, threshold':44s}" + "".join(f"{threshold:8.2f}" for threshold in THRESHOLDS))
    holding: dict[float, list[bool]] = {threshold: [] for threshold in THRESHOLDS}
    for kind in dict.fromkeys(kinds):
        mine = np.array([one == kind for one in kinds])
        features = np.concatenate([table.features, copies.features[mine]])
        recalls = []
        for threshold in THRESHOLDS:
            groups = find_neighbours(features, k, threshold).groups
            recalls.append(float((groups[n:] == groups[originals[mine]]).mean()))
            members = findings.list_members(groups)
            holding[threshold] += [bool((rows >= n).any()) for rows in members]
        print(f"{kind:44s}" + "".join(f"{recall:8.1%}" for recall in recalls), flush=True)
    shares = "".join(f"{np.mean(holding[one]):8.1%}" if holding[one] else f"{'-':>8s}" for one in THRESHOLDS)
    print(f"{'groups that hold a copy':44s}{shares}")
    own = [len(findings.list_members(find_neighbours(table.features, k, one).groups)) for one in THRESHOLDS]
    print(f"{'groups without any copy planted':44s}" + "".join(f"{one:8d}" for one in own), flush=True)


def bench_outliers(table: Table, n_classes: int) -> None:
    found: dict[int, list[tuple[float, float]]] = {k: [] for k in NEIGHBOURS}
    for label in range(n_classes):
        own = np.flatnonzero(table.labels == label)
        odd = np.random.default_rng(label).choice(own, min(KEPT, len(own)), replace=False)
        rows = np.sort(np.concatenate([np.flatnonzero(table.labels != label), odd]))
        neighbours = find_neighbours(table.features[rows], max(NEIGHBOURS), AuditConfig.threshold)
        strange = np.isin(rows, odd)
        for k in NEIGHBOURS:
            order, distance = rank_outliers(replace(neighbours, similarity=neighbours.similarity[:, :k]))
            first = strange[order[: round(0.05 * len(rows))]].sum() / strange.sum()
            found[k].append((float(first), float(average_precision_score(strange, distance))))
    print(f"\n{'ten images of a class not there otherwise':44s} top 5%  av.pr.   mean of {n_classes}")
    for k, measured in found.items():
        recall, average = np.mean(measured, axis=0)
        print(f"{f'{k} neighbours':44s}{recall:7.1%}{average:8.3f}", flush=True)


def bench_seconds(cache: featcache.FeatureCache, n: int = 10_000) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(cache.classes), n)
    features = rng.standard_normal((n, cache.dim), np.float32) + rng.standard_normal(
        (len(cache.classes), cache.dim), np.float32
    )[labels] * np.float32(0.2)
    table = Table(
        paths=[], splits=[], where=np.zeros(n, np.int64), labels=labels, contents=np.arange(n), features=features
    )
    started = time.perf_counter()
    neighbours = find_neighbours(features, AuditConfig.neighbours, AuditConfig.threshold)
    compared = time.perf_counter()
    judge_labels(table, join_contents(neighbours.groups, table.contents), cache, AuditConfig(), SILENT)
    print(
        f"\n{n:,} images of {cache.dim:,} features: {compared - started:.1f} s to compare all, "
        f"{time.perf_counter() - compared:.1f} s to judge the labels"
    )


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--backbone", default=ExtractConfig.backbone, show_default=True)
@click.option("--weights", default=ExtractConfig.weights, show_default=True)
@click.option("--seeds", default=5, show_default=True)
def main(data: Path, backbone: str, weights: str, seeds: int) -> None:
    network = {"backbone": backbone, "weights": weights}
    with tempfile.TemporaryDirectory() as folder:
        cache = featcache.read_cache(featcache.extract_features(data, Path(folder) / "features.h5", **network).path)
    table = join_splits(cache)
    neighbours = find_neighbours(table.features, AuditConfig.neighbours, AuditConfig.threshold)
    groups = join_contents(neighbours.groups, table.contents)
    print(f"{data.name}, {backbone}: {len(table.paths):,} images, {len(cache.classes)} classes, {seeds} seeds\n")
    bench_labels(cache, table, groups, seeds)
    bench_copies(cache, table, seeds)
    bench_duplicates(table, data, network)
    bench_outliers(table, len(cache.classes))
    bench_seconds(cache)


if __name__ == "__main__":
    main()
