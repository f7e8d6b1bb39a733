"""`featcache show`."""

from __future__ import annotations

import click

from featcache.cli.common import complete_backbone, json_option, option, output_option, print_json
from featcache.config import ExtractConfig


@click.command("show", short_help="A picture: a training batch, or predictions.")
@click.argument("target", type=click.Path(), metavar="DATA|RUN")
@output_option(None, "The PNG file.  [default: batch.png, or RUN/predictions.png]")
@option("-n", "--n-images", type=click.IntRange(1, 96), default=8, help="Pictures in the grid.")
@option("--seed", type=click.IntRange(min=0), default=0, help="Chooses the pictures.")
@option("--backbone", default=ExtractConfig.backbone, metavar="NAME", shell_complete=complete_backbone,
        help="Whose preprocessing a training batch gets.")  # fmt: skip
@option("--data", type=click.Path(), default=None, help="Where a run's images are now, if they have moved.")
@option("--wrong", is_flag=True, help="Only a run's wrong predictions, the most confident first.")
@json_option
def command(
    target: str,
    output: str | None,
    n_images: int,
    seed: int,
    backbone: str,
    data: str | None,
    wrong: bool,
    as_json: bool,
) -> None:
    """Look at it: a training batch of DATA with its labels, or a RUN's predictions, as a picture.

    \b
    Example:
      featcache show photos -o batch.png
      featcache show runs/head --wrong
    """
    from featcache.stages.show import show

    path = show(target, output, n_images=n_images, seed=seed, backbone=backbone, data=data, wrong=wrong)
    if as_json:
        print_json({"figure": str(path)})
    else:
        click.echo(path)
