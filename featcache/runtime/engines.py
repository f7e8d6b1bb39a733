"""A network made ready to run: pixels in, features out, on one device, callable from several threads at a time."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.errors import DeviceError
from featcache.runtime.devices import is_foreign, use_threads
from featcache.runtime.fusing import fuse_network

Values: TypeAlias = NDArray[np.float32]
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # relative error of features against eager's


class EngineError(Exception):
    """A network that cannot be run this way; the reason."""


class Run(Protocol):
    """What an engine does: pixels (B, C, H, W) -> values (B, D) float32."""

    def __call__(self, pixels: Tensor) -> Values:
        """Forward one batch."""


@dataclass(frozen=True)
class Engine:
    """A network made ready to run.

    Attributes
    ----------
    runtime
        Which way.
    run
        Pixels (B, C, H, W), uint8 or whatever the rows give -> values (B, D) float32.
    batch_size
        Of every batch, where the engine was made for that many; None takes any.
    device
        Where.
    """

    runtime: str
    run: Run
    batch_size: int | None = None
    device: torch.device = CPU

    def __call__(self, pixels: Tensor) -> Values:
        """Forward a batch, filled up with copies of its last image if it is too small."""
        if self.batch_size is None:
            return self.run(pixels)
        return self.run(fill_up(pixels, self.batch_size))[: len(pixels)]


@dataclass(frozen=True)
class Model:
    """What an engine is made of.

    Attributes
    ----------
    network
        Images -> features.
    normalise
        Pixels -> images.
    example
        (B, C, H, W) pixels as they will come: the first usable image, then noise.
    device
        Where it is to run.
    precision
        As in `Backbone`.
    """

    network: nn.Module
    normalise: nn.Module
    example: Tensor
    device: torch.device = CPU
    precision: Mapping[str, Any] = field(default_factory=lambda: {"compute": "float32"})

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return len(self.example)

    @property
    def compute(self) -> str:
        """Type in which the network computes."""
        return str(self.precision["compute"])


def fill_batches(engine: Engine, batch_size: int) -> Engine:
    """The engine for batches of one size, too small ones filled up."""
    return engine if engine.batch_size else replace(engine, batch_size=batch_size)


def fill_up(pixels: Tensor, batch_size: int) -> Tensor:
    """As many images as a batch has to have: the last one repeated."""
    missing = batch_size - len(pixels)
    if not missing:
        return pixels
    return keep_order(torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])]), pixels)


def keep_order(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels in the order in memory that others have: channels last or first."""
    if like.ndim == 4 and not like.is_contiguous():
        return pixels.contiguous(memory_format=torch.channels_last)
    return pixels.contiguous()


class TorchRun:
    """A network run by torch.

    Parameters
    ----------
    model
        What to run.
    network
        In place of the model's own: the same, fused or compiled.
    order
        Of its images in memory.
    alone
        Whether it must not be in two threads at a time.
    """

    def __init__(
        self, model: Model, network: Callable[[Tensor], Tensor], order: torch.memory_format, *, alone: bool = False
    ) -> None:
        self._network, self._device, self._order = network, model.device, order
        self._normalise = model.normalise.to(model.device)
        self._dtype = None if model.compute == "float32" else getattr(torch, model.compute)
        self._turn = threading.Lock() if alone else contextlib.nullcontext()

    def __call__(self, pixels: Tensor) -> Values:
        """Features of one batch."""
        try:
            with self._turn, torch.inference_mode(), self._cast():
                images = self._normalise(pixels.to(self._device, non_blocking=True))
                order = self._order if images.ndim == 4 else torch.contiguous_format
                values = self._network(images.contiguous(memory_format=order))
            return values.float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            fewer = max(len(pixels) // 2, 1)
            raise DeviceError(
                f"{self._device} is out of memory with batches of {len(pixels)} images; use --batch-size {fewer}"
            ) from error

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)


def make_eager(model: Model) -> Engine:
    """The network as it is; on CUDA in channels-last order, which its half-precision kernels want."""
    order = torch.channels_last if model.device.type == "cuda" else torch.contiguous_format
    return Engine("eager", TorchRun(model, model.network, order), device=model.device)


