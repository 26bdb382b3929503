"""Stage: text-conditioned reflow (InstaFlow, Alg. 1), min E‖(X₁ − X₀) − v(X_t, t | T)‖²."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.flow import interpolate, velocity_target
from instaflow.models.bundle import Bundle
from instaflow.models.velocity import network_velocity
from instaflow.recipe import Reflow
from instaflow.training.batches import TextCache, pair_batch
from instaflow.training.trainer import Batch, Draw, Stage


def times(spec: Reflow, u: Tensor) -> Tensor:
    """t from uniform u, (B,): u itself, or the U-shaped density ∝ e^{4t} + e^{4(1−t)}."""
    if spec.time == "uniform":
        return u
    # inverse of the distribution function: (sinh(4(t − ½)) / sinh 2 + 1) / 2 = u
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(2.0)) / 4


def reflow_stage(spec: Reflow, bundle: Bundle, pairs: PairReader) -> Stage:
    """Reflow's batches and loss; `bundle.card.prediction` says how the network gives a velocity."""
    encode = TextCache(bundle.encode)

    def batch(draw: Draw) -> Batch:
        part = pair_batch(pairs, encode, draw, spec.train.batch_size, spec.empty_prompts)
        return {**part, "t": times(spec, draw.uniform(spec.train.batch_size))}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        x0, x1, t = batch["x0"], batch["x1"], batch["t"]
        x_t = interpolate(x0, x1, t)
        v = network_velocity(network, bundle.card.prediction, bundle.schedule, batch["states"])(x_t, t)
        return (v.float() - velocity_target(x0, x1)).square().mean()  # InstaFlow, Alg. 1

    return Stage(network=bundle.unet, batch=batch, loss=loss)
