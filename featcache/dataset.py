"""A folder of labelled images or clips as a listing: paths, labels, classes, splits, digests. Decodes nothing.

Two layouts are understood, both ImageFolder's::

    DATA/train/<class>/*   DATA/val/<class>/*   [DATA/test/<class>/*]
    DATA/<class>/*         split here, by content

Of images each file is a sample. Of clips it is each video file, and each folder of frames: one that lies somewhere in
its class folder and directly holds image files, which are its frames in natural order (frame2 before frame10).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featcache.errors import BadImage, DatasetError, ImageError
from featcache.files import canonical_json, hash_bytes
from featcache.progress import SILENT, Progress

# torchvision.datasets.folder.IMG_EXTENSIONS, written out because importing it costs seconds; a test compares the two.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
CLIP_EXTENSIONS = (*VIDEO_EXTENSIONS, ".gif")
SPLITS = ("train", "val", "test")
# What the file system says of a file, see `KnownFiles`: inode, size in bytes, and both times in nanoseconds.
STATS = ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
RACY_NS = 2_000_000_000  # the coarsest time stamp in use, FAT's
KEEP_SECONDS = 5.0  # how much hashing a kill may lose

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
    root = Path(data)
    check_root(root)
    names, files, ignored = _find_files(root, clips)
    classes = agree_on_classes({name: {label for _, label in rows} for name, rows in files.items()}, root)
    listed, bad = _hash_rows(root, files, classes, progress, known, keep, clips)
    splits = (
        listed if names else split_by_content(listed[""], classes, str(root), val_fraction, seed, name_sample(clips))
    )
    for name, split in splits.items():
        check_classes_filled(split.labels, classes, f"the {name} split of {root}", name_sample(clips))
    return Listing(
        root=root, classes=classes, splits=splits, ignored=tuple(sorted(ignored)), bad=tuple(bad), clips=clips
    )


def list_changed(listing: Listing) -> list[str]:
    """Paths of files that are no longer what they were when they were listed, as far as the file system says."""
    changed = []
    for split in listing.splits.values():
        now, _ = _look_at_all([str(listing.root / path) for path in split.paths], listing.clips)
        differs = (now != split.stats).any(axis=1) & split.stats.any(axis=1)
        changed += [split.paths[i] for i in np.flatnonzero(differs)]
    return changed


def check_root(root: Path) -> None:
    """Raise a DatasetError if there is no folder at `root`."""
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing"
        raise DatasetError(
            f"no data set at {root}: expected a folder DATA/train/<class>/ and DATA/val/<class>/, or DATA/<class>/, "
            f"found {found}; `featcache sample digits {root}` makes one to try"
        )


def _find_files(root: Path, clips: bool) -> tuple[list[str], dict[str, list[tuple[str, str]]], list[str]]:
    """Split folders, (path, class) of the samples in each, paths of what is ignored; without splits all is in ""."""
    names = find_split_folders(root)
    folders = {name: root / name for name in names} if names else {"": root}
    files: dict[str, list[tuple[str, str]]] = {}
    ignored: list[str] = []
    for name, folder in folders.items():
        files[name], strays = list_class_folders(root, folder, clips)
        ignored += strays
    if names:
        ignored += [
            entry.name + ("/" if _is_folder(entry) else "")
            for entry in _sorted_entries(root)
            if entry.name not in names
        ]
    return names, files, ignored


def find_split_folders(root: Path) -> list[str]:
    """Names of the split folders under `root`, or none if its folders are classes.

    Raises
    ------
    DatasetError
        If there is a train folder without a val folder, or the other way round.
    """
    present = [name for name in SPLITS if (root / name).is_dir()]
    split = {"train", "val"} <= set(present) or any(_has_folders(root / name) for name in present)
    if not split:
        return []
    for name in ("train", "val"):
        if name not in present:
            there = ", ".join(sorted(entry.name for entry in _sorted_entries(root) if _is_folder(entry)))
            raise DatasetError(
                f"{root} has no {name} folder: expected {root / 'train'} and {root / 'val'}, found {there}; rename or "
                f"add it, or name a folder of classes (such as {root / present[0]}) to have it split for you"
            )
    return present


def list_class_folders(root: Path, folder: Path, clips: bool = False) -> tuple[list[tuple[str, str]], list[str]]:
    """Image files, or clips, under each class folder of `folder`.

    Returns
    -------
    samples
        (path relative to `root`, class name), sorted as ImageFolder sorts them.
    ignored
        Paths of files that are no sample and no frame of one.

    Raises
    ------
    DatasetError
        If there is no class folder, or one without any sample.
    """
    entries = _sorted_entries(folder)
    classes = [entry for entry in entries if _is_folder(entry) and not _is_hidden(entry)]
    if not classes:
        noun, is_sample = name_sample(clips), is_clip_name if clips else is_image_name
        loose = sum(is_sample(entry.name) for entry in entries)
        raise DatasetError(
            f"{folder} has no class folders: expected {folder}/<class>/<{noun}>, found "
            f"{f'{loose} {noun}s directly in it' if loose else 'no folders'}; put each class into a folder of its own"
        )
    samples: list[tuple[str, str]] = []
    ignored = [_relative(entry.path, root) for entry in entries if not _is_folder(entry)]
    for entry in classes:
        found, strays = (_find_clips if clips else _find_images)(entry.path)
        ignored += [_relative(path, root) for path in strays]
        if not found:
            raise DatasetError(_explain_empty_class(entry.path, strays, clips))
        ordered = sorted((_relative(path, root) for path in found), key=lambda path: path.rpartition("/")[::2])
        samples += [(path, entry.name) for path in ordered]
    return samples, ignored


def _find_images(folder: str) -> tuple[list[str], list[str]]:
    """Paths of the image files under a class folder, and of all other files."""
    found: list[str] = []
    strays: list[str] = []
    for path in _walk(folder, set()):
        (found if is_image_name(os.path.basename(path)) else strays).append(path)  # noqa: PTH119
    return found, strays


def _find_clips(folder: str) -> tuple[list[str], list[str]]:
    """Paths of the video files and folders of frames under a class folder, and of files that are no part of one."""
    found: dict[str, None] = {}  # an ordered set: a folder is met once for each of its frames
    strays: list[str] = []
    for path in _walk(folder, set()):
        parent, name = os.path.split(path)
        if is_clip_name(name):
            found[path] = None
        elif is_image_name(name) and parent != folder:
            found[parent] = None
        else:
            strays.append(path)
    return list(found), strays


def _explain_empty_class(folder: str, strays: Sequence[str], clips: bool) -> str:
    """What to say of a class folder that has no sample, only these files."""
    names = [os.path.basename(path) for path in strays]  # noqa: PTH119
    if not clips:
        expected = f"class folder {folder} has no images: expected files ending in {' '.join(IMAGE_EXTENSIONS)}"
        if videos := sum(map(is_clip_name, names)):
            return f"{expected}, found {videos} that look like video files; use a video backbone such as r3d_18"
        return f"{expected}; fill it or remove it"
    expected = (
        f"class folder {folder} has no clips: expected video files ending in {' '.join(CLIP_EXTENSIONS)} or folders "
        f"of frames ({folder}/<clip>/<image>)"
    )
    if images := sum(map(is_image_name, names)):
        return (
            f"{expected}, found {images} images directly in it; use an image backbone such as resnet18, or put the "
            f"frames of each clip into a folder of its own"
        )
    return f"{expected}; fill it or remove it"


def list_images(folder: Path) -> list[str]:
    """Paths of the image files anywhere under a folder, sorted, the folder's own path in front."""
    return sorted(path for path in _walk(str(folder), set()) if is_image_name(Path(path).name))


