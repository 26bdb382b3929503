"""Two engines, one picture: OpenVINO's graphs against torch, without torch, in any batch, and what goes wrong."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from instaflow.errors import BundleError, PromptError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.request import LoRA
from instaflow.noise import noise
from instaflow.runtime import loading
from instaflow.runtime.bench import count_flops
from instaflow.runtime.loading import export, load_engine
from instaflow.runtime.openvino import FILLED, GRAPH, PARTS, OpenVINOEngine, _join_upsampling
from instaflow.runtime.pytorch import TorchEngine

PROMPTS = ["a red apple", "cat face, noto", "a green tree and a house", "sun"]
ONE = {"steps": 1, "guidance": 1.0, "negative": ""}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of uint8 pictures, in dB."""
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b.astype(float)).mean())))


@pytest.fixture(scope="module")
def folder(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one-step bundle that still predicts v on a diffusion schedule, with its graphs."""
    plain = tiny.with_card(name="tiny-one-step", kind="one-step", steps=1, guidance=1.0, max_guidance=1.0)
    source = plain.save(tmp_path_factory.mktemp("plain") / "bundle")
    return export(source, tmp_path_factory.mktemp("exported") / "bundle")


@pytest.fixture(scope="module")
def fast() -> OpenVINOEngine:
    return OpenVINOEngine(DEFAULT)


@pytest.fixture(scope="module")
def exact() -> OpenVINOEngine:
    return OpenVINOEngine(DEFAULT, precision="f32")


@pytest.fixture(scope="module")
def reference() -> TorchEngine:
    return TorchEngine(Bundle.load(DEFAULT))


# -- the same pictures -------------------------------------------------------------------------


def test_every_part_is_that_of_torch(folder: Path) -> None:
    ours, theirs = OpenVINOEngine(folder, precision="f32"), TorchEngine(Bundle.load(folder))
    states = theirs.encode(PROMPTS)
    np.testing.assert_allclose(ours.encode(PROMPTS), states.numpy(), atol=1e-5)
    for size in (32, 64):
        x0 = noise(range(4), ours.latent_shape(size))
        latents = theirs.sample(x0, states, **ONE)
        np.testing.assert_allclose(ours.sample(x0, states.numpy(), **ONE), latents, atol=1e-4)
        np.testing.assert_allclose(ours.decode(latents), theirs.decode(latents), atol=1e-3)


@pytest.mark.parametrize(
    ("scale", "mode", "kernel", "pad", "joined"),
    [
        ((2, 2), "nearest", 3, 1, True),
        ((2, 2), "linear", 3, 1, False),
        ((2, 2), "nearest, ceil", 3, 1, False),
        ((2, 3), "nearest", 3, 1, False),
        ((2, 2), "nearest", 3, 0, False),
        ((2, 2), "nearest", 1, 0, False),
    ],
)
def test_upsampling_and_a_convolution_become_one(
    scale: tuple[int, int], mode: str, kernel: int, pad: int, joined: bool
) -> None:
    from openvino import Core, Model, Type
    from openvino import opset13 as ops

    x = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(7, 5, kernel, kernel, generator=torch.Generator().manual_seed(1)).half()
    given = ops.parameter([1, 5, 4, 6])
    mode, _, rounded = mode.partition(", ")
    how = {"coordinate_transformation_mode": "asymmetric", "axes": np.array([2, 3]), "nearest_mode": rounded or "floor"}
    larger = ops.interpolate(given, np.array(scale, np.float32), mode, "scales", [0] * 4, [0] * 4, **how)
    half = ops.convert(ops.constant(weight.numpy(), Type.f16), "f32")
    graph = Model([ops.convolution(larger, half, [1, 1], [pad, pad], [pad, pad], [1, 1])], [given])
    plain = Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    _join_upsampling(graph, "f32")
    assert ("Interpolate" not in [op.get_type_name() for op in graph.get_ops()]) == joined
    found = Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    np.testing.assert_allclose(found, plain, atol=1e-5)
    if mode == "nearest" and not rounded:
        stretched = torch.nn.functional.interpolate(x, scale_factor=scale, mode=mode)
        wanted = torch.nn.functional.conv2d(stretched, weight.float(), padding=pad)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert count_flops(graph) == 2 * 5 * 7 * 16 * 4 * 6 or not joined


def test_the_default_models_pictures_are_those_of_torch(
    fast: OpenVINOEngine, exact: OpenVINOEngine, reference: TorchEngine
) -> None:
    drawn = [
        np.stack([np.asarray(d.image) for d in InstaFlow(e).generate_many(PROMPTS, seeds=range(4))])
        for e in (reference, exact, fast)
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max() <= 1
    assert all(psnr(a, b) > 40 for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize("name", ["fast", "exact"])
def test_a_picture_is_the_same_alone_and_among_others(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = InstaFlow(request.getfixturevalue(name))
    monkeypatch.setattr("instaflow.generate.MANY", 20)
    many = list(model.generate_many(PROMPTS * 5, seeds=[*range(19), 3]))  # 16 together, then four
    for i in (0, 3, 15, 16, 19):
        alone = model.generate(many[i].prompt, seed=many[i].seed)
        assert alone.image.tobytes() == many[i].image.tobytes()


@pytest.mark.parametrize("count", [FILLED - 1, FILLED, 15])
def test_a_graph_that_is_filled_up_changes_no_picture(fast: OpenVINOEngine, count: int) -> None:
    prompts, seeds = (PROMPTS * 4)[:count], range(50, 50 + count)
    together = list(InstaFlow(fast).generate_many(prompts, seeds=seeds, together=16))
    alone = [InstaFlow(fast).generate(p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
    assert [d.png() for d in together] == [d.png() for d in alone]
    rows = {batch for _, batch, _ in fast._graphs}
    assert 16 in rows or count < FILLED


def test_words_met_again_are_not_read_again(fast: OpenVINOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, model, read = InstaFlow(fast), InstaFlow(fast), []
    alone = [fresh.generate(p, seed=i) for i, p in enumerate(["sun", "a red apple", "sun"])]
    real = fast.encode
    monkeypatch.setattr(fast, "encode", lambda prompts: read.append(prompts) or real(prompts))
    assert [d.png() for d in model.generate_many(["sun", "a red apple", "sun"], seeds=[0, 1, 2])] == [
        d.png() for d in alone
    ]
    assert read == [("sun",), ("a red apple",)]
    several = model.generate_many(["sun", "a red apple", "sun"] * 2, seeds=[0, 1, 2] * 2, together=16)
    assert [d.png() for d in several] == [d.png() for d in alone] * 2
    assert read[2:] == [("sun", "a red apple")]


def test_compiled_it_draws_the_same(folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = load_engine(folder, engine="torch"), load_engine(folder, compiled=True)
    assert (plain.name, compiled.name) == ("torch float32 on cpu", "torch float32, compiled on cpu")
    drawn = [
        [np.asarray(d.image) for d in InstaFlow(e).generate_many(PROMPTS, seeds=range(4))] for e in (plain, compiled)
    ]
    assert np.abs(np.array(drawn[0], int) - np.array(drawn[1], int)).max() <= 1
    with pytest.raises(BundleError, match="the engine openvino compiles by itself"):
        load_engine(folder, engine="openvino", compiled=True)
    with pytest.raises(BundleError, match="compiling is for a model of one step, and 'tiny' is teacher"):
        TorchEngine.of(tiny, compiled=True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    with pytest.raises(BundleError, match=r"cannot compile 'tiny-one-step'.*it draws uncompiled too"):
        InstaFlow(compiled).generate("sun", size=64)


def test_prompts_are_cut_where_torch_cuts_them(exact: OpenVINOEngine, reference: TorchEngine) -> None:
    texts = ["", "ünïcödé ☂ emoji", "word " * 40]
    np.testing.assert_allclose(exact.encode(texts), reference.encode(texts).numpy(), atol=1e-4)
    said = []
    for engine in (exact, reference):
        with pytest.raises(PromptError) as caught:
            engine.check_prompt("word " * 40)
        said.append(str(caught.value))
    assert said[0] == said[1] and "42 tokens" in said[0]


# -- the files ---------------------------------------------------------------------------------


def test_weights_lie_on_the_disk_once(folder: Path) -> None:
    for place in (folder, DEFAULT):
        for part in PARTS:
            assert (place / part / GRAPH).stat().st_size < 300_000
            model = onnx.load(place / part / GRAPH, load_external_data=False)
            outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
            files = {e.value for t in outside for e in t.external_data if e.key == "location"}
            assert outside and all(f.endswith(".safetensors") for f in files)


def test_graphs_are_sound_and_run_elsewhere(folder: Path) -> None:
    for part in PARTS:
        onnx.checker.check_model(folder / part / GRAPH)
    ours = OpenVINOEngine(folder, precision="f32")
    x0, states = noise([1, 2], ours.latent_shape(32)), ours.encode(PROMPTS[:2])
    session = onnxruntime.InferenceSession(folder / "unet" / GRAPH)
    [latents] = session.run(None, {"x0": x0, "states": states})
    np.testing.assert_allclose(latents, ours.sample(x0, states, **ONE), atol=1e-4)


def test_batch_and_size_of_onnx_graphs_are_open(folder: Path) -> None:
    ours = OpenVINOEngine(folder, precision="f32")
    for part in PARTS:
        model = onnx.load(folder / part / GRAPH, load_external_data=False)
        assert all(i.type.tensor_type.shape.dim[0].dim_param for i in model.graph.input)
    x0, states = noise([1, 2, 3], ours.latent_shape(64)), ours.encode(PROMPTS[:3])
    [latents] = onnxruntime.InferenceSession(folder / "unet" / GRAPH).run(None, {"x0": x0, "states": states})
    [pictures] = onnxruntime.InferenceSession(folder / "vae" / GRAPH).run(None, {"latents": latents})
    np.testing.assert_allclose(pictures, ours.decode(ours.sample(x0, states, **ONE)), atol=1e-3)


def test_openvinos_own_format_draws_the_same_and_is_all_there_is(folder: Path, tmp_path: Path) -> None:
    own = export(folder, tmp_path / "own", to="openvino")
    assert not list(own.rglob("*.safetensors")) and not list(own.rglob("*.onnx"))
    assert all((own / part / "openvino_model.bin").is_file() for part in PARTS)
    first, second = OpenVINOEngine(folder, precision="f32"), OpenVINOEngine(own, precision="f32")
    for size in (32, 64):
        x0, states = noise(range(4), first.latent_shape(size)), first.encode(PROMPTS)
        np.testing.assert_allclose(second.encode(PROMPTS), states, atol=1e-5)
        for _ in range(2):  # what was computed once must not change what is computed next
            np.testing.assert_allclose(second.sample(x0, states, **ONE), first.sample(x0, states, **ONE), atol=1e-4)
        latents = first.sample(x0, states, **ONE)
        np.testing.assert_allclose(second.decode(latents), first.decode(latents), atol=1e-3)
    with pytest.raises(BundleError, match="'tiny-one-step' is exported to OpenVINO: it draws with the engine openvino"):
        Bundle.load(own)


NO_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers", "matplotlib", "safetensors"):
    sys.modules[name] = None  # importing it fails
from instaflow.cli import main
sys.argv = ["instaflow", "generate", "a red apple", "green frog", "--seed", "7", "-o", sys.argv[1]]
main()
"""


def test_it_draws_where_torch_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino" in done.stdout and len(list(tmp_path.glob("*.png"))) == 2


# -- what goes wrong ---------------------------------------------------------------------------


def test_many_steps_have_no_graph(tiny: Bundle, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "teacher")
    with pytest.raises(BundleError, match="'tiny' is a teacher model; a graph draws in one step"):
        export(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]
    with pytest.raises(BundleError, match="openvino draws in one step, and 'tiny' is a teacher model; use torch"):
        load_engine(source, engine="openvino")
    assert isinstance(load_engine(source), TorchEngine)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "tpu"}, "unknown engine 'tpu'; allowed: openvino, torch"),
        ({"engine": "openvino", "precision": "int3"}, "precision 'int3' is not to be had; allowed: "),
        ({"engine": "torch", "precision": "bf16"}, "precision 'bf16' is not to be had; allowed: float32"),
        ({"engine": "torch", "device": "abacus"}, "torch has no device 'abacus' here; it has: cpu"),
        ({"engine": "openvino", "device": "cuda"}, "draws on the CPU, not on 'cuda'"),
        ({"engine": "openvino", "loras": [LoRA("a.safetensors")]}, "no LoRA file a.safetensors"),
    ],
)
def test_what_an_engine_cannot_do_is_said(options: dict, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        load_engine(None, **options)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "damaged")
    graph = tmp_path / "damaged" / "unet" / GRAPH
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    return tmp_path / "damaged"


