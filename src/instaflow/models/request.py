"""What a model can be asked for: prompts it can read, steps, guidance and sizes, controls. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instaflow.errors import PromptError
from instaflow.images import read_picture
from instaflow.models.card import Card

Tokens = Callable[[str], Sequence[tuple[int, int, bool]]]
"""Where each token of a text begins and ends in it, start and end tokens included, and whether its encoder knows it."""


def check_prompt(prompt: str, tokens: Tokens, limit: int) -> None:
    """Raise PromptError for an empty prompt, one of more than `limit` tokens, or one with no word that is known."""
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt is a str, got {prompt!r}")
    if not prompt.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in prompt):
        raise PromptError(f"the prompt {prompt!r} is no text in UTF-8")
    if not prompt.strip():
        raise PromptError("the prompt is empty; say what to draw, for example 'a red apple'")
    found = tokens(prompt)
    if len(found) > limit:
        end = found[limit - 2][1]
        read = " ".join(prompt[max(0, end - 30) : end].split())
        raise PromptError(
            f"the prompt has {len(found)} tokens and this model reads {limit}: "
            f"it would stop after '…{read}'; shorten it"
        )
    if not any(known for begin, end, known in found if end > begin):
        raise PromptError(f"the model's text encoder knows no sign of {prompt[:40]!r}; say it in words, in English")


def check_request(card: Card, unit: int, *, steps: int, guidance: float, size: int, negative: str = "") -> None:
    """Raise PromptError for what this kind of model cannot do; a size is a multiple of `unit` pixels."""
    if not 1 <= steps <= 1000 or (card.kind == "one-step" and steps != 1):
        allowed = "1" if card.kind == "one-step" else "1 to 1000"
        raise PromptError(f"steps={steps} is not allowed for the {card.kind} model {card.name!r}; allowed: {allowed}")
    if not 1 <= guidance <= card.max_guidance:
        allowed = "1" if card.max_guidance == 1 else f"1 to {card.max_guidance:g}"
        raise PromptError(
            f"guidance={guidance:g} is not allowed for the {card.kind} model {card.name!r}; allowed: {allowed}"
        )
    if negative and guidance == 1.0:
        baked = "this model has it baked in"
        rest = baked if card.max_guidance == 1 else f"allowed: up to {card.max_guidance:g}"
        raise PromptError(f"a negative prompt works through guidance, and guidance is 1; {rest}")
    if size < unit or size % unit or size > 4 * card.image_size:
        raise PromptError(
            f"size={size} is not allowed; use a multiple of {unit} from {unit} to {4 * card.image_size}, "
            f"best {card.image_size}"
        )


class Blend(NamedTuple):
    """Words between two prompts: on the line from the one's token states to the other's."""

    prompt: str
    prompt2: str
    mix: float
    """0 is `prompt`, 1 is `prompt2`."""


class LoRA(NamedTuple):
    """A LoRA that is asked for, and how much of it."""

    source: str
    """A .safetensors file or a hub id."""
    scale: float = 1.0

    @classmethod
    def read(cls, text: str | Path) -> LoRA:
        """'style.safetensors=0.7', or without a scale, which is then 1.

        Raises:
            PromptError: the scale is not finite.
        """
        source, _, number = str(text).rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            return cls(str(text))
        if not source or not math.isfinite(scale):
            raise PromptError(f"{text} is not allowed; use FILE or FILE=SCALE, usually 0 to 1")
        return cls(source, scale)

    @property
    def name(self) -> str:
        """'style at 0.7'."""
        return f"{Path(self.source).stem} at {self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet with what it shall do in one drawing."""

    network: Any
    """What its engine's `load_control` gave."""
    name: str = "control"
    """What a picture's metadata calls it."""
    image: Image.Image
    """As the ControlNet was trained to see it: white lines on black for edges. Resized to the drawing's size, its sides
    each on their own, by Lanczos."""
    scale: float = 1.0
    """How much of it counts; 0 is the model without it."""
    start: float = 0.0
    """The first moment at which it counts, as a share of the way from noise to picture."""
    end: float = 1.0
    """Where it no longer counts; 1 is to the end."""

    def __post_init__(self) -> None:
        """Raise PromptError for a window that is none."""
        if not 0 <= self.start < self.end <= 1:
            raise PromptError(f"start={self.start:g}, end={self.end:g} is no window; use 0 <= start < end <= 1")
        if not np.isfinite(self.scale):
            raise PromptError(f"scale={self.scale} is not allowed; use a finite number")

    def pixels(self, height: int, width: int) -> np.ndarray:
        """The picture in [0, 1], fp32 (1, 3, height, width)."""
        image = self.image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        pixels: np.ndarray = np.array(image, np.float32).transpose(2, 0, 1)[None] / 255
        return pixels


def read_image(path: str | Path) -> Image.Image:
    """A control picture from a file, what is transparent black.

    Raises:
        PromptError: there is none, or it is no picture.
    """
    try:
        return read_picture(Path(path), ground="black")
    except FileNotFoundError as error:
        raise PromptError(f"no such control picture: {path}") from error
    except ValueError as error:
        raise PromptError(f"unreadable control picture {path}: {error}") from error
