"""featcache.stages.finetune: the expensive way, seen from outside, with a tiny network."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, TinyFamily, TinyNetwork
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import featcache
from featcache.backbones import load_backbone
from featcache.cache import hold_output
from featcache.cli.finetune import Duration
from featcache.config import FinetuneConfig, HeadConfig
from featcache.dataset import hold_out, list_dataset
from featcache.errors import (
    BackboneError,
    BadImagesError,
    MissingExtraError,
    OutputBusyError,
    OutputError,
    RunError,
    SettingsError,
    TrainingError,
)
from featcache.files import canonical_json, hash_bytes, hash_file
from featcache.heads import fit_head
from featcache.processes import ALONE
from featcache.progress import SILENT
from featcache.runs import read_history, read_predictions
from featcache.stages.finetune import explaining_failures
from featcache.stages.prepare_training import (
    Trainee,
    TrainingBatches,
    WatchedBatches,
    fit_probe,
    gather_samples,
    make_recipe,
    prepare_network,
)
from featcache.training import Trainer, Training

pytestmark = pytest.mark.usefixtures("blank_figures")

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
    ("setting", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", "3"),
        ("seed", 1.5),
        ("lr", -1.0),
        ("lr", "1"),
        ("momentum", 1.0),
        ("batch_norm", "off"),
        ("val_fraction", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_option_name(
    photos: Path, tmp_path: Path, setting: str, value: object
) -> None:
    with pytest.raises(SettingsError, match="--" + setting.replace("_", "-")):
        featcache.finetune(photos, tmp_path / "run", **{setting: value})


# --- modes ------------------------------------------------------------------------------------------------------------


def test_staged_trains_the_head_first_and_then_everything_more_slowly(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    run = featcache.finetune(photos, tmp_path / "run", mode="staged", head_epochs=2, epochs=1, **TINY)
    with (run.folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["head", "head", "full"]
    assert run.record.settings["lr_backbone"] == pytest.approx(run.record.settings["lr"] / 10)
    trainee = make_trainee(photos, mode="staged", epochs=1)
    before = {name: value.clone() for name, value in trainee.network.named_parameters()}
    train_network(trainee)
    assert not [name for name, value in trainee.network.named_parameters() if torch.equal(before[name], value)]


def test_lp_ft_begins_with_the_head_that_fits_the_cached_features(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    features = tmp_path / "features.h5"
    run = featcache.finetune(photos, tmp_path / "run", mode="lp-ft", epochs=1, features=str(features), **TINY)
    start, first = read_history(tmp_path / "run/history.csv")
    assert (start["epoch"], "train_loss" in start, first["epoch"]) == (0, False, 1)
    cache = featcache.read_cache(features)
    listing = list_dataset(photos)
    train, held = hold_out(listing.splits["train"], listing.classes, 0.2, 0)
    rows = {path: row for row, path in enumerate(cache.splits["train"].listing.paths)}
    take = [[rows[path] for path in split.paths] for split in (train, held)]
    values = cache.splits["train"].features
    head = fit_head(values[take[0]], train.labels, 2, HeadConfig(solver="lbfgs", device="cpu")).head
    predicted = head.logits(values[take[1]]).argmax(1)
    assert start["holdout_accuracy"] == (predicted == held.labels).mean()
    seconds = run.record.seconds
    assert seconds["extraction"] == cache.provenance["seconds"]
    assert {"head", "preparation", "training", "evaluation"} <= set(seconds)
    assert any("linear head of C =" in note for note in run.record.notes)


def test_lp_fts_first_logits_are_those_of_the_head(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    config = FinetuneConfig(mode="lp-ft", features=str(tmp_path / "f.h5"), **TINY)
    config = config.settle(has_test=False, clips=False, device="cpu", bfloat16=False)
    backbone, device = load_backbone("tiny", weights="none"), torch.device("cpu")
    samples = gather_samples(list_dataset(photos), backbone, config, ALONE, SILENT)
    probe = fit_probe(photos, samples, backbone, config, device, SILENT)
    trainee = prepare_network(samples, backbone, config, device, probe=probe)
    assert trainee.batch_norm[0] == "fixed"  # tiny's own default follows the batches
    cached = featcache.read_cache(tmp_path / "f.h5").splits["val"]
    with torch.inference_mode():
        found = [trainee.network.eval()(images) for images, _ in WatchedBatches(trainee, cached.listing)]
    np.testing.assert_allclose(torch.cat(found), probe.head.logits(cached.features), atol=2e-3)


def test_lp_ft_takes_a_network_that_is_given_in_python(photos: Path, tmp_path: Path) -> None:
    images = featcache.InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.25,))
    backbone = featcache.wrap_network(TinyNetwork(), images, name="mine")
    before = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    features = tmp_path / "f.h5"
    run = featcache.finetune(
        photos, tmp_path / "run", backbone=backbone, mode="lp-ft", epochs=1, features=str(features)
    )
    assert run.record.extractor["backbone"] == featcache.read_cache(features).extractor["backbone"] == "mine"
    assert all(torch.equal(value, before[name]) for name, value in backbone.network.state_dict().items())


def test_lp_ft_goes_on_without_its_features(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    settings = {"mode": "lp-ft", "epochs": 3, "features": str(tmp_path / "f.h5"), "checkpoint_every": 0.0, **TINY}
    whole = featcache.finetune(photos, tmp_path / "whole", **settings)
    interrupt_after(photos, tmp_path / "run", 2, **settings)
    (tmp_path / "f.h5").unlink()
    run = featcache.finetune(photos, tmp_path / "run", **settings)
    assert hash_file(run.folder / "model.safetensors") == hash_file(whole.folder / "model.safetensors")
    assert run.record.seconds["extraction"] == whole.record.seconds["extraction"]
    assert not (tmp_path / "f.h5").exists()


def test_lp_ft_says_so_where_no_linear_head_fits_before_anything_is_extracted(photos: Path, tmp_path: Path) -> None:
    settings = {"backbone": "squeezenet1_0", "weights": "none", "mode": "lp-ft", "features": str(tmp_path / "f.h5")}
    with pytest.raises(BackboneError, match=r"squeezenet.*\(Conv2d\).*--mode staged"):
        featcache.finetune(photos, tmp_path / "run", **settings)
    assert not (tmp_path / "f.h5").exists()


def test_clips_are_not_mixed() -> None:
    with pytest.raises(SettingsError, match=r"--mixup is 0\.2: expected 0: clips are not mixed"):
        FinetuneConfig(mixup=0.2).settle(has_test=False, clips=True, device="cpu", bfloat16=False)


@pytest.mark.parametrize("mode", ["full", "head", "staged", "lp-ft"])
def test_every_mode_has_rates_for_every_optimiser_and_keeps_their_proportion(mode: str) -> None:
    for optimizer in ("sgd", "adamw"):
        usual = FinetuneConfig(mode=mode, optimizer=optimizer)
        usual = usual.settle(has_test=False, clips=False, device="cpu", bfloat16=False)
        stated = FinetuneConfig(mode=mode, optimizer=optimizer, lr=0.5)
        stated = stated.settle(has_test=False, clips=False, device="cpu", bfloat16=False)
        assert stated.lr == 0.5
        if mode == "head":
            assert usual.lr_backbone is stated.lr_backbone is None
        else:
            assert stated.lr_backbone / stated.lr == pytest.approx(usual.lr_backbone / usual.lr)
            assert usual.lr_backbone <= usual.lr


# --- which epoch is kept, and on what ---------------------------------------------------------------------------------


def test_held_out_images_are_some_of_each_class_and_are_not_trained_on(photos: Path, tiny: type[TinyFamily]) -> None:
    samples = make_trainee(photos, holdout_fraction=0.34).samples
    train, held = samples.train, samples.watched
    assert (np.bincount(train.labels).tolist(), np.bincount(held.labels).tolist()) == ([4, 4], [2, 2])
    assert set(train.paths) | set(held.paths) == set(samples.listing.splits["train"].paths)
    assert not set(train.digests) & set(held.digests)


def test_the_validation_split_has_no_say_in_what_is_kept_unless_it_is_asked(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    first = featcache.finetune(photos, tmp_path / "a", epochs=3, **TINY)
    (photos / "val/blue/photo_000.jpg").replace(photos / "val/red/other.jpg")  # another label
    second = featcache.finetune(photos, tmp_path / "b", epochs=3, **TINY)
    assert hash_file(first.folder / "model.safetensors") == hash_file(second.folder / "model.safetensors")
    assert "held out" in first.record.selection
    assert "optimistic" not in first.record.selection
    rows = read_history(tmp_path / "a/history.csv")
    assert "holdout_accuracy" in rows[0]
    assert "val_accuracy" not in rows[0]


def test_where_a_test_split_is_reported_the_validation_split_chooses(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    shutil.copytree(photos / "val", photos / "test")
    record = featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY).record
    assert record.settings["select_on"] == "val"
    assert record.data["images"]["train"] == 12


def test_select_on_none_trains_on_everything_and_keeps_the_last(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    record = featcache.finetune(photos, tmp_path / "run", epochs=3, select_on="none", **TINY).record
    assert record.selection == "weights of epoch 3 of 3, the last"
    assert len(make_trainee(photos, select_on="none").samples.train) == 12


# --- left and taken up again ------------------------------------------------------------------------------------------


class Enough(KeyboardInterrupt):
    """Ctrl-C."""


def interrupt_after(data: Path, output: Path, epoch: int, **settings: object) -> list[str]:
    """A run that is interrupted when it tells of an epoch; what it said."""
    lines: list[str] = []

    class Listener(featcache.Progress):
        def say(self, line: str) -> None:
            lines.append(line)
            if line.startswith(f"epoch {epoch}/"):
                raise Enough

    with pytest.raises(Enough):
        featcache.finetune(data, output, progress=Listener(), **settings)
    return lines


EVERY_STEP = {"epochs": 4, "checkpoint_every": 0.0, **TINY}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints as often as they are asked for."""
    monkeypatch.setattr("featcache.training.checkpoints.SHARE", 0)


