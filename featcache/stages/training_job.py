"""A fine-tuning that is to be made, and what an interrupted one left of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featcache import files
from featcache.backbones import Backbone
from featcache.config import FinetuneConfig
from featcache.errors import OutputError, RunError
from featcache.metering import Meter, Spent, add_up
from featcache.processes import Processes, count_neighbours
from featcache.progress import Progress
from featcache.runs import (
    describe_environment,
    list_changes,
)
from featcache.stages.prepare_training import (
    Samples,
)
from featcache.training import CHECKPOINT, Checkpoints, State, Trainer, removing

HISTORY = "history.csv"


@dataclass(kw_only=True)
class Job:
    """A run that is to be made.

    Attributes
    ----------
    data, output
        From where, to where.
    samples, backbone, config, device, processes, progress
        As in `Trainee`.
    identity
        What makes it this run.
    checkpoints
        Where it is kept meanwhile.
    before
        What the sessions before this one left: what they cost, and the training alone; notes.
    meter
        Runs from the start of this session.
    training
        Runs from the start of its training; None before.
    age
        Seconds before that which count for the time budget.
    budget_of
        Who set that budget, if it is not the user's own.
    """

    data: Path | str
    output: Path
    samples: Samples
    backbone: Backbone
    config: FinetuneConfig
    device: torch.device
    processes: Processes
    progress: Progress
    identity: dict[str, Any]
    checkpoints: Checkpoints
    before: dict[str, Any] = field(
        default_factory=lambda: {**Spent().to_json(), "training": Spent().to_json(), "probe": None, "notes": []}
    )
    meter: Meter = field(default_factory=Meter)
    training: Meter | None = None
    age: float = 0.0
    budget_of: str = ""

    def count_seconds(self) -> float:
        """What all of it has taken up to now, with what was done before an interruption."""
        return self.meter.seconds + float(self.before["seconds"])

    def count_spent(self) -> Spent:
        """What all of it has cost up to now; of several processes each must ask, and all get the same."""
        return Spent.from_json(self.before) + self.collect(self.meter)

    def count_training(self) -> Spent:
        """The same of the training alone."""
        before = self.before.get("training", {"seconds": 0.0})  # older checkpoints do not know
        return Spent.from_json(before) + (self.collect(self.training) if self.training else Spent())

    def collect(self, meter: Meter) -> Spent:
        """Spent since a meter was made: the first one's time, all processes' CPU seconds, the machine's joules."""
        each = self.processes.collect(meter.read())
        several_machines = self.processes.size > count_neighbours()
        return replace(
            each[0],
            cpu_seconds=add_up(each).cpu_seconds,
            energy_joules=None if several_machines else each[0].energy_joules,
        )

    def count_budget(self) -> float:
        """What of a time budget is spent."""
        return self.age + self.count_seconds()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint should know beside the state of the training; of several processes each must ask."""
        return {
            **self.before,
            **self.count_spent().to_json(),
            "training": self.count_training().to_json(),
            "time_budget": self.config.time_budget,
            "environment": describe_machine() | {"device": self.device.type},
        }


def name_checkpoint(output: Path) -> Path:
    """Where an unfinished run is kept."""
    return output.with_name(f"{output.name}.checkpoint")


def find_checkpoint(job: Job) -> tuple[State, dict[str, Any]] | None:
    """What an interrupted run left, if there is one and it is to be taken up.

    Raises
    ------
    RunError
        If it is of other settings, images or weights and `force` is not set, or it is damaged.
    """

    def find() -> tuple[State, dict[str, Any]] | None:
        folder = job.checkpoints.folder
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{folder} is there and is no folder of checkpoints; move it, or choose another -o")
        if not job.config.resume:
            if (folder / CHECKPOINT).exists():
                job.progress.say(f"{folder}: the unfinished run there is given up")
            discard_checkpoint(job.checkpoints)
            return None
        description = job.checkpoints.read()
        changes = list_changes(description["identity"], job.identity) if description else []
        if changes and not job.config.force:
            raise RunError(
                f"{folder} holds an unfinished run of other settings ({'; '.join(changes)}); finish it with those, "
                f"name another place with -o, or discard it with --force"
            )
        if description is None or changes or is_spent(description, job):
            discard_checkpoint(job.checkpoints)
            return None
        return job.checkpoints.find()

    return job.processes.do_first(find)


def is_spent(description: Mapping[str, Any], job: Job) -> bool:
    """Whether it was stopped by a time budget, and is asked for with another one, or with none."""
    stopped, before = description["training"]["stopped"], description["more"].get("time_budget")
    return "budget" in stopped and before != job.config.time_budget


def take_up(trainer: Trainer, job: Job, state: State, more: Mapping[str, Any]) -> None:
    """Let a training go on where it was left."""
    job.before = {name: value for name, value in more.items() if name != "environment"}
    try:
        trainer.load_state(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{job.checkpoints.folder} does not fit this network ({type(error).__name__}: {error}); --no-resume starts "
            f"again"
        ) from error
    job.progress.say(f"{job.checkpoints.folder}: goes on after {say_where(state.values)}")
    if changes := list_changes(flatten(more["environment"]), flatten(job.describe()["environment"])):
        note = (
            f"taken up again with another environment ({'; '.join(changes)}): the weights may differ in the last bits"
        )
        job.progress.say(note)
        job.before["notes"] = [*job.before["notes"], note]


def discard_own_checkpoint(job: Job) -> None:
    """Remove a checkpoint that belongs to a run that is finished; any other is left alone."""
    with contextlib.suppress(RunError):
        description = job.checkpoints.read()
        if description is not None and description["identity"] == job.identity:
            discard_checkpoint(job.checkpoints)


def discard_checkpoint(checkpoints: Checkpoints) -> None:
    """Remove what lies in the checkpoint's folder and is ours."""
    with removing(checkpoints.folder / HISTORY):
        files.disk.remove(checkpoints.folder / HISTORY)
    checkpoints.remove()


def describe_kept(job: Job) -> str:
    """What there is to go on from, in words."""
    description = job.checkpoints.read() if job.processes.is_first else None
    if description is None:
        return ""
    values = description["training"]
    best = description["files"].get("best", "").partition("/")[0]
    weights = f"; its best weights are {job.checkpoints.folder / best}" if best else ""
    return f"; the training is kept in {job.checkpoints.folder} up to {say_where(values)}{weights}"


def say_where(values: Mapping[str, Any]) -> str:
    """A place in a training, from the values of its state."""
    return f"epoch {values['epoch'] + 1}, step {values['batches']}" if values["images"] else f"epoch {values['epoch']}"


def describe_machine() -> dict[str, Any]:
    """What decides the last bits: versions, threads, platform."""
    return {**describe_environment(), "threads": torch.get_num_threads()}


def flatten(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its versions beside the rest."""
    return {**{name: value for name, value in environment.items() if name != "versions"}, **environment["versions"]}
