"""Logistic regression by gradient steps on rows that are streamed from the disk, however many there are.

The objective is that of `featcache.heads.logistic`: the penalty is part of the loss, not AdamW's own decay, so that C
means the same. All values of C learn from the same rows as they come by.

Source: I. Loshchilov and F. Hutter, Decoupled weight decay regularization, ICLR 2019, for AdamW; I. Loshchilov and
F. Hutter, SGDR, ICLR 2017, for the cosine schedule; S.-I. Amari, Natural gradient works efficiently in learning, Neural
Computation 10 (1998), for steps in coordinates in which the curvature is about 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.config import HeadConfig
from featcache.heads import logistic
from featcache.heads.descent import Losses, compare_with_labels, scale_by_curvature, start_at_priors
from featcache.heads.fitted import FittedHead
from featcache.heads.logistic import GRID, find_logits, make_head
from featcache.heads.ridge import Decomposition, RidgeStatistics, decompose
from featcache.heads.rows import TrainingRows, to_unit_length
from featcache.heads.selection import (
    FALLBACK_C,
    HeldOut,
    Scores,
    Selection,
    make_folds,
    pick_best,
    say_not_chosen,
    say_procedure,
)
from featcache.heads.shuffling import ShuffledRows
from featcache.heads.threads import limit_threads
from featcache.metering import Meter
from featcache.progress import Progress

WARM_UP = 0.1  # share of all steps in which the learning rate rises
LARGE = 64_000_000  # numbers in all, above which C is chosen on the stream too, by a part that is held out
RANKING_EPOCHS = 2  # at most, for fits that only rank values of C
FEW_OUTPUTS = 500  # up to which a second thread, beside the one that reads, waits more than it works
BLOCK_LABELS = 1 << 20  # that are drawn at a time
SMALL_STEPS = 1000  # fewer are too few for the last digits: few rows get more epochs


def fit(rows: TrainingRows, config: HeadConfig, validation: HeldOut | None, progress: Progress) -> FittedHead:
    """Choose C, unless it is given, and fit with it."""
    space = decompose(RidgeStatistics.collect(rows), config.scaling)
    meter = Meter()
    selection = choose_c(rows, space, config, validation, progress)
    selecting = meter.read()
    strength = [selection.choice["C"]]
    everyone = np.ones((1, len(rows)), np.bool_)
    descent = Descent(rows, space, everyone, strength, config, epochs=config.epochs)
    parameters = descent.run(progress, "training")[0]
    folds = make_folds(rows.labels, config.folds, config.seed) if config.calibrate else None
    held_out = None if folds is None else predict_held_out(rows, space, folds, strength, config, progress)
    return FittedHead(
        head=make_head(
            parameters[:, :-1].numpy(), parameters[:, -1].numpy(), space.coordinates, unit_length=rows.unit_length
        ),
        selection=selection,
        converged=None,
        evaluations=descent.n_steps,
        held_out=held_out,
        selecting=selecting,
    )


class Descent:
    """Heads for every way to leave out a fold and every C, learning from the same stream of rows.

    Parameters
    ----------
    rows
        The training rows.
    space
        The directions in which they vary.
    used
        (F, N): which images each of F fits sees.
    grid
        G values of C.
    config
        Batch size, learning rate, seed.
    epochs
        Passes over the rows.
    """

    def __init__(
        self,
        rows: TrainingRows,
        space: Decomposition,
        used: NDArray[np.bool_],
        grid: Sequence[float],
        config: HeadConfig,
        *,
        epochs: int,
    ) -> None:
        self.rows, self.used = rows, torch.from_numpy(used)
        self.stream = ShuffledRows(rows, config.batch_size, config.seed)
        self.epochs = max(epochs, -(-SMALL_STEPS // len(self.stream)))
        self.coordinates = replace(space.coordinates, axes=None)
        assert space.coordinates.axes is not None
        self.axes = space.coordinates.axes.float()  # (R, D)
        totals = used.astype(np.float64) @ rows.weights
        self.totals = torch.from_numpy(totals)
        losses = Losses(
            features=torch.empty(0, len(self.axes)),
            labels=torch.from_numpy(rows.labels),
            n_classes=rows.n_classes,
            penalties=torch.from_numpy(1 / np.multiply.outer(totals, grid).ravel()),
            weights=share_weights(used, rows.weights, totals),
            which=torch.arange(len(used)).repeat_interleave(len(grid)),
        )
        self.which, self.penalties = losses.which, losses.penalties.float()
        self.scale = scale_by_curvature(losses, space.eigenvalues / space.total).float()
        self.at = start_at_priors(losses).float() / self.scale
        self.lr, self.n_steps = config.lr, 0

    def run(self, progress: Progress, what: str) -> Tensor:
        """Parameters (F G, K, R + 1) after all epochs, float64, weights along the directions and the bias last."""
        with limit_threads(1 if self.at.shape[0] * self.at.shape[1] <= FEW_OUTPUTS else None):
            return self._run(progress, what)

    def _run(self, progress: Progress, what: str) -> Tensor:
        optimiser = torch.optim.AdamW([self.at], lr=self.lr, weight_decay=0.0)
        total = self.epochs * len(self.stream)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: find_rate(step / total))
        batches = (batch for _ in range(self.epochs) for batch in self.stream.epoch())
        for images, features in progress.track(batches, total=total, what=what, unit="step"):
            self.at.grad = self.find_gradient(images, features)
            optimiser.step()
            schedule.step()
            self.n_steps += 1
        return (self.at * self.scale).double()

    def find_gradient(self, images: Tensor, features: Tensor) -> Tensor:
        """Of the mean loss of a batch: images (B,), features (B, V, D)."""
        rows = features.float()
        rows = to_unit_length(rows) if self.rows.unit_length else rows
        x = self.coordinates.transform(rows.flatten(0, 1), torch.float32)  # (B V, D)
        n_views, (n_models, n_outputs, width) = rows.shape[1], self.at.shape
        parameters = self.at * self.scale
        along = parameters[..., :-1].reshape(-1, width - 1)
        logits = torch.addmm(parameters[..., -1].reshape(-1, 1), along @ self.axes, x.T)  # (M K, B V)
        labels = torch.from_numpy(self.rows.labels)[images].repeat_interleave(n_views)
        _, residuals = compare_with_labels(logits.view(n_models, n_outputs, -1), labels)
        weights = self.used[:, images] * torch.from_numpy(self.rows.weights)[images]  # (F, B)
        share = (len(self.rows) / len(images) / self.totals)[:, None] * weights / n_views  # a batch stands for all rows
        counts = share.float().repeat_interleave(n_views, dim=1)[self.which]  # (M, B V)
        residuals = residuals.mul_(counts[:, None]).flatten(0, 1)
        gradient = torch.empty(n_models * n_outputs, width)
        gradient[:, :-1] = (residuals @ x) @ self.axes.T + self.penalties.repeat_interleave(n_outputs)[:, None] * along
        gradient[:, -1] = residuals.sum(dim=1)
        return gradient.view(self.at.shape) * self.scale


def share_weights(used: NDArray[np.bool_], weights: NDArray[np.float64], totals: NDArray[np.float64]) -> Tensor:
    """What each image counts (F, N) in each of F fits, as a share of what all that it sees count, float32."""
    shares = used * weights
    shares /= totals[:, None]
    return torch.from_numpy(shares).float()


def find_rate(progress: float) -> float:
    """The share of the learning rate at a share of all steps: a linear rise, then half a cosine down to nothing."""
    if progress < WARM_UP:
        return progress / WARM_UP + 1e-3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def choose_c(
    rows: TrainingRows, space: Decomposition, config: HeadConfig, validation: HeldOut | None, progress: Progress
) -> Selection:
    """Choose C by the least log loss of images that a fit did not see; all values learn from the stream together.

    What easily fits into memory is left to the solver that does, as the optimum is the same.
    """
    if config.C is not None:
        return Selection(choice={"C": config.C}, procedure="given")
    if rows.size <= LARGE:
        folds = make_folds(rows.labels, config.folds, config.seed)
        return logistic.choose_c(logistic.make_problem(rows, config), config, folds, validation, progress)
    grid = sorted(config.grid or GRID)
    out = np.zeros(len(rows), np.bool_) if validation is not None else hold_out(rows.labels, config)
    if validation is None and not out.any():
        return Selection(choice={"C": FALLBACK_C}, procedure=say_not_chosen())
    descent = Descent(rows, space, ~out[None], grid, config, epochs=min(RANKING_EPOCHS, config.epochs))
    path, scores = descent.run(progress, "choosing C"), Scores(len(grid))
    if validation is None:
        score(replace(rows, views=None), out, space, path, scores)
        procedure = f"on 1 / {config.folds} of the training split, held out, least log loss"
    else:
        held = rows.replace_images(validation.features, validation.labels)
        score(held, np.ones(len(held), np.bool_), space, path, scores)
        procedure = say_procedure(None)
    candidates = scores.candidates([{"C": value} for value in grid])
    return Selection(choice=pick_best(candidates).choice, procedure=procedure, candidates=candidates)


def hold_out(labels: NDArray[np.int64], config: HeadConfig) -> NDArray[np.bool_]:
    """Which images (N,) choose: one in so many as there are folds, at random, but never the first one of a class."""
    out, generator = np.empty(len(labels), np.bool_), np.random.default_rng(config.seed)
    met = np.zeros(int(labels.max()) + 1, np.bool_)
    for start in range(0, len(labels), BLOCK_LABELS):  # all at once take 40 bytes a label
        block = labels[start : start + BLOCK_LABELS]
        mine = generator.random(len(block)) < 1 / config.folds
        classes, first = np.unique(block, return_index=True)
        mine[first[~met[classes]]] = False
        met[classes] = True
        out[start : start + len(block)] = mine
    return out


def score(rows: TrainingRows, chosen: NDArray[np.bool_], space: Decomposition, path: Tensor, scores: Scores) -> None:
    """Score parameters (G, K, R + 1) on the chosen (N,) of the images, block by block."""
    for images, block in rows.iterate():
        mine = np.flatnonzero(chosen[images])
        if len(mine):
            features = space.coordinates.transform(block[torch.from_numpy(mine), 0], torch.float32)
            labels, weights = rows.labels[images][mine], rows.weights[images][mine]
            for i, logits in enumerate(find_logits(path, features)):
                scores.add(i, logits, labels, weights)


def predict_held_out(
    rows: TrainingRows,
    space: Decomposition,
    folds: NDArray[np.int64],
    strength: Sequence[float],
    config: HeadConfig,
    progress: Progress,
) -> NDArray[np.float64]:
    """Logits (N, C) of every training image, from the fold that did not see it."""
    used = folds != np.arange(int(folds.max()) + 1)[:, None]
    parameters = Descent(rows, space, used, strength, config, epochs=config.epochs).run(progress, "calibrating")
    logits = np.empty((len(rows), rows.n_classes))
    for images, block in replace(rows, views=None).iterate():
        features = space.coordinates.transform(block[:, 0], torch.float32)
        for fold, one in enumerate(find_logits(parameters, features)):
            mine = np.flatnonzero(folds[images] == fold)
            logits[images.start + mine] = one[mine]
    return logits
