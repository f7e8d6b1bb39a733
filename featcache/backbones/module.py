"""A user's own network: `module:package.function` from the command line, or an nn.Module in Python.

The function is imported and called: this runs the user's code, which is said before it is done. It returns an nn.Module
(B, 3, H, W) -> (B, D) or logits; what its images must look like is stated with options, or with an attribute
`preprocessing` of the network, a dictionary with the names of `InputFormat`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.errors import BackboneError, SettingsError
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

MADE_WEIGHTS = "as it is made"


def list_names() -> list[str]:
    """None: the names are functions."""
    return []


def list_weights(name: str) -> list[WeightsEntry]:
    """Those that the function gives its network."""
    del name
    return [WeightsEntry(name=MADE_WEIGHTS, is_here=True)]


def list_options(name: str, entry: str | None) -> dict[str, Any]:
    """None before it is made; see `code.hash_code`."""
    del name, entry
    return {}


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Call the user's function.

    Raises
    ------
    BackboneError
        If there is none, it raises, or gives no network.
    """
    del options
    function = import_function(name)
    try:
        network = function()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BackboneError(f"module:{name} raised {type(error).__name__}: {reason}") from error
    if not isinstance(network, nn.Module):
        raise BackboneError(f"module:{name} gave {type(network).__name__}: expected a torch.nn.Module")
    return network


def import_function(name: str) -> Any:
    """A function by its dotted name; modules in the current folder are found too.

    Raises
    ------
    BackboneError
        If there is none.
    """
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise BackboneError(
            f"module:{name} is no function: expected module:PACKAGE.FUNCTION, such as module:nets.small"
        )
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - as sys.path has it
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BackboneError(f"module:{name} cannot be imported ({type(error).__name__}: {reason})") from error
    if not callable(function):
        raise BackboneError(f"module:{name} is {type(function).__name__}: expected a function that makes a network")
    return function


def describe_input(name: str, entry: str | None, network: nn.Module) -> InputFormat:
    """What the network itself says in an attribute `preprocessing`."""
    del entry
    return read_attribute(network, f"module:{name}")


def read_attribute(network: nn.Module, where: str) -> InputFormat:
    """The input format in a network's attribute `preprocessing`; an empty one if there is none.

    Raises
    ------
    BackboneError
        If the attribute is not such a dictionary.
    """
    try:
        return InputFormat.from_json(getattr(network, "preprocessing", {}))
    except SettingsError as error:
        raise BackboneError(f"the attribute preprocessing of {where}: {error}") from error


def read_weights(name: str, entry: str, progress: Progress) -> WeightsFile:
    """No tensors: the function has put them into the network."""
    del entry, progress
    return WeightsFile(None, f"as module:{name} makes them", "")
