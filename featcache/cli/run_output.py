"""How the commands that make a run print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from featcache.cli.common import print_json

if TYPE_CHECKING:
    from featcache.runs import RunRecord
    from featcache.stages.evaluate import Run


def print_run(run: Run, as_json: bool) -> None:
    """The result of a run: numbers for a person, or the documented object."""
    record = run.record
    val = record.accuracy["val"]
    own_seconds = record.seconds["total"] - record.seconds.get("extraction", 0.0)
    if as_json:
        print_json(
            {
                "run": str(run.folder),
                "kind": record.kind,
                "title": record.title,
                "val_accuracy": val["accuracy"],
                "correct": val["correct"],
                "n_val": val["n"],
                "train_accuracy": record.accuracy["train"],
                "test_accuracy": record.accuracy["test"]["accuracy"] if "test" in record.accuracy else None,
                "seconds": own_seconds,
                "seconds_by_stage": record.seconds,
                "selection": record.selection,
                "notes": record.notes,
                "reused": run.reused,
            }
        )
        return
    from featcache.metrics import wilson_interval
    from featcache.report import format_seconds

    low, high = wilson_interval(val["correct"], val["n"])
    click.echo(record.title)
    click.echo(
        f"  validation  {val['accuracy']:.4f}  ({val['correct']} of {val['n']}, 95 % interval {low:.3f} to {high:.3f})"
    )
    if "test" in record.accuracy:
        test = record.accuracy["test"]
        click.echo(f"  test        {test['accuracy']:.4f}  ({test['correct']} of {test['n']})")
    click.echo(f"  chosen      {record.selection}")
    for note in record.notes:
        click.echo(f"  note        {note}")
    click.echo(f"  time        {format_seconds(own_seconds)}{_describe_extraction(record)}")
    click.echo(f"  run         {run.folder}{' (was there already)' if run.reused else ''}")


def _describe_extraction(record: RunRecord) -> str:
    from featcache.report import format_seconds

    if "extraction" not in record.seconds:
        return ""
    return f", after {format_seconds(record.seconds['extraction'])} of extraction"
