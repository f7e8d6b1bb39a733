"""Files to batches: path -> bytes -> decoded RGB image -> transformed batch (B, 3, H, W) float32.

Of clips: path -> T frames -> (B, 3, T, H, W). Knows no labels' meaning, no network and no cache; what decoding does is
`featcache.decoding`'s and `featcache.clips`'s.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import transforms
from torchvision.transforms import functional

from featcache.clips import decode_clip
from featcache.dataset import Files, Item, hash_clip
from featcache.decoding import decode_array, decode_safely
from featcache.errors import BadImage, ImageError
from featcache.files import hash_bytes
from featcache.preprocessing import Preprocessing
from featcache.views import Piece, draw_view

Decoded: TypeAlias = Image.Image | NDArray[np.uint8]  # RGB, as an image or as pixels (H, W, 3)
Decode: TypeAlias = Callable[[bytes], Decoded]
PictureTransform: TypeAlias = Callable[[Any], Tensor]  # of what its `decode` gives, an image if it has none
CHANGED = "changed while it was being worked on; run the same command again"


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


class PixelTransform:
    """Resize and crop the middle: RGB image, or its pixels (H, W, 3) -> (channels, H, W) uint8, the same every time.

    The pixels lie in memory row after row, channel beside channel (channels last), as decoders make them and as the
    fast runtimes want them. With the decoder "torch" they differ from Pillow's by one grey level at most: both filter
    with weights rounded to integers, and round them differently.

    Of a clip every frame is treated so. Torchvision's own preset of its video networks resizes tensors without
    antialiasing; here it is antialiased, as for pictures. On frames that are much larger than what the network sees
    this is smoother.

    Attributes
    ----------
    decode
        What makes of a file's bytes what this takes.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.decode: Decode = decode_array if preprocessing.decoder == "torch" else decode_safely
        self._mode = transforms.InterpolationMode(preprocessing.interpolation)
        self._size = list(preprocessing.resize) if isinstance(preprocessing.resize, tuple) else [preprocessing.resize]
        self._resize_and_crop = self._with_torch if preprocessing.decoder == "torch" else self._with_pillow

    def __call__(self, image: Decoded) -> Tensor:
        """Pixels of one image."""
        return self.order(self._resize_and_crop(image))

    def order(self, pixels: NDArray[np.uint8]) -> Tensor:
        """RGB pixels (H, W, 3) as (channels, H, W), in the network's order of channels."""
        channels = self.preprocessing.channels
        if channels == "BGR":
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        elif channels == "L":
            pixels = np.array(Image.fromarray(pixels).convert("L"))[:, :, None]
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _with_pillow(self, image: Decoded) -> NDArray[np.uint8]:
        image = functional.resize(image, self._size, interpolation=self._mode)
        return np.array(functional.center_crop(image, list(self.preprocessing.size)))

    def _with_torch(self, image: Decoded) -> NDArray[np.uint8]:
        from torchvision.transforms.v2.functional import center_crop_image, resize_image

        pixels = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image)).permute(2, 0, 1)
        pixels = resize_image(pixels, self._size, interpolation=self._mode, antialias=True)
        pixels = center_crop_image(pixels, list(self.preprocessing.size))
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


class ViewTransform:
    """A random piece, resized, perhaps mirrored: RGB image, its digest and a number -> (channels, H, W) uint8.

    The same every time: chance is drawn from seed, digest and number alone, see `views`. All else is as in
    `PixelTransform`. Of a clip all frames are treated alike, to (channels, T, H, W).

    Parameters
    ----------
    preprocessing
        Of the backbone: size, interpolation, decoder, channels.
    seed
        Of the views.
    """

    def __init__(self, preprocessing: Preprocessing, seed: int = 0) -> None:
        self.preprocessing, self.seed = preprocessing, seed
        self._pixels = PixelTransform(preprocessing)
        self.decode = self._pixels.decode
        self._mode = transforms.InterpolationMode(preprocessing.interpolation)

    def __call__(self, image: Decoded | Sequence[Image.Image], digest: str, number: int) -> Tensor:
        """Pixels of one view of an image, or of a clip's frames."""
        if isinstance(image, Image.Image | np.ndarray):
            return self._view(image, digest, number)
        return torch.stack([self._view(frame, digest, number) for frame in image], dim=1)

    def _view(self, image: Decoded, digest: str, number: int) -> Tensor:
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        piece = draw_view(digest, number, seed=self.seed, height=height, width=width)
        pixels = (self._with_torch if self.preprocessing.decoder == "torch" else self._with_pillow)(image, piece)
        return self._pixels.order(np.ascontiguousarray(pixels[:, ::-1]) if piece.mirrored else pixels)

    def _with_pillow(self, image: Decoded, piece: Piece) -> NDArray[np.uint8]:
        size = list(self.preprocessing.size)
        return np.array(functional.resized_crop(image, *piece[:4], size, interpolation=self._mode))

    def _with_torch(self, image: Decoded, piece: Piece) -> NDArray[np.uint8]:
        from torchvision.transforms.v2.functional import resize_image

        top, left, height, width, _ = piece
        rows = image if isinstance(image, np.ndarray) else np.array(image)
        cut = np.ascontiguousarray(rows[top : top + height, left : left + width])
        size = list(self.preprocessing.size)
        pixels = resize_image(torch.from_numpy(cut).permute(2, 0, 1), size, interpolation=self._mode, antialias=True)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


