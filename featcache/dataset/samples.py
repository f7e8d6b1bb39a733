"""A data set's samples, first by name, then with what is in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.folders import find_files
from featcache.dataset.hashing import KnownFiles, hash_files, look_at_all
from featcache.dataset.listing import (
    STATS,
    Digests,
    Listing,
    Split,
    Stats,
    agree_on_classes,
    check_classes_filled,
    name_sample,
)
from featcache.dataset.roots import Found, Root, Source, open_root
from featcache.dataset.splitting import split_by_content
from featcache.dataset.texts import HexTexts, Texts, encode_all, take_texts
from featcache.errors import BadImage, DatasetError
from featcache.files import canonical_json
from featcache.progress import SILENT, Progress

MANY_SAMPLES = 1 << 16  # above which they are hashed some at a time, and what is found out is packed
SAMPLES_AT_ONCE = 1 << 13
NAMES_AT_ONCE = 1 << 16  # that are put into one text
WHOLE = ""  # the one group of samples whose split is not decided yet


@dataclass(frozen=True, kw_only=True)
class Names:
    """Samples by name, in order.

    Attributes
    ----------
    paths
        N paths relative to the root, with "/".
    labels
        (N,) int64, indices into the classes.
    """

    paths: Sequence[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: NDArray[np.int64]) -> Names:
        """Some of them, in this order."""
        return Names(paths=take_texts(self.paths, rows), labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A data set whose files have not been read.

    Attributes
    ----------
    root
        What all paths are relative to.
    classes
        Class names, sorted; a label is an index into them.
    groups
        "train", "val" and perhaps "test"; or `WHOLE` and perhaps "test", where contents will decide who validates.
    ignored
        What is not an image by its name or not in a class folder, relative to the root.
    clips
        Whether a sample is a clip: a video file, or a folder of frames.
    """

    root: Root
    classes: tuple[str, ...]
    groups: Mapping[str, Names]
    ignored: tuple[str, ...] = ()
    clips: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    @property
    def noun(self) -> str:
        """What one sample is called in messages."""
        return name_sample(self.clips)

    def take(self, rows: NDArray[np.int64]) -> Samples:
        """Some of them, by ascending numbers that go through group after group."""
        groups, start = {}, 0
        for name, names in self.groups.items():
            first, last = np.searchsorted(rows, [start, start + len(names)])
            groups[name] = names.take(rows[first:last] - start)
            start += len(names)
        return replace(self, groups=groups)

    def hash_names(self) -> str:
        """Digest of which samples there are, by group, class and name."""
        digest = hashlib.sha256(canonical_json(list(self.classes)).encode())
        for name, names in self.groups.items():
            for start in range(0, len(names), NAMES_AT_ONCE):
                some = slice(start, start + NAMES_AT_ONCE)
                rows = zip(names.labels[some].tolist(), names.paths[some], strict=True)
                text = "".join(f"{name}\0{label}\0{path}\0" for label, path in rows)
                digest.update(os.fsencode(text))
        return digest.hexdigest()

    @property
    def is_split(self) -> bool:
        """Whether the data set itself says who validates."""
        return WHOLE not in self.groups


def find_samples(data: Path | str, *, clips: bool = False) -> Samples:
    """The names of a data set's images, or clips, in ImageFolder's order; those of shards and lists in theirs.

    Parameters
    ----------
    data, clips
        As in `list_dataset`.

    Raises
    ------
    DatasetError
        For a missing folder, an empty class, or splits whose classes differ.
    """
    root = open_root(data)
    found = _find(root, clips)
    classes = agree_on_classes({name: {label for _, label in rows} for name, rows in found.rows.items()}, root)
    if found.by_number and all(re.fullmatch("[+-]?[0-9]{1,18}", name) for name in classes):
        classes = tuple(sorted(classes, key=lambda name: (int(name), name)))
    label_of = {name: label for label, name in enumerate(classes)}
    groups = {
        name: Names(
            paths=pack_names(path for path, _ in rows),
            labels=np.array([label_of[label] for _, label in rows], dtype=np.int64),
        )
        for name, rows in found.rows.items()
    }
    return Samples(root=root, classes=classes, groups=groups, ignored=tuple(sorted(found.ignored)), clips=clips)


