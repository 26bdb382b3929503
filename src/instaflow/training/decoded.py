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
        """Where each sample is cut, {'corner': (B, 2)}; nothing when all is decoded."""
        if not 0 < self.crop < self.side:
            return {}
        places = draw.own(draw.uniform(2 * count).reshape(count, 2))
        return {"corner": (places * (self.side - self.crop + 1)).long()}

    def __call__(self, out: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Scalar distance of latents out and target, (B, C, h, w)."""
        if "corner" in batch:
            out, target = self.cut(out, batch["corner"]), self.cut(target, batch["corner"])
        with torch.no_grad():
            wanted = decode_latents(self.vae, target)
        distance: Tensor = self.distance(decode_latents(self.vae, out), wanted)
        return distance

    def cut(self, z: Tensor, corner: Tensor) -> Tensor:
        """The square of each sample that begins at its corner (row, column)."""
        size = self.crop
        return torch.stack([s[:, y : y + size, x : x + size] for s, (y, x) in zip(z, corner.tolist(), strict=True)])
