"""An extraction on a Ray cluster of three nodes, see `ray_nursery`.

``python tests/spread_nursery.py FOLDER`` prints one JSON object with what happened.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import COLOURS, fill_class
from ray_nursery import Machines, three_nodes

from featcache.cache import open_cache, parts_path
from featcache.files import hash_file
from featcache.stages.extract import Extraction, extract_features

RESNET: dict[str, Any] = {"backbone": "resnet18", "weights": "none", "runtime": "fused"}
# Put before every process's program: a decoder that dies from one image, named by the digest of its file.
CRASHING_DECODER = """
import hashlib, os, signal
import simplejpeg
decode = simplejpeg.decode_jpeg
def decode_or_die(data, *arguments, **settings):
    if hashlib.sha256(data).hexdigest() == os.environ.get("POISON"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, *arguments, **settings)
simplejpeg.decode_jpeg = decode_or_die
"""


def make_photos(root: Path, n: int) -> Path:
    """DATA/{train,val}/{blue,red}: n and n / 3 photographs of each class."""
    for s, (split, size) in enumerate({"train": n, "val": n // 3}.items()):
        for c, name in enumerate(("blue", "red")):
            fill_class(root / split / name, COLOURS[name], size, seed=10_000 * s + 1000 * c)
    return root


def extract_on(machines: Machines, data: Path, output: Path, **settings: Any) -> Extraction:
    """An extraction on a cluster, that ends."""
    return extract_features(data, output, engine="ray", address=machines.address, **{**RESNET, **settings})


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Two files, byte for byte."""
    first, second = open_cache(one), open_cache(other)
    return {
        "same content": first.content_sha256 == second.content_sha256,
        "same bytes": all(
            split.features.tobytes() == second.splits[name].features.tobytes() for name, split in first.splits.items()
        ),
        "rows": len(second),
        "parts left": parts_path(other).exists(),
    }


def everything(folder: Path) -> dict[str, Any]:
    """Two machines compute; in the middle one dies and another one comes; and one image kills whoever decodes it."""
    data = make_photos(folder / "photos", 48)
    bad = data / "train" / "red" / "photo_007.jpg"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(CRASHING_DECODER)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    os.environ["POISON"] = hash_file(bad)
    output, seen = folder / "ray.h5", dict[str, Any]()
    with three_nodes(n_cpus=2) as machines:
        work = run_beside(lambda: extract_on(machines, data, output), seen)
        parts = parts_path(output)
        wait_for(lambda: any(parts.glob("rows-*")), work)
        machines.kill(machines.nodes[0])
        seen["parts when a machine died"] = len(list(parts.glob("rows-*")))
        machines.add()
        work.join()
        seen["items"] = len(list(parts.glob("rows-*")))
        done = extract_on(machines, data, output, skip_bad=True)
    bad.unlink()
    extract_features(data, folder / "plain.h5", **RESNET)
    return {**compare(folder / "plain.h5", output), **seen, "computed again": done.computed, "bad": done.bad}


def run_beside(work: Callable[[], Extraction], seen: dict[str, Any]) -> threading.Thread:
    """Do work in a thread; what came of it is put into `seen`."""

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told in the answer
            seen["error"] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def wait_for(happened: Callable[[], bool], work: threading.Thread) -> None:
    while work.is_alive() and not happened():
        time.sleep(0.05)


if __name__ == "__main__":
    print(json.dumps(everything(Path(sys.argv[1]))))
