"""Images in hand -> their features: rows that are kept, and those that are missing computed and kept.

Knows no folder of classes: each row is found by the digest of its image.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.backbones import Backbone
from featcache.cache import (
    STORED_TYPES,
    PartSource,
    PartWriter,
    RowTable,
    Source,
    can_serve,
    check_complete,
    check_parts,
    hash_extractor,
    hold_output,
    keep_files,
    list_parts,
    make_known_files,
    merge_parts,
    open_cache,
    open_sources,
    parts_path,
    read_known_files,
    remove_temporary,
)
from featcache.config import ExtractConfig
from featcache.dataset import Digests, KnownFiles
from featcache.dataset.texts import TextColumn
from featcache.errors import BadImage, BadImagesError, CacheError
from featcache.images import make_pixel_transform
from featcache.pictures import Hashed, Picture, PictureRows, hash_pictures, name_picture
from featcache.progress import Progress
from featcache.runtime import run_network
from featcache.stages.compute import find_unusable
from featcache.storage import Place, check_writable, is_there

TURN = threading.RLock()  # one thread computes at a time: it uses all cores, and the next one finds its rows


@dataclass(frozen=True, kw_only=True)
class Task:
    """Images whose features are wanted.

    Attributes
    ----------
    pictures
        N images.
    backbone, device, config
        What computes them, where and how.
    output
        The cache file, None for no cache.
    progress
        Told what is being done.
    """

    pictures: Sequence[Picture]
    backbone: Backbone
    device: torch.device
    config: ExtractConfig
    output: Place | None
    progress: Progress

    @property
    def extractor(self) -> dict[str, Any]:
        """Description of what computes them."""
        return self.backbone.describe(self.config.store)

    @property
    def key(self) -> str:
        """The extractor's key."""
        return hash_extractor(self.extractor)

    def make_table(self, sources: Sequence[Source]) -> RowTable:
        """Rows of the wanted precision."""
        return RowTable(sources, self.backbone.width, STORED_TYPES[self.config.store])


def provide_features(task: Task) -> NDArray[np.float32]:
    """Features (N, D) of a task's images.

    Raises
    ------
    BadImagesError
        If some of them cannot be used.
    """
    if task.output is not None:
        if not task.output.parent.is_dir():
            check_writable(task.output)
        check_parts(task.output)
    hashed = hash_pictures(task.pictures, _find_known_files(task.output), task.progress)
    digests = np.array(hashed.digests, dtype="S64")
    with TURN:
        if task.output is None:
            writer = MemoryWriter(task.config.store)
            bad = compute_rows(task, hashed, _list_missing(digests, task.make_table([])), writer)
            _check_all_good(task, hashed, bad)
            return _read(task.make_table([writer]), digests)
        with contextlib.suppress(CacheError), open_rows(task, task.output) as table:  # nobody's lock: parts may vanish
            if not any(hashed.reasons) and (table.find(digests) >= 0).all():
                return _read(table, digests)
        return _compute_and_keep(task, task.output, hashed, digests)


def _compute_and_keep(task: Task, output: Place, hashed: Hashed, digests: Digests) -> NDArray[np.float32]:
    """Features (N, D), what is missing computed and kept in parts, by one process at a time."""
    check_writable(output)
    with hold_output(output, wait=True, progress=task.progress):
        remove_temporary(output)
        if len(hashed.stats):
            keep_files(parts_path(output), hashed.stats, hashed.stat_digests)
        with open_rows(task, output) as table:
            missing = _list_missing(digests, table)
        writer = PartWriter(parts_path(output), task.key, task.config.store)
        bad = compute_rows(task, hashed, missing, writer)
        for kind, key in (("rows", task.key), ("files", "")):
            merge_parts(output, kind, key)
        _check_all_good(task, hashed, bad)
        with open_rows(task, output) as table:
            return _read(table, digests)


