"""`featcache finetune`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    TerminalProgress,
    backbone_options,
    force_option,
    image_options,
    json_option,
    list_left_out,
    machine_options,
    option,
    output_option,
    skip_bad_option,
    split_options,
)
from featcache.cli.run_output import print_run
from featcache.config import BATCH_NORMS, RUNS_DIR, FinetuneConfig


@click.command("finetune", short_help="The other way: train the whole network.")
@click.argument("data", type=click.Path())
@output_option(f"{RUNS_DIR}/finetune", "The run folder.")
@backbone_options()
@image_options
@option(
    "--epochs",
    type=click.IntRange(min=1),
    default=FinetuneConfig.epochs,
    help="Passes over the training images.",
)
@option("--batch-size", type=click.IntRange(min=1), default=FinetuneConfig.batch_size, help="Images per step.")
@option("--lr", type=float, default=FinetuneConfig.lr, help="Learning rate of SGD.")
@option("--momentum", type=float, default=FinetuneConfig.momentum, help="Momentum of SGD.")
@option(
    "--step-size",
    type=click.IntRange(min=1),
    default=FinetuneConfig.step_size,
    help="Epochs between steps of the learning rate.",
)
@option("--gamma", type=float, default=FinetuneConfig.gamma, help="Factor of each such step.")
@option("--freeze", is_flag=True, help="Train the last layer only, through the frozen network, without a cache.")
@option(
    "--batch-norm",
    type=click.Choice(BATCH_NORMS),
    default=FinetuneConfig.batch_norm,
    help="BatchNorm statistics: follow the batches, stay fixed, or the backbone's default.",
)
@machine_options
@split_options()
@skip_bad_option
@force_option
@json_option
def command(data: str, output: str, as_json: bool, **settings: Any) -> int:
    """The other way: train the whole network on the images of DATA, end to end.

    The default is the classic recipe: SGD, a learning rate of 0.001 divided by 10 every 7 epochs, batches of 4, random
    crops and flips, the weights of the best validation epoch kept.

    \b
    Example:
      featcache finetune photos --epochs 5 --batch-size 16
    """
    from featcache.stages.finetune import finetune

    run = finetune(data, output, progress=TerminalProgress(), **settings)
    print_run(run, as_json)
    list_left_out(run.left_out)
    return LEFT_OUT if run.left_out else DONE
