"""Pictures for a protocol, drawn once and kept: by weights, settings and prompts, a chunk of them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from instaflow.models.bundle import Bundle, bundle_hash
from instaflow.models.sampling import sample

CHUNK = 256  # pictures a file: what a killed evaluation loses at most
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One model as it is measured."""

    label: str
    folder: Path
    steps: int
    guidance: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every entrant draws: one picture a prompt, each from its own seed."""

    name: str
    prompts: Sequence[str]
    seeds: Sequence[int]

    def first(self, count: int) -> Task:
        """The first so many of it."""
        return Task(name=self.name, prompts=self.prompts[:count], seeds=self.seeds[:count])

    @property
    def hash(self) -> str:
        """Of prompts and seeds."""
        text = "\n".join(f"{s} {p}" for s, p in zip(self.seeds, self.prompts, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def draw(bundle: Bundle, entrant: Entrant, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """uint8 (N, H, W, 3), in bf16 autocast, without any safety checker."""
    parts = []
    for i in range(0, len(prompts), BATCH):
        some, own = prompts[i : i + BATCH], seeds[i : i + BATCH]
        with torch.autocast(bundle.device.type, torch.bfloat16):
            latents = sample(bundle, some, seeds=own, steps=entrant.steps, guidance=entrant.guidance)
        parts.append(bundle.decode(latents))
    return np.concatenate(parts)


def draw_once(
    bundle: Bundle, entrant: Entrant, task: Task, folder: Path, workers: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """All pictures of a task, less what is in `folder` already from the same weights, settings and prompts.

    Args:
        bundle: the entrant's networks.
        entrant: its steps and guidance.
        task: prompts and seeds.
        folder: where chunks are kept.
        workers: (number of this process, how many there are): chunk i is drawn by process i mod n, and what comes
            back has this process's chunks alone.
    """
    key = f"{bundle_hash(entrant.folder)[:16]}-{entrant.steps}-{entrant.guidance:g}-{task.hash}"
    place = folder / key
    place.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(task.prompts), CHUNK)[workers[0] :: workers[1]]
    missing = [i for i in starts if not (place / f"{i:06d}.npy").exists()]
    label = f"{entrant.label}, {task.name}"[:30].ljust(30)
    for i in track(missing, description=label, disable=not missing or workers[0] > 0):
        pictures = draw(bundle, entrant, task.prompts[i : i + CHUNK], task.seeds[i : i + CHUNK])
        part = place / f"{i:06d}.tmp"
        with part.open("wb") as file:
            np.save(file, pictures)
        part.replace(place / f"{i:06d}.npy")
    return np.concatenate([np.load(place / f"{i:06d}.npy") for i in starts] or [np.zeros((0, 1, 1, 3), np.uint8)])