def pack_names(paths: Iterable[str]) -> Sequence[str]:
    """Paths as they are, or, of many, packed."""
    names = tuple(paths)
    return names if len(names) < MANY_SAMPLES else Texts(encode_all(names))


def _find(root: Root, clips: bool) -> Found:
    """Samples with their classes, by name."""
    if isinstance(root, Path):
        return Found(*find_files(root, clips))
    if clips:
        raise DatasetError(
            f"{root} is no local folder: expected one for clips, which decoders read from the disk; copy it, and name "
            f"the copy"
        )
    return root.find()


def hash_samples(
    samples: Samples,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress = SILENT,
    known: KnownFiles | None = None,
    keep: Callable[[Stats, Digests], None] | None = None,
) -> Listing:
    """The listing of a data set: its files' digests, and who validates.

    Parameters
    ----------
    samples
        By name.
    val_fraction, seed, progress, known, keep
        As in `list_dataset`.

    Raises
    ------
    DatasetError
        If a class of a split has no usable image.
    """
    splits, bad = hash_groups(samples, progress=progress, known=known, keep=keep)
    if bad and not any(map(len, splits.values())):
        raise DatasetError(
            f"none of the {len(bad)} {samples.noun}s of {samples.root} can be read, such as "
            f"{samples.root / bad[0].path}: {bad[0].reason}"
        )
    if not samples.is_split:
        noun = name_sample(samples.clips)
        whole = splits.pop(WHOLE)
        splits = split_by_content(whole, samples.classes, str(samples.root), val_fraction, seed, noun) | splits
    for name, split in splits.items():
        where = f"the {name} split of {samples.root}"
        check_classes_filled(split.labels, samples.classes, where, name_sample(samples.clips))
    return Listing(
        root=samples.root,
        classes=samples.classes,
        splits=splits,
        ignored=samples.ignored,
        bad=tuple(bad),
        clips=samples.clips,
    )


def list_dataset(
    data: Path | str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    progress: Progress = SILENT,
    known: KnownFiles | None = None,
    keep: Callable[[Stats, Digests], None] | None = None,
    clips: bool = False,
) -> Listing:
    """List the images of a data set, or its clips, with their labels, split and content digests.

    Parameters
    ----------
    data
        A folder in one of the two layouts above, or whatever else `roots` knows.
    val_fraction
        Share of the images that becomes the validation split where the folder has none.
    seed
        Chooses which images those are; see `is_validation`.
    progress
        Told of the reading.
    known
        Files that need not be read again.
    keep
        Called every few seconds with what was found out by reading, for `known` of another time.
    clips
        List video files and folders of frames, each a row, instead of images.

    Returns
    -------
    Listing
        Rows in ImageFolder's order. Files that cannot be read are in `bad`, not in a split.

    Raises
    ------
    DatasetError
        For a missing folder, an empty class or split, or splits whose classes differ.
    """
    return hash_samples(
        find_samples(data, clips=clips), val_fraction=val_fraction, seed=seed, progress=progress, known=known, keep=keep
    )


def find_known_digests(samples: Samples, known: KnownFiles) -> list[str]:
    """The digest of each sample in hexadecimal, "" where it would have to be read for it."""
    paths = [path for names in samples.groups.values() for path in names.paths]
    stats, _ = _look(samples.root, paths, samples.clips)
    return known.find(stats)


def list_changed(listing: Listing) -> list[str]:
    """Paths of files that are no longer what they were when they were listed, as far as the file system says."""
    changed = []
    if isinstance(listing.root, Source):
        listing.root.forget()
    for split in listing.splits.values():
        now, _ = _look(listing.root, split.paths, listing.clips)
        differs = (now != split.stats).any(axis=1) & split.stats.any(axis=1)
        changed += [split.paths[i] for i in np.flatnonzero(differs).tolist()]
    return changed


