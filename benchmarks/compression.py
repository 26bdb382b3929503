"""What smaller networks cost: Fréchet distance against latency and against size, pruned, quantised and both.

    python benchmarks/compression.py --pairs runs/findings/pairs/pairs
    python benchmarks/compression.py --sd15    Stable Diffusion 1.5's U-Net, random weights: targets, one healing step

Makes each model by the command line, draws the same prompts and noises of unseen concepts with the CPU engine, and
measures them on `emoji-heldout`. What is there already is not made or drawn again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from instaflow.data.emoji import make_emoji
from instaflow.data.pictures import read_pictures
from instaflow.evaluate.distances import interval
from instaflow.evaluate.heldout import STYLES, heldout_field
from instaflow.images import to_uint8
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT, read_card, weight_files
from instaflow.noise import noise
from instaflow.runtime.bench import in_turn
from instaflow.runtime.openvino import OpenVINOEngine

FULL = "full"
ROWS: dict[str, tuple[str, list[str]]] = {  # name: (made of, the command that makes it)
    "pruned 25 %": (FULL, ["prune", "--target", "0.25"]),
    "pruned 50 %": (FULL, ["prune", "--target", "0.5"]),
    "int8": (FULL, ["quantise", "--scheme", "int8"]),
    "w8": (FULL, ["quantise", "--scheme", "w8"]),
    "w4": (FULL, ["quantise", "--scheme", "w4"]),
    "pruned 50 %, int8": ("pruned 50 %", ["quantise", "--scheme", "int8"]),
    "pruned 50 %, w8": ("pruned 50 %", ["quantise", "--scheme", "w8"]),
}
COMPARED = 500  # pictures whose cosine and PSNR are taken


def make(root: Path, pairs: Path, rows: list[str]) -> dict[str, Path]:
    """Every row's folder, with graphs."""
    folders = {FULL: DEFAULT}
    for name in rows:
        source, (verb, *options) = ROWS[name]
        out = root / name.replace(" %", "").replace(", ", "-").replace(" ", "-")
        folders[name] = out
        if verb == "prune":
            options += ["--pairs", str(pairs)]
            plain = out.with_name(out.name + "-bundle")
            if not plain.exists():
                instaflow(verb, str(folders[source]), *options, "--out", str(plain))
            verb, options, where = "export", [], plain
        else:
            where = folders[source]
            where = where.with_name(where.name + "-bundle") if source != FULL else where
        if not out.exists():
            instaflow(verb, str(where), *options, "--out", str(out))
    return folders


def instaflow(*words: str) -> None:
    """A command of ours, as it is typed."""
    print("instaflow", *words, flush=True)
    subprocess.run([sys.executable, "-m", "instaflow", *words], check=True)


def draw(folder: Path, split: Any, kept: Path) -> np.ndarray:
    """uint8 (N, H, W, 3) by the CPU engine, once for these weights."""
    path = kept / f"{read_card(folder).weights[:16]}-{split.hash}.npy"
    if not path.exists():
        engine, parts = OpenVINOEngine(folder), []
        for i in range(0, len(split.prompts), engine.batch):
            states = engine.encode(split.prompts[i : i + engine.batch])
            x0 = noise(split.seeds[i : i + engine.batch], engine.latent_shape(engine.card.image_size))
            parts.append(to_uint8(engine.decode(engine.sample(x0, states))))
        kept.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(parts))
    return np.load(path)


