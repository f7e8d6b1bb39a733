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
from featcache.metering import NOTHING_SPENT, Spent
from featcache.preprocessing import Preprocessing
from featcache.progress import Progress
from featcache.runtime import Execution, Outputs, choose_runtime, prepare_execution
from featcache.stages.plan import Computed, Plan, Row, say_kept


class RowKeeper:
    """Takes what comes out of a network, keeps what can be stored in parts, and remembers what cannot.

    Parameters
    ----------
    plan
        What is extracted, by what, into what.
    config
        In which precision.
    spent
        What was done for the rows before, elsewhere.

    Attributes
    ----------
    reasons
        Of the images, by their digests, that cannot be used; their views cannot be either.
    bad
        Every file with such an image.
    n_rows
        That were kept.
    """

    def __init__(self, plan: Plan, config: ExtractConfig, *, spent: Spent = NOTHING_SPENT) -> None:
        self.reasons: dict[str, str] = {}
        self.bad: list[BadImage] = []
        self.n_rows = 0
        self._paths: dict[str, list[str]] = {}
        self._image_of: dict[str, str] = {}
        self._config, self._writer = config, PartWriter(parts_path(plan.output), plan.key, config.store, spent=spent)

    @property
    def writer(self) -> PartWriter:
        """What the rows go to."""
        return self._writer

    def take(self, output: Outputs, rows: Sequence[Row], paths: dict[str, list[str]]) -> None:
        """Keep what came out for some of these rows; `paths` are all those of each image by its digest."""
        finite, failed = find_unusable(output, [paths[rows[row].image][0] for row in output.rows], self._config)
        self._writer.add([rows[row].digest for row in output.rows[finite].tolist()], output.values[finite])
        self.n_rows += int(finite.sum())
        if failed and self._paths is not paths:
            self._paths, self._image_of = paths, {copies[0]: image for image, copies in paths.items()}
        for path, reason in failed:
            image = self._image_of[path]
            if image not in self.reasons:
                self.reasons[image] = reason
                self.bad += [BadImage(copy, reason) for copy in paths[image]]


def compute_rows(plan: Plan, rows: Sequence[Row], config: ExtractConfig, progress: Progress) -> Computed:
    """Compute the features of these images and views and keep them in parts.

    Whatever ends it, the rows that were computed are kept.
    """
    paths, keeper = find_paths(plan.listing, rows), RowKeeper(plan, config)
    execution = prepare_backbone(plan, rows, config)
    if execution.remark:
        progress.say(f"{execution.remark}: {execution.runtime} takes its place")
    try:
        n = count_different(plan)
        outputs, unit = execution.run(), "view" if plan.views else "img"
        for output in progress.track(outputs, total=n, done=n - len(rows), what="extracting", unit=unit):
            keeper.take(output, rows, paths)
    except KeyboardInterrupt:
        keeper.writer.flush()
        say_kept(plan, keeper.writer.parts, progress)
        raise
    finally:
        keeper.writer.flush()
    return Computed(keeper.bad, keeper.writer.parts, execution.runtime, str(plan.device))


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
        n_images=plan.n_new,
        network=plan.backbone.network,
        compute=plan.backbone.precision["compute"],
    )


def prepare_backbone(plan: Plan, rows: Sequence[Row], config: ExtractConfig) -> Execution:
    """The plan's backbone, ready to run over these images and views, in their order.

    The runtime is the one for all that no cache has, however many of them these are.
    """
    assert plan.backbone
    return prepare_rows(plan, make_rows(plan, rows, plan.backbone.preprocessing), config)


def prepare_rows(plan: Plan, rows: ImageRows, config: ExtractConfig) -> Execution:
    """The same of rows that are made already."""
    assert plan.backbone
    assert plan.device
    return prepare_execution(
        plan.backbone.network,
        rows,
        device=plan.device,
        runtime=config.runtime,
        precision=plan.backbone.precision,
        n_images=max(plan.n_new, len(rows)),
        batch_size=config.batch_size,
        workers=config.workers,
        fill=True,
    )


def make_rows(plan: Plan, rows: Sequence[Row], preprocessing: Preprocessing) -> ImageRows:
    """The images and views to be decoded."""
    found = find_paths(plan.listing, rows)
    root, paths, digests = plan.listing.root, [found[row.image][0] for row in rows], [row.image for row in rows]
    if all(row.view is None for row in rows):
        return ImageRows(root, paths, transform=make_pixel_transform(preprocessing), digests=digests)
    numbers, seed = [row.view for row in rows], plan.views.seed
    return ViewRows(root, paths, numbers=numbers, preprocessing=preprocessing, seed=seed, digests=digests)
