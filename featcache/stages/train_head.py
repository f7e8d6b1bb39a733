"""Stage 2: a head on cached features, in milliseconds, as often as wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.bundle import measure_size, save_head
from featcache.cache import FeatureCache, check_complete, open_readers, read_cache, stream_cache
from featcache.config import RUNS_DIR, HeadConfig, is_imported, name_option
from featcache.dataset import check_classes_filled, describe_data
from featcache.errors import OutputError, SettingsError
from featcache.files import find_free_memory
from featcache.heads import BLOCK_IMAGES, Features, FittedHead, Head, HeldOut, count_right, find_logits, fit_head
from featcache.metering import Meter, PeakMemory, Spent, add_up, count_flops, tabulate_costs
from featcache.metrics import measure_probabilities, to_probabilities
from featcache.plots import draw_learning_curve, draw_selection, save_figure
from featcache.progress import SILENT, Progress
from featcache.runs import (
    Predictions,
    RunRecord,
    describe_environment,
    is_run,
    read_record,
    write_history,
    write_record,
)
from featcache.runtime import select_device
from featcache.stages.draw_images import Draws, fit_draws
from featcache.stages.evaluate import Run, describe_accuracy, describe_predictions, make_predictions, write_evaluation
from featcache.stages.learning_curve import Curve, learn_curve
from featcache.stages.multiply_adds import find_multiply_adds
from featcache.storage import Place, locate_local

NAMES = {"lbfgs": "linear", "sklearn": "linear", "sgd": "linear", "ridge": "ridge", "knn": "nearest-neighbour"}


def train_head(
    features: Place | str,
    output: Path | str = f"{RUNS_DIR}/head",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Run:
    """Fit a head on the training rows of a cache and evaluate it once on the validation rows.

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
        If there is only one class, a class without training rows, or one with fewer than are to be drawn.
    SettingsError
        If settings do not go together, or ask for views that the features do not hold.
    OutputError
        If something other than a head's run lies at the output, or it cannot be written.

    Examples
    --------
    >>> train_head("features.h5", C=0.1).record.val_accuracy               # doctest: +SKIP
    0.9477124183006536
    """
    meter, memory = Meter(), PeakMemory()
    config, output = HeadConfig(**settings), locate_local(output, "a run")
    check_settings(config)
    config = replace(config, device=str(select_device(config.device)))
    check_replaceable(output)
    files.check_folder_writable(output.parent, output)
    fits = fits_in_memory(features, config)
    if config.solver == "auto":
        few = config.shots is not None or config.fraction is not None
        config = replace(config, solver="lbfgs" if fits or few else "sgd")
    with open_features(features, stream=config.solver == "sgd" or not fits) as cache:
        check_complete(cache, features)
        for name, split in cache.splits.items():
            check_classes_filled(split.listing.labels, cache.classes, f"the {name} split in {features}")
        config = settle_scaling(settle_views(config, cache, features), cache)
        before = meter.read()
        learned = learn(cache, config, progress)
        draws_cost = meter.read() - before - learned.fitted.spent
        evaluated = evaluate_head(learned.fitted, cache, config)
        before = meter.read()
        curve = learn_curve(cache, config, progress) if config.curve else None
        curve_cost = meter.read() - before
    record = describe_run(learned, cache, config, evaluated, curve)
    more = {"draws": draws_cost} if learned.draws else {"curve": curve_cost} if curve else {}
    costs = tabulate_costs(list_costs(learned.fitted, cache, meter.read(), more), more)
    peak = _largest(memory.read(), cache.provenance["peak_memory_bytes"])
    details = {**record.details, **describe_extraction(cache)}
    record = replace(record, **costs, peak_memory_bytes=peak, details=details)
    with files.fill_folder(output) as folder:
        record = write_head_run(folder, record, learned.fitted, evaluated.predictions, curve)
    return Run(folder=output, record=record)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A head, and the random draws of images of which it is the first, if there were some."""

    fitted: FittedHead
    draws: Draws | None


def learn(cache: FeatureCache, config: HeadConfig, progress: Progress) -> Learned:
    """Fit what is asked for: one head on all training images, or one on each of some draws of them."""
    if config.shots is not None or config.fraction is not None:
        fitted, draws = fit_draws(cache, config, progress)
        return Learned(fitted=fitted, draws=draws)
    train, val = cache.splits["train"], cache.splits["val"]
    validation = HeldOut(features=val.features, labels=val.listing.labels) if config.select_on == "val" else None
    views = train.views if config.views else None
    return Learned(
        fitted=fit_head(
            train.features,
            train.listing.labels,
            len(cache.classes),
            config,
            progress,
            views=views,
            validation=validation,
        ),
        draws=None,
    )


