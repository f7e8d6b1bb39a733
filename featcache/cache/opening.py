"""The way in for whoever reads a cache, be it one file or an index of several; how several are read as one.

Every opening of an index compares its caches with what was indexed. Rows come in the order of the caches, split by
split; the features of a split are put together by `read_cache` alone. Knows no HDF5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featcache.cache import reading
from featcache.cache.contents import FeatureCache, FeatureSplit, stored_precision
from featcache.cache.index import MAX_CACHES, SUFFIX, Index, Member, find_index, format_index, is_index
from featcache.cache.joining import JoinedRows, JoinedTexts
from featcache.cache.key import describe_differences
from featcache.cache.reading import (
    CacheReader,
    Verification,
    check_complete,
    check_features,
    explain_errors,
    read_checked,
)
from featcache.dataset import SPLITS, STATS, Split, find_common_folder, list_doubts
from featcache.dataset.texts import pack_digests, pack_texts
from featcache.errors import CacheError, OutputError, SettingsError
from featcache.metering import Spent, add_up
from featcache.progress import SILENT, Progress
from featcache.storage import Place, check_writable, follow_link, is_there, locate, write_whole

Fetch = Callable[[str, str], Any]  # split and column -> features of all caches


def open_cache(path: Place | str) -> FeatureCache:
    """Open a feature cache: everything but the features is read and checked, the features are mapped.

    The mapped features are read from the disk when they are used, and are not checked against their digests; see
    `verify_cache`. Of many rows, paths, digests and stats stay on the disk too, once they are checked. The features
    of an index are `JoinedRows`, of which one file for each cache stays open: rows, slices, numbers and masks give
    arrays, and so does `numpy.asarray`.

    Parameters
    ----------
    path
        A cache file, or an index of several.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or what was read of it is damaged.
    """
    index = find_index(path)
    if index is None:
        return reading.open_cache(path)
    with open_readers(path) as readers:
        return join_stored(index, readers)


def read_cache(path: Place | str) -> FeatureCache:
    """Read a feature cache into memory, features as float32, every byte checked against its digest.

    Parameters
    ----------
    path
        A cache file, or an index of several.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or it is damaged.
    """
    index = find_index(path)
    if index is None:
        return reading.read_cache(path)
    with open_readers(path) as readers:
        return join_read(index, readers)


@contextlib.contextmanager
def stream_cache(path: Place | str) -> Iterator[FeatureCache]:
    """A feature cache whose features stay on the disk, as long as the block lasts; every byte is checked at once.

    A slice of features or views is read when it is wanted, and nothing of it is kept.

    Parameters
    ----------
    path
        A cache file, or an index of several.

    Raises
    ------
    CacheError
        If there is no such file, it is not a feature cache, or it is damaged.
    """
    index = find_index(path)
    if index is None:
        with reading.stream_cache(path) as cache:
            yield cache
        return
    with open_readers(path) as readers:
        for reader in readers:
            for split in reader.lengths:
                for column in reader.list_features(split):
                    check_features(reader, split, column)
        yield join_stored(index, readers)


def verify_cache(path: Place | str) -> Verification:
    """Recompute every digest of a cache, block by block, in little memory; one in a store is downloaded for it.

    Parameters
    ----------
    path
        A cache file, or an index of several: each is looked at in turn.

    Raises
    ------
    CacheError
        If it is not a feature cache, or anything but features is damaged; of an index also if a cache is missing, or
        is another one than was indexed.
    """
    index = find_index(path)
    if index is None:
        return reading.verify_cache(path)
    for member in index.members:
        _check_there(member, index)
    found = [reading.verify_cache(member.path) for member in index.members]
    with open_readers(path):  # they are those that were indexed
        pass
    return Verification(
        path=index.path,
        rows=sum(one.rows for one in found),
        bytes=sum(one.bytes for one in found),
        damaged=_name_damage(found, "damaged"),
        damaged_views=_name_damage(found, "damaged_views"),
        cure=" && ".join(one.cure for one in found if not one) or index.command,
    )


def _name_damage(found: Sequence[Verification], what: str) -> tuple[tuple[str, int, int], ...]:
    """What is damaged in several caches: the cache and the split, first row, row after the last."""
    return tuple((f"{one.path}: {name}", start, stop) for one in found for name, start, stop in getattr(one, what))


def is_feature_cache(path: Place) -> bool:
    """Whether a file says that it is a feature cache, or an index of some, however damaged."""
    return is_index(path) or reading.is_feature_cache(path)


def read_summary(path: Place) -> str:
    """A feature cache in half a line: backbone, rows, width.

    Raises
    ------
    CacheError
        If it is not one.
    """
    index = find_index(path)
    if index is None:
        return reading.read_summary(path)
    with open_readers(path) as readers:
        rows = sum(sum(reader.lengths.values()) for reader in readers)
        first, views = readers[0].extractor, ", with views" if readers[0].views else ""
        what = f"{rows:,} rows of {first['dim']} {stored_precision(first)}{views}"
        return f"{first['backbone']}: {what}, in {len(readers)} caches"


def open_old(output: Place, *, force: bool) -> FeatureCache | None:
    """The cache file that lies at an output; None if none does, or, with `force`, one that is of no use any more.

    Raises
    ------
    CacheError
        If something else lies there, an index too, or such a cache and `force` is not set.
    """
    if not is_there(output):
        return None
    if is_index(output):
        raise CacheError(
            f"{output} is an index of several caches, in which there is no room for rows: write one of the caches that "
            f"it names, or another file, with -o"
        )
    try:
        old = reading.open_cache(output)
        check_complete(old, output)
    except CacheError:
        if force and reading.is_feature_cache(output):
            return None
        raise
    return old


# --- several files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_readers(path: Place | str) -> Iterator[list[CacheReader]]:
    """The cache files that are behind a name, open as long as the block lasts; those of an index are what it indexed.

    Raises
    ------
    CacheError
        If one is missing, damaged, or another one than was indexed.
    """
    index = find_index(path)
    with contextlib.ExitStack() as stack:
        if index is None:
            yield [stack.enter_context(CacheReader(path))]
            return
        readers = [stack.enter_context(_open_member(member, index)) for member in index.members]
        check_alike(readers)
        if (readers[0].classes, readers[0].key) != (index.classes, index.key):
            raise CacheError(
                f"{index.path} is not of its caches: other classes or key; `{index.command}` makes it again"
            )
        yield readers


def _check_there(member: Member, index: Index) -> None:
    """Raise a CacheError if a cache is missing."""
    with explain_errors(member.path):
        if not member.path.exists():
            raise CacheError(
                f"{member.path} does not exist: {index.path} names it; put it back, or make the index again of those "
                f"that are there (`featcache index {index.path} CACHE.h5 ...`)"
            )


def _open_member(member: Member, index: Index) -> CacheReader:
    """A cache, if it is the one that was indexed."""
    _check_there(member, index)
    reader = CacheReader(member.path)
    if reader.content_sha256 != member.content_sha256:
        with reader:
            raise CacheError(
                f"{member.path} is no longer the cache that {index.path} indexed: expected content "
                f"{member.content_sha256[:8]}..., found {reader.content_sha256[:8]}...; `{index.command}` indexes it "
                f"again"
            )
    return reader


# --- several as one ---------------------------------------------------------------------------------------------------


def join_stored(index: Index, readers: Sequence[CacheReader]) -> FeatureCache:
    """Everything but the features, which are read when they are wanted.

    NOTE: each map would keep a file open, and there are not many that may be; so all columns of a cache share one.
    """

    def fetch(split: str, column: str) -> JoinedRows:
        return JoinedRows([reader.stream_features(split, column) for reader in _having(readers, split)])

    return join_caches(index, readers, fetch)


def join_read(index: Index, readers: Sequence[CacheReader]) -> FeatureCache:
    """Everything in memory, features as float32, every byte checked."""

    def fetch(split: str, column: str) -> Any:
        shapes = [reader.shape_of(split, column) for reader in _having(readers, split)]
        values, start = np.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), np.float32), 0
        for reader in _having(readers, split):
            stop = start + reader.lengths[split]
            read_checked(reader, split, column, into=values[start:stop])
            start = stop
        return values

    return join_caches(index, readers, fetch)


def join_caches(index: Index, readers: Sequence[CacheReader], fetch: Fetch) -> FeatureCache:
    """One cache of several that are alike.

    What the file system said of the images is not joined: an index is never extended, and has no use for it.
    """
    caches = [reader.streamed for reader in readers]
    for reader, cache in zip(readers, caches, strict=True):
        check_complete(cache, reader.path)
    data, prefixes = join_folders([str(cache.provenance["data"]) for cache in caches], index.path)
    names = [name for name in SPLITS if any(name in cache.splits for cache in caches)]
    splits = {}
    for name in names:
        values = {column: fetch(name, column) for column in readers[0].list_features(name)}
        splits[name] = FeatureSplit(listing=_join_listings(name, caches, prefixes), **values)
    return replace(
        caches[0],
        splits=splits,
        provenance=_join_provenance(index, caches, data, prefixes),
        content_sha256=index.content_sha256,
    )


def _having(readers: Sequence[CacheReader], split: str) -> list[CacheReader]:
    """Those that have such a split: not all need test images."""
    return [reader for reader in readers if split in reader.lengths]


def join_folders(data: Sequence[str], index: Place) -> tuple[str, list[str]]:
    """What the images of all caches are relative to, and what to put before the paths of each.

    Paths stay those of the caches where all have one data set. Of several folders they begin in the folder that holds
    them all; else in a number for each data set, and it is the index that they are relative to: then nobody finds the
    images by them, but no two are mixed up.
    """
    different = list(dict.fromkeys(data))
    if len(different) == 1:
        return data[0], ["" for _ in data]
    if (common := find_common_folder(data)) is not None:
        return common
    numbers = {one: i for i, one in enumerate(different)}
    return str(index.resolve()), [f"{numbers[one]}/" for one in data]


def _join_listings(name: str, caches: Sequence[FeatureCache], prefixes: Sequence[str]) -> Split:
    """The listing of a split."""
    there = [
        (cache.splits[name].listing, text) for cache, text in zip(caches, prefixes, strict=True) if name in cache.splits
    ]
    listings = [listing for listing, _ in there]
    n = sum(map(len, listings))
    return Split(
        paths=JoinedTexts([pack_texts(one.paths) for one in listings], [text for _, text in there]),
        labels=np.concatenate([one.labels for one in listings]),
        digests=JoinedTexts([pack_digests(one.digests) for one in listings], ["" for _ in listings]),
        stats=np.broadcast_to(np.zeros(len(STATS), np.int64), (n, len(STATS))),
    )


def _join_provenance(
    index: Index, caches: Sequence[FeatureCache], data: str, prefixes: Sequence[str]
) -> dict[str, Any]:
    """The first one's, with what all cost together, what was left out of each, and the caches."""
    origins = [cache.provenance for cache in caches]
    peaks = [peak for origin in origins if (peak := origin.get("peak_memory_bytes")) is not None]
    bad = [
        [f"{prefix}{path}", why]
        for origin, prefix in zip(origins, prefixes, strict=True)
        for path, why in origin["bad"]
    ]
    return {
        **origins[0],
        **add_up(map(Spent.from_json, origins)).to_json(),
        "data": data,
        "bad": bad,
        "peak_memory_bytes": max(peaks, default=None),
        "device": ", ".join(dict.fromkeys(origin["device"] for origin in origins)),
        "runtime": ", ".join(dict.fromkeys(origin["runtime"] for origin in origins)),
        "caches": [str(member.path) for member in index.members],
    }


