"""A table of changes to data, weights, options and files, each with the answer that an extraction must give."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import COLOURS, TinyFamily, TinyNetwork, draw_photo
from PIL import Image
from safetensors.torch import load_file, save_file

import featcache
import featcache.dataset
from featcache.backbones import Backbone, describe_preprocessing
from featcache.cache import FeatureCache
from featcache.errors import StaleCacheError
from featcache.stages.explain import explain_cache

# The same bits, whatever else is computed together with an image.
HOW: dict[str, Any] = {"runtime": "eager", "batch_size": 1, "workers": 0}
WHAT = ("backbone", "weights", "seed", "val_fraction", "store", "skip_bad")
BLUE, RED = "train/blue/photo_001.jpg", "train/red/photo_002.jpg"


@dataclass
class World:
    """What the next extraction will be called with, and the folder that it all lies in."""

    folder: Path
    data: Path
    output: Path
    options: dict[str, Any]
    patch: pytest.MonkeyPatch

    def describe(self, **changes: Any) -> None:
        """From now on every backbone's description has these values, named with dots."""
        describe = Backbone.describe

        def describe_other(backbone: Backbone, stored: str = "float32") -> dict[str, Any]:
            description = describe(backbone, stored)
            for name, value in changes.items():
                *groups, last = name.split(".")
                group = description
                for part in groups:
                    group = group[part]
                group[last] = value
            return description

        self.patch.setattr(Backbone, "describe", describe_other)

    def preprocess(self, **changes: Any) -> None:
        """From now on the tiny networks' preprocessing has these values."""
        other = dataclasses.replace(describe_preprocessing("tiny"), **changes)
        self.patch.setattr(featcache.backbones, "make_preprocessing", lambda *_: other)

    def extract(self) -> featcache.Extraction:
        """The extraction that is being tested."""
        return featcache.extract_features(self.data, self.output, **self.options)


Act = Callable[[World], None]


def nothing(world: World) -> None:
    pass


def touch(world: World) -> None:
    for path in world.data.rglob("*.jpg"):
        path.touch()


def touch_into_the_past(world: World) -> None:
    os.utime(world.data / BLUE, ns=(10**18, 10**18))


def forbid_writing(world: World) -> None:
    (world.data / BLUE).chmod(0o444)


def rename_image(world: World) -> None:
    (world.data / BLUE).rename(world.data / "train/blue/zebra.jpg")


def rename_in_another_order(world: World) -> None:
    for i, path in enumerate(sorted(world.data.rglob("*.jpg"), reverse=True)):
        path.rename(path.with_name(f"new_{i:03d}.JPEG"))


def into_a_subfolder(world: World) -> None:
    (world.data / "train/blue/camera").mkdir()
    (world.data / BLUE).rename(world.data / "train/blue/camera/1.jpg")


def move_data(world: World) -> None:
    world.data = world.data.rename(world.folder / "moved")


def copy_data(world: World) -> None:
    world.data = Path(shutil.copytree(world.data, world.folder / "copied", copy_function=shutil.copyfile))


def link_to_data(world: World) -> None:
    (world.folder / "link").symlink_to(world.data)
    world.data = world.folder / "link"


def name_data_relatively(world: World) -> None:
    world.patch.chdir(world.folder)
    world.data = Path(world.data.name)


def link_to_image(world: World) -> None:
    original = (world.data / BLUE).rename(world.folder / "original.jpg")
    (world.data / BLUE).symlink_to(original)


def second_hard_link(world: World) -> None:
    (world.data / "val/red/second.jpg").hardlink_to(world.data / RED)


def relabel(world: World) -> None:
    (world.data / BLUE).rename(world.data / "train/red/was_blue.jpg")


def swap_contents(world: World) -> None:
    one, other = world.data / BLUE, world.data / RED
    blue, red = one.read_bytes(), other.read_bytes()
    one.write_bytes(red)
    other.write_bytes(blue)


def swap_names(world: World) -> None:
    one, other = world.data / BLUE, world.data / RED
    one.rename(world.data / "aside")
    other.rename(one)
    (world.data / "aside").rename(other)


