"""What a stage learns from how many pictures: starts and losses of reflow, and distillation with and without reflow.

Each variant is trained to one point after another at a constant learning rate, drawn with and measured: Fréchet
distance on Lite0 features. It goes on where it was broken off.

    instaflow train recipes/ablations.toml --stage teacher-epsilon
    instaflow pairs recipes/ablations.toml
    python benchmarks/learning_curves.py reflow recipes/ablations.toml
    python benchmarks/learning_curves.py distil recipes/findings.toml
    python benchmarks/learning_curves.py distil recipes/unconditional.toml
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from open_prompts import FIRST

from instaflow.data.pairs import open_pairs
from instaflow.evaluate.distances import fit_projection, frechet, interval, replicates
from instaflow.evaluate.drawing import Entrant, Task, draw, draw_once
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.heldout import COMPONENTS, make_split
from instaflow.models.bundle import Bundle
from instaflow.recipe import Distil, Reflow, Train, load_recipe
from instaflow.training.distil import distil_stage
from instaflow.training.reflow import reflow_stage
from instaflow.training.run import Run
from instaflow.training.trainer import train

matplotlib.use("Agg")

SEED, BATCH, RESAMPLES = 0, 64, 100


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A stage with what it starts from, and up to how many steps it is trained."""

    model: str
    pairs: str
    last: int
    reflow: dict[str, Any] | None = None
    """Fields of a reflow; None is distillation with L2."""

    def spec(self, steps: int) -> Reflow | Distil:
        """The stage, trained for so many steps."""
        plan = Train(steps=steps, batch_size=BATCH, lr=4e-4, lr_warmup_steps=50, lr_decay="constant")
        common: dict[str, Any] = {"name": "curve", "model": self.model, "pairs": self.pairs, "train": plan}
        return Distil(**common) if self.reflow is None else Reflow(**common, **self.reflow)


EPSILON: dict[str, Any] = {"model": "teacher-epsilon", "pairs": "pairs"}
STUDIES: dict[str, dict[str, Variant]] = {
    "reflow": {
        "converted": Variant(**EPSILON, last=400, reflow={}),
        "raw, as published": Variant(**EPSILON, last=1600, reflow={"init": "raw"}),
        "converted, U-shaped t": Variant(**EPSILON, last=400, reflow={"time": "u-shaped"}),
        "converted, LPIPS–Huber": Variant(**EPSILON, last=100, reflow={"loss": "lpips-huber"}),  # five times the time
    },
    "distil": {
        "direct distillation": Variant(model="teacher", pairs="pairs", last=400),
        "after reflow": Variant(model="2-rectified", pairs="straight-pairs", last=400),
    },
}
POINTS = (0, 25, 50, 100, 200, 400, 800, 1600)
STEPS = {"reflow": (1, 8), "distil": (1,)}


class Ruler:
    """Tasks, and the features of what their pictures are compared with."""

    def __init__(self, run: Run, styles: tuple[str, ...], count: int) -> None:
        self.features, size = Lite0(), run.recipe.data.size
        every = self.features(np.stack([p.pixels(size) for p in run.training_pictures]), progress=True)
        self.project = fit_projection(every, COMPONENTS)
        pairs, tasks = run.recipe.stage("pairs"), []
        if pairs.empty_prompts == 1:  # nothing names a concept: against the teacher's own pictures of other noises
            new, other = (range(n, n + count) for n in (FIRST, 2 * FIRST))
            teacher = Entrant(label="reference", folder=run.output(pairs.model), steps=25, guidance=pairs.guidance)
            reference = Task(name="reference", prompts=[""] * count, seeds=other)
            drawn = draw_once(run.bundle(pairs.model), teacher, reference, run.folder / "measured" / "drawn")
            tasks = [(Task(name="new noises", prompts=[""] * count, seeds=new), drawn)]
        else:
            known = [p for p in run.training_pictures if p.style in styles]
            unseen = [p for p in run.pictures("test") if p.style in styles]
            chosen = np.random.default_rng(SEED).permutation(len(known))[: len(unseen)]
            splits = [
                make_split("unseen", unseen, count, size, SEED),
                make_split("seen", [known[i] for i in sorted(chosen)], count, size, SEED),
            ]
            tasks = [(s, s.real) for s in splits]
        self.targets = [(task, self.project(self.features(real))) for task, real in tasks]

    def measure(self, bundle: Bundle, steps: int, guidance: float = 1.0) -> dict[str, list[float]]:
        """'unseen@1' → distance with its interval, and so on."""
        entrant, found = Entrant(label="", folder=Path(), steps=steps, guidance=guidance), {}
        for task, real in self.targets:
            drawn = self.project(self.features(draw(bundle, entrant, task)))
            found[f"{task.name}@{steps}"] = [
                round(v, 2) for v in interval(replicates(frechet, drawn, real, n=RESAMPLES))
            ]
        return found


