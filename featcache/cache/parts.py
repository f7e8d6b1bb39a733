"""Immutable files of finished work, from which an extraction goes on after whatever stopped it.

A part is built in memory, written by plain Python under a temporary name, synced, and renamed to a name that carries
its digest; it is never opened for writing again. Growing one HDF5 file in place was tried in every variant: each lost
or falsified rows at some of the moments when a process can die. In a store a part is one upload under that name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.cache.reading import explain_errors
from featcache.dataset import STATS, Digests, KnownFiles, Stats
from featcache.dataset.texts import NamedFile, StoredTexts, TextColumn, pack_digests
from featcache.errors import CacheError, OutputError, StoreError
from featcache.files import hash_bytes, list_temporary
from featcache.metering import NOTHING_SPENT, Meter, Spent, add_up
from featcache.storage import REQUESTS, Place, RemotePath, read_named, remove_files, write_named

PART_SCHEMA = 1
# A part is written when it is that old or that large: what a kill may lose, and what is read again at a time.
PART_SECONDS = 5.0
PART_BYTES = 32 << 20
# Work that comes a few images at a time leaves many small parts, and opening each costs a millisecond.
SMALL_BYTES = 1 << 20
MANY_PARTS = 64
LEFT_ROWS = 1024  # of a part, from which on its digests are left on the disk
MAX_PART_BYTES = 1 << 30  # what lies there and is larger is no part
ROWS, FILES = "rows", "files"
PART_NAME = re.compile(rf"(?P<kind>{ROWS}-[0-9a-f]{{16}}|{FILES})-[0-9a-f]{{32}}\.h5")
COLUMNS: Mapping[str, Mapping[str, tuple[int, tuple[str, ...]]]] = {  # of each kind of part: axes and types
    ROWS: {"features": (2, ("<f4", "<f2")), "digests": (1, ("|S64",))},
    FILES: {"stats": (2, ("<i8",)), "digests": (1, ("|S64",))},
}
CURE = "remove it and run the same command again"
NOTES = ("job", "bad", "done")  # small files beside the parts, see `featcache.cache.jobs`
NOTE_NAME = re.compile(rf"(?P<note>{'|'.join(NOTES)})-[0-9a-f]{{16}}-[0-9a-f]{{16}}([0-9a-f]{{16}}|-\d+of\d+)\.json")
PART_TEMPORARY_NAME = re.compile(rf"\.({PART_NAME.pattern}|{NOTE_NAME.pattern})\.\d+\.tmp")


def is_ours(name: str) -> bool:
    """Whether a file of this name in a folder of parts is featcache's."""
    return bool(PART_NAME.fullmatch(name) or NOTE_NAME.fullmatch(name))


def parts_path(output: Place) -> Place:
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
    spent
        What was done for the rows before, elsewhere.

    Attributes
    ----------
    parts
        Those that were written.
    """

    def __init__(self, folder: Place, key: str, dtype: str, *, spent: Spent = NOTHING_SPENT) -> None:
        self.parts: list[Part] = []
        self._folder, self._key, self._dtype = folder, key, np.dtype(dtype)
        self._digests: list[str] = []
        self._features: list[NDArray[Any]] = []
        self._bytes = 0
        self._meter, self._before = Meter(), spent

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
        spent, meter = self._before + self._meter.read(), Meter()
        columns = {"features": np.concatenate(self._features), "digests": np.array(self._digests, "S64")}
        path = _write_part(self._folder, f"{ROWS}-{self._key[:16]}", columns, self._key, spent)
        self.parts.append(Part(path=path, key=self._key, spent=spent, columns={"digests": columns["digests"]}))
        self._digests, self._features, self._bytes = [], [], 0
        self._meter, self._before = meter, NOTHING_SPENT


def keep_files(folder: Place, stats: Stats, digests: Digests) -> None:
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


class PackedColumns(Mapping[str, NDArray[Any]]):
    """The columns of a part, of which "digests" is packed, or left on the disk, until it is asked for.

    Attributes
    ----------
    digests
        That column.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        there = columns.digests if isinstance(columns, PackedColumns) else columns.get("digests", np.empty(0, "S64"))
        self.digests: TextColumn = pack_digests(there)
        self._names = tuple(columns)
        self._others = {name: values for name, values in columns.items() if name != "digests"}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.digests.array if name == "digests" and name in self._names else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that was found whole.

    `columns` are "digests" (N,) S64 and, for a part of files, "stats"; features are read when they are wanted. `spent`
    is what its rows cost, CPU seconds and joules None where a featcache wrote it that did not count them.
    """

    path: Place
    key: str
    spent: Spent
    columns: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", PackedColumns(self.columns))

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def digests(self) -> TextColumn:
        """The N digests, packed or left on the disk: of many parts `columns` would take much memory."""
        assert isinstance(self.columns, PackedColumns)
        digests: TextColumn = self.columns.digests
        return digests

    def read_features(self) -> NDArray[Any]:
        """(N, D) in the stored precision.

        Raises
        ------
        CacheError
            If the file is no longer what it was.
        """
        features: NDArray[Any] = _load(self.path, {"features"}).columns["features"]
        return features


def list_parts(output: Place, kind: str, key: str = "") -> tuple[list[Part], list[Place]]:
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

    Raises
    ------
    StoreError
        If the store in which they are does not answer.
    """
    wanted = f"{ROWS}-{key[:16]}" if kind == ROWS else kind
    names = {path: PART_NAME.fullmatch(path.name) for path in list_files(parts_path(output))}
    parts, damaged = [], []
    for path, part in _load_all([path for path, match in names.items() if match and match["kind"] == wanted]):
        if part is None:
            damaged.append(path)
        elif part.key == key:
            parts.append(part)
    return parts, damaged


