"""`featcache cache`: look into cache files, check them, explain them, list them, remove them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import DONE, ERROR
from featcache.cli.common import (
    TerminalProgress,
    extract_options,
    json_option,
    option,
    output_option,
    print_json,
)
from featcache.config import FEATURES_FILE, is_imported
from featcache.errors import CacheError, make_printable
from featcache.progress import format_bytes
from featcache.storage import Place, locate

if TYPE_CHECKING:
    from featcache.cache import FeatureCache, Item
    from featcache.stages.explain import Explanation


@click.group("cache", short_help="Cache files: info, verify, explain, ls, prune.")
def command() -> None:
    """Look into cache files, check every byte of them, see why one is not reused, find and remove them.

    \b
    Example:
      featcache cache info features.h5
      featcache cache verify features.h5
      featcache cache ls
    """


@command.command("info", short_help="What is in a cache file.")
@click.argument("file", type=click.Path(), default=FEATURES_FILE)
@json_option
def info(file: str, as_json: bool) -> None:
    """What is in FILE: backbone, weights, preprocessing, rows, classes, where it came from and what it cost.

    \b
    Example:
      featcache cache info features.h5
    """
    from featcache.cache import check_complete, list_members, open_cache

    cache = open_cache(file)
    check_complete(cache, file)
    size = sum(path.stat().st_size for path in list_members(file))
    if as_json:
        print_json(
            {
                "cache": file,
                "bytes": size,
                "rows": len(cache),
                "splits": {name: len(split) for name, split in cache.splits.items()},
                "views": cache.views.to_json() if cache.views else None,
                "classes": list(cache.classes),
                "dim": cache.dim,
                "stored": cache.stored,
                "extractor_key": cache.key,
                "content_sha256": cache.content_sha256,
                "extractor": cache.extractor,
                "provenance": cache.provenance,
            }
        )
        return
    click.echo(f"{file}: a feature cache of {len(cache):,} rows, {format_bytes(size)}")
    for name, text in describe_cache(cache):
        click.echo(make_printable(f"  {name:<15}{text}"))


def spell_size(size: int | Sequence[int]) -> str:
    """Pixels of a shorter side, or height and width.

    >>> spell_size(256), spell_size([224, 160])
    ('256', '224 x 160')
    """
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def describe_cache(cache: FeatureCache) -> list[tuple[str, str]]:
    """What a person wants to know of a cache, line by line."""
    from featcache.wording import format_seconds

    extractor, origin = cache.extractor, cache.provenance
    look = extractor["preprocessing"]
    images = "prepared elsewhere, nobody knows how"
    if look:
        size = [look["crop"]] * 2 if isinstance(look["crop"], int) else look["crop"]
        images = f"resized to {spell_size(look['resize'])}, {spell_size(size)} cut out, {look['interpolation']}"
    made = f"in {format_seconds(origin['seconds'])} on {origin['device']} ({origin['runtime']})"
    made = f"elsewhere, imported from {origin['table']}" if is_imported(extractor["backbone"]) else made
    weights = extractor["weights"]
    n_bad = len(origin["bad"])
    views = [("views", f"{cache.views.describe()}; seed {cache.views.seed}")] if cache.views else []
    return [
        ("backbone", f"{extractor['backbone']}, weights {weights['name']} ({weights['tensors_sha256'][:8]}...)"),
        ("features", f"{cache.dim} {cache.stored}, {extractor['layer']}"),
        ("images", images),
        ("rows", ", ".join(f"{len(split):,} {name}" for name, split in cache.splits.items())),
        *views,
        *([("caches", _name_some(origin["caches"]))] if "caches" in origin else []),
        ("classes", _name_some(cache.classes)),
        ("data", origin["data"] + (f" (bad files left out: {n_bad})" if n_bad else "")),
        ("computed", made),
        ("extractor key", cache.key),
        ("content", cache.content_sha256),
    ]


def _name_some(names: Sequence[str], at_most: int = 6) -> str:
    """How many there are, and the first ones."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)}: {', '.join(names[:at_most])}{more}"


@command.command("verify", short_help="Is every byte what was written?")
@click.argument("files", type=click.Path(), nargs=-1)
@json_option
def verify(files: tuple[str, ...], as_json: bool) -> int:
    """Recompute every digest in FILES (default: features.h5); exit code 1 if a single byte that matters is not right.

    \b
    Example:
      featcache cache verify features.h5
    """
    from featcache.cache import verify_cache

    results = []
    for file in files or (FEATURES_FILE,):
        started = time.perf_counter()
        problems: list[str] = []
        rows = 0
        try:
            found = verify_cache(file)
            rows = found.rows
            problems = found.problems
        except CacheError as error:
            problems = [str(error)]
            print(make_printable(f"Error: {error}"), file=sys.stderr)
        else:
            took = f"{rows:,} rows, {format_bytes(found.bytes)} read in {time.perf_counter() - started:.1f} s"
            if problems and not as_json:
                click.echo(f"{file}: DAMAGED in {', '.join(problems)}; {took}")
            elif not as_json:
                click.echo(f"{file}: all right, {took}")
            if problems:
                print(
                    f"Error: {file} is damaged, some rows are not what was written; `{found.cure}` computes them again",
                    file=sys.stderr,
                )
        results.append({"cache": file, "ok": not problems, "rows": rows, "problems": problems})
    if as_json:
        print_json(results)
    return DONE if all(result["ok"] for result in results) else ERROR


