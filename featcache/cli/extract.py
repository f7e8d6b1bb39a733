"""`featcache extract`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    TerminalProgress,
    extract_options,
    json_option,
    list_left_out,
    option,
    output_option,
    print_json,
)
from featcache.config import ENGINES, FEATURES_FILE, ExtractConfig
from featcache.errors import SettingsError
from featcache.progress import format_bytes
from featcache.shards import AUTO, Shard, is_one_of_several, parse_shard

if TYPE_CHECKING:
    from featcache.stages.extract import Extraction


@click.command("extract", short_help="Stage 1: images -> features in one HDF5 file.")
@click.argument("data", type=click.Path())
@output_option(FEATURES_FILE, "The cache file.")
@extract_options
@option(
    "--shard",
    default=None,
    metavar="N/M",
    help="Compute only share N of M, on one of several machines that see the same PATH; the last to finish puts the "
    "file together, or `featcache merge` does. auto: N and M from torchrun or SLURM; auto/M: N, also from Kubernetes.",
)
@option(
    "--engine",
    type=click.Choice(ENGINES),
    default=ExtractConfig.engine,
    help="What deals out the work: this process, or a cluster of Ray's (featcache[ray]).",
)
@option(
    "--address",
    default=None,
    metavar="WHERE",
    help="Of that cluster: auto or HOST:PORT.  [default: one is started on this machine]",
)
@option("--dry-run", is_flag=True, help="Only say what would be computed, how long it takes, how large the file gets.")
@json_option
def command(data: str, output: str, as_json: bool, dry_run: bool, shard: str | None, **settings: Any) -> int:
    """Stage 1: turn every image of DATA into features, once, kept in one HDF5 file.

    DATA is a folder of classes, its URL, tar shards, a list (.csv, .jsonl, .parquet) or hf:NAME; see docs/data.md.

    Run again on unchanged data it computes nothing; on changed data only the new images. After a kill, a full disk or
    Ctrl-C the same command goes on from there.

    \b
    Example:
      featcache extract photos --backbone efficientnet_lite0 -o photos.h5
    """
    from featcache.stages.extract import extract_features

    one_of_several = shard or is_one_of_several(os.environ)
    share = parse_shard(shard or AUTO, os.environ) if one_of_several else None
    if share and settings["engine"] != ExtractConfig.engine:
        raise SettingsError("--shard shares the work out by itself: expected it without --engine ray")
    if dry_run:
        return print_forecast(data, output, as_json, share, settings)
    if share:
        return extract_share(data, output, as_json, str(share), settings)
    return print_extraction(extract_features(data, output, progress=TerminalProgress(), **settings), as_json)


def print_extraction(extraction: Extraction, as_json: bool) -> int:
    """What an extraction did, or a merge; gives the exit code."""
    cache = extraction.cache
    rows = {name: len(split) for name, split in cache.splits.items()}
    if as_json:
        print_json(describe_extraction(extraction))
    else:
        counts = " + ".join(f"{n} {name}" for name, n in rows.items())
        views = f" and views of the images ({cache.views.describe()})" if cache.views else ""
        click.echo(
            f"{extraction.path}: {counts} rows of {cache.dim} features{views}, {extraction.computed} computed, "
            f"{extraction.reused} reused, {extraction.seconds:.1f} s"
        )
    list_left_out(extraction.bad)
    return LEFT_OUT if extraction.bad else DONE


def describe_extraction(extraction: Extraction) -> dict[str, Any]:
    """An extraction as JSON values."""
    cache = extraction.cache
    rows = {name: len(split) for name, split in cache.splits.items()}
    return {
        "cache": str(extraction.path),
        "rows": len(cache),
        "splits": rows,
        "views": {name: cache.views.count(name) for name in rows},
        "classes": list(cache.classes),
        "computed": extraction.computed,
        "reused": extraction.reused,
        "bad": len(extraction.bad),
        "bad_images": [{"path": path, "reason": reason} for path, reason in extraction.bad],
        "dim": cache.dim,
        "seconds": extraction.seconds,
        "extractor": cache.extractor,
    }


def extract_share(data: str, output: str, as_json: bool, shard: str, settings: dict[str, Any]) -> int:
    """`featcache extract --shard`."""
    from featcache.stages.share import extract_shard

    done = extract_shard(data, output, shard=shard, progress=TerminalProgress(), **settings)
    n_done = done.shard.count - len(done.unfinished)
    if as_json:
        print_json(
            {
                "output": str(done.path),
                "shard": [done.shard.number, done.shard.count],
                "rows": done.rows,
                "computed": done.computed,
                "bad": len(done.bad),
                "bad_images": [{"path": path, "reason": reason} for path, reason in done.bad],
                "seconds": done.seconds,
                "unfinished": list(done.unfinished),
                "merged": describe_extraction(done.extraction) if done.extraction else None,
            }
        )
    else:
        click.echo(
            f"{done.path}: shard {done.shard}, {done.rows} rows, {done.computed} computed, {done.seconds:.1f} s; "
            f"{n_done} of {done.shard.count} shards have finished"
        )
    if done.extraction and not as_json:
        return print_extraction(done.extraction, as_json)
    list_left_out(done.bad)
    return LEFT_OUT if done.bad else DONE


def print_forecast(data: str, output: str, as_json: bool, share: Shard | None, settings: dict[str, Any]) -> int:
    """`featcache extract --dry-run`."""
    from featcache.stages.forecast import forecast_extraction
    from featcache.wording import format_seconds

    plan, forecast = forecast_extraction(data, output, progress=TerminalProgress(), **settings)
    rows = {name: len(split) for name, split in plan.listing.splits.items()}
    if as_json:
        print_json(
            {
                "cache": str(plan.output),
                "decision": plan.decision,
                "rows": len(plan.listing),
                "splits": rows,
                "views": {name: plan.views.count(name) for name in rows},
                "to_compute": len(plan.missing),
                "images_per_second": forecast.images_per_second,
                "seconds": forecast.seconds,
                "bytes": forecast.bytes,
                "extractor": plan.extractor,
                "shard": [share.number, share.count] if share else None,
            }
        )
        return DONE
    views = f" and {plan.n_rows - len(plan.listing):,} of views" if plan.views else ""
    click.echo(
        f"{plan.output}: {len(plan.listing):,} rows{views}, {len(plan.missing):,} to compute; nothing was written"
    )
    if share:
        mine = len(share.list_rows(len(plan.listing)))
        click.echo(f"shard {share} has {mine:,} of the {len(plan.listing):,} images; what follows is of all shards")
    size = f"the file will be about {format_bytes(forecast.bytes)}"
    if rate := forecast.images_per_second:
        click.echo(f"about {format_seconds(forecast.seconds)} at {rate:.0f} images/s; {size}")
    else:
        click.echo(f"nothing to compute; {size}")
    return DONE
