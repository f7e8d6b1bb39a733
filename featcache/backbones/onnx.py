"""Any network exported to ONNX, "onnx:FILE", run by ONNX Runtime: from TensorFlow, Keras, PaddlePaddle, scikit-learn...

What the file does not say of its input (most say nothing of normalisation) is stated with options, or in a JSON file
beside it, NET.json for NET.onnx, whose names are those of the options with "_"::

    {"input_size": [224, 224], "mean": [0.5], "std": [0.5], "scale": 1, "channels": "RGB", "layout": "NHWC"}

Needs the extra featcache[onnx].
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.backbones.layers import OutputsByName
from featcache.config import LAYOUTS
from featcache.errors import BackboneError
from featcache.extras import import_extra
from featcache.files import canonical_json, hash_bytes, hash_file
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

FILE_WEIGHTS = "of the file"
OBSTACLE = "an ONNX network is run, not trained: it serves as a frozen backbone only"


class ModelInput(NamedTuple):
    """A network's input: its name, its type in numpy, its shape; 0 where any number goes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}


def import_runtime() -> ModuleType:
    """ONNX Runtime, or a MissingExtraError."""
    return import_extra("onnxruntime", extra="onnx", what="backbones onnx:FILE need")


def import_onnx() -> ModuleType:
    """The package that reads ONNX files, or a MissingExtraError."""
    return import_extra("onnx", extra="onnx", what="layers inside onnx:FILE need")


def list_names() -> list[str]:
    """None: the names are files."""
    return []


def list_weights(name: str) -> list[WeightsEntry]:
    """Those of the file."""
    return [WeightsEntry(name=FILE_WEIGHTS, is_here=Path(name).is_file())]


def list_options(name: str, entry: str | None) -> dict[str, Any]:
    """None but what is stated."""
    del name, entry
    return {}


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network of a file.

    Raises
    ------
    BackboneError
        If there is no such file, it cannot be run, or does not take images.
    MissingExtraError
        If ONNX Runtime is not installed.
    """
    path = check_file(name)
    given = find_input(open_session(path), path)
    layout = options.get("layout") or read_format(path.with_suffix(".json")).layout or find_layout(given, path)
    if layout not in LAYOUTS or len(given.shape) != (2 if layout == "NF" else 4):
        raise BackboneError(
            f"onnx:{path} has an input {given.name} of {len(given.shape)} axes, which does not fit --layout {layout}"
        )
    return OnnxNetwork(path, layout)


def check_file(name: str) -> Path:
    """The path of a file that is there.

    Raises
    ------
    BackboneError
        If it is not.
    """
    path = Path(name)
    if not path.is_file():
        raise BackboneError(f"no ONNX file at {path}: expected onnx:FILE with the path of a network exported to ONNX")
    return path


def open_session(path: Path, model: bytes | None = None, threads: int = 0) -> Any:
    """ONNX Runtime's session for a file, or for its changed contents; so many threads, 0 is one for each core.

    Raises
    ------
    BackboneError
        If it cannot be run.
    """
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return runtime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"onnx:{path} cannot be run ({reason}); is it a whole ONNX file?") from error


def find_input(session: Any, path: Path) -> ModelInput:
    """The one input that takes images.

    Raises
    ------
    BackboneError
        If there are several, or its type is none that images can be.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise BackboneError(f"onnx:{path} has {len(inputs)} inputs ({names}): expected one, for the images")
    one = inputs[0]
    if one.type not in TYPES:
        raise BackboneError(f"onnx:{path} wants {one.type} in {one.name}: expected one of {', '.join(TYPES)}")
    return ModelInput(one.name, TYPES[one.type], tuple(size if isinstance(size, int) else 0 for size in one.shape))


