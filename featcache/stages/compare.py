"""Both ways, and others, side by side: run what is missing, reuse what exists, say what the evidence allows."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import RUNS_DIR, CompareConfig, name_option
from featcache.errors import BadImage, OutputError, RunError
from featcache.progress import SILENT, Once, Progress
from featcache.report import Arm, SeedRun, format_table, summarise, tabulate
from featcache.runs import Predictions, RunRecord, name_predictions, read_predictions, read_record
from featcache.stages.plan_comparison import (
    ComparisonPlan,
    adopt_existing,
    estimate_curve,
    is_curve_wanted,
    make_plan,
)
from featcache.stages.run_arms import (
    ArmRunner,
    Clock,
    Group,
    check_budget,
    check_budget_alone,
    extract_all,
    say_left_out,
)
from featcache.stages.write_comparison import Material, find_remarks, write_comparison
from featcache.storage import Place, locate, locate_local


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ways side by side.

    Attributes
    ----------
    arms
        The numbers of each (see docs/json.md).
    pairs
        What sets every two of them apart: difference, interval, tests.
    verdict
        What the evidence allows to say, in one plain sentence.
    table
        The numbers as text.
    report
        The page, report.html; compare.json and compare.md lie beside it.
    summary
        All that is in compare.json.
    left_out
        Files of the data set that could not be used as images and were left out.
    """

    arms: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    verdict: str
    table: str
    report: Path
    summary: dict[str, Any]
    left_out: tuple[BadImage, ...] = ()


def compare(
    data: Path | str,
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    progress: Progress = SILENT,
    age: float = 0.0,
    **settings: Any,
) -> Comparison:
    """Compare ways to a classifier on a folder of images: heads on cached features, and fine-tuning.

    Caches and runs are used where they exist, belong to these images and do not contradict a stated setting; what is
    missing is made, with the backbone of what exists. After whatever stops it, the same call goes on.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*. What is reported is the test split where there is one, else
        the validation split; neither has a say in what is chosen.
    output
        Folder of the report.
    progress
        Told what is being done; first the plan.
    age
        Seconds that went by before this call and count for the budget.
    settings
        Fields of `featcache.config.CompareConfig`.

    Returns
    -------
    Comparison

    Raises
    ------
    SettingsError
        If a budget is too small for the extraction.
    FeatcacheError
        Whatever `extract_features`, `train_head`, `finetune` and `compare_runs` raise.
    """
    started, output, progress = time.perf_counter() - age, locate_local(output, "a report"), Once(progress)
    stated = CompareConfig(**settings)
    check_replaceable(output)
    config = adopt_existing(stated, progress)
    clock = Clock(started, config.budget)
    check_budget_alone(clock)
    plan = make_plan(data, output, config, progress)
    check_apart(output, plan)
    if any(step.state != "reuse" for step in plan.steps if step.what != "report"):
        for line in plan.list_lines():
            progress.say(line)
    check_budget(plan, clock)
    extractions = extract_all(data, plan, progress)
    groups = ArmRunner(data, plan, extractions, config, clock, progress).run_all()
    arms = load_arms(groups, [group.name for group in groups])
    first = extractions[plan.arms[0].source.path]
    curve = estimate_curve(first.cache.listing, first.cache.dim)
    material = Material(
        features=first.path,
        curve=is_curve_wanted(config, curve) and clock.suffices(curve),
        map=config.map,
        command=say_command(data, output, stated),
        remarks=say_left_out(groups, plan),
    )
    bad = tuple(dict.fromkeys(one for extraction in extractions.values() for one in extraction.bad))
    return replace(finish(arms, output, material, progress), left_out=bad)


def compare_runs(
    runs: Sequence[Path | str],
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    features: Place | str | None = None,
    map: str | None = None,  # noqa: A002 - as the option is called
    progress: Progress = SILENT,
) -> Comparison:
    """Compare finished runs.

    Parameters
    ----------
    runs
        Run folders. Those that differ in their seed alone are one arm.
    output
        Folder of the report: report.html, compare.json, compare.md and figures.
    features
        A cache of the same images, for the report's map and learning curve; another one is not used.
    map
        What else than PCA draws that map: "tsne" or "umap".
    progress
        Told what is being done.

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
    config = CompareConfig(map=map)
    output, folders = locate_local(output, "a report"), [Path(run) for run in runs]
    check_replaceable(output)
    groups = group_runs(folders)
    arms = load_arms(groups, name_arms([group.runs[0] for group in groups]))
    command = shlex.join(["featcache", "compare", *[str(folder) for folder in folders], "-o", str(output)])
    usable = None if features is None or not locate(features).is_file() else locate(features)
    material = Material(features=usable, curve=False, map=config.map, command=command)
    return finish(arms, output, material, progress)


def finish(arms: Sequence[Arm], output: Path, material: Material, progress: Progress) -> Comparison:
    """Sum up, write the report, and give both."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    remarks = [*material.remarks, *find_remarks(arms)]
    summary = summarise(arms, remarks=remarks, command=material.command, created=created)
    report = write_comparison(output, arms, summary, material, progress)
    return Comparison(
        arms=summary["arms"],
        pairs=summary["pairs"],
        verdict=summary["verdict"],
        table=format_table(tabulate(summary)),
        report=report,
        summary=summary,
    )


