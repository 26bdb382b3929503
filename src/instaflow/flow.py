"""The mathematics of rectified flow, in the project's one convention. Imports torch alone.

t ∈ [0, 1] is flow time: t = 0 is noise X₀ ~ N(0, I), t = 1 is the image X₁. The path is straight,
X_t = t·X₁ + (1−t)·X₀, and its velocity is v = X₁ − X₀. A velocity field is any function
`velocity(z, t)` with z: (B, …) and t: (B,), returning a tensor shaped like z.

Source: Liu et al. 2022 (arXiv 2209.03003); InstaFlow, Liu et al. 2023 (arXiv 2309.06380).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def unet_time(t: Tensor) -> Tensor:
    """τ = 1000·(1−t), the float that a U-Net takes as its timestep; one step uses exactly 1000.0."""
    return 1000.0 * (1.0 - t)


def like(t: Tensor, z: Tensor) -> Tensor:
    """`t`: (B,) shaped to broadcast over `z`: (B, …)."""
    return t.reshape(-1, *[1] * (z.ndim - 1))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """X_t = t·X₁ + (1−t)·X₀ for x0, x1: (B, …) and t: (B,)."""
    return like(t, x1) * x1 + (1 - like(t, x0)) * x0


def velocity_target(x0: Tensor, x1: Tensor) -> Tensor:
    """v = X₁ − X₀, what the network predicts."""
    return x1 - x0


def guided(cond: Velocity, uncond: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance v(∅) + g·(v(T) − v(∅)); g = 1 is the conditional field itself."""
    if guidance == 1.0:
        return cond

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        v_empty = uncond(z, t)
        return v_empty + guidance * (cond(z, t) - v_empty)

    return velocity


def euler(velocity: Velocity, x0: Tensor, steps: int, *, path: bool = False) -> Tensor:
    """Integrate dz = v(z, t) dt from t = 0 to 1 by Euler: z ← z + Δt·v(z, t), Δt = 1/steps.

    One step is X̂₁ = X₀ + v(X₀, 0).

    Args:
        velocity: the field.
        x0: noise, (B, …).
        steps: evaluations of the field, ≥ 1.
        path: return every state, (steps+1, B, …), instead of the last.
    """
    z, states = x0, [x0]
    for i in range(steps):
        t = torch.full((x0.shape[0],), i / steps, device=x0.device, dtype=x0.dtype)
        z = z + velocity(z, t) / steps
        if path:
            states.append(z)
    return torch.stack(states) if path else z


def straightness(velocity: Velocity, x0: Tensor, steps: int) -> Tensor:
    """S(Z) = ∫ E‖(Z₁ − Z₀) − v(Z_t, t)‖² dt per sample, (B,), the mean over elements; 0 is straight.

    The integral is a left Riemann sum over an Euler path of `steps` steps, whose velocities are
    the differences of its states. Source: Liu et al. 2022, eq. 3.
    """
    states = euler(velocity, x0, steps, path=True)
    speeds = (states[1:] - states[:-1]) * steps
    return (speeds - (states[-1] - states[0])).square().flatten(2).mean(dim=(0, 2))
