"""What a protocol is made of: what is drawn, what it is compared with, and how; the numbers depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import msgspec
import numpy as np

from instaflow.evaluate.drawing import Task

Point = tuple[float, float, float]  # a value and the ends of its 95 % interval


class Protocol(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed, in words; a change of any is a new version. Printed in every report."""

    name: str
    version: int
    metric: str
    """Key of the distance in a report; two metrics never meet in one column."""
    label: str
    """The same for people."""
    prompts: str
    drawn: str
    real: str
    features: str
    distance: str
    weights: str = "the average of the weights that the bundle holds"
    safety_checker: str = "off"


class Ruler(Interface):
    """What pictures of one split are measured against."""

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        """Features (N, D) of pictures, uint8 (N, H, W, 3)."""
        ...

    def measure(self, pictures: np.ndarray, features: np.ndarray) -> dict[str, Any]:
        """All figures of a split's pictures."""
        ...

    def distance(self, pictures: np.ndarray) -> Point:
        """The protocol's distance alone: a point of a curve."""
        ...

    def replicates(self, features: np.ndarray) -> np.ndarray:
        """(1 + n,): the distance of features, then its bootstrap replicates, paired with another model's."""
        ...

    def floor(self) -> float:
        """Distance between two halves of the real pictures."""
        ...


@dataclass(frozen=True, kw_only=True)
class Field:
    """A protocol with its pictures at hand."""

    protocol: Protocol
    splits: Sequence[Task]
    rulers: Callable[[], Sequence[Ruler]]
    """Made once everything is drawn."""
    reference: Callable[[Sequence[Ruler]], Mapping[str, Any]]
    """Rows beside the models: label → split → figures."""
    said: Mapping[str, Any]
    """What else the report says: hashes, chance."""
