"""featcache.metrics: every number against another way to get it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from featcache.metrics import (
    PowerLaw,
    adjust_holm,
    calibration_error,
    confusion_matrix,
    count_correct,
    fit_power_law,
    mcnemar_test,
    measure_probabilities,
    to_probabilities,
    wilson_interval,
)

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
QUICK = settings(deadline=None, max_examples=100, database=None)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of classes, labels (N,), predictions (N,)."""
    n_classes = draw(st.integers(2, 8))
    rows = draw(st.lists(st.tuples(st.integers(0, n_classes - 1), st.integers(0, n_classes - 1)), max_size=40))
    labels, predicted = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    return n_classes, labels, predicted


# Counting


@given(case=predictions())
@QUICK
def test_the_confusion_matrix_is_scikit_learns(case: tuple[int, np.ndarray, np.ndarray]) -> None:
    n_classes, labels, predicted = case
    ours = confusion_matrix(labels, predicted, n_classes)
    assert (ours.shape, ours.dtype) == ((n_classes, n_classes), np.int64)
    if len(labels):
        theirs = sklearn.metrics.confusion_matrix(labels, predicted, labels=list(range(n_classes)))
        assert np.array_equal(ours, theirs)
    assert ours.sum() == len(labels)
    assert np.trace(ours) == count_correct(labels, predicted)


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    assert confusion_matrix(np.array([0, 0, 0]), np.array([1, 1, 2]), 3).tolist() == [[0, 2, 1], [0, 0, 0], [0, 0, 0]]


def test_correct_predictions_are_counted() -> None:
    correct = count_correct(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2]))
    assert (correct, type(correct)) == (3, int)
    assert count_correct(np.array([], np.int64), np.array([], np.int64)) == 0


# Wilson's interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_intervals_are_the_published_ones(correct: int, n: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5.1e-5)


@given(counts=st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@QUICK
def test_the_interval_is_the_textbook_formula(counts: tuple[int, int]) -> None:
    correct, n = counts
    share, spread = correct / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = wilson_interval(correct, n)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert 0 <= low <= share <= high <= 1


@given(counts=st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@QUICK
def test_right_and_wrong_mirror_each_other(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n)
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_more_confidence_is_a_wider_interval_and_more_images_a_narrower_one() -> None:
    widths = [high - low for low, high in (wilson_interval(80, 100, confidence) for confidence in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths)
    widths = [high - low for low, high in (wilson_interval(8 * k, 10 * k) for k in (1, 10, 100))]
    assert widths == sorted(widths, reverse=True)


# McNemar's exact test


def binomial_p_value(b: int, c: int) -> float:
    """Twice the smaller tail of a fair coin, at most 1, by exact integers."""
    n, k = b + c, min(b, c)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def make_pair(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first, dtype=bool), np.array(second, dtype=bool)


@given(counts=st.tuples(*[st.integers(0, 60)] * 4))
@QUICK
def test_the_exact_test_is_a_sum_of_binomials(counts: tuple[int, int, int, int]) -> None:
    _, only_first, only_second, _ = counts
    b, c, p_value = mcnemar_test(*make_pair(*counts))
    assert (b, c) == (only_first, only_second)
    assert p_value == pytest.approx(binomial_p_value(b, c), rel=1e-9)


@pytest.mark.parametrize(
    ("counts", "expected"), [((0, 1, 9, 0), 22 / 1024), ((7, 0, 6, 2), 2 / 64), ((5, 3, 3, 5), 1.0)]
)
def test_known_p_values(counts: tuple[int, int, int, int], expected: float) -> None:
    assert mcnemar_test(*make_pair(*counts))[2] == pytest.approx(expected)


def test_two_classifiers_that_never_differ_have_a_p_value_of_one() -> None:
    assert mcnemar_test(*make_pair(10, 0, 0, 5)) == (0, 0, 1.0)
    assert mcnemar_test(*make_pair(0, 0, 0, 0)) == (0, 0, 1.0)


@given(counts=st.tuples(*[st.integers(0, 60)] * 4))
@QUICK
def test_swapping_the_classifiers_swaps_the_counts_only(counts: tuple[int, int, int, int]) -> None:
    first, second = make_pair(*counts)
    b, c, p_value = mcnemar_test(first, second)
    assert mcnemar_test(second, first) == (c, b, pytest.approx(p_value))


# Probabilities

LOGITS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**120), 2.0**120, width=32),
)


