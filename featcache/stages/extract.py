"""Stage 1: a frozen backbone turns every image into features once; they are kept in one HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from featcache.cache import (
    STORED_TYPES,
    DigestTable,
    FeatureCache,
    FeatureSplit,
    GatheredRows,
    Part,
    PartSource,
    RowTable,
    Source,
    check_parts,
    hold_output,
    list_done,
    open_cache,
    open_sources,
    parts_path,
    remove_parts,
    remove_temporary,
    stored_precision,
    write_cache,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import (
    STATS,
    Listing,
    Split,
    list_changed,
    name_root,
)
from featcache.errors import BadImage, BadImagesError, CacheError, OutputError
from featcache.metering import Meter, PeakMemory, Spent, add_up
from featcache.progress import SILENT, Progress
from featcache.recall import look_around
from featcache.runs import describe_environment
from featcache.stages.plan import (
    Computed,
    Plan,
    Row,
    find_missing,
    iterate_found,
    plan_extraction,
    remember_extractor,
    say_kept,
    take_backbone,
)
from featcache.storage import Place, check_writable, follow_link, locate
from featcache.views import NO_VIEWS

if TYPE_CHECKING:
    from featcache.backbones import Backbone

COMPUTED_WITH = ("peak_memory_bytes", "device", "runtime", "environment")


class ComputeRows(Protocol):
    """What computes rows: into parts, told of in the answer."""

    def __call__(self, plan: Plan, rows: Sequence[Row], config: ExtractConfig, progress: Progress, /) -> Computed:
        """Compute these rows."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction did.

    Attributes
    ----------
    path
        The cache file.
    cache
        What is in it, the features mapped from the file.
    computed
        Images that went through the network, each view of one counted.
    bad
        Files left out.
    seconds
        Wall time of this call.
    """

    path: Place
    cache: FeatureCache
    computed: int
    bad: tuple[BadImage, ...]
    seconds: float

    def __repr__(self) -> str:
        return f"Extraction({str(self.path)!r}, {self.cache!r}, {self.computed} computed, {self.seconds:.1f} s)"

    @property
    def reused(self) -> int:
        """Rows, of images and of their views, that needed no forward pass."""
        return len(self.cache) + self.cache.n_views - self.computed


def extract_features(
    data: Path | str, output: Place | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> Extraction:
    """Extract the features of every image of a folder into an HDF5 file.

    Rows whose image bytes are already in the file, made by the same extractor, are kept: on unchanged data nothing is
    computed. Work is kept in parts beside the output every few seconds; after whatever stops it, the same call goes on.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*.
    output
        The cache file.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.ExtractConfig`; `backbone` may also be a `Backbone`, see `wrap_network`.

    Returns
    -------
    Extraction

    Raises
    ------
    DatasetError
        If the folder is not a usable data set.
    BadImagesError
        If files cannot be used as images and `skip_bad` is not set. All other rows are kept in parts.
    StaleCacheError
        If the output, or a cache to reuse, was made by another extractor; the output only if `force` is not set.
    OutputBusyError
        If another process extracts into the output and `wait` is not set.
    BackboneError, DeviceError, MissingExtraError, OutputError
        If the network, the device or the output cannot be had.

    Examples
    --------
    >>> extraction = extract_features("photos", backbone="resnet18")       # doctest: +SKIP
    >>> extraction.cache.splits["train"].features.shape                    # doctest: +SKIP
    (244, 512)
    """
    meter, memory = Meter(), PeakMemory()
    settings, given = take_backbone(settings)
    config, output = ExtractConfig(**settings), follow_link(locate(output))
    try:
        check_writable(output)
    except OutputError:
        if output.is_file() and (finished := _find_finished(data, output, config, progress, meter, given)):
            return finished
        raise
    check_parts(output)
    with hold_output(output, wait=config.wait, progress=progress):
        remove_temporary(output)
        start = look_around()
        if config.engine == "ray":
            from featcache.stages.spread import extract_on_cluster

            return extract_on_cluster(data, output, config, progress, given=given, meter=meter, memory=memory)
        plan = plan_extraction(data, output, config, progress, keep=True, given=given)
        if plan.missing:
            plan = _equip(plan, config, progress)
        extraction = finish_extraction(plan, config, progress, meter, memory, _compute_rows)
        remember_extractor(plan, config, start)
        return extraction


def _find_finished(
    data: Path | str, output: Place, config: ExtractConfig, progress: Progress, meter: Meter, given: Backbone | None
) -> Extraction | None:
    """The cache in a place that cannot be written, if there is nothing to write."""
    plan = plan_extraction(data, output, config, progress, given=given)
    if plan.missing or config.rehash or not _is_up_to_date(plan, plan.listing, config):
        return None
    return _finish(plan, 0, (), meter)


def finish_extraction(
    plan: Plan, config: ExtractConfig, progress: Progress, meter: Meter, memory: PeakMemory, compute: ComputeRows
) -> Extraction:
    """Compute what is missing and put everything into the file, by who holds the output.

    Parameters
    ----------
    plan, config, progress
        What is to be done, and how.
    meter, memory
        Of the costs, since the beginning.
    compute
        What computes rows into parts.

    Raises
    ------
    BadImagesError
        If files cannot be used as images and `skip_bad` is not set.
    FeatcacheError
        What `compute` raises; that the file cannot be written.
    """
    _say_plan(plan, config, progress)
    if not plan.missing and not config.rehash and _is_up_to_date(plan, plan.listing, config):
        remove_parts(plan.output, plan.key)
        return _finish(plan, 0, (), meter)
    with open_sources(plan.sources, STORED_TYPES[config.store], plan.views) as (sources, damaged):
        for path, split, start, stop in damaged:
            progress.say(
                f"WARNING: {path} is damaged, {split} rows {start} to {stop - 1}: what is needed is recomputed"
            )
        missing = find_missing(plan.listing, plan.views, _make_table(plan, sources, plan.parts))
        computed = compute(plan, missing, config, progress)
        bad = [*plan.listing.bad, *computed.bad]
        if bad and not config.skip_bad:
            say_kept(plan, computed.parts, progress)
            raise BadImagesError(bad)
        listing = plan.listing.without(bad) if bad else plan.listing
        n_computed = _count_usable(missing, computed.bad, plan.listing)
        if n_computed or damaged or not _is_up_to_date(plan, listing, config):
            parts = [*plan.parts, *computed.parts]
            provenance = _describe_origin(plan, listing, config, memory, meter, computed)
            write_cache(plan.output, _gather(plan, listing, sources, parts, provenance))
    if left := remove_parts(plan.output, plan.key):
        progress.say(f"{len(left)} files stay in {parts_path(plan.output)}: of another extractor, or not featcache's")
    if plan.old and plan.sources and (gone := _count_gone(plan.old.listing, listing)):
        progress.say(f"{gone} old rows dropped from {plan.output}: their images have changed or are gone")
    if missing and (changed := list_changed(listing)):
        progress.say(f"WARNING: {len(changed)} images changed meanwhile, such as {changed[0]}; run the same again")
    return _finish(plan, n_computed, tuple(bad), meter)


def _equip(plan: Plan, config: ExtractConfig, progress: Progress) -> Plan:
    from featcache.stages.provide_backbone import equip

    return equip(plan, config, progress)


def _compute_rows(plan: Plan, rows: Sequence[Row], config: ExtractConfig, progress: Progress) -> Computed:
    """`compute_rows`, if there is anything to compute."""
    if not rows:
        return Computed([], [])
    from featcache.stages.compute import compute_rows

    return compute_rows(_equip(plan, config, progress), rows, config, progress)  # damaged ones may be among them


def _make_table(plan: Plan, sources: Sequence[Source], parts: Sequence[Part]) -> RowTable:
    return RowTable([*sources, *map(PartSource, parts)], plan.width, STORED_TYPES[stored_precision(plan.extractor)])


def _gather(
    plan: Plan, listing: Listing, sources: Sequence[Source], parts: Sequence[Part], provenance: dict[str, Any]
) -> FeatureCache:
    """The cache to be written: every image of the listing with its row."""
    table, splits = _make_table(plan, sources, parts), {}
    for name, split in listing.splits.items():
        n = plan.views.count(name)
        positions = np.concatenate([found for _, found in iterate_found(table, split.digests, plan.views, n)])
        if (positions < 0).any():
            raise CacheError(f"parts vanished from {parts_path(plan.output)} meanwhile; run the same command again")
        splits[name] = FeatureSplit(
            listing=split,
            features=GatheredRows(table, positions[:, 0], plan.width),
            views=GatheredRows(table, positions[:, 1:], plan.width) if n else None,
        )
    return FeatureCache(
        classes=listing.classes, extractor=plan.extractor, splits=splits, provenance=provenance, views=plan.views
    )


def _describe_origin(
    plan: Plan, listing: Listing, config: ExtractConfig, memory: PeakMemory, meter: Meter, computed: Computed
) -> dict[str, Any]:
    """The provenance of the new file: what all of its rows cost, whenever they were computed."""
    earlier = [open_cache(path).provenance for path in plan.sources]
    costs = [*(part.spent for part in plan.parts), *map(Spent.from_json, earlier)]
    provenance = {
        "data": name_root(listing.root),
        "settings": plan.list_settings(config),
        **add_up([*costs, meter.read()] if computed.runtime else costs).to_json(),
        "peak_memory_bytes": memory.read(),
        "device": computed.device,
        "runtime": computed.runtime,
        "environment": describe_environment(),
        "bad": [list(item) for item in listing.bad],
    }
    if not computed.runtime:  # how it was once computed, or elsewhere, is what counts
        provenance |= _find_machine(plan, earlier)
    return provenance


def _find_machine(plan: Plan, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What rows were computed with that were not computed here: as an earlier cache says, else what shards say."""
    if earlier:
        return {name: earlier[0][name] for name in COMPUTED_WITH}
    machines = list(list_done(plan.output, plan.key).values())
    if not machines:
        return {"device": ""}
    peaks = [one["peak_memory_bytes"] for one in machines if isinstance(one.get("peak_memory_bytes"), int)]
    first = next((one for one in machines if one.get("runtime")), machines[0])
    return {
        "device": str(first.get("device", "")),
        "runtime": str(first.get("runtime", "")),
        "environment": first["environment"] if isinstance(first.get("environment"), dict) else {},
        "peak_memory_bytes": max(peaks, default=None),
    }


def _count_usable(rows: Sequence[Row], bad: Sequence[BadImage], listing: Listing) -> int:
    """How many of these rows are of images that can be used."""
    if not bad:
        return len(rows)
    paths = {path for path, _ in bad}
    unusable = {
        digest
        for split in listing.splits.values()
        for path, digest in zip(split.paths, split.digests, strict=True)
        if path in paths
    }
    return sum(row.image not in unusable for row in rows)


def _count_gone(old: Listing, new: Listing) -> int:
    """How many different images of an old listing are not in a new one."""
    there = DigestTable([np.array(split.digests, "S64") for split in new.splits.values()])
    gone = [np.array(split.digests, "S64") for split in old.splits.values()]
    return len(np.unique(np.concatenate([digests[there.find(digests) < 0] for digests in gone])))


def _is_up_to_date(plan: Plan, listing: Listing, config: ExtractConfig) -> bool:
    """Whether the file that lies there need not be written again to hold this listing.

    File stats alone are worth it if reading again the files that they would save is more than writing this one.
    """
    if plan.old is None or plan.decision not in ("reuse", "extend"):
        return False
    old, origin = plan.old.listing, plan.old.provenance
    same = (
        plan.old.classes == listing.classes
        and list(old.splits) == list(listing.splits)
        and all(_is_same_split(split, listing.splits[name]) for name, split in old.splits.items())
        and plan.old.views == plan.views
        and origin["settings"] == plan.list_settings(config)
        and origin["bad"] == [list(item) for item in listing.bad]
        and origin["data"] == name_root(listing.root)
    )
    if not same:
        return False
    to_read = 0
    for name, split in listing.splits.items():
        fresh = split.stats.any(axis=1) & (split.stats != old.splits[name].stats).any(axis=1)
        to_read += int(split.stats[fresh, STATS.index("st_size")].sum())
    return to_read < plan.output.stat().st_size


def _is_same_split(one: Split, other: Split) -> bool:
    return one.paths == other.paths and one.digests == other.digests and bool(np.array_equal(one.labels, other.labels))


def _finish(plan: Plan, computed: int, bad: tuple[BadImage, ...], meter: Meter) -> Extraction:
    return Extraction(
        path=plan.output,
        cache=open_cache(plan.output),
        computed=computed,
        bad=bad,
        seconds=meter.seconds,
    )


def describe_network(plan: Plan, config: ExtractConfig) -> str:
    """What would compute what, in words."""
    where, views = "", ""
    if plan.backbone and plan.n_new:
        from featcache.stages.compute import foresee_runtime

        where = f", {plan.device} ({foresee_runtime(plan, config)})"
    if plan.views:
        views = f"; views: {plan.views.describe()}, seed {plan.views.seed}"
    extractor = plan.extractor
    return f"{extractor['backbone']}, weights {extractor['weights']['name']}, {plan.width} features{where}{views}"


def _say_plan(plan: Plan, config: ExtractConfig, progress: Progress) -> None:
    verb = {
        "create": "new cache",
        "reuse": "cache of the same extractor",
        "extend": "cache of the same extractor",
        "replace": "old cache replaced",
    }[plan.decision]
    kept = sum(map(len, plan.parts))
    going_on = f", {kept} rows in parts" if kept else ""
    progress.say(
        f"{describe_network(plan, config)}; {verb}{going_on}, {len(plan.missing)} images "
        f"{'and views ' if plan.views else ''}to compute"
    )
    old = plan.old.views if plan.old else NO_VIEWS
    if old and not (plan.views and old.is_like(plan.views)):
        progress.say(f"the views that {plan.output} has ({old.describe()}, seed {old.seed}) are dropped")
