"""Data sets that are no local folders: URLs, tar shards, lists, Hugging Face; the same rows, whatever they lie in."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import COUNTER, Outcome, Store, TinyFamily, draw_photo
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from source_fixture import (
    BLUE,
    RED,
    encode,
    list_photos,
    list_rows,
    make_hub_rows,
    pack_pattern,
    pack_shards,
    pack_split_folders,
    save_hub_rows,
    upload,
    upload_photos,
    upload_shards,
    write_csv,
    write_json_lines,
    write_parquet,
    write_tar,
)

import featcache
from featcache.dataset import (
    KnownFiles,
    Listing,
    find_samples,
    list_changed,
    list_dataset,
    name_root,
    names_source,
    open_root,
    reopen_root,
)
from featcache.dataset import remote as remote_files
from featcache.dataset import tars as tar_files
from featcache.errors import DatasetError, MissingExtraError
from featcache.images import ImageRows, decode_nothing, make_loader


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def memory_url() -> Iterator[str]:
    """An empty folder of fsspec's file system in memory."""
    fs, url = fsspec.filesystem("memory"), f"memory://sources-{next(COUNTER)}"
    yield url
    if fs.exists(url):
        fs.rm(url, recursive=True)


def describe_rows(listing: Listing) -> list[tuple[str, str, str]]:
    """Split, class and digest of each row, in order."""
    return [
        (name, listing.classes[label], digest)
        for name, split in listing.splits.items()
        for label, digest in zip(split.labels.tolist(), split.digests, strict=True)
    ]


# Each kind, made of the same photographs


KINDS = [
    *(upload_photos, pack_shards, pack_split_folders, pack_pattern, upload_shards),
    *(write_csv, write_json_lines, write_parquet, save_hub_rows),
]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_same_images_give_the_same_rows_whatever_they_lie_in(
    make: Callable[[Path, Path], str], photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    data = make(photos, tmp_path / "packed")
    plain = featcache.extract_features(photos, tmp_path / "plain.h5", backbone="tiny", weights="none").cache
    found = featcache.extract_features(data, tmp_path / "found.h5", backbone="tiny", weights="none").cache
    assert found.classes == plain.classes
    for name, split in plain.splits.items():
        other = found.splits[name]
        assert other.listing.labels.tolist() == split.listing.labels.tolist()
        assert list(other.listing.digests) == list(split.listing.digests)
        assert np.array_equal(other.features[:], split.features[:])
    calls, root = tiny.calls, reopen_root(found.provenance["data"])
    assert root is not None
    assert (root / found.splits["val"].listing.paths[0]).read_bytes() in {
        path.read_bytes() for _, path in list_photos(photos, "val")
    }
    again = featcache.extract_features(data, tmp_path / "found.h5", backbone="tiny", weights="none")
    assert again.computed == 0
    assert tiny.calls == calls


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_root_is_the_same_in_another_process(make: Callable[[Path, Path], str], photos: Path, tmp_path: Path) -> None:
    listing = list_dataset(make(photos, tmp_path / "packed"))
    root = pickle.loads(pickle.dumps(listing.root))
    assert name_root(root) == name_root(listing.root)
    split = listing.splits["train"]
    rows = ImageRows(root, split.paths, transform=decode_nothing, digests=split.digests)
    bad = [one for batch in make_loader(rows, batch_size=5) for one in batch.bad]
    assert bad == []


# URLs

NAMES = st.sampled_from(["1.jpg", "2.PNG", "b1.jpeg", "notes.txt", ".hidden.jpg", "clip.mp4"])
FOLDERS = st.sampled_from(["train", "val", "test", "a", "b", ".git", "x.h5.parts", "y.parts", "rows-1"])
PATHS = st.lists(st.tuples(st.lists(FOLDERS, max_size=4).map(tuple), NAMES), min_size=1, max_size=14, unique=True)


def describe_names(data: Path | str) -> Any:
    """The names of a data set, or what is wrong with it."""
    try:
        samples = find_samples(data)
    except DatasetError as error:
        return str(error).replace(str(data), "DATA")
    rows = {name: (list(rows.paths), rows.labels.tolist()) for name, rows in samples.groups.items()}
    return samples.classes, rows, samples.ignored


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATHS)
def test_a_tree_is_listed_alike_on_the_disk_and_at_a_url(
    tmp_path: Path, paths: list[tuple[tuple[str, ...], str]]
) -> None:
    number = next(COUNTER)
    root, url = tmp_path / str(number), f"memory://tree-{os.getpid()}-{number}"
    fs = fsspec.filesystem("memory")
    for folders, name in paths:
        path = root.joinpath(*folders, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path.relative_to(root)).encode())
    upload(root, url)
    outcomes = [describe_names(data) for data in (root, url)]
    fs.rm(url, recursive=True)
    assert outcomes[0] == outcomes[1]


def test_a_mark_that_stands_for_a_folder_is_no_file(photos: Path, memory_url: str, monkeypatch: Any) -> None:
    upload(photos, memory_url)
    whole = remote_files.list_tree(memory_url)
    marked = remote_files.SeenTree({name: remote_files.Seen() for name in (*whole, "train/", "train/blue/", "empty/")})
    monkeypatch.setattr(remote_files, "list_tree", lambda url: marked)
    samples = find_samples(memory_url)
    assert len(samples) == 18
    assert samples.ignored == ("empty/",)


