"""featcache.dataset and files: what was hashed is not read again, what might have changed always is; signals wait."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import dataset
from featcache.dataset import (
    RACY_NS,
    Digests,
    KnownFiles,
    Listing,
    Split,
    Stats,
    hashing,
    list_changed,
    list_dataset,
)
from featcache.errors import DatasetError
from featcache.files import hash_bytes, hold_interrupts
from featcache.progress import Progress

OLD_SECONDS = 10.0  # how old files are as hashing sees it
SPLITS, CLASSES = ("train", "val"), ("ants", "bees")


class Clock:
    """The time as `dataset` sees it, some seconds later than it is: files are made old without waiting."""

    def __init__(self) -> None:
        self.later = OLD_SECONDS
        self.now_ns: int | None = None

    def time_ns(self) -> int:
        return self.now_ns if self.now_ns is not None else time.time_ns() + int(self.later * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Files that were written just now are old."""
    clock = Clock()
    monkeypatch.setattr(hashing, "time", SimpleNamespace(time_ns=clock.time_ns, monotonic=time.monotonic))
    return clock


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are read, in any order, relative to the root."""
    paths: list[str] = []
    original = hashing._try_hash

    def try_hash(path: str) -> tuple[str, tuple[int, ...], str]:
        paths.append("/".join(Path(path).parts[-3:]))
        return original(path)

    monkeypatch.setattr(hashing, "_try_hash", try_hash)
    return paths


class Keeper:
    """Keeps what was hashed, as an extraction does."""

    def __init__(self) -> None:
        self.pieces: list[tuple[Stats, Digests]] = []

    def __call__(self, stats: Stats, digests: Digests) -> None:
        assert (stats.dtype, stats.shape[1], len(stats)) == (np.dtype(np.int64), 4, len(digests))
        assert digests.dtype == np.dtype("S64")
        self.pieces.append((stats.copy(), digests.copy()))

    def count(self) -> int:
        return sum(len(digests) for _, digests in self.pieces)

    @property
    def known(self) -> KnownFiles:
        stats = np.concatenate([np.empty((0, 4), np.int64), *(stats for stats, _ in self.pieces)])
        return KnownFiles(stats, np.concatenate([np.empty(0, "S64"), *(digests for _, digests in self.pieces)]))


def make_data(root: Path, n: int = 3) -> Path:
    """n files of each class in each split; what is in them is no matter here."""
    for split in SPLITS:
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                (root / split / name / f"{i:04d}.jpg").write_bytes(f"{split} {name} {i}".encode())
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 12 files."""
    return make_data(tmp_path / "data")


def know(listing: Listing) -> KnownFiles:
    """What a cache of this listing would know."""
    splits = listing.splits.values()
    return KnownFiles(
        np.concatenate([split.stats for split in splits]),
        np.array([digest for split in splits for digest in split.digests], "S64"),
    )


def assert_true(listing: Listing) -> None:
    """Every digest is that of the file's bytes."""
    for split in listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            assert digest == hash_bytes((listing.root / path).read_bytes()), path


def wait_for_tick(path: Path) -> None:
    """Wait until a change of `path` would get another time, a few milliseconds."""
    probe = path.parent / ".probe"
    try:
        while True:
            probe.touch()
            if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
                return
            time.sleep(0.001)
    finally:
        probe.unlink()


FILE = "train/bees/0001.jpg"


# What is known is not read


def test_unchanged_old_files_are_not_read(data: Path, clock: Clock, read: list[str]) -> None:
    first = list_dataset(data)
    assert sorted(read) == sorted(first.paths())
    assert all(split.stats.any(axis=1).all() for split in first.splits.values())
    read.clear()
    again = list_dataset(data, known=know(first))
    assert read == []
    assert again.paths() == first.paths()
    for name, split in first.splits.items():
        assert again.splits[name].digests == split.digests
        assert again.splits[name].stats.tolist() == split.stats.tolist()
        assert again.splits[name].labels.tolist() == split.labels.tolist()
    assert_true(again)


