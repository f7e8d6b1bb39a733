"""Backbones of timm: its networks' own features, its own transform, its weights from the hub's cache or a file."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, draw_photo
from safetensors.torch import save_file
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from featcache.backbones import attach_classifier, load_backbone, remake_backbone  # noqa: E402
from featcache.backbones import timm as family  # noqa: E402
from featcache.backbones.catalogue import describe_layers, list_weights  # noqa: E402
from featcache.errors import BackboneError, MissingExtraError, WeightsError, WeightsUnavailableError  # noqa: E402
from featcache.images import make_evaluation_transform  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Outcome]
SMALL = (
    "resnet10t",
    "vit_tiny_patch16_224",
    "mobilenetv3_small_050",
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "efficientnet_lite0",
    "test_efficientnet",
    "test_vit3",
    "test_byobnet",
)
# Of each kind of crop and interpolation one; volo's crop is larger than its resize.
TRANSFORMS = (
    "resnet10t",
    "dla34",
    "vit_tiny_patch16_224",
    "test_resnet",
    "coat_lite_medium_384",
    "dm_nfnet_f0",
    "dm_nfnet_f3",
    "volo_d4_448",
    "efficientnet_b1_pruned",
    "tf_efficientnet_lite3",
    "mobileone_s1",
    "inception_resnet_v2",
)


def make_plain(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(name).eval().requires_grad_(False)


def make_images(shape: tuple[int, ...], n: int = 2) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_features_are_those_of_timm_without_a_classifier(name: str, tmp_path: Path) -> None:
    plain = make_plain(name)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    plain.reset_classifier(0)
    backbone = load_backbone(f"timm:{name}", weights=str(tmp_path / "w.safetensors"))
    images = make_images(backbone.preprocessing.input_shape)
    expected = plain(images)
    assert backbone.width == expected.shape[1]
    torch.testing.assert_close(backbone.network(images), expected, rtol=1e-6, atol=1e-6)


def test_random_weights_follow_from_the_seed() -> None:
    images, plain = make_images((3, 160, 160)), make_plain("test_resnet", seed=5)
    plain.reset_classifier(0)
    backbone = load_backbone("timm:test_resnet", weights="none", seed=5)
    torch.testing.assert_close(backbone.network(images), plain(images), rtol=0, atol=1e-6)


def test_layers_of_a_transformer_are_its_own_tokens() -> None:
    images, plain = make_images((3, 160, 160)), make_plain("test_vit")
    tokens = plain.forward_features(images)
    layers = ["norm:cls", "norm:avg"]
    backbone = load_backbone("timm:test_vit", weights="none", layer=layers)
    expected = torch.cat([tokens[:, 0], tokens.mean(1)], dim=1)
    torch.testing.assert_close(backbone.network(images), expected, rtol=0, atol=1e-5)


def test_a_backbone_is_made_again_from_its_description() -> None:
    backbone = load_backbone("timm:test_resnet", weights="none", layer=["layer2:max"])
    again, images = remake_backbone(backbone.describe()), make_images((3, 160, 160))
    assert torch.equal(again.network(images), backbone.network(images))
    assert again.describe() == backbone.describe()


def test_layers_are_listed_in_the_order_of_their_running() -> None:
    layers = describe_layers("timm:test_resnet")
    assert next(iter(layers)) == "conv1.0"
    assert (list(layers)[-1], layers["fc"]) == ("fc", (1000,))
    assert layers["layer4.0.act2"] == (layers["global_pool.flatten"][0], 5, 5)


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(517, 389), (231, 301)])
def test_the_evaluation_transform_is_timms_own_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    photo = draw_photo((90, 140, 60), 3, size)
    model = nn.Module()
    model.pretrained_cfg = dataclasses.asdict(timm.models.get_pretrained_cfg(name))
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    mine = make_evaluation_transform(family.describe_input(name, None, model).make_preprocessing())
    assert torch.equal(mine(photo), theirs(photo))


def test_another_tag_has_its_own_preprocessing() -> None:
    means = [
        load_backbone(f"timm:efficientnet_b0.{tag}", weights="none").preprocessing.mean
        for tag in ("ra_in1k", "ra4_e3600_r224_in1k")
    ]
    assert means == [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)]


def test_a_crop_that_featcache_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    border = timm.data.resolve_data_config(pretrained_cfg={"crop_mode": "border"})
    monkeypatch.setattr(timm.data, "resolve_data_config", lambda **_: border)
    with pytest.raises(BackboneError) as caught:
        load_backbone("timm:test_resnet", weights="none")
    assert str(caught.value) == "timm:test_resnet wants its images border at 224 x 224, which featcache cannot do"


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224", "test_efficientnet"])
def test_one_step_of_fine_tuning_changes_the_whole_network(name: str) -> None:
    backbone = load_backbone(f"timm:{name}", weights="none")
    images = make_images(backbone.preprocessing.input_shape)
    features = backbone.network(images)
    network, classifier = attach_classifier(backbone, 3)
    torch.testing.assert_close(network(images), network.get_submodule(classifier)(features))
    network.requires_grad_(True)
    before = {key: tensor.detach().clone() for key, tensor in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    nn.functional.cross_entropy(network.train()(images), torch.tensor([0, 2])).backward()
    optimizer.step()
    changed = [key for key, tensor in network.named_parameters() if not torch.equal(tensor, before[key])]
    assert len(changed) > 0.5 * len(before)
    assert network.eval()(images).shape == (2, 3)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache in an empty folder, and no net."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_hub(hub: Path, repository: str, tensors: dict[str, Tensor]) -> Path:
    """Weights in the hub's cache, as its client lays them down."""
    folder, commit = hub / f"models--{repository.replace('/', '--')}", "1" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    save_file(tensors, folder / "snapshots" / commit / "model.safetensors")
    return folder / "snapshots" / commit / "model.safetensors"


