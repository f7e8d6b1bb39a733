"""Features <-> HDF5: the schema, the key, reading, planning what to compute, writing. The only owner of h5py.

Knows no network and no image: rows are keyed by digests, the extractor is a JSON description.

::

    features.h5
    ├── attrs   featcache_schema   1
    │           classes            JSON list of names; a label is an index into it
    │           extractor          JSON: backbone, weights and their SHA-256, layer, preprocessing, precision
    │           extractor_key      SHA-256 of what decides the features
    │           provenance         JSON: data folder, versions, device, seconds spent extracting, files left out
    │           attributes_sha256  SHA-256 of those four
    ├── train/  features  (N, D) float32
    │           labels    (N,)   int64
    │           paths     (N,)   bytes, file names as the system has them, relative to the data folder
    │           digests   (N,)   64 bytes, SHA-256 of each image file in hexadecimal
    ├── val/    the same
    └── test/   the same, where there is one

A stranger needs no featcache to read it: ``h5py.File("features.h5")["train/features"][:]``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.dataset import Listing, Split
from featcache.errors import CacheError, StaleCacheError
from featcache.files import canonical_json, hash_bytes, write_atomically

SCHEMA = 1
# 256 rows a chunk: measured, 5.6 GB/s in order and 2.4 M rows/s in shuffled chunks of 512 float16; compression saves
# less than a tenth of random-looking features and costs 2 to 20 times the speed.
CHUNK_ROWS = 256
COLUMNS = ("features", "labels", "paths", "digests")


@dataclass(frozen=True, kw_only=True)
class FeatureSplit:
    """One split of a cache: its images' listing and their features (N, D) float32, row by row."""

    listing: Split
    features: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.listing)


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """A whole cache in memory.

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
    """

    classes: tuple[str, ...]
    extractor: dict[str, Any]
    splits: dict[str, FeatureSplit]
    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        """The extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def dim(self) -> int:
        """D, features per image."""
        return int(self.splits["train"].features.shape[1])

    @property
    def listing(self) -> Listing:
        """The data set that the rows came from."""
        return Listing(
            root=Path(self.provenance["data"]),
            classes=self.classes,
            splits={name: split.listing for name, split in self.splits.items()},
        )

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits.values())

    def rows_by_digest(self) -> dict[str, NDArray[np.float32]]:
        """Each image's features (D,) by the digest of its bytes."""
        return {
            digest: row
            for split in self.splits.values()
            for digest, row in zip(split.listing.digests, split.features, strict=True)
        }


