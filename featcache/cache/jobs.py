"""What several processes that extract into one file tell each other, in small files beside their parts.

Each file is written whole, under a name that says what is in it, and is never changed: whoever writes one twice writes
the same. Nothing here is needed for the rows to be right; the rows themselves are in parts.

::

    job-<key>-<sha256>.json              what is being extracted: data, settings, extractor
    done-<key>-<samples>-<3>of<16>.json  a share that has come to its end, and on what machine
    bad-<key>-<sha256>.json              images of which no row can be made, with the reasons
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featcache.cache.contents import STORED_TYPES
from featcache.cache.key import hash_extractor
from featcache.cache.parts import NOTE_NAME, drop_files, list_files, parts_path, read_file
from featcache.errors import CacheError
from featcache.files import canonical_json, hash_bytes, pretty_json
from featcache.storage import Place, write_whole

JOB_SCHEMA = 1
DONE_NAME = re.compile(r"done-(?P<key>[0-9a-f]{16})-(?P<samples>[0-9a-f]{16})-(?P<number>\d+)of(?P<count>\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is being extracted into a file by several processes.

    Attributes
    ----------
    data
        The data set, as it is called where the job began.
    settings
        Those that decide what comes out.
    extractor
        Description of what computes.
    reuse
        Other caches whose rows may be taken.
    """

    data: str
    settings: Mapping[str, Any]
    extractor: Mapping[str, Any]
    reuse: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def meaning(self) -> str:
        """Digest of what decides the outcome, whatever the data is called and wherever rows are taken from."""
        return hash_bytes(canonical_json([dict(self.settings), self.key]).encode())

    @property
    def name(self) -> str:
        """Of its file."""
        digest = hash_bytes(canonical_json([self.meaning, self.data, list(self.reuse)]).encode())
        return f"job-{self.key[:16]}-{digest[:32]}.json"


def keep_job(output: Place, job: Job) -> None:
    """Write down what is being extracted into `output`, if nobody has."""
    path = parts_path(output) / job.name
    if path not in list_files(parts_path(output)):
        value = {"data": job.data, "settings": job.settings, "extractor": job.extractor, "reuse": job.reuse}
        write_whole(path, pretty_json({"schema": JOB_SCHEMA, **value}))


def list_jobs(output: Place) -> list[Job]:
    """What is being extracted into `output`, in the order of the names."""
    return [_read_job(path) for path in _list_notes(output, "job-")]


def drop_jobs(output: Place, keep: str) -> None:
    """Forget what else was being extracted into `output` than what has this meaning; rows that were made stay."""
    drop_files([path for path in _list_notes(output, "job-") if _read_job(path).meaning != keep])


def _read_job(path: Place) -> Job:
    value = _read_note(path)
    if value.get("schema") != JOB_SCHEMA:
        raise CacheError(f"{path} is no description of a job, or of another version of featcache; remove it")
    try:
        extractor = dict(value["extractor"])
        sound = extractor["precision"]["stored"] in STORED_TYPES and int(extractor["dim"]) > 0
        sound = sound and isinstance(extractor["preprocessing"], dict) and isinstance(extractor["weights"], dict)
        sound = sound and all(isinstance(text, str) for text in (value["data"], extractor["backbone"], *value["reuse"]))
        job = Job(
            data=value["data"], settings=dict(value["settings"]), extractor=extractor, reuse=tuple(value["reuse"])
        )
        named = sound and job.name == path.name
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is no description of a job ({error!r}); remove it and run a shard again") from error
    if not named:
        raise CacheError(f"{path} is damaged: it is not what its name says; remove it and run a shard again")
    return job


def keep_bad(output: Place, key: str, reasons: Mapping[str, str]) -> None:
    """Write down the images, by their digests, of which this extractor can make no row."""
    if reasons:
        text = canonical_json(dict(reasons))
        write_whole(parts_path(output) / f"bad-{key[:16]}-{hash_bytes(text.encode())[:32]}.json", text)


def read_bad(output: Place, key: str) -> dict[str, str]:
    """The images, by their digests, of which this extractor could make no row, and why."""
    reasons: dict[str, str] = {}
    for path in _list_notes(output, f"bad-{key[:16]}-"):
        with contextlib.suppress(CacheError):  # it is found out again
            found = _read_note(path)
            if f"-{hash_bytes(canonical_json(found).encode())[:32]}." in path.name:
                reasons |= {digest: str(reason) for digest, reason in found.items()}
    return reasons


def keep_done(output: Place, key: str, samples: str, share: tuple[int, int], machine: Mapping[str, Any]) -> None:
    """Write down that a share has come to its end.

    Parameters
    ----------
    output, key
        What was extracted into, by which extractor.
    samples
        Digest of the names of all samples: of another data set it is another share.
    share
        (number, count).
    machine
        What it ran on, as plain JSON values.
    """
    name = f"done-{key[:16]}-{samples[:16]}-{share[0]}of{share[1]}.json"
    write_whole(parts_path(output) / name, pretty_json(dict(machine)))


def list_done(output: Place, key: str, samples: str | None = None) -> dict[tuple[int, int], dict[str, Any]]:
    """The shares, (number, count), that have come to their end, with what each ran on; None is of any samples."""
    done = {}
    for path in _list_notes(output, f"done-{key[:16]}-"):
        found = DONE_NAME.fullmatch(path.name)
        if found and (samples is None or samples.startswith(found["samples"])):
            with contextlib.suppress(CacheError):
                done[int(found["number"]), int(found["count"])] = _read_note(path)
    return done


def _list_notes(output: Place, prefix: str) -> list[Place]:
    files = list_files(parts_path(output))
    return [path for path in files if path.name.startswith(prefix) and NOTE_NAME.fullmatch(path.name)]


def _read_note(path: Place) -> dict[str, Any]:
    """A small JSON file of ours."""
    try:
        value = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path} cannot be read: {error}; remove it and run the same command again") from error
    if not isinstance(value, dict):
        raise CacheError(f"{path} is damaged: expected a JSON object; remove it and run the same command again")
    return value
