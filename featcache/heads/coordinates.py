"""The coordinates that heads are solved in: standardised and rotated features, and the way back to raw ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from featcache.errors import DatasetError

Features = NDArray[np.float32] | NDArray[np.float64]

NEGLIGIBLE = 1e-12  # of the largest variance: a direction in which the rows do not differ


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Standardisation, then a rotation onto the principal axes, those without any variance left out.

    An L2 penalty does not feel a rotation, and weights along an axis without variance are zero at its optimum, so the
    solution is the same as on the standardised features themselves. What is gained: N rows have at most N - 1 axes,
    however wide the features; and along the axes the curvature of the objective is known, which solvers may use.

    Attributes
    ----------
    mean, scale
        (D,) of the raw features; the scale of one that never varies is 1.
    axes
        (R, D) orthonormal, R <= min(N - 1, D).
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    axes: NDArray[np.float64]

    def transform(self, features: Features) -> NDArray[np.float64]:
        """Raw features (N, D) -> coordinates (N, R)."""
        rotated: NDArray[np.float64] = ((features.astype(np.float64) - self.mean) / self.scale) @ self.axes.T
        return rotated

    def to_raw(
        self, coefficients: NDArray[np.float64], intercept: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (K, R) and intercept (K,) on coordinates -> the same function's on raw features, (K, D) and (K,)."""
        weight = (coefficients @ self.axes) / self.scale
        return weight, intercept - weight @ self.mean


def fit_coordinates(features: Features) -> Coordinates:
    """Fit the coordinates to the training rows (N, D). No label is looked at.

    Raises
    ------
    DatasetError
        If no feature varies.
    """
    scaler = StandardScaler()
    standardised = scaler.fit_transform(features.astype(np.float64))
    if not standardised.any():
        raise DatasetError("all training images have equal features: there is nothing to tell classes apart by")
    n, width = standardised.shape
    pca = PCA(svd_solver="covariance_eigh" if n >= width else "full").fit(standardised)
    kept = pca.explained_variance_ > NEGLIGIBLE * max(float(pca.explained_variance_.max()), 1e-300)
    return Coordinates(mean=scaler.mean_, scale=scaler.scale_, axes=pca.components_[kept])
