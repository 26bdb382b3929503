"""Prompts and seeds → latents: noise as a pure function of the seed, then a sampler.

A diffusion model draws with DPM-Solver++ (2M) from diffusers; a rectified flow or one-step model
with Euler, which for one step is X̂₁ = X₀ + v(X₀, 0 | T).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from instaflow.flow import euler
from instaflow.models.bundle import Bundle
from instaflow.models.velocity import network_velocity
from instaflow.noise import noise as seeded


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """X₀ ~ N(0, I), (B, *shape) fp32 on the CPU; each row depends on its seed alone."""
    return torch.from_numpy(seeded(seeds, shape))


def sample(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    size: int | None = None,
    negative: str = "",
) -> Tensor:
    """Latents (B, C, H/f, W/f) of prompts, one seed each, by the model's own sampler; guided away from `negative`."""
    x0 = noise(seeds, bundle.latent_shape(size)).to(bundle.device)
    return integrate(bundle, x0, bundle.encode(prompts), steps=steps, guidance=guidance, negative=negative)


def one_step(unet: torch.nn.Module, bundle: Bundle, x0: Tensor, states: Tensor) -> Tensor:
    """X̂₁ = X₀ + v(X₀, 0 | T) of a U-Net in training, at a bundle's schedule; (B, C, h, w)."""
    return euler(network_velocity(unet, bundle.card.prediction, bundle.schedule, states), x0, steps=1)


@torch.inference_mode()
def integrate(bundle: Bundle, x0: Tensor, states: Tensor, *, steps: int, guidance: float, negative: str) -> Tensor:
    """The same from noise x0: (B, C, h, w) and token states: (B, L, D)."""
    away = None if guidance == 1.0 else bundle.encode([negative])
    if bundle.card.kind == "teacher" and bundle.card.prediction != "velocity":
        return dpm_solver(bundle, x0, states, away, steps=steps, guidance=guidance)
    return euler(bundle.velocity(states, guidance=guidance, negative=away), x0, steps)


@torch.inference_mode()
def dpm_solver(
    bundle: Bundle, x0: Tensor, states: Tensor, away: Tensor | None, *, steps: int, guidance: float
) -> Tensor:
    """DPM-Solver++ (2M, Lu et al. 2022) from noise x0; the teacher's ODE[v_SD](X₀ | T), guided from `away` if given."""
    solver = DPMSolverMultistepScheduler.from_config(
        bundle.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    solver.set_timesteps(steps, device=x0.device)
    z = x0 * solver.init_noise_sigma
    if away is not None:
        states = torch.cat([away.expand_as(states), states])
    for step in solver.timesteps:
        x = solver.scale_model_input(z, step)
        if away is None:
            out = bundle.unet(x, step, states).sample
        else:
            empty, cond = bundle.unet(torch.cat([x, x]), step, states).sample.chunk(2)
            out = empty + guidance * (cond - empty)
        z = solver.step(out.float(), step, z).prev_sample
    return z