def find_layout(given: ModelInput, path: Path) -> str:
    """What the shape of the input says.

    Raises
    ------
    BackboneError
        If it says nothing, or is none of an image's.
    """
    shape = given.shape
    if len(shape) == 2:
        return "NF"
    if len(shape) == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first != last:
            return "NCHW" if first else "NHWC"
    raise BackboneError(
        f"onnx:{path} has an input {given.name} of shape {list(shape)}, which does not tell where the channels are: "
        f"expected (N, C, H, W), (N, H, W, C) or (N, features); say it with --layout NCHW, NHWC or NF"
    )


def describe_input(name: str, entry: str | None, network: nn.Module) -> InputFormat:
    """What the file beside the network says, and of the rest what the network's input says."""
    del name, entry
    assert isinstance(network, OnnxNetwork)
    path, given, layout = network.path, network.given, network.layout
    beside = read_format(path.with_suffix(".json"))
    height, width, channels = 0, 0, 0
    if layout == "NCHW":
        channels, height, width = given.shape[1:]
    elif layout == "NHWC":
        height, width, channels = given.shape[1:]
    return beside.over(
        InputFormat(
            input_size=(height, width) if height and width else None,
            channels={1: "L"}.get(channels),
            layout=layout,
        )
    )


def read_format(path: Path) -> InputFormat:
    """An input format from a JSON file; an empty one if there is none.

    Raises
    ------
    BackboneError
        If it is not one.
    """
    if not path.is_file():
        return InputFormat()
    try:
        return InputFormat.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path}, beside the network, does not say what its images look like: {error}") from error


def read_weights(name: str, entry: str, progress: Progress) -> WeightsFile:
    """No tensors: they are in the network already. The digest is of the file, and of those it keeps its tensors in."""
    del entry, progress
    path = check_file(name)
    others = (path.parent / name for name in list_external_files(path))
    paths = tuple(one.absolute() for one in (path, path.with_suffix(".json"), *others))
    return WeightsFile(None, path.name, hash_model(path), paths)


def hash_model(path: Path) -> str:
    """SHA-256 of an ONNX file; of it and all files that it keeps tensors in, where there are such.

    Raises
    ------
    BackboneError
        If the file is none of ONNX, or one of the others is missing.
    """
    digest, others = hash_file(path), list_external_files(path)
    for name in others:
        if not (path.parent / name).is_file():
            raise BackboneError(f"onnx:{path} keeps tensors in {path.parent / name}, which is not there; bring it back")
    if not others:
        return digest
    return hash_bytes(canonical_json([digest, *(hash_file(path.parent / name) for name in others)]).encode())


def list_external_files(path: Path) -> list[str]:
    """The files in which a network keeps tensors outside of its own, relative to its folder, each once."""
    onnx = import_onnx()
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BackboneError(f"{path} is not an ONNX file ({type(error).__name__})") from error
    names: set[str] = set()
    parts = [model.graph, *model.functions]
    while parts:
        part = parts.pop()
        attributes = [attribute for node in part.node for attribute in node.attribute]
        parts += [inner for one in attributes for inner in (*one.graphs, *([one.g] if one.HasField("g") else []))]
        sparse = [
            *getattr(part, "sparse_initializer", ()),
            *(inner for one in attributes for inner in one.sparse_tensors),
        ]
        tensors = [*getattr(part, "initializer", ()), *(half for one in sparse for half in (one.values, one.indices))]
        tensors += [tensor for one in attributes for tensor in (*one.tensors, *([one.t] if one.HasField("t") else []))]
        for tensor in tensors:
            if onnx.external_data_helper.uses_external_data(tensor):
                names.add(onnx.external_data_helper.ExternalDataInfo(tensor).location)
    return sorted(names)


