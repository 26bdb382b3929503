"""Captioned pictures: one schema, read from Parquet, a folder of files or a hub data set."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instaflow.errors import DataError
from instaflow.images import read_picture

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One captioned picture. `hexcode` names its concept; the same concept may be drawn in many styles."""

    image: bytes  # an encoded picture, PNG where we wrote it
    name: str
    keywords: tuple[str, ...] = ()
    style: str = ""
    hexcode: str = ""
    split: str = "train"
    licence: str = ""
    source: str = ""

    @classmethod
    def from_image(cls, image: Image.Image, **fields: object) -> Picture:
        """Encode a PIL picture as PNG."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=False)
        return cls(image=buffer.getvalue(), **fields)  # type: ignore[arg-type]

    def pixels(self, size: int) -> np.ndarray:
        """uint8 array (size, size, 3): upright, transparent parts on white, centre-cropped, resized (Lanczos).

        Raises:
            DataError: the bytes are not a picture.
        """
        try:
            image = read_picture(self.image)
        except ValueError as error:
            raise DataError(f"unreadable picture {self.name!r} ({self.source}): {error}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def caption(self, rng: random.Random) -> str:
        """A training caption: the name or some keywords, with or without the style.

        The forms are few on purpose, so that their encodings can be cached: 'tomato',
        'tomato, noto', 'tomato, fruit, vegetable', 'vegetable, noto'.
        """
        draw = rng.random()
        if draw < 0.75 or not self.keywords:
            words = self.name
        elif draw < 0.85:
            words = f"{self.name}, {rng.choice(self.keywords)}"
        else:
            words = rng.choice(self.keywords)
        return f"{words}, {self.style}" if self.style and rng.random() < 0.5 else words


def write_parquet(pictures: Sequence[Picture], path: Path) -> Path:
    """Write pictures as Parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([asdict(p) for p in pictures])
    part = path.with_suffix(".tmp")
    pq.write_table(table, part)
    os.replace(part, path)
    return path


def read_pictures(source: str | Path, *, split: str | None = None, styles: Sequence[str] = ()) -> list[Picture]:
    """Pictures from Parquet (a file or a folder of them), a folder of `*.png` + `*.txt`, or a hub data set id.

    Args:
        source: path or hub id. A Parquet file or data set needs the columns `image` and `name`
            (or `text`); a folder needs a caption file beside every picture, and its folders test/ and
            validation/ are those splits.
        split: keep one of train, validation, test. None keeps all.
        styles: keep these styles, in this order; empty keeps all.

    Raises:
        DataError: nothing there, unreadable, a column or caption missing, an unknown style.
    """
    path = Path(source)
    if path.is_dir() and (files := sorted(path.glob("*.parquet"))):
        pictures = [p for file in files for p in _from_parquet(file)]
    elif path.is_dir():
        pictures = list(_from_folder(path))
    elif path.suffix == ".parquet":
        pictures = _from_parquet(path)
    elif str(source).count("/") == 1 and not path.exists():
        pictures = _from_hub(str(source))
    else:
        raise DataError(f"no pictures at {source}: give a .parquet file, a folder, or a data set id owner/name")
    known = sorted({p.style for p in pictures})
    for style in styles:
        if style not in known:
            there = f"it has: {', '.join(known)}" if any(known) else "its pictures have no styles, so leave styles out"
            raise DataError(f"unknown style {style!r} in {source}; {there}")
    if styles:
        pictures = [p for style in styles for p in pictures if p.style == style]
    kept = [p for p in pictures if split in (None, p.split)]
    if not kept:
        raise DataError(f"{source} has no pictures with split {split!r}")
    return kept


def _from_folder(folder: Path) -> Iterable[Picture]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"no pictures in {folder}: expected {', '.join(sorted(SUFFIXES))}")
    kept_back = [p for split in ("validation", "test") for p in sorted((folder / split).glob("*"))]
    for file in [*files, *(p for p in kept_back if p.suffix.lower() in SUFFIXES)]:
        text = file.with_suffix(".txt")
        if not text.exists():
            raise DataError(f"{file} has no caption: expected {text.name} beside it")
        try:
            caption = text.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        if not caption:
            raise DataError(f"{text} is empty: expected a caption")
        split = file.parent.name if file.parent != folder else "train"
        yield Picture(image=file.read_bytes(), name=caption, split=split, source=str(file))


def _from_parquet(path: Path) -> list[Picture]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise DataError(f"no such file: {path}")
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"unreadable Parquet {path}: {str(error).splitlines()[0]}") from error
    return [_from_row(row, f"{path}:{i}") for i, row in enumerate(rows)]


def _from_hub(name: str) -> list[Picture]:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    try:
        data = load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen kinds; each means that we cannot read it
        raise DataError(f"cannot load the data set {name!r}: {str(error).splitlines()[0]}") from error
    if "image" in data.column_names:
        data = data.cast_column("image", ImageFeature(decode=False))
    return [_from_row(dict(row), f"{name}:{i}") for i, row in enumerate(data)]


def _from_row(row: dict[str, Any], place: str) -> Picture:
    image = row.get("image")
    image = image.get("bytes") if isinstance(image, dict) else image
    name = row.get("name") or row.get("text") or row.get("caption")
    if not isinstance(image, bytes) or not name:
        kinds = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items())
        raise DataError(f"{place} needs image (bytes) and name, text or caption (a word at least); it has {kinds}")
    given = {k: row[k] for k in ("style", "hexcode", "split", "licence", "source") if row.get(k)}
    given.setdefault("source", place)
    return Picture(image=image, name=name, keywords=tuple(row.get("keywords") or ()), **given)


def content_hash(pictures: Iterable[Picture]) -> str:
    """sha256 over pictures and captions: written into the lineage of what is trained on them."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.image + picture.name.encode() + picture.style.encode())
    return digest.hexdigest()
