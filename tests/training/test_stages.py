"""The losses of reflow and distillation, derived a second time; prompts and their states."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from instaflow.data.pairs import PairReader, PairSet
from instaflow.data.pictures import Picture
from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents, encode_pictures, to_tensor
from instaflow.models.perceptual import Lite1
from instaflow.recipe import Autoencoder, Distil, Reflow, Teacher, Train
from instaflow.training.autoencoder import MOMENT_WEIGHT, autoencoder_stage
from instaflow.training.batches import TextCache
from instaflow.training.distil import distil_stage
from instaflow.training.pairs import draw_prompts, drop_prompts
from instaflow.training.reflow import reflow_stage, times
from instaflow.training.teacher import teacher_stage
from instaflow.training.trainer import Draw

TRAIN = Train(steps=1, batch_size=5)
REFLOW = Reflow(name="reflow", model="m", pairs="p", train=TRAIN)
DISTIL = Distil(name="distil", model="m", pairs="p", train=TRAIN)
PAIRS = PairSet(
    prompts=["a red apple", "blue", "the sun"],
    seeds=[5, 6, 7],
    x1=torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half(),
)


@pytest.fixture
def pairs() -> PairReader:
    return PairReader([3], lambda shard: PAIRS)


def states_of(bundle: Bundle, prompt: str) -> Tensor:
    """Token states straight from the text encoder, at the precision they are cached in."""
    tokens = bundle.tokenizer([prompt], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        return bundle.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0].half().float()


class Spy(nn.Module):
    """A U-Net that remembers what it was asked."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, states: Tensor) -> SimpleNamespace:
        self.asked.append((x, time, states))
        return self.unet(x, time, states)


def test_states_are_kept_up_to_a_limit_and_the_same_either_way(tiny: Bundle) -> None:
    prompts = [f"a red apple {i}" for i in range(8)]
    asked: list[int] = []

    def encode(some: Sequence[str]) -> Tensor:
        asked.append(len(some))
        return tiny.encode(some)

    each = tiny.encode(prompts[:1])[0].numel() * 2
    free, tight = TextCache(encode), TextCache(encode, limit=3 * each)
    for start in (0, 2, 4, 0):
        assert torch.equal(free(prompts[start : start + 4]), tight(prompts[start : start + 4]))
    assert len(free.states) == 8 and len(tight.states) == 3
    assert sum(asked) == 8 + (4 + 2 + 2 + 4)  # free: each once; tight: those dropped once again


@pytest.mark.parametrize("kind", ["autoencoder", "teacher", "reflow", "distil"])
def test_the_parts_of_several_processes_are_the_batch_of_one(
    own: Callable[..., Bundle], pairs: PairReader, kind: str
) -> None:
    bundle, blank = own(kind="rectified", prediction="velocity"), Image.new("RGB", (32, 32), "red")
    pictures = [Picture.from_image(blank, name=f"thing {i}", keywords=(f"word {i}",)) for i in range(4)]
    match kind:
        case "autoencoder":
            spec = Autoencoder(name="a", latent_channels=4, widths=(8, 16, 16), train=TRAIN)
            stage = autoencoder_stage(spec, pictures, 32)
        case "teacher":
            teacher = Teacher(name="t", autoencoder="a", empty_prompts=0.3, train=TRAIN)
            stage = teacher_stage(teacher, bundle, pictures, torch.randn(4, 4, 4, 4))
        case "reflow":
            reflow = msgspec.structs.replace(REFLOW, loss="lpips-huber", perceptual_crop=2, empty_prompts=0.3)
            stage = reflow_stage(reflow, bundle, pairs)
        case _:
            stage = distil_stage(DISTIL, bundle, pairs)
    for step in range(3):
        whole = stage.batch(Draw(0, step))
        for rank in range(3):
            part = stage.batch(Draw(0, step, part=(rank, 3)))
            assert part.keys() == whole.keys()
            for key, value in part.items():
                torch.testing.assert_close(value, whole[key][rank::3], rtol=0, atol=1e-3 if key == "states" else 0)


