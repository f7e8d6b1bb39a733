"""Many penalised logistic losses minimised at once: L-BFGS in which one product with the features serves them all.

The losses differ in their penalty, and in what each row counts (a row that is held out counts nothing), and share the
features. For model m with weights W (K, R) and bias b (K,):

    sum_i r_mi cross_entropy(W x_i + b, y_i) + penalty_m |W|^2 / 2,      sum_i r_mi = 1

with one weight vector and the logistic loss where there are two classes (K = 1).

Source: D. C. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical
Programming 45 (1989); its directions are found from inner products alone, as in W. Chen, Z. Wang and J. Zhou,
Large-scale L-BFGS using MapReduce, NIPS 2014, so that a step costs two passes over what it remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featcache.heads.threads import Threads, share_rows

REMEMBERED = 10  # steps
BLOCK_NUMBERS = 1 << 20  # features and logits of the rows that are worked on at a time: they stay in the processor
MIN_BLOCK = 1024  # rows
MAX_EVALUATIONS = 1000
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring
NOISE = {torch.float32: 1e-7, torch.float64: 1e-13}  # of a loss, relative: what rounding may add to it
SHORTEST_STEP = 1e-6
RESCALED_AT = 8  # evaluations: measured on real features, a third to a half of the steps are saved
MAX_RESCALING = 10  # of a unit: where a trial point is far too sure of its classes there is next to no curvature


@dataclass(frozen=True, kw_only=True)
class Losses:
    """M losses on the same features.

    Attributes
    ----------
    features
        (N, R) float32 or float64; products with them are made in their precision, sums in float64.
    labels
        (N,) int64.
    n_classes
        2 or more.
    penalties
        (M,) float64.
    weights
        (F, N) in the features' precision: what each row counts; each of the F sums to 1.
    which
        (M,) int64: the row of `weights` that a loss uses.
    threads
        Among which the rows are shared out; None is this one.
    """

    features: Tensor
    labels: Tensor
    n_classes: int
    penalties: Tensor
    weights: Tensor
    which: Tensor
    threads: Threads | None = None

    @property
    def n_outputs(self) -> int:
        """K, weight vectors per model."""
        return 1 if self.n_classes == 2 else self.n_classes

    def select(self, models: Tensor) -> Losses:
        """Only these of the losses."""
        return replace(self, penalties=self.penalties[models], which=self.which[models])

    def evaluate(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Values (M,) and gradients (M, K, R + 1) at parameters (M, K, R + 1), weights and the bias last, float64."""
        n_models, n_outputs, width = parameters.shape
        weight, bias = self._split(parameters)

        def add_up(first: int, last: int) -> tuple[Tensor, Tensor]:
            values = torch.zeros(n_models, dtype=torch.float64, device=parameters.device)
            gradients = torch.zeros(n_models * n_outputs, width, dtype=torch.float64, device=parameters.device)
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                rows, counts = self.features[block], self.weights[:, block][self.which]  # (n, R), (M, n)
                logits = torch.addmm(bias, weight, rows.T)  # (M K, n)
                losses, residuals = compare_with_labels(logits, self.labels[block], n_models)
                values += losses.mul_(counts).sum(dim=1, dtype=torch.float64)
                residuals.view(n_models, n_outputs, -1).mul_(counts[:, None])
                gradients[:, :-1] += residuals @ rows
                gradients[:, -1] += residuals.sum(dim=1, dtype=torch.float64)
            return values, gradients

        values, gradients = self._share(add_up)
        exact = parameters[..., :-1]
        gradients = gradients.view(parameters.shape)
        gradients[..., :-1] += self.penalties[:, None, None] * exact
        return values + self.penalties * exact.square().sum(dim=(1, 2)) / 2, gradients

    def find_curvature(self, parameters: Tensor) -> Tensor:
        """The diagonal of the Hessian (M, K, R + 1) at parameters (M, K, R + 1), float64."""
        n_models, n_outputs, width = parameters.shape
        weight, bias = self._split(parameters)

        def add_up(first: int, last: int) -> tuple[Tensor]:
            curvature = torch.zeros(n_models * n_outputs, width, dtype=torch.float64, device=parameters.device)
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                rows, counts = self.features[block], self.weights[:, block][self.which]
                logits = torch.addmm(bias, weight, rows.T).view(n_models, n_outputs, -1)
                shares = torch.sigmoid(logits) if n_outputs == 1 else torch.softmax(logits, dim=1)
                weights = (shares * (1 - shares) * counts[:, None]).view(n_models * n_outputs, -1)
                curvature[:, :-1] += weights @ rows.square()
                curvature[:, -1] += weights.sum(dim=1, dtype=torch.float64)
            return (curvature,)

        (curvature,) = self._share(add_up)
        curvature = curvature.view(parameters.shape)
        curvature[..., :-1] += self.penalties[:, None, None]
        return curvature

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (M K, R) and biases (M K, 1) in the features' precision."""
        low = parameters.flatten(0, 1).to(self.features.dtype)
        return low[:, :-1].contiguous(), low[:, -1:]

    def _share(self, work: Callable[[int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The sums of what `work` gives for all rows."""
        n = len(self.features)
        return self.threads.share(n, work) if self.threads else work(0, n)

    def _cut_blocks(self, first: int, last: int, numbers: int) -> Iterator[slice]:
        """Blocks of the rows from a first one to before a last one; each row stands for so many numbers."""
        step = max(MIN_BLOCK, BLOCK_NUMBERS // numbers)
        step = last - first if last - first < 2 * step else step
        return (slice(start, min(start + step, last)) for start in range(first, last, max(step, 1)))


def start_at_priors(losses: Losses) -> Tensor:
    """Parameters (M, K, R + 1) that give every row the classes' shares, the best that no feature gives."""
    shares = share_classes(losses)
    start = torch.zeros(*shares.shape, losses.features.shape[1] + 1, dtype=torch.float64, device=shares.device)
    start[..., -1] = torch.logit(shares) if losses.n_classes == 2 else shares.log()
    return start


def scale_by_curvature(losses: Losses, variance: Tensor) -> Tensor:
    """1 / sqrt(curvature) (M, K, R + 1) of each parameter at `start_at_priors`; variance (R,) of uncorrelated features.

    Source: D. Boehning, Multinomial logistic regression algorithm, Annals of the Institute of Statistical Mathematics
    44 (1992), who bounds the curvature so; here with each class's own share in place of 1 / K.
    """
    curvature = (shares := share_classes(losses)) * (1 - shares)  # (M, K)
    of_weights = curvature[..., None] * variance + losses.penalties[:, None, None]
    return torch.cat([of_weights, curvature[..., None]], dim=2).rsqrt()


def share_classes(losses: Losses) -> Tensor:
    """What the rows of each class count together (M, K); of two classes only the second one's."""
    shares = torch.zeros(len(losses.weights), losses.n_classes, dtype=torch.float64, device=losses.features.device)
    shares.index_add_(1, losses.labels, losses.weights.double())
    return shares[losses.which][:, -losses.n_outputs :]


def compare_with_labels(logits: Tensor, labels: Tensor, n_models: int) -> tuple[Tensor, Tensor]:
    """Cross entropies (M, n) and probabilities minus targets (M K, n), from logits (M K, n) that are used up."""
    n = len(labels)
    if len(logits) == n_models:  # two classes, one output
        targets = labels.to(logits.dtype)
        return F.softplus(logits) - targets * logits, torch.sigmoid(logits) - targets
    logits = logits.view(n_models, -1, n)
    columns = torch.arange(n, device=labels.device)
    own, largest = logits[:, labels, columns], logits.amax(dim=1)
    probabilities = torch.softmax(logits, dim=1)
    losses = largest - probabilities.amax(dim=1).log() - own  # the largest probability never underflows, one's own may
    probabilities[:, labels, columns] -= 1
    return losses, probabilities.view(-1, n)


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where M losses are least.

    Attributes
    ----------
    parameters
        (M, K, R + 1) float64, weights and the bias last.
    values
        (M,) float64.
    gradients
        (M,) float64, the largest entry of each gradient.
    evaluations
        (M,) int64.
    """

    parameters: Tensor
    values: Tensor
    gradients: Tensor
    evaluations: Tensor


def minimise(losses: Losses, start: Tensor, scale: Tensor, *, tolerance: float = 0.0, decrease: float = 0.0) -> Minima:
    """Minimise M losses.

    Each takes its own steps: at every evaluation a model either accepts its trial point and chooses a new direction, or
    shortens its step. Those that are done leave.

    Parameters
    ----------
    losses
        What to minimise.
    start
        (M, K, R + 1) float64.
    scale
        (M, K, R + 1) float64, about 1 / sqrt(curvature): the unit in which each parameter is searched.
    tolerance
        A model is done when no entry of its gradient, in the true parameters, is larger.
    decrease
        Or when two steps in succession each decreased its loss by a smaller share. (NOTE: not when the gradient in
        scaled parameters is small: strongly penalised losses would end far too early.)

    Returns
    -------
    Minima
        Also of models that ran out of evaluations, or could not be improved any more in this precision.
    """
    with share_rows(losses.features, MIN_BLOCK) as threads:
        search = _Search(replace(losses, threads=threads), start, scale)
        return _descend(search, start, tolerance, decrease)


def _descend(search: _Search, start: Tensor, tolerance: float, decrease: float) -> Minima:
    n_models, device = len(start), start.device
    found = Minima(
        parameters=start.clone(),
        values=torch.full((n_models,), math.nan, dtype=torch.float64, device=device),
        gradients=torch.full((n_models,), math.inf, dtype=torch.float64, device=device),
        evaluations=torch.zeros(n_models, dtype=torch.int64, device=device),
    )
    active = torch.arange(n_models, device=device)
    done = search.gradients <= tolerance
    for evaluations in range(1, MAX_EVALUATIONS + 1):
        if evaluations == MAX_EVALUATIONS:
            done = torch.ones_like(done)
        if done.any():
            models = active[done]
            found.parameters[models] = search.parameters()[done]
            found.values[models], found.gradients[models] = search.values[done], search.gradients[done]
            found.evaluations[models] = evaluations
            active = active[~done]
            if not len(active):
                break
            search.keep(~done)
        if evaluations == RESCALED_AT:
            search.rescale()
        search.step()
        done = (search.gradients <= tolerance) | (search.slow(decrease) >= 2) | (search.steps < SHORTEST_STEP)
    return found


class _Search:
    """The state of M searches, in scaled parameters u (M, P)."""

    def __init__(self, losses: Losses, start: Tensor, scale: Tensor) -> None:
        self.losses, self.scale, self.shape = losses, scale, start.shape[1:]
        self.at = (start / scale).flatten(1)
        self.values, self.slopes = self._evaluate(self.at)
        self.gradients = self._find_largest(self.slopes)
        self.directions = -self.slopes
        self.steps = torch.ones_like(self.values)
        self.memory = _Memory(self.at, losses.features.dtype)
        self.noise = NOISE[losses.features.dtype]
        self._decreases = torch.ones_like(self.values)
        self._slow = torch.zeros_like(self.values, dtype=torch.int64)

    def parameters(self) -> Tensor:
        """(M, K, R + 1)."""
        return self.at.view(-1, *self.shape) * self.scale

    def keep(self, models: Tensor) -> None:
        """Go on with these only, a mask (M,)."""
        self.losses, self.scale = self.losses.select(models), self.scale[models]
        for name in ("at", "values", "slopes", "gradients", "directions", "steps", "_decreases", "_slow"):
            setattr(self, name, getattr(self, name)[models])
        self.memory.keep(models)

    def rescale(self) -> None:
        """Measure everything anew in units of the curvature that there is now."""
        parameters = self.parameters()
        curvature = self.losses.find_curvature(parameters)
        scale = torch.minimum(curvature.rsqrt(), MAX_RESCALING * self.scale)
        ratio = (scale / self.scale).flatten(1)  # of the new unit to the old one
        self.memory.rescale(ratio)
        self.scale, self.at, self.slopes = scale, self.at / ratio, self.slopes * ratio
        self.directions = self.memory.find_directions(self.slopes)
        self.steps = torch.ones_like(self.steps)

    def step(self) -> None:
        """One evaluation: accept the trial point and choose a direction, or shorten the step."""
        trial = self.at + self.steps[:, None] * self.directions
        values, slopes = self._evaluate(trial)
        before = (self.directions * self.slopes).sum(dim=1)
        promised = self.steps * before  # below 0
        flat = (values <= self.values + self.noise * self.values.abs()) & (
            (self.directions * slopes).sum(dim=1).abs() <= before.abs()
        )
        accepted = (values <= self.values + SUFFICIENT * promised) | flat
        chosen = accepted[:, None]
        self.memory.add(
            torch.where(chosen, trial - self.at, 0.0), torch.where(chosen, slopes - self.slopes, 0.0), accepted
        )
        too_far = (-promised * self.steps / (2 * (values - self.values - promised).clamp_min(1e-300))).nan_to_num(0.0)
        shorter = torch.maximum(torch.minimum(too_far, self.steps / 2), self.steps / 10)  # a parabola's minimum
        self._decreases = torch.where(accepted, (self.values - values) / self.values.abs(), math.inf)
        self.at, self.slopes = torch.where(chosen, trial, self.at), torch.where(chosen, slopes, self.slopes)
        self.values = torch.where(accepted, values, self.values)
        self.directions = torch.where(chosen, self.memory.find_directions(self.slopes), self.directions)
        self.steps = torch.where(accepted, 1.0, shorter)
        self.gradients = self._find_largest(self.slopes)

    def slow(self, decrease: float) -> Tensor:
        """How many steps in succession decreased each loss by less than this share, (M,)."""
        small = self._decreases <= decrease
        waiting = self._decreases == math.inf
        self._slow = torch.where(small, self._slow + 1, torch.where(waiting, self._slow, 0))
        return self._slow if decrease else torch.zeros_like(self._slow)

    def _evaluate(self, at: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = self.losses.evaluate(at.view(-1, *self.shape) * self.scale)
        return values, (gradients * self.scale).flatten(1)

    def _find_largest(self, slopes: Tensor) -> Tensor:
        return (slopes.view(-1, *self.shape) / self.scale).abs().amax(dim=(1, 2))


class _Memory:
    """The last steps of M searches and how their gradients changed, as far as directions need them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        (n_models, size), h = like.shape, REMEMBERED
        self._vectors = torch.zeros(n_models, 2 * h, size, dtype=dtype, device=like.device)  # steps, then changes
        self._products = torch.zeros(n_models, 2 * h, 2 * h, dtype=torch.float64, device=like.device)
        self._inverse = torch.zeros(n_models, h, dtype=torch.float64, device=like.device)  # 1 / (step . change)
        self._unit = torch.ones(n_models, dtype=torch.float64, device=like.device)
        self._order: list[int] = []  # places of the pairs, the oldest first

    def keep(self, models: Tensor) -> None:
        """Forget all searches but these, a mask (M,)."""
        self._vectors, self._products = self._vectors[models], self._products[models]
        self._inverse, self._unit = self._inverse[models], self._unit[models]

    def rescale(self, ratio: Tensor) -> None:
        """Take all steps and changes in new units, (M, P) of the old ones."""
        h = REMEMBERED
        ratio = ratio.to(self._vectors.dtype)[:, None]
        self._vectors[:, :h] /= ratio
        self._vectors[:, h:] *= ratio
        self._products = torch.bmm(self._vectors, self._vectors.transpose(1, 2)).double()
        if self._order:
            last = self._order[-1]
            along, changes = self._products[:, last, h + last], self._products[:, h + last, h + last]
            self._unit = torch.where(changes > 0, along / changes.clamp_min(1e-300), 1.0)

    def add(self, steps: Tensor, changes: Tensor, accepted: Tensor) -> None:
        """Take steps (M, P) and changes of the gradients (M, P); nothing of searches that did not move."""
        along = (steps * changes).sum(dim=1)
        good = accepted & (along > 0)
        if not good.any():
            return
        h = REMEMBERED
        place = len(self._order) if len(self._order) < h else self._order.pop(0)
        self._order.append(place)
        self._vectors[:, place] = torch.where(good[:, None], steps, 0.0).to(self._vectors.dtype)
        self._vectors[:, h + place] = torch.where(good[:, None], changes, 0.0).to(self._vectors.dtype)
        new = self._vectors[:, [place, h + place]]
        products = torch.bmm(self._vectors, new.transpose(1, 2)).double()  # (M, 2h, 2)
        self._products[:, :, [place, h + place]] = products
        self._products[:, [place, h + place]] = products.transpose(1, 2)
        self._inverse[:, place] = torch.where(good, 1 / along, 0.0)
        self._unit = torch.where(good, along / changes.square().sum(dim=1).clamp_min(1e-300), self._unit)

    def find_directions(self, slopes: Tensor) -> Tensor:
        """Directions of descent (M, P) from gradients (M, P): the two loops of L-BFGS, on coefficients."""
        if not self._order:
            return -slopes
        h, products, inverse = REMEMBERED, self._products.cpu().numpy(), self._inverse.cpu().numpy()
        low = slopes.to(self._vectors.dtype)
        with_slopes = torch.bmm(self._vectors, low[..., None])[..., 0].double().cpu().numpy()  # (M, 2h)
        unit, coefficients, first = self._unit.cpu().numpy(), np.zeros_like(with_slopes), {}
        for place in reversed(self._order):
            along = with_slopes[:, place] + np.einsum("mi,mi->m", products[:, place], coefficients)
            first[place] = inverse[:, place] * along
            coefficients[:, h + place] -= first[place]
        coefficients *= unit[:, None]
        for place in self._order:
            change = products[:, h + place]
            along = unit * with_slopes[:, h + place] + np.einsum("mi,mi->m", change, coefficients)
            coefficients[:, place] += first[place] - inverse[:, place] * along
        known = torch.from_numpy(coefficients).to(self._vectors)
        remembered = torch.bmm(known[:, None], self._vectors)[:, 0]
        return -(self._unit[:, None] * slopes + remembered)
