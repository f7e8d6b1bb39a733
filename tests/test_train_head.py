"""featcache.stages.train_head: stage 2, seen from outside."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, TinyFamily, fill_class
from test_solvers import make_cloud

import featcache
from featcache.backbones import families
from featcache.bundle import load_classifier
from featcache.cache import write_cache
from featcache.cache.streaming import StreamedFeatures
from featcache.errors import CacheError, DatasetError, OutputError, RunError, SettingsError
from featcache.files import canonical_json, hash_bytes
from featcache.heads import HeldOut, fit_head
from featcache.metrics import measure_probabilities, to_probabilities
from featcache.stages import draw_images, evaluate, learning_curve
from featcache.stages import train_head as stage
from featcache.stages.train_head import train_head

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none", "runtime": "fused", "workers": 1}
SOLVERS = ("lbfgs", "sklearn", "ridge", "sgd", "knn")


@pytest.fixture
def drawn() -> None:
    """Figures are really drawn."""


@pytest.fixture(autouse=True)
def little_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, few values of C, few resampled curves, and no figures unless they are what a test is about."""
    monkeypatch.setattr("featcache.heads.logistic.GRID", (1e-3, 1e-2, 0.1, 1.0))
    monkeypatch.setattr("featcache.heads.sgd.SMALL_STEPS", 50)
    monkeypatch.setattr(learning_curve, "RESAMPLED", 5)
    monkeypatch.setattr(learning_curve, "N_SIZES", 4)
    if "drawn" not in request.fixturenames:
        for module in (stage, evaluate):
            monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())
        for name in ("draw_selection", "draw_learning_curve"):
            monkeypatch.setattr(stage, name, lambda *arguments: None)
        monkeypatch.setattr(evaluate, "draw_confusions", lambda *arguments: None)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 training, 6 validation and the same 6 test photos of two classes, and two caches of them.

    "features.h5" is of training and validation images alone, "viewed.h5" has two views of every training image and
    three of every other one.
    """
    folder = tmp_path_factory.mktemp("extracted")
    for s, (split, n) in enumerate({"train": 6, "val": 3}.items()):
        for c, name in enumerate(("blue", "red")):
            fill_class(folder / "photos" / split / name, COLOURS[name], n, seed=1000 * s + 100 * c)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, TinyFamily()))
        patch.setattr("featcache.recall.memory_path", lambda: folder / "memory.json")
        featcache.extract_features(folder / "photos", folder / "features.h5", **TINY)
        shutil.copytree(folder / "photos/val", folder / "photos/test")
        featcache.extract_features(folder / "photos", folder / "viewed.h5", **TINY, views=2, test_views=3)
    return folder


@pytest.fixture
def features(extracted: Path, tiny: type[TinyFamily]) -> Path:
    return extracted / "features.h5"


@pytest.fixture
def viewed(extracted: Path, tiny: type[TinyFamily]) -> Path:
    return extracted / "viewed.h5"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three overlapping classes: 120 training, 90 validation and 60 test rows."""
    folder = tmp_path_factory.mktemp("imported")
    parts = [make_cloud(1, n=n, draw=draw) for draw, n in enumerate((120, 90, 60))]
    rows, labels = (np.concatenate(one) for one in zip(*parts, strict=True))
    split = np.repeat(["train", "val", "test"], [120, 90, 60])
    np.savez(folder / "table.npz", features=rows, labels=labels, split=split)
    return featcache.import_features(folder / "table.npz", folder / "imported.h5").path


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of 60, 12 and 1 training rows."""
    folder = tmp_path_factory.mktemp("rare")
    labels = np.repeat([0, 1, 2, 0, 1, 2], [60, 12, 1, 30, 30, 30])
    rows = np.random.default_rng(2).normal(size=(len(labels), 6)) + 2 * np.eye(3, 6)[labels]
    split = np.repeat(["train", "val"], [73, 90])
    np.savez(folder / "table.npz", features=rows.astype(np.float32), labels=labels, split=split)
    return featcache.import_features(folder / "table.npz", folder / "rare.h5").path


def read_json(path: Path) -> Any:
    """JSON as everybody reads it: without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def read_probabilities(folder: Path, name: str = "predictions.csv") -> np.ndarray:
    with (folder / name).open() as file:
        return np.array([[float(value) for value in row[3:]] for row in list(csv.reader(file))[1:]])


