"""Files to batches: bytes -> decoded RGB image -> transformed batch (B, 3, H, W) float32. The only owner of Pillow.

Knows no labels' meaning, no network and no cache. What a decoder makes of unusual images is one stated rule each:

========================  ==================================================================================
file format               JPEG, PNG, WebP, BMP, GIF, TIFF and PNM, told by content, never by name
EXIF orientation          applied; a damaged EXIF block is as good as none
transparency              composed on white
16-bit grey               divided by 257, so that full scale stays full scale
float or 32-bit pixels    refused: their range is not stated in the file
animation, pages          the first frame
truncated                 refused, as far as the decoder can tell
more than MAX_PIXELS      refused from the header, before decoding
========================  ==================================================================================
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from featcache.errors import BadImage, ImageError
from featcache.files import hash_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's own limit of a decompression bomb: 0.5 GB as RGB
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {  # what undoes each, as in PIL.ImageOps.exif_transpose, which fails where another EXIF field is damaged
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RULES = "pillow; exif applied; alpha on white; 16-bit / 257; first frame"

Transform: TypeAlias = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to an image before the network sees it: part of the weights, and of every cache key.

    Attributes
    ----------
    resize
        Length in pixels that the shorter side is resized to.
    crop
        Side in pixels of the square that is cut from the middle.
    interpolation
        "bilinear" or "bicubic", antialiased.
    mean, std
        Per channel (R, G, B), of pixel values scaled to [0, 1].
    decoding
        The rules of this module, in words.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    decoding: str = RULES

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """From what `to_json` gave."""
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})


@dataclass(frozen=True)
class Batch:
    """Decoded images and where they belong.

    Attributes
    ----------
    rows
        (B,) int64, positions in the list of paths that was asked for.
    images
        (B, 3, H, W) float32.
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


def decode_image(data: bytes) -> Image.Image:
    """Decode one image file's bytes to RGB, by the rules of this module.

    Raises
    ------
    ImageError
        If the bytes are not an image of a known format, or it is damaged or too large.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height)
        image.load()
        return _to_rgb(_orient(image), image.format)
    except (ImageError, MemoryError):  # short memory is no fault of the file's
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise ImageError(f"damaged image: {error}" if str(error) else "damaged image") from error


def make_evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Resize, crop the middle, scale, normalise: RGB image -> (3, crop, crop) float32, the same every time."""
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    transform: Transform = transforms.Compose(
        [
            transforms.Resize(preprocessing.resize, interpolation=mode),
            transforms.CenterCrop(preprocessing.crop),
            *_to_normalised_tensor(preprocessing),
        ]
    )
    return transform


def make_training_transform(preprocessing: Preprocessing) -> Transform:
    """A random crop of random size, perhaps mirrored: RGB image -> (3, crop, crop) float32.

    Source: the classic recipe, RandomResizedCrop and RandomHorizontalFlip of
    https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html.
    """
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    transform: Transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(preprocessing.crop, interpolation=mode),
            transforms.RandomHorizontalFlip(),
            *_to_normalised_tensor(preprocessing),
        ]
    )
    return transform


def denormalise(images: Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Network input (B, 3, H, W) back to pictures for people, (B, H, W, 3) float32 in [0, 1]."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return np.asarray(pictures.numpy(), dtype=np.float32)


class ImageRows(Dataset[tuple[int, Tensor | str, int]]):
    """Decodes and transforms the image of a row when asked for it; an unusable one gives its reason instead.

    Parameters
    ----------
    root
        Folder that the paths are relative to.
    paths
        N paths.
    labels
        (N,) integers, or None where nobody asks.
    transform
        RGB image -> tensor.
    digests
        N SHA-256 digests that the files' bytes must have, or None: a file that changed meanwhile is a bad one.
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
            return row, self._load(row), label
        except ImageError as error:
            return row, str(error), label

    def _load(self, row: int) -> Tensor:
        try:
            data = (self.root / self.paths[row]).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error
        if self.digests is not None and hash_bytes(data) != self.digests[row]:
            raise ImageError("changed while it was being worked on; run the same command again")
        return self.transform(decode_image(data))

    def collate(self, items: list[tuple[int, Tensor | str, int]]) -> Batch:
        """Stack the usable rows and name the others."""
        good = [(row, image, label) for row, image, label in items if isinstance(image, Tensor)]
        bad = [BadImage(self.paths[row], reason) for row, reason, _ in items if isinstance(reason, str)]
        images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0)
        rows = torch.tensor([row for row, _, _ in good], dtype=torch.int64)
        labels = torch.tensor([label for _, _, label in good], dtype=torch.int64)
        return Batch(rows, images, labels, bad)


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
    root: Path, paths: Sequence[str], *, workers: int | None = None, batch_size: int = 32
) -> Iterable[Batch]:
    """A loader that only decodes: its batches' `bad` are the files that cannot be used."""
    return make_loader(ImageRows(root, paths, transform=_nothing), batch_size=batch_size, workers=workers)


def _nothing(image: Image.Image) -> Tensor:
    del image
    return torch.zeros(0)


def _ignore_interrupt(worker: int) -> None:
    """Let only the main process answer Ctrl-C: it stops the workers itself."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to_normalised_tensor(preprocessing: Preprocessing) -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    short, long = sorted((width, height))
    if long > 500 * short:  # resizing the shorter side to 256 would make a gigabyte of a 1 x 5000 strip
        raise ImageError(f"{width} x {height} is a strip: one side is more than 500 times the other")


def _orient(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - a damaged EXIF block raises anything; the pixels are there all the same
        return image
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Any mode that Pillow decodes to 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" and file_format == "TIFF":
        raise ImageError("32-bit pixels: their range is not stated in the file; save it with 8 or 16 bits")
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _scale_16_bit(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels: their range is not stated in the file; save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError("32-bit pixels: their range is not stated in the file; save it with 8 or 16 bits")
    return Image.fromarray(np.round(pixels / 257).astype(np.uint8)).convert("RGB")


def enlarge(picture: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> Image.Image:
    """A tiny grey picture (H, W) uint8 with a white margin of one pixel, smoothly enlarged to `size` x `size` RGB."""
    framed = Image.fromarray(np.pad(picture, 1, constant_values=255))
    return framed.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG."""
    image.save(path, format="PNG")
