"""featcache.dataset: a folder as a listing. Nothing is decoded, so most "images" here are a few bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import dataset
from featcache.dataset import (
    CLIP_EXTENSIONS,
    IMAGE_EXTENSIONS,
    KnownFiles,
    Listing,
    Split,
    dataset_fingerprint,
    describe_data,
    find_shared_images,
    hash_clip,
    hashing,
    hold_out,
    is_clip_name,
    is_image_name,
    is_validation,
    list_changed,
    list_clips,
    list_dataset,
    list_frames,
    list_images,
    samples,
    summarise,
)
from featcache.errors import BadImage, DatasetError, ImageError
from featcache.files import hash_bytes
from featcache.progress import Progress

DIGESTS = st.binary(min_size=1, max_size=8).map(lambda data: hashlib.sha256(data).hexdigest())


def put(path: Path, content: str | None = None) -> Path:
    """A file of its own content, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((str(path) if content is None else content).encode())
    return path


@pytest.fixture
def split_data(tmp_path: Path) -> Path:
    """DATA/{train,val}/{ants,bees}: 4 + 2 files of each class."""
    root = tmp_path / "split"
    for split, n in {"train": 4, "val": 2}.items():
        for name in ("ants", "bees"):
            for i in range(n):
                put(root / split / name / f"{i}.jpg", f"{split} {name} {i}")
    return root


def fill_flat(root: Path, n: int, classes: tuple[str, ...] = ("ants", "bees"), prefix: str = "") -> Path:
    for name in classes:
        for i in range(n):
            put(root / name / f"{prefix}{i}.jpg", f"{name} {i}")
    return root


def sides(listing: Listing) -> dict[str, str]:
    """The split of each image, by its content."""
    return {digest: name for name, split in listing.splits.items() for digest in split.digests}


def make_split(*rows: tuple[str, int, str]) -> Split:
    paths, labels, digests = zip(*rows, strict=True)
    return Split(paths=paths, labels=np.array(labels, dtype=np.int64), digests=digests)


# Names


def test_image_extensions_are_torchvisions() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMAGE_EXTENSIONS == IMG_EXTENSIONS


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_an_extension_counts_in_any_case(extension: str) -> None:
    assert is_image_name(f"a{extension}")
    assert is_image_name(f"A.B{extension.upper()}")


@pytest.mark.parametrize("name", ["a.gif", "a.txt", "jpg", ".hidden.jpg", "._a.jpg", "a.jpg.part", "a"])
def test_other_names_are_not_images(name: str) -> None:
    assert not is_image_name(name)


# The layout with split folders


def test_split_folders_are_kept_as_they_are(split_data: Path) -> None:
    listing = list_dataset(split_data)
    assert listing.classes == ("ants", "bees")
    assert {name: len(split) for name, split in listing.splits.items()} == {"train": 8, "val": 4}
    assert listing.splits["val"].paths == tuple(f"val/{c}/{i}.jpg" for c in ("ants", "bees") for i in range(2))
    assert listing.splits["val"].labels.tolist() == [0, 0, 1, 1]
    assert listing.splits["val"].labels.dtype == np.int64
    assert len(listing) == 12
    assert listing.paths() == [*listing.splits["train"].paths, *listing.splits["val"].paths]


def test_a_test_folder_becomes_the_third_split(split_data: Path) -> None:
    shutil.copytree(split_data / "val", split_data / "test")
    assert list(list_dataset(split_data).splits) == ["train", "val", "test"]


def test_digests_are_of_the_files_bytes(split_data: Path) -> None:
    split = list_dataset(split_data).splits["train"]
    for path, digest in zip(split.paths, split.digests, strict=True):
        assert digest == hashlib.sha256((split_data / path).read_bytes()).hexdigest()


