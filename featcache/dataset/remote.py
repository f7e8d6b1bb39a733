"""Files at URLs, by fsspec: one listing of a whole tree, bytes by name, and what proves that they are the same.

A store that gives an object a checksum or a version (ETag, MD5, generation) proves with it that the bytes are as they
were; one that gives only a size and a time proves nothing, and its files are read again. Writes nothing.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np

from featcache.dataset.folders import Tree, find_files, list_images
from featcache.dataset.hashing import fold_stats
from featcache.dataset.listing import NO_STATS, STATS, Stats
from featcache.dataset.roots import KINDS, READERS, Files, Found, Source, check_url, is_name, is_url, parse_root
from featcache.errors import DatasetError, FeatcacheError, show_value
from featcache.extras import import_extra

S3 = ("s3", "s3a")
# What stores call a thing that differs whenever the bytes at one URL do.
PROOFS = ("ETag", "etag", "md5Hash", "generation", "VersionId", "version_id")
TIMES = ("LastModified", "last_modified", "updated", "mtime")
MD5 = re.compile("[0-9a-f]{32}")
GONE = "cannot be read: there is no such file"


@dataclass(frozen=True)
class Seen:
    """What a store said of a file.

    Attributes
    ----------
    stats
        As `listing.STATS`; zeros if it proves nothing.
    md5
        Of the bytes in hexadecimal, if the store says so.
    reason
        Why the file cannot be used; "" if it can.
    """

    stats: tuple[int, ...] = NO_STATS
    md5: str = ""
    reason: str = ""


class SeenTree:
    """What a store said of the files of a whole tree, in little memory.

    Parameters
    ----------
    files
        N names relative to the tree, with what was said of each.
    """

    def __init__(self, files: Mapping[str, Seen]) -> None:
        names = sorted(files, key=os.fsencode)
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self._stats = np.array([files[name].stats for name in names], np.int64).reshape(-1, len(STATS))
        self._md5 = np.array([files[name].md5.encode() for name in names], "S32")

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self._names.tolist())

    def find(self, name: str) -> Seen:
        """What was said of a file."""
        wanted = np.bytes_(os.fsencode(name))
        i = int(np.searchsorted(self._names, wanted))
        if i == len(self._names) or self._names[i] != wanted:
            return Seen(reason=GONE)
        return Seen(tuple(self._stats[i].tolist()), str(self._md5[i], "ascii"))

    def narrow(self, names: Sequence[str]) -> SeenTree:
        """What was said of these files alone."""
        return SeenTree({name: seen for name in names if not (seen := self.find(name)).reason})


class RemoteFolder(Source):
    """Folders of classes at a URL, laid out as local ones are.

    Parameters
    ----------
    url
        Of the folder.
    """

    readers = READERS

    def __init__(self, url: str) -> None:
        check_url(url)
        self.name = self.address = url.rstrip("/")
        self._seen: SeenTree | None = None
        self._is_narrow = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self._is_narrow else {**self.__dict__, "_seen": None}

    def narrow(self, paths: Sequence[str]) -> Source:
        """The same with what the store said of these files."""
        few = copy.copy(self)
        few._seen, few._is_narrow = None if self._seen is None else self._seen.narrow(paths), self._seen is not None
        return few

    def settle(self) -> Source:
        """The same, or the tar shards that it holds."""
        from featcache.dataset.tars import choose_shards

        pattern = choose_shards(self.address, list_folder)
        if pattern is None:
            return self
        root = parse_root(pattern)
        assert isinstance(root, Source)
        return root

    def find(self) -> Found:
        """The images, by one listing of the whole tree."""
        self._seen = list_tree(self.address)
        rows, ignored = find_files(self.address, False, Tree(self.address, self._seen))
        return Found(rows, ignored)

    def look(self, paths: Sequence[str]) -> tuple[Stats, list[str]]:
        """What the store said of N files when it listed them."""
        if self._seen is None:
            self._seen = list_tree(self.address)
        return gather_seen([self._seen.find(path) for path in paths])

    def forget(self) -> None:
        """List the tree anew the next time."""
        self._seen = None

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return read_url(f"{self.address}/{path}")

    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """What will stand for the bytes of a file, if they are those that the store spoke of."""
        seen = Seen() if self._seen is None else self._seen.find(path)
        return settle_seen(f"{self.address}/{path}", seen, data)


class Anywhere(Files):
    """Files that are named by their own paths and URLs."""

    name, readers = ".", READERS

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return read_url(path) if is_url(path) else Path(path).read_bytes()


def list_remote_images(url: str) -> list[str]:
    """URLs of the image files anywhere below a URL, sorted.

    Raises
    ------
    DatasetError
        If there is nothing, or it cannot be listed.
    """
    check_url(url)
    folder = url.rstrip("/")
    return list_images(folder, Tree(folder, list_tree(folder)))


def gather_seen(seen: Sequence[Seen]) -> tuple[Stats, list[str]]:
    """Stats (N, 4) and reasons of N files."""
    stats = np.array([one.stats for one in seen], np.int64).reshape(-1, len(STATS))
    return stats, [one.reason for one in seen]


def settle_seen(url: str, seen: Seen, data: bytes) -> tuple[int, ...]:
    """Stats of a file that was seen first and read after that; zeros if it may have changed in between."""
    if not any(seen.stats):
        return NO_STATS
    if seen.md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() == seen.md5:
        return seen.stats
    return seen.stats if look_at_url(url) == seen else NO_STATS


def look_at_url(url: str) -> Seen:
    """What a store says of a file now."""
    try:
        with explain(url):
            fs, path = connect(url)
            fs.invalidate_cache()
            return describe_info(url, fs.info(path))
    except OSError as error:
        return Seen(reason=f"cannot be read: {error}")


def look_at_urls(urls: Sequence[str]) -> list[Seen]:
    """What stores say of N files, many at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(look_at_url, urls))


