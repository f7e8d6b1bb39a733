"""An image file's bytes -> RGB, by stated rules; what might crash or hang, in a process of its own. Needs no torch.

What a decoder makes of unusual images is one stated rule each:

========================  ==================================================================================
file format               JPEG, PNG, WebP, BMP, GIF, TIFF and PNM, told by content, never by name
EXIF orientation          applied; a damaged EXIF block is as good as none
transparency              composed on white
16-bit grey               divided by 257, so that full scale stays full scale
float or 32-bit pixels    refused: their range is not stated in the file
animation, pages          the first frame
truncated                 refused, as far as the decoder can tell
more than MAX_PIXELS      refused from the header, before decoding
========================  ==================================================================================

Decoders are C libraries that read what strangers made. `decode_image` runs them where it is called. `decode_apart`
sends the bytes to a helper process and gets pixels back: if that process dies or takes too long, this one file is bad
and a fresh helper takes its place. `decode_safely` decides: JPEGs here, all else apart. `decode_array` gives the same
pixels without Pillow's copies, where a JPEG has nothing unusual.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featcache.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's own limit of a decompression bomb: 0.5 GB as RGB
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {  # what undoes each, as in PIL.ImageOps.exif_transpose, which fails where another EXIF field is damaged
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RULES = "pillow; exif applied; alpha on white; 16-bit / 257; first frame"

JPEG = b"\xff\xd8\xff"
DECODE_SECONDS = 60.0  # for one file; the largest that is allowed takes about five
MAX_SCANS = 32  # of a JPEG; a progressive one has ten, one made to keep decoders busy has thousands
TRIES = 2  # of a file whose helper died: the machine may have been short of memory
HELPER_BYTES = 8 << 30  # of address space that a helper may take
LARGE_BYTES = 64 << 20  # of pixels: a helper that had so many is not kept, nor its memory
PROGRAM = "from featcache.decoding import serve; serve()"
# Freed memory is kept, see `runtime.keep_freed_memory`: every picture needs the same again.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "OMP_NUM_THREADS": "1"}
CAN_DECODE_APART = os.name == "posix"
_REQUEST = struct.Struct("<Q")  # bytes of the file, which lie in the shared memory
_ANSWER = struct.Struct("<cIIQ")  # b"I" for an image or b"E" for a reason, width, height, bytes in the shared memory

# Width, height, RGB row after row; of several pictures one after the other.
Pixels: TypeAlias = tuple[int, int, bytes | bytearray]


def decode_image(data: bytes) -> Image.Image:
    """Decode one image file's bytes to RGB, by the rules of this module.

    Raises
    ------
    ImageError
        If the bytes are not an image of a known format, or it is damaged or too large.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    with _explain_damage():
        return convert_image(Image.open(io.BytesIO(data), formats=FORMATS))


def convert_image(image: Image.Image) -> Image.Image:
    """RGB of an image that Pillow has opened or made, by the rules of this module.

    Raises
    ------
    ImageError
        If it is damaged or too large.
    """
    with _explain_damage():
        check_size(image.width, image.height)
        image.load()
        return to_rgb(_orient(image), image.format)


@contextlib.contextmanager
def _explain_damage() -> Iterator[None]:
    """Whatever a decoder raises, as an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):  # short memory is no fault of the file's
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise ImageError(f"damaged image: {error}" if str(error) else "damaged image") from error


def decode_safely(data: bytes) -> Image.Image:
    """Decode without letting one file take the run along.

    A JPEG of at most MAX_SCANS scans is decoded in this process: libjpeg-turbo has been through everybody's fuzzers,
    its time is bounded by pixels and scans, and a helper would cost a tenth of an extraction (measured on 2 cores: 397
    photographs with EfficientNet-Lite0 in 3.3 s here, 3.7 s apart). All other formats are decoded apart.

    Raises
    ------
    ImageError
        As `decode_apart`.
    """
    return decode_image(data) if _is_bounded_jpeg(data) else decode_apart(data)


def decode_array(data: bytes) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) of one image file, the very ones that `decode_safely` gives.

    A JPEG goes from libjpeg-turbo straight into an array; Pillow, with the same library below it, keeps four bytes for
    a pixel and copies them twice (measured: 1.58 against 2.16 ms for a photograph of 500 x 375). What is turned by
    EXIF, has four channels, or makes libjpeg remark on anything is left to Pillow.

    Raises
    ------
    ImageError
        As `decode_apart`.
    """
    if _is_bounded_jpeg(data) and _is_upright_rgb(data):
        with contextlib.suppress(ValueError):
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            return pixels
    if data.startswith(JPEG) or not CAN_DECODE_APART:
        return np.array(decode_safely(data))
    width, height, rows = ask_apart(data, PROGRAM, DECODE_SECONDS)
    return np.frombuffer(rows, dtype=np.uint8).reshape(height, width, 3)


