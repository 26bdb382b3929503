"""Which engine a model gets, and the graphs of a model that came without them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec

from instaflow.errors import BundleError
from instaflow.models.card import DEFAULT, bundle_hash, check_control, read_card, write_card
from instaflow.models.hub import find_decoder, find_lora, locate
from instaflow.models.request import LoRA
from instaflow.runtime.engine import Engine
from instaflow.runtime.openvino import (
    SMALL,
    OpenVINOEngine,
    has_control_graphs,
    has_graphs,
    load_openvino,
    pick_precision,
)

log = logging.getLogger("instaflow")
ENGINES = ("openvino", "torch")
PRECISIONS = ("bf16", "f32", "float32", "bfloat16", "float16")


def load_engine(
    model: str | Path | None,
    *,
    loras: Sequence[LoRA] = (),
    device: str = "cpu",
    safety: bool = True,
    engine: str | None = None,
    precision: str | None = None,
    decoder: str | Path | None = None,
    compiled: bool = False,
) -> Engine:
    """The engine asked for, or the fastest that can: OpenVINO for a one-step model on a CPU, else torch.

    Raises:
        BundleError: no such model, LoRA or engine, it cannot be read, or the one is not for the other.
    """
    if engine not in (None, *ENGINES):
        raise BundleError(f"unknown engine {engine!r}; allowed: {', '.join(ENGINES)}")
    if precision not in (None, *PRECISIONS):
        raise BundleError(
            f"precision {precision!r} is not to be had; allowed: of openvino bf16, f32, "
            "of torch float32, bfloat16, float16"
        )
    if compiled and engine == "openvino":
        raise BundleError("the engine openvino compiles by itself; compiling is for torch")
    if compiled:
        engine = "torch"
    source = locate(DEFAULT if model is None else model)
    why_not = _why_not_openvino(source, device, safety)
    if engine == "openvino" and why_not:
        raise BundleError(f"the engine openvino {why_not}; use torch")
    if engine == "openvino" or (engine is None and not why_not and _worth_it(source, precision, decoder, loras)):
        try:
            return _openvino(source, precision, decoder, loras)
        except BundleError as error:
            if engine == "openvino" or not has_torch():
                raise
            log.warning("%s; drawing with torch instead", error)
            precision = None
    options: dict[str, Any] = {"device": device, "safety": safety, "precision": precision, "compiled": compiled}
    return _torch(source, loras=loras, decoder=decoder, **options)


def engine_for(model: str | None, controls: Sequence[Path], size: int | None = None) -> str | None:
    """torch where the model or a control has no graphs of a drawing under control at this size.

    Raises:
        BundleError: a control was trained for another model.
    """
    source = locate(DEFAULT if model is None else model)
    if source.is_dir():
        card = read_card(source)
        for folder in controls:
            check_control(folder, card.name, card.weights)
        if size not in (None, card.image_size):
            return "torch"
    return None if has_control_graphs(source, *controls) else "torch"


def has_torch() -> bool:
    """Whether torch and the libraries of its networks are installed."""
    return all(find_spec(name) is not None for name in ("torch", "diffusers", "transformers"))


def _why_not_openvino(source: Path, device: str, safety: bool) -> str:
    """'' where it can."""
    if device != "cpu":
        return f"draws on the CPU, not on {device!r}"
    if source.is_file():
        return f"does not read the single file {source.name}"
    card = read_card(source)
    if card.kind != "one-step":
        return f"draws in one step, and {card.name!r} is a {card.kind} model"
    if safety and (source / "safety_checker").is_dir():
        return "has no safety checker, and this model does; turn it off knowingly"
    return ""


def _worth_it(source: Path, precision: str | None, decoder: str | Path | None, loras: Sequence[LoRA]) -> bool:
    """Small models without graphs are as quickly drawn by torch as exported; and a LoRA's scale may change."""
    if loras:
        return False
    openvino_has_it, ready = precision in (None, "bf16", "f32"), has_graphs(source) and decoder is None
    return openvino_has_it and (ready or read_card(source).image_size > SMALL or not has_torch())


