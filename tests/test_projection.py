"""featcache.projection: deterministic maps that keep groups apart, of any number of images."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import MissingExtraError, SettingsError
from featcache.projection import draw_in_proportion, project


def make_groups(n: int = 60, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Two groups far from one another, as float16, which caches may hold."""
    labels = np.arange(n) % 2
    features = np.random.default_rng(0).normal(size=(n, width)) + 12 * labels[:, None]
    return features.astype(np.float16), labels


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_groups_stay_apart_and_the_map_is_the_same_again(method: str) -> None:
    features, labels = make_groups()
    first, second = (project(features, labels, method=method) for _ in range(2))
    np.testing.assert_array_equal(first.coordinates, second.coordinates)
    assert first.coordinates.shape == (60, 2)
    middles = [first.coordinates[labels == label].mean(axis=0) for label in (0, 1)]
    spread = max(first.coordinates[labels == label].std() for label in (0, 1))
    assert np.linalg.norm(middles[0] - middles[1]) > spread
    assert "60 images" in first.note


def test_the_note_says_the_share_of_the_variance() -> None:
    features = np.diag([3.0, 4.0, 0.0]).repeat(2, axis=0) * np.array([1, -1] * 3)[:, None]
    assert project(features, np.zeros(6, np.int64)).note == "PCA, 100 % of the variance; 6 images"


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize(("n", "width"), [(4, 3), (5, 1), (7, 400), (120, 2)])
def test_few_images_and_few_features_have_a_map(method: str, n: int, width: int) -> None:
    features, labels = make_groups(n, width)
    found = project(features, labels, method=method)
    assert found.coordinates.shape == (n, 2)
    assert np.isfinite(found.coordinates).all()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_equal_features_are_one_point(method: str) -> None:
    found = project(np.ones((10, 8)), np.zeros(10, np.int64), method=method)
    assert np.ptp(found.coordinates) == 0


def test_of_many_images_each_class_has_its_share() -> None:
    features, labels = make_groups(3000)
    labels[:300] = 2
    found = project(features, labels, limit=100)
    assert np.bincount(labels[found.rows]).tolist() == [45, 45, 10]
    assert found.note.endswith("100 of 3,000 images")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(1, 50))
def test_draws_are_exact_distinct_and_ascending(labels: list[int], limit: int) -> None:
    rows = draw_in_proportion(np.array(labels), limit)
    assert len(rows) == min(limit, len(labels))
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, draw_in_proportion(np.array(labels), limit))


def test_an_unknown_map_and_too_few_images_are_errors() -> None:
    with pytest.raises(SettingsError, match="expected one of pca, tsne, umap"):
        project(np.ones((9, 2)), np.zeros(9, np.int64), method="lda")
    with pytest.raises(SettingsError, match="there are 3; use pca"):
        project(np.ones((3, 2)), np.zeros(3, np.int64), method="tsne")


def test_umap_that_is_not_installed_is_an_error_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[umap\]'"):
        project(*make_groups(), method="umap")


def test_umap_gets_few_directions_a_seed_and_neighbours_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self, **settings: object) -> None:
            self.settings = settings
            asked.append(settings)

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            shapes.append(features.shape)
            return features[:, :2].astype(np.float32)

    asked: list[dict[str, object]] = []
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Recorder))
    found = project(*make_groups(10, 300), method="umap", seed=5)
    assert asked == [{"n_neighbors": 9, "init": "random", "random_state": 5, "n_jobs": 1}]
    assert shapes == [(10, 10)]
    assert (found.method, found.note) == ("UMAP", "UMAP, 9 neighbours; 10 images")
