r"""What the images of a data set are relative to: a local folder, or a source that is none. Reads nothing by itself.

=====================================  ===============================================================================
DATA                                   what it is
=====================================  ===============================================================================
a folder, file:///folder               a `Path`
s3://bucket/folder, or another URL     `remote.RemoteFolder`: folders of classes on anything that fsspec reads
x.tar, x-{000..015}.tar, folder/*.tar  `tars.TarShards`: tar files in webdataset's layout; so is a folder of them
x.csv, .tsv, .jsonl, .ndjson, .parquet  `lists.ListedFiles`: a list with a path, a label and perhaps a split in each row
hf:DIR, hf:user/name[:config]          `hub.HubRows`: a data set that the package `datasets` reads
=====================================  ===============================================================================

`root / path` is what has the bytes of a row, whatever the root is. A source is picklable: decoding processes and the
workers of a cluster have it too.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DatasetError, FeatcacheError, shorten, show_value

HUB = "hf:"
LIST_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
CACHES = (".h5", ".hdf5", ".he5", ".json")  # and indexes of some
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
MAX_LABEL = 1000  # characters of the name of a class
MAX_PATH = 4096  # bytes of the path of a sample, as in file systems
# What fsspec reads that is no place: the address itself is the data, or it leads to another one, or to this machine.
NO_PLACES = (
    *("file", "local", "asynclocal", "git", "data", "reference", "generic", "dir", "dask", "zip", "tar", "libarchive"),
    *("cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper"),
)
READERS = 32  # objects that are read at the same time from far away
LOCAL_URL = re.compile(r"(file|local)://(?=/)")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
SECRETS = re.compile("signature|token|secret|password|credential|^sig$|^key$", re.IGNORECASE)  # a URL's parameters
KINDS = (
    "a folder DATA/train/<class>/ and DATA/val/<class>/, or DATA/<class>/, a URL of such a folder, tar shards, a list "
    "(.csv, .jsonl, .parquet) or hf:NAME"
)


@dataclass(frozen=True)
class Found:
    """What a source holds, by name.

    Attributes
    ----------
    rows
        (path, class) of each sample of each split, in order; in "" where contents will decide who validates.
    ignored
        What is no sample.
    by_number
        Whether class names that are all integers are sorted by their value.
    """

    rows: Mapping[str, Sequence[tuple[str, str]]]
    ignored: Sequence[str] = ()
    by_number: bool = False


class Files(ABC):
    """Files that are not all in one local folder.

    Attributes
    ----------
    name
        As the user calls them.
    readers
        How many are best read at the same time; 1 where reading is quick.
    """

    name: str
    readers: int = 1

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The bytes of one. Raises an OSError if they cannot be read."""

    def __truediv__(self, path: str) -> Item:
        return Item(self, path)

    def __str__(self) -> str:
        return self.name


