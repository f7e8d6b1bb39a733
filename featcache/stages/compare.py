"""Both ways side by side: run what is missing, reuse what exists, and say what the evidence allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache import files
from featcache.backbones import check_trainable
from featcache.cache import check_complete, open_cache
from featcache.config import RUNS_DIR, VIEWS, CompareConfig, ExtractConfig, FinetuneConfig, is_imported
from featcache.dataset import describe_data
from featcache.errors import BadImage, CacheError, OutputError, RunError
from featcache.metrics import confusion_matrix
from featcache.plots import draw_accuracy_against_time, draw_arm_curves, draw_confusions, save_figure
from featcache.progress import SILENT, Progress
from featcache.report import (
    Arm,
    compare_pairs,
    describe_arm,
    format_markdown,
    format_table,
    state_verdict,
    tabulate,
)
from featcache.runs import is_run, read_history, read_predictions, read_record
from featcache.stages.extract import Extraction, extract_features
from featcache.stages.finetune import finetune
from featcache.stages.train_head import train_head

REPORT = "compare.md"
FIGURES = (
    ("accuracy against time", "accuracy_vs_time.png"),
    ("validation accuracy by epoch", "curves.png"),
    ("confusion matrices", "confusions.png"),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms side by side.

    Attributes
    ----------
    arms
        The numbers of each (see docs/json.md).
    pairs
        The exact McNemar test of every two arms.
    verdict
        What the evidence allows to say, in a sentence.
    table
        The same numbers as text.
    report
        The Markdown page.
    left_out
        Files of the data set that could not be used as images and were left out.
    """

    arms: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    verdict: str
    table: str
    report: Path
    left_out: tuple[BadImage, ...] = ()


