"""`featcache extract`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    TerminalProgress,
    backbone_options,
    force_option,
    json_option,
    list_left_out,
    machine_options,
    option,
    output_option,
    print_json,
    skip_bad_option,
    split_options,
)
from featcache.config import FEATURES_FILE, RUNTIMES, ExtractConfig


@click.command("extract", short_help="Stage 1: images -> features in one HDF5 file.")
@click.argument("data", type=click.Path())
@output_option(FEATURES_FILE, "The cache file.")
@backbone_options()
@option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=None,
    help="Images per forward pass.  [default: 4 on a CPU, 64 on a GPU]",
)
@machine_options
@option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default=ExtractConfig.runtime,
    help="eager is the bit-exact reference, fused is faster on a CPU.",
)
@split_options()
@skip_bad_option
@force_option
@json_option
def command(data: str, output: str, as_json: bool, **settings: Any) -> int:
    """Stage 1: turn every image of DATA into features, once, kept in one HDF5 file.

    Run again on unchanged data it computes nothing; on changed data only the new images.

    \b
    Example:
      featcache extract photos --backbone efficientnet_lite0 -o photos.h5
    """
    from featcache.stages.extract import extract_features

    extraction = extract_features(data, output, progress=TerminalProgress(), **settings)
    cache = extraction.cache
    rows = {name: len(split) for name, split in cache.splits.items()}
    if as_json:
        print_json(
            {
                "cache": str(extraction.path),
                "rows": len(cache),
                "splits": rows,
                "classes": list(cache.classes),
                "computed": extraction.computed,
                "reused": extraction.reused,
                "bad": len(extraction.bad),
                "bad_images": [{"path": path, "reason": reason} for path, reason in extraction.bad],
                "dim": cache.dim,
                "seconds": extraction.seconds,
                "extractor": cache.extractor,
            }
        )
    else:
        counts = " + ".join(f"{n} {name}" for name, n in rows.items())
        click.echo(
            f"{extraction.path}: {counts} rows of {cache.dim} features, {extraction.computed} computed, "
            f"{extraction.reused} reused, {extraction.seconds:.1f} s"
        )
    list_left_out(extraction.bad)
    return LEFT_OUT if extraction.bad else DONE
