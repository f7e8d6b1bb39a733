"""One share of an extraction, on one of several machines that see the same output: its rows in parts, no more.

Shares need no one to deal them out, and no lock: each knows by itself which samples are its own, a row is the same
whoever computes it, and a part is whole or not there. The last one to finish puts the file together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.cache import check_parts, keep_bad, list_done, list_jobs, open_cache
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import Source
from featcache.errors import BadImage, BadImagesError, CacheError, OutputBusyError, UnfinishedError
from featcache.metering import Meter, PeakMemory
from featcache.progress import SILENT, Progress
from featcache.recall import look_around
from featcache.shards import AUTO, Shard, parse_shard
from featcache.stages.extract import Extraction, describe_network
from featcache.stages.merge import merge_job
from featcache.stages.order import Order, Piece, finish_order, place_order, read_piece
from featcache.stages.plan import Plan, remember_extractor, say_kept, take_backbone
from featcache.storage import Place, check_writable, follow_link, locate

if TYPE_CHECKING:
    from featcache.runtime import Execution
    from featcache.stages.compute import RowKeeper

T = TypeVar("T")
PIECE_IMAGES = 16_384  # that are read, and then computed, at a time
FAR_IMAGES = 2_048  # of what is fetched over a network, and kept in memory from the one to the other


@dataclass(frozen=True, kw_only=True)
class ShardExtraction:
    """What the extraction of a share did.

    Attributes
    ----------
    path
        The cache file that it is a share of.
    shard
        Which share.
    rows
        That were wanted: of images, and of their views.
    computed
        Of these, that went through the network.
    bad
        Files that cannot be used.
    unfinished
        Shares that have not come to their end, as far as can be seen, by their numbers.
    extraction
        The whole, if this was the last share; None if it was not.
    seconds
        Wall time of this call.
    """

    path: Place
    shard: Shard
    rows: int
    computed: int
    bad: tuple[BadImage, ...]
    unfinished: tuple[int, ...]
    extraction: Extraction | None
    seconds: float


@dataclass(frozen=True)
class Found:
    """Rows that were there already, for a progress bar."""

    cached: int

    def __len__(self) -> int:
        return self.cached


class Stoppable(Progress):
    """Says nothing, and ends what goes through it once it is stopped: reading ahead, when nobody wants it any more."""

    def __init__(self) -> None:
        self._stopped = False

    def stop(self) -> None:
        """End it at the next item."""
        self._stopped = True

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, unit: str = "img", done: int = 0
    ) -> Iterator[T]:
        """Pass `items` through."""
        del total, what, unit, done
        for item in items:
            if self._stopped:
                raise CancelledError
            yield item


def extract_shard(
    data: Path | str,
    output: Place | str = FEATURES_FILE,
    *,
    shard: str = AUTO,
    progress: Progress = SILENT,
    **settings: Any,
) -> ShardExtraction:
    """Extract the features of one share of a data set's images, into parts beside the output.

    Every share is started with the same data, output and settings. Any of them may run twice, be killed, or run at the
    same time as the others or as a copy of itself; the same call again goes on. The last one puts the file together.

    Parameters
    ----------
    data, output, progress, settings
        As of `extract_features`. The output is on a disk, or store, that all machines see.
    shard
        Which share, such as "3/16", "auto" or "auto/16"; see `featcache.shards.parse_shard`.

    Returns
    -------
    ShardExtraction

    Raises
    ------
    BadImagesError
        If files of this share cannot be used as images and `skip_bad` is not set. All other rows of it are kept.
    StaleCacheError
        If the output was made by another extractor, or others are at work there for one, and `force` is not set.
    SettingsError
        If `shard` names none.
    FeatcacheError
        As of `extract_features`.

    Examples
    --------
    >>> for number in range(1, 17):                                        # doctest: +SKIP
    ...     extract_shard("photos", "photos.h5", shard=f"{number}/16")
    """
    meter, memory, start = Meter(), PeakMemory(), look_around()
    share = parse_shard(shard, os.environ)
    settings, given = take_backbone(settings)
    config, output = settle_machine(ExtractConfig(**settings)), follow_link(locate(output))
    check_writable(output)
    check_parts(output)
    order = place_order(data, output, config, progress, given)
    mine = share.list_rows(len(order.samples))
    progress.say(f"{describe_network(order.plan, config)}; shard {share}: {len(mine):,} {order.samples.noun}s")
    n_rows, computed, bad = _compute_share(order, share, mine, config, progress, memory)
    remember_extractor(order.plan, config, start)
    unfinished = _list_unfinished(order, share)
    extraction = None
    if not unfinished or _is_there(order, computed):
        extraction = _merge(data, output, config, progress, order)
        unfinished = () if extraction else unfinished
    if bad and not config.skip_bad:
        raise BadImagesError(bad)
    return ShardExtraction(
        path=output,
        shard=share,
        rows=n_rows,
        computed=computed,
        bad=tuple(bad),
        unfinished=unfinished,
        extraction=extraction,
        seconds=meter.seconds,
    )


def settle_machine(config: ExtractConfig) -> ExtractConfig:
    """The settings with this process's share of its machine: torchrun may have started several beside each other."""
    from featcache.images import count_cores
    from featcache.processes import choose_local_device, count_neighbours

    n, workers = count_neighbours(), config.workers
    if n > 1 and workers is None:
        workers = max(count_cores() // n, 1)
    return replace(config, device=choose_local_device(config.device), workers=workers)


def _compute_share(
    order: Order,
    share: Shard,
    rows: NDArray[np.int64],
    config: ExtractConfig,
    progress: Progress,
    memory: PeakMemory,
) -> tuple[int, int, list[BadImage]]:
    """Rows that were wanted, rows that were computed, and files that cannot be used; what was done is written down."""
    from featcache.stages.compute import RowKeeper

    plan, keeper = order.plan, RowKeeper(order.plan, config)
    running = ShareRun(order, config, keeper)
    unit = "view" if plan.views else "img"
    total = order.count_rows(order.samples.take(rows))
    try:
        for _ in progress.track(running.run(rows, progress), total=total, what="extracting", unit=unit):
            pass
    except KeyboardInterrupt:
        keeper.writer.flush()
        say_kept(plan, keeper.writer.parts, progress)
        raise
    finally:
        keeper.writer.flush()
    keep_bad(plan.output, plan.key, keeper.reasons)
    finish_order(order, (share.number, share.count), runtime=running.runtime, peak_memory_bytes=memory.read())
    return total, keeper.n_rows, [*running.unreadable, *keeper.bad]


class ShareRun:
    """Runs over a share piece by piece; while one is computed, the next is read.

    Attributes
    ----------
    runtime
        Which one it came to be; "" if there was nothing to compute.
    unreadable
        Files that cannot be read.
    """

    def __init__(self, order: Order, config: ExtractConfig, keeper: RowKeeper) -> None:
        self.runtime, self.unreadable = "", list[BadImage]()
        self._order, self._config, self._keeper = order, config, keeper
        self._execution: Execution | None = None

    def run(self, rows: NDArray[np.int64], progress: Progress) -> Iterator[Any]:
        """Compute what is missing of these samples; gives what came out, and what was there, for a progress bar."""
        far = isinstance(self._order.samples.root, Source) and self._order.samples.root.readers > 1
        step = FAR_IMAGES if far else PIECE_IMAGES
        pieces = [self._order.samples.take(rows[start : start + step]) for start in range(0, len(rows), step)]
        reading = Stoppable()
        with ThreadPoolExecutor(1) as pool:
            try:
                ahead = [pool.submit(read_piece, self._order, one, reading) for one in pieces[:1]]
                for number, _ in enumerate(pieces):
                    piece = ahead.pop().result()
                    following = pieces[number + 1 : number + 2]
                    ahead += [pool.submit(read_piece, self._order, one, reading) for one in following]
                    yield from self._run_piece(piece, progress)
            finally:
                reading.stop()

    def _run_piece(self, piece: Piece, progress: Progress) -> Iterator[Any]:
        from featcache.stages.compute import find_paths, make_rows

        self.unreadable += piece.bad
        yield Found(piece.n_rows - len(piece.missing))
        if not piece.missing:
            return
        plan = replace(self._order.plan, listing=piece.listing, missing=piece.missing)
        assert plan.backbone
        rows = make_rows(plan, piece.missing, plan.backbone.preprocessing)
        paths = find_paths(piece.listing, piece.missing)
        for output in self._prepare(plan, progress).run(rows):
            self._keeper.take(output, piece.missing, paths)
            yield output
        if not self._keeper.n_rows:  # made ready without any image it is another one
            self._execution = None

    def _prepare(self, plan: Plan, progress: Progress) -> Execution:
        """The network ready to run, made so on the first piece that has something to compute."""
        from featcache.stages.compute import prepare_backbone

        if self._execution is None:
            self._execution = prepare_backbone(plan, plan.missing, self._config)
            self.runtime = self._execution.runtime
            if self._execution.remark:
                progress.say(f"{self._execution.remark}: {self.runtime} takes its place")
        return self._execution


def _list_unfinished(order: Order, share: Shard) -> tuple[int, ...]:
    """Numbers of the shares that have not come to their end."""
    done = list_done(order.plan.output, order.plan.key, order.names_sha256)
    return tuple(number for number in range(1, share.count + 1) if (number, share.count) not in done)


def _is_there(order: Order, computed: int) -> bool:
    """Whether the file seems to be whole: this share was run again, or a copy of it was faster."""
    output, old = order.plan.output, order.plan.old
    if old and not computed and len(old) == len(order.samples):
        return True
    if not output.is_file():
        return False
    now = open_cache(output)
    return now.key == order.plan.key and (old is None or now.content_sha256 != old.content_sha256)


def _merge(
    data: Path | str, output: Place, config: ExtractConfig, progress: Progress, order: Order
) -> Extraction | None:
    """The whole, put together; None if there is more to come, or another share is at it."""
    how: dict[str, Any] = {"skip_bad": config.skip_bad, "force": config.force, "progress": progress}
    try:
        return merge_job(order.job, output, data=data, **how)
    except OutputBusyError as error:
        progress.say(f"{error}: the file is being put together there")
    except UnfinishedError:
        if order.plan.old is None and not output.is_file():
            raise
    except CacheError as error:  # where nothing can be locked, it has just been put together, and the parts are gone
        if list_jobs(output):
            raise
        progress.say(f"another shard has put {output} together ({error})")
    return None
