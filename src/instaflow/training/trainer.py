"""The one training loop. A stage is a source of batches plus a loss; everything else is here.

Every batch is a pure function of (seed, step): noise, times, captions and the choice of samples come
from a generator seeded with both. So the data cursor is the step, a resumed run sees what the
unbroken one would have seen, and several processes slice the same global batch.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from instaflow.errors import DataError, RecipeError
from instaflow.recipe import Train
from instaflow.training.checkpoint import restore, save
from instaflow.training.memory import build_optimiser, fewer_activations, layout, learning, sharded, unshard

Batch = dict[str, Tensor]


T = TypeVar("T", Tensor, list[int], list[str], list[bool])


class Draw:
    """Every random choice of one training step, for the global batch; `own` is this process's part of it."""

    def __init__(self, seed: int, step: int, part: tuple[int, int] = (0, 1)) -> None:
        """Seed Python's and torch's generators with (seed, step); part is (number of this process, how many)."""
        self.seed, self.step, self.part = seed, step, part
        self.python = random.Random(f"{seed}:{step}")
        self.torch = torch.Generator().manual_seed(self.python.getrandbits(63))

    def own(self, batch: T) -> T:
        """This process's samples of something drawn for the global batch; do the work on them alone."""
        rank, size = self.part
        return batch[rank::size]

    def indices(self, n: int, count: int) -> list[int]:
        """`count` indices below `n`, with replacement."""
        return torch.randint(n, (count,), generator=self.torch).tolist()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self.torch)

    def uniform(self, count: int) -> Tensor:
        """Uniform in [0, 1), (count,)."""
        return torch.rand(count, generator=self.torch)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage adds to the loop.

    batch: this process's part of a step's batch, tensors that all start with the batch dimension.
    loss: a scalar from the network and that part.
    preview: saves a sample grid of the (averaged) network to a path.
    """

    network: nn.Module
    batch: Callable[[Draw], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    preview: Callable[[nn.Module, Path], None] | None = None


def learning_rate(spec: Train, step: int) -> float:
    """Linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, spec.lr_warmup_steps))
    if spec.lr_decay == "constant":
        return spec.lr * warm
    left = max(0.0, step - spec.lr_warmup_steps) / max(1, spec.steps - spec.lr_warmup_steps)
    return spec.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, left)))


