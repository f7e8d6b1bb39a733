"""Experiments with processes that die: everything is loaded once, every trial is a forked child.

``python tests/faults/nursery.py EXPERIMENT FOLDER [N]`` prints one JSON object with its counts. What goes wrong is in
its list "wrong", a line each.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import h5py
import numpy as np
import torch
from conftest import COLOURS, TinyFamily, draw_photo, fill_class
from disks import FailingDisk, PowerlessDisk, WatchedDisk

import featcache.cache.lock
import featcache.cache.parts
from featcache import files
from featcache.backbones import families, load_backbone
from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    hash_extractor,
    list_parts,
    open_cache,
    read_cache,
    verify_cache,
    write_cache,
)
from featcache.cli import run
from featcache.dataset import RACY_NS, Split
from featcache.decoding import decode_image
from featcache.errors import FeatcacheError, OutputBusyError, OutputError
from featcache.files import hash_bytes
from featcache.images import make_evaluation_transform
from featcache.stages.extract import extract_features
from featcache.stages.train_head import train_head

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "eager", "workers": 0, "batch_size": 4}
SIGKILLED = -signal.SIGKILL


def make_photos(root: Path, n_train: int, n_val: int) -> Path:
    """DATA/{train,val}/{blue,red}, old enough that their times prove something."""
    for s, (split, n) in enumerate({"train": n_train, "val": n_val}.items()):
        for c, name in enumerate(("blue", "red")):
            fill_class(root / split / name, COLOURS[name], n, seed=1000 * s + 100 * c)
    time.sleep(RACY_NS / 1e9 + 0.1)
    return root


def in_child(work: Callable[[], Any], *, kill_after: float | None = None) -> tuple[int, Any]:
    """What `work` gives in a forked process, and its exit status as subprocess has it; None if it died."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            os.close(reader)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            answer = json.dumps(work()).encode()
        except BaseException:  # noqa: BLE001 - told to the parent
            answer = json.dumps({"traceback": traceback.format_exc()}).encode()
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), json.loads(data) if data else None


def run_together(works: Sequence[Callable[[], Any]]) -> list[tuple[int, Any]]:
    """What each gives in a process of its own, all at the same time."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(in_child, work) for work in works]]


def extract(data: Path, output: Path, disk: files.Disk | None = None, **settings: Any) -> dict[str, Any]:
    """One extraction in this process: what it did, or its error."""
    files.disk = disk or files.Disk()
    TinyFamily.calls = 0
    try:
        extraction = extract_features(data, output, **{**TINY, **settings})
    except FeatcacheError as error:
        return {"error": str(error), "kind": type(error).__name__, "passes": TinyFamily.calls}
    return {"computed": extraction.computed, "passes": TinyFamily.calls, "rows": len(extraction.cache)}


def columns(path: Path) -> dict[str, bytes]:
    """Every column of a cache but what the file system said, as bytes."""
    with h5py.File(path) as file:
        return {
            f"{split}/{name}": file[split][name][:].tobytes()
            for split in file
            for name in file[split]
            if name != "stats"
        }


def list_leftovers(output: Path) -> list[str]:
    """Names beside the output that should not be there once it is finished."""
    return [path.name for path in output.parent.iterdir() if path != output]


class Bench:
    """One data set, its right answer, and a fresh folder for every trial."""

    def __init__(self, folder: Path, n_train: int = 6, n_val: int = 3) -> None:
        self.folder = folder
        self.data = make_photos(folder / "photos", n_train, n_val)
        self.images = 2 * (n_train + n_val)
        self.wrong: list[str] = []
        reference = self.fresh("reference")
        in_child(lambda: extract(self.data, reference))
        self.reference = columns(reference)
        self.content = open_cache(reference).content_sha256
        self.key = hash_extractor(open_cache(reference).extractor)

    def fresh(self, name: str) -> Path:
        """A place for an output, in an empty folder."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place / "f.h5"

    def expect(self, condition: bool, what: str) -> None:
        """Keep what is wrong."""
        if not condition:
            self.wrong.append(what)

    def durable_rows(self, output: Path) -> int:
        """Rows that an earlier process left in parts; damaged parts are wrong, whatever happened."""
        parts, damaged = list_parts(output, "rows", self.key)
        self.expect(not damaged, f"damaged parts {damaged}")
        return len({digest for part in parts for digest in part.columns["digests"].tolist()})

    def check_resumes(self, output: Path, what: str, **settings: Any) -> None:
        """The same command must go on: nothing durable is computed again, and the end is the right one."""
        if output.exists():
            self.expect(open_cache(output).content_sha256 == self.content, f"{what}: a wrong file under the final name")
            durable = self.images
        else:
            durable = self.durable_rows(output)
        code, done = in_child(lambda: extract(self.data, output, **settings))
        self.expect(code == 0 and "computed" in (done or {}), f"{what}: the second run gave {code} {done}")
        if not done or "computed" not in done:
            return
        self.expect(
            done["computed"] == self.images - durable, f"{what}: {durable} durable, {done['computed']} computed"
        )
        self.expect(columns(output) == self.reference, f"{what}: the end is another one")
        self.expect(open_cache(output).content_sha256 == self.content, f"{what}: another content")
        self.expect(not verify_cache(output).damaged, f"{what}: damaged")
        self.expect(not list_leftovers(output), f"{what}: leftovers {list_leftovers(output)}")


