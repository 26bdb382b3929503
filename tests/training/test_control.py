"""A ControlNet starts as nothing, learns alone, is resumed to the bit and refused where it does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import instaflow.training.trainer as trainer
from instaflow.data.controls import control_picture
from instaflow.data.pairs import PairReader, PairSet
from instaflow.data.pictures import Picture
from instaflow.errors import BundleError, PromptError, RecipeError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import ControlCard, read_control_card
from instaflow.models.control import build_control, controlled, load_control, save_control
from instaflow.models.networks import encode_pictures, to_tensor
from instaflow.models.request import Control, read_image
from instaflow.models.sampling import integrate, noise
from instaflow.recipe import Control as Spec
from instaflow.recipe import Data, Pairs, Recipe, Train
from instaflow.runtime.pytorch import TorchEngine
from instaflow.training.control import Source, control_stage, from_pairs, from_pictures
from instaflow.training.pairs import draw_pairs
from instaflow.training.run import Run
from instaflow.training.trainer import Draw, train

SPEC = Spec(
    name="edges", model="m",
    train=Train(steps=6, batch_size=4, lr=1e-2, lr_warmup_steps=1, precision="no", ema=0.5),
)  # fmt: skip


def picture(i: int, size: int = 32) -> Picture:
    """A dark square somewhere on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[4 + i : 20 + i, 6:22] = (200, 20 * i, 0)
    return Picture.from_image(Image.fromarray(pixels), name=f"square {i}")


@pytest.fixture
def pictures() -> list[Picture]:
    return [picture(i) for i in range(6)]


def source(bundle: Bundle, pictures: list[Picture]) -> Source:
    with torch.no_grad():
        latents = encode_pictures(bundle.vae, to_tensor(np.stack([p.pixels(32) for p in pictures])))
    return from_pictures(pictures, latents, 32)


def drawn_pairs(bundle: Bundle, count: int = 6) -> PairSet:
    x1 = 0.3 * torch.randn(count, *bundle.latent_shape(), generator=torch.Generator().manual_seed(1))
    return PairSet(prompts=[f"square {i}" for i in range(count)], seeds=list(range(9, 9 + count)), x1=x1.half())


def trained(bundle: Bundle, seed: int = 3) -> object:
    """A control whose convolutions are no longer zero."""
    control = build_control(bundle)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in control.parameters():
            weights += 0.1 * torch.randn(weights.shape, generator=generator)
    return control.eval().requires_grad_(False)


def draw(bundle: Bundle, *controls: Control, steps: int = 1, guidance: float = 1.0, rows: int = 2) -> torch.Tensor:
    x0, states = noise(range(rows), bundle.latent_shape()), bundle.encode(["red apple"] * rows)
    return integrate(controlled(bundle, controls), x0, states, steps=steps, guidance=guidance, negative="")


def test_an_untrained_one_changes_no_bit(one_step: Bundle) -> None:
    control = Control(network=build_control(one_step).eval(), image=Image.new("RGB", (32, 32), "red"))
    assert torch.equal(draw(one_step, control), draw(one_step))


def test_scale_and_several(one_step: Bundle) -> None:
    one = Control(network=trained(one_step), image=Image.new("RGB", (32, 32), "red"))  # type: ignore[arg-type]
    other = Control(network=one.network, image=Image.new("RGB", (32, 32), "white"), scale=0.5)
    plain = draw(one_step)
    assert not torch.allclose(draw(one_step, one), plain, atol=1e-3)
    assert not torch.equal(draw(one_step, one), draw(one_step, other))
    nothing = Control(network=one.network, image=one.image, scale=0.0)
    assert torch.equal(draw(one_step, nothing), plain)
    half = Control(network=one.network, image=one.image, scale=0.5)
    assert torch.allclose(draw(one_step, half, half), draw(one_step, one), atol=1e-5)  # two halves are one
    assert torch.allclose(draw(one_step, one, other), draw(one_step, other, one), atol=1e-5)


def test_a_window_counts_where_it_is_and_each_network_is_called_once_a_step(own: object) -> None:
    bundle = own(kind="rectified", prediction="velocity", guidance=1.0)  # type: ignore[operator]
    network = trained(bundle)
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    unets: list[int] = []
    bundle.unet.register_forward_hook(lambda *_: unets.append(1))

    def counted(steps: int, **window: float) -> tuple[int, int]:
        calls.clear(), unets.clear()
        draw(bundle, Control(network=network, image=Image.new("RGB", (8, 8)), **window), steps=steps)  # type: ignore[arg-type]
        return len(calls), len(unets)

    assert counted(1) == (1, 1)
    assert counted(4) == (4, 4)  # at 0, 1/4, 2/4, 3/4 of the way
    assert counted(4, end=0.5) == (2, 4)  # as diffusers' pipeline
    assert counted(4, start=0.5) == (2, 4)


