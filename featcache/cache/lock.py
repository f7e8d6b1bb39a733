"""One extraction at a time into one file. The files are right without it; it only keeps work from being done twice.

The lock is the kernel's (flock), which forgets a process when it dies. A file system without such locks gets a lease: a
file that its holder touches every half minute, and that others may take when it was not touched for two minutes. A
store has no locks at all: there two extractions into one file do the work twice, and both are right.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from featcache.errors import OutputBusyError, OutputError
from featcache.progress import SILENT, Progress
from featcache.storage import Place, RemotePath

PROGRAM = "featcache extract"
WAITING = {"extracted": "wait for it with --wait"}  # what has such an option
LEASE_SECONDS = 120.0
# What flock says where it is not to be had: no locks, not supported, and Linux's own ENOTSUPP of some NFS servers.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, 524}
# Somebody may just be looking whether it is held.
MOMENT_SECONDS = 0.5
# A dead holder's decoding workers, which inherited its lock, notice within seconds that they are orphans.
ORPHAN_SECONDS = 10.0


def lock_path(output: Path) -> Path:
    """The lock of an extraction into `output`."""
    return output.with_name(output.name + ".lock")


@contextlib.contextmanager
def hold_output(
    output: Place, *, wait: bool = False, progress: Progress = SILENT, doing: str = "extracted"
) -> Iterator[None]:
    """Be the only one who works on `output` while the block lasts.

    Parameters
    ----------
    output
        The cache file, or a run's folder; the folder that it is in is there. In a store it is not held.
    wait
        Wait for another to finish, for as long as it takes, instead of stopping.
    progress
        Told of the waiting.
    doing
        What is being done to it, for the message.

    Raises
    ------
    OutputBusyError
        If another process holds it and `wait` is not set; the message says which.
    OutputError
        If a lock cannot be made there at all.
    """
    if isinstance(output, RemotePath):
        yield
        return
    lock = _acquire(output, wait, progress, doing)
    try:
        with contextlib.suppress(OSError):  # on Windows its own lock keeps it from being written: nobody is named
            if not isinstance(lock, SoftFileLease):
                lock_path(output).write_text(json.dumps(_describe_me()) + "\n")
        yield
    finally:
        if not isinstance(lock, SoftFileLease):
            with contextlib.suppress(OSError):  # NOTE: while it is held; filelock sees that its file has no name left
                lock_path(output).unlink()
        lock.release()


def is_held(output: Place) -> bool:
    """Whether a living process extracts into `output`, as far as can be known. Leaves no trace."""
    if isinstance(output, RemotePath):
        return False
    lease = lease_path(output)
    if lease.exists():
        with contextlib.suppress(OSError):
            owner = SoftFileLease(lease, lease_duration=LEASE_SECONDS).owner
            dead = owner is not None and _is_dead({"pid": owner.pid, "host": owner.hostname})
            return not dead and not _is_abandoned(lease)
    if not lock_path(output).exists():
        return False
    lock = FileLock(lock_path(output), fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except OSError:  # also filelock's Timeout
        return True
    lock.release()
    return False


def _is_abandoned(lease: Path) -> bool:
    """Whether nobody has touched a lease for so long that its holder must be dead."""
    return time.time() - lease.stat().st_mtime > LEASE_SECONDS


def is_lock(path: Path) -> bool:
    """Whether a file is a lock that featcache left, by what is in it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 4096:
            return False
        text = path.read_text(encoding="utf-8")
        if path.name.endswith(".lease"):
            return text.startswith("filelock/")
        return not text or json.loads(text).get("program") == PROGRAM
    return False


def _acquire(output: Path, wait: bool, progress: Progress, doing: str) -> BaseFileLock:
    path = lock_path(output)
    strange = os.path.lexists(path) and not is_lock(path)
    try:
        try:
            lock = _lock(output, MOMENT_SECONDS)
            if not strange:
                return lock
            lock.release()
            raise OutputError(f"{path} is there and no lock of featcache's; move it, or choose another -o")
        except Timeout as error:
            if not lock_path(output).exists() and not lease_path(output).exists():  # nobody holds what is not there
                raise OutputError(
                    f"cannot lock {output}: no file can be made there; choose another place with -o"
                ) from error
            holder = _read_holder(output)
        if _is_dead(holder):
            with contextlib.suppress(Timeout):
                return _lock(output, ORPHAN_SECONDS)
        if wait:
            progress.say(f"{output} is being {doing} by {_name(holder)}; waiting for it")
            return _lock(output, -1)
    except OSError as error:
        reason = f"{path.name}: {error.strerror or error}"
        raise OutputError(f"cannot lock {output}: {reason}; choose another place with -o") from error
    raise OutputBusyError(
        f"{output} is being {doing} by {_name(holder)}; {WAITING.get(doing, 'wait for it')}, or choose another place "
        f"with -o"
    )


def _lock(output: Path, timeout: float) -> BaseFileLock:
    """The kernel's lock, or a lease where it has none; -1 waits for ever.

    Raises
    ------
    Timeout
        If another process still has it after `timeout` seconds.
    """
    lock: BaseFileLock = FileLock(lock_path(output), fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(timeout=timeout, poll_interval=0.2)
    except OSError as error:  # also filelock's Timeout, which has no number
        if error.errno not in NO_LOCKS:
            raise
        with contextlib.suppress(OSError):
            lock_path(output).unlink()
        with contextlib.suppress(OSError):
            if _is_abandoned(lease_path(output)):
                lease_path(output).unlink()
        lock = SoftFileLease(lease_path(output), lease_duration=LEASE_SECONDS, thread_local=False)
        lock.acquire(timeout=timeout, poll_interval=0.2)
    return lock


def lease_path(output: Path) -> Path:
    """The lease that stands for the lock where the file system has none."""
    return output.with_name(output.name + ".lease")


def _describe_me() -> dict[str, Any]:
    return {
        "program": PROGRAM,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read_holder(output: Path) -> dict[str, Any]:
    """Who holds it, as far as it says."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(lock_path(output).read_text())
        if isinstance(holder, dict):
            return holder
    lease = SoftFileLease(lease_path(output), lease_duration=LEASE_SECONDS)
    return {} if lease.owner is None else {"pid": lease.owner.pid, "host": lease.owner.hostname}


def _is_dead(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _name(holder: dict[str, Any]) -> str:
    if not holder.get("pid"):
        return "another process"
    where = f" on {holder['host']}" if holder.get("host") not in (None, socket.gethostname()) else ""
    since = f" since {holder['since']}" if holder.get("since") else ""
    return f"process {holder['pid']}{where}{since}"
