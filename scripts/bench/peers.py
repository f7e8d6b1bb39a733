"""The same images through others' code, with the same weights, in turns with featcache and the usual loop.

    pip install img2vec-pytorch timm
    pip install --no-deps thingsvision
    python scripts/bench/peers.py DATA

ResNet18 with the random weights that featcache makes from seed 0. thingsvision 2.7.3 cannot be installed as it declares
itself (numpy below 2, tensorflow below 2.16), so it is taken without what it needs, and modules that are missing are
replaced by empty ones: what runs is its own extraction. img2vec-pytorch squashes images to 224 x 224, so its features
are others. What is not installed is left out and said. Each has a fresh process every time; imports and the making of
the network are not counted.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import click
import numpy as np
import torch
from extraction import USUAL, Task, copy_images, list_jpegs, measure, read_peak, work
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, models

from featcache.backbones import Backbone, load_backbone
from featcache.images import count_cores

Job = Callable[[Path], object]  # given the folder of images


def make_resnet18(**_: object) -> torch.nn.Module:
    """The network whose last layer featcache removes, as it makes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.resnet18(weights=None)


def make_img2vec(backbone: Backbone) -> Job:
    """img2vec-pytorch on lists of 32 images."""
    del backbone
    import img2vec_pytorch.img_to_vec as package

    with patch.object(package, "resnet18", make_resnet18):
        extractor = package.Img2Vec(model="resnet18")

    def run(images: Path) -> None:
        paths = sorted(images.rglob("*.jpg"))
        for start in range(0, len(paths), 32):
            extractor.get_vec([Image.open(path).convert("RGB") for path in paths[start : start + 32]])

    return run


def make_timm_loop(backbone: Backbone) -> Job:
    """Timm's own model and transform in a DataLoader, batches of 32, 2 workers."""
    import timm

    network = timm.create_model("resnet18", pretrained=False, num_classes=0).eval()
    network.load_state_dict(backbone.network.state_dict(), strict=False)
    config = {**timm.data.resolve_model_data_config(network), "crop_pct": 224 / 256, "interpolation": "bilinear"}
    transform = timm.data.create_transform(**config, is_training=False)

    def run(images: Path) -> None:
        with torch.no_grad():
            for inputs, _ in DataLoader(datasets.ImageFolder(str(images), transform), batch_size=32, num_workers=2):
                network(inputs)

    return run


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes empty modules of those that are not installed."""

    NAMES = ("tensorflow", "torchtyping", "numba", "open_clip", "skimage", "ftfy", "regex", "pkg_resources", "gdown")

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        del path, target
        if name.split(".", maxsplit=1)[0] in (*self.NAMES, "keras", "dreamsim", "harmonization", "cornet"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        del module


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def make_thingsvision(backbone: Backbone) -> Job:
    """Thingsvision's extractor of torchvision models, batches of 32."""
    del backbone
    finder = _Missing()
    sys.meta_path.append(finder)
    vars(np)["AxisError"] = np.exceptions.AxisError  # it was there before numpy 2
    try:
        with silence():
            from thingsvision import get_extractor
            from thingsvision.utils.data import DataLoader as Batches
            from thingsvision.utils.data import ImageDataset

            extractor = get_extractor("resnet18", source="torchvision", device="cpu", pretrained=False)
    finally:
        sys.meta_path.remove(finder)
    extractor.model.load_state_dict(make_resnet18().state_dict())

    def run(images: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, silence():
            dataset = ImageDataset(
                root=str(images), out_path=folder, backend="pt", transforms=extractor.get_transformations()
            )
            batches = Batches(dataset=dataset, batch_size=32, backend="pt")
            extractor.extract_features(batches=batches, module_name="avgpool", flatten_acts=True)

    return run


PEERS = {
    "img2vec-pytorch": make_img2vec,
    "timm's loop": make_timm_loop,
    "thingsvision": make_thingsvision,
}


def work_peer(task: Task) -> None:
    """Do one task and print its seconds and its peak memory."""
    job = PEERS[task.what](load_backbone(task.backbone, weights=task.weights))
    started = time.perf_counter()
    job(Path(task.images))
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": read_peak()}))


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--images", "n", default=800, show_default=True, help="The data's JPEGs are repeated to about so many.")
@click.option("--rounds", default=3, show_default=True, help="Each figure is the median of so many.")
@click.option("--task", hidden=True, default="")
def main(data: Path, n: int, rounds: int, task: str) -> None:
    """Measure others' extraction from DATA."""
    warnings.simplefilter("ignore")
    if task:
        given = Task(**json.loads(task))
        (work_peer if given.what in PEERS else work)(given)
        return
    figures: dict[str, list[dict[str, Any]]] = {}
    left_out = set()
    with tempfile.TemporaryDirectory() as folder:
        images = copy_images(data, Path(folder), n)
        n = len(list_jpegs(images))
        for _ in range(rounds):
            for what in (USUAL, *PEERS, "auto"):
                if what in left_out:
                    continue
                answer = measure(Task(what, str(images), "resnet18", "none", "fp32"), __file__)
                if isinstance(answer, dict):
                    figures.setdefault(what, []).append(answer)
                else:
                    print(f"left out: {what}: {answer}")
                    left_out.add(what)
    usual = statistics.median(figure["seconds"] for figure in figures[USUAL])
    print(f"resnet18, {n} images, {count_cores()} cores, median of {rounds}, torch {torch.__version__}")
    print(f"{'':16s} {'images/s':>9s} {'range':>15s} {'x usual':>8s} {'peak MB':>8s}")
    for what, all_of_it in figures.items():
        values = [figure["seconds"] for figure in all_of_it]
        spread, peak = f"{n / max(values):.1f}-{n / min(values):.1f}", max(figure["peak"] for figure in all_of_it)
        name, median = "featcache" if what == "auto" else what, statistics.median(values)
        print(f"{name:16s} {n / median:9.1f} {spread:>15s} {usual / median:8.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()
