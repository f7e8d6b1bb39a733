"""What there is to choose from: every backbone with its width, its cost, its weights, and whether they are here.

Widths and costs are measured on the network itself, on torch's meta device, once per version of its library; what was
measured is kept beside torch's downloads.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from featcache.backbones import families, make_preprocessing, timm, torchvision
from featcache.backbones.base import WeightsEntry
from featcache.backbones.families import find_family, find_trunk, list_backbones
from featcache.backbones.freezing import select_features
from featcache.backbones.layers import list_layers
from featcache.backbones.structure import ParametersOnMeta, count_operations, find_classifier
from featcache.backbones.weights import find_downloads
from featcache.errors import BackboneError, FeatcacheError, OutputError
from featcache.files import pretty_json, write_atomically
from featcache.preprocessing import InputFormat
from featcache.progress import SILENT, Progress

KINDS = ("classification", "trunk", "video")
LIBRARIES = {"timm": "timm", "": "torchvision"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network is like with its default weights.

    Attributes
    ----------
    width
        Features per image.
    parameters
        Numbers in it, its classifier included; of a trunk alone.
    operations
        Multiply-adds of one image, each counted once; None where nobody can tell.
    input_shape
        (channels, H, W), of clips (channels, frames, H, W).
    """

    width: int
    parameters: int
    operations: int | None
    input_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of the catalogue; `cost` is None if the network could not be measured."""

    name: str
    kind: str
    cost: Cost | None
    weights: tuple[WeightsEntry, ...]

    @property
    def is_here(self) -> bool:
        """Whether pretrained weights of it are on this machine."""
        return any(entry.is_here for entry in self.weights)


def list_summaries(
    patterns: Sequence[str] = (), *, here: bool = False, kind: str | None = None, progress: Progress = SILENT
) -> list[Summary]:
    """The catalogue.

    Parameters
    ----------
    patterns
        Names with "*" and "?"; those of timm begin with "timm:". None is all that need no prefix.
    here
        Only those with pretrained weights on this machine.
    kind
        "classification", "trunk" or "video" only.
    progress
        Told of the measuring.

    Raises
    ------
    BackboneError
        If nothing has such a name.
    """
    names = match_names(patterns)
    chosen = [(name, list_weights(name)) for name in names if kind is None or find_kind(name) == kind]
    if here:
        chosen = [(name, entries) for name, entries in chosen if any(entry.is_here for entry in entries)]
    known = read_measured()
    new: dict[str, Any] = {}
    summaries = []
    n_new = sum(f"{find_version(name)} {name}" not in known for name, _ in chosen)
    if n_new > 20:
        progress.say(f"measuring {n_new} networks, this once")
    for name, entries in progress.track(chosen, total=len(chosen), what="measuring", unit="net"):
        key = f"{find_version(name)} {name}"
        if key not in known:
            new[key] = _measure_or_none(name)
        cost = known.get(key, new.get(key))
        summaries.append(Summary(name=name, kind=find_kind(name), cost=_thaw(cost), weights=tuple(entries)))
    keep_measured(known, new)
    return summaries


def match_names(patterns: Sequence[str]) -> list[str]:
    """Names that match one of the patterns, in the order of the families.

    Raises
    ------
    BackboneError
        If one matches nothing.
    """
    plain = list_backbones()
    if not patterns:
        return plain
    found: dict[str, None] = {}
    for pattern in patterns:
        known = [f"timm:{name}" for name in timm.list_names()] if pattern.startswith("timm:") else plain
        matching = fnmatch.filter(known, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, known, n=3)
            raise BackboneError(
                f"no backbone is called {pattern}; " + (f"near: {', '.join(near)}" if near else "try '*'")
            )
        found |= dict.fromkeys(matching)
    return list(found)


def find_kind(name: str) -> str:
    """Whether a backbone is of pictures with a classifier, the trunk of a dense model, or of clips."""
    family, plain = find_family(name)
    if family is not torchvision:
        return "classification"
    kind = torchvision.find_kind(plain)
    return {torchvision.CLASSIFICATION: "classification", torchvision.VIDEO: "video"}.get(kind, "trunk")


def list_weights(name: str) -> list[WeightsEntry]:
    """The pretrained weights of a backbone."""
    family, plain = find_family(name)
    return family.list_weights(plain)


def measure_cost(name: str) -> Cost:
    """Measure a network without making its tensors.

    Raises
    ------
    BackboneError
        If it does not take the images that its weights want.
    """
    family, plain = find_family(name)
    network, shape = make_without_values(name)
    trunk = find_trunk(family, plain, network)
    part = (network.get_submodule(trunk) if trunk else network).eval()
    classifier = None if trunk else find_classifier(part, shape, where=name)
    parameters = sum(parameter.numel() for parameter in part.parameters())
    operations = count_operations(part, shape, where=name)
    features = select_features(part, classifier, (), None, shape, name, trunk=bool(trunk))
    return Cost(width=features.width, parameters=parameters, operations=operations, input_shape=shape)


def describe_layers(name: str, input_size: tuple[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape per image of every layer of a backbone that `--layer` can name, in the order of their running.

    Parameters
    ----------
    name
        Of the backbone.
    input_size
        (H, W) of the images, where it is not that of the default weights.

    Raises
    ------
    BackboneError
        If there is no such backbone.
    """
    family, plain = find_family(name)
    network, shape = make_without_values(name, input_size)
    trunk = find_trunk(family, plain, network)
    return list_layers((network.get_submodule(trunk) if trunk else network).eval(), shape, where=name)


