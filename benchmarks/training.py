"""Reflow in pictures a second: our loop against a plain one, turn by turn, at the size of the default model.

The plain loop is what diffusers' example scripts do: the same U-Net, batch, precision, loss, AdamW, clipping and
average, the prompts of each batch through the text encoder, everything else as torch and diffusers have it.
Then one change after another on the plain loop, which says where the gain comes from.

    python benchmarks/training.py
    python benchmarks/training.py --size sd15 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel

from instaflow.data.pairs import Manifest, open_manifest, open_pairs, prompt_hash, shard_path, write_shard
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.sampling import noise
from instaflow.noise import NOISE
from instaflow.recipe import Reflow, Train
from instaflow.training.reflow import reflow_stage
from instaflow.training.trainer import train

WARM, STEPS, ROUNDS = 20, 40, 5


@dataclass(frozen=True)
class Plain:
    """The plain loop's choices."""

    cached_text: bool = False
    channels_last: bool = False
    plain_attention: bool = False
    fused: bool = False


def fresh(size: str, device: str) -> Bundle:
    """The default model as a 2-rectified flow, or with a U-Net of Stable Diffusion 1.5's size and random weights."""
    bundle = Bundle.load(DEFAULT, device=device).with_card(kind="rectified", prediction="velocity")
    if size == "sd15":
        config = {"sample_size": 64, "cross_attention_dim": 384}
        bundle = replace(bundle, unet=UNet2DConditionModel(**config).to(device))
    bundle.unet.requires_grad_(True)
    return bundle


def make_pairs(folder: Path, bundle: Bundle, count: int) -> Path:
    """Pairs of random latents; the prompts recur, as a data set's do."""
    shape = bundle.latent_shape()
    prompts = [f"a {colour} {thing}" for colour in ["red", "green", "blue", "grey"] for thing in range(count // 4)]
    manifest = Manifest(
        teacher="none", sampler="none", steps=1, guidance=1.0, noise=NOISE, prompts=prompt_hash(prompts), seed=0,
        count=count, shard_size=count, shape=shape,
    )  # fmt: skip
    open_manifest(folder, manifest)
    write_shard(shard_path(folder, 0), prompts=prompts, seeds=list(range(count)), x1=torch.randn(count, *shape))
    return folder


def ours(spec: Reflow, bundle: Bundle, pairs: Path) -> float:
    """Pictures a second of our loop after its warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        train(reflow_stage(spec, bundle, open_pairs(pairs)), spec.train, Path(folder), seed=0, name="ours")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(r["images_per_s"] for r in rows[1:])


def plain(spec: Reflow, bundle: Bundle, pairs: Path, how: Plain) -> float:
    """Pictures a second of the plain loop after the same warm-up."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=spec.train.precision)
    unet: Any = bundle.unet.train()
    unet.set_attn_processor(AttnProcessor() if how.plain_attention else AttnProcessor2_0())
    unet = unet.to(memory_format=torch.channels_last if how.channels_last else torch.contiguous_format)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=spec.train.lr, fused=how.fused or None)
    ema = EMAModel(unet.parameters(), decay=spec.train.ema)
    network, optimiser = accelerator.prepare(unet, optimiser)
    reader, states, begun = open_pairs(pairs), {}, 0.0
    for step in range(spec.train.steps):
        if step == WARM:
            synchronise(bundle)
            begun = time.perf_counter()
        batch = reader.batch(0, step, spec.train.batch_size)
        if how.cached_text:
            new = [p for p in batch.prompts if p not in states]
            if new:
                states.update(zip(new, bundle.encode(new), strict=True))
            text = torch.stack([states[p] for p in batch.prompts]).clone()
        else:
            text = bundle.encode(batch.prompts).clone()
        x1 = batch.x1.float().to(bundle.device)
        x0 = noise(batch.seeds, x1.shape[1:]).to(bundle.device)
        t = torch.rand(len(x1), device=bundle.device)
        mix = t.view(-1, 1, 1, 1)
        with accelerator.autocast():
            out = network(mix * x1 + (1 - mix) * x0, 1000 * (1 - t), text).sample
            loss = (out.float() - (x1 - x0)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), spec.train.grad_clip)
        optimiser.step()
        optimiser.zero_grad()
        ema.step(unet.parameters())
        loss.item()  # for the progress bar
    synchronise(bundle)
    return (spec.train.steps - WARM) * spec.train.batch_size / (time.perf_counter() - begun)


def synchronise(bundle: Bundle) -> None:
    """Wait for a GPU."""
    if bundle.device.type == "cuda":
        torch.cuda.synchronize()


def contenders() -> Iterator[tuple[str, Plain | None]]:
    """Ours, the plain loop, and the plain loop with one change after another."""
    yield "ours", None
    yield "plain", Plain()
    yield "+ token states cached", Plain(cached_text=True)
    yield "+ plain attention", Plain(cached_text=True, plain_attention=True)
    yield "+ fused AdamW", Plain(cached_text=True, plain_attention=True, fused=True)
    yield "+ channels last", Plain(cached_text=True, plain_attention=True, fused=True, channels_last=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["default", "sd15"], default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    training = Train(steps=WARM + STEPS, batch_size=options.batch, lr=1e-6, lr_decay="constant")
    spec = Reflow(name="reflow", model="a/b", pairs="c/d", empty_prompts=0.0, train=training)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder), fresh(options.size, options.device), 16 * options.batch)
        for number in range(options.rounds):
            for name, how in contenders():
                bundle = fresh(options.size, options.device)
                rate = ours(spec, bundle, pairs) if how is None else plain(spec, bundle, pairs, how)
                speeds.setdefault(name, []).append(rate)
                print(f"round {number + 1}: {name:24} {rate:7.1f} pictures/s", flush=True)
    for name, rates in speeds.items():
        ratio = [a / b for a, b in zip(rates, speeds["plain"], strict=True)]
        print(f"{name:24} {statistics.median(rates):7.1f} pictures/s, {statistics.median(ratio):.2f} of plain")


if __name__ == "__main__":
    main()
