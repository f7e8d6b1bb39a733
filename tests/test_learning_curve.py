"""featcache.stages.learning_curve: growing parts of the training split, honestly judged, and what they foretell."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from test_solvers import make_cloud, make_views

from featcache.cache import FeatureCache
from featcache.cache.contents import FeatureSplit
from featcache.config import HeadConfig
from featcache.dataset import Split
from featcache.errors import DatasetError
from featcache.metrics import PowerLaw
from featcache.progress import SILENT
from featcache.stages import learning_curve
from featcache.stages.learning_curve import Curve, learn_curve, list_parts, list_sizes

pytestmark = pytest.mark.usefixtures("one_thread", "blank_figures")
EASY: dict[str, Any] = {"solver": "lbfgs", "C": 0.1, "repeats": 1}


def make_cache(features: Any, labels: Any, views: Any = None, val: Any = None) -> FeatureCache:
    """A cache in memory; nothing but the training split need be there."""

    def make_split(features: Any, labels: Any, views: Any = None) -> FeatureSplit:
        paths = tuple(map(str, range(len(labels))))
        return FeatureSplit(listing=Split(paths=paths, labels=labels, digests=paths), features=features, views=views)

    splits = {"train": make_split(features, labels, views)} | ({"val": make_split(*val)} if val else {})
    classes = tuple(f"class {i}" for i in range(labels.max() + 1))
    return FeatureCache(classes=classes, extractor={}, splits=splits, provenance={})


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws and fits take milliseconds each."""
    monkeypatch.setattr(learning_curve, "RESAMPLED", 5)
    monkeypatch.setattr(learning_curve, "N_SIZES", 4)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every head of a curve is fitted to and with."""
    seen: list[dict[str, Any]] = []
    fit_head = learning_curve.fit_head

    def spy(features: Any, labels: Any, n_classes: int, config: HeadConfig, *, views: Any = None) -> Any:
        seen.append({"features": features, "labels": labels, "config": config, "views": views})
        return fit_head(features, labels, n_classes, config, views=views)

    monkeypatch.setattr(learning_curve, "fit_head", spy)
    return seen


# The parts


@pytest.mark.parametrize(("n", "n_classes", "folds"), [(60, 3, 5), (37, 2, 4), (1000, 10, 5), (12, 3, 2)])
def test_sizes_grow_by_one_factor_up_to_what_the_folds_leave(
    n: int, n_classes: int, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.arange(n) % n_classes
    monkeypatch.setattr(learning_curve, "N_SIZES", 8)
    sizes = list_sizes(labels, n_classes, HeadConfig(folds=folds))
    assert sizes[0] == min(2 * n_classes, n - n // folds)
    assert sizes[-1] == n - -(-n // folds)
    assert len(sizes) <= 8
    assert (np.diff(sizes) > 0).all()
    if n == 1000:
        factors = sizes[1:] / sizes[:-1]
        assert factors.max() / factors.min() < 1.05


@pytest.mark.parametrize("counts", [(20, 20, 20), (50, 7, 3), (2, 2)])
def test_no_part_holds_an_image_that_it_is_judged_by_and_every_class_is_in_it(counts: tuple[int, ...]) -> None:
    labels, config = np.repeat(np.arange(len(counts)), counts), HeadConfig(repeats=2)
    sizes = list_sizes(labels, len(counts), config)
    parts = list(list_parts(labels, len(counts), sizes, config))
    n_folds = min(5, *counts)
    assert len(parts) == 2 * n_folds * len(sizes)
    for _, row, images, held in parts:
        assert not set(images.tolist()) & set(held.tolist())
        assert len(set(images.tolist())) == len(images)
        assert np.array_equal(images, np.sort(images))
        assert set(labels[images].tolist()) == set(range(len(counts)))
        expected = len(images) * np.array(counts) / sum(counts)
        assert np.abs(np.bincount(labels[images], minlength=len(counts)) - expected).max() <= len(counts)
        assert sizes[row] - 1 <= len(images) <= max(sizes[row], len(counts))
    judged = np.concatenate([held for _, row, _, held in parts if row == 0])
    assert np.bincount(judged).tolist() == [2] * len(labels)  # every image once in each repeat
    for smaller, larger in itertools.pairwise(parts):
        if smaller[1] + 1 == larger[1]:
            assert set(smaller[2].tolist()) <= set(larger[2].tolist())


def test_repeats_draw_other_folds_and_the_seed_decides_them() -> None:
    labels = np.arange(60) % 3

    def draw(seed: int) -> list[list[int]]:
        parts = list_parts(labels, 3, np.array([6]), HeadConfig(repeats=2, seed=seed))
        return [images.tolist() for _, _, images, _ in parts]

    first = draw(0)
    assert first == draw(0)
    assert first[:5] != first[5:]
    assert first != draw(1)


# The curve


def test_more_images_are_better_where_there_is_something_to_learn() -> None:
    features, labels = make_cloud(1, n=200, d=20)
    curve = learn_curve(make_cache(features * 0.7, labels), HeadConfig(**EASY), SILENT)
    rows = curve.list_rows()
    assert [row["images"] for row in rows] == curve.sizes.tolist()
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.05
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in rows)
    assert curve.right.shape == (len(curve.sizes), 200)
    assert ((curve.right >= 0) & (curve.right <= 1 + 1e-12)).all()
    assert curve.law is not None
    assert [size for size, *_ in curve.further] == [400, 800]
    for _, accuracy, low, high in curve.further:
        assert 0 <= low <= high <= 1
        assert low - 0.02 <= accuracy <= high + 0.02


def test_labels_that_are_noise_are_learned_by_nobody() -> None:
    features, _ = make_cloud(2, n=120)
    curve = learn_curve(
        make_cache(features, np.random.default_rng(2).permutation(np.arange(120) % 2)), HeadConfig(**EASY), SILENT
    )
    assert np.abs(curve.right.mean(axis=1) - 0.5).max() < 0.17


def test_the_last_point_is_a_plain_cross_validation(fits: list[dict[str, Any]]) -> None:
    features, labels = make_cloud(3, n=75)
    curve = learn_curve(make_cache(features, labels), HeadConfig(**EASY), SILENT)
    folds = learning_curve.make_folds(labels, 5, 0)
    right = 0
    for fold in range(5):
        head = learning_curve.fit_head(features[folds != fold], labels[folds != fold], 3, HeadConfig(**EASY)).head
        right += (head.logits(features[folds == fold]).argmax(axis=1) == labels[folds == fold]).sum()
    assert curve.right[-1].mean() == pytest.approx(right / 75)


def test_the_validation_split_has_no_say() -> None:
    features, labels = make_cloud(4)
    poison = np.full_like(features, np.nan), labels
    config = HeadConfig(**EASY, select_on="val", calibrate=True)
    alone, beside = (
        learn_curve(make_cache(features, labels, val=val), config, SILENT).describe() for val in (None, poison)
    )
    assert alone == beside


def test_c_is_chosen_within_the_first_part_of_each_size_in_every_repeat(fits: list[dict[str, Any]]) -> None:
    features, labels = make_cloud(5)
    config = HeadConfig(solver="lbfgs", repeats=2, grid=(0.001, 0.1, 10.0))
    curve = learn_curve(make_cache(features, labels), config, SILENT)
    n = len(curve.sizes)
    assert len(fits) == 2 * 5 * n
    for mine in (fits[: 5 * n], fits[5 * n :]):
        assert all(one["config"].C is None for one in mine[:n])
        for row in range(n):
            (chosen,) = {one["config"].C for one in mine[n + row :: n]}
            assert chosen in (0.001, 0.01, 0.1, 10.0)


@pytest.mark.parametrize("solver", ["ridge", "knn", "sgd"])
def test_other_solvers_have_a_curve_too(
    solver: str, fits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.sgd.SMALL_STEPS", 20)
    features, labels = make_cloud(6)
    curve = learn_curve(make_cache(features, labels), HeadConfig(solver=solver, repeats=1, folds=3), SILENT)
    assert curve.right[-1].mean() > 0.5
    if solver == "knn":
        assert all(isinstance(one["config"].k, int) and one["config"].temperature for one in fits[len(curve.sizes) :])


def test_an_image_leaves_with_its_views(fits: list[dict[str, Any]]) -> None:
    features, labels = make_cloud(7)
    views = make_views(7, features, 2)
    learn_curve(make_cache(features, labels, views), HeadConfig(**EASY, views=True), SILENT)
    for one in fits:
        where = [np.flatnonzero((features == row).all(axis=1))[0] for row in one["features"]]
        assert np.array_equal(one["views"], views[where])
        assert np.array_equal(one["labels"], labels[where])
    fits.clear()
    learn_curve(make_cache(features, labels, views), HeadConfig(**EASY, views=False), SILENT)
    assert all(one["views"] is None for one in fits)


def test_a_class_of_one_image_is_refused() -> None:
    with pytest.raises(DatasetError, match="--curve holds training images out, and a class has a single one"):
        learn_curve(make_cache(make_cloud(8, n=4)[0], np.array([0, 0, 0, 1])), HeadConfig(**EASY), SILENT)


def test_few_images_have_points_and_no_law() -> None:
    features, labels = make_cloud(9, n=8, n_classes=2)
    curve = learn_curve(make_cache(features, labels), HeadConfig(**EASY), SILENT)
    assert len(curve.sizes) < 4
    assert curve.law is None
    assert curve.describe()["law"] is None
    assert curve.describe()["forecast"] == []
    assert "too few sizes to say what more would bring" in curve.say()


def test_the_same_curve_comes_out_twice() -> None:
    cache = make_cache(*make_cloud(10))
    first, second, other = (learn_curve(cache, HeadConfig(**EASY, seed=seed), SILENT).describe() for seed in (0, 0, 1))
    assert first == second
    assert first != other


# The verdict


@pytest.mark.parametrize(
    ("further", "verdict"),
    [((0.95, 0.93, 0.97), "would help"), ((0.93, 0.89, 0.96), "may help"), ((0.902, 0.88, 0.909), "would hardly help")],
)
def test_the_verdict_is_what_the_interval_allows(further: tuple[float, float, float], verdict: str) -> None:
    law = PowerLaw(floor=0.1, factor=0.0, power=1.0)  # 90 % for any number of images
    curve = Curve(
        sizes=np.array([10, 80]),
        right=np.array([[0.5] * 100, [1.0] * 88 + [0.0] * 12]),
        law=law,
        further=[(200, *further), (400, *further)],
    )
    expected = f"learning curve: 88.0% with 80 training images; twice as many as there are (200) {verdict}: "
    assert curve.say().startswith(expected)
    assert f"{further[0]:.1%} expected, 95 % interval {further[1]:.1%} to {further[2]:.1%}" in curve.say()
    described = curve.describe()
    assert described["forecast"][0] == dict(zip(("images", "accuracy", "low", "high"), (200, *further), strict=True))
    assert described["law"] == {"floor": 0.1, "factor": 0.0, "power": 1.0}
    assert described["verdict"] == curve.say()
