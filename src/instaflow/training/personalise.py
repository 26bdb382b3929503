"""Stage: personalisation, a LoRA of a subject or a hand from a few pictures.

A one-step model learns from pairs at t = 0, as in distillation: noises beside the pictures' own latents, or beside what
a personalised teacher draws from them. A teacher learns by its ordinary loss. In both, pairs that the model itself drew
of other prompts keep it what it is there (prior preservation, DreamBooth, arXiv 2208.12242). This stage is made of two
others, their batches and losses.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from instaflow.data.pairs import PairReader, PairSet, open_pairs
from instaflow.data.pictures import SUFFIXES, Picture, read_pictures
from instaflow.data.prompts import read_prompts
from instaflow.errors import DataError
from instaflow.models.bundle import Bundle
from instaflow.models.lora import ADAPTER
from instaflow.models.networks import encode_pictures, to_tensor
from instaflow.models.sampling import noise
from instaflow.recipe import Distil, Pairs, Personalise, Teacher
from instaflow.training.distil import distil_stage
from instaflow.training.pairs import draw_pairs
from instaflow.training.teacher import prompt_preview, teacher_stage
from instaflow.training.trainer import Stage

FEWEST = 3  # pictures, different ones
PRIOR_SEED = 1 << 32  # the first of the prior's noises: none that a person takes


# -- the pictures ----------------------------------------------------------------------------------


def read_subject(sources: Sequence[str], subject: str, size: int) -> list[Picture]:
    """The pictures to learn, each named by the prompt it stands for.

    Args:
        sources: picture files, folders of them, or Parquet.
        subject: the prompt of all; '' takes their captions.
        size: side in pixels at which they must differ.

    Raises:
        DataError: nothing there, an unreadable picture, a caption missing, or fewer than three different ones.
    """
    found = [picture for source in sources for picture in _read(Path(source), subject)]
    different = {picture.pixels(size).tobytes() for picture in found}
    if len(different) < FEWEST:
        same = f", and only {len(different)} of the {len(found)} differ" if len(different) < len(found) else ""
        raise DataError(f"a LoRA needs {FEWEST} pictures or more, got {len(found)}{same}: {', '.join(sources)[:200]}")
    return [replace(picture, name=subject or picture.name, keywords=(), style="") for picture in found]


def _read(source: Path, subject: str) -> list[Picture]:
    if source.suffix == ".parquet" or (source.is_dir() and any(source.glob("*.parquet"))):
        return read_pictures(source, split="train")
    if not subject:
        return read_pictures(source)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"no pictures at {source}: give {', '.join(sorted(SUFFIXES))} files, or a folder of them")
    return [Picture(image=file.read_bytes(), name=subject, source=str(file)) for file in files]


@torch.inference_mode()
def _latents(bundle: Bundle, pictures: Sequence[Picture]) -> Tensor:
    pixels = np.stack([p.pixels(bundle.card.image_size) for p in pictures])
    parts = to_tensor(pixels).split(32)
    return torch.cat([encode_pictures(bundle.vae, part.to(bundle.device)).cpu() for part in parts])


# -- the pairs -------------------------------------------------------------------------------------


def picture_pairs(prompts: Sequence[str], latents: Tensor, count: int, seed: int) -> PairSet:
    """`count` noises beside the latents of pictures, (N, C, h, w); among one prompt's each picture gets its nearest.

    A one-step model draws from a noise the mean of all that stands beside it, so the coupling of least total distance
    is taken (Pooladian et al. 2023, arXiv 2304.14772): neighbouring noises then mean the same picture.
    """
    seeds = list(range(seed, seed + count))
    x0, chosen = noise(seeds, latents.shape[1:]).flatten(1), np.arange(count) % len(latents)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for place, picture in enumerate(chosen):
        by_prompt[prompts[int(picture)]].append(place)
    for places in by_prompt.values():
        x1 = latents[chosen[places]].flatten(1)
        _, order = linear_sum_assignment(-(x0[places] @ x1.T).numpy())  # ‖x₀ − x₁‖² but for what order does not change
        chosen[places] = chosen[np.asarray(places)[order]]
    return PairSet(prompts=[prompts[int(i)] for i in chosen], seeds=seeds, x1=latents[chosen].half())


def prior_prompts(bundle: Bundle, count: int, seed: int, source: str = "") -> list[str]:
    """Prompts about other things: of a file or data set, or one to three whole words of the model's own tokenizer."""
    if source:
        return read_prompts(source, count)
    rng = random.Random(f"prior:{seed}")
    tokens = (token.removesuffix("</w>") for token in sorted(bundle.tokenizer.get_vocab()))
    words = [token for token in tokens if token.isascii() and token.isalpha() and token.islower() and len(token) > 2]
    styles = ["", *(f", {style}" for style in bundle.card.styles)]
    return [" ".join(rng.sample(words, rng.randint(1, 3))) + rng.choice(styles) for _ in range(count)]


