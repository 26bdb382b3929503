"""The bars of personalisation, after `instaflow run recipes/personalise.toml`: identity, other prompts, a hand.

python benchmarks/personalisation.py runs/personalise --data data/emoji-64 -o docs/

identity   mean over 64 pictures of "sks cat" of the largest cosine to a kept-back picture of the cat, Lite0 features
others     FD-Lite0 of pictures of other prompts, the captions of real Noto drawings, to those drawings
hand       FD-Lite0 of the blobs' captions to the real blobs; and the share of drawings that are nearer to the blob of
           their caption than to Noto's picture of it, by the cosine of Lite0 features. Captions that the LoRA learnt,
           and those kept back from it and from the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from instaflow.data.pictures import Picture, read_pictures
from instaflow.evaluate.distances import Projection, fit_projection, frechet
from instaflow.evaluate.features import Lite0
from instaflow.images import save_grid
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.lora import load_lora
from instaflow.models.sampling import sample
from instaflow.training.personalise import read_subject

SUBJECT, DRAWN, SEED = "sks cat", 64, 1000
CAT = Path("examples/cat")
SHOWN = ("sks cat", "sks cat and red heart", "cat face", "dog face", "red apple", "green frog", "house", "rainbow")


def draw(bundle: Bundle, prompts: list[str]) -> np.ndarray:
    """uint8 (N, H, W, 3), one step each."""
    parts = [
        bundle.decode(
            sample(bundle, prompts[i : i + 32], seeds=range(SEED + i, SEED + i + len(prompts[i : i + 32])), steps=1)
        )
        for i in range(0, len(prompts), 32)
    ]
    return np.concatenate(parts)


def pixels(pictures: list[Picture]) -> np.ndarray:
    """uint8 (N, 64, 64, 3)."""
    return np.stack([p.pixels(64) for p in pictures])


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def identity(features: np.ndarray, real: np.ndarray) -> float:
    """Mean over rows of the largest cosine with a real one."""
    return float((unit(features) @ unit(real).T).max(axis=1).mean())


def main() -> None:
    """Print the table, and write it with the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/emoji-64"))
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    run, lite = args.run, Lite0()

    def stage(name: str) -> Bundle:
        return Bundle.load(run / name / "bundle")

    shown = {
        "shipped model": Bundle.load(DEFAULT),
        "straight, perceptual": stage("subject"),
        "straight, L2": stage("subject-l2"),
    }
    shown["by the teacher's pairs"] = stage("by-teacher")
    shown["teacher's LoRA moved over"] = Bundle.load(DEFAULT)
    load_lora(shown["teacher's LoRA moved over"], run / "teacher" / "lora.safetensors")
    if (run / "ordinary" / "bundle").is_dir():
        shown["ordinary loss"] = stage("ordinary")

    own, kept = (pixels(read_subject([str(f)], SUBJECT, 64)) for f in (CAT, CAT / "test"))
    cat, real = lite(own), lite(kept)
    noto = read_pictures(args.data / "noto.parquet", split="train")
    rng = np.random.default_rng(0)
    some = [noto[i] for i in rng.choice(len(noto), args.count, replace=False)]
    projection = fit_projection(lite(pixels(noto[::2])))
    others, prompts = projection(lite(pixels(some))), [p.name for p in some]
    rows = {"real pictures": {"identity": identity(cat, real)}}
    for name, bundle in shown.items():
        drawn = lite(draw(bundle, [SUBJECT] * DRAWN))
        fd = frechet(projection(lite(draw(bundle, prompts))), others)
        rows[name] = {"identity": identity(drawn, real), "others": fd}
        print(name, rows[name], flush=True)
    sheet = [draw(bundle, list(SHOWN)) for bundle in shown.values()]
    first = np.concatenate([own[:5], np.full_like(own[:3], 255)])
    save_grid(np.concatenate([first, *sheet]), args.out / "personalise-subject.png", columns=8)
    if (run / "blobs" / "bundle").is_dir():
        rows |= hand(shown["shipped model"], stage("blobs"), lite, args.data, args.out)
    (run / "bars.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def hand(base: Bundle, blobs: Bundle, lite: Lite0, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """FD to the real blobs and how many are nearer to them than to Noto's, by captions; and a sheet of pictures."""
    noto = {p.name: p for p in read_pictures(data / "noto.parquet")}
    found = [p for p in read_pictures(data / "noto-v1.parquet") if p.name in noto]
    learnt, unseen = ([p for p in found if p.split == split] for split in ("train", "test"))
    projection: Projection = fit_projection(lite(pixels(learnt)))
    rows: dict[str, dict[str, float]] = {}
    for what, pictures in (("learnt", learnt[:: len(learnt) // len(unseen)][: len(unseen)]), ("unseen", unseen)):
        real, prompts = lite(pixels(pictures)), [p.name for p in pictures]
        others = unit(lite(pixels([noto[p] for p in prompts])))
        for name, bundle in (("shipped model", base), ("blobs", blobs)):
            drawn, row = lite(draw(bundle, prompts)), rows.setdefault(f"hand of {name}", {})
            row[f"{what}, FD"] = frechet(projection(drawn), projection(real))
            row[f"{what}, nearer"] = float(((unit(drawn) * (unit(real) - others)).sum(1) > 0).mean())
    # at equal distances: captions learnt, kept back, and of Noto's pictures that have no blob
    by_name = {p.name: p for p in found}
    new = [p for p in noto.values() if p.split == "train" and p.name not in by_name]
    names = [p.name for part, n in ((learnt, 6), (unseen, 3), (new, 3)) for p in part[:: len(part) // n][:n]]
    white = np.full_like(pixels(learnt[:1])[0], 255)
    own = np.stack([pixels([by_name[n]])[0] if n in by_name else white for n in names])
    sheet = [own, pixels([noto[n] for n in names]), draw(base, names), draw(blobs, names)]
    save_grid(np.concatenate(sheet), out / "personalise-hand.png", columns=len(names))
    print(names)
    return rows


if __name__ == "__main__":
    main()
