"""Costs: against networks with weights, the published run, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instaflow.cli import main
from instaflow.errors import RecipeError
from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents
from instaflow.models.perceptual import Lite1
from instaflow.recipe import Data, Distil, Pairs, Recipe, Reflow, Train, load_recipe
from instaflow.training.cost import Networks, bills, count_flops, days, forward_flops, kept_bytes, speed

TRAIN = Train(steps=10, batch_size=8, precision="no")


def test_a_convolution_and_a_product_are_counted_by_hand() -> None:
    with torch.device("meta"):
        conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    x, y = torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(2, 7, device="meta")
    assert count_flops(lambda: conv(x)) == 2 * 8 * 8 * 5 * 3 * 9
    assert count_flops(lambda: linear(y)) == 2 * 2 * 7 * 11


def test_what_autograd_keeps_is_counted_by_hand() -> None:
    linear = nn.Linear(7, 11, device="meta")
    x = torch.zeros(2, 7, device="meta", requires_grad=True)
    assert kept_bytes(lambda: linear(x).square().sum(), linear) == 4 * (2 * 7 + 2 * 11)  # its input, and square's


def test_counts_without_weights_are_those_with(tiny: Bundle, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "bundle")
    stage = Distil(name="d", model=str(folder), pairs=str(folder), loss="perceptual", train=TRAIN)
    [bill], assumed = bills(Recipe(name="r", data=Data(size=32), stages=(stage,)))
    x, states, time = torch.randn(1, 4, 4, 4), torch.randn(1, 77, 32), torch.tensor([999.0])
    z, lite = torch.randn(1, 4, 4, 4, requires_grad=True), Lite1()

    def flops(work: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        return counter.get_total_flops()

    unet = flops(lambda: tiny.unet(x, time, states))
    decode = flops(lambda: decode_latents(tiny.vae, z))
    both = flops(lambda: lite.unit_maps(decode_latents(tiny.vae, z)))
    assert bill.images == 80 and bill.forwards == 240 and not assumed
    assert bill.flops == 240 * unet + 80 * 3 * both and both > decode > 0

    storages: dict[int, Tensor] = {}
    networks = (tiny.unet, tiny.vae, lite)
    fixed = {t.data_ptr() for n in networks for t in (*n.parameters(), *n.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in fixed:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    kept = 0
    tiny.unet.requires_grad_(True)
    for work in (lambda: tiny.unet.train()(x, time, states), lambda: lite.unit_maps(decode_latents(tiny.vae, z))):
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            work()
        kept += sum(t.untyped_storage().nbytes() for t in storages.values())
    tiny.unet.eval().requires_grad_(False)
    assert bill.sample_mb == pytest.approx(kept / 1e6, rel=0.02)


def test_the_published_run_costs_what_was_published() -> None:
    found, assumed = bills(load_recipe("recipes/sd15.toml"))
    a100 = speed("a100")
    spent = {b.stage: days(b, a100) for b in found}
    assert assumed == {"stable-diffusion-v1-5/stable-diffusion-v1-5"}
    assert spent["pairs"] + spent["straight-pairs"] == pytest.approx(16) and spent["reflow-1"] == pytest.approx(11.2)
    # those two set the speed; these three follow from it
    for stage, published in (("2-rectified", 64.0), ("distil-l2", 54.4), ("one-step", 53.6)):
        assert spent[stage] == pytest.approx(published, rel=0.05)
    assert sum(spent.values()) == pytest.approx(199.2, rel=0.05)
    assert sum(b.storage_mb for b in found) == pytest.approx(2 * 1.6e6 * 4 * 64 * 64 * 2 / 1e6)


def test_the_stack_of_two_has_seventeen_hundred_million_parameters_and_twice_the_work() -> None:
    networks = Networks(load_recipe("recipes/sd15-stacked.toml"))
    stack, one = networks.unet("one-step"), networks.unet("runs/sd15/2-rectified/bundle")
    assert sum(p.numel() for p in stack.parameters()) / 1e9 == pytest.approx(1.7, abs=0.05)
    assert forward_flops(stack) / forward_flops(one) == pytest.approx(2, rel=0.01)


def test_a_crop_and_checkpointing_save_memory() -> None:
    def sample_mb(crop: int, checkpointing: bool) -> float:
        train = Train(steps=1, gradient_checkpointing=checkpointing)
        stage = Distil(
            name="d", model="a/b", pairs="a/b", loss="perceptual", perceptual="vgg", perceptual_crop=crop, train=train
        )
        [bill], _ = bills(Recipe(name="r", data=Data(size=512), stages=(stage,)))
        return bill.sample_mb

    whole, crop, anew, both = (sample_mb(*c) for c in ((0, False), (16, False), (0, True), (16, True)))
    assert whole > 2 * crop and crop > anew / 2 and both < anew / 3


def test_a_decoder_that_cannot_be_checkpointed_is_counted_as_it_is(tiny: Bundle, tmp_path: Path) -> None:
    model = str(tiny.save(tmp_path / "bundle"))
    spec = Distil(
        name="d", model=model, pairs="a/b", loss="perceptual", train=Train(steps=1, gradient_checkpointing=True)
    )
    [bill], _ = bills(Recipe(name="r", data=Data(size=32), stages=(spec,)))
    assert bill.sample_mb > 0


def test_a_third_reflow_is_three_more_lines() -> None:
    first = Pairs(name="p", model="a/b", count=10, steps=2, guidance=1.0)
    stages = (
        first,
        Reflow(name="2", model="a/b", pairs="p", train=TRAIN),
        Pairs(name="q", model="2", count=10, steps=2, guidance=1.0),
        Reflow(name="3", model="2", pairs="q", train=TRAIN),
    )
    found, _ = bills(Recipe(name="r", stages=stages))
    assert found[0].flops == found[2].flops and found[1].flops == found[3].flops > 0


def test_the_speed_of_this_machine_is_measured_and_another_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="--gpu h9000 is not known; allowed: a100, here"):
        speed("h9000")
    from instaflow.training import cost

    cost.measure.cache_clear()
    here = cost.measure(0.2)
    assert 1e9 < here.train < 1e15 and 1e9 < here.draw < 1e15
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["instaflow", "run", "recipes/sd15.toml", "--dry-run", "--gpu", "a100"])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr().out
    assert left.value.code == 0 and "stable-diffusion-v1-5 is not on this machine" in out
    [total] = [line for line in out.splitlines() if " all " in line]
    assert [cell.strip() for cell in total.split("│")[1:-1]] == [
        "all", "73.7 M", "372 M", "308 E", "", "105 G", "202 d",
    ]  # fmt: skip
