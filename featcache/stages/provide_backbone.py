"""The network for an extraction: made from the settings, with the decoder and the precision that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from featcache.backbones import Backbone, load_backbone
from featcache.cache import FeatureCache, key_parts, open_cache
from featcache.config import PRECISIONS, ExtractConfig, is_imported
from featcache.dataset import Listing
from featcache.errors import SettingsError
from featcache.images import ImageRows, make_pixel_transform
from featcache.preprocessing import TORCH_INTERPOLATIONS, InputFormat, Preprocessing
from featcache.progress import Progress
from featcache.runtime import choose_runtime, find_ranges, select_device
from featcache.stages.plan import Plan, check_same_extractor

CALIBRATION_IMAGES = 32


def provide_settled(
    config: ExtractConfig,
    given: Backbone | None,
    like: Mapping[str, Any] | None,
    progress: Progress,
    device: torch.device | None = None,
) -> tuple[Backbone, torch.device]:
    """The backbone of an extraction, as it is to compute, and where.

    Parameters
    ----------
    config
        What is wanted.
    given
        The backbone, where it is not to be made from its name.
    like
        The extractor whose decoder and precision count where none are stated, see `find_example`.
    progress
        Told of downloads.
    device
        Where it will run, if that is on other machines; None is what `config` says of this one.
    """
    if device is None:
        select_device(config.device)  # before anything is downloaded
    backbone = given or provide_backbone(config, progress)
    device = device or select_device(config.device, backbone.network)
    return settle_execution(backbone, config, device, like), device


def equip(plan: Plan, config: ExtractConfig, progress: Progress) -> Plan:
    """The plan with its network, where that was left out."""
    if plan.backbone:
        return plan
    backbone, device = provide_settled(config, None, find_example(plan.old, config), progress)
    extractor = backbone.describe(config.store)
    if plan.old:
        check_same_extractor(plan.old, plan.output, extractor)
    return replace(plan, backbone=backbone, device=device, extractor=extractor)


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
        The extractor of a cache whose rows may be wanted; its precision counts if it is otherwise the same.

    Raises
    ------
    SettingsError
        If the decoder cannot resize as this backbone wants it.
    """
    images = backbone.preprocessing
    made_with = Preprocessing.from_json(example["preprocessing"]).decoder if example else None
    if made_with == "torch" and images.interpolation not in TORCH_INTERPOLATIONS:
        made_with = None
    usual = "pillow" if config.runtime == "eager" or images.interpolation not in TORCH_INTERPOLATIONS else "torch"
    decoder = config.decoder or made_with or usual
    if decoder == "torch" and images.interpolation not in TORCH_INTERPOLATIONS:
        raise SettingsError(
            f"--decoder torch resizes {' or '.join(TORCH_INTERPOLATIONS)}, and {backbone.name} wants "
            f"{images.interpolation}; use --decoder pillow"
        )
    precision = {"compute": "float16" if device.type == "cuda" else "float32"}
    if example and _differ_in_execution(example, backbone.describe()):
        precision = {name: value for name, value in example["precision"].items() if name != "stored"}
    if config.precision and PRECISIONS[config.precision] != precision["compute"]:
        precision = {"compute": PRECISIONS[config.precision]}
    choose_runtime(config.runtime, device, network=backbone.network, compute=precision["compute"])  # is there such?
    return replace(backbone, preprocessing=replace(images, decoder=decoder), precision=precision)


def _differ_in_execution(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two extractors differ in decoder and precision at most."""

    def drop(extractor: Mapping[str, Any]) -> dict[str, Any]:
        parts = {name: value for name, value in key_parts(extractor).items() if name != "precision"}
        images = {name: value for name, value in parts["preprocessing"].items() if name != "decoder"}
        return {**parts, "preprocessing": images}

    return drop(one) == drop(other)


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
    if old and not is_imported(old.extractor["backbone"]):
        return old.extractor
    caches = (open_cache(path).extractor for path in config.reuse)
    return next((extractor for extractor in caches if not is_imported(extractor["backbone"])), None)
