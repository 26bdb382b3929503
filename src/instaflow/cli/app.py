"""What the verbs share: the app, its kinds of parameters, and quiet libraries."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter, Token

from instaflow import __version__
from instaflow.errors import DataError, PromptError

app = App(
    name="instaflow",
    version=__version__,
    help="Text to image in one network evaluation, and the whole way to make such a model.",
    help_format="markdown",
    help_epilogue="Start with: instaflow generate 'a red apple'",
    suppress_keyboard_interrupt=False,
)


def whole(_type: type, tokens: Sequence[Token]) -> int:
    """The library's own reading rounds 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise PromptError(f"{tokens[0].keyword}={tokens[0].value} is not allowed; use a whole number") from None


Whole = Annotated[int, Parameter(converter=whole)]
Device = Annotated[str, Parameter(help="cpu, or where torch is to draw: cuda, mps.")]
Engine = Annotated[
    str | None,
    Parameter(
        name=["--engine", "-e"],
        help="openvino (a one-step model on a CPU) or torch; left out, the faster one that can.",
    ),
]
Precision = Annotated[
    str | None,
    Parameter(help="Of openvino bf16 or f32, of torch float32, bfloat16 or float16; left out, the engine's own."),
]
Compiled = Annotated[
    bool,
    Parameter(
        name="--compile",
        negative="",
        help="Draw by torch, compiled for each size of picture: a minute or two, then faster; CUDA graphs on a GPU.",
    ),
]
Root = Annotated[Path, Parameter(help="Where run folders go.")]
Cache = Annotated[Path, Parameter(help="Where data sets and fetched packages go.")]


def hush() -> None:
    """Before they are imported, tell the libraries to keep their own bars and notes to themselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_writable(out: Path) -> None:
    """Raise DataError where a file cannot be written, before the work that it is to hold; its folder is made."""
    part = out.with_name(f"{out.name}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise DataError(f"--out {out} cannot be written: {error.filename}: {error.strerror}") from error


def check_free(out: Path) -> None:
    """Raise DataError where something lies already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out} is there already; name a folder that is not")
