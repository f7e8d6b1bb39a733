"""The steps and epochs. A training can be left after any step and taken up again there, bit for bit on a CPU."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from featcache.errors import FeatcacheError, TrainingError
from featcache.processes import ALONE, NOBODY, Processes
from featcache.training.batches import Batches, Position, ResumableBatches
from featcache.training.recipe import Recipe, Stage, average_weights

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over the training batches and one over the watched ones.

    Losses are mean cross-entropy in nats per image, accuracies shares; the training ones are collected while the
    weights still change, as in the classic recipe, and None of epoch 0, the weights that a training begins with.

    Attributes
    ----------
    epoch
        From 1 on, through all stages.
    stage
        The name of its stage.
    lr
        Of the last layer, at the first step.
    train_loss, train_accuracy
        On the training images, augmented and mixed as they were.
    val_loss, val_accuracy
        On the watched images.
    seconds
        Wall time of both passes.
    images
        That were trained on; fewer than all where it was cut short.
    images_per_second
        Of the training pass.
    """

    epoch: int
    stage: str = ""
    lr: float
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float
    seconds: float
    images: int = 0
    images_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training gave: every epoch, which one's weights the network now has, and why it ended early, if so."""

    history: tuple[Epoch, ...]
    best: Epoch
    stopped: str = ""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a training needs to go on.

    Attributes
    ----------
    values
        Plain JSON values.
    network, best
        The weights as they are, and those of the best epoch, by name; `best` is empty where there was none yet.
    others
        All other tensors by name: the optimiser's, averages, random states, the order of the images.
    """

    values: dict[str, Any]
    network: Weights
    best: Weights
    others: dict[str, Tensor]


@dataclass
class Sums:
    """Of the running epoch: loss and rights over the rows, and how many rows. They stay on the device.

    NOTE: `.item()` at every step would wait for the GPU.
    """

    loss: Tensor
    correct: Tensor
    n: Tensor

    @classmethod
    def start(cls, device: torch.device) -> Sums:
        """Nothing yet."""
        exact = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(torch.zeros((), dtype=exact, device=device), zero, zero.clone())

    def add(self, loss: Tensor, correct: Tensor, n: int | Tensor) -> None:
        """Count a batch."""
        self.loss = self.loss + loss
        self.correct = self.correct + correct
        self.n = self.n + n

    def means(self, processes: Processes) -> tuple[float, float]:
        """Loss and accuracy over the rows of all processes, each counted once."""
        n = int(processes.sum(self.n.clone()))
        return float(processes.sum(self.loss.clone())) / n, int(processes.sum(self.correct.clone())) / n


@dataclass
class Course:
    """How far a training has come: what changes from step to step, beside weights."""

    epoch: int = 0  # that are finished
    batches: int = 0  # of the running epoch
    images: int = 0
    training_seconds: float = 0.0  # of this epoch, its evaluation aside
    evaluation_seconds: float = 0.0  # of the last one
    image_seconds: float = 0.0  # of training, in the fastest step of this epoch
    lr: float = 0.0  # at its first step
    stopped: str = ""
    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None


class Trainer:
    """Takes a network through the stages of a recipe.

    Parameters
    ----------
    network
        (B, ...) -> logits (B, C), on its device.
    train_batches, watched
        Iterated once an epoch; give (inputs, labels) on the network's device. The second are evaluated.
    recipe
        What is done.
    processes
        Those that train together, each on its share of every batch.
    is_over
        Asked after each step; True ends the training with the images that were seen.
    """

    def __init__(
        self,
        network: nn.Module,
        train_batches: ResumableBatches,
        watched: Batches,
        recipe: Recipe,
        *,
        processes: Processes = ALONE,
        is_over: Callable[[Trainer], bool] | None = None,
    ) -> None:
        self.network, self.train_batches, self.watched, self.recipe = network, train_batches, watched, recipe
        self.processes, self.is_over = processes, is_over
        self.device = next(network.parameters()).device
        self.progress, self.sums = Course(), Sums.start(self.device)
        self.best_weights: Weights = {}
        self.averaged: AveragedModel | None = None if recipe.ema is None else average_weights(network, recipe.ema)
        scaled = recipe.compute == "float16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda" if scaled else "cpu", enabled=scaled)
        self._stage: Stage | None = None
        self._position: Position | None = None
        self._random: Tensor | None = None
        self._ticked = time.perf_counter()
        self._enter_stage(1)

    # --- going through it ---------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        on_step: Callable[[Trainer], None] | None = None,
        on_epoch: Callable[[Epoch, bool], None] | None = None,
    ) -> Training:
        """Train to the end, and leave the network with the weights that are kept, in evaluation mode.

        Parameters
        ----------
        on_step
            Called when the state is one that can be left: after each step, and after each epoch.
        on_epoch
            Told of every epoch, and whether it is the best so far.

        Raises
        ------
        TrainingError
            If a loss is no longer a number.
        """
        self._ticked = time.perf_counter()
        if self.recipe.start_counts and not self.progress.history:
            self._finish_epoch(on_epoch)
        while not self._is_finished():
            self._run_epoch(on_step)
            self._finish_epoch(on_epoch)
            if on_step is not None:
                on_step(self)
        best = self.progress.best
        assert best is not None
        restore(self.network, self.best_weights)
        self.network.eval()
        return Training(history=tuple(self.progress.history), best=best, stopped=self.progress.stopped)

    def _is_finished(self) -> bool:
        """Whether all epochs are done, or it has stopped before."""
        progress, recipe = self.progress, self.recipe
        if progress.epoch >= recipe.epochs or progress.stopped:
            return True
        if recipe.patience is not None and progress.best is not None:
            _, first = recipe.find_stage(recipe.epochs)  # the last stage: before it nobody is impatient
            waited = progress.epoch - max(progress.best.epoch, first - 1)
            if waited >= recipe.patience:
                progress.stopped = f"no better epoch in {recipe.patience}"
                return True
        return False

    def _enter_stage(self, epoch: int) -> None:
        """Make ready what learns in this epoch, if it is another than before."""
        index, _ = self.recipe.find_stage(epoch)
        stage = self.recipe.stages[index]
        if stage is self._stage:
            return
        self._stage = stage
        stage.choose_parameters(self.network)
        self.optimizer = stage.make_optimizer(self.network)
        self.scheduler = stage.make_scheduler(self.optimizer, len(self.train_batches))
        self.forward: Callable[[Tensor], Tensor] = self.network  # NOTE: an older wrapper must be gone before the next
        if self.recipe.compiled:
            self.forward = torch.compile(self.network)
        self.forward = self.processes.wrap(self.forward)  # type: ignore[arg-type]

    def _run_epoch(self, on_step: Callable[[Trainer], None] | None) -> None:
        """The gradient steps of an epoch, or the rest of them."""
        progress = self.progress
        self._enter_stage(progress.epoch + 1)
        assert self._stage is not None
        if self._position is None:
            self.sums, progress.batches, progress.images = Sums.start(self.device), 0, 0
            progress.training_seconds = progress.image_seconds = 0.0
            progress.lr = float(self.optimizer.param_groups[0]["lr"])
        self._stage.set_training_mode(self.network)
        for inputs, labels in self._begin_batches():
            self._step(inputs, labels)
            progress.batches += 1
            progress.images += len(labels)
            took = self._tick()
            progress.training_seconds += took
            progress.image_seconds = min(progress.image_seconds or took / len(labels), took / len(labels))
            if on_step is not None:
                on_step(self)
            if self._must_stop():
                progress.stopped = "the time budget was spent"
                break

    def _must_stop(self) -> bool:
        """Whether the first process says so: all stop together."""
        return self.is_over is not None and self.processes.share(self.is_over(self))

    def _begin_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the running epoch, from where it was left.

        NOTE: a loader draws from the random state when it begins; what was saved is put back only then.
        """
        position, self._position = self._position, None
        self.train_batches.begin(self.progress.epoch + 1, position)
        iterator = iter(self.train_batches)
        if self._random is not None:
            set_random_state(self._random, self.device)
            self._random = None
        return iterator

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        """One gradient step."""
        targets = labels
        if self.recipe.mix is not None and not (self.processes.several and bool((labels == NOBODY).any())):
            inputs, targets = self.recipe.mix(inputs, labels)
        self.optimizer.zero_grad()
        with autocast(self.device, self.recipe.compute):
            logits = self.forward(inputs)
            loss, loss_sum, n = self._find_loss(logits, targets)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        wanted = targets if targets.ndim == 1 else targets.argmax(1)
        self.sums.add(loss_sum, (logits.detach().argmax(1) == wanted).sum(), n)

    def _find_loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """The loss to go down, its sum over the rows for the records, and how many rows there are.

        Of several processes each has a share of the batch, and gradients are averaged over processes: the mean over
        the whole batch comes out if each takes its own sum, times the processes, over what the whole batch weighs.
        """
        recipe, weights = self.recipe, self.recipe.class_weights
        weights = None if weights is None else weights.to(logits.device)
        smoothing = recipe.label_smoothing
        if not self.processes.several:
            loss = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
            return loss, loss.detach() * len(targets), len(targets)
        own = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
        if targets.ndim == 1:
            real = targets != NOBODY
            n = real.sum()
            weight = n if weights is None else (weights[targets.clamp(min=0)] * real).sum()
        else:
            n = weight = torch.tensor(len(targets), device=logits.device)
        total = self.processes.sum(torch.stack([n.double(), weight.double()]).float())
        return own * self.processes.size / total[1], own.detach() * total[0] / total[1], n

    def _finish_epoch(self, on_epoch: Callable[[Epoch, bool], None] | None) -> None:
        """Evaluate, and keep the weights if they are the best."""
        progress, is_start = self.progress, not self.progress.images
        assert self._stage is not None
        evaluated = self.network if self.averaged is None else self.averaged.module
        self.processes.share_buffers(evaluated)
        train_loss, train_accuracy = (None, None) if is_start else self.sums.means(self.processes)
        val_loss, val_accuracy = evaluate(
            evaluated, self.watched, processes=self.processes, compute=self.recipe.compute
        )
        number = progress.epoch if is_start else progress.epoch + 1
        losses = [loss for loss in (train_loss, val_loss) if loss is not None]
        if not all(map(math.isfinite, losses)):
            raise TrainingError(
                f"the loss is no longer a number in epoch {number} (training {train_loss}, evaluation {val_loss}); try "
                f"a smaller --lr than {progress.lr:g}"
            )
        progress.evaluation_seconds = self._tick()
        epoch = Epoch(
            epoch=number,
            stage="start" if is_start else self._stage.name,
            lr=progress.lr,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            seconds=progress.training_seconds + progress.evaluation_seconds,
            images=0 if is_start else int(self.processes.sum(self.sums.n.clone())),
            images_per_second=self._measure_rate(),
        )
        is_best = self._is_better(epoch)
        progress.history.append(epoch)
        progress.epoch, progress.batches, progress.images = number, 0, 0
        if is_best:
            progress.best = epoch
            self.best_weights = copy.deepcopy(evaluated.state_dict())  # with the versions that MNASNet asks for
        if on_epoch is not None:
            on_epoch(epoch, is_best)

    def _measure_rate(self) -> float | None:
        """Images per second of this epoch's steps, of all processes."""
        if not self.progress.images:
            return None
        n = int(self.processes.sum(self.sums.n.clone()))
        return n / max(self.progress.training_seconds, 1e-9)

    def _is_better(self, epoch: Epoch) -> bool:
        """Whether an epoch's weights are to be kept rather than the best so far."""
        best, keep = self.progress.best, self.recipe.keep
        if best is None or keep == "last" or epoch.val_accuracy > best.val_accuracy:
            return True
        equal = epoch.val_accuracy == best.val_accuracy
        return keep != "best" and equal and epoch.val_loss < best.val_loss

    def _tick(self) -> float:
        """Seconds since the last call."""
        before, self._ticked = self._ticked, time.perf_counter()
        return self._ticked - before

    # --- leaving it and taking it up again ----------------------------------------------------------------------------

    def is_sound(self) -> bool:
        """Whether loss and weights are finite numbers, so that they are worth keeping."""
        sound = bool(torch.isfinite(self.sums.loss)) and all(
            bool(torch.isfinite(tensor).all()) for tensor in self.network.parameters()
        )
        return all(self.processes.collect(sound))

    def find_state(self) -> State:
        """What is needed to go on from here; of several processes each must ask, and all get the same.

        The tensors are those of the training itself: write them before the next step.
        """
        progress = self.progress
        optimizer, tensors = take_apart(self.optimizer.state_dict())
        others = {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
        if self.averaged is not None:
            others |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for rank, random in enumerate(self.processes.collect(find_random_state(self.device))):
            others[f"random.{rank}"] = random
        others |= {"sums.loss": self.sums.loss, "sums.correct": self.sums.correct, "sums.n": self.sums.n}
        if progress.images:
            others["order"] = self.train_batches.order
        if self.processes.several:
            counts = self.processes.collect((self.sums.loss, self.sums.correct, self.sums.n, progress.images))
            for rank, (loss, correct, n, images) in enumerate(counts):
                others |= {f"sums.{rank}.loss": loss, f"sums.{rank}.correct": correct, f"sums.{rank}.n": n}
                others[f"sums.{rank}.images"] = torch.tensor(images)
        values = {
            **{name: value for name, value in asdict(progress).items() if name != "batches"},
            "batches": progress.batches,
            "processes": self.processes.size,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return State(values=values, network=self.network.state_dict(), best=self.best_weights, others=others)

    def load_state(self, state: State) -> None:
        """Go on from there.

        Raises
        ------
        FeatcacheError
            If it is of another number of processes.
        KeyError, ValueError, RuntimeError
            If it is of another network or recipe.
        """
        values, others, rank = state.values, state.others, self.processes.rank
        if values["processes"] != self.processes.size:
            raise FeatcacheError(
                f"the training was begun with {values['processes']} processes, not {self.processes.size}: expected "
                f"`torchrun --nproc-per-node {values['processes']}`, or --no-resume to start again"
            )
        history = [Epoch(**epoch) for epoch in values["history"]]
        best = None if values["best"] is None else Epoch(**values["best"])
        names = (
            "epoch",
            "batches",
            "images",
            "training_seconds",
            "evaluation_seconds",
            "image_seconds",
            "lr",
            "stopped",
        )
        self.progress = Course(**{name: values[name] for name in names}, history=history, best=best)
        running = self.progress.images > 0
        self._enter_stage(self.progress.epoch + 1 if running else max(self.progress.epoch, 1))
        restore(self.network, state.network)
        self.optimizer.load_state_dict(put_together(values["optimizer"], _named(others, "optimizer.")))
        self.scheduler.load_state_dict(values["scheduler"])
        self.scaler.load_state_dict(values["scaler"])
        if self.averaged is not None:
            restore(self.averaged, _named(others, "averaged."))
        own = f"sums.{rank}." if self.processes.several else "sums."
        self.sums = Sums(*(others[own + name].to(self.device) for name in ("loss", "correct", "n")))
        if self.processes.several:
            self.progress.images = int(others[own + "images"])
        self.best_weights = dict(state.best)
        self._random = others[f"random.{rank}"]
        if running:
            self._position = Position(batches=self.progress.batches, order=others["order"])
        else:
            set_random_state(self._random, self.device)
            self._random = None


def train(
    network: nn.Module,
    train_batches: ResumableBatches,
    watched: Batches,
    recipe: Recipe,
    *,
    on_epoch: Callable[[Epoch, bool], None] | None = None,
) -> Training:
    """Train a network and leave it with the weights that the recipe keeps, in evaluation mode; see `Trainer`."""
    return Trainer(network, train_batches, watched, recipe).run(on_epoch=on_epoch)


def evaluate(
    network: nn.Module, batches: Batches, *, processes: Processes = ALONE, compute: str = "float32"
) -> tuple[float, float]:
    """Mean loss and accuracy over the rows of all processes, in evaluation mode, without gradients."""
    network.eval()
    device = next(network.parameters()).device
    sums = Sums.start(device)
    with torch.inference_mode(), autocast(device, compute):
        for inputs, labels in batches:
            logits = network(inputs)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums.add(loss, (logits.argmax(1) == labels).sum(), len(labels))
    return sums.means(processes)


def autocast(device: torch.device, compute: str) -> contextlib.AbstractContextManager[Any]:
    """Let the operators that stand it compute in this type."""
    if compute == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, compute))


