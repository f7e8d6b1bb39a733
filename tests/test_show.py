"""featcache show: what each grid shows, in a file or a window."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import COLOURS, Outcome, TinyFamily, draw_photo, fill_class
from matplotlib.text import Text
from PIL import Image

import featcache
from featcache import plots
from featcache.cache import open_cache, read_cache
from featcache.config import ShowConfig
from featcache.errors import BadImagesError, CacheError, DatasetError, DeviceError, RunError, SettingsError
from featcache.stages.show import (
    Look,
    look_at_batch,
    look_at_cache,
    look_at_cached_views,
    look_at_predictions,
    look_at_views,
)

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "fused", "workers": 1}
RED = "train/red/photo_000.jpg"
FAKE_BACKEND = """
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

shown = []

class FigureManager(FigureManagerBase):
    @classmethod
    def pyplot_show(cls, *, block=None):
        from matplotlib._pylab_helpers import Gcf
        shown.extend(manager.canvas.figure for manager in Gcf.get_all_fig_managers())

class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
"""

pytestmark = pytest.mark.usefixtures("one_thread")
Cli = Callable[..., Outcome]


@pytest.fixture
def cached(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> Path:
    """A cache with three views of each training image."""
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY, views=3, seed=4, decoder="pillow")
    return tmp_path / "f.h5"


@pytest.fixture
def head(cached: Path, tmp_path: Path) -> Path:
    return featcache.train_head(cached, tmp_path / "head").folder


def colour_of(picture: np.ndarray) -> str:
    """Which of the generated photographs' colours a picture has."""
    mean = 255 * picture.mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def look(draw: Callable[[Path, ShowConfig], Look], target: Path, **settings: Any) -> Look:
    return draw(target, ShowConfig(**settings))


# A training batch


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_a_batch_has_the_images_own_colours_and_labels(photos: Path, tiny: type[TinyFamily], augment: str) -> None:
    batch = look(look_at_batch, photos, backbone="tiny", augment=augment, n_images=12)
    assert batch.pictures.shape == (12, 16, 16, 3)
    assert [colour_of(picture) for picture in batch.pictures] == batch.titles
    assert sorted(batch.titles) == ["blue"] * 6 + ["red"] * 6


