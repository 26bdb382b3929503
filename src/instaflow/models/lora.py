"""LoRA files on a loaded bundle, with a scale that each picture may choose anew (Hu et al. 2021, arXiv 2106.09685).

The files are those of diffusers, peft and kohya; diffusers reads them and peft's layers carry them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle, reading
from instaflow.models.hub import HUB_ID, download

ADAPTER = "lora"
HUB_FILE = "pytorch_lora_weights.safetensors"


def load_lora(bundle: Bundle, source: str | Path) -> None:
    """Put a LoRA on the bundle's U-Net and text encoder, in place, at scale 1.

    Args:
        bundle: a bundle without one.
        source: a .safetensors file, or a hub id whose repository has pytorch_lora_weights.safetensors.

    Raises:
        BundleError: no such file, no LoRA, one for another network, or the package peft is missing.
    """
    path = Path(source)
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = download(str(source), HUB_FILE) / HUB_FILE
    if path.suffix != ".safetensors" or not path.is_file():
        raise BundleError(f"no LoRA file {source}: it takes a .safetensors file or a hub id")
    try:
        import peft  # noqa: F401
        from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    except ImportError as error:
        raise BundleError("a LoRA needs the package peft: pip install 'instaflow[lora]'") from error
    with reading(path):
        state, alphas = Loader.lora_state_dict(path, unet_config=bundle.unet.config)
        own, text = ({k: v for k, v in state.items() if k.startswith(p)} for p in ("unet.", "text_encoder."))
        if not own:
            raise ValueError("it holds no LoRA of a U-Net")
        known = {name for name, _ in bundle.unet.named_modules()}
        if strange := [m for m in map(_module, own) if m not in known]:
            raise ValueError(f"it is for another network: this one has no {strange[0]}")
        Loader.load_lora_into_unet(own, alphas, bundle.unet, adapter_name=ADAPTER)
        if text:
            Loader.load_lora_into_text_encoder(text, alphas, bundle.text_encoder, adapter_name=ADAPTER)


def _module(key: str) -> str:
    """'unet.mid_block.….to_q.lora_A.weight' → the module it changes."""
    return key.removeprefix("unet.").split(".lora")[0].removesuffix(".processor")


def set_lora_scale(bundle: Bundle, scale: float) -> None:
    """How much of the LoRA counts from now on: 0 is none of it, 1 all; the model itself stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks: tuple[Any, ...] = (bundle.unet, bundle.text_encoder)
    layers: list[Any] = [m for network in networks for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.set_scale(ADAPTER, scale)


def merge_lora(bundle: Bundle) -> None:
    """Add the LoRA that is on the bundle to its weights, in place, at its present scale; no layer of it is left."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks: tuple[Any, ...] = (bundle.unet, bundle.text_encoder)
    for network in networks:
        for layer in [m for m in network.modules() if isinstance(m, BaseTunerLayer)]:
            layer.merge()
        recurse_remove_peft_layers(network)
        vars(network).pop("peft_config", None)
