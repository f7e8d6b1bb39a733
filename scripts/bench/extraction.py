"""Extraction against the usual loop and against the machine's limit, measured in one process on a folder of images.

    python scripts/bench/extraction.py DATA --backbone resnet18 --weights none

The usual loop is what people write: ImageFolder, a DataLoader with batches of 4 and 4 workers, the network as torch
made it. Each runtime is `featcache.extract_features` as a whole: reading and hashing the files, preparing the network,
decoding, forwarding, writing the cache. All take turns, round after round, so that a slow minute of the machine hits
everybody; figures are medians. Seconds depend on the machine; the ratios count.

limit = 1 / (t_network + t_decode / cores), from the network alone by its fastest runtime (pixels in memory) and
decoding alone on one core. Features are compared with those of the usual loop. Peak memory is that of a process of its
own, `featcache extract`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import featcache
from featcache.backbones import Backbone, load_backbone
from featcache.config import RUNTIMES
from featcache.dataset import list_dataset
from featcache.errors import FeatcacheError
from featcache.images import ImageRows, count_cores, make_pixel_transform
from featcache.runtime import prepare_execution

CPU = torch.device("cpu")
USUAL = "the usual loop"


def copy_images(data: Path, folder: Path, n: int) -> Path:
    """At least n JPEGs of a data set, again and again; a comment in each makes it another file with the same pixels."""
    listing = list_dataset(data)
    paths = [path for path in listing.paths() if path.lower().endswith((".jpg", ".jpeg"))]
    for i in range(-(-n // len(paths)) * len(paths)):
        source = data / paths[i % len(paths)]
        comment = f"copy {i // len(paths)}".encode()
        bytes_ = source.read_bytes()
        target = folder / "all" / source.parent.name / f"{i // len(paths)}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bytes_[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + bytes_[2:])
    return folder / "all"


def run_usual_loop(images: Path, backbone: Backbone) -> NDArray[np.float32]:
    """Features (N, D) in the order of ImageFolder, as most people compute them."""
    spec = backbone.preprocessing
    steps = [
        transforms.Resize(spec.resize, interpolation=transforms.InterpolationMode(spec.interpolation)),
        transforms.CenterCrop(spec.crop),
        transforms.ToTensor(),
        transforms.Normalize(spec.mean, spec.std),
    ]
    loader = DataLoader(datasets.ImageFolder(str(images), transforms.Compose(steps)), batch_size=4, num_workers=4)
    with torch.no_grad():
        return torch.cat([backbone.network(inputs) for inputs, _ in loader]).numpy()


def run_featcache(images: Path, backbone: Backbone, runtime: str) -> NDArray[np.float32]:
    """Features (N, D) in the order of ImageFolder, through a cache file."""
    with tempfile.TemporaryDirectory() as folder:
        extraction = featcache.extract_features(images, Path(folder) / "f.h5", backbone=backbone, runtime=runtime)
        splits = extraction.cache.splits.values()
        by_path = {
            path: row
            for split in splits
            for path, row in zip(split.listing.paths, np.array(split.features), strict=True)
        }
    return np.stack([by_path[path] for path in sorted(by_path)])


class Decoded(ImageRows):
    """Images whose pixels are in memory: what is left is the network alone."""

    def __init__(self, rows: ImageRows, n: int) -> None:
        super().__init__(rows.root, rows.paths[:n], transform=rows.transform)
        self._items = [rows[row] for row in range(n)]

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | str, int]:
        return self._items[row]


def measure_sgemm() -> float:
    """Multiply-adds a second of a matrix product, in 1e9."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        torch.mm(a, b)
        n += 1
    return n * 1024**3 / (time.perf_counter() - started) / 1e9


