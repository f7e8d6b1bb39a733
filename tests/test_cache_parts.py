"""featcache.cache: parts keep what was computed, rows are found wherever they lie, only whole files get a name."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featcache import files
from featcache.cache import (
    STORED_TYPES,
    FeatureCache,
    FeatureSplit,
    GatheredRows,
    Part,
    PartSource,
    PartWriter,
    RowTable,
    Source,
    keep_files,
    list_parts,
    make_known_files,
    merge_parts,
    open_cache,
    open_sources,
    parts_path,
    read_cache,
    read_known_files,
    remove_parts,
    remove_temporary,
    verify_cache,
    write_cache,
)
from featcache.cache.contents import BLOCK_ROWS
from featcache.dataset import Split
from featcache.errors import CacheError, OutputError
from featcache.files import Disk, hash_bytes
from featcache.metering import Spent

sys.path.append(str(Path(__file__).parent / "faults"))
from disks import WatchedDisk

KEY, OTHER_KEY = "a" * 64, "b" * 64
DIM = 4
AGES = 1e9  # seconds: no part is ever old enough
PRECISIONS = ("float32", "float16")


def name_rows(numbers: Sequence[int]) -> list[str]:
    return [f"{number:064x}" for number in numbers]


def make_rows(numbers: Sequence[int], dtype: str = "float32") -> NDArray[Any]:
    """Features (N, D) that tell which rows they are, and are the same in both precisions."""
    return (np.array(numbers)[:, None] + np.arange(DIM) / 8).astype(dtype)


def add_rows(writer: PartWriter, numbers: Sequence[int]) -> None:
    writer.add(name_rows(numbers), make_rows(numbers))


def write_part(output: Path, numbers: Sequence[int], key: str = KEY, dtype: str = "float32") -> Part:
    """One part beside `output`."""
    before = {part.path for part in list_parts(output, "rows", key)[0]}
    writer = PartWriter(parts_path(output), key, dtype)
    add_rows(writer, numbers)
    writer.flush()
    (new,) = [part for part in list_parts(output, "rows", key)[0] if part.path not in before]
    return new


def read_parts(output: Path, key: str = KEY) -> list[dict[str, list[float]]]:
    """Digest -> features of each part, in the order of their names."""
    parts, damaged = list_parts(output, "rows", key)
    assert damaged == []
    return [dict(zip(digests_of(part), part.read_features().tolist(), strict=True)) for part in parts]


def digests_of(part: Part) -> list[str]:
    return [digest.decode() for digest in part.columns["digests"].tolist()]


def list_names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def describe(stored: str = "float32") -> dict[str, Any]:
    return {"backbone": "tiny", "weights": "w" * 64, "dim": DIM, "precision": {"compute": "float32", "stored": stored}}


def make_listing(numbers: Sequence[int], folder: str) -> Split:
    return Split(
        paths=tuple(f"{folder}/{i}.jpg" for i in range(len(numbers))),
        labels=np.arange(len(numbers), dtype=np.int64) % 2,
        digests=tuple(name_rows(numbers)),
        stats=np.arange(4 * len(numbers), dtype=np.int64).reshape(-1, 4) + 1,
    )


def make_cache(
    train: Sequence[int], val: Sequence[int], stored: str = "float32", rows: Callable[[Sequence[int]], Any] = make_rows
) -> FeatureCache:
    splits = {
        name: FeatureSplit(listing=make_listing(numbers, name), features=rows(numbers))
        for name, numbers in {"train": train, "val": val}.items()
    }
    return FeatureCache(
        classes=("ants", "bees"), extractor=describe(stored), splits=splits, provenance={"data": "/photos"}
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What is extracted into; not there yet."""
    return tmp_path / "features.h5"


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is written because time has gone by."""
    monkeypatch.setattr("featcache.cache.parts.PART_SECONDS", AGES)


# A part holds what was added


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_what_is_added_comes_back(output: Path, dtype: str) -> None:
    part = write_part(output, range(10), dtype=dtype)
    assert digests_of(part) == name_rows(range(10))
    features = part.read_features()
    assert features.dtype == np.dtype(dtype)
    assert features.tobytes() == make_rows(range(10), dtype).tobytes()
    assert part.key == KEY
    assert part.spent.seconds >= 0


def test_several_batches_become_one_part_in_their_order(output: Path, lasting: None) -> None:
    writer = PartWriter(parts_path(output), KEY, "float32")
    for numbers in ([5, 3], [9], [0, 1, 2]):
        add_rows(writer, numbers)
    assert not parts_path(output).exists()
    writer.flush()
    (part,) = list_parts(output, "rows", KEY)[0]
    assert digests_of(part) == name_rows([5, 3, 9, 0, 1, 2])
    assert part.read_features().tolist() == make_rows([5, 3, 9, 0, 1, 2]).tolist()


def test_rows_are_taken_as_they_are_when_added_and_not_later(output: Path) -> None:
    writer = PartWriter(parts_path(output), KEY, "float32")
    batch = make_rows([1, 2])
    writer.add(name_rows([1, 2]), batch)
    batch[:] = -1  # the next batch in the same memory
    writer.flush()
    (part,) = list_parts(output, "rows", KEY)[0]
    assert part.read_features().tolist() == make_rows([1, 2]).tolist()


def test_a_part_is_written_when_it_is_large_enough(
    output: Path, monkeypatch: pytest.MonkeyPatch, lasting: None
) -> None:
    monkeypatch.setattr("featcache.cache.parts.PART_BYTES", 5 * DIM * 4)
    writer = PartWriter(parts_path(output), KEY, "float32")
    counts = []
    for number in range(12):
        add_rows(writer, [number])
        counts.append(len(list_parts(output, "rows", KEY)[0]))
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    writer.flush()
    assert sorted(map(len, read_parts(output))) == [2, 5, 5]


def test_the_size_of_a_part_is_that_of_the_stored_type(
    output: Path, monkeypatch: pytest.MonkeyPatch, lasting: None
) -> None:
    monkeypatch.setattr("featcache.cache.parts.PART_BYTES", 5 * DIM * 4)
    writer = PartWriter(parts_path(output), KEY, "float16")
    for number in range(10):
        add_rows(writer, [number])
    assert list(map(len, read_parts(output))) == [10]


def test_a_part_is_written_when_it_is_old_enough(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.cache.parts.PART_SECONDS", 0.0)
    writer = PartWriter(parts_path(output), KEY, "float32")
    for number in range(3):
        add_rows(writer, [number])
        assert len(list_parts(output, "rows", KEY)[0]) == number + 1


def test_the_age_of_a_part_starts_with_the_one_before(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("featcache.metering.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("featcache.cache.parts.PART_SECONDS", 5.0)
    writer = PartWriter(parts_path(output), KEY, "float32")
    counts = []
    for number in range(12):
        now[0] += 1
        add_rows(writer, [number])
        counts.append(len(list_parts(output, "rows", KEY)[0]))
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert {part.spent.seconds for part in list_parts(output, "rows", KEY)[0]} == {5.0}


def test_nothing_is_written_when_nothing_was_added(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.cache.parts.PART_SECONDS", 0.0)
    writer = PartWriter(parts_path(output), KEY, "float32")
    writer.flush()
    writer.add([], np.empty((0, DIM), np.float32))
    writer.flush()
    assert not parts_path(output).exists()
    assert list_parts(output, "rows", KEY) == ([], [])


def test_a_second_flush_writes_nothing_twice(output: Path, lasting: None) -> None:
    writer = PartWriter(parts_path(output), KEY, "float32")
    add_rows(writer, [1])
    writer.flush()
    before = list_names(parts_path(output))
    writer.flush()
    assert list_names(parts_path(output)) == before


def test_a_second_writer_of_the_same_rows_harms_nothing(output: Path, lasting: None) -> None:
    writers = [PartWriter(parts_path(output), KEY, "float32") for _ in range(2)]
    for writer in writers:
        add_rows(writer, [1, 2, 3])
    for writer in writers:
        writer.flush()
    expected = dict(zip(name_rows([1, 2, 3]), make_rows([1, 2, 3]).tolist(), strict=True))
    assert all(rows == expected for rows in read_parts(output))
    parts, _ = list_parts(output, "rows", KEY)
    table = RowTable([PartSource(part) for part in parts], DIM, "float32")
    positions = table.find(np.array(name_rows([3, 1]), "S64"))
    assert table.read(positions).tolist() == make_rows([3, 1]).tolist()


def test_rows_that_could_not_be_written_are_not_forgotten(
    output: Path, monkeypatch: pytest.MonkeyPatch, lasting: None
) -> None:
    def fail(self: Disk, source: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    writer = PartWriter(parts_path(output), KEY, "float32")
    add_rows(writer, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "replace", fail)
        with pytest.raises(OutputError, match="No space left on device"):
            writer.flush()
    assert list_names(parts_path(output)) == []
    add_rows(writer, [3])
    writer.flush()
    assert [list(rows) for rows in read_parts(output)] == [name_rows([1, 2, 3])]


# A part says what it is, by its name


def test_a_parts_name_carries_the_key_and_the_digest_of_its_bytes(output: Path) -> None:
    part = write_part(output, [1, 2])
    assert part.path.name == f"rows-{KEY[:16]}-{hash_bytes(part.path.read_bytes())[:32]}.h5"
    assert part.path.parent == parts_path(output) == output.with_name("features.h5.parts")


def test_a_part_of_files_carries_the_digest_of_its_bytes(output: Path) -> None:
    keep_files(parts_path(output), np.ones((1, 4), np.int64), np.array(name_rows([1]), "S64"))
    (path,) = parts_path(output).iterdir()
    assert path.name == f"files-{hash_bytes(path.read_bytes())[:32]}.h5"


def test_equal_parts_of_files_are_one_file(output: Path) -> None:
    stats, digests = np.arange(8, dtype=np.int64).reshape(2, 4) + 1, np.array(name_rows([1, 2]), "S64")
    contents = []
    for _ in range(2):
        keep_files(parts_path(output), stats, digests)
        (path,) = parts_path(output).iterdir()
        contents.append((path.name, path.read_bytes()))
    assert contents[0] == contents[1]
    keep_files(parts_path(output), stats + 1, digests)
    assert len(list_names(parts_path(output))) == 2


def test_what_was_kept_of_files_is_known_again(output: Path) -> None:
    for start in (0, 10):
        stats = np.arange(start, start + 8, dtype=np.int64).reshape(2, 4) + 1
        keep_files(parts_path(output), stats, np.array(name_rows([start, start + 1]), "S64"))
    known = make_known_files(read_known_files(output))
    wanted = np.array([[11, 12, 13, 14], [5, 6, 7, 8], [5, 6, 7, 9]], np.int64)
    assert known.find(wanted) == [*name_rows([10, 1]), ""]


def test_nothing_is_known_of_files_where_there_are_no_parts(output: Path) -> None:
    stats, digests = read_known_files(output)
    assert (stats.shape, stats.dtype, digests.shape, digests.dtype) == (
        (0, 4),
        np.dtype(np.int64),
        (0,),
        np.dtype("S64"),
    )
    assert make_known_files((stats, digests)).find(np.ones((2, 4), np.int64)) == ["", ""]


def test_a_stranger_needs_only_h5py_to_read_a_part(output: Path) -> None:
    with h5py.File(write_part(output, [1, 2]).path) as file:
        assert set(file) == {"features", "digests"}
        assert file["features"][:].tolist() == make_rows([1, 2]).tolist()
        assert file.attrs["extractor_key"].decode() == KEY


# Only whole parts of this extractor are used


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_part_is_damage(output: Path, where: float, bit: int) -> None:
    part = next(iter(list_parts(output, "rows", KEY)[0]), None) or write_part(output, [1, 2, 3])
    whole = part.path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(where * len(whole))] ^= 1 << bit
    try:
        part.path.write_bytes(damaged)
        assert list_parts(output, "rows", KEY) == ([], [part.path])
        with pytest.raises(CacheError, match="is damaged: its bytes are not those of its name"):
            part.read_features()
    finally:
        part.path.write_bytes(whole)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_part_cut_short_is_damage_and_the_others_are_used(output: Path, size: int) -> None:
    whole, cut = write_part(output, [1, 2]), write_part(output, [3])
    cut.path.write_bytes(cut.path.read_bytes()[:size])
    parts, damaged = list_parts(output, "rows", KEY)
    assert ([part.path for part in parts], damaged) == ([whole.path], [cut.path])


def test_a_damaged_part_of_files_is_not_believed(output: Path) -> None:
    keep_files(parts_path(output), np.ones((1, 4), np.int64), np.array(name_rows([1]), "S64"))
    (path,) = parts_path(output).iterdir()
    path.write_bytes(path.read_bytes().replace(name_rows([1])[0].encode(), name_rows([2])[0].encode()))
    assert list_parts(output, "files") == ([], [path])
    assert make_known_files(read_known_files(output)).find(np.ones((1, 4), np.int64)) == [""]


def test_a_part_that_goes_while_it_is_used_is_a_cache_error(output: Path) -> None:
    part = write_part(output, [1, 2])
    part.path.unlink()
    with pytest.raises(CacheError, match="cannot be read: No such file"):
        part.read_features()


def forge_part(output: Path, prefix: str, columns: dict[str, Any]) -> Path:
    """A file that is named as a part is, digest and all, with any columns; a str leads to another file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update(
            {"featcache_part": 1, "seconds": 1.0, "extractor_key": np.bytes_(KEY if prefix[0] == "r" else "")}
        )
        for name, values in columns.items():
            file[name] = h5py.ExternalLink(values, name) if isinstance(values, str) else values
    path = parts_path(output) / f"{prefix}-{hash_bytes(buffer.getvalue())[:32]}.h5"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


