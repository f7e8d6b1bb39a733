"""Experiments on Ray clusters of three nodes, in a network of their own: nothing listens where others can reach it.

``python tests/ray_nursery.py CASE FOLDER`` prints one JSON object with what happened. `run_alone` starts this or
another such program from a test, `three_nodes` gives a program its cluster.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import featcache
from featcache.cluster import import_ray, join_cluster, spread
from featcache.errors import CrashedItemsError, FeatcacheError
from featcache.extras import is_installed

IN_A_NETWORK_OF_ITS_OWN = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
OBJECT_STORE = 150 << 20
PATIENCE_SECONDS = 480


def can_run_alone() -> bool:
    """Whether Ray is there, and this system lets a test have a network of its own."""
    if not is_installed("ray") or not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], capture_output=True, check=False).returncode == 0


def run_alone(program: Path, *arguments: object) -> dict[str, Any]:
    """What a program prints as JSON that has a network of its own; the test is skipped where that cannot be."""
    if not can_run_alone():
        pytest.skip("needs Ray, unshare and ip, and the right to a network of one's own")
    done = subprocess.run(
        [*IN_A_NETWORK_OF_ITS_OWN, sys.executable, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_once(folders: pytest.TempPathFactory, program: Path, case: str) -> dict[str, Any]:
    """As `run_alone`, of one case for all tests that look at it, in whichever of xdist's processes they are."""
    base = folders.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{program.stem}-{case}"
    with FileLock(f"{folder}.lock"):
        told = Path(f"{folder}.json")
        if not told.exists():
            told.write_text(json.dumps(run_alone(program, case, folder)))
        result: dict[str, Any] = json.loads(told.read_text())
        return result


class Machines:
    """A head and two machines that work, all on this one; call it from the main thread, as Ray wants it."""

    def __init__(self, cluster: Any, n_cpus: int) -> None:
        self._cluster, self._n_cpus = cluster, n_cpus
        self.nodes = [self.add() for _ in range(2)]

    @property
    def address(self) -> str:
        """HOST:PORT."""
        address: str = self._cluster.address
        return address

    def add(self) -> Any:
        """One more machine."""
        return self._cluster.add_node(
            num_cpus=self._n_cpus, object_store_memory=OBJECT_STORE, include_dashboard=False, wait=True
        )

    def kill(self, node: Any) -> None:
        """End all processes of a machine by kill -9, as a power cut would."""
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *list_children(raylet)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def three_nodes(*, n_cpus: int = 2) -> Iterator[Machines]:
    """A cluster while the block lasts: a head on which nothing runs, and two machines."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import_ray()
    from ray.cluster_utils import Cluster as LocalCluster

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    cluster = LocalCluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
    try:
        yield Machines(cluster, n_cpus)
    finally:
        cluster.shutdown()


def list_children(pid: int) -> list[int]:
    """The processes that a process started and that are still its children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# What is done: an order is [number, what goes wrong]; an answer is kept as a file before it is given.


def prepare(order: Sequence[Any]) -> dict[str, Any]:
    number, wrong = order
    if wrong == "prepare dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if wrong == "prepare raises":
        raise ValueError("no such\ncolour")
    return {"number": number, "wrong": wrong, "pixels": np.full((16, 64, 64, 3), number, np.uint8)}


