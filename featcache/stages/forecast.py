"""What an extraction would cost: how long, from a few of its images, and how large."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    estimate_bytes,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.progress import SILENT, Progress
from featcache.stages.plan import Plan, Row, plan_extraction, take_backbone
from featcache.storage import Place, follow_link, locate

PROBE_IMAGES = 48


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
    data: Path | str, output: Place | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> tuple[Plan, Forecast]:
    """Say what `extract_features` would do, how long it would take and how large the file would be. Writes nothing.

    Parameters, errors as of `extract_features`.
    """
    settings, given = take_backbone(settings)
    config = ExtractConfig(**settings)
    plan = plan_extraction(data, follow_link(locate(output)), config, progress, given=given)
    if plan.missing:
        from featcache.stages.provide_backbone import equip

        plan = equip(plan, config, progress)
    return plan, estimate_cost(plan, config)


def estimate_cost(plan: Plan, config: ExtractConfig) -> Forecast:
    """How long and how large, from making the network ready and running it on some of the missing images."""
    seconds, rate = 0.0, None
    if plan.missing:
        from featcache.stages.compute import prepare_backbone

        some = choose_probes(plan)
        started = time.perf_counter()
        execution = prepare_backbone(plan, some, config)
        prepared = time.perf_counter() - started
        for _ in range(2):  # what was decoded while the network was made ready would make the first one look too fast
            started = time.perf_counter()
            for _ in execution.run():
                pass
        each = (time.perf_counter() - started) / len(some)
        seconds, rate = prepared + each * len(plan.missing), 1 / each
    empty = {
        name: FeatureSplit(listing=split, features=np.empty((0, plan.width)))
        for name, split in plan.listing.splits.items()
    }
    cache = FeatureCache(
        classes=plan.listing.classes, extractor=plan.extractor, splits=empty, provenance={}, views=plan.views
    )
    return Forecast(images_per_second=rate, seconds=seconds, bytes=estimate_bytes(cache))


def choose_probes(plan: Plan) -> list[Row]:
    """Some of the missing rows, from all over; of an image's views a few side by side: they are decoded together."""
    n, each = len(plan.missing), 1 + max(plan.views.train, plan.views.others)
    starts = np.linspace(0, n - 1, max(PROBE_IMAGES // each, 1)).astype(int)
    chosen = np.unique(np.minimum(starts[:, None] + np.arange(min(each, PROBE_IMAGES)), n - 1))
    return [plan.missing[i] for i in chosen]
