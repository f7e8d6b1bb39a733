"""Pages to look at and to test: two classes of synthetic photographs, and the extremes of what a page may be given."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from featcache.metrics import mcnemar_test, measure_probabilities, wilson_interval
from featcache.pages import ArmView, AuditPage, ComparisonPage, FeatureMap
from featcache.runs import Predictions

COLOURS = {"ants": ((108, 122, 74), (58, 34, 26)), "bees": ((138, 150, 96), (214, 158, 40))}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>.jpg',
    "\u202egpj.exe",
    "שלום עולם",
    "بيانات",
    "n" * 250,
    "caf\udce9",
    "{{ 7 * 7 }} {% raw %}",
    "a&b'c\"d`e</style></title><!--",
    "tab\tnew\nline\x00\x1b[31m",
]


def draw_insect(name: str, seed: int, size: tuple[int, int]) -> Image.Image:
    """Something with a body and legs on a blurred meadow, never twice the same."""
    rng = np.random.default_rng(seed)
    ground, body = COLOURS.get(name, ((120, 120, 130), (60, 70, 160)))
    spots = rng.integers(-34, 34, (9, 12, 1)) + rng.integers(-8, 8, (9, 12, 3)) + np.array(ground)
    image = Image.fromarray(np.clip(spots, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    x, y = (rng.uniform(0.3, 0.7) * side for side in size)
    r = rng.uniform(0.08, 0.14) * min(size)
    for k in range(3):
        for side in (-1, 1):
            draw.line([(x + (k - 1) * r, y), (x + (k - 1.2) * 2 * r, y + side * 2.6 * r)], fill=(40, 30, 24), width=2)
    for k in (-1.5, 0, 1.4):
        draw.ellipse([x + (k - 0.9) * r, y - 0.8 * r, x + (k + 0.9) * r, y + 0.8 * r], fill=body)
    if name == "bees":
        for k in (-1.6, -1.1, 1.1, 1.6):
            draw.line([(x + k * r, y - 0.6 * r), (x + k * r, y + 0.6 * r)], fill=(40, 26, 12), width=3)
        draw.ellipse([x - 0.5 * r, y - 2.2 * r, x + 1.2 * r, y - 0.5 * r], fill=(222, 226, 230))
    return image.filter(ImageFilter.GaussianBlur(0.7))


def draw_insects(root: Path, counts: dict[str, int] | None = None) -> Path:
    """ROOT/{train,val}/{ants,bees}, of several formats and sizes."""
    for split, n in (counts or {"train": 24, "val": 153}).items():
        for i in range(n):
            name = ("ants", "bees")[i % 2]
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            size = (320, 240) if i % 3 else (220, 300)
            draw_insect(name, 1000 * len(split) + i, size).save(folder / f"{i:04d}_{name[:3]}.jpg", quality=88)
    return root


def make_predictions(
    paths: list[str], labels: NDArray[np.int64], n_classes: int, accuracy: float, seed: int
) -> Predictions:
    """Answers of about this accuracy, surer where they are right; some images are hard for every arm."""
    shared, own = np.random.default_rng(7), np.random.default_rng(seed)
    hard = shared.random(len(labels))
    right = hard + own.normal(0, 0.02, len(labels)) < accuracy
    predicted = np.where(right, labels, (labels + 1 + own.integers(0, max(1, n_classes - 1), len(labels))) % n_classes)
    predicted = np.where(~right & (predicted == labels), (labels + 1) % n_classes, predicted)
    sure = np.where(
        predicted == labels, 1 - 0.5 * own.beta(1, 6, len(labels)), 0.51 + 0.48 * own.beta(2, 2, len(labels))
    )
    probabilities = np.repeat(((1 - sure) / (n_classes - 1))[:, None], n_classes, axis=1)
    probabilities[np.arange(len(labels)), predicted] = sure
    return Predictions(paths=tuple(paths), labels=labels, predicted=predicted, probabilities=probabilities)


def make_history(epochs: int, seed: int) -> list[dict[str, float]]:
    """Losses that fall and accuracies that rise, with noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        left = float(np.exp(-epoch / (epochs / 4)))
        noise = rng.normal(0, 0.01, 4)
        rows.append(
            {
                "epoch": float(epoch),
                "lr": 0.001,
                "train_loss": 0.22 + 0.5 * left + noise[0],
                "train_accuracy": min(0.94 - 0.35 * left + noise[1], 1.0),
                "holdout_loss": 0.16 + 0.35 * left + noise[2],
                "holdout_accuracy": min(0.955 - 0.25 * left + noise[3], 1.0),
                "seconds": 3.1,
            }
        )
    return rows


