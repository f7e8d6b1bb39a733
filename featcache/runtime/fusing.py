"""BatchNorm folded into the convolution before it: fewer passes over memory, the same features."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fuse_network(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network, each BatchNorm folded into the convolution before it, weights in channels-last order.

    Which BatchNorm follows which convolution is seen in a forward pass, not guessed from names. Whether the copy gives
    the same is for the caller to see.

    Parameters
    ----------
    network
        In evaluation mode.
    images
        (B, 3, H, W) that it takes.

    Source: R. Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (2018), section 3.2, for
    the folding; torch.nn.utils.fusion for its formula.
    """
    fused = copy.deepcopy(network).eval()  # NOTE: the copy of a traced network is in training mode again
    pairs = _find_pairs(fused, images)
    names = {id(module): name for name, module in fused.named_modules()}
    for convolution, norm in pairs:
        if norm.running_mean is None or norm.running_var is None or norm._forward_hooks:  # somebody watches its output
            continue
        convolution.weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.bias = bias
        parent, _, child = names[id(norm)].rpartition(".")
        setattr(fused.get_submodule(parent), child, nn.Identity())
    return fused.to(memory_format=torch.channels_last)


def _find_pairs(network: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output is the very input of a BatchNorm, seen in one forward pass; each module used once."""
    outputs: list[tuple[Tensor, nn.Conv2d]] = []  # the tensors are kept, or their identities would be used again
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: dict[int, int] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs.append((output, module))
        elif isinstance(module, nn.BatchNorm2d):
            pairs.extend((source, module) for tensor, source in outputs if tensor is inputs[0])

    handles = [
        module.register_forward_hook(watch)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return [(source, norm) for source, norm in pairs if calls[id(source)] == calls[id(norm)] == 1]
