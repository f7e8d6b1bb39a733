"""What an extraction would do, before it does anything: what there is, what may be used of it, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.cache import (
    DigestTable,
    FeatureCache,
    Part,
    can_serve,
    check_complete,
    describe_differences,
    hash_extractor,
    keep_files,
    list_members,
    list_parts,
    make_known_files,
    name_network,
    open_cache,
    open_old,
    parts_path,
    read_known_files,
    verify_cache,
)
from featcache.clips import check_video_support
from featcache.config import EXECUTION, VIEWS, ExtractConfig, is_imported
from featcache.dataset import (
    Digests,
    KnownFiles,
    Listing,
    Stats,
    check_root,
    list_dataset,
    summarise,
)
from featcache.errors import BadImage, SettingsError, StaleCacheError
from featcache.progress import SILENT, Progress
from featcache.recall import Start, is_known, keep_known
from featcache.storage import Place
from featcache.views import NO_VIEWS, Views

if TYPE_CHECKING:
    import torch

    from featcache.backbones import Backbone

NAMED_IMAGES = 1 << 16  # whose views' digests are held at a time
# Settings that have no say in which features are wanted.
WITHOUT_SAY = (
    *VIEWS,
    "batch_size",
    "workers",
    "val_fraction",
    "skip_bad",
    "reuse",
    "rehash",
    "wait",
    "force",
    "engine",
    "address",
)


class Row(NamedTuple):
    """Features that are wanted.

    Attributes
    ----------
    digest
        By which they are found, see `Views.name_row`.
    image
        Digest of the image.
    view
        Number of the view; None for the plain image.
    """

    digest: str
    image: str
    view: int | None


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
    extractor
        Description of what would compute.
    backbone, device
        The network and where it would run; None where the description is known from an earlier run, until they are
        needed (see `equip`).
    old
        The cache that lies there.
    sources
        Caches whose rows can be taken.
    parts
        Finished work of an earlier extraction that can be taken.
    views
        The random views that are wanted.
    missing
        The rows that are nowhere, each once.
    n_new
        Rows that no cache has: the missing ones, and those that an earlier try has made. They decide the runtime.
    """

    output: Place
    decision: str
    listing: Listing
    extractor: dict[str, Any]
    backbone: Backbone | None
    device: torch.device | None
    old: FeatureCache | None
    sources: tuple[Place, ...]
    parts: tuple[Part, ...]
    views: Views
    missing: tuple[Row, ...]
    n_new: int

    @property
    def key(self) -> str:
        """The wanted extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def width(self) -> int:
        """D, features per image."""
        return int(self.extractor["dim"])

    @property
    def n_rows(self) -> int:
        """Rows that are wanted: of images, and of views of them."""
        return sum(len(split) * (1 + self.views.count(name)) for name, split in self.listing.splits.items())

    def list_settings(self, config: ExtractConfig) -> dict[str, Any]:
        """The settings for the provenance: of views those that are meant, where they would make the same ones."""
        settings = {name: value for name, value in config.result_settings().items() if name not in VIEWS}
        counts = zip(VIEWS, (self.views.train, self.views.others), strict=True)
        return settings | {name: n for name, n in counts if n and self.views.seed == config.seed}


class Computed(NamedTuple):
    """What came of computing: files that could not be used (with their copies), parts written, how and where."""

    bad: list[BadImage]
    parts: list[Part]
    runtime: str = ""
    device: str = ""


def plan_extraction(
    data: Path | str,
    output: Place,
    config: ExtractConfig,
    progress: Progress = SILENT,
    *,
    keep: bool = False,
    explain: bool = False,
    given: Backbone | None = None,
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
    given
        The backbone, where it is not to be made from its name.

    Raises
    ------
    FeatcacheError
        As `extract_features`.
    """
    check_root(data)
    settled = settle_extractor(output, config, progress, explain=explain, given=given)
    sources = open_sources_of(settled, output, config)
    listing = list_images(data, output, settled, config, progress, keep=keep)
    if settled.backbone and settled.backbone.precision == {"compute": "int8"}:
        from featcache.stages.provide_backbone import calibrate

        backbone = calibrate(settled.backbone, listing, config, progress)
        settled = replace(settled, backbone=backbone, extractor=backbone.describe(config.store))
        sources = open_sources_of(settled, output, config)
    return make_plan(listing, settled, sources, output, config, progress)


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What would compute, before anybody knows of what.

    Attributes
    ----------
    old
        The cache that lies at the output.
    extractor
        Description of what would compute.
    backbone, device
        The network and where it would run; None where the description is known from an earlier run.
    """

    old: FeatureCache | None
    extractor: dict[str, Any]
    backbone: Backbone | None = None
    device: torch.device | None = None

    @property
    def key(self) -> str:
        """The extractor's key."""
        return hash_extractor(self.extractor)

    @property
    def same(self) -> bool:
        """Whether the cache that lies there is this very extractor's."""
        return self.old is not None and self.old.key == self.key

    @property
    def clips(self) -> bool:
        """Whether it takes clips."""
        return bool(self.extractor["preprocessing"].get("frames", 0))