def test_a_local_url_is_a_local_folder(photos: Path) -> None:
    listing = list_dataset(f"file://{photos}")
    assert listing.root == photos


def test_images_on_an_object_store_are_read_once_and_only_what_has_changed_again(
    s3: Store, photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(photos, f"{s3.url}/deep/photos")
    plain = featcache.extract_features(photos, tmp_path / "plain.h5", backbone="tiny", weights="none")
    read: list[str] = []
    read_url = remote_files.read_url
    monkeypatch.setattr(remote_files, "read_url", lambda url, *span: read.append(url) or read_url(url, *span))

    def extract() -> Any:
        read.clear()
        return featcache.extract_features(f"{url}/", tmp_path / "far.h5", backbone="tiny", weights="none")

    first = extract()
    with plain.path.open("rb"), first.path.open("rb"):
        assert first.cache.splits["train"].listing.paths == plain.cache.splits["train"].listing.paths
        assert np.array_equal(first.cache.splits["train"].features[:], plain.cache.splits["train"].features[:])
    assert first.cache.provenance["data"] == url
    assert 2 * 18 <= len(read) <= 2 * 18 + 2  # for the digests, and to decode; some for a look at the network
    assert extract().computed == 0
    assert read == []
    fsspec.filesystem("s3").pipe_file(f"{url}/train/blue/photo_000.jpg", encode())
    again = extract()
    assert again.computed == 1
    assert set(read) == {f"{url}/train/blue/photo_000.jpg"}


def test_tar_shards_on_an_object_store_are_read_by_ranges(
    s3: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_shards(photos, tmp_path / "shards")
    url = upload(tmp_path / "shards", f"{s3.url}/shards")
    listing = list_dataset(url)
    assert describe_rows(listing) == describe_rows(list_dataset(tmp_path / "shards"))
    assert name_root(listing.root) == f"{url}/*.tar"
    split = listing.splits["train"]
    assert split.stats.any(axis=1).all()
    known = KnownFiles(split.stats, np.array(list(split.digests), "S64"))
    monkeypatch.setattr(tar_files, "read_range", lambda *where: pytest.fail("read again"))
    assert "" not in known.find(list_dataset(url, known=make_known(listing)).splits["train"].stats)


def make_known(listing: Listing) -> KnownFiles:
    stats = np.concatenate([split.stats for split in listing.splits.values()])
    return KnownFiles(stats, np.array([digest for split in listing.splits.values() for digest in split.digests], "S64"))


def test_a_file_whose_store_proves_nothing_is_read_again(photos: Path, memory_url: str) -> None:
    listing = list_dataset(upload(photos, memory_url))
    assert not any(split.stats.any() for split in listing.splits.values())


@pytest.mark.parametrize(
    "info",
    [{}, {"ETag": ""}, {"ETag": 'W/"12"'}, {"VersionId": "null"}, {"mtime": 1.0}, {"created": 2.0}, {"etag": None}],
    ids=str,
)
def test_a_size_and_a_time_prove_nothing(info: dict[str, Any]) -> None:
    assert remote_files.describe_info("s3://b/a.jpg", {"size": 3, **info}).stats == (0, 0, 0, 0)


def test_what_is_replaced_between_listing_and_reading_is_not_trusted(
    s3: Store, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(photos, f"{s3.url}/photos")
    source = open_root(url)
    source.find()  # type: ignore[union-attr]
    path = "train/blue/photo_000.jpg"
    fsspec.filesystem("s3").pipe_file(f"{url}/{path}", encode())
    assert source.prove(path, encode()) == (0, 0, 0, 0)  # type: ignore[union-attr]
    other = "train/blue/photo_001.jpg"
    assert any(source.prove(other, (photos / other).read_bytes()))  # type: ignore[union-attr]


def test_changed_objects_are_told_of(s3: Store, photos: Path) -> None:
    url = upload(photos, f"{s3.url}/photos")
    listing = list_dataset(url)
    assert list_changed(listing) == []
    fsspec.filesystem("s3").pipe_file(f"{url}/val/red/photo_001.jpg", encode())
    fsspec.filesystem("s3").rm_file(f"{url}/val/red/photo_002.jpg")
    assert list_changed(listing) == ["val/red/photo_001.jpg", "val/red/photo_002.jpg"]


def test_many_objects_are_read_at_the_same_time(photos: Path, memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(photos, memory_url)
    waiting = threading.Barrier(12)  # of 18 files; each waits until 12 are being read

    def read_url(url: str, *span: int) -> bytes:
        with_others.append(waiting.wait(timeout=20))
        return fsspec.filesystem("memory").cat_file(url)

    with_others: list[int] = []
    monkeypatch.setattr(remote_files, "read_url", read_url)
    samples = find_samples(memory_url)
    train = samples.groups["train"]
    rows = ImageRows(samples.root, list(train.paths), transform=decode_nothing)  # type: ignore[arg-type]
    batches = list(make_loader(rows, batch_size=12, workers=0))
    assert [len(batch.rows) for batch in batches] == [12]
    assert len(with_others) == 12


def test_what_is_not_there_is_told_of_in_one_line(s3: Store, cli: Callable[..., Outcome], memory_url: str) -> None:
    for data, words in {
        f"{s3.url}/nothing": f"{s3.url}/nothing",
        "s3://no-such-bucket-at-all/photos": "bucket",
        memory_url: memory_url,
        "nonsense://photos": "nonsense",
        "file://photos": "file:///",
        "photos-{0..3}.tar": "photos-0.tar",
        "nothing.tar": "nothing.tar",
        "nothing.csv": "nothing.csv",
        "s3://bucket/photos.tar.gz": "gunzip",
        "{a,b}" * 60 + ".tar": "names more than 100,000 tars",
        "{a,b}" * 2000 + ".tar": "names more than 100,000 tars",
        "x" * 300: "found nothing",
        "x" * 300 + ".tar": "found nothing",
        "x" * 300 + ".csv": "found nothing",
        "x" * 300 + "/*.tar": "cannot look into",
        "hf:" + "x" * 300: "cannot be loaded",
        "http://me:pass@[::1/photos": "is no URL",
        "http://[::1/photos.tar": "is no URL",
        "data://;base64,AAAA": "cannot be read",
    }.items():
        outcome = cli("extract", data, "--backbone", "tiny")
        assert outcome.code == 1, data
        assert len(outcome.err.splitlines()) == 1, outcome.err
        assert words in outcome.err
        assert "me:pass" not in outcome.err


def test_a_name_in_a_store_that_no_file_can_have_is_told_of(memory_url: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"{memory_url}/a/\ud800.jpg", encode())
    with pytest.raises(DatasetError, match=r"the name 'a/\\ud800.jpg'"):
        list_dataset(memory_url)


def test_without_the_package_for_a_store_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    remote_files._connect.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[s3\]'"):
        open_root("s3://bucket/photos")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[hf\]'"):
        open_root("hf:user/name")


@pytest.mark.parametrize(
    "url", ["ftp://me:opensesame@host/photos", "https://host/a.tar?X-Amz-Signature=opensesame", "s3://k:opensesame@b/x"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(
    url: str, cli: Callable[..., Outcome], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,label\n{url},a\n")
    for data in (url, listed):
        outcome = cli("extract", data, "--backbone", "tiny", "--weights", "none")
        assert outcome.code == 1
        assert "opensesame" not in outcome.err
        assert "environment" in outcome.err


def test_a_file_that_cannot_be_read_is_a_bad_image(
    photos: Path, memory_url: str, cli: Callable[..., Outcome], tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(photos, memory_url)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{memory_url}/train/red/empty.jpg", b"")
    fs.pipe_file(f"{memory_url}/train/red/broken.jpg", encode()[:400])
    outcome = cli("extract", memory_url, "--backbone", "tiny", "--weights", "none")
    assert outcome.code == 1
    assert "2 files cannot be used as images" in outcome.err
    outcome = cli("extract", memory_url, "--backbone", "tiny", "--weights", "none", "--skip-bad", "--json")
    assert outcome.json["rows"] == 18
    assert {Path(one["path"]).name for one in outcome.json["bad_images"]} == {"empty.jpg", "broken.jpg"}


def test_clips_are_read_from_the_disk_only(memory_url: str, photos: Path) -> None:
    with pytest.raises(DatasetError, match="no local folder"):
        list_dataset(upload(photos, memory_url), clips=True)


def test_every_command_takes_a_url(
    photos: Path, memory_url: str, cli: Callable[..., Outcome], tiny: type[TinyFamily], blank_figures: None
) -> None:
    upload(photos, memory_url)
    how = ("--backbone", "tiny", "--weights", "none")
    assert cli("extract", memory_url, *how, "-o", "f.h5").code == 0
    assert cli("cache", "explain", memory_url, *how, "-o", "f.h5").code == 0
    outcome = cli("train-head", "f.h5", "-o", "runs/head")
    assert outcome.code == 0, outcome.err
    outcome = cli("finetune", memory_url, *how, "--epochs", 1, "-o", "runs/fine", "--no-cache-images")
    assert outcome.code == 0, outcome.err
    for target in ([memory_url, "--backbone", "resnet18"], ["f.h5"], ["runs/head"]):
        outcome = cli("show", *target, "-o", "x.png", "-n", 2)
        assert outcome.code == 0, outcome.err
    outcome = cli("show", memory_url, "--image", "val/red/photo_000.jpg", "-o", "x.png", "-n", 2)
    assert outcome.code == 0, outcome.err
    outcome = cli("predict", "runs/head", f"{memory_url}/val", f"{memory_url}/train/red/photo_000.jpg", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json) == 7
    outcome = cli("compare", memory_url, *how, "--epochs", 1, "--dry-run", "--features", "f.h5")
    assert outcome.code == 0, outcome.err


def test_pages_show_the_images_of_a_source(photos: Path, memory_url: str) -> None:
    from featcache.thumbnails import make_thumbnails

    upload(photos, memory_url)
    root = reopen_root(memory_url)
    assert root is not None
    paths = ["val/red/photo_000.jpg", "val/red/nothing.jpg", "../val/red/photo_000.jpg", f"{memory_url}/val/red/a.jpg"]
    found = dict(make_thumbnails(root, paths))
    assert [uri is not None for uri in found.values()] == [True, False, False, False]
    assert reopen_root(f"{memory_url}-gone") is None


def test_a_file_of_features_at_a_url_is_no_data_set() -> None:
    assert not names_source("s3://bucket/features.h5")
    assert names_source("photos.tar")
    assert names_source("hf:user/name")
    assert not names_source("photos")


# Tar shards


def read_tar(path: Path | str) -> Listing:
    return list_dataset(path, val_fraction=0.5)


def make_members(n: int = 4) -> list[tuple[str, bytes]]:
    """2n members: n images of two classes, their labels."""
    images = [encode(draw_photo((40 + 60 * (i % 2), 60, 200), i)) for i in range(n)]
    return [
        member
        for i, data in enumerate(images)
        for member in ((f"{i:03d}.jpg", data), (f"{i:03d}.cls", f"{i % 2}\n".encode()))
    ]


def test_what_is_no_image_and_no_label_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was loaded",))

    others = [(f"000.{ending}", pickle.dumps(Bomb())) for ending in ("pyd", "pickle", "pth", "npy", "pkl", "txt")]
    path = write_tar(tmp_path / "a.tar", [*make_members(), *others, ("._001.jpg", b"x"), ("002.seg.png", b"x")])
    listing = read_tar(path)
    assert len(listing) == 4
    assert sorted(listing.ignored) == sorted(
        f"a.tar/{name}" for name in (*(name for name, _ in others), "._001.jpg", "002.seg.png")
    )


def test_classes_that_are_integers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    members = [
        member
        for i in range(24)
        for member in ((f"{i}.png", encode(RED, "PNG") + bytes([i])), (f"{i}.cls", b"%d" % (i % 12)))
    ]
    assert find_samples(write_tar(tmp_path / "a.tar", members)).classes == tuple(str(i) for i in range(12))


@pytest.mark.parametrize("values", [{"label": 3}, {"cls": "3"}, {"class": 3}, {"class_name": "3", "x": None}], ids=str)
def test_a_label_may_be_in_json(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write_tar(tmp_path / "a.tar", [("x/1.json", json.dumps(values).encode()), ("x/1.jpg", encode())])
    samples = find_samples(path)
    assert samples.classes == ("3",)
    assert list(samples.groups[""].paths) == ["a.tar/x/1.jpg"]


def test_shards_without_a_split_are_split_by_content_as_a_folder_is(flat_photos: Path, tmp_path: Path) -> None:
    members = []
    for path in sorted(flat_photos.rglob("*.jpg")):
        key = f"{path.parent.name}/{path.stem}"
        members += [(f"./{key}.cls", path.parent.name.encode()), (f"./{key}.jpg", path.read_bytes())]
    for i in range(3):
        write_tar(tmp_path / f"shards/{i}.tar", members[40 * i : 40 * (i + 1)])
    assert describe_rows(list_dataset(tmp_path / "shards")) == describe_rows(list_dataset(flat_photos))


def test_tars_that_lie_about_among_class_folders_are_ignored(photos: Path) -> None:
    write_tar(photos / "backup.tar", make_members())
    write_tar(photos / "train/backup.tar", make_members())
    assert list_dataset(photos).ignored == ("backup.tar", "train/backup.tar")


def test_a_tar_is_known_again_by_its_stats_and_read_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", make_members())
    monkeypatch.setattr(tar_files, "RACY_NS", -(10**18))
    listing = read_tar(path)
    known = make_known(listing)
    with monkeypatch.context() as patch:
        patch.setattr(tar_files, "read_range", lambda *where: pytest.fail("read again"))
        assert describe_rows(list_dataset(path, val_fraction=0.5, known=known)) == describe_rows(listing)
    assert list_changed(listing) == []
    os.utime(path, (1, 1))
    assert len(list_changed(listing)) == 4
    read: list[int] = []
    read_range = tar_files.read_range
    monkeypatch.setattr(tar_files, "read_range", lambda *where: read.append(1) or read_range(*where))
    list_dataset(path, val_fraction=0.5, known=known)
    assert len(read) == 4


def test_a_tar_that_was_just_written_is_not_trusted(tmp_path: Path) -> None:
    listing = read_tar(write_tar(tmp_path / "a.tar", make_members()))
    assert not any(split.stats.any() for split in listing.splits.values())


def test_an_image_of_a_tar_that_was_replaced_is_not_read_from_the_old_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", make_members())
    root = open_root(path)
    root.find()  # type: ignore[union-attr]
    assert (root / "a.tar/002.jpg").read_bytes() == make_members()[4][1]
    write_tar(path, [("first.txt", b"x" * 2000), *make_members()])
    with pytest.raises(OSError, match="has changed"):
        (root / "a.tar/002.jpg").read_bytes()
    with pytest.raises(FileNotFoundError):
        (root / "a.tar/nothing.jpg").read_bytes()


def add_member(kind: bytes, name: str, **how: Any) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type = kind
        for key, value in how.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size))

    return add


def add_header(**fields: Any) -> Callable[[tarfile.TarFile], None]:
    """A header whose size says more than there is."""

    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(fields.pop("name", "h"))
        for key, value in fields.items():
            setattr(info, key, value)
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))  # type: ignore[union-attr]
        tar.offset += 512

    return add


HOSTILE = {
    "a link": (add_member(tarfile.SYMTYPE, "1.jpg", linkname="/etc/passwd"), "is a link"),
    "a hard link": (add_member(tarfile.LNKTYPE, "1.jpg", linkname="000.jpg"), "is a link"),
    "a device": (add_member(tarfile.CHRTYPE, "1.jpg"), "no file"),
    "a fifo": (add_member(tarfile.FIFOTYPE, "1.jpg"), "no file"),
    "an absolute name": (add_member(tarfile.REGTYPE, "/etc/1.jpg"), "leads out"),
    "a name that leads upwards": (add_member(tarfile.REGTYPE, "a/../../1.jpg"), "leads out"),
    "a sparse file": (
        add_member(
            tarfile.REGTYPE, "1.jpg", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9" * 15}, size=512
        ),
        "sparse",
    ),
    "a long name of a terabyte": (add_header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 40), "header of"),
    "extended attributes of a terabyte": (add_header(type=tarfile.XHDTYPE, size=1 << 40), "header of"),
    "a file of a terabyte": (add_header(name="1.jpg", size=1 << 40), "damaged"),
    "a negative size": (add_header(name="1.jpg", size=-1024), "damaged"),
    "a label of a megabyte": (add_member(tarfile.REGTYPE, "9.cls", size=1 << 20), "a label of 65,536 at most"),
    "a label that is no text": (lambda tar: add_data(tar, "9.cls", b"\xff\xfe"), "no UTF-8"),
    "an empty label": (lambda tar: add_data(tar, "9.cls", b" \n"), "is ''"),
    "json that is none": (lambda tar: add_data(tar, "9.json", b"{"), "no JSON"),
    "json as deep as a well": (lambda tar: add_data(tar, "9.json", b"[" * 60_000), "no JSON"),
    "a label that is a list": (lambda tar: add_data(tar, "9.json", b'{"label": [1]}'), "label"),
    "a label that is true": (lambda tar: add_data(tar, "9.json", b'{"label": true}'), "label"),
    "an image without a label": (lambda tar: add_data(tar, "9.jpg", encode()), "no label"),
    "a sample with two images": (lambda tar: add_data(tar, "001.png", encode()), "2 images"),
    "an image with a dot in its name": (lambda tar: add_data(tar, "v1.9.jpg", encode()), "a dot within its name"),
    "a label that is there twice": (lambda tar: add_data(tar, "001.cls", b"1"), "twice"),
    "an integer of 5,000 digits": (lambda tar: add_data(tar, "9.json", b'{"label": %s}' % (b"1" * 5000)), "no JSON"),
    "a label that nothing can write": (lambda tar: add_data(tar, "9.json", b'{"label": "\\ud800"}'), r"is '\ud800'"),
    "a label with a NUL": (lambda tar: add_data(tar, "9.cls", b"a\0b"), "without NUL"),
    "a label as long as a page": (lambda tar: add_data(tar, "9.cls", b"x" * 1001), "1,000 characters at most"),
    "a label of two lines": (lambda tar: add_data(tar, "9.json", b'{"label": "a\\nb"}') or add_pair(tar), r"a\x0ab"),
    "a name of two lines": (lambda tar: add_data(tar, "a\nb.jpg", encode()), r"a\x0ab.jpg has no label"),
    "two images of two lines": (
        lambda tar: [add_data(tar, f"a\nb.{kind}", encode()) for kind in ("jpg", "png")],
        r"a\x0ab.jpg, a\x0ab.png",
    ),
    "a long name": (lambda tar: add_data(tar, "x" * 2000 + ".jpg", encode()), "(2,004 characters)"),
    "a name longer than any path": (lambda tar: add_data(tar, "x" * 5000 + ".jpg", encode()), "too long"),
}
MAX_MESSAGE = 700  # characters; folders of tests have long names


def add_data(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def add_pair(tar: tarfile.TarFile) -> None:
    """The image of a sample that is labelled already."""
    add_data(tar, "9.jpg", encode())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_told_of_in_one_line(name: str, tmp_path: Path) -> None:
    spoil, words = HOSTILE[name]
    path = write_tar(tmp_path / "a.tar", [])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in make_members():
            add_data(tar, member, data)
        spoil(tar)
    started = time.monotonic()
    with pytest.raises(DatasetError) as caught:
        read_tar(path)
    assert time.monotonic() - started < 10
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < MAX_MESSAGE
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is unpacked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:3000], "damaged"),
        (lambda data: data[:512], "damaged"),
        (lambda data: data[:100], "damaged"),
        (lambda data: b"", "empty"),
        (lambda data: b"no tar at all" * 100, "damaged"),
        (lambda data: data + data, "after its end"),
        (lambda data: __import__("gzip").compress(data), "gunzip"),
        (lambda data: data.rstrip(b"\0")[:-700] + b"\1" * 4096, "damaged"),
    ],
)
def test_a_tar_that_is_not_whole_is_told_of(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    path = write_tar(tmp_path / "a.tar", make_members())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError, match=words):
        read_tar(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_with_any_bytes_changed_is_listed_or_told_of(tmp_path: Path, data: st.DataObject) -> None:
    path = write_tar(tmp_path / "a.tar", make_members(2))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 511), st.integers(0, len(whole) - 1)))
        whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        listing = read_tar(path)
    except DatasetError as error:
        lines = str(error).splitlines()
    else:
        lines = listing.paths()
    assert len(lines) in (1, 2)