# --- making one -------------------------------------------------------------------------------------------------------


def index_caches(output: Place | str, caches: Sequence[Place | str], *, progress: Progress = SILENT) -> FeatureCache:
    """Make an index of finished caches, which reads as one cache of all their rows.

    The caches stay where they are. An index that lies at the output already is replaced.

    Parameters
    ----------
    output
        The index, a name that ends in .json.
    caches
        Caches of one extractor and the same classes; their rows come in this order. An image may be in two of them, as
        it may be twice in one.
    progress
        Told of images that are in two splits, or under two labels.

    Returns
    -------
    The cache, as `open_cache` gives it.

    Raises
    ------
    SettingsError
        If the name does not end in .json, or a cache is named twice or is an index itself.
    CacheError
        If one is no cache, or damaged, or they differ in extractor, classes or views.
    OutputError
        If something other than an index lies at the output, or it cannot be written.

    Examples
    --------
    >>> len(index_caches("photos.json", ["photos-1.h5", "photos-2.h5"]))            # doctest: +SKIP
    20000000
    """
    place, paths = follow_link(locate(output)), [locate(path) for path in caches]
    check_output(place)
    check_paths(paths)
    check_writable(place)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(CacheReader(path)) for path in paths]
        check_alike(readers)
        index = describe_members(place, readers)
        cache = join_stored(index, readers)
        write_whole(place, format_index(index))
    for line in list_doubts(cache.listing):
        progress.say(line)
    return cache


