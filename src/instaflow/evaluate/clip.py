"""CLIP score: how well pictures show their prompts (Hessel et al. 2021), as a cosine, not times 100 or 2.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from instaflow.errors import DataError


class ClipScore:
    """Cosine between CLIP's embeddings of a picture and its prompt, by transformers.

    Args:
        source: a folder or hub id of a CLIP model with its tokenizer and image processor.
        device: where it runs.

    Raises:
        DataError: no such model here or on the hub.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(source, dtype=torch.float32)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.processor: Any = CLIPImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot load CLIP {source}: {str(error).splitlines()[0][:200]}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray, prompts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """(N,) cosines of pictures, uint8 (N, H, W, 3), and their prompts."""
        scores = []
        for i in track(range(0, len(pictures), batch_size), "CLIP score", disable=len(pictures) < 1000):
            some = [Image.fromarray(p) for p in pictures[i : i + batch_size]]
            pixels = self.processor(images=some, return_tensors="pt").pixel_values.to(self.device)
            text = list(prompts[i : i + batch_size])
            tokens = self.tokenizer(text, padding=True, truncation=True, max_length=77, return_tensors="pt")
            out = self.model(pixel_values=pixels, **tokens.to(self.device))
            scores.append((out.image_embeds * out.text_embeds).sum(-1).float().cpu().numpy())  # both of length 1
        return np.concatenate(scores)