# -- reflow ------------------------------------------------------------------------------------


def expected_reflow(bundle: Bundle, pairs: PairReader, step: int) -> float:
    """‖(X₁ − X₀) − v(X_t, t | T)‖² of one batch, sample by sample, as the paper says it."""
    draw = Draw(0, step)
    chosen = [row for _, row in pairs.chosen(0, step, TRAIN.batch_size)]
    empty = [draw.python.random() < REFLOW.empty_prompts for _ in chosen]
    ts = draw.uniform(TRAIN.batch_size).tolist()
    errors = []
    for i, dropped, t in zip(chosen, empty, ts, strict=True):
        x1 = PAIRS.x1[i : i + 1].float()
        x0 = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(PAIRS.seeds[i]))[None]
        x_t, states = t * x1 + (1 - t) * x0, states_of(bundle, "" if dropped else PAIRS.prompts[i])
        with torch.no_grad():
            if bundle.card.prediction == "velocity":
                v = bundle.unet(x_t, 1000 * (1 - t), states).sample
            else:
                bars = bundle.scheduler.alphas_cumprod.double().numpy()
                table = np.sqrt(bars) / (np.sqrt(bars) + np.sqrt(1 - bars))
                time = float(np.clip(t, table[-1], table[0]))
                a, b = (c / math.hypot(time, 1 - time) for c in (time, 1 - time))
                x = x_t / math.hypot(t, 1 - t)
                out = bundle.unet(x, float(np.interp(t, table[::-1], np.arange(999, -1, -1))), states).sample
                v = (a * x - b * out) - (b * x + a * out)
        errors.append(((x1 - x0) - v).square().mean().item())
    return float(np.mean(errors))


@pytest.mark.parametrize("prediction", ["velocity", "v_prediction"])
@pytest.mark.parametrize("step", [0, 7])
def test_the_loss_of_reflow_is_the_papers(
    own: Callable[..., Bundle], pairs: PairReader, prediction: str, step: int
) -> None:
    bundle = own(kind="rectified", prediction=prediction)
    stage = reflow_stage(REFLOW, bundle, pairs)
    with torch.no_grad():
        loss = stage.loss(bundle.unet, stage.batch(Draw(0, step)))
    assert float(loss) == pytest.approx(expected_reflow(bundle, pairs, step), rel=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "v_prediction"])
def test_the_gradient_of_reflow_reaches_the_network(
    own: Callable[..., Bundle], pairs: PairReader, prediction: str
) -> None:
    bundle = own(kind="rectified", prediction=prediction)
    bundle.unet.requires_grad_(True)
    stage = reflow_stage(REFLOW, bundle, pairs)
    stage.loss(stage.network, stage.batch(Draw(0, 0))).backward()
    reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in bundle.unet.parameters()]
    assert np.mean(reached) > 0.95
    assert all(p.grad is None for p in (*bundle.text_encoder.parameters(), *bundle.vae.parameters()))


def test_perfect_pairs_cost_nothing(own: Callable[..., Bundle], pairs: PairReader) -> None:
    bundle = own(kind="rectified", prediction="velocity")
    stage = reflow_stage(REFLOW, bundle, pairs)
    batch = stage.batch(Draw(0, 0))

    class Perfect(nn.Module):
        def forward(self, x: Tensor, time: Tensor, states: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=batch["x1"] - batch["x0"])

    assert float(stage.loss(Perfect(), batch)) == 0.0


def test_uniform_times_are_the_draw_itself() -> None:
    u = torch.rand(10)
    assert torch.equal(times(REFLOW, u), u)


