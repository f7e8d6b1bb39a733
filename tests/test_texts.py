"""featcache.dataset.texts: packed or left on the disk, texts are the texts that they were; many are as few."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    PartSource,
    PartWriter,
    RowTable,
    list_parts,
    open_cache,
    open_sources,
    parts_path,
    read_cache,
    stream_cache,
    verify_cache,
    write_cache,
)
from featcache.config import HeadConfig
from featcache.dataset import (
    Listing,
    Split,
    dataset_fingerprint,
    find_shared_images,
    hold_out,
    list_doubts,
    split_by_content,
)
from featcache.dataset.listing import find_contradictions
from featcache.dataset.texts import (
    HexTexts,
    NamedFile,
    OpenFile,
    StoredTexts,
    TextColumn,
    TextIndex,
    Texts,
    TextSet,
    encode_all,
    hash_texts,
    measure_width,
    pack_blocks,
    pack_digests,
    pack_texts,
)
from featcache.errors import BadImage, CacheError
from featcache.files import canonical_json

DIGESTS = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
FEW_DIGESTS = st.integers(0, 9).map(lambda number: hashlib.sha256(str(number).encode()).hexdigest())
NAMES = st.binary(max_size=6).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))  # whatever a file may be called
CLASSES = ("b", "ä", "a")
KEY = "a" * 64


def store(texts: Sequence[str], folder: Path, named: bool) -> StoredTexts:
    """Texts in a file, something before and after them."""
    array, path = encode_all(texts), folder / f"{len(texts)}.bin"
    path.write_bytes(b"before" + array.tobytes() + b"after")
    with path.open("rb") as file:
        kept = NamedFile(path) if named else OpenFile(file.fileno(), path)
    return StoredTexts(kept, 6, len(array), array.dtype.itemsize)


KINDS: dict[str, Callable[[Sequence[str], Path], TextColumn]] = {
    "in an array": lambda texts, _: pack_texts(texts),
    "as digests": lambda texts, _: pack_digests(texts),
    "in an open file": lambda texts, folder: store(texts, folder, named=False),
    "in a file by its name": lambda texts, folder: store(texts, folder, named=True),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are many: all that is packed, left on the disk, or done block by block, is so."""
    for name in ("dataset.texts.MANY_TEXTS", "dataset.listing.MANY_TEXTS", "cache.reading.MANY_TEXTS"):
        monkeypatch.setattr(f"featcache.{name}", 2)
    for name in ("dataset.texts.BLOCK_TEXTS", "dataset.listing.BLOCK_TEXTS", "cache.writing.BLOCK_TEXTS"):
        monkeypatch.setattr(f"featcache.{name}", 3)
    for name in ("cache.rows.BLOCK_TEXTS", "dataset.texts.FOUND_TEXTS", "dataset.listing.SORTED_ROWS"):
        monkeypatch.setattr(f"featcache.{name}", 4)
    monkeypatch.setattr("featcache.cache.parts.LEFT_ROWS", 2)
    monkeypatch.setattr("featcache.cache.reading.COLUMN_BYTES", 100)


