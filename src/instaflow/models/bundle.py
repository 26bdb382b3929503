"""A bundle: the networks in a diffusers-layout folder, plus `instaflow.json`, the card that says what they are.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/  instaflow.json

safetensors only. A bundle is written whole or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, CLIPTextModel, PreTrainedTokenizerBase

from instaflow.errors import BundleError
from instaflow.flow import Velocity, guided
from instaflow.images import to_uint8
from instaflow.models.card import Card, bundle_hash, check_weights, read_card, write_card
from instaflow.models.hub import find_decoder, locate
from instaflow.models.networks import build_scheduler, decode_latents
from instaflow.models.pruned import PrunedUNet
from instaflow.models.request import check_prompt, check_request
from instaflow.models.safety import SafetyChecker
from instaflow.models.stacked import StackedUNet
from instaflow.models.velocity import Schedule, network_velocity

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The networks of one text-to-image model, ready to be called. All in evaluation mode."""

    unet: UNet2DConditionModel | StackedUNet
    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: PreTrainedTokenizerBase
    scheduler: DDIMScheduler
    card: Card
    safety: SafetyChecker | None = None

    def __post_init__(self) -> None:
        """On a CPU plain attention is the faster one for few positions: an eighth of a training step."""
        if self.device.type == "cpu" and self.unet.config.sample_size <= 16:
            self.unet.set_attn_processor(AttnProcessor())

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels a latent position, along a side."""
        return self.card.image_size // self.unet.config.sample_size

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(C, H/f, W/f) of one picture of `size` pixels."""
        side = (size or self.card.image_size) // self.factor
        return (self.unet.config.in_channels, side, side)

    @cached_property
    def schedule(self) -> Schedule | None:
        """The diffusion schedule, None for a network that predicts the velocity itself."""
        return None if self.card.prediction == "velocity" else Schedule(self.scheduler.alphas_cumprod)

    # -- the three things a runtime does --------------------------------------------------------

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token states (B, L, D) of prompts, padded to the encoder's fixed length; '' is the ∅ prompt."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.prompt_tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask if self.masked else None
        states: Tensor = self.text_encoder(tokens.input_ids, attention_mask=mask)[0]
        return states

    @property
    def masked(self) -> bool:
        """Whether the text encoder is told what is padding: BERT is, Stable Diffusion shows CLIP its padding too."""
        return not isinstance(self.text_encoder, CLIPTextModel)

    def velocity(self, states: Tensor, *, guidance: float = 1.0, negative: Tensor | None = None) -> Velocity:
        """The velocity field v(z, t | T), guided when guidance > 1, away from `negative` or from ∅."""
        field = network_velocity(self.unet, self.card.prediction, self.schedule, states)
        if guidance == 1.0:
            return field
        away = (self.encode([""]) if negative is None else negative).expand_as(states)
        return guided(field, network_velocity(self.unet, self.card.prediction, self.schedule, away), guidance)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Any:
        """uint8 pictures (B, H, W, 3) of latents (B, C, H/f, W/f)."""
        return to_uint8(decode_latents(self.vae, latents).float().cpu().numpy())

    # -- checks ---------------------------------------------------------------------------------

    @property
    def prompt_tokens(self) -> int:
        """Tokens the text encoder is given, start and end included."""
        return int(self.tokenizer.model_max_length)

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for an empty prompt or one longer than the encoder reads."""

        def tokens(text: str) -> list[tuple[int, int, bool]]:
            found = self.tokenizer(text, return_offsets_mapping=True)
            strange = self.tokenizer.unk_token_id if self.masked else None  # CLIP knows every byte
            return [
                (*place, i != strange) for place, i in zip(found["offset_mapping"], found["input_ids"], strict=True)
            ]

        check_prompt(prompt, tokens, self.prompt_tokens)

    def check_request(self, *, steps: int, guidance: float, size: int, negative: str = "") -> None:
        """Raise PromptError for steps, guidance, a negative prompt or a size that this kind of model cannot do."""
        unit = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        check_request(self.card, unit, steps=steps, guidance=guidance, size=size, negative=negative)

    # -- files ----------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        safety: bool = False,
        decoder: str | Path | None = None,
    ) -> Bundle:
        """Read a bundle; weights become fp32.

        Args:
            source: a diffusers-layout folder, ours or another's; a hub id; or a Stable Diffusion 1.x
                .safetensors file in the LDM layout.
            device: where the networks go.
            safety: load the bundle's own safety checker too, when it has one.
            decoder: a tiny decoder in place of the bundle's own autoencoder, as `load_decoder` takes it.

        Raises:
            BundleError: nothing there, a part missing or unreadable, or a card that makes no sense.
        """
        if decoder is not None:
            own = cls.load(source, device=device, safety=safety)
            return replace(own, vae=load_decoder(decoder, own))
        folder = locate(source)
        check_device(device)
        if folder.is_file():
            return cls._load_file(folder, device)
        card = read_card(folder)
        if (folder / "unet" / "openvino_model.xml").is_file():
            what = f"quantised ({card.quantised})" if card.quantised else "exported to OpenVINO"
            raise BundleError(
                f"{card.name!r} is {what}: it draws with the engine openvino and can no longer be changed; "
                "train, prune, quantise, or put a LoRA or a tiny decoder on what it was made of"
            )
        for part in PARTS:
            if not (folder / part).is_dir():
                raise BundleError(f"{folder} has no {part}/: it is not a whole bundle")
        # without its files the library makes up an empty tokenizer
        wanted = ["tokenizer_config.json", "tokenizer.json"]
        if (folder / "tokenizer" / "merges.txt").is_file():
            wanted[1] = "vocab.json"
        for file in wanted:
            if not (folder / "tokenizer" / file).is_file():
                raise BundleError(f"{folder / 'tokenizer'} has no {file}: it is not a whole bundle")
        with reading(folder / "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        with reading(folder / "scheduler"):
            # what another kind of scheduler leaves unsaid is said here: the defaults of the solvers differ
            config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
            scheduler = DDIMScheduler.from_config({"clip_sample": False, "timestep_spacing": "linspace", **config})
        bundle = cls(
            unet=_ready(_load_named(folder / "unet", UNet2DConditionModel, StackedUNet, PrunedUNet), device),
            vae=load_autoencoder(folder, device),
            text_encoder=_ready(_load_text_encoder(folder / "text_encoder"), device),
            tokenizer=tokenizer,
            scheduler=scheduler,
            card=msgspec.structs.replace(card, weights=""),  # of the file, not of what becomes of them
            safety=SafetyChecker.load(folder, device) if safety and (folder / "safety_checker").is_dir() else None,
        )
        check_weights(folder, card)
        return bundle

    @classmethod
    def _load_file(cls, path: Path, device: str | torch.device) -> Bundle:
        from instaflow.models.ldm import read_ldm  # a second of imports that a folder does not need

        unet, vae, text_encoder, tokenizer = read_ldm(path)
        return cls(
            unet=_ready(unet, device),
            vae=_ready(vae, device),
            text_encoder=_ready(text_encoder, device),
            tokenizer=tokenizer,
            scheduler=build_scheduler("epsilon"),
            card=Card(
                name=path.stem,
                kind="teacher",
                prediction="epsilon",
                image_size=vae.config.sample_size,
                guidance=5.0,
                licence="unknown",
                lineage={"recognised": "Stable Diffusion 1.x, LDM layout"},
            ),
        )

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> Path:
        """Write the bundle, whole or not at all, its weights in this precision."""
        part = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(part, ignore_errors=True)
        try:
            self._write(part, dtype)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return publish(part, folder)

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        for name, network in (("unet", self.unet), ("vae", self.vae), ("text_encoder", self.text_encoder)):
            save_network(network, folder / name, dtype=dtype)
        self.write_configs(folder)
        write_card(folder, msgspec.structs.replace(self.card, weights=bundle_hash(folder)))

    def write_configs(self, folder: Path) -> None:
        """All but the weights and the card."""
        self.unet.save_config(folder / "unet")
        self.vae.save_config(folder / "vae")  # type: ignore[operator]
        self.text_encoder.config.save_pretrained(folder / "text_encoder")  # type: ignore[union-attr,operator]
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "StableDiffusionPipeline",
            # diffusers finds a class of ours by its module, where this package is installed
            "unet": [library(self.unet), type(self.unet).__name__],
            "vae": ["diffusers", type(self.vae).__name__],
            "text_encoder": ["transformers", type(self.text_encoder).__name__],
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def with_card(self, **changes: Any) -> Bundle:
        """The same networks under a changed card."""
        return replace(self, card=msgspec.structs.replace(self.card, **changes))


def check_device(device: str | torch.device) -> None:
    """Raise BundleError for a device that torch does not know or cannot use here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # of a torch built without it
        there = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]  # type: ignore[union-attr]
        raise BundleError(f"torch has no device {str(device)!r} here; it has: {', '.join(there)}") from error


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Whatever goes wrong in reading `place` becomes one line that names it."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"cannot load {place}: {reason[:200]}") from error


