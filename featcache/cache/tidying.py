"""What caches and leftovers lie in a folder, how large they are, and their removal."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from featcache.cache.lock import is_held, is_lock, lease_path, lock_path
from featcache.cache.parts import PART_NAME, PART_TEMPORARY_NAME, parts_path
from featcache.cache.reading import is_feature_cache, read_summary
from featcache.errors import CacheError, OutputBusyError, OutputError
from featcache.files import list_temporary

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
    items: list[Item | None] = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        items += [describe_item(here / name) for name in names]
        for name in [name for name in folders if name.endswith(".parts")]:
            items.append(describe_item(here / name))
            if items[-1]:
                folders.remove(name)  # not looked into
    return sorted((item for item in items if item), key=lambda item: item.path)


def list_near(path: Path) -> list[Item]:
    """A cache file, whatever it is called, and the leftovers beside it."""
    beside = [lock_path(path), lease_path(path), parts_path(path), *list_temporary(path)]
    items = [_describe_cache(path), *map(describe_item, beside)]
    return [item for item in items if item and item.output == path]


def remove_item(item: Item) -> None:
    """Remove a cache or a leftover.

    Raises
    ------
    OutputBusyError
        If a living process works on it.
    OutputError
        If it cannot be removed.
    """
    if is_held(item.output):
        raise OutputBusyError(f"cannot remove {item.path}: {item.output} is being extracted; wait for it")
    try:
        if item.kind == PARTS:
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {item.path}: {error.strerror or error}") from error


def describe_item(path: Path) -> Item | None:
    """What a file or folder is, None if it is nothing of ours or has just gone."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            return None
        if path.is_dir():
            return _describe_parts(path) if path.name.endswith(".parts") else None
        if match := _TEMPORARY_NAME.fullmatch(path.name):
            return _make_item(path, TEMPORARY, path.with_name(match["output"]), "not finished, of no use")
        if path.suffix in (".lock", ".lease") and Path(path.stem).suffix in SUFFIXES and is_lock(path):
            output = path.with_suffix("")
            return _make_item(path, LOCK, output, "somebody extracts" if is_held(output) else "of a process that died")
        if path.suffix in SUFFIXES and not path.name.startswith("."):
            return _describe_cache(path)
    return None


def _describe_cache(path: Path) -> Item | None:
    if not os.path.isfile(path) or not is_feature_cache(path):  # noqa: PTH113 - no error where one may not look
        return None
    try:
        about = read_summary(path)
    except CacheError as error:
        about = f"cannot be used: {error}"
    return _make_item(path, CACHE, path, about)


def _describe_parts(folder: Path) -> Item | None:
    names = [entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    ours = [match for name in names if (match := PART_NAME.fullmatch(name))]
    others = len(list(folder.iterdir())) - sum(
        bool(PART_NAME.fullmatch(name) or PART_TEMPORARY_NAME.fullmatch(name)) for name in names
    )
    if others or not names:  # somebody else's folder
        return None
    n = sum(match["kind"] != "files" for match in ours)
    rows = f"{n} part{'s' * (n != 1)} of features; " if n else "what is known of image files; "
    return _make_item(folder, PARTS, folder.with_suffix(""), f"{rows}the same `featcache extract` goes on from there")


def _make_item(path: Path, kind: str, output: Path, about: str) -> Item:
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    return Item(path=path, kind=kind, bytes=size, output=output, held=is_held(output), about=about)
