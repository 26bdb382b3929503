"""An evaluation from end to end on a tiny model: what is drawn is kept, and the report says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.data.pictures import Picture
from instaflow.errors import BundleError, PromptError
from instaflow.evaluate import drawing
from instaflow.evaluate.drawing import Entrant, Task, draw_once
from instaflow.evaluate.field import Field
from instaflow.evaluate.heldout import heldout_field
from instaflow.evaluate.profile import latency, peak_memory, straightness_along
from instaflow.evaluate.protocol import entrant as entrant_of
from instaflow.evaluate.protocol import evaluate
from instaflow.evaluate.report import markdown
from instaflow.flow import straightness
from instaflow.models.bundle import Bundle
from instaflow.models.card import read_card
from instaflow.models.sampling import noise


def pictures(count: int, split: str) -> list[Picture]:
    rng = np.random.default_rng(len(split))
    return [
        Picture.from_image(
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)),
            name=f"{split} {i}",
            style="noto",
            split=split,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folders(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, and a one-step model with the same networks."""
    root = tmp_path_factory.mktemp("models")
    one = tiny.with_card(name="o", kind="one-step", prediction="velocity", steps=1, guidance=1.0, max_guidance=1.0)
    return {"teacher": tiny.save(root / "teacher"), "one-step": one.save(root / "one")}


def entrant(folders: dict[str, Path], name: str, **changes: object) -> Entrant:
    card = read_card(folders[name])
    settings = {"label": name, "folder": folders[name], "steps": card.steps, "guidance": card.guidance}
    return Entrant(**{**settings, **changes})


def field(first: Entrant, count: int) -> Field:
    bundle = Bundle.load(first.folder)
    return heldout_field(bundle, pictures(80, "train"), pictures(20, "test"), count=count, seed=3, device="cpu")


@pytest.fixture(scope="module")
def report(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("report")
    models = [entrant(folders, "teacher"), entrant(folders, "one-step")]
    found = evaluate(field(models[0], count=60), models, out, curve_count=24, made=folders["one-step"])
    return found, out


def test_the_report_has_every_figure(report: tuple[dict, Path]) -> None:
    found, out = report
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found))
    assert list(found["models"]) == ["real pictures", "real, through the autoencoder", "teacher", "one-step"]
    assert found["protocol"]["name"] == "emoji-heldout" and found["protocol"]["safety_checker"] == "off"
    for name, model in found["models"].items():
        for split in ("unseen", "seen"):
            m = model[split]
            assert m["fd_lite0_95"][0] <= m["fd_lite0"] <= m["fd_lite0_95"][1]
            assert m["kid_95"][0] <= m["kid"] <= m["kid_95"][1]
            assert m["pictures"] == (60 if name in ("teacher", "one-step") else 20) and m["real_pictures"] == 20
    assert found["floor"]["seen"] > 0
    for name in ("teacher", "one-step"):
        m = found["models"][name]
        assert 0 < m["latency"]["p50_ms"] <= m["latency"]["p95_ms"]
        assert 100 < m["memory"]["resident_mb"] < 5000 and m["memory"]["gpu_mb"] == 0
    steps = {k: [p[0] for p in v["steps"]] for k, v in found["curves"].items()}
    assert steps == {"teacher": [1, 2, 4, 8, 25], "one-step": [1]}
    assert [p[0] for p in found["curves"]["teacher"]["guidance"]] == [1.0, 1.5, 2.0, 3.0, 5.0]
    plots = ("grid", "fd-unseen", "fd-seen", "fd-steps", "fd-guidance", "straightness")
    assert all(Image.open(out / f"{plot}.png").size[0] > 400 for plot in plots)
    text = (out / "report.md").read_text()
    assert text == markdown(found) and "FID" not in text and "floor" in text
    assert "one-step against teacher" in text


