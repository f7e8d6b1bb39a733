"""The leaderboard of frozen features: one head per backbone, all on the same images, before anything is fine-tuned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache import files
from featcache.backbones.catalogue import find_cost
from featcache.cache import FeatureCache, check_complete, open_cache
from featcache.config import RUNS_DIR, CompareConfig, HeadConfig, is_imported, name_option
from featcache.dataset import describe_data
from featcache.errors import BackboneError, BadImage, MissingExtraError, RunError, SettingsError
from featcache.files import hash_bytes
from featcache.plots import draw_ranking, save_figure
from featcache.progress import SILENT, Progress
from featcache.report import (
    Arm,
    compare_with_first,
    describe_arm,
    format_ranking_markdown,
    format_table,
    state_ranking,
    tabulate_ranking,
)
from featcache.stages.compare import REPORT, check_replaceable, load_arms
from featcache.stages.extract import extract_features
from featcache.stages.train_head import train_head

FIGURE = ("accuracy and cost", "ranking.png")
FINETUNING = ("epochs", "batch_size", "lr")


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Heads on the features of several backbones, the best first.

    Attributes
    ----------
    arms
        The numbers of each (see docs/json.md).
    verdict
        What the evidence allows to say, in a sentence.
    table
        The same numbers as text.
    report
        The Markdown page.
    failed
        Backbones that could not be used, with the reason.
    left_out
        Files of the data set that could not be used as images and were left out.
    """

    arms: list[dict[str, Any]]
    verdict: str
    table: str
    report: Path
    failed: dict[str, str]
    left_out: tuple[BadImage, ...] = ()


def rank_backbones(
    data: Path | str,
    backbones: Sequence[str],
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    progress: Progress = SILENT,
    **settings: Any,
) -> Ranking:
    """Extract with each backbone, fit a head on each, and rank them.

    Each backbone has a cache and a run of its own, named after it; what exists and belongs to these images is used. A
    backbone that cannot be had is told of, and the others are ranked.

    Parameters
    ----------
    data
        DATA/{train,val[,test]}/<class>/* or DATA/<class>/*.
    backbones
        Names as in `load_backbone`.
    output
        Folder of the report.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.CompareConfig` but those of fine-tuning: nothing is fine-tuned. `features` is the
        cache file to which each backbone's name is added.

    Returns
    -------
    Ranking

    Raises
    ------
    FeatcacheError
        Whatever is wrong with the data or the output; with a backbone only if not one can be used.
    """
    config, output = CompareConfig(**settings), Path(output)
    if stated := [name for name in FINETUNING if getattr(config, name) is not None]:
        option = name_option(stated[0])
        raise SettingsError(f"{option} is of fine-tuning, and several backbones are compared by their heads alone")
    if len(set(backbones)) < len(backbones):
        raise SettingsError("a backbone is named twice: expected each once")
    check_replaceable(output)
    caches, failed = {}, {}
    left_out: dict[BadImage, None] = {}
    for i, backbone in enumerate(backbones, 1):
        progress.say(f"{i} of {len(backbones)}: {backbone}")
        try:
            extraction = extract_features(
                data,
                name_cache(config.features, backbone, config.weights),
                progress=progress,
                backbone=backbone,
                device=config.device,
                skip_bad=config.skip_bad,
                force=config.force,
                **config.stated("weights", "val_fraction", "seed", "store", "workers"),
            )
        except (BackboneError, MissingExtraError) as error:
            failed[backbone] = str(error)
            progress.say(f"WARNING: {backbone} is left out: {str(error).partition(';')[0]}")
            if len(failed) == len(backbones):
                raise
            continue
        left_out |= dict.fromkeys(extraction.bad)
        caches[backbone] = extraction.path
    head = config.stated("solver", "C", "seed")
    ranking = rank_files(list(caches.values()), output, Path(config.runs), progress, head, failed)
    return replace(ranking, left_out=tuple(left_out))


def rank_caches(
    caches: Sequence[Path | str],
    output: Path | str = f"{RUNS_DIR}/compare",
    *,
    runs: Path | str = RUNS_DIR,
    progress: Progress = SILENT,
    **settings: Any,
) -> Ranking:
    """Fit a head on each of some caches of the same images, and rank them.

    Parameters
    ----------
    caches
        Cache files, extracted or imported.
    output
        Folder of the report.
    runs
        Folder of the heads' runs.
    progress
        Told what is being done.
    settings
        Fields of `featcache.config.HeadConfig`.

    Returns
    -------
    Ranking

    Raises
    ------
    CacheError, DatasetError, RunError, OutputError
        If a file is no cache, has no use for a head, or the caches are not of the same images.
    """
    return rank_files(caches, Path(output), Path(runs), progress, settings, {})


def rank_files(
    caches: Sequence[Path | str],
    output: Path,
    runs: Path,
    progress: Progress,
    settings: Mapping[str, Any],
    failed: Mapping[str, str],
) -> Ranking:
    """`rank_caches`, and the backbones that have none because they failed."""
    HeadConfig(**settings)
    check_replaceable(output)
    opened = {Path(path): open_cache(path) for path in caches}
    for path, cache in opened.items():
        check_complete(cache, path)
    check_same_training(opened)
    places = zip(opened, name_runs(runs, list(opened)), strict=True)
    folders = [train_head(path, folder, progress=progress, **settings).folder for path, folder in places]
    names = name_features(list(opened.values()), list(opened))
    arms = [replace(arm, name=name) for arm, name in zip(load_arms(folders), names, strict=True)]
    described = [describe_features_of(arm, cache) for arm, cache in zip(arms, opened.values(), strict=True)]
    order = sorted(range(len(arms)), key=lambda i: (-described[i]["correct"], described[i]["seconds"]))
    return write_ranking(output, [arms[i] for i in order], [described[i] for i in order], failed)


