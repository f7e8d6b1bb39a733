"""featcache.stages.finetune: the expensive way, seen from outside, with a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyFamily
from torch import nn

import featcache
from featcache.backbones import load_backbone
from featcache.config import FinetuneConfig
from featcache.dataset import list_dataset
from featcache.errors import BadImagesError, OutputError, RunError, SettingsError
from featcache.processes import ALONE
from featcache.progress import SILENT
from featcache.runs import read_history, read_predictions
from featcache.stages.prepare_training import (
    Trainee,
    TrainingBatches,
    WatchedBatches,
    gather_samples,
    make_recipe,
    prepare_network,
)
from featcache.training import Trainer, Training

TINY = {"backbone": "tiny", "weights": "none"}


def make_trainee(photos: Path, **settings: object) -> Trainee:
    config = FinetuneConfig(**TINY, **settings)
    backbone, device = load_backbone("tiny", weights="none"), torch.device("cpu")
    config = config.settle(has_test=False, clips=False, device="cpu", bfloat16=False)
    samples = gather_samples(list_dataset(photos), backbone, config, ALONE, SILENT)
    return prepare_network(samples, backbone, config, device)


def train_network(trainee: Trainee) -> Training:
    batches, watched = TrainingBatches(trainee), WatchedBatches(trainee, trainee.samples.watched)
    return Trainer(trainee.network, batches, watched, make_recipe(trainee)).run()


def batch_norm_statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.clone() for name, value in network.state_dict().items() if "running" in name or "tracked" in name
    }


def test_a_run_loads_again_with_the_same_predictions(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    run = featcache.finetune(photos, tmp_path / "run", epochs=2, **TINY)
    stored = read_predictions(run.folder / "predictions.csv", run.record.classes)
    classifier = featcache.load_classifier(run.folder)
    probabilities, bad = classifier.predict_files(stored.paths, root=photos, device=torch.device("cpu"))
    assert not bad
    np.testing.assert_allclose(probabilities, stored.probabilities, atol=2e-6)


def test_every_epoch_is_one_line_and_one_row(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    lines: list[str] = []

    class Listener(featcache.Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    featcache.finetune(photos, tmp_path / "run", epochs=3, progress=Listener(), **TINY)
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == len(read_history(tmp_path / "run/history.csv")) == 3
    assert all(word in epochs[0] for word in ("1/3", "train loss", "held out loss", "acc", "img/s", "left"))


def test_the_best_validation_epoch_is_kept(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    record = featcache.finetune(photos, tmp_path / "run", epochs=4, lr=0.05, select_on="val", **TINY).record
    assert record.val_accuracy == max(row["val_accuracy"] for row in read_history(tmp_path / "run/history.csv"))
    assert "optimistic" in record.selection


def test_mode_head_leaves_the_backbone_bit_identical(photos: Path, tiny: type[TinyFamily]) -> None:
    trainee = make_trainee(photos, epochs=2, mode="head")
    before = {name: value.clone() for name, value in trainee.network.state_dict().items()}
    train_network(trainee)
    after = trainee.network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]


def test_mode_head_trains_the_last_layer_only(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    record = featcache.finetune(photos, tmp_path / "run", epochs=1, mode="head", **TINY).record
    assert record.parameters == {"trainable": 8 * 2 + 2, "total": 3 * 8 * 9 + 16 + 8 * 2 + 2}


@pytest.mark.parametrize(("batch_norm", "moves"), [("train", True), ("fixed", False), ("auto", True)])
def test_batch_norm_statistics_move_only_where_they_are_trained(
    photos: Path, tiny: type[TinyFamily], batch_norm: str, moves: bool
) -> None:
    trainee = make_trainee(photos, epochs=1, batch_norm=batch_norm)
    before = batch_norm_statistics(trainee.network)
    train_network(trainee)
    after = batch_norm_statistics(trainee.network)
    assert all(torch.equal(before[name], after[name]) for name in before) != moves


def test_all_parameters_are_trained_by_default(photos: Path, tiny: type[TinyFamily]) -> None:
    trainee = make_trainee(photos, epochs=1)
    before = {name: value.clone() for name, value in trainee.network.named_parameters()}
    train_network(trainee)
    assert not [name for name, value in trainee.network.named_parameters() if torch.equal(before[name], value)]


def test_the_same_seed_gives_the_same_weights(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for name in ("a", "b"):
        featcache.finetune(photos, tmp_path / name, epochs=2, workers=0, **TINY)
    featcache.finetune(photos, tmp_path / "c", epochs=2, workers=0, batch_size=5, **TINY)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_very_same_run_is_not_trained_again(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)
    before = (tmp_path / "run/run.json").read_bytes()
    assert featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY).reused
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_another_run_is_refused_with_what_differs_and_replaced_by_force(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)
    with pytest.raises(RunError, match=r"another run \(epochs: 1 -> 2\).*--force"):
        featcache.finetune(photos, tmp_path / "run", epochs=2, **TINY)
    assert featcache.finetune(photos, tmp_path / "run", epochs=2, force=True, **TINY).record.settings["epochs"] == 2


def test_something_else_is_never_replaced(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    with pytest.raises(OutputError, match="is not a run"):
        featcache.finetune(photos, photos, epochs=1, force=True, **TINY)


def test_bad_images_are_all_named_before_training(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (photos / "train/blue/photo_000.jpg").write_bytes(b"")
    (photos / "val/red/photo_002.jpg").write_text("text")
    with pytest.raises(BadImagesError) as caught:
        featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)
    assert [path for path, _ in caught.value.bad] == ["train/blue/photo_000.jpg", "val/red/photo_002.jpg"]
    assert not (tmp_path / "run").exists()


def test_skip_bad_trains_on_the_rest(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (photos / "train/blue/photo_000.jpg").write_bytes(b"")
    run = featcache.finetune(photos, tmp_path / "run", epochs=1, skip_bad=True, **TINY)
    assert run.record.data["images"] == {"train": 11, "val": 6}
    assert [path for path, _ in run.left_out] == ["train/blue/photo_000.jpg"]


@pytest.mark.parametrize(
    ("setting", "value"), [("epochs", 0), ("lr", -1.0), ("momentum", 1.0), ("batch_norm", "off"), ("val_fraction", 1.5)]
)
def test_a_setting_out_of_range_is_refused_by_its_option_name(
    photos: Path, tmp_path: Path, setting: str, value: object
) -> None:
    with pytest.raises(SettingsError, match="--" + setting.replace("_", "-")):
        featcache.finetune(photos, tmp_path / "run", **{setting: value})
