"""Which thread decodes and forwards what: batches in, outputs in order, never more threads than cores."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import BadImage
from featcache.images import Batch, ImageRows
from featcache.runtime.devices import use_threads
from featcache.runtime.engines import Engine

PER_DEVICE = 2  # threads: while one batch is computed, the next is copied


@dataclass(frozen=True)
class Outputs:
    """What came out for some images.

    Attributes
    ----------
    rows
        (B,) int64, positions in the list of paths.
    values
        (B, D) float32: features, or logits if the network has its classifier.
    bad
        Files that could not be used.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    bad: list[BadImage]

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)


def forward(engine: Engine, batch: Batch) -> Outputs:
    """What an engine makes of a batch."""
    values = engine(batch.images) if len(batch.rows) else np.empty((0, 0), dtype=np.float32)
    return Outputs(batch.rows.numpy(), values, batch.bad)


def run_in_turn(engine: Engine, batches: Iterable[Batch], n_threads: int) -> Iterator[Outputs]:
    """One batch after the other, with all threads inside the operators."""
    with use_threads(n_threads):
        for batch in batches:
            yield forward(engine, batch)


class RowsAhead:
    """Rows of which the first are decoded by a thread of their own while something else is done.

    Parameters
    ----------
    rows
        All of them.
    n
        How many may be decoded ahead.
    """

    def __init__(self, rows: ImageRows, n: int = 0) -> None:
        self.rows = rows
        self._pool = ThreadPoolExecutor(1)
        self._futures = {row: self._pool.submit(rows.__getitem__, row) for row in range(min(n, len(rows)))}

    def stop(self) -> None:
        """Begin no further one."""
        for row, future in list(self._futures.items()):
            if future.cancel():
                del self._futures[row]
        self._pool.shutdown(wait=False)

    def make_batch(self, piece: range) -> Batch:
        """The batch of some rows, decoded now where they are not yet."""
        ahead = {row: future for row in piece if (future := self._futures.pop(row, None)) is not None}
        rest = [row for row in piece if row not in ahead]
        items = dict(zip(rest, self.rows.__getitems__(rest), strict=True))  # together: they may be read from far away
        return self.rows.collate([items[row] if row in items else ahead[row].result() for row in piece])


def run_on_cores(engine: Engine, ahead: RowsAhead, batch_size: int, n_threads: int) -> Iterator[Outputs]:
    """Threads that each decode and forward whole batches with one core: no core waits for another."""
    n = len(ahead.rows)
    pieces = (range(start, min(start + batch_size, n)) for start in range(0, n, batch_size))

    def work(piece: range) -> Outputs:
        return forward(engine, ahead.make_batch(piece))

    with use_threads(1), ThreadPoolExecutor(n_threads) as pool:
        yield from _in_order((pool.submit(work, piece) for piece in pieces), 2 * n_threads)


def run_on_devices(engines: Sequence[Engine], batches: Iterable[Batch]) -> Iterator[Outputs]:
    """Batches dealt out to engines on several devices, each with two threads that have a CUDA stream of their own."""
    local = threading.local()

    def work(engine: Engine, batch: Batch) -> Outputs:
        if not torch.cuda.is_available():
            return forward(engine, batch)
        if not hasattr(local, "stream"):
            local.stream = torch.cuda.Stream(engine.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(local.stream):
            return forward(engine, batch)

    pools = [ThreadPoolExecutor(PER_DEVICE) for _ in engines]
    try:
        futures = (
            pools[i % len(pools)].submit(work, engines[i % len(engines)], batch) for i, batch in enumerate(batches)
        )
        with use_threads(1):  # NOTE: a compiled network is compiled again for another number
            yield from _in_order(futures, (PER_DEVICE + 1) * len(engines))
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _in_order(futures: Iterator[Future[Outputs]], n_pending: int) -> Iterator[Outputs]:
    """Results in the order in which the work was given, so many pieces under way at most."""
    pending: deque[Future[Outputs]] = deque()
    try:
        for future in futures:
            pending.append(future)
            if len(pending) >= n_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
