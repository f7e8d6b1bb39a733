"""Cached random views: what they show, that they are the same every time, and that none is ever stale or damaged."""

from __future__ import annotations

import csv
import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import COLOURS, Outcome, TinyFamily, TinyNetwork, draw_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as tensors

import featcache
from featcache.bundle import load_classifier
from featcache.cache import FeatureCache, estimate_bytes, open_cache, read_cache, verify_cache, write_cache
from featcache.cache.contents import BLOCK_ROWS, count_block
from featcache.cli.common import Tally
from featcache.config import ExtractConfig
from featcache.dataset import hash_clip
from featcache.decoding import decode_safely
from featcache.errors import BadImage, BadImagesError, CacheError, ImageError, SettingsError
from featcache.files import hash_file
from featcache.images import ImageRows, Memo, ViewRows, make_view_transform
from featcache.preprocessing import InputFormat, Preprocessing
from featcache.progress import Progress
from featcache.runtime import prepare_execution
from featcache.stages import compute
from featcache.stages.explain import explain_cache
from featcache.stages.forecast import forecast_extraction
from featcache.stages.plan import plan_extraction
from featcache.views import NO_VIEWS, RATIO, RECIPE, SCALE, Views, draw_view

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "fused", "workers": 1}
LOOK = Preprocessing(resize=20, crop=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
DIGEST = hashlib.sha256(b"an image").hexdigest()
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "f.h5"


def extract(photos: Path, output: Path, **settings: Any) -> featcache.Extraction:
    return featcache.extract_features(photos, output, **{**TINY, **settings})


def views_of(path: Path) -> dict[str, bytes]:
    """Image path and view number -> the stored features, bit for bit."""
    cache = read_cache(path)
    return {
        f"{name} {v}": row.tobytes()
        for split in cache.splits.values()
        for name, rows in zip(split.listing.paths, split.views if split.views is not None else [], strict=False)
        for v, row in enumerate(rows)
    }


def flip_byte(path: Path, column: str, row: int) -> None:
    """Change one number of a column of features in place."""
    with h5py.File(path, "r+") as file:
        values = file[column][row]
        values.view("u1").reshape(-1)[0] ^= 1
        file[column][row] = values


# What a view shows


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**63),
    st.integers(0, 999),
    st.sampled_from([DIGEST, "0" * 64, "f" * 64]),
)
def test_a_view_always_lies_in_its_image_and_has_an_allowed_shape(
    height: int, width: int, seed: int, number: int, digest: str
) -> None:
    piece = draw_view(digest, number, seed=seed, height=height, width=width)
    assert piece == draw_view(digest, number, seed=seed, height=height, width=width)
    assert 0 <= piece.top <= piece.top + piece.height <= height
    assert 0 <= piece.left <= piece.left + piece.width <= width
    assert piece.height >= 1
    assert piece.width >= 1
    if min(height, width) >= 100:
        assert RATIO[0] * 0.95 < piece.width / piece.height < RATIO[1] * 1.05


