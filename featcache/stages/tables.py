"""A table of features that were made elsewhere, opened: numbers row by row, and what stands beside them in columns.

==========  ==========================================================================================================
.npy        features (N, D), mapped: only the rows that are asked for are read
.npz        arrays "features" or "X", "labels" or "y", perhaps "paths" and "split"; read into memory
.csv, .tsv  columns "label", perhaps "path" and "split"; all others are features, in their order
.parquet    the same, or all features in one list-typed column "features"; needs the extra featcache[parquet]
==========  ==========================================================================================================

CSV and Parquet are read once, in pieces, into a nameless file of float32 rows that is mapped. Nothing in a table is
ever executed: no pickle is loaded. Knows nothing of classes, images and caches.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.config import ImportConfig
from featcache.errors import DatasetError, OutputError
from featcache.progress import Progress
from featcache.tabular import check_names, explain_errors, iterate_lines, list_columns, open_parquet, read_lines

EXTENSIONS = (".npy", ".npz", ".csv", ".tsv", ".parquet")
LIST_EXTENSIONS = (".npy", ".csv", ".txt")
ROLES = ("labels", "paths", "split")
COLUMN_NAMES = {"labels": ("label",), "paths": ("path",), "split": ("split",)}
ARRAY_NAMES = {"labels": ("labels", "y"), "paths": ("paths",), "split": ("split",)}
FEATURE_ARRAYS = ("features", "X")
READ_ROWS = 4096  # of a text or Parquet table at a time

NameOf = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """N rows of D features, and the columns beside them.

    Attributes
    ----------
    path
        The file.
    features
        (N, D) of any type of number, mapped where that is possible.
    layer
        Which of the table's columns or arrays the features are, in words.
    columns
        N values of each of "labels", "paths" and "split" that there is, from the table or from a file beside it.
    origins
        Where each of them came from: the column's name, or the file's absolute path.
    name_row, name_column
        What a person calls row i and feature j.
    stamp
        Size and modification time when it was opened.
    """

    path: Path
    features: NDArray[Any]
    layer: str
    columns: dict[str, list[Any]]
    origins: dict[str, str] = field(default_factory=dict)
    name_row: NameOf
    name_column: NameOf
    stamp: tuple[int, int]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.features.shape[1])

    def read_rows(self, rows: NDArray[np.intp], store: str) -> NDArray[np.float32]:
        """Features (n, D) of these rows, all of them finite numbers, in the precision `store` too.

        Raises
        ------
        DatasetError
            If one is not, or the table has changed since it was opened.
        """
        values = to_float32(
            self.features[rows], store, self.path, lambda i: self.name_row(int(rows[i])), self.name_column
        )
        if read_stamp(self.path) != self.stamp:
            raise DatasetError(f"{self.path} has changed while it was read; run the same command again")
        return values


def open_table(path: Path, config: ImportConfig, progress: Progress, scratch: Path) -> Table:
    """Open a table, and the files beside it that the settings name.

    Parameters
    ----------
    path
        The table.
    config
        Says where labels, paths and split are.
    progress
        Told what is taken where more than one thing could be meant, and what is left out.
    scratch
        A folder for the nameless file.

    Raises
    ------
    DatasetError
        If it is not a table of features, or a column beside them is missing or of another length.
    MissingExtraError
        If it is a Parquet file and pyarrow is not installed.
    """
    check_table(path)
    kind, stamp = path.suffix.lower(), read_stamp(path)
    if config.array is not None and kind in (".npy", ".csv", ".tsv"):
        raise DatasetError(f"--array {config.array} makes no sense for {path}: expected a .npz or .parquet table")
    with explain_errors(path):
        if kind in (".npy", ".npz"):
            table = (read_npy if kind == ".npy" else read_npz)(path, config, progress, stamp)
        else:
            with Spool(scratch, path) as spool:
                table = (read_parquet if kind == ".parquet" else read_csv)(path, config, progress, stamp, spool)
    if not all(table.features.shape):
        n, dim = table.features.shape
        raise DatasetError(f"{path} is empty: expected at least a row and a feature, found {n} rows of {dim} features")
    for role in ROLES:
        source = getattr(config, role)
        if source is not None and role not in table.columns:
            table.columns[role] = read_list(Path(source), role)
            table.origins[role] = str(Path(source).resolve())
    for role, values in table.columns.items():
        if len(values) != len(table):
            hint = "; is its first line a header?" if len(values) == len(table) + 1 else ""
            raise DatasetError(
                f"{table.origins[role]} has {len(values)} {role}, but {path} has {len(table)} rows of features: "
                f"expected one for each row{hint}"
            )
    return table


def check_table(path: Path) -> None:
    """Raise a DatasetError if there is no file, or its name does not say what it is."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DatasetError(f"no table at {path}: expected a file ending in {' '.join(EXTENSIONS)}, found {found}")
    if path.suffix.lower() not in EXTENSIONS:
        raise DatasetError(
            f"{path} ends in {path.suffix or 'nothing'!r}: expected a table ending in {' '.join(EXTENSIONS)}"
        )


