"""Features from any named layers of a network, each pooled to a vector, several in one pass.

Names are those of torchvision's feature extraction (a module such as `layer3`, or a node of the traced graph such as
`layer4.1.relu_1`); a network that cannot be traced is watched with hooks and offers its modules.

=======  ============================================================================================================
pool     what it makes of a map or of tokens
=======  ============================================================================================================
avg      the mean over all positions
max      the largest value over all positions
flatten  every number, one after the other
cls      the first token, where the network has tokens
=======  ============================================================================================================
"""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from featcache.backbones.structure import format_shape, forward_shape
from featcache.config import POOLS
from featcache.errors import BackboneError, SettingsError


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One layer whose output becomes columns of the features.

    Attributes
    ----------
    name
        Of the layer.
    pool
        One of the table above; "" for an output that is a vector.
    axis
        Where the channels are, counted with the batch.
    width
        Columns.
    """

    name: str
    pool: str
    axis: int = 1
    width: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"name": self.name, "pool": self.pool, "width": self.width}

    def __str__(self) -> str:
        return f"{self.name} ({self.pool})" if self.pool else self.name


class LayerFeatures(nn.Module):
    """Images (B, channels, H, W) -> the picked layers' outputs, pooled and side by side, (B, D).

    Parameters
    ----------
    source
        Images -> outputs by the names of the picks.
    picks
        What to take.

    Attributes
    ----------
    widths
        Columns of each: an error in one of them is not to be measured against another that is larger.
    """

    def __init__(self, source: nn.Module, picks: Sequence[Pick]) -> None:
        super().__init__()
        self.source, self.picks = source, tuple(picks)
        self.widths = [pick.width for pick in picks]

    def forward(self, images: Tensor) -> Tensor:
        """All columns, (B, D)."""
        outputs = self.source(images)
        return torch.cat([pool_output(outputs[pick.name], pick) for pick in self.picks], dim=1)


def pool_output(output: Tensor, pick: Pick) -> Tensor:
    """A layer's output (B, ...) -> (B, width)."""
    if not pick.pool or output.dim() == 2:
        return output
    if pick.pool == "flatten":
        return output.flatten(1)
    if pick.pool == "cls":
        return output[:, 0]
    positions = [axis for axis in range(1, output.dim()) if axis != pick.axis]
    return output.mean(positions) if pick.pool == "avg" else output.amax(positions)


def parse_layer(text: str, pool: str | None) -> tuple[str, str | None]:
    """A layer as the user names it, "NAME" or "NAME:POOL" -> name and pool.

    >>> parse_layer("layer3:max", "avg"), parse_layer("layer3", "avg")
    (('layer3', 'max'), ('layer3', 'avg'))

    Names of ONNX may have a colon of their own; TensorFlow's do.

    >>> parse_layer("model/Relu:0", "avg"), parse_layer("model/Relu:0:max", "avg")
    (('model/Relu:0', 'avg'), ('model/Relu:0', 'max'))
    """
    name, colon, own = text.rpartition(":")
    if not colon:
        return text, pool
    if own in POOLS:
        return name, own
    if name and own.isidentifier():
        raise SettingsError(f"--layer {text}: unknown pool {own!r}, expected NAME or NAME:POOL with {', '.join(POOLS)}")
    return text, pool


def pick_layers(
    network: nn.Module, layers: Sequence[str], pool: str | None, shape: tuple[int, ...], *, where: str
) -> LayerFeatures:
    """A network that gives the features of the named layers.

    What only later layers need is not computed, unless the network cannot be traced.

    Parameters
    ----------
    network
        In evaluation mode.
    layers
        "NAME" or "NAME:POOL".
    pool
        For those that name none.
    shape
        (channels, H, W) of an image.
    where
        What the user calls the network.

    Raises
    ------
    BackboneError
        If there is no layer of a name, or it has no vector and no pool was named.
    """
    asked = [parse_layer(text, pool) for text in layers]
    if repeated := [name for i, (name, own) in enumerate(asked) if (name, own) in asked[:i]]:
        raise BackboneError(f"--layer {repeated[0]} is given twice; once is enough")
    source = select_outputs(network, list(dict.fromkeys(name for name, _ in asked)), where=where)
    outputs = forward_shape(source, shape, where=where)
    picks = [measure_pick(name, own, outputs[name], shape, where) for name, own in asked]
    return LayerFeatures(source, picks)


