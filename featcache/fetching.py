"""Files from the net: resumed where they broke off, verified, and only then given their names. Knows nothing of them.

What has arrived lies in NAME.part, and NAME.part.json says of what it is a part: the address, the digest that is
expected, the server's ETag or date, the size. A part outlives its process, and the next one goes on from it. It is
locked while somebody writes it (the kernel's flock, which forgets a process when it dies); where there are no such
locks, every process has a part of its own, which does not outlive it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from http.client import responses
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from featcache import files
from featcache.errors import DownloadError, OutputError, make_printable
from featcache.progress import SILENT, Progress, format_bytes

TIMEOUT_SECONDS = 20.0  # to connect, and between two pieces
PAUSES_SECONDS = (0.0, 1.0, 2.0, 4.0)  # before every next try, counted from the last that brought something
LOCK_SECONDS = 0.2  # between two looks whether another process is done
PIECE_BYTES = 1 << 15
PASSING = {408, 429, 500, 502, 503, 504}  # answers that may be others in a moment


class GiveUpError(Exception):
    """No further try would help; the message is the reason."""


class TryAgainError(Exception):
    """A try failed, the next may not; the message is the reason."""


class UnreachableError(TryAgainError):
    """There was no connection at all: no network, no such host, nobody listening."""


def fetch_file(
    url: str, path: Path, *, sha256: str | None, part_path: Path | None = None, progress: Progress = SILENT
) -> Path:
    """Download a file unless it is there; go on where an earlier try broke off.

    Parameters
    ----------
    url
        Its address, http or https.
    path
        Where to; the file has this name only when it is whole and verified.
    sha256
        The SHA-256 that it must have, or its first digits, 8 or more. None takes whatever comes whole, in place of what
        is at `path`, and is for callers who verify the contents themselves.
    part_path
        Where the unfinished file is, on the same file system; beside `path` unless given.
    progress
        Told what is being done, and of every piece that arrives.

    Returns
    -------
    `path`.

    Raises
    ------
    DownloadError
        If it cannot be had, is not what was expected, or something else is at `path`.
    OutputError
        If it cannot be written.
    """
    check_url(url)
    digits = check_digits(sha256)
    shown = hide_credentials(url)
    part_path = part_path or path.with_name(path.name + ".part")
    try:
        if not is_there(path, digits):
            files.disk.make_folder(path.parent)
            with hold_part(part_path, progress) as part:
                if not is_there(path, digits):  # or another process has brought it meanwhile
                    fill_verified(part, url, digits, progress)
                    part.become(path)
    except GiveUpError as error:
        raise DownloadError(f"cannot download {shown} to {path}: {error}") from error
    except OSError as error:
        kept = f"; what has arrived is kept in {part_path}" if _size_of(part_path) else ""
        raise OutputError(f"cannot download {shown} to {path}: {error.strerror or error}{kept}") from error
    return path


def check_url(url: str) -> None:
    """Raise a DownloadError unless `url` is the address of something on the web."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return
    except ValueError as error:
        raise DownloadError(f"{make_printable(url)} is no address: {error}") from error
    if parts.scheme == "file":
        raise DownloadError(f"{url} is a file of this machine; give its path instead: {parts.path}")
    raise DownloadError(f"{make_printable(url)} cannot be downloaded: expected an address http://... or https://...")


def check_digits(sha256: str | None) -> str | None:
    """The digits of a SHA-256 in lower case.

    Raises
    ------
    DownloadError
        If they are none.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise DownloadError(f"{sha256!r} is no SHA-256: expected 64 hexadecimal digits, or the first 8 or more")
    return sha256.lower() if sha256 else None


def hide_credentials(url: str) -> str:
    """An address as it may be shown and kept.

    >>> hide_credentials("https://me:secret@example.org:8080/w.pth?v=1")
    'https://example.org:8080/w.pth?v=1'
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def is_there(path: Path, digits: str | None) -> bool:
    """Whether the file at `path` has the digest that begins with `digits`; without any, nothing can tell.

    Raises
    ------
    DownloadError
        If another file, or no file, has that name.
    """
    if path.exists() and not path.is_file():
        raise DownloadError(f"{path} is there and no file; move it away to download it")
    if digits is None or not path.exists():
        return False
    if not (found := files.hash_file(path)).startswith(digits):
        raise DownloadError(f"{path} has SHA-256 {_compare(found, digits)}; remove it to download it again")
    return True


