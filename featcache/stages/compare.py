"""Both ways, and others, side by side: run what is missing, reuse what exists, say what the evidence allows."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import RUNS_DIR, CompareConfig, name_option
from featcache.dataset import describe_data
from featcache.errors import BadImage, OutputError, RunError, SettingsError
from featcache.progress import SILENT, Once, Progress
from featcache.report import Arm, SeedRun, format_table, summarise, tabulate
from featcache.runs import PREDICTIONS, Predictions, RunRecord, is_run, read_predictions, read_record
from featcache.stages.extract import Extraction, extract_features
from featcache.stages.finetune import finetune
from featcache.stages.plan_comparison import (
    BUDGET_OF,
    CUT,
    REPORT_SECONDS,
    ArmPlan,
    ComparisonPlan,
    Source,
    adopt_existing,
    estimate_curve,
    find_run,
    finetune_settings,
    fits,
    head_settings,
    is_curve_wanted,
    is_cut,
    list_wanted,
    make_plan,
    read_checkpoint,
    say_time,
)
from featcache.stages.train_head import train_head
from featcache.stages.write_comparison import Material, find_remarks, write_comparison

LEAST_SHARE = 0.5  # of the time that there is now: a run that was cut short before with less is made anew
LEAST_SECONDS = 5.0  # that a fine-tuning can be given


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

    def _repr_html_(self) -> str:
        """The page, for notebooks."""
        return self.report.read_text(encoding="utf-8")


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
    started, output, progress = time.perf_counter() - age, Path(output), Once(progress)
    stated = CompareConfig(**settings)
    check_replaceable(output)
    config = adopt_existing(stated, progress)
    clock = Clock(started, config.budget)
    plan = make_plan(data, output, config, progress)
    check_apart(output, plan)
    if any(step.state != "reuse" for step in plan.steps if step.what != "report"):
        for line in plan.list_lines():
            progress.say(line)
    check_budget(plan, clock)
    extractions = extract_all(data, plan, progress)
    groups = run_all(data, plan, extractions, config, clock, progress)
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
    features: Path | str | None = None,
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
    output, folders = Path(output), [Path(run) for run in runs]
    check_replaceable(output)
    groups = group_runs(folders)
    arms = load_arms(groups, name_arms([group.runs[0] for group in groups]))
    command = shlex.join(["featcache", "compare", *[str(folder) for folder in folders], "-o", str(output)])
    usable = None if features is None or not Path(features).is_file() else Path(features)
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


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """What is left of a budget.

    Attributes
    ----------
    started
        On the clock of `time.perf_counter`.
    limit
        Seconds that all may take; None if there is no budget.
    """

    started: float
    limit: float | None

    def find_left(self) -> float | None:
        """Seconds until the report must be begun; None without a budget."""
        return None if self.limit is None else self.limit - (time.perf_counter() - self.started) - REPORT_SECONDS

    def suffices(self, seconds: float) -> bool:
        """Whether there is so much time left."""
        left = self.find_left()
        return left is None or seconds < left


def check_budget(plan: ComparisonPlan, clock: Clock) -> None:
    """Raise a SettingsError if what cannot be cut short takes longer than there is time."""
    left = clock.find_left()
    if left is None:
        return
    needed = plan.find_seconds("extraction") + sum(
        step.seconds or 0.0 for step in plan.steps if step.what == "head" and not step.number
    )
    trainings = sum(step.state != "reuse" for step in plan.steps if step.what == "finetune" and not step.number)
    if (needed := needed + LEAST_SECONDS * trainings) > left:
        raise SettingsError(
            f"--budget is {plan.budget:g} s: expected {needed + REPORT_SECONDS:.0f} s or more, which extraction, "
            f"heads, the first steps and the report take; `featcache extract` alone goes on where it was stopped"
        )


# --- doing it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one arm, one a seed."""

    name: str
    runs: list[Path]


def extract_all(data: Path | str, plan: ComparisonPlan, progress: Progress) -> dict[Path, Extraction]:
    """The features that the arms learn from, by their file; views are added to rows that are there."""
    extractions: dict[Path, Extraction] = {}
    sources: dict[Path, Source] = {arm.source.path: arm.source for arm in plan.arms}
    for path, source in sorted(sources.items(), key=lambda item: "views" in item[1].settings):
        settings = dict(source.settings)
        if "views" in settings and extractions:
            wanted = settings.get("backbone")
            settings["reuse"] = tuple(
                str(done) for done in extractions if sources[done].settings.get("backbone") == wanted and done != path
            )
        extractions[path] = extract_features(data, path, progress=progress, **settings)
    return extractions


def run_all(
    data: Path | str,
    plan: ComparisonPlan,
    extractions: Mapping[Path, Extraction],
    config: CompareConfig,
    clock: Clock,
    progress: Progress,
) -> list[Group]:
    """Every arm with every seed: first one seed of each, heads before networks, so that a budget leaves no arm out."""
    groups = {arm.name: Group(name=arm.name, runs=[]) for arm in plan.arms}
    order = sorted(plan.arms, key=lambda arm: arm.kind != "head")
    for number in range(plan.seeds):
        for i, arm in enumerate(order):
            extraction, runs = extractions[arm.source.path], groups[arm.name].runs
            if arm.kind == "head":
                if not number or clock.suffices(find_needed(runs[0])):
                    runs.append(provide_head(arm, number, extraction, config, progress))
                continue
            share = 1 if number else sum(other.kind == "finetune" for other in order[i:])
            allowance = Allowance.of(clock, share, find_needed(runs[0]) if number else None)
            run = provide_finetune(data, arm, number, extraction, config, allowance, progress)
            if run is not None:
                runs.append(run)
    return [groups[arm.name] for arm in plan.arms if groups[arm.name].runs]