class Normalise(nn.Module):
    """Pixels (B, C, H, W) uint8 -> what the network was trained on, float32; of clips (B, C, T, H, W).

    Bit for bit what torchvision's ToTensor and Normalize make of each image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        shape = (-1, *([1] * (len(preprocessing.input_shape) - 1)))
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(shape), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scale to [0, 1], subtract the mean, divide by the standard deviation."""
        return (pixels.float() / 255 - self.mean) / self.std


def make_pixel_transform(preprocessing: Preprocessing) -> Transform:
    """Pixels for a network that normalises by itself: RGB image -> (3, H, W) uint8; of clips (3, T, H, W)."""
    transform = PixelTransform(preprocessing)
    return ClipTransform(preprocessing.frames, transform) if preprocessing.frames else transform


def make_view_transform(preprocessing: Preprocessing, *, seed: int = 0) -> ViewTransform:
    """Pixels of random views for a network that normalises by itself; see `ViewTransform`.

    Examples
    --------
    >>> transform = make_view_transform(Preprocessing(resize=20, crop=16, mean=(0.5,) * 3, std=(0.5,) * 3))
    >>> transform(Image.new("RGB", (48, 40)), "ab" * 32, 0).shape
    torch.Size([3, 16, 16])
    """
    return ViewTransform(preprocessing, seed)


