"""featcache.pages: the numbers that a page shows, its size, and that no name can do anything to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_fixture import (
    draw_insects,
    make_audit,
    make_audited,
    make_curve,
    make_group,
    make_hostile,
    make_hostile_audit,
    make_huge,
    make_insect_audit,
    make_page,
    make_predictions,
    make_ranking,
    make_realistic,
)
from sklearn.metrics import precision_recall_fscore_support

from featcache.metrics import bin_confidences, calibration_error, score_classes
from featcache.pages import (
    ArmView,
    AuditPage,
    ComparisonPage,
    answers,
    comparison,
    figures,
    filling,
    render_audit,
    render_comparison,
)
from featcache.pages.colours import AT_LEAST, DARK, LIGHT, list_colours, measure_contrast
from featcache.pages.scales import label_share, make_axis, make_duration_axis
from featcache.runs import Predictions


class Reader(HTMLParser):
    """Tags with their attributes, text, ids, and whether everything that was opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.figures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "svg" and "svg" not in self.open:
            self.figures.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    def list(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def realistic(tmp_path_factory: pytest.TempPathFactory) -> ComparisonPage:
    return make_realistic(draw_insects(tmp_path_factory.mktemp("photos"), {"train": 6, "val": 60}))


def make_small(n_arms: int = 2, n_classes: int = 2, n: int = 12, **settings: Any) -> ComparisonPage:
    """A page without images."""
    labels = np.arange(n) % n_classes
    arms = [(f"arm {i}", ("head", "finetune")[i % 2], 0.9 - 0.02 * i, 8.0 * 3**i) for i in range(n_arms)]
    paths = [f"val/{label}/{i:05d}.jpg" for i, label in enumerate(labels.tolist())]
    return make_page(classes=[f"c{i}" for i in range(n_classes)], paths=paths, labels=labels, arms=arms, **settings)


def test_every_section_is_there_in_order_and_linked(realistic: ComparisonPage) -> None:
    reader = Reader(render_comparison(realistic))
    expected = ["numbers", "time", "evidence", "cost", "training", "confusions", "classes", "reliability", "images"]
    expected += ["map", "curve", "run"]
    assert [one["id"] for one in reader.list("section")] == expected
    assert [one["href"] for one in reader.list("a") if (one["href"] or "").startswith("#")][: len(expected)] == [
        f"#{name}" for name in expected
    ]
    assert reader.open == []
    assert realistic.summary["verdict"] in reader.text


def test_every_figure_says_in_words_what_it_shows(realistic: ComparisonPage) -> None:
    figures = [one for one in Reader(render_comparison(realistic)).figures if "aria-hidden" not in one]
    assert len(figures) > 8
    assert all(one["role"] in ("img", "application") for one in figures)
    assert all(len(one["aria-label"] or "") > 15 for one in figures)


def test_what_is_not_there_is_left_out() -> None:
    reader = Reader(render_comparison(make_small(n_arms=1)))
    sections = {one["id"] for one in reader.list("section")}
    assert not sections & {"evidence", "training", "map", "curve"}
    assert "How sure" not in reader.text
    assert reader.list("img") == []


@pytest.mark.parametrize("n_arms", [1, 3, 12])
@pytest.mark.parametrize(("n_classes", "n"), [(2, 6), (21, 63), (61, 122)])
def test_any_number_of_arms_and_classes_has_a_whole_page(n_arms: int, n_classes: int, n: int) -> None:
    reader = Reader(render_comparison(make_small(n_arms, n_classes, n, epochs=1, n_seeds=2)))
    assert reader.open == []
    assert all(f"arm {i}" in reader.text for i in range(n_arms))
    assert "nan" not in reader.text.lower()


def test_nothing_is_fetched_and_one_script_is_allowed(realistic: ComparisonPage) -> None:
    text = render_comparison(realistic)
    reader = Reader(text)
    addresses = [one.get(name) for _, one in reader.tags for name in ("src", "href", "action", "data", "poster")]
    assert all(one.startswith(("#", "data:image/jpeg;base64,")) for one in addresses if one)
    assert "url(" not in text
    assert "://" not in re.sub(r"data:[^\"]*", "", text)
    assert not [one for _, one in reader.tags if any(name.startswith("on") for name in one)]
    policy = next(one["content"] for one in reader.list("meta") if "Content-Security" in (one.get("http-equiv") or ""))
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_thumbnails_are_there_with_words_and_paths(realistic: ComparisonPage) -> None:
    reader = Reader(render_comparison(realistic))
    images = reader.list("img")
    assert images
    assert all(one["alt"] and "of class" in one["alt"] for one in images)
    data = json.loads(re.findall(r'id="map-data">(.*?)</script>', render_comparison(realistic))[0])
    assert len(data["images"]) == 66
    assert all(thumbnail.startswith("data:image/jpeg") for _, _, _, thumbnail, _ in data["images"])
    assert [len(points) for points in data["maps"]] == [66, 66]


def test_images_that_are_gone_leave_their_paths(realistic: ComparisonPage) -> None:
    text = render_comparison(replace(realistic, root=Path("/nonexistent")))
    assert Reader(text).list("img") == []
    assert "val/ants/" in Reader(text).text


def test_hostile_names_are_escaped_and_can_be_written(tmp_path: Path) -> None:
    page = make_hostile(tmp_path)
    text = render_comparison(page)
    assert text.encode("utf-8")
    assert text.count("<script") == 2
    assert text.count("</style>") == 1
    reader = Reader(text)
    assert reader.open == []
    assert all("onerror" not in one for _, one in reader.tags)
    assert r"caf\xe9" in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", text)
    assert any(one["alt"] for one in reader.list("img"))  # those that can be decoded, one with a byte for a name


def test_a_page_of_a_thousand_classes_stays_below_five_megabytes() -> None:
    text = render_comparison(make_huge())
    assert len(text.encode()) < 5_000_000
    assert "All 1,000 classes" in text
    assert "n00000999 a class of some name" in text


def test_thumbnails_are_dropped_first_then_the_table_then_the_maps(
    realistic: ComparisonPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(render_comparison(realistic))
    bare = len(render_comparison(replace(realistic, root=None)))
    monkeypatch.setattr(comparison, "MAX_BYTES", bare + (whole - bare) // 3)
    some = render_comparison(realistic)
    assert bare < len(some) <= comparison.MAX_BYTES
    assert 'id="map"' in some
    monkeypatch.undo()
    many = make_huge(n_classes=200, n_images=1000)
    full = render_comparison(many)
    monkeypatch.setattr(comparison, "MAX_BYTES", len(full.encode()) - 1)
    less = render_comparison(many)
    assert "All 200 classes" in full
    assert "All 200 classes" not in less
    assert 'id="map"' in less
    monkeypatch.setattr(comparison, "MAX_BYTES", len(less.encode()) - 1)
    assert 'id="map"' not in render_comparison(many)


def test_scores_agree_with_scikit_learn() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 300)
    arm = ArmView(name="a", predictions=make_predictions([""] * 300, labels, 7, 0.7, 1), histories=[])
    found = score_classes(answers.count_confusions(arm, 7))
    expected = precision_recall_fscore_support(labels, arm.predictions.predicted)
    for mine, theirs in zip((found.precision, found.recall, found.f1), expected, strict=False):
        np.testing.assert_allclose(mine, theirs)


def test_reliability_adds_up_to_the_calibration_error() -> None:
    labels = np.random.default_rng(1).integers(0, 3, 500)
    predictions = make_predictions([""] * 500, labels, 3, 0.8, 2)
    bins = bin_confidences(predictions.labels == predictions.predicted, predictions.probabilities.max(axis=1))
    assert sum(one.n for one in bins) == 500
    error = sum(one.n * abs(one.confidence - one.right) for one in bins) / 500
    right = predictions.labels == predictions.predicted
    assert error == pytest.approx(calibration_error(right, predictions.probabilities.max(axis=1)))


def test_galleries_hold_what_they_say_most_confident_first() -> None:
    labels = np.zeros(6, np.int64)
    predicted_by = {"a": [0, 0, 0, 1, 1, 0], "b": [0, 1, 1, 0, 1, 0]}
    sure = {"a": [0.9, 0.6, 0.8, 0.7, 0.99, 0.5], "b": [0.9, 0.7, 0.7, 0.7, 0.7, 0.7]}
    arms = []
    for name, predicted in predicted_by.items():
        probabilities = np.array(
            [[p, 1 - p] if k == 0 else [1 - p, p] for k, p in zip(predicted, sure[name], strict=True)]
        )
        predictions = Predictions(
            paths=tuple("abcdef"), labels=labels, predicted=np.array(predicted), probabilities=probabilities
        )
        arms.append(ArmView(name=name, predictions=predictions, histories=[]))
    found = {(one.right, one.wrong): one.rows for one in answers.choose_images(arms)}
    assert found == {((0,), (1,)): [2, 1], ((1,), (0,)): [3], ((), (0, 1)): [4]}


def test_the_verdict_is_the_heading_and_its_grounds_stand_below() -> None:
    page = make_small()
    words = {"verdict": "<b> is better than a.", "grounds": "95 % & more: a took 2 s."}
    text = render_comparison(replace(page, summary={**page.summary, **words}))
    assert "<h1>&lt;b&gt; is better than a.</h1>" in text
    assert '<p class="detail">95 % &amp; more: a took 2 s.</p>' in text


def test_an_arm_is_marked_only_where_the_tests_allow_it() -> None:
    page = make_small(3)
    claims = [("arm 0", "arm 1", "first"), ("arm 0", "arm 2", "first"), ("arm 1", "arm 2", "none")]
    for claim, expected in (("first", True), ("none", False)):
        pairs = [
            {**pair, "claim": told if pair["second"] != "arm 2" or pair["first"] != "arm 0" else claim}
            for pair, (_, _, told) in zip(page.summary["pairs"], claims, strict=True)
        ]
        text = render_comparison(replace(page, summary={**page.summary, "pairs": pairs}))
        assert ("★" in text) is expected


def test_the_interval_of_a_difference_lies_where_it_should() -> None:
    pair = {"first": "a", "second": "b", "difference": 0.01, "interval": [-0.02, 0.04], "detectable_difference": 0.03}
    figure = figures.draw_differences([pair])
    row = figure["rows"][0]
    assert figure["zero"] == 50
    assert row["low"] < 50 < row["at"] < row["high"]
    assert row["wide"] == [row["low"], row["high"]]
    wider = figures.draw_differences([{**pair, "interval_with_seeds": [-0.06, 0.08]}])["rows"][0]
    assert wider["wide"][0] < wider["low"] < 50 < wider["high"] < wider["wide"][1]
    assert row["blind"][0] + row["blind"][1] == pytest.approx(100)
    assert "holds zero" in row["words"]


def test_axes_hold_their_values_and_have_ticks() -> None:
    axis = make_axis([0.91, 0.978], label_share, bounds=(0, 1), span=0.02)
    assert axis.low <= 0.91
    assert axis.high >= 0.978
    assert [text for _, text in axis.ticks] == ["90%", "92%", "94%", "96%", "98%"]
    for seconds in ([0.0], [5.0], [0.004, 7200.0], [1e6]):
        times = make_duration_axis(seconds)
        assert times.ticks
        assert all(0 <= times.place(one) <= 100 for one in seconds)
    assert make_axis([0.5], label_share).ticks
    assert make_axis([float("nan")], label_share).ticks


def test_colours_stand_out_in_both_schemes_and_are_those_of_the_style() -> None:
    style = (Path(comparison.__file__).parent / "templates" / "page.css").read_text()
    for surface in (LIGHT, DARK):
        assert all(measure_contrast(colour, surface) >= AT_LEAST for colour in list_colours(surface))
        assert f"--surface: {surface};" in style


def test_losses_that_are_no_number_do_not_break_a_curve() -> None:
    history = [{"epoch": 1.0, "train_loss": float("nan"), "train_accuracy": 0.5}, {"epoch": 2.0, "train_loss": 0.5}]
    found = figures.draw_histories([[history], []])
    assert found[1] is None
    lines = found[0]["panels"]["loss"]["lines"]
    assert [len(line["points"]) for line in lines] == [1]


def test_the_learning_curve_takes_no_law() -> None:
    curve = {**make_curve(), "law": None, "forecast": []}
    text = render_comparison(replace(make_small(), curve=curve))
    assert 'id="curve"' in text
    assert "foretold" not in text


# --- a ranking --------------------------------------------------------------------------------------------------------


def test_a_ranking_has_a_row_for_each_and_shows_what_the_first_ones_answered() -> None:
    page = make_ranking()
    reader = Reader(render_comparison(page))
    assert reader.open == []
    assert [one["id"] for one in reader.list("section")] == [
        "numbers", "time", "evidence", "confusions", "classes", "reliability", "images", "run",
    ]  # fmt: skip
    assert all(arm["name"] in reader.text for arm in page.summary["arms"])
    assert "From here on of the first 4 alone." in reader.text
    assert "vit_b_17" in reader.text
    assert "Unknown backbone" in reader.text
    assert "★" not in reader.text
    matrices = [one for one in reader.list("div") if (one.get("aria-label") or "").startswith("Confusion matrix of")]
    assert len(matrices) == 4


def test_a_ranking_of_one_whose_cost_nobody_knows_has_a_page() -> None:
    page = make_ranking(1, n=20)
    arms = [{**page.summary["arms"][0], "extraction_seconds": None, "parameters": None}]
    reader = Reader(render_comparison(replace(page, summary={**page.summary, "arms": arms})))
    assert not {"time", "evidence"} & {one["id"] for one in reader.list("section")}


def test_the_line_of_the_unbeaten_goes_through_those_that_none_beats_in_both() -> None:
    rows = [(8.0, 0.9), (2.0, 0.7), (4.0, 0.6), (None, 0.99), (8.0, 0.8)]
    arms = [
        {"i": i, "name": str(i), "extraction_seconds": cost, "accuracy": right} for i, (cost, right) in enumerate(rows)
    ]
    figure = figures.draw_accuracy_against_extraction(arms)
    assert figure
    assert figure["unbeaten"] == [1, 0]
    assert figure["unknown"] == ["3"]
    assert [point["i"] for point in figure["points"]] == [0, 1, 2, 4]
    by_arm = {point["i"]: (point["x"], point["y"]) for point in figure["points"]}
    assert by_arm[1] in figure["line"]
    assert by_arm[0] in figure["line"]
    assert all(x1 <= x2 and y1 >= y2 for (x1, y1), (x2, y2) in zip(figure["line"], figure["line"][1:], strict=False))


def test_numbers_beside_points_cover_no_other_point_where_there_is_room() -> None:
    assert figures.place_labels([(50.0, 50.0)]) == ["above"]
    assert figures.place_labels([(50.0, 50.0), (50.0, 45.0)]) == ["left", "above"]


# --- an audit ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> AuditPage:
    return make_insect_audit(draw_insects(tmp_path_factory.mktemp("audited"), {"train": 30, "val": 30}))


def test_an_audit_says_first_what_matters_most(audited: AuditPage) -> None:
    reader = Reader(render_audit(audited))
    assert reader.open == []
    assert [one["id"] for one in reader.list("section")] == [
        "next", "leakage", "labels", "exact", "near", "outliers", "overlaps", "accuracy", "run",
    ]  # fmt: skip
    assert "2 val images are in train too, or nearly so, 1 image has two labels, and 3 labels are likely wrong." in (
        reader.text
    )
    assert "featcache audit features.h5" in reader.text


def test_the_images_of_an_audit_have_words_and_those_that_are_gone_leave_their_paths(audited: AuditPage) -> None:
    images = Reader(render_audit(audited)).list("img")
    assert len(images) > 48
    assert all("labelled" in (one["alt"] or "") for one in images)
    gone = Reader(render_audit(replace(audited, root=Path("/nonexistent"))))
    assert gone.list("img") == []
    assert "train/ants/0000_ant.jpg" in gone.text


def test_labels_that_are_called_wrong_come_before_the_next_of_the_ranking(audited: AuditPage) -> None:
    text = render_audit(replace(audited, root=None))
    called, following = text.index("Called wrong"), text.index("Next in the ranking")
    places = [text.index(one["path"], called) for one in audited.summary["label_issues"]]
    assert called < min(places)
    assert max(places) < following
    shown = text[following : text.index("</section>", following)].count("<li>")
    assert shown == 48 - len(places)


@pytest.mark.parametrize(
    ("splits", "kinds", "said"),
    [
        (("train", "val"), ("exact",), "1 val image is in train too."),
        (("train", "test", "test"), ("near",), "2 test images are nearly in train too."),
        (("train", "val", "test"), ("exact",), "1 group of copies reach across splits."),
        ((), (), "No leakage was found, and no label is called wrong."),
    ],
)
def test_the_sentence_names_the_splits_that_leak(splits: tuple[str, ...], kinds: tuple[str, ...], said: str) -> None:
    images = [make_audited(f"{i}.jpg", split, "a", "a", 0.9) for i, split in enumerate([*splits, "train"])]
    groups = [make_group(images[: len(splits)], kind=kind) for kind in kinds]
    text = render_audit(make_audit(["a", "b"], images, groups))
    assert f"<h1>{said}</h1>" in text


def test_an_audit_that_could_judge_no_label_says_so() -> None:
    images = [make_audited(f"{i}.jpg", "train", "a", None, 0.0) for i in range(3)]
    reader = Reader(render_audit(make_audit(["a"], images, [])))
    assert "No leakage was found; the labels could not be judged." in reader.text
    assert not {"labels", "accuracy"} & {one["id"] for one in reader.list("section")}
    assert "none of 3 was judged" in reader.text


def test_hostile_names_do_nothing_to_the_page_of_an_audit(tmp_path: Path) -> None:
    text = render_audit(make_hostile_audit(tmp_path))
    assert text.encode("utf-8")
    assert text.count("<script") == 1
    reader = Reader(text)
    assert reader.open == []
    assert all("onerror" not in one for _, one in reader.tags)
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", text)
    assert reader.list("img")


def test_the_page_of_a_huge_audit_stays_below_five_megabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    classes = [f"class {i} of a name {'x' * 40}" for i in range(1000)]
    paths = [f"train/{'deep/' * 40}{i:06d}.jpg" for i in range(20_000)]
    images = [
        make_audited(path, ("train", "val")[i % 2], classes[i % 1000], classes[(i + i % 3) % 1000], i % 1000 / 1000)
        for i, path in enumerate(paths)
    ]
    groups = [make_group(images[i : i + 40]) for i in range(0, 20_000, 40)]
    page = make_audit(classes, images, groups, tmp_path)
    assert len(render_audit(page).encode()) < 1_000_000
    large = "data:image/jpeg;base64," + "A" * 100_000
    monkeypatch.setattr(filling, "make_thumbnails", lambda root, paths, side: ((path, large) for path in paths))
    text = render_audit(page)
    assert "<img" in text
    assert len(text.encode()) < 5_000_000
