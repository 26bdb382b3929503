"""Stage: a ControlNet for a one-step model, by distillation's loss at t = 0: min E |X₁ − X₀ − v(X₀, 0 | T, c)|².

X₁ are latents of real pictures, X₀ any noise, c what controls a drawing of that picture. The model alone cannot tell
which X₁ is meant by X₀; the control can, so what the branch learns is to follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from instaflow.data.controls import control_picture
from instaflow.data.pictures import Picture
from instaflow.images import save_grid
from instaflow.models.bundle import Bundle
from instaflow.models.control import ControlledUNet
from instaflow.models.sampling import one_step
from instaflow.recipe import Control
from instaflow.training.batches import TextCache
from instaflow.training.trainer import Batch, Draw, Stage


def control_stage(
    spec: Control, bundle: Bundle, branch: ControlNetModel, pictures: Sequence[Picture], latents: Tensor
) -> Stage:
    """The control's batches and loss.

    Args:
        spec: the stage's recipe.
        bundle: the one-step model; it is not trained.
        branch: the ControlNet that is.
        pictures: captioned pictures.
        latents: theirs, (N, C, h, w).
    """
    encode, size, count = TextCache(bundle.encode), bundle.card.image_size, spec.train.batch_size
    fixed = None if spec.control == "inpaint" else [control_picture(spec.control, p.pixels(size)) for p in pictures]

    def control(i: int, draw: Draw) -> np.ndarray:
        if fixed is not None:
            return fixed[i]
        top, left = (draw.python.randrange(size // 2) for _ in range(2))
        bottom, right = (start + draw.python.randrange(size // 4, size // 2 + 1) for start in (top, left))
        return control_picture("inpaint", pictures[i].pixels(size), (top, left, bottom, right))

    def batch(draw: Draw) -> Batch:
        chosen = draw.indices(len(pictures), count)
        captions = [pictures[i].caption(draw.python) for i in chosen]
        captions = ["" if draw.python.random() < spec.empty_prompts else c for c in captions]
        x0 = draw.normal(count, *latents.shape[1:])
        seen = np.stack(draw.own([control(i, draw) for i in chosen]))  # type: ignore[type-var]
        return {
            "x1": latents[draw.own(chosen)],
            "x0": draw.own(x0),
            "states": encode(draw.own(captions)),
            "control": torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 255,
        }

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        unet: Any = partial(network, pictures=batch["control"])
        out = one_step(unet, bundle, batch["x0"], batch["states"])  # InstaFlow, Alg. 2, with the control
        return (out.float() - batch["x1"]).square().mean()

    def preview(network: nn.Module, path: Path) -> None:
        """Controls above what the network draws."""
        shown = batch(Draw(0, 0))
        few = {k: v[: 16 if size <= 128 else 4].to(bundle.device) for k, v in shown.items()}
        with torch.inference_mode():
            unet: Any = partial(network, pictures=few["control"])
            out = one_step(unet, bundle, few["x0"], few["states"])
        seen = (255 * few["control"]).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        save_grid(np.concatenate([seen, bundle.decode(out)]), path, columns=len(seen))

    return Stage(network=ControlledUNet(bundle.unet, branch), batch=batch, loss=loss, preview=preview)
