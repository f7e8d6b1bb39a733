"""What training does to images: random crops and colours, mixed batches, and the order of an epoch.

By default every image has random numbers of its own, drawn from the seed, the epoch and its row: the result does not
depend on how many processes decode or train, and an epoch can be left and taken up again anywhere. Or all comes from
torch's one stream of random numbers, as in the loop that everybody writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from torchvision import transforms
from torchvision.transforms import v2

from featcache.files import hash_bytes
from featcache.images import ClipTransform, ImageRows, PictureTransform, Transform, make_evaluation_transform
from featcache.preprocessing import Preprocessing
from featcache.processes import NOBODY


def make_training_transform(preprocessing: Preprocessing, augment: str = "crop") -> Transform:
    """What happens to a training image: RGB image -> (3, crop, crop) float32.

    Of a clip all frames alike, to (3, T, crop, crop).

    Parameters
    ----------
    preprocessing
        Of the backbone.
    augment
        "crop": a random crop of random size, perhaps mirrored [1]_. "randaugment" [2]_ and "trivialaugment" [3]_ then
        shift, turn and colour it at random. "none" treats it as in evaluation.

    References
    ----------
    .. [1] The classic recipe, https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
    .. [2] Cubuk et al., 2020, https://arxiv.org/abs/1909.13719
    .. [3] Mueller & Hutter, 2021, https://arxiv.org/abs/2103.10158
    """
    if augment == "none":
        return make_evaluation_transform(preprocessing)
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    colours = {"randaugment": transforms.RandAugment, "trivialaugment": transforms.TrivialAugmentWide}
    # the operators of these two know nearest and bilinear alone
    further = [colours[augment](interpolation=transforms.InterpolationMode.BILINEAR)] if augment in colours else []
    transform: PictureTransform = transforms.Compose(
        [
            transforms.RandomResizedCrop(preprocessing.crop, interpolation=mode),
            transforms.RandomHorizontalFlip(),
            *further,
            *_to_normalised_tensor(preprocessing),
        ]
    )
    return ClipTransform(preprocessing.frames, transform, one_draw=True) if preprocessing.frames else transform


def make_mix(mixup: float, cutmix: float, n_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What mixes the images of a batch: (B, 3, H, W), (B,) -> (B, 3, H, W), shares of the classes (B, C).

    Parameters
    ----------
    mixup
        Alpha of mixup, sums of two images [1]_; 0 does without.
    cutmix
        Alpha of CutMix, a piece of one image in another [2]_; 0 does without. With both, each batch meets one of them.
    n_classes
        C.

    References
    ----------
    .. [1] Zhang et al., 2018, https://arxiv.org/abs/1710.09412
    .. [2] Yun et al., 2019, https://arxiv.org/abs/1905.04899
    """
    ways = [
        *([v2.MixUp(alpha=mixup, num_classes=n_classes)] if mixup else []),
        *([v2.CutMix(alpha=cutmix, num_classes=n_classes)] if cutmix else []),
    ]
    if not ways:
        return None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = ways[0] if len(ways) == 1 else v2.RandomChoice(ways)
    return mix


class Draw(NamedTuple):
    """An image of an epoch.

    Attributes
    ----------
    row
        Which.
    seed
        Of its random numbers.
    counts
        Whether it counts; one that does not is there because every process needs an image.
    """

    row: int
    seed: int
    counts: bool = True


class TrainingRows(ImageRows):
    """Rows by their number, or by a `Draw`, whose transform then sees random numbers of its own."""

    def __getitem__(self, row: int | Draw) -> tuple[int, Tensor | str, int]:
        if isinstance(row, int):
            return super().__getitem__(row)
        with seeded(row.seed):
            number, image, label = super().__getitem__(row.row)
        return number, image, label if row.counts else NOBODY


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, on the CPU, while the block lasts; the stream outside goes on as if nothing were."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class TrainingOrder(Sampler[Any]):
    """The batches of an epoch, in a new order each time: of one process all rows, of several each its share.

    Parameters
    ----------
    n
        Rows.
    batch_size
        Rows per gradient step, of all processes together.
    seed
        Decides order and random numbers, with the epoch.
    one_stream
        Take both from the global stream of random numbers, as a plain DataLoader does.
    rank, size
        Which process this is, and of how many.
    """

    def __init__(
        self, n: int, batch_size: int, *, seed: int, one_stream: bool = False, rank: int = 0, size: int = 1
    ) -> None:
        self.n, self.batch_size, self.seed, self.one_stream = n, batch_size, seed, one_stream
        self.rank, self.size = rank, size
        self.epoch, self.first = 1, 0
        self.order: Tensor = torch.empty(0, dtype=torch.int64)
        self._given = False

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch_size)

    def begin(self, epoch: int, first: int = 0, order: Tensor | None = None) -> None:
        """Let the next iteration be of this epoch, from this batch on, in an order that was drawn before."""
        self.epoch, self.first, self._given = epoch, first, order is not None
        if order is not None:
            self.order = order

    def __iter__(self) -> Iterator[list[int] | list[Draw]]:
        if not self._given:
            shuffled = RandomSampler(
                range(self.n), generator=None if self.one_stream else self._make_generator("order")
            )
            self.order = torch.tensor(list(shuffled), dtype=torch.int64)
        seeds = [] if self.one_stream else self._draw_seeds()
        first, self.first, self._given = self.first, 0, False
        for start in range(first * self.batch_size, self.n, self.batch_size):
            rows = self.order[start : start + self.batch_size].tolist()
            if self.one_stream:
                yield rows
            else:
                share = [Draw(row, seeds[row]) for row in rows[self.rank :: self.size]]
                yield share or [Draw(rows[0], seeds[rows[0]], counts=False)]

    def _draw_seeds(self) -> list[int]:
        """A seed for each row."""
        return torch.randint(2**62, (self.n,), generator=self._make_generator("seeds")).tolist()

    def _make_generator(self, what: str) -> torch.Generator:
        """Random numbers of this epoch, others for each purpose."""
        digest = hash_bytes(f"{what} {self.seed} {self.epoch}".encode())
        return torch.Generator().manual_seed(int(digest[:15], 16))


def _to_normalised_tensor(preprocessing: Preprocessing) -> list[Any]:
    """RGB image -> tensor with the network's channels."""
    order = {"RGB": [], "BGR": [_reverse_channels], "L": [transforms.Grayscale()]}[preprocessing.channels]
    return [*order, transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]


def _reverse_channels(image: Image.Image) -> Image.Image:
    """RGB -> BGR."""
    return Image.merge("RGB", image.split()[::-1])
