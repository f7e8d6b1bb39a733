"""featcache.clips: the right frames of every kind of clip, and one plain reason for every clip that is none."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import featcache
from featcache import clips, decoding
from featcache.clips import CLIP_RULES, check_video_support, choose_frames, decode_clip
from featcache.errors import ImageError, MissingExtraError
from featcache.images import ImageRows, make_evaluation_transform
from featcache.preprocessing import Preprocessing
from featcache.runtime import run_network

N = 24
SIZE = (64, 48)
# What torchvision's weights of r3d_18 state (R3D_18_Weights.KINETICS400_V1).
KINETICS = Preprocessing(
    resize=(128, 171), crop=112, mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989), frames=16
)
# Container, codec.
KINDS = [
    ("a.mp4", "libx264"),
    ("a.m4v", "mpeg4"),
    ("a.mov", "mjpeg"),
    ("a.avi", "mpeg4"),
    ("a.mkv", "libx264"),
    ("a.webm", "libvpx"),
    ("a.mpg", "mpeg1video"),
]


def draw_frame(i: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Grey 10 i on top, black below: which frame it is, and which way up, shows in its pixels."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2] = 10 * i
    return Image.fromarray(pixels)


def read_numbers(pictures: Sequence[Image.Image]) -> list[int]:
    """Which frames these are, and that they are upright."""
    for picture in pictures:
        assert picture.mode == "RGB"
        assert picture.getpixel((5, picture.height - 5))[0] < 8
    return [round(picture.getpixel((5, 5))[1] / 10) for picture in pictures]


def make_video(path: Path, codec: str = "libx264", n: int = N, size: tuple[int, int] = SIZE, **options: str) -> Path:
    """A video of n numbered frames."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(n):
            for packet in stream.encode(av.VideoFrame.from_image(draw_frame(i, size))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def make_gif(path: Path, n: int = N) -> Path:
    first, *others = [draw_frame(i) for i in range(n)]
    first.save(path, "GIF", save_all=True, append_images=others, duration=40)
    return path


def make_folder(path: Path, n: int = N, ending: str = "png") -> Path:
    path.mkdir(parents=True)
    for i in range(n):
        draw_frame(i).save(path / f"frame{i}.{ending}")
    return path


def make_clip(folder: Path, kind: str) -> Path:
    """A clip of N frames: "folder", "gif" or a video file of this name."""
    if kind == "folder":
        return make_folder(folder / "frames")
    return make_gif(folder / "a.gif") if kind == "gif" else make_video(folder / kind, dict(KINDS)[kind])


ALL = ["folder", "gif", *(name for name, _ in KINDS)]


@pytest.fixture(autouse=True, scope="module")
def no_helpers_left() -> Iterator[None]:
    yield
    decoding.close_helpers()


# Which frames


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 100, 18_000])
@pytest.mark.parametrize("frames", [1, 2, 5, 16])
def test_the_wanted_frames_are_the_middles_of_equal_segments(n: int, frames: int) -> None:
    wanted = choose_frames(n, frames)
    assert wanted == [int((i + 0.5) * n / frames) for i in range(frames)]
    assert wanted == sorted(wanted)
    assert len(wanted) == frames
    assert 0 <= wanted[0] <= wanted[-1] < n
    if n == frames:
        assert wanted == list(range(n))
    if n >= frames:
        assert len(set(wanted)) == frames


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("frames", [1, 5, N, 40])
def test_a_clip_of_any_kind_gives_the_wanted_frames(tmp_path: Path, kind: str, frames: int) -> None:
    pictures = decode_clip(make_clip(tmp_path, kind), frames)
    assert read_numbers(pictures) == choose_frames(N, frames)
    assert {picture.size for picture in pictures} == {SIZE}


@pytest.mark.parametrize("kind", ALL)
def test_the_same_bytes_give_the_same_frames_bit_for_bit(tmp_path: Path, kind: str) -> None:
    path = make_clip(tmp_path, kind)
    first = [picture.tobytes() for picture in decode_clip(path, 4)]
    decoding.close_helpers()
    assert [picture.tobytes() for picture in decode_clip(path, 4)] == first


