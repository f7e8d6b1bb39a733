"""Texts by the million: paths and digests as sequences of str that take no object each. Knows no listing and no HDF5.

A str takes 50 bytes and what is in it; ten million paths and digests of them take three gigabytes. Here they lie in one
array of fixed width, in half of that for digests, or stay in a file and are read block by block when they are wanted.
Texts are encoded as file names are. None may end in a NUL, which the width is filled up with.
"""

from __future__ import annotations

import operator
import os
import sys
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.errors import CacheError

TextArray: TypeAlias = NDArray[np.bytes_]  # (N,) S<width>
BLOCK_TEXTS = 1 << 14  # that are worked on at a time
FOUND_TEXTS = 1 << 16  # that are looked for at a time
SPARSE = 256  # rows of a file per one that is wanted, above which each is read alone
MANY_TEXTS = 1 << 16  # from which on they are worth packing
DIGEST_BYTES = 32
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class TextColumn(Sequence[str]):
    """N texts, wherever they are. Equal to any sequence of the same str."""

    @abstractmethod
    def read(self, start: int, stop: int) -> TextArray:
        """The texts from `start` to before `stop`, both between 0 and N."""

    @abstractmethod
    def pick(self, rows: NDArray[np.integer]) -> TextArray:
        """The texts at some rows (n,), each between 0 and N - 1, in their order."""

    @overload
    def __getitem__(self, row: int, /) -> str: ...

    @overload
    def __getitem__(self, row: slice, /) -> TextColumn: ...

    def __getitem__(self, row: int | slice, /) -> str | TextColumn:
        """One text, or those of a slice."""
        if isinstance(row, slice):
            rows = range(len(self))[row]
            if rows.step != 1:
                return self.take(np.array(rows, np.intp))
            return self.cut(rows.start, max(rows.stop, rows.start))
        at = range(len(self))[operator.index(row)]
        return decode(self._find_one(at))

    def __iter__(self) -> Iterator[str]:
        for block in self.blocks():
            yield from map(decode, block.tolist())

    def __contains__(self, text: object) -> bool:
        if not isinstance(text, str) or (wanted := _encode_or_none(text)) is None:
            return False
        return any((block == wanted).any() for block in self.blocks())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        if len(self) != len(other):
            return False
        starts = range(0, len(self), BLOCK_TEXTS)
        return all(_is_equal(self, other, start, min(start + BLOCK_TEXTS, len(self))) for start in starts)

    __hash__ = None  # type: ignore[assignment]  # as of a list: to hash all of it is to read all of it

    def __repr__(self) -> str:
        some = ", ".join(map(repr, self[:3])) + (", ..." if len(self) > 3 else "")
        return f"{type(self).__name__}({len(self):,}: {some})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """For numpy: bytes unless something else is asked for."""
        if dtype is not None and np.dtype(dtype).kind != "S":
            return np.array(list(self), dtype)
        return self.array if dtype is None else self.array.astype(dtype, copy=bool(copy))

    @property
    def array(self) -> TextArray:
        """All of them in memory."""
        return self.read(0, len(self))

    def blocks(self, size: int = BLOCK_TEXTS) -> Iterator[TextArray]:
        """All of them, so many at a time."""
        return (self.read(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def cut(self, start: int, stop: int) -> TextColumn:
        """The texts from `start` to before `stop` as a column."""
        return Texts(self.read(start, stop))

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> TextColumn:
        """The texts at some rows (n,), or where a mask (N,) is true, as a column in memory."""
        return Texts(self.pick(_list_rows(rows)))

    def _find_one(self, row: int) -> bytes:
        return bytes(self.read(row, row + 1)[0])


class Texts(TextColumn):
    """Texts in one array (N,) S<width>.

    >>> texts = Texts(np.array([b"cats/1.jpg", b"dogs/2.jpg"]))
    >>> texts[1], texts == ("cats/1.jpg", "dogs/2.jpg"), list(texts[:1])
    ('dogs/2.jpg', True, ['cats/1.jpg'])
    """

    def __init__(self, array: TextArray) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int) -> TextArray:
        """The texts from `start` to before `stop`."""
        return self._array[start:stop]

    def pick(self, rows: NDArray[np.integer]) -> TextArray:
        """The texts at some rows (n,), in their order."""
        picked: TextArray = self._array[rows]
        return picked


class HexTexts(TextColumn):
    """SHA-256 digests in hexadecimal, of which only the 32 bytes that they spell are kept.

    Parameters
    ----------
    raw
        (N, 32) uint8.
    filled
        (N,) bool, where there is a digest and not ""; None is everywhere.
    """

    def __init__(self, raw: NDArray[np.uint8], filled: NDArray[np.bool_] | None = None) -> None:
        self._raw, self._filled = raw, filled

    def __len__(self) -> int:
        return len(self._raw)

    def read(self, start: int, stop: int) -> TextArray:
        """The texts from `start` to before `stop`."""
        return self._spell(np.s_[start:stop])

    def pick(self, rows: NDArray[np.integer]) -> TextArray:
        """The texts at some rows (n,), in their order."""
        return self._spell(rows)

    def cut(self, start: int, stop: int) -> HexTexts:
        """The texts from `start` to before `stop` as a column."""
        return self._select(np.s_[start:stop])

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> HexTexts:
        """The texts at some rows (n,), or where a mask (N,) is true."""
        return self._select(rows)

    def _select(self, rows: Any) -> HexTexts:
        return HexTexts(self._raw[rows], None if self._filled is None else self._filled[rows])

    def _spell(self, rows: Any) -> TextArray:
        spelled = self._raw[rows].tobytes().hex().encode("ascii")
        texts: TextArray = np.frombuffer(spelled, f"S{2 * DIGEST_BYTES}")
        return texts if self._filled is None else np.where(self._filled[rows], texts, np.bytes_())


class ReadableFile(Protocol):
    """What texts are read from."""

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from `offset` on; from several threads at once, if wanted. CacheError if they are not there."""


