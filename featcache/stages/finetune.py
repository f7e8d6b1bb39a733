"""The other way: the whole network trained on the images, end to end, by the classic recipe."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache import files
from featcache.backbones import Backbone, attach_classifier, check_trainable, load_backbone
from featcache.bundle import save_network
from featcache.clips import check_video_support
from featcache.config import RUNS_DIR, FinetuneConfig
from featcache.dataset import Listing, Split, check_root, describe_data, list_dataset, summarise
from featcache.errors import BadImage, BadImagesError, DatasetError
from featcache.images import (
    ImageRows,
    Transform,
    make_checking_loader,
    make_evaluation_transform,
    make_loader,
    make_training_transform,
)
from featcache.metrics import to_probabilities
from featcache.plots import draw_curves, save_figure
from featcache.preprocessing import InputFormat
from featcache.progress import SILENT, Progress
from featcache.runs import (
    PeakMemory,
    Predictions,
    RunRecord,
    decide_run,
    describe_environment,
    identify,
    read_record,
    write_history,
    write_record,
)
from featcache.runtime import keep_freed_memory, run_network, select_device
from featcache.stages.evaluate import Run, describe_accuracy, make_predictions, write_evaluation
from featcache.stages.plan import take_backbone
from featcache.training import (
    Epoch,
    Recipe,
    Training,
    set_mode_all,
    set_mode_fixed_batch_norm,
    set_mode_frozen,
    train,
)

MODES = {"train": set_mode_all, "fixed": set_mode_fixed_batch_norm}


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A network made ready to be trained on a listing.

    Attributes
    ----------
    network
        (B, 3, H, W) -> logits (B, C); the parameters that want a gradient are the trained ones.
    backbone
        What it was made from.
    listing
        The images.
    device
        Where it trains.
    config
        How.
    """

    network: nn.Module
    backbone: Backbone
    listing: Listing
    device: torch.device
    config: FinetuneConfig

    @property
    def batch_norm(self) -> tuple[str, str]:
        """What BatchNorm does, "train" or "fixed", and why."""
        if self.config.freeze:
            return "fixed", "the frozen network stays in evaluation mode, BatchNorm and all"
        if self.config.batch_norm == "auto":
            return self.backbone.batch_norm
        return self.config.batch_norm, f"BatchNorm statistics: {self.config.batch_norm}, as asked for"

    @property
    def title(self) -> str:
        """A few words for tables and figures."""
        how = "last layer through the frozen" if self.config.freeze else "fine-tuned"
        return f"{how} {self.backbone.name}, {self.config.epochs} epoch{'' if self.config.epochs == 1 else 's'}"