def check_settings(config: HeadConfig) -> None:
    """Raise a SettingsError if a setting is stated that would do nothing beside the others."""
    drawn = config.shots is not None or config.fraction is not None
    if config.shots is not None and config.fraction is not None:
        raise SettingsError("--shots and --fraction are two ways to draw training images; state one of them")
    if drawn and config.curve:
        raise SettingsError("--curve learns from parts of all training images; state it without --shots and --fraction")
    if config.repeats != HeadConfig.repeats and not (drawn or config.curve):
        raise SettingsError("--repeats is of --shots, --fraction and --curve: expected one of them beside it")
    if config.solver == "knn" and config.C is not None:
        raise SettingsError("-C is of a penalty, and nearest neighbours have none; they have -k and --temperature")
    if unheeded := config.list_unheeded():
        solvers = HeadConfig.OF_SOLVERS[unheeded[0]]
        what = "nearest neighbours" if solvers == ("knn",) else " or ".join(solvers)
        raise SettingsError(f"{name_option(unheeded[0])} is of {what}: expected --solver {solvers[0]} beside it")
    for names in (("C",), ("k", "temperature")):
        if config.select_on == "val" and all(getattr(config, name) is not None for name in names):
            given = " and ".join(map(name_option, names)) + (" is" if len(names) == 1 else " are")
            raise SettingsError(f"{given} given, so that --select-on has nothing to choose; state one of them")


def fits_in_memory(features: Place | str, config: HeadConfig) -> bool:
    """Whether the training rows, as they are and standardised, take at most half of the free memory, if it is known."""
    with open_readers(features) as readers:
        columns = readers[0].list_features("train")
        used = columns if config.views is not False else columns[:1]
        shapes = [reader.shape_of("train", column) for reader in readers for column in used]
    free, needed = find_free_memory(), 2 * 4 * sum(map(math.prod, shapes))
    return free is None or needed <= free / 2


@contextmanager
def open_features(path: Place | str, *, stream: bool) -> Iterator[FeatureCache]:
    """The cache, every byte checked: in memory, or on the disk."""
    if stream:
        with stream_cache(path) as cache:
            yield cache
    else:
        yield read_cache(path)


def settle_views(config: HeadConfig, cache: FeatureCache, path: Place | str) -> HeadConfig:
    """The settings with a decision about views.

    Raises
    ------
    SettingsError
        If there are none where some are wanted.
    """
    held = {name: split.views is not None for name, split in cache.splits.items()}
    if config.views and not held["train"]:
        raise SettingsError(
            f"{path} holds no views of the training images; `featcache extract ... --views 4` adds some"
        )
    if config.tta and not held["val"]:
        raise SettingsError(
            f"{path} holds no views of the validation images; `featcache extract ... --test-views 4` adds some"
        )
    return replace(config, views=held["train"] if config.views is None else config.views)


def settle_scaling(config: HeadConfig, cache: FeatureCache) -> HeadConfig:
    """The settings with a decision about scaling: of imported features nobody knows that they have one unit."""
    known = not is_imported(cache.extractor["backbone"])
    return config if known or config.scaling != "auto" else replace(config, scaling="standard")


def check_replaceable(output: Path) -> None:
    """Raise an OutputError if something lies at `output` that is neither a head's run nor an empty folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_run(output):
        raise OutputError(f"{output} is there and is not a run; choose another place with -o")
    if (kind := read_record(output).kind) != "head":
        raise OutputError(f"{output} holds a {kind} run, expected a head's; choose another place with -o")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a head gives on the splits of a cache.

    Attributes
    ----------
    predictions
        By held-out split.
    plain
        The same without views.
    uncalibrated
        What `predictions` were worth if no logit had been divided; None if none was.
    train_accuracy
        The share of training rows that are right.
    """

    predictions: dict[str, Predictions]
    plain: dict[str, Predictions]
    uncalibrated: dict[str, Any] | None
    train_accuracy: float