def test_compressed_tars_in_a_folder_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(DatasetError, match="gunzip"):
        list_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-0.tar", "other.tar"], "of no split"),
        (["val-0.tar", "test-0.tar"], "no tars to train on"),
    ],
)
def test_tars_of_which_only_some_are_of_a_split_are_told_of(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        write_tar(tmp_path / name, make_members())
    with pytest.raises(DatasetError, match=words):
        list_dataset(tmp_path)


def test_tars_for_training_and_testing_validate_on_some_of_the_training(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", make_members(12))
    write_tar(tmp_path / "test-0.tar", make_members(2))
    listing = list_dataset(tmp_path)
    assert list(listing.splits) == ["train", "val", "test"]
    assert len(listing.splits["test"]) == 2
    assert len(listing) == 14


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4))
def test_braces_count_up_and_down(first: int, last: int, width: int) -> None:
    names = tar_files.expand_braces(f"x-{{{first:0{width}d}..{last:0{width}d}}}-{{a,b}}.tar")
    step = 1 if first <= last else -1
    padded = width if (width > 1 and min(first, last) < 10 ** (width - 1)) else 0
    numbers = [f"{number:0{padded}d}" for number in range(first, last + step, step)]
    assume(first or last)
    assert names == [f"x-{number}-{letter}.tar" for number in numbers for letter in "ab"]


