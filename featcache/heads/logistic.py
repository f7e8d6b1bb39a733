"""Multinomial logistic regression on training rows: the path of C in every fold, the choice, the fit, the way back.

All solvers minimise scikit-learn's objective on standardised features x, each image counting s_i:

    C * sum_i s_i cross_entropy(W x_i + b, y_i) + |W|^2 / 2

with a single weight vector and the logistic loss where there are two classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads.coordinates import Coordinates, find_axes
from featcache.heads.descent import REMEMBERED, Losses, minimise, scale_by_curvature, start_at_priors
from featcache.heads.fitted import FittedHead, LinearHead
from featcache.heads.rows import TrainingRows
from featcache.heads.selection import (
    FALLBACK_C,
    HeldOut,
    Scores,
    Selection,
    make_folds,
    pick_best,
    say_not_chosen,
    say_procedure,
)
from featcache.metering import Meter
from featcache.progress import Progress

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
SMALL = 4_000_000  # numbers in all, up to which all folds are solved together
FEW_NUMBERS = 500_000  # in all, up to which rows are kept in double precision
DECREASE = 2e-5  # of the objective in a step, twice in succession, at which a path ends: within 1e-4 of the optimum
FOLD_DECREASE = 5e-5  # at which it ends where it only ranks values of C, whose log losses differ by far more
VARIANCE_ROWS = 4096  # that are enough to know variances roughly
STATE_BYTES = 512 << 20  # of the searches that go on at a time
WORTH_ROTATING = 0.2  # N K models / D^2 from which the axes cost less than the evaluations that they save


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found.

    Attributes
    ----------
    coefficients
        (C, R) float64; (1, R) where there are two classes, for the second one.
    intercept
        (C,) or (1,) float64.
    evaluations
        Of the objective, or steps of a solver that counts those.
    gradient
        The largest entry of the gradient of objective / (C sum_i s_i), in the coordinates that were solved in.
    converged
        Whether that is within the solver's tolerance.
    """

    coefficients: NDArray[np.float64]
    intercept: NDArray[np.float64]
    evaluations: int
    gradient: float
    converged: bool


class Solve(Protocol):
    """What minimises the objective for one C."""

    def __call__(
        self,
        features: Tensor,
        labels: NDArray[np.int64],
        *,
        C: float,  # noqa: N803
        weights: NDArray[np.float64] | None = None,
    ) -> Solution:
        """Minimise on features (N, R) as they are; labels 0..n_classes-1 are all present; rows count `weights`."""