def swap_contents_of_one_size_and_time(world: World) -> None:
    one, other = world.data / BLUE, world.data / RED
    size = max(one.stat().st_size, other.stat().st_size)
    blue, red = (path.read_bytes().ljust(size, b"\0") for path in (one, other))
    swapped = {one: red, other: blue}
    for path, content in swapped.items():
        before = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def pad_two_images(world: World) -> None:
    paths = [world.data / BLUE, world.data / RED]
    size = max(path.stat().st_size for path in paths)
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(10**18, 10**18))


def from_train_to_val(world: World) -> None:
    (world.data / BLUE).rename(world.data / "val/blue/from_train.jpg")


def swap_splits(world: World) -> None:
    (world.data / "train").rename(world.data / "aside")
    (world.data / "val").rename(world.data / "train")
    (world.data / "aside").rename(world.data / "val")


def flatten(world: World) -> None:
    for path in sorted(world.data.rglob("*.jpg")):
        split, name, file = path.relative_to(world.data).parts
        (world.folder / "flattened" / name).mkdir(parents=True, exist_ok=True)
        path.rename(world.folder / "flattened" / name / f"{split}_{file}")
    world.data = world.folder / "flattened"


def copy_val_as_test(world: World) -> None:
    shutil.copytree(world.data / "val", world.data / "test")


def rename_class(world: World) -> None:
    for split in ("train", "val"):
        (world.data / split / "blue").rename(world.data / split / "sky")


def remove_image(world: World) -> None:
    (world.data / BLUE).unlink()


def remove_and_bring_back(world: World) -> None:
    content = (world.data / BLUE).read_bytes()
    (world.data / BLUE).unlink()
    world.extract()
    (world.data / BLUE).write_bytes(content)


def copy_image(world: World) -> None:
    shutil.copyfile(world.data / BLUE, world.data / "train/blue/copy.jpg")


def stray_file(world: World) -> None:
    (world.data / "train/blue/notes.txt").write_text("no image")


def add_image(world: World) -> None:
    draw_photo(COLOURS["green"], 4711).save(world.data / "train/blue/new.jpg")


def add_two_copies_of_an_image(world: World) -> None:
    add_image(world)
    shutil.copyfile(world.data / "train/blue/new.jpg", world.data / "val/red/new.jpg")


def add_class(world: World) -> None:
    for i, split in enumerate(("train", "val")):
        (world.data / split / "green").mkdir()
        draw_photo(COLOURS["green"], 4711 + i).save(world.data / split / "green/new.jpg")


def append_byte(world: World) -> None:
    with (world.data / BLUE).open("ab") as file:
        file.write(b"\0")


def change_a_byte_of_the_header(world: World) -> None:
    content = bytearray((world.data / BLUE).read_bytes())
    assert content[6:10] == b"JFIF"
    content[15] ^= 1  # of the pixel density, which no decoder minds
    (world.data / BLUE).write_bytes(content)


def other_picture_of_one_size(world: World) -> bytes:
    path = world.folder / "other.jpg"
    draw_photo(COLOURS["green"], 4711).save(path, quality=50)
    return path.read_bytes().ljust((world.data / BLUE).stat().st_size, b"\0")


def same_size_and_time(world: World) -> None:
    path = world.data / BLUE
    before, content = path.stat(), other_picture_of_one_size(world)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def another_file_of_same_size_and_time(world: World) -> None:
    path = world.data / BLUE
    before = path.stat()
    (world.folder / "aside").write_bytes(other_picture_of_one_size(world))
    os.utime(world.folder / "aside", ns=(before.st_atime_ns, before.st_mtime_ns))
    (world.folder / "aside").replace(path)


def encode_again(world: World) -> None:
    with Image.open(world.data / BLUE) as image:
        image.load()
    image.save(world.data / BLUE, quality=60)


def encode_as_png(world: World) -> None:
    with Image.open(world.data / BLUE) as image:
        image.save((world.data / BLUE).with_suffix(".png"))
    (world.data / BLUE).unlink()


def break_an_image(world: World) -> None:
    (world.data / BLUE).write_text("no image")
    world.options["skip_bad"] = True


def make_weights(world: World, name: str = "weights.safetensors") -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tensors = TinyNetwork().state_dict()
    save_tensors(tensors, world.folder / name)
    world.options["weights"] = str(world.folder / name)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def read_tensors(world: World) -> dict[str, torch.Tensor]:
    path = Path(world.options["weights"])
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def move_weights(world: World) -> None:
    (world.folder / "elsewhere").mkdir()
    moved = Path(world.options["weights"]).rename(world.folder / "elsewhere" / "renamed.safetensors")
    world.options["weights"] = str(moved)


