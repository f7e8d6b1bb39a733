"""torchvision's zoo through featcache: the original models' own activations, transforms and training, written out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_class
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import datasets, models, transforms

from featcache import InputFormat, extract_features, load_backbone
from featcache.backbones import attach_classifier
from featcache.backbones import torchvision as torchvision_family
from featcache.errors import BackboneError, WeightsError
from featcache.images import make_evaluation_transform

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from zoo import LAST, TRUNKS, make_original, relative_difference, see_features

pytestmark = pytest.mark.usefixtures("one_thread")

# The whole zoo, with fine-tuning and export, is scripts/zoo.py; of models that differ in size alone one is enough here.
CLASSIC = [
    *("resnet18", "alexnet", "vgg16", "squeezenet1_0", "densenet161", "inception_v3", "googlenet"),
    *("shufflenet_v2_x1_0", "mobilenet_v2", "resnext50_32x4d", "wide_resnet50_2", "mnasnet1_0"),
]
NEWER = ["efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "vit_b_16", "swin_t", "mobilenet_v3_large"]
VIDEO = ["r3d_18", "s3d"]
DENSE = ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"]


@pytest.mark.parametrize("name", [*CLASSIC, *NEWER, *VIDEO, *DENSE])
def test_features_are_what_a_hook_on_the_original_model_sees(name: str) -> None:
    original, backbone = make_original(name), load_backbone(name, weights="none")
    tensors = original.get_submodule(TRUNKS[name][0]).state_dict() if name in TRUNKS else original.state_dict()
    (backbone.network.source.network if name in TRUNKS else backbone.network).load_state_dict(tensors, strict=False)
    shape = backbone.preprocessing.input_shape
    images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    expected = see_features(name, original, images)
    with torch.inference_mode():
        features = backbone.network(images)
    assert features.shape == expected.shape == (1, backbone.width)
    assert relative_difference(features, expected) <= 1e-5
    assert backbone.classifier == LAST.get(name, "")


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_classification_model_sees_images_as_its_own_transforms_make_them(name: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3)).astype(np.uint8))
    for entry in torchvision_family.list_weights(name):
        preset = models.get_model_weights(name)[entry.name].transforms()
        images = torchvision_family.describe_input(name, entry.name, nn.Identity())
        assert torch.equal(make_evaluation_transform(images.make_preprocessing())(image), preset(image))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_that_come_from_elsewhere_bring_the_input_transform_of_their_builder(name: str) -> None:
    assert torchvision_family.list_options(name, "IMAGENET1K_V1") == {"transform_input": True}
    assert torchvision_family.list_options(name, None) == {}
    network = torchvision_family.make_network(name, {"transform_input": True})
    assert network.transform_input
    assert not network.aux_logits


def test_vision_transformers_are_made_for_the_images_of_their_weights() -> None:
    assert torchvision_family.list_options("vit_b_16", "IMAGENET1K_V1") == {}
    assert torchvision_family.list_options("vit_b_16", "IMAGENET1K_SWAG_E2E_V1") == {"image_size": 384}


def test_old_names_in_the_files_of_densenet_are_understood(tmp_path: Path) -> None:
    state = load_backbone("densenet121", weights="none").network.state_dict()
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): one for name, one in state.items()}
    assert set(old) != set(state)
    torch.save(old, tmp_path / "w.pth")
    backbone = load_backbone("densenet121", weights=str(tmp_path / "w.pth"), seed=1)
    assert all(torch.equal(one, state[name]) for name, one in backbone.network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize("part", ["whole", "trunk"])
def test_a_trunk_takes_the_weights_of_the_whole_model_or_its_own(prefix: str, part: str, tmp_path: Path) -> None:
    original = make_original("lraspp_mobilenet_v3_large")
    state = (original if part == "whole" else original.backbone).state_dict()
    save_file({f"{prefix}{name}": one.contiguous() for name, one in state.items()}, tmp_path / "w.safetensors")
    backbone = load_backbone("lraspp_mobilenet_v3_large", weights=str(tmp_path / "w.safetensors"))
    mine = backbone.network.source.network.state_dict()
    assert all(torch.equal(one, mine[name]) for name, one in original.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_fine_tuning_replaces_the_layer_that_was_removed(name: str) -> None:
    backbone = load_backbone(name, weights="none")
    kind = nn.Conv2d if name == "squeezenet1_1" else nn.Linear
    network, classifier = attach_classifier(backbone, 3)
    assert classifier == backbone.classifier
    assert isinstance(network.get_submodule(classifier), kind)
    logits = network.train()(torch.randn(2, *backbone.preprocessing.input_shape))
    assert logits.shape == (2, 3)


def test_a_trunk_is_fine_tuned_with_a_layer_behind_its_features() -> None:
    backbone = load_backbone("lraspp_mobilenet_v3_large", weights="none")
    network, classifier = attach_classifier(backbone, 3)
    assert classifier == "head"
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_images_that_a_network_does_not_take_are_named() -> None:
    with pytest.raises(BackboneError, match=r"vit_b_16 does not take images of 3 x 96 x 96 .*--input-size"):
        load_backbone("vit_b_16", weights="none", images=InputFormat(input_size=(96, 96)))


def test_a_layer_behind_the_classifier_has_the_classifier_of_the_weights(tmp_path: Path) -> None:
    original = make_original("resnet18")
    torch.save(original.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("resnet18", weights=str(tmp_path / "w.pth"), layer="fc")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(backbone.network(images), original(images))


@pytest.mark.parametrize("classes", [0, 7])
def test_a_layer_behind_the_classifier_is_refused_where_the_weights_have_none(classes: int, tmp_path: Path) -> None:
    state = {name: one for name, one in make_original("resnet18").state_dict().items() if not name.startswith("fc.")}
    if classes:
        state |= {"fc.weight": torch.ones(classes, 512), "fc.bias": torch.ones(classes)}
    torch.save(state, tmp_path / "w.pth")
    assert load_backbone("resnet18", weights=str(tmp_path / "w.pth"), layer="avgpool:avg").width == 512
    with pytest.raises(WeightsError, match="have no classifier fc that fits resnet18, and layer fc needs it"):
        load_backbone("resnet18", weights=str(tmp_path / "w.pth"), layer="fc")


# --- resnet18, all of it written out in plain torchvision -------------------------------------------------------------


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """DATA/{train,val}/{blue,red}: 4 + 2 photographs of each class."""
    for s, (split, n) in enumerate({"train": 4, "val": 2}.items()):
        for c, (name, colour) in enumerate({"blue": (40, 60, 200), "red": (210, 50, 40)}.items()):
            fill_class(tmp_path / "photos" / split / name, colour, n, seed=1000 * s + 100 * c)
    return tmp_path / "photos"


PLAIN = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def test_the_cached_features_of_resnet18_are_those_of_plain_torchvision_bit_for_bit(
    two_classes: Path, tmp_path: Path
) -> None:
    plain = make_original("resnet18")
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    plain.fc = nn.Identity()
    data = datasets.ImageFolder(str(two_classes / "train"), PLAIN)
    with torch.inference_mode():
        expected = plain(torch.stack([image for image, _ in data])).numpy()
    cache = extract_features(
        two_classes,
        tmp_path / "f.h5",
        weights=str(tmp_path / "w.pth"),
        runtime="eager",
        batch_size=len(data),
        workers=0,
    ).cache
    assert cache.splits["train"].listing.paths == tuple(
        Path(path).relative_to(two_classes).as_posix() for path, _ in data.imgs
    )
    assert np.array_equal(cache.splits["train"].features, expected)
