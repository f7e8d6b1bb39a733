"""Why a cache can be used for a command, or cannot: field by field, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from featcache.cache import key_parts
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import Listing
from featcache.progress import SILENT, Progress
from featcache.stages.plan import Plan, plan_extraction


class Field(NamedTuple):
    """One value that decides the features: in the file, and wanted now."""

    name: str
    found: Any
    wanted: Any

    @property
    def same(self) -> bool:
        """Whether it keeps no row from being used."""
        return bool(self.found == self.wanted)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `extract_features` would make of the file that lies at its output.

    Attributes
    ----------
    plan
        What it would do.
    fields
        Every value that decides the features; empty where there is no file.
    images
        How many images of the data set are "unchanged" (path, label and bytes), "moved" (the same bytes elsewhere or
        under another label), "changed" (other bytes at the same path) or "new"; how many of the file's are "gone".
    """

    plan: Plan
    fields: list[Field]
    images: dict[str, int]


def explain_cache(
    data: Path | str, output: Path | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> Explanation:
    """Say what of a cache the same call of `extract_features` would use, and why not the rest. Writes nothing.

    Parameters, errors as of `extract_features`; but a cache of another extractor is explained, not refused.
    """
    plan = plan_extraction(data, Path(output), ExtractConfig(**settings), progress, explain=True)
    if plan.old is None:
        return Explanation(plan=plan, fields=[], images={})
    return Explanation(
        plan=plan,
        fields=compare_fields(key_parts(plan.old.extractor), key_parts(plan.extractor)),
        images=compare_images(plan.old.listing, plan.listing),
    )


def compare_fields(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[Field]:
    """All values of two descriptions side by side, those in groups by their dotted names.

    >>> compare_fields({"dim": 8, "p": {"crop": 16}}, {"dim": 8, "p": {"crop": 17}})
    [Field(name='dim', found=8, wanted=8), Field(name='p.crop', found=16, wanted=17)]
    """
    fields = []
    for name in [*found, *(name for name in wanted if name not in found)]:
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            fields += compare_fields(one, other, f"{prefix}{name}.")
        else:
            fields.append(Field(f"{prefix}{name}", one, other))
    return fields


def compare_images(found: Listing, wanted: Listing) -> dict[str, int]:
    """How many images stayed, moved, changed, came and went."""
    before, now = _rows_by_path(found), _rows_by_path(wanted)
    digests = {digest for _, digest in before.values()}
    counts = {"unchanged": 0, "moved": 0, "changed": 0, "new": 0}
    for path, row in now.items():
        if before.get(path) == row:
            counts["unchanged"] += 1
        elif row[1] in digests:
            counts["moved"] += 1
        else:
            counts["changed" if path in before else "new"] += 1
    kept = {digest for _, digest in now.values()}
    gone = sum(path not in now and digest not in kept for path, (_, digest) in before.items())
    return {**counts, "gone": gone}


def _rows_by_path(listing: Listing) -> dict[str, tuple[str, str]]:
    """Path -> (split and class, digest)."""
    return {
        path: (f"{name}/{listing.classes[label]}", digest)
        for name, split in listing.splits.items()
        for path, label, digest in zip(split.paths, split.labels.tolist(), split.digests, strict=True)
    }