def measure_peak(images: Path, name: str, weights: str, runtime: str) -> float:
    """Peak memory in MB of `featcache extract` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "featcache", "extract", str(images), "--backbone", name, "--weights", weights]
        process = subprocess.Popen(
            [*command, "--runtime", runtime, "-o", f"{folder}/f.h5"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return os.wait4(process.pid, 0)[2].ru_maxrss / 1024


def measure(work: Callable[[], object], seconds: dict[str, list[float]], name: str) -> object:
    started = time.perf_counter()
    result = work()
    seconds.setdefault(name, []).append(time.perf_counter() - started)
    return result


def list_runtimes(images: Path, backbone: Backbone, wanted: tuple[str, ...]) -> list[str]:
    """Those that run this network here; the others are named."""
    able = []
    for runtime in wanted or RUNTIMES[1:]:
        rows = ImageRows(
            images, [str(next(images.rglob("*.jpg")))], transform=make_pixel_transform(backbone.preprocessing)
        )
        try:
            prepare_execution(backbone.network, rows, device=CPU, runtime=runtime)
        except FeatcacheError as error:
            print(f"left out: {runtime}: {error}")
        else:
            able.append(runtime)
    return able


def lowest_cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    products = (one * other).sum(axis=1)
    return float((products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)).min())


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", "name", default="resnet18", show_default=True)
@click.option("--weights", default="default", show_default=True)
@click.option("--runtime", "wanted", multiple=True, help="Only these; repeatable.")
@click.option("--images", "n", default=1600, show_default=True, help="The data's JPEGs are repeated to so many.")
@click.option("--rounds", default=3, show_default=True, help="Each figure is the median of so many.")
def main(data: Path, name: str, weights: str, wanted: tuple[str, ...], n: int, rounds: int) -> None:
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers, cores or not
    backbone = load_backbone(name, weights=weights)
    seconds: dict[str, list[float]] = {}
    features: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = copy_images(data, Path(folder), n)
        paths = sorted(str(path) for path in images.rglob("*.jpg"))
        transform = make_pixel_transform(replace(backbone.preprocessing, decoder="torch"))
        rows = ImageRows(Path(), paths, transform=transform)
        some = Decoded(rows, min(384, len(paths)))
        runtimes = list_runtimes(images, backbone, wanted)
        sgemm = []
        for _ in range(rounds):
            sgemm.append(measure_sgemm())
            with torch.random.fork_rng(), one_thread():
                measure(lambda: [rows[row] for row in range(len(some))], seconds, "decoding")
            features[USUAL] = measure(lambda: run_usual_loop(images, backbone), seconds, USUAL)
            for runtime in runtimes:
                execution = measure(
                    lambda runtime=runtime: prepare_execution(backbone.network, some, device=CPU, runtime=runtime),
                    seconds,
                    f"{runtime}, prepared",
                )
                measure(lambda execution=execution: list(execution.run()), seconds, f"{runtime}, network")
                work = lambda runtime=runtime: run_featcache(images, backbone, runtime)  # noqa: E731
                features[runtime] = measure(work, seconds, runtime)
        peaks = {runtime: measure_peak(images, name, weights, runtime) for runtime in runtimes}
    report(name, weights, len(paths), len(some), rounds, runtimes, seconds, features, peaks, statistics.median(sgemm))


class one_thread:  # noqa: N801 - reads as the statement that it is
    """One core for what is inside."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def report(name, weights, n, n_some, rounds, runtimes, seconds, features, peaks, sgemm) -> None:
    cores = count_cores()
    median = {what: statistics.median(values) for what, values in seconds.items()}
    decode = median["decoding"] / n_some
    network = {runtime: median[f"{runtime}, network"] / n_some for runtime in runtimes}
    best = min(network, key=network.get)
    limit = 1 / (network[best] + decode / cores)
    usual = n / median[USUAL]
    print(f"{name}, weights {weights}, {n} images, {cores} cores, median of {rounds}, torch {torch.__version__}")
    print(f"matrix product {2 * sgemm:.0f} GFLOP/s; decoding alone {1 / decode:.0f} images/s a core")
    print(f"network alone by {best} {1 / network[best]:.1f} images/s; limit with decoding {limit:.1f} images/s")
    print(
        f"{'':16s} {'images/s':>9s} {'range':>15s} {'x usual':>8s} {'of limit':>9s} {'network':>8s} {'prepared':>9s} "
        f"{'cosine':>9s} {'peak MB':>8s}"
    )
    for what in (USUAL, *runtimes):
        rate = n / median[what]
        spread = f"{n / max(seconds[what]):.1f}-{n / min(seconds[what]):.1f}"
        line = f"{what:16s} {rate:9.1f} {spread:>15s} {rate / usual:8.2f} {rate / limit:9.2f}"
        if what in runtimes:
            cosine = lowest_cosine(features[what], features[USUAL])
            line += f" {1 / network[what]:8.1f} {median[f'{what}, prepared']:7.1f} s {cosine:9.6f} {peaks[what]:8.0f}"
        print(line)


if __name__ == "__main__":
    main()