def test_a_head_separates_what_is_easy_to_separate(features: Path, tmp_path: Path) -> None:
    record = featcache.train_head(features, tmp_path / "run").record
    assert record.val_accuracy == 1.0
    measured = record.accuracy["val"]
    assert (measured["n"], measured["correct"], measured["accuracy"]) == (6, 6, 1.0)
    assert (measured["balanced_accuracy"], measured["brier"] < 0.5, measured["log_loss"] < 0.5) == (1.0, True, True)
    assert record.parameters == {"trainable": 2 * 8 + 2, "total": 2 * 8 + 2}
    assert record.details["solver"] == "lbfgs"
    assert record.details["converged"] is True


@pytest.mark.parametrize("solver", ["lbfgs", "knn"])
def test_a_run_folder_holds_all_that_is_promised(solver: str, features: Path, tmp_path: Path, drawn: None) -> None:
    folder = featcache.train_head(features, tmp_path / "run", solver=solver).folder
    assert all(path.stat().st_size > 5000 for path in folder.glob("*.png"))
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "predictions.csv", "history.csv", "model.json", "model.safetensors",
        "confusion.png", "selection.png",
    }  # fmt: skip
    record = read_json(folder / "run.json")
    assert {"settings", "seconds", "environment", "peak_memory_bytes", "accuracy", "data", "details"} <= set(record)
    assert record["settings"]["seed"] == 0
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "prediction", "probability_blue", "probability_red"]
    assert rows[0]["path"] == "val/blue/photo_000.jpg"
    assert float(rows[0]["probability_blue"]) + float(rows[0]["probability_red"]) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_makes_a_run(solver: str, imported: Path, tmp_path: Path) -> None:
    run = train_head(imported, tmp_path / "run", solver=solver)
    record, written = run.record, read_json(run.folder / "run.json")
    name = {"ridge": "ridge", "knn": "nearest-neighbour"}.get(solver, "linear")
    assert record.title.startswith(f"{name} head ({solver}, ")
    assert record.val_accuracy > 0.5
    assert (record.accuracy["val"]["n"], record.accuracy["test"]["n"]) == (90, 60)
    assert record.settings["solver"] == written["details"]["solver"] == solver
    columns = {"ridge": "C,loo_squared_error,loo_accuracy", "knn": "k,temperature,cv_log_loss,cv_accuracy"}
    lines = (run.folder / "history.csv").read_text().splitlines()
    assert lines[0] == columns.get(solver, "C,cv_log_loss,cv_accuracy")
    assert len(lines) > 4
    assert (run.folder / "selection.png").exists()
    assert written["details"]["optimistic"] is False
    assert read_json(run.folder / "model.json")["head"]["kind"] == ("neighbours" if solver == "knn" else "linear")


def test_the_extraction_is_charged_to_the_head(features: Path, tmp_path: Path) -> None:
    cache, record = featcache.read_cache(features), featcache.train_head(features, tmp_path / "run").record
    assert record.seconds["extraction"] == cache.provenance["seconds"] > 0
    parts = [value for name, value in record.seconds.items() if name != "total"]
    assert record.seconds["total"] == pytest.approx(sum(parts))
    assert min(parts) >= 0


def test_cpu_seconds_have_the_stages_that_the_seconds_have(features: Path, tmp_path: Path) -> None:
    cache, record = featcache.read_cache(features), featcache.train_head(features, tmp_path / "run").record
    assert list(record.cpu_seconds) == list(record.seconds)
    assert record.cpu_seconds["extraction"] == cache.provenance["cpu_seconds"] > 0
    assert record.cpu_seconds["total"] == pytest.approx(sum(record.cpu_seconds.values()) - record.cpu_seconds["total"])
    assert 0 < record.cpu_seconds["training"] < 1.5 * record.seconds["training"] + 0.05  # one thread
    assert featcache.read_record(tmp_path / "run") == record


def test_the_size_of_a_result_is_that_of_its_two_files(features: Path, tmp_path: Path) -> None:
    record = featcache.train_head(features, tmp_path / "run").record
    sizes = [(tmp_path / "run" / name).stat().st_size for name in ("model.json", "model.safetensors")]
    assert record.result_bytes == sum(sizes) > 500


@pytest.mark.usefixtures("tiny")
def test_operations_are_those_of_one_forward_pass_of_every_cached_image_and_view(
    extracted: Path, photos: Path, tmp_path: Path
) -> None:
    plain = featcache.train_head(extracted / "features.h5", tmp_path / "plain").record.details
    viewed = featcache.train_head(extracted / "viewed.h5", tmp_path / "viewed").record.details
    each = 2 * (8 * 8 * 8 * 3 * 3 * 3 + 8 * 5)  # the convolution's and the classifier's multiply-adds, 16 x 16 pixels
    assert plain["flops"] == 18 * each
    assert viewed["flops"] == (12 * 3 + 6 * 4 + 6 * 4) * each
    seconds = featcache.read_cache(extracted / "viewed.h5").provenance["seconds"]
    assert viewed["images_per_second"] == pytest.approx(84 / seconds)
    larger = featcache.extract_features(photos, tmp_path / "larger.h5", input_size=(32, 32), **TINY).path
    details = featcache.train_head(larger, tmp_path / "larger").record.details
    assert details["flops"] == 18 * 2 * (16 * 16 * 8 * 3 * 3 * 3 + 8 * 5)
    inside = featcache.extract_features(photos, tmp_path / "inside.h5", layer=("conv:avg",), **TINY).path
    assert featcache.train_head(inside, tmp_path / "inside").record.details["flops"] is None