def finetune(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/finetune",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Run:
    """Train a network on the images of a folder, keep its best validation weights, and evaluate them.

    The very same run at the output already (settings, images and weights) is not trained again.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*.
    output
        The run folder.
    progress
        Told what is being done; one line an epoch.
    settings
        Fields of `featcache.config.FinetuneConfig`.

    Returns
    -------
    Run

    Raises
    ------
    DatasetError
        If the folder is not a usable data set.
    BadImagesError
        If files cannot be used as images and `skip_bad` is not set; found before the training begins.
    RunError, OutputError
        If something else lies at the output and `force` is not set, or it cannot be written.
    BackboneError, DeviceError, MissingExtraError
        If the network or the device cannot be had.

    Examples
    --------
    >>> finetune("photos", epochs=2).record.val_accuracy                   # doctest: +SKIP
    0.8823529411764706
    """
    started, memory = time.perf_counter(), PeakMemory()
    settings, given = take_backbone(settings)
    config, output = FinetuneConfig(**settings), Path(output)
    check_trainable(config.backbone)
    files.check_folder_writable(output.parent, output)
    check_root(Path(data))
    device = select_device(config.device)
    backbone = copy.deepcopy(given) or load_backbone(  # training must leave alone what was given
        config.backbone,
        weights=config.weights,
        seed=config.seed,
        images=InputFormat(**config.image_settings()),
        progress=progress,
    )
    listing = list_samples(data, backbone, config, progress)
    listing, bad = leave_out_bad(listing, backbone, config, progress)
    extractor = backbone.describe()
    identity = identify("finetune", config.result_settings(), describe_data(listing), extractor)
    if decide_run(output, identity, force=config.force) == "reuse":
        progress.say(f"{output} is this very run already; --force trains it again")
        return Run(folder=output, record=read_record(output), reused=True, left_out=tuple(bad))
    trainee = prepare_network(listing, backbone, config, device)
    progress.say(f"{trainee.title}; {trainee.batch_norm[1]}")
    prepared = time.perf_counter()
    training = train_network(trainee, progress)
    trained = time.perf_counter()
    predictions = {name: predict_split(trainee, split) for name, split in listing.splits.items() if name != "train"}
    seconds = {
        "preparation": prepared - started,
        "training": trained - prepared,
        "evaluation": time.perf_counter() - trained,
    }
    best = training.best
    record = RunRecord(
        kind="finetune",
        title=trainee.title,
        settings=config.result_settings(),
        data=describe_data(listing),
        extractor=extractor,
        seconds={**seconds, "total": sum(seconds.values()), "per_epoch": seconds["training"] / config.epochs},
        peak_memory_bytes=memory.read(),
        parameters=count_parameters(trainee.network),
        accuracy=describe_accuracy(predictions, best.train_accuracy),
        selection=f"weights of epoch {best.epoch} of {config.epochs}, the best on the validation split, whose accuracy "
        f"is therefore optimistic",
        device=str(device),
        environment=describe_environment(),
        notes=[trainee.batch_norm[1], *describe_left_out(bad)],
    )
    with files.fill_folder(output) as folder:
        write_finetune_run(folder, record, trainee, training, predictions)
    return Run(folder=output, record=record, left_out=tuple(bad))


def list_samples(data: Path | str, backbone: Backbone, config: FinetuneConfig, progress: Progress) -> Listing:
    """The images, or the clips, that the backbone takes."""
    clips = backbone.preprocessing.frames > 0
    listing = list_dataset(data, val_fraction=config.val_fraction, seed=config.seed, progress=progress, clips=clips)
    for line in summarise(listing):
        progress.say(line)
    if clips:
        check_video_support(str(listing.root / path) for path in listing.paths())
    return listing


def leave_out_bad(
    listing: Listing, backbone: Backbone, config: FinetuneConfig, progress: Progress
) -> tuple[Listing, list[BadImage]]:
    """Decode every image once, so that a bad one is known now and not in the middle of an epoch.

    Raises
    ------
    BadImagesError
        If there are bad ones and `skip_bad` is not set.
    """
    loader = make_checking_loader(
        listing.root, listing.paths(), workers=config.workers, frames=backbone.preprocessing.frames
    )
    bad = list(listing.bad)
    for batch in progress.track(loader, total=len(listing), what="checking images"):
        bad += batch.bad
    if bad and not config.skip_bad:
        raise BadImagesError(bad)
    return listing.without(bad), bad


def prepare_network(listing: Listing, backbone: Backbone, config: FinetuneConfig, device: torch.device) -> Trainee:
    """Seed torch, put a fresh last layer on the backbone, and decide which parameters are trained.

    Raises
    ------
    DatasetError
        If there is only one class.
    """
    if len(listing.classes) < 2:
        raise DatasetError(f"a classifier needs at least 2 classes; {listing.root} has {len(listing.classes)}")
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    network, classifier = attach_classifier(backbone, len(listing.classes))
    network.requires_grad_(not config.freeze)
    network.get_submodule(classifier).requires_grad_(True)
    return Trainee(network=network.to(device), backbone=backbone, listing=listing, device=device, config=config)


def train_network(trainee: Trainee, progress: Progress) -> Training:
    """Train by the recipe; the network has its best validation weights afterwards."""
    config, splits = trainee.config, trainee.listing.splits
    parameters = [p for p in trainee.network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)
    recipe = Recipe(
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, config.step_size, config.gamma),
        epochs=config.epochs,
        set_training_mode=set_mode_frozen if config.freeze else MODES[trainee.batch_norm[0]],
    )
    preprocessing = trainee.backbone.preprocessing
    epochs = EpochCounter(config.epochs, progress)
    return train(
        trainee.network,
        ImageBatches(trainee, splits["train"], make_training_transform(preprocessing), epochs, shuffle=True),
        ImageBatches(trainee, splits["val"], make_evaluation_transform(preprocessing), epochs),
        recipe,
        on_epoch=epochs.say,
    )


