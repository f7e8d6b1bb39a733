"""What the processes of spread work tell one another: who asks, Ray's driver, its tasks and workers.

Everything here travels as pickle between processes of one job, never to or from a file.
"""

from __future__ import annotations

import pickle
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.errors import FeatcacheError
from featcache.extras import import_extra

Prepared = dict[str, Any]
Answer = dict[str, Any]
Work = Callable[[Prepared], Answer]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster has at the moment.

    Attributes
    ----------
    nodes
        Machines.
    cpus, gpus
        What Ray may give to tasks and workers.
    """

    nodes: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        machines = "1 machine" if self.nodes == 1 else f"{self.nodes} machines"
        return f"{machines}, {self.cpus} CPUs" + (f", {self.gpus} GPUs" if self.gpus else "")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Items to be carried out; see `spread`."""

    items: Sequence[Any]
    prepare: Callable[[Any], Prepared]
    make_worker: Callable[[], Work]
    gpu: bool
    version: str


@dataclass(frozen=True)
class Done:
    """What came of it."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """An exception, in words: its class may be unknown where it arrives, but for those of featcache.

    Attributes
    ----------
    error
        The exception itself, if it is one of featcache.
    words
        Class and message, in one line.
    trace
        Where it came from, if that matters.
    """

    error: FeatcacheError | None
    words: str
    trace: str


@dataclass(frozen=True)
class Crashed:
    """Nothing: the process died each time.

    Attributes
    ----------
    stage
        What it was doing.
    """

    stage: str


@dataclass(frozen=True)
class Finished:
    """All answers were given."""


Outcome = Done | Failed | Crashed


def describe_error(error: BaseException) -> Failed:
    """An exception for another process."""
    words = " ".join("".join(traceback.format_exception_only(error)).split())
    known = error if isinstance(error, FeatcacheError) else None
    return Failed(known, words, "".join(traceback.format_exception(error)))


def pack(message: object) -> bytes:
    """A message for another process; of classes and functions of the main program, the code travels with it."""
    packed: bytes = import_ray().cloudpickle.dumps(message)
    return packed


def unpack(packed: bytes) -> Any:
    """A message from another process of this job."""
    return pickle.loads(packed)  # noqa: S301 - never from a file


def import_ray() -> Any:
    """Ray.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own dependencies, whoever imports it first
        return import_extra("ray", extra="ray", what="--engine ray needs")
