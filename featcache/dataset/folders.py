"""Folders of classes -> the names of their images, or clips. Reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from featcache.dataset.listing import SPLITS, name_sample
from featcache.errors import DatasetError

# torchvision.datasets.folder.IMG_EXTENSIONS, written out because importing it costs seconds; a test compares the two.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
CLIP_EXTENSIONS = (*VIDEO_EXTENSIONS, ".gif")


def check_root(root: Path) -> None:
    """Raise a DatasetError if there is no folder at `root`."""
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing"
        raise DatasetError(
            f"no data set at {root}: expected a folder DATA/train/<class>/ and DATA/val/<class>/, or DATA/<class>/, "
            f"found {found}; `featcache sample digits {root}` makes one to try"
        )


def find_files(root: Path, clips: bool) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """(path, class) of the samples in each split folder, paths of what is ignored; without splits all is in ""."""
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
    return files, ignored


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


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its ending, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_clip_name(name: str) -> bool:
    """Whether a file of this name is taken for a clip: by its ending, and not hidden."""
    return name.lower().endswith(CLIP_EXTENSIONS) and not name.startswith(".")


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


def _relative(path: str, root: Path) -> str:
    """A path under `root` relative to it, with "/"."""
    start = 0 if str(root) == "." and not path.startswith("./") else len(os.path.join(root, ""))  # noqa: PTH118
    return path[start:].replace(os.sep, "/")
