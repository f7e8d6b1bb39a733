"""What there is to choose from: measured costs against the publishers' own, filters, the text and JSON of the list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, TinyFamily
from torch import nn
from torchvision import models

from featcache.backbones import catalogue, list_backbones, load_backbone
from featcache.backbones.catalogue import describe_layers, find_cost, list_summaries, match_names, measure_cost
from featcache.errors import BackboneError

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for what torch downloads and featcache remembers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# --- costs ------------------------------------------------------------------------------------------------------------


PUBLISHED = (
    "squeezenet1_1 shufflenet_v2_x0_5 mobilenet_v3_small resnet18 efficientnet_b0 regnet_y_400mf alexnet mnasnet0_5 "
    "convnext_tiny densenet121 vit_b_32"
)


@pytest.mark.parametrize("name", PUBLISHED.split())
def test_costs_are_those_that_torchvision_publishes(name: str) -> None:
    meta = models.get_model_weights(name).DEFAULT.meta
    cost = measure_cost(name)
    assert cost.parameters == meta["num_params"]
    assert cost.operations == pytest.approx(meta["_ops"] * 1e9, rel=0.01, abs=0.5e6)  # it is published in millions


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large", "vit_b_32"])
def test_widths_are_those_of_the_features(name: str) -> None:
    backbone = load_backbone(name, weights="none")
    cost = measure_cost(name)
    assert (cost.width, cost.input_shape) == (backbone.width, backbone.preprocessing.input_shape)


def test_measuring_makes_no_values() -> None:
    network, shape = catalogue.make_without_values("vgg19")
    assert all(parameter.is_meta for parameter in network.parameters())
    assert shape == (3, 224, 224)


def test_convolutions_are_counted_by_hand(tiny: type[TinyFamily]) -> None:
    cost = measure_cost("tiny")
    assert cost.parameters == 3 * 8 * 9 + 2 * 8 + 8 * 5 + 5
    assert cost.operations == 8 * 8 * 8 * 3 * 9 + 8 * 5
    assert (cost.width, cost.input_shape) == (8, (3, 16, 16))


def test_a_network_of_timm_is_measured_too() -> None:
    pytest.importorskip("timm")
    cost = measure_cost("timm:test_resnet")
    assert (cost.input_shape, cost.parameters) == ((3, 160, 160), 469_688)
    assert cost.width == load_backbone("timm:test_resnet", weights="none").width


def test_the_cost_of_a_description_is_that_of_its_network(tiny: type[TinyFamily]) -> None:
    cost = find_cost(load_backbone("tiny", weights="none", layer=["conv:avg"]).describe())
    assert cost == measure_cost("tiny")
    assert find_cost({"backbone": "imported:clip"}) is None
    assert find_cost({"backbone": "onnx:net.onnx"}) is None


# --- what was measured is remembered ----------------------------------------------------------------------------------


def test_a_network_is_measured_once(tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    first = list_summaries(["tiny", "squeezenet1_1"])
    monkeypatch.setattr(catalogue, "measure_cost", lambda name: pytest.fail(f"{name} is measured again"))
    assert list_summaries(["tiny", "squeezenet1_1"]) == first
    remembered = json.loads((home / "hub/featcache/backbones.json").read_text())
    assert len(remembered) == 2
    assert any(key.startswith("torchvision ") for key in remembered)


def test_another_version_of_the_library_is_measured_anew(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    first = list_summaries(["squeezenet1_1"])
    path = home / "hub/featcache/backbones.json"
    remembered = json.loads(path.read_text())
    path.write_text(json.dumps({key.replace(" ", " 0.0", 1): {**one, "width": 1} for key, one in remembered.items()}))
    assert list_summaries(["squeezenet1_1"]) == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"tiny": 3}',
        "\x00\xff",
        "{KEY: {}}",
        "{KEY: 3}",
        '{KEY: {"width": 8, "parameters": 3, "operations": 2, "input_shape": 3}}',
        '{KEY: {"width": "x", "parameters": null, "operations": [], "input_shape": [3]}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(text: str, tiny: type[TinyFamily], home: Path) -> None:
    first = list_summaries(["tiny"])
    path = home / "hub/featcache/backbones.json"
    key = json.dumps(next(iter(json.loads(path.read_text()))))
    path.write_bytes(text.replace("KEY", key).encode("latin-1"))
    assert list_summaries(["tiny"]) == first


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tiny: type[TinyFamily], home: Path) -> None:
    home.write_text("a file where the folder should be")
    assert list_summaries(["tiny"])[0].cost is not None


def test_a_network_that_cannot_be_measured_is_listed_without_costs(
    cli: Cli, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise BackboneError(name)

    monkeypatch.setattr(catalogue, "measure_cost", refuse)
    assert list_summaries(["tiny"])[0].cost is None
    listed = cli("backbones", "tin*")
    assert (listed.code, listed.out.splitlines()[1].split()[:5]) == (0, ["tiny", "?", "?", "?", "?"])


# --- names and filters ------------------------------------------------------------------------------------------------


def test_patterns_choose_and_the_order_is_that_of_the_families() -> None:
    assert match_names([]) == list_backbones()
    assert match_names(["squeezenet*"]) == ["squeezenet1_0", "squeezenet1_1"]
    assert match_names(["squeezenet1_1", "squeezenet*"]) == ["squeezenet1_1", "squeezenet1_0"]
    assert match_names(["vit_?_32"]) == ["vit_b_32", "vit_l_32"]


def test_patterns_of_timm_begin_with_timm() -> None:
    pytest.importorskip("timm")
    assert "timm:test_resnet" in match_names(["timm:test_*"])
    assert all(name.startswith("timm:") for name in match_names(["timm:*"]))


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near() -> None:
    with pytest.raises(BackboneError, match=r"^no backbone is called resnext-50\*; near: resnet50"):
        match_names(["resnext-50*"])
    with pytest.raises(BackboneError, match=r"^no backbone is called qqq\*; try '\*'$"):
        match_names(["qqq*"])


def test_kinds_and_limits_choose(cli: Cli) -> None:
    names = lambda *options: [one["name"] for one in cli("backbones", *options, "--json").json]  # noqa: E731
    assert names("squeezenet*", "lraspp*", "--kind", "trunk") == ["lraspp_mobilenet_v3_large"]
    assert names("squeezenet*", "mc3*", "--kind", "video") == ["mc3_18"]
    assert names("squeezenet*", "--max-gflops", "0.5") == ["squeezenet1_1"]
    assert names("squeezenet*", "resnet18", "--max-params", "2") == ["squeezenet1_0", "squeezenet1_1"]


def test_only_weights_that_are_here_are_listed_if_that_is_asked(home: Path, cli: Cli) -> None:
    assert cli("backbones", "squeezenet*", "--here", "--json").json == []
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    (home / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    (home / "hub/checkpoints" / url.rpartition("/")[2]).write_bytes(b"weights")
    listed = cli("backbones", "squeezenet*", "--here", "--json").json
    assert [one["name"] for one in listed] == ["squeezenet1_1"]
    assert "IMAGENET1K_V1*" in cli("backbones", "squeezenet*", "--here").out


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_list_is_a_table(cli: Cli) -> None:
    listed = cli("backbones", "squeezenet1_?")
    assert (listed.code, listed.err) == (0, "")
    header, first, second, *rest = listed.out.splitlines()
    assert header.split() == ["name", "width", "params", "GFLOPs", "input", "top-1", "licence", "weights"]
    assert first.split()[:7] == ["squeezenet1_0", "512", "1.2", "M", "0.819", "224x224", "58.1"]
    assert first.endswith("not stated  IMAGENET1K_V1")
    assert second.split()[0] == "squeezenet1_1"
    assert rest[1].startswith("* on this machine.")


def test_the_json_has_every_number(cli: Cli, tiny: type[TinyFamily]) -> None:
    weights = {"name": "TINY_V1", "licence": "not stated", "is_here": False, "top1": None}
    assert cli("backbones", "tin?", "--json").json == [
        {
            "name": "tiny",
            "kind": "classification",
            "width": 8,
            "parameters": 277,
            "multiply_adds": 13_864,
            "input_shape": [3, 16, 16],
            "weights": [weights],
        }
    ]


def test_one_name_lists_its_weights_and_layers(cli: Cli, tiny: type[TinyFamily]) -> None:
    listed = cli("backbones", "tiny")
    assert listed.code == 0
    assert "weights TINY_V1: not on this machine, licence not stated" in listed.out
    rows = [line.split(maxsplit=1) for line in listed.out.splitlines() if line.startswith("  ")]
    assert rows == [
        ["conv", "8 x 8 x 8"],
        ["norm", "8 x 8 x 8"],
        ["relu", "8 x 8 x 8"],
        ["mean", "8"],
        ["fc", "5"],
    ]
    assert cli("backbones", "tiny", "--json").json["layers"]["norm"] == [8, 8, 8]


def test_every_layer_that_is_listed_can_be_taken(tiny: type[TinyFamily]) -> None:
    for name, inner in describe_layers("tiny").items():
        backbone = load_backbone("tiny", weights="none", layer=[name], pool="flatten")
        assert backbone.width == int(torch.tensor(inner).prod())


def test_layers_of_a_trunk_are_those_of_the_trunk() -> None:
    layers = describe_layers("lraspp_mobilenet_v3_large")
    assert layers
    name = next(reversed(layers))
    network = load_backbone("lraspp_mobilenet_v3_large", weights="none", layer=[f"{name}:avg"]).network
    assert isinstance(network, nn.Module)


def test_an_unknown_name_is_one_line(cli: Cli) -> None:
    outcome = cli("backbones", "resnet-18")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: unknown backbone 'resnet-18': did you mean resnet18?")
    assert cli("backbones", "resnet18", "nothing").code == 1
