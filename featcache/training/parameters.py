"""Which parameters learn how fast: the head and the backbone, layer by layer, and no weight decay where it harms."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

# The name of a block, the first that ends in a number, with a plain number behind it: layer1.0, blocks.3, features.1.0.
BLOCK = re.compile(r"^(?:[^.]*[^.\d][^.]*\.)*?[^.]*\d(?:\.\d+)?(?=\.)")
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def list_layers(network: nn.Module, head: str) -> list[list[str]]:
    """Names of the backbone's parameters, layer by layer from the image to the head, in the order of definition.

    A layer is a block of a numbered sequence (`layer1.0`, `blocks.3`, `encoder.layers.encoder_layer_0`), or what stands
    alone; norms and biases that stand alone belong to the layer before them.

    >>> list_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 3)), "3")
    [['0.weight', '0.bias', '1.weight', '1.bias'], ['2.weight', '2.bias']]
    """
    layers: list[tuple[str, list[str]]] = []
    for name, _ in network.named_parameters():
        found = BLOCK.match(name)
        layer = found.group() if found else name.rpartition(".")[0]
        if is_within(name, head):
            continue
        if not layers or layers[-1][0] != layer:
            layers.append((layer, []))
        layers[-1][1].append(name)
    merged: list[list[str]] = []
    for _, names in layers:
        if merged and all(is_vector(network.get_parameter(name)) for name in names):
            merged[-1] += names
        else:
            merged.append(names)
    return merged


def is_vector(parameter: nn.Parameter) -> bool:
    """Whether a parameter has one axis only, or all others have length 1: norms, biases, scales, class tokens."""
    return parameter.numel() == max(parameter.shape, default=1)


def is_within(name: str, head: str) -> bool:
    """Whether a parameter belongs to the module of this name."""
    return name.startswith(f"{head}.")


def group_parameters(
    network: nn.Module,
    head: str,
    *,
    lr: float,
    lr_backbone: float,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimiser of all parameters that want a gradient, the head's first.

    Parameters
    ----------
    network
        The network.
    head
        Dotted name of its last layer.
    lr, lr_backbone
        Of the head, and of all else.
    layer_decay
        Of n layers the k-th from the head learns at `lr_backbone` times this to the k [1]_ [2]_.
    weight_decay
        Of weight matrices and filters; norms, biases, and what the network itself exempts (`no_weight_decay()`, as
        timm's vision transformers do) have none [3]_.

    Returns
    -------
    One group for each pair of rate and decay, so that the classic recipe has one in all.

    References
    ----------
    .. [1] Clark et al., ELECTRA, 2020, https://arxiv.org/abs/2003.10555
    .. [2] Bao et al., BEiT, 2022, https://arxiv.org/abs/2106.08254
    .. [3] He et al., Bag of Tricks, 2019, https://arxiv.org/abs/1812.01187
    """
    layers = list_layers(network, head)
    rates = {name: lr_backbone * layer_decay ** (len(layers) - k) for k, layer in enumerate(layers) for name in layer}
    exempt = _find_exempt(network)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(lr, weight_decay): [], (lr, 0.0): []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in exempt else weight_decay
            groups.setdefault((rates.get(name, lr), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
        if parameters
    ]


def _find_exempt(network: nn.Module) -> set[str]:
    """Names of the parameters that are not to decay."""
    exempt = {
        f"{owner}.{name}" if owner else name
        for owner, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_vector(parameter) or isinstance(module, NORMS)
    }
    named: Callable[[], Any] | None = getattr(network, "no_weight_decay", None)
    return exempt | set(named() if callable(named) else ())
