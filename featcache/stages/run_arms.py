"""The runs of a comparison's arms: those that lie there, and those that are made, as far as the time suffices."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.config import CompareConfig
from featcache.dataset import describe_data
from featcache.errors import OutputError, SettingsError
from featcache.progress import Progress
from featcache.runs import is_run, read_record
from featcache.stages.extract import Extraction, extract_features
from featcache.stages.finetune import finetune
from featcache.stages.plan_comparison import (
    BUDGET_OF,
    CUT,
    LEAST_SECONDS,
    REPORT_SECONDS,
    ArmPlan,
    ComparisonPlan,
    Source,
    find_run,
    finetune_settings,
    fits,
    head_settings,
    is_cut,
    list_wanted,
    read_checkpoint,
    say_time,
)
from featcache.stages.train_head import train_head
from featcache.storage import Place

LEAST_SHARE = 0.5  # of the time that there is now: a run that was cut short before with less is made anew


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


def check_budget_alone(clock: Clock) -> None:
    """Raise a SettingsError if the report alone takes longer."""
    if not clock.suffices(0.0):
        raise SettingsError(
            f"--budget is {clock.limit:g} s: expected {2 * REPORT_SECONDS:.0f} s or more, as the start and the report "
            f"alone take that long"
        )


def check_budget(plan: ComparisonPlan, clock: Clock) -> None:
    """Raise a SettingsError if what cannot be cut short takes longer than there is time."""
    left = clock.find_left()
    if left is None:
        return
    if (least := plan.find_least()) > left + REPORT_SECONDS:
        gone = time.perf_counter() - clock.started
        raise SettingsError(
            f"--budget is {plan.budget:g} s, of which {gone:.0f} s are gone, and {least:.0f} s are needed at least for "
            f"extraction, heads, first steps and the report: expected --budget {math.ceil(gone + least) + 2}s or more"
        )


def extract_all(data: Path | str, plan: ComparisonPlan, progress: Progress) -> dict[Place, Extraction]:
    """The features that the arms learn from, by their file; views are added to rows that are there."""
    extractions: dict[Place, Extraction] = {}
    sources: dict[Place, Source] = {arm.source.path: arm.source for arm in plan.arms}
    for path, source in sorted(sources.items(), key=lambda item: "views" in item[1].settings):
        settings = dict(source.settings)
        if "views" in settings and extractions:
            wanted = settings.get("backbone")
            settings["reuse"] = tuple(
                str(done) for done in extractions if sources[done].settings.get("backbone") == wanted and done != path
            )
        extractions[path] = extract_features(data, path, progress=progress, **settings)
    return extractions


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one arm, one a seed."""

    name: str
    runs: list[Path]


