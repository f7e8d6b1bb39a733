"""`featcache train-head`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli.common import TerminalProgress, combine, json_option, option, output_option
from featcache.cli.run_output import print_run
from featcache.config import RUNS_DIR, SCALINGS, SOLVERS, HeadConfig

penalty_options = combine(
    option("--solver", type=click.Choice(SOLVERS), default=HeadConfig.solver,
           help="lbfgs and sklearn reach one optimum; sgd streams features larger than memory; ridge has a closed "
           "form; knn asks the nearest neighbours."),
    option("-C", "C", type=float, default=None, metavar="C",
           help="Inverse strength of the L2 penalty.  [default: chosen by cross-validation on the training split]"),
    option("-k", "k", type=click.IntRange(min=1), default=None, metavar="K",
           help="Neighbours that vote, of knn.  [default: chosen likewise]"),
    option("--temperature", type=float, default=None, metavar="T",
           help="How fast their votes fade, of knn.  [default: chosen likewise]"),
    option("--scaling", type=click.Choice(SCALINGS), default=HeadConfig.scaling,
           help="Features of variance 1, images of length 1, or neither."),
    option("--class-weight", type=click.Choice(("balanced",)), default=None,
           help="Let all classes count the same, however many images they have."),
)  # fmt: skip
selection_options = combine(
    option("--select-on", type=click.Choice(("cv", "val")), default=HeadConfig.select_on,
           help="Choose on folds of the training split, or, optimistically, on the validation split."),
    option("--folds", type=click.IntRange(min=2), default=HeadConfig.folds, help="Folds of the cross-validation."),
    option("--calibrate", is_flag=True, help="Make probabilities honest by a temperature from held-out folds."),
    option("--views/--no-views", "views", default=None,
           help="Learn from augmented views too, or not.  [default: where the features hold some]"),
    option("--tta", is_flag=True, help="Average predictions over the test views that the features hold."),
)  # fmt: skip
few_options = combine(
    option("--shots", type=click.IntRange(min=1), default=None, metavar="N",
           help="Learn from N random images of each class."),
    option("--fraction", type=float, default=None, metavar="SHARE",
           help="Learn from a random share of the images of each class."),
    option("--repeats", type=click.IntRange(min=1), default=HeadConfig.repeats,
           help="How often to draw images, for --shots, --fraction and --curve."),
    option("--curve", is_flag=True, help="Accuracy against the number of images: would more of them help?"),
)  # fmt: skip
descent_options = combine(
    option("--epochs", type=click.IntRange(min=1), default=HeadConfig.epochs, help="Passes over the images, of sgd."),
    option("--batch-size", type=click.IntRange(min=1), default=HeadConfig.batch_size, help="Images per step, of sgd."),
    option("--lr", type=float, default=HeadConfig.lr, help="Largest learning rate, of sgd."),
    option("--device", default=HeadConfig.device, metavar="DEVICE", help="Of lbfgs: auto, cpu or cuda."),
)  # fmt: skip


@click.command("train-head", short_help="Stage 2: a head on cached features.")
@click.argument("features", type=click.Path())
@output_option(f"{RUNS_DIR}/head", "The run folder; a head that lies there is replaced.")
@penalty_options
@selection_options
@few_options
@descent_options
@option("--seed", type=click.IntRange(min=0), default=HeadConfig.seed, help="Shuffles folds and rows, draws images.")
@json_option
def command(features: str, output: str, as_json: bool, **settings: Any) -> None:
    """Stage 2: fit a head on the cached FEATURES and evaluate it.

    \b
    Example:
      featcache train-head features.h5
      featcache train-head features.h5 --solver knn --curve
      featcache train-head features.h5 --shots 10
    """
    from featcache.stages.train_head import train_head

    print_run(train_head(features, output, progress=TerminalProgress(), **settings), as_json)
