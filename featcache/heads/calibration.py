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
    """The temperature T for which softmax(logits / T) has the least log loss, half an image in N + 1 taken to be wrong.

    Without that doubt, images that are all right would make all other images certain too.

    Source: C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, On calibration of modern neural networks, ICML 2017; J. C.
    Platt, Probabilistic outputs for support vector machines, Advances in Large Margin Classifiers, 1999, for the doubt;
    R. E. Krichevsky and V. K. Trofimov, The performance of universal encoding, IEEE Trans. Inf. Theory 27 (1981), for
    its half.

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
    doubt = 0.5 / (len(labels) + 1)

    def loss(log_temperature: float) -> float:
        logs = log_softmax(logits / math.exp(log_temperature), axis=1)
        own = logs[rows, labels]
        others = (logs.sum(axis=1) - own) / (logs.shape[1] - 1)
        return -float(counts @ ((1 - doubt) * own + doubt * others))

    # bounded search from a spread that is near: scores of a ridge lie between 0 and 1, logits of a wide net far apart
    spread = math.log(max(float(np.std(logits)), 1e-9))
    middle = min(max(spread, LOG_RANGE[0] + 6), LOG_RANGE[1] - 6)
    found = minimize_scalar(loss, bounds=(middle - 6, middle + 6), method="bounded", options={"xatol": 1e-3})
    return math.exp(float(found.x))