def describe_arm(name: str, kind: str, views: list[Predictions], seconds: float) -> dict[str, Any]:
    """An arm as compare.json has it."""
    correct = [int((one.labels == one.predicted).sum()) for one in views]
    n = len(views[0].labels)
    head = kind == "head"
    stages = {"extraction": 0.9 * seconds, "selection": 0.07 * seconds, "training": 0.02 * seconds, "evaluation": 0.02}
    if not head:
        stages = {"training": seconds - 0.9, "evaluation": 0.9}
    total = sum(stages.values())
    return {
        "name": name,
        "kind": kind,
        "title": "linear head (lbfgs, C = 0.1) on frozen efficientnet_lite0 features"
        if head
        else "efficientnet_lite0, fine-tuned whole, 25 epochs",
        "backbone": "efficientnet_lite0",
        "accuracy": float(np.mean(correct)) / n,
        "images": n,
        "interval": list(wilson_interval(round(float(np.mean(correct))), n)),
        "seed_spread": float(np.std(correct, ddof=1)) / n if len(correct) > 1 else None,
        "measures": measure_probabilities(views[0].labels, views[0].probabilities),
        "runs": [
            {
                "run": f"runs/{name}-{seed}",
                "seed": seed,
                "accuracy": hits / n,
                "correct": hits,
                "seconds": total * (1 + 0.06 * (seed - 1)),
            }
            for seed, hits in enumerate(correct)
        ],
        "cost": {
            "seconds": {**stages, "total": total},
            "cpu_seconds": {**{k: 1.8 * v for k, v in stages.items()}, "total": 1.8 * total} if head else None,
            "peak_memory_bytes": 1_139_000_000 if head else 1_666_000_000,
            "images_per_second": 63.2 if head else 16.4,
            "trainable_parameters": 2562 if head else 3_373_570,
            "flops": 3.1e11 if head else 1.42e13,
            "energy_joules": None,
            "result_bytes": 12_400 if head else 13_700_000,
        },
        "selection": "C = 0.1: 5-fold cross-validation on the training split, least log loss"
        if head
        else "weights of epoch 21 of 25, the best on 49 training images held out (of 244)",
        "optimistic": False,
        "notes": ["the features were extracted without augmentation"] if head else [],
    }


def describe_pair(first: dict[str, Any], second: dict[str, Any], a: Predictions, b: Predictions) -> dict[str, Any]:
    """A pair as compare.json has it; the interval is a rough one."""
    right = [one.labels == one.predicted for one in (a, b)]
    only_first, only_second, p_value = mcnemar_test(*right)
    n = len(a.labels)
    difference = first["accuracy"] - second["accuracy"]
    half = 1.96 * float(np.sqrt(max(only_first + only_second, 1))) / n
    return {
        "first": first["name"],
        "second": second["name"],
        "difference": difference,
        "interval": [difference - half, difference + half],
        "interval_with_seeds": [difference - 2 * half, difference + 2 * half] if len(first["runs"]) > 1 else None,
        "mcnemar": [
            {
                "seeds": [seed, seed],
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_value": p_value,
            }
            for seed in range(len(first["runs"]))
        ],
        "p_value": p_value,
        "p_adjusted": p_value,
        "detectable_difference": 2.8 * float(np.sqrt(max(only_first + only_second, 1))) / n,
        "claim": "none" if p_value >= 0.05 else "first" if difference > 0 else "second",
    }


