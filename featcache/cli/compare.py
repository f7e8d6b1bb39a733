"""`featcache compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    TerminalProgress,
    complete_backbone,
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
from featcache.config import RUNS_DIR, SOLVERS, CompareConfig, name_option
from featcache.errors import SettingsError, make_printable

HEAD_OPTIONS = ("solver", "C", "seed")
DATA_OPTIONS = ("weights", "epochs", "batch_size", "lr", "val_fraction", "store", "workers", *HEAD_OPTIONS)

if TYPE_CHECKING:
    from featcache.stages.compare import Comparison
    from featcache.stages.rank import Ranking


@click.command("compare", short_help="Both side by side: table, plots, report.")
@click.argument("targets", nargs=-1, required=True, type=click.Path(), metavar="DATA | RUN RUN... | CACHE CACHE...")
@output_option(f"{RUNS_DIR}/compare", "Folder of the report.")
@option("--features", type=click.Path(), default=CompareConfig.features, help="The cache file to use or make.")
@option(
    "--runs",
    type=click.Path(),
    default=CompareConfig.runs,
    help="Folder of the runs head and finetune to use or make.",
)
@option(
    "--backbone",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_backbone,
    help="Of the two arms; several are ranked by their heads, and nothing is fine-tuned.  [default: resnet18]",
)
@option("--weights", default=None, metavar="WHICH", help="As of `featcache extract`.  [default: default]")
@option("--epochs", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 25]")
@option("--batch-size", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 4]")
@option("--lr", type=float, default=None, help="Of fine-tuning.  [default: 0.001]")
@option("--solver", type=click.Choice(SOLVERS), default=None, help="Of the head.  [default: auto]")
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
    """Both ways side by side on DATA, or finished RUNs, or the heads on several CACHEs: table, plots, report.

    On DATA, what exists is reused if it belongs to these images, and the rest is made. With several --backbone, or of
    several caches, the heads alone are compared, and ranked.

    \b
    Example:
      featcache compare photos --epochs 5
      featcache compare photos --backbone resnet18 --backbone convnext_tiny
      featcache compare runs/head runs/finetune
    """
    from featcache.stages.compare import Comparison

    compared = run_comparison(targets, output, settings)
    if as_json:
        print_json(to_json(compared))
    else:
        click.echo(compared.table)
        click.echo(f"\n{compared.verdict}\nreport: {compared.report}")
    if not isinstance(compared, Comparison):
        for name, reason in compared.failed.items():
            click.echo(make_printable(f"left out: {name}: {reason}"), err=True)
    list_left_out(compared.left_out)
    failed = () if isinstance(compared, Comparison) else compared.failed
    return LEFT_OUT if compared.left_out or failed else DONE


def run_comparison(targets: tuple[str, ...], output: str, settings: dict[str, Any]) -> Comparison | Ranking:
    """The stage that the targets ask for."""
    from featcache.runs import is_run
    from featcache.stages.compare import compare, compare_runs
    from featcache.stages.rank import rank_backbones, rank_caches

    backbones: tuple[str, ...] = settings.pop("backbone")
    if all(Path(target).is_file() for target in targets):
        check_unstated(settings, backbones, HEAD_OPTIONS, "caches are ranked by new heads on what they hold")
        head = {name: settings[name] for name in ("solver", "C", "seed") if settings[name] is not None}
        return rank_caches(targets, output, runs=settings["runs"], progress=TerminalProgress(), **head)
    if len(targets) > 1 or is_run(Path(targets[0])):
        check_unstated(settings, backbones, (), "finished runs are compared as they are")
        return compare_runs(targets, output)
    if len(backbones) > 1:
        return rank_backbones(targets[0], backbones, output, progress=TerminalProgress(), **settings)
    backbone = backbones[0] if backbones else None
    return compare(targets[0], output, progress=TerminalProgress(), backbone=backbone, **settings)


def check_unstated(settings: dict[str, Any], backbones: tuple[str, ...], used: tuple[str, ...], why: str) -> None:
    """Raise a SettingsError if an option is stated that would do nothing."""
    stated = [name for name in DATA_OPTIONS if name not in used and settings[name] is not None]
    if backbones or stated:
        option = "--backbone" if backbones else name_option(stated[0])
        raise SettingsError(f"{option} is for a folder of images: {why}")


def to_json(compared: Comparison | Ranking) -> dict[str, Any]:
    """As plain values; see docs/json.md."""
    from featcache.stages.compare import Comparison

    value = {"arms": compared.arms, "verdict": compared.verdict, "report": str(compared.report)}
    if isinstance(compared, Comparison):
        return {**value, "pairs": compared.pairs}
    return {**value, "failed": compared.failed}
