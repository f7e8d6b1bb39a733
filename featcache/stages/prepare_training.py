"""What fine-tuning needs before its first step: sound images, a network with a new last layer, batches, a recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from featcache.augmentation import TrainingOrder, TrainingRows, make_mix, make_training_transform
from featcache.backbones import Backbone, attach_classifier
from featcache.clips import check_video_support
from featcache.config import PRECISIONS, FinetuneConfig, HeadConfig
from featcache.dataset import Listing, Split, hold_out, list_dataset, summarise
from featcache.errors import BackboneError, BadImage, BadImagesError, DatasetError
from featcache.files import find_free_memory
from featcache.heads import LinearHead, fit_head
from featcache.images import (
    Batch,
    ClipTransform,
    ImageMemory,
    ImageRows,
    check_images,
    choose_workers,
    decode_nothing,
    make_loader,
    make_pixel_transform,
)
from featcache.metering import Meter, Spent
from featcache.processes import ALONE, Processes, count_neighbours
from featcache.progress import SILENT, Bars, Progress
from featcache.runtime import keep_freed_memory
from featcache.stages.extract import extract_features
from featcache.training import (
    Position,
    Recipe,
    Stage,
    group_parameters,
    make_scheduler,
    set_mode_all,
    set_mode_fixed_batch_norm,
    set_mode_frozen,
    weigh_classes,
)

T = TypeVar("T")
MODES = {"train": set_mode_all, "fixed": set_mode_fixed_batch_norm}
KEEPS = {"holdout": "best, then least loss", "val": "best", "none": "last"}
MEMORY_SHARE = 4  # decoded images may take one part in so many of the memory that is free
GPU_BATCH = 64  # images that are evaluated at a time there, at least
UNKNOWN_MEMORY = 1 << 30  # bytes that they may take where nobody says what is free


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The images of a run.

    Attributes
    ----------
    listing
        All of them that can be used.
    bad
        Those that cannot.
    train, watched
        What is trained on, and what is evaluated after each epoch.
    memory
        Decoded images, or some of them.
    """

    listing: Listing
    bad: tuple[BadImage, ...]
    train: Split
    watched: Split
    memory: ImageMemory


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The linear head that lp-ft begins with.

    Attributes
    ----------
    head
        On raw features.
    words
        How it came about.
    extraction
        What the features cost, whenever they were extracted.
    fitting
        What the head cost.
    waited
        What both took now.
    """

    head: LinearHead
    words: str
    extraction: Spent
    fitting: Spent
    waited: Spent


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A network made ready to be trained.

    Attributes
    ----------
    network
        (B, 3, H, W) -> logits (B, C).
    head
        Dotted name of its last layer.
    backbone
        What it was made from.
    samples
        The images.
    device
        Where it trains.
    config
        How; every setting decided.
    processes
        Those that train it together.
    """

    network: nn.Module
    head: str
    backbone: Backbone
    samples: Samples
    device: torch.device
    config: FinetuneConfig
    processes: Processes = ALONE

    @property
    def batch_norm(self) -> tuple[str, str]:
        """What BatchNorm does, "train" or "fixed", and why."""
        if self.config.mode == "head":
            return "fixed", "the frozen network stays in evaluation mode, BatchNorm and all"
        if self.config.batch_norm != "auto":
            return self.config.batch_norm, f"BatchNorm statistics: {self.config.batch_norm}, as asked for"
        if self.config.mode == "lp-ft" and self.backbone.batch_norm[0] == "train":
            return "fixed", "BatchNorm keeps its statistics: the head was fitted to features that were made with them"
        return self.backbone.batch_norm

    def choose_workers(self, n_images: int) -> int:
        """Processes that decode for this one."""
        if self.config.workers is not None:
            return self.config.workers
        return choose_workers(n_images, self.device, processes=count_neighbours())

    @property
    def title(self) -> str:
        """A few words for tables and figures."""
        name, epochs, first = self.backbone.name, self.config.epochs, ""
        if self.config.mode == "staged":
            first = f"{self.config.head_epochs} + "
        how = {
            "full": f"fine-tuned {name}",
            "head": f"last layer through the frozen {name}",
            "staged": f"{name}, last layer first, then fine-tuned",
            "lp-ft": f"{name} fine-tuned from its linear probe",
        }
        return f"{how[self.config.mode]}, {first}{epochs} epoch{'' if epochs == 1 and not first else 's'}"


