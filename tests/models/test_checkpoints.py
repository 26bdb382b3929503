"""Stable Diffusion's checkpoints in and out: folders, hub ids, single files; against stock diffusers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
)

from instaflow.errors import BundleError, PromptError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import read_card, recognise
from instaflow.models.hub import locate
from instaflow.models.ldm import clip_tokenizer
from instaflow.models.sampling import noise, sample
from instaflow.noise import noise as seeded
from instaflow.runtime.engine import Engine
from instaflow.runtime.loading import exported, load_engine
from instaflow.runtime.openvino import PARTS, OpenVINOEngine, load_openvino

VOCABULARY = 1000
KINDS = ("Convolution", "MatMul")


def tiny_pipeline(side: int = 512) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x with few channels, random weights, for pictures of `side` pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side // 8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=side,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
        )
    )
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
    )
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=clip_tokenizer(VOCABULARY),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers writes it."""
    out = tmp_path_factory.mktemp("hub") / "sd-tiny"
    stock.save_pretrained(out, safe_serialization=True)
    return out


def published(folder: Path, out: Path, readme: str) -> Path:
    """A folder as the authors published theirs: the same layout under their pipeline's name."""
    shutil.copytree(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "_class_name": "RectifiedFlowPipeline"}))
    (out / "README.md").write_text(f"---\nlicense: cc-by-nc-4.0\n---\n\n# {readme}\n\nText.\n")
    return out


@pytest.fixture(scope="module")
def one_step_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heading = "InstaFlow-0.9B fine-tuned from 2-Rectified Flow"
    return published(folder, tmp_path_factory.mktemp("insta") / "mine", heading)


@pytest.fixture(scope="module")
def rectified_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heading = "InstaFlow: 2-Rectified Flow fine-tuned from Stable Diffusion v1.5"
    return published(folder, tmp_path_factory.mktemp("two") / "mine", heading)


# -- CLIP's tokenizer and text encoder ----------------------------------------------------------------