def make_evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Resize, crop the middle, scale, normalise: RGB image -> (3, H, W) float32, the same every time; see above."""
    transform: PictureTransform = transforms.Compose(
        [PixelTransform(preprocessing), Normalise(replace(preprocessing, frames=0)), _in_usual_order]
    )
    return ClipTransform(preprocessing.frames, transform) if preprocessing.frames else transform


def _in_usual_order(image: Tensor) -> Tensor:
    return image.contiguous()


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
        What the paths are relative to.
    paths
        N paths.
    labels
        (N,) integers, or None where nobody asks.
    transform
        RGB image -> tensor, or RGB images -> tensor.
    digests
        N SHA-256 digests that the files' bytes must have, or None: a file that changed meanwhile is a bad one. Of a
        folder of frames all are read for it.
    memory
        Where decoded images are looked for, and kept, if there is one. Not of clips, nor of arrays of pixels.
    """

    def __init__(
        self,
        root: Path | Files,
        paths: Sequence[str],
        *,
        transform: Transform,
        labels: Sequence[int] | None = None,
        digests: Sequence[str] | None = None,
        memory: ImageMemory | None = None,
    ) -> None:
        self.root, self.paths, self.transform = root, paths, transform
        self.labels, self.digests, self.memory = labels, digests, memory
        self._ahead: dict[str, Future[bytes]] = {}  # what is being read for the batch that is asked for

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        label = -1 if self.labels is None else int(self.labels[row])
        try:
            return row, self.transform(self.decode(row)), label
        except ImageError as error:
            return row, str(error), label

    def __getitems__(self, rows: Sequence[Any]) -> list[tuple[int, Tensor | str, int]]:
        """The rows of a batch, as a loader asks for them; what lies far away is read all at once."""
        if not isinstance(self.root, Files) or self.root.readers == 1:
            return [self[row] for row in rows]
        paths = {self.paths[getattr(row, "row", row)] for row in rows}
        ahead = [path for path in paths if self.memory is None or not self.memory.has(path)]
        with ThreadPoolExecutor(self.root.readers) as pool:
            self._ahead |= {path: pool.submit(self.root.read, path) for path in ahead}
            try:
                return [self[row] for row in rows]
            finally:
                for path in ahead:
                    self._ahead.pop(path, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": {}}

    def make_normalisation(self) -> nn.Module:
        """What is still to be done to a batch before the network sees it."""
        picture = self.transform.picture if isinstance(self.transform, ClipTransform) else self.transform
        return Normalise(picture.preprocessing) if isinstance(picture, PixelTransform) else nn.Identity()

    def decode(self, row: int) -> Any:
        """RGB image of a row, or its pixels where the transform wants those, or RGB images of a clip's frames.

        Raises
        ------
        ImageError
            If it cannot be used.
        """
        if isinstance(self.transform, ClipTransform):
            return self._load_clip(row, self.transform.frames)
        path = self.paths[row]
        if self.memory is not None and (kept := self.memory.find(path)) is not None:
            return kept
        image = self.load(self.find_file(path), None if self.digests is None else self.digests[row])
        if self.memory is not None and isinstance(image, Image.Image):
            self.memory.keep(path, image)
        return image

    def find_file(self, path: str) -> Path | Item | Future[bytes]:
        """What has the bytes of an image."""
        return self._ahead.get(path) or self.root / path

    def load(self, path: Path | Item | Future[bytes], digest: str | None) -> Decoded:
        """What the transform wants of an image file."""
        decode: Decode = getattr(self.transform, "decode", decode_safely)
        return decode(read_image(path, digest))

    def _load_clip(self, row: int, frames: int) -> list[Image.Image]:
        path = self.root / self.paths[row]
        if isinstance(path, Item):
            raise ImageError("a clip must be a local file: expected one on the disk, where decoders read it")
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
        images = stack_images([image for _, image, _ in good]) if good else torch.empty(0)
        rows = torch.tensor([row for row, _, _ in good], dtype=torch.int64)
        labels = torch.tensor([label for _, _, label in good], dtype=torch.int64)
        return Batch(rows, images, labels, bad)


class DecodedRows(ImageRows):
    """Images that were decoded before, perhaps on another machine.

    Parameters
    ----------
    paths
        N paths.
    images
        (B, C, H, W), or clips (B, C, T, H, W), of those that could be used.
    rows
        (B,) which of the N they are, ascending.
    reasons
        Why others cannot be used.
    transform
        What made them.
    """

    def __init__(
        self,
        paths: Sequence[str],
        images: Tensor,
        *,
        rows: NDArray[np.int64],
        reasons: Mapping[int, str],
        transform: Transform,
    ) -> None:
        super().__init__(Path(), paths, transform=transform)
        self._images, self._reasons = images, reasons
        self._at = {row: at for at, row in enumerate(rows.tolist())}

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        return row, self._reasons[row] if row in self._reasons else self._images[self._at[row]], -1


class ImageMemory:
    """Decoded images by their paths, kept while they fit.

    Decoding processes that are forked see what was kept before, and keep nothing themselves; those that are not forked
    have an empty one.

    Parameters
    ----------
    limit
        Bytes in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._lock = threading.Lock()
        self._pixels: dict[str, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def has(self, path: str) -> bool:
        """Whether the image of this path was kept."""
        return path in self._pixels

    def find(self, path: str) -> Image.Image | None:
        """The image of this path, if it was kept."""
        pixels = self._pixels.get(path)
        return None if pixels is None else Image.fromarray(pixels)

    def keep(self, path: str, image: Image.Image) -> None:
        """Keep an RGB image, if it fits."""
        size = 3 * image.width * image.height
        if get_worker_info() is not None:
            return
        with self._lock:
            if path in self._pixels or self.size + size > self.limit:
                return
            self.size += size
        self._pixels[path] = np.array(image)

    def __reduce__(self) -> tuple[type[ImageMemory], tuple[int]]:
        """For another process: an empty one."""
        return ImageMemory, (0,)


class ViewRows(ImageRows):
    """Images and random views of them, in any order; the last few images stay decoded, so that each is decoded once.

    Parameters
    ----------
    root
        What the paths are relative to.
    paths
        N paths, the same one for each row of an image; these rows best lie side by side.
    numbers
        N, of the view; None is the plain image.
    preprocessing, seed
        As in `ViewTransform`.
    digests
        N, as in `ImageRows`. None draws the views from the digests that the files have.
    """

    def __init__(
        self,
        root: Path | Files,
        paths: Sequence[str],
        *,
        numbers: Sequence[int | None],
        preprocessing: Preprocessing,
        seed: int = 0,
        digests: Sequence[str] | None = None,
    ) -> None:
        super().__init__(root, paths, transform=make_pixel_transform(preprocessing), digests=digests)
        self.numbers = numbers
        self._view = make_view_transform(preprocessing, seed=seed)
        self._memo = Memo()

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        number = self.numbers[row]
        keep = 1 if get_worker_info() else count_cores() + 1  # threads share them, processes work alone
        try:
            image, digest = self._memo.get(self.paths[row], lambda: self.decode_with_digest(row), keep)
        except ImageError as error:
            return row, str(error), -1
        return row, self.transform(image) if number is None else self._view(image, digest, number), -1

    def decode_with_digest(self, row: int) -> tuple[Any, str]:
        """What `decode` gives, and the digest of the file's bytes, or of the clip.

        Raises
        ------
        ImageError
            If it cannot be used.
        """
        path, digest = self.paths[row], None if self.digests is None else self.digests[row]
        if isinstance(self.transform, ClipTransform):
            return self.decode(row), digest or hash_clip(self.root / path)
        data = read_image(self.find_file(path), digest)
        return self._view.decode(data), digest or hash_bytes(data)


class Memo:
    """The last few values that were made, each made once, whichever threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[str, Future[Any]] = OrderedDict()

    def get(self, name: str, make: Callable[[], Any], keep: int) -> Any:
        """The value of a name, `keep` of which are kept. An `ImageError` that `make` raises is kept too."""
        with self._lock:
            mine = name not in self._values
            future = self._values.setdefault(name, Future())
            self._values.move_to_end(name)
            while len(self._values) > keep:
                self._values.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001 - somebody may be waiting; raised below
                if not isinstance(error, ImageError):  # the next try may succeed
                    with self._lock:
                        self._values.pop(name, None)
                future.set_exception(error)
        return future.result()

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        """For another process: an empty one."""
        return Memo, ()


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """B images (C, H, W) as one tensor (B, C, H, W) of the same order in memory; clips (C, T, H, W) alike."""
    if images[0].ndim == 3 and not images[0].is_contiguous():
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))


