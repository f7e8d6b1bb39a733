"""featcache.bundle: what is saved loads again and predicts the same; what was damaged or changed is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, TinyFamily, TinyNetwork, draw_photo
from numpy.typing import NDArray
from torch import nn

import featcache.backbones
from featcache.backbones import Backbone, attach_classifier, load_backbone
from featcache.bundle import Classifier, load_classifier, save_head, save_network
from featcache.errors import BadImage, RunError, WeightsError
from featcache.files import hash_bytes
from featcache.heads import LinearHead
from featcache.images import ImageRows, make_evaluation_transform
from featcache.metrics import to_probabilities
from featcache.preprocessing import Preprocessing
from featcache.runtime import run_network

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cicada")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Five photographs with their folder in front."""
    (tmp_path / "new").mkdir()
    colours = list(COLOURS.values())
    for i in range(5):
        draw_photo(colours[i % 3], seed=i).save(tmp_path / f"new/{i}.png")
    return [str(tmp_path / f"new/{i}.png") for i in range(5)]


def write_weights(path: Path, seed: int) -> Path:
    """A tiny network's state dict, its BatchNorm as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TinyNetwork()
        network.norm.running_mean.normal_(0, 0.2)
        network.norm.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), path)
    return path


def make_head(seed: int = 0, n_classes: int = 3) -> LinearHead:
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(0, 3, (n_classes, 8)), rng.normal(size=n_classes)
    return LinearHead(weight=weight.astype(np.float32), bias=bias.astype(np.float32))


def save_tiny_head(folder: Path, backbone: Backbone, head: LinearHead | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_head(folder, head or make_head(), CLASSES, backbone.describe())
    return folder


@pytest.fixture
def head_folder(tmp_path: Path, tiny: type[TinyFamily]) -> Path:
    """A head on the tiny network with random weights of seed 3."""
    return save_tiny_head(tmp_path / "head", load_backbone("tiny", weights="none", seed=3))


@pytest.fixture
def network_folder(tmp_path: Path, tiny: type[TinyFamily]) -> Path:
    """A whole tiny network, with weights that are those of no seed."""
    backbone = load_backbone("tiny", weights=str(write_weights(tmp_path / "w.pth", seed=4)))
    (tmp_path / "network").mkdir()
    extractor = backbone.describe()
    save_network(tmp_path / "network", attach_classifier(backbone, 3)[0], CLASSES, extractor)
    return tmp_path / "network"


def forward(network: nn.Module, preprocessing: Preprocessing, files: list[str]) -> NDArray[np.float32]:
    rows = ImageRows(Path(), files, transform=make_evaluation_transform(preprocessing))
    return np.concatenate([one.values for one in run_network(network, rows, device=CPU, runtime="eager")])


def predict(folder: Path, files: list[str]) -> NDArray[np.float64]:
    probabilities, bad = load_classifier(folder).predict_files(files, device=CPU)
    assert bad == []
    return probabilities


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_head_loads_again_with_the_same_predictions(tmp_path: Path, files: list[str], tiny: type[TinyFamily]) -> None:
    backbone, head = load_backbone("tiny", weights="none", seed=3), make_head()
    folder = save_tiny_head(tmp_path / "head", backbone, head)
    expected = to_probabilities(head.logits(forward(backbone.network, backbone.preprocessing, files)))
    probabilities = predict(folder, files)
    assert (probabilities.shape, probabilities.dtype) == ((5, 3), np.float64)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.05


def test_a_network_loads_again_with_the_same_predictions(
    tmp_path: Path, files: list[str], tiny: type[TinyFamily]
) -> None:
    backbone = load_backbone("tiny", weights=str(write_weights(tmp_path / "w.pth", seed=4)))
    extractor = backbone.describe()
    network, name = attach_classifier(backbone, 3)
    network.get_submodule(name).weight.data *= 20
    network.train()
    network(torch.randn(4, 3, 16, 16))  # BatchNorm follows, as in a fine-tuning
    save_network(tmp_path, network, CLASSES, extractor)
    expected = to_probabilities(forward(network.eval(), backbone.preprocessing, files))
    (tmp_path / "w.pth").unlink()  # a whole network needs no other file
    np.testing.assert_allclose(predict(tmp_path, files), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["head_folder", "network_folder"])
def test_a_loaded_classifier_is_frozen_and_knows_its_classes(kind: str, request: pytest.FixtureRequest) -> None:
    classifier = load_classifier(request.getfixturevalue(kind))
    assert classifier.classes == CLASSES
    assert classifier.preprocessing == Preprocessing(resize=20, crop=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert not any(module.training for module in classifier.network.modules())
    assert not any(parameter.requires_grad for parameter in classifier.network.parameters())


def test_the_tensors_come_back_bit_for_bit(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    head = make_head(7)
    folder = save_tiny_head(tmp_path / "head", load_backbone("tiny", weights="none"), head)
    loaded = load_classifier(folder).head
    assert loaded.weight.tobytes() == head.weight.tobytes()
    assert loaded.bias.tobytes() == head.bias.tobytes()


def test_a_folder_may_be_moved_and_named_as_text(head_folder: Path, files: list[str]) -> None:
    before = predict(head_folder, files)
    moved = head_folder.rename(head_folder.with_name("elsewhere"))
    after, _ = load_classifier(str(moved)).predict_files(files, device=CPU)
    assert np.array_equal(before, after)


def test_names_of_classes_in_any_script_come_back(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    classes = ("蚂蚁", 'a "bee"', "é/\n")
    save_head(tmp_path, make_head(), classes, load_backbone("tiny", weights="none").describe())
    assert load_classifier(tmp_path).classes == classes


def test_two_classes_are_saved_as_two(tmp_path: Path, files: list[str], tiny: type[TinyFamily]) -> None:
    save_head(tmp_path, make_head(1, 2), ("no", "yes"), load_backbone("tiny", weights="none").describe())
    np.testing.assert_allclose(predict(tmp_path, files).sum(axis=1), 1)


# --- what is in the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head_folder", "network_folder"])
def test_the_files_are_json_and_safetensors_and_no_pickle_is_read(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors"}
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(entry["dtype"] in ("F32", "I64") for name, entry in header.items() if name != "__metadata__")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, None)
    load_classifier(folder)


def test_the_description_says_what_it_holds(head_folder: Path, network_folder: Path) -> None:
    for folder, holds in ((head_folder, "head"), (network_folder, "network")):
        description = json.loads((folder / "model.json").read_text())
        assert description["holds"] == holds
        assert description["classes"] == list(CLASSES)
        assert description["extractor"]["backbone"] == "tiny"
        assert description["tensors_file_sha256"] == hash_bytes((folder / "model.safetensors").read_bytes())


# --- damage -----------------------------------------------------------------------------------------------------------


def refuse(folder: Path, error: type[Exception] = RunError) -> str:
    """Loading is refused in one line, which names the folder."""
    with pytest.raises(error) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["head_folder", "network_folder"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_a_flipped_bit_in_the_tensors_is_noticed(kind: str, share: float, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    assert "model.safetensors is damaged: its SHA-256 is not the one in model.json" in refuse(path.parent)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_cut_tensors_are_noticed(length: int, head_folder: Path) -> None:
    path = head_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "is damaged" in refuse(head_folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(name: str, head_folder: Path) -> None:
    (head_folder / name).unlink()
    message = refuse(head_folder)
    assert f"holds no classifier: expected {head_folder / name}" in message
    assert "`featcache train-head`" in message


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    assert "holds no classifier" in refuse(tmp_path / "nothing")
    (tmp_path / "file").write_text("text")
    refuse(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"model"', "{}", '{"schema": 1}', "\x00\xff"])
def test_a_description_that_is_none_is_refused(text: str, head_folder: Path) -> None:
    (head_folder / "model.json").write_bytes(text.encode("latin-1"))
    refuse(head_folder)


Edit = Callable[[dict[str, Any]], object]


def edit_json(folder: Path, edit: Edit) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    edit(description)
    path.write_text(json.dumps(description))


EDITS: dict[str, Edit] = {
    "schema": lambda model: model.update(schema=99),
    "no schema": lambda model: model.pop("schema"),
    "holds": lambda model: model.update(holds="soup"),
    "no holds": lambda model: model.pop("holds"),
    "no hash": lambda model: model.pop("tensors_file_sha256"),
    "other hash": lambda model: model.update(tensors_file_sha256="0" * 64),
    "hash of another type": lambda model: model.update(tensors_file_sha256=None),
    "other weights": lambda model: model["extractor"]["weights"].update(tensors_sha256="0" * 64),
    "other seed": lambda model: model["extractor"]["weights"].update(seed=4),
    "no classes": lambda model: model.pop("classes"),
    "classes null": lambda model: model.update(classes=None),
    "a class more": lambda model: model["classes"].append("dragonfly"),
    "no extractor": lambda model: model.pop("extractor"),
    "extractor null": lambda model: model.update(extractor=None),
    "no weights": lambda model: model["extractor"].pop("weights"),
    "no hash of weights": lambda model: model["extractor"]["weights"].pop("tensors_sha256"),
    "seed of another type": lambda model: model["extractor"]["weights"].update(seed="x"),
    "no backbone": lambda model: model["extractor"].pop("backbone"),
    "no preprocessing": lambda model: model["extractor"].pop("preprocessing"),
    "preprocessing without crop": lambda model: model["extractor"]["preprocessing"].pop("crop"),
    "preprocessing with more": lambda model: model["extractor"]["preprocessing"].update(gamma=2.2),
    "network as head": lambda model: model.update(holds="network"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_description_is_refused(edit: Edit, head_folder: Path) -> None:
    edit_json(head_folder, edit)
    refuse(head_folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model["classes"].reverse(),
        lambda model: model["extractor"]["preprocessing"].update(crop=8),
        lambda model: model["extractor"]["preprocessing"].update(mean=[0.0, 0.0, 0.0]),
    ],
    ids=["classes reversed", "crop", "mean"],
)
def test_an_edit_that_would_change_the_answers_is_noticed(edit: Edit, head_folder: Path) -> None:
    edit_json(head_folder, edit)
    refuse(head_folder)


def test_a_backbone_that_is_no_longer_made_the_same_is_refused(
    head_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights follow from the seed only as long as torch draws the same numbers."""
    draw = featcache.backbones._make_seeded
    monkeypatch.setattr(featcache.backbones, "_make_seeded", lambda make, seed: draw(make, seed + 1))
    assert "was trained on features of tiny with the weights random, seed 3" in refuse(head_folder)


