"""Stage 1: a frozen backbone turns every image into features once; they are kept in one HDF5 file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featcache import files
from featcache.backbones import Backbone, load_backbone
from featcache.cache import (
    STORED_TYPES,
    FeatureCache,
    FeatureSplit,
    GatheredRows,
    Part,
    PartSource,
    PartWriter,
    RowTable,
    Source,
    can_serve,
    check_complete,
    check_parts,
    estimate_bytes,
    hash_extractor,
    hold_output,
    is_feature_cache,
    keep_files,
    key_parts,
    list_differences,
    list_parts,
    make_known_files,
    open_cache,
    open_sources,
    parts_path,
    read_known_files,
    remove_parts,
    remove_temporary,
    stored_precision,
    verify_cache,
    write_cache,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import (
    STATS,
    Digests,
    KnownFiles,
    Listing,
    Split,
    Stats,
    check_root,
    list_changed,
    list_dataset,
    summarise,
)
from featcache.errors import BadImage, BadImagesError, CacheError, OutputError, StaleCacheError
from featcache.images import ImageRows, make_evaluation_transform
from featcache.progress import SILENT, Progress
from featcache.runs import PeakMemory, describe_environment
from featcache.runtime import Outputs, choose_runtime, run_network, select_device

COMPUTED_WITH = ("peak_memory_bytes", "device", "runtime", "environment")
PROBE_FEW, PROBE_IMAGES = 8, 48


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
        Images that went through the network.
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

    @property
    def reused(self) -> int:
        """Rows that needed no forward pass."""
        return len(self.cache) - self.computed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an extraction would do, before it does anything.

    Attributes
    ----------
    output
        The cache file.
    decision
        "create" (nothing is there), "reuse" (all rows are there), "extend" (some are), "replace" (what is there is of
        another extractor, and `force` is set) or "refuse" (and it is not).
    listing
        The data set.
    backbone, device, extractor
        What would compute, where, and its description.
    old
        The cache that lies there.
    sources
        Caches whose rows can be taken.
    parts
        Finished work of an earlier extraction that can be taken.
    missing
        Digests of the images whose rows are nowhere, each once.
    """

    output: Path
    decision: str
    listing: Listing
    backbone: Backbone
    device: torch.device
    extractor: dict[str, Any]
    old: FeatureCache | None
    sources: tuple[Path, ...]
    parts: tuple[Part, ...]
    missing: tuple[str, ...]

    @property
    def key(self) -> str:
        """The wanted extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def differences(self) -> list[str]:
        """What differs between the extractor of the cache that lies there and the wanted one, "name: old -> new"."""
        return list_differences(key_parts(self.old.extractor), key_parts(self.extractor)) if self.old else []


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
        Fields of `featcache.config.ExtractConfig`.

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
    started, memory = time.perf_counter(), PeakMemory()
    config, output = ExtractConfig(**settings), _follow_link(Path(output))
    try:
        files.check_writable(output)
    except OutputError:
        if output.is_file() and (finished := _find_finished(data, output, config, progress, started)):
            return finished
        raise
    check_parts(output)
    with hold_output(output, wait=config.wait, progress=progress):
        remove_temporary(output)
        plan = plan_extraction(data, output, config, progress, keep=True)
        return _carry_out(plan, config, progress, started, memory)


def _follow_link(output: Path) -> Path:
    """The file itself, so that a link stays a link and both names are one place."""
    return output.resolve() if output.is_symlink() else output


def _find_finished(
    data: Path | str, output: Path, config: ExtractConfig, progress: Progress, started: float
) -> Extraction | None:
    """The cache in a place that cannot be written, if there is nothing to write."""
    plan = plan_extraction(data, output, config, progress)
    if plan.missing or config.rehash or not _is_up_to_date(plan, plan.listing, config):
        return None
    return _finish(plan, 0, (), started)


def plan_extraction(
    data: Path | str,
    output: Path,
    config: ExtractConfig,
    progress: Progress = SILENT,
    *,
    keep: bool = False,
    explain: bool = False,
) -> Plan:
    """See what there is and what is missing.

    Parameters
    ----------
    data, output, config
        As in `extract_features`.
    progress
        Told of the data set.
    keep
        Keep what is found out about the images' files, in parts beside the output.
    explain
        Take an output of another extractor as a decision, not as an error.

    Raises
    ------
    FeatcacheError
        As `extract_features`.
    """
    check_root(Path(data))
    old = _open_old(output, config.force)
    device = select_device(config.device)
    backbone = load_backbone(config.backbone, weights=config.weights, seed=config.seed)
    extractor = backbone.describe(config.store)
    if old and not explain and not config.force:
        check_same_extractor(old, output, extractor)
    others = {Path(path): open_cache(path) for path in config.reuse}
    for path, cache in others.items():
        check_complete(cache, path)
        if not can_serve(cache.extractor, extractor):
            raise StaleCacheError(f"{path} cannot be reused: {_describe_other(cache.extractor, extractor)}")
    listing = _list_images(data, output, old, config, progress, keep)
    same = old is not None and old.key == hash_extractor(extractor)
    usable = same or (old is not None and config.force and can_serve(old.extractor, extractor))
    sources = {**({output: old} if old and usable else {}), **others}
    parts, unreadable = list_parts(output, "rows", hash_extractor(extractor))
    for path in unreadable:
        progress.say(f"WARNING: {path} is damaged; its rows are computed again")
    missing = _find_wanted(listing, sources, parts, distrust=config.rehash)
    return Plan(
        output=output,
        decision=_decide(old, same, config.force, bool(missing)) if old or not output.exists() else "replace",
        listing=listing,
        backbone=backbone,
        device=device,
        extractor=extractor,
        old=old,
        sources=tuple(sources),
        parts=tuple(parts),
        missing=missing,
    )


def _open_old(output: Path, force: bool) -> FeatureCache | None:
    """The cache that lies at the output; none if it is one that is of no use any more and may be replaced."""
    if not os.path.lexists(output):
        return None
    try:
        old = open_cache(output)
        check_complete(old, output)
    except CacheError:
        if force and is_feature_cache(output):
            return None
        raise
    return old


def check_same_extractor(old: FeatureCache, output: Path, extractor: dict[str, Any]) -> None:
    """Raise a StaleCacheError if a cache was made by another extractor."""
    if old.key != hash_extractor(extractor):
        raise StaleCacheError(
            f"{output} was made by another extractor ({_describe_other(old.extractor, extractor)}); write elsewhere "
            f"with -o OTHER.h5, or replace it with --force"
        )


def _list_images(
    data: Path | str, output: Path, old: FeatureCache | None, config: ExtractConfig, progress: Progress, keep: bool
) -> Listing:
    """The data set, files read only where nothing is known of them."""

    def keep_stats(stats: Stats, digests: Digests) -> None:
        keep_files(parts_path(output), stats, digests)

    listing = list_dataset(
        data,
        val_fraction=config.val_fraction,
        seed=config.seed,
        progress=progress,
        known=None if config.rehash else _find_known_files(output, old),
        keep=keep_stats if keep else None,
    )
    for line in summarise(listing):
        progress.say(line)
    return listing


def _find_wanted(
    listing: Listing, sources: dict[Path, FeatureCache], parts: Sequence[Part], *, distrust: bool
) -> tuple[str, ...]:
    """Digests of the images whose rows are nowhere, each once."""
    there = {digest for part in parts for digest in np.char.decode(part.columns["digests"], "ascii").tolist()}
    for path, cache in sources.items():
        digests = {name: list(split.listing.digests) for name, split in cache.splits.items()}
        for name, start, stop in verify_cache(path).damaged if distrust else ():
            digests[name][start:stop] = [""] * (stop - start)
        there.update(*digests.values())
    wanted = dict.fromkeys(digest for split in listing.splits.values() for digest in split.digests)
    return tuple(digest for digest in wanted if digest not in there)


def forecast_extraction(
    data: Path | str, output: Path | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> tuple[Plan, Forecast]:
    """Say what `extract_features` would do, how long it would take and how large the file would be. Writes nothing.

    Parameters, errors as of `extract_features`.
    """
    config = ExtractConfig(**settings)
    plan = plan_extraction(data, _follow_link(Path(output)), config, progress)
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
        name: FeatureSplit(listing=split, features=np.empty((0, plan.backbone.width)))
        for name, split in plan.listing.splits.items()
    }
    cache = FeatureCache(classes=plan.listing.classes, extractor=plan.extractor, splits=empty, provenance={})
    return Forecast(images_per_second=rate, seconds=seconds, bytes=estimate_bytes(cache))


def _time_run(plan: Plan, digests: Sequence[str], config: ExtractConfig) -> float:
    started = time.perf_counter()
    for _ in run_backbone(plan, digests, config):
        pass
    return time.perf_counter() - started


def _find_known_files(output: Path, old: FeatureCache | None) -> KnownFiles:
    known = [read_known_files(output)]
    splits = old.listing.splits.values() if old else ()
    known += [(split.stats, np.array(split.digests, dtype="S64")) for split in splits]
    return make_known_files(*known)


def _decide(old: FeatureCache | None, same: bool, force: bool, missing: bool) -> str:
    if old is None:
        return "create"
    if not same:
        return "replace" if force else "refuse"
    return "extend" if missing else "reuse"


def _carry_out(plan: Plan, config: ExtractConfig, progress: Progress, started: float, memory: PeakMemory) -> Extraction:
    """Compute what is missing and put everything into the file."""
    _say_plan(plan, choose_runtime(config.runtime, plan.device), progress)
    if not plan.missing and not config.rehash and _is_up_to_date(plan, plan.listing, config):
        remove_parts(plan.output, plan.key)
        return _finish(plan, 0, (), started)
    with open_sources(plan.sources, STORED_TYPES[config.store]) as (sources, damaged):
        for path, split, start, stop in damaged:
            progress.say(
                f"WARNING: {path} is damaged, {split} rows {start} to {stop - 1}: what is needed is recomputed"
            )
        missing = find_missing(plan.listing, _make_table(plan, sources, plan.parts))
        computed = compute_rows(plan, missing, config, progress)
        bad = [*plan.listing.bad, *computed.bad]
        if bad and not config.skip_bad:
            _say_kept(plan, computed.parts, progress)
            raise BadImagesError(bad)
        listing = plan.listing.without(bad)
        if computed.rows or damaged or not _is_up_to_date(plan, listing, config):
            table = _make_table(plan, sources, [*plan.parts, *computed.parts])
            provenance = _describe_origin(plan, listing, config, memory, time.perf_counter() - started, bool(missing))
            write_cache(plan.output, _gather(plan, listing, table, provenance))
    if left := remove_parts(plan.output, plan.key):
        progress.say(f"{len(left)} parts of another extractor stay in {parts_path(plan.output)}")
    if plan.old and plan.sources and (gone := len(plan.old.listing.digests() - listing.digests())):
        progress.say(f"{gone} rows left {plan.output}: their images are not among those of {listing.root}")
    if missing and (changed := list_changed(listing)):
        progress.say(f"WARNING: {len(changed)} images changed meanwhile, such as {changed[0]}; run the same again")
    return _finish(plan, computed.rows, tuple(bad), started)


def find_missing(listing: Listing, table: RowTable) -> list[str]:
    """Digests of the images that have no row, each once, in the order of the listing."""
    wanted = list(dict.fromkeys(digest for split in listing.splits.values() for digest in split.digests))
    there = table.find(np.array(wanted, dtype="S64")) >= 0
    return [digest for digest, found in zip(wanted, there.tolist(), strict=True) if not found]


class Computed(NamedTuple):
    """What came of computing: files that could not be used (with their copies), parts written, rows in them."""

    bad: list[BadImage]
    parts: list[Part]
    rows: int


def compute_rows(plan: Plan, digests: Sequence[str], config: ExtractConfig, progress: Progress) -> Computed:
    """Compute the features of the images with these digests and keep them in parts.

    Whatever ends it, the rows that were computed are kept.
    """
    if not digests:
        return Computed([], [], 0)
    paths_by_digest: dict[str, list[str]] = {digest: [] for digest in digests}
    for split in plan.listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            if digest in paths_by_digest:
                paths_by_digest[digest].append(path)
    digest_of = {paths[0]: digest for digest, paths in paths_by_digest.items()}
    bad: list[BadImage] = []
    writer = PartWriter(parts_path(plan.output), plan.key, config.store)
    try:
        for output in progress.track(run_backbone(plan, digests, config), total=len(digests), what="extracting"):
            finite, failed = _find_unusable(output, [paths_by_digest[digests[row]][0] for row in output.rows], config)
            writer.add([digests[row] for row in output.rows[finite].tolist()], output.values[finite])
            bad += [BadImage(copy, reason) for path, reason in failed for copy in paths_by_digest[digest_of[path]]]
    except KeyboardInterrupt:
        writer.flush()
        _say_kept(plan, writer.parts, progress)
        raise
    finally:
        writer.flush()
    return Computed(bad, writer.parts, sum(map(len, writer.parts)))


def _find_unusable(
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


def run_backbone(plan: Plan, digests: Sequence[str], config: ExtractConfig) -> Iterator[Outputs]:
    """What the plan's backbone makes of the images with these digests, in their order."""
    path_of: dict[str, str] = {}
    for split in plan.listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            path_of.setdefault(digest, path)
    source = ImageRows(
        plan.listing.root,
        [path_of[digest] for digest in digests],
        transform=make_evaluation_transform(plan.backbone.preprocessing),
        digests=digests,
    )
    return run_network(
        plan.backbone.network,
        source,
        device=plan.device,
        runtime=config.runtime,
        batch_size=config.batch_size,
        workers=config.workers,
    )


