"""The shipped control: what torch draws under it, OpenVINO does, in any batch; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import fails, instaflow
from test_engines import psnr

from instaflow.errors import BundleError, PromptError
from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT, bundle_hash
from instaflow.models.hub import CONTROLS, find_control
from instaflow.models.request import Control, read_image

EDGES, SKETCH = CONTROLS / "edges", Path(__file__).parents[2] / "examples" / "sketch.png"


@pytest.fixture(scope="module")
def fast() -> InstaFlow:
    return InstaFlow.load(engine="openvino")


@pytest.fixture(scope="module")
def exact() -> InstaFlow:
    return InstaFlow.load(engine="torch")


def under(flow: InstaFlow, **options: float) -> Control:
    return Control(network=flow.engine.load_control(EDGES), image=read_image(SKETCH), **options)


def draw(flow: InstaFlow, *controls: Control, seed: int = 1) -> np.ndarray:
    return np.asarray(flow.generate("a blue fish", seed=seed, control=controls).image)


def test_it_is_small_and_for_the_default_model() -> None:
    card = json.loads((EDGES / "control.json").read_text())
    assert card["kind"] == "edges"
    assert card["base_hash"] == bundle_hash(DEFAULT)
    assert sum(file.stat().st_size for file in EDGES.iterdir()) <= 20e6


def test_the_engines_agree(fast: InstaFlow, exact: InstaFlow) -> None:
    plain = draw(exact)
    for scale in (0.8, 1.0):
        mine, theirs = (draw(flow, under(flow, scale=scale)) for flow in (fast, exact))
        assert psnr(mine, theirs) >= 40
        assert psnr(plain, theirs) < 30  # it counts
    halves = draw(fast, under(fast, scale=0.5), under(fast, scale=0.5))
    assert psnr(halves, draw(fast, under(fast))) >= 50
    assert np.array_equal(draw(fast, under(fast, scale=0.0)), draw(fast))


def test_alone_and_among_others(fast: InstaFlow) -> None:
    control, seeds = under(fast), range(18)
    many = fast.generate_many(["a blue fish"] * 18, seeds=seeds, control=[control], together=16)
    drawn = [np.asarray(drawing.image) for drawing in many]
    for seed in (0, 9, 17):
        assert np.array_equal(drawn[seed], draw(fast, control, seed=seed))


def test_what_the_cpu_engine_cannot(fast: InstaFlow, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="under control at 64"):
        fast.generate("a blue fish", size=32, control=[under(fast)])
    shutil.copytree(EDGES, tmp_path / "bare", ignore=shutil.ignore_patterns("*.onnx"))
    with pytest.raises(BundleError, match="no graphs for openvino"):
        fast.engine.load_control(tmp_path / "bare")


def test_by_name_without_torch(tmp_path: Path) -> None:
    Image.new("RGB", (90, 40), "white").save(tmp_path / "wide.png")  # resized, each side on its own
    words = ["generate", "a blue fish", "--seed", "1", "--control", "edges=wide.png", "--control-scale", "0.8"]
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['instaflow', *{words!r}]; "
    code += "from instaflow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino" in done.stdout
    with Image.open(tmp_path / "blue-fish.png") as picture:
        assert picture.size == (64, 64)


def test_mistakes_on_the_command_line(
    one_step: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    edges = f"edges={SKETCH}"
    assert "NAME=PICTURE" in fails(capsys, "generate", "fish", "--control", "edges")
    assert "it takes a name (edges)" in fails(capsys, "generate", "fish", "--control", f"egdes={SKETCH}")
    assert "no such control picture" in fails(capsys, "generate", "fish", "--control", "edges=none.png")
    other = one_step.save(tmp_path / "other")
    assert "was trained for" in fails(capsys, "generate", "red apple", "--model", str(other), "--control", edges)
    shutil.copytree(EDGES, tmp_path / "foreign")
    card = tmp_path / "foreign" / "control.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "base": "another", "base_hash": "0" * 64}))
    for engine in ("torch", "openvino"):
        line = fails(capsys, "generate", "fish", "--engine", engine, "--control", f"foreign={SKETCH}")
        assert "was trained for 'another'" in line
    assert not list(tmp_path.glob("*.png"))
    assert find_control("edges") == EDGES
    assert instaflow("generate", "fish", "-o", "fish.png", "--control", edges) == 0
