"""ControlNets as others publish them, on Stable Diffusion's layout: what diffusers' own composition draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from test_checkpoints import published, tiny_pipeline

from instaflow.models.bundle import Bundle
from instaflow.models.control import controlled, load_control
from instaflow.models.request import Control
from instaflow.models.sampling import integrate, noise

SIZE, SCALES = 64, (0.8, 0.5)
HEADINGS = {
    "one-step": "InstaFlow-0.9B fine-tuned from 2-Rectified Flow",
    "rectified": "InstaFlow: 2-Rectified Flow fine-tuned from Stable Diffusion v1.5",
}


def control_folder(unet: UNet2DConditionModel, folder: Path, seed: int) -> Path:
    """diffusers' own layout, of a ControlNet whose convolutions are no longer zero."""
    network = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in network.parameters():
            weights += 0.05 * torch.randn(weights.shape, generator=generator)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[Path]]:
    """The two published models, and two ControlNets."""
    base, pipe = tmp_path_factory.mktemp("controls"), tiny_pipeline()
    pipe.save_pretrained(base / "stock", safe_serialization=True)
    models = {kind: published(base / "stock", base / kind, heading) for kind, heading in HEADINGS.items()}
    return models, [control_folder(pipe.unet, base / f"control-{seed}", seed) for seed in (1, 2)]


@torch.inference_mode()
def by_diffusers(
    bundle: Bundle, networks: list[ControlNetModel], pictures: list[torch.Tensor], x0: torch.Tensor,
    states: torch.Tensor, empty: torch.Tensor, steps: int, guidance: float, windows: list[tuple[float, float]],
) -> torch.Tensor:  # fmt: skip
    """The loop of its StableDiffusionControlNetPipeline with Euler's step of the rectified flow."""
    several, x = MultiControlNetModel(networks), x0
    for i in range(steps):
        time = torch.tensor(1000.0 * (1 - i / steps))
        keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for start, end in windows]
        both, words = (torch.cat([x, x]), torch.cat([empty, states])) if guidance > 1 else (x, states)
        shown = [p.expand(len(both), -1, -1, -1) for p in pictures]
        scales = [s * k for s, k in zip(SCALES, keep, strict=True)]
        down, middle = several(
            both, time, encoder_hidden_states=words, controlnet_cond=shown, conditioning_scale=scales, return_dict=False
        )
        v = bundle.unet(
            both, time, words, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        if guidance > 1:
            without, with_ = v.chunk(2)
            v = without + guidance * (with_ - without)
        x = x + v / steps
    return x


@pytest.mark.parametrize(
    ("kind", "steps", "guidance", "windows"),
    [
        ("one-step", 1, 1.0, [(0.0, 1.0), (0.0, 1.0)]),
        ("rectified", 4, 1.5, [(0.0, 1.0), (0.0, 1.0)]),
        ("rectified", 4, 1.5, [(0.0, 0.5), (0.5, 1.0)]),
    ],
)
def test_parity_with_diffusers(
    folders: tuple[dict[str, Path], list[Path]],
    kind: str, steps: int, guidance: float, windows: list[tuple[float, float]],
) -> None:  # fmt: skip
    models, controls = folders
    bundle = Bundle.load(models[kind])
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in controls]
    networks = [load_control(folder, bundle) for folder in controls]
    given = [
        Control(network=n, image=image, scale=scale, start=start, end=end)
        for n, image, scale, (start, end) in zip(networks, images, SCALES, windows, strict=True)
    ]
    x0, states = noise([3, 4], bundle.latent_shape(SIZE)), bundle.encode(["a red apple", "a dog"])
    ours = integrate(controlled(bundle, given), x0, states, steps=steps, guidance=guidance, negative="")
    pictures = [torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1)[None].float() / 255 for i in images]
    theirs = by_diffusers(
        bundle, networks, pictures, x0, states, bundle.encode([""] * 2), steps, guidance, windows
    )  # fmt: skip
    without = integrate(bundle, x0, states, steps=steps, guidance=guidance, negative="")
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - without).abs().max() > 1e-2  # they count
