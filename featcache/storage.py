"""Places where a cache may lie: a path of this machine, or a URL of a store that fsspec reaches. Knows no HDF5.

An object of a store is written by one upload, which is there as a whole or not at all; nothing is renamed there,
locked or synced. It is read through a copy on this machine (`copies_path`): a copy is used for as long as the store's
ETag says that the object is the same, and is fetched again otherwise. What a store's library raises comes out as a
`StoreError`, which is an OSError, as of a disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from featcache import files
from featcache.errors import FeatcacheError, MissingExtraError, OutputError, SettingsError, StoreError
from featcache.extras import import_extra

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
LOCAL = ("file", "local")
S3 = ("s3", "s3a")
# What changes whenever an object's bytes do, as the stores of fsspec call it. Times do not: their clocks are coarse.
TOKENS = ("ETag", "etag", "Content-MD5", "md5Hash")
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
UPLOAD_BYTES = 50 << 20  # of the pieces in which s3fs uploads what is large: its ETag depends on it
REQUESTS = 16  # that are sent at a time
READ_TRIES = 3  # of an object that changes while it is read
FORGOTTEN_SECONDS = 86400.0  # a download that nobody has touched for so long is of a process that died
COPIES_VARIABLE = "FEATCACHE_COPIES"

_fetching = threading.Lock()  # two threads would download the same


@dataclass(frozen=True)
class RemoteStatus:
    """What a store says of an object.

    Attributes
    ----------
    st_size
        Bytes; named as a file's.
    token
        Equal only for equal bytes; None where the store gives nothing of the kind.
    st_mtime
        When it was written, in seconds since 1970; 0 where the store does not say.
    is_folder
        Whether it is no object, but the beginning of the names of some.
    """

    st_size: int
    st_mtime: float
    token: str | None
    is_folder: bool


@dataclass(frozen=True, order=True)
class RemotePath:
    """A name in a store, with those methods of `pathlib.Path` that make sense there.

    Two of the same name are equal. All that ask the store raise StoreError if it does not answer, and FileNotFoundError
    if there is no such object.

    Parameters
    ----------
    url
        PROTOCOL://BUCKET/KEY, without a slash at the end; see `locate`.

    Examples
    --------
    >>> path = RemotePath("s3://bucket/photos/features.h5")
    >>> path.name, str(path.with_name("other.h5")), str(path.parent / "x")
    ('features.h5', 's3://bucket/photos/other.h5', 's3://bucket/photos/x')
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """What comes after the last slash; "" of a bucket."""
        return self._key.name if len(self._key.parts) > 1 else ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """What comes before the last slash; a bucket is its own parent."""
        return RemotePath(self.url.rpartition("/")[0]) if self.name else self

    def with_name(self, name: str) -> RemotePath:
        """Another name beside it."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same name with another end."""
        return self.with_name(self.stem + suffix)

    def is_symlink(self) -> bool:
        """No store has links."""
        return False

    def resolve(self) -> RemotePath:
        """No store has links."""
        return self

    def stat(self) -> RemoteStatus:
        """What the store says of it now."""
        with self._explain():
            info = self._system.info(self._path)
        token = next((str(info[name]) for name in TOKENS if info.get(name)), None)
        if info["size"] is None:
            raise StoreError(self.url, "the store does not say how large it is")
        weak = token is not None and token.startswith("W/")  # the same by its meaning, not by its bytes
        times = [info[name] for name in TIMES if info.get(name)]
        written = times[0].timestamp() if times and isinstance(times[0], datetime) else times[0] if times else 0.0
        return RemoteStatus(info["size"], float(written), None if weak else token, info["type"] == "directory")

    def exists(self) -> bool:
        """Whether there is such an object, or some below it."""
        return self._ask() is not None

    def is_file(self) -> bool:
        """Whether there is such an object."""
        found = self._ask()
        return found is not None and not found.is_folder

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        found = self._ask()
        return found is not None and found.is_folder

    def read_bytes(self) -> bytes:
        """All of the object."""
        with self._explain():
            data: bytes = self._system.cat_file(self._path)
            return data

    def write_bytes(self, data: bytes) -> None:
        """Make it an object of these bytes, at once or not at all."""
        with self._explain():
            self._system.pipe_file(self._path, data)

    def upload(self, source: Path) -> RemoteStatus:
        """Make it an object of a file's bytes, at once or not at all; a large one in pieces that are put together.

        Returns
        -------
        What the store then says of it.
        """
        with self._explain():
            self._system.put_file(str(source), self._path)
        found, size = self.stat(), source.stat().st_size
        if found.st_size != size:
            raise StoreError(self.url, f"{found.st_size:,} of {size:,} bytes arrived; run the same command again")
        return found

    def download(self, target: Path) -> None:
        """Write the object's bytes into a file."""
        with self._explain():
            self._system.get_file(self._path, str(target))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            with self._explain():
                self._system.rm_file(self._path)  # NOTE: `rm` would take [ and * in a name for a pattern
        except FileNotFoundError:
            if not missing_ok:
                raise

    def list_below(self, *, deep: bool = False) -> dict[RemotePath, int]:
        """The objects below it with their sizes, sorted; `deep` also those of folders in it."""
        with contextlib.suppress(FileNotFoundError), self._explain():
            found = self._system.find(self._path, maxdepth=None if deep else 1, detail=True)
            start = len(self._path.rstrip("/")) + 1
            return {self / key[start:]: found[key]["size"] or 0 for key in sorted(found) if key[start:]}
        return {}

    @property
    def _key(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2])

    @property
    def _system(self) -> Any:
        """The store, as fsspec has it; one for each process, so that a forked one does not share connections."""
        return self._reach()[0]

    @property
    def _path(self) -> str:
        """Its name, as fsspec has it."""
        path: str = self._reach()[1]
        return path

    def _reach(self) -> tuple[Any, str]:
        protocol = self.url.partition("://")[0]
        if protocol in S3:
            import_extra("s3fs", extra="s3", what=f"{protocol}:// places need")
        fsspec = import_extra("fsspec", extra="s3", what="places in stores need")
        try:
            system, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:  # of a store that featcache has no extra for
            raise MissingExtraError(f"{protocol}:// places need an optional package: {error}") from error
        except ValueError as error:
            raise SettingsError(f"{self}: {_say(error)}; expected a path, or a URL such as s3://BUCKET/NAME") from error
        return system, path

    def _ask(self) -> RemoteStatus | None:
        with contextlib.suppress(FileNotFoundError):
            return self.stat()
        return None

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        """Raise whatever the store's library does as a StoreError that names this."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _say(error), self.url) from error
        except FeatcacheError:
            raise
        except Exception as error:
            # Libraries of stores have no error in common; what Python itself raises otherwise is a mistake of ours.
            if type(error).__module__ == "builtins" and not isinstance(
                error, OSError | ValueError | NotImplementedError
            ):
                raise
            raise StoreError(self.url, _say(error)) from error


Place: TypeAlias = Path | RemotePath


def locate(text: str | Place) -> Place:
    """The place that a path or a URL names; `file://` URLs are paths of this machine, taken literally.

    Raises
    ------
    SettingsError
        If it is a URL that holds a password or a query, which would be written into records, or several URLs in one.

    Examples
    --------
    >>> locate("s3://bucket/features.h5")
    RemotePath(url='s3://bucket/features.h5')
    >>> locate("file:///tmp/features.h5").as_posix()
    '/tmp/features.h5'
    """
    if not isinstance(text, str):
        return text
    found = URL.fullmatch(text)
    if found is None and ("://" not in text or "::" not in text):
        return Path(text)
    if found is None or "::" in text:
        raise SettingsError(f"{text}: expected one URL such as s3://BUCKET/NAME, not several that are chained")
    protocol, rest = found["protocol"].lower(), found["rest"]
    if protocol in LOCAL:
        return Path(rest)
    if ":" in rest.partition("/")[0].rpartition("@")[0] or ("?" in rest and protocol in ("http", "https")):
        raise SettingsError(
            f"a {protocol}:// URL holds a password or a query, which would be written into records; give credentials "
            f"in the environment, as the store's own programs take them"
        )
    if not rest.strip("/"):
        raise SettingsError(f"{text}: expected one URL such as s3://BUCKET/NAME")
    return RemotePath(f"{protocol}://{rest.rstrip('/')}")


def locate_local(text: str | Place, what: str) -> Path:
    """A path of this machine.

    Parameters
    ----------
    text
        It, or a URL of it.
    what
        Is written there, the subject of the error.

    Raises
    ------
    OutputError
        If it is in a store.
    """
    place = locate(text)
    if isinstance(place, RemotePath):
        raise OutputError(f"cannot write {place}: {what} goes to a folder of this machine; copy it there afterwards")
    return place


def follow_link(place: Place) -> Place:
    """The file itself, so that a link stays a link and both names are one place."""
    return place if isinstance(place, RemotePath) else files.follow_link(place)


def is_there(place: Place) -> bool:
    """Whether something has this name, be it a link to nothing."""
    return place.exists() if isinstance(place, RemotePath) else os.path.lexists(place)


def check_writable(place: Place) -> None:
    """See, before any work is done, that a file can be written at a place: by writing a small one, in a store.

    Raises
    ------
    OutputError
        If it cannot, or the place is a folder.
    """
    if not isinstance(place, RemotePath):
        files.check_writable(place)
        return
    probe = place.with_name(f".{place.name}.probe")
    try:
        if not place.name or place.is_dir():
            raise OutputError(f"cannot write {place}: it is a folder; expected a file name (-o FILE)")
        probe.write_bytes(b"")
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error.strerror}; choose another place with -o") from error
    with contextlib.suppress(OSError):  # it may be written and not removed: then the parts will stay, too
        probe.unlink()


def write_whole(place: Place, data: bytes | str) -> None:
    """Write a file so that its name never holds a part of it.

    Raises
    ------
    OutputError
        If it cannot be written; the old file, if any, is untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    if isinstance(place, RemotePath):
        with _explain_writing(place, len(data)):
            place.write_bytes(data)
    else:
        files.write_atomically(place, data)