def test_unchanged_old_files_are_not_even_opened(data: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    known = know(list_dataset(data))
    opened: list[object] = []

    def refuse(*what: object, **options: object) -> None:
        opened.append(what)
        raise AssertionError

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    listing = list_dataset(data, known=known)
    monkeypatch.undo()
    assert opened == []
    assert len(listing) == 12


def test_a_split_by_content_is_the_same_without_reading(data: Path, clock: Clock, read: list[str]) -> None:
    first = list_dataset(data / "train", val_fraction=0.5)
    read.clear()
    again = list_dataset(data / "train", val_fraction=0.5, known=know(first))
    assert read == []
    assert {name: split.paths for name, split in again.splits.items()} == {
        name: split.paths for name, split in first.splits.items()
    }


def test_only_new_files_are_read(data: Path, clock: Clock, read: list[str]) -> None:
    known = know(list_dataset(data))
    read.clear()
    (data / "val" / "ants" / "new.jpg").write_bytes(b"new")
    listing = list_dataset(data, known=known)
    assert read == ["val/ants/new.jpg"]
    assert_true(listing)


def test_a_file_under_another_name_or_in_another_class_is_not_read(data: Path, clock: Clock, read: list[str]) -> None:
    changed = (data / FILE).stat().st_ctime_ns
    known = know(list_dataset(data))
    read.clear()
    (data / FILE).rename(data / "val" / "ants" / "renamed.jpg")
    moved = (data / "val" / "ants" / "renamed.jpg").stat().st_ctime_ns
    listing = list_dataset(data, known=known)
    assert read == ([] if moved == changed else ["val/ants/renamed.jpg"])  # to most file systems a new name is a change
    assert_true(listing)


def append(path: Path) -> None:
    times = path.stat()
    with path.open("ab") as file:
        file.write(b"more")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path)


def restore(path: Path) -> None:
    """Other bytes, the same size, the old modification time set again."""
    times = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file of the same size and time takes the name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    shutil.copystat(path, other)
    other.replace(path)


def change_mode(path: Path) -> None:
    """Changes nothing but the change time."""
    path.chmod(0o600)


