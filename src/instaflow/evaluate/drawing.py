"""Pictures for a protocol, drawn once and kept: by weights, settings and prompts, a chunk of them at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from instaflow.models.bundle import Bundle
from instaflow.models.card import bundle_hash
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

    @cached_property
    def hash(self) -> str:
        """Of its weights, read once."""
        return bundle_hash(self.folder)[:16]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every entrant draws: one picture a prompt, each from its own seed."""

    name: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    size: int | None = None
    """Side in pixels to draw at; None is the model's own."""
    side: int | None = None
    """Side in pixels to keep pictures at, resized by Lanczos; None keeps them as drawn."""

    def part(self, start: int, stop: int) -> Task:
        """Some of it, in its order."""
        prompts, seeds = self.prompts[start:stop], self.seeds[start:stop]
        return Task(name=self.name, prompts=prompts, seeds=seeds, size=self.size, side=self.side)

    @property
    def hash(self) -> str:
        """Of prompts and seeds."""
        text = "\n".join(f"{s} {p}" for s, p in zip(self.seeds, self.prompts, strict=True))
        text += f"\n{self.size} {self.side}" if self.size or self.side else ""
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def draw(bundle: Bundle, entrant: Entrant, task: Task) -> np.ndarray:
    """uint8 (N, H, W, 3), in bf16 autocast, without any safety checker."""
    parts = []
    batch = BATCH if bundle.card.image_size <= 128 else 4
    for i in range(0, len(task.prompts), batch):
        prompts, seeds = task.prompts[i : i + batch], task.seeds[i : i + batch]
        with torch.autocast(bundle.device.type, torch.bfloat16):
            latents = sample(
                bundle, prompts, seeds=seeds, steps=entrant.steps, guidance=entrant.guidance, size=task.size
            )
        pictures = bundle.decode(latents)
        if task.side and task.side != pictures.shape[1]:
            shape = (task.side, task.side)
            resized = [Image.fromarray(p).resize(shape, Image.Resampling.LANCZOS) for p in pictures]
            pictures = np.stack([np.asarray(p) for p in resized])
        parts.append(pictures)
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
    key = f"{entrant.hash}-{entrant.steps}-{entrant.guidance:g}-{task.hash}"
    place = folder / key
    place.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(task.prompts), CHUNK)[workers[0] :: workers[1]]
    missing = [i for i in starts if not (place / f"{i:06d}.npy").exists()]
    label = f"{entrant.label}, {task.name}"[:30].ljust(30)
    for i in track(missing, description=label, disable=not missing or workers[0] > 0):
        pictures = draw(bundle, entrant, task.part(i, i + CHUNK))
        part = place / f"{i:06d}.tmp"
        with part.open("wb") as file:
            np.save(file, pictures)
        part.replace(place / f"{i:06d}.npy")
    return np.concatenate([np.load(place / f"{i:06d}.npy") for i in starts] or [np.zeros((0, 1, 1, 3), np.uint8)])
