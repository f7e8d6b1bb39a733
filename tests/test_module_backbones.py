"""A user's own network: module:PACKAGE.FUNCTION on the command line, wrap_network in Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome
from torch import Tensor, nn
from torchvision import models

import featcache
from featcache.backbones import load_backbone, remake_backbone, wrap_network
from featcache.cache import hash_extractor, read_cache
from featcache.errors import BackboneError, RunError, SettingsError, WeightsError
from featcache.images import ImageRows, make_evaluation_transform
from featcache.preprocessing import InputFormat

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Outcome]
SMALL = InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.25,))
SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    preprocessing = {"input_size": 16, "mean": 0.5, "std": [0.25, 0.25, 0.25]}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, images):
        return self.fc(torch.relu(self.conv(images)).mean((2, 3)) * FACTOR)


def small():
    return Net()


def raises():
    raise ValueError("no such file: weights.pth")


def number():
    return 3


def needs_more(path):
    return Net()


def maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    network.preprocessing = Net.preprocessing
    return network


def silent():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 4))


def odd():
    network = Net()
    network.preprocessing = {"size": 3}
    return network


constant = 7
"""


@pytest.fixture
def package(cli: Cli, request: pytest.FixtureRequest) -> Iterator[str]:
    """A package of the user's in the current folder, with a name that no other test has imported."""
    name = f"nets_{abs(hash(request.node.name)) % 10**9}"
    Path(name).mkdir()
    Path(name, "__init__.py").write_text("")
    write_source(name, 1)
    yield name
    here = str(Path.cwd())
    sys.path[:] = [one for one in sys.path if one != here]
    forget(name)


def write_source(package: str, factor: int) -> None:
    Path(package, "small.py").write_text(SOURCE.replace("FACTOR", str(factor)))


def forget(package: str) -> None:
    """As if this were another process, which imports the package anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


class Net(nn.Module):
    """A convolution, a pool and a classifier, without a word on its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


