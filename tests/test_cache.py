"""featcache.cache: what is written is read again, strangers can read it, nothing stale or damaged is ever served."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pytest

from featcache.cache import (
    SCHEMA,
    FeatureCache,
    FeatureSplit,
    can_serve,
    hash_extractor,
    list_differences,
    open_cache,
    read_cache,
    verify_cache,
    write_cache,
)
from featcache.cache.contents import hash_content
from featcache.cache.key import key_parts
from featcache.cache.reading import COLUMNS, TEXTS, hash_blocks, hash_texts
from featcache.dataset import Split
from featcache.errors import CacheError, OutputError
from featcache.files import hash_bytes

EXTRACTOR: dict[str, Any] = {
    "backbone": "tiny",
    "weights": {"requested": "DEFAULT", "name": "tiny.pth", "file_sha256": "f" * 64, "tensors_sha256": "a" * 64},
    "layer": "input of fc",
    "dim": 4,
    "preprocessing": {
        "resize": 20,
        "crop": 16,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "decoding": "pillow",
    },
    "precision": {"compute": "float32", "stored": "float32"},
}


def make_split(n: int, seed: int, paths: tuple[str, ...] | None = None) -> FeatureSplit:
    return FeatureSplit(
        listing=Split(
            paths=paths or tuple(f"split{seed}/a/{i}.jpg" for i in range(n)),
            labels=np.arange(n, dtype=np.int64) % 2,
            digests=tuple(f"{1000 * seed + i:064x}" for i in range(n)),
            stats=np.arange(4 * n, dtype=np.int64).reshape(n, 4) + 1,
        ),
        features=np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32),
    )


def make_cache(**changes: Any) -> FeatureCache:
    values: dict[str, Any] = {
        "classes": ("ants", "bees"),
        "extractor": copy.deepcopy(EXTRACTOR),
        "splits": {"train": make_split(6, 1), "val": make_split(3, 2)},
        "provenance": {"data": "/photos", "seconds": 1.5, "bad": []},
    }
    return FeatureCache(**{**values, **changes})


def change_extractor(where: str, value: Any) -> dict[str, Any]:
    """The extractor with one value changed, "preprocessing.crop" being a value in a dictionary."""
    extractor = copy.deepcopy(EXTRACTOR)
    *groups, name = where.split(".")
    target = extractor
    for group in groups:
        target = target[group]
    target[name] = value
    return extractor


def assert_same(one: FeatureCache, other: FeatureCache) -> None:
    assert (one.classes, one.extractor, one.provenance) == (other.classes, other.extractor, other.provenance)
    assert list(one.splits) == list(other.splits)
    for name, split in one.splits.items():
        again = other.splits[name]
        assert again.listing.stats.tolist() == split.listing.stats.tolist()
        assert (again.listing.paths, again.listing.digests) == (split.listing.paths, split.listing.digests)
        assert again.listing.labels.tolist() == split.listing.labels.tolist()
        assert again.features.dtype == np.float32
        assert again.features.tobytes() == split.features.tobytes()
        assert again.features.shape == split.features.shape


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good cache file."""
    write_cache(tmp_path / "features.h5", make_cache())
    return tmp_path / "features.h5"


# What is written is read again


def test_a_cache_survives_the_disk(path: Path) -> None:
    assert_same(read_cache(path), make_cache())
    assert_same(read_cache(str(path)), make_cache())


def test_a_test_split_survives_too(tmp_path: Path) -> None:
    cache = make_cache(splits={"train": make_split(6, 1), "val": make_split(3, 2), "test": make_split(5, 3)})
    write_cache(tmp_path / "f.h5", cache)
    assert_same(read_cache(tmp_path / "f.h5"), cache)
    assert len(read_cache(tmp_path / "f.h5")) == 14


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 9000])
def test_any_number_of_rows_survives(tmp_path: Path, n: int) -> None:
    cache = make_cache(splits={"train": make_split(n, 1), "val": make_split(0, 2)})
    write_cache(tmp_path / "f.h5", cache)
    assert_same(read_cache(tmp_path / "f.h5"), cache)
    assert read_cache(tmp_path / "f.h5").dim == 4


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    names = ("train/a/\udcff\udcfe.jpg", "train/ü/ß.jpg", "train/a/line\nbreak.jpg", "train/a/ .jpg")
    cache = make_cache(
        classes=("a\udcff", "ü"),
        splits={"train": make_split(4, 1, paths=names), "val": make_split(2, 2)},
        provenance={"data": "/photos/\udcff", "bad": [["a/\udcff.jpg", "damaged"]]},
    )
    write_cache(tmp_path / "f.h5", cache)
    assert_same(read_cache(tmp_path / "f.h5"), cache)
    with h5py.File(tmp_path / "f.h5") as file:
        assert bytes(file["train/paths"][0]) == b"train/a/\xff\xfe.jpg"


