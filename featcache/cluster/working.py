"""What runs on the machines of a cluster: tasks that prepare, workers that carry out, and who counts their deaths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import featcache
from featcache.cluster.messages import (
    Crashed,
    Done,
    Failed,
    Outcome,
    Work,
    describe_error,
    import_ray,
    pack,
    unpack,
)
from featcache.errors import ClusterError

TRIES = 3  # of an item, or of setting up a worker, whose process dies each time
PREPARE, WORK, SET_UP = "prepare", "work", "set up"  # what a process was doing when it died


class Ledger:
    """How often something was begun and did not come to an end. A Ray actor, beside the driver."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int | str], int] = {}

    def begin(self, stage: str, what: int | str) -> int:
        """Which try this is, from 1."""
        self._open[stage, what] = self._open.get((stage, what), 0) + 1
        return self._open[stage, what]

    def end(self, stage: str, what: int | str) -> None:
        """Nothing died."""
        self._open.pop((stage, what), None)


def attempt(stage: str, what: int | str, ledger: Any, work: Callable[[], Any]) -> Outcome:
    """Do something that may kill this process, or raise; not if it has killed `TRIES` of them."""
    if import_ray().get(ledger.begin.remote(stage, what)) > TRIES:
        return Crashed(stage)
    try:
        outcome: Outcome = Done(work())
    except Exception as error:  # noqa: BLE001 - raised again where the work was asked for, whatever it is
        outcome = describe_error(error)
    ledger.end.remote(stage, what)
    return outcome


def prepare_row(row: Mapping[str, Any], prepare: Callable[[Any], Any], ledger: Any, version: str) -> dict[str, Any]:
    """An order -> what was prepared: what a task does."""
    position = int(row["position"])
    outcome = check_version(version) or attempt(PREPARE, position, ledger, lambda: prepare(unpack(row["item"])))
    return {"position": position, "prepared": pack(outcome)}


class Worker:
    """What was prepared -> an answer: what an actor does; an error of its making is the outcome of each item."""

    def __init__(self, make_worker: Callable[[], Work], ledger: Any, version: str) -> None:
        self._ledger = ledger
        me = import_ray().get_runtime_context().get_actor_id()  # the same when it is started again
        self._made = check_version(version) or attempt(SET_UP, me, ledger, make_worker)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What Ray Data calls with a row."""
        position = int(row["position"])
        return {"position": position, "outcome": pack(self._carry_out(position, row["prepared"]))}

    def _carry_out(self, position: int, packed: bytes) -> Outcome:
        made, prepared = self._made, unpack(packed)
        if not isinstance(made, Done):
            return made
        if not isinstance(prepared, Done):
            not_prepared: Outcome = prepared
            return not_prepared
        work: Work = made.value
        return attempt(WORK, position, self._ledger, lambda: work(prepared.value))


def check_version(version: str) -> Failed | None:
    """What is to be said if this machine has another featcache than the one that asks."""
    if version == featcache.__version__:
        return None
    words = f"a machine of the Ray cluster has featcache {featcache.__version__}, this one {version}"
    return Failed(ClusterError(f"{words}; pip install featcache=={version} on every machine"), "", "")
