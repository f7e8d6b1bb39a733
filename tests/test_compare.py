"""featcache.stages.compare and featcache.report: ways side by side."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, TinyFamily, draw_photo

import featcache
from featcache.config import CompareConfig
from featcache.errors import OutputError, RunError, SettingsError, StaleCacheError
from featcache.report import describe_arm, describe_pairs, format_markdown, state_grounds, state_verdict
from featcache.report.tables import escape
from featcache.runs import is_run, read_record
from featcache.stages.compare import group_runs, load_arms, say_command
from featcache.stages.plan_comparison import plan_comparison
from featcache.stages.run_arms import Group

pytestmark = pytest.mark.usefixtures("blank_figures")

TINY: dict[str, Any] = {"backbone": "tiny", "weights": "none"}
QUICK: dict[str, Any] = {**TINY, "epochs": 1, "curve": False}


@pytest.fixture
def places(tmp_path: Path, tiny: type[TinyFamily]) -> dict[str, str]:
    return {"features": str(tmp_path / "features.h5"), "runs": str(tmp_path / "runs")}


# --- making and reusing -----------------------------------------------------------------------------------------------


def test_one_command_makes_everything_that_is_missing(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    comparison = featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    assert [arm["name"] for arm in comparison.arms] == ["head", "finetune"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "report.html", "accuracy_vs_time.png", "curves.png", "confusions.png",
    }  # fmt: skip
    summary = json.loads((tmp_path / "out/compare.json").read_text())
    assert summary == json.loads(json.dumps(comparison.summary))
    assert summary["arms"] == comparison.arms
    assert comparison.verdict in (tmp_path / "out/compare.md").read_text()
    assert comparison.report == tmp_path / "out/report.html"


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
    featcache.compare(photos, tmp_path / "out", **QUICK, **places)
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
    featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    with pytest.raises(RunError, match="epochs: 1 -> 2"):
        featcache.compare(photos, tmp_path / "out", epochs=2, **places)
    forced = featcache.compare(photos, tmp_path / "out", epochs=2, force=True, **TINY, **places)
    assert "2 epochs" in forced.arms[1]["title"]


def test_a_changed_head_setting_makes_a_new_head(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    assert "C = 3" in featcache.compare(photos, tmp_path / "out", C=3.0, **places).arms[0]["title"]


def test_changed_images_are_never_compared_with_old_runs(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    draw_photo(COLOURS["red"], 4321).save(photos / "val/red/new.jpg")
    with pytest.raises(RunError, match="other images"):
        featcache.compare(photos, tmp_path / "out", **places)


def test_another_backbone_than_the_caches_is_refused(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    with pytest.raises(StaleCacheError, match="backbone: tiny -> resnet18"):
        featcache.compare(photos, tmp_path / "out", backbone="resnet18", weights="none", **places)


def test_a_folder_that_is_no_comparison_is_never_replaced(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    with pytest.raises(OutputError, match="is not a comparison"):
        featcache.compare(photos, photos, **QUICK, **places)


# --- arms and seeds ---------------------------------------------------------------------------------------------------


def test_every_kind_of_arm_is_compared_on_the_same_images(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    kinds = ("head", "head:knn", "views:ridge", "finetune:head", "finetune:lp-ft")
    comparison = featcache.compare(photos, tmp_path / "out", arms=kinds, views=2, **QUICK, **places)
    assert [arm["name"] for arm in comparison.arms] == [
        "head", "head-knn", "views-ridge", "finetune-head", "finetune-lp-ft",
    ]  # fmt: skip
    assert len(comparison.pairs) == 10
    runs = {arm["name"]: read_record(arm["runs"][0]["run"]) for arm in comparison.arms}
    assert runs["head-knn"].details["solver"] == "knn"
    assert (runs["head"].details["views"], runs["views-ridge"].details["views"]) == (False, True)
    assert runs["finetune-lp-ft"].settings["mode"] == "lp-ft"
    assert len({json.dumps(run.data["fingerprints"]) for run in runs.values()}) == 1
    assert featcache.open_cache(tmp_path / "features.h5").n_views == 0
    assert featcache.open_cache(tmp_path / "features-views.h5").n_views == 2 * len(read_split(photos))


def read_split(photos: Path) -> list[Path]:
    return list((photos / "train").glob("*/*.jpg")) + list((photos / "train").glob("*/*.png"))


def test_several_seeds_are_on_one_split_and_a_second_call_makes_nothing(
    flat_photos: Path, tmp_path: Path, places: dict[str, str], tiny: type[TinyFamily]
) -> None:
    comparison = featcache.compare(flat_photos, tmp_path / "out", seeds=3, **QUICK, **places)
    for arm in comparison.arms:
        assert [run["seed"] for run in arm["runs"]] == [0, 1, 2]
        assert arm["seed_spread"] is not None
        assert arm["accuracy"] == pytest.approx(np.mean([run["accuracy"] for run in arm["runs"]]))
    records = [read_record(run["run"]) for arm in comparison.arms for run in arm["runs"]]
    assert len({json.dumps(record.data["fingerprints"]) for record in records}) == 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "head", "head-seed1", "head-seed2", "finetune", "finetune-seed1", "finetune-seed2",
    }  # fmt: skip
    assert comparison.pairs[0]["p_seeds"] is not None
    assert len(comparison.pairs[0]["mcnemar"]) == 3
    tiny.calls = 0
    again = featcache.compare(flat_photos, tmp_path / "out", seeds=3, **places)
    assert tiny.calls == 0
    assert again.arms == comparison.arms


def test_further_seeds_have_the_recipe_of_the_run_that_is_there(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    folder = Path(places["runs"]) / "finetune"
    featcache.finetune(photos, folder, epochs=1, mode="staged", optimizer="adamw", mixup=0.2, lr=0.002, **TINY)
    featcache.compare(photos, tmp_path / "out", seeds=2, **places)
    first, second = (read_record(path).settings for path in (folder, folder.with_name("finetune-seed1")))
    assert second == first | {"seed": 1, "split_seed": 0}


def test_several_backbones_make_every_arm_with_each(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    settings: dict[str, Any] = {"weights": "none", "epochs": 1, **places}
    comparison = featcache.compare(
        photos, tmp_path / "out", backbone=("tiny", "squeezenet1_1"), arms=("head", "finetune:head"), **settings
    )
    assert [arm["name"] for arm in comparison.arms] == [
        "head-tiny", "finetune-head-tiny", "head-squeezenet1_1", "finetune-head-squeezenet1_1",
    ]  # fmt: skip
    assert [arm["backbone"] for arm in comparison.arms] == ["tiny", "tiny", "squeezenet1_1", "squeezenet1_1"]


def test_the_test_split_is_what_is_reported_where_there_is_one(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    (photos / "val").rename(photos / "test")
    for name in ("red", "blue"):
        (photos / "val" / name).mkdir(parents=True)
        draw_photo(COLOURS[name], 77).save(photos / "val" / name / "one.jpg")
    comparison = featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    assert comparison.summary["reported"] == {"split": "test", "images": 6}
    assert [arm["images"] for arm in comparison.arms] == [6, 6]
    assert comparison.arms[1]["val_accuracy"] is not None
    assert not comparison.arms[1]["optimistic"]  # its epoch was chosen on the validation split
    assert "test accuracy" in comparison.table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("heads",)}, r"--arm is 'heads': expected head\[:auto"),
        ({"arms": ("finetune:knn",)}, "--arm is 'finetune:knn'"),
        ({"arms": ("head:",)}, "--arm is 'head:'"),
        ({"arms": ("head", "head")}, "each once"),
        ({"arms": ()}, "at least one"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"budget": -1.0}, "--budget is -1.0"),
        ({"views": 3}, "an --arm views beside it"),
        ({"map": "mds"}, "tsne or umap"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CompareConfig(**settings)


@pytest.mark.parametrize("mistake", [["nowhere"], [".", "--arm", "heads"], [".", "--seeds", "0"]])
def test_a_mistake_is_told_of_before_torch_is_loaded(mistake: list[str]) -> None:
    code = "import sys; from featcache.__main__ import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    run = [sys.executable, "-c", code, "compare", *mistake]
    assert subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip() == "False"


# --- the plan and the budget ------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_there_and_writes_nothing(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    before = sorted(path for path in tmp_path.rglob("*"))
    plan = plan_comparison(photos, seeds=2, epochs=1, **places)
    assert [(step.what, step.state, step.number) for step in plan.steps] == [
        ("extraction", "reuse", 0),
        ("head", "make", 0), ("finetune", "make", 0),
        ("head", "make", 1), ("finetune", "make", 1),
        ("report", "make", 0),
    ]  # fmt: skip
    assert sorted(path for path in tmp_path.rglob("*")) == before
    featcache.compare(photos, tmp_path / "out", seeds=2, epochs=1, **places)
    states = {step.what: step.state for step in plan_comparison(photos, seeds=2, **places).steps}
    assert states == {"extraction": "reuse", "head": "reuse", "finetune": "reuse", "report": "make"}


def test_the_plan_foretells_about_how_long_it_takes(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    plan = plan_comparison(photos, epochs=60, **TINY, **places)
    foretold = plan.find_seconds("finetune")
    comparison = featcache.compare(photos, tmp_path / "out", epochs=60, **TINY, **places)
    took = comparison.arms[1]["cost"]["seconds"]["total"]
    assert took / 6 < foretold < 6 * took + 5


def test_a_killed_fine_tuning_is_in_the_plan_as_one_that_goes_on(
    photos: Path, tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    featcache.extract_features(photos, places["features"], **TINY)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("featcache.stages.finetune.write_finetune_run", stop)
        with pytest.raises(KeyboardInterrupt):
            featcache.finetune(photos, Path(places["runs"]) / "finetune", epochs=2, checkpoint_every=0, **TINY)
    plan = plan_comparison(photos, epochs=2, **places)
    assert [step.state for step in plan.steps if step.what == "finetune"] == ["resume"]
    assert featcache.compare(photos, tmp_path / "out", epochs=2, **places).arms[1]["kind"] == "finetune"


def test_a_budget_leaves_seeds_out_and_cuts_the_first_one_short(
    photos: Path, tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("run_arms", "plan_comparison"):
        monkeypatch.setattr(f"featcache.stages.{module}.REPORT_SECONDS", 1.0)
    settings: dict[str, Any] = {**places, **TINY, "epochs": 100_000, "seeds": 3, "arms": ("head", "finetune:head")}
    comparison = featcache.compare(photos, tmp_path / "out", budget=12.0, **settings)
    head, cut = comparison.arms
    assert (len(head["runs"]), len(cut["runs"])) == (3, 1)
    assert cut["runs"][0]["run"].endswith("finetune-head-cut")
    assert "stopped in" in cut["title"]
    assert (head["cut_short"], cut["cut_short"]) == (False, True)
    assert "head and finetune-head (cut short)" in comparison.verdict
    assert (
        "A time budget cut finetune-head short: what it could have reached is not known."
        in (comparison.summary["remarks"])
    )
    assert "The budget of 12.0 s sufficed for 1 of 3 seeds of finetune-head." in comparison.summary["remarks"]
    assert not is_run(tmp_path / "runs/finetune-head")
    again = featcache.compare(photos, tmp_path / "out", budget=12.0, **settings)
    assert again.arms[1]["runs"] == cut["runs"]  # the same time would bring the same


def test_a_budget_that_is_too_small_is_refused_before_anything_is_done(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    with pytest.raises(SettingsError, match="--budget is 2 s: expected 16 s or more"):
        featcache.compare(photos, tmp_path / "out", budget=2.0, **QUICK, **places)
    with pytest.raises(SettingsError, match=r"--budget is 10 s, of which \d s are gone, and \d+ s are needed at least"):
        featcache.compare(photos, tmp_path / "out", budget=10.0, **QUICK, **places)
    assert not (tmp_path / "features.h5").exists()
    plan = plan_comparison(photos, budget=10.0, **QUICK, **places)
    assert "the budget is too small" in plan.list_lines()[-1]
    plan = plan_comparison(photos, budget=30.0, seeds=100, **QUICK, **places)
    assert "not all of it fits" in plan.list_lines()[-1]


def test_heads_too_are_left_out_when_the_time_is_over(
    photos: Path, tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.stages.run_arms.find_needed", lambda first: 1e9)
    comparison = featcache.compare(photos, tmp_path / "out", arms=("head",), seeds=3, budget=60.0, **QUICK, **places)
    assert len(comparison.arms[0]["runs"]) == 1
    assert comparison.summary["remarks"] == ["The budget of 60.0 s sufficed for 1 of 3 seeds of head."]


def test_a_budget_never_moves_or_replaces_what_a_comparison_has_not_cut(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    settings: dict[str, Any] = {**places, **TINY, "epochs": 100_000, "arms": ("finetune",), "budget": 60.0}
    own = tmp_path / "runs/finetune-cut"
    featcache.finetune(photos, own, epochs=2, **TINY)
    with pytest.raises(OutputError, match="is no fine-tune that a comparison's budget has cut short"):
        featcache.compare(photos, tmp_path / "out", **settings)
    assert "2 epochs" in read_record(own).title
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        featcache.compare(photos, tmp_path / "out", **settings)
    assert is_run(tmp_path / "elsewhere")


def test_a_run_that_was_cut_and_not_yet_set_aside_is_never_taken_for_the_whole_one(
    photos: Path, tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    featcache.extract_features(photos, places["features"], **TINY)
    with monkeypatch.context() as patch:
        patch.setattr("featcache.stages.finetune.WRITING_SECONDS", 1e9)
        folder = Path(places["runs"]) / "finetune"
        run = featcache.finetune(photos, folder, epochs=2, time_budget=60, budget_of="featcache compare", **TINY)
    assert "stopped in" in run.record.title
    comparison = featcache.compare(photos, tmp_path / "out", epochs=2, curve=False, force=True, **places)
    assert comparison.arms[1]["title"] == "fine-tuned tiny, 2 epochs"


# --- what is there already --------------------------------------------------------------------------------------------


def test_nothing_else_beside_a_report_is_touched(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    out = tmp_path / "out"
    featcache.compare(photos, out, **QUICK, **places)
    (out / "notes.txt").write_text("mine")
    featcache.compare(photos, out, **QUICK, **places)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.iterdir())) == 7
    inside = {"features": str(tmp_path / "exp/f.h5"), "runs": str(tmp_path / "exp/runs")}
    for _ in range(2):
        featcache.compare(photos, tmp_path / "exp", **QUICK, **inside)
    assert is_run(tmp_path / "exp/runs/head")
    assert (tmp_path / "exp/f.h5").is_file()


@pytest.mark.parametrize("place", ["runs/finetune", "features.h5"])
def test_a_report_is_not_written_into_what_it_is_made_from(
    place: str, photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    with pytest.raises(OutputError, match="choose another one for the report"):
        featcache.compare(photos, tmp_path / place, **QUICK, **places)
    assert not (tmp_path / "features.h5").exists()


def test_a_head_of_other_features_or_of_few_images_is_no_head_of_these(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    head, settings = Path(places["runs"]) / "head", {**places, "arms": ("head",), "curve": False}
    featcache.compare(photos, tmp_path / "out", **TINY, **settings)
    before = read_record(head).extractor
    featcache.extract_features(photos, places["features"], force=True, input_size=8, resize=8, **TINY)
    featcache.compare(photos, tmp_path / "out", **settings)
    assert read_record(head).extractor["preprocessing"] != before["preprocessing"]
    featcache.train_head(places["features"], head, shots=1)
    featcache.compare(photos, tmp_path / "out", **settings)
    assert "shots" not in read_record(head).settings


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("head/run.json", lambda text: text.replace('"tensors_sha256"', '"gone"'), "weights.tensors_sha256 is not as"),
        (
            "head/run.json",
            lambda text: re.sub(r'"total": [0-9.e-]+', '"sum": 1', text, count=1),
            "seconds.total is not",
        ),
        ("head/run.json", lambda text: text.replace('"correct"', '"right"'), "accuracy.val is not as featcache writes"),
        ("head/predictions.csv", lambda text: text[: len(text) // 2], "cannot be read|expected 6"),
        ("head/predictions.csv", lambda text: re.sub(r"[01]\.\d+\n", "nan\n", text, count=1), "are no numbers"),
        ("head/predictions.csv", lambda text: "x" * 200_000 + text, "cannot be read"),
        ("finetune/history.csv", lambda text: text.replace("0.", "zero"), "cannot be read"),
        ("finetune/history.csv", lambda text: "\x00" + text, "cannot be read"),
    ],
)
def test_a_damaged_run_is_told_of_before_anything_is_made_and_made_again_with_force(
    file: str, damage: Any, message: str, photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    featcache.compare(photos, tmp_path / "out", **QUICK, **places)
    path = Path(places["runs"]) / file
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=message) as error:
        featcache.compare(photos, tmp_path / "out", seeds=2, **QUICK, **places)
    assert "--force make it again" in str(error.value)
    assert not (Path(places["runs"]) / "head-seed1").exists()
    if file != "head/run.json":  # a head is never written over what may be something else
        featcache.compare(photos, tmp_path / "out", force=True, **QUICK, **places)


# --- finished runs ----------------------------------------------------------------------------------------------------


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


def test_runs_that_differ_in_their_seed_alone_are_one_arm(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    for seed in range(3):
        featcache.train_head(tmp_path / "f.h5", tmp_path / f"head{seed}", seed=seed)
    featcache.train_head(tmp_path / "f.h5", tmp_path / "other", C=3.0)
    runs = [tmp_path / name for name in ("head0", "other", "head1", "head2", "head2")]
    assert [[run.name for run in group.runs] for group in group_runs(runs)] == [
        ["head0", "head1", "head2"], ["other"], ["head2"],
    ]  # fmt: skip
    comparison = featcache.compare_runs(runs[:4], tmp_path / "out", features=tmp_path / "f.h5")
    assert [len(arm["runs"]) for arm in comparison.arms] == [3, 1]
    assert any("Not all have the same number of seeds" in remark for remark in comparison.summary["remarks"])


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arms(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> list[Any]:
    """Two heads that are right about all six images."""
    featcache.extract_features(photos, tmp_path / "f.h5", **TINY)
    for name, value in (("a", 1.0), ("b", 2.0)):
        featcache.train_head(tmp_path / "f.h5", tmp_path / name, C=value)
    return load_arms([Group(name=name, runs=[tmp_path / name]) for name in "ab"], ["a", "b"])


def mislead(arm: Any, **changes: Any) -> Any:
    """An arm that is wrong about every image."""
    run = arm.runs[0]
    wrong = replace(run.predictions["val"], predicted=1 - run.predictions["val"].labels)
    record = replace(run.record, **changes) if changes else run.record
    return replace(arm, runs=(replace(run, predictions={"val": wrong}, record=record),))


def judge(arms: list[Any]) -> tuple[str, str]:
    """Verdict and grounds."""
    numbers, pairs = [describe_arm(arm) for arm in arms], describe_pairs(arms)
    return state_verdict(numbers, pairs), state_grounds(numbers, pairs)


def test_the_verdict_claims_no_more_than_the_test_allows(arms: list[Any]) -> None:
    good, other = arms
    wrong = mislead(other)
    assert describe_pairs([good, wrong])[0]["p_value"] == pytest.approx(2 * 0.5**6)
    verdict, grounds = judge([good, wrong])
    assert verdict.startswith("a is better than b on these 6 images, by 100.0 points")
    assert "(95 % interval +100.0 to +100.0; 6 images only a gets right, 0 only b; exact McNemar p = 0.031)" in grounds
    assert judge([wrong, good])[0].startswith("a is better than b on these 6 images, by 100.0 points")
    assert judge([good, other])[0].startswith("No difference between a and b can be shown on 6 images")


def test_an_arm_that_was_chosen_on_the_reported_images_is_never_said_to_be_better(arms: list[Any]) -> None:
    good, other = arms
    run = good.runs[0]
    chosen = replace(run.record, settings={**run.record.settings, "select_on": "val"})
    flattered = replace(good, runs=(replace(run, record=chosen),))
    assert judge([flattered, mislead(other)])[0] == (
        "Nothing can be said of a and b: a was chosen on the very images that are reported, which flatters it."
    )
    assert judge([mislead(flattered), other])[0].startswith("b is better than a")  # in spite of it


def test_of_many_arms_none_is_claimed_where_the_correction_leaves_nothing(arms: list[Any]) -> None:
    good, other = arms
    verdict, grounds = judge([good, mislead(other), replace(good, name="c")])
    assert verdict.startswith("No difference between any of the 3 ways can be shown on 6 images")
    assert "of 3 pairs none differs (smallest p-value, adjusted by Holm for the number of pairs: 0.094)" in grounds


def test_of_many_arms_those_are_named_that_are_shown_to_be_worse(arms: list[Any]) -> None:
    good, other = (grow(arm, 10) for arm in arms)
    verdict, grounds = judge([good, mislead(other), replace(good, name="c")])
    assert verdict.startswith("a is better than b; c is better than b on these 60 images")
    assert "a difference is shown of 2 of 3 pairs" in grounds


def grow(arm: Any, times: int) -> Any:
    """An arm with as many more of the same images."""
    run = arm.runs[0]
    one = run.predictions["val"]
    more = replace(
        one,
        paths=tuple(f"{i}/{path}" for i in range(times) for path in one.paths),
        labels=np.tile(one.labels, times),
        predicted=np.tile(one.predicted, times),
        probabilities=np.tile(one.probabilities, (times, 1)),
    )
    return replace(arm, runs=(replace(run, predictions={"val": more}),))


def test_the_verdict_says_what_the_cheap_way_saves(arms: list[Any]) -> None:
    numbers = [describe_arm(arm) for arm in arms]
    for arm, seconds in zip(numbers, (2.0, 1400.0), strict=True):
        arm["cost"]["seconds"]["total"] = seconds
    verdict = state_verdict(numbers, describe_pairs(arms))
    assert verdict == "No difference between a and b can be shown on 6 images; a took 1/700 of the time."


def test_of_several_seeds_both_images_and_seeds_decide(arms: list[Any]) -> None:
    good, other = (replace(arm, runs=arm.runs * 3) for arm in arms)
    grounds = judge([good, other])[1]
    assert "on average over 3 seeds" in grounds
    assert "p = 1 for images and seeds together" in grounds


def test_a_single_arm_is_told_of_and_nothing_is_claimed(arms: list[Any]) -> None:
    assert judge(arms[:1])[0] == "a: 100.0% of 6 images are right; there is nothing to compare it with."


def test_the_table_has_every_promised_row(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    table = featcache.compare(photos, tmp_path / "out", **QUICK, **places).table
    for row in (
        "val accuracy", "95 % interval", "correct", "trainable parameters", "seconds, extraction", "seconds, training",
        "seconds, total", "CPU seconds, total", "seconds per epoch", "time ratio", "peak memory", "images per second",
        "size of the result",
    ):  # fmt: skip
        assert f"\n{row} " in table


def test_extraction_is_charged_once_for_many_heads(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    summary = featcache.compare(photos, tmp_path / "out", **QUICK, **places).summary
    seconds = summary["arms"][0]["cost"]["seconds"]
    for row in summary["amortised"]:
        expected = seconds["extraction"] + row["heads"] * (seconds["total"] - seconds["extraction"])
        assert row["seconds"]["head"] == pytest.approx(expected)
        assert row["seconds"]["finetune"] == pytest.approx(
            row["heads"] * summary["arms"][1]["cost"]["seconds"]["total"]
        )


def test_names_cannot_break_the_markdown(photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    summary = featcache.compare(photos, tmp_path / "out", **QUICK, **places).summary
    summary["arms"][0]["name"] = summary["verdict"] = summary["grounds"] = "<script>|x"
    page = format_markdown(summary, [])
    assert "<script>" not in page
    assert "&lt;script>\\|x" in page


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("![t](http:x)", r"!\[t\](http:x)"),
        ("a\n\n<img src=x onerror=y>", r"a\\x0a\\x0a&lt;img src=x onerror=y>"),
        ("`code`", r"\`code\`"),
        ("**bold**", r"\*\*bold\*\*"),
    ],
)
def test_no_name_becomes_a_link_a_picture_or_a_tag(name: str, written: str) -> None:
    assert escape(name) == written


def test_the_command_in_the_report_makes_the_same_comparison_again(tmp_path: Path) -> None:
    config = CompareConfig(
        arms=("head", "finetune:lp-ft"), seeds=3, lr=1.23456789e-5, curve=False, backbone=("a b",), C=2.0
    )
    assert shlex.split(say_command("my photos", tmp_path, config)) == [
        "featcache", "compare", "my photos", "--arm", "head", "--arm", "finetune:lp-ft", "--backbone", "a b", "--seeds",
        "3", "--no-curve", "--lr", "1.23456789e-05", "-C", "2.0", "-o", str(tmp_path),
    ]  # fmt: skip
    assert say_command("-photos", Path("runs/compare"), CompareConfig()) == "featcache compare -- -photos"


def test_the_report_warns_where_pretraining_may_have_seen_the_images(
    photos: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    from featcache.backbones.pretraining import warn_of_overlap

    data = {"classes": ["tench", "golf_ball"], "fingerprints": {"val": "0"}}
    lite = {"backbone": "efficientnet_lite0", "weights": {"requested": "default", "name": "efficientnet-lite0.pth"}}
    assert "the classes here are ImageNet's own: it may have seen the very images" in (
        warn_of_overlap(lite, data) or ""
    )
    mine = {"classes": ["mine"], "fingerprints": {}}
    assert (warn_of_overlap(lite, mine) or "").startswith("efficientnet_lite0 was trained on ImageNet: if these images")
    given = {"backbone": "resnet18", "weights": {"requested": "/a/file.pth", "name": "file.pth"}}
    assert "is not known here" in (warn_of_overlap(given, mine) or "")
    random = {"backbone": "resnet18", "weights": {"requested": "none", "name": "random"}}
    assert warn_of_overlap(random, data) is None
    remarks = featcache.compare(photos, tmp_path / "out", arms=("head",), **QUICK, **places).summary["remarks"]
    assert remarks == []


def test_scipys_own_tests_say_the_same(flat_photos: Path, tmp_path: Path, places: dict[str, str]) -> None:
    featcache.compare(flat_photos, tmp_path / "out", seeds=2, arms=("head:knn", "head:ridge"), **QUICK, **places)
    check = [sys.executable, str(Path(__file__).parents[1] / "scripts/check_verdict.py"), str(tmp_path / "out")]
    agreed = subprocess.run(check, capture_output=True, text=True, check=False)
    assert agreed.returncode == 0, agreed.stderr
    summary = json.loads((tmp_path / "out/compare.json").read_text())
    summary["pairs"][0]["p_images"] = 0.5
    summary["pairs"][0]["interval"][0] -= 0.1
    (tmp_path / "out/compare.json").write_text(json.dumps(summary))
    differs = subprocess.run(check, capture_output=True, text=True, check=False)
    assert differs.returncode == 1
    assert "bootstrap interval" in differs.stderr
