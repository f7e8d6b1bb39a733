"""Several processes train one network: started by torchrun, on CPUs, they end where one process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, Outcome, fill_class
from safetensors.torch import load_file

import featcache
from featcache.errors import DeviceError
from featcache.processes import ALONE, choose_local_device, is_launched, read_rank
from featcache.runs import read_history, read_predictions

# A module of the user's own, so that the processes know it; one layer is never used.
NETWORK = """
import torch
from torch import nn

class Tiny(nn.Module):
    preprocessing = {"input_size": (16, 16), "resize": 20, "mean": (0.5,), "std": (0.25,)}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        return self.fc(torch.relu(self.norm(self.conv(images))).mean((2, 3)))

def make():
    return Tiny()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with network.py and photos: 9 + 8 training and 5 validation photographs of two classes, odd numbers."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "network.py").write_text(NETWORK)
    for split, counts in {"train": (9, 8), "val": (3, 2)}.items():
        for n, (name, colour) in zip(counts, [(n, COLOURS[n]) for n in ("blue", "red")], strict=True):
            fill_class(folder / "photos" / split / name, colour, n, seed=len(split) * 1000 + n)
    return folder


def command(output: str, *arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] * (processes > 1)
    settings = ["--backbone", "module:network.make", "--batch-size", "6", "--epochs", "3", "--lr", "0.05"]
    return [sys.executable, *launcher, "-m", "featcache", "finetune", "photos", "-o", output, *settings, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}


def train(place: Path, output: str, *arguments: str, processes: int = 1) -> Outcome:
    done = subprocess.run(
        command(output, *arguments, processes=processes),
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def find_difference(place: Path, one: str, other: str) -> float:
    """The largest between two runs' weights."""
    first, second = (load_file(place / name / "model.safetensors") for name in (one, other))
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_two_processes_train_as_one_does_on_the_same_whole_batches(place: Path) -> None:
    arguments = ("--mode", "staged", "--batch-norm", "fixed", "--class-weight", "balanced", "--weight-decay", "0.01")
    arguments += ("--lr-backbone", "0.02", "--ema", "0.5", "--json")
    alone = train(place, "one", *arguments)
    both = train(place, "two", *arguments, processes=2)
    assert (alone.code, both.code) == (0, 0), both.err
    assert find_difference(place, "one", "two") < 1e-5
    assert json.loads(both.out)["val_accuracy"] == json.loads(alone.out)["val_accuracy"]  # one object, of one process
    histories = [read_history(place / name / "history.csv") for name in ("one", "two")]
    for mine, theirs in zip(*histories, strict=True):
        assert mine["train_accuracy"] == theirs["train_accuracy"]  # every image is counted once
        assert mine["holdout_accuracy"] == theirs["holdout_accuracy"]
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    record = featcache.read_record(place / "two")
    assert (record.environment["processes"], record.accuracy["val"]["n"]) == (2, 5)
    paths = [read_predictions(place / name / "predictions.csv", record.classes).paths for name in ("one", "two")]
    assert paths[0] == paths[1]
    assert not list(place.glob("*.checkpoint"))


def test_two_processes_that_are_killed_go_on_and_end_alike(place: Path) -> None:
    arguments = ("--batch-norm", "train", "--checkpoint-every", "0", "--epochs", "8")
    assert train(place, "whole", *arguments, processes=2).code == 0
    with subprocess.Popen(
        command("killed", *arguments, processes=2),
        cwd=place,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        kept = place / "killed.checkpoint/checkpoint.json"
        until = time.monotonic() + 60
        while not kept.exists() and time.monotonic() < until:
            time.sleep(0.02)
        for one in find_descendants(process.pid):
            os.kill(one, signal.SIGKILL)
        process.wait()
    assert not (place / "killed").exists()
    again = train(place, "killed", *arguments, processes=2)
    assert again.code == 0, again.err
    assert "killed.checkpoint: goes on after epoch" in again.err
    assert find_difference(place, "whole", "killed") == 0
    assert not list(place.glob("*.checkpoint"))


def find_descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("no /proc to find the processes of torchrun in")
    return [pid, *(one for child in children.read_text().split() for one in find_descendants(int(child)))]


def test_an_error_ends_all_processes(place: Path) -> None:
    outcome = train(place, "bad", "--mode", "lp-ft", "--weights", "nowhere.pth", processes=2)
    assert outcome.code != 0
    assert outcome.err.count("Error: no weights at nowhere.pth") == 1
    assert "[rank" not in outcome.err  # no process shows a traceback
    assert not (place / "bad").exists()


# --- which one this is ------------------------------------------------------------------------------------------------


def test_a_process_that_was_started_alone_is_the_first_and_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (is_launched(), read_rank(), ALONE.is_first, ALONE.several) == (False, 0, True, False)
    assert choose_local_device("cuda:3") == "cuda:3"
    assert ALONE.collect("x") == ["x"]
    assert ALONE.share("x") == "x"
    assert ALONE.sum(torch.tensor(3)) == 3


def test_each_process_of_a_machine_has_a_gpu_of_its_own_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (is_launched(), read_rank()) == (True, 5)
    assert choose_local_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_local_device("auto") == choose_local_device("cuda") == "cuda:1"
    with pytest.raises(DeviceError, match="--device cuda:0 is one device for several processes"):
        choose_local_device("cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(DeviceError, match="torch sees 1; use torchrun --nproc-per-node 1"):
        choose_local_device("cuda")
