"""featcache.heads, from outside: what `fit_head` promises of every solver, on good rows and on odd ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_solvers import Problem, make_cloud, make_problem, make_views, problems, stack, standardise, strengths
from threadpoolctl import threadpool_limits

from featcache.config import SOLVERS, HeadConfig
from featcache.errors import DatasetError
from featcache.heads import (
    FittedHead,
    HeldOut,
    LinearHead,
    NeighbourHead,
    count_right,
    find_logits,
    fit_head,
    lbfgs,
    logistic,
    remake_head,
    sgd,
)
from featcache.heads.calibration import fit_temperature
from featcache.heads.rows import weigh_images
from featcache.heads.selection import make_folds
from featcache.metrics import to_probabilities

Array = NDArray[Any]
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)
GRID = (1e-3, 1e-2, 1e-1, 1.0)
ALL = [name for name in SOLVERS if name != "auto"]
EXACT = ["lbfgs", "sklearn"]
WITH_C = [name for name in ALL if name != "knn"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sgd: enough where only the outline matters."""
    monkeypatch.setattr(sgd, "SMALL_STEPS", 50)


def count_classes(labels: Array) -> int:
    return int(labels.max()) + 1


def fit(problem: Problem, solver: str = "lbfgs", **values: Any) -> FittedHead:
    features, labels = problem
    values = {"scaling": "standard", **values}
    return fit_head(features, labels, count_classes(labels), HeadConfig(solver=solver, **values))


def find_accuracy(fitted: FittedHead, problem: Problem) -> float:
    return float((fitted.head.logits(problem[0]).argmax(axis=1) == problem[1]).mean())


def find_log_loss(logits: Array, labels: Array) -> float:
    return float(-np.log(to_probabilities(logits)[np.arange(len(labels)), labels]).mean())


# --- the head ---------------------------------------------------------------------------------------------------------


