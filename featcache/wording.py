"""Numbers as people read them: shares, seconds, large counts, p-values."""

from __future__ import annotations

import re

MINUS = "\N{MINUS SIGN}"
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
# Half of a surrogate pair, which no encoding can write; control characters, which HTML does not know; and the marks
# that turn the direction of all that follows.
UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def format_seconds(seconds: float) -> str:
    """Seconds as a person says them.

    >>> format_seconds(0.0123), format_seconds(5.26), format_seconds(3725)
    ('0.012 s', '5.3 s', '1 h 02 min')
    """
    if seconds < 1:
        return f"{seconds:.3f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def format_share(share: float, decimals: int = 1) -> str:
    """A share as per cent.

    >>> format_share(0.9542), format_share(1.0)
    ('95.4%', '100.0%')
    """
    return f"{share:.{decimals}%}"


def format_points(difference: float, *, unit: bool = True) -> str:
    """A difference of two shares, in percentage points, with its sign.

    >>> format_points(0.0065), format_points(-0.026, unit=False), format_points(0.0)
    ('+0.7 points', '−2.6', '0.0 points')
    """
    number = f"{abs(100 * difference):.1f}"
    sign = "" if float(number) == 0 else "+" if difference > 0 else MINUS
    return f"{sign}{number}{' points' if unit else ''}"


def format_count(n: int, noun: str, nouns: str | None = None) -> str:
    """A number with its noun, which has an s where there are several, unless it is said how else it ends.

    >>> format_count(1, "group"), format_count(2000, "group"), format_count(0, "class", "classes")
    ('1 group', '2,000 groups', '0 classes')
    """
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}"


def format_large(number: float, unit: str) -> str:
    """A large number with the prefix of its unit, three digits of it.

    >>> format_large(2.44e12, "FLOP"), format_large(812, "J"), format_large(0.25, "J")
    ('2.44 TFLOP', '812 J', '0.25 J')
    """
    prefix = 0
    while abs(number) >= 999.5 and prefix < len(PREFIXES) - 1:
        number, prefix = number / 1000, prefix + 1
    return f"{number:.3g} {PREFIXES[prefix]}{unit}"


def format_p_value(p_value: float) -> str:
    """A p-value with two digits that matter.

    >>> format_p_value(0.0312), format_p_value(1.0), format_p_value(1e-9)
    ('0.031', '1', '< 0.001')
    """
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def make_writable(text: str) -> str:
    r"""Text that any page or file can hold: what cannot be written, as its number; a byte of a file name as that byte.

    >>> make_writable("caf\udce9.jpg\x00")
    'caf\\xe9.jpg\\x00'
    """
    return UNWRITABLE.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # what os.fsdecode makes of a byte that is no text
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