def list_clips(folder: Path) -> list[str]:
    """Paths of the clips anywhere under a folder, sorted, the folder's own path in front.

    They are its video files and its folders of frames; a folder that directly holds images is such a one itself.
    """
    found, strays = _find_clips(str(folder))
    is_clip = any(is_image_name(os.path.basename(path)) for path in strays)  # noqa: PTH119
    return sorted([str(folder), *found] if is_clip else found)


def list_frames(folder: Path | str) -> list[str]:
    """Names of the image files directly in a folder, in natural order: frame2 before frame10."""
    names = (entry.name for entry in _sorted_entries(folder) if not _is_folder(entry))
    return sorted(filter(is_image_name, names), key=make_natural_key)


def make_natural_key(name: str) -> tuple[list[str | int], str]:
    """What to sort names by so that the numbers in them count as numbers.

    >>> sorted(["f10.jpg", "f2.jpg", "f1.jpg", "f02.jpg"], key=make_natural_key)
    ['f1.jpg', 'f02.jpg', 'f2.jpg', 'f10.jpg']
    """
    pieces = re.split("([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


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


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its ending, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_clip_name(name: str) -> bool:
    """Whether a file of this name is taken for a clip: by its ending, and not hidden."""
    return name.lower().endswith(CLIP_EXTENSIONS) and not name.startswith(".")


def name_sample(clips: bool) -> str:
    """What one sample is called in messages."""
    return "clip" if clips else "image"


def is_validation(digest: str, val_fraction: float, seed: int) -> bool:
    """Whether an image belongs to the validation split, from its content alone.

    The digest and the seed are hashed to a number in [0, 1); below `val_fraction` is validation. No other image has a
    say, so the answer is the same on every machine and stays when images are added, and equal bytes never end up on
    both sides. (A split that never changes for old images cannot do better: it must decide on each image by itself, so
    the share of a class is `val_fraction` only on average.)
    """
    return _position(digest, seed) < val_fraction


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


def _position(digest: str, seed: int | str) -> float:
    return int(hash_bytes(f"{seed}:{digest}".encode())[:13], 16) / 16**13


def split_by_content(
    rows: Split, classes: Sequence[str], where: str, val_fraction: float, seed: int, noun: str = "image"
) -> dict[str, Split]:
    """Train and validation rows, stratified in expectation, and by force where a class would have no image in one.

    That image is the class's lowest (or highest) in the hash order, so it too changes only if a new image takes the
    place.

    Parameters
    ----------
    rows
        All of them.
    classes
        Names of the classes.
    where
        What they are the rows of, for the error message.
    val_fraction, seed
        As of `is_validation`.

    Raises
    ------
    DatasetError
        If a class has less than two rows.
    """
    position = np.array([_position(digest, seed) for digest in rows.digests])
    validation = position < val_fraction
    for label, name in enumerate(classes):
        members = np.flatnonzero(rows.labels == label)
        if len(members) < 2:
            raise DatasetError(
                f"class {name} of {where} has {len(members)} usable {noun}: expected at least 2, one to train on and "
                f"one to validate; add {noun}s"
            )
        if not validation[members].any():
            validation[position == position[members].min()] = True
        if validation[members].all():
            validation[position == position[members].max()] = False
    return {"train": rows.take(~validation), "val": rows.take(validation)}


def hold_out(rows: Split, classes: Sequence[str], share: float, seed: int) -> tuple[Split, Split]:
    """Rows to train on, and others of the same split to choose by: so much of each class, but never all of it.

    Which, the images' contents and the seed say; equal bytes stay together. It says nothing of the validation split:
    other numbers are drawn for it.

    Raises
    ------
    DatasetError
        If no class has two images that differ.
    """
    position = np.array([_position(digest, f"holdout {seed}") for digest in rows.digests])
    held = np.zeros(len(rows), dtype=bool)
    for label in range(len(classes)):
        members = np.flatnonzero(rows.labels == label)
        if n := round(share * len(members)):
            held[members] = position[members] <= np.sort(position[members])[n - 1]
            if held[members].all():
                held[members] = position[members] < position[members].max()
    if not held.any():  # a few images of each: one of the largest class
        largest = np.argsort(-np.bincount(rows.labels, minlength=len(classes)), kind="stable")
        members = np.flatnonzero(rows.labels == largest[0])
        held[members] = (position[members] == position[members].min()) & (position[members] < position[members].max())
    if not held.any():
        raise DatasetError(
            "no class has two training images that differ, so none can be held out to choose the epoch by; add images, "
            "or keep the last epoch with --select-on none"
        )
    return rows.take(~held), rows.take(held)


def _hash_rows(
    root: Path,
    files: dict[str, list[tuple[str, str]]],
    classes: tuple[str, ...],
    progress: Progress,
    known: KnownFiles | None,
    keep: Callable[[Stats, Digests], None] | None,
    clips: bool,
) -> tuple[dict[str, Split], list[BadImage]]:
    paths = [path for rows in files.values() for path, _ in rows]
    full = [os.path.join(root, path) for path in paths]  # noqa: PTH118 - 100,000 Path objects cost half a second
    stats, digests, reasons = hash_files(full, known=known, keep=keep, progress=progress, clips=clips)
    bad = [BadImage(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    splits, start = {}, 0
    label_of = {name: label for label, name in enumerate(classes)}
    for name, rows in files.items():
        good = [i for i in range(start, start + len(rows)) if not reasons[i]]
        splits[name] = Split(
            paths=tuple(paths[i] for i in good),
            labels=np.array([label_of[rows[i - start][1]] for i in good], dtype=np.int64),
            digests=tuple(digests[i] for i in good),
            stats=stats[good],
        )
        start += len(rows)
    return splits, bad


def hash_files(
    paths: Sequence[str],
    *,
    known: KnownFiles | None = None,
    keep: Callable[[Stats, Digests], None] | None = None,
    progress: Progress = SILENT,
    clips: bool = False,
) -> tuple[Stats, list[str], list[str]]:
    """SHA-256 of files, or clips, read where nothing is known of them.

    Parameters
    ----------
    paths
        N files.
    known, keep, progress, clips
        As in `list_dataset`.

    Returns
    -------
    stats
        (N, 4) int64, zeros for a file that might have changed since unnoticed.
    digests
        N, in hexadecimal; "" for a file that cannot be used.
    reasons
        N, why it cannot; "" if it can.
    """
    stats, reasons = _look_at_all(paths, clips)
    digests = known.find(stats) if known else [""] * len(paths)
    todo = [i for i in range(len(paths)) if not digests[i] and not reasons[i]]
    for i, (digest, stats[i], reason) in zip(todo, _hash_all(paths, todo, progress, keep, clips), strict=True):
        digests[i], reasons[i] = digest, reason
    return stats, digests, reasons


def _look_at_all(paths: Sequence[str], clips: bool = False) -> tuple[Stats, list[str]]:
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
    text = canonical_json([list(names), [list(values) for values in stats]])
    first, second, third = np.frombuffer(hashlib.sha256(text.encode()).digest()[:24], "<u8") >> 1
    return int(first), sum(values[STATS.index("st_size")] for values in stats), int(second), int(third)


def _pick_stats(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino & (2**63 - 1), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hash_all(
    paths: Sequence[str],
    rows: Sequence[int],
    progress: Progress,
    keep: Callable[[Stats, Digests], None] | None,
    clips: bool,
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Digest, stats that prove it later (or zeros) and reason of failure of each of `rows`."""
    fresh: list[tuple[tuple[int, ...], bytes]] = []
    kept = time.monotonic()

    def keep_fresh() -> None:
        if keep is not None and fresh:
            keep(np.array([values for values, _ in fresh], np.int64), np.array([digest for _, digest in fresh], "S64"))
            fresh.clear()

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        answers = pool.map(_try_hash_clip if clips else _try_hash, (paths[i] for i in rows))
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


def hash_clip(path: Path | str) -> str:
    """Digest of a clip as its listing has it: of a video file its bytes', of a folder its frames' names and digests.

    A folder's is the SHA-256 of the lines that `sha256sum` prints of its frames in their order.

    Raises
    ------
    ImageError
        If a file cannot be read.
    """
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


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files under `folder`; links to folders are followed once, so that a loop of links ends."""
    status = os.stat(folder)  # noqa: PTH116 - as above
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in _sorted_entries(folder):
        if _is_folder(entry):
            if not _is_hidden(entry):
                yield from _walk(entry.path, seen)
        else:
            yield entry.path


def _sorted_entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"cannot look into {folder}: {error.strerror or error}") from error


def _has_folders(folder: Path) -> bool:
    return any(_is_folder(entry) and not _is_hidden(entry) for entry in _sorted_entries(folder))


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is not to be looked into: a hidden one, or parts of a cache made among the images."""
    if entry.name.endswith((".h5.parts", ".hdf5.parts", ".he5.parts")):
        return True
    if entry.name.endswith(".parts"):
        names = os.listdir(entry.path)  # noqa: PTH208 - as above
        return bool(names) and all(name.lstrip(".").startswith(("rows-", "files-")) for name in names)
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder to look into: a link that leads upwards is not, or it would hold itself."""
    try:
        return entry.is_dir() and not (entry.is_symlink() and _leads_upwards(Path(entry.path)))
    except OSError:  # a link to itself
        return False


def _leads_upwards(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())


def _name_some(names: Sequence[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _relative(path: str, root: Path) -> str:
    """A path under `root` relative to it, with "/"."""
    start = 0 if str(root) == "." and not path.startswith("./") else len(os.path.join(root, ""))  # noqa: PTH118
    return path[start:].replace(os.sep, "/")
