"""Extraction against the usual loop and against the machine's limit, measured in one run on a folder of images.

    python scripts/bench/extraction.py DATA --backbone resnet18

The usual loop is what people write: ImageFolder, a DataLoader with batches of 4 and 4 workers, the network as torch
made it. Each runtime is `featcache.extract_features` as a whole: reading and hashing the files, preparing the network,
decoding, forwarding, writing the cache. All take turns, round after round, so that a slow minute of the machine hits
everybody; figures are medians. Each has a fresh process every time, so that nobody profits from another's settings;
imports and the making of the network are not counted, for nobody. Seconds depend on the machine; the ratios count.

limit = 1 / (t_network + t_decode / cores), from the network alone by its fastest runtime (pixels in memory) and
decoding alone on one core. Features are compared with those of the usual loop. Peak memory is that of the main process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

USUAL, DECODING, NETWORK = "the usual loop", "decoding alone", "network alone by "
N_SOME = 384  # images whose pixels are kept in memory


@dataclass(frozen=True)
class Task:
    """What one process is to do."""

    what: str
    images: str
    backbone: str
    weights: str
    precision: str
    features: str = ""  # where to save them


def list_jpegs(images: str | Path) -> list[str]:
    """Paths in the order of ImageFolder."""
    return sorted(str(path) for path in Path(images).rglob("*.jpg"))


def copy_images(data: Path, folder: Path, n: int) -> Path:
    """About n JPEGs of a data set, again and again; a comment in each makes it another file with the same pixels."""
    from featcache.dataset import list_dataset

    paths = [path for path in list_dataset(data).paths() if path.lower().endswith((".jpg", ".jpeg"))]
    for i in range(max(round(n / len(paths)), 1) * len(paths)):
        source = data / paths[i % len(paths)]
        comment = f"copy {i // len(paths)}".encode()
        bytes_ = source.read_bytes()
        target = folder / "all" / source.parent.name / f"{i // len(paths)}_{source.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bytes_[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + bytes_[2:])
    return folder / "all"


# --- what a process does ----------------------------------------------------------------------------------------------


def work(task: Task) -> None:
    """Do one task and print its seconds and its peak memory."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers, cores or not
    from featcache.backbones import load_backbone

    backbone = load_backbone(task.backbone, weights=task.weights)
    if task.what == USUAL:
        seconds, features = run_usual_loop(task, backbone)
    elif task.what == DECODING:
        seconds, features = decode(task, backbone)
    elif task.what.startswith(NETWORK):
        seconds, features = run_network_alone(task, backbone)
    else:
        seconds, features = run_featcache(task, backbone)
    if task.features and features is not None:
        np.save(task.features, features)
    print(json.dumps({**seconds, "peak": read_peak()}))


def read_peak() -> float:
    """Peak memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def run_usual_loop(task: Task, backbone: Any) -> tuple[dict[str, float], NDArray[np.float32]]:
    """Features (N, D) in the order of ImageFolder, as most people compute them."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    spec = backbone.preprocessing
    steps = [
        transforms.Resize(spec.resize, interpolation=transforms.InterpolationMode(spec.interpolation)),
        transforms.CenterCrop(spec.crop),
        transforms.ToTensor(),
        transforms.Normalize(spec.mean, spec.std),
    ]
    started = time.perf_counter()
    loader = DataLoader(datasets.ImageFolder(task.images, transforms.Compose(steps)), batch_size=4, num_workers=4)
    with torch.no_grad():
        features = torch.cat([backbone.network(inputs) for inputs, _ in loader]).numpy()
    return {"seconds": time.perf_counter() - started}, features


def run_featcache(task: Task, backbone: Any) -> tuple[dict[str, float], NDArray[np.float32]]:
    """Features (N, D) in the order of ImageFolder, through a cache file."""
    import featcache

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        extraction = featcache.extract_features(
            task.images, Path(folder) / "f.h5", backbone=backbone, runtime=task.what, precision=task.precision
        )
        seconds = time.perf_counter() - started
        by_path = {
            path: row
            for split in extraction.cache.splits.values()
            for path, row in zip(split.listing.paths, np.array(split.features), strict=True)
        }
    return {"seconds": seconds}, np.stack([by_path[path] for path in sorted(by_path)])


def make_rows(task: Task, backbone: Any, n: int) -> tuple[Any, dict[str, Any]]:
    """The first n images, decoded as the fast runtimes decode them, and the precision to compute in."""
    import torch

    from featcache.config import ExtractConfig
    from featcache.images import ImageRows, make_pixel_transform
    from featcache.runtime import find_ranges
    from featcache.stages.provide_backbone import settle_execution

    settled = settle_execution(backbone, ExtractConfig(precision=task.precision), torch.device("cpu"), None)
    transform, paths = make_pixel_transform(settled.preprocessing), list_jpegs(task.images)
    precision = dict(settled.precision)
    if precision["compute"] == "int8":
        precision["ranges"] = find_ranges(backbone.network, ImageRows(Path(), paths[:32], transform=transform))
    return ImageRows(Path(), paths[:n], transform=transform), precision


def decode(task: Task, backbone: Any) -> tuple[dict[str, float], None]:
    """Files to pixels on one core."""
    import torch

    from featcache.runtime import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    rows, _ = make_rows(replace(task, precision="fp32"), backbone, N_SOME)
    started = time.perf_counter()
    for row in range(len(rows)):
        rows[row]
    return {"seconds": time.perf_counter() - started, "images": len(rows)}, None


