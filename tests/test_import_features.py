"""featcache.stages.import_features: features made elsewhere in every kind of table, and what may be wrong with it."""

from __future__ import annotations

import csv
import os
import pickle
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, TinyFamily
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import featcache
from featcache.cache import FeatureCache, open_cache, read_cache
from featcache.cache.lock import hold_output
from featcache.cache.reading import check_complete, format_command
from featcache.dataset import dataset_fingerprint
from featcache.errors import (
    CacheError,
    DatasetError,
    FeatcacheError,
    MissingExtraError,
    OutputBusyError,
    OutputError,
    RunError,
    SettingsError,
    StaleCacheError,
)
from featcache.progress import Progress

Cli = Callable[..., Outcome]
TINY = {"backbone": "tiny", "weights": "none"}
N, D = 60, 5


class Told(Progress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder."""
    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")


def list_names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def make_rows(n: int = N) -> tuple[NDArray[np.float32], list[str]]:
    """Features that tell three classes apart, and their labels."""
    labels = np.arange(n) % 3
    features = np.random.default_rng(0).normal(size=(n, D)) + 6 * np.eye(3, D)[labels]
    return features.astype(np.float32), [("ant", "bee", "cow")[label] for label in labels]


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]], **style: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **style).writerows([names, *rows])
    return path


def write_table(kind: str, features: NDArray[Any], **columns: Sequence[Any]) -> tuple[Path, dict[str, str]]:
    """A table of some kind with columns label, path, split; the settings that find them."""
    names, path = [f"f{j}" for j in range(features.shape[1])], Path(f"table.{kind.partition(' ')[0]}")
    if kind == "npy":
        np.save(path, features)
        for name, values in columns.items():
            Path(f"{name}.txt").write_text("".join(f"{value}\n" for value in values), encoding="utf-8")
        return path, {("split" if name == "split" else f"{name}s"): f"{name}.txt" for name in columns}
    if kind == "npz":
        arrays = {("split" if name == "split" else f"{name}s"): np.array(values) for name, values in columns.items()}
        np.savez(path, features=features, **arrays)
    elif kind in ("csv", "tsv"):
        rows = [[*beside, *row] for *beside, row in zip(*columns.values(), features.tolist(), strict=True)]
        write_csv(path, [*columns, *names], rows, delimiter="\t" if kind == "tsv" else ",")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        numbers = dict(zip(names, features.T, strict=True))
        if "list" in kind:
            flat = pyarrow.array(features.reshape(-1))
            numbers = {"features": pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1])}
        pyarrow.parquet.write_table(pyarrow.table({**columns, **numbers}), path)
    return path, {}


KINDS = ("npy", "npz", "csv", "tsv", "parquet", "parquet list")


def gather(cache: FeatureCache) -> dict[str, tuple[str, str, bytes]]:
    """Path -> split, label and features of every row."""
    return {
        path: (name, cache.classes[label], np.asarray(split.features[i]).tobytes())
        for name, split in cache.splits.items()
        for i, (path, label) in enumerate(zip(split.listing.paths, split.listing.labels.tolist(), strict=True))
    }


# What is in the table is in the cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_every_kind_becomes_the_same_rows(kind: str) -> None:
    features, labels = make_rows()
    table, where = write_table(kind, features, label=labels)
    imported = featcache.import_features(table, "f.h5", **where)
    rows = gather(read_cache("f.h5"))
    assert (imported.path, imported.reused, len(imported.cache)) == (Path("f.h5"), False, N)
    assert {path: row[1:] for path, row in rows.items()} == {
        f"row-{i:07d}": (labels[i], features[i].tobytes()) for i in range(N)
    }
    assert imported.cache.splits["val"].listing.digests == tuple(
        featcache.cache.reading.hash_bytes(imported.cache.splits["val"].features[i].tobytes())
        for i in range(len(imported.cache.splits["val"]))
    )
    check_complete(imported.cache, "f.h5")
    assert featcache.verify_cache("f.h5")


def test_all_kinds_of_tables_are_split_alike() -> None:
    features, labels = make_rows()
    validation = set()
    for kind in KINDS:
        table, where = write_table(kind, features, label=labels)
        cache = featcache.import_features(table, f"{kind}.h5", **where).cache
        validation.add(cache.splits["val"].listing.paths)
        assert all(set(split.listing.labels.tolist()) == {0, 1, 2} for split in cache.splits.values())
    assert len(validation) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_split_is_kept_in_the_order_of_the_rows(kind: str) -> None:
    features, labels = make_rows()
    given_split = [("train", "train", "validation", "test")[i // 3 % 4] for i in range(N)]
    table, where = write_table(kind, features, label=labels, path=[f"a/{i}.jpg" for i in range(N)], split=given_split)
    cache = featcache.import_features(table, "f.h5", **where).cache
    for name, said in {"train": "train", "val": "validation", "test": "test"}.items():
        expected = [i for i in range(N) if given_split[i] == said]
        assert cache.splits[name].listing.paths == tuple(f"a/{i}.jpg" for i in expected)
        assert np.asarray(cache.splits[name].features).tobytes() == features[expected].tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=hnp.arrays(
        np.float32,
        st.tuples(st.integers(8, 20), st.integers(1, 4)),
        elements=st.floats(-(2.0**120), 2.0**120, width=32),
        unique=True,
    ),
    kind=st.sampled_from(("npy", "npz", "csv")),
)
def test_numbers_come_back_bit_by_bit(features: NDArray[np.float32], kind: str) -> None:
    labels = [f"class {i % 2}, \u00fc" for i in range(len(features))]
    table, where = write_table(kind, features, label=labels)
    featcache.import_features(table, "f.h5", force=True, **where)
    rows = gather(read_cache("f.h5"))
    assert [row[1:] for _, row in sorted(rows.items())] == [
        (label, row.tobytes()) for label, row in zip(labels, features, strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "int16", "bool"])
def test_any_type_of_number_is_kept_as_float32(dtype: str) -> None:
    features = np.maximum(np.random.default_rng(0).normal(size=(N, D)) * 20, 0).astype(dtype)
    np.save("t.npy", np.asfortranarray(features))
    np.save("y.npy", np.arange(N) % 2)
    featcache.import_features("t.npy", "f.h5", labels="y.npy")
    rows = gather(read_cache("f.h5"))
    assert all(rows[f"row-{i:07d}"][2] == features[i].astype("<f4").tobytes() for i in range(N))


def test_a_mapped_table_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("t.npy", np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32))
    np.save("y.npy", np.arange(300) % 2)
    read: list[int] = []
    original = featcache.stages.tables.Table.read_rows

    def watch(table: Any, rows: NDArray[np.intp], store: str) -> NDArray[np.float32]:
        assert isinstance(table.features, np.memmap)
        read.append(len(rows))
        return original(table, rows, store)

    monkeypatch.setattr("featcache.stages.tables.Table.read_rows", watch)
    monkeypatch.setattr("featcache.stages.import_features.PIECE_BYTES", 40 * 4 * 16)
    featcache.import_features("t.npy", "f.h5", labels="y.npy")
    assert max(read[:-2]) == 16
    assert sum(read) == 600


def test_long_tables_of_text_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.stages.tables.READ_ROWS", 7)
    features, labels = make_rows()
    for kind in ("csv", "parquet", "parquet list"):
        table, _ = write_table(kind, features, label=labels)
        rows = gather(featcache.import_features(table, f"{kind}.h5").cache)
        assert [row[2] for _, row in sorted(rows.items())] == [row.tobytes() for row in features]


def test_a_head_trains_on_it_and_says_what_it_does_not_know() -> None:
    features, labels = make_rows(120)
    table, where = write_table("npy", features, label=labels)
    featcache.import_features(table, "f.h5", name="clip", **where)
    record = featcache.train_head("f.h5", "head").record
    assert record.val_accuracy == 1.0
    assert record.title.endswith("on imported clip features")
    assert "extraction" not in record.seconds
    assert "what it cost to make them is not known" in record.notes[0]


# Labels


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.arange(N) % 11, tuple(str(i) for i in range(11))),
        (np.arange(N) % 11 - 1.0, tuple(str(i) for i in range(-1, 10))),
        (np.arange(N) % 2 == 0, ("False", "True")),
        (np.array(["b", "a"] * (N // 2)), ("a", "b")),
        (np.array([b"b", "\u00e4".encode()] * (N // 2)), ("b", "\u00e4")),
    ],
)
def test_labels_may_be_integers_or_texts(labels: NDArray[Any], classes: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    np.savez("t.npz", X=rng.normal(size=(N, D)), y=labels)
    assert featcache.import_features("t.npz", "f.h5").cache.classes == classes


def test_integers_in_text_are_sorted_as_numbers_too() -> None:
    features, _ = make_rows()
    table, where = write_table("csv", features, label=[str(i % 12) for i in range(N)])
    assert featcache.import_features(table, "f.h5", **where).cache.classes == tuple(map(str, range(12)))


def test_a_column_is_taken_before_a_file_of_the_same_name_and_that_is_said() -> None:
    features, labels = make_rows()
    table, _ = write_table("csv", features, species=labels)
    Path("species").write_text("x\n")
    told = Told()
    cache = featcache.import_features(table, "f.h5", labels="species", progress=told).cache
    assert cache.classes == ("ant", "bee", "cow")
    assert "--labels species is taken as the column of table.csv, not as the file species" in told.lines


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.npy"])
def test_a_file_beside_the_table_takes_the_place_of_its_column(name: str) -> None:
    features, labels = make_rows()
    table, _ = write_table("csv", features, label=["x"] * N)
    if name == "l.npy":
        np.save(name, labels)
    else:
        Path(name).write_text("\ufeff" + "\r\n".join(labels) + "\r\n", encoding="utf-8")
    told = Told()
    cache = featcache.import_features(table, "f.h5", labels=name, progress=told).cache
    assert (cache.classes, cache.dim) == (("ant", "bee", "cow"), D)
    assert "table.csv: left out, neither features nor asked for: label" in told.lines


def test_arrays_of_any_name_can_be_named_and_others_are_left_out() -> None:
    features, labels = make_rows()
    np.savez("t.npz", emb=features, X=features[:, :2], target=labels, ids=np.arange(N))
    told = Told()
    cache = featcache.import_features("t.npz", "f.h5", array="emb", labels="target", progress=told).cache
    assert cache.dim == D
    assert "t.npz: left out, neither features nor asked for: X, ids" in told.lines
    with pytest.raises(StaleCacheError, match="layer: as imported, array emb -> as imported, array X"):
        featcache.import_features("t.npz", "f.h5", labels="target")


# Images


def list_photos(root: Path) -> list[tuple[str, str, str]]:
    """Path, class and split of every photograph of a folder with splits."""
    return [
        (path.relative_to(root).as_posix(), path.parent.name, path.parts[-3]) for path in sorted(root.rglob("*.jpg"))
    ]


def describe_photos(photos: Path, **changes: Any) -> Path:
    """A table of features of photographs, that names them."""
    rows = list_photos(photos)
    rng = np.random.default_rng(0)
    body = [[*row, *(rng.normal(size=D) + 9 * (row[1] == "red")).tolist()] for row in rows]
    return write_csv(Path("t.csv"), ["path", "label", "split", *"abcde"], body)


def test_rows_of_images_are_known_by_the_images(photos: Path, cli: Cli, tiny: type[TinyFamily]) -> None:
    cache = featcache.import_features(describe_photos(photos), "f.h5", data=photos).cache
    listing = featcache.list_dataset(photos)
    assert cache.provenance["data"] == str(photos.resolve())
    for name, split in listing.splits.items():
        there = cache.splits[name].listing
        assert dataset_fingerprint(there, cache.classes) == dataset_fingerprint(split, listing.classes)
    featcache.train_head("f.h5", "runs/head")
    featcache.finetune(photos, "runs/finetune", epochs=1, **TINY)
    outcome = cli("compare", "runs/head", "runs/finetune")
    assert outcome.code == 0, outcome.err
    assert "without what it took to make the features of head" in outcome.out
    assert cli("show", "runs/head").code == 0


def test_images_without_a_split_are_split_as_their_folder_is(flat_photos: Path) -> None:
    paths = sorted(path.relative_to(flat_photos).as_posix() for path in flat_photos.rglob("*.jpg"))
    features = np.random.default_rng(0).normal(size=(len(paths), D))
    np.savez("t.npz", X=features, y=[path.partition("/")[0] for path in paths], paths=[f"./{path}" for path in paths])
    cache = featcache.import_features("t.npz", "f.h5", data=flat_photos, val_fraction=0.3, seed=3).cache
    wanted = featcache.list_dataset(flat_photos, val_fraction=0.3, seed=3)
    assert {name: split.listing.paths for name, split in cache.splits.items()} == {
        name: split.paths for name, split in wanted.splits.items()
    }


def test_images_are_looked_for_beside_the_table(photos: Path) -> None:
    table = describe_photos(photos).rename(photos / "t.csv")
    cache = featcache.import_features(table, "f.h5").cache
    assert cache.listing.digests() == featcache.list_dataset(photos).digests()


def test_an_absolute_path_below_the_data_is_made_relative(photos: Path) -> None:
    table = describe_photos(photos)
    text = table.read_text().replace("\ntrain/", f"\n{photos}/train/").replace("\nval/", f"\n{photos}/val/")
    table.write_text(text)
    cache = featcache.import_features(table, "f.h5", data=photos).cache
    assert cache.splits["val"].listing.paths[0] == "val/blue/photo_000.jpg"
    with pytest.raises(DatasetError, match="expected one below"):
        featcache.import_features(table, "g.h5")


def test_one_missing_image_is_named(photos: Path) -> None:
    table = describe_photos(photos)
    (photos / "train/red/photo_002.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of 18 images .* the first: .*train/red/photo_002.jpg is not there"):
        featcache.import_features(table, "f.h5", data=photos)


def test_a_stated_folder_without_any_image_is_an_error(photos: Path, tmp_path: Path) -> None:
    table = describe_photos(photos)
    with pytest.raises(DatasetError, match="18 of 18 images"):
        featcache.import_features(table, "f.h5", data=tmp_path)
    with pytest.raises(DatasetError, match="no folder at nowhere"):
        featcache.import_features(table, "f.h5", data="nowhere")
    told = Told()
    featcache.import_features(table, "f.h5", progress=told)
    assert "none of the images of t.csv is under .: rows are known by their features alone" in told.lines


# What lies at the output


@pytest.fixture
def table() -> Path:
    """A good table, imported into f.h5."""
    features, labels = make_rows()
    path, _ = write_table("csv", features, label=labels)
    featcache.import_features(path, "f.h5")
    return path


def test_the_same_table_again_is_not_written_again(table: Path) -> None:
    before = Path("f.h5").stat().st_mtime_ns
    assert featcache.import_features(table, "f.h5").reused
    assert Path("f.h5").stat().st_mtime_ns == before
    assert list_names() == ["f.h5", "table.csv"]


def test_other_labels_for_the_same_table_are_written(table: Path) -> None:
    Path("l.txt").write_text("a\nb\n" * (N // 2))
    again = featcache.import_features(table, "f.h5", labels="l.txt")
    assert (again.reused, again.cache.classes) == (False, ("a", "b"))
    Path("l.txt").write_text("a\nc\n" * (N // 2))
    assert featcache.import_features(table, "f.h5", labels="l.txt").cache.classes == ("a", "c")


def test_another_table_is_refused_without_force(table: Path) -> None:
    content = Path("f.h5").read_bytes()
    table.write_text(table.read_text().replace("ant", "art"))
    with pytest.raises(StaleCacheError, match=r"made from something else \(weights: .* or replace it with --force"):
        featcache.import_features(table, "f.h5")
    assert Path("f.h5").read_bytes() == content
    assert featcache.import_features(table, "f.h5", force=True).cache.classes == ("art", "bee", "cow")


def test_a_damaged_cache_is_mended_by_the_command_that_is_named(table: Path, cli: Cli) -> None:
    content = bytearray(Path("f.h5").read_bytes())
    at = bytes(content).index(open_cache("f.h5").splits["train"].features[3].tobytes())
    content[at] ^= 255
    Path("f.h5").write_bytes(content)
    outcome = cli("cache", "verify", "f.h5")
    assert outcome.code == 1
    command = outcome.err.split("`")[1]
    assert cli(*shlex.split(command)[1:]).code == 0
    assert featcache.verify_cache("f.h5")


def test_the_named_command_says_everything_that_was_said(cli: Cli) -> None:
    features, labels = make_rows()
    table, _ = write_table("npy", features, label=labels)
    table.rename("my table.npy")
    options = ("--labels", "label.txt", "--name", "my net", "--val-fraction", "0.4", "--store", "float16")
    assert cli("import", "my table.npy", "-o", "f.h5", *options).code == 0
    command = shlex.split(format_command(Path("f.h5"), open_cache("f.h5").provenance))
    assert command[:5] == ["featcache", "import", str(Path("my table.npy").resolve()), "-o", "f.h5"]
    output = str(Path("f.h5").resolve())
    os.chdir("/")
    assert "imported already" in cli(*command[1:4], output, *command[5:]).out
    assert {"--labels", "--name", "--val-fraction", "--store"} == {word for word in command if word.startswith("--")}


@pytest.mark.parametrize("force", [False, True])
def test_a_strangers_file_is_never_overwritten(table: Path, force: bool) -> None:
    Path("mine.h5").write_bytes(b"mine")
    with pytest.raises(CacheError, match="cannot be read as a feature cache"):
        featcache.import_features(table, "mine.h5", force=force)
    with pytest.raises(CacheError):
        featcache.import_features(table, table, force=force)
    assert Path("mine.h5").read_bytes() == b"mine"


def test_an_extraction_refuses_an_imported_cache_and_leaves_it(
    table: Path, photos: Path, tiny: type[TinyFamily]
) -> None:
    content = Path("f.h5").read_bytes()
    with pytest.raises(
        StaleCacheError, match=r"made by another extractor: its features are imported, from .*table\.csv"
    ):
        featcache.extract_features(photos, "f.h5", **TINY)
    with pytest.raises(StaleCacheError, match="cannot be reused: backbone: imported -> tiny"):
        featcache.extract_features(photos, "g.h5", reuse=("f.h5",), **TINY)
    with pytest.raises(CacheError, match="holds imported features"):
        featcache.compare(photos, features="f.h5")
    assert Path("f.h5").read_bytes() == content
    explanation = featcache.explain_cache(photos, "f.h5", **TINY)
    assert explanation.plan.decision == "refuse"
    assert featcache.extract_features(photos, "f.h5", force=True, **TINY).computed == 18


def test_an_import_refuses_an_extracted_cache(table: Path, photos: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, "g.h5", **TINY)
    with pytest.raises(StaleCacheError, match="backbone: tiny -> imported"):
        featcache.import_features(table, "g.h5")


def test_one_at_a_time_writes_an_output(table: Path) -> None:
    with hold_output(Path("g.h5")), pytest.raises(OutputBusyError):
        featcache.import_features(table, "g.h5")


def test_a_failure_while_writing_leaves_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rows: Any, part: slice) -> NDArray[np.float32]:
        raise DatasetError("changed")

    monkeypatch.setattr("featcache.stages.import_features.TableRows.__getitem__", fail)
    with pytest.raises(DatasetError):
        featcache.import_features(table, "g.h5")
    assert list_names() == ["f.h5", "table.csv"]


def test_a_table_that_changes_meanwhile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("t.npy", make_rows()[0])
    np.save("y.npy", np.arange(N) % 2)
    monkeypatch.setattr("featcache.stages.import_features.listing_paths", lambda *_: os.utime("t.npy", (1, 1)) or ())
    with pytest.raises(DatasetError, match=r"t\.npy has changed while it was read"):
        featcache.import_features("t.npy", "f.h5", labels="y.npy")


def test_a_head_on_imported_features_cannot_label_images(table: Path, photos: Path) -> None:
    head = featcache.train_head("f.h5", "head").folder
    with pytest.raises(RunError, match="needs the network that made them, which featcache does not know"):
        featcache.predict(head, [photos])
    with pytest.raises(RunError, match="its features are imported"):
        featcache.show(head)


# What may be wrong with a table


def npy(array: Any, labels: Any = None) -> dict[str, str]:
    np.save("t.npy", array)
    Path("l.txt").write_text("a\nb\n" * (len(array) // 2 if labels is None else labels))
    return {"table": "t.npy", "labels": "l.txt"}


def text(content: str, name: str = "t.csv") -> dict[str, str]:
    Path(name).write_text(content)
    return {"table": name}


def rows_with(value: str) -> str:
    return "label,x,y\n" + "a,1,2\nb,3,4\n" * 4 + f"a,5,{value}\n"


def pickled() -> dict[str, str]:
    Path("t.npy").write_bytes(pickle.dumps([1, 2]))
    return npy_labels()


def npy_labels() -> dict[str, str]:
    Path("l.txt").write_text("a\nb\n")
    return {"table": "t.npy", "labels": "l.txt"}


def raw(content: bytes, name: str) -> dict[str, str]:
    Path(name).write_bytes(content)
    return {"table": name}


def parquet(**columns: Any) -> dict[str, str]:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), "t.parquet")
    return {"table": "t.parquet"}


def npz(**arrays: Any) -> dict[str, str]:
    np.savez("t.npz", **arrays)
    return {"table": "t.npz"}


def broken(value: float) -> NDArray[np.float64]:
    array = np.ones((8, 3))
    array[5, 2] = value
    return array


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing": (lambda: {"table": "t.npy"}, "no table at t.npy: expected a file ending in .npy"),
    "folder": (lambda: {"table": "."}, "found a folder"),
    "extension": (lambda: raw(b"", "t.xls"), "t.xls ends in '.xls': expected a table ending in .npy"),
    "nan": (lambda: npy(broken(np.nan)), "t.npy: feature 2 of row 5 is nan: expected finite numbers"),
    "infinity": (lambda: npy(broken(np.inf)), "feature 2 of row 5 is inf: expected finite numbers"),
    "too large": (lambda: npy(broken(1e39)), "is 1e+39: too large for float32"),
    "float16": (lambda: {**npy(broken(1e6)), "store": "float16"}, "too large for float16; use --store float32"),
    "1-D": (lambda: npy(np.ones(8)), "features of shape (8,), 1-D: expected (N, D)"),
    "3-D": (lambda: npy(np.ones((8, 2, 2))), "features of shape (8, 2, 2), 3-D: expected (N, D)"),
    "no rows": (lambda: npy(np.ones((0, 3))), "t.npy is empty: expected at least a row"),
    "no features": (lambda: npy(np.ones((8, 0))), "found 8 rows of 0 features"),
    "complex": (lambda: npy(np.ones((8, 2), complex)), "features of type complex128: expected numbers"),
    "objects": (lambda: npy(np.array([["a", 1]] * 8, object)), "Python objects, which featcache never loads"),
    "pickle": (pickled, "t.npy cannot be read as a table"),
    "cut": (lambda: (npy(np.ones((800, 9))), os.truncate("t.npy", 200), npy_labels())[2], "cannot be read as a table"),
    "no labels": (lambda: {**npy(np.ones((8, 2))), "labels": None}, "features and no labels: name a file"),
    "few labels": (lambda: npy(np.ones((8, 2)), 3), "l.txt has 6 labels, but t.npy has 8 rows of features"),
    "labels nowhere": (
        lambda: {**npy(np.ones((8, 2))), "labels": "x"},
        "--labels x is no column of t.npy and no file; it has no columns",
    ),
    "labels in what": (
        lambda: {**npy(np.ones((8, 2))), **raw(b"", "l.doc"), "table": "t.npy", "labels": "l.doc"},
        "l.doc: expected a file ending in .npy .csv .txt",
    ),
    "array of npy": (lambda: {**npy(np.ones((8, 2))), "array": "x"}, "--array x makes no sense for t.npy"),
    "npz array": (lambda: npz(a=np.ones(2), b=np.ones(2)), "has no array features or X for the features"),
    "npz object": (lambda: npz(X=np.ones((2, 2)), y=np.array([1, None])), "Python objects, which featcache never"),
    "npz label nan": (lambda: npz(X=np.ones((2, 2)), y=[1, np.nan]), "label of row 1 is nan, expected an integer"),
    "npz label half": (lambda: npz(X=np.ones((2, 2)), y=[1, 0.5]), "label of row 1 is 0.5, expected an integer"),
    "npz labels 2-D": (lambda: npz(X=np.ones((2, 2)), y=np.eye(2)), "is float64 (2, 2): expected texts or integers"),
    "npz no zip": (lambda: raw(b"PK\3\4 nonsense", "t.npz"), "t.npz cannot be read as a table"),
    "one class": (lambda: npz(X=np.eye(4), y=[1] * 4), "all rows of t.npz have the label 1: expected at least 2"),
    "small class": (lambda: npz(X=np.eye(4), y=[1, 1, 1, 2]), "class 2 of t.npz has 1 usable"),
    "no label column": (
        lambda: text("x,y\n1,2\n"),
        "expected a column label, or --labels with a column's name or a file; its columns are x, y",
    ),
    "text column": (lambda: text(rows_with("abc")), "t.csv, line 10: column y is 'abc', expected a number"),
    "csv nan": (lambda: text(rows_with("nan")), "column y of line 10 is nan: expected finite numbers"),
    "csv too large": (lambda: text(rows_with("1e39")), "column y of line 10 is 1e+39: too large for float32"),
    "empty field": (lambda: text(rows_with("")), "line 10: column y is '', expected a number"),
    "fields": (lambda: text(rows_with("6,7")), "t.csv, line 10 has 4 fields: expected 3, as in the first line"),
    "quote": (lambda: text('label,x\n"a,1\nb,2\n'), "t.csv cannot be read as a table (unexpected end of data)"),
    "hole": (lambda: text("label,x\na,1\n\nb,2\n"), "t.csv, line 3 is empty, and rows follow"),
    "empty": (lambda: text(""), "t.csv is empty: expected a first line"),
    "only header": (lambda: text("label,x\n"), "t.csv is empty: expected at least a row"),
    "no header": (lambda: text("1,2\n3,4\n"), "the first line of t.csv holds numbers"),
    "twice": (lambda: text("label,x,x\na,1,2\n"), "more than one column x"),
    "index": (lambda: text(",label,x\n0,a,1\n"), "column 1 of t.csv has no name"),
    "only labels": (lambda: text("label\na\n"), "t.csv has no features"),
    "latin-1": (lambda: raw("label,x\n\u00e4,1\n".encode("latin-1"), "t.csv"), "t.csv is not UTF-8"),
    "no label": (lambda: text("label,x\na,1\n,2\n"), "the label of line 3 is '', expected an integer or a text"),
    "label nan": (lambda: text("label,x\n1,1\nnan,2\n"), "the label of line 3 is nan, expected a number"),
    "split": (
        lambda: text("label,split,x\na,dev,1\nb,val,2\n"),
        "the split of line 2 is 'dev', expected train, val or test",
    ),
    "no val": (
        lambda: text("label,split,x\na,train,1\nb,test,2\n"),
        "t.csv has no val rows, only train, test: expected train and val",
    ),
    "class not in val": (
        lambda: text("label,split,x\na,train,1\nb,train,2\na,val,3\n"),
        "the val split of t.csv has no image of class b",
    ),
    "same path": (lambda: text("label,path,x\na,p,1\nb,./p,2\n"), "line 3 has the path p, as line 2 has"),
    "stray path": (lambda: text("label,path,x\na,../p,1\n"), "the path of line 2 is '../p', expected one below ."),
    "no path": (lambda: text("label,path,x\na,,1\n"), "the path of line 2 is '', expected one below"),
    "column twice": (
        lambda: {**text("label,x\na,1\n"), "paths": "label"},
        "one column of t.csv is named for two things",
    ),
    "header of a list": (
        lambda: {**text("label\na\nb\n", "l.csv"), **text("x\n1\n2\n"), "labels": "l.csv"},
        "l.csv has 3 labels, but t.csv has 2 rows of features: expected one for each row; is its first line a header?",
    ),
    "parquet": (lambda: raw(b"PAR1 nonsense PAR1", "t.parquet"), "t.parquet cannot be read as a"),
    "parquet text": (lambda: parquet(label=["a", "b"], x=["1", "2"]), "column x of t.parquet is of type string"),
    "parquet null": (lambda: parquet(label=["a", "b"], x=[1.0, None]), "column x of row 1 is missing"),
    "parquet ragged": (
        lambda: parquet(label=["a", "b"], features=[[1.0], [1.0, 2.0]]),
        "the lists in features have 1 to 2 values",
    ),
    "parquet null list": (lambda: parquet(label=["a", "b"], features=[[1.0], None]), "features of row 1 is missing"),
    "parquet label": (lambda: parquet(label=["a", None], x=[1.0, 2.0]), "the label of row 1 is None"),
    "parquet nan": (lambda: parquet(label=["a", "b"], x=[1.0, np.nan]), "column x of row 1 is nan"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_table_is_said_in_one_line(what: str) -> None:
    make, expected = WRONG[what]
    if what == "parquet":
        pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DatasetError) as caught:
        featcache.import_features(output="f.h5", **make())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("f.h5").exists()
    assert not [name for name in list_names() if name.startswith(".") or name.endswith(".lock")]


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "parquet"])
def test_a_damaged_table_is_refused_or_read_and_never_crashes(kind: str) -> None:
    features, labels = make_rows()
    table, where = write_table(kind, features, label=labels)
    content, rng = table.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content[: rng.integers(1, len(content))] if rng.random() < 0.3 else content)
        damaged[rng.integers(0, min(len(damaged), 300))] = rng.integers(0, 256)
        table.write_bytes(damaged)
        try:
            featcache.import_features(table, "f.h5", force=True, **where)
        except FeatcacheError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


def test_without_pyarrow_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[parquet\]'"):
        featcache.import_features("t.parquet", "f.h5")


@pytest.mark.parametrize("wrong", [{"store": "int8"}, {"val_fraction": 1.0}, {"seed": -1}, {"name": ""}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        featcache.import_features("t.npy", "f.h5", **wrong)


def test_a_place_that_cannot_be_written_is_an_error_before_any_work(table: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        featcache.import_features(table, ".")


# The command


def test_the_command_prints_a_line_and_the_documented_keys(table: Path, cli: Cli) -> None:
    outcome = cli("import", table, "-o", "g.h5", "--name", "clip")
    assert outcome.code == 0
    assert outcome.out.startswith("g.h5: ")
    assert "rows of 5 features, imported from table.csv" in outcome.out
    assert outcome.out.count("\n") == 1
    again = cli("import", table, "-o", "g.h5", "--name", "clip", "--json").json
    assert {"cache", "rows", "splits", "classes", "dim", "reused", "seconds", "extractor"} == set(again)
    assert (again["reused"], again["extractor"]["backbone"]) == (True, "imported:clip")
    assert "imported already" in cli("import", table, "-o", "g.h5", "--name", "clip").out


def test_the_commands_about_caches_know_it(table: Path, cli: Cli, photos: Path) -> None:
    info = cli("cache", "info", "f.h5").out
    assert "backbone       imported, weights table.csv" in info
    assert "computed       elsewhere, imported from " in info
    assert "imported: 60 rows of 5 float32" in cli("cache", "ls").out
    assert cli("cache", "explain", photos, "-o", "f.h5", "--weights", "none").code == 0
    head = cli("train-head", "f.h5")
    assert "on imported features" in head.out
    assert "of extraction" not in head.out
    predict = cli("predict", "runs/head", photos)
    assert (predict.code, predict.err.count("\n")) == (1, 1)


def test_errors_of_the_command_are_one_line_and_exit_1(cli: Cli) -> None:
    outcome = cli("import", "nowhere.npy")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: no table at nowhere.npy")
    assert cli("import", "x.npy", "--val-fraction", "2").code == 2
    assert cli("import").code == 2


def test_a_table_without_a_split_is_split_as_its_paths_are(tmp_path: Path) -> None:
    places = [f"{split}/{label}/{i}.jpg" for split in ("train", "val") for label in "ab" for i in range(3)]
    lines = ["path,label,x", *(f"{place},{place.split('/')[1]},{i}" for i, place in enumerate(places))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    cache = featcache.import_features(tmp_path / "t.csv", tmp_path / "f.h5").cache
    assert {name: list(split.listing.paths) for name, split in cache.splits.items()} == {
        name: [place for place in places if place.startswith(name)] for name in ("train", "val")
    }