def test_a_model_against_itself_is_no_difference(folders: dict[str, Path], tmp_path: Path) -> None:
    models = [entrant(folders, "teacher"), entrant(folders, "teacher", label="again")]
    found = evaluate(field(models[0], count=30), models, tmp_path)
    assert read_card(folders["teacher"]).results.get("unseen", {}).get("pictures") != 30  # not unasked
    [pair] = found["differences"]
    assert pair["of"] == "again" and pair["unseen"] == (0.0, 0.0, 0.0)  # the same pictures, resampled alike
    assert (tmp_path / "report.md").read_text().count("no difference") == 2 and not found["curves"]


def test_a_card_gets_the_results_of_the_settings_it_is_used_with(report: object, folders: dict[str, Path]) -> None:
    results = read_card(folders["one-step"]).results
    assert results["protocol"] == "emoji-heldout, version 3" and results["unseen"]["pictures"] == 60
    assert read_card(folders["teacher"]).results == {}  # which that run had not made


def test_what_is_drawn_is_kept_chunk_by_chunk(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "CHUNK", 4)
    bundle, own = Bundle.load(folders["one-step"]), entrant(folders, "one-step")
    task = Task(name="t", prompts=[f"a red apple {i}" for i in range(10)], seeds=range(10))
    asked: list[int] = []
    real = drawing.draw

    def draw(bundle: Bundle, entrant: Entrant, task: Task) -> np.ndarray:
        asked.append(len(task.prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(bundle, entrant, task)

    monkeypatch.setattr(drawing, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        draw_once(bundle, own, task, tmp_path)
    whole = draw_once(bundle, own, task, tmp_path)
    assert asked == [4, 4, 2, 2] and whole.shape == (10, 32, 32, 3)
    assert np.abs(whole.astype(int) - real(bundle, own, task)).max() <= 2
    assert np.array_equal(draw_once(bundle, own, task, tmp_path), whole) and len(asked) == 4
    # two processes draw every chunk between them, and other seeds are another task
    parts = [draw_once(bundle, own, task, tmp_path / "two", (rank, 2)) for rank in range(2)]
    assert [len(p) for p in parts] == [6, 4] and asked[4:] == [4, 2, 4]
    assert task.hash != Task(name="t", prompts=task.prompts, seeds=range(1, 11)).hash


def test_straightness_along_t_adds_up_to_the_integral(tiny: Bundle) -> None:
    bundle = tiny.with_card(kind="rectified", prediction="velocity")
    task = Task(name="t", prompts=["a red apple"] * 8, seeds=range(8))
    found = straightness_along(bundle, task)
    x0 = noise(range(8), (4, 4, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = straightness(bundle.velocity(bundle.encode(task.prompts)), x0, 25)
    assert found["mean"] == pytest.approx(float(wanted.mean()), abs=2e-5)
    assert np.mean(found["along_t"]) == pytest.approx(found["mean"], abs=2e-5) and len(found["along_t"]) == 25
    assert found["standard_error"] == pytest.approx(float(wanted.double().std() / 8**0.5), abs=2e-5)


def test_models_are_named_with_their_steps(folders: dict[str, Path]) -> None:
    teacher, one = str(folders["teacher"]), str(folders["one-step"])
    found = entrant_of(f"{teacher}@8")
    assert (found.label, found.steps, found.guidance, found.folder) == ("tiny@8", 8, 2.0, folders["teacher"])
    assert (entrant_of(one).label, entrant_of(one).steps) == ("o", 1)
    assert entrant_of("teacher@8", lambda name: folders[name]).label == "teacher@8"
    with pytest.raises(PromptError, match="steps=2 is not allowed for the one-step model 'o'; allowed: 1"):
        entrant_of(f"{one}@2")
    with pytest.raises(BundleError, match="no such bundle folder"):
        entrant_of("no/where/at/all")


def test_latency_grows_with_steps_and_a_process_that_fails_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.load(folders["teacher"])
    few, many = (latency(bundle, entrant(folders, "teacher", steps=s), "a red apple") for s in (1, 20))
    assert many["p50_ms"] > 2 * few["p50_ms"]
    with pytest.raises(Exception, match="broken: a process that draws one picture failed"):
        peak_memory(Entrant(label="broken", folder=tmp_path, steps=1, guidance=1.0), "a", "cpu")
