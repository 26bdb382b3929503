"""The command line as a user meets it: pictures where they were asked for, mistakes in one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from instaflow import cli
from instaflow.data.pairs import Manifest, open_manifest, shard_path, write_shard
from instaflow.models.bundle import Bundle
from instaflow.models.card import read_card


def instaflow(*words: str) -> int:
    """Run the command line in this process; its exit code."""
    before = sys.argv
    sys.argv = ["instaflow", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def model(one_step: Bundle, tmp_path: Path) -> str:
    return str(one_step.save(tmp_path / "bundle"))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a mistaken command prints."""
    assert instaflow(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("instaflow: ")
    return lines[0]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['instaflow', '--help']; import instaflow.cli as c\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_generate_writes_a_picture_with_its_story(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "a.png"
    assert instaflow("generate", "a red apple", "--seed", "7", "--model", model, "-o", str(out)) == 0
    said = capsys.readouterr().out
    assert str(out) in said and "seed 7" in said and "1 step" in said and "ms" in said
    with Image.open(out) as picture:
        assert picture.text["prompt"] == "a red apple"
        assert picture.text["seed"] == "7"
        assert picture.text["model"] == "tiny-one-step"


def test_same_inputs_same_bytes_alone_or_among_others(model: str, tmp_path: Path) -> None:
    assert instaflow("generate", "cat", "--seed", "8", "--model", model, "-o", str(tmp_path / "alone.png")) == 0
    words = ("generate", "dog", "cat", "-n", "3", "--seed", "7", "--model", model, "-o", str(tmp_path / "many"))
    assert instaflow(*words) == 0
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == [f"{w}-{s}.png" for w in ("cat", "dog") for s in (7, 8, 9)]
    assert (tmp_path / "many" / "cat-8.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_file_of_prompts_and_grid(model: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n", encoding="utf-8")
    sheet = tmp_path / "sheet.png"
    assert instaflow("generate", "-f", str(prompts), "-n", "4", "--grid", "--model", model, "-o", str(sheet)) == 0
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 32, 2 * 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no prompt"),
        (("",), "the prompt is empty"),
        (("cat " * 40,), "tokens and this model reads 16: it would stop after"),
        (("cat", "--seed=-1"), "seed=-1 is not allowed"),
        (("cat", "--size", "33"), "size=33 is not allowed; use a multiple of 16"),
        (("cat", "--steps", "2"), "steps=2 is not allowed for the one-step model"),
        (("cat", "--guidance", "3"), "guidance=3 is not allowed for the one-step model 'tiny-one-step'; allowed: 1"),
        (("cat", "--style", "cubist"), "unknown style 'cubist'; 'tiny-one-step' knows: noto, fluent"),
        (("cat", "-n", "0"), "--number=0 is not allowed"),
        (("cat", "-o", "cat.jpg"), "written as .png"),
        (("cat", "dog", "-o", "one.png"), "give a folder or --grid"),
        (("--file", "nowhere.txt"), "cannot read prompts from nowhere.txt"),
        (("cat", "--seeed", "3"), "Did you mean --seed?"),
    ],
)
def test_mistakes_in_generate(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    assert said in fails(capsys, "generate", *words, "--model", model)
    assert not list(tmp_path.glob("*.png"))


def test_other_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such bundle folder" in fails(capsys, "generate", "cat", "--model", str(tmp_path / "nowhere"))
    assert "it is no model folder" in fails(capsys, "inspect", str(tmp_path))
    assert "unknown data set 'cats'" in fails(capsys, "data", "cats")
    assert "unknown style 'cubist'" in fails(capsys, "data", "emoji", "--styles", "cubist")
    assert "no such recipe" in fails(capsys, "run", "nowhere.toml")
    assert "no stage 'nothing'" in fails(capsys, "train", "recipes/smoke.toml", "--stage", "nothing")
    assert "this verb takes pairs" in fails(capsys, "pairs", "recipes/smoke.toml", "--stage", "teacher")


def test_dry_run_counts_and_does_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert instaflow("run", "recipes/smoke.toml", "--dry-run", "--root", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "960" in said  # 60 steps × 16 pictures
    assert not list(tmp_path.iterdir())


def test_a_model_is_pruned_then_exported(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, shape = tmp_path / "pairs", (4, 4, 4)
    told = {"teacher": "", "sampler": "", "steps": 1, "guidance": 1.0, "noise": "", "prompts": "", "seed": 0}
    open_manifest(pairs, Manifest(**told, count=4, shard_size=4, shape=shape))
    write_shard(shard_path(pairs, 0), prompts=["a cat"] * 4, seeds=[0, 1, 2, 3], x1=torch.zeros(4, *shape))
    words = ("prune", model, "--target", "0.1", "--pairs", str(pairs), "--out", str(tmp_path / "small"))
    assert instaflow(*words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "worth" in said and "dropped" in said and "mid_block.resnets.0" in said
    assert not (tmp_path / "small").exists()
    assert instaflow(*words, "--images", "8", "--batch-size", "4", "--lr", "1e-4") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "pairs", "small"]
    card = read_card(tmp_path / "small")
    assert card.lineage["pruned"]["target"] == "0.1" and card.lineage["pruned"]["healed"]["images"] == 8
    assert instaflow("export", str(tmp_path / "small"), "--to", "openvino", "-o", str(tmp_path / "fast")) == 0
    assert instaflow("generate", "cat", "--model", str(tmp_path / "fast"), "-o", str(tmp_path / "a.png")) == 0
    assert (tmp_path / "a.png").is_file()


def test_mistakes_in_making_smaller(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune = ("prune", model, "--pairs", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "--target=1.5 is not allowed; use a share from 0 to 0.95, or base" in fails(capsys, *prune, "--target=1.5")
    assert "--width=0 is not allowed" in fails(capsys, *prune, "--target=0.5", "--width=0")
    assert "has no manifest.json" in fails(capsys, *prune, "--target=0.5")
    quantise = ("quantise", model, "--out", str(tmp_path / "out"), "--prompts")
    assert "no such file of prompts" in fails(capsys, *quantise, "none.txt", "--scheme", "w8")
    assert "is there already" in fails(capsys, "quantise", model, "--scheme", "w8", "--out", model)
    assert "is there already" in fails(capsys, "export", model, "--out", model)
    assert not (tmp_path / "out").exists()
