"""The reference solver: scikit-learn's LogisticRegression (lbfgs)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads.fitted import FittedHead
from featcache.heads.logistic import Solution, fit_logistic, make_losses
from featcache.heads.rows import TrainingRows
from featcache.heads.selection import HeldOut
from featcache.progress import Progress

TOLERANCE = 1e-8  # as of `featcache.heads.lbfgs`; its own 1e-4 is off by per cents
MAX_ITERATIONS = 10_000


def fit(rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress) -> FittedHead:
    """Fit a head; see `featcache.heads.logistic`."""
    return fit_logistic(rows, config, solve, validation, progress)


def solve(
    features: Tensor,
    labels: NDArray[np.int64],
    *,
    C: float,  # noqa: N803
    weights: NDArray[np.float64] | None = None,
) -> Solution:
    """Minimise the objective; see `featcache.heads.logistic.Solve`."""
    model = LogisticRegression(C=C, solver="lbfgs", tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features.double().numpy(), labels, sample_weight=weights)
    counts = (np.ones(len(labels)) if weights is None else weights)[None]
    losses = make_losses(features.double(), labels, int(labels.max()) + 1, counts, [C])
    found = np.column_stack([model.coef_, model.intercept_])
    gradient = float(losses.evaluate(losses.locate(torch.from_numpy(found)[None]))[1].abs().max())
    return Solution(
        coefficients=model.coef_.astype(np.float64),
        intercept=model.intercept_.astype(np.float64),
        evaluations=int(model.n_iter_.max()),
        gradient=gradient,
        converged=not any(issubclass(w.category, ConvergenceWarning) for w in caught),
    )
