"""featcache.fetching against a server that does everything wrong: whole and verified, or an error and no file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import fetching, files
from featcache.errors import DownloadError, OutputError
from featcache.fetching import fetch_file
from featcache.files import hash_bytes
from featcache.progress import Progress

CONTENT = np.random.default_rng(0).bytes(200_000)
OTHER = np.random.default_rng(1).bytes(200_000)
DIGEST = hash_bytes(CONTENT)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the server answers one request."""

    status: int = 200
    content: bytes = CONTENT
    sent: int | None = None  # bytes of the body after which it stops; None is all
    reset: bool = False  # and then it resets the connection
    stall: float = 0.0  # seconds that it waits before the body's second half
    ranges: bool = True  # whether it knows Range
    if_range: bool = True  # whether it knows If-Range
    etag: str | None = '"one"'
    date: str | None = None
    chunked: bool = False
    length: bool = True
    headers: dict[str, str] = field(default_factory=dict)


GOOD = Answer()


class Server:
    """Answers as told, one after the other, then well; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.default = GOOD
        self.asked: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.asked.append({"path": self.path, **{name: self.headers[name] for name in self.headers}})
                answer = server.answers.pop(0) if server.answers else server.default
                with contextlib.suppress(ConnectionError):
                    send(self, answer)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/w.pth"

    @property
    def ranges(self) -> list[str | None]:
        """The Range of every request."""
        return [headers.get("Range") for headers in self.asked]

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Answer one request."""
    handler.close_connection = True
    validator = answer.etag or answer.date
    wanted = handler.headers.get("Range") if answer.ranges and answer.status == 200 else None
    if answer.if_range and handler.headers.get("If-Range") not in (None, validator):
        wanted = None
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
    if wanted and start >= len(answer.content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(answer.content)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    body = answer.content[start:]
    handler.send_response(206 if wanted else answer.status)
    handler.send_header("Connection", "close")
    if wanted:
        handler.send_header("Content-Range", f"bytes {start}-{len(answer.content) - 1}/{len(answer.content)}")
    for name, value in {"ETag": answer.etag, "Last-Modified": answer.date, **answer.headers}.items():
        if value:
            handler.send_header(name, value)
    if answer.chunked:
        handler.send_header("Transfer-Encoding", "chunked")
    elif answer.length:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    sent = body[: answer.sent]
    if answer.chunked:
        sent = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (sent[i : i + 5000] for i in range(0, len(sent), 5000)))
        sent += b"" if answer.sent is not None else b"0\r\n\r\n"
    half = len(sent) // 2 if answer.stall else len(sent)
    handler.wfile.write(sent[:half])
    handler.wfile.flush()
    time.sleep(answer.stall)
    handler.wfile.write(sent[half:])
    if answer.reset:
        time.sleep(0.02)  # NOTE: a reset overtakes what was sent before
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()


