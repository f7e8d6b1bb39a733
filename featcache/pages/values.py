"""What a page shows, as plain values. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.dataset import Root
from featcache.runs import Predictions


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm, beyond its numbers in the summary.

    Attributes
    ----------
    name
        As in the summary.
    predictions
        Of the first seed on the reported images, ordered by path: the same images in every arm.
    histories
        One for each seed, rows as `featcache.runs.read_history` gives them; none of a head.
    """

    name: str
    predictions: Predictions
    histories: list[list[dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """M images laid out in the plane by their features.

    Attributes
    ----------
    method
        "PCA", "t-SNE" or "UMAP".
    coordinates
        (M, 2).
    labels
        (M,) indices into the classes.
    splits, paths
        M each; paths relative to the data folder, as those of predictions.
    note
        What a reader must know, such as "PCA, 41 % of the variance; 600 of 9,469 images".
    """

    method: str
    coordinates: NDArray[np.float64]
    labels: NDArray[np.int64]
    splits: tuple[str, ...]
    paths: tuple[str, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """Everything on the page of a comparison, or of a ranking.

    Attributes
    ----------
    summary
        compare.json, schema 2: docs/json.md. Its `kind` says which of the two it is.
    arms
        In the order of `summary["arms"]`; of a ranking only the first ones, whose answers are shown.
    curve
        The learning curve as `describe` of it has it (points, forecast, law, verdict), or None.
    feature_maps
        Any number.
    root
        Where the images are; None: paths without thumbnails.
    """

    summary: dict[str, Any]
    arms: list[ArmView]
    curve: dict[str, Any] | None
    feature_maps: list[FeatureMap]
    root: Root | None


@dataclass(frozen=True, kw_only=True)
class AuditPage:
    """Everything on the page of an audit.

    Attributes
    ----------
    summary
        audit.json: docs/json.md.
    ranking
        Every image as audit.json has images, the label that is most worth a look first.
    table
        Where labels.csv lies, in words.
    command
        What makes the audit again.
    versions
        Of the packages, by name.
    root
        Where the images are; None: paths without thumbnails.
    """

    summary: dict[str, Any]
    ranking: Sequence[Mapping[str, Any]]
    table: str
    command: str
    versions: Mapping[str, str]
    root: Root | None