def test_nobody_knows_what_imported_features_cost(imported: Path, tmp_path: Path) -> None:
    record = featcache.train_head(imported, tmp_path / "run").record
    assert (record.details["flops"], record.details["images_per_second"]) == (None, None)
    assert list(record.cpu_seconds) == ["selection", "training", "evaluation", "total"]


def test_a_cache_that_did_not_count_cpu_seconds_makes_a_run_without_them(features: Path, tmp_path: Path) -> None:
    cache = featcache.read_cache(features)
    provenance = {n: v for n, v in cache.provenance.items() if n not in ("cpu_seconds", "energy_joules")}
    write_cache(tmp_path / "old.h5", replace(cache, provenance=provenance))
    record = featcache.train_head(tmp_path / "old.h5", tmp_path / "run").record
    assert (record.cpu_seconds, record.energy_joules) == ({}, None)
    new = featcache.train_head(features, tmp_path / "new").record
    assert record.seconds["extraction"] == new.seconds["extraction"]
    assert len(featcache.compare_runs([tmp_path / "run", tmp_path / "new"], tmp_path / "out").arms) == 2


def test_a_run_that_was_written_before_costs_were_counted_is_read(features: Path, tmp_path: Path) -> None:
    folder = featcache.train_head(features, tmp_path / "run").folder
    value = read_json(folder / "run.json")
    later = ("cpu_seconds", "energy_joules", "result_bytes", "details")
    old = {name: entry for name, entry in value.items() if name not in later}
    (folder / "run.json").write_text(json.dumps(old))
    record = featcache.read_record(folder)
    assert (record.cpu_seconds, record.energy_joules, record.result_bytes, record.details) == ({}, None, None, {})
    assert record.seconds == value["seconds"]
    for name in ("seconds", "schema"):
        (folder / "run.json").write_text(json.dumps({key: entry for key, entry in old.items() if key != name}))
        with pytest.raises(RunError, match=f"damaged \\(KeyError: '{name}'\\)"):
            featcache.read_record(folder)


@pytest.mark.parametrize("name", ["cpu_seconds", "energy_joules"])
@pytest.mark.parametrize("value", ["much", -1.0, 1e300])
def test_a_cache_whose_costs_are_strange_is_refused(features: Path, tmp_path: Path, name: str, value: object) -> None:
    cache = featcache.read_cache(features)
    write_cache(tmp_path / "strange.h5", replace(cache, provenance={**cache.provenance, name: value}))
    with pytest.raises(CacheError, match=f"provenance.{name}"):
        featcache.train_head(tmp_path / "strange.h5", tmp_path / "run")


def test_a_given_c_is_used_and_nothing_is_selected(features: Path, tmp_path: Path) -> None:
    record = featcache.train_head(features, tmp_path / "run", C=0.5, solver="sklearn").record
    assert record.selection == "C = 0.5: given"
    assert (tmp_path / "run/history.csv").read_text() == "C,cv_log_loss,cv_accuracy\n0.5,,\n"
    assert not (tmp_path / "run/selection.png").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("more", [{"curve": True}, {"shots": 4}])
def test_validation_rows_have_no_say_in_the_head(photos: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    settings = {"calibrate": True, "repeats": 1, **more}
    features = featcache.extract_features(photos, tmp_path / "features.h5", **TINY).path
    first = featcache.train_head(features, tmp_path / "a", **settings).folder
    shutil.rmtree(photos / "val/red")
    shutil.copytree(photos / "val/blue", photos / "val/red")
    other = featcache.extract_features(photos, tmp_path / "other.h5", **TINY).path
    second = featcache.train_head(other, tmp_path / "b", **settings).folder
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    if "curve" in more:
        assert (first / "curve.csv").read_bytes() == (second / "curve.csv").read_bytes()


@pytest.mark.parametrize(("more", "settings"), [("curve", {"curve": True, "repeats": 1}), ("draws", {"shots": 3})])
def test_what_is_found_out_beside_a_head_is_not_its_cost(
    features: Path, tmp_path: Path, more: str, settings: dict[str, Any]
) -> None:
    seconds = featcache.train_head(features, tmp_path / "run", **settings).record.seconds
    parts = ("extraction", "selection", "training", "evaluation")
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in parts))
    assert seconds[more] > 0 <= seconds["evaluation"]
    assert set(seconds) == {*parts, "total", more}
    cpu = featcache.read_record(tmp_path / "run").cpu_seconds
    assert cpu["total"] == pytest.approx(sum(cpu[name] for name in parts))
    assert cpu[more] > 0 <= cpu["evaluation"]


