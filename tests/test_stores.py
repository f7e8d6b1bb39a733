"""Caches in object stores: written whole or not at all, read through copies that are never stale, one line of error."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import h5py
import numpy as np
import pytest
from conftest import Outcome, Store, TinyFamily
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from featcache import FeatureExtractor, extract_features, files, open_cache, read_cache, storage, verify_cache
from featcache.cache import PartWriter, list_items, list_parts, parts_path, remove_item, remove_parts
from featcache.errors import CacheError, MissingExtraError, OutputError, SettingsError, StoreError
from featcache.stages.share import extract_shard
from featcache.storage import RemotePath, bring_here, check_writable, locate, replace_whole, write_whole

KEY = "a" * 64
TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "device": "cpu"}


class WatchedStore(MemoryFileSystem):
    """A store in memory that notes every request that changes something, and may refuse from the k-th on."""

    protocol = "watched"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    writes: ClassVar[list[str]] = []
    reads: ClassVar[list[str]] = []
    refuse_from = 10**9
    refuse_until = 10**9
    error: Exception = PermissionError("Access Denied")

    def note_write(self, path: str) -> None:
        self.writes.append(path)
        if self.refuse_from <= len(self.writes) - 1 < self.refuse_until:
            raise self.error

    def pipe_file(self, path: str, value: bytes, **how: Any) -> None:
        self.note_write(path)
        super().pipe_file(path, value, **how)

    def put_file(self, lpath: str, rpath: str, **how: Any) -> None:
        self.note_write(rpath)
        super().put_file(lpath, rpath, **how)

    def rm_file(self, path: str) -> None:
        self.note_write(f"rm {path}")
        super().rm_file(path)

    def cat_file(self, path: str, **how: Any) -> Any:
        self.reads.append(path)
        return super().cat_file(path, **how)

    def get_file(self, rpath: str, lpath: str, **how: Any) -> None:
        self.reads.append(rpath)
        super().get_file(rpath, lpath, **how)

    def info(self, path: str, **how: Any) -> dict[str, Any]:
        """With an ETag, as S3 makes it."""
        found: dict[str, Any] = super().info(path, **how)
        if found["type"] == "file":
            found["ETag"] = f'"{files.hashlib.md5(super().cat_file(path), usedforsecurity=False).hexdigest()}"'
        return found


@pytest.fixture
def watched() -> Iterator[type[WatchedStore]]:
    """watched://, empty, that refuses nothing."""
    fsspec.register_implementation("watched", WatchedStore, clobber=True)
    WatchedStore.clear_instance_cache()
    WatchedStore.store, WatchedStore.pseudo_dirs = {}, [""]
    WatchedStore.writes, WatchedStore.reads = [], []
    WatchedStore.refuse_from = WatchedStore.refuse_until = 10**9
    WatchedStore.error = PermissionError("Access Denied")
    yield WatchedStore
    WatchedStore.store = {}


@pytest.mark.parametrize("text", ["features.h5", "/a/b", "a/b://c", "C:\\features.h5", "x:y", "C://x"])
def test_what_is_no_url_is_a_path(text: str) -> None:
    assert locate(text) == Path(text)


def test_a_file_url_is_a_path_taken_literally() -> None:
    assert locate("file:///tmp/a%20b c.h5") == Path("/tmp/a%20b c.h5")


@pytest.mark.parametrize(
    "text", ["ftp://me:hunter2@host/x.h5", "https://host/x.h5?X-Amz-Signature=hunter2", "s3://key:hunter2@bucket/x"]
)
def test_a_url_that_holds_a_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(SettingsError, match="holds a password or a query") as caught:
        locate(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3://", "s3:///", "simplecache::s3://bucket/x", "zip://a.h5::s3://bucket/x.zip"])
def test_a_url_that_names_no_one_object_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected one URL"):
        locate(text)


def test_a_store_that_has_no_extra_or_is_unknown_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^nonesuch://b/x: Protocol not known: nonesuch"):
        locate("nonesuch://b/x").exists()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        MissingExtraError, match=r"s3:// places need an optional package: pip install 'featcache\[s3\]'"
    ):
        locate("s3://b/x").exists()