def measure_pick(name: str, pool: str | None, output: Any, shape: tuple[int, ...], where: str) -> Pick:
    """How a layer's output (1, ...) becomes a vector, and how long that is.

    Raises
    ------
    BackboneError
        If its output is no tensor, or needs a pool that is not given or does not fit.
    """
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise BackboneError(f"layer {name} of {where} gives no features but {type(output).__name__}; choose another")
    if output.shape[0] != 1:
        raise BackboneError(
            f"layer {name} of {where} gives {output.shape[0]} rows for one image, not one; choose the layer around it"
        )
    inner = tuple(output.shape[1:])
    if len(inner) == 1:
        return Pick(name=name, pool="", width=inner[0])
    if pool is None:
        raise BackboneError(
            f"layer {name} of {where} gives {format_shape(inner)} numbers per image, not a vector; say how to pool "
            f"them: --layer {name}:avg, or {', '.join(POOLS[1:])}"
        )
    if pool == "cls" and len(inner) != 2:
        raise BackboneError(
            f"layer {name} of {where} has no tokens but a map of {format_shape(inner)}; --pool cls is for "
            f"transformers, expected avg, max or flatten"
        )
    axis = find_channels(inner, shape) + 1
    width = output.flatten(1).shape[1] if pool == "flatten" else inner[axis - 1]
    return Pick(name=name, pool=pool, axis=axis, width=width)