def test_default_weights_come_from_the_hubs_cache(hub: Path) -> None:
    plain = make_plain("test_resnet", seed=9)
    assert not list_weights("timm:test_resnet")[0].is_here
    fill_hub(hub, "timm/test_resnet.r160_in1k", plain.state_dict())
    assert list_weights("timm:test_resnet")[0].is_here
    plain.reset_classifier(0)
    for name, weights in (
        ("test_resnet", "default"),
        ("test_resnet.r160_in1k", "default"),
        ("test_resnet", "r160_in1k"),
    ):
        backbone, images = load_backbone(f"timm:{name}", weights=weights), make_images((3, 160, 160))
        torch.testing.assert_close(backbone.network(images), plain(images), rtol=0, atol=1e-6)
        assert backbone.weights["name"] == "timm:test_resnet.r160_in1k"
        assert backbone.weights["sha256"]


def test_weights_that_cannot_be_had_are_one_line_with_the_cures(hub: Path) -> None:
    with pytest.raises(WeightsUnavailableError) as caught:
        load_backbone("timm:test_resnet")
    message = str(caught.value)
    assert message.startswith("the weights of timm:test_resnet.r160_in1k cannot be had (")
    assert "--weights PATH" in message
    assert "\n" not in message


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(make_plain("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"weights from w\.safetensors do not fit"):
        load_backbone("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(WeightsUnavailableError, match=f"{endpoint} cannot be reached: Connection refused"):
        load_backbone("timm:test_resnet")


def test_a_file_of_the_hub_can_be_named_as_weights(hub: Path) -> None:
    file = fill_hub(hub, "timm/test_resnet.r160_in1k", make_plain("test_resnet", seed=9).state_dict())
    default = load_backbone("timm:test_resnet")
    named = load_backbone("timm:test_resnet", weights=str(file))
    assert named.weights["tensors_sha256"] == default.weights["tensors_sha256"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "near"), [("resnet10", "resnet10t"), ("convnext_ato", "convnext_atto")])
def test_an_unknown_name_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(BackboneError, match=rf"unknown backbone 'timm:{wrong}': did you mean timm:{near}\?"):
        load_backbone(f"timm:{wrong}", weights="none")


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(
        BackboneError, match=r"unknown backbone 'timm:test_resnet.nonsense': did you mean timm:test_resn"
    ):
        load_backbone("timm:test_resnet.nonsense", weights="none")


def test_timm_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"^backbones timm:NAME need an optional package: pip install 'feat"):
        load_backbone("timm:resnet18", weights="none")


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_timm_backbone_goes_all_the_way(cli: Cli, photos: Path) -> None:
    tiny = ("--backbone", "timm:test_resnet", "--weights", "none", "--input-size", "32")
    extract = cli("extract", photos, *tiny, "--json")
    assert extract.code == 0, extract.err
    assert extract.json["extractor"]["preprocessing"]["crop"] == 32
    assert cli("train-head", "features.h5").code == 0
    assert cli("predict", "runs/head", photos / "val").code == 0
    assert cli("extract", photos, *tiny, "--json").json["computed"] == 0


@pytest.mark.parametrize(
    ("name", "width"), [("caformer_s18", 512), ("vit_base_patch16_siglip_224", 768), ("coat_lite_tiny", 320)]
)
def test_what_only_looks_like_a_classifier_is_left_to_timm(name: str, width: int) -> None:
    backbone = load_backbone(f"timm:{name}", weights="none")
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(backbone.network.state_dict(), strict=False)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = plain(images)
        assert backbone.width == expected.shape[1] == width
        torch.testing.assert_close(backbone.network(images), expected, rtol=0, atol=1e-5)
