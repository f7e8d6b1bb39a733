"""Label new image files with the classifier of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.backbones import Backbone
from featcache.bundle import load_classifier
from featcache.config import MAX_VIEWS
from featcache.dataset import is_image_name, is_url, list_clips, list_images
from featcache.dataset.remote import Anywhere, list_remote_images
from featcache.dataset.roots import check_url, strip_local
from featcache.errors import BadImage, BadImagesError, DatasetError, SettingsError
from featcache.progress import SILENT, Progress
from featcache.runs import read_record
from featcache.runtime import select_device


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image's most probable class and its probability."""

    path: str
    label: str
    probability: float


def predict(
    run: Path | str,
    images: Sequence[Path | str],
    *,
    backbone: Backbone | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    views: int | None = None,
    progress: Progress = SILENT,
) -> tuple[list[Prediction], list[BadImage]]:
    """Predict the class of image files.

    Parameters
    ----------
    run
        A run folder that `train_head` or `finetune` made.
    images
        Files, or folders, whose images are taken; local ones, or URLs.
    backbone
        The one that the run was made with, if it was given in Python (`wrap_network`).
    device, batch_size, workers
        As in `featcache.config.ExtractConfig`.
    views
        Random views of each image whose probabilities are averaged with its own, see `featcache.views`; None is as
        many as the run was judged with.
    progress
        Told what is being done.

    Returns
    -------
    predictions
        One for each usable image, in the order given.
    bad
        The files that could not be used.

    Raises
    ------
    RunError
        If the run holds no classifier, or its backbone is no longer the same.
    DatasetError
        If a path does not exist, or a folder holds no image.
    SettingsError
        If there are no so many views.
    BadImagesError
        If not one of the files can be used.

    Examples
    --------
    >>> predictions, bad = predict("runs/head", ["new.jpg"])               # doctest: +SKIP
    >>> predictions[0].label                                               # doctest: +SKIP
    'bees'
    """
    if views is not None and not 0 <= views <= MAX_VIEWS:
        raise SettingsError(f"--views is {views}: expected 0 to {MAX_VIEWS:,}")
    check_present(images)
    select_device(device)
    classifier = load_classifier(run, backbone=backbone, progress=progress)
    if views is None:
        views = int(read_record(Path(run)).details.get("test_views", 0))
        if views:
            progress.say(f"averaged over {views} views of each image, as the run was judged; --views 0 does without")
    paths = expand_paths(images, clips=classifier.preprocessing.frames > 0)
    probabilities, bad = classifier.predict_files(
        paths,
        root=Anywhere() if any(map(is_url, paths)) else Path(),
        device=select_device(device, classifier.network),
        batch_size=batch_size,
        workers=workers,
        views=views,
        progress=progress,
    )
    if len(bad) == len(paths):
        raise BadImagesError(bad, can_leave_out=False)
    predictions = [
        Prediction(path=path, label=classifier.classes[int(np.argmax(one))], probability=float(one.max()))
        for path, one in zip(paths, probabilities, strict=True)
        if np.isfinite(one).all()
    ]
    return predictions, bad


def locate(image: Path | str) -> Path | str:
    """A path of this machine, or a URL.

    Raises
    ------
    DatasetError
        If it is a URL with a password.
    """
    text = strip_local(image) if isinstance(image, str) else image
    if isinstance(text, str) and is_url(text):
        check_url(text)
        return text
    return Path(text)


def check_present(images: Sequence[Path | str]) -> None:
    """Raise a DatasetError if a local path does not exist, or is a folder without anything to predict."""
    for image in map(locate, images):
        if isinstance(image, str):
            continue
        if not image.exists():
            raise DatasetError(f"no image at {image}: expected a file, or a folder of images")
        if image.is_dir() and not list_images(image) and not list_clips(image):
            raise DatasetError(f"{image} holds no image; expected image files, or a folder of them")


def expand_paths(images: Sequence[Path | str], *, clips: bool = False) -> list[str]:
    """Files as given, and the images of folders; or their clips, of which a folder of frames is one.

    Raises
    ------
    DatasetError
        If a folder holds none.
    """
    paths: list[str] = []
    for image in map(locate, images):
        inside = [str(image)]
        if isinstance(image, str):
            if clips:
                raise DatasetError(
                    f"{image} is a URL: expected a local file of a clip, which decoders read from the disk"
                )
            inside = inside if is_image_name(image.rpartition("/")[2]) else list_remote_images(image)
        elif image.is_dir():
            inside = list_clips(image) if clips else list_images(image)
        if not inside:
            raise DatasetError(f"{image} holds no {'clip' if clips else 'image'}, which this classifier is for")
        paths += inside
    return paths
