"""Linear heads on features: choose C on the training rows alone, fit, fold into one linear layer.

One module per solver (`sklearn`, `torch`), all minimising scikit-learn's objective on standardised features x:

    C * sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / 2

with a single weight vector and the logistic loss where there are two classes. Knows arrays, no files and no images.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featcache.config import HeadConfig
from featcache.errors import DatasetError
from featcache.progress import SILENT, Progress

if TYPE_CHECKING:
    from featcache.heads.coordinates import Coordinates, Features
    from featcache.heads.selection import Candidate

SMALL = 4_000_000  # numbers in all, below which threads cost more than they bring; on a busy machine ten times more
FINAL_TOLERANCE = 1e-8  # largest gradient entry of objective / (C N); scikit-learn's 1e-4 is off by per cents


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
    """What a solver found.

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

    def __call__(self, features: NDArray[np.float64], labels: NDArray[np.int64], *, C: float) -> Solution:  # noqa: N803
        """Minimise the objective on features (N, D) as they are; labels 0..n_classes-1 are all present."""


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


def fit_head(
    features: Features, labels: NDArray[np.int64], n_classes: int, config: HeadConfig, progress: Progress = SILENT
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
        If there is only one class, or no feature varies.
    """
    from threadpoolctl import threadpool_limits

    from featcache.heads.coordinates import fit_coordinates
    from featcache.heads.selection import choose_c

    if n_classes < 2:
        raise DatasetError("a classifier needs at least 2 classes; the training split has 1")
    solve = load_solver(config.solver)
    started = time.perf_counter()
    with threadpool_limits(1 if features.size < SMALL else None):
        coordinates = fit_coordinates(features)
        rotated = coordinates.transform(features)
        ready = time.perf_counter()
        chosen, candidates, selection = (
            (config.C, (), "given") if config.C is not None else choose_c(rotated, labels, n_classes, config, progress)
        )
        selected = time.perf_counter()
        solution = solve(rotated, labels, C=chosen)
    head = make_head(solution, coordinates)
    return FittedHead(
        head=head,
        C=chosen,
        candidates=candidates,
        selection=selection,
        converged=solution.converged,
        iterations=solution.iterations,
        selection_seconds=selected - ready,
        fit_seconds=time.perf_counter() - selected + ready - started,
    )


def make_head(solution: Solution, coordinates: Coordinates) -> LinearHead:
    """The linear layer on raw features that a solution on coordinates stands for, one output a class."""
    weight, bias = coordinates.to_raw(solution.coefficients, solution.intercept)
    if len(weight) == 1:  # two classes, one vector: the softmax of (-f/2, f/2) is the logistic function of f
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearHead(weight=np.ascontiguousarray(weight, np.float32), bias=np.ascontiguousarray(bias, np.float32))


def load_solver(name: str) -> Solver:
    """The solver of this name; its library is imported only now."""
    return cast(Solver, importlib.import_module(f"featcache.heads.{name}").solve)
