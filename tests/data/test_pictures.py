"""Pictures and captions from Parquet and folders; every mistake is one clear line."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.data.pictures import Picture, content_hash, read_pictures, write_parquet
from instaflow.errors import DataError


def coloured(colour: object, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def picture(name: str = "tomato", colour: str = "red", **fields: object) -> Picture:
    return Picture.from_image(coloured(colour), name=name, **fields)


def message(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def folder_of(tmp_path: Path, **captions: str) -> Path:
    for name, caption in captions.items():
        coloured("red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    return tmp_path


# -- folders -----------------------------------------------------------------------------------


def test_a_folder_gives_every_picture_its_caption(tmp_path: Path) -> None:
    folder_of(tmp_path, b="a blue door\n", a="ein Käse")
    (tmp_path / "notes.md").write_text("not a picture")
    found = read_pictures(tmp_path)
    assert [p.name for p in found] == ["ein Käse", "a blue door"]
    assert [Path(p.source).name for p in found] == ["a.png", "b.png"]
    assert (found[0].pixels(32) == (255, 0, 0)).all()


def test_folders_test_and_validation_are_those_splits(tmp_path: Path) -> None:
    folder_of(tmp_path, a="x")
    for split in ("validation", "test", "drafts"):
        (tmp_path / split).mkdir()
        folder_of(tmp_path / split, b=split)
    assert [(p.name, p.split) for p in read_pictures(tmp_path)] == [
        ("x", "train"),
        ("validation", "validation"),
        ("test", "test"),
    ]
    assert [p.name for p in read_pictures(tmp_path, split="test")] == ["test"]


def test_a_missing_caption_names_the_file_that_is_expected(tmp_path: Path) -> None:
    (folder_of(tmp_path, a="x", b="y") / "b.txt").unlink()
    with pytest.raises(DataError) as error:
        read_pictures(tmp_path)
    assert str(tmp_path / "b.png") in message(error) and "b.txt" in message(error)


def test_an_empty_caption_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, a=" \n ")
    with pytest.raises(DataError) as error:
        read_pictures(tmp_path)
    assert str(tmp_path / "a.txt") in message(error) and "empty" in message(error)


def test_a_caption_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (folder_of(tmp_path, a="x") / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as error:
        read_pictures(tmp_path)
    assert str(tmp_path / "a.txt") in message(error) and "UTF-8" in message(error)


def test_an_empty_folder_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pictures in .*\.png"):
        read_pictures(tmp_path)


@pytest.mark.parametrize("source", ["nothing-here", "no/such/folder", "data.csv"])
def test_a_source_that_is_nothing_says_what_may_be_given(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_pictures(f"{tmp_path}/{source}")
    assert source in message(error) and ".parquet" in message(error)


# -- Parquet -----------------------------------------------------------------------------------


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    pictures = [
        picture(
            "tomato", "red", keywords=("fruit", "vegetable"), style="noto", hexcode="1F345", licence="MIT", source="a"
        ),
        picture("sky", "blue", split="test", source="b"),
    ]
    path = write_parquet(pictures, tmp_path / "deep" / "file.parquet")
    assert read_pictures(path) == pictures
    assert [p.name for p in path.parent.iterdir()] == ["file.parquet"]


def test_pictures_without_keywords_survive_parquet(tmp_path: Path) -> None:
    assert read_pictures(write_parquet([picture(source="a")], tmp_path / "f.parquet")) == [picture(source="a")]


@pytest.mark.parametrize(
    ("split", "styles", "names"),
    [
        (None, (), ["a", "b", "c"]),
        ("train", (), ["a", "b"]),
        ("train", ("noto",), ["a"]),
        (None, ("noto", "flat"), ["a", "b", "c"]),
    ],
)
def test_split_and_styles_select(tmp_path: Path, split: str | None, styles: tuple[str, ...], names: list[str]) -> None:
    pictures = [picture("a", style="noto"), picture("b", style="flat"), picture("c", style="flat", split="test")]
    path = write_parquet(pictures, tmp_path / "f.parquet")
    assert [p.name for p in read_pictures(path, split=split, styles=styles)] == names


def test_an_unknown_style_lists_the_known_ones(tmp_path: Path) -> None:
    path = write_parquet([picture(style="noto"), picture(style="flat")], tmp_path / "f.parquet")
    with pytest.raises(DataError) as error:
        read_pictures(path, styles=["oil"])
    assert "'oil'" in message(error) and "flat, noto" in message(error)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    path = write_parquet([picture()], tmp_path / "f.parquet")
    with pytest.raises(DataError, match="no pictures with split 'test'"):
        read_pictures(path, split="test")


@pytest.mark.parametrize("content", [b"", b"PAR1 this is no Parquet file PAR1"])
def test_a_damaged_parquet_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_pictures(path)
    assert str(path) in message(error)


def test_a_truncated_parquet_names_the_file(tmp_path: Path) -> None:
    path = write_parquet([picture()] * 20, tmp_path / "f.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError) as error:
        read_pictures(path)
    assert str(path) in message(error)


def test_a_parquet_without_pictures_names_the_row_and_the_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"picture": b"x", "words": "tomato"}]), tmp_path / "f.parquet")
    with pytest.raises(DataError) as error:
        read_pictures(tmp_path / "f.parquet")
    assert "f.parquet:0" in message(error) and "picture (bytes), words (str)" in message(error)


def test_other_peoples_columns_are_understood(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = picture().image
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": raw, "path": None}, "text": "a fox"}]), tmp_path / "f.parquet"
    )
    [found] = read_pictures(tmp_path / "f.parquet")
    assert (found.image, found.name, found.split) == (raw, "a fox", "train")


# -- pixels ------------------------------------------------------------------------------------


def test_transparent_becomes_white_and_half_transparent_half_white() -> None:
    image = coloured((255, 0, 0, 0), mode="RGBA")
    image.paste((255, 0, 0, 255), (0, 0, 16, 32))
    image.paste((0, 0, 0, 51), (16, 0, 32, 16))
    pixels = Picture.from_image(image, name="x").pixels(32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels[8, 8].tolist() == [255, 0, 0]
    assert pixels[8, 24].tolist() == [204, 204, 204]
    assert pixels[24, 24].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "I;16"])
def test_every_mode_of_picture_becomes_rgb(mode: str) -> None:
    image = coloured("white").convert(mode) if mode != "I;16" else coloured(65535, mode="I;16")
    assert Picture.from_image(image, name="x").pixels(16).shape == (16, 16, 3)


def test_a_wide_picture_is_cut_at_its_centre() -> None:
    image = coloured("red", (96, 32))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    assert (Picture.from_image(image, name="x").pixels(32) == (0, 0, 255)).all()


def test_a_picture_is_resized() -> None:
    assert (picture().pixels(8) == (255, 0, 0)).all() and picture().pixels(8).shape == (8, 8, 3)


def test_bytes_that_are_no_picture_name_the_picture() -> None:
    with pytest.raises(DataError) as error:
        Picture(image=b"no picture at all", name="tomato", source="somewhere").pixels(32)
    assert "'tomato'" in message(error) and "somewhere" in message(error)


def test_no_damage_to_a_png_gets_past_as_another_error() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, format="PNG")
    whole, rng = buffer.getvalue(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole[: rng.randrange(1, len(whole))] if rng.random() < 0.5 else whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            Picture(image=bytes(damaged), name="x").pixels(32)
        except DataError:
            refused += 1
    assert refused > 150


# -- captions ----------------------------------------------------------------------------------


def test_a_caption_is_a_function_of_the_generators_state() -> None:
    tomato = picture(keywords=("fruit", "vegetable"), style="noto")
    draws = [[tomato.caption(rng) for _ in range(50)] for rng in (random.Random(3), random.Random(3), random.Random(4))]
    assert draws[0] == draws[1] != draws[2]


def test_captions_hold_the_name_keywords_and_style_and_nothing_else() -> None:
    tomato = picture(keywords=("fruit", "vegetable"), style="noto")
    rng = random.Random(0)
    drawn = {tomato.caption(rng) for _ in range(500)}
    words = ["tomato", "fruit", "vegetable", "tomato, fruit", "tomato, vegetable"]
    assert drawn == {*words, *(f"{w}, noto" for w in words)}


def test_without_keywords_and_style_the_caption_is_the_name() -> None:
    rng = random.Random(0)
    assert {picture().caption(rng) for _ in range(50)} == {"tomato"}


# -- identity ----------------------------------------------------------------------------------


def test_the_content_hash_sees_pictures_captions_styles_and_order() -> None:
    a, b = picture("a"), picture("b")
    hashes = [
        content_hash(p)
        for p in ([a, b], [b, a], [a], [a, picture("b", "blue")], [a, picture("c")], [a, picture("b", style="noto")])
    ]
    assert len(set(hashes)) == len(hashes)
    assert content_hash([picture("a"), picture("b")]) == hashes[0]
