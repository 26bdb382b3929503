"""`emoji-heldout`: pictures of concepts that training never saw, and of those that it did, against the real ones.

Fréchet distance and KID on Lite0 features; retrieval of the prompt's concept, with the real pictures' own score as
its ceiling; precision, recall, diversity. The distance between two halves of the real pictures is the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from instaflow.data.pictures import Picture, content_hash
from instaflow.errors import DataError
from instaflow.evaluate.distances import (
    bootstrap,
    diversity,
    fit_projection,
    frechet,
    kid_interval,
    precision_recall,
    replicates,
)
from instaflow.evaluate.drawing import BATCH, Task
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.field import Field, Point, Protocol
from instaflow.evaluate.field import Ruler as AnyRuler
from instaflow.evaluate.retrieval import RidgeMap, fit_map, recall
from instaflow.models.bundle import Bundle
from instaflow.models.networks import encode_pictures, to_tensor

COMPONENTS = 64
STYLES = ("fluent-flat", "noto", "twemoji")  # whose training pictures the components are fitted on, and the map
HELDOUT = Protocol(
    name="emoji-heldout",
    version=3,
    metric="fd_lite0",
    label="FD-Lite0",
    prompts="'name, style' of every picture of a split in a fixed order, again with new seeds until there are enough",
    drawn="at the model's own size",
    real="all pictures of the split in the first model's styles, on white, cropped and resized (Lanczos) to its size",
    features="EfficientNet-Lite0, pooled, 1,280-d; pictures resized to 128 px (bicubic)",
    distance="Fréchet distance on the first 64 principal components of the real training pictures; KID on all",
)


@dataclass(frozen=True, kw_only=True)
class Split(Task):
    """A task whose prompts name concepts, and the real pictures of these concepts."""

    concepts: np.ndarray
    """(N,) row of `names` of each prompt."""
    names: list[str]
    real: np.ndarray
    """uint8 (M, H, W, 3)"""
    real_concepts: np.ndarray
    """(M,) row of `names` of each real picture."""


def make_split(name: str, pictures: Sequence[Picture], count: int, size: int, seed: int) -> Split:
    """Prompts 'name, style' of pictures in a fixed order, repeated with new seeds until `count`."""
    names = sorted({p.name for p in pictures})
    row = {n: i for i, n in enumerate(names)}
    order = np.random.default_rng(seed).permutation(len(pictures))
    chosen = [pictures[order[i % len(pictures)]] for i in range(count)]
    return Split(
        name=name,
        prompts=[f"{p.name}, {p.style}" if p.style else p.name for p in chosen],
        seeds=[seed + i for i in range(count)],
        concepts=np.array([row[p.name] for p in chosen]),
        names=names,
        real=np.stack([p.pixels(size) for p in pictures]),
        real_concepts=np.array([row[p.name] for p in pictures]),
    )


def make_splits(
    first: Bundle, train: Sequence[Picture], test: Sequence[Picture], count: int, seed: int
) -> tuple[list[Split], list[int]]:
    """The unseen and the seen split in the styles that the first model draws, and which of `train` are in the latter.

    Raises:
        DataError: the data has no pictures in these styles.
    """
    size, styles = first.card.image_size, first.card.styles or {p.style for p in train}
    test = [p for p in test if p.style in styles]
    drawable = [i for i, p in enumerate(train) if p.style in styles]
    if not test or not drawable:
        raise DataError(f"{first.card.name} draws {', '.join(styles)}, and the data has no such pictures to compare")
    order = np.random.default_rng(seed).permutation(drawable)
    chosen = sorted(int(i) for i in order[: min(len(test), len(drawable) // 2)])
    known = [train[i] for i in chosen]
    return [make_split("unseen", test, count, size, seed), make_split("seen", known, count, size, seed)], chosen


@torch.inference_mode()
def sentence_embeddings(bundle: Bundle, texts: Sequence[str]) -> np.ndarray:
    """(N, D) of length 1: the mean of the token states, as sentence-transformers does."""
    parts = []
    for i in range(0, len(texts), BATCH):
        tokens = bundle.tokenizer(list(texts[i : i + BATCH]), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(bundle.device)
        states = bundle.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        mask = tokens.attention_mask[..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """What pictures of a split are measured against."""

    split: Split
    features: Callable[[np.ndarray], np.ndarray]
    project: Callable[[np.ndarray], np.ndarray]
    ridge: RidgeMap
    embeddings: np.ndarray
    real: np.ndarray
    """(M, 1280) features of the split's real pictures."""

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        """Lite0 features (N, 1280) of pictures (N, H, W, 3)."""
        return self.features(pictures)

    def measure(self, pictures: np.ndarray, features: np.ndarray) -> dict[str, Any]:
        """All figures of the split's pictures; the features say all there is to say."""
        return self.figures(features, self.split.concepts)

    def figures(self, features: np.ndarray, concepts: np.ndarray) -> dict[str, Any]:
        """The same of pictures of other concepts: (N, 1280) with (N,) rows of `names`."""
        distance = bootstrap(frechet, self.project(features), self.project(self.real))
        kernel = kid_interval(features, self.real)
        near = precision_recall(self.project(self.real), self.project(features))
        found = recall(self.ridge, features, concepts, self.embeddings)
        return {
            "pictures": len(features),
            "real_pictures": len(self.real),
            "fd_lite0": round(distance.value, 2),
            "fd_lite0_95": [round(distance.low, 2), round(distance.high, 2)],
            "kid": round(kernel.value, 5),
            "kid_95": [round(kernel.low, 5), round(kernel.high, 5)],
            "precision": round(near.precision, 3),
            "recall": round(near.recall, 3),
            "r_at_1": round(found[1], 3),
            "r_at_5": round(found[5], 3),
            # of a prompt drawn once there is none
            "diversity": round(diversity(features, concepts), 2) if len(np.unique(concepts)) < len(concepts) else None,
        }

    def distance(self, pictures: np.ndarray) -> Point:
        """Fréchet distance of pictures (N, H, W, 3) with its interval: a point of a curve."""
        found = bootstrap(frechet, self.project(self.features(pictures)), self.project(self.real), n=100)
        return round(found.value, 2), round(found.low, 2), round(found.high, 2)

    def replicates(self, features: np.ndarray) -> np.ndarray:
        """Fréchet distance of features, and its bootstrap replicates, paired with another model's."""
        return replicates(frechet, self.project(features), self.project(self.real))

    def floor(self) -> float:
        """Distance between two halves of the real pictures: what a perfect model of as few pictures would have."""
        order = np.random.default_rng(0).permutation(len(self.real))
        return round(frechet(*(self.project(self.real[order[i::2]]) for i in range(2))), 2)


