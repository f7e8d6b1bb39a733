"""featcache.heads: two solvers and one optimum, the folded standardisation, and the choice of C."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from featcache.config import SOLVERS, HeadConfig
from featcache.errors import DatasetError
from featcache.heads import fit_head, load_solver
from featcache.metrics import to_probabilities

Problem = tuple[NDArray[np.float32], NDArray[np.int64]]
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)
GRID = (1e-3, 1e-2, 1e-1, 1.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def make_problem(seed: int, n: int = 60, d: int = 8, n_classes: int = 3, spread: float = 1.0) -> Problem:
    """Overlapping clouds on axes of very different scale and offset; every class is there."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_classes)
    clouds = rng.normal(0, spread, (n_classes, d))[labels] + rng.normal(0, 1, (n, d))
    scales, offsets = 10 ** rng.uniform(-2, 2, d), rng.normal(0, 5, d)
    return (clouds * scales + offsets * scales).astype(np.float32), labels


problems = st.builds(
    make_problem,
    seed=st.integers(0, 10_000),
    n=st.integers(20, 80),
    d=st.integers(2, 30),
    n_classes=st.integers(2, 5),
    spread=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
)
strengths = st.floats(-3, 1).map(lambda exponent: 10**exponent)


def standardise(features: NDArray[np.float32]) -> NDArray[np.float64]:
    values = features.astype(np.float64)
    return (values - values.mean(axis=0)) / values.std(axis=0)


# --- two solvers, one optimum -----------------------------------------------------------------------------------------


@QUICK
@given(problem=problems, strength=strengths)
def test_both_solvers_find_the_same_optimum(problem: Problem, strength: float) -> None:
    features, labels = problem
    first, second = (load_solver(name)(standardise(features), labels, C=strength) for name in SOLVERS)
    assert first.converged
    assert second.converged
    assert first.coefficients.shape == second.coefficients.shape
    scale = np.abs(first.coefficients).max()
    np.testing.assert_allclose(second.coefficients, first.coefficients, rtol=0, atol=1e-3 * scale)
    np.testing.assert_allclose(second.intercept, first.intercept, rtol=0, atol=1e-3 * max(scale, 1))


@QUICK
@given(problem=problems, strength=strengths)
def test_heads_of_both_solvers_predict_the_same(problem: Problem, strength: float) -> None:
    features, labels = problem
    heads = [fit_head(features, labels, labels.max() + 1, HeadConfig(solver=name, C=strength)).head for name in SOLVERS]
    first, second = (to_probabilities(head.logits(features)) for head in heads)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-3)
    top = np.sort(first, axis=1)
    clear = top[:, -1] - top[:, -2] > 2e-3
    assert np.array_equal(first.argmax(axis=1)[clear], second.argmax(axis=1)[clear])
    scale = np.abs(heads[0].weight).max(axis=0)  # features differ in scale by orders of magnitude
    np.testing.assert_allclose(heads[1].weight / scale, heads[0].weight / scale, rtol=0, atol=5e-3)


@QUICK
@given(problem=problems, strength=strengths, solver=st.sampled_from(SOLVERS))
def test_the_optimum_is_one(problem: Problem, strength: float, solver: str) -> None:
    """The gradient of the stated objective vanishes, written here once more in plain numpy."""
    features, labels = problem
    x = standardise(features)
    solution = load_solver(solver)(x, labels, C=strength)
    logits = x @ solution.coefficients.T + solution.intercept
    if logits.shape[1] == 1:
        surplus = 1 / (1 + np.exp(-logits)) - labels[:, None]
    else:
        surplus = to_probabilities(logits) - np.eye(labels.max() + 1)[labels]
    gradient = strength * surplus.T @ x + solution.coefficients
    assert np.abs(gradient).max() / (strength * len(x)) < 1e-6
    assert np.abs(surplus.mean(axis=0)).max() < 1e-6


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_head_on_raw_features_is_the_solution_on_standardised_ones(solver: str, n_classes: int) -> None:
    features, labels = make_problem(1, n_classes=n_classes)
    solution = load_solver(solver)(standardise(features), labels, C=0.1)
    head = fit_head(features, labels, n_classes, HeadConfig(solver=solver, C=0.1)).head
    expected = standardise(features) @ solution.coefficients.T + solution.intercept
    logits = head.logits(features)
    found = logits[:, 1:] - logits[:, :1] if n_classes == 2 else logits
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
    assert np.ptp(expected) > 0.5


