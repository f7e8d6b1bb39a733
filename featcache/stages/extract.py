"""Stage 1: a frozen backbone turns every image into features once; they are kept in one HDF5 file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featcache import files
from featcache.backbones import Backbone, load_backbone
from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    decide_extraction,
    hash_extractor,
    partial_path,
    read_unfinished,
    write_cache,
)
from featcache.config import FEATURES_FILE, ExtractConfig
from featcache.dataset import Listing, list_dataset, summarise
from featcache.errors import BadImage, BadImagesError
from featcache.images import ImageRows, make_evaluation_transform
from featcache.progress import SILENT, Progress
from featcache.runs import PeakMemory, describe_environment
from featcache.runtime import choose_runtime, run_network, select_device

RowsByDigest = dict[str, NDArray[np.float32]]
COMPUTED_WITH = ("peak_memory_bytes", "device", "runtime", "environment")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction did.

    Attributes
    ----------
    path
        The cache file.
    cache
        What is in it.
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


def extract_features(
    data: Path | str, output: Path | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> Extraction:
    """Extract the features of every image of a folder into an HDF5 file.

    Rows whose image bytes are already in the file, made by the same extractor, are kept: on unchanged data nothing is
    computed.

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
        If files cannot be used as images and `skip_bad` is not set. The other rows are kept beside the output, under
        another name, and reused by the next call.
    StaleCacheError
        If the output was made by another extractor and `force` is not set.
    BackboneError, DeviceError, MissingExtraError, OutputError
        If the network, the device or the output cannot be had.

    Examples
    --------
    >>> extraction = extract_features("photos", backbone="resnet18")       # doctest: +SKIP
    >>> extraction.cache.splits["train"].features.shape                    # doctest: +SKIP
    (244, 512)
    """
    started, memory = time.perf_counter(), PeakMemory()
    config, output = ExtractConfig(**settings), Path(output)
    files.check_writable(output)
    listing = list_dataset(data, val_fraction=config.val_fraction, seed=config.seed, progress=progress)
    for line in summarise(listing):
        progress.say(line)
    device = select_device(config.device)
    backbone = load_backbone(config.backbone, weights=config.weights, seed=config.seed)
    extractor = backbone.describe()
    decision, old = decide_extraction(output, extractor, force=config.force)
    earlier = [cache for cache in (old, read_unfinished(output, hash_extractor(extractor))) if cache]
    rows = {digest: row for cache in earlier for digest, row in cache.rows_by_digest().items()}
    known = len(rows)
    where = f"{device} ({choose_runtime(config.runtime, device)})"
    _say_plan(decision, listing, rows, backbone, where, progress)
    if old and (dropped := set(old.rows_by_digest()) - listing.digests()):
        progress.say(f"{len(dropped)} rows leave {output}: their images are no longer in {listing.root}")
    bad = list(listing.bad)

    def gather(listing: Listing) -> FeatureCache:
        """The rows that there are by now, with what they cost."""
        spent = time.perf_counter() - started if len(rows) > known else 0.0
        provenance = {
            "data": str(listing.root.resolve()),
            "settings": config.result_settings(),
            "seconds": spent + sum(cache.provenance["seconds"] for cache in earlier),
            "peak_memory_bytes": memory.read(),
            "device": str(device),
            "runtime": choose_runtime(config.runtime, device),
            "environment": describe_environment(),
            "bad": [list(item) for item in bad],
        }
        if old and len(rows) == known:  # nothing was computed: how it was once computed is what counts
            provenance = {**provenance, **{name: old.provenance[name] for name in COMPUTED_WITH}}
        return _make_cache(listing, rows, extractor, provenance)

    try:
        bad += compute_missing_rows(listing, rows, backbone, device, config, progress)
    except KeyboardInterrupt:
        _keep_unfinished(output, gather(listing), progress)
        raise
    if bad and not config.skip_bad:
        _keep_unfinished(output, gather(listing), progress)
        raise BadImagesError(bad)
    cache = gather(listing.without(bad))
    if old is None or not _is_same_content(old, cache):
        write_cache(output, cache)
    partial_path(output).unlink(missing_ok=True)
    return Extraction(
        path=output,
        cache=cache,
        computed=len(rows) - known,
        bad=tuple(bad),
        seconds=time.perf_counter() - started,
    )


def compute_missing_rows(
    listing: Listing,
    rows: RowsByDigest,
    backbone: Backbone,
    device: torch.device,
    config: ExtractConfig,
    progress: Progress,
) -> list[BadImage]:
    """Compute the features that `rows` lacks, each distinct image once, and put them there.

    Returns
    -------
    Every file that could not be used, also those that are copies of one.
    """
    paths_by_digest: dict[str, list[str]] = {}
    for split in listing.splits.values():
        for path, digest in zip(split.paths, split.digests, strict=True):
            paths_by_digest.setdefault(digest, []).append(path)
    digests = [digest for digest in paths_by_digest if digest not in rows]
    if not digests:
        return []
    source = ImageRows(
        listing.root,
        [paths_by_digest[digest][0] for digest in digests],
        transform=make_evaluation_transform(backbone.preprocessing),
        digests=digests,
    )
    digest_by_path = dict(zip(source.paths, digests, strict=True))
    bad = []
    outputs = run_network(
        backbone.network,
        source,
        device=device,
        runtime=config.runtime,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    for output in progress.track(outputs, total=len(digests), what="extracting"):
        failed = list(output.bad)
        for row, values in zip(output.rows.tolist(), output.values, strict=True):
            if np.isfinite(values).all():
                rows[digests[row]] = values
            else:
                failed.append(BadImage(source.paths[row], "its features are not finite numbers"))
        for path, reason in failed:
            bad += [BadImage(copy, reason) for copy in paths_by_digest[digest_by_path[path]]]
    return bad


def _make_cache(
    listing: Listing, rows: RowsByDigest, extractor: dict[str, Any], provenance: dict[str, Any]
) -> FeatureCache:
    """The rows that there are, in the listing's order."""
    dim = extractor["dim"]
    splits = {}
    for name, split in listing.splits.items():
        there = split.take(np.array([digest in rows for digest in split.digests], dtype=bool))
        features = np.stack([rows[digest] for digest in there.digests]) if len(there) else np.empty((0, dim))
        splits[name] = FeatureSplit(listing=there, features=features.astype(np.float32))
    return FeatureCache(classes=listing.classes, extractor=extractor, splits=splits, provenance=provenance)


def _is_same_content(old: FeatureCache, new: FeatureCache) -> bool:
    """Whether a file that holds `old` need not be written again."""

    def contents(cache: FeatureCache) -> Any:
        splits = {
            name: (split.listing.paths, split.listing.labels.tolist(), split.listing.digests)
            for name, split in cache.splits.items()
        }
        return cache.classes, splits, cache.provenance, cache.extractor

    return bool(contents(old) == contents(new))


def _keep_unfinished(output: Path, cache: FeatureCache, progress: Progress) -> None:
    if len(cache):
        write_cache(partial_path(output), cache)
        progress.say(f"{len(cache)} rows kept in {partial_path(output)}; the same command goes on from there")


def _say_plan(
    decision: str,
    listing: Listing,
    rows: RowsByDigest,
    backbone: Backbone,
    where: str,
    progress: Progress,
) -> None:
    todo = len(listing.digests() - set(rows))
    verb = {"create": "new cache", "reuse": "cache of the same extractor", "replace": "old cache replaced"}[decision]
    progress.say(
        f"{backbone.name}, weights {backbone.weights['name']}, {backbone.width} features, {where}; {verb}, "
        f"{todo} images to compute"
    )
