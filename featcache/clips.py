"""A clip -> a few of its frames, evenly spaced, as RGB pictures. Knows no labels, no transform and no network.

What is made of unusual clips is one stated rule each:

===========================  ===============================================================================
which frames                 the middles of equal segments, see `choose_frames`; a short clip repeats some
folder of frames             its image files in natural order, each by the rules of `featcache.decoding`
file format                  MP4, MOV, AVI, Matroska, WebM, MPEG and GIF, told by content, never by name
rotation in the file         applied
pixels that are not square   taken as they are
sound, subtitles, covers     ignored; without moving pictures the file is refused
damaged, truncated           refused, as far as container and decoder can tell
more than MAX_FRAMES         refused: every frame before the last wanted one has to be decoded
picture size that changes    refused
===========================  ===============================================================================

A video file is decoded in a helper process, as `featcache.decoding` has them for images: FFmpeg's many decoders read
what strangers made. If one dies or takes too long, this one clip is bad. It is read through an open file and by the
formats above alone, so that no playlist can name other files. Of a long video only the wanted frames are held.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, UnidentifiedImageError

from featcache.dataset import VIDEO_EXTENSIONS, list_frames
from featcache.decoding import CAN_DECODE_APART, MAX_PIXELS, Pixels, ask_apart, check_size, decode_safely, to_rgb
from featcache.errors import DatasetError, ImageError, MissingExtraError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

T = TypeVar("T")

CLIP_RULES = "pyav, pillow; frames (2i + 1) n / 2T; rotation applied; alpha on white"
UNKNOWN_FORMAT = "not a video of a known format, or damaged at its start"
CLIP_SECONDS = 600.0  # for one file; the longest that is allowed takes about two minutes in HD
MAX_FRAMES = 18_000  # of a video file: ten minutes at 30 a second
MAX_CLIP_PIXELS = 2 * MAX_PIXELS  # of the wanted frames together: 32 in 4K, 1 GB as RGB
PROGRAM = "from featcache.clips import decode_request; from featcache.decoding import serve; serve(decode_request)"
# Demuxers of FFmpeg that read nothing but the file itself.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,m4v,mpegts"
READ_BYTES = 1 << 20  # at a time
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # what an MP4 or MOV may begin with
ATTACHED_PICTURE = 0x0400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: a cover
TURNS = {  # what a rotation in degrees, counterclockwise, is to Pillow
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
_REQUEST = struct.Struct("<I")  # frames that are wanted; then the file's path


def decode_clip(path: Path, frames: int) -> list[Image.Image]:
    """Evenly spaced frames of a clip as RGB pictures, the same for the same bytes every time.

    Parameters
    ----------
    path
        A folder of frames, or a video file.
    frames
        How many; which, says `choose_frames`.

    Raises
    ------
    ImageError
        If the clip is not usable; the message is the reason, without the path.
    MissingExtraError
        If it is a video file and PyAV is not installed.
    """
    if path.is_dir():
        return _decode_folder(path, frames)
    if not _is_gif(_read_head(path)):
        _check_av(path)
    request = _REQUEST.pack(frames) + os.fsencode(path.absolute())
    answer = ask_apart(request, PROGRAM, CLIP_SECONDS) if CAN_DECODE_APART else decode_request(request)
    return _split_pictures(answer)


def choose_frames(n: int, frames: int) -> list[int]:
    """Which `frames` of a clip's `n` frames: of as many equal segments the middle ones, (2 i + 1) n // (2 frames).

    Source: L. Wang et al., Temporal segment networks (2016), section 3.2, whose segments these are.

    >>> choose_frames(100, 4)
    [12, 37, 62, 87]
    >>> choose_frames(2, 4)
    [0, 0, 1, 1]
    """
    return [(2 * i + 1) * n // (2 * frames) for i in range(frames)]


def check_video_support(paths: Iterable[Path | str]) -> None:
    """Raise a MissingExtraError if one of the clips needs PyAV and it is not installed."""
    for path in paths:
        if str(path).lower().endswith(VIDEO_EXTENSIONS) and not Path(path).is_dir():
            _check_av(path)
            return


def _check_av(path: Path | str) -> None:
    if importlib.util.find_spec("av") is None:
        raise MissingExtraError(
            f"video files such as {path} need PyAV, which is not installed; pip install 'featcache[video]', or make "
            f"folders of frames of them"
        )


def decode_request(request: bytes) -> Pixels:
    """What a helper does with the number of frames and the path of a video file: the frames, one after the other."""
    (frames,) = _REQUEST.unpack_from(request)
    path = Path(os.fsdecode(request[_REQUEST.size :]))
    head = _read_head(path)
    try:
        with path.open("rb") as file:
            pictures = (_decode_gif if _is_gif(head) else _decode_video)(file, frames)
    except (ImageError, MemoryError):  # short memory is no fault of the file's
        raise
    except UnidentifiedImageError:
        raise ImageError(UNKNOWN_FORMAT) from None
    except Exception as error:
        raise ImageError(f"damaged video: {getattr(error, 'strerror', None) or error}") from error
    return *pictures[0].size, b"".join(picture.tobytes() for picture in pictures)


def _split_pictures(answer: Pixels) -> list[Image.Image]:
    width, height, pixels = answer
    size = 3 * width * height
    pieces = (pixels[start : start + size] for start in range(0, len(pixels), size))
    return [Image.frombuffer("RGB", (width, height), piece, "raw", "RGB", 0, 1) for piece in pieces]


def _decode_folder(folder: Path, frames: int) -> list[Image.Image]:
    """The wanted frames of a folder; the others are not looked at."""
    try:
        names = list_frames(folder)
    except DatasetError as error:
        raise ImageError(str(error)) from error
    if not names:
        raise ImageError("a folder without frames")
    wanted = choose_frames(len(names), frames)
    kept: dict[int, Image.Image] = {}
    for i in dict.fromkeys(wanted):
        kept[i] = _decode_frame(folder / names[i])
        _check_total(sum(picture.width * picture.height for picture in kept.values()))
    return [kept[i] for i in wanted]


def _decode_frame(path: Path) -> Image.Image:
    try:
        return decode_safely(path.read_bytes())
    except OSError as error:
        raise ImageError(f"frame {path.name} cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise ImageError(f"frame {path.name}: {error}") from error


def _read_head(path: Path) -> bytes:
    """The first bytes of a file that can be read and is not empty."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if not head:
        raise ImageError("empty file (0 bytes)")
    return head


