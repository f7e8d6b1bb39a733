"""Experiments with shares of an extraction that die, run twice and run at the same time.

``python tests/faults/shard_nursery.py EXPERIMENT FOLDER [N]`` prints one JSON object with its counts. What goes wrong
is in its list "wrong", a line each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import TinyFamily
from disks import WatchedDisk
from nursery import SIGKILLED, TINY, Bench, columns, in_child, list_leftovers, make_disk, run_together

import featcache.cache.parts
from featcache import files
from featcache.backbones import families
from featcache.cache import open_cache, verify_cache
from featcache.errors import FeatcacheError
from featcache.stages.merge import merge_shards
from featcache.stages.share import extract_shard

SHARDS = 16


def run_share(data: Path, output: Path, number: int, disk: files.Disk | None = None) -> dict[str, Any]:
    """One share in this process: what it did, or its error."""
    files.disk = disk or files.Disk()
    try:
        done = extract_shard(data, output, shard=f"{number}/{SHARDS}", **TINY)
    except FeatcacheError as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"computed": done.computed, "rows": done.rows, "unfinished": len(done.unfinished)}


def check_end(bench: Bench, output: Path, what: str) -> None:
    """The file must be the one that one process writes, and nothing beside it."""
    bench.expect(output.exists(), f"{what}: no file")
    if output.exists():
        bench.expect(open_cache(output).content_sha256 == bench.content, f"{what}: another content")
        bench.expect(columns(output) == bench.reference, f"{what}: other columns")
        bench.expect(not verify_cache(output).damaged, f"{what}: damaged")
    bench.expect(not list_leftovers(output), f"{what}: leftovers {list_leftovers(output)}")


def kill_shares(folder: Path, n: int) -> dict[str, Any]:
    """Sixteen shares in random order, two or three at a time, some of them twice; half of them are killed somewhere."""
    featcache.cache.parts.PART_SECONDS = 0.0
    bench, draw = Bench(folder, 24, 8), random.Random(0)
    counts = {"trials": n, "started": 0, "killed": 0, "computed": 0, "images": bench.images}
    for trial in range(n):
        output = bench.fresh(f"trial_{trial}")
        left = list(range(1, SHARDS + 1))
        for _ in range(200):
            if not left:
                break
            chosen = [draw.choice(left) for _ in range(draw.choice((1, 2, 3)))]  # the same one twice, perhaps
            plans = [(number, draw.uniform(0.0, 0.25) if draw.random() < 0.5 else None) for number in chosen]
            results = run_together(
                [
                    lambda number=number, after=after, output=output: run_or_die(bench.data, output, number, after)  # type: ignore[misc]
                    for number, after in plans
                ]
            )
            for (number, _), (code, done) in zip(plans, results, strict=True):
                counts["started"] += 1
                counts["killed"] += code == SIGKILLED
                if code == 0 and done and "computed" in done:
                    counts["computed"] += done["computed"]
                    left = [other for other in left if other != number]
                elif code != SIGKILLED:
                    bench.expect(False, f"trial {trial}, share {number}: {code} {done}")
        if not output.exists():  # the last one was killed while it put the file together
            in_child(lambda output=output: merge_shards(output) and None)  # type: ignore[misc]
        in_child(lambda output=output: merge_shards(output) and None)  # type: ignore[misc]
        check_end(bench, output, f"trial {trial}")
    return {**counts, "wrong": bench.wrong}


def run_or_die(data: Path, output: Path, number: int, after: float | None) -> dict[str, Any]:
    """A share that is killed after some seconds, if it has not come to its end."""
    if after is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, after)
    done = run_share(data, output, number)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return done


def enumerate_deaths(folder: Path, step: int) -> dict[str, Any]:
    """Let the last share die before every `step`-th durable call, those of the merge included; then run it again."""
    featcache.cache.parts.PART_SECONDS = 0.0
    bench = Bench(folder, 4, 1)
    output = bench.fresh("counting")
    for number in range(1, SHARDS):
        in_child(lambda number=number: run_share(bench.data, output, number))  # type: ignore[misc]
    before = {path.name: path.read_bytes() for path in output.with_name("f.h5.parts").iterdir()}
    counting = WatchedDisk()
    _, log = in_child(lambda: (run_share(bench.data, output, SHARDS, counting), counting.log)[1])

    def restore(place: Path) -> None:
        parts = place.with_name("f.h5.parts")
        parts.mkdir()
        for name, data in before.items():
            (parts / name).write_bytes(data)

    for at in range(0, len(log), step):
        place, what = bench.fresh("trial"), f"killed before call {at} ({log[at][0]})"
        restore(place)
        code, done = in_child(
            lambda place=place, at=at: run_share(bench.data, place, SHARDS, make_disk(at, "killed before"))  # type: ignore[misc]
        )
        bench.expect(code == SIGKILLED, f"{what}: {code} {done}")
        code, done = in_child(lambda place=place: run_share(bench.data, place, SHARDS))  # type: ignore[misc]
        bench.expect(code == 0 and "computed" in (done or {}), f"{what}: the second run gave {code} {done}")
        in_child(lambda place=place: merge_shards(place) and None)  # type: ignore[misc]
        check_end(bench, place, what)
    return {"calls": len(log), "deaths": len(range(0, len(log), step)), "wrong": bench.wrong}


def main() -> None:
    experiment, folder, *numbers = sys.argv[1:]
    families.FAMILIES = (*families.FAMILIES, TinyFamily())
    work = {"kill": kill_shares, "enumerate": enumerate_deaths}[experiment]
    print(json.dumps(work(Path(folder), *map(int, numbers))))


if __name__ == "__main__":
    main()