def test_braces_that_name_a_million_tars_are_refused() -> None:
    with pytest.raises(DatasetError, match="tars"):
        open_root("x-{0..9999}-{0..9999}.tar")
    with pytest.raises(DatasetError, match="tars"):
        open_root("x-{0..99999999999}.tar")


# Lists


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture(params=[".csv", ".tsv", ".jsonl", ".parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_list_keeps_its_order(tmp_path: Path, suffix: str) -> None:
    names = [f"{i}.jpg" for i in np.random.default_rng(0).permutation(20)]
    rows = [
        {"image": name, "target": "ab"[i % 2], "split": ["train", "valid"][i // 10]} for i, name in enumerate(names)
    ]
    samples = find_samples(write_list(tmp_path / f"list{suffix}", rows))
    assert list(samples.groups["train"].paths) == names[:10]
    assert list(samples.groups["val"].paths) == names[10:]
    assert samples.groups["train"].labels.tolist() == [0, 1] * 5


def test_a_list_without_a_split_is_split_by_content(flat_photos: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"path": str(path), "label": path.parent.name} for path in sorted(flat_photos.rglob("*.jpg"))]
    listing = list_dataset(write_list(tmp_path / f"list{suffix}", rows))
    assert describe_rows(listing) == describe_rows(list_dataset(flat_photos))


def test_paths_below_the_list_are_relative_and_others_are_urls(tmp_path: Path, memory_url: str) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (tmp_path / "up.jpg").write_bytes(encode())
    (folder / "near.jpg").write_bytes(encode(BLUE))
    fsspec.filesystem("memory").pipe_file(f"{memory_url}/far.jpg", encode(BLUE))
    paths = ["./near.jpg", "../up.jpg", f"{memory_url}/far.jpg", f"file://{tmp_path}/up.jpg"]
    rows = [{"path": path, "label": "a"} for path in paths[:3]]
    listing = list_dataset(write_list(folder / "a.csv", rows), val_fraction=0.5)
    found = {path for split in listing.splits.values() for path in split.paths}
    assert found == {"near.jpg", f"file://{tmp_path}/up.jpg", f"{memory_url}/far.jpg"}
    assert listing.bad == ()
    with pytest.raises(DatasetError, match=r"line 3 has the path .* as line 2 has"):
        list_dataset(write_list(folder / "b.csv", [{"path": path, "label": "a"} for path in paths[1:4:2]]))


def test_a_list_that_a_cache_names_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(encode())
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "near.jpg").write_bytes(encode())
    listed = write_list(folder / "a.csv", [{"path": "near.jpg", "label": "a"}])
    root = reopen_root(str(listed))
    assert root is not None
    assert (root / "near.jpg").read_bytes() == encode()
    with pytest.raises(OSError, match="names no"):
        (root / f"file://{tmp_path}/secret.jpg").read_bytes()


def test_a_list_on_a_store_names_what_lies_beside_it(photos: Path, memory_url: str, tmp_path: Path) -> None:
    rows = [{**row, "path": os.path.relpath(row["path"], photos)} for row in list_rows(photos)]
    write_list(photos / "list.csv", rows)
    upload(photos, memory_url)
    assert describe_rows(list_dataset(f"{memory_url}/list.csv")) == describe_rows(list_dataset(photos))
    fsspec.filesystem("memory").pipe_file(f"{memory_url}/bad.csv", b"path,label\n/etc/a.jpg,a\n")
    with pytest.raises(DatasetError, match="on whatever machine"):
        list_dataset(f"{memory_url}/bad.csv")


@pytest.mark.parametrize("data", ["x\0y", "x\0y.tar", "x\0y/*.tar", "x\0y.csv", "\ud800/*.tar", "x\ny"], ids=ascii)
def test_what_cannot_be_a_name_is_told_of_in_one_line(data: str) -> None:
    with pytest.raises(DatasetError) as caught:
        open_root(data)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "path", ["data://;base64,AAAA", "DATA://;base64,AAAA", "generic://file:///etc/a.jpg", "asynclocal:///etc/a.jpg"]
)
def test_a_list_on_a_store_names_places_only(path: str, memory_url: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"{memory_url}/bad.csv", f'path,label\n"{path}",a\n'.encode())
    with pytest.raises(DatasetError, match=r"path of line 2: .* cannot be read: expected one URL"):
        list_dataset(f"{memory_url}/bad.csv")


@pytest.mark.parametrize("other", ["//x/red/0.jpg", "/x//red/./0.jpg", "file:////x/red/0.jpg", "/../x/red/0.jpg"])
def test_an_image_that_is_listed_by_two_paths_is_told_of(other: str, tmp_path: Path) -> None:
    rows = [{"path": path, "label": "a"} for path in ("/x/red/0.jpg", other)]
    with pytest.raises(DatasetError, match=r"line 2 has the path .*, as line 1 has"):
        find_samples(write_list(tmp_path / "a.jsonl", rows))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters()), st.text(st.characters()))
