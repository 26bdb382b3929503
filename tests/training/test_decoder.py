"""A tiny decoder learns the model's own, both engines and diffusers read it, and one that does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from instaflow.errors import BundleError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.networks import build_tiny_decoder, decode_latents
from instaflow.recipe import Data, Decoder, Pairs, Recipe, Train
from instaflow.training.cost import bills
from instaflow.training.decoder import Decode, decoder_stage
from instaflow.training.run import Run
from instaflow.training.trainer import Draw

SPEC = Decoder(
    name="tiny", model="", pairs="pairs", width=8, blocks=1, perceptual_weight=0.0,
    train=Train(steps=60, batch_size=8, lr=3e-3, lr_warmup_steps=5, precision="no", ema=0.9),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(one_step_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Pairs of a tiny model, and a decoder learnt on them."""
    root = tmp_path_factory.mktemp("decoder")
    (root / "prompts.txt").write_text("".join(f"thing {i}\n" for i in range(32)))
    pairs = Pairs(
        name="pairs", model=str(one_step_folder), prompts=str(root / "prompts.txt"), count=32, steps=1, guidance=1.0
    )
    decoder = msgspec.structs.replace(SPEC, model=str(one_step_folder))
    recipe = Recipe(name="decoder", data=Data(size=32), stages=(pairs, decoder))
    made = Run(recipe, root / "runs", cache=root / "data")
    made.run(lambda *_: None)
    return made


@pytest.fixture(scope="module")
def one_step_folder(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = {"name": "one", "kind": "one-step", "steps": 1, "guidance": 1.0, "max_guidance": 1.0}
    return tiny.with_card(**card).save(tmp_path_factory.mktemp("model") / "bundle")


def test_it_comes_nearer_to_the_models_own(run: Run, one_step_folder: Path) -> None:
    own, learnt = Bundle.load(one_step_folder), Bundle.load(one_step_folder, decoder=run.output("tiny"))
    assert isinstance(learnt.vae, AutoencoderTiny)
    torch.manual_seed(0)
    untrained = build_tiny_decoder(SPEC, 4).eval()
    z = torch.randn(16, 4, 4, 4)
    with torch.no_grad():
        wanted, near, far = (decode_latents(v, z) for v in (own.vae, learnt.vae, untrained))
    assert near.shape == wanted.shape == (16, 3, 32, 32)
    assert (near - wanted).abs().mean() < 0.7 * (far - wanted).abs().mean()
    assert list((run.folder / "tiny" / "samples").glob("*.png"))


@pytest.mark.parametrize("crop", [0, 2])
def test_the_loss_is_the_mean_distance_of_pixels(run: Run, one_step_folder: Path, crop: int) -> None:
    from instaflow.data.pairs import open_pairs

    bundle, pairs = Bundle.load(one_step_folder), open_pairs(run.output("pairs"))
    stage = decoder_stage(msgspec.structs.replace(SPEC, crop=crop), bundle, pairs)
    batch = stage.batch(Draw(0, 3))
    side = crop or 4
    assert batch["latents"].shape == (8, 4, side, side)
    assert isinstance(stage.network, Decode)
    with torch.no_grad():
        loss = stage.loss(stage.network, batch)
        each = [
            (decode_latents(stage.network.vae, z[None]) - decode_latents(bundle.vae, z[None])).abs().mean().item()
            for z in batch["latents"]
        ]
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)
    learning = {n for n, p in stage.network.named_parameters() if p.requires_grad}
    assert learning and all(n.startswith("vae.decoder.") for n in learning)
    for rank in range(2):
        assert torch.equal(stage.batch(Draw(0, 3, part=(rank, 2)))["latents"], batch["latents"][rank::2])


def test_both_engines_draw_with_it(run: Run, one_step_folder: Path) -> None:
    tiny = run.output("tiny")
    plain = InstaFlow.load(one_step_folder, engine="torch").generate("a red apple", seed=3)
    engines: list[dict] = [{"engine": "torch"}, {"engine": "openvino", "precision": "f32"}]
    models = [InstaFlow.load(one_step_folder, decoder=tiny, **options) for options in engines]
    drawn = [model.generate("a red apple", seed=3) for model in models]
    pixels = [np.asarray(d.image).astype(int) for d in (plain, *drawn)]
    assert np.abs(pixels[1] - pixels[2]).max() <= 1 and not np.array_equal(pixels[0], pixels[1])


def test_what_it_writes_diffusers_reads(run: Run) -> None:
    theirs = AutoencoderTiny.from_pretrained(run.output("tiny") / "vae")
    assert theirs.config.scaling_factor == 1.0 and theirs.config.latent_channels == 4


def test_a_decoder_of_other_latents_is_refused(one_step_folder: Path, tmp_path: Path) -> None:
    build_tiny_decoder(SPEC, 16).save_pretrained(tmp_path / "other")
    with pytest.raises(BundleError, match="is for latents of 16 channels at 1/8 of the size; 'one' has 4 at 1/8"):
        Bundle.load(one_step_folder, decoder=tmp_path / "other")
    with pytest.raises(BundleError, match="no such decoder: nowhere; it takes a folder or a hub id"):
        Bundle.load(one_step_folder, decoder="nowhere")
    with pytest.raises(BundleError, match="it is a AutoencoderDC; allowed: AutoencoderTiny"):
        Bundle.load(one_step_folder, decoder=one_step_folder)


def test_its_cost_is_the_teachers_forward_and_its_own_three(run: Run) -> None:
    [_, bill], _ = bills(run.recipe)
    assert bill.images == 480 and bill.forwards == 3 * 480 and bill.flops > 0