def _make_table(plan: Plan, sources: Sequence[Source], parts: Sequence[Part]) -> RowTable:
    return RowTable(
        [*sources, *map(PartSource, parts)], plan.backbone.width, STORED_TYPES[stored_precision(plan.extractor)]
    )


def _gather(plan: Plan, listing: Listing, table: RowTable, provenance: dict[str, Any]) -> FeatureCache:
    """The cache to be written: every image of the listing with its row of the table."""
    splits = {}
    for name, split in listing.splits.items():
        positions = table.find(np.array(split.digests, dtype="S64"))
        if (positions < 0).any():
            raise CacheError(f"parts vanished from {parts_path(plan.output)} meanwhile; run the same command again")
        splits[name] = FeatureSplit(listing=split, features=GatheredRows(table, positions, plan.backbone.width))
    return FeatureCache(classes=listing.classes, extractor=plan.extractor, splits=splits, provenance=provenance)


def _describe_origin(
    plan: Plan, listing: Listing, config: ExtractConfig, memory: PeakMemory, seconds: float, computing: bool
) -> dict[str, Any]:
    """The provenance of the new file: what all of its rows cost, whenever they were computed."""
    earlier = [open_cache(path).provenance for path in plan.sources]
    provenance = {
        "data": str(listing.root.resolve()),
        "settings": config.result_settings(),
        "seconds": sum(part.seconds for part in plan.parts)
        + sum(float(origin["seconds"]) for origin in earlier)
        + (seconds if computing else 0.0),
        "peak_memory_bytes": memory.read(),
        "device": str(plan.device),
        "runtime": choose_runtime(config.runtime, plan.device),
        "environment": describe_environment(),
        "bad": [list(item) for item in listing.bad],
    }
    if earlier and not computing:  # how it was once computed is what counts
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
        and origin["settings"] == config.result_settings()
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


