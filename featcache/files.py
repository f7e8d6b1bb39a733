"""Files that are either whole or not there: temporary name, fsync, rename. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import OutputError


def hash_bytes(data: bytes) -> str:
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
    '{"a":[1.5,"\\\u00fc"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def pretty_json(value: Any) -> str:
    """JSON as a person reads it: indented, keys in the order given, newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


def check_writable(path: Path) -> None:
    """See, before any work is done, that a file can be written at `path`; make its folder.

    Raises
    ------
    OutputError
        If the folder cannot be made or written, or `path` itself is a folder.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; expected a file name (-o FILE)")
    check_folder_writable(path.parent, path)


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


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that its final name never holds a part of it.

    Raises
    ------
    OutputError
        If it cannot be written (permission, full disk); the old file, if any, is untouched.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # NOTE: some network file systems cannot sync a folder; nothing to mend
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
