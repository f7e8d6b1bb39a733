"""An index: several caches read as one, row for row, by everything that reads a cache."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import COLOURS, Outcome, Store, fill_class
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featcache
from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    JoinedRows,
    index_caches,
    is_feature_cache,
    list_items,
    open_cache,
    open_readers,
    read_cache,
    stream_cache,
    verify_cache,
    write_cache,
)
from featcache.cache.joining import JoinedTexts
from featcache.cache.streaming import StreamedFeatures
from featcache.dataset import Split, describe_data, find_common_folder
from featcache.dataset.texts import pack_texts
from featcache.errors import CacheError, FeatcacheError, OutputError, SettingsError
from featcache.stages.train_head import train_head
from featcache.views import Views

CLI = Callable[..., Outcome]
EXTRACTOR: dict[str, Any] = {
    "backbone": "tiny",
    "weights": {"requested": "DEFAULT", "name": "tiny.pth", "file_sha256": "f" * 64, "tensors_sha256": "a" * 64},
    "layer": "input of fc",
    "dim": 6,
    "preprocessing": {
        "resize": 20,
        "crop": 16,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "decoding": "pillow",
    },
    "precision": {"compute": "float32", "stored": "float16"},
}
ORIGIN: dict[str, Any] = {
    "data": "/photos",
    "settings": {"backbone": "tiny", "weights": "none", "val_fraction": 0.2, "seed": 0},
    "seconds": 1.5,
    "cpu_seconds": 2.0,
    "energy_joules": None,
    "peak_memory_bytes": 1000,
    "device": "cpu",
    "runtime": "eager",
    "environment": {},
    "bad": [],
}
TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "eager", "workers": 0}


def make_split(n: int, seed: int, views: int = 0) -> FeatureSplit:
    random, labels = np.random.default_rng(seed), np.arange(n, dtype=np.int64) % 3
    features = random.normal(size=(n, 6)) + np.eye(3, 6)[labels] * 2
    return FeatureSplit(
        listing=Split(
            paths=tuple(f"split{seed}/a/{i}.jpg" for i in range(n)),
            labels=labels,
            digests=tuple(f"{1000 * seed + i:064x}" for i in range(n)),
        ),
        features=features.astype(np.float16),
        views=random.normal(size=(n, views, 6)).astype(np.float16) if views else None,
    )


def make_cache(n_train: int = 48, n_val: int = 21, **changes: Any) -> FeatureCache:
    values: dict[str, Any] = {
        "classes": ("blue", "green", "red"),
        "extractor": EXTRACTOR,
        "splits": {"train": make_split(n_train, 1), "val": make_split(n_val, 2)},
        "provenance": ORIGIN,
    }
    return FeatureCache(**{**values, **changes})


def cut_cache(cache: FeatureCache, cuts: dict[str, list[int]]) -> list[FeatureCache]:
    """The rows of a cache in pieces that begin at such rows of each split."""
    pieces = []
    for i in range(len(cuts["train"]) + 1):
        splits = {}
        for name, split in cache.splits.items():
            bounds = [0, *sorted(cuts[name]), len(split)]
            rows = slice(bounds[i], bounds[i + 1])
            listing = split.listing
            splits[name] = FeatureSplit(
                listing=Split(paths=listing.paths[rows], labels=listing.labels[rows], digests=listing.digests[rows]),
                features=split.features[rows],
                views=None if split.views is None else split.views[rows],
            )
        pieces.append(replace(cache, splits=splits))
    return pieces


def write_both(folder: Path, cache: FeatureCache, cuts: dict[str, list[int]]) -> tuple[Path, Path]:
    """The whole as one file, and as an index of pieces."""
    write_cache(folder / "whole.h5", cache)
    paths = []
    for i, piece in enumerate(cut_cache(cache, cuts)):
        paths.append(folder / f"piece{i}.h5")
        write_cache(paths[-1], piece)
    index_caches(folder / "all.json", paths)
    return folder / "whole.h5", folder / "all.json"


def assert_same(found: FeatureCache, expected: FeatureCache) -> None:
    assert (found.classes, found.key, found.views) == (expected.classes, expected.key, expected.views)
    assert list(found.splits) == list(expected.splits)
    assert (len(found), found.dim, found.n_views) == (len(expected), expected.dim, expected.n_views)
    for name, split in expected.splits.items():
        joined = found.splits[name]
        assert joined.listing.paths == split.listing.paths
        assert joined.listing.digests == split.listing.digests
        assert joined.listing.labels.tolist() == split.listing.labels.tolist()
        for column in ("features", "views"):
            there, wanted = getattr(joined, column), getattr(split, column)
            assert (there is None) == (wanted is None)
            if wanted is not None:
                assert (there.shape, there.dtype) == (wanted.shape, wanted.dtype)
                assert there[:].tobytes() == wanted[:].tobytes()
    assert describe_data(found.listing) == describe_data(expected.listing)


def damage(path: Path) -> None:
    """Change a byte of the first features."""
    with h5py.File(path) as file:
        offset = file["train/features"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """The same rows as one file and as an index of three."""
    return write_both(tmp_path, make_cache(), {"train": [10, 31], "val": [7, 14]})


# --- an index reads as the one cache of all rows ----------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_read_as_the_whole_wherever_it_is_cut(tmp_path: Path, data: st.DataObject) -> None:
    n_pieces, with_views = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    views = Views(train=2, seed=3) if with_views else Views()
    splits = {"train": make_split(17, 1, views.train), "val": make_split(9, 2)}
    if data.draw(st.booleans()):
        splits["test"] = make_split(5, 3)
    cache = make_cache(splits=splits, views=views)
    cuts = {
        name: data.draw(st.lists(st.integers(0, len(split)), min_size=n_pieces - 1, max_size=n_pieces - 1))
        for name, split in splits.items()
    }
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    whole, index = write_both(folder, cache, cuts)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # paths and digests stay on the disk
            patch.setattr("featcache.cache.reading.MANY_TEXTS", 1)
        assert_same(open_cache(index), open_cache(whole))
        assert_same(read_cache(index), read_cache(whole))
        with stream_cache(index) as found, stream_cache(whole) as expected:
            assert_same(found, expected)
        assert verify_cache(index)
        assert verify_cache(index).rows == len(cache)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    "options",
    [{"solver": "lbfgs"}, {"solver": "ridge"}, {"solver": "knn"}, {"solver": "sgd"}, {"solver": "ridge", "shots": 5}],
    ids=str,
)
def test_every_solver_gives_the_head_of_the_whole(
    both: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, index = both
    one = train_head(whole, tmp_path / "runs/whole", seed=1, **options)
    other = train_head(index, tmp_path / "runs/index", seed=1, **options)
    for name in ("predictions.csv", "history.csv", "model.safetensors"):
        assert (other.folder / name).read_bytes() == (one.folder / name).read_bytes(), name
    assert other.record.accuracy == one.record.accuracy
    assert other.record.data == one.record.data


def test_features_larger_than_memory_are_streamed_from_an_index_too(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.stages.train_head.find_free_memory", lambda: 1)
    assert train_head(both[1], tmp_path / "head").record.details["solver"] == "sgd"


def test_what_it_costs_and_what_was_left_out_is_told_of_all(tmp_path: Path) -> None:
    for i, why in enumerate(("truncated", "empty")):
        origin = {**ORIGIN, "data": f"/photos/{i}", "bad": [["train/red/x.jpg", why]], "peak_memory_bytes": 1000 * i}
        write_cache(tmp_path / f"{i}.h5", make_cache(provenance=origin))
    found = index_caches(tmp_path / "all.json", [tmp_path / "0.h5", tmp_path / "1.h5"]).provenance
    assert (found["seconds"], found["cpu_seconds"], found["energy_joules"]) == (3.0, 4.0, None)
    assert (found["peak_memory_bytes"], found["device"]) == (1000, "cpu")
    assert found["bad"] == [["0/train/red/x.jpg", "truncated"], ["1/train/red/x.jpg", "empty"]]
    assert found["caches"] == [str(tmp_path / "0.h5"), str(tmp_path / "1.h5")]


def test_some_caches_may_have_test_images_and_others_none(tmp_path: Path) -> None:
    plain = make_cache()
    write_cache(tmp_path / "a.h5", plain)
    write_cache(tmp_path / "b.h5", replace(plain, splits={**plain.splits, "test": make_split(4, 9)}))
    found = index_caches(tmp_path / "all.json", [tmp_path / "a.h5", tmp_path / "b.h5"])
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 96, "val": 42, "test": 4}


def test_an_image_that_trains_in_one_cache_and_validates_in_another_is_told_of(tmp_path: Path, cli: CLI) -> None:
    one, other = make_cache(), make_cache(splits={"train": make_split(9, 3), "val": make_split(6, 1)})
    write_cache(tmp_path / "a.h5", one)
    write_cache(tmp_path / "b.h5", other)
    made = cli("index", tmp_path / "all.json", tmp_path / "a.h5", tmp_path / "b.h5")
    assert made.code == 0
    assert "WARNING: leakage, the same image in more than one split (6 in all)" in made.err
    assert "57 train + 27 val rows of 6 float16 features of tiny in 2 caches" in made.out


def test_rows_of_an_index_are_taken_over(tmp_path: Path, photos: Path, tiny: Any, cli: CLI) -> None:
    fill_class(photos.parent / "more/train/blue", COLOURS["blue"], 2, seed=70)
    fill_class(photos.parent / "more/train/red", COLOURS["red"], 2, seed=80)
    shutil.copytree(photos / "val", photos.parent / "more/val")
    options = ("--backbone", "tiny", "--weights", "none", "--workers", "0", "--runtime", "eager")
    assert cli("extract", photos, "-o", "a.h5", *options).code == 0
    assert cli("extract", photos.parent / "more", "-o", "b.h5", *options).code == 0
    assert cli("index", "all.json", "a.h5", "b.h5").code == 0
    shutil.copytree(photos.parent / "more/train", photos / "train", dirs_exist_ok=True)
    before = tiny.calls
    assert cli("extract", photos, "-o", "c.h5", "--reuse", "all.json", *options).code == 0
    assert tiny.calls == before


# --- whose images they are --------------------------------------------------------------------------------------------


def test_the_paths_of_one_data_set_stay_as_they_are(both: tuple[Path, Path]) -> None:
    assert open_cache(both[1]).splits["train"].listing.paths == open_cache(both[0]).splits["train"].listing.paths
    assert open_cache(both[1]).provenance["data"] == "/photos"


def test_images_of_several_folders_are_found_below_the_one_that_holds_them(tmp_path: Path, tiny: Any, cli: CLI) -> None:
    for i, name in enumerate(("may", "june")):
        for j, split in enumerate(("train", "val")):
            for k, colour in enumerate(("blue", "red")):
                fill_class(tmp_path / name / split / colour, COLOURS[colour], 4, seed=1000 * i + 100 * j + 10 * k)
        options = ("--backbone", "tiny", "--weights", "none", "--workers", "0", "--runtime", "eager")
        assert cli("extract", tmp_path / name, "-o", f"{name}.h5", *options).code == 0
    made = cli("index", "all.json", "may.h5", "june.h5", "--json").json
    assert (made["rows"], made["splits"], made["caches"]) == (32, {"train": 16, "val": 16}, ["may.h5", "june.h5"])
    cache = open_cache("all.json")
    paths = cache.splits["val"].listing.paths
    assert (paths[0], paths[-1]) == ("may/val/blue/photo_000.jpg", "june/val/red/photo_003.jpg")
    assert all((tmp_path / path).is_file() for path in cache.listing.paths())
    assert cli("show", "all.json", "-o", "images.png").code == 0
    assert cli("train-head", "all.json", "-o", "runs/head").code == 0
    assert cli("show", "runs/head", "-o", "predictions.png").code == 0
    assert cli("predict", "runs/head", tmp_path / paths[0]).code == 0
    fill_class(tmp_path / "june/val/red", COLOURS["red"], 4, seed=5)
    changed = cli("show", "all.json", "--split", "val", "--class", "red", "-n", "8")
    assert changed.code == 1
    assert "`featcache index all.json may.h5 june.h5`" in changed.err


def test_images_that_lie_in_no_folder_are_told_apart_and_not_guessed(tmp_path: Path, cli: CLI) -> None:
    for i in range(3):
        write_cache(tmp_path / f"{i}.h5", make_cache(provenance={**ORIGIN, "data": f"/photos/{min(i, 1)}.tar"}))
    index = tmp_path / "all.json"
    found = index_caches(index, [tmp_path / f"{i}.h5" for i in range(3)])
    paths = list(found.splits["train"].listing.paths)
    assert [paths[0], paths[48], paths[96]] == [f"{i}/split1/a/0.jpg" for i in (0, 1, 1)]
    shown = cli("show", index)
    assert shown.code == 1
    assert "lie in several places that are no folders; `featcache show CACHE.h5`" in shown.err


def test_the_folder_of_several_is_found_by_their_names() -> None:
    assert find_common_folder(["/a/b", "/a/b/c"]) == ("/a/b", ["", "c/"])
    assert find_common_folder(["/a", "/b"]) == ("/", ["a/", "b/"])
    assert find_common_folder(["s3://one/a", "s3://other/a"]) is None
    assert find_common_folder(["s3://one/a", "/one/a"]) is None
    assert find_common_folder(["/a/x.csv", "/a/y.csv"]) is None
    assert find_common_folder(["hf:a", "hf:b"]) is None


@pytest.mark.usefixtures("blank_figures")
def test_an_audit_and_a_comparison_take_an_index(both: tuple[Path, Path], tmp_path: Path, cli: CLI) -> None:
    pytest.importorskip("cleanlab", reason="pip install 'featcache[audit]'")
    one, other = (cli("audit", path, "-o", tmp_path / path.stem, "--json").json for path in both)
    for name in ("leakage", "exact_duplicates", "near_duplicates", "label_issues", "outliers", "accuracy", "data"):
        assert other[name] == one[name]
    for path, run in zip(both, ("whole", "index"), strict=True):
        assert cli("train-head", path, "-o", f"runs/{run}").code == 0
    compared = cli("compare", "runs/whole", "runs/index", "--features", both[1], "-o", "compared", "--json").json
    assert compared["arms"][0]["accuracy"] == compared["arms"][1]["accuracy"]
    assert cli("compare", *both, "-o", "ranked").code == 0


# --- the file ---------------------------------------------------------------------------------------------------------


def test_an_index_holds_no_rows_and_moves_with_its_caches(both: tuple[Path, Path], tmp_path: Path) -> None:
    text = both[1].read_text()
    assert [item["path"] for item in json.loads(text)["caches"]] == ["piece0.h5", "piece1.h5", "piece2.h5"]
    content = open_cache(both[1]).content_sha256
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (both[1], *tmp_path.glob("piece*.h5")):
        path.rename(moved / path.name)
    assert open_cache(moved / "all.json").content_sha256 == content
    index_caches(moved / "all.json", sorted(moved.glob("*.h5")))
    assert (moved / "all.json").read_text() == text
    shutil.copy(moved / "all.json", both[1])
    with pytest.raises(CacheError, match=r"piece0\.h5 does not exist: .*names it"):
        open_cache(both[1])


def test_caches_elsewhere_are_named_by_their_whole_path(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    index_caches("sub/all.json", ["piece0.h5"])
    assert json.loads(Path("sub/all.json").read_text())["caches"][0]["path"] == str(tmp_path / "piece0.h5")
    assert len(open_cache("sub/all.json")) == 17


def test_the_content_of_an_index_is_that_of_its_caches_in_order(both: tuple[Path, Path], tmp_path: Path) -> None:
    pieces = sorted(tmp_path.glob("piece*.h5"))
    contents = {index_caches(tmp_path / "x.json", order).content_sha256 for order in (pieces, pieces[::-1], pieces[:2])}
    assert len(contents) == 3
    assert open_cache(both[1]).content_sha256 in contents


def test_the_commands_for_caches_take_an_index(both: tuple[Path, Path], tmp_path: Path, cli: CLI) -> None:
    index = both[1]
    assert "69 rows" in cli("cache", "info", index).out
    info = cli("cache", "info", index, "--json").json
    assert info["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("piece*.h5"))
    assert cli("cache", "verify", index, "--json").json == [
        {"cache": str(index), "ok": True, "rows": 69, "problems": []}
    ]
    listed = {Path(item["path"]).name: item["about"] for item in cli("cache", "ls", tmp_path, "--json").json}
    assert listed["all.json"] == "tiny: 69 rows of 6 float16, in 3 caches"
    (tmp_path / "other.json").write_text("{}")
    assert not is_feature_cache(tmp_path / "other.json")
    assert len(list_items(tmp_path)) == 5
    assert cli("cache", "prune", index, "--yes").code == 0
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "other.json", "piece0.h5", "piece1.h5", "piece2.h5", "whole.h5",
    ]  # fmt: skip


def test_an_index_lies_in_a_store_beside_its_caches(
    both: tuple[Path, Path], tmp_path: Path, s3: Store, cli: CLI
) -> None:
    import fsspec

    for i in range(3):
        fsspec.filesystem("s3").put_file(str(tmp_path / f"piece{i}.h5"), f"{s3.bucket}/features/{i}.h5")
    names = [f"{s3.url}/features/{i}.h5" for i in range(3)]
    index_caches(f"{s3.url}/features/all.json", names)
    text = json.loads(fsspec.filesystem("s3").cat_file(f"{s3.bucket}/features/all.json"))
    assert [item["path"] for item in text["caches"]] == ["0.h5", "1.h5", "2.h5"]
    assert_same(open_cache(f"{s3.url}/features/all.json"), open_cache(both[0]))
    assert cli("cache", "verify", f"{s3.url}/features/all.json").code == 0
    index_caches(tmp_path / "here.json", names)
    assert_same(read_cache(tmp_path / "here.json"), read_cache(both[0]))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"extractor": {**EXTRACTOR, "layer": "layer3"}}, "layer"),
        ({"extractor": {**EXTRACTOR, "precision": {"compute": "float32", "stored": "float32"}}}, "stored"),
        ({"classes": ("blue", "green", "violet")}, "classes: red is only in the first, violet is only in the second"),
        ({"classes": ("blue", "red", "green")}, "classes: in another order"),
        (
            {"splits": {"train": make_split(6, 1, 2), "val": make_split(3, 2)}, "views": Views(train=2)},
            "views: none -> 2 of each training image, seed 0",
        ),
    ],
    ids=["layer", "precision", "classes", "order", "views"],
)
def test_caches_that_differ_are_not_indexed(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    write_cache(tmp_path / "a.h5", make_cache())
    write_cache(tmp_path / "b.h5", make_cache(**changes))
    with pytest.raises(CacheError, match=r"a\.h5 and .*b\.h5 cannot be read as one: ") as raised:
        index_caches(tmp_path / "all.json", [tmp_path / "a.h5", tmp_path / "b.h5"])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "all.json").exists()


def test_names_that_make_no_index_are_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    piece = tmp_path / "piece0.h5"
    (tmp_path / "other.json").write_text("{}")
    cases: list[tuple[str, list[Path], type[FeatcacheError], str]] = [
        ("x.h5", [piece], SettingsError, "expected a name that ends in .json"),
        ("x.json", [], SettingsError, "expected at least one"),
        ("x.json", [piece, tmp_path / "." / "piece0.h5"], SettingsError, "named twice"),
        ("x.json", [piece, both[1]], SettingsError, "an index itself"),
        ("x.json", [tmp_path / "nothing.h5"], CacheError, "does not exist"),
        ("other.json", [piece], OutputError, "is no index of caches"),
    ]
    for name, paths, kind, expected in cases:
        with pytest.raises(kind, match=expected):
            index_caches(tmp_path / name, paths)
    assert (tmp_path / "other.json").read_text() == "{}"
    assert not (tmp_path / "x.json").exists()


def test_a_cache_that_has_changed_since_is_named_with_the_cure(
    both: tuple[Path, Path], tmp_path: Path, cli: CLI
) -> None:
    write_cache(tmp_path / "piece1.h5", make_cache(6, 3))
    for read in (open_cache, read_cache, verify_cache, train_head):
        with pytest.raises(CacheError, match=r"piece1\.h5 is no longer the cache that .*all\.json indexed") as raised:
            read(both[1])  # type: ignore[operator]
    assert "\n" not in str(raised.value)
    cure = str(raised.value).split("`")[1]
    assert cli(*cure.split()[1:]).code == 0
    assert len(open_cache(both[1])) == 69 - 28 + 9


def test_damage_is_found_in_the_cache_that_has_it(both: tuple[Path, Path], tmp_path: Path, cli: CLI) -> None:
    damage(tmp_path / "piece2.h5")
    found = verify_cache(both[1])
    assert not found
    assert found.problems == [f"{tmp_path / 'piece2.h5'}: train/features rows 0 to 16"]
    assert f"-o {tmp_path / 'piece2.h5'}" in found.cure
    assert cli("cache", "verify", both[1]).code == 1
    with pytest.raises(CacheError, match=r"piece2\.h5 is damaged: train/features"):
        read_cache(both[1])
    with pytest.raises(CacheError, match=r"piece2\.h5 is damaged"), stream_cache(both[1]):
        pass
    with pytest.raises(CacheError, match=r"piece2\.h5 is damaged"):
        train_head(both[1], tmp_path / "head", solver="sgd")


def test_nothing_is_extracted_or_imported_into_an_index(
    both: tuple[Path, Path], photos: Path, tmp_path: Path, tiny: Any, cli: CLI
) -> None:
    before = both[1].read_bytes()
    options = ("--backbone", "tiny", "--weights", "none", "--workers", "0")
    np.savez(tmp_path / "table.npz", features=np.eye(4, 6), labels=np.array(["a", "b"] * 2), split=["train", "val"] * 2)
    for command in (
        ("extract", photos, "-o", both[1], *options),
        ("extract", photos, "-o", both[1], "--force", *options),
        ("compare", photos, "--features", both[1]),
        ("import", tmp_path / "table.npz", "-o", both[1]),
    ):
        refused = cli(*command)
        assert (refused.code, refused.err.count("Error:")) == (1, 1), refused
        assert "is an index of several caches" in refused.err
    assert both[1].read_bytes() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "expected featcache_index"),
        ('{"kind": "head"}', "expected featcache_index"),
        ('{"featcache_index": 2}', "it is of version 2, this featcache reads 1"),
        ('{"featcache_index": 1, "classes": [], "extractor_key": "", "caches": []}', "names no caches"),
        ('{"featcache_index": 1, "classes": [1], "extractor_key": "", "caches": []}', "no texts"),
        ('{"featcache_index": 1, "classes": [], "extractor_key": "", "caches": [{"path": "a"}]}', "content_sha256"),
        ("[" * 100_000, "no index of caches"),
    ],
    ids=["empty", "list", "run", "version", "none", "classes", "member", "deep"],
)
def test_what_is_no_index_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "x.json").write_text(text)
    for read in (open_cache, read_cache, verify_cache):
        with pytest.raises(CacheError, match=expected) as raised:
            read(tmp_path / "x.json")
        assert "\n" not in str(raised.value)


def test_an_index_whose_own_classes_were_changed_is_refused(both: tuple[Path, Path]) -> None:
    both[1].write_text(both[1].read_text().replace('"blue"', '"black"'))
    with pytest.raises(CacheError, match="other classes or key"):
        open_cache(both[1])


def test_a_cache_may_be_called_json(tmp_path: Path) -> None:
    write_cache(tmp_path / "odd.json", make_cache())
    assert len(open_cache(tmp_path / "odd.json")) == 69
    with open_readers(tmp_path / "odd.json") as readers:
        assert len(readers) == 1


def test_the_public_name_makes_an_index(both: tuple[Path, Path], tmp_path: Path) -> None:
    assert len(featcache.index_caches(tmp_path / "y.json", [tmp_path / "piece0.h5"])) == 17


@pytest.mark.parametrize("name", ["x.json", "x.h5"])
def test_a_pipe_is_no_index_and_nobody_waits_for_it(tmp_path: Path, name: str, cli: CLI) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "link.json").symlink_to(tmp_path / name)
    assert not is_feature_cache(tmp_path / name)
    assert not is_feature_cache(tmp_path / "link.json")
    assert list_items(tmp_path) == []
    write_cache(tmp_path / "a.h5", make_cache())
    for output, cache in ((tmp_path / name, tmp_path / "a.h5"), (tmp_path / "y.json", tmp_path / name)):
        refused = cli("index", output, cache)
        assert refused.code in (1, 2)
        assert refused.err.count("Error:") == 1


def test_an_index_names_no_more_caches_than_it_can(
    both: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.cache.index.MAX_CACHES", 2)
    monkeypatch.setattr("featcache.cache.opening.MAX_CACHES", 2)
    with pytest.raises(CacheError, match="names 3 caches, expected at most 2"):
        open_cache(both[1])
    with pytest.raises(SettingsError, match="index of 3 caches: expected at most 2"):
        index_caches(tmp_path / "x.json", sorted(tmp_path.glob("piece*.h5")))


# --- many files -------------------------------------------------------------------------------------------------------


def count_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")


@needs_proc
@pytest.mark.parametrize("many_texts", [1, 1 << 16], ids=["texts on the disk", "texts in memory"])
def test_one_file_stays_open_for_each_cache_of_an_index(
    tmp_path: Path, many_texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = Views(train=2, seed=3)
    splits = {name: make_split(9, i, views.count(name)) for i, name in enumerate(("train", "val", "test"))}
    write_both(tmp_path, make_cache(splits=splits, views=views), {name: [2, 4] for name in splits})
    monkeypatch.setattr("featcache.cache.reading.MANY_TEXTS", many_texts)
    gc.collect()
    before = count_open()
    with open_readers(tmp_path / "all.json"):
        assert count_open() == before + 3
    assert count_open() == before
    cache = open_cache(tmp_path / "all.json")
    assert count_open() == before + 3
    copied = pickle.loads(pickle.dumps(cache.splits["train"]))
    assert (
        copied.features[:].tolist() == cache.splits["train"].features[:].tolist() == splits["train"].features.tolist()
    )
    for column in ("features", "views"):
        rows = getattr(cache.splits["train"], column)
        assert rows[[8, 0, 3, 3]].tolist() == getattr(splits["train"], column)[[8, 0, 3, 3]].tolist()
    del cache, rows
    gc.collect()
    assert count_open() == before


def try_with_limit(limit: int, act: Callable[[], object]) -> str:
    """What is told if so many files may be open; "" if they are enough."""
    resource = pytest.importorskip("resource", reason="limits are of Unix")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        act()
    except FeatcacheError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return ""


@needs_proc
@pytest.mark.parametrize("makes", [False, True], ids=["opened", "made"])
def test_too_many_open_files_are_one_line_with_the_cure(both: tuple[Path, Path], tmp_path: Path, makes: bool) -> None:
    pieces = sorted(tmp_path.glob("piece*.h5"))

    def act() -> object:
        return index_caches(tmp_path / "x.json", pieces) if makes else open_cache(both[1])

    act()  # what is loaded once is loaded
    gc.collect()
    numbers = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(max(numbers) + 20) if number not in numbers]
    told = [try_with_limit(free[i], act) for i in range(8)]
    assert told[-1] == ""
    lacking = [text for text in told if text]
    assert len(lacking) >= 3
    for text in lacking:
        assert "\n" not in text
        assert "extract again" not in text
    assert any("too many files are open" in text and "`ulimit -n" in text for text in lacking)


@given(st.lists(st.integers(0, 299)), st.sampled_from(["<f2", "<i8", "S5"]))
def test_rows_of_a_file_are_picked_as_from_an_array(numbers: list[int], kind: str) -> None:
    values = np.arange(600).reshape(300, 2).astype(kind)
    with tempfile.TemporaryFile() as file:
        file.write(b"head" + values.tobytes())
        file.flush()
        column = StreamedFeatures(file, 4, values.shape, values.dtype, Path("x"))
        rows = np.array(numbers, np.intp)
        assert column.pick(rows).tolist() == values[rows].tolist()
        assert pickle.loads(pickle.dumps(column)).tolist() == values.tolist()


# --- rows and texts of several places ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_joined_rows_are_indexed_as_an_array_is(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(3 * sum(lengths), dtype=np.float16).reshape(-1, 3)
    joined, n = JoinedRows(np.split(whole, np.cumsum(lengths)[:-1])), sum(lengths)
    rows = data.draw(st.slices(n))
    assert joined[rows].tolist() == whole[rows].tolist()
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    assert joined[mask].tolist() == whole[mask].tolist()
    if n:
        numbers = np.array(data.draw(st.lists(st.integers(-n, n - 1))), np.int64)
        assert joined[numbers].tolist() == whole[numbers].tolist()
        assert joined[int(numbers[0]) if len(numbers) else -1].shape == (3,)
    assert (joined.shape, joined.ndim, len(joined), joined.dtype) == (whole.shape, 2, n, whole.dtype)
    assert np.asarray(joined, np.float32).tobytes() == whole.astype(np.float32).tobytes()
    assert [row.tolist() for row in joined] == whole.tolist()
    for wrong in (np.array([n]), np.array([-n - 1]), np.ones(n + 1, bool), np.array([0.5])):
        with pytest.raises(IndexError):
            joined[wrong]


@given(st.lists(st.lists(st.text("ab/é", min_size=1, max_size=4), max_size=5), min_size=1, max_size=4), st.data())
def test_joined_texts_are_those_of_the_columns(columns: list[list[str]], data: st.DataObject) -> None:
    prefixes = [f"{i}/" if i % 2 else "" for i in range(len(columns))]
    expected = [prefix + text for column, prefix in zip(columns, prefixes, strict=True) for text in column]
    joined = JoinedTexts([pack_texts(column) for column in columns], prefixes)
    assert joined == expected
    assert list(joined) == expected
    some = data.draw(st.slices(len(expected)))
    assert list(joined[some]) == expected[some]
    rows = np.array(data.draw(st.permutations(range(len(expected)))), np.int64)
    assert list(joined.take(rows)) == [expected[row] for row in rows.tolist()]
    assert [joined[i] for i in range(len(expected))] == expected
