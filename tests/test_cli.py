"""The command line: exit codes, what is on stdout and what on stderr, JSON keys, the environment, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from conftest import COLOURS, Outcome, TinyFamily, draw_photo

from featcache.cli import COMMANDS, common

Cli = Callable[..., Outcome]
TINY = ("--backbone", "tiny", "--weights", "none")


def run_program(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m featcache` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


CACHE_COMMANDS = tuple(f"cache {name}" for name in ("info", "verify", "explain", "ls", "prune"))


@pytest.mark.parametrize("command", [*COMMANDS, *CACHE_COMMANDS])
def test_every_command_has_help_with_an_example(cli: Cli, command: str) -> None:
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    assert f"Example:\n    featcache {command}" in outcome.out


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "cache"), *CACHE_COMMANDS])
def test_every_command_takes_json(cli: Cli, command: str) -> None:
    assert "--json" in cli(*command.split(), "--help").out


def test_the_whole_job_in_four_commands_and_their_documented_keys(
    cli: Cli, photos: Path, tiny: type[TinyFamily]
) -> None:
    extract = cli("extract", photos, *TINY, "--json")
    assert extract.code == 0
    assert {"cache", "rows", "computed", "reused", "bad", "dim", "seconds"} <= set(extract.json)
    assert (extract.json["cache"], extract.json["rows"], extract.json["dim"]) == ("features.h5", 18, 8)
    head = cli("train-head", "features.h5", "--json")
    assert {"run", "val_accuracy", "n_val", "seconds"} <= set(head.json)
    assert (head.json["run"], head.json["n_val"]) == ("runs/head", 6)
    finetune = cli("finetune", photos, *TINY, "--epochs", "1", "--json")
    assert {"run", "val_accuracy", "n_val", "seconds"} <= set(finetune.json)
    compare = cli("compare", photos, "--json")
    assert [set(arm) >= {"name", "accuracy", "cost"} for arm in compare.json["arms"]] == [True, True]
    assert Path(compare.json["report"]).is_file()
    predict = cli("predict", "runs/head", photos / "val/red/photo_000.jpg", "--json")
    assert [set(row) for row in predict.json] == [{"path", "label", "probability"}]
    show = cli("show", "runs/head", "--json")
    assert Path(show.json["figure"]).is_file()


def test_results_go_to_stdout_and_the_rest_to_stderr(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    outcome = cli("extract", photos, *TINY)
    assert outcome.out.startswith("features.h5: 12 train + 6 val rows of 8 features, 18 computed, 0 reused")
    assert outcome.out.count("\n") == 1
    assert "photos: 12 train, 6 val images, 2 classes" in outcome.err


def test_predictions_are_csv_unless_asked_otherwise(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    cli("extract", photos, *TINY)
    cli("train-head", "features.h5")
    outcome = cli("predict", "runs/head", photos / "val/red", "-o", "labels.csv")
    assert (outcome.code, outcome.out) == (0, "")
    lines = Path("labels.csv").read_text().splitlines()
    assert lines[0] == "path,label,probability"
    assert lines[1].startswith(f"{photos}/val/red/photo_000.jpg,red,0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("extract", "nowhere"), "no data set at nowhere"),
        (("extract", "{photos}", "--backbone", "resnet-18"), "did you mean resnet18?"),
        (("extract", "{photos}", "--weights", "nowhere.pth"), "no weights at nowhere.pth"),
        (("extract", "{photos}", "--weights", "none", "-o", "{photos}"), "it is a folder"),
        (("extract", "{photos}", "--weights", "none", "-o", "/proc/nowhere/f.h5"), "cannot write /proc/nowhere/f.h5"),
        (("extract", "{photos}", "--weights", "none", "--device", "tpu"), "unknown device 'tpu'"),
        (("train-head", "nowhere.h5"), "nowhere.h5 does not exist"),
        (("train-head", "{photos}/val/red/photo_000.jpg"), "cannot be read as a feature cache"),
        (("finetune", "nowhere"), "no data set at nowhere"),
        (("compare", "nowhere"), "nowhere does not exist"),
        (("compare", "{photos}", "nowhere"), "nowhere does not exist"),
        (("compare", "{photos}", "{photos}/val"), "is not a run"),
        (("compare", "nowhere", "--dry-run"), "nowhere does not exist"),
        (("show", "nowhere"), "nowhere does not exist"),
        (("predict", "nowhere", "{photos}"), "nowhere holds no classifier"),
        (("sample", "digits", "{photos}"), "not empty"),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_1(
    cli: Cli, photos: Path, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = cli(*(argument.format(photos=photos) for argument in arguments))
    assert outcome.code == 1
    assert outcome.out == ""
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert expected in last


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract",),
        ("extract", "x", "--nonsense"),
        ("extract", "x", "--batch-size", "many"),
        ("extract", "x", "--val-fraction", "1.5"),
        ("train-head", "x", "-C", "-1"),
        ("train-head", "x", "-C", "inf"),
        ("train-head", "x", "--solver", "magic"),
        ("finetune", "x", "--epochs", "0"),
        ("finetune", "x", "--lr", "-1"),
        ("predict", "x"),
        ("extrat", "x"),
    ],
)
def test_usage_mistakes_exit_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Error: " in outcome.err


def test_a_mistyped_command_is_suggested(cli: Cli) -> None:
    assert "Did you mean 'extract'?" in cli("extrat", "x").err


def test_bad_images_are_all_named_and_exit_1_without_a_file(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    (photos / "train/red/photo_000.jpg").write_text("text")
    (photos / "val/blue/photo_001.jpg").write_bytes(b"")
    outcome = cli("extract", photos, *TINY)
    assert outcome.code == 1
    assert "train/red/photo_000.jpg: not an image of a known format" in outcome.err
    assert "val/blue/photo_001.jpg: empty file (0 bytes)" in outcome.err
    assert "--skip-bad" in outcome.err
    assert not Path("features.h5").exists()


def test_skipped_images_are_named_and_exit_3(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    (photos / "train/red/photo_000.jpg").write_text("text")
    extract = cli("extract", photos, *TINY, "--skip-bad", "--json")
    assert (extract.code, extract.json["bad"], extract.json["rows"]) == (3, 1, 17)
    assert extract.json["bad_images"][0]["path"] == "train/red/photo_000.jpg"
    assert "left out: train/red/photo_000.jpg" in extract.err
    assert cli("finetune", photos, *TINY, "--skip-bad", "--epochs", "1").code == 3
    cli("train-head", "features.h5")
    assert cli("predict", "runs/head", photos / "train").code == 3
    assert cli("compare", photos, "--skip-bad").code == 3


@pytest.mark.parametrize("name", ["FEATCACHE_BACKBONE", "FEATCACHE_EXTRACT_BACKBONE"])
def test_every_option_is_also_an_environment_variable(
    cli: Cli, photos: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "tiny")
    monkeypatch.setenv("FEATCACHE_WEIGHTS", "none")
    assert cli("extract", photos, "--json").json["dim"] == 8
    monkeypatch.setenv("FEATCACHE_JSON", "1")
    assert cli("extract", photos).json["rows"] == 18


def test_the_commands_own_variable_comes_first(
    cli: Cli, photos: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATCACHE_BACKBONE", "resnet18")
    monkeypatch.setenv("FEATCACHE_EXTRACT_BACKBONE", "tiny")
    assert cli("extract", photos, "--weights", "none", "--json").json["dim"] == 8


def test_file_names_that_are_no_utf8_survive(cli: Cli, photos: Path, tiny: type[TinyFamily]) -> None:
    odd = os.fsdecode(b"\xff\xfe, \xc3\xa9.jpg")
    draw_photo(COLOURS["red"], 5).save(photos / "val/red/tmp.jpg")
    (photos / "val/red/tmp.jpg").rename(photos / f"val/red/{odd}")
    assert cli("extract", photos, *TINY).code == 0
    assert cli("train-head", "features.h5").code == 0
    assert cli("predict", "runs/head", photos / "val/red").code == 0
    assert cli("show", "runs/head", "-n", "20").code == 0
    assert b"\xff\xfe" in Path("runs/head/predictions.csv").read_bytes()


def test_an_unexpected_error_shows_its_traceback(cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import featcache.stages.show

    monkeypatch.setattr(featcache.stages.show, "show", lambda *arguments, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("show", photos)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm_keep_what_was_computed_and_the_same_command_goes_on(
    photos: Path, tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    for i in range(180):
        draw_photo(COLOURS["red"], 10_000 + i, (300, 300)).save(photos / f"train/red/more_{i}.jpg")
    command = [sys.executable, "-m", "featcache", "extract", str(photos), "--weights", "none", "-o", "f.h5"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads run here
    )
    assert process.stderr is not None
    while "to compute" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.strip().endswith(word)
    assert not (tmp_path / "f.h5").exists()
    again = run_program(*command[3:], "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["rows"] == 198
    assert [path.name for path in tmp_path.iterdir() if "f.h5" in path.name] == ["f.h5"]


def test_a_full_disk_behind_stdout_is_one_line(photos: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "featcache", "sample", "digits", "d", "--train", "10", "--val", "10"]
        result = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "Error: cannot write the output: No space left on device\n"


def test_help_is_fast_because_it_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from featcache.cli import run; assert run(['--help']) == 0; "
        "heavy = {'torch', 'torchvision', 'h5py', 'sklearn', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "n", "expected"),
    [("featcache tr", 1, "plain,train-head"), ("featcache extract d --backbone eff", 4, "plain,efficientnet_lite0")],
)
def test_the_shell_completes_commands_and_backbones(words: str, n: int, expected: str) -> None:
    program = Path(sys.executable).with_name("featcache")
    environment = {"_FEATCACHE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(n)}
    result = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert expected in result.stdout


class Terminal(io.StringIO):
    """A stream that says it is a terminal, or that it is none."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