def enumerate_faults(folder: Path, long: int) -> dict[str, Any]:
    """Die, or fail, at every durable call there is, and half-way through every write."""
    featcache.cache.parts.PART_SECONDS = 0.0  # a part for every batch of 4
    bench = Bench(folder, 4, 1)
    counting = WatchedDisk()
    output = bench.fresh("counting")
    _, log = in_child(lambda: (extract(bench.data, output, counting), counting.log)[1])
    if isinstance(log, dict):
        raise RuntimeError(log["traceback"])  # noqa: TRY004 - the child's
    names = [name for name, _ in log]
    parts = sum(name == "replace" and "rows-" in what for name, what in log)
    trials: list[tuple[int, str]] = []
    for at, name in enumerate(names):
        trials += [(at, "killed before"), (at, "ENOSPC at")]
        if name == "write":
            trials += [(at, "killed half-way through"), (at, "ENOSPC half-way through")]
        else:  # after another write a power cut finds what it found before: nothing was synced in between
            trials += [(at, "power lost before")]
        if long:
            trials += [(at, "EIO at"), (at, "EDQUOT at")]

    def try_share(share: int) -> list[str]:
        for trial in trials[share::2]:
            try_fault(bench, f"trial_{share}", log, *trial)
        return bench.wrong

    for code, wrong in run_together([lambda: try_share(0), lambda: try_share(1)]):
        bench.wrong += wrong if isinstance(wrong, list) else [f"a worker ended with {code}: {wrong}"]
    kinds = [kind for _, kind in trials]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return {"calls": len(names), "parts": parts, "trials": counts, "wrong": bench.wrong}


def make_disk(at: int, kind: str) -> WatchedDisk:
    """A disk that does at its call `at` what `kind` says."""
    if kind.startswith("power"):
        return PowerlessDisk(at)
    error = None if kind.startswith("killed") else getattr(errno, kind.split(maxsplit=1)[0])
    return FailingDisk(at, error, torn="half-way" in kind)


def try_fault(bench: Bench, place: str, log: list[tuple[str, str]], at: int, kind: str) -> None:
    """One extraction with one fault, and the same command again."""
    name, target = log[at]
    what = f"{kind} call {at} ({name} {target[-60:]})"
    output = bench.fresh(place)
    code, done = in_child(lambda: extract(bench.data, output, make_disk(at, kind)))
    if kind.startswith(("killed", "power")):
        bench.expect(code == SIGKILLED, f"{what}: did not happen, {code} {done}")
        before = sum(n == "replace" and "rows-" in w for n, w in log[:at])
        if kind.startswith("killed") and not output.exists():
            bench.expect(bench.durable_rows(output) >= min(4 * before, bench.images), f"{what}: parts are lost")
    else:
        bench.expect(code == 0, f"{what}: the process died with {code}")
        if done and "error" in done:
            bench.expect(done["kind"] == "OutputError" and "\n" not in done["error"], f"{what}: {done}")
            bench.expect(not files.list_temporary(output), f"{what}: a temporary file is left")
        else:  # what fails after the end is no reason to call it a failure
            bench.expect(name in ("remove", "remove_folder"), f"{what}: went unnoticed, {done}")
    bench.check_resumes(output, what)


