"""How fast does reflow learn? Initialisation, distribution of t and loss, by pictures trained on.

Each variant is trained to one point after another at a constant learning rate, drawn with and measured:
Fréchet distance on Lite0 features, unseen and seen concepts. It goes on where it was broken off.

    python benchmarks/reflow_ablation.py recipes/ablations.toml
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
import numpy as np

from instaflow.data.pairs import open_pairs
from instaflow.evaluate.distances import fit_projection, frechet
from instaflow.evaluate.drawing import Entrant, draw
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.heldout import COMPONENTS, make_split
from instaflow.recipe import Reflow, Train, load_recipe
from instaflow.training.reflow import reflow_stage
from instaflow.training.run import Run
from instaflow.training.trainer import train

matplotlib.use("Agg")

TEACHER, PAIRS = "teacher-epsilon", "pairs"
TRAIN = Train(steps=1, batch_size=64, lr=4e-4, lr_warmup_steps=50, lr_decay="constant")
POINTS = (50, 100, 200, 400)
VARIANTS: dict[str, dict[str, Any]] = {
    "converted": {},
    "raw, as published": {"init": "raw"},
    "converted, U-shaped t": {"time": "u-shaped"},
    "converted, LPIPS–Huber": {"loss": "lpips-huber"},
}
LAST = {"converted, LPIPS–Huber": 100}  # a decoder in every step: five times the time a picture
COUNT, SEED = 256, 0


class Ruler:
    """Fréchet distances of a bundle's pictures on both splits."""

    def __init__(self, run: Run, styles: tuple[str, ...]) -> None:
        self.size = run.recipe.data.size
        known = [p for p in run.training_pictures if p.style in styles]
        unseen = [p for p in run.pictures("test") if p.style in styles]
        chosen = np.random.default_rng(SEED).permutation(len(known))[: len(unseen)]
        self.splits = [
            make_split("unseen", unseen, COUNT, self.size, SEED),
            make_split("seen", [known[i] for i in sorted(chosen)], COUNT, self.size, SEED),
        ]
        self.features = Lite0()
        every = self.features(np.stack([p.pixels(self.size) for p in run.training_pictures]), progress=True)
        self.project = fit_projection(every, COMPONENTS)
        self.real = {s.name: self.project(self.features(s.real)) for s in self.splits}

    def measure(self, bundle: Any, steps: int, guidance: float = 1.0) -> dict[str, float]:
        """'unseen@1' → distance, and so on."""
        entrant = Entrant(label=f"{steps} steps", folder=Path(), steps=steps, guidance=guidance)
        return {
            f"{split.name}@{steps}": frechet(
                self.project(self.features(draw(bundle, entrant, split))), self.real[split.name]
            )
            for split in self.splits
        }


def main(recipe: Path) -> None:
    """Train, measure, and write ablation.json and ablation.png beside the run."""
    run = Run(load_recipe(recipe), Path("runs"), cache=Path("data"))
    folder = run.folder / "reflow-ablation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ablation.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    teacher = run.bundle(TEACHER)
    ruler = Ruler(run, teacher.card.styles)
    if not rows:
        rows.append(
            {"variant": "teacher", "images": 0, **ruler.measure(teacher, 25, teacher.card.guidance)}
            | ruler.measure(teacher, 1)
        )
    for steps in POINTS:
        for name, changes in VARIANTS.items():
            if steps > LAST.get(name, steps) or any(
                r["variant"] == name and r["images"] == steps * TRAIN.batch_size for r in rows
            ):
                continue
            spec = Reflow(
                name="ablation",
                model=TEACHER,
                pairs=PAIRS,
                train=msgspec.structs.replace(TRAIN, steps=steps),
                **changes,
            )
            bundle = run.bundle(TEACHER)
            bundle = bundle.with_card(
                kind="rectified", prediction="velocity" if spec.init == "raw" else bundle.card.prediction
            )
            bundle.unet.requires_grad_(True)
            stage = reflow_stage(spec, bundle, open_pairs(run.output(PAIRS)))
            begun = time.perf_counter()
            train(stage, spec.train, folder / name.replace(" ", "-"), seed=SEED, name=f"{name} {steps}")
            seconds = time.perf_counter() - begun
            row = {"variant": name, "images": steps * TRAIN.batch_size, "seconds": round(seconds, 1)}
            rows.append(row | ruler.measure(bundle, 1) | ruler.measure(bundle, 8))
            path.write_text(json.dumps(rows, indent=1))
            print(rows[-1], flush=True)
    plot(rows, folder / "ablation.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance against pictures trained on, one panel a measure."""
    from matplotlib import pyplot as plt

    panels = ("unseen@1", "seen@1", "unseen@8", "seen@8")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, constrained_layout=True)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for name in VARIANTS:
            own = [r for r in rows if r["variant"] == name]
            axis.plot([r["images"] for r in own], [r[panel] for r in own], "o-", label=name, markersize=4)
        concepts, steps = panel.split("@")
        axis.set_title(f"{concepts} concepts, {steps} step{'s' * (steps != '1')}")
        axis.axhline(rows[0][f"{concepts}@25"], color="grey", linestyle=":", label="teacher, 25 steps, guided")
        axis.set_xscale("log", base=2)
        axis.set_ylabel("FD-Lite0")
    for axis in axes[1]:
        axis.set_xlabel("pictures trained on")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
