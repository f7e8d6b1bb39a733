"""File -> FeatureCache, as careful with a stranger's file as with a damaged one.

Before a column is read, its links, type, shape, storage and size are looked at: nothing outside the file is followed,
nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.cache.contents import (
    BLOCK_ROWS,
    SCHEMA,
    STORED_TYPES,
    FeatureCache,
    FeatureSplit,
    count_block,
    hash_content,
    stored_precision,
)
from featcache.cache.key import hash_extractor
from featcache.cache.streaming import StreamedFeatures
from featcache.config import ExtractConfig, ImportConfig, is_imported
from featcache.dataset import SPLITS, STATS, Split, Stats
from featcache.dataset.texts import MANY_TEXTS, OpenFile, StoredTexts
from featcache.errors import CacheError, StoreError
from featcache.files import canonical_json, hash_bytes
from featcache.storage import Place, bring_here, locate
from featcache.views import NO_VIEWS, Views

TEXTS = ("classes", "extractor", "extractor_key", "provenance", "columns_sha256", "content_sha256")
COLUMNS = ("features", "features_sha256", "labels", "paths", "digests", "stats")
SMALL_COLUMNS = COLUMNS[1:]
VIEWS = "views"  # of features (N, K, D), and the attribute that says which these are; only where there are some
CURE = "extract again with --force, or elsewhere with -o"
READ_ROWS = 4 * BLOCK_ROWS  # at a time: one block for each of a few cores
COLUMN_BYTES = 1 << 20  # of a small column, about, that are checked at a time
MAX_DEPTH = 20  # of JSON
MAX_TEXT = 1 << 28  # bytes of one attribute; the longest honest one lists the bad files of a large data set


def open_cache(path: Place | str) -> FeatureCache:
    """Open a feature cache: everything but the features is read and checked, the features are mapped.

    The mapped features are read from the disk when they are used, and are not checked against their digests; see
    `verify_cache`. Of many rows, paths, digests and stats stay on the disk too, once they are checked.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or what was read of it is damaged.
    """
    with CacheReader(path) as reader:
        return reader.cache


def read_cache(path: Place | str) -> FeatureCache:
    """Read a feature cache into memory, features as float32, every byte checked against its digest.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or it is damaged.
    """
    with CacheReader(path) as reader:
        cache = reader.cache
        splits = {}
        for name, split in cache.splits.items():
            values = {column: read_checked(reader, name, column) for column in reader.list_features(name)}
            splits[name] = FeatureSplit(listing=split.listing, **values)
        return replace(cache, splits=splits)


@contextlib.contextmanager
def stream_cache(path: Place | str) -> Iterator[FeatureCache]:
    """A feature cache whose features stay on the disk, as long as the block lasts; every byte is checked at once.

    Features and views are `StreamedFeatures`: a slice of rows is read when it is wanted, and nothing of it is kept.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or it is damaged.
    """
    with CacheReader(path) as reader:
        splits = {}
        for name, split in reader.cache.splits.items():
            for column in reader.list_features(name):
                check_features(reader, name, column)
            values = {column: reader.stream_features(name, column) for column in reader.list_features(name)}
            splits[name] = FeatureSplit(listing=split.listing, **values)
        yield replace(reader.cache, splits=splits)


def check_features(reader: CacheReader, split: str, column: str) -> None:
    """Raise a CacheError if features, or views, of a split are not those that were written."""
    for start, rows in reader.iterate_features(split, column):
        if damaged := reader.find_damage(split, rows, start, column):
            raise CacheError(_say_damage(reader.path, f"{split}/{column}", damaged[0], reader.provenance))


def read_checked(
    reader: CacheReader, split: str, column: str, into: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The features, or views, of a split as float32, if they are those that were written; perhaps into an array."""
    values = np.empty(reader.shape_of(split, column), np.float32) if into is None else into
    for start, rows in reader.iterate_features(split, column):
        if damaged := reader.find_damage(split, rows, start, column):
            raise CacheError(_say_damage(reader.path, f"{split}/{column}", damaged[0], reader.provenance))
        values[start : start + len(rows)] = rows
    return values


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a check of every byte that matters found.

    Attributes
    ----------
    path
        The file.
    rows
        Rows in it.
    bytes
        Its size.
    damaged
        (split, first row, row after the last) of features that are not those that were written, or no finite numbers.
    cure
        The command that computes them again.
    damaged_views
        The same of the features of views: rows whose views cannot all be used.
    """

    path: Place
    rows: int
    bytes: int
    cure: str
    damaged: tuple[tuple[str, int, int], ...]
    damaged_views: tuple[tuple[str, int, int], ...] = ()

    def __bool__(self) -> bool:
        return not self.damaged and not self.damaged_views

    @property
    def problems(self) -> list[str]:
        """What is damaged, in words."""
        columns = {"features": self.damaged, VIEWS: self.damaged_views}
        return [
            f"{name}/{column} rows {start} to {stop - 1}"
            for column, damaged in columns.items()
            for name, start, stop in damaged
        ]


def verify_cache(path: Place | str) -> Verification:
    """Recompute every digest of a cache, block by block, in little memory; one in a store is downloaded for it.

    Raises
    ------
    CacheError
        If it is not a feature cache, or anything but features is damaged.
    """
    with CacheReader(path, fresh=True) as reader:
        reader.check_columns()
        damaged: dict[str, list[tuple[str, int, int]]] = {"features": [], VIEWS: []}
        for name in reader.lengths:
            for column in reader.list_features(name):
                for start, rows in reader.iterate_features(name, column):
                    damaged[column] += [(name, *block) for block in reader.find_damage(name, rows, start, column)]
        return Verification(
            path=reader.path,
            rows=sum(reader.lengths.values()),
            bytes=reader.bytes,
            cure=format_cure(reader.path, reader.provenance),
            damaged=tuple(damaged["features"]),
            damaged_views=tuple(damaged[VIEWS]),
        )


def is_feature_cache(path: Place) -> bool:
    """Whether a file is HDF5 and says that it is a feature cache, however damaged."""
    try:
        here = bring_here(path)
        if not here.is_file():  # to open a pipe is to wait for who writes into it
            return False
        with here.open("rb") as stream, h5py.File(stream, "r") as file:
            return "featcache_schema" in file.attrs
    except (OSError, RuntimeError, KeyError, ValueError):
        return False


def read_summary(path: Place) -> str:
    """A feature cache in half a line: backbone, rows, width.

    Raises
    ------
    CacheError
        If it is not one.
    """
    with open_hdf5(path) as (file, _), explain_errors(path):
        extractor = load_json(_read_texts(file, path)["extractor"], dict, "extractor", path)
        columns = [find_column(file, f"{name}/features", path) for name in SPLITS if name in file]
        rows = sum(len(column) for column in columns)
        views = ", with views" if VIEWS in file.attrs else ""
        return f"{extractor['backbone']}: {rows:,} rows of {extractor['dim']} {stored_precision(extractor)}{views}"


class CacheReader:
    """A feature cache that is open: its `cache` as `open_cache` gives it, its features slice by slice.

    It stays the same file even if another one takes its name meanwhile.

    Parameters
    ----------
    path
        A file, or a URL of an object in a store, of which a copy on this machine is read, see `storage`.
    fresh
        Do not trust a copy that is there.

    Attributes
    ----------
    path
        The file.
    lengths
        Rows in each split.
    provenance
        Where the cache came from.
    views
        How many random views of each image there are, and which.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or what was read of it is damaged.
    """

    def __init__(self, path: Place | str, *, fresh: bool = False) -> None:
        self.path = locate(path)
        self._extractor: dict[str, Any]
        # NOTE: HDF5 only says where the columns are: with many files open, each that it closes takes it long.
        with open_hdf5(self.path, fresh=fresh) as (file, self._opened), explain_errors(self.path):
            self._texts = _read_texts(file, self.path)
            self._extractor = self._load_json("extractor", dict)
            self._columns_sha256 = self._load_json("columns_sha256", dict)
            self._check_texts()
            self.views = self._read_views(file)
            self._columns = {name: self._find_columns(file, name) for name in self._find_splits(file)}
        self.lengths = {name: len(columns["features"]) for name, columns in self._columns.items()}
        with explain_errors(self.path):
            self._blocks = {
                (name, column): self._read_blocks(name, column)
                for name in self._columns
                for column in self.list_features(name)
            }

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._columns.clear()
        del self._opened  # which closes it, unless a column that was given out needs it still

    @functools.cached_property
    def cache(self) -> FeatureCache:
        """Everything but the features, which are mapped.

        Raises
        ------
        CacheError
            If a column is not what was written.
        """
        return self._make_cache(self._map_column)

    @functools.cached_property
    def streamed(self) -> FeatureCache:
        """Everything but the features, which are read when they are wanted, and so are the stats of many rows.

        All of its columns that are not in memory share one open file.

        Raises
        ------
        CacheError
            If a column is not what was written.
        """
        return self._make_cache(self.stream_features)

    def _make_cache(self, fetch: Callable[[str, str], Any]) -> FeatureCache:
        with explain_errors(self.path):
            return FeatureCache(
                classes=self.classes,
                extractor=self._extractor,
                splits={name: self._read_split(name, fetch) for name in self.lengths},
                provenance=self.provenance,
                content_sha256=self._texts["content_sha256"],
                views=self.views,
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return tuple(self._load_json("classes", list))

    @property
    def extractor(self) -> dict[str, Any]:
        """Backbone, weights, layer, preprocessing and precision."""
        return self._extractor

    @property
    def key(self) -> str:
        """The extractor's key."""
        return self._texts["extractor_key"]

    @property
    def content_sha256(self) -> str:
        """Digest of everything but provenance and stats, as the file states it."""
        return self._texts["content_sha256"]

    def check_columns(self) -> None:
        """Raise a CacheError if any column but the features is not what was written, or makes no sense."""
        with explain_errors(self.path):
            for name in self.lengths:
                for column in SMALL_COLUMNS:
                    self._check_column(name, column)

    @property
    def bytes(self) -> int:
        """Its size."""
        return os.fstat(self._opened.fileno()).st_size

    def list_features(self, split: str) -> list[str]:
        """The columns of features of a split: "features", and "views" where it has some."""
        return ["features", *([VIEWS] if self.views.count(split) else [])]

    def shape_of(self, split: str, column: str = "features") -> tuple[int, ...]:
        """(N, D) of features, (N, K, D) of views."""
        return self._columns[split][column].shape

    def read_features(
        self, split: str, start: int, stop: int, column: str = "features", *, into: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Rows of a split (stop - start, D) in the stored precision, unchecked; perhaps into a contiguous array.

        Of the column "views" (stop - start, K, D).
        """
        with explain_errors(self.path):
            there = self._columns[split][column]
            n = max(min(stop, len(there)) - start, 0)
            rows: NDArray[Any] = np.empty((n, *there.shape[1:]), there.dtype) if into is None else into[:n]
            if n:
                there.read_into(start, rows)
            return rows

    def iterate_features(self, split: str, column: str = "features") -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows of a split in pieces (n, D), each with its first row's number; one array is used for all pieces.

        Of the column "views" (n, K, D).
        """
        n, there = self.lengths[split], self._columns[split][column]
        step = READ_ROWS // BLOCK_ROWS * count_block(there.shape)
        piece = np.empty((min(n, step), *there.shape[1:]), there.dtype)  # new memory would cost more than reading
        for start in range(0, n, step):
            yield start, self.read_features(split, start, start + step, column, into=piece)

    def stream_features(self, split: str, column: str = "features") -> StreamedFeatures:
        """Features, or views, of a split that are read when they are wanted, of the file that they keep open."""
        return self._columns[split][column]

    def find_damage(
        self, split: str, features: NDArray[Any], start: int = 0, column: str = "features"
    ) -> list[tuple[int, int]]:
        """Which blocks of rows are not those that were written, or no numbers, as (first row, row after the last).

        Parameters
        ----------
        split
            Name of the split.
        features
            (n, D), or (n, K, D) of views, read from it.
        start
            The first of these rows, a multiple of a block's.
        column
            "features" or "views".
        """
        block = count_block(features.shape)
        first = start // block
        expected = self._blocks[split, column][first : first + -(-len(features) // block)]
        return [
            (start + i * block, min(start + (i + 1) * block, start + len(features)))
            for i, (found, wanted) in enumerate(zip(hash_blocks(features), expected, strict=True))
            if found != wanted or not np.isfinite(features[i * block : (i + 1) * block]).all()
        ]

    def _check_texts(self) -> None:
        classes = self._load_json("classes", list)
        if not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
            raise CacheError(f"{self.path} is damaged: its classes are not different names; {CURE}")
        self.provenance = self._load_json("provenance", dict)
        data, settings = self.provenance.get("data"), self.provenance.get("settings", {})
        os.fsencode("".join(classes))  # what is no name in any file system is none here
        if not isinstance(data, str) or b"\0" in os.fsencode(data) or not isinstance(settings, dict):
            raise CacheError(f"{self.path} is damaged: its provenance does not name the data; {CURE}")
        key = hash_extractor(self._extractor)
        if key != self._texts["extractor_key"]:
            raise CacheError(f"{self.path} is damaged: its extractor and its extractor_key disagree; {CURE}")
        if hash_content(tuple(classes), key, self._columns_sha256) != self._texts["content_sha256"]:
            raise CacheError(f"{self.path} is damaged: its content_sha256 is not that of its columns; {CURE}")
        self._n_classes = len(classes)

    def _read_views(self, file: h5py.File) -> Views:
        """Which views there are, by an attribute whose digest is among those of the columns."""
        expected = self._columns_sha256.get(VIEWS)
        if expected is None and VIEWS not in file.attrs:
            return NO_VIEWS
        text = str(_read_plain(file, VIEWS, self.path)) if VIEWS in file.attrs else ""
        if hash_bytes(text.encode()) != expected:
            raise CacheError(f"{self.path} is damaged: its attribute views is not what was written; {CURE}")
        return Views.from_json(load_json(text, dict, VIEWS, self.path))

    def _load_json(self, name: str, kind: type[Any]) -> Any:
        return load_json(self._texts[name], kind, name, self.path)

    def _find_splits(self, file: h5py.File) -> list[str]:
        names = [name for name in SPLITS if name in file]
        if not {"train", "val"} <= set(names):
            raise CacheError(f"{self.path} is not a whole feature cache: expected train and val; {CURE}")
        return names

    def _find_columns(self, file: h5py.File, name: str) -> dict[str, StreamedFeatures]:
        more = (VIEWS, f"{VIEWS}_sha256") if self.views.count(name) else ()
        columns = {column: find_column(file, f"{name}/{column}", self.path) for column in (*COLUMNS, *more)}
        features, stored = columns["features"], stored_precision(self._extractor)
        if (features.shape[1], features.dtype.str) != (self._extractor["dim"], STORED_TYPES.get(stored)):
            raise CacheError(
                f"{self.path} is damaged: {name}/features is {features.dtype} {features.shape}, expected {stored} of "
                f"width {self._extractor['dim']}; {CURE}"
            )
        n = len(features)
        lengths = {len(columns[column]) for column in ("labels", "paths", "digests", "stats")}
        if lengths != {n} or len(columns["features_sha256"]) != -(-n // BLOCK_ROWS):
            raise CacheError(f"{self.path} is damaged: the columns of {name} differ in length; {CURE}")
        if columns["stats"].shape[1] != len(STATS):
            raise CacheError(f"{self.path} is damaged: {name}/stats is {columns['stats'].shape}; {CURE}")
        if more:
            self._check_views(name, columns)
        return {column: self._stream_column(there) for column, there in columns.items()}

    def _stream_column(self, there: h5py.Dataset) -> StreamedFeatures:
        """A column without HDF5: the file, and where in it the column lies."""
        offset = there.id.get_offset() or 0  # None if there are no rows
        if offset + there.nbytes > self.bytes:
            raise CacheError(f"{self.path} is damaged: {there.name} {there.shape} is not all there; {CURE}")
        return StreamedFeatures(self._opened, offset, tuple(there.shape), there.dtype, self.path)

    def _check_views(self, name: str, columns: Mapping[str, h5py.Dataset]) -> None:
        """Raise a CacheError if the views of a split are not as many, of such features, as the file states."""
        features, views = columns["features"], columns[VIEWS]
        expected = (len(features), self.views.count(name), features.shape[1])
        if (views.shape, views.dtype) != (expected, features.dtype):
            raise CacheError(
                f"{self.path} is damaged: {name}/views is {views.dtype} {views.shape}, expected {features.dtype} "
                f"{expected}; {CURE}"
            )
        if len(columns[f"{VIEWS}_sha256"]) != -(-len(views) // count_block(views.shape)):
            raise CacheError(f"{self.path} is damaged: {name}/views_sha256 is not of the length of its views; {CURE}")

    def _read_blocks(self, name: str, column: str) -> list[str]:
        """The digests of the blocks of features, or of views."""
        blocks = [text.decode("ascii") for text in self._read_column(name, f"{column}_sha256").tolist()]
        if hash_bytes("".join(blocks).encode()) != self._columns_sha256.get(f"{name}/{column}"):
            raise CacheError(f"{self.path} is damaged: {name}/{column}_sha256 is not what was written; {CURE}")
        return blocks

    def _read_split(self, name: str, fetch: Callable[[str, str], Any]) -> FeatureSplit:
        """A split whose features, and stats if they are many, are what is fetched."""
        listing = Split(
            paths=self._read_texts(name, "paths"),
            labels=self._read_column(name, "labels").astype(np.int64, copy=False),
            digests=self._read_texts(name, "digests"),
            stats=self._read_stats(name, fetch),
        )
        return FeatureSplit(listing=listing, **{column: fetch(name, column) for column in self.list_features(name)})

    def _map_column(self, name: str, column: str) -> NDArray[Any]:
        """A column as an array that is read from the file when it is used."""
        there = self._columns[name][column]
        if not len(there):
            return np.empty(there.shape, there.dtype)
        with FileIO(self._opened.fileno(), closefd=False) as stream:
            mapped: NDArray[Any] = np.memmap(
                stream, dtype=there.dtype, mode="r", offset=there.offset, shape=there.shape
            )
        return mapped

    def _read_texts(self, name: str, column: str) -> Sequence[str]:
        """Paths or digests; many of them are checked, and read again when they are wanted."""
        if self.lengths[name] < MANY_TEXTS:
            return tuple(os.fsdecode(value) for value in self._read_column(name, column).tolist())
        self._check_column(name, column)
        return self._store_texts(name, column)

    def _read_stats(self, name: str, fetch: Callable[[str, str], Any]) -> Stats:
        """What the file system said of each file; of many it is checked, and fetched."""
        if self.lengths[name] < MANY_TEXTS:
            return self._read_column(name, "stats").astype(np.int64, copy=False)
        self._check_column(name, "stats")
        stats: Stats = fetch(name, "stats")
        return stats

    def _store_texts(self, name: str, column: str) -> StoredTexts:
        there = self._columns[name][column]
        return StoredTexts(self._opened, there.offset, len(there), there.dtype.itemsize)

    def _read_column(self, name: str, column: str) -> NDArray[Any]:
        """A small column, if it is what was written and makes sense."""
        there = self._columns[name][column]
        values: NDArray[Any] = np.empty(there.shape, there.dtype)
        for start, block in self._iterate_column(name, column):
            values[start : start + len(block)] = block
        return values

    def _check_column(self, name: str, column: str) -> None:
        """Raise a CacheError if a column is not what was written, or makes no sense."""
        for _ in self._iterate_column(name, column):
            pass

    def _iterate_column(self, name: str, column: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """A column in pieces, each with its first row's number; at its end it is right, or an error raised."""
        there = self._columns[name][column]
        digest, step, problem = hashlib.sha256(), max(COLUMN_BYTES // there.row_bytes, 1), ""
        for start in range(0, len(there), step):
            block = there[start : start + step]
            digest.update(block.data)
            problem = problem or self._find_nonsense(name, column, block)
            yield start, block
        if digest.hexdigest() != self._columns_sha256.get(f"{name}/{column}"):
            raise CacheError(f"{self.path} is damaged: {name}/{column} is not what was written; {CURE}")
        if problem:
            raise CacheError(f"{self.path} {problem}")

    def _find_nonsense(self, name: str, column: str, values: NDArray[Any]) -> str:
        """What makes no sense in a piece of a column, in words; "" if all does."""
        if column == "labels" and not (values.min() >= 0 and values.max() < self._n_classes):
            return f"is damaged: {name}/labels are not indices into its classes; {CURE}"
        if column == "paths" and (bad := _find_stray_path(values)) is not None:
            return f"is not a feature cache: {name}/paths leads out of the data: {bad!r}"
        if column == "digests" and not values.tobytes().isascii():
            return f"is not a feature cache: {name}/digests are no digests; {CURE}"
        return ""


def _find_stray_path(paths: NDArray[np.bytes_]) -> bytes | None:
    """The first path that is not below the folder that it is relative to."""
    suspicious = np.char.startswith(paths, b"/") | (np.char.find(paths, b"..") >= 0)
    for path in paths[suspicious].tolist():
        if path.startswith(b"/") or b".." in path.split(b"/"):
            return bytes(path)
    return None


def hash_blocks(features: NDArray[Any]) -> list[str]:
    """SHA-256 of every block of features (N, D), or of views (N, K, D), in hexadecimal; hashed on all cores."""
    block = count_block(features.shape)

    def hash_one(start: int) -> str:
        return hash_bytes(np.ascontiguousarray(features[start : start + block]).data)

    starts = range(0, len(features), block)
    if len(starts) < 2:
        return [hash_one(start) for start in starts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_one, starts))


@contextlib.contextmanager
def open_hdf5(path: Place, *, fresh: bool = False) -> Iterator[tuple[h5py.File, OpenFile]]:
    """An HDF5 file for reading, and the file itself, which may outlive it; nobody's lock keeps it from being read.

    Raises
    ------
    CacheError
        If there is none.
    """
    with explain_errors(path):
        if not path.is_file():
            if path.exists():
                raise CacheError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, not a feature cache")
            raise CacheError(
                f"{path} does not exist: expected a feature cache; `featcache extract DATA -o {path}` makes one"
            )
        here = bring_here(path, fresh=fresh)
        status = here.stat()
        if hasattr(status, "st_blocks") and status.st_size > (1 << 30) + 1000 * 512 * status.st_blocks:
            raise CacheError(f"{path} claims {status.st_size:,} bytes and holds {512 * status.st_blocks:,}; remove it")
        with here.open("rb", buffering=0) as stream:
            opened = OpenFile(stream.fileno(), str(path))
    with FileIO(opened.fileno(), closefd=False) as stream:  # NOTE: HDF5's own locks fail on some network file systems
        with explain_errors(path):
            file = h5py.File(stream, "r")
        try:
            yield file, opened
        finally:
            file.close()


@contextlib.contextmanager
def explain_errors(path: Place) -> Iterator[None]:
    """Whatever HDF5 and a strange file can raise, as one line that names the file."""
    try:
        yield
    except MemoryError as error:
        raise CacheError(f"{path} does not fit into memory ({path.stat().st_size:,} bytes)") from error
    except StoreError as error:
        raise CacheError(f"cannot read {path}: {error.strerror}; run it again when that is mended") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise CacheError(
                f"{path} cannot be opened: too many files are open, expected room for one for each cache of an index; "
                f"raise the limit (`ulimit -n 65536`) and run it again"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheError(
            f"{path} cannot be read as a feature cache ({reason}); choose another place with -o, or if it was one, "
            f"remove it and extract again"
        ) from error


def find_column(file: h5py.File, name: str, path: Place) -> h5py.Dataset:
    """A column, if it really lies in this file, as one plain piece of a size that the file can hold.

    Raises
    ------
    CacheError
        If it is missing, or a link, virtual, external, compressed, of another kind, or larger than the file.
    """
    group: Any = file
    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise CacheError(f"{path} is not a whole feature cache: {name} is missing or a link; {CURE}")
        group = group[part]
    if not isinstance(group, h5py.Dataset) or group.is_virtual or group.external:
        raise CacheError(f"{path} is not a feature cache: {name} is not stored in it; {CURE}")
    column = name.rpartition("/")[2]
    floats = ("<f4", "<f2")
    kinds = {"features": floats, VIEWS: floats, "labels": ("<i8",), "stats": ("<i8",)}.get(column)
    right_kind = group.dtype.kind == "S" if kinds is None else group.dtype.str in kinds
    if group.ndim != {"features": 2, "stats": 2, VIEWS: 3}.get(column, 1) or not right_kind:
        raise CacheError(f"{path} is not a feature cache: {name} is {group.dtype} {group.shape}; {CURE}")
    if group.chunks is not None:  # or a small file could hold gigabytes
        raise CacheError(f"{path} is not a feature cache: {name} is in chunks, not in one piece; {CURE}")
    if group.id.get_storage_size() < group.nbytes or group.nbytes > file.id.get_filesize():
        raise CacheError(f"{path} is damaged: {name} {group.shape} is not all there; {CURE}")
    if group.nbytes and group.id.get_offset() is None:
        raise CacheError(f"{path} is not a feature cache: {name} is in its own header, not in one piece; {CURE}")
    return group


def _read_texts(file: h5py.File, path: Place) -> dict[str, str]:
    """The attributes, if they are those of a cache of this schema and what was written."""
    if "featcache_schema" not in file.attrs:
        raise CacheError(f"{path} is an HDF5 file but not a feature cache; `featcache extract DATA` makes one")
    found = _read_plain(file, "featcache_schema", path)
    if found != SCHEMA:
        raise CacheError(f"{path} has cache schema {found}, this featcache reads {SCHEMA}; {CURE}")
    names = (*TEXTS, "attributes_sha256")
    if missing := [name for name in names if name not in file.attrs]:
        raise CacheError(f"{path} is not a whole feature cache: it lacks {', '.join(missing)}; {CURE}")
    texts = {name: str(_read_plain(file, name, path)) for name in names}
    if texts.pop("attributes_sha256") != hash_texts(texts):
        raise CacheError(f"{path} is damaged: its attributes are not those that were written; {CURE}")
    return texts


def _read_plain(file: h5py.File, name: str, path: Place) -> str | int:
    """An attribute that is one integer or one text of fixed length; nothing that points anywhere."""
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iuS" or attribute.dtype.itemsize > MAX_TEXT:
        raise CacheError(f"{path} is damaged: its attributes are not those that were written; {CURE}")
    value = file.attrs[name]
    return value.decode("ascii") if isinstance(value, bytes) else int(value)


def hash_texts(texts: Mapping[str, str]) -> str:
    """Digest of the attributes."""
    return hash_bytes(canonical_json(dict(texts)).encode())


def load_json(text: str, kind: type[Any], name: str, path: Place) -> Any:
    """JSON of an attribute, if it is of this kind."""
    value = json.loads(text)
    if not isinstance(value, kind):
        raise CacheError(f"{path} is not a feature cache: its {name} is no {kind.__name__}; {CURE}")
    level, depth = [value], 0
    while level := [item for group in level for item in (group.values() if isinstance(group, dict) else group)]:
        level, depth = [item for item in level if isinstance(item, dict | list)], depth + 1
        if depth > MAX_DEPTH:
            raise CacheError(f"{path} is not a feature cache: its {name} is nested too deeply; {CURE}")
    return value


def check_complete(cache: FeatureCache, path: Place | str) -> None:
    """Raise a CacheError if the descriptions in a cache lack something that every extraction or import writes."""
    extractor, origin = cache.extractor, cache.provenance
    imported = is_imported(str(extractor.get("backbone")))
    settings = {"val_fraction", "seed"} | (set() if imported else {"backbone", "weights"})
    weights, look = extractor.get("weights"), extractor.get("preprocessing")
    size = origin.get("peak_memory_bytes")
    sound = {
        "extractor.backbone": isinstance(extractor.get("backbone"), str),
        "extractor.layer": isinstance(extractor.get("layer"), str),
        "extractor.weights": isinstance(weights, dict)
        and all(isinstance(weights.get(name), str) for name in ("name", "tensors_sha256")),
        "extractor.preprocessing": (imported and look is None)
        or (
            isinstance(look, dict)
            and all(_is_size(look.get(name)) for name in ("resize", "crop"))
            and all(isinstance(look.get(name), str) for name in ("interpolation", "decoding"))
            and all(_is_colour(look.get(name)) for name in ("mean", "std"))
        ),
        "provenance.settings": settings <= set(origin.get("settings", {})),
        "provenance.table": not imported or isinstance(origin.get("table"), str),
        "provenance.seconds": _is_cost(origin.get("seconds")),
        **{  # which older caches lack
            f"provenance.{name}": origin.get(name) is None or _is_cost(origin[name])
            for name in ("cpu_seconds", "energy_joules")
        },
        "provenance.peak_memory_bytes": size is None or isinstance(size, int),
        "provenance.device": isinstance(origin.get("device"), str),
        "provenance.runtime": isinstance(origin.get("runtime"), str),
        "provenance.environment": isinstance(origin.get("environment"), dict),
        "provenance.bad": isinstance(origin.get("bad"), list)
        and all(isinstance(item, list) and len(item) == 2 for item in origin["bad"]),
    }
    if missing := [name for name, is_sound in sound.items() if not is_sound]:
        raise CacheError(f"{path} is not a whole feature cache: {', '.join(missing)} missing or strange; {CURE}")


def _is_cost(value: Any) -> bool:
    """Whether it is a number of seconds or joules."""
    return isinstance(value, float | int) and 0 <= value < 1e12


def _is_size(value: Any) -> bool:
    """Whether it is a side in pixels, or a height and a width."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(side, int) for side in sides)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (1, 3) and all(isinstance(number, float | int) for number in value)


def _say_damage(path: Place, column: str, rows: tuple[int, int], provenance: dict[str, Any]) -> str:
    return (
        f"{path} is damaged: {column} rows {rows[0]} to {rows[1] - 1} are not what was written; "
        f"`{format_cure(path, provenance)}` makes them again"
    )


def _spell(name: str, value: Any) -> list[str]:
    """An option's values as they are typed."""
    if not isinstance(value, list):
        return [str(value)]
    texts = [str(one) for one in value]
    return texts if name == "layer" else [("x" if name in ("input_size", "resize") else ",").join(texts)]


def format_command(path: Place, provenance: Mapping[str, Any]) -> str:
    """The command that made a cache, or an index of several."""
    if isinstance(caches := provenance.get("caches"), list):
        return f"featcache index {shlex.join([str(path), *map(str, caches)])}"
    settings, table = provenance.get("settings", {}), provenance.get("table")
    config = ImportConfig if isinstance(table, str) else ExtractConfig
    stated = {
        name: settings[name]
        for name in (*config.RESULT, *config.OPTIONAL)  # what else a file says is no option
        if name in settings and settings[name] != getattr(config, name)
    }
    options = [
        f"--{name.replace('_', '-')} {shlex.quote(text)}"
        for name, value in stated.items()
        for text in _spell(name, value)
    ]
    made = f"import {shlex.quote(table)}" if isinstance(table, str) else f"extract {shlex.quote(provenance['data'])}"
    return " ".join([f"featcache {made}", f"-o {shlex.quote(str(path))}", *options])


def format_cure(path: Place, provenance: Mapping[str, Any]) -> str:
    """The command that mends a damaged cache; an import checks every byte of what is there anyway."""
    command = format_command(path, provenance)
    return command if isinstance(provenance.get("table"), str) else f"{command} --rehash"