def save_weights_as(world: World, name: str) -> None:
    save_tensors(read_tensors(world), world.folder / name)
    world.options["weights"] = str(world.folder / name)


def change_weights(world: World, tensor: str) -> None:
    tensors = read_tensors(world)
    flat = tensors[tensor].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf)) if flat.is_floating_point() else flat[0] + 1
    save_tensors(tensors, Path(world.options["weights"]))


def random_weights_from_a_file(world: World) -> None:
    tensors = featcache.load_backbone("tiny", weights="none").network.state_dict()
    save_tensors(dict(tensors), world.folder / "random.pth")
    world.options["weights"] = str(world.folder / "random.pth")


def option(**options: Any) -> Act:
    return lambda world: world.options.update(options)


def look(**changes: Any) -> Act:
    return lambda world: world.preprocess(**changes)


def flat(world: World) -> None:
    world.data = world.folder / "flat"


def flat_with_weights_file(world: World) -> None:
    flat(world)
    make_weights(world)


def refuse_then_force(world: World) -> None:
    world.options["seed"] = 1
    with pytest.raises(StaleCacheError):
        world.extract()
    world.options["force"] = True


def reuse_other(world: World) -> None:
    world.options["reuse"] = (str(world.output.rename(world.folder / "other.h5")),)


def reuse_other_for_half(world: World) -> None:
    add_image(world)
    reuse_other(world)


def reuse_other_rounded(world: World) -> None:
    reuse_other(world)
    world.options["store"] = "float16"


def reuse_another_extractor(world: World) -> None:
    reuse_other(world)
    world.options["seed"] = 1


def move_cache(world: World) -> None:
    world.output = world.output.rename(world.folder / "renamed.h5")


def remove_cache(world: World) -> None:
    world.output.unlink()


class Change(NamedTuple):
    """A change, what it is made to, and the answer: "reuse", "extend N" or "refuse FIELD".

    `decision` is what `explain_cache` says where that is another word; `wanted` how many images it would compute where
    not all of those go through the network; `start` what is done before the first extraction.
    """

    name: str
    act: Act
    answer: str
    decision: str = ""
    wanted: int | None = None
    start: Act = nothing


