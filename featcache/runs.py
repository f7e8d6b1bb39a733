"""A run on disk: run.json <-> RunRecord, predictions.csv, history.csv. What ran, with what, how long, how good.

Knows no network, no array library but numpy, and no figures.

::

    runs/head/
    ├── run.json          the record
    ├── predictions.csv   path, label, prediction, one probability per class: every validation image
    ├── predictions_test.csv   the same for the test split, where there is one
    ├── history.csv       one line per epoch, or per value of C
    ├── model.json, model.safetensors   the classifier (see `featcache.bundle`)
    └── *.png             plots
"""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import OutputError, RunError
from featcache.files import pretty_json

RUN_FILE = "run.json"
SCHEMA = 1
RECORDED_PACKAGES = ("featcache", "torch", "torchvision", "scikit-learn", "h5py", "numpy", "Pillow")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run was, as it stands in run.json.

    Attributes
    ----------
    kind
        "head" (two stages) or "finetune".
    title
        A few words for tables: what was trained, with what.
    settings
        The settings that decided the result.
    data
        Folder, classes, images per split, and the fingerprint of each split's contents.
    extractor
        Backbone, weights and preprocessing (see `featcache.cache`).
    seconds
        Wall time by stage; "total" is their sum, extraction included.
    peak_memory_bytes
        Highest resident memory of the main process while it ran, or None where the system does not say.
    parameters
        "trainable" and "total".
    accuracy
        "val" and perhaps "test": each with n, correct, accuracy and `featcache.metrics.measure_probabilities`; "train"
        is the share alone.
    selection
        How hyper-parameters or the epoch were chosen, and on what.
    device
        Where it ran.
    environment
        Versions, platform, cores.
    notes
        Remarks that the user should see.
    details
        Of a head: solver, what was chosen, convergence, calibration, draws of images, the learning curve. Of both:
        images per second, floating-point operations (see docs/json.md).
    cpu_seconds
        CPU seconds of all processes, by the same stages; empty where nobody knows those of one.
    energy_joules
        Of the machine, over the stages of the total; None where it does not say.
    result_bytes
        What the classifier takes on disk; None of runs before that was measured.
    """

    kind: str
    title: str
    settings: dict[str, Any]
    data: dict[str, Any]
    extractor: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    parameters: dict[str, int]
    accuracy: dict[str, Any]
    selection: str
    device: str
    environment: dict[str, Any]
    notes: list[str]
    details: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    energy_joules: float | None = None
    result_bytes: int | None = None
    schema: int = SCHEMA

    @property
    def val_accuracy(self) -> float:
        """Share of the validation images that are right."""
        return float(self.accuracy["val"]["accuracy"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return tuple(self.data["classes"])


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions on N images.

    Attributes
    ----------
    paths
        N paths relative to the data folder.
    labels, predicted
        (N,) int64.
    probabilities
        (N, C) float64.
    """

    paths: Sequence[str]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def write_record(folder: Path, record: RunRecord) -> None:
    """Write run.json; last of a run's files, so that a folder with it is a whole run."""
    (folder / RUN_FILE).write_text(pretty_json(asdict(record)), encoding="utf-8")


