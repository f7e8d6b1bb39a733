"""featcache.heads, from inside: what each solver finds against plain formulas, scikit-learn, and the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

import featcache
from featcache.cache import stream_cache
from featcache.cache.streaming import StreamedFeatures
from featcache.config import HeadConfig
from featcache.heads import coordinates, descent, knn, lbfgs, logistic, ridge, sgd, shuffling, sklearn
from featcache.heads import rows as rows_module
from featcache.heads.calibration import fit_temperature
from featcache.heads.descent import Losses, minimise, scale_by_curvature, start_at_priors
from featcache.heads.logistic import Solution
from featcache.heads.rows import TrainingRows, weigh_images
from featcache.heads.selection import HeldOut, make_folds
from featcache.heads.shuffling import ShuffledRows
from featcache.heads.threads import Threads
from featcache.metrics import to_probabilities

Array = NDArray[Any]
Problem = tuple[NDArray[np.float32], NDArray[np.int64]]
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SOLVE = {"lbfgs": lbfgs.solve, "sklearn": sklearn.solve}
STRENGTHS = (1e-3, 0.03, 0.3, 10.0)


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
    d=st.integers(2, 30) | st.integers(81, 120),
    n_classes=st.integers(2, 5),
    spread=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
)
strengths = st.floats(-3, 1).map(lambda exponent: 10**exponent)


def standardise(features: Array, weights: Array | None = None) -> NDArray[np.float64]:
    values = features.astype(np.float64)
    mean = np.average(values, axis=0, weights=weights)
    return (values - mean) / np.sqrt(np.average(np.square(values - mean), axis=0, weights=weights))


def make_rows(
    features: Any,
    labels: Array,
    *,
    views: Any = None,
    class_weight: str | None = None,
    weights: Array | None = None,
    unit_length: bool = False,
) -> TrainingRows:
    n_classes = int(labels.max()) + 1
    return TrainingRows(
        features=features,
        labels=labels,
        n_classes=n_classes,
        views=views,
        weights=weigh_images(labels, n_classes, class_weight) if weights is None else weights,
        unit_length=unit_length,
    )


def make_views(seed: int, features: NDArray[np.float32], n_views: int) -> NDArray[np.float32]:
    """Views (N, K, D) that lie near the plain features, on their scale."""
    noise = np.random.default_rng(seed).normal(0, 0.5, (len(features), n_views, features.shape[1]))
    return (features[:, None] + noise * features.std(axis=0)).astype(np.float32)


def stack(features: Array, views: Array | None) -> Array:
    """(N V, D), image after image, the plain features first."""
    together = features[:, None] if views is None else np.concatenate([features[:, None], views], axis=1)
    return together.reshape(-1, features.shape[1])


# --- logistic regression: two solvers, one optimum --------------------------------------------------------------------


def find_objective(
    x: Array, labels: Array, strength: float, weights: Array, coefficients: Array, intercept: Array
) -> tuple[float, Array, Array]:
    """The stated objective and its gradient, for the weights and for the intercept, in plain numpy."""
    logits = x @ coefficients.T + intercept
    if logits.shape[1] == 1:
        signed = np.where(labels == 1, 1, -1) * logits[:, 0]
        losses = np.logaddexp(0, -signed)
        surplus = 1 / (1 + np.exp(-logits)) - labels[:, None]
    else:
        losses = -np.log(to_probabilities(logits)[np.arange(len(labels)), labels])
        surplus = to_probabilities(logits) - np.eye(logits.shape[1])[labels]
    surplus = weights[:, None] * surplus
    value = strength * float(weights @ losses) + np.square(coefficients).sum() / 2
    return value, strength * surplus.T @ x + coefficients, strength * surplus.sum(axis=0)


def find_probabilities(x: Array, solution: Solution) -> Array:
    logits = x @ solution.coefficients.T + solution.intercept
    return to_probabilities(np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits)


def centre(intercept: Array) -> Array:
    """The same to all classes is the same to none: of more than two, only the differences are determined."""
    return intercept - intercept.mean() if len(intercept) > 1 else intercept


def check_one_optimum(
    features: Array, labels: Array, strength: float, weights: Array | None, of_intercept: float = 1e-3
) -> None:
    x = standardise(features)
    first, second = (solve(torch.from_numpy(x), labels, C=strength, weights=weights) for solve in SOLVE.values())
    assert first.converged
    assert second.converged
    assert first.coefficients.shape == second.coefficients.shape
    scale = np.abs(second.coefficients).max()
    np.testing.assert_allclose(first.coefficients, second.coefficients, rtol=0, atol=1e-3 * scale)
    np.testing.assert_allclose(
        centre(first.intercept), centre(second.intercept), rtol=0, atol=of_intercept * max(scale, 1)
    )
    np.testing.assert_allclose(find_probabilities(x, first), find_probabilities(x, second), rtol=0, atol=1e-4)


@QUICK
@given(problem=problems, strength=strengths, balanced=st.booleans())
def test_both_solvers_find_the_same_optimum(problem: Problem, strength: float, balanced: bool) -> None:
    features, labels = problem
    weights = weigh_images(labels, labels.max() + 1, "balanced") if balanced else None
    check_one_optimum(features, labels, strength, weights)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("n_classes", "n", "d"), [(2, 300, 12), (4, 300, 12), (3, 40, 90)])
def test_a_fit_in_single_precision_is_near_enough(
    n_classes: int, n: int, d: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lbfgs, "FEW_NUMBERS", 0)
    features, labels = make_problem(21, n=n, d=d, n_classes=n_classes)
    check_one_optimum(features, labels, strength, weigh_images(labels, n_classes, "balanced"), of_intercept=0.01)


@pytest.mark.parametrize("name", SOLVE)
@QUICK
@given(problem=problems, strength=strengths, seed=st.none() | st.integers(0, 99))
def test_the_gradient_of_the_objective_vanishes(problem: Problem, strength: float, seed: int | None, name: str) -> None:
    """The objective is written here once more in plain numpy."""
    features, labels = problem
    x = standardise(features)
    weights = None if seed is None else np.random.default_rng(seed).uniform(0.2, 3, len(labels))
    solution = SOLVE[name](torch.from_numpy(x), labels, C=strength, weights=weights)
    counts = np.ones(len(labels)) if weights is None else weights
    _, of_weights, of_intercept = find_objective(x, labels, strength, counts, solution.coefficients, solution.intercept)
    largest = max(np.abs(of_weights).max(), np.abs(of_intercept).max()) / (strength * counts.sum())
    assert largest < 1e-7
    assert solution.gradient == pytest.approx(largest, rel=0.01, abs=1e-10)


@pytest.mark.parametrize("name", SOLVE)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_row_that_counts_twice_is_a_row_that_is_there_twice(name: str, n_classes: int) -> None:
    features, labels = make_problem(22, n_classes=n_classes)
    x, counts = torch.from_numpy(standardise(features)), np.random.default_rng(22).integers(1, 4, len(labels))
    weighted = SOLVE[name](x, labels, C=0.3, weights=counts.astype(np.float64))
    repeated = SOLVE[name](x[np.repeat(np.arange(len(labels)), counts)], np.repeat(labels, counts), C=0.3)
    plain = SOLVE[name](x, labels, C=0.3)
    np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, rtol=0, atol=1e-5)
    np.testing.assert_allclose(centre(weighted.intercept), centre(repeated.intercept), rtol=0, atol=1e-5)
    assert np.abs(plain.coefficients - weighted.coefficients).max() > 0.01


@QUICK
@given(problem=problems, strength=strengths, seed=st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(problem: Problem, strength: float, seed: int) -> None:
    features, labels = problem
    x, order = standardise(features), np.random.default_rng(seed).permutation(len(labels))
    first = lbfgs.solve(torch.from_numpy(x), labels, C=strength)
    second = lbfgs.solve(torch.from_numpy(x[order]), labels[order], C=strength)
    np.testing.assert_allclose(
        second.coefficients, first.coefficients, rtol=0, atol=1e-4 * np.abs(first.coefficients).max()
    )


@QUICK
@given(problem=problems, strength=strengths, seed=st.integers(0, 99))
def test_a_rotation_of_the_features_rotates_the_solution(problem: Problem, strength: float, seed: int) -> None:
    features, labels = problem
    x = standardise(features)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1])))[0]
    plain = lbfgs.solve(torch.from_numpy(x), labels, C=strength)
    turned = lbfgs.solve(torch.from_numpy(x @ rotation), labels, C=strength)
    scale = np.abs(plain.coefficients).max()
    np.testing.assert_allclose(turned.coefficients @ rotation.T, plain.coefficients, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize(
    ("name", "limit"), [("lbfgs", "descent.MAX_EVALUATIONS"), ("sklearn", "sklearn.MAX_ITERATIONS")]
)
def test_a_solver_that_stops_too_early_says_so(name: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make_problem(23)
    x = torch.from_numpy(standardise(features))
    assert SOLVE[name](x, labels, C=1.0).converged
    monkeypatch.setattr(f"featcache.heads.{limit}", 3)
    solution = SOLVE[name](x, labels, C=1.0)
    assert not solution.converged
    assert solution.gradient > 1e-4
    assert solution.evaluations <= 6  # three in single precision, three more in double


# --- descent: many losses at once -------------------------------------------------------------------------------------


def make_losses(
    seed: int = 0, *, n: int = 90, d: int = 5, n_classes: int = 3, n_ways: int = 2, dtype: torch.dtype = torch.float64
) -> Losses:
    """Every way to count the rows with three penalties; the ways leave out a third of the rows each."""
    features, labels = make_problem(seed, n=n, d=d, n_classes=n_classes)
    rng = np.random.default_rng(seed)
    counts = rng.uniform(0.5, 2, (n_ways, n)) * (rng.integers(0, 3, n) != np.arange(n_ways)[:, None])
    return logistic.make_losses(
        torch.from_numpy(standardise(features)).to(dtype), labels, n_classes, counts, (0.01, 0.3, 10)
    )


def draw_parameters(losses: Losses, seed: int = 0) -> Tensor:
    shape = (len(losses.penalties), losses.n_outputs, losses.features.shape[1] + 1)
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def centre_bias(parameters: Tensor) -> Tensor:
    """As `centre`, of parameters (M, K, R + 1)."""
    if parameters.shape[1] == 1:
        return parameters
    return torch.cat(
        [parameters[..., :-1], parameters[..., -1:] - parameters[..., -1:].mean(dim=1, keepdim=True)], dim=2
    )


def find_loss(losses: Losses, model: int, parameters: Tensor) -> Tensor:
    """The stated loss of one model at parameters (K, R + 1), by torch's own functions."""
    weight, bias = parameters[:, :-1], parameters[:, -1]
    logits = losses.features.double() @ weight.T + bias
    if losses.n_classes == 2:
        each = F.binary_cross_entropy_with_logits(logits[:, 0], losses.labels.double(), reduction="none")
    else:
        each = F.cross_entropy(logits, losses.labels, reduction="none")
    counts = losses.weights[losses.which[model]].double()
    return counts @ each + losses.penalties[model] * weight.square().sum() / 2