@pytest.mark.parametrize("kind", ALL)
def test_apart_and_here_give_the_same_frames(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path, kind)
    apart = [picture.tobytes() for picture in decode_clip(path, 4)]
    monkeypatch.setattr(clips, "CAN_DECODE_APART", False)
    assert [picture.tobytes() for picture in decode_clip(path, 4)] == apart


@pytest.mark.parametrize("kind", ["gif", "a.mp4", "a.webm"])
def test_a_file_is_told_by_its_content_and_any_name_will_do(tmp_path: Path, kind: str) -> None:
    path = make_clip(tmp_path, kind)
    other = path.rename(tmp_path / os.fsdecode(b"\xff b\n.avi"))
    assert read_numbers(decode_clip(other, 3)) == choose_frames(N, 3)


def test_a_relative_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_clip(tmp_path, "gif")
    monkeypatch.chdir(tmp_path)
    assert read_numbers(decode_clip(Path("a.gif"), 3)) == choose_frames(N, 3)


def test_frames_are_in_natural_order_and_other_files_are_none(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "clip", 12, "bmp")
    (folder / "notes.txt").write_text("none")
    (folder / "sub").mkdir()
    assert read_numbers(decode_clip(folder, 12)) == list(range(12))


def test_the_true_count_of_frames_decides_not_that_of_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", n=20)
    assert read_numbers(decode_clip(path, 20)) == list(range(20))
    monkeypatch.setattr(clips, "CAN_DECODE_APART", False)
    real = clips._count_packets
    for wrong in (-5, 7):
        monkeypatch.setattr(clips, "_count_packets", lambda file, wrong=wrong: real(file) + wrong)
        assert read_numbers(decode_clip(path, 4)) == choose_frames(20, 4)


def test_a_transparent_gif_is_composed_on_white(tmp_path: Path) -> None:
    frames = []
    for i in range(4):
        pixels = np.zeros((20, 20, 4), np.uint8)
        pixels[5 * i : 5 * i + 5] = (200, 0, 0, 255)
        frames.append(Image.fromarray(pixels))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    for i, picture in enumerate(decode_clip(tmp_path / "a.gif", 4)):
        colours = [picture.getpixel((3, 5 * j + 2)) for j in range(4)]
        assert colours == [(200, 0, 0) if i == j else (255, 255, 255) for j in range(4)]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a phone held upright: x to the right becomes y downwards
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
    ],
)
def test_the_rotation_in_the_file_is_applied(tmp_path: Path, matrix: tuple[int, ...], turn: Image.Transpose) -> None:
    av = pytest.importorskip("av")
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not tell")
    path = make_video(tmp_path / "a.mp4")
    upright = decode_clip(path, 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    turned = decode_clip(path, 2)
    assert [picture.tobytes() for picture in turned] == [picture.transpose(turn).tobytes() for picture in upright]
    assert turned[0].size == upright[0].transpose(turn).size


# What is wrong with a clip


def make_sound(path: Path) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def encode(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


UNKNOWN = clips.UNKNOWN_FORMAT
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda folder: put(folder / "a.mp4", b""), r"empty file \(0 bytes\)"),
    "an empty gif": (lambda folder: put(folder / "a.gif", b""), r"empty file \(0 bytes\)"),
    "missing": (lambda folder: folder / "a.mp4", "cannot be read: No such file or directory"),
    "text": (lambda folder: put(folder / "a.mp4", b"hello\n" * 500), UNKNOWN),
    "zeros": (lambda folder: put(folder / "a.avi", bytes(5000)), UNKNOWN),
    "a picture": (lambda folder: put(folder / "a.mp4", encode(draw_frame(3), "JPEG")), UNKNOWN),
    "sound alone": (lambda folder: make_sound(folder / "a.mp4"), "no moving pictures in it"),
    "a gif's head": (lambda folder: put(folder / "a.gif", b"GIF89a" + bytes(3)), UNKNOWN),
    "an empty folder": (lambda folder: folder, "a folder without frames"),
    "a playlist": (
        lambda folder: put(folder / "a.mp4", b"#EXTM3U\n#EXTINF:5,\n/etc/hosts\n#EXT-X-ENDLIST\n"),
        UNKNOWN,
    ),
    "a list of files": (lambda folder: put(folder / "a.mkv", b"ffconcat version 1.0\nfile b.mp4\n"), UNKNOWN),
}


