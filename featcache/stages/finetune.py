"""The other way: the whole network trained on the images, end to end, by the classic recipe or a better one."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache import files
from featcache.backbones import Backbone, check_trainable, load_backbone
from featcache.bundle import save_network
from featcache.cache import hold_output
from featcache.config import RUNS_DIR, FinetuneConfig
from featcache.dataset import Split, check_root, describe_data
from featcache.errors import BadImage, BadImagesError, OutputError, RunError, TrainingError
from featcache.extras import import_extra
from featcache.images import ImageRows, make_evaluation_transform
from featcache.metrics import to_probabilities
from featcache.plots import draw_curves, save_figure
from featcache.preprocessing import InputFormat
from featcache.processes import Processes, choose_local_device, join_processes
from featcache.progress import SILENT, Progress
from featcache.report import format_seconds
from featcache.runs import (
    PeakMemory,
    Predictions,
    RunRecord,
    decide_run,
    describe_environment,
    identify,
    list_changes,
    read_record,
    write_history,
    write_record,
)
from featcache.runtime import has_bfloat16, run_network, select_device, training_settings
from featcache.stages.evaluate import Run, describe_accuracy, make_predictions, write_evaluation
from featcache.stages.plan import take_backbone
from featcache.stages.prepare_training import (
    Probe,
    Samples,
    Trainee,
    TrainingBatches,
    WatchedBatches,
    fit_probe,
    gather_samples,
    list_samples,
    make_recipe,
    prepare_network,
)
from featcache.training import CHECKPOINT, Checkpoints, Epoch, State, Trainer, Training, keep_if_due, removing

HISTORY = "history.csv"
AGAINST_OVERFITTING = ("augment", "mixup", "cutmix", "label_smoothing", "class_weight", "ema")
FIRST_STEPS = 5  # after which it is known how long a step takes
WRITING_SECONDS = 3.0  # that plots and files, and the end of the process, take


def finetune(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/finetune",
    *,
    progress: Progress = SILENT,
    age: float = 0.0,
    **settings: Any,
) -> Run:
    """Train a network on the images of a folder, keep the weights of one epoch, and evaluate them.

    The very same run at the output already (settings, images and weights) is not trained again. One that was begun and
    not finished lies in OUTPUT.checkpoint and is taken up again: on a CPU the weights come out bit for bit as if it
    had never been interrupted.

    Started by torchrun, all processes train one network, each on its share of every batch; the first one writes.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*.
    output
        The run folder.
    progress
        Told what is being done; one line an epoch.
    age
        Seconds that went by before this call and count for the time budget.
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
        If something else, or an unfinished run with other settings, lies at the output and `force` is not set, or it
        cannot be written.
    TrainingError
        If the loss is no longer a number, or the memory is too small.
    BackboneError, DeviceError, MissingExtraError
        If the network or the device cannot be had.

    Examples
    --------
    >>> finetune("photos", epochs=2).record.val_accuracy                   # doctest: +SKIP
    0.8823529411764706
    """
    started, memory = time.perf_counter(), PeakMemory()
    settings, given = take_backbone(settings)
    config, output = FinetuneConfig(**settings), files.follow_link(Path(output))
    check_trainable(config.backbone)
    check_output_name(output)
    files.check_folder_writable(output.parent, output)
    check_root(Path(data))
    if config.tensorboard:
        import_extra("tensorboard", extra="tensorboard", what="--tensorboard needs")
        files.check_folder_writable(Path(config.tensorboard), Path(config.tensorboard))
    device = select_device(choose_local_device(config.device))
    with (
        training_settings(device, deterministic=config.deterministic),
        join_processes(device) as processes,
        hold_output(output, doing="trained") if processes.is_first else contextlib.nullcontext(),
    ):
        if processes.is_first:
            files.mend_folder(output)
        job = prepare_job(data, output, config, given, device, processes, progress if processes.is_first else SILENT)
        if isinstance(job, Run):
            return job
        job.started, job.age = started, age
        with explaining_failures(config):
            return do_job(job, memory)


def check_output_name(output: Path) -> None:
    """Raise an OutputError if the place has no name that something could lie beside."""
    if not output.name:
        raise OutputError(
            f"cannot write a run to {output}: expected a folder of its own, such as -o {RUNS_DIR}/finetune"
        )


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
        What the sessions before this one left: seconds, notes.
    started
        On the clock of `time.perf_counter`.
    age
        Seconds before that which count for the time budget.
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
    before: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "probe": None, "notes": []})
    started: float = 0.0
    age: float = 0.0

    def count_seconds(self) -> float:
        """What all of it has taken up to now, with what was done before an interruption."""
        return time.perf_counter() - self.started + float(self.before["seconds"])

    def describe(self) -> dict[str, Any]:
        """What a checkpoint should know beside the state of the training."""
        return {
            **self.before,
            "seconds": self.count_seconds(),
            "environment": describe_machine() | {"device": self.device.type},
        }


def prepare_job(
    data: Path | str,
    output: Path,
    config: FinetuneConfig,
    given: Backbone | None,
    device: torch.device,
    processes: Processes,
    progress: Progress,
) -> Job | Run:
    """Everything up to the decision whether there is anything to be done; a finished run if there is not."""
    backbone = provide_backbone(config, given, processes, progress)
    listing = list_samples(data, backbone, config, progress)
    config = config.settle(
        has_test="test" in listing.splits,
        clips=backbone.preprocessing.frames > 0,
        device=device.type,
        bfloat16=has_bfloat16(device),
    )
    samples = gather_samples(listing, backbone, config, processes, progress)
    identity = identify("finetune", config.result_settings(), describe_data(samples.listing), backbone.describe())
    job = Job(
        data=data,
        output=output,
        samples=samples,
        backbone=backbone,
        config=config,
        device=device,
        processes=processes,
        progress=progress,
        identity=identity,
        checkpoints=Checkpoints(name_checkpoint(output), identity, every_seconds=config.checkpoint_every),
    )
    if processes.do_first(lambda: decide_run(output, identity, force=config.force)) != "reuse":
        return job
    if processes.is_first:
        discard_own_checkpoint(job)  # it was killed after its last step
    progress.say(f"{output} is this very run already; --force trains it again")
    return Run(folder=output, record=read_record(output), reused=True, left_out=samples.bad)


def provide_backbone(
    config: FinetuneConfig, given: Backbone | None, processes: Processes, progress: Progress
) -> Backbone:
    """The backbone, given or loaded; of several processes the first one downloads and the others come after it."""

    def load() -> Backbone:
        return load_backbone(
            config.backbone,
            weights=config.weights,
            seed=config.seed,
            images=InputFormat(**config.image_settings()),
            progress=progress,
        )

    if given is not None:
        return copy.deepcopy(given)  # training must leave alone what was given
    mine: list[Backbone] = []

    def load_first() -> None:
        mine.append(load())

    processes.do_first(load_first)
    return mine[0] if mine else load()


def do_job(job: Job, memory: PeakMemory) -> Run:
    """Train, evaluate and write."""
    config, processes, progress = job.config, job.processes, job.progress
    found = find_checkpoint(job)
    probe = provide_probe(job) if config.mode == "lp-ft" and found is None else None
    trainee = prepare_network(job.samples, job.backbone, config, job.device, processes, probe)
    progress.say(f"{trainee.title}: {describe_recipe(config)}")
    if probe is not None:
        progress.say(probe.words)
    trainer = make_trainer(trainee, job)
    if found is not None:
        take_up(trainer, job, *found)
    training = run_training(trainer, job)
    trained = job.count_seconds()
    splits = job.samples.listing.splits
    predictions = {name: predict_split(trainee, split) for name, split in splits.items() if name != "train"}
    record = describe_run(trainee, job, training, predictions)
    seconds = count_seconds(job, training, trained)
    record = replace(record, seconds=seconds, peak_memory_bytes=memory.read())
    if processes.is_first:
        with files.fill_folder(job.output) as folder:
            write_finetune_run(folder, record, trainee, training, predictions)
        discard_checkpoint(job.checkpoints)
    processes.share(None)  # nobody goes before all is written
    return Run(folder=job.output, record=record, left_out=job.samples.bad)


def provide_probe(job: Job) -> Probe:
    """The linear head that lp-ft begins with; of several processes the first one fits it for all."""
    probe = job.processes.do_first(
        lambda: fit_probe(job.data, job.samples, job.backbone, job.config, job.device, job.progress)
    )
    job.before["probe"] = {
        "words": probe.words,
        "extraction": probe.extraction_seconds,
        "head": probe.seconds,
        "waited": probe.waited_seconds,
    }
    return probe


# --- checkpoints ------------------------------------------------------------------------------------------------------


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
        if description is None or changes:
            discard_checkpoint(job.checkpoints)
            return None
        return job.checkpoints.find()

    return job.processes.do_first(find)


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
    progress = trainer.progress
    where = f"epoch {progress.epoch + 1}, step {progress.batches}" if progress.images else f"epoch {progress.epoch}"
    job.progress.say(f"{job.checkpoints.folder}: goes on after {where}")
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


def describe_machine() -> dict[str, Any]:
    """What decides the last bits: versions, threads, platform."""
    return {**describe_environment(), "threads": torch.get_num_threads()}


def flatten(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its versions beside the rest."""
    return {**{name: value for name, value in environment.items() if name != "versions"}, **environment["versions"]}


