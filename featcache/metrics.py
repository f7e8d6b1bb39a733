"""Arrays -> numbers: accuracy, confusion, intervals, the paired test. numpy and scipy only, no files and no figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import binomtest

Labels = NDArray[np.int64]


def to_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Softmax of logits (N, C) along the classes, in double precision."""
    probabilities: NDArray[np.float64] = softmax(logits.astype(np.float64), axis=1)
    return probabilities


def count_correct(labels: Labels, predictions: Labels) -> int:
    """How many of (N,) predictions are right."""
    return int((labels == predictions).sum())


def confusion_matrix(labels: Labels, predictions: Labels, n_classes: int) -> NDArray[np.int64]:
    """Counts (C, C): true class by row, predicted class by column.

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counts = np.bincount(labels * n_classes + predictions, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `correct` in `n`.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    >>> [round(bound, 3) for bound in wilson_interval(145, 153)]
    [0.9, 0.973]
    """
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, each adjusted so that all claims below a level hold together at that level.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).

    >>> adjust_holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mcnemar_test(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Exact McNemar test of two classifiers on the same N images.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12
    (1947); the exact form is a binomial test on the images that only one of the two gets right.

    Returns
    -------
    only_first, only_second
        Images that only the first, or only the second, gets right.
    p_value
        Two-sided.

    Examples
    --------
    >>> right = np.array([True] * 4 + [False] * 6)
    >>> mcnemar_test(right, ~right)
    (4, 6, 0.75390625)
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return only_first, only_second, p_value