@pytest.mark.usefixtures("at_once", "tiny")
def test_an_interrupted_run_goes_on_and_ends_with_the_same_weights(photos: Path, tmp_path: Path) -> None:
    whole = featcache.finetune(photos, tmp_path / "whole", **EVERY_STEP)
    lines = interrupt_after(photos, tmp_path / "run", 3, **EVERY_STEP)
    assert "stopped; the training is kept in" in lines[-1]
    assert not (tmp_path / "run").exists()
    assert len(read_history(tmp_path / "run.checkpoint/history.csv")) == 2
    said: list[str] = []
    listener = type("Listener", (featcache.Progress,), {"say": lambda self, line: said.append(line)})()
    run = featcache.finetune(photos, tmp_path / "run", progress=listener, **EVERY_STEP)
    assert any("goes on after epoch" in line for line in said)
    assert not [line for line in said if line.startswith("epoch 1/")]
    assert hash_file(run.folder / "model.safetensors") == hash_file(whole.folder / "model.safetensors")
    assert not (tmp_path / "run.checkpoint").exists()
    assert run.record.notes == whole.record.notes


@pytest.mark.usefixtures("at_once", "tiny")
def test_no_resume_starts_again(photos: Path, tmp_path: Path) -> None:
    interrupt_after(photos, tmp_path / "run", 3, **EVERY_STEP)
    said: list[str] = []
    listener = type("Listener", (featcache.Progress,), {"say": lambda self, line: said.append(line)})()
    featcache.finetune(photos, tmp_path / "run", progress=listener, resume=False, **EVERY_STEP)
    assert [line for line in said if line.startswith("epoch 1/")]
    assert not (tmp_path / "run.checkpoint").exists()


