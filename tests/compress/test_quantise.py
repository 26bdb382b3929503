"""Quantised bundles: they draw without torch what they did, in fewer bytes; what they can no longer do is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instaflow.compress import quantise as quantising
from instaflow.compress.quantise import KEPT, Layers, quantise
from instaflow.data.emoji import split_of
from instaflow.data.pictures import Picture, write_parquet
from instaflow.errors import BundleError, PromptError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import read_card, weight_files
from instaflow.models.request import LoRA
from instaflow.noise import noise
from instaflow.runtime.graphs import traced
from instaflow.runtime.loading import export, load_engine
from instaflow.runtime.openvino import OpenVINOEngine

pytest.importorskip("nncf")
PROMPTS = ["a red apple", "cat face, noto", "a green tree and a house", "sun"]
ONE = {"steps": 1, "guidance": 1.0, "negative": ""}


@pytest.fixture(scope="module")
def source(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny.with_card(name="tiny-one-step", kind="one-step", steps=1, guidance=1.0, max_guidance=1.0)
    return plain.save(tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture(scope="module")
def bundle(source: Path) -> Iterator[Bundle]:
    loaded = Bundle.load(source)
    graphs = list(traced(loaded))  # once: it takes most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "traced", lambda b: graphs if b is loaded else traced(b))
        yield loaded


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Layers]]:
    folder = tmp_path_factory.mktemp("quantised") / "w8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "SAMPLES", 4)
        return folder, quantise(bundle, "w8", PROMPTS, folder)


@pytest.fixture(scope="module")
def exact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("exported") / "bundle", to="openvino")


def step(folder: Path, precision: str = "f32") -> np.ndarray:
    engine = OpenVINOEngine(folder, precision=precision)
    return engine.sample(noise(range(4), engine.latent_shape(32)), engine.encode(PROMPTS), **ONE)


def test_8_bits_move_the_step_by_little(made: tuple[Path, list[Layers]], exact: Path) -> None:
    ours, wanted = step(made[0]), step(exact)
    assert 0 < np.square(ours - wanted).sum() / np.square(wanted).sum() < 1e-3


def test_the_table_is_kept_and_says_what_stays(made: tuple[Path, list[Layers]], bundle: Bundle) -> None:
    folder, table = made
    card = read_card(folder)
    assert card.quantised == "w8" and card.name == "tiny-one-step-w8"
    kept = card.lineage["quantised"]["sensitivity"]
    assert {t.block: {"sensitivity": t.sensitivity, "kept": t.kept} for t in table} == kept
    assert all(kept[name]["kept"] for name in KEPT)
    weights = [p for n, p in bundle.unet.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert sum(t.parameters for t in table) == sum(p.numel() for p in weights)


@pytest.mark.parametrize("scheme", ["w8", "int8"])
def test_quantising_nothing_changes_nothing(
    bundle: Bundle, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(quantising, "_sensitivities", lambda *given: [replace(b, kept=True) for b in given[4]])
    quantise(bundle, scheme, PROMPTS, tmp_path / "none")
    engine, wanted = OpenVINOEngine(tmp_path / "none", precision="f32"), OpenVINOEngine(exact, precision="f32")
    x0, states = noise(range(4), wanted.latent_shape(32)), wanted.encode(PROMPTS)
    np.testing.assert_allclose(engine.sample(x0, states, **ONE), wanted.sample(x0, states, **ONE), atol=2e-3)


def test_it_takes_fewer_bytes_and_has_no_second_copy(
    made: tuple[Path, list[Layers]], exact: Path, source: Path
) -> None:
    small, half = (sum(f.stat().st_size for f in weight_files(p)) for p in (made[0], exact))
    assert small < 0.75 * half  # a tiny network is mostly what stays
    assert not list(made[0].rglob("*.safetensors")) and not list(made[0].rglob("*.onnx"))


def test_it_draws_alone_what_it_draws_among_others(made: tuple[Path, list[Layers]]) -> None:
    model = InstaFlow.load(made[0])
    assert model.engine.name.startswith("openvino w8 ") and model.engine.batch == 1
    many = list(model.generate_many(PROMPTS * 26, seeds=range(104)))
    for i in (0, 17, 103):
        assert model.generate(many[i].prompt, seed=i).image.tobytes() == many[i].image.tobytes()


NO_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers", "nncf", "safetensors"):
    sys.modules[name] = None
from instaflow.cli import main
sys.argv = ["instaflow", "generate", "a red apple", "--model", sys.argv[1], "-o", sys.argv[2]]
main()
"""


