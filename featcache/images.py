"""Files to batches: path -> bytes -> decoded RGB image -> transformed batch (B, 3, H, W) float32.

Of clips: path -> T frames -> (B, 3, T, H, W). Knows no labels' meaning, no network and no cache; what decoding does is
`featcache.decoding`'s and `featcache.clips`'s.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from featcache.clips import CLIP_RULES, decode_clip
from featcache.config import CHOICES, MAX_SIDE
from featcache.dataset import hash_clip
from featcache.decoding import RULES, decode_safely
from featcache.errors import BadImage, ImageError, SettingsError
from featcache.files import hash_bytes

PictureTransform: TypeAlias = Callable[[Image.Image], Tensor]


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
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoding: str = RULES
    channels: str = "RGB"
    frames: int = 0

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


CHANGED = "changed while it was being worked on; run the same command again"
USUAL = {"channels": "RGB", "frames": 0}


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


@dataclass(frozen=True)
class Batch:
    """Decoded images and where they belong.

    Attributes
    ----------
    rows
        (B,) int64, positions in the list of paths that was asked for.
    images
        (B, 3, H, W) float32; of clips (B, 3, T, H, W).
    labels
        (B,) int64.
    bad
        Files of this batch that could not be used; they have no row here.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    bad: list[BadImage]

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for fast copies to a GPU."""
        return Batch(self.rows, self.images.pin_memory(), self.labels.pin_memory(), self.bad)


@dataclass(frozen=True)
class ClipTransform:
    """The transform of a picture for each frame of a clip: T RGB images -> (3, T, H, W) float32.

    `ImageRows` with such a transform decodes clips.

    Attributes
    ----------
    frames
        How many a clip has to be decoded to.
    picture
        What happens to each.
    one_draw
        Whether all of them meet the same chance: a crop that jumps about is no motion.
    """

    frames: int
    picture: PictureTransform
    one_draw: bool = False

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The frames' tensors along a new second axis."""
        drawn = torch.get_rng_state() if self.one_draw else None
        tensors = []
        for image in images:
            if drawn is not None:
                torch.set_rng_state(drawn)
            tensors.append(self.picture(image))
        return torch.stack(tensors, dim=1)


Transform: TypeAlias = PictureTransform | ClipTransform


def make_evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Resize, crop the middle, scale, normalise: RGB image -> (3, H, W) float32, the same every time.

    Of a clip every frame, to (3, T, H, W). Torchvision's own preset of its video networks resizes tensors without
    antialiasing; here Pillow resizes, antialiased, as it does pictures. On frames that are much larger than what the
    network sees this is smoother.
    """
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    transform: PictureTransform = transforms.Compose(
        [
            transforms.Resize(preprocessing.resize, interpolation=mode),
            transforms.CenterCrop(preprocessing.crop),
            *_to_normalised_tensor(preprocessing),
        ]
    )
    return ClipTransform(preprocessing.frames, transform) if preprocessing.frames else transform


def make_training_transform(preprocessing: Preprocessing) -> Transform:
    """A random crop of random size, perhaps mirrored: RGB image -> (3, crop, crop) float32.

    Of a clip all frames alike, to (3, T, crop, crop).

    Source: the classic recipe, RandomResizedCrop and RandomHorizontalFlip of
    https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html.
    """
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    transform: PictureTransform = transforms.Compose(
        [
            transforms.RandomResizedCrop(preprocessing.crop, interpolation=mode),
            transforms.RandomHorizontalFlip(),
            *_to_normalised_tensor(preprocessing),
        ]
    )
    return ClipTransform(preprocessing.frames, transform, one_draw=True) if preprocessing.frames else transform


def denormalise(images: Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Network input (B, 3, H, W) back to pictures for people, (B, H, W, 3) float32 in [0, 1].

    Of clips (B, 3, T, H, W) the frame in the middle, T // 2.
    """
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    if preprocessing.channels == "BGR":
        pictures = pictures.flip(-1)
    elif preprocessing.channels == "L":
        pictures = pictures.expand(-1, -1, -1, 3)
    return np.asarray(pictures.numpy(), dtype=np.float32)


