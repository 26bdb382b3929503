"""What a control is worth on concepts unseen in training: edges followed, Fréchet distance, time.

    instaflow control recipes/control-edges.toml
    python benchmarks/control.py [FOLDER] [OUT]

The controls are made of the real pictures that were kept back, of the kind that the folder's card says. A drawing is
compared with its control: of edges and scribbles the F1 of its own and the control's, each allowed one pixel off (more
is better); of colours and around a hole the mean absolute difference of 255 (less is better). The best to be had is
that of the real pictures through the autoencoder, chance that of pictures drawn under another concept's control.
Writes control.json and a sheet.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter

from instaflow.data.controls import control_picture
from instaflow.evaluate.distances import interval
from instaflow.evaluate.heldout import heldout_field, reconstruct
from instaflow.images import save_grid
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT, read_control_card
from instaflow.models.control import ControlledUNet, load_control
from instaflow.models.sampling import noise, one_step
from instaflow.recipe import load_recipe
from instaflow.runtime.bench import in_turn
from instaflow.training.run import Run

COUNT, BATCH, SHOWN = 2500, 64, 10
HOLE = 128  # what fills it


def difference(kind: str, drawn: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Mean absolute difference, (N,), of what pictures show and controls, uint8 (N, H, W, 3); a hole does not count."""
    shown = np.stack([control_picture("colours", p) for p in drawn]) if kind == "colours" else drawn
    off = np.abs(shown.astype(np.float32) - controls)
    counts = np.ones_like(off) if kind == "colours" else (controls != HOLE).any(-1, keepdims=True) * np.ones_like(off)
    return (off * counts).sum((1, 2, 3)) / counts.sum((1, 2, 3))


def agreement(kind: str, drawn: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """F1 of lines within a pixel, (N,), of pictures and controls, uint8 (N, H, W, 3); or their difference."""
    if kind not in ("edges", "scribble"):
        return difference(kind, drawn, controls)
    found = []
    for picture, control in zip(drawn, controls, strict=True):
        got, want = control_picture(kind, picture)[..., 0] > 127, control[..., 0] > 127
        precision = (got & maximum_filter(want, 3)).sum() / max(1, got.sum())
        recall = (want & maximum_filter(got, 3)).sum() / max(1, want.sum())
        found.append(2 * precision * recall / max(1e-9, precision + recall))
    return np.array(found)


@torch.inference_mode()
def main(folder: str = "runs/control-edges/edges/bundle", out: str = "runs/control-edges/measured") -> None:
    """Draw, measure, print and write."""
    run = Run(load_recipe(Path("recipes/control-edges.toml")), Path("runs"), cache=Path("data"))
    bundle = Bundle.load(DEFAULT)
    network = ControlledUNet(bundle.unet, load_control(folder, bundle, bundle.card.weights)).eval()
    field = heldout_field(bundle, run.training_pictures, run.pictures("test"), count=COUNT, seed=0, device="cpu")
    split: Any = field.splits[0]
    row = {int(concept): i for i, concept in enumerate(split.real_concepts)}  # Noto has one picture a concept
    rows = np.array([row[c] for c in split.concepts])
    card = read_control_card(Path(folder))
    kind: Any = card.kind if card else "edges"
    side, rng = bundle.card.image_size // 2, np.random.default_rng(0)
    corners = rng.integers(0, side // 2 + 1, (len(split.real), 2))  # holes of half a side, anywhere but at the rim
    holes = [(top + side // 4, left + side // 4, top + 5 * side // 4, left + 5 * side // 4) for top, left in corners]
    made = np.stack([control_picture(kind, p, hole) for p, hole in zip(split.real, holes, strict=True)])
    controls = made[rows]

    def draw(controlled: bool, first: int, count: int) -> np.ndarray:
        part = slice(first, first + count)
        states, x0 = bundle.encode(split.prompts[part]), noise(split.seeds[part], bundle.latent_shape())
        pictures = torch.from_numpy(controls[part]).permute(0, 3, 1, 2).float() / 255
        unet: Any = partial(network, pictures=pictures) if controlled else bundle.unet
        return bundle.decode(one_step(unet, bundle, x0, states))

    drawn = {
        name: np.concatenate([draw(name == "controlled", i, BATCH) for i in range(0, COUNT, BATCH)])
        for name in ("uncontrolled", "controlled")
    }
    found = {name: agreement(kind, pictures, controls) for name, pictures in drawn.items()}
    other = np.roll(controls, 1, axis=0)
    found["controlled, against another concept's"] = agreement(kind, drawn["controlled"], other)
    found["real, through the autoencoder"] = agreement(kind, reconstruct(bundle, split.real), made)
    # concepts are the independent unit: the same control is drawn under several noises
    error = {name: v.std() / len(split.names) ** 0.5 for name, v in found.items()}
    ruler: Any = field.rulers()[0]
    spread = {name: ruler.replicates(ruler.extract(pictures)) for name, pictures in drawn.items()}
    took = in_turn({name: partial(draw, name == "controlled", count=1) for name in drawn}, 60)
    measured = {
        "control": kind,
        "pictures": COUNT,
        "concepts": len(split.names),
        "f1" if kind in ("edges", "scribble") else "difference": {
            name: [round(float(v.mean()), 4), round(float(error[name]), 4)] for name, v in found.items()
        },
        "fd_lite0": {name: [round(v, 2) for v in interval(s)] for name, s in spread.items()},
        "fd_difference": [round(v, 2) for v in interval(spread["controlled"] - spread["uncontrolled"])],
        "fd_ratio": round(float(spread["controlled"][0] / spread["uncontrolled"][0]), 3),
        "ms_torch": {name: round(float(np.median(v)), 2) for name, v in took.items()},
        "megabytes": round(sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6, 1),
    }
    print(json.dumps(measured, indent=1))
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "control.json").write_text(json.dumps(measured, indent=1) + "\n")
    chosen = np.arange(SHOWN) * (len(split.names) // SHOWN)
    sheet = [controls, drawn["uncontrolled"], drawn["controlled"], split.real[rows]]
    save_grid(np.concatenate([pictures[chosen] for pictures in sheet]), Path(out) / "control.png", columns=SHOWN)
    print([split.prompts[i] for i in chosen])


if __name__ == "__main__":
    main(*sys.argv[1:])
