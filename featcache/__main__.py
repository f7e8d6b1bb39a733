"""The program: ``featcache`` and ``python -m featcache``."""

from __future__ import annotations

import os
import sys

from featcache.cli import INTERRUPTED, TERMINATED, run


def main() -> None:
    """Run the command line and exit with its code."""
    code = run()
    if code in (
        INTERRUPTED,
        TERMINATED,
    ):  # NOTE: threads may still be inside a forward pass; an orderly exit would race with them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
