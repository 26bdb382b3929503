"""Pictures between arrays and PNG files. No torch here."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

LARGEST = 16_384  # pixels a side of a picture that is read
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are looked at here, before anything is decoded


def read_picture(
    source: Path | bytes, *, ground: str = "white", largest: int = LARGEST, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """A picture in RGB, upright, its transparent parts on `ground`.

    Args:
        source: a file, or what is in it.
        ground: a colour.
        largest: most pixels a side.
        formats: Pillow's names of those allowed; None allows all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, or no picture that can be read.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            width, height = image.size
            if max(width, height) <= largest:
                upright = ImageOps.exif_transpose(image)
                if upright.mode == "RGB":
                    return upright.copy()
                seen = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", seen.size, ground), seen).convert("RGB")
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"it is too large; allowed: up to {largest} pixels a side") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture") from error
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        raise ValueError(f"it is damaged: {error}") from error
    raise ValueError(f"it has {width}x{height} pixels; allowed: up to {largest} a side")


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
