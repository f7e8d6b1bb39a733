"""What work costs: laps of clocks, children that live and children that ended, joules with counters that go round."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from featcache import metering
from featcache.metering import (
    Meter,
    PeakMemory,
    Spent,
    add_up,
    count_flops,
    find_energy,
    list_energy_sources,
    list_packages,
    read_cpu_seconds,
    read_living_children,
    tabulate_costs,
)

BUSY = "import time\nwhile time.process_time() < {}: pass\nprint('done', flush=True)\nimport sys; sys.stdin.read()"
GRANDCHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY.format(0.3)!r}])"
TICK = 1 / os.sysconf("SC_CLK_TCK")


def work(seconds: float) -> None:
    """Keep a core busy for so many CPU seconds."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def start(code: str) -> subprocess.Popen[bytes]:
    """A child that has said that it is done, and lives until its stdin is closed."""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"done\n"
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    """Let a child end, and wait for it."""
    child.communicate()


# --- CPU seconds ------------------------------------------------------------------------------------------------------


def test_the_work_of_this_process_is_counted_and_its_sleep_is_not() -> None:
    meter = Meter()
    work(0.1)
    time.sleep(0.2)
    spent = meter.read()
    assert spent.cpu_seconds == pytest.approx(0.1, abs=0.05)
    assert spent.seconds >= 0.3
    assert meter.seconds >= spent.seconds


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not list living children")
def test_a_busy_child_counts_while_it_lives_and_as_much_when_it_has_ended() -> None:
    meter, others = Meter(), read_living_children()  # of an earlier test, say
    child = start(BUSY.format(0.3))
    alive = meter.read().cpu_seconds
    assert read_living_children() >= others + 0.3 - TICK
    end(child)
    ended = meter.read().cpu_seconds
    assert read_living_children() <= others + 2 * TICK
    assert alive is not None
    assert ended is not None
    assert alive >= 0.3 - TICK
    assert alive - 2 * TICK <= ended <= alive + 0.2  # nothing is lost or counted twice


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not list living children")
def test_children_of_children_count_too() -> None:
    meter = Meter()
    child = start(GRANDCHILD)
    spent = meter.read().cpu_seconds
    end(child)
    assert spent is not None
    assert spent >= 0.3 - 2 * TICK
    assert meter.read().cpu_seconds == pytest.approx(spent, abs=0.2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not list living children")
def test_a_child_that_was_there_before_is_charged_only_for_what_it_does_now() -> None:
    child = start(BUSY.format(0.3))
    meter = Meter()
    assert meter.read().cpu_seconds == pytest.approx(0, abs=0.05)
    end(child)
    assert meter.read().cpu_seconds == pytest.approx(0, abs=0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not list living children")
def test_a_child_that_was_killed_and_not_waited_for_still_counts() -> None:
    meter = Meter()
    child = start(BUSY.format(0.2))
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (meter.read().cpu_seconds or 0) >= 0.2 - TICK
    end(child)
    assert (meter.read().cpu_seconds or 0) >= 0.2 - TICK


def test_where_the_system_lists_no_children_they_count_when_they_have_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metering, "PROC", str(tmp_path / "none"))
    monkeypatch.delattr(os, "waitid", raising=False)  # as on Windows
    meter = Meter()
    child = start(BUSY.format(0.3))
    assert (meter.read().cpu_seconds or 0) < 0.1
    end(child)
    assert (meter.read().cpu_seconds or 0) >= 0.3 - TICK


def test_a_child_that_ends_while_it_is_looked_for_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, living = [0.0], [5.0]

    def look() -> float:
        found, living[0] = living[0], 0.0
        ended[0] = 5.0
        return found

    monkeypatch.setattr(metering, "read_ended_children", lambda: ended[0])
    monkeypatch.setattr(metering, "read_living_children", look)
    assert read_cpu_seconds() - time.process_time() == pytest.approx(5, abs=0.1)


# --- meters -----------------------------------------------------------------------------------------------------------


def test_meters_inside_one_another_do_not_disturb_each_other(joules: Callable[[int], None]) -> None:
    joules(0)
    outer = Meter()
    joules(10)
    inner = Meter()
    work(0.05)
    joules(30)
    lap = inner.read()
    second = Meter()
    joules(35)
    work(0.05)
    whole = outer.read()
    assert (lap.energy_joules, second.read().energy_joules, whole.energy_joules) == (20, 5, 35)
    assert (lap.cpu_seconds or 0) + (second.read().cpu_seconds or 0) <= (outer.read().cpu_seconds or 0)
    assert lap.cpu_seconds == pytest.approx(0.05, abs=0.03)
    assert whole.cpu_seconds == pytest.approx(0.1, abs=0.05)
    assert lap.seconds < whole.seconds


def test_an_unknown_cost_is_never_nothing() -> None:
    known, old = Spent(seconds=2, cpu_seconds=3, energy_joules=40), Spent.from_json({"seconds": 1})
    assert old == Spent(seconds=1, cpu_seconds=None, energy_joules=None)
    assert add_up([known, old]) == Spent(seconds=3, cpu_seconds=None, energy_joules=None)
    assert known - Spent(seconds=1, cpu_seconds=1, energy_joules=None) == Spent(
        seconds=1, cpu_seconds=2, energy_joules=None
    )
    assert known / 2 == Spent(seconds=1, cpu_seconds=1.5, energy_joules=20)
    assert old / 2 == Spent(seconds=0.5, cpu_seconds=None, energy_joules=None)
    assert Spent.from_json(known.to_json()) == known


def test_cpu_seconds_are_those_of_all_stages_or_of_none() -> None:
    old, new = Spent.from_json({"seconds": 1}), Spent(seconds=2, cpu_seconds=3, energy_joules=4)
    assert tabulate_costs({"extraction": old, "training": new}, {"draws": new}) == {
        "seconds": {"extraction": 1, "training": 2, "total": 3, "draws": 2},
        "cpu_seconds": {},
        "energy_joules": None,
    }
    assert tabulate_costs({"selection": new, "training": new}, {"draws": new}) == {
        "seconds": {"selection": 2, "training": 2, "total": 4, "draws": 2},
        "cpu_seconds": {"selection": 3, "training": 3, "total": 6, "draws": 3},
        "energy_joules": 8,
    }


def test_a_lap_costs_microseconds() -> None:
    meter, n = Meter(), 200
    started = time.process_time()
    for _ in range(n):
        meter.read()
    assert (time.process_time() - started) / n < 1e-3  # 10 us where it was written


# --- joules -----------------------------------------------------------------------------------------------------------


def make_zone(powercap: Path, folder: str, name: str, joules: float = 0, most: float = 1000) -> Path:
    """A zone as powercap shows it."""
    zone = powercap / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text(f"{round(most * 1e6)}\n")
    return zone


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the machine's, and no GPU."""
    folder = tmp_path / "powercap"
    folder.mkdir()
    monkeypatch.setattr(metering, "POWERCAP", folder)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    find_energy.cache_clear()
    yield folder
    find_energy.cache_clear()


@pytest.fixture
def joules(powercap: Path) -> Callable[[int], None]:
    """Set the counter of one package."""
    zone = make_zone(powercap, "intel-rapl:0", "package-0")
    return lambda value: [(zone / "energy_uj").write_text(f"{value * 1_000_000}\n"), None][1]


def test_packages_count_once_and_what_is_within_or_around_them_does_not(powercap: Path) -> None:
    make_zone(powercap, "intel-rapl-mmio:0", "package-0", 7)
    zones = [make_zone(powercap, f"intel-rapl:{i}", f"package-{i}", 5) for i in (0, 1)]
    core = make_zone(powercap, "intel-rapl:0:0", "core", 5)
    platform = make_zone(powercap, "intel-rapl:2", "psys", 5)
    assert list_energy_sources() == ["package-0", "package-1"]
    meter = Meter()
    for zone in (powercap / "intel-rapl-mmio:0", *zones, core, platform):
        (zone / "energy_uj").write_text("9000000")
    assert meter.read().energy_joules == 4 + 4


def test_a_counter_that_goes_round_is_followed(joules: Callable[[int], None]) -> None:
    joules(990)
    meter = Meter()
    joules(15)
    assert meter.read().energy_joules == pytest.approx(25)
    joules(995)
    joules_before = meter.read().energy_joules
    joules(5)
    assert joules_before == pytest.approx(1005)
    assert meter.read().energy_joules == pytest.approx(1015)


def test_a_counter_that_may_have_gone_round_twice_is_not_guessed(
    joules: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("featcache.metering.time.monotonic", lambda: now[0])
    joules(0)
    before = Meter()
    joules(500)
    now[0] = 1.5  # 1000 J go by in a second at most
    assert before.read().energy_joules is None
    after = Meter()
    joules(600)
    now[0] = 2.0
    assert after.read().energy_joules == 100
    assert before.read().energy_joules is None


def test_joules_that_nobody_may_read_are_none(powercap: Path, joules: Callable[[int], None]) -> None:
    meter = Meter()
    joules(3)
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read().energy_joules is None
    assert list_packages(powercap) == []
    zone = make_zone(powercap, "intel-rapl:1", "package-1")
    (zone / "energy_uj").write_text("")  # as what cannot be read
    assert list_packages(powercap) == []


def test_one_package_of_two_is_not_the_energy(powercap: Path) -> None:
    make_zone(powercap, "intel-rapl:0", "package-0", 5)
    (make_zone(powercap, "intel-rapl:1", "package-1", 5) / "energy_uj").write_text("no number")
    meter = Meter()
    assert meter.read() == Spent(
        seconds=pytest.approx(0, abs=1), cpu_seconds=pytest.approx(0, abs=1), energy_joules=None
    )
    assert list_energy_sources() == []


def test_without_a_counter_joules_are_none_and_not_zero(powercap: Path) -> None:
    assert Meter().read().energy_joules is None


def test_gpus_count_by_nvml(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules, broken = [1000.0, 2000.0], [False]

    def read(handle: int) -> float:
        if broken[0]:
            raise OSError
        return millijoules[handle]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=read,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    make_zone(powercap, "intel-rapl:0", "package-0", 5)
    meter = Meter()
    assert list_energy_sources() == ["package-0", "gpu-0", "gpu-1"]
    millijoules[:] = [4000.0, 2500.0]
    assert meter.read().energy_joules == 3.5
    broken[0] = True
    assert meter.read().energy_joules is None
    find_energy.cache_clear()
    assert list_energy_sources() == ["package-0"]  # no driver answers


# --- memory and operations --------------------------------------------------------------------------------------------


def test_the_peak_of_memory_is_that_since_it_was_asked_for() -> None:
    memory = PeakMemory()
    if not memory.known:
        assert memory.read() is None
        return
    before = memory.read()
    with mmap.mmap(-1, 64 << 20) as block:  # fresh pages, where an array may get some that were freed before
        block.write(bytes(1 << 20) * 64)
    after = memory.read()
    assert before is not None
    assert after is not None
    assert after - before > 48 << 20


def test_a_backward_pass_is_two_forward_ones_and_a_multiply_add_two_operations() -> None:
    assert count_flops(100, forward=3) == 600
    assert count_flops(100, forward=3, backward=3) == 1800
    assert count_flops(None, forward=3) is None
    assert count_flops(0, forward=3) == 0
