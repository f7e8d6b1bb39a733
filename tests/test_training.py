"""featcache.training: the loop against a plainly written one, the best epoch, the modes, the batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.errors import FeatcacheError
from featcache.training import (
    Batches,
    Epoch,
    Recipe,
    Stage,
    TensorBatches,
    evaluate,
    set_mode_all,
    set_mode_fixed_batch_norm,
    set_mode_frozen,
    train,
)

D, N_CLASSES = 6, 3


pytestmark = pytest.mark.usefixtures("one_thread")


def make_rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes: (N, D) and (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    return torch.randn(n, D, generator=generator) + 0.7 * F.one_hot(labels, D), labels


def make_network(seed: int = 0) -> nn.Sequential:
    """Layer "0" and BatchNorm "1", dropout, last layer "4"."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, N_CLASSES))


def make_recipe(
    epochs: int, *, lr: float = 0.05, mode: Callable[[nn.Module], None] = set_mode_all, **settings: Any
) -> Recipe:
    def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
        wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.SGD(wanted, lr=lr, momentum=0.9)

    stage = Stage(
        name="all",
        epochs=epochs,
        choose_parameters=lambda network: None,
        set_training_mode=mode,
        make_optimizer=make_optimizer,
        make_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, 2 * steps, 0.1),
    )
    return Recipe(stages=(stage,), **settings)