@contextlib.contextmanager
def replace_whole(place: Place, size: int) -> Iterator[files.NewFile]:
    """Give a new file that takes the name `place` when the block ends well, as `files.replace_atomically` does.

    What is for a store is made whole on this machine, in `assembly_path`, and then uploaded. It becomes the copy
    through which the object is read, if the store's ETag proves that the object has the same bytes.

    Raises
    ------
    OutputError
        If it cannot be written; the old file, if any, is untouched.
    """
    if not isinstance(place, RemotePath):
        with files.replace_atomically(place, size) as new:
            yield new
        return
    whole = assembly_path(place) / f".{place.name}.{os.urandom(8).hex()}.tmp"
    try:
        with files.replace_atomically(whole, size) as new:
            yield new
        with _explain_writing(place, whole.stat().st_size):
            found = place.upload(whole)
        with contextlib.suppress(OSError):  # the object is what counts
            if found.token is not None and _proves(found.token, whole):
                _adopt(whole, _copy_path(place, found), place)
    finally:
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)


def assembly_path(place: Place) -> Path:
    """The folder on this machine in which a file for `place` is made; it needs room for all of it.

    Raises
    ------
    OutputError
        If it cannot be made.
    """
    return _clean_up(place) if isinstance(place, RemotePath) else place.parent


