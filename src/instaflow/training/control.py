"""Stage: a ControlNet for a one-step model, by distillation's loss at t = 0: min E |X₁ − X₀ − v(X₀, 0 | T, c)|².

X₁ are a teacher's latents, of pairs, or real pictures'; X₀ is any noise, c what controls a drawing of that picture. The
model alone cannot tell which X₁ is meant by X₀; the control can, so what the branch learns is to follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from instaflow.data.controls import control_picture
from instaflow.data.pairs import PairReader
from instaflow.data.pictures import Picture
from instaflow.images import save_grid
from instaflow.models.bundle import Bundle
from instaflow.models.control import ControlledUNet
from instaflow.models.sampling import one_step
from instaflow.recipe import Control
from instaflow.training.batches import TextCache
from instaflow.training.trainer import Batch, Draw, Stage

Drawn = tuple[list[str], Tensor, Tensor, Sequence[np.ndarray]]  # captions, X₁, X₀, and X₁'s pixels
Source = Callable[[Draw, int], Drawn]


def from_pictures(pictures: Sequence[Picture], latents: Tensor, size: int) -> Source:
    """Captioned pictures of `size` pixels and their latents (N, C, h, w), each beside any noise."""

    def some(draw: Draw, count: int) -> Drawn:
        chosen = draw.indices(len(pictures), count)
        captions = [pictures[i].caption(draw.python) for i in chosen]
        x0, own = draw.normal(count, *latents.shape[1:]), draw.own(chosen)
        return draw.own(captions), latents[own], draw.own(x0), [pictures[i].pixels(size) for i in own]

    return some


def from_pairs(pairs: PairReader, bundle: Bundle) -> Source:
    """What pairs' latents show, each beside any noise: beside its own, the model knows X₁ without the control."""

    def some(draw: Draw, count: int) -> Drawn:
        chosen = pairs.batch(draw.seed, draw.step, count, draw.part)
        x1 = chosen.x1.float()
        with torch.inference_mode():
            pixels = bundle.decode(x1.to(bundle.device))
        return chosen.prompts, x1, draw.own(draw.normal(count, *x1.shape[1:])), pixels

    return some


def control_stage(spec: Control, bundle: Bundle, branch: ControlNetModel, source: Source) -> Stage:
    """The control's batches and loss.

    Args:
        spec: the stage's recipe.
        bundle: the one-step model; it is not trained.
        branch: the ControlNet that is.
        source: what it learns from.
    """
    encode, size, count = TextCache(bundle.encode), bundle.card.image_size, spec.train.batch_size

    def hole(draw: Draw) -> tuple[int, int, int, int]:
        top, left = (draw.python.randrange(size // 2) for _ in range(2))
        bottom, right = (start + draw.python.randrange(size // 4, size // 2 + 1) for start in (top, left))
        return top, left, bottom, right

    def batch(draw: Draw) -> Batch:
        captions, x1, x0, pixels = source(draw, count)
        dropped = draw.own([draw.python.random() < spec.empty_prompts for _ in range(count)])
        holes = draw.own([hole(draw) for _ in range(count)])  # type: ignore[type-var]
        seen = np.stack([control_picture(spec.control, p, where) for p, where in zip(pixels, holes, strict=True)])
        return {
            "x1": x1,
            "x0": x0,
            "states": encode(["" if drop else c for c, drop in zip(captions, dropped, strict=True)]),
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
