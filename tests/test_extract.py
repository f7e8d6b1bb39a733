"""featcache.stages.extract: stage 1, seen from outside."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import COLOURS, TinyFamily, draw_photo

import featcache
from featcache.cache import hash_extractor, list_parts, parts_path, write_cache
from featcache.errors import BadImagesError, CacheError, OutputError, StaleCacheError
from featcache.metering import Spent
from featcache.progress import Progress
from featcache.stages.feature_extractor import FeatureExtractor

TINY = {"backbone": "tiny", "weights": "none"}


class Listener(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def features_by_path(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {
            name.decode(): row.tobytes()
            for split in ("train", "val")
            for name, row in zip(file[f"{split}/paths"][:], file[f"{split}/features"][:], strict=True)
        }


def test_every_image_becomes_one_row_in_its_split(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert (len(extraction.cache), extraction.computed, extraction.reused) == (18, 18, 0)
    assert extraction.cache.splits["train"].features.shape == (12, 8)
    assert extraction.cache.splits["val"].listing.paths[0] == "val/blue/photo_000.jpg"
    assert extraction.cache.splits["val"].listing.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_second_run_on_unchanged_data_makes_no_forward_pass(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    tiny.calls, before = 0, (tmp_path / "f.h5").stat().st_mtime_ns
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert (tiny.calls, extraction.computed, extraction.reused) == (0, 0, 18)
    assert (tmp_path / "f.h5").stat().st_mtime_ns == before


def test_moving_renaming_and_relabelling_make_no_forward_pass(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    moved = photos.rename(tmp_path / "elsewhere")
    (moved / "train/blue/photo_000.jpg").rename(moved / "train/blue/zebra.jpg")
    (moved / "train/red/photo_001.jpg").rename(moved / "val/blue/moved.jpg")
    tiny.calls = 0
    extraction = featcache.extract_features(moved, tmp_path / "f.h5", **TINY)
    assert (tiny.calls, extraction.computed) == (0, 0)
    assert "val/blue/moved.jpg" in extraction.cache.splits["val"].listing.paths


def test_one_changed_image_costs_one_forward_pass(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    before = features_by_path(tmp_path / "f.h5")
    draw_photo((200, 200, 20), 99).save(photos / "train/red/photo_002.jpg")
    assert featcache.extract_features(photos, tmp_path / "f.h5", **TINY).computed == 1
    after = features_by_path(tmp_path / "f.h5")
    assert [path for path in before if before[path] != after[path]] == ["train/red/photo_002.jpg"]


def test_the_same_bytes_twice_are_computed_once(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    shutil.copy(photos / "train/red/photo_002.jpg", photos / "train/red/copy.jpg")
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert (len(extraction.cache), extraction.computed) == (19, 18)


def test_the_same_bytes_in_train_and_val_are_said_loudly(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    shutil.copy(photos / "train/red/photo_002.jpg", photos / "val/red/copy.jpg")
    listener = Listener()
    featcache.extract_features(photos, tmp_path / "f.h5", progress=listener, **TINY)
    assert any("leakage" in line and "val/red/copy.jpg" in line for line in listener.lines)


@pytest.mark.parametrize("runtime", ["eager", "fused"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_rows_do_not_depend_on_how_they_are_computed(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], runtime: str, workers: int, batch_size: int
) -> None:
    reference = featcache.extract_features(photos, tmp_path / "a.h5", runtime="eager", **TINY)
    other = featcache.extract_features(
        photos, tmp_path / "b.h5", runtime=runtime, workers=workers, batch_size=batch_size, **TINY
    )
    for name, split in reference.cache.splits.items():
        np.testing.assert_allclose(other.cache.splits[name].features, split.features, rtol=1e-4, atol=1e-6)


def test_other_weights_are_refused_with_what_differs(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    content = (tmp_path / "f.h5").read_bytes()
    differs = r"weights: random, seed 0 \[\w{8}\.\.\.\] -> random, seed 1 \[\w{8}\.\.\.\].*--force"
    with pytest.raises(StaleCacheError, match=differs):
        featcache.extract_features(photos, tmp_path / "f.h5", seed=1, **TINY)
    assert (tmp_path / "f.h5").read_bytes() == content


def test_another_backbone_is_refused_before_its_weights_are_looked_for(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    with pytest.raises(StaleCacheError, match=r"\(backbone: tiny -> resnet18\); go on with --backbone tiny"):
        featcache.extract_features(photos, tmp_path / "f.h5", backbone="resnet18", weights="nowhere.pth")


def test_force_replaces_a_cache_of_another_extractor(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert featcache.extract_features(photos, tmp_path / "f.h5", seed=1, force=True, **TINY).computed == 18


def test_a_file_that_is_no_cache_is_never_overwritten(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (tmp_path / "f.h5").write_text("my thesis")
    with pytest.raises(CacheError, match="cannot be read as a feature cache"):
        featcache.extract_features(photos, tmp_path / "f.h5", force=True, **TINY)
    assert (tmp_path / "f.h5").read_text() == "my thesis"


def test_a_bad_image_stops_nothing_and_its_mending_costs_one_pass(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    bad = photos / "train/blue/photo_003.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    with pytest.raises(BadImagesError, match=r"train/blue/photo_003.jpg: damaged image"):
        featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert not (tmp_path / "f.h5").exists()
    bad.write_bytes(good)
    assert featcache.extract_features(photos, tmp_path / "f.h5", **TINY).computed == 1
    assert [path.name for path in tmp_path.glob("f.h5*")] == ["f.h5"]


def test_skip_bad_leaves_out_and_records_it(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (photos / "val/red/photo_001.jpg").write_text("not an image")
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", skip_bad=True, **TINY)
    assert [path for path, _ in extraction.bad] == ["val/red/photo_001.jpg"]
    cache = featcache.read_cache(tmp_path / "f.h5")
    assert cache.splits["val"].listing.paths == (
        "val/blue/photo_000.jpg",
        "val/blue/photo_001.jpg",
        "val/blue/photo_002.jpg",
        "val/red/photo_000.jpg",
        "val/red/photo_002.jpg",
    )
    assert cache.provenance["bad"] == [["val/red/photo_001.jpg", "not an image of a known format"]]


def test_an_interruption_keeps_what_was_computed(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(Listener):
        def track(self, items, *, total, what, unit="img", done=0):
            for n, item in enumerate(items):
                if what == "extracting" and n == 3:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        featcache.extract_features(photos, tmp_path / "f.h5", progress=Interrupting(), decoder="pillow", **TINY)
    assert not (tmp_path / "f.h5").exists()
    key = hash_extractor(featcache.load_backbone("tiny", weights="none").describe())
    spent = sum(part.spent.seconds for part in list_parts(tmp_path / "f.h5", "rows", key)[0])
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", decoder="pillow", **TINY)
    assert extraction.computed == 18 - 3 * 4
    assert extraction.cache.provenance["seconds"] > spent > 0  # what the first try cost is not forgotten
    assert extraction.cache.provenance["cpu_seconds"] > 0


def test_cpu_seconds_of_a_cache_are_those_of_all_that_made_it(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    output = tmp_path / "f.h5"
    FeatureExtractor("tiny", weights="none", decoder="pillow", cache=output).transform(list(photos.rglob("*.jpg"))[:4])
    parts = list_parts(output, "rows", hash_extractor(featcache.load_backbone("tiny", weights="none").describe()))[0]
    kept = sum(part.spent.cpu_seconds for part in parts)
    first = featcache.extract_features(photos, output, decoder="pillow", **TINY).cache.provenance
    assert first["cpu_seconds"] > kept > 0
    assert featcache.extract_features(photos, output, decoder="pillow", **TINY).cache.provenance == first
    draw_photo(COLOURS["red"], 77).save(photos / "val/red/new.jpg")
    second = featcache.extract_features(photos, output, decoder="pillow", **TINY).cache.provenance
    assert second["cpu_seconds"] > first["cpu_seconds"]
    assert second["seconds"] > first["seconds"]
    cache = featcache.read_cache(output)
    old = {name: value for name, value in second.items() if name not in ("cpu_seconds", "energy_joules")}
    write_cache(output, replace(cache, provenance=old))
    draw_photo(COLOURS["red"], 78).save(photos / "val/red/newer.jpg")
    third = featcache.extract_features(photos, output, decoder="pillow", **TINY).cache.provenance
    assert third["seconds"] > second["seconds"]
    assert (third["cpu_seconds"], third["energy_joules"]) == (None, None)  # of most rows nobody knows


def test_a_part_that_did_not_count_cpu_seconds_is_taken(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "f.h5"
    with monkeypatch.context() as patch:
        patch.setattr(Spent, "to_json", lambda spent: {"seconds": spent.seconds})  # as it was written before
        FeatureExtractor("tiny", weights="none", decoder="pillow", cache=output).transform(
            list(photos.rglob("*.jpg"))[:4]
        )
    extraction = featcache.extract_features(photos, output, decoder="pillow", **TINY)
    assert extraction.computed == 14
    assert extraction.cache.provenance["seconds"] > 0
    assert extraction.cache.provenance["cpu_seconds"] is None


def test_an_image_that_changes_while_it_is_worked_on_is_a_bad_one(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    class Meddling(Listener):
        def say(self, line: str) -> None:
            if "to compute" in line:
                draw_photo(COLOURS["green"], 7).save(photos / "train/blue/photo_003.jpg")

    with pytest.raises(BadImagesError, match=r"photo_003.jpg: changed while"):
        featcache.extract_features(photos, tmp_path / "f.h5", progress=Meddling(), **TINY)


def test_images_that_change_behind_its_back_are_told_of(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.dataset.hashing.RACY_NS", -(10**18))  # files this young prove something

    class Meddling(Listener):
        def track(self, items, *, total, what, unit="img", done=0):
            yield from items
            if what == "extracting":
                draw_photo(COLOURS["green"], 7).save(photos / "train/blue/photo_003.jpg")

    listener = Meddling()
    first = featcache.extract_features(photos, tmp_path / "f.h5", progress=listener, **TINY)
    assert first.computed == 18
    assert listener.lines[-1].startswith("WARNING: 1 images changed meanwhile, such as train/blue/photo_003.jpg")
    assert featcache.extract_features(photos, tmp_path / "f.h5", **TINY).computed == 1


def test_features_that_are_not_numbers_are_never_stored(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from conftest import TinyNetwork

    def forward(self: TinyNetwork, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)).repeat(1, 3)[:, :8].log()  # of negative means: NaN

    monkeypatch.setattr(TinyNetwork, "forward", forward)
    with pytest.raises(BadImagesError, match="not finite numbers"):
        featcache.extract_features(photos, tmp_path / "f.h5", runtime="eager", **TINY)


def test_a_cache_among_the_images_goes_on_too(
    flat_photos: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = flat_photos / "red/photo_003.jpg"
    good = bad.read_bytes()
    bad.write_text("not an image")
    with pytest.raises(BadImagesError):
        featcache.extract_features(flat_photos, flat_photos / "f.h5", **TINY)
    assert parts_path(flat_photos / "f.h5").is_dir()
    bad.write_bytes(good)
    extraction = featcache.extract_features(flat_photos, flat_photos / "f.h5", **TINY)
    assert (extraction.computed, extraction.cache.classes) == (1, ("blue", "green", "red"))


def test_a_flat_folder_is_split_and_keeps_its_split_when_it_grows(
    flat_photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    first = featcache.extract_features(flat_photos, tmp_path / "f.h5", **TINY)
    for i in range(10):
        draw_photo(COLOURS["red"], 900 + i).save(flat_photos / f"red/new_{i}.jpg")
    second = featcache.extract_features(flat_photos, tmp_path / "f.h5", **TINY)
    assert second.computed == 10
    for name, split in first.cache.splits.items():
        assert set(split.listing.paths) <= set(second.cache.splits[name].listing.paths)


@pytest.mark.parametrize("output", ["photos", "file/f.h5"])
def test_an_output_that_cannot_be_written_fails_before_any_work(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], output: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        featcache.extract_features(photos, tmp_path / output, **TINY)
    assert tiny.calls == 0


def test_features_too_large_for_float16_are_named_with_the_cure(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import TinyNetwork

    monkeypatch.setattr(TinyNetwork, "forward", lambda self, images: images.mean((2, 3)).repeat(1, 3)[:, :8] * 1e6)
    with pytest.raises(BadImagesError, match="too large for float16; use --store float32"):
        featcache.extract_features(photos, tmp_path / "f.h5", runtime="eager", store="float16", **TINY)
    assert featcache.extract_features(photos, tmp_path / "f.h5", runtime="eager", **TINY).computed == 18


def test_half_precision_halves_the_features_and_is_read_as_float32(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    whole = featcache.extract_features(photos, tmp_path / "a.h5", **TINY).cache
    half = featcache.extract_features(photos, tmp_path / "b.h5", store="float16", **TINY).cache
    stored, read = half.splits["train"].features, featcache.read_cache(tmp_path / "b.h5").splits["train"].features
    assert (stored.dtype, read.dtype) == (np.float16, np.float32)
    assert np.array_equal(stored, whole.splits["train"].features.astype(np.float16))
    assert np.array_equal(read, stored.astype(np.float32))


def test_a_split_test_folder_becomes_rows_too(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    shutil.copytree(photos / "val", photos / "test")
    cache = featcache.extract_features(photos, tmp_path / "f.h5", **TINY).cache
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 12, "val": 6, "test": 6}


# What is somebody else's stays; what lies in the way is named


def test_nothing_is_deleted_that_is_not_its_own(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    parts = tmp_path / "f.h5.parts"
    parts.mkdir()
    precious = [tmp_path / ".f.h5.mine.tmp", parts / "files-2020.h5", parts / ".notes.tmp", parts / "rows-1.h5"]
    for path in precious:
        path.write_text("precious")
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert all(path.read_text() == "precious" for path in precious)


def test_a_link_where_parts_go_is_not_followed(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "f.h5.parts").symlink_to("mine")
    with pytest.raises(OutputError, match=r"f\.h5\.parts is there and no folder of featcache's"):
        featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert tiny.calls == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_pipes_links_and_giants_among_the_parts_are_left_alone(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    parts = tmp_path / "f.h5.parts"
    parts.mkdir()
    os.mkfifo(parts / f"files-{'0' * 32}.h5")
    (parts / f"files-{'1' * 32}.h5").symlink_to("/dev/zero")
    with (parts / f"files-{'2' * 32}.h5").open("wb") as file:
        file.truncate(1 << 42)
    assert featcache.extract_features(photos, tmp_path / "f.h5", **TINY).computed == 18
    assert len(list(parts.iterdir())) == 3


def test_an_output_that_is_a_link_stays_one(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "f.h5").symlink_to("store/real.h5")
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert (tmp_path / "f.h5").is_symlink()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["real.h5"]
    assert featcache.extract_features(photos, tmp_path / "f.h5", **TINY).computed == 0


@pytest.mark.skipif(os.name != "posix", reason="sets who may read")
def test_who_may_read_a_cache_stays_as_it_was(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    (tmp_path / "f.h5").chmod(0o600)
    draw_photo((200, 200, 20), 99).save(photos / "train/red/photo_002.jpg")
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert (tmp_path / "f.h5").stat().st_mode & 0o777 == 0o600


def test_a_damaged_or_older_cache_is_replaced_by_force_only(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file["train/labels"][3] ^= 1
    for schema in (None, 1):
        if schema:
            with h5py.File(tmp_path / "f.h5", "r+") as file:
                file.attrs["featcache_schema"] = schema
        with pytest.raises(CacheError, match="extract again with --force"):
            featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    assert featcache.extract_features(photos, tmp_path / "f.h5", force=True, **TINY).computed == 18


def test_rows_too_large_for_float16_are_named_as_if_they_were_new(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import TinyNetwork

    monkeypatch.setattr(TinyNetwork, "forward", lambda self, images: images.mean((2, 3)).repeat(1, 3)[:, :8] * 1e6)
    featcache.extract_features(photos, tmp_path / "f32.h5", runtime="eager", **TINY)
    with pytest.raises(BadImagesError, match="too large for float16"):
        featcache.extract_features(
            photos, tmp_path / "f16.h5", runtime="eager", store="float16", reuse=(str(tmp_path / "f32.h5"),), **TINY
        )


def test_a_name_that_leaves_no_room_for_what_is_appended_fails_before_any_work(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    for n in (247, 251):
        with pytest.raises(OutputError, match="choose another name with -o"):
            featcache.extract_features(photos, tmp_path / ("x" * n + ".h5"), **TINY)
    assert (tiny.calls, list(tmp_path.glob("*x*"))) == (0, [])


def test_a_folder_of_parts_is_no_class_whatever_is_in_it(flat_photos: Path, tiny: type[TinyFamily]) -> None:
    for name in ("", "notes.txt"):
        (flat_photos / "f.h5.parts").mkdir(exist_ok=True)
        if name:
            (flat_photos / "f.h5.parts" / name).write_text("mine")
        assert featcache.extract_features(flat_photos, flat_photos / "f.h5", **TINY).cache.classes[0] == "blue"
