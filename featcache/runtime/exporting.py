"""A network of torch -> ONNX, with its normalisation in front: pixels in, features out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from featcache.extras import import_extra, is_installed
from featcache.images import Normalise
from featcache.runtime.engines import EngineError, Model, first_line, quiet

OPSET = 18
INPUT = "pixels"
MOST_BYTES = 2_000_000_000  # protobuf ends at 2 GiB, and the graph takes its part


class FromPixels(nn.Module):
    """Pixels -> features; pixels (B, H, W, C) where they lie so in memory, (B, C, ...) otherwise.

    There, they are normalised row by row: three numbers at a time take ONNX Runtime a sixth of an int8 ResNet18. By
    division and subtraction, which are not rounded to 8 bits.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.normalise, self.network = model.normalise, model.network
        self.channels_last = lies_channels_last(model.example)
        self.by_rows = self.channels_last and isinstance(model.normalise, Normalise)
        if isinstance(model.normalise, Normalise):
            mean, std, width = model.normalise.mean.flatten(), model.normalise.std.flatten(), model.example.shape[-1]
            self.register_buffer("scale", (255 * std).repeat(width), persistent=False)
            self.register_buffer("shift", (mean / std).repeat(width), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise and run the network."""
        if self.by_rows:
            rows = pixels.flatten(2).float() / self.scale - self.shift
            images = rows.reshape(pixels.shape).permute(0, 3, 1, 2)
        else:
            images = self.normalise(pixels.permute(0, 3, 1, 2) if self.channels_last else pixels)
        return self.network(images)  # type: ignore[no-any-return]


def lies_channels_last(pixels: Tensor) -> bool:
    """Whether pixels (B, C, H, W) lie in memory as (B, H, W, C)."""
    return pixels.ndim == 4 and not pixels.is_contiguous()


def as_input(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) as `FromPixels` wants them; nothing is copied."""
    return pixels.permute(0, 2, 3, 1) if lies_channels_last(pixels) else pixels


def export_network(model: Model, *, extra: str) -> bytes:
    """An ONNX file's bytes, for batches of the example's size.

    torch's exporter by tracing is tried first: it takes 0.4 s for ResNet18, its successor 5 s. That one, which needs
    the package onnxscript, takes over where the first fails.

    Parameters
    ----------
    model
        What to export.
    extra
        The extra that installs what is needed.

    Raises
    ------
    EngineError
        If it cannot be exported.
    MissingExtraError
        If the package onnx is not installed.
    """
    import_extra("onnx", extra=extra, what=f"runtime {extra} needs")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())
    if size > MOST_BYTES:
        raise EngineError(f"its {size / 1e9:.1f} GB are more than one ONNX file holds")
    network, example = FromPixels(model).eval(), as_input(model.example)
    errors = []
    for export in (export_by_tracing, export_program):
        if export is export_program and not is_installed("onnxscript"):
            continue
        try:
            with quiet(), plain_attention(), torch.no_grad():
                return export(network, example)
        except Exception as error:  # noqa: BLE001 - whatever an exporter may say
            errors.append(first_line(error))
    raise EngineError(f"it cannot be exported to ONNX: {errors[0]}")


def export_by_tracing(network: nn.Module, example: Tensor) -> bytes:
    """With the exporter that runs the network once and keeps what it does."""
    buffer = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            network,
            (example,),
            buffer,  # type: ignore[arg-type]  # a buffer is fine for this exporter
            input_names=[INPUT],
            output_names=["features"],
            opset_version=OPSET,
            dynamo=False,
        )
    return buffer.getvalue()


def export_program(network: nn.Module, example: Tensor) -> bytes:
    """With the exporter that torch has had since 2.5."""
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(network, (example,), input_names=[INPUT], dynamo=True, verbose=False)
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused kernels of attention, which no exporter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
