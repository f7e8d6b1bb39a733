"""Rows of many files as one table, found by the digests of their images, fetched slice by slice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.cache.parts import Part
from featcache.cache.reading import READ_ROWS, VIEWS, CacheReader
from featcache.dataset import Digests
from featcache.dataset.texts import BLOCK_TEXTS, TextColumn, TextIndex, pack_blocks, pack_digests
from featcache.errors import CacheError
from featcache.storage import Place
from featcache.views import NO_VIEWS, Views


class Source(Protocol):
    """Some rows that lie in one place.

    Attributes
    ----------
    digests
        (n,) S64, or a column of them; "" for a row that cannot be used.
    window
        Rows that are best read together.
    """

    digests: Digests | TextColumn
    window: int

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Features (stop - start, D)."""


class SplitSource:
    """The rows of one split of an open cache, but those in damaged blocks and those that `dtype` cannot hold.

    Of the column "views" each view of each image is a row: image after image, view after view.

    Attributes
    ----------
    digests, window
        As of every `Source`.
    damaged
        (first row, row after the last) of each such block, in rows of the file.
    """

    def __init__(self, reader: CacheReader, split: str, dtype: str, column: str = "features") -> None:
        self._reader, self._split, self._column, self.window = reader, split, column, READ_ROWS
        n = self._each = reader.views.count(split) if column == VIEWS else 1
        self.damaged: list[tuple[int, int]] = []
        usable = np.ones(reader.lengths[split] * n, np.bool_)
        for start, features in reader.iterate_features(split, column):
            self.damaged += reader.find_damage(split, features, start, column)
            with np.errstate(over="ignore"):
                finite = np.isfinite(features.astype(dtype, copy=False)).all(axis=-1).reshape(-1)
            usable[start * n : start * n + len(finite)] = finite
        for start, stop in self.damaged:
            usable[start * n : stop * n] = False
        self.digests: Digests | TextColumn = pack_blocks(self._iterate_names(usable), len(usable))

    def _iterate_names(self, usable: NDArray[np.bool_]) -> Iterator[Digests]:
        """The digests of all rows in blocks, "" where they are not usable (n,)."""
        images = self._reader.cache.splits[self._split].listing.digests
        n_views, step = self._each if self._column == VIEWS else 0, BLOCK_TEXTS
        for start in range(0, len(images), step):
            names = self._reader.views.name_rows(images[start : start + step], n_views)[:, -self._each :].reshape(-1)
            yield np.where(usable[start * self._each : start * self._each + len(names)], names, np.bytes_())

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Features (stop - start, D)."""
        n = self._each
        first = start // n
        rows = self._reader.read_features(self._split, first, -(-stop // n), self._column)
        return rows.reshape(-1, rows.shape[-1])[start - first * n : stop - first * n]


class PartSource:
    """The rows of a part, which is read as a whole."""

    def __init__(self, part: Part) -> None:
        self._part, self.window = part, max(len(part), 1)
        self.digests: Digests | TextColumn = part.digests

    def __str__(self) -> str:
        return str(self._part.path)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Features (stop - start, D)."""
        return self._part.read_features()[start:stop]


