"""Folders of classes -> the names of their images, or clips, on a disk or in a list of names. Reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from featcache.dataset.listing import SPLITS, name_sample
from featcache.errors import DatasetError

# torchvision.datasets.folder.IMG_EXTENSIONS, written out because importing it costs seconds; a test compares the two.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
CLIP_EXTENSIONS = (*VIDEO_EXTENSIONS, ".gif")
PART_NAMES = ("rows-", "files-", "job-", "bad-", "done-")  # what files in a folder of parts begin with


class Entry(NamedTuple):
    """What lies in a folder: its name, its whole path, and whether it is a folder to look into."""

    name: str
    path: str
    is_folder: bool


class Places(Protocol):
    """Where folders are looked up."""

    def list(self, folder: str) -> list[Entry]:
        """What lies directly in a folder, sorted by name."""

    def identify(self, folder: str) -> Hashable:
        """The same for the same folder under another name."""

    def has(self, folder: str) -> bool:
        """Whether there is such a folder."""

    def join(self, folder: str, name: str) -> str:
        """The path of a name in a folder."""


class Disk:
    """The file system."""

    def list(self, folder: str) -> list[Entry]:
        """What lies directly in a folder, sorted by name.

        Raises
        ------
        DatasetError
            If it cannot be looked into.
        """
        try:
            with os.scandir(folder) as entries:
                return sorted(Entry(entry.name, entry.path, _is_folder(entry)) for entry in entries)
        except (OSError, ValueError) as error:  # a ValueError of what cannot be a name
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"cannot look into {folder}: {reason}") from error

    def identify(self, folder: str) -> Hashable:
        """Device and inode."""
        status = os.stat(folder)  # noqa: PTH116 - 100,000 Path objects cost half a second
        return status.st_dev, status.st_ino

    def has(self, folder: str) -> bool:
        """Whether there is such a folder."""
        return os.path.isdir(folder)  # noqa: PTH112 - as above

    def join(self, folder: str, name: str) -> str:
        """The path of a name in a folder."""
        return str(Path(folder, name))


class Tree:
    """Folders that are nothing but parts of their files' names, as object stores have them.

    Parameters
    ----------
    root
        What all names are relative to, without a slash at its end.
    names
        Of files, with "/"; one that ends in "/" is a mark that stands for a folder.
    """

    def __init__(self, root: str, names: Iterable[str]) -> None:
        self._files: dict[str, list[str]] = {}
        self._folders: dict[str, dict[str, None]] = {root: {}}
        for name in names:
            parent, _, own = name.rpartition("/")
            folder = f"{root}/{parent}" if parent else root
            if folder not in self._folders:
                self._add_folder(root, parent)
            if own:
                self._files.setdefault(folder, []).append(own)

    def _add_folder(self, root: str, path: str) -> None:
        folder = root
        for part in path.split("/"):
            self._folders[folder][part] = None
            folder = f"{folder}/{part}"
            self._folders.setdefault(folder, {})

    def list(self, folder: str) -> list[Entry]:
        """What lies directly in a folder, sorted by name."""
        folders = [Entry(name, f"{folder}/{name}", is_folder=True) for name in self._folders.get(folder, ())]
        return sorted(folders + [Entry(name, f"{folder}/{name}", False) for name in self._files.get(folder, ())])

    def identify(self, folder: str) -> Hashable:
        """Its path: it has no other."""
        return folder

    def has(self, folder: str) -> bool:
        """Whether there is such a folder."""
        return folder in self._folders

    def join(self, folder: str, name: str) -> str:
        """The path of a name in a folder."""
        return f"{folder}/{name}"


DISK = Disk()


def find_files(
    root: Path | str, clips: bool, places: Places = DISK
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """(path, class) of the samples in each split folder, paths of what is ignored; without splits all is in ""."""
    root = str(root)
    names = find_split_folders(root, places)
    folders = {name: places.join(root, name) for name in names} if names else {"": root}
    files: dict[str, list[tuple[str, str]]] = {}
    ignored: list[str] = []
    for name, folder in folders.items():
        files[name], strays = list_class_folders(root, folder, clips, places)
        ignored += strays
    if names:
        ignored += [
            entry.name + ("/" if entry.is_folder else "") for entry in places.list(root) if entry.name not in names
        ]
    return files, ignored


def find_split_folders(root: str, places: Places = DISK) -> list[str]:
    """Names of the split folders under `root`, or none if its folders are classes.

    Raises
    ------
    DatasetError
        If there is a train folder without a val folder, or the other way round.
    """
    present = [name for name in SPLITS if places.has(places.join(root, name))]
    split = {"train", "val"} <= set(present) or any(_has_folders(places.join(root, name), places) for name in present)
    if not split:
        return []
    for name in ("train", "val"):
        if name not in present:
            there = ", ".join(entry.name for entry in places.list(root) if entry.is_folder)
            train, val, one = (places.join(root, part) for part in ("train", "val", present[0]))
            raise DatasetError(
                f"{root} has no {name} folder: expected {train} and {val}, found {there}; rename or add it, or name a "
                f"folder of classes (such as {one}) to have it split for you"
            )
    return present


def list_class_folders(
    root: Path | str, folder: Path | str, clips: bool = False, places: Places = DISK
) -> tuple[list[tuple[str, str]], list[str]]:
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
    root, folder = str(root), str(folder)
    entries = places.list(folder)
    classes = [entry for entry in entries if entry.is_folder and not _is_hidden(entry, places)]
    if not classes:
        noun, is_sample = name_sample(clips), is_clip_name if clips else is_image_name
        loose = sum(is_sample(entry.name) for entry in entries)
        raise DatasetError(
            f"{folder} has no class folders: expected {folder}/<class>/<{noun}>, found "
            f"{f'{loose} {noun}s directly in it' if loose else 'no folders'}; put each class into a folder of its own"
        )
    samples: list[tuple[str, str]] = []
    ignored = [_relative(entry.path, root) for entry in entries if not entry.is_folder]
    for entry in classes:
        found, strays = (_find_clips if clips else _find_images)(entry.path, places)
        ignored += [_relative(path, root) for path in strays]
        if not found:
            raise DatasetError(_explain_empty_class(entry.path, strays, clips))
        ordered = sorted((_relative(path, root) for path in found), key=lambda path: path.rpartition("/")[::2])
        samples += [(path, entry.name) for path in ordered]
    return samples, ignored


def _find_images(folder: str, places: Places = DISK) -> tuple[list[str], list[str]]:
    """Paths of the image files under a class folder, and of all other files."""
    found: list[str] = []
    strays: list[str] = []
    for path in _walk(folder, set(), places):
        (found if is_image_name(os.path.basename(path)) else strays).append(path)  # noqa: PTH119
    return found, strays


def _find_clips(folder: str, places: Places = DISK) -> tuple[list[str], list[str]]:
    """Paths of the video files and folders of frames under a class folder, and of files that are no part of one."""
    found: dict[str, None] = {}  # an ordered set: a folder is met once for each of its frames
    strays: list[str] = []
    for path in _walk(folder, set(), places):
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


def list_images(folder: Path | str, places: Places = DISK) -> list[str]:
    """Paths of the image files anywhere under a folder, sorted, the folder's own path in front."""
    return sorted(path for path in _walk(str(folder), set(), places) if is_image_name(os.path.basename(path)))  # noqa: PTH119


