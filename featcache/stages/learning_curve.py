"""The learning curve: would more labelled images help? From the training split alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache
from featcache.config import HeadConfig
from featcache.errors import DatasetError
from featcache.heads import fit_head
from featcache.heads.rows import gather
from featcache.heads.selection import make_folds
from featcache.metrics import PowerLaw, fit_power_law, wilson_interval
from featcache.progress import Progress

N_SIZES = 8
SMALLEST = 2  # images of each class on average
MIN_SIZES = 4  # fewer say nothing about the three numbers of the law
FURTHER = (2, 4)  # times as many images as there are
RESAMPLED = 200
INTERVAL = (2.5, 97.5)  # per cent


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy against the number of training images.

    Attributes
    ----------
    sizes
        (S,) training images per fit.
    right
        (S, N) share of the fits of each size that were right about each training image, which none of them had seen.
    law
        What was fitted, None where there are too few sizes.
    further
        (number of images, accuracy, low, high) that it foretells.
    """

    sizes: NDArray[np.int64]
    right: NDArray[np.float64]
    law: PowerLaw | None
    further: list[tuple[int, float, float, float]]

    def list_rows(self) -> list[dict[str, float]]:
        """A row a size: images, mean accuracy and its 95 % interval."""
        rows = []
        for size, right in zip(self.sizes.tolist(), self.right, strict=True):
            low, high = wilson_interval(round(float(right.sum())), len(right))
            rows.append({"images": size, "accuracy": float(right.mean()), "low": low, "high": high})
        return rows

    def describe(self) -> dict[str, Any]:
        """As plain values (see docs/json.md)."""
        names = ("images", "accuracy", "low", "high")
        law = self.law and {"floor": self.law.floor, "factor": self.law.factor, "power": self.law.power}
        return {
            "points": self.list_rows(),
            "law": law,
            "forecast": [dict(zip(names, one, strict=True)) for one in self.further],
            "verdict": self.say(),
        }

    def say(self) -> str:
        """Whether more images would help, in a sentence."""
        now = float(self.right[-1].mean())
        if not self.further:
            return f"learning curve: {now:.1%} with {self.sizes[-1]} images; too few sizes to say what more would bring"
        n, accuracy, low, high = self.further[0]
        here = float(self.law.accuracy(self.right.shape[1])) if self.law else now
        judged = "would help" if low > here + 0.005 else "may help" if high > here + 0.01 else "would hardly help"
        return (
            f"learning curve: {now:.1%} with {self.sizes[-1]} training images; twice as many as there are ({n:,}) "
            f"{judged}: {accuracy:.1%} expected, 95 % interval {low:.1%} to {high:.1%}"
        )


def learn_curve(cache: FeatureCache, config: HeadConfig, progress: Progress) -> Curve:
    """Fit heads on growing parts of the training split, each judged on training images that it did not see.

    The images are cut into folds; for every fold and size, a head learns from so many of the other folds' images, and
    predicts the fold. What is chosen (C and the like) is chosen once a repeat for each size, within its first part.

    Parameters
    ----------
    cache
        The features; the other splits are not looked at.
    config
        As of the head. `repeats` times everything is done, with other folds.
    progress
        Told of the fits.

    Raises
    ------
    DatasetError
        If a class has a single training image.
    """
    train, config = cache.splits["train"], replace(config, select_on="cv", calibrate=False)
    labels, n_classes = train.listing.labels, len(cache.classes)
    views = train.views if config.views else None
    if make_folds(labels, config.folds, config.seed) is None:
        raise DatasetError("--curve holds training images out, and a class has a single one; give it more")
    sizes = list_sizes(labels, n_classes, config)
    right, settled = np.zeros((len(sizes), len(labels))), dict[tuple[int, int], HeadConfig]()
    parts = list(list_parts(labels, n_classes, sizes, config))
    for repeat, row, images, held in progress.track(parts, total=len(parts), what="learning curve", unit="fit"):
        fitted = fit_head(
            gather(train.features, images),
            labels[images],
            n_classes,
            settled.get((repeat, row), config),
            views=None if views is None else gather(views, images),
        )
        settled.setdefault((repeat, row), replace(config, **settle(fitted.selection.choice)))
        predicted = fitted.head.logits(gather(train.features, held).astype(np.float32)).argmax(axis=1)
        right[row, held] += (predicted == labels[held]) / config.repeats
    law, further = extrapolate(sizes, right, config.seed)
    return Curve(sizes=sizes, right=right, law=law, further=further)


def settle(choice: Any) -> dict[str, Any]:
    """What was chosen, as settings."""
    return {name: int(value) if name == "k" else value for name, value in choice.items()}


def list_sizes(labels: NDArray[np.int64], n_classes: int, config: HeadConfig) -> NDArray[np.int64]:
    """Numbers of training images, each larger than the one before by the same factor, up to what the folds leave."""
    n_folds = min(config.folds, int(np.bincount(labels).min()))
    largest = len(labels) - -(-len(labels) // n_folds)
    smallest = min(SMALLEST * n_classes, largest)
    return np.unique(np.geomspace(smallest, largest, N_SIZES).round().astype(np.int64))


def list_parts(
    labels: NDArray[np.int64], n_classes: int, sizes: NDArray[np.int64], config: HeadConfig
) -> Iterator[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]]:
    """For every repeat, fold and size: the repeat's and the size's numbers, images to learn from, images to predict.

    The parts of a fold contain one another: its other images in random order, one of each class at the beginning, then
    the classes in their proportions: a part that happened to hold one class six times and the other once would say
    little of seven images.
    """
    for repeat in range(config.repeats):
        rng = np.random.default_rng([config.seed, repeat])
        folds = make_folds(labels, config.folds, config.seed + repeat)
        assert folds is not None
        for fold in range(int(folds.max()) + 1):
            order = shuffle_evenly(np.flatnonzero(folds != fold), labels, rng)
            first = np.unique(labels[order], return_index=True)[1]
            order = np.concatenate([order[first], np.delete(order, first)])
            for row, size in enumerate(sizes.tolist()):
                yield repeat, row, np.sort(order[: max(size, n_classes)]), np.flatnonzero(folds == fold)


def shuffle_evenly(images: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Images in a random order in which every beginning holds the classes in about their proportions."""
    images = rng.permutation(images)
    places = np.empty(len(images))
    for own in (labels[images] == label for label in np.unique(labels[images])):
        places[own] = (np.arange(own.sum()) + rng.random()) / own.sum()
    return images[np.argsort(places, kind="stable")]


def extrapolate(
    sizes: NDArray[np.int64], right: NDArray[np.float64], seed: int
) -> tuple[PowerLaw | None, list[tuple[int, float, float, float]]]:
    """The law through the points, and what it foretells with an interval from resampled images.

    Source: B. Efron and R. J. Tibshirani, An introduction to the bootstrap, 1993, for percentile intervals.
    """
    if len(sizes) < MIN_SIZES:
        return None, []
    n = sizes.astype(np.float64)
    law = fit_power_law(n, right.mean(axis=1))
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, right.shape[1], (RESAMPLED, right.shape[1]))
    laws = [fit_power_law(n, right[:, draw].mean(axis=1)) for draw in draws]
    further = []
    for factor in FURTHER:
        size = factor * right.shape[1]
        low, high = np.percentile([float(one.accuracy(size)) for one in laws], INTERVAL)
        further.append((size, float(law.accuracy(size)), float(low), float(high)))
    return law, further
