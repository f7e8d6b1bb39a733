"""Full-batch L-BFGS in torch, double precision, on the same objective as scikit-learn's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from featcache.heads import FINAL_TOLERANCE, Solution

MAX_ITERATIONS = 10_000
CONVERGED_GRADIENT = 1e-5  # the loss may stop falling, at double precision, before FINAL_TOLERANCE is reached


def solve(features: NDArray[np.float64], labels: NDArray[np.int64], *, C: float) -> Solution:  # noqa: N803
    """Minimise the objective; see `featcache.heads.Solver`.

    The weights are scaled by the curvature that the objective has along each feature: the optimum is the same, and it
    takes tens of steps where it took hundreds.

    Source: D. C. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical
    Programming 45 (1989), as in torch.optim.LBFGS with a strong-Wolfe line search.
    """
    x = torch.from_numpy(features)  # (N, D)
    y = torch.from_numpy(labels)  # (N,)
    n_classes = int(labels.max()) + 1
    n_outputs = 1 if n_classes == 2 else n_classes
    penalty = 1 / (C * len(y))
    scale = 1 / ((1 - 1 / n_classes) / n_classes * x.square().mean(0) + penalty).sqrt()  # (D,)
    scaled = torch.zeros(n_outputs, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scaled, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=FINAL_TOLERANCE * min(1.0, float(scale.min()) if len(scale) else 1.0),
        tolerance_change=1e-12,  # nor on a loss that no longer falls
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        """The objective divided by C N, so that its size depends on neither; gradients as a side effect."""
        optimizer.zero_grad()
        weight = scaled * scale
        logits = F.linear(x, weight, bias)
        if n_outputs == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], y.double())
        else:
            loss = F.cross_entropy(logits, y)
        value = loss + penalty * weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(evaluate)  # type: ignore[no-untyped-call]
    evaluate()
    assert scaled.grad is not None
    assert bias.grad is not None
    gradient = torch.cat([(scaled.grad / scale).abs().ravel(), bias.grad.abs()]).max()
    return Solution(
        coefficients=(scaled * scale).detach().numpy(),
        intercept=bias.detach().numpy(),
        iterations=int(optimizer.state[scaled]["n_iter"]),
        converged=float(gradient) <= CONVERGED_GRADIENT,
    )
