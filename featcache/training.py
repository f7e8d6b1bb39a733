"""The one loop that trains by gradient steps, whatever a batch holds: images through a network, or features to a head.

Knows batches, losses and epochs; nothing of files, data sets or what the numbers are for.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.errors import FeatcacheError

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training batches and one over the validation batches.

    Losses are mean cross-entropy in nats per image, accuracies shares; the training ones are collected while the
    weights still change, as in the classic recipe.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training gave: every epoch, and which one's weights the network now has."""

    history: tuple[Epoch, ...]
    best: Epoch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to take the steps: optimiser, schedule, and the mode that the network trains in."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    set_training_mode: Callable[[nn.Module], None]


def train(
    network: nn.Module,
    train_batches: Batches,
    val_batches: Batches,
    recipe: Recipe,
    *,
    on_epoch: Callable[[Epoch, bool], None] | None = None,
) -> Training:
    """Train a network and leave it with the weights of its best validation epoch.

    Parameters
    ----------
    network
        (B, ...) -> logits (B, C).
    train_batches, val_batches
        Iterated once an epoch; give (inputs, labels) on the network's device.
    recipe
        Optimiser, schedule, epochs and training mode.
    on_epoch
        Told of every epoch, and whether it is the best so far (highest validation accuracy, the earlier one of equals).

    Returns
    -------
    Training
        Its history and best epoch. The network is in evaluation mode.

    Raises
    ------
    FeatcacheError
        If a loss is no longer a number.
    """
    history: list[Epoch] = []
    best: Epoch | None = None
    best_weights: dict[str, Tensor] = {}
    for number in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        lr = recipe.optimizer.param_groups[0]["lr"]
        recipe.set_training_mode(network)
        train_loss, train_accuracy = train_epoch(network, train_batches, recipe.optimizer)
        recipe.scheduler.step()
        val_loss, val_accuracy = evaluate(network, val_batches)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise FeatcacheError(
                f"the loss is no longer a number in epoch {number} (training {train_loss}, validation {val_loss}); try "
                f"a smaller --lr than {lr:g}"
            )
        epoch = Epoch(
            epoch=number,
            lr=lr,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            seconds=time.perf_counter() - started,
        )
        history.append(epoch)
        is_best = best is None or val_accuracy > best.val_accuracy
        if is_best:
            best = epoch
            best_weights = copy.deepcopy(network.state_dict())  # with the versions that MNASNet asks for
        if on_epoch is not None:
            on_epoch(epoch, is_best)
    network.load_state_dict(best_weights)
    network.eval()
    assert best is not None
    return Training(history=tuple(history), best=best)


def train_epoch(network: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """One gradient step per batch; the mean loss and accuracy over the rows, as they were when each was seen."""
    loss_sum, correct, n = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    for inputs, labels in batches:
        optimizer.zero_grad()
        logits = network(inputs)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # NOTE: sums stay on the device; .item() here would wait for the GPU at every step
        loss_sum = loss_sum.to(loss.device) + loss.detach() * len(labels)
        correct = correct.to(loss.device) + (logits.argmax(1) == labels).sum()
        n += len(labels)
    return float(loss_sum) / n, int(correct) / n


def evaluate(network: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy over the rows, in evaluation mode, without gradients."""
    network.eval()
    loss_sum, correct, n = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    with torch.inference_mode():
        for inputs, labels in batches:
            logits = network(inputs)
            loss_sum = loss_sum.to(logits.device) + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct.to(logits.device) + (logits.argmax(1) == labels).sum()
            n += len(labels)
    return float(loss_sum) / n, int(correct) / n


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


class TensorBatches:
    """Batches from tensors in memory: cached features in a new random order each time, or in the given one.

    Parameters
    ----------
    inputs
        (N, D).
    labels
        (N,) int64.
    batch_size
        Rows per batch.
    shuffle
        A new order each time, from torch's global random state.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, batch_size: int, *, shuffle: bool = False) -> None:
        self.inputs, self.labels, self.batch_size, self.shuffle = inputs, labels, batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = self.inputs, self.labels
        if self.shuffle:
            order = torch.randperm(len(labels))
            inputs, labels = inputs[order], labels[order]
        yield from zip(torch.split(inputs, self.batch_size), torch.split(labels, self.batch_size), strict=True)
