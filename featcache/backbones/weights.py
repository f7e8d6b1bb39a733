"""State dicts from files, nothing in them executed, and their fit to a network. Knows no particular network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featcache.backbones.base import StateDict, WeightsFile
from featcache.errors import WeightsError
from featcache.files import hash_file


def read_weights(path: Path) -> WeightsFile:
    """Read a state dict from a .safetensors file, or from any file that torch.save wrote.

    Raises
    ------
    WeightsError
        If there is no such file, or it holds anything but named tensors.
    """
    if not path.is_file():
        raise WeightsError(
            f"no weights at {path}: expected default, none, or the path of a state dict (.pth or .safetensors)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd files in several lines; what matters is raised
            tensors = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise WeightsError(
            f"cannot read weights from {path}: {reason}; expected a state dict of tensors, saved with "
            f"torch.save(network.state_dict(), ...) or safetensors, and nothing in it is ever executed"
        ) from error
    return WeightsFile(tensors, path.name, hash_file(path))


def fit_weights(network: nn.Module, tensors: StateDict, *, where: str, replaced: str = "", ignored: Sequence[str] = ()) -> None:
    """Put tensors into a network, its classifier aside: that one may be there, missing, or of another size.

    Parameters
    ----------
    network
        Gets them.
    tensors
        By the network's names.
    where
        What the user calls them.
    replaced
        Dotted name of the classifier, if there is one.
    ignored
        Names of modules that a file may hold and the network has no use for.

    Raises
    ------
    WeightsError
        Naming the first tensor that is missing, unexpected, or of the wrong shape.
    """
    wanted = network.state_dict()
    prefixes = tuple(f"{name}." for name in (replaced, *ignored) if name)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    kept = {name: tensor for name, tensor in wanted.items() if name.startswith(prefixes)}
    for name, tensor in wanted.items():
        if name in kept:
            continue
        if name not in given:
            if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 lack it, and nothing uses it
                given[name] = tensor
                continue
            raise WeightsError(
                f"weights from {where} do not fit: tensor {name} {tuple(tensor.shape)} is missing; "
                f"are they of another network?"
            )
        if given[name].shape != tensor.shape:
            raise WeightsError(
                f"weights from {where} do not fit: tensor {name} is {tuple(given[name].shape)}, expected "
                f"{tuple(tensor.shape)}; are they of another network?"
            )
    if extra := sorted(set(given) - set(wanted)):
        raise WeightsError(
            f"weights from {where} do not fit: tensor {extra[0]} {tuple(given[extra[0]].shape)} has no place in the "
            f"network; are they of another one?"
        )
    network.load_state_dict({**given, **kept})


def _load_torch(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"found {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {name!r} is {type(value).__name__}, not a tensor")  # noqa: TRY004 - bad file
    return {str(name): value for name, value in loaded.items()}
