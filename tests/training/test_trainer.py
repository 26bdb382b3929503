"""The loop: against one written out by hand, and broken off in every way there is.

Run as a program (`python test_trainer.py FOLDER STEP RANK`) it trains until process RANK kills itself at STEP.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from instaflow.errors import DataError, RecipeError
from instaflow.models.bundle import Bundle
from instaflow.models.stacked import StackedUNet
from instaflow.recipe import Train
from instaflow.training import trainer
from instaflow.training.trainer import Batch, Draw, Log, Stage, learning_rate, split, train

ALWAYS = 1e-12  # checkpoint_minutes: after every step
NEVER = 1e6
SPEC = Train(
    steps=50, batch_size=8, lr=0.05, lr_warmup_steps=5, ema=0.9, precision="no", checkpoint_minutes=NEVER, grad_clip=0.5
)
WANTED = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def linear_stage(at: Callable[[int], None] = lambda step: None, start: int = 0) -> Stage:
    """Learn a 3 → 2 linear map from noise; `at(step)` is called before the batch of a step is drawn."""
    torch.manual_seed(1)
    network = nn.Linear(3, 2)
    count = iter(range(start, 10**9))

    def batch(draw: Draw) -> Batch:
        at(next(count))
        return {"x": draw.own(draw.normal(SPEC.batch_size, 3)), "weight": draw.own(draw.uniform(SPEC.batch_size))}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        error = (network(batch["x"]) - batch["x"] @ WANTED.T).square().mean(1)
        return (error * batch["weight"]).mean()

    return Stage(network=network, batch=batch, loss=loss)


def run(folder: Path, stage: Stage | None = None, *, seed: int = 0, **changes: object) -> dict[str, Tensor]:
    spec = msgspec.structs.replace(SPEC, **changes)
    return dict(train(stage or linear_stage(), spec, folder, seed=seed, name="linear").state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return run(tmp_path_factory.mktemp("unbroken"))


UNET = Train(steps=4, batch_size=4, lr=1e-4, lr_warmup_steps=0, ema=0.5, precision="no", checkpoint_minutes=NEVER)


def unet_stage(folder: Path, kind: str) -> Stage:
    """A tiny U-Net, or two of them in series, learns to answer nought."""
    network: Any = UNet2DConditionModel.from_pretrained(folder)
    if kind != "plain":
        network = StackedUNet.of(network, kind)
    config = network.config

    def batch(draw: Draw) -> Batch:
        x = draw.normal(UNET.batch_size, config.in_channels, config.sample_size, config.sample_size)
        states = draw.normal(UNET.batch_size, 3, config.cross_attention_dim)
        batch = {"x": x, "time": 1000 * draw.uniform(UNET.batch_size), "states": states}
        return {k: draw.own(v) for k, v in batch.items()}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return network(batch["x"], batch["time"], batch["states"]).sample.square().mean()

    return Stage(network=network, batch=batch, loss=loss)


def interrupted(step: int) -> Stage:
    def at(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return linear_stage(at)


# -- random choices ----------------------------------------------------------------------------


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    def everything(draw: Draw) -> tuple:
        return draw.indices(10**6, 5), draw.normal(2, 3).tolist(), draw.uniform(4).tolist(), draw.python.random()

    assert everything(Draw(3, 7)) == everything(Draw(3, 7))
    assert len({repr(everything(Draw(*key))) for key in [(3, 7), (3, 8), (4, 7), (7, 3), (37, 0)]}) == 5


def test_draws_have_their_distributions() -> None:
    draw = Draw(0, 0)
    normal, uniform = draw.normal(20_000), draw.uniform(20_000)
    assert normal.mean().item() == pytest.approx(0, abs=0.03) and normal.std().item() == pytest.approx(1, abs=0.03)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.min() >= 0 and uniform.max() < 1
    assert sorted(set(draw.indices(5, 500))) == [0, 1, 2, 3, 4]


# -- the learning rate -------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine_to_zero() -> None:
    spec = Train(steps=110, lr=2.0, lr_warmup_steps=10)
    rates = [learning_rate(spec, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0, abs=1e-12)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[109] > 0


def test_a_constant_learning_rate_stays() -> None:
    spec = Train(steps=100, lr=2.0, lr_warmup_steps=4, lr_decay="constant")
    assert [learning_rate(spec, s) for s in (0, 3, 4, 99)] == [0.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("warm", [0, 5, 50])
def test_a_run_shorter_than_its_warm_up_still_has_a_rate(warm: int) -> None:
    rates = [learning_rate(Train(steps=3, lr=1.0, lr_warmup_steps=warm), s) for s in range(3)]
    assert all(0 < r <= 1 for r in rates)


# -- the loop ----------------------------------------------------------------------------------


def test_the_loop_equals_one_written_out_by_hand(unbroken: dict[str, Tensor]) -> None:
    stage = linear_stage()
    weights = {k: v.detach().clone() for k, v in stage.network.named_parameters()}
    mean, first, second = (
        {k: f(v) for k, v in weights.items()} for f in (torch.clone, torch.zeros_like, torch.zeros_like)
    )
    for step in range(SPEC.steps):
        for w in weights.values():
            w.requires_grad_(True).grad = None
        batch = stage.batch(Draw(0, step))
        out = batch["x"] @ weights["weight"].T + weights["bias"]
        loss = ((out - batch["x"] @ WANTED.T).square().mean(1) * batch["weight"]).mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        lr, n = learning_rate(SPEC, step), step + 1
        decay = 0.0 if step == 0 else min(0.9, 1 - (1 + step) ** (-2 / 3))
        with torch.no_grad():
            for k, w in weights.items():
                g = gradients[k] * min(1.0, SPEC.grad_clip / (norm + 1e-6))
                first[k] = 0.9 * first[k] + 0.1 * g
                second[k] = 0.99 * second[k] + 0.01 * g * g
                w = w * (1 - lr * SPEC.weight_decay)
                w = w - lr * (first[k] / (1 - 0.9**n)) / ((second[k] / (1 - 0.99**n)).sqrt() + 1e-8)
                weights[k] = w.detach()
                mean[k] = decay * mean[k] + (1 - decay) * w
    for k, value in unbroken.items():
        torch.testing.assert_close(value, mean[k], rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_every_weight_and_the_loss_falls(tmp_path: Path) -> None:
    before = linear_stage().network.state_dict()
    after = run(tmp_path, steps=400, lr_decay="constant", grad_clip=100.0)
    assert all((after[k] != before[k]).all() for k in before)
    torch.testing.assert_close(after["weight"], WANTED, rtol=0, atol=0.05)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0] / 100


def test_what_comes_back_is_averaged_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    network = train(linear_stage(), SPEC, tmp_path, seed=0, name="linear")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    raw = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(network.weight, raw["weight"])


def test_the_seed_decides(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    assert equal(run(tmp_path / "a"), unbroken)
    assert not equal(run(tmp_path / "b", seed=1), unbroken)


def test_the_metrics_are_a_line_every_twenty_steps(tmp_path: Path) -> None:
    run(tmp_path)
    assert [(r["step"], r["total_images"]) for r in rows(tmp_path)] == [(20, 160), (40, 320), (50, 400)]
    for row in rows(tmp_path):
        assert row["lr"] == learning_rate(SPEC, row["step"] - 1) and row["images_per_s"] > 0


def test_previews_see_the_averaged_weights_and_change_nothing(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    seen: dict[str, Tensor] = {}
    stage = linear_stage()

    def preview(network: nn.Module, path: Path) -> None:
        assert not network.training
        torch.randn(100)  # a preview may use the global generator
        seen[path.name] = network.weight.detach().clone()

    stage = Stage(network=stage.network, batch=stage.batch, loss=stage.loss, preview=preview)
    assert equal(run(tmp_path, stage, preview_every=20), unbroken)
    assert list(seen) == ["000020.png", "000040.png", "000050.png"]
    assert torch.equal(seen["000050.png"], unbroken["weight"])


def test_stages_of_one_run_may_differ_in_precision(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    run(tmp_path / "a", precision="bf16", steps=2)
    assert equal(run(tmp_path / "b"), unbroken)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_small_forward_passes_add_up_to_the_batch(tmp_path: Path, unbroken: dict[str, Tensor], size: int) -> None:
    parts = run(tmp_path, micro_batch_size=size)
    for key, value in unbroken.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-6)
    whole = split({"x": torch.arange(8), "t": torch.arange(8)}, 3)
    assert [(p["x"].tolist(), s) for p, s in whole] == [([0, 1, 2], 3 / 8), ([3, 4, 5], 3 / 8), ([6, 7], 2 / 8)]


# -- several processes -------------------------------------------------------------------------


def launch(folder: Path, *arguments: object, processes: int = 2, **spec: object) -> subprocess.CompletedProcess[str]:
    """This file as a program in so many processes, which talk by gloo."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [*launcher, __file__, str(folder), *map(str, arguments), json.dumps(spec)]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= 1e-6 for k in a)


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    run(tmp_path / "one")
    done = launch(tmp_path / "two", -1, 0, "step")
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [r["step"] for r in two] == [r["step"] for r in one] == [20, 40, 50]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # one process goes on where two stopped: nothing is left to do, and the weights are those of one
    assert close(run(tmp_path / "two"), unbroken)


