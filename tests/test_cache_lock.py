"""featcache.cache.lock: one at a time, whoever dies; readers wait for nobody and see whole versions only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pytest

from featcache.cache import (
    CacheReader,
    FeatureCache,
    FeatureSplit,
    hold_output,
    lock,
    open_cache,
    read_cache,
    write_cache,
)
from featcache.cache.lock import is_held, is_lock, lease_path, lock_path
from featcache.dataset import Split
from featcache.errors import OutputBusyError, OutputError
from featcache.progress import Progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")

NO_LOCKS = {"no locks": errno.ENOLCK, "not supported": errno.ENOTSUP, "no such call": errno.ENOSYS, "NFS": 524}
ENDLESS = 60.0  # seconds after which something is wrong; nothing waits for that long

# Holds the output until a line comes in; what it says is a line of its own.
HOLDER = """
import fcntl, os, subprocess, sys, time
from pathlib import Path
import featcache.cache.lock
from featcache.cache import hold_output
from featcache.progress import Progress

output, number, orphan, wait, lease_seconds = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
featcache.cache.lock.LEASE_SECONDS = float(lease_seconds)
if number:
    def refuse(*what):
        raise OSError(number, os.strerror(number))
    fcntl.flock = refuse

class Loud(Progress):
    def say(self, line):
        print(line, flush=True)

def is_of_the_lock(descriptor):
    try:
        return os.path.sameopenfile(descriptor, lock)
    except OSError:
        return False