def check_same_training(caches: Mapping[Path, FeatureCache]) -> None:
    """Raise a RunError if heads on these caches would not learn from the same images."""
    prints = {path: describe_data(cache.listing)["fingerprints"]["train"] for path, cache in caches.items()}
    first = next(iter(prints))
    for path, fingerprint in prints.items():
        if fingerprint != prints[first]:
            raise RunError(
                f"{path} and {first} do not hold the same training images ({len(caches[path].splits['train'])} and "
                f"{len(caches[first].splits['train'])}); rank caches of one data set and one split"
            )


def write_ranking(
    output: Path, arms: Sequence[Arm], numbers: Sequence[dict[str, Any]], failed: Mapping[str, str]
) -> Ranking:
    """Compare everyone with the first, and write the report."""
    pairs = compare_with_first(arms)
    numbers = [{**one, "against_first": pair} for one, pair in zip(numbers, [None, *pairs], strict=True)]
    verdict, rows = state_ranking(numbers), tabulate_ranking(numbers)
    with files.fill_folder(output) as folder:
        save_figure(draw_ranking(numbers), folder / FIGURE[1])
        page = format_ranking_markdown(rows, verdict, numbers, [FIGURE], data=arms[0].record.data, failed=failed)
        (folder / REPORT).write_text(page, encoding="utf-8")
        summary = {"schema": 1, "kind": "ranking", "verdict": verdict, "arms": numbers, "failed": dict(failed)}
        (folder / "compare.json").write_text(files.pretty_json(summary), encoding="utf-8")
    return Ranking(
        arms=list(numbers), verdict=verdict, table=format_table(rows), report=output / REPORT, failed=dict(failed)
    )


def describe_features_of(arm: Arm, cache: FeatureCache) -> dict[str, Any]:
    """A head's numbers, and what its features are and cost."""
    cost = find_cost(cache.extractor)
    seconds = arm.record.seconds
    return {
        **describe_arm(arm),
        "layer": cache.extractor["layer"],
        "width": cache.dim,
        "parameters": cost and cost.parameters,
        "multiply_adds": cost and cost.operations,
        "extraction_seconds": seconds.get("extraction"),
        "head_seconds": seconds["selection"] + seconds["training"],
    }


def name_features(caches: Sequence[FeatureCache], paths: Sequence[Path]) -> list[str]:
    """What to call each: its backbone, with layers or the file's name where that is not enough to tell all apart."""
    by_file = any(is_imported(cache.extractor["backbone"]) for cache in caches)  # which say little of themselves
    spells: tuple[Callable[[FeatureCache, Path], str], ...] = (
        lambda cache, _: say_backbone(cache),
        lambda cache, path: path.stem if by_file else f"{say_backbone(cache)}, {cache.extractor['layer']}",
        lambda cache, path: f"{say_backbone(cache)} ({path.name})",
        lambda _, path: str(path),
    )
    for spell in spells:
        names = [spell(cache, path) for cache, path in zip(caches, paths, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, 1)]


def say_backbone(cache: FeatureCache) -> str:
    """The backbone's name, and that its weights are random if they are."""
    random = cache.extractor["weights"].get("requested") == "none"
    return f"{cache.extractor['backbone']}{' (random)' if random else ''}"


def name_cache(features: Path | str, backbone: str, weights: str | None = None) -> Path:
    """The cache of a backbone: features-resnet18.h5 for features.h5 and resnet18; weights not its own are named.

    >>> name_cache("features.h5", "resnet18").name, name_cache("features.h5", "resnet18", "none").name
    ('features-resnet18.h5', 'features-resnet18-none.h5')
    """
    path, name = Path(features), make_slug(backbone)
    if weights not in (None, "default"):
        name = f"{name}-{make_slug(str(weights))}"
    return path.with_name(f"{path.stem}-{name}{path.suffix or '.h5'}")


def name_run(runs: Path | str, cache: Path) -> Path:
    """The run of the head on a cache's features."""
    return Path(runs) / f"head-{make_slug(cache.stem.removeprefix('features-'))}"


def name_runs(runs: Path | str, caches: Sequence[Path]) -> list[Path]:
    """The runs of the heads on some caches' features, by the whole path where files have one name in several folders.

    >>> [path.name for path in name_runs("runs", [Path("a.h5"), Path("x/b.h5"), Path("y/b.h5")])]
    ['head-a', 'head-x_b.h5-1a8465', 'head-y_b.h5-aa9c95']
    """
    usual = [name_run(runs, path) for path in caches]
    return [
        folder if usual.count(folder) == 1 else Path(runs) / f"head-{make_slug(str(path))}"
        for path, folder in zip(caches, usual, strict=True)
    ]


def make_slug(text: str) -> str:
    """A name as part of a file's; one that had to be changed gets a digest, so that no two become the same.

    >>> make_slug("resnet18"), make_slug("timm:vit_tiny")
    ('resnet18', 'timm_vit_tiny-d4f01b')
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[-60:].lstrip("._")
    return slug if slug == text else f"{slug}-{hash_bytes(text.encode())[:6]}"