def kill_at_random(folder: Path, n: int) -> dict[str, Any]:
    """kill -9 real extractions of resnet18, by the command line, at random moments; then the same command again."""
    featcache.cache.parts.PART_SECONDS = 0.1
    data, rows = make_photos(folder / "photos", 6, 2), 16
    wrong: list[str] = []
    counts = {"killed": 0, "finished before": 0, "rows kept": 0, "rows computed again": 0}

    def arguments(output: Path) -> list[str]:
        return ["extract", str(data), "--weights", "none", "--runtime", "fused", "-o", str(output)]

    (folder / "reference").mkdir()
    reference = folder / "reference/f.h5"
    spans = []
    for _ in range(3):
        reference.unlink(missing_ok=True)
        started = time.perf_counter()
        in_child(lambda: run(arguments(reference)))
        spans.append(time.perf_counter() - started)
    span = min(spans)  # other programs may have been busy
    content, key = open_cache(reference).content_sha256, hash_extractor(open_cache(reference).extractor)
    draw = random.Random(0)
    for trial in range(n):
        place = folder / f"kill_{trial}"
        place.mkdir()
        output = place / "f.h5"
        code, _ = in_child(lambda output=output: run(arguments(output)), kill_after=draw.uniform(0.2 * span, span))  # type: ignore[misc]
        counts["killed" if code == SIGKILLED else "finished before"] += 1
        parts, damaged = list_parts(output, "rows", key)
        kept = rows if output.exists() else sum(len(part.columns["digests"]) for part in parts)
        counts["rows kept"] += kept
        if damaged:
            wrong.append(f"{trial}: damaged parts {damaged}")
        code, _ = in_child(lambda output=output: run([*arguments(output), "--wait"]))  # type: ignore[misc]
        if code or not output.exists():
            wrong.append(f"{trial}: the second run gave {code}")
            continue
        counts["rows computed again"] += rows - kept
        if open_cache(output).content_sha256 != content or columns(output) != columns(reference):
            wrong.append(f"{trial}: the end is another one")
        if verify_cache(output).damaged or list_leftovers(output):
            wrong.append(f"{trial}: leftovers {list_leftovers(output)}")
        shutil.rmtree(place)
    return {"trials": n, **counts, "seconds of one": round(span, 2), "wrong": wrong}


def write_together(folder: Path, n: int) -> dict[str, Any]:
    """Eight processes extract into one file: who waits, who does not, and what if there were no lock."""
    featcache.cache.parts.PART_SECONDS = 0.0
    featcache.cache.lock.MOMENT_SECONDS = 0.0  # nobody waits even for that
    bench = Bench(folder, 12, 6)
    counts = {"waited": 0, "computed by one": 0, "told who holds it": 0, "without a lock": 0, "rounds": n}
    for i in range(n):
        output = bench.fresh(f"wait_{i}")
        results = run_together([lambda output=output: extract(bench.data, output, wait=True)] * 8)  # type: ignore[misc]
        computed = sorted((done or {}).get("computed", -1) for _, done in results)
        bench.expect(computed == [0] * 7 + [bench.images], f"waiting: {results}")
        counts["waited"] += sum(c == 0 for c in computed)
        counts["computed by one"] += computed[-1] == bench.images
        bench.check_resumes(output, "after eight that waited")
        output = bench.fresh(f"busy_{i}")
        results = run_together([lambda output=output: extract(bench.data, output)] * 8)  # type: ignore[misc]
        busy = [done for _, done in results if done and done.get("kind") == OutputBusyError.__name__]
        bench.expect(all("is being extracted by" in done["error"] for done in busy), f"busy: {busy}")
        bench.expect(all(done and ("computed" in done or done in busy) for _, done in results), f"busy: {results}")
        counts["told who holds it"] += len(busy)
        bench.check_resumes(output, "after eight that did not wait")
        output = bench.fresh(f"free_{i}")
        results = run_together([lambda output=output: _extract_without_lock(bench.data, output)] * 8)  # type: ignore[misc]
        bench.expect(all(code == 0 and done and "traceback" not in done for code, done in results), f"free: {results}")
        counts["without a lock"] += len(results)
        if output.exists():
            bench.expect(open_cache(output).content_sha256 == bench.content, "without a lock: a wrong file")
        bench.check_resumes(output, "after eight without a lock")
    return {**counts, "wrong": bench.wrong}


def _extract_without_lock(data: Path, output: Path) -> dict[str, Any]:
    import featcache.stages.extract

    featcache.stages.extract.hold_output = lambda *arguments, **settings: contextlib.nullcontext()  # type: ignore[assignment]
    return extract(data, output)


