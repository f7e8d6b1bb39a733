"""featcache.training: stages, averages, early ends, and trainings that are left anywhere and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import N_CLASSES, D, ScriptedValidation, copy_state, make_network, make_rows, name_changes
from torch import nn
from torch.nn import functional as F

from featcache.errors import FeatcacheError, RunError, TrainingError
from featcache.training import (
    Checkpoints,
    Recipe,
    Stage,
    State,
    TensorBatches,
    Trainer,
    Training,
    evaluate,
    keep_if_due,
    make_scheduler,
    set_mode_all,
    set_mode_frozen,
)

pytestmark = pytest.mark.usefixtures("one_thread", "blank_figures")


def make_stage(name: str = "full", epochs: int = 2, *, optimizer: str = "sgd", schedule: str = "step") -> Stage:
    """Epochs of everything, or of the last layer alone."""

    def choose(network: nn.Module) -> None:
        network.requires_grad_(name == "full")
        network.get_submodule("4").requires_grad_(True)

    def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
        wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.SGD(wanted, 0.05, 0.9) if optimizer == "sgd" else torch.optim.AdamW(wanted, 0.01)

    return Stage(
        name=name,
        epochs=epochs,
        choose_parameters=choose,
        set_training_mode=set_mode_all if name == "full" else set_mode_frozen,
        make_optimizer=make_optimizer,
        make_scheduler=lambda optimizer, steps: make_scheduler(
            schedule, optimizer, epochs=epochs, epoch_steps=steps, step_size=1, gamma=0.5, warmup=0.7
        ),
    )


def mix_rows(inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup, of rows."""
    share, other = torch.rand(()), inputs.roll(1, 0)
    shares = F.one_hot(labels, N_CLASSES).float()
    return share * inputs + (1 - share) * other, share * shares + (1 - share) * shares.roll(1, 0)


def make_trainer(recipe: Recipe, *, n: int = 22, seed: int = 3, **options: Any) -> Trainer:
    """On tensors, seeded."""
    network = make_network(seed)
    train, watched = make_rows(n, seed=1), make_rows(13, seed=2)
    torch.manual_seed(seed)
    return Trainer(network, TensorBatches(*train, 4, shuffle=True), TensorBatches(*watched, 5), recipe, **options)


def numbers(training: Training) -> list[tuple[Any, ...]]:
    """A history but for its times."""
    return [
        (e.epoch, e.stage, e.lr, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in training.history
    ]


def copy_deeply(state: State) -> State:
    """As a checkpoint would."""
    copies = [{n: t.clone() for n, t in part.items()} for part in (state.network, state.best, state.others)]
    return State(values=state.values, network=copies[0], best=copies[1], others=copies[2])


# --- stages -----------------------------------------------------------------------------------------------------------


def test_the_head_alone_learns_in_the_first_stage_and_everything_in_the_second() -> None:
    trainer = make_trainer(Recipe(stages=(make_stage("head", 2), make_stage("full", 1)), keep="last"))
    states = [copy_state(trainer.network)]
    training = trainer.run(on_epoch=lambda epoch, is_best: states.append(copy_state(trainer.network)))
    assert [epoch.stage for epoch in training.history] == ["head", "head", "full"]
    changed = [{n for n in after if not torch.equal(before[n], after[n])} for before, after in pairwise(states)]
    assert changed[0] == changed[1] == {"4.weight", "4.bias"}
    assert changed[2] >= set(states[0]) - {"0.bias"}  # before a BatchNorm it has no gradient


def test_every_stage_has_its_own_schedule() -> None:
    trainer = make_trainer(Recipe(stages=(make_stage("head", 3), make_stage("full", 2)), keep="last"))
    rates = [epoch.lr for epoch in trainer.run().history]
    assert rates[0] == rates[3] < rates[2] < rates[1]  # it warms up anew


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "best"), [("best", 2), ("last", 4)])
def test_the_weights_that_the_recipe_names_are_kept(keep: str, best: int) -> None:
    network = make_network()
    validation = ScriptedValidation(network, [0.25, 0.75, 0.5, 0.75])
    trainer = Trainer(
        network, TensorBatches(*make_rows(20), 4), validation, Recipe(stages=(make_stage(epochs=4),), keep=keep)
    )
    assert trainer.run().best.epoch == best
    assert name_changes(network, validation.states[best - 1]) == set()


