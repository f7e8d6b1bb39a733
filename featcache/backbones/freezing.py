"""A network as its family made it -> a frozen Backbone: weights put in, features found, classifier removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from featcache.backbones import onnx, timm, torchvision
from featcache.backbones.base import Backbone, WeightsFile, hash_tensors
from featcache.backbones.code import hash_code
from featcache.backbones.layers import LayerFeatures, Pick, WatchedModules, measure_pick, pick_layers
from featcache.backbones.structure import (
    Classifier,
    check_ends,
    describe_batch_norm,
    find_classifier,
    forward_shape,
    set_submodule,
)
from featcache.backbones.weights import fit_weights, strip_prefixes
from featcache.errors import BackboneError, SettingsError, WeightsError
from featcache.files import hash_bytes
from featcache.preprocessing import Preprocessing


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
    name, weights, preprocessing, options
        As in `Backbone`.
    layer, pool
        As in `load_backbone`.
    verify
        See with a real picture that nothing comes behind the classifier.
    """
    tensors = file.tensors if file else None
    if trunk:
        if tensors is not None:
            tensors = take_trunk(strip_prefixes(tensors, network.state_dict()), trunk)
        network = network.get_submodule(trunk)
    network.eval().requires_grad_(False)  # NOTE: eval() before features, or BatchNorm drifts
    shape = preprocessing.input_shape
    classifier = None if trunk or is_foreign(network) else find_classifier(network, shape, where=name)
    if classifier and timm.name_classifier(network) not in (None, classifier.name):
        classifier = None  # timm knows better: it only looks like one
    whole = True
    if tensors is not None:
        whole = fit_weights(
            network,
            tensors,
            where=file.name if file else "",
            replaced=classifier.name if classifier else "",
            ignored=(*torchvision.AUXILIARY, *timm.list_heads(network)),
        )
    batch_norm = describe_batch_norm(network, name)
    if verify and classifier and not layer:
        check_ends(network, classifier, shape, where=name)
    state = network.state_dict()
    features = select_features(network, classifier, layer, pool, shape, name, trunk=bool(trunk))
    if classifier and not uses_classifier(features, classifier):
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{classifier.name}.")}
    elif classifier and not whole:
        raise WeightsError(
            f"the weights {weights['name']} have no classifier {classifier.name} that fits {name}, and layer "
            f"{', '.join(pick.name for pick in features.picks)} needs it; choose a layer before it"
        )
    weights["tensors_sha256"] = file.sha256 if file and is_foreign(network) else hash_tensors(state)
    known = weights["tensors_sha256"] if features.network is network else None
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
        network_sha256=fingerprint(features.network, known),
    )


def fingerprint(network: nn.Module, tensors_sha256: str | None = None) -> str:
    """SHA-256 of all that a network is at the moment: its tensors (if their digest is not known), code, attributes."""
    return hash_bytes(f"{tensors_sha256 or hash_tensors(network.state_dict())} {hash_code(network)}".encode())


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


def uses_classifier(features: Features, classifier: Classifier) -> bool:
    """Whether picked layers are computed with the classifier."""
    if any(isinstance(part, WatchedModules) for part in features.network.modules()):  # which run as a whole
        return any(f"{classifier.name}.".startswith(f"{pick.name}.") for pick in features.picks)
    return any(f".{classifier.name}." in f".{name}" for name in features.network.state_dict())


def _refuse_pool(pool: str | None, name: str) -> None:
    if pool is not None:
        raise SettingsError(f"--pool {pool} has nothing to pool: the features of {name} are a vector; name a --layer")


class AsMaps(nn.Module):
    """A network whose output is a dictionary of tensors, whatever it was: a single one is called "output"."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps by their names."""
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