@pytest.fixture(params=["in one block", "in many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in many blocks":
        monkeypatch.setattr(descent, "BLOCK_NUMBERS", 1)
        monkeypatch.setattr(descent, "MIN_BLOCK", 16)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_values_and_gradients_are_those_of_autograd(n_classes: int, dtype: torch.dtype) -> None:
    losses = make_losses(n_classes=n_classes, dtype=dtype)
    parameters = draw_parameters(losses)
    values, gradients = losses.evaluate(losses.locate(parameters))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for model, one in enumerate(parameters):
        at = one.clone().requires_grad_()
        loss = find_loss(losses, model, at)
        loss.backward()
        assert float(values[model]) == pytest.approx(float(loss.detach()), rel=tolerance)
        torch.testing.assert_close(gradients[model], at.grad, rtol=0, atol=tolerance * float(at.grad.abs().max()))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_curvature_is_the_diagonal_of_the_hessian(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes)
    parameters = draw_parameters(losses)
    curvature = losses.find_curvature(losses.locate(parameters))
    for model, one in enumerate(parameters):
        shape = one.shape
        hessian = torch.autograd.functional.hessian(
            lambda flat, m=model, s=shape: find_loss(losses, m, flat.view(s)), one.flatten()
        )
        torch.testing.assert_close(curvature[model].flatten(), hessian.diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("n_classes", [2, 4])
def test_slopes_and_curvatures_along_a_direction_are_those_of_autograd(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes)
    parameters = draw_parameters(losses)
    ahead, steps = parameters.roll(1, 0), torch.linspace(0.2, 3, len(parameters), dtype=torch.float64)
    point = losses.locate(parameters)
    direction, slopes, curvatures = losses.look_along(point, ahead, steps, torch.empty_like(point.logits))
    torch.testing.assert_close(direction.logits, losses.locate(ahead).logits)
    for model in range(len(parameters)):

        def along(step: torch.Tensor, m: int = model) -> torch.Tensor:
            return find_loss(losses, m, parameters[m] + step * ahead[m])

        slope = torch.autograd.functional.jacobian(along, steps[model])
        curvature = torch.autograd.functional.hessian(along, steps[model])
        assert float(slopes[model]) == pytest.approx(float(slope), rel=1e-9, abs=1e-12)
        assert float(curvatures[model]) == pytest.approx(float(curvature), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_point_that_was_moved_is_the_one_that_is_located_there(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes)
    parameters, steps = draw_parameters(losses), torch.linspace(0.2, 3, 6, dtype=torch.float64)
    point, direction = losses.locate(parameters), losses.locate(parameters.roll(1, 0))
    moved, *there = losses.move(point, direction, steps, torch.empty_like(point.logits))
    expected = losses.locate(parameters + steps[:, None, None] * parameters.roll(1, 0))
    torch.testing.assert_close(moved.parameters, expected.parameters)
    torch.testing.assert_close(moved.logits, expected.logits)
    for found, evaluated in zip(there, losses.evaluate(expected), strict=True):
        torch.testing.assert_close(found, evaluated)


def test_directions_are_those_of_the_two_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    slopes = torch.randn(3, 7, generator=rng, dtype=torch.float64)
    memory = descent._Memory(slopes, torch.float64)
    pairs: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[] for _ in range(3)]
    half = torch.randn(7, 7, generator=rng, dtype=torch.float64)
    for i in range(descent.REMEMBERED + 4):
        steps = torch.randn(3, 7, generator=rng, dtype=torch.float64)
        changes = steps @ (half @ half.T + torch.eye(7, dtype=torch.float64))
        accepted = torch.tensor([True, i % 3 != 0, False])
        memory.add(steps, changes, accepted)
        for model in accepted.nonzero()[:, 0].tolist():
            pairs[model].append((i, steps[model], changes[model]))
        for model, found in enumerate(memory.find_directions(slopes)):
            remembered = [pair[1:] for pair in pairs[model] if pair[0] > i - descent.REMEMBERED]
            torch.testing.assert_close(found, -find_by_two_loops(slopes[model], remembered), rtol=1e-8, atol=1e-10)


def find_by_two_loops(slope: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Algorithm 7.4 of J. Nocedal and S. J. Wright, Numerical Optimization, 2nd edition 2006."""
    q, alphas = slope.clone(), []
    for step, change in reversed(pairs):
        alphas.append((step @ q) / (step @ change))
        q -= alphas[-1] * change
    if pairs:
        q *= (pairs[-1][0] @ pairs[-1][1]) / (pairs[-1][1] @ pairs[-1][1])
    for (step, change), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - (change @ q) / (step @ change)) * step
    return q


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_start_is_the_best_that_no_feature_gives(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes)
    start = start_at_priors(losses)
    assert not start[..., :-1].any()
    assert losses.evaluate(losses.locate(start))[1][..., -1].abs().max() < 1e-12


def run(losses: Losses, *, tolerance: float = 1e-9, decrease: float = 0.0) -> descent.Minima:
    scale = scale_by_curvature(losses, losses.features.double().square().mean(dim=0))
    return minimise(losses, start_at_priors(losses), scale, tolerance=tolerance, decrease=decrease)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_models_solved_together_are_those_solved_one_by_one(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes, n_ways=3)
    together = run(losses)
    assert (together.gradients <= 1e-9).all()
    assert len(set(together.evaluations.tolist())) > 3  # each of nine is done in its own time
    for model in range(len(losses.penalties)):
        alone = run(losses.select(torch.tensor([model])))
        expected = centre_bias(alone.parameters)[0]
        torch.testing.assert_close(centre_bias(together.parameters)[model], expected, rtol=0, atol=1e-5)
        assert float(together.values[model]) == pytest.approx(float(alone.values[0]), rel=1e-12)
        assert abs(int(together.evaluations[model]) / int(alone.evaluations[0]) - 1) < 0.2


@pytest.mark.parametrize("n_classes", [2, 3])
def test_rows_that_count_nothing_are_as_if_they_were_left_out(n_classes: int) -> None:
    losses = make_losses(n_classes=n_classes)
    found = run(losses)
    for way, counts in enumerate(losses.weights):
        used = counts > 0
        assert not used.all()
        fewer = replace(
            losses,
            features=losses.features[used],
            labels=losses.labels[used],
            weights=counts[used][None],
            which=torch.zeros(3, dtype=torch.int64),
            penalties=losses.penalties[losses.which == way],
        )
        mine = centre_bias(found.parameters[losses.which == way])
        torch.testing.assert_close(mine, centre_bias(run(fewer).parameters), rtol=0, atol=1e-5)


def work_at(losses: Losses, parameters: torch.Tensor) -> list[torch.Tensor]:
    """Everything that is asked of losses at parameters and in a direction from there."""
    point, steps = losses.locate(parameters), torch.linspace(0.1, 0.9, len(parameters), dtype=torch.float64)
    direction, slopes, curvatures = losses.look_along(point, parameters.flip(0), steps, torch.empty_like(point.logits))
    _, *ahead = losses.move(point, direction, steps, torch.empty_like(point.logits))
    return [*losses.evaluate(point), losses.find_curvature(point), slopes, curvatures, *ahead]


@pytest.mark.parametrize("n", [2, 5, 90])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_rows_that_are_shared_out_among_threads_sum_to_the_same(n_classes: int, n: int) -> None:
    losses = make_losses(n_classes=n_classes)
    losses = replace(losses, features=losses.features[:n], labels=losses.labels[:n], weights=losses.weights[:, :n])
    parameters = draw_parameters(losses)
    with ThreadPoolExecutor(3) as pool:
        shared = replace(losses, threads=Threads(3, pool))
        torch.testing.assert_close(shared.locate(parameters).logits, losses.locate(parameters).logits)
        for found, expected in zip(work_at(shared, parameters), work_at(losses, parameters), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_search_among_threads_is_the_same_search(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, used = make_losses(), []
    alone = run(losses)
    share = Threads.share
    monkeypatch.setattr(Threads, "share", lambda self, *arguments: used.append(self._n) or share(self, *arguments))
    monkeypatch.setattr(descent, "MIN_BLOCK", 30)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        among = run(losses)
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    assert set(used) == {3}  # 90 rows, at least 30 each
    torch.testing.assert_close(centre_bias(among.parameters), centre_bias(alone.parameters), rtol=0, atol=1e-5)


def test_values_and_gradients_told_are_those_where_the_search_ended() -> None:
    losses = make_losses()
    for found in (run(losses, tolerance=1e-3), run(losses, tolerance=0, decrease=1e-3)):
        values, gradients = losses.evaluate(losses.locate(found.parameters))
        torch.testing.assert_close(found.values, values, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradients, gradients.abs().amax(dim=(1, 2)), rtol=1e-6, atol=1e-12)


def test_the_gradient_that_ends_a_search_is_that_of_logits_found_anew() -> None:
    losses = make_losses(dtype=torch.float32)
    found = run(losses, tolerance=1e-5)
    assert (found.evaluations < descent.MAX_EVALUATIONS).all()
    for model in range(len(found.parameters)):  # one by one, as rounding depends on how many are found together
        alone = losses.select(torch.tensor([model]))
        end = run(alone, tolerance=1e-5)
        _, gradients = alone.evaluate(alone.locate(end.parameters))
        assert end.gradients[0] == gradients.abs().max() <= 1e-5


def test_a_looser_end_comes_sooner_and_is_never_better() -> None:
    losses = make_losses()
    loose, tight = run(losses, tolerance=0, decrease=1e-2), run(losses)
    assert (loose.evaluations < tight.evaluations).all()
    assert (loose.values >= tight.values).all()
    assert (loose.values < losses.evaluate(losses.locate(start_at_priors(losses)))[0]).all()


def test_one_small_step_is_not_the_end_and_two_in_succession_are() -> None:
    losses = make_losses(n_ways=1)
    search = descent._Search(losses, start_at_priors(losses), torch.ones(3, 3, 6, dtype=torch.float64))
    search._decreases = torch.tensor([1e-6, 0.5, math.inf], dtype=torch.float64)  # inf: a step that was not taken
    assert search.slow(1e-3).tolist() == [1, 0, 0]
    search._decreases = torch.tensor([math.inf, 1e-6, 1e-6], dtype=torch.float64)
    assert search.slow(1e-3).tolist() == [1, 1, 1]
    search._decreases = torch.tensor([1e-6, 0.5, 1e-6], dtype=torch.float64)
    assert search.slow(1e-3).tolist() == [2, 0, 2]
    assert search.slow(0.0).tolist() == [0, 0, 0]


def test_a_search_without_evaluations_left_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = make_losses()
    monkeypatch.setattr(descent, "MAX_EVALUATIONS", 4)
    found = run(losses)
    assert (found.evaluations == 4).all()
    assert (found.gradients > 1e-9).all()
    assert (found.values < losses.evaluate(losses.locate(start_at_priors(losses)))[0]).all()


def test_a_bad_unit_of_the_parameters_costs_steps_and_not_the_optimum() -> None:
    losses = make_losses()
    start = start_at_priors(losses)
    scale = torch.from_numpy(10 ** np.random.default_rng(1).uniform(-2, 2, start.shape))
    found = minimise(losses, start, scale, tolerance=1e-8)
    assert (found.gradients <= 1e-8).all()
    torch.testing.assert_close(centre_bias(found.parameters), centre_bias(run(losses).parameters), rtol=0, atol=1e-4)


# --- the path of C ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few rows, which are solved in all folds together, or many, in single precision, fold by fold."""
    if request.param == "large":
        monkeypatch.setattr(logistic, "SMALL", 0)
    return str(request.param)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize(
    ("n_classes", "n", "d", "spread"), [(2, 80, 8, 1.0), (3, 80, 8, 0.3), (5, 200, 20, 2.0), (3, 40, 100, 0.5)]
)
def test_every_c_of_a_path_is_solved_well_enough(n_classes: int, n: int, d: int, spread: float) -> None:
    features, labels = make_problem(31, n=n, d=d, n_classes=n_classes, spread=spread)
    rows = make_rows(features, labels, class_weight="balanced")
    problem = logistic.make_problem(rows, HeadConfig())
    path = logistic.fit_path(problem, problem.features, labels, rows.weights[None], logistic.GRID)
    assert path.shape == (1, len(logistic.GRID), 1 if n_classes == 2 else n_classes, problem.features.shape[1] + 1)
    x = problem.features.double().numpy()
    for strength, found in list(zip(logistic.GRID, path[0].numpy(), strict=True))[::2]:
        best = lbfgs.solve(torch.from_numpy(x), labels, C=strength, weights=rows.weights, tolerance=1e-10)
        least = find_objective(x, labels, strength, rows.weights, best.coefficients, best.intercept)[0]
        value = find_objective(x, labels, strength, rows.weights, found[:, :-1], found[:, -1])[0]
        assert value / least - 1 < 1e-4, strength
        assert value / least - 1 > -1e-9


def test_few_searches_at_a_time_find_what_many_find(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make_problem(32)
    rows = make_rows(features, labels)
    problem = logistic.make_problem(rows, HeadConfig())
    counts = np.random.default_rng(0).uniform(0.5, 2, (3, len(labels)))
    many = logistic.fit_path(problem, problem.features, labels, counts, logistic.GRID)
    monkeypatch.setattr(logistic, "STATE_BYTES", 20_000)
    few = logistic.fit_path(problem, problem.features, labels, counts, logistic.GRID)
    torch.testing.assert_close(few, many, rtol=0, atol=1e-2)


def score_plainly(x: Array, rows: TrainingRows, folds: Array, strength: float) -> tuple[float, float]:
    """Log loss and accuracy of held-out plain images, by scikit-learn on the standardised rows x (N V, D)."""
    of_row, n_views = np.repeat(folds, rows.n_views), rows.n_views
    labels, weights = np.repeat(rows.labels, n_views), np.repeat(rows.weights, n_views) / n_views
    loss = right = 0.0
    for fold in range(folds.max() + 1):
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
        used, held = of_row != fold, np.flatnonzero(folds == fold)
        probabilities = model.fit(x[used], labels[used], sample_weight=weights[used]).predict_proba(x[held * n_views])
        loss -= rows.weights[held] @ np.log(probabilities[np.arange(len(held)), rows.labels[held]])
        right += rows.weights[held] @ (probabilities.argmax(axis=1) == rows.labels[held])
    return loss / rows.weights.sum(), right / rows.weights.sum()


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize(
    ("solver", "n_classes", "d", "n_views", "class_weight"),
    [
        ("lbfgs", 2, 8, 0, None),
        ("lbfgs", 3, 90, 0, None),
        ("lbfgs", 3, 8, 2, "balanced"),
        ("sklearn", 3, 8, 0, "balanced"),
    ],
)
def test_candidates_have_the_scores_of_a_plain_cross_validation(
    solver: str, n_classes: int, d: int, n_views: int, class_weight: str | None
) -> None:
    features, labels = make_problem(33, d=d, n_classes=n_classes)
    labels = np.concatenate([labels, np.zeros(12, np.int64)])  # one class is larger
    features = np.concatenate([features, features[labels[: len(features)] == 0][:12] * np.float32(1.01)])
    views = make_views(33, features, n_views) if n_views else None
    grid = (1e-3, 1e-2, 1e-1, 1.0)
    rows = make_rows(features, labels, views=views, class_weight=class_weight)
    fitted = featcache.heads.fit_head(
        features,
        labels,
        n_classes,
        HeadConfig(solver=solver, grid=grid, class_weight=class_weight, scaling="standard"),
        views=views,
    )
    folds = make_folds(labels, 5, 0)
    x = standardise(stack(features, views), np.repeat(rows.weights, rows.n_views))
    expected = [score_plainly(x, rows, folds, strength) for strength in grid]
    candidates = fitted.selection.candidates
    assert [one.choice for one in candidates] == [{"C": strength} for strength in grid]
    np.testing.assert_allclose([one.loss for one in candidates], [loss for loss, _ in expected], rtol=0.005)
    np.testing.assert_allclose([one.accuracy for one in candidates], [right for _, right in expected], atol=0.02)


def test_folds_are_stratified_and_every_image_is_in_one() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 5])
    folds = make_folds(labels, 5, 0)
    assert [np.bincount(folds[labels == label]).tolist() for label in range(3)] == [[10] * 5, [4] * 5, [1] * 5]
    assert not np.array_equal(folds, make_folds(labels, 5, 1))
    assert make_folds(np.array([0, 0, 1]), 5, 0) is None


# --- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("n_views", [0, 2])
def test_moments_in_one_pass_are_those_of_numpy(n_views: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_NUMBERS", 1)  # 256 images at a time
    rng = np.random.default_rng(41)
    features = (rng.normal(size=(700, 6)) + offset + np.linspace(0, 3, 700)[:, None]).astype(np.float32)
    views = (features[:, None] + rng.normal(size=(700, n_views, 6))).astype(np.float32) if n_views else None
    rows = make_rows(features, rng.integers(0, 3, 700), views=views, weights=rng.uniform(0.1, 2, 700))
    found = coordinates.standardise(rows, "standard")
    every = stack(features, views).astype(np.float64)
    counts = np.repeat(rows.weights, 1 + n_views)
    mean = np.average(every, axis=0, weights=counts)
    std = np.sqrt(np.average(np.square(every - mean), axis=0, weights=counts))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(found.scale, std, rtol=1e-4)
    one_scale = coordinates.standardise(rows, "none").scale
    np.testing.assert_allclose(one_scale, np.full(6, np.sqrt(np.mean(std**2))), rtol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 40)])
@pytest.mark.parametrize("rotate", [False, True])
def test_rows_in_coordinates_have_their_distances_and_the_way_back_is_the_same_function(
    n: int, d: int, rotate: bool
) -> None:
    features, labels = make_problem(42, n=n, d=d)
    rows = make_rows(features, labels)
    where, tensor = coordinates.find_axes(rows, "standard", rotate=rotate, dtype=torch.float64)
    found = tensor.numpy()
    assert found.shape == (n, min(n - 1, d))  # n centred rows span one axis less
    x = standardise(features)
    np.testing.assert_allclose(found @ found.T, x @ x.T, atol=1e-3)
    np.testing.assert_allclose(where.transform(torch.from_numpy(features), torch.float64), found, atol=1e-6)
    if rotate:
        products = found.T @ found
        assert np.abs(products - np.diag(np.diag(products))).max() < 1e-6 * np.diag(products).max()
    weight, bias = np.random.default_rng(0).normal(size=(3, found.shape[1])), np.arange(3.0)
    raw_weight, raw_bias = where.to_raw(weight, bias)
    np.testing.assert_allclose(features @ raw_weight.T + raw_bias, found @ weight.T + bias, atol=1e-3)


# --- ridge ------------------------------------------------------------------------------------------------------------


def fit_ridge_plainly(x: Array, labels: Array, strength: float, weights: Array | None = None) -> Ridge:
    targets = np.eye(labels.max() + 1)[labels]
    return Ridge(alpha=1 / strength, solver="cholesky").fit(x, targets, sample_weight=weights)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize(("n_classes", "n", "d"), [(2, 70, 8), (4, 70, 8), (3, 30, 90)])
def test_ridge_is_that_of_scikit_learn_for_every_c(n_classes: int, n: int, d: int, class_weight: str | None) -> None:
    features, _ = make_problem(51, n=n, d=d, n_classes=n_classes)
    labels = np.minimum(np.arange(n) % (2 * n_classes), n_classes - 1)  # the last class is the largest
    rows = make_rows(features, labels, class_weight=class_weight)
    x = standardise(features, rows.weights)
    found = ridge.decompose(ridge.RidgeStatistics.collect(rows), "standard")
    for strength in ridge.GRID:
        expected, head = fit_ridge_plainly(x, labels, strength, rows.weights), found.make_head(strength)
        scale = np.abs(expected.coef_).max()
        np.testing.assert_allclose(
            head.weight * features.std(axis=0),
            expected.coef_
            * features.std(axis=0)
            / np.sqrt(
                np.average(
                    np.square(features - np.average(features, axis=0, weights=rows.weights)),
                    axis=0,
                    weights=rows.weights,
                )
            ),
            rtol=0,
            atol=1e-3 * scale,
        )
        np.testing.assert_allclose(head.logits(features), expected.predict(x), rtol=0, atol=1e-3)


def leave_out_plainly(x: Array, labels: Array, weights: Array, strength: float, n_views: int) -> Array:
    """(N, C) scores of each plain image by a fit to all others, an image leaving with all its views; x (N V, D)."""
    found = []
    for image in range(len(labels)):
        used = np.repeat(np.arange(len(labels)) != image, n_views)
        rows, counts = x[used], np.repeat(weights / n_views, n_views)[used]
        targets = np.repeat(np.eye(labels.max() + 1)[labels], n_views, axis=0)[used]
        design = np.hstack([rows, np.ones((len(rows), 1))])
        penalty = np.diag([1 / strength] * x.shape[1] + [0.0])
        solution = np.linalg.solve(
            design.T @ (counts[:, None] * design) + penalty, design.T @ (counts[:, None] * targets)
        )
        found.append(np.append(x[image * n_views], 1) @ solution)
    return np.array(found)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("n_views", [0, 2])
@pytest.mark.parametrize(("n_classes", "d"), [(2, 5), (3, 5), (3, 40)])
def test_leaving_one_out_is_as_good_as_doing_it(n_classes: int, d: int, n_views: int, class_weight: str | None) -> None:
    """Images leave; the coordinates stay those of all."""
    features, _ = make_problem(52, n=24, d=d)
    labels = np.minimum(np.arange(24) % (2 * n_classes), n_classes - 1)
    views = make_views(52, features, n_views) if n_views else None
    rows = make_rows(features, labels, views=views, class_weight=class_weight)
    space, grid = ridge.decompose(ridge.RidgeStatistics.collect(rows), "standard"), (1e-3, 0.1, 10.0)
    candidates, scores = ridge.leave_one_out(rows, space, grid)
    x = standardise(stack(features, views), np.repeat(rows.weights, rows.n_views))
    for strength, candidate, found in zip(grid, candidates, scores, strict=True):
        expected = leave_out_plainly(x, labels, rows.weights, strength, rows.n_views)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
        errors = np.square(expected - np.eye(n_classes)[labels]).mean(axis=1)
        assert candidate.choice == {"C": strength}
        assert candidate.loss == pytest.approx(np.average(errors, weights=rows.weights), rel=1e-4)
        right = expected.argmax(axis=1) == labels
        assert candidate.accuracy == pytest.approx(np.average(right, weights=rows.weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_images_and_classes_that_are_added_are_as_good_as_there_from_the_start(weighted: bool) -> None:
    features, labels = make_problem(53, n=90, d=7, n_classes=4)
    weights = np.random.default_rng(53).uniform(0.5, 2, 90) if weighted else np.ones(90)
    everything = ridge.RidgeStatistics.collect(make_rows(features, labels, weights=weights))
    early = np.flatnonzero(labels < 2)
    added = ridge.RidgeStatistics.collect(make_rows(features[early], labels[early], weights=weights[early]))
    for part in np.array_split(np.flatnonzero(labels >= 2), 3):
        added.add(features[part], labels[part], weights[part] if weighted else None)
    for scaling in ("standard", "none"):
        first, second = everything.solve(0.1, scaling=scaling), added.solve(0.1, scaling=scaling)
        assert first.weight.shape == (4, 7)
        scale = np.abs(first.weight).max(axis=0)
        np.testing.assert_allclose(second.weight / scale, first.weight / scale, rtol=0, atol=1e-4)
        np.testing.assert_allclose(second.logits(features), first.logits(features), rtol=0, atol=1e-4)
    x = standardise(features, weights)
    expected = fit_ridge_plainly(x, labels, 0.1, weights).predict(x)
    np.testing.assert_allclose(added.solve(0.1, scaling="standard").logits(features), expected, rtol=0, atol=1e-3)


def test_statistics_may_begin_with_nothing() -> None:
    features, labels = make_problem(54)
    empty = ridge.RidgeStatistics.make_empty(torch.from_numpy(features[0]))
    empty.add(features, labels)
    expected = ridge.RidgeStatistics.collect(make_rows(features, labels)).solve(0.1).logits(features)
    np.testing.assert_allclose(empty.solve(0.1).logits(features), expected, rtol=0, atol=1e-4)


# --- gradient steps on a stream ---------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 10 rows of 4 float32, 10 of them in the buffer."""
    monkeypatch.setattr(shuffling, "CHUNK_BYTES", 160)
    monkeypatch.setattr(shuffling, "BUFFER_BYTES", 1600)


def make_numbered(n: int, dtype: Any = np.float32) -> NDArray[Any]:
    """(n, 4), the number of the image in every feature."""
    return np.repeat(np.arange(n), 4).reshape(n, 4).astype(dtype)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_views", [0, 2])
@pytest.mark.parametrize("n", [1, 7, 100, 1003])
def test_an_epoch_is_every_image_once_with_its_own_features(n: int, n_views: int, dtype: Any) -> None:
    features = make_numbered(n, dtype)
    views = features[:, None] + np.arange(1, n_views + 1, dtype=dtype)[:, None] if n_views else None
    stream = ShuffledRows(make_rows(features, np.zeros(n, np.int64), views=views), 32, 0)
    for _ in range(2):
        batches = list(stream.epoch())
        images = torch.cat([images for images, _ in batches])
        assert sorted(images.tolist()) == list(range(n))
        assert abs(len(batches) - len(stream)) <= (n * (1 + n_views) > 100)  # what fits into the buffer is exact
        assert max(len(images) for images, _ in batches) <= 32
        for images, rows in batches:
            assert rows.shape == (len(images), 1 + n_views, 4)
            expected = stack(features, views).reshape(n, 1 + n_views, 4)[images.numpy()]
            assert rows.numpy().dtype == dtype
            assert np.array_equal(rows.numpy(), expected)


@pytest.mark.usefixtures("small_chunks")
def test_every_epoch_has_an_order_of_its_own_and_the_seed_decides_it() -> None:
    rows = make_rows(make_numbered(500), np.zeros(500, np.int64))

    def draw(seed: int) -> list[list[int]]:
        stream = ShuffledRows(rows, 32, seed)
        return [torch.cat([images for images, _ in stream.epoch()]).tolist() for _ in range(2)]

    first, second = draw(0)
    assert first != second
    assert first != sorted(first)
    assert draw(0) == [first, second]
    assert draw(1)[0] != first
    torch.manual_seed(5)
    assert draw(0) == [first, second]


@pytest.mark.usefixtures("small_chunks")
def test_batches_of_a_sorted_cache_mix_its_classes() -> None:
    labels = np.repeat(np.arange(20), 50)
    stream = ShuffledRows(make_rows(make_numbered(1000), labels), 32, 0)
    for images, _ in stream.epoch():
        if len(images) == 32:
            assert len(set(labels[images].tolist())) >= 5


def test_the_buffer_is_written_by_nobody_while_a_batch_is_in_use(
    small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer may keep its batches, and be slower or faster than the reader."""
    features = make_numbered(600)
    path = tmp_path / "rows"
    path.write_bytes(features.tobytes())
    with path.open("rb", buffering=0) as stream:
        streamed = StreamedFeatures(stream, 0, features.shape, features.dtype, path)
        kept = list(ShuffledRows(make_rows(streamed, np.zeros(600, np.int64)), 16, 3).epoch())
    for images, rows in kept:
        assert np.array_equal(rows[:, 0].numpy(), features[images.numpy()])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 600 rows of three classes, sorted, in two caches of different precision."""
    features, labels = make_problem(61, n=600, d=10, spread=0.6)
    order, folder, found = np.argsort(labels, kind="stable"), tmp_path_factory.mktemp("stored"), {}
    features = standardise(features).astype(np.float32)
    np.savez(folder / "table.npz", features=features[order], labels=labels[order])
    for store in ("float32", "float16"):
        found[store] = folder / f"{store}.h5"
        featcache.import_features(folder / "table.npz", found[store], store=store)
    return found


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("where", ["memory", "float32", "float16"])
def test_a_stream_leads_near_the_optimum(where: str, stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are small, so that there is something to average."""
    monkeypatch.setattr(sgd, "SMALL_STEPS", 400)
    config = HeadConfig(solver="sgd", C=0.01, batch_size=64)
    plain = featcache.read_cache(stored["float32"]).splits["train"]
    features, labels = plain.features, plain.listing.labels
    best = featcache.heads.fit_head(features, labels, 3, replace(config, solver="lbfgs")).head
    if where == "memory":
        fitted = featcache.heads.fit_head(features, labels, 3, config)
    else:
        with stream_cache(stored[where]) as cache:
            train = cache.splits["train"]
            assert isinstance(train.features, StreamedFeatures)
            fitted = featcache.heads.fit_head(train.features, labels, 3, config)
    expected, found = (to_probabilities(head.logits(features)) for head in (best, fitted.head))
    assert np.abs(found - expected).max() < 0.06
    assert np.abs(found - expected).mean() < 0.01
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.98
    assert fitted.evaluations >= 400  # few rows have many epochs


def test_rows_of_a_file_are_chosen_among_as_rows_in_memory_are(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sgd, "SMALL_STEPS", 50)
    config = HeadConfig(solver="sgd", grid=(1e-3, 1e-2, 1e-1))
    plain = featcache.read_cache(stored["float32"]).splits["train"]
    expected = featcache.heads.fit_head(plain.features, plain.listing.labels, 3, config).selection
    with stream_cache(stored["float32"]) as cache:
        train = cache.splits["train"]
        found = featcache.heads.fit_head(train.features, train.listing.labels, 3, config).selection
    assert found == expected
    assert len(found.candidates) == 3


@pytest.mark.parametrize("select_on", ["cv", "val"])
def test_c_is_chosen_on_the_stream_too_where_rows_are_many(select_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are few images with many features, so that a fit is far better on what it has seen."""
    monkeypatch.setattr(sgd, "LARGE", 0)
    monkeypatch.setattr(sgd, "SMALL_STEPS", 600)
    grid = (1e-3, 1e-2, 1e-1)
    features, labels = make_cloud(63, n=200, d=60)
    features = 0.5 * features + np.random.default_rng(63).normal(size=features.shape).astype(np.float32)
    images = np.arange(200)
    config = HeadConfig(solver="sgd", grid=grid, batch_size=64)
    if select_on == "val":
        held, used = HeldOut(features=features[120:], labels=labels[120:]), images < 120
        selection = featcache.heads.fit_head(features[:120], labels[:120], 3, config, validation=held).selection
        mean, std = features[:120].mean(axis=0), features[:120].std(axis=0)
    else:
        used = ~sgd.hold_out(labels, config)
        selection = featcache.heads.fit_head(features, labels, 3, config).selection
        mean, std = features.mean(axis=0), features.std(axis=0)
    x, expected = (features - mean) / std, []
    for strength in grid:
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x[used], labels[used])
        losses = -np.log(model.predict_proba(x)[images, labels])
        expected.append(losses[~used].mean())
    assert expected[-1] > 1.5 * losses[used].mean()
    np.testing.assert_allclose([one.loss for one in selection.candidates], expected, rtol=0.03)
    assert selection.choice["C"] == grid[int(np.argmin(expected))]
    words = "on the validation split, least log loss: its accuracy is optimistic"
    on_a_share = "on 1 / 5 of the training split, held out, least log loss"
    assert selection.procedure == (words if select_on == "val" else on_a_share)


def test_images_that_choose_are_drawn_and_leave_one_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(11), [1000] + [1] * 10))
    out = sgd.hold_out(labels, HeadConfig(folds=4))
    assert 0.2 < out.mean() < 0.3
    assert not out[labels > 0].any()
    assert not np.array_equal(out, sgd.hold_out(labels, HeadConfig(folds=4, seed=1)))


def test_nothing_is_chosen_on_a_stream_where_nothing_can_be_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgd, "LARGE", 0)
    monkeypatch.setattr(sgd, "SMALL_STEPS", 20)
    features, labels = make_cloud(64, n=5, n_classes=5)
    selection = featcache.heads.fit_head(features, labels, 5, HeadConfig(solver="sgd")).selection
    assert (selection.choice, selection.candidates) == ({"C": 0.01}, ())
    assert "a class has a single training image" in selection.procedure


def test_the_last_step_of_all_is_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of steps that is too large would end the schedule half way."""
    shares: list[float] = []
    monkeypatch.setattr(sgd, "SMALL_STEPS", 50)
    monkeypatch.setattr(sgd, "find_rate", lambda share: shares.append(share) or 0.1)
    for batch_size in (16, 60, 1000):
        shares.clear()
        features, labels = make_problem(62)
        featcache.heads.fit_head(features, labels, 3, HeadConfig(solver="sgd", C=0.1, batch_size=batch_size))
        assert shares[0] == 0
        assert shares[-1] == 1


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [sgd.find_rate(step / 100) for step in range(101)]
    top = int(np.argmax(rates))
    assert top == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1)
    assert 0 < rates[0] < 0.01
    assert rates[-1] == pytest.approx(0, abs=1e-12)


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def vote_plainly(
    bank: Array, labels: Array, weights: Array, queries: Array, k: int, temperature: float, allowed: Array | None = None
) -> Array:
    """Probabilities (n, C) by a loop over queries; `allowed` (n, N) says which rows may vote for which query."""
    n_classes, found = labels.max() + 1, []
    bank, queries = bank.astype(np.float64), queries.astype(np.float64)
    for i, query in enumerate(queries):
        cosines = bank @ query / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        if allowed is not None:
            cosines[~allowed[i]] = -np.inf
        nearest = [j for j in np.argsort(-cosines, kind="stable")[:k] if cosines[j] > -np.inf]
        votes = np.full(n_classes, 1 / n_classes)
        for j in nearest:
            votes[labels[j]] += weights[j] * math.exp((cosines[j] - cosines[nearest[0]]) / temperature)
        found.append(votes / votes.sum())
    return np.array(found)


def make_cloud(seed: int, n: int = 60, d: int = 6, n_classes: int = 3, draw: int = 0) -> Problem:
    """Overlapping clouds on axes of one scale; each draw is of other images of the same classes."""
    centres, rng = np.random.default_rng(seed).normal(0, 1, (n_classes, d)), np.random.default_rng([seed, draw])
    labels = rng.permutation(np.arange(n) % n_classes)
    return (centres[labels] + rng.normal(0, 1, (n, d))).astype(np.float32), labels


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.05), (7, 1.0), (10_000, 0.2)])
def test_neighbours_vote_as_a_plain_loop_lets_them(k: int, temperature: float, class_weight: str | None) -> None:
    features, labels = make_cloud(71)
    labels = np.minimum(labels, 1)  # one class is twice as large
    queries = make_cloud(72, n=25)[0]
    config = HeadConfig(solver="knn", k=k, temperature=temperature, class_weight=class_weight)
    fitted = featcache.heads.fit_head(features, labels, 2, config)
    weights = weigh_images(labels, 2, class_weight)
    expected = vote_plainly(features, labels, weights, queries, k, temperature)
    np.testing.assert_allclose(to_probabilities(fitted.head.logits(queries)), expected, rtol=0, atol=1e-4)
    assert fitted.selection.choice == {"k": k, "temperature": temperature}
    assert fitted.selection.procedure == "given"
    assert fitted.selection.candidates == ()


def test_neighbours_are_found_in_many_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make_cloud(73)
    config = HeadConfig(solver="knn")
    one = featcache.heads.fit_head(features, labels, 3, config)
    expected = one.head.logits(features)
    monkeypatch.setattr(knn, "BLOCK_SIMILARITIES", 7 * len(features))
    many = featcache.heads.fit_head(features, labels, 3, config)
    np.testing.assert_allclose(many.head.logits(features), expected, rtol=0, atol=1e-5)
    assert many.selection.choice == one.selection.choice
    assert one.head.logits(features[:0]).shape == (0, 3)


@pytest.mark.parametrize("n_views", [0, 2])
def test_neighbours_of_the_same_fold_and_views_of_the_same_image_do_not_vote(n_views: int) -> None:
    features, labels = make_cloud(74, n=40)
    views = (
        features[:, None] + np.float32(1e-3) * make_cloud(75, n=40 * n_views)[0].reshape(40, n_views, 6)
        if n_views
        else None
    )
    fitted = featcache.heads.fit_head(
        features, labels, 3, HeadConfig(solver="knn", class_weight="balanced"), views=views
    )
    bank, weights = stack(features, views), np.repeat(weigh_images(labels, 3, "balanced"), 1 + n_views)
    folds, of_row = make_folds(labels, 5, 0), np.repeat(make_folds(labels, 5, 0), 1 + n_views)
    allowed = folds[:, None] != of_row
    assert len(fitted.selection.candidates) == len(knn.TEMPERATURES) * sum(k <= len(bank) for k in knn.NEIGHBOURS)
    for candidate in fitted.selection.candidates:
        if candidate.choice["temperature"] in (0.05, 1.0) and candidate.choice["k"] in (1, 5, 20):
            k, temperature = int(candidate.choice["k"]), candidate.choice["temperature"]
            expected = vote_plainly(bank, np.repeat(labels, 1 + n_views), weights, features, k, temperature, allowed)
            losses = -np.log(expected[np.arange(40), labels])
            assert candidate.loss == pytest.approx(np.average(losses, weights=weights[:: 1 + n_views]), rel=1e-4)


def test_what_is_chosen_of_neighbours_has_the_least_log_loss() -> None:
    features, labels = make_cloud(76)
    for given_values, n in (({}, 49), ({"k": 5}, 7), ({"temperature": 0.3}, 7)):
        selection = featcache.heads.fit_head(features, labels, 3, HeadConfig(solver="knn", **given_values)).selection
        assert len(selection.candidates) == n  # 7 numbers of neighbours up to 60, 7 temperatures
        assert selection.choice == min(selection.candidates, key=lambda one: one.loss).choice
        assert given_values.items() <= selection.choice.items()
        assert selection.procedure == "5-fold cross-validation on the training split, least log loss"


def test_only_so_many_images_choose_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "MAX_QUERIES", 10)
    features, labels = make_cloud(77)
    candidates = featcache.heads.fit_head(features, labels, 3, HeadConfig(solver="knn")).selection.candidates
    assert {round(one.accuracy * 10, 6) for one in candidates} <= set(range(11))


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0, 7.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_known_temperature_is_found(n_classes: int, temperature: float) -> None:
    rng = np.random.default_rng(81)
    true = rng.normal(0, 1.5, (20_000, n_classes))
    labels = (true + rng.gumbel(size=true.shape)).argmax(axis=1)  # drawn with the probabilities of their softmax
    assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_a_temperature_has_the_least_log_loss_of_all() -> None:
    """With one half of an image in N + 1 taken to be of each of the other classes alike."""
    rng = np.random.default_rng(82)
    logits, labels, weights = rng.normal(0, 4, (200, 3)), rng.integers(0, 3, 200), rng.uniform(0.1, 2, 200)
    labels = np.where(rng.random(200) < 0.5, logits.argmax(axis=1), labels)
    targets = np.eye(3)[labels]
    targets = (1 - 0.5 / 201) * targets + 0.5 / 201 * (1 - targets) / 2

    def loss(temperature: float, counts: Array) -> float:
        return -float(counts @ (targets * np.log(to_probabilities(logits / temperature))).sum(axis=1))

    for counts in (None, weights):
        found = fit_temperature(logits, labels, counts)
        one = np.ones(200) if counts is None else counts
        assert all(loss(found, one) <= loss(found * factor, one) + 1e-4 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))
    assert fit_temperature(logits, labels) != fit_temperature(logits, labels, weights)


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("n", [10, 1000])
def test_images_that_are_all_right_make_nobody_certain(n: int, n_classes: int) -> None:
    labels = np.arange(n) % n_classes
    logits = 30.0 * np.eye(n_classes)[labels]
    found = to_probabilities(logits / fit_temperature(logits, labels))
    np.testing.assert_allclose(1 - found[np.arange(n), labels], 0.5 / (n + 1), rtol=0.02)


@pytest.mark.parametrize("value", [0.0, 1e-15, 3.0, 1e100])
def test_logits_that_say_nothing_have_a_temperature_too(value: float) -> None:
    labels = np.arange(12) % 3
    for logits in (np.full((12, 3), value), value * np.eye(3)[labels], value * np.eye(3)[labels[::-1]]):
        assert 0 < fit_temperature(logits, labels) < math.inf
