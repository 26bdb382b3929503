"""A U-Net with blocks left out and others narrowed: a `UNet2DConditionModel` of the same names and calls.

Everything that can go is a residual branch, so what stands around it keeps its shape: of a residual block its
shortcut is left, of an attention block nothing. Narrowing takes inner channels of a residual block, whole groups of its
normalisation, so that the others' statistics stay what they were, and hidden units of a feed-forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

NORMS = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # branches of a transformer block, each with its own


class Shortcut(nn.Module):
    """What is left of a residual block."""

    def __init__(self, block: Any) -> None:
        """Of this one."""
        super().__init__()
        self.conv_shortcut, self.scale = block.conv_shortcut, block.output_scale_factor

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        """(B, C, h, w) → (B, C', h, w)."""
        out: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return out / self.scale


class Same(nn.Module):
    """What is left of an attention block."""

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor]:
        """(B, C, h, w) → the same."""
        return (x,)


class Zero(nn.Module):
    """What is left of a transformer's branch."""

    def forward(self, *_args: Any, **_options: Any) -> float:
        """0, to be added."""
        return 0.0


def branches(unet: nn.Module) -> list[str]:
    """Names of what can be left out: residual blocks, and of a transformer each attention and the feed-forward."""
    found = []
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            found.append(name)
        elif isinstance(module, BasicTransformerBlock):
            found += [f"{name}.{b}" for b in NORMS if not isinstance(getattr(module, b), Zero | None)]
    return found


def drop(unet: nn.Module, names: Iterable[str]) -> None:
    """Leave these branches out, in place; a transformer without any goes whole.

    Raises:
        KeyError: the network has no such branch.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        if name not in branches(unet):
            raise KeyError(f"it has no branch {name} to leave out")
        holder = unet.get_submodule(parent)
        if last in NORMS:
            setattr(holder, last, Zero())
            setattr(holder, NORMS[last], nn.Identity())
        else:
            setattr(holder, last, Shortcut(holder.get_submodule(last)))
    for name, module in list(unet.named_modules()):
        if isinstance(module, Transformer2DModel) and not branches(module):
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, Same())


# -- narrower ------------------------------------------------------------------------------------------


def inner(module: Any) -> tuple[int, int]:
    """(channels, the fewest that go together) inside a residual block or feed-forward."""
    if isinstance(module, ResnetBlock2D):
        return module.conv1.out_channels, module.conv1.out_channels // module.norm2.num_groups
    return module.net[2].in_features, 1


def narrow(module: Any, kept: Tensor) -> None:
    """Keep these inner channels of a residual block or feed-forward, in place.

    Args:
        module: the block.
        kept: their numbers, rising, (K,); of a residual block whole groups of its second normalisation.
    """
    width, unit = inner(module)
    if isinstance(module, ResnetBlock2D):
        both = module.time_embedding_norm == "scale_shift"
        module.conv1 = _rows(module.conv1, kept)
        if module.time_emb_proj is not None:
            module.time_emb_proj = _rows(module.time_emb_proj, torch.cat([kept, kept + width]) if both else kept)
        norm = nn.GroupNorm(len(kept) // unit, len(kept), module.norm2.eps)
        norm.weight.data, norm.bias.data = module.norm2.weight.data[kept], module.norm2.bias.data[kept]
        module.norm2, module.conv2 = norm, _columns(module.conv2, kept)
    else:
        gate = module.net[0].proj
        paired = gate.out_features == 2 * width  # GEGLU: values, then what opens them
        module.net[0].proj = _rows(gate, torch.cat([kept, kept + width]) if paired else kept)
        module.net[2] = _columns(module.net[2], kept)


def _rows(layer: Any, kept: Tensor) -> Any:
    return _cut(layer, layer.weight.data[kept], None if layer.bias is None else layer.bias.data[kept])


def _columns(layer: Any, kept: Tensor) -> Any:
    return _cut(layer, layer.weight.data[:, kept], None if layer.bias is None else layer.bias.data)


def _cut(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    out, into = weight.shape[:2]
    with weight.device:
        if hasattr(layer, "kernel_size"):
            new: Any = nn.Conv2d(into, out, layer.kernel_size, layer.stride, layer.padding, bias=bias is not None)
        else:
            new = nn.Linear(into, out, bias=bias is not None)
    new.weight.data = weight.clone(memory_format=torch.preserve_format)
    if bias is not None:
        new.bias.data = bias.clone()
    return new


def narrowable(unet: nn.Module) -> dict[str, nn.Module]:
    """Blocks that have inner channels."""
    return {n: m for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D | FeedForward)}


# -- the network ---------------------------------------------------------------------------------------


class PrunedUNet(UNet2DConditionModel):
    """A `UNet2DConditionModel` less what its config names; to stock diffusers an unknown class, which it says."""

    def __init__(self, dropped: Iterable[str] = (), narrowed: Mapping[str, int] | None = None, **kwargs: Any) -> None:
        """`dropped` are branches, `narrowed` inner channels by block; the rest is a `UNet2DConditionModel`'s."""
        super().__init__(**kwargs)
        self.register_to_config(dropped=list(dropped), narrowed=dict(narrowed or {}))
        for name, width in (narrowed or {}).items():
            narrow(self.get_submodule(name), torch.arange(width))
        drop(self, dropped)

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        """diffusers reads a config by the constructor's signature, and ours has two fields more."""
        more = {"dropped", "narrowed"} if issubclass(input_class, PrunedUNet) else set()
        keys: set[str] = UNet2DConditionModel._get_init_keys(UNet2DConditionModel) | more
        return keys

    @classmethod
    def of(cls, unet: Any, dropped: Iterable[str], narrowed: Mapping[str, Tensor]) -> PrunedUNet:
        """What is left of a trained network, its weights copied; one that was pruned before is pruned further.

        Args:
            unet: the network.
            dropped: its branches to leave out.
            narrowed: the inner channels to keep, by block.
        """
        plain = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        before = plain.pop("dropped", ()), plain.pop("narrowed", {})
        widths = {**before[1], **{name: len(kept) for name, kept in narrowed.items()}}
        with unet.device:
            pruned = cls(dropped=[*before[0], *dropped], narrowed=widths, **plain)
        whole = copy.deepcopy(unet)
        for name, kept in narrowed.items():
            narrow(whole.get_submodule(name), kept)
        drop(whole, dropped)
        pruned.load_state_dict(whole.state_dict(), strict=True)
        learns = next(unet.parameters()).requires_grad
        return pruned.to(unet.device).train(unet.training).requires_grad_(learns)
