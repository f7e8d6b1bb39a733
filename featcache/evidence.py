"""How sure it is that one way is better than another: paired tests, an interval, what could have been shown at all.

Rights and wrongs of two ways on the same images -> numbers, and what they allow to claim. numpy and scipy only, no
files and no words.

Two sources of chance are kept apart. The images are a sample: other photographs would have given other accuracies. And
training has a seed: the same way, trained again, gives another classifier. With one seed each, what is compared is two
classifiers; with several, two ways to make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.signal import fftconvolve
from scipy.stats import binom, norm, t

from featcache.metrics import adjust_holm, mcnemar_test

SIGNIFICANCE = 0.05
POWER = 0.8
RESAMPLES = 10_000
MOST_SIZES = 100  # kinds of differences between images up to which the sign-flip test is exact
MOST_DIRECT = 20_000  # terms up to which distributions are convolved without Fourier transforms

Rights = NDArray[np.bool_]  # (S, N): whether the classifier of each of S seeds is right about each of N images


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What N images say of two ways.

    Attributes
    ----------
    difference
        Accuracy of the first minus that of the second, the means over seeds.
    interval
        Of that difference, 95 %, for the sampling of the images: paired bootstrap.
    interval_with_seeds
        The same for the chance of images and seeds together; None where p_seeds is.
    mcnemar
        For the first seeds, the second ones, and so on: images that only the first, and only the second, gets right,
        and the exact test.
    p_images
        Whether images alone explain the difference: `sign_flip_test`, of one seed each the exact McNemar test.
    p_seeds
        Whether images and seeds together do: `mixed_test`. None where neither has several seeds.
    p_value
        The larger of both: what decides.
    detectable
        The smallest difference that so many images would have shown with a probability of 80 %; None if there is none.
    """

    difference: float
    interval: tuple[float, float]
    interval_with_seeds: tuple[float, float] | None
    mcnemar: tuple[tuple[int, int, float], ...]
    p_images: float
    p_seeds: float | None
    p_value: float
    detectable: float | None


def weigh(first: Rights, second: Rights, *, alpha: float = SIGNIFICANCE) -> Evidence:
    """Compare two ways on the same N images.

    Parameters
    ----------
    first, second
        (S, N) and (T, N): whether the classifier of each seed is right about each image. Where one has a single seed,
        the first ones are compared.
    alpha
        The level for `Evidence.detectable`: smaller where the test is one of several.
    """
    if min(len(first), len(second)) == 1:  # of one side nothing is known of seeds: two classifiers are compared
        first, second = first[:1], second[:1]
    scores = score_images(first, second)
    p_images, p_seeds = sign_flip_test(scores), mixed_test(first, second)
    n_units = len(first) * len(second)
    difference = float(first.mean() - second.mean())
    margin = None if p_seeds is None else find_margin(list_variances(first, second), 0.05)
    return Evidence(
        difference=difference,
        interval=bootstrap_interval(scores / n_units),
        interval_with_seeds=None if margin is None else (max(difference - margin, -1.0), min(difference + margin, 1.0)),
        mcnemar=tuple(mcnemar_test(a, b) for a, b in zip(first, second, strict=False)),
        p_images=p_images,
        p_seeds=p_seeds,
        p_value=p_images if p_seeds is None else max(p_images, p_seeds),
        detectable=find_detectable(first, second, alpha=alpha),
    )


def claim(evidence: Sequence[Evidence], *, alpha: float = SIGNIFICANCE) -> list[tuple[str, float]]:
    """What may be claimed of several pairs together: "first" or "second" is better, or "none"; the adjusted p-value.

    That any claim of a "better" is false, where no two ways differ, has at most the probability `alpha` (Holm).
    """
    claims = []
    for one, p_value in zip(evidence, adjust_holm([one.p_value for one in evidence]), strict=True):
        better = "first" if one.difference > 0 else "second"
        claims.append((better if p_value < alpha and one.difference else "none", p_value))
    return claims


