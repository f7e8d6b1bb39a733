"""Content through a template into one document, within a size: 5 MB is what a mail takes and a phone opens at once."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from featcache.dataset import Root
from featcache.pages.colours import DARK, LIGHT, list_colours
from featcache.plots import cut_middle
from featcache.progress import format_bytes
from featcache.thumbnails import make_thumbnails
from featcache.wording import (
    format_count,
    format_large,
    format_p_value,
    format_points,
    format_seconds,
    format_share,
    make_writable,
)

MAX_BYTES = 4_800_000  # of a page, so that it stays below 5 MB whatever the mail adds
GALLERY_SIDE = 144  # pixels of thumbnails
NAME = 48  # characters of a name before its middle is cut

Content = dict[str, Any]


def fill_template(template: str, content: Mapping[str, Any]) -> str:
    """The document, in text that UTF-8 can encode, whatever the names of files and classes hold."""
    environment = _make_environment()
    assert environment.loader
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    text = environment.get_template(template).render(**content, style=style, script=script, script_digest=digest)
    return make_writable(text)


def take_thumbnails(root: Root, paths: Iterable[str], side: int, left: int) -> tuple[dict[str, str], int]:
    """Thumbnails until so many bytes are used up, and what is left of them; each counts as often as it is shown."""
    shown = list(paths)
    found: dict[str, str] = {}
    for path, uri in make_thumbnails(root, list(dict.fromkeys(shown)), side=side):
        if uri is not None:
            left -= len(uri) * shown.count(path)
            if left < 0:
                return found, 0
            found[path] = uri
    return found, left


@lru_cache(maxsize=1)
def _make_environment() -> Environment:
    """The templates; everything is escaped, whatever is missing is an error."""
    environment = Environment(
        loader=PackageLoader("featcache.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": format_share,
        "points": format_points,
        "seconds": format_seconds,
        "large": format_large,
        "p_value": format_p_value,
        "bytes": format_bytes,
        "short": lambda text, length=NAME: cut_middle(text, length),
        "few": shorten_count,
        "count": format_count,
        "date": format_date,
        "sentence": make_sentence,
    }
    environment.globals |= {"light": list_colours(LIGHT), "dark": list_colours(DARK)}
    return environment


def shorten_count(n: int) -> str:
    """A count in at most four characters.

    >>> shorten_count(153), shorten_count(1250), shorten_count(49_812)
    ('153', '1.2k', '50k')
    """
    return str(n) if n < 1000 else f"{n / 1000:.1f}k" if n < 9950 else f"{n / 1000:.0f}k"


def name_folder(folder: str) -> str:
    """What to call the data that lie in a folder: its last part.

    >>> name_folder("/data/photos"), name_folder("/")
    ('photos', '/')
    """
    return PurePosixPath(folder.replace("\\", "/")).name or folder


def format_date(text: str) -> str:
    """A time as a date for people; what is no time stays as it is.

    >>> format_date("2026-11-26T22:30:00Z")
    '26 November 2026'
    """
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y}"


def make_sentence(text: str) -> str:
    """A remark with a capital, unless it begins with a name, and a full stop.

    >>> make_sentence("no augmentation"), make_sentence("efficientnet_lite0 was trained")
    ('No augmentation.', 'efficientnet_lite0 was trained.')
    """
    first = text.split(maxsplit=1)[0].rstrip(",.:;") if text.strip() else ""
    is_word = first.removesuffix("'s").isalpha() and first not in ("sgd", "adamw")
    return (text[:1].upper() + text[1:] if is_word else text) + ("" if text.endswith((".", "!", "?")) else ".")
