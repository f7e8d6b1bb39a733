"""Features that were made elsewhere become a cache like any other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.cache import (
    FeatureCache,
    FeatureSplit,
    describe_differences,
    hold_output,
    open_cache,
    open_old,
    remove_temporary,
    verify_cache,
    write_cache,
)
from featcache.config import FEATURES_FILE, IMPORTED, ImportConfig
from featcache.dataset import (
    SPLITS,
    STATS,
    Listing,
    Split,
    check_classes_filled,
    hash_files,
    list_doubts,
    name_root,
    split_by_content,
)
from featcache.errors import DatasetError, StaleCacheError
from featcache.metering import Meter
from featcache.progress import SILENT, Progress
from featcache.runs import describe_environment
from featcache.stages.tables import Table, check_table, open_table
from featcache.storage import Place, assembly_path, check_writable, follow_link, locate

SPLIT_NAMES = {**{name: name for name in SPLITS}, "validation": "val", "valid": "val"}
PIECE_BYTES = 16 << 20  # of features that are hashed at a time


@dataclass(frozen=True, kw_only=True)
class ImportedFeatures:
    """What an import did.

    Attributes
    ----------
    path
        The cache file.
    cache
        What is in it, the features mapped from the file.
    reused
        Whether the very same was there already, so that nothing was written.
    seconds
        Wall time of this call.
    """

    path: Place
    cache: FeatureCache
    reused: bool
    seconds: float


def import_features(
    table: Path | str, output: Place | str = FEATURES_FILE, *, progress: Progress = SILENT, **settings: Any
) -> ImportedFeatures:
    """Make a cache of features that another program made.

    A row is known by its image's bytes where the table names images and they are there, so that a head on it can be
    compared with fine-tuning on the same images; else by its own numbers. The same table again is not written again.

    Parameters
    ----------
    table
        A .npy, .npz, .csv, .tsv or .parquet file with a row for each image; see `featcache.stages.tables`.
    output
        The cache file.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.ImportConfig`.

    Returns
    -------
    ImportedFeatures

    Raises
    ------
    DatasetError
        If it is not a usable table of features with labels, or only some of its images are there.
    StaleCacheError
        If the output is a cache of something else and `force` is not set.
    CacheError
        If the output is no cache at all.
    MissingExtraError
        If it is a Parquet file and pyarrow is not installed.
    OutputBusyError
        If another process writes the output and `wait` is not set.
    OutputError
        If it cannot be written.

    Examples
    --------
    >>> imported = import_features("clip.npy", labels="labels.txt", name="clip")      # doctest: +SKIP
    >>> imported.cache.splits["train"].features.shape                                 # doctest: +SKIP
    (40000, 512)
    """
    meter = Meter()
    config, table, output = ImportConfig(**settings), Path(table), follow_link(locate(output))
    check_table(table)
    check_writable(output)
    with hold_output(output, wait=config.wait, progress=progress):
        remove_temporary(output)
        old = open_old(output, force=config.force)
        sha256 = files.hash_file(table)
        opened = open_table(table, config, progress, assembly_path(output))
        cache = make_cache(opened, sha256, config, progress)
        check_same_source(old, cache, output, force=config.force)
        reused = old is not None and is_same_cache(old, cache) and bool(verify_cache(output))
        if not reused:
            provenance = {**cache.provenance, **meter.read().to_json()}
            write_cache(output, replace(cache, provenance=provenance))
    return ImportedFeatures(path=output, cache=open_cache(output), reused=reused, seconds=meter.seconds)


def check_same_source(old: FeatureCache | None, new: FeatureCache, output: Place, *, force: bool) -> None:
    """Raise a StaleCacheError if a cache was made from something else and may not be replaced."""
    if old is not None and old.key != new.key and not force:
        raise StaleCacheError(
            f"{output} was made from something else ({describe_differences(old.extractor, new.extractor)}); write "
            f"elsewhere with -o OTHER.h5, or replace it with --force"
        )


def is_same_cache(old: FeatureCache, new: FeatureCache) -> bool:
    """Whether a cache need not be written again to hold what a new one does, features being the key's."""
    return (
        old.key == new.key
        and old.classes == new.classes
        and list(old.splits) == list(new.splits)
        and all(_is_same_split(split.listing, new.splits[name].listing) for name, split in old.splits.items())
        and all(old.provenance.get(name) == new.provenance[name] for name in ("data", "settings", "table"))
    )


def _is_same_split(one: Split, other: Split) -> bool:
    return one.paths == other.paths and one.digests == other.digests and bool(np.array_equal(one.labels, other.labels))


def make_cache(table: Table, sha256: str, config: ImportConfig, progress: Progress) -> FeatureCache:
    """The cache to be written: every row of the table in its split.

    Raises
    ------
    DatasetError
        If labels, paths, splits or features are not usable.
    """
    listing = list_rows(table, config, progress)
    row_of = {path: row for row, path in enumerate(listing_paths(table, Path(str(listing.root))))}
    splits = {
        name: FeatureSplit(
            listing=split,
            features=TableRows(table, np.array([row_of[path] for path in split.paths], dtype=np.intp), config.store),
        )
        for name, split in listing.splits.items()
    }
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    progress.say(f"{table.path}: {counts} rows of {table.dim} features, {len(listing.classes)} classes")
    for line in list_doubts(listing):
        progress.say(line)
    return FeatureCache(
        classes=listing.classes,
        extractor=describe_source(table, sha256, config),
        splits=splits,
        provenance=describe_origin(table, listing, config),
    )


@dataclass(frozen=True)
class TableRows:
    """Some rows of a table, in this order, as features that give slices."""

    table: Table
    rows: NDArray[np.intp]
    store: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return len(self.rows), self.table.dim

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        return self.table.read_rows(self.rows[rows], self.store)


def describe_source(table: Table, sha256: str, config: ImportConfig) -> dict[str, Any]:
    """What stands for the extractor: whatever made this very table."""
    return {
        "backbone": f"{IMPORTED}:{config.name}" if config.name else IMPORTED,
        "weights": {"requested": IMPORTED, "name": table.path.name, "sha256": sha256, "tensors_sha256": sha256},
        "layer": table.layer,
        "dim": table.dim,
        "preprocessing": None,
        "precision": {"compute": IMPORTED, "stored": config.store},
    }


def describe_origin(table: Table, listing: Listing, config: ImportConfig) -> dict[str, Any]:
    """The provenance: the table, where its columns came from, and that nobody knows what it cost."""
    settings = config.result_settings()
    settings |= {role: origin for role, origin in table.origins.items() if settings[role] is not None}
    if config.data is not None:
        settings["data"] = str(Path(config.data).resolve())
    return {
        "data": name_root(listing.root),
        "table": str(table.path.resolve()),
        "settings": settings,
        "seconds": 0.0,
        "peak_memory_bytes": None,
        "device": "unknown",
        "runtime": IMPORTED,
        "environment": describe_environment(),
        "bad": [],
    }


# A table as a listing


def split_by_folder(rows: Split) -> dict[str, Split]:
    """The splits that the paths begin with, train/..., val/...; none unless all of them do."""
    folders = np.array([path.partition("/")[0] for path in rows.paths])
    if not {"train", "val"} <= set(folders.tolist()) <= set(SPLITS):
        return {}
    return {name: rows.take(folders == name) for name in SPLITS if (folders == name).any()}


def list_rows(table: Table, config: ImportConfig, progress: Progress) -> Listing:
    """The rows of a table as a data set: class, path, digest and split of each.

    Raises
    ------
    DatasetError
        If one of them is missing or makes no sense.
    """
    root = find_root(table, config)
    labels = [to_label(value, table.name_row(i), table) for i, value in enumerate(table.columns["labels"])]
    check_numbers(labels, table)
    paths = listing_paths(table, root)
    digests, stats, are_images = identify_rows(table, paths, root, config, progress)
    classes = sort_classes(set(labels), as_folders=are_images)
    if len(classes) < 2:
        raise DatasetError(f"all rows of {table.path} have the label {classes[0]}: expected at least 2 classes")
    label_of = {name: label for label, name in enumerate(classes)}
    rows = Split(
        paths=paths,
        labels=np.array([label_of[label] for label in labels], dtype=np.int64),
        digests=digests,
        stats=stats,
    )
    where = str(table.path)
    if "split" in table.columns:
        splits = split_as_given(rows, table)
    elif splits := split_by_folder(rows):
        progress.say("the rows are split as their paths are, into " + ", ".join(f"{name}/" for name in splits))
    else:
        splits = split_by_content(rows, classes, where, config.val_fraction, config.seed)
    for name, split in splits.items():
        check_classes_filled(split.labels, classes, f"the {name} split of {where}")
    return Listing(root=root, classes=classes, splits=splits)


def find_root(table: Table, config: ImportConfig) -> Path:
    """The folder that the paths are relative to."""
    root = table.path.parent if config.data is None else Path(config.data)
    if not root.is_dir():
        raise DatasetError(f"no folder at {root}: expected the one that the paths of {table.path} are relative to")
    return root


def to_label(value: Any, row: str, table: Table) -> str:
    """A class's name from a label of any sensible type.

    Raises
    ------
    DatasetError
        If it is missing, or no integer and no text.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | str) and (text := str(value)) and _is_storable(text):
        return text
    raise DatasetError(
        f"{table.path}: the label of {row} is {value!r}, expected an integer or a text (labels from "
        f"{table.origins['labels']}); mend that row or leave it out"
    )


def check_numbers(labels: Sequence[str], table: Table) -> None:
    """Raise a DatasetError if one label is written as no number and all others are numbers."""
    missing = {name for name in set(labels) if name.lower() == "nan"}
    others = set(labels) - missing
    if missing and others and all(re.fullmatch(r"[+-]?[0-9.]+", name) for name in others):
        row = next(row for row, label in enumerate(labels) if label in missing)
        raise DatasetError(f"{table.path}: the label of {table.name_row(row)} is {labels[row]}, expected a number")


def sort_classes(names: set[str], *, as_folders: bool) -> tuple[str, ...]:
    """Classes in their order: integers by their value, names as texts.

    Classes of images are sorted as texts in any case, as the class folders of a data set are, so that runs on both can
    be compared.

    >>> sort_classes({"10", "9", "-1"}, as_folders=False), sort_classes({"b", "a", "1"}, as_folders=False)
    (('-1', '9', '10'), ('1', 'a', 'b'))
    """
    if not as_folders and all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def listing_paths(table: Table, root: Path) -> tuple[str, ...]:
    """The path of each row relative to the root, made up where the table names none.

    Raises
    ------
    DatasetError
        If one is missing, leads out of the root, or is there twice.
    """
    if "paths" not in table.columns:
        return tuple(f"row-{row:07d}" for row in range(len(table)))
    paths, seen = [], dict[str, int]()
    for row, value in enumerate(table.columns["paths"]):
        path = to_path(value, root)
        if path is None:
            raise DatasetError(
                f"{table.path}: the path of {table.name_row(row)} is {value!r}, expected one below {root} (--data says "
                f"what paths are relative to)"
            )
        if path in seen:
            raise DatasetError(
                f"{table.path}: {table.name_row(row)} has the path {path}, as {table.name_row(seen[path])} has: "
                f"expected each image once"
            )
        seen[path] = row
        paths.append(path)
    return tuple(paths)


def to_path(value: Any, root: Path) -> str | None:
    """A path relative to the root, with "/"; None if it is none, or leads elsewhere.

    >>> to_path("./a//b.jpg", Path("photos")), to_path("../a.jpg", Path("photos"))
    ('a/b.jpg', None)
    """
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip() or "\0" in text or not _is_storable(text):
        return None
    path = PurePath(text)
    if path.is_absolute():
        if not path.is_relative_to(root.absolute()):
            return None
        path = path.relative_to(root.absolute())
    return None if ".." in path.parts or not path.parts else path.as_posix()


def _is_storable(text: str) -> bool:
    """Whether a text is Unicode that can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def identify_rows(
    table: Table, paths: Sequence[str], root: Path, config: ImportConfig, progress: Progress
) -> tuple[tuple[str, ...], NDArray[np.int64], bool]:
    """Digest of each row, stats (N, 4) that prove it later, and whether they are those of image files.

    Raises
    ------
    DatasetError
        If some images are there and others are not.
    """
    named = "paths" in table.columns
    there = np.array([(root / path).exists() for path in paths] if named else [], dtype=bool)
    if not there.any() and not (named and config.data is not None):
        if named:
            progress.say(f"none of the images of {table.path} is under {root}: rows are known by their features alone")
        return hash_rows(table, config, progress), np.zeros((len(table), len(STATS)), np.int64), False
    missing = [f"{root / paths[row]} is not there" for row in np.flatnonzero(~there).tolist()]
    if not missing:
        stats, digests, reasons = hash_files([str(root / path) for path in paths], progress=progress)
        missing = [f"{root / path} {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
        if not missing:
            return tuple(digests), stats, True
    raise DatasetError(
        f"{len(missing)} of {len(paths)} images of {table.path} cannot be read; the first: {missing[0]}; say what "
        f"paths are relative to with --data, or leave those rows out"
    )


def hash_rows(table: Table, config: ImportConfig, progress: Progress) -> tuple[str, ...]:
    """SHA-256 of each row's float32 values, the same from whatever kind of table."""
    step = max(1, PIECE_BYTES // (4 * table.dim))
    pieces = (np.arange(start, min(start + step, len(table))) for start in range(0, len(table), step))
    digests: list[str] = []
    for rows in progress.track(pieces, total=len(table), what="reading", unit="row"):
        digests += [files.hash_bytes(values.tobytes()) for values in table.read_rows(rows, config.store)]
    return tuple(digests)


def split_as_given(rows: Split, table: Table) -> dict[str, Split]:
    """The splits that the table says.

    Raises
    ------
    DatasetError
        If a row is in none, or there is no row to train on or to validate on.
    """
    names = []
    for row, value in enumerate(table.columns["split"]):
        text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
        name = SPLIT_NAMES.get(text.lower()) if isinstance(text, str) else None
        if name is None:
            raise DatasetError(
                f"{table.path}: the split of {table.name_row(row)} is {text!r}, expected train, val or test"
            )
        names.append(name)
    given = np.array(names)
    splits = {name: rows.take(given == name) for name in SPLITS if (given == name).any()}
    for name in ("train", "val"):
        if name not in splits:
            raise DatasetError(
                f"{table.path} has no {name} rows, only {', '.join(splits)}: expected train and val; without a split "
                f"column the rows are split for you"
            )
    return splits
