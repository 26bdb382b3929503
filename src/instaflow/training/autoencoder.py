"""Stage: pictures ↔ latents. L1 on pixels, latents pushed to zero mean and unit deviation a channel.

Going on from another stage's autoencoder trains its decoder alone, for a perceptual loss say: what has
been trained on the latents stays good.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.data.pictures import Picture
from instaflow.images import save_grid, to_uint8
from instaflow.models.networks import build_autoencoder, encode_pictures, to_tensor
from instaflow.models.perceptual import Lite1
from instaflow.recipe import Autoencoder
from instaflow.training.trainer import Batch, Draw, Stage

MOMENT_WEIGHT = 0.01  # enough to hold the moments, too little to cost detail


class RoundTrip(nn.Module):
    """Encode, disturb, decode: one module, so that one forward pass trains both halves."""

    def __init__(self, vae: Any, latent_noise: float) -> None:
        """`latent_noise` is in standard deviations of the latents."""
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → reconstruction (B, 3, H, W) and clean latents (B, C, H/8, W/8)."""
        latents = self.vae.encode(pictures).latent
        disturbed = latents + self.latent_noise * latents.detach().std() * noise
        return self.vae.decode(disturbed).sample, latents


def autoencoder_stage(
    spec: Autoencoder, pictures: Sequence[Picture], size: int, *, vae: Any = None, device: str = "cpu"
) -> Stage:
    """The autoencoder's batches and loss.

    Args:
        spec: the stage's recipe.
        pictures: the training pictures.
        size: their side in pixels.
        vae: train this one's decoder; None builds a new autoencoder and trains all of it.
        device: where the network of the perceptual loss goes.
    """
    pixels = np.stack([p.pixels(size) for p in pictures])
    perceptual = Lite1().to(device) if spec.perceptual_weight else None
    if vae is None:
        vae = build_autoencoder(spec)
    else:
        vae.requires_grad_(True).encoder.requires_grad_(False)
    shape = (vae.config.latent_channels, size // 8, size // 8)

    def batch(draw: Draw) -> Batch:
        chosen = draw.own(draw.indices(len(pixels), spec.train.batch_size))
        noise = draw.own(draw.normal(spec.train.batch_size, *shape))
        return {"pictures": to_tensor(pixels[chosen]), "noise": noise}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        out, latents = network(batch["pictures"], batch["noise"])
        error = (out.float() - batch["pictures"]).abs().mean()
        z = latents.float()
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) + 1e-6).log().square().mean()
        if perceptual is not None:
            error = error + spec.perceptual_weight * perceptual(out, batch["pictures"])
        return error + MOMENT_WEIGHT * moments

    def preview(network: nn.Module, path: Path) -> None:
        shown = to_tensor(pixels[:: max(1, len(pixels) // 32)][:32]).to(next(network.parameters()).device)
        with torch.inference_mode():
            out, _ = network(shown, torch.zeros(len(shown), *shape, device=shown.device))
        save_grid(to_uint8(torch.cat([shown, out]).float().cpu().numpy()), path, columns=32)

    return Stage(network=RoundTrip(vae, spec.latent_noise), batch=batch, loss=loss, preview=preview)


@torch.inference_mode()
def encode_all(vae: Any, pictures: Sequence[Picture], size: int, batch_size: int = 128) -> Tensor:
    """Latents of all pictures, (N, C, size/8, size/8) fp32 on the CPU, scaled by the autoencoder's factor."""
    device = next(vae.parameters()).device
    parts = []
    for i in range(0, len(pictures), batch_size):
        pixels = np.stack([p.pixels(size) for p in pictures[i : i + batch_size]])
        parts.append(encode_pictures(vae, to_tensor(pixels).to(device)).cpu())
    return torch.cat(parts)


def finish(network: nn.Module, pictures: Sequence[Picture], size: int) -> Any:
    """The trained autoencoder with its scaling factor: 1 / deviation of the training latents."""
    vae: Any = network.vae
    latents = encode_all(vae, pictures[::4], size)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae
