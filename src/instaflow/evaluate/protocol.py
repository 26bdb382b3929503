"""The default protocol, `emoji-heldout`: how good are pictures of concepts unseen in training, and of seen ones.

For every model: pictures of (concept, style) prompts with fixed seeds; Fréchet distance and KID on Lite0
features against the real pictures of the same concepts; retrieval of the prompt's concept, with the real
pictures' own score as its ceiling; precision, recall, diversity; straightness S(Z) of the flow.
The same prompts and the same noises for every model, in the styles that the first one knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.progress import track

from instaflow.data.pictures import Picture, content_hash
from instaflow.errors import DataError
from instaflow.evaluate.distances import bootstrap, diversity, fit_projection, frechet, kid, precision_recall
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.plots import bars, grid
from instaflow.evaluate.retrieval import RidgeMap, fit_map, recall
from instaflow.flow import straightness
from instaflow.images import to_tensor
from instaflow.models.bundle import Bundle, bundle_hash
from instaflow.models.card import write_card
from instaflow.models.networks import encode_pictures
from instaflow.models.sampling import noise, sample

PROTOCOL = "emoji-heldout, version 2"
BATCH = 64
COMPONENTS = 64
STRAIGHTNESS_SAMPLES, STRAIGHTNESS_STEPS = 128, 25
GRID_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One model as it is measured."""

    label: str
    folder: Path
    steps: int
    guidance: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """Prompts, seeds and the real pictures they are compared with."""

    name: str
    prompts: list[str]
    seeds: list[int]
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


def draw(bundle: Bundle, entrant: Entrant, split: Split) -> np.ndarray:
    """uint8 (N, H, W, 3): every prompt of a split."""
    parts = []
    starts = range(0, len(split.prompts), BATCH)
    for i in track(starts, description=f"{entrant.label}, {split.name}"[:30].ljust(30)):
        prompts, seeds = split.prompts[i : i + BATCH], split.seeds[i : i + BATCH]
        with torch.autocast(bundle.device.type, torch.bfloat16):
            latents = sample(bundle, prompts, seeds=seeds, steps=entrant.steps, guidance=entrant.guidance)
        parts.append(bundle.decode(latents))
    return np.concatenate(parts)


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

    features: Callable[[np.ndarray], np.ndarray]
    project: Callable[[np.ndarray], np.ndarray]
    ridge: RidgeMap
    embeddings: np.ndarray
    real: np.ndarray
    """(M, 1280) features of the split's real pictures."""

    def measure(self, pictures: np.ndarray, concepts: np.ndarray) -> dict[str, Any]:
        """All figures of one set of pictures, (N, H, W, 3) with (N,) concept rows."""
        features = self.features(pictures)
        distance = bootstrap(frechet, self.project(features), self.project(self.real))
        near = precision_recall(self.project(self.real), self.project(features))
        found = recall(self.ridge, features, concepts, self.embeddings)
        return {
            "pictures": len(pictures),
            "real_pictures": len(self.real),
            "fd_lite0": round(distance.value, 2),
            "fd_lite0_95": [round(distance.low, 2), round(distance.high, 2)],
            "kid_lite0": round(kid(features, self.real), 5),
            "precision": round(near.precision, 3),
            "recall": round(near.recall, 3),
            "r_at_1": round(found[1], 3),
            "r_at_5": round(found[5], 3),
            # of a prompt drawn once there is none
            "diversity": round(diversity(features, concepts), 2) if len(np.unique(concepts)) < len(concepts) else None,
        }


def straightness_of(bundle: Bundle, split: Split, guidance: float) -> dict[str, float]:
    """S(Z) per element and its standard error over a split's first prompts."""
    n = min(STRAIGHTNESS_SAMPLES, len(split.prompts))
    x0 = noise(split.seeds[:n], bundle.latent_shape()).to(bundle.device)
    with torch.inference_mode(), torch.autocast(bundle.device.type, torch.bfloat16):
        field = bundle.velocity(bundle.encode(split.prompts[:n]), guidance=guidance)
        s = straightness(field, x0, STRAIGHTNESS_STEPS).double()
    return {"mean": round(s.mean().item(), 5), "standard_error": round((s.std() / n**0.5).item(), 5)}