def restore(network: nn.Module, weights: Weights) -> None:
    """Copy values into a network's parameters and buffers, whatever their order in memory.

    Raises
    ------
    KeyError
        If one is missing.
    """
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(weights[name])


def find_random_state(device: torch.device) -> Tensor:
    """Of the CPU's generator, and behind it the one of a CUDA device, uint8."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put back what `find_random_state` gave."""
    n = len(torch.get_rng_state())
    torch.set_rng_state(state[:n].clone())
    if device.type == "cuda" and len(state) > n:  # a training that began on a CPU has none
        torch.cuda.set_rng_state(state[n:].clone(), device)


def take_apart(optimizer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimiser's state dict as plain values and tensors by name: "3.momentum_buffer"."""
    tensors = {
        f"{i}.{name}": value
        for i, state in optimizer["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    plain = {
        str(i): {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for i, state in optimizer["state"].items()
    }
    return {"state": plain, "param_groups": optimizer["param_groups"]}, tensors


def put_together(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict that `take_apart` took apart."""
    state: dict[int, dict[str, Any]] = {int(i): dict(plain) for i, plain in values["state"].items()}
    for name, tensor in tensors.items():
        i, _, what = name.partition(".")
        state[int(i)][what] = tensor.clone()  # the optimiser would change it in place
    return {"state": state, "param_groups": [dict(group) for group in values["param_groups"]]}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