class DigestTable:
    """Rows that lie in several places, by digest. Of a row that is in two, the first counts.

    Parameters
    ----------
    places
        The digests of each place, (n,) S64 or a column; "" for a row that cannot be used.
    """

    def __init__(self, places: Sequence[Digests | TextColumn]) -> None:
        self._starts = np.cumsum([0, *map(len, places)])
        self._index = TextIndex([pack_digests(place) for place in places])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The position of each of N rows in this table, -1 where there is none."""
        return self._index.find(digests)


class RowReader:
    """Rows that lie in several places, by their positions.

    Parameters
    ----------
    sources
        Where rows lie.
    dim
        D, features per row.
    dtype
        Type that they are wanted in.
    """

    def __init__(self, sources: Sequence[Source], dim: int, dtype: str) -> None:
        self._sources, self._dim, self._dtype = list(sources), dim, dtype
        self._starts = np.cumsum([0, *(len(source.digests) for source in sources)])

    def read(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Features (N, D) of the rows at N positions, in their order; each source is read once, from start to end."""
        values = np.empty((len(positions), self._dim), self._dtype)
        order = np.argsort(positions, kind="stable")
        bounds = np.searchsorted(positions[order], self._starts)
        for source, offset, first, last in zip(self._sources, self._starts[:-1], bounds[:-1], bounds[1:], strict=True):
            mine = order[first:last]
            for wanted, rows in _split_windows(mine, positions[mine] - offset, source.window):
                start = int(rows[0])
                found = source.read(start, int(rows[-1]) + 1)
                if found.shape[1] != self._dim:
                    raise CacheError(
                        f"{source} is damaged: its features are of width {found.shape[1]}, expected {self._dim}; "
                        f"remove it and run the same command again"
                    )
                with np.errstate(over="ignore"):  # the writer looks for what is not finite
                    values[wanted] = found[rows - start]
        return values


class RowTable(DigestTable):
    """Rows that lie in several places, by their digests.

    Parameters
    ----------
    sources, dim, dtype
        As of `RowReader`.

    Attributes
    ----------
    rows
        The same rows by their positions, without what finds them.
    """

    def __init__(self, sources: Sequence[Source], dim: int, dtype: str) -> None:
        super().__init__([source.digests for source in sources])
        self.rows = RowReader(sources, dim, dtype)

    def read(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Features (N, D) of the rows at N positions, in their order."""
        return self.rows.read(positions)


def _split_windows(
    wanted: NDArray[np.int64], rows: NDArray[np.int64], window: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut sorted rows (and what belongs to them) where a window of so many rows ends."""
    if len(rows):
        cuts = np.flatnonzero(np.diff(rows // window)) + 1
        yield from zip(np.split(wanted, cuts), np.split(rows, cuts), strict=True)


class GatheredRows:
    """Rows of a table in a certain order, as features (N, D) that are fetched slice by slice.

    Positions (N, K) give the views of images, (N, K, D). What finds rows in the table is not kept.
    """

    def __init__(self, table: RowTable, positions: NDArray[np.int64], dim: int) -> None:
        self._rows, self._positions = table.rows, positions
        self.shape = (*positions.shape, dim)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """(n, D) of these rows, or (n, K, D)."""
        positions = self._positions[rows]
        return self._rows.read(positions.reshape(-1)).reshape(*positions.shape, self.shape[-1])


@contextlib.contextmanager
def open_sources(
    caches: Sequence[Place], dtype: str, views: Views = NO_VIEWS
) -> Iterator[tuple[list[Source], list[tuple[Place, str, int, int]]]]:
    """The rows of finished caches, as long as the block lasts.

    Every block of features is compared with its digest first: damaged rows are as good as none, and so are those that
    are no finite numbers in the type in which they are wanted.

    Parameters
    ----------
    caches
        Their files.
    dtype
        Type in which the rows are wanted.
    views
        Those that are wanted: a cache's own are looked at if they are of the same seed and recipe.

    Returns
    -------
    sources
        One for each split of each cache, and one for its views.
    damaged
        (file, split, first row, row after the last) of what is not what was written; of views "views of" the split.

    Raises
    ------
    CacheError
        If a file is not a feature cache.
    """
    damaged = []
    sources: list[Source] = []
    with contextlib.ExitStack() as stack:
        for path in caches:
            reader = stack.enter_context(CacheReader(path))
            alike = bool(views) and reader.views.is_like(views)
            for split in reader.cache.splits:
                for column in reader.list_features(split) if alike else ["features"]:
                    source = SplitSource(reader, split, dtype, column)
                    where = f"views of {split}" if column == VIEWS else split
                    damaged += [(path, where, *rows) for rows in source.damaged]
                    sources.append(source)
        yield sources, damaged
