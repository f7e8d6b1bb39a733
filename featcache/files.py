"""Files that are either whole or not there: temporary name, fsync, rename. Knows nothing of what is in them.

Every call that makes something durable goes through `disk`, one method each: a test puts another object there and lets
its k-th call fail, or dies before it. (Source of the idea: how SQLite is tested, https://www.sqlite.org/testing.html.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from featcache.errors import OutputError


class Disk:
    """The calls that make something durable. All raise OSError."""

    def create(self, path: Path) -> int:
        """A new file, or an emptied old one; its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """All of `data`, from `offset` bytes on."""
        view = memoryview(data)
        os.lseek(descriptor, offset, os.SEEK_SET)
        while view:
            view = view[os.write(descriptor, view) :]

    def truncate(self, descriptor: int, size: int) -> None:
        """Make a file `size` bytes long."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Wait until a file's bytes are on the disk."""
        os.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of what has it."""
        source.replace(target)

    def sync_folder(self, folder: Path) -> None:
        """Wait until a folder's names are on the disk, where the file system can."""
        if os.name != "posix":
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # NOTE: some network file systems cannot; nothing to mend
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, folder: Path) -> None:
        """A folder with its parents, if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)

    def remove(self, path: Path) -> None:
        """A file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, folder: Path) -> None:
        """An empty folder."""
        folder.rmdir()


disk = Disk()
# In containers every process has the same number, and one folder may be everybody's.
ME = secrets.randbits(32)
TRIES = 3  # of a small file, where somebody who tidies up took the unfinished one, or its empty folder, away


def hash_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    r"""JSON with sorted keys and no spaces: equal values give equal text, fit to be hashed.

    >>> canonical_json({"b": 1, "a": [1.5, "ü"]})
    '{"a":[1.5,"\\u00fc"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def pretty_json(value: Any) -> str:
    """JSON as a person reads it: indented, keys in the order given, newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


def find_free_memory() -> int | None:
    """Bytes that this process may still take, of the machine's and of its control group's; None where nobody says.

    Source: MemAvailable of proc_meminfo(5), memory.max and memory.current of Linux's control groups, version 2.
    """
    known = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        group = Path("/sys/fs/cgroup")
        known.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(known) if known else None


def follow_link(path: Path) -> Path:
    """The file itself, so that a link stays a link and both names are one place."""
    return path.resolve() if path.is_symlink() else path


def check_writable(path: Path) -> None:
    """See, before any work is done, that a file can be written at `path`; make its folder.

    Raises
    ------
    OutputError
        If the folder cannot be made or written, or `path` itself is a folder.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; expected a file name (-o FILE)")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is not a regular file; choose another place with -o")
    check_folder_writable(path.parent, path)
    try:
        descriptor = os.open(temporary_path(path), os.O_WRONLY | os.O_CREAT)
        os.close(descriptor)
        temporary_path(path).unlink(missing_ok=True)  # who holds the lock on `path` may have cleaned it up
    except OSError as error:  # the name is too long for what is appended to it
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another name with -o") from error


def check_folder_writable(folder: Path, wanted: Path) -> None:
    """See, before any work is done, that `wanted` can be made in `folder`; make the folder.

    Raises
    ------
    OutputError
        If the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {wanted}: {error.strerror or error}; choose another place with -o") from error


class NewFile:
    """A file under a temporary name, written at any offset through `disk`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = disk.create(path)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of `data`, from `offset` bytes on."""
        disk.write(self.descriptor, data, offset)

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on, of what was written."""
        os.lseek(self.descriptor, offset, os.SEEK_SET)
        return os.read(self.descriptor, size)

    def truncate(self, size: int) -> None:
        """Cut, or fill with zeros."""
        disk.truncate(self.descriptor, size)


@contextlib.contextmanager
def replace_atomically(path: Path, size: int) -> Iterator[NewFile]:
    """Give a new file that takes the name `path` when the block ends well: synced, renamed, its folder synced.

    Parameters
    ----------
    path
        The final name.
    size
        Bytes that it will have, for the error message.

    Raises
    ------
    OutputError
        If it cannot be written (permission, full disk); the old file, if any, is untouched.
    """
    temporary = temporary_path(path)
    try:
        if not path.parent.is_dir():
            disk.make_folder(path.parent)
            disk.sync_folder(path.parent.parent)
        try:
            file = NewFile(temporary)
            with contextlib.suppress(OSError):  # nothing there, or it is somebody else's
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))  # noqa: PTH101 - who may read it stays as it was
            try:
                yield file
                disk.sync(file.descriptor)
            finally:
                os.close(file.descriptor)
            disk.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({size:,} bytes): {error.strerror or error}") from error


def temporary_path(path: Path) -> Path:
    """The name that a file of this process has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}{ME:010d}.tmp")


def list_temporary(path: Path) -> list[Path]:
    """Unfinished files that were to become `path`, of any process."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp", re.DOTALL)
    with contextlib.suppress(FileNotFoundError):
        return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))
    return []


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that its final name never holds a part of it.

    Raises
    ------
    OutputError
        If it cannot be written (permission, full disk); the old file, if any, is untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    for attempt in range(TRIES):
        try:
            with replace_atomically(path, len(data)) as file:
                file.write(data, 0)
            break
        except OutputError as error:
            if not isinstance(error.__cause__, FileNotFoundError) or attempt == TRIES - 1:
                raise


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block ends, where this is the main thread.

    For calls into C code that must not be left in the middle.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {
        number: signal.signal(number, lambda *what: arrived.append(what)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(signal.Signals(arrived[0][0]))


@contextlib.contextmanager
def fill_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder beside `final` that takes its name when the block ends well.

    An older folder of that name is replaced only then. Whether it may be replaced is the caller's decision.

    Raises
    ------
    OutputError
        If the folder cannot be made or moved.
    """
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError(f"cannot write {final}: it is there and not a folder; choose another place with -o")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}; choose another place with -o") from error
    try:
        yield temporary
        try:
            _swap_in(temporary, final)
        except OSError as error:
            raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def fill_files(final: Path) -> Iterator[Path]:
    """Give a temporary folder whose files are moved into `final` when the block ends well, in place of older ones.

    Whatever else lies there stays. The files are moved in the order of their names but for .json, which come last.

    Raises
    ------
    OutputError
        If the folder cannot be made, or a file not moved.
    """
    try:
        final.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=final))
    except OSError as error:
        raise OutputError(f"cannot write {final}: {error.strerror or error}; choose another place with -o") from error
    try:
        yield temporary
        try:
            for path in sorted(temporary.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
                path.chmod(0o666 & ~_umask())
                path.replace(final / path.name)
        except OSError as error:
            raise OutputError(f"cannot write {final}: {error.strerror or error}") from error
        disk.sync_folder(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mend_folder(final: Path) -> None:
    """Remove what a killed `fill_folder` left beside `final`, and put the older folder back if it was just moved away.

    For a caller who knows that nobody else is filling it.
    """
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[a-z0-9_]{{8}}\.tmp(\.old)?", re.DOTALL)
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(final.parent.iterdir()):
            if pattern.fullmatch(path.name) and path.is_dir():
                if path.name.endswith(".old") and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)


def _swap_in(temporary: Path, final: Path) -> None:
    old = temporary.with_name(temporary.name + ".old")
    if final.exists():
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    disk.sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