def fit_logistic(
    rows: TrainingRows,
    config: HeadConfig,
    solve: Solve,
    validation: HeldOut | None,
    progress: Progress,
    device: str = "cpu",
) -> FittedHead:
    """Choose C, unless it is given, and fit with it."""
    problem = make_problem(rows, config, device)
    wanted = config.calibrate or (config.C is None and validation is None)
    folds = make_folds(rows.labels, config.folds, config.seed) if wanted else None
    meter = Meter()
    selection = choose_c(problem, config, folds, validation, progress)
    selecting = meter.read()
    strength = selection.choice["C"]
    solution = solve(problem.features, problem.labels, C=strength, weights=problem.weights)
    head = make_head(solution.coefficients, solution.intercept, problem.coordinates, unit_length=rows.unit_length)
    held_out = None
    if config.calibrate and folds is not None:
        held_out = predict_held_out(problem, folds, strength)
    return FittedHead(
        head=head,
        selection=selection,
        converged=solution.converged,
        evaluations=solution.evaluations,
        gradient=solution.gradient,
        held_out=held_out,
        selecting=selecting,
    )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Training rows in the coordinates in which they are solved.

    Attributes
    ----------
    rows
        What they were.
    coordinates
        Where they are.
    features
        (N V, R): every image's rows one after the other, the plain one first.
    labels, weights, images
        (N V,) of each row: its class, what it counts, its image.
    """

    rows: TrainingRows
    coordinates: Coordinates
    features: Tensor
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    images: NDArray[np.int64]


def make_problem(rows: TrainingRows, config: HeadConfig, device: str = "cpu") -> Problem:
    """The rows in the coordinates that suit what is to be solved: rotated, where that is less work than it saves."""
    n_models = 1 if config.C is not None else len(config.grid or GRID) * config.folds
    n = len(rows) * rows.n_views
    rotate = n * rows.n_classes * n_models > WORTH_ROTATING * min(n, rows.dim) ** 2
    dtype = torch.float64 if rows.size <= FEW_NUMBERS else torch.float32
    coordinates, features = find_axes(rows, config.scaling, rotate=rotate, dtype=dtype)
    return Problem(
        rows=rows,
        coordinates=coordinates,
        features=features.to(device),
        labels=np.repeat(rows.labels, rows.n_views),
        weights=np.repeat(rows.weights / rows.n_views, rows.n_views),
        images=np.repeat(np.arange(len(rows)), rows.n_views),
    )


def find_variance(features: Tensor) -> Tensor:
    """(R,) float64, about the mean square of each column of (n, R)."""
    some = features[:: max(1, len(features) // VARIANCE_ROWS)]
    return some.square().mean(dim=0, dtype=torch.float64)


def choose_c(
    problem: Problem,
    config: HeadConfig,
    folds: NDArray[np.int64] | None,
    validation: HeldOut | None,
    progress: Progress,
) -> Selection:
    """Choose C by the least log loss of images that the fit did not see.

    Parameters
    ----------
    problem
        The training rows.
    config
        C if it is given, else the values to try.
    folds
        (N,) of each image, or None where none can be held out.
    validation
        What chooses in place of the folds.
    progress
        Told of the folds.
    """
    if config.C is not None:
        return Selection(choice={"C": config.C}, procedure="given")
    if validation is None and folds is None:
        return Selection(choice={"C": FALLBACK_C}, procedure=say_not_chosen())
    grid = sorted(config.grid or GRID)
    scores = Scores(len(grid))
    if validation is not None:
        score_on_validation(problem, grid, validation, scores)
    elif folds is not None:
        score_in_folds(problem, grid, folds, scores, progress)
    candidates = scores.candidates([{"C": value} for value in grid])
    return Selection(
        choice=pick_best(candidates).choice,
        procedure=say_procedure(folds if validation is None else None),
        candidates=candidates,
    )


def score_in_folds(
    problem: Problem, grid: Sequence[float], folds: NDArray[np.int64], scores: Scores, progress: Progress
) -> None:
    """Score every C in every fold of a cross-validation."""
    n_folds = int(folds.max()) + 1
    everything = fit_folds(problem, folds, grid)
    for fold, path in progress.track(everything, total=n_folds, what="choosing C", unit="fold"):
        held = np.flatnonzero(folds == fold)
        features = problem.features[torch.from_numpy(held * problem.rows.n_views)]
        for i, logits in enumerate(find_logits(path, features)):
            scores.add(i, logits, problem.rows.labels[held], problem.rows.weights[held])


def score_on_validation(problem: Problem, grid: Sequence[float], validation: HeldOut, scores: Scores) -> None:
    """Score every C on the validation split, fitted on all training rows."""
    path = fit_path(problem, problem.features, problem.labels, problem.weights[None], grid)
    held = problem.rows.replace_images(validation.features, validation.labels)
    for images, block in held.iterate():
        features = problem.coordinates.transform(block[:, 0], problem.features.dtype).to(problem.features.device)
        for i, logits in enumerate(find_logits(path[0], features)):
            scores.add(i, logits, validation.labels[images], held.weights[images])


def predict_held_out(problem: Problem, folds: NDArray[np.int64], strength: float) -> NDArray[np.float64]:
    """Logits (N, C) of every training image, from the fold that did not see it."""
    logits = np.empty((len(problem.rows), problem.rows.n_classes))
    for fold, path in fit_folds(problem, folds, [strength]):
        held = np.flatnonzero(folds == fold)
        logits[held] = next(find_logits(path, problem.features[torch.from_numpy(held * problem.rows.n_views)]))
    return logits


def fit_folds(problem: Problem, folds: NDArray[np.int64], grid: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
    """The path of C fitted without each fold: its number and parameters (G, K, R + 1).

    Few rows are solved in all folds together; of many each fold gets rows of its own, and none is worked on in vain.
    """
    of_row = folds[problem.images]
    n_folds = int(folds.max()) + 1
    if problem.rows.size <= SMALL:
        counts = np.where(of_row[None] != np.arange(n_folds)[:, None], problem.weights, 0.0)
        yield from enumerate(fit_path(problem, problem.features, problem.labels, counts, grid, decrease=FOLD_DECREASE))
        return
    for fold in range(n_folds):
        chosen = np.flatnonzero(of_row != fold)
        features = problem.features[torch.from_numpy(chosen).to(problem.features.device)]
        counts = problem.weights[chosen][None]
        path = fit_path(problem, features, problem.labels[chosen], counts, grid, decrease=FOLD_DECREASE)
        yield fold, path[0]


def fit_path(
    problem: Problem,
    features: Tensor,
    labels: NDArray[np.int64],
    counts: NDArray[np.float64],
    grid: Sequence[float],
    *,
    decrease: float = DECREASE,
) -> Tensor:
    """Minimise the objective for every C and every way to count the rows, well enough to tell values of C apart.

    Parameters
    ----------
    problem
        What the rows are of.
    features, labels
        (n, R) and (n,), some or all of its rows.
    counts
        (F, n), what each row counts.
    grid
        G values of C.
    decrease
        See `minimise`.

    Returns
    -------
    (F, G, K, R + 1) float64, weights and the bias last; found in single precision.
    """
    n_models, n_outputs = len(counts) * len(grid), 1 if problem.rows.n_classes == 2 else problem.rows.n_classes
    losses = make_losses(features.float(), labels, problem.rows.n_classes, counts, grid)
    variance = find_variance(features)
    bytes_each = n_outputs * ((features.shape[1] + 1) * (2 * REMEMBERED * 4 + 10 * 8) + 4 * 4 * len(features))
    parameters = []
    for models in torch.split(torch.arange(n_models), max(1, STATE_BYTES // bytes_each)):
        some = losses.select(models.to(features.device))
        found = minimise(some, start_at_priors(some), scale_by_curvature(some, variance), decrease=decrease)
        parameters.append(found.parameters)
    return torch.cat(parameters).view(len(counts), len(grid), n_outputs, -1)


def make_losses(
    features: Tensor, labels: NDArray[np.int64], n_classes: int, counts: NDArray[np.float64], grid: Sequence[float]
) -> Losses:
    """The objective, divided by C and by what all rows count: F G losses for F ways to count and G values of C."""
    device, totals = features.device, counts.sum(axis=1)
    return Losses(
        features=features,
        labels=torch.from_numpy(labels).to(device),
        n_classes=n_classes,
        penalties=torch.from_numpy(1 / np.multiply.outer(totals, grid).ravel()).to(device),
        weights=torch.from_numpy(counts / totals[:, None]).to(device, features.dtype),
        which=torch.arange(len(counts), device=device).repeat_interleave(len(grid)),
    )


def find_logits(path: Tensor, features: Tensor) -> Iterator[NDArray[np.float64]]:
    """Logits (n, C) of features (n, R) by each of the parameters (G, K, R + 1)."""
    for parameters in path:
        low = parameters.to(features.dtype)
        logits = torch.addmm(low[:, -1], features, low[:, :-1].T).double().cpu().numpy()
        yield np.hstack([-logits, logits]) / 2 if logits.shape[1] == 1 else logits


def make_head(
    coefficients: NDArray[np.float64],
    intercept: NDArray[np.float64],
    coordinates: Coordinates,
    *,
    unit_length: bool,
) -> LinearHead:
    """The linear layer on raw features that weights (C, R), or (1, R) of two classes, on coordinates stand for."""
    weight, bias = coordinates.to_raw(coefficients, intercept)
    if len(weight) == 1:  # two classes, one vector: the softmax of (-f/2, f/2) is the logistic function of f
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearHead(
        weight=np.ascontiguousarray(weight, np.float32),
        bias=np.ascontiguousarray(bias, np.float32),
        unit_length=unit_length,
    )
