"""Where a network runs: devices by name, cores, memory that the allocator keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch
from torch import nn

from featcache.config import DEVICES
from featcache.errors import DeviceError


def select_device(name: str, network: nn.Module | None = None) -> torch.device:
    """The device of this name; "auto" is CUDA where there is such a device, else the CPU.

    A network that is not run by torch (it says so with an attribute `cpu_only`) runs on the CPU.

    Raises
    ------
    DeviceError
        If the device is unknown or not there. Nothing falls back quietly.
    """
    if network is not None and is_foreign(network):
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


def is_foreign(network: nn.Module) -> bool:
    """Whether it is not torch that runs a network."""
    return any(getattr(module, "cpu_only", False) for module in network.modules())


def spread_device(device: torch.device) -> list[torch.device]:
    """The devices that a device stands for: "cuda" is every GPU of this machine, "cuda:1" that one."""
    if str(device) != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def choose_batch_size(device: torch.device) -> int:
    """Images per forward pass where the user does not say.

    Small on a CPU: measured on 2 cores, ResNet18 runs at 117, 126 and 127 images/s in batches of 1, 4 and 8 with ONNX
    Runtime, EfficientNet-Lite0 at 399, 368 and 338: large activations leave the processor's caches.
    """
    return 4 if device.type == "cpu" else 64


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory instead of giving it back to the system, for the whole process.

    Activations of a few MB are otherwise returned and fetched again at every layer, a page fault every 4 kB. Measured
    on 2 cores: EfficientNet-Lite0 in batches of 4 from 22 to 17 ms per core and image (2,400 page faults fewer), in
    batches of 8 from 35 to 16; ResNet18 the same as before. Other allocators are left alone.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc, no mallopt
        libc = ctypes.CDLL(None)
        if not libc.mallopt(m_mmap_threshold, 1 << 30):
            libc.mallopt(m_mmap_threshold, 1 << 25)  # the most that older versions take
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


@contextlib.contextmanager
def whole_float32(wanted: bool) -> Iterator[None]:
    """Without TF32, which torch otherwise takes for convolutions on CUDA: its errors are those of half precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def use_threads(n: int) -> Iterator[None]:
    """So many threads inside each of torch's operators, meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def training_settings(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Torch's switches for training, meanwhile: on CUDA the fastest convolutions, or only what is deterministic.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 by itself, from compute capability 8.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
