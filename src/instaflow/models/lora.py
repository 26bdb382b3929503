"""LoRA files on a loaded bundle, several at once, each with a scale (Hu et al. 2021, arXiv 2106.09685).

The files are those of diffusers, peft and kohya; diffusers reads them and peft's layers carry them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle, reading
from instaflow.models.hub import find_lora
from instaflow.models.request import LoRA

ADAPTER = "lora"


def load_lora(bundle: Bundle, source: str | Path, name: str = ADAPTER) -> None:
    """Put a LoRA on the bundle's U-Net and text encoder, in place, at scale 1, beside those that are there.

    Args:
        bundle: what it is for.
        source: a .safetensors file, or a hub id whose repository has pytorch_lora_weights.safetensors.
        name: of this LoRA among the bundle's own.

    Raises:
        BundleError: no such file, no LoRA, one for another network, or the package peft is missing. The bundle is
            then as it was.
    """
    path = find_lora(source)
    try:
        import peft  # noqa: F401
        from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    except ImportError as error:
        raise BundleError("a LoRA needs the package peft: pip install 'instaflow[lora]'") from error
    with reading(path):
        state, alphas, metadata = Loader.lora_state_dict(
            _from_kohya(load_file(path), bundle) or path, unet_config=bundle.unet.config, return_lora_metadata=True
        )
        own, text = ({k: v for k, v in state.items() if k.startswith(p)} for p in ("unet.", "text_encoder."))
        if not own:
            raise ValueError("it holds no LoRA of a U-Net")
        for part, network in ((own, bundle.unet), (text, bundle.text_encoder)):
            _check(part, network)
        Loader.load_lora_into_unet(own, alphas, bundle.unet, adapter_name=name, metadata=metadata)
        if text:
            Loader.load_lora_into_text_encoder(text, alphas, bundle.text_encoder, adapter_name=name, metadata=metadata)
    for network in (bundle.unet, bundle.text_encoder):
        network.requires_grad_(False)


def _from_kohya(state: dict[str, Tensor], bundle: Bundle) -> dict[str, Tensor]:
    """kohya's file in peft's names, α/r within the factors; {} for another kind of file.

    A module's name there has _ for its dots; α is the rank where it is missing. diffusers' own conversion takes one
    module's α for all those without, and does not find every layer.
    """
    networks = (("unet", "lora_unet_", bundle.unet), ("text_encoder", "lora_te_", bundle.text_encoder))
    names = {
        f"{prefix}{name.replace('.', '_')}": f"{part}.{name}"
        for part, prefix, network in networks
        for name, _ in network.named_modules()
    }
    found: dict[str, Tensor] = {}
    for key in (k.removesuffix(".lora_down.weight") for k in state if k.endswith(".lora_down.weight")):
        name = names.get(key) or names.get(key.replace("lora_te_text_model_", "lora_te_"))
        if name is None:
            raise ValueError(f"it is for another network: this one has no {key}")
        down, up = (state[f"{key}.lora_{way}.weight"].float() for way in ("down", "up"))
        found[f"{name}.lora_A.weight"] = down
        found[f"{name}.lora_B.weight"] = up * float(state.get(f"{key}.alpha", len(down))) / len(down)
    return found


def _check(part: dict[str, Tensor], network: nn.Module) -> None:
    """Raise ValueError, naming the first key that is not for this network, by its name or its shape."""
    known: dict[str, Any] = dict(network.named_modules())
    for key, value in part.items():
        for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if f".{one}." in key and key.replace(one, other) not in part:
                raise ValueError(f"it is damaged: {key} is there and its {other} is not")
        module, _, rest = key.partition(".")[2].partition(".lora")
        module = module.removesuffix(".processor")
        if module not in known:
            raise ValueError(f"it is for another network: this one has no {module}")
        axis = 1 if rest.startswith(("_A", ".down")) else 0 if rest.startswith(("_B", ".up")) else None
        weight = getattr(known[module], "weight", None)
        if axis is not None and isinstance(weight, Tensor) and value.shape[axis] != weight.shape[axis]:
            raise ValueError(
                f"it is for another network: {key} has {tuple(value.shape)}, and the weight there {tuple(weight.shape)}"
            )


def load_loras(bundle: Bundle, loras: Sequence[LoRA]) -> None:
    """Put several on, each at its own scale.

    Raises:
        BundleError: as `load_lora`.
    """
    for number, lora in enumerate(loras):
        load_lora(bundle, lora.source, f"{ADAPTER}{number}")
    set_lora_scales(bundle, [lora.scale for lora in loras])


def set_lora_scales(bundle: Bundle, scales: Sequence[float]) -> None:
    """How much of each LoRA counts from now on, in the order they were put on: 0 is none of it, 1 all."""
    for layer in _layers(bundle):
        layer.set_adapter(list(layer.scaling), inference_mode=True)
        for name in layer.scaling:
            layer.set_scale(name, scales[int(name.removeprefix(ADAPTER) or 0)])


def fuse_lora(bundle: Bundle) -> dict[str, Tensor]:
    """Add what the LoRAs change to the weights themselves, at their present scales; returns the weights before."""
    kept: dict[str, Tensor] = {}
    for number, layer in enumerate(_layers(bundle)):
        kept[str(number)] = layer.get_base_layer().weight.detach().clone()
        layer.merge()
    return kept


def unfuse_lora(bundle: Bundle, kept: dict[str, Tensor]) -> None:
    """Take it back: the weights become to the bit those that `fuse_lora` found. Subtracting would round."""
    for number, layer in enumerate(_layers(bundle)):
        layer.get_base_layer().weight.data.copy_(kept[str(number)])
        layer.merged_adapters.clear()


def drop_lora(bundle: Bundle) -> None:
    """Take the LoRAs off, in place; weights into which they were fused stay so."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    for network in (bundle.unet, bundle.text_encoder):
        recurse_remove_peft_layers(network)
        vars(network).pop("peft_config", None)


def merge_loras(bundle: Bundle, loras: Sequence[LoRA]) -> None:
    """Make LoRAs part of the weights, in place and for good.

    Raises:
        BundleError: as `load_lora`.
    """
    load_loras(bundle, loras)
    fuse_lora(bundle)
    drop_lora(bundle)


def save_lora(bundle: Bundle, path: Path) -> Path:
    """Write the U-Net's LoRA, fp16, in peft's layout, whole or not at all; α is the rank, as readers take it."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(bundle.unet, adapter_name=ADAPTER)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    tensors = {f"unet.{key}": value.detach().half().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)
    return path


def _layers(bundle: Bundle) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks: tuple[Any, ...] = (bundle.unet, bundle.text_encoder)
    return (m for network in networks for m in network.modules() if isinstance(m, BaseTunerLayer))