class MakeWorker:
    """What makes workers that keep parts in a folder."""

    def __init__(self, folder: Path, *, seconds: float = 0.0) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        with (self.folder / "workers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return self.work

    def work(self, prepared: dict[str, Any]) -> dict[str, Any]:
        number = prepared["number"]
        if prepared["wrong"] == "work dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        temporary = self.folder / f"temporary-{os.getpid()}-{number}"
        temporary.write_text(str(int(prepared["pixels"].sum())))
        temporary.replace(self.folder / f"part-{number}")
        return {"number": number, "pid": os.getpid()}


def die() -> Callable[[dict[str, Any]], dict[str, Any]]:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def carry_out(
    folder: Path, orders: Sequence[Sequence[Any]], meanwhile: Callable[[int], None] = lambda _: None, **options: Any
) -> dict[str, Any]:
    """Spread orders over the cluster; `meanwhile` is told how many answers there are."""
    folder.mkdir(parents=True)
    make_worker = options.pop("make_worker", MakeWorker(folder, seconds=options.pop("seconds", 0.0)))
    answers: list[dict[str, Any]] = []
    result: dict[str, Any] = {"error": None, "kind": None, "crashed": {}, "trace": ""}
    start = time.perf_counter()
    try:
        for answer in spread(orders, prepare=prepare, make_worker=make_worker, **options):
            answers.append(answer)
            meanwhile(len(answers))
    except FeatcacheError as error:
        result |= {"error": str(error), "kind": type(error).__name__, "trace": str(error.__cause__)}
        if isinstance(error, CrashedItemsError):
            result["crashed"] = {orders[i][0]: stage for i, stage in error.crashed.items()}
    made = folder / "workers"
    return result | {
        "seconds": time.perf_counter() - start,
        "answers": sorted(answer["number"] for answer in answers),
        "pids": len({answer["pid"] for answer in answers}),
        "workers": len(made.read_text().split()) if made.exists() else 0,
        "parts": {path.name: int(path.read_text()) for path in sorted(folder.glob("part-*"))},
    }


def number_orders(n: int, wrong: dict[int, str] | None = None) -> list[list[Any]]:
    return [[i, (wrong or {}).get(i)] for i in range(n)]


def run_wrongs(folder: Path) -> dict[str, Any]:
    """One cluster, and everything that can go wrong in an item, one after the other."""
    with three_nodes() as machines, join_cluster(machines.address) as cluster:
        orders = {
            "nothing": number_orders(24),
            "prepare dies": number_orders(12, {5: "prepare dies"}),
            "work dies": number_orders(12, {5: "work dies"}),
            "prepare raises": number_orders(12, {5: "prepare raises"}),
        }
        results = {name: carry_out(folder / name, these) for name, these in orders.items()}
        results["worker dies"] = carry_out(folder / "worker dies", number_orders(3), make_worker=die)
        results["no gpu"] = carry_out(folder / "no gpu", number_orders(3), gpu=True)
        featcache.__version__ = "0.0.1"  # of this process alone
        results["other version"] = carry_out(folder / "other version", number_orders(3))
        return {"cluster": str(cluster), **results}


def lose_machine(folder: Path) -> dict[str, Any]:
    """A machine is killed while it works, another comes."""
    with three_nodes() as machines:
        moments: dict[str, float] = {}

        def interfere(n_answers: int) -> None:
            moments[str(n_answers)] = time.perf_counter()
            if n_answers == 10:
                machines.kill(machines.nodes[0])
            if n_answers == 14:
                machines.add()

        result = carry_out(folder / "parts", number_orders(40), interfere, seconds=0.2, address=machines.address)
        times = list(moments.values())
        return result | {"longest pause": max(b - a for a, b in itertools.pairwise(times))}


def start_here(folder: Path) -> dict[str, Any]:
    """Clusters that are started for one call and end with it: by Ctrl-C, and by the death of Ray's driver."""
    told: dict[str, float] = {}

    def interrupt(n_answers: int) -> None:
        if n_answers == 3:
            told["interrupted"] = time.perf_counter()
            os.kill(os.getpid(), signal.SIGINT)

    def kill_driver(n_answers: int) -> None:
        if n_answers == 3:
            (driver,) = list_children(os.getpid())
            os.kill(driver, signal.SIGKILL)

    with contextlib.suppress(KeyboardInterrupt):
        carry_out(folder / "interrupted", number_orders(100), interrupt, seconds=0.2)
        raise AssertionError
    stopped = time.perf_counter() - told["interrupted"]
    left = list_clusters()
    killed = carry_out(folder / "killed", number_orders(100), kill_driver, seconds=0.2)
    return {"stopped": stopped, "left": left, "killed": killed, "left then": list_clusters(patience_seconds=10)}


def list_clusters(patience_seconds: float = 0.0) -> list[str]:
    """What runs of Ray in this network of our own, once that has had time to end."""
    deadline = time.perf_counter() + patience_seconds
    while (
        left := [name for name in map(read_name, list_neighbours()) if "raylet" in name or "gcs_server" in name]
    ) and (time.perf_counter() < deadline):
        time.sleep(0.2)
    return left


def list_neighbours() -> list[Path]:
    """Processes in the network of this one."""
    network = Path("/proc/self/ns/net").readlink()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/net").readlink() == network:
                found.append(process)
    return found


def read_name(process: Path) -> str:
    """Its program; nothing where it has just ended."""
    try:
        return (process / "cmdline").read_text().split("\0")[0]
    except OSError:
        return ""


CASES = {"wrongs": run_wrongs, "lose": lose_machine, "here": start_here}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[2]))))
