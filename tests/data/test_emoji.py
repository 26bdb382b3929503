"""Fetching, naming and drawing the emoji, without the network: the packages are made here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.data import emoji
from instaflow.data.emoji import (
    Concept,
    Package,
    concept_group,
    fetch,
    normal,
    on_white,
    rasterise,
    read_json,
    slug,
    split_of,
)
from instaflow.data.pictures import read_pictures
from instaflow.errors import DataError

SQUARE = '<rect x="0" y="0" width="16" height="16" fill="{}"/>'


def svg(colour: str, box: str = "0 0 16 16") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{SQUARE.format(colour)}</svg>'


def packed(cache: Path, name: str, members: dict[str, bytes]) -> Package:
    """A package as it would lie in the cache, pinned to its true hash."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name.replace('@', '').replace('/', '-')}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return Package(name=name, version="1.0.0", integrity=f"sha512-{digest}", licence="MIT")


@pytest.fixture(autouse=True)
def no_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **options: object) -> None:
        raise AssertionError("asked npm")

    monkeypatch.setattr(subprocess, "run", run)


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [
        ("2764-FE0F", "2764"),
        ("1F345", "1f345"),
        ("1F3F3-FE0F-200D-1F308", "1f3f3-200d-1f308"),
        ("0023-FE0F-20E3", "0023-20e3"),
    ],
)
def test_normal_drops_the_presentation_selector(hexcode: str, expected: str) -> None:
    assert normal(hexcode) == expected
    assert normal(normal(hexcode)) == expected


def test_slug_meets_spellings() -> None:
    assert slug("Face with tears") == slug("face-with_tears") == "facewithtears"


@pytest.mark.parametrize(
    "variants",
    [
        ["1F468-200D-1F692", "1F469-200D-1F692", "1F9D1-200D-1F692"],  # firefighter: man, woman, person
        ["1F6B6", "1F6B6-200D-2642-FE0F", "1F6B6-200D-2640-FE0F"],  # person, man, woman walking
        ["1F468", "1F469", "1F9D1"],
        ["1F468-200D-2764-FE0F-200D-1F468", "1F469-200D-2764-FE0F-200D-1F468"],  # couples
        ["2764-FE0F", "2764"],
    ],
)
def test_variants_of_one_concept_share_a_group_and_so_a_split(variants: list[str]) -> None:
    assert len({concept_group(v) for v in variants}) == 1
    assert len({split_of(v) for v in variants}) == 1


def test_different_concepts_are_different_groups() -> None:
    codes = ["1F468-200D-1F692", "1F468-200D-1F33E", "1F345", "2764", "1F6B6", "1F468"]
    assert len({concept_group(c) for c in codes}) == len(codes)


def test_splits_never_change() -> None:
    # Pictures of a test concept must stay unseen by models trained years ago.
    expected = {"1F345": "train", "1F34E": "train", "1F600": "validation", "2600-FE0F": "validation", "1F98A": "test"}
    assert {code: split_of(code) for code in expected} == expected


def test_splits_have_their_shares() -> None:
    drawn = [split_of(f"{code:x}") for code in range(0x1F300, 0x1F300 + 5000)]
    shares = [drawn.count(split) / len(drawn) for split in ("train", "validation", "test")]
    np.testing.assert_allclose(shares, [0.82, 0.04, 0.14], atol=0.02)


# -- pictures ----------------------------------------------------------------------------------


def test_on_white_fills_what_is_transparent() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = np.asarray(on_white(image, 8))
    assert (pixels[:, :4] == (0, 0, 255)).all() and (pixels[:, 4:] == 255).all()


def test_on_white_centres_what_is_not_square() -> None:
    pixels = np.asarray(on_white(Image.new("RGB", (8, 4), "red"), 8))
    assert (pixels[2:6] == (255, 0, 0)).all()
    assert (pixels[:2] == 255).all() and (pixels[6:] == 255).all()


def test_an_svg_is_drawn_in_its_colour_at_its_size() -> None:
    image = rasterise(svg("#10a020"), 24)
    assert image.size == (24, 24) and image.mode == "RGB"
    assert (np.asarray(image) == (0x10, 0xA0, 0x20)).all()


def test_an_svg_is_drawn_in_its_place_on_white() -> None:
    pixels = np.asarray(rasterise(svg("red", "0 0 32 16"), 32)).astype(int)
    assert pixels[16, 4].tolist() == [255, 0, 0]  # the left half of the drawing
    assert pixels[16, 28].tolist() == [255, 255, 255]
    assert pixels[2, 4].tolist() == [255, 255, 255]  # above it: a wide drawing is centred


# -- packages ----------------------------------------------------------------------------------