@given(logits=LOGITS)
@QUICK
def test_probabilities_sum_to_one_however_large_the_logits(logits: np.ndarray) -> None:
    probabilities = to_probabilities(logits)
    assert (probabilities.shape, probabilities.dtype) == (logits.shape, np.float64)
    assert np.isfinite(probabilities).all()
    assert (probabilities >= 0).all()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    best = np.take_along_axis(probabilities, logits.argmax(axis=1)[:, None], axis=1)
    assert (best == probabilities.max(axis=1, keepdims=True)).all()


def test_probabilities_are_those_of_the_formula() -> None:
    expected = [math.exp(x) / sum(map(math.exp, (1.0, 2.0, -0.5))) for x in (1.0, 2.0, -0.5)]
    assert to_probabilities(np.array([[1.0, 2.0, -0.5]], np.float32))[0] == pytest.approx(expected, rel=1e-12)


def test_adding_a_constant_to_the_logits_of_an_image_changes_nothing() -> None:
    logits = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]], np.float32)
    assert np.allclose(to_probabilities(logits), to_probabilities(logits + np.float32(4096)))


def test_each_image_has_its_own_probabilities() -> None:
    logits = np.array([[0.0, 0.0], [0.0, 99.0]], np.float32)
    assert to_probabilities(logits)[0].tolist() == [0.5, 0.5]
    assert to_probabilities(np.empty((0, 3), np.float32)).shape == (0, 3)


# What probabilities are worth