def test_twenty_thousand_classes_survive(tmp_path: Path) -> None:
    cache = make_cache(classes=tuple(f"class number {i}" for i in range(20_000)))
    write_cache(tmp_path / "f.h5", cache)
    assert_same(read_cache(tmp_path / "f.h5"), cache)


def test_equal_caches_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_cache(tmp_path / name, make_cache())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_features_of_another_precision_are_stored_as_float32(tmp_path: Path) -> None:
    split = make_split(6, 1)
    double = FeatureSplit(listing=split.listing, features=split.features.astype(np.float64))  # type: ignore[arg-type]
    write_cache(tmp_path / "f.h5", make_cache(splits={"train": double, "val": make_split(3, 2)}))
    assert_same(read_cache(tmp_path / "f.h5"), make_cache())


def test_the_listing_and_the_rows_belong_together(path: Path) -> None:
    cache = read_cache(path)
    assert cache.listing.root == Path("/photos")
    assert cache.listing.classes == ("ants", "bees")
    assert len(cache.listing) == len(cache) == 9


# A stranger reads it


def test_a_stranger_needs_only_h5py(path: Path) -> None:
    expected = make_cache()
    with h5py.File(path) as file:
        assert set(file) == {"train", "val"}
        assert set(file["train"]) == set(COLUMNS)
        features, labels = file["train/features"][:], file["train/labels"][:]
        assert (features.dtype, labels.dtype) == (np.dtype(np.float32), np.dtype(np.int64))
        assert np.array_equal(features, expected.splits["train"].features)
        assert labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert [bytes(name).decode() for name in file["val/paths"]] == list(expected.splits["val"].listing.paths)
        assert [bytes(digest).decode() for digest in file["val/digests"]] == list(
            expected.splits["val"].listing.digests
        )


def test_attributes_are_json(path: Path) -> None:
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    assert int(attributes["featcache_schema"]) == SCHEMA
    assert json.loads(attributes["classes"]) == ["ants", "bees"]
    assert json.loads(attributes["extractor"]) == EXTRACTOR
    assert json.loads(attributes["provenance"]) == {"data": "/photos", "seconds": 1.5, "bad": []}
    assert attributes["extractor_key"].decode() == hash_extractor(EXTRACTOR)


def test_a_stranger_may_keep_the_file_open_meanwhile(path: Path) -> None:
    with h5py.File(path):
        assert_same(read_cache(path), make_cache())


def test_a_cache_without_the_right_to_write_can_be_read(path: Path) -> None:
    path.chmod(0o400)
    assert_same(read_cache(path), make_cache())


def test_a_cache_holds_no_pickle(path: Path) -> None:
    with h5py.File(path) as file:
        kinds = {file[f"{split}/{column}"].dtype.kind for split in file for column in file[split]}
    assert kinds == {"f", "i", "S"}


# The key

DECISIVE = {
    "backbone": "other",
    "weights.tensors_sha256": "b" * 64,
    "layer": "input of head",
    "dim": 8,
    "preprocessing.resize": 21,
    "preprocessing.crop": 17,
    "preprocessing.interpolation": "bicubic",
    "preprocessing.mean": [0.5, 0.5, 0.51],
    "preprocessing.std": [0.25, 0.25, 0.26],
    "preprocessing.decoding": "other rules",
    "precision.compute": "bfloat16",
    "precision.stored": "float16",
}


@pytest.mark.parametrize("where", DECISIVE)
def test_the_key_changes_with(where: str) -> None:
    assert hash_extractor(change_extractor(where, DECISIVE[where])) != hash_extractor(EXTRACTOR)


@pytest.mark.parametrize("where", ["weights.requested", "weights.name", "weights.file_sha256"])
def test_the_key_ignores(where: str) -> None:
    assert hash_extractor(change_extractor(where, "/elsewhere/renamed.pth")) == hash_extractor(EXTRACTOR)


def test_the_key_changes_with_anything_that_is_added() -> None:
    assert hash_extractor({**EXTRACTOR, "pooling": "max"}) != hash_extractor(EXTRACTOR)


