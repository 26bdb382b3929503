"""The card of a bundle, `instaflow.json`: what it is, where it comes from and how good it is. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from instaflow.errors import BundleError
from instaflow.recipe import Prediction

CARD = "instaflow.json"
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
    lineage: dict[str, Any] = {}
    results: dict[str, Any] = {}


def read_card(folder: Path) -> Card:
    """The card of a bundle folder.

    Raises:
        BundleError: no folder, no card, or a card with unknown or missing fields.
    """
    if not folder.is_dir():
        raise BundleError(f"no such bundle folder: {folder}")
    try:
        return msgspec.json.decode((folder / CARD).read_bytes(), type=Card)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has no {CARD}: it is not a bundle of this project") from error
    except msgspec.DecodeError as error:
        raise BundleError(f"damaged card {folder / CARD}: {error}") from error


def write_card(folder: Path, card: Card) -> None:
    """Write a bundle folder's card, whole or not at all."""
    part = folder / f"{CARD}.tmp"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    part.replace(folder / CARD)