# --- training ---------------------------------------------------------------------------------------------------------


def make_trainer(trainee: Trainee, job: Job) -> Trainer:
    """What trains the network on its images."""
    budget, n_reported = trainee.config.time_budget, len(job.samples.listing) - len(job.samples.listing.splits["train"])
    n_watched, n_processes = len(job.samples.watched), job.processes.size

    def is_over(trainer: Trainer) -> bool:
        """Whether what is left of the budget is needed to evaluate and to write."""
        assert budget is not None
        progress = trainer.progress
        image_seconds = progress.evaluation_seconds / max(n_watched, 1)
        if not image_seconds and progress.batches >= FIRST_STEPS:  # nothing was evaluated yet: it is half of a step
            image_seconds = progress.image_seconds / 2 / n_processes
        needed = image_seconds * (n_watched + n_reported) + WRITING_SECONDS
        return job.age + job.count_seconds() + needed >= budget

    return Trainer(
        trainee.network,
        TrainingBatches(trainee, job.progress),
        WatchedBatches(trainee, job.samples.watched, job.progress),
        make_recipe(trainee),
        processes=job.processes,
        is_over=None if budget is None else is_over,
    )


def run_training(trainer: Trainer, job: Job) -> Training:
    """Train to the end; tell of every epoch, keep checkpoints meanwhile.

    Raises
    ------
    TrainingError
        If the loss is no longer a number; what was kept last is still there.
    """
    n_epochs, is_first = trainer.recipe.epochs, job.processes.is_first
    with open_board(job) as board:

        def on_step(trainer: Trainer) -> None:
            keep_if_due(job.checkpoints, trainer, job.describe)

        def on_epoch(epoch: Epoch, is_best: bool) -> None:
            job.progress.say(describe_epoch(epoch, epoch.epoch if trainer.progress.stopped else n_epochs, is_best, job))
            if is_first:
                job.checkpoints.folder.mkdir(parents=True, exist_ok=True)
                write_history(job.checkpoints.folder / HISTORY, tabulate_history(trainer.progress.history, job.config))
                board(epoch)

        try:
            return trainer.run(on_step=on_step, on_epoch=on_epoch)
        except TrainingError as error:
            raise TrainingError(f"{error}{describe_kept(job)}") from error
        except KeyboardInterrupt:
            kept = describe_kept(job)
            job.progress.say(f"stopped{kept}{'; the same command goes on from there' if kept else ''}")
            raise


