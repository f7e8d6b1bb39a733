"""Files -> SHA-256 digests, read only where the file system does not say that they are as they were."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.folders import list_frames
from featcache.dataset.listing import NO_STATS, STATS, Digests, Stats
from featcache.dataset.roots import Item, Source
from featcache.errors import DatasetError, ImageError
from featcache.files import canonical_json
from featcache.progress import SILENT, Progress

RACY_NS = 2_000_000_000  # the coarsest time stamp in use, FAT's
KEEP_SECONDS = 5.0  # how much hashing a kill may lose


class KnownFiles:
    """Digests of files that were hashed before, found again by what the file system says of them.

    A file whose inode, size, modification and change time are all as they were has the same bytes: the change time
    cannot be set by hand. What was modified less than 2 s before it was hashed might have been modified again within
    the same tick of the clock; it is never found here.

    Source: git's index and its "racily clean" entries, https://git-scm.com/docs/racy-git.

    Parameters
    ----------
    stats
        (N, 4) int64.
    digests
        (N,) S64.
    """

    def __init__(self, stats: Stats, digests: Digests) -> None:
        trusted = stats.any(axis=1)
        keys, digests = _join_stats(stats[trusted]), digests[trusted]
        order = np.argsort(keys)
        self._keys, self._digests = keys[order], digests[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, stats: Stats) -> list[str]:
        """The digest of each of N files in hexadecimal, "" where it is not known."""
        if not len(self._keys):
            return [""] * len(stats)
        keys = _join_stats(stats)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = np.where((self._keys[at] == keys) & stats.any(axis=1), self._digests[at], b"")
        return [str(value, "ascii") for value in found.tolist()]


def _join_stats(stats: Stats) -> NDArray[np.bytes_]:
    """(N, 4) int64 -> (N,) S32 that can be sorted and looked up."""
    return np.ascontiguousarray(stats, dtype=">i8").view("S32").reshape(-1)


NOTHING_KNOWN = KnownFiles(np.empty((0, len(STATS)), np.int64), np.empty(0, "S64"))


def hash_files(
    paths: Sequence[str],
    *,
    known: KnownFiles | None = None,
    keep: Callable[[Stats, Digests], None] | None = None,
    progress: Progress = SILENT,
    clips: bool = False,
    source: Source | None = None,
) -> tuple[Stats, list[str], list[str]]:
    """SHA-256 of files, or clips, read where nothing is known of them.

    Parameters
    ----------
    paths
        N files; of a source N of its samples.
    known, keep, progress, clips
        As in `list_dataset`.
    source
        What the paths are of, if they are not files of this machine.

    Returns
    -------
    stats
        (N, 4) int64, zeros for a file that might have changed since unnoticed.
    digests
        N, in hexadecimal; "" for a file that cannot be used.
    reasons
        N, why it cannot; "" if it can.
    """
    stats, reasons = look_at_all(paths, clips) if source is None else source.look(paths)
    digests = known.find(stats) if known else [""] * len(paths)
    todo = [i for i in range(len(paths)) if not digests[i] and not reasons[i]]
    for i, (digest, stats[i], reason) in zip(todo, _hash_all(paths, todo, progress, keep, clips, source), strict=True):
        digests[i], reasons[i] = digest, reason
    return stats, digests, reasons


def look_at_all(paths: Sequence[str], clips: bool = False) -> tuple[Stats, list[str]]:
    """What the file system says of N files, or clips, and why one cannot be used ("" if it can)."""
    pieces = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    stats: Stats = np.zeros((len(paths), len(STATS)), np.int64)
    reasons: list[str] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # a network file system answers many at a time
        for found in pool.map(_look_at_clips if clips else _look_at, pieces):
            for values, reason in found:
                stats[len(reasons)] = values
                reasons.append(reason)
    return stats, reasons


def _look_at(paths: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    found: list[tuple[tuple[int, ...], str]] = []
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - as above
        except OSError as error:  # a dangling link, no permission
            found.append((NO_STATS, f"cannot be read: {error.strerror or error}"))
            continue
        regular = stat.S_ISREG(status.st_mode)  # a pipe would be waited for
        found.append((_pick_stats(status), "" if regular else "not a regular file"))
    return found


def _look_at_clips(paths: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    """As `_look_at`; what is said of a folder's frames is folded into one."""
    return [_look_at_frames(path) if os.path.isdir(path) else _look_at([path])[0] for path in paths]  # noqa: PTH112


def _look_at_frames(folder: str) -> tuple[tuple[int, ...], str]:
    try:
        names = list_frames(folder)
    except DatasetError as error:
        return NO_STATS, str(error)
    found = _look_at([os.path.join(folder, name) for name in names])  # noqa: PTH118
    if unusable := [f"frame {name} {reason}" for name, (_, reason) in zip(names, found, strict=True) if reason]:
        return NO_STATS, unusable[0]
    return _fold_stats(names, [values for values, _ in found]), "" if names else "has no frames any more"