# --- the part ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Of what a part is a part.

    Attributes
    ----------
    url
        The address, without credentials.
    sha256
        The digits that were expected.
    validator
        The server's ETag, or else the file's date.
    size
        Bytes in all, where the server says so.
    """

    url: str
    sha256: str | None
    validator: str | None = None
    size: int | None = None

    def can_tell(self) -> bool:
        """Whether it would show if pieces of two versions were put together."""
        return bool(self.sha256 or self.validator)


class Part:
    """An unfinished file: the bytes so far, and of what they are.

    Attributes
    ----------
    origin
        Of what; None as long as there are no bytes.
    mixed
        Whether the bytes came in more than one answer, so that they may not belong together.
    """

    def __init__(self, path: Path, descriptor: int, *, private: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.private = private
        self.size = os.fstat(descriptor).st_size
        self.origin: Origin | None = None
        self.mixed = False
        self.finished = False

    @property
    def note_path(self) -> Path:
        """Where its origin is written down."""
        return self.path.with_name(self.path.name + ".json")

    def recall(self, wanted: Origin) -> None:
        """Keep the bytes that an earlier process left if they are of what is wanted now, else begin anew."""
        old = _read_note(self.note_path)
        same = old is not None and (old.url, old.sha256) == (wanted.url, wanted.sha256)
        if old and same and old.can_tell():
            self.origin = old
        else:
            self.restart(None)
        self.mixed = self.size > 0

    def is_whole(self) -> bool:
        """Whether all bytes are there, as far as the server said how many."""
        return self.origin is not None and self.size == self.origin.size

    def append(self, piece: bytes) -> None:
        """Write the next bytes."""
        files.disk.write(self.descriptor, piece, self.size)
        self.size += len(piece)

    def restart(self, origin: Origin | None) -> None:
        """Forget all bytes; what follows is of `origin`."""
        files.disk.truncate(self.descriptor, 0)
        self.size, self.mixed = 0, False
        self.note(origin)

    def note(self, origin: Origin | None) -> None:
        """Write down of what it is."""
        self.origin = origin
        if origin is None:
            files.disk.remove(self.note_path)
        else:
            files.write_atomically(self.note_path, files.pretty_json(asdict(origin)))

    def become(self, path: Path) -> None:
        """Take the final name."""
        files.disk.sync(self.descriptor)
        if self.private:  # NOTE: Windows renames no open file; a shared part stays locked until it has its name
            self.close()
        files.disk.replace(self.path, path)
        self.finished = True
        files.disk.remove(self.note_path)
        files.disk.sync_folder(path.parent)

    def remove(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.note_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


@contextlib.contextmanager
def hold_part(path: Path, progress: Progress) -> Iterator[Part]:
    """Give the part at `path` while no other process writes it; afterwards it stays unless it is finished or empty."""
    part = _lock_part(path, progress) or _make_private_part(path)
    try:
        yield part
    finally:
        if not part.finished and (part.private or part.size == 0):
            part.remove()
        part.close()


def _lock_part(path: Path, progress: Progress) -> Part | None:
    """The part with its lock, however long another process has it; None where there are no locks."""
    waiting = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(descriptor)
        if locked and _has_name(descriptor, path):  # or it has become the file, or is gone
            return Part(path, descriptor, private=False)
        os.close(descriptor)
        if locked is None:
            return None
        if not locked and not waiting:
            progress.say(f"another process downloads {path.with_suffix('')}; waiting for it")
            waiting = True
        time.sleep(0 if locked else LOCK_SECONDS)


def _lock(descriptor: int) -> bool | None:
    """Lock a file, if nobody else has it locked; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and some network file systems
        return None
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _make_private_part(path: Path) -> Part:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()  # it was made to see whether it can be locked
    path = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part")
    return Part(path, files.disk.create(path), private=True)


def _read_note(path: Path) -> Origin | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        origin = Origin(**json.loads(path.read_text(encoding="utf-8")))
        if isinstance(origin.validator, str | None) and isinstance(origin.size, int | None):
            return origin
    return None


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


# --- the transfer -----------------------------------------------------------------------------------------------------


def fill_verified(part: Part, url: str, digits: str | None, progress: Progress) -> None:
    """Fetch what a part lacks and verify the whole; what came in pieces and is wrong, once more from the start.

    Raises
    ------
    GiveUpError
        If it cannot be had, or is not what was expected; then nothing is left of it.
    """
    wanted = Origin(url=hide_credentials(url), sha256=digits)
    part.recall(wanted)
    fill(part, url, wanted, progress)
    found = files.hash_file(part.path)
    if part.mixed and not found.startswith(digits or ""):
        progress.say(f"the pieces of {wanted.url} do not belong together; once more from the start")
        part.restart(None)
        fill(part, url, wanted, progress)
        found = files.hash_file(part.path)
    if digits and not found.startswith(digits):
        part.restart(None)
        raise GiveUpError(f"what arrives has SHA-256 {_compare(found, digits)}; nothing was kept")


def fill(part: Part, url: str, wanted: Origin, progress: Progress) -> None:
    """Fetch what a part lacks, in as many tries as bring something, and a few more.

    Raises
    ------
    GiveUpError
        If it cannot be had; what has arrived stays.
    """
    failures, farthest, reached = 0, part.size, False
    while not part.is_whole() and (error := attempt(part, url, wanted, progress)):
        failures = 1 if part.size > farthest else failures + 1
        farthest = max(farthest, part.size)
        reached |= not isinstance(error, UnreachableError)
        if not reached or failures > len(PAUSES_SECONDS):
            raise GiveUpError(f"{error}{_describe_rest(part)}") from error
        progress.say(f"{error}; trying again")
        time.sleep(PAUSES_SECONDS[failures - 1])


