"""`featcache backbones`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import DONE
from featcache.cli.common import Size, TerminalProgress, json_option, option, print_json

if TYPE_CHECKING:
    from featcache.backbones.catalogue import Summary

KINDS = ("classification", "trunk", "video")
HEADER = ("name", "width", "params", "GFLOPs", "input", "top-1", "licence", "weights")
NUMBERS = 6  # columns from the second on that stand to the right


@click.command("backbones", short_help="What there is to choose from, and its layers.")
@click.argument("names", nargs=-1, metavar="[NAME | PATTERN]...")
@option("--here", is_flag=True, help="Only those whose pretrained weights are on this machine.")
@option("--kind", type=click.Choice(KINDS), default=None, help="trunk: of a segmentation or detection model.")
@option("--max-params", type=float, default=None, metavar="MILLIONS", help="At most that many parameters.")
@option("--max-gflops", type=float, default=None, metavar="N", help="At most that many thousand million multiply-adds.")
@option("--all", "every", is_flag=True, help="List every layer of NAME, also those deep inside blocks.")
@option("--input-size", type=Size(square=True), default=None, metavar="PIXELS",
        help="Of the images that the layers of NAME are listed for.")  # fmt: skip
@json_option
def command(names: tuple[str, ...], as_json: bool, **filters: Any) -> int:
    """List the backbones, or the layers of one.

    A NAME alone lists its weights and layers; patterns with * and ? choose, those of timm begin with timm:. What is
    marked with * is on this machine. Widths, parameters and multiply-adds are measured, the first time.

    \b
    Example:
      featcache backbones 'resnet*' 'timm:convnext*'
      featcache backbones resnet18
    """
    if len(names) == 1 and not set(names[0]) & set("*?["):
        return print_layers(names[0], filters["input_size"], as_json, every=filters["every"])
    from featcache.backbones.catalogue import list_summaries

    summaries = [
        summary
        for summary in list_summaries(names, here=filters["here"], kind=filters["kind"], progress=TerminalProgress())
        if _is_within(summary, filters["max_params"], filters["max_gflops"])
    ]
    if as_json:
        print_json([to_json(summary) for summary in summaries])
        return DONE
    for line in align([HEADER, *map(list_cells, summaries)]):
        click.echo(line)
    click.echo(
        "\n* on this machine. GFLOPs: multiply-adds of one image, counted once.\n"
        "Also: timm:NAME (list with 'timm:*'), onnx:FILE, module:PACKAGE.FUNCTION."
    )
    return DONE


def _is_within(summary: Summary, max_params: float | None, max_gflops: float | None) -> bool:
    if max_params is None and max_gflops is None:
        return True
    if summary.cost is None:
        return False
    gflops = (summary.cost.operations or 0) / 1e9
    return (max_params is None or summary.cost.parameters <= max_params * 1e6) and (
        max_gflops is None or gflops <= max_gflops
    )


def list_cells(summary: Summary) -> tuple[str, ...]:
    """One row of the list."""
    cost, default = summary.cost, summary.weights[0] if summary.weights else None
    numbers = ("?",) * 4
    if cost:
        gflops = "?" if cost.operations is None else format_gflops(cost.operations)
        numbers = (str(cost.width), f"{cost.parameters / 1e6:.1f} M", gflops, "x".join(map(str, cost.input_shape[1:])))
    return (
        summary.name,
        *numbers,
        f"{default.top1:.1f}" if default and default.top1 else "-",
        shorten_licence(default.licence) if default else "-",
        ", ".join(entry.name + ("*" if entry.is_here else "") for entry in summary.weights) or "none",
    )


def format_gflops(operations: int) -> str:
    """Three digits of thousand millions.

    >>> format_gflops(1_814_073_344), format_gflops(1_016_716_764_160)
    ('1.81', '1,017')
    """
    gflops = operations / 1e9
    return f"{gflops:.3g}" if gflops < 100 else f"{gflops:,.0f}"


def shorten_licence(text: str) -> str:
    """A licence in a column: an address by its repository."""
    return "/".join(text.split("/")[3:5]) if text.startswith("https://github.com/") else text


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of a table: numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if 0 < i < NUMBERS else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def to_json(summary: Summary) -> dict[str, Any]:
    """A backbone as plain values; see docs/json.md."""
    from dataclasses import asdict

    cost = asdict(summary.cost) if summary.cost else None
    return {
        "name": summary.name,
        "kind": summary.kind,
        "width": cost and cost["width"],
        "parameters": cost and cost["parameters"],
        "multiply_adds": cost and cost["operations"],
        "input_shape": cost and list(cost["input_shape"]),
        "weights": [
            {"name": entry.name, "licence": entry.licence, "is_here": entry.is_here, "top1": entry.top1}
            for entry in summary.weights
        ],
    }


def is_outer(name: str, layers: Collection[str]) -> bool:
    """Whether a layer is a block, or in no block inside another.

    >>> [is_outer(name, ["features.0", "a.b.c", "a.b"]) for name in ("features.0", "a.b.c", "a.b")]
    [True, False, True]
    """
    depth = name.count(".")
    return depth < 2 or (depth < 3 and any(other.startswith(f"{name}.") for other in layers))


def print_layers(name: str, input_size: tuple[int, int] | None, as_json: bool, *, every: bool) -> int:
    """`featcache backbones NAME`."""
    from featcache.backbones.catalogue import describe_layers, list_weights

    layers, weights = describe_layers(name, input_size), list_weights(name)
    if as_json:
        entries = [
            {"name": entry.name, "licence": entry.licence, "is_here": entry.is_here, "top1": entry.top1}
            for entry in weights
        ]
        print_json({"name": name, "weights": entries, "layers": {key: list(shape) for key, shape in layers.items()}})
        return DONE
    for entry in weights:
        here = "on this machine" if entry.is_here else "not on this machine"
        top1 = f", top-1 {entry.top1:.1f} %" if entry.top1 else ""
        click.echo(f"weights {entry.name}: {here}, licence {entry.licence}{top1}")
    shown = {key: shape for key, shape in layers.items() if every or is_outer(key, layers)}
    hidden = f" of {len(layers)} (--all lists them)" if len(shown) < len(layers) else ""
    click.echo(f"{len(shown)} layers{hidden}, in the order of their running; numbers per image:")
    width = max(map(len, shown), default=0)
    for key, shape in shown.items():
        click.echo(f"  {key:<{width}}  {' x '.join(map(str, shape))}")
    click.echo("\nUse one with --layer NAME, or NAME:avg, NAME:max, NAME:flatten, NAME:cls if it is not a vector.")
    return DONE
