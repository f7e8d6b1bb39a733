"""What the commands share: option groups, the terminal's progress, JSON output."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import click
from tqdm import tqdm

from featcache.config import (
    CHANNELS,
    DECODERS,
    DEVICES,
    INTERPOLATIONS,
    LAYOUTS,
    MAX_VIEWS,
    POOLS,
    PRECISIONS,
    RUNTIMES,
    STORES,
    ExtractConfig,
)
from featcache.errors import BadImage, make_printable
from featcache.progress import Progress

T = TypeVar("T")
NOUNS = {"img": "images", "view": "images and views"}  # of the units that such a line is printed of
LINE_SECONDS = 60.0  # between two lines of progress in a log
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option that is also read from FEATCACHE_<COMMAND>_<OPTION>, and after it from FEATCACHE_<OPTION>."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value from the environment, the command's own variable first; an empty one is as good as none."""
        name = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        for prefix in (ctx.auto_envvar_prefix, "FEATCACHE"):
            if prefix and (value := os.environ.get(f"{prefix}_{name}")):
                return value
        return None


def option(*names: str, **attributes: Any) -> Decorator:
    """`click.option` for the class above, with its default shown."""
    attributes.setdefault("show_default", attributes.get("default") is not None)
    return click.option(*names, cls=Option, **attributes)


