"""Rows and texts of several places as one column, which is never put together in memory. Knows no file."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.dataset.texts import TextArray, TextColumn, encode


class Piece(NamedTuple):
    """Rows from `start` to before `stop` of a part."""

    part: int
    start: int
    stop: int


class Cuts:
    """Where several parts begin among the rows of all.

    >>> cuts = Cuts([3, 0, 4])
    >>> list(cuts.cut(2, 5)), len(cuts)
    ([Piece(part=0, start=2, stop=3), Piece(part=2, start=0, stop=2)], 7)
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def cut(self, start: int, stop: int) -> Iterator[Piece]:
        """The rows from `start` to before `stop`, part after part."""
        begin, end = max(self.find(start)[0], 0), int(np.searchsorted(self._starts[:-1], stop))
        for part in range(begin, end):
            first, last = self._starts[part : part + 2].tolist()
            if max(first, start) < min(last, stop):
                yield Piece(part, max(first, start) - first, min(last, stop) - first)

    def find(self, row: int) -> tuple[int, int]:
        """The part that a row is in, and its number there."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - int(self._starts[part])

    def share(self, rows: NDArray[np.integer]) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.integer]]]:
        """Rows (n,) in any order by part: the part, which of the n are in it (k,), and their numbers there (k,)."""
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts).tolist():
            mine = np.flatnonzero(parts == part)
            yield part, mine, rows[mine] - self._starts[part]


class JoinedRows:
    """Arrays (N, ...) one after the other as an array: its rows are read from the parts when they are wanted.

    A row, a slice, row numbers or a mask give an array; so does ``numpy.asarray`` of the whole, in memory.

    Parameters
    ----------
    parts
        At least one; arrays, or what gives slices of rows as arrays: without `pick` these are all that can be had.

    Examples
    --------
    >>> rows = JoinedRows([np.zeros((2, 3)), np.ones((4, 3))])
    >>> rows.shape, rows[1:3].tolist()
    ((6, 3), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts, self._cuts = list(parts), Cuts([len(part) for part in parts])
        self.shape: tuple[int, ...] = (len(self._cuts), *parts[0].shape[1:])
        self.dtype: np.dtype[Any] = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """A row, or those of a slice, of numbers (n,) or of a mask (N,)."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._read(start, stop) if step == 1 else self._pick(np.arange(start, stop, step))
        if isinstance(rows, list | np.ndarray) and np.ndim(rows):
            return self._pick(_number_rows(np.asarray(rows), len(self)))
        at = range(len(self))[operator.index(rows)]
        return self._read(at, at + 1)[0]  # type: ignore[no-any-return]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("these rows are no array in memory: to make them one is to copy them")
        return self[:].astype(self.dtype if dtype is None else dtype, copy=copy is True)

    def read_into(self, start: int, target: NDArray[Any]) -> None:
        """Fill a contiguous array (n, ...) with rows from `start` on; from several threads at once, if wanted."""
        at = 0
        for part, first, last in self._cuts.cut(start, start + len(target)):
            own, source = target[at : at + last - first], self._parts[part]
            if hasattr(source, "read_into"):
                source.read_into(first, own)
            else:
                own[...] = source[first:last]
            at += last - first

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """A slice of rows: of one part what it gives, of several a copy."""
        pieces = list(self._cuts.cut(start, stop))
        if len(pieces) == 1:
            part, first, last = pieces[0]
            rows: NDArray[Any] = self._parts[part][first:last]
            return rows
        rows = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        self.read_into(start, rows)
        return rows

    def _pick(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Rows (n,) in their order."""
        picked = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, mine, there in self._cuts.share(rows):
            source = self._parts[part]
            picked[mine] = source.pick(there) if hasattr(source, "pick") else source[there]
        return picked


class JoinedTexts(TextColumn):
    """Columns of texts one after the other, each text with the prefix of its column before it.

    >>> from featcache.dataset.texts import pack_texts
    >>> joined = JoinedTexts([pack_texts(["1.jpg"]), pack_texts(["1.jpg", "2.jpg"])], ["a/", "b/"])
    >>> list(joined), joined[2]
    (['a/1.jpg', 'b/1.jpg', 'b/2.jpg'], 'b/2.jpg')
    """

    def __init__(self, parts: Sequence[TextColumn], prefixes: Sequence[str]) -> None:
        self._parts, self._prefixes = list(parts), [encode(prefix) for prefix in prefixes]
        self._cuts = Cuts([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self._cuts)

    def read(self, start: int, stop: int) -> TextArray:
        """The texts from `start` to before `stop`."""
        cuts = self._cuts.cut(start, stop)
        pieces = [self._begin(part, self._parts[part].read(first, last)) for part, first, last in cuts]
        return np.concatenate(pieces) if pieces else np.empty(0, "S1")

    def pick(self, rows: NDArray[np.integer]) -> TextArray:
        """The texts at some rows (n,), in their order."""
        found = [
            (mine, self._begin(part, self._parts[part].pick(there))) for part, mine, there in self._cuts.share(rows)
        ]
        picked: TextArray = np.empty(len(rows), f"S{max((texts.itemsize for _, texts in found), default=1)}")
        for mine, texts in found:
            picked[mine] = texts
        return picked

    def _begin(self, part: int, texts: TextArray) -> TextArray:
        """Texts (n,) of a part with its prefix."""
        prefix = self._prefixes[part]
        return np.char.add(prefix, texts) if prefix else texts

    def _find_one(self, row: int) -> bytes:
        part, there = self._cuts.find(row)
        return self._prefixes[part] + encode(self._parts[part][there])


def _number_rows(rows: NDArray[Any], n: int) -> NDArray[np.integer]:
    """The numbers of n rows that an array of numbers, perhaps from the end, or a mask stands for.

    Raises
    ------
    IndexError
        If there are no such rows.
    """
    if rows.dtype == np.bool_:
        if rows.shape != (n,):
            raise IndexError(f"a mask is of shape {rows.shape}, expected ({n},)")
        return np.flatnonzero(rows)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise IndexError(f"rows are {rows.dtype} {rows.shape}, expected integers (n,) or a mask ({n},)")
    numbers = rows.astype(np.intp)
    numbers[numbers < 0] += n
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < n):
        raise IndexError(f"rows {rows.min()} to {rows.max()} are asked for, expected {-n} to {n - 1}")
    return numbers