def compare(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Comparison:
    """Compare the two ways on a folder of images.

    The cache and the two runs are used where they exist, belong to these images and do not contradict a stated setting;
    what is missing is made, with the backbone of what exists.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*.
    output
        Folder of the report.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.CompareConfig`.

    Returns
    -------
    Comparison

    Raises
    ------
    FeatcacheError
        Whatever `extract_features`, `train_head`, `finetune` and `compare_runs` raise.
    """
    config, output = CompareConfig(**settings), Path(output)
    check_replaceable(output)
    config = adopt_existing(config, progress)
    check_trainable(config.backbone or ExtractConfig.backbone)
    extraction = extract_features(
        data,
        config.features,
        progress=progress,
        **config.stated("backbone", "weights", "val_fraction", "seed", "store", "workers"),
        **list_optional(config),
        device=config.device,
        skip_bad=config.skip_bad,
        force=config.force,
    )
    runs = [provide_head(extraction, config, progress), provide_finetune(data, extraction, config, progress)]
    return replace(compare_runs(runs, output), left_out=extraction.bad)


def compare_runs(runs: Sequence[Path | str], output: Path | str = f"{RUNS_DIR}/compare") -> Comparison:
    """Compare finished runs.

    Parameters
    ----------
    runs
        Run folders, the first two of which the verdict is about.
    output
        Folder of the report: compare.json, compare.md and figures.

    Returns
    -------
    Comparison

    Raises
    ------
    RunError
        If a folder is not a run, or the runs were not validated on the same images.
    OutputError
        If the output cannot be written, or something else lies there.
    """
    output = Path(output)
    check_replaceable(output)
    arms = load_arms([Path(run) for run in runs])
    numbers = [describe_arm(arm) for arm in arms]
    pairs = compare_pairs(arms)
    verdict = state_verdict(numbers, pairs)
    rows = tabulate(numbers)
    with files.fill_folder(output) as folder:
        draw_comparison(folder, arms, numbers)
        (folder / REPORT).write_text(format_markdown(rows, verdict, numbers, FIGURES), encoding="utf-8")
        summary = {"schema": 1, "verdict": verdict, "arms": numbers, "pairs": pairs, "report": REPORT}
        (folder / "compare.json").write_text(files.pretty_json(summary), encoding="utf-8")
    return Comparison(arms=numbers, pairs=pairs, verdict=verdict, table=format_table(rows), report=output / REPORT)


def adopt_existing(config: CompareConfig, progress: Progress) -> CompareConfig:
    """Take what was not stated about the extraction from the cache that lies there, else from the fine-tuning run."""
    names = ("backbone", "weights", "val_fraction", "seed", "store")
    finetune_run = Path(config.runs) / "finetune"
    found: Mapping[str, Any] = {}
    if Path(config.features).is_file():
        cache = open_cache(config.features)
        check_complete(cache, config.features)
        if is_imported(cache.extractor["backbone"]) and not config.force:
            raise CacheError(
                f"{config.features} holds imported features, which no network here can make again: compare finished "
                f"runs (`featcache compare {config.runs}/head {config.runs}/finetune`), or extract others with "
                f"--features OTHER.h5"
            )
        source, found = config.features, cache.provenance["settings"]
    elif is_run(finetune_run):
        source, found = str(finetune_run), read_record(finetune_run).settings
    if not found:
        return config
    adopted = {name: found[name] for name in names if name in found and getattr(config, name) is None}
    if adopted.get("backbone"):
        progress.say(f"backbone {adopted['backbone']}, as in {source}")
    return replace(config, **adopted)


def list_optional(config: CompareConfig) -> dict[str, Any]:
    """Layers and image format of the cache that lies there, if it is of the backbone that is compared."""
    if not Path(config.features).is_file():
        return {}
    found = open_cache(config.features).provenance["settings"]
    if found.get("backbone") != config.backbone:
        return {}
    return {
        name: tuple(found[name]) if isinstance(found[name], list) else found[name]
        for name in ExtractConfig.OPTIONAL
        if name in found and name not in VIEWS  # those that are not stated are kept
    }


def provide_head(extraction: Extraction, config: CompareConfig, progress: Progress) -> Path:
    """The head's run: the one that lies there if it fits, else a new one."""
    folder = Path(config.runs) / "head"
    wanted = config.stated("solver", "C")
    if is_run(folder) and _fits(folder, "head", extraction, wanted):
        progress.say(f"head: {folder} is reused")
        return folder
    progress.say("head: training on the cached features")
    return train_head(extraction.path, folder, progress=progress, **wanted, **config.stated("seed")).folder


def provide_finetune(data: Path | str, extraction: Extraction, config: CompareConfig, progress: Progress) -> Path:
    """The fine-tuning run: the one that lies there if it fits, else a new one."""
    folder = Path(config.runs) / "finetune"
    images = {name: value for name, value in list_optional(config).items() if name in FinetuneConfig.IMAGES}
    wanted = {**config.stated("epochs", "batch_size", "lr", "seed"), **images}
    if is_run(folder) and _fits(folder, "finetune", extraction, wanted):
        progress.say(f"finetune: {folder} is reused")
        return folder
    return finetune(
        data,
        folder,
        progress=progress,
        **wanted,
        **config.stated("backbone", "weights", "val_fraction", "workers"),
        device=config.device,
        skip_bad=config.skip_bad,
        force=config.force,
    ).folder


def load_arms(runs: Sequence[Path]) -> list[Arm]:
    """Runs with their predictions, all on the same validation images in the same order.

    Raises
    ------
    RunError
        If they are not on the same images.
    """
    arms = []
    for path, name in zip(runs, name_arms(runs), strict=True):
        record = read_record(path)
        predictions = read_predictions(path / "predictions.csv", record.classes)
        order = np.argsort(np.array(predictions.paths))
        arms.append(
            Arm(
                name=name,
                run=str(path),
                record=record,
                predictions=replace(
                    predictions,
                    paths=tuple(predictions.paths[i] for i in order),
                    labels=predictions.labels[order],
                    predicted=predictions.predicted[order],
                    probabilities=predictions.probabilities[order],
                ),
            )
        )
    first = arms[0]
    for arm in arms[1:]:
        same_images = arm.record.data["fingerprints"]["val"] == first.record.data["fingerprints"]["val"]
        if not same_images or arm.predictions.paths != first.predictions.paths:
            raise RunError(
                f"{arm.run} and {first.run} were not validated on the same images under the same names "
                f"({len(arm.predictions.paths)} and {len(first.predictions.paths)} images); compare runs of one data "
                f"set and one split"
            )
    return arms


def name_arms(runs: Sequence[Path]) -> list[str]:
    """Each run's folder name, with as many folders in front as it takes to tell all apart.

    >>> name_arms([Path("/a/one/head"), Path("/a/two/head")])
    ['one/head', 'two/head']
    """
    parts = [path.resolve().parts for path in runs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-n:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(runs, 1)]  # a run given twice


def draw_comparison(folder: Path, arms: Sequence[Arm], numbers: Sequence[dict[str, Any]]) -> None:
    """Write the figures."""
    histories = {arm.name: read_history(Path(arm.run) / "history.csv") for arm in arms if arm.record.kind == "finetune"}
    lines = {arm.name: arm.record.val_accuracy for arm in arms if arm.record.kind != "finetune"}
    matrices = {
        arm.name: confusion_matrix(arm.predictions.labels, arm.predictions.predicted, len(arm.record.classes))
        for arm in arms
    }
    drawings = (
        draw_accuracy_against_time(numbers),
        draw_arm_curves(histories, lines),
        draw_confusions(matrices, arms[0].record.classes),
    )
    for figure, (_, file) in zip(drawings, FIGURES, strict=True):
        save_figure(figure, folder / file)


def check_replaceable(output: Path) -> None:
    """Raise an OutputError if something lies at `output` that is neither a comparison nor an empty folder."""
    if not output.exists() or (output / "compare.json").is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise OutputError(f"{output} is there and is not a comparison; choose another place with -o")


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _fits(folder: Path, kind: str, extraction: Extraction, wanted: Mapping[str, Any]) -> bool:
    """Whether a run is of this kind, of these images and weights, and contradicts nothing that was stated."""
    record, cache = read_record(folder), extraction.cache
    return (
        record.kind == kind
        and record.data["fingerprints"] == describe_data(cache.listing)["fingerprints"]
        and record.extractor["weights"]["tensors_sha256"] == cache.extractor["weights"]["tensors_sha256"]
        and all(record.settings.get(name) == plain(value) for name, value in wanted.items())
    )
