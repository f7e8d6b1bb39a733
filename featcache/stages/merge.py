"""What several processes left in parts -> the one file, as one process would have written it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.cache import (
    Job,
    check_parts,
    hold_output,
    list_done,
    list_jobs,
    list_parts,
    open_cache,
    open_old,
    parts_path,
    read_bad,
    remove_temporary,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.errors import BadImage, CacheError, UnfinishedError
from featcache.metering import Meter, PeakMemory
from featcache.progress import SILENT, Progress
from featcache.stages.extract import Extraction, finish_extraction
from featcache.stages.order import read_job_config
from featcache.stages.plan import (
    Computed,
    Plan,
    Row,
    Settled,
    check_same_extractor,
    list_images,
    make_plan,
    open_sources_of,
)
from featcache.storage import Place, check_writable, follow_link, locate

NAMED_SHARDS = 10


def merge_shards(
    output: Place | str = FEATURES_FILE,
    *,
    data: Path | str | None = None,
    skip_bad: bool = False,
    wait: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Put the file together from the parts that shards have left. Computes nothing and needs no network.

    The data set is looked at once more: what has changed since a shard read it has no row, and is told of.

    Parameters
    ----------
    output
        The cache file.
    data
        The data set, where it lies elsewhere on this machine than where the shards saw it.
    skip_bad
        Leave out files that cannot be used as images, instead of stopping.
    wait
        Wait for another process that works on the same file, instead of stopping.
    force
        Replace a cache that was made by another extractor.
    progress
        Told what is being done.

    Returns
    -------
    Extraction

    Raises
    ------
    UnfinishedError
        If images have no row yet.
    BadImagesError
        If files cannot be used as images and `skip_bad` is not set.
    CacheError
        If there is nothing to put together.
    FeatcacheError
        As of `extract_features`.

    Examples
    --------
    >>> merge_shards("photos.h5").cache.splits["train"].features.shape     # doctest: +SKIP
    (244, 512)
    """
    meter, output = Meter(), follow_link(locate(output))
    check_writable(output)
    check_parts(output)
    jobs = list_jobs(output)
    if not jobs:
        return _take_finished(output, meter)
    job = choose_job(jobs, output, data)
    progress.say(f"{output}: shards of {data or job.data} are put together")
    return merge_job(job, output, data=data, skip_bad=skip_bad, wait=wait, force=force, progress=progress)


def choose_job(jobs: Sequence[Job], output: Place, data: Path | str | None) -> Job:
    """The one job that several shards have written down, wherever each saw the data.

    Raises
    ------
    CacheError
        If they are at different ones.
    """
    if len({job.meaning for job in jobs}) > 1:
        raise CacheError(
            f"shards have extracted different things into {output} ({parts_path(output)}); run those of one again with "
            f"--force, or drop all with `featcache cache prune {output}`"
        )
    names = sorted({job.data for job in jobs})
    if len(names) > 1 and data is None:
        raise CacheError(f"shards saw the data in {' and in '.join(names)}; say which it is with --data")
    return replace(jobs[0], reuse=tuple(dict.fromkeys(path for job in jobs for path in job.reuse)))


def merge_job(
    job: Job,
    output: Place,
    *,
    data: Path | str | None,
    skip_bad: bool,
    wait: bool = False,
    force: bool,
    progress: Progress,
) -> Extraction:
    """Put the file of a job together; parameters and errors as of `merge_shards`."""
    meter, memory = Meter(), PeakMemory()
    with hold_output(output, wait=wait, progress=progress):
        remove_temporary(output)
        config = read_job_config(job, skip_bad=skip_bad, force=force)
        return assemble(job, output, config, progress, meter, memory, data=data)


def assemble(
    job: Job,
    output: Place,
    config: ExtractConfig,
    progress: Progress,
    meter: Meter,
    memory: PeakMemory,
    *,
    data: Path | str | None = None,
) -> Extraction:
    """Put the file of a job together, by who holds the output; as `merge_shards`."""
    plan = plan_merge(job, data or job.data, output, config, progress)
    return finish_extraction(plan, config, progress, meter, memory, _recall_bad)


def _take_finished(output: Place, meter: Meter) -> Extraction:
    """The file that was put together before."""
    if not output.is_file():
        raise CacheError(
            f"there is nothing to merge into {output}: expected what shards leave in {parts_path(output)}; "
            f"`featcache extract DATA --shard 1/16 -o {output}` makes the first of 16"
        )
    return Extraction(path=output, cache=open_cache(output), computed=0, bad=(), seconds=meter.seconds)


def plan_merge(job: Job, data: Path | str, output: Place, config: ExtractConfig, progress: Progress) -> Plan:
    """The plan of a job whose rows other processes have made: nothing is loaded to compute with."""
    settled = Settled(old=open_old(output, force=config.force), extractor=dict(job.extractor))
    if settled.old and not config.force:
        check_same_extractor(settled.old, output, settled.extractor)
    sources = open_sources_of(settled, output, config)
    listing = list_images(data, output, settled, config, progress, keep=True)
    return make_plan(listing, settled, sources, output, config, progress)


def _recall_bad(plan: Plan, rows: Sequence[Row], config: ExtractConfig, progress: Progress) -> Computed:
    """What shards found out about images that have no row; a `ComputeRows`.

    Raises
    ------
    UnfinishedError
        If nobody has found out anything about one.
    """
    del config, progress
    if not rows:
        return Computed([], [])
    known, wanted = read_bad(plan.output, plan.key), {row.image for row in rows}
    bad: list[BadImage] = []
    unknown: list[str] = []
    for split in plan.listing.splits.values():
        for path, image in zip(split.paths, split.digests, strict=True):
            if image in wanted:
                if image in known:
                    bad.append(BadImage(path, known[image]))
                else:
                    unknown.append(path)
    if unknown:
        raise UnfinishedError(_say_unfinished(plan, unknown))
    return Computed(bad, [])


def _say_unfinished(plan: Plan, unknown: Sequence[str]) -> str:
    if damaged := list_parts(plan.output, "rows", plan.key)[1]:
        return f"{damaged[0]} is damaged, and its rows are missing; run the shards again, they compute what it held"
    one = len(unknown) == 1
    what = f"{len(unknown):,} image{'' if one else 's'} of {len(plan.listing):,} ha{'s' if one else 've'} no row yet"
    done = list_done(plan.output, plan.key)
    if not done:
        return f"{what}, such as {unknown[0]}: no shard has come to its end; run them again, each goes on where it was"
    count = max(done)[1] if done else 0
    left = [str(number) for number in range(1, count + 1) if (number, count) not in done]
    if not left:
        more = ", with --rehash if a cache whose rows were taken is damaged" if plan.sources else ""
        return f"{what}, such as {unknown[0]}: new or changed since its shard read it; run the shards again{more}"
    some = ", ".join(left[:NAMED_SHARDS]) + (
        f" and {len(left) - NAMED_SHARDS} more" if len(left) > NAMED_SHARDS else ""
    )
    return (
        f"{what}, such as {unknown[0]}: of {count} shards {some} ha{'s' if len(left) == 1 else 've'} not come to "
        f"the end; run `featcache extract DATA --shard {left[0]}/{count} -o {plan.output}` with its options again"
    )