def load_network(family: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained`, refusing weights that are not exactly the network's: the libraries make up missing ones.

    Raises:
        BundleError: unreadable, or tensors missing or left over.
    """
    with reading(folder):
        network, info = family.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    for what, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise BundleError(f"{folder} {what} weights: {', '.join(sorted(keys)[:3])}{' …' if len(keys) > 3 else ''}")
    return network


def _load_named(folder: Path, *families: Any) -> Any:
    """The network in `folder`, of the one of these classes that its config names."""
    with reading(folder / "config.json"):
        name = json.loads((folder / "config.json").read_text())["_class_name"]
        by_name = {family.__name__: family for family in families}
        if name not in by_name:
            raise ValueError(f"it is a {name}; allowed: {', '.join(by_name)}")
    return load_network(by_name[name], folder, low_cpu_mem_usage=False)


def _load_text_encoder(folder: Path) -> Any:
    with reading(folder / "config.json"):
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        family = {"bert": BertModel, "clip_text_model": CLIPTextModel}[kind]
    options: dict[str, Any] = {"add_pooling_layer": False} if family is BertModel else {}
    return load_network(family, folder, dtype=torch.float32, **options)


def load_autoencoder(folder: Path, device: str | torch.device) -> Any:
    """The autoencoder in `folder/vae`: of a bundle, or all that an autoencoder stage makes."""
    return _ready(_load_named(folder / "vae", AutoencoderDC, AutoencoderKL, AutoencoderTiny), device)


def load_decoder(source: str | Path, bundle: Bundle) -> Any:
    """A tiny decoder for a bundle's latents: a folder or hub id of diffusers' `AutoencoderTiny`, or what a stage made.

    Raises:
        BundleError: nothing there, another kind of network, or one for other latents.
    """
    folder = find_decoder(source)
    vae = _ready(_load_named(folder, AutoencoderTiny), bundle.device)
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    wanted = (bundle.latent_shape()[0], bundle.factor)
    if (channels, factor) != wanted:
        raise BundleError(
            f"the decoder {folder} is for latents of {channels} channels at 1/{factor} of the size; "
            f"{bundle.card.name!r} has {wanted[0]} at 1/{wanted[1]}"
        )
    return vae


def _ready(network: Any, device: str | torch.device) -> Any:
    return network.float().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def library(network: Any) -> str:
    """The module that a diffusers pipeline is to take a network's class from."""
    module: str = type(network).__module__
    return "diffusers" if module.startswith("diffusers.") else module


def save_network(network: Any, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """`save_pretrained` in this precision, leaving the network itself as it was."""
    copied = network if dtype == torch.float32 else nn.Module.to(copy.deepcopy(network), dtype)
    if isinstance(network, CLIPTextModel):  # transformers ≥ 5.6 dropped the prefix that every other reader expects
        state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in copied.state_dict().items()}
        copied.save_pretrained(folder, state_dict=state)
    else:
        copied.save_pretrained(folder, safe_serialization=True)


def publish(part: Path, folder: Path) -> Path:
    """Rename a finished folder into place, replacing an older one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
