"""Optional packages: imported when they are needed, or an error with the pip line that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from featcache.errors import MissingExtraError


def import_extra(package: str, *, extra: str, what: str) -> ModuleType:
    """Import a package of one of featcache's extras.

    Parameters
    ----------
    package
        Its dotted name.
    extra
        Installs it: `pip install 'featcache[EXTRA]'`.
    what
        Needs it, the subject of the error.

    Raises
    ------
    MissingExtraError
        If it is not installed.

    Examples
    --------
    >>> import_extra("nonesuch", extra="timm", what="backbones timm:NAME need")
    Traceback (most recent call last):
    featcache.errors.MissingExtraError: backbones timm:NAME need an optional package: pip install 'featcache[timm]'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f"{what} an optional package: pip install 'featcache[{extra}]'") from error


def is_installed(package: str) -> bool:
    """Whether a package could be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
