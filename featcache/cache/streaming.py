"""Features of a cache that is open, read when they are wanted: neither mapped nor kept, so that memory stays flat."""

from __future__ import annotations

import os
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import CacheError
from featcache.storage import Place


class StreamedFeatures:
    """Features (N, ...) of a file that stays open, in their stored precision, not compared with their digests.

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

    def __init__(self, stream: FileIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], path: Place) -> None:
        self._stream, self._offset, self._path = stream, offset, path
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """The features of these rows, in an array of their own."""
        start, stop, _ = rows.indices(len(self))
        target = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        self.read_into(start, target)
        return target

    def read_into(self, start: int, target: NDArray[Any]) -> None:
        """Fill a contiguous array (n, ...) with rows from `start` on; from several threads at once, if wanted.

        Raises
        ------
        CacheError
            If the file ends too early.
        """
        view = memoryview(target.data).cast("B") if target.size else memoryview(b"")
        at, size = self._offset + start * self.dtype.itemsize * int(np.prod(self.shape[1:])), len(view)
        while view:
            read = os.preadv(self._stream.fileno(), [view], at)
            if not read:
                raise CacheError(f"{self._path} ends before its features do ({size:,} bytes wanted); extract again")
            view, at = view[read:], at + read