def copies_path() -> Path:
    """The folder of the copies: FEATCACHE_COPIES, or featcache/copies in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get(COPIES_VARIABLE) or f"{caches}/featcache/copies"
    return Path(os.path.expanduser(chosen))  # noqa: PTH111 - where nobody has a home


def bring_here(place: Place, *, fresh: bool = False) -> Path:
    """A file of this machine that holds what lies at a place now: itself, or a copy.

    Parameters
    ----------
    place
        Of a file.
    fresh
        Do not trust a copy that is there.

    Raises
    ------
    FileNotFoundError
        If there is no such object.
    StoreError
        If it cannot be read.
    OutputError
        If the copy cannot be written.
    """
    if not isinstance(place, RemotePath):
        return place
    with _fetching:
        for _ in range(READ_TRIES):
            found = place.stat()
            copy = _copy_path(place, found)
            if not fresh and found.token is not None and _has_size(copy, found.st_size):
                return copy
            if _fetch(place, found, copy):
                return copy
    raise StoreError(place.url, "it changes while it is read")


def write_named(place: Place, data: bytes) -> None:
    """Write a file that never changes and whose name tells whether its bytes are right, see `read_named`.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    write_whole(place, data)
    if isinstance(place, RemotePath):
        _keep_named(place, data)


def read_named(place: Place, is_right: Callable[[bytes], bool]) -> bytes:
    """The bytes of a file that never changes and whose name tells whether they are right.

    In a store a copy on this machine is read, if it is right; it is made if it is not there.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    if not isinstance(place, RemotePath):
        return place.read_bytes()
    with contextlib.suppress(OSError):
        data = _named_path(place).read_bytes()
        if is_right(data):
            return data
    data = place.read_bytes()
    if is_right(data):
        _keep_named(place, data)
    return data


def remove_files(places: Sequence[RemotePath]) -> None:
    """Remove objects, with the copies that `read_named` made of them; what is not there is removed.

    Raises
    ------
    StoreError
        If the store does not remove them all.
    """
    for place in places:
        with contextlib.suppress(OSError):
            _named_path(place).unlink(missing_ok=True)
            _named_path(place).parent.rmdir()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda place: place.unlink(missing_ok=True), places))


@contextlib.contextmanager
def _explain_writing(place: RemotePath, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {place} ({size:,} bytes): {error.strerror}") from error


def _fetch(place: RemotePath, found: RemoteStatus, copy: Path) -> bool:
    """Download an object under another name, and give it that of the copy if it was the same object all the while."""
    _check_space(place, _clean_up(place), found.st_size)
    temporary = files.temporary_path(copy)
    try:
        place.download(temporary)
        if place.stat() != found or not _has_size(temporary, found.st_size):
            return False
        _adopt(temporary, copy, place)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _adopt(source: Path, copy: Path, place: RemotePath) -> None:
    """Make a file the one copy of an object."""
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.replace(copy)
    for other in copy.parent.glob(f"*-{place.name}"):
        if other != copy:
            with contextlib.suppress(OSError):  # NOTE: who has it open reads on
                other.unlink()


def _clean_up(place: RemotePath) -> Path:
    """The folder of an object's copies, made if it is not there, without what dead processes did not finish."""
    folder = _copies_of(place)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OutputError(
            f"cannot keep a copy of {place} in {folder}: {error.strerror}; set {COPIES_VARIABLE} to another folder"
        ) from error
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                path.unlink()
    return folder


