"""What a recipe costs before it runs: pictures, forward passes, FLOPs, storage, memory a sample and GPU-days.

FLOPs are counted by running each stage's networks on torch's meta device, where tensors have shapes and no
values. A multiplication and an addition are two. Training costs three forward passes a picture, the backward
pass being twice the forward one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instaflow.data.pairs import BYTES
from instaflow.errors import RecipeError
from instaflow.models.hub import HUB_ID
from instaflow.models.networks import build_autoencoder, build_tiny_decoder, build_unet, decode_latents
from instaflow.models.perceptual import LPIPS, Lite1
from instaflow.models.pruned import PrunedUNet
from instaflow.models.stacked import StackedUNet
from instaflow.recipe import (
    Autoencoder,
    Control,
    Decoder,
    Distil,
    Evaluate,
    OnPairs,
    Pairs,
    Personalise,
    Recipe,
    Reflow,
    Stage,
    Teacher,
    kind,
)
from instaflow.training.memory import can_checkpoint

TRAINING_STEP = 3
TOKENS = {384: 32, 768: 77}  # text encoders: MiniLM as we feed it, CLIP ViT-L/14
DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One stage's bill."""

    stage: str
    kind: str
    images: int
    """Pictures trained on or drawn."""
    forwards: int
    """Forward passes of the stage's own network, a training step counted three times."""
    flops: float
    storage_mb: float
    """What is kept of it: pairs."""
    sample_mb: float = 0.0
    """Activations that a training step keeps for each picture of a micro-batch."""

    @property
    def drawing(self) -> bool:
        """Whether it only runs networks forward."""
        return self.kind in ("pairs", "evaluate")


# -- networks without weights --------------------------------------------------------------------------


class Networks:
    """The networks of a recipe's stages on the meta device. A model that is not here counts as Stable Diffusion 1.5."""

    def __init__(self, recipe: Recipe) -> None:
        """Of this recipe; `assumed` names the models that were not here."""
        self.recipe, self.assumed = recipe, set[str]()

    def unet(self, name: str) -> Any:
        """The U-Net that a stage makes, or of a folder or hub id."""
        stage = self._stage(name)
        match stage:
            case Teacher() if not stage.model:
                size = self.recipe.data.size // 8
                channels = self.vae(stage.autoencoder).config.latent_channels
                with torch.device("meta"):
                    return build_unet(stage, latent_channels=channels, latent_size=size, text_width=384)
            case Reflow() | Distil() if stage.stack:
                return StackedUNet.of(self.unet(stage.model), stage.stack)
            case Teacher() | Reflow() | Distil() | Personalise() | Pairs():
                return self.unet(stage.model)
        config = self._config(name, "unet")
        with torch.device("meta"):
            if config is None:
                return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
            families = {family.__name__: family for family in (UNet2DConditionModel, StackedUNet, PrunedUNet)}
            return families[config["_class_name"]].from_config(config)

    def vae(self, name: str) -> Any:
        """The autoencoder that a stage works with."""
        stage = self._stage(name)
        match stage:
            case Autoencoder():
                with torch.device("meta"):
                    return build_autoencoder(stage)
            case Teacher():
                return self.vae(stage.autoencoder)
            case Reflow() | Distil() | Personalise() | Pairs():
                return self.vae(stage.model)
        config = self._config(name, "vae")
        with torch.device("meta"):
            if config is None:
                widths = (128, 256, 512, 512)
                down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
                return AutoencoderKL(
                    block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=2
                )
            import diffusers

            return getattr(diffusers, config["_class_name"]).from_config(config)

    def _stage(self, name: str) -> Stage | None:
        return next((s for s in self.recipe.stages if s.name == name), None)

    def _config(self, name: str, part: str) -> dict[str, Any] | None:
        """The network's config, from a folder or the hub's cache; None where neither has it."""
        path = Path(name) / part / "config.json"
        if not path.exists() and HUB_ID.fullmatch(name):
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(name, f"{part}/config.json")
            path = Path(cached) if isinstance(cached, str) else path
        if not path.exists():
            self.assumed.add(name)
            return None
        config: dict[str, Any] = json.loads(path.read_text())
        return config