def test_a_head_is_replaced_without_asking(features: Path, tmp_path: Path) -> None:
    featcache.train_head(features, tmp_path / "run", C=1.0)
    featcache.train_head(features, tmp_path / "run", C=2.0)
    assert featcache.read_record(tmp_path / "run").settings["C"] == 2.0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_anything_but_a_head_is_never_replaced(features: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not a run"):
        featcache.train_head(features, tmp_path / "run")
    assert (tmp_path / "run/thesis.txt").read_text() == "precious"


def test_a_features_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "features.h5").write_text("text")
    for solver in ("auto", "sgd", "knn"):
        with pytest.raises(CacheError, match="cannot be read as a feature cache"):
            featcache.train_head(tmp_path / "features.h5", tmp_path / "run", solver=solver)
        with pytest.raises(CacheError, match="does not exist"):
            featcache.train_head(tmp_path / "nothing.h5", tmp_path / "run", solver=solver)
    assert not (tmp_path / "run").exists()


def test_one_class_is_refused(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    for split in ("train", "val"):
        shutil.rmtree(photos / split / "red")
    features = featcache.extract_features(photos, tmp_path / "one.h5", **TINY).path
    with pytest.raises(DatasetError, match="at least 2 classes"):
        featcache.train_head(features, tmp_path / "run")


def test_a_test_split_is_reported_beside_the_validation_split(viewed: Path, tmp_path: Path) -> None:
    record = featcache.train_head(viewed, tmp_path / "run").record
    assert record.accuracy["test"]["n"] == 6
    assert record.accuracy["test"] == record.accuracy["val"]  # the same images
    assert (tmp_path / "run/predictions_test.csv").read_text().count("test/") == 6


def test_what_is_measured_is_what_was_predicted(imported: Path, tmp_path: Path) -> None:
    run = train_head(imported, tmp_path / "run", C=0.01)
    splits = featcache.read_cache(imported).splits
    for name, file in (("val", "predictions.csv"), ("test", "predictions_test.csv")):
        labels, probabilities = splits[name].listing.labels, read_probabilities(run.folder, file)
        measured = run.record.accuracy[name]
        assert measured["accuracy"] == (probabilities.argmax(axis=1) == labels).mean()
        for what, value in measure_probabilities(labels, probabilities).items():
            assert measured[what] == pytest.approx(value, abs=1e-4)


# --- settings that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shots": 2, "fraction": 0.5}, "--shots and --fraction are two ways"),
        ({"solver": "knn", "C": 1.0}, "nearest neighbours have none"),
        ({"k": 3}, "-k is of nearest neighbours: expected --solver knn"),
        ({"solver": "ridge", "temperature": 0.1}, "--temperature is of nearest neighbours"),
        ({"C": 1.0, "select_on": "val"}, "-C is given, so that --select-on has nothing to choose"),
        ({"k": 3, "temperature": 0.1, "solver": "knn", "select_on": "val"}, "-k and --temperature are given, so that"),
        ({"curve": True, "shots": 3}, "--curve learns from parts of all training images"),
        ({"curve": True, "fraction": 0.5}, "--curve learns from parts of all training images"),
        ({"solver": "knn", "scaling": "l2"}, "--scaling is of lbfgs or sklearn or ridge or sgd: expected --solver"),
        ({"solver": "lbfgs", "lr": 0.1}, "--lr is of sgd: expected --solver sgd"),
        ({"solver": "ridge", "epochs": 2}, "--epochs is of sgd"),
        ({"repeats": 3}, "--repeats is of --shots, --fraction and --curve"),
        ({"views": True}, "holds no views of the training images; .* --views 4"),
        ({"tta": True}, "holds no views of the validation images; .* --test-views 4"),
        ({"tta": True, "solver": "sgd"}, "holds no views of the validation images"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], words: str, features: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        train_head(features, tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- a few images -----------------------------------------------------------------------------------------------------


def test_draws_are_of_each_class_and_differ(imported: Path) -> None:
    listing = featcache.read_cache(imported).splits["train"].listing
    labels, classes = listing.labels, ("a", "b", "c")
    config = stage.HeadConfig(shots=7)
    draws = [draw_images.draw_images(labels, classes, config, draw) for draw in range(3)]
    for images in draws:
        assert np.bincount(labels[images]).tolist() == [7, 7, 7]
        assert np.array_equal(images, np.unique(images))
    assert not np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[0], draw_images.draw_images(labels, classes, config, 0))
    seeded = stage.HeadConfig(shots=7, seed=1)
    assert not np.array_equal(draws[0], draw_images.draw_images(labels, classes, seeded, 0))
    for fraction, expected in ((0.25, 10), (1.0, 40), (0.001, 1)):
        images = draw_images.draw_images(labels, classes, stage.HeadConfig(fraction=fraction), 0)
        assert np.bincount(labels[images]).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("solver", "few"),
    [
        ("lbfgs", {"shots": 5}),
        ("lbfgs", {"fraction": 0.125}),
        ("ridge", {"shots": 5}),
        ("sgd", {"shots": 5}),
        ("knn", {"shots": 5}),
    ],
)
def test_a_few_images_are_drawn_several_times(few: dict[str, Any], solver: str, imported: Path, tmp_path: Path) -> None:
    run = train_head(imported, tmp_path / "run", solver=solver, repeats=4, **few)
    draws = run.record.details["draws"]
    assert draws["what"] == ("5 images of each class" if "shots" in few else "0.125 of the training images")
    assert draws["images"] == 15
    for name, n in (("val", 90), ("test", 60)):
        values = draws[name]["accuracies"]
        assert len(values) == 4
        assert len(set(values)) > 1
        assert draws[name]["mean"] == pytest.approx(np.mean(values))
        assert draws[name]["std"] == pytest.approx(np.std(values, ddof=1))
        assert values[0] == run.record.accuracy[name]["accuracy"]
        assert all(round(value * n, 6) == round(value * n) for value in values)
    val = draws["val"]
    words = f"drawn 4 times: validation accuracy {val['mean']:.4f} on average, standard deviation {val['std']:.4f}"
    assert [note for note in run.record.notes if words in note]
    assert run.record.settings["repeats"] == 4