def list_samples(data: Path | str, backbone: Backbone, config: FinetuneConfig, progress: Progress) -> Listing:
    """The images, or the clips, that the backbone takes."""
    clips = backbone.preprocessing.frames > 0
    listing = list_dataset(
        data, val_fraction=config.val_fraction, seed=config.data_seed, progress=progress, clips=clips
    )
    for line in summarise(listing):
        progress.say(line)
    if clips:
        check_video_support(str(listing.root / path) for path in listing.paths())
    if len(listing.classes) < 2:
        raise DatasetError(f"a classifier needs at least 2 classes; {listing.root} has {len(listing.classes)}")
    return listing


def gather_samples(
    listing: Listing, backbone: Backbone, config: FinetuneConfig, processes: Processes, progress: Progress
) -> Samples:
    """Decode every image once, so that a bad one is known now and not in the middle of an epoch; hold some out.

    Of several processes each decodes its share.

    Raises
    ------
    BadImagesError
        If there are bad ones and `skip_bad` is not set.
    DatasetError
        If no training image can be held out.
    """
    frames = backbone.preprocessing.frames
    free = find_free_memory() or MEMORY_SHARE * UNKNOWN_MEMORY
    memory = ImageMemory(free // MEMORY_SHARE // count_neighbours() if config.cache_images and not frames else 0)
    found = []
    for name, split in listing.splits.items():
        own = slice(processes.rank, None, processes.size)
        rows = ImageRows(
            listing.root,
            split.paths[own],
            transform=ClipTransform(frames, decode_nothing) if frames else decode_nothing,
            digests=split.digests[own],
            memory=memory if name == "train" else None,
        )
        checked = check_images(rows, threads=config.workers or None)
        for batch in progress.track(checked, total=len(rows), what=f"checking {name} images"):
            found += batch.bad
    bad = (*listing.bad, *sorted(one for part in processes.collect(found) for one in part))
    if bad and not config.skip_bad:
        raise BadImagesError(bad)
    listing = listing.without(bad)
    train, watched = listing.splits["train"], listing.splits["val"]
    if config.select_on == "holdout":
        train, watched = hold_out(train, listing.classes, config.holdout_fraction, config.seed)
    return Samples(listing=listing, bad=bad, train=train, watched=watched, memory=memory)


def prepare_network(
    samples: Samples,
    backbone: Backbone,
    config: FinetuneConfig,
    device: torch.device,
    processes: Processes = ALONE,
    probe: Probe | None = None,
) -> Trainee:
    """Seed torch, and put a fresh last layer on the backbone, or the one that was fitted to its features.

    Raises
    ------
    BackboneError
        If the fitted head does not fit.
    """
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    network, head = attach_classifier(backbone, len(samples.listing.classes))
    if probe is not None:
        put_in_head(network.get_submodule(head), probe.head)
    network.requires_grad_(True)
    network = network.to(device)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if processes.several:  # dropout is drawn from the stream, by each process for its own images
        torch.manual_seed(config.seed + 1_000_003 * (1 + processes.rank))
    return Trainee(
        network=network,
        head=head,
        backbone=backbone,
        samples=samples,
        device=device,
        config=config,
        processes=processes,
    )


def fit_probe(
    data: Path | str,
    samples: Samples,
    backbone: Backbone,
    config: FinetuneConfig,
    device: torch.device,
    progress: Progress,
) -> Probe:
    """The linear head that fits the cached features of the training images, its penalty chosen among them.

    Raises
    ------
    FeatcacheError
        Whatever `extract_features` raises.
    """
    check_linear(backbone)
    given: dict[str, Any] = {"backbone": config.backbone, "weights": config.weights}
    if backbone.weights["requested"] == "given":  # in Python, and has no name to be made from
        given = {"backbone": copy.deepcopy(backbone)}
    meter, images = Meter(), {name: getattr(config, name) for name in FinetuneConfig.IMAGES}
    extraction = extract_features(
        data,
        config.features,
        progress=Bars(progress),
        **given,
        val_fraction=config.val_fraction,
        seed=config.data_seed,
        device=str(device),
        skip_bad=config.skip_bad,
        **{name: value for name, value in images.items() if value is not None},
    )
    cached = extraction.cache.splits["train"]
    extracted, row_of = meter.read(), {path: row for row, path in enumerate(cached.listing.paths)}
    rows = np.array([row_of[path] for path in samples.train.paths])
    head_config = HeadConfig(solver="lbfgs", class_weight=config.class_weight, seed=config.seed, device="cpu")
    fitted = fit_head(
        np.asarray(cached.features[rows], np.float32),
        samples.train.labels,
        len(samples.listing.classes),
        head_config,
        progress,
    )
    assert isinstance(fitted.head, LinearHead)
    waited = meter.read()
    return Probe(
        head=fitted.head,
        words=f"begins with the linear head of C = {fitted.selection.choice['C']:g} on {config.features}",
        extraction=Spent.from_json(extraction.cache.provenance),
        fitting=waited - extracted,
        waited=waited,
    )


def check_linear(backbone: Backbone) -> None:
    """Raise a BackboneError if no linear head fits into the last layer."""
    layer = backbone.make_classifier(2)
    if not isinstance(layer, nn.Linear) or layer.in_features != backbone.width or layer.bias is None:
        raise BackboneError(
            f"the last layer of {backbone.name} is no linear layer on its features ({type(layer).__name__}): no linear "
            f"head fits into it; use --mode staged"
        )


def put_in_head(layer: nn.Module, head: LinearHead) -> None:
    """Give a last layer, a linear one, the weights of a head on its inputs."""
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))


