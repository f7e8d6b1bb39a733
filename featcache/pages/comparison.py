"""A ComparisonPage, or the page of a ranking, as the content of its template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.metrics import Bin, bin_confidences, score_classes
from featcache.pages import answers, figures
from featcache.pages.colours import LIGHT, SHAPES, list_colours
from featcache.pages.filling import (
    GALLERY_SIDE,
    MAX_BYTES,
    NAME,
    Content,
    fill_template,
    name_folder,
    take_thumbnails,
)
from featcache.pages.values import ArmView, ComparisonPage, FeatureMap
from featcache.plots import cut_middle
from featcache.wording import make_writable

MAP_SIDE = 80  # pixels of thumbnails
MOST_CELLS = 40_000  # of the table of all classes
BESIDE_VERDICT = 3  # pairs of arms at most
FEW_CLASSES, N_CLASS_COLOURS = 10, 6  # on a map: colours and shapes of their own; Tol's but the grey one


def render_comparison(page: ComparisonPage) -> str:
    """The page as one HTML document of less than 5 MB.

    Thumbnails are left out first where it would be larger, then the table of all classes, then the maps. The page of a
    ranking has a leaderboard of all arms, and of the first ones, those in `page.arms`, what they answered.

    Parameters
    ----------
    page
        What it shows.

    Returns
    -------
    Text that UTF-8 can encode, whatever the names of files and classes hold.
    """
    content, bare = _fit(page)
    left = MAX_BYTES - len(bare.encode("utf-8"))
    if page.root is None:
        return bare
    content["thumbnails"], left = take_thumbnails(page.root, _list_gallery_paths(content), GALLERY_SIDE, left)
    if content["maps"]:
        content["map_data"]["thumbnails"], _ = take_thumbnails(page.root, _list_map_paths(content), MAP_SIDE, left)
        content["packed"] = _pack_map(content)
    return fill_template(_choose_template(page), content)


def _fit(page: ComparisonPage) -> tuple[Content, str]:
    """The content that fits without thumbnails, and its page."""
    for left_out in ((), ("classes",), ("classes", "maps")):
        content = describe_comparison(page, left_out)
        text = fill_template(_choose_template(page), content)
        if len(text.encode("utf-8")) <= MAX_BYTES:
            break
    return content, text


def _choose_template(page: ComparisonPage) -> str:
    return f"{page.summary['kind']}.html.j2"


def describe_comparison(page: ComparisonPage, left_out: Sequence[str] = ()) -> Content:
    """Everything that the template draws; a section that has nothing to show is None, and left out."""
    summary, ranked = page.summary, page.summary["kind"] == "ranking"
    arms = _dress_arms(summary["arms"], len(page.arms))
    told = [arm["against_first"] for arm in arms[1:]] if ranked else summary["pairs"]
    pairs = [{**pair, "arms": _find_pair(arms, pair)} for pair in told]
    content: Content = {
        "summary": summary,
        "name": name_folder(summary["data"]["folder"]),
        "arms": arms,
        "shown": arms[: len(page.arms)],
        "pairs": pairs,
        "winner": _find_winner(pairs, len(arms)),
        "tiles": figures.draw_intervals(arms),
        "differences": figures.draw_differences(pairs[:BESIDE_VERDICT]) if pairs else None,
        "confusions": _describe_confusions(page),
        "scores": _describe_classes(page, whole="classes" not in left_out),
        "reliability": [
            figures.draw_reliability(bin_predictions(view), arm["measures"]["calibration_error"])
            for view, arm in zip(page.arms, arms, strict=False)
        ],
        "galleries": [_describe_gallery(page, gallery) for gallery in answers.choose_images(page.arms)],
        "thumbnails": {},
    }
    content |= _describe_leaderboard(arms) if ranked else _describe_work(page, arms, left_out)
    content["packed"] = _pack_map(content) if content["maps"] else None
    content["sections"] = _list_sections(content, ranked=ranked)
    return content


def bin_predictions(view: ArmView) -> list[Bin]:
    """An arm's answers by how sure it was."""
    told = view.predictions
    return bin_confidences(told.labels == told.predicted, told.probabilities.max(axis=1))


