"""Names and weights to families: who has a network of this name, and what `--weights` stands for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from featcache.backbones import efficientnet_lite, module, onnx, timm, torchvision
from featcache.backbones.base import Family, WeightsFile
from featcache.backbones.weights import fetch_weights, is_url, read_weights
from featcache.errors import BackboneError, WeightsError
from featcache.fetching import hide_credentials
from featcache.progress import Progress

FAMILIES: tuple[Family, ...] = (torchvision, efficientnet_lite)
PREFIXES: dict[str, Family] = {"timm": timm, "onnx": onnx, "module": module}


def list_backbones() -> list[str]:
    """Names of all backbones that need no prefix."""
    return [name for family in FAMILIES for name in family.list_names()]


def find_family(name: str) -> tuple[Family, str]:
    """The family that has a network of this name, and the name without its prefix.

    Raises
    ------
    BackboneError
        If there is none; the message suggests the nearest name.
    """
    prefix, colon, plain = name.partition(":")
    if colon and prefix in PREFIXES:
        if prefix == "timm" and not timm.has_name(plain):
            raise BackboneError(_say_unknown(name, [f"timm:{one}" for one in timm.list_names()]))
        return PREFIXES[prefix], plain
    for family in FAMILIES:
        if name in family.list_names():
            return family, name
    raise BackboneError(_say_unknown(name, list_backbones()))


def _say_unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown backbone {name!r}: {hint}`featcache backbones` lists them; also timm:NAME, onnx:FILE, module:FUNC"


class ChosenWeights(NamedTuple):
    """What `--weights` stands for: a text that means the same elsewhere, an entry of the family, tensors."""

    requested: str
    entry: str | None
    file: WeightsFile | None


def choose_weights(family: Family, name: str, plain: str, weights: str, progress: Progress) -> ChosenWeights:
    """Find and read weights.

    Raises
    ------
    WeightsError
        If there are none of that name, or they cannot be read.
    WeightsUnavailableError
        If they cannot be had.
    """
    if weights == "none":
        if family in (onnx, module):
            raise WeightsError(f"{name} has its own weights; --weights none is for networks that featcache makes")
        return ChosenWeights("none", None, None)
    entries = family.list_weights(plain)
    names = [entry.name for entry in entries]
    if weights == "default":
        if not entries:
            raise WeightsError(f"{name} has no pretrained weights; name a file with --weights PATH, or --weights none")
        requested = str(Path(plain).resolve()) if family is onnx else weights
        return ChosenWeights(requested, names[0], family.read_weights(plain, names[0], progress))
    if weights in names:
        return ChosenWeights(weights, weights, family.read_weights(plain, weights, progress))
    if family is onnx:
        raise WeightsError(f"{name} has its weights inside; --weights cannot change them")
    if is_url(weights):
        url, _, digest = weights.partition("#")
        file, requested = fetch_weights(weights, progress), f"{hide_credentials(url)}#{digest}"
    else:
        path = Path(weights)
        if not path.is_file():
            raise WeightsError(
                f"no weights at {weights}: expected {', '.join(['default', 'none', *names])}, the path of a state dict "
                f"(.pth or .safetensors), or https://...#sha256=..."
            )
        file, requested = read_weights(path), str(path.resolve())
    known = [entry.name for entry in entries if entry.digest and file.sha256.startswith(entry.digest)]
    if family is torchvision:
        file = torchvision.rename_tensors(file)
    return ChosenWeights(requested, known[0] if known else None, file)


def find_trunk(family: Family, name: str, network: nn.Module) -> str:
    """Dotted name of the trunk of a dense model, "" of all others."""
    return torchvision.find_trunk(name, network) if family is torchvision else ""
