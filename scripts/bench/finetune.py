"""Fine-tuning against the loop that PyTorch's tutorial writes: images per second, in turns in one process.

    python scripts/bench/finetune.py DATA --backbone resnet18 --weights none
    python scripts/bench/finetune.py DATA --backbone efficientnet_lite0 --batch-size 32
    python scripts/bench/finetune.py DATA --device cuda --batch-size 64 --images 2000

Each turn trains a fresh network for one epoch on the same images and evaluates it on the validation images. The plain
loop is the tutorial's: ImageFolder, DataLoader with 4 workers, SGD, `.item()` at every step. featcache's turns are as
the command does them, with decoded images in memory; those are decoded once, when a run checks its images, and the time
of that is shown. Machines are noisy: the ratios within a round count, and their median is printed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from featcache.backbones import attach_classifier, load_backbone
from featcache.config import ExtractConfig, FinetuneConfig
from featcache.dataset import Listing, list_dataset
from featcache.processes import ALONE
from featcache.progress import SILENT
from featcache.runtime import has_bfloat16, select_device, training_settings
from featcache.stages.prepare_training import (
    Trainee,
    TrainingBatches,
    WatchedBatches,
    gather_samples,
    make_recipe,
    prepare_network,
)
from featcache.training import Trainer

REST_SECONDS = 0.5  # between turns: threads of the last one still spin
Turn = Callable[[], tuple[float, float]]


def take(listing: Listing, n: int) -> Listing:
    """The first n images of each split, spread over the classes."""
    splits = {}
    for name, split in listing.splits.items():
        keep = np.zeros(len(split), dtype=bool)
        keep[np.linspace(0, len(split) - 1, min(n, len(split)), dtype=int)] = True
        splits[name] = split.take(keep)
    return replace(listing, splits=splits)


def make_plain(listing: Listing, config: FinetuneConfig, device: torch.device) -> Turn:
    """The tutorial's loop, written out."""
    backbone = load_backbone(config.backbone, weights=config.weights)
    spec = backbone.preprocessing
    normalise = [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    pipelines = {
        "train": [transforms.RandomResizedCrop(spec.crop), transforms.RandomHorizontalFlip(), *normalise],
        "val": [transforms.Resize(spec.resize), transforms.CenterCrop(spec.crop), *normalise],
    }
    loaders = {}
    for name, steps in pipelines.items():
        folder = datasets.ImageFolder(str(listing.root / name), transforms.Compose(steps))
        wanted = set(listing.splits[name].paths)
        rows = [i for i, (path, _) in enumerate(folder.samples) if str(Path(path).relative_to(listing.root)) in wanted]
        loaders[name] = DataLoader(Subset(folder, rows), batch_size=config.batch_size, shuffle=True, num_workers=4)

    def turn() -> tuple[float, float]:
        network, _ = attach_classifier(load_backbone(config.backbone, weights=config.weights), len(listing.classes))
        network = network.requires_grad_(True).to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
        started, trained = time.perf_counter(), 0.0
        for name, loader in loaders.items():
            network.train(name == "train")
            loss_sum, right = 0.0, torch.zeros((), dtype=torch.int64, device=device)
            for images, classes in loader:
                inputs, labels = images.to(device), classes.to(device)
                optimizer.zero_grad()
                with torch.set_grad_enabled(name == "train"):
                    outputs = network(inputs)
                    loss = nn.functional.cross_entropy(outputs, labels)
                    if name == "train":
                        loss.backward()
                        optimizer.step()
                loss_sum += loss.item() * len(inputs)
                right += (outputs.argmax(1) == labels).sum()
            trained = trained or time.perf_counter() - started
        return len(listing.splits["train"]) / trained, time.perf_counter() - started

    return turn


def make_ours(listing: Listing, config: FinetuneConfig, device: torch.device, **settings: Any) -> tuple[Turn, float]:
    """A run's training as the command does it, and the seconds in which its images were checked."""
    backbone = load_backbone(config.backbone, weights=config.weights)
    config = replace(config, select_on="val", **settings).settle(
        has_test=False, clips=False, device=device.type, bfloat16=has_bfloat16(device)
    )
    started = time.perf_counter()
    samples = gather_samples(listing, backbone, config, ALONE, SILENT)
    checked = time.perf_counter() - started

    def prepare() -> Trainee:
        backbone = load_backbone(config.backbone, weights=config.weights)
        return prepare_network(samples, backbone, config, device)

    def turn() -> tuple[float, float]:
        trainee = prepare()
        batches, watched = TrainingBatches(trainee), WatchedBatches(trainee, samples.watched)
        trainer = Trainer(trainee.network, batches, watched, make_recipe(trainee))
        started = time.perf_counter()
        (epoch,) = trainer.run().history
        assert epoch.images_per_second is not None
        return epoch.images_per_second, time.perf_counter() - started

    return turn, checked


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--backbone", default=ExtractConfig.backbone, show_default=True)
@click.option("--weights", default=ExtractConfig.weights, show_default=True)
@click.option("--batch-size", default=FinetuneConfig.batch_size, show_default=True)
@click.option("--images", default=96, show_default=True, help="Of each split.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(data: Path, backbone: str, weights: str, batch_size: int, images: int, rounds: int, device: str) -> None:
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the tutorial's 4 workers, cores or not
    where = select_device(device)
    listing = take(list_dataset(data), images)
    config = FinetuneConfig(backbone=backbone, weights=weights, batch_size=batch_size, epochs=1)
    ways: dict[str, dict[str, Any]] = {
        "featcache": {},
        "featcache, images decoded each time": {"cache_images": False},
        "featcache --workers 0 (bit for bit)": {"workers": 0},
    }
    if where.type == "cuda":
        ways["featcache --precision fp32"] = {"precision": "fp32"}
        ways["featcache --compile"] = {"compile": True}
    turns: dict[str, Turn] = {"the tutorial's loop": make_plain(listing, config, where)}
    checks = {}
    for name, settings in ways.items():
        turns[name], checks[name] = make_ours(listing, config, where, **settings)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    with training_settings(where, deterministic=False):
        for turn in turns.values():  # once for nothing: caches, kernels
            turn()
        for _ in range(rounds):
            for name, turn in turns.items():
                time.sleep(REST_SECONDS)
                found[name].append(turn())
    plain = found["the tutorial's loop"]
    n = ", ".join(f"{len(split)} {name}" for name, split in listing.splits.items())
    print(
        f"{backbone}, weights {weights}, batches of {batch_size}, {n} images, {where}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"images decoded once, when a run checks them: {checks['featcache']:.2f} s")
    print(f"{'median of ' + str(rounds):40s} {'training':>14s} {'ratio':>7s} {'epoch with val':>15s} {'ratio':>7s}")
    for name, rounds_of_it in found.items():
        rates, epochs = (statistics.median(column) for column in zip(*rounds_of_it, strict=True))
        faster = statistics.median(mine[0] / other[0] for mine, other in zip(rounds_of_it, plain, strict=True))
        shorter = statistics.median(other[1] / mine[1] for mine, other in zip(rounds_of_it, plain, strict=True))
        print(f"{name:40s} {rates:8.1f} img/s {faster:7.2f} {epochs:13.2f} s {shorter:7.2f}")


if __name__ == "__main__":
    main()
