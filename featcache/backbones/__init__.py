"""Pretrained networks by name: name + weights + layers -> a frozen Backbone with its own preprocessing and fingerprint.

================  ==================================================================================================
name              where it is from
================  ==================================================================================================
resnet18, ...     torchvision: classification models, trunks of dense models, video models (`torchvision`)
efficientnet_...  the package index: EfficientNet-Lite0 with its weights (`efficientnet_lite`)
timm:NAME         timm (`timm`)
onnx:FILE         any network exported to ONNX (`onnx`)
module:FUNCTION   the user's own code (`module`)
================  ==================================================================================================

`base` says what a family answers, `families` which one has a name, `weights` how tensors are read from files,
`structure` what a network tells of itself, `layers` how any layer becomes features, `freezing` makes a backbone of all
that, and `catalogue` lists what there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones import efficientnet_lite, module, onnx, timm, torchvision
from featcache.backbones.base import Backbone, Family, WeightsEntry, WeightsFile
from featcache.backbones.code import hash_code
from featcache.backbones.families import choose_weights, find_family, find_trunk, list_backbones
from featcache.backbones.freezing import fingerprint, freeze_network, is_foreign
from featcache.backbones.layers import Pick
from featcache.backbones.structure import set_submodule
from featcache.errors import BackboneError, SettingsError
from featcache.preprocessing import InputFormat, Preprocessing
from featcache.progress import SILENT, Progress

__all__ = [
    "Backbone",
    "Family",
    "Pick",
    "WeightsEntry",
    "attach_classifier",
    "check_known",
    "check_trainable",
    "check_unchanged",
    "describe_preprocessing",
    "list_backbones",
    "load_backbone",
    "remake_backbone",
    "wrap_network",
]


def load_backbone(
    name: str,
    *,
    weights: str = "default",
    seed: int = 0,
    layer: str | Sequence[str] = (),
    pool: str | None = None,
    images: InputFormat | None = None,
    progress: Progress = SILENT,
) -> Backbone:
    """Make a frozen backbone.

    Parameters
    ----------
    name
        One of `list_backbones`, "timm:NAME", "onnx:FILE" or "module:PACKAGE.FUNCTION".
    weights
        "default", "none" (random, made from `seed`), a name that the family knows (such as "IMAGENET1K_V2"), the path
        of a state dict or training checkpoint, or https://...#sha256=...
    seed
        Of random weights.
    layer
        Layers whose outputs are the features, "NAME" or "NAME:POOL"; none is what goes into the classifier.
    pool
        How a map becomes a vector: "avg", "max", "flatten" or "cls".
    images
        What the network wants, where it is not what belongs to the weights.
    progress
        Told of downloads, and of the user's code that is run.

    Returns
    -------
    Backbone
        In evaluation mode, without gradients, its classifier removed.

    Raises
    ------
    BackboneError
        If the name or a layer is unknown; its children if the weights are unavailable, unreadable or do not fit.
    MissingExtraError
        If an optional package is needed.

    Examples
    --------
    >>> backbone = load_backbone("resnet18", weights="none")
    >>> backbone.width
    512
    >>> load_backbone("resnet18", weights="none", layer=["layer3:avg", "layer4:avg"]).width
    768
    """
    family, plain = find_family(name)
    if family is module:
        progress.say(f"{name} runs your own code")
    layer = (layer,) if isinstance(layer, str) else tuple(layer)
    check_layout(name, family, images)
    chosen = choose_weights(family, name, plain, weights, progress)
    options = family.list_options(plain, chosen.entry) | make_options(images)
    network = _make_seeded(lambda: family.make_network(plain, options), seed)
    if family is module:
        options["code_sha256"] = hash_code(network)
    if isinstance(network, onnx.OnnxNetwork):
        options["layout"] = network.layout  # wherever it was said: beside the file it may be said otherwise tomorrow
        if not layer:
            progress.say(f"{name}: the features are its output; `featcache backbones {name}` lists others for --layer")
    description: dict[str, Any] = {"requested": chosen.requested, "name": f"random, seed {seed}", "sha256": None}
    if chosen.file is None:
        description["seed"] = seed
    else:
        description.update(name=chosen.file.name, sha256=chosen.file.sha256 or None)
    suggested = family.describe_input(plain, chosen.entry, network)
    backbone = freeze_network(
        network,
        name=name,
        file=chosen.file,
        weights=description,
        preprocessing=make_preprocessing(name, images, suggested),
        options=options,
        trunk=find_trunk(family, plain, network),
        layer=layer,
        pool=pool,
        verify=family is module,
    )
    return replace(backbone, files=list_files(family, chosen.file))


def list_files(family: Family, file: WeightsFile | None) -> tuple[Path, ...] | None:
    """All files that decided a backbone beside those of packages; None where its own code did."""
    if family not in (torchvision, efficientnet_lite, timm, onnx):
        return None
    return file.paths if file else ()


def check_known(name: str) -> None:
    """Raise a BackboneError if there is no backbone of this name, or no such file."""
    family, plain = find_family(name)
    if family is onnx:
        onnx.check_file(plain)


def check_unchanged(backbone: Backbone) -> None:
    """Raise a BackboneError if a network was trained, or changed otherwise, since it was made a backbone."""
    if not is_foreign(backbone.network) and fingerprint(backbone.network) != backbone.network_sha256:
        raise BackboneError(f"the weights or code of {backbone.name} have changed since it was wrapped; wrap it again")


def check_layout(name: str, family: Family, images: InputFormat | None) -> None:
    """Raise a SettingsError if a layout is stated for a network that has no choice."""
    if images and images.layout and family is not onnx:
        raise SettingsError(f"--layout {images.layout} is for onnx:FILE; {name} takes its images as torch has them")


def make_options(images: InputFormat | None) -> dict[str, Any]:
    """Options of the network itself that come from how its images look."""
    return {"layout": images.layout} if images and images.layout else {}


def make_preprocessing(name: str, images: InputFormat | None, suggested: InputFormat) -> Preprocessing:
    """What is stated, over what belongs to the weights.

    Raises
    ------
    BackboneError
        If something is known from neither.
    """
    merged = (images or InputFormat()).over(suggested)
    if missing := merged.list_missing():
        beside = (
            f", or put them into {Path(name.partition(':')[2]).with_suffix('.json')}"
            if name.startswith("onnx:")
            else ""
        )
        raise BackboneError(
            f"{name} does not say what its images must look like: give {' and '.join(missing)} (--mean 0 --std 1 for "
            f"plain pixels in [0, 1]; --scale 255 if they go to 255){beside}"
        )
    n_usual, n_wanted = len(suggested.mean or (0,)), len(merged.channels or "RGB")
    if images and images.channels and images.mean is None and n_usual not in (1, n_wanted):
        raise SettingsError(
            f"--channels {images.channels} needs its own --mean and --std: those of {name} are for {n_usual} channels"
        )
    return merged.make_preprocessing()


def remake_backbone(
    extractor: Mapping[str, Any], *, with_weights: bool = True, progress: Progress = SILENT
) -> Backbone:
    """The backbone that a description (see `Backbone.describe`) is of, with the same layers and preprocessing.

    Parameters
    ----------
    extractor
        The description.
    with_weights
        Put its weights in; random ones otherwise, for a caller who has others.
    progress
        As in `load_backbone`.

    Raises
    ------
    BackboneError
        If it cannot be made again.
    """
    family, plain = find_family(extractor["backbone"])
    described, options = extractor["weights"], dict(extractor.get("options", {}))
    requested = described["requested"]
    if family is onnx:
        plain, requested = requested, "default"  # where the file was, whatever folder this is
    seed = int(described.get("seed") or 0)
    if family is module:
        progress.say(f"{extractor['backbone']} runs your own code")
    file = None
    if with_weights:
        file = choose_weights(family, extractor["backbone"], plain, requested, progress).file
    network = _make_seeded(lambda: family.make_network(plain, options), seed)
    if family is module and hash_code(network) != options["code_sha256"]:
        raise BackboneError(f"the code of {extractor['backbone']} has changed since; bring it back, or extract again")
    backbone = freeze_network(
        network,
        name=extractor["backbone"],
        file=file,
        weights=dict(described),
        preprocessing=Preprocessing.from_json(extractor["preprocessing"]),
        options=options,
        trunk=find_trunk(family, plain, network),
        layer=[
            f"{pick['name']}:{pick['pool']}" if pick["pool"] else pick["name"] for pick in extractor.get("layers", ())
        ],
        pool=find_pool(extractor),
    )
    precision = {name: value for name, value in extractor["precision"].items() if name != "stored"}
    return replace(backbone, precision=precision)


def find_pool(extractor: Mapping[str, Any]) -> str | None:
    """The pool of features that are not of named layers, from their words."""
    words = str(extractor["layer"])
    if extractor.get("layers") or not words.endswith(")"):
        return None
    return words.rpartition("(")[2].rstrip(")")


def wrap_network(
    network: nn.Module,
    images: InputFormat | None = None,
    *,
    name: str = "",
    layer: Sequence[str] = (),
    pool: str | None = None,
) -> Backbone:
    """Make a frozen backbone of a network that you have.

    The network itself is used, frozen and without its classifier.

    Parameters
    ----------
    network
        (B, 3, H, W) float32 -> (B, D), logits or features.
    images
        What it wants; its attribute `preprocessing`, a dictionary with the names of `InputFormat`, says the rest.
    name
        What to call it; by default its class.
    layer, pool
        As in `load_backbone`.

    Raises
    ------
    BackboneError
        If it does not take such images, or its features are not vectors.

    Examples
    --------
    >>> images = InputFormat(input_size=(32, 32), mean=(0.5,), std=(0.5,))
    >>> wrap_network(nn.Sequential(nn.Flatten(), nn.Linear(3072, 16)), images).width
    3072
    """
    name = name or type(network).__name__
    preprocessing = make_preprocessing(name, images, module.read_attribute(network, name))
    return freeze_network(
        network,
        name=name,
        file=None,
        weights={"requested": "given", "name": "given in Python", "sha256": None},
        preprocessing=preprocessing,
        options={"code_sha256": hash_code(network)},
        layer=layer,
        pool=pool,
        verify=True,
    )


def describe_preprocessing(name: str) -> Preprocessing:
    """The preprocessing that belongs to a backbone's default weights, without reading them."""
    family, plain = find_family(name)
    entries = family.list_weights(plain)
    entry = entries[0].name if entries else None
    network = family.make_network(plain, family.list_options(plain, entry))
    return make_preprocessing(name, None, family.describe_input(plain, entry, network))


def check_trainable(name: str) -> None:
    """Raise a BackboneError if a network of this name cannot be fine-tuned."""
    if name.startswith("onnx:"):
        raise BackboneError(f"{name} cannot be fine-tuned: {onnx.OBSTACLE}; use `featcache train-head` on its features")


def attach_classifier(backbone: Backbone, n_classes: int) -> tuple[nn.Module, str]:
    """The whole network, (B, 3, H, W) -> (B, n_classes), with a fresh last layer where it was removed, and its name.

    The backbone's own network is changed: it gives logits from here on. Where no layer was removed, one comes behind.

    Raises
    ------
    BackboneError
        If the network cannot be trained.
    """
    check_trainable(backbone.name)
    layer = backbone.make_classifier(n_classes)
    if not backbone.classifier:
        return nn.Sequential(OrderedDict(features=backbone.network, head=layer)), "head"
    set_submodule(backbone.network, backbone.classifier, layer)
    return backbone.network, backbone.classifier


def _make_seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