def _openvino(source: Path, precision: str | None, decoder: str | Path | None, loras: Sequence[LoRA]) -> Engine:
    if find_spec("openvino") is None:
        raise BundleError("the package openvino is missing: pip install openvino")
    if has_graphs(source) and decoder is None and not loras:
        return OpenVINOEngine(source, precision=precision)
    precision = pick_precision(load_openvino().Core(), precision)
    return OpenVINOEngine(exported(source, decoder, loras, precision), precision=precision)


def _torch(
    source: Path,
    *,
    loras: Sequence[LoRA],
    device: str,
    safety: bool,
    precision: str | None,
    decoder: str | Path | None,
    compiled: bool,
) -> Engine:
    if not has_torch():
        raise BundleError("this needs torch and diffusers: pip install 'instaflow[torch]'")
    from instaflow.models.bundle import Bundle
    from instaflow.runtime.pytorch import TorchEngine

    bundle = Bundle.load(source, device=device, safety=safety, decoder=decoder)
    if loras:
        from instaflow.models.lora import load_loras  # peft, which nothing else needs

        load_loras(bundle, loras)
    return TorchEngine.of(bundle, precision, compiled=compiled)


# -- graphs made on first use ----------------------------------------------------------------------


def cache_folder() -> Path:
    """Where models are kept that were prepared for the CPU engine; $INSTAFLOW_CACHE says another place."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("INSTAFLOW_CACHE") or Path(base) / "instaflow")


def exported(
    source: Path, decoder: str | Path | None = None, loras: Sequence[LoRA] = (), precision: str = "f32"
) -> Path:
    """The model with graphs in the cache, made there when it is used first; by its weights and OpenVINO's version.

    Args:
        source: the model's folder.
        decoder: a tiny decoder in place of its own.
        loras: fused into its weights.
        precision: what it will be computed in: for bf16 weights are kept so, which saves memory, else fp16.

    Raises:
        BundleError: it must be made and torch is missing, or the disk is full.
    """
    name = _content(source)[:16] + (f"-{_content(find_decoder(decoder))[:16]}" if decoder else "")
    name += "".join(f"-{_file_hash(find_lora(lora.source))[:16]}@{lora.scale:g}" for lora in loras)
    weights: Literal["fp16", "bf16"] = "bf16" if precision == "bf16" else "fp16"
    folder = cache_folder() / f"{name}-{weights}-openvino-{version('openvino')}"
    if has_graphs(folder):
        return folder
    if not has_torch():
        raise BundleError(
            f"{source} has no graphs for the CPU engine, and making them needs torch: pip install 'instaflow[torch]'"
        )
    log.warning("preparing %s for the CPU engine, once, in %s", read_card(source).name, folder)
    return export(source, folder, decoder, loras, weights=weights)


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content(source: Path) -> str:
    """The hash of a model's weights, read once: gigabytes take seconds. Kept by what a file's entry says of it."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source.rglob("*.safetensors"))]
    kept = cache_folder() / "hashes" / hashlib.sha256(repr(files).encode()).hexdigest()
    if kept.is_file() and re.fullmatch(r"[0-9a-f]{64}", found := kept.read_text()):
        return found
    found = bundle_hash(source)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(found)
    except OSError:
        log.warning("%s cannot be written; the model is read through at every start", kept.parent)
    return found


def export(
    source: str | Path,
    folder: Path,
    decoder: str | Path | None = None,
    loras: Sequence[LoRA] = (),
    *,
    to: Literal["onnx", "openvino"] = "onnx",
    weights: Literal["fp16", "bf16"] = "fp16",
) -> Path:
    """Write a one-step model with its graphs, whole or not at all: it draws without torch.

    Args:
        source: the model.
        folder: where it goes.
        decoder: a tiny decoder in place of its own.
        loras: fused into its weights.
        to: ONNX graphs that read the safetensors beside them, or OpenVINO's own format in place of both.
        weights: their precision.

    Raises:
        BundleError: no one-step model, packages are missing, or it cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    from instaflow.models.bundle import Bundle, publish
    from instaflow.runtime.graphs import to_openvino, write_graphs

    bundle = Bundle.load(source, decoder=decoder)
    if loras:
        from instaflow.models.lora import merge_loras

        merge_loras(bundle, loras)
    part = folder.with_name(folder.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        bundle.save(part, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[weights])
        write_graphs(bundle, part)
        if to == "openvino":
            to_openvino(part)
            write_card(part, msgspec.structs.replace(bundle.card, weights=bundle_hash(part)))
        return publish(part, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
