"""Images that have no row yet -> rows in parts: the one place where an extraction runs its network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.cache import PartWriter, parts_path
from featcache.config import ExtractConfig
from featcache.errors import BadImage
from featcache.images import ImageRows, make_pixel_transform
from featcache.progress import Progress
from featcache.runtime import Execution, Outputs, choose_runtime, prepare_execution
from featcache.stages.plan import Computed, Plan, say_kept


def compute_rows(plan: Plan, digests: Sequence[str], config: ExtractConfig, progress: Progress) -> Computed:
    """Compute the features of the images with these digests and keep them in parts.

    Whatever ends it, the rows that were computed are kept.
    """
    paths_by_digest: dict[str, list[str]] = {digest: [] for digest in digests}
    for split in plan.listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            if digest in paths_by_digest:
                paths_by_digest[digest].append(path)
    digest_of = {paths[0]: digest for digest, paths in paths_by_digest.items()}
    bad: list[BadImage] = []
    writer = PartWriter(parts_path(plan.output), plan.key, config.store)
    execution = prepare_backbone(plan, digests, config)
    if execution.remark:
        progress.say(f"{execution.remark}: {execution.runtime} takes its place")
    try:
        n_cached = len(plan.listing.digests()) - len(digests)
        for output in progress.track(execution.run(), total=n_cached + len(digests), done=n_cached, what="extracting"):
            finite, failed = find_unusable(output, [paths_by_digest[digests[row]][0] for row in output.rows], config)
            writer.add([digests[row] for row in output.rows[finite].tolist()], output.values[finite])
            bad += [BadImage(copy, reason) for path, reason in failed for copy in paths_by_digest[digest_of[path]]]
    except KeyboardInterrupt:
        writer.flush()
        say_kept(plan, writer.parts, progress)
        raise
    finally:
        writer.flush()
    return Computed(bad, writer.parts, sum(map(len, writer.parts)), execution.runtime)


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


def prepare_backbone(plan: Plan, digests: Sequence[str], config: ExtractConfig) -> Execution:
    """The plan's backbone, ready to run over the images with these digests, in their order.

    The runtime is the one for all that is missing, however many of them these are.
    """
    assert plan.backbone
    assert plan.device
    path_of: dict[str, str] = {}
    for split in plan.listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            path_of.setdefault(digest, path)
    source = ImageRows(
        plan.listing.root,
        [path_of[digest] for digest in digests],
        transform=make_pixel_transform(plan.backbone.preprocessing),
        digests=digests,
    )
    return prepare_execution(
        plan.backbone.network,
        source,
        device=plan.device,
        runtime=config.runtime,
        precision=plan.backbone.precision,
        n_images=max(len(plan.missing), len(digests)),
        batch_size=config.batch_size,
        workers=config.workers,
    )
