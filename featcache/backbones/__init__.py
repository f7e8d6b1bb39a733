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

`base` says what a family answers, `structure` what a network tells of itself, `layers` how any layer becomes features,
`weights` how tensors are read from files. This module finds the family and freezes what it makes.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featcache.backbones import efficientnet_lite, module, onnx, timm, torchvision
from featcache.backbones.base import Backbone, Family, WeightsEntry, WeightsFile, hash_tensors
from featcache.backbones.layers import LayerFeatures, Pick, measure_pick, pick_layers
from featcache.backbones.structure import (
    Classifier,
    check_ends,
    describe_batch_norm,
    find_classifier,
    forward_shape,
    set_submodule,
)
from featcache.backbones.weights import fetch_weights, fit_weights, is_url, read_weights, strip_prefixes
from featcache.errors import BackboneError, SettingsError, WeightsError
from featcache.fetching import hide_credentials
from featcache.images import InputFormat, Preprocessing
from featcache.progress import SILENT, Progress

__all__ = [
    "FAMILIES",
    "PREFIXES",
    "Backbone",
    "Family",
    "Pick",
    "WeightsEntry",
    "attach_classifier",
    "attach_head",
    "describe_preprocessing",
    "list_backbones",
    "load_backbone",
    "remake_backbone",
    "wrap_network",
]

FAMILIES: tuple[Family, ...] = (torchvision, efficientnet_lite)
PREFIXES: dict[str, Family] = {"timm": timm, "onnx": onnx, "module": module}


def list_backbones() -> list[str]:
    """Names of all backbones that need no prefix."""
    return [name for family in FAMILIES for name in family.list_names()]