def test_the_tokenizer_is_clips() -> None:
    # ids of openai/clip-vit-large-patch14, as its users know them: 'a photo of a cat' is in CLIP's own README
    ids = clip_tokenizer()("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer()("Hello, WORLD!").input_ids == clip_tokenizer()("hello , world !").input_ids
    assert clip_tokenizer()("hello world").input_ids == [49406, 3306, 1002, 49407]


def test_prompts_are_encoded_as_stable_diffusion_does(stock: StableDiffusionPipeline, folder: Path) -> None:
    bundle = Bundle.load(folder)
    wanted, empty = stock.encode_prompt("a red apple on a table", "cpu", 1, True)
    torch.testing.assert_close(bundle.encode(["a red apple on a table", ""]), torch.cat([wanted, empty]))
    assert bundle.prompt_tokens == 77


# -- folders ------------------------------------------------------------------------------------------


def test_a_stable_diffusion_folder_is_a_teacher(folder: Path) -> None:
    card = read_card(folder)
    assert (card.kind, card.prediction, card.image_size, card.steps) == ("teacher", "epsilon", 512, 25)
    assert card.max_guidance > 7.5


def test_published_folders_are_recognised_by_themselves(one_step_folder: Path, rectified_folder: Path) -> None:
    one, two = read_card(one_step_folder), read_card(rectified_folder)
    assert (one.kind, one.prediction, one.steps, one.guidance, one.max_guidance) == ("one-step", "velocity", 1, 1, 1)
    assert (two.kind, two.prediction, two.guidance, two.max_guidance) == ("rectified", "velocity", 1.5, 2)
    assert one.licence == two.licence == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("models--XCLiu--instaflow_0_9B_from_sd_1_5", "one-step"),
        ("models--XCLiu--2_rectified_flow_from_sd_1_5", "rectified"),
        ("models--someone--else", "rectified"),
    ],
)
def test_published_snapshots_are_recognised_by_their_id(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    out = published(folder, tmp_path / name / "snapshots" / "0a1b", "A model")
    assert recognise(out).kind == kind


def test_another_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "xl"
    shutil.copytree(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(BundleError, match="is a StableDiffusionXLPipeline; allowed: RectifiedFlowPipeline"):
        Bundle.load(out)


def test_what_we_write_stock_diffusers_draws_alike(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(folder)
    written = bundle.save(tmp_path / "ours", dtype=torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(written)
    pipe.set_progress_bar_config(disable=True)
    assert next(iter(load_file(written / "text_encoder" / "model.safetensors"))).startswith("text_model.")
    again = Bundle.load(written)
    assert again.card == bundle.card
    for part in ("unet", "vae", "text_encoder"):
        for (k, a), (_, b) in zip(
            getattr(bundle, part).state_dict().items(), getattr(again, part).state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), k
    x0 = noise([3], bundle.latent_shape(64))
    ours = sample(bundle, ["a cat"], seeds=[3], steps=3, guidance=2.0, size=64)
    pipe.scheduler = stock_solver(bundle)
    theirs = pipe(
        "a cat",
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=x0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_a_scheduler_leaves_unsaid_stays_the_same_through_a_save(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    path = old / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in ("timestep_spacing", "clip_sample")}))
    first = Bundle.load(old)
    again = Bundle.load(first.save(tmp_path / "new", dtype=torch.float32))
    for bundle in (first, again):  # a DPM-Solver made of such a config spaces its steps so, and never clips
        assert bundle.scheduler.config["timestep_spacing"] == "linspace" and not bundle.scheduler.config["clip_sample"]
    assert Bundle.load(folder).scheduler.config["timestep_spacing"] == said["timestep_spacing"]


def stock_solver(bundle: Bundle) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(bundle.scheduler.config, final_sigmas_type="zero")


# -- Euler on the published kinds, derived a second time ------------------------------------------------


@torch.inference_mode()
def published_euler(
    pipe: StableDiffusionPipeline, prompt: str, negative: str, x0: Tensor, steps: int, guidance: float
) -> Tensor:
    """What the authors' pipeline computes, written from its description: z += v(z, 1000·(1 − i/N))/N."""
    states, away = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    z = x0
    for i in range(steps):
        tau = torch.full((len(z),), 1000.0 * (1 - i / steps))
        v = pipe.unet(z, tau, encoder_hidden_states=states).sample
        if guidance > 1:
            v_away = pipe.unet(z, tau, encoder_hidden_states=away).sample
            v = v_away + guidance * (v - v_away)
        z = z + v / steps
    return z


@pytest.mark.parametrize(
    ("steps", "guidance", "negative"), [(1, 1.0, ""), (4, 1.0, ""), (4, 1.5, ""), (3, 2.0, "painting, unreal")]
)
def test_published_kinds_draw_as_published(
    stock: StableDiffusionPipeline,
    one_step_folder: Path,
    rectified_folder: Path,
    steps: int,
    guidance: float,
    negative: str,
) -> None:
    bundle = Bundle.load(one_step_folder if steps == 1 else rectified_folder)
    ours = sample(bundle, ["a cat"], seeds=[7], steps=steps, guidance=guidance, size=128, negative=negative)
    theirs = published_euler(stock, "a cat", negative, noise([7], (4, 16, 16)), steps, guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_batch_under_guidance_is_its_pictures(rectified_folder: Path) -> None:
    bundle = Bundle.load(rectified_folder)
    ask: Any = {"steps": 2, "guidance": 1.5, "size": 64, "negative": "grey"}
    both = sample(bundle, ["a cat", "a dog"], seeds=[1, 2], **ask)
    alone = [sample(bundle, [p], seeds=[s], **ask) for p, s in (("a cat", 1), ("a dog", 2))]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-4)


def test_what_a_kind_cannot_do_says_what_it_can(one_step_folder: Path, rectified_folder: Path) -> None:
    one, two = InstaFlow.load(one_step_folder), InstaFlow.load(rectified_folder)
    for flow, asked, said in (
        (one, {"steps": 4}, "allowed: 1"),
        (one, {"guidance": 0.0}, "allowed: 1"),
        (one, {"negative": "grey"}, "this model has it baked in"),
        (two, {"guidance": 7.5}, "allowed: 1 to 2"),
        (two, {"guidance": 1.0, "negative": "grey"}, "allowed: up to 2"),
    ):
        with pytest.raises(PromptError, match=re.escape(said)):
            flow.generate("a cat", size=64, **asked)
    drawing = two.generate("a cat", size=64, steps=2, negative="grey")
    assert drawing.guidance == 1.5 and drawing.negative == "grey"


# -- prepared for the CPU engine ----------------------------------------------------------------------


def bf16_is_computed_with() -> bool:
    return "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_what_is_prepared_draws_as_torch_does_and_runs_elsewhere(one_step_folder: Path, weights: str) -> None:
    kept, eager = exported(one_step_folder, precision=weights), load_engine(one_step_folder, engine="torch")
    engine = OpenVINOEngine(kept, precision="f32")
    session = onnxruntime.InferenceSession(kept / "text_encoder" / "model.onnx")
    for prompts in (["a red apple"], ["a red apple", "a cat", "the sun"]):
        said = dict(zip(("input_ids", "attention_mask"), engine.tokens(prompts), strict=True))
        [states] = session.run(None, {i.name: said[i.name] for i in session.get_inputs()})
        assert np.abs(states - eager.encode(prompts).numpy()).max() <= (5e-3 if weights == "f32" else 0.1)
    fast = OpenVINOEngine(kept)
    for other, least in ((engine, 60 if weights == "f32" else 40), (fast, 40)):
        ours, theirs = (draw_pixels(e) for e in (other, eager))
        assert 10 * np.log10(4 / np.square(ours - theirs).mean()) >= least


def draw_pixels(engine: Engine) -> np.ndarray:
    x0 = seeded([1], engine.latent_shape(128))
    latents = engine.sample(x0, engine.encode(["a cat"]), steps=1, guidance=1.0, negative="")
    return np.asarray(engine.decode(latents))


def test_bf16_weights_are_not_widened_and_leave_memory_once_they_are_packed(one_step_folder: Path) -> None:
    if not bf16_is_computed_with():
        pytest.skip("this processor does not compute with bf16")
    engine = OpenVINOEngine(exported(one_step_folder, precision="bf16"))
    for part in PARTS:
        products = [o for o in engine.read(part, 1, 512).get_ordered_ops() if o.get_type_name() in KINDS]
        kept = [o for o in products if o.get_input_element_type(1).get_type_name() == "bf16"]
        # what has no weights: attention's two products; and the time's embedding, which is a constant of two layers
        weights = [o for o in products if o.input_value(1).get_node().get_type_name() in ("Constant", "Convert")]
        assert kept and len(weights) - len(kept) <= 2
    before = draw_pixels(engine)
    mapped = re.findall(
        rf"{engine.folder}/\w+/\S*safetensors\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+)",
        Path("/proc/self/smaps").read_text(),
    )
    size, resident = (sum(map(int, column)) for column in zip(*mapped, strict=True))
    assert resident < size / 10  # but for a table of words, say, that is read in place
    assert np.array_equal(draw_pixels(engine), before)


# -- single files ---------------------------------------------------------------------------------------


def ldm_names(unet: dict[str, Tensor], vae: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LDM file of the tiny networks, its names written down from the original code's modules.

    U-Net: input_blocks 0 conv_in | 1, 2 level 0 | 3 downsampling | 4, 5 level 1; output_blocks 0-2 level 1
    (upsampling in the last), 3-5 level 0.
    """
    out: dict[str, Tensor] = {}
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    places = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.3.0.op.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.2.1.conv.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for level in range(2):
        for i in range(2):
            places[f"down_blocks.{level}.resnets.{i}."] = f"input_blocks.{1 + 3 * level + i}.0."
            places[f"down_blocks.{level}.attentions.{i}."] = f"input_blocks.{1 + 3 * level + i}.1."
        for i in range(3):
            places[f"up_blocks.{level}.resnets.{i}."] = f"output_blocks.{3 * level + i}.0."
            places[f"up_blocks.{level}.attentions.{i}."] = f"output_blocks.{3 * level + i}.1."
    for key, value in unet.items():
        start = next(p for p in places if key.startswith(p))
        rest = key.removeprefix(start)
        if ".resnets." in key:
            part, _, kind = rest.partition(".")
            rest = f"{resnet[part]}.{kind}"
        out["model.diffusion_model." + places[start] + rest] = value
    rooms = {}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        rooms[f"{half}.conv_norm_out."] = f"{half}.norm_out."
        rooms[f"{half}.mid_block.attentions.0."] = f"{half}.mid.attn_1."
        for i in range(2):
            rooms[f"{half}.mid_block.resnets.{i}."] = f"{half}.mid.block_{i + 1}."
        for i in range(4):
            level = i if way == "down" else 3 - i
            rooms[f"{half}.{way}_blocks.{i}.resnets."] = f"{half}.{way}.{level}.block."
            rooms[f"{half}.{way}_blocks.{i}.{way}samplers.0."] = f"{half}.{way}.{level}.{way}sample."
    attention = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
    for key, value in vae.items():
        start = next((r for r in rooms if key.startswith(r)), "")
        rest = key.removeprefix(start).replace("conv_shortcut", "nin_shortcut")
        if ".attentions." in start:
            old = next(k for k in attention if rest.startswith(k))
            rest = attention[old] + rest.removeprefix(old)
        if ".attentions." in start and value.ndim == 2:
            value = value[:, :, None, None]  # 1×1 convolutions there
        out["first_stage_model." + rooms.get(start, "") + rest] = value
    for key, value in text.items():
        out["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    out["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return {key: value.contiguous() for key, value in out.items()}


@pytest.fixture(scope="module")
def single_file(stock: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = ldm_names(stock.unet.state_dict(), stock.vae.state_dict(), stock.text_encoder.state_dict())
    path = tmp_path_factory.mktemp("ldm") / "dream.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    return path


def test_a_single_file_is_the_same_model(stock: StableDiffusionPipeline, single_file: Path) -> None:
    bundle = Bundle.load(single_file)
    assert (bundle.card.name, bundle.card.kind, bundle.card.image_size) == ("dream", "teacher", 512)
    for ours, theirs in ((bundle.unet, stock.unet), (bundle.vae, stock.vae), (bundle.text_encoder, stock.text_encoder)):
        wanted = theirs.state_dict()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, wanted[key].half().float()), key
    for key in ("block_out_channels", "cross_attention_dim", "attention_head_dim", "down_block_types"):
        assert bundle.unet.config[key] == stock.unet.config[key], key
    assert torch.equal(bundle.scheduler.alphas_cumprod, stock.scheduler.alphas_cumprod)


def test_a_single_file_without_a_part_is_refused(single_file: Path, tmp_path: Path) -> None:
    state = load_file(single_file)
    lora = {k: v for k, v in state.items() if not k.startswith("first_stage_model.")}
    save_file(lora, tmp_path / "part.safetensors")
    with pytest.raises(BundleError, match=r"has no autoencoder under first_stage_model\."):
        Bundle.load(tmp_path / "part.safetensors")
    some = next(k for k in state if "middle_block.1.norm.weight" in k)
    save_file({k: v for k, v in state.items() if k != some}, tmp_path / "hole.safetensors")
    with pytest.raises(BundleError, match="is not whole"):
        Bundle.load(tmp_path / "hole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(single_file.read_bytes()[:1000])
    with pytest.raises(BundleError, match="cannot load"):
        Bundle.load(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_with_a_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(BundleError, match="is a pickle, which can run code when it is read"):
        Bundle.load(path)


# -- the hub's cache --------------------------------------------------------------------------------------


def cached(folder: Path, cache: Path, name: str) -> None:
    """The hub library's cache holding one snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / ("ab" * 20))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("ab" * 20)


def test_an_id_in_the_cache_loads_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(folder, tmp_path, "XCLiu/instaflow_0_9B_from_sd_1_5")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_card(locate("XCLiu/instaflow_0_9B_from_sd_1_5")).kind == "one-step"
    with pytest.raises(BundleError, match="no folder 'some/one' here, no model of that id in the local cache"):
        Bundle.load("some/one")


def test_what_is_neither_folder_nor_id_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        Bundle.load(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"allowed: a folder, a \.safetensors file or a hub id"):
        Bundle.load(tmp_path / "notes.txt")


# -- the safety checker and NaN -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(one_step_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with a (tiny, random) safety checker."""
    out = tmp_path_factory.mktemp("guarded") / "mine"
    shutil.copytree(one_step_folder, out)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=32
    )
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100
    )
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )
    torch.nn.init.normal_(checker.concept_embeds)
    checker.save_pretrained(out / "safety_checker")
    CLIPImageProcessorPil().save_pretrained(out / "feature_extractor")
    return out


@pytest.mark.parametrize(("threshold", "blocked"), [(-2.0, True), (2.0, False)])
def test_the_bundles_own_checker_runs_unless_it_is_turned_off(guarded: Path, threshold: float, blocked: bool) -> None:
    flow = InstaFlow.load(guarded)
    assert flow.engine.bundle.safety is not None
    # every cosine is above −2, none is above 2
    flow.engine.bundle.safety.network.concept_embeds_weights.data.fill_(threshold)
    flow.engine.bundle.safety.network.special_care_embeds_weights.data.fill_(2.0)
    drawing = flow.generate("a cat", size=64)
    assert drawing.blocked == blocked
    assert (np.asarray(drawing.image).max() == 0) == blocked
    off = InstaFlow.load(guarded, safety=False, engine="torch").generate("a cat", size=64)
    assert not off.blocked and np.asarray(off.image).max() > 0
    if not blocked:
        assert np.array_equal(np.asarray(off.image), np.asarray(drawing.image))


def test_nan_is_reported_as_nan_and_not_as_unsafe(guarded: Path) -> None:
    flow = InstaFlow.load(guarded)
    flow.engine.bundle.vae.decoder.conv_in.bias.data.fill_(float("nan"))
    with pytest.raises(PromptError, match="drew NaN for 'a cat': its autoencoder's weights, a LoRA's or the precision"):
        flow.generate("a cat", size=64)


def test_a_blocked_picture_says_so_in_its_file(guarded: Path, tmp_path: Path) -> None:
    flow = InstaFlow.load(guarded)
    assert flow.engine.bundle.safety is not None
    flow.engine.bundle.safety.network.concept_embeds_weights.data.fill_(-2.0)
    path = flow.generate("a cat", size=64).save(tmp_path / "cat.png")
    with Image.open(path) as image:
        assert image.text["blocked"] == "by the model's safety checker"  # type: ignore[attr-defined]
