"""featcache.training: which parameters learn how fast, and how the learning rate goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from featcache.training import group_parameters, list_layers, make_scheduler, weigh_classes


def find_rates(network: nn.Module, head: str, **settings: float) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in group_parameters(network, head, **settings)
        for parameter in group["params"]
    }


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "layers"),
    [
        ("resnet18", "fc", ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))]),
        ("vgg11_bn", "classifier", [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]),
        ("mobilenet_v2", "classifier", [f"features.{i}" for i in range(19)]),
        ("vit_b_32", "heads", ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12))]),
    ],
)
def test_layers_are_the_blocks_from_the_image_to_the_head(name: str, head: str, layers: list[str]) -> None:
    with torch.device("meta"):
        network = getattr(models, name)()
    found = list_layers(network, head)
    assert sorted(name for names in found for name in names) == sorted(
        name for name, _ in network.named_parameters() if not name.startswith(f"{head}.")
    )
    assert [layer for names in found for layer in layers if names[0].startswith(f"{layer}.")] == layers


def test_norms_that_stand_alone_belong_to_the_layer_before() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    assert list_layers(network, "4") == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["2.weight", "2.bias"],
    ]


# --- groups -----------------------------------------------------------------------------------------------------------


def test_the_classic_recipe_is_one_group_in_the_networks_own_order() -> None:
    network = models.resnet18()
    (group,) = group_parameters(network, "fc", lr=0.001, lr_backbone=0.001)
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in network.parameters()}
    assert (group["lr"], group["weight_decay"]) == (0.001, 0.0)


def test_head_and_backbone_have_rates_of_their_own_and_the_heads_group_comes_first() -> None:
    network = models.resnet18()
    rates = find_rates(network, "fc", lr=0.5, lr_backbone=0.05)
    assert {name for name, (rate, _) in rates.items() if rate == 0.5} == {"fc.weight", "fc.bias"}
    assert {rate for rate, _ in rates.values()} == {0.5, 0.05}
    assert group_parameters(network, "fc", lr=0.5, lr_backbone=0.05)[0]["lr"] == 0.5


def test_norms_and_biases_do_not_decay_and_weights_do() -> None:
    network = models.resnet18()
    rates = find_rates(network, "fc", lr=1.0, lr_backbone=1.0, weight_decay=0.1)
    decaying = {name for name, (_, decay) in rates.items() if decay}
    assert decaying == {name for name, parameter in network.named_parameters() if parameter.ndim in (2, 4)}
    assert "fc.weight" in decaying
    assert "fc.bias" not in decaying


def test_what_a_network_exempts_itself_does_not_decay_nor_do_vectors_in_disguise() -> None:
    vit = timm.create_model("vit_tiny_patch16_224")
    decays = {name: decay for name, (_, decay) in find_rates(vit, "head", lr=1, lr_backbone=1, weight_decay=1).items()}
    assert (decays["pos_embed"], decays["cls_token"], decays["blocks.0.attn.qkv.weight"]) == (0, 0, 1)
    convnext = models.convnext_tiny()
    rates = find_rates(convnext, "classifier", lr=1, lr_backbone=1, weight_decay=1)
    assert rates["features.1.0.layer_scale"] == (1, 0)


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    rates = find_rates(models.resnet18(), "fc", lr=0.3, lr_backbone=0.1, layer_decay=0.5)
    expected = {"fc.weight": 0.3, "layer4.1.conv1.weight": 0.05, "layer4.0.bn1.bias": 0.025, "conv1.weight": 0.1 / 2**9}
    assert {name: rates[name][0] for name in expected} == pytest.approx(expected)
    assert rates["bn1.weight"] == rates["conv1.weight"]


def test_frozen_parameters_are_in_no_group() -> None:
    network = models.resnet18().requires_grad_(False)
    network.fc.requires_grad_(True)
    assert set(find_rates(network, "fc", lr=1, lr_backbone=1)) == {"fc.weight", "fc.bias"}


def test_balanced_weights_let_every_class_count_the_same() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = weigh_classes(labels, 3).numpy()
    assert (weights * np.bincount(labels)).tolist() == pytest.approx([10 / 3] * 3)


# --- schedules --------------------------------------------------------------------------------------------------------


def find_schedule(name: str, *, epochs: int, epoch_steps: int, warmup: float | None = None) -> list[float]:
    """Every step's rate in proportion to the largest; a second group checks that each keeps its own."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(parameters, (0.8, 0.2), strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make_scheduler(
        name, optimizer, epochs=epochs, epoch_steps=epoch_steps, step_size=2, gamma=0.1, warmup=warmup
    )
    rates = []
    for _ in range(epochs * epoch_steps):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(4 * second)
        rates.append(first / 0.8)
        optimizer.step()
        scheduler.step()
    return rates


def test_step_divides_every_so_many_epochs_whatever_their_length() -> None:
    assert find_schedule("step", epochs=5, epoch_steps=3) == pytest.approx([1] * 6 + [0.1] * 6 + [0.01] * 3)


def test_cosine_goes_to_zero_along_half_a_cosine() -> None:
    rates = find_schedule("cosine", epochs=4, epoch_steps=5)
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)])


@pytest.mark.parametrize("warmup", [None, 1.0, 0.5])
def test_one_cycle_goes_up_to_the_rate_and_down_to_nothing(warmup: float | None) -> None:
    rates = find_schedule("one-cycle", epochs=5, epoch_steps=4, warmup=warmup)
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert peak == pytest.approx(20 * 0.3 if warmup is None else 4 * warmup, abs=1)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_warm_up_grows_from_a_hundredth_and_then_the_schedule_is_as_without(name: str) -> None:
    plain = find_schedule(name, epochs=4, epoch_steps=5)
    warmed = find_schedule(name, epochs=4, epoch_steps=5, warmup=1.2)
    assert warmed[0] == pytest.approx(0.01 * plain[0])
    assert warmed[:6] == sorted(warmed[:6])
    assert warmed[6:] == pytest.approx(plain[6:])


@pytest.mark.parametrize("name", ["step", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [None, 0.0, 0.3, 7.0])
def test_every_schedule_stands_a_single_step_and_a_warm_up_that_is_too_long(name: str, warmup: float | None) -> None:
    for epochs, epoch_steps in ((1, 1), (1, 2), (2, 1)):
        rates = find_schedule(name, epochs=epochs, epoch_steps=epoch_steps, warmup=warmup)
        assert len(rates) == epochs * epoch_steps
        assert all(0 <= rate <= 1 + 1e-9 for rate in rates)