def test_a_damaged_graph_is_named_and_torch_takes_over(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BundleError, match=r"cannot compile .*unet.model\.onnx") as caught:
        load_engine(damaged, engine="openvino")
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_engine(damaged), TorchEngine)
    assert "drawing with torch instead" in caplog.text


def test_without_openvino_torch_draws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert isinstance(load_engine(folder), TorchEngine)
    with pytest.raises(BundleError, match="the package openvino is missing"):
        load_engine(folder, engine="openvino")


def test_without_torch_a_model_that_needs_it_says_so(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tmp_path / "teacher")
    monkeypatch.setattr(loading, "has_torch", lambda: False)
    with pytest.raises(BundleError, match=r"needs torch and diffusers: pip install 'instaflow\[torch\]'"):
        load_engine(source)
    plain = tiny.with_card(kind="one-step", steps=1, guidance=1.0, max_guidance=1.0).save(tmp_path / "one-step")
    with pytest.raises(BundleError, match=r"has no graphs for the CPU engine, and making them needs torch"):
        load_engine(plain)


def test_graphs_are_made_on_first_use_and_kept(
    one_step: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INSTAFLOW_CACHE", str(tmp_path / "cache"))
    source = one_step.save(tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        first = load_engine(source, engine="openvino")
    assert "once" in caplog.text
    [kept] = (p for p in (tmp_path / "cache").iterdir() if p.name != "hashes")
    monkeypatch.setattr(loading, "has_torch", lambda: False)  # so they cannot be made again
    second = load_engine(source, engine="openvino")
    x0 = noise([5], first.latent_shape(32))
    drawn = [e.sample(x0, e.encode(["sun"]), **ONE) for e in (first, second)]
    assert (drawn[0] == drawn[1]).all() and kept.name.endswith(f"openvino-{loading.version('openvino')}")


def test_a_model_whose_weights_changed_is_prepared_anew(
    one_step: Bundle, own: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTAFLOW_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []
    monkeypatch.setattr(loading, "export", lambda _, folder, *rest, **kept: made.append(folder) or folder)
    folder = one_step.save(tmp_path / "model")
    loading.exported(folder)
    loading.exported(folder)
    other = own(**{f: getattr(one_step.card, f) for f in ("kind", "prediction", "steps", "guidance", "max_guidance")})
    other.unet.conv_in.bias.data += 1
    other.save(folder)
    loading.exported(folder)
    assert made[0] == made[1] != made[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("a small disk can only be mounted by root")
    yield place
    subprocess.run(["umount", place], check=False)


def test_a_full_disk_leaves_nothing_half(one_step: Bundle, tmp_path: Path, small_disk: Path) -> None:
    source = one_step.save(tmp_path / "plain")
    with pytest.raises(BundleError, match="cannot write"):
        export(source, small_disk / "out")
    assert not list(small_disk.iterdir())