def settle_extractor(
    output: Place,
    config: ExtractConfig,
    progress: Progress,
    *,
    explain: bool = False,
    given: Backbone | None = None,
    like: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Settled:
    """See what lies at the output, and what would compute.

    Parameters
    ----------
    output, config, progress, explain, given
        As in `plan_extraction`.
    like
        An extractor whose decoder and precision count where none are stated, if no cache lies there.
    device
        Where it would run, if that is on other machines.

    Raises
    ------
    FeatcacheError
        As `extract_features`.
    """
    old = open_old(output, force=config.force)
    asking = old is not None and not explain and not config.force
    if old and asking:
        _check_name(old, output, config)
    usual = old and given is None and not config.force and not config.rehash
    if old and usual and is_known(_make_request(config, old.extractor)):
        settled = Settled(old=old, extractor=dict(old.extractor))
    else:
        from featcache.stages.provide_backbone import find_example, provide_settled

        backbone, there = provide_settled(config, given, find_example(old, config) or like, progress, device)
        extractor = backbone.describe(config.store)
        settled = Settled(old=old, extractor=extractor, backbone=backbone, device=there)
    if old and asking:
        check_same_extractor(old, output, settled.extractor)
    return settled


def open_sources_of(settled: Settled, output: Place, config: ExtractConfig) -> dict[Place, FeatureCache]:
    """The caches whose rows may be taken: the one at the output, and those to reuse.

    Raises
    ------
    StaleCacheError
        If one to reuse was made by another extractor.
    """
    others = {path: open_cache(path) for named in config.reuse for path in list_members(named)}
    for path, cache in others.items():
        check_complete(cache, path)
        if not can_serve(cache.extractor, settled.extractor):
            raise StaleCacheError(
                f"{path} cannot be reused: {describe_differences(cache.extractor, settled.extractor)}"
            )
    old = settled.old
    if old and (settled.same or (config.force and can_serve(old.extractor, settled.extractor))):
        return {output: old, **others}
    return others


def make_plan(
    listing: Listing,
    settled: Settled,
    sources: dict[Place, FeatureCache],
    output: Place,
    config: ExtractConfig,
    progress: Progress,
) -> Plan:
    """The plan for a listing: what of it is there, in caches or in parts, and what is missing."""
    parts, unreadable = list_parts(output, "rows", settled.key)
    for path in unreadable:
        progress.say(f"WARNING: {path} is damaged; its rows are computed again")
    views = settle_views(config, settled.old)
    there = list_digests(sources, views, distrust=config.rehash)
    missing = find_missing(listing, views, DigestTable([*there, *(part.digests for part in parts)]))
    # Copies are counted, and what an earlier try has made: several processes count so, and choose the same runtime.
    n_new = count_missing(listing, views, DigestTable(there)) if missing else 0
    return Plan(
        output=output,
        decision=_decide(settled, output, config.force, bool(missing)),
        listing=listing,
        extractor=settled.extractor,
        backbone=settled.backbone,
        device=settled.device,
        old=settled.old,
        sources=tuple(sources),
        parts=tuple(parts),
        views=views,
        missing=tuple(missing),
        n_new=n_new,
    )


def find_missing(listing: Listing, views: Views, table: DigestTable) -> list[Row]:
    """The rows that are not there, each once, in the order of the listing; those of an image side by side."""
    missing: dict[str, Row] = {}
    for name, split in listing.splits.items():
        for start, found in iterate_found(table, split.digests, views, views.count(name)):
            for i, column in np.argwhere(found < 0).tolist():
                image, number = split.digests[start + i], column - 1 if column else None
                digest = views.name_row(image, number)
                missing.setdefault(digest, Row(digest, image, number))
    return list(missing.values())


def count_missing(listing: Listing, views: Views, table: DigestTable) -> int:
    """How many rows are not there; those of images that are in the listing twice count twice."""
    return sum(
        int((found < 0).sum())
        for name, split in listing.splits.items()
        for _, found in iterate_found(table, split.digests, views, views.count(name))
    )


def iterate_found(
    table: DigestTable, digests: Sequence[str], views: Views, n: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Where the rows of some images and of n views of each are, (m, 1 + n), -1 where there is none, from which on."""
    for start in range(0, len(digests), NAMED_IMAGES):
        names = views.name_rows(digests[start : start + NAMED_IMAGES], n)
        yield start, table.find(names.reshape(-1)).reshape(names.shape)


def settle_views(config: ExtractConfig, old: FeatureCache | None) -> Views:
    """The views that are wanted: those that are stated, else the very ones of the cache that is there."""
    there = old.views if old else NO_VIEWS
    stated = config.views is not None or config.test_views is not None
    return Views(
        train=there.train if config.views is None else config.views,
        others=there.others if config.test_views is None else config.test_views,
        seed=config.seed if stated else there.seed,
    )


def _check_name(old: FeatureCache, output: Place, config: ExtractConfig) -> None:
    """Raise a StaleCacheError if a cache is of another network by its name: before anything is downloaded for it."""
    made_with = old.extractor["backbone"]
    if is_imported(made_with):
        raise StaleCacheError(
            f"{output} was made by another extractor: its features are imported, from {old.provenance['table']}; write "
            f"elsewhere with -o OTHER.h5, or replace it with --force"
        )
    if name_network(made_with) != name_network(config.backbone):
        from featcache.backbones import check_known

        check_known(config.backbone)
        raise StaleCacheError(
            f"{output} was made by another extractor (backbone: {made_with} -> {config.backbone}); go on with "
            f"--backbone {made_with}, write elsewhere with -o OTHER.h5, or replace it with --force"
        )


def _make_request(config: ExtractConfig, extractor: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that want an extractor, and that of a cache; they are remembered if that is the one they want."""
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_SAY}
    return {**settings, "extractor": dict(extractor)}


def remember_extractor(plan: Plan, config: ExtractConfig, start: Start) -> None:
    """Keep in mind that these settings stand for the extractor of the cache that is there now."""
    if plan.backbone and plan.backbone.files is not None:
        keep_known(_make_request(config, plan.extractor), plan.backbone.files, start)


def take_backbone(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Backbone | None]:
    """Settings whose `backbone` is a name, and the backbone itself if that was given in place of one.

    Raises
    ------
    SettingsError
        If settings are stated that belong to the making of the backbone.
    """
    given = settings.get("backbone")
    if given is None or isinstance(given, str):
        return dict(settings), None
    from featcache.backbones import Backbone, check_unchanged

    if not isinstance(given, Backbone):
        return dict(settings), None
    check_unchanged(given)
    making = [
        name for name in ("weights", *ExtractConfig.OPTIONAL) if name in settings and name not in (*EXECUTION, *VIEWS)
    ]
    if making:
        raise SettingsError(
            f"{making[0]} is stated and so is a backbone that is made already; state it in wrap_network"
        )
    return {**settings, "backbone": given.name, "weights": "given"}, given


def check_same_extractor(old: FeatureCache, output: Place, extractor: dict[str, Any]) -> None:
    """Raise a StaleCacheError if a cache was made by another extractor."""
    if old.key != hash_extractor(extractor):
        rounded = f", with --reuse {output} without computing," if can_serve(old.extractor, extractor) else ""
        raise StaleCacheError(
            f"{output} was made by another extractor ({describe_differences(old.extractor, extractor)}); "
            f"write elsewhere with -o OTHER.h5{rounded} or replace it with --force"
        )


def list_images(
    data: Path | str, output: Place, settled: Settled, config: ExtractConfig, progress: Progress, *, keep: bool
) -> Listing:
    """The data set, files read only where nothing is known of them; with `keep`, what is found out is kept in parts."""

    def keep_stats(stats: Stats, digests: Digests) -> None:
        keep_files(parts_path(output), stats, digests)

    listing = list_dataset(
        data,
        val_fraction=config.val_fraction,
        seed=config.seed,
        progress=progress,
        known=None if config.rehash else find_known_files(output, settled.old),
        keep=keep_stats if keep else None,
        clips=settled.clips,
    )
    if settled.clips:
        check_video_support(str(listing.root / path) for path in listing.paths())
    for line in summarise(listing):
        progress.say(line)
    return listing


def find_known_files(output: Place, old: FeatureCache | None) -> KnownFiles:
    """What is known of files from the parts beside the output and from the cache that lies there."""
    known = [read_known_files(output)]
    splits = old.listing.splits.values() if old else ()
    known += [(split.stats, np.array(split.digests, dtype="S64")) for split in splits]
    return make_known_files(*known)


def list_digests(sources: Mapping[Place, FeatureCache], views: Views, *, distrust: bool) -> list[Digests]:
    """By what digests the rows of caches are found: of images, and of the wanted views of each.

    With `distrust` every byte is read, and rows in damaged blocks have none.
    """
    found = []
    for path, cache in sources.items():
        check = verify_cache(path) if distrust else None
        alike = cache.views.is_like(views)
        for name, split in cache.splits.items():
            names = cache.views.name_rows(split.listing.digests, cache.views.count(name) if alike else 0)
            for where, start, stop in check.damaged if check is not None else ():
                names[start:stop, 0] = b"" if where == name else names[start:stop, 0]
            for where, start, stop in check.damaged_views if check is not None else ():
                names[start:stop, 1:] = b"" if where == name else names[start:stop, 1:]
            found.append(names.reshape(-1))
    return found


def _decide(settled: Settled, output: Place, force: bool, missing: bool) -> str:
    if settled.old is None:
        return "replace" if output.exists() else "create"
    if not settled.same:
        return "replace" if force else "refuse"
    return "extend" if missing else "reuse"


def say_kept(plan: Plan, parts: Sequence[Part], progress: Progress) -> None:
    """Tell of finished rows that are kept, some of them in new parts."""
    if rows := sum(map(len, (*plan.parts, *parts))):
        progress.say(f"{rows} finished rows kept in {parts_path(plan.output)}; the next try goes on from there")
