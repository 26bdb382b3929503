"""What a client may ask for, and the orders that it becomes."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from instaflow.errors import PromptError
from instaflow.generate import LARGEST_SEED, InstaFlow
from instaflow.images import read_picture
from instaflow.models.request import Blend, Control
from instaflow.noise import Walk
from instaflow.serve.batching import Order

FORMATS = ("PNG", "JPEG", "WEBP")
SIZE = re.compile(r"(\d{1,5})x\1")
LoRAScale = Annotated[float, Field(ge=-2, le=2, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one service takes at a time."""

    queue: int = 64
    """Pictures that wait."""
    wait_s: float = 30.0
    """Longest wait for a picture."""
    body_bytes: int = 1 << 20
    body_s: float = 10.0
    """Longest wait for a body."""
    control_pixels: int = 1024
    """A side of a control picture."""


class ControlRequest(BaseModel):
    """What one of the controls is shown."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: str = Field(description="A PNG, JPEG or WebP in base64, as the control was trained to see it")
    scale: float = Field(1.0, ge=0, le=2, strict=True)


class ImageRequest(BaseModel):
    """What the OpenAI client sends, and beside it what a one-step model can be asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(max_length=4000)
    prompt2: str | None = Field(None, max_length=4000, description="Where `mix` leads from `prompt`")
    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=16, strict=True)
    size: str | None = Field(None, max_length=11, description="WIDTHxHEIGHT, square, or auto")
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: str | None = Field(None, max_length=200)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, strict=True)
    seed2: int | None = Field(None, ge=0, le=LARGEST_SEED, strict=True, description="Where `mix` leads from `seed`")
    mix: float = Field(0, ge=0, le=1, strict=True, description="0 is seed and prompt, 1 is seed2 and prompt2")
    style: str | None = Field(None, max_length=100)
    steps: int | None = Field(None, ge=1, le=1000, strict=True)
    guidance: float | None = Field(None, ge=1)
    lora: dict[str, LoRAScale] = Field({}, max_length=100, description="LoRAs by name, each with its scale")
    control: dict[str, ControlRequest] = Field({}, max_length=10, description="Controls by name")


def read_orders(flow: InstaFlow, networks: Mapping[str, Any], body: ImageRequest, limits: Limits) -> list[Order]:
    """One a picture, everything checked: what is queued can be drawn.

    Raises:
        PromptError: something that this model cannot do.
        HTTPException: another model is asked for.
    """
    card = flow.engine.card
    if body.model not in (None, card.name):
        raise HTTPException(404, f"there is no such model here; there is: {card.name}")
    loras = lora_names(flow)
    if body.lora.keys() - loras:
        raise PromptError(f"there is no such lora here; there is: {', '.join(loras) or 'none'}")
    size = card.image_size
    if body.size not in (None, "auto"):
        if not (found := SIZE.fullmatch(body.size or "")):
            raise PromptError(f"size={body.size!a} is not allowed; use WIDTHxHEIGHT with both the same, or auto")
        size = int(found[1])
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    if body.mix and body.seed2 is None and body.prompt2 is None:
        raise PromptError(f"mix={body.mix:g} needs seed2 or prompt2, where it leads")
    for name, number in (("seed", seed), ("seed2", body.seed2 or 0)):
        if number + body.n - 1 > LARGEST_SEED:
            raise PromptError(f"{name}={number} with n={body.n} is not allowed; the last may be {LARGEST_SEED}")
    steps = card.steps if body.steps is None else body.steps
    guidance = card.guidance if body.guidance is None else body.guidance
    options: dict[str, Any] = {"style": body.style, "size": size, "steps": steps, "guidance": guidance}
    seeds = [seed + i if body.seed2 is None else Walk(seed + i, body.seed2 + i, body.mix) for i in range(body.n)]
    prompt = body.prompt if body.prompt2 is None else Blend(body.prompt, body.prompt2, body.mix)
    options["control"] = _controls(networks, body, limits)
    flow.generate_many([prompt], seeds=seeds[:1], **options)  # it checks at once and draws when it is read
    lora = tuple(body.lora.get(name, 0.0) for name in loras)
    return [Order(prompt=prompt, seed=s, lora=lora, **options) for s in seeds]


def _controls(networks: Mapping[str, Any], body: ImageRequest, limits: Limits) -> tuple[Control, ...]:
    if body.control.keys() - networks.keys():
        raise PromptError(f"there is no such control here; there is: {', '.join(networks) or 'none'}")
    found = []
    for name, asked in body.control.items():
        try:
            data = base64.b64decode(asked.image, validate=True)
        except ValueError:
            raise PromptError(f"control.{name}.image: this is no base64") from None
        try:
            image = read_picture(data, ground="black", largest=limits.control_pixels, formats=FORMATS)
        except ValueError as error:
            raise PromptError(f"control.{name}.image: {error}; allowed: {', '.join(FORMATS)}") from None
        found.append(Control(network=networks[name], name=name, image=image, scale=asked.scale))
    return tuple(found)


def lora_names(flow: InstaFlow) -> list[str]:
    """What requests call the model's LoRAs."""
    return [Path(lora.source).stem for lora in flow.loras]