class Ear(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tracked: list[tuple[int, int | None, str]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def track(
        self, items: Iterable[Any], *, total: int | None, what: str, unit: str = "img", done: int = 0
    ) -> Iterator[Any]:
        self.tracked.append((done, total, unit))
        yield from items


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (0.0,) * 4)
    monkeypatch.setattr(fetching, "PIECE_BYTES", 1 << 10)
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "w.pth"


def names(path: Path) -> list[str]:
    """What is in the folder of `path`."""
    return sorted(other.name for other in path.parent.iterdir()) if path.parent.exists() else []


def is_whole_and_alone(path: Path) -> bool:
    return path.read_bytes() == CONTENT and names(path) == [path.name]


def break_off(server: Server, path: Path, at: int = 70_000, **how: Any) -> None:
    """Leave `at` bytes of a part behind, as a process does that is stopped."""
    server.answers = [Answer(sent=at, **how)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "PAUSES_SECONDS", ())
        with pytest.raises(DownloadError):
            fetch_file(server.url, path, sha256=DIGEST)
    server.asked.clear()


# --- the way it should be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [DIGEST, DIGEST.upper(), DIGEST[:8], None], ids=["all", "upper", "eight", "none"])
def test_a_file_is_fetched_whole_and_alone(server: Server, path: Path, digits: str | None) -> None:
    assert fetch_file(server.url, path, sha256=digits) == path
    assert is_whole_and_alone(path)


def test_a_file_that_is_there_needs_no_network(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch_file("http://127.0.0.1:9/w.pth", path, sha256=DIGEST) == path
    assert is_whole_and_alone(path)


def test_another_file_of_that_name_is_named_and_left_alone(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(OTHER)
    with pytest.raises(
        DownloadError, match=rf"{path} has SHA-256 {hash_bytes(OTHER)[:12]}\.\.\., expected .* remove it"
    ):
        fetch_file(server.url, path, sha256=DIGEST)
    assert path.read_bytes() == OTHER
    assert server.asked == []


def test_without_a_digest_what_is_there_is_replaced(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(OTHER)
    fetch_file(server.url, path, sha256=None)
    assert is_whole_and_alone(path)


def test_a_folder_of_that_name_is_an_error(server: Server, path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(DownloadError, match="is there and no file"):
        fetch_file(server.url, path, sha256=DIGEST)


def test_an_empty_file_is_a_file(server: Server, path: Path) -> None:
    server.default = Answer(content=b"")
    fetch_file(server.url, path, sha256=hash_bytes(b""))
    assert names(path) == ["w.pth"]


@pytest.mark.parametrize("answer", [Answer(chunked=True), Answer(length=False)], ids=["chunked", "until it is closed"])
def test_a_server_that_does_not_say_how_much_is_believed_the_digest(server: Server, path: Path, answer: Answer) -> None:
    server.default = answer
    ear = Ear()
    fetch_file(server.url, path, sha256=DIGEST, progress=ear)
    assert is_whole_and_alone(path)
    assert ear.tracked == [(0, None, "B")]


def test_a_redirect_is_followed_and_the_rest_asked_for_along_it(server: Server, path: Path) -> None:
    there = Answer(status=302, content=b"", headers={"Location": "/there"})
    server.answers = [there, Answer(sent=1000), there]
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert [headers["path"] for headers in server.asked] == ["/w.pth", "/there"] * 2
    assert server.ranges == [None, None, "bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/w.pth"])
def test_a_redirect_to_nowhere_good_is_one_line(server: Server, path: Path, location: str) -> None:
    server.default = Answer(status=302, content=b"", headers={"Location": location})
    with pytest.raises(DownloadError) as caught:
        fetch_file(server.url, path, sha256=DIGEST)
    assert "\n" not in str(caught.value)
    assert names(path) == []


def test_a_listener_hears_the_size_and_every_byte(server: Server, path: Path) -> None:
    ear = Ear()
    break_off(server, path)
    fetch_file(server.url, path, sha256=DIGEST, progress=ear)
    assert ear.lines == [f"downloading {server.url} (200.0 kB), of which 70.0 kB are there"]
    assert ear.tracked == [(70_000, 200_000, "B")]


def test_nothing_is_said_on_stdout_or_stderr_unasked(
    server: Server, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.answers = [Answer(sent=5)]
    fetch_file(server.url, path, sha256=DIGEST)
    assert tuple(capfd.readouterr()) == ("", "")


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        Answer(sent=70_000),
        Answer(sent=70_000, reset=True),
        Answer(sent=70_000, chunked=True),
        Answer(sent=140_000, stall=1.0),
    ],
    ids=["closed", "reset", "chunked", "stalled"],
)
def test_a_broken_connection_is_taken_up_where_it_broke(
    server: Server, path: Path, broken: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.3)
    server.answers = [broken]
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert len(server.asked) == 2
    assert 60_000 < int(server.asked[1]["Range"].removeprefix("bytes=").removesuffix("-")) <= 70_000
    assert server.asked[1]["If-Range"] == '"one"'


def test_the_next_process_goes_on_where_the_last_one_stopped(server: Server, path: Path) -> None:
    break_off(server, path)
    assert names(path) == ["w.pth.part", "w.pth.part.json"]
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == ["bytes=70000-"]


def test_what_was_whole_but_not_yet_named_needs_no_network(server: Server, path: Path) -> None:
    break_off(server, path)
    (path.parent / "w.pth.part").write_bytes(CONTENT)
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.asked == []


def test_a_server_without_ranges_sends_it_all_again(server: Server, path: Path) -> None:
    server.default = Answer(ranges=False)
    server.answers = [Answer(sent=70_000, ranges=False)]
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)


@pytest.mark.parametrize("if_range", [True, False], ids=["knows If-Range", "knows it not"])
def test_a_file_that_changed_on_the_server_is_fetched_from_the_start(
    server: Server, path: Path, if_range: bool
) -> None:
    break_off(server, path, content=OTHER, etag='"old"')
    server.default = Answer(if_range=if_range)
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == (["bytes=70000-"] if if_range else ["bytes=70000-", None])


def test_a_file_that_changed_unnoticed_is_fetched_once_more_from_the_start(server: Server, path: Path) -> None:
    break_off(server, path, content=OTHER)  # of the same size and the same ETag
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == ["bytes=70000-", None]


def test_a_part_larger_than_the_file_is_fetched_from_the_start(server: Server, path: Path) -> None:
    break_off(server, path)
    (path.parent / "w.pth.part").write_bytes(CONTENT + b"more")
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == ["bytes=200004-", None]  # the first is answered with 416


@pytest.mark.parametrize("change", ["url", "sha256", "no note", "no json", "no types"])
def test_a_part_of_something_else_is_not_gone_on_with(server: Server, path: Path, change: str) -> None:
    break_off(server, path)
    note = path.parent / "w.pth.part.json"
    origin = json.loads(note.read_text())
    contents = {"url": {"url": "http://x/y"}, "sha256": {"sha256": DIGEST[:8]}, "no types": {"validator": [1]}}
    note.write_text(json.dumps({**origin, **contents.get(change, {})}) if change != "no json" else "{")
    if change == "no note":
        note.unlink()
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == [None]


@pytest.mark.parametrize(
    ("etag", "date", "sent"),
    [(None, "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 GMT"), ('W/"weak"', None, None)],
    ids=["date", "weak"],
)
def test_a_date_stands_in_for_a_strong_etag(
    server: Server, path: Path, etag: str | None, date: str | None, sent: str | None
) -> None:
    break_off(server, path, etag=etag, date=date)
    server.default = Answer(etag=etag, date=date)
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert [(headers["Range"], headers.get("If-Range")) for headers in server.asked] == [("bytes=70000-", sent)]


def test_without_digest_and_etag_nothing_is_pieced_together(server: Server, path: Path) -> None:
    server.default = Answer(etag=None, sent=70_000)
    with pytest.raises(DownloadError):
        fetch_file(server.url, path, sha256=None)
    server.default = Answer(etag=None)
    server.asked.clear()
    fetch_file(server.url, path, sha256=None)
    assert is_whole_and_alone(path)
    assert server.ranges == [None]


@pytest.mark.parametrize("stated", ["bytes 5-199999/200000", "bytes 70000-199999/300000", "bytes", "items 1-2/3"])
def test_a_partial_answer_that_does_not_go_on_there_is_not_used(server: Server, path: Path, stated: str) -> None:
    break_off(server, path)
    server.answers = [Answer(status=206, ranges=False, headers={"Content-Range": stated})]
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == ["bytes=70000-", None]


@given(
    cuts=st.lists(
        st.builds(
            Answer,
            sent=st.integers(0, 2100),
            content=st.sampled_from([CONTENT[:2000], OTHER[:2000], CONTENT[:1000]]),
            ranges=st.booleans(),
            if_range=st.booleans(),
            etag=st.sampled_from(['"one"', '"two"', None]),
            chunked=st.booleans(),
            length=st.booleans(),
            status=st.sampled_from([200, 200, 200, 503]),
        ),
        max_size=8,
    ),
    calls=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_server_does_the_file_is_right_or_not_there(cuts: list[Answer], calls: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        patch.setattr(fetching, "PAUSES_SECONDS", (0.0,) * 2)
        server, path = Server(), Path(folder) / "w.pth"
        server.answers, server.default = list(cuts), Answer(content=CONTENT[:2000])
        for _ in range(calls):
            with contextlib.suppress(DownloadError):
                fetch_file(server.url, path, sha256=hash_bytes(CONTENT[:2000]))
            assert not path.exists() or path.read_bytes() == CONTENT[:2000]
        server.answers = []
        fetch_file(server.url, path, sha256=hash_bytes(CONTENT[:2000]))
        assert path.read_bytes() == CONTENT[:2000]
        assert names(path) == ["w.pth"]
        server.stop()


# --- giving up --------------------------------------------------------------------------------------------------------


def test_a_connection_that_always_breaks_says_how_much_is_there(server: Server, path: Path) -> None:
    server.answers = [Answer(sent=70_000), *[Answer(sent=0)] * 9]
    with pytest.raises(DownloadError) as caught:
        fetch_file(server.url, path, sha256=DIGEST)
    part = path.parent / "w.pth.part"
    assert str(caught.value) == (
        f"cannot download {server.url} to {path}: the connection was closed early; 70,000 of 200,000 bytes are in "
        f"{part}, and the same command goes on from there"
    )
    assert len(server.asked) == 5
    assert part.read_bytes() == CONTENT[:70_000]


def test_as_long_as_every_try_brings_something_it_goes_on(server: Server, path: Path) -> None:
    server.default = Answer(sent=9_000)
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert len(server.asked) == 23


@pytest.mark.parametrize(
    ("status", "name"), [(404, "Not Found"), (403, "Forbidden"), (410, "Gone"), (204, "No Content")]
)
def test_an_answer_that_will_stay_is_not_asked_for_again(server: Server, path: Path, status: int, name: str) -> None:
    server.default = Answer(status=status, content=b"")
    with pytest.raises(DownloadError, match=f"the server answers {status} {name}$"):
        fetch_file(server.url, path, sha256=DIGEST)
    assert len(server.asked) == 1
    assert names(path) == []


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_an_answer_that_may_pass_is_asked_for_again(server: Server, path: Path, status: int) -> None:
    server.answers = [Answer(status=status, content=b"busy")] * 2
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)


def test_a_server_that_stays_broken_is_given_up(server: Server, path: Path) -> None:
    server.default = Answer(status=500, content=b"")
    with pytest.raises(DownloadError, match=r"the server answers 500 Internal Server Error$"):
        fetch_file(server.url, path, sha256=DIGEST)
    assert len(server.asked) == 5
    assert names(path) == []


def test_an_error_leaves_an_earlier_part_alone(server: Server, path: Path) -> None:
    break_off(server, path)
    server.answers = [Answer(status=404, content=b"")]
    with pytest.raises(DownloadError, match="404"):
        fetch_file(server.url, path, sha256=DIGEST)
    fetch_file(server.url, path, sha256=DIGEST)
    assert server.ranges == ["bytes=70000-"] * 2


@pytest.mark.parametrize("answer", [Answer(content=OTHER), Answer(content=CONTENT[:-1]), Answer(content=b"<html>")])
def test_other_contents_are_refused_and_nothing_is_kept(server: Server, path: Path, answer: Answer) -> None:
    server.default = answer
    with pytest.raises(DownloadError) as caught:
        fetch_file(server.url, path, sha256=DIGEST)
    digests = f"{hash_bytes(answer.content)[:12]}..., expected {DIGEST[:12]}..."
    assert str(caught.value).endswith(f"what arrives has SHA-256 {digests}; nothing was kept")
    assert names(path) == []
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/w.pth"
    started = time.monotonic()
    with pytest.raises(DownloadError, match=f"cannot download {url} to {path}: Connection refused$"):
        fetch_file(url, path, sha256=DIGEST)
    assert time.monotonic() - started < 1
    assert names(path) == []


def test_a_host_without_address_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(DownloadError, match=r"Name or service not known$"):
        fetch_file("http://nowhere.invalid/w.pth", path, sha256=DIGEST)


def test_a_server_that_says_nothing_is_given_up(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(fetching, "PAUSES_SECONDS", (0.0,))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth"
        with pytest.raises(DownloadError, match=r"timed out$"):
            fetch_file(url, path, sha256=DIGEST)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///data/w.pth", "give its path instead: /data/w.pth"),
        ("ftp://example.org/w.pth", "expected an address http"),
        ("w.pth", "expected an address http"),
        ("http://", "expected an address http"),
        ("http://[::1/w.pth", "is no address"),
        ("http://exa mple.org/", "cannot download"),
        ("http://.example.org/", "cannot download"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(url: str, message: str, path: Path) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        fetch_file(url, path, sha256=DIGEST)
    assert "\n" not in str(caught.value)
    assert names(path) == []


@pytest.mark.parametrize("digits", ["", "0123", "xyz45678", DIGEST + "0"])
def test_what_is_no_digest_is_refused(digits: str, path: Path) -> None:
    with pytest.raises(DownloadError, match="is no SHA-256"):
        fetch_file("http://127.0.0.1:9/", path, sha256=digits)


def test_a_password_is_sent_but_neither_shown_nor_kept(server: Server, path: Path) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    server.answers = [Answer(sent=70_000), *[Answer(sent=0)] * 9]
    ear = Ear()
    with pytest.raises(DownloadError) as caught:
        fetch_file(url, path, sha256=DIGEST, progress=ear)
    assert server.asked[0]["Authorization"].startswith("Basic ")
    assert "secret" not in f"{caught.value} {ear.lines} {(path.parent / 'w.pth.part.json').read_text()}"


# --- this machine -----------------------------------------------------------------------------------------------------


class FullDisk(files.Disk):
    """A disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        if len(data) > self.room:
            super().write(descriptor, data[: self.room], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        super().write(descriptor, data, offset)


def test_a_full_disk_is_one_line_and_the_next_call_goes_on(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "disk", FullDisk(50_000))
        with pytest.raises(OutputError) as caught:
            fetch_file(server.url, path, sha256=DIGEST)
    part = path.parent / "w.pth.part"
    message = f"cannot download {server.url} to {path}: No space left on device; what has arrived is kept in {part}"
    assert str(caught.value) == message
    kept = part.stat().st_size
    assert kept > 40_000
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == [None, f"bytes={kept}-"]


def test_a_disk_without_any_room_is_one_line(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "disk", FullDisk(0))
    with pytest.raises(OutputError, match="No space left on device") as caught:
        fetch_file(server.url, path, sha256=DIGEST)
    assert "\n" not in str(caught.value)
    assert names(path) == []


def test_a_folder_that_cannot_be_made_is_one_line(server: Server, path: Path) -> None:
    path.parent.write_text("a file where the folder should be")
    with pytest.raises(OutputError, match=f"cannot download {server.url} to {path}: "):
        fetch_file(server.url, path, sha256=DIGEST)


def test_many_at_once_fetch_one_whole_file_once(server: Server, path: Path) -> None:
    server.default = Answer(stall=0.3)
    with ThreadPoolExecutor(6) as pool:
        fetched = [pool.submit(fetch_file, server.url, path, sha256=DIGEST) for _ in range(6)]
    assert [future.result() for future in fetched] == [path] * 6
    assert is_whole_and_alone(path)
    assert len(server.asked) == 1


def test_who_waits_says_so_and_takes_over_from_one_that_failed(server: Server, path: Path) -> None:
    server.answers = [Answer(sent=140_000, stall=0.5), *[Answer(status=404)]]
    ear = Ear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch_file, server.url, path, sha256=DIGEST)
        while not server.asked:
            time.sleep(0.01)
        time.sleep(0.1)
        fetch_file(server.url, path, sha256=DIGEST, progress=ear)
        with pytest.raises(DownloadError, match="404"):
            first.result()
    assert ear.lines[0] == f"another process downloads {path}; waiting for it"
    assert is_whole_and_alone(path)
    assert server.ranges[2] == "bytes=140000-"


@pytest.mark.parametrize("at_once", [1, 4])
def test_where_there_are_no_locks_each_has_a_part_of_its_own(
    server: Server, path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_lock", lambda descriptor: None)
    server.default = Answer(stall=0.1)
    with ThreadPoolExecutor(at_once) as pool:
        fetched = [pool.submit(fetch_file, server.url, path, sha256=DIGEST) for _ in range(at_once)]
    assert [future.result() for future in fetched] == [path] * at_once
    assert is_whole_and_alone(path)


PROGRAM = """
import sys
from pathlib import Path
from featcache.fetching import fetch_file
print("ready", flush=True)
fetch_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])
"""


@pytest.fixture
def start(server: Server, path: Path) -> Callable[[], subprocess.Popen[str]]:
    """Start a process that downloads, and wait until half of the file is there."""

    def start() -> subprocess.Popen[str]:
        server.default = Answer(stall=5)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server.url, str(path), DIGEST],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        part = path.parent / "w.pth.part"
        for _ in range(1000):
            if part.exists() and part.stat().st_size >= 90_000:
                break
            time.sleep(0.01)
        server.default = GOOD
        server.asked.clear()
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_process_that_is_stopped_leaves_what_it_has(
    server: Server, path: Path, start: Callable[[], subprocess.Popen[str]], number: int
) -> None:
    process = start()
    process.send_signal(number)
    process.communicate()
    assert names(path) == ["w.pth.part", "w.pth.part.json"]
    kept = (path.parent / "w.pth.part").stat().st_size
    fetch_file(server.url, path, sha256=DIGEST)
    assert is_whole_and_alone(path)
    assert server.ranges == [f"bytes={kept}-"]


def test_a_waiting_process_takes_over_from_one_that_is_killed(
    server: Server, path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    process = start()
    threading.Timer(0.3, process.kill).start()
    fetch_file(server.url, path, sha256=DIGEST)
    process.communicate()
    assert is_whole_and_alone(path)
    assert len(server.asked) == 1
