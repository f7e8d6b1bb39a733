"""What happens to an image before a network sees it, in words and numbers: part of the weights and of every cache key.

Knows no pixels: `images` does what is described here. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from featcache.clips import CLIP_RULES
from featcache.config import CHOICES, MAX_SIDE
from featcache.decoding import RULES
from featcache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to an image before the network sees it: part of the weights, and of every cache key.

    Attributes
    ----------
    resize
        Length in pixels that the shorter side is resized to; (H, W) resizes to exactly that, whatever the shape.
    crop
        Side in pixels of the square that is cut from the middle, or its (H, W).
    interpolation
        One of `INTERPOLATIONS`, antialiased.
    mean, std
        Per channel, in the order of `channels`, of pixel values scaled to [0, 1].
    decoding
        The rules of decoding, in words; those of clips where there are frames.
    channels
        "RGB", "BGR" or "L" (grey): what the network's first axis means.
    frames
        Of a clip, evenly spaced; 0 for pictures.
    decoder
        "pillow" resizes with Pillow: the reference. "torch" resizes with torch: half as long, no pixel more than
        one grey level off; bilinear only.
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoding: str = RULES
    channels: str = "RGB"
    frames: int = 0
    decoder: str = "pillow"

    def __post_init__(self) -> None:
        if self.frames and self.decoding == RULES:
            object.__setattr__(self, "decoding", CLIP_RULES)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of what the network sees."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, H, W), or (channels, frames, H, W) of a clip."""
        return (len(self.channels), *([self.frames] if self.frames else []), *self.size)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; what only some networks need is left out where it is as usual."""
        value = json.loads(json.dumps(asdict(self)))
        return {name: entry for name, entry in value.items() if name not in USUAL or entry != USUAL[name]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """From what `to_json` gave."""
        plain: dict[str, Any] = {name: freeze_list(entry) for name, entry in value.items()}
        return cls(**plain)


# What the decoder "torch" can do: where its bicubic overshoots, it was seen 18 grey levels from Pillow's.
TORCH_INTERPOLATIONS = ("bilinear",)
USUAL = {"channels": "RGB", "frames": 0, "decoder": "pillow"}


def freeze_list(value: Any) -> Any:
    """A JSON list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    """Whether a value is a number, and a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_side(value: Any) -> bool:
    """Whether a value is a number of pixels that a picture may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """What is known of the images that a network wants; None is not known.

    Attributes
    ----------
    input_size
        (H, W) in pixels.
    resize
        As in `Preprocessing`; not known is the shorter side to that of the input.
    interpolation, channels, frames
        As in `Preprocessing`.
    mean, std
        Per channel, or one for all, of pixel values in [0, scale].
    scale
        1 or 255, mostly.
    layout
        "NCHW", "NHWC", or "NF" for a network that wants rows of numbers: height by width by channel.
    """

    input_size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str | None = None
    channels: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: str | None = None
    frames: int = 0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            self._require(numbers is None or all(map(is_number, numbers)), name, "finite numbers")
        self._require(self.std is None or 0 not in self.std, "std", "numbers other than 0")
        self._require(self.scale is None or (is_number(self.scale) and self.scale > 0), "scale", "a number above 0")
        for name in ("input_size", "resize"):
            sides = getattr(self, name)
            sides = sides if isinstance(sides, tuple) else (sides,)
            pixels = len(sides) in (1, 2) and all(is_side(side) for side in sides)
            self._require(sides == (None,) or pixels, name, f"1 to {MAX_SIDE:,} pixels, or height and width")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise SettingsError(f"{name} is {getattr(self, name)!r}: expected {expected}")

    @classmethod
    def from_json(cls, value: Any) -> InputFormat:
        """From plain JSON values with the names of the fields; one number stands for a square, or for all channels.

        Raises
        ------
        SettingsError
            If it is something else.
        """
        known = [one.name for one in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            strange = sorted(set(value) - set(known)) if isinstance(value, Mapping) else type(value).__name__
            raise SettingsError(f"{strange} describes no images: expected an object with {', '.join(known)}")
        plain = {name: freeze_list(entry) for name, entry in value.items() if entry is not None}
        if isinstance(plain.get("input_size"), int):
            plain["input_size"] = (plain["input_size"],) * 2
        for name in ("mean", "std"):
            if isinstance(plain.get(name), int | float):
                plain[name] = (plain[name],)
        for name, choices in CHOICES.items():
            if name in plain and plain[name] not in choices:
                raise SettingsError(f"{name} is {plain[name]!r}: expected {' or '.join(choices)}")
        for name in ("input_size", "mean", "std"):
            if not isinstance(plain.get(name, ()), tuple):
                raise SettingsError(f"{name} is {plain[name]!r}: expected numbers")
        if len(plain.get("input_size", (1, 1))) != 2:
            raise SettingsError(f"input_size is {plain['input_size']}: expected height and width")
        return cls(**plain)

    def over(self, usual: InputFormat) -> InputFormat:
        """What is said here, else what is usual; a resize that is not stated keeps its ratio to the size."""
        merged = {name: value if value is not None else getattr(usual, name) for name, value in vars(self).items()}
        merged["frames"] = self.frames or usual.frames
        if self.scale is not None and self.scale != usual.scale and self.mean is None and usual.mean is not None:
            ratio = self.scale / (usual.scale or 1.0)
            merged["mean"] = tuple(ratio * value for value in usual.mean)
            merged["std"] = tuple(ratio * value for value in usual.std or ())
        if self.input_size and self.resize is None and usual.input_size and isinstance(usual.resize, int):
            merged["resize"] = round(usual.resize * min(self.input_size) / min(usual.input_size))
        elif self.input_size and self.resize is None:
            merged["resize"] = None
        return InputFormat(**merged)

    def list_missing(self) -> list[str]:
        """The options that would have to be given."""
        wanted = {"--input-size": self.input_size, "--mean": self.mean, "--std": self.std}
        return [option for option, value in wanted.items() if value is None]

    def make_preprocessing(self) -> Preprocessing:
        """The preprocessing, if nothing is missing.

        Raises
        ------
        SettingsError
            If the number of means is neither one nor that of the channels.
        """
        assert self.input_size is not None
        height, width = self.input_size
        channels = self.channels or "RGB"
        return Preprocessing(
            resize=self.resize or (height if height == width else self.input_size),
            crop=height if height == width else self.input_size,
            interpolation=self.interpolation or "bilinear",
            mean=self._spread("mean", len(channels)),
            std=self._spread("std", len(channels)),
            channels=channels,
            frames=self.frames,
        )

    def _spread(self, name: str, n: int) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name)
        if len(values) not in (1, n):
            raise SettingsError(f"--{name} has {len(values)} numbers: expected {n}, one per channel, or one for all")
        return tuple(value / (self.scale or 1.0) for value in (values * n if len(values) == 1 else values))
