"""What caches and leftovers lie in a folder, how large they are, and their removal.

In a store they are known by their names alone: to look into a cache there is to download it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from featcache.cache.index import is_index
from featcache.cache.lock import is_held, is_lock, lease_path, lock_path
from featcache.cache.opening import is_feature_cache, read_summary
from featcache.cache.parts import PART_NAME, PART_TEMPORARY_NAME, is_ours, parts_path
from featcache.errors import CacheError, OutputBusyError, OutputError
from featcache.files import list_temporary
from featcache.storage import Place, RemotePath, remove_files

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

    path: Place
    kind: str
    bytes: int
    output: Place
    held: bool
    about: str


def list_items(folder: Place) -> list[Item]:
    """Feature caches and leftovers under a folder, sorted by path.

    Raises
    ------
    CacheError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder: expected one to look for caches in")
    if isinstance(folder, RemotePath):
        return _list_remote(folder.list_below(deep=True))
    items: list[Item | None] = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        items += [describe_item(here / name) for name in names]
        for name in [name for name in folders if name.endswith(".parts")]:
            items.append(describe_item(here / name))
            if items[-1]:
                folders.remove(name)  # not looked into
    return sorted((item for item in items if item), key=lambda item: Path(str(item.path)))


def _list_remote(sizes: Mapping[RemotePath, int]) -> list[Item]:
    """Caches and parts among the objects of a store, by their names."""
    items, parts = [], dict[RemotePath, dict[str, int]]()
    for path, size in sizes.items():
        if path.parent.name.endswith(".parts"):
            parts.setdefault(path.parent, {})[path.name] = size
        elif path.suffix in SUFFIXES:
            about = "not looked into, `featcache cache info` downloads it"
            items.append(Item(path=path, kind=CACHE, bytes=size, output=path, held=False, about=about))
    for folder, names in parts.items():
        if about := _describe_names(list(names)):
            output, size = folder.with_suffix(""), sum(names.values())
            items.append(Item(path=folder, kind=PARTS, bytes=size, output=output, held=False, about=about))
    return sorted(items, key=lambda item: str(item.path))


def list_near(path: Place) -> list[Item]:
    """A cache file, whatever it is called, and the leftovers beside it."""
    if isinstance(path, RemotePath):
        cache = _describe_cache(path) if path.is_file() else None
        return [item for item in (cache, _describe_remote(path.with_name(parts_path(path).name))) if item]
    beside = [lock_path(path), lease_path(path), path.with_name(parts_path(path).name), *list_temporary(path)]
    found = [_describe_cache(path), *map(describe_item, beside)]
    return [item for item in found if item and item.output == path]


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
        if isinstance(item.path, RemotePath):
            remove_files(list(item.path.list_below()) if item.kind == PARTS else [item.path])
        elif item.kind == PARTS:
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {item.path}: {error.strerror or error}") from error


def describe_item(path: Place) -> Item | None:
    """What a file or folder is, None if it is nothing of ours or has just gone."""
    return _describe_remote(path) if isinstance(path, RemotePath) else _describe_local(path)


def _describe_remote(path: RemotePath) -> Item | None:
    return next((item for item in _list_remote(path.list_below()) if item.path == path), None)


def _describe_local(path: Path) -> Item | None:
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
        if (path.suffix in SUFFIXES or is_index(path)) and not path.name.startswith("."):
            return _describe_cache(path)
    return None


def _describe_cache(path: Place) -> Item | None:
    if (isinstance(path, Path) and not os.path.isfile(path)) or not is_feature_cache(path):  # noqa: PTH113 - no error where one may not look
        return None
    try:
        about = read_summary(path)
    except CacheError as error:
        about = f"cannot be used: {error}"
    return _make_item(path, CACHE, path, about)


def _describe_parts(folder: Path) -> Item | None:
    names = [entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    if len(names) != len(list(folder.iterdir())) or not (about := _describe_names(names)):
        return None
    return _make_item(folder, PARTS, folder.with_suffix(""), about)


def _describe_names(names: list[str]) -> str:
    """What files in a folder of parts are, in words; "" if it is somebody else's folder."""
    if not names or not all(is_ours(name) or PART_TEMPORARY_NAME.fullmatch(name) for name in names):
        return ""
    ours = [match for name in names if (match := PART_NAME.fullmatch(name))]
    n = sum(match["kind"] != "files" for match in ours)
    rows = f"{n} part{'s' * (n != 1)} of features; " if n else "what is known of image files; "
    return f"{rows}the same `featcache extract` goes on from there"


def _make_item(path: Place, kind: str, output: Place, about: str) -> Item:
    is_folder = isinstance(path, Path) and path.is_dir()
    size = sum(file.stat().st_size for file in Path(str(path)).iterdir()) if is_folder else path.stat().st_size
    return Item(path=path, kind=kind, bytes=size, output=output, held=is_held(output), about=about)
