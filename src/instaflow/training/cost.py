"""What a recipe costs, in images and in forward passes of the U-Net: the same count on a laptop and a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from instaflow.recipe import Autoencoder, Distil, Evaluate, Pairs, Recipe, Reflow, Stage, Teacher, kind

TRAINING_STEP = 3  # forward passes that one image costs in training: forward, and backward twice its work


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One stage's bill."""

    stage: str
    kind: str
    images: int
    """Pictures trained on or drawn."""
    forwards: int
    """U-Net forward passes (of the autoencoder for that stage), training steps counted three times."""
    storage_mb: float
    """What is kept of it: pairs."""


def cost(stage: Stage, recipe: Recipe) -> Cost:
    """Images, forward passes and storage of one stage."""
    storage = 0.0
    match stage:
        case Autoencoder() | Teacher() | Reflow() | Distil():
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
        case Pairs():
            images = stage.count
            forwards = images * stage.steps * (2 if stage.guidance > 1 else 1)
            channels = next((s.latent_channels for s in recipe.stages if isinstance(s, Autoencoder)), 4)
            storage = images * channels * (recipe.data.size // 8) ** 2 * 2 / 1e6
        case Evaluate():
            images = 2 * stage.count * len(stage.models)
            forwards = 2 * stage.count * sum(int(m.partition("@")[2] or 1) for m in stage.models)
    return Cost(stage=stage.name, kind=kind(stage), images=images, forwards=forwards, storage_mb=round(storage, 1))
