"""LoRA: the published scale at run time against stock diffusers, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from test_checkpoints import published, tiny_pipeline

from instaflow import InstaFlow
from instaflow.cli import main
from instaflow.errors import BundleError, PromptError
from instaflow.models.bundle import Bundle
from instaflow.models.lora import load_lora, set_lora_scales
from instaflow.models.sampling import noise, sample

PROMPT = "a cat"


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sd") / "tiny"
    stock.save_pretrained(out)
    return published(out, tmp_path_factory.mktemp("insta") / "mine", "InstaFlow-0.9B fine-tuned from 2-Rectified Flow")


@pytest.fixture(scope="module")
def lora(stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers' own training scripts write one: rank 4 on the attention of the U-Net and the text encoder."""
    torch.manual_seed(1)
    pipe = tiny_pipeline()
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}
    states = {}
    for part, names in targets.items():
        network = getattr(pipe, part)
        network.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False))
        states[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
    out = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(out, **states, safe_serialization=True)
    return out / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_scale_at_run_time_is_that_of_stock_diffusers(folder: Path, lora: Path, scale: float) -> None:
    ours = Bundle.load(folder)
    load_lora(ours, lora)
    set_lora_scales(ours, [scale])
    theirs = tiny_pipeline()
    theirs.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="a")
    theirs.set_adapters("a", scale)
    with torch.no_grad():
        states = theirs.encode_prompt(PROMPT, "cpu", 1, False)[0]
        x0 = noise([3], (4, 64, 64))
        wanted = x0 + theirs.unet(x0, torch.tensor([1000.0]), states).sample
    out = sample(ours, [PROMPT], seeds=[3], steps=1)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    plain = sample(Bundle.load(folder), [PROMPT], seeds=[3], steps=1)
    assert torch.equal(out, plain) == (scale == 0.0)


def test_each_picture_has_its_own_scale(folder: Path, lora: Path, tmp_path: Path) -> None:
    flow, plain = InstaFlow.load(folder, lora=lora), InstaFlow.load(folder, engine="torch")
    drawn = {s: flow.generate(PROMPT, seed=3, size=64, lora_scale=s) for s in (1.0, 0.0, 0.5)}
    pixels = {s: d.image.tobytes() for s, d in drawn.items()}
    assert len(set(pixels.values())) == 3 and pixels[0.0] == plain.generate(PROMPT, seed=3, size=64).image.tobytes()
    assert flow.generate(PROMPT, seed=3, size=64, lora_scale=1.0).image.tobytes() == pixels[1.0]
    assert drawn[0.5].lora == "pytorch_lora_weights at 0.5" and plain.generate(PROMPT, size=64).lora == ""


def test_a_scale_without_a_lora_is_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match=r"lora_scale=0\.5 is for a LoRA, and 'InstaFlow' was loaded without one"):
        InstaFlow.load(folder, engine="torch").generate(PROMPT, lora_scale=0.5)


def test_a_lora_of_another_network_or_none_is_refused(
    lora: Path, folder: Path, tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.save(tmp_path / "other")
    with pytest.raises(BundleError, match="it is for another network: this one has no ") as caught:
        load_lora(Bundle.load(other), lora)
    assert str(lora) in str(caught.value) and "\n" not in str(caught.value)
    for name in ("unet/diffusion_pytorch_model.safetensors", "README.md", "nothing.safetensors"):
        with pytest.raises(BundleError, match=r"holds no LoRA|no LoRA file|Invalid LoRA") as caught:
            load_lora(Bundle.load(folder), folder / name)
        assert "\n" not in str(caught.value)
    run = ["instaflow", "generate", "a cat", "--model", str(folder), "--lora", "nowhere.safetensors"]
    with pytest.raises(SystemExit) as left:
        main_with(run)
    assert left.value.code == 2 and "no LoRA file nowhere.safetensors" in capsys.readouterr().err


def main_with(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        main()
