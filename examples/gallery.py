"""The gallery: forty prompts fixed before training (docs/gallery.toml), one step each, seed = place in the list.

python examples/gallery.py --out docs/gallery.png
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import numpy as np

from instaflow import InstaFlow
from instaflow.evaluate.plots import gallery

PROMPTS = Path(__file__).parent.parent / "docs" / "gallery.toml"


def main() -> None:
    """Draw every prompt and lay them out with their words under them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    parser.add_argument("--model", type=Path, help="a bundle folder; left out, the default model")
    parser.add_argument("--style", help="a drawing style that the model knows")
    options = parser.parse_args()

    lists = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    prompts = [*lists["seen"], *lists["unseen"]]
    captions = [*lists["seen"], *(f"{p} (unseen)" for p in lists["unseen"])]
    drawings = InstaFlow.load(options.model).generate_many(prompts, seeds=range(len(prompts)), style=options.style)
    gallery(np.stack([np.asarray(d.image) for d in drawings]), captions, options.out, columns=10)
    print(options.out)


if __name__ == "__main__":
    main()
