"""featcache.stages.download against a local HTTP server: verified, safely unpacked, in place only when whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import fetching
from featcache.errors import DownloadError, OutputError
from featcache.stages import download
from featcache.stages.download import DATASETS, PublicDataset, digest_images


@pytest.fixture
def server(serve: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A web server and the folder that it serves."""
    monkeypatch.setenv("NO_PROXY", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    return serve(folder), folder


def pack(archive: Path, folder: Path, inside: str) -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        for path in folder.rglob("*"):
            if path.is_file():
                packed.write(path, f"{inside}/{path.relative_to(folder)}")


@pytest.fixture
def served_photos(server: tuple[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    """The generated photographs as a public data set named "photos": url, archive, originals."""
    url, folder = server
    (photos / "train/red/imageNotFound.gif").write_bytes(b"GIF89a")
    pack(folder / "photos.zip", photos, "photos_data")
    dataset = PublicDataset(url=f"{url}/photos.zip", folder="photos_data", n_images=18, digest=digest_images(photos))
    monkeypatch.setitem(DATASETS, "photos", dataset)
    return dataset.url, folder / "photos.zip", photos


def test_a_data_set_is_fetched_verified_and_in_place(served_photos: tuple[str, Path, Path], tmp_path: Path) -> None:
    folder = featcache.download_dataset("photos", tmp_path / "new")
    assert len(featcache.list_dataset(folder)) == 18
    assert (folder / "train/red/imageNotFound.gif").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_download_needs_no_network(served_photos: tuple[str, Path, Path], tmp_path: Path) -> None:
    featcache.download_dataset("photos", tmp_path / "new")
    served_photos[1].unlink()
    assert featcache.download_dataset("photos", tmp_path / "new") == tmp_path / "new"


def test_other_images_than_the_expected_are_not_kept(served_photos: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, archive, photos = served_photos
    (photos / "val/red/photo_000.jpg").unlink()
    pack(archive, photos, "photos_data")
    with pytest.raises(DownloadError, match=r"17 images with digest \w{12}\.\.\., expected 18"):
        featcache.download_dataset("photos", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_truncated_archive_is_refused(served_photos: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, archive, _ = served_photos
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DownloadError, match="not a whole zip archive"):
        featcache.download_dataset("photos", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "served"]


def test_an_interrupted_download_of_a_data_set_goes_on(
    served_photos: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = served_photos[1]
    begin, began = fetching.begin, []

    def begin_and_stop(part: fetching.Part, answer: Any, wanted: fetching.Origin) -> None:
        begin(part, answer, wanted)
        began.append(part.size)
        if len(began) == 1:
            part.append(archive.read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "begin", begin_and_stop)
    with pytest.raises(KeyboardInterrupt):
        featcache.download_dataset("photos", tmp_path / "new")
    assert (tmp_path / ".new.zip.part").stat().st_size == 1000
    assert len(featcache.list_dataset(featcache.download_dataset("photos", tmp_path / "new"))) == 18
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "photos_data/../../evil.jpg", "C:\\evil.jpg"])
def test_a_path_out_of_the_folder_is_refused(served_photos: tuple[str, Path, Path], tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(served_photos[1], "a") as packed:
        packed.writestr(name, b"evil")
    with pytest.raises(DownloadError, match="unsafe path"):
        featcache.download_dataset("photos", tmp_path / "new")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_in_the_archive_is_refused(served_photos: tuple[str, Path, Path], tmp_path: Path) -> None:
    link = zipfile.ZipInfo("photos_data/train/red/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(served_photos[1], "a") as packed:
        packed.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="unsafe path"):
        featcache.download_dataset("photos", tmp_path / "new")


def test_an_archive_that_fills_the_disk_is_refused(
    served_photos: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(DownloadError, match="more than 1,000"):
        featcache.download_dataset("photos", tmp_path / "new")


def test_a_server_that_cannot_be_reached_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot download http://127\.0\.0\.1:9/.*sample digits"):
        featcache.download_dataset("hymenoptera", tmp_path / "new", url="http://127.0.0.1:9/x.zip")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_is_left_alone(photos: Path) -> None:
    with pytest.raises(OutputError, match="is not hymenoptera"):
        featcache.download_dataset("hymenoptera", photos)


def test_the_real_ants_and_bees_have_the_digest_that_a_download_must_have(hymenoptera: Path) -> None:
    assert digest_images(hymenoptera) == DATASETS["hymenoptera"].digest


def test_the_official_archive_would_unpack_to_the_real_thing(
    server: tuple[str, Path], hymenoptera: Path, tmp_path: Path
) -> None:
    url, folder = server
    pack(folder / "hymenoptera_data.zip", hymenoptera, "hymenoptera_data")
    new = featcache.download_dataset("hymenoptera", tmp_path / "new", url=f"{url}/hymenoptera_data.zip")
    assert len(featcache.list_dataset(new)) == 397
