"""Stage 1: a frozen backbone turns every image into features once; they are kept in one HDF5 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.cache import (
    STORED_TYPES,
    FeatureCache,
    FeatureSplit,
    GatheredRows,
    Part,
    PartSource,
    RowTable,
    Source,
    check_parts,
    hold_output,
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
)
from featcache.errors import BadImage, BadImagesError, CacheError, OutputError
from featcache.metering import Meter, PeakMemory, Spent, add_up
from featcache.progress import SILENT, Progress
from featcache.recall import look_around
from featcache.runs import describe_environment
from featcache.stages.plan import Computed, Plan, Row, plan_extraction, remember_extractor, say_kept, take_backbone
from featcache.views import NO_VIEWS, Views

if TYPE_CHECKING:
    from featcache.backbones import Backbone

NAMED_IMAGES = 1 << 16  # whose views' digests are held at a time
COMPUTED_WITH = ("peak_memory_bytes", "device", "runtime", "environment")


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

    path: Path
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
    data: Path | str, output: Path | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
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
    config, output = ExtractConfig(**settings), files.follow_link(Path(output))
    try:
        files.check_writable(output)
    except OutputError:
        if output.is_file() and (finished := _find_finished(data, output, config, progress, meter, given)):
            return finished
        raise
    check_parts(output)
    with hold_output(output, wait=config.wait, progress=progress):
        remove_temporary(output)
        start = look_around()
        plan = plan_extraction(data, output, config, progress, keep=True, given=given)
        if plan.missing:
            plan = _equip(plan, config, progress)
        extraction = _carry_out(plan, config, progress, meter, memory)
        remember_extractor(plan, config, start)
        return extraction


def _find_finished(
    data: Path | str, output: Path, config: ExtractConfig, progress: Progress, meter: Meter, given: Backbone | None
) -> Extraction | None:
    """The cache in a place that cannot be written, if there is nothing to write."""
    plan = plan_extraction(data, output, config, progress, given=given)
    if plan.missing or config.rehash or not _is_up_to_date(plan, plan.listing, config):
        return None
    return _finish(plan, 0, (), meter)


def _carry_out(plan: Plan, config: ExtractConfig, progress: Progress, meter: Meter, memory: PeakMemory) -> Extraction:
    """Compute what is missing and put everything into the file."""
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
        if missing:  # damaged rows may be among them
            plan = _equip(plan, config, progress)
        computed = _compute_rows(plan, missing, config, progress)
        bad = [*plan.listing.bad, *computed.bad]
        if bad and not config.skip_bad:
            say_kept(plan, computed.parts, progress)
            raise BadImagesError(bad)
        listing = plan.listing.without(bad)
        kept = listing.digests()
        n_computed = sum(row.image in kept for row in missing)
        if n_computed or damaged or not _is_up_to_date(plan, listing, config):
            table = _make_table(plan, sources, [*plan.parts, *computed.parts])
            provenance = _describe_origin(plan, listing, config, memory, meter, computed)
            write_cache(plan.output, _gather(plan, listing, table, provenance))
    if left := remove_parts(plan.output, plan.key):
        progress.say(f"{len(left)} files stay in {parts_path(plan.output)}: of another extractor, or not featcache's")
    if plan.old and plan.sources and (gone := len(plan.old.listing.digests() - listing.digests())):
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

    return compute_rows(plan, rows, config, progress)


def find_missing(listing: Listing, views: Views, table: RowTable) -> list[Row]:
    """The rows that are not there, each once, in the order of the listing; those of an image side by side."""
    missing: dict[str, Row] = {}
    for name, split in listing.splits.items():
        found = find_rows(table, split.digests, views, views.count(name)) >= 0
        for i, column in np.argwhere(~found).tolist():
            image, number = split.digests[i], column - 1 if column else None
            digest = views.name_row(image, number)
            missing.setdefault(digest, Row(digest, image, number))
    return list(missing.values())


def find_rows(table: RowTable, digests: Sequence[str], views: Views, n: int) -> NDArray[np.int64]:
    """Where the rows of N images and of n views of each are (N, 1 + n), -1 where there is none."""
    found = np.empty((len(digests), 1 + n), np.int64)
    for start in range(0, len(digests), NAMED_IMAGES):
        names = views.name_rows(digests[start : start + NAMED_IMAGES], n)
        found[start : start + len(names)] = table.find(names.reshape(-1)).reshape(names.shape)
    return found


def _make_table(plan: Plan, sources: Sequence[Source], parts: Sequence[Part]) -> RowTable:
    return RowTable([*sources, *map(PartSource, parts)], plan.width, STORED_TYPES[stored_precision(plan.extractor)])


def _gather(plan: Plan, listing: Listing, table: RowTable, provenance: dict[str, Any]) -> FeatureCache:
    """The cache to be written: every image of the listing with its row of the table."""
    splits = {}
    for name, split in listing.splits.items():
        n = plan.views.count(name)
        positions = find_rows(table, split.digests, plan.views, n)
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
        "data": str(listing.root.resolve()),
        "settings": plan.list_settings(config),
        **add_up([*costs, meter.read()] if computed.runtime else costs).to_json(),
        "peak_memory_bytes": memory.read(),
        "device": str(plan.device),
        "runtime": computed.runtime,
        "environment": describe_environment(),
        "bad": [list(item) for item in listing.bad],
    }
    if earlier and not computed.runtime:  # how it was once computed is what counts
        provenance |= {name: earlier[0][name] for name in COMPUTED_WITH}
    return provenance


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
        and origin["data"] == str(listing.root.resolve())
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


def _say_plan(plan: Plan, config: ExtractConfig, progress: Progress) -> None:
    verb = {
        "create": "new cache",
        "reuse": "cache of the same extractor",
        "extend": "cache of the same extractor",
        "replace": "old cache replaced",
    }[plan.decision]
    kept = sum(map(len, plan.parts))
    going_on = f", {kept} rows of an earlier try" if kept else ""
    where = ""
    if plan.missing:
        from featcache.stages.compute import foresee_runtime

        where = f", {plan.device} ({foresee_runtime(plan, config)})"
    extractor, views = plan.extractor, ""
    if plan.views:
        views = f"; views: {plan.views.describe()}, seed {plan.views.seed}"
    progress.say(
        f"{extractor['backbone']}, weights {extractor['weights']['name']}, {plan.width} features{where}{views}; "
        f"{verb}{going_on}, {len(plan.missing)} images {'and views ' if plan.views else ''}to compute"
    )
    old = plan.old.views if plan.old else NO_VIEWS
    if old and not (plan.views and old.is_like(plan.views)):
        progress.say(f"the views that {plan.output} has ({old.describe()}, seed {old.seed}) are dropped")
