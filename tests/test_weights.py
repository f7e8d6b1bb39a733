"""featcache.backbones.weights: checkpoints as people have them, addresses, files that would run something."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyFamily, TinyNetwork
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache.backbones import load_backbone
from featcache.backbones.weights import fetch_weights, find_downloads, fit_weights, is_url, read_weights, strip_prefixes
from featcache.errors import WeightsError, WeightsUnavailableError
from featcache.files import hash_bytes

save_old = partial(torch.save, _use_new_zipfile_serialization=False)


def tiny_state(seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(TinyNetwork().state_dict())


def is_same(found: Any, expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def refusal_of(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read weights from {path}: ")
    assert "\n" not in message
    assert "\x1b" not in message
    assert "weights_only" not in message  # torch's advice to run what is in the file
    return message


# --- training checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema"])
def test_a_checkpoint_is_read_by_its_entry(entry: str, save: Callable[..., None], tmp_path: Path) -> None:
    network = TinyNetwork()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict()
    rest = {"epoch": 3, "best_acc1": 0.5, "arch": "tiny", "optimizer": optimizer, "args": {"lr": 0.1}, "scaler": None}
    save({**rest, entry: network.state_dict()}, tmp_path / "checkpoint.pth.tar")
    file = read_weights(tmp_path / "checkpoint.pth.tar")
    assert is_same(file.tensors, network.state_dict())
    assert file.name == f"checkpoint.pth.tar ({entry})"
    assert file.sha256 == hash_bytes((tmp_path / "checkpoint.pth.tar").read_bytes())


def test_averaged_weights_are_taken_only_where_there_are_no_others(tmp_path: Path) -> None:
    torch.save({"state_dict_ema": tiny_state(1), "model": tiny_state(2), "epoch": 1}, tmp_path / "w.pth")
    file = read_weights(tmp_path / "w.pth")
    assert is_same(file.tensors, tiny_state(2))
    assert file.name == "w.pth (model)"


def test_an_entry_that_is_only_a_name_is_passed_over(tmp_path: Path) -> None:
    torch.save({"model": "tiny", "net": tiny_state(), "state_dict": {}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").name == "w.pth (net)"


def test_a_plain_state_dict_keeps_its_name(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").name == "w.pth"


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"epoch": 3, "teacher": {}}, "entry 'epoch' is int, not a tensor; expected a state dict"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "entry 'b' of state_dict is int, not a tensor"),
        ({}, "it holds nothing, expected a state dict of tensors"),
        ([torch.ones(1)], "it holds list, expected a state dict of tensors"),
    ],
)
def test_a_checkpoint_without_a_state_dict_is_refused_by_what_it_holds(
    checkpoint: object, message: str, tmp_path: Path
) -> None:
    torch.save(checkpoint, tmp_path / "w.pth")
    refusal = refusal_of(tmp_path / "w.pth")
    assert message in refusal
    assert "a checkpoint that has one as state_dict, model, " in refusal


def test_tensors_are_read_from_their_content_whatever_the_suffix(tmp_path: Path) -> None:
    for name in ("w.pth", "w.pt", "w.bin", "w"):
        save_file(tiny_state(), tmp_path / name)
        assert is_same(read_weights(tmp_path / name).tensors, tiny_state())


# --- what wrappers put before the names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.module.backbone."]
)
@pytest.mark.parametrize("classifier", [True, False])
def test_prefixes_of_wrappers_are_left_out(prefix: str, classifier: bool, tmp_path: Path, tiny: object) -> None:
    state = {name: tensor for name, tensor in tiny_state(3).items() if classifier or not name.startswith("fc.")}
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "w.pth")
    backbone = load_backbone("tiny", weights=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.network.conv.weight, state["conv.weight"])
    assert backbone.weights["name"] == "w.pth (state_dict)"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_what_torch_itself_wraps_is_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network = TinyNetwork()
    wrapped = wrap(network).state_dict()
    assert not set(wrapped) & set(network.state_dict())
    assert is_same(strip_prefixes(wrapped, network.state_dict()), network.state_dict())


def test_a_prefix_that_only_some_names_have_stays() -> None:
    tensors = {"model.a": torch.ones(1), "loss.weight": torch.ones(1)}
    assert is_same(strip_prefixes(tensors, ["a"]), tensors)


def test_a_prefix_that_the_network_wants_stays() -> None:
    tensors = {"model.a": torch.ones(1), "model.b": torch.ones(1)}
    assert set(strip_prefixes(tensors, ["model.a", "model.b"])) == {"model.a", "model.b"}
    assert set(strip_prefixes({f"module.{name}": t for name, t in tensors.items()}, ["model.a", "model.b"])) == set(
        tensors
    )
    assert set(strip_prefixes(tensors, ["x"])) == set(tensors)
    assert strip_prefixes({}, ["x"]) == {}


def test_tensors_of_another_network_are_refused_by_the_names_that_they_have() -> None:
    with pytest.raises(WeightsError, match=r"tensor conv\.weight \(8, 3, 3, 3\) is missing"):
        fit_weights(TinyNetwork(), {"module.a": torch.ones(1)}, replaced="fc", where="w.pth")


# --- what would like to run -------------------------------------------------------------------------------------------


class Evil:
    """Unpickled without care, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickle_plainly(value: object, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def save_tar(value: object, path: Path) -> None:
    """The tar format of torch before 0.1.10, each of its members the pickle."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(pickle.dumps(value))
            archive.addfile(member, io.BytesIO(pickle.dumps(value)))


WRITERS: dict[str, Callable[[object, Path], None]] = {
    "zip": torch.save,
    "old": save_old,
    "plain 2": pickle_plainly,
    "plain 5": partial(pickle_plainly, protocol=5),
    "tar": save_tar,
}


@pytest.mark.parametrize("name", ["w.pth", "w.tar", "w.safetensors"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("hide", [lambda evil: evil, lambda evil: {"state_dict": tiny_state(), "args": evil}])
def test_a_malicious_file_of_any_format_is_refused_and_does_nothing(
    name: str, write: Callable[[object, Path], None], hide: Callable[[object], object], tmp_path: Path
) -> None:
    write(hide(Evil(tmp_path / "marker")), tmp_path / name)
    refusal_of(tmp_path / name)
    assert not (tmp_path / "marker").exists()


def test_a_call_that_a_file_wants_is_named(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "marker"), tmp_path / "w.pth")
    message = refusal_of(tmp_path / "w.pth")
    assert f"it would run {os.mkdir.__module__}.mkdir, which no weights need; do not trust it" in message


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize(
    ("value", "name"),
    [(argparse.Namespace(lr=0.1), "argparse.Namespace"), (np.float64(0.5), "scalar"), (Path("runs"), "pathlib.")],
    ids=["arguments", "numpy scalar", "path"],
)
def test_a_checkpoint_that_pickles_more_names_it_and_the_way_out(
    value: object, name: str, save: Callable[..., None], tmp_path: Path
) -> None:
    save({"state_dict": tiny_state(), "more": value}, tmp_path / "w.pth")
    message = refusal_of(tmp_path / "w.pth")
    assert "it pickles " in message
    assert name in message
    assert 'torch.save(checkpoint["state_dict"], PATH)' in message


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize(
    "network", [TinyNetwork(), nn.Linear(2, 2), {"model": nn.Linear(2, 2)}], ids=["own", "torch's", "entry"]
)
def test_a_whole_pickled_network_is_refused_with_the_way_out(
    network: object, save: Callable[..., None], tmp_path: Path
) -> None:
    save(network, tmp_path / "w.pth")
    message = refusal_of(tmp_path / "w.pth")
    assert "it is a whole pickled network (" in message
    assert "torch.save(network.state_dict(), PATH)" in message


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_refused_because_it_holds_code(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "w.pt")
    assert "it is a TorchScript archive, which holds code" in refusal_of(tmp_path / "w.pt")


def test_a_safetensors_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"text", b"\xff" * 8 + b"{", b"PK\x03\x04", (20).to_bytes(8, "little") + b"{" + b" " * 19):
        (tmp_path / "w.safetensors").write_bytes(content)
        refusal_of(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"", b"\x1f\x8b\x08", b"\x80\x04."])
def test_what_is_no_weights_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert "it is damaged, or no state dict of tensors" in refusal_of(tmp_path / "w.pth")


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "*")
    assert find_downloads() == tmp_path / "torch/hub/checkpoints"
    return find_downloads()


@pytest.fixture
def published(tmp_path: Path, serve: Callable[[Path], str]) -> tuple[str, str]:
    """A state dict on a web server: its address and digest."""
    (tmp_path / "site").mkdir()
    torch.save(tiny_state(), tmp_path / "site/my net.pth")
    return f"{serve(tmp_path / 'site')}/my%20net.pth", hash_bytes((tmp_path / "site/my net.pth").read_bytes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("https://a/b", True), ("HTTP://a", True), ("file:///a", True), ("default", False), ("C:\\w.pth", False),
     ("a/b://c", False), ("", False), ("./https:/x", False)],
)  # fmt: skip
def test_an_address_is_told_from_a_path(text: str, expected: bool) -> None:
    assert is_url(text) == expected


def test_weights_from_an_address_are_fetched_once_and_kept_by_name_and_digest(
    published: tuple[str, str], torch_home: Path, tmp_path: Path
) -> None:
    url, digest = published
    file = fetch_weights(f"{url}?download=1#sha256={digest.upper()}")
    assert is_same(file.tensors, tiny_state())
    assert (file.name, file.sha256) == (f"my_net-{digest[:8]}.pth", digest)
    assert [path.name for path in torch_home.iterdir()] == [file.name]
    (tmp_path / "site/my net.pth").unlink()
    assert fetch_weights(f"{url}#sha256={digest}").name == file.name


@pytest.mark.parametrize(
    "fragment", ["", "#", "#sha256=", "#sha256=0123abcd", "#md5=" + "0" * 32, "#sha256=" + "g" * 64]
)
def test_an_address_without_a_digest_is_refused_with_what_to_add(fragment: str, torch_home: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        fetch_weights(f"https://me:secret@example.org/w.pth{fragment}")
    message = str(caught.value)
    assert message.startswith("https://example.org/w.pth needs #sha256= and 64 hexadecimal digits after it")
    assert "\n" not in message


def test_a_file_address_is_answered_with_its_path(torch_home: Path) -> None:
    with pytest.raises(WeightsError, match=r"give its path instead: /data/w\.pth$"):
        fetch_weights(f"file:///data/w.pth#sha256={'0' * 64}")


def test_weights_that_cannot_be_fetched_are_unavailable(published: tuple[str, str], torch_home: Path) -> None:
    url, digest = published
    with pytest.raises(WeightsUnavailableError, match=r"404 Not Found; or fetch it by hand and give its path$"):
        fetch_weights(f"{url}x#sha256={digest}")
    with pytest.raises(WeightsUnavailableError, match=r"expected 000000000000\.\.\.; nothing was kept"):
        fetch_weights(f"{url}#sha256={'0' * 64}")
    assert list(torch_home.iterdir()) == []


def test_a_download_that_was_changed_is_refused(published: tuple[str, str], torch_home: Path) -> None:
    url, digest = published
    fetch_weights(f"{url}#sha256={digest}")
    (torch_home / f"my_net-{digest[:8]}.pth").write_bytes(b"changed")
    with pytest.raises(WeightsError, match="remove it to download it again"):
        fetch_weights(f"{url}#sha256={digest}")


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "", "a%2f..%2f..%2fb", "..%5cb", "%00", "x" * 300 + ".pth", ".hidden"]
)
def test_no_address_leads_out_of_the_folder_of_downloads(name: str, torch_home: Path) -> None:
    from featcache.backbones.weights import name_download

    path = name_download(f"https://example.org/a/{name}", "0" * 64)
    assert path.parent == torch_home
    assert path.name.endswith("-00000000" + path.suffix)
    assert not path.name.startswith(".")
    assert len(path.name) < 140


def test_a_file_without_any_tensor_is_no_weights(tiny: type[TinyFamily], tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match=r"do not fit: tensor conv\.weight \(8, 3, 3, 3\) is missing"):
        load_backbone("tiny", weights=str(tmp_path / "empty.safetensors"))


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda one: one.to_sparse(), "sparse"), (lambda one: one.to(torch.complex64), "complex"),
     (lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "quantised")],
    ids=["sparse", "complex", "quantised"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers_are_refused(
    change: Callable[[Tensor], Tensor], kind: str, tiny: type[TinyFamily], tmp_path: Path
) -> None:
    state = TinyNetwork().state_dict()
    torch.save({**state, "conv.weight": change(state["conv.weight"])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=kind) as caught:
        load_backbone("tiny", weights=str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
