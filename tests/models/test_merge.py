"""ΔW merge: the formula on every tensor, and what does not fit is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import published, tiny_pipeline

from instaflow.cli import main
from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle
from instaflow.models.merge import Weights, merge

UNET = "unet/diffusion_pytorch_model.safetensors"


def changed(folder: Path, seed: int) -> Path:
    """Other U-Net and autoencoder weights than its neighbours'."""
    generator = torch.Generator().manual_seed(seed)
    for file in (UNET, UNET.replace("unet", "vae")):
        state = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in load_file(folder / file).items()}
        save_file(state, folder / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, pipe = tmp_path_factory.mktemp("models"), tiny_pipeline()
    made = {}
    for seed, name in enumerate(("base", "tuned", "into")):
        pipe.save_pretrained(root / name)
        made[name] = changed(root / name, seed)
    made["into"] = published(made["into"], root / "insta", "InstaFlow-0.9B fine-tuned from 2-Rectified Flow")
    return made


def test_the_formula(models: dict[str, Path], tmp_path: Path) -> None:
    out = merge(models["base"], models["tuned"], models["into"], tmp_path / "out", scale=0.7, vae="tuned")
    base, tuned, into, made = (load_file(f / UNET) for f in (models["base"], models["tuned"], models["into"], out))
    assert made.keys() == into.keys()
    for k, v in made.items():
        assert torch.equal(v, (into[k] + 0.7 * (tuned[k] - base[k])).half())
    bundle = Bundle.load(out)
    assert bundle.card.kind == "one-step" and bundle.card.lineage["merge"]["scale"] == 0.7
    for part, source in (("vae", "tuned"), ("text_encoder", "into")):
        file = next((models[source] / part).glob("*.safetensors")).name
        assert (out / part / file).read_bytes() == (models[source] / part / file).read_bytes()


def test_at_scale_0_it_is_the_model_itself(models: dict[str, Path], tmp_path: Path) -> None:
    out = merge(models["base"], models["tuned"], models["into"], tmp_path / "out", scale=0.0)
    into = load_file(models["into"] / UNET)
    assert all(torch.equal(v, into[k].half()) for k, v in load_file(out / UNET).items())


def test_shards_are_read_as_one(models: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(models["base"] / UNET)
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({k: state[k].bfloat16() for k in own}, tmp_path / file)
    index = {"weight_map": {k: file for file, own in parts.items() for k in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = Weights(tmp_path)
    assert weights.shapes() == {k: tuple(v.shape) for k, v in state.items()}
    assert all(torch.equal(weights[k], v.bfloat16().float()) for k, v in state.items())


@pytest.mark.parametrize("what", ["missing", "left over", "another shape"])
def test_another_architecture_is_refused(
    models: dict[str, Path],
    tmp_path: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = load_file(models["tuned"] / UNET)
    name = sorted(state)[7]
    if what == "missing":
        del state[name]
    elif what == "left over":
        name = "strange.weight"
        state[name] = torch.zeros(2)
    else:
        state[name] = torch.zeros(3, 5)
    (tmp_path / "tuned" / "unet").mkdir(parents=True)
    (tmp_path / "tuned" / "model_index.json").write_text("{}")
    save_file(state, tmp_path / "tuned" / UNET)
    out = tmp_path / "out"
    options = ["--base", models["base"], "--tuned", tmp_path / "tuned", "--into", models["into"], "-o", out]
    monkeypatch.setattr("sys.argv", ["instaflow", "merge", *map(str, options)])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and name in error and "different architectures" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]


def test_what_fp16_does_not_hold_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="beyond fp16"):
        merge(models["base"], models["tuned"], models["into"], tmp_path / "out", scale=1e7)
    assert not list(tmp_path.iterdir())