def _is_gif(head: bytes) -> bool:
    return head.startswith((b"GIF87a", b"GIF89a"))


def _decode_gif(file: io.BufferedReader, frames: int) -> list[Image.Image]:
    with Image.open(file, formats=["GIF"]) as image:
        check_size(*image.size)
        _check_total(frames * image.width * image.height)
        n: int = getattr(image, "n_frames", 1)
        _check_count(n)
        wanted = choose_frames(n, frames)
        # All are decoded: each is painted over the one before, and the last one shows whether the file is whole.
        kept, _ = _pick(_play_gif(image, n), wanted, lambda played: to_rgb(played.copy(), "GIF"))
    return [kept[i] for i in wanted]


def _play_gif(image: Image.Image, n: int) -> Iterator[Image.Image]:
    for i in range(n):
        image.seek(i)
        image.load()
        yield image


def _decode_video(file: io.BufferedReader, frames: int) -> list[Image.Image]:
    """The wanted frames; which these are, only the count of those that were decoded tells.

    Packets are counted first, which costs no decoding. Where there are more or fewer frames than packets, a second pass
    picks from the true count.
    """
    _check_whole(file)
    n = _count_packets(file)
    for _ in range(2):
        _check_count(n)
        wanted = choose_frames(n, frames)
        with _open_video(file) as (container, stream):
            _check_total(frames * stream.codec_context.width * stream.codec_context.height)
            kept, decoded = _pick(_play_video(container, stream), wanted, _make_picture)
        if decoded == n:
            if len({picture.size for picture in kept.values()}) > 1:
                raise ImageError("its frames differ in size")
            return [kept[i] for i in wanted]
        n = decoded
    raise ImageError("damaged video: another number of frames each time")


