"""The engine that every bundle has: torch, as in training, on any of its devices and in any number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle
from instaflow.models.card import Card
from instaflow.models.control import controlled, load_control
from instaflow.models.networks import decode_latents
from instaflow.models.request import Control
from instaflow.models.sampling import integrate


@dataclass(frozen=True)
class TorchEngine:
    """A bundle's networks, one picture at a time: batched matrix products round differently with the batch's size."""

    bundle: Bundle
    compiled: bool = False
    _ready: set[int] = field(default_factory=set)  # sizes that are compiled

    @classmethod
    def of(cls, bundle: Bundle, precision: str | None = None, *, compiled: bool = False) -> TorchEngine:
        """With its networks in this precision, and compiled if so wished.

        Args:
            bundle: the model; its networks are changed.
            precision: float32, bfloat16 or float16; None takes float16 on CUDA and float32 elsewhere.
            compiled: by torch.compile for each size of picture drawn, on CUDA as graphs; that takes a minute or two.

        Raises:
            BundleError: another precision, or a model of several steps to be compiled: guidance keeps what a graph's
                next run writes over.
        """
        if compiled and bundle.card.kind != "one-step":
            raise BundleError(f"compiling is for a model of one step, and {bundle.card.name!r} is {bundle.card.kind}")
        if precision is None:
            precision = "float16" if bundle.device.type == "cuda" else "float32"
        if precision not in ("float32", "bfloat16", "float16"):
            raise BundleError(f"precision {precision!r} is not to be had; allowed: float32, bfloat16, float16")
        if precision != "float32":
            for network in (bundle.unet, bundle.vae, bundle.text_encoder):
                nn.Module.to(network, getattr(torch, precision))  # diffusers' own warns of nothing
        if compiled:
            parts: list[Any] = [bundle.unet, bundle.vae.decoder, bundle.text_encoder]
            for part in parts:
                part.compile(mode="reduce-overhead", dynamic=False)
        return cls(bundle, compiled)

    @property
    def batch(self) -> int:
        """One."""
        return 1

    @property
    def card(self) -> Card:
        """The bundle's."""
        return self.bundle.card

    @property
    def name(self) -> str:
        """'torch float32 on cpu'."""
        weights = next(self.bundle.unet.parameters())
        kind = str(weights.dtype).removeprefix("torch.") + ", compiled" * self.compiled
        return f"torch {kind} on {weights.device}"

    def check(self, *, steps: int, guidance: float, size: int, negative: str, control: Sequence[Control] = ()) -> None:
        """Raise PromptError for what this model cannot do."""
        self.bundle.check_request(steps=steps, guidance=guidance, size=size, negative=negative)

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for a prompt that it cannot read."""
        self.bundle.check_prompt(prompt)

    def prepare(self, count: int, size: int, networks: Sequence[Any] = ()) -> None:
        """Compile, where that was wished: the first runs compile and record what later ones replay.

        Raises:
            BundleError: there is no compiler here, or it fails.
        """
        if not self.compiled or size in self._ready:
            return
        x0 = np.zeros((1, *self.latent_shape(size)), np.float32)
        try:
            for _ in range(3):
                self.decode(self.sample(x0, self.encode(["a"]), steps=1, guidance=1.0, negative=""))
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BundleError(f"cannot compile {self.card.name!r}: {reason}; it draws uncompiled too") from error
        self._ready.add(size)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) of one picture of `size` pixels."""
        return self.bundle.latent_shape(size)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token states (B, L, D), a copy: what a graph gives is written over when it runs again."""
        with self._autocast():
            return self.bundle.encode(prompts).clone()

    def _autocast(self) -> torch.autocast:
        """For networks in half precision: noise, times and sums stay in fp32."""
        kind = next(self.bundle.unet.parameters()).dtype
        return torch.autocast(self.bundle.device.type, kind, enabled=kind != torch.float32)

    @torch.inference_mode()
    def sample(
        self,
        x0: np.ndarray,
        states: Tensor,
        *,
        steps: int,
        guidance: float,
        negative: str,
        control: Sequence[Control] = (),
    ) -> np.ndarray:
        """Latents (B, C, h, w) from noise, by the model's own sampler, under these controls."""
        noise = torch.from_numpy(x0).to(self.bundle.device)
        with self._autocast():
            latents = integrate(
                controlled(self.bundle, control), noise, states, steps=steps, guidance=guidance, negative=negative
            )
        array: np.ndarray = latents.float().cpu().numpy()
        return array

    def load_control(self, folder: Path) -> Any:
        """A ControlNet, as `Control.network` wants it; raises BundleError where it does not fit."""
        return load_control(folder, self.bundle, self.card.weights)

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, 3, H, W), nominally in [−1, 1]."""
        with self._autocast():
            pictures = decode_latents(self.bundle.vae, torch.from_numpy(latents).to(self.bundle.device))
        array: np.ndarray = pictures.float().cpu().numpy()
        return array

    def objects(self, pixels: np.ndarray) -> bool:
        """Whether the bundle's own safety checker objects to a picture, uint8 (H, W, 3)."""
        return self.bundle.safety is not None and bool(self.bundle.safety.objects(pixels[None])[0])