def read_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def to_float32(
    values: NDArray[Any], store: str, path: Path, name_row: NameOf, name_column: NameOf
) -> NDArray[np.float32]:
    """Numbers (n, D) as float32, if all are finite, in the precision `store` too.

    Raises
    ------
    DatasetError
        If one is not; it names the first.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rows: NDArray[np.float32] = np.ascontiguousarray(values, dtype="<f4")
        usable = np.isfinite(rows.astype(store, copy=False))
    if usable.all():
        return rows
    i, j = np.argwhere(~usable)[0].tolist()
    where = f"{path}: {name_column(j)} of {name_row(i)} is {values[i, j]!s}"
    if not np.isfinite(values[i, j]):
        raise DatasetError(f"{where}: expected finite numbers; mend that row or leave it out")
    if np.isfinite(rows[i, j]):
        raise DatasetError(f"{where}: too large for float16; use --store float32")
    raise DatasetError(f"{where}: too large for float32, in which features are kept; scale the features")


# Where the columns beside the features are


def choose_columns(
    config: ImportConfig,
    there: Sequence[str],
    usual: Mapping[str, tuple[str, ...]],
    path: Path,
    progress: Progress,
) -> dict[str, str]:
    """The table's own column for each of labels, paths and split; what is not in it is in a file, or nowhere.

    Raises
    ------
    DatasetError
        If what was named is neither a column nor a file, is named twice, or there are no labels.
    """
    chosen: dict[str, str] = {}
    for role in ROLES:
        name = getattr(config, role)
        found = [one for one in usual[role] if one in there] if name is None else [name] * (name in there)
        if found:
            chosen[role] = found[0]
            if name is not None and Path(name).is_file():
                progress.say(f"--{role} {name} is taken as the column of {path}, not as the file {name}")
        elif name is not None and not Path(name).is_file():
            raise DatasetError(f"--{role} {name} is no column of {path} and no file; {list_columns(there)}")
    if "labels" not in chosen and config.labels is None:
        if not there:
            raise DatasetError(f"{path} has features and no labels: name a file that has them with --labels")
        raise DatasetError(
            f"{path} has no labels: expected a column {' or '.join(usual['labels'])}, or --labels with a column's name "
            f"or a file; {list_columns(there)}"
        )
    if len(set(chosen.values())) < len(chosen):
        raise DatasetError(f"one column of {path} is named for two things: {chosen}; name a column for each")
    return chosen


def _list_numeric(names: Sequence[str], chosen: Mapping[str, str], path: Path, progress: Progress) -> list[int]:
    """Which columns are features: all but those that are, or are called like, labels, paths and split."""
    usual = {name for names in COLUMN_NAMES.values() for name in names}
    left_out = [name for name in names if name in usual and name not in chosen.values()]
    if left_out:
        progress.say(f"{path}: left out, neither features nor asked for: {', '.join(left_out)}")
    beside = {*chosen.values(), *left_out}
    numeric = [i for i, name in enumerate(names) if name not in beside]
    if not numeric:
        raise DatasetError(f"{path} has no features: expected columns of numbers; {list_columns(names)}")
    return numeric


def _say_layer(names: Sequence[str], numeric: Sequence[int]) -> str:
    """Which columns are features, in words that differ if they do."""
    others = [name for i, name in enumerate(names) if i not in set(numeric)]
    return f"as imported, all columns but {', '.join(others)}" if others else "as imported"


# One reader for each kind of table


def read_npy(path: Path, config: ImportConfig, progress: Progress, stamp: tuple[int, int]) -> Table:
    """A .npy file, mapped."""
    choose_columns(config, (), COLUMN_NAMES, path, progress)
    array = np.lib.format.open_memmap(path, mode="r")
    return _make_array_table(path, array, "as imported", {}, {}, stamp)


def read_npz(path: Path, config: ImportConfig, progress: Progress, stamp: tuple[int, int]) -> Table:
    """The arrays of a .npz file, in memory."""
    with path.open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DatasetError(f"{path} is no .npz file: expected one that numpy.savez wrote")
        name = _choose_array(config, file.files, FEATURE_ARRAYS, path)
        chosen = choose_columns(config, [one for one in file.files if one != name], ARRAY_NAMES, path, progress)
        if ignored := [one for one in file.files if one not in (name, *chosen.values())]:
            progress.say(f"{path}: left out, neither features nor asked for: {', '.join(ignored)}")
        columns = {role: _to_list(file[one], f"{one} in {path}") for role, one in chosen.items()}
        return _make_array_table(path, file[name], f"as imported, array {name}", columns, chosen, stamp)


def _choose_array(config: ImportConfig, there: Sequence[str], usual: Sequence[str], path: Path) -> str:
    wanted = usual if config.array is None else (config.array,)
    found = [name for name in wanted if name in there]
    if not found:
        raise DatasetError(
            f"{path} has no array {' or '.join(wanted)} for the features: name it with --array; {list_columns(there)}"
        )
    return found[0]


def _make_array_table(
    path: Path,
    features: NDArray[Any],
    layer: str,
    columns: dict[str, list[Any]],
    chosen: Mapping[str, str],
    stamp: tuple[int, int],
) -> Table:
    if not isinstance(features, np.ndarray) or features.dtype.kind not in "fiub":
        kind = getattr(features, "dtype", "bytes")
        raise DatasetError(f"{path} holds features of type {kind}: expected numbers, integers or floating-point")
    if features.ndim != 2:
        raise DatasetError(
            f"{path} holds features of shape {features.shape}, {features.ndim}-D: expected (N, D), a row for each image"
        )
    return Table(
        path=path,
        features=features,
        layer=layer,
        columns=columns,
        origins=dict(chosen),
        name_row=_name_rows(0),
        name_column=lambda j: f"feature {j}",
        stamp=stamp,
    )


def read_csv(path: Path, config: ImportConfig, progress: Progress, stamp: tuple[int, int], spool: Spool) -> Table:
    """A .csv or .tsv file, read once."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        names, lines = read_lines(file, path)
        chosen = choose_columns(config, names, COLUMN_NAMES, path, progress)
        numeric = _list_numeric(names, chosen, path, progress)
        numbers: list[int] = []

        def name_column(j: int) -> str:
            return f"column {names[numeric[j]]}"

        columns: dict[str, list[Any]] = {role: [] for role in chosen}
        at = {role: names.index(name) for role, name in chosen.items()}
        while block := list(islice(lines, READ_ROWS)):
            for role, column in columns.items():
                column += [fields[at[role]] for _, fields in block]
            rows = _parse_numbers(block, numeric, names, path)
            spool.append(
                to_float32(rows, config.store, path, _name_lines([number for number, _ in block]), name_column)
            )
            numbers += [number for number, _ in block]
    return Table(
        path=path,
        features=spool.finish(len(numeric)),
        layer=_say_layer(names, numeric),
        columns=columns,
        origins=dict(chosen),
        name_row=_name_lines(numbers),
        name_column=name_column,
        stamp=stamp,
    )


