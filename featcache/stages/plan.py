"""What an extraction would do, before it does anything: what there is, what may be used of it, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    Part,
    can_serve,
    check_complete,
    describe_differences,
    hash_extractor,
    keep_files,
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
from featcache.views import NO_VIEWS, Views

if TYPE_CHECKING:
    import torch

    from featcache.backbones import Backbone

# Settings that have no say in which features are wanted.
WITHOUT_SAY = (*VIEWS, "batch_size", "workers", "val_fraction", "skip_bad", "reuse", "rehash", "wait", "force")


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
    """

    output: Path
    decision: str
    listing: Listing
    extractor: dict[str, Any]
    backbone: Backbone | None
    device: torch.device | None
    old: FeatureCache | None
    sources: tuple[Path, ...]
    parts: tuple[Part, ...]
    views: Views
    missing: tuple[Row, ...]

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
    """What came of computing: files that could not be used (with their copies), parts written, how."""

    bad: list[BadImage]
    parts: list[Part]
    runtime: str = ""


def plan_extraction(
    data: Path | str,
    output: Path,
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
    check_root(Path(data))
    old = open_old(output, force=config.force)
    if old and not explain and not config.force:
        _check_name(old, output, config)
    backbone, device = None, None
    if (
        old
        and given is None
        and not config.force
        and not config.rehash
        and is_known(_make_request(config, old.extractor))
    ):
        extractor = dict(old.extractor)
    else:
        from featcache.stages.provide_backbone import provide_settled

        backbone, device = provide_settled(config, given, old, progress)
        extractor = backbone.describe(config.store)
    if old and not explain and not config.force:
        check_same_extractor(old, output, extractor)
    others = {Path(path): open_cache(path) for path in config.reuse}
    for path, cache in others.items():
        check_complete(cache, path)
        if not can_serve(cache.extractor, extractor):
            raise StaleCacheError(f"{path} cannot be reused: {describe_differences(cache.extractor, extractor)}")
    clips = bool(extractor["preprocessing"].get("frames", 0))
    listing = _list_images(data, output, old, config, progress, keep, clips)
    if backbone and backbone.precision == {"compute": "int8"}:
        from featcache.stages.provide_backbone import calibrate

        backbone = calibrate(backbone, listing, config, progress)
        extractor = backbone.describe(config.store)
    same = old is not None and old.key == hash_extractor(extractor)
    usable = same or (old is not None and config.force and can_serve(old.extractor, extractor))
    sources = {**({output: old} if old and usable else {}), **others}
    parts, unreadable = list_parts(output, "rows", hash_extractor(extractor))
    for path in unreadable:
        progress.say(f"WARNING: {path} is damaged; its rows are computed again")
    views = settle_views(config, old)
    missing = _find_wanted(listing, views, sources, parts, distrust=config.rehash)
    return Plan(
        output=output,
        decision=_decide(old, same, config.force, bool(missing)) if old or not output.exists() else "replace",
        listing=listing,
        extractor=extractor,
        backbone=backbone,
        device=device,
        old=old,
        sources=tuple(sources),
        parts=tuple(parts),
        views=views,
        missing=missing,
    )


def settle_views(config: ExtractConfig, old: FeatureCache | None) -> Views:
    """The views that are wanted: those that are stated, else the very ones of the cache that is there."""
    there = old.views if old else NO_VIEWS
    stated = config.views is not None or config.test_views is not None
    return Views(
        train=there.train if config.views is None else config.views,
        others=there.others if config.test_views is None else config.test_views,
        seed=config.seed if stated else there.seed,
    )


def _check_name(old: FeatureCache, output: Path, config: ExtractConfig) -> None:
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


def check_same_extractor(old: FeatureCache, output: Path, extractor: dict[str, Any]) -> None:
    """Raise a StaleCacheError if a cache was made by another extractor."""
    if old.key != hash_extractor(extractor):
        rounded = f", with --reuse {output} without computing," if can_serve(old.extractor, extractor) else ""
        raise StaleCacheError(
            f"{output} was made by another extractor ({describe_differences(old.extractor, extractor)}); "
            f"write elsewhere with -o OTHER.h5{rounded} or replace it with --force"
        )


def _list_images(
    data: Path | str,
    output: Path,
    old: FeatureCache | None,
    config: ExtractConfig,
    progress: Progress,
    keep: bool,
    clips: bool,
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
        clips=clips,
    )
    if clips:
        check_video_support(str(listing.root / path) for path in listing.paths())
    for line in summarise(listing):
        progress.say(line)
    return listing


def _find_known_files(output: Path, old: FeatureCache | None) -> KnownFiles:
    known = [read_known_files(output)]
    splits = old.listing.splits.values() if old else ()
    known += [(split.stats, np.array(split.digests, dtype="S64")) for split in splits]
    return make_known_files(*known)


def _find_wanted(
    listing: Listing, views: Views, sources: dict[Path, FeatureCache], parts: Sequence[Part], *, distrust: bool
) -> tuple[Row, ...]:
    """The rows that are nowhere, each once; those of an image side by side."""
    there, n_views = _find_there(sources, views, distrust=distrust)
    there.update(*(np.char.decode(part.columns["digests"], "ascii").tolist() for part in parts))
    wanted: dict[str, Row] = {}
    for name, split in listing.splits.items():
        n = views.count(name)
        for image in split.digests:
            if image not in there:
                wanted.setdefault(image, Row(image, image, None))
            for number in range(n_views.get(image, 0), n) if n else ():
                digest = views.name_row(image, number)
                if digest not in there:
                    wanted.setdefault(digest, Row(digest, image, number))
    return tuple(wanted.values())


def _find_there(sources: dict[Path, FeatureCache], views: Views, *, distrust: bool) -> tuple[set[str], dict[str, int]]:
    """The images that caches have rows of, and how many of the wanted views of each."""
    there: set[str] = set()
    n_views: dict[str, int] = {}
    for path, cache in sources.items():
        found = verify_cache(path) if distrust else None
        alike = cache.views.is_like(views)
        for name, split in cache.splits.items():
            there.update(_list_sound(name, split, found.damaged if found else ()))
            n = cache.views.count(name) if alike else 0
            for image in _list_sound(name, split, found.damaged_views if found else ()) if n else ():
                n_views[image] = max(n, n_views.get(image, 0))
    return there, n_views


def _list_sound(name: str, split: FeatureSplit, damaged: Sequence[tuple[str, int, int]]) -> list[str]:
    """The digests of a split's rows, "" where they lie in a damaged block."""
    digests = list(split.listing.digests)
    for where, start, stop in damaged:
        if where == name:
            digests[start:stop] = [""] * (stop - start)
    return digests


def _decide(old: FeatureCache | None, same: bool, force: bool, missing: bool) -> str:
    if old is None:
        return "create"
    if not same:
        return "replace" if force else "refuse"
    return "extend" if missing else "reuse"


def say_kept(plan: Plan, parts: Sequence[Part], progress: Progress) -> None:
    """Tell of finished rows that are kept, some of them in new parts."""
    if rows := sum(map(len, (*plan.parts, *parts))):
        progress.say(f"{rows} finished rows kept in {parts_path(plan.output)}; the next try goes on from there")
