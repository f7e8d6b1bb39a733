"""Stage 2: a linear head on cached features, in milliseconds, as often as wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from featcache import files
from featcache.bundle import save_head
from featcache.cache import FeatureCache, check_complete, read_cache
from featcache.config import RUNS_DIR, HeadConfig, is_imported
from featcache.dataset import check_classes_filled, describe_data
from featcache.errors import OutputError
from featcache.heads import FittedHead, fit_head
from featcache.metrics import to_probabilities
from featcache.plots import draw_selection, save_figure
from featcache.progress import SILENT, Progress
from featcache.runs import (
    PeakMemory,
    Predictions,
    RunRecord,
    describe_environment,
    is_run,
    read_record,
    write_history,
    write_record,
)
from featcache.stages.evaluate import Run, describe_accuracy, make_predictions, write_evaluation


def train_head(
    features: Path | str,
    output: Path | str = f"{RUNS_DIR}/head",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Run:
    """Fit a linear head on the training rows of a cache and evaluate it once on the validation rows.

    A head that lies at the output already is replaced: it costs milliseconds to make again.

    Parameters
    ----------
    features
        A cache that `extract_features` or `import_features` made.
    output
        The run folder.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.HeadConfig`.

    Returns
    -------
    Run

    Raises
    ------
    CacheError
        If the file is not a feature cache, or damaged.
    DatasetError
        If there is only one class, or a class without training rows.
    OutputError
        If something other than a head's run lies at the output, or it cannot be written.

    Examples
    --------
    >>> train_head("features.h5", C=0.1).record.val_accuracy               # doctest: +SKIP
    0.9477124183006536
    """
    started, memory = time.perf_counter(), PeakMemory()
    config, output = HeadConfig(**settings), Path(output)
    check_replaceable(output)
    files.check_folder_writable(output.parent, output)
    cache = read_cache(features)
    check_complete(cache, features)
    train = cache.splits["train"]
    for name, split in cache.splits.items():
        check_classes_filled(split.listing.labels, cache.classes, f"the {name} split in {features}")
    read = time.perf_counter()
    fitted = fit_head(train.features, train.listing.labels, len(cache.classes), config, progress)
    predictions, train_accuracy = evaluate_head(fitted, cache)
    evaluated = time.perf_counter()
    known = not is_imported(cache.extractor["backbone"])
    seconds = {
        **({"extraction": cache.provenance["seconds"]} if known else {}),
        "selection": fitted.selection_seconds,
        "training": fitted.fit_seconds,
        "evaluation": (read - started) + (evaluated - read - fitted.selection_seconds - fitted.fit_seconds),
    }
    n_parameters = fitted.head.weight.size + fitted.head.bias.size
    record = RunRecord(
        kind="head",
        title=f"linear head ({config.solver}, C = {fitted.C:g}) on {describe_features(cache)}",
        settings=config.result_settings(),
        data=describe_data(cache.listing),
        extractor=cache.extractor,
        seconds={**seconds, "total": sum(seconds.values())},
        peak_memory_bytes=_largest(memory.read(), cache.provenance["peak_memory_bytes"]),
        parameters={"trainable": n_parameters, "total": n_parameters},
        accuracy=describe_accuracy(predictions, train_accuracy),
        selection=f"C = {fitted.C:g}: {fitted.selection}",
        device="cpu",
        environment=describe_environment(),
        notes=_list_remarks(fitted, cache),
    )
    with files.fill_folder(output) as folder:
        write_head_run(folder, record, fitted, predictions)
    return Run(folder=output, record=record)


def check_replaceable(output: Path) -> None:
    """Raise an OutputError if something lies at `output` that is neither a head's run nor an empty folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_run(output):
        raise OutputError(f"{output} is there and is not a run; choose another place with -o")
    if (kind := read_record(output).kind) != "head":
        raise OutputError(f"{output} holds a {kind} run, expected a head's; choose another place with -o")


def evaluate_head(fitted: FittedHead, cache: FeatureCache) -> tuple[dict[str, Predictions], float]:
    """Predictions on every held-out split, and the share of training rows that are right."""
    predictions = {
        name: make_predictions(split.listing, to_probabilities(fitted.head.logits(split.features)))
        for name, split in cache.splits.items()
        if name != "train"
    }
    train = cache.splits["train"]
    right = fitted.head.logits(train.features).argmax(axis=1) == train.listing.labels
    return predictions, float(np.mean(right))


def write_head_run(folder: Path, record: RunRecord, fitted: FittedHead, predictions: dict[str, Predictions]) -> None:
    """Write everything of a head's run; the record last."""
    history = [{"C": one.C, "cv_log_loss": one.log_loss, "cv_accuracy": one.accuracy} for one in fitted.candidates]
    write_history(folder / "history.csv", history or [{"C": fitted.C, "cv_log_loss": "", "cv_accuracy": ""}])
    if history:
        save_figure(draw_selection(history, fitted.C, record.title), folder / "selection.png")
    save_head(folder, fitted.head, record.classes, record.extractor)
    write_evaluation(folder, predictions, record.classes, record.title)
    write_record(folder, record)


def describe_features(cache: FeatureCache) -> str:
    """Whose features they are, in a few words."""
    backbone = cache.extractor["backbone"]
    if not is_imported(backbone):
        return f"frozen {backbone} features"
    _, _, name = backbone.partition(":")
    return f"imported {name} features" if name else "imported features"


def _list_remarks(fitted: FittedHead, cache: FeatureCache) -> list[str]:
    remarks = ["the features were extracted without augmentation"]
    if is_imported(cache.extractor["backbone"]):
        table = cache.extractor["weights"]["name"]
        remarks = [f"the features were imported from {table}; what it cost to make them is not known and not counted"]
    if not fitted.converged:
        remarks.append(f"the solver stopped after {fitted.iterations} iterations without converging")
    if bad := cache.provenance["bad"]:
        remarks.append(f"{len(bad)} files that cannot be used as images were left out of the features")
    if len(fitted.candidates) > 1 and fitted.C in (fitted.candidates[0].C, fitted.candidates[-1].C):
        remarks.append(f"C = {fitted.C:g} is at the end of the values tried; a better one may lie beyond")
    return remarks


def _largest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
