"""What work costs: wall seconds, CPU seconds, joules, peak memory, floating-point operations.

The one place that reads the counters of the machine. Knows no network and no files of featcache's.

CPU seconds are those of this process, of its children that have ended, and of those that live: decoders, loaders'
workers, their helpers. On Linux the living ones are found in /proc; elsewhere they count when they have ended.

Joules are those of the whole machine, whoever else computes on it: the processor packages where Linux lets this user
read them (RAPL; mostly root alone), and the NVIDIA GPUs where `pynvml` is installed. What nobody measured is None.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PROC = "/proc"
POWERCAP = Path("/sys/class/powercap")
MAX_WATTS = 1000.0  # of one package: what may have been used since a counter was last read
ATTEMPTS = 5  # to read the times of children while none ends


# --- what was spent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What some work cost. Sums and differences are unknown where a part is: an unknown cost is never 0.

    Attributes
    ----------
    seconds
        Wall time.
    cpu_seconds
        Of all cores, user and system; None where it is not known.
    energy_joules
        Of the machine; None where it does not say.

    Examples
    --------
    >>> Spent(seconds=2.0, cpu_seconds=3.0) + Spent(seconds=1.0, cpu_seconds=None)
    Spent(seconds=3.0, cpu_seconds=None, energy_joules=0.0)
    """

    seconds: float = 0.0
    cpu_seconds: float | None = 0.0
    energy_joules: float | None = 0.0

    def __add__(self, other: Spent) -> Spent:
        return self._combine(other, 1)

    def __sub__(self, other: Spent) -> Spent:
        return self._combine(other, -1)

    def _combine(self, other: Spent, sign: int) -> Spent:
        def combine(one: float | None, more: float | None) -> float | None:
            return None if one is None or more is None else one + sign * more

        return Spent(
            seconds=self.seconds + sign * other.seconds,
            cpu_seconds=combine(self.cpu_seconds, other.cpu_seconds),
            energy_joules=combine(self.energy_joules, other.energy_joules),
        )

    def __truediv__(self, n: int) -> Spent:
        def divide(one: float | None) -> float | None:
            return None if one is None else one / n

        joules = divide(self.energy_joules)
        return Spent(seconds=self.seconds / n, cpu_seconds=divide(self.cpu_seconds), energy_joules=joules)

    def to_json(self) -> dict[str, float | None]:
        """As plain values."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "energy_joules": self.energy_joules}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | float) -> Spent:
        """From plain values; what was written before CPU seconds and joules were counted lacks them.

        >>> Spent.from_json({"seconds": 2.5, "device": "cpu"}), Spent.from_json(2.5).cpu_seconds
        (Spent(seconds=2.5, cpu_seconds=None, energy_joules=None), None)
        """
        if not isinstance(value, Mapping):
            value = {"seconds": value}
        known = {name: value.get(name) for name in ("cpu_seconds", "energy_joules")}
        more = {name: None if one is None else float(one) for name, one in known.items()}
        return cls(seconds=float(value["seconds"]), **more)


NOTHING_SPENT = Spent()


def add_up(costs: Iterable[Spent]) -> Spent:
    """The sum of some costs."""
    return sum(costs, Spent())


def tabulate_costs(stages: Mapping[str, Spent], beside: Mapping[str, Spent] | None = None) -> dict[str, Any]:
    """Costs by stage as a run's record holds them: `seconds`, `cpu_seconds` and `energy_joules`.

    Parameters
    ----------
    stages
        What makes up the total, by name.
    beside
        What is told beside it and not a part of it.

    Returns
    -------
    `seconds` and `cpu_seconds` by stage with a "total", and the joules of all stages together. CPU seconds are there of
    all stages, or, where nobody knows those of one, of none: who adds them up must not take it for nothing.
    """
    total = add_up(stages.values())
    named = {**stages, "total": total, **(beside or {})}
    cpu = {name: one.cpu_seconds for name, one in named.items() if one.cpu_seconds is not None}
    return {
        "seconds": {name: one.seconds for name, one in named.items()},
        "cpu_seconds": cpu if len(cpu) == len(named) else {},
        "energy_joules": total.energy_joules,
    }


class Meter:
    """Runs from when it is made. Any number of them run at a time, one inside the other or not.

    Examples
    --------
    >>> meter = Meter()
    >>> first = meter.read()
    >>> lap = meter.read() - first
    >>> 0 <= lap.seconds <= meter.seconds
    True
    """

    def __init__(self) -> None:
        self._began = read_counters()

    @property
    def seconds(self) -> float:
        """Wall time since it was made, and nothing else: cheap enough for every step."""
        return time.perf_counter() - self._began.seconds

    def read(self) -> Spent:
        """What was spent since it was made."""
        began, now = self._began, read_counters()
        known = began.joules is not None and now.joules is not None and began.gaps == now.gaps
        return Spent(
            seconds=now.seconds - began.seconds,
            cpu_seconds=max(now.cpu_seconds - began.cpu_seconds, 0.0),  # nobody counts a child that nobody waited for
            energy_joules=now.joules - began.joules if known else None,  # type: ignore[operator]  # both are known
        )


class Counters(NamedTuple):
    """What the machine's counters say at a moment; only differences mean anything."""

    seconds: float
    cpu_seconds: float
    joules: float | None
    gaps: int