def _look(root: Root, paths: Sequence[str], clips: bool) -> tuple[Stats, list[str]]:
    """What stands for the bytes of N samples now, and why one cannot be used, or ""."""
    if isinstance(root, Source):
        return root.look(paths)
    return look_at_all([os.path.join(root, path) for path in paths], clips)  # noqa: PTH118 - as below


def hash_groups(
    samples: Samples,
    *,
    progress: Progress = SILENT,
    known: KnownFiles | None = None,
    keep: Callable[[Stats, Digests], None] | None = None,
) -> tuple[dict[str, Split], list[BadImage]]:
    """Each group with its digests, and what cannot be read, which is in none.

    Parameters
    ----------
    samples
        By name.
    progress, known, keep
        As in `list_dataset`.
    """
    if len(samples) < MANY_SAMPLES:
        hashed = _hash_names(samples, list(samples.groups.values()), progress, known, keep)
    else:
        blocks = _iterate_hashed(samples, known, keep)
        unit = "clip" if samples.clips else "img"
        hashed = _join_hashed(progress.track(blocks, total=len(samples), what="reading", unit=unit), len(samples))
    splits, bad, start = {}, [], 0
    for name, names in samples.groups.items():
        some = slice(start, start + len(names))
        reasons = {i - start: reason for i, reason in hashed.reasons.items() if some.start <= i < some.stop}
        bad += [BadImage(names.paths[i], reason) for i, reason in reasons.items()]
        paths, labels, digests, stats = names.paths, names.labels, hashed.digests[some], hashed.stats[some]
        if reasons:
            good = np.setdiff1d(np.arange(len(names)), list(reasons))
            paths, labels = take_texts(paths, good), labels[good]
            digests, stats = take_texts(digests, good), stats[good]
        splits[name] = Split(paths=paths, labels=labels, digests=digests, stats=stats)
        start += len(names)
    return splits, bad


@dataclass(frozen=True)
class _Hashed:
    """What is in N files: stats (N, 4), digests, and why some cannot be used, by their numbers."""

    stats: Stats
    digests: Sequence[str]
    reasons: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.stats)


def _hash_names(
    samples: Samples,
    some: Sequence[Names],
    progress: Progress,
    known: KnownFiles | None,
    keep: Callable[[Stats, Digests], None] | None,
) -> _Hashed:
    """What is in these samples."""
    source = samples.root if isinstance(samples.root, Source) else None
    paths = [path for names in some for path in names.paths]
    # 100,000 Path objects cost half a second
    there = paths if source else [os.path.join(str(samples.root), path) for path in paths]  # noqa: PTH118
    stats, digests, reasons = hash_files(
        there, known=known, keep=keep, progress=progress, clips=samples.clips, source=source
    )
    return _Hashed(stats, tuple(digests), {i: reason for i, reason in enumerate(reasons) if reason})


def _iterate_hashed(
    samples: Samples, known: KnownFiles | None, keep: Callable[[Stats, Digests], None] | None
) -> Iterator[_Hashed]:
    """What is in all samples, some at a time, so that there are never many objects."""
    for names in samples.groups.values():
        for start in range(0, len(names), SAMPLES_AT_ONCE):
            rows = np.arange(start, min(start + SAMPLES_AT_ONCE, len(names)))
            yield _hash_names(samples, [names.take(rows)], SILENT, known, keep)


def _join_hashed(blocks: Iterable[_Hashed], n: int) -> _Hashed:
    """What is in N files, in little memory."""
    stats, raw = np.empty((n, len(STATS)), np.int64), np.zeros((n, 32), np.uint8)
    reasons: dict[int, str] = {}
    start = 0
    for block in blocks:
        stop = start + len(block)
        stats[start:stop] = block.stats
        reasons |= {start + i: reason for i, reason in block.reasons.items()}
        text = "".join(digest or "0" * 64 for digest in block.digests)
        raw[start:stop] = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 32)
        start = stop
    return _Hashed(stats, HexTexts(raw), reasons)