def test_a_draw_is_a_fit_of_its_own(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(features: Any, labels: Any, n_classes: int, config: stage.HeadConfig, **more: Any) -> Any:
        seeds.append(config.seed)
        return fit_head(features, labels, n_classes, config, **more)

    monkeypatch.setattr(draw_images, "fit_head", spy)
    draws = train_head(imported, tmp_path / "run", shots=6, repeats=3, seed=5).record.details["draws"]
    splits = featcache.read_cache(imported).splits
    train, val = splits["train"], splits["val"]
    for draw, found in enumerate(draws["val"]["accuracies"]):
        config = stage.HeadConfig(shots=6, seed=5)
        images = draw_images.draw_images(train.listing.labels, ("0", "1", "2"), config, draw)
        own = stage.HeadConfig(solver="lbfgs", seed=5 + draw, scaling="standard")  # as imported features are
        head = fit_head(train.features[images], train.listing.labels[images], 3, own).head
        assert found == (head.logits(val.features).argmax(axis=1) == val.listing.labels).mean()
    assert seeds == [5, 6, 7]


def test_a_single_draw_has_no_spread(imported: Path, tmp_path: Path) -> None:
    record = train_head(imported, tmp_path / "run", shots=1, repeats=1).record
    assert record.details["draws"]["val"]["std"] == 0
    assert "a class has a single training image" in record.selection


def test_more_images_than_a_class_has_are_refused(rare: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--shots is 2, and the class 2 has 1 training images; draw fewer"):
        train_head(rare, tmp_path / "run", shots=2)
    assert not (tmp_path / "run").exists()
    assert train_head(rare, tmp_path / "run", fraction=0.01, repeats=2).record.details["draws"]["images"] == 3


def test_views_are_drawn_with_their_images(viewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        draw_images,
        "fit_head",
        lambda x, *rest, views, **more: seen.append((x, views)) or fit_head(x, *rest, views=views, **more),
    )
    train_head(viewed, tmp_path / "run", shots=2, repeats=2)
    train = featcache.read_cache(viewed).splits["train"]
    for features, views in seen:
        where = [np.flatnonzero((train.features == row).all(axis=1))[0] for row in features]
        assert np.array_equal(views, train.views[where])
    seen.clear()
    train_head(viewed, tmp_path / "run", shots=2, repeats=2, views=False)
    assert [views for _, views in seen] == [None, None]


# --- the learning curve -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_curve_is_written_drawn_and_judged(solver: str, imported: Path, tmp_path: Path, drawn: None) -> None:
    run = train_head(imported, tmp_path / "run", solver=solver, C=0.03, curve=True, repeats=1, folds=3)
    with (run.folder / "curve.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    curve = read_json(run.folder / "run.json")["details"]["curve"]
    assert list(rows[0]) == ["images", "accuracy", "low", "high"]
    for row, point in zip(rows, curve["points"], strict=True):
        assert row == pytest.approx(point, abs=1e-5)
    assert rows[-1]["images"] == 80
    assert [one["images"] for one in curve["forecast"]] == [240, 480]
    assert curve["verdict"] in run.record.notes
    assert curve["verdict"].startswith("learning curve: ")
    assert (run.folder / "curve.png").stat().st_size > 5000


def test_a_curve_of_a_class_of_one_image_is_refused(rare: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="a class has a single one"):
        train_head(rare, tmp_path / "run", curve=True)
    assert not (tmp_path / "run").exists()


# --- choosing, counting, calibrating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_the_validation_split_chose_is_called_optimistic(solver: str, imported: Path, tmp_path: Path) -> None:
    run = train_head(imported, tmp_path / "run", solver=solver, select_on="val")
    assert "the validation split chose the head and is what is reported: its accuracy is optimistic" in run.record.notes
    assert run.record.details["optimistic"] is True
    assert "on the validation split, least " in run.record.selection
    header = (run.folder / "history.csv").read_text().splitlines()[0].split(",")
    assert header[-1] == "val_accuracy"
    splits = featcache.read_cache(imported).splits
    val = HeldOut(features=splits["val"].features, labels=splits["val"].listing.labels)
    train = splits["train"]
    config = stage.HeadConfig(solver=solver, select_on="val")
    expected = fit_head(train.features, train.listing.labels, 3, config, validation=val).selection.choice
    assert run.record.details["choice"] == expected


def test_draws_may_be_chosen_on_the_validation_split_too(imported: Path, tmp_path: Path) -> None:
    record = train_head(imported, tmp_path / "run", shots=5, repeats=2, select_on="val").record
    assert record.details["optimistic"] is True
    assert "on the validation split" in record.selection


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "ridge"])
def test_balanced_classes_find_more_of_the_rare_ones(solver: str, rare: Path, tmp_path: Path) -> None:
    plain, balanced = (
        train_head(rare, tmp_path / "run", solver=solver, C=0.01, class_weight=one).record for one in (None, "balanced")
    )
    found = [one.accuracy["val"]["balanced_accuracy"] for one in (plain, balanced)]
    assert found[1] > found[0] + 0.1
    assert balanced.settings["class_weight"] == "balanced"
    assert "class_weight" not in plain.settings


@pytest.mark.parametrize(("solver", "tta"), [*((name, False) for name in SOLVERS), ("lbfgs", True), ("knn", True)])
def test_calibration_is_told_and_changes_probabilities_alone(
    solver: str, tta: bool, viewed: Path, imported: Path, tmp_path: Path
) -> None:
    """What the probabilities were worth before is what a run without calibration says."""
    plain, calibrated = (
        train_head(viewed if tta else imported, tmp_path / "run", solver=solver, calibrate=one, tta=tta)
        for one in (False, True)
    )
    details = calibrated.record.details
    assert details["choice"] == plain.record.details["choice"]
    assert details["temperature"] > 0
    words = f"logits divided by the temperature {details['temperature']:.3g}, from held-out training images"
    assert words in calibrated.record.notes
    if solver == "ridge":  # always calibrated: its scores are no logits
        assert details["temperature"] == plain.record.details["temperature"]
        return
    assert plain.record.details["temperature"] is None
    assert "uncalibrated" not in plain.record.details
    for name in ("val", "test"):
        if not tta:
            assert calibrated.record.accuracy[name]["accuracy"] == plain.record.accuracy[name]["accuracy"]
        for what, value in details["uncalibrated"][name].items():
            assert plain.record.accuracy[name][what] == pytest.approx(value, rel=1e-3, abs=1e-6), what


def test_what_cannot_be_calibrated_is_told(rare: Path, tmp_path: Path) -> None:
    record = train_head(rare, tmp_path / "run", calibrate=True).record
    assert record.details["temperature"] is None
    assert "not calibrated, as a class has a single training image and none can be held out" in record.notes


def test_a_solver_that_did_not_converge_is_told(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.descent.MAX_EVALUATIONS", 3)
    record = train_head(imported, tmp_path / "run", C=1.0).record
    assert record.details["converged"] is False
    assert [note for note in record.notes if "without converging (largest gradient entry " in note]


def test_the_end_of_the_values_tried_is_told(imported: Path, tmp_path: Path) -> None:
    words = "is at the end of the values tried; a better one may lie beyond"
    record = train_head(imported, tmp_path / "run", grid=(1e-5, 1e-4)).record
    assert f"C = 0.0001 {words}" in record.notes
    assert not [note for note in train_head(imported, tmp_path / "run").record.notes if words in note]


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_whether_views_were_learned_from_is_said(solver: str, viewed: Path, features: Path, tmp_path: Path) -> None:
    notes = [
        train_head(path, tmp_path / "run", solver=solver, C=0.1, **settings).record.notes[0]
        for path, settings in (
            (viewed, {}),
            (viewed, {"views": True, "tta": True}),
            (viewed, {"views": False}),
            (features, {}),
            (features, {"views": False}),
        )
    ]
    learned = "learned from the plain features and 2 augmented views of each training image"
    assert notes == [
        learned,
        f"{learned}; predictions are averaged over views",
        "learned from the plain features; 2 augmented views of each training image were not used",
        "the features were extracted without augmentation",
        "the features were extracted without augmentation",
    ]


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "knn"])
def test_views_are_learned_from_unless_that_is_not_wanted(solver: str, viewed: Path, tmp_path: Path) -> None:
    train = featcache.read_cache(viewed).splits["train"]
    config = stage.HeadConfig(solver=solver)
    for wanted in (None, True, False):
        run = train_head(viewed, tmp_path / "run", solver=solver, views=wanted)
        views = train.views if wanted is not False else None
        expected = fit_head(train.features, train.listing.labels, 2, config, views=views)
        head = load_classifier(run.folder).head
        assert head is not None
        assert np.array_equal(head.logits(train.features), expected.head.logits(train.features))
        assert run.record.details["views"] is (wanted is not False)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "knn"])