def test_the_key_ignores_the_order_of_the_description() -> None:
    assert hash_extractor(dict(reversed(EXTRACTOR.items()))) == hash_extractor(EXTRACTOR)


def test_every_field_of_a_real_description_is_decisive_but_the_names_of_weights(tiny: Any) -> None:
    from featcache.backbones import load_backbone

    described = load_backbone("tiny", weights="none", seed=0).describe()
    flat = {f"{k}.{n}": None for k, v in described.items() if isinstance(v, dict) for n in v} | dict.fromkeys(
        k for k, v in described.items() if not isinstance(v, dict)
    )
    decisive = {where for where in flat if not where.startswith("weights.")} | {"weights.tensors_sha256"}
    assert decisive == set(DECISIVE)


def test_the_key_is_the_same_in_the_file_and_in_memory(path: Path) -> None:
    assert read_cache(path).key == make_cache().key == hash_extractor(EXTRACTOR)


# Which extractor's rows serve which


@pytest.mark.parametrize("where", DECISIVE)
def test_rows_of_another_extractor_never_serve(where: str) -> None:
    other = change_extractor(where, DECISIVE[where])
    assert not can_serve(other, EXTRACTOR)
    assert can_serve(EXTRACTOR, other) == (where == "precision.stored")  # float32 can be rounded to float16


@pytest.mark.parametrize("where", DECISIVE)
def test_exactly_what_differs_is_listed(where: str) -> None:
    listed = list_differences(key_parts(EXTRACTOR), key_parts(change_extractor(where, DECISIVE[where])))
    assert [line.partition(":")[0] for line in listed] == ["weights" if where.startswith("weights") else where]


def test_differences_show_old_and_new() -> None:
    crop, weights = (
        change_extractor("preprocessing.crop", 17),
        change_extractor("weights.tensors_sha256", "b" * 64),
    )
    assert list_differences(key_parts(EXTRACTOR), key_parts(crop)) == ["preprocessing.crop: 16 -> 17"]
    assert list_differences(key_parts(EXTRACTOR), key_parts(weights)) == ["weights: aaaaaaaa... -> bbbbbbbb..."]


def test_differences_name_what_was_added_and_removed() -> None:
    assert list_differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a: 1 -> None", "c: None -> 3"]
    assert list_differences(EXTRACTOR, copy.deepcopy(EXTRACTOR)) == []
    assert key_parts(EXTRACTOR)["weights"] == "a" * 64


# What is no cache


def write_other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train/features"] = np.zeros((3, 4), np.float32)


def write_truncated_cache(path: Path) -> None:
    write_cache(path, make_cache())
    path.write_bytes(path.read_bytes()[:-1000])


def write_other_schema(path: Path) -> None:
    write_cache(path, make_cache())
    with h5py.File(path, "r+") as file:
        file.attrs["featcache_schema"] = SCHEMA + 1


STRANGERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a text file": (lambda path: path.write_text("my thesis\nchapter 1\n"), "cannot be read as a feature cache"),
    "an empty file": (lambda path: path.write_bytes(b""), "cannot be read as a feature cache"),
    "another HDF5 file": (write_other_hdf5, "HDF5 file but not a feature cache"),
    "a folder": (Path.mkdir, "is a folder"),
    "a truncated cache": (write_truncated_cache, "cannot be read as a feature cache"),
    "another schema": (write_other_schema, f"cache schema {SCHEMA + 1}, this featcache reads {SCHEMA}"),
}


@pytest.mark.parametrize("read", [read_cache, open_cache, verify_cache])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_cache_is_refused_in_one_line(tmp_path: Path, stranger: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "precious.h5"
    write, reason = STRANGERS[stranger]
    write(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(CacheError, match=reason) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_missing_cache_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"none\.h5 does not exist: .*`featcache extract DATA -o .*none\.h5`"):
        read_cache(tmp_path / "none.h5")


def test_a_cache_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 131), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CacheError):
            read_cache(path)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_flipped_bit_in_a_column_is_found(path: Path, column: str) -> None:
    with h5py.File(path) as file:
        dataset = file[f"train/{column}"]
        offset = dataset.id.get_offset() + dataset.nbytes // 2
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=f"train/{column}.* not what was written"):
        read_cache(path)
    if column == "features":
        assert verify_cache(path).damaged == (("train", 0, 6),)
    else:
        with pytest.raises(CacheError, match=f"train/{column}"):
            verify_cache(path)


