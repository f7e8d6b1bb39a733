"""What caches and leftovers lie in a folder, how large they are, and their removal."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from featcache.cache.lock import is_held
from featcache.cache.reading import read_summary
from featcache.errors import CacheError, OutputError

SUFFIXES = (".h5", ".hdf5", ".he5")
CACHE, PARTS, TEMPORARY, LOCK = "cache", "parts", "temporary", "lock"
_TEMPORARY_NAME = re.compile(rf"\.(?P<output>.+({'|'.join(map(re.escape, SUFFIXES))}))\.\d+\.tmp")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A cache, or what an extraction left.

    Attributes
    ----------
    path
        The file or folder.
    kind
        "cache", "parts" (work of an extraction that has not finished), "temporary" (a file that a dead process did not
        finish) or "lock".
    bytes
        Its size.
    output
        The cache file that it is, or was to become.
    held
        Whether a living process extracts into that file.
    about
        What is in it, in words.
    """

    path: Path
    kind: str
    bytes: int
    output: Path
    held: bool
    about: str


def list_items(folder: Path) -> list[Item]:
    """Feature caches and leftovers under a folder, sorted by path.

    Raises
    ------
    CacheError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder: expected one to look for caches in")
    items = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in [name for name in folders if name.endswith(".parts")]:
            folders.remove(name)  # not looked into
            items.append(_describe_parts(here / name))
        items += [item for name in files if (item := _describe_file(here / name))]
    return sorted((item for item in items if item), key=lambda item: item.path)


def remove_item(item: Item) -> None:
    """Remove a cache or a leftover.

    Raises
    ------
    OutputError
        If a living process works on it, or it cannot be removed.
    """
    if is_held(item.output):
        raise OutputError(f"cannot remove {item.path}: {item.output} is being extracted; wait for it")
    try:
        if item.kind == PARTS:
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {item.path}: {error.strerror or error}") from error


def _describe_file(path: Path) -> Item | None:
    if path.suffix in SUFFIXES and not path.name.startswith("."):
        with contextlib.suppress(CacheError):
            return _make_item(path, CACHE, path, read_summary(path))
        return None
    if match := _TEMPORARY_NAME.fullmatch(path.name):
        return _make_item(path, TEMPORARY, path.with_name(match["output"]), "not finished, of no use")
    if path.suffix == ".lock" and Path(path.stem).suffix in SUFFIXES:
        output = path.with_suffix("")
        return _make_item(path, LOCK, output, "somebody extracts" if is_held(output) else "of a process that is gone")
    return None


def _describe_parts(folder: Path) -> Item | None:
    parts = [path for path in folder.iterdir() if path.name.startswith(("rows-", "files-"))]
    others = [path for path in folder.iterdir() if not path.name.startswith(("rows-", "files-", ".rows-", ".files-"))]
    if others:  # somebody else's folder
        return None
    n = sum(path.name.startswith("rows-") for path in parts)
    about = f"{n} parts of features; the same `featcache extract` goes on from there"
    return _make_item(folder, PARTS, folder.with_suffix(""), about)


def _make_item(path: Path, kind: str, output: Path, about: str) -> Item:
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    return Item(path=path, kind=kind, bytes=size, output=output, held=is_held(output), about=about)
