"""What an extraction would cost: how long, from a few of its images, and how large."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache import files
from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    estimate_bytes,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.progress import SILENT, Progress
from featcache.stages.plan import Plan, plan_extraction, take_backbone

PROBE_FEW, PROBE_IMAGES = 8, 48


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What an extraction would cost.

    Attributes
    ----------
    images_per_second
        Measured on a few of the missing images; None if none is missing.
    seconds
        To compute them all.
    bytes
        Size of the finished file.
    """

    images_per_second: float | None
    seconds: float
    bytes: int


def forecast_extraction(
    data: Path | str, output: Path | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> tuple[Plan, Forecast]:
    """Say what `extract_features` would do, how long it would take and how large the file would be. Writes nothing.

    Parameters, errors as of `extract_features`.
    """
    settings, given = take_backbone(settings)
    config = ExtractConfig(**settings)
    plan = plan_extraction(data, files.follow_link(Path(output)), config, progress, given=given)
    if plan.missing:
        from featcache.stages.provide_backbone import equip

        plan = equip(plan, config, progress)
    return plan, estimate_cost(plan, config)


def estimate_cost(plan: Plan, config: ExtractConfig) -> Forecast:
    """How long and how large, from what a few of the missing images take.

    A few and some more are computed, so that what is done once for all can be told from what each image takes.
    """
    seconds, rate = 0.0, None
    if plan.missing:
        some = [plan.missing[i] for i in np.unique(np.linspace(0, len(plan.missing) - 1, PROBE_IMAGES).astype(int))]
        few = some[:: max(len(some) // PROBE_FEW, 1)][:PROBE_FEW]
        short, long = _time_run(plan, few, config), _time_run(plan, some, config)
        each = (long - short) / (len(some) - len(few)) if long > short and len(some) >= 2 * len(few) else 0.0
        each = each or long / len(some)
        seconds, rate = max(long - each * len(some), 0.0) + each * len(plan.missing), 1 / each
    empty = {
        name: FeatureSplit(listing=split, features=np.empty((0, plan.width)))
        for name, split in plan.listing.splits.items()
    }
    cache = FeatureCache(classes=plan.listing.classes, extractor=plan.extractor, splits=empty, provenance={})
    return Forecast(images_per_second=rate, seconds=seconds, bytes=estimate_bytes(cache))


def _time_run(plan: Plan, digests: Sequence[str], config: ExtractConfig) -> float:
    from featcache.stages.compute import prepare_backbone

    started = time.perf_counter()
    for _ in prepare_backbone(plan, digests, config).run():
        pass
    return time.perf_counter() - started
