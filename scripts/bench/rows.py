"""Ten million rows in little memory: parts -> the final file, every digest of it, a head trained on it from the disk.

    python scripts/bench/rows.py --rows 10000000 --folder /data     # 22 GB of disk

The rows are synthetic: ten classes about centres of their own, 512 float16 each, one row in twenty to validate. First
they are written as sixteen shards on a cluster leave them, in parts beside the output, of runs of the listing that are
dealt out in turn. Then each step runs in a process of its own, whose peak memory is what the system counted (pages of
mapped files included): `list_parts`, `RowTable` and `write_cache` on a listing in memory, which is what an extraction
does at its end; `featcache cache verify`; `featcache train-head --solver sgd`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# NOTE: nothing large is imported here: a process begins with the peak memory of the one that started it.

WNIDS = (
    "01440764",
    "02102040",
    "02979186",
    "03000684",
    "03028079",
    "03394916",
    "03417042",
    "03425413",
    "03445777",
    "03888257",
)
N_SHARDS, RUN_ROWS, BATCH_ROWS = 16, 1 << 15, 4096
SPREAD = 0.15  # of the centres, in standard deviations of a feature
STEPS = ("make", "finalize", "verify", "train")


@dataclass(frozen=True)
class Job:
    """How much, and where."""

    folder: Path
    rows: int
    dim: int

    @property
    def output(self) -> Path:
        """The final file."""
        return self.folder / "features.h5"

    @property
    def n_val(self) -> int:
        """Rows that validate."""
        return self.rows // 20

    @property
    def extractor(self) -> dict[str, Any]:
        """What is said to have made the rows."""
        weights = {"requested": "imported", "name": "synthetic", "sha256": "0" * 64, "tensors_sha256": "0" * 64}
        return {
            "backbone": "imported:synthetic",
            "weights": weights,
            "layer": "synthetic",
            "dim": self.dim,
            "preprocessing": None,
            "precision": {"compute": "imported", "stored": "float16"},
        }


def make_listing(job: Job) -> dict[str, Any]:
    """The splits, ten classes one after the other in each; an image's digest is that of its path."""
    import numpy as np

    from featcache.dataset import Split
    from featcache.dataset.texts import HexTexts, Texts

    splits = {}
    for name, n in {"train": job.rows - job.n_val, "val": job.n_val}.items():
        labels = np.arange(n) * len(WNIDS) // n
        first = np.searchsorted(labels, np.arange(len(WNIDS)))
        paths = np.empty(n, f"S{len(name) + 33}")
        raw = np.empty((n, 32), np.uint8)
        for start in range(0, n, RUN_ROWS):
            own = labels[start : start + RUN_ROWS].tolist()
            block = [
                f"{name}/n{WNIDS[label]}/n{WNIDS[label]}_{start + i - first[label]:07d}.JPEG".encode()
                for i, label in enumerate(own)
            ]
            paths[start : start + len(own)] = block
            raw[start : start + len(own)] = np.frombuffer(
                b"".join(hashlib.sha256(path).digest() for path in block), np.uint8
            ).reshape(-1, 32)
        stats = np.random.default_rng(1).integers(1, 1 << 40, (n, 4))  # as of real files
        splits[name] = Split(paths=Texts(paths), labels=labels, digests=HexTexts(raw), stats=stats)
    return splits


def iterate_runs(job: Job, shard: int) -> Iterator[tuple[str, int, int]]:
    """Which rows (split, first, last) a shard computes, in runs of neighbours."""
    import numpy as np

    from featcache.shards import Shard

    rows, n_train = Shard(shard + 1, N_SHARDS).list_rows(job.rows), job.rows - job.n_val
    for name, mine in {"train": rows[rows < n_train], "val": rows[rows >= n_train] - n_train}.items():
        for run in np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1):
            if len(run):
                yield name, int(run[0]), int(run[-1]) + 1


def make_parts(job: Job) -> dict[str, Any]:
    """Write the rows as shards do; tell how many parts, and what share a rule gets right that knows how they are made.

    That rule weighs by the noise's own covariance: of so few rows it is not quite the identity, and a head learns it.
    """
    import numpy as np

    from featcache.cache import PartWriter, hash_extractor, parts_path

    generator = np.random.default_rng(0)
    centres = generator.normal(scale=SPREAD, size=(len(WNIDS), job.dim)).astype(np.float32)
    noise = generator.normal(size=(1 << 16, job.dim)).astype(np.float32)
    weights = np.linalg.solve(noise.T @ noise / len(noise), centres.T)
    splits, n_parts, right = make_listing(job), 0, 0
    for shard in range(N_SHARDS):
        writer = PartWriter(parts_path(job.output), hash_extractor(job.extractor), "float16")
        for name, first, last in iterate_runs(job, shard):
            for start in range(first, last, BATCH_ROWS):
                rows = slice(start, min(start + BATCH_ROWS, last))
                labels = splits[name].labels[rows]
                features = noise[generator.integers(len(noise), size=len(labels))]
                features *= generator.choice(np.float32([-1.1, -0.9, 0.9, 1.1]), size=(len(labels), 1))
                features += centres[labels]
                if name == "val":
                    scores = features @ weights - (centres.T * weights).sum(axis=0) / 2
                    right += int((scores.argmax(axis=1) == labels).sum())
                writer.add(list(splits[name].digests[rows]), features)
        writer.flush()
        n_parts += len(writer.parts)
    return {"parts": n_parts, "known": right / job.n_val}


