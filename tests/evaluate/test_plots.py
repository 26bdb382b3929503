"""Plots: the right picture in the right place, readable sizes, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.errors import DataError
from instaflow.evaluate.plots import CELL, DOTS_PER_INCH, bars, gallery, grid

COLOURS = np.array([[200, 0, 0], [0, 160, 0], [0, 0, 220], [230, 160, 0], [150, 0, 200]], np.uint8)
SIDE = round(CELL * DOTS_PER_INCH)


def flat(colours: np.ndarray, side: int = 16) -> np.ndarray:
    """One picture of a single colour each, uint8 (N, side, side, 3)."""
    return np.broadcast_to(colours[:, None, None], (len(colours), side, side, 3)).copy()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def centre(page: np.ndarray, colour: np.ndarray) -> tuple[float, float]:
    """Mean (row, column) of a colour; its area must be about one picture."""
    where = np.argwhere((page == colour).all(axis=-1))
    assert len(where) == pytest.approx(SIDE**2, rel=0.05)
    row, column = where.mean(axis=0)
    return float(row), float(column)


def test_grid_puts_a_model_in_a_row_and_a_prompt_in_a_column(tmp_path: Path) -> None:
    rows = {"teacher": flat(COLOURS[:2]), "one step, costs $5": flat(COLOURS[2:4], side=40)}
    page = pixels(
        grid(rows, ["a red apple", "дуже довгий опис, що не вміщується в один рядок"], tmp_path / "new/grid.png")
    )
    (top, left), (top2, right), (bottom, left2), (bottom2, right2) = (centre(page, c) for c in COLOURS[:4])
    assert [top, bottom, left, right] == pytest.approx([top2, bottom2, left2, right2], abs=1)
    assert bottom - top == pytest.approx(right - left, abs=2)
    assert bottom - top > SIDE
    assert (page[: int(top - SIDE / 2) - 3, int(left) - SIDE // 2 :] < 128).any()  # captions above
    assert (page[:, : int(left - SIDE / 2) - 3] < 128).any()  # labels to the left


def test_gallery_breaks_after_its_columns(tmp_path: Path) -> None:
    page = pixels(gallery(flat(COLOURS), ["a", "b", "c", "d", "e"], tmp_path / "gallery.png", columns=3))
    places = [centre(page, c) for c in COLOURS]
    assert [p[0] for p in places[:3]] == pytest.approx([places[0][0]] * 3, abs=1)
    assert places[3][0] > places[0][0] + SIDE
    assert [p[1] for p in places[3:]] == pytest.approx([p[1] for p in places[:2]], abs=1)


def test_long_and_empty_captions_stay_on_the_page(tmp_path: Path) -> None:
    path = gallery(flat(COLOURS[:2]), ["word " * 200, ""], tmp_path / "gallery.png")
    page = pixels(path)
    assert page.shape[0] < 2 * SIDE
    assert (page[[0, -1]] == 255).all()
    assert (page[:, [0, -1]] == 255).all()


def test_bars_grow_with_the_value(tmp_path: Path) -> None:
    path = bars({"small": (10, 9, 11), "large, with a long name $x": (20, 15, 25)}, "Distance", tmp_path / "bars.png")
    blue = (pixels(path) == [0x5B, 0x7F, 0xA6]).all(axis=-1)
    widths = blue.sum(axis=1)
    upper, lower = widths[: len(widths) // 2].max(), widths[len(widths) // 2 :].max()
    assert lower / upper == pytest.approx(2, rel=0.1)
    assert (tmp_path / "bars.pdf") == bars({"a": (0.0, -0.1, 0.1)}, "KID", tmp_path / "bars.pdf", label="KID")
    assert (tmp_path / "bars.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "never.png"
    with pytest.raises(DataError, match="at least one row"):
        grid({}, [], path)
    with pytest.raises(DataError, match=r"teacher: expected uint8 \(2,"):
        grid({"teacher": flat(COLOURS)}, ["a", "b"], path)
    with pytest.raises(DataError, match="uint8"):
        gallery(flat(COLOURS) / 255, list("abcde"), path)
    with pytest.raises(DataError, match="inside its interval"):
        bars({"a": (3, 1, 2)}, "t", path)
    with pytest.raises(DataError, match="no bars"):
        bars({}, "t", path)
    assert not path.exists()
