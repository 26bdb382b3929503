"""Plots of a report: picture grids, a gallery, distance bars. PNG or PDF, by the path's suffix."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instaflow.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, GAP = 1.3, 0.08  # inches: a picture's side and the space beside it
FONT = 8  # points
LINE = 1.3 * FONT / 72  # inches from one line of text to the next
LETTERS = 20  # that fit under one picture
DOTS_PER_INCH = 150


def grid(rows: Mapping[str, np.ndarray], captions: Sequence[str], path: Path) -> Path:
    """Side by side: a labelled row per model, a column per prompt, the prompt above its column.

    Args:
        rows: model name → uint8 (N, H, W, 3); the sizes may differ between rows.
        captions: N prompts.
        path: the picture to write.

    Raises:
        DataError: no rows, or a row that has not one picture a caption.
    """
    if not rows:
        raise DataError("a picture grid needs at least one row")
    for name, pictures in rows.items():
        _check(pictures, captions, name)
    texts, labels = [_wrap(c) for c in captions], [_wrap(name, 17) for name in rows]
    left, top = 1.45, GAP + LINE * max(len(t.split("\n")) for t in texts)
    figure = _page(left + len(captions) * (CELL + GAP), top + GAP + len(rows) * (CELL + GAP))
    for column, text in enumerate(texts):
        _text(figure, text, left + column * (CELL + GAP) + CELL / 2, top, va="bottom")
    for row, (label, pictures) in enumerate(zip(labels, rows.values(), strict=True)):
        y = top + GAP / 2 + row * (CELL + GAP)
        _text(figure, label, left - 2 * GAP, y + CELL / 2, ha="right", va="center", weight="bold")
        for column, picture in enumerate(pictures):
            _picture(figure, picture, left + column * (CELL + GAP), y)
    return _save(figure, path)


def gallery(images: np.ndarray, captions: Sequence[str], path: Path, columns: int = 8) -> Path:
    """Pictures, uint8 (N, H, W, 3), with their captions under them.

    Raises:
        DataError: not one picture a caption, or none.
    """
    _check(images, captions, "gallery")
    texts = [_wrap(c) for c in captions]
    columns = min(columns, len(texts))
    lines = [max(len(t.split("\n")) for t in texts[i : i + columns]) for i in range(0, len(texts), columns)]
    tops = np.cumsum([GAP] + [CELL + 2 * GAP + LINE * n for n in lines])
    figure = _page(GAP + columns * (CELL + GAP), float(tops[-1]))
    for i, (picture, text) in enumerate(zip(images, texts, strict=True)):
        x, y = GAP + i % columns * (CELL + GAP), float(tops[i // columns])
        _picture(figure, picture, x, y)
        _text(figure, text, x + CELL / 2, y + CELL + GAP / 2, va="top")
    return _save(figure, path)


def bars(
    values: Mapping[str, tuple[float, float, float]],
    title: str,
    path: Path,
    label: str = "Fréchet distance on Lite0 features (lower is better)",
) -> Path:
    """A bar a model with its interval: name → (value, low, high), in the given order, the first on top.

    Raises:
        DataError: nothing to draw, or a value outside its interval.
    """
    if not values:
        raise DataError(f"no bars to draw for {title!r}")
    for name, (value, low, high) in values.items():
        if not low <= value <= high:
            raise DataError(f"{name}: the value must be inside its interval, got {value} and {low}…{high}")
    point, low, high = np.array(list(values.values()), float).T
    figure = _page(6.5, 1.2 + 0.42 * len(values))
    axes = figure.add_subplot()
    places = np.arange(len(values))
    axes.barh(places, point, height=0.62, color="#5b7fa6", edgecolor="#22364d")
    axes.errorbar(point, places, xerr=[point - low, high - point], fmt="none", ecolor="black", capsize=3)
    for place, p, end in zip(places, point, high, strict=True):
        number = f"{p:,.1f}" if p >= 100 else f"{p:#.3g}"
        axes.annotate(number, (max(end, 0.0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [_wrap(name, 28) for name in values], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, 1.1 * low.min()), 1.15 * max(high.max(), 1e-9))
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("tight")
    return _save(figure, path)


def curves(
    series: Mapping[str, Sequence[Sequence[float]]], path: Path, *, x: str, y: str, logarithmic: bool = False
) -> Path:
    """A line a model through its points (x, y, low, high), the interval shaded; a single point is a dotted level.

    Raises:
        DataError: nothing to draw.
    """
    if not any(series.values()):
        raise DataError(f"no points to draw over {x}")
    figure = _page(6.5, 4.2)
    axes = figure.add_subplot()
    styles = itertools.product(("o", "s", "^", "D"), ("-", "--"))  # told apart in print too
    levels: list[tuple[float, str]] = []
    for (name, points), (marker, line) in zip(series.items(), itertools.cycle(styles), strict=False):
        xs, ys, low, high = np.array(points, float).T
        if len(xs) == 1:
            axes.axhline(ys[0], linestyle=":", color="0.3")
            levels.append((ys[0], name))
            continue
        [drawn] = axes.plot(xs, ys, marker=marker, linestyle=line, markersize=4, label=name.replace("$", r"\$"))
        axes.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    low, high = axes.get_ylim()
    for level, names in _together(levels, (high - low) / 30):
        axes.annotate(names, (1, level), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=8, parse_math=False)  # fmt: skip
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = sorted({p[0] for points in series.values() for p in points})
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y, parse_math=False)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.set_layout_engine("tight")
    return _save(figure, path)


def _together(levels: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Labels by their level, from the top; those less than `gap` under the one above share its line."""
    found: list[tuple[float, str]] = []
    for level, name in sorted(levels, reverse=True):
        if found and found[-1][0] - level < gap:
            found[-1] = (found[-1][0], f"{found[-1][1]}, {name}")
        else:
            found.append((level, name))
    return found


def _page(width: float, height: float) -> Figure:
    """An empty page in inches; a bare Figure draws with Agg and leaves no global state behind."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")


def _picture(figure: Figure, picture: np.ndarray, x: float, y: float) -> None:
    """Draw one picture with its top left corner at (x, y) inches from the page's top left."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, 1 - (y + CELL) / height, CELL / width, CELL / height))
    axes.imshow(picture, interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.8", linewidth=0.5)


def _text(figure: Figure, text: str, x: float, y: float, **style: str) -> None:
    """Text with its anchor at (x, y) inches from the page's top left, centred there unless told."""
    width, height = figure.get_size_inches()
    options: dict[str, Any] = {"ha": "center", "fontsize": FONT, "parse_math": False} | style
    figure.text(x / width, 1 - y / height, text, **options)


def _wrap(text: str, letters: int = LETTERS) -> str:
    return "\n".join(textwrap.wrap(text, letters, max_lines=4, placeholder=" …")) or " "


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _check(pictures: np.ndarray, captions: Sequence[str], name: str) -> None:
    shape = pictures.shape
    if pictures.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0] or shape[0] != len(captions):
        raise DataError(f"{name}: expected uint8 ({len(captions)}, H, W, 3), got {pictures.dtype} {shape}")
