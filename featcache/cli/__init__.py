"""The command line: options -> ONE stage call -> stdout, stderr, exit code. The only room that prints and exits.

One module per command, loaded when it is called; the stage it calls is imported inside it, so that help needs no torch.

==========  =====================================================================
exit code   meaning
==========  =====================================================================
0           done
1           error: one line on stderr says what, where, and what cures it
2           usage: an option or argument that cannot be understood
3           done, with images left out; they are named on stderr. Of `audit --strict`: done, and there is leakage
130         interrupted with Ctrl-C
143         ended by SIGTERM; what was computed is kept, as after Ctrl-C
==========  =====================================================================
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from featcache.errors import BadImagesError, FeatcacheError, SettingsError, make_printable

COMMANDS = {
    "extract": "extract",
    "merge": "merge",
    "index": "index",
    "import": "import_features",
    "train-head": "train_head",
    "finetune": "finetune",
    "compare": "compare",
    "audit": "audit",
    "show": "show",
    "predict": "predict",
    "cache": "cache",
    "backbones": "backbones",
    "sample": "sample",
    "download": "download",
}

DONE, ERROR, USAGE, LEFT_OUT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: stop as after Ctrl-C."""


class LazyGroup(click.Group):
    """Commands in the order above, each loaded from its module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"featcache.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; where there is none, the nearest name is suggested."""
        import difflib

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": "FEATCACHE",
    },
    epilog="Every option can also be set in the environment: --batch-size as FEATCACHE_BATCH_SIZE, or for one command "
    "as FEATCACHE_EXTRACT_BATCH_SIZE. Exit codes: 0 done, 1 error, 2 usage, 3 done with images left out, 130 "
    "interrupted, 143 terminated.",
)
@click.version_option(package_name="featcache")
def featcache() -> None:
    """Frozen features in a cache, a linear head in milliseconds, and an honest comparison with fine-tuning.

    DATA is a folder DATA/train/CLASS/ and DATA/val/CLASS/, or just DATA/CLASS/, full of images; or a URL of one, tar
    shards, a list (.csv, .jsonl, .parquet), or hf:NAME.

    \b
    Example:
      featcache sample digits digits
      featcache extract digits
      featcache train-head features.h5
      featcache compare digits --epochs 3
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. The one place where errors become lines."""
    for stream in (sys.stdout, sys.stderr):  # a file name may hold bytes that are no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata: what matters is raised
    warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the plots' font lacks
    before = _raise_on_sigterm()
    try:
        result = featcache.main(args=arguments, prog_name="featcache", standalone_mode=False)
        code = result if isinstance(result, int) else DONE
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except FeatcacheError as error:
        lines = str(error).split("\n") if isinstance(error, BadImagesError) else [str(error)]
        if not error.told:
            print("Error: " + "\n".join(map(make_printable, lines)), file=sys.stderr)
        code = USAGE if isinstance(error, SettingsError) else ERROR
    except (KeyboardInterrupt, click.Abort) as error:
        terminated = isinstance(error.__cause__ or error, Terminated)  # click turns every KeyboardInterrupt into Abort
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        code = TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:  # `featcache predict ... | head` has read enough
        abandon_stdout()
        code = ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # anything else is a bug and shows itself
            raise
        print(f"Error: cannot write the output: {error.strerror}", file=sys.stderr)
        abandon_stdout()
        code = ERROR
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code


def _raise_on_sigterm() -> Any:
    """Let SIGTERM raise `Terminated`; give what it did before, None where this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    return signal.signal(signal.SIGTERM, stop)


def abandon_stdout() -> None:
    """Send what is still buffered nowhere, or Python would try to write it again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
