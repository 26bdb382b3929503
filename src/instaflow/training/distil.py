"""Stage: one-step distillation (InstaFlow, Alg. 2), min E D(X₁, X₀ + v(X₀, 0 | T)), t fixed at 0."""

from __future__ import annotations

from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.models.bundle import Bundle
from instaflow.models.sampling import one_step
from instaflow.recipe import Distil
from instaflow.training.batches import TextCache, pair_batch
from instaflow.training.decoded import DecodedDistance
from instaflow.training.trainer import Batch, Draw, Stage


def distil_stage(spec: Distil, bundle: Bundle, pairs: PairReader) -> Stage:
    """Distillation's batches and loss: L2 on latents, or a perceptual distance on decoded pictures."""
    encode = TextCache(bundle.encode)
    perceptual = DecodedDistance(spec, bundle) if spec.loss == "perceptual" else None

    def batch(draw: Draw) -> Batch:
        part = pair_batch(pairs, encode, draw, spec.train.batch_size)
        return {**part, **perceptual.batch(draw, spec.train.batch_size)} if perceptual else part

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        out = one_step(network, bundle, batch["x0"], batch["states"])  # InstaFlow, Alg. 2
        error = (out.float() - batch["x1"]).square().mean()
        return error + spec.perceptual_weight * perceptual(out, batch["x1"], batch) if perceptual else error

    return Stage(network=bundle.unet, batch=batch, loss=loss)
