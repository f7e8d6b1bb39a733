"""`featcache compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import DONE, LEFT_OUT
from featcache.cli.common import (
    Duration,
    TerminalProgress,
    combine,
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
from featcache.config import MAPS, MAX_REPEATS, MAX_VIEWS, RUNS_DIR, SOLVERS, CompareConfig, name_option
from featcache.errors import InputError, SettingsError, make_printable
from featcache.storage import locate

HEAD_OPTIONS = ("solver", "C", "seed")
DATA_OPTIONS = (
    "arms",
    "weights",
    "epochs",
    "batch_size",
    "lr",
    "val_fraction",
    "store",
    "workers",
    "seeds",
    "views",
    "budget",
    "curve",
    *HEAD_OPTIONS,
)
OF_RANKING = ("arms", "seeds", "views", "budget", "curve", "map")  # that make several backbones more than a ranking
SPELLED = {"arms": "--arm"}

if TYPE_CHECKING:
    from featcache.stages.compare import Comparison
    from featcache.stages.rank import Ranking

arm_options = combine(
    option("--arm", "arms", multiple=True, metavar="ARM",
           help="A way to compare, repeatable: head[:SOLVER], views[:SOLVER] (a head on augmented views too), "
           "finetune[:MODE].  [default: head, finetune]"),
    option("--seeds", type=click.IntRange(1, MAX_REPEATS), default=None, metavar="N",
           help="How often each arm is trained, on the same images; 3 and more tell how much it varies.  [default: 1]"),
    option("--budget", type=Duration(), default=None, metavar="TIME",
           help="Be done within 10m or 1.5h: with fewer seeds, and cut short if need be."),
    option("--dry-run", is_flag=True, help="Only say what is there, what would be made, and how long it takes."),
    option("--features", type=click.Path(), default=CompareConfig.features, metavar="FILE",
           help="The cache file to use or make."),
    option("--runs", type=click.Path(), default=CompareConfig.runs, metavar="DIR",
           help="Folder of the runs to use or make, named after the arms."),
    option("--backbone", multiple=True, metavar="NAME", shell_complete=complete_backbone,
           help="Of the arms. Several, without --arm, are ranked by their heads, and nothing is fine-tuned.  "
           "[default: resnet18]"),
    option("--weights", default=None, metavar="WHICH", help="As of `featcache extract`.  [default: default]"),
)  # fmt: skip
recipe_options = combine(
    option("--epochs", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 25]"),
    option("--batch-size", type=click.IntRange(min=1), default=None, help="Of fine-tuning.  [default: 4]"),
    option("--lr", type=float, default=None, help="Of fine-tuning.  [default: by mode, see docs/finetune.md]"),
    option("--solver", type=click.Choice(SOLVERS), default=None, help="Of heads.  [default: auto]"),
    option("-C", "C", type=float, default=None, metavar="C", help="Of heads.  [default: by cross-validation]"),
    option("--views", type=click.IntRange(1, MAX_VIEWS), default=None, metavar="K",
           help="Of the arms `views`: how many of each image.  [default: those of the cache, else 4]"),
)  # fmt: skip
report_options = combine(
    option("--map", type=click.Choice(MAPS), default=None, help="Draw the features so too; PCA is always there."),
    option("--curve/--no-curve", default=None,
           help="A learning curve of the head.  [default: if it takes less than a minute]"),
)  # fmt: skip


@click.command("compare", short_help="Both side by side: verdict, table, report.")
@click.argument("targets", nargs=-1, required=True, type=click.Path(), metavar="DATA | RUN RUN... | CACHE CACHE...")
@output_option(f"{RUNS_DIR}/compare", "Folder of the report.")
@arm_options
@recipe_options
@report_options
@machine_options
@split_options(None, None)
@store_option(None)
@skip_bad_option
@force_option
@json_option
def command(targets: tuple[str, ...], output: str, as_json: bool, dry_run: bool, **settings: Any) -> int:
    """Both ways side by side on DATA, or finished RUNs, or the heads on several CACHEs: verdict, table, report.

    On DATA, what exists is reused if it belongs to these images, and the rest is made; after a kill the same command
    goes on. With several --backbone, or of several caches, the heads alone are compared, and ranked. See
    docs/compare.md.

    \b
    Example:
      featcache compare photos --seeds 3 --budget 10m
      featcache compare photos --arm head --arm head:knn --arm finetune:lp-ft
      featcache compare photos --backbone resnet18 --backbone convnext_tiny
      featcache compare runs/head runs/finetune
    """
    CompareConfig(**drop_unstated(settings))  # a mistake is told of before torch is loaded
    if missing := [target for target in targets if not is_data(target) and not locate(target).exists()]:
        raise InputError(f"{missing[0]} does not exist: expected a folder of images, runs, or caches")
    if dry_run:
        return print_plan(targets, output, settings, as_json)
    compared = run_comparison(targets, output, settings)
    if as_json:
        print_json({**compared.summary, "report": str(compared.report)})
    else:
        click.echo(f"{compared.table}\n\n{make_printable(compared.verdict)}")
        click.echo(make_printable(compared.summary["grounds"]))
        for remark in compared.summary["remarks"]:
            click.echo(make_printable(f"note: {remark}"))
        click.echo(f"report: {compared.report}")
    failed = compared.summary.get("failed", {})  # backbones of a ranking
    for name, reason in failed.items():
        click.echo(make_printable(f"left out: {name}: {reason}"), err=True)
    list_left_out(compared.left_out)
    return LEFT_OUT if compared.left_out or failed else DONE


def is_data(target: str) -> bool:
    """Whether a target is a data set that is no local folder."""
    from featcache.dataset import names_source

    return names_source(target)


def print_plan(targets: tuple[str, ...], output: str, settings: dict[str, Any], as_json: bool) -> int:
    """`featcache compare DATA --dry-run`."""
    from featcache.runs import is_run
    from featcache.stages.plan_comparison import plan_comparison

    if len(targets) > 1 or not (is_data(targets[0]) or Path(targets[0]).is_dir()) or is_run(Path(targets[0])):
        raise SettingsError("--dry-run is for one folder of images: finished runs and caches are compared at once")
    plan = plan_comparison(targets[0], output, progress=TerminalProgress(), **drop_unstated(settings))
    if as_json:
        print_json(plan.describe())
    else:
        for line in plan.list_lines():
            click.echo(make_printable(line))
    return DONE


def run_comparison(targets: tuple[str, ...], output: str, settings: dict[str, Any]) -> Comparison | Ranking:
    """The stage that the targets ask for."""
    from featcache.processes import measure_age
    from featcache.runs import is_run
    from featcache.stages.compare import compare, compare_runs
    from featcache.stages.rank import rank_backbones, rank_caches

    progress = TerminalProgress()
    if all(not is_data(target) and locate(target).is_file() for target in targets):
        check_unstated(settings, HEAD_OPTIONS, "caches are ranked by new heads on what they hold")
        head = {name: settings[name] for name in ("solver", "C", "seed") if settings[name] is not None}
        return rank_caches(targets, output, runs=settings["runs"], progress=progress, **head)
    if len(targets) > 1 or is_run(Path(targets[0])):
        check_unstated(settings, (), "finished runs are compared as they are")
        return compare_runs(targets, output, features=settings["features"], map=settings["map"], progress=progress)
    stated = drop_unstated(settings)
    if len(settings["backbone"]) > 1 and not any(name in stated for name in OF_RANKING):
        backbones = stated.pop("backbone")
        return rank_backbones(targets[0], backbones, output, progress=progress, **stated)
    return compare(targets[0], output, progress=progress, age=measure_age(), **stated)


def drop_unstated(settings: dict[str, Any]) -> dict[str, Any]:
    """The options that were stated, and those that have a default."""
    return {name: value for name, value in settings.items() if value is not None and value != ()}


def check_unstated(settings: dict[str, Any], used: tuple[str, ...], why: str) -> None:
    """Raise a SettingsError if an option is stated that would do nothing."""
    stated = drop_unstated(settings)
    for name in ("backbone", *DATA_OPTIONS):
        if name in stated and name not in used:
            raise SettingsError(f"{SPELLED.get(name) or name_option(name)} is for a folder of images: {why}")