@dataclass(frozen=True)
class Pieces:
    """Some of what is counted, some of it bad."""

    items: list[int]
    bad: list[str]

    def __len__(self) -> int:
        return len(self.items)


def test_a_log_has_counts_rate_and_what_is_left_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = count(0, 45), Terminal(live=False)
    monkeypatch.setattr(common.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys, "stderr", log)
    pieces = [Pieces([1] * 400, ["a.jpg"]), Pieces([1] * 500, []), Pieces([1] * 100, ["b.jpg", "c.jpg"])]
    progress = common.TerminalProgress()
    assert list(progress.track(pieces, total=5000, done=2000, what="extracting")) == pieces
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("extracting: 2,900 of 5,000 images (2,000 cached, 899 computed, 1 bad), ")
    assert re.search(r", \d+ images/s, .* left$", lines[0])
    assert len(lines) < 3
    assert list(progress.track([b"12"] * 5, total=10, what="downloading", unit="B")) == [b"12"] * 5
    assert log.getvalue().splitlines() == lines


def test_a_bar_has_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(live=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(common, "tqdm", partial(common.tqdm, mininterval=0))
    clock = count(0, 5)
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    progress = common.TerminalProgress()
    list(progress.track([Pieces([1] * 30, [name]) for name in "abc"], total=190, done=100, what="extracting"))
    assert "100 cached, 58 computed, 2 bad" in terminal.getvalue()
    assert "img/s" in terminal.getvalue()