# --- a head and its weights -------------------------------------------------------------------------------------------


def test_a_head_is_refused_when_its_weights_were_replaced(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    path = write_weights(tmp_path / "w.pth", seed=1)
    folder = save_tiny_head(tmp_path / "head", load_backbone("tiny", weights=str(path)))
    first = load_backbone("tiny", weights=str(path)).weights["tensors_sha256"][:8]
    load_classifier(folder)
    write_weights(path, seed=2)
    second = load_backbone("tiny", weights=str(path)).weights["tensors_sha256"][:8]
    message = refuse(folder)
    assert f"with the weights w.pth ({first}...), but {path} now gives {second}...; bring back the file" in message


def test_a_head_is_refused_when_its_weights_are_gone(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    path = write_weights(tmp_path / "w.pth", seed=1)
    folder = save_tiny_head(tmp_path / "head", load_backbone("tiny", weights=str(path)))
    path.unlink()
    with pytest.raises((RunError, WeightsError), match=f"no weights at {path}"):
        load_classifier(folder)


def test_a_head_accepts_the_same_weights_in_another_container(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    path = write_weights(tmp_path / "w.pth", seed=1)
    folder = save_tiny_head(tmp_path / "head", load_backbone("tiny", weights=str(path)))
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert load_classifier(folder).classes == CLASSES


def test_a_network_needs_no_weights_but_its_own(network_folder: Path, tmp_path: Path, files: list[str]) -> None:
    before = predict(network_folder, files)
    write_weights(tmp_path / "w.pth", seed=99)
    assert np.array_equal(predict(network_folder, files), before)


def test_tensors_that_do_not_fit_the_classes_are_refused(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    save_head(tmp_path, make_head(n_classes=2), CLASSES, load_backbone("tiny", weights="none").describe())
    with pytest.raises(RunError, match=r"model\.safetensors does not fit tiny"):
        load_classifier(tmp_path)


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(head_folder: Path) -> Classifier:
    return load_classifier(head_folder)


@pytest.mark.parametrize(("batch_size", "workers"), [(None, None), (1, 2), (3, 1), (100, 0)])
def test_predictions_keep_the_order_of_the_files(
    batch_size: int | None, workers: int | None, classifier: Classifier, files: list[str]
) -> None:
    alone = np.concatenate([classifier.predict_files([path], device=CPU)[0] for path in files])
    mixed = [3, 0, 4, 4, 1, 2]
    options = {"device": CPU, "batch_size": batch_size, "workers": workers}
    probabilities, bad = classifier.predict_files([files[i] for i in mixed], **options)
    np.testing.assert_allclose(probabilities, alone[mixed], rtol=0, atol=1e-6)
    assert bad == []
    assert len(np.unique(alone.round(5), axis=0)) == 5


def test_bad_files_are_reported_and_their_rows_are_nan(
    classifier: Classifier, files: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_text("text")
    whole = classifier.predict_files(files, device=CPU)[0]
    paths = [str(tmp_path / "bad.jpg"), files[0], files[1], str(tmp_path / "gone.jpg"), files[2]]
    probabilities, bad = classifier.predict_files(paths, device=CPU, batch_size=2)
    assert bad == [
        BadImage(paths[0], "not an image of a known format"),
        BadImage(paths[3], "cannot be read: No such file or directory"),
    ]
    assert np.isnan(probabilities).any(axis=1).tolist() == [True, False, False, True, False]
    np.testing.assert_allclose(probabilities[[1, 2, 4]], whole[:3], rtol=0, atol=1e-6)


def test_nothing_but_bad_files_gives_nothing_but_nan(classifier: Classifier, tmp_path: Path) -> None:
    probabilities, bad = classifier.predict_files([str(tmp_path / "a.jpg"), str(tmp_path)], device=CPU)
    assert probabilities.shape == (2, 3)
    assert np.isnan(probabilities).all()
    assert len(bad) == 2


def test_no_files_give_no_rows(classifier: Classifier) -> None:
    probabilities, bad = classifier.predict_files([], device=CPU)
    assert probabilities.shape == (0, 3)
    assert bad == []


def test_paths_are_relative_to_the_root(classifier: Classifier, files: list[str], tmp_path: Path) -> None:
    whole, _ = classifier.predict_files(files, device=CPU)
    short, bad = classifier.predict_files([f"{i}.png" for i in range(5)], root=tmp_path / "new", device=CPU)
    assert np.array_equal(whole, short)
    assert bad == []


def test_a_network_that_asks_for_the_version_of_its_tensors_loads_again(tmp_path: Path) -> None:
    backbone = load_backbone("mnasnet0_5", weights="none")
    extractor = backbone.describe()
    network, _ = attach_classifier(backbone, 3)
    save_network(tmp_path, network, CLASSES, extractor)
    again = load_classifier(tmp_path).network.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())