NAMES = st.text(st.characters(blacklist_characters="/\x00:", blacklist_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES, NAMES)
def test_names_in_a_store_are_made_as_those_of_paths_are(one: str, other: str) -> None:
    path, local = RemotePath(f"memory://b/{one}"), Path(f"/b/{one}")
    assert (path.name, path.stem, path.suffix) == (local.name, local.stem, local.suffix)
    assert str(path.with_name(other)) == f"memory:/{local.with_name(other)}"
    assert str(path.parent / other) == f"memory:/{local.parent / other}"
    assert pickle.loads(pickle.dumps(path)) == path


def test_an_error_of_a_store_survives_the_way_out_of_a_process() -> None:
    error = pickle.loads(pickle.dumps(StoreError("s3://b/x", "no route to host")))
    assert isinstance(error, OSError)
    assert str(error) == "s3://b/x cannot be reached: no route to host"
    assert error.strerror == "no route to host"


def test_what_is_written_is_read_listed_and_removed_again(s3: Store) -> None:
    place = locate(f"{s3.url}/deep/[x]*?.h5")
    assert not place.exists()
    assert not isinstance(place, Path)
    write_whole(place, b"one")
    write_whole(place.with_name("x1.h5"), b"another")
    assert place.read_bytes() == b"one"
    assert place.is_file()
    assert place.parent.is_dir()
    assert (place.stat().st_size, abs(place.stat().st_mtime - time.time()) < 10) == (3, True)
    assert place.parent.list_below() == {place: 3, place.with_name("x1.h5"): 7}
    storage.remove_files([place])
    assert list(place.parent.list_below()) == [place.with_name("x1.h5")]  # a name is never a pattern
    storage.remove_files([place])  # what is not there is removed
    assert locate(f"{s3.url}/nothing").parent.list_below(deep=True) == {place.with_name("x1.h5"): 7}


def test_more_objects_than_one_answer_holds_are_all_listed(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(f"{s3.url}/many")
    assert not isinstance(folder, Path)
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # in one answer
    for i in range(25):
        (folder / f"{i:04d}").write_bytes(b"")
    assert [place.name for place in folder.list_below()] == [f"{i:04d}" for i in range(25)]


def test_a_copy_is_read_again_only_while_the_object_is_the_same(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    download = RemotePath.download
    monkeypatch.setattr(RemotePath, "download", lambda self, to: (downloads.append(self), download(self, to))[1])
    place = locate(f"{s3.url}/x.h5")
    for content in (b"one", b"two", b"one"):  # of one size, within one second
        write_whole(place, content)
        assert bring_here(place).read_bytes() == content
        assert bring_here(place).read_bytes() == content
    assert len(downloads) == 3
    assert len(list(bring_here(place).parent.iterdir())) == 1  # older copies are gone
    assert bring_here(place, fresh=True).read_bytes() == b"one"
    assert len(downloads) == 4


def test_a_store_without_etags_is_read_anew_each_time() -> None:
    place = locate("memory://tokenless/x.h5")
    for content in (b"one", b"two"):
        write_whole(place, content)
        assert bring_here(place).read_bytes() == content
    first = bring_here(place)
    assert bring_here(place) != first
    assert not first.exists()


def test_an_object_that_changes_while_it_is_read_is_read_once_more(
    watched: type[WatchedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate("watched://b/x.h5")
    write_whole(place, b"one")
    download, left = RemotePath.download, [1]

    def change_meanwhile(self: RemotePath, target: Path) -> None:
        download(self, target)
        if left[0]:
            left[0] -= 1
            write_whole(place, b"two")

    monkeypatch.setattr(RemotePath, "download", change_meanwhile)
    assert bring_here(place).read_bytes() == b"two"
    left[0] = 100
    write_whole(place, b"six")
    monkeypatch.setattr(storage, "write_whole", write_whole)
    numbers = iter(range(1000))
    monkeypatch.setattr(
        RemotePath,
        "download",
        lambda self, target: (download(self, target), write_whole(place, b"%d" % next(numbers)))[0],
    )
    with pytest.raises(StoreError, match="it changes while it is read"):
        bring_here(place)


def test_a_download_that_dies_leaves_no_copy(watched: type[WatchedStore], monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate("watched://b/x.h5")
    write_whole(place, b"whole")

    def fail(self: RemotePath, target: Path) -> None:
        target.write_bytes(b"who")
        raise StoreError(self.url, "the line is dead")

    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "download", fail)
        with pytest.raises(StoreError):
            bring_here(place)
    folder = storage.copies_path()
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    leftover = next(folder.iterdir()) / ".x.h5.1.tmp"  # of a process that was killed, long ago
    leftover.write_bytes(b"who")
    os.utime(leftover, (0, 0))
    assert bring_here(place).read_bytes() == b"whole"
    assert not leftover.exists()


def test_no_room_for_a_copy_is_told_of_before_the_download(
    watched: type[WatchedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate("watched://b/x.h5")
    write_whole(place, b"whole")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4))
    with pytest.raises(
        OutputError, match=r"it needs 5 bytes and the disk has 4 left; free some, or set FEATCACHE_COPIES"
    ):
        bring_here(place)
    assert watched.reads == []


@pytest.mark.parametrize("size", [5, (50 << 20) * 2 + 12345], ids=["one upload", "in pieces"])
def test_what_was_uploaded_is_the_copy_if_the_etag_proves_it(
    s3: Store, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, content = locate(f"{s3.url}/x.h5"), np.random.default_rng(0).bytes(size)
    with replace_whole(place, size) as new:
        new.write(content, 0)
    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "download", lambda *_: pytest.fail("downloaded what was uploaded just now"))
        assert bring_here(place).read_bytes() == content
    assert bring_here(place, fresh=True).read_bytes() == content


def test_what_somebody_else_uploaded_meanwhile_is_not_mistaken_for_mine(
    s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, upload = locate(f"{s3.url}/x.h5"), RemotePath.upload

    def lose_race(self: RemotePath, source: Path) -> storage.RemoteStatus:
        upload(self, source)
        write_whole(place, b"hers")
        return self.stat()

    monkeypatch.setattr(RemotePath, "upload", lose_race)
    with replace_whole(place, 4) as new:
        new.write(b"mine", 0)
    assert bring_here(place).read_bytes() == b"hers"


def test_a_block_that_fails_uploads_nothing(watched: type[WatchedStore]) -> None:
    place = locate("watched://b/x.h5")

    def fail() -> None:
        with replace_whole(place, 4) as new:
            new.write(b"half", 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert watched.writes == []
    assert [path for path in storage.copies_path().rglob("*") if path.is_file()] == []


# --- extractions ------------------------------------------------------------------------------------------------------


def read_columns(path: Path) -> dict[str, bytes]:
    """Every column of a cache but what the file system said, as bytes."""
    with h5py.File(path) as file:
        names = [f"{split}/{name}" for split in file for name in file[split] if name != "stats"]
        return {name: file[name][:].tobytes() for name in names}


@pytest.fixture
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part after every batch, of two images."""
    monkeypatch.setattr("featcache.cache.parts.PART_SECONDS", 0.0)


def test_an_extraction_into_a_store_is_the_one_into_a_file(
    s3: Store, photos: Path, tmp_path: Path, tiny: type[TinyFamily], quick_parts: None
) -> None:
    local = extract_features(photos, tmp_path / "local.h5", batch_size=2, **TINY)
    url = f"{s3.url}/deep/features.h5"
    remote = extract_features(photos, url, batch_size=2, **TINY)
    assert str(remote.path) == url
    assert remote.cache.content_sha256 == local.cache.content_sha256
    assert read_columns(bring_here(locate(url))) == read_columns(local.path)
    assert [str(place) for place in locate(f"{s3.url}/deep").list_below(deep=True)] == [url]  # nothing else is left
    tiny.calls = 0
    again = extract_features(photos, url, **TINY)
    assert (again.computed, again.reused, tiny.calls) == (0, 18, 0)
    assert verify_cache(url)
    assert np.array_equal(read_cache(url).splits["val"].features, read_cache(local.path).splits["val"].features)


def test_only_what_is_new_is_computed_and_other_caches_in_stores_are_reused(
    s3: Store, photos: Path, tiny: type[TinyFamily]
) -> None:
    extract_features(photos, f"{s3.url}/a.h5", **TINY)
    shutil.copy(photos / "val/red/photo_000.jpg", photos / "val/red/photo_999.jpg")
    with (photos / "val/red/photo_999.jpg").open("ab") as file:
        file.write(b"another image with the same pixels")
    extended = extract_features(photos, f"{s3.url}/a.h5", **TINY)
    assert (extended.computed, extended.reused) == (1, 18)
    taken = extract_features(photos, f"{s3.url}/b.h5", reuse=(f"{s3.url}/a.h5",), **TINY)
    assert (taken.computed, taken.reused) == (0, 19)


def test_a_cache_is_never_served_stale(s3: Store, photos: Path, tiny: type[TinyFamily]) -> None:
    url = f"{s3.url}/features.h5"
    first = extract_features(photos, url, **TINY).cache
    (photos / "val/red/photo_000.jpg").unlink()
    cache = extract_features(photos, f"{s3.url}/other.h5", **TINY).cache
    system = fsspec.filesystem("s3")
    system.copy(f"{s3.bucket}/other.h5", f"{s3.bucket}/features.h5")  # by somebody else
    assert open_cache(url).content_sha256 == cache.content_sha256 != first.content_sha256
    assert len(read_cache(url)) == 17


def test_damage_in_a_copy_is_no_damage_of_the_cache(s3: Store, photos: Path, tiny: type[TinyFamily]) -> None:
    url = f"{s3.url}/features.h5"
    extract_features(photos, url, **TINY)
    copy = bring_here(locate(url))
    with h5py.File(copy, "r+") as file:
        file["train/features"][0] = 0
    with pytest.raises(CacheError, match=f"^{url} is damaged"):
        read_cache(url)
    assert verify_cache(url)  # which looks at the object
    assert len(read_cache(url)) == 18


def test_a_damaged_object_is_told_of_by_its_url_and_mended(s3: Store, photos: Path, tiny: type[TinyFamily]) -> None:
    url = f"{s3.url}/features.h5"
    good = extract_features(photos, url, **TINY).cache.content_sha256
    data = bytearray(locate(url).read_bytes())
    with h5py.File(bring_here(locate(url))) as file:
        data[file["train/features"].id.get_offset()] ^= 1
    locate(url).write_bytes(bytes(data))
    found = verify_cache(url)
    assert found.problems == ["train/features rows 0 to 11"]
    assert f"-o {url}" in found.cure
    mended = extract_features(photos, url, rehash=True, **TINY)
    assert (mended.computed, mended.cache.content_sha256) == (12, good)
    assert verify_cache(url)


def test_what_is_no_cache_or_not_there_is_one_line_with_the_url(s3: Store) -> None:
    write_whole(locate(f"{s3.url}/x.h5"), b"something else")
    with pytest.raises(CacheError, match=f"^{s3.url}/x.h5 cannot be read as a feature cache"):
        open_cache(f"{s3.url}/x.h5")
    with pytest.raises(CacheError, match=f"^{s3.url}/y.h5 does not exist"):
        open_cache(f"{s3.url}/y.h5")
    with pytest.raises(CacheError, match="is a folder, not a feature cache"):
        open_cache(s3.url)


PROGRAM = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import conftest
from featcache.backbones import families
from featcache.cache import parts
from featcache.runtime import scheduling
families.FAMILIES = (*families.FAMILIES, conftest.TinyFamily())
parts.PART_SECONDS = 0.0
write, written = parts.write_named, []
def write_named(place, data):
    write(place, data)
    written.append(place)
    print(place.name, flush=True)
    if "rows-" in place.name and len(written) == int(sys.argv[4]):
        time.sleep(100)  # to be killed here
parts.write_named = write_named
from featcache import extract_features
settings = {"backbone": "tiny", "weights": "none", "device": "cpu", "batch_size": 2, "workers": 0}
found = extract_features(sys.argv[2], sys.argv[3], **settings)
print("computed", found.computed, flush=True)
"""


def start_extraction(photos: Path, url: str, folder: Path, stop_at: int) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "FEATCACHE_COPIES": str(folder / "copies"), "TORCH_HOME": str(folder / "torch")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tests, str(photos), url, str(stop_at)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed")
def test_a_killed_extraction_goes_on_from_what_is_in_the_store_and_ends_with_the_same_bytes(
    s3: Store, photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    url = f"{s3.url}/features.h5"
    child = start_extraction(photos, url, tmp_path, stop_at=5)
    assert child.stdout
    for line in child.stdout:
        if line.startswith("rows-") and len(list(parts_path(locate(url)).list_below())) >= 5:
            break
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert not locate(url).exists()
    parts, damaged = list_parts(locate(url), "rows", extract_features(photos, tmp_path / "local.h5", **TINY).cache.key)
    kept = sum(map(len, parts))
    assert 4 <= kept < 18
    assert damaged == []
    shutil.rmtree(tmp_path / "copies")  # on another machine
    child = start_extraction(photos, url, tmp_path, stop_at=-1)
    out, _ = child.communicate(timeout=100)
    assert child.returncode == 0
    assert out.splitlines()[-1] == f"computed {18 - kept}"  # what was durable is not computed again
    local = open_cache(tmp_path / "local.h5")
    assert open_cache(url).content_sha256 == local.content_sha256
    assert read_columns(bring_here(locate(url))) == read_columns(tmp_path / "local.h5")
    assert list(locate(s3.url).list_below(deep=True)) == [locate(url)]


@pytest.mark.parametrize("lasting", [True, False], ids=["read-only from then on", "once"])
def test_a_store_that_refuses_any_request_to_write_costs_one_line_and_no_finished_row(
    watched: type[WatchedStore],
    photos: Path,
    tmp_path: Path,
    tiny: type[TinyFamily],
    quick_parts: None,
    one_thread: None,
    lasting: bool,
) -> None:
    settings = {**TINY, "batch_size": 6, "workers": 0}
    good = extract_features(photos, tmp_path / "local.h5", **settings).cache
    place, failures = locate("watched://b/features.h5"), []
    for k in range(100):
        watched.store, watched.pseudo_dirs, watched.writes = {}, [""], []
        WatchedStore.clear_instance_cache()
        watched.refuse_from, watched.refuse_until = k, 10**9 if lasting else k + 1
        try:
            error = ""
            extract_features(photos, str(place), **settings)
        except OutputError as caught:
            error = str(caught)
        if len(watched.writes) <= k:  # nothing was refused
            break
        refused = watched.writes[k]
        parts, _ = list_parts(place, "rows", good.key)
        kept = sum(map(len, parts))
        if refused.startswith("rm "):  # nobody needs what was to be removed
            assert (error, place.exists()) == ("", True) or lasting
        else:
            failures.append(refused.rpartition("/")[2][:4])
            assert re.fullmatch(r"cannot write watched://b/\S+ ?.*: Access Denied.*", error), error
            assert not place.exists()
            assert len(parts) >= sum("rows-" in name for name in watched.writes[:k])
        finished = place.exists()
        watched.refuse_from = watched.refuse_until = 10**9
        again = extract_features(photos, str(place), **settings)
        assert again.computed == (0 if finished else 18 - kept), refused
        assert again.cache.content_sha256 == good.content_sha256
        assert list(place.parent.list_below(deep=True)) == [place], refused
    assert error == ""
    assert set(failures) - {"file"} == {".fea", "rows", "feat"}  # the probe, the parts, the file; "file" if it is time
    assert failures.count("rows") >= 3


def test_an_answer_that_is_lost_is_as_good_as_a_refusal(
    watched: type[WatchedStore], photos: Path, tiny: type[TinyFamily]
) -> None:
    watched.refuse_from, watched.refuse_until, watched.error = 2, 3, TimeoutError("read timed out")
    with pytest.raises(OutputError, match=r"^cannot write watched://b/\S+ \([\d,]+ bytes\): read timed out$"):
        extract_features(photos, "watched://b/x.h5", **TINY)


def test_a_store_that_does_not_answer_is_no_damaged_part(
    watched: type[WatchedStore], photos: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(parts_path(locate("watched://b/x.h5")), KEY, "float32")
    writer.add(["0" * 64], np.zeros((1, 4)))
    writer.flush()
    monkeypatch.setattr(storage, "copies_path", lambda: photos / "no copies yet")

    def fail(self: WatchedStore, path: str, **how: Any) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(WatchedStore, "cat_file", fail)
        with pytest.raises(StoreError, match="cannot be reached: Connection reset by peer"):
            list_parts(locate("watched://b/x.h5"), "rows", KEY)
    (part,), damaged = list_parts(locate("watched://b/x.h5"), "rows", KEY)
    assert damaged == []
    assert part.read_features().tolist() == [[0.0] * 4]


def test_a_part_is_downloaded_once_and_a_damaged_copy_of_it_again(
    watched: type[WatchedStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = locate("watched://b/x.h5")
    for i in range(40):
        writer = PartWriter(parts_path(output), KEY, "float32")
        writer.add([f"{i:064x}"], np.full((1, 4), i))
        writer.flush()
    assert len(list_parts(output, "rows", KEY)[0]) == 40
    assert watched.reads == []  # who wrote them has copies
    monkeypatch.setattr(storage, "copies_path", lambda: tmp_path / "elsewhere")
    parts, _ = list_parts(output, "rows", KEY)
    assert sorted(float(part.read_features()[0, 0]) for part in parts) == list(range(40))
    assert len(watched.reads) == 40
    for copy in (tmp_path / "elsewhere").rglob("rows-*.h5"):
        copy.write_bytes(copy.read_bytes()[:-1])
    assert len(list_parts(output, "rows", KEY)[0]) == 40
    assert len(watched.reads) == 80
    damaged = parts[0].path
    assert not isinstance(damaged, Path)
    damaged.write_bytes(b"damaged")
    for copy in (tmp_path / "elsewhere").rglob(damaged.name):
        copy.unlink()
    assert list_parts(output, "rows", KEY)[1] == [damaged]
    assert remove_parts(output, KEY) == []
    assert not any(path.is_file() for path in (tmp_path / "elsewhere").rglob("*"))


def test_parts_of_another_extractor_stay_in_the_store(watched: type[WatchedStore]) -> None:
    output = locate("watched://b/x.h5")
    for key in (KEY, "b" * 64):
        writer = PartWriter(parts_path(output), key, "float32")
        writer.add(["0" * 64], np.zeros((1, 4)))
        writer.flush()
    (left,) = remove_parts(output, KEY)
    assert left.name.startswith("rows-" + "b" * 16)


def test_a_place_that_cannot_be_written_is_told_of_before_any_work(
    s3: Store, photos: Path, tiny: type[TinyFamily]
) -> None:
    write_whole(locate(f"{s3.url}/folder/x"), b"")
    for url, message in {
        "s3://no-such-bucket-here/x.h5": "cannot write URL: The specified bucket does not exist; choose another place",
        "s3://No_Bucket!/x.h5": "URL cannot be reached: Parameter validation failed: Invalid bucket name",
        f"{s3.url}/folder": "cannot write URL: it is a folder; expected a file name",
        s3.url: "cannot write URL: it is a folder; expected a file name",
    }.items():
        with pytest.raises((OutputError, StoreError)) as caught:
            extract_features(photos, url, **TINY)
        assert str(caught.value).startswith(message.replace("URL", url))
        assert "\n" not in str(caught.value)
    assert tiny.calls == 0
    check_writable(locate(f"{s3.url}/new.h5"))
    assert list(locate(s3.url).list_below(deep=True)) == [locate(f"{s3.url}/folder/x")]  # the probe is gone


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "HOME": "/nonexistent"},
            "Unable to locate credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)",
        ),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 'Could not connect to the endpoint URL: "http://127.0.0.1:9/'),
    ],
    ids=["no credentials", "no server"],
)
def test_credentials_that_are_missing_and_a_server_that_is_not_there_are_one_line_and_no_secret(
    s3: Store,
    photos: Path,
    cli: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str | None],
    reason: str,
) -> None:
    for name, value in {"AWS_MAX_ATTEMPTS": "1", **variables}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    system = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(system, "_cache", {})  # which remembers credentials
    monkeypatch.setattr(system, "retries", 1)
    url = f"{s3.url}/x.h5"
    for command in (
        ("extract", photos, "-o", url, "--weights", "none"),
        ("cache", "verify", url),
        ("cache", "ls", url),
    ):
        done = cli(*command)
        assert (done.code, done.out) == (1, ""), command
        assert len(done.err.splitlines()) == 1, done.err
        assert reason in done.err, command
        assert url in done.err, command
        assert "secret-of-the-test" not in done.err, command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("no answer from https://me:hunter2@host/x?X-Amz-Signature=hunter2, sorry"),
            "no answer from https://host/x sorry",
        ),
        (PermissionError(13, "Forbidden"), "Forbidden"),
        (TimeoutError(), "TimeoutError"),
        (OSError("two\nlines"), "two lines"),
    ],
)
def test_what_a_library_says_is_one_line_without_secrets(error: Exception, said: str) -> None:
    assert storage._say(error) == said


def test_credentials_are_in_no_file(s3: Store, photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    extract_features(photos, f"{s3.url}/features.h5", **TINY)
    data = locate(f"{s3.url}/features.h5").read_bytes()
    for path in [*storage.copies_path().rglob("*"), *tmp_path.rglob("*")]:
        data += path.read_bytes() if path.is_file() else b""
    assert b"secret-of-the-test" not in data
    assert b"AWS_" not in data


def test_two_extractions_into_one_store_at_once_are_both_right(
    watched: type[WatchedStore], photos: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, upload, others = "watched://b/x.h5", RemotePath.upload, []

    def let_another_overtake(self: RemotePath, source: Path) -> storage.RemoteStatus:
        monkeypatch.setattr(RemotePath, "upload", upload)
        others.append(extract_features(photos, url, **TINY))  # from the start to the end, parts removed
        return upload(self, source)

    monkeypatch.setattr(RemotePath, "upload", let_another_overtake)
    mine = extract_features(photos, url, **TINY)
    assert mine.cache.content_sha256 == others[0].cache.content_sha256
    assert verify_cache(url)
    assert list(locate(url).parent.list_below(deep=True)) == [locate(url)]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_commands_take_a_cache_at_a_url(
    s3: Store, photos: Path, tmp_path: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily], blank_figures: None
) -> None:
    url, plain = f"{s3.url}/features.h5", ("--backbone", "tiny", "--weights", "none", "--device", "cpu")
    made = cli("extract", photos, "-o", url, *plain, "--json")
    assert (made.code, made.json["cache"]) == (0, url)
    assert cli("extract", photos, "-o", url, *plain).code == 0
    info = cli("cache", "info", url)
    assert info.out.startswith(f"{url}: a feature cache of 18 rows")
    assert cli("cache", "info", url, "--json").json["bytes"] == locate(url).stat().st_size
    assert cli("cache", "verify", url).out.startswith(f"{url}: all right, 18 rows")
    explained = cli("cache", "explain", photos, "-o", url, *plain)
    assert f"reuse: {url} has all 18 rows" in explained.out
    trained = cli("train-head", url, "-o", tmp_path / "run", "--json")
    assert trained.code == 0
    assert cli("predict", tmp_path / "run", photos / "val/red/photo_000.jpg").code == 0
    assert cli("show", url, "-o", tmp_path / "shown.png").code == 0
    other = f"{s3.url}/other.h5"
    assert cli("extract", photos, "-o", other, *plain, "--layer", "norm:avg").code == 0
    compared = cli("compare", url, other, "-o", tmp_path / "report", "--runs", tmp_path / "runs")
    assert (compared.code, compared.err.count("Error")) == (0, 0)


def test_what_goes_to_a_folder_of_this_machine_is_no_folder_called_s3(
    s3: Store, photos: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily]
) -> None:
    url = f"{s3.url}/run"
    cli("extract", photos, "-o", "features.h5", "--backbone", "tiny", "--weights", "none")
    for command in (
        ("train-head", "features.h5", "-o", url),
        ("finetune", photos, "-o", url, "--backbone", "tiny", "--weights", "none"),
        ("compare", "features.h5", "features.h5", "-o", url),
        ("compare", photos, "-o", url),
        ("audit", "features.h5", "-o", url),
        ("show", "features.h5", "-o", f"{url}.png"),
    ):
        done = cli(*command)
        assert done.code == 1, command
        assert f"cannot write {url}" in done.err, command
        assert "goes to a folder of this machine" in done.err, command
        assert not Path("s3:").exists(), command


def test_caches_and_leftovers_in_a_store_are_listed_and_removed(
    s3: Store, photos: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily]
) -> None:
    url = f"{s3.url}/deep/features.h5"
    extract_features(photos, url, **TINY)
    for name in ("features", "other"):
        writer = PartWriter(parts_path(locate(f"{s3.url}/deep/{name}.h5")), KEY, "float32")
        writer.add(["0" * 64], np.zeros((1, 4)))
        writer.flush()
    write_whole(locate(f"{s3.url}/deep/not.h5.parts/mine.txt"), b"")
    write_whole(locate(f"{s3.url}/deep/notes.txt"), b"")
    items = {str(item.path): item.kind for item in list_items(locate(s3.url))}
    assert items == {url: "cache", f"{url}.parts": "parts", f"{s3.url}/deep/other.h5.parts": "parts"}
    listed = cli("cache", "ls", f"{s3.url}/deep", "--json").json
    assert [(item["path"], item["kind"]) for item in listed] == sorted(items.items())
    assert "1 part of features" in cli("cache", "ls", s3.url).out
    assert cli("cache", "prune", f"{s3.url}/deep/other.h5.parts", "--yes").code == 0
    assert cli("cache", "prune", s3.url, "--yes", "--json").json[0]["path"] == f"{url}.parts"
    assert [str(item.path) for item in list_items(locate(s3.url))] == [url]
    assert cli("cache", "prune", url, "--yes").code == 0
    assert sorted(place.name for place in locate(s3.url).list_below(deep=True)) == ["mine.txt", "notes.txt"]
    gone = cli("cache", "ls", f"{s3.url}/nothing")
    assert (gone.code, "is not a folder" in gone.err) == (1, True)
    assert "neither a feature cache nor a leftover" in cli("cache", "prune", url, "--yes").err


def test_what_cannot_be_removed_from_a_store_is_one_line(
    watched: type[WatchedStore], photos: Path, tiny: type[TinyFamily]
) -> None:
    extract_features(photos, "watched://b/x.h5", **TINY)
    (item,) = list_items(locate("watched://b"))
    watched.refuse_from = 0
    with pytest.raises(OutputError, match=r"^cannot remove watched://b/x.h5: Access Denied$"):
        remove_item(item)


def test_an_import_a_transformer_and_predictions_go_to_a_store_too(
    s3: Store, photos: Path, tmp_path: Path, cli: Callable[..., Outcome], tiny: type[TinyFamily]
) -> None:
    url, paths = f"{s3.url}/imported.h5", [str(path) for path in sorted(photos.rglob("*.jpg"))]
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    (tmp_path / "labels.txt").write_text("ants\nbees\n" * 10)
    table = ("import", tmp_path / "clip.npy", "--labels", tmp_path / "labels.txt")
    assert cli(*table, "-o", url).code == 0
    assert cli(*table, "-o", "local.h5").code == 0
    assert open_cache(url).content_sha256 == open_cache("local.h5").content_sha256
    features = FeatureExtractor(cache=f"{s3.url}/kept.h5", **TINY).fit_transform(paths)
    tiny.calls = 0
    again = FeatureExtractor(cache=f"{s3.url}/kept.h5", **TINY).fit_transform(paths)
    assert (tiny.calls, np.array_equal(features, again)) == (0, True)
    extract_features(photos, "features.h5", **TINY)
    assert cli("train-head", "features.h5", "-o", "run").code == 0
    assert cli("predict", "run", paths[0], "-o", f"{s3.url}/labels.csv").code == 0
    assert locate(f"{s3.url}/labels.csv").read_bytes().startswith(b"path,label,probability\n")


def test_shards_that_know_nothing_of_each_other_meet_in_a_store(
    s3: Store, photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = extract_features(photos, tmp_path / "local.h5", **TINY).cache
    url = f"{s3.url}/features.h5"
    for number in (3, 1, 2):
        monkeypatch.setattr(storage, "copies_path", lambda number=number: tmp_path / f"machine {number}")
        share = extract_shard(photos, url, shard=f"{number}/3", **TINY)
    assert share.extraction is not None
    assert open_cache(url).content_sha256 == local.content_sha256
    assert list(locate(s3.url).list_below(deep=True)) == [locate(url)]
