"""The rows that a head learns from: plain features, perhaps augmented views too, and what each counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import DatasetError

BLOCK_NUMBERS = 1 << 21  # features that are worked on at a time: they stay in the processor


class Features(Protocol):
    """Features that give a slice of images as an array: an array itself, or something that reads it from a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D), or (N, V, D) of views."""

    def __getitem__(self, images: slice, /) -> NDArray[np.floating]:
        """The features of these images."""


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """N images with their labels, and V features each: the plain ones, and those of V - 1 augmented views.

    Attributes
    ----------
    features
        (N, D), float32 or float16.
    labels
        (N,) int64 in 0..n_classes-1, each present.
    n_classes
        2 or more.
    views
        (N, V - 1, D), or None.
    weights
        (N,) float64: what each image counts, 1 on average; its V rows count 1 / V of it each.
    unit_length
        Whether every row is divided by its length before anything else.
    """

    features: Features
    labels: NDArray[np.int64]
    n_classes: int
    weights: NDArray[np.float64]
    views: Features | None = None
    unit_length: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.features.shape[-1])

    @property
    def n_views(self) -> int:
        """V, the plain features included."""
        return 1 + (0 if self.views is None else int(self.views.shape[1]))

    @property
    def size(self) -> int:
        """How many numbers all features are."""
        return len(self) * self.n_views * self.dim

    def read(self, images: slice) -> Tensor:
        """(n, V, D) float32 of a slice of images, the plain features first."""
        rows = to_float(self.features[images])[:, None]
        if self.views is not None:
            rows = torch.cat([rows, to_float(self.views[images])], dim=1)
        return to_unit_length(rows) if self.unit_length else rows

    def iterate(self) -> Iterator[tuple[slice, Tensor]]:
        """All images in order, in slices of a size that processors like, with their features (n, V, D)."""
        step = max(256, BLOCK_NUMBERS // (self.n_views * self.dim))
        for start in range(0, len(self), step):
            images = slice(start, min(start + step, len(self)))
            yield images, self.read(images)

    def replace_images(self, features: Features, labels: NDArray[np.int64]) -> TrainingRows:
        """Other images, without views, each counting 1, to be treated like these."""
        return replace(self, features=features, labels=labels, views=None, weights=np.ones(len(labels)))

    def select(self, images: NDArray[np.int64]) -> TrainingRows:
        """Only these images, in memory."""
        return replace(
            self,
            features=gather(self.features, images),
            labels=self.labels[images],
            views=None if self.views is None else gather(self.views, images),
            weights=self.weights[images],
        )


def gather(features: Features, images: NDArray[np.int64]) -> NDArray[np.floating]:
    """Features of some images, in ascending order, in memory; from a file a slice at a time."""
    if isinstance(features, np.ndarray):
        return features[images]
    n, width = features.shape[0], int(np.prod(features.shape[1:]))
    step, parts = max(1, BLOCK_NUMBERS // width), [features[0:0]]
    for start in range(0, n, step):
        mine = images[np.searchsorted(images, start) : np.searchsorted(images, start + step)]
        if len(mine):
            parts.append(features[start : min(start + step, n)][mine - start])
    return np.concatenate(parts)


def to_float(features: NDArray[np.floating]) -> Tensor:
    """Features as a float32 tensor; torch converts float16 ten times as fast as numpy does."""
    return torch.from_numpy(np.ascontiguousarray(features)).float()


def to_unit_length(rows: Tensor) -> Tensor:
    """Rows (..., D), each divided by its Euclidean length; a row of zeros stays."""
    return torch.nn.functional.normalize(rows, dim=-1)


def check_labels(labels: NDArray[np.int64], n_classes: int) -> None:
    """Raise a DatasetError if these are not numbers of classes."""
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise DatasetError(f"labels are {labels.min()} to {labels.max()}, expected 0 to {n_classes - 1}")


def weigh_images(labels: NDArray[np.int64], n_classes: int, class_weight: str | None) -> NDArray[np.float64]:
    """What each of N images counts, 1 on average.

    "balanced" lets all classes count the same, as in scikit-learn: N / (C n_k) for an image of a class of n_k.
    """
    counts = np.bincount(labels, minlength=n_classes)
    if class_weight is None:
        return np.ones(len(labels))
    weights: NDArray[np.float64] = (len(labels) / (n_classes * np.maximum(counts, 1)))[labels]
    return weights


def check_rows(rows: TrainingRows) -> None:
    """Raise a DatasetError if no head can be fitted to these rows."""
    if rows.n_classes < 2:
        raise DatasetError("a classifier needs at least 2 classes; the training split has 1")
    counts = np.bincount(rows.labels, minlength=rows.n_classes)
    if not counts.all():
        number = int(np.argmin(counts > 0))
        raise DatasetError(f"class {number} of {rows.n_classes} has no training image; leave it out, or give it some")
    first, varies = None, False
    for images, block in rows.iterate():
        if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():  # the sum is the quicker look
            bad = images.start + int((~torch.isfinite(block)).flatten(1).any(dim=1).nonzero()[0])
            raise DatasetError(f"the features of training image {bad} are not finite numbers; extract them again")
        first = block[0, 0].clone() if first is None else first
        varies = varies or bool((block != first).any())
    if not varies:
        raise DatasetError("all training images have equal features: there is nothing to tell classes apart by")
