"""Work spread over a cluster is done once whatever dies, and what cannot be done is named.

The experiments are in ray_nursery.py and can be run by hand.
"""

from __future__ import annotations

import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray_nursery

from featcache.cluster import Cluster, check_cluster, check_reachable, import_ray
from featcache.errors import ClusterError, CrashedItemsError, DeviceError, MissingExtraError

Tell = Callable[[str], None]
PROGRAM = Path(ray_nursery.__file__)


def parts(numbers: list[int]) -> dict[str, int]:
    """What is kept of them."""
    return {f"part-{number}": number * 16 * 64 * 64 * 3 for number in numbers}


@pytest.fixture(scope="module")
def wrongs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ray_nursery.run_once(tmp_path_factory, PROGRAM, "wrongs")


def test_every_item_is_answered_once_by_workers_that_are_set_up_once(wrongs: dict[str, Any]) -> None:
    result, numbers = wrongs["nothing"], list(range(24))
    assert wrongs["cluster"] == "3 machines, 4 CPUs"
    assert result["error"] is None
    assert result["answers"] == numbers
    assert result["parts"] == parts(numbers)
    assert result["workers"] <= 3  # of four CPUs one or more prepare


@pytest.mark.parametrize("stage", ["prepare", "work"])
def test_an_item_that_kills_its_process_is_named_and_all_others_are_done(wrongs: dict[str, Any], stage: str) -> None:
    result, others = wrongs[f"{stage} dies"], [i for i in range(12) if i != 5]
    assert result["kind"] == "CrashedItemsError"
    assert result["crashed"] == {"5": stage}
    assert result["answers"] == others
    assert result["parts"] == parts(others)


def test_an_exception_arrives_in_one_line_with_its_class_and_where_it_was_raised(wrongs: dict[str, Any]) -> None:
    result = wrongs["prepare raises"]
    assert result["kind"] == "ClusterError"
    assert result["error"] == "on the Ray cluster: ValueError: no such colour"
    assert "ray_nursery.py" in result["trace"]
    assert 5 not in result["answers"]


def test_a_worker_that_dies_while_it_is_set_up_ends_the_work(wrongs: dict[str, Any]) -> None:
    assert wrongs["worker dies"]["error"] == "a worker's process on the Ray cluster died 3 times while it was set up"
    assert wrongs["worker dies"]["answers"] == []


def test_gpus_are_asked_for_where_there_are_none(wrongs: dict[str, Any]) -> None:
    assert wrongs["no gpu"]["kind"] == "DeviceError"
    assert "no GPU (3 machines, 4 CPUs)" in wrongs["no gpu"]["error"]


def test_another_version_on_a_machine_is_refused(wrongs: dict[str, Any]) -> None:
    assert "this one 0.0.1; pip install featcache==0.0.1 on every machine" in wrongs["other version"]["error"]
    assert wrongs["other version"]["parts"] == {}


def test_a_machine_killed_in_the_middle_and_one_added_leave_every_item_done_once(
    tmp_path: Path, tell: Tell, long: bool
) -> None:
    if not long:
        pytest.skip("half a minute: scripts/faults runs it, and test_spread.py loses a machine of a real extraction")
    result, numbers = ray_nursery.run_alone(PROGRAM, "lose", tmp_path / "lose"), list(range(40))
    tell(f"a machine of two killed: {result['seconds']:.0f} s, the longest pause {result['longest pause']:.0f} s")
    assert result["error"] is None
    assert result["answers"] == numbers
    assert result["parts"] == parts(numbers)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ray_nursery.run_once(tmp_path_factory, PROGRAM, "here")


def test_ctrl_c_ends_the_work_and_the_cluster_that_was_started_for_it(here: dict[str, Any], tell: Tell) -> None:
    tell(f"Ctrl-C on a Ray cluster of one's own: over after {here['stopped']:.1f} s")
    assert here["left"] == []


def test_the_death_of_rays_driver_is_an_error_and_leaves_nothing_running(here: dict[str, Any]) -> None:
    assert here["killed"]["kind"] == "ClusterError"
    assert "Ray's driver process ended by itself: exit code -9" in here["killed"]["error"]
    assert here["killed"]["answers"]
    assert here["left then"] == []


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_reachable(f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=rf"no Ray cluster at 127.0.0.1:{port}: .*refused; expected auto"):
        check_reachable(f"127.0.0.1:{port}")


def test_rays_client_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ClusterError, match=r"ray://head:10001 is for Ray's client.* --address auto"):
        check_reachable("ray://head:10001")


@pytest.mark.parametrize("address", ["nonsense", "host:", "127.0.0.1:99999999", ":"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(ClusterError, match="expected auto, HOST:PORT"):
        check_reachable(address)


def test_a_cluster_needs_a_cpu_for_tasks_and_one_for_workers_without_gpu() -> None:
    one = Cluster(nodes=1, cpus=1, gpus=1)
    check_cluster(one, gpu=True)
    with pytest.raises(ClusterError, match=r"too few CPUs \(1 machine, 1 CPUs, 1 GPUs\): expected 2 or more"):
        check_cluster(one, gpu=False)
    with pytest.raises(DeviceError, match="no GPU"):
        check_cluster(Cluster(nodes=2, cpus=8, gpus=0), gpu=True)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[ray\]'"):
        import_ray()


def test_crashed_items_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(CrashedItemsError({3: "prepare", 7: "work"})))
    assert error.crashed == {3: "prepare", 7: "work"}
    assert str(error) == "2 items of work killed the process each time on the Ray cluster, in: prepare and work"
