"""OpenVINO on a CPU: the network exported to ONNX and compiled, one stream for each core."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from torch import Tensor

from featcache.extras import import_extra
from featcache.runtime.devices import is_foreign
from featcache.runtime.engines import Engine, EngineError, Model, Values, check_agreement, first_line
from featcache.runtime.exporting import as_input, export_network


def make_openvino(model: Model, n_threads: int) -> Engine:
    """The network in OpenVINO, for so many callers at a time.

    Raises
    ------
    EngineError
        If it cannot be exported, or gives something else.
    MissingExtraError
        If a package is not installed.
    """
    if is_foreign(model.network):
        raise EngineError("it is an ONNX file, which ONNX Runtime runs")
    engine = Engine("openvino", OpenvinoRun(export_network(model, extra="openvino"), n_threads), model.batch_size)
    check_agreement(engine, model)
    return engine


class OpenvinoRun:
    """A compiled network, each call on one core.

    Parameters
    ----------
    data
        The ONNX file's bytes.
    n_threads
        Streams of one thread.

    Raises
    ------
    EngineError
        If OpenVINO cannot run it.
    """

    def __init__(self, data: bytes, n_threads: int) -> None:
        openvino = import_extra("openvino", extra="openvino", what="runtime openvino needs")
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # NOTE: it takes bf16 by itself where the processor has it
            "NUM_STREAMS": str(n_threads),
            "INFERENCE_NUM_THREADS": str(n_threads),
            "ENABLE_CPU_PINNING": "NO",  # decoding needs the same cores
        }
        try:
            core = openvino.Core()
            self._compiled: Any = core.compile_model(core.read_model(data), "CPU", settings)
        except Exception as error:
            raise EngineError(f"OpenVINO cannot run it: {first_line(error)}") from error
        self._local = threading.local()

    def __call__(self, pixels: Tensor) -> Values:
        """Features of one batch."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        given = as_input(pixels).contiguous().numpy()
        return np.array(self._local.request.infer({0: given}, share_inputs=True)[0], dtype=np.float32)
