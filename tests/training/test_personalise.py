"""Personalisation: only the LoRA learns, a broken run goes on, pictures are coupled with noises, mistakes are said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from instaflow.cli import main
from instaflow.data.pairs import PairReader
from instaflow.data.pictures import Picture, write_parquet
from instaflow.errors import DataError
from instaflow.models.bundle import Bundle
from instaflow.models.lora import drop_lora, load_lora
from instaflow.models.sampling import noise, sample
from instaflow.recipe import Personalise, Recipe, Train, dump_recipe, load_recipe
from instaflow.training.personalise import (
    add_lora,
    personal_pairs,
    personalise_stage,
    picture_pairs,
    prior_prompts,
    read_subject,
)
from instaflow.training.run import Run
from instaflow.training.stages import LORA
from instaflow.training.trainer import Draw

TRAIN = Train(steps=4, batch_size=4, lr=1e-2, lr_warmup_steps=0, precision="no", checkpoint_minutes=1e-9)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "cat"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def model(one_step: Bundle, tmp_path: Path) -> Path:
    return one_step.save(tmp_path / "one-step", dtype=torch.float32)


def stage(model: Path, pictures: Path, **changes: object) -> Personalise:
    fields = {"subject": "sks cat", "loss": "l2", "rank": 2, "count": 12, "prior": 8, "train": TRAIN, **changes}
    return Personalise(name="cat", model=str(model), pictures=(str(pictures),), **fields)


def carry_out(spec: Personalise, root: Path) -> Path:
    run = Run(Recipe(name="mine", stages=(spec,)), root, cache=root)
    run.run(lambda *_: None)
    return run.folder / spec.name


def test_only_the_lora_learns(model: Path) -> None:
    bundle = Bundle.load(model)
    before = {k: v.clone() for k, v in bundle.unet.state_dict().items()}
    add_lora(bundle, rank=2, seed=0)
    pairs = picture_pairs(["a cat", "a dog"], torch.randn(2, *bundle.latent_shape()), 8, seed=0)
    reader = PairReader([len(pairs)], lambda _: pairs)
    for loss in ("l2", "ordinary"):
        built = personalise_stage(stage(model, Path("cat"), loss=loss), bundle, reader)
        built.loss(built.network, built.batch(Draw(0, 0))).backward()
        with_gradient = [k for k, p in built.network.named_parameters() if p.grad is not None]
        assert with_gradient and all(".lora_" in k for k in with_gradient)
    for p in bundle.unet.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    drop_lora(bundle)
    after = bundle.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_killed_run_ends_as_an_unbroken_one(model: Path, pictures: Path, tmp_path: Path) -> None:
    long = stage(model, pictures, train=msgspec.structs.replace(TRAIN, steps=30))
    unbroken = carry_out(long, tmp_path / "one")
    learnt = load_file(unbroken / LORA)
    assert learnt and any(v.abs().max() > 0 for k, v in learnt.items() if "lora_B" in k)

    dump_recipe(Recipe(name="mine", stages=(long,)), tmp_path / "mine.toml")
    words = [sys.executable, "-m", "instaflow", "run", str(tmp_path / "mine.toml"), "--root", str(tmp_path / "two")]
    job, folder = subprocess.Popen(words, stderr=subprocess.DEVNULL), tmp_path / "two" / "mine" / "cat"
    while not (folder / "checkpoint.pt").exists():
        assert job.poll() is None
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL and not (folder / LORA).exists()
    assert 0 < torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < long.train.steps
    broken = load_file(carry_out(long, tmp_path / "two") / LORA)
    assert all(torch.equal(v, broken[k]) for k, v in learnt.items())

    # the model with the file on it is the model that the stage left, and the file alone makes the difference
    made, plain = Bundle.load(unbroken / "bundle"), Bundle.load(model)
    load_lora(plain, unbroken / LORA)
    drawn = [sample(b, ["sks cat"], seeds=[0], steps=1) for b in (made, plain, Bundle.load(model))]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=2e-2)  # the one is kept in fp16
    assert (drawn[1] - drawn[2]).abs().max() > 5 * (drawn[0] - drawn[1]).abs().max()


def test_a_personalised_teacher_draws_the_pairs(tiny: Bundle, model: Path, pictures: Path, tmp_path: Path) -> None:
    own = stage(model, pictures)
    teacher = stage(tiny.save(tmp_path / "teacher"), pictures, loss="")
    recipe = Recipe(
        name="two",
        stages=(
            Personalise(**{f: getattr(teacher, f) for f in teacher.__struct_fields__} | {"name": "teacher"}),
            Personalise(**{f: getattr(own, f) for f in own.__struct_fields__} | {"teacher": "teacher"}),
        ),
    )
    run = Run(recipe, tmp_path / "runs", cache=tmp_path)
    run.run(lambda *_: None)
    assert (run.folder / "cat" / "pairs" / "00000.safetensors").exists()
    assert (run.folder / "cat" / LORA).exists()


def test_pictures_and_noises_are_coupled_at_the_least_distance() -> None:
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    pairs = picture_pairs(["a", "a", "b"], latents, 30, seed=5)
    assert pairs.seeds == list(range(5, 35))
    which = [next(i for i, x in enumerate(latents.half()) if torch.equal(x, y)) for y in pairs.x1]
    assert [which.count(i) for i in range(3)] == [10, 10, 10]
    assert all(prompt == ("b" if i == 2 else "a") for prompt, i in zip(pairs.prompts, which, strict=True))
    x0, rows = noise(pairs.seeds, (4, 2, 2)), [i for i, p in enumerate(pairs.prompts) if p == "a"]

    def total(order: list[int]) -> float:
        return float((x0[rows] - latents[order]).square().sum())

    own = [which[i] for i in rows]
    rng = np.random.default_rng(0)
    assert total(own) < min(total(list(rng.permutation(own))) for _ in range(100))


def test_each_picture_of_a_hand_has_a_pair(model: Path, tmp_path: Path) -> None:
    drawn = [Picture.from_image(Image.new("RGB", (32, 32), (50 * i, 0, 0)), name=f"thing {i}") for i in range(5)]
    spec = stage(model, write_parquet(drawn, tmp_path / "hand.parquet"), subject="", count=2, prior=0)
    learnt = read_subject(spec.pictures, "", 32)
    pairs = personal_pairs(spec, Bundle.load(model), learnt, tmp_path, model="")
    assert sorted(pairs.load(0).prompts) == [f"thing {i}" for i in range(5)]


def test_other_prompts_are_words_that_the_model_reads(one_step: Bundle) -> None:
    prompts = prior_prompts(one_step, 50, 0)
    assert prompts == prior_prompts(one_step, 50, 0) and len(set(prompts)) > 40
    for prompt in prompts:
        one_step.check_prompt(prompt)
    assert any(prompt.endswith(", noto") for prompt in prompts)


def test_mistakes_are_said_and_nothing_is_written(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"needs 3 pictures or more, got 2"):
        read_subject([str(pictures / "0.png"), str(pictures / "1.png")], "sks cat", 32)
    with pytest.raises(DataError, match=r"got 4, and only 1 of the 4 differ"):
        read_subject([str(pictures / "0.png")] * 4, "sks cat", 32)
    with pytest.raises(DataError, match=r"has no caption"):
        read_subject([str(pictures)], "", 32)
    (pictures / "3.png").write_bytes(b"no picture")
    out = tmp_path / "out" / "my.safetensors"
    options = ["--subject", "sks cat", "--out", str(out), "--model", str(model), "--root", str(tmp_path / "runs")]
    for words, line in (
        ([str(pictures)], "unreadable picture"),
        ([str(tmp_path / "nowhere")], "no pictures at"),
        ([], "no pictures"),
    ):
        monkeypatch.setattr("sys.argv", ["instaflow", "personalise", *words, *options])
        with pytest.raises(SystemExit) as left:
            main()
        error = capsys.readouterr().err
        assert left.value.code == 2 and line in error and error.count("\n") == 1
    assert not out.parent.exists() and not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_written_is_said_before_the_work(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("a file")
    out = tmp_path / "plain" / "my.safetensors"
    words = ["--subject", "sks cat", "--out", str(out), "--model", str(model), "--root", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["instaflow", "personalise", str(pictures), *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and f"cannot be written: {tmp_path}/plain" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_verb_writes_a_file_that_generate_takes(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, picture = tmp_path / "my.safetensors", tmp_path / "cat.png"
    small = ["--steps", "2", "--rank", "2", "--root", str(tmp_path / "runs")]
    for words in (
        ["personalise", str(pictures), "--subject", "sks cat", "--out", str(out), "--model", str(model), *small],
        ["generate", "sks cat", "--model", str(model), "--lora", f"{out}=0.5", "--seed", "1", "-o", str(picture)],
    ):
        monkeypatch.setattr("sys.argv", ["instaflow", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
    with Image.open(picture) as drawn:
        assert drawn.text["lora"] == "my at 0.5"
    assert str(out) in capsys.readouterr().out
    assert list((tmp_path / "runs").glob("*/personalise/prior"))


def test_a_hand_is_for_all_prompts(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        (pictures / f"{i}.txt").write_text(f"thing {i}")
    small = ["--steps", "2", "--root", str(tmp_path / "runs"), "--model", str(model)]
    monkeypatch.setattr(
        "sys.argv", ["instaflow", "personalise", str(pictures), "-o", str(tmp_path / "a.safetensors"), *small]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    begun = load_recipe(next((tmp_path / "runs").glob("*/recipe.toml"))).stages[0]
    assert isinstance(begun, Personalise) and (begun.prior, begun.rank) == (0, 32)
