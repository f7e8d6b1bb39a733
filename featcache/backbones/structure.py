"""What a network's own structure tells: its output's shape, its last layer, its cost. No table of networks.

Shapes are found by sending a picture through the network on torch's meta device, where tensors have shapes and no
values: milliseconds for any size. A network that cannot do without values gets real ones.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import BackboneError

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAGGING_MOMENTUM = 0.05  # of BatchNorm: below it, the running statistics need hundreds of batches to follow


def forward_shape(network: nn.Module, shape: tuple[int, ...], *, where: str) -> Any:
    """What a network gives for one image of `shape` (channels, H, W), on the meta device where that works.

    Raises
    ------
    BackboneError
        If the network does not take such images.
    """
    tensors = {
        name: tensor.to("meta") for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers())
    }
    with torch.no_grad():
        with contextlib.suppress(Exception), unchanged(network):  # whatever a network does that needs values
            return functional_call(network, tensors, (torch.empty(1, *shape, device="meta"),))
        try:
            return network(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)))
        except BackboneError:
            raise  # it says by itself what is wrong
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"{where} does not take images of {format_shape(shape)} ({reason}); is --input-size or --channels "
                f"that of another network?"
            ) from error


@contextlib.contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Undo what a forward pass notes in the network's modules: tensors without values would stay there."""
    kept = [table for one in network.modules() for table in (vars(one), one._parameters, one._buffers)]
    before = [dict(table) for table in kept]
    try:
        yield
    finally:
        for table, values in zip(kept, before, strict=True):
            table.clear()
            table.update(values)


def format_shape(shape: Iterable[int]) -> str:
    """A shape for people.

    >>> format_shape((3, 224, 224))
    '3 x 224 x 224'
    """
    return " x ".join(map(str, shape))


@dataclass(frozen=True)
class Classifier:
    """The last layer of a classification network: its dotted name, the layer, and how many features go in."""

    name: str
    module: nn.Module
    width: int

    def make_like(self, n_classes: int) -> nn.Module:
        """A fresh one for another number of classes, on the CPU, initialised as torch does."""
        if isinstance(self.module, nn.Linear):
            return nn.Linear(self.width, n_classes, bias=self.module.bias is not None)
        kernel = (1,) * len(self.module.kernel_size)  # type: ignore[arg-type]
        return type(self.module)(self.width, n_classes, kernel, bias=self.module.bias is not None)


def find_classifier(network: nn.Module, shape: tuple[int, ...], *, where: str) -> Classifier | None:
    """The linear layer, or convolution of one pixel, that ends a network whose output is one number per class.

    It is the last layer with parameters that runs, it runs once, and its outputs are the network's. A network that ends
    in anything else gives features already: None.
    """
    ran: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, _inputs, _output, name=name: ran.append((name, module)))
        for name, module in network.named_modules()
        if not any(module.children()) and any(True for _ in module.parameters())
    ]
    try:
        output = forward_shape(network, shape, where=where)
    finally:
        for handle in handles:
            handle.remove()
    if not ran or not isinstance(output, Tensor) or output.dim() != 2:
        return None
    name, module = ran[-1]
    if sum(other is module for _, other in ran) > 1:
        return None
    if isinstance(module, nn.Linear) and module.out_features == output.shape[1]:
        return Classifier(name, module, module.in_features)
    if isinstance(module, Convolution) and module.out_channels == output.shape[1] and set(module.kernel_size) == {1}:
        return Classifier(name, module, module.in_channels)
    return None


def check_ends(network: nn.Module, classifier: Classifier, shape: tuple[int, ...], *, where: str) -> None:
    """See with a picture of noise that the classifier's output is the network's, with nothing behind it but a pool.

    Raises
    ------
    BackboneError
        If something else comes behind: without the classifier, it would be applied to the features.
    """
    given: list[Tensor] = []
    handle = classifier.module.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    with torch.no_grad():
        output = network(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    handle.remove()
    logits = given[-1]
    pooled = logits.mean(list(range(2, logits.dim()))) if logits.dim() > 2 else logits
    if pooled.shape != output.shape or not torch.allclose(pooled, output, rtol=1e-4, atol=1e-6):
        raise BackboneError(
            f"{where} does more behind its last layer {classifier.name} than pool; name the layer with --layer"
        )


def set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is, by its dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def describe_batch_norm(network: nn.Module, name: str) -> tuple[str, str]:
    """What BatchNorm does while a network is fine-tuned by default, "train" or "fixed", and why.

    With a momentum of 0.01, as in EfficientNet-Lite, the running statistics stay far behind in a short fine-tune.
    Measured on the digits sample, three epochs in batches of 4, validation accuracy: 0.39 where BatchNorm follows the
    batches, 0.66 with fixed statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return "fixed", f"{name} has no BatchNorm"
    momentum = min(norm.momentum if norm.momentum is not None else 1.0 for norm in norms)
    if momentum < LAGGING_MOMENTUM:
        return "fixed", (
            f"{name}'s BatchNorm keeps its statistics: with its momentum of {momentum:.2g} they would lag behind a "
            f"short fine-tune"
        )
    return "train", f"{name}'s BatchNorm follows the batches, as in the classic recipe"


def count_operations(network: nn.Module, shape: tuple[int, ...], *, where: str) -> int:
    """Multiply-adds of one forward pass, each counted once, as in torchvision's tables of GFLOPS."""
    with FlopCounterMode(display=False) as counter:
        forward_shape(network, shape, where=where)
    return int(counter.get_total_flops()) // 2


class ParametersOnMeta(TorchFunctionMode):
    """Within it, tensors that modules make for their parameters have a shape and no values; all others are as usual.

    (Under `torch.device("meta")` the others would have none either, and networks compute with them while being made.)
    """

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a parameter on the meta device."""
        kwargs = dict(kwargs or {})
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
