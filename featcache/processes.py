"""Several processes that train one network: which of them this one is, and how they exchange numbers.

`torchrun --nproc-per-node N -m featcache finetune ...` starts N processes and tells each its rank in the environment.
Knows numbers and tensors; nothing of images, files or what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from featcache.errors import DeviceError, FeatcacheError

T = TypeVar("T")
# The label of an input that counts for nothing: every process needs one at every step. Losses of torch pass over it.
NOBODY = -100
# One process may extract features or write a run while the others wait; torchrun ends all when one has died.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """One of several processes that do the same work on different images.

    Attributes
    ----------
    rank
        Which one this is, from 0.
    size
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same on each; whole numbers are summed exactly."""
        if self.several:
            distributed.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        """The first process's value, on each. A value that can be pickled, from a process of ours."""
        if not self.several:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box)
        shared: T = box[0]
        return shared

    def do_first(self, work: Callable[[], T]) -> T:
        """What the first process's work gives, on each; the others wait for it.

        Raises
        ------
        FeatcacheError
            On every process if the work raises one; the first one's is to be told.
        """
        if not self.several:
            return work()
        answer: tuple[Any, str | None] = (None, None)
        caught: FeatcacheError | None = None
        if self.is_first:
            try:
                answer = (work(), None)
            except FeatcacheError as error:
                caught, answer = error, (None, str(error))
        value, words = self.share(answer)
        if caught is not None:
            raise caught
        if words is not None:
            raise tell_elsewhere(words)
        result: T = value
        return result

    def collect(self, value: T) -> list[T]:
        """Every process's value by its rank, on each."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes; all begin with the first one's weights."""
        if not self.several:
            return network
        return nn.parallel.DistributedDataParallel(network, static_graph=True)  # some have parameters without use

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the first one's buffers: BatchNorm's statistics, of which each has seen its own images."""
        if self.several:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)


ALONE = Processes()


def tell_elsewhere(words: str) -> FeatcacheError:
    """An error that another process tells of."""
    error = FeatcacheError(words)
    error.told = True
    return error


def measure_age() -> float:
    """Seconds since this process was started; 0 where the system does not say.

    Source: proc_pid_stat(5), field 22, and proc_uptime(5).
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def is_launched() -> bool:
    """Whether torchrun, or something that speaks like it, started this as one of several processes."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def read_rank() -> int:
    """Which of the launched processes this is; 0 where it is the only one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count_neighbours() -> int:
    """How many of the launched processes share this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if is_launched() else 1


def choose_local_device(name: str) -> str:
    """The device of this process: of several on a machine with GPUs each has its own.

    Raises
    ------
    DeviceError
        If one GPU is named for all of them, or there are fewer GPUs than processes.
    """
    if not is_launched() or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise DeviceError(f"--device {name} is one device for several processes; expected cuda, cpu or auto")
    local, n_gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local >= n_gpus:
        raise DeviceError(
            f"process {local} on this machine has no GPU: torch sees {n_gpus}; use torchrun --nproc-per-node "
            f"{max(n_gpus, 1)}, or --device cpu"
        )
    return f"cuda:{local}"


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """The group of the processes that were launched together, while the block lasts.

    Where another process ends, this one ends with a FeatcacheError that need not be told.

    Over NCCL on CUDA, over gloo on CPUs. A process that was started alone is alone; in a group that a program of its
    own has made, that group is taken and left as it is.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html, environment variables.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Processes(distributed.get_rank(), distributed.get_world_size())
        return
    if not is_launched():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    except RuntimeError as error:  # of a process that ended, which says why by itself
        if isinstance(error, distributed.DistError) or "/gloo/" in str(error):
            raise tell_elsewhere("another of the processes has ended") from error
        raise
    finally:
        distributed.destroy_process_group()