class ImageRows(Dataset[tuple[int, Tensor | str, int]]):
    """Decodes and transforms the image of a row when asked for it; an unusable one gives its reason instead.

    With a `ClipTransform` a row is a clip: a video file or a folder of frames.

    Parameters
    ----------
    root
        Folder that the paths are relative to.
    paths
        N paths.
    labels
        (N,) integers, or None where nobody asks.
    transform
        RGB image -> tensor, or RGB images -> tensor.
    digests
        N SHA-256 digests that the files' bytes must have, or None: a file that changed meanwhile is a bad one. Of a
        folder of frames all are read for it.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        *,
        transform: Transform,
        labels: Sequence[int] | None = None,
        digests: Sequence[str] | None = None,
    ) -> None:
        self.root, self.paths, self.transform = root, paths, transform
        self.labels, self.digests = labels, digests

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        label = -1 if self.labels is None else int(self.labels[row])
        try:
            return row, self.transform(self.decode(row)), label
        except ImageError as error:
            return row, str(error), label

    def decode(self, row: int) -> Any:
        """RGB image of a row, or RGB images of a clip's frames.

        Raises
        ------
        ImageError
            If it cannot be used.
        """
        if isinstance(self.transform, ClipTransform):
            return self._load_clip(row, self.transform.frames)
        return load_image(self.root / self.paths[row], None if self.digests is None else self.digests[row])

    def _load_clip(self, row: int, frames: int) -> list[Image.Image]:
        path = self.root / self.paths[row]
        try:
            images = decode_clip(path, frames)
        except ImageError:
            self._check_clip(row)  # what changed meanwhile is not damaged
            raise
        self._check_clip(row)  # after decoding, which reads the file by itself: it was the same all the while
        return images

    def _check_clip(self, row: int) -> None:
        if self.digests is not None and hash_clip(self.root / self.paths[row]) != self.digests[row]:
            raise ImageError(CHANGED)

    def collate(self, items: list[tuple[int, Tensor | str, int]]) -> Batch:
        """Stack the usable rows and name the others."""
        good = [(row, image, label) for row, image, label in items if isinstance(image, Tensor)]
        bad = [BadImage(self.paths[row], reason) for row, reason, _ in items if isinstance(reason, str)]
        images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0)
        rows = torch.tensor([row for row, _, _ in good], dtype=torch.int64)
        labels = torch.tensor([label for _, _, label in good], dtype=torch.int64)
        return Batch(rows, images, labels, bad)


def load_image(path: Path, digest: str | None = None) -> Image.Image:
    """RGB image of a file, whose bytes must have this digest if one is given.

    Raises
    ------
    ImageError
        If it cannot be used.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if digest is not None and hash_bytes(data) != digest:
        raise ImageError(CHANGED)
    return decode_safely(data)


def make_loader(
    rows: ImageRows, *, batch_size: int, workers: int | None = None, shuffle: bool = False, pin: bool = False
) -> Iterable[Batch]:
    """Batches of `rows`, decoded in `workers` processes, or in this one where `workers` is 0.

    Parameters
    ----------
    rows
        What to decode.
    batch_size
        Rows per batch.
    workers
        None chooses, see `choose_workers`.
    shuffle
        Another order each time, from torch's global random state.
    pin
        Page-locked batches, for copies to a GPU.
    """
    if workers is None:
        workers = choose_workers(len(rows))
    loader: Iterable[Batch] = DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        collate_fn=rows.collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt if workers else None,
    )
    return loader


def choose_workers(n_images: int) -> int:
    """Decoding processes for `n_images` on this machine: half of its cores, at most 8.

    None for a handful of images, and none on two cores: measured there, decoding in turn with the network (53 images/s
    for ResNet18) is no slower than a process that competes with it (45).
    """
    return 0 if n_images < 32 or count_cores() <= 2 else min(count_cores() // 2, 8)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_checking_loader(
    root: Path, paths: Sequence[str], *, workers: int | None = None, batch_size: int = 32, frames: int = 0
) -> Iterable[Batch]:
    """A loader that only decodes, images or so many frames of clips: its batches' `bad` are what cannot be used."""
    transform = ClipTransform(frames, _nothing) if frames else _nothing
    return make_loader(ImageRows(root, paths, transform=transform), batch_size=batch_size, workers=workers)


def _nothing(image: Image.Image) -> Tensor:
    del image
    return torch.zeros(0)


def _ignore_interrupt(worker: int) -> None:
    """Let only the main process answer Ctrl-C: it stops the workers itself."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to_normalised_tensor(preprocessing: Preprocessing) -> list[Any]:
    """RGB image -> tensor with the network's channels."""
    order = {"RGB": [], "BGR": [_reverse_channels], "L": [transforms.Grayscale()]}[preprocessing.channels]
    return [*order, transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]


def _reverse_channels(image: Image.Image) -> Image.Image:
    """RGB -> BGR."""
    return Image.merge("RGB", image.split()[::-1])


def enlarge(picture: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> Image.Image:
    """A tiny grey picture (H, W) uint8 with a white margin of one pixel, smoothly enlarged to `size` x `size` RGB."""
    framed = Image.fromarray(np.pad(picture, 1, constant_values=255))
    return framed.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG."""
    image.save(path, format="PNG")
