"""What draws: the one interface of the engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instaflow.models.card import Card
from instaflow.models.request import Control


class Engine(Protocol):
    """A loaded bundle that turns noise into pictures. Noise, latents and pictures are numpy arrays, fp32."""

    @property
    def card(self) -> Card:
        """The bundle's."""
        ...

    @property
    def name(self) -> str:
        """What runs, and in which precision: 'openvino bf16'."""
        ...

    @property
    def batch(self) -> int:
        """Pictures worth drawing together; each is, to the bit, what it would be alone."""
        ...

    def check(self, *, steps: int, guidance: float, size: int, negative: str, control: Sequence[Control] = ()) -> None:
        """Raise PromptError for what this model cannot do."""
        ...

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for a prompt that it cannot read."""
        ...

    def prepare(self, count: int, size: int, networks: Sequence[Any] = ()) -> None:
        """Make ready for so many pictures of this size, under these controls: what takes time and is no picture's own.

        Args:
            count: pictures drawn together.
            size: side in pixels.
            networks: what `load_control` gave.
        """
        ...

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) of one picture of `size` pixels."""
        ...

    def encode(self, prompts: Sequence[str]) -> Any:
        """Token states of B prompts, in the engine's own kind of array."""
        ...

    def load_control(self, folder: Path) -> Any:
        """A ControlNet, as `Control.network` wants it; raises BundleError where this engine or model cannot."""
        ...

    def sample(
        self,
        x0: np.ndarray,
        states: Any,
        *,
        steps: int,
        guidance: float,
        negative: str,
        control: Sequence[Control] = (),
    ) -> np.ndarray:
        """Latents (B, C, h, w) from noise X₀ of the same shape; one step is X₀ + v(X₀, 0 | T)."""
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, 3, H, W), nominally in [−1, 1]."""
        ...

    def objects(self, pixels: np.ndarray) -> bool:
        """Whether the bundle's own safety checker, when it is on, objects to a picture, uint8 (H, W, 3)."""
        ...