def describe_info(url: str, info: Mapping[str, Any]) -> Seen:
    """What a store says of a file, folded.

    >>> describe_info("memory://a", {"size": 3, "created": 1.0}).stats
    (0, 0, 0, 0)
    >>> any(describe_info("s3://b/a", {"size": 3, "ETag": '"0123"'}).stats)
    True
    """
    proof = next((str(info[name]).strip('"') for name in PROOFS if info.get(name)), "")
    if not proof or proof == "null" or proof.startswith("W/"):  # a weak ETag may stay when bytes change
        return Seen()
    size = int(info.get("size") or 0)
    times = [info[name] for name in TIMES if isinstance(info.get(name), datetime)]
    stats = fold_stats([url, proof, size, *(int(time.timestamp()) for time in times[:1])], size)
    md5 = proof if MD5.fullmatch(proof) else ""
    if isinstance(info.get("md5Hash"), str):
        md5 = base64.b64decode(info["md5Hash"]).hex()
    return Seen(stats, md5)


def list_tree(url: str) -> SeenTree:
    """All files below a URL, by one listing.

    Raises
    ------
    DatasetError
        If there are none, or they cannot be listed.
    """
    with explain_listing(url):
        fs, base = connect(url)
        fs.invalidate_cache()
        found = fs.find(base, detail=True)
        fs.invalidate_cache()  # or it would keep all that in memory
    start = len(base.rstrip("/")) + 1
    files = {name[start:]: describe_info(f"{url}/{name[start:]}", info) for name, info in found.items() if name[start:]}
    if (bad := next((name for name in files if not is_name(name)), None)) is not None:
        raise DatasetError(f"{url} has the name {show_value(bad)}: expected names that files can have; rename it")
    if not files:
        raise DatasetError(f"no data set at {url}: expected {KINDS}, found {'a file' if found else 'nothing'}")
    return SeenTree(files)


def list_folder(url: str) -> list[tuple[str, bool]]:
    """Name of what lies directly in a folder at a URL, sorted, each with whether it is a folder.

    Raises
    ------
    DatasetError
        If there is no such folder, or it cannot be looked into.
    """
    with explain_listing(url):
        fs, base = connect(url)
        fs.invalidate_cache()
        entries = fs.ls(base, detail=True)
        fs.invalidate_cache()
    start = len(base.rstrip("/")) + 1
    names = {(entry["name"].rstrip("/")[start:], entry["type"] == "directory") for entry in entries}
    return sorted(one for one in names if one[0])


def connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, one for all threads of this process, and the path in it.

    Raises
    ------
    MissingExtraError
        If a package is needed that is not installed.
    """
    parts = urlsplit(url)
    fs = _connect(os.getpid(), f"{parts.scheme}://{parts.netloc}")
    return fs, fs._strip_protocol(url)


@lru_cache(maxsize=64)
def _connect(process: int, base: str) -> Any:
    """A forked process must not share connections."""
    del process
    if base.startswith(tuple(f"{name}://" for name in S3)):
        import_extra("s3fs", extra="s3", what="data at s3:// needs")
    fsspec = import_extra("fsspec", extra="s3", what="data at a URL needs")
    return fsspec.core.url_to_fs(base)[0]


def read_url(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes of a file at a URL, or some of them.

    Raises
    ------
    OSError
        If they cannot be read.
    """
    with explain(url):
        fs, path = connect(url)
        if start is None and url.startswith(tuple(f"{name}://" for name in S3)):
            try:
                data = fs.cat_file(path, start=0)  # without a start it asks for the size first
            except FileNotFoundError:
                raise
            except OSError:  # of an empty file there is no byte 0
                data = fs.cat_file(path)
            return bytes(data)
        data = fs.cat_file(path, start=start, end=stop)
    return bytes(data)


@contextmanager
def open_binary(address: str) -> Iterator[IO[bytes]]:
    """A file on the disk or at a URL, open for reading; raises an OSError if it cannot be read."""
    if not is_url(address):
        with open(address, "rb") as file:  # noqa: PTH123 - an address is a text
            yield file
        return
    with explain(address):
        fs, path = connect(address)
        with fs.open(path, "rb", block_size=1 << 20) as file:
            yield file


def exists(address: str) -> bool:
    """Whether there is a file, on the disk or at a URL.

    Raises
    ------
    DatasetError
        If that cannot be found out.
    """
    if not is_url(address):
        return os.path.isfile(address)  # noqa: PTH113 - as above
    with explain_listing(address):
        fs, path = connect(address)
        fs.invalidate_cache()
        return bool(fs.isfile(path))


@contextmanager
def explain_listing(url: str) -> Iterator[None]:
    """Whatever a file system raises, as a DatasetError in one line."""
    try:
        with explain(url):
            yield
    except OSError as error:
        raise DatasetError(f"cannot look into {url}: {error}") from error


@contextmanager
def explain(url: str) -> Iterator[None]:
    """Whatever a file system raises of a file, as an OSError in one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(say_gone(error, url)) from error
    except FeatcacheError:
        raise
    except Exception as error:  # every store has errors of its own, and few are OSErrors
        line = (str(error).splitlines() or [""])[0]
        raise OSError(
            f"{type(error).__name__}: {line}" if not isinstance(error, OSError) or not line else line
        ) from error


def say_gone(error: FileNotFoundError, url: str) -> str:
    """What is not there: S3 says so of a bucket."""
    text = str(error)
    return text if "bucket" in text and urlsplit(url).netloc not in text else "there is no such file"
