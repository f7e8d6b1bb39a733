"""A fine-tuning in words and numbers: its epochs, its recipe, how it ended, what it cost, and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.bundle import measure_size, save_network
from featcache.config import FinetuneConfig
from featcache.dataset import describe_data
from featcache.errors import BadImage
from featcache.metering import Spent, count_flops, tabulate_costs
from featcache.plots import draw_curves, save_figure
from featcache.runs import (
    Predictions,
    RunRecord,
    write_history,
    write_record,
)
from featcache.stages.evaluate import describe_accuracy, write_evaluation
from featcache.stages.multiply_adds import find_multiply_adds
from featcache.stages.prepare_training import (
    Trainee,
)
from featcache.stages.training_job import HISTORY, Job, describe_machine
from featcache.training import Epoch, Training
from featcache.wording import format_seconds

AGAINST_OVERFITTING = ("augment", "mixup", "cutmix", "label_smoothing", "class_weight", "ema")


def describe_epoch(epoch: Epoch, n_epochs: int, is_best: bool, job: Job) -> str:
    """An epoch in a line."""
    config = job.config
    watched = "held out" if config.select_on == "holdout" else "val"
    words = [f"epoch {epoch.epoch:{len(str(n_epochs))}d}/{n_epochs}"]
    if epoch.train_loss is not None:
        words.append(f"train loss {epoch.train_loss:.4f} acc {epoch.train_accuracy:.4f}")
    words.append(f"{watched} loss {epoch.val_loss:.4f} acc {epoch.val_accuracy:.4f}")
    if epoch.images_per_second is not None:
        left = (n_epochs - epoch.epoch) * epoch.seconds
        if config.time_budget is not None:
            left = min(left, max(config.time_budget - job.count_budget(), 0.0))
        words += [f"lr {epoch.lr:.3g}", f"{epoch.seconds:.1f} s", f"{epoch.images_per_second:.1f} img/s"]
        words += [f"{format_seconds(left)} left"] if left else []
    else:
        words.append(f"{epoch.seconds:.1f} s")
    if config.mode == "staged":
        words.append(epoch.stage)
    return "  ".join(words + (["best"] if is_best and config.select_on != "none" else []))


def tabulate_history(history: Sequence[Epoch], config: FinetuneConfig) -> list[dict[str, Any]]:
    """The history as it is written: what was watched is called by its name."""
    watched = "holdout" if config.select_on == "holdout" else "val"
    return [
        {
            (name.replace("val_", f"{watched}_") if name.startswith("val_") else name): value
            for name, value in asdict(epoch).items()
        }
        for epoch in history
    ]


def describe_recipe(config: FinetuneConfig) -> str:
    """Who takes the steps, how large, and all that is not as usual, in a line."""
    backbone = f", {config.lr_backbone:g} of the backbone" if config.lr_backbone not in (None, config.lr) else ""
    words = [f"{config.optimizer}, learning rate {config.lr:g}{backbone}", f"{config.schedule} schedule"]
    words.append(f"batches of {config.batch_size}")
    settings = config.result_settings()
    names = ("warmup", "layer_decay", "weight_decay", *AGAINST_OVERFITTING)
    words += [f"{name.replace('_', ' ')} {settings[name]}" for name in names if settings.get(name)]
    return ", ".join(words + ([config.precision] if config.precision not in (None, "fp32") else []))


def describe_run(trainee: Trainee, job: Job, training: Training, predictions: Mapping[str, Predictions]) -> RunRecord:
    """The record, but for what it cost."""
    best, config = training.best, job.config
    trained = [p for p in trainee.network.parameters() if config.mode != "head" or p.requires_grad]
    total = sum(parameter.numel() for parameter in trainee.network.parameters())
    probe = job.before["probe"]
    return RunRecord(
        kind="finetune",
        title=trainee.title if not training.stopped else f"{trainee.title}, stopped in {training.history[-1].epoch}",
        settings=describe_settings(config, training),
        data=describe_data(job.samples.listing),
        extractor=job.backbone.describe(),
        seconds={},
        peak_memory_bytes=None,
        parameters={"trainable": sum(parameter.numel() for parameter in trained), "total": total},
        accuracy=describe_accuracy(predictions, best.train_accuracy),
        selection=describe_selection(trainee, training),
        device=str(job.device),
        environment={**describe_machine(), "processes": job.processes.size},
        notes=[
            describe_recipe(config),
            trainee.batch_norm[1],
            *([probe["words"]] if probe else []),
            *describe_end(training, len(trainee.samples.train), job),
            *describe_left_out(job.samples.bad),
            *job.before["notes"],
        ],
        details={
            "epoch": best.epoch,
            "epochs": training.history[-1].epoch,
            "held_out": len(job.samples.watched) if config.select_on == "holdout" else 0,
            "images_per_second": measure_rate(training),
            "batch_norm": trainee.batch_norm[0],
            **({"budget_of": job.budget_of} if job.budget_of and "budget" in training.stopped else {}),
        },
    )


def describe_settings(config: FinetuneConfig, training: Training) -> dict[str, Any]:
    """What decided the result; a time budget did if it was spent."""
    spent = {"time_budget": config.time_budget} if "budget" in training.stopped else {}
    return config.result_settings() | spent


def describe_end(training: Training, n_train: int, job: Job) -> list[str]:
    """Why it ended before all its epochs, if it did."""
    if not training.stopped:
        return []
    last, budget = training.history[-1], job.config.time_budget
    where = f"after epoch {last.epoch}"
    if last.images < n_train and last.epoch:
        where = f"in the middle of epoch {last.epoch}, after {last.images} of {n_train} images"
    late = budget is not None and "budget" in training.stopped and job.count_budget() > budget
    missed = f"; {budget:g} s were too few for that and the evaluation" if late else ""
    return [f"stopped {where}: {training.stopped}{missed}"]


def describe_selection(trainee: Trainee, training: Training) -> str:
    """Which weights were kept, why, and whether the accuracy that is reported suffers from it."""
    config, n, n_train = trainee.config, training.history[-1].epoch, len(trainee.samples.train)
    kept = f"weights of epoch {training.best.epoch} of {n}"
    if training.best.epoch == 0:
        kept = f"the weights it began with, before {n} epochs"
    if config.select_on == "holdout":
        n_held = len(trainee.samples.watched)
        return f"{kept}, the best on {n_held} training images held out (of {n_held + n_train})"
    if config.select_on == "none":
        return f"{kept}, the last"
    return f"{kept}, the best on the validation split, whose accuracy is therefore optimistic"


def measure_rate(training: Training) -> float | None:
    """Images per second of the training passes, the median of the epochs."""
    rates = [epoch.images_per_second for epoch in training.history if epoch.images_per_second is not None]
    return float(np.median(rates)) if rates else None


def describe_costs(job: Job, training: Training, trained: Spent, steps: Spent, evaluation: Spent) -> dict[str, Any]:
    """Costs by stage as the record holds them.

    Of lp-ft the cached features are counted with what they cost when they were extracted.

    Parameters
    ----------
    job, training
        What was done.
    trained, steps
        What all of it had cost when the training was over, and what the training alone.
    evaluation
        What came after it cost.
    """
    probe = job.before["probe"]
    steps = replace(steps, seconds=sum(epoch.seconds for epoch in training.history))
    once = {name: Spent.from_json(probe[name]) for name in ("extraction", "head", "waited")} if probe else {}
    preparation = trained - steps - once.pop("waited", Spent())
    preparation = replace(preparation, seconds=max(preparation.seconds, 0.0))
    stages = {**once, "preparation": preparation, "training": steps, "evaluation": evaluation}
    n_epochs = max(sum(1 for epoch in training.history if epoch.epoch > 0), 1)
    return tabulate_costs(stages, {"per_epoch": steps / n_epochs})


def count_operations(job: Job, training: Training) -> float | None:
    """Floating-point operations of the network, once more for the features of lp-ft; None where nobody knows.

    Stages of the last layer alone send images forward only: what goes back through that layer is nothing beside it.
    """
    history, listing = training.history, job.samples.listing
    forward = sum(epoch.images + len(job.samples.watched) for epoch in history)
    forward += len(listing) - len(listing.splits["train"])
    forward += len(listing) if job.before["probe"] else 0
    backward = sum(epoch.images for epoch in history if epoch.stage == "full")
    return count_flops(find_multiply_adds(job.backbone.describe()), forward=forward, backward=backward)


def describe_left_out(bad: Sequence[BadImage]) -> list[str]:
    """A remark about files that were left out, if there are any."""
    return [f"{len(bad)} files that cannot be used as images were left out"] if bad else []


def write_finetune_run(
    folder: Path,
    record: RunRecord,
    trainee: Trainee,
    training: Training,
    predictions: dict[str, Predictions],
) -> RunRecord:
    """Write everything of a fine-tuning run; the record last, with the size of the result."""
    history = tabulate_history(training.history, trainee.config)
    save_network(folder, trainee.network, record.classes, record.extractor)
    write_history(folder / HISTORY, history)
    save_figure(draw_curves(history, record.title), folder / "curves.png")
    write_evaluation(folder, predictions, record.classes, record.title)
    record = replace(record, result_bytes=measure_size(folder))
    write_record(folder, record)
    return record
