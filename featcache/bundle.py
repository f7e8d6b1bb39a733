"""A saved classifier: backbone reference or weights + head + classes + preprocessing. safetensors and JSON, no pickle.

A head's bundle holds the head and names its backbone with the SHA-256 of its tensors; a fine-tuned one holds
the whole network. Both load into a `Classifier`, which turns image files into probabilities.

::

    model.json          classes, preprocessing, backbone, what kind of head, SHA-256 of the other file
    model.safetensors   linear head: weight (C, D), bias (C,)
                        nearest neighbours: features (N, D), labels (N,), weights (N,)
                        fine-tuned: the network's state dict
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import nn

from featcache.backbones import Backbone, attach_classifier, remake_backbone
from featcache.backbones.weights import load_tensors
from featcache.dataset import Files
from featcache.errors import BadImage, RunError
from featcache.files import canonical_json, hash_bytes, pretty_json
from featcache.heads import Head, remake_head
from featcache.images import ImageRows, ViewRows, make_pixel_transform
from featcache.metrics import to_probabilities
from featcache.preprocessing import Preprocessing
from featcache.progress import SILENT, Progress
from featcache.runtime import run_network

MODEL_JSON = "model.json"
MODEL_TENSORS = "model.safetensors"
SCHEMA = 1
LINEAR = {"kind": "linear", "unit_length": False}  # what heads were before there were others


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A whole network with the names of its classes: image files in, probabilities out.

    Attributes
    ----------
    network
        (B, 3, H, W) float32 -> features, or logits where there is no `head`.
    head
        (B, D) -> (B, n_classes) logits: a head on features, in float32 whatever the features' precision.
    classes
        Names.
    preprocessing, precision
        As in `Backbone`: those of the features that the head was trained on.
    """

    network: nn.Module
    head: Head | None
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    precision: Mapping[str, Any]

    def predict_files(
        self,
        paths: Sequence[str],
        *,
        root: Path | Files = Path(),
        device: torch.device,
        batch_size: int | None = None,
        workers: int | None = None,
        views: int = 0,
        progress: Progress = SILENT,
    ) -> tuple[NDArray[np.float64], list[BadImage]]:
        """Predict image files.

        Parameters
        ----------
        paths, root
            N files, and what they are relative to.
        device, batch_size, workers
            As in `featcache.config.ExtractConfig`.
        views
            How many random views of each image are averaged with it, see `featcache.views`; their seed is 0.
        progress
            Told how many were predicted.

        Returns
        -------
        probabilities
            (N, C) float64; NaN where the file could not be used.
        bad
            Those files.
        """
        each = 1 + views
        probabilities = np.zeros((len(paths), len(self.classes)))
        n_good = np.zeros(len(paths), np.int64)
        reasons: dict[str, str] = {}
        outputs = run_network(
            self.network,
            self._make_rows(paths, root, views),
            device=device,
            precision=self.precision,
            batch_size=batch_size,
            workers=workers,
        )
        unit = "view" if views else "img"
        for output in progress.track(outputs, total=len(paths) * each, what="predicting", unit=unit):
            if len(output.rows):
                images = output.rows // each
                np.add.at(probabilities, images, to_probabilities(self._find_logits(output.values)) / each)
                np.add.at(n_good, images, 1)
            reasons |= dict(output.bad)
        unusable = n_good < each
        probabilities[unusable] = np.nan
        return probabilities, [BadImage(paths[i], reasons[paths[i]]) for i in np.flatnonzero(unusable).tolist()]

    def _make_rows(self, paths: Sequence[str], root: Path | Files, views: int) -> ImageRows:
        """The images, each followed by its views."""
        if not views:
            return ImageRows(root, paths, transform=make_pixel_transform(self.preprocessing))
        numbers = [number for _ in paths for number in (None, *range(views))]
        repeated = [path for path in paths for _ in range(1 + views)]
        return ViewRows(root, repeated, numbers=numbers, preprocessing=self.preprocessing)

    def _find_logits(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (B, n_classes) from what the network gave."""
        return values if self.head is None else self.head.logits(values)


def save_head(folder: Path, head: Head, classes: Sequence[str], extractor: Mapping[str, Any]) -> None:
    """Save a head with the reference to its backbone, from a cache's description of its extractor."""
    values, arrays = head.take_apart()
    _save(folder, "head", {n: torch.from_numpy(array) for n, array in arrays.items()}, classes, extractor, values)


def save_network(folder: Path, network: nn.Module, classes: Sequence[str], extractor: Mapping[str, Any]) -> None:
    """Save a whole fine-tuned network with the description of the backbone that it began as."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    _save(folder, "network", tensors, classes, extractor)


def measure_size(folder: Path) -> int:
    """Bytes that a saved classifier takes."""
    return sum((folder / name).stat().st_size for name in (MODEL_JSON, MODEL_TENSORS))


def load_classifier(folder: Path | str, *, backbone: Backbone | None = None, progress: Progress = SILENT) -> Classifier:
    """Load the classifier of a run.

    Parameters
    ----------
    folder
        The run.
    backbone
        The one that the run was made with, if it was given in Python and cannot be made from its name.
    progress
        Told of downloads, and of the user's code that is run.

    Raises
    ------
    RunError
        If there is none, it is damaged, or its backbone's weights are no longer the same.
    BackboneError
        If the backbone cannot be made again.
    """
    folder = Path(folder)
    saved, tensors = _read(folder)
    known = saved.extractor["weights"]
    if saved.extractor["preprocessing"] is None:  # of imported features nobody knows it
        raise RunError(
            f"{folder} holds a head on {saved.extractor['backbone']} features: to label images it needs the network "
            f"that made them, which featcache does not know; apply weight and bias of {MODEL_TENSORS} to features of it"
        )
    if known["requested"] == "given" and backbone is None:
        raise RunError(
            f"{folder} was made with the network {saved.extractor['backbone']}, given in Python; give it again: "
            f"predict(run, images, backbone=wrap_network(...))"
        )
    if backbone is None:
        backbone = remake_backbone(saved.extractor, with_weights=saved.is_head, progress=progress)
    else:
        backbone = as_extracted(backbone, saved.extractor)
        check_same_features(folder, saved.extractor, backbone)
    if saved.is_head and backbone.weights["tensors_sha256"] != known["tensors_sha256"]:
        raise RunError(
            f"{folder} was trained on features of {backbone.name} with the weights {known['name']} "
            f"({known['tensors_sha256'][:8]}...), but {known['requested']} now gives "
            f"{backbone.weights['tensors_sha256'][:8]}...; bring back the file, or train the head again"
        )
    n_classes = len(saved.classes)
    head, network = None, backbone.network
    try:
        if saved.is_head:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            head = remake_head(saved.head, arrays, (n_classes, backbone.width))
        else:
            network = attach_classifier(backbone, n_classes)[0]
            load_tensors(network, tensors)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"{folder / MODEL_TENSORS} does not fit {backbone.name} with {n_classes} classes; train it again"
        ) from error
    return Classifier(
        network=network.eval().requires_grad_(False),
        head=head,
        classes=saved.classes,
        preprocessing=backbone.preprocessing,
        precision=backbone.precision,
    )


def as_extracted(backbone: Backbone, extractor: Mapping[str, Any]) -> Backbone:
    """A backbone with the decoder and the precision of a description."""
    decoder = Preprocessing.from_json(extractor["preprocessing"]).decoder
    precision = {name: value for name, value in extractor["precision"].items() if name != "stored"}
    return replace(backbone, preprocessing=replace(backbone.preprocessing, decoder=decoder), precision=precision)


def check_same_features(folder: Path, extractor: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise a RunError if a backbone, its weights aside, is not the one that a run was made with."""
    described = backbone.describe()
    for name in ("options", "layer", "layers", "preprocessing"):
        if described.get(name) != extractor.get(name):
            what = "code" if name == "options" else name
            raise RunError(
                f"{folder} was made with a network of another {what} than the one given; give the same again"
            )


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What model.json says."""

    is_head: bool
    classes: tuple[str, ...]
    extractor: dict[str, Any]
    head: dict[str, Any]


def _save(
    folder: Path,
    holds: str,
    tensors: dict[str, torch.Tensor],
    classes: Sequence[str],
    extractor: Mapping[str, Any],
    head: Mapping[str, Any] | None = None,
) -> None:
    data = save(tensors)
    description: dict[str, Any] = {
        "schema": SCHEMA,
        "holds": holds,
        "classes": list(classes),
        "extractor": dict(extractor),
        **({"head": dict(head)} if head else {}),
        "tensors_file_sha256": hash_bytes(data),
    }
    description["sha256"] = hash_bytes(canonical_json(description).encode())
    (folder / MODEL_TENSORS).write_bytes(data)
    (folder / MODEL_JSON).write_text(pretty_json(description), encoding="utf-8")


def _read(folder: Path) -> tuple[_Saved, dict[str, torch.Tensor]]:
    """Both files, each checked against its digest before anything in it is used."""
    try:
        description = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
        data = (folder / MODEL_TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} holds no classifier: expected {error.filename}; `featcache train-head` or `featcache finetune` "
            f"makes one"
        ) from error
    except (OSError, ValueError) as error:
        raise RunError(f"the classifier in {folder} cannot be read ({error}); train it again") from error
    digest = description.pop("sha256", "") if isinstance(description, dict) else ""
    if hash_bytes(canonical_json(description).encode()) != digest:
        raise RunError(f"{folder / MODEL_JSON} is damaged: its SHA-256 is not that of its contents; train it again")
    if description["schema"] != SCHEMA:
        raise RunError(f"{folder / MODEL_JSON} has schema {description['schema']}, this featcache reads {SCHEMA}")
    if hash_bytes(data) != description["tensors_file_sha256"]:
        raise RunError(
            f"{folder / MODEL_TENSORS} is damaged: its SHA-256 is not the one in {MODEL_JSON}; train it again"
        )
    saved = _Saved(
        is_head=description["holds"] == "head",
        classes=tuple(description["classes"]),
        extractor=description["extractor"],
        head=description.get("head", LINEAR),
    )
    return saved, load(data)