# Damaged and hostile files


def reseal(file: h5py.File) -> None:
    """Make all digests right again, as somebody would who wants to be believed."""
    columns = {}
    for split in [split for split in file if isinstance(file.get(split, getlink=True), h5py.HardLink)]:
        here = file[split]
        for name in [name for name in here if isinstance(here.get(name, getlink=True), h5py.HardLink)]:
            plain = isinstance(here[name], h5py.Dataset) and not (here[name].is_virtual or here[name].external)
            if plain and here[name].nbytes < 1 << 20:
                columns[f"{split}/{name}"] = hash_bytes(here[name][:].tobytes())
        if f"{split}/features" in columns:
            blocks = hash_blocks(here["features"][:])
            if "features_sha256" in here:
                here["features_sha256"][:] = [block.encode() for block in blocks]
                columns[f"{split}/features_sha256"] = hash_bytes(here["features_sha256"][:].tobytes())
            columns[f"{split}/features"] = hash_bytes("".join(blocks).encode())
    texts = {name: bytes(np.bytes_(file.attrs[name])).decode() for name in TEXTS if name in file.attrs}
    texts["columns_sha256"] = json.dumps(columns)
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        texts["content_sha256"] = hash_content(tuple(json.loads(texts["classes"])), texts["extractor_key"], columns)
    for name, text in {**texts, "attributes_sha256": hash_texts(texts)}.items():
        file.attrs.create(name, text.encode("ascii"), dtype=h5py.string_dtype("ascii", len(text)))


def replace_dataset(name: str, make: Callable[[np.ndarray], Any]) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        values = file[name][:]
        del file[name]
        file[name] = make(values)

    return edit


def set_attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def set_extractor(extractor: dict[str, Any]) -> Callable[[h5py.File], None]:
    """Another extractor, with the key that belongs to it."""

    def edit(file: h5py.File) -> None:
        file.attrs["extractor"] = json.dumps(extractor)
        file.attrs["extractor_key"] = hash_extractor(extractor)

    return edit


def link_features(file: h5py.File) -> None:
    del file["val/features"]
    file["val/features"] = h5py.SoftLink("/train/features")


def link_group(file: h5py.File) -> None:
    del file["val"]
    file["val"] = h5py.SoftLink("/train")


def link_outside(file: h5py.File) -> None:
    write_other_hdf5(Path(file.filename).with_name("secret.h5"))
    del file["val/features"]
    file["val/features"] = h5py.ExternalLink("secret.h5", "/train/features")


def link_group_outside(file: h5py.File) -> None:
    write_cache(Path(file.filename).with_name("secret.h5"), make_cache())
    del file["val"]
    file["val"] = h5py.ExternalLink("secret.h5", "/val")


def store_outside(file: h5py.File) -> None:
    secret = Path(file.filename).with_name("secret.bin")
    secret.write_bytes(bytes(48))
    del file["val/features"]
    file["val"].create_dataset("features", (3, 4), np.float32, external=[(str(secret), 0, 48)])


def make_virtual(file: h5py.File) -> None:
    write_other_hdf5(Path(file.filename).with_name("secret.h5"))
    layout = h5py.VirtualLayout((3, 4), np.float32)
    layout[:] = h5py.VirtualSource("secret.h5", "train/features", (3, 4))
    del file["val/features"]
    file["val"].create_virtual_dataset("features", layout)