@pytest.mark.usefixtures("at_once", "tiny")
def test_an_unfinished_run_of_other_settings_is_kept_until_force(photos: Path, tmp_path: Path) -> None:
    interrupt_after(photos, tmp_path / "run", 3, **EVERY_STEP)
    other = {**EVERY_STEP, "lr": 0.01}
    with pytest.raises(RunError, match=r"unfinished run of other settings \(lr: 0.001 -> 0.01.*--force"):
        featcache.finetune(photos, tmp_path / "run", **other)
    assert (tmp_path / "run.checkpoint/checkpoint.json").exists()
    assert featcache.finetune(photos, tmp_path / "run", force=True, **other).record.settings["lr"] == 0.01


@pytest.mark.usefixtures("at_once", "tiny")
def test_another_number_of_threads_is_recorded_when_a_run_goes_on(photos: Path, tmp_path: Path) -> None:
    interrupt_after(photos, tmp_path / "run", 3, **EVERY_STEP)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        record = featcache.finetune(photos, tmp_path / "run", **EVERY_STEP).record
    finally:
        torch.set_num_threads(before)
    assert any(f"threads: {before} -> {before + 1}" in note for note in record.notes)
    assert record.environment["threads"] == before + 1


@pytest.mark.usefixtures("at_once", "tiny")
def test_a_loss_that_is_no_number_keeps_the_last_good_weights(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no longer a number in epoch.*smaller --lr than 1e\+30"):
        featcache.finetune(photos, tmp_path / "run", lr=1e30, **EVERY_STEP)
    assert not (tmp_path / "run").exists()

    def spoil(trainer: Trainer) -> None:
        if trainer.progress.epoch == 2:
            with torch.no_grad():
                trainer.network.get_parameter("fc.weight")[0, 0] = torch.nan

    run = Trainer.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer,
            "run",
            lambda self, *, on_step, on_epoch: run(
                self, on_step=lambda trainer: (spoil(trainer), on_step(trainer)), on_epoch=on_epoch
            ),
        )
        with pytest.raises(
            TrainingError, match=r"kept in .*spoilt.checkpoint up to epoch .*best weights are"
        ) as caught:
            featcache.finetune(photos, tmp_path / "spoilt", **EVERY_STEP)
    best = str(caught.value).rpartition("best weights are ")[2]
    assert load_backbone("tiny", weights=best).width == 8  # something to start from


