"""What can go wrong, as a tree of exceptions. Knows nothing else of featcache.

::

    FeatcacheError               caught once, in the cli: one line on stderr, exit code 1
    ├── SettingsError            an option has a value that makes no sense (the cli's exit code 2)
    ├── InputError               what was given in Python in place of images is something else
    ├── DatasetError             a folder, table, class or split is missing, empty or at odds with another
    ├── BadImagesError           some files of a data set cannot be used as images; each is named
    ├── BackboneError            unknown network, or a network that cannot be used
    │   ├── WeightsError         weights that do not fit or cannot be read
    │   └── WeightsUnavailableError   default weights that cannot be had here and now
    ├── DeviceError              a device was asked for that is not there
    ├── MissingExtraError        an optional package is not installed
    ├── CacheError               a file that is not a feature cache, or a damaged one
    │   ├── StaleCacheError      a cache made by another extractor
    │   └── UnfinishedError      what several processes extract, and some of them have not come to their end
    ├── RunError                 a folder that is not a run, or another run, or one that does not fit
    ├── TrainingError            a training that cannot go on: no number, no memory
    ├── OutputError              a place that cannot be written
    │   └── OutputBusyError      another process is writing there
    ├── ClusterError             a cluster that cannot be used, or work that failed on it
    │   └── CrashedItemsError    work whose process died each time; all else is done
    ├── StoreError               an object store does not answer, or refuses (an OSError, too)
    └── DownloadError            a download that failed or is not what it should be

    ImageError                   one image that cannot be used; collected, never shown alone

Use it like this::

    try:
        featcache.extract_features("photos")
    except featcache.FeatcacheError as error:
        print(error)
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAX_SHOWN = 100  # characters of what data calls something, in a message
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class FeatcacheError(Exception):
    """The root: anything that featcache can explain in one line.

    Attributes
    ----------
    told
        Whether another process of the same job says it.
    """

    told: bool = False


class SettingsError(FeatcacheError, ValueError):
    """A setting is out of its range or contradicts another."""


class InputError(FeatcacheError, ValueError):
    """What was given in Python in place of images is something else."""


class DatasetError(FeatcacheError):
    """The folder is not a usable image data set, or the table no usable table of features.

    The message is one line, whatever the names in it hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(make_printable(message))


class BackboneError(FeatcacheError):
    """The backbone is unknown or cannot be used."""


class WeightsError(BackboneError):
    """The weights do not fit the network or cannot be read safely."""


class WeightsUnavailableError(BackboneError):
    """The default weights are neither on this machine nor downloadable."""


class DeviceError(FeatcacheError):
    """The device asked for is not there."""


class MissingExtraError(FeatcacheError):
    """An optional package is needed; the message holds the pip line that installs it."""


class CacheError(FeatcacheError):
    """The file is not a feature cache, or it is damaged."""


class StaleCacheError(CacheError):
    """The cache was made by another extractor; the message lists what differs."""


class UnfinishedError(CacheError):
    """Of what several processes extract, rows are missing; the message says whose."""


class RunError(FeatcacheError):
    """The folder is not a run, holds another run, or does not fit what it is used with."""


class TrainingError(FeatcacheError):
    """A training cannot go on: its loss is no number, or the memory is too small."""


class OutputError(FeatcacheError):
    """A result cannot be written where it should go."""


class OutputBusyError(OutputError):
    """Another process is writing there; the message says which."""


class StoreError(FeatcacheError, OSError):
    """An object store does not answer, or refuses; `strerror` is the reason alone."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(errno.EIO, reason)
        self.place = place

    def __str__(self) -> str:
        return f"{self.place} cannot be reached: {self.strerror}"

    def __reduce__(self) -> tuple[type[StoreError], tuple[str, str]]:
        """How it comes out of another process."""
        return type(self), (self.place, str(self.strerror))


class ClusterError(FeatcacheError):
    """A cluster cannot be reached, has not what is needed, or the work on it failed."""


class CrashedItemsError(ClusterError):
    """Items of work whose process died each time they were tried; all others are done.

    Attributes
    ----------
    crashed : dict of int to str
        Their positions, and what their process was doing: `prepare` or `work`.
    """

    def __init__(self, crashed: Mapping[int, str]) -> None:
        self.crashed = dict(crashed)
        stages = " and ".join(sorted(set(self.crashed.values())))
        what = "1 item of work" if len(self.crashed) == 1 else f"{len(self.crashed)} items of work"
        super().__init__(f"{what} killed the process each time on the Ray cluster, in: {stages}")

    def __reduce__(self) -> tuple[type[CrashedItemsError], tuple[dict[int, str]]]:
        """How it comes out of another process."""
        return type(self), (self.crashed,)


class DownloadError(FeatcacheError):
    """A download failed, or what arrived is not what was expected."""


class BadImage(NamedTuple):
    """One file that cannot be used, and why."""

    path: str
    reason: str


class ImageError(FeatcacheError):
    """One image cannot be used; the message is the reason, without the path."""


class BadImagesError(FeatcacheError):
    """Files of the data set cannot be used as images, and the user did not say to leave them out.

    Attributes
    ----------
    bad : list of BadImage
        Every such file with its reason.
    rows : list of int
        Where they are in what was given in Python, if it was.
    """

    def __init__(self, bad: Sequence[BadImage], rows: Sequence[int] = (), *, can_leave_out: bool = True) -> None:
        self.bad, self.rows = list(bad), list(rows)
        lines = "".join(f"\n  {make_printable(path)}: {make_printable(reason)}" for path, reason in self.bad)
        one = len(self.bad) == 1
        n, what, them = ("1 file", "an image", "it") if one else (f"{len(self.bad)} files", "images", "them")
        leaving = f"drop {them} from X, see `rows` of this error" if rows else f"leave {them} out with --skip-bad"
        leaving = leaving if can_leave_out else "name others"
        cure = f"mend or remove {them}, or {leaving}"
        super().__init__(f"{n} cannot be used as {what}; {cure}{lines}")

    def __reduce__(self) -> tuple[type[BadImagesError], tuple[list[BadImage], list[int]]]:
        """How it comes out of another process."""
        return type(self), (self.bad, self.rows)


def make_printable(text: str) -> str:
    r"""Text that does nothing to a terminal, in one line: control characters as \xNN, other ends of lines as \uNNNN.

    >>> make_printable("red.jpg\n\x1b[31m")
    'red.jpg\\x0a\\x1b[31m'
    """
    return UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shorten(text: str) -> str:
    """What data calls something, for a message: printable, and cut if it is long.

    >>> shorten("red"), shorten("x" * 5000) == "x" * 100 + "... (5,000 characters)"
    ('red', True)
    """
    cut = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text):,} characters)"
    return make_printable(cut)


def show_value(value: object) -> str:
    """A value that data holds, for a message; of one that holds others its type.

    >>> show_value("red"), show_value(1.5), show_value({"a": [1]})
    ("'red'", '1.5', 'a dict')
    """
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else shorten(repr(value))