def make_fused(model: Model) -> Engine:
    """BatchNorm folded, channels last; the network as it is where that is not the same."""
    alone = keeps_something(model)
    plain = Engine("fused", TorchRun(model, model.network, torch.contiguous_format, alone=alone))
    if model.example.ndim != 4 or is_foreign(model.network):  # r3d_18 in channels-last order is a fifth slower
        return plain
    try:
        with torch.no_grad():
            images = model.normalise(model.example[:1])
        engine = Engine("fused", TorchRun(model, fuse_network(model.network, images), torch.channels_last, alone=alone))
        check_agreement(engine, model)
    except Exception:  # noqa: BLE001 - a network that cannot be copied, watched, or given images in this order
        return plain
    return engine


def keeps_something(model: Model) -> bool:
    """Whether a network keeps what it computes in attributes of its modules, where threads would find each other's."""
    before = _list_attributes(model.network)
    with torch.inference_mode():
        model.network(model.normalise(model.example[:1]))
    return _list_attributes(model.network) != before


def _list_attributes(network: nn.Module) -> dict[tuple[str, ...], int]:
    """The identity of all that is in attributes, or in dictionaries that are attributes."""
    found: dict[tuple[str, ...], int] = {}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            found[name, key] = id(value)
            if isinstance(value, dict):
                found |= {(name, key, str(entry)): id(held) for entry, held in value.items()}
    return found


def make_compiled(model: Model) -> Engine:
    """torch.compile, for batches of one size; on a CPU with frozen weights.

    Raises
    ------
    EngineError
        If it does not compile, or gives something else.
    """
    from torch._inductor import config as inductor

    order = torch.channels_last if model.example.ndim == 4 else torch.contiguous_format
    try:
        network = model.network.to(memory_format=order) if order is torch.channels_last else model.network
        run = TorchRun(model, torch.compile(network, dynamic=False), order)
        engine = Engine("compile", run, model.batch_size, model.device)
        # NOTE: torch compiles anew, and without these options, for another number of threads.
        with inductor.patch(freezing=model.device.type == "cpu"), use_threads(1), quiet():
            engine(model.example)
            check_agreement(engine, model)
    except EngineError:
        raise
    except Exception as error:  # whatever a compiler may say
        raise EngineError(first_line(error)) from error
    return engine


def check_agreement(engine: Engine, model: Model) -> None:
    """Raise an EngineError if an engine's features are not those of the network itself.

    They are compared on the first image, on noise, and on both made dark: what an exporter saw once may hold for that
    alone.
    """
    if model.compute != "float32":
        return  # rounding is what was asked for
    bright = make_example(model.example[0], 2)
    pixels = keep_order(torch.cat([bright, (bright / 4).to(bright.dtype)]), bright)
    values = np.concatenate([engine(piece) for piece in torch.split(pixels, engine.batch_size or len(pixels))])
    _compare(values, make_eager(model)(pixels), getattr(model.network, "widths", None))


def _compare(values: Values, reference: Values, widths: Sequence[int] | None) -> None:
    """Raise an EngineError if values (B, D) are not the reference's.

    Layers side by side are judged one by one: an error in one is not to be measured against another that is larger.
    """
    if values.shape != reference.shape:
        raise EngineError(f"it gives {values.shape[1:]} numbers for an image, not {reference.shape[1:]}")
    ends = np.cumsum(widths or [reference.shape[1]])[:-1]
    for one, other in zip(np.split(values, ends, axis=1), np.split(reference, ends, axis=1), strict=True):
        error = np.linalg.norm(one - other, axis=1) / np.maximum(np.linalg.norm(other, axis=1), 1e-12)
        if not (error < TOLERANCE).all():
            raise EngineError(f"its features differ from eager's by {error.max():.1e}, more than {TOLERANCE:.0e}")


def make_example(image: Tensor, batch_size: int) -> Tensor:
    """A batch as they will come, (B, ...): one image, and noise, since a black picture would hide a lot."""
    shape = (batch_size - 1, *image.shape)
    generator = torch.Generator().manual_seed(0)
    if image.dtype == torch.uint8:
        noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        noise = torch.randn(shape, generator=generator).to(image.dtype)
    return keep_order(torch.cat([image[None], noise]), image[None])


def first_line(error: BaseException) -> str:
    """The beginning of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of tracers and compilers: what they make is compared with eager afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