@contextlib.contextmanager
def _open_video(file: io.BufferedReader) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file from its start, and its first stream of moving pictures."""
    import av

    file.seek(0)
    try:
        container = av.open(
            file, "r", options={"format_whitelist": DEMUXERS}, metadata_errors="replace", buffer_size=READ_BYTES
        )
    except av.error.FFmpegError as error:
        raise ImageError(UNKNOWN_FORMAT) from error
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise ImageError("no moving pictures in it")
        stream = streams[0]
        if stream.codec_context is None:
            raise ImageError("its video codec is not known")
        stream.codec_context.thread_count = 1  # helpers are one for each core already
        check_size(stream.codec_context.width, stream.codec_context.height)
        yield container, stream


def _is_cover(stream: VideoStream) -> bool:
    return bool(int(getattr(stream, "disposition", 0)) & ATTACHED_PICTURE)


def _count_packets(file: io.BufferedReader) -> int:
    n = 0
    with _open_video(file) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ImageError("damaged video: truncated, or parts of it are missing")
            n += packet.size > 0  # the last one is empty
            if n > MAX_FRAMES:
                break
    return n


def _play_video(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for frame in container.decode(stream):
        check_size(frame.width, frame.height)
        yield frame


def _make_picture(frame: VideoFrame) -> Image.Image:
    """A frame as RGB, turned as the file says."""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    rotation = getattr(frame, "rotation", 0)  # PyAV 12 does not tell
    return picture.transpose(TURNS[rotation]) if rotation in TURNS else picture


def _pick(
    played: Iterable[T], wanted: Sequence[int], make_picture: Callable[[T], Image.Image]
) -> tuple[dict[int, Image.Image], int]:
    """The wanted ones of all frames by their position, and how many went by."""
    kept: dict[int, Image.Image] = {}
    n, these = 0, set(wanted)
    for frame in played:
        if n in these:
            kept[n] = make_picture(frame)
        n += 1
        _check_count(n)
    return kept, n


def _check_count(n: int) -> None:
    if n == 0:
        raise ImageError("no frame in it can be decoded")
    if n > MAX_FRAMES:
        raise ImageError(f"more than {MAX_FRAMES:,} frames; cut it into clips")


def _check_total(pixels: int) -> None:
    if pixels > MAX_CLIP_PIXELS:
        raise ImageError(f"its frames together are more than {MAX_CLIP_PIXELS:,} pixels")


def _check_whole(file: io.BufferedReader) -> None:
    """Raise an ImageError if the file is shorter than it says: FFmpeg often plays what is left."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(1 << 12)
    stated = _measure_boxes(file, size) if head[4:8] in MP4_BOXES else _read_stated_size(head)
    if stated > size:
        raise ImageError(f"truncated video: {stated:,} bytes by its header, {size:,} in the file")


def _measure_boxes(file: io.BufferedReader, size: int) -> int:
    """Where the last outermost box of an MP4 or MOV of `size` bytes ends, as it says itself.

    Source: ISO/IEC 14496-12, section 4.2: a size of 1 stands for one of 8 bytes, 0 for the end of the file.
    """
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or not head[4:8].isalnum():  # what some writers leave behind the last one is no box
            break
        at += length
    return at


def _read_stated_size(head: bytes) -> int:
    """Bytes of an AVI, Matroska or WebM file by its header; 0 if it does not say.

    Source: Microsoft's RIFF, whose size some writers make 8 bytes too large; RFC 9559 (Matroska) and RFC 8794 (EBML).
    """
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little")
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return 0
    length, at = _read_ebml_size(head, 4)
    segment = at + length
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    length, at = _read_ebml_size(head, segment + 4)
    return at + length if length else 0


def _read_ebml_size(head: bytes, at: int) -> tuple[int, int]:
    """A size of 1 to 8 bytes, its length told by leading zeros; 0 if it is unknown. Then where it ends."""
    if at >= len(head) or head[at] == 0:
        return 0, at
    n = 9 - head[at].bit_length()
    mask = (1 << 7 * n) - 1
    value = int.from_bytes(head[at : at + n], "big") & mask
    return (0 if value == mask else value), at + n
