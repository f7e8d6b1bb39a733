"""Lists of images with their labels, in CSV, JSON lines and Parquet: where each image lies, and which class it is of.

A row's path is relative to the folder of the list, or absolute, or a URL. What lies below that folder is named by its
relative path; anything else by its URL, file:///... on this machine. Reads no image.
"""

from __future__ import annotations

import copy
import io
import posixpath
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

from featcache.dataset.hashing import RACY_NS, look_at_all
from featcache.dataset.listing import NO_STATS, SPLITS, Stats
from featcache.dataset.remote import Seen, exists, gather_seen, look_at_urls, open_binary, read_url, settle_seen
from featcache.dataset.roots import (
    KINDS,
    READERS,
    Found,
    Source,
    check_label,
    check_path,
    check_url,
    is_url,
    strip_local,
)
from featcache.errors import DatasetError, shorten, show_value
from featcache.tabular import check_names, explain_errors, list_columns, open_parquet, read_json, read_lines

# What a column may be called; the first name wins over the others.
COLUMNS = {
    "path": ("path", "image", "file", "file_name", "filename"),
    "label": ("label", "class", "class_name", "target"),
    "split": ("split",),
}
SPLIT_NAMES = {**{name: name for name in SPLITS}, "validation": "val", "valid": "val"}
READ_ROWS = 65_536  # of a Parquet file at a time
LOCAL = "file://"


class Row(NamedTuple):
    """A row as it is written; `where` is what a person calls it."""

    where: str
    path: Any
    label: Any
    split: Any


class ListedFiles(Source):
    """The images of a list.

    Parameters
    ----------
    address
        Path or URL of the list.
    """

    def __init__(self, address: str) -> None:
        if is_url(address):
            check_url(address)
        self.name = address
        self.address = address if is_url(address) else str(Path(address).absolute())
        self.readers = READERS if is_url(address) else 1
        self._folder = self.address.rpartition("/")[0]
        self._others: frozenset[str] | None = None  # what the list names outside its folder
        self._seen: dict[str, Seen] = {}
        self._looked = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": {}}

    def settle(self) -> Source:
        """The same, if the list is there."""
        if not exists(self.address):
            raise DatasetError(f"no list at {self}: expected {KINDS}, found nothing")
        return self

    def find(self) -> Found:
        """The rows of the list, in its order."""
        rows: dict[str, list[tuple[str, str]]] = {}
        first: dict[str, str] = {}
        with closing(read_rows(self.address, self.name)) as lines:
            for row in lines:
                path = self._name_path(row)
                if path in first:
                    raise DatasetError(
                        f"{self}: {row.where} has the path {shorten(row.path)}, as {first[path]} has: expected each "
                        f"image once; take one of them out"
                    )
                first[path] = row.where
                label = check_label(row.label, f"{self}: the label of {row.where}")
                rows.setdefault(read_split(row, self.name), []).append((path, label))
        if not first:
            raise DatasetError(f"{self} is empty: expected a row for each image")
        self._others = frozenset(path for path in first if is_url(path))
        if any(not path.startswith(LOCAL) for path in self._others):
            self.readers = READERS
        return Found(settle_splits(rows, self.name))

    def narrow(self, paths: Sequence[str]) -> Source:
        """The same for these images."""
        few = copy.copy(self)
        few._others, few._seen = self._load_others().intersection(paths), {}
        return few

    def _name_path(self, row: Row) -> str:
        """The name of a row's image."""
        where = f"{self}: the path of {row.where}"
        if isinstance(row.path, dict | bytes):
            raise DatasetError(
                f"{where} is data, expected a text; images inside a Parquet file are read from `hf:FOLDER`"
            )
        text = check_path(row.path, where)
        if text.startswith("/") or (is_url(text) and not is_url(strip_local(text))):
            if is_url(self.address):
                raise DatasetError(
                    f"{where} is {shorten(text)}, on whatever machine reads the list: expected one relative to "
                    f"{self._folder}, or a URL"
                )
            text = strip_local(text)
        elif is_url(text):
            try:
                check_url(text)
            except DatasetError as error:
                raise DatasetError(f"{where}: {error}") from error
            return text
        return name_below(self._folder, text)

    def look(self, paths: Sequence[str]) -> tuple[Stats, list[str]]:
        """What file systems and stores say of N images."""
        if not self._seen:
            self._looked = time.time_ns()
        new = {path: self._locate(path) for path in paths if path not in self._seen}
        local = [path for path, place in new.items() if not is_url(place)]
        stats, reasons = look_at_all([new[path] for path in local])
        seen = map(Seen, map(tuple, stats.tolist()), [""] * len(local), reasons)
        self._seen |= dict(zip(local, seen, strict=True))
        far = [path for path, place in new.items() if is_url(place)]
        self._seen |= dict(zip(far, look_at_urls([new[path] for path in far]), strict=True))
        return gather_seen([self._seen[path] for path in paths])

    def forget(self) -> None:
        """Look at the images anew the next time."""
        self._seen = {}

    def read(self, path: str) -> bytes:
        """The bytes of an image that the list names."""
        if is_url(path) and path not in self._load_others():
            raise FileNotFoundError(f"{self} names no {path}")
        place = self._locate(path)
        return read_url(place) if is_url(place) else Path(place).read_bytes()

    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """What will stand for an image's bytes, if they are those that were spoken of."""
        seen, place = self._seen.get(path, Seen()), self._locate(path)
        if is_url(place):
            return settle_seen(place, seen, data)
        now, _ = look_at_all([place])
        settled = tuple(now[0].tolist()) == seen.stats and max(seen.stats[2:]) + RACY_NS < self._looked
        return seen.stats if settled else NO_STATS

    def _locate(self, path: str) -> str:
        """Where an image lies: a path of this machine, or a URL."""
        return strip_local(path) if is_url(path) else f"{self._folder}/{path}"

    def _load_others(self) -> frozenset[str]:
        """What the list names outside its folder: whoever names a list in a cache must not name any other file."""
        if self._others is None:
            try:
                self.find()
            except DatasetError as error:
                raise OSError(str(error)) from error
        assert self._others is not None
        return self._others


