"""Features (N, D) -> a map of them (M, 2): PCA, t-SNE, or UMAP where it is installed.

Each is deterministic: the same features give the same map. Knows no figure and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from featcache.errors import SettingsError
from featcache.extras import import_extra

METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
LIMIT = 1000  # points of a map: more hide one another and make a page heavy
KEPT = 50  # dimensions that PCA leaves to t-SNE and UMAP, as van der Maaten and Hinton have it
PERPLEXITY = 30.0
NEIGHBOURS = 15
SMALLEST = 4  # images that t-SNE and UMAP can do anything with


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A map of features.

    Attributes
    ----------
    method
        As people call it: "PCA", "t-SNE", "UMAP".
    rows
        (M,) which of the N rows are on the map, ascending.
    coordinates
        (M, 2).
    note
        What a reader must know, such as "PCA, 41 % of the variance; 600 of 9,469 images".
    """

    method: str
    rows: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    note: str


def project(
    features: ArrayLike, labels: NDArray[np.int64], *, method: str = "pca", limit: int = LIMIT, seed: int = 0
) -> Projection:
    """Lay out features in the plane.

    Parameters
    ----------
    features
        (N, D), any float type; N at least 2.
    labels
        (N,), by which the images on the map are drawn where there are more than `limit`.
    method
        "pca": linear, the two directions of largest variance. "tsne": neighbours stay neighbours, distances between
        groups mean nothing. "umap": alike, faster on many images.
    limit
        Most points on the map.
    seed
        Of the draw and of the method.

    Raises
    ------
    SettingsError
        If the method is none of these, or needs more images.
    MissingExtraError
        If UMAP is asked for and not installed.

    Source: N. Halko, P. G. Martinsson and J. A. Tropp, Finding structure with randomness, SIAM Review 53 (2011);
    L. van der Maaten and G. Hinton, Visualizing data using t-SNE, JMLR 9 (2008); L. McInnes, J. Healy and J. Melville,
    UMAP, arXiv:1802.03426.
    """
    if method not in METHODS:
        raise SettingsError(f"unknown map {method!r}: expected one of {', '.join(METHODS)}")
    rows = draw_in_proportion(labels, limit, seed)
    if len(rows) < (2 if method == "pca" else SMALLEST):
        raise SettingsError(
            f"a map by {METHODS[method]} needs more images, there are {len(rows)}; use pca, or more data"
        )
    drawn = np.asarray(features, np.float32)[rows].astype(np.float64)
    coordinates, how = {"pca": _fit_pca, "tsne": _fit_tsne, "umap": _fit_umap}[method](drawn, seed)
    part = f"{len(rows):,} of {len(labels):,} images" if len(rows) < len(labels) else f"{len(rows):,} images"
    return Projection(method=METHODS[method], rows=rows, coordinates=coordinates, note=f"{how}; {part}")


def draw_in_proportion(labels: NDArray[np.int64], limit: int, seed: int = 0) -> NDArray[np.int64]:
    """At most `limit` of N rows, each class with its share of them (largest remainders first), ascending.

    >>> draw_in_proportion(np.array([0] * 90 + [1] * 10), 10).size
    10
    """
    if len(labels) <= limit:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    shares = limit * counts / len(labels)
    taken = np.floor(shares).astype(np.int64)
    taken[np.argsort(taken - shares, kind="stable")[: limit - int(taken.sum())]] += 1
    parts = [
        rng.permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(classes.tolist(), taken.tolist(), strict=True)
    ]
    return np.sort(np.concatenate(parts))


def _fit_pca(features: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    reduced, explained = _reduce(features, 2, seed)
    return reduced, f"PCA, {explained:.0%} of the variance".replace("%", " %")


def _fit_tsne(features: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    # Three times the perplexity must fit among the other points, or there are no neighbours to speak of.
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    reduced, _ = _reduce(features, KEPT, seed)
    if not reduced.any():  # all images alike: t-SNE would divide by nothing
        return np.zeros((len(features), 2)), "t-SNE of equal features"
    method = "barnes_hut" if len(features) > 3 * PERPLEXITY else "exact"
    layout = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, method=method).fit_transform(reduced)
    return np.asarray(layout, np.float64), f"t-SNE, perplexity {perplexity:.3g}"


def _fit_umap(features: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    umap: Any = import_extra("umap", extra="umap", what="maps by UMAP need")
    neighbours = min(NEIGHBOURS, len(features) - 1)
    reduced, _ = _reduce(features, KEPT, seed)
    # One thread and random starts: spectral ones fail on few points, several threads give another map each time.
    start = "spectral" if len(features) > KEPT else "random"
    layout = umap.UMAP(n_neighbors=neighbours, init=start, random_state=seed, n_jobs=1).fit_transform(reduced)
    return np.asarray(layout, np.float64), f"UMAP, {neighbours} neighbours"


def _reduce(features: NDArray[np.float64], width: int, seed: int) -> tuple[NDArray[np.float64], float]:
    """PCA to at most so many dimensions, and the share of the variance that they hold; signs are always the same."""
    width = min(width, *features.shape)
    # The randomised solver is for few of many directions, see scikit-learn's guide on decomposition.
    solver = "randomized" if width < 0.8 * min(features.shape) else "full"
    pca = PCA(width, svd_solver=solver, random_state=seed)
    centred = features - features.mean(axis=0)
    if not centred.any():
        return np.zeros((len(features), max(width, 2))), 1.0
    reduced = pca.fit_transform(centred)
    explained = float(pca.explained_variance_ratio_.sum())
    if width < 2:  # a single feature, or a single image
        reduced = np.column_stack([reduced, np.zeros(len(reduced))])
    return np.asarray(reduced, np.float64), min(explained, 1.0)
