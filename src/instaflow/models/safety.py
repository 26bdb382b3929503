"""A bundle's own safety checker, as Stable Diffusion's bundles carry one: which pictures it objects to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from instaflow.errors import BundleError


class SafetyChecker:
    """Stable Diffusion's CLIP-based checker with its feature extractor."""

    def __init__(self, network: Any, extractor: Any) -> None:
        """Wrap the two, loaded."""
        self.network, self.extractor = network, extractor

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> SafetyChecker:
        """From a bundle's safety_checker/ and feature_extractor/.

        Raises:
            BundleError: either is missing or unreadable.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessorPil

        try:
            network = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", use_safetensors=True)
            extractor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(f"cannot load the safety checker of {folder}: {reason[:200]}") from error
        return cls(network.eval().to(device), extractor)

    @torch.inference_mode()
    def objects(self, pictures: np.ndarray) -> list[bool]:
        """Whether it objects to each of (B, H, W, 3) uint8 pictures."""
        shown = self.extractor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
        device = next(self.network.parameters()).device
        # the checker blackens what it is given; a copy is given, and only its verdict taken
        _, verdicts = self.network(images=[p.copy() for p in pictures], clip_input=shown.to(device))
        return [bool(v) for v in verdicts]
