"""Predictions -> what is drawn of them: confusions, scores of classes, reliability, the images that tell arms apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from featcache.metrics import confusion_matrix, wilson_interval
from featcache.pages.values import ArmView
from featcache.runs import Predictions

N_BINS = 15  # as in `featcache.metrics.calibration_error`, whose number this picture explains
CONFUSED = 15  # pairs of classes in a table
SHOWN_CLASSES = 30  # rows of the table of classes before it is cut
SHOWN_IMAGES = 24
FIRST_ARMS = 3  # every ordered pair of which is shown


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of C classes, NaN where there is nothing to divide by.

    Attributes
    ----------
    precision, recall, f1
        (C,).
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of about the same confidence.

    Attributes
    ----------
    low, high
        The confidences that belong here.
    n
        Predictions.
    confidence, right
        Their mean confidence, and the share that is right.
    interval
        Of that share, Wilson's at 95 %.
    """

    low: float
    high: float
    n: int
    confidence: float
    right: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images that say something about two arms.

    Attributes
    ----------
    right, wrong
        Indices of arms.
    rows
        Of the reported images, the most confident first; at most 24.
    n
        How many there are in all.
    """

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    rows: list[int]
    n: int


def count_confusions(arm: ArmView, n_classes: int) -> NDArray[np.int64]:
    """Counts (C, C), true class by row."""
    return confusion_matrix(arm.predictions.labels, arm.predictions.predicted, n_classes)


def rank_confusions(matrices: Sequence[NDArray[np.int64]], limit: int = CONFUSED) -> list[tuple[int, int, list[int]]]:
    """The (true, predicted) classes that all arms together confuse most, with each arm's count.

    >>> rank_confusions([np.array([[5, 2], [1, 4]])])
    [(0, 1, [2]), (1, 0, [1])]
    """
    total = np.sum(matrices, axis=0)
    np.fill_diagonal(total, 0)
    order = np.argsort(-total, axis=None, kind="stable")[:limit]
    cells = [divmod(int(cell), len(total)) for cell in order if total.flat[cell]]
    return [(true, guess, [int(one[true, guess]) for one in matrices]) for true, guess in cells]


def score_classes(confusions: NDArray[np.int64]) -> Scores:
    """Precision, recall and F1 of each class.

    Source: C. J. van Rijsbergen, Information retrieval, 1979, for F1 as their harmonic mean.
    """
    hits = np.diag(confusions).astype(np.float64)
    guessed, true = confusions.sum(axis=0), confusions.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return Scores(precision=hits / guessed, recall=hits / true, f1=2 * hits / (guessed + true))


def choose_classes(scores: Sequence[Scores], limit: int = SHOWN_CLASSES) -> list[int]:
    """The classes whose F1 differs most between arms, or of one arm those with the lowest; the largest first."""
    f1 = np.array([np.nan_to_num(one.f1) for one in scores])
    interest = f1.max(axis=0) - f1.min(axis=0) if len(scores) > 1 else 1 - f1[0]
    return [int(label) for label in np.argsort(-interest, kind="stable")[:limit]]


def bin_confidences(predictions: Predictions, n_bins: int = N_BINS) -> list[Bin]:
    """Predictions by confidence in bins of equal width, those that hold any.

    Source: M. H. DeGroot and S. E. Fienberg, The comparison and evaluation of forecasters, The Statistician 32 (1983).
    """
    confidence = predictions.probabilities.max(axis=1)
    right = predictions.labels == predictions.predicted
    bins = np.clip((confidence * n_bins).astype(int), 0, n_bins - 1)
    found = []
    for k in np.unique(bins).tolist():
        own = bins == k
        n, hits = int(own.sum()), int(right[own].sum())
        found.append(
            Bin(
                low=k / n_bins,
                high=(k + 1) / n_bins,
                n=n,
                confidence=float(confidence[own].mean()),
                right=hits / n,
                interval=wilson_interval(hits, n),
            )
        )
    return found


def choose_images(arms: Sequence[ArmView]) -> list[Gallery]:
    """For each ordered pair of the first arms the images that only one gets right, then those that all arms miss."""
    right = [arm.predictions.labels == arm.predictions.predicted for arm in arms]
    sure = [arm.predictions.probabilities.max(axis=1) for arm in arms]
    galleries = []
    for first, second in permutations(range(min(len(arms), FIRST_ARMS)), 2):
        rows = np.flatnonzero(right[first] & ~right[second])
        galleries.append(_make_gallery((first,), (second,), rows, sure[first]))
    missed = np.flatnonzero(~np.any(right, axis=0))
    galleries.append(_make_gallery((), tuple(range(len(arms))), missed, np.mean(sure, axis=0)))
    return [gallery for gallery in galleries if gallery.n]


def _make_gallery(
    right: tuple[int, ...], wrong: tuple[int, ...], rows: NDArray[np.int64], sure: NDArray[np.float64]
) -> Gallery:
    order = rows[np.argsort(-sure[rows], kind="stable")]
    return Gallery(right=right, wrong=wrong, rows=order[:SHOWN_IMAGES].tolist(), n=len(rows))
