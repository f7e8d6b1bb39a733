"""Columns of a file that is open, read when they are wanted: neither mapped nor kept, so that memory stays flat.

Knows no HDF5: a column is bytes one after the other.
"""

from __future__ import annotations

import math
import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.errors import CacheError
from featcache.storage import Place

PICKED_ROWS = 64  # of a file, of which those that are wanted are read with what lies between them


class Descriptor(Protocol):
    """A file that is open."""

    def fileno(self) -> int:
        """Its number."""


class StreamedFeatures:
    """Features (N, ...), or another column, of a file that stays open, as stored, not compared with their digests.

    A copy for another process is an array in memory.

    Parameters
    ----------
    stream
        The file.
    offset
        Of the first feature, in bytes.
    shape, dtype
        Of all of them, one after the other.
    path
        Its name, for messages.
    """

    def __init__(
        self, stream: Descriptor, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], path: Place
    ) -> None:
        self._stream, self.offset, self._path = stream, offset, path
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """The features of these rows, in an array of their own."""
        start, stop, _ = rows.indices(len(self))
        target = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        self.read_into(start, target)
        return target

    def __reduce__(self) -> Any:
        return self[:].__reduce__()

    def pick(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """The features of some rows (n,), each between 0 and N - 1, in their order."""
        picked, order = np.empty((len(rows), *self.shape[1:]), self.dtype), np.argsort(rows, kind="stable")
        cuts = np.flatnonzero(np.diff(rows[order] // PICKED_ROWS)) + 1
        for mine in np.split(order, cuts) if len(rows) else []:
            first, last = int(rows[mine[0]]), int(rows[mine[-1]])
            picked[mine] = self[first : last + 1][rows[mine] - first]
        return picked

    def read_into(self, start: int, target: NDArray[Any]) -> None:
        """Fill a contiguous array (n, ...) with rows from `start` on; from several threads at once, if wanted.

        Raises
        ------
        CacheError
            If the file ends too early.
        """
        view = target.view(np.uint8).data.cast("B") if target.size else memoryview(b"")
        at, size = self.offset + start * self.row_bytes, len(view)
        while view:
            read = os.preadv(self._stream.fileno(), [view], at)
            if not read:
                raise CacheError(f"{self._path} ends before its features do ({size:,} bytes wanted); extract again")
            view, at = view[read:], at + read
