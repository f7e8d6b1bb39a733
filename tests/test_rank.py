"""The leaderboard: heads on the features of several backbones or caches, in order, tested against the first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, Outcome, TinyFamily, draw_photo
from torch import Tensor, nn

import featcache
from featcache.backbones import families
from featcache.errors import BackboneError, FeatcacheError, RunError, SettingsError
from featcache.metrics import mcnemar_test
from featcache.report import (
    compare_with_first,
    format_ranking_markdown,
    state_ranking,
    state_ranking_grounds,
    tabulate_ranking,
)
from featcache.runs import read_predictions
from featcache.stages.compare import load_arms
from featcache.stages.plan_comparison import make_slug, name_cache
from featcache.stages.rank import name_run
from featcache.stages.run_arms import Group

pytestmark = pytest.mark.usefixtures("one_thread", "blank_figures")

Cli = Callable[..., Outcome]


class Blind(nn.Module):
    """Sees of every image what its colour says nothing of: the last digits of a corner."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.sin(1e4 * images[:, :, 0, 0]))


class OtherFamily(TinyFamily):
    """A second family: "blind" tells nothing apart, "broken" cannot be made."""

    def list_names(self) -> list[str]:
        return ["blind", "broken"]

    def make_network(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        if name == "broken":
            raise BackboneError("broken cannot be made: its parts are missing")
        return Blind()


@pytest.fixture(autouse=True)
def three_backbones(tiny: type[TinyFamily], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[TinyFamily]:
    """The backbones "tiny", "blind" and "broken", in an empty folder."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, OtherFamily()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    return tiny


def strip_times(value: Any) -> Any:
    """Without what the clock says."""
    if isinstance(value, Mapping):
        kept = {key: one for key, one in value.items() if "seconds" not in key and key != "peak_memory_bytes"}
        return {key: strip_times(one) for key, one in kept.items()}
    return [strip_times(one) for one in value] if isinstance(value, list) else value


# --- backbones --------------------------------------------------------------------------------------------------------


def test_the_backbone_that_sees_is_before_the_one_that_is_blind(flat_photos: Path) -> None:
    ranking = featcache.rank_backbones(flat_photos, ["blind", "tiny"], weights="none")
    assert [arm["name"] for arm in ranking.arms] == ["tiny (random)", "blind (random)"]
    first, second = ranking.arms
    assert (first["accuracy"], first["runs"][0]["correct"], first["images"]) == (1.0, 19, 19)
    assert second["accuracy"] < 0.6
    assert (first["against_first"], second["against_first"]["first"]) == (None, "tiny (random)")
    assert (first["width"], first["parameters"], first["multiply_adds"]) == (8, 277, 13_864)
    assert first["layer"] == "input of fc"
    assert first["extraction_seconds"] > 0
    assert ranking.failed == {}
    assert ranking.verdict == "tiny (random) is better than blind (random) on these 19 images."
    assert ranking.report == Path("runs/compare/report.html")
    page = ranking.report.read_text()
    assert f"<h1>{ranking.verdict}</h1>" in page
    assert page.count("data:image/jpeg") > 5
    assert "featcache compare" in ranking.summary["command"]


def test_every_backbone_has_its_own_cache_and_run_and_they_are_used_again(photos: Path, tiny: type[TinyFamily]) -> None:
    first = featcache.rank_backbones(photos, ["tiny", "blind"], weights="none")
    assert {path.name for path in Path().glob("*.h5")} == {"features-tiny-none.h5", "features-blind-none.h5"}
    assert {path.name for path in Path("runs").iterdir()} == {"compare", "head-tiny-none", "head-blind-none"}
    assert {path.name for path in Path("runs/compare").iterdir()} == {
        "compare.json", "compare.md", "ranking.png", "report.html",
    }  # fmt: skip
    tiny.calls = 0
    again = featcache.rank_backbones(photos, ["blind", "tiny"], weights="none")
    assert tiny.calls == 0
    assert strip_times(again.arms) == strip_times(first.arms)


def test_a_backbone_that_cannot_be_used_is_named_and_the_others_are_ranked(photos: Path) -> None:
    ranking = featcache.rank_backbones(photos, ["broken", "tiny", "nonsense"], weights="none")
    assert [arm["backbone"] for arm in ranking.arms] == ["tiny"]
    assert ranking.failed["broken"] == "broken cannot be made: its parts are missing"
    assert ranking.failed["nonsense"].startswith("unknown backbone 'nonsense'")
    assert ranking.verdict.startswith("tiny (random): ")
    for page in ("report.html", "compare.md"):
        assert "broken cannot be made" in Path("runs/compare", page).read_text().replace("Broken", "broken")


def test_if_no_backbone_can_be_used_that_is_an_error(photos: Path) -> None:
    with pytest.raises(BackboneError):
        featcache.rank_backbones(photos, ["broken", "nonsense"], weights="none")
    assert not Path("runs/compare").exists()


def test_an_optional_package_that_is_missing_is_no_reason_to_rank_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    ranking = featcache.rank_backbones(photos, ["tiny", "timm:test_resnet"], weights="none")
    assert "pip install 'featcache[timm]'" in ranking.failed["timm:test_resnet"]


@pytest.mark.parametrize(("name", "value"), [("epochs", 3), ("batch_size", 8), ("lr", 0.1)])
def test_settings_of_fine_tuning_are_refused(photos: Path, name: str, value: float) -> None:
    with pytest.raises(SettingsError) as caught:
        featcache.rank_backbones(photos, ["tiny", "blind"], weights="none", **{name: value})
    option = name.replace("_", "-")
    assert str(caught.value) == (
        f"--{option} is of fine-tuning, and several backbones are compared by their heads alone"
    )
    assert not list(Path().iterdir())


def test_a_backbone_named_twice_is_refused(photos: Path) -> None:
    with pytest.raises(SettingsError, match="a backbone is named twice: expected each once"):
        featcache.rank_backbones(photos, ["tiny", "tiny"], weights="none")


def test_settings_of_the_head_and_the_extraction_are_passed_on(flat_photos: Path) -> None:
    settings = {"C": 0.5, "solver": "ridge", "seed": 3, "val_fraction": 0.4, "store": "float16"}
    ranking = featcache.rank_backbones(flat_photos, ["tiny"], weights="none", **settings)
    assert "C = 0.5" in ranking.arms[0]["title"]
    wanted = featcache.list_dataset(flat_photos, val_fraction=0.4, seed=3)
    assert ranking.arms[0]["images"] == len(wanted.splits["val"])
    assert featcache.open_cache("features-tiny-none.h5").stored == "float16"


def test_bad_images_are_left_out_of_all_and_named_once(photos: Path) -> None:
    (photos / "train/red/photo_000.jpg").write_text("text")
    with pytest.raises(FeatcacheError):
        featcache.rank_backbones(photos, ["tiny", "blind"], weights="none")
    ranking = featcache.rank_backbones(photos, ["tiny", "blind"], weights="none", skip_bad=True)
    assert [path for path, _ in ranking.left_out] == ["train/red/photo_000.jpg"]


# --- caches -----------------------------------------------------------------------------------------------------------


def import_like(cache_path: str, photos: Path, output: str, name: str, change: float = 0.0) -> None:
    """Import features for the very images of a cache: its own, disturbed."""
    cache, random = featcache.read_cache(cache_path), np.random.default_rng(0)
    columns: dict[str, list[Any]] = {"X": [], "y": [], "paths": [], "split": []}
    for split_name, split in cache.splits.items():
        columns["X"] += list(split.features + change * random.normal(size=split.features.shape))
        columns["y"] += [cache.classes[label] for label in split.listing.labels]
        columns["paths"] += list(split.listing.paths)
        columns["split"] += [split_name] * len(split)
    np.savez("table.npz", **{key: np.array(value) for key, value in columns.items()})
    featcache.import_features("table.npz", output, data=str(photos), name=name)


def test_imported_and_extracted_caches_are_ranked_together(photos: Path) -> None:
    featcache.extract_features(photos, "a.h5", backbone="tiny", weights="none")
    import_like("a.h5", photos, "b.h5", "noise", change=1e3)
    ranking = featcache.rank_caches(["b.h5", "a.h5"])
    assert [arm["name"] for arm in ranking.arms] == ["tiny (random)", "imported:noise"]
    imported = ranking.arms[1]
    assert (imported["parameters"], imported["multiply_adds"], imported["extraction_seconds"]) == (None, None, None)
    assert "imported:noise" in ranking.table
    assert ranking.summary["command"] == "featcache compare b.h5 a.h5"


def test_layers_of_one_backbone_are_told_apart_by_name(photos: Path) -> None:
    for layer in ("conv:avg", "norm:max"):
        cache = f"{layer[:4]}.h5"
        featcache.extract_features(photos, cache, backbone="tiny", weights="none", layer=[layer])
    names = {arm["name"] for arm in featcache.rank_caches(["conv.h5", "norm.h5"]).arms}
    assert names == {"tiny (random), conv (avg)", "tiny (random), norm (max)"}


def test_caches_of_the_same_features_are_told_apart_by_file(photos: Path) -> None:
    for seed in (0, 1):
        featcache.extract_features(photos, f"{seed}.h5", backbone="tiny", weights="none", seed=seed)
    names = {arm["name"] for arm in featcache.rank_caches(["0.h5", "1.h5"]).arms}
    assert names == {"tiny (random) (0.h5)", "tiny (random) (1.h5)"}


def test_caches_of_the_same_file_name_keep_their_own_heads(photos: Path) -> None:
    for i, layer in enumerate(("conv:avg", "fc")):
        Path(f"d{i}").mkdir()
        featcache.extract_features(photos, f"d{i}/f.h5", backbone="tiny", weights="none", layer=[layer])
    arms = featcache.rank_caches(["d0/f.h5", "d1/f.h5"]).arms
    assert sorted(arm["width"] for arm in arms) == [5, 8]
    assert {arm["layer"] for arm in arms} == {"conv (avg)", "fc"}
    assert len({arm["runs"][0]["run"] for arm in arms}) == 2


def test_caches_of_other_images_are_refused(photos: Path, flat_photos: Path) -> None:
    featcache.extract_features(photos, "a.h5", backbone="tiny", weights="none")
    featcache.extract_features(flat_photos, "b.h5", backbone="tiny", weights="none")
    with pytest.raises(RunError, match="do not hold the same training images"):
        featcache.rank_caches(["a.h5", "b.h5"])
    draw_photo(COLOURS["red"], 77).save(photos / "val/red/photo_001.jpg")
    featcache.extract_features(photos, "c.h5", backbone="blind", weights="none")
    with pytest.raises(RunError, match="were not validated on the same images"):
        featcache.rank_caches(["a.h5", "c.h5"])
    assert not Path("runs/compare").exists()


def test_a_file_that_is_no_cache_is_refused_before_anything_is_done(photos: Path) -> None:
    featcache.extract_features(photos, "a.h5", backbone="tiny", weights="none")
    Path("b.h5").write_text("text")
    with pytest.raises(FeatcacheError, match=r"b\.h5"):
        featcache.rank_caches(["a.h5", "b.h5"])
    assert not Path("runs").exists()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_p_values_are_mcnemars_adjusted_by_hand(flat_photos: Path) -> None:
    featcache.extract_features(flat_photos, "a.h5", backbone="tiny", weights="none", val_fraction=0.5)
    for name, noise in (("b", 0.5), ("c", 1.0), ("d", 0.0)):
        import_like("a.h5", flat_photos, f"{name}.h5", name, change=noise)
    ranking = featcache.rank_caches(["a.h5", "b.h5", "c.h5", "d.h5"])
    right = []
    for arm in ranking.arms:
        predictions = read_predictions(Path(arm["runs"][0]["run"]) / "predictions.csv", ("blue", "green", "red"))
        order = np.argsort(np.array(predictions.paths))
        right.append((predictions.labels == predictions.predicted)[order])
    p_values = [mcnemar_test(right[0], other)[2] for other in right[1:]]
    pairs = [arm["against_first"] for arm in ranking.arms[1:]]
    assert [pair["p_value"] for pair in pairs] == p_values
    assert len(set(p_values)) == 3
    small, middle, large = sorted(p_values)
    by_hand = {small: 3 * small, middle: max(3 * small, 2 * middle), large: max(3 * small, 2 * middle, large)}
    assert [pair["p_adjusted"] for pair in pairs] == pytest.approx([min(1.0, by_hand[p]) for p in p_values])
    assert [arm["accuracy"] for arm in ranking.arms] == sorted((arm["accuracy"] for arm in ranking.arms), reverse=True)


def test_adjusting_follows_the_number_of_others(flat_photos: Path) -> None:
    featcache.extract_features(flat_photos, "a.h5", backbone="tiny", weights="none", val_fraction=0.5)
    import_like("a.h5", flat_photos, "b.h5", "noise", change=20.0)
    runs = [featcache.train_head(f"{name}.h5", name).folder for name in "ab"]
    first, other = load_arms([Group(name=run.name, runs=[run]) for run in runs], ["a", "b"])
    alone = compare_with_first([first, other])[0]
    assert alone["p_adjusted"] == alone["p_value"] < 0.2
    twice = compare_with_first([first, other, replace(other, name="again")])
    assert [pair["p_adjusted"] for pair in twice] == pytest.approx([min(1.0, 2 * alone["p_value"])] * 2)


def make_arm(name: str, correct: int, p_adjusted: float | None, seconds: float | None = 1.0) -> dict[str, Any]:
    """An arm of a ranking, of 100 images; null p of the first, "a"."""
    pair = None
    if p_adjusted is not None:
        pair = {
            "first": "a",
            "second": name,
            "difference": (90 - correct) / 100,
            "interval": [(90 - correct) / 100 - 0.05, (90 - correct) / 100 + 0.05],
            "interval_with_seeds": None,
            "mcnemar": [
                {"seeds": [0, 0], "only_first_right": 93 - correct, "only_second_right": 3, "p_value": p_adjusted}
            ],
            "p_seeds": None,
            "p_adjusted": p_adjusted,
            "detectable_difference": 0.08,
            "claim": "first" if p_adjusted < 0.05 else "none",
            "flattered": False,
        }
    return {
        "name": name,
        "layer": "input of fc",
        "selection": "C by cross-validation",
        "accuracy": correct / 100,
        "images": 100,
        "interval": [0.1, 0.9],
        "runs": [{"run": name}],
        "against_first": pair,
        "extraction_seconds": seconds,
        "head_seconds": 0.1,
        "width": 512,
        "parameters": 11_689_512,
        "multiply_adds": 1_814_073_344,
        "notes": [],
    }


def test_the_verdict_says_no_more_than_the_tests_show() -> None:
    a, b, c = make_arm("a", 90, None, 10.0), make_arm("b", 88, 0.6, 2.0), make_arm("c", 60, 0.001)
    assert state_ranking([a]) == "a: 90.0% of 100 images are right; there is nothing to compare it with."
    assert state_ranking([a, b, c]) == (
        "No difference between a and b can be shown on 100 images; b extracts in 1/5 of the time."
    )
    assert state_ranking([a, c]) == "a is better than c on these 100 images."
    assert (
        state_ranking([a, c, make_arm("d", 50, 0.001)]) == "a is better than each of the 2 others on these 100 images."
    )
    many = [make_arm(name, 88, 0.6, None) for name in "bcdef"]
    assert state_ranking([a, *many]) == "No difference between a and any of b, c and 3 more can be shown on 100 images."
    flattered = {**c, "against_first": {**c["against_first"], "claim": "none", "flattered": True}}
    assert state_ranking([a, flattered]) == (
        "Nothing can be said of a: it was chosen on the very images that are reported."
    )


def test_the_grounds_of_the_verdict_are_its_numbers() -> None:
    a, b, c = make_arm("a", 90, None, 10.0), make_arm("b", 88, 0.6, 2.0), make_arm("c", 60, 0.001, None)
    assert state_ranking_grounds([a]) == "Extraction took 10.0 s with a."
    assert state_ranking_grounds([a, c]) == (
        "90.0% and 60.0% are right, a difference of +30.0 points (95 % interval +25.0 to +35.0; 33 images only a gets "
        "right, 3 only c; exact McNemar p = 0.001). Extraction took 10.0 s with a."
    )
    assert state_ranking_grounds([a, b, c]) == (
        "a has the most right, 90.0%, next is b with 88.0%: a difference of +2.0 points (95 % interval "
        "\N{MINUS SIGN}3.0 to +7.0; exact McNemar p = 0.6, adjusted by Holm for 2 others). It is shown to be better "
        "than 1 of them. With 100 images, a difference of 8.0 points or more would mostly be found. Extraction took "
        "2.0 s with b, 10.0 s with a."
    )


def test_the_page_has_a_row_for_each_and_names_cannot_break_it() -> None:
    arms = [make_arm("a|b", 90, None), make_arm("<script>", 80, 0.03, None)]
    rows = tabulate_ranking(arms)
    assert rows[1] == ["a|b", "90.0%", "10.0% to 90.0%", "-", "512", "11.7 M", "1.81", "1.0", "0.10"]
    assert rows[2][3] == "0.03"
    assert rows[2][7] == "-"
    summary = {
        "verdict": "verdict",
        "grounds": "p < 0.05",
        "data": {"folder": "/data/<x>", "images": {"train": 7, "val": 3}, "classes": ["a", "b"]},
        "arms": arms,
        "failed": {"absent": "its weights are <gone>"},
        "remarks": [],
    }
    page = format_ranking_markdown(summary, [("cost", "ranking.png")])
    assert "Data: /data/&lt;x>, 7 train, 3 val images, 2 classes." in page
    assert "**absent** is left out: its weights are &lt;gone>" in page
    assert "a\\|b" in page
    assert "<script>" not in page
    assert "![cost](ranking.png)" in page


@pytest.mark.parametrize(
    ("features", "backbone", "name"),
    [
        ("features.h5", "resnet18", "features-resnet18.h5"),
        ("out/f", "resnet18", "out/f-resnet18.h5"),
        ("f.hdf5", "efficientnet_lite0", "f-efficientnet_lite0.hdf5"),
    ],
)
def test_a_cache_is_named_after_its_backbone(features: str, backbone: str, name: str) -> None:
    assert name_cache(features, backbone) == Path(name)


def test_no_two_names_become_the_same_file() -> None:
    names = ["timm:a", "timm_a", "timm/a", "onnx:x/a.onnx", "onnx:y/a.onnx", "module:a.b", "..", "a" * 300]
    slugs = [make_slug(name) for name in names]
    assert len(set(slugs)) == len(slugs)
    assert all(slug and "/" not in slug and ":" not in slug and len(slug) < 80 for slug in slugs)
    assert name_run("runs", Path("features-resnet18.h5")) == Path("runs/head-resnet18")


# --- the command line -------------------------------------------------------------------------------------------------


def test_several_backbones_are_a_ranking_on_the_command_line(cli: Cli, photos: Path) -> None:
    options = ("--weights", "none", "--backbone", "blind", "--backbone", "tiny")
    ranked = cli("compare", photos, *options)
    assert ranked.code == 0
    assert ranked.out.splitlines()[0].split()[:2] == ["accuracy", "95"]
    assert ranked.out.splitlines()[-1] == "report: runs/compare/report.html"
    value = cli("compare", photos, *options, "--json").json
    assert value.pop("report") == "runs/compare/report.html"
    assert [arm["backbone"] for arm in value["arms"]] == ["tiny", "blind"]
    assert json.loads(Path("runs/compare/compare.json").read_text()) == value


def test_a_backbone_that_failed_is_named_and_the_exit_code_is_3(cli: Cli, photos: Path) -> None:
    options = ("--weights", "none", "--backbone", "broken", "--backbone", "tiny")
    ranked = cli("compare", photos, *options)
    assert ranked.code == 3
    assert "left out: broken: broken cannot be made: its parts are missing" in ranked.err
    assert cli("compare", photos, *options, "--json").json["failed"] == {
        "broken": "broken cannot be made: its parts are missing"
    }


def test_caches_are_ranked_on_the_command_line(cli: Cli, photos: Path) -> None:
    for backbone in ("tiny", "blind"):
        cli("extract", photos, "--backbone", backbone, "--weights", "none", "-o", f"{backbone}.h5")
    ranked = cli("compare", "blind.h5", "tiny.h5", "-C", "1", "--json")
    assert ranked.code == 0, ranked.err
    assert [arm["backbone"] for arm in ranked.json["arms"]] == ["tiny", "blind"]


def test_epochs_beside_several_backbones_are_a_usage_mistake(cli: Cli, photos: Path) -> None:
    ranked = cli("compare", photos, "--backbone", "tiny", "--backbone", "blind", "--epochs", "3")
    assert (ranked.code, ranked.out) == (2, "")
    assert "--epochs is of fine-tuning" in ranked.err