# A column is the sequence of its texts


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_column_is_the_sequence_of_its_texts(kind: str, data: st.DataObject) -> None:
    elements = st.one_of(DIGESTS, st.just("")) if kind == "as digests" else NAMES
    texts = data.draw(st.lists(elements, max_size=30))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.dataset.texts.BLOCK_TEXTS", 4)
        patch.setattr("featcache.dataset.texts.SPARSE", data.draw(st.integers(1, 4)))
        column = KINDS[kind](texts, Path(name))
        assert (len(column), list(column)) == (len(texts), texts)
        assert column == texts
        assert tuple(texts) == column
        for i in range(-len(texts), len(texts)):
            assert column[i] == column[np.int64(i)] == texts[i]
        rows = data.draw(st.slices(len(texts)))
        assert list(column[rows]) == texts[rows]
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))), bool)
        assert list(column.take(mask)) == [text for text, kept in zip(texts, mask, strict=True) if kept]
        places = data.draw(st.lists(st.integers(0, max(len(texts) - 1, 0)), max_size=9 if texts else 0))
        assert list(column.take(np.array(places, np.int64))) == [texts[i] for i in places]
        assert pickle.loads(pickle.dumps(column)) == texts
        assert [text in column for text in (*texts, "no such text", "\ud800")] == [*[True] * len(texts), False, False]
        assert np.array(column, dtype="S80").tolist() == [os.fsencode(text) for text in texts]
        assert measure_width(column) == max((len(os.fsencode(text)) for text in texts), default=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_equals_no_other_texts(kind: str, folder: Path) -> None:
    texts = [f"{i:064x}" for i in range(5)]
    column = KINDS[kind](texts, folder)
    for other in (texts[:4], [*texts[:4], "x"], [*texts, ""], pack_digests(texts[::-1]), "".join(texts), 5):
        assert column != other
    for row in (5, -6):
        with pytest.raises(IndexError):
            column[row]


@settings(deadline=None)
@given(digests=st.lists(st.one_of(DIGESTS, DIGESTS.map(str.upper), st.sampled_from(["", "a", "g" * 64, " " * 64]))))
def test_whatever_stands_for_digests_is_kept(digests: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.dataset.texts.BLOCK_TEXTS", 2)
        assert list(pack_digests(digests)) == list(pack_digests(np.array(digests, "S64"))) == digests
        blocks = (np.array(digests[start : start + 3], "S64") for start in range(0, len(digests), 3))
        assert list(pack_blocks(blocks, len(digests))) == digests


def test_digests_take_32_bytes_each() -> None:
    column = pack_digests([f"{i:064x}" for i in range(1000)])
    assert isinstance(column, HexTexts)
    assert len(pickle.dumps(column)) < 33_000


# What stays on the disk


def test_texts_of_an_open_file_stay_though_another_takes_its_name(folder: Path) -> None:
    texts = [str(i) for i in range(100)]
    column = store(texts, folder, named=False)
    (folder / "new").write_bytes(bytes(1000))
    (folder / "new").replace(folder / "100.bin")
    assert column == texts
    (folder / "100.bin").unlink()
    assert column[50:].take(np.arange(3)) == ["50", "51", "52"]


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_cut_short_is_a_cache_error(folder: Path, named: bool) -> None:
    column = store([str(i) for i in range(100)], folder, named)
    os.truncate(folder / "100.bin", 100)
    with pytest.raises(CacheError, match=r"100\.bin ends before its columns do \(200 bytes wanted\); extract again"):
        list(column)


def test_a_file_that_is_gone_is_a_cache_error(folder: Path) -> None:
    column = store(["a", "b"], folder, named=True)
    (folder / "2.bin").unlink()
    with pytest.raises(CacheError, match=r"2\.bin cannot be read: No such file or directory"):
        list(column)


def test_several_threads_may_read_the_same_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.dataset.texts.BLOCK_TEXTS", 16)
    texts = [str(i) for i in range(2000)]
    column = store(texts, folder, named=False)
    order = np.random.default_rng(0).integers(0, 2000, 4000).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(column.__getitem__, order)) == [texts[i] for i in order]


def count_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the open files")
def test_an_open_file_is_closed_when_nobody_needs_it(folder: Path) -> None:
    before = count_open()
    column = store(["a", "b"], folder, named=False)
    part = column[1:]
    assert count_open() == before + 1
    del column
    assert list(part) == ["b"]
    del part
    assert count_open() == before


# Texts are found


@settings(max_examples=60, deadline=None)
@given(
    columns=st.lists(st.lists(st.one_of(FEW_DIGESTS, st.just("")), max_size=12), max_size=4),
    wanted=st.lists(st.one_of(FEW_DIGESTS, DIGESTS, st.just("")), max_size=20),
    numbers=st.sampled_from([1, 2, 2**64]),
)
def test_the_first_place_of_each_text_is_found(columns: list[list[str]], wanted: list[str], numbers: int) -> None:
    first: dict[str, int] = {}
    for place, text in enumerate(text for column in columns for text in column):
        first.setdefault(text, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.dataset.texts.FOUND_TEXTS", 5)
        # whatever texts are hashed to: with few numbers most have that of another text too
        patch.setattr(
            "featcache.dataset.texts.hash_texts", lambda texts: hash_texts(texts) % np.uint64(min(numbers, 2**64 - 1))
        )
        index = TextIndex([pack_digests(column) for column in columns])
        expected = [first.get(text, -1) if text else -1 for text in wanted]
        assert index.find(wanted).tolist() == index.find(np.array(wanted, "S64")).tolist() == expected


@settings(deadline=None)
@given(texts=st.lists(NAMES, max_size=20), more=st.integers(0, 20))
def test_a_text_is_hashed_to_one_number_in_an_array_of_any_width(texts: list[str], more: int) -> None:
    array = encode_all(texts)
    wider = array.astype(f"S{array.dtype.itemsize + more}")
    assert hash_texts(array).tolist() == hash_texts(wider).tolist()


def test_the_numbers_of_many_digests_are_all_different() -> None:
    column = HexTexts(np.random.default_rng(0).integers(0, 256, (200_000, 32), np.uint8))
    assert len(np.unique(np.concatenate([hash_texts(block) for block in column.blocks()]))) == len(column)


@settings(deadline=None)
@given(columns=st.lists(st.lists(FEW_DIGESTS, max_size=9), max_size=3), other=st.lists(FEW_DIGESTS, max_size=9))
def test_a_set_of_packed_texts_is_a_set(columns: list[list[str]], other: list[str]) -> None:
    packed, plain = TextSet([pack_digests(column) for column in columns]), {text for one in columns for text in one}
    others = TextSet([pack_digests(other)])
    assert (len(packed), sorted(packed)) == (len(plain), sorted(plain))
    assert packed == plain
    assert (packed - others, packed - set(other), packed & others) == (plain - set(other),) * 2 + (plain & set(other),)
    assert [text in packed for text in (*other, "x", "\ud800", 5)] == [text in plain for text in (*other, "x", 1, 2)]


# Many rows are as few


ROWS = st.lists(st.tuples(NAMES, st.integers(0, 2), FEW_DIGESTS), max_size=25)


def make_split(rows: Sequence[tuple[str, int, str]]) -> Split:
    return Split(
        paths=tuple(path for path, _, _ in rows),
        labels=np.array([label for _, label, _ in rows], np.int64),
        digests=tuple(digest for _, _, digest in rows),
        stats=np.arange(4 * len(rows), dtype=np.int64).reshape(-1, 4) + 1,
    )


def make_listing(*splits: Sequence[tuple[str, int, str]]) -> Listing:
    names = ("train", "val", "test")
    return Listing(root=Path("photos"), classes=CLASSES, splits=dict(zip(names, map(make_split, splits), strict=False)))


def test_many_rows_are_packed_and_few_are_not(many: None) -> None:
    few, more = make_split([("a.jpg", 0, "0" * 64)]), make_split([("a.jpg", 0, "0" * 64)] * 2)
    assert (type(few.paths), type(few.digests)) == (tuple, tuple)
    assert (type(more.paths), type(more.digests)) == (Texts, HexTexts)
    assert (more.paths, more.digests) == (("a.jpg", "a.jpg"), ("0" * 64,) * 2)


def define_fingerprint(split: Split, classes: Sequence[str]) -> str:
    """What a fingerprint is, in one piece."""
    rows = sorted([digest, classes[label]] for digest, label in zip(split.digests, split.labels.tolist(), strict=True))
    return hashlib.sha256(canonical_json([list(classes), rows]).encode()).hexdigest()


ASCII = st.text(st.characters(min_codepoint=1, max_codepoint=126), max_size=5)  # any digest that a cache may hold


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.just("x"), st.integers(0, 2), st.one_of(FEW_DIGESTS, DIGESTS, ASCII)), max_size=40),
    classes=st.permutations(["a", "ü\n", 'Z"']),
    at_once=st.integers(1, 20),
)
def test_a_fingerprint_is_what_it_always_was(
    rows: list[tuple[str, int, str]], classes: list[str], at_once: int
) -> None:
    split = make_split(rows)
    packed = replace(split, digests=pack_digests(split.digests))
    expected = define_fingerprint(split, classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.dataset.listing.SORTED_ROWS", at_once)
        patch.setattr("featcache.dataset.texts.BLOCK_TEXTS", 7)
        assert dataset_fingerprint(split, classes) == dataset_fingerprint(packed, classes) == expected


def define_repeated(listing: Listing, by_label: bool) -> dict[str, list[str]]:
    """Images that are in two splits, or under two labels."""
    where: dict[str, dict[Any, list[str]]] = {}
    for name, split in listing.splits.items():
        for path, label, digest in zip(split.paths, split.labels.tolist(), split.digests, strict=True):
            where.setdefault(digest, {}).setdefault(label if by_label else name, []).append(path)
    return {
        digest: [path for paths in groups.values() for path in paths]
        for digest, groups in where.items()
        if len(groups) > 1
    }


@settings(max_examples=60, deadline=None)
@given(train=ROWS, val=ROWS, test=ROWS)
def test_doubts_are_what_they_always_were(train: Any, val: Any, test: Any) -> None:
    listing = make_listing(train, val, test)
    for found, by_label in ((find_shared_images(listing), False), (find_contradictions(listing), True)):
        expected = define_repeated(listing, by_label)
        assert list(found.items()) == list(expected.items())


@settings(max_examples=30, deadline=None)
@given(train=ROWS, val=ROWS)
def test_all_that_is_asked_of_a_listing_is_the_same_of_a_packed_one(train: Any, val: Any) -> None:
    plain = make_listing(train, val)
    left_out = [BadImage(path, "broken") for path, _, _ in train[:1]]
    expected = list_doubts(plain), plain.paths(), plain.digests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.dataset.listing.MANY_TEXTS", 2)
        patch.setattr("featcache.dataset.listing.check_classes_filled", lambda *_: None)
        packed = make_listing(train, val)
        assert (list_doubts(packed), packed.paths(), packed.digests()) == expected
        mine, theirs = packed.without(left_out).splits["train"], plain.without(left_out).splits["train"]
        assert (mine.paths, mine.digests) == (theirs.paths, theirs.digests)
        assert (mine.labels.tolist(), mine.stats.tolist()) == (theirs.labels.tolist(), theirs.stats.tolist())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_packed_rows_train_and_validate_as_plain_ones(seed: int) -> None:
    rows = [(f"{i}.jpg", i % 3, hashlib.sha256(f"{seed} {i // 2}".encode()).hexdigest()) for i in range(60)]
    plain = make_split(rows)
    packed = replace(plain, paths=pack_texts(plain.paths), digests=pack_digests(plain.digests))
    pairs = zip(
        split_by_content(plain, CLASSES, "x", 0.2, seed).values(),
        split_by_content(packed, CLASSES, "x", 0.2, seed).values(),
        strict=True,
    )
    for one, other in (
        *pairs,
        *zip(hold_out(plain, CLASSES, 0.2, seed), hold_out(packed, CLASSES, 0.2, seed), strict=True),
    ):
        assert (one.paths, one.digests, one.labels.tolist()) == (other.paths, other.digests, other.labels.tolist())


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), block=st.integers(1, 70), seed=st.integers(0, 9))
def test_what_sgd_holds_out_does_not_depend_on_how_many_are_drawn_at_a_time(
    labels: list[int], block: int, seed: int
) -> None:
    from featcache.heads import sgd

    numbers, config = np.array(labels), HeadConfig(folds=2, seed=seed)
    expected = np.random.default_rng(seed).random(len(labels)) < 1 / 2
    expected[np.unique(numbers, return_index=True)[1]] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgd, "BLOCK_LABELS", block)
        assert sgd.hold_out(numbers, config).tolist() == expected.tolist()