def make_rulers(
    first: Bundle, splits: Sequence[Split], chosen: Sequence[int], train: Sequence[Picture], device: str
) -> list[Ruler]:
    """A ruler a split; `chosen` are the rows of `train` whose pictures the seen split asks about."""
    extract, size = Lite0(device), first.card.image_size
    real_train = extract(np.stack([p.pixels(size) for p in train]), progress=True)
    project = fit_projection(real_train, min(COMPONENTS, len(train) - 1))
    # The map never saw the real pictures that it is asked about, or their score would be no honest ceiling.
    others = np.setdiff1d(np.arange(len(train)), chosen)
    ridge = fit_map(real_train[others], sentence_embeddings(first, [train[i].name for i in others]))
    return [
        Ruler(
            split=split,
            features=extract,
            project=project,
            ridge=ridge,
            embeddings=sentence_embeddings(first, split.names),
            real=extract(split.real),
        )
        for split in splits
    ]


@torch.inference_mode()
def reconstruct(bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """Real pictures through the autoencoder and back: the best that any model in its latents can do."""
    parts = []
    for i in range(0, len(pixels), BATCH):
        latents = encode_pictures(bundle.vae, to_tensor(pixels[i : i + BATCH]).to(bundle.device))
        parts.append(bundle.decode(latents))
    return np.concatenate(parts)


def heldout_field(
    first: Bundle, train: Sequence[Picture], test: Sequence[Picture], *, count: int, seed: int, device: str
) -> Field:
    """The protocol for models like `first`.

    Args:
        first: the model whose styles and size are taken.
        train: pictures the models were trained on.
        test: pictures of concepts they never saw.
        count: pictures a model and split.
        seed: first seed of the noises.
        device: where features are computed.

    Raises:
        DataError: no pictures to compare with in the styles that the first model draws.
    """
    splits, chosen = make_splits(first, train, test, count, seed)

    def reference(rulers: Sequence[AnyRuler]) -> dict[str, Any]:
        both = {"real pictures": lambda p: p, "real, through the autoencoder": lambda p: reconstruct(first, p)}
        return {
            label: {r.split.name: r.figures(r.extract(see(r.split.real)), r.split.real_concepts) for r in rulers}  # type: ignore[attr-defined]
            for label, see in both.items()
        }

    return Field(
        protocol=HELDOUT,
        splits=splits,
        rulers=lambda: make_rulers(first, splits, chosen, train, device),
        reference=reference,
        said={
            "data": content_hash(list(train) + list(test)),
            "chance_r_at_5": {s.name: round(5 / len(s.names), 4) for s in splits},
        },
    )
