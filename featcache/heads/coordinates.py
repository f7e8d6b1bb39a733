"""The coordinates that heads are solved in: standardised and perhaps rotated features, and the way back to raw ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.heads.rows import TrainingRows

ROWS_PER_AXIS = 8  # that show well enough where the principal axes are
EMPTY = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the longest axis: what is left of one that holds only rounding
MANY_IMAGES = 1000  # that tell small variances from none
PRIOR_IMAGES = 16  # that fewer are taken to have in addition, in all of which every feature varies as the average one
PLAIN = (1e-12, 1e12)  # sizes of features whose squares fit into single precision


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Standardisation, then perhaps a rotation.

    An L2 penalty does not feel a rotation, so the solution is the same as on the standardised features themselves. What
    is gained: N rows span at most N axes, however wide the features; and along principal axes the curvature of the
    objective is known, which solvers use.

    Attributes
    ----------
    mean, scale
        (D,) float64, of the raw features; the scale of one that never varies is 1.
    axes
        (R, D) float64, orthonormal, or None: the features' own.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor | None = None

    def transform(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Raw features (n, D) -> coordinates (n, R)."""
        standardised = (rows.to(dtype) - self.mean.to(dtype)).div_(self.scale.to(dtype))
        return standardised if self.axes is None else standardised @ self.axes.to(dtype).T

    def to_raw(
        self, coefficients: NDArray[np.float64], intercept: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (K, R) and intercept (K,) on coordinates -> the same function's on raw features, (K, D) and (K,)."""
        weight = coefficients if self.axes is None else coefficients @ self.axes.numpy()
        weight = weight / self.scale.numpy()
        return weight, intercept - weight @ self.mean.numpy()


def standardise(rows: TrainingRows, scaling: str) -> Coordinates:
    """The standardisation of all rows, each counting its weight; no label is looked at.

    Parameters
    ----------
    rows
        The training rows.
    scaling
        See `settle_variance`.

    Source: T. F. Chan, G. H. Golub and R. J. LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, COMPSTAT 1982, for the moments in one pass.
    """
    total, mean = 0.0, torch.zeros(rows.dim, dtype=torch.float64)
    squares = torch.zeros(rows.dim, dtype=torch.float64)
    for images, block in rows.iterate():
        weights = torch.from_numpy(rows.weights[images]).repeat_interleave(rows.n_views) / rows.n_views
        flat, count = block.flatten(0, 1), float(weights.sum())
        middle = flat.mean(dim=0)
        centred = flat - middle  # before anything is weighed or squared: features may lie far from zero
        if not PLAIN[0] < float(centred.abs().max()) < PLAIN[1]:
            centred = centred.double()
        low = weights.to(centred.dtype)
        shift = (low @ centred).double() / count
        spread = (low @ centred.square()).double() - count * shift.square()
        step = middle.double() + shift - mean
        squares += spread + step.square() * (total * count / (total + count))
        mean += step * (count / (total + count))
        total += count
    variance = settle_variance(squares.clamp_min_(0) / total, scaling, total)
    return Coordinates(mean=mean, scale=torch.where(variance > 0, variance.sqrt(), 1.0))


def settle_variance(variance: Tensor, scaling: str, n_images: float) -> Tensor:
    """The variances (D,) that features are divided by the roots of, from those of the training rows.

    "standard" takes every feature's own; "l2" and "none" one number for all, which keeps their proportions and makes
    their average variance 1. "auto" takes every feature's own too, but a few images do not tell a feature that varies
    little from one that happened to be zero in all of them, and would blow it up: below a thousand of them the
    variances are those that 16 more images would give, in which all features vary alike. (On ten images of ants and
    bees that is the step from 80 % to 92 %.)

    Source: the posterior variance under a conjugate prior, as in G. K. Smyth, Linear models and empirical Bayes methods
    for assessing differential expression, Statistical Applications in Genetics and Molecular Biology 3 (2004).
    """
    average = variance.mean().expand_as(variance)
    if scaling in ("l2", "none"):
        return average
    if scaling == "auto" and n_images < MANY_IMAGES:
        return (n_images * variance + PRIOR_IMAGES * average) / (n_images + PRIOR_IMAGES)
    return variance


def find_axes(rows: TrainingRows, scaling: str, *, rotate: bool, dtype: torch.dtype) -> tuple[Coordinates, Tensor]:
    """Coordinates for the training rows, and the rows in them.

    Parameters
    ----------
    rows
        The training rows, in memory.
    scaling
        As of `standardise`.
    rotate
        Whether to rotate onto the principal axes, of some of the rows if they are many: worth it where much is to be
        solved.
    dtype
        Precision of the rotation and of the rows.

    Returns
    -------
    coordinates
        (R, D) at most min(N V, D) axes.
    transformed
        (N V, R), image after image.
    """
    coordinates = standardise(rows, scaling)
    n, width = len(rows) * rows.n_views, rows.dim
    if n < width:
        transformed = transform_all(rows, coordinates, torch.float64)
        rest = transformed.mean(dim=0)  # not 0 where rows are weighed, or rounded: it would be an axis of its own
        transformed -= rest
        coordinates = replace(coordinates, mean=coordinates.mean + rest * coordinates.scale)
        orthonormal, upper = torch.linalg.qr(transformed.T)  # (D, n), (n, n)
        axes, transformed = orthonormal.T, upper.T
        if rotate:
            vectors = find_principal_axes(transformed)
            axes, transformed = vectors.T @ axes, transformed @ vectors
        kept = find_filled(transformed)
        return replace(coordinates, axes=axes[kept].contiguous()), transformed[:, kept].to(dtype).contiguous()
    if rotate:
        some = rows.select(np.arange(0, len(rows), max(1, n // (ROWS_PER_AXIS * width))))
        axes = find_principal_axes(transform_all(some, coordinates, dtype)).T
        coordinates = replace(coordinates, axes=axes.double().contiguous())
    transformed = transform_all(rows, coordinates, dtype)
    if rotate and not (kept := find_filled(transformed)).all():
        assert coordinates.axes is not None
        coordinates = replace(coordinates, axes=coordinates.axes[kept].contiguous())
        transformed = transformed[:, kept].contiguous()
    return coordinates, transformed


def find_filled(rows: Tensor) -> Tensor:
    """Which axes hold more of rows (n, R) than rounding: a mask (R,).

    Weights on the others would cost next to no penalty, fit rounding, and spoil what is predicted of new images.
    """
    squares = torch.stack(
        [block.square().sum(dim=0) for block in torch.split(rows, 4096)]
    )  # each stays in the processor
    lengths = squares.sum(dim=0).sqrt()
    return lengths > EMPTY[rows.dtype] * lengths.max()


def transform_all(rows: TrainingRows, coordinates: Coordinates, dtype: torch.dtype) -> Tensor:
    """All rows in some coordinates, (N V, R)."""
    width = rows.dim if coordinates.axes is None else len(coordinates.axes)
    transformed = torch.empty(len(rows), rows.n_views, width, dtype=dtype)
    for images, block in rows.iterate():
        transformed[images] = coordinates.transform(block.flatten(0, 1), dtype).view(-1, rows.n_views, width)
    return transformed.flatten(0, 1)


def find_principal_axes(rows: Tensor) -> Tensor:
    """(R, R), in columns, of rows (n, R)."""
    squares: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors
    return squares