with hold_output(output, wait=bool(wait), progress=Loud()):
    if orphan == "forked":
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        output.with_name("orphan").write_text(str(child))
    elif orphan:
        lock = os.open(output.with_name(output.name + ".lock"), os.O_RDONLY)
        inherited = [descriptor for descriptor in range(3, lock) if is_of_the_lock(descriptor)]
        os.close(lock)
        assert inherited
        subprocess.Popen(["sleep", orphan], pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


class Holder:
    """Another process that holds an output."""

    def __init__(self, output: Path, number: int, orphan: str, wait: bool) -> None:
        arguments = [str(output), str(number), orphan, "wait" if wait else "", str(lock.LEASE_SECONDS)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def read_line(self) -> str:
        return self._pipe(self.process.stdout).readline().rstrip("\n")

    def release(self) -> None:
        """Let it end well."""
        self._pipe(self.process.stdin).write("\n")
        self._pipe(self.process.stdin).flush()
        assert self.read_line() == "released"
        assert self.process.wait(ENDLESS) == 0

    def kill(self) -> None:
        """Kill it, and see that it is gone."""
        self.process.kill()
        self.process.wait(ENDLESS)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                self._pipe(pipe).close()


Hold = Callable[..., Holder]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What is extracted into; not there yet."""
    return tmp_path / "features.h5"


@pytest.fixture
def hold(output: Path) -> Iterator[Hold]:
    """Let another process hold the output."""
    holders: list[Holder] = []

    def start(number: int = 0, *, orphan: str = "", wait: bool = False, held: bool = True) -> Holder:
        holder = Holder(output, number, orphan, wait)
        holders.append(holder)
        if held:
            assert holder.read_line() == "held"
        return holder

    yield start
    for holder in holders:
        holder.close()


@pytest.fixture
def dead_pid() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Ear(Progress):
    """Keeps what is said, and tells that something was."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.heard = threading.Event()

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.heard.set()


def list_names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def refuse_flock(patch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*what: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", refuse)


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again; what never happens is an error."""
    end = time.monotonic() + ENDLESS
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


# One at a time


def test_while_the_block_lasts_a_file_names_the_holder_and_afterwards_none_is_left(output: Path) -> None:
    with hold_output(output):
        written = json.loads(lock_path(output).read_text())
        assert (written["pid"], written["host"]) == (os.getpid(), socket.gethostname())
        assert is_lock(lock_path(output))
        assert list_names(output.parent) == ["features.h5.lock"]
    assert list_names(output.parent) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_a_block_that_failed_no_lock_is_left(output: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), hold_output(output):
        raise error
    assert list_names(output.parent) == []
    with hold_output(output):
        pass


def test_a_second_holder_in_another_process_is_refused_with_pid_and_since(output: Path, hold: Hold) -> None:
    holder = hold()
    since = json.loads(lock_path(output).read_text())["since"]
    with pytest.raises(OutputBusyError) as caught, hold_output(output):
        pytest.fail("both hold it")
    assert str(caught.value) == (
        f"{output} is being extracted by process {holder.pid} since {since}; wait for it with --wait, or choose "
        f"another place with -o"
    )
    assert json.loads(lock_path(output).read_text())["pid"] == holder.pid  # the refused one changed nothing
    holder.release()
    assert list_names(output.parent) == []


def test_a_second_holder_in_the_same_process_is_refused(output: Path) -> None:
    with hold_output(output):
        with pytest.raises(OutputBusyError, match=f"by process {os.getpid()} since "), hold_output(output):
            pytest.fail("both hold it")
        assert is_held(output)
    assert list_names(output.parent) == []


def test_a_refused_process_leaves_the_holder_its_lock(output: Path, hold: Hold) -> None:
    with hold_output(output):
        refused = hold(held=False)
        assert refused.process.wait(ENDLESS) == 1
        assert is_held(output)
        assert json.loads(lock_path(output).read_text())["pid"] == os.getpid()
    assert list_names(output.parent) == []


def test_another_output_beside_it_is_free(output: Path, hold: Hold) -> None:
    hold()
    with hold_output(output.with_name("other.h5")):
        assert list_names(output.parent) == ["features.h5.lock", "other.h5.lock"]
    assert list_names(output.parent) == ["features.h5.lock"]


def test_who_waits_says_for_whom_and_gets_it(output: Path, hold: Hold) -> None:
    holder, ear, held = hold(), Ear(), threading.Event()

    def wait() -> None:
        with hold_output(output, wait=True, progress=ear):
            held.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert ear.heard.wait(ENDLESS)
    assert not held.is_set()
    (line,) = ear.lines
    assert line.startswith(f"{output} is being extracted by process {holder.pid} since ")
    assert line.endswith("; waiting for it")
    holder.release()
    thread.join(ENDLESS)
    assert held.is_set()
    assert list_names(output.parent) == []


def test_a_process_that_waits_gets_it_when_the_holder_is_killed(output: Path, hold: Hold) -> None:
    holder = hold()
    waiting = hold(wait=True, held=False)
    assert waiting.read_line().startswith(f"{output} is being extracted by process {holder.pid} since ")
    holder.kill()
    assert waiting.read_line() == "held"
    assert json.loads(lock_path(output).read_text())["pid"] == waiting.pid
    waiting.release()
    assert list_names(output.parent) == []


def test_who_need_not_wait_says_nothing(output: Path) -> None:
    ear = Ear()
    with hold_output(output, wait=True, progress=ear):
        pass
    assert ear.lines == []


def test_several_who_wait_have_it_one_after_the_other(output: Path) -> None:
    inside, most, rounds = [0], [0], [0]

    def work() -> None:
        with hold_output(output, wait=True):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            rounds[0] += 1
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENDLESS)
    assert (most, rounds) == ([1], [4])
    assert list_names(output.parent) == []


# The dead hold nothing


def test_a_lock_file_of_a_dead_process_is_taken(output: Path, dead_pid: int) -> None:
    written = {"program": lock.PROGRAM, "pid": dead_pid, "host": socket.gethostname(), "since": "2020-01-01 00:00:00"}
    lock_path(output).write_text(json.dumps(written))
    assert not is_held(output)
    with hold_output(output):
        assert json.loads(lock_path(output).read_text())["pid"] == os.getpid()
    assert list_names(output.parent) == []


def test_an_empty_lock_file_that_nobody_holds_is_taken(output: Path) -> None:
    lock_path(output).write_text("")
    assert not is_held(output)
    with hold_output(output):
        pass
    assert list_names(output.parent) == []


@pytest.mark.parametrize("text", ["{", "[]", "null", "\xff", "my thesis", '{"pid": 1, "host": "elsewhere"}'])
def test_a_file_that_only_has_the_name_of_a_lock_is_neither_taken_nor_touched(output: Path, text: str) -> None:
    lock_path(output).write_text(text, encoding="latin-1")
    with (
        pytest.raises(OutputError, match="is there and no lock of featcache's; move it") as caught,
        hold_output(output),
    ):
        pytest.fail("it is held")
    assert not isinstance(caught.value, OutputBusyError)
    assert lock_path(output).read_text(encoding="latin-1") == text


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"pid": "x"}'])
def test_a_holder_who_does_not_say_who_it_is_is_refused_all_the_same(output: Path, text: str) -> None:
    with hold_output(output):
        lock_path(output).write_text(text, encoding="latin-1")
        with pytest.raises(OutputBusyError, match="is being extracted by "), hold_output(output):
            pytest.fail("both hold it")


def test_a_holder_on_another_machine_is_named_with_it(output: Path) -> None:
    with hold_output(output):
        written = {"program": lock.PROGRAM, "pid": 7, "host": "elsewhere", "since": "2026-01-01 00:00:00"}
        lock_path(output).write_text(json.dumps(written))
        with (
            pytest.raises(OutputBusyError, match="by process 7 on elsewhere since 2026-01-01 00:00:00; "),
            hold_output(output),
        ):
            pytest.fail("both hold it")


def test_kill_9_of_a_holder_frees_it(output: Path, hold: Hold) -> None:
    holder = hold()
    assert is_held(output)
    holder.kill()
    assert list_names(output.parent) == ["features.h5.lock"]
    assert not is_held(output)
    with hold_output(output):
        pass
    assert list_names(output.parent) == []


def test_an_orphan_that_inherited_the_lock_and_ends_soon_is_waited_for(output: Path, hold: Hold) -> None:
    hold(orphan="1").kill()
    assert is_held(output)  # by the orphan
    with hold_output(output):
        assert json.loads(lock_path(output).read_text())["pid"] == os.getpid()
    assert list_names(output.parent) == []


def test_an_orphan_that_does_not_end_is_told_of(output: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.3)
    holder = hold(orphan="3")
    holder.kill()
    with pytest.raises(OutputBusyError, match=f"by process {holder.pid} since "), hold_output(output):
        pytest.fail("both hold it")


def test_a_forked_orphan_does_not_keep_the_lock(output: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.0)
    holder = hold(orphan="forked")
    orphan = int(output.with_name("orphan").read_text())
    holder.kill()
    try:
        with hold_output(output):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_stopped_holder_still_holds_it(output: Path, hold: Hold) -> None:
    holder = hold()
    holder.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(OutputBusyError), hold_output(output):
            pytest.fail("both hold it")
    finally:
        holder.process.send_signal(signal.SIGCONT)
    holder.release()


# Where the file system has no locks


@pytest.mark.parametrize("number", NO_LOCKS.values(), ids=NO_LOCKS)
def test_without_locks_a_lease_is_used_and_is_gone_afterwards(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_flock(monkeypatch, number)
    assert not is_held(output)
    with hold_output(output):
        assert list_names(output.parent) == ["features.h5.lease"]
        assert is_lock(lease_path(output))
        assert is_held(output)
    assert list_names(output.parent) == []
    assert not is_held(output)


@pytest.mark.parametrize("number", NO_LOCKS.values(), ids=NO_LOCKS)
def test_without_locks_a_second_holder_is_refused_by_name(
    output: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold, number: int
) -> None:
    refuse_flock(monkeypatch, number)
    holder = hold(number)
    assert is_held(output)
    with (
        pytest.raises(OutputBusyError, match=f"^{output} is being extracted by process {holder.pid}; wait for it"),
        hold_output(output),
    ):
        pytest.fail("both hold it")
    holder.release()
    assert list_names(output.parent) == []
    with hold_output(output):
        pass
    assert list_names(output.parent) == []


def test_without_locks_who_waits_gets_it(output: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    holder = hold(errno.ENOLCK)
    waiting = hold(errno.ENOLCK, wait=True, held=False)
    assert waiting.read_line() == f"{output} is being extracted by process {holder.pid}; waiting for it"
    holder.release()
    assert waiting.read_line() == "held"
    waiting.release()
    assert list_names(output.parent) == []


def test_without_locks_kill_9_of_a_holder_frees_it(output: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    hold(errno.ENOLCK).kill()
    assert list_names(output.parent) == ["features.h5.lease"]
    assert not is_held(output)
    with hold_output(output):
        assert is_held(output)
    assert list_names(output.parent) == []


def test_a_lease_that_its_holder_renews_no_longer_goes_to_who_waits_and_is_not_lost_again(
    output: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    refuse_flock(monkeypatch, errno.ENOLCK)
    holder = hold(errno.ENOLCK)
    holder.process.send_signal(signal.SIGSTOP)  # as if its machine had lost the network
    ear = Ear()
    try:
        with hold_output(output, wait=True, progress=ear):
            holder.process.send_signal(signal.SIGCONT)
            holder.release()
            assert is_held(output)
            assert list_names(output.parent) == ["features.h5.lease"]
    finally:
        holder.process.send_signal(signal.SIGCONT)
    assert len(ear.lines) == 1
    assert list_names(output.parent) == []


def test_a_lease_that_was_not_renewed_for_long_is_taken_without_waiting(
    output: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    refuse_flock(monkeypatch, errno.ENOLCK)
    holder = hold(errno.ENOLCK)
    holder.process.send_signal(signal.SIGSTOP)
    old = time.time() - lock.LEASE_SECONDS - 10
    os.utime(lease_path(output), (old, old))
    assert not is_held(output)
    with hold_output(output):
        assert is_held(output)


def test_another_error_of_the_lock_is_not_taken_for_a_missing_one(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_flock(monkeypatch, errno.EIO)
    with (
        pytest.raises(OutputError, match=f"^cannot lock {output}: features.h5.lock: Input/output error; ") as caught,
        hold_output(output),
    ):
        pytest.fail("it is held")
    assert not isinstance(caught.value, OutputBusyError)
    assert not lease_path(output).exists()


# Whether it is held


def test_looking_leaves_no_trace(output: Path, dead_pid: int) -> None:
    assert not is_held(output)
    assert list_names(output.parent) == []
    text = json.dumps(
        {"program": lock.PROGRAM, "pid": dead_pid, "host": socket.gethostname(), "since": "2020-01-01 00:00:00"}
    )
    lock_path(output).write_text(text)
    before = lock_path(output).stat()
    assert not is_held(output)
    after = lock_path(output).stat()
    assert lock_path(output).read_text() == text
    assert (before.st_ino, before.st_mtime_ns, before.st_mode) == (after.st_ino, after.st_mtime_ns, after.st_mode)
    assert list_names(output.parent) == ["features.h5.lock"]


def test_looking_tells_the_living_from_the_dead(output: Path, hold: Hold) -> None:
    holder = hold()
    text = lock_path(output).read_text()
    assert is_held(output)
    assert is_held(output)
    assert lock_path(output).read_text() == text
    holder.kill()
    assert not is_held(output)


def test_who_looks_does_not_keep_others_from_holding_it(output: Path, hold: Hold) -> None:
    hold().kill()  # its lock file stays
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_held(output)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            with hold_output(output):
                pass
    finally:
        stop.set()
        thread.join(ENDLESS)


# Where no lock can be made


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with (
        pytest.raises(OutputError, match=r"^cannot lock .*Permission denied"),
        hold_output(tmp_path / "locked" / "f.h5"),
    ):
        pytest.fail("it is held")


@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "a file around it"])
def test_where_no_lock_can_be_made_is_an_output_error(output: Path, kind: str) -> None:
    if kind == "a folder":
        lock_path(output).mkdir()
    elif kind == "a link to nothing":
        lock_path(output).symlink_to("nothing")
    else:
        output.write_text("x")
        output = output / "features.h5"
    message = f"^cannot lock {output}: .*; choose another place with -o$"
    with pytest.raises(OutputError, match=message) as caught, hold_output(output):
        pytest.fail("it is held")
    assert not isinstance(caught.value, OutputBusyError)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_files_is_not_called_busy() -> None:
    with pytest.raises(OutputError) as caught, hold_output(Path("/proc/features.h5")):
        pytest.fail("it is held")
    assert not isinstance(caught.value, OutputBusyError)


# Readers wait for nobody


def make_version(version: int, n_train: int = 0) -> FeatureCache:
    """A cache all of whose values tell its version, and that grows with it."""
    splits = {}
    for name, n in {"train": n_train or 50 + 7 * version, "val": 5}.items():
        listing = Split(
            paths=tuple(f"{name}/{version}/{i}.jpg" for i in range(n)),
            labels=np.full(n, version % 2, np.int64),
            digests=tuple(f"{version:064x}" for _ in range(n)),
            stats=np.full((n, 4), version + 1, np.int64),
        )
        splits[name] = FeatureSplit(listing=listing, features=np.full((n, 8), version, np.float32))
    extractor = {"backbone": "tiny", "weights": None, "dim": 8, "precision": {"stored": "float32"}}
    provenance = {"data": "/photos", "version": version}
    return FeatureCache(classes=("ants", "bees"), extractor=extractor, splits=splits, provenance=provenance)


def check_version(cache: FeatureCache) -> int:
    """Which version it is, wholly."""
    version: int = cache.provenance["version"]
    expected = make_version(version, len(cache.splits["train"]))
    for name, split in expected.splits.items():
        found = cache.splits[name]
        assert (found.listing.paths, found.listing.digests) == (split.listing.paths, split.listing.digests)
        assert np.array_equal(found.listing.labels, split.listing.labels)
        assert np.array_equal(found.listing.stats, split.listing.stats)
        assert np.array_equal(found.features, split.features)
    return version


def test_readers_are_not_kept_from_reading_by_a_holder(output: Path, hold: Hold) -> None:
    write_cache(output, make_version(1))
    hold()
    assert check_version(read_cache(output)) == 1
    assert check_version(open_cache(output)) == 1
    assert list_names(output.parent) == ["features.h5", "features.h5.lock"]


def test_readers_need_no_locks_of_the_file_system(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(output, make_version(1))
    refuse_flock(monkeypatch, errno.ENOLCK)
    assert check_version(read_cache(output)) == 1


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_cache_lock import make_version
from featcache.cache import write_cache
sys.stdin.readline()
for version in range(1, int(sys.argv[3]) + 1):
    write_cache(Path(sys.argv[2]), make_version(version))
"""


@pytest.mark.parametrize("where", ["a thread", "another process"])
def test_readers_see_whole_versions_only_while_a_cache_is_rewritten(output: Path, where: str) -> None:
    rewrites = 30
    write_cache(output, make_version(0))
    mapped = open_cache(output)
    seen: list[int] = []
    failures: list[BaseException] = []

    def rewrite() -> None:
        try:
            for version in range(1, rewrites + 1):
                write_cache(output, make_version(version))
        except BaseException as error:  # noqa: BLE001 - told of below
            failures.append(error)

    if where == "a thread":
        thread = threading.Thread(target=rewrite)
        is_done: Callable[[], bool] = lambda: not thread.is_alive()  # noqa: E731
        thread.start()
    else:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(output), str(rewrites)],
            stdin=subprocess.PIPE,
            text=True,
        )
        is_done = lambda: writer.poll() is not None  # noqa: E731
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.close()
    try:
        while not is_done():
            seen.append(check_version(read_cache(output)))
            seen.append(check_version(open_cache(output)))
    finally:
        if where == "a thread":
            thread.join()
        else:
            assert writer.wait(ENDLESS) == 0
    assert failures == []
    assert seen == sorted(seen)
    assert check_version(read_cache(output)) == rewrites
    assert len(set(seen)) > 1
    assert check_version(mapped) == 0  # it stays the file that it was
    assert list_names(output.parent) == ["features.h5"]


def test_a_file_that_is_open_is_not_called_damaged_when_a_smaller_one_takes_its_name(output: Path) -> None:
    write_cache(output, make_version(1, n_train=500))
    with CacheReader(output) as reader:
        write_cache(output, make_version(2, n_train=1))
        assert check_version(reader.cache) == 1


def test_a_mapping_outlives_its_file(output: Path) -> None:
    write_cache(output, make_version(3))
    mapped: Any = open_cache(output)
    output.unlink()
    assert check_version(mapped) == 3
