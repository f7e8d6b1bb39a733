"""Disks that fail, and disks that die, at their k-th call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from featcache.files import Disk

CALLS = ("create", "write", "truncate", "sync", "replace", "sync_folder", "make_folder", "remove", "remove_folder")


class WatchedDisk(Disk):
    """A disk that tells of every call before and after it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.paths: dict[int, Path] = {}

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        """Called with what is about to happen."""

    def after(self, name: str, arguments: tuple[object, ...]) -> None:
        """Called with what has happened."""


def _watch(name: str) -> Callable[..., object]:
    original = getattr(Disk, name)

    def call(self: WatchedDisk, *arguments: object) -> object:
        named = (self.paths.get(what, what) if isinstance(what, int) else what for what in arguments)
        self.log.append((name, " ".join(str(what) for what in named if isinstance(what, int | Path))))
        self.before(name, arguments)
        result = original(self, *arguments)
        if name == "create":
            assert isinstance(result, int)
            assert isinstance(arguments[0], Path)
            self.paths[result] = arguments[0]
        self.after(name, arguments)
        return result

    return call


for _name in CALLS:
    setattr(WatchedDisk, _name, _watch(_name))


class FailingDisk(WatchedDisk):
    """At its k-th call (from 0) it dies or fails, perhaps half-way through a write.

    Parameters
    ----------
    at
        Which call.
    error
        Number of the error to raise; None kills the process.
    torn
        Write the first half before that.
    """

    def __init__(self, at: int, error: int | None, torn: bool) -> None:
        super().__init__()
        self.at, self.error, self.torn = at, error, torn

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if len(self.log) - 1 != self.at:
            return
        if self.torn and name == "write":
            descriptor, data, offset = arguments
            assert isinstance(descriptor, int)
            assert isinstance(data, bytes | memoryview)
            assert isinstance(offset, int)
            os.lseek(descriptor, offset, os.SEEK_SET)
            os.write(descriptor, memoryview(data)[: len(data) // 2])
        self.fail()

    def fail(self) -> None:
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error))


class PowerlessDisk(FailingDisk):
    """The power goes at the k-th call: what was not synced is lost, a rename whose folder was not synced is undone."""

    def __init__(self, at: int) -> None:
        super().__init__(at, None, torn=False)
        self.dirty: dict[int, Path] = {}
        self.renamed: list[tuple[Path, Path, bytes | None]] = []
        self.old: bytes | None = None

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if name == "replace":
            target = arguments[1]
            assert isinstance(target, Path)
            self.old = target.read_bytes() if target.exists() else None
        super().before(name, arguments)

    def after(self, name: str, arguments: tuple[object, ...]) -> None:
        first = arguments[0]
        if name in ("write", "truncate"):
            assert isinstance(first, int)
            self.dirty[first] = self.paths[first]
        elif name == "sync":
            assert isinstance(first, int)
            self.dirty.pop(first, None)
        elif name == "replace":
            source, target = arguments
            assert isinstance(source, Path)
            assert isinstance(target, Path)
            self.renamed.append((source, target, self.old))
            for descriptor in [d for d, path in self.dirty.items() if path == source]:
                self.dirty[descriptor] = target
        elif name == "sync_folder":
            self.renamed = [entry for entry in self.renamed if entry[1].parent != first]

    def fail(self) -> None:
        for path in self.dirty.values():
            if path.exists():
                os.truncate(path, 0)
        for source, target, old in reversed(self.renamed):
            if target.exists():
                target.replace(source)
            if old is not None:
                target.write_bytes(old)
        super().fail()