class EpochCounter:
    """Says one line an epoch, and labels the bars of the epoch that runs."""

    def __init__(self, n_epochs: int, progress: Progress) -> None:
        self.n_epochs, self.progress, self.running = n_epochs, progress, 1

    def say(self, epoch: Epoch, is_best: bool) -> None:
        """Receive a finished epoch."""
        self.progress.say(
            f"epoch {epoch.epoch:{len(str(self.n_epochs))}d}/{self.n_epochs}  "
            f"train loss {epoch.train_loss:.4f} acc {epoch.train_accuracy:.4f}  "
            f"val loss {epoch.val_loss:.4f} acc {epoch.val_accuracy:.4f}  lr {epoch.lr:g}  {epoch.seconds:.1f} s"
            f"{'  best' if is_best else ''}"
        )
        self.running = epoch.epoch + 1


class ImageBatches:
    """A split's images as (images, labels) on the device, decoded anew each time it is iterated.

    Parameters
    ----------
    trainee
        Says where the images are and where the network is.
    split
        Which images.
    transform
        What happens to each.
    epochs
        Labels the progress bar.
    shuffle
        A new order each time.
    """

    def __init__(
        self,
        trainee: Trainee,
        split: Split,
        transform: Transform,
        epochs: EpochCounter,
        *,
        shuffle: bool = False,
    ) -> None:
        rows = ImageRows(trainee.listing.root, split.paths, transform=transform, labels=split.labels.tolist())
        self.loader = make_loader(
            rows,
            batch_size=trainee.config.batch_size,
            workers=trainee.config.workers,
            shuffle=shuffle,
            pin=trainee.device.type == "cuda",
        )
        self.n, self.device, self.epochs = len(split), trainee.device, epochs
        self.what = "train" if shuffle else "val"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        what = f"epoch {self.epochs.running}/{self.epochs.n_epochs} {self.what}"
        for batch in self.epochs.progress.track(self.loader, total=self.n, what=what):
            if batch.bad:  # it was sound when the run began
                raise BadImagesError(batch.bad)
            yield (
                batch.images.to(self.device, non_blocking=True),
                batch.labels.to(self.device, non_blocking=True),
            )


def predict_split(trainee: Trainee, split: Split) -> Predictions:
    """Predict a split's images with the trained network, as `featcache predict` would."""
    rows = ImageRows(
        trainee.listing.root, split.paths, transform=make_evaluation_transform(trainee.backbone.preprocessing)
    )
    logits = np.empty((len(split), len(trainee.listing.classes)), dtype=np.float32)
    for output in run_network(trainee.network, rows, device=trainee.device, workers=trainee.config.workers):
        if output.bad:
            raise BadImagesError(output.bad)
        logits[output.rows] = output.values
    return make_predictions(split, to_probabilities(logits))


def count_parameters(network: nn.Module) -> dict[str, int]:
    """How many numbers are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return {"trainable": sum(n for n, wanted in sizes if wanted), "total": sum(n for n, _ in sizes)}


def describe_left_out(bad: list[BadImage]) -> list[str]:
    """A remark about files that were left out, if there are any."""
    return [f"{len(bad)} files that cannot be used as images were left out"] if bad else []


def write_finetune_run(
    folder: Path,
    record: RunRecord,
    trainee: Trainee,
    training: Training,
    predictions: dict[str, Predictions],
) -> None:
    """Write everything of a fine-tuning run; the record last."""
    history = [asdict(epoch) for epoch in training.history]
    save_network(folder, trainee.network, record.classes, record.extractor)
    write_history(folder / "history.csv", history)
    save_figure(draw_curves(history, record.title), folder / "curves.png")
    write_evaluation(folder, predictions, record.classes, record.title)
    write_record(folder, record)