def _inputs(unet: Any, count: int, device: str = "meta") -> tuple[Tensor, Tensor, Tensor]:
    config = unet.config
    width, side = config.cross_attention_dim, config.sample_size
    x = torch.zeros(count, config.in_channels, side, side, device=device)
    states = torch.zeros(count, TOKENS.get(width, 77), width, device=device)
    return x, torch.full((count,), 999.0, device=device), states


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in `work()`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def forward_flops(unet: Any) -> int:
    """FLOPs of one U-Net evaluation of one picture."""
    unet.set_attn_processor(AttnProcessor())  # plain products, that the counter knows
    return count_flops(lambda: unet(*_inputs(unet, 1)))


def kept_bytes(work: Callable[[], Any], *networks: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `work()`, each storage once, the networks' own left out."""
    own = {t.untyped_storage()._cdata for n in networks for t in (*n.parameters(), *n.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        work()
    return sum(storage.nbytes() for storage in kept.values())


def step_bytes(unet: Any, stage: Stage) -> int:
    """Activations of one picture in a training step of a U-Net, at the precision that the recipe names."""
    train = getattr(stage, "train")  # noqa: B009 — stages without it do not come here
    lower = torch.float32 if train.precision == "no" else torch.bfloat16
    unet = nn.Module.to(unet, lower).train().requires_grad_(True)  # diffusers' own `to` warns
    unet.set_attn_processor(AttnProcessor())
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    x, t, states = _inputs(unet, 1)
    return kept_bytes(lambda: unet(x.to(lower), t, states.to(lower)), unet)


class Decoding:
    """What a perceptual loss adds: the decoder with a gradient and the network that compares."""

    def __init__(self, vae: Any, stage: OnPairs, size: int) -> None:
        """Pictures of `size` pixels, or of the crop that the stage decodes."""
        side = stage.perceptual_crop if 0 < stage.perceptual_crop < size // 8 else size // 8
        self.vae, self.distance = vae, (LPIPS() if stage.perceptual else Lite1()).to("meta")
        self.z = torch.zeros(1, vae.config.latent_channels, side, side, device="meta")
        self.stage = stage

    def flops(self) -> int:
        """Of one picture: both decoded, both shown to the network, and back through one of each."""
        decode = count_flops(lambda: decode_latents(self.vae, self.z))
        with torch.no_grad():
            picture = decode_latents(self.vae, self.z)
        look = count_flops(lambda: self.distance.unit_maps(picture))
        return 3 * decode + 3 * look

    def bytes(self) -> int:
        """Activations of one picture kept for the way back."""
        if self.stage.train.gradient_checkpointing and can_checkpoint(self.vae):
            self.vae.enable_gradient_checkpointing()
        z = self.z.clone().requires_grad_(True)
        return kept_bytes(lambda: self.distance.unit_maps(decode_latents(self.vae, z)), self.vae, self.distance)


# -- bills ---------------------------------------------------------------------------------------------


def bills(recipe: Recipe, only: str | None = None) -> tuple[list[Cost], set[str]]:
    """The cost of every stage, or of one, and the models that were assumed to be Stable Diffusion 1.5."""
    networks = Networks(recipe)
    stages = [recipe.stage(only)] if only else recipe.stages
    return [cost(stage, recipe, networks) for stage in stages], networks.assumed


def cost(stage: Stage, recipe: Recipe, networks: Networks | None = None) -> Cost:
    """Images, forward passes, FLOPs, memory and storage of one stage."""
    networks = networks or Networks(recipe)
    storage, memory, flops = 0.0, 0, 0.0
    match stage:
        case Autoencoder():
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
            vae = networks.vae(stage.model or stage.name)
            size = recipe.data.size
            picture = torch.zeros(1, 3, size, size, device="meta")
            flops = forwards * count_flops(lambda: vae(picture))
        case Decoder():
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
            own, side = networks.vae(stage.model), recipe.data.size // 8
            z = torch.zeros(1, own.config.latent_channels, *[min(stage.crop or side, side)] * 2, device="meta")
            with torch.device("meta"):
                tiny = build_tiny_decoder(stage, own.config.latent_channels)
            flops = forwards * count_flops(lambda: decode_latents(tiny, z))
            flops += images * count_flops(lambda: decode_latents(own, z))
        case Control():
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
            unet = networks.unet(stage.model)
            flops = forwards * forward_flops(unet)  # an upper bound: of the U-Net no weight has a gradient
            memory = step_bytes(unet, stage)
        case Teacher() | Reflow() | Distil():
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
            unet = networks.unet(stage.name)
            flops = forwards * forward_flops(unet)
            memory = step_bytes(unet, stage)
            if isinstance(stage, Reflow | Distil) and stage.loss != "l2":
                decoding = Decoding(networks.vae(stage.model), stage, recipe.data.size)
                flops += images * decoding.flops()
                memory += decoding.bytes()
        case Personalise():  # the prior's drawing, a fifth of a run, is left out, and so is a perceptual loss
            images = stage.train.steps * stage.train.batch_size
            forwards = TRAINING_STEP * images
            unet = networks.unet(stage.model)
            flops = forwards * forward_flops(unet)
            memory = step_bytes(unet, stage)
        case Pairs():
            images = stage.count
            forwards = images * stage.steps * (2 if stage.guidance > 1 else 1)
            unet = networks.unet(stage.model)
            flops = forwards * forward_flops(unet)
            config = unet.config
            storage = images * config.in_channels * config.sample_size**2 * BYTES / 1e6
        case Evaluate():
            images = 2 * stage.count * len(stage.models)
            forwards = 0
            for label in stage.models:
                name, _, steps = label.partition("@")
                passes = 2 * stage.count * int(steps or 1)
                forwards += passes
                flops += passes * forward_flops(networks.unet(name))
    return Cost(
        stage=stage.name,
        kind=kind(stage),
        images=images,
        forwards=forwards,
        flops=float(flops),
        storage_mb=round(storage, 1),
        sample_mb=round(memory / 1e6, 1),
    )


# -- how fast a GPU is ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speed:
    """FLOP/s that a device reaches in this work."""

    draw: float
    train: float


def speed(gpu: str) -> Speed:
    """Of a named GPU, from a short calibration.

    'a100': two rows of the published run (InstaFlow, appendix), Stable Diffusion 1.5 at 512 pixels: 200,000 pairs
    a day, each 25 guided steps; 70,000 × 64 pictures of reflow in 11.2 days. 'here': a few steps on this machine.

    Raises:
        RecipeError: another name.
    """
    if gpu == "a100":
        with torch.device("meta"):
            one = forward_flops(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
        return Speed(draw=200_000 * 50 * one / DAY, train=70_000 * 64 / 11.2 * TRAINING_STEP * one / DAY)
    if gpu == "here":
        return measure()
    raise RecipeError(f"--gpu {gpu} is not known; allowed: a100, here")


@cache
def measure(seconds: float = 5.0) -> Speed:
    """FLOP/s of a small U-Net on this machine's device, bf16, forward and in training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config: dict[str, Any] = {
        "block_out_channels": (128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 384,
        "sample_size": 16,
    }
    batch = 16 if device == "cpu" else 256
    with torch.device("meta"):
        one = forward_flops(UNet2DConditionModel(**config))
    unet: Any = UNet2DConditionModel(**config).to(device, memory_format=torch.channels_last)
    x, t, states = _inputs(unet, batch, device)

    def rate(step: Callable[[], Any], passes: int) -> float:
        with torch.autocast(device, torch.bfloat16):
            step()
            begun, steps = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                step()
                steps += 1
            if device == "cuda":
                torch.cuda.synchronize()
        return steps * batch * passes * one / (time.perf_counter() - begun)

    with torch.no_grad():
        draw = rate(lambda: unet(x, t, states), 1)
    return Speed(draw=draw, train=rate(lambda: unet(x, t, states).sample.square().mean().backward(), TRAINING_STEP))


def days(bill: Cost, device: Speed) -> float:
    """Days that one such GPU takes for a stage."""
    return bill.flops / (device.draw if bill.drawing else device.train) / DAY
