"""featcache.FeatureExtractor: a transformer like any other, whose rows are kept."""

from __future__ import annotations

import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import joblib
import numpy as np
import pytest
import torch
from conftest import COLOURS, TinyFamily, draw_photo
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

import featcache
from featcache import FeatureExtractor
from featcache.backbones import wrap_network
from featcache.cache import list_parts, parts_path
from featcache.errors import BackboneError, BadImagesError, CacheError, InputError, OutputError, SettingsError
from featcache.preprocessing import InputFormat
from featcache.stages import feature_extractor

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"weights": "none", "runtime": "eager"}
IMAGES = InputFormat(input_size=(8, 8), mean=(0.5,), std=(0.25,))


@pytest.fixture(autouse=True)
def forget_networks() -> None:
    """Every test loads its networks itself."""
    feature_extractor._loaded.clear()


@pytest.fixture
def paths(photos: Path) -> list[str]:
    """18 photographs, 9 of each class, in the order of `extract_features`."""
    return [str(path) for path in sorted(photos.rglob("*.jpg"))]


@pytest.fixture
def labels(paths: list[str]) -> list[str]:
    return [Path(path).parent.name for path in paths]


def make_pixels(n: int = 5) -> np.ndarray:
    return np.stack([np.asarray(draw_photo(COLOURS["green"], seed)) for seed in range(n)])


def make_tiny(cache: Path | None = None, **settings: Any) -> FeatureExtractor:
    return FeatureExtractor("tiny", cache=cache, **{**TINY, **settings})


def make_pipeline(cache: Path | None = None, **settings: Any) -> Pipeline:
    return Pipeline([("features", make_tiny(cache, **settings)), ("head", LogisticRegression())])


# ---- what goes in


def test_every_way_of_giving_paths_gives_the_same_rows(paths: list[str], tiny: type[TinyFamily]) -> None:
    extractor = make_tiny()
    expected = extractor.fit_transform(paths)
    assert (expected.shape, expected.dtype) == ((18, 8), np.float32)
    for given in (
        tuple(paths),
        [Path(path) for path in paths],
        np.array(paths),
        np.array(paths, dtype=object),
        np.array(paths).reshape(-1, 1),
        np.array([path.encode() for path in paths]),
        [[path] for path in paths],
    ):
        np.testing.assert_array_equal(extractor.transform(given), expected)


def test_images_and_their_pixels_are_the_same_rows(tiny: type[TinyFamily]) -> None:
    extractor, pixels = make_tiny(), make_pixels()
    expected = extractor.transform(pixels)
    for given in ([Image.fromarray(one) for one in pixels], list(pixels), np.concatenate([pixels])):
        np.testing.assert_array_equal(extractor.transform(given), expected)
    grey = pixels[..., 0]
    three = np.repeat(grey[..., None], 3, axis=-1)
    for given in (grey, grey[..., None], [Image.fromarray(one) for one in grey]):
        np.testing.assert_array_equal(extractor.transform(given), extractor.transform(three))