def copy_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def name_changes(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


# --- the loop ---------------------------------------------------------------------------------------------------------


def train_like_the_tutorial(network, train_rows, val_rows, epochs):  # type: ignore[no-untyped-def]
    """https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html, on tensors instead of images."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    best_weights, best_accuracy, lines = copy.deepcopy(network.state_dict()), 0.0, []
    for _ in range(epochs):
        line = [optimizer.param_groups[0]["lr"]]
        for phase, (inputs, labels) in (("train", train_rows), ("val", val_rows)):
            network.train(phase == "train")
            order = torch.randperm(len(labels)) if phase == "train" else torch.arange(len(labels))
            running_loss, running_corrects = 0.0, 0
            for rows in order.split(4):
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = network(inputs[rows])
                    loss = criterion(outputs, labels[rows])
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * len(rows)
                running_corrects += int((outputs.argmax(1) == labels[rows]).sum())
            if phase == "train":
                scheduler.step()
            accuracy = running_corrects / len(labels)
            line += [running_loss / len(labels), accuracy]
            if phase == "val" and accuracy > best_accuracy:
                best_accuracy, best_weights = accuracy, copy.deepcopy(network.state_dict())
        lines.append(line)
    network.load_state_dict(best_weights)
    return lines


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loop_is_the_tutorials_bit_for_bit(seed: int) -> None:
    train_rows, val_rows = make_rows(31, seed), make_rows(14, seed + 100)
    mine, plain = make_network(seed), make_network(seed)
    torch.manual_seed(9)
    lines = train_like_the_tutorial(plain, train_rows, val_rows, epochs=5)
    torch.manual_seed(9)
    batches = TensorBatches(*train_rows, 4, shuffle=True), TensorBatches(*val_rows, 4)
    training = train(mine, *batches, make_recipe(5))
    assert name_changes(mine, plain.state_dict()) == set()
    assert name_changes(mine, make_network(seed).state_dict()) >= {"0.weight", "1.running_mean", "4.bias"}
    found = [[e.lr, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy] for e in training.history]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(lines), rtol=1e-5, atol=1e-7)


def test_the_history_has_a_line_an_epoch_and_the_schedule_in_it() -> None:
    network, rows, told = make_network(), make_rows(20), []
    batches = TensorBatches(*rows, 8)
    training = train(network, batches, batches, make_recipe(5), on_epoch=lambda epoch, best: told.append((epoch, best)))
    assert [epoch.epoch for epoch in training.history] == [1, 2, 3, 4, 5]
    assert [epoch.lr for epoch in training.history] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])
    assert [epoch for epoch, _ in told] == list(training.history)
    assert [epoch for epoch, is_best in told if is_best][-1] == training.best
    assert all(epoch.seconds > 0 for epoch in training.history)
    assert not any(module.training for module in network.modules())


class ScriptedValidation:
    """Validation labels made so that epoch k has accuracy shares[k]; keeps the network's weights of each epoch."""

    def __init__(self, network: nn.Module, shares: list[float]) -> None:
        self.network, self.shares, self.states = network, shares, []
        self.inputs = make_rows(8, seed=5)[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        share = self.shares[len(self.states)]
        self.states.append(copy_state(self.network))
        labels = self.network(self.inputs).argmax(1)
        labels[round(8 * share) :] = (labels[round(8 * share) :] + 1) % N_CLASSES
        yield self.inputs, labels


@pytest.mark.parametrize(
    ("shares", "best"),
    [
        ([0.25, 0.75, 0.5], 2),
        ([0.75, 0.5, 0.25], 1),
        ([0.25, 0.5, 0.75], 3),
        ([0.5, 0.75, 0.75], 2),
        ([0.0, 0.0, 0.0], 1),
        ([1.0, 1.0, 1.0], 1),
    ],
)
def test_the_network_is_left_with_the_weights_of_its_best_epoch(shares: list[float], best: int) -> None:
    network = make_network()
    validation = ScriptedValidation(network, shares)
    training = train(network, TensorBatches(*make_rows(20), 4), validation, make_recipe(3))
    assert [epoch.val_accuracy for epoch in training.history] == shares
    assert training.best is training.history[best - 1]
    assert name_changes(network, validation.states[best - 1]) == set()
    assert all(name_changes(network, state) for i, state in enumerate(validation.states) if i != best - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training_and_names_the_learning_rate(value: float) -> None:
    network, (inputs, labels) = nn.Linear(D, N_CLASSES), make_rows(8)
    inputs[5, 2] = value
    batches, told = TensorBatches(inputs, labels, 4), []
    with pytest.raises(
        FeatcacheError, match=r"the loss is no longer a number in epoch 1 .*(nan|inf).* --lr than 0\.25"
    ) as caught:
        train(
            network,
            batches,
            batches,
            make_recipe(3, lr=0.25),
            on_epoch=lambda epoch, is_best: told.append(epoch),
        )
    assert "\n" not in str(caught.value)
    assert told == []


def test_a_learning_rate_far_too_large_is_noticed_in_the_epoch_it_happens() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, N_CLASSES))
    batches = TensorBatches(*make_rows(40), 4)
    with pytest.raises(
        FeatcacheError, match=r"the loss is no longer a number in epoch \d .*; try a smaller --lr than 1e\+06"
    ):
        train(network, batches, batches, make_recipe(9, lr=1e6))


def test_a_last_step_that_breaks_the_network_is_noticed_too() -> None:
    network, (inputs, labels) = nn.Linear(D, N_CLASSES), make_rows(8)
    batches = TensorBatches(100 * inputs, labels, 8)
    with pytest.raises(FeatcacheError, match="--lr"):
        train(network, batches, batches, make_recipe(1, lr=1e38))


# --- modes ------------------------------------------------------------------------------------------------------------

STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def train_in_mode(mode: Callable[[nn.Module], None], network: nn.Module) -> set[str]:
    """Names of the tensors that two epochs change."""
    before, batches = copy_state(network), TensorBatches(*make_rows(30), 8)
    train(network, batches, batches, make_recipe(2, mode=mode))
    return name_changes(network, before)


def test_mode_all_trains_everything_and_lets_batch_norm_follow() -> None:
    network = make_network()
    assert train_in_mode(set_mode_all, network) == set(network.state_dict())


def test_mode_fixed_batch_norm_keeps_statistics_and_trains_the_rest() -> None:
    network = make_network()
    assert train_in_mode(set_mode_fixed_batch_norm, network) == set(network.state_dict()) - STATISTICS
    set_mode_fixed_batch_norm(network)
    assert [module.training for module in network] == [True, False, True, True, True]


def test_mode_frozen_changes_the_last_layer_alone() -> None:
    network = make_network().requires_grad_(False)
    network[4].requires_grad_(True)
    assert train_in_mode(set_mode_frozen, network) == {"4.weight", "4.bias"}
    set_mode_frozen(network.train())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_mode_fixed_batch_norm_knows_every_batch_norm(make: type[nn.Module]) -> None:
    network = nn.Sequential(nn.Sequential(make(4)), nn.Dropout())
    set_mode_fixed_batch_norm(network)
    assert [network[0][0].training, network[1].training] == [False, True]


def test_the_mode_is_set_anew_after_each_evaluation() -> None:
    network, seen = make_network(), []
    network[0].register_forward_hook(lambda *_: seen.append((network.training, network[1].training)))
    batches = TensorBatches(*make_rows(8), 8)
    train(network, batches, batches, make_recipe(2, mode=set_mode_fixed_batch_norm))
    assert seen == [(True, False), (False, False)] * 2


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_evaluation_counts_every_row_once_whatever_the_batches(batch_size: int) -> None:
    network, (inputs, labels) = make_network().eval(), make_rows(10)
    logits = network(inputs).detach()
    loss, accuracy = evaluate(network.train(), TensorBatches(inputs, labels, batch_size))
    assert accuracy == int((logits.argmax(1) == labels).sum()) / 10
    assert 0 < accuracy < 1
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_evaluation_changes_nothing_and_draws_nothing() -> None:
    network = make_network()
    before, state = copy_state(network), torch.get_rng_state()
    evaluate(network.train(), TensorBatches(*make_rows(10), 4))
    assert name_changes(network, before) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training


def test_training_accuracy_and_loss_weigh_the_last_short_batch_by_its_rows() -> None:
    network, (inputs, labels) = nn.Linear(D, N_CLASSES), make_rows(7)
    with torch.no_grad():
        logits = network(inputs)
    batches: Batches = TensorBatches(inputs, labels, 4)
    first: Epoch = train(network, batches, batches, make_recipe(1, lr=1e-12)).history[0]
    assert first.train_loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert first.train_accuracy == int((logits.argmax(1) == labels).sum()) / 7


# --- batches of tensors -----------------------------------------------------------------------------------------------


def test_batches_in_order_are_the_rows_in_order() -> None:
    inputs, labels = make_rows(10)
    batches = list(TensorBatches(inputs, labels, 4))
    assert [len(part) for part, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in batches]), inputs)
    assert torch.equal(torch.cat([part for _, part in batches]), labels)


def test_shuffled_batches_hold_every_row_once_with_its_own_label() -> None:
    inputs, labels = torch.arange(23.0)[:, None], torch.arange(23) * 10
    batches = list(TensorBatches(inputs, labels, 5, shuffle=True))
    values = torch.cat([part for part, _ in batches])[:, 0]
    assert [len(part) for part, _ in batches] == [5, 5, 5, 5, 3]
    assert sorted(values.tolist()) == list(range(23))
    assert values.tolist() != list(range(23))
    assert torch.equal(torch.cat([part for _, part in batches]), (10 * values).long())


def test_shuffling_follows_torchs_seed_and_differs_each_time() -> None:
    batches = TensorBatches(*make_rows(20), 20, shuffle=True)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append([next(iter(batches))[1].tolist() for _ in range(2)])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][0] != orders[0][1]


def test_batches_in_order_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(TensorBatches(*make_rows(10), 3))
    assert torch.equal(torch.get_rng_state(), before)