# A cache of many rows


EXTRACTOR = {
    "backbone": "tiny",
    "weights": "w" * 64,
    "dim": 2,
    "precision": {"compute": "float32", "stored": "float32"},
}


def make_cache(n: int = 30) -> FeatureCache:
    splits = {}
    for name, m in {"train": n, "val": 7, "test": 1}.items():
        rows = [
            (f"{name}/{i % 3}/ü{i * i}.jpg", i % 3, hashlib.sha256(f"{name} {i}".encode()).hexdigest())
            for i in range(m)
        ]
        features = np.random.default_rng(m).normal(size=(m, 2)).astype(np.float32)
        splits[name] = FeatureSplit(listing=make_split(rows), features=features)
    return FeatureCache(classes=CLASSES, extractor=EXTRACTOR, splits=splits, provenance={"data": "/photos"})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A cache that was written as few rows are."""
    write_cache(tmp_path / "small.h5", make_cache())
    return tmp_path / "small.h5"


def test_a_cache_of_many_rows_is_the_same_file(small: Path, many: None) -> None:
    write_cache(small.with_name("large.h5"), make_cache())
    assert small.with_name("large.h5").read_bytes() == small.read_bytes()
    write_cache(small.with_name("copy.h5"), read_cache(small))  # of columns that are on the disk
    assert small.with_name("copy.h5").read_bytes() == small.read_bytes()


def test_paths_are_as_wide_in_the_file_as_the_longest_of_those_that_are_left(small: Path, many: None) -> None:
    cache = read_cache(small)
    train = cache.splits["train"]
    listing = train.listing.take(np.arange(30) < 3)
    few = {**cache.splits, "train": FeatureSplit(listing=listing, features=train.features[:3])}
    write_cache(small, replace(cache, splits=few))
    with h5py.File(small) as file:
        assert file["train/paths"].dtype == f"S{len(os.fsencode('train/2/ü4.jpg'))}"


@pytest.mark.parametrize("read", [open_cache, read_cache])
def test_columns_of_many_rows_stay_on_the_disk_and_are_the_same(
    small: Path, many: None, read: Callable[[Path], FeatureCache]
) -> None:
    cache, expected = read(small), make_cache()
    small.unlink()
    for name, split in expected.splits.items():
        mine, theirs = cache.splits[name].listing, split.listing
        assert isinstance(mine.paths, tuple if len(split) == 1 else StoredTexts)
        assert (mine.paths, mine.digests) == (theirs.paths, theirs.digests)
        assert (mine.labels.tolist(), mine.stats.tolist()) == (theirs.labels.tolist(), theirs.stats.tolist())
        assert cache.splits[name].features.tolist() == split.features.tolist()


def test_columns_outlive_the_reader_that_they_came_from(small: Path, many: None) -> None:
    with stream_cache(small) as cache:
        listing = cache.splits["train"].listing
    assert listing.paths == make_cache().splits["train"].listing.paths


@pytest.mark.parametrize("read", [open_cache, read_cache, verify_cache])
@pytest.mark.parametrize("column", ["labels", "paths", "digests", "stats"])
def test_a_flipped_bit_in_a_column_of_many_rows_is_damage(
    small: Path, many: None, column: str, read: Callable[[Path], Any]
) -> None:
    with h5py.File(small) as file:
        dataset = file[f"train/{column}"]
        offset, size = dataset.id.get_offset(), dataset.nbytes
    data = bytearray(small.read_bytes())
    for at in (offset, offset + size // 2, offset + size - 1):
        data[at] ^= 1
        small.write_bytes(data)
        with pytest.raises(CacheError, match=f"is damaged: train/{column} is not what was written"):
            read(small)
        data[at] ^= 1
    small.write_bytes(data)
    assert read(small)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.jpg", "a/../../b.jpg"])
def test_no_path_of_many_leads_out_of_the_data(small: Path, many: None, path: str) -> None:
    cache = make_cache()
    train = cache.splits["train"]
    listing = replace(train.listing, paths=(*train.listing.paths[:-1], path))
    with pytest.raises(CacheError, match="leads out of the data"):  # the writer reads what it has written
        write_cache(small, replace(cache, splits={**cache.splits, "train": replace(train, listing=listing)}))


def test_rows_of_many_are_served_but_for_those_of_damaged_blocks(small: Path, many: None) -> None:
    with h5py.File(small) as file:
        offset = file["val/features"].id.get_offset()
    data = bytearray(small.read_bytes())
    data[offset] ^= 1
    small.write_bytes(data)
    listing = make_cache().listing.splits
    with open_sources([small], "<f4") as (sources, damaged):
        table = RowTable(sources, 2, "<f4")
        assert table.find(np.array(listing["train"].digests, "S64")).tolist() == list(range(30))
        assert table.find(np.array(listing["val"].digests, "S64")).tolist() == [-1] * 7
    assert damaged == [(small, "val", 0, 7)]


def test_opening_many_rows_takes_little_memory(tmp_path: Path) -> None:
    n = 1 << 17
    digests = HexTexts(np.random.default_rng(0).integers(0, 256, (n, 32), np.uint8))
    paths = Texts(np.char.add("train/class/image_", np.arange(n).astype("S8").astype(str)).astype("S32"))
    listing = Split(paths=paths, labels=np.arange(n) % 3, digests=digests, stats=np.ones((n, 4), np.int64))
    split = FeatureSplit(listing=listing, features=np.zeros((n, 2), np.float32))
    cache = make_cache()
    write_cache(tmp_path / "f.h5", replace(cache, splits={**cache.splits, "train": split}))
    tracemalloc.start()
    try:
        opened = open_cache(tmp_path / "f.h5")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert opened.splits["train"].listing.digests[n - 1] == digests[n - 1]
    assert peak < 5_000_000  # of columns that are 18 million bytes in the file, and as str three times that


# The digests of parts


def test_digests_of_a_part_are_left_on_the_disk(tmp_path: Path, many: None) -> None:
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20)]
    writer = PartWriter(parts_path(tmp_path / "f.h5"), KEY, "float16")
    writer.add(digests, np.arange(40, dtype=np.float32).reshape(20, 2))
    writer.flush()
    ((part,), _) = list_parts(tmp_path / "f.h5", "rows", KEY)
    assert isinstance(part.digests, StoredTexts)
    assert (part.digests, len(part)) == (digests, 20)
    assert part.columns["digests"].tolist() == [digest.encode() for digest in digests]
    table = RowTable([PartSource(part)], 2, "<f2")
    assert table.read(table.find(np.array(digests[::-1], "S64")))[:, 0].tolist() == list(range(38, -1, -2))
    part.path.unlink()
    with pytest.raises(CacheError, match="cannot be read: No such file"):
        table.find(np.array(digests, "S64"))
