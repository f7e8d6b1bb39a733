"""How a network is executed on images: device, runtime, threads, no gradients, float32.

Knows batches and devices; nothing of labels' meaning or caches.

=========  ==========================================================================================================
runtime    what it does
=========  ==========================================================================================================
eager      the network as torch made it, batch after batch, decoding in worker processes: the bit-exact reference
fused      on a CPU: BatchNorm folded into the convolutions, channels last, one thread per core that decodes and
           forwards by itself. Features agree with eager's to 1e-4 relative, verified on every network before use
auto       fused on a CPU, eager elsewhere
=========  ==========================================================================================================
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from featcache.config import DEVICES
from featcache.decoding import close_helpers
from featcache.errors import BadImage, DeviceError
from featcache.images import Batch, ImageRows, count_cores, make_loader

FUSED_TOLERANCE = 1e-4  # relative error of features against eager


@dataclass(frozen=True)
class Outputs:
    """What came out for some images.

    Attributes
    ----------
    rows
        (B,) int64, positions in the list of paths.
    values
        (B, D) float32: features, or logits if the network has its classifier.
    bad
        Files that could not be used.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    bad: list[BadImage]

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)


def select_device(name: str, network: nn.Module | None = None) -> torch.device:
    """The device of this name; "auto" is the first CUDA device where there is one, else the CPU.

    A network that is not run by torch (it says so with an attribute `cpu_only`) runs on the CPU.

    Raises
    ------
    DeviceError
        If the device is unknown or not there. Nothing falls back quietly.
    """
    if network is not None and any(getattr(module, "cpu_only", False) for module in network.modules()):
        if name not in ("auto", "cpu"):
            raise DeviceError(
                f"device {name} is not for this network: ONNX Runtime runs it on the CPU; use --device cpu"
            )
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}: expected {DEVICES}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(
                f"device {name} is not there: torch {torch.__version__} sees {count} CUDA devices; use --device cpu"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(f"device {name} is not there: torch sees no Apple GPU; use --device cpu")
    elif device.type != "cpu":
        raise DeviceError(f"unknown device {name!r}: expected {DEVICES}")
    return device


def choose_batch_size(device: torch.device) -> int:
    """Images per forward pass where the user does not say.

    Small on a CPU: measured on 2 cores, EfficientNet-Lite0 runs at 78 images/s in batches of 4 and 28 in batches of 32,
    ResNet18 at 72 and 51, because large activations leave the processor's caches and the allocator's free lists.
    """
    return 4 if device.type == "cpu" else 64


def choose_runtime(name: str, device: torch.device) -> str:
    """The runtime that "auto" stands for on this device."""
    if name == "auto":
        return "fused" if device.type == "cpu" else "eager"
    if name == "fused" and device.type != "cpu":
        raise DeviceError(f"runtime fused is for the CPU, not for {device}; use --runtime auto")
    return name


def run_network(
    network: nn.Module,
    rows: ImageRows,
    *,
    device: torch.device,
    runtime: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Outputs]:
    """Decode images and forward them through a network in evaluation mode, in order.

    Parameters
    ----------
    network
        (B, 3, H, W) float32 -> (B, D); of clips (B, 3, T, H, W).
    rows
        The images.
    device
        Where the network runs.
    runtime
        One of the table above.
    batch_size
        None chooses, see `choose_batch_size`.
    workers
        eager: processes that decode; fused: threads that decode and forward. None chooses from the cores.
    """
    network.eval().to(device)  # NOTE: eval() before features, or BatchNorm drifts
    if device.type == "cpu":
        keep_freed_memory()
    size = batch_size or choose_batch_size(device)
    try:
        if choose_runtime(runtime, device) == "fused":
            n_threads = count_cores() if workers is None else workers
            yield from _run_on_cores(network, fuse_network(network, rows), rows, size, n_threads)
            return
        for batch in make_loader(rows, batch_size=size, workers=workers, pin=device.type == "cuda"):
            yield _forward(network, batch, device)
    finally:
        close_helpers()


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory instead of giving it back to the system, for the whole process.

    Activations of a few MB are otherwise returned and fetched again at every layer, a page fault every 4 kB. Measured
    on 2 cores: EfficientNet-Lite0 in batches of 4 from 22 to 17 ms per core and image (2,400 page faults fewer), in
    batches of 8 from 35 to 16; ResNet18 the same as before. Other allocators are left alone.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # no glibc, no mallopt
        libc = ctypes.CDLL(None)
        if not libc.mallopt(m_mmap_threshold, 1 << 30):
            libc.mallopt(m_mmap_threshold, 1 << 25)  # the most that older versions take
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def fuse_network(network: nn.Module, rows: ImageRows) -> nn.Module | None:
    """A copy of a network, each BatchNorm folded into the convolution before it, weights in channels-last order.

    Which BatchNorm follows which convolution is seen in a forward pass, not guessed from names. The copy is compared
    with the network on noise; where it disagrees, or no usable image tells the size, there is none.

    Source: R. Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (2018), section 3.2, for
    the folding; torch.nn.utils.fusion for its formula.
    """
    example = _find_example(rows)
    if example is None or example.ndim != 4:  # a clip: r3d_18 in channels-last order is a fifth slower
        return None
    fused = copy.deepcopy(network).eval()  # NOTE: the copy of a traced network is in training mode again
    pairs = _find_pairs(fused, example)
    names = {id(module): name for name, module in fused.named_modules()}
    for convolution, norm in pairs:
        if norm.running_mean is None or norm.running_var is None or norm._forward_hooks:  # somebody watches its output
            continue
        convolution.weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        convolution.bias = bias
        parent, _, child = names[id(norm)].rpartition(".")
        setattr(fused.get_submodule(parent), child, nn.Identity())
    fused = fused.to(memory_format=torch.channels_last)
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))  # a black picture would hide a lot
    with torch.inference_mode():
        reference = network(noise)
        try:
            value = fused(noise.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # a network that cannot take its images in this order
            return None
    widths = getattr(network, "widths", [reference.shape[1]])  # of layers side by side, each has to agree
    pieces = zip(value.split(widths, dim=1), reference.split(widths, dim=1), strict=True)
    errors = [float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in pieces]
    return fused if all(error < FUSED_TOLERANCE for error in errors) else None


def _find_example(rows: ImageRows) -> Tensor | None:
    """The first usable image as a batch of one, (1, 3, H, W), or clip, (1, 3, T, H, W)."""
    for row in range(len(rows)):
        image = rows[row][1]
        if isinstance(image, Tensor):
            return image[None]
    return None


def _find_pairs(network: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output is the very input of a BatchNorm, seen in one forward pass; each module used once."""
    outputs: list[tuple[Tensor, nn.Conv2d]] = []  # the tensors are kept, or their identities would be used again
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: dict[int, int] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs.append((output, module))
        elif isinstance(module, nn.BatchNorm2d):
            pairs.extend((source, module) for tensor, source in outputs if tensor is inputs[0])

    handles = [
        module.register_forward_hook(watch)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return [(source, norm) for source, norm in pairs if calls[id(source)] == calls[id(norm)] == 1]


def _run_on_cores(
    network: nn.Module, fused: nn.Module | None, rows: ImageRows, batch_size: int, n_threads: int
) -> Iterator[Outputs]:
    """Threads that each decode and forward whole batches with one core: no core waits for another."""
    order = torch.contiguous_format if fused is None else torch.channels_last
    n_threads = max(n_threads, 1)
    pieces = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    pending: deque[Future[Outputs]] = deque()
    with _one_core_each(), ThreadPoolExecutor(n_threads) as pool:
        try:
            for piece in pieces:
                pending.append(pool.submit(_decode_and_forward, fused or network, rows, piece, order))
                if len(pending) >= 2 * n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _decode_and_forward(
    network: nn.Module, rows: ImageRows, piece: Sequence[int], order: torch.memory_format
) -> Outputs:
    batch = rows.collate([rows[row] for row in piece])
    if len(batch.rows):
        images = batch.images.contiguous(memory_format=order)
        batch = Batch(batch.rows, images, batch.labels, batch.bad)
    return _forward(network, batch, torch.device("cpu"))


def _forward(network: nn.Module, batch: Batch, device: torch.device) -> Outputs:
    values: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
    if len(batch.rows):
        with torch.inference_mode():
            values = network(batch.images.to(device, non_blocking=True)).float().cpu().numpy()
    return Outputs(batch.rows.numpy(), values, batch.bad)


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """One thread inside each operator: the threads outside have a core each already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