@pytest.mark.parametrize("name", BAD)
def test_a_clip_that_is_none_has_a_plain_reason(tmp_path: Path, name: str) -> None:
    pytest.importorskip("av")
    make, reason = BAD[name]
    with pytest.raises(ImageError, match=f"^{reason}") as caught:
        decode_clip(make(tmp_path), 4)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["gif", "a.mp4", "a.m4v", "a.mov", "a.avi", "a.mkv", "a.webm"])
def test_a_truncated_clip_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    path = make_clip(tmp_path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ImageError, match=f"damaged video|truncated|{UNKNOWN}"):
        decode_clip(path, 4)


@pytest.mark.parametrize("part", [0.6, 0.9, 0.98])
def test_a_truncated_clip_whose_index_comes_first_is_refused(tmp_path: Path, part: float) -> None:
    path = make_video(tmp_path / "a.mp4", movflags="faststart")
    assert read_numbers(decode_clip(path, 2)) == choose_frames(N, 2)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ImageError, match=r"damaged video|truncated"):
        decode_clip(path, 4)


@pytest.mark.parametrize("kind", ["gif", *(name for name, _ in KINDS)])
def test_a_mutated_clip_gives_frames_or_a_reason(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("av")  # a mutated GIF may be one no more
    path = make_clip(tmp_path, kind)
    data = path.read_bytes()
    for seed in range(12):
        random = np.random.default_rng(seed)
        mutant = bytearray(data)
        for at in random.integers(0, len(data), 1 + 4 * seed):
            mutant[at] = random.integers(256)
        path.write_bytes(bytes(mutant))
        reason = ""
        try:
            pictures = decode_clip(path, 3)
        except ImageError as error:
            reason = str(error)
        assert reason or len(pictures) == 3
        assert "crashed" not in reason
        assert "did not come" not in reason


def test_a_frame_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "clip")
    (folder / "frame3.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"^frame frame3\.png: not an image of a known format"):
        decode_clip(folder, N)
    assert read_numbers(decode_clip(folder, 2)) == choose_frames(N, 2)  # nobody looks at that one
    (folder / "frame6.png").unlink()
    (folder / "frame6.png").symlink_to("nowhere")
    with pytest.raises(ImageError, match=r"^frame frame6\.png cannot be read: No such file"):
        decode_clip(folder, 2)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MAX_FRAMES", N - 1, "more than 23 frames; cut it into clips"),
        ("MAX_CLIP_PIXELS", 64 * 48 * 4 - 1, "its frames together are more than 12,287 pixels"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_what_is_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit: str, value: int, reason: str
) -> None:
    path = make_clip(tmp_path, kind)
    monkeypatch.setattr(clips, "CAN_DECODE_APART", False)
    monkeypatch.setattr(clips, limit, value + 1)
    decode_clip(path, 4)
    monkeypatch.setattr(clips, limit, value)
    if (kind, limit) == ("folder", "MAX_FRAMES"):
        decode_clip(path, 4)  # of a folder only what is wanted is decoded
        return
    with pytest.raises(ImageError, match=reason):
        decode_clip(path, 4)


@pytest.mark.skipif(not decoding.CAN_DECODE_APART, reason="decodes in this process here")
@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("os.kill(os.getpid(), 11)", r"its decoder crashed 2 times \(exit code -11\)"),
        ("time.sleep(600)", "its decoder did not come to an end within 1 s"),
        ("bytearray(64 << 30)", "needs more memory than there is"),
    ],
)
def test_a_decoder_that_fails_costs_that_clip_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str, reason: str
) -> None:
    program = (
        f"import os, time; from featcache import clips, decoding\n"
        f"def fail(request):\n"
        f"    if request.endswith(b'bad.gif'): {deed}\n"
        f"    return clips.decode_request(request)\n"
        f"decoding.serve(fail)"
    )
    monkeypatch.setattr(clips, "PROGRAM", f"exec({program!r})")
    monkeypatch.setattr(clips, "CLIP_SECONDS", 60.0)
    good, bad = make_gif(tmp_path / "good.gif"), make_gif(tmp_path / "bad.gif")
    decode_clip(good, 2)  # Python has started
    monkeypatch.setattr(clips, "CLIP_SECONDS", 1.0 if "sleep" in deed else 60.0)
    with pytest.raises(ImageError, match=reason):
        decode_clip(bad, 2)
    monkeypatch.setattr(clips, "CLIP_SECONDS", 60.0)
    assert read_numbers(decode_clip(good, 2)) == choose_frames(N, 2)
    decoding.close_helpers()