def evaluate_head(fitted: FittedHead, cache: FeatureCache, config: HeadConfig) -> Evaluated:
    """Predict every held-out split, and the training rows."""
    held_out = {name: split for name, split in cache.splits.items() if name != "train"}
    logits = {name: find_logits(fitted.head, split.features) for name, split in held_out.items()}

    def predict(temperature: float, *, views: bool) -> dict[str, Predictions]:
        """With logits that are multiplied by a temperature."""
        head, predictions = fitted.head.divide_logits(1 / temperature), {}
        for name, split in held_out.items():
            probabilities = to_probabilities(logits[name] * temperature)
            probabilities = average_views(head, probabilities, split.views) if views else probabilities
            predictions[name] = make_predictions(split.listing, probabilities)
        return predictions

    uncalibrated = None
    if fitted.temperature is not None:
        raw = predict(fitted.temperature, views=config.tta)
        uncalibrated = {name: measure_probabilities(one.labels, one.probabilities) for name, one in raw.items()}
    train, plain = cache.splits["train"], predict(1.0, views=False)
    right = count_right(fitted.head, train.features, train.listing.labels)
    return Evaluated(
        predictions=predict(1.0, views=True) if config.tta else plain,
        plain=plain,
        uncalibrated=uncalibrated,
        train_accuracy=right / len(train),
    )


