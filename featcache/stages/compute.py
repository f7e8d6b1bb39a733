"""Images that have no row yet -> rows in parts: the one place where an extraction runs its network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.cache import PartWriter, parts_path
from featcache.config import ExtractConfig
from featcache.dataset import Listing
from featcache.errors import BadImage
from featcache.images import ImageRows, ViewRows, make_pixel_transform
from featcache.preprocessing import Preprocessing
from featcache.progress import Progress
from featcache.runtime import Execution, Outputs, choose_runtime, prepare_execution
from featcache.stages.plan import Computed, Plan, Row, say_kept


def compute_rows(plan: Plan, rows: Sequence[Row], config: ExtractConfig, progress: Progress) -> Computed:
    """Compute the features of these images and views and keep them in parts.

    Whatever ends it, the rows that were computed are kept.
    """
    paths = find_paths(plan.listing, rows)
    image_of = {copies[0]: image for image, copies in paths.items()}
    reasons: dict[str, str] = {}  # of an image that cannot be used; its views cannot be either
    writer = PartWriter(parts_path(plan.output), plan.key, config.store)
    execution = prepare_backbone(plan, rows, config)
    if execution.remark:
        progress.say(f"{execution.remark}: {execution.runtime} takes its place")
    try:
        n = count_different(plan)
        outputs, unit = execution.run(), "view" if plan.views else "img"
        for output in progress.track(outputs, total=n, done=n - len(rows), what="extracting", unit=unit):
            finite, failed = find_unusable(output, [paths[rows[row].image][0] for row in output.rows], config)
            writer.add([rows[row].digest for row in output.rows[finite].tolist()], output.values[finite])
            for path, reason in failed:
                reasons.setdefault(image_of[path], reason)
    except KeyboardInterrupt:
        writer.flush()
        say_kept(plan, writer.parts, progress)
        raise
    finally:
        writer.flush()
    bad = [BadImage(copy, reason) for image, reason in reasons.items() for copy in paths[image]]
    return Computed(bad, writer.parts, execution.runtime)


def find_paths(listing: Listing, rows: Sequence[Row]) -> dict[str, list[str]]:
    """All paths of each image that is wanted, by its digest."""
    paths: dict[str, list[str]] = {row.image: [] for row in rows}
    for split in listing.splits.values():
        for path, image in zip(split.paths, split.digests, strict=True):
            if image in paths:
                paths[image].append(path)
    return paths


def count_different(plan: Plan) -> int:
    """Rows of different images and views that are wanted."""
    n_views: dict[str, int] = {}
    for name, split in plan.listing.splits.items():
        n = plan.views.count(name)
        for image in split.digests:
            n_views[image] = max(n, n_views.get(image, 0))
    return len(n_views) + sum(n_views.values())


def find_unusable(
    output: Outputs, paths: Sequence[str], config: ExtractConfig
) -> tuple[NDArray[np.bool_], list[BadImage]]:
    """Which of B rows can be stored (B,), and every file of the batch that has no such row, with the reason."""
    with np.errstate(over="ignore"):
        usable = np.isfinite(output.values.astype(config.store)).all(axis=1)
    failed = list(output.bad)
    for path, values in zip((paths[i] for i in np.flatnonzero(~usable).tolist()), output.values[~usable], strict=True):
        too_large = bool(np.isfinite(values).all())
        reason = "too large for float16; use --store float32" if too_large else "not finite numbers"
        failed.append(BadImage(path, f"its features are {reason}"))
    return usable, failed


def foresee_runtime(plan: Plan, config: ExtractConfig) -> str:
    """The runtime for all that is missing."""
    assert plan.backbone
    assert plan.device
    return choose_runtime(
        config.runtime,
        plan.device,
        n_images=len(plan.missing),
        network=plan.backbone.network,
        compute=plan.backbone.precision["compute"],
    )


def prepare_backbone(plan: Plan, rows: Sequence[Row], config: ExtractConfig) -> Execution:
    """The plan's backbone, ready to run over these images and views, in their order.

    The runtime is the one for all that is missing, however many of them these are.
    """
    assert plan.backbone
    assert plan.device
    return prepare_execution(
        plan.backbone.network,
        make_rows(plan, rows, plan.backbone.preprocessing),
        device=plan.device,
        runtime=config.runtime,
        precision=plan.backbone.precision,
        n_images=max(len(plan.missing), len(rows)),
        batch_size=config.batch_size,
        workers=config.workers,
    )


def make_rows(plan: Plan, rows: Sequence[Row], preprocessing: Preprocessing) -> ImageRows:
    """The images and views to be decoded."""
    found = find_paths(plan.listing, rows)
    root, paths, digests = plan.listing.root, [found[row.image][0] for row in rows], [row.image for row in rows]
    if all(row.view is None for row in rows):
        return ImageRows(root, paths, transform=make_pixel_transform(preprocessing), digests=digests)
    numbers, seed = [row.view for row in rows], plan.views.seed
    return ViewRows(root, paths, numbers=numbers, preprocessing=preprocessing, seed=seed, digests=digests)
