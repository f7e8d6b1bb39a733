"""FeatureCache -> file, streamed, without ever holding all rows; made whole under another name, checked, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.cache.contents import (
    SCHEMA,
    STORED_TYPES,
    FeatureCache,
    FeatureSplit,
    Rows,
    count_block,
    hash_content,
)
from featcache.cache.reading import VIEWS, hash_blocks, hash_texts, verify_cache
from featcache.dataset import STATS, Split
from featcache.dataset.texts import BLOCK_TEXTS, iterate_blocks, measure_width
from featcache.errors import CacheError, OutputError
from featcache.files import NewFile, canonical_json, hash_bytes, hold_interrupts
from featcache.storage import Place, RemotePath, assembly_path, replace_whole

# Of the features that are gathered at a time. Rows in another order than their sources' are looked for once per such
# piece, so that it should be large; it is what an assembly needs of memory.
PIECE_BYTES = 32 << 20
# Aligned, so that a column can be mapped as an array of its type.
HDF5 = {"libver": ("v110", "v110"), "alignment_threshold": 512, "alignment_interval": 64}


def write_cache(path: Place, cache: FeatureCache) -> FeatureCache:
    """Write a cache so that `path` holds all of it or what was there before.

    The features are taken slice by slice and stored in one piece per split, in the extractor's stored precision. The
    whole file is read back and compared with its digests before it takes its name.

    Raises
    ------
    OutputError
        If it cannot be written.
    CacheError
        If a feature is not a finite number in the stored precision.

    Returns
    -------
    The same cache with its `content_sha256`; the features are the given ones.
    """
    size = estimate_bytes(cache)
    check_space(path, size)
    with replace_whole(path, size) as new:
        with _hdf5_into(new) as (file, sink):
            columns_sha256 = {}
            for name, split in cache.splits.items():
                for column, digest in _write_split(file, sink, name, split, STORED_TYPES[cache.stored]).items():
                    columns_sha256[f"{name}/{column}"] = digest
            views = canonical_json(cache.views.to_json()) if cache.views else ""
            if views:
                columns_sha256[VIEWS] = hash_bytes(views.encode())
            content = hash_content(cache.classes, cache.key, columns_sha256)
            with hold_interrupts():
                _write_texts(file, cache, columns_sha256, content, views)
        if damage := verify_cache(new.path).problems:
            raise CacheError(f"{path} was not written as it should be ({damage[0]}): the disk or the memory is faulty")
    return replace(cache, content_sha256=content)


def estimate_bytes(cache: FeatureCache) -> int:
    """About how large the file will be."""
    width = np.dtype(STORED_TYPES[cache.stored]).itemsize
    total = 0
    for name, split in cache.splits.items():
        longest = max(measure_width(split.listing.paths), 1)
        features = (1 + cache.views.count(name)) * int(split.features.shape[1])
        total += len(split) * (features * width + 8 + longest + 64 + 32)
    texts = json.dumps([cache.classes, cache.extractor, cache.provenance])
    return total + len(texts) + 6000


def check_space(path: Place, size: int) -> None:
    """Raise an OutputError if the disk has not `size` bytes left, before anything is written."""
    with contextlib.suppress(OSError):  # a file system that does not say
        folder = assembly_path(path)
        free = shutil.disk_usage(folder).free
        if free < size:
            where = f"the disk of {folder}, where it is made," if isinstance(path, RemotePath) else "the disk"
            raise OutputError(
                f"cannot write {path}: it needs {size:,} bytes and {where} has {free:,} left; free some, the same "
                f"command goes on from there"
            )


def _write_split(file: h5py.File, sink: _Sink, name: str, split: FeatureSplit, dtype: str) -> dict[str, str]:
    """Write a split's columns; give the digest of each."""
    columns, digests = {}, {}
    for column, rows in {"features": split.features, VIEWS: split.views}.items():
        if rows is not None:
            blocks = _write_features(file, sink, f"{name}/{column}", rows, dtype)
            texts = np.array([block.encode() for block in blocks], "S64")
            columns[f"{column}_sha256"] = Column(texts.shape, "S64", [texts])
            digests[column] = hash_bytes("".join(blocks).encode())
    for column, values in {**columns, **_list_columns(split.listing)}.items():
        digests[column] = _write_column(file, sink, f"{name}/{column}", values)
    return digests


