"""The colours of arms and classes, dark enough on white and light enough on black to be told from the page."""

from __future__ import annotations

from featcache.plots import COLOURS

LIGHT, DARK = "#ffffff", "#14171c"  # the page's surface in each scheme; page.css has the same
AT_LEAST = 3.0  # of marks and lines: WCAG 2.2, 1.4.11
SHAPES = ("circle", "square", "diamond", "triangle")


def list_colours(surface: str) -> list[str]:
    """Paul Tol's bright colours, each shifted as little as it takes to stand out from a surface."""
    return [adapt_colour(colour, surface) for colour in COLOURS]


def adapt_colour(colour: str, surface: str, at_least: float = AT_LEAST) -> str:
    """A colour mixed with black on a light surface, or with white on a dark one, until it stands out.

    >>> adapt_colour("#4477AA", "#ffffff"), adapt_colour("#CCBB44", "#ffffff")
    ('#4477aa', '#a39636')
    """
    towards = 0 if measure_luminance(surface) > 0.5 else 255
    channels = _channels(colour)
    for percent in range(101):
        mixed = [round(channel + (towards - channel) * percent / 100) for channel in channels]
        found = "#{:02x}{:02x}{:02x}".format(*mixed)
        if measure_contrast(found, surface) >= at_least:
            return found
    raise AssertionError


def measure_contrast(first: str, second: str) -> float:
    """Contrast of two colours, 1 to 21.

    Source: Web Content Accessibility Guidelines 2.2, "contrast ratio".

    >>> round(measure_contrast("#000000", "#ffffff"), 1)
    21.0
    """
    low, high = sorted((measure_luminance(first), measure_luminance(second)))
    return (high + 0.05) / (low + 0.05)


def measure_luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (as above)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
