"""What a data set is: samples with labels, classes, splits and digests. Knows no file system."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featcache.errors import BadImage, DatasetError
from featcache.files import canonical_json

SPLITS = ("train", "val", "test")
# What the file system says of a file, see `KnownFiles`: inode, size in bytes, and both times in nanoseconds.
STATS = ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
Digests: TypeAlias = NDArray[np.bytes_]  # (N,) S64
Stats: TypeAlias = NDArray[np.int64]  # (N, 4), see STATS; of a folder of frames see `_fold_stats`
NO_STATS = (0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split's images, row by row.

    Attributes
    ----------
    paths
        N paths relative to the listing's root, with "/".
    labels
        (N,) int64, indices into the listing's classes.
    digests
        N SHA-256 digests of the files' bytes, in hexadecimal.
    stats
        (N, 4) int64, what the file system said of each file when it was hashed; zeros where that proves nothing. Given
        none, it is all zeros.
    """

    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    digests: tuple[str, ...]
    stats: Stats = field(default_factory=lambda: np.empty((0, len(STATS)), np.int64))

    def __post_init__(self) -> None:
        if not len(self.stats):
            object.__setattr__(self, "stats", np.zeros((len(self.paths), len(STATS)), np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, keep: NDArray[np.bool_]) -> Split:
        """The rows where `keep` (N,) is true, in the same order."""
        rows = np.flatnonzero(keep)
        return Split(
            paths=tuple(self.paths[i] for i in rows),
            labels=self.labels[rows],
            digests=tuple(self.digests[i] for i in rows),
            stats=self.stats[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set as it lies on disk.

    Attributes
    ----------
    root
        The folder that all paths are relative to.
    classes
        Class names, sorted; a label is an index into them.
    splits
        "train", "val" and perhaps "test", in this order.
    ignored
        What is not an image by its name or not in a class folder, relative to the root.
    bad
        Files that are images by their name but could not be read at all.
    clips
        Whether a row is a clip: a video file, or a folder of frames.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    ignored: tuple[str, ...] = ()
    bad: tuple[BadImage, ...] = ()
    clips: bool = False

    @property
    def noun(self) -> str:
        """What one row is called in messages."""
        return name_sample(self.clips)

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits.values())

    def paths(self) -> list[str]:
        """All paths, split after split."""
        return [path for split in self.splits.values() for path in split.paths]

    def digests(self) -> set[str]:
        """Digests of all images, each once."""
        return {digest for split in self.splits.values() for digest in split.digests}

    def without(self, bad: Iterable[BadImage]) -> Listing:
        """The same listing with files left out; `bad` is all of them, those that it lacks already included.

        Raises
        ------
        DatasetError
            If a class of a split has no image left.
        """
        bad = tuple(bad)
        left_out = {item.path for item in bad}
        splits = {
            name: split.take(np.array([path not in left_out for path in split.paths], dtype=bool))
            for name, split in self.splits.items()
        }
        for name, split in splits.items():
            where = f"the {name} split of {self.root}, bad files left out"
            check_classes_filled(split.labels, self.classes, where, self.noun)
        return replace(self, splits=splits, bad=bad)


def agree_on_classes(found: dict[str, set[str]], root: Path) -> tuple[str, ...]:
    """The class names, sorted, if every split has the same.

    Raises
    ------
    DatasetError
        If a class is missing from a split.
    """
    union = set().union(*found.values())
    for name, classes in found.items():
        if missing := sorted(union - classes):
            raise DatasetError(
                f"the splits of {root} have different classes: {name} lacks {', '.join(missing)}; expected the same "
                f"class folders in {', '.join(found)}"
            )
    return tuple(sorted(union))


def check_classes_filled(labels: NDArray[np.int64], classes: Sequence[str], where: str, noun: str = "image") -> None:
    """Raise a DatasetError if a class has no image, or whatever `noun` is, in `labels` (N,)."""
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise DatasetError(f"{where} has no {noun} of class {', '.join(empty)}; add {noun}s, or remove the class")


def name_sample(clips: bool) -> str:
    """What one sample is called in messages."""
    return "clip" if clips else "image"


def dataset_fingerprint(split: Split, classes: Sequence[str]) -> str:
    """Digest of which images with which labels a split holds, whatever they are called or their order."""
    rows = sorted((digest, classes[label]) for digest, label in zip(split.digests, split.labels.tolist(), strict=True))
    digest, comma = hashlib.sha256(canonical_json([list(classes), []]).encode()[:-2]), b""
    for start in range(0, len(rows), 10_000):  # piece by piece: the text of all rows of a large data set is large
        digest.update(comma + canonical_json(rows[start : start + 10_000]).encode()[1:-1])
        comma = b","
    digest.update(b"]]")
    return digest.hexdigest()


def describe_data(listing: Listing) -> dict[str, Any]:
    """The data set as plain JSON values: folder, classes, images per split, fingerprint of each split."""
    return {
        "folder": str(listing.root.resolve()),
        "classes": list(listing.classes),
        "images": {name: len(split) for name, split in listing.splits.items()},
        "fingerprints": {name: dataset_fingerprint(split, listing.classes) for name, split in listing.splits.items()},
    }


def summarise(listing: Listing) -> list[str]:
    """What a person should know of a listing before it is worked on: counts, what was ignored, leakage."""
    counts = ", ".join(f"{len(split)} {name}" for name, split in listing.splits.items())
    noun, article = listing.noun, "a" if listing.clips else "an"
    lines = [f"{listing.root}: {counts} {noun}s, {len(listing.classes)} classes"]
    if listing.ignored:
        lines.append(f"ignored, not {article} {noun} in a class folder: {_name_some(listing.ignored)}")
    lines += list_doubts(listing)
    if len(listing.classes) == 1:
        lines.append(
            f"WARNING: only one class, {listing.classes[0]}; class folders are looked for directly in the data"
        )
    return lines


def list_doubts(listing: Listing) -> list[str]:
    """Warnings of images that are in two splits, or under two labels."""
    lines, noun = [], listing.noun
    if shared := find_shared_images(listing):
        examples = _name_some([" = ".join(paths) for paths in shared.values()])
        lines.append(f"WARNING: leakage, the same {noun} in more than one split ({len(shared)} in all): {examples}")
    if two := find_contradictions(listing):
        examples = _name_some([" = ".join(paths) for paths in two.values()])
        lines.append(f"WARNING: the same {noun} under different labels ({len(two)} in all): {examples}")
    return lines


def find_contradictions(listing: Listing) -> dict[str, list[str]]:
    """Images whose very bytes are under more than one label: digest to paths."""
    where: dict[str, dict[int, list[str]]] = {}
    for split in listing.splits.values():
        for path, label, digest in zip(split.paths, split.labels.tolist(), split.digests, strict=True):
            where.setdefault(digest, {}).setdefault(label, []).append(path)
    return {
        digest: [path for paths in by_label.values() for path in paths]
        for digest, by_label in where.items()
        if len(by_label) > 1
    }


def find_shared_images(listing: Listing) -> dict[str, list[str]]:
    """Images whose very bytes are in more than one split: digest to paths. They leak answers."""
    where: dict[str, dict[str, list[str]]] = {}
    for name, split in listing.splits.items():
        for path, digest in zip(split.paths, split.digests, strict=True):
            where.setdefault(digest, {}).setdefault(name, []).append(path)
    return {
        digest: [path for paths in by_split.values() for path in paths]
        for digest, by_split in where.items()
        if len(by_split) > 1
    }


def _name_some(names: Sequence[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