def make_without_values(name: str, input_size: tuple[int, int] | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A network that has only shapes where its family allows, and the shape of an image that it takes."""
    family, plain = find_family(name)
    entries = family.list_weights(plain)
    entry = entries[0].name if entries else None
    options = family.list_options(plain, entry)
    if family in families.FAMILIES or family is timm:
        with ParametersOnMeta():
            network = family.make_network(plain, options)
    else:
        network = family.make_network(plain, options)
    any_pixels = InputFormat(input_size=input_size, mean=(0.0,), std=(1.0,))  # no shape depends on them
    preprocessing = make_preprocessing(name, any_pixels, family.describe_input(plain, entry, network))
    return network, preprocessing.input_shape


def find_version(name: str) -> str:
    """The library that a backbone is from, with its version."""
    prefix = name.partition(":")[0] if ":" in name else ""
    library = LIBRARIES.get(prefix, "featcache")
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def find_cost(extractor: Mapping[str, Any]) -> Cost | None:
    """What the network of a description (see `Backbone.describe`) is like; None if it is of no family."""
    name = str(extractor["backbone"])
    if name.partition(":")[0] in ("onnx", "module"):
        return None
    try:
        return list_summaries([name])[0].cost
    except FeatcacheError:
        return None


def measured_path() -> Path:
    """Where measured costs are kept."""
    return find_downloads().parent / "featcache" / "backbones.json"


def read_measured() -> dict[str, Any]:
    """Costs that were measured before; none if they cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(measured_path().read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return {key: cost for key, cost in value.items() if cost is None or _is_cost(cost)}
    return {}


def keep_measured(known: dict[str, Any], new: dict[str, Any]) -> None:
    """Keep costs for another time; a place that cannot be written costs only that time."""
    if new:
        with contextlib.suppress(OSError, OutputError):
            measured_path().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(measured_path(), pretty_json({**known, **new}).encode())


def _is_cost(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"width", "parameters", "operations", "input_shape"}:
        return False
    numbers, shape = [value["width"], value["parameters"], value["operations"] or 0], value["input_shape"]
    return isinstance(shape, list) and all(isinstance(number, int) for number in (*numbers, *shape))


def _measure_or_none(name: str) -> dict[str, Any] | None:
    try:
        return asdict(measure_cost(name))
    except FeatcacheError:
        return None


def _thaw(value: dict[str, Any] | None) -> Cost | None:
    return None if value is None else Cost(**{**value, "input_shape": tuple(value["input_shape"])})
