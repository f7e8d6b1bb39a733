"""Solvers of heads against the usual ones, at the same objective.

    python scripts/bench/heads.py [FEATURES.h5 ...]

Synthetic features of 50,000 images (512 wide, of 10 and of 100 classes) and those of the given caches. Everybody gets
the same standardised rows and minimises the same objective, in turns in one process; every ratio is within this run.
Times include the standardisation and whatever a solver prepares.

single      one fit at one C, at least as far as scikit-learn goes by default: seconds, objective, held-out accuracy
path        ten values of C: scikit-learn starting each fit at the one before, featcache all at once; excess objective
selection   ten values of C in five folds, and scikit-learn's five cold fits at one C
ridge       the whole path of ridge regression with its leave-one-out errors
solvers     of the given caches: every solver, everything chosen on the training split, on the validation split
stream      a million float16 rows from an HDF5 file in shuffled chunks; in another process, whose memory counts
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from extraction import read_peak
from numpy.typing import NDArray

from featcache import read_cache
from featcache.config import HeadConfig
from featcache.heads import descent, find_logits, fit_head, lbfgs, logistic, ridge
from featcache.heads.rows import TrainingRows
from featcache.heads.selection import make_folds
from featcache.heads.shuffling import ShuffledRows
from featcache.metrics import measure_probabilities, to_probabilities, wilson_interval
from featcache.progress import SILENT

SECTIONS = ("single", "path", "selection", "ridge", "solvers", "stream")
GRID = tuple(np.logspace(-5, 0, 10).tolist())
TOLERANCE = 1e-4  # the largest entry of the gradient of the mean loss: scikit-learn's default
PAUSE = 0.5  # seconds: the threads of the library that worked before spin for a while and take the processors
TIGHT = 1e-6  # to which scikit-learn reaches the objectives of the path, too


@dataclass(frozen=True)
class Problem:
    """Training rows, rows that are held out, and the C at which single fits are compared."""

    name: str
    train: NDArray[np.float32]
    labels: NDArray[np.int64]
    val: NDArray[np.float32]
    val_labels: NDArray[np.int64]
    strength: float
    device: str = "cpu"

    @property
    def n_classes(self) -> int:
        """How many there are."""
        return int(self.labels.max()) + 1

    @property
    def rows(self) -> TrainingRows:
        """As solvers want them."""
        weights = np.ones(len(self.labels))
        return TrainingRows(features=self.train, labels=self.labels, n_classes=self.n_classes, weights=weights)


def make_synthetic(n_classes: int, distance: float, n: int = 50_000, dim: int = 512) -> Problem:
    """Like features after pooling: correlated, none below 0, variances that fall as a power; classes overlap."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, dim + 1) ** -0.5
    means = rng.normal(size=(n_classes, dim))
    means *= distance * np.sqrt(2) / np.linalg.norm(means, axis=1, keepdims=True)
    rotation, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    labels = rng.integers(0, n_classes, n + 10_000)
    rows = (means[labels] + rng.normal(size=(len(labels), dim))) * spread / np.sqrt((spread**2).mean())
    features = np.maximum((rows @ rotation + 1).astype(np.float32), 0)
    name = f"synthetic, {n:,} x {dim}, {n_classes} classes"
    return Problem(name, features[:n], labels[:n], features[n:], labels[n:], 0.01)


def read_problem(path: str) -> Problem:
    """The features of a cache."""
    cache = read_cache(path)
    train, val = cache.splits["train"], cache.splits["val"]
    name = f"{path}, {len(train):,} x {cache.dim}, {len(cache.classes)} classes"
    return Problem(name, train.features, train.listing.labels, val.features, val.listing.labels, 0.01)


def time_in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, Any]]:
    """The median seconds of each, and what it gave last."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    results = {}
    for _ in range(rounds):
        for name, work in works.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            results[name] = work()
            seconds[name].append(time.perf_counter() - started)
    return {name: (statistics.median(values), results[name]) for name, values in seconds.items()}


def fit_usual(problem: Problem) -> Any:
    """What most people do: standardise, and scikit-learn's logistic regression with its defaults."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=problem.strength, max_iter=10_000).fit(standardise(problem), problem.labels)


