"""Openly licensed emoji pictures with real captions, from pinned packages of the npm registry.

`make_emoji` fetches each package with `npm pack`, checks its hash, rasterises the drawings and
writes one Parquet file a style in the schema of `data.pictures`. The emoji are about 1,900 concepts drawn
by up to nine hands, so train / validation / test are split by *concept*: a test concept is unseen
in every style, and so are its gender variants.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from instaflow.data.pictures import Picture, write_parquet
from instaflow.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned npm package: `integrity` is the registry's own sha512."""

    name: str
    version: str
    integrity: str
    licence: str = ""

    @property
    def url(self) -> str:
        """Where a person finds the package and its licence text."""
        return f"https://www.npmjs.com/package/{self.name}/v/{self.version}"


NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    licence="MIT",
)

STYLES = {
    "noto": Package(
        name="@iconify-json/noto",
        version="1.2.9",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="Apache-2.0",
    ),
    "noto-v1": Package(
        name="@iconify-json/noto-v1",
        version="1.2.5",
        integrity="sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        licence="Apache-2.0",
    ),
    "twemoji": Package(
        name="@iconify-json/twemoji",
        version="1.2.5",
        integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="CC-BY-4.0",
    ),
    "fluent-flat": Package(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="MIT",
    ),
    "fluent": Package(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        integrity="sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        licence="MIT",
    ),
    "fluent-3d": Package(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        licence="MIT",
    ),
    "fxemoji": Package(
        name="@iconify-json/fxemoji",
        version="1.2.2",
        integrity="sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        licence="Apache-2.0",
    ),
    "emojione": Package(
        name="@iconify-json/emojione",
        version="1.2.3",
        integrity="sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        licence="CC-BY-4.0",
    ),
    "streamline": Package(
        name="@iconify-json/streamline-emojis",
        version="1.2.4",
        integrity="sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        licence="CC-BY-4.0",
    ),
}

FLAGS, COMPONENTS = 9, 2  # emojibase groups left out: flags are names of places, components are hair and skin
SUPERSAMPLING = 2  # draw larger, then reduce: resvg's own edges are hard at 64 px


# -- fetching ----------------------------------------------------------------------------------


def fetch(package: Package, cache: Path) -> tarfile.TarFile:
    """The package's archive, fetched once with `npm pack` and checked against its pinned hash.

    Raises:
        DataError: npm is missing or failed, or the archive is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", folder]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                raise DataError("npm is not installed; it is needed to fetch the emoji pictures") from error
            if done.returncode:
                raise DataError(f"npm pack {package.name}@{package.version} failed: {done.stderr.strip()[-200:]}")
            next(Path(folder).glob("*.tgz")).replace(path)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.integrity:
        path.unlink()
        raise DataError(f"{package.name}@{package.version} has hash {digest[:24]}…, not the pinned one; removed {path}")
    return tarfile.open(path)


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    """A JSON member of an npm archive.

    Raises:
        DataError: there is none of that name.
    """
    try:
        member = archive.extractfile(f"package/{name}")
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{archive.name!s} has no {name}")
    return json.load(member)


# -- concepts ----------------------------------------------------------------------------------


def normal(hexcode: str) -> str:
    """Code points in lower case without the presentation selector: '2764-FE0F' → '2764'."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def concept_group(hexcode: str) -> str:
    """Concepts that look alike share a group and so a split: gender variants of one person."""
    parts = [p for p in normal(hexcode).split("-") if p not in {"2640", "2642", "200d"}]
    people = {"1f468", "1f469", "1f9d1"}  # man, woman, person: the same profession is one group
    return "-".join(sorted({"1f9d1" if p in people else p for p in parts}))


def split_of(hexcode: str) -> str:
    """Train (82 %), validation (4 %) or test (14 %): a pure function of the concept's group."""
    draw = int(hashlib.sha256(concept_group(hexcode).encode()).hexdigest(), 16) % 100
    return "test" if draw < 14 else "validation" if draw < 18 else "train"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji: `name` and `keywords` are emojibase's English label and tags."""

    hexcode: str
    name: str
    keywords: tuple[str, ...]


def read_concepts(cache: Path) -> dict[str, Concept]:
    """All concepts by normalised hexcode, without flags, hair and skin components."""
    with fetch(NAMES, cache) as archive:
        entries = read_json(archive, "en/data.json")
    return {
        normal(e["hexcode"]): Concept(
            hexcode=e["hexcode"], name=e["label"].replace("’", "'"), keywords=tuple(e.get("tags", ()))
        )
        for e in entries
        if e.get("group") not in {None, FLAGS, COMPONENTS}
    }


