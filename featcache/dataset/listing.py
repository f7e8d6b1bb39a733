"""What a data set is: samples with labels, classes, splits and digests. Knows no file system."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring_ascii
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.roots import Root, Source, name_root
from featcache.dataset.texts import (
    BLOCK_TEXTS,
    MANY_TEXTS,
    TextSet,
    decode,
    hash_texts,
    iterate_blocks,
    pack_digests,
    pack_texts,
    take_texts,
)
from featcache.errors import BadImage, DatasetError, shorten
from featcache.files import canonical_json

SPLITS = ("train", "val", "test")
# What the file system says of a file, see `KnownFiles`: inode, size in bytes, and both times in nanoseconds.
STATS = ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
Digests: TypeAlias = NDArray[np.bytes_]  # (N,) S64
Stats: TypeAlias = NDArray[np.int64]  # (N, 4), see STATS; of a folder of frames see `_fold_stats`
NO_STATS = (0, 0, 0, 0)
SORTED_ROWS = 1 << 19  # of a fingerprint, about, that are sorted at a time


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split's images, row by row. Of many, paths and digests are packed: see `featcache.dataset.texts`.

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

    paths: Sequence[str]
    labels: NDArray[np.int64]
    digests: Sequence[str]
    stats: Stats = field(default_factory=lambda: np.empty((0, len(STATS)), np.int64))

    def __post_init__(self) -> None:
        if not len(self.stats):
            object.__setattr__(self, "stats", np.zeros((len(self.paths), len(STATS)), np.int64))
        if len(self.paths) >= MANY_TEXTS:
            object.__setattr__(self, "paths", pack_texts(self.paths))
            object.__setattr__(self, "digests", pack_digests(self.digests))

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, keep: NDArray[np.bool_]) -> Split:
        """The rows where `keep` (N,) is true, in the same order."""
        if keep.all():
            return self
        rows = np.flatnonzero(keep)
        return Split(
            paths=take_texts(self.paths, rows),
            labels=self.labels[rows],
            digests=take_texts(self.digests, rows),
            stats=self.stats[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set as it lies on disk.

    Attributes
    ----------
    root
        What all paths are relative to.
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

    root: Root
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

    def digests(self) -> Set[str]:
        """Digests of all images, each once."""
        if len(self) >= MANY_TEXTS:
            return TextSet([pack_digests(split.digests) for split in self.splits.values()])
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
        splits = {name: _leave_out(split, left_out) for name, split in self.splits.items()}
        for name, split in splits.items():
            where = f"the {name} split of {self.root}, bad files left out"
            check_classes_filled(split.labels, self.classes, where, self.noun)
        return replace(self, splits=splits, bad=bad)


def _leave_out(split: Split, paths: set[str]) -> Split:
    """A split without the images at these paths."""
    if not paths:
        return split
    return split.take(np.fromiter((path not in paths for path in split.paths), bool, len(split)))


def agree_on_classes(found: dict[str, set[str]], root: Root) -> tuple[str, ...]:
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
                f"the splits of {root} have different classes: {name} lacks {', '.join(map(shorten, missing))}; "
                f"expected the same classes in {', '.join(found)}"
            )
    return tuple(sorted(union))


def check_classes_filled(labels: NDArray[np.int64], classes: Sequence[str], where: str, noun: str = "image") -> None:
    """Raise a DatasetError if a class has no image, or whatever `noun` is, in `labels` (N,)."""
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        names = ", ".join(map(shorten, empty))
        raise DatasetError(f"{where} has no {noun} of class {names}; add {noun}s, or remove the class")


def name_sample(clips: bool) -> str:
    """What one sample is called in messages."""
    return "clip" if clips else "image"


def dataset_fingerprint(split: Split, classes: Sequence[str]) -> str:
    """Digest of which images with which labels a split holds, whatever they are called or their order.

    It is that of the JSON of the classes and of the sorted pairs of digest and class.
    """
    digest, comma = hashlib.sha256(canonical_json([list(classes), []]).encode()[:-2]), b""
    for texts in _write_pairs(split, classes):
        digest.update(comma + ",".join(texts).encode())
        comma = b","
    digest.update(b"]]")
    return digest.hexdigest()


def _write_pairs(split: Split, classes: Sequence[str]) -> Iterator[list[str]]:
    """The JSON of each pair of digest and class, sorted; some at a time, for all of a large data set are large."""
    rank = np.empty(len(classes), np.int64)
    rank[sorted(range(len(classes)), key=classes.__getitem__)] = np.arange(len(classes))
    endings = [f",{canonical_json(name)}]" for name in classes]
    for digests, labels in _iterate_sorted(split, rank):
        pairs = zip(map(decode, digests.tolist()), labels.tolist(), strict=True)
        yield [f"[{encode_basestring_ascii(digest)}{endings[label]}" for digest, label in pairs]


def _iterate_sorted(split: Split, rank: NDArray[np.int64]) -> Iterator[tuple[Digests, NDArray[np.int64]]]:
    """Digests and labels (n,) of all rows, sorted by digest and the label's rank, some rows at a time."""
    counts = np.zeros(1 << 16, np.int64)
    for _, block in iterate_blocks(split.digests):
        counts += np.bincount(_find_beginnings(block), minlength=len(counts))
    pile = np.cumsum(counts) // SORTED_ROWS  # of each beginning: alike neighbours are sorted together
    for number in np.unique(pile[counts > 0]).tolist() if len(split) else ():
        found, rows = [], []
        for start, block in iterate_blocks(split.digests):
            rows.append(start + np.flatnonzero(pile[_find_beginnings(block)] == number))
            found.append(block[rows[-1] - start])
        digests, labels = np.concatenate(found), split.labels[np.concatenate(rows)]
        del found, rows
        order = np.lexsort((rank[labels], digests))
        for start in range(0, len(order), BLOCK_TEXTS):
            yield digests[order[start : start + BLOCK_TEXTS]], labels[order[start : start + BLOCK_TEXTS]]