def standardise(problem: Problem) -> Any:
    """The training rows as scikit-learn standardises them."""
    return make_scaler(problem).transform(problem.train)


def make_scaler(problem: Problem) -> Any:
    """Mean and standard deviation of the training rows."""
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(problem.train)


def find_objective(x: NDArray[np.float32], labels: NDArray[np.int64], weight: Any, bias: Any, strength: float) -> float:
    """The objective / (C N) in double precision, of a softmax with one weight vector per class on standardised rows."""
    logits = torch.from_numpy(x).double() @ torch.as_tensor(weight).double().T + torch.as_tensor(bias).double()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    return float(loss + torch.as_tensor(weight).double().square().sum() / (2 * strength * len(labels)))


def bench_single(problem: Problem, rounds: int) -> list[str]:
    """One fit at one C."""
    if problem.n_classes == 2:  # of which each has but one weight vector here, and one for each class there
        return []
    strength, scaler = problem.strength, make_scaler(problem)
    x, val = scaler.transform(problem.train), scaler.transform(problem.val)

    def usual() -> tuple[Any, Any]:
        model = fit_usual(problem)
        return model.coef_, model.intercept_

    def ours() -> tuple[Any, Any]:
        config = HeadConfig(C=strength, device=problem.device)
        made = logistic.make_problem(problem.rows, config, problem.device)
        found = lbfgs.solve(made.features, made.labels, C=strength, tolerance=TOLERANCE)
        weight, bias = made.coordinates.to_raw(found.coefficients, found.intercept)
        return weight * scaler.scale_, bias + weight @ scaler.mean_

    works: dict[str, Callable[[], Any]] = {"scikit-learn lbfgs": usual, "featcache lbfgs": ours}
    timed = time_in_turns(works, rounds)
    first = timed["scikit-learn lbfgs"][0]
    lines = []
    for name, (seconds, (weight, bias)) in timed.items():
        objective = find_objective(x, problem.labels, weight, bias, strength)
        accuracy = float(((val @ weight.T + bias).argmax(axis=1) == problem.val_labels).mean())
        lines.append(
            f"  {name:<22}{seconds:8.3f} s  objective {objective:.7f}  accuracy {accuracy:.4f}  "
            f"x {first / seconds:5.1f}"
        )
    return lines


def bench_path(problem: Problem, _: int) -> list[str]:
    """Ten values of C."""
    if problem.n_classes == 2:
        return []
    labels, scaler = problem.labels, make_scaler(problem)
    x = scaler.transform(problem.train)

    def usual(tolerance: float = 1e-4) -> list[tuple[Any, Any]]:
        from sklearn.linear_model import LogisticRegression

        standardised = standardise(problem)
        if tolerance < 1e-4:
            standardised = standardised.astype(np.float64)  # in single precision it ends before it is there
        model = LogisticRegression(max_iter=10_000, warm_start=True, tol=tolerance)
        found = []
        for strength in GRID:
            model.set_params(C=strength).fit(standardised, labels)
            found.append((model.coef_.copy(), model.intercept_.copy()))
        return found

    def ours() -> list[tuple[Any, Any]]:
        made = logistic.make_problem(problem.rows, HeadConfig(grid=GRID), problem.device)
        path = logistic.fit_path(made, made.features, made.labels, made.weights[None], GRID)[0].cpu().numpy()
        raw = [made.coordinates.to_raw(one[:, :-1], one[:, -1]) for one in path]
        return [(weight * scaler.scale_, bias + weight @ scaler.mean_) for weight, bias in raw]

    works: dict[str, Callable[[], Any]] = {"scikit-learn, warm": usual, "featcache, at once": ours}
    if problem.n_classes <= 10:  # of more it would take ten minutes
        works["as far, scikit-learn"] = lambda: usual(TIGHT)
    timed = time_in_turns(works, 1)
    made = logistic.make_problem(problem.rows, HeadConfig(grid=GRID), problem.device)
    losses = logistic.make_losses(made.features.float(), made.labels, made.rows.n_classes, made.weights[None], GRID)
    start, scale = (
        descent.start_at_priors(losses),
        descent.scale_by_curvature(losses, logistic.find_variance(made.features)),
    )
    least = descent.minimise(losses, start, scale, tolerance=2e-6).values.tolist()
    first, lines = timed["scikit-learn, warm"][0], []
    for name, (seconds, path) in timed.items():
        values = [find_objective(x, labels, *one, strength) for one, strength in zip(path, GRID, strict=True)]
        least = [min(one, other) for one, other in zip(least, values, strict=True)]
        lines.append((name, seconds, values))
    return [
        f"  {name:<22}{seconds:8.3f} s  excess objective at most "
        f"{max((value - low) / low for value, low in zip(values, least, strict=True)):.1e}  x {first / seconds:5.1f}"
        for name, seconds, values in lines
    ]


