"""Two U-Nets in series: what they compute, how they start, how they are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from instaflow.models.bundle import Bundle
from instaflow.models.sampling import sample
from instaflow.models.stacked import StackedUNet


def inputs(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *bundle.latent_shape(), generator=generator)
    return x, torch.tensor([1000.0, 300.0]), bundle.encode(["a cat", "a dog"])


@torch.no_grad()
def test_joined_at_latents_it_is_one_after_the_other(tiny: Bundle) -> None:
    x, t, states = inputs(tiny)
    stacked = StackedUNet.of(tiny.unet, "latents")
    wanted = tiny.unet(tiny.unet(x, t, states).sample, t, states).sample
    torch.testing.assert_close(stacked(x, t, states).sample, wanted)


@torch.no_grad()
def test_joined_at_features_the_second_sees_the_firsts_last_maps(tiny: Bundle) -> None:
    x, t, states = inputs(tiny)
    seen: list[torch.Tensor] = []
    last = tiny.unet.up_blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    try:
        tiny.unet(x, t, states)
    finally:
        last.remove()
    stacked = StackedUNet.of(tiny.unet, "features")
    first = stacked.first(x, t, states).sample
    torch.testing.assert_close(first, seen[0])
    torch.testing.assert_close(stacked(x, t, states).sample, stacked.second(first, t, states).sample)


def test_the_joint_is_what_is_dropped(tiny: Bundle) -> None:
    def size(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    whole = 2 * size(tiny.unet)
    assert size(StackedUNet.of(tiny.unet, "latents")) == whole
    joint = size(tiny.unet.conv_norm_out, tiny.unet.conv_out, tiny.unet.conv_in)
    assert size(StackedUNet.of(tiny.unet, "features")) == whole - joint


def test_stable_diffusion_stacked_has_1_7_billion_parameters() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        stacked = StackedUNet(unet=config)
    count = sum(p.numel() for p in stacked.parameters())
    assert count == 2 * 859_520_964 - (320 * 2 + 320 * 4 * 9 + 4 + 4 * 320 * 9 + 320)
    assert round(count / 1e9, 1) == 1.7


@pytest.mark.parametrize("joint", ["features", "latents"])
def test_a_stack_is_saved_and_loaded_whole(own: Callable[..., Bundle], tmp_path: Path, joint: str) -> None:
    bundle = own(kind="one-step", prediction="velocity", steps=1)
    bundle = replace(bundle, unet=StackedUNet.of(bundle.unet, joint))
    again = Bundle.load(bundle.save(tmp_path / "stacked", dtype=torch.float32))
    ask = {"seeds": [3], "steps": 1}
    torch.testing.assert_close(sample(bundle, ["a cat"], **ask), sample(again, ["a cat"], **ask))
    assert isinstance(again.unet, StackedUNet) and again.latent_shape() == bundle.latent_shape()
