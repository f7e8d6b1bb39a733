"""Full-batch L-BFGS in torch, double precision, on the same objective as scikit-learn's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from featcache.heads import Solution

MAX_ITERATIONS = 10_000
PRECISION = 1e-6  # gradient at which double precision may have nothing left to gain


def solve(
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    C: float,  # noqa: N803 - the name that everybody knows it by
    tolerance: float,
) -> Solution:
    """Minimise the objective; see `featcache.heads.Solver`.

    Source: D. C. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical
    Programming 45 (1989), as in torch.optim.LBFGS with a strong-Wolfe line search.
    """
    x = torch.from_numpy(features)  # (N, D)
    y = torch.from_numpy(labels)  # (N,)
    n_classes = int(labels.max()) + 1
    n_outputs = 1 if n_classes == 2 else n_classes
    weight = torch.zeros(n_outputs, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,  # a loss that no longer falls: double precision ends there
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        """The objective divided by C N, so that its size depends on neither."""
        logits = F.linear(x, weight, bias)
        if n_outputs == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], y.double())
        else:
            loss = F.cross_entropy(logits, y)
        return loss + weight.square().sum() / (2 * C * len(y))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert weight.grad is not None
    assert bias.grad is not None
    gradient = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    return Solution(
        coefficients=weight.detach().numpy(),
        intercept=bias.detach().numpy(),
        iterations=int(optimizer.state[weight]["n_iter"]),
        converged=gradient <= max(tolerance, PRECISION),
    )