def test_an_opened_file_gives_the_features_of_its_path(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_photo(COLOURS["red"], 1).save(turned, exif=exif)
    Image.fromarray(np.dstack([make_pixels(1)[0], np.tile(np.arange(48, dtype=np.uint8), (40, 1))])).save(clear)
    opened = [Image.open(turned), Image.open(clear), np.asarray(Image.open(clear))]
    np.testing.assert_array_equal(make_tiny().transform([turned, clear, clear]), make_tiny().transform(opened))


def test_paths_images_and_arrays_may_be_mixed(paths: list[str], tiny: type[TinyFamily]) -> None:
    mixed = [paths[0], Image.open(paths[1]), np.asarray(Image.open(paths[2]))]
    np.testing.assert_allclose(make_tiny().transform(mixed), make_tiny().transform(paths[:3]), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("photo.jpg", "X is one str: expected paths.*put it into a list"),
        ([], "X holds no image"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no pixel"),
        ([None], r"X\[0\] is None, a NoneType: expected paths"),
        (["a.jpg", float("nan")], r"X\[0?1\] is nan, a float"),
        (np.zeros((3, 4)), r"X is an array float64 \(3, 4\): expected paths"),
        (np.array([["a", "b"]]), r"X has shape \(1, 2\): expected \(N,\) or one column"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"np.moveaxis\(X, 1, -1\)"),
        (np.zeros((8, 8, 3), np.uint8), r"looks like one image.*X\[None\]"),
        (np.zeros((2, 8, 8, 3)), r"expected uint8; \(255 \* X\)"),
        ([np.zeros((8, 8, 3))], r"X\[0\] is float64 \(8, 8, 3\): expected uint8 pixels"),
        (torch.zeros(2, 8, 8, 5, dtype=torch.uint8), r"uint8 \(2, 8, 8, 5\): expected paths"),
        ({"a.jpg"}, r"X has shape \(\)"),
    ],
)
def test_what_is_no_image_is_said(given: Any, words: str, tiny: type[TinyFamily]) -> None:
    for method in (make_tiny().fit, make_tiny().transform):
        with pytest.raises(InputError, match=words):
            method(given)


def test_one_text_is_one_layer_and_one_number_is_all_channels(tiny: type[TinyFamily]) -> None:
    pixels = make_pixels(2)
    short = make_tiny(layer="conv:avg", input_size=12, mean=0.4, std=0.2).transform(pixels)
    long = make_tiny(layer=["conv:avg"], input_size=(12, 12), mean=np.full(3, 0.4), std=[0.2] * 3).transform(pixels)
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"store": "float8"}, SettingsError),
        ({"batch_size": 0}, SettingsError),
        ({"interpolation": "magic"}, SettingsError),
        ({"backbone": 3}, SettingsError),
        ({"backbone": nn.Linear(3, 3)}, SettingsError),
        ({"backbone": "tinny"}, BackboneError),
        ({"layer": "cony"}, BackboneError),
    ],
)
def test_fit_refuses_what_makes_no_sense(
    settings: dict[str, Any], error: type[Exception], tiny: type[TinyFamily]
) -> None:
    with pytest.raises(error):
        make_tiny().set_params(**settings).fit(make_pixels(1))


# ---- what comes out