def test_it_draws_where_torch_is_not_installed(made: tuple[Path, list[Layers]], tmp_path: Path) -> None:
    words = [sys.executable, "-c", NO_TORCH, str(made[0]), str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


def test_int8_computes_with_8_bits(
    bundle: Bundle, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "_sensitivities", lambda *given: list(given[4]))  # measured above
    quantise(bundle, "int8", PROMPTS, tmp_path / "int8")
    graph = OpenVINOEngine(tmp_path / "int8").read("unet", 1, 32)
    assert sum(op.get_type_name() == "FakeQuantize" for op in graph.get_ops()) > 10
    ours, wanted = step(tmp_path / "int8"), step(exact)
    assert 0 < np.square(ours - wanted).sum() / np.square(wanted).sum() < 0.1


# -- what it is calibrated with ----------------------------------------------------------------------


def test_calibration_never_sees_what_is_measured(bundle: Bundle, tmp_path: Path) -> None:
    from instaflow.cli.compressing import _validation_prompts

    codes = [f"{code:x}" for code in range(0x1F600, 0x1F640)]
    grey = Image.new("RGB", (8, 8), "grey")
    pictures = [Picture.from_image(grey, name=c, style="noto", hexcode=c, split=split_of(c)) for c in codes]
    write_parquet(pictures, tmp_path / "emoji-64" / "noto.parquet")  # a data set that is there is kept
    prompts = _validation_prompts(bundle.with_card(image_size=64, styles=("noto",)), tmp_path)
    kept_back = {c for c in codes if split_of(c) == "validation"}
    assert kept_back and set(prompts) == {f"{c}, noto" for c in kept_back}


# -- what goes wrong ---------------------------------------------------------------------------------


def test_what_a_quantised_model_can_no_longer_do_is_said(made: tuple[Path, list[Layers]]) -> None:
    said = r"'tiny-one-step-w8' is quantised \(w8\): it draws with the engine openvino and can no longer be changed"
    with pytest.raises(BundleError, match=said):
        Bundle.load(made[0])
    with pytest.raises(BundleError, match=said):
        load_engine(made[0], loras=[LoRA.read("a.safetensors")])
    with pytest.raises(BundleError, match=said):
        load_engine(made[0], engine="torch")


def test_mistakes_are_named(bundle: Bundle, tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="unknown scheme 'w3'; allowed: int8, w8, w4"):
        quantise(bundle, "w3", PROMPTS, tmp_path / "out")
    with pytest.raises(PromptError, match="no prompt to calibrate with"):
        quantise(bundle, "w8", [], tmp_path / "out")
    with pytest.raises(BundleError, match="'tiny' is a teacher model; a graph draws in one step"):
        quantise(tiny, "w8", PROMPTS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_refused(made: tuple[Path, list[Layers]], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made[0], tmp_path / "damaged")
    file = tmp_path / "damaged" / "unet" / "openvino_model.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"the weights in .*damaged are not those that its instaflow.json names"):
        load_engine(tmp_path / "damaged", engine="openvino")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantising, "write_card", fail)


def test_a_full_disk_leaves_no_half_bundle(
    bundle: Bundle, tmp_path: Path, full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "_sensitivities", lambda *given: list(given[4]))
    with pytest.raises(BundleError, match=r"cannot write .*No space left on device"):
        quantise(bundle, "w8", PROMPTS, tmp_path / "out")
    assert not list(tmp_path.iterdir())