def list_clips(folder: Path) -> list[str]:
    """Paths of the clips anywhere under a folder, sorted, the folder's own path in front.

    They are its video files and its folders of frames; a folder that directly holds images is such a one itself.
    """
    found, strays = _find_clips(str(folder))
    is_clip = any(is_image_name(os.path.basename(path)) for path in strays)  # noqa: PTH119
    return sorted([str(folder), *found] if is_clip else found)


def list_frames(folder: Path | str) -> list[str]:
    """Names of the image files directly in a folder, in natural order: frame2 before frame10."""
    names = (entry.name for entry in DISK.list(str(folder)) if not entry.is_folder)
    return sorted(filter(is_image_name, names), key=make_natural_key)


def make_natural_key(name: str) -> tuple[list[str | int], str]:
    """What to sort names by so that the numbers in them count as numbers.

    >>> sorted(["f10.jpg", "f2.jpg", "f1.jpg", "f02.jpg"], key=make_natural_key)
    ['f1.jpg', 'f02.jpg', 'f2.jpg', 'f10.jpg']
    """
    pieces = re.split("([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its ending, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_clip_name(name: str) -> bool:
    """Whether a file of this name is taken for a clip: by its ending, and not hidden."""
    return name.lower().endswith(CLIP_EXTENSIONS) and not name.startswith(".")


def _walk(folder: str, seen: set[Hashable], places: Places) -> Iterator[str]:
    """Files under `folder`; links to folders are followed once, so that a loop of links ends."""
    identity = places.identify(folder)
    if identity in seen:
        return
    seen.add(identity)
    for entry in places.list(folder):
        if not entry.is_folder:
            yield entry.path
        elif not _is_hidden(entry, places):
            yield from _walk(entry.path, seen, places)


def _has_folders(folder: str, places: Places) -> bool:
    return any(entry.is_folder and not _is_hidden(entry, places) for entry in places.list(folder))


def _is_hidden(entry: Entry, places: Places) -> bool:
    """Whether a folder is not to be looked into: a hidden one, or parts of a cache made among the images."""
    if entry.name.endswith((".h5.parts", ".hdf5.parts", ".he5.parts")):
        return True
    if entry.name.endswith(".parts"):
        names = [one.name.lstrip(".") for one in places.list(entry.path)]
        return bool(names) and all(name.startswith(PART_NAMES) for name in names)
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder to look into: a link that leads upwards is not, or it would hold itself."""
    try:
        return entry.is_dir() and not (entry.is_symlink() and _leads_upwards(Path(entry.path)))
    except OSError:  # a link to itself
        return False


def _leads_upwards(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())


def _relative(path: str, root: str) -> str:
    """A path under `root` relative to it, with "/"."""
    start = 0 if root == "." and not path.startswith("./") else len(os.path.join(root, ""))  # noqa: PTH118
    return path[start:].replace(os.sep, "/")
