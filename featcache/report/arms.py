"""Runs -> numbers: each way to a classifier with its accuracy and its cost, and what sets every two of them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import is_imported
from featcache.evidence import SIGNIFICANCE, Evidence, claim, weigh
from featcache.metrics import measure_probabilities, wilson_interval
from featcache.report.verdict import join_words, state_grounds, state_verdict
from featcache.runs import Predictions, RunRecord
from featcache.wording import format_seconds

SCHEMA = 2
NO_STAGES = ("total", "per_epoch", "draws", "curve")  # of a record's seconds: sums, and what was found out beside it
HEADS = (1, 10, 100)
UNEVEN = 2.0  # times as long as the fastest the slowest seed takes, from which that is said
WIDE = 0.05  # standard deviation over seeds from which they are said to differ widely


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One training of a way.

    Attributes
    ----------
    run
        Its folder, as it was named.
    record
        What it was.
    predictions
        By split, sorted by path.
    """

    run: str
    record: RunRecord
    predictions: Mapping[str, Predictions]

    @property
    def seed(self) -> int:
        """What its training was seeded with."""
        return int(self.record.settings.get("seed", 0))

    def measure(self, split: str) -> dict[str, float]:
        """What its probabilities are worth; runs before that was measured know it not."""
        known = self.record.accuracy[split]
        if "calibration_error" in known:
            return {name: value for name, value in known.items() if name not in ("n", "correct", "accuracy")}
        predictions = self.predictions[split]
        return measure_probabilities(predictions.labels, predictions.probabilities)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a classifier, trained with one seed or several."""

    name: str
    runs: tuple[SeedRun, ...]

    @property
    def record(self) -> RunRecord:
        """Of the first seed."""
        return self.runs[0].record

    def find_rights(self, split: str) -> NDArray[np.bool_]:
        """(S, N): whether the classifier of each seed is right about each image."""
        predictions = [run.predictions[split] for run in self.runs]
        return np.stack([one.labels == one.predicted for one in predictions])

    def is_cut_short(self) -> bool:
        """Whether a time budget ended the training of a seed before all its epochs."""
        return any("time_budget" in run.record.settings for run in self.runs)

    def is_optimistic(self, split: str) -> bool:
        """Whether the images that are reported had a say in what was kept."""
        if split != "val":
            return False
        record = self.record
        return record.settings.get("select_on") == "val" or bool(record.details.get("optimistic"))


def choose_split(arms: Sequence[Arm]) -> str:
    """Which images are reported: the test split's where all have one, else the validation split's."""
    return "test" if all("test" in run.predictions for arm in arms for run in arm.runs) else "val"


def summarise(
    arms: Sequence[Arm], *, remarks: Sequence[str] = (), command: str = "", created: str = ""
) -> dict[str, Any]:
    """The whole comparison as plain JSON values; see docs/json.md.

    Parameters
    ----------
    arms
        In the order in which they are told of.
    remarks
        What the user should know that is not in the runs.
    command
        What makes it again.
    created
        When, in ISO 8601.
    """
    split, record = choose_split(arms), arms[0].record
    numbers, pairs = [describe_arm(arm, split) for arm in arms], describe_pairs(arms, split)
    return {
        "schema": SCHEMA,
        "kind": "comparison",
        "verdict": state_verdict(numbers, pairs),
        "grounds": state_grounds(numbers, pairs),
        "created": created,
        "command": command,
        "data": record.data,
        "reported": {"split": split, "images": numbers[0]["images"]},
        "significance": SIGNIFICANCE,
        "arms": numbers,
        "pairs": pairs,
        "amortised": amortise(numbers),
        "remarks": [*remarks, *list_remarks(arms, split)],
        "environment": record.environment,
    }


def describe_arm(arm: Arm, split: str = "val") -> dict[str, Any]:
    """An arm's numbers as plain JSON values."""
    record, rights = arm.record, arm.find_rights(split)
    shares, n = rights.mean(axis=1).tolist(), rights.shape[1]
    other = "val" if split == "test" else "test"
    others = [run.record.accuracy[other]["accuracy"] for run in arm.runs if other in run.record.accuracy]
    return {
        "name": arm.name,
        "kind": record.kind,
        "title": record.title,
        "backbone": record.extractor["backbone"],
        "accuracy": fmean(shares),
        "images": n,
        "interval": list(wilson_interval(round(fmean(shares) * n), n)),
        "seed_spread": stdev(shares) if len(shares) > 1 else None,
        f"{other}_accuracy": fmean(others) if others else None,
        "measures": average([run.measure(split) for run in arm.runs]),
        "runs": [
            {
                "run": run.run,
                "seed": run.seed,
                "accuracy": share,
                "correct": int(right.sum()),
                "seconds": run.record.seconds["total"],
            }
            for run, share, right in zip(arm.runs, shares, rights, strict=True)
        ],
        "cost": describe_cost(arm),
        "selection": record.selection,
        "optimistic": arm.is_optimistic(split),
        "cut_short": arm.is_cut_short(),
        "notes": list(dict.fromkeys(note for run in arm.runs for note in run.record.notes)),
    }


