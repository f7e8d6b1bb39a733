"""Shares of an extraction on machines that know nothing of each other, and the file that is put together from them."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, Outcome, Store, TinyFamily, fill_class
from hypothesis import given
from hypothesis import strategies as st
from source_fixture import upload

from featcache.cache import (
    keep_bad,
    keep_job,
    list_done,
    list_jobs,
    list_parts,
    open_cache,
    parts_path,
    read_bad,
    read_cache,
)
from featcache.dataset import remote
from featcache.errors import (
    BadImagesError,
    CacheError,
    SettingsError,
    StaleCacheError,
    UnfinishedError,
)
from featcache.progress import Progress
from featcache.shards import Shard, is_one_of_several, parse_shard
from featcache.stages import share
from featcache.stages.extract import extract_features
from featcache.stages.merge import merge_shards
from featcache.stages.share import ShardExtraction, extract_shard

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "eager", "workers": 0, "batch_size": 4}


def run_share(data: Path | str, output: Path, shard: str, **settings: Any) -> ShardExtraction:
    return extract_shard(data, output, shard=shard, **{**TINY, **settings})


def content(path: Path) -> str:
    return open_cache(path).content_sha256


# --- which share ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(1, 40))
def test_every_sample_is_in_exactly_one_share(n: int, count: int) -> None:
    shares = [Shard(number, count).list_rows(n).tolist() for number in range(1, count + 1)]
    assert sorted(row for share in shares for row in share) == list(range(n))
    assert all(share == sorted(share) for share in shares)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= max(n // (16 * count), 1)  # a piece


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, "1/4"),
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0"}, "4/4"),
        (
            dict(
                zip(
                    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT"),
                    ("0", "0", "15", "16"),
                    strict=True,
                )
            ),
            "1/16",
        ),
        (
            dict(
                zip(
                    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT"),
                    ("16", "1", "16", "16"),
                    strict=True,
                )
            ),
            "16/16",
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": "12",
                "SLURM_ARRAY_TASK_STEP": "4",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            "3/4",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, "6/8"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}, "2/2"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            "4/4",
        ),
    ],
    ids=[
        "torchrun",
        "torchrun in SLURM",
        "array from 0",
        "array from 1",
        "array by 4",
        "step",
        "step of its own",
        "array of steps",
    ],
)
def test_auto_is_what_started_the_process(environment: dict[str, str], expected: str) -> None:
    assert str(parse_shard("auto", environment)) == expected


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("auto/16", {"JOB_COMPLETION_INDEX": "3"}, "4/16"),
        ("auto/16", {"SLURM_ARRAY_TASK_ID": "16"}, "1/16"),
        ("auto/16", {"RANK": "2"}, "3/16"),
        ("0/16", {}, "16/16"),
        ("16/16", {}, "16/16"),
        ("1/1", {}, "1/1"),
    ],
)
def test_a_share_may_be_stated(text: str, environment: dict[str, str], expected: str) -> None:
    assert str(parse_shard(text, environment)) == expected


def test_a_count_from_0_and_one_from_1_reach_every_share() -> None:
    for first in (0, 1, 7):
        shares = {parse_shard("auto/16", {"SLURM_ARRAY_TASK_ID": str(first + i)}) for i in range(16)}
        assert len(shares) == 16


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("17/16", {}, "expected a number from 1 to 16"),
        ("3/0", {}, "expected 1 to 100,000 shards"),
        ("3", {}, "expected such as 3/16"),
        ("-1/4", {}, "expected such as 3/16"),
        ("auto", {}, "finds neither RANK"),
        ("auto/4", {}, "finds none of RANK"),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "state it, such as auto/16"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "finds neither"),  # a batch script runs once
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "7",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            "not in a row",
        ),
    ],
)
def test_what_names_no_share_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_shard(text, environment)


def test_only_torchrun_shares_work_unasked() -> None:
    assert is_one_of_several({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_one_of_several({"RANK": "0", "WORLD_SIZE": "1"})
    assert not is_one_of_several({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"})


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"views": 2, "test_views": 1}, {"store": "float16"}], ids=str)
@pytest.mark.parametrize("layout", ["photos", "flat_photos"])
def test_shares_in_any_order_give_the_file_of_one_run(
    layout: str, settings: dict[str, Any], tmp_path: Path, tiny: type[TinyFamily], request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(layout)
    whole, shared = tmp_path / "whole.h5", tmp_path / "shared.h5"
    extract_features(data, whole, **TINY, **settings)
    order = [f"{number}/5" for number in range(1, 6)]
    random.Random(3).shuffle(order)
    done = [run_share(data, shared, shard, **settings) for shard in order]
    assert content(shared) == content(whole)
    one, other = read_cache(whole), read_cache(shared)
    for name, split in one.splits.items():
        assert split.features.tobytes() == other.splits[name].features.tobytes()
        assert (split.views is None) == (other.splits[name].views is None)
        assert split.views is None or split.views.tobytes() == other.splits[name].views.tobytes()
        assert list(split.listing.paths) == list(other.splits[name].listing.paths)
    assert [one.extraction is None for one in done] == [True] * 4 + [False]
    assert [len(one.unfinished) for one in done] == [4, 3, 2, 1, 0]
    assert sum(one.computed for one in done) == sum(one.rows for one in done) == len(other) + other.n_views
    assert not parts_path(shared).exists()
    assert not list(tmp_path.glob("shared.h5.*"))


def test_more_shares_than_images_are_fine(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    whole, shared = tmp_path / "whole.h5", tmp_path / "shared.h5"
    extract_features(photos, whole, **TINY)
    for number in range(40):
        run_share(photos, shared, f"{number}/40")
    assert content(shared) == content(whole)


def test_a_share_that_runs_again_computes_nothing(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    first = run_share(photos, tmp_path / "f.h5", "1/2")
    again = run_share(photos, tmp_path / "f.h5", "1/2")
    assert (first.computed, again.computed, again.rows) == (first.rows, 0, first.rows)
    assert again.unfinished == (2,)


def test_shares_of_another_count_go_on_with_what_is_there(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    half = run_share(photos, tmp_path / "f.h5", "1/2")
    rest = [run_share(photos, tmp_path / "f.h5", f"{number}/3") for number in (1, 2, 3)]
    assert half.computed + sum(one.computed for one in rest) == 18
    assert len(open_cache(tmp_path / "f.h5")) == 18


def test_a_plain_extraction_goes_on_with_what_shares_left(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    half = run_share(photos, tmp_path / "f.h5", "1/2")
    whole = extract_features(photos, tmp_path / "f.h5", **TINY)
    assert whole.computed == 18 - half.computed
    assert not parts_path(tmp_path / "f.h5").exists()


def test_new_images_alone_are_computed_by_shares_into_a_finished_file(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    extract_features(photos, output, **TINY)
    fill_class(photos / "train" / "green", COLOURS["green"], 3, seed=9000)
    fill_class(photos / "val" / "green", COLOURS["green"], 2, seed=9100)
    done = [run_share(photos, output, f"{number}/3") for number in (3, 1, 2)]
    assert sum(one.computed for one in done) == 5
    assert len(open_cache(output)) == 23
    extract_features(photos, tmp_path / "whole.h5", **TINY)
    assert content(output) == content(tmp_path / "whole.h5")


def test_merge_says_which_shares_have_not_finished(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for number in (1, 4):
        run_share(photos, tmp_path / "f.h5", f"{number}/4")
    with pytest.raises(UnfinishedError, match=r"images of 18 have no row yet, such as .*: of 4 shards 2, 3 have not"):
        merge_shards(tmp_path / "f.h5")
    assert not (tmp_path / "f.h5").exists()
    assert len(list_done(tmp_path / "f.h5", list_jobs(tmp_path / "f.h5")[0].key)) == 2


def test_merge_twice_is_as_good_as_once(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    last = [run_share(photos, tmp_path / "f.h5", f"{number}/2") for number in (1, 2)][-1]
    before = (tmp_path / "f.h5").read_bytes()
    again = merge_shards(tmp_path / "f.h5")
    assert last.extraction
    assert again.cache.content_sha256 == last.extraction.cache.content_sha256
    assert (tmp_path / "f.h5").read_bytes() == before


def test_a_copy_of_a_share_that_ends_after_the_merge_leaves_nothing(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, original = tmp_path / "f.h5", share.finish_order

    def be_overtaken(*arguments: Any, **how: Any) -> None:
        monkeypatch.setattr(share, "finish_order", original)
        faster = run_share(photos, output, "2/2")
        assert faster.extraction
        original(*arguments, **how)

    run_share(photos, output, "1/2")
    monkeypatch.setattr(share, "finish_order", be_overtaken)
    slower = run_share(photos, output, "2/2")
    assert slower.computed == slower.rows == 9
    assert slower.extraction
    assert not parts_path(output).exists()
    assert [path.name for path in tmp_path.glob("f.h5*")] == ["f.h5"]


def test_an_interrupt_does_not_wait_for_what_is_read_ahead(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "PIECE_IMAGES", 4)
    read, begun = share.read_piece, []

    def read_slowly(order: Any, samples: Any, progress: Progress) -> Any:
        begun.append(samples)
        if len(begun) > 1:
            for _ in progress.track(range(10_000), total=None, what="reading"):
                time.sleep(0.01)
        return read(order, samples, progress)

    def interrupt(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(share, "read_piece", read_slowly)
    monkeypatch.setattr("featcache.stages.compute.RowKeeper.take", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_share(photos, tmp_path / "f.h5", "1/1")
    assert len(begun) == 2
    assert time.monotonic() - started < 50  # it would have read for 100 s


def test_nothing_to_merge_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nothing to merge"):
        merge_shards(tmp_path / "f.h5")


def test_an_image_that_changed_after_its_share_read_it_has_no_row(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    run_share(photos, tmp_path / "f.h5", "1/2")
    victim = photos / "train" / "blue" / "photo_000.jpg"  # the first image, of the first share
    victim.write_bytes((photos / "val" / "red" / "photo_000.jpg").read_bytes() + b" ")
    with pytest.raises(UnfinishedError, match=victim.name):
        run_share(photos, tmp_path / "f.h5", "2/2")
    run_share(photos, tmp_path / "f.h5", "1/2")
    extract_features(photos, tmp_path / "whole.h5", **TINY)
    assert content(tmp_path / "f.h5") == content(tmp_path / "whole.h5")


def test_a_bad_image_is_named_by_its_share_and_by_the_merge(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    bad = photos / "train" / "red" / "photo_002.jpg"
    bad.write_bytes(b"no image")
    theirs = next(number for number in (1, 2, 3) if 8 in Shard(number, 3).list_rows(18))  # it is the ninth image
    for number in {1, 2, 3} - {theirs}:
        run_share(photos, tmp_path / "f.h5", f"{number}/3")
    with pytest.raises(BadImagesError, match=r"photo_002\.jpg: not an image"):
        run_share(photos, tmp_path / "f.h5", f"{theirs}/3")
    key = list_jobs(tmp_path / "f.h5")[0].key
    assert list(read_bad(tmp_path / "f.h5", key).values()) == ["not an image of a known format"]
    with pytest.raises(BadImagesError, match=r"photo_002\.jpg: not an image"):
        merge_shards(tmp_path / "f.h5")
    merged = merge_shards(tmp_path / "f.h5", skip_bad=True)
    assert [path for path, _ in merged.bad] == ["train/red/photo_002.jpg"]
    extract_features(photos, tmp_path / "whole.h5", skip_bad=True, **TINY)
    assert content(tmp_path / "f.h5") == content(tmp_path / "whole.h5")


def test_a_share_of_another_extractor_is_refused(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    run_share(photos, tmp_path / "f.h5", "1/2")
    with pytest.raises(StaleCacheError, match=r"extract something else .*precision\.stored: float32 -> float16"):
        run_share(photos, tmp_path / "f.h5", "2/2", store="float16")


@pytest.mark.parametrize("settings", [{"views": 2}, {"seed": 5}, {"val_fraction": 0.5}], ids=str)
def test_shares_of_other_settings_are_refused_and_forced_ones_begin_anew(
    settings: dict[str, Any], flat_photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output, name = tmp_path / "f.h5", next(iter(settings))
    run_share(flat_photos, output, "1/2", **settings)
    with pytest.raises(StaleCacheError, match=f"extract something else .*{name}"):
        run_share(flat_photos, output, "1/2")
    assert run_share(flat_photos, output, "1/2", force=True).unfinished == (2,)
    assert run_share(flat_photos, output, "2/2").extraction
    whole = extract_features(flat_photos, tmp_path / "whole.h5", **TINY)
    assert content(output) == whole.cache.content_sha256
    assert not open_cache(output).views


def test_shares_take_rows_of_another_cache_and_so_does_the_merge(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract_features(photos, tmp_path / "whole.h5", **TINY)
    fill_class(photos / "train" / "red", COLOURS["red"], 8, seed=100)  # two more
    monkeypatch.chdir(tmp_path)
    done = [run_share(photos, tmp_path / "f.h5", f"{n}/3", reuse=("whole.h5",)) for n in (1, 2, 3)]
    assert sum(one.computed for one in done) == len(open_cache(tmp_path / "f.h5")) - len(whole.cache) == 2
    assert content(tmp_path / "f.h5") == extract_features(photos, tmp_path / "all.h5", **TINY).cache.content_sha256


def test_damage_in_the_cache_that_is_there_is_mended_by_shares_that_rehash(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    before = extract_features(photos, output, **TINY).cache
    data = bytearray(output.read_bytes())
    at = data.find(before.splits["train"].features[:].tobytes())
    data[at + 5] ^= 1
    output.write_bytes(data)
    fill_class(photos / "train" / "red", COLOURS["red"], 8, seed=100)  # two more
    for number in (1, 2):
        run_share(photos, output, f"{number}/2")
    with pytest.raises(UnfinishedError, match="run the shards again, with --rehash"):
        merge_shards(output)
    assert sum(run_share(photos, output, f"{number}/2", rehash=True).computed for number in (1, 2)) == 12
    assert content(output) == extract_features(photos, tmp_path / "all.h5", **TINY).cache.content_sha256


def test_a_finished_share_that_runs_again_leaves_nothing_and_says_that_all_have_finished(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    for number in (1, 2, 3):
        run_share(photos, output, f"{number}/3")
    again = run_share(photos, output, "1/3")
    assert (again.computed, again.unfinished) == (0, ())
    assert not parts_path(output).exists()


def test_shares_in_int8_are_cut_alike_whoever_calibrates(
    flat_photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    pytest.importorskip("onnxruntime")
    int8 = {**TINY, "precision": "int8", "runtime": "onnx", "workers": None}
    done = [extract_shard(flat_photos, tmp_path / "f.h5", shard=f"{number}/3", **int8) for number in (2, 1, 3)]
    assert sum(one.computed for one in done) == 60
    assert done[-1].extraction
    whole = extract_features(flat_photos, tmp_path / "whole.h5", **int8)
    assert content(tmp_path / "f.h5") == whole.cache.content_sha256


def test_two_data_sets_in_one_place_are_told_of(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    output, other = tmp_path / "f.h5", tmp_path / "other"
    shutil.copytree(photos, other)
    fill_class(other / "train" / "red", COLOURS["red"], 8, seed=100)
    run_share(photos, output, "1/2")
    run_share(other, output, "1/2")
    with pytest.raises(
        CacheError, match=r"shards saw the data in .*other and in .*photos; say which it is with --data"
    ):
        merge_shards(output)
    run_share(other, output, "2/2")
    assert len(open_cache(output)) == 20


def test_a_copy_that_is_overtaken_between_two_pieces_goes_on(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.cache.parts.LEFT_ROWS", 1)  # digests of parts are left in their files
    monkeypatch.setattr(share, "PIECE_IMAGES", 3)
    output, original, pieces = tmp_path / "f.h5", share.read_piece, []
    run_share(photos, output, "1/2")

    def be_overtaken(*arguments: Any) -> Any:
        pieces.append(arguments)
        if len(pieces) == 2:
            monkeypatch.setattr(share, "read_piece", original)
            assert run_share(photos, output, "2/2").extraction
        return original(*arguments)

    monkeypatch.setattr(share, "read_piece", be_overtaken)
    slower = run_share(photos, output, "2/2")
    assert slower.extraction
    assert not parts_path(output).exists()


def test_what_a_stranger_wrote_of_a_job_is_refused_in_one_line(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    run_share(photos, output, "1/2")
    real = list_jobs(output)[0]
    strange = [
        replace(real, extractor={}),
        replace(real, extractor={**real.extractor, "precision": []}),
        replace(real, extractor={**real.extractor, "dim": "x"}),
        replace(real, settings={**real.settings, "seed": "x"}),
        replace(real, settings={**real.settings, "val_fraction": "0.1"}),
    ]
    for job in strange:
        for path in parts_path(output).glob("job-*"):
            path.unlink()
        keep_job(output, job)
        with pytest.raises(CacheError) as caught:
            merge_shards(output)
        assert "remove it" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_note_of_bad_images_that_is_not_what_its_name_says_is_ignored(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    run_share(photos, output, "1/2")
    key = list_jobs(output)[0].key
    keep_bad(output, key, {"ab" * 32: "no image"})
    assert read_bad(output, key) == {"ab" * 32: "no image"}
    note = next(parts_path(output).glob("bad-*"))
    note.write_text(json.dumps({"cd" * 32: "no image"}))
    assert read_bad(output, key) == {}


def test_the_data_may_lie_elsewhere_where_the_file_is_put_together(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    run_share(photos, output, "1/2")
    with pytest.raises(UnfinishedError):
        merge_shards(output)
    moved = tmp_path / "elsewhere"
    shutil.move(photos, moved)
    run_share(moved, output, "2/2")
    assert len(open_cache(output)) == 18


def test_what_shards_tell_each_other_is_json_that_cannot_be_mistaken(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    run_share(photos, output, "1/2")
    job = next(parts_path(output).glob("job-*.json"))
    value = json.loads(job.read_text())
    assert value["settings"]["backbone"] == "tiny"
    value["settings"]["seed"] = 7
    job.write_text(json.dumps(value))
    with pytest.raises(CacheError, match="is damaged: it is not what its name says"):
        merge_shards(output)


def test_parts_of_shares_are_whole_and_hold_each_row_once(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    output = tmp_path / "f.h5"
    for number in (1, 2):
        run_share(photos, output, f"{number}/3")
    parts, damaged = list_parts(output, "rows", list_jobs(output)[0].key)
    assert not damaged
    assert sum(map(len, parts)) == 12


# --- the command line -------------------------------------------------------------------------------------------------

OPTIONS = ("--backbone", "tiny", "--weights", "none", "--runtime", "eager", "--workers", "0", "--batch-size", "4")


def test_the_commands_say_what_was_done_and_what_is_left(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], cli: Callable[..., Outcome]
) -> None:
    first = cli("extract", photos, "-o", tmp_path / "f.h5", "--shard", "2/2", *OPTIONS)
    assert first.code == 0
    assert "shard 2/2, 9 rows, 9 computed" in first.out
    assert "1 of 2 shards have finished" in first.out
    assert "shard 2/2: 9 images" in first.err
    early = cli("merge", tmp_path / "f.h5")
    assert early.code == 1
    assert "of 2 shards 1 has not come to the end; run `featcache extract DATA --shard 1/2" in early.err
    last = cli("extract", photos, "-o", tmp_path / "f.h5", "--shard", "1/2", "--json", *OPTIONS)
    assert last.code == 0
    assert last.json["shard"] == [1, 2]
    assert (last.json["rows"], last.json["computed"], last.json["unfinished"]) == (9, 9, [])
    assert last.json["merged"]["rows"] == 18
    again = cli("merge", tmp_path / "f.h5", "--json")
    assert (again.code, again.json["rows"], again.json["computed"]) == (0, 18, 0)


def test_images_left_out_of_a_share_are_named_and_the_exit_code_says_so(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], cli: Callable[..., Outcome]
) -> None:
    (photos / "train" / "red" / "photo_002.jpg").write_bytes(b"no image")
    command = ["extract", photos, "-o", tmp_path / "f.h5", "--skip-bad", *OPTIONS]
    codes = {number: cli(*command, "--shard", f"{number}/3").code for number in (1, 2, 3)}
    theirs = next(number for number in (1, 2, 3) if 8 in Shard(number, 3).list_rows(18))
    assert codes[theirs] == 3
    assert codes[3] == 3  # it put the whole together
    assert cli("merge", tmp_path / "f.h5", "--skip-bad").code == 0  # there is nothing left to be done
    assert len(open_cache(tmp_path / "f.h5")) == 17


def test_processes_of_torchrun_share_the_work_unasked(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli("extract", photos, "-o", tmp_path / "f.h5", *OPTIONS).code == 0
    assert len(open_cache(tmp_path / "f.h5")) == 18


def test_a_share_that_nobody_names_is_a_usage_mistake(
    photos: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    outcome = cli("extract", photos, "-o", tmp_path / "f.h5", "--shard", "17/16")
    assert outcome.code == 2
    assert "expected a number from 1 to 16" in outcome.err


def test_the_leftovers_of_shares_are_listed_and_pruned(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], cli: Callable[..., Outcome]
) -> None:
    cli("extract", photos, "-o", tmp_path / "f.h5", "--shard", "2/2", *OPTIONS)
    listed = cli("cache", "ls", tmp_path, "--json").json
    assert [(item["kind"], Path(item["path"]).name) for item in listed] == [("parts", "f.h5.parts")]
    assert cli("cache", "prune", tmp_path / "f.h5", "--yes").code == 0
    assert not parts_path(tmp_path / "f.h5").exists()


def test_a_share_fetches_each_of_its_images_once(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch, s3: Store
) -> None:
    url, fetched, read = upload(photos, f"{s3.url}/photos"), list[str](), remote.read_url
    monkeypatch.setattr(remote, "read_url", lambda *arguments: fetched.append(arguments[0]) or read(*arguments))
    run_share(url, tmp_path / "f.h5", "1/2")
    assert len(fetched) == len(set(fetched)) == 9
    run_share(url, tmp_path / "f.h5", "2/2")
    assert len(fetched) == len(set(fetched)) == 18
    whole = extract_features(photos, tmp_path / "whole.h5", **TINY)
    assert open_cache(tmp_path / "f.h5").content_sha256 == whole.cache.content_sha256
