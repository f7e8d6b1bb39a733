"""Processes die, disks fail and fill up, eight write at once: nothing durable is lost, nothing wrong is served.

The experiments are in nursery.py and can be run by hand; each gives its counts and what went wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")

Tell = Callable[[str], None]


def experiment(name: str, folder: Path, *numbers: int, program: str = "nursery.py") -> dict[str, Any]:
    """Run one of nursery.py's experiments, or of another program."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), name, str(folder), *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # Python 3.12 on forking while threads run: none does
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_death_or_failure_at_every_durable_call_loses_nothing_durable(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("enumerate", tmp_path, int(long))
    trials = ", ".join(f"{kind} {n}" for kind, n in result["trials"].items())
    calls = f"every durable call, {result['calls']} of them, {result['parts']} parts"
    tell(f"{calls}: {trials}; {len(result['wrong'])} wrong")
    assert result["wrong"] == []
    assert result["calls"] >= 60
    assert result["trials"]["killed half-way through"] >= 30


def test_kill_9_at_random_moments_loses_nothing_durable(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("kill", tmp_path, 200 if long else 20)
    tell(
        f"kill -9 of real extractions: {result['trials']} trials, {result['killed']} killed, {result['rows kept']} "
        f"rows kept and {result['rows computed again']} computed by the second run; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["killed"] >= result["trials"] // 4


def test_eight_writers_at_once_do_the_work_once_and_never_harm_each_other(
    tmp_path: Path, tell: Tell, long: bool
) -> None:
    result = experiment("together", tmp_path, 20 if long else 2)
    tell(
        f"eight writers at once, {result['rounds']} rounds: {result['waited']} waited, {result['told who holds it']} "
        f"were told who holds it, {result['without a lock']} ran without a lock; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["told who holds it"] > 0


def test_sixteen_shards_in_random_order_and_killed_at_random_give_the_file_of_one_run(
    tmp_path: Path, tell: Tell, long: bool
) -> None:
    result = experiment("kill", tmp_path, 20 if long else 2, program="shard_nursery.py")
    tell(
        f"sixteen shards in random order, up to three at once: {result['trials']} trials, "
        f"{result['started']} started, {result['killed']} killed; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["killed"] >= result["started"] // 5


def test_a_death_of_the_last_shard_at_any_durable_call_loses_nothing(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("enumerate", tmp_path, 1 if long else 6, program="shard_nursery.py")
    tell(f"the last shard, killed at {result['deaths']} of {result['calls']} calls; {len(result['wrong'])} wrong")
    assert result["wrong"] == []
    assert result["calls"] >= 40


def test_a_flipped_byte_is_detected_or_harmless(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("flip", tmp_path, 10_000 if long else 1000)
    tell(
        f"damaged files: {result['flips']} flipped bytes ({result['detected']} detected, {result['harmless']} "
        f"harmless), {result['cuts']} cut short, {result['pages']} with a page of zeros; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["detected"] > 0.8 * result["flips"]


def test_a_mutated_image_crashes_hangs_and_shifts_nothing(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("mutate", tmp_path, 5000 if long else 1000)
    tell(
        f"mutated images: {result['files']} in {result['formats']} formats, {result['kept']} kept with the right row, "
        f"{result['bad']} named as bad, {result['good']} good ones among them untouched; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert min(result["kept"], result["bad"]) > 50


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, tell: Tell, long: bool) -> None:
    result = experiment("full", tmp_path, 30 if long else 8)
    disks = (
        f"{result['small disks']} small disks" if result["small disks"] >= 0 else "no small disks (not allowed here)"
    )
    tell(
        f"full disk: {result['file size limits']} limits of file size, {disks}, {result['stopped with one line']} "
        f"stopped with one line, {result['went through']} went through; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["stopped with one line"] > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_only_be_read_is_read_and_fails_to_be_written_before_any_work(tmp_path: Path) -> None:
    assert experiment("nobody", tmp_path)["wrong"] == []


def test_a_fine_tuning_that_is_killed_at_random_moments_ends_with_the_same_weights(
    tmp_path: Path, tell: Tell, long: bool
) -> None:
    result = experiment("kill", tmp_path, 200 if long else 20, program="training_nursery.py")
    tell(
        f"kill -9 of fine-tunings: {result['trials']} trials, {result['killed']} killed, {result['went on']} went on "
        f"from a checkpoint; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["killed"] >= result["trials"] // 3
    assert result["went on"] >= result["trials"] // 4


def test_a_fine_tuning_whose_disk_dies_or_fails_at_any_call_ends_with_the_same_weights(
    tmp_path: Path, tell: Tell, long: bool
) -> None:
    result = experiment("enumerate", tmp_path, 1 if long else 31, program="training_nursery.py")
    tell(
        f"durable calls of a fine-tuning, {result['calls']} of them: {result['died']} deaths and {result['failed']} "
        f"failures; {len(result['wrong'])} wrong"
    )
    assert result["wrong"] == []
    assert result["calls"] >= 60
    assert result["died"] == result["failed"] >= 4