def test_u_shaped_times_have_their_density() -> None:
    spec = Reflow(name="r", model="m", pairs="p", time="u-shaped", train=TRAIN)
    grid = np.linspace(0, 1, 200_001)
    density = np.exp(4 * grid) + np.exp(4 * (1 - grid))
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cumulative /= cumulative[-1]
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = times(spec, u)
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() > 0).all()
    np.testing.assert_allclose(np.interp(t.numpy(), grid, cumulative), u.numpy(), atol=1e-8)
    # and so drawn at random: the largest distance of the two distribution functions is within chance
    drawn = np.sort(times(spec, torch.rand(20_000, generator=torch.Generator().manual_seed(0))).numpy())
    ranks = (np.arange(len(drawn)) + 0.5) / len(drawn)
    assert np.abs(np.interp(drawn, grid, cumulative) - ranks).max() < 1.63 / math.sqrt(len(drawn))


def test_u_shaped_times_reach_both_ends_and_are_symmetric() -> None:
    spec = Reflow(name="r", model="m", pairs="p", time="u-shaped", train=TRAIN)
    ends = times(spec, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends.numpy(), [0, 0.5, 1], atol=1e-12)
    u = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(times(spec, u), 1 - times(spec, 1 - u), rtol=0, atol=1e-9)


def test_lpips_huber_is_the_papers(own: Callable[..., Bundle], pairs: PairReader) -> None:
    bundle = own(kind="rectified", prediction="velocity")
    spec = Reflow(
        name="r", model="m", pairs="p", loss="lpips-huber", perceptual_weight=3.0, empty_prompts=0.0, train=TRAIN
    )
    stage = reflow_stage(spec, bundle, pairs)
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        loss = float(stage.loss(bundle.unet, batch))
    hubers, ends = [], []
    for x0, x1, t, states in zip(batch["x0"], batch["x1"], batch["t"].tolist(), batch["states"], strict=True):
        x_t = t * x1 + (1 - t) * x0
        with torch.no_grad():
            v = bundle.unet(x_t[None], 1000 * (1 - t), states[None]).sample[0]
        squares, c = float((x1 - x0 - v).square().sum()), 0.00054 * 64
        hubers.append(t * (math.sqrt(squares + c * c) - c) / 64)
        ends.append(x_t + (1 - t) * v)
    lite = Lite1()
    with torch.no_grad():
        wanted = lite(decode_latents(bundle.vae, torch.stack(ends)), decode_latents(bundle.vae, batch["x1"]))
    assert loss == pytest.approx(np.mean(hubers) + 3.0 * float(wanted), rel=1e-4)


def test_a_crop_is_compared_where_it_was_cut(own: Callable[..., Bundle], pairs: PairReader) -> None:
    bundle = own(kind="one-step", prediction="velocity")
    spec = Distil(name="d", model="m", pairs="p", loss="perceptual", perceptual_crop=3, train=TRAIN)
    stage, plain = distil_stage(spec, bundle, pairs), distil_stage(DISTIL, bundle, pairs)
    corners = torch.cat([stage.batch(Draw(0, step))["corner"] for step in range(40)])
    assert corners.unique(dim=0).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]  # every place of a 3 × 3 in 4 × 4
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        out = batch["x0"] + bundle.unet(batch["x0"], torch.tensor(1000.0), batch["states"]).sample
        cut = [
            torch.stack([s[:, y : y + 3, x : x + 3] for s, (y, x) in zip(z, batch["corner"].tolist(), strict=True)])
            for z in (out, batch["x1"])
        ]
        wanted = Lite1()(*(decode_latents(bundle.vae, z) for z in cut))
        loss = stage.loss(bundle.unet, batch) - plain.loss(bundle.unet, batch)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)
    whole = distil_stage(msgspec.structs.replace(spec, perceptual_crop=4), bundle, pairs)
    assert "corner" not in whole.batch(Draw(0, 0))


# -- distillation ------------------------------------------------------------------------------


