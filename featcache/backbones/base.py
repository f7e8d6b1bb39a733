"""What a family of backbones must answer, and the frozen Backbone that comes out. Knows no particular network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from featcache.images import Preprocessing

StateDict = Mapping[str, Tensor]


class WeightsFile(NamedTuple):
    """Tensors read from a file, and where they came from.

    `name` is what the user would call them, `sha256` the digest of the file's bytes.
    """

    tensors: StateDict
    name: str
    sha256: str


class Family(Protocol):
    """One source of networks. One module of this package implements it."""

    def list_names(self) -> list[str]:
        """Names of the networks of this family."""

    def make_network(self, name: str) -> nn.Module:
        """The network with its classifier, randomly initialised from torch's global random state."""

    def name_classifier(self, name: str) -> str:
        """Dotted name of the last linear layer, the one that stage 1 removes and fine-tuning replaces."""

    def read_default_weights(self, name: str) -> WeightsFile:
        """The pretrained weights, downloaded and verified if need be.

        Raises
        ------
        WeightsUnavailableError
            If they cannot be had here and now.
        """

    def describe_preprocessing(self, name: str) -> Preprocessing:
        """The preprocessing that belongs to the default weights."""

    def describe_batch_norm(self, name: str) -> tuple[str, str]:
        """What BatchNorm does while this network is fine-tuned, "train" or "fixed", and why."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen network that turns images into features.

    Attributes
    ----------
    name
        What the user calls it.
    network
        The network with its classifier replaced by the identity: (B, 3, H, W) float32 -> (B, width) float32. In
        evaluation mode, no parameter wants a gradient.
    classifier
        Dotted name of the layer that was removed.
    width
        D, features per image.
    preprocessing
        What happens to an image before the network sees it.
    weights
        JSON-ready description: what the user asked for, the file's SHA-256, the tensors' SHA-256.
    batch_norm
        "train" or "fixed" and the reason, the default when this network is fine-tuned.
    make_classifier
        (number of classes) -> a fresh last layer, made by the same class as the one that was removed.
    """

    name: str
    network: nn.Module
    classifier: str
    width: int
    preprocessing: Preprocessing
    weights: dict[str, Any]
    batch_norm: tuple[str, str]
    make_classifier: Callable[[int], nn.Module]

    def describe(self, stored: str = "float32") -> dict[str, Any]:
        """The extractor as plain JSON values: everything that decides the features, and where the weights came from.

        Parameters
        ----------
        stored
            Precision in which the features are kept, "float32" or "float16".
        """
        return {
            "backbone": self.name,
            "weights": self.weights,
            "layer": f"input of {self.classifier}",
            "dim": self.width,
            "preprocessing": self.preprocessing.to_json(),
            "precision": {"compute": "float32", "stored": stored},
        }


def hash_tensors(tensors: StateDict) -> str:
    """SHA-256 over names, shapes, types and values, in the order of the names: the same in any container.

    BatchNorm's count of batches is left out: no output depends on it, and older files lack it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