@pytest.mark.usefixtures("at_once", "tiny")
def test_another_runs_checkpoint_is_kept_when_a_finished_one_is_asked_for_again(photos: Path, tmp_path: Path) -> None:
    featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)
    interrupt_after(photos, tmp_path / "run", 3, force=True, **EVERY_STEP)
    assert featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY).reused
    assert (tmp_path / "run.checkpoint/checkpoint.json").exists()


@pytest.mark.usefixtures("tiny")
def test_a_link_to_a_folder_stays_a_link(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run = featcache.finetune(photos, tmp_path / "link", epochs=1, **TINY)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/run.json").exists()
    assert featcache.finetune(photos, tmp_path / "link", epochs=1, **TINY).reused
    assert run.folder == tmp_path / "real"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": NaN}', "cannot be read.*--no-resume"),
        ("[" * 5000, "cannot be read.*--no-resume"),
        ("[]", "is damaged.*--no-resume"),
        ("{}", "is damaged.*--no-resume"),
        (None, "cannot be read.*--no-resume"),
    ],
)
def test_odd_things_in_place_of_a_checkpoint_are_one_line(
    photos: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "run.checkpoint/checkpoint.json"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(RunError, match=message):
        featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)
    if content is None:
        with pytest.raises(OutputError, match=r"cannot remove .*checkpoint.json: .*; move it away"):
            featcache.finetune(photos, tmp_path / "run", epochs=1, resume=False, **TINY)
    else:
        featcache.finetune(photos, tmp_path / "run", epochs=1, resume=False, **TINY)
        assert not path.parent.exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("resume", [True, False])
