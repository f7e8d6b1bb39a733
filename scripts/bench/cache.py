"""What the cache costs: checking, writing, finishing, verifying, reading; as ratios to plain numpy in the same run.

    python scripts/bench/cache.py                 # 100,000 files, 1,000,000 rows of 512: 8 GB of disk
    python scripts/bench/cache.py --rows 100000 --only read --only layout

Every section runs in a process of its own, so that its peak memory is its own. Seconds depend on the machine; the
ratios count. Files are in the page cache in all measurements, plain numpy's too.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np

BLOCK = 4096
SECTIONS = ("rerun", "parts", "finish", "verify", "read", "layout")


@dataclass(frozen=True)
class Job:
    """How much, and where."""

    folder: Path
    rows: int
    dim: int
    files: int


def timed(work: Callable[[], object], repeat: int = 1) -> float:
    """The best of a few."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def make_rows(n: int, dim: int, seed: int) -> np.ndarray:
    """Like features after a ReLU and a mean: positive, no two alike."""
    return np.random.default_rng(seed).exponential(size=(n, dim), scale=0.9).astype(np.float32)


def digests_of(start: int, stop: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(start, stop)]


def describe_extractor(dim: int) -> dict[str, Any]:
    return {"backbone": "any", "weights": "any", "dim": dim, "precision": {"compute": "float32", "stored": "float32"}}


def make_cache(n: int, features: Any, extractor: dict[str, Any], paths: tuple[str, ...] = ()) -> Any:
    from featcache.cache import FeatureCache, FeatureSplit
    from featcache.dataset import Split

    paths = paths or tuple(f"train/class/image_{i:08d}.jpg" for i in range(n))
    split = FeatureSplit(
        listing=Split(paths=paths, labels=np.zeros(n, np.int64), digests=tuple(digests_of(0, n))), features=features
    )
    empty = FeatureSplit(
        listing=Split(paths=(), labels=np.zeros(0, np.int64), digests=()),
        features=np.empty((0, features.shape[1]), np.float32),
    )
    return FeatureCache(
        classes=("class",),
        extractor=extractor,
        splits={"train": split, "val": empty},
        provenance={"data": "", "bad": []},
    )


def bench_rerun(job: Job) -> list[str]:
    """`extract` on unchanged images, against looking at them and against reading them."""
    folder, files = job.folder, job.files
    from featcache.dataset import KnownFiles, list_dataset
    from featcache.stages.extract import extract_features

    data = folder / "data"
    for i in range(files):
        place = data / ("train", "val")[i % 10 == 0] / f"class_{i // 10 % 50:02d}"
        if i < 500:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"image_{i:06d}.jpg").write_bytes(i.to_bytes(8, "little") * 500)
    time.sleep(2.1)  # younger files prove nothing
    paths = [entry.path for place, _, _ in os.walk(data) for entry in os.scandir(place) if entry.is_file()]
    stat = timed(lambda: [os.stat(path) for path in paths], 3)  # noqa: PTH116
    read = timed(lambda: [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths])
    listing = list_dataset(data)
    stats = np.concatenate([split.stats for split in listing.splits.values()])
    digests = np.concatenate([np.array(split.digests, "S64") for split in listing.splits.values()])
    known = KnownFiles(stats, digests)
    check = timed(lambda: list_dataset(data, known=known), 3)
    output = folder / "f.h5"
    settings = {"weights": "none", "val_fraction": 0.2, "seed": 0}
    write_rerun_cache(output, listing, settings)
    done: list[Any] = []
    whole = timed(lambda: done.append(extract_features(data, output, weights="none")), 3)
    assert done[-1].computed == 0
    return [
        f"{files:,} unchanged files of 4 kB, listed and checked: {check:.2f} s",
        f"  os.stat of each, and nothing else: {stat:.2f} s (x{check / stat:.1f})",
        f"  reading and hashing each: {read:.2f} s (x{check / read:.2f})",
        f"the whole of `extract` on them, network loaded and cache compared: {whole:.2f} s, 0 rows computed",
    ]


def write_rerun_cache(output: Path, listing: Any, settings: dict[str, Any]) -> None:
    """A cache of the listing as `extract` would have left it."""
    from featcache.backbones import load_backbone
    from featcache.cache import FeatureCache, FeatureSplit, write_cache
    from featcache.config import ExtractConfig

    extractor = load_backbone("resnet18", weights="none").describe()
    splits = {
        name: FeatureSplit(listing=split, features=make_rows(len(split), extractor["dim"], 0))
        for name, split in listing.splits.items()
    }
    provenance = {
        "data": str(listing.root.resolve()),
        "settings": ExtractConfig(**settings).result_settings(),
        "bad": [],
        "seconds": 0.0,
    }
    write_cache(
        output, FeatureCache(classes=listing.classes, extractor=extractor, splits=splits, provenance=provenance)
    )