def fill_disk(folder: Path, n: int) -> dict[str, Any]:
    """Disks of random sizes that fill up, and files that may not grow beyond a random size."""
    featcache.cache.parts.PART_SECONDS = 0.0
    bench = Bench(folder, 12, 6)
    draw = random.Random(1)
    counts = {"file size limits": 0, "small disks": 0, "stopped with one line": 0, "went through": 0}
    whole = (folder / "reference/f.h5").stat().st_size

    def check(what: str, code: int, done: Any) -> None:
        bench.expect(code == 0 and bool(done), f"{what}: the process ended with {code}")
        stopped = bool(done) and done.get("kind") == OutputError.__name__
        bench.expect(stopped or bool(done and "computed" in done), f"{what}: {done}")
        counts["stopped with one line" if stopped else "went through"] += 1

    for i in range(n):
        limit = draw.randrange(0, whole + 2000)
        output = bench.fresh(f"limit_{i}")
        code, done = in_child(lambda output=output, limit=limit: _extract_limited(bench.data, output, limit))  # type: ignore[misc]
        counts["file size limits"] += 1
        check(f"files of at most {limit} bytes", code, done)
        bench.expect(not files.list_temporary(output), f"limit {limit}: a temporary file is left")
        bench.check_resumes(output, f"after a limit of {limit} bytes")
    for i in range(n):
        place = folder / f"disk_{i}"
        place.mkdir()
        pages = draw.randrange(2, 30)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "tmpfs", str(place)], check=False, capture_output=True
        )
        if mounted.returncode:
            counts["small disks"] = -1  # not allowed here
            break
        try:
            output = place / "f.h5"
            code, done = in_child(lambda output=output: extract(bench.data, output))  # type: ignore[misc]
            counts["small disks"] += 1
            check(f"a disk of {pages} pages", code, done)
            bench.expect(not files.list_temporary(output), f"{pages} pages: a temporary file is left")
            subprocess.run(["mount", "-o", "remount,size=10m", str(place)], check=True, capture_output=True)
            bench.check_resumes(output, f"after a disk of {pages} pages")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
    return {**counts, "wrong": bench.wrong}


def _extract_limited(data: Path, output: Path, limit: int) -> dict[str, Any]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return extract(data, output)


