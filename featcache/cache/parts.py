"""Immutable files of finished work, from which an extraction goes on after whatever stopped it.

A part is built in memory, written by plain Python under a temporary name, synced, and renamed to a name that carries
its digest; it is never opened for writing again. Growing one HDF5 file in place was tried in every variant: each lost
or falsified rows at some of the moments when a process can die.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.cache.reading import explain_errors
from featcache.dataset import STATS, Digests, KnownFiles, Stats
from featcache.errors import CacheError, OutputError
from featcache.files import hash_bytes, list_temporary, write_atomically
from featcache.metering import Meter, Spent, add_up

PART_SCHEMA = 1
# A part is written when it is that old or that large: what a kill may lose, and what is read again at a time.
PART_SECONDS = 5.0
PART_BYTES = 32 << 20
# Work that comes a few images at a time leaves many small parts, and opening each costs a millisecond.
SMALL_BYTES = 1 << 20
MANY_PARTS = 64
MAX_PART_BYTES = 1 << 30  # what lies there and is larger is no part
ROWS, FILES = "rows", "files"
PART_NAME = re.compile(rf"(?P<kind>{ROWS}-[0-9a-f]{{16}}|{FILES})-[0-9a-f]{{32}}\.h5")
PART_TEMPORARY_NAME = re.compile(rf"\.({PART_NAME.pattern})\.\d+\.tmp")


def parts_path(output: Path) -> Path:
    """The folder of the parts of an extraction into `output`."""
    return output.with_name(output.name + ".parts")


class PartWriter:
    """Takes rows as they are computed and writes a part whenever it is due.

    Parameters
    ----------
    folder
        Where the parts go, see `parts_path`.
    key
        The extractor's key.
    dtype
        Type in which the features are stored.

    Attributes
    ----------
    parts
        Those that were written.
    """

    def __init__(self, folder: Path, key: str, dtype: str) -> None:
        self.parts: list[Part] = []
        self._folder, self._key, self._dtype = folder, key, np.dtype(dtype)
        self._digests: list[str] = []
        self._features: list[NDArray[Any]] = []
        self._bytes = 0
        self._meter = Meter()

    def add(self, digests: Sequence[str], features: NDArray[Any]) -> None:
        """Take the features (B, D) of B images.

        Raises
        ------
        OutputError
            If a part was due and could not be written.
        """
        if not digests:
            return
        self._digests += digests
        self._features.append(features.astype(self._dtype))
        self._bytes += self._features[-1].nbytes
        if self._bytes >= PART_BYTES or self._meter.seconds >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is there as a part."""
        if not self._digests:
            return
        spent, meter = self._meter.read(), Meter()
        columns = {"features": np.concatenate(self._features), "digests": np.array(self._digests, "S64")}
        path = _write_part(self._folder, f"{ROWS}-{self._key[:16]}", columns, self._key, spent)
        self.parts.append(Part(path=path, key=self._key, spent=spent, columns={"digests": columns["digests"]}))
        self._digests, self._features, self._bytes, self._meter = [], [], 0, meter