class Source(Files):
    """A data set that is no local folder.

    Attributes
    ----------
    address
        What opens it again from anywhere.
    """

    address: str

    def settle(self) -> Source:
        """The same, looked at once: it is there, as far as one look tells; or what it turns out to be.

        Raises
        ------
        DatasetError
            If there is nothing.
        MissingExtraError
            If a package is needed that is not installed.
        """
        return self

    @abstractmethod
    def find(self) -> Found:
        """The names of all samples, with their classes. Raises a DatasetError if there are none to be had."""

    @abstractmethod
    def look(self, paths: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """What stands for the bytes of N samples (N, 4), as `listing.STATS`, and why one cannot be used, or "".

        What was seen before, since the last `forget`, may be said again.
        """

    @abstractmethod
    def forget(self) -> None:
        """See everything anew the next time."""

    @abstractmethod
    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """What will stand for these bytes, which were read just now; zeros if nothing proves that they are its."""

    def narrow(self, paths: Sequence[str]) -> Source:
        """The same for these samples alone: it is small, and knows of them what this one does, on any machine."""
        del paths
        return self


class ReadOnce(Source):
    """A source whose samples are read twice, to be hashed and to be decoded, and fetched once.

    The bytes of a sample are kept from the first reading to the second. A copy in another process begins with none.
    """

    def __init__(self, source: Source) -> None:
        self.name, self.address, self.readers = source.name, source.address, source.readers
        self._source = source
        self._kept: dict[str, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def find(self) -> Found:
        """As the source does."""
        return self._source.find()

    def look(self, paths: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
        """As the source does."""
        return self._source.look(paths)

    def forget(self) -> None:
        """As the source does."""
        self._source.forget()

    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """As the source does."""
        return self._source.prove(path, data)

    def read(self, path: str) -> bytes:
        """The bytes of a sample, fetched if they are not kept."""
        data = self._kept.pop(path, None)
        if data is None:
            data = self._kept[path] = self._source.read(path)
        return data


@dataclass(frozen=True)
class Item:
    """One of several files, to be read as a `Path` is."""

    files: Files
    path: str

    def read_bytes(self) -> bytes:
        """Its bytes. Raises an OSError if they cannot be read."""
        return self.files.read(self.path)

    def __str__(self) -> str:
        return self.path if is_url(self.path) else f"{self.files}/{self.path}"


Root: TypeAlias = Path | Source


def parse_root(data: Path | str) -> Root:
    """The root that a text names. Whether there is anything is not looked at.

    Raises
    ------
    DatasetError
        If it is a URL that cannot be one of a data set.

    Examples
    --------
    >>> parse_root("file:///photos").as_posix(), str(parse_root("s3://bucket/photos/"))
    ('/photos', 's3://bucket/photos')
    """
    text = str(data)
    if isinstance(data, str) and text.startswith(HUB):
        from featcache.dataset.hub import HubRows

        return HubRows(text)
    text = strip_local(text) if isinstance(data, str) else text
    if text.lower().endswith(COMPRESSED):
        raise DatasetError(f"{text} is compressed: expected a plain .tar; unpack it, as `gunzip` or `unzstd` do")
    is_folder = not is_url(text) and os.path.isdir(text)  # noqa: PTH112 - a Path of too long a name raises an error
    if text.lower().endswith(".tar") and not is_folder:
        from featcache.dataset.tars import TarShards

        return TarShards(text)
    if text.lower().endswith(LIST_EXTENSIONS) and not is_folder:
        from featcache.dataset.lists import ListedFiles

        return ListedFiles(text)
    if is_url(text):
        from featcache.dataset.remote import RemoteFolder

        return RemoteFolder(text)
    return Path(text)


def open_root(data: Path | str) -> Root:
    """The root of a data set that is there.

    Parameters
    ----------
    data
        See the table above.

    Raises
    ------
    DatasetError
        If there is nothing, or nothing that could be a data set.
    MissingExtraError
        If a package is needed that is not installed.
    """
    root = parse_root(data)
    if isinstance(root, Source):
        return root.settle()
    if not os.path.isdir(root):  # noqa: PTH112 - as above
        found = "a file" if os.path.isfile(root) else "nothing"  # noqa: PTH113
        raise DatasetError(
            f"no data set at {root}: expected {KINDS}, found {found}; `featcache sample digits {root}` makes one to try"
        )
    from featcache.dataset.tars import choose_shards

    pattern = choose_shards(str(root))
    return root if pattern is None else parse_root(pattern)


def check_root(data: Path | str) -> None:
    """Raise what `open_root` raises."""
    open_root(data)


def reopen_root(data: str) -> Root | None:
    """The root that a cache or a run names, or None if its images are not to be had here and now."""
    try:
        root = parse_root(data)
        if isinstance(root, Source):
            return root.settle()
    except FeatcacheError:
        return None
    return root if os.path.isdir(root) else None  # noqa: PTH112 - as above


def name_root(root: Root) -> str:
    """What opens a root again, from any folder: what caches and runs keep of it."""
    return root.address if isinstance(root, Source) else str(root.resolve())


def find_common_folder(data: Sequence[str]) -> tuple[str, list[str]] | None:
    """The folder that holds the folders of several data sets, and how the paths in each begin there.

    Parameters
    ----------
    data
        What `name_root` gave of each.

    Returns
    -------
    None if one is no folder of images, or they are not in one place.

    Examples
    --------
    >>> find_common_folder(["/photos/2023", "/photos/2024/may"])
    ('/photos', ['2023/', '2024/may/'])
    >>> find_common_folder(["s3://bucket/a", "s3://bucket/b"]), find_common_folder(["/a", "/b.tar"])
    (('s3://bucket', ['a/', 'b/']), None)
    """
    parts = [text.rstrip("/").split("/") for text in data]
    n = next((i for i, own in enumerate(zip(*parts, strict=False)) if len(set(own)) > 1), min(map(len, parts)))
    if n < (3 if is_url(data[0]) else 1):  # of a URL the protocol and the bucket
        return None
    folder = "/".join(parts[0][:n]) or "/"
    if len({type(parse_root(text)) for text in (*data, folder)}) > 1 or not _is_folder(parse_root(folder)):
        return None
    return folder, ["".join(f"{part}/" for part in own[n:]) for own in parts]


def _is_folder(root: Root) -> bool:
    """Whether a root is a folder of images, here or in a store."""
    from featcache.dataset.remote import RemoteFolder

    return isinstance(root, Path | RemoteFolder)


def names_source(text: str) -> bool:
    """Whether a text names a data set that is no local folder: a URL, tar files, a list, hf:NAME.

    >>> names_source("s3://bucket/photos"), names_source("s3://bucket/photos.h5"), names_source("photos")
    (True, False, False)
    """
    if text.lower().endswith(CACHES):
        return False
    try:
        return isinstance(parse_root(text), Source)
    except DatasetError:  # it is meant to be one
        return True


def is_url(text: str) -> bool:
    """Whether a text begins as a URL does.

    >>> is_url("s3://bucket/a"), is_url("C:/photos"), is_url("a/b://c")
    (True, False, False)
    """
    return URL.match(text) is not None


def strip_local(text: str) -> str:
    """A local URL as a path; anything else as it is.

    >>> strip_local("file:///photos/a"), strip_local("s3://bucket/a")
    ('/photos/a', 's3://bucket/a')
    """
    return LOCAL_URL.sub("", text, count=1) if LOCAL_URL.match(text) else text


def check_url(url: str) -> None:
    """Raise a DatasetError if a URL holds what should not be written down, or is of a kind that is not understood.

    The names of a data set's images go into caches, runs and reports.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # it may hold a password, and so may the error
        raise DatasetError(
            f"an address {shorten(url.partition('://')[0])}://... is no URL: expected one such as s3://bucket/folder"
        ) from error
    plain = shorten(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    if parts.password is not None or any(SECRETS.search(name) for name, _ in parse_qsl(parts.query)):
        raise DatasetError(
            f"{plain} is given with a password or a signature, which would be written into caches and reports: "
            f"expected a URL without; give it to the library of {parts.scheme}:// by environment variables or a file"
        )
    if "::" in url or parts.scheme in NO_PLACES:
        raise DatasetError(f"{plain} cannot be read: expected one URL such as s3://bucket/folder, or file:///folder")


def check_path(path: Any, where: str) -> str:
    """A path that data gives a sample.

    Parameters
    ----------
    path, where
        What it gives, and what a person calls that.

    Raises
    ------
    DatasetError
        If no file can be called so.
    """
    if not isinstance(path, str) or not path.strip() or not is_name(path) or len(os.fsencode(path)) > MAX_PATH:
        raise DatasetError(
            f"{where} is {show_value(path)}, expected a text of {MAX_PATH:,} bytes at most that can be a file's name"
        )
    return path


def check_label(label: Any, where: str) -> str:
    """A label that data gives a sample, as the name of a class.

    Parameters
    ----------
    label, where
        What it gives, and what a person calls that.

    Raises
    ------
    DatasetError
        If it is no text and no integer, or no name for a class.
    """
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise DatasetError(f"{where} is {show_value(label)}, expected a text or an integer")
    name = str(label)
    if len(name) > MAX_LABEL or not is_name(name):
        raise DatasetError(
            f"{where} is {show_value(name)}, expected a text of {MAX_LABEL:,} characters at most that can be written "
            f"as UTF-8, without NUL"
        )
    return name


def is_name(text: str) -> bool:
    r"""Whether a text can be written as file names are, and is the same when it is read again.

    >>> is_name("r\xe9d"), is_name("r\ud800d"), is_name("r\0d")
    (True, False, False)
    """
    try:
        return "\0" not in text and os.fsdecode(os.fsencode(text)) == text
    except UnicodeEncodeError:
        return False
