"""`featcache merge`."""

from __future__ import annotations

import click

from featcache.cli.common import TerminalProgress, force_option, json_option, option, skip_bad_option
from featcache.cli.extract import print_extraction
from featcache.config import FEATURES_FILE


@click.command("merge", short_help="Put the file together that shards have computed.")
@click.argument("output", type=click.Path(), default=FEATURES_FILE)
@option("--data", default=None, metavar="DATA", help="The data set, where it lies elsewhere than the shards saw it.")
@skip_bad_option
@option("--wait", is_flag=True, help="Wait for another process that works on the same file.")
@force_option
@json_option
def command(output: str, data: str | None, skip_bad: bool, wait: bool, force: bool, as_json: bool) -> int:
    """Put OUTPUT together from the parts that `featcache extract --shard` left beside it; computes nothing.

    The last shard to finish does so by itself. Images that have no row yet are told of, with the shards whose they are.

    \b
    Example:
      featcache merge photos.h5
    """
    from featcache.stages.merge import merge_shards

    extraction = merge_shards(output, data=data, skip_bad=skip_bad, wait=wait, force=force, progress=TerminalProgress())
    return print_extraction(extraction, as_json)