def test_predictions_are_averaged_over_the_image_and_its_views(
    solver: str, viewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BLOCK_IMAGES", 7, raising=False)
    monkeypatch.setattr("featcache.heads.BLOCK_IMAGES", 7, raising=False)
    run = train_head(viewed, tmp_path / "run", solver=solver, tta=True)
    head = load_classifier(run.folder).head
    assert head is not None
    splits = featcache.read_cache(viewed).splits
    for name, file in (("val", "predictions.csv"), ("test", "predictions_test.csv")):
        split = splits[name]
        plain = to_probabilities(head.logits(split.features))
        views = [to_probabilities(head.logits(split.views[:, view])) for view in range(3)]
        expected = (plain + sum(views)) / 4
        np.testing.assert_allclose(read_probabilities(run.folder, file), expected, rtol=0, atol=6e-7)
        assert np.abs(expected - plain).max() > 2e-6
    without = run.record.details["without_tta"]
    plain = to_probabilities(head.logits(splits["val"].features))
    assert without["log_loss"] == pytest.approx(
        measure_probabilities(splits["val"].listing.labels, plain)["log_loss"], rel=1e-4
    )
    assert run.record.details["tta"] is True


# --- larger than memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "settings", "solver"),
    [
        (None, {}, "lbfgs"),
        (1 << 40, {}, "lbfgs"),
        (100, {}, "sgd"),
        (100, {"solver": "ridge"}, "ridge"),
        (1 << 40, {"solver": "sgd"}, "sgd"),
    ],
)
def test_the_solver_is_chosen_by_the_memory_there_is(
    free: int | None,
    settings: dict[str, Any],
    solver: str,
    imported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "find_free_memory", lambda: free)
    record = train_head(imported, tmp_path / "run", C=0.1, **settings).record
    assert record.settings["solver"] == record.details["solver"] == solver
    assert record.val_accuracy > 0.5