def describe_cost(arm: Arm) -> dict[str, Any]:
    """What one classifier costs this way: the mean over seeds, of memory the largest. Null is what nobody measured."""
    records = [run.record for run in arm.runs]
    cpu = [record.cpu_seconds for record in records if record.cpu_seconds]
    return {
        "seconds": list_stages([record.seconds for record in records]),
        "cpu_seconds": list_stages(cpu) if len(cpu) == len(records) else None,
        "seconds_per_epoch": mean_known(record.seconds.get("per_epoch") for record in records),
        "peak_memory_bytes": max((record.peak_memory_bytes or 0 for record in records), default=0) or None,
        "images_per_second": mean_known(record.details.get("images_per_second") for record in records),
        "trainable_parameters": arm.record.parameters["trainable"],
        "flops": mean_known(record.details.get("flops") for record in records),
        "energy_joules": mean_known(record.energy_joules for record in records),
        "result_bytes": arm.record.result_bytes,
    }


def list_stages(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of each stage, and of all together."""
    return average(seconds, skip=NO_STAGES) | {"total": fmean(one["total"] for one in seconds)}


def average(values: Sequence[Mapping[str, float]], *, skip: Sequence[str] = ()) -> dict[str, float]:
    """Means by name."""
    return {name: fmean(one.get(name, 0.0) for one in values) for name in values[0] if name not in skip}


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean, if all are known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def amortise(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Total seconds of several classifiers of each way on the same images: features are extracted once for all."""
    return [
        {
            "heads": n,
            "seconds": {
                arm["name"]: (seconds := arm["cost"]["seconds"]).get("extraction", 0.0)
                + n * (seconds["total"] - seconds.get("extraction", 0.0))
                for arm in arms
            },
        }
        for n in HEADS
    ]


def describe_pairs(arms: Sequence[Arm], split: str = "val") -> list[dict[str, Any]]:
    """What sets every two arms apart, with p-values adjusted for the number of pairs."""
    pairs = list(combinations(arms, 2))
    level = SIGNIFICANCE / max(len(pairs), 1)
    evidence = [weigh(a.find_rights(split), b.find_rights(split), alpha=level) for a, b in pairs]
    return [
        describe_pair(first, second, one, better, p_adjusted, split)
        for (first, second), one, (better, p_adjusted) in zip(pairs, evidence, claim(evidence), strict=True)
    ]


def describe_pair(
    first: Arm, second: Arm, evidence: Evidence, better: str, p_adjusted: float, split: str = "val"
) -> dict[str, Any]:
    """Two arms as plain JSON values. An arm that was chosen on these images is never claimed to be better."""
    winner = {"first": first, "second": second}.get(better)
    flattered = winner is not None and winner.is_optimistic(split)
    return {
        "first": first.name,
        "second": second.name,
        "difference": evidence.difference,
        "interval": list(evidence.interval),
        "interval_with_seeds": evidence.interval_with_seeds and list(evidence.interval_with_seeds),
        "mcnemar": [
            {"seeds": [one.seed, other.seed], "only_first_right": a, "only_second_right": b, "p_value": p}
            for one, other, (a, b, p) in zip(first.runs, second.runs, evidence.mcnemar, strict=False)
        ],
        "p_images": evidence.p_images,
        "p_seeds": evidence.p_seeds,
        "p_value": evidence.p_value,
        "p_adjusted": p_adjusted,
        "detectable_difference": evidence.detectable,
        "claim": "none" if flattered else better,
        "flattered": flattered,
    }


def list_remarks(arms: Sequence[Arm], split: str) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    remarks = [
        f"{arm.name} was chosen on the very images that are reported: its accuracy is optimistic."
        for arm in arms
        if arm.is_optimistic(split)
    ]
    remarks += [
        f"A time budget cut {arm.name} short: what it could have reached is not known."
        for arm in arms
        if arm.is_cut_short()
    ]
    if imported := [arm.name for arm in arms if is_imported(arm.record.extractor["backbone"])]:
        remarks.append(f"What it cost to make the features of {join_words(imported)} is not known and not counted.")
    counts = {arm.name: len(arm.runs) for arm in arms}
    if set(counts.values()) == {1} and any(arm.record.kind == "finetune" for arm in arms):
        remarks.append("One seed each: these classifiers are compared, not ways to make them; --seeds 3 trains more.")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        alone = " Where one has a single seed, the first ones alone are tested." if min(counts.values()) == 1 else ""
        remarks.append(f"Not all have the same number of seeds ({told}).{alone}")
    remarks += [
        f"The seeds of {arm.name} differ widely (± {100 * spread:.0f} points): its mean, and tests of it, say little."
        for arm in arms
        if len(arm.runs) > 1 and (spread := stdev(arm.find_rights(split).mean(axis=1).tolist())) > WIDE
    ]
    records = [run.record for arm in arms for run in arm.runs]
    for arm in arms:
        seconds = [run.record.seconds["total"] for run in arm.runs]
        if max(seconds) > UNEVEN * min(seconds):
            told = f"{format_seconds(min(seconds))} to {format_seconds(max(seconds))}"
            remarks.append(
                f"The seeds of {arm.name} took {told}: the machine was busy with other things, or is uneven."
            )
    devices = sorted({record.device for record in records})
    machines = {(record.environment.get("platform"), record.environment.get("cores")) for record in records}
    if len(devices) > 1 or len(machines) > 1:
        remarks.append(f"Not all ran on the same machine ({', '.join(devices)}): seconds do not compare.")
    return remarks
