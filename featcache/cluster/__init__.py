"""Work spread over the machines of a Ray cluster: prepared by tasks, carried out by workers that are set up once.

The one place that knows Ray. Knows nothing of what is prepared and carried out: an item is a small order that can be
pickled, what is prepared a dictionary with arrays, an answer a small dictionary. featcache must be installed on every
machine, in the same version; only the functions' names and the items travel.

A row of the Ray data set is an item. What Ray does by itself: it places tasks and workers, lets the workers' number
grow and shrink with what the cluster has, holds back tasks while what they prepared lies unused (memory stays bounded),
and does again what died with a machine. What is added here: how often an item was begun is counted outside the process
that it may kill, so one that always does is given up after `TRIES` and named while all others go on. Ray by itself
tries for ever, or ends all work, or drops the row without a word; and its own limit, max_retries, goes with Ray 2.64.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import featcache
from featcache.cluster.driver import STOP_SECONDS
from featcache.cluster.messages import (
    Answer,
    Cluster,
    Done,
    Failed,
    Finished,
    Job,
    Outcome,
    Prepared,
    Work,
    import_ray,
    pack,
    unpack,
)
from featcache.cluster.working import SET_UP, TRIES
from featcache.errors import ClusterError, CrashedItemsError, DeviceError

__all__ = [
    "TRIES",
    "Answer",
    "Cluster",
    "Prepared",
    "Work",
    "check_cluster",
    "check_reachable",
    "import_ray",
    "join_cluster",
    "spread",
]

Item = TypeVar("Item")
REACHABLE_SECONDS = 5.0
JOIN_SECONDS = 60.0  # `auto` may find the traces of a cluster that is no more, and Ray waits for it
ENVIRONMENT = {  # of Ray's driver and of a cluster that it starts
    "RAY_USAGE_STATS_ENABLED": "0",  # it would phone home
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # its news are for its log files
    "RAY_task_oom_retries": "8",  # of a task that Ray ends because memory is short; by itself it never gives up
}


class RemoteError(Exception):
    """Where an exception came from, on another machine; the cause of the one that is raised here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class Driver:
    """The process that is Ray's driver, as long as it is needed; see `driver.py`."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None

    def look(self) -> Cluster:
        """What the cluster has; it is joined, or started, unless it is already."""
        if self._process is None:
            self._start()
        return self._cluster

    def _start(self) -> None:
        reader, writer = os.pipe()
        self._messages = os.fdopen(reader, "rb")
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        code = "import sys; sys.path[:] = {!r}; from featcache.cluster.driver import main; main({!r}, {!r})"
        self._process = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-c", code.format(sys.path, self._address, writer)],
            stdin=subprocess.PIPE,
            stdout=self._words,
            stderr=self._words,
            pass_fds=[writer],
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
            env={**os.environ, **ENVIRONMENT},
        )
        os.close(writer)
        if not select.select([self._messages], [], [], JOIN_SECONDS)[0]:
            self.stop()
            what = f"the Ray cluster at {self._address}" if self._address else "a Ray cluster started here"
            raise ClusterError(f"{what} has not answered for {JOIN_SECONDS:.0f} s; look at it with ray status")
        self._cluster: Cluster = self._receive()

    def run(self, job: Job) -> Generator[tuple[int, Outcome], None, None]:
        """The outcome of each item, with its position. If it is left before its end the process is, too."""
        assert self._process
        assert self._process.stdin
        try:
            with contextlib.suppress(BrokenPipeError):  # that it is dead is seen at once
                self._process.stdin.write(pack(job))
                self._process.stdin.flush()
            while not isinstance(message := self._receive(), Finished):
                yield message[0], unpack(message[1])
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leave the cluster; one that was started by the process ends with it."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._messages.close()  # or it would wait for what it says to be read
        try:
            process.wait(STOP_SECONDS + 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._words.close()

    def _receive(self) -> Any:
        """The next message; a failure is raised."""
        try:
            message = pickle.load(self._messages)  # noqa: S301 - from the process that was started here
        except EOFError:
            raise ClusterError(f"Ray's driver process ended by itself: {self._read_last_words()}") from None
        if isinstance(message, Failed):
            raise_failure(message)
        return message

    def _read_last_words(self) -> str:
        """The exit code, and the last line that the process printed of an error."""
        assert self._process
        code = self._process.wait()
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").splitlines()
        telling = [line.strip() for line in lines if "Check failed" in line or "Error" in line]
        return f"exit code {code}" + (f": {telling[-1]}" if telling else "")


JOINED: ContextVar[Driver | None] = ContextVar("JOINED", default=None)


@contextlib.contextmanager
def join_cluster(address: str | None = None) -> Iterator[Cluster]:
    """A Ray cluster for what is spread while the block lasts; one that was started for it is ended with it.

    Parameters
    ----------
    address
        `auto`, or HOST:PORT of a cluster that runs and has this machine. None takes the one that this process is in,
        or starts one on this machine.

    Raises
    ------
    ClusterError
        If it cannot be reached or started.
    MissingExtraError
        If Ray is not installed.
    """
    import_ray()
    address = address or find_cluster()
    if address:
        check_reachable(address)
    driver = Driver(address)
    token = JOINED.set(driver)
    try:
        yield driver.look()
    finally:
        JOINED.reset(token)
        driver.stop()


def spread(
    items: Sequence[Item],
    *,
    prepare: Callable[[Item], Prepared],
    make_worker: Callable[[], Work],
    address: str | None = None,
    gpu: bool = False,
) -> Iterator[Answer]:
    """Carry out items on a cluster and give their answers as they come, in any order.

    Parameters
    ----------
    items
        N orders, a few kB each; anything that can be pickled.
    prepare
        An item -> what a worker needs, arrays and other things that can be pickled. Runs in a task on one CPU, maybe
        more than once.
    make_worker
        Called once in every worker; gives what turns a prepared item into its answer. An item may be carried out twice
        where a machine died; what is kept of it must be kept before the answer is given.
    address
        As `join_cluster` has it; within its block, of that cluster.
    gpu
        Whether a worker has a GPU of its own, and no CPU; else one CPU.

    Yields
    ------
    dict
        Of every item once.

    Raises
    ------
    CrashedItemsError
        After all others were given: items whose process died each time.
    ClusterError
        If the cluster cannot be reached or fails, has not what is needed or another featcache, or `prepare`,
        `make_worker` or what it gives raised something that is no FeatcacheError.
    FeatcacheError
        As `prepare`, `make_worker` or what it gives raised it; work that has not begun is dropped.
    DeviceError
        If there is no GPU.
    """
    driver = JOINED.get()
    if driver is None:
        with join_cluster(address):
            yield from spread(items, prepare=prepare, make_worker=make_worker, gpu=gpu)
        return
    check_cluster(driver.look(), gpu=gpu)  # Ray would wait for ever
    version = featcache.__version__
    job = Job(items=items, prepare=prepare, make_worker=make_worker, gpu=gpu, version=version)
    crashed: dict[int, str] = {}
    with contextlib.closing(driver.run(job)) as outcomes:
        for position, outcome in outcomes:
            if isinstance(outcome, Done):
                yield outcome.value
            elif isinstance(outcome, Failed):
                raise_failure(outcome)
            elif outcome.stage == SET_UP:
                raise ClusterError(f"a worker's process on the Ray cluster died {TRIES} times while it was set up")
            else:
                crashed[position] = outcome.stage
    if crashed:
        raise CrashedItemsError(crashed)


def raise_failure(failed: Failed) -> NoReturn:
    """Raise here what was raised elsewhere."""
    error = failed.error or ClusterError(f"on the Ray cluster: {failed.words}")
    raise error from (RemoteError(failed.trace) if failed.trace else None)


def find_cluster() -> str | None:
    """The address of the cluster that this process is in, if it is in one, as a notebook may be."""
    ray = import_ray()
    if not ray.is_initialized():
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address


def check_cluster(cluster: Cluster, *, gpu: bool) -> None:
    """Whether a cluster has what tasks and workers need.

    Raises
    ------
    ClusterError, DeviceError
        If not.
    """
    if gpu and not cluster.gpus:
        raise DeviceError(f"the Ray cluster has no GPU ({cluster}); add a machine that has one, or use --device cpu")
    needed = 1 if gpu else 2
    if cluster.cpus < needed:
        raise ClusterError(
            f"the Ray cluster has too few CPUs ({cluster}): expected {needed} or more; add a machine, or start it with "
            f"ray start --num-cpus {needed}"
        )


def check_reachable(address: str) -> None:
    """Whether somebody listens at an address of the right kind; `auto` is Ray's to find.

    Raises
    ------
    ClusterError
        If nobody does.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise ClusterError(
            f"--address {address} is for Ray's client, over which Ray Data does not run; run the same command on a "
            f"machine of the cluster with --address auto, or by ray job submit"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS):
            pass
    except (OSError, ValueError, OverflowError) as error:
        cure = "expected auto, HOST:PORT of a running one, or no --address to start one here"
        raise ClusterError(f"no Ray cluster at {address}: {error}; {cure}") from error
