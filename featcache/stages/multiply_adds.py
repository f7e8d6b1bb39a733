"""How many multiply-adds an image costs in the network of a description, where that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcache.backbones.catalogue import find_cost, find_version, make_without_values, read_measured
from featcache.backbones.families import find_family, find_trunk
from featcache.backbones.structure import count_operations
from featcache.errors import FeatcacheError
from featcache.preprocessing import Preprocessing


def find_multiply_adds(extractor: Mapping[str, Any]) -> int | None:
    """Multiply-adds of an image's way through the whole network, from a description (see `Backbone.describe`).

    What was measured before is looked up in a millisecond; a size of images other than that of the default weights is
    measured each time. None of layers inside the network, whose share nobody has counted, of networks of one's own, and
    of imported features.
    """
    given = extractor["weights"].get("requested") == "given"  # a network made in Python, under any name
    if given or extractor.get("layers") or not isinstance(extractor.get("preprocessing"), dict):
        return None
    name, shape = str(extractor["backbone"]), Preprocessing.from_json(extractor["preprocessing"]).input_shape
    known = read_measured().get(f"{find_version(name)} {name}")  # without the list of all names: timm's takes seconds
    if known is None:
        cost = find_cost(extractor)
        known = cost and {"operations": cost.operations, "input_shape": cost.input_shape}
    if not known or known["operations"] is None or len(known["input_shape"]) != len(shape):
        return None
    if tuple(known["input_shape"]) == shape:
        return int(known["operations"])
    return measure_multiply_adds(name, shape)


def measure_multiply_adds(name: str, shape: tuple[int, ...]) -> int | None:
    """The same at images of another shape, measured; None where the network does not take them as it comes."""
    try:
        family, plain = find_family(name)
        network, _ = make_without_values(name, (shape[-2], shape[-1]))
        trunk = find_trunk(family, plain, network)
        part = network.get_submodule(trunk) if trunk else network
        return count_operations(part.eval(), shape, where=name)
    except FeatcacheError:
        return None
