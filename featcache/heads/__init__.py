"""Linear heads on features: standardise, choose C on the training rows alone, fit, fold into one linear layer.

One module per solver (`sklearn`, `torch`), all minimising scikit-learn's objective on standardised features x:

    C * sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / 2

with a single weight vector and the logistic loss where there are two classes. Knows arrays, no files and no images.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featcache.config import HeadConfig
from featcache.errors import DatasetError
from featcache.metrics import to_probabilities
from featcache.progress import SILENT, Progress

Features = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A linear layer on raw (not standardised) features: weight (C, D) float32, bias (C,) float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features (N, D) -> logits (N, C)."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found on standardised features.

    Attributes
    ----------
    coefficients
        (C, D) float64; (1, D) where there are two classes, for the second one.
    intercept
        (C,) or (1,) float64.
    iterations
        Of the solver.
    converged
        Whether it reached its tolerance.
    """

    coefficients: NDArray[np.float64]
    intercept: NDArray[np.float64]
    iterations: int
    converged: bool


class Solver(Protocol):
    """What a solver module's `solve` must look like."""

    def __call__(
        self,
        features: NDArray[np.float64],
        labels: NDArray[np.int64],
        *,
        C: float,  # noqa: N803 - the name that everybody knows it by
        tolerance: float,
    ) -> Solution:
        """Minimise the objective on standardised features (N, D); labels 0..C-1 are all present.

        `tolerance` is the largest gradient entry of the objective divided by C N at which to stop.
        """


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One value of C in the cross-validation: mean log loss and accuracy over the held-out rows."""

    C: float
    log_loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A head and how it came about.

    Attributes
    ----------
    head
        On raw features.
    C
        That it was fitted with.
    candidates
        The cross-validation that chose it; empty where C was given or could not be chosen.
    selection
        How C was chosen, in words.
    converged, iterations
        Of the final fit.
    selection_seconds, fit_seconds
        Wall time.
    """

    head: LinearHead
    C: float
    candidates: tuple[Candidate, ...]
    selection: str
    converged: bool
    iterations: int
    selection_seconds: float
    fit_seconds: float


FINAL_TOLERANCE = 1e-8  # scikit-learn's default, 1e-4, leaves coefficients off by per cents
SELECTION_TOLERANCE = 1e-4  # enough to tell values of C apart, and five times faster
FALLBACK_C = 0.01  # where nothing can be held out to choose it: strong, as few rows want it


def fit_head(
    features: Features,
    labels: NDArray[np.int64],
    n_classes: int,
    config: HeadConfig,
    progress: Progress = SILENT,
) -> FittedHead:
    """Fit a linear head.

    Parameters
    ----------
    features
        (N, D) float32, of the training rows alone.
    labels
        (N,) int64 in 0..n_classes-1, each present.
    n_classes
        C, at least 2.
    config
        Solver, C or how to choose it.
    progress
        Told of the cross-validation.

    Returns
    -------
    FittedHead

    Raises
    ------
    DatasetError
        If there is only one class.
    """
    if n_classes < 2:
        raise DatasetError("a classifier needs at least 2 classes; the training split has 1")
    started = time.perf_counter()
    chosen, candidates, selection = (
        (config.C, (), "given") if config.C is not None else choose_c(features, labels, config, progress)
    )
    selected = time.perf_counter()
    head, solution = fit_standardised(features, labels, load_solver(config.solver), chosen)
    return FittedHead(
        head=head,
        C=chosen,
        candidates=candidates,
        selection=selection,
        converged=solution.converged,
        iterations=solution.iterations,
        selection_seconds=selected - started,
        fit_seconds=time.perf_counter() - selected,
    )


def choose_c(
    features: Features, labels: NDArray[np.int64], config: HeadConfig, progress: Progress = SILENT
) -> tuple[float, tuple[Candidate, ...], str]:
    """Choose C by stratified cross-validation on these rows: the least held-out log loss.

    The log loss, not the accuracy: on a few hundred images many values of C tie in accuracy, and luck would break the
    tie. Standardisation is fitted anew in each fold.

    Returns
    -------
    C
        The chosen value.
    candidates
        Every value with its scores.
    selection
        The procedure in words.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    smallest = int(np.bincount(labels).min())
    n_folds = min(config.folds, smallest)
    if n_folds < 2:
        return (
            FALLBACK_C,
            (),
            f"C = {FALLBACK_C} unchosen: a class has one training image, none can be held out",
        )
    folds = list(StratifiedKFold(n_folds, shuffle=True, random_state=config.seed).split(features, labels))
    solve = load_solver(config.solver)
    n_classes = int(labels.max()) + 1
    candidates = []
    for value in progress.track(config.grid, total=len(config.grid), what="choosing C", unit="C"):
        probabilities = np.empty((len(labels), n_classes))
        for fit_rows, held_rows in folds:
            head, _ = fit_standardised(features[fit_rows], labels[fit_rows], solve, value, SELECTION_TOLERANCE)
            probabilities[held_rows] = to_probabilities(head.logits(np.asarray(features[held_rows], np.float32)))
        candidates.append(
            Candidate(
                C=value,
                log_loss=float(log_loss(labels, probabilities, labels=np.arange(n_classes))),
                accuracy=float((probabilities.argmax(axis=1) == labels).mean()),
            )
        )
    best = min(candidates, key=lambda candidate: (candidate.log_loss, candidate.C))
    return best.C, tuple(candidates), f"{n_folds}-fold cross-validation on the training split, least log loss"


def fit_standardised(
    features: Features, labels: NDArray[np.int64], solve: Solver, c: float, tolerance: float = FINAL_TOLERANCE
) -> tuple[LinearHead, Solution]:
    """Standardise, solve, and fold the standardisation back into the layer, so that it takes raw features.

    A feature that never varies keeps the scale 1.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardised = scaler.fit_transform(features.astype(np.float64))
    solution = solve(standardised, labels, C=c, tolerance=tolerance)
    weight = solution.coefficients / scaler.scale_
    bias = solution.intercept - weight @ scaler.mean_
    if len(weight) == 1:  # two classes, one vector: the softmax of (-f/2, f/2) is the logistic function of f
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    head = LinearHead(weight=np.ascontiguousarray(weight, np.float32), bias=np.ascontiguousarray(bias, np.float32))
    return head, solution


def load_solver(name: str) -> Solver:
    """The solver of this name; its library is imported only now."""
    return cast(Solver, importlib.import_module(f"featcache.heads.{name}").solve)
