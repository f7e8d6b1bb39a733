"""Ridge regression onto one-hot targets: closed form, every C from one decomposition, exact leave-one-out error.

    C * sum_i s_i |W x_i + b - t_i|^2 + |W|^2

on standardised features x and targets t, 1 for an image's class and 0 for the others; 1 / C is scikit-learn's alpha.
The scores are no logits: they are divided by a temperature that suits what leave-one-out predicts.

Source: R. Rifkin and R. Lippert, Notes on regularized least squares, MIT-CSAIL-TR-2007-025, for the path and the
leave-one-out error of one decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads.coordinates import Coordinates, settle_variance
from featcache.heads.fitted import FittedHead, LinearHead
from featcache.heads.logistic import SMALL, make_head
from featcache.heads.rows import TrainingRows, to_float
from featcache.heads.selection import (
    FALLBACK_C,
    Candidate,
    HeldOut,
    Selection,
    pick_best,
    say_not_chosen,
    say_procedure,
)
from featcache.metering import Meter
from featcache.progress import SILENT, Progress

GRID = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
SQUARED_ERROR = "leave-one-out squared error"
# What an image's own residual is at least divided by when it is left out: below that, rounding decides the quotient.
LOST = {torch.float64: 1e-7, torch.float32: 1e-3}
NEGLIGIBLE = 1e-10  # of the largest eigenvalue: below it is rounding


def fit(rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress) -> FittedHead:
    """Fit a head: one pass over the rows for the statistics, one for the leave-one-out error of every C."""
    statistics = RidgeStatistics.collect(rows)
    decomposition = decompose(statistics, config.scaling)
    grid = [config.C] if config.C is not None else sorted(config.grid or GRID)
    meter = Meter()
    alone = len(rows) == rows.n_classes  # without its image nothing is known of a class
    candidates, held_out = leave_one_out(rows, decomposition, grid, progress)
    selecting = meter.read()
    if config.C is not None:
        selection = Selection(choice={"C": config.C}, procedure="given", criterion=SQUARED_ERROR)
    elif validation is not None:
        selection = choose_on_validation(rows, decomposition, grid, validation)
    elif alone:
        selection = Selection(choice={"C": FALLBACK_C}, procedure=say_not_chosen(), criterion=SQUARED_ERROR)
    else:
        procedure = f"leave-one-out on the training split, least {SQUARED_ERROR.removeprefix('leave-one-out ')}"
        selection = Selection(
            choice=pick_best(candidates).choice, procedure=procedure, criterion=SQUARED_ERROR, candidates=candidates
        )
    strength = selection.choice["C"]
    return FittedHead(
        head=decomposition.make_head(strength, unit_length=rows.unit_length),
        selection=selection,
        held_out=None if alone else held_out[grid.index(strength)],
        selecting=selecting,
    )


@dataclass
class RidgeStatistics:
    """All that ridge regression needs to know of the rows it has seen: more images or classes cost no second look.

    Attributes
    ----------
    origin
        (D,) float64: what is subtracted from every row before it is summed, for the sake of precision.
    class_counts, class_sums
        (C,) and (C, D) float64: what the images of each class count, and the sum of their rows.
    squares
        (D, D) float64: the sum of the rows' outer products.
    double
        Whether products are made in double precision too, not only summed.
    """

    origin: Tensor
    class_counts: Tensor
    class_sums: Tensor
    squares: Tensor
    double: bool = True

    @staticmethod
    def collect(rows: TrainingRows) -> RidgeStatistics:
        """Of all training rows."""
        images = next(iter(rows.iterate()))[1]
        statistics = RidgeStatistics.make_empty(images.flatten(0, 1).double().mean(dim=0))
        statistics.double = rows.size <= SMALL
        for part, block in rows.iterate():
            weights = torch.from_numpy(rows.weights[part] / rows.n_views).repeat_interleave(rows.n_views)
            labels = torch.from_numpy(rows.labels[part]).repeat_interleave(rows.n_views)
            statistics.add_rows(block.flatten(0, 1), labels, weights)
        return statistics

    @staticmethod
    def make_empty(origin: Tensor | NDArray[np.floating]) -> RidgeStatistics:
        """Of no rows at all; features are expected about `origin` (D,)."""
        width = len(origin)
        return RidgeStatistics(
            origin=torch.as_tensor(origin).double(),
            class_counts=torch.zeros(0, dtype=torch.float64),
            class_sums=torch.zeros(0, width, dtype=torch.float64),
            squares=torch.zeros(width, width, dtype=torch.float64),
        )

    def add(
        self, features: NDArray[np.floating], labels: NDArray[np.int64], weights: NDArray[np.float64] | None = None
    ) -> None:
        """Add images: features (n, D), labels (n,), perhaps of new classes, each counting 1 or its weight (n,)."""
        counts = torch.ones(len(labels), dtype=torch.float64) if weights is None else torch.from_numpy(weights)
        self.add_rows(to_float(features), torch.from_numpy(labels), counts)

    def add_rows(self, rows: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add rows (n, D) with labels (n,) that count weights (n,)."""
        new = int(labels.max()) + 1 - len(self.class_counts)
        if new > 0:
            self.class_counts = torch.cat([self.class_counts, torch.zeros(new, dtype=torch.float64)])
            self.class_sums = torch.cat([self.class_sums, torch.zeros(new, rows.shape[1], dtype=torch.float64)])
        dtype = torch.float64 if self.double else torch.float32
        centred = rows.to(dtype) - self.origin.to(dtype)
        weighted = centred * weights.to(dtype)[:, None]
        self.squares += centred.T @ weighted
        self.class_sums.index_add_(0, labels, weighted.double())
        self.class_counts.index_add_(0, labels, weights)

    def solve(self, C: float, *, scaling: str = "auto") -> LinearHead:  # noqa: N803
        """The head for one C: the one that a fit to all these rows gives, its scores divided by no temperature."""
        return decompose(self, scaling).make_head(C)


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The eigenvectors of the standardised rows' covariance, in which every C is solved at once.

    Attributes
    ----------
    coordinates
        Raw features -> along the eigenvectors, (n, R).
    eigenvalues
        (R,) float64.
    targets
        (R, C) float64: how each direction goes with each class.
    shares
        (C,) float64, the classes' shares of all that counts.
    total
        What all images count.
    """

    coordinates: Coordinates
    eigenvalues: Tensor
    targets: Tensor
    shares: Tensor
    total: float

    def solve(self, C: float) -> Tensor:  # noqa: N803
        """Weights (R, C)."""
        return self.targets / (self.eigenvalues + 1 / C)[:, None]

    def make_head(self, C: float, *, unit_length: bool = False) -> LinearHead:  # noqa: N803
        """The linear layer on raw features."""
        return make_head(self.solve(C).T.numpy(), self.shares.numpy(), self.coordinates, unit_length=unit_length)


def decompose(statistics: RidgeStatistics, scaling: str) -> Decomposition:
    """Standardise and decompose what is known of the rows."""
    total = float(statistics.class_counts.sum())
    shift = statistics.class_sums.sum(dim=0) / total
    scatter = statistics.squares - total * torch.outer(shift, shift)
    variance = scatter.diagonal() / total
    variance = torch.where(variance > 1e-12 * statistics.squares.diagonal() / total, variance, 0.0)
    variance = settle_variance(variance, scaling, total)
    scale = torch.where(variance > 0, variance.sqrt(), 1.0)
    eigenvalues, vectors = torch.linalg.eigh(scatter / torch.outer(scale, scale))
    kept = eigenvalues > NEGLIGIBLE * eigenvalues.max()
    eigenvalues, axes = eigenvalues[kept], vectors[:, kept].T.contiguous()  # (R, D)
    sums = statistics.class_sums - statistics.class_counts[:, None] * shift  # (C, D), of centred rows
    return Decomposition(
        coordinates=Coordinates(mean=statistics.origin + shift, scale=scale, axes=axes),
        eigenvalues=eigenvalues,
        targets=axes @ (sums / scale).T,
        shares=statistics.class_counts / total,
        total=total,
    )


def leave_one_out(
    rows: TrainingRows, decomposition: Decomposition, grid: Sequence[float], progress: Progress = SILENT
) -> tuple[tuple[Candidate, ...], list[NDArray[np.float64]]]:
    """Every C's exact error on each image, by the fit to all others; an image leaves with all its views.

    Returns
    -------
    candidates
        Mean squared error over images and classes, and accuracy; the error is infinite where a penalty is too weak for
        the error to be known, unless all are.
    scores
        (N, C) of each candidate.
    """
    dtype = torch.float64 if rows.size <= SMALL else torch.float32
    solutions = torch.cat([decomposition.solve(value) for value in grid], dim=1).to(dtype)  # (R, G C)
    shrinkage = torch.stack([1 / (decomposition.eigenvalues + 1 / value) for value in grid]).to(dtype)  # (G, R)
    n, n_classes, n_views = len(rows), rows.n_classes, rows.n_views
    scores, lost = torch.empty(len(grid), n, n_classes, dtype=dtype), torch.zeros(len(grid), dtype=torch.bool)
    blocks = progress.track(rows.iterate(), total=None, what="leaving one out", unit="block")
    for images, block in blocks:
        along = decomposition.coordinates.transform(block.flatten(0, 1), dtype)  # (n V, R)
        weights = torch.from_numpy(rows.weights[images] / n_views).to(dtype)
        targets = torch.nn.functional.one_hot(torch.from_numpy(rows.labels[images]), n_classes).to(dtype)
        fitted = (along @ solutions).view(-1, n_views, len(grid), n_classes) + decomposition.shares.to(dtype)
        residuals = targets[:, None, None] - fitted  # (n, V, G, C)
        alone, left = remove_own(residuals, along, weights, shrinkage, decomposition.total)
        scores[:, images] = targets - alone
        lost |= left < LOST[dtype]
    wanted = torch.nn.functional.one_hot(torch.from_numpy(rows.labels), n_classes).to(dtype)
    counts = torch.from_numpy(rows.weights)
    candidates = []
    for value, one, unknown in zip(grid, scores, (lost & ~lost.all()).tolist(), strict=True):
        errors = (one - wanted).square().mean(dim=1).double()
        right = (one.argmax(dim=1).numpy() == rows.labels).astype(np.float64)
        candidates.append(
            Candidate(
                choice={"C": value},
                loss=math.inf if unknown else float(counts @ errors / counts.sum()),
                accuracy=float(rows.weights @ right / rows.weights.sum()),
            )
        )
    return tuple(candidates), [one.double().numpy() for one in scores]


def remove_own(
    residuals: Tensor, along: Tensor, weights: Tensor, shrinkage: Tensor, total: float
) -> tuple[Tensor, Tensor]:
    """Residuals (G, n, C) of the plain rows of n images by fits that did not see them, from those (n, V, G, C) of all.

    For a block B of rows they are (I - H_BB)^-1 r_B, with the hat matrix H; of a single row r / (1 - h). Also the
    smallest 1 - h (G,).
    """
    n, n_views = residuals.shape[:2]
    if n_views == 1:
        leverage = weights[:, None] * (along.double().square() @ shrinkage.double().T + 1 / total)  # (n, G)
        left = (1 - leverage).clamp_min(1e-12)
        return (residuals[:, 0] / left[..., None].to(residuals.dtype)).transpose(0, 1), left.amin(dim=0)
    by_image = along.view(n, n_views, -1)
    found, smallest = [], []
    for g, shrink in enumerate(shrinkage):
        hat = weights[:, None, None] * ((by_image * shrink) @ by_image.transpose(1, 2) + 1 / total)
        left = torch.eye(n_views, dtype=hat.dtype) - hat
        found.append(torch.linalg.solve(left, residuals[:, :, g])[:, 0])
        smallest.append(left.diagonal(dim1=1, dim2=2).min().double())
    return torch.stack(found), torch.stack(smallest)


def choose_on_validation(
    rows: TrainingRows, decomposition: Decomposition, grid: Sequence[float], validation: HeldOut
) -> Selection:
    """Choose C by the squared error on the validation split."""
    features = to_float(validation.features[0 : len(validation.labels)]).numpy()
    wanted = np.eye(rows.n_classes)[validation.labels]
    candidates = []
    for value in grid:
        scores = decomposition.make_head(value, unit_length=rows.unit_length).logits(features)
        candidates.append(
            Candidate(
                choice={"C": value},
                loss=float(np.square(scores - wanted).mean()),
                accuracy=float((scores.argmax(axis=1) == validation.labels).mean()),
            )
        )
    criterion = "squared error"
    return Selection(
        choice=pick_best(candidates).choice,
        procedure=say_procedure(None, criterion),
        criterion=criterion,
        candidates=tuple(candidates),
    )
