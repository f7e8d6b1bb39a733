"""Arrays -> numbers: accuracy, calibration, confusion, intervals, the paired test, learning curves.

numpy and scipy only, no files and no figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import softmax
from scipy.stats import binomtest

Labels = NDArray[np.int64]
N_BINS = 15  # of confidence
MANY_CLASSES = 10  # above which it is of interest whether the right one is among the first five


def to_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Softmax of logits (N, C) along the classes, in double precision."""
    probabilities: NDArray[np.float64] = softmax(logits.astype(np.float64), axis=1)
    return probabilities


def count_correct(labels: Labels, predictions: Labels) -> int:
    """How many of (N,) predictions are right."""
    return int((labels == predictions).sum())


def measure_probabilities(labels: Labels, probabilities: NDArray[np.float64]) -> dict[str, float]:
    """What N predictions are worth beyond how many are right.

    Parameters
    ----------
    labels
        (N,).
    probabilities
        (N, C).

    Returns
    -------
    "balanced_accuracy" (each class counts the same), "log_loss" (nats), "brier" (squared error, summed over classes; 0
    to 2), "calibration_error" (see `calibration_error`), and of more than ten classes "top5_accuracy".
    """
    own = probabilities[np.arange(len(labels)), labels]
    right = probabilities.argmax(axis=1) == labels
    counts = np.bincount(labels)
    recalls = np.bincount(labels, weights=right)[counts > 0] / counts[counts > 0]
    measured = {
        "balanced_accuracy": float(recalls.mean()),
        "log_loss": float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()),
        "brier": float((np.square(probabilities).sum(axis=1) - 2 * own + 1).mean()),
        "calibration_error": calibration_error(right, probabilities.max(axis=1)),
    }
    if probabilities.shape[1] > MANY_CLASSES:
        above = (probabilities > own[:, None]).sum(axis=1)
        measured["top5_accuracy"] = float((above < 5).mean())
    return measured


def calibration_error(right: NDArray[np.bool_], confidence: NDArray[np.float64], n_bins: int = N_BINS) -> float:
    """Expected calibration error: how far confidence (N,) is from the share that is right, in bins of equal width.

    Source: M. P. Naeini, G. F. Cooper and M. Hauskrecht, Obtaining well calibrated probabilities using Bayesian
    binning, AAAI 2015; 15 bins as in C. Guo et al., On calibration of modern neural networks, ICML 2017.

    >>> calibration_error(np.array([True, False]), np.array([0.9, 0.9]))
    0.4
    """
    surplus = np.bincount(find_bins(confidence, n_bins), weights=confidence - right, minlength=n_bins)
    return float(np.abs(surplus).sum() / len(right))


def find_bins(confidence: NDArray[np.float64], n_bins: int) -> NDArray[np.int64]:
    """(N,): in which of the bins of equal width each confidence is."""
    return np.clip((confidence * n_bins).astype(np.int64), 0, n_bins - 1)


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


def bin_confidences(right: NDArray[np.bool_], confidence: NDArray[np.float64], n_bins: int = N_BINS) -> list[Bin]:
    """N predictions by confidence in bins of equal width, those that hold any: a reliability diagram.

    Source: M. H. DeGroot and S. E. Fienberg, The comparison and evaluation of forecasters, The Statistician 32 (1983).
    """
    bins, found = find_bins(confidence, n_bins), []
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


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """How a classifier's error falls with the number n of training images: floor + factor n^-power."""

    floor: float
    factor: float
    power: float

    def accuracy(self, n: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """At n images."""
        found: NDArray[np.float64] = 1 - self.floor - self.factor * np.asarray(n, np.float64) ** -self.power
        return found


def fit_power_law(n: NDArray[np.float64], accuracy: NDArray[np.float64]) -> PowerLaw:
    """Fit the law to accuracies (S,) at n (S,) training images, later ones counting more, by least squares.

    Source: C. Cortes et al., Learning curves: asymptotic values and rate of convergence, NIPS 1993; for how far it
    holds T. Viering and M. Loog, The shape of learning curves: a review, TPAMI 45 (2023).
    """
    errors, weights = 1 - accuracy, np.sqrt(n / n.max())
    scaled = n / n[0]

    def residuals(law: NDArray[np.float64]) -> NDArray[np.float64]:
        surplus: NDArray[np.float64] = weights * (law[0] + law[1] * scaled ** -law[2] - errors)
        return surplus

    lowest = max(float(errors.min()), 1e-6)
    start = [lowest / 2, max(float(errors[0]) - lowest / 2, 1e-6), 0.5]
    found = least_squares(residuals, start, bounds=([0, 0, 0.01], [1, 2, 3])).x
    return PowerLaw(floor=float(found[0]), factor=float(found[1] * n[0] ** found[2]), power=float(found[2]))


def confusion_matrix(labels: Labels, predictions: Labels, n_classes: int) -> NDArray[np.int64]:
    """Counts (C, C): true class by row, predicted class by column.

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counts = np.bincount(labels * n_classes + predictions, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


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


def score_classes(confusions: NDArray[np.int64]) -> Scores:
    """Precision, recall and F1 of each class.

    Source: C. J. van Rijsbergen, Information retrieval, 1979, for F1 as their harmonic mean.
    """
    hits = np.diag(confusions).astype(np.float64)
    guessed, true = confusions.sum(axis=0), confusions.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return Scores(precision=hits / guessed, recall=hits / true, f1=2 * hits / (guessed + true))


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
