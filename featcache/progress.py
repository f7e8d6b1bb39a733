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

    def track(self, items: Iterable[T], *, total: int, what: str, unit: str = "img") -> Iterator[T]:
        """Pass `items` through while counting them.

        Parameters
        ----------
        items
            Whatever is worked through. A sized item (a batch) counts as its length, any other as one.
        total
            Number of units in all.
        what
            What is being done, for the left end of a bar.
        unit
            What is counted.
        """
        del total, what, unit
        yield from items


SILENT = Progress()