def test_a_file_in_place_of_the_checkpoints_folder_is_one_line(photos: Path, tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run.checkpoint").write_text("mine")
    with pytest.raises(OutputError, match=r"run.checkpoint is there and is no folder of checkpoints"):
        featcache.finetune(photos, tmp_path / "run", epochs=1, resume=resume, **TINY)
    assert (tmp_path / "run.checkpoint").read_text() == "mine"


@pytest.mark.usefixtures("tiny")
def test_two_runs_into_one_folder_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    with (
        hold_output(tmp_path / "run", doing="trained"),
        pytest.raises(OutputBusyError, match=r"being trained by process \d+.*; wait for it, or choose another place"),
    ):
        featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_a_time_budget_cuts_the_training_short_and_all_is_there(photos: Path, tmp_path: Path) -> None:
    run = featcache.finetune(photos, tmp_path / "run", epochs=100_000, time_budget=5, **TINY)
    assert run.record.seconds["total"] < 5
    assert any("time budget" in note for note in run.record.notes)
    assert 1 <= len(read_history(tmp_path / "run/history.csv")) < 100_000
    assert (run.folder / "curves.png").exists()


@pytest.mark.usefixtures("tiny")
def test_an_epoch_that_was_cut_short_says_so(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.stages.finetune.WRITING_SECONDS", 1e9)
    run = featcache.finetune(photos, tmp_path / "run", epochs=3, time_budget=60, **TINY)
    assert "stopped in the middle of epoch 1, after 4 of 10 images: the time budget was spent" in run.record.notes
    assert run.record.title == "fine-tuned tiny, 3 epochs, stopped in 1"
    assert read_history(run.folder / "history.csv")[0]["images"] == 4


@pytest.mark.usefixtures("tiny")
def test_a_budget_that_is_too_small_for_anything_still_takes_a_step(photos: Path, tmp_path: Path) -> None:
    run = featcache.finetune(photos, tmp_path / "run", epochs=3, time_budget=0.001, **TINY)
    assert len(read_history(tmp_path / "run/history.csv")) == 1
    assert run.record.accuracy["val"]["n"] == 6
    assert any("0.001 s were too few" in note for note in run.record.notes)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize(("batch_size", "cure"), [(64, "--batch-size 32"), (1, "a smaller --input-size")])
def test_out_of_memory_names_what_to_try(error: Exception, batch_size: int, cure: str) -> None:
    message = f"out of memory with batches of {batch_size} images; try {cure}"
    with pytest.raises(TrainingError, match=message), explaining_failures(FinetuneConfig(batch_size=batch_size)):
        raise error


def test_a_batch_norm_without_statistics_says_what_cures_it() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(TrainingError, match="another --batch-size"), explaining_failures(FinetuneConfig()):
        network(torch.zeros(1, 2))


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explaining_failures(FinetuneConfig()):
        raise RuntimeError("a bug")


# --- the same every time ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_the_number_of_workers_does_not_matter_unless_it_is_0(photos: Path, tmp_path: Path) -> None:
    digests = []
    for workers in (None, 1, 2, 0):
        run = featcache.finetune(photos, tmp_path / f"{workers}", epochs=2, workers=workers, **TINY)
        digests.append(hash_file(run.folder / "model.safetensors"))
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.usefixtures("tiny")
def test_images_in_memory_change_nothing(photos: Path, tmp_path: Path) -> None:
    with_memory = featcache.finetune(photos, tmp_path / "a", epochs=2, **TINY)
    without = featcache.finetune(photos, tmp_path / "b", epochs=2, cache_images=False, deterministic=True, **TINY)
    assert hash_file(with_memory.folder / "model.safetensors") == hash_file(without.folder / "model.safetensors")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("place", ["/", "."])
def test_a_place_without_a_name_is_one_line(photos: Path, cli: Callable[..., Outcome], place: str) -> None:
    outcome = cli("finetune", photos, "--backbone", "tiny", "--weights", "none", "-o", place)
    assert (outcome.code, f"cannot write a run to {place}: expected a folder of its own" in outcome.err) == (1, True)


@pytest.mark.usefixtures("tiny")
def test_everything_at_once_trains_and_loads_again(photos: Path, tmp_path: Path) -> None:
    run = featcache.finetune(
        photos,
        tmp_path / "run",
        epochs=3,
        optimizer="adamw",
        schedule="one-cycle",
        warmup=0.5,
        layer_decay=0.8,
        weight_decay=0.05,
        augment="randaugment",
        mixup=0.2,
        cutmix=0.5,
        label_smoothing=0.1,
        class_weight="balanced",
        ema=0.9,
        patience=3,
        precision="bf16",
        tensorboard=str(tmp_path / "board"),
        **TINY,
    )
    settings = run.record.settings
    assert {"mixup": 0.2, "ema": 0.9, "precision": "bf16", "layer_decay": 0.8}.items() <= settings.items()
    assert not {"head_epochs", "momentum", "step_size", "gamma"} & set(settings)
    assert run.record.notes[0].startswith("adamw, learning rate 0.001, 0.0001 of the backbone, one-cycle schedule")
    assert all(words in run.record.notes[0] for words in ("mixup 0.2", "ema 0.9", "augment randaugment", "bf16"))
    assert featcache.load_classifier(run.folder).classes == ("blue", "red")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    rows = read_history(run.folder / "history.csv")
    assert [event.value for event in board.Scalars("loss/train")] == pytest.approx(
        [row["train_loss"] for row in rows], rel=1e-5
    )
    assert [event.step for event in board.Scalars("accuracy/holdout")] == [1, 2, 3]


def test_tensorboard_without_the_extra_names_the_pip_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[tensorboard\]'"):
        featcache.finetune(photos, tmp_path / "run", tensorboard=str(tmp_path / "b"), **TINY)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2 min", 120)])
def test_a_time_is_said_in_seconds_minutes_or_hours(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time-budget", "soon"], "'soon' is no time: expected such as 90s, 10m or 1.5h"),
        (["--mode", "head", "--lr-backbone", "0.1"], "--lr-backbone would do nothing here"),
        (["--schedule", "cosine", "--gamma", "0.5"], "--gamma would do nothing here: it is of --schedule step"),
        (["--select-on", "none", "--patience", "3"], "--patience would do nothing here"),
        (["--select-on", "val", "--holdout-fraction", "0.5"], "--holdout-fraction would do nothing here"),
        (["--optimizer", "adamw", "--momentum", "0.5"], "--momentum would do nothing here"),
        (["--head-epochs", "3"], "--head-epochs would do nothing here: it is of --mode staged"),
        (["--ema", "1"], "--ema is 1.0: expected a number between 0 and 1"),
        (["--layer-decay", "1.5"], "--layer-decay is 1.5"),
        (["--warmup", "25"], "--warmup is 25.0: expected fewer epochs than 25"),
        (["--lr", "1e39"], "--lr is 1e+39"),
        (["--seed", "18446744073709551616"], "--seed is 18446744073709551616"),
        (["--mixup", "1e-300"], "--mixup is 1e-300: expected 0, or 0.001 and more"),
        (["--batch-size", "10000000000"], "--batch-size is 10000000000"),
    ],
)
def test_what_would_do_nothing_or_makes_no_sense_is_a_usage_error(
    photos: Path, cli: Callable[..., Outcome], arguments: list[str], message: str
) -> None:
    outcome = cli("finetune", photos, "--backbone", "tiny", "--weights", "none", *arguments)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


@pytest.mark.usefixtures("tiny")
def test_freeze_is_mode_head(photos: Path, cli: Callable[..., Outcome]) -> None:
    outcome = cli("finetune", photos, "--backbone", "tiny", "--weights", "none", "--epochs", "1", "--freeze", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["title"] == "last layer through the frozen tiny, 1 epoch"
    assert {"epoch": 1, "epochs": 1, "held_out": 2}.items() <= outcome.json["details"].items()


# --- seeds and budgets ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_seeds_vary_the_training_and_not_the_images_where_the_split_has_a_seed_of_its_own(
    flat_photos: Path, tmp_path: Path
) -> None:
    runs = [
        featcache.finetune(flat_photos, tmp_path / f"{seed}", epochs=1, seed=seed, split_seed=0, **TINY).record
        for seed in (0, 1)
    ]
    assert runs[0].data["fingerprints"] == runs[1].data["fingerprints"]
    assert runs[0].extractor["weights"]["tensors_sha256"] == runs[1].extractor["weights"]["tensors_sha256"]
    losses = [read_history(tmp_path / name / "history.csv")[0]["train_loss"] for name in "01"]
    assert losses[0] != losses[1]
    assert "split_seed" not in runs[0].settings
    assert runs[1].settings["split_seed"] == 0


@pytest.mark.usefixtures("tiny")
def test_a_budget_that_was_not_spent_is_no_setting_of_the_result(photos: Path, tmp_path: Path) -> None:
    run = featcache.finetune(photos, tmp_path / "run", epochs=1, time_budget=500, **TINY)
    assert "time_budget" not in run.record.settings
    assert featcache.finetune(photos, tmp_path / "run", epochs=1, **TINY).reused
    assert featcache.finetune(photos, tmp_path / "run", epochs=1, time_budget=900, **TINY).reused


@pytest.mark.usefixtures("tiny")
def test_a_run_that_was_cut_by_its_budget_is_another_one_than_the_whole(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.stages.finetune.WRITING_SECONDS", 1e9)
    assert (
        featcache.finetune(photos, tmp_path / "run", epochs=3, time_budget=60, **TINY).record.settings["time_budget"]
        == 60
    )
    assert featcache.finetune(photos, tmp_path / "run", epochs=3, time_budget=60, **TINY).reused
    with pytest.raises(RunError, match="time_budget: 60 -> unset"):
        featcache.finetune(photos, tmp_path / "run", epochs=3, **TINY)


# --- what it cost -----------------------------------------------------------------------------------------------------

TINY_ADDS = 8 * 8 * 8 * 3 * 3 * 3 + 8 * 5  # the convolution's and the classifier's, 16 x 16 pixels


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [  # 12 images, 2 of them held out and evaluated after each epoch; 6 reported
        ("full", 2 * (10 + 2) + 6, 2 * 10),
        ("head", 2 * (10 + 2) + 6, 0),
        ("staged", 3 * (10 + 2) + 6, 2 * 10),
        ("lp-ft", 2 + 2 * (10 + 2) + 6 + 18, 2 * 10),
    ],
)
def test_costs_of_a_fine_tuning_are_told_by_stage(
    photos: Path, tmp_path: Path, mode: str, forward: int, backward: int
) -> None:
    more = {"features": str(tmp_path / "f.h5")} if mode == "lp-ft" else {}
    run = featcache.finetune(photos, tmp_path / "run", mode=mode, epochs=2, **more, **TINY)
    record = run.record
    assert record.details["flops"] == 2 * TINY_ADDS * (forward + 2 * backward)
    assert set(record.cpu_seconds) == set(record.seconds)
    parts = [value for name, value in record.cpu_seconds.items() if name not in ("total", "per_epoch")]
    assert record.cpu_seconds["total"] == pytest.approx(sum(parts))
    assert min(parts) >= 0
    assert record.cpu_seconds["training"] > 0
    sizes = [(run.folder / name).stat().st_size for name in ("model.json", "model.safetensors")]
    assert record.result_bytes == sum(sizes)
    assert featcache.read_record(run.folder) == record


def test_cpu_seconds_before_an_interruption_count_and_are_unknown_where_nobody_counted_them(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    settings = {"epochs": 3, "checkpoint_every": 0.0, **TINY}
    interrupt_after(photos, tmp_path / "run", 2, **settings)
    folder = tmp_path / "run.checkpoint"
    description = json.loads((folder / "checkpoint.json").read_text())
    description.pop("sha256")
    more = description["more"]
    assert more["cpu_seconds"] > more["training"]["cpu_seconds"] > 0
    more["cpu_seconds"] += 1000
    more["training"]["cpu_seconds"] += 600
    description["sha256"] = hash_bytes(canonical_json(description).encode())
    (folder / "checkpoint.json").write_text(json.dumps(description))
    shutil.copytree(folder, tmp_path / "old.checkpoint")
    cpu = featcache.finetune(photos, tmp_path / "run", **settings).record.cpu_seconds
    assert 600 < cpu["training"] < 700
    assert 400 < cpu["preparation"] < 500
    assert 1000 < cpu["total"] < 1100
    for name in ("cpu_seconds", "energy_joules", "training"):  # as it was kept before they were counted
        del more[name]
    del description["sha256"]
    description["sha256"] = hash_bytes(canonical_json(description).encode())
    (tmp_path / "old.checkpoint/checkpoint.json").write_text(json.dumps(description))
    record = featcache.finetune(photos, tmp_path / "old", **settings).record
    assert (record.cpu_seconds, record.energy_joules) == ({}, None)
    assert record.seconds["total"] > 0
