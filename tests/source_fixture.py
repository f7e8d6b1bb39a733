"""The same images as tar shards, lists, Hugging Face rows and objects of a store, for tests."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import draw_photo

RED, BLUE = draw_photo((210, 50, 40), 1), draw_photo((40, 60, 200), 2)


def upload(folder: Path, url: str) -> str:
    """A copy of a folder's files, at their names below a URL."""
    fs, base = fsspec.core.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{base}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def encode(image: Any = RED, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def age(path: Path) -> Path:
    """A file as if it had been written long ago: what has just been written is never trusted to be as it was."""
    os.utime(path, (1e9, 1e9))
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def list_photos(photos: Path, split: str) -> list[tuple[str, Path]]:
    """Class and file of each photograph of a split."""
    return [(path.parent.name, path) for path in sorted((photos / split).rglob("*.jpg"))]


def pack_tar(photos: Path, path: Path, split: str, label: str = ".cls") -> Path:
    members = []
    for name, photo in list_photos(photos, split):
        text = name if label == ".cls" else json.dumps({"label": name, "other": [1, 2]})
        key = f"{name}_{photo.stem}"
        members += [(f"{key}.jpg", photo.read_bytes()), (f"{key}{label}", text.encode())]
    return write_tar(path, members)


def pack_shards(photos: Path, folder: Path) -> str:
    pack_tar(photos, folder / "train-0.tar", "train")
    pack_tar(photos, folder / "val-0.tar", "val", ".json")
    return str(folder)


def pack_split_folders(photos: Path, folder: Path) -> str:
    pack_tar(photos, folder / "train/0.tar", "train")
    pack_tar(photos, folder / "val/0.tar", "val")
    return str(folder)


def pack_pattern(photos: Path, folder: Path) -> str:
    pack_shards(photos, folder)
    return f"{folder}/{{train,val}}-{{0..0}}.tar"


def list_rows(photos: Path) -> list[dict[str, str]]:
    return [
        {"path": str(path), "label": name, "split": split}
        for split in ("train", "val")
        for name, path in list_photos(photos, split)
    ]


def write_csv(photos: Path, folder: Path) -> str:
    folder.mkdir()
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(list_rows(photos))
    return str(folder / "list.csv")


def write_json_lines(photos: Path, folder: Path) -> str:
    folder.mkdir()
    lines = [
        json.dumps({"file_name": os.path.relpath(row["path"], folder), "class": row["label"], "split": split})
        for row in list_rows(photos)
        for split in [{"val": "Validation"}.get(row["split"], row["split"])]
    ]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "list.jsonl")


def write_parquet(photos: Path, folder: Path) -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "path": os.path.relpath(row["path"], photos)} for row in list_rows(photos)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), photos / "list.parquet")
    return str(photos / "list.parquet")


def make_hub_rows(photos: Path) -> Any:
    datasets = pytest.importorskip("datasets", reason="pip install 'featcache[hf]'")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["red", "blue"])})

    def load(split: str) -> Any:
        rows = list_photos(photos, split)
        columns = {
            "picture": [{"bytes": path.read_bytes(), "path": path.name} for _, path in rows],
            "kind": [name for name, _ in rows],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict({"train": load("train"), "validation": load("val")})


def save_hub_rows(photos: Path, folder: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="pip install 'featcache[hf]'")
    datasets.disable_progress_bars()
    make_hub_rows(photos).save_to_disk(folder)
    return f"hf:{folder}"


def upload_photos(photos: Path, folder: Path) -> str:
    return upload(photos, f"memory://{folder.parent.name}/photos")


def upload_shards(photos: Path, folder: Path) -> str:
    pack_shards(photos, folder)
    return upload(folder, f"memory://{folder.parent.name}/shards")
