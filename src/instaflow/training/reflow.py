"""Stage: text-conditioned reflow (InstaFlow, Alg. 1), min E‖(X₁ − X₀) − v(X_t, t | T)‖².

With `loss = "lpips-huber"` the distance is t·Huber(X₁ − X₀, v) + LPIPS(X₁, X_t + (1−t)·v), Lee et al. 2024
(arXiv 2405.20320, section 4.3; their t runs from picture to noise).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.flow import interpolate, like, velocity_target
from instaflow.models.bundle import Bundle
from instaflow.models.velocity import network_velocity
from instaflow.recipe import Reflow
from instaflow.training.batches import TextCache, pair_batch
from instaflow.training.decoded import DecodedDistance
from instaflow.training.trainer import Batch, Draw, Stage


def times(spec: Reflow, u: Tensor) -> Tensor:
    """t from uniform u, (B,): u itself, or the U-shaped density ∝ e^{4t} + e^{4(1−t)}."""
    if spec.time == "uniform":
        return u
    # inverse of the distribution function: (sinh(4(t − ½)) / sinh 2 + 1) / 2 = u
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(2.0)) / 4


def pseudo_huber(error: Tensor) -> Tensor:
    """√(‖e‖² + c²) − c with c = 0.00054·d, an element's share of it; (B, …) → (B,)."""
    d = error[0].numel()
    c = 0.00054 * d
    return ((error.square().flatten(1).sum(1) + c * c).sqrt() - c) / d


def reflow_stage(spec: Reflow, bundle: Bundle, pairs: PairReader) -> Stage:
    """Reflow's batches and loss; `bundle.card.prediction` says how the network gives a velocity."""
    encode = TextCache(bundle.encode)
    perceptual = DecodedDistance(spec, bundle) if spec.loss == "lpips-huber" else None

    def batch(draw: Draw) -> Batch:
        part = pair_batch(pairs, encode, draw, spec.train.batch_size, spec.empty_prompts)
        part["t"] = times(spec, draw.own(draw.uniform(spec.train.batch_size)))
        return {**part, **perceptual.batch(draw, spec.train.batch_size)} if perceptual else part

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        x0, x1, t = batch["x0"], batch["x1"], batch["t"]
        x_t = interpolate(x0, x1, t)
        v = network_velocity(network, bundle.card.prediction, bundle.schedule, batch["states"])(x_t, t)
        error = v.float() - velocity_target(x0, x1)
        if perceptual is None:
            return error.square().mean()  # InstaFlow, Alg. 1
        end = x_t + like(1 - t, x_t) * v.float()
        return (t * pseudo_huber(error)).mean() + spec.perceptual_weight * perceptual(end, x1, batch)

    return Stage(network=bundle.unet, batch=batch, loss=loss)
