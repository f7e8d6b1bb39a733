"""featcache.stages.compare and featcache.report: both ways side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import COLOURS, TinyFamily, draw_photo

import featcache
from featcache.errors import OutputError, RunError, StaleCacheError
from featcache.report import compare_pairs, describe_arm, format_markdown, state_verdict, tabulate
from featcache.stages.compare import load_arms

TINY = {"backbone": "tiny", "weights": "none"}


@pytest.fixture
def places(tmp_path: Path, tiny: type[TinyFamily]) -> dict[str, str]:
    return {"features": str(tmp_path / "features.h5"), "runs": str(tmp_path / "runs")}


def test_one_command_makes_everything_that_is_missing(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    comparison = featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places)
    assert [arm["name"] for arm in comparison.arms] == ["head", "finetune"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "accuracy_vs_time.png", "curves.png", "confusions.png",
    }  # fmt: skip
    summary = json.loads((tmp_path / "out/compare.json").read_text())
    assert summary["arms"] == comparison.arms
    assert summary["verdict"] == comparison.verdict


def test_what_exists_is_reused_without_being_asked_for_by_name(
    photos: Path, tmp_path: Path, places: dict[str, str], tiny: type[TinyFamily]
) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    featcache.train_head(places["features"], Path(places["runs"]) / "head", C=0.25)
    featcache.finetune(photos, Path(places["runs"]) / "finetune", epochs=2, **TINY)
    tiny.calls = 0
    comparison = featcache.compare(photos, tmp_path / "out", **places)  # neither backbone nor epochs are stated
    assert tiny.calls == 0
    assert "C = 0.25" in comparison.arms[0]["title"]
    assert "2 epochs" in comparison.arms[1]["title"]


def test_force_still_takes_the_backbone_from_the_cache(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places)
    draw_photo(COLOURS["red"], 4321).save(photos / "val/red/new.jpg")
    comparison = featcache.compare(photos, tmp_path / "out", epochs=1, force=True, **places)
    assert {arm["backbone"] for arm in comparison.arms} == {"tiny"}


def test_the_precision_of_the_cache_is_taken_over(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.extract_features(photos, places["features"], store="float16", **TINY)
    comparison = featcache.compare(photos, tmp_path / "out", epochs=1, **places)
    assert [arm["name"] for arm in comparison.arms] == ["head", "finetune"]
    assert featcache.open_cache(places["features"]).stored == "float16"


def test_a_stated_setting_that_contradicts_a_run_is_not_ignored(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places)
    with pytest.raises(RunError, match="epochs: 1 -> 2"):
        featcache.compare(photos, tmp_path / "out", epochs=2, **places)
    assert (
        "2 epochs"
        in featcache.compare(photos, tmp_path / "out", epochs=2, force=True, **TINY, **places).arms[1]["title"]
    )


def test_a_changed_head_setting_makes_a_new_head(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places)
    assert "C = 3" in featcache.compare(photos, tmp_path / "out", C=3.0, **places).arms[0]["title"]


def test_changed_images_are_never_compared_with_old_runs(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places)
    draw_photo(COLOURS["red"], 4321).save(photos / "val/red/new.jpg")
    with pytest.raises(RunError, match="other images"):
        featcache.compare(photos, tmp_path / "out", **places)


def test_another_backbone_than_the_caches_is_refused(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    with pytest.raises(StaleCacheError, match="backbone: tiny -> resnet18"):
        featcache.compare(photos, tmp_path / "out", backbone="resnet18", weights="none", **places)


def test_runs_on_different_images_are_refused(
    photos: Path, flat_photos: Path, tmp_path: Path, tiny: type[TinyFamily]
) -> None:
    for name, data in (("a", photos), ("b", flat_photos)):
        featcache.extract_features(data, tmp_path / f"{name}.h5", **TINY)
        featcache.train_head(tmp_path / f"{name}.h5", tmp_path / name)
    with pytest.raises(RunError, match="not validated on the same images"):
        featcache.compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_are_told_apart_by_their_paths(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    runs = [tmp_path / "one/head", tmp_path / "two/head"]
    for run, value in zip(runs, (1e-5, 1.0), strict=True):
        featcache.train_head(tmp_path / "f.h5", run, C=value)
    names = [arm["name"] for arm in featcache.compare_runs(runs, tmp_path / "out").arms]
    assert names == ["one/head", "two/head"]


def test_a_folder_that_is_no_comparison_is_never_replaced(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    with pytest.raises(OutputError, match="is not a comparison"):
        featcache.compare(photos, photos, epochs=1, **TINY, **places)


def test_the_verdict_claims_no_more_than_the_test_allows(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    featcache.train_head(tmp_path / "f.h5", tmp_path / "a", C=1.0)
    featcache.train_head(tmp_path / "f.h5", tmp_path / "b", C=2.0)
    good, other = load_arms([tmp_path / "a", tmp_path / "b"])
    wrong = replace(other, predictions=replace(other.predictions, predicted=1 - other.predictions.labels))
    numbers = [describe_arm(good), {**describe_arm(wrong), "correct": 0}]
    assert compare_pairs([good, wrong])[0]["p_value"] == pytest.approx(2 * 0.5**6)
    assert "a is better on these 6 images" in state_verdict(numbers, compare_pairs([good, wrong]))
    assert "No difference between a and b can be shown" in state_verdict(numbers, compare_pairs([good, other]))


def test_the_table_has_every_promised_row(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    table = featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places).table
    for row in (
        "val accuracy", "95 % interval", "correct", "trainable parameters", "seconds, extraction", "seconds, training",
        "seconds, total", "seconds per epoch", "time ratio", "peak memory",
    ):  # fmt: skip
        assert f"\n{row} " in table


def test_names_cannot_break_the_markdown(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    arms = featcache.compare(photos, tmp_path / "out", epochs=1, **TINY, **places).arms
    arms[0]["name"] = "<script>|x"
    page = format_markdown(tabulate(arms), "verdict", arms, [])
    assert "<script>" not in page
    assert "&lt;script>\\|x" in page
