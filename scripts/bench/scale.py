"""Beyond one machine: what a Ray cluster costs beside one process, and how far more machines help.

    python scripts/bench/scale.py ../shared/data/imagenette160_subset --backbone efficientnet_lite0
    python scripts/bench/scale.py DATA --only one --only overhead --only model --images 1000000 --cores 32

one       on one core, in this process: seconds to read and decode an image, and to compute and keep its row
plain     `featcache extract` on all cores of this machine
cluster   the same on a Ray cluster of three nodes on this machine: a head, and two with a CPU each
overhead  what an item of work costs the driver, measured with items that are nothing
model     a simulation of 1 to 16 machines with these figures

`cluster` and `overhead` start Ray, which listens on the network; run them where that is no matter (on Linux inside
`unshare --net --map-root-user` after `ip link set lo up`). Rates depend on the machine; the ratios count.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

SECTIONS = ("one", "plain", "cluster", "overhead", "model")
NODES = (1, 2, 4, 8, 16)
EMPTY_ITEMS = 300


@dataclass(frozen=True)
class Costs:
    """What was measured, or is assumed.

    Attributes
    ----------
    prepare, work
        Seconds of one core for an item of work: reading and decoding; computing and keeping.
    spread
        Standard deviation of both, as a share of the mean.
    read, decoded
        Bytes of an item's files, and of its pixels.
    driver
        Seconds that an item costs the driver, which is alone.
    start
        Seconds until the first item begins.
    """

    prepare: float
    work: float
    spread: float
    read: int
    decoded: int
    images: int
    driver: float = 0.003
    start: float = 10.0


@dataclass(frozen=True)
class Machines:
    """What the machines have.

    Attributes
    ----------
    cores
        Of each.
    storage, network
        Bytes per second: of the storage that all of them read, of each machine's network.
    """

    cores: int
    storage: float
    network: float


def simulate(n_nodes: int, n_items: int, costs: Costs, machines: Machines, seed: int = 0) -> float:
    """Seconds until all items are done.

    Each item is dealt out by the driver, which can only do one thing at a time, read through the storage that all
    share, decoded by a core that is free, sent to a worker that is free (over the network if it is on another machine),
    and computed. The cores of a machine are divided between decoding and workers as their work is.
    """
    draw = np.random.default_rng(seed)
    noise = np.maximum(draw.normal(1.0, costs.spread, (n_items, 2)), 0.2)
    n_workers = max(1, min(machines.cores - 1, round(machines.cores * costs.work / (costs.work + costs.prepare))))
    decoders = [(costs.start, node) for node in range(n_nodes) for _ in range(machines.cores - n_workers)]
    workers: list[list[float]] = [[costs.start] * n_workers for _ in range(n_nodes)]
    heapq.heapify(decoders)
    driver = storage = end = costs.start
    for prepare_noise, work_noise in noise.tolist():
        driver += costs.driver
        free, node = heapq.heappop(decoders)
        begun = max(driver, free)
        storage = max(storage, begun) + costs.read / machines.storage
        decoded = max(begun + costs.prepare * prepare_noise, storage)
        heapq.heappush(decoders, (decoded, node))
        nearest = min(range(n_nodes), key=lambda other: max(workers[other][0], decoded) + (other != node) * 1e-9)
        arrived = decoded + (costs.decoded / machines.network if nearest != node else 0.0)
        done = max(arrived, workers[nearest][0]) + costs.work * work_noise
        heapq.heapreplace(workers[nearest], done)
        end = max(end, done)
    return end


def print_model(costs: Costs, machines: Machines, n_images: int) -> None:
    n_items = max(n_images // costs.images, 1)
    alone = simulate(1, n_items, costs, machines)
    limit = machines.storage / costs.read * costs.images
    print(
        f"model: {n_images:,} images in {n_items:,} items of {costs.images}; {machines.cores} cores a machine; an item "
        f"takes {costs.prepare:.2f} s of a core to decode and {costs.work:.2f} s to compute, the driver "
        f"{1000 * costs.driver:.1f} ms; storage gives {machines.storage / 1e9:.1f} GB/s, which is {limit:,.0f} images/s"
    )
    print("machines   images/s     seconds  efficiency  per added machine")
    before, added = 0.0, 0
    for n in NODES:
        seconds = alone if n == 1 else simulate(n, n_items, costs, machines)
        rate = n_images / seconds
        each = (rate - before) / (n - added) / (n_images / alone)
        limited = "  storage limits it" if rate > 0.9 * limit else ""
        print(f"{n:8d} {rate:10,.0f} {seconds:11,.0f} {alone / seconds / n:11.2f} {each:18.2f}{limited}")
        before, added = rate, n


def measure_one(data: Path, backbone: str, weights: str, n_images: int) -> Costs:
    """Prepare and carry out a few items in this process, on one core."""
    from featcache.config import ExtractConfig
    from featcache.progress import SILENT
    from featcache.stages import spread
    from featcache.stages.order import place_order
    from featcache.stages.spread import ClusterRun, cut_items

    spread.FEW_ITEMS = 1  # items as large as those of a large data set
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = ExtractConfig(backbone=backbone, weights=weights, engine="ray")
    with tempfile.TemporaryDirectory() as folder:
        order = place_order(data, Path(folder, "f.h5"), config, SILENT)
        chosen = np.linspace(0, len(order.samples) - 1, min(n_images, len(order.samples))).astype(np.int64)
        run = ClusterRun(order, config)
        items = cut_items(order, np.unique(chosen))
        work = run.make_worker()
        times, decoded = [], 0
        for item in items:
            started = time.perf_counter()
            prepared = run.prepare(item)
            between = time.perf_counter()
            work(prepared)
            times.append((between - started, time.perf_counter() - between))
            decoded = max(decoded, prepared["pixels"].nbytes)
        paths = [path for item in items for names in item.groups.values() for path in names.paths]
        read = sum(Path(str(order.samples.root), path).stat().st_size for path in paths)
    seconds = np.array(times[1:] or times)  # the network is made ready in the first
    prepare, compute = seconds.mean(axis=0).tolist()
    variation = float((seconds.std(axis=0) / seconds.mean(axis=0)).max())
    n = len(items[0])
    print(
        f"one core: {1000 * prepare / n:.1f} ms an image to read and decode, {1000 * compute / n:.1f} ms to compute "
        f"and keep, {n / (prepare + compute):.1f} images/s; items of {n}, {decoded / 1e6:.0f} MB decoded, times vary "
        f"by {variation:.0%}"
    )
    return Costs(prepare=prepare, work=compute, spread=variation, read=read // len(items), decoded=decoded, images=n)


def measure_plain(data: Path, backbone: str, weights: str, folder: Path) -> float:
    from featcache.stages.extract import extract_features

    done = extract_features(data, folder / "plain.h5", backbone=backbone, weights=weights)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    rate = done.computed / done.seconds
    print(f"plain: {done.computed} rows in {done.seconds:.1f} s, {rate:.1f} rows/s; peak memory {peak:.0f} MB")
    return rate


@contextlib.contextmanager
def three_nodes() -> Any:
    """A head without CPUs and two machines with one each."""
    from featcache.cluster import import_ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    import_ray()
    from ray.cluster_utils import Cluster

    more = {"object_store_memory": 150 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **more}, shutdown_at_exit=True)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, wait=True, **more)
        yield cluster
    finally:
        cluster.shutdown()


def measure_cluster(data: Path, backbone: str, weights: str, folder: Path) -> None:
    from featcache.cache import open_cache
    from featcache.cluster import join_cluster
    from featcache.config import ExtractConfig
    from featcache.progress import SILENT
    from featcache.stages.merge import merge_shards
    from featcache.stages.order import place_order
    from featcache.stages.spread import ClusterRun, cut_items

    with three_nodes() as cluster:
        config = ExtractConfig(backbone=backbone, weights=weights, engine="ray", address=cluster.address)
        started = time.perf_counter()
        order = place_order(data, folder / "ray.h5", config, SILENT)
        run = ClusterRun(order, config)
        with join_cluster(cluster.address):
            items = cut_items(order, np.arange(len(order.samples)))
            times = [(time.perf_counter(), len(outcome)) for outcome in run.run(items)]
        seconds = times[-1][0] - started
    (first, n_first), later = times[0], times[1:]
    steady = sum(n for _, n in later) / (times[-1][0] - first)
    merging = time.perf_counter()
    merged = merge_shards(folder / "ray.h5")
    merging = time.perf_counter() - merging
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    worker = (run.peak_memory_bytes or 0) / 1e6
    print(
        f"cluster: {run.computed} rows in {seconds:.1f} s, the first {n_first} after {first - started:.1f} s, then "
        f"{steady:.1f} rows/s; put together in {merging:.1f} s; peak memory {peak:.0f} MB of the driver, "
        f"{worker:.0f} MB of a worker"
    )
    if (folder / "plain.h5").exists():
        same = open_cache(folder / "plain.h5").content_sha256 == merged.cache.content_sha256
        print(f"cluster: {'the same' if same else 'NOT the same'} bytes as one process gave")


def do_nothing(item: Any) -> dict[str, Any]:
    return {"item": item}


def make_idler() -> Any:
    return do_nothing


def list_children() -> set[int]:
    return {int(child) for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


def read_cpu_seconds(pids: set[int]) -> float:
    """Of these processes, user and system."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def measure_overhead() -> float:
    """Seconds of the driver's processor that an item costs, when two machines with a CPU each do nothing."""
    from featcache.cluster import join_cluster, spread

    with three_nodes() as cluster:
        machines = list_children()
        with join_cluster(cluster.address):
            driver, how = list_children() - machines, {"prepare": do_nothing, "make_worker": make_idler}
            for _ in spread(list(range(10)), **how):
                pass
            started, cpu = time.perf_counter(), read_cpu_seconds(driver)
            times = [time.perf_counter() for _ in spread(list(range(EMPTY_ITEMS)), **how)]
            cpu = (read_cpu_seconds(driver) - cpu) / EMPTY_ITEMS
    each = (times[-1] - times[0]) / (len(times) - 1)
    print(
        f"overhead: {1000 * each:.1f} ms an item with everything on this machine, of which {1000 * cpu:.1f} ms are the "
        f"driver's; {times[0] - started:.1f} s before the first comes back"
    )
    return cpu


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", default="resnet18")
@click.option("--weights", default=None, help="default where --backbone is efficientnet_lite0, else none")
@click.option("--only", multiple=True, type=click.Choice(SECTIONS))
@click.option("--probe", default=2048, help="images for `one`")
@click.option("--images", default=10_000_000, help="for the model")
@click.option("--cores", default=16, help="of a machine of the model")
@click.option("--storage", default=2.0, help="GB/s that the model's storage gives to all machines together")
@click.option("--network", default=1.25, help="GB/s of a machine of the model")
@click.option("--section", default=None, hidden=True)
@click.option("--folder", default=None, type=click.Path(path_type=Path), hidden=True)
def main(
    data: Path, backbone: str, weights: str | None, only: tuple[str, ...], probe: int, images: int, cores: int,
    storage: float, network: float, section: str | None, folder: Path | None,
) -> None:  # fmt: skip
    weights = weights or ("default" if backbone == "efficientnet_lite0" else "none")
    if section:
        result: Any = None
        assert folder
        if section == "one":
            result = asdict(measure_one(data, backbone, weights, probe))
        elif section == "plain":
            measure_plain(data, backbone, weights, folder)
        elif section == "cluster":
            measure_cluster(data, backbone, weights, folder)
        else:
            result = measure_overhead()
        (folder / f"{section}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as place:
        for name in SECTIONS[:-1]:
            if not only or name in only:
                arguments = [str(data), "--backbone", backbone, "--weights", weights, "--probe", str(probe)]
                command = [sys.executable, __file__, *arguments, "--section", name, "--folder", place]
                subprocess.run(command, check=True)
        if only and "model" not in only:
            return
        measured = Path(place, "one.json")
        if not measured.exists():
            raise click.UsageError("the model needs what `one` measures: --only one --only model")
        costs = Costs(**json.loads(measured.read_text()))
        if Path(place, "overhead.json").exists():
            costs = Costs(**{**asdict(costs), "driver": json.loads(Path(place, "overhead.json").read_text())})
        print_model(costs, Machines(cores=cores, storage=storage * 1e9, network=network * 1e9), images)


if __name__ == "__main__":
    main()