def keep_files(folder: Path, stats: Stats, digests: Digests) -> None:
    """Write a part of files that were hashed.

    Parameters
    ----------
    folder
        Where the parts go.
    stats
        (N, 4) int64.
    digests
        (N,) S64.
    """
    _write_part(folder, FILES, {"stats": stats.astype("<i8"), "digests": digests.astype("S64")}, "", Spent())


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that was found whole.

    `columns` are "digests" (N,) S64 and, for a part of files, "stats"; features are read when they are wanted. `spent`
    is what its rows cost, CPU seconds and joules None where a featcache wrote it that did not count them.
    """

    path: Path
    key: str
    spent: Spent
    columns: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["digests"])

    def read_features(self) -> NDArray[Any]:
        """(N, D) in the stored precision.

        Raises
        ------
        CacheError
            If the file is no longer what it was.
        """
        return _load(self.path, {"features"}).columns["features"]


def list_parts(output: Path, kind: str, key: str = "") -> tuple[list[Part], list[Path]]:
    """The parts of one kind that lie beside `output`.

    Parameters
    ----------
    output
        What is being extracted into.
    kind
        "rows" or "files".
    key
        Of the extractor that made the rows.

    Returns
    -------
    parts
        Those that are whole, in the order of their names.
    damaged
        Files that are not what their name says.
    """
    parts, damaged = [], []
    for path in _list_files(parts_path(output)):
        match = PART_NAME.fullmatch(path.name)
        if not match or match["kind"] != (f"{ROWS}-{key[:16]}" if kind == ROWS else kind):
            continue
        try:
            part = _load(path, {"digests", "stats"})
        except CacheError:
            damaged.append(path)
            continue
        if part.key == key:
            parts.append(part)
    return parts, damaged


def merge_parts(output: Path, kind: str, key: str = "") -> None:
    """Make one part of all small ones, if there are many; only who holds the lock may.

    Parameters
    ----------
    output, kind, key
        As in `list_parts`.

    Raises
    ------
    OutputError
        If it cannot be written; the small ones are there still.
    """
    small = [part for part in list_parts(output, kind, key)[0] if part.path.stat().st_size < SMALL_BYTES]
    if len(small) < MANY_PARTS:
        return
    columns = {name: np.concatenate([part.columns[name] for part in small]) for name in small[0].columns}
    if kind == ROWS:
        columns["features"] = np.concatenate([part.read_features() for part in small])
    prefix = f"{ROWS}-{key[:16]}" if kind == ROWS else FILES
    _write_part(parts_path(output), prefix, columns, key, add_up(part.spent for part in small))
    for part in small:  # NOTE: after the new one is on the disk
        with contextlib.suppress(OSError):
            files.disk.remove(part.path)


def read_known_files(output: Path) -> tuple[Stats, Digests]:
    """What is known of files from the parts beside `output`: stats (N, 4) and digests (N,)."""
    parts, _ = list_parts(output, FILES)
    stats = [np.empty((0, len(STATS)), np.int64), *(part.columns["stats"] for part in parts)]
    digests = [np.empty(0, "S64"), *(part.columns["digests"] for part in parts)]
    return np.concatenate(stats), np.concatenate(digests)


def make_known_files(*sources: tuple[Stats, Digests]) -> KnownFiles:
    """What is known of files from several places."""
    return KnownFiles(
        np.concatenate([stats for stats, _ in sources]), np.concatenate([digests for _, digests in sources])
    )


def remove_parts(output: Path, key: str) -> list[Path]:
    """Remove the parts of this extractor, of files, and what a dead process left of one; give what is left.

    Parts of another extractor are somebody's work: they stay.
    """
    folder = parts_path(output)
    if not folder.is_dir():
        return []
    mine = (f"{ROWS}-{key[:16]}", FILES)
    for path in _list_files(folder):
        part = PART_NAME.fullmatch(path.name)
        if PART_TEMPORARY_NAME.fullmatch(path.name) or (part and part["kind"] in mine):
            with contextlib.suppress(OSError):  # the finished file is there, nobody needs it; `cache prune` tries again
                files.disk.remove(path)
    left = sorted(folder.glob("*"))
    if not left:
        with contextlib.suppress(OSError):  # somebody put something there meanwhile
            files.disk.remove_folder(folder)
    return left


def remove_temporary(output: Path) -> None:
    """Remove unfinished files that a dead process left; only who holds the lock may."""
    parts = [path for path in _list_files(parts_path(output)) if PART_TEMPORARY_NAME.fullmatch(path.name)]
    for path in [*list_temporary(output), *parts]:
        with contextlib.suppress(OSError):
            files.disk.remove(path)


def check_parts(output: Path) -> None:
    """Raise an OutputError if something lies where the parts of an extraction into `output` go."""
    folder = parts_path(output)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is there and no folder of featcache's; move it, or choose another place with -o")


def _list_files(folder: Path) -> list[Path]:
    """Regular files of a size that parts have; pipes, links and giants are none of ours."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it has just gone
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size < MAX_PART_BYTES:
                    found.append(Path(entry.path))
    return sorted(found)


def _write_part(folder: Path, prefix: str, columns: dict[str, NDArray[Any]], key: str, spent: Spent) -> Path:
    with h5py.File("part", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["featcache_part"] = PART_SCHEMA
        file.attrs.update({name: value for name, value in spent.to_json().items() if value is not None})
        file.attrs.create("extractor_key", key.encode(), dtype=h5py.string_dtype("ascii", max(len(key), 1)))
        for name, values in columns.items():
            file.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)
        file.flush()
        data = file.id.get_file_image()
    path = folder / f"{prefix}-{hash_bytes(data)[:32]}.h5"
    write_atomically(path, data)
    return path


def _load(path: Path, names: set[str]) -> Part:
    """A part, if its bytes are those that its name promises; HDF5 sees them only then."""
    try:
        data = path.read_bytes()
        if hash_bytes(data)[:32] != path.stem.rpartition("-")[2]:
            raise CacheError(f"{path} is damaged: its bytes are not those of its name; run the same command again")
        with explain_errors(path), h5py.File(io.BytesIO(data), "r") as file:
            if file.attrs["featcache_part"] != PART_SCHEMA:
                raise CacheError(f"{path} has part schema {file.attrs['featcache_part']}, expected {PART_SCHEMA}")
            return Part(
                path=path,
                key=bytes(file.attrs["extractor_key"]).decode("ascii"),
                spent=Spent.from_json(dict(file.attrs)),
                columns={name: file[name][:] for name in names if name in file},
            )
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}; run the same command again") from error
