"""The engine that every bundle has: torch, as in training, on any of its devices and in any number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    @classmethod
    def of(cls, bundle: Bundle, precision: str | None = None) -> TorchEngine:
        """With its networks in this precision: float32, bfloat16 or float16; None leaves them in float32.

        Raises:
            BundleError: another precision.
        """
        if precision in (None, "float32"):
            return cls(bundle)
        if precision not in ("bfloat16", "float16"):
            raise BundleError(f"precision {precision!r} is not to be had; allowed: float32, bfloat16, float16")
        for network in (bundle.unet, bundle.vae, bundle.text_encoder):
            network.to(getattr(torch, precision))
        return cls(bundle)

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
        return f"torch {str(weights.dtype).removeprefix('torch.')} on {weights.device}"

    def check(self, *, steps: int, guidance: float, size: int, negative: str, control: Sequence[Control] = ()) -> None:
        """Raise PromptError for what this model cannot do."""
        self.bundle.check_request(steps=steps, guidance=guidance, size=size, negative=negative)

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for a prompt that it cannot read."""
        self.bundle.check_prompt(prompt)

    def prepare(self, count: int, size: int, networks: Sequence[Any] = ()) -> None:
        """Nothing."""

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) of one picture of `size` pixels."""
        return self.bundle.latent_shape(size)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token states (B, L, D)."""
        with self._autocast():
            return self.bundle.encode(prompts)

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
