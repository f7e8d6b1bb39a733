"""A training that was left, on the disk. A kill at any moment leaves a whole one: the last, or the one before.

::

    runs/finetune.checkpoint/
    ├── checkpoint.json              where it was: epoch, step, history, schedule, and which files belong to it
    ├── network-000123.safetensors   the weights after step 123, a plain state dict
    ├── state-000123.safetensors     optimiser, averages, random states, the order of the images
    └── best-0003.safetensors        the weights of the best epoch, a plain state dict

The JSON is written last and names the other files with their digests; what it does not name is removed.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from featcache.errors import OutputError, RunError
from featcache.files import canonical_json, disk, hash_bytes, pretty_json, write_atomically
from featcache.training.loop import State, Trainer

NAME = "checkpoint.json"
SCHEMA = 1
MOST_STEPS = 1_000_000  # between two looks at the clock, of several processes
SHARE = 20  # a checkpoint is due at the earliest when so many times the time has passed that the last one took
OURS = re.compile(r"\.?(network|state|best)-\d+\.safetensors(\.\d+\.tmp)?|\.?checkpoint\.json(\.\d+\.tmp)?")


class Checkpoints:
    """The checkpoint of one training, replaced every so often.

    Parameters
    ----------
    folder
        Where it is.
    identity
        What makes the training this one; one of another identity does not fit.
    every_seconds
        How often. Rarer where writing takes so long that it would cost more than a twentieth of the time.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, every_seconds: float) -> None:
        self.folder, self.identity, self.every_seconds = folder, dict(identity), every_seconds
        self._steps, self._written, self._took = 0, time.monotonic(), 0.0
        self._asked, self._wait, self._waited = time.monotonic(), 0, 0
        self._files: dict[str, str] = {}  # of the checkpoint that is there, with their digests
        self._best: int | None = None

    def is_due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._written >= max(self.every_seconds, SHARE * self._took)

    def is_due_for_all(self, trainer: Trainer) -> bool:
        """The same, decided by the first of several processes: they look up only every few steps, and together."""
        if not trainer.processes.several:
            return self.is_due()
        if self._waited < self._wait:
            self._waited += 1
            return False
        now = time.monotonic()
        rate = (self._waited + 1) / max(now - self._asked, 1e-9)
        due, self._wait = trainer.processes.share(
            (self.is_due(), int(min(rate * self.every_seconds / SHARE, MOST_STEPS)))
        )
        self._asked, self._waited = now, 0
        return due

    def keep(self, state: State, more: Mapping[str, Any]) -> None:
        """Write a checkpoint in place of the last one.

        Parameters
        ----------
        state
            Of the training.
        more
            Plain values that belong to it: what `find` gives back.

        Raises
        ------
        OutputError
            If it cannot be written; the last one is still there.
        """
        started = time.monotonic()
        self._steps += 1
        files = {
            "network": self._write("network", self._steps, state.network),
            "state": self._write("state", self._steps, state.others),
        }
        if state.values["best"] is not None:
            epoch = state.values["best"]["epoch"]
            known = epoch == self._best and "best" in self._files
            files["best"] = self._files["best"] if known else self._write("best", epoch, state.best)
            self._best = epoch
        names = {name.split("/")[0] for name in files.values()}
        description = {
            "schema": SCHEMA,
            "identity": self.identity,
            "files": files,
            "count": self._steps,
            "training": state.values,
            "more": dict(more),
        }
        description["sha256"] = hash_bytes(canonical_json(description).encode())
        write_atomically(self.folder / NAME, pretty_json(description))
        self._files = files
        self._remove_all_but({NAME, *names})
        self._written = time.monotonic()
        self._took = self._written - started

    def _write(self, what: str, number: int, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors; gives "name/digest"."""
        data = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        name = f"{what}-{number:06d}.safetensors"
        write_atomically(self.folder / name, data)
        return f"{name}/{hash_bytes(data)}"

    def _remove_all_but(self, names: set[str]) -> None:
        """Remove files of checkpoints that are no longer wanted, and unfinished ones."""
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if OURS.fullmatch(path.name) and path.name not in names:
                with removing(path):
                    disk.remove(path)

    def find(self) -> tuple[State, dict[str, Any]] | None:
        """The checkpoint that is there, with what was given beside it; None if there is none.

        Raises
        ------
        RunError
            If it is damaged, or of a featcache that this one does not understand.
        """
        description = self.read()
        if description is None:
            return None
        tensors = {what: self._load(file) for what, file in description["files"].items()}
        self._steps, self._files = int(description["count"]), dict(description["files"])
        best = description["training"]["best"]
        self._best = None if best is None else int(best["epoch"])
        state = State(
            values=description["training"],
            network=tensors["network"],
            best=tensors.get("best", {}),
            others=tensors["state"],
        )
        return state, description["more"]

    def read(self) -> dict[str, Any] | None:
        """What checkpoint.json says, its digest checked; None if there is none."""
        path = self.folder / NAME
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            digest = description.pop("sha256", "") if isinstance(description, dict) else ""
            sound = hash_bytes(canonical_json(description).encode()) == digest
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{path} cannot be read ({reason}); --no-resume starts again") from error
        if not sound:
            raise RunError(f"{path} is damaged: its SHA-256 is not that of its contents; --no-resume starts again")
        if description.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has schema {description.get('schema')}, this featcache reads {SCHEMA}; --no-resume starts "
                f"again"
            )
        return dict(description)

    def _load(self, file: str) -> dict[str, Tensor]:
        name, _, digest = file.partition("/")
        path = self.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{path} of the checkpoint cannot be read ({error.strerror or error}); --no-resume starts again"
            ) from error
        if hash_bytes(data) != digest:
            raise RunError(f"{path} is damaged: its SHA-256 is not the one in {NAME}; --no-resume starts again")
        tensors: dict[str, Tensor] = load(data)
        return tensors

    def remove(self) -> None:
        """Remove the checkpoint, the folder too if nothing else is in it."""
        if self.folder.is_dir():
            with removing(self.folder / NAME):
                disk.remove(self.folder / NAME)  # first: without it the rest is nothing
            self._remove_all_but(set())
            if not any(self.folder.iterdir()):
                disk.remove_folder(self.folder)


@contextlib.contextmanager
def removing(path: Path) -> Iterator[None]:
    """Say it in a line where something cannot be removed.

    Raises
    ------
    OutputError
        In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror or error}; move it away") from error


def keep_if_due(checkpoints: Checkpoints, trainer: Trainer, describe: Callable[[], Mapping[str, Any]]) -> bool:
    """Keep the state of a training if it is time, and its numbers are sound; says whether it did.

    `describe` gives what is kept beside it. Of several processes each must call, and each then describes; the first one
    decides and writes.
    """
    if not checkpoints.is_due_for_all(trainer) or not trainer.is_sound():
        return False
    state, more = trainer.find_state(), describe()
    if trainer.processes.is_first:
        checkpoints.keep(state, more)
    return True
