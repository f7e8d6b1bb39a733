"""How a network is executed on images: device, runtime, precision, threads, no gradients.

Knows batches and devices; nothing of labels' meaning or caches.

=========  ==========================================================================================================
runtime    what it does
=========  ==========================================================================================================
eager      the network as torch made it, batch after batch, decoding in worker processes: the bit-exact reference; on
           CUDA in channels-last order, on every GPU of the machine
fused      BatchNorm folded into the convolutions, channels last
compile    torch.compile; on a CPU with frozen weights. Needs a C++ compiler there, and 6 to 20 s before the first image
onnx       exported to ONNX and run by ONNX Runtime: the extra featcache[onnx]
openvino   exported to ONNX and run by OpenVINO: the extra featcache[openvino]
auto       on a CPU the fastest that is installed and pays for itself on so many images; eager on a GPU
=========  ==========================================================================================================

On a CPU all but eager run one thread per core that decodes and forwards by itself, so that no core waits for another.
Features of every runtime agree with eager's to 1e-4 relative, which is verified on every network before use.

`devices` says where, `engines` makes a network ready (`fusing`, `exporting`, `onnx`, `openvino`, `quantising` do the
work), `scheduling` deals out the batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featcache.decoding import close_helpers
from featcache.errors import DeviceError, MissingExtraError
from featcache.extras import is_installed
from featcache.images import ImageRows, choose_workers, count_cores, make_loader
from featcache.runtime.devices import (
    choose_batch_size,
    has_bfloat16,
    is_foreign,
    keep_freed_memory,
    select_device,
    spread_device,
    training_settings,
    use_threads,
    whole_float32,
)
from featcache.runtime.engines import (
    TOLERANCE,
    Engine,
    EngineError,
    Model,
    fill_batches,
    fill_up,
    make_compiled,
    make_eager,
    make_example,
    make_fused,
)
from featcache.runtime.onnx import make_onnx
from featcache.runtime.openvino import make_openvino
from featcache.runtime.quantising import Ranges, make_int8, measure_ranges
from featcache.runtime.scheduling import Outputs, RowsAhead, run_in_turn, run_on_cores, run_on_devices

__all__ = [
    "BREAK_EVEN",
    "TOLERANCE",
    "Execution",
    "Outputs",
    "choose_batch_size",
    "choose_runtime",
    "find_ranges",
    "has_bfloat16",
    "keep_freed_memory",
    "prepare_execution",
    "run_network",
    "select_device",
    "training_settings",
]

FLOAT32 = {"compute": "float32"}
# Images from which a runtime is faster than "fused" altogether, and the packages it needs; the first choice first.
# Measured: ONNX Runtime is ready 0.4 s later and saves 1 to 4 ms an image, OpenVINO 0.6 s later and as much.
BREAK_EVEN = {"onnx": 128, "openvino": 256}
PACKAGES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}
AHEAD_BYTES = 1 << 26  # of images that are decoded while the network is made ready
ON_CPU_ONLY = ("fused", "onnx", "openvino")


def choose_runtime(
    name: str,
    device: torch.device,
    *,
    n_images: int = 0,
    network: nn.Module | None = None,
    compute: str = "float32",
) -> str:
    """The runtime that a name stands for.

    Parameters
    ----------
    name
        One of the table above.
    device
        Where the network runs.
    n_images
        How many there are.
    network
        What runs.
    compute
        Type in which it computes: only torch has halves, only ONNX Runtime int8.

    Raises
    ------
    DeviceError
        If this runtime is not for this device, network or precision.
    """
    foreign = network is not None and is_foreign(network)
    if foreign and compute != "float32":
        raise DeviceError(f"an ONNX file is computed as it was exported, not in {compute}; leave --precision out")
    if compute == "int8" and (device.type != "cpu" or name not in ("auto", "onnx")):
        raise DeviceError(f"int8 is for the CPU with --runtime onnx, not for {device} with {name}")
    if name == "auto":
        return _choose_fastest(device, n_images, foreign, compute)
    if name in ON_CPU_ONLY and device.type != "cpu":
        raise DeviceError(f"runtime {name} is for the CPU, not for {device}; use --runtime auto")
    if foreign and name not in ("eager", "onnx"):
        raise DeviceError(f"runtime {name} is for networks of torch; an ONNX file runs with --runtime onnx")
    if compute not in ("float32", "int8") and name in PACKAGES:
        raise DeviceError(f"runtime {name} computes in float32, not in {compute}; use --runtime fused")
    return name


def _choose_fastest(device: torch.device, n_images: int, foreign: bool, compute: str) -> str:
    if device.type != "cpu":
        return "eager"
    if foreign or compute == "int8":
        return "onnx"
    for name, enough in BREAK_EVEN.items():
        if compute == "float32" and n_images >= enough and all(map(is_installed, PACKAGES[name])):
            return name
    return "fused"


class Run(Protocol):
    """What an execution does."""

    def __call__(self, rows: ImageRows | None = None, /) -> Iterator[Outputs]:
        """Decode and forward these images, in order; None is those that the network was made ready for."""


@dataclass(frozen=True)
class Execution:
    """A network ready to run over some images.

    Attributes
    ----------
    runtime
        Which one it came to be.
    run
        Decode and forward all of them, in order; or other images of the same kind.
    remark
        Why it is another one than was chosen; "" if it is not.
    """

    runtime: str
    run: Run
    remark: str = ""


def prepare_execution(
    network: nn.Module,
    rows: ImageRows,
    *,
    device: torch.device,
    runtime: str = "auto",
    precision: Mapping[str, Any] = FLOAT32,
    batch_size: int | None = None,
    workers: int | None = None,
    n_images: int | None = None,
    fill: bool = False,
) -> Execution:
    """Make a network ready to run over images, in evaluation mode.

    Parameters
    ----------
    network
        (B, 3, H, W) float32 -> (B, D); of clips (B, 3, T, H, W).
    rows
        The images.
    device
        Where the network runs; "cuda" without a number is every GPU.
    runtime
        One of the table above. What "auto" chooses and cannot be had is replaced by "fused"; what was asked for is not.
    precision
        As in `Backbone`.
    batch_size
        None chooses, see `choose_batch_size`.
    workers
        eager, and on a GPU: processes that decode; otherwise threads that decode and forward. None chooses from the
        cores.
    n_images
        That "auto" is to count; None is those of `rows`.
    fill
        Fill the last batch up. An image's features depend in the last digit on how many are in its batch, and so on
        which images were asked for; on a CPU they do not depend on which others those are (measured bit for bit, see
        `tests/test_runtime.py`).

    Raises
    ------
    DeviceError
        If the runtime is not for this device, network or precision, or cannot run it.
    MissingExtraError
        If it needs a package that is not installed.
    """
    compute = str(precision["compute"])
    n_images = len(rows) if n_images is None else n_images
    chosen = choose_runtime(runtime, device, n_images=n_images, network=network, compute=compute)
    network.eval()  # NOTE: eval() before features, or BatchNorm drifts
    size = batch_size or choose_batch_size(device)
    if device.type == "cpu":
        keep_freed_memory()
        if chosen != "eager":
            return _prepare_on_cores(network, rows, runtime, chosen, precision, size, workers, fill)
    engines = []
    for i, one in enumerate(spread_device(device)):
        there = (copy.deepcopy(network) if i else network).to(one)
        if one.type == "cuda" and not any(parameter.ndim == 5 for parameter in there.parameters()):
            there = there.to(memory_format=torch.channels_last)  # half-precision convolutions want their weights so too
        model = Model(there, rows.make_normalisation(), torch.empty(0), one, precision)
        if chosen == "compile" and (image := find_image(rows)) is not None:
            engine = _make_or_say(chosen, replace(model, example=make_example(image, size)), 1)
        else:
            engine = make_eager(model)
        engines.append(fill_batches(engine, size) if fill else engine)
        if one.type == "cuda":
            torch.cuda.synchronize(one)  # NOTE: streams do not wait for each other; the weights must be there

    def run(others: ImageRows | None = None) -> Iterator[Outputs]:
        now = rows if others is None else others
        n_workers = choose_workers(len(now), device) if workers is None else workers
        batches = make_loader(now, batch_size=size, workers=n_workers, pin=device.type == "cuda")
        try:
            if device.type == "cuda":
                with whole_float32(compute == "float32"):
                    yield from run_on_devices(engines, batches)
            else:
                yield from run_in_turn(engines[0], batches, max(count_cores() - n_workers, 1))
        finally:
            close_helpers()

    return Execution(chosen, run)


def _prepare_on_cores(
    network: nn.Module,
    rows: ImageRows,
    asked: str,
    chosen: str,
    precision: Mapping[str, Any],
    batch_size: int,
    workers: int | None,
    fill: bool,
) -> Execution:
    """A thread for each core. The first images are decoded while the network is made ready."""
    n_threads = max(count_cores() if workers is None else workers, 1)
    image = find_image(rows)
    room = AHEAD_BYTES // max(image.nbytes, 1) if image is not None and n_threads > 1 else 0
    with use_threads(1):
        ahead = RowsAhead(rows, room)
        try:
            engine, remark = _make_engine(network, rows, image, asked, chosen, precision, batch_size, n_threads)
        finally:
            ahead.stop()
    engine = fill_batches(engine, batch_size) if fill else engine

    def run(others: ImageRows | None = None) -> Iterator[Outputs]:
        try:
            yield from run_on_cores(engine, ahead if others is None else RowsAhead(others), batch_size, n_threads)
        finally:
            close_helpers()

    return Execution(chosen if image is None else engine.runtime, run, remark)


def _make_engine(
    network: nn.Module,
    rows: ImageRows,
    image: Tensor | None,
    asked: str,
    chosen: str,
    precision: Mapping[str, Any],
    batch_size: int,
    n_threads: int,
) -> tuple[Engine, str]:
    """The engine, and why it is another one than was chosen."""
    model = Model(network.cpu(), rows.make_normalisation(), torch.empty(0), precision=precision)
    if image is None:  # there is nothing to run it on
        return make_eager(model), ""
    model = replace(model, example=make_example(image, batch_size))
    try:
        return _make_or_say(chosen, model, n_threads), ""
    except (DeviceError, MissingExtraError) as error:  # also a package that is there and cannot be imported
        if asked != "auto" or chosen == "fused" or precision["compute"] != "float32":
            raise
        return make_fused(model), f"{error}"


def _make_or_say(runtime: str, model: Model, n_threads: int) -> Engine:
    """The engine of a runtime.

    Raises
    ------
    DeviceError
        If this network does not run this way.
    """
    try:
        if runtime == "onnx":
            return make_int8(model) if model.compute == "int8" else make_onnx(model)
        if runtime == "openvino":
            return make_openvino(model, n_threads)
        if runtime == "compile":
            return make_compiled(model)
        return make_fused(model)
    except EngineError as error:
        raise DeviceError(f"runtime {runtime} does not run this network: {error}; use --runtime fused") from error


def find_image(rows: ImageRows) -> Tensor | None:
    """The first usable image as the rows give it, (C, H, W), or clip, (C, T, H, W)."""
    images = (rows[row][1] for row in range(len(rows)))
    return next((image for image in images if isinstance(image, Tensor)), None)


def find_ranges(network: nn.Module, rows: ImageRows, *, batch_size: int | None = None) -> Ranges:
    """The ranges of a network's activations on some images, for its precision "int8".

    Raises
    ------
    DeviceError
        If it cannot be quantised, or none of the images can be used.
    MissingExtraError
        If a package is not installed.
    """
    image = find_image(rows)
    if image is None:
        raise DeviceError("int8 needs a few usable images to find the ranges of its activations; there is none")
    size = batch_size or choose_batch_size(torch.device("cpu"))
    model = Model(network.eval(), rows.make_normalisation(), make_example(image, size))
    pieces = (range(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
    batches = (rows.collate([rows[row] for row in piece]).images for piece in pieces)
    try:
        return measure_ranges(model, (fill_up(batch, size) for batch in batches if len(batch)))
    except EngineError as error:
        raise DeviceError(f"precision int8 is not for this network: {error}; use --precision fp32") from error


def run_network(
    network: nn.Module,
    rows: ImageRows,
    *,
    device: torch.device,
    runtime: str = "auto",
    precision: Mapping[str, Any] = FLOAT32,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Outputs]:
    """Decode images and forward them through a network, in order; parameters as of `prepare_execution`."""
    execution = prepare_execution(
        network,
        rows,
        device=device,
        runtime=runtime,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
    )
    yield from execution.run()
