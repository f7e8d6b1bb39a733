"""A cache that was written once, tests/golden/schema2.h5, is read for ever with every value in its place.

If a test here fails, caches on people's disks would be read wrongly or extracted again: raise the schema's number (or
the key's), or mend the change. Never write the golden file anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    hash_extractor,
    open_cache,
    open_sources,
    read_cache,
    verify_cache,
    write_cache,
)
from featcache.cache.reading import CURE
from featcache.dataset import Split
from featcache.errors import CacheError
from featcache.files import hash_file

GOLDEN = Path(__file__).parent / "golden" / "schema2.h5"
FILE_SHA256 = "56c8210108a1f35c22e2b0530f525173192f3c3c87b130f0472d74783ea31980"
CONTENT_SHA256 = "a4802d2cf50fdd806ebde3bedd99ed91b25734ba83ba0ec1dddb38c8970a3f07"
KEY = "4e0b0f95483e85a4d216edb871702b84ef726ecaeee0e43f688f2d0cedd83f44"

CLASSES = ("ants", "bees")
EXTRACTOR: dict[str, Any] = {
    "backbone": "golden",
    "weights": {"requested": "DEFAULT", "name": "golden.pth", "file_sha256": "f" * 64, "tensors_sha256": "a" * 64},
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
PROVENANCE = {"data": "/photos", "seconds": 1.5, "bad": [], "settings": {}}
PATHS = {
    "train": ("train/ants/0.jpg", "train/bees/1.jpg", "train/ants/2.jpg", "train/bees/3.jpg", "train/ants/4.jpg"),
    "val": ("val/ants/0.jpg", "val/bees/1.jpg", "val/ants/2.jpg"),
}
LABELS = {"train": [0, 1, 0, 1, 0], "val": [0, 1, 0]}
DIGESTS = {"train": ("1", "2", "3", "4", "5"), "val": ("b", "c", "d")}  # after 63 zeros
STATS = {
    "train": [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [108, 109, 110, 111],
        [112, 113, 114, 115],
        [116, 117, 118, 119],
    ],
    "val": [[1100, 1101, 1102, 1103], [1104, 1105, 1106, 1107], [1108, 1109, 1110, 1111]],
}
FEATURES = {
    "train": [
        [-1.0, -0.875, -0.75, -0.625],
        [-0.5, -0.375, -0.25, -0.125],
        [0.0, 0.125, 0.25, 0.375],
        [0.5, 0.625, 0.75, 0.875],
        [1.0, 1.125, 1.25, 1.375],
    ],
    "val": [
        [-11.0, -10.875, -10.75, -10.625],
        [-10.5, -10.375, -10.25, -10.125],
        [-10.0, -9.875, -9.75, -9.625],
    ],
}


def name_digests(split: str) -> tuple[str, ...]:
    return tuple(63 * "0" + digit for digit in DIGESTS[split])


def make_golden_cache() -> FeatureCache:
    """What the golden file was written from."""
    splits = {
        name: FeatureSplit(
            listing=Split(
                paths=PATHS[name],
                labels=np.array(LABELS[name], np.int64),
                digests=name_digests(name),
                stats=np.array(STATS[name], np.int64),
            ),
            features=np.array(FEATURES[name], np.float32),
        )
        for name in PATHS
    }
    return FeatureCache(classes=CLASSES, extractor=EXTRACTOR, splits=splits, provenance=PROVENANCE)


def test_the_golden_file_is_the_one_that_was_written_once() -> None:
    assert hash_file(GOLDEN) == FILE_SHA256


@pytest.mark.parametrize("read", [read_cache, open_cache])
def test_every_value_of_an_old_cache_is_read(read: Callable[[Path], FeatureCache]) -> None:
    cache = read(GOLDEN)
    assert (cache.classes, cache.extractor, cache.provenance) == (CLASSES, EXTRACTOR, PROVENANCE)
    assert (cache.key, cache.content_sha256) == (KEY, CONTENT_SHA256)
    assert (cache.dim, cache.stored, len(cache)) == (4, "float32", 8)
    assert (cache.listing.root, cache.listing.classes) == (Path("/photos"), CLASSES)
    assert list(cache.splits) == ["train", "val"]
    for name, split in cache.splits.items():
        assert (split.listing.paths, split.listing.digests) == (PATHS[name], name_digests(name))
        assert (split.listing.labels.tolist(), split.listing.labels.dtype) == (LABELS[name], np.dtype(np.int64))
        assert (split.listing.stats.tolist(), split.listing.stats.dtype) == (STATS[name], np.dtype(np.int64))
        assert (np.asarray(split.features).tolist(), split.features.dtype) == (FEATURES[name], np.float32)


def test_an_old_cache_is_verified() -> None:
    found = verify_cache(GOLDEN)
    assert (bool(found), found.rows, found.damaged, found.path) == (True, 8, (), GOLDEN)
    assert found.bytes == GOLDEN.stat().st_size
    assert found.cure == f"featcache extract /photos -o {GOLDEN} --rehash"


def test_a_stranger_reads_an_old_cache_with_h5py() -> None:
    with h5py.File(GOLDEN) as file:
        assert set(file) == {"train", "val"}
        for name, paths in PATHS.items():
            columns = {column: file[f"{name}/{column}"][:] for column in file[name]}
            assert set(columns) == {"features", "features_sha256", "labels", "paths", "digests", "stats"}
            assert (columns["features"].tolist(), columns["features"].dtype.str) == (FEATURES[name], "<f4")
            assert (columns["labels"].tolist(), columns["labels"].dtype.str) == (LABELS[name], "<i8")
            assert (columns["stats"].tolist(), columns["stats"].dtype.str) == (STATS[name], "<i8")
            assert tuple(value.decode() for value in columns["paths"].tolist()) == paths
            assert tuple(value.decode() for value in columns["digests"].tolist()) == name_digests(name)
        texts = {name: value.decode() for name, value in file.attrs.items() if name != "featcache_schema"}
        assert file.attrs["featcache_schema"] == 2
    assert (texts["extractor_key"], texts["content_sha256"]) == (KEY, CONTENT_SHA256)
    assert json.loads(texts["classes"]) == list(CLASSES)
    assert json.loads(texts["extractor"]) == EXTRACTOR
    assert json.loads(texts["provenance"]) == PROVENANCE


def test_the_rows_of_an_old_cache_are_served() -> None:
    with open_sources([GOLDEN], "<f4") as (sources, damaged):
        served = {
            digest: row
            for source in sources
            for digest, row in zip(source.digests, source.read(0, len(source.digests)).tolist(), strict=True)
        }
    assert damaged == []
    assert served == {
        digest: row for name in PATHS for digest, row in zip(name_digests(name), FEATURES[name], strict=True)
    }


def test_the_same_cache_written_today_has_the_same_digests(tmp_path: Path) -> None:
    written = write_cache(tmp_path / "today.h5", make_golden_cache())
    assert written.content_sha256 == CONTENT_SHA256
    with h5py.File(tmp_path / "today.h5") as today, h5py.File(GOLDEN) as golden:
        assert dict(today.attrs) == dict(golden.attrs)


@pytest.mark.parametrize("read", [read_cache, open_cache, verify_cache])
@pytest.mark.parametrize("schema", [1, 3])
def test_another_schema_is_refused_with_both_numbers(tmp_path: Path, schema: int, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "other.h5"
    shutil.copy(GOLDEN, path)
    with h5py.File(path, "r+") as file:
        file.attrs["featcache_schema"] = schema
    before = path.read_bytes()
    with pytest.raises(CacheError) as caught:
        read(path)
    assert str(caught.value) == f"{path} has cache schema {schema}, this featcache reads 2; {CURE}"
    assert path.read_bytes() == before


# The key: nobody's features are computed again because a line of code moved


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, KEY),
        (
            {"precision": {"compute": "float32", "stored": "float16"}},
            "2c46c372cba75aede3d91f043637b784fbd2a7c43780a868bf247b86da33bf72",
        ),
        ({"weights": None}, "dd9bb3a636793a17331441f33e36b753ebce2530bf45f39c9a88781a3e22d7a4"),
        ({"weights": {"tensors_sha256": "a" * 64}}, KEY),
    ],
    ids=["as it is", "float16", "no weights", "weights by their tensors alone"],
)
def test_the_key_of_a_description_never_changes(changes: dict[str, Any], key: str) -> None:
    assert hash_extractor({**EXTRACTOR, **changes}) == key