def bench_selection(problem: Problem, _: int) -> list[str]:
    """Ten values of C in five folds."""

    def usual() -> None:
        for _ in range(5):
            fit_usual(problem)

    def ours() -> Any:
        config = HeadConfig(grid=GRID, device=problem.device)
        made = logistic.make_problem(problem.rows, config, problem.device)
        return logistic.choose_c(made, config, make_folds(problem.labels, 5, 0), None, SILENT)

    timed = time_in_turns({"scikit-learn, 5 fits": usual, "featcache, 10 x 5": ours}, 1)
    first = timed["scikit-learn, 5 fits"][0]
    return [
        f"  {name:<22}{seconds:8.3f} s  {say_chosen(found):<40}x {first / seconds:5.1f}"
        for name, (seconds, found) in timed.items()
    ]


def say_chosen(found: Any) -> str:
    """Which C was chosen, if one was."""
    return f"chosen: C = {found.choice['C']:.2g}" if found else ""


def bench_ridge(problem: Problem, rounds: int) -> list[str]:
    """The whole path of ridge regression, and one logistic fit."""

    def usual() -> None:
        fit_usual(problem)

    def path_of_sklearn() -> float:
        from sklearn.linear_model import RidgeClassifierCV

        model = RidgeClassifierCV(alphas=[1 / value for value in ridge.GRID]).fit(standardise(problem), problem.labels)
        return float(model.score(make_scaler(problem).transform(problem.val), problem.val_labels))

    def solved() -> Any:
        space = ridge.decompose(ridge.RidgeStatistics.collect(problem.rows), "standard")
        return [space.make_head(value) for value in ridge.GRID]

    def judged() -> float:
        fitted = ridge.fit(problem.rows, HeadConfig(), None, SILENT)
        return float((fitted.head.logits(problem.val).argmax(axis=1) == problem.val_labels).mean())

    works: dict[str, Callable[[], Any]] = {
        "one logistic fit": usual,
        "scikit-learn ridge CV": path_of_sklearn,
        "path of ten": solved,
        "with leave-one-out": judged,
    }
    timed = time_in_turns(works, rounds)
    first = timed["one logistic fit"][0]
    return [
        f"  {name:<22}{seconds:8.3f} s  {f'accuracy {found:.4f}' if isinstance(found, float) else '':<40}"
        f"x {first / seconds:5.1f}"
        for name, (seconds, found) in timed.items()
    ]


def bench_solvers(problem: Problem, _: int) -> list[str]:
    """Every solver as `train-head` uses it."""
    if problem.name.startswith("synthetic"):
        return []
    lines = ["  solver    chosen                      right       95 % interval    log loss  ECE     seconds"]
    for solver in ("lbfgs", "sklearn", "ridge", "sgd", "knn"):
        config = HeadConfig(solver=solver, device=problem.device, calibrate=True)
        seconds, fitted = time_in_turns({"": lambda config=config: fit_head(  # type: ignore[misc]
            problem.train, problem.labels, problem.n_classes, config)}, 1)[""]  # fmt: skip
        probabilities = to_probabilities(fitted.head.logits(problem.val))
        n, right = len(problem.val_labels), int((probabilities.argmax(axis=1) == problem.val_labels).sum())
        low, high = wilson_interval(right, n)
        measured = measure_probabilities(problem.val_labels, probabilities)
        chosen = ", ".join(f"{name} = {value:g}" for name, value in fitted.selection.choice.items())
        lines.append(
            f"  {solver:<10}{chosen:<28}{right} of {n}  {low:.3f} to {high:.3f}  {measured['log_loss']:8.4f}  "
            f"{measured['calibration_error']:.4f}  {seconds:7.2f}"
        )
    return lines


