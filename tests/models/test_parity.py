"""Parity with the published pipelines on the full Stable Diffusion 1.5 architecture, random weights.

`parity.json` has what they drew: the authors' `pipeline_rf.py`, and `pipeline_rf_ctrl.py` under ControlNets, and
diffusers' community `instaflow_one_step.py`, as they are in gnobitab/InstaFlow (f543f81) and huggingface/diffusers,
none of them part of this project. Made by

    python tests/models/test_parity.py FOLDER_WITH_THESE_FILES

which builds the weights below (torch's own initialisation, seed 0, rounded to half), calls each pipeline that is in the
folder with the noise of seed 7 and `output_type="latent"`, and writes every 61st value of the latents. (Of the second
one import was changed: diffusers has moved its MultiControlNetModel.)
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from instaflow.models.bundle import Bundle
from instaflow.models.control import controlled
from instaflow.models.ldm import clip_tokenizer
from instaflow.models.request import Control
from instaflow.models.sampling import noise, sample

RECORD = Path(__file__).with_name("parity.json")
PROMPT, SEED, EVERY = "A hyper-realistic photo of a cute cat.", 7, 61
CASES: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1, "guidance": 1.0, "size": 512},
    "few steps": {"steps": 3, "guidance": 1.0, "size": 256},
    "guided": {"steps": 2, "guidance": 1.5, "size": 256},
    "negative prompt": {"steps": 2, "guidance": 1.5, "size": 256, "negative": "blurry, low quality"},
}
CONTROLLED: dict[str, dict[str, Any]] = {  # one network for each of the scales
    "under a control": {"steps": 1, "guidance": 1.0, "size": 512, "scales": [0.8]},
    "guided, under two": {"steps": 2, "guidance": 1.5, "size": 256, "scales": [0.8, 0.5]},
}


def full_size() -> dict[str, Any]:
    """The networks of Stable Diffusion 1.5: 860 M U-Net, KL autoencoder, CLIP ViT-L/14."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
    }
    for part in parts.values():
        part.half().float().eval().requires_grad_(False)  # what a half-precision file holds exactly
    return parts


def control_net(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """361 M parameters: the U-Net's encoder, its closing convolutions no longer zero."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet)
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.02)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return network.half().float().eval().requires_grad_(False)


def picture(size: int) -> Image.Image:
    """White lines on black."""
    image = Image.new("RGB", (size, size))
    ImageDraw.Draw(image).ellipse((size // 4, size // 8, 3 * size // 4, 7 * size // 8), outline="white", width=3)
    return image


def stock(parts: dict[str, Any]) -> dict[str, Any]:
    """All that a pipeline is made of."""
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
    )
    return {
        **parts,
        "tokenizer": clip_tokenizer(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A full-size folder as diffusers writes it, two gigabytes, under the published pipeline's name."""
    out = tmp_path_factory.mktemp("full") / "instaflow_0_9B_from_sd_1_5"
    StableDiffusionPipeline(**stock(full_size())).to(torch.float16).save_pretrained(out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "_class_name": "RectifiedFlowPipeline"}))
    (out / "README.md").write_text("# InstaFlow-0.9B fine-tuned from 2-Rectified Flow\n")
    yield out
    shutil.rmtree(out.parent)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.load(folder)


def test_it_is_the_full_size(bundle: Bundle) -> None:
    count = [sum(p.numel() for p in n.parameters()) for n in (bundle.unet, bundle.vae, bundle.text_encoder)]
    assert count == [859_520_964, 83_653_863, 123_060_480]
    assert bundle.card.kind == "one-step" and bundle.latent_shape() == (4, 64, 64)


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_the_published_pipelines(bundle: Bundle, case: str) -> None:
    settings = {**CASES[case]}
    latents = sample(bundle, [PROMPT], seeds=[SEED], **settings)
    for pipeline, values in json.loads(RECORD.read_text())[case].items():
        difference = (latents.flatten()[::EVERY] - torch.tensor(values)).abs().max()
        assert difference <= 1e-4, pipeline


@pytest.mark.parametrize("case", CONTROLLED)
def test_latents_under_control_are_those_of_the_authors_pipeline(bundle: Bundle, case: str) -> None:
    settings = {**CONTROLLED[case]}
    image, scales = picture(settings["size"]), settings.pop("scales")
    given = [Control(network=control_net(bundle.unet, i), image=image, scale=s) for i, s in enumerate(scales)]
    latents = sample(controlled(bundle, given), [PROMPT], seeds=[SEED], **settings)
    without = sample(bundle, [PROMPT], seeds=[SEED], **settings)
    [values] = json.loads(RECORD.read_text())[case].values()
    assert (latents.flatten()[::EVERY] - torch.tensor(values)).abs().max() <= 1e-4
    assert (latents - without).abs().max() > 1e-2  # they count


def test_what_we_write_at_full_size_stock_diffusers_reads(bundle: Bundle, tmp_path: Path) -> None:
    ours = bundle.save(tmp_path / "ours")
    theirs = StableDiffusionPipeline.from_pretrained(ours, torch_dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(bundle, part).state_dict()
        found = getattr(theirs, part).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    shutil.rmtree(ours)


def record(source: Path) -> None:
    """Run the published pipelines and write what they drew."""
    parts, record = stock(full_size()), json.loads(RECORD.read_text())
    for name, family, cases in (
        ("pipeline_rf", "RectifiedFlowPipeline", CASES),
        ("instaflow_one_step", "InstaFlowPipeline", CASES),
        ("pipeline_rf_ctrl", "RectifiedFlowCtrlPipeline", CONTROLLED),
    ):
        if not (source / f"{name}.py").exists():
            continue
        spec = importlib.util.spec_from_file_location(name, source / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for case, settings in cases.items():
            own: dict[str, Any] = {}
            given: dict[str, Any] = {}
            if scales := settings.get("scales"):
                own = {"controlnet": [control_net(parts["unet"], i) for i in range(len(scales))]}
                given = {
                    "image": [picture(settings["size"])] * len(scales),
                    "controlnet_conditioning_scale": scales,
                }
            pipe, side = getattr(module, family)(**parts, **own), settings["size"] // 8
            latents: Tensor = pipe(
                PROMPT,
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                negative_prompt=settings.get("negative"),
                height=settings["size"],
                width=settings["size"],
                latents=noise([SEED], (4, side, side)),
                output_type="latent",
                **given,
            ).images
            record.setdefault(case, {})[name] = latents.flatten()[::EVERY].tolist()
            print(name, case, latents.std())
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