class OpenFile:
    """A file that stays open until nobody needs it any more, whoever else closes it or takes its name."""

    def __init__(self, descriptor: int, path: Path | str) -> None:
        self.descriptor, self.path = os.dup(descriptor), path
        weakref.finalize(self, os.close, self.descriptor)

    def fileno(self) -> int:
        """Its descriptor."""
        return self.descriptor

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from `offset` on.

        Raises
        ------
        CacheError
            If the file ends before.
        """
        return _read_bytes(self.descriptor, size, offset, self.path)


class NamedFile:
    """A file that never changes, opened whenever it is read: there may be more of them than can be open at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from `offset` on.

        Raises
        ------
        CacheError
            If the file is gone, or ends before.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                return _read_bytes(file.fileno(), size, offset, self.path)
        except OSError as error:
            raise CacheError(f"{self.path} cannot be read: {error.strerror}; run the same command again") from error


class StoredTexts(TextColumn):
    """Texts that stay in a file, one after the other, and are read when they are wanted.

    It stays the same file even if another one takes its name. A copy for another process is in memory.

    Parameters
    ----------
    file
        Where they are.
    offset
        Of the first one, in bytes.
    n, width
        How many there are, and the bytes of each.
    """

    def __init__(self, file: ReadableFile, offset: int, n: int, width: int) -> None:
        self._file, self._offset, self._n, self._width = file, offset, n, width
        self._last: tuple[int, TextArray] = (0, np.empty(0, f"S{width}"))  # replaced as one: threads may share it

    def __len__(self) -> int:
        return self._n

    def __reduce__(self) -> tuple[type[Texts], tuple[TextArray]]:
        return Texts, (self.array,)

    def read(self, start: int, stop: int) -> TextArray:
        """The texts from `start` to before `stop`."""
        data = self._file.read(max(stop - start, 0) * self._width, self._offset + start * self._width)
        return np.frombuffer(data, f"S{self._width}")

    def pick(self, rows: NDArray[np.integer]) -> TextArray:
        """The texts at some rows (n,), in their order."""
        found, order = np.empty(len(rows), f"S{self._width}"), np.argsort(rows, kind="stable")
        cuts = np.flatnonzero(np.diff(rows[order] // BLOCK_TEXTS)) + 1
        for mine in np.split(order, cuts) if len(rows) else []:
            first, last = int(rows[mine[0]]), int(rows[mine[-1]])
            if len(mine) * SPARSE < last - first:
                found[mine] = [self.read(row, row + 1)[0] for row in rows[mine].tolist()]
            else:
                found[mine] = self.read(first, last + 1)[rows[mine] - first]
        return found

    def cut(self, start: int, stop: int) -> StoredTexts:
        """The texts from `start` to before `stop`, where they are."""
        return StoredTexts(self._file, self._offset + start * self._width, stop - start, self._width)

    def _find_one(self, row: int) -> bytes:
        start, block = self._last
        if not start <= row < start + len(block):
            start = row // BLOCK_TEXTS * BLOCK_TEXTS
            block = self.read(start, min(start + BLOCK_TEXTS, len(self)))
            self._last = start, block
        return bytes(block[row - start])


def encode(text: str) -> bytes:
    """A text as a file name is encoded."""
    return text.encode(_ENCODING, _ERRORS)


def decode(data: bytes) -> str:
    """The text that was encoded."""
    return data.decode(_ENCODING, _ERRORS)


def encode_all(texts: Iterable[str]) -> TextArray:
    """Texts (N,) as an array that is as wide as the longest."""
    values = [encode(text) for text in texts]
    return np.array(values, np.bytes_) if values else np.empty(0, "S1")


def pack_texts(texts: Sequence[str]) -> TextColumn:
    """Texts as a column."""
    return texts if isinstance(texts, TextColumn) else Texts(encode_all(texts))


def pack_digests(digests: Sequence[str] | TextArray) -> TextColumn:
    """Digests as a column: in 32 bytes each, unless one is no SHA-256 in small hexadecimal digits."""
    if isinstance(digests, TextColumn):
        return digests
    return pack_blocks((block for _, block in iterate_blocks(digests)), len(digests))


def pack_blocks(digests: Iterable[TextArray], n: int) -> TextColumn:
    """The same of n digests that come in blocks."""
    raw, filled, start = np.empty((n, DIGEST_BYTES), np.uint8), np.ones(n, np.bool_), 0
    blocks = iter(digests)
    for block in blocks:
        rows = slice(start, start + len(block))
        filled[rows] = block != b""
        if (values := _unspell(np.where(filled[rows], block, b"0" * 2 * DIGEST_BYTES))) is None:
            return Texts(np.concatenate([HexTexts(raw[:start], filled[:start]).array, block, *blocks]))
        raw[rows], start = values, rows.stop
    return HexTexts(raw, None if filled.all() else filled)


def _unspell(digests: TextArray) -> NDArray[np.uint8] | None:
    """(n, 32) that digests (n,) spell, None if they do not all spell so many bytes in the one usual way."""
    spelled = digests.tobytes()
    try:
        raw = bytes.fromhex(spelled.decode("ascii"))
    except ValueError:
        return None
    if raw.hex().encode("ascii") != spelled or len(raw) != DIGEST_BYTES * len(digests):
        return None
    return np.frombuffer(raw, np.uint8).reshape(-1, DIGEST_BYTES)


def read_block(texts: Sequence[str] | TextArray, start: int, stop: int) -> TextArray:
    """The texts from `start` to before `stop` of any sequence as an array."""
    if isinstance(texts, TextColumn):
        return texts.read(start, stop)
    return texts[start:stop] if isinstance(texts, np.ndarray) else encode_all(texts[start:stop])


def iterate_blocks(texts: Sequence[str] | TextArray, size: int = BLOCK_TEXTS) -> Iterator[tuple[int, TextArray]]:
    """All of any sequence, so many at a time, each with its first one's number."""
    return ((start, read_block(texts, start, min(start + size, len(texts)))) for start in range(0, len(texts), size))


def take_texts(texts: Sequence[str], rows: NDArray[np.integer]) -> Sequence[str]:
    """The texts at some rows (n,), in their order; of a tuple a tuple."""
    return texts.take(rows) if isinstance(texts, TextColumn) else tuple(texts[i] for i in rows.tolist())


def measure_width(texts: Sequence[str]) -> int:
    """Bytes of the longest text."""
    return max((int(np.char.str_len(block).max()) for _, block in iterate_blocks(texts)), default=0)


def hash_texts(texts: TextArray) -> NDArray[np.uint64]:
    """A number (N,) for each text, whatever the width of the array: equal for equal texts, hardly ever for others.

    Source: multiply-add hashing, M. Dietzfelbinger, Universal hashing and k-wise independent random variables via
    integer arithmetic without primes, STACS 1996, with the multipliers of S. Vigna's splitmix64.
    """
    n, width = len(texts), -(-texts.dtype.itemsize // 8)
    words = np.ascontiguousarray(texts, f"S{8 * width}").view("<u8").reshape(n, width)
    mixed = np.zeros(n, np.uint64)
    for i in range(width):
        mixed += words[:, i] * np.uint64(_make_multiplier(i))
    return mixed


def _make_multiplier(i: int) -> int:
    """The i-th odd number of 64 bits in a fixed row of random ones."""
    mask, value = (1 << 64) - 1, (i + 1) * 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value & mask) ^ ((value & mask) >> shift)) * factor
    return ((value & mask) ^ ((value & mask) >> 31)) | 1


class TextIndex:
    """Where texts are in some columns, the first place of each; it takes 12 bytes a text beside the columns.

    Sorted are numbers that the texts are hashed to. Whole texts decide: what is found at a number is compared, and
    where it is another text, so is what else has that number.

    Parameters
    ----------
    columns
        One after the other.
    """

    def __init__(self, columns: Sequence[TextColumn]) -> None:
        self._columns = list(columns)
        self._starts = np.cumsum([0, *map(len, columns)])
        numbers = np.empty(len(self), np.uint64)
        for start, column in zip(self._starts[:-1].tolist(), columns, strict=True):
            for offset, block in iterate_blocks(column):
                numbers[start + offset : start + offset + len(block)] = hash_texts(block)
        order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[order]
        self._order = order.astype(np.uint32) if len(self) < 1 << 32 else order

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, texts: Sequence[str] | TextArray) -> NDArray[np.int64]:
        """The first place (N,) of each of N texts, -1 where there is none, and of ""."""
        found = np.full(len(texts), -1, np.int64)
        for start in range(0, len(texts), FOUND_TEXTS):
            block = read_block(texts, start, min(start + FOUND_TEXTS, len(texts)))
            found[start : start + len(block)] = self._find(block)
        return found

    def _find(self, texts: TextArray) -> NDArray[np.int64]:
        found, numbers = np.full(len(texts), -1, np.int64), hash_texts(texts)
        at = np.searchsorted(self._numbers, numbers)
        open_ = np.flatnonzero(texts != b"")
        while len(open_ := open_[self._has(at[open_], numbers[open_])]):
            places = self._order[at[open_]].astype(np.int64)
            same = self.pick(places) == texts[open_]
            found[open_[same]] = places[same]
            open_ = open_[~same]
            at[open_] += 1
        return found

    def _has(self, at: NDArray[np.intp], numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether these numbers (n,) are at these ranks (n,)."""
        has: NDArray[np.bool_] = at < len(self)
        has[has] = self._numbers[at[has]] == numbers[has]
        return has

    def pick(self, places: NDArray[np.int64]) -> TextArray:
        """The texts at some places (n,)."""
        of_column = np.searchsorted(self._starts, places, side="right") - 1
        order = np.argsort(of_column, kind="stable")
        pieces = np.split(order, np.flatnonzero(np.diff(of_column[order])) + 1) if len(places) else []
        texts = [self._columns[c := of_column[mine[0]]].pick(places[mine] - self._starts[c]) for mine in pieces]
        picked = np.empty(len(places), max((some.dtype for some in texts), default=np.dtype("S1")))
        for mine, some in zip(pieces, texts, strict=True):
            picked[mine] = some
        return picked


class TextSet(Set[str]):
    """Each text of some columns once: a set that takes 12 bytes a text.

    Parameters
    ----------
    columns
        One after the other.
    """

    def __init__(self, columns: Sequence[TextColumn]) -> None:
        self._columns, self._index = list(columns), TextIndex(columns)

    @classmethod
    def _from_iterable(cls, texts: Iterable[Any]) -> Set[Any]:
        return set(texts)

    def __contains__(self, text: object) -> bool:
        if not isinstance(text, str) or (wanted := _encode_or_none(text)) is None:
            return False
        return bool(self._index.find(np.array([wanted]))[0] >= 0)

    def __iter__(self) -> Iterator[str]:
        for block, first in self._iterate_first():
            yield from map(decode, block[first].tolist())

    def __len__(self) -> int:
        return sum(int(first.sum()) for _, first in self._iterate_first())

    def __sub__(self, other: Set[Any]) -> Set[str]:
        if not isinstance(other, TextSet):
            return super().__sub__(other)
        blocks = (block[first & (other._index.find(block) < 0)] for block, first in self._iterate_first())
        return {decode(text) for block in blocks for text in block.tolist()}

    def _iterate_first(self) -> Iterator[tuple[TextArray, NDArray[np.bool_]]]:
        """All texts in blocks (n,), and which of them are there for the first time."""
        start = 0
        for column in self._columns:
            for block in column.blocks(FOUND_TEXTS):
                yield block, self._index.find(block) == np.arange(start, start + len(block))
                start += len(block)


def _list_rows(rows: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.integer]:
    """The numbers of rows, or those where a mask is true."""
    return np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.intp, copy=False)


def _read_bytes(descriptor: int, size: int, offset: int, path: Path | str) -> bytes:
    """So many bytes of a file from `offset` on, or a CacheError."""
    pieces, left = [], size
    while left:
        piece = os.pread(descriptor, left, offset + size - left)
        if not piece:
            raise CacheError(f"{path} ends before its columns do ({size:,} bytes wanted); extract again")
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _encode_or_none(text: str) -> bytes | None:
    """A text's bytes, None if they are those of none in a column."""
    try:
        data = encode(text)
    except UnicodeEncodeError:
        return None
    return None if data.endswith(b"\0") else data


def _is_equal(one: TextColumn, other: Sequence[Any], start: int, stop: int) -> bool:
    """Whether the same texts are in both from `start` to before `stop`."""
    if isinstance(other, TextColumn):
        return bool((one.read(start, stop) == other.read(start, stop)).all())
    return list(map(decode, one.read(start, stop).tolist())) == list(other[start:stop])