def bench_stream(n: int, dim: int, folder: Path) -> list[str]:
    """Rows in shuffled chunks from a cache of a million rows, and a head learned from them, each in its own process."""
    path = folder / "million.h5"
    run = [sys.executable, str(Path(__file__).resolve()), "--stream", str(path), "--rows", str(n), "--dim", str(dim)]
    return [line for what in ("write", "read", "train", "command") for line in subprocess.run(
        [*run, "--what", what], check=True, capture_output=True, text=True).stdout.splitlines()]  # fmt: skip


def write_million(path: Path, n: int, dim: int) -> None:
    """A cache of so many rows of ten classes that can be told apart."""
    from featcache.cache import FeatureCache, FeatureSplit, write_cache
    from featcache.dataset import Split

    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, dim)).astype(np.float32) * 0.2

    class Made:
        """Rows that are made when they are asked for; sorted by class, as in every cache."""

        def __init__(self, length: int) -> None:
            self.shape = (length, dim)

        def __getitem__(self, rows: slice) -> NDArray[np.float16]:
            start, stop, _ = rows.indices(self.shape[0])
            made = np.random.default_rng([start, self.shape[0]]).standard_normal((stop - start, dim), np.float32)
            return (made + means[np.arange(start, stop) * 10 // self.shape[0]]).astype(np.float16)

    def split(length: int, name: str) -> FeatureSplit:
        listing = Split(
            paths=tuple(f"{name}/{i}.jpg" for i in range(length)),
            labels=np.arange(length, dtype=np.int64) * 10 // length,
            digests=tuple(f"{name}{i}".encode().hex().rjust(64, "0") for i in range(length)),
            stats=np.zeros((length, 4), np.int64),
        )
        return FeatureSplit(listing=listing, features=Made(length))

    extractor = {
        "backbone": "imported",
        "weights": {"name": "made", "tensors_sha256": "0" * 64},
        "layer": "none",
        "preprocessing": None,
        "precision": {"compute": "float32", "stored": "float16"},
        "dim": dim,
    }
    provenance = {
        "data": "/nowhere", "settings": {"val_fraction": 0.2, "seed": 0}, "table": "made", "seconds": 0.0,
        "peak_memory_bytes": None, "device": "cpu", "runtime": "", "environment": {}, "bad": [],
    }  # fmt: skip
    splits = {"train": split(n, "train"), "val": split(10_000, "val")}
    classes = tuple("abcdefghij")
    write_cache(path, FeatureCache(classes=classes, extractor=extractor, splits=splits, provenance=provenance))


def read_million(path: Path) -> list[str]:
    """Epochs of shuffled chunks, in float16 and converted, and of a plain memory map."""
    from featcache.cache import CacheReader, open_cache

    with CacheReader(path) as reader:
        n, dim = reader.shape_of("train")
        rows = TrainingRows(
            features=reader.stream_features("train"),
            labels=np.zeros(n, np.int64),
            n_classes=2,
            weights=np.ones(n),
        )
        stream = ShuffledRows(rows, 1024, 0)
        torch.set_num_threads(1)  # as `sgd` does: the other one reads

        def epoch(convert: bool) -> None:
            for _, features in stream.epoch():
                if convert:
                    features.float()

        works: dict[str, Callable[[], Any]] = {
            "shuffled chunks": lambda: epoch(convert=False),
            "and as float32": lambda: epoch(convert=True),
        }
        timed = time_in_turns(works, 5)
    memory = read_peak()
    mapped = open_cache(path).splits["train"].features

    def plain() -> None:
        for start in range(0, n, 1024):
            np.array(mapped[start : start + 1024])

    timed |= time_in_turns({"memory map, in order": plain}, 5)
    order = np.random.default_rng(0).permutation(n)[:50_000]
    started = time.perf_counter()
    for start in range(0, len(order), 1024):
        mapped[order[start : start + 1024]]
    timed["memory map, at random"] = ((time.perf_counter() - started) * n / len(order), None)
    first = timed["memory map, in order"][0]
    lines = [
        f"  {name:<22}{seconds:8.3f} s  {n / seconds / 1e6:6.2f} million rows/s{'':<22}x {first / seconds:5.2f}"
        for name, (seconds, _) in timed.items()
    ]
    return [
        *lines,
        f"  peak memory of the process that streams: {memory:.0f} MiB ({n * dim * 2 / 2**20:.0f} MiB of features)",
    ]


def train_million(path: Path) -> list[str]:
    """A head by sgd on what is streamed, C chosen on the stream too."""
    from featcache.cache import CacheReader

    with CacheReader(path) as reader:
        n, train = reader.shape_of("train")[0], reader.stream_features("train")
        labels, val_labels = (np.arange(length) * 10 // length for length in (n, reader.shape_of("val")[0]))
        started = time.perf_counter()
        fitted = fit_head(train, labels, 10, HeadConfig(solver="sgd"))
        seconds = time.perf_counter() - started
        accuracy = float((find_logits(fitted.head, reader.stream_features("val")).argmax(axis=1) == val_labels).mean())
    passes = HeadConfig.epochs + 2 + 4  # of the fit, of the choice, and of the statistics and checks
    return [
        f"  a head, C chosen      {seconds:8.3f} s  accuracy {accuracy:.4f}, {fitted.selection.choice}, "
        f"{n * passes / seconds / 1e6:.2f} million rows/s",
        f"  peak memory of the process that learns: {read_peak():.0f} MiB",
    ]


def command_million(path: Path) -> list[str]:
    """`train-head --solver sgd` on the file: paths, digests and the record of the run are in memory too."""
    from featcache import train_head

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train_head(path, Path(folder) / "run", solver="sgd")
        seconds = time.perf_counter() - started
    return [f"  train-head --solver sgd {seconds:6.1f} s, peak memory {read_peak():.0f} MiB"]


@click.command(help=__doc__)
@click.argument("features", nargs=-1, type=click.Path(exists=True))
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="These sections.")
@click.option("--rounds", default=3, help="Of the short ones.")
@click.option("--rows", default=1_000_000, help="Streamed.")
@click.option("--dim", default=512, help="Of the rows that are streamed.")
@click.option("--device", default="cpu", help="Of featcache's lbfgs.")
@click.option("--stream", "stream_path", type=click.Path(path_type=Path), hidden=True)
@click.option("--what", hidden=True)
def main(
    features: tuple[str, ...],
    only: tuple[str, ...],
    rounds: int,
    rows: int,
    dim: int,
    device: str,
    stream_path: Path | None,
    what: str | None,
) -> None:
    """Print every section's lines as they are measured."""
    if stream_path is not None:
        if what == "write":
            write_million(stream_path, rows, dim)
        works_on = {"read": read_million, "train": train_million, "command": command_million}
        for line in works_on.get(str(what), lambda _: [])(stream_path):
            print(line)
        return
    works = {
        "single": bench_single,
        "path": bench_path,
        "selection": bench_selection,
        "ridge": bench_ridge,
        "solvers": bench_solvers,
    }
    problems: list[Callable[[], Problem]] = [lambda: make_synthetic(10, 3.0), lambda: make_synthetic(100, 4.0)]
    problems += [lambda path=path: read_problem(path) for path in features]  # type: ignore[misc]
    for make in problems if set(only or SECTIONS) - {"stream"} else []:
        problem = replace(make(), device=device)
        print(f"{problem.name}, C = {problem.strength}, {torch.get_num_threads()} threads, lbfgs on {device}")
        for name, work in works.items():
            if name in (only or SECTIONS) and (lines := work(problem, rounds)):
                print(f" {name}", *lines, sep="\n", flush=True)
    if "stream" in (only or SECTIONS):
        with tempfile.TemporaryDirectory() as folder:
            print(f" stream, {rows:,} x {dim} float16", *bench_stream(rows, dim, Path(folder)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