@st.composite
def forecasts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), of which not every class need be there, and probabilities (N, C)."""
    seed, n, n_classes = draw(st.integers(0, 10_000)), draw(st.integers(1, 60)), draw(st.integers(2, 25))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, draw(st.integers(1, n_classes)), n)
    logits = rng.normal(0, draw(st.sampled_from([0.1, 1.0, 5.0])), (n, n_classes)) + 2 * np.eye(n_classes)[labels]
    return labels, to_probabilities(logits)


@given(case=forecasts())
@QUICK
def test_measures_of_probabilities_are_those_of_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = case
    n_classes = probabilities.shape[1]
    measured, every = measure_probabilities(labels, probabilities), list(range(n_classes))
    assert measured["log_loss"] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=every))
    assert measured["brier"] == pytest.approx(np.square(probabilities - np.eye(n_classes)[labels]).sum(axis=1).mean())
    predicted = probabilities.argmax(axis=1)
    recalls = [(predicted[labels == label] == label).mean() for label in set(labels.tolist())]
    assert measured["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    if set(predicted.tolist()) <= set(labels.tolist()) and len(set(labels.tolist())) > 1:  # else it warns
        expected = sklearn.metrics.balanced_accuracy_score(labels, predicted)
        assert measured["balanced_accuracy"] == pytest.approx(expected)
    if n_classes > 10:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
        assert measured["top5_accuracy"] == pytest.approx(top5)
    else:
        assert "top5_accuracy" not in measured
    assert measured["calibration_error"] == pytest.approx(bin_plainly(predicted == labels, probabilities.max(axis=1)))


def bin_plainly(right: np.ndarray, confidence: np.ndarray, n_bins: int = 15) -> float:
    """Expected calibration error by a loop over bins."""
    error = 0.0
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = (confidence >= low) & ((confidence < high) | (i == n_bins - 1))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@given(seed=st.integers(0, 10_000), n=st.integers(1, 200), n_bins=st.sampled_from([1, 7, 15]))
@QUICK
def test_the_calibration_error_is_the_mean_over_bins(seed: int, n: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    right = rng.random(n) < confidence**2
    assert calibration_error(right, confidence, n_bins) == pytest.approx(bin_plainly(right, confidence, n_bins))


def test_known_calibration_errors() -> None:
    right = np.array([True] * 8 + [False] * 2)
    assert calibration_error(right, np.full(10, 0.8)) == pytest.approx(0)
    assert calibration_error(right, np.full(10, 1.0)) == pytest.approx(0.2)
    assert calibration_error(np.array([True, False]), np.array([1.0, 0.5])) == pytest.approx(0.25)


def test_a_certain_and_wrong_prediction_costs_a_lot_and_not_everything() -> None:
    measured = measure_probabilities(np.array([0]), np.array([[0.0, 1.0]]))
    assert measured == {
        "balanced_accuracy": 0,
        "log_loss": pytest.approx(708.4, abs=0.1),
        "brier": 2,
        "calibration_error": 1,
    }
    measured = measure_probabilities(np.array([1]), np.array([[0.0, 1.0]]))
    assert measured == {"balanced_accuracy": 1, "log_loss": 0, "brier": 0, "calibration_error": 0}


def test_five_classes_as_probable_as_the_right_one_do_not_count_against_it() -> None:
    probabilities = np.full((1, 12), 1 / 12)
    assert measure_probabilities(np.array([11]), probabilities)["top5_accuracy"] == 1
    probabilities[0, :5] += 0.01
    assert measure_probabilities(np.array([11]), probabilities)["top5_accuracy"] == 0
    assert measure_probabilities(np.array([4]), probabilities)["top5_accuracy"] == 1


# The law of learning curves


@pytest.mark.parametrize(("floor", "factor", "power"), [(0.05, 0.8, 0.5), (0.0, 1.5, 0.9), (0.2, 3.0, 1.2)])
def test_a_known_law_is_found(floor: float, factor: float, power: float) -> None:
    n = np.geomspace(20, 800, 8).round()
    law = fit_power_law(n, 1 - floor - factor * n**-power)
    assert (law.floor, law.factor, law.power) == pytest.approx((floor, factor, power), rel=0.02, abs=0.002)
    for more in (1600, 3200):
        assert float(law.accuracy(more)) == pytest.approx(1 - floor - factor * more**-power, abs=1e-3)


def test_a_law_through_noise_is_near_the_truth() -> None:
    n = np.geomspace(20, 800, 8)
    errors = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.005, 8)
        errors.append(float(fit_power_law(n, 0.9 - 1.2 * n**-0.7 + noise).accuracy(1600)) - (0.9 - 1.2 * 1600**-0.7))
    assert np.abs(errors).max() < 0.02
    assert abs(np.mean(errors)) < 0.005


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_a_law_of_what_does_not_change_stays_there(accuracy: float) -> None:
    law = fit_power_law(np.geomspace(10, 100, 5), np.full(5, accuracy))
    assert float(law.accuracy(400)) == pytest.approx(accuracy, abs=0.02)


def test_a_law_never_promises_more_than_everything_nor_that_more_images_harm() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        law = fit_power_law(np.geomspace(10, 100, 6), rng.random(6))
        found = law.accuracy(np.geomspace(100, 1e6, 20))
        assert (np.diff(found) >= -1e-12).all()
        assert found.max() <= 1


def test_a_law_is_its_formula() -> None:
    law = PowerLaw(floor=0.1, factor=2.0, power=0.5)
    assert law.accuracy(np.array([16.0, 100.0])) == pytest.approx([0.4, 0.7])


# Several tests at once


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
@QUICK
def test_holms_adjustment_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    adjusted = adjust_holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if min(1.0, p_values[i] * (len(p_values) - rank)) > level:
                break
            rejected.add(i)
        assert rejected == {i for i, value in enumerate(adjusted) if value <= level}