def _name_lines(numbers: Sequence[int]) -> NameOf:
    return lambda i: f"line {numbers[i]}"


def _name_rows(start: int) -> NameOf:
    return lambda i: f"row {start + i}"


def _parse_numbers(
    block: Sequence[tuple[int, list[str]]], numeric: Sequence[int], names: Sequence[str], path: Path
) -> NDArray[np.float64]:
    """Features (n, D) of lines of text."""
    try:
        return np.array([[float(fields[i]) for i in numeric] for _, fields in block])
    except ValueError:
        number, i, text = next(
            (number, i, fields[i]) for number, fields in block for i in numeric if not _is_number(fields[i])
        )
        raise DatasetError(
            f"{path}, line {number}: column {names[i]} is {text!r}, expected a number; take the column out if it is "
            f"no feature"
        ) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_parquet(path: Path, config: ImportConfig, progress: Progress, stamp: tuple[int, int], spool: Spool) -> Table:
    """A .parquet file, read once."""
    with open_parquet(path, path) as file:
        return _read_batches(file, path, config, progress, stamp, spool)


def _read_batches(
    file: Any, path: Path, config: ImportConfig, progress: Progress, stamp: tuple[int, int], spool: Spool
) -> Table:
    names = list(file.schema_arrow.names)
    check_names(names, path)
    array = _find_list_column(file.schema_arrow, config, path)
    others = [name for name in names if name != array]
    chosen = choose_columns(config, others, COLUMN_NAMES, path, progress)
    if array is None:
        numeric = [names[i] for i in _list_numeric(names, chosen, path, progress)]
        layer = _say_layer(names, [names.index(name) for name in numeric])
    else:
        numeric, layer = [array], f"as imported, column {array}"
        if ignored := [name for name in others if name not in chosen.values()]:
            progress.say(f"{path}: left out, neither features nor asked for: {', '.join(ignored)}")
    for name in numeric:
        _check_arrow_type(file.schema_arrow.field(name).type, name, path)
    columns: dict[str, list[Any]] = {role: [] for role in chosen}

    def name_column(j: int) -> str:
        return f"feature {j}" if array else f"column {numeric[j]}"

    n_rows = 0
    for batch in file.iter_batches(READ_ROWS, columns=[*numeric, *chosen.values()]):
        for role, name in chosen.items():
            columns[role] += batch.column(name).to_pylist()
        rows = _to_rows(batch, numeric, path, n_rows)
        spool.append(to_float32(rows, config.store, path, _name_rows(n_rows), name_column))
        n_rows += len(rows)
    features = spool.finish(len(numeric))
    return _make_array_table(path, features, layer, columns, chosen, stamp)


