"""Prune: which blocks of a one-step network matter least, found by leaving each out.

A block's worth is what the distillation loss at t = 0 grows by without it, on calibration pairs. The one whose worth
is least for the work it saves is dropped, and what is left is measured anew, until the target is reached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instaflow import __version__
from instaflow.data.pairs import PairReader, read_manifest
from instaflow.errors import BundleError
from instaflow.flow import euler
from instaflow.models.bundle import Bundle
from instaflow.models.card import bundle_hash
from instaflow.models.hub import locate
from instaflow.models.pruned import PrunedUNet, branches, drop, inner, narrowable
from instaflow.models.sampling import noise
from instaflow.models.velocity import network_velocity

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Block:
    """One that could go."""

    name: str
    worth: float
    """What the loss grows by without it, as a share of the loss of the network that it was left out of."""
    flops: int
    """Of one picture."""
    parameters: int
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pruned network keeps, and what that was decided by."""

    blocks: list[Block]
    dropped: list[str]
    narrowed: Mapping[str, Tensor]
    """Inner channels to keep, by block."""
    flops: tuple[int, int]
    """Of one picture, before and after."""
    loss: float
    """Of the network before, on the calibration pairs."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Pairs that worth is measured on: x0, x1 (N, C, h, w) and token states (N, L, D)."""

    x0: Tensor
    x1: Tensor
    states: Tensor

    @classmethod
    def of(cls, bundle: Bundle, pairs: PairReader, count: int) -> Calibration:
        """The first `count` pairs of an epoch's order."""
        chosen = pairs.batch(0, 0, min(count, len(pairs)))
        x1 = chosen.x1.float()
        return cls(x0=noise(chosen.seeds, x1.shape[1:]), x1=x1, states=bundle.encode(chosen.prompts).cpu().clone())

    def loss(self, bundle: Bundle, unet: nn.Module) -> float:
        """Distillation's L2 of a network, InstaFlow, Alg. 2."""
        with torch.no_grad():
            parts = [self._error(bundle, unet, i).item() for i in range(0, len(self.x0), BATCH)]
        return sum(parts) / self.x1.numel()

    def gradient(self, bundle: Bundle, unet: nn.Module) -> None:
        """Add up the loss's gradient in the network's parameters."""
        for i in range(0, len(self.x0), BATCH):
            self._error(bundle, unet, i).backward()

    def _error(self, bundle: Bundle, unet: nn.Module, first: int) -> Tensor:
        x0, x1, states = (x[first : first + BATCH].to(bundle.device) for x in (self.x0, self.x1, self.states))
        velocity = network_velocity(unet, bundle.card.prediction, bundle.schedule, states)
        with torch.autocast(bundle.device.type, torch.bfloat16):
            out = euler(velocity, x0, steps=1)
        return (out.float() - x1).square().sum()


