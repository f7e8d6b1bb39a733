"""What the loop is fed with: batches that can be taken up in the middle of an epoch. Some from tensors in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in an epoch.

    Attributes
    ----------
    batches
        How many of its batches have been used.
    order
        (N,) int64, the rows in the order of this epoch.
    """

    batches: int
    order: Tensor


class Batches(Protocol):
    """Batches of inputs (B, ...) and labels (B,), on the network's device, the same number in every epoch.

    A label of -100 marks an input that is only there because every process needs one; it counts for nothing.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the next epoch, from its beginning."""


class ResumableBatches(Batches, Protocol):
    """Batches that can go on within an epoch."""

    @property
    def order(self) -> Tensor:
        """(N,) int64, the rows in the order of the epoch that is running."""

    def begin(self, epoch: int, position: Position | None = None) -> None:
        """Let the next iteration be of this epoch, from a place on where it was left before."""


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
        self._position: Position | None = None
        self.order = torch.arange(len(labels))

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def begin(self, epoch: int, position: Position | None = None) -> None:
        """Let the next iteration be of this epoch, from a place on where it was left before."""
        del epoch
        self._position = position

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        position, self._position = self._position, None
        inputs, labels, done = self.inputs, self.labels, 0
        if position is not None:
            self.order, done = position.order, position.batches
        elif self.shuffle:
            self.order = torch.randperm(len(labels))
        if self.shuffle:
            inputs, labels = inputs[self.order], labels[self.order]
        for start in range(done * self.batch_size, len(labels), self.batch_size):
            yield inputs[start : start + self.batch_size], labels[start : start + self.batch_size]