def bench_parts(job: Job) -> list[str]:
    """Rows as they are computed, in batches of 64, into parts; against the same bytes by plain numpy."""
    folder, rows, dim = job.folder, job.rows, job.dim
    from featcache.cache import PartWriter, hash_extractor, parts_path

    extractor = describe_extractor(dim)
    base = make_rows(64 * 512, dim, 0)
    digests = digests_of(0, rows)

    def batches() -> Any:
        for start in range(0, rows, 64):
            at = start % len(base)
            yield start, base[at : at + min(64, rows - start)]

    def plain() -> None:
        with (folder / "plain.bin").open("wb") as file:
            for _, batch in batches():
                batch.tofile(file)
            os.fsync(file.fileno())

    def ours() -> None:
        writer = PartWriter(parts_path(folder / "f.h5"), hash_extractor(extractor), "float32")
        for start, batch in batches():
            writer.add(digests[start : start + len(batch)], batch)
        writer.flush()

    slow, fast = timed(ours), timed(plain)
    size = rows * dim * 4 / 1e9
    n = len(list(parts_path(folder / "f.h5").iterdir()))
    return [
        f"{rows:,} rows of {dim} into {n} parts, each hashed and synced: {slow:.1f} s",
        f"  plain numpy: {fast:.1f} s (x{slow / fast:.1f}); {size / slow:.2f} against {size / fast:.2f} GB/s",
        f"  peak memory: {peak_megabytes():.0f} MB",
    ]


def bench_finish(job: Job) -> list[str]:
    """Parts into the finished file, checked and synced; against copying the plain file."""
    folder, rows, dim = job.folder, job.rows, job.dim
    from featcache.cache import GatheredRows, PartSource, RowTable, hash_extractor, list_parts, write_cache

    extractor = describe_extractor(dim)
    cache = make_cache(rows, np.empty((0, dim), np.float32), extractor)
    before = peak_megabytes()

    def ours() -> None:
        parts, damaged = list_parts(folder / "f.h5", "rows", hash_extractor(extractor))
        assert not damaged
        table = RowTable([PartSource(part) for part in parts], dim, "<f4")
        train = cache.splits["train"]
        positions = table.find(np.array(train.listing.digests, "S64"))
        assert (positions >= 0).all()
        gathered = replace(train, features=GatheredRows(table, positions, dim))
        write_cache(folder / "f.h5", replace(cache, splits={**cache.splits, "train": gathered}))

    def plain() -> None:
        with (folder / "plain.bin").open("rb") as source, (folder / "copy.bin").open("wb") as target:
            while piece := np.fromfile(source, np.float32, BLOCK * dim).tobytes():
                target.write(piece)
            os.fsync(target.fileno())
        (folder / "copy.bin").unlink()

    slow = timed(ours)
    peak = peak_megabytes()
    fast = timed(plain)
    size = (folder / "f.h5").stat().st_size / 1e9
    return [
        f"{rows:,} rows from parts to the finished file of {size:.2f} GB, read back and checked: {slow:.1f} s",
        f"  a plain copy: {fast:.1f} s (x{slow / fast:.1f}); {size / slow:.2f} against {size / fast:.2f} GB/s",
        f"  peak memory: {peak:.0f} MB, of which {before:.0f} MB are the listing of the images",
    ]


def bench_verify(job: Job) -> list[str]:
    """`cache verify`; against SHA-256 of the plain file."""
    folder = job.folder
    from featcache.cache import verify_cache

    slow = timed(lambda: verify_cache(folder / "f.h5"))
    peak = peak_megabytes()

    def plain() -> None:
        with (folder / "plain.bin").open("rb") as file:
            hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())

    fast = timed(plain)
    return [
        f"verify: {slow:.1f} s",
        f"  SHA-256 of the plain file on one core: {fast:.1f} s (x{slow / fast:.2f})",
        f"  peak memory: {peak:.0f} MB",
    ]


def bench_read(job: Job) -> list[str]:
    """All features in order, block by block, into memory; against a plain numpy memory map."""
    folder, rows, dim = job.folder, job.rows, job.dim
    from featcache.cache import CacheReader, open_cache, read_cache

    plain = np.memmap(folder / "plain.bin", np.float32, "r", shape=(rows, dim))
    target = np.empty((BLOCK, dim), np.float32)

    def copy(features: Any) -> None:
        for start in range(0, rows, BLOCK):
            block = features[start : start + BLOCK]
            target[: len(block)] = block

    def read_with_h5py() -> None:
        with h5py.File(folder / "f.h5") as file:
            column = file["train/features"]
            for start in range(0, rows, BLOCK):
                n = min(BLOCK, rows - start)
                column.read_direct(target, np.s_[start : start + n], np.s_[:n])

    def read_slices() -> None:
        for start in range(0, rows, BLOCK):
            reader.read_features("train", start, min(start + BLOCK, rows))

    order = np.random.default_rng(0).permutation(rows)[: 64 * BLOCK].reshape(-1, 64)
    mapped = open_cache(folder / "f.h5").splits["train"].features
    copy(plain)
    base = timed(lambda: copy(plain), 3)
    size = rows * dim * 4 / 1e9
    lines = [f"reading {size:.2f} GB in order, plain numpy memory map: {size / base:.1f} GB/s"]
    with CacheReader(folder / "f.h5") as reader:
        ways = {
            "the features of open_cache, mapped": lambda: copy(mapped),
            "CacheReader, slice by slice": read_slices,
            "h5py alone, as a stranger would": read_with_h5py,
        }
        for name, work in ways.items():
            took = timed(work, 3)
            lines.append(f"  {name}: {size / took:.1f} GB/s, {base / took:.2f} of the memory map's speed")
    shuffled = timed(lambda: [plain[np.sort(rows)] for rows in order], 3)
    ours = timed(lambda: [mapped[np.sort(rows)] for rows in order], 3)
    lines.append(
        f"  batches of 64 random rows: {order.size / ours:,.0f} rows/s, {shuffled / ours:.2f} of the map's speed"
    )
    if rows <= 1_000_000:
        checked = timed(lambda: read_cache(folder / "f.h5"), 2)
        whole = timed(lambda: np.fromfile(folder / "plain.bin", np.float32), 2)
        lines.append(
            f"  read_cache, all rows into memory and every digest checked: {checked:.1f} s; np.fromfile {whole:.1f} s"
        )
    return lines


