"""A perceptual distance of latents: decoded, whole or one random square of each, then compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents
from instaflow.models.perceptual import load_perceptual
from instaflow.recipe import OnPairs
from instaflow.training.memory import can_checkpoint
from instaflow.training.trainer import Batch, Draw


class DecodedDistance:
    """Distance of the pictures that two latents stand for, with a gradient to the first.

    Decoding a picture of 512 pixels for its gradient takes gigabytes; a square of it takes its share.
    Both latents are cut alike before the decoder, whose view is nearly local.
    """

    def __init__(self, spec: OnPairs, bundle: Bundle) -> None:
        """Load the network that compares; with checkpointing the decoder keeps fewer activations."""
        self.vae, self.crop = bundle.vae, spec.perceptual_crop
        self.side = bundle.latent_shape()[-1]
        self.distance: Any = load_perceptual(spec.perceptual).to(bundle.device)
        if spec.train.gradient_checkpointing and can_checkpoint(self.vae):
            self.vae.enable_gradient_checkpointing()  # type: ignore[operator]

    def batch(self, draw: Draw, count: int) -> Batch:
        """Where each sample is cut; nothing when all is decoded."""
        return corners(draw, count, self.side, self.crop)

    def __call__(self, out: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Scalar distance of latents out and target, (B, C, h, w)."""
        out, target = cut(out, batch, self.crop), cut(target, batch, self.crop)
        with torch.no_grad():
            wanted = decode_latents(self.vae, target)
        distance: Tensor = self.distance(decode_latents(self.vae, out), wanted)
        return distance


def corners(draw: Draw, count: int, side: int, crop: int) -> Batch:
    """{'corner': (B, 2)}, row and column where squares of `crop` latents begin; nothing where all `side` are taken."""
    if not 0 < crop < side:
        return {}
    places = draw.own(draw.uniform(2 * count).reshape(count, 2))
    return {"corner": (places * (side - crop + 1)).long()}


def cut(z: Tensor, batch: Batch, crop: int) -> Tensor:
    """The square of each sample that begins at its corner, or all of it."""
    if "corner" not in batch:
        return z
    places = batch["corner"].tolist()
    return torch.stack([s[:, y : y + crop, x : x + crop] for s, (y, x) in zip(z, places, strict=True)])