def slug(text: str) -> str:
    """Letters and digits only, so that 'Face with tears' and 'face-with-tears' meet."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


# -- drawings ----------------------------------------------------------------------------------


def on_white(image: Image.Image, size: int) -> Image.Image:
    """A transparent drawing laid on a white square of `size` pixels."""
    image = image.convert("RGBA")
    side = max(image.size)
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG drawn on white at `size` pixels."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=svg, width=size * SUPERSAMPLING, height=size * SUPERSAMPLING, dpi=96)
    return on_white(Image.open(io.BytesIO(bytes(png))), size)


def drawings(style: str, archive: tarfile.TarFile, by_slug: dict[str, str]) -> Iterator[tuple[str, str | bytes]]:
    """(normalised hexcode, SVG text or picture bytes) of each drawing whose concept is known."""
    if style == "fluent-3d":
        for member in archive.getmembers():
            if member.name.endswith(".webp"):
                file = archive.extractfile(member)
                assert file is not None
                yield normal(Path(member.name).stem), file.read()
        return
    icons = read_json(archive, "icons.json")
    try:
        codes = {name: normal(code) for code, name in read_json(archive, "chars.json").items()}
    except DataError:  # a set that lists names only
        codes = {}
    for name, icon in icons["icons"].items():
        code = codes.get(name) or by_slug.get(slug(name))
        if code is None:
            continue
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        yield code, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def name_index(concepts: dict[str, Concept], cache: Path) -> dict[str, str]:
    """Slug → hexcode, from the labels and from the icon names of the sets that list both."""
    index = {slug(c.name): code for code, c in concepts.items()}
    for style in ("noto", "twemoji", "fluent-flat"):
        with fetch(STYLES[style], cache) as archive:
            for code, name in read_json(archive, "chars.json").items():
                if normal(code) in concepts:
                    index.setdefault(slug(name), normal(code))
    return index


# -- the data set ------------------------------------------------------------------------------


def draw_style(
    style: str, size: int, concepts: dict[str, Concept], by_slug: dict[str, str], cache: Path
) -> list[Picture]:
    """Every picture of one style, without blanks and exact repeats, in order of hexcode."""
    package = STYLES[style]
    with fetch(package, cache) as archive:
        found = {code: art for code, art in drawings(style, archive, by_slug) if code in concepts}

    def draw(item: tuple[str, str | bytes]) -> tuple[Concept, Image.Image]:
        code, art = item
        image = rasterise(art, size) if isinstance(art, str) else on_white(Image.open(io.BytesIO(art)), size)
        return concepts[code], image

    pictures, seen = [], set()
    with ThreadPoolExecutor() as pool:
        drawn = pool.map(draw, sorted(found.items()))
        for concept, image in track(drawn, description=f"{style:12}", total=len(found)):
            raw = image.tobytes()
            if raw in seen or min(raw) > 250:
                continue
            seen.add(raw)
            pictures.append(
                Picture.from_image(
                    image,
                    name=concept.name,
                    keywords=concept.keywords,
                    style=style,
                    hexcode=concept.hexcode,
                    split=split_of(concept.hexcode),
                    licence=package.licence,
                    source=f"{package.name}@{package.version}",
                )
            )
    return pictures


def make_emoji(folder: Path, *, size: int = 64, styles: Sequence[str] = (), cache: Path) -> Path:
    """Write the emoji data set, one Parquet file a style; files already there are kept.

    Args:
        folder: where the Parquet files go.
        size: side of the pictures in pixels.
        styles: names of `STYLES`; empty means all.
        cache: folder for the fetched packages.

    Raises:
        DataError: an unknown style, or a package that cannot be fetched or is not the pinned one.
    """
    wanted = styles or tuple(STYLES)
    for style in wanted:
        if style not in STYLES:
            raise DataError(f"unknown style {style!r}; allowed: {', '.join(STYLES)}")
    missing = [style for style in wanted if not (folder / f"{style}.parquet").exists()]
    if missing:
        import resvg_py  # noqa: F401 — before anything is fetched

        concepts = read_concepts(cache)
        by_slug = name_index(concepts, cache)
        for style in missing:
            write_parquet(draw_style(style, size, concepts, by_slug, cache), folder / f"{style}.parquet")
    return folder
