"""featcache.images: each rule for unusual files, the transforms against torchvision's, and that no row ever shifts."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_photo
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from featcache.augmentation import make_training_transform
from featcache.clips import CLIP_RULES, choose_frames
from featcache.dataset import hash_clip
from featcache.decoding import MAX_PIXELS, RULES, decode_image
from featcache.errors import BadImage, ImageError
from featcache.files import hash_bytes
from featcache.images import (
    Batch,
    ClipTransform,
    ImageMemory,
    ImageRows,
    check_images,
    choose_workers,
    count_cores,
    decode_nothing,
    denormalise,
    enlarge,
    make_evaluation_transform,
    make_loader,
    save_png,
)
from featcache.preprocessing import Preprocessing

IMAGENET = Preprocessing(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SMALL = Preprocessing(resize=20, crop=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
ORIENTATION = 0x0112


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b""
) -> bytes:
    """A PNG by hand: colour 0 is grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; each row begins with a 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + extra
        + make_chunk(b"IDAT", zlib.compress(rows))
        + make_chunk(b"IEND", b"")
    )


def only_pixel(data: bytes) -> tuple[int, int, int]:
    """The colour of an image that has only one."""
    image = decode_image(data)
    assert image.mode == "RGB"
    colours = image.getcolors(1)
    assert colours is not None, "more than one colour"
    return colours[0][1]