def _finish(plan: Plan, computed: int, bad: tuple[BadImage, ...], started: float) -> Extraction:
    return Extraction(
        path=plan.output,
        cache=open_cache(plan.output),
        computed=computed,
        bad=bad,
        seconds=time.perf_counter() - started,
    )


def _describe_other(old: dict[str, Any], new: dict[str, Any]) -> str:
    return "; ".join(list_differences(key_parts(old), key_parts(new))) or "another version of featcache"


def _say_kept(plan: Plan, parts: Sequence[Part], progress: Progress) -> None:
    if rows := sum(map(len, (*plan.parts, *parts))):
        progress.say(f"{rows} rows kept in {parts_path(plan.output)}; the same command goes on from there")


def _say_plan(plan: Plan, runtime: str, progress: Progress) -> None:
    verb = {
        "create": "new cache",
        "reuse": "cache of the same extractor",
        "extend": "cache of the same extractor",
        "replace": "old cache replaced",
    }[plan.decision]
    kept = sum(map(len, plan.parts))
    going_on = f", {kept} rows of an earlier try" if kept else ""
    progress.say(
        f"{plan.backbone.name}, weights {plan.backbone.weights['name']}, {plan.backbone.width} features, {plan.device} "
        f"({runtime}); {verb}{going_on}, {len(plan.missing)} images to compute"
    )
