"""Nearest neighbours by cosine similarity: nothing is trained, the training features themselves are the head.

    p(k | x)  ~  sum over the k' nearest images i of class k of  s_i exp((cos(x, x_i) - cos(x, nearest)) / temperature)

and one more neighbour that votes for all classes alike, so that no probability is 0. The number of neighbours and the
temperature are chosen together by cross-validation.

Source: Z. Wu, Y. Xiong, S. Yu and D. Lin, Unsupervised feature learning via non-parametric instance discrimination,
CVPR 2018, for the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads.fitted import FittedHead
from featcache.heads.rows import TrainingRows, to_float, to_unit_length
from featcache.heads.selection import HeldOut, Scores, Selection, make_folds, pick_best, say_not_chosen, say_procedure
from featcache.metering import Meter
from featcache.progress import Progress

NEIGHBOURS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
USUAL = {"k": 20, "temperature": 0.07}  # of the paper's followers, where nothing can be held out
MAX_QUERIES = 10_000  # images that choose, at most: all of many would cost N^2
BLOCK_SIMILARITIES = 1 << 24  # at a time, 64 MB
ONE_MORE = 1.0  # votes for all classes alike


@dataclass(frozen=True, kw_only=True)
class NeighbourHead:
    """The training images as a head.

    Attributes
    ----------
    features
        (N, D) float32 of unit length; of every view, where there are some.
    labels
        (N,) int64.
    weights
        (N,) float32, what each vote counts.
    n_classes
        C.
    k
        Neighbours that vote.
    temperature
        Of their weights.
    divisor
        Of the logits, from calibration.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    n_classes: int
    k: int
    temperature: float
    divisor: float = 1.0

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features (N, D) -> log probabilities (N, C), divided by the divisor."""
        bank = torch.from_numpy(self.features)
        queries = to_unit_length(to_float(features))
        found = []
        for block in torch.split(queries, max(1, BLOCK_SIMILARITIES // len(bank))):
            nearest, places = (block @ bank.T).topk(min(self.k, len(bank)), dim=1)
            labels, weights = torch.from_numpy(self.labels)[places], torch.from_numpy(self.weights)[places]
            found.append(count_votes(nearest, labels, weights, self.n_classes, self.temperature).numpy())
        logs = np.concatenate(found) if found else np.empty((0, self.n_classes))
        return (logs / self.divisor).astype(np.float32)

    def divide_logits(self, temperature: float) -> NeighbourHead:
        """The head whose logits are these, divided by a temperature."""
        return replace(self, divisor=self.divisor * temperature)

    def take_apart(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain JSON values, and arrays, that `remake` takes."""
        values = {"kind": "neighbours", "k": self.k, "temperature": self.temperature, "divisor": self.divisor}
        return values, {"features": self.features, "labels": self.labels, "weights": self.weights}

    @classmethod
    def remake(
        cls, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int]
    ) -> NeighbourHead:
        """The head of C classes on D features, shape (C, D), that was taken apart.

        Raises
        ------
        ValueError, KeyError
            If it is of another shape, or something is missing.
        """
        features, labels, weights = (arrays[name] for name in ("features", "labels", "weights"))
        n, found = len(features), (features.shape[1:], labels.shape, weights.shape)
        if found != (shape[1:], (n,), (n,)) or not n or labels.min() < 0 or labels.max() >= shape[0]:
            raise ValueError(f"features {features.shape}, labels {labels.shape}")
        return cls(
            features=features,
            labels=labels,
            weights=weights,
            n_classes=shape[0],
            k=int(values["k"]),
            temperature=float(values["temperature"]),
            divisor=float(values["divisor"]),
        )

    @property
    def n_parameters(self) -> int:
        """Numbers that were fitted: none, but the two that were chosen."""
        return 2


def count_votes(similarities: Tensor, labels: Tensor, weights: Tensor, n_classes: int, temperature: float) -> Tensor:
    """Log probabilities (n, C) from similarities, labels and weights (n, k) of neighbours, the nearest first."""
    strength = (((similarities - similarities[:, :1]) / temperature).exp() * weights).double()
    votes = torch.full((len(labels), n_classes), ONE_MORE / n_classes, dtype=torch.float64)
    votes.scatter_add_(1, labels, strength)
    return (votes / votes.sum(dim=1, keepdim=True)).log()