def evaluate(
    entrants: Sequence[Entrant],
    train: Sequence[Picture],
    test: Sequence[Picture],
    folder: Path,
    *,
    count: int,
    seed: int,
    device: str = "cpu",
    workers: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure models side by side and write report.json, report.md and plots into `folder`.

    Pictures already drawn are kept in `folder/drawn`, by bundle hash and protocol; run again after an
    interruption and they are not drawn anew.

    Args:
        entrants: the models, each with steps and guidance.
        train: pictures the models were trained on.
        test: pictures of concepts they never saw.
        folder: where the report goes.
        count: pictures a model and split.
        seed: first seed of the noises.
        device: where to draw.
        workers: (number of this process, how many there are); they share the drawing, and the first one
            measures. The others return an empty report.
        wait: returns once every process has called it.
    """
    first = Bundle.load(entrants[0].folder, device=device)
    size = first.card.image_size
    rng = np.random.default_rng(seed)
    styles = first.card.styles or {p.style for p in train}
    test = [p for p in test if p.style in styles]
    drawable = [i for i, p in enumerate(train) if p.style in styles]
    if not test or not drawable:
        raise DataError(f"{entrants[0].label} draws {', '.join(styles)}, and the data has no such pictures to compare")
    chosen = sorted(rng.permutation(drawable)[: min(len(test), len(drawable) // 2)])
    known = [train[i] for i in chosen]
    splits = [make_split("unseen", test, count, size, seed), make_split("seen", known, count, size, seed)]

    rank, processes = workers
    for entrant in entrants[rank::processes]:
        bundle = Bundle.load(entrant.folder, device=device)
        for split in splits:
            draw_once(bundle, entrant, split, folder / "drawn")
    wait()
    if rank:
        return {}

    features = Lite0(device)
    real_train = features(np.stack([p.pixels(size) for p in train]), progress=True)
    project = fit_projection(real_train, min(COMPONENTS, len(train) - 1))
    # The map never saw the real pictures that it is asked about, or their score would be no honest ceiling.
    others = np.setdiff1d(np.arange(len(train)), chosen)
    ridge = fit_map(real_train[others], sentence_embeddings(first, [train[i].name for i in others]))
    rulers = [
        Ruler(
            features=features,
            project=project,
            ridge=ridge,
            embeddings=sentence_embeddings(first, split.names),
            real=features(split.real),
        )
        for split in splits
    ]

    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        "count": count,
        "seed": seed,
        "data": content_hash(list(train) + list(test)),
        "chance_r_at_5": {s.name: round(5 / len(s.names), 4) for s in splits},
        "models": {},
    }
    report["models"]["real pictures"] = {
        s.name: r.measure(s.real, s.real_concepts) for s, r in zip(splits, rulers, strict=True)
    }
    report["models"]["real, through the autoencoder"] = {
        s.name: r.measure(reconstruct(first, s.real), s.real_concepts) for s, r in zip(splits, rulers, strict=True)
    }
    rows: dict[str, np.ndarray] = {}
    half = GRID_COLUMNS // 2
    for entrant in entrants:
        bundle = Bundle.load(entrant.folder, device=device)
        entry: dict[str, Any] = {
            "kind": bundle.card.kind,
            "steps": entrant.steps,
            "guidance": entrant.guidance,
            "straightness": straightness_of(bundle, splits[0], 1.0),
        }
        drawn = [draw_once(bundle, entrant, split, folder / "drawn") for split in splits]
        for split, ruler, pictures in zip(splits, rulers, drawn, strict=True):
            entry[split.name] = ruler.measure(pictures, split.concepts)
        rows[entrant.label] = np.concatenate([pictures[:half] for pictures in drawn])
        report["models"][entrant.label] = entry
        if entrant.steps == bundle.card.steps:  # as it is used: its card says how good it is
            write_card(entrant.folder, msgspec.structs.replace(bundle.card, results={"protocol": PROTOCOL, **entry}))
    write(report, rows, [p for s in splits for p in s.prompts[:half]], folder)
    return report


def draw_once(bundle: Bundle, entrant: Entrant, split: Split, folder: Path) -> np.ndarray:
    """`draw`, or what an interrupted evaluation of the same weights and protocol drew already."""
    size, steps, guidance = len(split.prompts), entrant.steps, entrant.guidance
    prompts = hashlib.sha256("\n".join(split.prompts).encode()).hexdigest()[:8]
    key = f"{bundle_hash(entrant.folder)[:16]}-{steps}-{guidance:g}-{size}-{split.seeds[0]}-{prompts}"
    path = folder / f"{key}.npy"
    if path.exists():
        kept: np.ndarray = np.load(path)
        return kept
    pictures = draw(bundle, entrant, split)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    with part.open("wb") as file:
        np.save(file, pictures)
    part.replace(path)
    return pictures


@torch.inference_mode()
def reconstruct(bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """Real pictures through the autoencoder and back: the best that any model in its latents can do."""
    parts = []
    for i in range(0, len(pixels), BATCH):
        latents = encode_pictures(bundle.vae, to_tensor(pixels[i : i + BATCH]).to(bundle.device))
        parts.append(bundle.decode(latents))
    return np.concatenate(parts)


def write(report: dict[str, Any], rows: dict[str, np.ndarray], captions: list[str], folder: Path) -> None:
    """The report as JSON, Markdown and plots; JSON last, since it marks the stage as done."""
    folder.mkdir(parents=True, exist_ok=True)
    grid(rows, captions, folder / "grid.png")
    measured = {k: v for k, v in report["models"].items()}
    bars(
        {k: (v["unseen"]["fd_lite0"], *v["unseen"]["fd_lite0_95"]) for k, v in measured.items()},
        "Concepts unseen in training",
        folder / "fd-unseen.png",
    )
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    part = folder / "report.tmp"
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "report.json")


def markdown(report: dict[str, Any]) -> str:
    """The report's table, one row a model."""
    lines = [
        f"# {report['protocol']}",
        "",
        f"{report['count']} pictures a model and split, first seed {report['seed']}. FD: Fréchet distance on the first",
        f"{COMPONENTS} principal components of Lite0 features, 95 % bootstrap interval. Chance R@5: "
        + ", ".join(f"{k} {v}" for k, v in report["chance_r_at_5"].items())
        + ".",
        "",
        "| model | steps | FD unseen | KID unseen | R@1 / R@5 unseen | FD seen | R@1 / R@5 seen | diversity | S(Z) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in report["models"].items():
        u, s = m["unseen"], m["seen"]
        straight = m.get("straightness")
        shown = f"{straight['mean']} ± {straight['standard_error']}" if straight else "–"
        lines.append(
            f"| {name} | {m.get('steps', '–')} | {u['fd_lite0']} [{u['fd_lite0_95'][0]}, {u['fd_lite0_95'][1]}] "
            f"| {u['kid_lite0']} | {u['r_at_1']} / {u['r_at_5']} | {s['fd_lite0']} [{s['fd_lite0_95'][0]}, "
            f"{s['fd_lite0_95'][1]}] | {s['r_at_1']} / {s['r_at_5']} | {u['diversity']} "
            f"| {shown} |"
        )
    return "\n".join(lines) + "\n"