def _fold_stats(names: Sequence[str], stats: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """One row of stats for a folder of frames: three numbers hashed from all names and stats, around the size in all.

    It is the same only as long as every frame's is, and none comes, goes or is renamed.
    """
    size = sum(values[STATS.index("st_size")] for values in stats)
    return fold_stats([list(names), [list(values) for values in stats]], size)


def fold_stats(values: Sequence[Any], size: int) -> tuple[int, ...]:
    """One row of stats for whatever proves that bytes are as they were: three numbers hashed from it around a size.

    Parameters
    ----------
    values
        Anything that JSON can hold.
    size
        Of the bytes.
    """
    first, second, third = np.frombuffer(hashlib.sha256(canonical_json(values).encode()).digest()[:24], "<u8") >> 1
    return int(first), size, int(second), int(third)


def _pick_stats(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino & (2**63 - 1), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hash_all(
    paths: Sequence[str],
    rows: Sequence[int],
    progress: Progress,
    keep: Callable[[Stats, Digests], None] | None,
    clips: bool,
    source: Source | None,
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Digest, stats that prove it later (or zeros) and reason of failure of each of `rows`."""
    fresh: list[tuple[tuple[int, ...], bytes]] = []
    kept = time.monotonic()

    def keep_fresh() -> None:
        if keep is not None and fresh:
            keep(np.array([values for values, _ in fresh], np.int64), np.array([digest for _, digest in fresh], "S64"))
            fresh.clear()

    hash_one = _try_hash_clip if clips else _try_hash if source is None else partial(_try_hash_sample, source)
    readers = max(os.cpu_count() or 1, 1 if source is None else source.readers)
    with ThreadPoolExecutor(max_workers=readers) as pool:  # hashing releases the interpreter's lock
        answers = pool.map(hash_one, (paths[i] for i in rows))
        try:
            for answer in progress.track(answers, total=len(rows), what="reading", unit="clip" if clips else "img"):
                digest, values, _ = answer
                if any(values):
                    fresh.append((values, digest.encode()))
                if time.monotonic() - kept > KEEP_SECONDS:
                    keep_fresh()
                    kept = time.monotonic()
                yield answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts does not wait for what is queued
            keep_fresh()


def _try_hash(path: str) -> tuple[str, tuple[int, ...], str]:
    """Digest of a file's bytes; its stats, or zeros if it might have changed since unnoticed."""
    started = time.time_ns()
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as above
            before = _pick_stats(os.fstat(file.fileno()))
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
            after = _pick_stats(os.fstat(file.fileno()))
    except OSError as error:
        return "", NO_STATS, f"cannot be read: {error.strerror or error}"
    settled = before == after and max(after[2:]) + RACY_NS < started
    return digest.hexdigest(), after if settled else NO_STATS, ""


def _try_hash_sample(source: Source, path: str) -> tuple[str, tuple[int, ...], str]:
    """As `_try_hash`, of a sample of a source."""
    try:
        data = source.read(path)
    except OSError as error:
        return "", NO_STATS, f"cannot be read: {error.strerror or error}"
    return hashlib.sha256(data).hexdigest(), source.prove(path, data), ""


def hash_clip(path: Path | str | Item) -> str:
    """Digest of a clip as its listing has it: of a video file its bytes', of a folder its frames' names and digests.

    A folder's is the SHA-256 of the lines that `sha256sum` prints of its frames in their order.

    Raises
    ------
    ImageError
        If a file cannot be read.
    """
    if isinstance(path, Item):
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error
    digest, _, reason = _try_hash_clip(str(path))
    if reason:
        raise ImageError(reason)
    return digest


def _try_hash_clip(path: str) -> tuple[str, tuple[int, ...], str]:
    """As `_try_hash`, of a video file or a folder of frames; settled if every frame is."""
    if not os.path.isdir(path):  # noqa: PTH112 - as above
        return _try_hash(path)
    digest, stats = hashlib.sha256(), []
    try:
        names = list_frames(path)
    except DatasetError as error:
        return "", NO_STATS, str(error)
    for name in names:
        of_frame, values, reason = _try_hash(os.path.join(path, name))  # noqa: PTH118
        if reason:
            return "", NO_STATS, f"frame {name} {reason}"
        digest.update(_write_digest_line(of_frame, name))
        stats.append(values)
    if not names:
        return "", NO_STATS, "has no frames any more"
    return digest.hexdigest(), _fold_stats(names, stats) if all(map(any, stats)) else NO_STATS, ""


def _write_digest_line(digest: str, name: str) -> bytes:
    """A line as of `sha256sum`: a name with a line break or a backslash is escaped, or it could pass for two."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return os.fsencode(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")