@contextlib.contextmanager
def open_rows(task: Task, output: Place) -> Iterator[RowTable]:
    """The rows that are kept for a task's extractor: of the cache file if it has such, and of the parts beside it.

    Raises
    ------
    CacheError
        If something else is in the place of the cache file.
    """
    caches = []
    if is_there(output):
        cache = open_cache(output)
        check_complete(cache, output)
        caches = [output] if can_serve(cache.extractor, task.extractor) else []
    parts, damaged = list_parts(output, "rows", task.key)
    with open_sources(caches, STORED_TYPES[task.config.store]) as (sources, damaged_blocks):
        for path in dict.fromkeys([*damaged, *(path for path, *_ in damaged_blocks)]):
            task.progress.say(f"WARNING: {path} is damaged; what is needed of it is computed again")
        yield task.make_table([*sources, *map(PartSource, parts)])


def _find_known_files(output: Place | None) -> KnownFiles | None:
    """What is known of image files from a cache and the parts beside it."""
    if output is None:
        return None
    known = [read_known_files(output)]
    if output.is_file():
        splits = open_cache(output).listing.splits.values()
        known += [(split.stats, np.array(split.digests, dtype="S64")) for split in splits]
    return make_known_files(*known)


def _list_missing(digests: Digests, table: RowTable) -> list[str]:
    """Digests that have no row, each once, in their order."""
    found = table.find(digests) >= 0
    return list(dict.fromkeys(str(digest, "ascii") for digest in digests[~found].tolist() if digest))


def _read(table: RowTable, digests: Digests) -> NDArray[np.float32]:
    """Features (N, D) of these digests.

    Raises
    ------
    CacheError
        If there is a row that is not there any more.
    """
    positions = table.find(digests)
    if (positions < 0).any():
        raise CacheError("parts of the cache vanished meanwhile; run the same again")
    return table.read(positions).astype(np.float32, copy=False)


class MemoryWriter:
    """Takes rows as they are computed, like a `PartWriter`, and gives them back.

    Attributes
    ----------
    digests
        (n,) S64.
    window
        Rows that are best read together.
    """

    window = 1 << 20

    def __init__(self, dtype: str) -> None:
        self.digests: Digests | TextColumn = np.empty(0, "S64")
        self._dtype = dtype
        self._added: list[Digests] = []
        self._features: list[NDArray[Any]] = []

    def add(self, digests: Sequence[str], features: NDArray[Any]) -> None:
        """Take the features (B, D) of B images."""
        if digests:
            self._added.append(np.array(digests, dtype="S64"))
            self._features.append(features.astype(self._dtype))

    def flush(self) -> None:
        """Put everything in one piece."""
        if self._added:
            self.digests = np.concatenate(self._added)
            self._features = [np.concatenate(self._features)]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Features (stop - start, D)."""
        return self._features[0][start:stop]


def compute_rows(
    task: Task, hashed: Hashed, missing: Sequence[str], writer: PartWriter | MemoryWriter
) -> dict[str, str]:
    """Compute the rows of these digests; give the digests of images that cannot be used, with the reason.

    Whatever ends it, the rows that were computed are kept.
    """
    if not missing:
        return {}
    first = {digest: row for row, digest in reversed(list(enumerate(hashed.digests)))}
    pictures = [task.pictures[first[digest]] for digest in missing]
    rows = PictureRows(pictures, missing, transform=make_pixel_transform(task.backbone.preprocessing))
    outputs = run_network(
        task.backbone.network,
        rows,
        device=task.device,
        runtime=task.config.runtime,
        precision=task.backbone.precision,
        batch_size=task.config.batch_size,
        workers=task.config.workers,
    )
    bad: list[BadImage] = []
    try:
        for output in task.progress.track(outputs, total=len(missing), what="extracting"):
            digests = [missing[row] for row in output.rows.tolist()]
            usable, failed = find_unusable(output, digests, task.config)
            writer.add([digests[i] for i in np.flatnonzero(usable).tolist()], output.values[usable])
            bad += failed
    finally:
        writer.flush()
    return {one.path: one.reason for one in bad}


def _check_all_good(task: Task, hashed: Hashed, bad: dict[str, str]) -> None:
    """Raise a BadImagesError that names every image that cannot be used."""
    reasons = [reason or bad.get(digest, "") for digest, reason in zip(hashed.digests, hashed.reasons, strict=True)]
    if rows := [row for row, reason in enumerate(reasons) if reason]:
        named = [BadImage(name_picture(task.pictures[row], row), reasons[row]) for row in rows]
        raise BadImagesError(named, rows)