def test_half_of_the_free_memory_is_what_rows_may_take(
    viewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 images with 2 views of 8 features, as they are and standardised; views count if they are used."""
    for views, n_bytes in ((None, 2 * 4 * 12 * 3 * 8), (False, 2 * 4 * 12 * 8)):
        for free, solver in ((2 * n_bytes, "lbfgs"), (2 * n_bytes - 1, "sgd")):
            monkeypatch.setattr(stage, "find_free_memory", lambda free=free: free)
            assert train_head(viewed, tmp_path / "run", views=views, C=0.1).record.details["solver"] == solver


@pytest.mark.parametrize(
    "settings", [{}, {"C": 0.1}, {"calibrate": True}, {"select_on": "val"}, {"tta": True}, {"shots": 3, "repeats": 2}]
)
def test_a_stream_is_neither_mapped_nor_loaded(
    settings: dict[str, Any], viewed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all training features nor all views are ever asked for at once, beyond what is chosen among few."""
    seen: list[Any] = []

    def spy(module: Any) -> Callable[..., Any]:
        original = module.fit_head

        def call(features: Any, *rest: Any, **more: Any) -> Any:
            seen.append((features, more.get("views")))
            return original(features, *rest, **more)

        return call

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the whole cache was read")

    monkeypatch.setattr(stage, "fit_head", spy(stage))
    monkeypatch.setattr(stage, "read_cache", refuse)
    monkeypatch.setattr(StreamedFeatures, "__array__", refuse, raising=False)
    record = train_head(viewed, tmp_path / "run", solver="sgd", **settings).record
    assert record.val_accuracy == 1
    if "shots" not in settings:
        [(features, views)] = seen
        assert isinstance(features, StreamedFeatures)
        assert isinstance(views, StreamedFeatures)


def test_a_damaged_cache_is_refused_by_a_stream_too(imported: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.h5"
    data = bytearray(imported.read_bytes())
    row = featcache.read_cache(imported).splits["train"].features[5].tobytes()
    data[data.index(row)] ^= 1
    path.write_bytes(data)
    for solver in ("sgd", "lbfgs"):
        with pytest.raises(CacheError, match="train/features"):
            train_head(path, tmp_path / "run", solver=solver)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "knn"},
        {"solver": "knn", "calibrate": True, "class_weight": "balanced"},
        {"scaling": "l2"},
        {"solver": "ridge", "scaling": "l2"},
        {"solver": "sgd", "scaling": "none"},
        {"solver": "sklearn", "calibrate": True},
    ],
)
def test_a_head_that_is_loaded_predicts_what_it_predicted(
    settings: dict[str, Any], features: Path, extracted: Path, tmp_path: Path
) -> None:
    run = train_head(features, tmp_path / "run", **settings)
    classifier = load_classifier(run.folder)
    cache = featcache.read_cache(features)
    head, train = classifier.head, cache.splits["train"]
    assert head is not None
    values = {name: value for name, value in settings.items() if name != "solver"}
    config = stage.HeadConfig(solver=settings.get("solver", "lbfgs"), **values)
    if config.solver != "sgd":
        expected = fit_head(train.features, train.listing.labels, 2, config).head
        assert np.array_equal(head.logits(train.features), expected.logits(train.features))
    paths = cache.splits["val"].listing.paths
    found, bad = classifier.predict_files(paths, root=extracted / "photos", device=torch.device("cpu"), workers=1)
    assert bad == []
    np.testing.assert_allclose(found, read_probabilities(run.folder), atol=1e-4)