def _dress_arms(arms: Sequence[Mapping[str, Any]], n_shown: int) -> list[Content]:
    """The arms with a colour and a shape each; those whose answers are not shown are grey."""
    colours = len(list_colours(LIGHT))
    return [
        {
            **arm,
            "i": i,
            "colour": i % colours if i < n_shown else N_CLASS_COLOURS,
            "shape": SHAPES[i % len(SHAPES)] if i < n_shown else SHAPES[0],
        }
        for i, arm in enumerate(arms)
    ]


def _describe_work(page: ComparisonPage, arms: Sequence[Mapping[str, Any]], left_out: Sequence[str]) -> Content:
    """What ways to a classifier cost, how they learned, what they saw."""
    histories = figures.draw_histories([arm.histories for arm in page.arms])
    maps = [] if "maps" in left_out else page.feature_maps
    return {
        "against_time": figures.draw_accuracy_against_time(arms),
        "stages": figures.draw_stages(arms),
        "histories": histories if any(histories) else None,
        "maps": [{"map": one, **_group_points(page, one)} for one in maps],
        "map_data": _describe_map_images(page) if maps else {},
        "summary_curve": page.curve,
        "curve": figures.draw_learning_curve(page.curve) if page.curve and page.curve["points"] else None,
    }


def _describe_leaderboard(arms: Sequence[Mapping[str, Any]]) -> Content:
    """All arms in one table and one figure, as the features that they learned from are told apart."""
    return {
        "board": figures.draw_leaderboard(arms),
        "against_extraction": figures.draw_accuracy_against_extraction(arms),
        "maps": [],
    }


def _list_sections(content: Content, *, ranked: bool) -> list[tuple[str, str]]:
    """The (anchor, title) of what there is to show."""
    every = (
        ("numbers", "Leaderboard" if ranked else "The numbers", True),
        ("time", "Accuracy and time", not ranked or content["against_extraction"]),
        ("evidence", "Evidence", content["pairs"]),
        ("cost", "Cost", not ranked),
        ("training", "Training", content.get("histories")),
        ("confusions", "Confusions", content["confusions"]),
        ("classes", "Classes", True),
        ("reliability", "Reliability", True),
        ("images", "Images", content["galleries"]),
        ("map", "Feature map", content["maps"]),
        ("curve", "More images?", content.get("curve")),
        ("run", "What was run", True),
    )
    return [(anchor, title) for anchor, title, there in every if there]