def test_of_equally_good_epochs_the_one_with_the_least_loss_is_kept_where_that_is_asked() -> None:
    trainer = make_trainer(Recipe(stages=(make_stage(epochs=8),), keep="best, then least loss"))
    training = trainer.run()
    top = max(epoch.val_accuracy for epoch in training.history)
    equals = [epoch for epoch in training.history if epoch.val_accuracy == top]
    assert len(equals) > 1
    assert training.best is min(equals, key=lambda epoch: epoch.val_loss)


def test_the_start_is_epoch_0_and_is_kept_if_nothing_beats_it() -> None:
    network = make_network()
    before = copy_state(network)
    validation = ScriptedValidation(network, [0.75, 0.5, 0.75])
    recipe = Recipe(stages=(make_stage(epochs=2),), start_counts=True)
    training = Trainer(network, TensorBatches(*make_rows(20), 4), validation, recipe).run()
    assert [epoch.epoch for epoch in training.history] == [0, 1, 2]
    assert (training.best.epoch, training.history[0].train_loss, training.history[0].stage) == (0, None, "start")
    assert name_changes(network, before) == set()


# --- averages ---------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_is_evaluated_and_kept() -> None:
    decay, steps = 0.8, []
    recipe = Recipe(stages=(make_stage(epochs=2),), ema=decay, keep="last")
    trainer = make_trainer(recipe)
    training = trainer.run(on_step=lambda trainer: steps.append(trainer.network.state_dict()["4.weight"].clone()))
    expected = steps[0]
    distinct = [step for i, step in enumerate(steps) if i == 0 or not torch.equal(step, steps[i - 1])]
    for n, weight in enumerate(distinct[1:], 1):
        share = min(decay, (1 + n) / (10 + n))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(trainer.network.state_dict()["4.weight"], expected)
    loss, accuracy = evaluate(trainer.network, trainer.watched)
    assert (loss, accuracy) == (training.best.val_loss, training.best.val_accuracy)


# --- losses -----------------------------------------------------------------------------------------------------------


def check_first_gradient(
    recipe_settings: dict[str, Any], find_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """The first step's gradient is that of `find_loss` on the first batch."""
    trainer = make_trainer(Recipe(stages=(make_stage(epochs=1),), **recipe_settings), n=4)
    plain = make_network(3)
    torch.manual_seed(3)
    inputs, labels = next(iter(trainer.train_batches))
    find_loss(plain.train()(inputs), labels).backward()
    torch.manual_seed(3)
    found = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.extend(p.grad.clone() for p in trainer.network.parameters())
    )
    trainer.run()
    torch.testing.assert_close(found, [parameter.grad for parameter in plain.parameters()])


def test_label_smoothing_and_class_weights_are_in_the_loss() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0])
    check_first_gradient(
        {"label_smoothing": 0.2, "class_weights": weights},
        lambda logits, labels: F.cross_entropy(logits, labels, weights, label_smoothing=0.2),
    )


def test_mixed_batches_have_the_loss_of_their_shares() -> None:
    trainer = make_trainer(Recipe(stages=(make_stage(epochs=1),), mix=mix_rows))
    assert 0 < trainer.run().history[0].train_loss < 10
    halves = torch.full((4, N_CLASSES), 1 / N_CLASSES)
    check_first_gradient(
        {"mix": lambda inputs, labels: (inputs, halves)}, lambda logits, labels: F.cross_entropy(logits, halves)
    )


def test_bfloat16_under_autocast_is_near_and_weights_stay_float32() -> None:
    a = make_trainer(Recipe(stages=(make_stage(epochs=2),))).run().history
    near = make_trainer(Recipe(stages=(make_stage(epochs=2),), compute="bfloat16"))
    b = near.run().history
    assert [epoch.train_loss for epoch in b] == pytest.approx([epoch.train_loss for epoch in a], rel=0.1)
    assert [epoch.train_loss for epoch in b] != [epoch.train_loss for epoch in a]
    assert all(parameter.dtype == torch.float32 for parameter in near.network.parameters())


# --- early ends -------------------------------------------------------------------------------------------------------


