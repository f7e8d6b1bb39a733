"""The coordinates that heads are solved in: standardised and perhaps rotated features, and the way back to raw ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.heads.rows import TrainingRows

ROWS_PER_AXIS = 8  # that show well enough where the principal axes are


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
        "standard" gives every feature the variance 1; "l2" and "none" divide all of them by one number, which keeps
        their proportions and makes their average variance 1.

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
        shift = (weights.float() @ centred).double() / count
        spread = (weights.float() @ centred.square()).double() - count * shift.square()
        step = middle.double() + shift - mean
        squares += spread + step.square() * (total * count / (total + count))
        mean += step * (count / (total + count))
        total += count
    variance = squares.clamp_min_(0) / total
    if scaling != "standard":
        variance = variance.mean().expand_as(variance)
    return Coordinates(mean=mean, scale=torch.where(variance > 0, variance.sqrt(), 1.0))


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
        orthonormal, upper = torch.linalg.qr(transformed.T)  # (D, n), (n, n)
        axes, transformed = orthonormal.T, upper.T
        if rotate:
            vectors = find_principal_axes(transformed)
            axes, transformed = vectors.T @ axes, transformed @ vectors
        return replace(coordinates, axes=axes.contiguous()), transformed.to(dtype).contiguous()
    if rotate:
        some = rows.select(np.arange(0, len(rows), max(1, n // (ROWS_PER_AXIS * width))))
        axes = find_principal_axes(transform_all(some, coordinates, dtype)).T
        coordinates = replace(coordinates, axes=axes.double().contiguous())
    return coordinates, transform_all(rows, coordinates, dtype)


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
