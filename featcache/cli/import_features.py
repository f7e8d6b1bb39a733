"""`featcache import`."""

from __future__ import annotations

from typing import Any

import click

from featcache.cli.common import (
    TerminalProgress,
    force_option,
    json_option,
    option,
    output_option,
    print_json,
    split_options,
    store_option,
)
from featcache.config import FEATURES_FILE


@click.command("import", short_help="Features made elsewhere -> a cache like any other.")
@click.argument("table", type=click.Path())
@output_option(FEATURES_FILE, "The cache file.")
@option(
    "--labels",
    default=None,
    metavar="NAME|FILE",
    help="Column with the classes, or a file: .npy, or .txt or .csv with one a line.  [default: label]",
)
@option("--paths", default=None, metavar="NAME|FILE", help="Column or file with the images' paths.  [default: path]")
@option(
    "--split", default=None, metavar="NAME|FILE", help="Column or file that says train, val or test.  [default: split]"
)
@option(
    "--array",
    default=None,
    metavar="NAME",
    help="Array (.npz) or list column (.parquet) with the features.  [default: features]",
)
@option(
    "--data",
    type=click.Path(),
    default=None,
    metavar="DIR",
    help="Folder that the paths are relative to.  [default: the table's]",
)
@option("--name", default=None, metavar="WORD", help="What made the features, such as clip.")
@split_options()
@store_option()
@option("--wait", is_flag=True, help="Wait for another process that writes the same file.")
@force_option
@json_option
def command(table: str, output: str, as_json: bool, **settings: Any) -> None:
    """Make a cache of features that another program made: TABLE is a .npy, .npz, .csv, .tsv or .parquet file.

    It has a row of numbers for each image. train-head takes the result like any other cache, and compare its run.

    \b
    Example:
      featcache import clip.npy --labels labels.txt --name clip -o clip.h5
      featcache import features.csv --data photos
    """  # fmt: skip
    from featcache.stages.import_features import import_features

    imported = import_features(table, output, progress=TerminalProgress(), **settings)
    cache = imported.cache
    rows = {name: len(split) for name, split in cache.splits.items()}
    if as_json:
        print_json(
            {
                "cache": str(imported.path),
                "rows": len(cache),
                "splits": rows,
                "classes": list(cache.classes),
                "dim": cache.dim,
                "reused": imported.reused,
                "seconds": imported.seconds,
                "extractor": cache.extractor,
            }
        )
        return
    counts = " + ".join(f"{n} {name}" for name, n in rows.items())
    done = "imported already" if imported.reused else "imported"
    click.echo(f"{imported.path}: {counts} rows of {cache.dim} features, {done} from {table}, {imported.seconds:.1f} s")
