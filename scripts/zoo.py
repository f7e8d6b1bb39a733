"""Every backbone of torchvision put to the proof: features, one step of fine-tuning, reloading, export.

    python scripts/zoo.py                    the twelve classic ones, the newer ones, trunks and video models
    python scripts/zoo.py resnet18 swin_t    only these
    python scripts/zoo.py --no-export        without ONNX

For each: random weights with disturbed BatchNorm statistics, saved as torch saves them and loaded by featcache. The
features of two pictures of noise are compared with what a hook on the original model sees going into its last layer (of
a trunk: with the pooled map that the model's own backbone gives). Then featcache fine-tunes one step on four generated
images, and the saved run's predictions are compared with those of the run loaded again. Then the features are exported
to ONNX and run through `onnx:FILE`. Last, each runtime's features of three such pictures are compared with those of the
eager one: the largest relative error of a row.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from featcache import InputFormat, finetune, load_backbone, load_classifier
from featcache.backbones import Backbone
from featcache.errors import DeviceError
from featcache.images import ImageRows, make_pixel_transform
from featcache.runtime import prepare_execution

# The last layer of each model, looked up by hand in torchvision's sources; featcache has no such table.
LAST = {
    "resnet18": "fc",
    "alexnet": "classifier.6",
    "vgg16": "classifier.6",
    "squeezenet1_0": "classifier.1",
    "densenet161": "classifier",
    "inception_v3": "fc",
    "googlenet": "fc",
    "shufflenet_v2_x1_0": "fc",
    "mobilenet_v2": "classifier.1",
    "resnext50_32x4d": "fc",
    "wide_resnet50_2": "fc",
    "mnasnet1_0": "classifier.1",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "convnext_tiny": "classifier.2",
    "regnet_y_400mf": "fc",
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "swin_v2_t": "head",
    "maxvit_t": "classifier.5",
    "mobilenet_v3_large": "classifier.3",
    "r3d_18": "fc",
    "s3d": "classifier.1",
    "mvit_v2_s": "head.1",
    "swin3d_t": "head",
}
# Which map of which part of a dense model.
TRUNKS = {
    "fcn_resnet50": ("backbone", "out"),
    "deeplabv3_mobilenet_v3_large": ("backbone", "out"),
    "lraspp_mobilenet_v3_large": ("backbone", "high"),
    "fasterrcnn_resnet50_fpn": ("backbone.body", "3"),
    "maskrcnn_resnet50_fpn": ("backbone.body", "3"),
    "keypointrcnn_resnet50_fpn": ("backbone.body", "3"),
    "retinanet_resnet50_fpn": ("backbone.body", "2"),
    "fcos_resnet50_fpn": ("backbone.body", "2"),
    "ssd300_vgg16": ("backbone", "1"),
    "ssdlite320_mobilenet_v3_large": ("backbone", "0"),
}
TOLERANCE = 1e-5
FEATURES = 1e-4  # between runtimes
RUNTIMES = ("fused", "onnx", "openvino")  # compile takes minutes for some
HEADER = ("backbone", "width", "input", "features", "fine-tune, reload", "onnx:FILE", *RUNTIMES, "seconds")


def main(arguments: list[str]) -> int:
    """Print the table; 1 if something is beyond the tolerance."""
    exporting = "--no-export" not in arguments
    names = [name for name in arguments if not name.startswith("--")] or [*LAST, *TRUNKS]
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    wrong = 0
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, quiet():
            cells, good = prove(name, Path(folder), exporting)
        wrong += not good
        print("| " + " | ".join([name, *cells, f"{time.perf_counter() - started:.1f}"]) + " |", flush=True)
    print(f"\n{len(names)} backbones, {wrong} wrong")
    return int(wrong > 0)


def prove(name: str, folder: Path, exporting: bool) -> tuple[list[str], bool]:
    """The cells of one row, and whether all is well."""
    original = make_original(name)
    torch.save(original.state_dict(), folder / "w.pth")
    backbone = load_backbone(name, weights=str(folder / "w.pth"))
    images = torch.randn(2, *backbone.preprocessing.input_shape, generator=torch.Generator().manual_seed(0))
    expected = see_features(name, original, images)
    del original
    with torch.inference_mode():
        features = backbone.network(images)
    difference = relative_difference(features, expected)
    cells = [str(backbone.width), "x".join(map(str, backbone.preprocessing.input_shape[1:])), f"{difference:.0e}"]
    good = difference <= TOLERANCE and features.shape == expected.shape
    reloaded = fine_tune_and_reload(name, folder) if name in LAST and not backbone.preprocessing.frames else None
    cells.append("-" if reloaded is None else f"{reloaded:.0e}")
    exported = export_and_run(backbone, images, features, folder) if exporting else "-"
    ran = run_everywhere(backbone)
    good &= (reloaded or 0) <= TOLERANCE and not any(cell.startswith("WRONG") for cell in (exported, *ran))
    return [*cells, exported, *ran], good


def make_original(name: str) -> nn.Module:
    """Torchvision's own model with random weights, its BatchNorm statistics as after some training."""
    torch.manual_seed(0)
    keywords = {"weights_backbone": None} if name in TRUNKS else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the initialisation of two models will change some day
        network: nn.Module = models.get_model(name, weights=None, **keywords)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def see_features(name: str, network: nn.Module, images: Tensor) -> Tensor:
    """What goes into the model's last layer, seen by a hook; of a trunk its map; pooled where it is a map."""
    with torch.inference_mode():
        if name in TRUNKS:
            part, key = TRUNKS[name]
            return network.get_submodule(part)(images)[key].mean((2, 3))
        seen: list[Tensor] = []
        network.get_submodule(LAST[name]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        network(images)
    return seen[0].flatten(2).mean(2) if seen[0].dim() > 2 else seen[0]


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def fine_tune_and_reload(name: str, folder: Path) -> float:
    """Largest difference between probabilities that a run of one step wrote and those of the run loaded again."""
    run = finetune(
        draw_images(folder / "images"), folder / "run", backbone=name, weights="none", epochs=1, batch_size=4, workers=0
    )
    written = np.loadtxt(run.folder / "predictions.csv", delimiter=",", skiprows=1, usecols=(-2, -1))
    paths = [str(path) for path in sorted((folder / "images/val").rglob("*.png"))]
    probabilities, bad = load_classifier(run.folder).predict_files(paths, device=torch.device("cpu"), workers=0)
    assert not bad
    return float(np.abs(written - probabilities).max())


def draw_images(root: Path) -> Path:
    """Two classes, 2 + 1 pictures of noise each."""
    random = np.random.default_rng(0)
    for split, n in (("train", 2), ("val", 1)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (256, 256, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def export_and_run(backbone: Backbone, images: Tensor, features: Tensor, folder: Path) -> str:
    """The difference of the features that ONNX Runtime gives, or why there are none."""
    if images.dim() == 5:
        return "clips"
    path = folder / "net.onnx"
    try:
        torch.onnx.export(backbone.network, (images,), str(path), dynamo=True, verbose=False)
    except Exception as error:  # noqa: BLE001 - whatever torch cannot export
        return f"no: {type(error).__name__}"
    look = backbone.preprocessing
    again = load_backbone(f"onnx:{path}", images=InputFormat(input_size=look.size, mean=look.mean, std=look.std))
    difference = relative_difference(again.network(images), features)
    return f"{'' if difference < 1e-4 else 'WRONG '}{difference:.0e}"


class Noise(ImageRows):
    """Pixels of noise, in place of images."""

    def __init__(self, backbone: Backbone, n: int = 3) -> None:
        super().__init__(Path(), ["noise"] * n, transform=make_pixel_transform(backbone.preprocessing))
        generator = torch.Generator().manual_seed(0)
        self._pixels = torch.randint(
            0, 256, (n, *backbone.preprocessing.input_shape), generator=generator, dtype=torch.uint8
        )

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        return row, self._pixels[row], -1


def run_everywhere(backbone: Backbone) -> list[str]:
    """The largest relative error of a row with each runtime, or why there is none."""
    rows, cells = Noise(backbone), []
    reference = forward(backbone, rows, "eager")
    for runtime in RUNTIMES:
        try:
            values = forward(backbone, rows, runtime)
        except DeviceError as error:
            reason = str(error).partition("this network: ")[2]
            cells.append(f"no: {reason.partition(';')[0][:60]}")
            continue
        error = (np.linalg.norm(values - reference, axis=1) / np.linalg.norm(reference, axis=1)).max()
        cells.append(f"{'' if error < FEATURES else 'WRONG '}{error:.0e}")
    return cells


def forward(backbone: Backbone, rows: ImageRows, runtime: str) -> NDArray[np.float32]:
    execution = prepare_execution(
        backbone.network, rows, device=torch.device("cpu"), runtime=runtime, batch_size=2, workers=1
    )
    return np.concatenate([output.values for output in execution.run()])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of torch's exporter."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
