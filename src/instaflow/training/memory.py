"""What large networks need to fit: a network shared out among processes, 8-bit moments, fewer activations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from instaflow.errors import RecipeError
from instaflow.recipe import Train


def layout(spec: Train) -> torch.memory_format:
    """channels_last, the faster one, unless FSDP or 8-bit blocks count on a tensor's elements standing in order."""
    return torch.contiguous_format if spec.fsdp or spec.optimiser == "adamw-8bit" else torch.channels_last


def learning(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: a LoRA's alone, where the network beneath it is frozen."""
    return [p for p in network.parameters() if p.requires_grad]


def build_optimiser(network: nn.Module, spec: Train) -> torch.optim.Optimizer:
    """AdamW, torch's fused one or with its moments in 8 bits (Dettmers et al. 2022).

    Raises:
        RecipeError: the 8-bit one's package is missing.
    """
    parameters = learning(network)
    options: dict[str, Any] = {"lr": spec.lr, "betas": (0.9, 0.99), "weight_decay": spec.weight_decay}
    if spec.optimiser == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
    except ImportError as error:
        raise RecipeError("optimiser = 'adamw-8bit' needs a package: pip install 'instaflow[scale]'") from error
    optimiser: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return optimiser


def can_checkpoint(network: nn.Module) -> bool:
    """Whether diffusers can compute this network's activations anew."""
    return bool(getattr(network, "_supports_gradient_checkpointing", False))


def fewer_activations(network: nn.Module, name: str) -> None:
    """Activation checkpointing (Chen et al. 2016), block by block.

    Raises:
        RecipeError: this network cannot.
    """
    if not can_checkpoint(network):
        raise RecipeError(f"{name}: gradient_checkpointing is for U-Nets; {type(network).__name__} has none")
    network.enable_gradient_checkpointing()  # type: ignore[operator]


# -- a network shared out ----------------------------------------------------------------------------


def sharded(network: nn.Module) -> Any:
    """A copy whose weights are shared out among all processes (FSDP2), block by block; the original waits on the CPU.

    Weights stay fp32 and autocast lowers them: a policy of FSDP would lower the network's inputs too, and
    bf16 cannot tell τ = 999 from 1000.
    """
    own = copy.deepcopy(network)
    network.cpu()
    units = set(getattr(own, "_no_split_modules", None) or ())
    for module in reversed([m for m in own.modules() if type(m).__name__ in units]):  # inner ones first
        fully_shard(module)
    return fully_shard(own)


def unshard(own: nn.Module, network: nn.Module) -> nn.Module:
    """The original with the weights of its shared-out copy, on every process."""
    device = next(own.parameters()).device
    network.load_state_dict({k: whole(v) for k, v in own.state_dict().items()})
    return network.to(device)


def whole(value: Any) -> Any:
    """A shared-out tensor put together again, on the CPU; anything else as it is. All processes call it."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def spread(value: Any, like: Tensor) -> Any:
    """A whole tensor shared out as `like` is, if that is and they have one shape."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
