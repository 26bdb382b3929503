"""Does reflow help where a prompt leaves much open? One-step students against their teacher's own pictures.

Prompts such as 'face' or 'animal', new noises; Fréchet distance on Lite0 features to the teacher's 25-step pictures of
the same prompts from other noises. The teacher against itself is the floor.

    instaflow run recipes/open-prompts.toml
    python benchmarks/open_prompts.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from instaflow.evaluate.distances import bootstrap, bootstrap_difference, diversity, fit_projection, frechet
from instaflow.evaluate.drawing import Entrant, Task, draw_once
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.plots import bars, grid
from instaflow.models.bundle import Bundle
from instaflow.recipe import load_recipe
from instaflow.training.run import Run

COUNT, FIRST = 1024, 1_000_000  # noises that no pair was drawn from


def main() -> None:
    """Draw, measure, print, and write open-prompts.json, a grid and bars beside the run."""
    run = Run(load_recipe("recipes/open-prompts.toml"), Path("runs"), cache=Path("data"))
    folder, teacher = run.folder / "measured", Path("runs/ablations/teacher-v/bundle")
    prompts = Path("recipes/open-prompts.txt").read_text().split()[:COUNT]
    task = Task(name="open", prompts=prompts, seeds=range(FIRST, FIRST + COUNT))
    other = Task(name="reference", prompts=prompts, seeds=range(2 * FIRST, 2 * FIRST + COUNT))
    settings = [("teacher, 25 steps", teacher, 25, 1.5), ("teacher, 1 step", teacher, 1, 1.5)]
    settings += [(f"2-rectified, {n} step{'s' * (n > 1)}", run.output("2-rectified"), n, 1.0) for n in (25, 1)]
    settings += [(name, run.output(name), 1, 1.0) for name in ("reflow-then-distil", "direct", "direct-longer")]
    entrants = [Entrant(label=label, folder=f, steps=s, guidance=g) for label, f, s, g in settings]

    extract = Lite0()
    every = extract(np.stack([p.pixels(64) for p in run.training_pictures if p.style == "noto"]), progress=True)
    project = fit_projection(every, 64)
    reference = project(extract(draw_once(Bundle.load(teacher), entrants[0], other, folder / "drawn")))
    rows, seen, found = {}, {}, {}
    kinds = np.unique(prompts, return_inverse=True)[1]
    for entrant in entrants:
        pictures = draw_once(Bundle.load(entrant.folder), entrant, task, folder / "drawn")
        features = extract(pictures)
        seen[entrant.label], rows[entrant.label] = project(features), pictures[:10]
        distance = bootstrap(frechet, seen[entrant.label], reference)
        found[entrant.label] = {
            "fd": [round(v, 2) for v in distance],
            "diversity": round(diversity(features, kinds), 2),
        }
        print(entrant.label, found[entrant.label], flush=True)
    for of in ("direct", "direct-longer"):
        gap = bootstrap_difference(frechet, seen[of], seen["reflow-then-distil"], reference)
        found[f"{of} less reflow-then-distil"] = {"fd": [round(v, 2) for v in gap]}
        print(of, "less reflow-then-distil", found[f"{of} less reflow-then-distil"])
    (folder / "open-prompts.json").write_text(json.dumps(found, indent=1) + "\n")
    grid(rows, prompts[:10], folder / "grid.png")
    values = {k: tuple(v["fd"]) for k, v in found.items() if "diversity" in v}
    bars(values, "Prompts that leave much open", folder / "fd.png", "FD-Lite0 to the teacher's own pictures")


if __name__ == "__main__":
    main()