def test_any_path_and_label_of_a_list_can_be_kept_or_is_told_of_in_one_line(
    tmp_path: Path, path: str, label: str
) -> None:
    rows = [{"path": path, "label": label}, {"path": "x.jpg", "label": "other"}]
    listed = write_list(tmp_path / "a.jsonl", rows)
    with pytest.raises(DatasetError) as caught:  # if it is only that no image is there
        list_dataset(listed)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < MAX_MESSAGE
    with contextlib.suppress(DatasetError):
        samples = find_samples(listed)
        for text in (*samples.classes, *samples.groups[""].paths):
            assert os.fsdecode(os.fsencode(text)) == text
            assert "\0" not in text


@pytest.mark.parametrize("label", ["\ud800", "\udcc3\udca9", "x" * 1001, "a\0"], ids=ascii)
def test_a_label_that_cannot_be_kept_is_refused_before_anything_is_computed(
    label: str, photos: Path, tmp_path: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily]
) -> None:
    rows = [{**row, "label": label if row["label"] == "red" else row["label"]} for row in list_rows(photos)]
    outcome = cli("extract", write_list(tmp_path / "a.jsonl", rows), "--backbone", "tiny", "--weights", "none")
    assert outcome.code == 1
    assert "the label of line" in outcome.err
    assert tiny.calls == 0