def load_backbone(
    name: str,
    *,
    weights: str = "default",
    seed: int = 0,
    layer: Sequence[str] = (),
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
    check_layout(name, family, images)
    chosen = choose_weights(family, name, plain, weights, progress)
    options = family.list_options(plain, chosen.entry) | make_options(images)
    network = _make_seeded(lambda: family.make_network(plain, options), seed)
    if family is module:
        options["code_sha256"] = module.hash_code(network)
    if isinstance(network, onnx.OnnxNetwork):
        options["layout"] = network.layout  # wherever it was said: beside the file it may be said otherwise tomorrow
    description: dict[str, Any] = {"requested": chosen.requested, "name": f"random, seed {seed}", "sha256": None}
    if chosen.file is None:
        description["seed"] = seed
    else:
        description.update(name=chosen.file.name, sha256=chosen.file.sha256 or None)
    suggested = family.describe_input(plain, chosen.entry, network)
    return freeze_network(
        network,
        name=name,
        file=chosen.file,
        weights=description,
        preprocessing=make_preprocessing(name, images, suggested),
        options=options,
        trunk=find_trunk(family, plain, network),
        layer=layer,
        pool=pool,
        obstacle=onnx.OBSTACLE if family is onnx else "",
        verify=family is module,
    )


def freeze_network(
    network: nn.Module,
    *,
    name: str,
    file: WeightsFile | None,
    weights: dict[str, Any],
    preprocessing: Preprocessing,
    options: dict[str, Any],
    trunk: str = "",
    layer: Sequence[str] = (),
    pool: str | None = None,
    obstacle: str = "",
    verify: bool = False,
) -> Backbone:
    """Put the weights in, find out what the features are, and freeze everything.

    Parameters
    ----------
    network
        Whole, as the family made it.
    file
        Its tensors, if they are not in it already.
    trunk
        Dotted name of the part that is the backbone; "" is all of it.
    name, weights, preprocessing, options, obstacle
        As in `Backbone`.
    layer, pool
        As in `load_backbone`.
    verify
        See with a real picture that nothing comes behind the classifier.
    """
    tensors = dict(file.tensors) if file else {}
    if trunk:
        tensors = take_trunk(strip_prefixes(tensors, network.state_dict()), trunk)
        network = network.get_submodule(trunk)
    network.eval().requires_grad_(False)  # NOTE: eval() before features, or BatchNorm drifts
    shape = preprocessing.input_shape
    classifier = None if trunk or is_foreign(network) else find_classifier(network, shape, where=name)
    if tensors:
        fit_weights(
            network,
            tensors,
            where=file.name if file else "",
            replaced=classifier.name if classifier else "",
            ignored=(*torchvision.AUXILIARY, *timm.list_heads(network)),
        )
    batch_norm = describe_batch_norm(network, name)
    if verify and classifier and not layer:
        check_ends(network, classifier, shape, where=name)
    features = select_features(network, classifier, layer, pool, shape, name, trunk=bool(trunk))
    state = features.network.state_dict()
    weights["tensors_sha256"] = file.sha256 if file and is_foreign(network) else hash_tensors(state)
    kept = classifier if classifier and not features.picks else None
    return Backbone(
        name=name,
        network=features.network.eval().requires_grad_(False),
        classifier=kept.name if kept else "",
        layer=features.description,
        picks=features.picks,
        width=features.width,
        preprocessing=preprocessing,
        weights=weights,
        options=options,
        batch_norm=batch_norm,
        make_classifier=kept.make_like if kept else lambda n_classes: nn.Linear(features.width, n_classes),
        obstacle=obstacle,
    )


class Features(NamedTuple):
    """What gives the features: a network (B, ...) -> (B, width), in words, and the layers if such were asked for."""

    network: nn.Module
    width: int
    description: str
    picks: tuple[Pick, ...] = ()


def select_features(
    network: nn.Module,
    classifier: Classifier | None,
    layer: Sequence[str],
    pool: str | None,
    shape: tuple[int, ...],
    name: str,
    *,
    trunk: bool,
) -> Features:
    """The features of a whole network: named layers, a trunk's widest map, what goes into the classifier, its output.

    Raises
    ------
    BackboneError
        If a layer is unknown or gives no vector.
    SettingsError
        If a pool is given for features that are a vector.
    """
    if layer:
        picked = pick_layers(network, layer, pool, shape, where=name)
        words = ", ".join(map(str, picked.picks))
        return Features(picked, sum(pick.width for pick in picked.picks), words, picked.picks)
    if trunk:
        source = AsMaps(network)
        key, output = max(forward_shape(source, shape, where=name).items(), key=lambda item: int(item[1].shape[1]))
        pick = measure_pick(key, pool or "avg", output, shape, name)
        return Features(LayerFeatures(source, [pick]), pick.width, f"widest map of the trunk ({pick.pool})")
    if classifier is None:
        output = forward_shape(network, shape, where=name)
        pick = measure_pick("output", pool, output, shape, name)
        if pick.pool:
            return Features(LayerFeatures(AsMaps(network), [pick]), pick.width, f"output ({pick.pool})")
        _refuse_pool(pool, name)
        return Features(network, pick.width, "output")
    _refuse_pool(pool, name)
    set_submodule(network, classifier.name, nn.Identity())
    output = forward_shape(network, shape, where=name)
    if not isinstance(output, Tensor) or tuple(output.shape) != (1, classifier.width):
        raise BackboneError(f"{name} does more behind its last layer {classifier.name}; name a layer with --layer")
    return Features(network, classifier.width, f"input of {classifier.name}")


def _refuse_pool(pool: str | None, name: str) -> None:
    if pool is not None:
        raise SettingsError(f"--pool {pool} has nothing to pool: the features of {name} are a vector; name a --layer")


class AsMaps(nn.Module):
    """A network whose output is a dictionary of tensors, whatever it was: a single one is called "output"."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.network(images)
        return dict(outputs) if isinstance(outputs, Mapping) else {"output": outputs}


def take_trunk(tensors: Mapping[str, Tensor], trunk: str) -> dict[str, Tensor]:
    """The tensors of the trunk by its own names; all of them if they are those of a trunk already."""
    prefix = trunk + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)} or dict(
        tensors
    )


def is_foreign(network: nn.Module) -> bool:
    """Whether it is not torch that runs this network."""
    return isinstance(network, onnx.OnnxNetwork)


def find_trunk(family: Family, name: str, network: nn.Module) -> str:
    """Dotted name of the trunk of a dense model, "" of all others."""
    return torchvision.find_trunk(name, network) if family is torchvision else ""


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
    return merged.make_preprocessing()


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
        return ChosenWeights(weights, names[0], family.read_weights(plain, names[0], progress))
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
    seed = int(described.get("seed") or 0)
    if family is module:
        progress.say(f"{extractor['backbone']} runs your own code")
    file = None
    if with_weights:
        file = choose_weights(family, extractor["backbone"], plain, described["requested"], progress).file
    network = _make_seeded(lambda: family.make_network(plain, options), seed)
    if family is module and module.hash_code(network) != options["code_sha256"]:
        raise BackboneError(f"the code of {extractor['backbone']} has changed since; bring it back, or extract again")
    return freeze_network(
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
        obstacle=onnx.OBSTACLE if family is onnx else "",
    )


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
        options={"code_sha256": module.hash_code(network)},
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


def attach_classifier(backbone: Backbone, n_classes: int) -> tuple[nn.Module, str]:
    """The whole network, (B, 3, H, W) -> (B, n_classes), with a fresh last layer where it was removed, and its name.

    The backbone's own network is changed: it gives logits from here on. Where no layer was removed, one comes behind.

    Raises
    ------
    BackboneError
        If the network cannot be trained.
    """
    if backbone.obstacle:
        raise BackboneError(f"{backbone.name} cannot be fine-tuned: {backbone.obstacle}; use `featcache train-head`")
    layer = backbone.make_classifier(n_classes)
    if not backbone.classifier:
        return nn.Sequential(OrderedDict(features=backbone.network, head=layer)), "head"
    set_submodule(backbone.network, backbone.classifier, layer)
    return backbone.network, backbone.classifier


def attach_head(backbone: Backbone, head: nn.Module) -> nn.Module:
    """A linear head (n_classes, width) on the features, (B, 3, H, W) -> (B, n_classes)."""
    return nn.Sequential(OrderedDict(features=backbone.network, head=head))


def _make_seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a network from a seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