class Softmax(Net):
    """The same with a softmax behind the classifier."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


def make_net(kind: type[nn.Module] = Net, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def make_images(n: int = 2, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


# --- on the command line ----------------------------------------------------------------------------------------------


def test_a_function_goes_all_the_way_and_is_said_to_be_run(cli: Cli, package: str, photos: Path) -> None:
    name = f"module:{package}.small.small"
    extract = cli("extract", photos, "--backbone", name, "--json")
    assert (extract.code, extract.json["dim"]) == (0, 6), extract.err
    assert f"{name} runs your own code" in extract.err
    assert extract.json["extractor"]["preprocessing"]["crop"] == 16
    assert cli("train-head", "features.h5").code == 0
    predict = cli("predict", "runs/head", photos / "val", "--json")
    assert (predict.code, len(predict.json)) == (0, 6), predict.err
    assert f"{name} runs your own code" in predict.err
    assert cli("extract", photos, "--backbone", name, "--json").json["computed"] == 0
    finetune = cli("finetune", photos, "--backbone", name, "--epochs", "1", "--json")
    assert finetune.code == 0, finetune.err
    assert cli("predict", "runs/finetune", photos / "val").code == 0
    assert cli("compare", photos, "--backbone", name, "--epochs", "1").code == 0


def test_options_come_before_what_the_network_says(cli: Cli, package: str, photos: Path) -> None:
    name = f"module:{package}.small.small"
    options = ("--input-size", "20", "--layer", "conv:max", "--mean", "0", "--std", "1")
    extract = cli("extract", photos, "--backbone", name, *options, "--json")
    assert extract.json["extractor"]["preprocessing"]["crop"] == 20
    assert extract.json["extractor"]["layer"] == "conv (max)"


def test_the_layers_of_a_function_are_listed(cli: Cli, package: str) -> None:
    listed = cli("backbones", f"module:{package}.small.small", "--json")
    assert listed.json["layers"]["conv"] == [6, 7, 7]


def test_changed_code_never_serves_old_rows(cli: Cli, package: str, photos: Path) -> None:
    name = f"module:{package}.small.small"
    assert cli("extract", photos, "--backbone", name).code == 0
    assert cli("train-head", "features.h5").code == 0
    before = read_cache("features.h5")
    write_source(package, 2)
    forget(package)
    again = cli("extract", photos, "--backbone", name)
    assert again.code == 1
    assert "was made by another extractor (options.code_sha256: " in again.err
    predict = cli("predict", "runs/head", photos / "val")
    assert predict.code == 1
    assert f"the code of {name} has changed since; bring it back, or extract again" in predict.err
    assert cli("extract", photos, "--backbone", name, "--force").code == 0
    after = read_cache("features.h5")
    assert after.key != before.key
    np.testing.assert_allclose(after.splits["val"].features, 2 * before.splits["val"].features, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("small.raises", "raised ValueError: no such file: weights.pth"),
        ("small.number", "gave int: expected a torch.nn.Module"),
        ("small.needs_more", "raised TypeError: needs_more() missing 1 required positional argument: 'path'"),
        ("small.constant", "is int: expected a function that makes a network"),
        ("small.nothing", "cannot be imported (AttributeError: module"),
        ("nothing.small", "cannot be imported (ModuleNotFoundError: No module named"),
        ("small.silent", "does not say what its images must look like: give --input-size and --mean and --std"),
        ("small.maps", "gives 4 x 14 x 14 numbers per image, not a vector; say how to pool them"),
        ("small.odd", "['size'] describes no images: expected an object with input_size, resize"),
    ],
)
def test_what_gives_no_network_is_one_line(cli: Cli, package: str, photos: Path, function: str, message: str) -> None:
    outcome = cli("extract", photos, "--backbone", f"module:{package}.{function}")
    assert (outcome.code, outcome.out) == (1, "")
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert f"module:{package}.{function}" in last
    assert not Path("features.h5").exists()


def test_a_name_without_a_package_is_explained(cli: Cli, photos: Path) -> None:
    outcome = cli("extract", photos, "--backbone", "module:small")
    assert "module:small is no function: expected module:PACKAGE.FUNCTION, such as module:nets.small" in outcome.err


def test_a_function_has_its_own_weights(package: str) -> None:
    with pytest.raises(WeightsError, match="has its own weights; --weights none is for networks that featcache makes"):
        load_backbone(f"module:{package}.small.small", weights="none")


def test_weights_of_a_file_go_into_the_network_of_a_function(package: str, tmp_path: Path) -> None:
    name = f"module:{package}.small.small"
    plain = load_backbone(name, seed=4)
    torch.save({f"module.{key}": tensor for key, tensor in plain.network.state_dict().items()}, tmp_path / "w.pth")
    other = load_backbone(name, weights=str(tmp_path / "w.pth"))
    assert torch.equal(other.network(make_images()), plain.network(make_images()))
    again = remake_backbone(other.describe())
    assert torch.equal(again.network(make_images()), plain.network(make_images()))


def test_maps_are_pooled_if_that_is_stated_and_come_back(package: str) -> None:
    backbone = load_backbone(f"module:{package}.small.maps", pool="max")
    assert (backbone.width, backbone.layer) == (4, "output (max)")
    again = remake_backbone(backbone.describe())
    assert torch.equal(again.network(make_images()), backbone.network(make_images()))


# --- in Python --------------------------------------------------------------------------------------------------------


def test_a_wrapped_network_gives_what_goes_into_its_classifier() -> None:
    plain, images = make_net(), make_images()
    plain.eval()
    with torch.no_grad():
        expected = torch.relu(plain.norm(plain.conv(images))).mean((2, 3))
    backbone = wrap_network(make_net(), SMALL)
    assert torch.equal(backbone.network(images), expected)
    assert (backbone.name, backbone.width, backbone.layer) == ("Net", 6, "input of fc")
    assert not any(module.training for module in backbone.network.modules() if not isinstance(module, nn.Identity))
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())


def test_a_network_without_a_classifier_gives_its_output() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(5))
    images = make_images()
    with torch.no_grad():
        expected = plain(images)
    backbone = wrap_network(plain, SMALL)
    assert (backbone.layer, backbone.width) == ("output", 5)
    assert torch.equal(backbone.network(images), expected)


def test_a_network_of_torchvision_can_be_wrapped() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = models.squeezenet1_1(weights=None)
    wrapped = wrap_network(plain, InputFormat(input_size=(64, 64), mean=(0.5,), std=(0.5,)))
    named = load_backbone("squeezenet1_1", weights="none")
    images = make_images(side=64)
    assert torch.equal(wrapped.network(images), named.network(images))


def test_what_comes_behind_the_classifier_is_not_taken_for_part_of_the_features() -> None:
    with pytest.raises(BackboneError) as caught:
        wrap_network(make_net(Softmax), SMALL)
    assert str(caught.value) == "Softmax does more behind its last layer fc than pool; name the layer with --layer"
    named = wrap_network(make_net(Softmax), SMALL, layer=["relu:avg"])
    assert torch.equal(named.network(make_images()), wrap_network(make_net(), SMALL).network(make_images()))


def test_a_network_of_maps_needs_a_pool() -> None:
    plain, images = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), make_images()
    with pytest.raises(BackboneError, match=r"gives 5 x 14 x 14 numbers per image, not a vector"):
        wrap_network(plain, SMALL)
    with torch.no_grad():
        expected = plain(images).amax((2, 3))
    assert torch.equal(wrap_network(plain, SMALL, pool="max").network(images), expected)


def test_images_are_described_by_argument_or_attribute_or_both() -> None:
    plain = make_net()
    with pytest.raises(BackboneError, match="Net does not say what its images must look like: give --input-size"):
        wrap_network(plain)
    plain.preprocessing = {"input_size": 24, "mean": 0.1, "std": 0.2, "channels": "BGR"}
    assert wrap_network(plain).preprocessing.size == (24, 24)
    stated = wrap_network(make_net(), InputFormat(input_size=(8, 16), mean=(0.1,), std=(0.2,))).preprocessing
    assert (stated.size, stated.mean) == ((8, 16), (0.1, 0.1, 0.1))


def test_the_wrong_number_of_channels_is_one_line() -> None:
    grey = InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.5,), channels="L")
    with pytest.raises(BackboneError) as caught:
        wrap_network(make_net(), grey)
    assert str(caught.value).startswith("Net does not take images of 1 x 16 x 16 (")
    assert "\n" not in str(caught.value)


def test_the_key_is_of_code_weights_and_images() -> None:
    keys = [
        hash_extractor(wrap_network(network, images, layer=layer).describe())
        for network, images, layer in (
            (make_net(), SMALL, []),
            (make_net(seed=1), SMALL, []),
            (make_net(), InputFormat(input_size=(16, 16), mean=(0.4,), std=(0.25,)), []),
            (make_net(), SMALL, ["norm:avg"]),
            (nn.Sequential(make_net()), SMALL, []),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert hash_extractor(wrap_network(make_net(), SMALL).describe()) == keys[0]


def test_the_same_network_twice_is_the_same_key() -> None:
    plain = make_net()
    first = wrap_network(plain, SMALL, layer=["norm:avg"]).describe()
    assert wrap_network(plain, SMALL, layer=["norm:avg"]).describe() == first


def test_extraction_head_and_prediction_with_a_network_given_in_python(photos: Path, tmp_path: Path) -> None:
    backbone = wrap_network(make_net(), SMALL, name="mine")
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", backbone=backbone, runtime="eager")
    assert (extraction.computed, extraction.cache.extractor["backbone"]) == (18, "mine")
    assert featcache.extract_features(photos, tmp_path / "f.h5", backbone=backbone).computed == 0
    split, plain = extraction.cache.splits["val"], make_net().eval()
    rows = ImageRows(photos, split.listing.paths, transform=make_evaluation_transform(backbone.preprocessing))
    images = torch.stack([rows[i][1] for i in range(len(split))])
    with torch.no_grad():
        expected = torch.relu(plain.norm(plain.conv(images))).mean((2, 3))
    np.testing.assert_allclose(split.features[:], expected, rtol=0, atol=1e-6)
    folder = featcache.train_head(tmp_path / "f.h5", tmp_path / "head").folder
    with pytest.raises(RunError, match=r"was made with the network mine, given in Python; give it again"):
        featcache.load_classifier(folder)
    classifier = featcache.load_classifier(folder, backbone=wrap_network(make_net(), SMALL, name="mine"))
    probabilities, bad = classifier.predict_files(list(split.listing.paths), root=photos, device=torch.device("cpu"))
    assert bad == []
    assert (probabilities.argmax(1) == split.listing.labels).all()
    with pytest.raises(RunError, match="was trained on features of mine with the weights given in Python"):
        featcache.load_classifier(folder, backbone=wrap_network(make_net(seed=1), SMALL, name="mine"))


def test_a_network_of_other_layers_images_or_code_is_refused_for_a_head(photos: Path, tmp_path: Path) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", backbone=wrap_network(make_net(), SMALL))
    folder = featcache.train_head(tmp_path / "f.h5", tmp_path / "head").folder
    others = {
        "preprocessing": wrap_network(make_net(), InputFormat(input_size=(16, 16), mean=(0.0,), std=(1.0,))),
        "layer": wrap_network(make_net(), SMALL, layer=["norm:avg"]),
        "code": wrap_network(nn.Sequential(make_net()), SMALL),
    }
    for what, backbone in others.items():
        with pytest.raises(RunError, match=f"was made with a network of another {what} than the one given"):
            featcache.load_classifier(folder, backbone=backbone)


def test_fine_tuning_a_network_given_in_python(photos: Path, tmp_path: Path) -> None:
    run = featcache.finetune(photos, tmp_path / "run", backbone=wrap_network(make_net(), SMALL), epochs=1)
    assert run.record.extractor["backbone"] == "Net"
    classifier = featcache.load_classifier(run.folder, backbone=wrap_network(make_net(seed=3), SMALL))
    files = sorted(str(path) for path in (photos / "val").rglob("*.jpg"))
    probabilities, _ = classifier.predict_files(files, device=torch.device("cpu"))
    assert probabilities.shape == (6, 2)


def test_fine_tuning_from_a_layer_puts_a_classifier_behind_it(photos: Path, tmp_path: Path) -> None:
    backbone = wrap_network(make_net(), SMALL, layer=["norm:avg"])
    run = featcache.finetune(photos, tmp_path / "run", backbone=backbone, epochs=1)
    again = wrap_network(make_net(seed=3), SMALL, layer=["norm:avg"])
    assert featcache.load_classifier(run.folder, backbone=again).classes == ("blue", "red")


def test_settings_of_a_network_that_is_made_already_are_refused(photos: Path, tmp_path: Path) -> None:
    backbone = wrap_network(make_net(), SMALL)
    for name, value in (("weights", "none"), ("layer", ["norm:avg"]), ("pool", "avg"), ("input_size", (8, 8))):
        with pytest.raises(SettingsError, match=f"^{name} is stated and so is a backbone that is made already"):
            featcache.extract_features(photos, tmp_path / "f.h5", backbone=backbone, **{name: value})
    assert not (tmp_path / "f.h5").exists()