def attempt(part: Part, url: str, wanted: Origin, progress: Progress) -> TryAgainError | None:
    """Receive, and give the error if another try may help."""
    try:
        receive(part, url, wanted, progress)
    except TryAgainError as error:
        return error
    return None


def receive(part: Part, url: str, wanted: Origin, progress: Progress) -> None:
    """Ask once for what a part lacks, and append what comes.

    Raises
    ------
    TryAgainError, GiveUpError
        If not all of it came.
    """
    with ask(url, range_headers(part)) as answer:
        begin(part, answer, wanted)
        size = part.origin.size if part.origin else None
        progress.say(_describe_start(wanted.url, part.size, size))
        pieces = progress.track(read_pieces(answer), total=size, done=part.size, what="downloading", unit="B")
        for piece in pieces:
            part.append(piece)
    if size is not None and part.size > size:
        part.restart(None)
        raise TryAgainError("the server sends more than it announced")
    if size is not None and part.size < size:
        raise TryAgainError("the connection was closed early")


def range_headers(part: Part) -> dict[str, str]:
    """What to ask for: the rest of the same file, or else all of it. As it is, or positions would mean nothing."""
    headers = {"Accept-Encoding": "identity"}
    if part.size and part.origin and part.origin.can_tell():
        headers["Range"] = f"bytes={part.size}-"
        if part.origin.validator:
            headers["If-Range"] = part.origin.validator
    return headers


def check_reachable(url: str) -> None:
    """See that a server answers at all, whatever it says: for packages that would try for a minute.

    Raises
    ------
    DownloadError
        If it does not.
    """
    try:
        with ask(url, {}):
            pass
    except UnreachableError as error:
        raise DownloadError(f"{hide_credentials(url)} cannot be reached: {error}") from error
    except (TryAgainError, GiveUpError):  # it is there
        pass


@contextlib.contextmanager
def ask(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Give the server's answer, its body not yet read.

    Raises
    ------
    TryAgainError, GiveUpError
        If there is none.
    """
    import requests
    from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

    try:
        answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        reason = getattr(error.args[0], "reason", None) if error.args else None
        lost = isinstance(reason, NewConnectionError | ConnectTimeoutError)
        never = isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError)
        raise (UnreachableError if lost or never else TryAgainError)(_describe(error)) from error
    except (requests.RequestException, HTTPError, ValueError) as error:
        raise GiveUpError(_describe(error)) from error
    with answer:
        yield answer


def begin(part: Part, answer: Any, wanted: Origin) -> None:
    """Make a part ready for what the answer brings: its rest, or all of the file.

    Raises
    ------
    TryAgainError, GiveUpError
        If it brings neither.
    """
    status, length = answer.status_code, answer.headers.get("Content-Length", "")
    if status == 206 and part.origin and continues(part.size, part.origin, answer.headers):
        part.mixed = True
    elif status == 200:
        size = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        part.restart(replace(wanted, validator=find_validator(answer.headers), size=size))
    elif status in (206, 416) and part.size:
        part.restart(None)
        raise TryAgainError("the server has another file now")
    else:
        reason = f"the server answers {status} {responses.get(status, '')}".strip()
        raise (TryAgainError if status in PASSING else GiveUpError)(reason)


def continues(offset: int, origin: Origin, headers: Mapping[str, str]) -> bool:
    """Whether a partial answer goes on at `offset` bytes of the same file."""
    stated = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", headers.get("Content-Range", ""))
    if not stated or int(stated[1]) != offset:
        return False
    if origin.size is not None and stated[2] not in ("*", str(origin.size)):
        return False
    return find_validator(headers) in (None, origin.validator)


def find_validator(headers: Mapping[str, str]) -> str | None:
    """What tells one version of a file from another: a strong ETag, else the date."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def read_pieces(answer: Any) -> Iterator[bytes]:
    """The body as it was sent, piece by piece.

    Raises
    ------
    TryAgainError
        If the connection breaks. One that merely ends is not noticed here.
    """
    from urllib3.exceptions import HTTPError

    answer.raw.enforce_content_length = False  # NOTE: or urllib3 drops what came since the last whole piece
    try:
        yield from answer.raw.stream(PIECE_BYTES, decode_content=False)
    except (HTTPError, OSError) as error:
        raise TryAgainError(_describe(error)) from error


def _compare(found: str, digits: str) -> str:
    """Two digests for an error message."""
    n = min(len(digits), 12)
    return f"{found[:n]}..., expected {digits[:n]}..."


def _describe(error: BaseException) -> str:
    """The innermost cause in a few words."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return make_printable(str(text).splitlines()[0])


def _describe_start(url: str, there: int, size: int | None) -> str:
    whole = f" ({format_bytes(size)})" if size is not None else ""
    rest = f", of which {format_bytes(there)} are there" if there else ""
    return f"downloading {url}{whole}{rest}"


def _describe_rest(part: Part) -> str:
    if not part.size or part.private or not part.origin or not part.origin.can_tell():
        return ""
    whole = f" of {part.origin.size:,}" if part.origin.size is not None else ""
    return f"; {part.size:,}{whole} bytes are in {part.path}, and the same command goes on from there"