def test_patience_stops_after_so_many_epochs_without_a_better_one() -> None:
    network = make_network()
    validation = ScriptedValidation(network, [0.25, 0.5, 0.25, 0.5, 0.75])
    recipe = Recipe(stages=(make_stage(epochs=5),), patience=2)
    training = Trainer(network, TensorBatches(*make_rows(20), 4), validation, recipe).run()
    assert [epoch.epoch for epoch in training.history] == [1, 2, 3, 4]
    assert (training.best.epoch, training.stopped) == (2, "no better epoch in 2")


def test_nobody_is_impatient_before_the_last_stage() -> None:
    network = make_network()
    validation = ScriptedValidation(network, [0.75, 0.5, 0.5, 0.5, 0.5, 0.5])
    recipe = Recipe(stages=(make_stage("head", 3), make_stage("full", 3)), patience=1)
    training = Trainer(network, TensorBatches(*make_rows(20), 4), validation, recipe).run()
    assert [epoch.stage for epoch in training.history] == ["head"] * 3 + ["full"]


def test_a_training_that_is_over_ends_in_the_middle_of_an_epoch_with_what_it_has() -> None:
    asked = []

    def is_over(trainer: Trainer) -> bool:
        asked.append(trainer.progress.batches)
        return len(asked) == 8

    trainer = make_trainer(Recipe(stages=(make_stage(epochs=5),)), is_over=is_over)
    training = trainer.run()
    assert asked == [1, 2, 3, 4, 5, 6, 1, 2]
    assert [epoch.epoch for epoch in training.history] == [1, 2]
    assert "time budget" in training.stopped


# --- left and taken up again ------------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "classic": {"stages": (make_stage(epochs=3),)},
    "staged": {"stages": (make_stage("head", 1), make_stage("full", 2)), "keep": "last"},
    "adamw, averages, one-cycle": {
        "stages": (make_stage(epochs=3, optimizer="adamw", schedule="one-cycle"),),
        "ema": 0.9,
    },
    "cosine from a start": {"stages": (make_stage(epochs=2, schedule="cosine"),), "start_counts": True, "patience": 2},
    "mixed": {"stages": (make_stage(epochs=2),), "mix": mix_rows, "label_smoothing": 0.1},
}


class LeftError(Exception):
    """The training was left here."""


def leave_after(trainer: Trainer, calls: int) -> State | None:
    """Its state after so many calls of `on_step`; None if it ended before."""
    states = []

    def on_step(trainer: Trainer) -> None:
        states.append(trainer.find_state())
        if len(states) == calls:
            raise LeftError

    try:
        trainer.run(on_step=on_step)
    except LeftError:
        return copy_deeply(states[-1])
    return None


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(RECIPES)), first=st.integers(1, 22), second=st.integers(1, 12))
def test_a_training_that_is_left_anywhere_twice_ends_as_if_it_had_not_been(name: str, first: int, second: int) -> None:
    recipe = Recipe(**RECIPES[name])
    whole = make_trainer(recipe)
    expected = whole.run()
    state = leave_after(make_trainer(recipe), first)
    if state is None:
        return
    for calls in (second, 1000):
        torch.manual_seed(12345)  # another process has another random state
        trainer = make_trainer(recipe, seed=8)
        trainer.train_batches = TensorBatches(*make_rows(22, seed=1), 4, shuffle=True)
        trainer.load_state(state)
        if calls < 1000 and (later := leave_after(trainer, calls)) is not None:
            state = later
            continue
        found = trainer.run() if calls == 1000 else None
        if found is not None:
            assert numbers(found) == numbers(expected)
            assert found.best.epoch == expected.best.epoch
            assert name_changes(trainer.network, whole.network.state_dict()) == set()


def test_a_state_of_another_number_of_processes_is_refused() -> None:
    state = leave_after(make_trainer(Recipe(stages=(make_stage(),))), 2)
    assert state is not None
    state.values["processes"] = 3
    with pytest.raises(
        FeatcacheError, match=r"begun with 3 processes, not 1.*torchrun --nproc-per-node 3.*--no-resume"
    ):
        make_trainer(Recipe(stages=(make_stage(),))).load_state(state)


# --- on the disk ------------------------------------------------------------------------------------------------------