@pytest.mark.parametrize("label", ["\udcff", "a\nb", "\x1b[31m", "x" * 1000], ids=ascii)
def test_an_odd_label_is_kept(
    label: str, photos: Path, tmp_path: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily]
) -> None:
    rows = [{**row, "label": label if row["label"] == "red" else row["label"]} for row in list_rows(photos)]
    listed = write_list(tmp_path / "a.jsonl", rows)
    outcome = cli("extract", listed, "--backbone", "tiny", "--weights", "none", "-o", tmp_path / "f.h5")
    assert outcome.code == 0, outcome.err
    assert label in featcache.open_cache(tmp_path / "f.h5").classes


def test_images_of_a_list_are_known_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.dataset import lists

    monkeypatch.setattr(lists, "RACY_NS", -(10**18))
    listed = write_list(tmp_path / "list.csv", list_rows(photos))
    listing = list_dataset(listed)
    assert all(split.stats.any(axis=1).all() for split in listing.splits.values())
    monkeypatch.setattr(lists.ListedFiles, "read", lambda self, path: pytest.fail("read again"))
    assert describe_rows(list_dataset(listed, known=make_known(listing))) == describe_rows(listing)
    (photos / "val/red/photo_001.jpg").write_bytes(encode())
    (photos / "val/red/photo_002.jpg").unlink()
    assert len(list_changed(listing)) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "path,label\n", "is empty"),
        ("a.csv", "path,other\nx.jpg,1\n", "no column label"),
        ("a.csv", "label,other\nx,1\n", "no column path"),
        ("a.csv", "image,file,label\nx.jpg,y.jpg,1\n", "call the one that is meant path"),
        ("a.csv", "path,label\nx.jpg,\n", "label of line 2 is ''"),
        ("a.csv", "path,label\n,a\n", "path of line 2 is ''"),
        ("a.csv", "path,label,split\nx.jpg,a,dev\n", "split of line 2 is 'dev'"),
        ("a.csv", "path,label,split\nx.jpg,a,val\n", "no train rows"),
        ("a.csv", "path,label\nx.jpg,a\ny.jpg,a\nx.jpg,b\n", "line 4 has the path x.jpg, as line 2 has"),
        ("a.csv", "path,label\nx.jpg,a,b\n", "3 fields"),
        ("a.csv", 'path,label\n"x.jpg,a\n', "cannot be read"),
        ("a.jsonl", "{}\n", "no column path"),
        ("a.jsonl", '["x.jpg", 1]\n', "no object"),
        ("a.jsonl", '{"path": "x.jpg", "label": 1}\n{"path": "y.jpg"}\n', "label of line 2 is None"),
        ("a.jsonl", '{"path": "x.jpg", "label": 1.5}\n', "label of line 1 is 1.5"),
        ("a.jsonl", '{"path": "x.jpg", "label": true}\n', "label of line 1 is True"),
        ("a.jsonl", '{"path": 3, "label": 1}\n', "path of line 1 is 3"),
        ("a.jsonl", '{"path": "x.jpg", "label": 1, "split": "train"}\n{"path": "y.jpg", "label": 1}\n', "no split"),
        ("a.jsonl", '{"path": "x.jpg"\n', "no JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", "no JSON"),
        ("a.jsonl", '{"path": "x.jpg", "label": %s}\n' % ("1" * 5000), "line 1 is no JSON"),
        ("a.jsonl", '{"path": "data/\\ud800.jpg", "label": 1}\n', r"path of line 1 is 'data/\ud800.jpg'"),
        ("a.jsonl", '{"path": "%s.jpg", "label": 1}\n' % ("x" * 5000), "(5,006 characters)"),
        ("a.jsonl", '{"path": "http://[::1/y.jpg", "label": 1}\n', "path of line 1: an address http://... is no URL"),
        ("a.jsonl", '{"path": "a\\nb", "label": 1}\n' * 2, r"line 2 has the path a\x0ab"),
        ("a.jsonl", '{"path": "x.jpg", "label": "\\ud800"}\n', r"label of line 1 is '\ud800'"),
        ("a.jsonl", '{"path": "x.jpg", "label": "a\\u0000"}\n', "without NUL"),
        ("a.jsonl", '{"path": "x.jpg", "label": "%s"}\n' % ("x" * 1001), "1,000 characters at most"),
        ("a.jsonl", '{"path": "x.jpg", "label": ["%s"]}\n' % ("x" * 5000), "label of line 1 is a list"),
        ("a.jsonl", '{"path": "x.jpg", "label": 1, "split": "%s"}\n' % ("x" * 5000), "split of line 1 is 'x"),
        ("a.jsonl", '{"a\\nb": 1, "%s": 2}\n' % ("x" * 5000), r"its columns are a\x0ab, x"),
        ("a.parquet", "PAR1 or not", "cannot be read as a Parquet table"),
    ],
)
def test_what_is_wrong_with_a_list_is_told_of_in_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError) as caught:
        list_dataset(tmp_path / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < MAX_MESSAGE


def test_a_list_with_a_split_column_that_is_empty_in_a_row_is_told_of(tmp_path: Path) -> None:
    rows = [{"path": "x.jpg", "label": "a", "split": "train"}, {"path": "y.jpg", "label": "a", "split": None}]
    with pytest.raises(DatasetError, match="split of row 1 is missing"):
        list_dataset(write_list(tmp_path / "a.parquet", rows))


# Hugging Face


def test_images_inside_parquet_files_are_rows_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_hub_rows(photos)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    (tmp_path / "packed").mkdir()
    for split in rows:
        rows[split].to_parquet(tmp_path / f"packed/{split}-00000-of-00001.parquet")
    listing = list_dataset(f"hf:{tmp_path / 'packed'}")
    assert describe_rows(listing) == describe_rows(list_dataset(photos))
    assert listing.splits["train"].paths[3] == "train/00000003.jpg"
    with pytest.raises(DatasetError, match="hf:FOLDER"):
        list_dataset(write_list(tmp_path / "a.parquet", [{"image": {"bytes": b"x", "path": None}, "label": "a"}]))


def test_rows_of_files_that_are_as_they_were_are_known_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.dataset import hub

    data = save_hub_rows(photos, tmp_path / "saved")
    assert not list_dataset(data).splits["train"].stats.any()  # just written
    monkeypatch.setattr(hub, "RACY_NS", -(10**18))
    listing = list_dataset(data)
    monkeypatch.setattr(hub.HubRows, "read", lambda self, path: pytest.fail("read again"))
    assert describe_rows(list_dataset(data, known=make_known(listing))) == describe_rows(listing)
    assert list_changed(listing) == []
    next((tmp_path / "saved/train").glob("*.arrow")).touch()
    assert len(list_changed(listing)) == 12


def test_a_data_set_that_cannot_be_had_is_told_of_in_one_line(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(tmp_path / "texts")
    for data, words in {
        "hf:nobody/nothing": "hf:nobody/nothing cannot be loaded",
        f"hf:{tmp_path / 'nothing'}": "cannot be loaded",
        f"hf:{tmp_path / 'texts'}": "0 columns of images",
    }.items():
        outcome = cli("extract", data, "--backbone", "tiny")
        assert outcome.code == 1
        assert words in outcome.err
        assert len(outcome.err.splitlines()) == 1, outcome.err


def test_a_label_that_is_missing_is_told_of(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [{"bytes": encode(), "path": None}] * 2, "label": [0, -1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DatasetError, match="label of row 1 is -1, expected 0 to 1"):
        list_dataset(f"hf:{tmp_path / 'saved'}")