def train(stage: Stage, spec: Train, folder: Path, *, seed: int, name: str) -> nn.Module:
    """Train to `spec.steps` and return the network with its averaged weights, on the CPU or device it was on.

    Runs again from `folder/checkpoint.pt` when there is one; the result is that of an unbroken run.
    """
    # -- set up -----------------------------------------------------------------------------
    folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # it would keep the precision of the run's first stage
    accelerator = Accelerator(mixed_precision=spec.precision)
    plain: Any = stage.network.train().to(accelerator.device)
    plain = plain.to(memory_format=layout(spec))
    if spec.gradient_checkpointing:
        fewer_activations(plain, name)
    rank, size = accelerator.process_index, accelerator.num_processes
    if spec.batch_size % size:
        raise RecipeError(f"{name}: batch_size={spec.batch_size} does not divide among {size} processes")
    shared_out = spec.fsdp and size > 1
    if shared_out:
        plain = sharded(plain)
    ema = EMAModel(learning(plain), decay=spec.ema, use_ema_warmup=True, power=2 / 3)
    optimiser = build_optimiser(plain, spec)
    start = restore(folder, plain, ema, optimiser)
    log = Log(folder / "metrics.jsonl", start, spec.steps, accelerator)
    network, optimiser = plain if shared_out else accelerator.prepare(plain), accelerator.prepare(optimiser)
    if spec.compile:
        network = torch.compile(network)  # previews and saving use the plain one
    saved = time.monotonic()

    with progress(accelerator.is_main_process) as bar:
        task = bar.add_task(name, total=spec.steps, completed=start, loss="")
        for step in range(start, spec.steps):
            # -- one step: draw, predict, compare, update ------------------------------------
            drawn = stage.batch(Draw(seed, step, part=(rank, size)))
            batch = {k: v.to(accelerator.device) for k, v in drawn.items()}
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(spec, step)
            parts, loss = split(batch, spec.micro_batch_size), torch.zeros((), device=accelerator.device)
            for i, (part, share) in enumerate(parts):
                # processes exchange gradients once a step
                with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(network):
                    with accelerator.autocast():
                        error = share * stage.loss(network, part)
                    accelerator.backward(error)
                loss += error.detach()
            accelerator.clip_grad_norm_(network.parameters(), spec.grad_clip)
            optimiser.step()
            optimiser.zero_grad()
            ema.step(learning(plain))

            # -- now and then ----------------------------------------------------------------
            done = step + 1
            log.add(done, loss, learning_rate(spec, step), spec.batch_size)
            bar.update(task, completed=done, loss="" if math.isnan(log.loss) else f"loss {log.loss:.4f}")
            last = done == spec.steps
            due = last or time.monotonic() - saved > 60 * spec.checkpoint_minutes
            if shared_out:  # each process holds a part: all save, when the first one's clock says so
                due = bool(broadcast(torch.tensor(due, device=accelerator.device)))
            elif not accelerator.is_main_process:
                continue
            if due:
                save(folder, plain, ema, optimiser, done, write=accelerator.is_main_process)
                saved = time.monotonic()
            if stage.preview and not shared_out and (last or done % spec.preview_every == 0):
                ema.store(learning(plain))
                ema.copy_to(learning(plain))
                stage.preview(plain.eval(), folder / "samples" / f"{done:06d}.png")
                plain.train()
                ema.restore(learning(plain))

    ema.copy_to(learning(plain))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    if shared_out:
        plain = unshard(plain, stage.network)
    return plain.eval().requires_grad_(False)


def split(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """Parts of at most `size` samples (0: one part), each with its share of the batch."""
    count = len(next(iter(batch.values())))
    size = size or count
    starts = range(0, count, size)
    return [({k: v[i : i + size] for k, v in batch.items()}, min(size, count - i) / count) for i in starts]


# -- what a person watches -------------------------------------------------------------------------


class Log:
    """`metrics.jsonl`, a line every `every` steps and at the last; on resuming, lines past the checkpoint go."""

    def __init__(self, path: Path, start: int, last: int, accelerator: Accelerator, every: int = 20) -> None:
        """Open for appending after step `start`; the main process writes the mean over all of them."""
        if accelerator.is_main_process:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _step(line) <= start]
            path.write_text("".join(f"{line}\n" for line in kept))
        self.path, self.last, self.every, self.accelerator = path, last, every, accelerator
        self.losses: list[Tensor] = []
        self.loss, self.since = float("nan"), time.monotonic()

    def add(self, step: int, loss: Tensor, lr: float, images: int) -> None:
        """Take in one step; every so often write the mean and the speed."""
        self.losses.append(loss.detach())
        if step % self.every and step != self.last:
            return
        mean: Any = self.accelerator.reduce(torch.stack(self.losses).float().mean(), "mean")
        self.loss = mean.item()
        if not math.isfinite(self.loss):
            raise DataError(f"{self.path.parent.name}: the loss is {self.loss} at step {step}; lower lr or grad_clip")
        seconds = time.monotonic() - self.since
        row = {
            "step": step,
            "total_images": step * images,
            "loss": round(self.loss, 6),
            "lr": lr,
            "images_per_s": round(len(self.losses) * images / seconds, 2),
        }
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.losses, self.since = [], time.monotonic()


def _step(line: str) -> float:
    """The step of a log line; a line torn by a crash counts as past every checkpoint."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def progress(shown: bool) -> Progress:
    """A bar with the loss, the step and the time left."""
    return Progress(
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