def test_a_cached_package_is_checked_and_opened_without_npm(tmp_path: Path) -> None:
    package = packed(tmp_path, "@some/package", {"icons.json": b'{"a": 1}'})
    with fetch(package, tmp_path) as archive:
        assert read_json(archive, "icons.json") == {"a": 1}


def test_a_package_with_another_hash_is_refused_and_removed(tmp_path: Path) -> None:
    package = packed(tmp_path, "@some/package", {"icons.json": b"{}"})
    path = tmp_path / "some-package-1.0.0.tgz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        fetch(package, tmp_path)
    text = str(error.value)
    assert "@some/package@1.0.0" in text and str(path) in text and "\n" not in text
    assert not path.exists()


def test_npm_missing_or_failing_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(name="@some/package", version="1.0.0", integrity="sha512-x")

    def missing(*args: object, **options: object) -> None:
        raise FileNotFoundError("npm")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(DataError, match="npm is not installed"):
        fetch(package, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "404\n"))
    with pytest.raises(DataError, match=r"npm pack @some/package@1.0.0 failed: 404$"):
        fetch(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", [emoji.NAMES, *emoji.STYLES.values()], ids=lambda p: p.name)
def test_every_package_is_pinned_to_a_whole_hash(package: Package) -> None:
    kind, _, digest = package.integrity.partition("-")
    assert kind == "sha512" and len(base64.b64decode(digest, validate=True)) == 64
    assert package.licence in {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert package.url == f"https://www.npmjs.com/package/{package.name}/v/{package.version}"


# -- the data set ------------------------------------------------------------------------------


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three concepts and a flag, drawn by one hand: one by its code, one by its name, one blank, one a repeat."""
    entries = [
        {"hexcode": "1F345", "label": "tomato", "tags": ["fruit"], "group": 4},
        {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
        {"hexcode": "1F533", "label": "white button", "group": 8},
        {"hexcode": "1F534", "label": "red circle", "group": 8},
        {"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "group": 9},
    ]
    bodies = {
        "tomato": "#ff0000",
        "red-heart": "#dd0000",
        "white-button": "#ffffff",
        "red-circle": "#ff0000",
        "flag": "#000000",
    }
    icons = {"width": 16, "height": 16, "icons": {n: {"body": SQUARE.format(c)} for n, c in bodies.items()}}
    chars = {"1f345": "tomato", "1f1e9-1f1ea": "flag", "1f533": "white-button", "1f534": "red-circle"}
    members = {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}
    cache = tmp_path / "cache"
    monkeypatch.setattr(emoji, "NAMES", packed(cache, "names", {"en/data.json": json.dumps(entries).encode()}))
    styles = {name: packed(cache, f"@drawn/{name}", members) for name in ("noto", "twemoji", "fluent-flat")}
    monkeypatch.setattr(emoji, "STYLES", styles)
    return cache


def test_concepts_leave_out_flags(small_world: Path) -> None:
    concepts = emoji.read_concepts(small_world)
    assert set(concepts) == {"1f345", "2764", "1f533", "1f534"}
    assert concepts["1f345"] == Concept(hexcode="1F345", name="tomato", keywords=("fruit",))


def test_the_data_set_has_every_drawing_once_with_its_concept(small_world: Path, tmp_path: Path) -> None:
    out = emoji.make_emoji(tmp_path / "emoji-16", size=16, styles=("noto",), cache=small_world)
    found = {p.name: p for p in read_pictures(out)}
    assert set(found) == {"tomato", "red heart"}  # the blank and the repeat are left out
    heart = found["red heart"]
    assert (heart.hexcode, heart.keywords, heart.style, heart.licence) == ("2764-FE0F", ("love",), "noto", "MIT")
    assert heart.split == split_of("2764") and heart.source == "@drawn/noto@1.0.0"
    assert (heart.pixels(16) == (0xDD, 0, 0)).all()


def test_a_data_set_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "noto.parquet").write_bytes(b"mine")
    assert emoji.make_emoji(tmp_path, styles=("noto",), cache=tmp_path / "none") == tmp_path
    assert (tmp_path / "noto.parquet").read_bytes() == b"mine"


def test_an_unknown_style_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown style 'oil'; allowed: noto"):
        emoji.make_emoji(tmp_path / "x", styles=("oil",), cache=tmp_path / "cache")


def test_a_package_without_the_file_says_so(tmp_path: Path) -> None:
    with (
        fetch(packed(tmp_path, "p", {"a.json": b"{}"}), tmp_path) as archive,
        pytest.raises(DataError, match=r"no icons\.json"),
    ):
        read_json(archive, "icons.json")
