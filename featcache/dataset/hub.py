"""Data sets of Hugging Face's package `datasets`: saved ones, folders that it understands, those of the Hub.

The one column of images and the one of labels are found by their types. Code that comes with a data set is never run:
the package itself does not any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.folders import IMAGE_EXTENSIONS
from featcache.dataset.hashing import RACY_NS, fold_stats, look_at_all
from featcache.dataset.listing import NO_STATS, STATS, Stats
from featcache.dataset.lists import SPLIT_NAMES, settle_splits
from featcache.dataset.roots import HUB, Found, Source, check_label
from featcache.errors import DatasetError, show_value
from featcache.extras import import_extra
from featcache.tabular import first_line, list_columns

LABEL_NAMES = ("label", "labels", "class", "class_name", "target")  # of columns that are no ClassLabel
SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` wrote


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set, opened.

    Attributes
    ----------
    rows
        The `datasets.Dataset`, whose images are given as bytes or paths, undecoded.
    image, label
        Names of the columns.
    is_inside
        (N,) whether the bytes of an image are in the data set's own files.
    stamp
        What the file system said of these files, before they were opened; empty if it proves nothing.
    """

    rows: Any
    image: str
    label: str
    is_inside: NDArray[np.bool_]
    stamp: tuple[tuple[int, ...], ...]

    @property
    def files(self) -> list[str]:
        """The files that the data set is in."""
        return [one["filename"] for one in self.rows.cache_files]


Stamps: TypeAlias = tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]
# Opening takes long, and the workers of a cluster get a copy with every piece of work.
_opened: dict[tuple[str, Stamps], dict[str, HubSplit]] = {}


class HubRows(Source):
    """The rows of a data set.

    Parameters
    ----------
    name
        hf:DIR, or hf:user/name, or hf:user/name:config.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        place = name.removeprefix(HUB)
        self._folder = Path(place) if os.path.isdir(place) else None  # noqa: PTH112 - a name may be too long for a Path
        self.address = name if self._folder is None else f"{HUB}{self._folder.absolute()}"
        self._splits: dict[str, HubSplit] | None = None
        self._now: dict[str, tuple[tuple[int, ...], ...]] = {}  # stamps as they were seen last
        self._stamps: Stamps = ()  # of what this is a copy of, from another process

    def __getstate__(self) -> dict[str, Any]:
        stamps = tuple((name, split.stamp) for name, split in (self._splits or {}).items())
        return {**self.__dict__, "_splits": None, "_now": {}, "_stamps": stamps}

    def settle(self) -> Source:
        """The same, opened."""
        self.open()
        return self

    def open(self) -> dict[str, HubSplit]:
        """Its splits by their names.

        Raises
        ------
        DatasetError
            If it cannot be had, or has no images or labels.
        MissingExtraError
            If `datasets` is not installed.
        """
        if self._splits is None and self._stamps:
            self._splits = _opened.get((self.address, self._stamps))
        if self._splits is None:
            datasets = import_extra("datasets", extra="hf", what=f"{self} needs")
            found = self._load(datasets)
            splits = {"": found} if isinstance(found, datasets.Dataset) else dict(found)
            self._splits = {}
            for name, rows in splits.items():
                if (short := SPLIT_NAMES.get(name, name)) in self._splits:
                    raise DatasetError(f"{self} has more than one split {short}: {', '.join(splits)}")
                self._splits[short] = open_split(datasets, rows, f"{self}, {name}" if name else str(self))
            if self._stamps:
                _opened[self.address, self._stamps] = self._splits
        return self._splits

    def _load(self, datasets: Any) -> Any:
        datasets.disable_progress_bars()
        place, config = str(self._folder or self.name.removeprefix(HUB)), None
        if self._folder is None and ":" in place:
            place, _, config = place.rpartition(":")
        is_saved = self._folder is not None and any((self._folder / name).is_file() for name in SAVED)
        try:
            return datasets.load_from_disk(place) if is_saved else datasets.load_dataset(place, config)
        except Exception as error:  # it raises whatever the many packages below it do
            raise DatasetError(
                f"{self} cannot be loaded ({first_line(error)}): expected hf:DIR or hf:user/name"
            ) from error

    def find(self) -> Found:
        """The rows of all splits that are used."""
        rows: dict[str, list[tuple[str, str]]] = {}
        ignored = []
        for name, split in self.open().items():
            if name and name not in SPLIT_NAMES:
                ignored.append(f"{name}/")
                continue
            labels = read_labels(split, f"{self}, {name}" if name else str(self))
            paths = (f"{name or 'all'}/{i:08d}{extension}" for i, extension in enumerate(list_extensions(split)))
            rows[name] = list(zip(paths, labels, strict=True))
        return Found(settle_splits(rows, self.name), ignored)

    def _locate(self, path: str) -> tuple[HubSplit, int]:
        """The split and the number of a row. Raises an OSError if there is none."""
        name, _, number = path.partition("/")
        try:
            split = self.open()["" if name == "all" else name]
            row = int(number.partition(".")[0])
        except (DatasetError, KeyError, ValueError) as error:
            raise FileNotFoundError(f"{self} has no row {path}") from error
        if not 0 <= row < len(split.rows):
            raise FileNotFoundError(f"{self} has no row {path}")
        return split, row

    def read(self, path: str) -> bytes:
        """The bytes of a row's image."""
        split, row = self._locate(path)
        value = split.rows[row][split.image]
        if value is None:
            raise OSError("the row has no image")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return Path(value["path"]).read_bytes()

    def look(self, paths: Sequence[str]) -> tuple[Stats, list[str]]:
        """What stands for N rows: what the file system says of the data set's files now."""
        self._now = self._now or {name: read_stamp(split.files) for name, split in self.open().items()}
        stats: Stats = np.zeros((len(paths), len(STATS)), np.int64)
        reasons = [""] * len(paths)
        for i, path in enumerate(paths):
            try:
                split, row = self._locate(path)
            except OSError as error:
                reasons[i] = f"cannot be read: {error}"
                continue
            stamp = self._now["" if path.startswith("all/") else path.partition("/")[0]]
            stats[i] = fold_row(stamp, path) if split.is_inside[row] else NO_STATS
        return stats, reasons

    def forget(self) -> None:
        """Look at the data set's files anew the next time."""
        self._now = {}

    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """What will stand for a row's bytes, if they are in files that are as they were when they were opened."""
        del data
        split, row = self._locate(path)
        if not split.is_inside[row] or read_stamp(split.files) != split.stamp:
            return NO_STATS
        return fold_row(split.stamp, path)