LAYOUTS: dict[str, dict[str, Any]] = {
    "in one piece": {},
    **{f"chunks of {n} rows": {"chunks": n} for n in (64, 256, 1024, 4096)},
    **{f"chunks of {n} rows, fletcher32": {"chunks": n, "fletcher32": True} for n in (64, 256, 1024, 4096)},
    "chunks of 256 rows, lzf + shuffle": {"chunks": 256, "compression": "lzf", "shuffle": True},
    "chunks of 256 rows, gzip 1 + shuffle": {
        "chunks": 256,
        "compression": "gzip",
        "compression_opts": 1,
        "shuffle": True,
    },
}


def bench_layout(job: Job) -> list[str]:
    """Ways to lay out features in HDF5."""
    folder, rows, dim = job.folder, job.rows, job.dim
    n = min(rows, 100_000)
    features = make_rows(n, dim, 0)
    order = np.random.default_rng(0).permutation(n)[:6400].reshape(-1, 64)
    size = features.nbytes / 1e9
    target = np.empty((BLOCK, dim), np.float32)
    lines = [f"{n:,} rows of {dim} float32" + " " * 14 + "size   write     in order   64 random rows"]
    for name, options in LAYOUTS.items():
        chosen = {**options, **({"chunks": (options["chunks"], dim)} if options else {})}
        path = folder / "layout.h5"

        def write(chosen: dict[str, Any] = chosen, path: Path = path) -> None:
            with h5py.File(path, "w", libver=("v110", "v110")) as file:
                file.create_dataset("x", data=features, **chosen)

        wrote = timed(write, 2)
        with h5py.File(path) as file:
            column = file["x"]

            def read(column: Any = column) -> None:
                for start in range(0, n, BLOCK):
                    m = min(BLOCK, n - start)
                    column.read_direct(target, np.s_[start : start + m], np.s_[:m])

            took = timed(read, 3)
            at_random = timed(lambda column=column: [column[np.sort(rows)] for rows in order[:20]])  # type: ignore[misc]
        share = path.stat().st_size / features.nbytes
        lines.append(
            f"  {name:<38}{share:5.2f} {size / wrote:6.2f} GB/s {size / took:6.1f} GB/s "
            f"{20 * 64 / at_random:10,.0f} rows/s"
        )
        path.unlink()
    return lines


WORK: dict[str, Callable[[Job], list[str]]] = {
    "rerun": bench_rerun,
    "parts": bench_parts,
    "finish": bench_finish,
    "verify": bench_verify,
    "read": bench_read,
    "layout": bench_layout,
}
NEEDS = {"finish": ["parts"], "verify": ["parts", "finish"], "read": ["parts", "finish"]}


@click.command()
@click.option("--rows", default=1_000_000, help="Rows of features.")
@click.option("--dim", default=512, help="Features per row.")
@click.option("--files", default=100_000, help="Image files of the re-run.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="These sections (and what they need).")
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="Where to work; a temporary one.")
@click.option("--section", type=click.Choice(SECTIONS), hidden=True, help="Run one in this process.")
def main(rows: int, dim: int, files: int, only: tuple[str, ...], folder: Path | None, section: str | None) -> None:
    """Measure and print."""
    if section and folder:
        print(json.dumps(WORK[section](Job(folder, rows, dim, files))))
        return
    wanted = {name for chosen in only or SECTIONS for name in (*NEEDS.get(chosen, []), chosen)}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in SECTIONS:
            if name not in wanted:
                continue
            command = [sys.executable, __file__, "--section", name, "--folder", place]
            command += ["--rows", str(rows), "--dim", str(dim), "--files", str(files)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"== {name}: {(WORK[name].__doc__ or '').strip()}", flush=True)
            for line in json.loads(done.stdout):
                print(line, flush=True)


if __name__ == "__main__":
    main()