def test_a_batch_under_guidance_is_what_each_is_alone(own: object) -> None:
    bundle = own(kind="teacher")  # type: ignore[operator]
    control = Control(network=trained(bundle), image=picture_image())  # type: ignore[arg-type]
    both = draw(bundle, control, steps=3, guidance=2.0, rows=2)
    alone = draw(bundle, control, steps=3, guidance=2.0, rows=1)
    assert both.shape[0] == 2
    assert torch.allclose(both[:1], alone, atol=1e-4)


def picture_image() -> Image.Image:
    return Image.fromarray(picture(1).pixels(32))


def test_only_the_control_learns(one_step: Bundle, pictures: list[Picture], tmp_path: Path) -> None:
    bundle = Bundle(**{**vars(one_step), "unet": copy.deepcopy(one_step.unet)})
    before = {k: v.clone() for k, v in bundle.unet.state_dict().items()}
    stage = control_stage(SPEC, bundle, build_control(bundle), source(bundle, pictures))
    first = stage.loss(stage.network, stage.batch(Draw(0, 0)))
    first.backward()
    assert all(p.grad is None for p in bundle.unet.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.network.control.parameters())  # type: ignore[union-attr]
    stage.network.zero_grad()
    network = train(stage, SPEC.train, tmp_path, seed=0, name="edges")
    assert all(torch.equal(v, before[k]) for k, v in network.unet.state_dict().items())  # type: ignore[union-attr]
    assert list((tmp_path / "samples").glob("*.png"))


def test_resumed_is_unbroken(
    one_step: Bundle, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def carry_out(folder: Path) -> dict[str, torch.Tensor]:
        bundle = Bundle(**{**vars(one_step), "unet": copy.deepcopy(one_step.unet)})
        torch.manual_seed(0)
        stage = control_stage(SPEC, bundle, build_control(bundle), source(bundle, pictures))
        return train(stage, spec, folder, seed=0, name="edges").control.state_dict()  # type: ignore[union-attr]

    spec = msgspec.structs.replace(SPEC.train, checkpoint_minutes=1e-9)
    unbroken = carry_out(tmp_path / "whole")
    plain, saves = trainer.save, []

    def save_then_die(*args: object, **kwargs: object) -> None:
        plain(*args, **kwargs)  # type: ignore[arg-type]
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path / "cut")
    monkeypatch.setattr(trainer, "save", plain)
    resumed = carry_out(tmp_path / "cut")
    assert all(torch.equal(v, unbroken[k]) for k, v in resumed.items())


def test_the_loss_is_distillations_at_zero(one_step: Bundle, pictures: list[Picture]) -> None:
    stage = control_stage(SPEC, one_step, build_control(one_step), source(one_step, pictures))
    batch = stage.batch(Draw(0, 0))
    with torch.no_grad():
        out = one_step.unet(batch["x0"], torch.full((4,), 1000.0), batch["states"]).sample
        wanted = (batch["x0"] + out - batch["x1"]).square().mean()
        assert torch.equal(stage.loss(stage.network, batch), wanted)  # untrained, the control adds nothing


def test_pairs_control_their_own_pictures(one_step: Bundle) -> None:
    pairs = drawn_pairs(one_step)
    spec = msgspec.structs.replace(SPEC, empty_prompts=0.0)
    stage = control_stage(
        spec, one_step, build_control(one_step), from_pairs(PairReader([6], lambda _: pairs), one_step)
    )
    batch = stage.batch(Draw(0, 0))
    for i in range(4):
        row = next(j for j in range(6) if torch.equal(batch["x1"][i], pairs.x1[j].float()))
        assert not torch.equal(batch["x0"][i], noise([pairs.seeds[row]], one_step.latent_shape())[0])
        torch.testing.assert_close(batch["states"][i], one_step.encode([pairs.prompts[row]])[0], atol=1e-3, rtol=0)
        wanted = control_picture("edges", one_step.decode(pairs.x1[row : row + 1].float())[0])
        assert torch.equal(batch["control"][i], torch.from_numpy(wanted).permute(2, 0, 1).float() / 255)


def test_a_control_is_learnt_from_pairs_without_pictures(one_step: Bundle, tmp_path: Path) -> None:
    model, drawing = str(one_step.save(tmp_path / "model")), Pairs(name="p", model="m", count=4, steps=1, guidance=1.0)
    draw_pairs(drawing, one_step, ["a red apple"] * 4, tmp_path / "pairs", teacher="abc")
    few = msgspec.structs.replace(SPEC.train, steps=2)
    spec = msgspec.structs.replace(SPEC, model=model, pairs=str(tmp_path / "pairs"), train=few)
    run = Run(Recipe(name="r", data=Data(source="nowhere"), stages=(spec,)), tmp_path / "runs", cache=tmp_path)
    run.run(lambda *_: None)
    card = read_control_card(run.output("edges"))
    assert card and card.lineage["pairs"]["teacher"] == "abc" and card.base_hash == card.lineage["parent"]