CHANGES = [
    Change("nothing changes", nothing, "reuse"),
    Change("all files are touched", touch, "reuse"),
    Change("a file's time is set back", touch_into_the_past, "reuse"),
    Change("a file becomes read-only", forbid_writing, "reuse"),
    Change("a file gets another name", rename_image, "reuse"),
    Change("all files get other names in another order", rename_in_another_order, "reuse"),
    Change("a file goes into a folder of its class folder", into_a_subfolder, "reuse"),
    Change("the data moves elsewhere", move_data, "reuse"),
    Change("the data is copied elsewhere", copy_data, "reuse"),
    Change("the data is reached through a link", link_to_data, "reuse"),
    Change("the data is named relative to here", name_data_relatively, "reuse"),
    Change("an image becomes a link to where it went", link_to_image, "reuse"),
    Change("an image gets a second hard link", second_hard_link, "reuse"),
    Change("an image gets another label", relabel, "reuse"),
    Change("two files swap contents", swap_contents, "reuse"),
    Change("two files swap names", swap_names, "reuse"),
    Change(
        "two files of one size and time swap contents unseen",
        swap_contents_of_one_size_and_time,
        "reuse",
        start=pad_two_images,
    ),
    Change("an image goes from train to val", from_train_to_val, "reuse"),
    Change("train and val swap", swap_splits, "reuse"),
    Change("train and val become one flat folder", flatten, "reuse"),
    Change("a test split appears, a copy of val", copy_val_as_test, "reuse"),
    Change("a class gets another name", rename_class, "reuse"),
    Change("an image goes", remove_image, "reuse"),
    Change("an image goes, and comes back after an extraction", remove_and_bring_back, "extend 1"),
    Change("an image gets a copy of another name", copy_image, "reuse"),
    Change("a file that is no image appears", stray_file, "reuse"),
    Change("a new image", add_image, "extend 1"),
    Change("a new image twice", add_two_copies_of_an_image, "extend 1"),
    Change("a new class", add_class, "extend 2"),
    Change("a byte behind an image's end", append_byte, "extend 1"),
    Change("a byte of an image's header", change_a_byte_of_the_header, "extend 1"),
    Change("another picture of the same size and time", same_size_and_time, "extend 1"),
    Change("another file of the same size and time", another_file_of_same_size_and_time, "extend 1"),
    Change("an image is encoded again", encode_again, "extend 1"),
    Change("an image becomes a PNG", encode_as_png, "extend 1"),
    Change("an image breaks and is left out", break_an_image, "reuse", decision="extend", wanted=1),
    Change("random weights of another seed", option(seed=1), "refuse weights"),
    Change("the same random weights from a file", random_weights_from_a_file, "reuse"),
    Change("the weights file moves", move_weights, "reuse", start=make_weights),
    Change("the weights as .pth", partial(save_weights_as, name="w.pth"), "reuse", start=make_weights),
    Change(
        "the weights as .safetensors",
        partial(save_weights_as, name="w.safetensors"),
        "reuse",
        start=partial(make_weights, name="weights.pth"),
    ),
    Change(
        "the last bit of one weight",
        partial(change_weights, tensor="conv.weight"),
        "refuse weights",
        start=make_weights,
    ),
    Change(
        "the last bit of one weight in .pth",
        partial(change_weights, tensor="norm.running_mean"),
        "refuse weights",
        start=partial(make_weights, name="weights.pth"),
    ),
    Change(
        "weights of the classifier, which is removed",
        partial(change_weights, tensor="fc.weight"),
        "reuse",
        start=make_weights,
    ),
    Change(
        "BatchNorm's count of batches, which nothing uses",
        partial(change_weights, tensor="norm.num_batches_tracked"),
        "reuse",
        start=make_weights,
    ),
    Change("stored as float16", option(store="float16"), "refuse precision.stored"),
    Change(
        "stored as float32 after float16",
        option(store="float32"),
        "refuse precision.stored",
        start=option(store="float16"),
    ),
    Change("another crop", look(crop=12), "refuse preprocessing.crop"),
    Change("another size", look(resize=24), "refuse preprocessing.resize"),
    Change("another interpolation", look(interpolation="bicubic"), "refuse preprocessing.interpolation"),
    Change("another mean", look(mean=(0.4, 0.5, 0.5)), "refuse preprocessing.mean"),
    Change("another deviation", look(std=(0.25, 0.25, 0.26)), "refuse preprocessing.std"),
    Change("other rules of decoding", look(decoding="libvips"), "refuse preprocessing.decoding"),
    Change("another layer", lambda world: world.describe(layer="input of norm"), "refuse layer"),
    Change(
        "another precision of computing",
        lambda world: world.describe(**{"precision.compute": "bfloat16"}),
        "refuse precision.compute",
    ),
    Change("another name of the same network", lambda world: world.describe(backbone="tiny2"), "refuse backbone"),
    Change("another batch size", option(batch_size=7), "reuse"),
    Change("other workers", option(workers=2), "reuse"),
    Change("another runtime", option(runtime="fused"), "reuse"),
    Change("bad files would be left out", option(skip_bad=True), "reuse"),
    Change("the device is named", option(device="cpu"), "reuse"),
    Change("it would wait", option(wait=True), "reuse"),
    Change("it trusts nothing", option(rehash=True), "reuse"),
    Change("it would replace", option(force=True), "reuse"),
    Change("another share of validation", option(val_fraction=0.4), "reuse", start=flat),
    Change("another split by another seed", option(seed=1), "reuse", start=flat_with_weights_file),
    Change("another extractor replaces a refused one", refuse_then_force, "extend 18", decision="replace"),
    Change("float16 replaces float32", option(store="float16", force=True), "reuse", decision="replace"),
    Change(
        "float32 replaces float16",
        option(store="float32", force=True),
        "extend 18",
        decision="replace",
        start=option(store="float16"),
    ),
    Change("rows of another cache", reuse_other, "reuse", decision="create"),
    Change("rows of another cache and a new image", reuse_other_for_half, "extend 1", decision="create"),
    Change("rows of another cache, rounded", reuse_other_rounded, "reuse", decision="create"),
    Change("rows of another extractor's cache", reuse_another_extractor, "refuse weights", decision="raise"),
    Change("the cache file gets another name", move_cache, "reuse"),
    Change("the cache file is removed", remove_cache, "extend 18", decision="create"),
]


