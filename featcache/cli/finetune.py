"""`featcache finetune`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    Duration,
    TerminalProgress,
    backbone_options,
    combine,
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
from featcache.config import FINETUNE_CHOICES, RUNS_DIR, FinetuneConfig


def choice(name: str, what: str, default: Any = "usual") -> Any:
    """An option with a few words to choose from."""
    usual = getattr(FinetuneConfig, name) if default == "usual" else default
    flag = "--" + name.replace("_", "-")
    return option(flag, type=click.Choice(FINETUNE_CHOICES[name]), default=usual, help=what)


def number(name: str, what: str, kind: Any = float, metavar: str = "NUMBER") -> Any:
    """An option with a number, and the setting's own default."""
    flag = "--" + name.replace("_", "-")
    return option(flag, type=kind, default=getattr(FinetuneConfig, name), metavar=metavar, help=what)


COUNT = click.IntRange(min=1)

recipe_options = combine(
    choice("mode", "What is trained: everything; the last layer; that first and then everything; everything from the "
           "linear head that fits the cached features (LP-FT)."),
    option("--freeze", is_flag=True, help="The same as --mode head."),
    option("--features", type=click.Path(), default=FinetuneConfig.features, metavar="FILE",
           help="Of lp-ft: the cache, made or extended where it has to be."),
    number("epochs", "Passes over the training images.", COUNT, "N"),
    number("head_epochs", "Of staged: passes of the last layer alone before those.", COUNT, "N"),
    number("batch_size", "Images per gradient step, of all processes together.", COUNT, "N"),
    number("lr", "Largest learning rate of the last layer.  [default: by mode and optimizer, see docs/finetune.md]"),
    number("lr_backbone", "The same of all else.  [default: in the mode's proportion to --lr]"),
    number("layer_decay", "Times as much for each layer further from the head."),
    choice("optimizer", "Who takes the steps."),
    number("momentum", "Of sgd."),
    number("weight_decay", "Of weights; norms and biases have none.  [default: sgd 0, adamw 0.01]"),
    choice("schedule", "How the learning rate goes."),
    number("step_size", "Of step: epochs between steps.", COUNT, "EPOCHS"),
    number("gamma", "Of step: factor of each."),
    number("warmup", "Epochs, fewer than all, in which the rate grows first.  [default: none; one-cycle: 30 % of all]",
           metavar="EPOCHS"),
    choice("batch_norm", "BatchNorm statistics: follow the batches, stay fixed, or the backbone's default."),
    choice("augment", "What happens to training images."),
    number("mixup", "Alpha of mixup; 0 is none.", metavar="ALPHA"),
    number("cutmix", "Alpha of CutMix; 0 is none.", metavar="ALPHA"),
    number("label_smoothing", "Share of the target spread over all classes.", metavar="SHARE"),
    choice("class_weight", "Let all classes count the same in the loss."),
    number("ema", "Average the weights with this decay per step, and keep the average.", metavar="DECAY"),
)  # fmt: skip

run_options = combine(
    choice("select_on", "What chooses the epoch that is kept: training images that are held out; the validation split "
           "(the classic habit, optimistic); nothing, the last.  [default: holdout; val where there is a test split]"),
    number("holdout_fraction", "Share of the training images that is held out.", metavar="SHARE"),
    number("patience", "Stop after so many epochs without a better one.", COUNT, "EPOCHS"),
    option("--time-budget", type=Duration(), default=None, metavar="TIME",
           help="Be done within 90s, 10m or 1.5h, whatever epoch that is in."),
    choice("precision", "In which the network computes, under autocast.  [default: bf16 on a GPU that has it, "
           "else fp32]"),
    option("--compile", is_flag=True, help="Let torch.compile make the network faster; takes a minute at first."),
    option("--channels-last/--no-channels-last", default=None,
           help="Order of images in memory.  [default: channels last; not with --workers 0]"),
    option("--deterministic", is_flag=True, help="Only operators that give the same every time, on CUDA too."),
    option("--cache-images/--no-cache-images", default=FinetuneConfig.cache_images,
           help="Keep decoded images in memory, as many as fit into a quarter of it."),
    option("--resume/--no-resume", default=FinetuneConfig.resume,
           help="Go on where an unfinished run of the same settings was left."),
    number("checkpoint_every", "Seconds between checkpoints.", metavar="SECONDS"),
    option("--tensorboard", type=click.Path(), default=None, metavar="DIR",
           help="Write TensorBoard event files there."),
)  # fmt: skip


@click.command("finetune", short_help="The other way: train the whole network.")
@click.argument("data", type=click.Path())
@output_option(f"{RUNS_DIR}/finetune", "The run folder.")
@backbone_options()
@image_options
@recipe_options
@run_options
@machine_options
@split_options()
@option(
    "--split-seed",
    type=click.IntRange(min=0),
    default=None,
    help="Chooses the validation split; --seed then varies all else on the same images.  [default: --seed]",
)
@skip_bad_option
@force_option
@json_option
def command(data: str, output: str, as_json: bool, freeze: bool, **settings: Any) -> int:
    """The other way: train the whole network on the images of DATA, end to end.

    The default is the classic recipe: SGD, a learning rate of 0.001 divided by 10 every 7 epochs, batches of 4, random
    crops and flips; the epoch that is kept is chosen on training images that are held out. See docs/finetune.md.

    \b
    Example:
      featcache finetune photos --epochs 5 --batch-size 16
      featcache finetune photos --mode lp-ft --epochs 5
      torchrun --nproc-per-node 2 -m featcache finetune photos
    """
    from featcache.processes import measure_age, read_rank
    from featcache.progress import SILENT
    from featcache.stages.finetune import finetune

    if freeze:
        settings["mode"] = "head"
    is_first = read_rank() == 0
    run = finetune(data, output, progress=TerminalProgress() if is_first else SILENT, age=measure_age(), **settings)
    if is_first:
        print_run(run, as_json)
        list_left_out(run.left_out)
    return LEFT_OUT if run.left_out else DONE