TWO = np.array(name_rows([1, 2]), "S64")
FORGED_ROWS: dict[str, dict[str, Any]] = {
    "no features": {"digests": TWO},
    "one axis": {"digests": TWO, "features": np.zeros(2, "<f4")},
    "fewer features": {"digests": TWO, "features": np.zeros((1, DIM), "<f4")},
    "float64": {"digests": TWO, "features": np.zeros((2, DIM), "<f8")},
    "int32": {"digests": TWO, "features": np.zeros((2, DIM), "<i4")},
    "a number": {"digests": TWO, "features": np.float32(1)},
    "short digests": {"digests": TWO.astype("S63"), "features": np.zeros((2, DIM), "<f4")},
    "a table of digests": {"digests": TWO[:, None], "features": np.zeros((2, DIM), "<f4")},
    "elsewhere": {"digests": TWO, "features": "other.h5"},
}
FORGED_FILES: dict[str, dict[str, Any]] = {
    "narrow": {"digests": TWO, "stats": np.zeros((2, 3), "<i8")},
    "longer": {"digests": TWO, "stats": np.zeros((3, 4), "<i8")},
    "floats": {"digests": TWO, "stats": np.zeros((2, 4), "<f8")},
    "no stats": {"digests": TWO},
}


@pytest.mark.parametrize("columns", FORGED_ROWS.values(), ids=FORGED_ROWS)
def test_a_part_of_other_columns_is_damaged_though_its_name_is_right(output: Path, columns: dict[str, Any]) -> None:
    whole = write_part(output, [5])
    forged = forge_part(output, f"rows-{KEY[:16]}", columns)
    parts, damaged = list_parts(output, "rows", KEY)
    assert ([part.path for part in parts], damaged) == ([whole.path], [forged])
    with pytest.raises(CacheError, match=r"is damaged: .*; remove it and run the same command again") as raised:
        Part(path=forged, key=KEY, spent=Spent(), columns={"digests": TWO}).read_features()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("columns", FORGED_FILES.values(), ids=FORGED_FILES)
