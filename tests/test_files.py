"""featcache.files: a file or folder is whole or not there, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import OutputError
from featcache.files import (
    canonical_json,
    check_folder_writable,
    check_writable,
    disk,
    fill_folder,
    hash_bytes,
    hash_file,
    pretty_json,
    temporary_path,
    write_atomically,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


def disk_is_full(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Hashing


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(997)) * (size // 997 + 1)
    (tmp_path / "f").write_bytes(data[:size])
    assert hash_file(tmp_path / "f") == hash_bytes(data[:size]) == hashlib.sha256(data[:size]).hexdigest()


# JSON


def reorder(value: Any) -> Any:
    """The same value, its dictionaries filled in the opposite order."""
    if isinstance(value, dict):
        return {name: reorder(value[name]) for name in reversed(value)}
    return [reorder(item) for item in value] if isinstance(value, list) else value


@given(value=JSON_VALUES)
@settings(deadline=None, max_examples=100, database=None)
def test_equal_values_have_equal_canonical_text_and_it_is_ascii(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(reorder(value)) == text
    assert canonical_json(json.loads(text)) == text
    assert text.isascii()
    assert "\n" not in text


@given(first=JSON_VALUES, second=JSON_VALUES)
@settings(deadline=None, max_examples=100, database=None)
def test_different_values_have_different_canonical_text(first: Any, second: Any) -> None:
    if canonical_json(first) == canonical_json(second):
        assert first == second


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_canonical_json_has_no_spaces_and_sorted_keys() -> None:
    assert canonical_json({"b": [1, 2], "a": {"d": None, "c": True}}) == '{"a":{"c":true,"d":null},"b":[1,2]}'


@given(value=JSON_VALUES)
@settings(deadline=None, max_examples=50, database=None)
def test_pretty_json_says_the_same_and_ends_its_line(value: Any) -> None:
    text = pretty_json(value)
    assert json.loads(text) == value
    assert text.endswith("\n")
    assert text.isascii()


def test_pretty_json_keeps_the_order_of_keys() -> None:
    assert list(json.loads(pretty_json({"b": 1, "a": 2}))) == ["b", "a"]


# One file


@pytest.mark.parametrize("data", [b"", b"\0\xff", "text with ü", b"x" * 3_000_000])
def test_a_file_is_written_whole(tmp_path: Path, data: bytes | str) -> None:
    write_atomically(tmp_path / "new" / "deep" / "f", data)
    assert (tmp_path / "new" / "deep" / "f").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(tmp_path / "new" / "deep") == ["f"]


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a longer old text")
    write_atomically(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    assert names(tmp_path) == ["f"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with (tmp_path / "f").open() as reader:
        write_atomically(tmp_path / "f", "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("old", ["old", None])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, old: str | None
) -> None:
    path = tmp_path / "f"
    if old is not None:
        path.write_text(old)
    with monkeypatch.context() as patch:
        patch.setattr(broken, disk_is_full)
        with pytest.raises(OutputError, match=r"cannot write .*f \(3 bytes\): No space left on device"):
            write_atomically(path, "new")
    assert names(tmp_path) == ([] if old is None else ["f"])
    assert old is None or path.read_text() == old


def test_a_really_full_disk_is_told(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    temporary = temporary_path(tmp_path / "f")  # what is written to first
    temporary.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(tmp_path / "f", b"x" * 100_000)
    assert names(tmp_path) == []


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> NoReturn:
        raise KeyboardInterrupt

    (tmp_path / "f").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_the_data_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeds = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: (deeds.append("sync"), fsync(descriptor)))
    monkeypatch.setattr("pathlib.Path.replace", lambda self, to: (deeds.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "f", "new")
    assert deeds[:2] == ["sync", "rename"]


def test_a_folder_in_the_way_of_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*f "):
        write_atomically(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"]


def test_a_place_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"Not a directory|File exists"):
        write_atomically(tmp_path / "file" / "f", "new")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", disk_is_full)
    disk.sync_folder(tmp_path)


# One folder


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A folder that holds something already."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    return tmp_path / "run"


def test_a_folder_has_its_name_only_when_the_block_ended(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "one"
    with fill_folder(final) as folder:
        (folder / "a").write_text("a")
        assert folder.parent == final.parent
        assert not final.exists()
    assert (final / "a").read_text() == "a"
    assert names(final.parent) == ["one"]


def test_an_old_folder_is_replaced_only_at_the_end(old_run: Path) -> None:
    with fill_folder(old_run) as folder:
        (folder / "new").write_text("new")
        assert names(old_run) == ["old"]
    assert names(old_run) == ["new"]
    assert names(old_run.parent) == ["run"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_in_the_block_leaves_the_old_folder(old_run: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with fill_folder(old_run) as folder:
            (folder / "new").write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fill()
    assert names(old_run) == ["old"]
    assert names(old_run.parent) == ["run"]


def test_an_exception_in_the_block_leaves_no_new_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with fill_folder(tmp_path / "run"):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fill()
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill() -> None:
        with fill_folder(old_run) as folder:
            (folder / "new").write_text("new")
            monkeypatch.setattr("pathlib.Path.rename", disk_is_full)

    with pytest.raises(OutputError, match=r"cannot write .*run: No space left on device"):
        fill()
    assert names(old_run) == ["old"]
    assert names(old_run.parent) == ["run"]


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match=r"cannot write .*run: .*; choose another place"),
        fill_folder(tmp_path / "file" / "run"),
    ):
        pytest.fail("the block ran")


def test_a_new_folder_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with fill_folder(tmp_path / "run"):
        pass
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "run")]
    assert rights[0] == rights[1]


# Asking beforehand


def test_a_writable_place_is_writable_and_nothing_is_left_there(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "f.h5")
    assert names(tmp_path / "new" / "deep") == []


def test_an_existing_file_may_be_written_and_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    check_writable(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "old"


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: it is a folder"):
        check_writable(tmp_path)


@pytest.mark.parametrize("below", ["f.h5", "deep/f.h5"])
def test_below_a_file_nothing_can_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=rf"cannot write .*file/{below}: .*; choose another place with -o"):
        check_writable(tmp_path / "file" / below)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("path", ["/proc/f.h5", "/proc/new/f.h5"])
def test_an_unwritable_folder_is_told_before_any_work(path: str) -> None:
    with pytest.raises(OutputError, match=f"cannot write {path}: "):
        check_writable(Path(path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_told(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_folder_writable(tmp_path / "locked", tmp_path / "locked" / "run")


def test_the_wanted_path_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write WANTED: "):
        check_folder_writable(tmp_path / "file", Path("WANTED"))
