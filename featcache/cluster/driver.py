"""The process that is Ray's driver: it joins the cluster, has jobs carried out and passes on what comes of them.

A process of its own, because Ray's compiled half ends the driver's where the head of the cluster is lost, or where work
is called off in an unlucky moment (Check failed: Tried to complete task that was not pending); and because what Ray
prints must not mix with what featcache prints. `python -c "from featcache.cluster.driver import main; main(ADDRESS,
FD)"` reads jobs from stdin until that ends, and writes messages to the file descriptor.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from featcache.cluster.messages import Cluster, Finished, Job, describe_error, import_ray
from featcache.cluster.working import Ledger, Worker, prepare_row
from featcache.errors import ClusterError
from featcache.extras import import_extra

# Items of one Ray data set: each costs the driver a millisecond before the first starts, each end a new set of workers.
ROUND = 1 << 15
# Memory that a worker keeps for itself; also what makes it differ from a task, or Ray would run both in one process.
WORKER_MEMORY = 256 << 20
OBJECT_STORE = 2 << 30  # bytes, at most, of a cluster started here; Ray spills to disk what exceeds it
SETUP_DEATHS = 16  # of workers one after the other: a machine may be lost while they are set up
LONGEST_WORDS = 300
STOP_SECONDS = 10.0  # for Ray to end its tasks when work is called off


def main(address: str | None, descriptor: int) -> None:
    """Carry out the jobs on stdin, one after the other, until it ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    with os.fdopen(descriptor, "wb", buffering=0) as out:
        try:
            threading.Thread(target=read_jobs, args=(jobs,), daemon=True).start()
            ray = connect(address)
            send(out, look_at(ray))
            while True:
                run_job(ray, jobs.get(), out)
        except KeyboardInterrupt:
            pass  # there is nobody left to be told
        except Exception as error:  # noqa: BLE001 - raised again by who started this process
            send(out, describe_error(error))
        finally:
            import_ray().shutdown()


def read_jobs(jobs: queue.SimpleQueue[Job]) -> None:
    """Take jobs from stdin; where it ends, whatever runs is called off."""
    try:
        while True:
            jobs.put(pickle.load(sys.stdin.buffer))  # noqa: S301 - from the process that started this one
    except EOFError:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(STOP_SECONDS)
        os._exit(1)


def send(out: BinaryIO, message: object) -> None:
    """Pass a message on; it waits where nobody reads."""
    pickle.dump(message, out)


def run_job(ray: Any, job: Job, out: BinaryIO) -> None:
    """Carry out a job and pass on each item's position and packed outcome."""
    for start in range(0, len(job.items), ROUND):
        for row in run_round(ray, job, start):
            send(out, (start + int(row["position"]), row["outcome"]))
    send(out, Finished())


def run_round(ray: Any, job: Job, start: int) -> Iterator[dict[str, Any]]:
    """The rows of the outcomes of some items, all of them."""
    n = len(job.items[start : start + ROUND])
    awaited = set(range(n))
    try:
        for row in plan_round(ray, job, start).iter_rows():
            awaited.discard(int(row["position"]))
            yield row
    except ray.exceptions.RayError as error:
        words = textwrap.shorten(describe_error(error).words, LONGEST_WORDS, placeholder=" ...")  # it can be a page
        raise ClusterError(f"the Ray cluster failed: {words}") from error
    if awaited:
        raise ClusterError(f"{len(awaited)} of {n} items came back from the Ray cluster without an answer")


def plan_round(ray: Any, job: Job, start: int) -> Any:
    """The Ray data set whose rows are outcomes; nothing has begun."""
    data = import_extra("ray.data", extra="ray", what="--engine ray needs")
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = SETUP_DEATHS
    ledger = start_ledger(ray)
    items = job.items[start : start + ROUND]
    orders = [{"position": i, "item": ray.cloudpickle.dumps(item)} for i, item in enumerate(items)]
    return (
        data.from_items(orders, override_num_blocks=len(orders))
        .map(prepare_row, fn_args=(job.prepare, ledger, job.version), num_cpus=1)
        .map(
            Worker,
            fn_constructor_args=(job.make_worker, ledger, job.version),
            num_cpus=0 if job.gpu else 1,
            num_gpus=1 if job.gpu else 0,
            memory=WORKER_MEMORY,
            compute=data.ActorPoolStrategy(min_size=1),  # grows with the cluster, without end
        )
    )


def start_ledger(ray: Any) -> Any:
    """Who counts, on this machine: if it is lost all is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Ledger).options(**options).remote()


def connect(address: str | None) -> Any:
    """Ray, with this process as driver of a cluster; of its own if there is no address.

    Raises
    ------
    ClusterError
        If that cannot be.
    """
    ray = import_ray()
    own = {
        "num_cpus": max(2, os.cpu_count() or 1),  # one prepares, one carries out
        "object_store_memory": OBJECT_STORE,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else own),
        )
    except Exception as error:
        what = f"the Ray cluster at {address} cannot be joined" if address else "no Ray cluster can be started here"
        raise ClusterError(f"{what}: {describe_error(error).words}") from error
    return ray


def look_at(ray: Any) -> Cluster:
    """What a cluster has now."""
    has = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Cluster(nodes=nodes, cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0)))