@pytest.mark.parametrize("kind", ["edges", "inpaint"])
@pytest.mark.parametrize("of_pairs", [False, True])
def test_the_parts_of_several_processes_are_the_batch_of_one(
    one_step: Bundle, pictures: list[Picture], kind: str, of_pairs: bool
) -> None:
    pairs = drawn_pairs(one_step)
    learnt = from_pairs(PairReader([6], lambda _: pairs), one_step) if of_pairs else source(one_step, pictures)
    spec = msgspec.structs.replace(SPEC, control=kind)  # type: ignore[arg-type]
    stage = control_stage(spec, one_step, build_control(one_step), learnt)
    whole = stage.batch(Draw(0, 1))
    for rank in range(2):
        for key, value in stage.batch(Draw(0, 1, part=(rank, 2))).items():
            # a few more pictures at once round otherwise, which can move an edge
            apart = (value - whole[key][rank::2]).abs()
            assert apart.mean() < 1e-3, key


def test_the_files_come_back_and_another_base_is_refused(one_step: Bundle, own: object, tmp_path: Path) -> None:
    control = trained(one_step)
    card = ControlCard(kind="edges", base="tiny-one-step", base_hash="abc")
    folder = save_control(control, card, tmp_path / "edges")  # type: ignore[arg-type]
    back = load_control(folder, one_step, base_hash="abc")
    for a, b in zip(back.parameters(), control.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(a, b.half().float())
    with pytest.raises(BundleError, match="trained for 'tiny-one-step'"):
        load_control(folder, one_step, base_hash="other")
    wider = one_step.with_card()
    object.__setattr__(
        wider, "unet", SimpleNamespace(config=SimpleNamespace(**{**one_step.unet.config, "in_channels": 7}))
    )
    with pytest.raises(BundleError, match="another base: in_channels is 4, 'tiny-one-step' has 7"):
        load_control(folder, wider)
    with pytest.raises(BundleError, match="no ControlNet in"):
        load_control(tmp_path / "nowhere", one_step)
    one_step.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(BundleError, match="allowed: ControlNetModel"):
        load_control(tmp_path / "unet", one_step)


def test_a_drawing_takes_it(one_step: Bundle, tmp_path: Path) -> None:
    flow = InstaFlow(TorchEngine.of(one_step))
    wide = Image.new("RGB", (90, 40), "white")  # another size: resized, each side on its own
    network = trained(one_step)
    plain = flow.generate("red apple", seed=1)
    under = flow.generate("red apple", seed=1, control=[Control(network=network, image=wide)])  # type: ignore[arg-type]
    assert np.any(np.asarray(under.image) != np.asarray(plain.image))
    with pytest.raises(PromptError, match="no window"):
        Control(network=network, image=wide, start=0.6, end=0.5)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="no such control picture"):
        read_image(tmp_path / "none.png")
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(PromptError, match="unreadable control picture"):
        read_image(tmp_path / "bad.png")


def test_a_teacher_has_no_control_stage(tiny: Bundle, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "teacher")
    recipe = Recipe(name="r", data=Data(size=32), stages=(msgspec.structs.replace(SPEC, model=str(folder)),))
    with pytest.raises(RecipeError, match="is a teacher model; control wants a one-step one"):
        Run(recipe, tmp_path / "runs", cache=tmp_path / "data").run(lambda *_: None)


def test_a_control_to_start_from_is_looked_for_first(one_step: Bundle, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, model=str(one_step.save(tmp_path / "model")))
    card = ControlCard(kind="edges", base="another", base_hash="1234")
    save_control(build_control(one_step), card, tmp_path / "foreign")
    for init, line in (
        ("nothing", "no control nothing: it takes a name"),
        (tmp_path / "foreign", "for 'another' of hash"),
    ):
        begun = msgspec.structs.replace(spec, init=str(init))
        recipe = Recipe(name="r", data=Data(source="nowhere", size=32), stages=(begun,))
        with pytest.raises(BundleError, match=line):
            Run(recipe, tmp_path / "runs", cache=tmp_path / "data").run(lambda *_: None)


def test_control_pictures() -> None:
    pixels = picture(0).pixels(32)
    edges = control_picture("edges", pixels)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[4 - 1 : 4 + 1, 14].any() and not edges[12, 14].any() and not edges[28:, 28:].any()
    assert (control_picture("scribble", pixels) > 0).sum() > (edges > 0).sum()
    flat = control_picture("colours", np.full((32, 32, 3), (9, 80, 200), np.uint8))
    assert (flat == (9, 80, 200)).all()
    hollow = control_picture("inpaint", pixels, (2, 3, 8, 9))
    assert (hollow[2:8, 3:9] == 128).all()
    hollow[2:8, 3:9] = pixels[2:8, 3:9]
    assert (hollow == pixels).all()
