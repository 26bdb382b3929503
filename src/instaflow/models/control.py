"""ControlNets (Zhang et al. 2023, arXiv 2302.05543) on a bundle's U-Net, in diffusers' own folders.

A ControlNet is a copy of the U-Net's encoder that reads a control picture; what it finds is added to the U-Net's skip
connections through convolutions that start at zero, so that an untrained one changes nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle, load_network, publish, reading, save_network
from instaflow.models.card import CONTROL_CARD, ControlCard, check_control
from instaflow.models.request import Control
from instaflow.models.stacked import StackedUNet


class ControlledUNet(nn.Module):
    """A U-Net with one ControlNet, called as `unet(x, time, states, pictures)`; only the ControlNet learns."""

    def __init__(self, unet: Any, control: ControlNetModel) -> None:
        """The U-Net is frozen."""
        super().__init__()
        self.unet, self.control = unet.requires_grad_(False), control

    def forward(self, x: Tensor, time: Tensor, states: Tensor, pictures: Tensor) -> Any:
        """x: (B, C, h, w), pictures in [0, 1]: (B, 3, H, W)."""
        down, middle = self.control(x, time, states, pictures, return_dict=False)
        return self.unet(x, time, states, down_block_additional_residuals=down, mid_block_additional_residual=middle)


class _Drawing(nn.Module):
    """A U-Net under the controls of one drawing, called as the U-Net alone is: one evaluation of each network."""

    def __init__(self, unet: Any, controls: Sequence[Control], factor: int) -> None:
        super().__init__()
        self.unet, self.controls, self.factor = unet, controls, factor
        self.config = unet.config

    def set_attn_processor(self, processor: Any) -> None:
        self.unet.set_attn_processor(processor)

    def forward(self, x: Tensor, time: Tensor, states: Tensor) -> Any:
        # the share of the way that is behind at this evaluation, 0 at noise
        behind = 1 - float(torch.as_tensor(time).flatten()[0]) / 1000
        down: Sequence[Tensor] = ()
        middle: Tensor | None = None
        for control in self.controls:
            if not (control.start <= behind + 1e-3 < control.end and control.scale):
                continue
            height, width = x.shape[-2] * self.factor, x.shape[-1] * self.factor
            # under guidance x holds both halves; diffusers' early InstaFlow pipelines gave it the picture of one
            pictures = torch.from_numpy(control.pixels(height, width)).to(x).expand(len(x), -1, -1, -1)
            one, one_middle = control.network(
                x, time, states, pictures, conditioning_scale=control.scale, return_dict=False
            )
            down = one if middle is None else [a + b for a, b in zip(down, one, strict=True)]
            middle = one_middle if middle is None else middle + one_middle
        if middle is None:
            return self.unet(x, time, states)
        return self.unet(
            x, time, states, down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle
        )


def controlled(bundle: Bundle, controls: Sequence[Control]) -> Bundle:
    """The bundle under these controls; itself under none."""
    if not controls:
        return bundle
    unet: Any = _Drawing(bundle.unet, controls, bundle.factor)
    return replace(bundle, unet=unet)


def build_control(bundle: Bundle, *, middle_attention: bool = True) -> ControlNetModel:
    """An untrained ControlNet of a bundle: its U-Net's encoder, and convolutions of zeros.

    Args:
        bundle: the model to control.
        middle_attention: copy the attention of the U-Net's middle too.

    Raises:
        BundleError: a stack of two U-Nets.
    """
    if isinstance(bundle.unet, StackedUNet):
        raise BundleError(f"{bundle.card.name!r} is a stack of two U-Nets; ControlNets are for one")
    steps = bundle.factor.bit_length()  # a level a halving of the picture's side, and the picture's own
    widths = (16, 32, 96, 256)[:steps] if steps <= 4 else (16, 32, 96, *[256] * (steps - 3))
    like = ControlNetModel.from_unet(
        bundle.unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
    )
    config = {k: v for k, v in like.config.items() if not k.startswith("_")}
    config["addition_embed_type_num_heads"] = bundle.unet.config.addition_embed_type_num_heads  # `from_unet` forgets it
    if not middle_attention:
        config["mid_block_type"] = "UNetMidBlock2D"
    control = ControlNetModel(**config)
    own = control.state_dict()
    control.load_state_dict({**own, **{k: v for k, v in bundle.unet.state_dict().items() if k in own}})
    return _fit(control, bundle).requires_grad_(True)


def _fit(control: Any, bundle: Bundle) -> Any:
    if bundle.device.type == "cpu" and bundle.unet.config.sample_size <= 16:
        control.set_attn_processor(AttnProcessor())  # as `Bundle` does
    return control.float().to(bundle.device)


def save_control(control: ControlNetModel, card: ControlCard, folder: Path) -> Path:
    """Write a ControlNet as fp16 in diffusers' layout with its card, whole or not at all."""
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_network(control, part)
        (part / CONTROL_CARD).write_text(json.dumps(msgspec.to_builtins(card), indent=2) + "\n")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return publish(part, folder)


def load_control(folder: str | Path, bundle: Bundle, base_hash: str = "") -> ControlNetModel:
    """Read a ControlNet for a bundle: a diffusers folder, or what a control stage made.

    Args:
        folder: where it is.
        bundle: the model that it shall control.
        base_hash: of that model, to be compared with the one it was trained for, when both are known.

    Raises:
        BundleError: nothing there, another kind of network, or one for another base: the first difference is named.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BundleError(f"no ControlNet in {folder}: it has no config.json")
    with reading(folder / "config.json"):
        name = json.loads((folder / "config.json").read_text()).get("_class_name")
        if name != "ControlNetModel":
            raise ValueError(f"it is a {name}; allowed: ControlNetModel")
    control = load_network(ControlNetModel, folder, low_cpu_mem_usage=False)
    ours = bundle.unet.config
    for field in ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types"):
        theirs, own = getattr(control.config, field), getattr(ours, field)
        if _plain(theirs) != _plain(own):
            raise BundleError(
                f"the ControlNet {folder} is for another base: {field} is {_plain(theirs)}, "
                f"{bundle.card.name!r} has {_plain(own)}"
            )
    check_control(folder, bundle.card.name, base_hash)
    return _fit(control, bundle).eval().requires_grad_(False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