def keep_everything(folder: Path, trainer: Trainer, calls: int) -> Checkpoints:
    """Train for a while, with a checkpoint after every step."""
    checkpoints, done = Checkpoints(folder, {"lr": 0.1}, every_seconds=0), []
    checkpoints.is_due = lambda: True  # type: ignore[method-assign]

    def on_step(trainer: Trainer) -> None:
        done.append(keep_if_due(checkpoints, trainer, lambda: {"seconds": len(done)}))
        if len(done) == calls:
            raise LeftError

    with pytest.raises(LeftError):
        trainer.run(on_step=on_step)
    return checkpoints


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("calls", [1, 6, 9])
def test_a_checkpoint_holds_everything(tmp_path: Path, name: str, calls: int) -> None:
    recipe = Recipe(**RECIPES[name])
    whole = make_trainer(recipe)
    expected = whole.run()
    keep_everything(tmp_path, make_trainer(recipe), calls)
    found = Checkpoints(tmp_path, {"lr": 0.1}, every_seconds=0).find()
    assert found is not None
    state, more = found
    assert more == {"seconds": calls - 1}
    trainer = make_trainer(recipe, seed=8)
    trainer.load_state(state)
    assert numbers(trainer.run()) == numbers(expected)
    assert name_changes(trainer.network, whole.network.state_dict()) == set()


def test_a_folder_holds_one_checkpoint_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    checkpoints = keep_everything(tmp_path, make_trainer(Recipe(stages=(make_stage(),))), 9)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "best-000001.safetensors",
        "checkpoint.json",
        "mine.safetensors",
        "network-000009.safetensors",
        "state-000009.safetensors",
    ]
    checkpoints.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_checkpoint_of_which_nothing_else_is_left_takes_its_folder_along(tmp_path: Path) -> None:
    checkpoints = keep_everything(tmp_path / "c", make_trainer(Recipe(stages=(make_stage(),))), 3)
    checkpoints.remove()
    assert not (tmp_path / "c").exists()
    checkpoints.remove()


@pytest.mark.parametrize("file", ["checkpoint.json", "network-000009.safetensors", "state-000009.safetensors"])
@pytest.mark.parametrize("how", ["a flipped byte", "cut short", "gone"])
def test_a_damaged_checkpoint_is_refused_and_named(tmp_path: Path, file: str, how: str) -> None:
    keep_everything(tmp_path, make_trainer(Recipe(stages=(make_stage(),))), 9)
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    checkpoints = Checkpoints(tmp_path, {"lr": 0.1}, every_seconds=0)
    if (file, how) == ("checkpoint.json", "gone"):
        assert checkpoints.find() is None
        return
    with pytest.raises(RunError, match=rf"{file}.*--no-resume starts again"):
        checkpoints.find()


def test_weights_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    trainer = make_trainer(Recipe(stages=(make_stage(epochs=1),)))
    checkpoints, seen = Checkpoints(tmp_path, {}, every_seconds=0), []
    checkpoints.is_due = lambda: True  # type: ignore[method-assign]

    def on_step(trainer: Trainer) -> None:
        if len(seen) == 3:
            with torch.no_grad():
                trainer.network.get_parameter("0.weight")[0, 0] = torch.nan
        seen.append(keep_if_due(checkpoints, trainer, dict))

    with pytest.raises(TrainingError, match="no longer a number in epoch 1"):
        trainer.run(on_step=on_step)
    assert seen == [True] * 3 + [False] * 3
    found = checkpoints.find()
    assert found is not None
    assert found[0].values["batches"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in found[0].network.values())


def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("featcache.training.checkpoints.time.monotonic", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path, {}, every_seconds=5)
    assert not checkpoints.is_due()
    clock[0] = 5
    assert checkpoints.is_due()
    write = Checkpoints._write

    def write_slowly(self: Checkpoints, *what: Any) -> str:
        clock[0] += 2
        return write(self, *what)

    monkeypatch.setattr(Checkpoints, "_write", write_slowly)
    checkpoints.keep(make_trainer(Recipe(stages=(make_stage(),))).find_state(), {})
    clock[0] += 79
    assert not checkpoints.is_due()
    clock[0] += 1
    assert checkpoints.is_due()


assert D  # the rows of test_training
