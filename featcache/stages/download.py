"""Fetch a public data set: with progress, verified image by image, and in place only when whole."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from featcache import files
from featcache.dataset import is_image_name, list_dataset, list_images
from featcache.errors import DownloadError, OutputError, SettingsError
from featcache.fetching import fetch_file
from featcache.progress import SILENT, Progress

MAX_UNPACKED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PublicDataset:
    """Where a data set is, and what it must be.

    Attributes
    ----------
    url
        A zip archive.
    folder
        The folder inside it that holds train and val.
    n_images
        Images in all.
    digest
        `digest_images` of them.
    """

    url: str
    folder: str
    n_images: int
    digest: str


DATASETS = {
    "hymenoptera": PublicDataset(
        url="https://download.pytorch.org/tutorial/hymenoptera_data.zip",
        folder="hymenoptera_data",
        n_images=397,
        digest="ed5c29da93340c525d6a6a72edd8db3c804cf9899d946fc2ac967955741824c0",
    ),
}


def download_dataset(name: str, folder: Path | str, *, url: str | None = None, progress: Progress = SILENT) -> Path:
    """Download a public data set into a folder, unless it is there already.

    Parameters
    ----------
    name
        "hymenoptera": 244 + 153 photographs of ants and bees, the data of PyTorch's transfer-learning tutorial.
    folder
        Where to; afterwards it holds train and val.
    url
        Another place that has the same archive.
    progress
        Told what is being done.

    Returns
    -------
    The folder.

    Raises
    ------
    SettingsError
        If the name is unknown.
    DownloadError
        If the archive cannot be fetched, is unsafe to unpack, or its images are not the expected ones.
    OutputError
        If the folder holds something else, or cannot be written.
    """
    if name not in DATASETS:
        raise SettingsError(f"unknown data set {name!r}: there is {', '.join(DATASETS)}")
    dataset, folder = DATASETS[name], Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if folder.is_dir() and digest_images(folder) == dataset.digest:
            progress.say(f"{folder} holds {name} already, all {dataset.n_images} images verified")
            return folder
        raise OutputError(f"{folder} is there and is not {name}; choose another place, or remove it")
    files.check_folder_writable(folder.parent, folder)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        archive = fetch_archive(url or dataset.url, folder, Path(temporary), progress)
        with files.fill_folder(folder) as unpacked:
            unpack(archive, dataset.folder, unpacked)
            if (found := digest_images(unpacked)) != dataset.digest:
                raise DownloadError(
                    f"{url or dataset.url} is not the expected data: {len(list_images(unpacked))} images with digest "
                    f"{found[:12]}..., expected {dataset.n_images} with {dataset.digest[:12]}...; nothing was kept"
                )
    listing = list_dataset(folder)
    progress.say(f"{folder}: {len(listing)} images, each verified")
    return folder


def digest_images(folder: Path) -> str:
    r"""SHA-256 over the lines "digest  path" of all images, sorted by path: what `sha256sum` prints.

    The same in a shell, inside the folder::

        find train val -iname '*.jp*g' | LC_ALL=C sort | tr '\n' '\0' | xargs -0 sha256sum | sha256sum
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_image_name(path.name))
    lines = "".join(f"{files.hash_file(folder / path)}  {path}\n" for path in paths)
    return files.hash_bytes(lines.encode())


def fetch_archive(url: str, folder: Path, temporary: Path, progress: Progress) -> Path:
    """Download the archive of a data set into `temporary`; an unfinished one stays beside `folder`.

    Raises
    ------
    DownloadError
        If it cannot be had.
    """
    part_path = folder.parent / f".{folder.name}.zip.part"
    try:  # no digest: every image is verified after unpacking
        return fetch_file(url, temporary / "archive.zip", sha256=None, part_path=part_path, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{error}; fetch it by hand and unpack it, or `featcache sample digits DIR` needs no network"
        ) from error


def unpack(archive: Path, inside: str, target: Path) -> None:
    """Unpack one folder of a zip archive into `target`.

    Raises
    ------
    DownloadError
        If it is not a zip archive, holds a path that leads out of it, or more than `MAX_UNPACKED_BYTES`.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            check_members(members)
            for member in members:
                path = Path(member.filename)
                if member.is_dir() or path.parts[0] != inside:
                    continue
                destination = target.joinpath(*path.parts[1:])
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(packed.read(member))
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{archive.name} is not a whole zip archive ({error}); try again") from error


def check_members(members: list[zipfile.ZipInfo]) -> None:
    """Raise a DownloadError if unpacking these would write outside of the target, make links, or fill the disk."""
    for member in members:
        path = Path(member.filename)
        is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename or is_link:
            raise DownloadError(f"the archive holds an unsafe path, {member.filename!r}; nothing was unpacked")
    if (size := sum(member.file_size for member in members)) > MAX_UNPACKED_BYTES:
        raise DownloadError(f"the archive unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