def _find_list_column(schema: Any, config: ImportConfig, path: Path) -> str | None:
    """The column that holds all features of a row, if there is one."""
    import pyarrow.types

    lists = [
        field.name
        for field in schema
        if pyarrow.types.is_list(field.type)
        or pyarrow.types.is_large_list(field.type)
        or pyarrow.types.is_fixed_size_list(field.type)
    ]
    if config.array is not None:
        return _choose_array(config, lists, (), path)
    return FEATURE_ARRAYS[0] if FEATURE_ARRAYS[0] in lists else None


def _check_arrow_type(kind: Any, name: str, path: Path) -> None:
    import pyarrow.types

    value = getattr(kind, "value_type", kind)
    if not (
        pyarrow.types.is_integer(value) or pyarrow.types.is_floating(value) or pyarrow.types.is_boolean(value)
    ) or pyarrow.types.is_dictionary(kind):
        raise DatasetError(
            f"column {name} of {path} is of type {kind}: expected numbers; take the column out if it is no feature"
        )


def _to_rows(batch: Any, numeric: Sequence[str], path: Path, start: int) -> NDArray[Any]:
    """Features (n, D) of a piece of a Parquet table."""
    import pyarrow.compute
    import pyarrow.types

    first = batch.column(numeric[0])
    nested = pyarrow.types.is_nested(first.type)
    values = [first.flatten()] if nested else [batch.column(name) for name in numeric]
    for name, column in zip(numeric, [first] if nested else values, strict=True):
        if column.null_count:
            row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise DatasetError(f"{path}: column {name} of row {row} is missing: expected numbers in every row")
    if not nested:
        return np.stack([column.to_numpy(zero_copy_only=False) for column in values], axis=1)
    lengths = pyarrow.compute.list_value_length(first).to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any() or values[0].null_count:
        raise DatasetError(
            f"{path}: the lists in {numeric[0]} have {int(lengths.min())} to {int(lengths.max())} values, "
            f"{values[0].null_count} of them missing: expected the same number in every row"
        )
    flat: NDArray[Any] = values[0].to_numpy(zero_copy_only=False)
    return flat.reshape(len(first), int(lengths[0]))


# Lists, in a file or an array


def read_list(path: Path, role: str) -> list[Any]:
    """The values of a file: .npy of one dimension, or a line each in .csv and .txt.

    Raises
    ------
    DatasetError
        If it is neither.
    """
    kind = path.suffix.lower()
    if kind not in LIST_EXTENSIONS:
        raise DatasetError(f"--{role} {path}: expected a file ending in {' '.join(LIST_EXTENSIONS)}")
    with explain_errors(path):
        if kind == ".npy":
            with path.open("rb") as stream:
                return _to_list(np.load(stream, allow_pickle=False), str(path))
        if kind == ".txt":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            return lines[: -1 if lines[-1] == "" else None]
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [fields[0] for _, fields in iterate_lines(csv.reader(file, strict=True), 1, path)]


def _to_list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "USiubf":
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "no array"
        raise DatasetError(f"{where} is {found}: expected texts or integers of shape (N,)")
    return list(values.tolist())


class Spool:
    """Rows (N, D) float32 in a nameless file, which goes when the process does. Closed, what was mapped stays."""

    def __init__(self, folder: Path, table: Path) -> None:
        self._rows, self._dim, self._table = 0, 0, table
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: NDArray[np.float32]) -> None:
        """Write n more rows.

        Raises
        ------
        DatasetError
            If they are of another width.
        OutputError
            If there is no room for them.
        """
        self._dim = self._dim or rows.shape[1]
        if rows.shape[1] != self._dim:
            raise DatasetError(
                f"{self._table}: row {self._rows} has {rows.shape[1]} features, those before it {self._dim}"
            )
        try:
            self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot keep the rows of {self._table} for a while: {reason}") from error
        self._rows += len(rows)

    def finish(self, dim: int) -> NDArray[np.float32]:
        """All rows, mapped; (0, dim) if there are none."""
        if not self._rows or not self._dim:
            return np.empty((self._rows, self._dim or dim), np.float32)
        shape = (self._rows, self._dim)
        mapped: NDArray[np.float32] = np.memmap(self._file, dtype=np.float32, mode="r", shape=shape)
        return mapped
