"""Stable Diffusion 1.x in one .safetensors file, in the layout of the original LDM code.

The tensors say the architecture, so that full-size and tiny files load alike; the converters of names
are those of diffusers. What such a file does not hold: the tokenizer (CLIP's, shipped with the package),
the schedule (Stable Diffusion's own) and the numbers of heads (8 in the U-Net, 64 channels a head in CLIP).
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instaflow.errors import BundleError

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
MERGES = Path(__file__).with_name("clip_merges.txt.gz")
SCALING_FACTOR = 0.18215
PROMPT_TOKENS = 77

State = dict[str, Tensor]


def read_ldm(path: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """The networks and tokenizer of a Stable Diffusion 1.x checkpoint, in fp32.

    Raises:
        BundleError: unreadable, of another family (SD 2, SDXL, a LoRA), or tensors missing.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"cannot load {path}: {error}") from error
    for prefix, what in ((UNET, "U-Net"), (VAE, "autoencoder"), (CLIP, "CLIP text encoder")):
        if not any(key.startswith(prefix) for key in state):
            raise BundleError(
                f"{path} has no {what} under {prefix}…: it is no Stable Diffusion 1.x checkpoint in the LDM layout; "
                "SD 2, SDXL and LoRA files are not read"
            )
    try:
        unet_config, vae_config, clip_config = _unet_config(state), _vae_config(state), _clip_config(state)
        unet = UNet2DConditionModel(**unet_config)
        vae = AutoencoderKL(**vae_config)
        clip = CLIPTextModel(CLIPTextConfig(**clip_config))
        _fill(unet, convert_ldm_unet_checkpoint(dict(state), {"layers_per_block": 2, **unet_config}))
        _fill(vae, convert_ldm_vae_checkpoint(dict(state), vae_config))
        _fill(clip, convert_ldm_clip_checkpoint(state))
    except (KeyError, RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise BundleError(f"{path} is not whole, or no Stable Diffusion 1.x checkpoint: {reason[:200]}") from error
    return unet, vae, clip, clip_tokenizer(int(clip_config["vocab_size"]))


def _fill(network: nn.Module, state: State) -> None:
    wanted = network.state_dict()
    prefix = "text_model." if any(key.startswith("text_model.") for key in state) else ""
    if prefix and not any(key.startswith(prefix) for key in wanted):  # transformers ≥ 5.6 has no such wrapper
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value.float() for key, value in state.items() if not key.endswith("position_ids")}
    network.load_state_dict(state, strict=True)


def _width(state: State, key: str, axis: int = 0) -> int:
    return int(state[key].shape[axis])


def _count(state: State, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), … there are."""
    count = 0
    while any(key.startswith(pattern.format(count)) for key in state):
        count += 1
    return count


def _unet_config(state: State) -> dict[str, Any]:
    # input_blocks: 0 is conv_in, then two residual blocks and a downsampling a level
    blocks = _count(state, UNET + "input_blocks.{}.")
    starts = range(1, blocks, 3)
    attention = [f"{UNET}input_blocks.{i}.1.norm.weight" in state for i in starts]
    first = next(i for i, there in zip(starts, attention, strict=True) if there)
    widths = tuple(_width(state, f"{UNET}input_blocks.{i}.0.out_layers.3.weight") for i in starts)
    return {
        "sample_size": 64,
        "in_channels": _width(state, UNET + "input_blocks.0.0.weight", 1),
        "out_channels": _width(state, UNET + "out.2.weight"),
        "block_out_channels": widths,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "cross_attention_dim": _width(state, f"{UNET}input_blocks.{first}.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": 8,
        "norm_num_groups": min(32, widths[0]),
    }


def _vae_config(state: State) -> dict[str, Any]:
    levels = _count(state, VAE + "encoder.down.{}.")
    widths = tuple(_width(state, f"{VAE}encoder.down.{i}.block.0.conv2.weight") for i in range(levels))
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": _width(state, VAE + "post_quant_conv.weight"),
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": _count(state, VAE + "encoder.down.0.block.{}."),
        "norm_num_groups": min(32, widths[0]),
        "sample_size": 64 * 2 ** (levels - 1),
        "scaling_factor": SCALING_FACTOR,
    }


def _clip_config(state: State) -> dict[str, Any]:
    width = _width(state, CLIP + "embeddings.token_embedding.weight", 1)
    return {
        "vocab_size": _width(state, CLIP + "embeddings.token_embedding.weight"),
        "hidden_size": width,
        "intermediate_size": _width(state, CLIP + "encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": _count(state, CLIP + "encoder.layers.{}."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": _width(state, CLIP + "embeddings.position_embedding.weight"),
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def clip_tokenizer(size: int = 49408) -> CLIPTokenizer:
    """OpenAI CLIP's byte-pair tokenizer, 77 tokens; a smaller `size` keeps the most frequent merges.

    Raises:
        BundleError: `size` has no room for the single bytes.
    """
    if not 514 <= size <= 49408:
        raise BundleError(f"a CLIP vocabulary of {size} tokens is not allowed; 514 to 49408")
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()[: size - 514]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(m.split()) for m in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=PROMPT_TOKENS)


def _byte_letters() -> list[str]:
    """A printable character for each byte, printable ones first: the order of CLIP's (and GPT-2's) vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = sum(byte not in shown for byte in range(256))
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(hidden)]