def read_counters() -> Counters:
    """Look at all of them."""
    return Counters(time.perf_counter(), read_cpu_seconds(), *find_energy(POWERCAP).read())


# --- CPU seconds ------------------------------------------------------------------------------------------------------


def read_cpu_seconds() -> float:
    """CPU seconds of this process and of all its children, those that live and those that were waited for."""
    for _ in range(ATTEMPTS):  # a child that ends in between would be counted twice, or not at all
        ended = read_ended_children()
        living = read_living_children()
        if read_ended_children() == ended:
            break
    return time.process_time() + ended + living


def read_ended_children() -> float:
    """CPU seconds of the children that were waited for, with theirs."""
    times = os.times()
    return times.children_user + times.children_system


def read_living_children() -> float:
    """CPU seconds of the children that live, with theirs; 0 where the system does not list them.

    Source: proc_pid_stat(5), fields 14 to 17; proc_tid_children(5).
    """
    if not has_children():
        return 0.0
    ticks, processes = 0, list_children("self")
    while processes:
        process = processes.pop()
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            with open(f"{PROC}/{process}/stat", "rb") as file:  # noqa: PTH123 - a third of the time of a Path
                fields = file.read().rpartition(b")")[2].split()
            ticks += sum(map(int, fields[11:15]))
            processes += list_children(process)
    return ticks / os.sysconf("SC_CLK_TCK")


def has_children() -> bool:
    """Whether there may be children, asked in a microsecond; True where the system has no such question."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # leaves those that have ended to be waited for
    except ChildProcessError:
        return False
    return True


def list_children(process: str) -> list[str]:
    """Numbers of a process's living children; none where the system does not list them."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"{PROC}/{process}/task"):  # noqa: PTH208 - as above
            with (
                contextlib.suppress(OSError),  # the thread has just ended
                open(f"{PROC}/{process}/task/{thread}/children", encoding="ascii") as file,  # noqa: PTH123 - as above
            ):
                found += file.read().split()
    return found


# --- joules -----------------------------------------------------------------------------------------------------------


class EnergySource(Protocol):
    """One counter of joules."""

    name: str

    def advance(self) -> float | None:
        """Joules since the last call; None where they cannot be told."""


