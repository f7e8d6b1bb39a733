"""What several processes extract into one file: what is wanted, and what is there of it, without reading the images."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.cache import (
    DigestTable,
    Job,
    describe_differences,
    drop_jobs,
    keep_done,
    keep_files,
    keep_job,
    list_differences,
    list_jobs,
    list_parts,
    parts_path,
)
from featcache.config import ExtractConfig
from featcache.dataset import (
    NOTHING_KNOWN,
    KnownFiles,
    Listing,
    Names,
    ReadOnce,
    Samples,
    Source,
    find_known_digests,
    find_samples,
    hash_groups,
    hash_samples,
    name_root,
)
from featcache.errors import BadImage, CacheError, StaleCacheError
from featcache.files import hash_bytes
from featcache.progress import SILENT, Progress
from featcache.runs import describe_environment
from featcache.stages.plan import (
    Plan,
    Row,
    Settled,
    find_known_files,
    find_missing,
    iterate_found,
    list_digests,
    open_sources_of,
    settle_extractor,
    settle_views,
)
from featcache.storage import Place, locate

if TYPE_CHECKING:
    import torch

    from featcache.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class Order:
    """An extraction that several processes share.

    Attributes
    ----------
    job
        What is written down of it.
    samples
        The data set by name; nothing of it has been read.
    plan
        The extraction, with a listing that is empty and nothing missing: what is, every process finds out for its own
        share.
    table
        The rows that are there.
    known
        The files that need not be read to know what is in them.
    """

    job: Job
    samples: Samples
    plan: Plan
    table: DigestTable
    known: KnownFiles

    @functools.cached_property
    def names_sha256(self) -> str:
        """Digest of what is extracted from which samples: of others, a share is another one."""
        return hash_bytes(f"{self.job.meaning} {self.samples.hash_names()}".encode())

    def count_rows(self, samples: Samples) -> int:
        """Rows that are wanted of some samples: of images, and of views of them."""
        return sum(len(names) * (1 + self.plan.views.count(name)) for name, names in samples.groups.items())


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of the samples, read.

    Attributes
    ----------
    listing
        These alone.
    missing
        Rows of them that are nowhere, each once.
    n_rows
        Rows of them that are wanted.
    bad
        Files that cannot be read.
    """

    listing: Listing
    missing: tuple[Row, ...]
    n_rows: int
    bad: tuple[BadImage, ...]


def place_order(
    data: Path | str,
    output: Place,
    config: ExtractConfig,
    progress: Progress,
    given: Backbone | None = None,
    *,
    device: torch.device | None = None,
) -> Order:
    """See what is wanted and what is there of it; write down what is being extracted.

    Parameters
    ----------
    data, output, config, progress
        As in `extract_features`.
    given
        The backbone, where it is not to be made from its name.
    device
        Where it will run, if that is on other machines.

    Raises
    ------
    StaleCacheError
        If others are extracting something else into the output.
    FeatcacheError
        As `extract_features`.
    """
    jobs = list_jobs(output)
    like = jobs[-1].extractor if jobs else None
    settled = settle_extractor(output, config, progress, given=given, like=like, device=device)
    if settled.backbone is None:
        from featcache.stages.provide_backbone import provide_settled

        backbone, place = provide_settled(config, given, settled.extractor, progress, device)
        settled = replace(settled, backbone=backbone, device=place)
    samples = find_samples(data, clips=settled.clips)
    progress.say(f"{samples.root}: {len(samples):,} {samples.noun}s, {len(samples.classes)} classes")
    views = settle_views(config, settled.old)
    known = NOTHING_KNOWN if config.rehash else find_known_files(output, settled.old)
    uncalibrated = settled.extractor["precision"] == {"compute": "int8", "stored": config.store}
    if uncalibrated or (views and not samples.is_split):
        samples, settled = _read_everything(samples, settled, known, output, config, progress, calibrate=uncalibrated)
        known = NOTHING_KNOWN if config.rehash else find_known_files(output, settled.old)
    job = Job(
        data=name_root(samples.root),
        settings=config.result_settings(),
        extractor=settled.extractor,
        reuse=tuple(str(make_absolute(locate(path))) for path in config.reuse),
    )
    join_job(output, job, force=config.force)
    sources = open_sources_of(settled, output, config)
    parts, _ = list_parts(output, "rows", settled.key)
    there = list_digests(sources, views, distrust=config.rehash)
    empty = Listing(root=samples.root, classes=samples.classes, splits={}, clips=samples.clips)
    plan = Plan(
        output=output,
        decision="create" if settled.old is None else "extend",
        listing=empty,
        extractor=settled.extractor,
        backbone=settled.backbone,
        device=settled.device,
        old=settled.old,
        sources=tuple(sources),
        parts=tuple(parts),
        views=views,
        missing=(),
        n_new=0,
    )
    order = Order(
        job=job,
        samples=samples,
        plan=plan,
        table=DigestTable([*there, *(part.columns["digests"] for part in parts)]),  # parts may vanish: in memory
        known=known,
    )
    return replace(order, plan=replace(plan, n_new=_count_new(order, DigestTable(there))))


