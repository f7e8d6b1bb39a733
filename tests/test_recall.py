"""featcache.recall: where nothing is to be computed no network is loaded, and whatever changed is still noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw_photo

import featcache
from featcache import recall
from featcache.backbones import load_backbone
from featcache.errors import StaleCacheError
from featcache.recall import is_known, keep_known, look_around, memory_path
from featcache.stages import provide_backbone

NETWORK = {"backbone": "squeezenet1_1", "input_size": 32}
REQUEST = {"backbone": "tiny", "key": "a" * 64}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memory, in which files of this very second are trusted."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(recall, "memory_path", lambda: tmp_path / "home/known.json")
    monkeypatch.setattr(recall, "RACY_SECONDS", -60.0)
    return tmp_path / "home"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "net.pth"
    torch.save(load_backbone("squeezenet1_1", weights="none").network.state_dict(), path)
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backbones that are loaded."""
    loads: list[str] = []
    load = provide_backbone.load_backbone

    def count(name: str, **settings: object) -> object:
        loads.append(name)
        return load(name, **settings)

    monkeypatch.setattr(provide_backbone, "load_backbone", count)
    return loads


def test_a_run_with_nothing_to_compute_imports_no_torch(photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from featcache.cli import run\n"
        "code = run(['extract', 'photos', '--backbone', 'squeezenet1_1', '--weights', 'none', '--input-size', '32'])\n"
        "print(code, sorted({'torch', 'torchvision', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "home")}
    out = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert "18 computed, 0 reused" in out[0][0]
    assert "torch" in out[0][1]
    assert "0 computed, 18 reused" in out[1][0]
    assert out[1][1] == "0 []"


def test_the_second_run_loads_nothing_and_the_third_only_for_what_is_new(
    home: Path, photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    output = tmp_path / "f.h5"
    first = featcache.extract_features(photos, output, weights="none", **NETWORK)
    second = featcache.extract_features(photos, output, weights="none", **NETWORK)
    assert (first.computed, second.computed, len(loads)) == (18, 0, 1)
    draw_photo((1, 2, 3), 77).save(photos / "val/red/new.jpg")
    third = featcache.extract_features(photos, output, weights="none", **NETWORK)
    assert (third.computed, third.reused, len(loads)) == (1, 18, 2)
    assert third.cache.extractor == first.cache.extractor


def test_other_weights_in_the_same_place_are_noticed(
    home: Path, photos: Path, tmp_path: Path, weights: Path, loads: list[str]
) -> None:
    settings = {**NETWORK, "weights": str(weights)}
    for _ in range(2):
        featcache.extract_features(photos, tmp_path / "f.h5", **settings)
    assert len(loads) == 1
    before, tensors = weights.stat(), torch.load(weights, weights_only=True)
    tensors["features.0.bias"] += 1
    torch.save(tensors, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    with pytest.raises(StaleCacheError, match="weights"):
        featcache.extract_features(photos, tmp_path / "f.h5", **settings)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"layer": ["features.7:avg"]}, {"store": "float16"}, {"decoder": "pillow"}, {"input_size": 40}],
    ids=str,
)
def test_other_settings_are_noticed(change: dict[str, object], home: Path, photos: Path, tmp_path: Path) -> None:
    for _ in range(2):
        featcache.extract_features(photos, tmp_path / "f.h5", weights="none", **NETWORK)
    with pytest.raises(StaleCacheError):
        featcache.extract_features(photos, tmp_path / "f.h5", **{**NETWORK, "weights": "none", **change})


def test_another_cache_in_the_same_place_is_noticed(home: Path, photos: Path, tmp_path: Path, loads: list[str]) -> None:
    output, other = tmp_path / "f.h5", tmp_path / "g.h5"
    for _ in range(2):
        featcache.extract_features(photos, output, weights="none", **NETWORK)
    featcache.extract_features(photos, other, weights="none", **{**NETWORK, "input_size": 40})
    other.replace(output)
    with pytest.raises(StaleCacheError, match="crop: 40 -> 32"):
        featcache.extract_features(photos, output, weights="none", **NETWORK)
    assert len(loads) == 3


def test_who_wants_everything_checked_has_the_network_checked(
    home: Path, photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    for _ in range(2):
        featcache.extract_features(photos, tmp_path / "f.h5", weights="none", **NETWORK)
    featcache.extract_features(photos, tmp_path / "f.h5", weights="none", rehash=True, **NETWORK)
    assert len(loads) == 2


def test_what_the_cache_lost_is_computed_by_a_network_that_is_loaded_for_it(
    home: Path, photos: Path, tmp_path: Path, loads: list[str]
) -> None:
    output = tmp_path / "f.h5"
    for _ in range(2):
        first = featcache.extract_features(photos, output, weights="none", **NETWORK)
    offset = first.cache.splits["train"].features.offset
    with output.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(64))
    (photos / "val/red/photo_000.jpg").rename(photos / "val/red/moved.jpg")  # so that the file is written anew
    again = featcache.extract_features(photos, output, weights="none", **NETWORK)
    assert (again.computed, len(loads)) == (12, 2)
    assert featcache.verify_cache(output).damaged == ()
    assert again.cache.provenance["device"] == "cpu"


