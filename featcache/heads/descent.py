"""Many penalised logistic losses minimised at once: L-BFGS in which one product with the features serves them all.

The losses differ in their penalty, and in what each row counts (a row that is held out counts nothing), and share the
features. For model m with weights W (K, R) and bias b (K,):

    sum_i r_mi cross_entropy(W x_i + b, y_i) + penalty_m |W|^2 / 2,      sum_i r_mi = 1

with one weight vector and the logistic loss where there are two classes (K = 1). Logits are linear in the parameters:
those along a direction cost one product with the features, after which the loss at any length of the step is known
without another. So every step is as long as Newton's method in one dimension makes it.

Source: D. C. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical
Programming 45 (1989), with the directions of R. H. Byrd, J. Nocedal and R. B. Schnabel, Representations of quasi-Newton
matrices and their use in limited memory methods, Mathematical Programming 63 (1994); the steps as in G.-X. Yuan,
C.-H. Ho and C.-J. Lin, An improved GLMNET for L1-regularized logistic regression, JMLR 13 (2012), section 4, who keep
the logits of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from featcache.heads.threads import Threads, share_rows

REMEMBERED = 10  # steps
BLOCK_NUMBERS = 1 << 20  # features and logits of the rows that are worked on at a time: they stay in the processor
GPU_BLOCK_NUMBERS = 1 << 28  # a gibibyte in single precision; starting small works costs more than memory does
MIN_BLOCK = 1024  # rows
MAX_EVALUATIONS = 3000
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring
NOISE = {torch.float32: 1e-7, torch.float64: 1e-13}  # of a loss, relative: what rounding may add to it
SHORTEST_STEP = 1e-6
LONGEST_STEP = 4.0  # of the usual one
RELOCATED_EVERY = 32  # evaluations
RESCALED_AT = 8  # evaluations: measured on real features, a third to a half of the steps are saved
MAX_RESCALING = 10  # of a unit: where a trial point is far too sure of its classes there is next to no curvature


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where M models are, or directions in which they may go: what is linear in the parameters.

    Attributes
    ----------
    parameters
        (M, K, R + 1) float64, weights and the bias last.
    logits
        (M, K, N) in the features' precision, that they give the rows.
    """

    parameters: Tensor
    logits: Tensor

    def select(self, models: Tensor) -> Point:
        """Only these models."""
        return Point(parameters=self.parameters[models], logits=self.logits[models])


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

    def locate(self, parameters: Tensor) -> Point:
        """The point at parameters (M, K, R + 1), weights and the bias last, float64."""
        n_models, n_outputs, width = parameters.shape
        logits = self.features.new_empty(n_models, n_outputs, len(self.features))
        if not parameters[..., :-1].any():
            return Point(parameters=parameters, logits=logits.copy_(parameters[..., -1:]))
        project = self._make_projection(parameters)

        def fill(first: int, last: int) -> tuple[()]:
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                logits[..., block] = project(block)
            return ()

        self._share(fill)
        return Point(parameters=parameters, logits=logits)

    def look_along(self, point: Point, ahead: Tensor, steps: Tensor, out: Tensor) -> tuple[Point, Tensor, Tensor]:
        """What a direction (M, K, R + 1) is, and slopes and curvatures (M,) along it as many steps (M,) away.

        Its logits (M, K, N) are written to `out`.
        """
        n_models, n_outputs, width = ahead.shape
        project, low = self._make_projection(ahead), steps.to(self.features.dtype)[:, None, None]

        def add_up(first: int, last: int) -> tuple[Tensor, Tensor]:
            slopes, curvatures = self._make_sums(n_models), self._make_sums(n_models)
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                along, counts = project(block), self.weights[:, block][self.which]
                out[..., block] = along
                logits = torch.addcmul(point.logits[..., block], low, along)
                slope, curvature = differentiate(logits, along, self.labels[block])
                slopes += slope.mul_(counts).sum(dim=1, dtype=torch.float64)
                curvatures += curvature.mul_(counts).sum(dim=1, dtype=torch.float64)
            return slopes, curvatures

        slopes, curvatures = self._share(add_up)
        here, there = point.parameters[..., :-1], ahead[..., :-1]
        squares = there.square().sum(dim=(1, 2))
        slopes += self.penalties * ((here * there).sum(dim=(1, 2)) + steps * squares)
        return Point(parameters=ahead, logits=out), slopes, curvatures + self.penalties * squares

    def evaluate(self, point: Point) -> tuple[Tensor, Tensor]:
        """Values (M,) and gradients (M, K, R + 1), float64."""
        return self._sum(point.parameters, lambda block: point.logits[..., block])

    def move(self, point: Point, direction: Point, steps: Tensor, out: Tensor) -> tuple[Point, Tensor, Tensor]:
        """The point that is as many steps (M,) away in a direction, with its values and gradients.

        Its logits (M, K, N) are written to `out`.
        """
        by = steps[:, None, None]
        low = by.to(out.dtype)

        def fill(block: slice) -> Tensor:
            rows = out[..., block]
            return torch.addcmul(point.logits[..., block], low, direction.logits[..., block], out=rows)

        parameters = torch.addcmul(point.parameters, by, direction.parameters)
        return Point(parameters=parameters, logits=out), *self._sum(parameters, fill)

    def _sum(self, parameters: Tensor, find_logits: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
        """Values and gradients, from what gives the logits (M, K, n) of a block of rows."""
        n_models, n_outputs, width = parameters.shape

        def add_up(first: int, last: int) -> tuple[Tensor, Tensor]:
            values, gradients = self._make_sums(n_models), self._make_sums(n_models * n_outputs, width)
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                counts = self.weights[:, block][self.which]  # (M, n)
                losses, residuals = compare_with_labels(find_logits(block), self.labels[block])
                values += losses.mul_(counts).sum(dim=1, dtype=torch.float64)
                flat = residuals.mul_(counts[:, None]).flatten(0, 1)
                gradients[:, :-1] += flat @ self.features[block]
                gradients[:, -1] += flat.sum(dim=1)
            return values, gradients

        values, gradients = self._share(add_up)
        gradients = gradients.view(parameters.shape)
        exact = parameters[..., :-1]
        gradients[..., :-1] += self.penalties[:, None, None] * exact
        return values + self.penalties * exact.square().sum(dim=(1, 2)) / 2, gradients

    def find_curvature(self, point: Point) -> Tensor:
        """The diagonal of the Hessian (M, K, R + 1), float64."""
        n_models, n_outputs, width = point.parameters.shape

        def add_up(first: int, last: int) -> tuple[Tensor]:
            curvature = self._make_sums(n_models * n_outputs, width)
            for block in self._cut_blocks(first, last, n_models * n_outputs + width):
                rows, counts = self.features[block], self.weights[:, block][self.which]
                logits = point.logits[..., block]
                shares = torch.sigmoid(logits) if n_outputs == 1 else torch.softmax(logits, dim=1)
                weights = (shares * (1 - shares) * counts[:, None]).flatten(0, 1)
                curvature[:, :-1] += weights @ rows.square()
                curvature[:, -1] += weights.sum(dim=1, dtype=torch.float64)
            return (curvature,)

        (curvature,) = self._share(add_up)
        curvature = curvature.view(point.parameters.shape)
        curvature[..., :-1] += self.penalties[:, None, None]
        return curvature

    def _make_projection(self, parameters: Tensor) -> Callable[[slice], Tensor]:
        """What gives the logits (M, K, n) of a block of rows."""
        low = parameters.flatten(0, 1).to(self.features.dtype)
        weight, bias = low[:, :-1].contiguous(), low[:, -1:]
        return lambda block: torch.addmm(bias, weight, self.features[block].T).view(*parameters.shape[:2], -1)

    def _make_sums(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.features.device)

    def _share(self, work: Callable[[int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The sums of what `work` gives for all rows."""
        n = len(self.features)
        return self.threads.share(n, work) if self.threads else work(0, n)

    def _cut_blocks(self, first: int, last: int, numbers: int) -> Iterator[slice]:
        """Blocks of the rows from a first one to before a last one; each row stands for so many numbers."""
        at_once = GPU_BLOCK_NUMBERS if self.features.is_cuda else BLOCK_NUMBERS
        step = max(MIN_BLOCK, at_once // numbers // 256 * 256)  # odd numbers of rows cost a tenth of the time
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


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - largest) of logits (M, K, n), with the sums and the largest (M, 1, n) of all classes.

    Three plain passes: torch.softmax over any dimension but the last takes twice the time, and its logarithm more.
    """
    largest = logits.amax(dim=1, keepdim=True)
    powers = torch.sub(logits, largest).exp_()
    return powers, powers.sum(dim=1, keepdim=True), largest


def compare_with_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies (M, n), and probabilities minus targets (M, K, n), of logits (M, K, n)."""
    n_models, n_outputs, n = logits.shape
    if n_outputs == 1:
        targets = labels.to(logits.dtype)
        return (F.softplus(logits) - targets * logits)[:, 0], torch.sigmoid(logits) - targets
    powers, sums, largest = exponentiate(logits)
    own = labels.expand(n_models, 1, n)
    losses = (largest - logits.gather(1, own)).add_(sums.log())
    residuals = powers.div_(sums)
    residuals.scatter_add_(1, own, residuals.new_tensor(-1.0).expand(n_models, 1, n))
    return losses[:, 0], residuals


def differentiate(logits: Tensor, along: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives (M, n) of cross entropies at logits (M, K, n) in a direction `along` (M, K, n)."""
    n_models, n_outputs, n = logits.shape
    if n_outputs == 1:
        shares = torch.sigmoid(logits)
        slopes, curvatures = (shares - labels.to(logits.dtype)) * along, shares * (1 - shares) * along.square()
        return slopes[:, 0], curvatures[:, 0]
    powers, sums, _ = exponentiate(logits)
    weighted = powers.mul_(along)
    mean = weighted.sum(dim=1, keepdim=True).div_(sums)
    square = weighted.mul_(along).sum(dim=1, keepdim=True).div_(sums)
    own = along.gather(1, labels.expand(n_models, 1, n))
    return (mean - own)[:, 0], square.sub_(mean.square())[:, 0]


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
    done = search.steepest <= tolerance
    for evaluations in range(1, MAX_EVALUATIONS + 1):
        if evaluations == MAX_EVALUATIONS:
            done = torch.ones_like(done)
        if done.any():
            models = active[done]
            found.parameters[models] = search.point.parameters[done]
            found.values[models], found.gradients[models] = search.values[done], search.steepest[done]
            found.evaluations[models] = evaluations
            active = active[~done]
            if not len(active):
                break
            search.keep(~done)
        if evaluations == RESCALED_AT:
            search.rescale()
        search.step()
        if evaluations % RELOCATED_EVERY == 0 or (tolerance > 0 and (search.steepest <= tolerance).any()):
            search.relocate()
        done = (search.steepest <= tolerance) | (search.slow(decrease) >= 2) | (search.steps < SHORTEST_STEP)
    return found


class _Search:
    """The state of M searches; directions (M, P) are in units of the scale (M, K, R + 1)."""

    def __init__(self, losses: Losses, start: Tensor, scale: Tensor) -> None:
        self.losses, self.scale = losses, scale
        self.point = losses.locate(start)
        self.values, self.gradients = losses.evaluate(self.point)
        self.slopes = self._find_slopes(self.gradients)
        self.directions = -self.slopes
        self._spare = [torch.empty_like(self.point.logits) for _ in range(2)]  # used again and again: memory costs time
        self.steps = torch.zeros_like(self.values)  # where each looks first when it chooses the length of its step
        self.reach = torch.full_like(self.values, math.inf)  # the longest step that each may take
        self.memory = _Memory(self.directions, losses.features.dtype)
        self.noise = NOISE[losses.features.dtype]
        self._decreases = torch.ones_like(self.values)
        self._slow = torch.zeros_like(self.values, dtype=torch.int64)

    @property
    def steepest(self) -> Tensor:
        """The largest entry of each gradient, (M,)."""
        return self.gradients.abs().amax(dim=(1, 2))

    def keep(self, models: Tensor) -> None:
        """Go on with these only, a mask (M,)."""
        self.losses, self.point, self.scale = self.losses.select(models), self.point.select(models), self.scale[models]
        for name in ("values", "gradients", "slopes", "directions", "steps", "reach", "_decreases", "_slow"):
            setattr(self, name, getattr(self, name)[models])
        self.memory.keep(models)
        self._spare = [logits[: len(self.values)] for logits in self._spare]

    def relocate(self) -> None:
        """Find the logits anew: those that were added up along the way are off by what rounding left."""
        self.point = self.losses.locate(self.point.parameters)
        self.values, self.gradients = self.losses.evaluate(self.point)
        self.slopes = self._find_slopes(self.gradients)

    def rescale(self) -> None:
        """Measure everything anew in units of the curvature that there is now."""
        scale = torch.minimum(self.losses.find_curvature(self.point).rsqrt(), MAX_RESCALING * self.scale)
        self.memory.rescale((scale / self.scale).flatten(1))
        self.scale = scale
        self.slopes = self._find_slopes(self.gradients)
        self._turn(torch.ones_like(self.steps, dtype=torch.bool))

    def step(self) -> None:
        """One evaluation: accept the trial point and choose a direction, or shorten the step."""
        before = (self.directions * self.slopes).sum(dim=1)
        steps, direction = self._choose_steps(before)
        trial, values, gradients = self.losses.move(self.point, direction, steps, self._spare[1])
        slopes = self._find_slopes(gradients)
        promised = steps * before  # below 0
        flat = (values <= self.values + self.noise * self.values.abs()) & (
            (self.directions * slopes).sum(dim=1).abs() <= before.abs()
        )
        accepted = (values <= self.values + SUFFICIENT * promised) | flat
        self.memory.add(steps[:, None] * self.directions, slopes - self.slopes, accepted)
        too_far = (-promised * steps / (2 * (values - self.values - promised).clamp_min(1e-300))).nan_to_num(0.0)
        shorter = torch.maximum(torch.minimum(too_far, steps / 2), steps / 10)  # a parabola's minimum
        self._decreases = torch.where(accepted, (self.values - values) / self.values.abs(), math.inf)
        self.steps, self.reach = shorter, shorter
        self._go_to(trial, accepted)
        self.values = torch.where(accepted, values, self.values)
        self.gradients = torch.where(accepted[:, None, None], gradients, self.gradients)
        self.slopes = torch.where(accepted[:, None], slopes, self.slopes)
        self._turn(accepted)

    def _go_to(self, trial: Point, models: Tensor) -> None:
        """Take these models to a trial point, a mask (M,)."""
        if models.all():
            self.point, self._spare[1] = trial, self.point.logits
            return
        chosen, here = models[:, None, None], self.point
        parameters = torch.where(chosen, trial.parameters, here.parameters)
        self.point = Point(
            parameters=parameters, logits=torch.where(chosen, trial.logits, here.logits, out=here.logits)
        )

    def slow(self, decrease: float) -> Tensor:
        """How many steps in succession decreased each loss by less than this share, (M,)."""
        small = self._decreases <= decrease
        waiting = self._decreases == math.inf
        self._slow = torch.where(small, self._slow + 1, torch.where(waiting, self._slow, 0))
        return self._slow if decrease else torch.zeros_like(self._slow)

    def _choose_steps(self, before: Tensor) -> tuple[Tensor, Point]:
        """Newton's step from where each looks first, and what it goes along; before (M,), the slope here."""
        ahead = self.directions.view_as(self.scale) * self.scale
        direction, slope, curvature = self.losses.look_along(self.point, ahead, self.steps, self._spare[0])
        newton = self.steps - slope / curvature.clamp_min(1e-300)
        secant = self.steps * before / (before - slope)  # between 0 and there, if the loss rises there
        newton = torch.where(slope > 0, torch.maximum(newton, secant / 2), newton)
        return torch.minimum(newton, self.reach), direction

    def _turn(self, models: Tensor) -> None:
        """Choose new directions for these models, a mask (M,)."""
        self.directions = torch.where(models[:, None], self.memory.find_directions(self.slopes), self.directions)
        self.steps = torch.where(models, 1.0, self.steps)
        self.reach = torch.where(models, LONGEST_STEP, self.reach)

    def _find_slopes(self, gradients: Tensor) -> Tensor:
        """Gradients (M, P) in units of the scale."""
        return (gradients * self.scale).flatten(1)


class _Memory:
    """The last steps of M searches and how their gradients changed, as far as directions need them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        (n_models, size), h = like.shape, REMEMBERED
        self._vectors = torch.zeros(n_models, 2 * h, size, dtype=dtype, device=like.device)  # steps, then changes
        self._products = torch.zeros(n_models, 2 * h, 2 * h, dtype=torch.float64, device=like.device)
        self._unit = torch.ones(n_models, dtype=torch.float64, device=like.device)
        self._order: list[int] = []  # places of the pairs, the oldest first

    def keep(self, models: Tensor) -> None:
        """Forget all searches but these, a mask (M,)."""
        self._vectors, self._products = self._vectors[models], self._products[models]
        self._unit = self._unit[models]

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
            self._unit = torch.where(changes > 0, along / changes.clamp_min(1e-300), self._unit)

    def add(self, steps: Tensor, changes: Tensor, accepted: Tensor) -> None:
        """Take steps (M, P) and changes of the gradients (M, P); nothing of searches that did not move."""
        new = torch.stack([steps, changes], dim=1)  # (M, 2, P)
        among = new @ new.mT
        along, squares = among[:, 0, 1], among[:, 1, 1]
        good = accepted & (along > 0)
        if not good.any():
            return
        place = len(self._order) if len(self._order) < REMEMBERED else self._order.pop(0)
        self._order.append(place)
        places = torch.tensor([place, REMEMBERED + place], device=steps.device)
        low = torch.where(good[:, None, None], new, 0.0).to(self._vectors.dtype)
        self._vectors[:, places] = low
        products = torch.bmm(self._vectors, low.mT).double()  # (M, 2h, 2)
        self._products[:, :, places] = products
        self._products[:, places] = products.mT
        self._unit = torch.where(good, along / squares.clamp_min(1e-300), self._unit)

    def find_directions(self, slopes: Tensor) -> Tensor:
        """Directions of descent (M, P) from gradients (M, P); equation 3.1 of Byrd, Nocedal and Schnabel."""
        if not self._order:
            return -slopes
        of_steps = torch.tensor(self._order, device=slopes.device)
        of_changes = of_steps + REMEMBERED
        low, unit = slopes.to(self._vectors.dtype), self._unit[:, None, None]
        with_slopes = torch.bmm(self._vectors, low[..., None]).double()  # (M, 2h, 1)
        between = self._products[:, :, of_changes]
        along, upper = between[:, of_steps].diagonal(dim1=1, dim2=2)[..., None], between[:, of_steps].triu()
        upper.diagonal(dim1=1, dim2=2).add_((along == 0)[..., 0])  # where there is no pair
        first = torch.linalg.solve_triangular(upper, with_slopes[:, of_steps], upper=True)
        second = along * first + unit * (between[:, of_changes] @ first - with_slopes[:, of_changes])
        coefficients = torch.zeros_like(with_slopes)
        coefficients[:, of_steps] = torch.linalg.solve_triangular(upper.mT, second, upper=False)
        coefficients[:, of_changes] = -unit * first
        remembered = torch.bmm(coefficients.mT.to(self._vectors.dtype), self._vectors)[:, 0]
        return -(self._unit[:, None] * slopes + remembered)