def combine(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, listed in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def complete_backbone(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of backbones for the shell."""
    from featcache.backbones import list_backbones

    return [name for name in list_backbones() if name.startswith(incomplete)]


def backbone_options(
    backbone: str | None = ExtractConfig.backbone, weights: str | None = ExtractConfig.weights
) -> Decorator:
    """`--backbone` and `--weights`."""
    return combine(
        option("--backbone", default=backbone, metavar="NAME", shell_complete=complete_backbone,
               help="Pretrained network, see `featcache backbones`; also timm:NAME, onnx:FILE, module:PACKAGE.FUNCTION "
               "(which runs your code)."),
        option("--weights", default=weights, metavar="WHICH",
               help="default, none (random), a name such as IMAGENET1K_V2, a PATH (.pth, .safetensors), or "
               "https://...#sha256=..."),
    )  # fmt: skip


class Size(click.ParamType[Any]):
    """Pixels: "224", or "224x160" for height and width."""

    name = "size"

    def __init__(self, square: bool) -> None:
        self.square = square

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(H, W), or one number for a shorter side."""
        if not isinstance(value, str):
            return value
        try:
            sides = tuple(int(side) for side in value.lower().split("x"))
        except ValueError:
            sides = ()
        if len(sides) not in (1, 2) or min(sides) < 1:
            self.fail(f"{value!r} is no size: expected pixels, such as 224, or HEIGHTxWIDTH", param, ctx)
        return sides if len(sides) == 2 else (sides * 2 if self.square else sides[0])


class Numbers(click.ParamType[Any]):
    """Numbers between commas: "0.485,0.456,0.406"."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of them."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers: expected such as 0.5 or 0.485,0.456,0.406", param, ctx)


class Duration(click.ParamType[Any]):
    """Seconds: "90", "90s", "10m", "1.5h"."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Seconds."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"([\d.]+)\s*([a-z]*)", value.strip().lower())
        if found is None or found[2] not in UNITS or found[1].count(".") > 1 or found[1] == ".":
            self.fail(f"{value!r} is no time: expected such as 90s, 10m or 1.5h", param, ctx)
        return float(found[1]) * UNITS[found[2]]


layer_options = combine(
    option("--layer", multiple=True, metavar="NAME[:POOL]",
           help="Take the features from this layer, see `featcache backbones NAME`; repeatable, side by side.  "
           "[default: what goes into the classifier]"),
    option("--pool", type=click.Choice(POOLS), default=None, help="How a layer's map or tokens become a vector."),
)  # fmt: skip

image_options = combine(
    option("--input-size", type=Size(square=True), default=None, metavar="PIXELS",
           help="What the network sees, or HEIGHTxWIDTH.  [default: the weights' own, as the next six]"),
    option("--resize", type=Size(square=False), default=None, metavar="PIXELS",
           help="Of the shorter side, before the middle is cut out; or HEIGHTxWIDTH, exactly."),
    option("--interpolation", type=click.Choice(INTERPOLATIONS), default=None, help="Of that resizing."),
    option("--channels", type=click.Choice(CHANNELS), default=None, help="Their order; L is grey."),
    option("--mean", type=Numbers(), default=None, metavar="NUMBERS", help="Per channel, or one for all."),
    option("--std", type=Numbers(), default=None, metavar="NUMBERS", help="Per channel, or one for all."),
    option("--scale", type=float, default=None, metavar="MAX", help="The largest pixel value, mostly 1 or 255."),
)  # fmt: skip


def split_options(
    fraction: float | None = ExtractConfig.val_fraction, seed: int | None = ExtractConfig.seed
) -> Decorator:
    """`--val-fraction` and `--seed`."""
    return combine(
        option("--val-fraction", type=float, default=fraction, metavar="SHARE",
               help="Share that validates, where DATA has no val folder."),
        option("--seed", type=click.IntRange(min=0), default=seed, help="Seed of everything random."),
    )  # fmt: skip


machine_options = combine(
    option("--workers", type=click.IntRange(min=0), default=None, metavar="N",
           help="Processes that decode images; for the fast runtimes on a CPU, threads that also run the network.  "
           "[default: from the cores]"),
    option("--device", default=ExtractConfig.device, metavar="DEVICE", help=f"Where to run: {DEVICES}."),
)  # fmt: skip


def store_option(default: str | None = ExtractConfig.store) -> Decorator:
    """`--store`."""
    return option("--store", type=click.Choice(STORES), default=default,
                  help="Precision in which features are kept; float16 halves the file.")  # fmt: skip


skip_bad_option = option(
    "--skip-bad", is_flag=True, help="Leave out files that cannot be used as images (exit code 3)."
)
force_option = option("--force", is_flag=True, help="Replace what was made there with other settings.")
json_option = option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout (see docs/json.md).")


def output_option(default: str | None, what: str) -> Decorator:
    """`-o/--output`."""
    return option("-o", "--output", default=default, type=click.Path(), metavar="PATH", help=what)


extract_options = combine(
    backbone_options(),
    layer_options,
    image_options,
    option("--layout", type=click.Choice(LAYOUTS), default=None, help="Of an ONNX network's input."),
    option("--batch-size", type=click.IntRange(min=1), default=None,
           help="Images per forward pass.  [default: 4 on a CPU, 64 on a GPU]"),
    machine_options,
    option("--runtime", type=click.Choice(RUNTIMES), default=ExtractConfig.runtime,
           help="eager is the bit-exact reference; the others are faster."),
    option("--precision", type=click.Choice(list(PRECISIONS)), default=None,
           help="In which the network computes; int8 is fast and coarse.  [default: fp16 on CUDA, else fp32]"),
    option("--decoder", type=click.Choice(DECODERS), default=None,
           help="What resizes; torch is faster, a grey level off.  [default: pillow for eager, else torch]"),
    split_options(),
    option("--views", type=click.IntRange(0, MAX_VIEWS), default=None, metavar="K",
           help="Keep K random views of each training image too: crops of random size, perhaps mirrored.  "
           "[default: those of the cache that is there, else 0]"),
    option("--test-views", type=click.IntRange(0, MAX_VIEWS), default=None, metavar="K",
           help="The same of each image of the other splits."),
    store_option(),
    skip_bad_option,
    option("--reuse", multiple=True, type=click.Path(), metavar="FILE",
           help="Take rows also from this cache; repeatable."),
    option("--rehash", is_flag=True,
           help="Trust neither file times nor the cache: read and check all images and rows."),
    option("--wait", is_flag=True, help="Wait for another extraction into the same file."),
    force_option,
)  # fmt: skip


class TerminalProgress(Progress):
    """Lines and bars on stderr; where it is no terminal a line every minute instead of bars.

    No bars for what takes less than two seconds.
    """

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print a line above whatever bar is running."""
        tqdm.write(make_printable(line), file=sys.stderr)

    def track(
        self, items: Iterable[T], *, total: int | None, what: str, unit: str = "img", done: int = 0
    ) -> Iterator[T]:
        """Pass `items` through a bar with rate, remaining time, and how many were there, were computed and are bad."""
        tally, next_line = Tally(what, done), time.monotonic() + LINE_SECONDS
        with tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            unit_scale=unit == "B",
            disable=not self.live,
            delay=2,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            for item in items:
                yield item
                bar.set_postfix_str(tally.add(item), refresh=False)
                bar.update(tally.last)
                if not self.live and unit in NOUNS and time.monotonic() > next_line:
                    next_line += LINE_SECONDS
                    self.say(tally.describe(total, NOUNS[unit]))


class Tally:
    """What has gone through a bar.

    Parameters
    ----------
    what
        Is being done.
    cached
        How many were there before.
    """

    def __init__(self, what: str, cached: int) -> None:
        self.what, self.cached, self.done, self.last = what, cached, 0, 0
        self._bad: set[str] = set()  # an image counts once, however many views of it cannot be had
        self._n_unusable = 0
        self._started, self._words = time.monotonic(), ""

    def add(self, item: object) -> str:
        """Count an item: a batch by its length. Gives the counts in words, where it says what was bad."""
        self.last = len(item) if isinstance(item, Sized) and not isinstance(item, str | tuple) else 1
        cached = getattr(item, "cached", 0)
        self.cached += cached
        self.done += self.last - cached
        bad = getattr(item, "bad", None)
        if bad is not None:
            self._bad.update(one.path if isinstance(one, BadImage) else one for one in bad)
            self._n_unusable += len(bad)
            good = "computed" if self.what == "extracting" else "good"
            counts = {"cached": self.cached, good: self.done - self._n_unusable, "bad": len(self._bad)}
            self._words = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)
        return self._words

    def describe(self, total: int | None, noun: str = "images") -> str:
        """A line for a log."""
        from featcache.wording import format_seconds

        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        n = self.cached + self.done
        counts = f" ({self._words})" if self._words else ""
        if total is None:
            return f"{self.what}: {n:,} {noun}{counts}, {rate:.0f} images/s"
        left = format_seconds((total - n) / rate)
        return f"{self.what}: {n:,} of {total:,} {noun}{counts}, {rate:.0f} images/s, {left} left"


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(value, indent=2))


def list_left_out(bad: Sequence[BadImage]) -> None:
    """Name the files that were left out, on stderr."""
    for path, reason in bad:
        click.echo(make_printable(f"left out: {path}: {reason}"), err=True)
