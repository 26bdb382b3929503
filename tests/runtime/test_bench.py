"""The benchmark counts what torch counts, measures what it says, and refuses what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from instaflow.cli import app
from instaflow.errors import BundleError
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.noise import noise
from instaflow.runtime.bench import bench, cold, count_flops, machine_peak, peer
from instaflow.runtime.loading import load_engine
from instaflow.runtime.openvino import OpenVINOEngine


@pytest.fixture(scope="module")
def engine() -> OpenVINOEngine:
    return OpenVINOEngine(DEFAULT)


def test_operations_are_those_that_torch_counts(engine: OpenVINOEngine) -> None:
    bundle = Bundle.load(DEFAULT)
    states, x0 = bundle.encode(["a red apple"]), torch.from_numpy(noise([0], engine.latent_shape(64)))
    calls = {
        "text_encoder": lambda: bundle.encode(["a red apple"]),
        "unet": lambda: bundle.unet(x0, 999.0, states),
        "vae": lambda: bundle.vae.decode(x0),
    }
    for part, call in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert count_flops(engine.read(part, 1, 64)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_report_has_every_part_and_ratios_of_the_same_run(engine: OpenVINOEngine) -> None:
    report = bench(DEFAULT, engine, against=["torch"], runs=4, cold_runs=0)
    assert set(report["picture"]) == {engine.name, "torch"} and set(report["parts"]) == {"text", "step", "decode"}
    for spread in [*report["picture"].values(), *report["parts"].values(), report["batch"]["per_picture"]]:
        assert 0 < spread["min"] <= spread["p50"] <= spread["p95"]
    assert report["ratio"]["torch"] > 0 and report["of_peak"] > 0 and report["peak_gflop_s"] > 1
    assert "cold" not in report


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_peer_draws_the_same_picture(name: str) -> None:
    ours = load_engine(None, engine="openvino", precision="f32")
    x0, states = noise([3], ours.latent_shape(64)), ours.encode(["a red apple"])
    wanted = ours.decode(ours.sample(x0, states, steps=1, guidance=1.0, negative=""))
    np.testing.assert_allclose(np.asarray(peer(name, DEFAULT)(3)).reshape(wanted.shape), wanted, atol=2e-3)


def test_peers_that_cannot_are_refused() -> None:
    with pytest.raises(BundleError, match="unknown peer 'comfy'; allowed: torch, onnxruntime, diffusers"):
        peer("comfy", DEFAULT)
    with pytest.raises(BundleError, match="diffusers' pipeline cannot run"):
        peer("diffusers", DEFAULT)


def test_a_cold_start_is_a_whole_process() -> None:
    seconds, memory = cold([])
    assert seconds > 0.1 and 50e6 < memory < 2e9
    with pytest.raises(BundleError, match="no such bundle folder: nowhere"):
        cold(["--model", "nowhere"])


def test_the_peak_is_of_this_precision() -> None:
    assert machine_peak("f32", side=256) > 1e8


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    app(["bench", "--runs", "2", "--cold-runs", "0", "-o", str(out)], exit_on_error=False, result_action="return_value")
    said = capsys.readouterr().out
    assert "openvino" in said and "each of 16" in said
    assert json.loads(out.read_text())["size"] == 64
