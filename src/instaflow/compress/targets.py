"""Named small shapes of Stable Diffusion's U-Net: BK-SDM's base, small and tiny (Kim et al. 2023, arXiv 2305.15798).

    base    one residual and attention block a stage less, on the way down and up
    small   base without the middle
    tiny    small without the innermost stage

All are plain `UNet2DConditionModel`s; weights are the full network's where a layer survives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle
from instaflow.models.pruned import PrunedUNet
from instaflow.models.stacked import StackedUNet

TARGETS = ("base", "small", "tiny")
BY_LEVEL = ("block_out_channels", "attention_head_dim", "num_attention_heads", "only_cross_attention",
            "cross_attention_dim", "transformer_layers_per_block")  # fmt: skip


def named(bundle: Bundle, target: str) -> Bundle:
    """The bundle with a U-Net of this shape, not healed.

    Raises:
        BundleError: its U-Net is not of Stable Diffusion's kind, or there is no such target.
    """
    if target not in TARGETS:
        raise BundleError(f"unknown target {target!r}; allowed: {', '.join(TARGETS)}")
    unet: Any = bundle.unet
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    levels = len(config["block_out_channels"])
    plain = not isinstance(unet, PrunedUNet | StackedUNet)
    if not plain or config["layers_per_block"] != 2 or levels < 3 or unet.mid_block is None:
        raise BundleError(
            f"target {target!r} is for U-Nets as Stable Diffusion's, two layers a stage and a middle; "
            f"{bundle.card.name!r} has another shape: give a share of its FLOPs"
        )
    config["layers_per_block"] = 1
    if target != "base":
        config["mid_block_type"] = None
    if target == "tiny":
        for key in BY_LEVEL:
            if isinstance(config[key], tuple | list):
                config[key] = tuple(config[key])[:-1]
        config["down_block_types"] = tuple(config["down_block_types"])[:-1]
        config["up_block_types"] = tuple(config["up_block_types"])[1:]
    with unet.device:
        small = UNet2DConditionModel(**config)
    small.load_state_dict(_inherited(unet.state_dict(), small.state_dict(), levels - len(config["block_out_channels"])))
    card = {"name": f"{bundle.card.name}-{target}"}
    return replace(bundle, unet=small.to(unet.device).train(unet.training)).with_card(**card)


def _inherited(old: Mapping[str, Tensor], new: Mapping[str, Tensor], fewer: int) -> dict[str, Tensor]:
    """The new network's weights: of the way up its stages are the outer ones, its second block the old third."""

    def source(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "up_blocks":
            parts[1] = str(int(parts[1]) + fewer)
            if parts[2] in ("resnets", "attentions") and parts[3] == "1":
                parts[3] = "2"  # the first meets the stage below, the last the one above
        return ".".join(parts)

    found = {}
    for name, weight in new.items():
        inherited = old.get(source(name))
        # what the innermost stage of tiny gets from below has another width: it begins as it is
        found[name] = inherited if inherited is not None and inherited.shape == weight.shape else weight
    return {k: torch.clone(v) for k, v in found.items()}
