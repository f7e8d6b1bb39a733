"""featcache.stages.train_head: stage 2, seen from outside."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import TinyFamily

import featcache
from featcache.errors import CacheError, DatasetError, OutputError


@pytest.fixture
def features(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> Path:
    return featcache.extract_features(photos, tmp_path / "features.h5", backbone="tiny", weights="none").path


def test_a_head_separates_what_is_easy_to_separate(features: Path, tmp_path: Path) -> None:
    record = featcache.train_head(features, tmp_path / "run").record
    assert record.val_accuracy == 1.0
    assert record.accuracy["val"] == {"n": 6, "correct": 6, "accuracy": 1.0}
    assert record.parameters == {"trainable": 2 * 8 + 2, "total": 2 * 8 + 2}


def test_a_run_folder_holds_all_that_is_promised(features: Path, tmp_path: Path) -> None:
    folder = featcache.train_head(features, tmp_path / "run").folder
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "predictions.csv", "history.csv", "model.json", "model.safetensors",
        "confusion.png", "selection.png",
    }  # fmt: skip
    record = json.loads((folder / "run.json").read_text())
    assert {"settings", "seconds", "environment", "peak_memory_bytes", "accuracy", "data"} <= set(record)
    assert record["settings"]["seed"] == 0
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "prediction", "probability_blue", "probability_red"]
    assert rows[0]["path"] == "val/blue/photo_000.jpg"
    assert float(rows[0]["probability_blue"]) + float(rows[0]["probability_red"]) == pytest.approx(1, abs=2e-6)


def test_the_extraction_is_charged_to_the_head(features: Path, tmp_path: Path) -> None:
    cache, record = featcache.read_cache(features), featcache.train_head(features, tmp_path / "run").record
    assert record.seconds["extraction"] == cache.provenance["seconds"] > 0
    parts = [value for name, value in record.seconds.items() if name != "total"]
    assert record.seconds["total"] == pytest.approx(sum(parts))


def test_a_given_c_is_used_and_nothing_is_selected(features: Path, tmp_path: Path) -> None:
    record = featcache.train_head(features, tmp_path / "run", C=0.5, solver="torch").record
    assert record.selection == "C = 0.5: given"
    assert (tmp_path / "run/history.csv").read_text() == "C,cv_log_loss,cv_accuracy\n0.5,,\n"


def test_validation_rows_have_no_say_in_the_head(features: Path, photos: Path, tmp_path: Path) -> None:
    first = featcache.train_head(features, tmp_path / "a").folder
    shutil.rmtree(photos / "val/red")
    shutil.copytree(photos / "val/blue", photos / "val/red")
    other = featcache.extract_features(photos, tmp_path / "other.h5", backbone="tiny", weights="none").path
    second = featcache.train_head(other, tmp_path / "b").folder
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_head_is_replaced_without_asking(features: Path, tmp_path: Path) -> None:
    featcache.train_head(features, tmp_path / "run", C=1.0)
    featcache.train_head(features, tmp_path / "run", C=2.0)
    assert featcache.read_record(tmp_path / "run").settings["C"] == 2.0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_anything_but_a_head_is_never_replaced(features: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not a run"):
        featcache.train_head(features, tmp_path / "run")
    assert (tmp_path / "run/thesis.txt").read_text() == "precious"


def test_a_features_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "features.h5").write_text("text")
    with pytest.raises(CacheError, match="cannot be read as a feature cache"):
        featcache.train_head(tmp_path / "features.h5", tmp_path / "run")
    with pytest.raises(CacheError, match="does not exist"):
        featcache.train_head(tmp_path / "nothing.h5", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_class_is_refused(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for split in ("train", "val"):
        shutil.rmtree(photos / split / "red")
    features = featcache.extract_features(photos, tmp_path / "one.h5", backbone="tiny", weights="none").path
    with pytest.raises(DatasetError, match="at least 2 classes"):
        featcache.train_head(features, tmp_path / "run")


def test_a_test_split_is_reported_beside_the_validation_split(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    shutil.copytree(photos / "val", photos / "test")
    features = featcache.extract_features(photos, tmp_path / "t.h5", backbone="tiny", weights="none").path
    record = featcache.train_head(features, tmp_path / "run").record
    assert record.accuracy["test"]["n"] == 6
    assert (tmp_path / "run/predictions_test.csv").read_text().count("test/") == 6
