"""LoRA: the published scale at run time against stock diffusers, and what does not fit is refused."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_checkpoints import published, tiny_pipeline
from torch import nn

from instaflow import InstaFlow
from instaflow.cli import main
from instaflow.errors import BundleError, PromptError
from instaflow.models.bundle import Bundle
from instaflow.models.lora import (
    drop_lora,
    fuse_lora,
    load_lora,
    load_loras,
    save_lora,
    set_lora_scales,
    unfuse_lora,
)
from instaflow.models.request import LoRA
from instaflow.models.sampling import noise, sample
from instaflow.training.personalise import add_lora

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


def test_several_at_once_are_those_of_stock_diffusers(folder: Path, lora: Path, tmp_path: Path) -> None:
    """The second is the first's negative, at another scale."""
    second = tmp_path / "second.safetensors"
    save_file({k: -v if "lora_B" in k else v for k, v in load_file(lora).items()}, second)
    ours, plain = Bundle.load(folder), Bundle.load(folder)
    load_loras(ours, [LoRA.read(f"{lora}=0.8"), LoRA.read(second)])
    load_loras(plain, [LoRA.read(f"{second}=0.2")])
    a, b = (sample(bundle, [PROMPT], seeds=[3], steps=1) for bundle in (ours, plain))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    theirs = tiny_pipeline()
    theirs.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="a")
    theirs.load_lora_weights(tmp_path, weight_name=second.name, adapter_name="b")
    theirs.set_adapters(["a", "b"], [0.8, 1.0])
    with torch.no_grad():
        states = theirs.encode_prompt(PROMPT, "cpu", 1, False)[0]
        x0 = noise([3], (4, 64, 64))
        wanted = x0 + theirs.unet(x0, torch.tensor([1000.0]), states).sample
    torch.testing.assert_close(a, wanted, rtol=0, atol=1e-4)


def test_fused_is_unfused_and_taken_back_is_never_fused(folder: Path, lora: Path) -> None:
    bundle = Bundle.load(folder)

    def weights() -> dict[str, torch.Tensor]:
        networks = (bundle.unet, bundle.text_encoder)
        return {f"{i}.{k}": v.clone() for i, n in enumerate(networks) for k, v in n.state_dict().items()}

    load_loras(bundle, [LoRA(str(lora), 0.7)])
    before, drawn = weights(), sample(bundle, [PROMPT], seeds=[3], steps=1)
    kept = fuse_lora(bundle)
    fused = weights()
    assert any(not torch.equal(before[k], fused[k]) for k in before)
    torch.testing.assert_close(sample(bundle, [PROMPT], seeds=[3], steps=1), drawn, rtol=0, atol=1e-4)
    unfuse_lora(bundle, kept)
    after = weights()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(sample(bundle, [PROMPT], seeds=[3], steps=1), drawn)


def test_kohya_files_with_convolutions_and_without_alpha(folder: Path, tmp_path: Path) -> None:
    """W + s·(α/r)·up·down by hand, on every kind of layer; α is the rank where none is said."""
    bundle = Bundle.load(folder)
    unet, text = dict(bundle.unet.named_modules()), dict(bundle.text_encoder.named_modules())
    kinds = ("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj", "sampler")
    named = [n for n, m in unet.items() if isinstance(m, nn.Linear | nn.Conv2d) and any(k in n for k in kinds)]
    named += [n for n in unet if "conv_shortcut" in n]
    chosen = [("unet", n, unet[n]) for n in named]
    chosen += [("te", n, m) for n, m in text.items() if n.endswith(("q_proj", "fc1"))]
    state, wanted = {}, {}
    generator = torch.Generator().manual_seed(0)
    for i, (part, name, module) in enumerate(chosen):
        w = module.weight
        down = torch.randn(2, *w.shape[1:], generator=generator)
        up = torch.randn(w.shape[0], 2, *[1] * (w.dim() - 2), generator=generator)
        key = f"lora_{part}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if i % 2:
            state[f"{key}.alpha"] = torch.tensor(1.0)
        delta = (up.flatten(1) @ down.flatten(1)).view_as(w) * (0.5 if i % 2 else 1.0)
        wanted[part, name] = w.detach() + 0.3 * delta
    path = tmp_path / "kohya.safetensors"
    save_file(state, path)
    load_loras(bundle, [LoRA(str(path), 0.3)])
    fuse_lora(bundle)
    drop_lora(bundle)
    unet, text = dict(bundle.unet.named_modules()), dict(bundle.text_encoder.named_modules())
    assert len(wanted) > 20 and any(w.dim() == 4 and w.shape[-1] == 3 for w in wanted.values())
    for (part, name), weight in wanted.items():
        torch.testing.assert_close((unet if part == "unet" else text)[name].weight, weight, rtol=0, atol=1e-4)


def test_a_lora_of_other_widths_is_refused_with_its_key(lora: Path, folder: Path, tmp_path: Path) -> None:
    """As one of Stable Diffusion 2, whose text states are wider, on Stable Diffusion 1."""
    wide = {k: torch.zeros(4, 99) if "attn2.to_k.lora_A" in k else v for k, v in load_file(lora).items()}
    first = next(k for k in wide if "attn2.to_k.lora_A" in k)
    save_file(wide, tmp_path / "wide.safetensors")
    bundle = Bundle.load(folder)
    with pytest.raises(BundleError, match=rf"another network: {re.escape(first)} has \(4, 99\)"):
        load_lora(bundle, tmp_path / "wide.safetensors")
    assert not any("lora" in k for k in bundle.unet.state_dict())


@pytest.mark.parametrize(("text", "wanted"), [("a=b.safetensors", ("a=b.safetensors", 1.0)), ("x/y=0.5", ("x/y", 0.5))])
def test_a_scale_stands_behind_its_file(text: str, wanted: tuple[str, float]) -> None:
    assert LoRA.read(text) == wanted
    with pytest.raises(PromptError, match=r"a=nan is not allowed; use FILE or FILE=SCALE"):
        LoRA.read("a=nan")


def test_the_cpu_engine_has_it_fused(one_step: Bundle, tmp_path: Path) -> None:
    add_lora(own := replace(one_step, unet=copy.deepcopy(one_step.unet)), rank=2, seed=0)
    for name, p in own.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    file, model = save_lora(own, tmp_path / "my.safetensors"), one_step.save(tmp_path / "model")
    drawn = {
        name: np.asarray(InstaFlow.load(model, lora=f"{file}=0.5", engine=name).generate(PROMPT).image, float)
        for name in ("openvino", "torch")
    }
    plain = np.asarray(InstaFlow.load(model, engine="torch").generate(PROMPT).image, float)
    apart = {name: np.abs(a - drawn["torch"]).mean() for name, a in (("openvino", drawn["openvino"]), ("plain", plain))}
    assert apart["openvino"] < 3 < apart["plain"]
    with pytest.raises(PromptError, match="has its LoRAs fused"):
        InstaFlow.load(model, lora=file, engine="openvino").generate(PROMPT, lora_scale=0.5)


def main_with(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        main()
