"""What an extraction would do, before it does anything: what there is, what may be used of it, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbones import Backbone, check_known, check_unchanged, load_backbone
from featcache.cache import (
    FeatureCache,
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
from featcache.config import EXECUTION, PRECISIONS, ExtractConfig, is_imported
from featcache.dataset import (
    Digests,
    KnownFiles,
    Listing,
    Stats,
    check_root,
    list_dataset,
    summarise,
)
from featcache.errors import SettingsError, StaleCacheError
from featcache.images import ImageRows, make_pixel_transform
from featcache.preprocessing import TORCH_INTERPOLATIONS, InputFormat, Preprocessing
from featcache.progress import SILENT, Progress
from featcache.runtime import choose_runtime, find_ranges, select_device

CALIBRATION_IMAGES = 32


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
    if old and not explain and not config.force and is_imported(old.extractor["backbone"]):
        raise StaleCacheError(
            f"{output} was made by another extractor: its features are imported, from {old.provenance['table']}; write "
            f"elsewhere with -o OTHER.h5, or replace it with --force"
        )
    if (
        old
        and not explain
        and not config.force
        and name_network(old.extractor["backbone"]) != name_network(config.backbone)
    ):
        check_known(config.backbone)
        made_with = old.extractor["backbone"]  # seen before anything is downloaded for the wrong one
        raise StaleCacheError(
            f"{output} was made by another extractor (backbone: {made_with} -> {config.backbone}); go on with "
            f"--backbone {made_with}, write elsewhere with -o OTHER.h5, or replace it with --force"
        )
    select_device(config.device)
    backbone = given or provide_backbone(config, progress)
    device = select_device(config.device, backbone.network)
    backbone = settle_execution(backbone, config, device, find_example(old, config))
    extractor = backbone.describe(config.store)
    if old and not explain and not config.force:
        check_same_extractor(old, output, extractor)
    others = {Path(path): open_cache(path) for path in config.reuse}
    for path, cache in others.items():
        check_complete(cache, path)
        if not can_serve(cache.extractor, extractor):
            raise StaleCacheError(f"{path} cannot be reused: {describe_differences(cache.extractor, extractor)}")
    listing = _list_images(data, output, old, config, progress, keep, backbone.preprocessing.frames > 0)
    if backbone.precision == {"compute": "int8"}:
        backbone = calibrate(backbone, listing, config, progress)
        extractor = backbone.describe(config.store)
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


def provide_backbone(config: ExtractConfig, progress: Progress) -> Backbone:
    """The backbone that the settings name."""
    images = InputFormat(**config.image_settings())
    return load_backbone(config.backbone, images=images, progress=progress, **config.network_settings())


def settle_execution(
    backbone: Backbone, config: ExtractConfig, device: torch.device, example: Mapping[str, Any] | None
) -> Backbone:
    """The backbone with its decoder and its precision: those that are stated, else those of a cache, else the usual.

    Parameters
    ----------
    backbone, config, device
        What computes, how and where.
    example
        The extractor of a cache whose rows are wanted.

    Raises
    ------
    SettingsError
        If the decoder cannot resize as this backbone wants it.
    """
    images = backbone.preprocessing
    made_with = Preprocessing.from_json(example["preprocessing"]).decoder if example else None
    usual = "pillow" if config.runtime == "eager" or images.interpolation not in TORCH_INTERPOLATIONS else "torch"
    decoder = config.decoder or made_with or usual
    if decoder == "torch" and images.interpolation not in TORCH_INTERPOLATIONS:
        raise SettingsError(
            f"--decoder torch resizes {' or '.join(TORCH_INTERPOLATIONS)}, and {backbone.name} wants "
            f"{images.interpolation}; use --decoder pillow"
        )
    precision = {"compute": "float16" if device.type == "cuda" else "float32"}
    if example:
        precision = {name: value for name, value in example["precision"].items() if name != "stored"}
    if config.precision and PRECISIONS[config.precision] != precision["compute"]:
        precision = {"compute": PRECISIONS[config.precision]}
    choose_runtime(config.runtime, device, network=backbone.network, compute=precision["compute"])  # is there such?
    return replace(backbone, preprocessing=replace(images, decoder=decoder), precision=precision)


def calibrate(backbone: Backbone, listing: Listing, config: ExtractConfig, progress: Progress) -> Backbone:
    """The backbone with the ranges of its activations on a few images: those with the smallest digests.

    Raises
    ------
    DeviceError
        If it cannot be quantised.
    """
    paths = {digest: path for path, digest in zip(*_list_first_split(listing), strict=True)}
    digests = sorted(paths)[:CALIBRATION_IMAGES]
    transform = make_pixel_transform(backbone.preprocessing)
    rows = ImageRows(listing.root, [paths[digest] for digest in digests], transform=transform, digests=digests)
    ranges = find_ranges(backbone.network, rows, batch_size=config.batch_size)
    progress.say(f"int8: activations rounded within what {len(digests)} images show; expect less accuracy than of fp32")
    return replace(backbone, precision={"compute": "int8", "ranges": ranges})


def _list_first_split(listing: Listing) -> tuple[Sequence[str], Sequence[str]]:
    """Paths and digests of the training images."""
    split = next(iter(listing.splits.values()))
    return split.paths, split.digests


def find_example(old: FeatureCache | None, config: ExtractConfig) -> Mapping[str, Any] | None:
    """The extractor of the cache whose rows are wanted, if there is one."""
    if old and not config.force and not is_imported(old.extractor["backbone"]):
        return old.extractor
    caches = (open_cache(path).extractor for path in config.reuse)
    return next((extractor for extractor in caches if not is_imported(extractor["backbone"])), None)


def take_backbone(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Backbone | None]:
    """Settings whose `backbone` is a name, and the backbone itself if that was given in place of one.

    Raises
    ------
    SettingsError
        If settings are stated that belong to the making of the backbone.
    """
    given = settings.get("backbone")
    if not isinstance(given, Backbone):
        return dict(settings), None
    check_unchanged(given)
    making = [name for name in ("weights", *ExtractConfig.OPTIONAL) if name in settings and name not in EXECUTION]
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


def _decide(old: FeatureCache | None, same: bool, force: bool, missing: bool) -> str:
    if old is None:
        return "create"
    if not same:
        return "replace" if force else "refuse"
    return "extend" if missing else "reuse"