def _load_all(paths: Sequence[Place]) -> Iterator[tuple[Place, Part | None]]:
    """Parts, None where one is damaged; from a store many at a time."""

    def load(path: Place) -> Part | None:
        try:
            return _load(path, {"digests", "stats"})
        except CacheError:
            return None

    if any(isinstance(path, RemotePath) for path in paths):
        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from zip(paths, pool.map(load, paths), strict=True)
    else:
        yield from ((path, load(path)) for path in paths)


def merge_parts(output: Place, kind: str, key: str = "") -> None:
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
    sizes = list_sizes(parts_path(output))
    small = [part for part in list_parts(output, kind, key)[0] if sizes.get(part.path, SMALL_BYTES) < SMALL_BYTES]
    if len(small) < MANY_PARTS:
        return
    columns = {name: np.concatenate([part.columns[name] for part in small]) for name in small[0].columns}
    if kind == ROWS:
        features = [part.read_features() for part in small]
        if len({(rows.shape[1], rows.dtype) for rows in features}) > 1:
            return  # they are of no one extractor, as whoever uses them will say
        columns["features"] = np.concatenate(features)
    prefix = f"{ROWS}-{key[:16]}" if kind == ROWS else FILES
    _write_part(parts_path(output), prefix, columns, key, add_up(part.spent for part in small))
    drop_files([part.path for part in small])  # NOTE: after the new one is on the disk


def read_known_files(output: Place) -> tuple[Stats, Digests]:
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


def remove_parts(output: Place, key: str) -> list[Place]:
    """Remove the parts of this extractor, of files, and what a dead process left of one; give what is left.

    Parts of another extractor are somebody's work: they stay. What cannot be removed stays, too: the finished file is
    there, nobody needs it, and `cache prune` tries again.
    """
    folder = parts_path(output)
    if isinstance(folder, RemotePath):
        with contextlib.suppress(StoreError):
            drop_files(_list_mine(folder, key))
            return list(folder.list_below())
        return []
    if not folder.is_dir():
        return []
    drop_files(_list_mine(folder, key))
    left = sorted(folder.glob("*"))
    if not left:
        with contextlib.suppress(OSError):  # somebody put something there meanwhile
            files.disk.remove_folder(folder)
    return list[Place](left)


def _list_mine(folder: Place, key: str) -> list[Place]:
    """What an extractor, and dead processes, left in a folder of parts."""
    mine = (f"{ROWS}-{key[:16]}-", f"{FILES}-", *(f"{kind}-{key[:16]}-" for kind in NOTES))
    return [
        path
        for path in list_files(folder)
        if PART_TEMPORARY_NAME.fullmatch(path.name) or (is_ours(path.name) and path.name.startswith(mine))
    ]


def remove_temporary(output: Place) -> None:
    """Remove unfinished files that a dead process left; only who holds the lock may."""
    if isinstance(output, Path):  # in a store nothing is unfinished
        parts = [path for path in list_files(parts_path(output)) if PART_TEMPORARY_NAME.fullmatch(path.name)]
        drop_files([*list_temporary(output), *parts])


def drop_files(paths: Sequence[Place]) -> None:
    """Remove files, as far as they can be."""
    for path in paths:
        if isinstance(path, Path):
            with contextlib.suppress(OSError):
                files.disk.remove(path)
    with contextlib.suppress(OSError):
        remove_files([path for path in paths if isinstance(path, RemotePath)])