# --- what was done ----------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Path]) -> list[Group]:
    """Runs that differ in their seed alone are one arm, in the order of their first one."""
    groups: list[tuple[Any, set[int], Group]] = []
    for run in runs:
        record = read_record(run)
        identity, seed = describe_way(record), int(record.settings.get("seed", 0))
        for known, seeds, group in groups:
            if known == identity and seed not in seeds:
                seeds.add(seed)
                group.runs.append(run)
                break
        else:
            groups.append((identity, {seed}, Group(name="", runs=[run])))
    return [group for _, _, group in groups]


def describe_way(record: RunRecord) -> dict[str, Any]:
    """What makes two runs the same way: all but the seed."""
    settings = {name: value for name, value in record.settings.items() if name not in ("seed", "split_seed")}
    return {
        "kind": record.kind,
        "settings": settings,
        "weights": record.extractor["weights"]["tensors_sha256"],
        "layer": record.extractor["layer"],
        "preprocessing": record.extractor["preprocessing"],
        "images": record.data["fingerprints"],
    }


def load_arms(groups: Sequence[Group], names: Sequence[str]) -> list[Arm]:
    """Runs with their predictions, all on the same images in the same order.

    Raises
    ------
    RunError
        If they are not on the same images.
    """
    arms = [
        Arm(name=name, runs=tuple(load_run(run) for run in group.runs))
        for group, name in zip(groups, names, strict=True)
    ]
    first = arms[0].runs[0]
    for run in (run for arm in arms for run in arm.runs):
        for split in ("val", "test"):
            mine, theirs = (one.record.data["fingerprints"].get(split) for one in (run, first))
            here, there = (one.predictions.get(split) for one in (run, first))
            if mine != theirs or (here and there and here.paths != there.paths):
                n = [len(one.paths) if one else 0 for one in (here, there)]
                raise RunError(
                    f"{run.run} and {first.run} were not validated on the same images under the same names "
                    f"({n[0]} and {n[1]} {split} images); compare runs of one data set and one split"
                )
    return arms


def load_run(folder: Path) -> SeedRun:
    """A run with its predictions, sorted by path."""
    record = read_record(folder)
    found: dict[str, Predictions] = {
        split: sort_by_path(read_predictions(folder / name_predictions(split), record.classes))
        for split in ("val", "test")
        if split in record.accuracy
    }
    return SeedRun(run=str(folder), record=record, predictions=found)


def sort_by_path(predictions: Predictions) -> Predictions:
    """The same in the order of the paths."""
    order: NDArray[np.intp] = np.argsort(np.array(predictions.paths))
    return Predictions(
        paths=tuple(predictions.paths[i] for i in order),
        labels=predictions.labels[order],
        predicted=predictions.predicted[order],
        probabilities=predictions.probabilities[order],
    )


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


def check_replaceable(output: Path) -> None:
    """Raise an OutputError if something lies at `output` that is neither a comparison nor an empty folder."""
    if not output.exists() or (output / "compare.json").is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise OutputError(f"{output} is there and is not a comparison; choose another place with -o")


def check_apart(output: Path, plan: ComparisonPlan) -> None:
    """Raise an OutputError if the report would lie in the middle of what it is made from."""
    runs = {step.place.resolve(): step.what for step in plan.steps if step.what != "report"}
    for place, what in {**runs, Path(plan.data).resolve(): "data set"}.items():
        if output.resolve() == place:
            raise OutputError(f"{output} is the place of the {what}; choose another one for the report with -o")


def say_command(data: Path | str, output: Path, config: CompareConfig) -> str:
    """The command line that makes a comparison again."""
    words = ["featcache", "compare"] + ([] if str(data).startswith("-") else [str(data)])
    usual = CompareConfig()
    for one in fields(config):
        value = getattr(config, one.name)
        if value == getattr(usual, one.name):
            continue
        option = {"arms": "--arm", "C": "-C"}.get(one.name, name_option(one.name))
        if isinstance(value, bool):
            words.append(option if value else f"--no-{one.name}")
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            words += [option, str(each)]
    if str(output) != f"{RUNS_DIR}/compare":
        words += ["-o", str(output)]
    return shlex.join(words + (["--", str(data)] if str(data).startswith("-") else []))