def _is_bounded_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of few scans. Each starts with FF DA and its length, whose first byte is always 0."""
    return data.startswith(JPEG) and data.count(b"\xff\xda\x00") <= MAX_SCANS


def _is_upright_rgb(data: bytes) -> bool:
    """Whether the header of a JPEG says that nothing is to be done but to decode it; no if it says nothing sensible."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        check_size(image.width, image.height)
    except Exception:  # noqa: BLE001 - whoever decodes it says what is wrong
        return False
    return image.mode in ("RGB", "L") and _find_orientation(image) not in ORIENTATIONS


def decode_apart(data: bytes) -> Image.Image:
    """`decode_image` in a helper process, one for each thread that is in here at a time; on Windows in this process.

    Raises
    ------
    ImageError
        As `decode_image`; also if the decoder crashed twice, or took longer than DECODE_SECONDS.
    """
    if not CAN_DECODE_APART:
        return decode_image(data)
    width, height, pixels = ask_apart(data, PROGRAM, DECODE_SECONDS)
    return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)


def ask_apart(request: bytes, program: str, seconds: float) -> Pixels:
    """What a helper process that runs `program` answers within `seconds`; one for each thread in here at a time.

    Raises
    ------
    ImageError
        If that is a reason why there are no pixels; also if the helper crashed twice, or took longer.
    """
    for attempt in range(TRIES):
        helper = _take_helper(program)
        try:
            pixels = helper.ask(request, seconds)
        except ImageError:
            _idle.append(helper)
            raise
        except TimeoutError:
            helper.close()
            raise ImageError(f"its decoder did not come to an end within {seconds:.0f} s") from None
        except OSError:
            code = helper.close()
            if attempt == TRIES - 1:
                raise ImageError(f"its decoder crashed {TRIES} times (exit code {code})") from None
        except BaseException:  # Ctrl-C: it may be in the middle of an answer
            helper.close()
            raise
        else:
            if len(pixels[2]) > LARGE_BYTES:
                helper.close()
            else:
                _idle.append(helper)
            return pixels
    raise AssertionError


def close_helpers() -> None:
    """End the helper processes that nobody is using."""
    while _idle:
        with contextlib.suppress(IndexError):  # another thread took it
            _idle.pop().close()