class Package:
    """A processor package as Linux's powercap shows it.

    Source: https://docs.kernel.org/power/powercap/powercap.html.

    Parameters
    ----------
    folder
        With `name`, `energy_uj`, which goes back to 0 after `max_energy_range_uj`.

    Raises
    ------
    OSError, ValueError
        If they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.name = read_line(folder / "name")
        self._path = folder / "energy_uj"
        self._range = int(read_line(folder / "max_energy_range_uj")) / 1e6
        self._last, self._when = int(read_line(self._path)) / 1e6, time.monotonic()

    def advance(self) -> float | None:
        """Joules since the last call; None where the counter may have gone round more than once, or cannot be read."""
        before, since = self._last, self._when
        try:
            self._last, self._when = int(read_line(self._path)) / 1e6, time.monotonic()
        except (OSError, ValueError):
            return None
        if (self._when - since) * MAX_WATTS > self._range:
            return None
        return self._last - before if self._last >= before else self._last - before + self._range


class Gpu:
    """An NVIDIA GPU of Volta's time or later, by NVML.

    Source: https://docs.nvidia.com/deploy/nvml-api, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver
    was loaded.
    """

    def __init__(self, nvml: Any, number: int) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(number)
        self.name = f"gpu-{number}"
        self._last = self._read()

    def _read(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def advance(self) -> float | None:
        """Joules since the last call; None where they cannot be read."""
        before = self._last
        try:
            self._last = self._read()
        except self._nvml.NVMLError:
            return None
        return self._last - before if self._last >= before else None


class Energy:
    """All counters of joules together; whoever reads it moves it on for all.

    Attributes
    ----------
    sources
        What is counted.
    """

    def __init__(self, sources: Iterable[EnergySource]) -> None:
        self.sources = list(sources)
        self._joules, self._gaps, self._lock = 0.0, 0, threading.Lock()

    def read(self) -> tuple[float | None, int]:
        """Joules since some moment, and how often some were missed; None where nothing is counted."""
        if not self.sources:
            return None, 0
        with self._lock:
            steps = [source.advance() for source in self.sources]
            self._joules += sum(step for step in steps if step is not None)
            self._gaps += None in steps
            return self._joules, self._gaps


@lru_cache
def find_energy(powercap: Path) -> Energy:
    """What counts joules on this machine; the same object each time.

    Parameters
    ----------
    powercap
        The folder of Linux's powercap.
    """
    return Energy([*list_packages(powercap), *list_gpus()])


def list_energy_sources() -> list[str]:
    """Names of what counts joules on this machine, such as "package-0" and "gpu-0"."""
    return [source.name for source in find_energy(POWERCAP).sources]


def list_packages(powercap: Path) -> list[Package]:
    """The processor packages, each once; none where one of them cannot be read: half of the joules would mislead.

    What is within a package, and the platform around it, are zones too and not counted; some packages are there twice,
    the second time by "mmio".
    """
    packages: dict[str, Package] = {}
    try:
        for path in sorted(powercap.glob("*/energy_uj"), key=lambda path: ("mmio" in path.parent.name, path)):
            if read_line(path.parent / "name").startswith("package-"):
                package = Package(path.parent)
                packages.setdefault(package.name, package)
    except (OSError, ValueError):
        return []
    return list(packages.values())


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs; none without `pynvml` (of nvidia-ml-py), without a driver, or where one does not say."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        return [Gpu(nvml, number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []


def read_line(path: Path) -> str:
    """The text of a file of one line."""
    return path.read_text(encoding="ascii").strip()


# --- memory and operations --------------------------------------------------------------------------------------------


class PeakMemory:
    """Highest resident memory of this process since this object was made.

    Linux can reset its high-water mark (/proc/self/clear_refs, see proc(5)); elsewhere `read` gives None.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.known = True
        except OSError:
            self.known = False

    def read(self) -> int | None:
        """Bytes, or None where the system does not say."""
        if not self.known:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def count_flops(multiply_adds: int | None, *, forward: int, backward: int = 0) -> float | None:
    """Floating-point operations of a network's passes: a multiply-add is two, a backward pass is two forward ones.

    Parameters
    ----------
    multiply_adds
        Of one image's forward pass; None where nobody knows.
    forward, backward
        Images that went through it each way.

    References
    ----------
    Kaplan et al., Scaling Laws for Neural Language Models, 2020, section 2.1, https://arxiv.org/abs/2001.08361

    Examples
    --------
    >>> count_flops(1_000_000, forward=10, backward=5)
    40000000.0
    """
    return None if multiply_adds is None else 2.0 * multiply_adds * (forward + 2 * backward)
