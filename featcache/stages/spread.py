"""An extraction on a Ray cluster: tasks read and decode, workers that hold the network keep rows in parts.

What a cluster loses costs time and nothing else: a part is whole or not there, and what is missing is asked of the
folder of parts, never of the cluster. The driver reads no image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.cache import DigestTable, keep_bad, list_parts, open_cache, read_bad
from featcache.cluster import TRIES, Answer, Cluster, Prepared, Work, check_cluster, join_cluster, spread
from featcache.config import ExtractConfig
from featcache.dataset import NOTHING_KNOWN, Samples, find_known_digests, hash_groups
from featcache.errors import BadImage, ClusterError, CrashedItemsError, DeviceError, UnfinishedError
from featcache.images import DecodedRows, make_pixel_transform
from featcache.metering import Meter, PeakMemory
from featcache.progress import Progress
from featcache.stages.compute import RowKeeper, find_paths, make_rows, prepare_rows
from featcache.stages.extract import Extraction, describe_network
from featcache.stages.merge import assemble
from featcache.stages.order import Order, find_rows, finish_order, place_order, read_piece
from featcache.stages.plan import Plan, Row, list_digests, say_kept
from featcache.storage import Place

if TYPE_CHECKING:
    from featcache.backbones import Backbone
    from featcache.preprocessing import Preprocessing
    from featcache.runtime import Execution

ITEM_IMAGES = 512  # of an item of work, and so of a part, at most: each costs the driver some 15 ms, whatever is in it
ITEM_BYTES = 80 << 20  # of the decoded images of an item: what travels from a task to a worker
FEW_ITEMS = 64  # that a small data set is cut into, so that more than one machine has work
LEAST_IMAGES = 16  # of an item: each costs some milliseconds
ROUNDS = 2  # over the data set, where files changed in the first


@dataclass(frozen=True)
class Outcome:
    """What became of an item's rows, for a progress bar.

    Attributes
    ----------
    n_rows
        That were wanted.
    bad
        Files that cannot be used.
    """

    n_rows: int
    bad: list[BadImage]

    def __len__(self) -> int:
        return self.n_rows


def extract_on_cluster(
    data: Path | str,
    output: Place,
    config: ExtractConfig,
    progress: Progress,
    *,
    given: Backbone | None,
    meter: Meter,
    memory: PeakMemory,
) -> Extraction:
    """Extract on a Ray cluster; as `extract_features`, by who holds the output."""
    with join_cluster(config.address) as cluster:
        device = choose_device(config, cluster)
        order = place_order(data, output, config, progress, given, device=device)
        progress.say(f"{describe_network(order.plan, config)}; Ray: {cluster}")
        computed = 0
        for attempt in range(ROUNDS):
            computed += run_order(order, config, progress).computed
            try:
                extraction = assemble(order.job, output, config, progress, meter, memory, data=data)
            except UnfinishedError:  # files have changed meanwhile
                if attempt == ROUNDS - 1:
                    raise
                config = replace(config, rehash=True)  # or what was reused is damaged
                order = place_order(data, output, config, progress, given, device=device)
            else:
                return replace(extraction, computed=computed)
    raise AssertionError


def choose_device(config: ExtractConfig, cluster: Cluster) -> torch.device:
    """Where the workers of a cluster run the network, whatever this machine has.

    Raises
    ------
    DeviceError
        If the cluster has no such device, or a single one is named.
    ClusterError
        If it is too small.
    """
    if config.device not in ("auto", "cpu", "cuda"):
        raise DeviceError(
            f"--device {config.device} is one device of one machine; on a cluster expected auto, cpu or cuda"
        )
    gpu = config.device == "cuda" or (config.device == "auto" and cluster.gpus > 0)
    check_cluster(cluster, gpu=gpu)
    return torch.device("cuda" if gpu else "cpu")


def run_order(order: Order, config: ExtractConfig, progress: Progress) -> ClusterRun:
    """Have everything computed that is missing."""
    plan, memory = order.plan, PeakMemory()
    given_up = read_bad(plan.output, plan.key) if config.skip_bad else {}  # else they are tried once more
    unfinished = find_unfinished(order, given_up)
    items = cut_items(order, unfinished)
    done = order.count_rows(order.samples) - sum(order.count_rows(item) for item in items)
    run = ClusterRun(order, config)
    unit = "view" if plan.views else "img"
    total = order.count_rows(order.samples)
    try:
        for _ in progress.track(run.run(items), total=total, done=done, what="extracting", unit=unit):
            pass
    except KeyboardInterrupt:
        say_kept(replace(plan, parts=()), list_parts(plan.output, "rows", plan.key)[0], progress)
        raise
    peak = max(filter(None, (run.peak_memory_bytes, memory.read())), default=None)
    finish_order(order, (1, 1), runtime=run.runtime, peak_memory_bytes=peak)
    return run


def find_unfinished(order: Order, given_up: Collection[str]) -> NDArray[np.int64]:
    """Numbers of the samples of which not all rows are known to be there; no file is read for it.

    Images, by their digests, that were given up count as finished.
    """
    everyone = np.arange(len(order.samples), dtype=np.int64)
    if not len(order.table) or not len(order.known):
        return everyone
    found, digests = find_rows(order, order.table) >= 0, find_known_digests(order.samples, order.known)
    finished, start, row = np.zeros(len(everyone), np.bool_), 0, 0
    for name, names in order.samples.groups.items():
        each = 1 + order.plan.views.count(name)
        mine, some = found[row : row + each * len(names)].reshape(-1, each), digests[start : start + len(names)]
        finished[start : start + len(names)] = mine.all(axis=1) | np.array(
            [digest in given_up for digest in some], np.bool_
        )
        start, row = start + len(names), row + each * len(names)
    return everyone[~finished]


def cut_items(order: Order, rows: NDArray[np.int64]) -> list[Samples]:
    """These samples in pieces, each an item of work."""
    assert order.plan.backbone
    preprocessing = order.plan.backbone.preprocessing
    views = 1 + max(order.plan.views.train, order.plan.views.others)
    each = math.prod(preprocessing.input_shape) * views
    step = min(ITEM_IMAGES, max(ITEM_BYTES // each, 1), max(-(-len(rows) // FEW_ITEMS), LEAST_IMAGES))
    light = replace(order.samples, classes=(), ignored=())
    return [narrow(light.take(rows[start : start + step])) for start in range(0, len(rows), step)]


def narrow(samples: Samples) -> Samples:
    """The same with a root that knows of no others: it travels with each item."""
    if isinstance(samples.root, Path):
        return samples
    paths = [path for names in samples.groups.values() for path in names.paths]
    return replace(samples, root=samples.root.narrow(paths))


class ClusterRun:
    """Items carried out on a cluster; those that kill their processes are cut into single images.

    Attributes
    ----------
    computed
        Rows that went through the network.
    runtime
        Which one it came to be; "" if there was nothing to compute.
    peak_memory_bytes
        The most that a worker took; None where nobody says.
    prepare, make_worker
        What tasks and workers do, see `featcache.cluster.spread`.
    """

    def __init__(self, order: Order, config: ExtractConfig) -> None:
        assert order.plan.device
        self.computed, self.runtime = 0, ""
        self.peak_memory_bytes: int | None = None
        self._order, self._gpu = order, order.plan.device.type == "cuda"
        plan = order.plan
        nobody = narrow(order.samples.take(np.empty(0, np.int64)))
        listing = replace(plan.listing, root=nobody.root, classes=())
        bare = replace(plan, listing=listing, old=None, parts=())
        light = Order(job=order.job, samples=nobody, plan=bare, table=DigestTable([]), known=NOTHING_KNOWN)
        reader = replace(light, plan=replace(bare, backbone=None))
        assert plan.backbone
        self.prepare = partial(prepare_item, reader, plan.backbone.preprocessing)
        self.make_worker = partial(make_worker, bare, replace(config, workers=0, device=order.plan.device.type))

    def run(self, items: Sequence[Samples]) -> Iterator[Outcome]:
        """Carry all of them out.

        Raises
        ------
        ClusterError
            If something else than an image kills the processes.
        """
        try:
            yield from self._spread(items)
        except CrashedItemsError as error:
            for item in (items[position] for position in error.crashed):
                yield from self._run_one_by_one(item)

    def _spread(self, items: Sequence[Samples]) -> Iterator[Outcome]:
        answers = spread(items, prepare=self.prepare, make_worker=self.make_worker, gpu=self._gpu)
        for answer in answers:
            self.computed += answer["computed"]
            self.runtime = self.runtime or answer["runtime"]
            self.peak_memory_bytes = max(filter(None, (self.peak_memory_bytes, answer["peak"])), default=None)
            yield Outcome(answer["rows"], [BadImage(*one) for one in answer["bad"]])

    def _run_one_by_one(self, item: Samples) -> Iterator[Outcome]:
        """Each image by itself: what still kills its process is a bad one."""
        alone = [item.take(np.array([row])) for row in range(len(item))]
        try:
            yield from self._spread(alone)
        except CrashedItemsError as error:
            if len(error.crashed) == len(alone) > 1:
                raise ClusterError(
                    f"{error}, each of {len(alone)} images in a row: no image's fault, it seems; look at the memory "
                    f"and the logs of the cluster, and run the same command again"
                ) from error
            yield from (self._give_up(alone[position]) for position in error.crashed)

    def _give_up(self, item: Samples) -> Outcome:
        """Write down that an image kills whoever decodes it."""
        plan, reason = self._order.plan, f"its decoder crashed {TRIES} times"
        splits, bad = hash_groups(item)
        for split in splits.values():
            keep_bad(plan.output, plan.key, dict.fromkeys(split.digests, reason))
            bad += [BadImage(path, reason) for path in split.paths]
        return Outcome(self._order.count_rows(item), bad)


def prepare_item(order: Order, preprocessing: Preprocessing, samples: Samples) -> Prepared:
    """Read and decode some samples: what a task does.

    Gives the rows that are wanted of them, and the pixels.
    """
    meter = Meter()
    piece = read_piece(order, samples)
    plan = replace(order.plan, listing=piece.listing, missing=piece.missing)
    rows = make_rows(plan, piece.missing, preprocessing)
    decoded = [rows[row] for row in range(len(rows))]
    batch = rows.collate(decoded)
    images = batch.images
    return {
        "pixels": (images.permute(0, 2, 3, 1) if images.ndim == 4 else images).contiguous().numpy(),
        "rows": batch.rows.numpy(),
        "reasons": {row: reason for row, reason, _ in decoded if isinstance(reason, str)},
        "missing": [tuple(row) for row in piece.missing],
        "paths": find_paths(piece.listing, piece.missing),
        "wanted": order.count_rows(samples),
        "unreadable": [tuple(one) for one in piece.bad],
        "spent": meter.read(),
    }


def make_worker(plan: Plan, config: ExtractConfig) -> Work:
    """What holds the network and keeps rows: what a worker is."""
    return Worker(plan, config)


class Worker:
    """Turns prepared items into rows in parts; the network is made ready once."""

    def __init__(self, plan: Plan, config: ExtractConfig) -> None:
        self._plan, self._config = replace(plan, device=torch.device(config.device)), config
        self._execution: Execution | None = None
        self._memory = PeakMemory()
        caches = {path: open_cache(path) for path in plan.sources}
        self._there = DigestTable(list_digests(caches, plan.views, distrust=config.rehash))

    def __call__(self, prepared: Prepared) -> Answer:
        """Compute what was prepared and keep it, before it is told of."""
        plan, wanted = self._plan, [Row(*row) for row in prepared["missing"]]
        found = self._there.find(np.array([row.digest for row in wanted], "S64"))
        chosen = np.flatnonzero(found < 0)  # whoever decoded them did not know of any cache
        missing = [wanted[row] for row in chosen.tolist()]
        keeper = RowKeeper(plan, self._config, spent=prepared["spent"])
        rows = restore_rows(prepared, missing, chosen, plan)
        if missing:
            execution = self._execution or prepare_rows(plan, rows, self._config)
            for output in execution.run(rows):
                keeper.take(output, missing, prepared["paths"])
            keeper.writer.flush()
            self._execution = execution if keeper.n_rows else None  # made ready without any image it is another one
        keep_bad(plan.output, plan.key, keeper.reasons)
        return {
            "rows": prepared["wanted"],
            "computed": keeper.n_rows,
            "runtime": self._execution.runtime if self._execution else "",
            "peak": self._memory.read(),
            "bad": [*prepared["unreadable"], *map(tuple, keeper.bad)],
        }


def restore_rows(prepared: Prepared, missing: Sequence[Row], chosen: NDArray[np.int64], plan: Plan) -> DecodedRows:
    """The decoded images, as they were where they were decoded; of all that were prepared these rows."""
    assert plan.backbone
    images, number_of = torch.from_numpy(prepared["pixels"]), {row: i for i, row in enumerate(chosen.tolist())}
    usable = [at for at, row in enumerate(prepared["rows"].tolist()) if row in number_of]
    images = images if len(usable) == len(images) else images[usable]
    return DecodedRows(
        [prepared["paths"][row.image][0] for row in missing],
        images.permute(0, 3, 1, 2) if images.ndim == 4 else images,
        rows=np.array([number_of[int(prepared["rows"][at])] for at in usable], np.int64),
        reasons={number_of[row]: reason for row, reason in prepared["reasons"].items() if row in number_of},
        transform=make_pixel_transform(plan.backbone.preprocessing),
    )
