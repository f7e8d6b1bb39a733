"""What every training stage does at its end: predict the held-out splits, count, and draw. Not a verb of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.dataset import Split
from featcache.errors import BadImage
from featcache.metrics import confusion_matrix, count_correct, measure_probabilities
from featcache.plots import draw_confusions, save_figure
from featcache.runs import Predictions, RunRecord, name_predictions, write_predictions


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder
        Where it is.
    record
        What it was.
    reused
        Whether it was there already.
    left_out
        Files of the data set that could not be used as images and were left out.
    """

    folder: Path
    record: RunRecord
    reused: bool = False
    left_out: tuple[BadImage, ...] = ()


def make_predictions(split: Split, probabilities: NDArray[np.float64]) -> Predictions:
    """Predictions from probabilities (N, C), the most probable class each."""
    return Predictions(
        paths=split.paths,
        labels=split.labels,
        predicted=probabilities.argmax(axis=1).astype(np.int64),
        probabilities=probabilities,
    )


def describe_accuracy(predictions: Mapping[str, Predictions], train_accuracy: float | None) -> dict[str, Any]:
    """The record's `accuracy`: "train" as a share, if it is known; the held-out splits with all that is measured."""
    described: dict[str, Any] = {"train": train_accuracy}
    return described | {name: describe_predictions(one) for name, one in predictions.items()}


def describe_predictions(predictions: Predictions) -> dict[str, Any]:
    """How many there are, how many are right, and what else is measured."""
    correct, n = count_correct(predictions.labels, predictions.predicted), len(predictions.labels)
    measured = measure_probabilities(predictions.labels, predictions.probabilities)
    return {"n": n, "correct": correct, "accuracy": correct / n, **measured}


def write_evaluation(
    folder: Path, predictions: Mapping[str, Predictions], classes: tuple[str, ...], title: str
) -> None:
    """Write each held-out split's predictions, and the confusion matrix of the validation split."""
    for name, one in predictions.items():
        write_predictions(folder / name_predictions(name), one, classes)
    val = predictions["val"]
    counts = confusion_matrix(val.labels, val.predicted, len(classes))
    save_figure(draw_confusions({title: counts}, classes), folder / "confusion.png")
