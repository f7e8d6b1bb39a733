"""What a family of backbones must answer, and the frozen Backbone that comes out. Knows no particular network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from featcache.backbones.layers import Pick
from featcache.preprocessing import InputFormat, Preprocessing
from featcache.progress import Progress

StateDict = Mapping[str, Tensor]
FLOAT32 = {"compute": "float32"}


class WeightsFile(NamedTuple):
    """Tensors read from a file, and where they came from.

    `name` is what the user would call them, `sha256` the digest of the file's bytes; no `tensors` are in the network
    already. `paths` are all files that had a say, also those that could have been there; None if nobody can tell.
    """

    tensors: StateDict | None
    name: str
    sha256: str
    paths: tuple[Path, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Pretrained weights that a family offers for one of its networks.

    Attributes
    ----------
    name
        What `--weights` calls them.
    licence
        As their publisher states it, "not stated" otherwise.
    is_here
        Whether they are on this machine, so that no network is needed.
    top1
        Accuracy in per cent that is published for them, None if there is none.
    digest
        SHA-256 of their file in hexadecimal, or its first digits; "" if it is not known.
    """

    name: str
    licence: str = "not stated"
    is_here: bool = False
    top1: float | None = None
    digest: str = ""


class Family(Protocol):
    """One source of networks. One module of this package implements it; names are given without the prefix."""

    def list_names(self) -> list[str]:
        """Names of the networks of this family."""

    def list_weights(self, name: str) -> list[WeightsEntry]:
        """Pretrained weights of a network, the default ones first."""

    def list_options(self, name: str, entry: str | None) -> dict[str, Any]:
        """What else decides the outputs of a network with these weights, as plain JSON values.

        Weights that are not this family's own are None.
        """

    def make_network(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """The network with its classifier, randomly initialised from torch's global random state."""

    def describe_input(self, name: str, entry: str | None, network: nn.Module) -> InputFormat:
        """The preprocessing that belongs to these weights, as far as it is known."""

    def read_weights(self, name: str, entry: str, progress: Progress) -> WeightsFile:
        """The weights of this entry, downloaded and verified if need be.

        Raises
        ------
        WeightsUnavailableError
            If they cannot be had here and now.
        """


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen network that turns images into features.

    Attributes
    ----------
    name
        What the user calls it.
    network
        (B, 3, H, W) float32 -> (B, width) float32: the classifier replaced by the identity, or layers picked and
        pooled. In evaluation mode, no parameter wants a gradient.
    classifier
        Dotted name of the layer that was removed and that fine-tuning replaces; "" where none was: fine-tuning then
        puts one behind the features.
    layer
        What the features are, in words.
    picks
        The layers that were asked for, in the order of their columns; none stands for the input of the classifier.
    width
        D, features per image; measured.
    preprocessing
        What happens to an image before the network sees it.
    weights
        JSON-ready description: what the user asked for, the file's SHA-256, the tensors' SHA-256.
    options
        What else decides the outputs, JSON-ready; mostly nothing.
    batch_norm
        "train" or "fixed" and the reason, the default when this network is fine-tuned.
    make_classifier
        (number of classes) -> a fresh last layer of the kind that was removed.
    precision
        In which the features are computed, JSON-ready: {"compute": "float32"}, or another type of torch's; "int8" has
        the `ranges` of its activations beside it.
    files
        All files that have a say in what this is, beside those of installed packages; None if nobody can tell.
    network_sha256
        Of the network's tensors by the names that they have in it, see `check_unchanged`.
    """

    name: str
    network: nn.Module
    classifier: str
    layer: str
    picks: tuple[Pick, ...] = ()
    width: int
    preprocessing: Preprocessing
    weights: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    batch_norm: tuple[str, str]
    make_classifier: Callable[[int], nn.Module]
    precision: dict[str, Any] = field(default_factory=lambda: dict(FLOAT32))
    files: tuple[Path, ...] | None = None
    network_sha256: str

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
            "layer": self.layer,
            **({"layers": [pick.to_json() for pick in self.picks]} if self.picks else {}),
            **({"options": self.options} if self.options else {}),
            "dim": self.width,
            "preprocessing": self.preprocessing.to_json(),
            "precision": {**self.precision, "stored": stored},
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
