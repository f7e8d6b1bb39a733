"""A data set's samples, first by name, then with what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.folders import check_root, find_files
from featcache.dataset.hashing import KnownFiles, hash_files, look_at_all
from featcache.dataset.listing import (
    Digests,
    Listing,
    Split,
    Stats,
    agree_on_classes,
    check_classes_filled,
    name_sample,
)
from featcache.dataset.splitting import split_by_content
from featcache.errors import BadImage
from featcache.progress import SILENT, Progress

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

    paths: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: slice) -> Names:
        """Some of them."""
        return Names(paths=self.paths[rows], labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A data set whose files have not been read.

    Attributes
    ----------
    root
        The folder that all paths are relative to.
    classes
        Class names, sorted; a label is an index into them.
    groups
        "train", "val" and perhaps "test"; or `WHOLE` alone, where contents will decide who validates.
    ignored
        What is not an image by its name or not in a class folder, relative to the root.
    clips
        Whether a sample is a clip: a video file, or a folder of frames.
    """

    root: Path
    classes: tuple[str, ...]
    groups: Mapping[str, Names]
    ignored: tuple[str, ...] = ()
    clips: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    @property
    def is_split(self) -> bool:
        """Whether the data set itself says who validates."""
        return WHOLE not in self.groups


def find_samples(data: Path | str, *, clips: bool = False) -> Samples:
    """The names of a data set's images, or clips, in ImageFolder's order.

    Parameters
    ----------
    data, clips
        As in `list_dataset`.

    Raises
    ------
    DatasetError
        For a missing folder, an empty class, or splits whose classes differ.
    """
    root = Path(data)
    check_root(root)
    found, ignored = find_files(root, clips)
    classes = agree_on_classes({name: {label for _, label in rows} for name, rows in found.items()}, root)
    label_of = {name: label for label, name in enumerate(classes)}
    groups = {
        name: Names(
            paths=tuple(path for path, _ in rows),
            labels=np.array([label_of[label] for _, label in rows], dtype=np.int64),
        )
        for name, rows in found.items()
    }
    return Samples(root=root, classes=classes, groups=groups, ignored=tuple(sorted(ignored)), clips=clips)


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
    splits, bad = _hash_groups(samples, progress, known, keep)
    if not samples.is_split:
        noun = name_sample(samples.clips)
        splits = split_by_content(splits[WHOLE], samples.classes, str(samples.root), val_fraction, seed, noun)
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
    """List the images of a folder, or its clips, with their labels, split and content digests.

    Parameters
    ----------
    data
        The folder, in one of the two layouts above.
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


def list_changed(listing: Listing) -> list[str]:
    """Paths of files that are no longer what they were when they were listed, as far as the file system says."""
    changed = []
    for split in listing.splits.values():
        now, _ = look_at_all([str(listing.root / path) for path in split.paths], listing.clips)
        differs = (now != split.stats).any(axis=1) & split.stats.any(axis=1)
        changed += [split.paths[i] for i in np.flatnonzero(differs)]
    return changed


def _hash_groups(
    samples: Samples,
    progress: Progress,
    known: KnownFiles | None,
    keep: Callable[[Stats, Digests], None] | None,
) -> tuple[dict[str, Split], list[BadImage]]:
    """Each group with its digests, and what cannot be read, which is in none."""
    paths = [path for names in samples.groups.values() for path in names.paths]
    full = [os.path.join(samples.root, path) for path in paths]  # noqa: PTH118 - 100,000 Path objects cost half a second
    stats, digests, reasons = hash_files(full, known=known, keep=keep, progress=progress, clips=samples.clips)
    bad = [BadImage(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    splits, start = {}, 0
    for name, names in samples.groups.items():
        good = [i for i in range(start, start + len(names)) if not reasons[i]]
        splits[name] = Split(
            paths=tuple(paths[i] for i in good),
            labels=names.labels[np.array(good, dtype=np.intp) - start],
            digests=tuple(digests[i] for i in good),
            stats=stats[good],
        )
        start += len(names)
    return splits, bad