def test_views_are_spread_as_torchvision_spreads_them() -> None:
    """Share of the area, shape, place and mirroring of 4,000 draws beside 4,000 of RandomResizedCrop."""
    mine = [draw_view(DIGEST, number, seed=5, height=300, width=400) for number in range(4000)]
    picture = torch.zeros(3, 300, 400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transforms.RandomResizedCrop.get_params(picture, list(SCALE), list(RATIO)) for _ in range(4000)]
    for n, spread in enumerate((60.0, 70.0, 60.0, 80.0)):  # about the standard deviations, in pixels
        one, other = np.array([piece[n] for piece in mine]), np.array([piece[n] for piece in theirs])
        assert abs(one.mean() - other.mean()) < 5 * spread * np.sqrt(2 / 4000)
        assert abs(one.std() / other.std() - 1) < 0.1
    assert abs(np.mean([piece.mirrored for piece in mine]) - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_an_image_of_no_allowed_shape_is_cut_in_the_middle() -> None:
    assert draw_view(DIGEST, 0, seed=0, height=10, width=400)[:4] == (0, 193, 10, 13)
    assert draw_view(DIGEST, 0, seed=0, height=400, width=9)[:4] == (194, 0, 12, 9)


def test_what_is_drawn_never_changes() -> None:
    """Views on people's disks were drawn so: raise RECIPE's "rules" if this has to change."""
    assert [tuple(draw_view("ab" * 32, n, seed=1, height=333, width=500)) for n in range(3)] == FIRST_VIEWS
    assert Views(train=1).name_row("ab" * 32, 0) == FIRST_NAME
    assert RECIPE["rules"] == 1


FIRST_VIEWS = [(14, 172, 256, 314, False), (28, 222, 206, 271, False), (61, 160, 119, 157, False)]
FIRST_NAME = "d2984c404236e39e584478301393d4b7f2a79500e16d0ca65601bb87283f8a66"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("crop", [16, (12, 20)])
def test_pillow_shows_what_torchvision_shows_of_the_same_piece(interpolation: str, crop: Any) -> None:
    image = draw_photo((90, 150, 40), 3, (97, 61))
    look = replace(LOOK, interpolation=interpolation, crop=crop)
    for number in range(8):
        top, left, height, width, mirrored = draw_view(DIGEST, number, seed=2, height=61, width=97)
        mode = transforms.InterpolationMode(interpolation)
        expected = functional.resized_crop(image, top, left, height, width, list(look.size), mode)
        expected = functional.hflip(expected) if mirrored else expected
        shown = make_view_transform(look, seed=2)(image, DIGEST, number)
        assert torch.equal(shown, functional.pil_to_tensor(expected))


def test_torch_shows_what_torchvision_shows_of_the_same_piece() -> None:
    image = draw_photo((90, 150, 40), 3, (97, 61))
    look = replace(LOOK, decoder="torch")
    for number in range(8):
        top, left, height, width, mirrored = draw_view(DIGEST, number, seed=2, height=61, width=97)
        expected = tensors.resized_crop(
            functional.pil_to_tensor(image), top, left, height, width, [16, 16], antialias=True
        )
        expected = tensors.horizontal_flip(expected) if mirrored else expected
        shown = make_view_transform(look, seed=2)(np.array(image), DIGEST, number)
        assert torch.equal(shown, expected)


@pytest.mark.parametrize("decoder", ["pillow", "torch"])
def test_a_view_has_the_networks_channels_and_order_in_memory(decoder: str) -> None:
    image = draw_photo((90, 150, 40), 3)
    plain = make_view_transform(replace(LOOK, decoder=decoder))(image, DIGEST, 1)
    swapped = make_view_transform(replace(LOOK, decoder=decoder, channels="BGR"))(image, DIGEST, 1)
    assert torch.equal(swapped, plain.flip(0))
    grey = make_view_transform(replace(LOOK, decoder=decoder, channels="L"))(image, DIGEST, 1)
    assert (grey.shape, grey.dtype) == ((1, 16, 16), torch.uint8)


def test_all_frames_of_a_clip_are_treated_alike() -> None:
    frames = [draw_photo(colour, i) for i, colour in enumerate(COLOURS.values())]
    look = replace(LOOK, frames=3)
    shown = make_view_transform(look)(frames, DIGEST, 4)
    assert shown.shape == (3, 3, 16, 16)
    for t, frame in enumerate(frames):
        assert torch.equal(shown[:, t], make_view_transform(LOOK)(frame, DIGEST, 4))


# Rows of images and views


def make_view_rows(photos: Path, n: int = 3, **settings: Any) -> ViewRows:
    paths = [f"train/red/photo_{i:03d}.jpg" for i in range(6) for _ in range(1 + n)]
    digests = [hash_file(photos / path) for path in paths]
    numbers = [None, *range(n)] * 6
    return ViewRows(photos, paths, numbers=numbers, preprocessing=LOOK, digests=digests, **settings)


def count_decodes(rows: ViewRows) -> list[int]:
    """Rows that were decoded, from now on."""
    decoded: list[int] = []
    decode = rows.decode_with_digest

    def counting(row: int) -> tuple[Any, str]:
        decoded.append(row)
        return decode(row)

    rows.decode_with_digest = counting  # type: ignore[method-assign]
    return decoded


@pytest.mark.parametrize("workers", [1, 4])
def test_an_image_is_decoded_once_for_all_of_its_views(
    photos: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.images.count_cores", lambda: 4)
    rows = make_view_rows(photos)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    execution = prepare_execution(network, rows, device=CPU, runtime="fused", batch_size=3, workers=workers)
    rows._memo, decoded = Memo(), count_decodes(rows)
    assert sum(len(output) for output in execution.run()) == 24
    assert len(decoded) <= 6


def test_views_in_other_processes_are_the_same(photos: Path) -> None:
    rows = make_view_rows(photos)
    network = torch.nn.Flatten()
    here, there = (
        np.concatenate(
            [
                output.values
                for output in prepare_execution(
                    network, rows, device=CPU, runtime="eager", workers=workers, batch_size=5
                ).run()
            ]
        )
        for workers in (0, 2)
    )
    assert here.tobytes() == there.tobytes()
    assert torch.equal(pickle.loads(pickle.dumps(rows))[5][1], rows[5][1])


def test_views_without_digests_are_drawn_from_those_of_the_files(photos: Path) -> None:
    rows = make_view_rows(photos)
    bare = ViewRows(photos, rows.paths, numbers=rows.numbers, preprocessing=LOOK)
    assert all(torch.equal(bare[row][1], rows[row][1]) for row in range(len(rows)))


def test_what_cannot_be_made_is_not_tried_again_unless_it_may_succeed() -> None:
    memo, calls = Memo(), []

    def fail(error: Exception) -> None:
        calls.append(error)
        raise error

    for _ in range(2):
        with pytest.raises(ImageError):
            memo.get("bad", lambda: fail(ImageError("damaged")), 2)
        with pytest.raises(MemoryError):
            memo.get("large", lambda: fail(MemoryError()), 2)  # type: ignore[arg-type]
    assert len(calls) == 3
    assert [memo.get(name, lambda name=name: name, 1) for name in "abc"] == list("abc")


# In the file


def test_views_are_the_features_of_what_they_show(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extraction = extract(photos, output, views=3, test_views=2, seed=4, decoder="pillow")
    assert (extraction.computed, extraction.reused) == (12 * 4 + 6 * 3, 0)
    network = featcache.load_backbone("tiny", weights="none", seed=4).network.eval()
    for name, split in read_cache(output).splits.items():
        assert split.views.shape == ({"train": 12, "val": 6}[name], {"train": 3, "val": 2}[name], 8)
        assert split.views.dtype == np.float32
        for i, path in enumerate(split.listing.paths):
            image = decode_safely((photos / path).read_bytes())
            for v in range(split.views.shape[1]):
                piece = draw_view(split.listing.digests[i], v, seed=4, height=40, width=48)
                shown = functional.resized_crop(image, *piece[:4], [16, 16])
                shown = functional.hflip(shown) if piece.mirrored else shown
                pixels = (functional.to_tensor(shown) - 0.5) / 0.25
                with torch.inference_mode():
                    expected = network(pixels[None])[0].numpy()
                np.testing.assert_allclose(split.views[i, v], expected, rtol=1e-4, atol=1e-6)


def test_a_stranger_reads_them_and_finds_them_stated(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extract(photos, output, views=2)
    cache = open_cache(output)
    assert cache.views == Views(train=2)
    assert cache.splits["val"].views is None
    assert cache.n_views == 24
    with h5py.File(output) as file:
        assert file["train/views"].shape == (12, 2, 8)
        assert file["train/views"][:].tobytes() == np.asarray(cache.splits["train"].views).tobytes()
        assert "views" not in file["val"]
    assert isinstance(cache.splits["train"].views, np.memmap)


def test_a_cache_without_views_is_the_very_one_that_it_was(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    plain = extract(photos, output).cache
    stated = extract(photos, output.with_name("g.h5"), views=0, test_views=0).cache
    assert plain.content_sha256 == stated.content_sha256
    assert plain.provenance["settings"] == stated.provenance["settings"]
    assert plain.views == stated.views == NO_VIEWS
    with h5py.File(output.with_name("g.h5")) as file:
        assert "views" not in file.attrs
        assert set(file["train"]) == {"features", "features_sha256", "labels", "paths", "digests", "stats"}


def test_adding_views_computes_no_plain_row_and_the_other_way_round(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    plain = read_cache(extract(photos, output).path)
    tiny.calls = 0
    extraction = extract(photos, output, views=2)
    assert (extraction.computed, extraction.reused) == (24, 18)
    for name, split in read_cache(output).splits.items():
        assert split.features.tobytes() == plain.splits[name].features.tobytes()
    assert extraction.cache.key == plain.key
    dropped = extract(photos, output, views=0)
    assert (dropped.computed, dropped.cache.views) == (0, NO_VIEWS)
    assert dropped.cache.content_sha256 == plain.content_sha256


def test_raising_the_number_computes_the_new_ones_and_lowering_none(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    extract(photos, output, views=2)
    before = views_of(output)
    assert extract(photos, output, views=3).computed == 12
    assert before.items() < views_of(output).items()
    assert extract(photos, output, views=1).computed == 0
    assert views_of(output).items() < before.items()


def test_an_image_that_changes_gets_new_views(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extract(photos, output, views=2)
    before = views_of(output)
    draw_photo((200, 200, 20), 99).save(photos / "train/red/photo_002.jpg")
    assert extract(photos, output).computed == 3
    changed = {name for name, row in views_of(output).items() if row != before[name]}
    assert changed == {"train/red/photo_002.jpg 0", "train/red/photo_002.jpg 1"}


def test_a_run_that_states_no_views_keeps_those_that_are_there(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    extract(photos, output, views=2, test_views=1)
    before = output.read_bytes()
    extraction = extract(photos, output)
    assert (extraction.computed, extraction.cache.views) == (0, Views(train=2, others=1))
    assert output.read_bytes() == before
    draw_photo((1, 2, 3), 99).save(photos / "train/red/new.jpg")
    assert extract(photos, output).computed == 3
    assert extract(photos, output, test_views=0).cache.views == Views(train=2)


def test_another_seed_makes_other_views_and_keeps_the_rows_of_images(
    photos: Path, output: Path, tiny: type[TinyFamily], tmp_path: Path
) -> None:
    weights = str(tmp_path / "w.pth")
    torch.save(TinyNetwork().state_dict(), weights)
    extract(photos, output, views=2, weights=weights)
    before = views_of(output)
    extraction = extract(photos, output, views=2, seed=1, weights=weights)
    assert (extraction.computed, extraction.cache.views) == (24, Views(train=2, seed=1))
    assert all(row != views_of(output)[name] for name, row in before.items())
    kept = extract(photos, output, weights=weights)  # nothing is stated: the very same
    assert (kept.computed, kept.cache.views) == (0, Views(train=2, seed=1))
    assert "--views" not in verify_cache(output).cure  # which would make those of seed 0
    assert extract(photos, output, views=2, weights=weights).computed == 24


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 5, "workers": 3}, {"runtime": "eager"}])
def test_views_do_not_depend_on_how_they_are_computed(
    photos: Path, output: Path, tiny: type[TinyFamily], changes: dict[str, Any]
) -> None:
    extract(photos, output, views=2, decoder="pillow")
    other = output.with_name("g.h5")
    torch.manual_seed(77)
    extract(photos, other, views=2, decoder="pillow", **changes)
    for name, row in views_of(other).items():
        np.testing.assert_allclose(
            np.frombuffer(row, np.float32), np.frombuffer(views_of(output)[name], np.float32), rtol=1e-4, atol=1e-6
        )


def test_the_same_bytes_come_of_an_interrupted_run_in_another_order(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    class Interrupting(Progress):
        def track(self, items: Any, *, total: Any, what: str, unit: str = "img", done: int = 0) -> Iterator[Any]:
            for n, item in enumerate(items):
                if what == "extracting" and n == 4:
                    raise KeyboardInterrupt
                yield item

    whole, broken = output.with_name("g.h5"), output
    extract(photos, whole, views=3)
    with pytest.raises(KeyboardInterrupt):
        extract(photos, broken, views=3, progress=Interrupting())
    assert not broken.exists()
    (photos / "train/red/photo_000.jpg").rename(photos / "train/red/zebra.jpg")
    assert extract(photos, broken, views=3).computed == 12 * 4 + 6 - 4 * 4
    extract(photos, whole)
    assert open_cache(broken).content_sha256 == open_cache(whole).content_sha256


def test_the_same_image_in_two_splits_is_computed_once_for_both(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    shutil.copy(photos / "train/red/photo_002.jpg", photos / "val/red/copy.jpg")
    extraction = extract(photos, output, views=3, test_views=1)
    assert extraction.computed == 12 * 4 + 6 * 2
    rows = views_of(output)
    assert rows["train/red/photo_002.jpg 0"] == rows["val/red/copy.jpg 0"]


def test_a_bad_image_takes_its_views_along(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    bad = photos / "train/blue/photo_003.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    with pytest.raises(BadImagesError) as caught:
        extract(photos, output, views=2)
    assert [one.path for one in caught.value.bad] == ["train/blue/photo_003.jpg"]  # once, not once a view
    extraction = extract(photos, output, views=2, skip_bad=True)
    assert (extraction.computed, extraction.reused) == (0, 11 * 3 + 6)
    train = extraction.cache.splits["train"]
    assert (len(train), train.views.shape) == (11, (11, 2, 8))
    bad.write_bytes(good)
    assert extract(photos, output).computed == 3


def test_an_image_of_which_one_view_is_no_number_is_a_bad_one(
    photos: Path, output: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = compute.find_unusable

    def spoil(output: Any, paths: Any, config: Any) -> Any:
        if "train/red/photo_001.jpg" in paths:
            output.values[list(paths).index("train/red/photo_001.jpg"), 0] = np.nan
        return find(output, paths, config)

    monkeypatch.setattr(compute, "find_unusable", spoil)
    extraction = extract(photos, output, views=2, skip_bad=True, batch_size=2)
    assert [path for path, _ in extraction.bad] == ["train/red/photo_001.jpg"]
    assert (extraction.computed, extraction.reused) == (11 * 3 + 6, 0)


# Other caches


def test_views_are_taken_from_another_cache_but_only_the_same(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    other = output.with_name("g.h5")
    extract(photos, other, views=2)
    plain = extract(photos, output, reuse=(str(other),))
    assert (plain.computed, plain.cache.views) == (0, NO_VIEWS)
    extraction = extract(photos, output, views=3, reuse=(str(other),))
    assert extraction.computed == 12
    assert views_of(other).items() < views_of(output).items()


def test_views_are_rounded_with_the_rest(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extract(photos, output, views=2)
    exact = read_cache(output).splits["train"].views
    extraction = extract(photos, output, store="float16", force=True)
    assert extraction.computed == 0
    assert extraction.cache.splits["train"].views.dtype == np.float16
    assert read_cache(output).splits["train"].views.tolist() == exact.astype(np.float16).tolist()
    fresh = extract(photos, output.with_name("g.h5"), views=2, store="float16").cache
    assert fresh.content_sha256 == extraction.cache.content_sha256


# Damage


def test_damaged_views_are_found_and_only_they_are_computed_again(
    photos: Path, output: Path, tiny: type[TinyFamily]
) -> None:
    before = extract(photos, output, views=2, test_views=1).cache.content_sha256
    flip_byte(output, "train/views", 5)
    found = verify_cache(output)
    assert not found
    assert found.problems == ["train/views rows 0 to 11"]
    assert found.cure == (
        f"featcache extract {photos} -o {output} --backbone tiny --weights none --views 2 --test-views 1 --rehash"
    )
    with pytest.raises(CacheError, match=r"train/views rows 0 to 11 are not what was written; `featcache extract"):
        read_cache(output)
    extraction = extract(photos, output, rehash=True)
    assert (extraction.computed, extraction.cache.content_sha256) == (24, before)
    flip_byte(output, "train/features", 5)
    assert extract(photos, output, rehash=True).computed == 12


def test_what_is_stated_of_views_cannot_be_changed_unseen(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extract(photos, output, views=2)
    with h5py.File(output, "r+") as file:
        text = file.attrs["views"].decode()
        del file.attrs["views"]
    with pytest.raises(CacheError, match="its attribute views is not what was written"):
        open_cache(output)
    with h5py.File(output, "r+") as file:
        changed = text.replace('"seed":0', '"seed":1')
        assert changed != text
        file.attrs.create("views", changed.encode(), dtype=h5py.string_dtype("ascii", len(changed)))
    with pytest.raises(CacheError, match="its attribute views is not what was written"):
        verify_cache(output)


@pytest.mark.parametrize("change", ["missing", "flat", "chunked"])
def test_views_that_are_not_there_as_stated_are_refused(
    photos: Path, output: Path, tiny: type[TinyFamily], change: str
) -> None:
    extract(photos, output, views=2)
    with h5py.File(output, "r+") as file:
        values = file["train/views"][:]
        del file["train/views"]
        if change == "flat":
            file["train/views"] = values[:, :1]
        elif change == "chunked":
            file.create_dataset("train/views", data=values, chunks=values.shape)
    with pytest.raises(CacheError, match="train/views"):
        open_cache(output)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FeatureCache]:
    """A small cache with views, not of any images."""
    path = tmp_path_factory.mktemp("views") / "w.h5"
    rng = np.random.default_rng(0)
    golden = read_cache(Path(__file__).parent / "golden" / "schema2.h5")
    views, splits = Views(train=3, others=1, seed=9), {}
    for name, split in golden.splits.items():
        values = rng.normal(size=(len(split), views.count(name), 4)).astype(np.float32)
        splits[name] = replace(split, views=values)
    write_cache(path, replace(golden, splits=splits, views=views))
    return path, read_cache(path)


@settings(deadline=None, max_examples=150)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_whatever_byte_is_changed_no_other_view_is_served(
    written: tuple[Path, FeatureCache], place: float, change: int
) -> None:
    path, expected = written
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= change
    changed = path.with_name("changed.h5")
    changed.write_bytes(data)
    try:
        cache = read_cache(changed)
    except CacheError:
        return
    assert cache.views == expected.views
    for name, split in cache.splits.items():
        assert split.views.tobytes() == expected.splits[name].views.tobytes()
        assert split.features.tobytes() == expected.splits[name].features.tobytes()


def test_many_views_are_written_and_checked_block_by_block(written: tuple[Path, FeatureCache], tmp_path: Path) -> None:
    _, small = written
    each = 1500  # of which a block holds two images
    values = np.random.default_rng(1).normal(size=(5, each, 4)).astype(np.float32)
    assert count_block(values.shape) == 2
    splits = {**small.splits, "train": replace(small.splits["train"], views=values)}
    many = replace(small, splits=splits, views=Views(train=each, others=1, seed=9))
    write_cache(tmp_path / "many.h5", many)
    assert read_cache(tmp_path / "many.h5").splits["train"].views.tobytes() == values.tobytes()
    assert abs(estimate_bytes(many) - (tmp_path / "many.h5").stat().st_size) < 8000
    flip_byte(tmp_path / "many.h5", "train/views", 3)
    assert verify_cache(tmp_path / "many.h5").damaged_views == (("train", 2, 4),)
    assert count_block((9, BLOCK_ROWS + 1, 4)) == 1


# Before it is done, and what is told


def test_the_forecast_counts_views(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    plan, forecast = forecast_extraction(photos, output, views=3, test_views=1, **TINY)
    assert (plan.n_rows, len(plan.missing)) == (12 * 4 + 6 * 2, 12 * 4 + 6 * 2)
    extract(photos, output, views=3, test_views=1)
    assert abs(forecast.bytes - output.stat().st_size) < 5000
    plan, forecast = forecast_extraction(photos, output, views=5, **TINY)
    assert (len(plan.missing), plan.decision) == (24, "extend")
    assert not forecast_extraction(photos, output, **TINY)[0].missing


def test_the_explanation_names_what_differs_in_the_views(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    extract(photos, output)
    assert not [field for field in explain_cache(photos, output, **TINY).fields if field.name.startswith("views")]
    differing = [field for field in explain_cache(photos, output, views=2, **TINY).fields if not field.same]
    assert [(field.name, field.found, field.wanted) for field in differing] == [("views.train", 0, 2)]


def test_an_unchanged_cache_with_views_needs_no_network(
    photos: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"backbone": "squeezenet1_1", "weights": "none", "input_size": 32}
    monkeypatch.setattr("featcache.recall.RACY_SECONDS", -60.0)
    featcache.extract_features(photos, output, views=1, **network)
    monkeypatch.setattr(
        "featcache.stages.provide_backbone.provide_settled", lambda *_: pytest.fail("a network was made")
    )
    assert featcache.extract_features(photos, output, **network).computed == 0
    dropped = featcache.extract_features(photos, output, views=0, **network)  # how many has no say
    assert (dropped.computed, dropped.cache.views) == (0, NO_VIEWS)


def test_the_commands_tell_of_views(
    photos: Path, output: Path, tiny: type[TinyFamily], cli: Callable[..., Outcome]
) -> None:
    arguments = ["extract", photos, "--backbone", "tiny", "--weights", "none", "-o", output, "--views", "2"]
    foreseen = cli(*arguments, "--dry-run", "--json").json
    assert (foreseen["to_compute"], foreseen["views"]) == (42, {"train": 2, "val": 0})
    done = cli(*arguments, "--json").json
    assert (done["rows"], done["computed"], done["reused"], done["views"]) == (18, 42, 0, {"train": 2, "val": 0})
    assert "views" in cli("cache", "ls", output.parent).out
    info = cli("cache", "info", output, "--json").json
    assert info["views"] == {"train": 2, "others": 0, "seed": 0, "recipe": RECIPE}
    assert "2 of each training image; seed 0" in cli("cache", "info", output).out
    flip_byte(output, "train/views", 0)
    verified = cli("cache", "verify", output, "--json")
    assert (verified.code, verified.json[0]["problems"]) == (1, ["train/views rows 0 to 11"])
    refused = cli(*arguments[:-1], "-1")
    assert (refused.code, refused.out) == (2, "")
    with pytest.raises(SettingsError, match=r"--test-views is 2000: expected 0 to 1,000"):
        extract(photos, output, test_views=2000)


def test_an_image_whose_views_are_bad_counts_as_one_bad_image() -> None:
    class Batch(list[int]):
        bad = [BadImage("a.jpg", "damaged")] * 3

    assert Tally("extracting", 10).add(Batch(range(8))) == "10 cached, 5 computed, 1 bad"


def test_views_go_with_a_network_that_was_given(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    backbone = featcache.wrap_network(network, InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.5,)))
    extraction = featcache.extract_features(photos, output, backbone=backbone, views=1)
    assert extraction.cache.splits["train"].views.shape == (12, 1, 4)


def test_clips_have_views(tmp_path: Path, output: Path) -> None:
    class Moving(torch.nn.Module):
        def forward(self, clips: Tensor) -> Tensor:
            return clips.mean((3, 4)).flatten(1)

    for split in ("train", "val"):
        for c, (name, colour) in enumerate(COLOURS.items()):
            for i in range(2):
                folder = tmp_path / "clips" / split / name / f"clip_{i}"
                folder.mkdir(parents=True)
                for t in range(3):
                    draw_photo(colour, 100 * c + 10 * i + t + (7 if split == "val" else 0)).save(folder / f"{t}.png")
    look = InputFormat(input_size=(16, 16), mean=(0.5,), std=(0.25,), frames=3)
    backbone = featcache.wrap_network(Moving(), look)
    extraction = featcache.extract_features(
        tmp_path / "clips", output, backbone=backbone, views=2, decoder="pillow", workers=1
    )
    train = read_cache(output).splits["train"]
    assert (extraction.computed, train.views.shape) == (6 * 3 + 6, (6, 2, 9))
    folder = tmp_path / "clips" / train.listing.paths[1]
    frames = [Image.open(folder / f"{t}.png").convert("RGB") for t in range(3)]
    pixels = make_view_transform(backbone.preprocessing)(frames, hash_clip(folder), 1)
    expected = ((pixels.float() / 255 - 0.5) / 0.25).mean((2, 3)).flatten()
    np.testing.assert_allclose(train.views[1, 1], expected.numpy(), rtol=1e-4, atol=1e-5)


# Predicting


@pytest.fixture
def head(photos: Path, output: Path, tiny: type[TinyFamily]) -> Path:
    extract(photos, output)
    return featcache.train_head(output, output.with_name("head")).folder


def test_probabilities_are_averaged_over_the_image_and_its_views(head: Path, photos: Path, output: Path) -> None:
    extract(photos, output, test_views=3)
    classifier, val = load_classifier(head), read_cache(output).splits["val"]
    averaged, bad = classifier.predict_files(val.listing.paths, root=photos, device=CPU, views=3, batch_size=4)
    rows = np.concatenate([val.features[:, None], val.views], axis=1)
    logits = classifier._find_logits(rows.reshape(-1, 8)).astype(np.float64)
    each = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(averaged, each.reshape(6, 4, 2).mean(axis=1), atol=1e-5)
    assert bad == []


def test_predict_takes_views_and_names_a_bad_file_once(
    head: Path, photos: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    (tmp_path / "bad.jpg").write_text("text")
    files = [photos / "val/red/photo_000.jpg", tmp_path / "bad.jpg", photos / "val/blue/photo_000.jpg"]
    done = cli("predict", head, *files, "--views", "4", "--json")
    assert [(row["path"], row["label"]) for row in done.json] == [(str(files[0]), "red"), (str(files[2]), "blue")]
    assert (done.code, done.err.count("bad.jpg")) == (3, 1)
    plain = cli("predict", head, *files, "--json").json
    assert [row["probability"] for row in plain] != [row["probability"] for row in done.json]
    with pytest.raises(SettingsError, match=r"--views is -1: expected 0 to 1,000"):
        featcache.predict(head, files, views=-1)


@pytest.mark.usefixtures("tiny")
def test_predict_averages_as_the_run_was_judged(photos: Path, output: Path, cli: Callable[..., Outcome]) -> None:
    extract(photos, output, test_views=3)
    run = featcache.train_head(output, output.with_name("tta"), tta=True)
    assert run.record.details["test_views"] == 3
    files = sorted(str(path) for path in (photos / "val").rglob("*.jpg"))
    told, asked, plain = (
        cli("predict", run.folder, *files, *more, "--json") for more in ([], ["--views", "3"], ["--views", "0"])
    )
    assert "averaged over 3 views of each image, as the run was judged" in told.err
    assert told.json == asked.json != plain.json
    written = read_largest(run.folder / "predictions.csv")
    for row in told.json:
        assert row["probability"] == pytest.approx(written[Path(row["path"]).relative_to(photos).as_posix()], abs=1e-5)


def read_largest(path: Path) -> dict[str, float]:
    """The largest probability of every image."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {row["path"]: max(float(row[name]) for name in row if name.startswith("probability_")) for row in rows}


def test_where_no_views_are_wanted_rows_are_made_as_ever(photos: Path, output: Path, tiny: type[TinyFamily]) -> None:
    plan = plan_extraction(photos, output, ExtractConfig(**TINY))
    assert type(compute.make_rows(plan, plan.missing, LOOK)) is ImageRows