def check_parts(output: Place) -> None:
    """Raise an OutputError if something lies where the parts of an extraction into `output` go."""
    folder = parts_path(output)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is there and no folder of featcache's; move it, or choose another place with -o")


def read_file(path: Place) -> bytes:
    """The bytes of a small file; OSError if they cannot be read."""
    return path.read_bytes()


def list_files(folder: Place) -> list[Place]:
    """Regular files of a size that parts have, sorted; pipes, links and giants are none of ours."""
    return sorted(list_sizes(folder), key=str)


def list_sizes(folder: Place) -> dict[Place, int]:
    """These files, each with its bytes."""
    if isinstance(folder, RemotePath):
        return {path: size for path, size in folder.list_below().items() if size < MAX_PART_BYTES}
    found: dict[Place, int] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it has just gone
                size = entry.stat(follow_symlinks=False).st_size
                if entry.is_file(follow_symlinks=False) and size < MAX_PART_BYTES:
                    found[Path(entry.path)] = size
    return found


def _write_part(folder: Place, prefix: str, columns: dict[str, NDArray[Any]], key: str, spent: Spent) -> Place:
    with h5py.File("part", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["featcache_part"] = PART_SCHEMA
        file.attrs.update({name: value for name, value in spent.to_json().items() if value is not None})
        file.attrs.create("extractor_key", key.encode(), dtype=h5py.string_dtype("ascii", max(len(key), 1)))
        for name, values in columns.items():
            file.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)
        file.flush()
        data = file.id.get_file_image()
    path = folder / f"{prefix}-{hash_bytes(data)[:32]}.h5"
    write_named(path, data)
    return path


def _read_column(there: h5py.Dataset, path: Place) -> NDArray[Any] | StoredTexts:
    """A column of a part, the digests of many rows left where they are: the name says that they stay the same.

    They lie in one chunk as they are, the filter's checksum after them.
    """
    plain = there.chunks == there.shape and there.fletcher32 and not (there.compression or there.shuffle)
    if isinstance(path, Path) and there.dtype == "S64" and len(there) >= LEFT_ROWS and plain:
        return StoredTexts(NamedFile(path), there.id.get_chunk_info(0).byte_offset, len(there), 64)
    values: NDArray[Any] = there[:]
    return values


def _find_columns(file: h5py.File, path: Place) -> dict[str, h5py.Dataset]:
    """The columns that a part of its kind has, if they are such as a part is written with: anybody can hash a file."""
    kind = FILES if path.name.startswith(FILES) else ROWS
    columns = {}
    for name, (ndim, types) in COLUMNS[kind].items():
        there = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(there, h5py.Dataset) or there.is_virtual or there.external:
            raise CacheError(f"{path} is damaged: {name} is not stored in it; {CURE}")
        if there.ndim != ndim or there.dtype.str not in types or there.nbytes > file.id.get_filesize():
            raise CacheError(f"{path} is damaged: {name} is {there.dtype} {there.shape}; {CURE}")
        columns[name] = there
    if len({len(there) for there in columns.values()}) > 1:
        raise CacheError(f"{path} is damaged: its columns differ in length; {CURE}")
    if kind == FILES and columns["stats"].shape[1] != len(STATS):
        raise CacheError(f"{path} is damaged: stats is {columns['stats'].shape}, expected width {len(STATS)}; {CURE}")
    return columns


def _load(path: Place, names: set[str]) -> Part:
    """A part, if its bytes are those that its name promises; HDF5 sees them only then."""

    def is_right(data: bytes) -> bool:
        return hash_bytes(data)[:32] == path.stem.rpartition("-")[2]

    try:
        data = read_named(path, is_right)
        if not is_right(data):
            raise CacheError(f"{path} is damaged: its bytes are not those of its name; run the same command again")
        with explain_errors(path), h5py.File(io.BytesIO(data), "r") as file:
            if file.attrs["featcache_part"] != PART_SCHEMA:
                raise CacheError(f"{path} has part schema {file.attrs['featcache_part']}, expected {PART_SCHEMA}")
            columns = _find_columns(file, path)
            return Part(
                path=path,
                key=bytes(file.attrs["extractor_key"]).decode("ascii"),
                spent=Spent.from_json(dict(file.attrs)),
                columns={name: _read_column(there, path) for name, there in columns.items() if name in names},
            )
    except StoreError:  # which is not damage
        raise
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}; run the same command again") from error