@QUICK
@given(problem=problems, strength=strengths)
def test_heads_of_both_solvers_predict_the_same(problem: Problem, strength: float) -> None:
    features, _ = problem
    first, second = (to_probabilities(fit(problem, name, C=strength).head.logits(features)) for name in EXACT)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-3)
    top = np.sort(first, axis=1)
    clear = top[:, -1] - top[:, -2] > 2e-3
    assert np.array_equal(first.argmax(axis=1)[clear], second.argmax(axis=1)[clear])


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize(("n_classes", "n", "d"), [(2, 60, 8), (3, 60, 8), (3, 30, 80)])
@pytest.mark.parametrize("solver", EXACT)
def test_a_head_gives_the_probabilities_of_plain_scikit_learn(
    solver: str, n_classes: int, n: int, d: int, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setattr(logistic, "SMALL", 0)
        monkeypatch.setattr(lbfgs, "FEW_NUMBERS", 0)
    features, labels = make_problem(2, n=n, d=d, n_classes=n_classes)
    for strength in (0.01, 0.3):
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=1000))
        expected = plain.fit(features.astype(np.float64), labels).predict_proba(features.astype(np.float64))
        fitted = fit((features, labels), solver, C=strength)
        assert fitted.converged
        assert fitted.gradient is not None
        assert fitted.gradient < 2e-6
        np.testing.assert_allclose(to_probabilities(fitted.head.logits(features)), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_a_head_is_float32_with_a_row_for_each_class(solver: str, n_classes: int) -> None:
    features, labels = make_problem(3, d=7, n_classes=n_classes)
    head = fit((features, labels), solver, C=0.1).head
    assert isinstance(head, LinearHead)
    assert (head.weight.dtype, head.weight.shape) == (np.float32, (n_classes, 7))
    assert (head.bias.dtype, head.bias.shape) == (np.float32, (n_classes,))
    assert head.weight.flags.c_contiguous
    assert head.logits(features).dtype == np.float32
    assert head.n_parameters == n_classes * 8


def test_neighbours_are_kept_in_float32_with_unit_length() -> None:
    features, labels = make_cloud(3)
    head = fit((features, labels), "knn").head
    assert isinstance(head, NeighbourHead)
    assert (head.features.dtype, head.features.shape) == (np.float32, features.shape)
    np.testing.assert_allclose(np.linalg.norm(head.features, axis=1), 1, rtol=1e-6)
    assert head.logits(features).dtype == np.float32
    np.testing.assert_allclose(np.exp(head.logits(features)).sum(axis=1), 1, rtol=1e-5)  # log probabilities


@pytest.mark.parametrize("solver", EXACT)
def test_a_fit_that_stops_too_early_says_so_and_warns_nobody(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.heads.descent.MAX_EVALUATIONS", 3)
    monkeypatch.setattr("featcache.heads.sklearn.MAX_ITERATIONS", 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit(make_problem(4), solver, C=1.0)
    assert not fitted.converged
    assert fitted.evaluations <= 6
    assert fitted.gradient is not None
    assert fitted.gradient > 1e-4
    assert caught == []


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_a_head_that_is_taken_apart_is_the_same_when_it_is_made_again(solver: str) -> None:
    features, labels = make_cloud(5)
    head = fit((features, labels), solver, scaling="l2").head.divide_logits(2.5)
    values, arrays = head.take_apart()
    again = remake_head(values, arrays, (3, 6))
    assert np.array_equal(again.logits(features), head.logits(features))
    for shape in ((4, 6), (3, 7), (2, 6)) if solver != "knn" else ((3, 7), (2, 6)):
        with pytest.raises(ValueError, match=r"weight|features"):
            remake_head(values, arrays, shape)
    name = next(iter(arrays))
    with pytest.raises(KeyError):
        remake_head(values, {key: array for key, array in arrays.items() if key != name}, (3, 6))


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_the_same_rows_give_the_same_head_bit_for_bit(solver: str) -> None:
    problem, fits = make_problem(17), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what must not matter
        fits.append(fit(problem, solver, calibrate=True, folds=2))
    assert fits[0].selection == fits[1].selection
    assert fits[0].temperature == fits[1].temperature
    assert fits[0].head.logits(problem[0]).tobytes() == fits[1].head.logits(problem[0]).tobytes()


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_what_is_given_is_left_as_it_is(solver: str) -> None:
    features, labels = make_problem(19)
    views = make_views(19, features, 2)
    before = features.copy(), labels.copy(), views.copy()
    threads = torch.get_num_threads()
    fit_head(features, labels, 3, HeadConfig(solver=solver, scaling="l2", class_weight="balanced"), views=views)
    assert all(np.array_equal(one, other) for one, other in zip((features, labels, views), before, strict=True))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_rows_in_half_precision_are_as_good_as_in_single(solver: str) -> None:
    features, labels = make_cloud(20)
    features = features.astype(np.float16)
    config = {"k": 5, "temperature": 0.1} if solver == "knn" else {"C": 0.1}
    half, single = (fit((one, labels), solver, **config).head for one in (features, features.astype(np.float32)))
    queries = features.astype(np.float32)
    np.testing.assert_allclose(half.logits(queries), single.logits(queries), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_the_order_of_the_images_does_not_matter(solver: str) -> None:
    """Beyond what a stream's own order brings."""
    features, labels = make_cloud(21)
    config = {"k": 5, "temperature": 0.1} if solver == "knn" else {"C": 0.1}
    order = np.random.default_rng(21).permutation(len(labels))
    first, second = fit((features, labels), solver, **config), fit((features[order], labels[order]), solver, **config)
    found = [to_probabilities(one.head.logits(features)) for one in (first, second)]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-3)


def test_seconds_are_told_and_choosing_is_a_part_of_them() -> None:
    for solver in ("lbfgs", "ridge", "knn"):
        fitted = fit(make_problem(22), solver)
        assert 0 < fitted.selecting.seconds < fitted.spent.seconds


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_the_scale_of_a_feature_does_not_matter_where_features_are_standardised(solver: str) -> None:
    features, labels = make_problem(8)
    factors = 2.0 ** np.arange(-4, 4).astype(np.float32)
    plain, scaled = (fit((x, labels), solver, C=0.1).head.logits(x) for x in (features, features * factors))
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=2e-3)
    unscaled, other = (
        fit((x, labels), solver, C=0.1, scaling="none").head.logits(x) for x in (features, features * factors)
    )
    assert np.abs(unscaled - other).max() > 0.05


@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_a_rotation_does_not_matter_where_proportions_are_kept(solver: str) -> None:
    features, labels = make_cloud(9)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(6, 6)))[0].astype(np.float32)
    for scaling in ("none", "l2"):
        plain, turned = (
            fit((x, labels), solver, C=0.1, scaling=scaling).head.logits(x) for x in (features, features @ rotation)
        )
        np.testing.assert_allclose(turned, plain, rtol=0, atol=5e-3)
        one_factor = fit((features * 37, labels), solver, C=0.1, scaling=scaling).head.logits(features * 37)
        np.testing.assert_allclose(one_factor, plain, rtol=0, atol=5e-3)