def _find_beginnings(texts: Digests) -> NDArray[np.int64]:
    """The first two bytes (n,) of texts (n,) as a number by which they sort."""
    return np.ascontiguousarray(texts.astype("S2")).view(">u2").astype(np.int64)


def describe_data(listing: Listing) -> dict[str, Any]:
    """The data set as plain JSON values: folder, classes, images per split, fingerprint of each split."""
    return {
        "folder": name_root(listing.root),
        "classes": list(listing.classes),
        "images": {name: len(split) for name, split in listing.splits.items()},
        "fingerprints": {name: dataset_fingerprint(split, listing.classes) for name, split in listing.splits.items()},
    }


def summarise(listing: Listing) -> list[str]:
    """What a person should know of a listing before it is worked on: counts, what was ignored, leakage."""
    counts = ", ".join(f"{len(split)} {name}" for name, split in listing.splits.items())
    noun, article = listing.noun, "a" if listing.clips else "an"
    n = len(listing.classes)
    lines = [f"{listing.root}: {counts} {noun}s, {n} class{'es' * (n != 1)}"]
    if listing.ignored:
        lines.append(f"ignored, not {article} {noun} in a class folder: {_name_some(listing.ignored)}")
    lines += list_doubts(listing)
    if len(listing.classes) == 1:
        where = "; class folders are looked for directly in the data" if not isinstance(listing.root, Source) else ""
        lines.append(f"WARNING: only one class, {listing.classes[0]}{where}")
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
    for split, rows in _find_repeated(listing):
        for path, label, digest in _iterate_rows(split, rows):
            where.setdefault(digest, {}).setdefault(label, []).append(path)
    return _join_paths(where)


def find_shared_images(listing: Listing) -> dict[str, list[str]]:
    """Images whose very bytes are in more than one split: digest to paths. They leak answers."""
    where: dict[str, dict[int, list[str]]] = {}
    for number, (split, rows) in enumerate(_find_repeated(listing)):
        for path, _, digest in _iterate_rows(split, rows):
            where.setdefault(digest, {}).setdefault(number, []).append(path)
    return _join_paths(where)


def _find_repeated(listing: Listing) -> list[tuple[Split, NDArray[np.int64]]]:
    """Each split, and its rows (n,) whose digest is that of another row too; those of equal numbers are among them."""
    splits = list(listing.splits.values())
    blocks = [hash_texts(block) for split in splits for _, block in iterate_blocks(split.digests)]
    numbers = np.concatenate([np.empty(0, np.uint64), *blocks])
    del blocks
    repeated, ordered = np.zeros(len(numbers), bool), np.sort(numbers)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        at = np.minimum(np.searchsorted(twice, numbers), len(twice) - 1)
        repeated = twice[at] == numbers
    cuts = np.cumsum([len(split) for split in splits])[:-1]
    return [(split, np.flatnonzero(own)) for split, own in zip(splits, np.split(repeated, cuts), strict=True)]


def _iterate_rows(split: Split, rows: NDArray[np.int64]) -> Iterator[tuple[str, int, str]]:
    """Path, label and digest of some rows (n,)."""
    columns = take_texts(split.paths, rows), split.labels[rows].tolist(), take_texts(split.digests, rows)
    return zip(*columns, strict=True)


def _join_paths(where: dict[str, dict[int, list[str]]]) -> dict[str, list[str]]:
    """The paths of each digest that is in more than one group."""
    return {
        digest: [path for paths in groups.values() for path in paths]
        for digest, groups in where.items()
        if len(groups) > 1
    }


def _name_some(names: Sequence[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
