"""Choosing C: the whole path of values in every fold of a cross-validation, on the training rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from featcache.config import HeadConfig
from featcache.metrics import to_probabilities
from featcache.progress import SILENT, Progress

FALLBACK_C = 0.01  # where nothing can be held out to choose it: strong, as few rows want it
RELATIVE_DECREASE = 1e-6  # of the objective in one step, at which a fit ends: enough to tell values of C apart


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One value of C: log loss (nats) and accuracy over all rows, each predicted by the fold that did not see it."""

    C: float
    log_loss: float
    accuracy: float


def choose_c(
    coordinates: NDArray[np.float64],
    labels: NDArray[np.int64],
    n_classes: int,
    config: HeadConfig,
    progress: Progress = SILENT,
) -> tuple[float, tuple[Candidate, ...], str]:
    """Choose C by stratified cross-validation: the least held-out log loss.

    The log loss, not the accuracy: on a few hundred images many values of C tie in accuracy, and luck would break the
    tie. The choice does not depend on the solver of the final fit, as all have the same optimum.

    Parameters
    ----------
    coordinates
        (N, R), see `featcache.heads.coordinates`.
    labels
        (N,) in 0..n_classes-1, each present.
    n_classes
        2 or more.
    config
        The values of C, the folds, the seed that shuffles them.
    progress
        Told of the folds.

    Returns
    -------
    C
        The chosen value.
    candidates
        Every value with its scores.
    selection
        The procedure in words.
    """
    n_folds = min(config.folds, int(np.bincount(labels).min()))
    if n_folds < 2:
        return FALLBACK_C, (), "not chosen, as a class has a single training image and none can be held out"
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=config.seed).split(coordinates, labels)
    grid = sorted(config.grid)
    probabilities = np.empty((len(grid), len(labels), n_classes))
    for fit_rows, held_rows in progress.track(folds, total=n_folds, what="choosing C", unit="fold"):
        path = fit_path(coordinates[fit_rows], labels[fit_rows], n_classes, grid)
        for i, (weight, bias) in enumerate(path):
            probabilities[i, held_rows] = to_probabilities(coordinates[held_rows] @ weight.T + bias)
    candidates = tuple(
        Candidate(
            C=value,
            log_loss=float(log_loss(labels, one, labels=np.arange(n_classes))),
            accuracy=float((one.argmax(axis=1) == labels).mean()),
        )
        for value, one in zip(grid, probabilities, strict=True)
    )
    best = min(candidates, key=lambda candidate: (candidate.log_loss, candidate.C))
    return best.C, candidates, f"{n_folds}-fold cross-validation on the training split, least log loss"


def fit_path(
    coordinates: NDArray[np.float64], labels: NDArray[np.int64], n_classes: int, grid: Sequence[float]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Minimise the objective for each C in turn, each fit starting at the one before.

    L-BFGS on weights scaled by the curvature that the objective has along each coordinate, so that it takes some ten
    steps whatever C is; in single precision, as these fits only rank values of C. It ends on the relative decrease of
    the objective: the gradient in scaled coordinates would call strongly penalised problems finished far too early.

    Source: D. Boehning, Multinomial logistic regression algorithm, Annals of the Institute of Statistical Mathematics
    44 (1992), for the bound (1 - 1/K) / K on the curvature.

    Yields
    ------
    weight
        (n_classes, R).
    bias
        (n_classes,).
    """
    coordinates = coordinates.astype(np.float32)
    n, width = coordinates.shape
    n_outputs = 1 if n_classes == 2 else n_classes
    curvature = (1 - 1 / n_classes) / n_classes
    variance = np.square(coordinates).mean(axis=0, dtype=np.float64)
    targets = np.eye(n_classes, dtype=np.float32)[labels] if n_outputs > 1 else labels[:, None].astype(np.float32)
    parameters = np.zeros((n_outputs, width + 1))  # weights, and the bias last
    for value in grid:
        penalty = 1 / (value * n)
        scale = np.append(1 / np.sqrt(curvature * variance + penalty), 1 / np.sqrt(curvature))

        def objective(scaled: NDArray[np.float64], scale=scale, penalty=penalty):  # type: ignore[no-untyped-def]
            current = scaled.reshape(n_outputs, width + 1) * scale
            weight, bias = current[:, :width], current[:, width]
            logits = coordinates @ weight.T.astype(np.float32) + bias.astype(np.float32)
            loss, residual = _cross_entropy(logits, targets)
            gradient = np.column_stack(
                [residual.T @ coordinates / np.float32(n) + penalty * weight, residual.mean(axis=0)]
            )
            return loss + penalty * np.square(weight).sum() / 2, (gradient * scale).ravel()

        found = minimize(
            objective,
            (parameters / scale).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": RELATIVE_DECREASE, "gtol": 0.0, "maxiter": 1000, "maxcor": 20},
        )
        parameters = found.x.reshape(n_outputs, width + 1) * scale
        both = np.vstack([-parameters, parameters]) / 2 if n_outputs == 1 else parameters
        yield both[:, :width], both[:, width]


def _cross_entropy(logits: NDArray[np.float32], targets: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
    """Mean loss, summed in double precision, and probabilities minus targets, (N, K)."""
    n = len(logits)
    if logits.shape[1] == 1:
        loss = np.logaddexp(np.float32(0), logits) - targets * logits
        return float(loss.sum(dtype=np.float64)) / n, expit(logits) - targets
    log_probabilities = log_softmax(logits, axis=1)
    loss = -(targets * log_probabilities)
    return float(loss.sum(dtype=np.float64)) / n, np.exp(log_probabilities) - targets