def personal_pairs(
    spec: Personalise,
    bundle: Bundle,
    pictures: Sequence[Picture],
    folder: Path,
    *,
    model: str,
    teacher: tuple[Bundle, str] | None = None,
) -> PairReader:
    """The pictures' pairs, and those of the prior, which are drawn into `folder` once.

    Args:
        spec: the stage's recipe.
        bundle: the model that learns, and draws the prior.
        pictures: what to learn, named by their prompts.
        folder: the stage's.
        model: hash of the bundle, for the prior's manifest.
        teacher: (bundle, hash) of a personalised teacher that draws in place of the pictures.
    """
    for words in dict.fromkeys(p.name for p in pictures):
        bundle.check_prompt(words)
    readers, count = [], max(spec.count, len(pictures))  # each picture has a pair
    if teacher:
        of_pictures = [pictures[i % len(pictures)].name for i in range(count)]
        readers.append(_drawn(spec, teacher[0], teacher[1], of_pictures, folder / "pairs", seed=0))
    else:
        own = picture_pairs([p.name for p in pictures], _latents(bundle, pictures), count, seed=0)
        readers.append(PairReader([len(own)], lambda _: own))
    if spec.prior:
        others = prior_prompts(bundle, spec.prior, 0, spec.prompts)
        readers.append(_drawn(spec, bundle, model, others, folder / "prior", seed=PRIOR_SEED))
    shards = [(reader, i) for reader in readers for i in range(len(reader.counts))]
    return PairReader([reader.counts[i] for reader, i in shards], lambda n: shards[n][0].load(shards[n][1]))


def _drawn(spec: Personalise, bundle: Bundle, model: str, prompts: list[str], folder: Path, *, seed: int) -> PairReader:
    card = bundle.card
    drawing = Pairs(
        name=f"{spec.name}, {folder.name}",
        model=spec.model,
        count=len(prompts),
        steps=card.steps,
        guidance=card.guidance,
        shard_size=128,
        seed=seed,
    )
    draw_pairs(drawing, bundle, prompts, folder, teacher=model)
    return open_pairs(folder)


# -- the LoRA --------------------------------------------------------------------------------------


def add_lora(bundle: Bundle, rank: int, seed: int) -> None:
    """A fresh LoRA on every linear layer and convolution of the U-Net, in place: it alone learns, from ΔW = 0 on."""
    unet: Any = bundle.unet
    torch.manual_seed(seed)
    layers = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    unet.requires_grad_(False).add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), ADAPTER)


def personalise_stage(spec: Personalise, bundle: Bundle, pairs: PairReader) -> Stage:
    """Batches and loss of distillation at t = 0, or of a teacher, on these pairs; the U-Net has its LoRA on it."""
    loss = spec.loss or ("perceptual" if bundle.card.kind == "one-step" else "ordinary")
    prompts = list(dict.fromkeys(p for i in range(len(pairs.counts)) for p in pairs.load(i).prompts))
    preview = prompt_preview(bundle, [prompts[0]] * 8 + prompts[1:], steps=bundle.card.steps)
    if loss == "ordinary":
        parts = [pairs.load(i) for i in range(len(pairs.counts))]
        captions = [Picture(image=b"", name=prompt) for part in parts for prompt in part.prompts]
        x1 = torch.cat([part.x1 for part in parts]).float()
        teacher = Teacher(name=spec.name, autoencoder="", prediction=bundle.card.prediction, train=spec.train)
        built = teacher_stage(teacher, bundle, captions, x1)
    else:
        distil = Distil(
            name=spec.name,
            model="",
            pairs="",
            loss=loss,
            perceptual_weight=spec.perceptual_weight,
            train=spec.train,
        )
        built = distil_stage(distil, bundle, pairs)
    return replace(built, preview=preview)