@dataclass(frozen=True)
class ArmRunner:
    """Makes what is missing of the runs that a plan wants.

    Attributes
    ----------
    data
        The folder of images.
    plan, config
        What is wanted.
    extractions
        The features of every source.
    clock
        What may be left out for lack of time.
    progress
        Told of every run.
    """

    data: Path | str
    plan: ComparisonPlan
    extractions: Mapping[Place, Extraction]
    config: CompareConfig
    clock: Clock
    progress: Progress

    @cached_property
    def described(self) -> dict[Place, dict[str, Any]]:
        """The images of every source, as records have them."""
        return {path: describe_data(extraction.cache.listing) for path, extraction in self.extractions.items()}

    def run_all(self) -> list[Group]:
        """Every arm with every seed.

        First one seed of each, heads before networks, so that a budget leaves no arm out; further seeds as far as whole
        ones fit.
        """
        groups = {arm.name: Group(name=arm.name, runs=[]) for arm in self.plan.arms}
        order = sorted(self.plan.arms, key=lambda arm: arm.kind != "head")
        for number in range(self.plan.seeds):
            for i, arm in enumerate(order):
                runs = groups[arm.name].runs
                waiting = 1 if number else sum(other.kind == "finetune" for other in order[i:])
                run = self.provide(arm, number, needed=find_needed(runs[0]) if number else 0.0, waiting=waiting)
                if run is not None:
                    runs.append(run)
        return [groups[arm.name] for arm in self.plan.arms]

    def provide(self, arm: ArmPlan, number: int, *, needed: float, waiting: int) -> Path | None:
        """The run of a seed: the one that lies there if it fits, else a new one; None if there is no time for another.

        Parameters
        ----------
        needed
            Seconds that it takes if it must not be cut short.
        waiting
            Fine-tunings, with this one, among which the time that is left is shared.
        """
        extraction, data = self.extractions[arm.source.path], self.described[arm.source.path]
        found = find_run(arm, number, self.config, data, extraction.cache.extractor)
        if found is None and arm.kind == "finetune" and not number:
            found = self.find_cut(arm, waiting)
        if found is not None:
            self.progress.say(f"{arm.name}: {found} is reused")
            return found
        if number and not self.clock.suffices(needed):
            return None
        folder = arm.name_folder(Path(self.config.runs), number)
        if arm.kind == "head":
            self.progress.say(f"{folder.name}: training on the cached features")
            settings = head_settings(arm, number, self.config)
            return train_head(extraction.path, folder, progress=self.progress, **settings).folder
        return self.finetune(arm, number, folder, extraction, waiting)

    def finetune(self, arm: ArmPlan, number: int, folder: Path, extraction: Extraction, waiting: int) -> Path | None:
        """Make a fine-tuning run. One that the budget cuts short is set aside; of further seeds it is not wanted."""
        settings = finetune_settings(arm, number, self.config) | {"features": str(extraction.path)}
        cut, left = name_cut(folder), self.clock.find_left()
        if left is not None:
            check_cut(folder, cut)
            settings["time_budget"] = max(left / waiting, LEAST_SECONDS) + find_spent(folder)
        if is_run(folder) and is_cut(read_record(folder)):  # killed before it was set aside
            shutil.rmtree(folder)
        self.progress.say(f"{folder.name}: fine-tuning")
        run = finetune(self.data, folder, progress=self.progress, budget_of=BUDGET_OF, **settings)
        if not is_cut(run.record):
            return run.folder
        if number:
            shutil.rmtree(folder)
            return None
        if cut.exists():
            shutil.rmtree(cut)
        folder.rename(cut)
        return cut

    def find_cut(self, arm: ArmPlan, waiting: int) -> Path | None:
        """What an earlier budget has left of a first run, if this one would hardly leave more."""
        cut, left = name_cut(arm.name_folder(Path(self.config.runs), 0)), self.clock.find_left()
        if left is None or not is_run(cut):
            return None
        record, wanted = read_record(cut), list_wanted(arm, 0, self.config)
        data, extractor = self.described[arm.source.path], self.extractions[arm.source.path].cache.extractor
        same = is_cut(record) and fits(record, wanted, arm.kind, data, extractor)
        return cut if same and record.settings["time_budget"] >= LEAST_SHARE * left / waiting else None


def find_needed(first: Path) -> float:
    """Seconds that another seed takes, from the first one's run; no time suffices where that was cut short itself."""
    record = read_record(first)
    if is_cut(record):
        return math.inf
    return float(record.seconds["total"] - record.seconds.get("extraction", 0.0))


def name_cut(folder: Path) -> Path:
    """Where a run is put that a budget has cut short."""
    return folder.with_name(folder.name + CUT)


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


def find_spent(folder: Path) -> float:
    """Seconds that an interrupted run has spent already; they count for its own budget, and not for this one."""
    found = read_checkpoint(folder)
    return 0.0 if found is None else float(found["more"]["seconds"])


def say_left_out(groups: list[Group], plan: ComparisonPlan) -> tuple[str, ...]:
    """Remarks about seeds for which the budget did not suffice."""
    budget = say_time(plan.budget or 0.0)
    return tuple(
        f"The budget of {budget} sufficed for {len(group.runs)} of {plan.seeds} seeds of {group.name}."
        for group in groups
        if len(group.runs) < plan.seeds
    )
