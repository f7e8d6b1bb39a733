"""Why a cache can be used for a command, or cannot: field by field, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.cache import Field, compare_fields, spell_out
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import Listing
from featcache.progress import SILENT, Progress
from featcache.stages.plan import Plan, plan_extraction, take_backbone
from featcache.storage import Place, locate
from featcache.views import Views


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `extract_features` would make of the file that lies at its output.

    Attributes
    ----------
    plan
        What it would do.
    fields
        Every value that decides the features, and which views there are; empty where there is no file.
    images
        How many images of the data set are "unchanged" (path, label and bytes), "moved" (the same bytes elsewhere or
        under another label), "changed" (other bytes at the same path) or "new"; how many of the file's are "gone".
    """

    plan: Plan
    fields: list[Field]
    images: dict[str, int]


def explain_cache(
    data: Path | str, output: Place | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> Explanation:
    """Say what of a cache the same call of `extract_features` would use, and why not the rest. Writes nothing.

    Parameters, errors as of `extract_features`; but a cache of another extractor is explained, not refused.
    """
    settings, given = take_backbone(settings)
    plan = plan_extraction(data, locate(output), ExtractConfig(**settings), progress, explain=True, given=given)
    if plan.old is None:
        return Explanation(plan=plan, fields=[], images={})
    return Explanation(
        plan=plan,
        fields=[
            *compare_fields(spell_out(plan.old.extractor), spell_out(plan.extractor)),
            *compare_views(plan.old.views, plan.views),
        ],
        images=compare_images(plan.old.listing, plan.listing),
    )


def compare_views(found: Views, wanted: Views) -> list[Field]:
    """How many views there are of each image, and which; nothing where there are none and none are wanted."""
    if not found and not wanted:
        return []
    return compare_fields(found.to_json(), wanted.to_json(), "views.")


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
