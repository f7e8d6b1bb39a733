"""Backbones of ONNX files: the numbers of the framework they come from, what is read from them, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from featcache.backbones import Backbone, attach_classifier, load_backbone, remake_backbone  # noqa: E402
from featcache.backbones.catalogue import describe_layers  # noqa: E402
from featcache.backbones.onnx import list_external_files, read_format  # noqa: E402
from featcache.cache import hash_extractor, read_cache  # noqa: E402
from featcache.errors import BackboneError, FeatcacheError, MissingExtraError  # noqa: E402
from featcache.images import ImageRows, make_evaluation_transform  # noqa: E402
from featcache.preprocessing import InputFormat  # noqa: E402
from featcache.runtime import run_network  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., Outcome]
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"
PLAIN = InputFormat(mean=(0.0,), std=(1.0,))
PIXELS = InputFormat(mean=(0.0,), std=(1.0,), scale=255.0)
OPSET = 17


def make_torch_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(6, 4)).eval().requires_grad_(False)


def export_torch(path: Path, *, batch: int = 2, dynamic: bool = False) -> nn.Module:
    network = make_torch_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.randn(batch, 3, 16, 16),),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes={"input": {0: torch.export.Dim("n", min=1)}} if dynamic else None,
        )
    return network


def save_model(
    path: Path,
    nodes: Sequence[Any],
    shape: Sequence[int | str],
    tensors: dict[str, NDArray[Any]] | None = None,
    *,
    outputs: Sequence[str] = ("out",),
    dtype: int = onnx.TensorProto.FLOAT,
    inputs: Sequence[str] = ("images",),
    **external: Any,
) -> Path:
    """A model of a few nodes; its outputs' shapes are left to the runtime."""
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()]
    graph = onnx.helper.make_graph(
        list(nodes),
        "small",
        [onnx.helper.make_tensor_value_info(name, dtype, list(shape)) for name in inputs],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.save(model, path, **external)
    return path


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def make_kernel(channels: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, (5, channels, 3, 3)).astype(np.float32)


def save_nhwc(path: Path, *, side: int | str = 16, dtype: int = onnx.TensorProto.FLOAT) -> Path:
    """Transpose, convolve, rectify, average: (N, H, W, 3) -> (N, 5)."""
    nodes = [
        node("Cast", "images", "floats", to=onnx.TensorProto.FLOAT),
        node("Transpose", "floats", "first", perm=[0, 3, 1, 2]),
        node("Conv", "first kernel", "maps"),
        node("Relu", "maps", "relu:0"),
        node("ReduceMean", "relu:0", "out", axes=[2, 3], keepdims=0),
    ]
    return save_model(path, nodes, ["n", side, side, 3], {"kernel": make_kernel()}, dtype=dtype)


def run_nhwc(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """The same in torch, from (N, H, W, 3)."""
    maps = torch.nn.functional.conv2d(torch.from_numpy(pixels).float().permute(0, 3, 1, 2), torch.tensor(make_kernel()))
    return torch.relu(maps).mean((2, 3)).numpy()


def save_pictures(folder: Path, pictures: NDArray[np.uint8], classes: Sequence[str] = ("a", "b")) -> list[str]:
    """PNG files, by turns in train and val of each class; their paths in the order of the pictures."""
    files = []
    for i, picture in enumerate(pictures):
        path = folder / ("train", "val")[i // len(classes) % 2] / classes[i % len(classes)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        files.append(str(path))
    return files


def draw_pictures(n: int = 5, side: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def forward(backbone: Backbone, files: Sequence[str], runtime: str = "eager") -> NDArray[np.float32]:
    rows = ImageRows(Path(), list(files), transform=make_evaluation_transform(backbone.preprocessing))
    batches = run_network(backbone.network, rows, device=CPU, runtime=runtime, workers=0, batch_size=3)
    return np.concatenate([batch.values for batch in batches])


def load(path: Path, images: InputFormat = PLAIN, *layer: str, pool: str | None = None) -> Backbone:
    return load_backbone(f"onnx:{path}", images=images, layer=layer, pool=pool)


# --- networks that really come from another framework -----------------------------------------------------------------


@pytest.fixture(scope="module")
def keras() -> dict[str, Any]:
    with np.load(GOLDEN / "keras_cnn.npz") as file:
        return dict(file)


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_features_of_a_keras_network_are_those_of_keras(runtime: str, tmp_path: Path, keras: dict[str, Any]) -> None:
    files = save_pictures(tmp_path, keras["images"])
    backbone = load(GOLDEN / "keras_cnn.onnx", PIXELS)
    assert backbone.width == 10
    assert backbone.preprocessing.size == (32, 32)
    np.testing.assert_allclose(forward(backbone, files, runtime), keras["outputs"], rtol=1e-5, atol=1e-5)
    assert np.ptp(keras["outputs"], axis=0).min() > 0.02


def test_an_inner_layer_of_a_keras_network_is_that_of_keras(tmp_path: Path, keras: dict[str, Any]) -> None:
    files, name = save_pictures(tmp_path, keras["images"]), str(keras["inner_name"])
    assert name.endswith(":0")
    assert describe_layers_of(GOLDEN / "keras_cnn.onnx", tmp_path)[name] == (12, 16, 16)
    for pool, expected in {"avg": keras["inner"].mean((1, 2)), "max": keras["inner"].max((1, 2))}.items():
        backbone = load(GOLDEN / "keras_cnn.onnx", PIXELS, name, pool=pool)
        np.testing.assert_allclose(forward(backbone, files), expected, rtol=1e-5, atol=1e-5)
    both = load(GOLDEN / "keras_cnn.onnx", PIXELS, f"{name}:max", "Identity:0")
    expected = np.concatenate([keras["inner"].max((1, 2)), keras["outputs"]], axis=1)
    np.testing.assert_allclose(forward(both, files), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        remake_backbone(both.describe()).network(torch.ones(1, 3, 32, 32)), both.network(torch.ones(1, 3, 32, 32))
    )


def describe_layers_of(path: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """The layers of a file whose normalisation stands beside it."""
    here = folder / path.name
    here.write_bytes(path.read_bytes())
    here.with_suffix(".json").write_text('{"mean": 0, "std": 1}')
    return describe_layers(f"onnx:{here}")


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 15).astype(np.uint8)[:300], data.target[:300]


@pytest.mark.parametrize("kind", ["mlp", "pca"])
def test_features_of_a_scikit_learn_model_are_those_of_scikit_learn(
    kind: str, tmp_path: Path, digits: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline

    pictures, labels = digits
    rows = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    models = {
        "mlp": MLPClassifier((16,), max_iter=30, random_state=0, tol=1),
        "pca": make_pipeline(PCA(12, random_state=0), LogisticRegression(max_iter=500)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models[kind].fit(rows, labels)
        kinds = [("images", skl2onnx.common.data_types.FloatTensorType([None, 64]))]
        exported = skl2onnx.convert_sklearn(
            model, initial_types=kinds, options={id(model): {"zipmap": False}}, target_opset=OPSET
        )
    onnx.save(exported, tmp_path / "digits.onnx")
    (tmp_path / "digits.json").write_text('{"input_size": 8, "channels": "L", "mean": 0, "std": 1}')
    files = save_pictures(tmp_path / "pictures", pictures[:20])
    backbone = load_backbone(f"onnx:{tmp_path / 'digits.onnx'}", layer=["probabilities"])
    assert backbone.preprocessing.channels == "L"
    np.testing.assert_allclose(forward(backbone, files), model.predict_proba(rows[:20]), rtol=1e-4, atol=1e-5)
    if kind == "pca":
        inner = load_backbone(f"onnx:{tmp_path / 'digits.onnx'}", layer=["variable"])
        np.testing.assert_allclose(forward(inner, files), model[0].transform(rows[:20]), rtol=1e-4, atol=1e-5)


# --- layout, size, type, order ----------------------------------------------------------------------------------------


def test_a_network_of_torch_gives_the_same_numbers_whatever_its_batch(tmp_path: Path) -> None:
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, batch, dynamic in (("fixed", 2, False), ("one", 1, False), ("dynamic", 2, True)):
        network = export_torch(tmp_path / f"{name}.onnx", batch=batch, dynamic=dynamic)
        backbone = load(tmp_path / f"{name}.onnx")
        assert (backbone.width, backbone.preprocessing.size) == (4, (16, 16))
        torch.testing.assert_close(backbone.network(images), network(images), rtol=1e-5, atol=1e-6)


def test_channels_last_input_is_read_from_the_shape(tmp_path: Path) -> None:
    path, pictures = save_nhwc(tmp_path / "net.onnx"), draw_pictures()
    backbone = load(path)
    assert backbone.preprocessing.size == (16, 16)
    files = save_pictures(tmp_path / "p", pictures)
    np.testing.assert_allclose(forward(backbone, files), run_nhwc(pictures / 255), rtol=1e-4, atol=1e-5)


def test_a_network_that_takes_bytes_gets_the_very_pixels(tmp_path: Path) -> None:
    path, pictures = save_nhwc(tmp_path / "net.onnx", dtype=onnx.TensorProto.UINT8), draw_pictures()
    files = save_pictures(tmp_path / "p", pictures)
    np.testing.assert_allclose(forward(load(path, PIXELS), files), run_nhwc(pictures), rtol=1e-5)


def test_order_scale_mean_and_std_are_those_that_are_stated(tmp_path: Path) -> None:
    path, pictures = save_nhwc(tmp_path / "net.onnx"), draw_pictures()
    files = save_pictures(tmp_path / "p", pictures)
    images = InputFormat(channels="BGR", scale=255.0, mean=(103.94, 116.78, 123.68), std=(57.0, 58.0, 59.0))
    expected = run_nhwc((pictures[..., ::-1] - np.array(images.mean)) / np.array(images.std))
    np.testing.assert_allclose(forward(load(path, images), files), expected, rtol=1e-4, atol=1e-5)


def test_a_size_that_the_file_leaves_open_is_stated(tmp_path: Path) -> None:
    path, pictures = save_nhwc(tmp_path / "net.onnx", side="any"), draw_pictures(side=12)
    with pytest.raises(BackboneError, match="does not say what its images must look like: give --input-size"):
        load(path)
    files = save_pictures(tmp_path / "p", pictures)
    backbone = load(path, InputFormat(input_size=(12, 12), mean=(0.0,), std=(1.0,)))
    np.testing.assert_allclose(forward(backbone, files), run_nhwc(pictures / 255), rtol=1e-4, atol=1e-5)


def test_a_grey_network_gets_grey_pictures(tmp_path: Path) -> None:
    flat = node("Flatten", "images", "out", axis=1)
    backbone = load(save_model(tmp_path / "net.onnx", [flat], ["n", 1, 8, 8]))
    assert (backbone.preprocessing.channels, backbone.width) == ("L", 64)


def test_the_file_beside_says_the_rest_and_options_come_first(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx", side="any")
    beside = {"input_size": [8, 12], "mean": [1, 2, 3], "std": 4, "scale": 255, "channels": "BGR", "layout": "NHWC"}
    (tmp_path / "net.json").write_text(json.dumps(beside))
    preprocessing = load_backbone(f"onnx:{path}").preprocessing
    assert (preprocessing.size, preprocessing.channels) == ((8, 12), "BGR")
    np.testing.assert_allclose(preprocessing.mean, np.array([1, 2, 3]) / 255)
    np.testing.assert_allclose(preprocessing.std, np.array([4, 4, 4]) / 255)
    stated = load(path, InputFormat(input_size=(10, 10), channels="RGB")).preprocessing
    assert (stated.size, stated.channels, stated.mean) == ((10, 10), "RGB", preprocessing.mean)


def test_layout_can_be_stated_where_the_shape_does_not_tell(tmp_path: Path) -> None:
    path = save_model(tmp_path / "net.onnx", [node("Flatten", "images", "out", axis=1)], ["n", "a", "b", "c"])
    with pytest.raises(BackboneError, match=r"does not tell where the channels are.*--layout NCHW, NHWC or NF"):
        load(path)
    image = torch.arange(48.0).reshape(1, 3, 4, 4)
    for layout, expected in (("NCHW", image.flatten(1)), ("NHWC", image.permute(0, 2, 3, 1).flatten(1))):
        stated = InputFormat(input_size=(4, 4), mean=(0.0,), std=(1.0,), layout=layout)
        backbone = load(path, stated)
        assert torch.equal(backbone.network(image), expected)
        again = remake_backbone(json.loads(json.dumps(backbone.describe())))
        assert torch.equal(again.network(image), expected)


def test_a_layout_that_is_said_beside_the_file_belongs_to_the_key(tmp_path: Path) -> None:
    path = save_model(tmp_path / "net.onnx", [node("Flatten", "images", "out", axis=1)], ["n", "a", "b", "c"])
    described = {}
    for layout in ("NCHW", "NHWC"):
        beside = {"input_size": 4, "mean": 0, "std": 1, "layout": layout}
        path.with_suffix(".json").write_text(json.dumps(beside))
        described[layout] = load_backbone(f"onnx:{path}").describe()
    assert hash_extractor(described["NCHW"]) != hash_extractor(described["NHWC"])
    path.with_suffix(".json").unlink()
    image = torch.arange(48.0).reshape(1, 3, 4, 4)
    assert torch.equal(remake_backbone(described["NCHW"]).network(image), image.flatten(1))


# --- layers -----------------------------------------------------------------------------------------------------------


def test_inner_layers_are_listed_with_their_shapes_and_can_be_taken(tmp_path: Path) -> None:
    path, pictures = save_nhwc(tmp_path / "net.onnx"), draw_pictures()
    (tmp_path / "net.json").write_text('{"mean": 0, "std": 1}')
    layers = describe_layers(f"onnx:{path}")
    assert list(layers) == ["floats", "first", "maps", "relu:0", "out"]
    assert (layers["maps"], layers["out"]) == ((5, 14, 14), (5,))
    files = save_pictures(tmp_path / "p", pictures)
    taken = load(path, PLAIN, "relu:0:avg", "out")
    expected = run_nhwc(pictures / 255)
    np.testing.assert_allclose(forward(taken, files), np.concatenate([expected] * 2, axis=1), rtol=1e-4, atol=1e-5)


def test_of_several_outputs_one_has_to_be_named(tmp_path: Path) -> None:
    nodes = [node("Flatten", "images", "flat", axis=1), node("Relu", "flat", "other")]
    path = save_model(tmp_path / "net.onnx", nodes, ["n", 3, 4, 4], outputs=["flat", "other"])
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(load(path, PLAIN, "other").network(image), image.flatten(1).relu())
    assert torch.equal(load(path, PLAIN, "flat").network(image), image.flatten(1))


def test_an_unknown_layer_suggests_the_nearest(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    with pytest.raises(BackboneError, match=r"has no layer 'map': did you mean maps"):
        load(path, PLAIN, "map:avg")


# --- key --------------------------------------------------------------------------------------------------------------


def key_of(path: Path, images: InputFormat = PLAIN) -> str:
    return hash_extractor(load(path, images).describe())


def test_the_key_is_of_the_contents_and_the_input(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    key = key_of(path)
    assert key == key_of(path)
    assert key_of(path, PIXELS) != key
    kernel = make_kernel()
    kernel[0, 0, 0, 0] += 1e-3
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "kernel"))
    onnx.save(model, path)
    assert key_of(path) != key


def test_tensors_kept_in_another_file_belong_to_the_key(tmp_path: Path) -> None:
    nodes = [node("Conv", "images kernel", "maps"), node("ReduceMean", "maps", "out", axes=[2, 3], keepdims=0)]
    kernel = np.tile(make_kernel(), (20, 1, 1, 1))
    options = {"save_as_external_data": True, "location": "net.data", "size_threshold": 0}
    path = save_model(tmp_path / "net.onnx", nodes, ["n", 3, 8, 8], {"kernel": kernel}, **options)
    key, features = key_of(path), load(path).network(torch.ones(1, 3, 8, 8))
    data = np.fromfile(tmp_path / "net.data", np.float32)
    data[:27] += 1
    data.tofile(tmp_path / "net.data")
    assert key_of(path) != key
    assert not torch.equal(load(path).network(torch.ones(1, 3, 8, 8)), features)
    inner = load(path, PLAIN, "maps:avg").network(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(inner, load(path).network(torch.ones(1, 3, 8, 8)))
    (tmp_path / "net.data").unlink()
    with pytest.raises(BackboneError) as caught:
        load(path)
    assert "net.data" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_is_made_again_from_its_description(tmp_path: Path) -> None:
    backbone = load(save_nhwc(tmp_path / "net.onnx"), PIXELS, "relu:0", pool="max")
    again = remake_backbone(json.loads(json.dumps(backbone.describe())))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.network(images), backbone.network(images))
    assert again.describe() == backbone.describe()


def test_a_network_can_be_copied_and_sent_to_another_process(tmp_path: Path) -> None:
    network, images = load(save_nhwc(tmp_path / "net.onnx")).network, torch.randn(2, 3, 16, 16)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images), network(images))


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse(path: Path, images: InputFormat = PLAIN, *layer: str) -> str:
    with pytest.raises(FeatcacheError) as caught:
        load(path, images, *layer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pixels_are_never_guessed(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    message = refuse(path, InputFormat())
    assert "does not say what its images must look like: give --mean and --std" in message
    assert f"put them into {tmp_path / 'net.json'}" in message


def test_inputs_that_no_image_is_are_refused(tmp_path: Path) -> None:
    add = node("Add", "a b", "out")
    two = save_model(tmp_path / "two.onnx", [add], ["n", 3, 4, 4], inputs=["a", "b"])
    assert "has 2 inputs (a, b): expected one, for the images" in refuse(two)
    flat = node("Flatten", "images", "flat", axis=1), node("Cast", "flat", "out", to=1)
    whole = save_model(tmp_path / "int.onnx", flat, ["n", 3, 4, 4], dtype=onnx.TensorProto.INT64)
    assert "wants tensor(int64) in images: expected one of tensor(float)" in refuse(whole)
    rank = save_model(tmp_path / "rank.onnx", [node("Relu", "images", "out")], ["n", 3, 4])
    assert "which does not tell where the channels are" in refuse(rank)


def test_a_sequence_is_refused(tmp_path: Path) -> None:
    given = onnx.helper.make_tensor_sequence_value_info("images", onnx.TensorProto.FLOAT, None)
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node("ConcatFromSequence", "images", "out", axis=0)], "small", [given], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    assert "wants seq(tensor(float)) in images" in refuse(tmp_path / "net.onnx")


def test_the_wrong_size_layout_or_channels_are_refused(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    wrong = InputFormat(input_size=(20, 20), mean=(0.0,), std=(1.0,))
    assert "wants [16, 16, 3] numbers per image in images, these are [20, 20, 3]; say --input-size" in refuse(
        path, wrong
    )
    assert "these are [16, 16, 1]" in refuse(path, InputFormat(channels="L", mean=(0.0,), std=(1.0,)))
    assert "has an input images of 4 axes, which does not fit --layout NF" in refuse(
        path, InputFormat(layout="NF", mean=(0.0,), std=(1.0,))
    )


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    assert refuse(tmp_path / "nothing.onnx").startswith(f"no ONNX file at {tmp_path / 'nothing.onnx'}")
    (tmp_path / "text.onnx").write_text("text")
    refuse(tmp_path / "text.onnx")
    path = save_nhwc(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:200])
    refuse(path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"size": 3}',
        '{"layout": "CHWN"}',
        '{"mean": "grey"}',
        '{"mean": [0, "grey"]}',
        '{"mean": NaN}',
        '{"std": 0}',
        '{"std": [1, Infinity, 1]}',
        '{"scale": 0}',
        '{"scale": "large"}',
        '{"resize": "large"}',
        '{"input_size": -3}',
        '{"input_size": [3, 3.5]}',
        '{"input_size": [3, 3, 3]}',
        "\xff",
    ],
)
def test_a_file_beside_that_says_nothing_is_refused_and_named(text: str, tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    path.with_suffix(".json").write_bytes(text.encode("latin-1"))
    assert str(tmp_path / "net.json") in refuse(path)


def test_a_map_needs_a_pool(tmp_path: Path) -> None:
    path = save_model(tmp_path / "net.onnx", [node("Relu", "images", "out")], ["n", 3, 4, 4])
    assert "gives 3 x 4 x 4 numbers per image, not a vector; say how to pool them" in refuse(path)
    assert load(path, pool="max").width == 3


def test_onnx_cannot_be_fine_tuned_and_brings_its_own_weights(tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    with pytest.raises(BackboneError, match="cannot be fine-tuned: an ONNX network is run, not trained"):
        attach_classifier(load(path), 3)
    for weights in ("none", "other.pth"):
        with pytest.raises(BackboneError):
            load_backbone(f"onnx:{path}", weights=weights, images=PLAIN)


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[onnx\]'"):
        load(path, PLAIN, "maps:avg")


# --- the command line -------------------------------------------------------------------------------------------------


def test_an_onnx_backbone_goes_all_the_way(cli: Cli, photos: Path, tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    options = ("--backbone", f"onnx:{path}", "--mean", "127", "--std", "60", "--scale", "255", "--decoder", "pillow")
    extract = cli("extract", photos, *options, "--json")
    assert (extract.code, extract.json["dim"], extract.json["computed"]) == (0, 5, 18)
    assert cli("train-head", "features.h5").code == 0
    predict = cli("predict", "runs/head", photos / "val", "--json")
    assert (predict.code, len(predict.json)) == (0, 6)
    assert cli("extract", photos, *options, "--json").json["computed"] == 0
    finetune = cli("finetune", photos, "--backbone", f"onnx:{path}")
    assert (finetune.code, finetune.out) == (1, "")
    assert finetune.err.strip().splitlines()[-1].startswith("Error: ")
    rows = read_cache("features.h5").splits["val"]
    rows_again = forward(load_like(path), [str(photos / name) for name in rows.listing.paths])
    np.testing.assert_allclose(rows.features, rows_again, rtol=1e-5, atol=1e-6)


def load_like(path: Path) -> Backbone:
    return load(path, InputFormat(mean=(127.0,), std=(60.0,), scale=255.0))


def test_the_layers_of_a_file_are_listed_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    path = save_nhwc(tmp_path / "net.onnx")
    listed = cli("backbones", f"onnx:{path}")
    assert listed.code == 0, listed.err
    assert "maps" in listed.out
    assert "5 x 14 x 14" in listed.out


def test_images_go_through_the_network_as_tensors_of_torch(tmp_path: Path) -> None:
    network: Callable[[Tensor], Tensor] = load(save_nhwc(tmp_path / "net.onnx")).network
    features = network(torch.zeros(3, 3, 16, 16))
    assert (features.shape, features.dtype) == ((3, 5), torch.float32)


def test_tensors_outside_of_the_file_are_found_wherever_the_network_has_them(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "k")
    onnx.external_data_helper.set_external_data(tensor, "inner.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    function = onnx.helper.make_function("mine", "F", [], ["c"], [constant], [onnx.helper.make_opsetid("", 17)])
    graph = onnx.helper.make_graph([onnx.helper.make_node("F", [], ["y"], domain="mine")], "g", [], [])
    model = onnx.helper.make_model(graph, functions=[function])
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert list_external_files(tmp_path / "net.onnx") == ["inner.bin"]


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"mean": NaN, "std": 1}', '{"mean": true}', '{"input_size": 1000000000}', '{"std": 0}'],
    ids=["nested", "nan", "true", "huge", "zero"],
)
def test_a_hostile_file_beside_the_network_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(BackboneError, match=r"net\.json, beside the network, does not say what its images") as caught:
        read_format(tmp_path / "net.json")
    assert "\n" not in str(caught.value)
