"""The convention, and Euler on fields whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instaflow.flow import euler, guided, interpolate, like, straightness, unet_time, velocity_target

STEPS = [1, 2, 3, 7, 25, 100]


def pair(shape: tuple[int, ...] = (3, 2, 4, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


# -- the convention ----------------------------------------------------------------------------


def test_time_zero_is_noise_and_time_one_is_the_image() -> None:
    x0, x1 = pair()
    assert torch.equal(interpolate(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(3)), x1)


def test_each_sample_has_its_own_time() -> None:
    x0, x1 = pair()
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.stack([x0[0], 0.25 * x1[1] + 0.75 * x0[1], x1[2]])
    torch.testing.assert_close(interpolate(x0, x1, t), expected, rtol=0, atol=1e-15)


def test_the_unet_is_told_1000_at_noise_and_0_at_the_image() -> None:
    assert unet_time(torch.zeros(1)).item() == 1000.0
    assert unet_time(torch.ones(1)).item() == 0.0
    assert unet_time(torch.tensor([0.25])).item() == 750.0
    assert unet_time(torch.zeros(1)).dtype == torch.float32


def test_the_velocity_points_from_noise_to_the_image() -> None:
    x0, x1 = pair()
    assert torch.equal(velocity_target(x0, x1), x1 - x0)
    h, t = 1e-6, torch.full((3,), 0.4, dtype=torch.float64)
    slope = (interpolate(x0, x1, t + h) - interpolate(x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(x0, x1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4, 4)])
def test_times_broadcast_over_any_shape(shape: tuple[int, ...]) -> None:
    z = torch.ones(shape)
    scaled = like(torch.tensor([1.0, 2.0, 3.0]), z) * z
    assert scaled.shape == z.shape
    assert [row.unique().item() for row in scaled] == [1.0, 2.0, 3.0]


# -- Euler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_the_exact_velocity_brings_noise_to_the_image_in_any_number_of_steps(steps: int) -> None:
    x0, x1 = pair()
    torch.testing.assert_close(euler(lambda z, t: x1 - x0, x0, steps), x1, rtol=0, atol=1e-12)


def test_one_step_is_noise_plus_the_velocity_at_time_zero() -> None:
    x0, _ = pair()
    asked = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        asked.append((z, t))
        return z.sin()

    assert torch.equal(euler(velocity, x0, 1), x0 + x0.sin())
    [(z, t)] = asked
    assert torch.equal(z, x0) and torch.equal(t, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("steps", STEPS)
def test_euler_on_exponential_growth_compounds(steps: int) -> None:
    x0, _ = pair()
    torch.testing.assert_close(euler(lambda z, t: z, x0, steps), x0 * (1 + 1 / steps) ** steps, rtol=1e-12, atol=0)


def test_euler_asks_at_the_left_end_of_every_step() -> None:
    times: list[float] = []
    euler(lambda z, t: times.append(t[0].item()) or z, torch.ones(1, 2), 4)
    assert times == [0.0, 0.25, 0.5, 0.75]


def test_the_path_holds_every_state() -> None:
    x0, x1 = pair()
    path = euler(lambda z, t: x1 - x0, x0, 4, path=True)
    assert path.shape == (5, *x0.shape)
    for i, state in enumerate(path):
        expected = interpolate(x0, x1, torch.full((3,), i / 4, dtype=torch.float64))
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)
    assert torch.equal(path[-1], euler(lambda z, t: x1 - x0, x0, 4))


# -- guidance ----------------------------------------------------------------------------------


def test_guidance_one_is_the_conditional_field_and_never_asks_the_empty_prompt() -> None:
    def cond(z: Tensor, t: Tensor) -> Tensor:
        return z

    def uncond(z: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked the ∅ prompt")

    assert guided(cond, uncond, 1.0) is cond


@pytest.mark.parametrize("g", [1.5, 2.0, 7.5])
def test_guidance_moves_away_from_the_empty_prompt(g: float) -> None:
    z, t = torch.tensor([[2.0, -1.0]]), torch.tensor([0.5])
    v = guided(lambda z, t: 3 * z, lambda z, t: z + 1, g)(z, t)
    torch.testing.assert_close(v, (1 - g) * (z + 1) + g * 3 * z)


def test_guidance_of_equal_fields_changes_nothing() -> None:
    z, t = torch.tensor([[2.0, -1.0]]), torch.tensor([0.5])
    assert torch.equal(guided(lambda z, t: 3 * z, lambda z, t: 3 * z, 5.0)(z, t), 3 * z)


# -- straightness ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_a_straight_field_has_straightness_zero(steps: int) -> None:
    x0, x1 = pair()
    s = straightness(lambda z, t: x1 - x0, x0, steps)
    assert s.shape == (3,)
    torch.testing.assert_close(s, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-24)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_an_accelerating_field_has_its_closed_form(steps: int) -> None:
    # v = 2t·c: the Euler path ends at c·(N−1)/N, and ∫(c − 2tc)² dt = c²/3 becomes c²(1 − 1/N²)/3.
    x0, c = pair()
    s = straightness(lambda z, t: 2 * like(t, z) * c, x0, steps)
    expected = c.square().flatten(1).mean(1) / 3 * (1 - 1 / steps**2)
    torch.testing.assert_close(s, expected, rtol=1e-12, atol=0)


def test_straightness_of_a_circle() -> None:
    # A half turn about the origin, z(t) = R(πt) z₀: speed π‖z₀‖, displacement −2z₀, S = (π² − 4)‖z₀‖².
    x0 = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)

    def turn(z: Tensor, t: Tensor) -> Tensor:
        return torch.pi * torch.stack([-z[:, 1], z[:, 0]], dim=1)

    expected = (torch.pi**2 - 4) * x0.square().mean(1)
    torch.testing.assert_close(straightness(turn, x0, 2000), expected, rtol=2e-2, atol=0)


def test_each_sample_has_its_own_straightness() -> None:
    x0, c = pair()
    c[1] = 0
    s = straightness(lambda z, t: like(t, z) * c, x0, 10)
    assert s[1] < 1e-24 < s[0] and s[2] > 0
