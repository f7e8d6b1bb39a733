"""Calibration: one temperature that all logits are divided by, so that probabilities are what comes true."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

LOG_RANGE = (-12.0, 12.0)  # of the temperature's logarithm


def fit_temperature(
    logits: NDArray[np.float64], labels: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> float:
    """The temperature T for which softmax(logits / T) has the least log loss.

    Source: C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, On calibration of modern neural networks, ICML 2017.

    Parameters
    ----------
    logits
        (N, C) of images that the fit did not see.
    labels
        (N,).
    weights
        (N,), what each counts; None is 1.
    """
    rows, counts = np.arange(len(labels)), np.ones(len(labels)) if weights is None else weights

    def loss(log_temperature: float) -> float:
        return -float(counts @ log_softmax(logits / math.exp(log_temperature), axis=1)[rows, labels])

    # bounded search from a spread that is near: scores of a ridge lie between 0 and 1, logits of a wide net far apart
    spread = math.log(max(float(np.std(logits)), 1e-9))
    middle = min(max(spread, LOG_RANGE[0] + 6), LOG_RANGE[1] - 6)
    found = minimize_scalar(loss, bounds=(middle - 6, middle + 6), method="bounded", options={"xatol": 1e-3})
    return math.exp(float(found.x))