def finalize(job: Job) -> dict[str, Any]:
    """Put the rows of the parts into the file, in the listing's order."""
    from featcache.cache import (
        FeatureCache,
        FeatureSplit,
        GatheredRows,
        PartSource,
        RowTable,
        hash_extractor,
        list_parts,
        write_cache,
    )

    started = time.perf_counter()
    splits = make_listing(job)
    listed = time.perf_counter()
    parts, damaged = list_parts(job.output, "rows", hash_extractor(job.extractor))
    assert not damaged
    table = RowTable([PartSource(part) for part in parts], job.dim, "<f2")
    found = {name: table.find(split.digests) for name, split in splits.items()}
    assert all((positions >= 0).all() for positions in found.values())
    cache = FeatureCache(
        classes=tuple(f"n{name}" for name in WNIDS),
        extractor=job.extractor,
        splits={
            name: FeatureSplit(listing=split, features=GatheredRows(table, found[name], job.dim))
            for name, split in splits.items()
        },
        provenance=describe_origin(job),
    )
    del table, found  # as at the end of an extraction, only the rows' positions are kept
    write_cache(job.output, cache)
    return {"listing": listed - started, "seconds": time.perf_counter() - listed}


def describe_origin(job: Job) -> dict[str, Any]:
    """As of rows that were computed elsewhere."""
    from featcache.config import ImportConfig
    from featcache.runs import describe_environment

    return {
        "data": str(job.folder),
        "table": "synthetic",
        "settings": ImportConfig(store="float16").result_settings(),
        "seconds": 0.0,
        "peak_memory_bytes": None,
        "device": "unknown",
        "runtime": "imported",
        "environment": describe_environment(),
        "bad": [],
    }


def run_step(job: Job, step: str) -> dict[str, Any]:
    """Run a step in a process of its own; what it printed, its seconds and its peak memory in MB."""
    train = ["train-head", str(job.output), "--solver", "sgd", "-o", str(job.folder / "head")]
    commands = {
        "verify": ["-m", "featcache", "cache", "verify", str(job.output), "--json"],
        "train": ["-m", "featcache", *train, "--json"],
    }
    own = [__file__, "--step", step, "--folder", str(job.folder), "--rows", str(job.rows), "--dim", str(job.dim)]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *commands.get(step, own)], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{step} failed")
        out.seek(0)
        printed = json.load(out)
    return {"printed": printed, "wall": time.perf_counter() - started, "peak": usage.ru_maxrss * 1024 / 1e6}


@click.command()
@click.option("--rows", default=1_000_000, help="Rows of features.")
@click.option("--dim", default=512, help="Features per row.")
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="Where to work; a temporary one.")
@click.option("--step", type=click.Choice(STEPS), hidden=True, help="Run one in this process.")
def main(rows: int, dim: int, folder: Path | None, step: str | None) -> None:
    """Measure and print."""
    if step and folder:
        print(json.dumps({"make": make_parts, "finalize": finalize}[step](Job(folder, rows, dim))))
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        job = Job(Path(place), rows, dim)
        made = run_step(job, "make")["printed"]
        print(f"{rows:,} rows of {dim} float16, {N_SHARDS} shards, {made['parts']:,} parts", flush=True)
        for name in STEPS[1:]:
            done = run_step(job, name)
            said = describe_step(name, done["printed"], made)
            print(f"{name:<10}{done['wall']:8.1f} s  peak memory {done['peak']:6.0f} MB  {said}", flush=True)


def describe_step(name: str, printed: Any, made: dict[str, Any]) -> str:
    """What a step found, in words."""
    if name == "finalize":
        return f"of which {printed['listing']:.1f} s to make up the listing"
    if name == "verify":
        return f"{'all right' if printed[0]['ok'] else 'DAMAGED'}, {printed[0]['rows']:,} rows"
    known = f"{made['known']:.4f} by a rule that knows how the rows are made"
    return f"accuracy {printed['val_accuracy']:.4f}, {known}; {printed['selection']}"


if __name__ == "__main__":
    main()
