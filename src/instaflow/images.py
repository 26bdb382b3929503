"""Pictures between arrays and PNG files. No torch here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) → fp32 (N, 3, H, W) in [−1, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """fp32 (N, 3, H, W) in [−1, 1], clipped → uint8 (N, H, W, 3)."""
    scaled = ((pictures.clip(-1, 1) + np.float32(1)) * np.float32(127.5)).round()
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def grid(pixels: np.ndarray, columns: int) -> Image.Image:
    """uint8 (N, H, W, 3) side by side, row by row, on white."""
    n, height, width, _ = pixels.shape
    columns = min(columns, n)
    sheet = Image.new("RGB", (columns * width, -(-n // columns) * height), "white")
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet


def to_png(image: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """A PNG with text chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def save_png(image: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write a PNG with text chunks, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(to_png(image, text))
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_grid(pixels: np.ndarray, path: Path, columns: int = 8) -> None:
    """Write pictures as one PNG grid."""
    save_png(grid(pixels, columns), path)