def test_the_users_own_code_and_network_are_never_taken_for_known(
    home: Path, photos: Path, tmp_path: Path, cli: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n"
        "    network.preprocessing = {'input_size': 8, 'mean': 0.5, 'std': 0.5}\n"
        "    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    featcache.extract_features(photos, tmp_path / "f.h5", backbone="module:own.make")
    assert not (home / "known.json").exists()


def test_extract_says_the_same_whether_it_loads_or_remembers(cli: object, home: Path, photos: Path) -> None:
    def extract() -> Outcome:
        return cli("extract", photos, "--backbone", "squeezenet1_1", "--weights", "none", "--input-size", 32)

    extract()
    remembered = extract()
    (home / "known.json").unlink()
    loaded = extract()
    assert remembered.err == loaded.err
    assert (remembered.code, loaded.code) == (0, 0)


# --- the memory itself ------------------------------------------------------------------------------------------------


def test_a_request_is_known_until_one_of_its_files_changes(home: Path, tmp_path: Path) -> None:
    path, absent = tmp_path / "w.pth", tmp_path / "w.json"
    path.write_bytes(b"1")
    assert not is_known(REQUEST)
    keep_known(REQUEST, [path, absent], look_around())
    assert is_known(REQUEST)
    assert not is_known({**REQUEST, "key": "b" * 64})
    absent.write_bytes(b"2")
    assert not is_known(REQUEST)
    absent.unlink()
    assert is_known(REQUEST)
    os.utime(path)
    assert not is_known(REQUEST)
    path.unlink()
    assert not is_known(REQUEST)


def test_a_file_that_was_written_just_now_is_not_trusted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "RACY_SECONDS", 2.0)
    path = tmp_path / "w.pth"
    path.write_bytes(b"1")
    os.utime(path, (1e9, 1e9))  # the change time cannot be set
    keep_known(REQUEST, [path], look_around())
    assert not is_known(REQUEST)


def test_what_changes_between_the_start_and_the_end_is_not_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "RACY_SECONDS", 0.0)
    old, new, link = tmp_path / "old.pth", tmp_path / "new.pth", tmp_path / "w.pth"
    old.write_bytes(b"1")
    new.write_bytes(b"2")
    link.symlink_to(old)
    time.sleep(0.05)
    start = look_around()
    keep_known(REQUEST, [link], start)
    assert is_known(REQUEST)
    (home / "known.json").unlink()
    link.unlink()
    link.symlink_to(new)  # as old as the other one
    keep_known(REQUEST, [link], start)
    assert not is_known(REQUEST)
    keep_known(REQUEST, [], start)
    assert is_known(REQUEST)
    (home / "known.json").unlink()
    monkeypatch.setenv("HF_HOME", "elsewhere")
    keep_known(REQUEST, [], start)
    assert not is_known(REQUEST)


def test_the_description_is_that_of_the_weights_that_are_named(
    home: Path, photos: Path, tmp_path: Path, weights: Path
) -> None:
    other, output = tmp_path / "other.pth", tmp_path / "f.h5"
    other.write_bytes(weights.read_bytes())
    for path in (weights, weights, other, weights):
        extraction = featcache.extract_features(photos, output, **{**NETWORK, "weights": str(path)})
        assert extraction.cache.extractor["weights"]["requested"] == str(path)
    assert extraction.computed == 0


def test_an_upgrade_or_another_folder_or_hub_forgets(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_known(REQUEST, [], look_around())
    assert is_known(REQUEST)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert not is_known(REQUEST)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HOME", "elsewhere")
        assert not is_known(REQUEST)
    look_at = recall.look_at
    for part in ("torchvision/__init__.py", "featcache/backbones/torchvision.py"):
        with monkeypatch.context() as patch:
            patch.setattr(recall, "look_at", lambda path, part=part: [0] if str(path).endswith(part) else look_at(path))
            assert not is_known(REQUEST), part
    assert is_known(REQUEST)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"a": 1}', "[" * 10000, "\xff"])
def test_a_damaged_memory_costs_only_time(text: str, home: Path) -> None:
    home.mkdir()
    (home / "known.json").write_bytes(text.encode("latin-1"))
    assert not is_known(REQUEST)
    keep_known(REQUEST, [], look_around())
    assert is_known(REQUEST)


def test_a_place_that_cannot_be_written_costs_only_time(home: Path) -> None:
    home.write_text("a file where the folder should be")
    keep_known(REQUEST, [], look_around())
    assert not is_known(REQUEST)


def test_the_oldest_are_forgotten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MOST_ENTRIES", 3)
    for i in range(5):
        keep_known({"i": i}, [], look_around())
    assert [is_known({"i": i}) for i in range(5)] == [False, False, True, True, True]
    assert len(json.loads((home / "known.json").read_text())) == 3


def test_the_memory_lies_where_torch_keeps_its_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variables in ({"TORCH_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": str(tmp_path)}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert memory_path() == Path(torch.hub.get_dir()) / "featcache/known.json"
