"""Stage: the teacher draws pairs, X₁ = ODE[v](X₀ | T). Only prompts are needed, no pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from instaflow.data.pairs import Manifest, open_manifest, prompt_hash, read_shard, shard_path, write_shard
from instaflow.data.pictures import Picture
from instaflow.errors import DataError
from instaflow.models.bundle import Bundle
from instaflow.models.sampling import sample
from instaflow.noise import NOISE
from instaflow.recipe import Pairs


def draw_prompts(pictures: Sequence[Picture], count: int, mixtures: float, seed: int) -> list[str]:
    """Prompts from training captions; a share of `mixtures` joins two of them ('fox and red heart')."""
    rng = random.Random(f"prompts:{seed}")
    prompts: list[str] = []
    while len(prompts) < count:
        for picture in rng.sample(pictures, len(pictures)):  # all in turn: few pairs still cover every concept
            if rng.random() < mixtures:
                style = f", {picture.style}" if picture.style and rng.random() < 0.5 else ""
                prompts.append(f"{picture.name} and {rng.choice(pictures).name}{style}")
            else:
                prompts.append(picture.caption(rng))
    return prompts[:count]


def drop_prompts(prompts: Sequence[str], share: float, seed: int) -> list[str]:
    """The prompts with about a `share` of them empty."""
    rng = random.Random(f"empty:{seed}")
    return ["" if rng.random() < share else prompt for prompt in prompts]


def draw_pairs(
    spec: Pairs, bundle: Bundle, prompts: list[str], folder: Path, *, teacher: str, workers: tuple[int, int] = (0, 1)
) -> None:
    """Draw every shard that is not there yet; a damaged one is drawn anew.

    Args:
        spec: the stage's recipe.
        bundle: the model that draws.
        prompts: one a pair.
        folder: where the shards go.
        teacher: hash of the bundle, for the manifest.
        workers: (rank, number of workers); shard i belongs to rank i mod workers.
    """
    manifest = Manifest(
        teacher=teacher,
        sampler="dpm-solver++" if bundle.card.kind == "teacher" and bundle.card.prediction != "velocity" else "euler",
        steps=spec.steps,
        guidance=spec.guidance,
        noise=NOISE,
        prompts=prompt_hash(prompts),
        seed=spec.seed,
        count=spec.count,
        shard_size=spec.shard_size,
        shape=bundle.latent_shape(),
    )
    open_manifest(folder, manifest)
    rank, size = workers
    for shard in track(range(rank, manifest.shards, size), description=f"{spec.name:14}", disable=rank > 0):
        path = shard_path(folder, shard)
        if path.exists():
            try:
                read_shard(path)
                continue
            except DataError:
                path.unlink()
        indices, parts = manifest.indices(shard), []
        for start in range(0, len(indices), spec.batch_size):
            chosen = indices[start : start + spec.batch_size]
            with torch.autocast(bundle.device.type, torch.bfloat16):
                parts.append(
                    sample(
                        bundle,
                        [prompts[i] for i in chosen],
                        seeds=[spec.seed + i for i in chosen],
                        steps=spec.steps,
                        guidance=spec.guidance,
                    )
                )
        x1 = torch.cat(parts)
        if not x1.isfinite().all():
            raise DataError(
                f"{spec.name}: the teacher drew NaN in shard {shard}; it is broken or its precision too low"
            )
        write_shard(path, prompts=[prompts[i] for i in indices], seeds=[spec.seed + i for i in indices], x1=x1)
