"""How fast a picture is drawn: ours against peers in one run, and how the cost grows.

python benchmarks/speed.py                 the default model: bench.json, growth.png
python benchmarks/speed.py --sd15          Stable Diffusion 1.5's networks, random weights, 512 pixels
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from instaflow.models.card import DEFAULT
from instaflow.noise import noise
from instaflow.runtime.openvino import OpenVINOEngine

SIZES, BATCHES, REPEATS = (32, 64, 96, 128, 192, 256), (1, 2, 4, 8, 16, 32), 15


def random_sd15(folder: Path) -> Path:
    """InstaFlow-0.9B's folder as it was published, with random weights: 860 M U-Net, KL decoder, CLIP ViT-L/14."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from instaflow.models.ldm import clip_tokenizer

    if (folder / "README.md").exists():
        return folder
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half(),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ).half(),
        text_encoder=CLIPTextModel(text).half(),
        tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("# InstaFlow-0.9B fine-tuned from 2-Rectified Flow\n")
    return folder


def random_decoder(folder: Path) -> Path:
    """TAESD's architecture, random weights."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny().half().save_pretrained(folder)
    return folder


def timed(engine: OpenVINOEngine, count: int, size: int) -> float:
    """Milliseconds of drawing so many pictures of a size, the median."""
    took = []
    for i in range(3 + REPEATS):
        begun = time.perf_counter()
        states = engine.encode(["a red apple"] * count)
        engine.decode(engine.sample(noise(range(i, i + count), engine.latent_shape(size)), states))
        took.append(1000 * (time.perf_counter() - begun))
    return float(np.median(took[3:]))


def growth(folder: Path) -> None:
    """Time against batch and against picture size, as a plot."""
    from matplotlib.figure import Figure

    engine = OpenVINOEngine(DEFAULT)
    by_batch = {}
    for n in BATCHES:
        engine.batches = (n,)
        by_batch[n] = timed(engine, n, engine.card.image_size)
    engine.batches = (1,)
    by_size = {size: timed(engine, 1, size) for size in SIZES}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(by_batch), list(by_batch.values()), "o-")
    left.set(xlabel="pictures drawn together", ylabel="ms", xscale="log", yscale="log", title="64 pixels")
    left.plot(BATCHES, [by_batch[1] * n for n in BATCHES], ":", color="0.5", label="one after another")
    left.legend(frameon=False)
    right.plot(list(by_size), list(by_size.values()), "o-")
    right.set(xlabel="side in pixels", ylabel="ms", title="one picture", xscale="log", yscale="log")
    right.plot(SIZES, [by_size[64] * (s / 64) ** 2 for s in SIZES], ":", color="0.5", label="as the number of pixels")
    right.legend(frameon=False)
    for axis, ticks in ((left, BATCHES), (right, SIZES)):
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
    figure.savefig(folder / "growth.png", dpi=130)
    (folder / "growth.json").write_text(json.dumps({"batch": by_batch, "size": by_size}, indent=1) + "\n")
    print("batch", by_batch, "\nsize", by_size)


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true")
    parser.add_argument("--against", nargs="*", default=None)
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = [sys.executable, "-m", "instaflow", "bench"]
    if given.sd15:
        model = [str(random_sd15(given.out / "instaflow_0_9B_from_sd_1_5"))]
        peers, runs, out = given.against or ["diffusers"], given.runs or 5, given.out / "sd15.json"
    else:
        model, runs, out = [], given.runs or 60, given.out / "bench.json"
        peers = given.against or ["torch", "onnxruntime"]
    subprocess.run([*bench, *model, "--against", *peers, "--runs", str(runs), "-o", str(out)], check=True)
    if given.sd15:
        small = ["--decoder", str(random_decoder(given.out / "taesd")), "-o", str(given.out / "sd15-tiny.json")]
        subprocess.run([*bench, *model, *small, "--runs", str(runs)], check=True)
    else:
        growth(given.out)


if __name__ == "__main__":
    main()
