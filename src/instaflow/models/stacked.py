"""Stacked U-Net: two U-Nets in series with unshared weights, InstaFlow-1.7B's network (InstaFlow, appendix).

What joins them can go: with `joint = "features"` the first gives its last feature maps (its out block is
dropped) and the second takes them (its in block is dropped); with "latents" both are whole.
"""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


class StackedUNet(ModelMixin, ConfigMixin):
    """Called as a `UNet2DConditionModel` is; `config` has the fields of it that callers read."""

    _supports_gradient_checkpointing = True
    _no_split_modules = UNet2DConditionModel._no_split_modules

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        unet: dict[str, Any],
        joint: str = "features",
        sample_size: int = 64,
        in_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        cross_attention_dim: int = 768,
    ) -> None:
        """`unet` is the config of one of the two; the fields after `joint` repeat some of it."""
        super().__init__()
        self.first = UNet2DConditionModel(**unet)
        self.second = UNet2DConditionModel(**unet)
        if joint == "features":
            self.first.conv_norm_out = None
            self.first.conv_out = nn.Identity()
            self.second.conv_in = nn.Identity()

    @classmethod
    def of(cls, unet: UNet2DConditionModel, joint: str) -> StackedUNet:
        """Both halves from one trained network; with "features" less their joining blocks."""
        plain = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        keys = ("sample_size", "in_channels", "block_out_channels", "cross_attention_dim")
        with unet.device:  # also where there are shapes alone
            stacked = cls(unet=plain, joint=joint, **{k: plain[k] for k in keys})
        for half in (stacked.first, stacked.second):
            wanted = half.state_dict()
            half.load_state_dict({k: v for k, v in unet.state_dict().items() if k in wanted}, strict=True)
        return stacked.to(unet.device).train(unet.training)

    def set_attn_processor(self, processor: Any) -> None:
        """To both halves."""
        self.first.set_attn_processor(processor)
        self.second.set_attn_processor(processor)

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        """Prediction (B, C, H, W) of latents (B, C, H, W), times (B,) and token states (B, L, D)."""
        between = self.first(sample, timestep, encoder_hidden_states).sample
        out: UNet2DConditionOutput = self.second(between, timestep, encoder_hidden_states)
        return out