def score_images(first: Rights, second: Rights) -> NDArray[np.int64]:
    """(N,): by how much the first way is righter about each image than the second, in units of 1 / (S T)."""
    first_count, second_count = first.sum(axis=0, dtype=np.int64), second.sum(axis=0, dtype=np.int64)
    scores: NDArray[np.int64] = len(second) * first_count - len(first) * second_count
    return scores


def sign_flip_test(scores: NDArray[np.int64]) -> float:
    """Exact two-sided paired test: were each image's difference as likely of either sign, how often so far from zero.

    Scores (N,) of 1, 0 and -1 make it the exact McNemar test.

    Source: R. A. Fisher, The design of experiments, 1935, section 21; E. S. Edgington and P. Onghena, Randomization
    tests, 2007, chapter 6.

    >>> round(sign_flip_test(np.array([1] * 4 + [-1] * 6)), 8)
    0.75390625
    """
    unit = gcd(*(int(size) for size in np.unique(np.abs(scores)))) or 1
    sizes, counts = np.unique(np.abs(scores[scores != 0]) // unit, return_counts=True)
    if len(sizes) > MOST_SIZES:  # very many seeds: sums of so many kinds of terms are normal
        spread = np.sqrt(np.sum(np.square(scores, dtype=np.float64)))
        return float(min(1.0, 2 * norm.sf((abs(float(scores.sum())) - unit) / spread)))
    chances = np.ones(1)
    for size, n in zip(sizes.tolist(), counts.tolist(), strict=True):
        steps = np.zeros(2 * n * size + 1)  # the sum of n terms of +size or -size, from the least on
        steps[:: 2 * size] = binom.pmf(np.arange(n + 1), n, 0.5)
        direct = min(len(chances), len(steps)) * max(len(chances), len(steps)) < MOST_DIRECT**2
        chances = np.convolve(chances, steps) if direct else np.maximum(fftconvolve(chances, steps), 0)
    middle, observed = len(chances) // 2, abs(int(scores.sum())) // unit
    if not observed:
        return 1.0
    return float(min(1.0, 2 * chances[middle + observed :].sum()))


def mixed_test(first: Rights, second: Rights) -> float | None:
    """Two-sided test of the difference of two ways against the chance of images and of seeds together.

    The p-value is the one at which the t-quantiles of images and of each way's seeds, times their standard errors,
    squared and added up, are the difference squared. With few seeds their quantile is large: three say little of how
    much training varies. Whatever the proportions of the variances, a level of 5 % is kept to 5.4 %, mostly to less, as
    long as seeds vary evenly to both sides; where they differ by ten points near 100 %, it is not (docs/compare.md).

    Source: W. G. Howe, Approximate confidence limits on the mean of X + Y where X and Y are two tabled independent
    random variables, JASA 69 (1974); images and readers that both vary as in B. D. Gallas et al., Multireader multicase
    variance analysis for binary data, JOSA A 24 (2007).

    Returns
    -------
    None if neither way has several seeds.
    """
    if len(first) < 2 and len(second) < 2:
        return None
    parts, difference = list_variances(first, second), abs(float(first.mean() - second.mean()))
    if not any(variance for variance, _ in parts):
        return 0.0 if difference else 1.0

    def surplus(log_p: float) -> float:
        return find_margin(parts, float(np.exp(log_p))) - difference

    least = -200.0  # so that no quantile overflows
    return float(np.exp(brentq(surplus, least, 0.0))) if surplus(least) > 0 else 0.0


def find_margin(parts: Sequence[tuple[float, int]], alpha: float) -> float:
    """How large a difference is whose p-value is alpha, from variances and their degrees of freedom."""
    return float(np.sqrt(sum(variance * t.isf(alpha / 2, degrees) ** 2 for variance, degrees in parts if variance)))


def list_variances(first: Rights, second: Rights) -> list[tuple[float, int]]:
    """The variances that images, and each way's seeds, give the difference, each with its degrees of freedom.

    What single answers vary by is in the variance over images already, and is taken out of that over seeds: of three
    seeds and more, and not more than half of it, as the rest is uncertain itself.
    """
    differences = first.mean(axis=0) - second.mean(axis=0)
    n = len(differences)
    parts = [(float(np.var(differences, ddof=1)) / n if n > 1 else 0.0, max(n - 1, 1))]
    for rights in (first, second):
        n_seeds = len(rights)
        if n_seeds > 1:
            variance = float(np.var(rights.mean(axis=1), ddof=1)) / n_seeds
            if n_seeds > 2 and n > 1:
                variance = max(variance - find_answers_variance(rights), variance / 2)
            parts.append((variance, n_seeds - 1))
    return parts


def find_answers_variance(rights: Rights) -> float:
    """The variance of the mean over S seeds and N images that comes from neither, but from single answers (S, N)."""
    degrees = (len(rights) - 1) * (len(rights[0]) - 1)
    left = rights - rights.mean(axis=0) - rights.mean(axis=1, keepdims=True) + rights.mean()
    return float(np.sum(left**2)) / degrees / rights.size


def bootstrap_interval(differences: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of paired differences (N,): percentiles over resampled images.

    Which image is drawn how often matters only through its difference, so that the counts of equal differences are
    drawn, from their multinomial distribution.

    Source: B. Efron and R. J. Tibshirani, An introduction to the bootstrap, 1993, chapter 13.
    """
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, RESAMPLES)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn @ values / n, (tail, 100 - tail))
    return float(low), float(high)


def find_detectable(
    first: Rights, second: Rights, *, alpha: float = SIGNIFICANCE, power: float = POWER
) -> float | None:
    """The smallest difference between two ways that the test would find with this power on so many images.

    With one seed each, that of the exact McNemar test where the two disagree about as many images as these do. With
    several, that of `mixed_test` with the variances that images and seeds have here.

    Source: R. J. Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43
    (1987).
    """
    n = first.shape[1]
    if len(first) > 1 or len(second) > 1:
        parts = list_variances(first, second)
        if variance := sum(variance for variance, _ in parts):
            found = find_margin(parts, alpha) + float(norm.ppf(power) * np.sqrt(variance))
            return found if found < 1 else None
    discordance = float(np.mean([np.mean(a != b) for a in first for b in second]))
    if mcnemar_power(n, 1.0, 1.0, alpha=alpha) < power:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        enough = mcnemar_power(n, middle, max(discordance, middle), alpha=alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def mcnemar_power(n: int, difference: float, discordance: float, *, alpha: float = SIGNIFICANCE) -> float:
    """The probability that the exact McNemar test has a p-value below `alpha`.

    Parameters
    ----------
    n
        Images.
    difference
        Between the two accuracies.
    discordance
        Share of the images that exactly one of the two gets right; at least the difference.
    """
    spread = 8 * np.sqrt(n * discordance * (1 - discordance)) + 1
    disagreeing = np.arange(max(0, int(n * discordance - spread)), min(n, int(n * discordance + spread)) + 1)
    disagreeing = disagreeing[disagreeing > 0]
    if not len(disagreeing):
        return 0.0
    # The largest count of the rarer kind that is still significant: 2 P(X <= k) < alpha.
    critical = binom.ppf(alpha / 2, disagreeing, 0.5)
    critical = np.where(2 * binom.cdf(critical, disagreeing, 0.5) < alpha, critical, critical - 1)
    share = (1 + difference / discordance) / 2
    rejected = binom.cdf(critical, disagreeing, share) + binom.sf(disagreeing - critical - 1, disagreeing, share)
    return float(np.sum(binom.pmf(disagreeing, n, discordance) * np.where(critical >= 0, rejected, 0.0)))
