"""Every recipe is carried out, shrunk: few pictures, few steps, small networks, each stage as it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from test_checkpoints import tiny_pipeline

from instaflow.data.pairs import open_pairs, read_manifest
from instaflow.data.pictures import Picture, write_parquet
from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT, bundle_hash, read_card, read_control_card
from instaflow.models.control import load_control
from instaflow.models.hub import find_control
from instaflow.models.networks import build_unet, load_minilm
from instaflow.models.stacked import StackedUNet
from instaflow.recipe import Data, Evaluate, Pairs, Personalise, Recipe, Teacher, Train, inputs, load_recipe
from instaflow.training.pairs import draw_pairs
from instaflow.training.run import Run
from instaflow.training.stages import LORA

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def shrunk(name: str, **names: str) -> Recipe:
    """The recipe with two steps of two samples a stage, and other models and files in these places."""
    recipe = load_recipe(ROOT / "recipes" / name)
    stages = []
    for stage in recipe.stages:
        if isinstance(stage, Evaluate):
            continue
        small: dict = {}
        if isinstance(stage, Pairs):
            small = {"count": 4, "steps": 2, "shard_size": 2, "batch_size": 2, "seed": 0}
            small["prompts"] = names.get(stage.prompts, stage.prompts)
        else:
            train = {"steps": 2, "batch_size": 2, "micro_batch_size": min(1, stage.train.micro_batch_size)}
            small = {"train": msgspec.structs.replace(stage.train, **train, preview_every=1000)}
        for field in ("model", "autoencoder", "pairs"):
            if hasattr(stage, field):
                small[field] = names.get(getattr(stage, field), getattr(stage, field))
        stages.append(msgspec.structs.replace(stage, **small))
    return msgspec.structs.replace(recipe, stages=tuple(stages))


def carry_out(recipe: Recipe, folder: Path) -> Run:
    run = Run(recipe, folder / "runs", cache=folder / "data")
    run.run(lambda *_: None)
    return run


def test_the_published_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(name: str, *files: str) -> Path:
        raise BundleError(f"no model {name!r} here")

    monkeypatch.setattr("instaflow.models.perceptual.download", offline)
    tiny_pipeline(side=256).save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red apple\na tree\n")
    run = carry_out(shrunk("sd15.toml", **{SD: "./sd", "prompts.parquet": "prompts.txt"}), tmp_path)
    cards = {s.name: read_card(run.output(s.name)) for s in run.recipe.stages if not isinstance(s, Pairs)}
    assert {k: c.kind for k, c in cards.items()} == {
        "reflow-1": "rectified", "2-rectified": "rectified", "distil-l2": "one-step", "one-step": "one-step",
    }  # fmt: skip
    assert {c.prediction for c in cards.values()} == {"velocity"}  # the head that answered ε, as published
    assert "timm/vgg16.tv_in1k" in caplog.text and "in place of LPIPS" in caplog.text
    stacked = carry_out(shrunk("sd15-stacked.toml"), tmp_path)
    decoder = carry_out(shrunk("decoder.toml"), tmp_path)
    assert isinstance(Bundle.load(run.output("one-step"), decoder=decoder.output("tiny")).vae, AutoencoderTiny)
    one, two = (Bundle.load(r.output("one-step")) for r in (run, stacked))
    assert isinstance(two.unet, StackedUNet) and two.card.kind == "one-step"
    count = [sum(p.numel() for p in b.unet.parameters()) for b in (one, two)]
    assert 1.9 < count[1] / count[0] < 2


def test_the_recipes_of_the_findings(tiny: Bundle, tmp_path: Path) -> None:
    encoder, tokenizer = load_minilm()
    spec = Teacher(name="teacher", autoencoder="", widths=(32, 32), train=Train(steps=1))
    unet = build_unet(spec, latent_channels=4, latent_size=4, text_width=384)
    small = replace(tiny.with_card(styles=("noto",)), unet=unet, text_encoder=encoder, tokenizer=tokenizer)
    default = {"src/instaflow/default": str(small.save(tmp_path / "default"))}
    rng = np.random.default_rng(0)
    pictures = [
        Picture.from_image(
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)), name=f"thing {i}", style="noto"
        )
        for i in range(6)
    ]
    data = Data(source=str(write_parquet(pictures, tmp_path / "data.parquet")), size=32)

    def carried_out(name: str, **names: str) -> Run:
        prompts = {"recipes/open-prompts.txt": str(ROOT / "recipes/open-prompts.txt")}
        return carry_out(msgspec.structs.replace(shrunk(name, **default, **prompts, **names), data=data), tmp_path)

    runs = [carried_out("ablations.toml"), carried_out("findings.toml")]
    teacher = {"runs/findings/teacher/bundle": str(runs[1].output("teacher"))}
    runs += [carried_out("unconditional.toml", **teacher), carried_out("open-prompts.toml", **teacher)]
    for run, prediction in zip(runs, ["epsilon", *["v_prediction"] * 3], strict=True):
        made = [s for s in run.recipe.stages if not isinstance(s, Pairs)]
        assert {read_card(run.output(s.name)).prediction for s in made} == {prediction}
    findings = runs[1].output
    assert isinstance(Bundle.load(findings("reflow-distil-stacked")).unet, StackedUNet)
    own = read_manifest(findings("straight-pairs"))
    assert own.teacher == bundle_hash(findings("2-rectified")) and own.sampler == "euler"
    for stage in ("reflow-distil-l2", "3-rectified"):
        assert read_card(findings(stage)).lineage["pairs"]["teacher"] == own.teacher
    assert set(open_pairs(runs[2].output("pairs")).load(0).prompts) == {""}


def test_the_recipes_of_control(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Picture.from_image(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), name=f"thing {i}")
        for i in range(4)
    ]
    data = Data(source=str(write_parquet(pictures, tmp_path / "data.parquet")), size=64)
    bundle, drawn, seen = Bundle.load(DEFAULT), tmp_path / "pairs", {}
    few = Pairs(name="pairs", model="m", count=4, steps=1, guidance=1.0)
    draw_pairs(few, bundle, ["a red apple"] * 4, drawn, teacher="abc")
    names = {"src/instaflow/default": str(DEFAULT), "runs/findings/pairs/pairs": str(drawn)}
    for name in ("control-pairs.toml", "control-edges.toml", "controls.toml"):
        recipe = shrunk(name, **names)
        run = carry_out(msgspec.structs.replace(recipe, data=data), tmp_path)
        seen |= {s.name: read_control_card(run.output(s.name)) for s in recipe.stages}
    kinds = {k: k for k in ("edges", "scribble", "colours", "inpaint")} | dict.fromkeys(
        ("by-pairs", "by-pictures"), "edges"
    )
    assert {k: c.kind for k, c in seen.items() if c} == kinds
    assert {k: "pairs" in c.lineage for k, c in seen.items() if c} == {k: k == "by-pairs" for k in kinds}
    shipped = load_file(find_control("edges") / WEIGHTS)
    begun = load_file(run.output("scribble") / WEIGHTS)  # two steps from the control that comes with the model
    assert max((begun[k].float() - v.float()).abs().max() for k, v in shipped.items()) < 0.01
    load_control(run.output("colours"), bundle, bundle_hash(DEFAULT))


def test_the_recipe_of_personalisation(tiny: Bundle, one_step: Bundle, tmp_path: Path) -> None:
    drawn = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)) for i in range(4)]
    (tmp_path / "cat").mkdir()
    for i, picture in enumerate(drawn):
        picture.save(tmp_path / "cat" / f"{i}.png")
    captioned = [Picture.from_image(picture, name=f"thing {i}") for i, picture in enumerate(drawn)]
    hand = str(write_parquet(captioned, tmp_path / "hand.parquet"))
    models = {
        "src/instaflow/default": str(one_step.save(tmp_path / "one")),
        "runs/findings/teacher/bundle": str(tiny.save(tmp_path / "teacher")),
    }
    recipe = shrunk("personalise.toml", **models)
    stages = tuple(
        msgspec.structs.replace(s, pictures=(str(tmp_path / "cat") if s.subject else hand,), count=4, prior=2)
        for s in recipe.stages
        if isinstance(s, Personalise)
    )
    run = carry_out(msgspec.structs.replace(recipe, stages=stages), tmp_path)
    kinds = {s.name: read_card(run.output(s.name)).kind for s in stages}
    assert {k for k, v in kinds.items() if v == "teacher"} == {"teacher"}
    assert {k for k, v in kinds.items() if v == "one-step"} == {
        "subject",
        "subject-l2",
        "by-teacher",
        "ordinary",
        "blobs",
    }
    for stage in stages:
        assert (run.folder / stage.name / LORA).stat().st_size > 1000


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_a_recipe_reads_what_it_makes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    made = {s.name for s in recipe.stages}
    for stage in recipe.stages:
        assert all(name in made or "/" in name for name in inputs(stage))
        if isinstance(stage, Evaluate):
            assert len(set(stage.models)) == len(stage.models)
