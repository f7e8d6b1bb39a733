"""featcache.decoding: what might crash or hang does so alone."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyFamily, draw_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import featcache
from featcache import decoding
from featcache.decoding import decode_apart, decode_array, decode_image, decode_safely
from featcache.errors import BadImagesError, ImageError

pytestmark = pytest.mark.skipif(not decoding.CAN_DECODE_APART, reason="decodes in this process here")

# A helper whose decoder dies, hangs or eats memory on files that say so behind their end.
STUB = """
import os, signal, time
import featcache.decoding as decoding
decode = decoding.decode_image
def decode_image(data):
    if data.endswith(b"CRASH"): os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"HANG"): time.sleep(600)
    if data.endswith(b"EXIT"): os._exit(0)
    if data.endswith(b"GREEDY"): bytearray(64 << 30)
    if data.endswith(b"TALK"): os.write(1, b"warning: something\\n" * 1000)
    return decode(data)
decoding.decode_image = decode_image
decoding.serve()
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Helpers with the decoder above, and little patience."""
    decoding.close_helpers()
    monkeypatch.setattr(decoding, "PROGRAM", f"exec({STUB!r})")
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 1.0)
    yield
    decoding.close_helpers()


def encode(image: Image.Image, file_format: str, tail: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue() + tail


PHOTO = draw_photo((200, 50, 40), 1)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_apart_and_here_give_the_same_pixels(file_format: str) -> None:
    data = encode(PHOTO, file_format)
    here = decode_image(data)
    for decode in (decode_apart, decode_safely):
        image = decode(data)
        assert (image.mode, image.size) == ("RGB", here.size)
        assert image.tobytes() == here.tobytes()


@pytest.mark.parametrize("data", [b"", b"not an image", encode(PHOTO, "PNG")[:200], encode(PHOTO, "JPEG")[:200]])
def test_apart_and_here_give_the_same_reasons(data: bytes) -> None:
    with pytest.raises(ImageError) as here:
        decode_image(data)
    for decode in (decode_apart, decode_safely):
        with pytest.raises(ImageError) as apart:
            decode(data)
        assert str(apart.value) == str(here.value)


def test_pictures_larger_than_the_one_before_fit() -> None:
    for side in (4, 2000, 10, 3000, 1):
        image = Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))
        assert decode_apart(encode(image, "PNG")).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"CRASH", r"its decoder crashed 2 times \(exit code -11\)"),
        (b"EXIT", r"its decoder crashed 2 times \(exit code 0\)"),
        (b"HANG", "did not come to an end within 1 s"),
        (b"GREEDY", "needs more memory than there is"),
    ],
)
def test_a_decoder_that_fails_costs_that_file_and_no_other(stub: None, tail: bytes, reason: str) -> None:
    good = encode(PHOTO, "PNG")
    for _ in range(2):
        with pytest.raises(ImageError, match=reason):
            decode_safely(good + tail)
        assert decode_safely(good).tobytes() == PHOTO.tobytes()


def test_what_a_library_prints_is_no_answer(stub: None) -> None:
    assert decode_safely(encode(PHOTO, "PNG", b"TALK")).tobytes() == PHOTO.tobytes()


def test_an_ordinary_jpeg_needs_no_helper_and_one_of_many_scans_does(stub: None) -> None:
    plain = encode(PHOTO, "JPEG")
    assert decode_safely(plain + b"CRASH").size == PHOTO.size
    with pytest.raises(ImageError, match="crashed"):
        decode_safely(plain + b"\xff\xda\x00" * 100 + b"CRASH")
    with pytest.raises(ImageError, match="crashed"):
        decode_array(plain + b"\xff\xda\x00" * 100 + b"CRASH")


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[decoding.ORIENTATION_TAG] = orientation
    return exif


KINDS = {
    "usual": encode_jpeg(PHOTO),
    "progressive": encode_jpeg(PHOTO, progressive=True),
    "full colour": encode_jpeg(PHOTO, subsampling=0),
    "half colour": encode_jpeg(PHOTO, subsampling=1),
    "coarse": encode_jpeg(PHOTO, quality=5),
    "stored as RGB": encode_jpeg(PHOTO, keep_rgb=True),
    "grey": encode_jpeg(PHOTO.convert("L")),
    "CMYK": encode_jpeg(PHOTO.convert("CMYK")),
    "one pixel": encode_jpeg(PHOTO.crop((0, 0, 1, 1))),
    "odd sides": encode_jpeg(PHOTO.crop((0, 0, 47, 33))),
    "PNG": encode(PHOTO, "PNG"),
    **{f"turned {i}": encode_jpeg(PHOTO, exif=turn(i)) for i in (0, 1, 3, 6, 7, 8, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_holds_the_pixels_of_the_image_bit_for_bit(kind: str) -> None:
    pixels = decode_array(KINDS[kind])
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.array(decode_safely(KINDS[kind])))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "PNG"]),
    at=st.floats(0, 1),
    change=st.sampled_from(["cut", "flip", "drop", "zero", "double"]),
    value=st.integers(0, 255),
    length=st.integers(1, 200),
)
def test_a_damaged_jpeg_is_judged_and_decoded_alike(kind: str, at: float, change: str, value: int, length: int) -> None:
    data = KINDS[kind]
    i = int(at * (len(data) - 1))
    new = {"cut": b"", "flip": bytes([value]) + data[i + 1 :], "drop": data[i + length :]}
    new |= {"zero": bytes(length) + data[i + length :], "double": data[max(i - length, 0) :]}
    damaged = data[:i] + new[change]
    try:
        expected: NDArray[np.uint8] | None = np.array(decode_safely(damaged))
    except ImageError as error:
        expected, reason = None, str(error)
    if expected is not None:
        assert np.array_equal(decode_array(damaged), expected)
        return
    with pytest.raises(ImageError) as caught:
        decode_array(damaged)
    assert str(caught.value) == reason


def test_a_decoder_says_nothing_that_names_no_file(capfd: pytest.CaptureFixture[str]) -> None:
    data = KINDS["usual"]
    for i in range(2, len(data), 7):
        with contextlib.suppress(ImageError):
            decode_array(data[:i] + b"\x00\x00\x00" + data[i + 3 :])
    assert capfd.readouterr() == ("", "")


def test_threads_have_helpers_of_their_own() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(20):
            image = draw_photo((40, 60, 200), 100 * seed + i, size=(30 + seed, 40 + i))
            if decode_apart(encode(image, "PNG")).tobytes() != image.tobytes():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(decoding._idle) <= 4
    decoding.close_helpers()
    assert not decoding._idle


def test_a_helper_that_grew_large_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding.close_helpers()
    for limit, kept in ((len(PHOTO.tobytes()), 1), (len(PHOTO.tobytes()) - 1, 0)):
        monkeypatch.setattr(decoding, "LARGE_BYTES", limit)
        assert np.array_equal(decode_array(encode(PHOTO, "PNG")), np.array(PHOTO))
        assert len(decoding._idle) == kept


def test_a_helper_ends_with_the_process_that_started_it() -> None:
    code = (
        "import io, os, signal; from PIL import Image; from featcache import decoding\n"
        "buffer = io.BytesIO(); Image.new('RGB', (3, 3)).save(buffer, 'PNG')\n"
        "decoding.decode_apart(buffer.getvalue())\n"
        "print(decoding._idle[0]._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.05)
    pytest.fail("the helper is still there 5 s later")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize("runtime", ["eager", "fused"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_survives_files_that_kill_and_hang_decoders(
    photos: Path, tmp_path: Path, tiny: type[TinyFamily], stub: None, runtime: str, workers: int
) -> None:
    for i, tail in enumerate((b"CRASH", b"HANG", b"CRASH")):
        (photos / f"train/red/bad_{i}.png").write_bytes(encode(PHOTO, "PNG", tail))
    settings = {"backbone": "tiny", "weights": "none", "runtime": runtime, "workers": workers, "batch_size": 2}
    with pytest.raises(BadImagesError) as caught:
        featcache.extract_features(photos, tmp_path / "f.h5", **settings)
    reasons = dict(caught.value.bad)
    assert sorted(reasons) == [f"train/red/bad_{i}.png" for i in range(3)]
    assert "crashed" in reasons["train/red/bad_0.png"]
    assert "did not come to an end" in reasons["train/red/bad_1.png"]
    done = featcache.extract_features(photos, tmp_path / "f.h5", skip_bad=True, **settings)
    assert (len(done.cache), done.computed, len(done.bad)) == (18, 0, 3)
