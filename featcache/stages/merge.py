"""What several processes left in parts -> the one file, as one process would have written it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featcache.cache import (
    Job,
    check_parts,
    hold_output,
    list_done,
    list_jobs,
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
    meter, memory = Meter(), PeakMemory()
    output = follow_link(locate(output))
    check_writable(output)
    check_parts(output)
    with hold_output(output, wait=wait, progress=progress):
        remove_temporary(output)
        jobs = list_jobs(output)
        if not jobs:
            return _take_finished(output, meter)
        config = read_job_config(jobs[-1], skip_bad=skip_bad, force=force)
        return assemble(jobs[-1], output, config, progress, meter, memory, data=data)


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
    one = len(unknown) == 1
    what = f"{len(unknown):,} image{'' if one else 's'} of {len(plan.listing):,} ha{'s' if one else 've'} no row yet"
    done = list_done(plan.output, plan.key)
    if not done:
        return f"{what}, such as {unknown[0]}: no shard has come to its end; run them again, each goes on where it was"
    count = max(done)[1] if done else 0
    left = [str(number) for number in range(1, count + 1) if (number, count) not in done]
    if not left:
        return f"{what}, such as {unknown[0]}: new or changed since its shard read it; run the shards again"
    some = ", ".join(left[:NAMED_SHARDS]) + (
        f" and {len(left) - NAMED_SHARDS} more" if len(left) > NAMED_SHARDS else ""
    )
    return (
        f"{what}, such as {unknown[0]}: of {count} shards {some} ha{'s' if len(left) == 1 else 've'} not come to "
        f"the end; run `featcache extract DATA --shard {left[0]}/{count} -o {plan.output}` with its options again"
    )
