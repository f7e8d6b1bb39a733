"""`featcache predict`."""

from __future__ import annotations

import csv
import io
import json

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    TerminalProgress,
    json_option,
    list_left_out,
    machine_options,
    option,
    output_option,
)
from featcache.config import MAX_VIEWS


@click.command("predict", short_help="Label new files with a trained run.")
@click.argument("run", type=click.Path())
@click.argument("images", nargs=-1, required=True, type=click.Path(), metavar="IMAGE...")
@output_option(None, "Write there instead of to stdout.")
@option("--batch-size", type=click.IntRange(min=1), default=None, help="Images per forward pass.")
@machine_options
@option(
    "--views",
    type=click.IntRange(0, MAX_VIEWS),
    default=None,
    metavar="K",
    help="Average each image's probabilities with those of K random views of it.  [default: as the run was judged]",
)
@json_option
def command(
    run: str,
    images: tuple[str, ...],
    output: str | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
    views: int | None,
    as_json: bool,
) -> int:
    """Label new files with a trained RUN: CSV with path, label, probability, or JSON.

    IMAGE is a file, or a folder whose images are taken. Files that cannot be used are named on stderr (exit code 3).

    \b
    Example:
      featcache predict runs/head new/ant.jpg new/bee.jpg
      featcache predict runs/finetune new --json -o labels.json
    """
    from featcache.stages.predict import predict
    from featcache.storage import check_writable, locate, write_whole

    if output:
        check_writable(locate(output))
    predictions, bad = predict(
        run, images, batch_size=batch_size, workers=workers, device=device, views=views, progress=TerminalProgress()
    )
    if as_json:
        rows = [{"path": one.path, "label": one.label, "probability": one.probability} for one in predictions]
        text = json.dumps(rows, indent=2) + "\n"
    else:
        table = io.StringIO(newline="")
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["path", "label", "probability"])
        writer.writerows([one.path, one.label, f"{one.probability:.6f}"] for one in predictions)
        text = table.getvalue()
    if output:
        write_whole(locate(output), text.encode("utf-8", errors="surrogateescape"))
    else:
        click.echo(text, nl=False)
    list_left_out(bad)
    return LEFT_OUT if bad else DONE
