"""What caching is worth, measured in one process on a folder of images.

    python scripts/bench/headline.py DATA --backbone efficientnet_lite0 --whole-job

One epoch of fine-tuning, one of the last layer through the frozen network without a cache, one of the same head on
cached features, a whole stage 2, and with --whole-job the 25-epoch head job, run for real. An epoch is training and
validation by the classic recipe (SGD, batches of 4). "Without a cache" is shown twice: as featcache itself trains a
frozen network, and as PyTorch's tutorial writes that loop. Seconds depend on the machine; the ratios count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import featcache
from featcache.backbones import attach_classifier, load_backbone
from featcache.config import ExtractConfig, FinetuneConfig, HeadConfig
from featcache.dataset import Listing, list_dataset
from featcache.heads import fit_head
from featcache.processes import ALONE
from featcache.progress import SILENT
from featcache.stages.prepare_training import (
    TrainingBatches,
    WatchedBatches,
    gather_samples,
    make_recipe,
    prepare_network,
)
from featcache.training import Recipe, Stage, TensorBatches, Trainer, set_mode_frozen, train

CPU = torch.device("cpu")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def train_on_images(listing: Listing, config: FinetuneConfig) -> Callable[[], object]:
    """A job that trains for the config's epochs, its network made ready beforehand."""
    backbone = load_backbone(config.backbone, weights=config.weights)
    config = replace(config, select_on="val").settle(has_test=False, clips=False, device="cpu", bfloat16=False)
    samples = gather_samples(listing, backbone, config, ALONE, SILENT)
    trainee = prepare_network(samples, backbone, config, CPU)
    batches, watched = TrainingBatches(trainee), WatchedBatches(trainee, samples.watched)
    return lambda: Trainer(trainee.network, batches, watched, make_recipe(trainee)).run()


def train_on_features(cache: featcache.FeatureCache, config: FinetuneConfig) -> Callable[[], object]:
    """The same steps on cached features: same loss, optimiser, schedule and batch size."""
    batches = {
        name: TensorBatches(
            torch.from_numpy(split.features),
            torch.from_numpy(split.listing.labels),
            config.batch_size,
            shuffle=name == "train",
        )
        for name, split in cache.splits.items()
    }
    head = nn.Linear(cache.dim, len(cache.classes))
    stage = Stage(
        name="head",
        epochs=config.epochs,
        choose_parameters=lambda _: None,
        set_training_mode=set_mode_frozen,
        make_optimizer=lambda network: torch.optim.SGD(network.parameters(), lr=0.001, momentum=config.momentum),
        make_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(
            optimizer, config.step_size * steps, config.gamma
        ),
    )
    return lambda: train(head, batches["train"], batches["val"], Recipe(stages=(stage,)))


def train_usual_loop(listing: Listing, backbone_name: str, weights: str, epochs: int) -> Callable[[], object]:
    """The frozen network's loop as PyTorch's tutorial writes it: ImageFolder, 4 workers, train() mode and all."""
    backbone = load_backbone(backbone_name, weights=weights)
    network, layer = attach_classifier(backbone, len(listing.classes))
    head = network.get_submodule(layer)
    spec = backbone.preprocessing
    normalise = [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    pipelines = {
        "train": [transforms.RandomResizedCrop(spec.crop), transforms.RandomHorizontalFlip(), *normalise],
        "val": [transforms.Resize(spec.resize), transforms.CenterCrop(spec.crop), *normalise],
    }
    loaders = {
        name: DataLoader(
            datasets.ImageFolder(str(listing.root / name), transforms.Compose(steps)),
            batch_size=4,
            shuffle=True,
            num_workers=4,
        )
        for name, steps in pipelines.items()
    }
    optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)

    def run() -> None:
        for _ in range(epochs):
            for name, loader in loaders.items():
                network.train(name == "train")
                for inputs, labels in loader:
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(name == "train"):
                        loss = nn.functional.cross_entropy(network(inputs), labels)
                    if name == "train":
                        loss.backward()
                        optimizer.step()

    return run


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--backbone", default=ExtractConfig.backbone, show_default=True)
@click.option("--weights", default=ExtractConfig.weights, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Each figure is the median of so many.")
@click.option("--whole-job", is_flag=True, help="Also run the 25-epoch head job through the frozen network (minutes).")
def main(data: Path, backbone: str, weights: str, rounds: int, whole_job: bool) -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the tutorial's 4 workers, cores or not
    listing = list_dataset(data)
    one_epoch = FinetuneConfig(backbone=backbone, weights=weights, epochs=1)
    job = replace(one_epoch, epochs=25)
    frozen, frozen_job = (replace(config, mode="head") for config in (one_epoch, job))
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features.h5"

        def extract() -> None:
            featcache.extract_features(data, features, backbone=backbone, weights=weights, force=True)

        for _ in range(rounds):  # interleaved, so that a slow minute of the machine hits every figure alike
            features.unlink(missing_ok=True)
            figures.setdefault("extraction", []).append(timed(extract))
            cache = featcache.read_cache(features)
            train_rows = cache.splits["train"]
            jobs = {
                "fine-tune epoch": train_on_images(listing, one_epoch),
                "frozen epoch, no cache": train_on_images(listing, frozen),
                "frozen epoch, the tutorial's loop": train_usual_loop(listing, backbone, weights, 1),
                "head epoch on cached features": train_on_features(cache, one_epoch),
                "25 head epochs on cached features": train_on_features(cache, job),
                "whole stage 2, C chosen": lambda rows=train_rows: fit_head(
                    rows.features, rows.listing.labels, len(listing.classes), HeadConfig()
                ),
            }
            for name, work in jobs.items():
                figures.setdefault(name, []).append(timed(work))
        median = {name: statistics.median(values) for name, values in figures.items()}
        whole_jobs = {
            "featcache finetune --mode head": (
                25 * median["frozen epoch, no cache"],
                train_on_images(listing, frozen_job),
            ),
            "the tutorial's loop": (
                25 * median["frozen epoch, the tutorial's loop"],
                train_usual_loop(listing, backbone, weights, 25),
            ),
        }
        without_cache = {name: timed(work) if whole_job else estimate for name, (estimate, work) in whole_jobs.items()}

    cached_seconds = median["extraction"] + median["25 head epochs on cached features"]
    counts = ", ".join(f"{len(split)} {name}" for name, split in listing.splits.items())
    print(f"{backbone}, weights {weights}, {counts} images, {torch.get_num_threads()} threads, median of {rounds}")
    for name, values in figures.items():
        print(f"  {name:36s} {median[name]:10.4f} s   ({min(values):.4f} to {max(values):.4f})")
    epoch = median["head epoch on cached features"]
    print(f"one cached head epoch against one fine-tune epoch        x {median['fine-tune epoch'] / epoch:8.0f}")
    print(f"one cached head epoch against one frozen epoch           x {median['frozen epoch, no cache'] / epoch:8.0f}")
    how = "run for real" if whole_job else "25 times one epoch"
    print(f"25-epoch head job, extraction included                     {cached_seconds:8.2f} s")
    for name, seconds in without_cache.items():
        ratio = seconds / cached_seconds
        print(f"the same without a cache, {name:27s}      {seconds:8.2f} s  x {ratio:.1f}  ({how})")


if __name__ == "__main__":
    main()
