"""Stage: a tiny decoder, distilled from a model's own on latents that a teacher drew: L1 on pixels and features.

Of a one-step picture of Stable Diffusion three quarters of the work are the decoder's; TAESD's architecture
(diffusers' `AutoencoderTiny`) takes a twentieth of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.images import save_grid, to_uint8
from instaflow.models.bundle import Bundle
from instaflow.models.networks import build_tiny_decoder, decode_latents
from instaflow.models.perceptual import Lite1
from instaflow.recipe import Decoder
from instaflow.training.decoded import corners, cut
from instaflow.training.trainer import Batch, Draw, Stage


class Decode(nn.Module):
    """Its forward pass is the decoder alone."""

    def __init__(self, vae: Any) -> None:
        """Only the decoder learns."""
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → pictures (B, 3, H, W)."""
        return decode_latents(self.vae, latents)


def decoder_stage(spec: Decoder, bundle: Bundle, pairs: PairReader) -> Stage:
    """The decoder's batches and loss; `bundle` has the one that is learnt."""
    (channels, side, _), count = bundle.latent_shape(), spec.train.batch_size
    perceptual = Lite1().to(bundle.device) if spec.perceptual_weight else None

    def batch(draw: Draw) -> Batch:
        latents = pairs.batch(draw.seed, draw.step, count, draw.part).x1.float()
        place = corners(draw, count, side, spec.crop)
        return {"latents": cut(latents, place, spec.crop)}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = decode_latents(bundle.vae, batch["latents"]).float()
        out = network(batch["latents"]).float()
        error = (out - wanted).abs().mean()
        return error + spec.perceptual_weight * perceptual(out, wanted) if perceptual else error

    shown = pairs.load(0).x1[: 32 if side <= 16 else 4].float()

    def preview(network: nn.Module, path: Path) -> None:
        """The own decoder's pictures above the tiny one's."""
        with torch.inference_mode():
            latents = shown.to(bundle.device)
            rows = torch.cat([decode_latents(bundle.vae, latents), network(latents)])
        save_grid(to_uint8(rows.float().cpu().numpy()), path, columns=len(shown))

    return Stage(network=Decode(build_tiny_decoder(spec, channels)), batch=batch, loss=loss, preview=preview)