def make_recipe(trainee: Trainee) -> Recipe:
    """The recipe that the settings stand for."""
    config, classes = trainee.config, trainee.samples.listing.classes
    balanced = config.class_weight == "balanced"
    head = make_stage(trainee, "head", config.epochs if config.mode == "head" else config.head_epochs)
    full = make_stage(trainee, "full", config.epochs)
    return Recipe(
        stages={"head": (head,), "staged": (head, full)}.get(config.mode, (full,)),
        label_smoothing=config.label_smoothing,
        class_weights=weigh_classes(trainee.samples.train.labels, len(classes)) if balanced else None,
        mix=make_mix(config.mixup, config.cutmix, len(classes)),
        ema=config.ema,
        keep=KEEPS[config.select_on or "val"],
        patience=config.patience,
        start_counts=config.mode == "lp-ft",
        compute=PRECISIONS[config.precision or "fp32"],
        compiled=config.compile,
    )


def make_stage(trainee: Trainee, name: str, epochs: int) -> Stage:
    """Some epochs of the head alone, through the frozen network, or of everything."""
    config, head = trainee.config, trainee.head
    assert config.lr is not None
    assert config.weight_decay is not None
    rates = {"lr": config.lr, "lr_backbone": config.lr_backbone or config.lr}
    decays = {"layer_decay": config.layer_decay, "weight_decay": config.weight_decay}

    def choose_parameters(network: nn.Module) -> None:
        network.requires_grad_(name == "full")
        network.get_submodule(head).requires_grad_(True)

    def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
        groups = group_parameters(network, head, **rates, **decays)
        fused = True if trainee.device.type == "cuda" else None
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=rates["lr"], fused=fused)
        return torch.optim.SGD(groups, lr=rates["lr"], momentum=config.momentum, fused=fused)

    return Stage(
        name=name,
        epochs=epochs,
        choose_parameters=choose_parameters,
        set_training_mode=set_mode_frozen if name == "head" else MODES[trainee.batch_norm[0]],
        make_optimizer=make_optimizer,
        make_scheduler=lambda optimizer, epoch_steps: make_scheduler(
            config.schedule,
            optimizer,
            epochs=epochs,
            epoch_steps=epoch_steps,
            step_size=config.step_size,
            gamma=config.gamma,
            warmup=config.warmup,
        ),
    )


