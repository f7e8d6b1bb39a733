"""Image files -> small upright JPEGs, as data URIs that a page holds within itself.

One image is in memory at a time. A file that is missing, broken or too large has no thumbnail, which is no error: the
page shows its path alone. Knows no page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from featcache.dataset import Item, Root, is_url
from featcache.decoding import JPEG, MAX_SCANS, convert_image, decode_safely
from featcache.errors import ImageError

SIDE = 112  # pixels of a thumbnail's longer side
QUALITY = 72  # of its JPEG
MAX_FILE_BYTES = 256 << 20  # a larger file is not read


def make_thumbnails(
    root: Root, paths: Sequence[str], *, side: int = SIDE, quality: int = QUALITY
) -> Iterator[tuple[str, str | None]]:
    """Each path with its thumbnail as a data URI, or None where there is none to be had; one after the other.

    Parameters
    ----------
    root
        What the paths are relative to; a path that leads out of it has no thumbnail.
    paths
        N files.
    side
        Pixels of the longer side.
    quality
        Of the JPEG, 1 to 95.
    """
    inside, readers = (root.resolve(), 1) if isinstance(root, Path) else (root, root.readers)

    def make(path: str) -> str | None:
        return make_thumbnail(inside / path, side=side, quality=quality) if _is_inside(path) else None

    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, len(paths), readers):  # whoever has enough asks for no more
            piece = paths[start : start + readers]
            yield from zip(piece, map(make, piece) if readers == 1 else pool.map(make, piece), strict=True)


def make_thumbnail(file: Path | Item, *, side: int = SIDE, quality: int = QUALITY) -> str | None:
    """The thumbnail of one image file as a data URI, or None if it cannot be had.

    EXIF's orientation is applied; nothing of the file but its pixels goes on: no EXIF, no place where it was taken.
    """
    try:
        if isinstance(file, Path) and (not file.is_file() or file.stat().st_size > MAX_FILE_BYTES):
            return None
        image = _decode_small(file.read_bytes(), side)
    except (OSError, ValueError, ImageError):  # ValueError: a path with a NUL
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.info.clear()  # or a JPEG's comment would go on
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _decode_small(data: bytes, side: int) -> Image.Image:
    """RGB of one file; of a JPEG no more pixels than a thumbnail of this side needs.

    libjpeg scales by 1/2, 1/4 or 1/8 as it decodes: a photograph of 12 megapixels takes a fifth of the time. The rule
    of which JPEGs are decoded in this process is that of `decode_safely`.

    Raises
    ------
    ImageError
        If there is nothing usable.
    """
    if not data.startswith(JPEG) or data.count(b"\xff\xda\x00") > MAX_SCANS:
        return decode_safely(data)
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Exception as error:
        raise ImageError("damaged image") from error
    image.draft("RGB", (2 * side, 2 * side))
    return convert_image(image)


def _is_inside(path: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts and not is_url(path)