def test_the_order_is_image_folders(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    names = (
        "10.jpg",
        "9.PNG",
        "a b.jpeg",
        "Z.webp",
        "ü.bmp",
        "sub/0.jpg",
        "sub-1/0.jpg",
        "sub/deep/x.ppm",
        "Sub/1.tif",
    )
    for split in ("train", "val"):
        for label in ("zebra", "Ape", "a-b", "a b", "1"):
            for name in names:
                put(tmp_path / split / label / name)
    listing = list_dataset(tmp_path)
    for split, rows in listing.splits.items():
        folder = ImageFolder(str(tmp_path / split))
        assert list(listing.classes) == folder.classes
        found = [(str(tmp_path / path), int(label)) for path, label in zip(rows.paths, rows.labels, strict=True)]
        assert found == folder.samples


@pytest.mark.parametrize("stray", ["notes.txt", "anim.gif", ".hidden.jpg", ".DS_Store", "Thumbs.db", "sub/x.txt"])
def test_a_stray_file_is_counted_and_not_listed(split_data: Path, stray: str) -> None:
    put(split_data / "train" / "ants" / stray)
    listing = list_dataset(split_data)
    assert listing.ignored == (f"train/ants/{stray}",)
    assert len(listing) == 12


def test_strays_beside_the_class_and_split_folders_are_counted(split_data: Path) -> None:
    put(split_data / "README.md")
    put(split_data / "val" / "labels.csv")
    assert list_dataset(split_data).ignored == ("README.md", "val/labels.csv")


def test_hidden_folders_hold_neither_classes_nor_images(split_data: Path) -> None:
    put(split_data / "train" / ".ipynb_checkpoints" / "0.jpg")
    put(split_data / "train" / "ants" / ".thumbnails" / "0.jpg")
    listing = list_dataset(split_data)
    assert listing.classes == ("ants", "bees")
    assert len(listing) == 12


def test_the_path_may_be_text(split_data: Path) -> None:
    assert list_dataset(str(split_data)).paths() == list_dataset(split_data).paths()


def test_reading_is_told_to_the_progress(split_data: Path) -> None:
    totals = []

    class Counter(Progress):
        def track(self, items, *, total, what, unit="img"):  # type: ignore[no-untyped-def]
            totals.append((total, what))
            yield from items

    list_dataset(split_data, progress=Counter())
    assert totals == [(12, "reading")]


# What is wrong with a folder


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no data set at .*nowhere: expected .*DATA/train.*found nothing"):
        list_dataset(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no data set at .*a\.jpg: .*found a file"):
        list_dataset(put(tmp_path / "a.jpg"))


def test_an_empty_folder_has_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no class folders: expected .*<class>/<image>, found no folders"):
        list_dataset(tmp_path)


def test_images_directly_in_the_folder_are_counted_in_the_message(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.jpg")
    with pytest.raises(DatasetError, match=r"no class folders: .* found 3 images directly in it"):
        list_dataset(tmp_path)


def test_an_empty_class_is_named(split_data: Path) -> None:
    put(split_data / "train" / "wasps" / "readme.txt")
    with pytest.raises(DatasetError, match=r"class folder .*train/wasps has no images: expected files ending in .jpg"):
        list_dataset(split_data)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_empty_split_is_named(split_data: Path, split: str) -> None:
    shutil.rmtree(split_data / split, ignore_errors=True)
    (split_data / split).mkdir()
    with pytest.raises(DatasetError, match=f"{split} has no class folders"):
        list_dataset(split_data)


@pytest.mark.parametrize(("gone", "left"), [("val", "train"), ("train", "val")])
def test_one_split_without_the_other_is_named(split_data: Path, gone: str, left: str) -> None:
    shutil.rmtree(split_data / gone)
    with pytest.raises(DatasetError, match=f"has no {gone} folder: .* found {left}; .*such as .*{left}"):
        list_dataset(split_data)


def test_a_test_split_alone_is_not_taken_for_a_class(split_data: Path) -> None:
    (split_data / "val").rename(split_data / "test")
    shutil.rmtree(split_data / "train")
    with pytest.raises(DatasetError, match="has no train folder"):
        list_dataset(split_data)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_missing_in_one_split_is_named(split_data: Path, split: str) -> None:
    shutil.rmtree(split_data / split / "bees")
    with pytest.raises(DatasetError, match=f"different classes: {split} lacks bees; expected .* in train, val"):
        list_dataset(split_data)


def test_a_class_whose_files_are_all_unreadable_is_named(split_data: Path) -> None:
    for i in range(2):
        (split_data / "val" / "bees" / f"{i}.jpg").unlink()
        (split_data / "val" / "bees" / f"{i}.jpg").symlink_to("nowhere")
    with pytest.raises(DatasetError, match=r"the val split of .* has no image of class bees"):
        list_dataset(split_data)


# Links and odd names


def test_a_dangling_link_is_a_bad_file_and_shifts_no_row(split_data: Path) -> None:
    (split_data / "train" / "ants" / "1b.jpg").symlink_to("nowhere.jpg")
    listing = list_dataset(split_data)
    assert listing.bad == (BadImage("train/ants/1b.jpg", "cannot be read: No such file or directory"),)
    split = listing.splits["train"]
    assert split.paths[:3] == ("train/ants/0.jpg", "train/ants/1.jpg", "train/ants/2.jpg")
    assert split.digests[2] == hashlib.sha256(b"train ants 2").hexdigest()


def test_a_link_to_an_image_and_to_a_folder_are_followed(split_data: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.jpg", "x")
    (split_data / "train" / "ants" / "linked").symlink_to(tmp_path / "elsewhere")
    (split_data / "train" / "bees" / "y.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    paths = list_dataset(split_data).splits["train"].paths
    assert {"train/ants/linked/x.jpg", "train/bees/y.jpg"} <= set(paths)
    assert len(paths) == 10


def test_a_loop_of_folder_links_ends(split_data: Path) -> None:
    ants = split_data / "train" / "ants"
    (ants / "sub").mkdir()
    (ants / "sub" / "up").symlink_to(ants)
    (ants / "again").symlink_to(split_data / "train")
    paths = list_dataset(split_data).splits["train"].paths
    assert sum(path.startswith("train/ants/") and path.count("/") == 2 for path in paths) == 4
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    "name", ["a b.jpg", "ü.jpg", "é\u0301.jpg", "line\nbreak.jpg", "back\\slash.jpg", "%s {0}.jpg"]
)
def test_any_file_name_survives(split_data: Path, name: str) -> None:
    put(split_data / "train" / "ants" / name)
    assert f"train/ants/{name}" in list_dataset(split_data).splits["train"].paths


def test_a_name_that_is_not_utf8_survives(split_data: Path) -> None:
    raw = os.fsencode(split_data) + b"/train/ants/\xff\xfe.jpg"
    Path(os.fsdecode(raw)).write_bytes(b"x")
    listing = list_dataset(split_data)
    path = next(path for path in listing.paths() if path.startswith("train/ants/\udcff"))
    assert os.fsencode(path) == b"train/ants/\xff\xfe.jpg"
    assert (listing.root / path).read_bytes() == b"x"
    assert dataset_fingerprint(listing.splits["train"], listing.classes)


def test_list_images_finds_all_images_below_a_folder_sorted(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/z.png", "a/y.txt", ".hidden/x.jpg", "a/.x.jpg"):
        put(tmp_path / name)
    assert list_images(tmp_path) == [str(tmp_path / "a/z.png"), str(tmp_path / "b.jpg")]


# The flat layout, split by content


def test_a_flat_folder_is_split_roughly_evenly_over_classes(tmp_path: Path) -> None:
    listing = list_dataset(fill_flat(tmp_path, 200, ("ants", "bees", "wasps")))
    assert list(listing.splits) == ["train", "val"]
    counts = np.bincount(listing.splits["val"].labels)
    assert len(counts) == 3
    assert (counts > 20).all()  # 40 expected, standard deviation 5.7
    assert (counts < 60).all()


def test_no_image_is_lost_or_doubled_by_the_split(tmp_path: Path) -> None:
    listing = list_dataset(fill_flat(tmp_path, 30))
    assert sorted(listing.paths()) == sorted(f"{c}/{i}.jpg" for c in ("ants", "bees") for i in range(30))
    for split in listing.splits.values():
        for path, label, digest in zip(split.paths, split.labels, split.digests, strict=True):
            assert listing.classes[label] == path.split("/")[0]
            assert digest == hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()


def test_rows_of_a_split_keep_image_folders_order(tmp_path: Path) -> None:
    listing = list_dataset(fill_flat(tmp_path, 30))
    for split in listing.splits.values():
        assert list(split.paths) == sorted(split.paths)


def test_the_split_does_not_depend_on_the_root_or_on_file_names(tmp_path: Path) -> None:
    first = list_dataset(fill_flat(tmp_path / "here", 25))
    second = list_dataset(fill_flat(tmp_path / "elsewhere" / "there", 25, prefix="renamed_"))
    assert sides(first) == sides(second)
    assert first.paths() != second.paths()


def test_old_images_keep_their_side_when_new_ones_are_added(tmp_path: Path) -> None:
    before = sides(list_dataset(fill_flat(tmp_path, 60)))
    after = sides(list_dataset(fill_flat(tmp_path, 150)))
    assert set(before.values()) == {"train", "val"}
    assert {digest: after[digest] for digest in before} == before


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    fill_flat(tmp_path, 40)
    assert sides(list_dataset(tmp_path, seed=0)) == sides(list_dataset(tmp_path, seed=0))
    assert sides(list_dataset(tmp_path, seed=0)) != sides(list_dataset(tmp_path, seed=1))


def test_the_seed_changes_nothing_where_there_are_split_folders(split_data: Path) -> None:
    assert list_dataset(split_data, seed=0).paths() == list_dataset(split_data, seed=1).paths()


def test_the_share_of_validation_follows_its_setting(tmp_path: Path) -> None:
    fill_flat(tmp_path, 200)
    sizes = [len(list_dataset(tmp_path, val_fraction=share).splits["val"]) for share in (0.1, 0.3, 0.6)]
    assert sizes == pytest.approx([40, 120, 240], abs=35)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("val_fraction", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_on_both_sides_however_small(tmp_path: Path, n: int, val_fraction: float, seed: int) -> None:
    listing = list_dataset(fill_flat(tmp_path, n, tuple("abcdef")), val_fraction=val_fraction, seed=seed)
    for split in listing.splits.values():
        assert set(split.labels.tolist()) == set(range(6))


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    fill_flat(tmp_path, 5)
    put(tmp_path / "wasps" / "0.jpg")
    with pytest.raises(DatasetError, match=r"class wasps of .* has 1 usable image: expected at least 2"):
        list_dataset(tmp_path)


def test_a_class_of_equal_images_cannot_be_split(tmp_path: Path) -> None:
    fill_flat(tmp_path, 5)
    for i in range(4):
        put(tmp_path / "wasps" / f"{i}.jpg", "the same")
    with pytest.raises(DatasetError, match="has no image of class wasps"):
        list_dataset(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_equal_bytes_are_on_one_side(tmp_path: Path, seed: int) -> None:
    fill_flat(tmp_path, 10)
    for i in range(10):
        put(tmp_path / "ants" / f"copy_{i}.jpg", f"ants {i}")
        put(tmp_path / "bees" / f"mislabelled_{i}.jpg", f"ants {i}")
    listing = list_dataset(tmp_path, seed=seed)
    assert find_shared_images(listing) == {}
    assert len(listing) == 40


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, name: str) -> None:
    listing = list_dataset(fill_flat(tmp_path, 5, ("ants", name)))
    assert listing.classes == tuple(sorted(("ants", name)))
    assert list(listing.splits) == ["train", "val"]


def test_strays_of_a_flat_folder_are_counted(tmp_path: Path) -> None:
    fill_flat(tmp_path, 3)
    put(tmp_path / "README.md")
    put(tmp_path / "ants" / "x.gif")
    assert list_dataset(tmp_path).ignored == ("README.md", "ants/x.gif")


@given(digests=st.lists(DIGESTS, unique=True, max_size=60), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=50, database=None)
def test_a_larger_share_never_takes_an_image_out_of_validation(digests: list[str], seed: int) -> None:
    previous: set[str] = set()
    for share in (0.0, 0.1, 0.2, 0.5, 0.9, 1.0):
        validation = {digest for digest in digests if is_validation(digest, share, seed)}
        assert previous <= validation
        previous = validation
    assert previous == set(digests)
    assert not any(is_validation(digest, 0.0, seed) for digest in digests)


@given(
    old=st.lists(DIGESTS, min_size=2, max_size=30, unique=True), new=st.lists(DIGESTS, max_size=30), seed=st.integers()
)
@settings(deadline=None, max_examples=60, database=None)
def test_images_that_no_class_needs_by_force_stay_when_others_are_added(
    old: list[str], new: list[str], seed: int
) -> None:
    from featcache.dataset import split_by_content

    def split(digests: list[str]) -> dict[str, str]:
        rows = make_split(*((f"{i}.jpg", 0, digest) for i, digest in enumerate(digests)))
        parts = split_by_content(rows, ["a"], "root", 0.2, seed)
        assert len(parts["train"]) > 0
        assert len(parts["val"]) > 0
        return {digest: name for name, part in parts.items() for digest in part.digests}

    before, after = split(old), split(old + [digest for digest in new if digest not in old])
    moved = {digest for digest in before if before[digest] != after[digest]}
    assert len(moved) <= 1
    for digest in moved:  # it was on its side only because the class had nobody else there
        assert before[digest] != ("val" if is_validation(digest, 0.2, seed) else "train")


def test_the_side_of_an_image_never_changes_between_versions() -> None:
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(30)]
    assert [i for i in range(30) if is_validation(digests[i], 0.2, 0)] == [5, 8, 9, 17, 18, 27, 28, 29]
    assert [i for i in range(30) if is_validation(digests[i], 0.2, 7)] == [0, 12, 15, 19, 27, 28]


# What is said of a listing


def test_images_in_two_splits_are_found_and_warned_of(split_data: Path) -> None:
    shutil.copy(split_data / "train" / "ants" / "2.jpg", split_data / "val" / "bees" / "copy.jpg")
    listing = list_dataset(split_data)
    digest = hashlib.sha256(b"train ants 2").hexdigest()
    assert find_shared_images(listing) == {digest: ["train/ants/2.jpg", "val/bees/copy.jpg"]}
    (line,) = (line for line in summarise(listing) if line.startswith("WARNING: leakage"))
    assert line.endswith("train/ants/2.jpg = val/bees/copy.jpg")


def test_copies_within_one_split_are_no_leakage(split_data: Path) -> None:
    shutil.copy(split_data / "train" / "ants" / "2.jpg", split_data / "train" / "ants" / "copy.jpg")
    listing = list_dataset(split_data)
    assert find_shared_images(listing) == {}
    assert summarise(listing) == [f"{split_data}: 9 train, 4 val images, 2 classes"]


def test_the_summary_names_some_of_the_ignored_files(split_data: Path) -> None:
    for i in range(5):
        put(split_data / "train" / "ants" / f"{i}.txt")
    line = summarise(list_dataset(split_data))[1]
    assert "ignored" in line
    assert line.endswith(": train/ants/0.txt, train/ants/1.txt, train/ants/2.txt and 2 more")


def test_the_description_is_plain_and_holds_the_fingerprints(split_data: Path) -> None:
    listing = list_dataset(split_data)
    described = describe_data(listing)
    assert described["folder"] == str(split_data.resolve())
    assert described["classes"] == ["ants", "bees"]
    assert described["images"] == {"train": 8, "val": 4}
    assert described["fingerprints"]["val"] == dataset_fingerprint(listing.splits["val"], listing.classes)


# Fingerprints

ROWS = (("a/0.jpg", 0, "00"), ("a/1.jpg", 0, "11"), ("b/2.jpg", 1, "22"), ("b/3.jpg", 1, "33"))


def test_a_fingerprint_ignores_order_and_names() -> None:
    rows = [(f"renamed/{digest}.png", label, digest) for _, label, digest in ROWS]
    random.Random(0).shuffle(rows)
    assert dataset_fingerprint(make_split(*rows), ["a", "b"]) == dataset_fingerprint(make_split(*ROWS), ["a", "b"])


CHANGES: dict[str, Callable[[list[tuple[str, int, str]]], list[tuple[str, int, str]]]] = {
    "label": lambda rows: [(rows[0][0], 1, rows[0][2]), *rows[1:]],
    "content": lambda rows: [(rows[0][0], 0, "44"), *rows[1:]],
    "one image fewer": lambda rows: rows[1:],
    "one image twice": lambda rows: [rows[0], *rows],
    "two labels swapped": lambda rows: [(rows[0][0], 1, "00"), rows[1], (rows[2][0], 0, "22"), rows[3]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_changes_with(change: str) -> None:
    changed = make_split(*CHANGES[change](list(ROWS)))
    assert dataset_fingerprint(changed, ["a", "b"]) != dataset_fingerprint(make_split(*ROWS), ["a", "b"])


def test_a_fingerprint_changes_with_the_names_of_the_classes() -> None:
    split = make_split(*ROWS)
    fingerprints = [dataset_fingerprint(split, classes) for classes in (["a", "b"], ["a", "c"], ["a", "b", "c"])]
    assert len(set(fingerprints)) == 3


# Leaving rows out


def test_without_leaves_out_exactly_the_bad_files(split_data: Path) -> None:
    bad = [BadImage("train/ants/1.jpg", "damaged"), BadImage("val/bees/0.jpg", "damaged")]
    before = list_dataset(split_data)
    after = before.without(bad)
    assert after.bad == tuple(bad)
    assert set(before.paths()) - set(after.paths()) == {"train/ants/1.jpg", "val/bees/0.jpg"}
    assert after.splits["train"].digests == before.splits["train"].digests[:1] + before.splits["train"].digests[2:]
    assert after.splits["val"].labels.tolist() == [0, 0, 1]
    assert len(before) == 12


def test_without_nothing_is_the_same_rows(split_data: Path) -> None:
    listing = list_dataset(split_data)
    assert listing.without([]).paths() == listing.paths()


def test_without_the_last_image_of_a_class_is_an_error(split_data: Path) -> None:
    listing = list_dataset(split_data)
    with pytest.raises(DatasetError, match=r"the val split of .*bad files left out has no image of class ants"):
        listing.without([BadImage(f"val/ants/{i}.jpg", "damaged") for i in range(2)])


def test_take_keeps_rows_together() -> None:
    taken = make_split(*ROWS).take(np.array([False, True, True, False]))
    assert (taken.paths, taken.labels.tolist(), taken.digests) == (("a/1.jpg", "b/2.jpg"), [0, 1], ("11", "22"))
    assert len(make_split(*ROWS).take(np.zeros(4, dtype=bool))) == 0


def test_the_real_photographs_are_listed_as_image_folder_lists_them(hymenoptera: Path) -> None:
    from torchvision.datasets import ImageFolder

    listing = list_dataset(hymenoptera)
    assert {name: len(split) for name, split in listing.splits.items()} == {"train": 244, "val": 153}
    assert len(listing.ignored) == 1
    assert listing.ignored[0].endswith(".gif")
    for name, split in listing.splits.items():
        samples = ImageFolder(str(hymenoptera / name)).samples
        assert [
            (str(hymenoptera / path), int(label)) for path, label in zip(split.paths, split.labels, strict=True)
        ] == samples


def test_a_link_to_itself_is_a_bad_image(photos: Path) -> None:
    (photos / "train/red/self.jpg").symlink_to("self.jpg")
    assert [item.path for item in list_dataset(photos).bad] == ["train/red/self.jpg"]


def test_a_pipe_is_a_bad_image_and_is_not_waited_for(photos: Path) -> None:
    os.mkfifo(photos / "train/red/pipe.jpg")
    assert [tuple(item) for item in list_dataset(photos).bad] == [("train/red/pipe.jpg", "not a regular file")]


def test_a_folder_beside_the_splits_is_said_to_be_ignored(photos: Path) -> None:
    (photos / "Test/red").mkdir(parents=True)
    assert "Test/" in list_dataset(photos).ignored


def test_a_link_that_leads_upwards_is_not_followed(photos: Path) -> None:
    (photos / "train/red/up").symlink_to("../..")
    (photos / "train/loop").symlink_to("../..")
    listing = list_dataset(photos)
    assert (len(listing), listing.classes) == (18, ("blue", "red"))


def test_the_same_image_under_two_labels_is_said_loudly(photos: Path) -> None:
    shutil.copy(photos / "train/red/photo_000.jpg", photos / "train/blue/copy.jpg")
    assert any("different labels" in line and "train/blue/copy.jpg" in line for line in summarise(list_dataset(photos)))


def test_a_single_class_is_said_loudly(photos: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(photos / split / "red")
    assert any("only one class, blue" in line for line in summarise(list_dataset(photos)))


# Clips


@pytest.fixture
def clip_data(tmp_path: Path) -> Path:
    """DATA/{train,val}/{run,walk}: a video file, a folder of 11 frames and one of 2, deeper."""
    root = tmp_path / "clips"
    for split in ("train", "val"):
        for label in ("run", "walk"):
            folder = root / split / label
            put(folder / "a.mp4")
            for i in range(11):
                put(folder / "b" / f"frame{i}.jpg")
            for i in range(2):
                put(folder / "deep" / "c.avi" / f"{i}.PNG")
    return root


@pytest.mark.parametrize("extension", CLIP_EXTENSIONS)
def test_a_clips_extension_counts_in_any_case(extension: str) -> None:
    assert is_clip_name(f"a{extension}")
    assert is_clip_name(f"A.B{extension.upper()}")
    assert not is_clip_name(f".a{extension}")


def test_clips_are_video_files_and_folders_of_frames(clip_data: Path) -> None:
    listing = list_dataset(clip_data, clips=True)
    paths = tuple(f"val/{label}/{name}" for label in ("run", "walk") for name in ("a.mp4", "b", "deep/c.avi"))
    assert listing.splits["val"].paths == paths
    assert listing.splits["val"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (listing.clips, listing.noun, listing.ignored) == (True, "clip", ())
    assert listing.splits["val"].digests[0] == hashlib.sha256((clip_data / "val/run/a.mp4").read_bytes()).hexdigest()


def test_a_flat_folder_of_clips_is_split_by_content(clip_data: Path) -> None:
    listing = list_dataset(clip_data / "train", clips=True)
    assert sorted(listing.paths()) == sorted(f"{c}/{n}" for c in ("run", "walk") for n in ("a.mp4", "b", "deep/c.avi"))


def test_the_digest_of_a_folder_is_of_what_sha256sum_prints_of_its_frames(clip_data: Path) -> None:
    folder = clip_data / "train/run/b"
    names = [f"frame{i}.jpg" for i in range(11)]
    assert list_frames(folder) == names
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert list_dataset(clip_data, clips=True).splits["train"].digests[1] == digest == hash_clip(folder)


def test_a_frames_name_cannot_pass_for_two_frames(tmp_path: Path) -> None:
    put(tmp_path / "two/a.jpg", "a")
    put(tmp_path / "two/b.jpg", "b")
    put(tmp_path / "one" / f"a.jpg\n{hashlib.sha256(b'b').hexdigest()}  b.jpg", "a")
    assert hash_clip(tmp_path / "one") != hash_clip(tmp_path / "two")


@pytest.mark.parametrize("change", ["content", "name", "one more", "one less", "order"])
def test_the_digest_of_a_folder_changes_with(clip_data: Path, change: str) -> None:
    folder = clip_data / "train/run/b"
    before = hash_clip(folder)
    first, second = (folder / name for name in list_frames(folder)[:2])
    if change == "content":
        put(first, "other")
    elif change == "name":
        first.rename(folder / "frame.jpg")
    elif change == "one more":
        put(folder / "frame99.jpg")
    elif change == "one less":
        second.unlink()
    else:
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    assert hash_clip(folder) != before


@pytest.mark.parametrize("stray", ["still.jpg", "notes.txt", "b/notes.txt", ".a.mp4", "b/.frame.jpg"])
def test_what_is_no_clip_and_no_frame_is_ignored(clip_data: Path, stray: str) -> None:
    put(clip_data / "train/run" / stray)
    listing = list_dataset(clip_data, clips=True)
    assert (len(listing), listing.ignored) == (12, (f"train/run/{stray}",))
    assert summarise(listing) == [
        f"{clip_data}: 6 train, 6 val clips, 2 classes",
        f"ignored, not a clip in a class folder: train/run/{stray}",
    ]


def test_a_clip_in_two_splits_leaks(clip_data: Path) -> None:
    shutil.copytree(clip_data / "train/run/b", clip_data / "val/run/again")
    (line,) = summarise(list_dataset(clip_data, clips=True))[1:]
    assert line.startswith("WARNING: leakage, the same clip in more than one split")
    assert "train/run/b = val/run/again" in line


@pytest.mark.parametrize("kind", ["pipe", "dangling"])
def test_a_frame_that_cannot_be_read_makes_its_clip_a_bad_one(clip_data: Path, kind: str) -> None:
    frame = clip_data / "train/run/b/frame3.jpg"
    frame.unlink()
    if kind == "pipe":
        os.mkfifo(frame)
    else:
        frame.symlink_to("nowhere")
    reason = {"pipe": "not a regular file", "dangling": "cannot be read: No such file or directory"}[kind]
    listing = list_dataset(clip_data, clips=True)
    assert listing.bad == (BadImage("train/run/b", f"frame frame3.jpg {reason}"),)
    assert listing.splits["train"].paths[:2] == ("train/run/a.mp4", "train/run/deep/c.avi")
    assert listing.without(listing.bad).clips


@pytest.mark.parametrize("clips", [False, True])
def test_a_listing_of_images_and_one_of_clips_know_the_other(tmp_path: Path, clips: bool) -> None:
    for split in ("train", "val"):
        for label in ("run", "walk"):
            put(tmp_path / split / label / ("a.jpg" if clips else "a.mp4"))
    expected = {
        True: r"train/run has no clips: .* found 1 images directly in it; use an image backbone such as resnet18",
        False: r"train/run has no images: .* found 1 that look like video files; use a video backbone such as r3d_18",
    }
    with pytest.raises(DatasetError, match=expected[clips]):
        list_dataset(tmp_path, clips=clips)


def test_an_empty_class_of_clips_says_what_is_expected(clip_data: Path) -> None:
    put(clip_data / "train/swim/readme.txt")
    with pytest.raises(DatasetError, match=r"swim has no clips: expected video files ending in .mp4 .* or folders of"):
        list_dataset(clip_data, clips=True)
    with pytest.raises(DatasetError, match=r"no class folders: expected .*<class>/<clip>, found 1 clips directly"):
        list_dataset(put(clip_data / "lone/a.gif").parent, clips=True)


def test_a_class_without_a_usable_clip_is_named(clip_data: Path) -> None:
    listing = list_dataset(clip_data, clips=True)
    bad = [BadImage(path, "damaged") for path in listing.splits["val"].paths[:3]]
    with pytest.raises(DatasetError, match="has no clip of class run; add clips"):
        listing.without(bad)


def test_list_clips_finds_all_clips_below_a_folder_and_the_folder_itself(clip_data: Path) -> None:
    run = clip_data / "train/run"
    assert list_clips(run) == [str(run / name) for name in ("a.mp4", "b", "deep/c.avi")]
    assert list_clips(run / "b") == [str(run / "b")]
    assert list_clips(run / "deep") == [str(run / "deep/c.avi")]


def settle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes on until no file's time stamp could still be given again."""
    now = max(path.stat().st_ctime_ns for path in root.rglob("*")) + 10 * dataset.RACY_NS
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now)


def know_clips(listing: Listing) -> KnownFiles:
    splits = listing.splits.values()
    return KnownFiles(
        np.concatenate([split.stats for split in splits]),
        np.concatenate([np.array(split.digests, "S64") for split in splits]),
    )


def test_settled_clips_are_not_read_again(clip_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(clip_data, monkeypatch)
    first = list_dataset(clip_data, clips=True)
    assert all(split.stats.any(axis=1).all() for split in first.splits.values())
    assert first.splits["train"].stats[1][1] == sum(p.stat().st_size for p in (clip_data / "train/run/b").iterdir())
    monkeypatch.setattr(hashing, "_try_hash", pytest.fail)
    again = list_dataset(clip_data, clips=True, known=know_clips(first))
    assert [split.digests for split in again.splits.values()] == [split.digests for split in first.splits.values()]
    assert list_changed(again) == []


def test_a_clip_is_not_trusted_while_one_of_its_frames_is_fresh(
    clip_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(clip_data, monkeypatch)
    frame = clip_data / "train/run/b/frame3.jpg"
    os.utime(frame, ns=(0, hashing.time.time_ns()))
    stats = list_dataset(clip_data, clips=True).splits["train"].stats
    assert stats.any(axis=1).tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("change", ["content", "name", "one more", "one less"])
def test_a_changed_frame_changes_its_clip_and_no_other(
    clip_data: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    settle(clip_data, monkeypatch)
    first = list_dataset(clip_data, clips=True)
    folder = clip_data / "train/run/b"
    if change == "content":
        kept = (folder / "frame3.jpg").stat()
        put(folder / "frame3.jpg", "x" * kept.st_size)
        os.utime(folder / "frame3.jpg", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    elif change == "name":
        (folder / "frame3.jpg").rename(folder / "frame3b.jpg")
    elif change == "one more":
        put(folder / "frame99.jpg")
    else:
        (folder / "frame3.jpg").unlink()
    assert list_changed(first) == ["train/run/b"]
    again = list_dataset(clip_data, clips=True, known=know_clips(first))
    differs = [a != b for a, b in zip(first.splits["train"].digests, again.splits["train"].digests, strict=True)]
    assert differs == [False, True, False, False, False, False]


def test_a_clip_that_goes_is_one_that_cannot_be_read(clip_data: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        hash_clip(clip_data / "nowhere")
    (clip_data / "empty").mkdir()
    with pytest.raises(ImageError, match="has no frames any more"):
        hash_clip(clip_data / "empty")


# --- images held out --------------------------------------------------------------------------------------------------


def make_classes(counts: Sequence[int], *, twins: int = 1) -> Split:
    """So many images of each class, every content `twins` times."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return Split(
        paths=tuple(f"{i}.jpg" for i in range(len(labels))),
        labels=labels,
        digests=tuple(hash_bytes(f"{label} {i // twins}".encode()) for i, label in enumerate(labels)),
    )


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), share=st.floats(0.01, 0.99), seed=st.integers(0, 3))
def test_held_out_images_are_a_share_of_each_class_and_never_all_of_it(
    counts: list[int], share: float, seed: int
) -> None:
    rows, classes = make_classes(counts), [str(c) for c in range(len(counts))]
    if max(counts) == 1:
        with pytest.raises(DatasetError, match=r"no class has two training images that differ.*--select-on none"):
            hold_out(rows, classes, share, seed)
        return
    train, held = hold_out(rows, classes, share, seed)
    assert sorted(train.paths + held.paths) == sorted(rows.paths)
    assert len(held) > 0
    of_train, of_held = (np.bincount(part.labels, minlength=len(counts)) for part in (train, held))
    assert (of_train > 0).all()
    wanted = [min(round(share * n), n - 1) for n in counts]
    assert of_held.tolist() == wanted or sum(wanted) == 0


def test_equal_bytes_are_held_out_together_and_another_seed_holds_out_others() -> None:
    rows = make_classes([20, 20], twins=2)
    train, held = hold_out(rows, ["a", "b"], 0.3, 0)
    assert not set(train.digests) & set(held.digests)
    assert {hold_out(rows, ["a", "b"], 0.3, seed)[1].paths for seed in range(5)} > {held.paths}


def test_what_is_held_out_does_not_depend_on_the_order_or_on_other_images() -> None:
    rows = make_classes([12, 12])
    _, held = hold_out(rows, ["a", "b"], 0.25, 0)
    backwards = Split(paths=rows.paths[::-1], labels=rows.labels[::-1], digests=rows.digests[::-1])
    assert set(hold_out(backwards, ["a", "b"], 0.25, 0)[1].paths) == set(held.paths)


def test_many_samples_are_hashed_some_at_a_time_with_the_same_outcome(
    flat_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (flat_photos / "green" / "gone.jpg").symlink_to("nowhere")
    (flat_photos / "red" / "also_gone.jpg").symlink_to("nowhere")
    few = list_dataset(flat_photos)
    monkeypatch.setattr(samples, "MANY_SAMPLES", 10)
    monkeypatch.setattr(samples, "SAMPLES_AT_ONCE", 7)
    kept: list[int] = []
    many = list_dataset(flat_photos, keep=lambda stats, digests: kept.append(len(digests)))
    assert many.bad == few.bad
    assert len(many.bad) == 2
    for name, split in few.splits.items():
        assert list(many.splits[name].paths) == list(split.paths)
        assert list(many.splits[name].digests) == list(split.digests)
        assert many.splits[name].labels.tolist() == split.labels.tolist()
        assert np.array_equal(many.splits[name].stats, split.stats)
    assert max(kept, default=0) <= 7
