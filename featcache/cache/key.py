"""What decides the features, as a digest; what differs between two extractors. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from featcache.files import canonical_json, hash_bytes
from featcache.preprocessing import USUAL

# Raised when the same description would no longer give the same features. (The file's own number is the schema's.)
KEY_SCHEMA = 1


def key_parts(extractor: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an extractor's description that decides the features, and nothing else.

    Where the weights lay and what the file was called is left out: the same tensors are the same weights, and the same
    ONNX file is the same network.
    """
    weights, backbone = extractor.get("weights"), extractor.get("backbone")
    return {
        **extractor,
        "backbone": name_network(backbone) if isinstance(backbone, str) else backbone,
        "weights": weights.get("tensors_sha256") if isinstance(weights, Mapping) else weights,
    }


def name_network(backbone: str) -> str:
    """A backbone's name as far as it decides the features.

    >>> name_network("resnet18"), name_network("onnx:/home/me/net.onnx")
    ('resnet18', 'onnx')
    """
    return "onnx" if backbone.startswith("onnx:") else backbone


def hash_extractor(extractor: Mapping[str, Any]) -> str:
    """The extractor's key: SHA-256 over what decides the features, and the schema."""
    return hash_bytes(canonical_json({"schema": KEY_SCHEMA, **key_parts(extractor)}).encode())


def can_serve(source: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether rows of one extractor are those of another: the same key, or float32 rows where float16 is wanted.

    Rounding a stored float32 row to float16 is what extraction itself does.
    """
    if hash_extractor(source) == hash_extractor(wanted):
        return True
    precision = source.get("precision")
    if not isinstance(precision, Mapping) or precision.get("stored") != "float32":
        return False
    rounded = {**source, "precision": {**precision, "stored": "float16"}}
    return hash_extractor(rounded) == hash_extractor(wanted)


class Field(NamedTuple):
    """One value that decides the features: in the file, and wanted now."""

    name: str
    found: Any
    wanted: Any

    @property
    def same(self) -> bool:
        """Whether it keeps no row from being used."""
        return bool(self.found == self.wanted)


def compare_fields(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[Field]:
    """All values of two descriptions side by side, those in groups by their dotted names.

    >>> compare_fields({"dim": 8, "p": {"crop": 16}}, {"dim": 8, "p": {"crop": 17}})
    [Field(name='dim', found=8, wanted=8), Field(name='p.crop', found=16, wanted=17)]
    """
    fields = []
    for name in [*found, *(name for name in wanted if name not in found)]:
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            fields += compare_fields(one, other, f"{prefix}{name}.")
        else:
            fields.append(Field(f"{prefix}{name}", one, other))
    return fields


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each value that differs between two descriptions, as "name: old -> new".

    >>> list_differences({"a": 1, "p": {"crop": 224}}, {"a": 1, "p": {"crop": 299}})
    ['p.crop: 224 -> 299']
    """
    return [
        f"{field.name}: {shorten(field.found)} -> {shorten(field.wanted)}"
        for field in compare_fields(old, new)
        if not field.same
    ]


def spell_out(extractor: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the features, for people: the usual decoder is named, and the ranges of int8 are their digest.

    >>> spell_out({"preprocessing": {"crop": 224}})["preprocessing"]["decoder"]
    'pillow'
    """
    parts = key_parts(extractor)
    preprocessing, precision = parts.get("preprocessing"), parts.get("precision")
    if isinstance(preprocessing, Mapping):
        parts["preprocessing"] = {**preprocessing, "decoder": preprocessing.get("decoder", USUAL["decoder"])}
    if isinstance(precision, Mapping) and "ranges" in precision:
        parts["precision"] = {**precision, "ranges": hash_bytes(canonical_json(precision["ranges"]).encode())}
    return parts


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two extractors, in a line; the layers' list is left out, which `layer` says in words."""
    one, other = ({name: value for name, value in spell_out(e).items() if name != "layers"} for e in (old, new))
    if one["weights"] != other["weights"]:
        one["weights"], other["weights"] = name_weights(old), name_weights(new)
    return "; ".join(list_differences(one, other)) or "another version of featcache"


def name_weights(extractor: Mapping[str, Any]) -> str:
    """What the weights of an extractor are called, and the first digits of what they are.

    >>> name_weights({"weights": {"name": "random, seed 0", "tensors_sha256": "0123456789abcdef"}})
    'random, seed 0 [01234567...]'
    """
    weights = extractor["weights"]
    if not isinstance(weights, Mapping):
        return str(weights)
    return f"{weights.get('name')} [{str(weights.get('tensors_sha256'))[:8]}...]"


def shorten(value: Any) -> str:
    """A value for people: a digest by its first digits."""
    text = str(value)
    return f"{text[:8]}..." if isinstance(value, str) and len(text) == 64 else text