def put_nan(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(features: np.ndarray) -> np.ndarray:
        features[-1, -1] = value
        return features

    return edit


def put_in_one_chunk(file: h5py.File) -> None:
    values = file["val/labels"][:]
    del file["val/labels"]
    file["val"].create_dataset("labels", data=values, maxshape=(None,), chunks=(1 << 20,), fletcher32=True)


def nest(depth: int) -> str:
    return '{"dim": 4, "deep": ' + "[" * depth + "]" * depth + "}"


def compress_features(file: h5py.File) -> None:
    values = file["val/features"][:]
    del file["val/features"]
    file["val"].create_dataset("features", data=values, chunks=True, compression="gzip")


def make_bomb(file: h5py.File) -> None:
    """40 MB of zeros in 40 kB."""
    del file["val/features"]
    zeros = np.zeros((2_500_000, 4), "<f4")
    file["val"].create_dataset("features", data=zeros, chunks=zeros.shape, compression="gzip")


def claim_much(file: h5py.File) -> None:
    del file["val/features"]
    file["val"].create_dataset("features", (10**12, 4), "<f4")


def remove(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


DAMAGES: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "soft link": (link_features, "val/features is missing or a link"),
    "soft link to a split": (link_group, "missing or a link"),
    "external link": (link_outside, "val/features is missing or a link"),
    "external link to a split": (link_group_outside, "missing or a link"),
    "external storage": (store_outside, "val/features is not stored in it"),
    "virtual dataset": (make_virtual, "val/features is not stored in it"),
    "a group for a column": (lambda file: (remove("val/paths")(file), file.create_group("val/paths")), "not stored"),
    "no train": (remove("train"), "expected train and val"),
    "no val": (remove("val"), "expected train and val"),
    "no labels": (remove("train/labels"), "train/labels is missing"),
    "NaN": (replace_dataset("val/features", put_nan(np.nan)), "val/features rows 0 to 2 are not"),
    "infinity": (replace_dataset("train/features", put_nan(-np.inf)), "train/features rows 0 to 5 are not"),
    "label too large": (replace_dataset("train/labels", lambda labels: labels + 1), "labels are not indices"),
    "label below zero": (replace_dataset("val/labels", lambda labels: labels - 1), "labels are not indices"),
    "labels of another type": (replace_dataset("val/labels", lambda labels: labels.astype(np.uint64)), "val/labels is"),
    "labels are numbers": (replace_dataset("val/labels", lambda labels: labels.astype(np.float32)), "val/labels is"),
    "features are integers": (replace_dataset("val/features", lambda f: f.astype(np.int32)), "val/features is int32"),
    "features are doubles": (
        replace_dataset("val/features", lambda f: f.astype(np.float64)),
        "val/features is float64",
    ),
    "features are halves": (replace_dataset("val/features", lambda f: f.astype(np.float16)), "expected float32"),
    "features are flat": (replace_dataset("val/features", lambda f: f.ravel()), "val/features is"),
    "labels are a table": (replace_dataset("val/labels", lambda labels: labels[:, None]), "val/labels is"),
    "paths are objects": (
        replace_dataset("val/paths", lambda paths: np.array(["a"] * len(paths), h5py.string_dtype())),
        "val/paths is object",
    ),
    "paths lead out": (
        replace_dataset("val/paths", lambda paths: np.array([b"a/../../secret.jpg"] * len(paths))),
        "leads out of the data",
    ),
    "paths are absolute": (
        replace_dataset("val/paths", lambda paths: np.array([b"/etc/passwd"] * len(paths))),
        "leads out of the data",
    ),
    "digests are not ASCII": (
        replace_dataset("val/digests", lambda digests: np.array([b"\xff" * 64] * len(digests), "S64")),
        "val/digests are no digests",
    ),
    "columns of different length": (replace_dataset("train/labels", lambda labels: labels[1:]), "differ in length"),
    "features fewer than rows": (replace_dataset("val/features", lambda f: f[:2]), "columns of val differ in length"),
    "features narrower": (replace_dataset("val/features", lambda f: f[:, :3]), "expected float32 of width 4"),
    "in a giant chunk": (put_in_one_chunk, "val/labels is in chunks"),
    "extractor that is nested deeply": (set_attribute("extractor", nest(900)), "extractor is nested too deeply"),
    "provenance of a name that is none": (set_attribute("provenance", '{"data": "/x\\u0000y"}'), "name the data"),
    "classes that are no names": (set_attribute("classes", '["a\\ud800", "b"]'), "cannot be read"),
    "compressed": (compress_features, "val/features is in chunks"),
    "a bomb": (make_bomb, "val/features is in chunks"),
    "larger than the file": (claim_much, "val/features .* is not all there"),
    "classes that are no list": (set_attribute("classes", '{"a": 1}'), "its classes is no list"),
    "classes that are numbers": (set_attribute("classes", "[1, 2]"), "its classes are not different names"),
    "classes that are equal": (set_attribute("classes", '["a", "a"]'), "its classes are not different names"),
    "extractor that is no dictionary": (set_attribute("extractor", "[1]"), "its extractor is no dict"),
    "extractor without anything": (set_extractor({}), "cannot be read"),
    "extractor of text": (set_extractor({"precision": "high", "dim": 4}), "cannot be read"),
    "extractor of no width": (set_extractor({**EXTRACTOR, "dim": "wide"}), "of width wide"),
    "provenance that is no JSON": (set_attribute("provenance", "__import__('os')"), "cannot be read"),
    "provenance without data": (set_attribute("provenance", "{}"), "does not name the data"),
    "JSON without end": (set_attribute("provenance", "[" * 30_000), "cannot be read"),
    "schema that is no number": (set_attribute("featcache_schema", "one"), "its attributes are not those"),
    "another key": (set_attribute("extractor_key", "0" * 64), "its extractor and its extractor_key disagree"),
    "another extractor": (
        set_attribute("extractor", json.dumps(change_extractor("preprocessing.crop", 224))),
        "its extractor and its extractor_key disagree",
    ),
    "no key": (lambda file: file.attrs.__delitem__("extractor_key"), "lacks extractor_key"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused_in_one_line(path: Path, damage: str) -> None:
    edit, reason = DAMAGES[damage]
    for sealed in (False, True):
        write_cache(path, make_cache())
        with h5py.File(path, "r+") as file:
            edit(file)
            if sealed:
                reseal(file)
        with pytest.raises(CacheError, match=reason if sealed else None) as caught:
            read_cache(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if damage in ("NaN", "infinity"):
            assert verify_cache(path).damaged
        else:
            with pytest.raises(CacheError, match=reason if sealed else None):
                verify_cache(path)


def test_a_file_that_is_sealed_again_without_a_change_is_good(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        reseal(file)
    assert_same(read_cache(path), make_cache())


# Writing


def test_a_cache_that_cannot_be_written_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(*args: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", disk_is_full)
        with pytest.raises(OutputError, match=r"cannot write .*features\.h5 .*No space left on device"):
            write_cache(path, make_cache(classes=("other", "names")))
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("place", ["file/f.h5", "folder"])
def test_a_place_that_cannot_hold_a_cache_is_an_output_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_cache(tmp_path / place, make_cache())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


def test_no_flipped_bit_in_the_attributes_hangs_or_is_believed(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    start = whole.index(b'["ants"')
    for offset in range(start - 40, start + 40):
        damaged = bytearray(whole)
        damaged[offset] ^= 2
        (tmp_path / "flipped.h5").write_bytes(damaged)
        with pytest.raises(CacheError):
            read_cache(tmp_path / "flipped.h5")


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from featcache.cache import FeatureCache, FeatureSplit, write_cache
from featcache.dataset import Split
from featcache.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
n = 500
listing = Split(paths=("p",) * n, labels=np.zeros(n, np.int64), digests=("0" * 64,) * n)
split = FeatureSplit(listing=listing, features=np.ones((n, 100), np.float32))
extractor = {"dim": 100, "precision": {"stored": "float32"}}
splits = {"train": split, "val": split}
cache = FeatureCache(classes=("a",), extractor=extractor, splits=splits, provenance={"data": ""})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_cache(Path(sys.argv[1]), cache)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_disk_that_fills_up_while_writing_kills_nothing(path: Path) -> None:
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("File too large\n")
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


STREAMED = """
import sys
from pathlib import Path
import numpy as np
from featcache.cache import FeatureCache, FeatureSplit, verify_cache, write_cache
from featcache.dataset import Split
n, dim = 300_000, 512
class Rows:
    shape = (n, dim)
    def __getitem__(self, rows):
        start, stop, _ = rows.indices(n)
        return np.full((stop - start, dim), 0.5, np.float32)
empty = np.zeros(0, np.int64)
splits = {
    "train": FeatureSplit(
        listing=Split(paths=("a/b.jpg",) * n, labels=np.zeros(n, np.int64), digests=("0" * 64,) * n), features=Rows()
    ),
    "val": FeatureSplit(listing=Split(paths=(), labels=empty, digests=()), features=np.empty((0, dim), np.float32)),
}
extractor = {"dim": dim, "precision": {"stored": "float32"}}
cache = FeatureCache(classes=("a",), extractor=extractor, splits=splits, provenance={"data": ""})
write_cache(Path(sys.argv[1]), cache)
assert verify_cache(sys.argv[1]).rows == n
# NOTE: not ru_maxrss, which a child has from its parent
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak memory")
def test_a_file_larger_than_the_memory_it_takes_is_written_and_verified(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path / "f.h5")], capture_output=True, text=True, check=True
    )
    megabytes = (tmp_path / "f.h5").stat().st_size // 1_000_000
    (tmp_path / "f.h5").unlink()
    assert megabytes > 600
    assert int(done.stdout) < 300_000  # kB