def test_a_batch_is_the_same_each_time_and_leaves_torchs_random_numbers_alone(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    first, second, other = (
        look(look_at_batch, photos, backbone="tiny", augment="randaugment", seed=seed).pictures for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    before = torch.get_rng_state()
    featcache.show(photos, tmp_path / "a.png", backbone="tiny", n_images=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_one_class_has_only_that(photos: Path, tiny: type[TinyFamily]) -> None:
    assert look(look_at_batch, photos, backbone="tiny", class_name="red", n_images=9).titles == ["red"] * 6
    with pytest.raises(DatasetError, match="--class is 'green': expected one of blue, red"):
        look(look_at_batch, photos, backbone="tiny", class_name="green")


def test_mixed_images_have_the_shares_that_their_titles_tell(photos: Path, tiny: type[TinyFamily]) -> None:
    batch = look(look_at_batch, photos, backbone="tiny", augment="none", mixup=1.0, n_images=12)
    red, blue = np.array(COLOURS["red"]), np.array(COLOURS["blue"])
    shares = []
    for picture, title in zip(batch.pictures, batch.titles, strict=True):
        told = {name: float(share) for share, _, name in (line.partition(" ") for line in title.split("\n"))}
        assert sum(told.values()) == pytest.approx(1, abs=0.011)
        expected = told.get("red", 0) * red + told.get("blue", 0) * blue
        np.testing.assert_allclose(255 * picture.mean(axis=(0, 1)), expected, atol=12)
        shares.append(len(told))
    assert max(shares) == 2


# One image


def test_views_of_an_image_stand_beside_it_as_it_is_evaluated(photos: Path, tiny: type[TinyFamily]) -> None:
    views = look(look_at_views, photos, image=RED, backbone="tiny", n_images=5)
    assert views.titles == ["evaluation", "view 1", "view 2", "view 3", "view 4"]
    alone = look(look_at_views, photos / RED, backbone="tiny", n_images=5)
    assert np.array_equal(views.pictures, alone.pictures)
    plain = look(look_at_views, photos, image=str(photos / RED), backbone="tiny", augment="none", n_images=3)
    assert all(np.array_equal(picture, views.pictures[0]) for picture in plain.pictures)
    assert len({picture.tobytes() for picture in views.pictures}) == 5


def test_an_image_that_is_not_there_or_none_is_named(photos: Path, tiny: type[TinyFamily]) -> None:
    with pytest.raises(DatasetError, match=r"no image train/red/nothing\.jpg: expected a path relative to "):
        featcache.show(photos, image="train/red/nothing.jpg", backbone="tiny")
    (photos / RED).write_text("text")
    with pytest.raises(BadImagesError) as error:
        featcache.show(photos, image=RED, backbone="tiny", n_images=8)
    assert str(error.value).count(RED) == 1
    assert "--skip-bad" not in str(error.value)


# A cache


def test_the_views_shown_of_a_cached_image_are_those_whose_features_it_holds(photos: Path, cached: Path) -> None:
    views = look(look_at_cached_views, cached, image=RED)
    network = featcache.load_backbone("tiny", weights="none", seed=4).network.eval()
    with torch.inference_mode():
        features = network(torch.tensor((views.pictures - 0.5) / 0.25).permute(0, 3, 1, 2)).numpy()
    train = read_cache(cached).splits["train"]
    row = train.listing.paths.index(RED)
    np.testing.assert_allclose(features[0], train.features[row], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(features[1:], train.views[row], rtol=1e-4, atol=1e-6)
    assert views.titles[0] == "evaluation"
    assert [title.split(":")[0] for title in views.titles[1:]] == ["view 0", "view 1", "view 2"]
    assert look(look_at_cached_views, cached, image=RED, n_images=3).titles == views.titles[:3]


def test_a_cached_image_is_known_by_its_contents_wherever_it_lies(photos: Path, cached: Path, tmp_path: Path) -> None:
    (photos / RED).rename(tmp_path / "elsewhere.jpg")
    moved = look(look_at_cached_views, cached, image=str(tmp_path / "elsewhere.jpg"))
    assert len(moved.titles) == 4
    draw_photo(COLOURS["red"], 99).save(tmp_path / "other.jpg")
    with pytest.raises(
        CacheError, match=r"other\.jpg is none of the images of .*or has changed since; `featcache extr"
    ):
        look(look_at_cached_views, cached, image=str(tmp_path / "other.jpg"))


def test_a_cache_without_views_of_an_image_says_how_to_have_some(cached: Path, photos: Path, cli: Cli) -> None:
    with pytest.raises(CacheError, match=r"no views of its val images; `.*` adds some") as error:
        look(look_at_cached_views, cached, image="val/red/photo_000.jpg")
    command = str(error.value).split("`")[1].removeprefix("featcache ")
    assert cli(*command.split(), "--runtime", "fused").code == 0  # and it does
    assert len(look(look_at_cached_views, cached, image="val/red/photo_000.jpg").titles) == 5


def test_the_images_of_a_cache_have_their_labels_and_paths(photos: Path, cached: Path) -> None:
    seen = look(look_at_cache, cached, split="val", n_images=96)
    assert sorted(seen.captions or []) == sorted(open_cache(cached).splits["val"].listing.paths)
    assert [colour_of(picture) for picture in seen.pictures] == seen.titles
    assert set(look(look_at_cache, cached, class_name="blue").titles) == {"blue"}
    with pytest.raises(CacheError, match="has no test split: expected train or val"):
        look(look_at_cache, cached, split="test")


def test_a_cached_image_that_has_changed_is_not_shown_for_what_it_was(photos: Path, cached: Path) -> None:
    draw_photo(COLOURS["red"], 99).save(photos / RED)
    with pytest.raises(CacheError, match=r"photo_000\.jpg has changed since"):
        look(look_at_cache, cached, n_images=96)
    (photos / RED).unlink()
    with pytest.raises(BadImagesError, match=RED):
        look(look_at_cache, cached, n_images=96)


def test_imported_features_of_images_are_shown_plainly(photos: Path, tmp_path: Path) -> None:
    paths = sorted(path.relative_to(photos).as_posix() for path in (photos / "train").rglob("*.jpg"))
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(len(paths), 4)).astype("float32"))
    (tmp_path / "paths.txt").write_text("\n".join(paths))
    (tmp_path / "labels.txt").write_text("\n".join(path.split("/")[1] for path in paths))
    featcache.import_features(
        tmp_path / "t.npy", tmp_path / "i.h5", labels=tmp_path / "labels.txt", paths=tmp_path / "paths.txt", data=photos
    )
    seen = look(look_at_cache, tmp_path / "i.h5", n_images=4)
    assert seen.pictures.shape == (4, 224, 224, 3)
    assert [colour_of(picture) for picture in seen.pictures] == seen.titles
    with pytest.raises(CacheError, match="its features are imported"):
        look(look_at_cached_views, tmp_path / "i.h5", image=seen.captions[0])


# A run


def relabel(run: Path, rows: dict[str, str], name: str = "predictions.csv") -> None:
    """Let a run have predicted otherwise."""
    lines = (run / "predictions.csv").read_text().splitlines()
    for i, line in enumerate(lines):
        path, label, _, *numbers = line.split(",")
        if path in rows:
            lines[i] = ",".join([path, label, rows[path], *numbers])
    (run / name).write_text("\n".join(lines) + "\n")


def test_predictions_tell_the_true_class_where_they_are_wrong(head: Path) -> None:
    relabel(head, {"val/red/photo_001.jpg": "blue"})
    every = look(look_at_predictions, head)
    assert every.heading.endswith(": 5 of 6 validation images right")
    assert every.captions is not None
    wrong = every.captions.index("val/red/photo_001.jpg")
    assert every.titles[wrong].endswith("\n(is red)")
    assert every.right == [i != wrong for i in range(6)]
    assert look(look_at_predictions, head, wrong=True).captions == ["val/red/photo_001.jpg"]
    assert look(look_at_predictions, head, class_name="red").heading.endswith(": 2 of 3 validation images of red right")
    with pytest.raises(RunError, match="no wrong prediction to show of blue"):
        look(look_at_predictions, head, wrong=True, class_name="blue")


def test_predictions_of_a_test_split_are_shown_where_there_is_one(head: Path) -> None:
    with pytest.raises(RunError, match="has no test split; leave out --split test"):
        look(look_at_predictions, head, split="test")
    with pytest.raises(SettingsError, match="expected val or test"):
        look(look_at_predictions, head, split="train")
    relabel(head, {"val/red/photo_001.jpg": "blue"}, name="predictions_test.csv")
    assert "5 of 6 test images" in look(look_at_predictions, head, split="test").heading
    assert featcache.show(head, split="test") == head / "predictions_test.png"


# Options


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (
            "photos",
            ("--wrong",),
            "--wrong is of no use here: photos is a folder of images, for which there are --backb",
        ),
        ("photos", ("--split", "val"), "--split is of no use here"),
        ("photos", ("--image", RED, "--mixup", "1"), "--mixup is of no use here: photos is an image"),
        (f"photos/{RED}", ("--image", RED), "--image is of no use here"),
        ("head", ("--image", RED), "--image is of no use here: head is a run"),
        ("f.h5", ("--augment", "crop"), "--augment is of no use here: f.h5 is a cache"),
        ("photos", ("--mixup", "-1"), "--mixup is -1.0: expected 0, or 0.001 and more"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    photos: Path, cli: Cli, target: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("f.h5").touch()
    Path("head").mkdir()
    Path("head/run.json").touch()
    outcome = cli("show", target, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"Error: {message}")
    assert outcome.err.count("\n") == 1


def test_the_picture_of_each_has_its_usual_place(head: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(head.parent)
    tiny = ("--backbone", "tiny")
    for arguments, name in (
        (("photos", *tiny, "--cutmix", "1", "-n", "3"), "batch.png"),
        (("photos", *tiny, "--image", RED, "--augment", "trivialaugment", "-n", "2"), "views.png"),
        ((f"photos/{RED}", *tiny, "-n", "1"), "views.png"),
        (("f.h5", "--class", "red", "-n", "5"), "images.png"),
        (("f.h5", "--image", RED), "views.png"),
        (("head",), "head/predictions.png"),
    ):
        Path(name).unlink(missing_ok=True)
        outcome = cli("show", *arguments)
        assert (outcome.code, outcome.out.strip(), outcome.err) == (0, name, "")
        with Image.open(name) as picture:
            assert min(picture.size) > 200
            small = np.asarray(picture.convert("RGB").resize((50, 50))).reshape(-1, 3)
            assert len(np.unique(small, axis=0)) > 50


# A window


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A toolkit whose windows are a list of figures."""
    (tmp_path / "fake_windows.py").write_text(FAKE_BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    before = mpl.rcParams._get_backend_or_none()
    mpl.use("module://fake_windows", force=True)
    import fake_windows

    yield fake_windows.shown
    mpl.use(before or "agg", force=True)
    del sys.modules["fake_windows"]


def test_a_window_shows_the_figure_and_writes_nothing(
    photos: Path, tiny: type[TinyFamily], windows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    assert featcache.show(photos, window=True, backbone="tiny", n_images=6) is None
    assert not list(photos.glob("*.png"))
    (figure,) = windows
    assert len(figure.axes) == 6
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []  # and nothing of it is left


def test_a_window_and_an_output_are_both_made(
    photos: Path, tiny: type[TinyFamily], windows: list[Any], cli: Cli, tmp_path: Path
) -> None:
    window = ("show", photos, "--backbone", "tiny", "-n", "2", "--window", "--json")
    assert cli(*window, "-o", tmp_path / "a.png").json == {"figure": str(tmp_path / "a.png")}
    assert (tmp_path / "a.png").is_file()
    assert cli(*window).json == {"figure": None}
    assert len(windows) == 2


def test_without_a_display_a_window_is_an_error_before_any_work(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mpl.rcParams._get_backend_or_none()
    monkeypatch.setattr("featcache.stages.show.look_at_batch", lambda *_: 1 / 0)
    mpl.use("agg", force=True)
    with pytest.raises(
        DeviceError, match=r"no window can be opened: .*backend agg; without --window a PNG file is wri"
    ):
        featcache.show(photos, window=True)

    def refuse(backend: str) -> None:
        raise ImportError(f"Cannot load backend {backend!r}")

    monkeypatch.setattr("matplotlib.pyplot.switch_backend", refuse)
    with pytest.raises(DeviceError, match="no window can be opened: Cannot load backend"):
        featcache.show(photos, window=True)
    monkeypatch.undo()
    mpl.use(before or "agg", force=True)


def test_files_need_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from featcache import plots; "
        "plots.save_figure(plots.draw_grid(np.zeros((2, 8, 8, 3), 'f'), ['a', 'b']), Path('a.png')); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "a.png").is_file()


# Names


NAMES = [
    "a very long name of a class, longer than anybody would want to read below a small picture",
    "W" * 60,
    "$x_$ and $y",
    "Ümläut und ß",
    "蜜蜂和蚂蚁的很长很长的名字很长很长的名字很长很长的名字很长很长的名字",
    "\x1b[31m red\tbell",
    "not \udce9 UTF-8",
]


@pytest.mark.parametrize("n", [1, 3, 9, 96])
def test_no_title_is_wider_than_its_picture_whatever_the_names(n: int, tmp_path: Path) -> None:
    names = [NAMES[i % len(NAMES)] for i in range(n)]
    titles = [f"{name} 97%\n(is {name})" for name in names]
    figure = plots.draw_grid(np.zeros((n, 8, 8, 3), np.float32), titles, captions=names, heading=" ".join(NAMES))
    with plots.ignore_glyphs():
        figure.draw_without_rendering()
    for axes in figure.axes:
        width = axes.get_window_extent().width
        for text in (axes.title, axes.xaxis.label):
            assert text.get_text()
            assert text.get_window_extent().width <= width
    heading = next(text for text in figure.findobj(Text) if text in figure.texts)
    assert heading.get_window_extent().width <= figure.bbox.width
    assert heading.get_window_extent().y0 > max(axes.title.get_window_extent().y1 for axes in figure.axes)
    plots.save_figure(figure, tmp_path / "a.png")  # warnings are errors here


def test_titles_keep_clear_of_the_pictures_above_them() -> None:
    figure = plots.draw_grid(np.zeros((9, 8, 8, 3), np.float32), ["a\nb"] * 9, captions=["c.jpg"] * 9)
    figure.draw_without_rendering()
    first, below = figure.axes[0], figure.axes[5]
    assert first.get_window_extent().x0 == below.get_window_extent().x0
    assert below.title.get_window_extent().y1 < first.xaxis.label.get_window_extent().y0


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (2, 200)])
def test_pictures_keep_their_shape(shape: tuple[int, int]) -> None:
    (axes,) = plots.draw_grid(np.zeros((1, *shape, 3), np.float32), ["a"]).axes
    axes.apply_aspect()
    box = axes.get_window_extent()
    assert box.height / box.width == pytest.approx(shape[0] / shape[1], rel=0.02)


def test_letters_that_the_usual_font_lacks_are_taken_from_one_that_has_them() -> None:
    assert plots.find_families("ants") == plots.find_families("Ümläut") == ("DejaVu Sans",)
    families = plots.find_families("\u2312 arc")  # matplotlib's own DejaVu Sans Mono has it
    assert families[0] == "DejaVu Sans"
    assert len(families) == 2
    figure = plots.draw_grid(np.zeros((1, 8, 8, 3), np.float32), ["\u2312"])
    plots._choose_fonts(figure)
    assert figure.axes[0].title.get_fontfamily() == list(families)


def test_a_class_of_many_is_found_by_its_name(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for i in range(12):
        for split in ("train", "val"):
            fill_class(
                tmp_path / "many" / split / f"class {i:02d}", COLOURS["red"], 1, seed=10_000 + 2 * i + len(split)
            )
    assert look(look_at_batch, tmp_path / "many", backbone="tiny", class_name="class 11").titles == ["class 11"]
    with pytest.raises(DatasetError, match="class 09 and 2 more"):
        look(look_at_batch, tmp_path / "many", backbone="tiny", class_name="class 12")
