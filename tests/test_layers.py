"""Features from named layers: which numbers they are, what they are called, and that they come back."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, TinyFamily, TinyNetwork
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import models

from featcache.backbones import Backbone, load_backbone, remake_backbone, wrap_network
from featcache.backbones.layers import Pick, find_channels, list_layers, parse_layer, pick_layers, pool_output
from featcache.cache import hash_extractor, read_cache
from featcache.cache.reading import format_command
from featcache.errors import BackboneError, SettingsError
from featcache.images import ImageRows, make_evaluation_transform
from featcache.preprocessing import InputFormat
from featcache.runtime import run_network
from featcache.runtime.engines import Model, make_example, make_fused

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Outcome]
TINY = ("--backbone", "tiny", "--weights", "none")
CPU = torch.device("cpu")
SMALL = InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.25,))


def make_images(n: int = 2, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def load_tiny(*layer: str, pool: str | None = None) -> Backbone:
    return load_backbone("tiny", weights="none", layer=layer, pool=pool)


def make_plain(name: str = "tiny", seed: int = 0) -> nn.Module:
    """The network as `load_backbone` makes it from a seed, without featcache."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (TinyNetwork() if name == "tiny" else models.get_model(name, weights=None)).eval().requires_grad_(False)


def run_both(backbone: Backbone, files: list[str]) -> list[NDArray[np.float32]]:
    """The features of files in the eager and in the fused runtime, the latter in several threads."""
    rows = ImageRows(Path(), files, transform=make_evaluation_transform(backbone.preprocessing))
    return [
        np.concatenate(
            [
                batch.values
                for batch in run_network(backbone.network, rows, device=CPU, runtime=runtime, batch_size=2, workers=n)
            ]
        )
        for runtime, n in (("eager", 0), ("fused", 4))
    ]


# --- pools ------------------------------------------------------------------------------------------------------------


def test_avg_max_and_flatten_are_the_plain_torch_code(tiny: type[TinyFamily]) -> None:
    plain, images = make_plain(), make_images()
    maps = plain.norm(plain.conv(images))
    assert maps.shape == (2, 8, 8, 8)
    for pool, expected in {"avg": maps.mean((2, 3)), "max": maps.amax((2, 3)), "flatten": maps.flatten(1)}.items():
        backbone = load_tiny("norm", pool=pool)
        assert torch.equal(backbone.network(images), expected)
        assert backbone.width == expected.shape[1]


def test_a_node_inside_a_forward_function_can_be_named(tiny: type[TinyFamily]) -> None:
    plain, images = make_plain(), make_images()
    expected = torch.relu(plain.norm(plain.conv(images))).amax((2, 3))
    assert torch.equal(load_tiny("relu:max").network(images), expected)


def test_a_layer_that_is_a_vector_needs_no_pool_and_ignores_one(tiny: type[TinyFamily]) -> None:
    plain, images = make_plain(), make_images()
    for pool in (None, "avg", "flatten"):
        backbone = load_tiny("fc", pool=pool)
        assert torch.equal(backbone.network(images), plain(images))
        assert backbone.describe()["layers"] == [{"name": "fc", "pool": "", "width": 5}]


def test_tokens_are_pooled_over_their_number_and_cls_is_the_first() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = models.VisionTransformer(32, 16, 2, 2, 24, 48).eval().requires_grad_(False)
    images, shape = make_images(2, 32), (3, 32, 32)
    tokens = plain._process_input(images)
    tokens = plain.encoder(torch.cat([plain.class_token.expand(2, -1, -1), tokens], dim=1))
    assert tokens.shape == (2, 5, 24)
    pooled = {"cls": tokens[:, 0], "avg": tokens.mean(1), "max": tokens.amax(1), "flatten": tokens.flatten(1)}
    for pool, expected in pooled.items():
        picked = pick_layers(plain, ["encoder.ln"], pool, shape, where="vit")
        torch.testing.assert_close(picked(images), expected, rtol=0, atol=1e-6)
        assert picked.picks[0].width == expected.shape[1]


def test_the_cls_token_of_a_vit_is_what_goes_into_its_classifier() -> None:
    images = make_images(1, 224)
    default = load_backbone("vit_b_32", weights="none")
    cls = load_backbone("vit_b_32", weights="none", layer=["encoder.ln:cls"])
    assert (default.layer, cls.layer) == ("input of heads.head", "encoder.ln (cls)")
    torch.testing.assert_close(cls.network(images), default.network(images), rtol=0, atol=1e-6)


