"""Pretrained networks by name: name + weights -> a frozen Backbone with its own preprocessing, width and fingerprint.

One module per family (`Family` says what it answers); this one finds the right family and freezes what it makes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.backbones import efficientnet_lite, torchvision
from featcache.backbones.base import Backbone, Family, hash_tensors
from featcache.backbones.weights import fit_weights, read_weights
from featcache.errors import BackboneError
from featcache.images import Preprocessing

__all__ = [
    "FAMILIES",
    "Backbone",
    "attach_classifier",
    "describe_preprocessing",
    "list_backbones",
    "load_backbone",
]

FAMILIES: tuple[Family, ...] = (torchvision, efficientnet_lite)


def list_backbones() -> list[str]:
    """Names of all backbones."""
    return [name for family in FAMILIES for name in family.list_names()]


def load_backbone(name: str, *, weights: str = "default", seed: int = 0) -> Backbone:
    """Make a frozen backbone.

    Parameters
    ----------
    name
        One of `list_backbones`.
    weights
        "default", "none" (random, made from `seed`), or the path of a state dict, with or without the classifier.
    seed
        Of random weights.

    Returns
    -------
    Backbone
        In evaluation mode, without gradients, its classifier removed.

    Raises
    ------
    BackboneError
        If the name is unknown; its children if the weights are unavailable, unreadable or do not fit.
    MissingExtraError
        If an optional package is needed.

    Examples
    --------
    >>> backbone = load_backbone("resnet18", weights="none")
    >>> backbone.width
    512
    """
    family = find_family(name)
    network = _make_seeded(lambda: family.make_network(name), seed)
    classifier = family.name_classifier(name)
    requested = weights if weights in ("default", "none") else str(Path(weights).resolve())
    description: dict[str, Any] = {"requested": requested, "name": f"random, seed {seed}", "sha256": None}
    if weights == "none":
        description["seed"] = seed
    else:
        file = family.read_default_weights(name) if weights == "default" else read_weights(Path(weights))
        fit_weights(network, file.tensors, classifier=classifier, where=file.name)
        description.update(name=file.name, sha256=file.sha256)
    removed = network.get_submodule(classifier)
    if not isinstance(removed, nn.Linear):
        raise BackboneError(f"{name}: its last layer {classifier} is {type(removed).__name__}, expected Linear")
    _set_submodule(network, classifier, nn.Identity())
    network.eval().requires_grad_(False)  # NOTE: eval() before features, or BatchNorm drifts
    description["tensors_sha256"] = hash_tensors(network.state_dict())
    return Backbone(
        name=name,
        network=network,
        classifier=classifier,
        width=removed.in_features,
        preprocessing=family.describe_preprocessing(name),
        weights=description,
        batch_norm=family.describe_batch_norm(name),
        make_classifier=lambda n_classes: nn.Linear(removed.in_features, n_classes),
    )


def describe_preprocessing(name: str) -> Preprocessing:
    """The preprocessing that belongs to a backbone's default weights, without making the network."""
    return find_family(name).describe_preprocessing(name)


def find_family(name: str) -> Family:
    """The family that has a network of this name.

    Raises
    ------
    BackboneError
        If there is none; the message suggests the nearest name.
    """
    for family in FAMILIES:
        if name in family.list_names():
            return family
    near = difflib.get_close_matches(name, list_backbones(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BackboneError(f"unknown backbone {name!r}: {hint}There are {', '.join(list_backbones())}")


def attach_classifier(backbone: Backbone, classifier: nn.Module) -> nn.Module:
    """The whole network, (B, 3, H, W) -> (B, n_classes): the backbone with a last layer put where it was removed.

    The backbone's own network is changed: it gives logits from here on.
    """
    _set_submodule(backbone.network, backbone.classifier, classifier)
    return backbone.network


def _make_seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
