"""The small verbs: predict, show, sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, TinyFamily, draw_photo
from PIL import Image

import featcache
from featcache.errors import BadImagesError, DatasetError, OutputError, RunError, SettingsError

TINY = {"backbone": "tiny", "weights": "none"}


@pytest.fixture
def head(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> Path:
    featcache.extract_features(photos, tmp_path / "features.h5", **TINY)
    return featcache.train_head(tmp_path / "features.h5", tmp_path / "head").folder


def test_new_files_get_the_label_of_their_colour(head: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        draw_photo(COLOURS[name], 77).save(tmp_path / f"{name}.png")
    predictions, bad = featcache.predict(head, [tmp_path / "red.png", tmp_path / "blue.png"])
    assert [one.label for one in predictions] == ["red", "blue"]
    assert all(0.5 < one.probability <= 1 for one in predictions)
    assert bad == []


def test_a_folder_stands_for_its_images(head: Path, photos: Path) -> None:
    predictions, _ = featcache.predict(head, [photos / "val"])
    assert [one.path for one in predictions] == sorted(str(path) for path in (photos / "val").rglob("*.jpg"))


def test_a_bad_file_is_named_and_shifts_nothing(head: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("text")
    files = [photos / "val/red/photo_000.jpg", tmp_path / "bad.jpg", photos / "val/blue/photo_000.jpg"]
    predictions, bad = featcache.predict(head, files)
    assert [(one.path, one.label) for one in predictions] == [(str(files[0]), "red"), (str(files[2]), "blue")]
    assert [item.path for item in bad] == [str(files[1])]


def test_only_bad_files_are_an_error(head: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(BadImagesError):
        featcache.predict(head, [tmp_path / "bad.jpg"])


def test_a_missing_file_and_a_missing_run_are_named(head: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no image at"):
        featcache.predict(head, [tmp_path / "nothing.jpg"])
    with pytest.raises(RunError, match="holds no classifier"):
        featcache.predict(tmp_path, [head])


def test_show_draws_a_training_batch_and_a_runs_predictions(head: Path, photos: Path, tmp_path: Path) -> None:
    batch = featcache.show(photos, tmp_path / "batch.png", backbone="tiny", n_images=4)
    predictions = featcache.show(head)
    assert predictions == head / "predictions.png"
    for path in (batch, predictions):
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_show_of_wrong_predictions_says_when_there_are_none(head: Path) -> None:
    with pytest.raises(RunError, match="no wrong prediction"):
        featcache.show(head, wrong=True)


def test_show_finds_a_data_set_that_moved_only_when_told(head: Path, photos: Path, tmp_path: Path) -> None:
    photos.rename(tmp_path / "moved")
    with pytest.raises(RunError, match="--data"):
        featcache.show(head)
    assert featcache.show(head, data=tmp_path / "moved").is_file()


def test_the_digits_are_a_stratified_image_folder(tmp_path: Path) -> None:
    sample = featcache.make_sample("digits", tmp_path / "digits", n_train=100, n_val=50)
    listing = featcache.list_dataset(tmp_path / "digits")
    assert sample.images == {"train": 100, "val": 50}
    assert listing.classes == tuple("0123456789")
    assert np.bincount(listing.splits["train"].labels).tolist() == [10] * 10
    assert not set(listing.splits["train"].digests) & set(listing.splits["val"].digests)


def test_the_digits_have_strokes_and_not_squares(tmp_path: Path) -> None:
    featcache.make_sample("digits", tmp_path / "digits", n_train=10, n_val=10)
    picture = np.asarray(Image.open(next((tmp_path / "digits/train/0").iterdir())).convert("L"), dtype=float)
    assert picture.shape == (160, 160)
    assert np.abs(np.diff(picture, axis=1)).max() < 40  # an 8 x 8 picture blown up by repetition jumps by 100 and more
    assert picture[:4].min() > 240  # a white margin


def test_the_digits_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        featcache.make_sample("digits", tmp_path / name, n_train=20, n_val=10)
    listings = [featcache.list_dataset(tmp_path / name) for name in ("a", "b")]
    assert listings[0].splits["train"].digests == listings[1].splits["train"].digests


def test_a_sample_is_written_only_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        featcache.make_sample("digits", tmp_path / "full")
    with pytest.raises(SettingsError, match="at most 1797"):
        featcache.make_sample("digits", tmp_path / "new", n_train=1700, n_val=200)
    assert not (tmp_path / "new").exists()