def rewrite_model(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change model.json, its digest too."""
    description = json.loads((folder / "model.json").read_text())
    description.pop("sha256")
    change(description)
    description["sha256"] = hash_bytes(canonical_json(description).encode())
    (folder / "model.json").write_text(json.dumps(description))


def test_a_model_from_before_there_were_other_heads_still_loads(features: Path, tmp_path: Path) -> None:
    run = train_head(features, tmp_path / "run", C=0.1)
    rows = featcache.read_cache(features).splits["val"].features
    head = load_classifier(run.folder).head
    assert head is not None
    expected = head.logits(rows)
    rewrite_model(run.folder, lambda description: description.pop("head"))
    old = load_classifier(run.folder).head
    assert old is not None
    assert np.array_equal(old.logits(rows), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solver": "knn"}, {"kind": "linear", "unit_length": False}),
        ({"solver": "knn"}, {"kind": "neighbours"}),
        ({"C": 0.1}, {"kind": "neighbours", "k": 1, "temperature": 1.0, "divisor": 1.0}),
        ({"C": 0.1}, {"kind": "linear"}),
        ({"C": 0.1}, {"kind": "forest"}),
        ({"C": 0.1}, {}),
    ],
)
def test_a_head_that_does_not_fit_what_is_said_of_it_is_refused(
    settings: dict[str, Any], said: dict[str, Any], features: Path, tmp_path: Path
) -> None:
    run = train_head(features, tmp_path / "run", **settings)
    rewrite_model(run.folder, lambda description: description.update(head=said))
    with pytest.raises(RunError, match="train it again"):
        load_classifier(run.folder)


def test_a_run_from_before_there_were_details_still_reads(features: Path, tmp_path: Path) -> None:
    run = train_head(features, tmp_path / "run", C=0.1)
    value = json.loads((run.folder / "run.json").read_text())
    del value["details"]
    (run.folder / "run.json").write_text(json.dumps(value))
    assert featcache.read_record(run.folder).details == {}
