"""The reference solver: scikit-learn's LogisticRegression (lbfgs)."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from featcache.heads import FINAL_TOLERANCE, Solution

MAX_ITERATIONS = 10_000


def solve(features: NDArray[np.float64], labels: NDArray[np.int64], *, C: float) -> Solution:  # noqa: N803
    """Minimise the objective; see `featcache.heads.Solver`."""
    model = LogisticRegression(C=C, solver="lbfgs", tol=FINAL_TOLERANCE, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return Solution(
        coefficients=model.coef_.astype(np.float64),
        intercept=model.intercept_.astype(np.float64),
        iterations=int(model.n_iter_.max()),
        converged=not any(issubclass(w.category, ConvergenceWarning) for w in caught),
    )
