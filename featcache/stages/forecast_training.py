"""How long a fine-tuning would take: measured on a few of its own steps. Writes nothing, keeps nothing."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import torch

from featcache.backbones import Backbone
from featcache.config import FinetuneConfig
from featcache.dataset import Listing, Split
from featcache.files import find_free_memory
from featcache.images import ImageMemory
from featcache.processes import ALONE
from featcache.progress import SILENT, Progress
from featcache.runtime import has_bfloat16, select_device, training_settings
from featcache.stages.finetune import WRITING_SECONDS, provide_backbone
from featcache.stages.prepare_training import (
    UNKNOWN_MEMORY,
    Samples,
    TrainingBatches,
    WatchedBatches,
    make_recipe,
    prepare_network,
)
from featcache.training import Trainer

STEPS = 8
MOST_SECONDS = 10.0
FEWEST_IMAGES = 16
EVALUATED = 16
DECODING_SECONDS = 0.006  # per image, of looking at all of them before the first step


def forecast_training(listing: Listing, config: FinetuneConfig, progress: Progress = SILENT) -> float:
    """About how many seconds `finetune` would take.

    Parameters
    ----------
    listing
        The data set.
    config
        What is to be trained.
    progress
        Told nothing of the steps.

    Raises
    ------
    FeatcacheError
        If the network, the device or the images that are tried cannot be had.
    """
    started = time.perf_counter()
    device = select_device(config.device)
    backbone = provide_backbone(config, None, ALONE, progress)
    loaded = time.perf_counter() - started
    config = config.settle(
        has_test="test" in listing.splits,
        clips=backbone.preprocessing.frames > 0,
        device=device.type,
        bfloat16=has_bfloat16(device),
    )
    n_train, n_watched = len(listing.splits["train"]), len(listing.splits["val"])
    if config.select_on == "holdout":
        n_watched = round(config.holdout_fraction * n_train)
        n_train -= n_watched
    epochs = {"full": 0 if config.mode == "head" else config.epochs}
    epochs["head"] = config.epochs if config.mode == "head" else config.all_epochs - config.epochs
    n_reported = len(listing) - len(listing.splits["train"])
    total = loaded + WRITING_SECONDS + DECODING_SECONDS * len(listing)
    with training_settings(device, deterministic=config.deterministic):
        for stage, n_epochs in epochs.items():
            if n_epochs:
                mode = "head" if stage == "head" else "full"
                image_seconds, evaluation_seconds = time_steps(listing, replace_mode(config, mode), backbone, device)
                total += n_epochs * (n_train * image_seconds + n_watched * evaluation_seconds)
    return total + n_reported * evaluation_seconds


def replace_mode(config: FinetuneConfig, mode: str) -> FinetuneConfig:
    """The settings for a few steps of a stage alone."""
    return replace(
        config,
        mode=mode,
        epochs=1,
        head_epochs=FinetuneConfig.head_epochs,
        lr_backbone=None if mode == "head" else config.lr_backbone,
        layer_decay=1.0,
        patience=None,
        warmup=None,
        compile=False,
    )


def time_steps(
    listing: Listing, config: FinetuneConfig, backbone: Backbone, device: torch.device
) -> tuple[float, float]:
    """Seconds per training image and per image that is evaluated, over a few steps."""
    n = max(STEPS * config.batch_size, FEWEST_IMAGES)
    memory = (find_free_memory() or 4 * UNKNOWN_MEMORY) // 8 if config.cache_images else 0
    samples = Samples(
        listing=listing,
        bad=(),
        train=take_some(listing.splits["train"], n),
        watched=take_some(listing.splits["val"], EVALUATED),
        memory=ImageMemory(0 if backbone.preprocessing.frames else memory),
    )
    trainee = prepare_network(samples, copy.deepcopy(backbone), config, device)
    started, ticks = time.perf_counter(), []

    def is_over(trainer: Trainer) -> bool:
        ticks.append((time.perf_counter(), trainer.progress.images))
        return time.perf_counter() - started > MOST_SECONDS

    trainer = Trainer(
        trainee.network,
        TrainingBatches(trainee),
        WatchedBatches(trainee, samples.watched),
        make_recipe(trainee),
        is_over=is_over,
    )
    trainer.run()
    (began, before), (ended, after) = ticks[0], ticks[-1]
    if after == before:  # a single step: with all that only the first one takes
        began, before = started, 0
    return (ended - began) / (after - before), trainer.progress.evaluation_seconds / max(len(samples.watched), 1)


def take_some(split: Split, n: int) -> Split:
    """At most n images, from all over."""
    chosen = np.zeros(len(split), bool)
    chosen[np.linspace(0, len(split) - 1, min(n, len(split))).astype(int)] = True
    return split.take(chosen)