def count(unet: Any) -> tuple[int, dict[str, int]]:
    """FLOPs of one picture, of all and of each module by name; a multiplication and an addition are two."""
    config = unet.config
    with torch.device("meta"):
        shape = copy.deepcopy(unet).to("meta") if unet.device.type != "meta" else unet
        shape.set_attn_processor(AttnProcessor())  # plain products, that the counter knows
        x = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        states = torch.zeros(1, 77 if config.cross_attention_dim == 768 else 32, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shape(x, 999.0, states)
    root = f"{type(shape).__name__}."
    by_name = {k.removeprefix(root): sum(v.values()) for k, v in counter.get_flop_counts().items()}
    return counter.get_total_flops(), by_name


def plan(
    bundle: Bundle,
    calibration: Calibration,
    target: float,
    width: float = 1.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What to leave out.

    Args:
        bundle: a one-step model.
        calibration: what worth is measured on.
        target: the share of the U-Net's FLOPs to be rid of, 0 ≤ target < 1.
        width: the share of inner channels to keep everywhere before blocks are dropped; 1 narrows nothing.
        progress: told what was dropped.

    Raises:
        BundleError: dropping everything that can go would not reach the target.
    """
    whole: Any = bundle.unet
    total, _ = count(whole)
    narrowed = narrowest(bundle, calibration, width) if width < 1 else {}
    unet: Any = PrunedUNet.of(whole, [], narrowed) if narrowed else copy.deepcopy(whole)
    flops, each = count(unet)
    sizes = {n: sum(p.numel() for p in unet.get_submodule(n).parameters()) for n in branches(unet)}
    costs = {n: each.get(n, 0) - _left(each, n) for n in sizes}
    bare = copy.deepcopy(unet)
    drop(bare, list(sizes))
    if (least_of_all := count(bare)[0]) > (1 - target) * total:
        raise BundleError(
            f"target {target:g} cannot be reached: without any of its blocks the U-Net still has "
            f"{least_of_all / total:.0%} of its FLOPs"
        )
    before = base = calibration.loss(bundle, unet)
    worth: dict[str, float] = {}
    dropped: list[str] = []
    while True:
        worth |= _worths(bundle, calibration, unet, base)
        if flops <= (1 - target) * total:
            break
        left = [n for n in sizes if n not in dropped and costs[n] > 0]
        least = min(left, key=lambda n: worth[n] / costs[n])
        dropped.append(least)
        drop(unet, [least])
        flops, base = count(unet)[0], calibration.loss(bundle, unet)
        progress(least)
    blocks = [Block(name=n, worth=worth[n], flops=costs[n], parameters=sizes[n], kept=n not in dropped) for n in sizes]
    return Plan(blocks=blocks, dropped=dropped, narrowed=narrowed, flops=(total, flops), loss=before)


def _left(each: Mapping[str, int], name: str) -> int:
    """FLOPs of a residual block's shortcut, which stays."""
    return each.get(f"{name}.conv_shortcut", 0)


def _worths(bundle: Bundle, calibration: Calibration, unet: nn.Module, base: float) -> dict[str, float]:
    """Of each block that is left: relative growth of the loss without it."""
    found = {}
    for name in branches(unet):
        without = copy.deepcopy(unet)
        drop(without, [name])
        found[name] = calibration.loss(bundle, without) / base - 1
    return found


def narrowest(bundle: Bundle, calibration: Calibration, width: float) -> dict[str, Tensor]:
    """The inner channels worth most in each block, a share `width` of them, at least one unit.

    A channel's worth is |Σ w·∂L/∂w| over what it feeds into the next layer: the change of the loss without it, to
    first order (Molchanov et al. 2019, arXiv 1906.10771).
    """
    unet = copy.deepcopy(bundle.unet).requires_grad_(True)
    with torch.enable_grad():
        calibration.gradient(bundle, unet)
    kept = {}
    for name, block in narrowable(unet).items():
        channels, unit = inner(block)
        weight: Any = block.conv2.weight if hasattr(block, "conv2") else block.net[2].weight  # type: ignore[union-attr,index]
        saliency = (weight * weight.grad).transpose(0, 1).reshape(channels // unit, -1).sum(1).abs()
        groups = saliency.argsort(descending=True)[: max(1, round(width * channels / unit))].sort().values
        kept[name] = (groups[:, None] * unit + torch.arange(unit)).flatten().cpu()
    return kept


def prune(bundle: Bundle, chosen: Plan) -> Bundle:
    """The bundle with what the plan keeps, not healed; without anything to leave out, the same networks."""
    if not chosen.dropped and not chosen.narrowed:
        return bundle
    return replace(bundle, unet=PrunedUNet.of(bundle.unet, chosen.dropped, chosen.narrowed))


def card_of(bundle: Bundle, whole: Bundle, model: str, target: str, pairs: Path, settings: Mapping[str, Any]) -> Bundle:
    """The healed bundle under a card that says what it was cut from and how it was healed."""
    lineage = {
        "code": __version__,
        "parent": bundle_hash(locate(model)),
        "pruned": {"target": target, "healed": dict(settings)},
        "pairs": msgspec.to_builtins(read_manifest(pairs)),
        "of": whole.card.lineage,
    }
    name = f"{whole.card.name}-{target if target.isalpha() else f'less-{float(target):g}'}"
    return bundle.with_card(name=name, lineage=lineage, results={})