def _find_pair(arms: Sequence[Mapping[str, Any]], pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [next(arm for arm in arms if arm["name"] == pair[which]) for which in ("first", "second")]


def _find_winner(pairs: Sequence[Mapping[str, Any]], n_arms: int) -> str | None:
    """The arm that is claimed better than every other one, if the tests allow such a claim."""
    beaten: dict[str, set[str]] = {}
    for pair in pairs:
        if pair["claim"] in ("first", "second"):
            better, worse = (pair["first"], pair["second"])[:: 1 if pair["claim"] == "first" else -1]
            beaten.setdefault(better, set()).add(worse)
    return next((name for name, worse in beaten.items() if len(worse) == n_arms - 1), None)


def _describe_confusions(page: ComparisonPage) -> Content:
    n_classes = len(page.summary["data"]["classes"])
    matrices = [answers.count_confusions(arm, n_classes) for arm in page.arms]
    drawn = [figures.lay_out_confusions(one) for one in matrices]
    return {
        "form": drawn[0]["form"],
        "n": n_classes,
        "arms": drawn,
        "wrong": [int(one.sum() - np.trace(one)) for one in matrices],
        "pairs": [] if drawn[0]["form"] == "numbers" else answers.rank_confusions(matrices),
    }


def _describe_classes(page: ComparisonPage, *, whole: bool) -> Content:
    n_classes = len(page.summary["data"]["classes"])
    matrices = [answers.count_confusions(arm, n_classes) for arm in page.arms]
    scores = [score_classes(one) for one in matrices]
    support = matrices[0].sum(axis=1).tolist()
    columns = [(one.precision.tolist(), one.recall.tolist(), one.f1.tolist()) for one in scores]
    rows = [
        {
            "label": label,
            "support": support[label],
            "scores": [
                [None if np.isnan(values[label]) else values[label] for values in (precision, recall, f1)]
                for precision, recall, f1 in columns
            ],
        }
        for label in range(n_classes)
    ]
    if n_classes <= answers.SHOWN_CLASSES:
        return {"rows": rows, "all": None}
    chosen = [rows[label] for label in answers.choose_classes(scores)]
    fits = whole and 3 * n_classes * len(scores) <= MOST_CELLS
    return {"rows": chosen, "all": rows if fits else None}


def _describe_gallery(page: ComparisonPage, gallery: answers.Gallery) -> Content:
    said = [
        {
            "path": page.arms[0].predictions.paths[row],
            "label": int(page.arms[0].predictions.labels[row]),
            "said": [_tell(page.arms[arm], row) for arm in _list_speakers(page, gallery)],
        }
        for row in gallery.rows
    ]
    return {"right": gallery.right, "wrong": gallery.wrong, "n": gallery.n, "images": said}


def _list_speakers(page: ComparisonPage, gallery: answers.Gallery) -> list[int]:
    """The arms whose answers stand below an image: those that it is about, and the first ones."""
    own = [*gallery.right, *(gallery.wrong if gallery.right else ())]
    return own or list(range(min(len(page.arms), answers.FIRST_ARMS + 1)))


def _tell(arm: ArmView, row: int) -> tuple[int, float]:
    """The class that an arm gave an image, and its probability."""
    predicted = int(arm.predictions.predicted[row])
    return predicted, float(arm.predictions.probabilities[row, predicted])


def _group_points(page: ComparisonPage, feature_map: FeatureMap) -> Content:
    """The points of a map by class, which has a colour and a shape; those that are reported, those that are missed."""
    n_classes = len(page.summary["data"]["classes"])
    places, aspect = figures.lay_out_map(feature_map)
    first = page.arms[0].predictions
    missed = {first.paths[row] for row in np.flatnonzero(first.labels != first.predicted).tolist()}
    few = n_classes <= FEW_CLASSES
    groups = []
    for label in np.unique(feature_map.labels).tolist():
        rows = np.flatnonzero(feature_map.labels == label).tolist()
        points = [
            {
                "x": places[row][0],
                "y": places[row][1],
                "ringed": feature_map.splits[row] == page.summary["reported"]["split"],
                "missed": feature_map.paths[row] in missed,
                "path": feature_map.paths[row],
            }
            for row in rows
        ]
        shape = SHAPES[label % len(SHAPES)] if few else SHAPES[0]
        hue = round(360 * label / n_classes)
        colour = label % N_CLASS_COLOURS if few else None
        groups.append({"label": label, "colour": colour, "hue": hue, "shape": shape, "points": points})
    return {"groups": groups, "aspect": aspect}


def _describe_map_images(page: ComparisonPage) -> Content:
    """The images on any map: class, split, what the first arms said of those that are reported."""
    rows = {path: row for row, path in enumerate(page.arms[0].predictions.paths)}
    arms = page.arms[: answers.FIRST_ARMS + 1]
    images: dict[str, Any] = {}
    for one in page.feature_maps:
        for path, label, split in zip(one.paths, one.labels.tolist(), one.splits, strict=True):
            if path not in images:
                said = [_tell(arm, rows[path]) for arm in arms] if path in rows else []
                images[path] = {"label": label, "split": split, "said": said}
    return {"images": images, "thumbnails": {}, "arms": [arm.name for arm in arms]}


def _list_gallery_paths(content: Content) -> Iterator[str]:
    for gallery in content["galleries"]:
        yield from (image["path"] for image in gallery["images"])


def _list_map_paths(content: Content) -> Iterator[str]:
    """The images of the maps in random order: where not all thumbnails fit, every class has some."""
    paths = list(content["map_data"]["images"]) if content["maps"] else []
    yield from (paths[i] for i in np.random.default_rng(0).permutation(len(paths)).tolist())


def _pack_map(content: Content) -> Content:
    """What the script of the maps knows, small: images as lists, points as numbers of images."""
    data = content["map_data"]
    index = {path: i for i, path in enumerate(data["images"])}
    images = [
        [
            make_writable(path),
            one["label"],
            one["split"],
            data["thumbnails"].get(path, ""),
            [[predicted, round(100 * probability, 1)] for predicted, probability in one["said"]],
        ]
        for path, one in data["images"].items()
    ]
    maps = [
        [[point["x"], point["y"], index[point["path"]]] for group in one["groups"] for point in group["points"]]
        for one in content["maps"]
    ]
    classes = [make_writable(cut_middle(name, NAME)) for name in content["summary"]["data"]["classes"]]
    arms = [make_writable(cut_middle(name, NAME)) for name in data["arms"]]
    return {"classes": classes, "arms": arms, "images": images, "maps": maps}
