"""The card of a bundle, `instaflow.json`: what it is, where it comes from and how good it is. No torch here."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from instaflow.errors import BundleError
from instaflow.recipe import Prediction

CARD = "instaflow.json"
CONTROL_CARD = "control.json"
DEFAULT = Path(__file__).parent.parent / "default"  # the model that comes with the package
Kind = Literal["teacher", "rectified", "one-step"]


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle is, where it comes from and how good it is."""

    name: str
    kind: Kind
    prediction: Prediction
    image_size: int
    """Side in pixels that it was trained at."""
    steps: int = 25
    """Steps it uses by default; a one-step model takes 1 and nothing else."""
    guidance: float = 1.0
    """Guidance it uses by default."""
    max_guidance: float = 20.0
    """Largest guidance it accepts; 1 where guidance is baked in."""
    styles: tuple[str, ...] = ()
    """Words that choose a drawing style when they end a prompt."""
    licence: str = "Apache-2.0"
    quantised: str = ""
    """int8, w8 or w4 where weights have fewer bits than 16: such a model draws with OpenVINO and nothing else."""
    weights: str = ""
    """sha256 over the bundle's weights, checked when it is loaded; '' checks nothing."""
    lineage: dict[str, Any] = {}
    results: dict[str, Any] = {}


def read_card(folder: Path) -> Card:
    """The card of a bundle folder; of a diffusers folder that is not ours, what can be recognised.

    Raises:
        BundleError: no folder, neither card nor model_index.json, or a card with unknown or missing fields.
    """
    if not folder.is_dir():
        raise BundleError(f"no such bundle folder: {folder}")
    try:
        return msgspec.json.decode((folder / CARD).read_bytes(), type=Card)
    except FileNotFoundError as error:
        if (folder / "model_index.json").is_file():
            return recognise(folder)
        raise BundleError(f"{folder} has neither {CARD} nor model_index.json: it is no model folder") from error
    except msgspec.DecodeError as error:
        raise BundleError(f"damaged card {folder / CARD}: {error}") from error


def write_card(folder: Path, card: Card) -> None:
    """Write a bundle folder's card, whole or not at all."""
    part = folder / f"{CARD}.tmp"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    part.replace(folder / CARD)


def bundle_hash(folder: Path) -> str:
    """sha256 over the weights of a bundle folder: what pairs and reports name their model by."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Of a bundle folder: safetensors, and of quantised networks OpenVINO's own."""
    return sorted(file for kind in ("*.safetensors", "openvino_model.bin") for file in folder.rglob(kind))


CHECKED_BYTES = 1 << 30  # larger ones take seconds to read through


def check_weights(folder: Path, card: Card) -> None:
    """Raise BundleError when the weights are not those that the card names; gigabytes are taken on trust."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    if card.weights and size <= CHECKED_BYTES and bundle_hash(folder) != card.weights:
        raise BundleError(
            f"the weights in {folder} are not those that its {CARD} names: they are damaged or were changed; "
            f"if you changed them, take the line 'weights' out"
        )


class ControlCard(msgspec.Struct, frozen=True, kw_only=True):
    """`control.json`: what our own ControlNets say of themselves; others' folders have none."""

    kind: str
    """What its pictures show: edges, scribble, colours or inpaint."""
    base: str
    """The name of the model that it was trained for."""
    base_hash: str
    """Hash of that model's folder."""
    lineage: dict[str, Any] = {}


def read_control_card(folder: Path) -> ControlCard | None:
    """A ControlNet's card; others' folders have none. Raises BundleError where it is damaged."""
    try:
        return msgspec.json.decode((folder / CONTROL_CARD).read_bytes(), type=ControlCard)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise BundleError(f"damaged card {folder / CONTROL_CARD}: {error}") from error


def check_control(folder: Path, model: str, weights: str) -> None:
    """Raise BundleError when a ControlNet's card names another base than the model of these weights; '' fits all."""
    card = read_control_card(folder)
    if card is not None and weights and card.base_hash and weights != card.base_hash:
        raise BundleError(
            f"the ControlNet {folder} was trained for {card.base!r} of hash {card.base_hash[:8]}, "
            f"not for {model!r} of hash {weights[:8]}"
        )


# -- folders that are not ours ---------------------------------------------------------------------

INSTAFLOW_NAME = re.compile(r"instaflow[-_ ]?[01][._]\d ?b")
RECTIFIED_NAME = re.compile(r"rectified[-_ ]?flow")
TEACHERS = {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"}


def recognise(folder: Path) -> Card:
    """The card of a diffusers folder: published InstaFlow, 2-rectified flow, or Stable Diffusion.

    InstaFlow's two checkpoints share one pipeline class and one architecture; they are told apart by
    what their README, folder or `_name_or_path` calls them.

    Raises:
        BundleError: damaged JSON, or a pipeline of another family.
    """
    index = _json(folder / "model_index.json")
    unet, scheduler = _json(folder / "unet" / "config.json"), _json(folder / "scheduler" / "scheduler_config.json")
    vae = _json(folder / "vae" / "config.json")
    family = index.get("_class_name")
    heading, licence = _readme(folder / "README.md")
    names = [heading, folder.name, *_hub_name(folder), *(str(c.get("_name_or_path", "")) for c in (index, unet))]
    size = int(unet.get("sample_size", 64)) * 2 ** (len(vae.get("block_out_channels", "1234")) - 1)
    common: dict[str, Any] = {"image_size": size, "licence": licence, "lineage": {"recognised": family}}
    lowered = [name.lower() for name in names]
    if any(INSTAFLOW_NAME.search(name) for name in lowered):
        return Card(
            name="InstaFlow",
            kind="one-step",
            prediction="velocity",
            steps=1,
            max_guidance=1.0,
            **common,
        )
    if family == "RectifiedFlowPipeline" or any(RECTIFIED_NAME.search(name) for name in lowered):
        return Card(
            name="2-rectified flow", kind="rectified", prediction="velocity", guidance=1.5, max_guidance=2.0, **common
        )
    if "CLIPTextModel" not in index.get("text_encoder", ()):
        raise BundleError(f"{folder} is one of our own bundles and has lost its {CARD}")
    if family in TEACHERS:
        prediction = scheduler.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise BundleError(f"{folder}: prediction_type {prediction!r} is not read; allowed: epsilon, v_prediction")
        return Card(name=folder.name, kind="teacher", prediction=prediction, guidance=5.0, **common)
    raise BundleError(
        f"{folder} is a {family}; allowed: RectifiedFlowPipeline, {', '.join(sorted(TEACHERS))}, or a bundle of ours"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing: it is not a whole bundle") from error
    except (msgspec.DecodeError, OSError) as error:
        raise BundleError(f"damaged {path}: {error}") from error
    return found


def _readme(path: Path) -> tuple[str, str]:
    """First heading and licence of a hub README; '' and 'unknown' where it says none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    heading = re.search(r"^# *(.+)$", text, re.MULTILINE)
    licence = re.search(r"^licen[sc]e: *(\S+)", text, re.MULTILINE)
    return heading[1].strip() if heading else "", licence[1] if licence else "unknown"


def _hub_name(folder: Path) -> list[str]:
    """The hub id of a folder in the cache, …/models--owner--name/snapshots/<commit>."""
    return [part for part in folder.parts if part.startswith("models--")]