def _count_new(order: Order, there: DigestTable) -> int:
    """How many rows no cache has, as far as that is known without reading: it decides the runtime."""
    if not len(there):
        return order.count_rows(order.samples)
    return int((find_rows(order, there) < 0).sum())


def find_rows(order: Order, table: DigestTable) -> NDArray[np.int64]:
    """Where the rows of all samples are in a table, -1 where one is not known to be there; no file is read for it."""
    digests, views, start = find_known_digests(order.samples, order.known), order.plan.views, 0
    found = [np.empty(0, np.int64)]
    for name, names in order.samples.groups.items():
        for _, rows in iterate_found(table, digests[start : start + len(names)], views, views.count(name)):
            found.append(rows.reshape(-1))
        start += len(names)
    return np.concatenate(found)


def _read_everything(
    samples: Samples,
    settled: Settled,
    known: KnownFiles,
    output: Place,
    config: ExtractConfig,
    progress: Progress,
    *,
    calibrate: bool,
) -> tuple[Samples, Settled]:
    """The samples in their splits, and the backbone calibrated: both depend on what is in all of the files.

    Views are as many as an image's split has, and without split folders its contents decide its split; int8 is
    calibrated on the images with the smallest digests.
    """
    listing = hash_samples(
        samples,
        val_fraction=config.val_fraction,
        seed=config.seed,
        progress=progress,
        known=known,
        keep=lambda stats, digests: keep_files(parts_path(output), stats, digests),
    )
    if calibrate:
        from featcache.stages.provide_backbone import calibrate as calibrate_backbone

        assert settled.backbone
        backbone = calibrate_backbone(settled.backbone, listing, config, progress)
        settled = replace(settled, backbone=backbone, extractor=backbone.describe(config.store))
    if samples.is_split or not settle_views(config, settled.old):
        return samples, settled  # in the order in which those see them who come when it is calibrated
    groups = {name: Names(paths=split.paths, labels=split.labels) for name, split in listing.splits.items()}
    return replace(samples, groups=groups), settled


def make_absolute(place: Place) -> Place:
    """The same, from any folder."""
    return place.absolute() if isinstance(place, Path) else place


def join_job(output: Place, job: Job, *, force: bool) -> None:
    """Write down what is being extracted, unless others are extracting something else there.

    Raises
    ------
    StaleCacheError
        If they are and `force` is not set.
    """
    if force:
        drop_jobs(output, job.meaning)
    for other in list_jobs(output):
        if other.meaning != job.meaning:
            differences = describe_differences(other.extractor, job.extractor) if other.key != job.key else ""
            settings = "; ".join(list_differences(other.settings, job.settings))
            raise StaleCacheError(
                f"others extract something else into {output} ({differences or settings}); state the same settings, "
                f"write elsewhere with -o OTHER.h5, drop their work with `featcache cache prune {output}`, or go on "
                f"beside it with --force"
            )
    keep_job(output, job)


def finish_order(order: Order, share: tuple[int, int], *, runtime: str, peak_memory_bytes: int | None) -> None:
    """Write down that a share, (number, count), has come to its end, and what it was computed with."""
    machine = {
        "device": str(order.plan.device),
        "runtime": runtime,
        "peak_memory_bytes": peak_memory_bytes,
        "environment": describe_environment(),
    }
    keep_done(order.plan.output, order.plan.key, order.names_sha256, share, machine)


def read_job_config(job: Job, **settings: Any) -> ExtractConfig:
    """The settings that a job was begun with, and others that decide no row.

    Raises
    ------
    CacheError
        If they make no sense.
    """
    known = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in job.settings.items()
        if name in (*ExtractConfig.RESULT, *ExtractConfig.OPTIONAL)
    }
    try:
        return ExtractConfig(**{**known, "reuse": job.reuse, **settings})
    except (TypeError, ValueError) as error:  # also a SettingsError
        raise CacheError(
            f"{job.name} has settings that make no sense ({error}); remove it and run a shard again"
        ) from error


def read_piece(order: Order, samples: Samples, progress: Progress = SILENT) -> Piece:
    """Read some of the samples, where nothing is known of them, and see what is missing.

    What was found out is kept in parts beside the output.
    """
    output, root = order.plan.output, samples.root
    if isinstance(root, Source) and root.readers > 1:
        samples = replace(samples, root=(root := ReadOnce(root)))
    splits, bad = hash_groups(
        samples,
        progress=progress,
        known=order.known,
        keep=lambda stats, digests: keep_files(parts_path(output), stats, digests),
    )
    listing = replace(order.plan.listing, root=root, splits=splits, bad=tuple(bad))
    views = order.plan.views
    return Piece(
        listing=listing,
        missing=tuple(find_missing(listing, views, order.table)),
        n_rows=sum(len(split) * (1 + views.count(name)) for name, split in splits.items()),
        bad=tuple(bad),
    )
