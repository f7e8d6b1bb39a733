"""`featcache index`."""

from __future__ import annotations

import click

from featcache.cli.common import TerminalProgress, json_option, print_json
from featcache.errors import make_printable
from featcache.progress import format_bytes


@click.command("index", short_help="Several caches that read as one.")
@click.argument("output", type=click.Path())
@click.argument("caches", type=click.Path(), nargs=-1, required=True, metavar="CACHE...")
@json_option
def command(output: str, caches: tuple[str, ...], as_json: bool) -> None:
    """Write OUTPUT, a small .json file that names the CACHEs and reads as one cache of all their rows, in this order.

    They are of one extractor and the same classes, and stay where they are. Whatever takes a cache takes OUTPUT, but
    nothing is extracted into it. See docs/cache.md.

    \b
    Example:
      featcache index photos.json photos-1.h5 photos-2.h5
      featcache train-head photos.json --solver sgd
    """
    from featcache.cache import index_caches, list_members
    from featcache.storage import locate

    cache = index_caches(output, caches, progress=TerminalProgress())
    rows = {name: len(split) for name, split in cache.splits.items()}
    size = sum(path.stat().st_size for path in list_members(locate(output)))
    if as_json:
        print_json(
            {
                "index": output,
                "caches": cache.provenance["caches"],
                "bytes": size,
                "rows": len(cache),
                "splits": rows,
                "classes": list(cache.classes),
                "dim": cache.dim,
                "extractor_key": cache.key,
                "content_sha256": cache.content_sha256,
            }
        )
        return
    counts, n = " + ".join(f"{rows:,} {name}" for name, rows in rows.items()), len(caches)
    what = f"{counts} rows of {cache.dim} {cache.stored} features of {cache.extractor['backbone']}"
    click.echo(make_printable(f"{output}: {what} in {n} cache{'s' * (n != 1)}, {format_bytes(size)}"))