class Helper:
    """A process that decodes one file after the other; files and pixels go through memory that both share.

    Parameters
    ----------
    program
        What it runs: Python that calls `serve`.

    Raises
    ------
    OSError
        If it cannot be started.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self._memory = SharedMemory(_make_shared_file())
        code = f"import sys; sys.path[:] = {sys.path!r}; {program}"
        self._process = subprocess.Popen(  # noqa: S603 - it is this very Python
            [sys.executable, "-c", code, str(self._memory.descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            pass_fds=[self._memory.descriptor],
            start_new_session=True,  # Ctrl-C is the main process's business
            env={**os.environ, **ENVIRONMENT},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, request: bytes, seconds: float) -> Pixels:
        """What it makes of a request: of a file's bytes, the pixels.

        Raises
        ------
        ImageError
            If there is nothing usable.
        TimeoutError, OSError
            If the process did not answer in time, or died.
        """
        self._memory.write(request)
        self._requests.write(_REQUEST.pack(len(request)))
        _wait_for(self._answers.fileno(), seconds)
        header = self._answers.read(_ANSWER.size)
        if len(header) < _ANSWER.size:
            raise BrokenPipeError
        kind, width, height, size = _ANSWER.unpack(header)
        answer = self._memory.read(size)
        if kind == b"E":
            raise ImageError(answer.decode("utf-8"))
        return width, height, answer

    def close(self) -> int:
        """Kill the process; give its exit code."""
        for pipe in (self._requests, self._answers):
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that crashed has an exit code worth knowing
            self._process.wait(timeout=0.2)
        self._process.kill()
        self._memory.close()
        return self._process.wait()


class SharedMemory:
    """An unnamed file that two processes map; it grows as it needs to.

    Parameters
    ----------
    descriptor
        Of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def write(self, data: bytes | bytearray) -> None:
        """Put `data` at the start."""
        if os.fstat(self.descriptor).st_size < len(data):
            os.ftruncate(self.descriptor, len(data))
        self._see(len(data))[: len(data)] = data

    def read(self, size: int) -> bytearray:
        """The first `size` bytes."""
        with memoryview(self._see(size)) as everything, everything[:size] as wanted:
            return bytearray(wanted)

    def close(self) -> None:
        """Give it back."""
        if self._map is not None:
            self._map.close()
        os.close(self.descriptor)

    def _see(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.descriptor, 0)
        return self._map


_idle: list[Helper] = []
atexit.register(close_helpers)
if hasattr(os, "register_at_fork"):  # a forked process must not talk to its parent's helpers
    os.register_at_fork(after_in_child=_idle.clear)


def _take_helper(program: str) -> Helper:
    for helper in [helper for helper in _idle if helper.program == program]:
        with contextlib.suppress(ValueError):  # another thread took it
            _idle.remove(helper)
            return helper
    return Helper(program)


def _make_shared_file() -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("featcache", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, 1 << 20)
    return descriptor


def _wait_for(descriptor: int, seconds: float) -> None:
    """Wait until something can be read.

    Raises
    ------
    TimeoutError
        If nothing comes for so long.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise TimeoutError


def decode_pixels(data: bytes) -> Pixels:
    """`decode_image`, as a helper answers it."""
    image = decode_image(data)
    return image.width, image.height, image.tobytes()


def serve(decode: Callable[[bytes], Pixels] = decode_pixels) -> None:
    """What a helper does: requests from stdin, answers to stdout, until stdin ends."""
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (HELPER_BYTES, HELPER_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = SharedMemory(int(sys.argv[1]))
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        kind, width, height, answer = _answer(decode, bytes(memory.read(*_REQUEST.unpack(header))))
        memory.write(answer)
        answers.write(_ANSWER.pack(kind, width, height, len(answer)))


def _answer(decode: Callable[[bytes], Pixels], request: bytes) -> tuple[bytes, int, int, bytes | bytearray]:
    try:
        return b"I", *decode(request)
    except ImageError as error:
        return b"E", 0, 0, str(error).encode("utf-8", errors="backslashreplace")
    except MemoryError:
        return b"E", 0, 0, b"needs more memory than there is"


def check_size(width: int, height: int) -> None:
    """Raise an ImageError if a picture of this size is too large, or would be once it is resized."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    short, long = sorted((width, height))
    if long > 500 * short:  # resizing the shorter side to 256 would make a gigabyte of a 1 x 5000 strip
        raise ImageError(f"{width} x {height} is a strip: one side is more than 500 times the other")


def _orient(image: Image.Image) -> Image.Image:
    orientation = _find_orientation(image)
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def _find_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block raises anything; the pixels are there all the same
        return 1


def to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Any mode that Pillow decodes to 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" and file_format == "TIFF":
        raise ImageError("32-bit pixels: their range is not stated in the file; save it with 8 or 16 bits")
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _scale_16_bit(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels: their range is not stated in the file; save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError("32-bit pixels: their range is not stated in the file; save it with 8 or 16 bits")
    return Image.fromarray(np.round(pixels / 257).astype(np.uint8)).convert("RGB")
