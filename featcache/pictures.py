"""Images as a caller in Python has them: paths, PIL images, pixels; told apart, checked, hashed, decoded.

Knows no network and no cache. A table of numbers, or whatever else is no image, is an error that says what it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.dataset import STATS, Digests, KnownFiles, Stats, hash_files
from featcache.decoding import convert_image
from featcache.errors import ImageError, InputError
from featcache.images import Decoded, ImageRows, Transform
from featcache.progress import SILENT, Progress

Picture: TypeAlias = str | Image.Image | NDArray[np.uint8]  # a path, an image, pixels (H, W[, channels])

CHANNELS = (1, 3, 4)  # grey, RGB, RGB and alpha
EXPECTED = "expected paths, PIL images, or uint8 pixels (N, H, W, 3)"


def list_pictures(X: Any) -> list[Picture]:  # noqa: N803 - as scikit-learn calls it
    """The N images that something stands for.

    Parameters
    ----------
    X
        N paths, PIL images or uint8 arrays (H, W), (H, W, 3), in a list, an array or a column (N, 1) of a table; or one
        uint8 array (N, H, W) or (N, H, W, 3).

    Raises
    ------
    InputError
        If it is something else; the message says where.
    """
    if isinstance(X, str | bytes | os.PathLike | Image.Image):
        raise InputError(f"X is one {type(X).__name__}: {EXPECTED}; put it into a list")
    items = X if isinstance(X, list | tuple) else np.asarray(X)
    if isinstance(items, np.ndarray):
        if items.dtype.kind not in "OUST":
            return list(_check_pixels(items))
        if items.ndim not in (1, 2) or items.shape[1:] not in ((), (1,)):
            raise InputError(f"X has shape {items.shape}: expected (N,) or one column (N, 1) of paths or images")
        items = items.reshape(-1)
    if not len(items):
        raise InputError(f"X holds no image: {EXPECTED}")
    return [_take_picture(item, row) for row, item in enumerate(items)]


def _take_picture(item: Any, row: int) -> Picture:
    """One path, image or array.

    Raises
    ------
    InputError
        If it is none of these.
    """
    if isinstance(item, list | tuple) and len(item) == 1:  # a column that was written as rows
        item = item[0]
    if isinstance(item, str | bytes | os.PathLike):
        return os.fsdecode(item)
    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, np.ndarray):
        raise InputError(f"X[{row}] is {item!r:.40}, a {type(item).__name__}: {EXPECTED}")
    if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in CHANNELS):
        raise InputError(f"X[{row}] is {item.dtype} {item.shape}: expected uint8 pixels (H, W) or (H, W, 3)")
    return item


def _check_pixels(X: NDArray[Any]) -> NDArray[np.uint8]:  # noqa: N803
    """N images in one array.

    Raises
    ------
    InputError
        If their shape or type is another; the message says how to make it right, where that can be known.
    """
    found = f"X is an array {X.dtype} {X.shape}"
    if X.ndim == 4 and X.shape[1] in CHANNELS and X.shape[3] not in CHANNELS:
        raise InputError(f"{found}: expected (N, H, W, 3); np.moveaxis(X, 1, -1) puts the channels last")
    if X.ndim == 3 and X.shape[2] in CHANNELS:
        raise InputError(f"{found}, which looks like one image: expected (N, H, W, 3); X[None] is a batch of one")
    if X.ndim not in (3, 4) or (X.ndim == 4 and X.shape[3] not in CHANNELS):
        raise InputError(f"{found}: {EXPECTED}")
    if X.dtype != np.uint8:
        raise InputError(f"{found}: expected uint8; (255 * X).round().astype('uint8') if it goes from 0 to 1")
    if not X.size:
        raise InputError(f"{found} and holds no pixel: {EXPECTED}")
    return X


def name_picture(picture: Picture, row: int) -> str:
    """What to call it in a message: its path, or its place."""
    return picture if isinstance(picture, str) else f"X[{row}]"


class Hashed(NamedTuple):
    """What was found out of N images.

    Attributes
    ----------
    digests
        N, in hexadecimal; "" for an image that cannot be used.
    reasons
        N, why it cannot; "" if it can.
    stats, stat_digests
        What proves later that a file that was read now is as it was.
    """

    digests: list[str]
    reasons: list[str]
    stats: Stats
    stat_digests: Digests


def hash_pictures(pictures: Sequence[Picture], known: KnownFiles | None = None, progress: Progress = SILENT) -> Hashed:
    """SHA-256 of each image: of a file's bytes, or of pixels.

    Parameters
    ----------
    pictures
        N images.
    known
        Files that need not be read again.
    progress
        Told how many files were read.
    """
    stats: list[Stats] = [np.empty((0, len(STATS)), np.int64)]
    proofs: list[Digests] = [np.empty(0, "S64")]

    def keep(some: Stats, digests: Digests) -> None:
        stats.append(some)
        proofs.append(digests)

    paths = list(dict.fromkeys(picture for picture in pictures if isinstance(picture, str)))
    _, digests, reasons = hash_files(paths, known=known, keep=keep, progress=progress)
    of_path = dict(zip(paths, zip(digests, reasons, strict=True), strict=True))
    both = [of_path[one] if isinstance(one, str) else _try_hash_pixels(one) for one in pictures]
    return Hashed([one for one, _ in both], [one for _, one in both], np.concatenate(stats), np.concatenate(proofs))


def _try_hash_pixels(picture: Image.Image | NDArray[np.uint8]) -> tuple[str, str]:
    """Digest of an image's RGB pixels and shape, and the reason if there is none."""
    try:
        pixels = np.ascontiguousarray(make_rgb(picture))
    except ImageError as error:
        return "", str(error)
    digest = hashlib.sha256(f"featcache pixels {pixels.shape} {pixels.dtype}\n".encode())  # no image file starts so
    digest.update(pixels.tobytes())
    return digest.hexdigest(), ""


def make_rgb(picture: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """An image in memory as RGB, by the rules for files.

    Raises
    ------
    ImageError
        If it cannot be used.
    """
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(np.ascontiguousarray(picture[..., 0] if picture.shape[2:] == (1,) else picture))
    return convert_image(picture)


class PictureRows(ImageRows):
    """Decodes and transforms images of any kind when asked for them; see `ImageRows`.

    Parameters
    ----------
    pictures
        N images.
    digests
        N, by which a bad one is named; a file must have its own still.
    transform
        RGB image -> tensor.
    """

    def __init__(self, pictures: Sequence[Picture], digests: Sequence[str], *, transform: Transform) -> None:
        super().__init__(Path(), digests, transform=transform)
        self.pictures = pictures

    def decode(self, row: int) -> Decoded:
        """RGB image of a row, or its pixels where the transform wants those."""
        picture = self.pictures[row]
        return self.load(Path(picture), self.paths[row]) if isinstance(picture, str) else make_rgb(picture)
