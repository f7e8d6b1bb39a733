"""featcache.evidence: against scipy's own tests, by simulation, and against theory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from featcache.evidence import (
    Evidence,
    bootstrap_interval,
    claim,
    find_detectable,
    mcnemar_power,
    mixed_test,
    score_images,
    sign_flip_test,
    weigh,
)

N_EXPERIMENTS = 3_000


def draw(
    rng: np.random.Generator,
    n: int,
    accuracies: tuple[float, float],
    *,
    seeds: tuple[int, int] = (1, 1),
    seed_spread: float = 0.0,
    agreement: float = 0.6,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two ways on N images: hard images are hard for both (`agreement`), and each seed has an accuracy of its own."""
    shared = rng.standard_normal(n)
    both = []
    for accuracy, n_seeds in zip(accuracies, seeds, strict=True):
        own = rng.standard_normal((n_seeds, n))
        skill = stats.norm.ppf(accuracy) + seed_spread * rng.standard_normal((n_seeds, 1))
        # so that the accuracy over seeds and images is what was asked for
        scale = np.sqrt(1 + seed_spread**2) if seed_spread else 1.0
        both.append(np.sqrt(agreement) * shared + np.sqrt(1 - agreement) * own < skill * scale)
    return both[0], both[1]


# --- the tests against others -----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=60))
def test_of_one_seed_the_test_is_the_exact_mcnemar_test(scores: list[int]) -> None:
    only_first, only_second = scores.count(1), scores.count(-1)
    n = only_first + only_second
    expected = stats.binomtest(only_first, n).pvalue if n else 1.0
    assert sign_flip_test(np.array(scores)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=11))
def test_of_several_seeds_it_is_the_permutation_test_of_scipy(scores: list[int]) -> None:
    values = np.array(scores)
    expected = stats.permutation_test(
        (values.astype(float), np.zeros(len(values))),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert sign_flip_test(values) == pytest.approx(expected, rel=1e-9)


def test_fifty_thousand_images_are_tested_exactly_and_at_once() -> None:
    rng = np.random.default_rng(0)
    scores = rng.choice([-3, -2, -1, 0, 1, 2, 3], 50_000, p=[0.02, 0.02, 0.06, 0.8, 0.06, 0.02, 0.02])
    expected = 2 * stats.norm.sf(abs(scores.sum()) / np.sqrt(np.square(scores).sum()))
    assert sign_flip_test(scores) == pytest.approx(expected, rel=0.02)


def test_the_test_does_not_depend_on_who_comes_first() -> None:
    first, second = draw(np.random.default_rng(1), 200, (0.9, 0.8), seeds=(3, 2))
    one, other = weigh(first, second), weigh(second, first)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.difference == pytest.approx(-other.difference)
    assert one.detectable == pytest.approx(other.detectable)
    assert [row[:2] for row in one.mcnemar] == [row[1::-1] for row in other.mcnemar]


def test_the_bootstrap_interval_is_scipys() -> None:
    first, second = draw(np.random.default_rng(2), 300, (0.9, 0.85), seeds=(3, 3))
    differences = score_images(first, second) / 9
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert bootstrap_interval(differences) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_seeds_that_are_all_the_same_leave_the_paired_t_test() -> None:
    first, second = draw(np.random.default_rng(4), 150, (0.9, 0.8))
    repeated = mixed_test(np.repeat(first, 3, axis=0), np.repeat(second, 3, axis=0))
    expected = stats.ttest_rel(first[0].astype(float), second[0].astype(float)).pvalue
    assert repeated == pytest.approx(expected)


def test_the_interval_with_seeds_holds_zero_just_where_the_test_shows_nothing() -> None:
    rng, shown = np.random.default_rng(8), 0
    for _ in range(200):
        first, second = draw(rng, 200, (0.95, 0.88), seeds=(3, 3), seed_spread=0.1)
        evidence = weigh(first, second)
        assert evidence.interval_with_seeds is not None
        assert evidence.p_seeds is not None
        low, high = evidence.interval_with_seeds
        assert (low > 0 or high < 0) == (evidence.p_seeds < 0.05)
        shown += evidence.p_seeds < 0.05
    assert 20 < shown < 180


def test_without_a_second_seed_nothing_is_said_of_seeds() -> None:
    first, second = draw(np.random.default_rng(5), 50, (0.9, 0.8))
    assert mixed_test(first, second) is None
    assert weigh(first, second).p_seeds is None


def test_arms_that_agree_about_everything_differ_in_nothing() -> None:
    rights = np.ones((3, 20), bool)
    evidence = weigh(rights, rights)
    assert (evidence.difference, evidence.p_value, evidence.interval) == (0, 1, (0, 0))
    assert claim([evidence]) == [("none", 1.0)]


def test_where_one_way_has_a_single_seed_the_first_ones_are_compared() -> None:
    first, second = draw(np.random.default_rng(6), 100, (0.9, 0.8), seeds=(1, 5), seed_spread=0.5)
    assert weigh(first, second) == weigh(first, second[:1])
    assert weigh(second, first) == weigh(second[:1], first)


def test_very_many_seeds_are_tested_at_once() -> None:
    first, second = draw(np.random.default_rng(7), 3_000, (0.9, 0.89), seeds=(50, 49))
    scores = score_images(first, second)
    assert sign_flip_test(scores) == pytest.approx(
        2 * stats.norm.sf(abs(scores.sum()) / np.sqrt(np.square(scores, dtype=float).sum())), rel=0.01
    )


def test_a_single_image_shows_nothing() -> None:
    evidence = weigh(np.ones((2, 1), bool), np.zeros((2, 1), bool))
    assert evidence.p_value == 1.0
    assert claim([evidence])[0][0] == "none"


# --- by simulation: how often does it cry wolf? -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "accuracy", "seeds", "seed_spread"),
    [
        (153, 0.95, (1, 1), 0.0),  # the ants and bees
        (1_000, 0.8, (1, 1), 0.0),
        (153, 0.95, (3, 3), 0.0),
        (153, 0.95, (3, 3), 0.3),  # seeds that differ by four points
        (2_000, 0.8, (3, 3), 0.2),  # and many images, which then say little of other seeds
        (500, 0.9, (5, 2), 0.1),
    ],
)
def test_where_nothing_differs_it_cries_wolf_at_most_at_the_stated_rate(
    n: int, accuracy: float, seeds: tuple[int, int], seed_spread: float
) -> None:
    rng, alarms = np.random.default_rng(n), 0
    for _ in range(N_EXPERIMENTS):
        first, second = draw(rng, n, (accuracy, accuracy), seeds=seeds, seed_spread=seed_spread)
        p_value = find_p_value(first, second)
        alarms += p_value < 0.05
    assert alarms / N_EXPERIMENTS <= 0.055


