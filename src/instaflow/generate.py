"""Prompts → pictures: the public API.

from instaflow import InstaFlow
InstaFlow.load().generate("a red apple", seed=7).save("apple.png")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instaflow import __version__
from instaflow.errors import PromptError
from instaflow.images import save_png, to_png, to_uint8
from instaflow.models.request import Blend, Control, LoRA
from instaflow.noise import Walk, noise
from instaflow.runtime.engine import Engine
from instaflow.runtime.loading import load_engine

LARGEST_SEED = 2**63 - 1
REMEMBERED = 64  # encoded prompts, or batches of them
MANY = 100  # pictures from which on drawing several together is worth the half second that it takes to prepare


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
    seed2: int | None = None
    mix: float = 0.0
    """Where the noise lies between that of `seed` and that of `seed2`."""
    prompt2: str = ""
    prompt_mix: float = 0.0
    """Where the words lie between `prompt` and `prompt2`."""
    negative: str = ""
    lora: str = ""
    """Name and scale of each LoRA that counts."""
    control: str = ""
    """Name and scale of each control that counts."""
    engine: str = ""
    """What drew it, and in which precision."""
    blocked: bool = False
    """The bundle's own safety checker objected, and the picture is black."""

    @property
    def metadata(self) -> dict[str, str]:
        """A PNG's text chunks: all that the picture is a function of."""
        text = {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "model": self.model,
            "steps": str(self.steps),
            "guidance": f"{self.guidance:g}",
            "software": f"InstaFlow {__version__}",
        }
        if self.seed2 is not None:
            text |= {"seed2": str(self.seed2), "mix": repr(self.mix)}
        if self.prompt2:
            text |= {"prompt2": self.prompt2, "prompt mix": repr(self.prompt_mix)}
        if self.engine:
            text["engine"] = self.engine
        if self.negative:
            text["negative prompt"] = self.negative
        if self.lora:
            text["lora"] = self.lora
        if self.control:
            text["control"] = self.control
        if self.blocked:
            text["blocked"] = "by the model's safety checker"
        return text

    def png(self) -> bytes:
        """A PNG whose text chunks hold the prompt, seed and model."""
        return to_png(self.image, self.metadata)

    def save(self, path: str | Path) -> Path:
        """Write `png`; whole or not at all.

        Raises:
            PromptError: the path says another format.
        """
        if Path(path).suffix.lower() != ".png":
            raise PromptError(f"{path}: pictures are written as .png")
        save_png(self.image, Path(path), self.metadata)
        return Path(path)