def describe_kept(job: Job) -> str:
    """What there is to go on from, in words."""
    description = job.checkpoints.read() if job.processes.is_first else None
    if description is None:
        return ""
    values = description["training"]
    where = f"epoch {values['epoch'] + 1}, step {values['batches']}" if values["images"] else f"epoch {values['epoch']}"
    best = description["files"].get("best", "").partition("/")[0]
    weights = f"; its best weights are {job.checkpoints.folder / best}" if best else ""
    return f"; the training is kept in {job.checkpoints.folder} up to {where}{weights}"


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
            left = min(left, max(config.time_budget - job.count_seconds(), 0.0))
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


@contextlib.contextmanager
def open_board(job: Job) -> Iterator[Callable[[Epoch], None]]:
    """What writes an epoch to TensorBoard's event files, or does nothing."""
    if not job.config.tensorboard or not job.processes.is_first:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(job.config.tensorboard)

    def write(epoch: Epoch) -> None:
        for row in tabulate_history([epoch], job.config):
            for name, value in row.items():
                if isinstance(value, float):
                    split, _, what = name.partition("_")
                    writer.add_scalar(f"{what}/{split}" if what in ("loss", "accuracy") else name, value, epoch.epoch)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def explaining_failures(config: FinetuneConfig) -> Iterator[None]:
    """Say what cures it when the memory or a batch is too small, or an operator is not deterministic.

    Raises
    ------
    TrainingError
        In place of torch's own errors.
    """
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if "cannot be converted to type float without overflow" in text:
            raise TrainingError(
                f"a step has become too large for float32; try a smaller --lr than {config.lr or 0:g}, or --gamma"
            ) from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            smaller = f"--batch-size {config.batch_size // 2}" if config.batch_size > 1 else "a smaller --input-size"
            raise TrainingError(
                f"out of memory with batches of {config.batch_size} images; try {smaller}, or a smaller network"
            ) from error
        if "Expected more than 1 value per channel" in text:
            raise TrainingError(
                "BatchNorm has no statistics of a single image: choose another --batch-size, so that no batch, and no "
                "process's share of one, is a single image, or --batch-norm fixed"
            ) from error
        if config.deterministic and "deterministic" in text:
            raise TrainingError(f"--deterministic: {text.splitlines()[0]}; leave the option out") from error
        raise


