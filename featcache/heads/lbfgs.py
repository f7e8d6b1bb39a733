"""The usual solver: preconditioned L-BFGS in torch, in single precision as far as that goes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads.descent import minimise, scale_by_curvature, start_at_priors
from featcache.heads.fitted import FittedHead
from featcache.heads.logistic import FEW_NUMBERS, Solution, find_variance, fit_logistic, make_losses
from featcache.heads.rows import TrainingRows
from featcache.heads.selection import HeldOut
from featcache.progress import Progress

TOLERANCE = 1e-6  # largest gradient entry of objective / (C N); scikit-learn's 1e-4 is off by per cents
SMALL_TOLERANCE = 1e-8  # of few numbers: there it costs nothing
SINGLE_TOLERANCE = 1e-6  # what single precision can reach
OF_CLASS = 1e-3  # of the smallest class's share of all that counts: its gradient is no larger than that at the start
OF_PENALTY = 1e-2  # of 1 / (C N): where nothing else holds a weight, it is off by the gradient times C N
LEAST_TOLERANCE = 1e-9  # what double precision can reach


def fit(rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress) -> FittedHead:
    """Fit a head; see `featcache.heads.logistic`."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return fit_logistic(rows, config, solve, validation, progress, device)


def solve(
    features: Tensor,
    labels: NDArray[np.int64],
    *,
    C: float,  # noqa: N803
    weights: NDArray[np.float64] | None = None,
    tolerance: float | None = None,
) -> Solution:
    """Minimise the objective; see `featcache.heads.logistic.Solve`.

    Single precision comes near, and double precision goes on from there where the tolerance asks for it, or where
    rounding ended the search too early. Few rows are solved in double precision at once.

    Parameters
    ----------
    features
        (N, R); what is uncorrelated is solved in the fewest steps.
    labels
        (N,) in 0..n_classes-1, all present.
    C
        Inverse strength of the penalty.
    weights
        (N,), what each row counts; None is 1.
    tolerance
        The largest entry of the gradient of objective / (C sum of weights); None is what `choose_tolerance` says.
    """
    counts = (np.ones(len(labels)) if weights is None else weights)[None]
    if tolerance is None:
        shares = np.bincount(labels, weights=counts[0]) / counts.sum()
        tolerance = choose_tolerance(features.numel(), shares, C * counts.sum())
    variance, evaluations = find_variance(features), 0
    start: Tensor | None = None
    few = features.numel() <= FEW_NUMBERS and tolerance < SINGLE_TOLERANCE
    for dtype in (torch.float64,) if few else (torch.float32, torch.float64):
        losses = make_losses(features.to(dtype), labels, int(labels.max()) + 1, counts, [C])
        start = start_at_priors(losses) if start is None else start
        wanted = max(tolerance, SINGLE_TOLERANCE) if dtype == torch.float32 else tolerance
        found = minimise(losses, start, scale_by_curvature(losses, variance), tolerance=wanted)
        start, gradient = found.parameters, float(found.gradients[0])
        evaluations += int(found.evaluations[0])
        if gradient <= tolerance:
            break
    parameters = found.parameters[0].cpu().numpy()
    return Solution(
        coefficients=parameters[:, :-1],
        intercept=parameters[:, -1],
        evaluations=evaluations,
        gradient=gradient,
        converged=gradient <= tolerance,
    )


def choose_tolerance(n_numbers: int, shares: NDArray[np.float64], strength: float) -> float:
    """The largest gradient entry at which predictions have settled.

    1e-6, of few numbers 1e-8; less where that would be much of all that a rare class contributes (shares (C,)), or of
    what the penalty holds weights with, 1 / strength, which is C times what all rows count.
    """
    usual = SMALL_TOLERANCE if n_numbers <= FEW_NUMBERS else TOLERANCE
    return max(min(usual, OF_CLASS * float(shares.min()), OF_PENALTY / strength), LEAST_TOLERANCE)
