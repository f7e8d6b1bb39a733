"""`featcache show`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli.common import complete_backbone, json_option, option, output_option, print_json
from featcache.config import FINETUNE_CHOICES, ExtractConfig, FinetuneConfig, ShowConfig


@click.command("show", short_help="A picture: a training batch, views of an image, predictions.")
@click.argument("target", type=click.Path(), metavar="DATA|IMAGE|CACHE|RUN")
@output_option(None, "The PNG file.  [default: batch.png, views.png, images.png, or RUN/predictions.png]")
@option(
    "--image",
    type=click.Path(),
    default=None,
    metavar="PATH",
    help="Of DATA or CACHE: this image, and random views of it; a path relative to the images, or any other.",
)
@option(
    "-n",
    "--n-images",
    type=click.IntRange(1, ShowConfig.MOST),
    default=ShowConfig.n_images,
    help="Pictures in the grid, at most.",
)
@option(
    "--seed",
    type=click.IntRange(min=0),
    default=ShowConfig.seed,
    help="Chooses the pictures, and what augmentation does.",
)
@option(
    "--backbone",
    default=None,
    metavar="NAME",
    shell_complete=complete_backbone,
    help=f"Of DATA or IMAGE: whose preprocessing they get.  [default: {ExtractConfig.backbone}]",
)
@option(
    "--augment",
    type=click.Choice(FINETUNE_CHOICES["augment"]),
    default=None,
    help=f"Of DATA or IMAGE: as of `featcache finetune`.  [default: {FinetuneConfig.augment}]",
)
@option("--mixup", type=float, default=None, metavar="ALPHA", help="Of DATA: mix the batch by mixup, with both labels.")
@option("--cutmix", type=float, default=None, metavar="ALPHA", help="Of DATA: the same by CutMix.")
@option(
    "--split",
    type=click.Choice(ShowConfig.SPLITS),
    default=None,
    help="Of CACHE or RUN.  [default: train of CACHE, val of RUN]",
)
@option("--class", "--class-name", "class_name", default=None, metavar="NAME", help="Only images of this class.")
@option("--wrong", is_flag=True, help="Of RUN: only wrong predictions, the most confident first.")
@option(
    "--data",
    type=click.Path(),
    default=None,
    metavar="DIR",
    help="Of CACHE or RUN: where the images are now, if they have moved.",
)
@option("--window", is_flag=True, help="Open a window; a file is then written only with -o.")
@json_option  # fmt: skip
def command(target: str, output: str | None, as_json: bool, **settings: Any) -> None:
    """Look at it: a training batch, views of an image, what a cache was made of, predictions.

    Of DATA a training batch as fine-tuning sees it, of an IMAGE augmented views of it, of a CACHE its images as the
    backbone saw them or with --image the views that it holds, of a RUN its predictions.

    \b
    Example:
      featcache show photos --augment randaugment
      featcache show photos --image train/ants/0013035.jpg
      featcache show features.h5 --image train/ants/0013035.jpg
      featcache show runs/head --wrong --class ants
    """
    from featcache.stages.show import show

    path = show(target, output, **settings)
    if as_json:
        print_json({"figure": None if path is None else str(path)})
    elif path is not None:
        click.echo(path)