def name_below(folder: str, path: str) -> str:
    """A path relative to a folder if it lies below it, else as a URL; the same for all that lead to the same place.

    >>> name_below("/photos", "./a/../b.jpg"), name_below("/photos", "../b.jpg"), name_below("s3://b/x/y", "../b.jpg")
    ('b.jpg', 'file:///b.jpg', 's3://b/x/b.jpg')
    >>> name_below("/photos", "//photos//b.jpg"), name_below("//photos", "/b.jpg")
    ('b.jpg', 'file:///b.jpg')
    """
    scheme = re.match(r"[^:/]+://[^/]*", folder) if is_url(folder) else None
    host = scheme[0] if scheme else ""
    base = folder[len(host) :] or "/"
    whole = posixpath.normpath(posixpath.join(base, path))
    if not host:  # two slashes at the start stay there otherwise; in a store that is another name
        base, whole = (re.sub("^//+", "/", text) for text in (base, whole))
    start = base.rstrip("/") + "/"
    if whole.startswith(start):
        return whole[len(start) :]
    return (host or LOCAL) + whole


def read_split(row: Row, where: str) -> str:
    """The split of a row; "" if the list has none."""
    if row.split is None:
        return ""
    name = SPLIT_NAMES.get(row.split.strip().lower()) if isinstance(row.split, str) else None
    if name is None:
        raise DatasetError(f"{where}: the split of {row.where} is {show_value(row.split)}, expected train, val or test")
    return name


