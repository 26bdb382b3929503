"""Prompts → pictures: the public API.

from instaflow import InstaFlow
InstaFlow.load().generate("a red apple", seed=7).save("apple.png")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instaflow import __version__
from instaflow.errors import PromptError
from instaflow.images import save_png, to_uint8
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.networks import decode_latents
from instaflow.models.sampling import sample

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture and how it came about."""

    image: Image.Image
    prompt: str
    seed: int
    model: str
    steps: int
    guidance: float
    latency_ms: float
    """Text to pixels, the batch's time shared by its pictures."""
    negative: str = ""
    lora: str = ""
    """The LoRA's name and scale, when the model has one."""
    blocked: bool = False
    """The bundle's own safety checker objected, and the picture is black."""

    def save(self, path: str | Path) -> Path:
        """Write a PNG whose text chunks hold the prompt, seed and model; whole or not at all.

        Raises:
            PromptError: the path says another format.
        """
        if Path(path).suffix.lower() != ".png":
            raise PromptError(f"{path}: pictures are written as .png")
        text = {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "model": self.model,
            "steps": str(self.steps),
            "guidance": f"{self.guidance:g}",
            "software": f"InstaFlow {__version__}",
        }
        if self.negative:
            text["negative prompt"] = self.negative
        if self.lora:
            text["lora"] = self.lora
        if self.blocked:
            text["blocked"] = "by the model's safety checker"
        save_png(self.image, Path(path), text)
        return Path(path)


class InstaFlow:
    """A loaded model that draws."""

    def __init__(self, bundle: Bundle, lora: str = "") -> None:
        """Wrap a bundle, which has this LoRA on it."""
        self.bundle, self.lora = bundle, lora

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        lora: str | Path | None = None,
        device: str = "cpu",
        safety: bool = True,
    ) -> InstaFlow:
        """Load a model.

        Args:
            model: a bundle folder, ours or a diffusers one; a hub id; a Stable Diffusion 1.x .safetensors
                file. None loads the default model that comes with the package.
            lora: a LoRA to put on it, a .safetensors file or a hub id; `generate` takes its scale.
            device: torch device.
            safety: run the model's own safety checker, when it has one.

        Raises:
            BundleError: no such model or LoRA, it cannot be read, or the one is not for the other.
        """
        bundle = Bundle.load(model or DEFAULT, device=device, safety=safety)
        if lora is not None:
            from instaflow.models.lora import load_lora  # peft, which nothing else needs

            load_lora(bundle, lora)
        return cls(bundle, Path(lora).stem if lora else "")

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        style: str | None = None,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        lora_scale: float = 1.0,
    ) -> Drawing:
        """Draw one picture. See `generate_many`."""
        drawings = self.generate_many(
            [prompt],
            seeds=[seed],
            style=style,
            size=size,
            steps=steps,
            guidance=guidance,
            negative=negative,
            lora_scale=lora_scale,
        )
        return next(drawings)

    def generate_many(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        style: str | None = None,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        lora_scale: float = 1.0,
    ) -> Iterator[Drawing]:
        """Draw one picture a prompt; everything is checked before the first is drawn.

        Each picture is a function of its own prompt and seed: the same bytes alone or in any batch.

        Args:
            prompts: what to draw.
            seeds: one a prompt, 0 ≤ seed < 2⁶³.
            style: one of the model's styles; None leaves it to the model.
            size: side in pixels; None takes the model's own.
            steps: network evaluations a picture; None takes the model's own (1 for a one-step model).
            guidance: classifier-free guidance; None takes the model's own.
            negative: what guidance leads away from; needs guidance above 1.
            lora_scale: how much of the LoRA counts; 0 is the model without it.

        Raises:
            PromptError: an empty or too long prompt, a negative seed, an unknown style, or a size,
                steps or guidance that this kind of model cannot do; a scale without a LoRA.
        """
        card = self.bundle.card
        steps = card.steps if steps is None else steps
        guidance = card.guidance if guidance is None else guidance
        size = card.image_size if size is None else size
        self.bundle.check_request(steps=steps, guidance=guidance, size=size, negative=negative)
        if style is not None and style not in card.styles:
            raise PromptError(f"unknown style {style!r}; {card.name!r} knows: {', '.join(card.styles) or 'none'}")
        if lora_scale != 1.0 and not self.lora:
            raise PromptError(f"lora_scale={lora_scale:g} is for a LoRA, and {card.name!r} was loaded without one")
        for seed in seeds:
            if not isinstance(seed, int):
                raise PromptError(f"seed={seed!r} is not allowed; use a whole number")
            if not 0 <= seed <= LARGEST_SEED:
                raise PromptError(f"seed={seed} is not allowed; use 0 to {LARGEST_SEED}")
        texts = [f"{p}, {style}" if style else p for p in prompts]
        if negative:
            self.bundle.check_prompt(negative)
        for prompt, text in zip(prompts, texts, strict=True):
            self.bundle.check_prompt(prompt)
            self.bundle.check_prompt(text)
        return self._draw(texts, seeds, steps, guidance, size, negative, lora_scale)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        size: int,
        negative: str,
        lora_scale: float,
    ) -> Iterator[Drawing]:
        # One picture a call of the networks: batched matrix products round differently with the
        # batch's size, and the same inputs must give the same bytes.
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.lora:
                from instaflow.models.lora import set_lora_scale

                set_lora_scale(self.bundle, lora_scale)
            start = time.perf_counter()
            latents = sample(
                self.bundle, [prompt], seeds=[seed], steps=steps, guidance=guidance, size=size, negative=negative
            )
            with torch.inference_mode():
                decoded = decode_latents(self.bundle.vae, latents)
            pixels = to_uint8(decoded)[0]
            latency_ms = 1000 * (time.perf_counter() - start)
            # before any safety checker: a black picture of NaN is broken, not unsafe
            for values, what in ((latents, "its U-Net"), (decoded, "its autoencoder")):
                if not torch.isfinite(values).all():
                    raise PromptError(
                        f"{self.bundle.card.name!r} drew NaN for {prompt!r}: {what}'s weights or precision are broken"
                    )
            blocked = self.bundle.safety is not None and self.bundle.safety.objects(pixels[None])[0]
            yield Drawing(
                image=Image.fromarray(np.zeros_like(pixels) if blocked else np.ascontiguousarray(pixels)),
                prompt=prompt,
                seed=seed,
                model=self.bundle.card.name,
                steps=steps,
                guidance=guidance,
                latency_ms=latency_ms,
                negative=negative,
                lora=f"{self.lora} at {lora_scale:g}" if self.lora else "",
                blocked=blocked,
            )