def is_run(path: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (path / RUN_FILE).is_file()


def read_record(folder: Path | str) -> RunRecord:
    """Read the record of a run.

    Raises
    ------
    RunError
        If the folder is not a run, or was written by a featcache that this one does not understand.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run: expected {path}; `featcache train-head` and `featcache finetune` make runs"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        later = {one.name for one in fields(RunRecord) if not is_required(one)} - set(value)
        known = {one.name: value[one.name] for one in fields(RunRecord) if one.name not in later}
        record = RunRecord(**known)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); run it again") from error
    if record.schema != SCHEMA:
        raise RunError(f"{path} has schema {record.schema}, this featcache reads {SCHEMA}; run it again")
    if missing := find_missing(record):
        raise RunError(f"{path} is damaged: {missing} is not as featcache writes it; run it again")
    return record


def find_missing(record: RunRecord) -> str:
    """What of a record's contents is missing or of another kind than it should be; "" if all is well."""
    whole: dict[str, tuple[Any, dict[str, Any]]] = {
        "settings": (record.settings, {}),
        "data": (record.data, {"folder": str, "classes": list, "images": dict, "fingerprints": dict}),
        "extractor": (record.extractor, {"backbone": str, "weights": dict}),
        "seconds": (record.seconds, {"total": (int, float)}),
        "parameters": (record.parameters, {"trainable": int}),
        "accuracy": (record.accuracy, {"val": dict}),
        "details": (record.details, {}),
        "cpu_seconds": (record.cpu_seconds, {}),
        "environment": (record.environment, {}),
    }
    for name, (values, wanted) in whole.items():
        if not isinstance(values, dict):
            return name
        for key, kind in wanted.items():
            if not isinstance(values.get(key), kind):
                return f"{name}.{key}"
    if "tensors_sha256" not in record.extractor["weights"]:
        return "extractor.weights.tensors_sha256"
    for split in ("val", "test"):
        measured = record.accuracy.get(split, {"n": 0, "correct": 0, "accuracy": 0.0})
        if not all(isinstance(measured.get(key), int | float) for key in ("n", "correct", "accuracy")):
            return f"accuracy.{split}"
    return "" if isinstance(record.notes, list) else "notes"


def is_required(one: Field[Any]) -> bool:
    """Whether every run has this field; those with a default came later, but for the schema, which decides that."""
    return one.name == "schema" or (one.default is MISSING and one.default_factory is MISSING)


def name_predictions(split: str) -> str:
    """Name of the CSV file with a split's predictions."""
    return "predictions.csv" if split == "val" else f"predictions_{split}.csv"


def write_predictions(path: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Write predictions as CSV: path, label, prediction, then `probability_<class>` for each class."""
    header = ["path", "label", "prediction", *(f"probability_{name}" for name in classes)]
    columns = (predictions.paths, predictions.labels, predictions.predicted, predictions.probabilities)
    rows = (
        [name, classes[label], classes[predicted], *(f"{value:.6f}" for value in probabilities)]
        for name, label, predicted, probabilities in zip(*columns, strict=True)
    )
    _write_csv(path, header, rows)


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Read what `write_predictions` wrote.

    Raises
    ------
    RunError
        If the file is missing, damaged, or not of these classes.
    """
    index = {name: label for label, name in enumerate(classes)}
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
        predictions = Predictions(
            paths=tuple(row[0] for row in rows),
            labels=np.array([index[row[1]] for row in rows], dtype=np.int64),
            predicted=np.array([index[row[2]] for row in rows], dtype=np.int64),
            probabilities=np.array(
                [[row[header.index(f"probability_{name}")] for name in classes] for row in rows], dtype=np.float64
            ).reshape(-1, len(classes)),
        )
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}); run it again") from error
    if not np.isfinite(predictions.probabilities).all():
        raise RunError(f"{path} is damaged: it has probabilities that are no numbers; run it again")
    return predictions


def write_history(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one CSV line per row, headed by the names of the first one."""
    header = list(rows[0])
    _write_csv(path, header, ([row[name] for name in header] for row in rows))


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the numbers of a history; what is missing, and the stage, which is a word, is left out.

    Raises
    ------
    RunError
        If the file is missing or damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(value) for name, value in row.items() if value and name != "stage"}
                for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({error}); run it again") from error
    if not rows or not all("epoch" in row for row in rows):
        raise RunError(f"{path} cannot be read (it has no epochs); run it again")
    return rows


def decide_run(folder: Path, *wanted: Mapping[str, Any], force: bool) -> str:
    """What to do about a run folder that may be there already: a decision, no deed.

    Parameters
    ----------
    folder
        The output.
    wanted
        `describe_identity` of the run that is asked for, and perhaps of others that are as good.
    force
        Whether another run may be replaced.

    Returns
    -------
    "create" (nothing there), "reuse" (it is the very run) or "replace" (it is another, and `force`).

    Raises
    ------
    RunError
        If another run lies there, listing what differs.
    OutputError
        If something lies there that is not a run: it is never replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "create"
    if not is_run(folder):
        raise OutputError(f"{folder} is there and is not a run; choose another place with -o")
    try:
        found = describe_identity(read_record(folder))
    except RunError:
        if force:
            return "replace"  # a damaged one
        raise
    if found in wanted:
        return "replace" if force else "reuse"
    if force:
        return "replace"
    raise RunError(
        f"{folder} holds another run ({'; '.join(list_changes(found, wanted[0]))}); name another place, or replace it "
        f"with --force"
    )


def describe_identity(record: RunRecord) -> dict[str, Any]:
    """What makes two runs the same: kind, settings, data and extractor, flat."""
    return identify(record.kind, record.settings, record.data, record.extractor)


def identify(
    kind: str, settings: Mapping[str, Any], data: Mapping[str, Any], extractor: Mapping[str, Any]
) -> dict[str, Any]:
    """The same from its parts."""
    return {
        "kind": kind,
        **json.loads(json.dumps(dict(settings))),
        "images": data["fingerprints"],
        "weights tensors": extractor["weights"]["tensors_sha256"],
    }


def list_changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Each value that differs, as "name: found -> wanted"; digests are only said to differ."""
    changes = []
    for name in [*found, *(name for name in wanted if name not in found)]:
        if found.get(name) != wanted.get(name):
            plain = name not in ("images", "weights tensors")
            before, after = ("unset" if one.get(name) is None else one[name] for one in (found, wanted))
            changes.append(f"{name}: {before} -> {after}" if plain else f"other {name}")
    return changes


def describe_environment() -> dict[str, Any]:
    """Versions of what decides numbers, and the machine."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in RECORDED_PACKAGES},
        },
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
    }


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