def flip_bytes(folder: Path, n: int) -> dict[str, Any]:
    """Damage a finished file in every way there is: `verify` sees it, or it makes no difference to any row."""
    path, damaged = folder / "f.h5", folder / "damaged.h5"
    rows = np.random.default_rng(0)
    splits = {
        name: FeatureSplit(
            listing=Split(
                paths=tuple(f"{name}/a/{i}.jpg" for i in range(size)),
                labels=np.arange(size) % 2,
                digests=tuple(hash_bytes(f"{name}{i}".encode()) for i in range(size)),
                stats=rows.integers(1, 2**40, (size, 4)),
            ),
            features=rows.normal(size=(size, 16)).astype(np.float32),
        )
        for name, size in (("train", 300), ("val", 100))
    }
    extractor = {"backbone": "tiny", "dim": 16, "precision": {"compute": "float32", "stored": "float32"}}
    cache = FeatureCache(
        classes=("a", "b"), extractor=extractor, splits=splits, provenance={"data": "/photos", "bad": []}
    )
    write_cache(path, cache)
    whole = path.read_bytes()
    right = _all_of(read_cache(path))
    draw = random.Random(2)
    counts = {"flips": 0, "detected": 0, "harmless": 0, "cuts": 0, "pages": 0}
    wrong: list[str] = []

    def is_detected(data: bytes, what: str) -> bool:
        damaged.write_bytes(data)
        signal.alarm(10)  # a hang kills this process, and that is seen
        try:
            seen = bool(verify_cache(damaged).damaged)
        except FeatcacheError:
            seen = True
        try:
            if _all_of(read_cache(damaged)) != right:
                wrong.append(f"{what}: other rows are served")
            if not seen and _all_of(open_cache(damaged)) != right:
                wrong.append(f"{what}: not detected, and open_cache serves other rows")
        except FeatcacheError:
            if not seen:
                wrong.append(f"{what}: verify says nothing, reading fails")
        signal.alarm(0)
        return seen

    def damage() -> dict[str, Any]:
        for _ in range(n):
            data = bytearray(whole)
            at = draw.randrange(len(data))
            data[at] ^= draw.randrange(1, 256)
            counts["flips"] += 1
            counts["detected" if is_detected(bytes(data), f"byte {at}") else "harmless"] += 1
        for _ in range(n // 10):
            at = draw.randrange(len(whole))
            counts["cuts"] += 1
            if not is_detected(whole[:at], f"cut at {at}"):
                wrong.append(f"cut at {at}: not detected")
            page = draw.randrange(len(whole) // 512) * 512
            counts["pages"] += 1
            is_detected(whole[:page] + bytes(512) + whole[page + 512 :], f"page {page}")
        return {**counts, "wrong": wrong}

    code, result = in_child(damage)
    return result if result and "wrong" in result else {**counts, "wrong": [f"the process ended with {code}: {result}"]}


def _all_of(cache: FeatureCache) -> Any:
    rows = {
        name: (split.listing.paths, split.listing.labels.tolist(), split.listing.digests, split.features.tobytes())
        for name, split in cache.splits.items()
    }
    return cache.classes, cache.extractor, cache.provenance, rows


def mutate_images(folder: Path, n: int) -> dict[str, Any]:
    """Files with a few bytes changed, or cut short, among good ones: each is bad or has exactly its own row."""
    draw, data = random.Random(3), folder / "photos"
    formats = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    good = make_photos(data, 20, 10)
    for i in range(n):
        buffer = io.BytesIO()
        kind = formats[i % len(formats)]
        draw_photo(COLOURS[("blue", "red")[i % 2]], 50_000 + i).save(buffer, kind)
        content = bytearray(buffer.getvalue())
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if i % 5 == 0:
            content = content[: draw.randrange(len(content))]
        split, name = ("train", "val")[i % 3 == 0], ("blue", "red")[i % 2]
        (data / split / name / f"mutated_{i:05d}.jpg").write_bytes(content)
    output = folder / "f.h5"
    wrong: list[str] = []
    started = time.monotonic()
    code, done = in_child(lambda: extract(good, output, skip_bad=True))
    if code or not done or "rows" not in done:
        return {"wrong": [f"the process ended with {code}: {done}"]}
    cache = read_cache(output)
    bad = {path for path, _ in cache.provenance["bad"]}
    backbone = load_backbone("tiny", weights="none", seed=0)
    transform = make_evaluation_transform(backbone.preprocessing)
    counts = {"files": n, "formats": len(formats), "kept": 0, "bad": len(bad), "good": 0}
    for split in cache.splits.values():
        for path, row in zip(split.listing.paths, split.features, strict=True):
            try:
                image = transform(decode_image((data / path).read_bytes()))
            except FeatcacheError as error:
                wrong.append(f"{path} has a row: {error}")
                continue
            with torch.inference_mode():
                expected = backbone.network(image[None])[0].numpy()
            if not np.allclose(row, expected, rtol=1e-5, atol=1e-6):
                wrong.append(f"{path} has another row")
            counts["kept" if "mutated" in path else "good"] += 1
    if len(cache) + len(bad) != n + 60 or counts["good"] != 60:
        wrong.append(f"{len(cache)} rows and {len(bad)} bad files of {n + 60}")
    if time.monotonic() - started > 0.1 * n + 60:
        wrong.append("something hung")
    return {**counts, "wrong": wrong}


def be_nobody(folder: Path) -> dict[str, Any]:
    """A cache and images that may only be read: reading works, writing fails before anything is computed."""
    bench = Bench(folder)
    output = bench.fresh("mine")
    extract(bench.data, output)
    train_head(output, folder / "head")  # everything is imported by now
    for place in (folder, *folder.parents):
        with contextlib.suppress(PermissionError):
            place.chmod(place.stat().st_mode | 0o055)

    def work() -> dict[str, Any]:
        os.seteuid(65534)
        rows = len(read_cache(output)) + len(open_cache(output)) + verify_cache(output).rows
        return {**extract(bench.data, output), "rows read": rows, "new": extract(bench.data, output.parent / "new.h5")}

    code, done = in_child(work)
    bench.expect(code == 0 and bool(done), f"the process ended with {code}")
    if done:
        new = done.get("new", {})
        bench.expect((done.get("computed"), done["passes"]) == (0, 0), f"nothing was to be done: {done}")
        bench.expect((new.get("kind"), new.get("passes")) == (OutputError.__name__, 0), f"fails at once: {done}")
        bench.expect(done.get("rows read") == 3 * bench.images, f"{done}")
        bench.expect(not list_leftovers(output), f"leftovers {list_leftovers(output)}")
    return {"wrong": bench.wrong}


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "enumerate": enumerate_faults,
    "kill": kill_at_random,
    "together": write_together,
    "full": fill_disk,
    "flip": flip_bytes,
    "nobody": be_nobody,
    "mutate": mutate_images,
}

if __name__ == "__main__":
    families.FAMILIES = (*families.FAMILIES, TinyFamily())
    torch.set_num_threads(1)
    name, place, *numbers = sys.argv[1:]
    with contextlib.redirect_stderr(io.StringIO()):
        result = EXPERIMENTS[name](Path(place), *map(int, numbers))
    print(json.dumps(result, indent=1))
