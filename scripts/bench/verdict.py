#!/usr/bin/env python
"""How often the verdict of a comparison cries wolf, and how often it finds what is there, over synthetic experiments.

    python scripts/bench/verdict.py [--experiments 4000]

Each experiment draws two ways that are right about N images with given accuracies: hard images are hard for both, every
seed has an accuracy of its own where that is said, and what `featcache compare` would claim of the two is counted. The
power that theory gives is beside it: of one seed each that of the exact McNemar test, of several that of a normal test
that knows the standard error; three seeds that have to tell it find less.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from featcache.evidence import SIGNIFICANCE, mcnemar_power, mixed_test, score_images, sign_flip_test

Rights = NDArray[np.bool_]
AGREEMENT = 0.6  # correlation of what is hard for the two
SAME = None  # of a way that is the same with every seed, as heads are
CASES = (  # images, accuracies of the two, seeds, standard deviations of a seed's accuracy (probits)
    (153, (0.95, 0.95), 1, (0.0, 0.0)),
    (153, (0.95, 0.95), 3, (0.0, 0.0)),
    (153, (0.95, 0.95), 3, (SAME, 0.3)),
    (1_000, (0.8, 0.8), 1, (0.0, 0.0)),
    (1_000, (0.8, 0.8), 2, (SAME, 0.1)),
    (1_000, (0.8, 0.8), 3, (SAME, 0.1)),
    (1_000, (0.8, 0.8), 3, (0.1, 0.1)),
    (1_000, (0.8, 0.8), 5, (0.2, 0.2)),
    (5_000, (0.9, 0.9), 3, (SAME, 0.1)),
    (1_000, (0.95, 0.95), 5, (SAME, 0.3)),
    (1_000, (0.9, 0.9), 3, (SAME, 0.5)),
    (153, (0.97, 0.9), 1, (0.0, 0.0)),
    (153, (0.97, 0.9), 3, (0.0, 0.0)),
    (1_000, (0.83, 0.8), 1, (0.0, 0.0)),
    (1_000, (0.83, 0.8), 3, (0.0, 0.0)),
    (1_000, (0.83, 0.8), 3, (SAME, 0.05)),
    (1_000, (0.83, 0.8), 10, (SAME, 0.05)),
)
SHARES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # of the images' variance: that of seeds
ANSWERS = (0.02, 0.1, 0.3, 1.0)  # and that of single answers
MANY = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    n_experiments = parser.parse_args().experiments
    print(f"{n_experiments:,} experiments a row; a difference is claimed at p < {SIGNIFICANCE}")
    print(f"{'images':>7} {'accuracies':>12} {'seeds':>5} {'seed spread':>12}   {'claimed':>8} {'expected':>9}")
    for n, accuracies, seeds, spreads in CASES:
        rng = np.random.default_rng(n)
        drawn = [draw(rng, n, accuracies, seeds, spreads) for _ in range(n_experiments)]
        claimed = float(np.mean([is_claimed(first, second) for first, second in drawn]))
        same = accuracies[0] == accuracies[1]
        expected = f"<= {SIGNIFICANCE:.1%}" if same else f"{find_power(drawn):.1%}"
        words = f"{accuracies[0]:.0%}, {accuracies[1]:.0%}"
        print(
            f"{n:>7,} {words:>12} {seeds:>5} {', '.join(map(say_spread, spreads)):>12}   {claimed:>8.1%} {expected:>9}"
        )
    print_levels()


def print_levels() -> None:
    """The most false alarms over all proportions of the variances, of normal variables: the test's own claim."""
    print(f"\nnormal variables, {len(SHARES)} x {len(ANSWERS)} proportions of variances, one way or both vary")
    print("seeds   most false alarms   by Satterthwaite's degrees of freedom instead")
    for seeds in (2, 3, 4, 5, 10):
        rng = np.random.default_rng(seeds)
        cases = [(share, answers, n) for share in SHARES for answers in ANSWERS for n in (1, 2)]
        rates = [draw_rates(rng, seeds, *case) for case in cases]
        print(f"{seeds:>5}   {max(own for own, _ in rates):>17.1%}   {max(other for _, other in rates):>12.1%}")


def draw_rates(
    rng: np.random.Generator, seeds: int, share: float, answers: float, n_varying: int
) -> tuple[float, float]:
    """How often a difference is claimed where there is none, by `mixed_test`'s rule and by Welch's."""
    n_images, degrees = 500, seeds - 1
    by_images = 1.0 + n_varying * answers
    differences = rng.normal(0, np.sqrt(by_images + n_varying * share), MANY)
    images = by_images * rng.chisquare(n_images - 1, MANY) / (n_images - 1)
    varied = [(share + answers) * rng.chisquare(degrees, MANY) / degrees for _ in range(n_varying)]
    kept = [np.maximum(one - answers, one / 2) if seeds > 2 else one for one in varied]
    quantiles = [t.isf(SIGNIFICANCE / 2, n) ** 2 for n in (n_images - 1, degrees)]
    margin = quantiles[0] * images + quantiles[1] * sum(kept)
    total = images + sum(varied)
    freedom = total**2 / (images**2 / (n_images - 1) + sum(one**2 for one in varied) / degrees)
    welch = t.isf(SIGNIFICANCE / 2, freedom) ** 2 * total
    return float(np.mean(differences**2 > margin)), float(np.mean(differences**2 > welch))


def say_spread(spread: float | None) -> str:
    return "same" if spread is SAME else f"{spread:.2f}"


def draw(
    rng: np.random.Generator,
    n: int,
    accuracies: tuple[float, float],
    seeds: int,
    spreads: tuple[float | None, float | None],
) -> tuple[Rights, Rights]:
    """(S, N) rights of each way."""
    shared, both = rng.standard_normal(n), []
    for accuracy, spread in zip(accuracies, spreads, strict=True):
        drawn, varies = (1, 0.0) if spread is SAME else (seeds, spread)
        skill = norm.ppf(accuracy) * np.sqrt(1 + varies**2) + varies * rng.standard_normal((drawn, 1))
        own = rng.standard_normal((drawn, n))
        rights = np.sqrt(AGREEMENT) * shared + np.sqrt(1 - AGREEMENT) * own < skill
        both.append(np.repeat(rights, seeds // drawn, axis=0))
    return both[0], both[1]


def is_claimed(first: Rights, second: Rights) -> bool:
    """Whether the verdict would be that one is better."""
    p_images = sign_flip_test(score_images(first, second))
    return p_images < SIGNIFICANCE and (mixed_test(first, second) or 0.0) < SIGNIFICANCE


def find_power(drawn: list[tuple[Rights, Rights]]) -> float:
    """The power that theory gives, from the true difference and discordance, or standard error."""
    differences = np.array([first.mean() - second.mean() for first, second in drawn])
    difference = abs(float(differences.mean()))
    if len(drawn[0][0]) == 1:
        discordance = float(np.mean([np.mean(first != second) for first, second in drawn]))
        return mcnemar_power(drawn[0][0].shape[1], difference, discordance)
    return float(norm.sf(norm.isf(SIGNIFICANCE / 2) - difference / differences.std()))


if __name__ == "__main__":
    main()
