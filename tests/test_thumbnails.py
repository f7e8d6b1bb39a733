"""featcache.thumbnails: small, upright, without the file's own notes; what cannot be shown is left out."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image

from featcache.thumbnails import make_thumbnail, make_thumbnails


def read(uri: str | None) -> Image.Image:
    assert uri is not None
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize(("size", "expected"), [((1600, 800), (100, 50)), ((30, 60), (30, 60)), ((90, 900), (10, 100))])
def test_the_longer_side_is_at_most_what_was_asked(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    draw_photo((200, 30, 30), 0, size).save(tmp_path / "a.jpg")
    assert read(make_thumbnail(tmp_path / "a.jpg", side=100)).size == expected


def test_it_is_upright_and_holds_no_notes_of_the_file(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "taken at home"
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, comment=b"secret", quality=95)
    image = read(make_thumbnail(tmp_path / "a.jpg"))
    assert image.size == (40, 80)
    assert image.getpixel((20, 10))[0] > 200  # left came up
    assert image.getpixel((20, 70))[0] < 50
    assert not image.getexif()
    assert "comment" not in image.info


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_other_formats_are_shown_too(tmp_path: Path, mode: str) -> None:
    image = draw_photo((20, 90, 30), 1)
    image = Image.fromarray(np.full((40, 48), 30000, np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "a.png")
    assert read(make_thumbnail(tmp_path / "a.png")).mode == "RGB"


def test_what_cannot_be_shown_is_none_and_the_rest_goes_on(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    draw_photo((9, 9, 99), 0).save(tmp_path / odd, "JPEG")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / odd).read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    bad = ["broken.jpg", "text.png", "empty.jpg", "folder.jpg", "missing.jpg", "nul\0.jpg"]
    found = dict(make_thumbnails(tmp_path, [*bad, odd]))
    assert [path for path, uri in found.items() if uri is None] == bad
    assert read(found[odd]).size == (48, 40)


def test_a_path_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    draw_photo((9, 9, 99), 0).save(tmp_path / "private.jpg")
    paths = ["../private.jpg", str(tmp_path / "private.jpg")]
    assert [uri for _, uri in make_thumbnails(tmp_path / "inside", paths)] == [None, None]
