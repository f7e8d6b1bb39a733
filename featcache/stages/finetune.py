"""The other way: the whole network trained on the images, end to end, by the classic recipe or a better one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache import files
from featcache.backbones import Backbone, check_trainable, load_backbone
from featcache.cache import hold_output
from featcache.config import RUNS_DIR, FinetuneConfig
from featcache.dataset import Split, check_root, describe_data
from featcache.errors import BadImagesError, OutputError, TrainingError
from featcache.extras import import_extra
from featcache.images import ImageRows, make_evaluation_transform
from featcache.metering import Meter, PeakMemory
from featcache.metrics import to_probabilities
from featcache.preprocessing import InputFormat
from featcache.processes import Processes, choose_local_device, join_processes
from featcache.progress import SILENT, Progress
from featcache.runs import (
    Predictions,
    decide_run,
    identify,
    read_record,
    write_history,
)
from featcache.runtime import has_bfloat16, run_network, select_device, training_settings
from featcache.stages.evaluate import Run, make_predictions
from featcache.stages.plan import take_backbone
from featcache.stages.prepare_training import (
    Probe,
    Trainee,
    TrainingBatches,
    WatchedBatches,
    fit_probe,
    gather_samples,
    list_samples,
    make_recipe,
    prepare_network,
)
from featcache.stages.training_job import (
    HISTORY,
    Job,
    describe_kept,
    discard_checkpoint,
    discard_own_checkpoint,
    find_checkpoint,
    name_checkpoint,
    take_up,
)
from featcache.stages.training_record import (
    count_operations,
    describe_costs,
    describe_epoch,
    describe_recipe,
    describe_run,
    tabulate_history,
    write_finetune_run,
)
from featcache.storage import locate_local
from featcache.training import Checkpoints, Epoch, Trainer, Training, keep_if_due

FIRST_STEPS = 5  # after which it is known how long a step takes
WRITING_SECONDS = 3.0  # that plots and files, and the end of the process, take


def finetune(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/finetune",
    *,
    progress: Progress = SILENT,
    age: float = 0.0,
    budget_of: str = "",
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
    budget_of
        Who set the time budget, if it is not the user's own; told in the record's details if it was spent.
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
    meter, memory = Meter(), PeakMemory()
    settings, given = take_backbone(settings)
    config, output = FinetuneConfig(**settings), files.follow_link(locate_local(output, "a run"))
    check_trainable(config.backbone)
    check_output_name(output)
    files.check_folder_writable(output.parent, output)
    check_root(data)
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
        job.meter, job.age, job.budget_of = meter, age, budget_of
        with explaining_failures(config):
            return do_job(job, memory)


def check_output_name(output: Path) -> None:
    """Raise an OutputError if the place has no name that something could lie beside."""
    if not output.name:
        raise OutputError(
            f"cannot write a run to {output}: expected a folder of its own, such as -o {RUNS_DIR}/finetune"
        )


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
    cut = {**identity, "time_budget": config.time_budget}
    if processes.do_first(lambda: decide_run(output, identity, cut, force=config.force)) != "reuse":
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
            seed=config.data_seed,
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
    trained, steps, evaluating = job.count_spent(), job.count_training(), Meter()
    splits = job.samples.listing.splits
    predictions = {name: predict_split(trainee, split) for name, split in splits.items() if name != "train"}
    record = describe_run(trainee, job, training, predictions)
    costs = describe_costs(job, training, trained, steps, job.collect(evaluating))
    details = {**record.details, "flops": count_operations(job, training)}
    record = replace(record, **costs, peak_memory_bytes=memory.read(), details=details)
    if processes.is_first:
        with files.fill_folder(job.output) as folder:
            record = write_finetune_run(folder, record, trainee, training, predictions)
        discard_checkpoint(job.checkpoints)
    record = processes.share(record)  # nobody goes before all is written
    return Run(folder=job.output, record=record, left_out=job.samples.bad)


def provide_probe(job: Job) -> Probe:
    """The linear head that lp-ft begins with; of several processes the first one fits it for all."""
    probe = job.processes.do_first(
        lambda: fit_probe(job.data, job.samples, job.backbone, job.config, job.device, job.progress)
    )
    job.before["probe"] = {
        "words": probe.words,
        "extraction": probe.extraction.to_json(),
        "head": probe.fitting.to_json(),
        "waited": probe.waited.to_json(),
    }
    return probe


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
        return job.count_budget() + needed >= budget

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

        job.training = Meter()
        try:
            return trainer.run(on_step=on_step, on_epoch=on_epoch)
        except TrainingError as error:
            raise TrainingError(f"{error}{describe_kept(job)}") from error
        except KeyboardInterrupt:
            kept = describe_kept(job)
            job.progress.say(f"stopped{kept}{'; the same command goes on from there' if kept else ''}")
            raise


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