def average_views(head: Head, plain: NDArray[np.float64], views: Features | None) -> NDArray[np.float64]:
    """Probabilities (N, C), the mean over those of the plain images and their views' (N, K, D)."""
    if views is None:
        return plain
    n, n_views, width = views.shape
    total, step = plain.copy(), max(1, BLOCK_IMAGES // n_views)
    for start in range(0, n, step):
        flat = np.asarray(views[start : start + step], np.float32).reshape(-1, width)
        probabilities = to_probabilities(head.logits(flat))
        total[start : start + step] += probabilities.reshape(-1, n_views, total.shape[1]).sum(axis=1)
    return total / (1 + n_views)


def list_costs(fitted: FittedHead, cache: FeatureCache, spent: Spent, more: Mapping[str, Spent]) -> dict[str, Spent]:
    """What each stage cost; of imported features nobody knows what they did.

    What was found out beside the head, its other draws or its curve, is no cost of the head's.
    """
    known = not is_imported(cache.extractor["backbone"])
    return {
        **({"extraction": Spent.from_json(cache.provenance)} if known else {}),
        "selection": fitted.selecting,
        "training": fitted.spent - fitted.selecting,
        "evaluation": spent - fitted.spent - add_up(more.values()),
    }


def describe_extraction(cache: FeatureCache) -> dict[str, Any]:
    """How fast the features were made, and the operations that this took: the head's own are nothing beside them."""
    n, seconds = len(cache) + cache.n_views, cache.provenance["seconds"]
    known = not is_imported(cache.extractor["backbone"]) and seconds > 0
    return {
        "images_per_second": n / seconds if known else None,
        "flops": count_flops(find_multiply_adds(cache.extractor), forward=n),
    }


def describe_run(
    learned: Learned,
    cache: FeatureCache,
    config: HeadConfig,
    evaluated: Evaluated,
    curve: Curve | None,
) -> RunRecord:
    """The record, but for what it cost."""
    fitted = learned.fitted
    n_parameters, chosen = fitted.head.n_parameters, say_choice(fitted.selection.choice)
    return RunRecord(
        kind="head",
        title=f"{NAMES[config.solver]} head ({config.solver}, {chosen}) on {describe_features(cache)}",
        settings=config.result_settings(),
        data=describe_data(cache.listing),
        extractor=cache.extractor,
        seconds={},
        peak_memory_bytes=None,
        parameters={"trainable": n_parameters, "total": n_parameters},
        accuracy=describe_accuracy(evaluated.predictions, evaluated.train_accuracy),
        selection=f"{chosen}: {fitted.selection.procedure}",
        device=config.device if config.solver == "lbfgs" else "cpu",
        environment=describe_environment(),
        notes=list_remarks(learned, cache, config, curve),
        details=describe_details(learned, cache, config, evaluated, curve),
    )


def describe_details(
    learned: Learned, cache: FeatureCache, config: HeadConfig, evaluated: Evaluated, curve: Curve | None
) -> dict[str, Any]:
    """What is of heads alone, as plain values (see docs/json.md)."""
    fitted, views = learned.fitted, cache.splits["val"].views
    details: dict[str, Any] = {
        "solver": config.solver,
        "choice": dict(fitted.selection.choice),
        "criterion": fitted.selection.criterion,
        "optimistic": config.select_on == "val" and bool(fitted.selection.candidates),
        "converged": fitted.converged,
        "gradient": fitted.gradient,
        "evaluations": fitted.evaluations,
        "temperature": fitted.temperature,
        "views": bool(config.views),
        "tta": config.tta,
        "test_views": views.shape[1] if config.tta and views is not None else 0,
    }
    if evaluated.uncalibrated is not None:
        details["uncalibrated"] = evaluated.uncalibrated
    if config.tta:
        details["without_tta"] = describe_predictions(evaluated.plain["val"])
    if learned.draws is not None:
        details["draws"] = learned.draws.describe()
    if curve is not None:
        details["curve"] = curve.describe()
    return details


def say_choice(choice: Mapping[str, float]) -> str:
    """Values by name, for people.

    >>> say_choice({"k": 20, "temperature": 0.1})
    'k = 20, temperature = 0.1'
    """
    return ", ".join(f"{name} = {value:g}" for name, value in choice.items())


def write_head_run(
    folder: Path, record: RunRecord, fitted: FittedHead, predictions: dict[str, Predictions], curve: Curve | None
) -> RunRecord:
    """Write everything of a head's run; the record last, with the size of the result."""
    selection = fitted.selection
    name = selection.criterion.replace("leave-one-out ", "").replace(" ", "_")
    left_one_out = selection.criterion.startswith("leave-one-out")
    prefix = "val" if record.details["optimistic"] else "loo" if left_one_out else "cv"
    history: Sequence[Mapping[str, Any]] = [
        {**one.choice, f"{prefix}_{name}": one.loss, f"{prefix}_accuracy": one.accuracy} for one in selection.candidates
    ]
    write_history(folder / "history.csv", history or [{**selection.choice, "cv_log_loss": "", "cv_accuracy": ""}])
    if len(history) > 1:
        candidates = [{**one.choice, "loss": one.loss, "accuracy": one.accuracy} for one in selection.candidates]
        figure = draw_selection(candidates, selection.choice, selection.criterion, record.title)
        save_figure(figure, folder / "selection.png")
    if curve is not None:
        write_history(folder / "curve.csv", curve.list_rows())
        save_figure(draw_learning_curve(curve.describe(), record.title), folder / "curve.png")
    save_head(folder, fitted.head, record.classes, record.extractor)
    write_evaluation(folder, predictions, record.classes, record.title)
    record = replace(record, result_bytes=measure_size(folder))
    write_record(folder, record)
    return record


def describe_features(cache: FeatureCache) -> str:
    """Whose features they are, in a few words."""
    backbone = cache.extractor["backbone"]
    if not is_imported(backbone):
        return f"frozen {backbone} features"
    _, _, name = backbone.partition(":")
    return f"imported {name} features" if name else "imported features"


def list_remarks(learned: Learned, cache: FeatureCache, config: HeadConfig, curve: Curve | None) -> list[str]:
    """What a person should know beside the numbers."""
    fitted, remarks = learned.fitted, [say_views(cache, config)]
    if is_imported(cache.extractor["backbone"]):
        table = cache.extractor["weights"]["name"]
        remarks = [f"the features were imported from {table}; what it cost to make them is not known and not counted"]
    if config.select_on == "val" and fitted.selection.candidates:
        remarks.append("the validation split chose the head and is what is reported: its accuracy is optimistic")
    if learned.draws is not None:
        remarks.append(learned.draws.say())
    if fitted.converged is False:
        remarks.append(
            f"the solver stopped after {fitted.evaluations} evaluations without converging (largest gradient entry "
            f"{fitted.gradient:.1e})"
        )
    if fitted.temperature is not None:
        remarks.append(f"logits divided by the temperature {fitted.temperature:.3g}, from held-out training images")
    elif config.calibrate:
        remarks.append("not calibrated, as a class has a single training image and none can be held out")
    if bad := cache.provenance["bad"]:
        remarks.append(f"{len(bad)} files that cannot be used as images were left out of the features")
    remarks += [
        f"{say_choice({name: value})} is at the end of the values tried; a better one may lie beyond"
        for name, value in fitted.selection.choice.items()
        if name == "C" and fitted.selection.is_at_end(name)
    ]
    return remarks + ([curve.say()] if curve is not None else [])


def say_views(cache: FeatureCache, config: HeadConfig) -> str:
    """Which images the head learned from: frozen features without augmentation surprise people."""
    views = cache.splits["train"].views
    if config.views and views is not None:
        text = f"learned from the plain features and {views.shape[1]} augmented views of each training image"
    elif views is not None:
        text = f"learned from the plain features; {views.shape[1]} augmented views of each training image were not used"
    else:
        text = "the features were extracted without augmentation"
    return f"{text}; predictions are averaged over views" if config.tta else text


def _largest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