def quarters(size: int = 32) -> Image.Image:
    """Red, green / blue, white: each corner its own colour, so that turning it shows."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def near(colour: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 4) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, expected, strict=True))


# One rule each

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_each_format_is_decoded_to_rgb(file_format: str) -> None:
    image = decode_image(encode(Image.new("RGB", (9, 7), (200, 40, 90)), file_format))
    assert (image.mode, image.size) == ("RGB", (9, 7))
    assert near(image.getpixel((4, 3)), (200, 40, 90))


@pytest.mark.parametrize("file_format", ["ICO", "TGA", "JPEG2000", "PCX", "EPS", "PDF"])
def test_another_format_is_refused(file_format: str) -> None:
    with pytest.raises(ImageError, match="not an image of a known format"):
        decode_image(encode(Image.new("RGB", (16, 16)), file_format))


@pytest.mark.parametrize(
    ("inks", "colour"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_a_cmyk_jpeg_becomes_its_colours(inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    assert near(only_pixel(encode(Image.new("CMYK", (8, 8), inks), "JPEG", quality=95)), colour)


def test_a_grey_jpeg_becomes_three_equal_channels() -> None:
    assert only_pixel(encode(Image.new("L", (8, 8), 90), "JPEG")) == (90, 90, 90)


def test_a_palette_png_becomes_its_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 12, 200, 34])
    assert only_pixel(encode(image, "PNG")) == (12, 200, 34)


def test_a_transparent_palette_entry_becomes_white_and_the_others_stay() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([9, 9, 9, 12, 200, 34])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, "PNG", transparency=0))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (12, 200, 34)]


def test_half_transparent_palette_entries_are_mixed_with_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0])
    assert near(only_pixel(encode(image, "PNG", transparency=bytes([128]))), (127, 127, 127), 1)


def test_a_transparent_gif_is_composed_on_white() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([9, 9, 9, 12, 200, 34])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, "GIF", transparency=0))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (12, 200, 34)]


@pytest.mark.parametrize(("grey", "alpha", "expected"), [(50, 255, 50), (50, 0, 255), (0, 128, 127)])
def test_grey_with_alpha_is_composed_on_white(grey: int, alpha: int, expected: int) -> None:
    assert near(only_pixel(encode(Image.new("LA", (3, 3), (grey, alpha)), "PNG")), (expected,) * 3, 1)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("alpha", "expected"), [(255, (100, 0, 200)), (0, (255, 255, 255)), (51, (224, 204, 244))])
def test_rgb_with_alpha_is_composed_on_white(file_format: str, alpha: int, expected: tuple[int, ...]) -> None:
    image = Image.new("RGBA", (4, 4), (100, 0, 200, alpha))
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    assert near(only_pixel(encode(image, file_format, **options)), expected, 1)


@pytest.mark.parametrize(("colour", "key"), [(0, b"\0\x07"), (2, b"\0\x07\0\x07\0\x07")])
def test_a_transparent_colour_of_an_opaque_png_becomes_white(colour: int, key: bytes) -> None:
    rows = b"\0" + bytes([7, 90]) if colour == 0 else b"\0" + bytes([7, 7, 7, 90, 90, 90])
    decoded = decode_image(make_png(2, 1, colour=colour, rows=rows, extra=make_chunk(b"tRNS", key)))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_divided_by_257(value: int, file_format: str) -> None:
    pixels = np.full((4, 4), value * 257, np.uint16)
    assert only_pixel(encode(Image.fromarray(pixels), file_format)) == (value,) * 3


def test_the_mean_of_16_bit_grey_stays() -> None:
    pixels = np.random.default_rng(0).integers(0, 2 * 127 * 257, (64, 64)).astype(np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels), "PNG")))
    assert decoded.mean() == pytest.approx(pixels.mean() / 257, abs=0.05)
    assert np.abs(decoded[..., 0] - pixels / 257).max() <= 0.5


def test_big_endian_16_bit_grey_is_read_as_such() -> None:
    data = b"P5\n2 1\n65535\n" + struct.pack(">2H", 65535, 127 * 257)
    assert [decode_image(data).getpixel((x, 0))[0] for x in range(2)] == [255, 127]


def test_16_bit_colour_keeps_its_scale() -> None:
    row = b"\0" + struct.pack(">3H", 65535, 128 * 257, 0)
    assert only_pixel(make_png(1, 1, depth=16, colour=2, rows=row)) == (255, 128, 0)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit_pixels_become_black_and_white(file_format: str) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, file_format))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_four_bit_grey_is_stretched_to_full_scale() -> None:
    decoded = decode_image(make_png(2, 1, depth=4, colour=0, rows=b"\0\x0f"))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point pixels"):
        decode_image(encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_32_bit_pixels_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ImageError, match="32-bit pixels"):
        decode_image(encode(Image.fromarray(np.array([[0, value]], np.int32)), "TIFF"))


R, G, B, W = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# Orientation of R G / B W (Exif 2.3, tag 0x0112) and the corners as they are to be seen.
TURNS = {1: (R, G, B, W), 2: (G, R, W, B), 3: (W, B, G, R), 4: (B, W, R, G)}
TURNS |= {5: (R, B, G, W), 6: (B, R, W, G), 7: (W, G, B, R), 8: (G, W, R, B)}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    decoded = decode_image(encode(quarters().resize((32, 16)), "JPEG", exif=exif, quality=95))
    width, height = decoded.size
    assert (width, height) == ((16, 32) if orientation >= 5 else (32, 16))
    corners = [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3)]
    for corner, colour in zip(corners, TURNS[orientation], strict=True):
        assert near(decoded.getpixel(corner), colour, 12)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_in_other_formats(file_format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    decoded = decode_image(encode(Image.new("RGB", (10, 4)), file_format, exif=exif))
    assert decoded.size == (4, 10)


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0" + b"\xff" * 30,
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\0\0\0\0",
        b"Exif\0\0",
    ],
)
def test_a_damaged_exif_block_is_as_good_as_none(block: bytes) -> None:
    plain = encode(quarters(), "JPEG")
    damaged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert decode_image(damaged).tobytes() == decode_image(plain).tobytes()


@pytest.mark.parametrize("block", [b"", b"MM", b"MM\0*\0", b"\xff" * 30, b"II*\0" + b"\xff" * 9])
def test_a_damaged_exif_block_of_a_png_is_as_good_as_none(block: bytes) -> None:
    plain = make_png(2, 1, rows=b"\0" + bytes(range(6)))
    damaged = make_png(2, 1, rows=b"\0" + bytes(range(6)), extra=make_chunk(b"eXIf", block))
    assert decode_image(damaged).tobytes() == decode_image(plain).tobytes() == bytes(range(6))


def test_an_orientation_out_of_range_is_ignored() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 77
    assert decode_image(encode(quarters(), "PNG", exif=exif)).tobytes() == quarters().tobytes()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_many_is_taken(file_format: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(red, file_format, save_all=True, append_images=[blue], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    assert near(only_pixel(data), (255, 0, 0), 1)


def test_a_jpeg_of_many_pictures_as_cameras_write_it_is_its_first() -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encode(red, "MPO", save_all=True, append_images=[blue])
    assert near(only_pixel(data), (255, 0, 0))


def test_a_file_is_told_by_content_and_never_by_name(tmp_path: Path) -> None:
    (tmp_path / "lies.jpg").write_bytes(encode(Image.new("RGB", (30, 30), (10, 20, 30)), "PNG"))
    _, image, _ = ImageRows(tmp_path, ["lies.jpg"], transform=transforms.ToTensor())[0]
    assert torch.equal((image * 255).round()[:, 0, 0], torch.tensor([10.0, 20.0, 30.0]))


# What is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 100, "not an image"),
        (b"hello, I am a text\n" * 20, "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"\xff\xd8\xff", "not an image|damaged"),
        (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
        (b"GIF89a", "not an image|damaged"),
        (b"P6\n0 0\n255\n", "not an image|strip"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def try_to_decode(data: bytes) -> Image.Image | None:
    """The image, or None if it was refused with a reason."""
    try:
        return decode_image(data)
    except ImageError as error:
        if not str(error):
            raise
        return None


PHOTO = draw_photo((120, 90, 60), seed=5)
COMPRESSED = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("GIF", {})]
COMPRESSED += [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("PPM", {})]


@pytest.mark.parametrize(("file_format", "options"), COMPRESSED)
def test_a_truncated_file_is_refused_and_never_filled_up(file_format: str, options: dict[str, Any]) -> None:
    whole = encode(PHOTO, file_format, **options)
    pixels = decode_image(whole).tobytes()
    cuts = [*range(64), *range(64, len(whole) - 40, 97), *range(len(whole) - 40, len(whole))]
    images = [image for image in (try_to_decode(whole[:cut]) for cut in cuts) if image]
    assert len(images) < 30  # only the end mark or a checksum is missing, nothing of the picture:
    assert all(image.tobytes() == pixels for image in images)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (15_000, 12_000)])
def test_a_decompression_bomb_is_refused_from_its_header(width: int, height: int) -> None:
    started = time.perf_counter()
    with pytest.raises(ImageError, match=f"more than {MAX_PIXELS:,} pixels|damaged|not an image"):
        decode_image(make_png(width, height, rows=b"\0" * 10))
    assert time.perf_counter() - started < 1


def test_the_limit_of_pixels_stays_where_another_library_lifted_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="15000 x 12000 is more than 178,956,970 pixels"):
        decode_image(make_png(15_000, 12_000))


@pytest.mark.parametrize("size", [(501, 1), (1, 501), (5000, 9)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} is a strip"):
        decode_image(encode(Image.new("RGB", size), "PNG"))


def test_a_long_image_is_no_strip_yet() -> None:
    assert decode_image(encode(Image.new("RGB", (500, 1)), "PNG")).size == (500, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (17, 500)])
def test_the_smallest_images_go_through_both_transforms(size: tuple[int, int]) -> None:
    image = decode_image(encode(Image.new("RGB", size, (255, 255, 255)), "PNG"))
    for make in (make_evaluation_transform, make_training_transform):
        assert torch.equal(make(SMALL)(image), torch.full((3, 16, 16), 2.0))


def make_mutants(n: int, seed: int) -> list[tuple[str, bytes]]:
    """Files with some bytes changed, cut out or put in, mostly near the front where the headers are."""
    rng, exif = random.Random(seed), Image.Exif()
    exif[ORIENTATION] = 6
    sources = {name: encode(PHOTO, name) for name in ("PNG", "WEBP", "BMP", "GIF", "PPM")}
    sources |= {
        "JPEG": encode(PHOTO, "JPEG", exif=exif),
        "CMYK": encode(PHOTO.convert("CMYK"), "JPEG"),
        "palette": encode(PHOTO.convert("P"), "PNG", transparency=3),
        "TIFF": encode(PHOTO, "TIFF"),
        "LZW": encode(PHOTO, "TIFF", compression="tiff_lzw"),
        "16-bit": encode(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160), "PNG"),
    }
    mutants = []
    for i in range(n):
        name = sorted(sources)[i % len(sources)]
        data = bytearray(sources[name])
        for _ in range(rng.choice((1, 3, 10, 40))):
            at = rng.randrange(min(len(data), rng.choice((64, 700, len(data)))))
            kind = rng.random()
            if kind < 0.7:
                data[at] = rng.randrange(256)
            elif kind < 0.85:
                del data[at : at + rng.randrange(1, 20)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
        mutants.append((name, bytes(data)))
    return mutants


def test_a_mutated_file_is_an_rgb_image_or_an_image_error_and_nothing_else() -> None:
    images = [try_to_decode(data) for _, data in make_mutants(1100, seed=2)]
    assert {(image.mode, min(image.size) > 0) for image in images if image} == {("RGB", True)}
    assert 100 < images.count(None) < 1000


def test_a_mutated_file_that_decodes_goes_through_the_transform() -> None:
    transform = make_evaluation_transform(SMALL)
    images = [try_to_decode(data) for _, data in make_mutants(330, seed=3)]
    assert {transform(image).shape for image in images if image} == {(3, 16, 16)}


# Transforms

PICTURES = [(500, 333), (224, 224), (300, 900), (97, 61), (1, 1)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", PICTURES)
def test_the_evaluation_transform_is_the_weights_own_bit_for_bit(size: tuple[int, int]) -> None:
    image = noise(size)
    ours, theirs = make_evaluation_transform(IMAGENET)(image), ResNet18_Weights.IMAGENET1K_V1.transforms()(image)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", PICTURES)
def test_the_training_transform_is_the_tutorials_bit_for_bit(size: tuple[int, int]) -> None:
    tutorial = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    ours = make_training_transform(IMAGENET)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = tutorial(noise(size))
        torch.manual_seed(seed)
        assert torch.equal(ours(noise(size)), expected)


def test_interpolation_is_followed() -> None:
    bicubic = Preprocessing(resize=20, crop=16, interpolation="bicubic", mean=SMALL.mean, std=SMALL.std)
    image = noise((64, 64))
    expected = transforms.functional.resize(image, 20, transforms.InterpolationMode.BICUBIC)
    expected = transforms.functional.to_tensor(transforms.functional.center_crop(expected, 16))
    assert torch.equal(make_evaluation_transform(bicubic)(image), (expected - 0.5) / 0.25)
    assert not torch.equal(make_evaluation_transform(SMALL)(image), (expected - 0.5) / 0.25)


@pytest.mark.parametrize("preprocessing", [IMAGENET, SMALL])
def test_preprocessing_survives_json(preprocessing: Preprocessing) -> None:
    written = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(written) == preprocessing
    assert written == preprocessing.to_json()
    assert {"resize", "crop", "interpolation", "mean", "std", "decoding"} == set(written)


def test_denormalise_inverts_normalisation() -> None:
    images = torch.stack([make_evaluation_transform(IMAGENET)(noise((224, 256), seed)) for seed in range(2)])
    pictures = denormalise(images, IMAGENET)
    assert (pictures.shape, pictures.dtype) == ((2, 224, 224, 3), np.float32)
    normalise = transforms.Normalize(IMAGENET.mean, IMAGENET.std)
    again = torch.stack([normalise(torch.from_numpy(picture.transpose(2, 0, 1).copy())) for picture in pictures])
    assert torch.allclose(again, images, atol=1e-5)


def test_denormalise_stays_between_black_and_white() -> None:
    pictures = denormalise(torch.tensor([-99.0, 99.0, 0.0]).reshape(1, 3, 1, 1), SMALL)
    assert pictures.ravel().tolist() == [0.0, 1.0, 0.5]


# Rows and batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files, 0.png to 6.png, of grey 10 * i; 2 is damaged, 4 is missing."""
    for i in range(7):
        Image.new("RGB", (20, 20), (10 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "4.png").unlink()
    return tmp_path


def make_rows(folder: Path, **options: Any) -> ImageRows:
    options = {"labels": [100 + i for i in range(7)], **options}
    return ImageRows(folder, [f"{i}.png" for i in range(7)], transform=make_evaluation_transform(SMALL), **options)


def greys(batch: Batch) -> list[int]:
    return ((batch.images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()


def test_a_bad_image_gives_its_reason_instead_of_a_tensor(folder: Path) -> None:
    rows = make_rows(folder)
    assert rows[2][0] == 2
    assert isinstance(rows[2][1], str)
    assert rows[2][2] == 102
    assert rows[4] == (4, "cannot be read: No such file or directory", 104)


def test_no_row_shifts_when_images_are_bad(folder: Path) -> None:
    rows = make_rows(folder)
    batch = rows.collate([rows[i] for i in range(7)])
    assert batch.rows.tolist() == [0, 1, 3, 5, 6]
    assert batch.labels.tolist() == [100, 101, 103, 105, 106]
    assert greys(batch) == [0, 10, 30, 50, 60]
    assert [item.path for item in batch.bad] == ["2.png", "4.png"]
    assert (len(batch), batch.rows.dtype, batch.labels.dtype) == (7, torch.int64, torch.int64)


def test_a_batch_of_nothing_but_bad_images_is_empty(folder: Path) -> None:
    rows = make_rows(folder)
    batch = rows.collate([rows[2], rows[4]])
    assert (batch.rows.tolist(), batch.labels.tolist(), len(batch.images)) == ([], [], 0)
    assert len(batch.bad) == len(batch) == 2


def test_a_file_that_changed_meanwhile_is_a_bad_image(folder: Path) -> None:
    present = [i for i in range(7) if i != 4]
    digests = [hash_bytes((folder / f"{i}.png").read_bytes()) if i in present else "" for i in range(7)]
    rows = make_rows(folder, digests=digests)
    assert isinstance(rows[3][1], torch.Tensor)
    Image.new("RGB", (20, 20), "white").save(folder / "3.png")
    assert "changed" in str(rows[3][1])
    assert isinstance(rows[5][1], torch.Tensor)


def test_without_labels_every_label_is_minus_one(folder: Path) -> None:
    rows = make_rows(folder, labels=None)
    assert rows.collate([rows[0], rows[1]]).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_the_loader_gives_every_row_once_and_in_order(folder: Path, batch_size: int) -> None:
    batches = list(make_loader(make_rows(folder), batch_size=batch_size, workers=0))
    assert [len(batch) for batch in batches] == [min(batch_size, 7 - i) for i in range(0, 7, batch_size)]
    assert [row for batch in batches for row in batch.rows.tolist()] == [0, 1, 3, 5, 6]
    assert [grey for batch in batches if len(batch.images) for grey in greys(batch)] == [0, 10, 30, 50, 60]
    assert [item.path for batch in batches for item in batch.bad] == ["2.png", "4.png"]


def test_worker_processes_give_the_same_rows_in_the_same_order(folder: Path) -> None:
    here, there = (list(make_loader(make_rows(folder), batch_size=3, workers=workers)) for workers in (0, 2))
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        assert one.bad == other.bad


@pytest.mark.parametrize("threads", [1, 3])
def test_checking_images_names_exactly_the_bad_files(folder: Path, threads: int) -> None:
    rows = ImageRows(folder, [f"{i}.png" for i in range(7)], transform=decode_nothing)
    batches = list(check_images(rows, threads=threads, chunk=4))
    assert [len(batch) for batch in batches] == [4, 3]
    assert [row for batch in batches for row in batch.rows.tolist()] == [0, 1, 3, 5, 6]
    bad = [item for batch in batches for item in batch.bad]
    assert [item.path for item in bad] == ["2.png", "4.png"]
    assert all(isinstance(item, BadImage) and item.reason for item in bad)


def test_a_file_that_changed_since_it_was_listed_is_a_bad_one_when_it_is_checked(folder: Path) -> None:
    digests = [hash_bytes((folder / f"{i}.png").read_bytes()) for i in (0, 1)]
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    rows = ImageRows(folder, ["0.png", "1.png"], transform=decode_nothing, digests=digests)
    assert [item.path for batch in check_images(rows) for item in batch.bad] == ["1.png"]


# --- images that stay in memory ---------------------------------------------------------------------------------------


def make_remembering(folder: Path, memory: ImageMemory) -> ImageRows:
    return ImageRows(folder, ["0.png", "1.png", "3.png"], transform=make_evaluation_transform(SMALL), memory=memory)


def test_an_image_that_is_kept_is_the_same_and_is_not_read_again(folder: Path) -> None:
    memory = ImageMemory(10**6)
    rows, plain = make_remembering(folder, memory), make_remembering(folder, ImageMemory(0))
    first = [rows[i][1] for i in range(3)]
    assert len(memory) == 3
    assert all(torch.equal(mine, other[1]) for mine, other in zip(first, (plain[i] for i in range(3)), strict=True))
    (folder / "0.png").unlink()
    assert torch.equal(rows[0][1], first[0])
    assert isinstance(plain[0][1], str)


def test_memory_holds_no_more_than_its_limit(folder: Path) -> None:
    with Image.open(folder / "0.png") as image:
        size = 3 * image.width * image.height
    memory = ImageMemory(2 * size)
    rows = make_remembering(folder, memory)
    for i in (0, 1, 2, 0, 1, 2):
        assert isinstance(rows[i][1], torch.Tensor)
    assert (len(memory), memory.size) == (2, 2 * size)


def test_another_process_that_is_not_forked_gets_an_empty_memory(folder: Path) -> None:
    memory = ImageMemory(10**6)
    assert isinstance(make_remembering(folder, memory)[0][1], torch.Tensor)
    copied = pickle.loads(pickle.dumps(memory))
    assert (len(memory), len(copied), copied.limit) == (1, 0, 0)


def test_several_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.images.count_cores", lambda: 16)
    assert [choose_workers(999, torch.device("cuda"), processes=n) for n in (1, 4, 16, 99)] == [15, 3, 0, 0]


@pytest.mark.parametrize(
    ("device", "cores", "n", "workers"),
    [
        ("cpu", 2, 5000, 0),
        ("cpu", 16, 31, 0),
        ("cpu", 16, 32, 8),
        ("cpu", 6, 999, 3),
        ("cpu", 64, 999, 8),
        ("cuda", 16, 31, 0),
        ("cuda", 16, 999, 15),
        ("cuda", 1, 999, 0),
    ],
)
def test_workers_are_chosen_by_device_cores_and_images(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, n: int, workers: int
) -> None:
    monkeypatch.setattr("featcache.images.count_cores", lambda: cores)
    assert choose_workers(n, torch.device(device)) == workers


def test_there_is_at_least_one_core() -> None:
    assert count_cores() >= 1


# Writing


def test_a_saved_png_is_read_back_pixel_for_pixel(tmp_path: Path) -> None:
    save_png(PHOTO, tmp_path / "a.anything")
    assert decode_image((tmp_path / "a.anything").read_bytes()).tobytes() == PHOTO.tobytes()


def test_enlarge_keeps_the_picture_and_frames_it_white() -> None:
    picture = enlarge(np.zeros((8, 8), np.uint8), 200)
    assert (picture.mode, picture.size) == ("RGB", (200, 200))
    assert picture.getpixel((100, 100)) == (0, 0, 0)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


# Clips

CLIP = Preprocessing(resize=(20, 24), crop=16, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), frames=4)


def make_frames(folder: Path, n: int = 6, size: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        draw_photo((40 * i, 100, 250 - 40 * i), i, size).save(folder / f"f{i}.png")
    return folder


def test_every_frame_of_a_clip_meets_the_transform_of_a_picture(tmp_path: Path) -> None:
    folder = make_frames(tmp_path / "clip")
    rows = ImageRows(tmp_path, ["clip"], transform=make_evaluation_transform(CLIP), digests=[hash_clip(folder)])
    _, clip, _ = rows[0]
    assert isinstance(clip, torch.Tensor)
    assert (clip.shape, clip.dtype) == (CLIP.input_shape, torch.float32)
    of_picture = transforms.Compose(
        [
            transforms.Resize((20, 24)),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(CLIP.mean, CLIP.std),
        ]
    )
    for t, i in enumerate(choose_frames(6, 4)):
        torch.testing.assert_close(clip[:, t], of_picture(Image.open(folder / f"f{i}.png")), rtol=0, atol=0)


def test_all_frames_of_a_clip_are_cropped_and_mirrored_alike_and_each_time_otherwise() -> None:
    transform = make_training_transform(CLIP)
    image = draw_photo((200, 50, 40), 1)
    torch.manual_seed(0)
    clips = [transform([image] * 4) for _ in range(12)]
    for clip in clips:
        assert clip.shape == CLIP.input_shape
        for t in range(1, 4):
            assert torch.equal(clip[:, t], clip[:, 0])
    assert len({clip.numpy().tobytes() for clip in clips}) == 12


def test_a_clips_draw_is_that_of_a_picture() -> None:
    of_picture = make_training_transform(
        Preprocessing(**{**CLIP.to_json(), "frames": 0, "resize": CLIP.resize, "mean": CLIP.mean, "std": CLIP.std})
    )
    image = draw_photo((200, 50, 40), 1)
    torch.manual_seed(3)
    clip, after = make_training_transform(CLIP)([image] * 4), torch.rand(1)
    torch.manual_seed(3)
    picture = of_picture(image)
    assert torch.equal(clip[:, 2], picture)
    assert torch.equal(torch.rand(1), after)


def test_evaluation_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    make_evaluation_transform(CLIP)([draw_photo((200, 50, 40), 1)] * 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_clips_have_their_own_rules_of_decoding_in_every_key() -> None:
    assert (SMALL.decoding, CLIP.decoding) == (RULES, CLIP_RULES)
    assert Preprocessing.from_json(json.loads(json.dumps(CLIP.to_json()))) == CLIP


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_and_bad_ones_keep_their_rows(tmp_path: Path, workers: int) -> None:
    paths = []
    for i in range(5):
        make_frames(tmp_path / f"clip{i}", n=i + 1)
        paths.append(f"clip{i}")
    (tmp_path / "clip2/f1.png").write_bytes(b"")
    (tmp_path / "clip4").rename(tmp_path / "gone")
    rows = ImageRows(tmp_path, paths, transform=make_evaluation_transform(CLIP), labels=[5, 6, 7, 8, 9])
    batches = list(make_loader(rows, batch_size=3, workers=workers))
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [3]]
    assert [batch.labels.tolist() for batch in batches] == [[5, 6], [8]]
    assert [tuple(batch.images.shape) for batch in batches] == [(2, *CLIP.input_shape), (1, *CLIP.input_shape)]
    bad = [BadImage("clip2", "frame f1.png: empty file (0 bytes)")]
    bad.append(BadImage("clip4", "cannot be read: No such file or directory"))
    assert [item for batch in batches for item in batch.bad] == bad
    checked = check_images(ImageRows(tmp_path, paths, transform=ClipTransform(4, decode_nothing)), threads=workers + 1)
    assert [item for batch in checked for item in batch.bad] == bad


@pytest.mark.parametrize("change", ["content of a frame that is not wanted", "one more", "damaged"])
def test_a_clip_that_changed_is_a_bad_one(tmp_path: Path, change: str) -> None:
    folder = make_frames(tmp_path / "clip")
    rows = ImageRows(tmp_path, ["clip"], transform=make_evaluation_transform(CLIP), digests=[hash_clip(folder)])
    unwanted = next(i for i in range(6) if i not in choose_frames(6, 4))
    if change == "one more":
        draw_photo((1, 2, 3), 9).save(folder / "f9.png")
    elif change == "damaged":
        (folder / "f0.png").write_bytes(b"no image")
    else:
        draw_photo((1, 2, 3), 9).save(folder / f"f{unwanted}.png")
    assert rows[0][1] == "changed while it was being worked on; run the same command again"


def test_a_clip_becomes_the_picture_of_its_middle_frame() -> None:
    clip = torch.randn(2, 3, 5, 8, 6).clamp(-1, 1)
    pictures = denormalise(clip, CLIP)
    assert (pictures.shape, pictures.dtype) == ((2, 8, 6, 3), np.float32)
    np.testing.assert_array_equal(pictures, denormalise(clip[:, :, 2], CLIP))


def test_frames_of_different_sizes_become_one_clip() -> None:
    images = [draw_photo((200, 50, 40), i, size) for i, size in enumerate([(48, 40), (30, 60), (48, 40), (20, 20)])]
    for make in (make_evaluation_transform, make_training_transform):
        transform = make(CLIP)
        assert isinstance(transform, ClipTransform)
        assert transform(images).shape == CLIP.input_shape