def test_distilling_asks_at_exactly_1000_on_pure_noise(own: Callable[..., Bundle], pairs: PairReader) -> None:
    bundle = own(kind="one-step", prediction="velocity")
    stage, spy = distil_stage(DISTIL, bundle, pairs), Spy(bundle.unet)
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        loss = stage.loss(spy, batch)
    [(x, time, states)] = spy.asked
    assert torch.equal(time, torch.full((5,), 1000.0)) and time.dtype == torch.float32
    assert torch.equal(x, batch["x0"])
    chosen = [row for _, row in pairs.chosen(0, 0, 5)]
    for row, i in enumerate(chosen):
        assert torch.equal(x[row], torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(PAIRS.seeds[i])))
        torch.testing.assert_close(states[row], states_of(bundle, PAIRS.prompts[i])[0], rtol=0, atol=2e-3)
        assert torch.equal(batch["x1"][row], PAIRS.x1[i].float())
    with torch.no_grad():
        out = x + bundle.unet(x, torch.tensor(1000.0), states).sample
    assert float(loss) == pytest.approx((out - batch["x1"]).square().mean().item(), rel=1e-5)


def test_distilling_a_diffusion_network_asks_at_the_end_of_its_schedule(
    own: Callable[..., Bundle], pairs: PairReader
) -> None:
    bundle = own(kind="one-step", prediction="v_prediction")
    stage, spy = distil_stage(DISTIL, bundle, pairs), Spy(bundle.unet)
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        loss = stage.loss(spy, batch)
        [(x, time, states)] = spy.asked
        out = -bundle.unet(x, torch.tensor(999.0), states).sample  # zero SNR: X₀ + v = X̂₁ = −(the output)
    assert torch.equal(time, torch.full((5,), 999.0))
    assert float(loss) == pytest.approx((out - batch["x1"]).square().mean().item(), rel=1e-5)


def test_a_perfect_student_costs_nothing(own: Callable[..., Bundle], pairs: PairReader) -> None:
    bundle = own(kind="one-step", prediction="velocity")
    stage = distil_stage(DISTIL, bundle, pairs)
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        v = bundle.unet(batch["x0"], torch.full((5,), 1000.0), batch["states"]).sample
        assert float(stage.loss(bundle.unet, {**batch, "x1": batch["x0"] + v})) == 0.0
        assert float(stage.loss(bundle.unet, {**batch, "x1": batch["x0"] + v + 0.5})) == pytest.approx(0.25, rel=1e-4)


# -- the autoencoder ---------------------------------------------------------------------------------


def squares(count: int, side: int = 32) -> list[Picture]:
    """Coloured squares on white."""
    pictures = []
    for i in range(count):
        pixels = np.full((side, side, 3), 255, np.uint8)
        pixels[4 + i : 20 + i, 6:24] = (40 * i, 200 - 30 * i, 90)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append(Picture(image=file.getvalue(), name=f"square {i}"))
    return pictures


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_loss_of_the_autoencoder_is_l1_the_moments_and_the_features(weight: float) -> None:
    spec = Autoencoder(
        name="a", latent_channels=4, widths=(8, 16, 16), latent_noise=0.0, perceptual_weight=weight, train=TRAIN
    )
    stage = autoencoder_stage(spec, squares(4), 32)
    batch = stage.batch(Draw(0, 0))
    network: Any = stage.network
    with torch.no_grad():
        loss = stage.loss(network, batch)
        z = network.vae.encode(batch["pictures"]).latent
        out = network.vae.decode(z).sample
        channels = z.transpose(0, 1).flatten(1)
        moments = (channels.mean(1) ** 2).mean() + (channels.std(1) + 1e-6).log().square().mean()
        wanted = (out - batch["pictures"]).abs().mean() + MOMENT_WEIGHT * moments
        if weight:
            wanted = wanted + weight * Lite1()(out, batch["pictures"])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)


