"""The index of several caches that read as one: a small JSON file that names them and holds no row.

::

    {"featcache_index": 1,
     "classes": [...], "extractor_key": "...",
     "caches": [{"path": relative to the index if it lies beside or below it, "content_sha256": "...",
                 "rows": {"train": n, "val": n}, "bytes": n}, ...]}

Knows no HDF5, and what is in the caches only by their digests; see `opening`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featcache.cache.reading import explain_errors, format_command
from featcache.errors import CacheError
from featcache.files import canonical_json, hash_bytes, pretty_json
from featcache.storage import Place, RemotePath, bring_here, locate

VERSION = 1
SUFFIX = ".json"
MARK = "featcache_index"
HDF5_MARK = b"\x89HDF"  # what a cache file begins with, whatever it is called
MAX_BYTES = 1 << 26  # of an index; that of a thousand caches has a quarter of a megabyte
MAX_CACHES = 100_000  # of one index: more of them are too small
NAMED_CACHES = 8  # in a command that is told


@dataclass(frozen=True, kw_only=True)
class Member:
    """A cache that an index names: where it lies, what it must hold, its rows by split and its size in bytes."""

    path: Place
    content_sha256: str
    rows: Mapping[str, int]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """Several caches that read as one.

    Attributes
    ----------
    path
        The index file.
    classes, key
        Of all of them.
    members
        The caches, in the order of their rows.
    """

    path: Place
    classes: tuple[str, ...]
    key: str
    members: tuple[Member, ...]

    @property
    def content_sha256(self) -> str:
        """Digest of classes, key and what each cache must hold."""
        content = [list(self.classes), self.key, [member.content_sha256 for member in self.members]]
        return hash_bytes(canonical_json(content).encode())

    @property
    def command(self) -> str:
        """What makes it again; of many caches they are not all named."""
        if len(self.members) > NAMED_CACHES:
            return f"featcache index {self.path} CACHE.h5 ..."
        return format_command(self.path, {"caches": [member.path for member in self.members]})


def format_index(index: Index) -> str:
    """The text of an index file: the same for the same index."""
    caches = [
        {
            "path": _name_member(member.path, index.path),
            "content_sha256": member.content_sha256,
            "rows": dict(member.rows),
            "bytes": member.bytes,
        }
        for member in index.members
    ]
    head = {MARK: VERSION, "classes": list(index.classes), "extractor_key": index.key}
    return pretty_json({**head, "caches": caches})


def _name_member(path: Place, index: Place) -> str:
    """A cache relative to its index if it lies beside or below it, so that both can be moved; else as it is called."""
    if isinstance(path, RemotePath) or isinstance(index, RemotePath):
        beginning = f"{index.parent}/"
        text = str(path if isinstance(path, RemotePath) else path.absolute())
        return text.removeprefix(beginning) if isinstance(path, RemotePath) else text
    whole, folder = path.absolute(), index.absolute().parent
    return str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)


def is_index(place: Place) -> bool:
    """Whether an index, however damaged, lies at a place: its name ends in .json, and it begins as they do."""
    if place.suffix != SUFFIX:
        return False
    try:
        here = bring_here(place)
        if not here.is_file():  # to open a pipe is to wait for who writes into it
            return False
        with here.open("rb") as file:
            return "".join(file.read(64).decode("ascii", "replace").split()).startswith(f'{{"{MARK}":')
    except OSError:
        return False


def find_index(path: Place | str) -> Index | None:
    """The index that lies at a place; None if what lies there, if anything, is to be read as a cache file.

    Raises
    ------
    CacheError
        If its name is an index's and it is none.
    """
    place = locate(path)
    if place.suffix != SUFFIX:
        return None
    with explain_errors(place):
        if not place.is_file():
            what = "is no regular file" if place.exists() else "does not exist"
            raise CacheError(
                f"{place} {what}: expected an index of caches; `featcache index {place} CACHE.h5 ...` makes one"
            )
        with bring_here(place).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if data.startswith(HDF5_MARK):
        return None
    try:
        return _parse_index(data, place)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CacheError(
            f"{place} is no index of caches ({error or type(error).__name__}); `featcache index {place} CACHE.h5 ...` "
            f"makes one, under another name if this file is needed"
        ) from error


def _parse_index(data: bytes, place: Place) -> Index:
    """An index from its bytes. Raises a ValueError, or what else strange JSON leads to."""
    value = json.loads(data) if len(data) <= MAX_BYTES else None
    if not isinstance(value, dict) or MARK not in value:
        raise ValueError(f"expected {MARK}")
    if value[MARK] != VERSION:
        raise ValueError(f"it is of version {value[MARK]!r}, this featcache reads {VERSION}")
    classes, key = value["classes"], value["extractor_key"]
    if not isinstance(classes, list) or not all(isinstance(text, str) for text in (*classes, key)):
        raise ValueError("its classes or its extractor_key are no texts")
    if not isinstance(value["caches"], list) or not value["caches"]:
        raise ValueError("it names no caches")
    if len(value["caches"]) > MAX_CACHES:
        raise ValueError(f"it names {len(value['caches']):,} caches, expected at most {MAX_CACHES:,}")
    members = tuple(_parse_member(item, place) for item in value["caches"])
    return Index(path=place, classes=tuple(classes), key=key, members=members)


def _parse_member(value: Mapping[str, Any], place: Place) -> Member:
    path, digest, rows, size = (value[name] for name in ("path", "content_sha256", "rows", "bytes"))
    if not isinstance(path, str) or not path or "\0" in path or not isinstance(digest, str):
        raise ValueError("the path or the content_sha256 of a cache is no text")
    if not isinstance(rows, dict) or not all(type(n) is int for n in (*rows.values(), size)):
        raise ValueError("the rows or the bytes of a cache are no numbers")
    return Member(path=_locate_member(path, place), content_sha256=digest, rows=rows, bytes=size)


def _locate_member(text: str, index: Place) -> Place:
    """Where a cache lies, as `_name_member` called it."""
    place = locate(text)
    if isinstance(place, RemotePath) or place.is_absolute():
        return place
    return index.parent / text


def list_members(path: Place | str) -> list[Place]:
    """The cache files that are behind a name: those of an index, or the one itself.

    Raises
    ------
    CacheError
        If its name is an index's and it is none.
    """
    index = find_index(path)
    return [locate(path)] if index is None else [member.path for member in index.members]
