"""Pruning: nothing dropped changes nothing, what is dropped is gone, what is left loads, draws and takes a LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from instaflow.compress.heal import Watch, heal
from instaflow.compress.prune import Calibration, count, plan, prune
from instaflow.compress.targets import named
from instaflow.data.pairs import Manifest, PairReader, open_manifest, open_pairs, shard_path, write_shard
from instaflow.errors import BundleError, DataError
from instaflow.models.bundle import Bundle
from instaflow.models.pruned import PrunedUNet, branches, inner, narrowable
from instaflow.models.sampling import noise, sample

COUNT = 8
ASK = {"seeds": [3, 4], "steps": 1}
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def pairs(one_step: Bundle, tmp_path: Path) -> Path:
    """What the tiny one-step model itself draws, and a little beside it."""
    folder, shape = tmp_path / "pairs", one_step.latent_shape()
    told = {"teacher": "", "sampler": "", "steps": 1, "guidance": 1.0, "noise": "", "prompts": "", "seed": 0}
    open_manifest(folder, Manifest(**told, count=COUNT, shard_size=COUNT, shape=shape))
    prompts, seeds = ["a cat", "a red apple"] * (COUNT // 2), list(range(COUNT))
    x1 = sample(one_step, prompts, seeds=seeds, steps=1) + 0.1 * noise(range(100, 100 + COUNT), shape)
    write_shard(shard_path(folder, 0), prompts=prompts, seeds=seeds, x1=x1)
    return folder


def reader(folder: Path) -> PairReader:
    return open_pairs(folder)


def calibration(bundle: Bundle, folder: Path) -> Calibration:
    return Calibration.of(bundle, reader(folder), COUNT)


def test_pruning_nothing_changes_nothing(one_step: Bundle, pairs: Path) -> None:
    chosen = plan(one_step, calibration(one_step, pairs), 0.0)
    assert not chosen.dropped and chosen.flops[0] == chosen.flops[1]
    assert prune(one_step, chosen) is one_step
    same = PrunedUNet.of(one_step.unet, [], {})
    for name, weight in one_step.unet.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight)
    x = noise([0], one_step.latent_shape())
    states = one_step.encode(["a cat"])
    torch.testing.assert_close(same(x, 1000.0, states).sample, one_step.unet(x, 1000.0, states).sample)


def test_the_target_is_reached_and_no_more_than_needed_is_dropped(one_step: Bundle, pairs: Path) -> None:
    chosen = plan(one_step, calibration(one_step, pairs), 0.1)
    assert chosen.flops[1] <= 0.9 * chosen.flops[0]
    pruned = prune(one_step, chosen)
    assert count(pruned.unet)[0] == chosen.flops[1]
    whole = PrunedUNet.of(one_step.unet, chosen.dropped[:-1], {})
    assert count(whole)[0] > 0.9 * chosen.flops[0]
    assert [b.name for b in chosen.blocks if not b.kept] == [n for n in branches(one_step.unet) if n in chosen.dropped]


def test_worth_is_the_growth_of_the_loss_without_the_block(one_step: Bundle, pairs: Path) -> None:
    measured = calibration(one_step, pairs)
    chosen = plan(one_step, measured, 0.0)
    last = chosen.blocks[-1]
    without = measured.loss(one_step, prune(one_step, plan_of([last.name], {})).unet)
    assert last.worth == pytest.approx(without / measured.loss(one_step, one_step.unet) - 1)


def test_what_cannot_be_reached_is_said(one_step: Bundle, pairs: Path) -> None:
    with pytest.raises(BundleError, match=r"target 0\.99 cannot be reached: without any of its blocks the U-Net still"):
        plan(one_step, calibration(one_step, pairs), 0.99)


def test_a_residual_block_leaves_its_shortcut(one_step: Bundle) -> None:
    with_shortcut = "up_blocks.0.resnets.0"
    pruned = PrunedUNet.of(one_step.unet, ["mid_block.resnets.0", with_shortcut], {})
    x = torch.randn(2, 64, 4, 4)
    shortcut = one_step.unet.get_submodule(f"{with_shortcut}.conv_shortcut")
    assert torch.equal(pruned.get_submodule(with_shortcut)(x, None), shortcut(x))
    assert torch.equal(pruned.mid_block.resnets[0](x, None), x)


def test_a_transformer_without_branches_goes_whole(one_step: Bundle) -> None:
    block = "mid_block.attentions.0.transformer_blocks.0"
    pruned = PrunedUNet.of(one_step.unet, [f"{block}.{b}" for b in ("attn1", "attn2", "ff")], {})
    assert not any("mid_block.attentions" in name for name in pruned.state_dict())
    x = torch.randn(1, 32, 4, 4)
    assert pruned.mid_block.attentions[0](x, encoder_hidden_states=None, return_dict=False) == (x,)


def test_narrowing_away_channels_that_do_nothing_changes_nothing(own: Callable[..., Bundle]) -> None:
    unet = own().unet
    x, states = torch.randn(2, 4, 4, 4), torch.randn(2, 16, 32)
    kept = {}
    for name, block in narrowable(unet).items():
        channels, unit = inner(block)
        keep = torch.arange(channels)[: channels // 2 // unit * unit]
        out = block.conv2 if hasattr(block, "conv2") else block.net[2]
        out.weight.data[:, len(keep) :] = 0
        kept[name] = keep
    wanted = unet(x, 1000.0, states).sample
    narrowed = PrunedUNet.of(unet, [], kept)
    torch.testing.assert_close(narrowed(x, 1000.0, states).sample, wanted)
    assert count(narrowed)[0] < count(unet)[0]


def test_a_dropped_block_is_gone_from_the_file_and_the_rest_loads(one_step: Bundle, tmp_path: Path) -> None:
    dropped = ["mid_block.resnets.1", "mid_block.attentions.0.transformer_blocks.0.ff"]
    width = torch.arange(16)
    pruned = prune(one_step, plan_of(dropped, {"down_blocks.0.resnets.0": width}))
    folder = pruned.save(tmp_path / "bundle", dtype=torch.float32)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any(n.startswith(("mid_block.resnets.1.", dropped[1])) for n in stored)
    assert stored["down_blocks.0.resnets.0.conv1.weight"].shape[0] == 16
    again = Bundle.load(folder)
    assert isinstance(again.unet, PrunedUNet)
    torch.testing.assert_close(sample(again, PROMPTS, **ASK), sample(pruned, PROMPTS, **ASK))
    further = PrunedUNet.of(again.unet, ["down_blocks.0.resnets.0"], {})
    assert further.config["dropped"] == [*dropped, "down_blocks.0.resnets.0"]


def plan_of(dropped: list[str], narrowed: dict[str, torch.Tensor]) -> object:
    from instaflow.compress.prune import Plan

    return Plan(blocks=[], dropped=dropped, narrowed=narrowed, flops=(2, 1), loss=0.0)


def test_a_diffusers_pipeline_takes_the_class_from_here(one_step: Bundle, tmp_path: Path) -> None:
    folder = prune(one_step, plan_of(["mid_block.resnets.1"], {})).save(tmp_path / "bundle")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["instaflow.models.pruned", "PrunedUNet"]  # imported by its name
    _, info = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert "mid_block.resnets.1.conv1.weight" in info["missing_keys"]


def test_a_foreign_block_is_refused_by_name(one_step: Bundle, tmp_path: Path) -> None:
    folder = prune(one_step, plan_of(["mid_block.resnets.1"], {})).save(tmp_path / "bundle")
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace("mid_block.resnets.1", "mid_block.resnets.9"))
    with pytest.raises(BundleError, match=r"cannot load .*no branch mid_block\.resnets\.9"):
        Bundle.load(folder)


def test_a_lora_goes_on_what_is_left_and_can_be_merged(one_step: Bundle, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from instaflow.models.lora import drop_lora, fuse_lora, load_lora

    pruned = prune(one_step, plan_of(["mid_block.resnets.1"], {}))
    torch.manual_seed(0)
    made = Bundle.load(pruned.save(tmp_path / "bundle", dtype=torch.float32))
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(made.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=state)
    plain = Bundle.load(tmp_path / "bundle")
    before = sample(plain, PROMPTS, **ASK)
    load_lora(plain, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    changed = sample(plain, PROMPTS, **ASK)
    assert not torch.equal(before, changed)
    fuse_lora(plain)
    drop_lora(plain)
    torch.testing.assert_close(sample(plain, PROMPTS, **ASK), changed)
    assert not any("lora" in name for name in plain.unet.state_dict())


def test_healing_lowers_the_loss_and_goes_on_where_it_was_broken(one_step: Bundle, pairs: Path, tmp_path: Path) -> None:
    measured = calibration(one_step, pairs)
    chosen = plan_of(["mid_block.resnets.1", "up_blocks.0.resnets.0"], {})
    cut = measured.loss(one_step, prune(one_step, chosen).unet)
    settings = {"images": 160, "batch_size": 8, "lr": 2e-3, "loss": "l2"}
    healed = heal(prune(one_step, chosen), one_step, reader(pairs), tmp_path / "a", **settings)
    assert measured.loss(one_step, healed.unet) < cut
    again = heal(prune(one_step, chosen), one_step, reader(pairs), tmp_path / "a", **settings)  # all of it done
    for name, weight in healed.unet.state_dict().items():
        assert torch.equal(weight, again.unet.state_dict()[name])
    with pytest.raises(DataError, match="was begun with other settings"):
        heal(prune(one_step, chosen), one_step, reader(pairs), tmp_path / "a", **{**settings, "lr": 1e-3})


def test_two_networks_of_one_shape_have_the_same_maps(one_step: Bundle) -> None:
    watches = [Watch(unet) for unet in (one_step.unet, PrunedUNet.of(one_step.unet, [], {}))]
    x, states = noise([0], one_step.latent_shape()), one_step.encode(["a cat"])
    for watch, unet in zip(watches, (one_step.unet, PrunedUNet.of(one_step.unet, [], {})), strict=True):
        unet(x, 1000.0, states)
        assert set(watch.maps) <= {"down 0", "down 1", "mid", "up 0", "up 1"}
    assert set(watches[0].maps) == {"down 0", "down 1", "mid", "up 0", "up 1"}


# -- Stable Diffusion's size, without weights ------------------------------------------------------


@pytest.fixture(scope="module")
def stable() -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def small(bundle: Bundle, unet: nn.Module) -> Bundle:
    from dataclasses import replace

    return replace(bundle, unet=unet)


@pytest.mark.parametrize(("target", "millions"), [("base", 579.4), ("small", 482.3), ("tiny", 323.4)])
def test_named_targets_have_the_published_sizes(
    one_step: Bundle, stable: nn.Module, target: str, millions: float
) -> None:
    """Kim et al. 2023, table 1: 0.58, 0.49 (0.48 as counted here) and 0.33 billion."""
    unet = named(small(one_step, stable), target).unet
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert count(unet)[0] < count(stable)[0]


def test_named_targets_are_for_networks_of_that_kind(one_step: Bundle) -> None:
    with pytest.raises(BundleError, match="target 'tiny' is for U-Nets as Stable Diffusion's"):
        named(one_step, "tiny")
    with pytest.raises(BundleError, match="unknown target 'huge'; allowed: base, small, tiny"):
        named(one_step, "huge")


def test_a_named_target_inherits_the_blocks_that_survive(one_step: Bundle) -> None:
    config = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "norm_num_groups": 8,
              "block_out_channels": (16, 16, 32), "attention_head_dim": 2,
              "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    whole = UNet2DConditionModel(**config)
    tiny = named(small(one_step, whole), "tiny").unet
    assert len(tiny.down_blocks) == len(tiny.up_blocks) == 2 and tiny.mid_block is None
    assert torch.equal(tiny.up_blocks[1].resnets[1].conv1.weight, whole.up_blocks[2].resnets[2].conv1.weight)
    assert torch.equal(tiny.down_blocks[1].resnets[0].conv1.weight, whole.down_blocks[1].resnets[0].conv1.weight)
    tiny(torch.zeros(1, 4, 4, 4), 1000.0, torch.zeros(1, 3, 32))
