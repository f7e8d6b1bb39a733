"""`featcache sample`."""

from __future__ import annotations

import click

from featcache.cli.common import json_option, option, print_json


@click.command("sample", short_help="Write a real data set, no download needed.")
@click.argument("name", type=click.Choice(["digits"]))
@click.argument("folder", type=click.Path(), metavar="DIR")
@option("--train", "n_train", type=click.IntRange(10), default=400, help="Training images.")
@option("--val", "n_val", type=click.IntRange(10), default=200, help="Validation images.")
@option("--seed", type=click.IntRange(min=0), default=0, help="Chooses the images.")
@json_option
def command(name: str, folder: str, n_train: int, n_val: int, seed: int, as_json: bool) -> None:
    """Write a real data set that needs no download: scikit-learn's handwritten digits, as an image folder.

    \b
    Example:
      featcache sample digits data/digits
    """
    from featcache.stages.sample import make_sample

    sample = make_sample(name, folder, n_train=n_train, n_val=n_val, seed=seed)
    if as_json:
        print_json({"folder": str(sample.folder), "images": sample.images})
    else:
        click.echo(f"{sample.folder}: " + ", ".join(f"{n} {split}" for split, n in sample.images.items()) + " images")