def settle_splits(rows: dict[str, list[tuple[str, str]]], where: str) -> dict[str, list[tuple[str, str]]]:
    """Splits in their order; without one to validate on, contents will decide who of the training rows does.

    Raises
    ------
    DatasetError
        If there are splits, and none to train on.
    """
    if "" not in rows and "train" not in rows:
        raise DatasetError(f"{where} has no train rows, only {', '.join(rows)}: expected train and val")
    if "val" not in rows and "train" in rows:
        rows = {"": rows["train"]} | {name: found for name, found in rows.items() if name != "train"}
    return {name: rows[name] for name in ("", *SPLITS) if name in rows}


def read_rows(address: str, name: str) -> Generator[Row, None, None]:
    """The rows of a list.

    Parameters
    ----------
    address, name
        Where it lies, and what the user calls it.

    Raises
    ------
    DatasetError
        If it cannot be read, or a column is missing.
    MissingExtraError
        If it is a Parquet file and pyarrow is not installed.
    """
    kind = posixpath.splitext(address)[1].lower()
    readers: dict[str, Callable[[IO[bytes], str], Iterator[Row]]] = {".csv": read_text, ".tsv": read_text}
    read = {".parquet": read_parquet, ".jsonl": read_json_lines, ".ndjson": read_json_lines, **readers}[kind]
    with explain_errors(name), open_binary(address) as file:
        yield from read(file, name)


def read_text(file: IO[bytes], name: str) -> Iterator[Row]:
    """The rows of a .csv or .tsv file."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        names, lines = read_lines(text, name)
        columns = choose_columns(names, name)
        at = [names.index(columns[role]) if role in columns else None for role in COLUMNS]
        for number, fields in lines:
            yield Row(f"line {number}", *(None if i is None else fields[i] for i in at))


def read_json_lines(file: IO[bytes], name: str) -> Iterator[Row]:
    """The rows of a file with a JSON object in each line; the first one says which columns there are."""
    columns: dict[str, str] = {}
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            values = read_object(line, f"{name}, line {number}")
            columns = columns or choose_columns(list(values), name)
            found = [values.get(columns[role]) if role in columns else None for role in COLUMNS]
            if "split" in columns and found[2] is None:
                raise DatasetError(f"{name}: line {number} has no {columns['split']}, as the first line has")
            yield Row(f"line {number}", *found)


def read_object(line: str, where: str) -> dict[str, Any]:
    """A JSON object."""
    values = read_json(line, where)
    if not isinstance(values, dict):
        raise DatasetError(f"{where} is no object: expected one with path and label in each line")
    return values


def read_parquet(file: IO[bytes], name: str) -> Iterator[Row]:
    """The rows of a Parquet file."""
    start = 0
    with open_parquet(file, name) as table:
        names = list(table.schema_arrow.names)
        check_names(names, name)
        columns = choose_columns(names, name)
        for batch in table.iter_batches(READ_ROWS, columns=list(columns.values())):
            values = [
                batch.column(columns[role]).to_pylist() if role in columns else [None] * len(batch) for role in COLUMNS
            ]
            for i, found in enumerate(zip(*values, strict=True), start):
                if "split" in columns and found[2] is None:
                    raise DatasetError(f"{name}: the split of row {i} is missing, expected train, val or test")
                yield Row(f"row {i}", *found)
            start += len(batch)


def choose_columns(there: Sequence[str], name: str) -> dict[str, str]:
    """Which column holds the path, the label and the split.

    Raises
    ------
    DatasetError
        If path or label is missing, or more than one column could be meant.
    """
    chosen: dict[str, str] = {}
    for role, usual in COLUMNS.items():
        found = [one for one in usual if one in there]
        if len(found) > 1 and found[0] != usual[0]:
            raise DatasetError(f"{name} has the columns {' and '.join(found)}: call the one that is meant {usual[0]}")
        if found:
            chosen[role] = found[0]
        elif role != "split":
            raise DatasetError(f"{name} has no column {role}: expected {', '.join(usual)}; {list_columns(there)}")
    return chosen
