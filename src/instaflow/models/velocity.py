"""A network as the velocity field of a flow, whatever it was trained to predict.

Three predictions exist: `velocity` (InstaFlow's own: v at τ = 1000·(1−t)), and the two of diffusion
models, `epsilon` and `v_prediction`, which live on a variance-preserving path x_s = a·X₁ + b·ε.
Matching the signal-to-noise ratio, t = a/(a+b) and x_VP = (a+b)·x_RF, turns the one into the other
exactly: from either prediction come X̂₁ and ε̂, and v = X̂₁ − ε̂. With a zero-terminal-SNR schedule
the path reaches t = 0 (a = 0), where one-step models live; with Stable Diffusion's own it ends at
t = 0.064, and times before that are taken as that one, just as its samplers take pure noise for x_999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instaflow.flow import Velocity, like, unet_time
from instaflow.recipe import Prediction


class Schedule:
    """Alphas and sigmas of a diffusion schedule as functions of flow time.

    Args:
        alphas_cumprod: ᾱ_s for s = 0 … S−1, decreasing, (S,).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Tabulate a, b and the flow time of every step of the schedule."""
        self.a = alphas_cumprod.double().clamp(0, 1).sqrt()
        self.b = (1 - alphas_cumprod.double().clamp(0, 1)).sqrt()
        self.t = self.a / (self.a + self.b)  # decreasing in s

    def step(self, t: Tensor) -> Tensor:
        """The fractional step s whose signal-to-noise ratio is that of flow time t; (B,) → (B,) float."""
        times = self.t.flip(0).to(t.device)
        right = torch.searchsorted(times, t.double()).clamp(1, len(times) - 1)
        low, high = times[right - 1], times[right]
        share = ((t.double() - low) / (high - low)).clamp(0, 1)
        return ((len(times) - 1) - (right - 1 + share)).to(t.dtype)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at flow time t, clamped to the schedule's own range; (B,) → 2 × (B,)."""
        t = t.clamp(float(self.t[-1]), float(self.t[0]))
        return t * vp_scale(t), (1 - t) * vp_scale(t)


def vp_scale(t: Tensor) -> Tensor:
    """a + b at flow time t: x_VP = vp_scale(t)·x_RF has unit variance when X₁ has; (B,) → (B,)."""
    return (t.square() + (1 - t).square()).rsqrt()


def denoised(
    prediction: Prediction, out: Tensor, x: Tensor, a: Tensor | float, b: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(X̂₁, ε̂) from a diffusion network's output at x = a·X₁ + b·ε; all (B, …), or numbers."""
    if prediction == "epsilon":
        return (x - b * out) / a, out
    return a * x - b * out, b * x + a * out  # v = a·ε − b·X₁, Salimans & Ho 2022


def network_velocity(
    unet: torch.nn.Module, prediction: Prediction, schedule: Schedule | None, states: Tensor
) -> Velocity:
    """The velocity field v(z, t | T) of a U-Net.

    Args:
        unet: called as `unet(x, timestep, states).sample`.
        prediction: what it predicts.
        schedule: the diffusion schedule; None for `velocity`.
        states: the prompt's token states, (B, L, D).
    """
    if prediction == "velocity" or schedule is None:

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            out: Tensor = unet(z, unet_time(t), states).sample
            return out.to(z.dtype)

        return velocity

    def converted(z: Tensor, t: Tensor) -> Tensor:
        a, b = (like(c, z) for c in schedule.alpha_sigma(t))
        x = like(vp_scale(t), z) * z
        out = unet(x, schedule.step(t), states).sample.to(z.dtype)
        x1, noise = denoised(prediction, out, x, a, b)
        return x1 - noise

    return converted