def test_a_way_that_never_varies_beside_one_that_does_raises_no_more_false_alarms() -> None:
    rng, alarms, n = np.random.default_rng(12), 0, 2_000
    for _ in range(n):
        shared = rng.standard_normal(1_000)
        same = np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.standard_normal((1, 1_000)) < stats.norm.ppf(0.8)
        skill = stats.norm.ppf(0.8) * np.sqrt(1.01) + 0.1 * rng.standard_normal((3, 1))
        varying = np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.standard_normal((3, 1_000)) < skill
        alarms += find_p_value(np.repeat(same, 3, axis=0), varying) < 0.05
    assert alarms / n <= 0.055


def find_p_value(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """What decides, without what takes time beside it."""
    p_images = sign_flip_test(score_images(first, second))
    return p_images if p_images >= 0.05 else max(p_images, mixed_test(first, second) or 0.0)


def test_several_arms_that_do_not_differ_make_no_more_false_alarms_than_two() -> None:
    rng, alarms, n = np.random.default_rng(7), 0, 1_000
    for _ in range(n):
        arms = [draw(rng, 300, (0.9, 0.9))[0] for _ in range(4)]
        pairs = [
            Evidence(
                difference=float(a.mean() - b.mean()),
                interval=(0, 0),
                interval_with_seeds=None,
                mcnemar=(),
                p_images=(p_value := find_p_value(a, b)),
                p_seeds=None,
                p_value=p_value,
                detectable=None,
            )
            for i, a in enumerate(arms)
            for b in arms[i + 1 :]
        ]
        alarms += any(better != "none" for better, _ in claim(pairs))
    assert alarms / n <= 0.055


# --- and how often does it find what is there? ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "difference", "discordance"), [(153, 0.1, 0.15), (500, 0.05, 0.1), (2_000, 0.02, 0.08), (100, 0.05, 0.05)]
)
def test_true_differences_are_found_as_often_as_theory_says(n: int, difference: float, discordance: float) -> None:
    rng = np.random.default_rng(n)
    only_first, only_second = (discordance + difference) / 2, (discordance - difference) / 2
    counts = rng.multinomial(n, [only_first, only_second, 1 - discordance], N_EXPERIMENTS)
    found = np.mean(
        [sign_flip_test(np.repeat([1, -1], [a, b])) < 0.05 if a + b else False for a, b, _ in counts.tolist()]
    )
    expected = mcnemar_power(n, difference, discordance)
    assert found == pytest.approx(expected, abs=3.5 * np.sqrt(expected * (1 - expected) / N_EXPERIMENTS) + 1e-3)


def test_with_several_seeds_what_is_detectable_is_found_about_four_times_in_five() -> None:
    rng, found, expected = np.random.default_rng(9), [], []
    for _ in range(600):
        first, second = draw(rng, 400, (0.93, 0.88), seeds=(3, 3), seed_spread=0.05)
        found.append(find_p_value(first, second) < 0.05)
        detectable = find_detectable(first, second)
        assert detectable is not None
        expected.append(detectable)
    # about four times in five where the true difference is what could be detected
    assert np.mean(expected) == pytest.approx(0.05, abs=0.01)
    assert np.mean(found) == pytest.approx(0.8, abs=0.12)


def test_what_is_detectable_is_found_four_times_in_five() -> None:
    first, second = draw(np.random.default_rng(10), 153, (0.95, 0.95))
    detectable = find_detectable(first, second)
    assert detectable is not None
    discordance = max(float(np.mean(first != second)), detectable)
    assert mcnemar_power(153, detectable, discordance) == pytest.approx(0.8, abs=0.01)


def test_more_images_show_smaller_differences_and_five_show_none() -> None:
    rng = np.random.default_rng(11)
    sizes = [find_detectable(*draw(rng, n, (0.9, 0.9))) for n in (50, 500, 5_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert find_detectable(*draw(rng, 5, (0.9, 0.9))) is None  # 2 * 0.5^5 is 0.0625