def find_channels(inner: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Which axis of a layer's output holds the channels: the one beside those that look like the image.

    Tokens (T, D) have them last. Of a map, two neighbouring axes have the image's aspect ratio; channels are first
    (C, H, W) or last (H, W, C), of clips (C, T, H, W) or (T, H, W, C). If all are alike they are first, torch's way.

    >>> [find_channels(inner, (3, 224, 224)) for inner in ((512, 7, 7), (7, 7, 768), (197, 768))]
    [0, 2, 1]
    """
    if len(inner) < 3:
        return len(inner) - 1
    aspect = shape[-2] / shape[-1]
    first, last = abs(inner[-2] / inner[-1] - aspect), abs(inner[-3] / inner[-2] - aspect)
    return 0 if first <= last else len(inner) - 1


def select_outputs(network: nn.Module, names: Sequence[str], *, where: str) -> nn.Module:
    """A network that gives a dictionary of the outputs of its layers of these names.

    Raises
    ------
    BackboneError
        If there is no such layer; the message suggests the nearest.
    """
    if isinstance(network, OutputsByName):
        return network.select_outputs(names)
    nodes = list_nodes(network)
    known = nodes if nodes is not None else [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in known and not any(node.startswith(name + ".") for node in known):
            raise BackboneError(say_unknown_layer(name, known, where))
    if nodes is None:
        return WatchedModules(network, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nodes differ while training, which this never does
        extractor = create_feature_extractor(network, return_nodes={name: name for name in names})
    return copy_outputs(extractor.eval_graph, extractor).eval().requires_grad_(False)


def copy_tensor(value: Any) -> Any:
    """A tensor of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def copy_outputs(graph: fx.Graph, owner: nn.Module) -> fx.GraphModule:
    """The network of a traced graph, its outputs copied where they are made.

    NOTE: without a copy a later operation in place, such as ReLU(inplace=True), would change a layer that is picked.
    """
    (output,) = [node for node in graph.nodes if node.op == "output"]
    for node in output.all_input_nodes:
        with graph.inserting_after(node):
            copied = graph.call_function(copy_tensor, (node,))
        output.replace_input_with(node, copied)
    graph.lint()
    return fx.GraphModule(owner, graph)


def say_unknown_layer(name: str, known: Sequence[str], where: str) -> str:
    """That there is no such layer, and which may have been meant."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{where} has no layer {name!r}: {hint}`featcache backbones {where}` lists its {len(known)} layers"


def list_nodes(network: nn.Module) -> list[str] | None:
    """Names of the nodes of a network's traced graph, in the order of their running; None if it cannot be traced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes: list[str] = get_graph_node_names(network)[1]
    except Exception:  # noqa: BLE001 - whatever a network does that tracing does not understand
        return None
    return nodes[1:]  # the first is the image


def list_layers(network: nn.Module, shape: tuple[int, ...], *, where: str) -> dict[str, tuple[int, ...]]:
    """Shape per image of the output of every layer that can be picked, in the order of their running."""
    nodes = network.list_outputs() if isinstance(network, OutputsByName) else list_nodes(network)
    if nodes is None:
        modules = [name for name, _ in network.named_modules() if name]
        source: nn.Module = WatchedModules(network, modules, all_run=False)
    else:
        source = select_outputs(network, nodes, where=where)
    outputs = forward_shape(source, shape, where=where)
    shapes = {
        name: tuple(output.shape[1:])
        for name, output in outputs.items()
        if isinstance(output, Tensor) and output.dim() >= 2 and output.shape[0] == 1
    }
    return add_blocks(shapes) if nodes is not None and not isinstance(network, OutputsByName) else shapes


def add_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Layers and, behind the last layer of each, the blocks that they are in: their outputs are the same.

    >>> list(add_blocks({"conv": (8,), "layer1.0.conv": (8,), "layer1.0.relu": (8,), "fc": (5,)}))
    ['conv', 'layer1.0.conv', 'layer1.0.relu', 'layer1.0', 'layer1', 'fc']
    """
    parts = [name.split(".") for name in shapes]
    blocks = {".".join(part[:i]): last for last, part in enumerate(parts) for i in range(1, len(part))}
    found: dict[str, tuple[int, ...]] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        found[name] = shape
        ending = sorted((block for block, last in blocks.items() if last == i), key=len, reverse=True)
        found.update((block, shape) for block in ending if block not in shapes)
    return found


class OutputsByName(nn.Module):
    """A network that selects its layers by itself, because it is no graph of torch's."""

    def list_outputs(self) -> list[str]:
        """Names of all layers."""
        raise NotImplementedError

    def select_outputs(self, names: Sequence[str]) -> nn.Module:
        """The same network, giving a dictionary of these layers' outputs."""
        raise NotImplementedError


_SEEN = threading.local()  # outputs of the forward pass that this thread is in


class WatchedModules(nn.Module):
    """A network that gives a dictionary of its modules' outputs, noted by hooks while it runs.

    Parameters
    ----------
    network
        Any.
    names
        Dotted names of its modules.
    all_run
        Whether each of them has to run.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], *, all_run: bool = True) -> None:
        super().__init__()
        self.network, self.names, self.all_run = network, tuple(names), all_run
        for name in self.names:
            network.get_submodule(name).register_forward_hook(_Note(name))

    def forward(self, images: Tensor) -> dict[str, Any]:
        """The named modules' outputs."""
        _SEEN.outputs = {}
        self.network(images)
        missing = [name for name in self.names if name not in _SEEN.outputs]
        if missing and self.all_run:
            raise BackboneError(f"layer {missing[0]} does not run in a forward pass; choose another")
        outputs, _SEEN.outputs = dict(_SEEN.outputs), {}
        return outputs


class _Note:
    """A hook that notes a module's output."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if (outputs := getattr(_SEEN, "outputs", None)) is not None:
            outputs[self.name] = copy_tensor(output)  # as in `copy_outputs`