def read_cache(path: Path | str) -> FeatureCache:
    """Read a feature cache.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CacheError(f"{path} {what}: expected a feature cache; `featcache extract DATA -o {path}` makes one")
    with _readable(path) as file:
        texts = _read_texts(file, path)
        cache = FeatureCache(
            classes=tuple(json.loads(texts["classes"])),
            extractor=json.loads(texts["extractor"]),
            splits={name: _read_split(file, name, path) for name in ("train", "val", "test") if name in file},
            provenance=json.loads(texts["provenance"]),
        )
        if cache.key != texts["extractor_key"]:
            raise CacheError(f"{path} is damaged: its extractor and its extractor_key disagree; extract again")
        _check_consistent(cache, path)
    return cache


def write_cache(path: Path, cache: FeatureCache) -> None:
    """Write a cache so that `path` holds all of it or what was there before.

    The file is built in memory and written by plain Python: h5py writing to a full disk crashes the whole process.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    buffer = io.BytesIO()
    with h5py.File("memory", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["featcache_schema"] = SCHEMA
        texts = {
            "classes": json.dumps(cache.classes),
            "extractor": json.dumps(cache.extractor),
            "extractor_key": cache.key,
            "provenance": json.dumps(cache.provenance),
        }
        for name, text in {**texts, "attributes_sha256": _hash_texts(texts)}.items():
            # NOTE: of fixed length; those of variable length lie in a heap without checksums, where one flipped bit
            # made HDF5 loop for ever
            file.attrs.create(name, text.encode("ascii"), dtype=h5py.string_dtype("ascii", len(text)))
        for name, split in cache.splits.items():
            _write_split(file.create_group(name), split)
        file.flush()
        buffer.write(file.id.get_file_image())
    write_atomically(path, buffer.getvalue())


def key_parts(extractor: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an extractor's description that decides the features, and nothing else.

    Where the weights lay and what the file was called is left out: the same tensors are the same weights.
    """
    weights = extractor.get("weights")
    return {
        **extractor,
        "weights": weights.get("tensors_sha256") if isinstance(weights, Mapping) else weights,
    }


def hash_extractor(extractor: Mapping[str, Any]) -> str:
    """The extractor's key: SHA-256 over what decides the features, and the schema."""
    return hash_bytes(canonical_json({"schema": SCHEMA, **key_parts(extractor)}).encode())


def decide_extraction(path: Path, extractor: Mapping[str, Any], *, force: bool) -> tuple[str, FeatureCache | None]:
    """What to do about an output that may be there already: a decision, no deed.

    Parameters
    ----------
    path
        The output.
    extractor
        Description of the wanted extractor.
    force
        Whether a cache of another extractor may be replaced.

    Returns
    -------
    decision
        "create" (nothing there), "reuse" (its rows are of this extractor) or "replace" (they are not, and `force`).
    cache
        What is there, when it can be reused.

    Raises
    ------
    StaleCacheError
        If it was made by another extractor, listing exactly what differs.
    CacheError
        If the file is not a cache at all: it is never overwritten.
    """
    if not path.exists():
        return "create", None
    cache = read_cache(path)
    if cache.key == hash_extractor(extractor):
        return "reuse", cache
    if force:
        return "replace", None
    differences = "; ".join(list_differences(key_parts(cache.extractor), key_parts(extractor))) or "the key"
    raise StaleCacheError(
        f"{path} was made by another extractor ({differences}); write elsewhere with -o OTHER.h5, or replace it with "
        f"--force"
    )


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each value that differs between two descriptions, as "name: old -> new".

    >>> list_differences({"a": 1, "p": {"crop": 224}}, {"a": 1, "p": {"crop": 299}})
    ['p.crop: 224 -> 299']
    """
    differences = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += list_differences(before, after, f"{prefix}{name}.")
        elif before != after:
            differences.append(f"{prefix}{name}: {_shorten(before)} -> {_shorten(after)}")
    return differences


def partial_path(path: Path) -> Path:
    """Where the rows of an extraction that could not finish are kept, for the next one to reuse."""
    return path.with_name(path.name + ".partial")


def read_unfinished(output: Path, key: str) -> FeatureCache | None:
    """What an earlier extraction into `output` kept when it could not finish, if its extractor has this key."""
    path = partial_path(output)
    if not path.is_file():
        return None
    try:
        cache = read_cache(path)
    except CacheError:  # of another version, or damaged: its rows are computed again
        return None
    return cache if cache.key == key else None


def _write_split(group: h5py.Group, split: FeatureSplit) -> None:
    paths = np.array([os.fsencode(path) for path in split.listing.paths], dtype=np.bytes_)
    columns: dict[str, NDArray[Any]] = {
        "features": split.features.astype(np.float32),
        "labels": split.listing.labels.astype(np.int64),
        "paths": paths if len(paths) else np.empty(0, "S1"),
        "digests": np.array([digest.encode() for digest in split.listing.digests], dtype="S64"),
    }
    for name, column in columns.items():
        chunks = (min(CHUNK_ROWS, len(column)), *column.shape[1:]) if len(column) else None
        group.create_dataset(name, data=column, chunks=chunks, fletcher32=chunks is not None)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError) as error:
        raise CacheError(
            f"{path} cannot be read as a feature cache ({str(error).splitlines()[0]}); remove it and run "
            f"`featcache extract DATA -o {path}` again"
        ) from error


def _read_texts(file: h5py.File, path: Path) -> dict[str, str]:
    """The attributes, if they are those of a cache of this schema and what was written."""
    names = ("classes", "extractor", "extractor_key", "provenance")
    if "featcache_schema" not in file.attrs:
        raise CacheError(f"{path} is an HDF5 file but not a feature cache; `featcache extract DATA` makes one")
    if (found := file.attrs["featcache_schema"]) != SCHEMA:
        raise CacheError(f"{path} has cache schema {found}, this featcache reads {SCHEMA}; extract again")
    if missing := [name for name in (*names, "attributes_sha256") if name not in file.attrs]:
        raise CacheError(f"{path} is not a whole feature cache: it lacks {', '.join(missing)}; extract again")
    texts = {name: _decode(file.attrs[name]) for name in names}
    if _decode(file.attrs["attributes_sha256"]) != _hash_texts(texts):
        raise CacheError(f"{path} is damaged: its attributes are not those that were written; extract again")
    return texts


def _decode(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _hash_texts(texts: Mapping[str, str]) -> str:
    return hash_bytes(canonical_json(dict(texts)).encode())


def _read_split(file: h5py.File, name: str, path: Path) -> FeatureSplit:
    columns = {column: _read_dataset(file, f"{name}/{column}", path) for column in COLUMNS}
    listing = Split(
        paths=tuple(os.fsdecode(bytes(value)) for value in columns["paths"]),
        labels=columns["labels"].astype(np.int64),
        digests=tuple(bytes(value).decode("ascii") for value in columns["digests"]),
    )
    return FeatureSplit(listing=listing, features=columns["features"].astype(np.float32, copy=False))


def _read_dataset(file: h5py.File, name: str, path: Path) -> NDArray[Any]:
    """A column, if it really lies in this file: a stranger's file may point to others."""
    group: Any = file
    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise CacheError(f"{path} is not a whole feature cache: {name} is missing or a link; extract again")
        group = group[part]
    if not isinstance(group, h5py.Dataset) or group.is_virtual or group.external:
        raise CacheError(f"{path} is not a feature cache: {name} is not stored in it; extract again")
    expected = 2 if name.endswith("features") else 1
    if group.ndim != expected or group.dtype.kind not in {"features": "f", "labels": "iu"}.get(
        name.rpartition("/")[2], "S"
    ):
        raise CacheError(f"{path} is not a feature cache: {name} is {group.dtype} {group.shape}; extract again")
    if group.id.get_storage_size() < group.nbytes:  # nothing is compressed: it claims more than it holds
        raise CacheError(f"{path} is damaged: {name} {group.shape} is not all there; extract again")
    values: NDArray[Any] = group[:]
    return values


def _check_consistent(cache: FeatureCache, path: Path) -> None:
    if not all(isinstance(name, str) for name in cache.classes) or len(set(cache.classes)) < len(cache.classes):
        raise CacheError(f"{path} is damaged: its classes are not different names; extract again")
    if not {"train", "val"} <= set(cache.splits):
        raise CacheError(f"{path} is not a whole feature cache: expected train and val; extract again")
    for name, split in cache.splits.items():
        lengths = {len(split.features), len(split.listing.labels), len(split.listing.paths)}
        if lengths != {len(split.listing.digests)} or split.features.shape[1] != cache.extractor["dim"]:
            raise CacheError(f"{path} is damaged: the columns of {name} differ in length; extract again")
        if not np.isfinite(split.features).all():
            raise CacheError(f"{path} is damaged: {name}/features holds NaN or infinity; extract again")
        labels = split.listing.labels
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(cache.classes)):
            raise CacheError(f"{path} is damaged: {name}/labels are not indices into its classes; extract again")


def _shorten(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if isinstance(value, str) and len(text) == 64 else text