def run_network_alone(task: Task, backbone: Any) -> tuple[dict[str, float], None]:
    """Pixels in memory to features."""
    import torch

    from featcache.runtime import prepare_execution

    rows, precision = make_rows(task, backbone, N_SOME)
    items = [rows[row] for row in range(len(rows))]

    class Kept(type(rows)):  # type: ignore[misc]
        """Images whose pixels are in memory."""

        def __getitem__(self, row: int) -> Any:
            return items[row]

    kept = Kept(rows.root, rows.paths, transform=rows.transform)
    started = time.perf_counter()
    runtime = task.what.removeprefix(NETWORK)
    execution = prepare_execution(
        backbone.network, kept, device=torch.device("cpu"), runtime=runtime, precision=precision
    )
    ready = time.perf_counter()
    n = sum(len(output) for output in execution.run())
    return {"prepared": ready - started, "seconds": time.perf_counter() - ready, "images": n}, None


# --- the main process -------------------------------------------------------------------------------------------------


def measure(task: Task, script: str = __file__) -> dict[str, Any] | str:
    """What a process of its own measured, or the last line of why it could not."""
    command = [sys.executable, script, "--task", json.dumps(asdict(task)), "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it died"])[-1]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure_sgemm() -> float:
    """Floating-point operations a second of a matrix product with all cores, in 1e9."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        torch.mm(a, b)
        n += 1
    return 2 * n * 1024**3 / (time.perf_counter() - started) / 1e9


def lowest_cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of two tables of features (N, D), row by row."""
    products = (one.astype(np.float64) * other).sum(axis=1)
    return float((products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)).min())


def largest_error(one: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Relative to the reference, row by row."""
    return float((np.linalg.norm(one - reference, axis=1) / np.linalg.norm(reference, axis=1)).max())


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--backbone", "name", default="resnet18", show_default=True)
@click.option("--weights", default="none", show_default=True, help="Random ones are as fast as any.")
@click.option("--runtime", "wanted", multiple=True, help="Only these; repeatable.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--images", "n", default=1600, show_default=True, help="The data's JPEGs are repeated to about so many.")
@click.option("--rounds", default=3, show_default=True, help="Each figure is the median of so many.")
@click.option("--task", hidden=True, default="")
def main(
    data: Path, name: str, weights: str, wanted: tuple[str, ...], precision: str, n: int, rounds: int, task: str
) -> None:
    """Measure extraction from DATA."""
    if task:
        work(Task(**json.loads(task)))
        return
    from featcache.config import RUNTIMES

    runtimes = list(wanted or RUNTIMES[1:])
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = copy_images(data, Path(folder), n)
        plan = Task("", str(images), name, weights, precision)
        sgemm, left_out = [], {}
        for _ in range(rounds):
            sgemm.append(measure_sgemm())
            for what in (USUAL, DECODING, *runtimes, *(NETWORK + runtime for runtime in runtimes)):
                if what.removeprefix(NETWORK) in left_out:
                    continue
                saved = "" if what == DECODING or what.startswith(NETWORK) else f"{folder}/{what}.npy"
                answer = measure(replace(plan, what=what, features=saved))
                if isinstance(answer, str):
                    print(f"left out: {what}: {answer}")
                    left_out[what.removeprefix(NETWORK)] = answer
                else:
                    figures.setdefault(what, []).append(answer)
        if USUAL in left_out or len(left_out) == len(runtimes):
            raise click.ClickException(f"nothing to compare: {left_out}")
        features = {what: np.load(f"{folder}/{what}.npy") for what in (USUAL, *runtimes) if what not in left_out}
        n = len(list_jpegs(images))
    report(plan, n, [runtime for runtime in runtimes if runtime not in left_out], figures, features, sgemm)


def report(
    task: Task,
    n: int,
    runtimes: list[str],
    figures: dict[str, list[dict[str, Any]]],
    features: dict[str, NDArray[np.float32]],
    sgemm: list[float],
) -> None:
    """Print the table."""
    import torch

    from featcache.images import count_cores

    def median(what: str, key: str = "seconds") -> float:
        return statistics.median(figure[key] for figure in figures[what])

    cores = count_cores()
    decode_seconds = median(DECODING) / figures[DECODING][0]["images"]
    network = {r: median(NETWORK + r) / figures[NETWORK + r][0]["images"] for r in runtimes}
    best = min(network, key=lambda runtime: network[runtime])
    limit, usual = 1 / (network[best] + decode_seconds / cores), n / median(USUAL)
    words = f"{task.backbone}, weights {task.weights}, {task.precision}, {n} images, {cores} cores"
    print(f"{words}, median of {len(figures[USUAL])}, torch {torch.__version__}")
    print(f"matrix product {statistics.median(sgemm):.0f} GFLOP/s; decoding {1 / decode_seconds:.0f} images/s and core")
    print(f"network alone by {best} {1 / network[best]:.1f} images/s; limit with decoding {limit:.1f} images/s")
    header = (
        f"{'':16s} {'images/s':>9s} {'range':>13s} {'x usual':>8s} {'of limit':>9s} {'network':>8s} {'prepared':>9s}"
    )
    print(f"{header} {'cosine':>9s} {'error':>8s} {'peak MB':>8s}")
    for what in (USUAL, *runtimes):
        rates = [n / figure["seconds"] for figure in figures[what]]
        rate = statistics.median(rates)
        spread = f"{min(rates):.1f}-{max(rates):.1f}"
        line = f"{what:16s} {rate:9.1f} {spread:>13s} {rate / usual:8.2f} {rate / limit:9.2f}"
        if what in runtimes:
            line += f" {1 / network[what]:8.1f} {median(NETWORK + what, 'prepared'):7.1f} s"
            line += f" {lowest_cosine(features[what], features[USUAL]):9.6f}"
            line += f" {largest_error(features[what], features[USUAL]):8.0e}"
        else:
            line += " " * (9 + 10 + 10 + 9)
        print(f"{line} {median(what, 'peak'):8.0f}")


if __name__ == "__main__":
    main()
