"""Predictions -> what is shown of them: classes that are confused, or differ most, images that tell arms apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from featcache.metrics import Scores, confusion_matrix
from featcache.pages.values import ArmView

CONFUSED = 15  # pairs of classes in a table
SHOWN_CLASSES = 30  # rows of the table of classes before it is cut
SHOWN_IMAGES = 24
FIRST_ARMS = 3  # every ordered pair of which is shown


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images that say something about two arms.

    Attributes
    ----------
    right, wrong
        Indices of arms.
    rows
        Of the reported images, the most confident first; at most 24.
    n
        How many there are in all.
    """

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    rows: list[int]
    n: int


def count_confusions(arm: ArmView, n_classes: int) -> NDArray[np.int64]:
    """Counts (C, C), true class by row."""
    return confusion_matrix(arm.predictions.labels, arm.predictions.predicted, n_classes)


def rank_confusions(matrices: Sequence[NDArray[np.int64]], limit: int = CONFUSED) -> list[tuple[int, int, list[int]]]:
    """The (true, predicted) classes that all arms together confuse most, with each arm's count.

    >>> rank_confusions([np.array([[5, 2], [1, 4]])])
    [(0, 1, [2]), (1, 0, [1])]
    """
    total = np.sum(matrices, axis=0)
    np.fill_diagonal(total, 0)
    order = np.argsort(-total, axis=None, kind="stable")[:limit]
    cells = [divmod(int(cell), len(total)) for cell in order if total.flat[cell]]
    return [(true, guess, [int(one[true, guess]) for one in matrices]) for true, guess in cells]


def choose_classes(scores: Sequence[Scores], limit: int = SHOWN_CLASSES) -> list[int]:
    """The classes whose F1 differs most between arms, or of one arm those with the lowest; the largest first."""
    f1 = np.array([np.nan_to_num(one.f1) for one in scores])
    interest = f1.max(axis=0) - f1.min(axis=0) if len(scores) > 1 else 1 - f1[0]
    return [int(label) for label in np.argsort(-interest, kind="stable")[:limit]]


def choose_images(arms: Sequence[ArmView]) -> list[Gallery]:
    """For each ordered pair of the first arms the images that only one gets right, then those that all arms miss."""
    right = [arm.predictions.labels == arm.predictions.predicted for arm in arms]
    sure = [arm.predictions.probabilities.max(axis=1) for arm in arms]
    galleries = []
    for first, second in permutations(range(min(len(arms), FIRST_ARMS)), 2):
        rows = np.flatnonzero(right[first] & ~right[second])
        galleries.append(_make_gallery((first,), (second,), rows, sure[first]))
    missed = np.flatnonzero(~np.any(right, axis=0))
    galleries.append(_make_gallery((), tuple(range(len(arms))), missed, np.mean(sure, axis=0)))
    return [gallery for gallery in galleries if gallery.n]


def _make_gallery(
    right: tuple[int, ...], wrong: tuple[int, ...], rows: NDArray[np.int64], sure: NDArray[np.float64]
) -> Gallery:
    order = rows[np.argsort(-sure[rows], kind="stable")]
    return Gallery(right=right, wrong=wrong, rows=order[:SHOWN_IMAGES].tolist(), n=len(rows))
