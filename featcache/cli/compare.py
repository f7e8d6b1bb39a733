"""`featcache compare`."""

from __future__ import annotations

from pathlib import Path
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
    store_option,
)
from featcache.config import RUNS_DIR, SOLVERS, CompareConfig


@click.command("compare", short_help="Both side by side: table, plots, report.")
@click.argument("targets", nargs=-1, required=True, type=click.Path(), metavar="DATA | RUN RUN...")
@output_option(f"{RUNS_DIR}/compare", "Folder of the report.")
@option("--features", type=click.Path(), default=CompareConfig.features, help="The cache file to use or make.")
@option(
    "--runs",
    type=click.Path(),
    default=CompareConfig.runs,
    help="Folder of the runs head and finetune to use or make.",
)
@backbone_options(None, None)
@option("--epochs", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 25]")
@option("--batch-size", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 4]")
@option("--lr", type=float, default=None, help="Of fine-tuning.  [default: 0.001]")
@option("--solver", type=click.Choice(SOLVERS), default=None, help="Of the head.  [default: sklearn]")
@option(
    "-C",
    "C",
    type=float,
    default=None,
    metavar="C",
    help="Of the head.  [default: chosen by cross-validation]",
)
@machine_options
@split_options(None, None)
@store_option(None)
@skip_bad_option
@force_option
@json_option
def command(targets: tuple[str, ...], output: str, as_json: bool, **settings: Any) -> int:
    """Both ways side by side on DATA, or finished RUNs: table, plots, report.

    On DATA, what exists is reused if it belongs to these images, and the rest is made.

    \b
    Example:
      featcache compare photos --epochs 5
      featcache compare runs/head runs/finetune
    """
    from featcache.runs import is_run
    from featcache.stages.compare import compare, compare_runs

    if len(targets) == 1 and not is_run(Path(targets[0])):
        comparison = compare(targets[0], output, progress=TerminalProgress(), **settings)
    else:
        comparison = compare_runs(targets, output)
    if as_json:
        print_json(
            {
                "arms": comparison.arms,
                "pairs": comparison.pairs,
                "verdict": comparison.verdict,
                "report": str(comparison.report),
            }
        )
    else:
        click.echo(comparison.table)
        click.echo(f"\n{comparison.verdict}\nreport: {comparison.report}")
    list_left_out(comparison.left_out)
    return LEFT_OUT if comparison.left_out else DONE