class InstaFlow:
    """A loaded model that draws."""

    def __init__(self, engine: Engine, *, loras: Sequence[LoRA] = ()) -> None:
        """Wrap an engine, whose bundle has these LoRAs on it."""
        self.engine, self.loras = engine, loras
        # words met again are not read again; with them goes the scale of each LoRA, which may be on the text encoder
        self._states = lru_cache(REMEMBERED)(lambda prompts, scales: engine.encode(prompts))

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        lora: str | Path | Sequence[str | Path] = (),
        device: str = "cpu",
        safety: bool = True,
        engine: str | None = None,
        precision: str | None = None,
        decoder: str | Path | None = None,
        compiled: bool = False,
    ) -> InstaFlow:
        """Load a model.

        Args:
            model: a bundle folder, ours or a diffusers one; a hub id; a Stable Diffusion 1.x .safetensors
                file. None loads the default model that comes with the package.
            lora: a LoRA or several to put on it, each a .safetensors file or a hub id, its scale behind it if that is
                not 1: 'style.safetensors=0.7'. `generate` takes a scale of all.
            device: torch device; the CPU engine is for 'cpu'.
            safety: run the model's own safety checker, when it has one.
            engine: 'openvino', a one-step model's fast way on a CPU, or 'torch', every model's on every device.
                None takes the first where it can.
            precision: of OpenVINO bf16 or f32, of torch float32, bfloat16 or float16. None leaves it to the engine:
                bf16 where the processor has it, float16 on CUDA.
            decoder: a tiny decoder in place of the model's own: a folder or hub id of diffusers' AutoencoderTiny, or
                what a decoder stage made.
            compiled: draw by torch, compiled for each size of picture, which takes a minute or two and pays where many
                are drawn; on CUDA they replay as graphs.

        Raises:
            BundleError: no such model, LoRA or engine, it cannot be read, or the one is not for the other.
        """
        options: dict[str, Any] = {"device": device, "safety": safety, "engine": engine, "precision": precision}
        loras = [LoRA.read(text) for text in ([lora] if isinstance(lora, str | Path) else lora)]
        return cls(load_engine(model, loras=loras, decoder=decoder, compiled=compiled, **options), loras=loras)

    def generate(
        self,
        prompt: str | Blend,
        *,
        seed: int | Walk = 0,
        style: str | None = None,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        lora_scale: float | Sequence[float] = 1.0,
        control: Sequence[Control] = (),
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
            control=control,
        )
        return next(drawings)

    def generate_many(
        self,
        prompts: Sequence[str | Blend],
        *,
        seeds: Sequence[int | Walk],
        style: str | None = None,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        lora_scale: float | Sequence[float] = 1.0,
        control: Sequence[Control] = (),
        together: int | None = None,
    ) -> Iterator[Drawing]:
        """Draw one picture a prompt; everything is checked before the first is drawn.

        Each picture is a function of its own prompt and seed: on one machine and engine the same bytes alone or in
        any batch.

        Args:
            prompts: what to draw; a `Blend` is between two prompts, and is drawn singly.
            seeds: one a prompt, 0 ≤ seed < 2⁶³, or a `Walk` from one to another; its beginning is the first seed.
            style: one of the model's styles; None leaves it to the model.
            size: side in pixels; None takes the model's own.
            steps: network evaluations a picture; None takes the model's own (1 for a one-step model).
            guidance: classifier-free guidance; None takes the model's own.
            negative: what guidance leads away from; needs guidance above 1.
            lora_scale: how much of the LoRAs counts, times the scale of each, or a number for each of them; 0 is the
                model without them.
            control: ControlNets with their pictures, added up; their networks are of `engine.load_control`.
            together: pictures drawn at once, the engine's batch at most; None draws them singly where they are few.

        Raises:
            PromptError: an empty or too long prompt, a negative seed, an unknown style, or a size,
                steps or guidance that this kind of model cannot do; a scale without a LoRA.
        """
        card = self.engine.card
        steps = card.steps if steps is None else steps
        guidance = card.guidance if guidance is None else guidance
        size = card.image_size if size is None else size
        self.engine.check(steps=steps, guidance=guidance, size=size, negative=negative, control=control)
        if style is not None and style not in card.styles:
            raise PromptError(f"unknown style {style!r}; {card.name!r} knows: {', '.join(card.styles) or 'none'}")
        if lora_scale != 1.0 and not self.loras:
            raise PromptError(f"lora_scale={lora_scale} is for a LoRA, and {card.name!r} was loaded without one")
        if lora_scale != 1.0 and not hasattr(self.engine, "bundle"):
            raise PromptError(f"lora_scale={lora_scale}: {self.engine.name} has its LoRAs fused; load it at that scale")
        scales = lora_scale if isinstance(lora_scale, Sequence) else [lora_scale] * len(self.loras)
        if len(scales) != len(self.loras):
            raise PromptError(f"lora_scale={lora_scale} is not allowed; use one number, or {len(self.loras)}")
        if not np.isfinite(scales).all():
            raise PromptError(f"lora_scale={lora_scale} is not allowed; use finite numbers, usually 0 to 1")
        for between in (x for x in [*seeds, *prompts] if isinstance(x, Walk | Blend)):
            if not 0 <= between.mix <= 1:
                raise PromptError(f"mix={between.mix:g} is not allowed; use 0 to 1")
        seeds = [s.seed if isinstance(s, Walk) and s.mix == 0 else s for s in seeds]
        for seed in (n for s in seeds for n in (s[:2] if isinstance(s, Walk) else [s])):
            if not isinstance(seed, int):
                raise PromptError(f"seed={seed!r} is not allowed; use a whole number")
            if not 0 <= seed <= LARGEST_SEED:
                raise PromptError(f"seed={seed} is not allowed; use 0 to {LARGEST_SEED}")
        styled = f", {style}" if style else ""
        texts = [
            Blend(p.prompt + styled, p.prompt2 + styled, p.mix) if isinstance(p, Blend) else f"{p}{styled}"
            for p in prompts
        ]
        ends = [end for p in [*prompts, *texts] for end in (p[:2] if isinstance(p, Blend) else [p])]
        for text in dict.fromkeys([*ends, *([negative] if negative else [])]):
            self.engine.check_prompt(text)
        texts = [p.prompt if isinstance(p, Blend) and p.mix == 0 else p for p in texts]
        return self._draw(texts, seeds, steps, guidance, size, negative, scales, control, together)

    def _draw(
        self,
        prompts: Sequence[str | Blend],
        seeds: Sequence[int | Walk],
        steps: int,
        guidance: float,
        size: int,
        negative: str,
        lora_scales: Sequence[float],
        control: Sequence[Control],
        together: int | None,
    ) -> Iterator[Drawing]:
        engine, rows = self.engine, list(zip(prompts, seeds, strict=True))
        options: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative}
        loras = [lora._replace(scale=s * lora.scale) for s, lora in zip(lora_scales, self.loras, strict=True)]
        scaled = bool(loras) and hasattr(engine, "bundle")  # torch's; on the CPU engine they are fused
        if scaled:
            from instaflow.models.lora import set_lora_scales
        if control:
            options["control"] = control
        together = min(engine.batch, together or (engine.batch if len(rows) >= MANY else 1))
        if any(isinstance(p, Blend) for p in prompts):
            together = 1
        if size != engine.card.image_size:
            together = 1  # at 32 pixels one default picture in some 64 rounded differently among 16
        engine.prepare(together, size)
        for first in range(0, len(rows), together):
            texts, numbers = zip(*rows[first : first + together], strict=True)
            if scaled:
                set_lora_scales(engine.bundle, [lora.scale for lora in loras])  # type: ignore[attr-defined]
            start = time.perf_counter()
            states = self._encode(texts, tuple(lora.scale for lora in loras))
            latents = engine.sample(noise(numbers, engine.latent_shape(size)), states, **options)
            decoded = engine.decode(latents)
            with np.errstate(invalid="ignore"):
                pixels = to_uint8(decoded)
            latency_ms = 1000 * (time.perf_counter() - start) / len(texts)
            for i, (prompt, seed) in enumerate(zip(texts, numbers, strict=True)):
                # before any safety checker: a black picture of NaN is broken, not unsafe
                for values, what in ((latents[i], "its U-Net"), (decoded[i], "its autoencoder")):
                    if not np.isfinite(values).all():
                        raise PromptError(
                            f"{engine.card.name!r} drew NaN for {prompt!r}: "
                            f"{what}'s weights, a LoRA's or the precision are broken"
                        )
                blocked = engine.objects(pixels[i])
                yield Drawing(
                    image=Image.fromarray(np.zeros_like(pixels[i]) if blocked else pixels[i]),
                    prompt=prompt.prompt if isinstance(prompt, Blend) else prompt,
                    prompt2=prompt.prompt2 if isinstance(prompt, Blend) else "",
                    prompt_mix=prompt.mix if isinstance(prompt, Blend) else 0.0,
                    **(seed._asdict() if isinstance(seed, Walk) else {"seed": seed}),
                    model=engine.card.name,
                    steps=steps,
                    guidance=guidance,
                    latency_ms=latency_ms,
                    negative=negative,
                    lora=", ".join(lora.name for lora in loras if lora.scale),
                    control=", ".join(f"{c.name} at {c.scale:g}" for c in control if c.scale),
                    engine=engine.name,
                    blocked=blocked,
                )

    def _encode(self, prompts: Sequence[str | Blend], scales: tuple[float, ...]) -> Any:
        """Token states of prompts, or of the one `Blend`, under LoRAs at these scales."""
        blend = prompts[0]
        if not isinstance(blend, Blend):
            different = tuple(dict.fromkeys(str(p) for p in prompts))
            return self._states(different, scales)[[different.index(str(p)) for p in prompts]]
        here, there = (self._states((text,), scales) for text in blend[:2])
        return here + blend.mix * (there - here)
