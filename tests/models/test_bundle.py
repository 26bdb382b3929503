"""Bundles on disk: whole, half-written and damaged; and what a loaded model refuses and draws."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from instaflow.errors import BundleError, PromptError
from instaflow.flow import guided
from instaflow.generate import LARGEST_SEED, InstaFlow
from instaflow.models import bundle as bundle_module
from instaflow.models.bundle import PARTS, Bundle
from instaflow.models.card import CARD, bundle_hash, read_card, write_card
from instaflow.models.networks import decode_latents, encode_pictures
from instaflow.models.sampling import noise, sample
from instaflow.runtime.pytorch import TorchEngine

NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def saved(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("saved") / "bundle")


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def weights_file(folder: Path, part: str) -> Path:
    [file] = (folder / part).glob("*.safetensors")
    return file


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        Bundle.load(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


# -- round trips -------------------------------------------------------------------------------


def test_a_bundle_comes_back_rounded_to_half_and_nothing_else(tiny: Bundle, saved: Path) -> None:
    back = Bundle.load(saved)
    assert back.card == tiny.card
    assert back.tokenizer("a red apple").input_ids == tiny.tokenizer("a red apple").input_ids
    assert back.prompt_tokens == tiny.prompt_tokens == 16
    assert torch.equal(back.scheduler.alphas_cumprod, tiny.scheduler.alphas_cumprod)
    for part in NETWORKS:
        before, after = getattr(tiny, part).state_dict(), getattr(back, part).state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            expected = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(after[name], expected), name
        assert not getattr(back, part).training
        assert not any(p.requires_grad for p in getattr(back, part).parameters())


def test_saving_at_half_leaves_the_bundle_itself_in_single_precision(tiny: Bundle, saved: Path) -> None:
    assert {p.dtype for part in NETWORKS for p in getattr(tiny, part).parameters()} == {torch.float32}


def test_saving_in_full_loses_nothing_and_draws_the_same(tiny: Bundle, tmp_path: Path) -> None:
    back = Bundle.load(tiny.save(tmp_path / "full", dtype=torch.float32))
    drawn = [sample(b, ["a red apple"], seeds=[3], steps=2, guidance=2.0) for b in (tiny, back)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)


def test_saving_twice_gives_the_same_weights_and_saving_again_replaces(
    tiny: Bundle, saved: Path, damaged: Path
) -> None:
    weights_file(damaged, "unet").unlink()
    tiny.with_card(name="new").save(damaged)
    assert read_card(damaged).name == "new"
    assert bundle_hash(damaged) == bundle_hash(saved)
    assert [p.name for p in damaged.parent.iterdir()] == ["bundle"]


def test_the_hash_sees_every_weight(saved: Path, damaged: Path) -> None:
    for part in NETWORKS:
        before, file = bundle_hash(damaged), weights_file(damaged, part)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert bundle_hash(damaged) != before


# -- half-written ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing of ours may catch it."""


@pytest.mark.parametrize("written", range(len(NETWORKS)))
def test_a_kill_while_writing_leaves_no_bundle(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    real, count = bundle_module.save_network, iter(range(10))

    def save_network(*args: object, **options: object) -> None:
        if next(count) == written:
            raise Killed
        real(*args, **options)

    monkeypatch.setattr(bundle_module, "save_network", save_network)
    with pytest.raises(Killed):
        tiny.save(tmp_path / "bundle")
    assert "no such bundle folder" in refusal(tmp_path / "bundle")
    refusal(tmp_path / "bundle.tmp")


def test_a_kill_before_the_rename_keeps_the_old_bundle(
    tiny: Bundle, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(part: Path, folder: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "publish", publish)
        with pytest.raises(Killed):
            tiny.with_card(name="new").save(damaged)
    assert Bundle.load(damaged).card.name == "tiny"
    tiny.with_card(name="newer").save(damaged)  # what the kill left behind is in nobody's way
    assert read_card(damaged).name == "newer"
    assert [p.name for p in damaged.parent.iterdir()] == ["bundle"]


# -- damaged -----------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_no_bundle(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    assert CARD in refusal(tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(damaged: Path, part: str) -> None:
    shutil.rmtree(damaged / part)
    assert f"no {part}/" in refusal(damaged)


@pytest.mark.parametrize(
    "file",
    [
        "instaflow.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_truncated_or_missing_file_is_one_line_that_names_its_place(damaged: Path, file: str, damage: str) -> None:
    path = damaged / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    place = damaged if file == CARD else path.parent
    assert str(place) in refusal(damaged)


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("damage", ["lacks", "has unknown"])
def test_weights_that_are_not_exactly_the_networks_are_refused(damaged: Path, part: str, damage: str) -> None:
    # The libraries fill missing weights with random numbers and a warning.
    file = weights_file(damaged, part)
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if damage == "lacks":
        del tensors[name]
    else:
        name = "nobody.weight"
        tensors[name] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    text = refusal(damaged)
    assert str(damaged / part) in text and damage in text and name in text


@pytest.mark.parametrize("part", NETWORKS)
def test_weights_of_another_shape_are_refused(damaged: Path, part: str) -> None:
    file = weights_file(damaged, part)
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].flatten()[:3].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert str(damaged / part) in refusal(damaged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"kind": "two-step"}, "two-step"),
        ({"image_size": "large"}, "image_size"),
        ({"prediction": None}, "prediction"),
    ],
)
def test_a_card_that_makes_no_sense_names_the_field_and_the_file(damaged: Path, change: dict, said: str) -> None:
    path = damaged / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    text = refusal(damaged)
    assert str(path) in text and said in text


