"""What is known from an earlier run: that settings stand for the very extractor of a cache. Needs no torch.

Loading torch and a network takes seconds, often only to find that nothing is to be computed. So what was found out is
kept: a digest of the settings and of the cache's key. It holds as long as all that decided it is as it was: featcache's
own files, the packages that networks come from, and the files of weights, by what the file system says of them (as of
images, see `dataset.KnownFiles`). Whatever is not certain is not kept; a lost or damaged memory costs only time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from featcache.errors import OutputError
from featcache.files import canonical_json, hash_bytes, write_atomically

# Where networks come from. An upgrade may bring other default weights, or other random ones.
PACKAGES = ("torch", "torchvision", "timm", "huggingface_hub", "efficientnet_lite_pytorch", "onnxruntime")
MOST_ENTRIES = 1000  # the oldest are forgotten
RACY_SECONDS = 2.0  # what was written just now might be written again within the same tick of the clock

# Size, inode, modification and change time in nanoseconds, and the change time of a link to it; None where nothing is.
Stats: TypeAlias = list[int] | None


def is_known(request: Mapping[str, Any]) -> bool:
    """Whether `keep_known` was told of this request, and nothing that decides it has changed since.

    Parameters
    ----------
    request
        Plain JSON values.
    """
    files = read_memory().get(hash_request(request))
    return files is not None and all(look_at(path) == stats for path, stats in files.items())


class Start(NamedTuple):
    """When something began, in seconds since 1970, and a digest of all that could have a say but its own files."""

    time: float
    surroundings: str


def look_around() -> Start:
    """To be called before anything is read whose outcome `keep_known` is told."""
    return Start(time.time(), hash_surroundings())


def keep_known(request: Mapping[str, Any], files: Sequence[Path], start: Start) -> None:
    """Remember that a request was found true, with the files that decide it beside the packages.

    Nothing is kept if something was written since the start, or just before, or where there is no place to keep it.
    """
    stats = {str(path.absolute()): look_at(path) for path in files}
    newest = max((max(found[2:]) for found in stats.values() if found), default=0)
    if newest / 1e9 > start.time - RACY_SECONDS or start.surroundings != hash_surroundings():
        return
    memory, key = read_memory(), hash_request(request)
    if memory.get(key) == stats:
        return
    memory = {name: value for name, value in memory.items() if name != key} | {key: stats}
    newest_entries = dict(list(memory.items())[-MOST_ENTRIES:])
    with contextlib.suppress(OSError, OutputError):
        memory_path().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory_path(), json.dumps(newest_entries).encode())


def memory_path() -> Path:
    """The file that holds it, in torch's folder of downloads: what it knows is true where those are."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.path.expanduser(os.environ.get("TORCH_HOME") or f"{caches}/torch")  # noqa: PTH111 - where nobody has a home
    return Path(home, "hub", "featcache", "known.json")


def read_memory() -> dict[str, dict[str, Stats]]:
    """Digests of requests, oldest first, and the stats of their files; nothing if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(memory_path().read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return {key: files for key, files in value.items() if isinstance(files, dict)}
    return {}


def hash_request(request: Mapping[str, Any]) -> str:
    """SHA-256 over a request and all that may answer it otherwise tomorrow, its own files aside."""
    return hash_bytes(canonical_json([dict(request), hash_surroundings()]).encode())


def hash_surroundings() -> str:
    """SHA-256 over the packages that networks come from, featcache itself, the folder and the hub's settings."""
    origins = {name: find_origin(name) for name in PACKAGES}
    package = Path(__file__).parent
    sources = [str(path) for path in sorted(package.rglob("*.py"))]
    around = {
        "folder": os.getcwd(),  # noqa: PTH109 - paths in the request may be relative
        "hub": {name: value for name, value in os.environ.items() if name.startswith("HF_")},
        "packages": {name: [origin, look_at(origin)] for name, origin in origins.items() if origin},
        "featcache": [[path, look_at(path)] for path in sources],
    }
    return hash_bytes(canonical_json(around).encode("utf-8", errors="surrogateescape"))


def find_origin(package: str) -> str | None:
    """The file that a package begins with, without importing it; None if it is not installed."""
    try:
        spec = find_spec(package)
    except ValueError:  # somebody put something else in its place
        return None
    return spec.origin if spec else None


def look_at(path: Path | str) -> Stats:
    """What the file system says of a file, None if it is not there."""
    try:
        status, link = os.stat(path), os.lstat(path)  # noqa: PTH116 - a Path for each would cost more than the call
    except OSError:
        return None
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, link.st_ctime_ns]
