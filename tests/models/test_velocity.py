"""Any prediction as a velocity, against oracles that know the noise and the image."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instaflow.flow import euler, like
from instaflow.models.networks import build_scheduler
from instaflow.models.velocity import Schedule, denoised, network_velocity, vp_scale

STATES = torch.zeros(2, 1, 1)


def alphas_cumprod(zero_snr: bool) -> Tensor:
    return build_scheduler("v_prediction" if zero_snr else "epsilon").alphas_cumprod


@pytest.fixture(params=[False, True], ids=["sd", "zero-snr"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return Schedule(alphas_cumprod(request.param))


def pair() -> tuple[Tensor, Tensor]:
    """(X₁, ε) in double precision, so that only the mathematics can differ."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))


class Oracle(nn.Module):
    """A 'U-Net' that answers with a function of what it is asked, and remembers the question."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.x, self.step = answer, torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor, step: Tensor, states: Tensor) -> SimpleNamespace:
        self.x, self.step = x, step
        return SimpleNamespace(sample=self.answer(x, step))


def on_the_path(t: float) -> tuple[float, float]:
    """(a, b) with a² + b² = 1 and a/(a+b) = t."""
    a = t / np.hypot(t, 1 - t)
    return a, np.sqrt(1 - a * a)


# -- the schedule ------------------------------------------------------------------------------


def test_the_schedules_reach_from_almost_the_image_to_the_documented_noise() -> None:
    sd, zero = Schedule(alphas_cumprod(False)), Schedule(alphas_cumprod(True))
    assert float(sd.t[0]) == pytest.approx(0.972, abs=1e-3)
    assert float(sd.t[-1]) == pytest.approx(0.064, abs=1e-3)
    assert float(zero.t[-1]) == 0.0
    assert 1 / float(sd.t[-1]) == pytest.approx(15.6, abs=0.1)  # the gain (a+b)/a at s = 999
    assert 1 / float(sd.t[500]) == pytest.approx(2.6, abs=0.1)


def test_the_tables_own_times_are_whole_steps(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.step(schedule.t), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9)


def test_between_the_tables_times_the_step_is_between_and_monotone(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    steps = schedule.step(t)
    assert (steps.diff() <= 0).all()
    expected = np.interp(t.numpy(), schedule.t.flip(0).numpy(), np.arange(999, -1, -1))
    np.testing.assert_allclose(steps.numpy(), expected, atol=1e-9)


def test_times_past_the_schedules_ends_are_its_ends(schedule: Schedule) -> None:
    assert schedule.step(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


def test_alpha_and_sigma_match_the_signal_to_noise_ratio(schedule: Schedule) -> None:
    t = torch.linspace(float(schedule.t[-1]), float(schedule.t[0]), 101, dtype=torch.float64)
    a, b = schedule.alpha_sigma(t)
    torch.testing.assert_close(a / (a + b), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(t), rtol=0, atol=1e-12)
    torch.testing.assert_close(vp_scale(t), a + b, rtol=0, atol=1e-12)


def test_alpha_and_sigma_at_the_tables_times_are_the_tables(schedule: Schedule) -> None:
    a, b = schedule.alpha_sigma(schedule.t)
    torch.testing.assert_close(a, schedule.a, rtol=0, atol=1e-12)
    torch.testing.assert_close(b, schedule.b, rtol=0, atol=1e-12)


def test_noise_and_image_come_back_from_either_prediction() -> None:
    x1, eps = pair()
    a, b = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    for prediction, out in (("epsilon", eps), ("v_prediction", a * eps - b * x1)):
        image, noise = denoised(prediction, out, a * x1 + b * eps, a, b)
        torch.testing.assert_close(image, x1)
        torch.testing.assert_close(noise, eps)


# -- the velocity ------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0.08, 0.3, 0.5, 0.77, 0.97])
def test_an_exact_network_gives_the_exact_velocity(prediction: str, t: float, schedule: Schedule) -> None:
    x1, eps = pair()
    a, b = on_the_path(t)
    oracle = Oracle(lambda x, step: eps if prediction == "epsilon" else a * eps - b * x1)
    v = network_velocity(oracle, prediction, schedule, STATES)
    times = torch.full((2,), t, dtype=torch.float64)
    torch.testing.assert_close(v(t * x1 + (1 - t) * eps, times), x1 - eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(oracle.x, a * x1 + b * eps, rtol=0, atol=1e-12)  # what it was trained on
    torch.testing.assert_close(
        torch.from_numpy(np.interp(oracle.step.numpy(), np.arange(1000), schedule.t.numpy())), times, rtol=0, atol=1e-9
    )


def test_each_sample_of_a_batch_is_asked_at_its_own_time(schedule: Schedule) -> None:
    x1, eps = pair()
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    ab = torch.tensor([on_the_path(0.2), on_the_path(0.9)])
    a, b = like(ab[:, 0], x1), like(ab[:, 1], x1)
    v = network_velocity(Oracle(lambda x, step: a * eps - b * x1), "v_prediction", schedule, STATES)
    torch.testing.assert_close(v(like(t, x1) * x1 + like(1 - t, x1) * eps, t), x1 - eps, rtol=0, atol=1e-10)


def test_epsilon_agrees_with_the_formula_of_the_method(schedule: Schedule) -> None:
    x, _ = pair()
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    oracle = Oracle(lambda x, step: x.sin() + like(step, x) / 1000)
    v = network_velocity(oracle, "epsilon", schedule, STATES)(x, t)
    for i, time in enumerate([0.2, 0.6]):
        a, b = on_the_path(time)
        step = np.interp(time, schedule.t.flip(0).numpy(), np.arange(999, -1, -1))
        noise = ((a + b) * x[i]).sin() + step / 1000
        torch.testing.assert_close(v[i], (a + b) / a * (x[i] - noise), rtol=0, atol=1e-9)


def test_zero_snr_starts_at_pure_noise_and_one_step_is_the_networks_own_guess() -> None:
    x1, eps = pair()
    oracle = Oracle(lambda x, step: -x1)  # v = a·ε − b·X₁ at a = 0, b = 1
    v = network_velocity(oracle, "v_prediction", Schedule(alphas_cumprod(True)), STATES)
    out = v(eps, torch.zeros(2, dtype=torch.float64))
    assert out.isfinite().all()
    torch.testing.assert_close(eps + out, x1, rtol=0, atol=1e-12)
    assert oracle.step.tolist() == [999.0, 999.0]
    torch.testing.assert_close(oracle.x, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.06])
def test_epsilon_before_the_schedules_end_is_taken_at_its_end(t: float) -> None:
    x, eps = pair()
    schedule = Schedule(alphas_cumprod(False))
    oracle = Oracle(lambda x, step: eps)
    v = network_velocity(oracle, "epsilon", schedule, STATES)(x, torch.full((2,), t, dtype=torch.float64))
    assert v.isfinite().all()
    assert oracle.step.tolist() == [999.0, 999.0]
    a, b = float(schedule.a[-1]), float(schedule.b[-1])
    shown = x / np.hypot(t, 1 - t)
    torch.testing.assert_close(v, (shown - b * eps) / a - eps, rtol=0, atol=1e-10)


def test_a_velocity_network_is_asked_at_exactly_1000_for_one_step() -> None:
    x1, eps = pair()
    oracle = Oracle(lambda x, step: x1 - eps)
    v = network_velocity(oracle, "velocity", None, STATES)
    torch.testing.assert_close(euler(v, eps, 1), x1)
    assert oracle.step.tolist() == [1000.0, 1000.0]
    assert torch.equal(oracle.x, eps)


def test_a_lower_precision_of_the_network_does_not_lower_that_of_the_path() -> None:
    eps = pair()[1].float()
    for prediction, schedule in (("velocity", None), ("v_prediction", Schedule(alphas_cumprod(True)))):
        v = network_velocity(Oracle(lambda x, step: x.bfloat16()), prediction, schedule, STATES)
        assert v(eps, torch.zeros(2)).dtype == torch.float32


# -- a flow with a known answer ------------------------------------------------------------------

DEVIATION = 0.5  # the images are N(0, ½²), so the best prediction and the whole flow are closed forms


def gaussian(schedule: Schedule, prediction: str) -> Oracle:
    """The best possible network for images N(0, DEVIATION²)."""

    def answer(x: Tensor, step: Tensor) -> Tensor:
        t = np.interp(step.numpy(), np.arange(1000), schedule.t.numpy())
        a = like(torch.from_numpy(t / np.hypot(t, 1 - t)), x)
        b = like(torch.from_numpy((1 - t) / np.hypot(t, 1 - t)), x)
        power = a**2 * DEVIATION**2 + b**2
        image, noise = a * DEVIATION**2 / power * x, b / power * x
        return noise if prediction == "epsilon" else a * noise - b * image

    return Oracle(answer)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_swapping_the_prediction_draws_the_same(steps: int) -> None:
    _, x0 = pair()
    schedule = Schedule(alphas_cumprod(False))
    drawn = [
        euler(network_velocity(gaussian(schedule, p), p, schedule, STATES), x0, steps)
        for p in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-9)


def test_swapping_the_schedule_draws_the_same_where_both_reach() -> None:
    x, _ = pair()
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    velocities = []
    for zero_snr in (False, True):
        schedule = Schedule(alphas_cumprod(zero_snr))
        velocities.append(network_velocity(gaussian(schedule, "v_prediction"), "v_prediction", schedule, STATES)(x, t))
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-9)


def test_the_flow_of_gaussian_images_scales_the_noise() -> None:
    _, x0 = pair()
    schedule = Schedule(alphas_cumprod(True))
    v = network_velocity(gaussian(schedule, "v_prediction"), "v_prediction", schedule, STATES)
    drawn = euler(v, x0, 200)
    torch.testing.assert_close(drawn, DEVIATION * x0, rtol=2e-2, atol=0)