def fit(rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress) -> FittedHead:
    """Choose the number of neighbours and the temperature, and keep the rows."""
    bank = Bank(rows)
    choices = [{"k": k, "temperature": t} for k in list_neighbours(config, bank) for t in list_temperatures(config)]
    wanted = config.calibrate or (len(choices) > 1 and validation is None)
    folds = make_folds(rows.labels, config.folds, config.seed) if wanted else None
    meter = Meter()
    selection = choose(bank, choices, folds, config, validation, progress)
    selecting = meter.read()
    k, temperature = int(selection.choice["k"]), selection.choice["temperature"]
    held_out = None
    if config.calibrate and folds is not None:
        everyone = np.arange(len(rows))
        nearest = find_neighbours(bank, bank.plain(everyone), folds, everyone, k)
        held_out = count_votes(*nearest, rows.n_classes, temperature).numpy()
    head = NeighbourHead(
        features=bank.features.numpy(),
        labels=bank.labels.numpy(),
        weights=bank.weights.numpy(),
        n_classes=rows.n_classes,
        k=k,
        temperature=temperature,
    )
    return FittedHead(head=head, selection=selection, held_out=held_out, selecting=selecting)


class Bank:
    """Training rows of unit length (N V, D), image after image, with their labels and weights (N V,)."""

    def __init__(self, rows: TrainingRows) -> None:
        self.rows = rows
        self.features = torch.cat([to_unit_length(block.flatten(0, 1)) for _, block in rows.iterate()])
        self.labels = torch.from_numpy(np.repeat(rows.labels, rows.n_views))
        self.weights = torch.from_numpy(np.repeat(rows.weights, rows.n_views).astype(np.float32))
        self.images = np.repeat(np.arange(len(rows)), rows.n_views)

    def __len__(self) -> int:
        return len(self.features)

    def plain(self, images: NDArray[np.int64]) -> Tensor:
        """(n, D) of the plain images."""
        return self.features[torch.from_numpy(images * self.rows.n_views)]


def list_neighbours(config: HeadConfig, bank: Bank) -> list[int]:
    """The numbers of neighbours to try, none larger than there are rows."""
    if config.k is not None:
        return [config.k]
    return [k for k in NEIGHBOURS if k <= len(bank)]


def list_temperatures(config: HeadConfig) -> list[float]:
    """The temperatures to try."""
    return [config.temperature] if config.temperature is not None else list(TEMPERATURES)


def choose(
    bank: Bank,
    choices: Sequence[dict[str, float]],
    folds: NDArray[np.int64] | None,
    config: HeadConfig,
    validation: HeldOut | None,
    progress: Progress,
) -> Selection:
    """The choice with the least log loss of images that are not among their own neighbours."""
    if len(choices) == 1:
        return Selection(choice=choices[0], procedure="given")
    if validation is None and folds is None:
        k = config.k or min(int(USUAL["k"]), len(bank))
        return Selection(
            choice={"k": k, "temperature": config.temperature or USUAL["temperature"]}, procedure=say_not_chosen()
        )
    scores, largest = Scores(len(choices)), max(int(choice["k"]) for choice in choices)
    if validation is not None:
        labels, weights = validation.labels, np.ones(len(validation.labels))
        queries = to_unit_length(to_float(validation.features[0 : len(labels)]))
        nearest = find_neighbours(bank, queries, None, None, largest)
    else:
        rng = np.random.default_rng(config.seed)
        everyone = rng.permutation(len(bank.rows))[:MAX_QUERIES]
        labels, weights = bank.rows.labels[everyone], bank.rows.weights[everyone]
        nearest = find_neighbours(bank, bank.plain(everyone), folds, everyone, largest)
    for i, choice in progress.track(
        enumerate(choices), total=len(choices), what="choosing k and temperature", unit="choice"
    ):
        similar, neighbours, counts = (one[:, : int(choice["k"])] for one in nearest)
        logs = count_votes(similar, neighbours, counts, bank.rows.n_classes, choice["temperature"])
        scores.add(i, logs.numpy(), labels, weights)
    candidates = scores.candidates(choices)
    return Selection(
        choice=pick_best(candidates).choice,
        procedure=say_procedure(folds if validation is None else None),
        candidates=candidates,
    )


def find_neighbours(
    bank: Bank, queries: Tensor, folds: NDArray[np.int64] | None, images: NDArray[np.int64] | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, labels and weights (n, k) of the nearest rows; of training images those of other folds only."""
    k, found = min(k, len(bank)), []
    of_row = None if folds is None else torch.from_numpy(folds[bank.images])
    step = max(1, BLOCK_SIMILARITIES // len(bank))
    for start in range(0, len(queries), step):
        similarities = queries[start : start + step] @ bank.features.T
        if of_row is not None and folds is not None and images is not None:
            own = torch.from_numpy(folds[images[start : start + step]])
            similarities.masked_fill_(own[:, None] == of_row, -torch.inf)
        found.append(similarities.topk(k, dim=1))
    similarities = torch.cat([one.values for one in found])
    places = torch.cat([one.indices for one in found])
    return similarities, bank.labels[places], bank.weights[places]
