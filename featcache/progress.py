"""How stages tell somebody what they are doing. Knows no terminal: the cli brings one, a notebook may bring its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """The silent listener, and what a talkative one overrides.

    Attributes
    ----------
    live
        Whether somebody watches a terminal, so that a bar may be redrawn.
    """

    live: bool = False

    def say(self, line: str) -> None:
        """Receive one finished line: a decision that was taken, an epoch that ended."""

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, unit: str = "img", done: int = 0
    ) -> Iterator[T]:
        """Pass `items` through while counting them.

        Parameters
        ----------
        items
            Whatever is worked through. A sized item (a batch, bytes) counts as its length, any other as one.
        total
            Number of units in all; None if nobody knows.
        what
            What is being done, for the left end of a bar.
        unit
            What is counted; "B" are bytes.
        done
            Units that were there before.
        """
        del total, what, unit, done
        yield from items


class Bars(Progress):
    """A listener who is shown bars and told nothing: what is said has been said before."""

    def __init__(self, listener: Progress) -> None:
        self.live, self.listener = listener.live, listener

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, unit: str = "img", done: int = 0
    ) -> Iterator[T]:
        """Pass `items` through the listener's bar."""
        return self.listener.track(items, total=total, what=what, unit=unit, done=done)


class Once(Bars):
    """A listener who is told everything once: several stages in a row look at the same data."""

    def __init__(self, listener: Progress) -> None:
        super().__init__(listener)
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        """Pass on a line that was not there before."""
        if line not in self._said:
            self._said.add(line)
            self.listener.say(line)


SILENT = Progress()


def format_bytes(n: float) -> str:
    """A size for people.

    >>> format_bytes(2_096_000)
    '2.1 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
