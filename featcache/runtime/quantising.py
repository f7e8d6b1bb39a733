"""8-bit integers on a CPU: weights and activations rounded to 256 steps, run by ONNX Runtime. Fast, and coarse.

The steps of the activations span the ranges seen on some images of the data (`measure_ranges`). They decide the
features, and are part of the extractor's description.

Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018; ONNX Runtime's documentation of static quantization.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from featcache.extras import import_extra
from featcache.runtime.engines import Engine, EngineError, Model, first_line, quiet
from featcache.runtime.exporting import INPUT, as_input, export_network
from featcache.runtime.onnx import OnnxRun

Ranges: TypeAlias = dict[str, list[float]]


def measure_ranges(model: Model, batches: Iterable[Tensor]) -> Ranges:
    """The smallest and the largest value of every activation on some batches of pixels, by its name in the graph.

    Raises
    ------
    EngineError
        If the network cannot be exported or run.
    MissingExtraError
        If a package is not installed.
    """
    quantization = _import_quantization()
    data = export_network(replace(model, precision={"compute": "float32"}), extra="onnx")
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "network.onnx"
        path.write_bytes(data)
        try:
            calibrator = quantization.create_calibrator(
                path, _list_operators(), augmented_model_path=str(path.with_name("augmented.onnx"))
            )
            calibrator.collect_data(_Batches(batches))
            found = calibrator.compute_data()
        except Exception as error:
            raise EngineError(f"it cannot be calibrated: {first_line(error)}") from error
    return {
        name: [float(np.min(found[name].range_value[0])), float(np.max(found[name].range_value[1]))]
        for name in sorted(found.keys())
    }


def make_int8(model: Model) -> Engine:
    """The network in 8-bit integers.

    Raises
    ------
    EngineError
        If it cannot be exported or quantised, or no ranges are known.
    MissingExtraError
        If a package is not installed.
    """
    if "ranges" not in model.precision:
        raise EngineError("int8 needs the ranges of its activations, which `featcache extract --precision int8` finds")
    data = export_network(model, extra="onnx")
    try:
        with quiet():
            data = _quantise(data, model.precision["ranges"])
    except Exception as error:
        raise EngineError(f"it cannot be quantised: {first_line(error)}") from error
    return Engine("onnx", OnnxRun(data), model.batch_size)


def _quantise(data: bytes, ranges: Ranges) -> bytes:
    """An ONNX file's bytes, the inputs and weights of convolutions and matrices rounded where they are used."""
    onnx = import_extra("onnx", extra="onnx", what="precision int8 needs")
    quantization = _import_quantization()
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    spans = {
        name: TensorData(lowest=np.float32(low).reshape(()), highest=np.float32(high).reshape(()))
        for name, (low, high) in ranges.items()
    }
    model = onnx.load_model_from_string(data)
    give_own_tensors(model)
    quantizer = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=quantization.QuantType.QInt8,
        activation_qType=quantization.QuantType.QUInt8,
        tensors_range=TensorsData(quantization.CalibrationMethod.MinMax, spans),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=_list_operators(),
        extra_options={},
    )
    quantizer.quantize_model()
    quantised: bytes = quantizer.model.model.SerializeToString()
    return quantised


def give_own_tensors(model: Any) -> None:
    """Replace what only passes a weight on by a copy of it: convolutions that share a bias would not be rounded.

    torch's exporter lets equal tensors be one; those of a network that was not trained are often equal.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in tensors]:
        own = type(tensors[node.input[0]])()
        own.CopyFrom(tensors[node.input[0]])
        own.name = node.output[0]
        graph.initializer.append(own)
        graph.node.remove(node)


def _list_operators() -> list[str]:
    """All that can be rounded: an activation in between that is not would cost time, and a clipped range precision."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _import_quantization() -> ModuleType:
    return import_extra("onnxruntime.quantization", extra="onnx", what="precision int8 needs")


class _Batches:
    """What ONNX Runtime's calibrators read from."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next input, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: as_input(batch).contiguous().numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (batch := self.get_next()) is not None:
            yield batch