def test_without_scaling_all_features_are_divided_by_one_number() -> None:
    features, labels = make_cloud(10)
    x = features.astype(np.float64) * np.array([1, 1, 1, 1, 1, 4])
    scaled = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0).mean())
    expected = LogisticRegression(C=0.1, tol=1e-8).fit(scaled, labels).predict_proba(scaled)
    found = to_probabilities(
        fit((x.astype(np.float32), labels), C=0.1, scaling="none").head.logits(x.astype(np.float32))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_the_length_of_a_row_does_not_matter_where_rows_are_divided_by_it(solver: str) -> None:
    features, labels = make_cloud(11)
    lengths = np.random.default_rng(11).choice([0.25, 1.0, 8.0], (len(labels), 1)).astype(np.float32)
    plain, scaled = (fit((x, labels), solver, scaling="l2") for x in (features, features * lengths))
    np.testing.assert_allclose(scaled.head.logits(features), plain.head.logits(features), rtol=0, atol=2e-3)
    np.testing.assert_allclose(plain.head.logits(features * lengths), plain.head.logits(features), rtol=0, atol=2e-3)
    if isinstance(plain.head, LinearHead):
        assert plain.head.unit_length
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        strength = plain.selection.choice["C"]
        expected = fit((unit, labels), solver, scaling="none", C=strength).head.weight
        factor = plain.head.weight / expected  # what is calibrated on the same rows is calibrated alike
        np.testing.assert_allclose(factor, factor.mean(), rtol=0.02)


def test_a_row_of_zeros_has_no_direction_and_does_no_harm() -> None:
    features, labels = make_cloud(12)
    features[4] = 0
    for solver in ("lbfgs", "ridge", "knn"):
        fitted = fit((features, labels), solver, scaling="l2")
        assert np.isfinite(fitted.head.logits(features)).all()
        assert find_accuracy(fitted, (features, labels)) > 0.6


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_a_feature_that_never_varies_is_harmless(solver: str, value: float) -> None:
    features, labels = make_problem(5)
    plain = fit((features, labels), solver, C=0.1).head
    more = np.hstack([features, np.full((len(features), 1), value, np.float32)])
    head = fit((more, labels), solver, C=0.1).head
    assert np.isfinite(head.weight).all()
    np.testing.assert_allclose(head.weight[:, -1], 0, atol=1e-5)
    np.testing.assert_allclose(head.logits(more), plain.logits(features), rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_a_feature_that_varies_only_elsewhere_does_not_explode(
    solver: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == "large":
        monkeypatch.setattr(logistic, "SMALL", 0)
    for value in (0.1, 1234.567):
        features, labels = make_problem(6)
        features[:, 2] = value
        head = fit((features, labels), solver, C=0.1).head
        moved = features.copy()
        moved[:, 2] *= 2
        np.testing.assert_allclose(head.logits(moved), head.logits(features), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_one_feature_is_enough(solver: str) -> None:
    features, labels = make_problem(7, d=1, n_classes=2, spread=3.0)
    assert find_accuracy(fit((features, labels), solver, C=1.0), (features, labels)) > 0.7


# --- weights and views ------------------------------------------------------------------------------------------------


def test_balanced_classes_count_as_in_scikit_learn() -> None:
    features, labels = make_problem(31)
    labels = np.where(labels == 2, 1, labels)
    x = standardise(features, weigh_images(labels, 2, "balanced"))
    plain = LogisticRegression(C=0.1, tol=1e-8, class_weight="balanced").fit(x, labels)
    found = to_probabilities(fit((features, labels), C=0.1, class_weight="balanced").head.logits(features))
    np.testing.assert_allclose(found, plain.predict_proba(x), rtol=0, atol=1e-4)
    weights = weigh_images(labels, 2, "balanced")
    assert weights.mean() == pytest.approx(1)
    assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum())


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_rare_classes_are_found_more_often_where_all_classes_count_the_same(solver: str) -> None:
    rng = np.random.default_rng(32)
    labels = np.repeat([0, 1], [400, 20])
    features = (rng.normal(size=(420, 4)) + 1.0 * labels[:, None]).astype(np.float32)
    config = {"k": 50, "temperature": 1.0} if solver == "knn" else {"C": 0.1}
    plain, balanced = (fit((features, labels), solver, **config, class_weight=one) for one in (None, "balanced"))
    recalls = [(one.head.logits(features).argmax(axis=1)[labels == 1] == 1).mean() for one in (plain, balanced)]
    assert recalls[1] > recalls[0] + 0.2


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("scaling", ["standard", "none", "l2"])
@pytest.mark.parametrize("solver", [*EXACT, "ridge"])
def test_views_are_rows_that_share_what_their_image_counts(solver: str, scaling: str, class_weight: str | None) -> None:
    features, labels = make_problem(33)
    labels = np.minimum(labels, 1)
    views = make_views(33, features, 3)
    config = HeadConfig(solver=solver, C=0.1, scaling=scaling, class_weight=class_weight)
    fitted = fit_head(features, labels, 2, config, views=views)
    every = stack(features, views).astype(np.float64)
    weights = np.repeat(weigh_images(labels, 2, class_weight) / 4, 4)
    if scaling == "l2":
        every = every / np.linalg.norm(every, axis=1, keepdims=True)
    mean = np.average(every, axis=0, weights=weights)
    variance = np.average(np.square(every - mean), axis=0, weights=weights)
    x = (every - mean) / np.sqrt(variance if scaling == "standard" else variance.mean())
    if solver == "ridge":
        targets = np.repeat(np.eye(2)[labels], 4, axis=0)
        scores = Ridge(alpha=10, solver="cholesky").fit(x, targets, sample_weight=weights).predict(x)
        expected = to_probabilities(scores / fitted.temperature)
    else:
        model = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000)
        expected = model.fit(x, np.repeat(labels, 4), sample_weight=weights).predict_proba(x)
    found = to_probabilities(fitted.head.logits(stack(features, views)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_views_that_are_the_plain_features_change_nothing() -> None:
    features, labels = make_cloud(34)
    views = np.repeat(features[:, None], 2, axis=1)
    for solver in ("lbfgs", "ridge"):
        config = HeadConfig(solver=solver, grid=GRID)
        plain, more = fit_head(features, labels, 3, config), fit_head(features, labels, 3, config, views=views)
        np.testing.assert_allclose(more.head.logits(features), plain.head.logits(features), rtol=0, atol=2e-3)
        losses = [[one.loss for one in fitted.selection.candidates] for fitted in (plain, more)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_stream_learns_from_views_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgd, "SMALL_STEPS", 300)
    features, labels = make_cloud(35)
    views = make_views(35, features, 2)
    best, found = (
        to_probabilities(
            fit_head(features, labels, 3, HeadConfig(solver=name, C=0.01), views=views).head.logits(features)
        )
        for name in ("lbfgs", "sgd")
    )
    without = to_probabilities(fit_head(features, labels, 3, HeadConfig(C=0.01)).head.logits(features))
    assert np.abs(found - best).max() < 0.01
    assert np.abs(without - best).max() > 0.02


def test_views_vote_as_neighbours() -> None:
    features, labels = make_cloud(36)
    views = make_views(36, features, 2)
    head = fit_head(features, labels, 3, HeadConfig(solver="knn", k=1, temperature=0.1), views=views).head
    assert isinstance(head, NeighbourHead)
    assert len(head.features) == 3 * len(features)
    assert np.array_equal(head.logits(views[:, 1]).argmax(axis=1), labels)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*EXACT, "ridge", "knn"])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_least_loss_is_taken_whatever_the_accuracies(spread: float, solver: str) -> None:
    problem = make_problem(10, spread=spread)
    config = {} if solver == "knn" else {"grid": GRID}
    fitted = fit(problem, solver, **config)
    best = min(fitted.selection.candidates, key=lambda one: one.loss)
    assert fitted.selection.choice == best.choice
    assert all(0 <= one.accuracy <= 1 for one in fitted.selection.candidates)
    chosen = {name: int(value) if name == "k" else value for name, value in best.choice.items()}
    given_head = fit(problem, solver, **chosen).head
    assert np.array_equal(fitted.head.logits(problem[0]), given_head.logits(problem[0]))


def test_how_it_was_chosen_is_said() -> None:
    problem = make_problem(11)
    assert fit(problem).selection.procedure == "5-fold cross-validation on the training split, least log loss"
    assert fit(problem, folds=3).selection.procedure.startswith("3-fold")
    chosen = fit(problem, "ridge").selection
    assert chosen.procedure == "leave-one-out on the training split, least squared error"
    assert chosen.criterion == "leave-one-out squared error"


def test_noise_wants_a_small_c_and_plain_classes_a_large_one() -> None:
    for solver in (*EXACT, "ridge"):
        chosen = [
            fit(make_problem(11, spread=spread), solver, grid=GRID).selection.choice["C"] for spread in (0.0, 3.0)
        ]
        assert chosen[0] == GRID[0]
        assert chosen[1] > GRID[1]


def test_the_end_of_what_was_tried_is_known() -> None:
    selection = fit(make_problem(11, spread=0.0), grid=GRID).selection
    assert selection.is_at_end("C")
    assert not replace(selection, choice={"C": GRID[1]}).is_at_end("C")
    assert not fit(make_problem(11), C=0.1).selection.is_at_end("C")


@pytest.mark.parametrize("solver", [*EXACT, "ridge"])
def test_the_grid_may_come_in_any_order(solver: str) -> None:
    problem = make_problem(20)
    first, second = (fit(problem, solver, grid=grid) for grid in (GRID, GRID[::-1]))
    assert first.selection == second.selection
    assert np.array_equal(first.head.logits(problem[0]), second.head.logits(problem[0]))


def test_only_the_rows_given_have_a_say() -> None:
    features, labels = make_problem(12, n=90)
    poisoned = features.copy()
    poisoned[60:] = np.nan
    alone, beside = (fit((one, labels[:60])) for one in (features[:60].copy(), poisoned[:60]))
    assert alone.selection == beside.selection
    assert np.array_equal(alone.head.logits(features), beside.head.logits(features))


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "knn"])
def test_a_held_out_row_has_no_say_in_its_own_prediction(solver: str) -> None:
    """Labels that are pure noise are not predicted better than by chance, whatever the number of features."""
    rng = np.random.default_rng(13)
    problem = rng.normal(size=(60, 100)).astype(np.float32), rng.permutation(np.arange(60) % 2)
    fitted = fit(problem, solver, calibrate=True, **({} if solver == "knn" else {"grid": GRID}))
    assert all(one.accuracy < 0.7 for one in fitted.selection.candidates)
    if solver != "ridge":
        assert all(one.loss > 0.6 for one in fitted.selection.candidates)
    assert find_log_loss(fitted.held_out / fitted.temperature, problem[1]) > 0.6


