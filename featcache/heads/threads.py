"""How many threads the libraries under a solver use, and threads of our own in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


@contextmanager
def limit_threads(n: int | None) -> Iterator[None]:
    """So many threads in torch and in numpy's libraries, as long as the block lasts; None leaves them."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        torch.set_num_threads(before)


class Threads:
    """Threads among which rows are shared out, each with one thread inside torch's operators.

    They wait for one another once for all rows, and not at every operator, where waiting for a core that somebody else
    has just taken costs most of the time of a busy machine.
    """

    def __init__(self, n: int, pool: ThreadPoolExecutor) -> None:
        self._n, self._pool = n, pool

    def share(self, n_rows: int, work: Callable[[int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The sums of what `work` gives for the rows from a first one to before a last one."""
        bounds = [n_rows * i // self._n for i in range(self._n + 1)]
        others = self._pool.map(work, bounds[1:-1], bounds[2:])  # begins at once
        parts = [work(0, bounds[1]), *others]
        return tuple(torch.stack(one).sum(dim=0) for one in zip(*parts, strict=True))


@contextmanager
def share_rows(rows: Tensor, at_least: int) -> Iterator[Threads | None]:
    """As many threads as torch may use now, for rows (N, R) on a CPU, each at least so many; None if one does all."""
    n = min(torch.get_num_threads(), len(rows) // at_least)
    if n < 2 or rows.device.type != "cpu":
        yield None
        return
    # A new thread of ours has as many threads inside as the processor has cores, whatever torch was told elsewhere.
    with limit_threads(1), ThreadPoolExecutor(n - 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Threads(n, pool)
