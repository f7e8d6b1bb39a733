"""featcache cache info|verify|explain|ls|prune and extract --dry-run: look, check, explain, tidy up."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import COLOURS, Outcome, TinyFamily, draw_photo

from featcache.cache import hold_output, lock, open_cache, read_cache, reading

Cli = Callable[..., Outcome]
PREPROCESSING = ("resize", "crop", "interpolation", "mean", "std", "decoding", "decoder")
TINY = ("--backbone", "tiny", "--weights", "none", "--device", "cpu", "--runtime", "eager", "--batch-size", "1")
EXPLAIN = ("cache", "explain", "--backbone", "tiny", "--weights", "none")
KINDS = {"cache", "parts", "temporary", "lock"}


def flip_byte(path: Path, column: str) -> None:
    """Change one byte in the middle of a column, in the file itself."""
    with h5py.File(path) as file:
        place = file[column].id.get_offset() + file[column].nbytes // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Everything under some folders, with sizes and times."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for folder in folders
        for path in [folder, *folder.rglob("*")]
    }


def names(folder: Path | str = ".") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def made(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> Path:
    """features.h5 in the current folder, of 12 + 6 photographs."""
    assert cli("extract", photos, *TINY).code == 0
    tiny.calls = 0
    return Path("features.h5")


@pytest.fixture
def leftovers(made: Path, cli: Cli, photos: Path, tmp_path: Path) -> set[str]:
    """Beside features.h5: real parts of an extraction that stopped, a temporary file, a lock of a dead process."""
    shutil.copytree(photos, tmp_path / "broken")
    (tmp_path / "broken/train/red/broken.jpg").write_text("no image")
    assert cli("extract", tmp_path / "broken", *TINY, "-o", "other.h5").code == 1
    assert list(Path("other.h5.parts").glob("rows-*.h5"))
    Path(".features.h5.123.tmp").write_bytes(bytes(100))
    Path("features.h5.lock").write_text(json.dumps({"program": lock.PROGRAM, "pid": dead_process(), "host": "here"}))
    left = {"other.h5.parts", ".features.h5.123.tmp", "features.h5.lock"}
    assert names() == {"features.h5", *left}
    return left


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under cron: nobody answers."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


# info


def test_info_says_what_a_person_wants_to_know(cli: Cli, made: Path, photos: Path) -> None:
    outcome = cli("cache", "info", made)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("features.h5: a feature cache of 18 rows, ")
    for expected in (
        "tiny, weights random, seed 0 (",
        "8 float32, input of fc",
        "resized to 20, 16 x 16 cut out, bilinear",
        "12 train, 6 val",
        "2: blue, red",
        str(photos),
        "on cpu (eager)",
        open_cache(made).key,
        open_cache(made).content_sha256,
    ):
        assert expected in outcome.out


def test_info_says_the_same_to_a_program(cli: Cli, made: Path, photos: Path) -> None:
    value = cli("cache", "info", "--json").json
    assert (value["cache"], value["rows"], value["splits"]) == ("features.h5", 18, {"train": 12, "val": 6})
    assert (value["classes"], value["dim"], value["stored"]) == (["blue", "red"], 8, "float32")
    assert value["bytes"] == made.stat().st_size
    cache = open_cache(made)
    assert (value["extractor_key"], value["content_sha256"]) == (cache.key, cache.content_sha256)
    assert (value["extractor"], value["provenance"]) == (cache.extractor, cache.provenance)
    assert value["provenance"]["data"] == str(photos)


def test_info_counts_files_that_were_left_out(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    (photos / "train/red/broken.jpg").write_text("no image")
    assert cli("extract", photos, *TINY, "--skip-bad").code == 3
    assert "(bad files left out: 1)" in cli("cache", "info").out


def test_info_shortens_a_long_list_of_classes(cli: Cli, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for split in ("train", "val"):
        for i in range(8):
            (tmp_path / "many" / split / f"class{i}").mkdir(parents=True)
            draw_photo(COLOURS["red"], i).save(tmp_path / "many" / split / f"class{i}" / "a.jpg")
    assert cli("extract", tmp_path / "many", *TINY).code == 0
    assert "8: class0, class1, class2, class3, class4, class5 and 2 more" in cli("cache", "info").out


# verify


def test_verify_finds_a_whole_cache_all_right(cli: Cli, made: Path) -> None:
    outcome = cli("cache", "verify")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("features.h5: all right, 18 rows, ")
    assert cli("cache", "verify", made, "--json").json == [
        {"cache": "features.h5", "ok": True, "rows": 18, "problems": []}
    ]


@pytest.mark.parametrize(("split", "rows"), [("train", 12), ("val", 6)])
def test_a_flipped_byte_of_features_is_found_and_its_block_is_computed_again(
    cli: Cli, made: Path, photos: Path, tiny: type[TinyFamily], split: str, rows: int
) -> None:
    content = open_cache(made).content_sha256
    flip_byte(made, f"{split}/features")
    outcome = cli("cache", "verify")
    assert outcome.code == 1
    assert outcome.out.startswith(f"features.h5: DAMAGED in {split}/features rows 0 to {rows - 1}; 18 rows, ")
    assert outcome.err.startswith("Error: features.h5 is damaged, ")
    assert outcome.err.count("\n") == 1
    cure = shlex.split(outcome.err.split("`")[1])
    assert cure == ["featcache", "extract", str(photos), "-o", "features.h5", *TINY[:4], "--rehash"]
    tiny.calls = 0
    mended = cli(*cure[1:], *TINY[4:], "--json")
    assert (mended.code, mended.json["computed"], mended.json["reused"], tiny.calls) == (0, rows, 18 - rows, rows)
    assert f"features.h5 is damaged, {split} rows 0 to {rows - 1}" in mended.err
    assert cli("cache", "verify").code == 0
    assert read_cache(made).content_sha256 == content
    assert names() == {"features.h5"}


def test_verify_says_damage_to_a_program(cli: Cli, made: Path) -> None:
    flip_byte(made, "train/features")
    outcome = cli("cache", "verify", "--json")
    assert outcome.code == 1
    assert outcome.json == [
        {"cache": "features.h5", "ok": False, "rows": 18, "problems": ["train/features rows 0 to 11"]}
    ]


@pytest.mark.parametrize("column", ["labels", "paths", "digests", "stats", "features_sha256"])
def test_a_flipped_byte_of_another_column_is_found(cli: Cli, made: Path, column: str) -> None:
    flip_byte(made, f"val/{column}")
    outcome = cli("cache", "verify")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == f"Error: features.h5 is damaged: val/{column} is not what was written; {reading.CURE}\n"


def test_verify_goes_on_after_a_bad_file(cli: Cli, made: Path) -> None:
    for name in ("damaged.h5", "good.h5"):
        shutil.copyfile(made, name)
    flip_byte(Path("damaged.h5"), "train/features")
    Path("thesis.h5").write_text("my thesis")
    files = ("nowhere.h5", "thesis.h5", "damaged.h5", "good.h5")
    outcome = cli("cache", "verify", *files, "--json")
    assert outcome.code == 1
    assert [(item["cache"], item["ok"]) for item in outcome.json] == list(
        zip(files, (False, False, False, True), strict=True)
    )
    text = cli("cache", "verify", *files)
    assert text.code == 1
    assert [line.partition(":")[0] for line in text.out.splitlines()] == ["damaged.h5", "good.h5"]
    assert [line.split()[1] for line in text.err.splitlines()] == ["nowhere.h5", "thesis.h5", "damaged.h5"]


# explain


def explain(cli: Cli, *arguments: str | Path) -> tuple[str, Any]:
    """The text and the JSON of the same question; neither writes anything."""
    before = snapshot(Path())
    text, value = cli(*EXPLAIN, *arguments), cli(*EXPLAIN, *arguments, "--json")
    assert (text.code, value.code) == (0, 0)
    assert snapshot(Path()) == before
    return text.out, value.json


def test_explain_a_cache_that_is_not_there(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    text, value = explain(cli, photos)
    assert text == "create: features.h5 is not there; 18 of 18 rows to compute\n"
    assert value == {
        "cache": "features.h5",
        "decision": "create",
        "rows": 18,
        "to_compute": 18,
        "fields": [],
        "images": {},
    }


def test_explain_a_cache_that_has_everything(cli: Cli, made: Path, photos: Path, tiny: type[TinyFamily]) -> None:
    text, value = explain(cli, photos)
    assert text.endswith("reuse: features.h5 has all 18 rows; nothing to compute\n")
    assert "images   18 unchanged, 0 moved, 0 changed, 0 new, 0 gone" in text
    assert "DIFFERS" not in text
    assert (value["decision"], value["to_compute"]) == ("reuse", 0)
    assert all(field["same"] and field["found"] == field["wanted"] for field in value["fields"])
    assert tiny.calls == 0


def test_explain_names_every_value_that_decides_the_features(cli: Cli, made: Path, photos: Path) -> None:
    text, value = explain(cli, photos)
    expected = {"backbone", "weights", "layer", "dim", "precision.compute", "precision.stored"}
    expected |= {f"preprocessing.{name}" for name in PREPROCESSING}
    assert {field["name"] for field in value["fields"]} == expected
    assert all(f"same     {name} " in text for name in expected)


def test_explain_a_cache_that_has_some(cli: Cli, made: Path, photos: Path) -> None:
    (photos / "train/red/photo_000.jpg").unlink()
    (photos / "train/red/photo_001.jpg").rename(photos / "train/blue/moved.jpg")
    draw_photo(COLOURS["green"], 1).save(photos / "train/red/photo_002.jpg")
    draw_photo(COLOURS["green"], 2).save(photos / "val/red/new.jpg")
    text, value = explain(cli, photos)
    assert text.endswith("extend: features.h5 was made by the same extractor; 2 of 18 rows to compute\n")
    assert (value["decision"], value["rows"], value["to_compute"]) == ("extend", 18, 2)
    assert value["images"] == {"unchanged": 15, "moved": 1, "changed": 1, "new": 1, "gone": 1}


@pytest.mark.parametrize(
    ("option", "field"), [(("--seed", "1"), "weights"), (("--store", "float16"), "precision.stored")]
)
def test_explain_a_cache_of_another_extractor(
    cli: Cli, made: Path, photos: Path, option: tuple[str, str], field: str
) -> None:
    text, value = explain(cli, photos, *option)
    assert text.splitlines()[-1].startswith("refuse: features.h5 was made by another extractor; ")
    assert [line.split()[1] for line in text.splitlines() if "DIFFERS" in line] == [field]
    assert value["decision"] == "refuse"
    assert [item["name"] for item in value["fields"] if not item["same"]] == [field]


# ls


def test_ls_shows_caches_and_leftovers(cli: Cli, leftovers: set[str]) -> None:
    outcome = cli("cache", "ls")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) == 4
    for expected in (
        "cache      features.h5           tiny: 18 rows of 8 float32",
        "parts      other.h5.parts        1 part of features",
        "temporary  .features.h5.123.tmp  not finished",
        "lock       features.h5.lock      of a process that died",
    ):
        assert expected in outcome.out


def test_ls_says_the_same_to_a_program(cli: Cli, leftovers: set[str]) -> None:
    before = snapshot(Path())
    items = {item["path"]: item for item in cli("cache", "ls", ".", "--json").json}
    assert set(items) == {"features.h5", *leftovers}
    assert {item["kind"] for item in items.values()} == KINDS
    assert not any(item["held"] for item in items.values())
    assert items["features.h5"]["bytes"] == Path("features.h5").stat().st_size
    assert items["other.h5.parts"]["bytes"] == sum(p.stat().st_size for p in Path("other.h5.parts").iterdir())
    assert snapshot(Path()) == before


def test_ls_looks_into_folders_and_shows_nothing_of_strangers(cli: Cli, made: Path) -> None:
    Path("deep/er").mkdir(parents=True)
    shutil.copyfile(made, "deep/er/copy.hdf5")
    Path("deep/thesis.h5").write_text("my thesis")
    with h5py.File("deep/numbers.h5", "w") as file:
        file["x"] = [1, 2, 3]
    assert [item["path"] for item in cli("cache", "ls", "deep", "--json").json] == ["deep/er/copy.hdf5"]


def test_ls_of_a_folder_without_caches_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = cli("cache", "ls", tmp_path / "empty")
    assert (outcome.code, outcome.out) == (0, f"no caches under {tmp_path / 'empty'}\n")
    assert cli("cache", "ls", tmp_path / "empty", "--json").json == []


def test_ls_says_what_is_in_use(cli: Cli, leftovers: set[str]) -> None:
    with hold_output(Path("other.h5")):
        held = {item["path"] for item in cli("cache", "ls", "--json").json if item["held"]}
        assert held == {"other.h5.parts", "other.h5.lock"}
        outcome = cli("cache", "ls")
        assert "in use     other.h5.lock" in outcome.out
        assert "in use     other.h5.parts" in outcome.out


@pytest.mark.parametrize("name", ["gone.h5.lock", ".gone.h5.7.tmp"])
def test_ls_minds_no_link_to_nothing(cli: Cli, made: Path, name: str) -> None:
    Path(name).symlink_to("nowhere")
    assert cli("cache", "ls").code == 0


def test_ls_beside_a_lease_of_a_dead_process_writes_nothing(cli: Cli, made: Path) -> None:
    Path("features.h5.lease").write_text("")
    before = snapshot(Path())
    assert cli("cache", "ls").code == 0
    assert snapshot(Path()) == before


def test_ls_shows_a_lease_of_a_dead_process(cli: Cli, made: Path) -> None:
    Path("features.h5.lease").write_text("filelock/2\npid=1\n")
    assert "features.h5.lease" in {item["path"] for item in cli("cache", "ls", "--json").json}


# prune


@pytest.mark.usefixtures("no_terminal")
@pytest.mark.parametrize("arguments", [(), (".",), ("features.h5",), ("other.h5.parts", "--json")])
def test_prune_removes_nothing_that_nobody_agreed_to(cli: Cli, leftovers: set[str], arguments: tuple[str, ...]) -> None:
    before = snapshot(Path())
    assert cli("cache", "prune", *arguments).code != 0
    assert snapshot(Path()) == before


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_prune_asks(cli: Cli, leftovers: set[str], monkeypatch: pytest.MonkeyPatch, answer: str, removed: bool) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    outcome = cli("cache", "prune")
    assert "remove these 3 (" in outcome.err
    assert outcome.code == 0
    assert ("nothing was removed" in outcome.out) is not removed
    assert names() == {"features.h5"} | (set() if removed else leftovers)


@pytest.mark.parametrize("arguments", [(), ("features.h5",), ("--yes",), ("features.h5", "other.h5", "--yes")])
def test_prune_dry_run_removes_nothing(cli: Cli, leftovers: set[str], arguments: tuple[str, ...]) -> None:
    before = snapshot(Path())
    outcome = cli("cache", "prune", *arguments, "--dry-run")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("would remove ")
    assert snapshot(Path()) == before


def test_prune_dry_run_tells_a_program_what_would_go(cli: Cli, leftovers: set[str]) -> None:
    items = cli("cache", "prune", "--dry-run", "--json").json
    assert {item["path"] for item in items} == leftovers
    assert names() == {"features.h5", *leftovers}


def test_prune_removes_leftovers_and_no_cache(cli: Cli, leftovers: set[str]) -> None:
    outcome = cli("cache", "prune", "--yes")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].startswith("removed 3, ")
    assert names() == {"features.h5"}
    assert cli("cache", "verify").code == 0
    again = cli("cache", "prune", "--yes")
    assert (again.code, again.out) == (0, "nothing to remove\n")


def test_prune_tells_a_program_what_went(cli: Cli, leftovers: set[str]) -> None:
    items = cli("cache", "prune", "--yes", "--json").json
    assert {item["path"] for item in items} == leftovers
    assert {item["kind"] for item in items} == KINDS - {"cache"}
    assert names() == {"features.h5"}
    assert cli("cache", "prune", "--yes", "--json").json == []


def test_prune_of_a_cache_removes_it_and_its_leftovers_only(cli: Cli, leftovers: set[str]) -> None:
    assert cli("cache", "prune", "features.h5", "--yes").code == 0
    assert names() == {"other.h5.parts"}


def test_prune_of_what_was_to_become_a_cache_removes_its_leftovers(cli: Cli, leftovers: set[str]) -> None:
    assert cli("cache", "prune", "other.h5", "--yes").code == 0
    assert names() == {"features.h5", *leftovers} - {"other.h5.parts"}


def test_prune_of_one_leftover_removes_only_it(cli: Cli, leftovers: set[str]) -> None:
    assert cli("cache", "prune", "other.h5.parts", "--yes").code == 0
    assert names() == {"features.h5", *leftovers} - {"other.h5.parts"}
    assert cli("cache", "prune", ".features.h5.123.tmp", "--yes").code == 0
    assert names() == {"features.h5", "features.h5.lock"}


@pytest.mark.parametrize("name", ["thesis.h5", "photo.jpg", "nowhere.h5", "strange.parts", "elsewhere/f.h5"])
def test_prune_of_what_is_no_cache_removes_nothing(cli: Cli, leftovers: set[str], name: str) -> None:
    Path("thesis.h5").write_text("my thesis")
    Path("photo.jpg").write_text("my photograph")
    Path("strange.parts").mkdir()
    Path("strange.parts/chapter.txt").write_text("my thesis")
    before = snapshot(Path())
    outcome = cli("cache", "prune", "features.h5", name, "--yes")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    assert snapshot(Path()) == before


@pytest.mark.parametrize(
    "name",
    [
        "thesis.h5",
        ".thesis.tmp",
        ".thesis.h5.tmp",
        ".thesis.h5.old.tmp",
        "thesis.lock",
        "poetry.lock",
        "thesis.h5.parts/chapter.txt",
        "thesis.parts/.hidden",
        "thesis.parts/deep/rows-1.h5",
        "thesis.parts.txt",
        "rows-1.h5",
        "thesis.parts/rows-2024.csv",
        "thesis.parts/rows-2024/chapter.txt",
        "thesis.h5.lock",
    ],
)
def test_prune_never_touches_what_is_somebody_elses(cli: Cli, leftovers: set[str], name: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("my thesis")
    assert cli("cache", "prune", "--yes").code == 0
    assert path.is_file()
    assert path.read_text() == "my thesis"
    assert names() == {"features.h5", path.parts[0]}


def test_prune_leaves_parts_that_hold_a_strange_file_beside_real_ones(cli: Cli, leftovers: set[str]) -> None:
    Path("other.h5.parts/notes.txt").write_text("why it stopped")
    before = snapshot(Path("other.h5.parts"))
    assert cli("cache", "prune", "--yes").code == 0
    assert cli("cache", "prune", "other.h5.parts", "--yes").code == 1
    assert snapshot(Path("other.h5.parts")) == before


def test_prune_leaves_what_a_living_process_holds(cli: Cli, leftovers: set[str]) -> None:
    with hold_output(Path("other.h5")):
        parts = snapshot(Path("other.h5.parts"))
        assert cli("cache", "prune", "--yes").code == 0
        assert names() == {"features.h5", "other.h5.parts", "other.h5.lock"}
        assert snapshot(Path("other.h5.parts")) == parts
    assert cli("cache", "prune", "--yes").code == 0
    assert names() == {"features.h5"}


def test_prune_leaves_a_cache_that_a_living_process_extends(cli: Cli, made: Path) -> None:
    content = made.read_bytes()
    with hold_output(made):
        cli("cache", "prune", made, "--yes")
        assert made.read_bytes() == content
        assert Path("features.h5.lock").exists()


def test_prune_knows_one_file_by_two_names(cli: Cli, leftovers: set[str]) -> None:
    assert cli("cache", "prune", "other.h5", Path("other.h5").resolve(), "--yes").code == 0


def test_prune_says_why_a_named_cache_stays(cli: Cli, made: Path) -> None:
    with hold_output(made):
        outcome = cli("cache", "prune", made, "--yes")
    assert outcome.code == 1
    assert "is being extracted" in outcome.err


# extract --dry-run


def test_dry_run_writes_nothing_at_all(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    before = snapshot(Path(), photos)
    text = cli("extract", photos, *TINY, "--dry-run", "-o", "new/folder/f.h5")
    value = cli("extract", photos, *TINY, "--dry-run", "-o", "new/folder/f.h5", "--json")
    assert (text.code, value.code) == (0, 0)
    assert snapshot(Path(), photos) == before
    lines = text.out.splitlines()
    assert lines[0] == "new/folder/f.h5: 18 rows, 18 to compute; nothing was written"
    assert "images/s" in lines[1]
    assert (value.json["decision"], value.json["rows"], value.json["to_compute"]) == ("create", 18, 18)
    assert value.json["splits"] == {"train": 12, "val": 6}
    assert value.json["images_per_second"] > 0
    assert value.json["seconds"] > 0
    assert value.json["bytes"] > 18 * 8 * 4


def test_dry_run_of_a_data_set_with_copies_counts_each_once(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    shutil.copyfile(photos / "train/red/photo_000.jpg", photos / "train/red/copy.jpg")
    value = cli("extract", photos, *TINY, "--dry-run", "--json").json
    assert (value["rows"], value["to_compute"]) == (19, 18)
    assert cli("extract", photos, *TINY, "--json").json["computed"] == 18


@pytest.mark.parametrize("output", ["text", "json"])
def test_dry_run_of_what_is_all_there_computes_nothing(
    cli: Cli, made: Path, photos: Path, tiny: type[TinyFamily], output: str
) -> None:
    before = snapshot(Path(), photos)
    if output == "text":
        outcome = cli("extract", photos, *TINY, "--dry-run")
        assert outcome.out.splitlines()[0] == "features.h5: 18 rows, 0 to compute; nothing was written"
        assert outcome.out.splitlines()[1].startswith("nothing to compute; ")
    else:
        value = cli("extract", photos, *TINY, "--dry-run", "--json").json
        assert (value["decision"], value["to_compute"], value["seconds"]) == ("reuse", 0, 0)
        assert value["images_per_second"] is None
    assert tiny.calls == 0
    assert snapshot(Path(), photos) == before


def test_dry_run_counts_only_what_is_new(cli: Cli, made: Path, photos: Path) -> None:
    for i in range(3):
        draw_photo(COLOURS["green"], i).save(photos / f"train/red/new_{i}.jpg")
    before = snapshot(Path(), photos)
    value = cli("extract", photos, *TINY, "--dry-run", "--json").json
    assert (value["decision"], value["rows"], value["to_compute"]) == ("extend", 21, 3)
    assert snapshot(Path(), photos) == before
    assert cli("extract", photos, *TINY, "--json").json["computed"] == 3


def test_dry_run_counts_what_an_extraction_that_stopped_has_kept(cli: Cli, leftovers: set[str], tmp_path: Path) -> None:
    (tmp_path / "broken/train/red/broken.jpg").unlink()
    draw_photo(COLOURS["green"], 1).save(tmp_path / "broken/train/red/new.jpg")
    before = snapshot(Path())
    value = cli("extract", tmp_path / "broken", *TINY, "-o", "other.h5", "--dry-run", "--json").json
    assert (value["decision"], value["rows"], value["to_compute"]) == ("create", 19, 1)
    assert snapshot(Path()) == before


def test_dry_run_of_another_extractor_is_refused_and_of_a_forced_one_counted(
    cli: Cli, made: Path, photos: Path
) -> None:
    before = snapshot(Path())
    refused = cli("extract", photos, *TINY, "--seed", "1", "--dry-run")
    assert (refused.code, refused.out) == (1, "")
    assert "features.h5 was made by another extractor (weights: " in refused.err
    forced = cli("extract", photos, *TINY, "--seed", "1", "--force", "--dry-run", "--json").json
    assert (forced["decision"], forced["to_compute"]) == ("replace", 18)
    assert snapshot(Path()) == before


def test_dry_run_counts_rows_of_other_caches(cli: Cli, made: Path, photos: Path) -> None:
    draw_photo(COLOURS["green"], 1).save(photos / "train/red/new.jpg")
    value = cli("extract", photos, *TINY, "-o", "new.h5", "--reuse", made, "--dry-run", "--json").json
    assert (value["decision"], value["to_compute"]) == ("create", 1)


def test_dry_run_disturbs_nobody_who_extracts(cli: Cli, made: Path, photos: Path) -> None:
    draw_photo(COLOURS["green"], 1).save(photos / "train/red/new.jpg")
    with hold_output(made):
        before = snapshot(Path())
        assert cli("extract", photos, *TINY, "--dry-run", "--json").json["to_compute"] == 1
        assert snapshot(Path()) == before


def test_dry_run_foretells_the_size_of_a_file(cli: Cli, flat_photos: Path, tiny: type[TinyFamily]) -> None:
    for copy in range(60):
        for path in list(flat_photos.glob("red/photo_*.jpg")):
            shutil.copyfile(path, path.with_name(f"copy_{copy:03d}_{path.name}"))
    expected = cli("extract", flat_photos, *TINY, "--dry-run", "--json").json["bytes"]
    assert cli("extract", flat_photos, *TINY).code == 0
    assert expected == pytest.approx(Path("features.h5").stat().st_size, rel=0.1)


# errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cache", "info"), "features.h5 does not exist"),
        (("cache", "info", "nowhere.h5"), "nowhere.h5 does not exist"),
        (("cache", "info", "{photos}"), "is a folder"),
        (("cache", "info", "thesis.h5"), "thesis.h5 cannot be read as a feature cache"),
        (("cache", "info", "numbers.h5"), "numbers.h5 is an HDF5 file but not a feature cache"),
        (("cache", "verify"), "features.h5 does not exist"),
        (("cache", "verify", "thesis.h5"), "thesis.h5 cannot be read as a feature cache"),
        (("cache", "verify", "numbers.h5", "--json"), "numbers.h5 is an HDF5 file but not a feature cache"),
        ((*EXPLAIN, "nowhere"), "no data set at nowhere"),
        ((*EXPLAIN, "{photos}", "-o", "thesis.h5"), "thesis.h5 cannot be read as a feature cache"),
        ((*EXPLAIN, "{photos}", "--backbone", "tinny"), "unknown backbone 'tinny'"),
        ((*EXPLAIN, "{photos}", "--weights", "nowhere.pth"), "no weights at nowhere.pth"),
        (("cache", "ls", "nowhere"), "nowhere is not a folder"),
        (("cache", "ls", "thesis.h5"), "thesis.h5 is not a folder"),
        (("cache", "prune", "nowhere.h5"), "nowhere.h5 is neither a feature cache nor a leftover of one"),
        (("cache", "prune", "thesis.h5", "--yes"), "thesis.h5 is neither a feature cache nor a leftover of one"),
        (("extract", "nowhere", *TINY, "--dry-run"), "no data set at nowhere"),
        (("extract", "{photos}", *TINY, "--dry-run", "-o", "thesis.h5"), "thesis.h5 cannot be read as a feature"),
        (("extract", "{photos}", *TINY, "--dry-run", "--reuse", "nowhere.h5"), "nowhere.h5 does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_1(
    cli: Cli, photos: Path, tiny: type[TinyFamily], arguments: tuple[str, ...], expected: str
) -> None:
    Path("thesis.h5").write_text("my thesis")
    with h5py.File("numbers.h5", "w") as file:
        file["x"] = [1, 2, 3]
    before = snapshot(Path())
    outcome = cli(*(argument.format(photos=photos) for argument in arguments))
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert outcome.err.endswith(f"{errors[0]}\n")
    assert "Traceback" not in outcome.err
    assert snapshot(Path()) == before
