"""Pictures from files and from strangers."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.data.pictures import Picture
from instaflow.errors import DataError
from instaflow.images import read_picture
from instaflow.models.request import read_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def forged(width: int, height: int) -> bytes:
    """A PNG whose header says this size and whose pixels are one."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b"\0\0\0\0"), b"IEND")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_is_transparent_shows_the_ground(tmp_path: Path) -> None:
    lines = np.full((8, 8, 4), 255, np.uint8)
    lines[..., 3] = 255 * np.eye(8, dtype=np.uint8)
    (tmp_path / "lines.png").write_bytes(encoded(Image.fromarray(lines)))
    drawn = np.asarray(read_image(tmp_path / "lines.png"))
    assert (drawn[..., 0] == 255 * np.eye(8)).all()  # a control: white lines on black
    assert (Picture(image=encoded(Image.fromarray(lines)), name="x").pixels(8) == 255).all()  # what is learnt: on white


def test_a_photograph_stands_upright() -> None:
    photo = Image.new("RGB", (8, 4), "white")
    photo.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = read_picture(encoded(photo, "JPEG", exif=exif, quality=95))
    assert upright.size == (4, 8) and np.asarray(upright)[:4].mean() < 30 < 220 < np.asarray(upright)[4:].mean()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (forged(100_000, 100_000), "too large"),
        (forged(17_000, 10), "17000x10 pixels; allowed: up to 16384"),
        (forged(64, 64), "damaged"),
        (b"text", "no picture"),
    ],
)
def test_a_bad_picture_is_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_picture(data)
    with pytest.raises(DataError, match=said):
        Picture(image=data, name="x").pixels(8)