def likeness(pictures: np.ndarray, full: np.ndarray) -> dict[str, list[float]]:
    """1 − cosine and PSNR (dB) to the full model's pictures of the same noise: [median, worst]."""
    a, b = (p[:COMPARED].reshape(COMPARED, -1).astype(np.float64) for p in (pictures, full))
    psnr = 10 * np.log10(255**2 / np.maximum(1e-9, np.square(a - b).mean(1)))
    a, b = a / 127.5 - 1, b / 127.5 - 1
    apart = 1 - (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return {
        "one_minus_cosine": [float(f"{np.median(apart):.3g}"), float(f"{apart.max():.3g}")],
        "psnr_db": [round(float(np.median(psnr)), 1), round(float(psnr.min()), 1)],
    }


def latencies(folders: dict[str, Path], runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one picture and of its U-Net, medians, the models taking turns."""
    engines = {name: OpenVINOEngine(folder) for name, folder in folders.items()}
    states = {name: e.encode(["a red apple"]) for name, e in engines.items()}
    shape = engines[FULL].latent_shape(64)
    steps = {n: lambda i, e=e, s=states[n]: e.sample(noise([i], shape), s) for n, e in engines.items()}
    whole = {
        n: lambda i, e=e: e.decode(e.sample(noise([i], shape), e.encode(["a red apple"]))) for n, e in engines.items()
    }
    found: dict[str, dict[str, float]] = {}
    for what, draws in (("unet_ms", steps), ("picture_ms", whole)):
        for name, took in in_turn(draws, runs).items():
            found.setdefault(name, {})[what] = round(float(np.median(took)), 2)
    return found


def bytes_of(folder: Path) -> dict[str, float]:
    """Megabytes of weights, of the U-Net alone and of all."""
    files = weight_files(folder)
    unet = sum(f.stat().st_size for f in files if f.parent.name == "unet")
    return {"unet_mb": round(unet / 1e6, 1), "all_mb": round(sum(f.stat().st_size for f in files) / 1e6, 1)}


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Distance against the U-Net's latency and against all bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("unet_ms", "all_mb"), ("U-Net, ms a picture", "weights, MB"), strict=True
    ):
        for i, (name, row) in enumerate(rows.items()):
            low, high = row["fd"][0] - row["fd_95"][0], row["fd_95"][1] - row["fd"][0]
            axis.errorbar(row[key], row["fd"][0], [[low], [high]], fmt="o", color=f"C{i}", capsize=2, label=name)
        axis.set(xlabel=label)
    figure.axes[0].set(ylabel="FD-Lite0, unseen concepts")
    figure.axes[1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def sd15(folder: Path) -> None:
    """Named targets at full size: parameters, FLOPs, milliseconds of one step (torch, bf16); then healing runs."""
    import copy
    import tempfile
    import time

    import torch
    from speed import random_sd15

    from instaflow.compress.heal import heal
    from instaflow.compress.prune import count
    from instaflow.compress.targets import TARGETS, named
    from instaflow.data.pairs import Manifest, open_manifest, open_pairs, shard_path, write_shard
    from instaflow.runtime.bench import peak_memory

    whole = Bundle.load(random_sd15(folder / "instaflow_0_9B_from_sd_1_5"))
    x, states = torch.randn(1, 4, 64, 64).bfloat16(), whole.encode(["a red apple"]).bfloat16()
    full = 0.0
    for target in ("full", *TARGETS):
        bundle = whole if target == "full" else named(whole, target)
        unet, took = copy.deepcopy(bundle.unet).bfloat16(), []
        for _ in range(4):
            begun = time.perf_counter()
            with torch.inference_mode():
                unet(x, 999.0, states)
            took.append(1000 * (time.perf_counter() - begun))
        ms = float(np.median(took[1:]))
        full = full or ms
        size = sum(p.numel() for p in unet.parameters())
        print(
            f"| {target} | {size / 1e6:.1f} | {count(bundle.unet)[0] / 1e9:.0f} | {ms:.0f} | {full / ms:.2f} |",
            flush=True,
        )
        del unet
    with tempfile.TemporaryDirectory() as scratch:
        pairs, shape = Path(scratch) / "pairs", whole.latent_shape()
        told = {"teacher": "", "sampler": "", "steps": 1, "guidance": 1.0, "noise": "", "prompts": "", "seed": 0}
        open_manifest(pairs, Manifest(**told, count=2, shard_size=2, shape=shape))
        write_shard(shard_path(pairs, 0), prompts=["a red apple", "a cat"], seeds=[0, 1], x1=torch.randn(2, *shape))
        begun = time.perf_counter()
        heal(bundle, whole, open_pairs(pairs), Path(scratch) / "healing", images=2, batch_size=1, lr=1e-5, loss="l2")
        took_s = time.perf_counter() - begun
    print(f"tiny: one step of each part of healing, one picture, with its checkpoints: {took_s:.0f} s, "
          f"{peak_memory() / 1e9:.1f} GB at most")  # fmt: skip


def main() -> None:
    """Make, draw, measure; compression.json, compression.md and compression.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--sd15", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/compression"))
    parser.add_argument("--cache", type=Path, default=Path("data"))
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.sd15:
        sd15(given.out)
        return
    if given.pairs is None:
        parser.error("--pairs: a folder of pairs to heal on")
    folders = make(given.out, given.pairs, given.rows)

    data = read_pictures(make_emoji(given.cache / "emoji-64", size=64, styles=STYLES, cache=given.cache / "npm"))
    train, test = ([p for p in data if p.split == s and p.style in STYLES] for s in ("train", "test"))
    field = heldout_field(Bundle.load(DEFAULT), train, test, count=given.count, seed=0, device="cpu")
    split = field.splits[0]
    pictures = {name: draw(folder, split, given.out / "drawn") for name, folder in folders.items()}
    ruler: Any = field.rulers()[0]
    features = {name: ruler.extract(p) for name, p in pictures.items()}
    spread = {name: ruler.replicates(f) for name, f in features.items()}
    times = latencies(folders, given.runs)
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        figures = ruler.figures(features[name], split.concepts)
        less = interval(spread[name] - spread[FULL])
        rows[name] = {
            "fd": [figures["fd_lite0"]],
            "fd_95": figures["fd_lite0_95"],
            "less_full": [round(float(v), 2) for v in less],
            "r_at_5": figures["r_at_5"],
            **likeness(pictures[name], pictures[FULL]),
            **times[name],
            **bytes_of(folder),
        }
        print(name, rows[name], flush=True)
    (given.out / "compression.json").write_text(json.dumps(rows, indent=1) + "\n")
    (given.out / "compression.md").write_text(table(rows))
    plot(rows, given.out / "compression.png")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | FD unseen | × full | less full | R@5 | U-Net ms | picture ms | U-Net MB | all MB | PSNR | 1 − cos |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = rows[FULL]["fd"][0]
    for name, r in rows.items():
        less, low, high = r["less_full"]
        lines.append(
            f"| {name} | {r['fd'][0]:.1f} [{r['fd_95'][0]:.1f}, {r['fd_95'][1]:.1f}] | {r['fd'][0] / full:.3f} "
            f"| {less:+.1f} [{low:+.1f}, {high:+.1f}] | {r['r_at_5']:.3f} | {r['unet_ms']:.2f} | {r['picture_ms']:.2f} "
            f"| {r['unet_mb']:.1f} | {r['all_mb']:.1f} | {r['psnr_db'][0]:.1f} / {r['psnr_db'][1]:.1f} "
            f"| {r['one_minus_cosine'][0]:.2g} / {r['one_minus_cosine'][1]:.2g} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
