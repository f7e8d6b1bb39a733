"""The house stands: imports run downhill, every outside thing has one owner, the front door is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import featcache
from featcache import config

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

LEAVES = {"errors", "extras", "config", "files", "progress", "wording"}
# A noun imports leaves, and of the other nouns only these; the reason is what it needs of each.
NOUNS: dict[str, set[str]] = {
    "tabular": set(),
    "dataset": {"tabular"},  # lists of images in CSV and Parquet files
    "decoding": set(),
    "fetching": set(),
    "clips": {"dataset", "decoding"},  # the order of a folder's frames; a frame from a file's bytes, the helpers
    "preprocessing": {"clips", "decoding"},  # the rules of decoding, in words
    # frames; digests; an image from bytes; what to do; which random views
    "images": {"clips", "dataset", "decoding", "preprocessing", "views"},
    "metering": set(),
    "metrics": set(),
    "evidence": {"metrics"},  # the exact test of one pair of classifiers, Holm's correction
    "views": set(),
    "recall": set(),
    "shards": set(),
    "cluster": set(),
    "storage": set(),
    "pictures": {"dataset", "decoding", "images"},  # digests of files, RGB by their rules, ImageRows
    "training": {"processes"},  # those that train together
    "processes": set(),
    "augmentation": {"images", "preprocessing", "processes"},  # rows; the crop; the label that counts for nothing
    "findings": {"metrics"},  # the confusion matrix
    "plots": set(),
    "thumbnails": {"dataset", "decoding"},  # where images are; an image from a file's bytes
    "projection": set(),
    # where images are; what is shown; confusions and intervals; colours and names cut short; small images
    "pages": {"dataset", "metrics", "plots", "runs", "thumbnails"},
    "runs": set(),
    "backbones": {"fetching", "preprocessing"},  # weights from the net; Preprocessing, which is part of the weights
    "runtime": {"decoding", "images"},  # ImageRows and Batch: what it runs on; the helpers it no longer needs
    "heads": {"metering", "metrics"},  # what choosing and fitting cost; probabilities from logits
    # Split and Listing: which image a row is; what a part cost; what is usual, for people; which views there are
    # where a cache lies, its bytes come from and go
    "cache": {"dataset", "metering", "preprocessing", "storage", "views"},
    "report": {"evidence", "metrics", "runs"},  # RunRecords in; tests and intervals; numbers and words out
    "bundle": {
        "backbones",
        "dataset",
        "heads",
        "images",
        "metrics",
        "preprocessing",
        "runtime",
    },  # all of them together
}
OWNERS = {
    "h5py": {"cache"},
    "filelock": {"cache"},
    "PIL": {"augmentation", "clips", "decoding", "images", "pictures", "thumbnails"},
    "simplejpeg": {"decoding"},
    "av": {"clips"},
    "torchvision": {"augmentation", "backbones", "images"},
    "efficientnet_lite_pytorch": {"backbones"},
    "matplotlib": {"plots"},
    "jinja2": {"pages"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "pyarrow": {"stages", "tabular"},
    "datasets": {"dataset"},
    "fsspec": {"dataset", "storage"},
    "s3fs": {"dataset", "storage"},
    "requests": {"fetching"},
    "urllib3": {"fetching"},  # the errors of requests' own connections
    "timm": {"backbones"},
    "onnx": {"backbones"},
    "onnxruntime": {"backbones", "runtime"},
    "openvino": {"runtime"},
    "scipy": {"evidence", "findings", "heads", "metrics"},
    "ray": {"cluster"},
    "safetensors": {"backbones", "bundle", "training"},
}


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, dotted."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("featcache.")} - {room_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downhill(path: Path) -> None:
    room, imported = room_of(path), rooms_imported(path)
    if room in LEAVES:
        allowed = {"errors"} if room != "errors" else set()
    elif room in NOUNS:
        allowed = LEAVES | NOUNS[room]
    elif room == "stages":
        allowed = LEAVES | set(NOUNS)
    else:
        allowed = LEAVES | set(NOUNS) | {"stages", "cli"}
    assert imported <= allowed


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_outside_thing_has_its_owner(path: Path) -> None:
    for outside, owners in OWNERS.items():
        if any(name.split(".")[0] == outside for name in imports_of(path)):
            assert room_of(path) in owners, f"{path} imports {outside}, which belongs to {owners}"


def test_every_room_is_known() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__", "__main__", "stages", "cli"}
    assert rooms == LEAVES | set(NOUNS)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_prints_or_exits_but_the_cli(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse((PACKAGE / path).read_text())) if isinstance(node, ast.Call)]
    printing = [call for call in calls if isinstance(call, ast.Name) and call.id in ("print", "exit", "eval", "exec")]
    assert not printing or room_of(path) == "cli"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_opens_with_what_it_holds(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / path).read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", "?", ":"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_function_is_longer_than_sixty_lines_without_its_docstring(path: Path) -> None:
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 60, node.name


def test_the_front_door_is_what_it_says() -> None:
    assert sorted(featcache.__all__) == sorted([*featcache._HOMES, "__version__"])
    for name in featcache.__all__:
        assert getattr(featcache, name) is not None


def test_importing_featcache_loads_nothing_heavy() -> None:
    code = "import sys, featcache; assert not {'torch', 'numpy', 'h5py', 'click'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_data_set_and_the_settings_need_no_torch() -> None:
    code = "import sys, featcache.dataset, featcache.config, featcache.cache, featcache.runs, featcache.report; "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_is_explained() -> None:
    every = (
        config.ExtractConfig,
        config.ImportConfig,
        config.HeadConfig,
        config.FinetuneConfig,
        config.CompareConfig,
        config.ShowConfig,
        config.AuditConfig,
    )
    for settings in every:
        explained = {
            name.strip()
            for ancestor in settings.__mro__[:-1]
            for line in (ancestor.__doc__ or "").splitlines()
            if not line.startswith(" " * 8)
            for name in line.split(",")
        }
        assert {field.name for field in fields(settings)} <= explained, settings.__name__
