"""Two processes on one machine through the command line: what one makes two make, and a killed worker loses nothing.

They talk by gloo, as `accelerate launch` or `torchrun` starts them on many machines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from instaflow.data.pairs import read_shard
from instaflow.data.pictures import Picture, write_parquet
from instaflow.models.bundle import Bundle

RECIPE = """
name = "two"

[data]
source = "{data}"
size = 32

[[stages]]
kind = "pairs"
name = "pairs"
model = "{model}"
count = 24
shard_size = 3
batch_size = 3
steps = 4
guidance = 2.0

[[stages]]
kind = "reflow"
name = "reflow"
model = "{model}"
pairs = "pairs"
train = {{ steps = 40, batch_size = 4, lr = 1e-5, precision = "no", checkpoint_minutes = 1e-9 }}

[[stages]]
kind = "evaluate"
name = "evaluate"
models = ["{model}@8", "{model}@4", "reflow@4", "reflow@1"]
count = 96
"""


@pytest.fixture(scope="module")
def recipe(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, reflow and evaluation of the tiny model on pictures of noise."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    pictures = [
        Picture.from_image(
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)),
            name=f"thing {i}",
            style=("noto", "fluent")[i % 2],
            split="test" if i % 8 < 2 else "train",
        )
        for i in range(80)
    ]
    data = write_parquet(pictures, folder / "data.parquet")
    text = RECIPE.format(data=data, model=tiny.save(folder / "tiny"))
    (folder / "two.toml").write_text(text)
    return folder / "two.toml"


def start(recipe: Path, root: Path, processes: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    environment["OMP_NUM_THREADS"] = "1"  # more threads add up in another order
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [*launcher, "-m", "instaflow", "run", str(recipe), "--root", str(root)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(recipe: Path, root: Path, processes: int = 2) -> Path:
    job = start(recipe, root, processes)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    return root / "two"


def kill_when(recipe: Path, root: Path, reached: Callable[[Path], bool], rank: int) -> None:
    """Start two processes and SIGKILL one of them as soon as the run has `reached` something."""
    job = start(recipe, root, 2)
    deadline = time.monotonic() + 200
    while not reached(root / "two"):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == str(rank)]
    workers[0].send_signal(signal.SIGKILL)
    job.communicate(timeout=120)
    assert job.returncode != 0


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern))}


def pairs(run: Path) -> list[tuple[list[str], list[int], bytes]]:
    """What the shards hold; the libraries write their header in any order."""
    shards = [read_shard(p) for p in sorted(run.glob("pairs/pairs/*.safetensors"))]
    return [(s.prompts, s.seeds, s.x1.numpy().tobytes()) for s in shards]


def figures(run: Path) -> dict:
    """The report less what names the run."""
    return json.loads((run / "evaluate" / "report.json").read_text())


def same(a: Path, b: Path) -> None:
    """Both runs have the same pairs, the same weights to 1e-6 and the same figures."""
    assert pairs(a) == pairs(b) and len(pairs(a)) == 8
    assert files(a, "pairs/pairs/*.json") == files(b, "pairs/pairs/*.json")
    weights = [load_file(r / "reflow" / "bundle" / "unet" / "diffusion_pytorch_model.safetensors") for r in (a, b)]
    for key, value in weights[0].items():
        assert (value.float() - weights[1][key].float()).abs().max() <= 1e-3 * max(1e-3, value.float().abs().max()), key
    ours, theirs = figures(a)["models"], figures(b)["models"]
    assert ours.keys() == theirs.keys()
    for label in ours:
        for split in ("seen", "unseen"):
            x, y = ours[label][split], theirs[label][split]
            assert x["fd_lite0"] == pytest.approx(y["fd_lite0"], rel=0.02), label
            assert x["pictures"] == y["pictures"] == (96 if "@" in label else x["real_pictures"])


def test_killed_in_pairs_in_training_and_in_evaluation_two_end_as_one(recipe: Path, tmp_path: Path) -> None:
    one = finish(recipe, tmp_path / "one", processes=1)
    kill_when(recipe, tmp_path, lambda run: len(list(run.glob("pairs/pairs/*.safetensors"))) >= 2, rank=1)
    left = files(tmp_path / "two", "pairs/pairs/*.safetensors")
    assert 2 <= len(left) < 8
    kill_when(recipe, tmp_path, lambda run: (run / "reflow" / "checkpoint.pt").exists(), rank=0)
    assert files(tmp_path / "two", "pairs/pairs/*.safetensors").items() >= left.items()
    assert not (tmp_path / "two" / "reflow" / "bundle").exists()
    kill_when(recipe, tmp_path, lambda run: len(list(run.glob("evaluate/drawn/*/*.npy"))) >= 1, rank=1)
    assert not (tmp_path / "two" / "evaluate" / "report.json").exists()
    same(finish(recipe, tmp_path), one)
    assert not list((tmp_path / "two").rglob("*.tmp"))
