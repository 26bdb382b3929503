"""`checkpoint.pt`: weights, their average, optimiser and step; written whole or not at all, checked when read."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from instaflow.errors import DataError
from instaflow.training.memory import learning, spread, whole


def save(
    folder: Path, network: nn.Module, ema: EMAModel, optimiser: torch.optim.Optimizer, step: int, *, write: bool = True
) -> None:
    """Write `checkpoint.pt` whole or not at all; of processes that share a network out all call, one writes.

    Raises:
        DataError: it could not be written, a full disk for example; the one before it is as it was.
    """
    part = folder / "checkpoint.tmp"
    state = {"step": step, "model": _learnt(network), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
    state = tree_map(whole, state)
    if not write:
        return
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch says a full disk as RuntimeError
        free = shutil.disk_usage(folder).free / 1e6
        part.unlink(missing_ok=True)
        raise DataError(
            f"cannot write the checkpoint of step {step} to {folder} ({free:.0f} MB free); "
            "the one before it is whole: make room and run again"
        ) from error
    part.replace(folder / "checkpoint.pt")


def restore(folder: Path, network: nn.Module, ema: EMAModel, optimiser: torch.optim.Optimizer) -> int:
    """Load `checkpoint.pt` if there is one; returns the step to go on from.

    Raises:
        DataError: the file is damaged, or of another network.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes a checksum for each tensor and reads past it
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        parameters, own = learning(network), network.state_dict()
        if state["model"].keys() != _learnt(network).keys():
            raise ValueError("it is of another network")
        network.load_state_dict(own | _like(state["model"], own))
        state["ema"]["shadow_params"] = [
            spread(s, p) for s, p in zip(state["ema"]["shadow_params"], parameters, strict=True)
        ]
        ema.load_state_dict(state["ema"])
        moments = state["optimiser"]["state"]
        for i, own in moments.items():
            moments[i] = {k: spread(v, parameters[i]) for k, v in own.items()}
        optimiser.load_state_dict(state["optimiser"])
        step = int(state["step"])
    except (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, UnpicklingError, BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"damaged checkpoint {path}: {reason[:150]}; remove it to train from the beginning") from error
    ema.to(parameters[0].device)  # it keeps the file's device
    return step


def _learnt(network: nn.Module) -> dict[str, Any]:
    """The state without frozen parameters, which are the model's own and need no keeping."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {k: v for k, v in network.state_dict().items() if k not in frozen}


def _like(state: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    """Each tensor shared out as the network's own of that name is."""
    return {k: spread(v, own[k]) if k in own else v for k, v in state.items()}