def open_split(datasets: Any, rows: Any, where: str) -> HubSplit:
    """A split with its two columns.

    Raises
    ------
    DatasetError
        If there is not one column of images and one of labels.
    """
    image = choose_image(datasets, rows.features, where)
    label = choose_label(datasets, rows.features, where)
    files = [one["filename"] for one in rows.cache_files]
    opened, stamp = time.time_ns(), read_stamp(files)
    if not stamp or max(max(one[2:]) for one in stamp) + RACY_NS >= opened:
        stamp = ()
    inside = [chunk.field("bytes").is_valid().to_numpy(zero_copy_only=False) for chunk in list_chunks(rows, image)]
    kept = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    return HubSplit(kept, image, label, np.concatenate([np.zeros(0, bool), *inside]), stamp)


def choose_image(datasets: Any, features: Any, where: str) -> str:
    """The one column of images."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise DatasetError(f"{where} has {len(images)} columns of images: expected one; {list_columns(list(features))}")
    return str(images[0])


def choose_label(datasets: Any, features: Any, where: str) -> str:
    """The one column of labels: a ClassLabel, or one that is called so."""
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in LABEL_NAMES if name in features]
    if len(labels) > 1 and "label" in labels:
        labels = ["label"]
    if len(labels) != 1:
        raise DatasetError(
            f"{where} has {len(labels)} columns of labels: expected one ClassLabel, or one called label; "
            f"{list_columns(list(features))}"
        )
    return str(labels[0])


def read_labels(split: HubSplit, where: str) -> Iterator[str]:
    """The class of each row.

    Raises
    ------
    DatasetError
        If one is missing, or neither a text nor an integer.
    """
    names = getattr(split.rows.features[split.label], "names", None)
    names = names and [check_label(name, f"{where}: class {i}") for i, name in enumerate(names)]
    for chunk in split.rows.data.column(split.label).chunks:
        for i, value in enumerate(chunk.to_pylist()):
            label = check_label(value, f"{where}: the label of row {i}")
            if names is None:
                yield label
            elif isinstance(value, int) and 0 <= value < len(names):
                yield names[value]
            else:
                raise DatasetError(
                    f"{where}: the label of row {i} is {show_value(value)}, expected 0 to {len(names) - 1}"
                )


def list_extensions(split: HubSplit) -> Iterator[str]:
    """How the name of each row's image ends, if it has one."""
    for chunk in list_chunks(split.rows, split.image):
        for path in chunk.field("path").to_pylist():
            extension = os.path.splitext(path or "")[1].lower()  # noqa: PTH122
            yield extension if extension in IMAGE_EXTENSIONS else ""


def list_chunks(rows: Any, image: str) -> list[Any]:
    """The pieces of a column of images, as arrays of `pyarrow` with "bytes" and "path"."""
    return list(rows.data.column(image).chunks)


def read_stamp(files: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """What the file system says of files; empty if there is one of which it says nothing, or none."""
    stats, reasons = look_at_all(list(files))
    return () if any(reasons) else tuple(tuple(one) for one in stats.tolist())


def fold_row(stamp: tuple[tuple[int, ...], ...], path: str) -> tuple[int, ...]:
    """What stands for a row."""
    return fold_stats([[list(one) for one in stamp], path], 0) if stamp else NO_STATS