def test_going_on_from_an_autoencoder_trains_its_decoder_alone(tiny: Bundle) -> None:
    vae = copy.deepcopy(tiny.vae)
    pictures = to_tensor(np.stack([p.pixels(32) for p in squares(4)]))
    with torch.no_grad():
        latents, before = encode_pictures(vae, pictures), decode_latents(vae, encode_pictures(vae, pictures))
    spec = Autoencoder(name="d", model="a", latent_channels=4, train=TRAIN)
    stage = autoencoder_stage(spec, squares(4), 32, vae=vae)
    optimiser = torch.optim.SGD(stage.network.parameters(), lr=0.1)
    stage.loss(stage.network, stage.batch(Draw(0, 0))).backward()
    optimiser.step()
    with torch.no_grad():
        assert torch.equal(encode_pictures(vae, pictures), latents)
        assert not torch.equal(decode_latents(vae, latents), before)


# -- prompts and their states --------------------------------------------------------------------


def test_each_prompt_is_encoded_once() -> None:
    encoded: list[str] = []

    def encode(prompts: Sequence[str]) -> Tensor:
        encoded.extend(prompts)
        return torch.tensor([[[float(len(p))]] for p in prompts])

    cache = TextCache(encode)
    assert cache(["a", "bb", "a"]).flatten().tolist() == [1, 2, 1]
    assert cache(["bb", "ccc", "", "a"]).flatten().tolist() == [2, 3, 0, 1]
    assert encoded == ["a", "bb", "ccc", ""]
    cache(["a", ""])
    assert len(encoded) == 4


def test_states_do_not_depend_on_when_a_prompt_was_met() -> None:
    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.full((len(prompts), 1, 1), 0.1)  # not a half-precision number

    cache = TextCache(encode)
    first = cache(["a"])
    assert torch.equal(first, cache(["a"])) and first.dtype == torch.float32
    assert first.item() == torch.tensor(0.1).half().float().item()


def picture(i: int, style: str = "") -> Picture:
    return Picture(image=b"", name=f"thing{i}", keywords=(f"word{i}",), style=style)


def named(prompt: str) -> set[str]:
    """The pictures that a prompt speaks of."""
    words = prompt.replace(",", " ").split()
    return {w.replace("word", "thing") for w in words if w.startswith(("thing", "word"))}


@pytest.mark.parametrize("mixtures", [0.0, 0.5, 1.0])
def test_prompts_speak_of_every_picture_before_the_first_returns(mixtures: float) -> None:
    pictures = [picture(i) for i in range(40)]
    prompts = draw_prompts(pictures, 100, mixtures, seed=3)
    assert len(prompts) == 100
    everything = {p.name for p in pictures}
    for start in (0, 40):
        assert set().union(*map(named, prompts[start : start + 40])) == everything
    if not mixtures:  # the rest of a round repeats none
        tail = [named(p) for p in prompts[80:]]
        assert len(set().union(*tail)) == 20


def test_prompts_are_a_function_of_the_seed() -> None:
    pictures = [picture(i, "noto") for i in range(20)]
    state = random.getstate()
    drawn = draw_prompts(pictures, 50, 0.3, seed=1)
    assert random.getstate() == state
    assert drawn == draw_prompts(pictures, 50, 0.3, seed=1) != draw_prompts(pictures, 50, 0.3, seed=2)


@pytest.mark.parametrize("mixtures", [0.0, 0.2, 1.0])
def test_the_share_of_mixtures_is_the_one_asked_for(mixtures: float) -> None:
    prompts = draw_prompts([picture(i, "noto") for i in range(50)], 2000, mixtures, seed=0)
    assert np.mean([" and " in p for p in prompts]) == pytest.approx(mixtures, abs=0.04)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_prompts_is_dropped(share: float) -> None:
    prompts = drop_prompts(["a"] * 2000, share, seed=0)
    assert len(prompts) == 2000 and set(prompts) <= {"a", ""}
    assert np.mean([p == "" for p in prompts]) == pytest.approx(share, abs=0.04)
