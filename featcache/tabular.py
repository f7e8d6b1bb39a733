"""Rows of CSV, JSON and Parquet files: headers checked, lines counted, errors in one line.

Knows no features and no labels. Nothing in a table is ever executed: no pickle is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from featcache.errors import DatasetError, shorten
from featcache.extras import import_extra

# What numpy, pyarrow and the containers below them raise for files that are not what they seem.
UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, SyntaxError, OverflowError, RuntimeError, MemoryError),
    *(EOFError, OSError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)


def list_columns(there: Sequence[str], at_most: int = 8) -> str:
    """The names of a table's columns, in words."""
    shown = ", ".join(shorten(str(name)) for name in there[:at_most]) + (
        f" and {len(there) - at_most} more" if len(there) > at_most else ""
    )
    return f"its columns are {shown}" if there else "it has no columns"


def check_names(names: Sequence[str], path: Path | str) -> None:
    """Raise a DatasetError if columns have no name, share one, or are an index that pandas wrote."""
    for i, name in enumerate(names, 1):
        if not name.strip() or name.startswith("__index_level_"):
            raise DatasetError(
                f"column {i} of {path} has no name: expected one for each; (pandas writes its index without "
                f"index=False)"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(
            f"{path} has more than one column {', '.join(map(shorten, twice))}: expected different names"
        )


def check_header(names: Sequence[str], path: Path | str) -> None:
    """Raise a DatasetError if the first line of a text table does not name its columns."""
    if not names:
        raise DatasetError(f"{path} is empty: expected a first line with the names of the columns")
    with contextlib.suppress(ValueError):
        _ = [float(name) for name in names]
        raise DatasetError(f"the first line of {path} holds numbers: expected the names of the columns; add them")
    check_names(names, path)


def read_lines(file: IO[str], path: Path | str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of the columns of a .csv or .tsv file, and number and fields of each line after that."""
    reader = csv.reader(file, delimiter="\t" if str(path).lower().endswith(".tsv") else ",", strict=True)
    names = next(reader, [])
    check_header(names, path)
    return names, iterate_lines(reader, len(names), path)


def iterate_lines(reader: Any, n_fields: int, path: Path | str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row; empty lines are the end of the file."""
    empty = 0
    for fields in reader:
        if not fields:
            empty = empty or reader.line_num
            continue
        if empty:
            raise DatasetError(f"{path}, line {empty} is empty, and rows follow: fill it or take it out")
        if len(fields) != n_fields:
            raise DatasetError(
                f"{path}, line {reader.line_num} has {len(fields)} fields: expected {n_fields}, as in the first line"
            )
        yield reader.line_num, fields


def read_json(text: str, where: str) -> Any:
    """What a text in JSON holds. Raises a DatasetError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of an integer with thousands of digits it is no JSONDecodeError
        reason = first_line(error).partition(";")[0]
        raise DatasetError(f"{where} is no JSON ({reason}): expected an object; write it again") from error


@contextlib.contextmanager
def open_parquet(source: Path | IO[bytes], path: Path | str) -> Iterator[Any]:
    """A Parquet file as `pyarrow.parquet.ParquetFile`, whose errors are told of in one line.

    Raises
    ------
    MissingExtraError
        If pyarrow is not installed.
    DatasetError
        If it cannot be read.
    """
    pyarrow = import_extra("pyarrow", extra="parquet", what=f"reading {path} needs")
    parquet = import_extra("pyarrow.parquet", extra="parquet", what=f"reading {path} needs")
    try:
        with parquet.ParquetFile(source) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path} cannot be read as a Parquet table ({first_line(error)})") from error


@contextlib.contextmanager
def explain_errors(path: Path | str) -> Iterator[None]:
    """Whatever a strange file can raise, as one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error.reason}): write it as UTF-8") from error
    except csv.Error as error:
        raise DatasetError(f"{path} cannot be read as a table ({error})") from error
    except UNREADABLE as error:
        reason = first_line(error)
        if "pickle" in reason or "Python objects" in reason:
            reason = "it holds Python objects, which featcache never loads: save an array of numbers or texts"
        raise DatasetError(f"{path} cannot be read as a table ({reason})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
