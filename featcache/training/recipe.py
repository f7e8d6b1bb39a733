"""What is decided before a training begins: stages, loss, averaging, which epoch is kept, when it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some epochs in which the same parameters learn.

    Attributes
    ----------
    name
        For the history.
    epochs
        How many, 1 or more.
    choose_parameters
        Says of every parameter whether it wants a gradient.
    set_training_mode
        Puts the network into the mode in which it trains.
    make_optimizer
        Of the parameters that want a gradient.
    make_scheduler
        (optimiser, gradient steps in an epoch) -> a schedule that is stepped after every gradient step.
    """

    name: str
    epochs: int
    choose_parameters: Callable[[nn.Module], None]
    set_training_mode: Callable[[nn.Module], None]
    make_optimizer: Callable[[nn.Module], Optimizer]
    make_scheduler: Callable[[Optimizer, int], LRScheduler]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    stages
        One after the other.
    label_smoothing
        Share of the target that is spread over all classes [1]_.
    class_weights
        (C,) float32, of each class in the loss; None weighs all images alike.
    mix
        (inputs, labels) -> (mixed inputs, shares of the classes (B, C)): mixup, cutmix.
    ema
        Decay per step of an average of the weights, which is then what is evaluated and kept; None averages nothing.
    keep
        "best": the weights of the epoch with the highest accuracy on the watched images, the earliest of equals, as in
        the classic recipe; "best, then least loss": of equals the one with the least loss; "last".
    patience
        Stop after so many epochs without a better one.
    start_counts
        Whether the weights that it begins with are evaluated as epoch 0, and may be kept.
    compute
        Type in which the network computes, "float32", or another under autocast.
    compiled
        Whether torch.compile makes the network faster first.

    References
    ----------
    .. [1] Szegedy et al., 2016, https://arxiv.org/abs/1512.00567
    """

    stages: tuple[Stage, ...]
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ema: float | None = None
    keep: str = "best"
    patience: int | None = None
    start_counts: bool = False
    compute: str = "float32"
    compiled: bool = False

    @property
    def epochs(self) -> int:
        """Of all stages."""
        return sum(stage.epochs for stage in self.stages)

    def find_stage(self, epoch: int) -> tuple[int, int]:
        """Index of the stage that an epoch, from 1, belongs to, and the first epoch of that stage."""
        first = 1
        for i, stage in enumerate(self.stages):
            if epoch < first + stage.epochs:
                return i, first
            first += stage.epochs
        return len(self.stages) - 1, first - self.stages[-1].epochs


def set_mode_all(network: nn.Module) -> None:
    """Everything trains: dropout drops, BatchNorm follows the batches."""
    network.train()


def set_mode_fixed_batch_norm(network: nn.Module) -> None:
    """Everything trains but BatchNorm's statistics, which stay as they were; its scale and shift are trained."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def set_mode_frozen(network: nn.Module) -> None:
    """Nothing but a linear last layer trains: the network stays in evaluation mode, or its BatchNorm would drift."""
    network.eval()


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a network's parameters and buffers.

    The first steps count more, `min(decay, (1 + n) / (10 + n))` at the n-th, or a short training would never leave the
    weights that it began with.

    Source: the warm-up of the averages in TensorFlow,
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage.
    """

    def average(averaged: Any, current: Any, n: Any) -> None:
        share = min(decay, (1 + int(n)) / (10 + int(n)))
        get_ema_multi_avg_fn(share)(averaged, current, n)  # type: ignore[no-untyped-call]

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def weigh_classes(labels: NDArray[np.int64], n_classes: int) -> Tensor:
    """Weights (C,) with which all classes count the same: N / (C n_c), as scikit-learn's "balanced".

    >>> weigh_classes(np.array([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = np.bincount(labels, minlength=n_classes)
    return torch.tensor(len(labels) / (n_classes * counts), dtype=torch.float32)
