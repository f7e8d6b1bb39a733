"""An extraction on a Ray cluster gives the file of one machine, whatever dies.

Most tests have no cluster: items are carried out here, as tasks and workers would, and all that travels is pickled. The
one with a cluster of three nodes is a program of its own, `spread_nursery`.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, TinyFamily, fill_class
from ray_nursery import run_alone
from source_fixture import pack_shards, save_hub_rows, upload, upload_photos, upload_shards, write_csv, write_parquet

import featcache.stages.spread as spread_stage
from featcache.cache import list_jobs, list_parts, open_cache, parts_path
from featcache.cluster import Cluster
from featcache.errors import BadImagesError, ClusterError, CrashedItemsError, DeviceError
from featcache.stages.extract import Extraction, extract_features

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "eager", "workers": 0, "batch_size": 4}
Poison = Callable[[Any], bool]


@contextmanager
def join_nothing(address: str | None) -> Iterator[Cluster]:
    yield Cluster(nodes=1, cpus=2, gpus=0)


def copied(value: Any) -> Any:
    """What arrives in another process."""
    return pickle.loads(pickle.dumps(value))


def carry_out(
    items: Sequence[Any], *, prepare: Any, make_worker: Any, gpu: bool, poison: Poison = lambda _: False
) -> Iterator[Any]:
    """What `featcache.cluster.spread` does, here; items that are poison kill their process each time."""
    work, crashed = copied(make_worker)(), {}
    for position, item in enumerate(items):
        if poison(item):
            crashed[position] = "prepare"
            continue
        yield copied(work(copied(copied(prepare)(copied(item)))))
    if crashed:
        raise CrashedItemsError(crashed)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tiny: type[TinyFamily]) -> pytest.MonkeyPatch:
    """A cluster that is this process."""
    monkeypatch.setattr(spread_stage, "join_cluster", join_nothing)
    monkeypatch.setattr(spread_stage, "spread", carry_out)
    return monkeypatch


def extract_here(data: Path | str, output: Path, **settings: Any) -> Extraction:
    return extract_features(data, output, engine="ray", **{**TINY, **settings})


@pytest.mark.parametrize("settings", [{}, {"views": 2, "test_views": 1}, {"store": "float16"}], ids=str)
@pytest.mark.parametrize("layout", ["photos", "flat_photos"])
def test_items_give_the_file_of_one_run(
    layout: str, settings: dict[str, Any], tmp_path: Path, here: Any, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(layout)
    whole = extract_features(data, tmp_path / "whole.h5", **TINY, **settings)
    spread = extract_here(data, tmp_path / "spread.h5", **settings)
    assert spread.cache.content_sha256 == whole.cache.content_sha256
    assert spread.computed == whole.computed
    assert spread.bad == ()
    assert not parts_path(tmp_path / "spread.h5").exists()
    assert spread.cache.provenance["device"] == "cpu"
    assert spread.cache.provenance["runtime"] == "eager"


@pytest.mark.parametrize(
    "make",
    [pack_shards, write_csv, write_parquet, save_hub_rows, upload_photos, upload_shards],
    ids=lambda one: one.__name__,
)
def test_items_of_any_kind_of_data_need_nothing_but_themselves(
    make: Callable[[Path, Path], str], photos: Path, tmp_path: Path, here: Any
) -> None:
    data = make(photos, tmp_path / "made")
    whole = extract_features(photos, tmp_path / "whole.h5", **TINY)
    spread = extract_here(data, tmp_path / "spread.h5")
    assert sorted(spread.cache.listing.digests()) == sorted(whole.cache.listing.digests())
    again = extract_features(data, tmp_path / "again.h5", **TINY)
    assert spread.cache.content_sha256 == again.cache.content_sha256


def test_what_an_item_takes_along_does_not_grow_with_the_data_set(
    photos: Path, flat_photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    sizes = []

    def measure(items: Sequence[Any], **how: Any) -> Iterator[Any]:
        sizes.append(max(len(pickle.dumps(item)) for item in items))
        sizes.append(len(pickle.dumps(how["prepare"])))
        yield from carry_out(items, **how)

    here.setattr(spread_stage, "spread", measure)
    here.setattr(spread_stage, "LEAST_IMAGES", 2)
    here.setattr(spread_stage, "FEW_ITEMS", 1000)
    for data in (upload_photos(photos, tmp_path), upload(flat_photos, f"memory://{tmp_path.parent.name}/flat60")):
        extract_here(data, tmp_path / "f.h5", force=True)
    few, reader, many, same_reader = sizes
    assert abs(many - few) < 200
    assert abs(same_reader - reader) < 200


def test_an_extraction_that_was_stopped_goes_on_with_its_parts(
    photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    here.setattr("featcache.dataset.hashing.RACY_NS", -(10**18))  # files this young prove something
    here.setattr(spread_stage, "LEAST_IMAGES", 4)
    here.setattr(spread_stage, "FEW_ITEMS", 1000)

    def stop_early(items: Sequence[Any], **how: Any) -> Iterator[Any]:
        yield from carry_out(items[:2], **how)
        raise ClusterError("the power is gone")

    here.setattr(spread_stage, "spread", stop_early)
    with pytest.raises(ClusterError, match="the power is gone"):
        extract_here(photos, tmp_path / "f.h5")
    here.setattr(spread_stage, "spread", carry_out)
    assert extract_here(photos, tmp_path / "f.h5").computed == 18 - 8
    assert extract_here(photos, tmp_path / "f.h5").computed == 0
    whole = extract_features(photos, tmp_path / "whole.h5", **TINY)
    assert open_cache(tmp_path / "f.h5").content_sha256 == whole.cache.content_sha256


def test_rows_of_other_caches_are_taken_and_moved_data_computes_nothing(
    photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    whole = extract_features(photos, tmp_path / "whole.h5", **TINY)
    moved = extract_here(photos.rename(tmp_path / "moved"), tmp_path / "whole.h5")
    assert (moved.computed, moved.cache.content_sha256) == (0, whole.cache.content_sha256)
    copied_to = shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    fill_class(copied_to / "train" / "red", COLOURS["red"], 8, seed=100)  # two more
    reused = extract_here(copied_to, tmp_path / "f.h5", reuse=(tmp_path / "whole.h5",))
    assert (reused.computed, len(reused.cache)) == (2, 20)
    again = extract_features(copied_to, tmp_path / "all.h5", **TINY)
    assert reused.cache.content_sha256 == again.cache.content_sha256


def test_an_item_that_kills_its_process_is_cut_into_images(
    photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    def carry_out_poison(items: Sequence[Any], **how: Any) -> Iterator[Any]:
        yield from carry_out(items, **how, poison=lambda item: "train/red/photo_002.jpg" in list_paths(item))

    here.setattr(spread_stage, "spread", carry_out_poison)
    with pytest.raises(BadImagesError, match=r"train/red/photo_002\.jpg: its decoder crashed 3 times") as caught:
        extract_here(photos, tmp_path / "f.h5")
    assert len(caught.value.bad) == 1
    done = extract_here(photos, tmp_path / "f.h5", skip_bad=True)
    assert [path for path, _ in done.bad] == ["train/red/photo_002.jpg"]
    assert len(done.cache) == 17


def test_a_cluster_that_kills_everything_is_no_fault_of_the_images(
    photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    def carry_out_nothing(items: Sequence[Any], **how: Any) -> Iterator[Any]:
        yield from carry_out(items, **how, poison=lambda _: True)

    here.setattr(spread_stage, "spread", carry_out_nothing)
    with pytest.raises(ClusterError, match="no image's fault, it seems"):
        extract_here(photos, tmp_path / "f.h5")


def test_bad_and_unreadable_files_are_named_as_one_process_names_them(photos: Path, tmp_path: Path, here: Any) -> None:
    (photos / "train" / "red" / "photo_001.jpg").write_bytes(b"nothing")
    (photos / "val" / "blue" / "gone.jpg").symlink_to("nowhere")
    errors = []
    for name, engine in (("whole", "local"), ("spread", "ray")):
        with pytest.raises(BadImagesError) as caught:
            extract_features(photos, tmp_path / f"{name}.h5", engine=engine, **TINY)
        errors.append(sorted(caught.value.bad))
    assert errors[0] == errors[1]
    assert len(errors[0]) == 2
    kept, _ = list_parts(tmp_path / "spread.h5", "rows", list_jobs(tmp_path / "spread.h5")[-1].key)
    assert sum(map(len, kept)) == 17


def list_paths(item: Any) -> list[str]:
    return [path for names in item.groups.values() for path in names.paths]


def test_a_cluster_of_three_machines_gives_the_bytes_of_one_whatever_dies(tmp_path: Path) -> None:
    result = run_alone(Path(__file__).with_name("spread_nursery.py"), tmp_path)
    assert "train/red/photo_007.jpg: its decoder crashed 3 times" in result.pop("error")
    assert 1 <= result.pop("parts when a machine died") < result.pop("items")
    assert result == {
        "same content": True,
        "same bytes": True,
        "rows": 127,
        "parts left": False,
        "computed again": 0,
        "bad": [["train/red/photo_007.jpg", "its decoder crashed 3 times"]],
    }


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [("auto", 2, "cuda"), ("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda")]
)
def test_the_cluster_has_the_gpus_not_the_machine_that_asks(
    device: str, gpus: int, expected: str, photos: Path, tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    @contextmanager
    def join(address: str | None) -> Iterator[Cluster]:
        yield Cluster(nodes=3, cpus=8, gpus=gpus)

    def look(items: Sequence[Any], *, prepare: Any, make_worker: Any, gpu: bool) -> Iterator[Any]:
        seen.extend(
            [gpu, make_worker.args[1].device, list_jobs(tmp_path / "f.h5")[-1].extractor["precision"]["compute"]]
        )
        raise ClusterError("seen")
        yield

    here.setattr(spread_stage, "join_cluster", join)
    here.setattr(spread_stage, "spread", look)
    with pytest.raises(ClusterError, match="seen"):
        extract_here(photos, tmp_path / "f.h5", device=device)
    assert seen == [expected == "cuda", expected, "float16" if expected == "cuda" else "float32"]


def test_one_device_is_none_of_a_clusters(photos: Path, tmp_path: Path, here: Any) -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu or cuda"):
        extract_here(photos, tmp_path / "f.h5", device="cuda:1")
