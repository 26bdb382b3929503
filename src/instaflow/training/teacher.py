"""Stage: the teacher, Stable Diffusion in miniature. Denoise latents of captioned pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from instaflow.data.pictures import Picture
from instaflow.flow import interpolate, like, unet_time, velocity_target
from instaflow.images import save_grid
from instaflow.models.bundle import Bundle
from instaflow.models.sampling import sample
from instaflow.recipe import Teacher
from instaflow.training.batches import TextCache
from instaflow.training.trainer import Batch, Draw, Stage


def teacher_stage(spec: Teacher, bundle: Bundle, pictures: Sequence[Picture], latents: Tensor) -> Stage:
    """The teacher's batches and loss.

    Args:
        spec: the stage's recipe.
        bundle: the untrained U-Net with its autoencoder, text encoder and schedule.
        pictures: for the captions.
        latents: their latents, (N, C, h, w).
    """
    encode = TextCache(bundle.encode)
    alphas = bundle.scheduler.alphas_cumprod.sqrt()
    sigmas = (1 - bundle.scheduler.alphas_cumprod).sqrt()

    def batch(draw: Draw) -> Batch:
        count = spec.train.batch_size
        chosen = draw.indices(len(pictures), count)
        captions = [pictures[i].caption(draw.python) for i in chosen]
        captions = ["" if draw.python.random() < spec.empty_prompts else c for c in captions]
        return {
            "x1": latents[draw.own(chosen)],
            "x0": draw.own(draw.normal(count, *latents.shape[1:])),
            "u": draw.own(draw.uniform(count)),
            "states": encode(draw.own(captions)),
        }

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        x1, x0, u = batch["x1"], batch["x0"], batch["u"]
        if spec.prediction == "velocity":
            x, target, time = interpolate(x0, x1, u), velocity_target(x0, x1), unet_time(u)
        else:
            time = (u * len(alphas)).long()
            a, b = like(alphas.to(u.device)[time], x1), like(sigmas.to(u.device)[time], x1)
            x = a * x1 + b * x0
            target = x0 if spec.prediction == "epsilon" else a * x0 - b * x1
        out = network(x, time, batch["states"]).sample
        return (out.float() - target).square().mean()

    spread = pictures[:: max(1, len(pictures) // 32)]
    return Stage(network=bundle.unet, batch=batch, loss=loss, preview=prompt_preview(bundle, [p.name for p in spread]))


def prompt_preview(
    bundle: Bundle, prompts: Sequence[str], *, steps: int | None = None
) -> Callable[[nn.Module, Path], None]:
    """A grid of the same prompts and noises, drawn by the network in training: 32 of them, 4 large ones."""
    prompts = prompts[: 32 if bundle.card.image_size <= 128 else 4]

    def preview(_network: nn.Module, path: Path) -> None:
        latents = sample(
            bundle,
            prompts,
            seeds=range(len(prompts)),
            steps=steps or bundle.card.steps,
            guidance=bundle.card.guidance,
        )
        save_grid(bundle.decode(latents), path)

    return preview