class OnnxNetwork(OutputsByName):
    """A network of ONNX Runtime that looks like one of torch: images (B, C, H, W) -> its only output.

    Parameters
    ----------
    path
        The ONNX file.
    layout
        How its input wants the images.
    names
        Outputs or inner tensors to give, as a dictionary; none gives the only output by itself.
    """

    cpu_only = True

    def __init__(self, path: Path, layout: str, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.path, self.layout, self.names = path, layout, tuple(names)
        self._opening = threading.Lock()
        self._sessions: dict[int, Any] = {}
        self.given = find_input(self.session, path)

    @property
    def session(self) -> Any:
        """ONNX Runtime's session, with as many threads as torch would use here."""
        threads = torch.get_num_threads()
        with self._opening:
            if threads not in self._sessions:
                self._sessions[threads] = self._open(threads)
            return self._sessions[threads]

    def _open(self, threads: int) -> Any:
        session = open_session(self.path, threads=threads)
        outputs = [output.name for output in session.get_outputs()]
        if set(self.names) <= set(outputs):
            return session
        return open_session(self.path, expose_tensors(self.path, self.names), threads)

    def list_outputs(self) -> list[str]:
        """Names of all tensors that the network computes, its outputs last."""
        model = import_onnx().load(self.path, load_external_data=False)
        return list(dict.fromkeys(name for node in model.graph.node for name in node.output if name))

    def select_outputs(self, names: Sequence[str]) -> nn.Module:
        """The same network, giving these tensors."""
        outputs = [output.name for output in self.session.get_outputs()]
        for name in names:
            if name not in outputs and name not in (known := self.list_outputs()):
                from featcache.backbones.layers import say_unknown_layer

                raise BackboneError(say_unknown_layer(name, known, f"onnx:{self.path}"))
        return OnnxNetwork(self.path, self.layout, names)

    def forward(self, images: Tensor) -> Any:
        """Run the network; in batches of its own size where that is fixed."""
        if images.is_meta:
            raise BackboneError("ONNX Runtime needs numbers")
        batch = self._arrange(images)
        size = self.given.shape[0]
        outputs = self._run(batch) if size in (0, len(batch)) else self._run_pieces(batch, size)
        return outputs if self.names else next(iter(outputs.values()))

    def _arrange(self, images: Tensor) -> NDArray[Any]:
        """Images (B, C, H, W) float32 as the input wants them."""
        if self.layout != "NCHW":
            images = images.permute(0, 2, 3, 1)
        batch = images.contiguous().numpy()
        if self.layout == "NF":
            batch = batch.reshape(len(batch), -1)
        wanted = self.given.shape[1:]
        if len(wanted) != batch.ndim - 1 or any(a and a != b for a, b in zip(wanted, batch.shape[1:], strict=True)):
            raise BackboneError(
                f"onnx:{self.path} wants {list(wanted)} numbers per image in {self.given.name}, these are "
                f"{list(batch.shape[1:])}; say --input-size, --channels or --layout"
            )
        if self.given.dtype == "uint8":
            batch = np.rint(batch)
        return batch.astype(self.given.dtype, copy=False)

    def _run(self, batch: NDArray[Any]) -> dict[str, Tensor]:
        names = list(self.names) or [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {self.given.name: batch})
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in zip(names, values, strict=True)}

    def _run_pieces(self, batch: NDArray[Any], size: int) -> dict[str, Tensor]:
        """For a network whose batch has a fixed size: the last piece is filled up, and what is too much dropped."""
        pieces = []
        for start in range(0, len(batch), size):
            piece = batch[start : start + size]
            filled = np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)])
            pieces.append(self._run(filled))
        return {name: torch.cat([piece[name] for piece in pieces])[: len(batch)] for name in pieces[0]}

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        return self  # it never changes, and a session cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxNetwork, (self.path, self.layout, self.names)


def expose_tensors(path: Path, names: Sequence[str]) -> bytes:
    """A network whose outputs are these inner tensors, serialised; what only other outputs need no longer runs."""
    onnx = import_onnx()
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    if model.ByteSize() >= 2 << 30:
        raise BackboneError(f"onnx:{path} is too large to pick inner layers from; name one of its outputs with --layer")
    data: bytes = model.SerializeToString()
    return data