def make_page(
    *,
    classes: list[str],
    paths: list[str],
    labels: NDArray[np.int64],
    arms: list[tuple[str, str, float, float]],
    n_seeds: int = 1,
    epochs: int = 0,
    root: Path | None = None,
    maps: list[FeatureMap] | None = None,
    curve: dict[str, Any] | None = None,
    folder: str = "hymenoptera",
) -> ComparisonPage:
    """A page of such arms (name, kind, accuracy, seconds) on such images."""
    views, described, shown = [], [], []
    for i, (name, kind, accuracy, seconds) in enumerate(arms):
        seeds = [make_predictions(paths, labels, len(classes), accuracy, 100 * i + seed) for seed in range(n_seeds)]
        views.append(seeds[0])
        described.append(describe_arm(name, kind, seeds, seconds))
        histories = [] if kind == "head" or not epochs else [make_history(epochs, 10 * i + s) for s in range(n_seeds)]
        shown.append(ArmView(name=name, predictions=seeds[0], histories=histories))
    pairs = [
        describe_pair(described[i], described[j], views[i], views[j])
        for i in range(len(arms))
        for j in range(i + 1, len(arms))
    ]
    verdict = f"{arms[0][0]} gets {described[0]['accuracy']:.1%} of {len(labels)} images right."
    if pairs:
        first, second = arms[0][0], arms[1][0]
        claims = {
            "none": f"No difference between {first} and {second} can be shown",
            "first": f"{first} is better than {second}",
            "second": f"{second} is better than {first}",
        }
        times = arms[1][3] / arms[0][3]
        verdict = f"{claims[pairs[0]['claim']]} on {len(labels):,} images; {second} took {times:.3g} times as long."
    summary = {
        "schema": 2,
        "kind": "comparison",
        "verdict": verdict,
        "grounds": f"{len(labels):,} images, {n_seeds} seeds.",
        "created": "2026-11-26T22:30:00Z",
        "command": f"featcache compare {folder} --seeds {n_seeds}",
        "data": {
            "folder": folder,
            "classes": classes,
            "images": {"train": 244, "val": len(labels)},
            "fingerprints": {"train": "b1946ac92492d234", "val": "591785b794601e21"},
        },
        "reported": {"split": "val", "images": len(labels)},
        "significance": 0.05,
        "arms": described,
        "pairs": pairs,
        "amortised": [
            {
                "heads": k,
                "seconds": {
                    arm["name"]: 7.4 + 0.62 * k if arm["kind"] == "head" else k * arm["cost"]["seconds"]["total"]
                    for arm in described
                },
            }
            for k in (1, 10, 100)
        ],
        "remarks": ["The weights were trained on ImageNet, which may hold some of these very photographs"],
        "environment": {
            "versions": {"python": "3.11.7", "featcache": "0.1.0", "torch": "2.10.0", "scikit-learn": "1.9.1"},
            "platform": "Linux-6.1-x86_64",
            "cores": 2,
        },
    }
    return ComparisonPage(summary=summary, arms=shown, curve=curve, feature_maps=maps or [], root=root)


