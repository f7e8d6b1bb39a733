"""Rows in a new order each time, at the speed of reading: chunks come in random order, rows are shuffled among many."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.heads.rows import Features, TrainingRows

CHUNK_BYTES = 256 << 10  # read in one piece
BUFFER_BYTES = 48 << 20  # of chunks, among which rows are shuffled; another such buffer is filled meanwhile


class ShuffledRows:
    """Batches of training rows.

    A cache is sorted by class, so that a batch of neighbours would be of one class: some 200 chunks are in a buffer at
    a time, and batches are drawn from all of it.

    Parameters
    ----------
    rows
        The training rows.
    batch_size
        Images per batch.
    seed
        Of all orders.
    """

    def __init__(self, rows: TrainingRows, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        one = rows.features[0:1]
        bytes_each = one.itemsize * rows.dim * rows.n_views
        self._chunk = max(1, CHUNK_BYTES // bytes_each)
        n_images = max(batch_size, min(len(rows), BUFFER_BYTES // bytes_each))
        self._chunks_at_once = -(-n_images // self._chunk)
        shape = (self._chunks_at_once * self._chunk, rows.n_views, rows.dim)
        self._buffers = [torch.empty(shape, dtype=torch.from_numpy(one).dtype) for _ in range(2)]

    def __len__(self) -> int:
        """Batches in an epoch, give or take one: that of few rows is exact."""
        whole, rest = divmod(len(self.rows), len(self._buffers[0]))
        return whole * -(-len(self._buffers[0]) // self.batch_size) + -(-rest // self.batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once: numbers (B,) and features (B, V, D), in the stored precision."""
        starts = torch.arange(0, len(self.rows), self._chunk)
        starts = starts[torch.randperm(len(starts), generator=self._generator)]
        groups = torch.split(starts, self._chunks_at_once)
        with ThreadPoolExecutor(max_workers=1) as pool:
            filling = pool.submit(self._fill, self._buffers[0], groups[0])
            for i in range(len(groups)):
                images = filling.result()
                if i + 1 < len(groups):
                    filling = pool.submit(self._fill, self._buffers[(i + 1) % 2], groups[i + 1])
                order = torch.randperm(len(images), generator=self._generator)
                for some in torch.split(order, self.batch_size):
                    yield images[some], self._buffers[i % 2].index_select(0, some)

    def _fill(self, buffer: Tensor, starts: Tensor) -> Tensor:
        """Read chunks into a buffer; give the numbers of their images."""
        images, at, target = [], 0, buffer.numpy()
        for start in starts.tolist():
            chunk = slice(start, min(start + self._chunk, len(self.rows)))
            n = chunk.stop - chunk.start
            copy_features(self.rows.features, chunk, target[at : at + n, 0])
            if self.rows.views is not None:
                copy_features(self.rows.views, chunk, target[at : at + n, 1:])
            images.append(torch.arange(chunk.start, chunk.stop))
            at += n
        return torch.cat(images)


def copy_features(features: Features, images: slice, target: NDArray[np.floating]) -> None:
    """Copy a slice of features into an array; from a file straight into it, if that can be done."""
    if hasattr(features, "read_into") and target.flags.c_contiguous:
        features.read_into(images.start, target)
    else:
        target[...] = features[images]