def test_a_part_of_files_of_other_columns_is_not_believed(output: Path, columns: dict[str, Any]) -> None:
    forged = forge_part(output, "files", columns)
    assert list_parts(output, "files") == ([], [forged])
    assert make_known_files(read_known_files(output)).find(np.zeros((1, 4), np.int64)) == [""]


def test_rows_of_another_width_are_named_where_they_are_used(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(output, [5])
    forged = forge_part(output, f"rows-{KEY[:16]}", {"digests": TWO, "features": np.zeros((2, DIM + 1), "<f4")})
    parts, _ = list_parts(output, "rows", KEY)
    table = RowTable([PartSource(part) for part in parts], DIM, "<f4")
    with pytest.raises(CacheError, match=f"{forged.name} is damaged: its features are of width 5, expected 4; remove"):
        table.read(table.find(TWO))
    monkeypatch.setattr("featcache.cache.parts.MANY_PARTS", 2)
    merge_parts(output, "rows", KEY)
    assert len(list_parts(output, "rows", KEY)[0]) == 2


@pytest.mark.parametrize("other", [OTHER_KEY, KEY[:16] + OTHER_KEY[16:]], ids=["another", "one that starts the same"])
def test_parts_of_another_key_are_not_listed(output: Path, other: str) -> None:
    mine = write_part(output, [1])
    write_part(output, [2], key=other)
    assert ([part.path for part in list_parts(output, "rows", KEY)[0]], list_parts(output, "rows", KEY)[1]) == (
        [mine.path],
        [],
    )


def test_a_part_under_the_name_of_another_key_is_not_listed(output: Path) -> None:
    part = write_part(output, [1], key=OTHER_KEY)
    part.path.rename(part.path.with_name(part.path.name.replace(OTHER_KEY[:16], KEY[:16])))
    assert list_parts(output, "rows", KEY) == ([], [])


STRANGE = {
    "notes.txt": b"my thesis",
    "thesis.h5": b"not HDF5",
    "rows.h5": b"",
    "row-1.h5": b"x",
    f"rows-{OTHER_KEY[:16]}.h5": b"x",
    "file-1.h5": b"x",
    "files.txt": b"x",
    ".hidden": b"x",
}


def test_strange_files_are_ignored_and_survive(output: Path) -> None:
    part = write_part(output, [1])
    for name, data in STRANGE.items():
        (parts_path(output) / name).write_bytes(data)
    (parts_path(output) / "folder").mkdir()
    assert [found.path for found in list_parts(output, "rows", KEY)[0]] == [part.path]
    assert list_parts(output, "rows", KEY)[1] == list_parts(output, "files")[1] == []
    left = remove_parts(output, KEY)
    assert not part.path.exists()
    assert [path.name for path in left] == list_names(parts_path(output)) == sorted([*STRANGE, "folder"])
    assert {name: (parts_path(output) / name).read_bytes() for name in STRANGE} == STRANGE


# Parts go when the work is done


def test_after_the_work_nothing_is_left_of_the_parts(output: Path) -> None:
    write_part(output, [1])
    write_part(output, [2], dtype="float16")
    keep_files(parts_path(output), np.ones((1, 4), np.int64), np.array(name_rows([1]), "S64"))
    (parts_path(output) / f".rows-{'0' * 16}-{'1' * 32}.h5.123.tmp").write_bytes(b"half a part")
    assert remove_parts(output, KEY) == []
    assert list_names(output.parent) == []


def test_parts_of_another_extractor_stay_and_are_told(output: Path) -> None:
    write_part(output, [1])
    other = write_part(output, [2], key=OTHER_KEY)
    before = other.path.read_bytes()
    assert remove_parts(output, KEY) == [other.path]
    assert other.path.read_bytes() == before
    assert read_parts(output, OTHER_KEY) == [{name_rows([2])[0]: make_rows([2])[0].tolist()}]
    assert remove_parts(output, OTHER_KEY) == []
    assert not parts_path(output).exists()


def test_parts_of_another_output_stay(output: Path) -> None:
    other = output.with_name("features.h5.parts.h5")
    write_part(output, [1])
    write_part(other, [2])
    remove_parts(output, KEY)
    assert list_names(output.parent) == ["features.h5.parts.h5.parts"]
    assert len(read_parts(other)) == 1


def test_where_there_are_no_parts_nothing_is_removed(output: Path) -> None:
    assert remove_parts(output, KEY) == []
    parts_path(output).write_text("a file of that name")
    assert remove_parts(output, KEY) == []
    assert parts_path(output).read_text() == "a file of that name"


def test_unfinished_files_of_dead_processes_go_and_all_else_stays(output: Path) -> None:
    part = write_part(output, [1])
    unfinished = [
        output.with_name(".features.h5.123.tmp"),
        parts_path(output) / f".rows-{'0' * 16}-{'1' * 32}.h5.123.tmp",
    ]
    others = [output.with_name(".other.h5.123.tmp"), output.with_name("features.h5"), parts_path(output) / "notes.tmp"]
    for path in [*unfinished, *others]:
        path.write_bytes(b"x")
    remove_temporary(output)
    assert not any(path.exists() for path in unfinished)
    assert all(path.exists() for path in [*others, part.path])


def test_a_name_with_the_signs_of_a_pattern_is_only_a_name(tmp_path: Path) -> None:
    output, other = tmp_path / "f[ab]*.h5", tmp_path / "fa.h5"
    part, stays = write_part(output, [1]), write_part(other, [2])
    for name in (".fa.h5.1.tmp", ".f[ab]*.h5.1.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_temporary(output)
    assert [found.path for found in list_parts(output, "rows", KEY)[0]] == [part.path]
    assert remove_parts(output, KEY) == []
    assert stays.path.exists()
    assert list_names(tmp_path) == [".fa.h5.1.tmp", "fa.h5.parts"]


# What is durable, and when


class Recorder(WatchedDisk):
    """Keeps what is done to each file, under the name that it has in the end, and every byte."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Path]] = []
        self.images: dict[Path, bytearray] = {}

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        first = arguments[0]
        path = self.paths[first] if isinstance(first, int) else first
        assert isinstance(path, Path)
        self.calls.append((name, path))
        if name == "create":
            self.images[path] = bytearray()
        elif name == "write":
            _, data, offset = arguments
            assert isinstance(data, bytes | memoryview)
            assert isinstance(offset, int)
            image = self.images[path]
            image.extend(bytes(max(0, offset + len(data) - len(image))))
            image[offset : offset + len(data)] = data
        elif name == "truncate":
            size = arguments[1]
            assert isinstance(size, int)
            image = self.images[path]
            image.extend(bytes(max(0, size - len(image))))
            del image[size:]
        elif name == "replace":
            target = arguments[1]
            assert isinstance(target, Path)
            self.images[target] = self.images.pop(path)
            self.calls[-1] = (f"replace {target}", path)

    def finished(self) -> list[Path]:
        """Every name that was given."""
        return [Path(name.partition(" ")[2]) for name, _ in self.calls if name.startswith("replace ")]

    def check_order(self, final: Path) -> None:
        """Everything is written, then synced, then named, then the name is synced; nothing comes after."""
        renamed = next(i for i, (name, _) in enumerate(self.calls) if name == f"replace {final}")
        temporary = self.calls[renamed][1]
        assert temporary.parent == final.parent
        names = [name for name, path in self.calls if path == temporary]
        assert names[0] == "create"
        assert names[-2:] == ["sync", f"replace {final}"]
        assert set(names[1:-2]) <= {"write", "truncate"}
        assert "write" in names
        assert self.calls[renamed + 1] == ("sync_folder", final.parent)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """All durable calls are recorded."""
    disk = Recorder()
    monkeypatch.setattr(files, "disk", disk)
    return disk


def test_a_part_is_written_synced_named_and_its_name_synced(output: Path, recorder: Recorder) -> None:
    part = write_part(output, range(100))
    keep_files(parts_path(output), np.ones((1, 4), np.int64), np.array(name_rows([1]), "S64"))
    assert len(recorder.finished()) == 2
    assert part.path in recorder.finished()
    for final in recorder.finished():
        recorder.check_order(final)
        assert final.read_bytes() == recorder.images[final]


@pytest.mark.parametrize("stored", PRECISIONS)
def test_a_cache_is_written_synced_named_and_its_name_synced(output: Path, recorder: Recorder, stored: str) -> None:
    for numbers in (range(50), range(60)):  # where there is none, and where there is one
        recorder.calls.clear()
        write_cache(output, make_cache(numbers, [1, 2], stored))
        assert recorder.finished() == [output]
        recorder.check_order(output)
        assert output.read_bytes() == recorder.images[output]


def test_every_byte_of_a_cache_goes_through_the_disk(
    output: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Any, str]] = []
    original = h5py.File

    def open_file(name: Any, mode: str = "r", **options: Any) -> Any:
        opened.append((name, mode))
        return original(name, mode, **options)

    monkeypatch.setattr(h5py, "File", open_file)
    write_cache(output, make_cache(range(5000), range(100)))
    assert output.read_bytes() == recorder.images[output]
    assert [mode for _, mode in opened] == ["w", "r"]  # written, and read back
    assert not any(isinstance(name, str | bytes | Path) for name, _ in opened)


def test_removed_parts_are_removed_through_the_disk(output: Path, recorder: Recorder) -> None:
    part = write_part(output, [1])
    recorder.calls.clear()
    remove_parts(output, KEY)
    assert recorder.calls == [("remove", part.path), ("remove_folder", parts_path(output))]


def test_the_name_of_a_new_folder_of_parts_is_synced_too(output: Path, recorder: Recorder) -> None:
    write_part(output, [1])
    calls = recorder.calls
    made = calls.index(("make_folder", parts_path(output)))
    assert ("sync_folder", output.parent) in calls[made:]


# Rows are found wherever they lie


class Spy:
    """A source that tells what was read of it."""

    window = 10

    def __init__(self, digests: Sequence[str], features: NDArray[Any]) -> None:
        self.digests = np.array(digests, "S64")
        self.features = features
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> NDArray[Any]:
        self.reads.append((start, stop))
        return self.features[start:stop]


def test_the_first_source_that_has_a_row_gives_it() -> None:
    first, second = Spy(name_rows([1, 2]), make_rows([10, 20])), Spy(name_rows([2, 3]), make_rows([200, 300]))
    for sources, expected in (([first, second], [10, 20, 300]), ([second, first], [10, 200, 300])):
        table = RowTable(sources, DIM, "float32")
        found = table.read(table.find(np.array(name_rows([1, 2, 3]), "S64")))
        assert found.tolist() == make_rows(expected).tolist()


def test_each_source_is_read_once_from_start_to_end() -> None:
    spies = [Spy(name_rows(range(s, s + 35)), make_rows(range(s, s + 35))) for s in (0, 100, 200)]
    table = RowTable(spies, DIM, "float32")
    wanted = np.random.default_rng(0).permutation([*range(5, 30), *range(200, 235)])
    found = table.read(table.find(np.array(name_rows(wanted.tolist()), "S64")))
    assert found.tolist() == make_rows(wanted.tolist()).tolist()
    assert [spy.reads for spy in spies] == [
        [(5, 10), (10, 20), (20, 30)],
        [],
        [(0, 10), (10, 20), (20, 30), (30, 35)],
    ]


def test_a_part_is_read_as_a_whole(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.cache.rows.READ_ROWS", 10)
    source = PartSource(write_part(output, range(35)))
    reads: list[tuple[int, int]] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda *rows: (reads.append(rows), read(*rows))[1])
    table = RowTable([source], DIM, "float32")
    assert table.read(np.arange(34, -1, -1)).tolist() == make_rows(range(34, -1, -1)).tolist()
    assert reads == [(0, 35)]


def test_rows_without_a_digest_are_never_found() -> None:
    table = RowTable([Spy(["", name_rows([1])[0], ""], make_rows([7, 1, 8]))], DIM, "float32")
    assert table.find(np.array(["", *name_rows([1, 2])], "S64")).tolist() == [-1, 1, -1]


@pytest.mark.parametrize("sources", [[], [Spy([], make_rows([]))]], ids=["no source", "an empty source"])
def test_an_empty_table_has_no_row(sources: list[Source]) -> None:
    table = RowTable(sources, DIM, "float16")
    assert table.find(np.array(name_rows([1, 2]), "S64")).tolist() == [-1, -1]
    assert table.read(np.empty(0, np.int64)).shape == (0, DIM)


def test_float32_rows_are_rounded_as_an_extraction_rounds_them(output: Path) -> None:
    values = np.random.default_rng(0).normal(size=(100, DIM)).astype(np.float32)
    digests = name_rows(range(100))
    table = RowTable([Spy(digests, values)], DIM, "float16")
    gathered = GatheredRows(table, table.find(np.array(digests, "S64")), DIM)
    writer = PartWriter(parts_path(output), KEY, "float16")
    writer.add(digests, values)
    writer.flush()
    (part,) = list_parts(output, "rows", KEY)[0]
    assert gathered[:].tobytes() == part.read_features().tobytes() == values.astype(np.float16).tobytes()


SourceRows = tuple[str, list[int], list[int]]  # kind, rows of a part or a train split, rows of a val split
NUMBERS = st.lists(st.integers(0, 30), max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(st.tuples(st.sampled_from(["part", "cache", "float16 cache"]), NUMBERS, NUMBERS), max_size=4),
    wanted=st.lists(st.integers(0, 35), max_size=60),
    dtype=st.sampled_from(PRECISIONS),
    window=st.integers(1, 25),
    slices=st.lists(st.slices(60), max_size=5),
)
def test_gathered_rows_equal_a_plain_dictionary(
    layout: list[SourceRows], wanted: list[int], dtype: str, window: int, slices: list[slice]
) -> None:
    expected: dict[str, list[float]] = {}

    def make_other_rows(numbers: Sequence[int], source: int) -> NDArray[Any]:
        return make_rows(numbers) + 64 * source  # one digest has other features in each source: the first's are right

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.cache.rows.READ_ROWS", window)
        patch.setattr("featcache.cache.parts.PART_BYTES", 10 * DIM * 4)
        folder, caches, parts = Path(name), [], []
        for i, (kind, first, second) in enumerate(layout):
            if kind == "part":
                writer = PartWriter(parts_path(folder / f"{i}.h5"), KEY, dtype)
                for digest, row in zip(name_rows(first), make_other_rows(first, i), strict=True):
                    writer.add([digest], row[None])
                writer.flush()
                # in the order of their names, which is that of their digests
                parts += [PartSource(part) for part in list_parts(folder / f"{i}.h5", "rows", KEY)[0]]
            else:
                stored = "float16" if kind == "float16 cache" else "float32"
                rows = make_cache(first, second, stored, lambda numbers, i=i: make_other_rows(numbers, i))  # type: ignore[misc]
                write_cache(folder / f"{i}.h5", rows)
                caches.append(folder / f"{i}.h5")
        with open_sources(caches, dtype) as (sources, damaged):
            everything = [*parts, *sources]
            for source in everything:
                features = source.read(0, len(source.digests)).astype(dtype)
                for digest, row in zip(np.asarray(source.digests).tolist(), features.tolist(), strict=True):
                    expected.setdefault(digest.decode(), row)
            table = RowTable(everything, DIM, dtype)
            positions = table.find(np.array(name_rows(wanted), "S64"))
            known = [number for number in wanted if name_rows([number])[0] in expected]
            assert (positions >= 0).tolist() == [digest in expected for digest in name_rows(wanted)]
            gathered = GatheredRows(table, positions[positions >= 0], DIM)
            assert (damaged, len(gathered), gathered.shape) == ([], len(known), (len(known), DIM))
            values = [expected[digest] for digest in name_rows(known)]
            for piece in [slice(None), *slices]:
                found = gathered[piece]
                assert found.dtype == np.dtype(dtype)
                assert found.tolist() == values[piece]
    listed = {digest for kind, *rows in layout for digest in name_rows(rows[0] + rows[1] * (kind != "part"))}
    assert set(expected) == listed


# A cache from gathered rows


def read_columns(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {f"{split}/{column}": file[f"{split}/{column}"][:].tobytes() for split in file for column in file[split]}


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(40)), cut=st.integers(0, 40), stored=st.sampled_from(PRECISIONS))
def test_a_cache_of_gathered_rows_is_the_cache_of_the_plain_rows(order: list[int], cut: int, stored: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for numbers in (range(25), range(20, 40)):
            write_part(folder / "gathered.h5", numbers, dtype=stored)
        parts, _ = list_parts(folder / "gathered.h5", "rows", KEY)
        table = RowTable([PartSource(part) for part in parts], DIM, STORED_TYPES[stored])

        def gather(numbers: Sequence[int]) -> GatheredRows:
            return GatheredRows(table, table.find(np.array(name_rows(numbers), "S64")), DIM)

        train, val = order[:cut], order[cut:]
        gathered = write_cache(folder / "gathered.h5", make_cache(train, val, stored, gather))
        plain = write_cache(folder / "plain.h5", make_cache(train, val, stored))
        assert read_columns(folder / "gathered.h5") == read_columns(folder / "plain.h5")
        assert gathered.content_sha256 == plain.content_sha256
        assert (folder / "gathered.h5").read_bytes() == (folder / "plain.h5").read_bytes()


@pytest.mark.parametrize("stored", PRECISIONS)
def test_rows_that_are_gathered_in_many_pieces_are_the_same(
    output: Path, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    order = np.random.default_rng(0).permutation(3 * BLOCK_ROWS + 5).tolist()
    rows = np.random.default_rng(1).normal(size=(len(order), DIM)).astype(np.float32)
    table = RowTable([Spy(name_rows(range(len(order))), rows)], DIM, STORED_TYPES[stored])
    plain = output.with_name("plain.h5")
    write_cache(plain, make_cache(order, [0], stored, lambda numbers: rows[list(numbers)]))
    monkeypatch.setattr("featcache.cache.writing.PIECE_BYTES", 1)

    def gather(numbers: Sequence[int]) -> GatheredRows:
        return GatheredRows(table, table.find(np.array(name_rows(numbers), "S64")), DIM)

    write_cache(output, make_cache(order, [0], stored, gather))
    assert read_columns(output) == read_columns(plain)
    assert verify_cache(output)


@pytest.mark.parametrize("stored", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e6])
@pytest.mark.parametrize("where", ["train", "val"])
@pytest.mark.parametrize("there", [True, False], ids=["a file is there", "no file is there"])
def test_what_the_precision_cannot_hold_is_refused_and_leaves_no_file(
    output: Path, stored: str, value: float, where: str, there: bool
) -> None:
    if there:
        write_cache(output, make_cache([1], [2]))
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    cache = make_cache([3, 4, 5], [6, 7], stored)
    cache.splits[where].features[-1, -1] = value
    if stored == "float32" and np.isfinite(value):
        write_cache(output, cache)
        assert read_cache(output).splits[where].features[-1, -1] == value
        return
    with pytest.raises(
        CacheError, match=rf"^{where}/features holds numbers that {stored} cannot .*nothing was written"
    ):
        write_cache(output, cache)
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before


def test_the_largest_number_of_float16_is_kept(output: Path) -> None:
    cache = make_cache([1], [2], "float16")
    cache.splits["train"].features[:] = [[65504, -65504, 65519, 6e-8]]
    write_cache(output, cache)
    assert read_cache(output).splits["train"].features.tolist() == [[65504, -65504, 65504, float(np.float16(6e-8))]]


# Damaged rows of a cache are as good as none


def test_rows_of_damaged_blocks_are_not_served_and_are_reported(output: Path) -> None:
    n = 2 * BLOCK_ROWS + 100
    write_cache(output, make_cache(range(n), range(n, n + 10)))
    whole = output.with_name("whole.h5")
    write_cache(whole, make_cache(range(BLOCK_ROWS + 5), [0]))
    with h5py.File(output) as file:
        offset = file["train/features"].id.get_offset() + (BLOCK_ROWS + 7) * DIM * 4
    with output.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff\xff\xff")
    with open_sources([output], "<f4") as (sources, damaged):
        assert damaged == [(output, "train", BLOCK_ROWS, 2 * BLOCK_ROWS)]
        table = RowTable(sources, DIM, "float32")
        positions = table.find(np.array(name_rows(range(n + 10)), "S64"))
        good = [*range(BLOCK_ROWS), *range(2 * BLOCK_ROWS, n + 10)]
        assert np.flatnonzero(positions >= 0).tolist() == good
        assert np.array_equal(table.read(positions[good]), make_rows(good))
    with open_sources([output, whole], "<f4") as (sources, damaged):  # another file may have them
        assert len(damaged) == 1
        table = RowTable(sources, DIM, "float32")
        positions = table.find(np.array(name_rows(range(BLOCK_ROWS, BLOCK_ROWS + 10)), "S64"))
        assert (positions >= 0).tolist() == [True] * 5 + [False] * 5
        assert np.array_equal(table.read(positions[:5]), make_rows(range(BLOCK_ROWS, BLOCK_ROWS + 5)))
    assert open_cache(output).splits["train"].features.shape == (n, DIM)


def test_what_is_no_cache_is_no_source(output: Path) -> None:
    good = output.with_name("good.h5")
    write_cache(good, make_cache([1], [2]))
    output.write_bytes(b"my thesis")
    with pytest.raises(CacheError, match=re.escape(str(output))), open_sources([good, output], "<f4"):
        pytest.fail("it was opened")


def test_a_source_stays_the_file_that_it_was_when_another_takes_its_name(output: Path) -> None:
    write_cache(output, make_cache(range(10), [20]))
    with open_sources([output], "<f4") as (sources, _):
        table = RowTable(sources, DIM, "float32")
        write_cache(output, make_cache(range(10), [20], rows=lambda numbers: make_rows(numbers) + 1000))
        found = table.read(table.find(np.array(name_rows([9, 20, 0]), "S64")))
    assert found.tolist() == make_rows([9, 20, 0]).tolist()
    assert read_cache(output).splits["val"].features.tolist() == (make_rows([20]) + 1000).tolist()