class TrainingBatches:
    """The training images as (images, labels) on the device, in a new order and augmented anew in every epoch.

    Parameters
    ----------
    trainee
        Says which images, how they are treated, and where the network is.
    progress
        Shown a bar of the epoch that is running.
    """

    def __init__(self, trainee: Trainee, progress: Progress = SILENT) -> None:
        config, samples = trainee.config, trainee.samples
        self.trainee, self.progress = trainee, progress
        rows = TrainingRows(
            samples.listing.root,
            samples.train.paths,
            transform=make_training_transform(trainee.backbone.preprocessing, config.augment),
            labels=samples.train.labels.tolist(),
            memory=samples.memory,
        )
        self._order = TrainingOrder(
            len(rows),
            config.batch_size,
            seed=config.seed,
            one_stream=config.one_stream and not trainee.processes.several,
            rank=trainee.processes.rank,
            size=trainee.processes.size,
        )
        self._loader = make_loader(
            rows,
            batches=self._order,
            workers=trainee.choose_workers(len(rows)),
            pin=trainee.device.type == "cuda",
            generator=None if self._order.one_stream else torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def order(self) -> Tensor:
        """(N,) int64, the rows in the order of the epoch that is running."""
        return self._order.order

    def begin(self, epoch: int, position: Position | None = None) -> None:
        """Let the next iteration be of this epoch, from a place on where it was left before."""
        if position is None:
            self._order.begin(epoch)
        else:
            self._order.begin(epoch, position.batches, position.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = self._order.first * self.trainee.config.batch_size
        batches = iter(
            self._loader
        )  # NOTE: here the loader draws from the stream; the caller puts states back after it
        what = f"epoch {self._order.epoch}/{self.trainee.config.all_epochs} train"
        n, size = self._order.n, self.trainee.processes.size
        tracked = self.progress.track(batches, total=n // size, what=what, done=done // size)
        return (self._to_device(batch) for batch in tracked)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.bad:  # it was sound when the run began
            raise BadImagesError(batch.bad)
        device = self.trainee.device
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if self.trainee.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels


class WatchedBatches:
    """Images to be evaluated as (images, labels) on the device, this process's share of them, each once.

    They are the same every time; where they fit into memory their pixels are kept there.

    Parameters
    ----------
    trainee
        Says how they are treated, and where the network is.
    split
        Which.
    progress
        Shown a bar.
    what
        For its left end.
    """

    def __init__(self, trainee: Trainee, split: Split, progress: Progress = SILENT, what: str = "evaluating") -> None:
        config, processes = trainee.config, trainee.processes
        self.trainee, self.progress, self.what = trainee, progress, what
        self.rows_of_all = np.arange(len(split))[processes.rank :: processes.size]
        rows = ImageRows(
            trainee.samples.listing.root,
            [split.paths[row] for row in self.rows_of_all],
            transform=make_pixel_transform(trainee.backbone.preprocessing),
            labels=split.labels[self.rows_of_all].tolist(),
        )
        self._one_stream = config.one_stream and not processes.several
        self._normalise = rows.make_normalisation().to(trainee.device)
        self._loader = make_loader(
            rows,
            batch_size=max(config.batch_size // processes.size, GPU_BATCH if trainee.device.type == "cuda" else 1),
            workers=trainee.choose_workers(len(rows)),
            pin=trainee.device.type == "cuda",
            generator=None if self._one_stream else torch.Generator(),
        )
        self._n, self._room = len(rows), trainee.samples.memory.limit - trainee.samples.memory.size
        self._kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, in order."""
        device = self.trainee.device
        for batch in self.progress.track(self._find_batches(), total=self._n, what=self.what):
            if batch.bad:  # it was sound when the run began
                raise BadImagesError(batch.bad)
            images = self._normalise(batch.images.to(device, non_blocking=True))
            wanted = torch.channels_last if self.trainee.config.channels_last else torch.contiguous_format
            if images.ndim == 4:
                images = images.contiguous(memory_format=wanted)
            yield images, batch.labels.to(device, non_blocking=True)

    def _find_batches(self) -> Iterator[Batch]:
        """From memory, if all of them are there, or decoded."""
        if len(self._kept) == len(self._loader):
            if self._one_stream:  # what a loader draws when it begins
                torch.empty((), dtype=torch.int64).random_()
            yield from self._kept
            return
        self._kept, left = [], self._room
        for batch in self._loader:
            left -= batch.images.nbytes
            if left >= 0:
                self._kept.append(replace(batch))
            yield batch