def test_features_are_those_of_extract_features_bit_for_bit(
    photos: Path, paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", backbone="tiny", **TINY)
    stored = np.concatenate([split.features[:] for split in extraction.cache.splits.values()])
    assert make_tiny().transform(paths).tobytes() == stored.tobytes()
    assert make_tiny(tmp_path / "g.h5").transform(paths).tobytes() == stored.tobytes()
    np.testing.assert_allclose(make_tiny(runtime="fused").transform(paths), stored, rtol=1e-4, atol=1e-6)


def test_float16_rows_come_out_as_float32_the_same_kept_or_not(
    paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    kept, fresh = make_tiny(tmp_path / "f.h5", store="float16"), make_tiny(store="float16")
    rows = kept.transform(paths)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, kept.transform(paths))
    np.testing.assert_array_equal(rows, fresh.transform(paths))
    np.testing.assert_array_equal(rows, make_tiny().transform(paths).astype(np.float16))


def test_columns_are_named_after_backbone_and_layers(tiny: type[TinyFamily]) -> None:
    assert list(make_tiny().get_feature_names_out()) == [f"tiny_{i}" for i in range(8)]
    several = make_tiny(layer=("conv:avg", "norm:max", "fc"))
    names = several.fit(make_pixels(1)).get_feature_names_out()
    assert [names[0], names[8], names[16], len(names)] == [
        "tiny_conv_0",
        "tiny_norm_0",
        "tiny_fc_0",
        several.n_features_out_,
    ]


def test_set_output_gives_a_pandas_table_with_its_index(paths: list[str], tiny: type[TinyFamily]) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install 'featcache[dev]'")
    table = pandas.DataFrame({"path": paths}, index=range(100, 118))
    for column in (table, table["path"]):
        out = clone(make_tiny().set_output(transform="pandas")).fit_transform(column)
        assert list(out.columns) == [f"tiny_{i}" for i in range(8)]
        assert list(out.index) == list(table.index)


def test_a_column_of_paths_goes_beside_other_columns(paths: list[str], tiny: type[TinyFamily]) -> None:
    table = np.array([[path, i] for i, path in enumerate(paths)], dtype=object)
    for column in (0, [0]):
        both = ColumnTransformer([("image", make_tiny(), column), ("number", StandardScaler(), [1])])
        assert both.fit_transform(table).shape == (18, 9)
        assert both.get_feature_names_out()[7] == "image__tiny_7"


def test_two_extractors_go_side_by_side(paths: list[str], tiny: type[TinyFamily]) -> None:
    union = FeatureUnion([("last", make_tiny()), ("early", make_tiny(layer="conv:max"))])
    assert union.fit_transform(paths).shape == (18, 16)
    assert union.get_feature_names_out()[8] == "early__tiny_conv_0"


# ---- what is kept


def test_without_a_cache_nothing_is_written_or_remembered(
    paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    before, extractor = sorted(tmp_path.rglob("*")), make_tiny()
    extractor.fit(paths)
    tiny.calls, state = 0, dict(vars(extractor))
    for _ in range(2):
        extractor.transform(paths)
    assert tiny.calls == 36
    assert vars(extractor) == state
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_image_within_a_call_is_computed_once(
    paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    copy = shutil.copy(paths[0], tmp_path / "copy.jpg")
    for extractor in (make_tiny(), make_tiny(tmp_path / "f.h5")):
        extractor.fit(paths)
        tiny.calls = 0
        rows = extractor.transform([paths[0], paths[1], copy, paths[0]])
        assert tiny.calls == 2
        assert rows[0].tobytes() == rows[2].tobytes() == rows[3].tobytes() != rows[1].tobytes()


def test_with_a_cache_only_new_images_are_computed(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    first = make_tiny(tmp_path / "f.h5").fit_transform(paths[:10])
    extractor = make_tiny(str(tmp_path / "f.h5")).fit(paths)
    tiny.calls = 0
    both = extractor.transform(paths[::-1])
    assert tiny.calls == 8
    np.testing.assert_array_equal(both[::-1][:10], first)
    tiny.calls = 0
    extractor.transform(make_pixels(3))
    extractor.transform(list(make_pixels(4)))
    assert tiny.calls == 4
    assert [path.name for path in tmp_path.glob("f.h5*")] == ["f.h5.parts"]


def test_a_file_whose_bytes_changed_is_computed_again(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    extractor = make_tiny(tmp_path / "f.h5")
    before = extractor.fit_transform(paths)
    draw_photo(COLOURS["green"], 7).save(paths[3])
    tiny.calls = 0
    after = extractor.transform(paths)
    assert tiny.calls == 1
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [3]


def test_rows_of_other_settings_are_never_taken(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    cache = tmp_path / "f.h5"
    reference = make_tiny(cache).fit_transform(paths)
    for settings in ({"seed": 1}, {"layer": "conv:avg"}, {"input_size": 12}, {"mean": 0.1}, {"store": "float16"}):
        other = make_tiny(cache, **settings)
        assert not np.array_equal(other.fit_transform(paths), reference)
        np.testing.assert_array_equal(other.transform(paths), make_tiny(**settings).transform(paths))
    np.testing.assert_array_equal(make_tiny(cache).transform(paths), reference)


def test_rows_of_the_command_line_are_taken_and_the_other_way_round(
    photos: Path, paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    extraction = featcache.extract_features(photos, tmp_path / "f.h5", backbone="tiny", **TINY)
    make_tiny(tmp_path / "g.h5").transform(paths[:7])
    extractor = make_tiny(tmp_path / "f.h5").fit(paths)
    tiny.calls = 0
    assert np.isin(extractor.transform(paths), extraction.cache.splits["train"].features[:]).any()
    assert tiny.calls == 0
    assert featcache.extract_features(photos, tmp_path / "g.h5", backbone="tiny", **TINY).computed == 11


def test_a_bad_image_is_named_and_the_others_are_kept(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes()[:300])
    strip = np.zeros((1, 2000, 3), np.uint8)
    given = [*paths[:4], str(tmp_path / "nowhere.jpg"), strip, paths[2], make_pixels(1)[0]]
    extractor = make_tiny(tmp_path / "f.h5").fit(given)
    tiny.calls = 0
    with pytest.raises(BadImagesError, match=r"4 files cannot be used as images; .* or drop them from X") as caught:
        extractor.transform(given)
    assert caught.value.rows == [2, 4, 5, 6]
    assert [bad.path for bad in caught.value.bad] == [paths[2], str(tmp_path / "nowhere.jpg"), "X[5]", paths[2]]
    assert tiny.calls == 4
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes out of another process
    assert (str(again), again.bad, again.rows) == (str(caught.value), caught.value.bad, caught.value.rows)
    good = [one for row, one in enumerate(given) if row not in caught.value.rows]
    assert extractor.transform(good).shape == (4, 8)
    assert tiny.calls == 4
    with pytest.raises(BadImagesError):
        make_tiny().transform(given)


def test_features_that_cannot_be_stored_make_a_bad_image() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 2))
    nn.init.constant_(network[1].weight, 1e6)
    with pytest.raises(BadImagesError, match=r"X\[0\]: its features are too large for float16"):
        FeatureExtractor(wrap_network(network, IMAGES), store="float16").transform(make_pixels(1))


def test_a_damaged_part_is_computed_again_and_told_of(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    lines: list[str] = []

    class Listener(featcache.Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    cache = tmp_path / "f.h5"
    expected = make_tiny(cache).fit_transform(paths)
    part = next(parts_path(cache).glob("rows-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(make_tiny(cache, progress=Listener()).transform(paths), expected)
    assert any("is damaged; what is needed of it" in line for line in lines)


def test_what_is_no_cache_is_left_alone(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    (tmp_path / "f.h5").write_text("my thesis")
    with pytest.raises(CacheError, match="cannot be read as a feature cache"):
        make_tiny(tmp_path / "f.h5").transform(paths)
    (tmp_path / "g.h5.parts").write_text("my thesis")
    with pytest.raises(OutputError, match="move it"):
        make_tiny(tmp_path / "g.h5").transform(paths)
    assert (tmp_path / "f.h5").read_text() == "my thesis"


def test_a_place_that_cannot_be_is_said(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    make_tiny(tmp_path / "new/folder/f.h5").transform(paths)
    with pytest.raises(OutputError, match="cannot write"):
        make_tiny(Path(paths[0]) / "f.h5").transform(paths)


def test_many_small_calls_do_not_leave_many_small_parts(
    tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.cache.parts.MANY_PARTS", 4)
    extractor, pixels = make_tiny(tmp_path / "f.h5"), make_pixels(10)
    for i in range(10):
        extractor.transform(pixels[i : i + 1])
    assert len(list(parts_path(tmp_path / "f.h5").iterdir())) < 4
    assert count_rows(tmp_path / "f.h5") == [10]
    tiny.calls = 0
    np.testing.assert_allclose(extractor.transform(pixels), make_tiny().transform(pixels), rtol=1e-6)
    assert tiny.calls == 10


def test_rows_survive_an_interruption(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    class Interrupting(featcache.Progress):
        def track(self, items: Any, *, total: Any, what: str, unit: str = "img", done: int = 0) -> Any:
            for n, item in enumerate(items):
                if what == "extracting" and n == 3:
                    raise KeyboardInterrupt
                yield item

    extractor = make_tiny(tmp_path / "f.h5", progress=Interrupting()).fit(paths)
    with pytest.raises(KeyboardInterrupt):
        extractor.transform(paths)
    tiny.calls = 0
    extractor.set_params(progress=None).transform(paths)
    assert tiny.calls == 18 - 3 * 4


# ---- as a transformer among others


def test_cross_validation_computes_every_image_once(
    paths: list[str], labels: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    pipeline = make_pipeline(tmp_path / "f.h5")
    pipeline[0].fit(paths)
    tiny.calls = 0
    scores = cross_val_score(pipeline, paths, labels, cv=3)
    assert (tiny.calls, scores.mean()) == (18, 1.0)


def test_a_search_goes_over_head_and_layers(
    paths: list[str], labels: list[str], tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = feature_extractor.provide_backbone
    monkeypatch.setattr(feature_extractor, "provide_backbone", lambda *given: loads.append(given) or load(*given))
    grid = {"features__layer": [(), "conv:avg"], "head__C": [0.1, 1.0]}
    search = GridSearchCV(make_pipeline(tmp_path / "f.h5"), grid, cv=3).fit(np.array(paths), labels)
    assert search.best_score_ == 1.0
    assert search.predict(paths).tolist() == labels
    assert len(loads) == 2
    assert count_rows(tmp_path / "f.h5") == [18, 18]


def count_rows(cache: Path) -> list[int]:
    """Rows that are kept beside a cache, of each extractor."""
    keys = {h5py.File(path)["/"].attrs["extractor_key"].decode() for path in parts_path(cache).glob("rows-*")}
    return [sum(map(len, list_parts(cache, "rows", key)[0])) for key in keys]


def test_processes_share_a_cache_and_compute_every_image_once(
    paths: list[str], labels: list[str], tmp_path: Path
) -> None:
    cache = tmp_path / "f.h5"
    network = wrap_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)), IMAGES)
    pipeline = Pipeline([("features", FeatureExtractor(network, cache=cache)), ("head", LogisticRegression())])
    search = GridSearchCV(pipeline, {"head__C": [0.1, 1.0]}, cv=3, n_jobs=2).fit(paths, labels)
    assert set(search.predict(paths)) == {"blue", "red"}
    assert count_rows(cache) == [18]


def test_threads_share_a_network(paths: list[str], tmp_path: Path, tiny: type[TinyFamily]) -> None:
    extractor, outs = make_tiny(tmp_path / "f.h5", runtime="fused").fit(paths), {}
    tiny.calls = 0
    threads = [threading.Thread(target=lambda i=i: outs.update({i: extractor.transform(paths)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(outs[i].tobytes() == outs[0].tobytes() for i in range(4))
    assert torch.get_num_threads() == 1
    assert tiny.calls < 2 * 18  # and those with which the runtime is checked


def test_it_is_pickled_without_weights_and_says_what_it_is(
    paths: list[str], tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    pipeline = make_pipeline(layer=("conv:avg",))
    pipeline.fit(paths, [Path(path).parent.name for path in paths])
    data = pickle.dumps(pipeline)
    assert len(data) < 4000
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(paths), pipeline.predict_proba(paths))
    joblib.dump(pipeline, tmp_path / "pipeline.joblib")
    assert " ".join(repr(pipeline[0]).split()) == (
        "FeatureExtractor(backbone='tiny', layer=('conv:avg',), runtime='eager', weights='none')"
    )
    check_is_fitted(pipeline)


def test_weights_that_were_written_anew_are_loaded_anew(tmp_path: Path, tiny: type[TinyFamily]) -> None:
    from conftest import TinyNetwork

    rows = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(TinyNetwork().state_dict(), tmp_path / "tiny.pth")
        rows.append(make_tiny(tmp_path / "f.h5", weights=str(tmp_path / "tiny.pth")).transform(make_pixels(2)))
    assert not np.array_equal(*rows)


def test_a_backbone_that_you_have_is_shared_by_clones(tmp_path: Path) -> None:
    backbone = wrap_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, 4)), IMAGES, name="mine")
    extractor = FeatureExtractor(backbone, cache=tmp_path / "f.h5", runtime="eager")
    rows = extractor.fit_transform(make_pixels())
    copy = clone(extractor)
    assert copy.backbone is backbone
    assert (rows.shape, list(copy.get_feature_names_out())[:1]) == ((5, 16), ["mine_0"])
    with pytest.raises(SettingsError, match="layer is stated and so is a backbone"):
        FeatureExtractor(backbone, layer="0").fit(make_pixels(1))


def test_a_network_that_was_trained_since_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, 4))
    extractor = FeatureExtractor(wrap_network(network, IMAGES, name="mine"), cache=tmp_path / "f.h5")
    extractor.fit_transform(make_pixels())
    with torch.no_grad():
        network[1].bias += 1
    with pytest.raises(BackboneError, match="the weights or code of mine have changed since it was wrapped"):
        extractor.transform(make_pixels())


def test_the_examples_of_the_document_run(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/sklearn.md").read_text()
    walk, own = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    walk = walk.replace('"resnet18"', '"tiny", weights="none"').replace("n_jobs=2", "n_jobs=1")
    exec(walk.replace("layer3:avg", "conv:avg").replace("layer4:avg", "norm:avg"), {})
    exec(own, {})


# ---- scikit-learn's own checks

# Those that need no data run on the transformer itself.
API_CHECKS: list[Callable[..., None]] = [
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_mixin_order,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_set_params,
    estimator_checks.check_valid_tag_types,
]


@pytest.mark.parametrize("check", API_CHECKS, ids=lambda check: check.__name__)
def test_it_passes_the_checks_that_need_no_data(check: Callable[..., None]) -> None:
    check("FeatureExtractor", FeatureExtractor())


class TableExtractor(FeatureExtractor):
    """Takes the tables of numbers that scikit-learn's checks are made of: a row's bytes are the pixels of a picture.

    The checks refuse to run on a transformer that takes no tables. Validation is scikit-learn's; all else is the
    transformer's own.
    """

    def fit(self, X: Any, y: Any = None) -> TableExtractor:  # noqa: N803
        return super().fit(draw_rows(validate_data(self, X, dtype=np.float64)), y)

    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        return super().transform(draw_rows(validate_data(self, X, dtype=np.float64, reset=False)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = tags.input_tags.string = False
        return tags


def draw_rows(table: np.ndarray) -> np.ndarray:
    """(N, F) float64 -> (N, F, 8) uint8."""
    return np.ascontiguousarray(table).view(np.uint8).reshape(*table.shape, 8)


@pytest.mark.usefixtures("tiny")
@parametrize_with_checks([TableExtractor("tiny", **TINY)])
def test_it_passes_the_checks_of_scikit_learn(estimator: FeatureExtractor, check: Callable[..., None]) -> None:
    check(estimator)


@pytest.mark.usefixtures("tiny")
@parametrize_with_checks([TableExtractor("tiny", **TINY)])
def test_it_passes_the_checks_of_scikit_learn_with_a_cache(
    estimator: FeatureExtractor, check: Callable[..., None], tmp_path: Path
) -> None:
    check(clone(estimator).set_params(cache=str(tmp_path / "f.h5")))