def check_output(place: Place) -> None:
    """Raise an error if an index cannot lie at a place."""
    if place.suffix != SUFFIX:
        raise SettingsError(f"an index cannot be called {place.name}: expected a name that ends in {SUFFIX}")
    if is_there(place) and not is_index(place):
        raise OutputError(f"{place} is there and is no index of caches; choose another name")


def check_paths(paths: Sequence[Place]) -> None:
    """Raise a SettingsError if these are not caches that are each named once, by their names."""
    if not paths:
        raise SettingsError("an index of no caches: expected at least one")
    if len(paths) > MAX_CACHES:
        raise SettingsError(f"an index of {len(paths):,} caches: expected at most {MAX_CACHES:,}; make larger caches")
    found: dict[Place, Place] = {}
    for path in paths:
        if (other := found.setdefault(path.resolve(), path)) is not path:
            raise SettingsError(
                f"{path} is named twice (as {other}): expected each cache once, or its rows count double"
            )
        if is_index(path):
            raise SettingsError(f"{path} is an index itself: expected caches; name those that it names")


def check_alike(readers: Sequence[CacheReader]) -> None:
    """Raise a CacheError if caches do not read as one: other features, other classes, other views."""
    first = readers[0]
    for other in readers[1:]:
        if first.key != other.key:
            difference = describe_differences(first.extractor, other.extractor)
        elif first.classes != other.classes:
            difference = f"classes: {_say_classes(first.classes, other.classes)}"
        elif first.views != other.views:
            difference = f"views: {_say_views(first)} -> {_say_views(other)}"
        else:
            continue
        raise CacheError(
            f"{first.path} and {other.path} cannot be read as one: {difference}; index caches of one extractor, the "
            f"same classes and the same views"
        )


def _say_classes(one: Sequence[str], other: Sequence[str]) -> str:
    """Which are only in one of two lists, a few of them."""
    only = [*(f"{name} is only in the first" for name in sorted({*one} - {*other}))]
    only += [f"{name} is only in the second" for name in sorted({*other} - {*one})]
    return ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "") or "in another order"


def _say_views(reader: CacheReader) -> str:
    return f"{reader.views.describe()}, seed {reader.views.seed}" if reader.views else "none"


def describe_members(place: Place, readers: Sequence[CacheReader]) -> Index:
    """The index of open caches."""
    members = [
        Member(path=r.path, content_sha256=r.content_sha256, rows=dict(r.lengths), bytes=r.bytes) for r in readers
    ]
    first = readers[0]
    return Index(path=place, classes=first.classes, key=first.key, members=tuple(members))