def test_a_head_gives_the_probabilities_of_plain_scikit_learn() -> None:
    for n_classes in (2, 3):
        features, labels = make_problem(2, n_classes=n_classes)
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, tol=1e-8, max_iter=1000))
        expected = plain.fit(features.astype(np.float64), labels).predict_proba(features.astype(np.float64))
        head = fit_head(features, labels, n_classes, HeadConfig(C=0.3)).head
        np.testing.assert_allclose(to_probabilities(head.logits(features)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_head_is_float32_with_a_row_for_each_class(solver: str, n_classes: int) -> None:
    features, labels = make_problem(3, d=7, n_classes=n_classes)
    head = fit_head(features, labels, n_classes, HeadConfig(solver=solver, C=0.1)).head
    assert (head.weight.dtype, head.weight.shape) == (np.float32, (n_classes, 7))
    assert (head.bias.dtype, head.bias.shape) == (np.float32, (n_classes,))
    assert head.weight.flags.c_contiguous
    assert head.logits(features).dtype == np.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_that_stops_too_early_says_so(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"featcache.heads.{solver}.MAX_ITERATIONS", 2)
    features, labels = make_problem(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = fit_head(features, labels, 3, HeadConfig(solver=solver, C=1.0))
    assert not fitted.converged
    assert fitted.iterations <= 2
    assert caught == []


# --- odd features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_feature_that_never_varies_is_harmless(solver: str, value: float) -> None:
    features, labels = make_problem(5)
    config = HeadConfig(solver=solver, C=0.1)
    plain = fit_head(features, labels, 3, config).head
    constant = np.full((len(features), 1), value, np.float32)
    more = fit_head(np.hstack([features, constant]), labels, 3, config).head
    assert np.isfinite(more.weight).all()
    np.testing.assert_allclose(more.weight[:, -1], 0, atol=1e-6)
    np.testing.assert_allclose(more.logits(np.hstack([features, constant])), plain.logits(features), rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_feature_that_varies_only_elsewhere_does_not_explode(solver: str) -> None:
    features, labels = make_problem(6)
    features[:, 2] = 0.1
    head = fit_head(features, labels, 3, HeadConfig(solver=solver, C=0.1)).head
    moved = features.copy()
    moved[:, 2] = 0.2
    np.testing.assert_allclose(head.logits(moved), head.logits(features), rtol=0, atol=1e-3)


def test_one_feature_and_more_features_than_rows_are_both_well() -> None:
    for d in (1, 200):
        features, labels = make_problem(7, n=20, d=d, n_classes=2)
        first, second = (
            fit_head(features, labels, 2, HeadConfig(C=0.1, solver=name)).head.logits(features) for name in SOLVERS
        )
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-3)


def test_the_scale_of_a_feature_does_not_matter() -> None:
    features, labels = make_problem(8)
    factors = 2.0 ** np.arange(-4, 4).astype(np.float32)
    config = HeadConfig(C=0.1)
    plain, scaled = (fit_head(x, labels, 3, config).head.logits(x) for x in (features, features * factors))
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=1e-3)


# --- the choice of C --------------------------------------------------------------------------------------------------


def cross_validate_plainly(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> float:
    """Log loss of the held-out rows of standardised features, by scikit-learn alone."""
    plain = LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    held_out = cross_val_predict(plain, standardise(features), labels, cv=folds, method="predict_proba")
    return float(log_loss(labels, held_out))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("n_classes", "d"), [(2, 8), (3, 8), (3, 90)])
def test_candidates_have_the_scores_of_a_plain_cross_validation(n_classes: int, d: int, solver: str) -> None:
    features, labels = make_problem(9, d=d, n_classes=n_classes)
    candidates = fit_head(features, labels, n_classes, HeadConfig(grid=GRID, solver=solver)).candidates
    assert tuple(candidate.C for candidate in candidates) == GRID
    expected = [cross_validate_plainly(features, labels, strength) for strength in GRID]
    np.testing.assert_allclose([candidate.log_loss for candidate in candidates], expected, rtol=0.005)
    assert all(0 < candidate.accuracy <= 1 for candidate in candidates)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_least_log_loss_is_taken_whatever_the_accuracies(spread: float) -> None:
    features, labels = make_problem(10, spread=spread)
    fitted = fit_head(features, labels, 3, HeadConfig(grid=GRID))
    best = min(fitted.candidates, key=lambda candidate: candidate.log_loss)
    assert fitted.C == best.C
    assert fitted.selection == "5-fold cross-validation on the training split, least log loss"
    given_c = fit_head(features, labels, 3, HeadConfig(C=best.C)).head
    assert np.array_equal(fitted.head.weight, given_c.weight)


def test_noise_wants_a_small_c_and_plain_classes_a_large_one() -> None:
    chosen = [fit_head(*make_problem(11, spread=spread), 3, HeadConfig(grid=GRID)).C for spread in (0.0, 3.0)]
    assert chosen[0] == GRID[0]
    assert chosen[1] > GRID[1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_features_of_which_none_varies_are_refused(value: float, solver: str) -> None:
    features, labels = np.full((20, 3), value, np.float32), np.array([0] * 15 + [1] * 5)
    with pytest.raises(DatasetError, match="equal features"):
        fit_head(features, labels, 2, HeadConfig(solver=solver))


def test_the_grid_may_come_in_any_order() -> None:
    features, labels = make_problem(20)
    first, second = (fit_head(features, labels, 3, HeadConfig(grid=grid)) for grid in (GRID, GRID[::-1]))
    assert first.C == second.C
    assert np.array_equal(first.head.weight, second.head.weight)


def test_only_the_rows_given_have_a_say() -> None:
    features, labels = make_problem(12, n=90)
    poisoned = features.copy()
    poisoned[60:] = np.nan
    alone = fit_head(features[:60].copy(), labels[:60].copy(), 3, HeadConfig(grid=GRID))
    beside = fit_head(poisoned[:60], labels[:60], 3, HeadConfig(grid=GRID))
    assert alone.candidates == beside.candidates
    assert np.array_equal(alone.head.weight, beside.head.weight)


def test_a_held_out_row_has_no_say_in_its_own_prediction() -> None:
    """Labels that are pure noise are not predicted better than by chance, whatever the number of features."""
    rng = np.random.default_rng(13)
    features, labels = rng.normal(size=(60, 100)).astype(np.float32), rng.permutation(np.arange(60) % 2)
    candidates = fit_head(features, labels, 2, HeadConfig(grid=GRID)).candidates
    assert all(candidate.log_loss > 0.6 and candidate.accuracy < 0.7 for candidate in candidates)


@pytest.mark.parametrize(("smallest", "n_folds"), [(2, 2), (3, 3), (5, 5), (9, 5)])
def test_folds_are_limited_by_the_smallest_class(smallest: int, n_folds: int) -> None:
    features, _ = make_problem(14, n=30 + smallest, n_classes=2)
    labels = np.array([0] * 30 + [1] * smallest)
    fitted = fit_head(features, labels, 2, HeadConfig(grid=GRID))
    assert fitted.selection.startswith(f"{n_folds}-fold cross-validation")


@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1), (20, 1)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_class_of_one_image_falls_back_and_says_so(solver: str, counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.random.default_rng(15).normal(size=(len(labels), 4)).astype(np.float32)
    fitted = fit_head(features, labels, len(counts), HeadConfig(solver=solver))
    assert (fitted.C, fitted.candidates) == (0.01, ())
    assert "a class has a single training image" in fitted.selection
    assert np.isfinite(fitted.head.logits(features)).all()


def test_one_class_is_refused() -> None:
    with pytest.raises(DatasetError, match="at least 2 classes"):
        fit_head(np.zeros((5, 3), np.float32), np.zeros(5, np.int64), 1, HeadConfig())


def test_a_given_c_is_taken_without_a_choice() -> None:
    fitted = fit_head(*make_problem(16), 3, HeadConfig(C=0.7))
    assert (fitted.C, fitted.candidates, fitted.selection) == (0.7, (), "given")


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_rows_give_the_same_head_bit_for_bit(solver: str) -> None:
    features, labels = make_problem(17)
    config, heads = HeadConfig(solver=solver, grid=GRID), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what must not matter
        heads.append(fit_head(features, labels, 3, config))
    assert heads[0].candidates == heads[1].candidates
    assert heads[0].head.weight.tobytes() == heads[1].head.weight.tobytes()
    assert heads[0].head.bias.tobytes() == heads[1].head.bias.tobytes()


def test_the_seed_shuffles_the_folds() -> None:
    features, labels = make_problem(18)
    first, second = (fit_head(features, labels, 3, HeadConfig(grid=GRID, seed=seed)).candidates for seed in (0, 1))
    assert first != second


def test_what_is_given_is_left_as_it_is() -> None:
    features, labels = make_problem(19)
    before = features.copy(), labels.copy()
    fit_head(features, labels, 3, HeadConfig(grid=GRID))
    assert np.array_equal(features, before[0])
    assert np.array_equal(labels, before[1])
