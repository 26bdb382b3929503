"""Does reflow help where a prompt leaves much open? One-step students against their teacher's own pictures.

Prompts such as 'face' or 'animal', or none at all; new noises; Fréchet distance on Lite0 features to the teacher's
25-step pictures of the same prompts from other noises. The teacher against itself is the floor.

    instaflow run recipes/open-prompts.toml
    python benchmarks/open_prompts.py
    instaflow run recipes/unconditional.toml
    python benchmarks/open_prompts.py recipes/unconditional.toml 4096
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from instaflow.data.prompts import read_prompts
from instaflow.evaluate.distances import diversity, fit_projection, frechet, interval, replicates
from instaflow.evaluate.drawing import Entrant, Task, draw_once
from instaflow.evaluate.features import Lite0
from instaflow.evaluate.plots import bars, grid
from instaflow.models.bundle import Bundle
from instaflow.recipe import Distil, load_recipe
from instaflow.training.run import Run

FIRST = 1_000_000  # noises that no pair was drawn from


def main(recipe: str = "recipes/open-prompts.toml", pictures: str = "1024") -> None:
    """Draw, measure, print, and write open-prompts.json, a grid and bars beside the run."""
    run, count = Run(load_recipe(recipe), Path("runs"), cache=Path("data")), int(pictures)
    folder, pairs = run.folder / "measured", run.recipe.stage("pairs")
    teacher, guidance = run.output(pairs.model), pairs.guidance
    prompts = [""] * count if pairs.empty_prompts == 1 else read_prompts(pairs.prompts, count)
    task = Task(name="open", prompts=prompts, seeds=range(FIRST, FIRST + count))
    other = Task(name="reference", prompts=prompts, seeds=range(2 * FIRST, 2 * FIRST + count))
    settings = [(f"teacher, {n} step{'s' * (n > 1)}", teacher, n, guidance) for n in (25, 1)]
    settings += [(f"2-rectified, {n} step{'s' * (n > 1)}", run.output("2-rectified"), n, 1.0) for n in (25, 1)]
    students = [s.name for s in run.recipe.stages if isinstance(s, Distil) and run.output(s.name).is_dir()]
    settings += [(name, run.output(name), 1, 1.0) for name in students]
    entrants = [Entrant(label=label, folder=f, steps=s, guidance=g) for label, f, s, g in settings]

    extract = Lite0()
    every = extract(np.stack([p.pixels(64) for p in run.training_pictures if p.style == "noto"]), progress=True)
    project = fit_projection(every, 64)
    reference = project(extract(draw_once(Bundle.load(teacher), entrants[0], other, folder / "drawn")))
    rows, spread, found = {}, {}, {}
    kinds = np.unique(prompts, return_inverse=True)[1]
    for entrant in entrants:
        pictures = draw_once(Bundle.load(entrant.folder), entrant, task, folder / "drawn")
        features = extract(pictures)
        rows[entrant.label] = pictures[:10]
        spread[entrant.label] = replicates(frechet, project(features), reference)
        found[entrant.label] = {
            "fd": [round(v, 2) for v in interval(spread[entrant.label])],
            "diversity": round(diversity(features, kinds), 2),
        }
        print(entrant.label, found[entrant.label], flush=True)
    for of in students[1:]:
        gap = interval(spread[of] - spread[students[0]])
        found[f"{of} less {students[0]}"] = {"fd": [round(v, 2) for v in gap]}
        print(of, "less", students[0], found[f"{of} less {students[0]}"])
    (folder / "open-prompts.json").write_text(json.dumps(found, indent=1) + "\n")
    grid(rows, prompts[:10], folder / "grid.png")
    values = {k: tuple(v["fd"]) for k, v in found.items() if "diversity" in v}
    bars(values, "One-step students", folder / "fd.png", "FD-Lite0 to the teacher's own pictures")


if __name__ == "__main__":
    main(*sys.argv[1:])
