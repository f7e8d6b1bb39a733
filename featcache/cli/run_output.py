"""How the commands that make a run print it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from featcache.cli.common import print_json

if TYPE_CHECKING:
    from featcache.runs import RunRecord
    from featcache.stages.evaluate import Run


def print_run(run: Run, as_json: bool) -> None:
    """The result of a run: numbers for a person, or the documented object."""
    record = run.record
    own_seconds = record.seconds["total"] - record.seconds.get("extraction", 0.0)
    if as_json:
        print_json(
            {
                "run": str(run.folder),
                "kind": record.kind,
                "title": record.title,
                "val_accuracy": record.val_accuracy,
                "correct": record.accuracy["val"]["correct"],
                "n_val": record.accuracy["val"]["n"],
                "train_accuracy": record.accuracy["train"],
                "test_accuracy": record.accuracy["test"]["accuracy"] if "test" in record.accuracy else None,
                "seconds": own_seconds,
                "seconds_by_stage": record.seconds,
                "cpu_seconds_by_stage": record.cpu_seconds,
                "energy_joules": record.energy_joules,
                "result_bytes": record.result_bytes,
                "selection": record.selection,
                "notes": record.notes,
                "measures": {name: values for name, values in record.accuracy.items() if name != "train"},
                "details": record.details,
                "reused": run.reused,
            }
        )
        return
    from featcache.wording import format_seconds

    click.echo(record.title)
    for name, what in (("val", "validation"), ("test", "test")):
        if name in record.accuracy and "draws" in record.details:
            draws = record.details["draws"][name]
            click.echo(
                f"  {what:<11} {draws['mean']:.4f}  (average of {len(draws['accuracies'])} draws, standard deviation "
                f"{draws['std']:.4f})"
            )
            click.echo(f"  the first   {say_accuracy(record.accuracy[name])}")
        elif name in record.accuracy:
            click.echo(f"  {what:<11} {say_accuracy(record.accuracy[name])}")
    for line in list_measures(record):
        click.echo(f"  {line}")
    click.echo(f"  chosen      {record.selection}")
    for note in record.notes:
        click.echo(f"  note        {note}")
    click.echo(f"  time        {format_seconds(own_seconds)}{_describe_more(record)}")
    click.echo(f"  run         {run.folder}{' (was there already)' if run.reused else ''}")


def say_accuracy(measured: Mapping[str, Any]) -> str:
    """An accuracy with its interval, for people."""
    from featcache.metrics import wilson_interval

    correct, n = measured["correct"], measured["n"]
    low, high = wilson_interval(correct, n)
    return f"{measured['accuracy']:.4f}  ({correct} of {n}, 95 % interval {low:.3f} to {high:.3f})"


def list_measures(record: RunRecord) -> list[str]:
    """What else was measured on the validation split, for people."""
    val, details, lines = record.accuracy["val"], record.details, []
    if "top5_accuracy" in val:
        lines.append(f"top-5       {val['top5_accuracy']:.4f}")
    if record.settings.get("class_weight"):
        lines.append(f"balanced    {val['balanced_accuracy']:.4f}  (each class counts the same)")
    if "without_tta" in details:
        lines.append(f"plain       {details['without_tta']['accuracy']:.4f}  (without the views)")
    if record.settings.get("calibrate") and "uncalibrated" in details:
        before = details["uncalibrated"]["val"]
        lines.append(
            f"calibration ECE {before['calibration_error']:.4f} -> {val['calibration_error']:.4f}, Brier "
            f"{before['brier']:.4f} -> {val['brier']:.4f}"
        )
    return lines


def _describe_more(record: RunRecord) -> str:
    from featcache.wording import format_seconds

    seconds = record.seconds
    after = f", after {format_seconds(seconds['extraction'])} of extraction" if "extraction" in seconds else ""
    beside = {"draws": "the other draws", "curve": "the learning curve"}
    return after + "".join(
        f"; {what} {format_seconds(seconds[name])}" for name, what in beside.items() if name in seconds
    )
