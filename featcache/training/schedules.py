"""How the learning rate goes, step by step: torch's own schedules, counted in gradient steps."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    StepLR,
)

WARMUP_FROM = 0.01  # of the learning rate
ONE_CYCLE_WARMUP = 0.3  # of all steps, as torch has it
ONE_CYCLE_FROM = 25.0  # the first rate is the largest divided by it, as torch has it


def make_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    epochs: int,
    epoch_steps: int,
    step_size: int,
    gamma: float,
    warmup: float | None,
) -> LRScheduler:
    """A schedule that is stepped once after every gradient step.

    Parameters
    ----------
    name
        "step": multiplied by `gamma` every `step_size` epochs, as the classic recipe has it. "cosine": to zero along
        half a cosine [1]_. "one-cycle": up from a 25th and down to nearly zero [2]_, the momentum left alone.
    optimizer
        Each of its groups keeps its own rate, in proportion.
    epochs, epoch_steps
        How many epochs there are, and gradient steps in each.
    step_size, gamma
        Of "step".
    warmup
        Epochs in which the rate grows linearly from a hundredth; of "one-cycle", in which it goes up. None is none,
        and of "one-cycle" 30 % of all steps.

    References
    ----------
    .. [1] Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983
    .. [2] Smith & Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120
    """
    n_steps = epochs * epoch_steps
    n_warmup = 0 if warmup is None else min(round(warmup * epoch_steps), n_steps - 1)
    if name == "one-cycle":
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=n_steps + 1,  # one more, which the step after the last asks for
            pct_start=ONE_CYCLE_WARMUP if warmup is None else max(n_warmup, 1) / n_steps,
            div_factor=ONE_CYCLE_FROM,
            cycle_momentum=False,
        )
    if name == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, n_steps)
    else:
        main = StepLR(optimizer, step_size * epoch_steps, gamma)
    if not n_warmup:
        return main
    return ChainedScheduler([LinearLR(optimizer, start_factor=WARMUP_FROM, total_iters=n_warmup), main])
