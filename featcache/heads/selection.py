"""Choosing what a head is fitted with: folds of the training images, and scores of those that a fit did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from featcache.heads.rows import Features

FALLBACK_C = 0.01  # where nothing can be held out to choose it: strong, as few rows want it
LOG_LOSS = "log loss"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Images that are no training rows and choose: the validation split, where that was asked for.

    `features` (N, D), `labels` (N,).
    """

    features: Features
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One choice of values and its scores on images that the fit did not see: the loss that chooses, and accuracy."""

    choice: Mapping[str, float]
    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen.

    Attributes
    ----------
    choice
        The values by name, such as {"C": 0.1}.
    procedure
        How, in words.
    criterion
        The name of the candidates' loss.
    candidates
        All that was tried, in order; empty where nothing could be, or had to be.
    """

    choice: Mapping[str, float]
    procedure: str
    criterion: str = LOG_LOSS
    candidates: tuple[Candidate, ...] = ()

    def is_at_end(self, name: str) -> bool:
        """Whether the chosen value is the smallest or the largest of several that were tried."""
        tried = {one.choice[name] for one in self.candidates}
        return len(tried) > 1 and self.choice[name] in (min(tried), max(tried))


def make_folds(labels: NDArray[np.int64], at_most: int, seed: int) -> NDArray[np.int64] | None:
    """The fold (N,) of each image, stratified by class; None if a class has a single image, which none can spare."""
    from sklearn.model_selection import StratifiedKFold  # 0.1 GB, of which those who stream have no use

    n_folds = min(at_most, int(np.bincount(labels).min()))
    if n_folds < 2:
        return None
    folds = np.empty(len(labels), np.int64)
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(np.empty((len(labels), 0)), labels)):
        folds[held] = number
    return folds


class Scores:
    """Sums up losses and right answers of several candidates over images as they come.

    The log loss, not the accuracy, is what should choose: on a few hundred images many candidates tie in accuracy, and
    luck would break the tie.
    """

    def __init__(self, n_candidates: int) -> None:
        self._losses, self._right = np.zeros(n_candidates), np.zeros(n_candidates)
        self._weight = np.zeros(n_candidates)

    def add(
        self, candidate: int, logits: NDArray[np.floating], labels: NDArray[np.int64], weights: NDArray[np.float64]
    ) -> None:
        """Take a candidate's logits (n, C) of images with labels (n,) that count `weights` (n,)."""
        logs = log_softmax(logits.astype(np.float64), axis=1)
        self._losses[candidate] -= float(weights @ logs[np.arange(len(labels)), labels])
        self._right[candidate] += float(weights @ (logs.argmax(axis=1) == labels))
        self._weight[candidate] += float(weights.sum())

    def candidates(self, choices: Sequence[Mapping[str, float]]) -> tuple[Candidate, ...]:
        """The candidates with their mean losses (nats) and accuracies."""
        return tuple(
            Candidate(
                choice=dict(choice),
                loss=float(self._losses[i] / self._weight[i]),
                accuracy=float(self._right[i] / self._weight[i]),
            )
            for i, choice in enumerate(choices)
        )


def pick_best(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the least loss; of equal ones the first."""
    return min(candidates, key=lambda one: one.loss)


def say_procedure(folds: NDArray[np.int64] | None, criterion: str = LOG_LOSS) -> str:
    """How a choice was made, in words."""
    if folds is None:
        return f"on the validation split, least {criterion}: its accuracy is optimistic"
    return f"{int(folds.max()) + 1}-fold cross-validation on the training split, least {criterion}"


def say_not_chosen() -> str:
    """Why nothing was chosen, in words."""
    return "not chosen, as a class has a single training image and none can be held out"
