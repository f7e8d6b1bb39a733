"""Heads on features: choose on the training rows alone, fit, fold everything into one head on raw features.

One module per solver, each with one function `fit`; all take the same and give the same.

=========  ==========================================================================================================
lbfgs      multinomial logistic regression; preconditioned L-BFGS in torch, on a CPU or on CUDA
sklearn    the same by scikit-learn, the reference
ridge      least squares onto one-hot targets; closed form, exact leave-one-out error, images and classes can be added
sgd        multinomial logistic regression on rows that are streamed from the disk, larger than memory
knn        nearest neighbours by cosine similarity
=========  ==========================================================================================================

Knows arrays, no files and no images.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featcache.config import HeadConfig
from featcache.heads.calibration import fit_temperature
from featcache.heads.fitted import FittedHead, Head, LinearHead
from featcache.heads.knn import NeighbourHead
from featcache.heads.rows import Features, TrainingRows, check_labels, check_rows, weigh_images
from featcache.heads.selection import Candidate, HeldOut, Selection
from featcache.heads.threads import limit_threads
from featcache.metering import Meter
from featcache.progress import SILENT, Progress

__all__ = [
    "Candidate",
    "Features",
    "FittedHead",
    "Head",
    "HeldOut",
    "LinearHead",
    "NeighbourHead",
    "Selection",
    "count_right",
    "find_logits",
    "fit_head",
    "iterate_logits",
    "remake_head",
]

BLOCK_IMAGES = 8192  # that are predicted at a time
FEW = 1_000_000  # numbers in all, below which threads cost more than they bring


class Fit(Protocol):
    """What every solver's module has."""

    def __call__(
        self, rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress
    ) -> FittedHead:
        """Choose what is not given, and fit."""


def fit_head(
    features: Features,
    labels: NDArray[np.int64],
    n_classes: int,
    config: HeadConfig,
    progress: Progress = SILENT,
    *,
    views: Features | None = None,
    validation: HeldOut | None = None,
) -> FittedHead:
    """Fit a head.

    Parameters
    ----------
    features
        (N, D) float32 or float16, of the training images alone; an array, or for "sgd" and "ridge" anything that gives
        slices of rows.
    labels
        (N,) int64 in 0..n_classes-1, each present.
    n_classes
        C, at least 2.
    config
        Solver, and what is given or chosen.
    progress
        Told of the cross-validation.
    views
        (N, K, D), features of K augmented views of each image, or None.
    validation
        What chooses in place of cross-validation on the training rows.

    Returns
    -------
    FittedHead

    Raises
    ------
    DatasetError
        If there is only one class, a label is no class, a class has no image, no feature varies, or one is not a finite
        number.
    """
    labels = np.asarray(labels, np.int64)
    check_labels(labels, n_classes)
    rows = TrainingRows(
        features=features,
        labels=labels,
        n_classes=n_classes,
        views=views,
        weights=weigh_images(labels, n_classes, config.class_weight),
        unit_length=config.scaling == "l2",
    )
    check_rows(rows)
    meter = Meter()
    with limit_threads(1 if rows.size < FEW else None):
        fitted = load_solver(config.solver)(rows, config, validation, progress)
        if fitted.held_out is not None and (config.calibrate or config.solver == "ridge"):
            fitted = calibrate(fitted, rows)
    return replace(fitted, spent=meter.read())


def remake_head(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> Head:
    """The head that `take_apart` took apart, for C classes on D features, shape (C, D).

    Raises
    ------
    ValueError, KeyError
        If it is of another shape, or something is missing.
    """
    kinds: dict[str, type[LinearHead | NeighbourHead]] = {"linear": LinearHead, "neighbours": NeighbourHead}
    return kinds[values["kind"]].remake(values, arrays, shape)


def find_logits(head: Head, features: Features) -> NDArray[np.float32]:
    """Logits (N, C) of features (N, D), some images at a time."""
    return np.concatenate([logits for _, logits in iterate_logits(head, features)])


def iterate_logits(head: Head, features: Features) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The same piece by piece, each with the rows that it is of."""
    for start in range(0, features.shape[0], BLOCK_IMAGES):
        rows = slice(start, min(start + BLOCK_IMAGES, features.shape[0]))
        yield rows, head.logits(np.asarray(features[rows], np.float32))


def count_right(head: Head, features: Features, labels: NDArray[np.int64]) -> int:
    """How many of N images the head is right about, by features (N, D) and labels (N,)."""
    return sum(int((one.argmax(axis=1) == labels[rows]).sum()) for rows, one in iterate_logits(head, features))


def calibrate(fitted: FittedHead, rows: TrainingRows) -> FittedHead:
    """The head with its logits divided by the temperature that suits images that a fit did not see."""
    assert fitted.held_out is not None
    temperature = fit_temperature(fitted.held_out, rows.labels, rows.weights)
    return replace(fitted, head=fitted.head.divide_logits(temperature), temperature=temperature)


def load_solver(name: str) -> Fit:
    """The solver of this name; its library is imported only now."""
    return cast(Fit, importlib.import_module(f"featcache.heads.{'lbfgs' if name == 'auto' else name}").fit)