@pytest.mark.parametrize(("smallest", "n_folds"), [(2, 2), (3, 3), (5, 5), (9, 5)])
def test_folds_are_limited_by_the_smallest_class(smallest: int, n_folds: int) -> None:
    features, _ = make_problem(14, n=30 + smallest, n_classes=2)
    labels = np.array([0] * 30 + [1] * smallest)
    for solver in (*EXACT, "knn"):
        assert fit((features, labels), solver).selection.procedure.startswith(f"{n_folds}-fold cross-validation")


def test_the_seed_shuffles_the_folds() -> None:
    first, second = (fit(make_problem(18), grid=GRID, seed=seed).selection.candidates for seed in (0, 1))
    assert [one.choice for one in first] == [one.choice for one in second]
    assert first != second


@pytest.mark.parametrize("solver", WITH_C)
@pytest.mark.usefixtures("few_steps")
def test_a_given_c_is_taken_without_a_choice(solver: str) -> None:
    selection = fit(make_problem(16), solver, C=0.7).selection
    assert (selection.choice, selection.candidates, selection.procedure) == ({"C": 0.7}, (), "given")


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.usefixtures("few_steps")
def test_the_validation_split_chooses_by_its_own_loss(solver: str) -> None:
    features, labels = make_cloud(41, n=90)
    val = HeldOut(features=make_cloud(41, n=200, draw=1)[0], labels=make_cloud(41, n=200, draw=1)[1])
    config = HeadConfig(solver=solver) if solver == "knn" else HeadConfig(solver=solver, grid=GRID, scaling="l2")
    fitted = fit_head(features, labels, 3, config, validation=val)
    words = "squared error" if solver == "ridge" else "log loss"
    assert fitted.selection.procedure == f"on the validation split, least {words}: its accuracy is optimistic"
    assert fitted.selection.criterion == words
    assert fitted.selection.choice == min(fitted.selection.candidates, key=lambda one: one.loss).choice
    for one in fitted.selection.candidates[:: 1 if solver != "knn" else 10]:
        chosen = {name: int(value) if name == "k" else value for name, value in one.choice.items()}
        exact = {"solver": "lbfgs"} if solver == "sgd" else {}  # what easily fits into memory, it leaves to this one
        head = fit_head(features, labels, 3, replace(config, grid=None, **chosen, **exact))
        logits = head.head.logits(val.features)
        if solver == "ridge":
            expected = float(np.square(logits * head.temperature - np.eye(3)[val.labels]).mean())
        else:
            expected = log_loss(val.labels, to_probabilities(logits))
        assert one.loss == pytest.approx(expected, rel=0.005)
        assert one.accuracy == pytest.approx((logits.argmax(axis=1) == val.labels).mean(), abs=0.016)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_choosing_on_the_validation_split_in_single_precision_is_the_same(
    class_weight: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = make_cloud(42, n=90)
    val = HeldOut(features=make_cloud(42, n=50, draw=1)[0], labels=make_cloud(42, n=50, draw=1)[1])
    config = HeadConfig(grid=GRID, class_weight=class_weight)
    first = fit_head(features, labels, 3, config, validation=val).selection
    monkeypatch.setattr(logistic, "SMALL", 0)
    second = fit_head(features, labels, 3, config, validation=val).selection
    np.testing.assert_allclose(
        [one.loss for one in second.candidates], [one.loss for one in first.candidates], rtol=2e-3
    )


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*EXACT, "sgd", "knn"])
@pytest.mark.usefixtures("few_steps")
def test_calibration_divides_all_logits_and_changes_no_prediction(solver: str) -> None:
    problem = make_cloud(51)
    config = {"k": 7, "temperature": 0.1} if solver == "knn" else {"C": 1e-3}
    plain, calibrated = (fit(problem, solver, **config, calibrate=one) for one in (False, True))
    assert plain.temperature is None
    assert plain.held_out is None
    assert calibrated.temperature is not None
    assert calibrated.temperature != pytest.approx(1, abs=0.02)
    expected = plain.head.logits(problem[0])
    np.testing.assert_allclose(
        calibrated.head.logits(problem[0]) * calibrated.temperature, expected, rtol=1e-4, atol=1e-4
    )
    assert np.array_equal(calibrated.head.logits(problem[0]).argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize(
    ("solver", "class_weight"), [("lbfgs", None), ("lbfgs", "balanced"), ("sklearn", None), ("sgd", "balanced")]
)
def test_calibration_asks_images_that_a_fit_did_not_see(
    solver: str, class_weight: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = make_cloud(52)
    labels = np.minimum(labels, 1)
    strength = 0.03
    monkeypatch.setattr(sgd, "SMALL_STEPS", 300)
    fitted = fit((features, labels), solver, C=strength, calibrate=True, class_weight=class_weight)
    weights, folds = weigh_images(labels, 2, class_weight), make_folds(labels, 5, 0)
    x, expected = standardise(features, weights), np.empty((60, 2))
    for fold in range(5):
        model = LogisticRegression(C=strength, tol=1e-8)
        model.fit(x[folds != fold], labels[folds != fold], sample_weight=weights[folds != fold])
        expected[folds == fold] = model.predict_proba(x[folds == fold])
    np.testing.assert_allclose(to_probabilities(fitted.held_out), expected, rtol=0, atol=0.02)
    assert fitted.temperature == pytest.approx(fit_temperature(fitted.held_out, labels, weights))
    assert fitted.temperature == pytest.approx(fit_temperature(np.log(expected), labels, weights), rel=0.1)


@pytest.mark.parametrize("solver", [*EXACT, "ridge", "knn"])
def test_a_temperature_makes_the_held_out_log_loss_no_worse(solver: str) -> None:
    for seed in range(3):
        problem = make_cloud(53 + seed, n=200)
        fitted = fit(problem, solver, calibrate=True)
        at = [find_log_loss(fitted.held_out / t, problem[1]) for t in (fitted.temperature, 1.0)]
        assert at[0] <= at[1] + 0.002  # half an image in N + 1 is taken to be wrong
        nearby = [find_log_loss(fitted.held_out / fitted.temperature / factor, problem[1]) for factor in (0.8, 1.25)]
        assert at[0] < min(nearby) + 0.002


@pytest.mark.parametrize("solver", [*EXACT, "ridge", "knn"])
def test_a_calibrated_head_is_not_certain_where_held_out_images_were_all_right(solver: str) -> None:
    rng = np.random.default_rng(55)

    def draw(n: int) -> Problem:
        labels = np.arange(n) % 2
        return (rng.normal(size=(n, 8)) + 7 * np.eye(2, 8)[labels]).astype(np.float32), labels

    fitted, fresh = fit(draw(100), solver, calibrate=True), draw(400)
    assert (fitted.held_out.argmax(axis=1) == np.arange(100) % 2).all()
    labels = fresh[1].copy()
    labels[:2] = 1 - labels[:2]  # half a per cent of labels are wrong, as they are in every data set
    probabilities = to_probabilities(fitted.head.logits(fresh[0]))
    assert 0.98 < probabilities.max(axis=1).mean() < 0.9999
    assert find_log_loss(fitted.head.logits(fresh[0]), labels) < 0.06


def test_scores_of_ridge_are_always_calibrated() -> None:
    problem = make_cloud(54, n=300)
    fresh = make_cloud(54, n=2000, draw=1)
    fitted = fit(problem, "ridge")
    assert fitted.temperature is not None
    losses = [find_log_loss(one.head.logits(fresh[0]), fresh[1]) for one in (fitted, fit(problem))]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)
    assert find_log_loss(fitted.head.logits(fresh[0]) * fitted.temperature, fresh[1]) > losses[0] + 0.2


# --- odd rows: right, or refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL)
class TestOddRows:
    """Every solver."""

    @pytest.fixture(autouse=True)
    def _few_steps(self, few_steps: None) -> None:
        pass

    def test_one_class_is_refused(self, solver: str) -> None:
        with pytest.raises(DatasetError, match="needs at least 2 classes; the training split has 1"):
            fit_head(make_cloud(0)[0], np.zeros(60, np.int64), 1, HeadConfig(solver=solver))

    def test_a_class_without_an_image_is_refused(self, solver: str) -> None:
        features, labels = make_cloud(0)
        with pytest.raises(DatasetError, match="class 1 of 3 has no training image"):
            fit_head(features, np.where(labels == 1, 2, labels), 3, HeadConfig(solver=solver))
        with pytest.raises(DatasetError, match="class 3 of 4 has no training image"):
            fit_head(features, labels, 4, HeadConfig(solver=solver))

    @pytest.mark.parametrize("shift", [-1, 1])
    @pytest.mark.parametrize("class_weight", [None, "balanced"])
    def test_a_label_that_is_no_class_is_refused(self, shift: int, class_weight: str | None, solver: str) -> None:
        features, labels = make_cloud(0)
        found = f"labels are {shift} to {2 + shift}, expected 0 to 2"
        with pytest.raises(DatasetError, match=found):
            fit_head(features, labels + shift, 3, HeadConfig(solver=solver, class_weight=class_weight))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number_is_refused_with_its_image(self, value: float, solver: str) -> None:
        features, labels = make_cloud(0)
        features[17, 3] = value
        for scaling in ("standard", "l2"):
            with pytest.raises(DatasetError, match="training image 17 are not finite numbers") as caught:
                fit((features, labels), solver, scaling=scaling)
            assert "\n" not in str(caught.value)
        views = make_views(0, make_cloud(0)[0], 2)
        views[23, 1, 0] = value
        with pytest.raises(DatasetError, match="training image 23 are not finite numbers"):
            fit_head(make_cloud(0)[0], labels, 3, HeadConfig(solver=solver), views=views)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
    def test_features_of_which_none_varies_are_refused(self, value: float, solver: str) -> None:
        problem = np.full((20, 3), value, np.float32), np.array([0] * 15 + [1] * 5)
        with pytest.raises(DatasetError, match="equal features: there is nothing to tell classes apart by"):
            fit(problem, solver)

    @pytest.mark.parametrize("n_classes", [2, 5])
    def test_one_image_of_each_class_is_learned_without_a_choice(self, n_classes: int, solver: str) -> None:
        problem = make_cloud(1, n=n_classes, n_classes=n_classes)
        fitted = fit(problem, solver, calibrate=True)
        assert "a class has a single training image" in fitted.selection.procedure
        assert fitted.selection.candidates == ()
        assert fitted.selection.choice == ({"C": 0.01} if solver != "knn" else {"k": n_classes, "temperature": 0.07})
        assert fitted.temperature is None
        assert find_accuracy(fitted, problem) == 1

    def test_a_class_of_one_image_beside_larger_ones(self, solver: str) -> None:
        rng = np.random.default_rng(2)
        labels = np.array([0] * 20 + [1])
        problem = (rng.normal(size=(21, 4)) + 6 * labels[:, None]).astype(np.float32), labels
        fitted = fit(problem, solver)
        if solver != "ridge":  # it leaves one out, and learns from the others
            assert "a class has a single training image" in fitted.selection.procedure
        assert np.isfinite(fitted.head.logits(problem[0])).all()
        assert find_accuracy(fitted, problem) >= 20 / 21

    @pytest.mark.parametrize("scaling", ["standard", "none"])
    def test_more_features_than_images(self, scaling: str, solver: str) -> None:
        problem = make_cloud(3, n=24, d=200)
        fitted = fit(problem, solver, scaling=scaling)
        assert find_accuracy(fitted, problem) == 1
        fresh = make_cloud(3, n=240, d=200, draw=1)
        assert find_accuracy(fitted, (fresh[0], fresh[1])) > 0.9

    def test_rows_that_are_there_many_times(self, solver: str) -> None:
        features, labels = make_cloud(4, n=12)
        problem = np.repeat(features, 6, axis=0), np.repeat(labels, 6)
        fitted = fit(problem, solver)
        assert find_accuracy(fitted, problem) > 0.8
        assert np.isfinite(fitted.head.logits(problem[0])).all()

    def test_features_that_are_copies_of_each_other(self, solver: str) -> None:
        features, labels = make_cloud(5)
        problem = np.hstack([features, features, -features[:, :1]]), labels
        assert (
            find_accuracy(fit(problem, solver), problem)
            > find_accuracy(fit((features, labels), solver), (features, labels)) - 0.05
        )

    def test_five_hundred_images_against_three(self, solver: str) -> None:
        rng = np.random.default_rng(6)
        labels = np.repeat([0, 1], [500, 3])
        centres = np.array([[4, 0, 0, 0, 0], [0, 6, 0, 0, 0]])
        problem = (rng.normal(size=(503, 5)) + centres[labels]).astype(np.float32), labels
        for class_weight in (None, "balanced"):
            fitted = fit(problem, solver, class_weight=class_weight)
            assert find_accuracy(fitted, problem) > 0.97
            if solver != "ridge":
                assert fitted.selection.procedure.startswith("3-fold")

    def test_a_thousand_classes(self, solver: str) -> None:
        rng = np.random.default_rng(7)
        labels = np.repeat(np.arange(1000), rng.integers(2, 4, 1000))
        centres = rng.normal(size=(1000, 16))
        features = (centres[labels] + 0.1 * rng.normal(size=(len(labels), 16))).astype(np.float32)
        config = {"knn": {"temperature": 0.05}, "ridge": {"grid": (0.01, 1.0)}, "lbfgs": {"grid": (0.01,)}}.get(
            solver, {"C": 0.01}
        )
        fitted = fit((features, labels), solver, **config)
        assert fitted.head.logits(features).shape == (len(labels), 1000)
        assert find_accuracy(fitted, (features, labels)) > {"knn": 0.99, "sgd": 0.2}.get(solver, 0.4)

    def test_features_far_from_zero(self, solver: str) -> None:
        features, labels = make_cloud(8)
        if solver != "knn":  # which looks at angles
            near, far = (fit((x, labels), solver, C=0.1).head.logits(x) for x in (features, features + 1000))
            np.testing.assert_allclose(far, near, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("solver", "claim"), [("lbfgs", True), ("sklearn", True), ("ridge", True), ("knn", True), ("sgd", None)]
)
def test_only_a_solver_with_a_tolerance_claims_to_have_reached_it(
    solver: str, claim: bool | None, few_steps: None
) -> None:
    features, labels = make_cloud(0)
    assert fit_head(features, labels, 3, HeadConfig(solver=solver)).converged is claim


# --- where rounding would decide --------------------------------------------------------------------------------------


def draw_wide(seed: int, *, n: int, d: int, spread: float, repeat: int = 1) -> tuple[Problem, Problem]:
    """Training rows, each so many times, and a thousand new ones, of four classes that overlap."""
    rng = np.random.default_rng(seed)
    labels, means = np.arange(n + 1000) % 4, rng.normal(size=(4, d)) * spread
    rows = (means[labels] + rng.normal(size=(len(labels), d))).astype(np.float32)
    return (np.repeat(rows[:n], repeat, 0), np.repeat(labels[:n], repeat)), (rows[n:], labels[n:])


@pytest.mark.parametrize(("repeat", "strength"), [(1, 1e4), (1, 1e10), (100, 10.0), (100, 1e3)])
def test_axes_that_hold_only_rounding_do_not_spoil_what_is_predicted_of_new_images(
    repeat: int, strength: float
) -> None:
    train, new = draw_wide(1, n=60, d=128, spread=0.15, repeat=repeat)
    plain, _ = draw_wide(1, n=60, d=128, spread=0.15)
    scaler = StandardScaler().fit(plain[0].astype(np.float64))
    reference = LogisticRegression(C=strength * repeat, tol=1e-10, max_iter=3000)
    reference.fit(scaler.transform(plain[0].astype(np.float64)), plain[1])
    expected = reference.score(scaler.transform(new[0].astype(np.float64)), new[1])
    assert find_accuracy(fit(train, C=strength), new) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_class_of_a_few_images_among_many_is_fitted_as_well(n_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros(60_000, np.int64)
    labels[30_000:] = n_classes - 2
    labels[:5] = n_classes - 1
    rng.shuffle(labels)
    features = (rng.normal(size=(3, 16))[labels] + 1.5 * rng.normal(size=(60_000, 16))).astype(np.float32)
    fitted = fit((features, labels), C=1.0)
    x = StandardScaler().fit_transform(features.astype(np.float64))
    expected = LogisticRegression(C=1.0, tol=1e-9, max_iter=3000).fit(x, labels).predict_proba(x)
    assert fitted.converged
    np.testing.assert_allclose(to_probabilities(fitted.head.logits(features)), expected, atol=1e-3)


def test_the_tolerance_follows_the_rarest_class_and_the_weakest_penalty() -> None:
    even, uneven = np.full(4, 0.25), np.array([0.5, 0.5 - 1e-4, 1e-4])
    assert lbfgs.choose_tolerance(1_000_000, even, 100.0) == 1e-6
    assert lbfgs.choose_tolerance(1_000, even, 100.0) == 1e-8
    assert lbfgs.choose_tolerance(1_000_000, uneven, 100.0) == pytest.approx(1e-7)
    assert lbfgs.choose_tolerance(1_000_000, even, 1e5) == pytest.approx(1e-7)
    assert lbfgs.choose_tolerance(1_000_000, even, 1e12) == 1e-9


@pytest.mark.parametrize("factor", [1e-24, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("solver", ["lbfgs", "sklearn", "ridge"])
def test_features_may_be_of_any_size_that_single_precision_holds(solver: str, factor: float) -> None:
    features, labels = make_cloud(0)
    scaled = (features.astype(np.float64) * factor).astype(np.float32)
    plain, found = fit((features, labels), solver, C=0.1), fit((scaled, labels), solver, C=0.1)
    expected = to_probabilities(plain.head.logits(features))
    np.testing.assert_allclose(to_probabilities(found.head.logits(scaled)), expected, atol=1e-3)


def test_an_error_that_only_rounding_decides_does_not_choose_a_ridge() -> None:
    (features, labels), _ = draw_wide(1, n=50, d=400, spread=0.2)
    selection = fit_head(features, labels, 4, HeadConfig(solver="ridge", grid=(1e-3, 1.0, 1e10))).selection
    assert [np.isfinite(one.loss) for one in selection.candidates] == [True, True, False]
    assert selection.choice == {"C": 1.0}
    alone = fit_head(features, labels, 4, HeadConfig(solver="ridge", C=1e10))
    assert np.isfinite(alone.head.logits(features)).all()


# --- few images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn", "ridge", "sgd"])
def test_features_that_hardly_vary_in_a_few_images_are_not_blown_up(solver: str, few_steps: None) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(410) % 2
    telling = labels[:, None] + 0.3 * rng.normal(size=(410, 5))
    rare = np.where(rng.random((410, 300)) < 0.02, rng.normal(size=(410, 300)), 1e-3 * rng.normal(size=(410, 300)))
    features = np.hstack([telling, rare]).astype(np.float32)
    few, new = (features[:10], labels[:10]), (features[10:], labels[10:])
    steady, plain = (find_accuracy(fit(few, solver, C=0.1, scaling=scaling), new) for scaling in ("auto", "standard"))
    assert steady > 0.97 > plain + 0.05


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_a_thousand_images_are_standardised_by_their_own_variances(solver: str) -> None:
    features, labels = make_problem(3, n=1000, d=6)
    auto, plain = (fit((features, labels), solver, C=0.1, scaling=scaling).head for scaling in ("auto", "standard"))
    np.testing.assert_array_equal(auto.logits(features), plain.logits(features))
    few = (features[:999], labels[:999])
    auto, plain = (fit(few, solver, C=0.1, scaling=scaling).head for scaling in ("auto", "standard"))
    assert not np.array_equal(auto.logits(features), plain.logits(features))


@pytest.mark.parametrize("block", [1, 7, 100])
def test_right_answers_are_counted_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.heads.BLOCK_IMAGES", block)
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(40, 3)).astype(np.float32), generator.integers(0, 4, 40)
    head = LinearHead(weight=generator.normal(size=(4, 3)).astype(np.float32), bias=np.zeros(4, np.float32))
    logits = find_logits(head, features)
    assert logits.shape == (40, 4)
    assert count_right(head, features, labels) == (logits.argmax(axis=1) == labels).sum()
