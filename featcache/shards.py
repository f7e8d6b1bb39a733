"""Which share of a job this process has: stated, or read from what started it. Knows no images.

A job of N samples is cut into pieces of neighbours, and the pieces are dealt out in turn, so that every share has some
of each class. Whoever computes a share needs to know nothing of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featcache.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AUTO = "auto"
MAX_SHARDS = 100_000
PIECE = 1 << 16  # samples that stay together, so that a part is of neighbours: the file is assembled in their order
PIECES = 16  # of each share, at least, where there are enough samples: no share is much larger than another


@dataclass(frozen=True, order=True)
class Shard:
    """One of n shares.

    Attributes
    ----------
    number
        1 to n.
    count
        n.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def list_rows(self, n: int) -> NDArray[np.int64]:
        """Which of n samples are in this share, ascending.

        >>> [Shard(number, 3).list_rows(7).tolist() for number in (1, 2, 3)]
        [[0, 3, 6], [1, 4], [2, 5]]
        """
        import numpy as np

        piece = min(PIECE, max(n // (PIECES * self.count), 1))
        rows: NDArray[Any] = np.arange(n, dtype=np.int64)
        return np.asarray(rows[rows // piece % self.count == self.number - 1])


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The share that a text names.

    Parameters
    ----------
    text
        "3/16"; counted from 1, and 0 is the last one, so that a count from 0 reaches all of them as well. "auto" reads
        both numbers from the variables of torchrun, SLURM or Kubernetes, "auto/16" the first one.
    environment
        The variables.

    Raises
    ------
    SettingsError
        If it names none, or the variables do not.

    Examples
    --------
    >>> parse_shard("0/16", {}), parse_shard("auto", {"RANK": "2", "WORLD_SIZE": "4"})
    (Shard(number=16, count=16), Shard(number=3, count=4))
    """
    found = re.fullmatch(r"(\d{1,9}|auto)/(\d{1,9})|(auto)", text.strip())
    if found is None:
        raise SettingsError(f"--shard is {text!r}: expected such as 3/16, auto or auto/16")
    if found[3]:
        return _find_both(environment)
    count = int(found[2])
    if not 1 <= count <= MAX_SHARDS:
        raise SettingsError(f"--shard is {text!r}: expected 1 to {MAX_SHARDS:,} shards")
    if found[1] == AUTO:
        return _number(_find_index(environment), count)
    if int(found[1]) > count:
        raise SettingsError(f"--shard is {text!r}: expected a number from 1 to {count}")
    return _number(int(found[1]) - 1, count)


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether torchrun started this as one of several processes, which then share the work unasked."""
    return "RANK" in environment and _read(environment, "WORLD_SIZE", 1) > 1


def _number(index: int, count: int) -> Shard:
    """The share of an index that counts from 0, or from anywhere: n in a row are n different ones."""
    return Shard(index % count + 1, count)


def _find_both(environment: Mapping[str, str]) -> Shard:
    """Index and count, from torchrun (RANK, WORLD_SIZE) or from SLURM's arrays and steps.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html; https://slurm.schedmd.com/job_array.html and
    https://slurm.schedmd.com/srun.html, output environment variables.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _number(_read(environment, "RANK"), max(_read(environment, "WORLD_SIZE"), 1))
    if "JOB_COMPLETION_INDEX" in environment:
        raise SettingsError("--shard auto: Kubernetes tells no pod how many there are; state it, such as auto/16")
    task, n_tasks = _find_task(environment)
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _number(
            _find_in_array(environment) * n_tasks + task, _read(environment, "SLURM_ARRAY_TASK_COUNT") * n_tasks
        )
    if n_tasks > 1:
        return _number(task, n_tasks)
    raise SettingsError(
        "--shard auto finds neither RANK and WORLD_SIZE (torchrun), nor SLURM_ARRAY_TASK_ID (SLURM), nor SLURM_STEP_ID "
        "and SLURM_PROCID of more than one task (SLURM's srun); "
        "state it, such as 3/16"
    )


def _find_index(environment: Mapping[str, str]) -> int:
    """The index alone, as torchrun, Kubernetes or SLURM has it."""
    for name in ("RANK", "JOB_COMPLETION_INDEX"):
        if name in environment:
            return _read(environment, name)
    task, n_tasks = _find_task(environment)
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _read(environment, "SLURM_ARRAY_TASK_ID") * n_tasks + task
    if n_tasks > 1:
        return task
    raise SettingsError(
        "--shard auto finds none of RANK (torchrun), JOB_COMPLETION_INDEX (Kubernetes), SLURM_ARRAY_TASK_ID (SLURM), "
        "SLURM_STEP_ID and SLURM_PROCID (SLURM's srun); state it, such as 3/16"
    )


def _find_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which task of a SLURM step this is, of how many; a batch script, which runs once, is in none."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 0, 1
    n_tasks = _read(environment, "SLURM_STEP_NUM_TASKS", _read(environment, "SLURM_NTASKS", 1))
    return _read(environment, "SLURM_PROCID"), max(n_tasks, 1)


def _find_in_array(environment: Mapping[str, str]) -> int:
    """The place of this task in its SLURM array, from 0."""
    here, first, last, count = (
        _read(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")
    )
    step = _read(environment, "SLURM_ARRAY_TASK_STEP", 1) or 1
    if (last - first) // step + 1 != count or (here - first) % step:
        raise SettingsError(
            f"--shard auto: the array's {count} tasks from {first} to {last} are not in a row (a part of it again?); "
            f"state how many shards there are, such as auto/16"
        )
    return (here - first) // step


def _read(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d{1,9}", text):
        raise SettingsError(f"--shard auto: {name} is {text!r}, expected a number; state the shard, such as 3/16")
    return int(text)
