"""`featcache train-head`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli.common import TerminalProgress, json_option, option, output_option
from featcache.cli.run_output import print_run
from featcache.config import RUNS_DIR, SOLVERS, HeadConfig


@click.command("train-head", short_help="Stage 2: a linear head on cached features.")
@click.argument("features", type=click.Path())
@output_option(f"{RUNS_DIR}/head", "The run folder; a head that lies there is replaced.")
@option("--solver", type=click.Choice(SOLVERS), default=HeadConfig.solver, help="Two ways to one optimum.")
@option(
    "-C",
    "C",
    type=float,
    default=None,
    metavar="C",
    help="Inverse strength of the L2 penalty.  [default: chosen by cross-validation on the training split]",
)
@option("--folds", type=click.IntRange(min=2), default=HeadConfig.folds, help="Folds of that cross-validation.")
@option("--seed", type=click.IntRange(min=0), default=HeadConfig.seed, help="Shuffles the folds.")
@json_option
def command(features: str, output: str, as_json: bool, **settings: Any) -> None:
    """Stage 2: fit a linear head on the cached FEATURES and evaluate it.

    \b
    Example:
      featcache train-head features.h5 --solver torch -C 0.1
    """
    from featcache.stages.train_head import train_head

    print_run(train_head(features, output, progress=TerminalProgress(), **settings), as_json)
