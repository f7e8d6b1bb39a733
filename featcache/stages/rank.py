"""The leaderboard of frozen features: one head per backbone, all on the same images, before anything is fine-tuned."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from featcache import files
from featcache.backbones.catalogue import find_cost
from featcache.cache import FeatureCache, check_complete, open_cache
from featcache.config import RUNS_DIR, CompareConfig, HeadConfig, is_imported, name_option
from featcache.dataset import describe_data, reopen_root
from featcache.errors import BackboneError, BadImage, MissingExtraError, RunError, SettingsError
from featcache.pages import ArmView, ComparisonPage, render_comparison
from featcache.plots import draw_ranking, save_figure
from featcache.progress import SILENT, Progress
from featcache.report import (
    Arm,
    choose_split,
    describe_arm,
    format_ranking_markdown,
    format_table,
    summarise_ranking,
    tabulate_ranking,
)
from featcache.stages.compare import check_replaceable, load_arms, say_command
from featcache.stages.extract import extract_features
from featcache.stages.plan_comparison import make_slug, name_cache
from featcache.stages.run_arms import Group
from featcache.stages.train_head import train_head
from featcache.stages.write_comparison import MARKDOWN, NUMBERS, PAGE, find_remarks
from featcache.storage import Place, locate, locate_local

FIGURE = ("accuracy and cost", "ranking.png")
SHOWN = 4  # of the first arms: their confusions, reliability and images
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
        The page, report.html; compare.json and compare.md lie beside it.
    summary
        All that is in compare.json.
    failed
        Backbones that could not be used, with the reason.
    left_out
        Files of the data set that could not be used as images and were left out.
    """

    arms: list[dict[str, Any]]
    verdict: str
    table: str
    report: Path
    summary: dict[str, Any]
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
    config, output = CompareConfig(**settings), locate_local(output, "a report")
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
    command = say_command(data, output, replace(config, backbone=tuple(backbones)))
    ranking = rank_files(list(caches.values()), output, Path(config.runs), progress, head, failed, command)
    return replace(ranking, left_out=tuple(left_out))


def rank_caches(
    caches: Sequence[Place | str],
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
    output, runs = locate_local(output, "a report"), locate_local(runs, "a run")
    command = say_ranking_command(caches, output, runs, HeadConfig(**settings))
    return rank_files(caches, output, runs, progress, settings, {}, command)


def rank_files(
    caches: Sequence[Place | str],
    output: Path,
    runs: Path,
    progress: Progress,
    settings: Mapping[str, Any],
    failed: Mapping[str, str],
    command: str,
) -> Ranking:
    """`rank_caches`, and the backbones that have none because they failed; `command` makes it again."""
    HeadConfig(**settings)
    check_replaceable(output)
    opened = {locate(path): open_cache(path) for path in caches}
    for path, cache in opened.items():
        check_complete(cache, path)
    check_same_training(opened)
    places = zip(opened, name_runs(runs, list(opened)), strict=True)
    folders = [train_head(path, folder, progress=progress, **settings).folder for path, folder in places]
    names = name_features(list(opened.values()), list(opened))
    arms = load_arms([Group(name=name, runs=[folder]) for name, folder in zip(names, folders, strict=True)], names)
    split = choose_split(arms)
    described = [describe_features_of(arm, cache, split) for arm, cache in zip(arms, opened.values(), strict=True)]
    order = sorted(
        range(len(arms)), key=lambda i: (-described[i]["accuracy"], described[i]["cost"]["seconds"]["total"])
    )
    progress.say("report: figure and page")
    return write_ranking(output, [arms[i] for i in order], [described[i] for i in order], failed, command)


def check_same_training(caches: Mapping[Place, FeatureCache]) -> None:
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
    output: Path, arms: Sequence[Arm], numbers: Sequence[dict[str, Any]], failed: Mapping[str, str], command: str
) -> Ranking:
    """Compare everyone with the first, and write the report."""
    summary = summarise_ranking(
        arms,
        numbers,
        failed=failed,
        remarks=find_remarks(arms),
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    split = summary["reported"]["split"]
    page = ComparisonPage(
        summary=summary,
        arms=[ArmView(name=arm.name, predictions=arm.runs[0].predictions[split], histories=[]) for arm in arms[:SHOWN]],
        curve=None,
        feature_maps=[],
        root=reopen_root(summary["data"]["folder"]),
    )
    with files.fill_files(output) as folder:
        save_figure(draw_ranking(summary["arms"]), folder / FIGURE[1])
        (folder / MARKDOWN).write_text(format_ranking_markdown(summary, [FIGURE]), encoding="utf-8")
        (folder / NUMBERS).write_text(files.pretty_json(summary), encoding="utf-8")
        (folder / PAGE).write_text(render_comparison(page), encoding="utf-8")
    return Ranking(
        arms=summary["arms"],
        verdict=summary["verdict"],
        table=format_table(tabulate_ranking(summary["arms"])),
        report=output / PAGE,
        summary=summary,
        failed=dict(failed),
    )


def say_ranking_command(caches: Sequence[Place | str], output: Path, runs: Path, head: HeadConfig) -> str:
    """The command line that ranks these caches again; settings that it has no option for are left to Python."""
    words = ["featcache", "compare", *(str(path) for path in caches)]
    for name, option in (("solver", "--solver"), ("C", "-C"), ("seed", "--seed")):
        if (value := getattr(head, name)) != getattr(HeadConfig(), name):
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    for option, path, usual in (("--runs", runs, RUNS_DIR), ("-o", output, f"{RUNS_DIR}/compare")):
        words += [] if path == Path(usual) else [option, str(path)]
    return shlex.join(words)


def describe_features_of(arm: Arm, cache: FeatureCache, split: str) -> dict[str, Any]:
    """A head's numbers, and what its features are and cost."""
    cost = find_cost(cache.extractor)
    seconds = arm.record.seconds
    return {
        **describe_arm(arm, split),
        "layer": cache.extractor["layer"],
        "width": cache.dim,
        "parameters": cost and cost.parameters,
        "multiply_adds": cost and cost.operations,
        "extraction_seconds": seconds.get("extraction"),
        "head_seconds": seconds["selection"] + seconds["training"],
    }


def name_features(caches: Sequence[FeatureCache], paths: Sequence[Place]) -> list[str]:
    """What to call each: its backbone, with layers or the file's name where that is not enough to tell all apart."""
    by_file = any(is_imported(cache.extractor["backbone"]) for cache in caches)  # which say little of themselves
    spells: tuple[Callable[[FeatureCache, Place], str], ...] = (
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


def name_run(runs: Path | str, cache: Place) -> Path:
    """The run of the head on a cache's features."""
    return Path(runs) / f"head-{make_slug(cache.stem.removeprefix('features-'))}"


def name_runs(runs: Path | str, caches: Sequence[Place]) -> list[Path]:
    """The runs of the heads on some caches' features, by the whole path where files have one name in several folders.

    >>> [path.name for path in name_runs("runs", [Path("a.h5"), Path("x/b.h5"), Path("y/b.h5")])]
    ['head-a', 'head-x_b.h5-1a8465', 'head-y_b.h5-aa9c95']
    """
    usual = [name_run(runs, path) for path in caches]
    return [
        folder if usual.count(folder) == 1 else Path(runs) / f"head-{make_slug(str(path))}"
        for path, folder in zip(caches, usual, strict=True)
    ]
