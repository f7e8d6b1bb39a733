"""What a cache holds, in memory or mapped from its file. Knows no HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from featcache.cache.key import hash_extractor
from featcache.dataset import Listing, Split, parse_root
from featcache.files import canonical_json, hash_bytes
from featcache.views import NO_VIEWS, Views

SCHEMA = 2
STORED_TYPES = {"float32": "<f4", "float16": "<f2"}
# Rows per digest of features: a damaged byte costs that many rows, not the file.
BLOCK_ROWS = 4096


class Rows(Protocol):
    """Features (N, D), or of K views (N, K, D), that give a slice of rows as an array: one, or what fetches them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D) or (N, K, D)."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """(n, D) or (n, K, D) of these rows."""


@dataclass(frozen=True, kw_only=True)
class FeatureSplit:
    """One split of a cache: its images' listing and their features (N, D), row by row.

    `features` is float32 in memory if `read_cache` gave it; mapped from the file, in the stored precision, if
    `open_cache` did. So are `views`, the features (N, K, D) of K random views of each image; None where there are none.
    """

    listing: Split
    features: Any
    views: Any = None

    def __len__(self) -> int:
        return len(self.listing)


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """What a cache holds.

    Attributes
    ----------
    classes
        Class names; a label is an index into them.
    extractor
        JSON description of backbone, weights, layer, preprocessing and precision.
    splits
        "train", "val" and perhaps "test".
    provenance
        Where it came from and what it cost; decides nothing.
    content_sha256
        Digest of classes, key, listing, features and views, if it came from a file: equal caches have equal ones,
        whatever their provenance.
    views
        How many random views of each image there are, and which.
    """

    classes: tuple[str, ...]
    extractor: dict[str, Any]
    splits: dict[str, FeatureSplit]
    provenance: dict[str, Any]
    content_sha256: str = ""
    views: Views = NO_VIEWS

    @property
    def key(self) -> str:
        """The extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def dim(self) -> int:
        """D, features per image."""
        return int(self.splits["train"].features.shape[1])

    @property
    def n_views(self) -> int:
        """Views of all images together."""
        return sum(len(split) * self.views.count(name) for name, split in self.splits.items())

    @property
    def stored(self) -> str:
        """The features' precision in the file, "float32" or "float16"."""
        return stored_precision(self.extractor)

    @property
    def listing(self) -> Listing:
        """The data set that the rows came from."""
        return Listing(
            root=parse_root(self.provenance["data"]),
            classes=self.classes,
            splits={name: split.listing for name, split in self.splits.items()},
        )

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits.values())

    def __repr__(self) -> str:
        counts = " + ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        views = f", views: {self.views.describe()}" if self.views else ""
        return f"FeatureCache({counts} rows of {self.dim} {self.stored}, {self.extractor['backbone']}{views})"


def stored_precision(extractor: Mapping[str, Any]) -> str:
    """How an extractor's features are stored, "float32" or "float16"."""
    return str(extractor["precision"]["stored"])


def count_block(shape: tuple[int, ...]) -> int:
    """How many images share a digest of their features: BLOCK_ROWS, of K views (N, K, D) as many as make that many.

    >>> count_block((100_000, 512)), count_block((100_000, 5, 512))
    (4096, 819)
    """
    return max(BLOCK_ROWS // shape[1], 1) if len(shape) == 3 else BLOCK_ROWS


def hash_content(classes: tuple[str, ...], key: str, columns_sha256: Mapping[str, str]) -> str:
    """Digest of everything but provenance and stats."""
    columns = {name: digest for name, digest in columns_sha256.items() if not name.endswith("/stats")}
    return hash_bytes(canonical_json([list(classes), key, columns]).encode())