def make_map(
    method: str, paths: list[str], splits: list[str], labels: NDArray[np.int64], n_classes: int, seed: int
) -> FeatureMap:
    """Clouds, one a class, that overlap a little."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(0, 3.0 if n_classes > 2 else 2.4, (n_classes, 2))
    coordinates = middles[labels] + rng.normal(0, 1.0, (len(labels), 2))
    note = f"{method}, 41 % of the variance; {len(labels):,} images"
    return FeatureMap(
        method=method, coordinates=coordinates, labels=labels, splits=tuple(splits), paths=tuple(paths), note=note
    )


def make_curve() -> dict[str, Any]:
    """A learning curve as `Curve.describe` has it."""
    sizes = [4, 8, 15, 28, 52, 97, 140, 195]
    values = [1 - 0.03 - 0.6 * n**-0.55 for n in sizes]
    further = [(488, 0.948, 0.931, 0.962), (976, 0.956, 0.938, 0.971)]
    return {
        "points": [
            {"images": n, "accuracy": v, "low": v - 0.05, "high": min(v + 0.04, 1)}
            for n, v in zip(sizes, values, strict=True)
        ],
        "law": {"floor": 0.03, "factor": 0.6, "power": 0.55},
        "forecast": [{"images": n, "accuracy": v, "low": low, "high": high} for n, v, low, high in further],
        "verdict": "learning curve: 93.7% with 195 training images; twice as many as there are (488) may help: 94.8% "
        "expected, 95 % interval 93.1% to 96.2%",
    }


def make_realistic(root: Path) -> ComparisonPage:
    """Ants and bees: a head and a fine-tune, three seeds each, two maps, a learning curve."""
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    reported = [path for path in found if path.startswith("val/")]
    labels = np.array([int("/bees/" in path) for path in found])
    maps = [
        make_map(method, found, [path.split("/")[0] for path in found], labels, 2, seed)
        for method, seed in (("PCA", 3), ("t-SNE", 4))
    ]
    return make_page(
        classes=["ants", "bees"],
        paths=reported,
        labels=np.array([int("/bees/" in path) for path in reported]),
        arms=[("head", "head", 0.95, 8.3), ("finetune", "finetune", 0.945, 79.0)],
        n_seeds=3,
        epochs=25,
        root=root,
        maps=maps,
        curve=make_curve(),
    )


def make_huge(n_classes: int = 1000, n_images: int = 20_000, n_arms: int = 2) -> ComparisonPage:
    """Many of everything."""
    labels = np.arange(n_images) % n_classes
    classes = [f"n{i:08d} a class of some name" for i in range(n_classes)]
    paths = [f"val/{classes[label]}/ILSVRC2012_val_{i:08d}.JPEG" for i, label in enumerate(labels.tolist())]
    arms = [
        (f"arm {i} of a longer name", ("head", "finetune")[i % 2], 0.7 + 0.01 * i, 10.0 ** (1 + i % 4))
        for i in range(n_arms)
    ]
    some = np.arange(0, n_images, max(1, n_images // 1000))
    maps = [make_map("PCA", [paths[i] for i in some], ["val"] * len(some), labels[some], n_classes, 0)]
    return make_page(classes=classes, paths=paths, labels=labels, arms=arms, epochs=100, maps=maps)


def make_hostile(root: Path) -> ComparisonPage:
    """Names that would run, hide, break the encoding or the layout; one image cannot be decoded, others are missing."""
    folder = root / "val" / "x"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, name in enumerate(HOSTILE):
        path = f"val/x/{name[:200].replace('/', '_')}"
        paths.append(path)
        if "\x00" not in name and i != 1:
            draw_insect("bees", i, (64, 48)).save(root / path, "JPEG")
    (root / paths[0]).write_bytes(b"no image")
    labels = np.arange(len(paths)) % len(HOSTILE)
    return make_page(
        classes=HOSTILE,
        paths=paths,
        labels=labels,
        arms=[(HOSTILE[0], "head", 0.5, 8.0), (HOSTILE[5], "finetune", 0.45, 900.0), (HOSTILE[3], "head", 0.2, 8.0)],
        epochs=2,
        root=root,
        maps=[make_map("PCA", paths, ["val"] * len(paths), labels, len(HOSTILE), 0)],
        folder=HOSTILE[1],
    )


def make_ranking(n_arms: int = 30, n_classes: int = 10, n: int = 300, root: Path | None = None) -> ComparisonPage:
    """Backbones by their heads, the first alike, the last ones worse; of one the cost is not known, one failed."""
    labels = np.arange(n) % n_classes
    page = make_page(
        classes=[f"class {i}" for i in range(n_classes)],
        paths=[f"val/class {label}/{i:05d}.jpg" for i, label in enumerate(labels.tolist())],
        labels=labels,
        arms=[(f"timm:backbone_{i}_of_some_size", "head", 0.95 - 0.012 * i, 4.0 + 11 * (i % 7)) for i in range(n_arms)],
        root=root,
    )
    pairs = {pair["second"]: pair for pair in page.summary["pairs"] if pair["first"] == page.arms[0].name}
    arms = [
        {
            **arm,
            "layer": "input of fc",
            "width": 512 * (1 + i % 4),
            "parameters": 1_200_000 * (i + 1) if i != 2 else None,
            "multiply_adds": 350_000_000 * (i + 1) if i != 2 else None,
            "extraction_seconds": arm["cost"]["seconds"]["extraction"] if i != 2 else None,
            "head_seconds": 0.4 + i,
            "against_first": {**pairs[arm["name"]], "flattered": False} if i else None,
        }
        for i, arm in enumerate(page.summary["arms"])
    ]
    kept = {name: value for name, value in page.summary.items() if name not in ("pairs", "amortised")}
    failed = {"vit_b_17": "unknown backbone 'vit_b_17': expected a name that `featcache backbones` lists"}
    summary = {**kept, "kind": "ranking", "arms": arms, "failed": failed}
    return ComparisonPage(summary=summary, arms=page.arms[:4], curve=None, feature_maps=[], root=root)


def make_audited(path: str, split: str, label: str, suggested: str | None, quality: float) -> dict[str, Any]:
    """An image as audit.json has it."""
    judged = suggested is not None
    return {
        "path": path,
        "split": split,
        "label": label,
        "suggested": suggested,
        "probability": max(quality, 1 - quality) if judged else None,
        "quality": quality if judged else None,
        "is_issue": judged and suggested != label and quality < 0.1,
        "distance": 0.9 - quality / 2,
    }


def make_group(images: list[dict[str, Any]], similarity: float | None = 1.0, kind: str = "exact") -> dict[str, Any]:
    """A group as audit.json has it."""
    return {
        "kind": kind,
        "similarity": similarity,
        "contradiction": len({one["label"] for one in images}) > 1,
        "leak": len({one["split"] for one in images}) > 1,
        "images": images,
    }


def make_audit(
    classes: list[str], images: list[dict[str, Any]], groups: list[dict[str, Any]], root: Path | None = None
) -> AuditPage:
    """The page of an audit that found these groups, and what the images say of themselves."""
    ranking = sorted(images, key=lambda one: 2 if one["quality"] is None else one["quality"])
    judged = [one for one in ranking if one["suggested"] is not None]
    correct = sum(one["suggested"] == one["label"] for one in judged)
    splits = list(dict.fromkeys(one["split"] for one in images))
    counts = {split: sum(one["split"] == split for one in images) for split in splits}
    accuracy = {
        "correct": correct,
        "n": len(judged),
        "accuracy": correct / max(len(judged), 1),
        "interval": list(wilson_interval(correct, max(len(judged), 1))),
        "C": 0.1,
    }
    summary = {
        "schema": 1,
        "features": {
            "cache": "features.h5",
            "content_sha256": "ab" * 32,
            "backbone": "efficientnet_lite0",
            "dim": 1280,
        },
        "data": {
            "folder": "insects",
            "classes": classes,
            "images": counts,
            "fingerprints": dict.fromkeys(splits, "cd" * 32),
        },
        "images": counts,
        "settings": {"neighbours": 20, "threshold": 0.9, "folds": 5, "seed": 0, "top": 10},
        "accuracy": accuracy if judged else None,
        "leakage": [group for group in groups if group["leak"]],
        "exact_duplicates": [group for group in groups if group["kind"] == "exact"],
        "near_duplicates": [group for group in groups if group["kind"] == "near"],
        "label_issues": [one for one in ranking if one["is_issue"]],
        "outliers": sorted(images, key=lambda one: -one["distance"])[:10],
        "overlapping_classes": [
            {"first": a, "second": b, "first_as_second": 3, "second_as_first": 1} for a, b in pairwise(classes)
        ],
        "remarks": ["2 of 66 labels were not judged: a class is a single image"],
    }
    versions = {"python": "3.11.7", "featcache": "0.1.0", "cleanlab": "2.9.0"}
    table, command = "runs/audit/labels.csv", "featcache audit features.h5"
    return AuditPage(summary=summary, ranking=ranking, table=table, command=command, versions=versions, root=root)


def make_insect_audit(root: Path) -> AuditPage:
    """Of `draw_insects`: three wrong labels, a leak of each kind, twins under two labels, three of one scene."""
    names = {"ants": "bees", "bees": "ants"}
    images = []
    for i, file in enumerate(sorted(root.rglob("*.jpg"))):
        split, label, _ = path = file.relative_to(root).parts
        wrong = i % 19 == 3
        quality = 0.01 * (1 + i % 5) if wrong else 0.4 + 0.59 * ((7 * i) % 50) / 50
        images.append(make_audited("/".join(path), split, label, names[label] if wrong else label, quality))
    ants, bees = ([one for one in images if one["label"] == name] for name in ("ants", "bees"))
    groups = [
        make_group([ants[0], ants[-1]]),
        make_group([bees[0], bees[-1]], 0.946, "near"),
        make_group([ants[-2], bees[-2]]),
        make_group(bees[-6:-3], 0.912, "near"),
    ]
    return make_audit(["ants", "bees"], images, groups, root)


def make_hostile_audit(root: Path) -> AuditPage:
    """The files of `make_hostile`, each under a hostile label and taken for another one."""
    make_hostile(root)
    paths = [f"val/x/{name[:200].replace('/', '_')}" for name in HOSTILE]
    images = [
        make_audited(path, ("train", "val", "<b>test")[i % 3], HOSTILE[i], HOSTILE[i - 1], 0.05 * i)
        for i, path in enumerate(paths)
    ]
    groups = [make_group(images[:3]), make_group(images, None, "near"), make_group(images[3:7:3])]
    return make_audit(HOSTILE, images, groups, root)
