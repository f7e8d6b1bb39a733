#!/usr/bin/env python
"""Calculate a comparison anew from its runs' predictions with scipy's own tests, and see whether it says the same.

    python scripts/check_verdict.py runs/compare

Nothing of featcache is used: the predictions are read from the CSV files that compare.json names. Wilson's intervals
and exact McNemar tests are scipy's binomtest; several seeds go through scipy's permutation_test, and Howe's test is
written out here, as is Holm's correction; the interval of a difference is that of scipy's bootstrap.
Exit code 1 if a number or a claim differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FILES = {"val": "predictions.csv", "test": "predictions_test.csv"}
MONTE_CARLO = 20_000

Rights = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--root", type=Path, default=Path(), help="The folder that the runs' paths are relative to.")
    given = parser.parse_args()
    summary = json.loads((given.comparison / "compare.json").read_text())
    split = summary["reported"]["split"]
    rights = {
        arm["name"]: np.array([read_rights(given.root / run["run"] / FILES[split]) for run in arm["runs"]])
        for arm in summary["arms"]
    }
    bad = [line for arm in summary["arms"] for line in check_arm(arm, rights[arm["name"]])]
    p_values = []
    for pair in summary["pairs"]:
        wrong, p_value = check_pair(pair, rights[pair["first"]], rights[pair["second"]])
        bad += wrong
        p_values.append(p_value)
    for pair, adjusted in zip(summary["pairs"], holm(p_values), strict=True):
        better = "none"
        if adjusted < summary["significance"] and not pair["flattered"]:
            better = "first" if pair["difference"] > 0 else "second"
        bad += check(f"claim about {pair['first']} and {pair['second']}", pair["claim"], better)
        bad += check("Holm-adjusted p", pair["p_adjusted"], adjusted, 0.02)
    claims = any(pair["claim"] != "none" for pair in summary["pairs"])
    bad += check("the verdict claims a winner", "is better than" in summary["verdict"], claims)
    print(summary["verdict"])
    sys.exit("\n".join(bad) if bad else 0)


def read_rights(path: Path) -> Rights:
    """(N,) whether each image is right, in the order of the paths."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    return np.array([row["label"] == row["prediction"] for row in rows])


def check_arm(arm: dict[str, Any], rights: Rights) -> list[str]:
    share, n = rights.mean(), rights.shape[1]
    wilson = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    spread = rights.mean(axis=1).std(ddof=1) if len(rights) > 1 else None
    return [
        *check(f"{arm['name']}: accuracy", arm["accuracy"], share),
        *check(f"{arm['name']}: interval", arm["interval"], [wilson.low, wilson.high]),
        *check(f"{arm['name']}: spread over seeds", arm["seed_spread"], spread),
    ]


def check_pair(pair: dict[str, Any], first: Rights, second: Rights) -> tuple[list[str], float]:
    what, bad = f"{pair['first']} - {pair['second']}", []
    for told, a, b in zip(pair["mcnemar"], first, second, strict=False):
        only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
        p = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
        bad += check(f"{what}: McNemar, seed {told['seeds']}", told["p_value"], p)
        bad += check(
            f"{what}: counts", [told["only_first_right"], told["only_second_right"]], [only_first, only_second]
        )
    differences = first.mean(axis=0) - second.mean(axis=0)
    permuted = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=MONTE_CARLO,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).pvalue
    bad += check(f"{what}: permutation test", pair["p_images"], permuted, 0.02)
    p_value = float(pair["p_images"])
    if len(first) > 1 or len(second) > 1:
        p_seeds = test_seeds(first, second)
        bad += check(f"{what}: images and seeds", pair["p_seeds"], p_seeds, 1e-6)
        p_value = max(p_value, p_seeds)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=MONTE_CARLO, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    bad += check(f"{what}: bootstrap interval", pair["interval"], [interval.low, interval.high], 0.004)
    bad += check(f"{what}: difference", pair["difference"], differences.mean())
    print(f"{what}: p = {p_value:.4f} (permutation {permuted:.4f}), interval {interval.low:.4f} to {interval.high:.4f}")
    return bad, p_value


def test_seeds(first: Rights, second: Rights) -> float:
    """Howe's test: the p-value at which squared t-quantiles, times variances, add up to the squared difference."""
    parts = [(stats.sem(first.mean(axis=0) - second.mean(axis=0)) ** 2, first.shape[1] - 1)]
    for way in (first, second):
        seeds, images = way.shape
        if seeds == 1:
            continue
        variance = stats.sem(way.mean(axis=1)) ** 2
        if seeds > 2:
            residual = way - way.mean(axis=0) - way.mean(axis=1)[:, None] + way.mean()
            answers = (residual**2).sum() / (seeds - 1) / (images - 1) / way.size
            variance = max(variance - answers, variance / 2)
        parts.append((variance, seeds - 1))
    squared = (first.mean() - second.mean()) ** 2
    if not sum(variance for variance, _ in parts):
        return float(not squared)
    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        margin = sum(variance * stats.t.isf(p / 2, degrees) ** 2 for variance, degrees in parts)
        low, high = (p, high) if margin > squared else (low, p)
    return high


def holm(p_values: list[float]) -> list[float]:
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def check(what: str, found: Any, expected: Any, tolerance: float = 1e-9) -> list[str]:
    """A line if two values differ."""
    if found is None or expected is None or isinstance(found, str | bool):
        same = found == expected
    else:
        same = bool(np.allclose(found, expected, rtol=0, atol=tolerance))
    return [] if same else [f"{what}: {found}, expected {expected}"]


if __name__ == "__main__":
    main()