def test_a_missing_extra_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    video = put(tmp_path / "a.mp4", b"some bytes")
    with pytest.raises(MissingExtraError, match=r"a\.mp4 need PyAV, .*pip install 'featcache\[video\]'"):
        decode_clip(video, 2)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[video\]'"):
        check_video_support([tmp_path / "a.gif", video])
    gif, folder = make_gif(tmp_path / "a.gif"), make_folder(tmp_path / "folder.mp4")
    check_video_support([gif, str(folder)])
    assert len(decode_clip(gif, 2)) == len(decode_clip(folder, 2)) == 2


def test_clips_need_no_torch() -> None:
    code = "import sys, featcache.clips; assert not {'torch', 'av'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(featcache.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


# Into a network


def test_the_preprocessing_of_the_kinetics_weights_is_what_torchvision_says() -> None:
    from torchvision.models.video import R3D_18_Weights

    preset = R3D_18_Weights.KINETICS400_V1.transforms()
    assert (tuple(preset.resize_size), tuple(preset.crop_size)) == (KINETICS.resize, KINETICS.size)
    assert (tuple(preset.mean), tuple(preset.std)) == (KINETICS.mean, KINETICS.std)
    assert KINETICS.decoding == CLIP_RULES


@pytest.mark.parametrize("runtime", ["eager", "fused"])
def test_clips_run_in_every_runtime_and_bad_ones_shift_nothing(tmp_path: Path, runtime: str) -> None:
    small = Preprocessing(resize=(20, 24), crop=16, mean=(0.5,) * 3, std=(0.25,) * 3, frames=4)
    names = ["a.gif", "frames", "bad", "b.gif"]
    make_gif(tmp_path / "a.gif")
    make_folder(tmp_path / "frames", 5)
    make_folder(tmp_path / "bad", 0)
    make_gif(tmp_path / "b.gif", 3)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 8, 3), torch.nn.BatchNorm3d(8), torch.nn.AdaptiveAvgPool3d(1))
    network.append(torch.nn.Flatten()).eval()
    rows = ImageRows(tmp_path, names, transform=make_evaluation_transform(small))
    outputs = list(run_network(network, rows, device=torch.device("cpu"), runtime=runtime, batch_size=2, workers=0))
    assert [row for output in outputs for row in output.rows.tolist()] == [0, 1, 3]
    assert [item for output in outputs for item in output.bad] == [("bad", "a folder without frames")]
    clip = rows[3][1]
    assert isinstance(clip, torch.Tensor)
    with torch.inference_mode():
        np.testing.assert_allclose(outputs[-1].values[-1], network(clip[None])[0].numpy(), rtol=1e-5, atol=1e-6)


def test_a_clip_goes_through_r3d_18(tmp_path: Path) -> None:
    from torchvision.models.video import r3d_18

    make_video(tmp_path / "a.mp4")
    rows = ImageRows(tmp_path, ["a.mp4"], transform=make_evaluation_transform(KINETICS))
    batch = rows.collate([rows[0]])
    assert batch.images.shape == (1, *KINETICS.input_shape) == (1, 3, 16, 112, 112)
    network = r3d_18(weights=None).eval()
    network.fc = torch.nn.Identity()
    with torch.inference_mode():
        features: Any = network(batch.images)
    assert features.shape == (1, 512)
    assert features.isfinite().all()