def main(study: str, recipe: str) -> None:
    """Train, measure, and write curves.json and curves.png beside the run."""
    run = Run(load_recipe(Path(recipe)), Path("runs"), cache=Path("data"))
    folder, variants = run.folder / f"curves-{study}", STUDIES[study]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "curves.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    pairs = run.recipe.stage("pairs")
    teacher = run.bundle(pairs.model)
    ruler = Ruler(run, teacher.card.styles, 256 if study == "reflow" else 1024)
    if not rows:
        rows.append({"variant": "teacher", "images": 0, **ruler.measure(teacher, 25, pairs.guidance)})
    for steps in POINTS:
        for name, variant in variants.items():
            images = steps * BATCH
            if steps > variant.last or any(r["variant"] == name and r["images"] == images for r in rows):
                continue
            spec, bundle = variant.spec(max(1, steps)), run.bundle(variant.model)
            raw = isinstance(spec, Reflow) and spec.init == "raw"
            kind = "rectified" if isinstance(spec, Reflow) else "one-step"
            bundle = bundle.with_card(kind=kind, prediction="velocity" if raw else bundle.card.prediction)
            begun = time.perf_counter()
            if steps:
                bundle.unet.requires_grad_(True)
                source = open_pairs(run.output(variant.pairs))
                stage = (reflow_stage if isinstance(spec, Reflow) else distil_stage)(spec, bundle, source)  # type: ignore[operator]
                train(stage, spec.train, folder / name.replace(" ", "-"), seed=SEED, name=f"{name} {steps}")
            row = {"variant": name, "images": images, "seconds": round(time.perf_counter() - begun, 1)}
            for n in STEPS[study]:
                row |= ruler.measure(bundle, n)
            rows.append(row)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(row, flush=True)
    plot(rows, variants, folder / "curves.png")


def plot(rows: list[dict[str, Any]], variants: dict[str, Variant], path: Path) -> None:
    """Distance against pictures trained on, one panel a measure."""
    from matplotlib import pyplot as plt

    panels = [k for k in rows[-1] if "@" in k]
    figure, axes = plt.subplots(
        -(-len(panels) // 2),
        min(2, len(panels)),
        figsize=(10 if panels[1:] else 6, 3.5 * -(-len(panels) // 2)),
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        for name in variants:
            own = [r for r in rows if r["variant"] == name]
            x, (y, low, high) = [r["images"] for r in own], np.array([r[panel] for r in own]).T
            (line,) = axis.plot(x, y, "o-", label=name, markersize=4)
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        concepts, steps = panel.split("@")
        axis.set_title(f"{concepts}{' concepts' * ('seen' in concepts)}, {steps} step{'s' * (steps != '1')}")
        axis.axhline(rows[0][f"{concepts}@25"][0], color="grey", linestyle=":", label="teacher, 25 steps")
        axis.set_xscale("symlog", base=2, linthresh=BATCH * 25)
        axis.set_yscale("log")
        axis.set_ylabel("FD-Lite0")
        axis.set_xlabel("pictures trained on")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