def say_left_out(groups: Sequence[Group], plan: ComparisonPlan) -> tuple[str, ...]:
    """Remarks about seeds for which the budget did not suffice."""
    budget = say_time(plan.budget or 0.0)
    return tuple(
        f"The budget of {budget} sufficed for {len(group.runs)} of {plan.seeds} seeds of {group.name}."
        for group in groups
        if len(group.runs) < plan.seeds
    )


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How long a fine-tuning may take, None without a budget, and whether that is enough for a whole further seed."""

    seconds: float | None
    suffices: bool

    @classmethod
    def of(cls, clock: Clock, share: int, needed: float | None) -> Allowance:
        """One part in `share` of what is left; `needed` is what another seed took."""
        left = clock.find_left()
        if left is None:
            return cls(seconds=None, suffices=True)
        return cls(seconds=left / share, suffices=needed is None or needed < left / share)


def find_needed(first: Path) -> float:
    """Seconds that another seed takes, from the first one's run; no time suffices where that was cut short itself."""
    record = read_record(first)
    if "time_budget" in record.settings:
        return math.inf
    return float(record.seconds["total"] - record.seconds.get("extraction", 0.0))


def provide_head(arm: ArmPlan, number: int, extraction: Extraction, config: CompareConfig, progress: Progress) -> Path:
    """A head's run: the one that lies there if it fits, else a new one."""
    data, extractor = describe_data(extraction.cache.listing), extraction.cache.extractor
    found = find_run(arm, number, config, data, extractor)
    if found is not None:
        progress.say(f"{arm.name}: {found} is reused")
        return found
    folder = arm.name_folder(Path(config.runs), number)
    progress.say(f"{folder.name}: training on the cached features")
    settings = head_settings(arm, number, config)
    return train_head(extraction.path, folder, progress=progress, **settings).folder


def provide_finetune(
    data: Path | str,
    arm: ArmPlan,
    number: int,
    extraction: Extraction,
    config: CompareConfig,
    allowance: Allowance,
    progress: Progress,
) -> Path | None:
    """A fine-tuning run: the one that lies there if it fits, else a new one; None if there is no time for it.

    One that a budget has cut short lies beside the place of the whole one, and counts only where there is a budget.
    """
    described, extractor = describe_data(extraction.cache.listing), extraction.cache.extractor
    found = find_run(arm, number, config, described, extractor)
    if found is not None:
        progress.say(f"{arm.name}: {found} is reused")
        return found
    folder = arm.name_folder(Path(config.runs), number)
    cut = folder.with_name(folder.name + CUT)
    if allowance.seconds is not None and is_run(cut) and not number:
        before = read_record(cut).settings.get("time_budget", 0.0)
        if is_same_but_cut(arm, cut, config, described, extractor) and before >= LEAST_SHARE * allowance.seconds:
            progress.say(f"{arm.name}: {cut} is reused")
            return cut
    if not allowance.suffices:
        return None
    progress.say(f"{folder.name}: fine-tuning")
    settings = finetune_settings(arm, number, config) | {"features": str(extraction.path)}
    if allowance.seconds is not None:
        check_cut(folder, cut)
        settings["time_budget"] = max(allowance.seconds, LEAST_SECONDS) + find_spent(folder)
    if is_run(folder) and is_cut(read_record(folder)):  # killed before it was set aside
        set_aside(folder, None if number or cut.exists() else cut)
    run = finetune(data, folder, progress=progress, budget_of=BUDGET_OF, **settings)
    if not is_cut(run.record):
        return run.folder
    return set_aside(folder, None if number else cut)


def set_aside(folder: Path, cut: Path | None) -> Path | None:
    """Move a run that was cut short out of the place of the whole one; without a place for it, it goes."""
    if cut is None:
        shutil.rmtree(folder)
        return None
    if cut.exists():
        shutil.rmtree(cut)
    folder.rename(cut)
    return cut


def check_cut(folder: Path, cut: Path) -> None:
    """Raise an OutputError if what lies where a run is cut short, or is put then, must not be moved or replaced."""
    for path in (folder, cut):
        if path.is_symlink():
            raise OutputError(f"{path} is a link, and --budget may have to move what it leads to; name other --runs")
    if cut.exists() and not (is_run(cut) and is_cut(read_record(cut))):
        raise OutputError(
            f"{cut} is there and is no fine-tune that a comparison's budget has cut short; move it, or name other "
            f"--runs"
        )


def is_same_but_cut(
    arm: ArmPlan, cut: Path, config: CompareConfig, data: Mapping[str, Any], extractor: Mapping[str, Any]
) -> bool:
    """Whether a run that was cut short is of these images, weights and settings."""
    record = read_record(cut)
    return is_cut(record) and fits(record, list_wanted(arm, 0, config), arm.kind, data, extractor)


def find_spent(folder: Path) -> float:
    """Seconds that an interrupted run has spent already; they count for its own budget, and not for this one."""
    found = read_checkpoint(folder)
    return 0.0 if found is None else float(found["more"]["seconds"])


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
    found = {
        split: sort_by_path(read_predictions(folder / name, record.classes))
        for split, name in PREDICTIONS.items()
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