# --- what comes out ---------------------------------------------------------------------------------------------------


def predict_split(trainee: Trainee, split: Split) -> Predictions:
    """Predict a split's images with the trained network, as `featcache predict` would; each process its share."""
    processes = trainee.processes
    own = np.arange(len(split))[processes.rank :: processes.size]
    rows = ImageRows(
        trainee.samples.listing.root,
        [split.paths[row] for row in own],
        transform=make_evaluation_transform(trainee.backbone.preprocessing),
    )
    logits = np.empty((len(split), len(trainee.samples.listing.classes)), dtype=np.float32)
    found: list[tuple[Any, Any]] = []
    for output in run_network(trainee.network, rows, device=trainee.device, workers=trainee.config.workers):
        if output.bad:
            raise BadImagesError(output.bad)
        found.append((own[output.rows], output.values))
    for parts in processes.collect(found):
        for numbers, values in parts:
            logits[numbers] = values
    return make_predictions(split, to_probabilities(logits))


def describe_run(trainee: Trainee, job: Job, training: Training, predictions: Mapping[str, Predictions]) -> RunRecord:
    """The record, but for what it cost."""
    best, config = training.best, job.config
    trained = [p for p in trainee.network.parameters() if config.mode != "head" or p.requires_grad]
    total = sum(parameter.numel() for parameter in trainee.network.parameters())
    probe = job.before["probe"]
    return RunRecord(
        kind="finetune",
        title=trainee.title if not training.stopped else f"{trainee.title}, stopped in {training.history[-1].epoch}",
        settings=config.result_settings(),
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
        },
    )


def describe_recipe(config: FinetuneConfig) -> str:
    """Who takes the steps, how large, and all that is not as usual, in a line."""
    backbone = f", {config.lr_backbone:g} of the backbone" if config.lr_backbone not in (None, config.lr) else ""
    words = [f"{config.optimizer}, learning rate {config.lr:g}{backbone}", f"{config.schedule} schedule"]
    words.append(f"batches of {config.batch_size}")
    settings = config.result_settings()
    names = ("warmup", "layer_decay", "weight_decay", *AGAINST_OVERFITTING)
    words += [f"{name.replace('_', ' ')} {settings[name]}" for name in names if settings.get(name)]
    return ", ".join(words + ([config.precision] if config.precision not in (None, "fp32") else []))


def describe_end(training: Training, n_train: int, job: Job) -> list[str]:
    """Why it ended before all its epochs, if it did."""
    if not training.stopped:
        return []
    last, budget = training.history[-1], job.config.time_budget
    where = f"after epoch {last.epoch}"
    if last.images < n_train and last.epoch:
        where = f"in the middle of epoch {last.epoch}, after {last.images} of {n_train} images"
    late = budget is not None and "budget" in training.stopped and job.count_seconds() > budget
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


def count_seconds(job: Job, training: Training, trained: float) -> dict[str, float]:
    """Wall time by stage; of lp-ft the cached features are counted with what they cost when they were extracted."""
    now, probe = job.count_seconds(), job.before["probe"]
    spent = sum(epoch.seconds for epoch in training.history)
    n_epochs = sum(1 for epoch in training.history if epoch.epoch > 0)
    seconds = {
        **({"extraction": probe["extraction"], "head": probe["head"]} if probe else {}),
        "preparation": max(trained - spent - (probe["waited"] if probe else 0.0), 0.0),
        "training": spent,
        "evaluation": now - trained,
    }
    return {**seconds, "total": sum(seconds.values()), "per_epoch": spent / max(n_epochs, 1)}


def describe_left_out(bad: Sequence[BadImage]) -> list[str]:
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
    history = tabulate_history(training.history, trainee.config)
    save_network(folder, trainee.network, record.classes, record.extractor)
    write_history(folder / HISTORY, history)
    save_figure(draw_curves(history, record.title), folder / "curves.png")
    write_evaluation(folder, predictions, record.classes, record.title)
    write_record(folder, record)
