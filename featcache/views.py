"""Random views of images: how many there are, what each shows, and the digest by which its features are found.

A view is a piece of an image of random size, shape and place, resized to what the network sees, and perhaps mirrored.
All its chance comes from the seed, the digest of the image's bytes and the view's number, by SHA-256: it is the same on
every machine, whatever else is done, and in whatever order. Knows no pixels and needs no torch; `images` does what is
drawn here.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.files import canonical_json, hash_bytes

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height
MIRRORED = 0.5
TRIES = 10  # to find a piece of such a shape that lies in the image
# What a view of some seed and number is. "rules" is raised when the same would show something else.
RECIPE: dict[str, Any] = {
    "scale": list(SCALE),
    "ratio": list(RATIO),
    "mirrored": MIRRORED,
    "drawn": "SHA-256 of seed, digest of the image, number and try",
    "rules": 1,
}


class Piece(NamedTuple):
    """What a view shows of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_view(digest: str, number: int, *, seed: int, height: int, width: int) -> Piece:
    """What a view shows of an image.

    Parameters
    ----------
    digest
        Of the image's bytes.
    number
        Of the view, from 0.
    seed
        Other views of the same image.
    height, width
        The image's.

    Notes
    -----
    Source: the distributions of torchvision's RandomResizedCrop and RandomHorizontalFlip with their defaults.

    Examples
    --------
    >>> draw_view("ab" * 32, 0, seed=0, height=300, width=400)
    Piece(top=81, left=131, height=186, width=170, mirrored=True)
    """
    mirrored = _draw(seed, digest, number, TRIES)[0] < MIRRORED * 2**64
    for attempt in range(TRIES):
        area, shape, down, right = _draw(seed, digest, number, attempt)
        pixels = height * width * _between(area, *SCALE)
        ratio = math.exp(_between(shape, math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Piece(down * (height - h + 1) >> 64, right * (width - w + 1) >> 64, h, w, mirrored)
    return _cut_middle(height, width, mirrored)


def _draw(seed: int, digest: str, number: int, attempt: int) -> tuple[int, int, int, int]:
    """Four integers below 2**64."""
    text = f"featcache view {number} of {digest}, seed {seed}, try {attempt}"
    return struct.unpack("<4Q", hashlib.sha256(text.encode()).digest())


def _between(drawn: int, low: float, high: float) -> float:
    return low + drawn / 2**64 * (high - low)


def _cut_middle(height: int, width: int, mirrored: bool) -> Piece:
    """The largest piece in the middle whose shape is allowed."""
    w = min(width, max(round(height * RATIO[1]), 1))
    h = min(height, max(round(width / RATIO[0]), 1))
    return Piece((height - h) // 2, (width - w) // 2, h, w, mirrored)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How many views there are of each image, and which: what a cache states of them.

    Attributes
    ----------
    train
        Of each training image.
    others
        Of each image of every other split.
    seed
        Of all of them.
    recipe
        What a view is, see `RECIPE`.
    """

    train: int = 0
    others: int = 0
    seed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))

    def __post_init__(self) -> None:
        if not self:  # there is but one way to have none
            object.__setattr__(self, "seed", 0)
            object.__setattr__(self, "recipe", dict(RECIPE))

    def __bool__(self) -> bool:
        return self.train > 0 or self.others > 0

    def count(self, split: str) -> int:
        """Views of each image of a split."""
        return self.train if split == "train" else self.others

    def is_like(self, other: Views) -> bool:
        """Whether a view of the same image and number is the same in both."""
        return self.seed == other.seed and self.recipe == other.recipe

    def name_row(self, digest: str, number: int | None) -> str:
        """The digest by which the row of a view of an image is found; of the image itself (None) its own."""
        if number is None:
            return digest
        return hashlib.sha256(f"view {number} of {digest} by {self._described}".encode()).hexdigest()

    def name_rows(self, digests: Sequence[str], n: int) -> NDArray[np.bytes_]:
        """The same of N images and of n views of each.

        Returns
        -------
        (N, 1 + n) S64: first the image's own, then one for each view.
        """
        if not n:
            return np.array(digests, dtype="S64").reshape(-1, 1)
        numbers = (None, *range(n))
        names = [self.name_row(digest, number).encode() for digest in digests for number in numbers]
        return np.array(names, dtype="S64").reshape(len(digests), 1 + n)

    @cached_property
    def _described(self) -> str:
        """Digest of seed and recipe."""
        return hash_bytes(canonical_json({"seed": self.seed, "recipe": dict(self.recipe)}).encode())

    def describe(self) -> str:
        """How many, in words.

        >>> Views(train=4, others=1).describe()
        '4 of each training image, 1 of each held-out image'
        """
        counts = {"training image": self.train, "held-out image": self.others}
        return ", ".join(f"{n} of each {what}" for what, n in counts.items() if n) or "none"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"train": self.train, "others": self.others, "seed": self.seed, "recipe": dict(self.recipe)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Views:
        """From what `to_json` gave.

        Raises
        ------
        ValueError
            If it is something else.
        """
        views = cls(**value)
        numbers = (views.train, views.others, views.seed)
        if not views or not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(views.recipe, Mapping):
            raise ValueError(f"{dict(value)} describes no views")
        return views


NO_VIEWS = Views()