@pytest.mark.parametrize(
    ("rank", "where", "fsdp"),
    [(0, "step", False), (1, "step", False), (0, "checkpoint", False), (1, "step", True), (0, "checkpoint", True)],
)
def test_a_killed_worker_of_two_loses_nothing(
    tmp_path: Path, unbroken: dict[str, Tensor], rank: int, where: str, fsdp: bool
) -> None:
    broken = launch(tmp_path, 33, rank, where, fsdp=fsdp)
    assert broken.returncode != 0
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 30 <= step <= 33
    assert (tmp_path / "checkpoint.tmp").exists() == (where == "checkpoint")
    done = launch(tmp_path, -1, 0, where, fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert close(run(tmp_path), unbroken)
    assert [r["step"] for r in rows(tmp_path)] == [20, 40, 50]


@pytest.mark.parametrize("kind", ["plain", "features"])
def test_a_network_shared_out_among_two_learns_what_one_learns(tmp_path: Path, tiny: Bundle, kind: str) -> None:
    tiny.unet.save_pretrained(tmp_path / "unet")
    stage = unet_stage(tmp_path / "unet", kind)
    one = train(stage, UNET, tmp_path / "one", seed=0, name="u")
    done = launch(tmp_path, -1, 0, kind, fsdp=True)
    assert done.returncode == 0, done.stderr
    two = unet_stage(tmp_path / "unet", kind).network
    before, batch = stage.loss(two, stage.batch(Draw(1, 0))), stage.batch(Draw(1, 0))
    two.load_state_dict(torch.load(tmp_path / "two.pt", weights_only=True))
    # of outputs, not weights: Adam makes a whole step of the rounding in a bias that a norm takes out again
    assert abs(stage.loss(two, batch) - stage.loss(one, batch)) < 1e-5 < abs(before - stage.loss(one, batch))
    for a, b in zip(rows(tmp_path), rows(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    # one process goes on from what two saved in parts
    more = msgspec.structs.replace(UNET, steps=UNET.steps + 2, lr_decay="constant")
    train(unet_stage(tmp_path / "unet", kind), more, tmp_path, seed=0, name="u")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == UNET.steps + 2


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(RecipeError, match="linear: batch_size=8 does not divide among 3 processes"):
        run(tmp_path)


# -- memory ------------------------------------------------------------------------------------


def test_activations_computed_anew_change_nothing(tmp_path: Path, tiny: Bundle) -> None:
    tiny.unet.save_pretrained(tmp_path / "unet")
    kept, both = [], []
    for anew in (False, True):
        spec = msgspec.structs.replace(UNET, gradient_checkpointing=anew)
        stage = unet_stage(tmp_path / "unet", "features")
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            both.append(train(stage, spec, tmp_path / str(anew), seed=0, name="u").state_dict())
        kept.append(sum(sizes))
    assert close(both[0], both[1]) and kept[1] < kept[0] / 2
    with pytest.raises(RecipeError, match="gradient_checkpointing is for U-Nets; Linear has none"):
        run(tmp_path, gradient_checkpointing=True)


def test_moments_in_eight_bits_learn_as_much_and_go_on(tmp_path: Path, tiny: Bundle) -> None:
    tiny.unet.save_pretrained(tmp_path / "unet")
    spec = msgspec.structs.replace(UNET, steps=30, optimiser="adamw-8bit", lr=1e-3, lr_decay="constant")

    def trained(folder: Path, spec: Train = spec) -> dict[str, Tensor]:
        return dict(train(unet_stage(tmp_path / "unet", "plain"), spec, folder, seed=0, name="u").state_dict())

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", msgspec.structs.replace(spec, steps=17))
    assert equal(trained(tmp_path / "parts"), whole)
    trained(tmp_path / "full", msgspec.structs.replace(spec, optimiser="adamw"))
    losses = [rows(tmp_path / k)[-1]["loss"] for k in ("full", "whole")]
    assert losses[1] == pytest.approx(losses[0], rel=0.2) and losses[1] < rows(tmp_path / "whole")[0]["loss"]
    sizes = [(tmp_path / k / "checkpoint.pt").stat().st_size for k in ("full", "whole")]
    assert sizes[1] < 0.75 * sizes[0]  # 4 × 4 bytes a weight against 2 × 4 + 2 × 1


def test_eight_bits_and_sharing_out_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="does not go with fsdp"):
        Train(steps=1, optimiser="adamw-8bit", fsdp=True)


# -- broken off --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 19, 20, 37, 49])
def test_interrupted_and_resumed_equals_unbroken(tmp_path: Path, unbroken: dict[str, Tensor], step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(step), checkpoint_minutes=ALWAYS)
    first: list[int] = []
    assert equal(run(tmp_path, linear_stage(first.append, start=step)), unbroken)
    assert first[0] == step and len(first) == SPEC.steps - step  # nothing is done twice
    assert [r["step"] for r in rows(tmp_path)] == [20, 40, 50]


def test_interrupted_again_and_again_equals_unbroken(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, interrupted(13), checkpoint_minutes=ALWAYS)
    assert equal(run(tmp_path), unbroken)


def test_without_a_checkpoint_it_starts_over_and_forgets_the_old_metrics(
    tmp_path: Path, unbroken: dict[str, Tensor]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(45))
    assert not (tmp_path / "checkpoint.pt").exists() and len(rows(tmp_path)) == 2
    assert equal(run(tmp_path), unbroken)
    assert [r["step"] for r in rows(tmp_path)] == [20, 40, 50]


def test_a_finished_run_is_only_read(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    run(tmp_path)

    def never(step: int) -> None:
        raise AssertionError("drew a batch")

    assert equal(run(tmp_path, linear_stage(never)), unbroken)


def test_killed_without_a_word_and_run_again_equals_unbroken(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "33", "0", "step", "{}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 33
    assert equal(run(tmp_path), unbroken)
    assert [r["step"] for r in rows(tmp_path)] == [20, 40, 50]


def test_a_kill_while_a_checkpoint_is_written_keeps_the_one_before(
    tmp_path: Path, unbroken: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = torch.save, iter(range(100))

    def half(state: dict, file: object) -> None:
        if next(count) < 10:
            real(state, file)
        else:
            file.write(b"PK half a checkpoint")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, checkpoint_minutes=ALWAYS)
    assert (tmp_path / "checkpoint.tmp").exists()
    first: list[int] = []
    assert equal(run(tmp_path, linear_stage(first.append, start=10)), unbroken)
    assert first[0] == 10 and len(first) == 40


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_names_the_file_and_the_way_out(tmp_path: Path, part: float) -> None:
    run(tmp_path, steps=2)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataError) as error:
        run(tmp_path)
    text = str(error.value)
    assert str(path) in text and "remove it" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"nonsense", {"step": 3}, {"step": 3, "model": nn.Linear(4, 4).state_dict()}, [1]])
def test_a_checkpoint_of_something_else_names_the_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError) as error:
        run(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    path = tmp_path / "checkpoint.pt"
    weight = torch.load(path, weights_only=True)["model"]["weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 5] ^= 0x10
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["step"] == 2  # torch itself does not look
    with pytest.raises(DataError, match=r"checksum of .* does not match"):
        run(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        filler = disk / "filler"

        def fill(step: int) -> None:
            if step == 20:
                with contextlib.suppress(OSError), filler.open("wb") as file:
                    while True:
                        file.write(bytes(512))
                        file.flush()

        with pytest.raises(DataError, match=r"cannot write the checkpoint of step 21 .* the one before it is whole"):
            run(disk, linear_stage(fill), checkpoint_minutes=ALWAYS)
        assert sorted(p.name for p in disk.iterdir()) == ["checkpoint.pt", "filler", "metrics.jsonl"]
        assert torch.load(disk / "checkpoint.pt", weights_only=True)["step"] == 20
        filler.unlink()
        assert equal(run(disk), unbroken)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_log_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20}\n{"step": 40}\n{"st')
    Log(path, 30, 50, Accelerator())
    assert rows(tmp_path) == [{"step": 20}]


def test_a_checkpoint_is_written_when_its_minutes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trainer, "save", lambda folder, network, ema, optimiser, step, write: saved.append(step))

    def at(step: int) -> None:
        now[0] += 20.0

    run(tmp_path, linear_stage(at), steps=30, checkpoint_minutes=3.0)
    assert saved == [10, 20, 30]


def main(folder: Path, killed: int, rank: int, where: str, changes: dict) -> None:
    """Train in this process; process `rank` kills itself at step `killed`, drawing its batch or writing its end."""
    if where in ("plain", "features"):
        spec = msgspec.structs.replace(UNET, **changes)
        network = train(unet_stage(folder / "unet", where), spec, folder, seed=0, name="u")
        if os.environ["RANK"] == "0":
            torch.save(network.state_dict(), folder / "two.pt")
        return
    mine, real = int(os.environ.get("RANK", 0)) == rank, torch.save

    def kill(step: int) -> None:
        if step == killed and mine and where == "step":
            os.kill(os.getpid(), signal.SIGKILL)

    def half(state: dict, file: Any) -> None:
        if state["step"] == killed:
            file.write(b"PK half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real(state, file)

    if mine and where == "checkpoint":
        torch.save = half
    run(folder, linear_stage(kill), checkpoint_minutes=ALWAYS, **changes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
    PartialState().destroy_process_group()