def _check_space(place: RemotePath, folder: Path, size: int) -> None:
    """Raise an OutputError if there is no room for a copy."""
    with contextlib.suppress(OSError):  # a file system that does not say
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OutputError(
                f"cannot keep a copy of {place} in {folder}: it needs {size:,} bytes and the disk has {free:,} left; "
                f"free some, or set {COPIES_VARIABLE} to another folder"
            )


def _copies_of(place: RemotePath) -> Path:
    """The folder of all copies of one object."""
    return copies_path() / _shorten(place.url)


def _copy_path(place: RemotePath, found: RemoteStatus) -> Path:
    """The copy of an object as the store has it now; a new name each time where the store cannot tell."""
    state = found.token or os.urandom(16).hex()
    return _copies_of(place) / f"{_shorten(f'{state} {found.st_size}')}-{place.name}"


def _named_path(place: RemotePath) -> Path:
    """The copy of an object that never changes."""
    folder = place.parent
    return copies_path() / _shorten(folder.url) / folder.name / place.name


def _keep_named(place: RemotePath, data: bytes) -> None:
    with contextlib.suppress(OSError, OutputError):  # the object is what counts
        files.write_atomically(_named_path(place), data)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _shorten(text: str) -> str:
    return files.hash_bytes(text.encode(errors="surrogateescape"))[:16]


def _proves(token: str, path: Path) -> bool:
    """Whether an ETag is the one that these bytes have: their MD5, or that of the MD5s of their pieces, with a count.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; under some encryptions it is neither.
    """
    digest, _, count = token.strip('"').partition("-")
    whole, pieces = hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as file:
        while piece := file.read(UPLOAD_BYTES):
            whole.update(piece)
            pieces.append(hashlib.md5(piece, usedforsecurity=False).digest())
    if not count:
        return whole.hexdigest() == digest
    return str(len(pieces)) == count and hashlib.md5(b"".join(pieces), usedforsecurity=False).hexdigest() == digest


def _say(error: BaseException) -> str:
    """What a library says, as one line without secrets."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    text = re.sub(r"//[^/@\s]+@", "//", text)  # user:password@
    text = re.sub(r"(\w://[^\s?\"']*)\?[^\s\"']*", r"\1", text)  # signatures
    if type(error).__name__ == "NoCredentialsError":
        text += " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
    return text if len(text) <= 300 else f"{text[:300]}..."
