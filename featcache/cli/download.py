"""`featcache download`."""

from __future__ import annotations

import click

from featcache.cli.common import TerminalProgress, json_option, option, print_json


@click.command("download", short_help="Fetch a public data set and verify it.")
@click.argument("name", type=click.Choice(["hymenoptera"]))
@click.argument("folder", type=click.Path(), metavar="DIR")
@option("--url", default=None, help="Another place that has the same archive.")
@json_option
def command(name: str, folder: str, url: str | None, as_json: bool) -> None:
    """Fetch a public data set into DIR and verify every image: the ants and bees of the classic exercise.

    \b
    Example:
      featcache download hymenoptera data/hymenoptera
    """
    from featcache.stages.download import download_dataset

    path = download_dataset(name, folder, url=url, progress=TerminalProgress())
    if as_json:
        print_json({"folder": str(path)})
    else:
        click.echo(f"{path}: verified")
