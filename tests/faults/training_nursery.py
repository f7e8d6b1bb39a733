"""Experiments with fine-tunings that die, as nursery.py has them with extractions.

``python tests/faults/training_nursery.py EXPERIMENT FOLDER [N]`` prints one JSON object with its counts.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nursery
import torch
from conftest import TinyFamily
from disks import FailingDisk, WatchedDisk

from featcache import files
from featcache.backbones import families
from featcache.cli import run
from featcache.files import hash_file
from featcache.training import checkpoints

# What has most to remember: several stages, an adaptive optimiser, a schedule, averages, mixed batches.
LADEN = "--mode staged --epochs 3 --optimizer adamw --schedule one-cycle --ema 0.9 --mixup 0.4 --label-smoothing 0.1"
RECIPES = {
    "classic": "--epochs 5 --workers 0 --select-on val --step-size 2",
    "laden": LADEN,
    "loaded by two": "--epochs 4 --workers 2 --augment trivialaugment --schedule cosine --warmup 1",
}
EVERY_SECONDS = 0.02
TIMES = ("seconds", "images_per_second")


def arguments(data: Path, output: Path, recipe: str, every: float = EVERY_SECONDS) -> list[str]:
    """A command line that keeps checkpoints all the time."""
    usual = ["--backbone", "tiny", "--weights", "none", "--batch-size", "4", "--checkpoint-every", str(every)]
    return ["finetune", str(data), "-o", str(output), *usual, *RECIPES[recipe].split()]


def find_result(output: Path) -> tuple[str, list[dict[str, str]]]:
    """The weights' digest, and the history but for its times."""
    with (output / "history.csv").open(newline="") as file:
        history = [{name: row[name] for name in row if name not in TIMES} for row in csv.DictReader(file)]
    return hash_file(output / "model.safetensors"), history


def kill_at_random(folder: Path, n: int) -> dict[str, Any]:
    """kill -9 fine-tunings at random moments, some of them twice; then the same command again."""
    checkpoints.SHARE = 0
    data = nursery.make_photos(folder / "photos", 7, 4)
    wrong: list[str] = []
    counts = {"killed": 0, "finished before": 0, "went on": 0}
    draw = random.Random(0)
    expected: dict[str, Any] = {}
    spans: dict[str, float] = {}
    run(arguments(data, folder / "warm up", "classic"))  # what is slow the first time is inherited by every child
    for recipe in RECIPES:
        reference = folder / f"reference {recipe}"
        started = time.perf_counter()
        code, _ = nursery.in_child(lambda reference=reference, recipe=recipe: run(arguments(data, reference, recipe)))  # type: ignore[misc]
        spans[recipe] = time.perf_counter() - started
        expected[recipe] = find_result(reference)
    for trial in range(n):
        # the decoders of a killed run notice only after seconds that they are orphans, and hold its lock meanwhile
        recipe = "loaded by two" if trial % 20 == 3 else ("classic", "laden")[trial % 2]
        place = folder / f"trial_{trial}"
        place.mkdir()
        work = lambda place=place, recipe=recipe: run(arguments(data, place / "run", recipe))  # noqa: E731
        for _ in range(draw.choice((1, 1, 2))):
            code, _ = nursery.in_child(work, kill_after=draw.uniform(0.05, 1) * spans[recipe])
            counts["killed" if code == nursery.SIGKILLED else "finished before"] += 1
        counts["went on"] += (place / "run.checkpoint/checkpoint.json").exists()
        code, answer = nursery.in_child(work)
        if code or answer:
            wrong.append(f"{trial} {recipe}: the last run gave {code} {answer}")
        elif find_result(place / "run") != expected[recipe]:
            wrong.append(f"{trial} {recipe}: the end is another one")
        elif left := sorted(path.name for path in place.iterdir() if path.name != "run"):
            wrong.append(f"{trial} {recipe}: leftovers {left}")
    return {"trials": n, **counts, "seconds of one": round(min(spans.values()), 2), "wrong": wrong}


def die_at_every_call(folder: Path, step: int) -> dict[str, Any]:
    """Let a fine-tuning die before, or half-way through, every `step`-th durable call; then the same command again."""
    checkpoints.SHARE = 0
    data = nursery.make_photos(folder / "photos", 3, 2)
    wrong: list[str] = []
    reference = folder / "reference"

    def work(output: Path, disk: files.Disk) -> int:
        files.disk = disk
        return run(arguments(data, output, "laden", every=0))

    def count() -> int:
        watched = WatchedDisk()
        assert work(reference, watched) == 0
        return len(watched.log)

    _, n_calls = nursery.in_child(count)
    expected, counts = find_result(reference), {"died": 0, "failed": 0}
    for call in range(0, n_calls, step):
        for what, error in (("die", None), ("fail", errno.ENOSPC)):
            place = folder / f"{what}_{call}"
            place.mkdir()
            disk = FailingDisk(call, error, torn=call % 2 == 0)
            code, answer = nursery.in_child(lambda place=place, disk=disk: work(place / "run", disk))  # type: ignore[misc]
            counts["died" if what == "die" else "failed"] += code != 0 or answer != 0
            code, answer = nursery.in_child(lambda place=place: work(place / "run", files.Disk()))  # type: ignore[misc]
            if code or answer:
                wrong.append(f"{what} {call}: the second run gave {code} {answer}")
            elif find_result(place / "run") != expected:
                wrong.append(f"{what} {call}: the end is another one")
    return {"calls": n_calls, **counts, "wrong": wrong}


EXPERIMENTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "kill": kill_at_random,
    "enumerate": die_at_every_call,
}

if __name__ == "__main__":
    families.FAMILIES = (*families.FAMILIES, TinyFamily())
    torch.set_num_threads(1)
    os.environ["FEATCACHE_DEVICE"] = "cpu"
    name, place, number = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = EXPERIMENTS[name](Path(place), int(number))
    print(json.dumps(result, indent=1))
