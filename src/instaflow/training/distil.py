"""Stage: one-step distillation (InstaFlow, Alg. 2), min E D(X₁, X₀ + v(X₀, 0 | T)), t fixed at 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.flow import euler
from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents
from instaflow.models.perceptual import PerceptualDistance
from instaflow.models.velocity import network_velocity
from instaflow.recipe import Distil
from instaflow.training.batches import TextCache, pair_batch
from instaflow.training.trainer import Batch, Draw, Stage


def distil_stage(spec: Distil, bundle: Bundle, pairs: PairReader) -> Stage:
    """Distillation's batches and loss: L2 on latents, or a perceptual distance on decoded pictures."""
    encode = TextCache(bundle.encode)
    perceptual = PerceptualDistance().to(bundle.device) if spec.loss == "perceptual" else None

    def batch(draw: Draw) -> Batch:
        return pair_batch(pairs, encode, draw, spec.train.batch_size)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        velocity = network_velocity(network, bundle.card.prediction, bundle.schedule, batch["states"])
        out = euler(velocity, batch["x0"], steps=1)  # InstaFlow, Alg. 2
        error = (out.float() - batch["x1"]).square().mean()
        if perceptual is None:
            return error
        with torch.no_grad():
            target = decode_latents(bundle.vae, batch["x1"])
        return error + spec.perceptual_weight * perceptual(decode_latents(bundle.vae, out), target)

    return Stage(network=bundle.unet, batch=batch, loss=loss)
