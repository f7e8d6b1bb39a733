"""ONNX Runtime on a CPU: the network exported, one thread for each call, so that each core runs a batch by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from featcache.extras import import_extra
from featcache.runtime.devices import is_foreign
from featcache.runtime.engines import Engine, EngineError, Model, Values, check_agreement, first_line, make_eager
from featcache.runtime.exporting import INPUT, as_input, export_network


def make_onnx(model: Model) -> Engine:
    """The network in ONNX Runtime. One that is run by ONNX Runtime anyway is taken as it is.

    Raises
    ------
    EngineError
        If it cannot be exported, or gives something else.
    MissingExtraError
        If a package is not installed.
    """
    if is_foreign(model.network):
        return Engine("onnx", make_eager(model).run)
    engine = Engine("onnx", OnnxRun(export_network(model, extra="onnx")), model.batch_size)
    check_agreement(engine, model)
    return engine


class OnnxRun:
    """An ONNX network, each call on one core.

    Parameters
    ----------
    data
        The ONNX file's bytes.

    Raises
    ------
    EngineError
        If ONNX Runtime cannot run it.
    """

    def __init__(self, data: bytes) -> None:
        runtime = import_extra("onnxruntime", extra="onnx", what="runtime onnx needs")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session: Any = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot run it: {first_line(error)}") from error

    def __call__(self, pixels: Tensor) -> Values:
        """Features of one batch."""
        values = self._session.run(None, {INPUT: as_input(pixels).contiguous().numpy()})[0]
        return np.ascontiguousarray(values, dtype=np.float32)
