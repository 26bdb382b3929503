"""Heal: a pruned one-step network learns from the one it was cut from, then from pairs as any one-step network does.

First its output and its feature maps are to be the unpruned network's, on the pairs' prompts with new noises: the
network itself says what it draws of them. Then InstaFlow, Alg. 2, on the pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from instaflow.data.pairs import PairReader
from instaflow.errors import DataError
from instaflow.flow import euler
from instaflow.models.bundle import Bundle
from instaflow.models.velocity import network_velocity
from instaflow.recipe import Distil, Train
from instaflow.training.batches import TextCache
from instaflow.training.distil import distil_stage
from instaflow.training.trainer import Batch, Draw, Stage, train

SHARE = 0.5  # of the pictures, that imitate the unpruned network
FEATURES = 0.1  # weight of all feature maps together, each relative to the unpruned network's own
PERCEPTUAL = 0.5  # weight of the perceptual distance in the second part: L2 alone ends in mist


def heal(
    bundle: Bundle,
    whole: Bundle,
    pairs: PairReader,
    folder: Path,
    *,
    images: int,
    batch_size: int = 8,
    lr: float = 2e-4,
    loss: Literal["l2", "perceptual"] = "perceptual",
    seed: int = 0,
) -> Bundle:
    """Train a pruned network; run again after an interruption it goes on.

    Args:
        bundle: the pruned one-step model.
        whole: what it was cut from.
        pairs: a teacher's pictures.
        folder: for checkpoints; the caller's to remove.
        images: pictures trained on in both parts together.
        batch_size: of both.
        lr: peak learning rate, of both.
        loss: of the second part, as a distil stage has it.
        seed: of every random choice.

    Raises:
        DataError: the folder was begun with other settings, or the pairs are of another shape.
    """
    if (shape := tuple(pairs.load(0).x1.shape[1:])) != bundle.latent_shape():
        raise DataError(f"the pairs have latents {shape}, the model {bundle.latent_shape()}")
    first = max(1, round(SHARE * images / batch_size))
    second = max(1, images // batch_size - first)
    specs = [Train(steps=n, batch_size=batch_size, lr=lr, lr_warmup_steps=min(20, n // 5)) for n in (first, second)]
    distil = Distil(name="heal", model="pruned", pairs="pairs", loss=loss, perceptual_weight=PERCEPTUAL, train=specs[1])
    _begin(
        folder,
        {
            "imitate": msgspec.to_builtins(specs[0]),
            "distil": msgspec.to_builtins(distil),
            "seed": seed,
            "dropped": list(bundle.unet.config.get("dropped", [])),
            "model": whole.card.name,
        },
    )
    bundle.unet.requires_grad_(True)
    train(imitate_stage(specs[0], bundle, whole, pairs), specs[0], folder / "imitate", seed=seed, name="imitate")
    bundle.unet.requires_grad_(True)
    train(distil_stage(distil, bundle, pairs), specs[1], folder / "distil", seed=seed, name="distil")
    return bundle


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Say what is healed how, or check that what was begun is this."""
    path, said = folder / "settings.json", json.dumps(settings, indent=1)
    if path.exists() and path.read_text() != said:
        raise DataError(f"{folder} was begun with other settings; remove it, or name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(said)


def imitate_stage(spec: Train, bundle: Bundle, whole: Bundle, pairs: PairReader) -> Stage:
    """Output and features of `whole`, at t = 0, for the pairs' prompts and noises that are new at every step."""
    encode = TextCache(bundle.encode)
    wanted, shown = Watch(whole.unet), Watch(bundle.unet)

    def batch(draw: Draw) -> Batch:
        prompts = pairs.batch(draw.seed, draw.step, spec.batch_size, draw.part).prompts
        return {"x0": draw.own(draw.normal(spec.batch_size, *bundle.latent_shape())), "states": encode(prompts)}

    def step(network: nn.Module, batch: Batch) -> Tensor:
        velocity = network_velocity(network, bundle.card.prediction, bundle.schedule, batch["states"])
        return euler(velocity, batch["x0"], steps=1).float()

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = step(whole.unet, batch)
        error = (step(network, batch) - target).square().mean()
        both = [(shown.maps[k].float(), wanted.maps[k].float()) for k in shown.maps if k in wanted.maps]
        far = [(a - b).square().mean() / b.square().mean() for a, b in both if a.shape == b.shape]
        return error + FEATURES * torch.stack(far).mean()

    return Stage(network=bundle.unet, batch=batch, loss=loss)


class Watch:
    """The feature maps that a U-Net's stages gave last, numbered from the outside, where any two networks agree."""

    def __init__(self, unet: Any) -> None:
        """Of this network, from now on."""
        self.maps: dict[str, Tensor] = {}
        stages = {f"down {i}": block for i, block in enumerate(unet.down_blocks)}
        stages |= {f"up {i}": block for i, block in enumerate(reversed(unet.up_blocks))}
        stages |= {"mid": unet.mid_block} if unet.mid_block is not None else {}
        for name, stage in stages.items():
            stage.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            self.maps[name] = out[0] if isinstance(out, tuple) else out

        return hook