@command.command("explain", short_help="Why would extract use a cache, or not?")
@click.argument("data", type=click.Path())
@output_option(FEATURES_FILE, "The cache file.")
@extract_options
@json_option
def explain(data: str, output: str, as_json: bool, **settings: Any) -> None:
    """Say, field by field, what `featcache extract` with the same arguments would use of the cache file, and why.

    \b
    Example:
      featcache cache explain photos --backbone resnet18 -o features.h5
    """
    from featcache.stages.explain import explain_cache

    explanation = explain_cache(data, output, progress=TerminalProgress(), **settings)
    plan = explanation.plan
    if as_json:
        print_json(
            {
                "cache": str(plan.output),
                "decision": plan.decision,
                "rows": len(plan.listing),
                "to_compute": len(plan.missing),
                "fields": [
                    {"name": field.name, "found": field.found, "wanted": field.wanted, "same": field.same}
                    for field in explanation.fields
                ],
                "images": explanation.images,
            }
        )
        return
    print_explanation(explanation)


def print_explanation(explanation: Explanation) -> None:
    """For a person."""
    from featcache.cache import shorten

    plan = explanation.plan
    width = max((len(field.name) for field in explanation.fields), default=0)
    for field in explanation.fields:
        value = shorten(field.found) + ("" if field.same else f" -> {shorten(field.wanted)}")
        click.echo(make_printable(f"  {'same   ' if field.same else 'DIFFERS'}  {field.name:<{width}}  {value}"))
    if explanation.images:
        click.echo("  images   " + ", ".join(f"{n:,} {name}" for name, n in explanation.images.items()))
    todo = f"{len(plan.missing):,} of {plan.n_rows:,} rows to compute"
    click.echo(
        {
            "create": f"create: {plan.output} is not there; {todo}",
            "reuse": f"reuse: {plan.output} has all {plan.n_rows:,} rows; nothing to compute",
            "extend": f"extend: {plan.output} was made by the same extractor; {todo}",
            "refuse": f"refuse: {plan.output} was made by another extractor; its rows are never mixed with others "
            f"(-o OTHER.h5, or --force to replace it)",
            "replace": f"replace: {todo}",
        }[plan.decision]
    )


@command.command("ls", short_help="Caches and leftovers, with their sizes.")
@click.argument("folder", type=click.Path(), default=".")
@json_option
def ls(folder: str, as_json: bool) -> None:
    """List the cache files under FOLDER and what unfinished extractions left there.

    \b
    Example:
      featcache cache ls
    """
    from featcache.cache import list_items

    items = list_items(locate(folder))
    if as_json:
        print_json([item_to_json(item) for item in items])
        return
    print_items(items)
    if not items:
        click.echo(f"no caches under {folder}")


@command.command("prune", short_help="Remove leftovers, or whole caches.")
@click.argument("paths", type=click.Path(), nargs=-1)
@option("--yes", is_flag=True, help="Do not ask.")
@option("--dry-run", is_flag=True, help="Only list what would be removed.")
@json_option
def prune(paths: tuple[str, ...], yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what unfinished extractions left under the folders PATHS (default: here).

    A cache file that is named itself is removed too, with its leftovers. What a running extraction uses stays.

    \b
    Example:
      featcache cache prune --dry-run
      featcache cache prune old.h5
    """
    from featcache.cache import remove_item

    named = choose_items(paths or (".",))
    items = [item for item, is_named in named if is_named or not item.held]
    total = format_bytes(sum(item.bytes for item in items))
    ask = bool(items) and not yes and not dry_run
    if ask and (as_json or not sys.stdin.isatty()):
        raise click.UsageError("nobody can be asked here: say --yes, or --dry-run to see what would be removed")
    if not as_json:
        print_items(items)
    if ask and not click.confirm(f"remove these {len(items)} ({total})?", err=True):
        click.echo("nothing was removed")
        return
    for item in [] if dry_run else items:
        remove_item(item)
    if as_json:
        print_json([item_to_json(item) for item in items])
    else:
        done = f"{'would remove' if dry_run else 'removed'} {len(items)}, {total}"
        click.echo(done if items else "nothing to remove")


def choose_items(paths: tuple[str, ...]) -> list[tuple[Item, bool]]:
    """What `prune` is about: leftovers in folders, and what was named itself (True) with its leftovers."""
    from featcache.cache import describe_item, list_items, list_near

    chosen: dict[Place, tuple[Item, bool]] = {}
    for path in map(locate, paths):
        if path.is_dir() and not path.name.endswith(".parts"):
            for item in list_items(path):
                if item.kind != "cache":
                    chosen.setdefault(item.path.resolve(), (item, False))
            continue
        alone = describe_item(path)
        near = [alone] if alone and alone.kind != "cache" else list_near(path)
        if not near:
            raise CacheError(f"{path} is neither a feature cache nor a leftover of one; nothing was removed")
        chosen |= {item.path.resolve(): (item, True) for item in near}
    return list(chosen.values())


def print_items(items: list[Item]) -> None:
    """A line for each."""
    width = max((len(str(item.path)) for item in items), default=0)
    for item in items:
        kind = "in use" if item.held and item.kind != "cache" else item.kind
        click.echo(make_printable(f"{format_bytes(item.bytes):>10}  {kind:<9}  {item.path!s:<{width}}  {item.about}"))


def item_to_json(item: Item) -> dict[str, Any]:
    """For a program."""
    return {
        "path": str(item.path),
        "kind": item.kind,
        "bytes": item.bytes,
        "held": item.held,
        "about": item.about,
    }
