"""Numbers -> places on an axis, in per cent of its length, and the ticks that people like to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from featcache.wording import format_share

DURATIONS = (  # seconds that have a short name
    (0.001, "1 ms"), (0.01, "10 ms"), (0.1, "0.1 s"), (1, "1 s"), (10, "10 s"), (60, "1 min"), (600, "10 min"),
    (3600, "1 h"), (6 * 3600, "6 h"), (24 * 3600, "1 day"), (7 * 24 * 3600, "1 week"),
)  # fmt: skip
FINER = (
    (0.002, "2 ms"), (0.005, "5 ms"), (0.02, "20 ms"), (0.05, "50 ms"), (0.2, "0.2 s"), (0.5, "0.5 s"), (2, "2 s"),
    (5, "5 s"), (20, "20 s"), (30, "30 s"), (120, "2 min"), (300, "5 min"), (1200, "20 min"), (1800, "30 min"),
    (7200, "2 h"), (10800, "3 h"), (12 * 3600, "12 h"), (2 * 24 * 3600, "2 days"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A stretch of numbers.

    Attributes
    ----------
    low, high
        Its ends.
    ticks
        (place in per cent, label).
    log
        Whether equal factors are equal distances.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    def place(self, value: float) -> float:
        """Where a number is, 0 to 100; one beyond the ends is at the end."""
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)


def make_axis(
    values: Iterable[float],
    label: Callable[[float, float], str],
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    span: float = 0.0,
    n_ticks: int = 5,
) -> Axis:
    """A linear axis around some numbers, its ends on ticks.

    Parameters
    ----------
    values
        At least one.
    label
        Tick and step -> its text.
    bounds
        What it never leaves.
    span
        Its least length.
    n_ticks
        About how many.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    missing = max(span, abs(high) * 1e-6, 1e-9) - (high - low)
    if missing > 0:
        low, high = low - missing / 2, high + missing / 2
    step = find_step((high - low) / (n_ticks - 1))
    low = max(math.floor(low / step + 1e-9) * step, bounds[0])
    high = min(math.ceil(high / step - 1e-9) * step, bounds[1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    axis = Axis(low=low, high=high)
    ticks = tuple((axis.place(i * step), label(i * step, step)) for i in range(first, last + 1))
    return Axis(low=low, high=high, ticks=ticks)


def find_step(at_least: float) -> float:
    """The least of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... that is so large.

    >>> find_step(0.03), find_step(7)
    (0.05, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(at_least))
    return float(f"{next(m for m in (1, 2, 5, 10) if m * power >= at_least * (1 - 1e-9)) * power:.12g}")


def make_duration_axis(seconds: Iterable[float]) -> Axis:
    """A logarithmic axis of time, at least a factor of ten long."""
    known = [max(one, 1e-3) for one in seconds] or [1.0]
    low, high = min(known) / 1.6, max(known) * 1.6
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return _label_log(low, high, DURATIONS, FINER)


def make_count_axis(counts: Iterable[float]) -> Axis:
    """A logarithmic axis of numbers of things."""
    known = [max(one, 1.0) for one in counts] or [1.0]
    tens = tuple((float(10**i), f"{10**i:,}") for i in range(9))
    finer = tuple((float(m * 10**i), f"{m * 10**i:,}") for i in range(9) for m in (2, 5))
    return _label_log(min(known) / 1.2, max(known) * 1.2, tens, finer)


def _label_log(
    low: float, high: float, names: tuple[tuple[float, str], ...], finer: tuple[tuple[float, str], ...]
) -> Axis:
    """A logarithmic axis with the named numbers that lie on it; with the finer ones too if they are few."""
    axis = Axis(low=low, high=high, log=True)
    ticks = [one for one in names if low <= one[0] <= high]
    if len(ticks) < 3:
        ticks = sorted({*ticks, *(one for one in finer if low <= one[0] <= high)})
    kept: list[tuple[float, str]] = []
    for value, text in ticks:  # those too near to be read are left out
        if not kept or axis.place(value) - kept[-1][0] >= 13:
            kept.append((axis.place(value), text))
    return Axis(low=low, high=high, log=True, ticks=tuple(kept))


def label_share(value: float, step: float) -> str:
    """A tick of an axis of shares, with a decimal where the steps need one."""
    return format_share(value, 0 if step >= 0.00999 else 1 if step >= 0.000999 else 2)


def label_number(value: float, step: float) -> str:
    """A tick of any other axis."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{min(decimals, 6)}f}"