def test_channels_last_maps_are_pooled_over_their_positions() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4]).eval().requires_grad_(False)
    images = make_images(2, 64)
    maps = plain.norm(plain.features(images))
    assert maps.shape == (2, 8, 8, 16)
    for pool, expected in {"avg": maps.mean((1, 2)), "max": maps.amax((1, 2)), "flatten": maps.flatten(1)}.items():
        picked = pick_layers(plain, ["norm"], pool, (3, 64, 64), where="swin")
        torch.testing.assert_close(picked(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("inner", "shape", "axis"),
    [
        ((64, 56, 56), (3, 224, 224), 0),
        ((56, 56, 64), (3, 224, 224), 2),
        ((7, 7, 7), (3, 224, 224), 0),
        ((49, 7, 7), (3, 224, 224), 0),
        ((64, 8, 16), (3, 32, 64), 0),
        ((8, 16, 64), (3, 32, 64), 2),
        ((512, 1, 1), (3, 224, 224), 0),
        ((1, 1, 512), (3, 224, 224), 2),
        ((50, 768), (3, 224, 224), 1),
        ((400, 2, 7, 7), (3, 16, 112, 112), 0),
        ((8, 7, 7, 768), (3, 16, 224, 224), 3),
    ],
)
def test_the_channels_are_found_beside_what_looks_like_the_image(
    inner: tuple[int, ...], shape: tuple[int, ...], axis: int
) -> None:
    assert find_channels(inner, shape) == axis


def test_a_clip_is_pooled_over_time_too() -> None:
    maps = torch.randn(2, 4, 3, 5, 5)
    assert torch.equal(pool_output(maps, Pick(name="a", pool="avg", axis=1)), maps.mean((2, 3, 4)))


# --- several layers ---------------------------------------------------------------------------------------------------


def test_several_layers_in_one_pass_are_each_alone_side_by_side(tiny: type[TinyFamily]) -> None:
    images, names = make_images(), ("norm:max", "fc", "conv:avg", "relu:flatten")
    together = load_tiny(*names)
    alone = [load_tiny(name).network(images) for name in names]
    before = tiny.calls
    assert torch.equal(together.network(images), torch.cat(alone, dim=1))
    assert tiny.calls - before == len(images)
    assert together.width == 8 + 5 + 8 + 512
    assert [pick["width"] for pick in together.describe()["layers"]] == [8, 5, 8, 512]


def test_layers_of_a_real_network_are_its_own_intermediate_outputs() -> None:
    plain, images = make_plain("shufflenet_v2_x0_5"), make_images(2, 64)
    maps = plain.stage3(plain.stage2(plain.maxpool(plain.conv1(images))))
    expected = torch.cat([maps.mean((2, 3)), plain.stage4(maps).amax((2, 3))], dim=1)
    layers = ["stage3:avg", "stage4:max"]
    size = InputFormat(input_size=(64, 64))
    backbone = load_backbone("shufflenet_v2_x0_5", weights="none", layer=layers, images=size)
    torch.testing.assert_close(backbone.network(images), expected, rtol=0, atol=1e-6)


def test_one_layer_may_be_pooled_in_two_ways(tiny: type[TinyFamily]) -> None:
    images, alone = make_images(), [load_tiny("norm:max"), load_tiny("norm:avg")]
    both = load_tiny("norm:max", "norm:avg")
    assert torch.equal(both.network(images), torch.cat([one.network(images) for one in alone], dim=1))
    watched = wrap_network(Branching(), SMALL, layer=["norm:max", "norm:avg"])
    assert watched.network(images).shape == (2, 12)


def test_pool_is_for_the_layers_that_name_none(tiny: type[TinyFamily]) -> None:
    assert load_tiny("conv", "norm:max", pool="avg").layer == "conv (avg), norm (max)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", None)), ("a.b:max", ("a.b", "max")), ("/head/Add_output:0", None), ("StatefulCall/x:0", None)],
)
def test_a_layer_is_a_name_and_perhaps_its_pool(text: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_layer(text, None) == (expected or (text, None))


# --- what is not computed, and what cannot be traced ------------------------------------------------------------------


class Followed(nn.Module):
    """A convolution, and behind it a module and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.later, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.later(self.conv(images)).mean((2, 3)))


class Branching(nn.Module):
    """What it does depends on values, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.one, self.other, self.fc = nn.Conv2d(6, 7, 1), nn.Conv2d(6, 7, 1), nn.Linear(7, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.conv(images))
        maps = self.one(maps) if maps.sum() > -1e9 else self.other(maps)
        return self.fc(maps.mean((2, 3)))


@pytest.mark.parametrize(("layer", "runs"), [("conv:avg", []), ("later:avg", [2])])
def test_what_comes_behind_the_layer_is_not_computed(layer: str, runs: list[int]) -> None:
    plain, seen = Followed(), []
    plain.later.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    network = wrap_network(plain, SMALL, layer=[layer]).network
    seen.clear()
    network(make_images(2))
    assert seen == runs


def test_an_untraceable_network_gives_its_modules_outputs() -> None:
    plain, images = Branching().eval(), make_images()
    backbone = wrap_network(plain, SMALL, layer=["norm:avg", "one:max"])
    with torch.no_grad():
        maps = plain.norm(plain.conv(images))
        expected = torch.cat([maps.mean((2, 3)), plain.one(maps).amax((2, 3))], dim=1)
    assert torch.equal(backbone.network(images), expected)
    assert list_layers(Branching().eval(), (3, 16, 16), where="branching")["norm"] == (6, 7, 7)


def test_an_untraceable_network_agrees_in_the_threads_of_the_fused_runtime(flat_photos: Path) -> None:
    files = sorted(str(path) for path in flat_photos.rglob("*.jpg"))
    backbone = wrap_network(Branching(), SMALL, layer=["conv:max", "norm:avg", "one:avg"])
    eager, fused = run_both(backbone, files)
    np.testing.assert_allclose(fused, eager, rtol=1e-4, atol=1e-5)
    assert len(np.unique(eager.round(4), axis=0)) == len(files)


def test_a_traced_network_is_fused_too() -> None:
    network = wrap_network(Uneven(), SMALL, layer=["norm:avg", "huge:avg"]).network
    fused = make_fused(Model(network, nn.Identity(), make_example(make_images(1)[0], 2))).run._network
    assert isinstance(fused.source.norm, nn.Identity)
    torch.testing.assert_close(fused(make_images()), network(make_images()), rtol=1e-3, atol=0)


class Uneven(nn.Module):
    """Tiny numbers before a BatchNorm and huge ones behind it: an error in the first would drown in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.huge = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.conv.weight.data *= 1e-3
        self.norm.running_var.fill_(1e-2)
        self.norm.running_mean.fill_(3e-3)
        self.huge.weight.data *= 1e9

    def forward(self, images: Tensor) -> Tensor:
        return self.huge(self.norm(self.conv(images))).mean((2, 3))


def test_layers_of_uneven_size_are_each_exact_in_the_fused_runtime(flat_photos: Path) -> None:
    files = sorted(str(path) for path in flat_photos.rglob("*.jpg"))[:4]
    backbone = wrap_network(Uneven(), SMALL, layer=["conv:avg", "huge:avg"])
    eager, fused = run_both(backbone, files)
    np.testing.assert_allclose(fused[:, :4], eager[:, :4], rtol=1e-3)
    np.testing.assert_allclose(fused[:, 4:], eager[:, 4:], rtol=1e-3)


def test_a_layer_that_does_not_run_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"^layer other does not run in a forward pass; choose another$"):
        wrap_network(Branching(), SMALL, layer=["other:avg"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pool", "message"),
    [
        (["nrm"], None, "tiny has no layer 'nrm': did you mean norm"),
        (["norm"], None, "layer norm of tiny gives 8 x 8 x 8 numbers per image, not a vector; say how to pool them"),
        (["norm"], "cls", "layer norm of tiny has no tokens but a map of 8 x 8 x 8; --pool cls is for transformers"),
        (["norm:avg", "conv:max", "norm"], "avg", "--layer norm is given twice; once is enough"),
        (["norm:mean"], None, "--layer norm:mean: unknown pool 'mean', expected NAME or NAME:POOL with avg, max"),
        ([], "avg", "--pool avg has nothing to pool: the features of tiny are a vector; name a --layer"),
    ],
)
def test_what_gives_no_features_is_refused(
    layers: list[str], pool: str | None, message: str, tiny: type[TinyFamily]
) -> None:
    with pytest.raises((BackboneError, SettingsError)) as caught:
        load_tiny(*layers, pool=pool)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# --- description and key ----------------------------------------------------------------------------------------------


def test_the_description_names_the_layers_only_if_they_were_asked_for(tiny: type[TinyFamily]) -> None:
    assert "layers" not in load_tiny().describe()
    described = load_tiny("norm:max").describe()
    assert described["layers"] == [{"name": "norm", "pool": "max", "width": 8}]
    assert json.loads(json.dumps(described)) == described


def test_the_key_changes_with_layer_pool_and_order_and_with_nothing_else(tiny: type[TinyFamily]) -> None:
    choices = [(), ("norm:avg",), ("norm:max",), ("conv:avg",), ("norm:avg", "conv:avg"), ("conv:avg", "norm:avg")]
    keys = [hash_extractor(load_tiny(*layers).describe()) for layers in choices]
    assert len(set(keys)) == len(keys)
    assert hash_extractor(load_tiny("norm", pool="avg").describe()) == keys[1]


@pytest.mark.parametrize("layers", [(), ("norm:max", "fc"), ("relu:flatten",)])
def test_a_backbone_made_again_from_its_description_gives_the_same_bits(
    layers: tuple[str, ...], tiny: type[TinyFamily]
) -> None:
    backbone, images = load_tiny(*layers), make_images()
    again = remake_backbone(json.loads(json.dumps(backbone.describe())))
    assert again.describe() == backbone.describe()
    assert torch.equal(again.network(images), backbone.network(images))


def test_a_trunk_with_its_pool_comes_back_too() -> None:
    size = InputFormat(input_size=(64, 64))
    backbone = load_backbone("lraspp_mobilenet_v3_large", weights="none", pool="max", images=size)
    again = remake_backbone(backbone.describe())
    assert again.layer == backbone.layer == "widest map of the trunk (max)"
    images = make_images(1, 64)
    assert torch.equal(again.network(images), backbone.network(images))


# --- the command line -------------------------------------------------------------------------------------------------


def test_layers_go_all_the_way_from_extraction_to_prediction(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    extract = cli("extract", photos, *TINY, "--layer", "norm:max", "--layer", "conv", "--pool", "avg", "--json")
    assert extract.code == 0
    assert extract.json["dim"] == 16
    assert extract.json["extractor"]["layer"] == "norm (max), conv (avg)"
    assert cli("train-head", "features.h5").code == 0
    predict = cli("predict", "runs/head", photos / "val", "--json")
    assert [Path(row["path"]).parent.name for row in predict.json] == [row["label"] for row in predict.json]
    again = cli("extract", photos, *TINY, "--layer", "norm:max", "--layer", "conv:avg", "--json")
    assert (again.code, again.json["computed"]) == (0, 0)


def test_a_cache_of_another_layer_is_stale(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    assert cli("extract", photos, *TINY, "--layer", "norm:max").code == 0
    other = cli("extract", photos, *TINY, "--layer", "norm:avg")
    assert other.code == 1
    assert "was made by another extractor (layer: norm (max) -> norm (avg)" in other.err
    assert cli("extract", photos, *TINY).code == 1


def test_the_command_of_a_cache_makes_the_same_cache_again(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    options = ("--layer", "norm:max", "--layer", "conv", "--pool", "avg", "--input-size", "12x16", "--mean", "0.4")
    assert cli("extract", photos, *TINY, *options, "-o", "first.h5").code == 0
    before = read_cache("first.h5")
    _, *words = shlex.split(format_command(Path("first.h5"), before.provenance))
    Path("first.h5").unlink()
    assert cli(*words).code == 0
    after = read_cache("first.h5")
    assert after.content_sha256 == before.content_sha256
    assert before.extractor["preprocessing"]["crop"] == [12, 16]


def test_the_rows_are_the_layers_of_the_images(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    assert cli("extract", photos, *TINY, "--layer", "norm:max", "--runtime", "eager").code == 0
    cache, plain = read_cache("features.h5"), make_plain()
    transform = make_evaluation_transform(load_tiny().preprocessing)
    split = cache.splits["val"]
    rows = ImageRows(photos, split.listing.paths, transform=transform)
    images = torch.stack([rows[i][1] for i in range(len(split))])
    expected = plain.norm(plain.conv(images)).amax((2, 3)).numpy()
    np.testing.assert_allclose(split.features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer1.0.bn1:avg", "layer2:avg"]),
        ("alexnet", ["features.0:avg", "features.1:max", "features.3:avg"]),
    ],
)
def test_a_later_operation_in_place_leaves_a_picked_layer_alone(name: str, layers: list[str]) -> None:
    images = torch.randn(2, 3, 64, 64)
    look = InputFormat(input_size=(64, 64))
    alone = [load_backbone(name, weights="none", layer=one, images=look).network(images) for one in layers]
    together = load_backbone(name, weights="none", layer=layers, images=look).network(images)
    assert float(alone[0].min()) < 0
    assert torch.equal(together, torch.cat(alone, dim=1))


class InPlace(nn.Module):
    """Cannot be traced, and changes what its first layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        if float(maps.mean()) > 1e9:
            return maps
        return self.fc(self.relu(maps).mean((2, 3)))


def test_a_watched_layer_is_noted_before_it_is_changed() -> None:
    network, images = InPlace(), torch.randn(2, 3, 8, 8)
    expected = network.conv(images).mean((2, 3))
    look = InputFormat(input_size=(8, 8), mean=(0.5,), std=(0.5,))
    assert torch.equal(wrap_network(network, look, layer=["conv:avg"]).network(images), expected)


def test_a_layer_whose_rows_are_not_images_is_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(BackboneError, match="gives 64 rows for one image, not one; choose the layer around it"):
        load_backbone("timm:swin_tiny_patch4_window7_224", weights="none", layer="layers.0.blocks.0.attn:avg")