@pytest.fixture(scope="module", autouse=True)
def answers(tell: Callable[[str], None]) -> Iterator[dict[str, bool]]:
    """Whether each change got the right answer; said in one line at the end."""
    right: dict[str, bool] = {}
    yield right
    tell(f"mutations: {len(right)} changes, {sum(right.values())} answers right")


@pytest.fixture
def world(
    photos: Path,
    flat_photos: Path,
    tmp_path: Path,
    tiny: type[TinyFamily],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    """Settled files, as after a coffee: whoever trusts stats trusts them."""
    monkeypatch.setattr(featcache.dataset.hashing, "RACY_NS", 20_000_000)
    options = {"backbone": "tiny", "weights": "none", **HOW}
    return World(tmp_path, photos, tmp_path / "f.h5", options, monkeypatch)


def extract_from_scratch(world: World) -> FeatureCache:
    options = {name: value for name, value in world.options.items() if name in WHAT}
    path = featcache.extract_features(world.data, world.folder / "scratch.h5", **options, **HOW).path
    return featcache.read_cache(path)


def rows_of(cache: FeatureCache) -> dict[str, bytes]:
    return {
        digest: row.tobytes()
        for split in cache.splits.values()
        for digest, row in zip(split.listing.digests, split.features, strict=True)
    }


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def named_fields(message: str) -> list[str]:
    """The fields in "... (NAME: OLD -> NEW; NAME: OLD -> NEW); ..."."""
    return re.findall(r"(?:\(|; |reused: )([\w.]+): [^()]*? -> ", message)


def check_prediction(world: World, change: Change) -> None:
    answer, _, what = change.answer.partition(" ")
    before = snapshot(world.folder)
    explanation = explain_cache(world.data, world.output, **world.options)
    assert snapshot(world.folder) == before
    assert explanation.plan.decision == (change.decision or answer)
    if explanation.plan.decision in ("reuse", "extend", "refuse"):
        assert [field.name for field in explanation.fields if not field.same] == ([what] if answer == "refuse" else [])
    if answer != "refuse":
        wanted = int(what or 0) if change.wanted is None else change.wanted
        assert len(explanation.plan.missing) == wanted


def check_refusal(world: World, tiny: type[TinyFamily], field: str) -> None:
    before = {path: path.read_bytes() for path in world.folder.glob("*.h5")}
    with pytest.raises(StaleCacheError) as caught:
        world.extract()
    assert named_fields(str(caught.value)) == [field]
    assert tiny.calls == 0
    assert {path: path.read_bytes() for path in world.folder.glob("*.h5")} == before


def check_rows(world: World) -> None:
    cache, scratch = featcache.read_cache(world.output), extract_from_scratch(world)
    assert rows_of(cache) == rows_of(scratch)
    assert cache.content_sha256 == scratch.content_sha256


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_change_gets_the_right_answer(
    world: World, change: Change, tiny: type[TinyFamily], answers: dict[str, bool]
) -> None:
    answers[change.name] = False
    change.start(world)
    time.sleep(0.03)
    first = world.extract()
    assert all(split.listing.stats.any(axis=1).all() for split in first.cache.splits.values())
    change.act(world)
    tiny.calls = 0
    answer, _, what = change.answer.partition(" ")
    if change.decision == "raise":
        with pytest.raises(StaleCacheError):
            explain_cache(world.data, world.output, **world.options)
    else:
        check_prediction(world, change)
    assert tiny.calls == 0
    if answer == "refuse":
        check_refusal(world, tiny, what)
    else:
        extraction = world.extract()
        assert (tiny.calls, extraction.computed) == (int(what or 0), int(what or 0))
        assert world.extract().computed == 0
        assert tiny.calls == int(what or 0)
        check_rows(world)
        assert not list(world.folder.glob(f"*{world.output.name}?*"))
    answers[change.name] = True


def test_float16_from_a_float32_cache_holds_its_rounded_rows(world: World, tiny: type[TinyFamily]) -> None:
    wide = rows_of(featcache.read_cache(world.extract().path))
    tiny.calls = 0
    world.options |= {"store": "float16", "force": True}
    narrow = world.extract().cache
    assert (tiny.calls, narrow.stored) == (0, "float16")
    for digest, row in rows_of(narrow).items():
        np.testing.assert_array_equal(
            np.frombuffer(row, np.float16), np.frombuffer(wide[digest], np.float32).astype(np.float16)
        )