CHANGES = {
    "its size changed": append,
    "its time of modification changed": touch,
    "its bytes changed and its size and time of modification did not": restore,
    "another file has its name": replace,
    "only its change time changed": change_mode,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_read_again_when(data: Path, clock: Clock, read: list[str], change: str) -> None:
    first = list_dataset(data)
    read.clear()
    wait_for_tick(data / FILE)
    CHANGES[change](data / FILE)
    assert list_changed(first) == [FILE]
    again = list_dataset(data, known=know(first))
    assert read == [FILE]
    assert_true(again)
    read.clear()
    list_dataset(data, known=know(again))
    assert read == []


@pytest.mark.parametrize("column", range(4), ids=dataset.STATS)
def test_each_thing_that_the_file_system_says_decides(data: Path, clock: Clock, read: list[str], column: int) -> None:
    first = list_dataset(data)
    stats = np.concatenate([split.stats for split in first.splits.values()])
    row = first.paths().index(FILE)
    stats[row, column] += 1
    digests = np.array([digest for split in first.splits.values() for digest in split.digests], "S64")
    digests[row] = b"0" * 64
    read.clear()
    again = list_dataset(data, known=KnownFiles(stats, digests))
    assert read == [FILE]
    assert_true(again)


def test_two_thousand_files_are_found_without_reading(tmp_path: Path, clock: Clock, read: list[str]) -> None:
    data = make_data(tmp_path / "many", 500)
    keeper = Keeper()
    first = list_dataset(data, keep=keeper)
    assert (len(first), len(read), keeper.count()) == (2000, 2000, 2000)
    read.clear()
    again = list_dataset(data, known=keeper.known, keep=keeper)
    assert read == []
    assert [split.digests for split in again.splits.values()] == [split.digests for split in first.splits.values()]
    assert keeper.count() == 2000  # nothing new was kept
    assert_true(again)


# What is too young is not trusted


def test_a_file_that_is_young_when_it_is_hashed_is_never_trusted(data: Path, clock: Clock, read: list[str]) -> None:
    clock.later = 0
    keeper = Keeper()
    first = list_dataset(data, keep=keeper)
    assert all((split.stats == 0).all() for split in first.splits.values())
    assert keeper.pieces == []
    clock.later = OLD_SECONDS  # its age when it is looked for does not matter
    read.clear()
    list_dataset(data, known=know(first))
    assert len(read) == len(first)


@pytest.mark.parametrize("which", ["st_mtime_ns", "st_ctime_ns"])
@pytest.mark.parametrize(("age", "trusted"), [(0, False), (RACY_NS - 1, False), (RACY_NS, False), (RACY_NS + 1, True)])
def test_exactly_two_seconds_are_too_young(data: Path, clock: Clock, which: str, age: int, trusted: bool) -> None:
    path = data / FILE
    now = path.stat().st_ctime_ns
    if which == "st_mtime_ns":
        os.utime(path, ns=(now, path.stat().st_ctime_ns + 10**9))
    else:
        os.utime(path, ns=(0, 0))
    status = path.stat()
    clock.now_ns = max(status.st_mtime_ns, status.st_ctime_ns) + age
    assert getattr(status, which) == max(status.st_mtime_ns, status.st_ctime_ns)
    digest, stats, reason = hashing._try_hash(str(path))
    assert (digest, reason) == (hash_bytes(path.read_bytes()), "")
    assert any(stats) == trusted
    if trusted:
        assert stats == (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def test_a_file_whose_time_lies_in_the_future_is_not_trusted(data: Path, clock: Clock) -> None:
    future = time.time_ns() + int(1e9 * OLD_SECONDS) + 10**12
    os.utime(data / FILE, ns=(future, future))
    listing = list_dataset(data)
    row = listing.splits["train"].paths.index(FILE)
    assert listing.splits["train"].stats[row].tolist() == [0, 0, 0, 0]
    assert listing.splits["train"].stats.any(axis=1).sum() == 5


def test_a_file_that_changes_while_it_is_hashed_is_not_trusted(
    data: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original, looks = data / FILE, os.fstat, [0]

    def look(descriptor: int) -> os.stat_result:
        looks[0] += 1
        if looks[0] == 2:
            append(path)
        return original(descriptor)

    monkeypatch.setattr(os, "fstat", look)
    digest, stats, reason = hashing._try_hash(str(path))
    assert looks == [2]
    assert (len(digest), stats, reason) == (64, (0, 0, 0, 0), "")


# Finding


VALUES = st.one_of(st.integers(-2, 2), st.sampled_from([-(2**63), 2**63 - 1, 256, 1 << 56]), st.integers(0, 2**62))
ROWS = st.tuples(VALUES, VALUES, VALUES, VALUES)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.dictionaries(ROWS, st.integers(0, 2**256 - 1), max_size=40),
    others=st.lists(ROWS, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
def test_finding_is_looking_up_in_a_dictionary(
    rows: dict[tuple[int, ...], int], others: list[tuple[int, ...]], seed: int
) -> None:
    known = KnownFiles(
        np.array(list(rows), np.int64).reshape(-1, 4), np.array([f"{value:064x}" for value in rows.values()], "S64")
    )
    wanted = [*rows, *others, *rows]
    np.random.default_rng(seed).shuffle(wanted)
    wanted = [tuple(int(value) for value in row) for row in wanted]
    expected = [f"{rows[row]:064x}" if row in rows and any(row) else "" for row in wanted]
    assert known.find(np.array(wanted, np.int64).reshape(-1, 4)) == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), largest=st.sampled_from([3, 10, 2**62]))
def test_two_thousand_are_found_as_in_a_dictionary(seed: int, largest: int) -> None:
    random = np.random.default_rng(seed)
    rows = np.unique(random.integers(0, largest, (2000, 4)), axis=0)
    random.shuffle(rows)
    digests = np.array([hash_bytes(row.tobytes()) for row in rows], "S64")
    table = {tuple(row): digest.decode() for row, digest in zip(rows.tolist(), digests.tolist(), strict=True)}
    table.pop((0, 0, 0, 0), None)
    wanted = np.concatenate([rows, random.integers(0, largest, (2000, 4)), rows + np.array([0, 0, 0, 1])])
    assert KnownFiles(rows, digests).find(wanted) == [table.get(tuple(row), "") for row in wanted.tolist()]


def test_zeros_never_match() -> None:
    digests = np.array(["a" * 64, "b" * 64], "S64")
    known = KnownFiles(np.array([[0, 0, 0, 0], [1, 2, 3, 4]], np.int64), digests)
    assert known.find(np.array([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]], np.int64)) == ["", "b" * 64, ""]
    known = KnownFiles(np.zeros((2, 4), np.int64), digests)
    assert known.find(np.zeros((3, 4), np.int64)) == ["", "", ""]


def test_where_nothing_is_known_or_wanted_nothing_is_found() -> None:
    nothing = KnownFiles(np.empty((0, 4), np.int64), np.empty(0, "S64"))
    assert nothing.find(np.ones((2, 4), np.int64)) == ["", ""]
    assert nothing.find(np.empty((0, 4), np.int64)) == []
    some = KnownFiles(np.ones((1, 4), np.int64), np.array(["a" * 64], "S64"))
    assert some.find(np.empty((0, 4), np.int64)) == []


# What was hashed is kept


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_what_was_hashed_is_kept_once(
    data: Path, clock: Clock, read: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(hashing, "KEEP_SECONDS", seconds)
    keeper = Keeper()
    listing = list_dataset(data, keep=keeper)
    assert keeper.count() == len(listing) == 12
    assert (len(keeper.pieces) == 1) == (seconds > 0)
    read.clear()
    again = list_dataset(data, known=keeper.known)
    assert read == []
    assert_true(again)


class Interrupting(Progress):
    """Raises when `n` files were counted."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.n, self.error = n, error

    def track(self, items: Iterable[Any], *, total: int, what: str, unit: str = "img") -> Iterator[Any]:
        for i, item in enumerate(items):
            if i == self.n:
                raise self.error
            yield item


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("n", [0, 1, 7, 11])
def test_what_was_hashed_is_kept_when_the_listing_is_interrupted(
    data: Path,
    clock: Clock,
    read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    seconds: float,
    n: int,
) -> None:
    monkeypatch.setattr(hashing, "KEEP_SECONDS", seconds)
    keeper = Keeper()
    with pytest.raises(error):
        list_dataset(data, progress=Interrupting(n, error), keep=keeper)
    assert keeper.count() == n
    read.clear()
    listing = list_dataset(data, known=keeper.known, keep=keeper)
    assert len(read) == 12 - n
    assert keeper.count() == 12
    assert_true(listing)


def test_an_interrupted_listing_does_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tried = make_data(tmp_path / "many", 50), [0]

    def hash_slowly(path: str) -> tuple[str, tuple[int, ...], str]:
        tried[0] += 1
        time.sleep(0.005)
        return "0" * 64, (0, 0, 0, 0), ""

    monkeypatch.setattr(hashing, "_try_hash", hash_slowly)
    with pytest.raises(KeyboardInterrupt):
        list_dataset(data, progress=Interrupting(1, KeyboardInterrupt))
    assert tried[0] < 100


def test_a_failure_to_keep_is_told(data: Path, clock: Clock) -> None:
    def keep(stats: Stats, digests: Digests) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        list_dataset(data, keep=keep)


# What changed


def test_exactly_what_changed_is_named(data: Path, clock: Clock) -> None:
    (data / "val" / "bees" / "link.jpg").symlink_to(data / "train" / "ants" / "0000.jpg")
    listing = list_dataset(data)
    assert list_changed(listing) == []
    changed = {f"train/bees/{i:04d}.jpg": change for i, change in enumerate([append, replace, restore])}
    wait_for_tick(data / "val" / "bees" / "0002.jpg")
    for path, change in changed.items():
        change(data / path)
    (data / "val" / "ants" / "0001.jpg").unlink()
    (data / "val" / "ants" / "new.jpg").write_bytes(b"nobody asked for it")
    assert sorted(list_changed(listing)) == sorted([*changed, "val/ants/0001.jpg"])
    append(data / "train" / "ants" / "0000.jpg")  # seen through the link, too
    assert {"train/ants/0000.jpg", "val/bees/link.jpg"} <= set(list_changed(listing))


def test_a_deleted_folder_and_a_fifo_in_a_files_place_are_changes(data: Path, clock: Clock) -> None:
    listing = list_dataset(data)
    shutil.rmtree(data / "val" / "bees")
    (data / FILE).unlink()
    os.mkfifo(data / FILE)
    assert list_changed(listing) == [FILE, *(f"val/bees/{i:04d}.jpg" for i in range(3))]


def test_of_files_that_prove_nothing_no_change_is_claimed(data: Path) -> None:
    listing = list_dataset(data)  # all are too young
    append(data / FILE)
    assert list_changed(listing) == []


def test_a_listing_without_stats_has_no_changes() -> None:
    split = Split(paths=("a.jpg",), labels=np.zeros(1, np.int64), digests=("0" * 64,))
    assert list_changed(Listing(root=Path("/none"), classes=("a",), splits={"train": split})) == []


# What cannot be read


def make_bad(path: Path, kind: str) -> None:
    if kind == "a dangling link":
        path.symlink_to("nothing")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a fifo":
        os.mkfifo(path)
    elif kind == "a link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "a link to what fails when it is read":
        path.symlink_to("/proc/self/mem")
    else:
        path.write_bytes(b"secret")
        path.chmod(0)


BAD = {
    "a dangling link": "cannot be read: No such file or directory",
    "a link to itself": "cannot be read: Too many levels of symbolic links",
    "a fifo": "not a regular file",
    "a link to a device": "not a regular file",
    "a link to what fails when it is read": "cannot be read: Input/output error",
    "a file without the right to read": "cannot be read: Permission denied",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_a_bad_image_and_nothing_waits(
    data: Path, clock: Clock, read: list[str], kind: str
) -> None:
    if kind == "a file without the right to read" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    if kind == "a link to what fails when it is read" and not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc")
    keeper = Keeper()
    good = list_dataset(data, keep=keeper)
    make_bad(data / "train" / "bees" / "0001b.jpg", kind)
    for known in (None, keeper.known):
        listing = list_dataset(data, known=known)
        assert [tuple(item) for item in listing.bad] == [("train/bees/0001b.jpg", BAD[kind])]
        assert listing.paths() == good.paths()
        assert_true(listing)


def test_a_known_file_that_became_a_fifo_is_bad(data: Path, clock: Clock) -> None:
    known = know(list_dataset(data))
    (data / FILE).unlink()
    os.mkfifo(data / FILE)
    assert [tuple(item) for item in list_dataset(data, known=known).bad] == [(FILE, "not a regular file")]


def test_a_file_that_goes_while_the_listing_is_made_is_bad(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = hashing.look_at_all

    def look(paths: list[str], clips: bool) -> tuple[Stats, list[str]]:
        found = original(paths, clips)
        (data / FILE).unlink()
        return found

    monkeypatch.setattr(hashing, "look_at_all", look)
    listing = list_dataset(data)
    assert [tuple(item) for item in listing.bad] == [(FILE, "cannot be read: No such file or directory")]
    assert len(listing) == 11


# One data set by several names


@pytest.mark.parametrize("root", [".", "./", "../data", "../data/", "", "{data}", "{data}/", "{data}//", "{data}/."])
def test_the_paths_are_the_same_however_the_root_is_written(
    data: Path, clock: Clock, read: list[str], monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    (data / "train" / "notes.txt").write_text("ignored")
    first = list_dataset(data)
    monkeypatch.chdir(data)
    read.clear()
    listing = list_dataset(root.format(data=data), known=know(first))
    assert read == []
    assert (listing.paths(), listing.ignored) == (first.paths(), ("train/notes.txt",))
    assert list_changed(listing) == []
    assert not any(path.startswith(("/", ".")) for path in listing.paths())


def test_a_relative_root_that_starts_like_its_own_folders_is_cut_off_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path / "train" / "train")
    monkeypatch.chdir(tmp_path / "train")
    assert list_dataset("train").paths() == list_dataset(tmp_path / "train" / "train").paths()
    monkeypatch.chdir(tmp_path / "train" / "train" / "train")
    assert list_dataset("..").paths() == list_dataset(tmp_path / "train" / "train").paths()


def test_a_root_that_is_a_link_is_followed(data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data)
    assert list_dataset(tmp_path / "link").paths() == list_dataset(data).paths()
    (tmp_path / "nowhere").symlink_to("nothing")
    with pytest.raises(DatasetError, match="found nothing"):
        list_dataset(tmp_path / "nowhere")


# Signals wait until C code is left


Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


@pytest.fixture
def arrived() -> Iterator[list[int]]:
    """Signals that arrived, in order."""
    numbers: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, frame: numbers.append(got)) for number in both}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_signal_in_the_block_arrives_after_it_and_once(
    arrived: list[int], number: signal.Signals, times: int
) -> None:
    handler: Handler = signal.getsignal(number)
    with hold_interrupts():
        for _ in range(times):
            os.kill(os.getpid(), number)
        assert arrived == []
    assert arrived == [number]
    assert signal.getsignal(number) is handler


def test_of_two_different_signals_the_first_arrives(arrived: list[int]) -> None:
    with hold_interrupts():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert arrived == [signal.SIGTERM]


def test_without_a_signal_nothing_arrives_and_the_handlers_are_restored(arrived: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with hold_interrupts():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert arrived == []
    signal.raise_signal(signal.SIGINT)  # at once again
    assert arrived == [signal.SIGINT]


def test_pythons_own_handler_raises_after_the_block() -> None:
    before, finished = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def work() -> None:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            finished.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished == [True]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_exception_in_the_block_gets_through_and_the_handlers_are_restored(arrived: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def work() -> None:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert arrived == [signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_block_in_a_block_holds_until_the_outer_one_ends(arrived: list[int]) -> None:
    with hold_interrupts():
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert arrived == []
    assert arrived == [signal.SIGINT]


def test_in_another_thread_nothing_is_held(arrived: list[int]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside, leave, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold_interrupts())
            seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    signal.raise_signal(signal.SIGINT)  # reaches the main thread while the other one is in its block
    assert arrived == [signal.SIGINT]
    leave.set()
    thread.join()
    assert seen == [before]