def read_image(path: Path | Item | Future[bytes], digest: str | None = None) -> bytes:
    """The bytes of an image file, or those that are being read, which must have this digest if one is given.

    Raises
    ------
    ImageError
        If it cannot be used.
    """
    try:
        data = path.result() if isinstance(path, Future) else path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if digest is not None and hash_bytes(data) != digest:
        raise ImageError(CHANGED)
    return data


def make_loader(
    rows: ImageRows,
    *,
    batch_size: int = 1,
    batches: Sampler[Any] | None = None,
    workers: int | None = None,
    pin: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Batches of `rows`, decoded in `workers` processes, or in this one where `workers` is 0.

    Parameters
    ----------
    rows
        What to decode.
    batch_size
        Rows per batch, in order.
    batches
        Which rows make a batch, in place of that.
    workers
        None chooses, see `choose_workers`.
    pin
        Page-locked batches, for copies to a GPU.
    generator
        Of the random numbers that a loader draws when it begins; None is torch's global one.
    """
    if workers is None:
        workers = choose_workers(len(rows), torch.device("cpu"))
    how: dict[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    loader: DataLoader[Any] = DataLoader(
        rows,
        **how,
        num_workers=workers,
        collate_fn=rows.collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt if workers else None,
        generator=generator,
    )
    return loader


def choose_workers(n_images: int, device: torch.device, processes: int = 1) -> int:
    """Decoding processes for `n_images` on this machine, for each of several processes that share its cores.

    For a GPU all cores but one, which feeds it. For a CPU half of its cores, at most 8; none on two cores: measured
    there, decoding in turn with the network (53 images/s for ResNet18) is no slower than a process that competes with
    it (45). None for a handful of images.
    """
    cores = max(count_cores() // processes, 1)
    if n_images < 32:
        return 0
    if device.type == "cuda":
        return min(cores - 1, 32)
    return 0 if cores <= 2 else min(cores // 2, 8)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_images(rows: ImageRows, *, threads: int | None = None, chunk: int = 32) -> Iterator[Batch]:
    """Decode every image, or clip, in threads, and give the rows in order, without images; `bad` cannot be used.

    What `rows` has a memory for is in it afterwards. No threads are those of all cores.
    """
    readers = rows.root.readers if isinstance(rows.root, Files) else 1
    with ThreadPoolExecutor(max(threads or count_cores(), readers)) as pool:
        for start in range(0, len(rows), chunk):
            reasons = pool.map(lambda row: _find_reason(rows, row), range(start, min(start + chunk, len(rows))))
            found = dict(enumerate(reasons, start))
            bad = [BadImage(rows.paths[row], reason) for row, reason in found.items() if reason]
            good = torch.tensor([row for row, reason in found.items() if not reason], dtype=torch.int64)
            yield Batch(good, torch.empty(0), torch.empty(0), bad)


def decode_nothing(image: Image.Image) -> Tensor:
    """A transform for those who only want to know whether images can be decoded."""
    del image
    return torch.zeros(0)


def _find_reason(rows: ImageRows, row: int) -> str:
    """Why a row cannot be used; "" if it can."""
    try:
        rows.decode(row)
    except ImageError as error:
        return str(error)
    return ""


def _ignore_interrupt(worker: int) -> None:
    """Let only the main process answer Ctrl-C: it stops the workers itself."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def enlarge(picture: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> Image.Image:
    """A tiny grey picture (H, W) uint8 with a white margin of one pixel, smoothly enlarged to `size` x `size` RGB."""
    framed = Image.fromarray(np.pad(picture, 1, constant_values=255))
    return framed.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG."""
    image.save(path, format="PNG")