def test_a_card_survives_its_file(tiny: Bundle) -> None:
    card = msgspec.structs.replace(tiny.card, lineage={"parents": ["a", {"b": 1.5}]}, results={"fd": 3.25})
    assert msgspec.json.decode(msgspec.json.encode(card), type=type(card)) == card


# -- refusals ----------------------------------------------------------------------------------


def refused(model: Bundle, prompt: str = "a red apple", **options: object) -> str:
    with pytest.raises(PromptError) as error:
        InstaFlow(TorchEngine(model)).generate(prompt, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_refused(tiny: Bundle, prompt: str) -> None:
    assert "empty" in refused(tiny, prompt)


def test_a_long_prompt_is_told_its_length_the_limit_and_where_it_would_stop(tiny: Bundle) -> None:
    words = "red blue green black white dark light big small old new long short high low end".split()  # noqa: SIM905
    longest = " ".join(words[:14])  # start and end take two of sixteen
    tiny.check_prompt(longest)
    text = refused(tiny, " ".join(words))
    assert (
        "18 tokens" in text and "reads 16" in text and text.partition("after '…")[2].startswith(longest[-30:].lstrip())
    )


def test_a_long_prompt_of_several_lines_is_still_one_line(tiny: Bundle) -> None:
    assert "tokens" in refused(tiny, "red\n" * 40)


def test_a_style_that_makes_the_prompt_too_long_is_refused(tiny: Bundle) -> None:
    prompt = " ".join(["red"] * 14)
    tiny.check_prompt(prompt)
    assert "tokens" in refused(tiny, prompt, style="noto")


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_a_seed_out_of_range_is_told_the_range(tiny: Bundle, seed: int) -> None:
    text = refused(tiny, seed=seed)
    assert f"seed={seed}" in text and str(LARGEST_SEED) in text


def test_the_largest_seed_is_allowed(one_step: Bundle) -> None:
    assert InstaFlow(TorchEngine(one_step)).generate("red", seed=LARGEST_SEED).seed == LARGEST_SEED


def test_an_unknown_style_lists_the_known_ones(tiny: Bundle) -> None:
    text = refused(tiny, style="oil")
    assert "'oil'" in text and "noto, fluent" in text


@pytest.mark.parametrize("size", [-32, 0, 8, 24, 33, 144])
def test_a_size_that_does_not_fit_is_told_the_multiple_and_the_range(tiny: Bundle, size: int) -> None:
    text = refused(tiny, size=size)
    assert f"size={size}" in text and "multiple of 16 from 16 to 128" in text and "best 32" in text


@pytest.mark.parametrize("size", [48, 64])
def test_a_size_that_fits_is_drawn(one_step: Bundle, size: int) -> None:
    assert InstaFlow(TorchEngine(one_step)).generate("red", size=size).image.size == (size, size)


@pytest.mark.parametrize("steps", [-1, 0, 2, 25])
def test_a_one_step_model_takes_one_step_and_says_so(one_step: Bundle, steps: int) -> None:
    text = refused(one_step, steps=steps)
    assert f"steps={steps}" in text and "one-step" in text and "allowed: 1" in text


@pytest.mark.parametrize("guidance", [0.5, 1.5, 7.0, float("nan")])
def test_a_one_step_model_takes_no_guidance_and_says_so(one_step: Bundle, guidance: float) -> None:
    text = refused(one_step, guidance=guidance)
    assert f"guidance={guidance:g}" in text and text.endswith("allowed: 1")


def test_a_rectified_model_takes_a_little_guidance(tiny: Bundle) -> None:
    model = tiny.with_card(kind="rectified", max_guidance=2.0)
    assert "allowed: 1 to 2" in refused(model, guidance=2.5)
    assert "allowed: 1 to 1000" in refused(model, steps=0)


def test_everything_is_checked_before_anything_is_drawn(one_step: Bundle) -> None:
    with pytest.raises(PromptError):
        InstaFlow(TorchEngine(one_step)).generate_many(
            ["red", ""], seeds=[0, 1]
        )  # not even asked for its first picture


# -- drawing -----------------------------------------------------------------------------------


def test_a_one_step_model_asks_its_network_once_a_picture(one_step: Bundle) -> None:
    asked: list[tuple[int, float]] = []
    hook = one_step.unet.register_forward_hook(lambda _m, args, _out: asked.append((len(args[0]), float(args[1]))))
    try:
        drawings = list(InstaFlow(TorchEngine(one_step)).generate_many(["red", "blue", "green"], seeds=[1, 2, 3]))
    finally:
        hook.remove()
    assert asked == [(1, 1000.0)] * 3
    assert [d.prompt for d in drawings] == ["red", "blue", "green"]


def test_one_step_is_noise_plus_velocity_decoded(one_step: Bundle) -> None:
    drawing = InstaFlow(TorchEngine(one_step)).generate("a red apple", seed=7, style="noto")
    x0 = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(7))[None]
    tokens = one_step.tokenizer(["a red apple, noto"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        states = one_step.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        x1 = x0 + one_step.unet(x0, torch.tensor([1000.0]), states).sample
        pixels = one_step.vae.decode(x1 / one_step.vae.config.scaling_factor).sample[0]
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(drawing.image).astype(int) - expected.astype(int)).max() <= 1
    assert drawing.prompt == "a red apple, noto"


@pytest.mark.parametrize("kind", ["teacher", "one-step"])
def test_a_picture_is_the_same_alone_and_among_others(tiny: Bundle, one_step: Bundle, kind: str) -> None:
    model = InstaFlow(TorchEngine(tiny if kind == "teacher" else one_step))
    alone = model.generate("a red apple", seed=7)
    torch.manual_seed(99)  # the global generator is nobody's business
    prompts, seeds = ["blue", "a red apple", "a red apple"], [7, 8, 7]
    others = list(model.generate_many(prompts, seeds=seeds))
    assert others[2].image.tobytes() == alone.image.tobytes()
    assert len({d.image.tobytes() for d in (*others, alone)}) == 3  # another prompt or seed is another picture


def test_noise_depends_on_its_own_seed_alone() -> None:
    together = noise([5, 6, 5], (4, 4, 4))
    assert torch.equal(together[:1], noise([5], (4, 4, 4))) and torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    # The seeds on disk mean these numbers: a new generator is a new version of pairs.
    assert together.dtype == torch.float32
    first = torch.tensor([-1.1258398294448853, -1.152360200881958, -0.2505785822868347])
    assert torch.equal(noise([0], (4, 4, 4)).flatten()[:3], first)


def test_a_drawing_carries_how_it_was_made(one_step: Bundle, tmp_path: Path) -> None:
    path = InstaFlow(TorchEngine(one_step)).generate("a red apple", seed=7).save(tmp_path / "deep" / "apple.png")
    with Image.open(path) as image:
        assert image.size == (32, 32)
        assert image.text["prompt"] == "a red apple" and image.text["seed"] == "7"
        assert image.text["model"] == "tiny-one-step" and image.text["steps"] == "1"
    assert [p.name for p in path.parent.iterdir()] == ["apple.png"]


def test_guidance_is_the_formula_on_the_networks_fields(tiny: Bundle, own: Callable[..., Bundle]) -> None:
    model = own(kind="rectified", prediction="velocity")
    states, x0 = model.encode(["a red apple"]), noise([0], model.latent_shape())
    t = torch.tensor([0.3])
    with torch.no_grad():
        cond, empty = (model.unet(x0, torch.tensor([700.0]), s).sample for s in (states, model.encode([""])))
        v = model.velocity(states, guidance=1.7)(x0, t)
    torch.testing.assert_close(v, empty + 1.7 * (cond - empty), rtol=1e-5, atol=1e-6)
    assert torch.equal(guided(lambda z, t: cond, lambda z, t: empty, 1.0)(x0, t), cond)


def test_latents_are_scaled_both_ways(own: Callable[..., Bundle]) -> None:
    vae = copy.deepcopy(own().vae)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain, decoded = encode_pictures(vae, pictures), decode_latents(vae, torch.ones(1, 4, 4, 4))
        vae.register_to_config(scaling_factor=2.0)
        torch.testing.assert_close(encode_pictures(vae, pictures), 2 * plain)
        torch.testing.assert_close(decode_latents(vae, torch.full((1, 4, 4, 4), 2.0)), decoded)
    assert plain.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_flipped_bit_in_the_weights_is_found(one_step: Bundle, tmp_path: Path, part: str) -> None:
    folder = one_step.save(tmp_path / "bundle")
    [file] = (folder / part).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"are not those that its instaflow\.json names"):
        Bundle.load(folder)
    card = read_card(folder)
    write_card(folder, msgspec.structs.replace(card, weights=""))  # whoever changed them says so
    assert Bundle.load(folder).card == one_step.card


@pytest.mark.parametrize("prompt", ["🍎", "🐸 🐸", "caf\udce9"])
def test_a_prompt_without_one_known_sign_is_refused(tiny: Bundle, prompt: str) -> None:
    with pytest.raises(PromptError, match=r"knows no sign of|no text in UTF-8"):
        tiny.check_prompt(prompt)
    tiny.check_prompt("a red apple 🍎")