def _write_features(file: h5py.File, sink: _Sink, name: str, rows: Rows, dtype: str) -> list[str]:
    """Write features (N, D), or views (N, K, D), piece by piece; give the digest of every block."""
    with hold_interrupts():
        dataset = file.create_dataset(name, rows.shape, dtype)
    block = count_block(rows.shape)
    step = block * max(1, PIECE_BYTES // (block * math.prod(rows.shape[1:]) * dataset.dtype.itemsize or 1))
    blocks = []
    for start in range(0, len(dataset), step):
        with np.errstate(over="ignore"):  # told of below
            piece = np.ascontiguousarray(rows[start : start + step], dtype=dtype)
        if not np.isfinite(piece).all():
            raise CacheError(
                f"{name} holds numbers that {dataset.dtype} cannot (NaN, infinity or too large); nothing was written. "
                f"With --store float32 more can be stored"
            )
        with hold_interrupts():
            dataset[start : start + len(piece)] = piece
        sink.check()
        blocks += hash_blocks(piece)
        del piece  # before the next one is made
    return blocks


class Column(NamedTuple):
    """A small column: shape, type, and its values in pieces."""

    shape: tuple[int, ...]
    dtype: str
    pieces: Iterable[NDArray[Any]]


def _list_columns(listing: Split) -> dict[str, Column]:
    n, longest = len(listing), max(measure_width(listing.paths), 1)
    return {
        "labels": Column((n,), "<i8", _cut(listing.labels)),
        "paths": Column((n,), f"S{longest}", (block for _, block in iterate_blocks(listing.paths))),
        "digests": Column((n,), "S64", (block for _, block in iterate_blocks(listing.digests))),
        "stats": Column((n, len(STATS)), "<i8", _cut(listing.stats)),
    }


def _cut(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (values[start : start + BLOCK_TEXTS] for start in range(0, len(values), BLOCK_TEXTS))


def _write_column(file: h5py.File, sink: _Sink, name: str, column: Column) -> str:
    """Write a column piece by piece; give its digest."""
    with hold_interrupts():
        dataset = file.create_dataset(name, column.shape, column.dtype)
    start, digest = 0, hashlib.sha256()
    for piece in column.pieces:
        values = np.ascontiguousarray(piece, column.dtype)
        with hold_interrupts():
            dataset[start : start + len(values)] = values
        sink.check()
        digest.update(values.data)
        start += len(values)
    return digest.hexdigest()


def _write_texts(
    file: h5py.File, cache: FeatureCache, columns_sha256: dict[str, str], content: str, views: str
) -> None:
    texts = {
        "classes": json.dumps(cache.classes),
        "extractor": json.dumps(cache.extractor),
        "extractor_key": cache.key,
        "provenance": json.dumps(cache.provenance),
        "columns_sha256": json.dumps(columns_sha256),
        "content_sha256": content,
    }
    file.attrs["featcache_schema"] = SCHEMA
    more = {VIEWS: views} if views else {}  # its digest is among columns_sha256: who knows no views need not read it
    for name, text in {**texts, "attributes_sha256": hash_texts(texts), **more}.items():
        # NOTE: of fixed length; those of variable length lie in a heap without checksums, where one flipped bit
        # made HDF5 loop for ever
        file.attrs.create(name, text.encode("ascii"), dtype=h5py.string_dtype("ascii", len(text)))


@contextlib.contextmanager
def _hdf5_into(new: NewFile) -> Iterator[tuple[h5py.File, _Sink]]:
    """An HDF5 file whose bytes go into `new`. An error of the disk is raised when the block ends, or by the sink."""
    sink = _Sink(new)
    with hold_interrupts():
        file = h5py.File(sink, "w", **HDF5)
    try:
        yield file, sink
    finally:
        with hold_interrupts():
            file.close()
    sink.check()


class _Sink(io.RawIOBase):
    """The file that h5py writes to. It never fails: what went wrong is kept, and raised outside HDF5.

    HDF5 that cannot write crashes the process when it closes the file (h5py issues 914, 1120, 2160); so it is told that
    all went well, and what it wrote after the failure is held in memory in case that it reads it again.
    """

    def __init__(self, new: NewFile) -> None:
        self._new = new
        self._position = self._size = 0
        self._failure: BaseException | None = None
        self._lost: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._failure is None:
                self._new.write(view, self._position)
        except BaseException as error:  # noqa: BLE001 - an exception must not pass through HDF5
            self._failure = error
        if self._failure is not None:
            self._lost.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = self._new.read(len(view), self._position)
        view[: len(found)] = found
        for offset, data in self._lost:
            start, stop = max(offset, self._position), min(offset + len(data), self._position + len(view))
            if start < stop:
                view[start - self._position : stop - self._position] = data[start - offset : stop - offset]
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            if self._failure is None:
                self._new.truncate(size)
        except BaseException as error:  # noqa: BLE001 - as above
            self._failure = error
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing is held back."""
