"""Reflow and distillation in two dimensions: from noise to two moons, on one core in under a minute.

    python examples/two_moons.py                # a table, and two_moons.png

InstaFlow's finding, small enough to see. A flow trained on random noise–data pairs has curved
paths, so one Euler step lands off the moons. Pair every noise with the point that this flow draws
from it, train again (*reflow*), and the paths come out straight. A one-step student then copies its
teacher's map from noise to data (*distillation*), from each flow, for a short time and a long one.
What to see: reflow itself already makes one step good, so its student is ahead after a short
distillation. After a long one the two students are even, and the direct one was spared a stage: a map
of the plane is easy to copy. That direct distillation fails is a finding on pictures (the paper's
ablation); these points neither show nor refute it.

Every stage below is one call of `train`: a source of pairs, and the times at which to regress.
Not here: prompts, guidance, and everything a picture needs.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from torch import Tensor, nn

from instaflow.flow import Velocity, euler, interpolate, straightness, velocity_target

BATCH = 512
TEACHER_STEPS = 50  # Euler steps that draw the pairs
FINE_STEPS = 100  # Euler steps that stand for the exact ODE when we measure
SAMPLES = 16384  # points on each side of a measured distance
INK, PALE, UPPER, LOWER = "#22223b", "#d9d9e0", "#3d6fb4", "#e07a3f"

PairSource = Callable[[], tuple[Tensor, Tensor]]
TimeSource = Callable[[int], Tensor]


class Field(nn.Module):
    """A velocity field v(z, t) in the plane: a small multilayer perceptron."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z: (B, 2), t: (B,) → (B, 2)."""
        return self.layers(torch.cat([z, t[:, None]], dim=1))


def two_moons(n: int) -> Tensor:
    """(n, 2) points on two interleaved half circles, centred on the origin."""
    angle, upper = torch.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return 2.0 * (torch.stack([x, y], dim=1) + 0.05 * torch.randn(n, 2))


def train(field: Field, pairs: PairSource, times: TimeSource, steps: int) -> Field:
    """Regress v on X₁ − X₀ along straight paths between the pairs; the loss of every stage."""
    optimiser = torch.optim.Adam(field.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0, x1 = pairs()
        t = times(len(x0))
        loss = (velocity_target(x0, x1) - field(interpolate(x0, x1, t), t)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return field.requires_grad_(False)


def random_pairs() -> tuple[Tensor, Tensor]:
    """Noise and data that know nothing of each other."""
    return torch.randn(BATCH, 2), two_moons(BATCH)


def pairs_of(teacher: Velocity, n: int = 40 * BATCH) -> PairSource:
    """(X₀, ODE[v](X₀)): what the teacher draws from a noise, drawn once and resampled in batches."""
    x0 = torch.randn(n, 2)
    x1 = euler(teacher, x0, TEACHER_STEPS)

    def pairs() -> tuple[Tensor, Tensor]:
        rows = torch.randint(n, (BATCH,))
        return x0[rows], x1[rows]

    return pairs


def reflow(teacher: Field, steps: int) -> Field:
    """Text-conditioned reflow without the text (InstaFlow, Alg. 1): the teacher's own pairs, all times."""
    return train(copy.deepcopy(teacher).requires_grad_(True), pairs_of(teacher), torch.rand, steps)


def distil(teacher: Field, steps: int) -> Field:
    """Distillation (InstaFlow, Alg. 2): the teacher's own pairs at t = 0 alone, so that X₀ + v(X₀, 0) ≈ X₁."""
    return train(copy.deepcopy(teacher).requires_grad_(True), pairs_of(teacher), torch.zeros, steps)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 180) -> float:
    """Root mean square over directions of the 1-D Wasserstein-2 distance between a, b: (n, 2)."""
    angle = torch.arange(directions) * torch.pi / directions
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((a @ axes).sort(dim=0).values - (b @ axes).sort(dim=0).values).square().mean().sqrt().item()


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    name: str
    steps: int
    straightness: float | None
    """Of the model's paths; 0 is straight. None for a one-step model, which has no path."""
    distance: float
    """Sliced Wasserstein distance of its samples to the data."""
    samples: Tensor
    """(SAMPLES, 2)."""


def measure(name: str, field: Field, steps: int, *, x0: Tensor, data: Tensor, has_path: bool = True) -> Result:
    """Draw from x0 in `steps` Euler steps and compare with the data."""
    samples = euler(field, x0, steps)
    curve = straightness(field, x0, FINE_STEPS).mean().item() if has_path else None
    return Result(
        name=name, steps=steps, straightness=curve, distance=sliced_wasserstein(samples, data), samples=samples
    )


def table(results: list[Result], floor: float) -> str:
    """The results as text."""
    lines = [f"{'model':<24}{'steps':>6}{'straightness ↓':>17}{'distance to data ↓':>21}"]
    for r in results:
        curve = "–" if r.straightness is None else f"{r.straightness:.4f}"
        lines.append(f"{r.name:<24}{r.steps:>6}{curve:>17}{r.distance:>21.3f}")
    return "\n".join([*lines, f"{'(data against data)':<24}{'':>23}{floor:>21.3f}"])


def plot(one: Field, two: Field, results: list[Result], data: Tensor, out: Path) -> None:
    """Paths above, one-step samples below."""
    noise, (_, ends) = torch.randn(200, 2), random_pairs()
    bend = {r.name: r.straightness for r in results}
    paths = {
        "random pairs: straight lines that cross": torch.stack([noise, ends[: len(noise)]]),
        f"1-RF: paths that bend, S = {bend['1-RF']:.2g}": euler(one, noise, FINE_STEPS, path=True),
        f"2-RF: straight paths, S = {bend['2-RF']:.2g}": euler(two, noise, FINE_STEPS, path=True),
    }
    samples = [r for r in results if r.steps == 1]

    figure = Figure(figsize=(14, 7.4))
    above = figure.add_gridspec(1, len(paths), left=0.01, right=0.99, top=0.89, bottom=0.42, wspace=0.03)
    below = figure.add_gridspec(1, len(samples), left=0.01, right=0.99, top=0.31, bottom=0.03, wspace=0.04)
    heading = {"fontsize": 15, "weight": "bold", "color": INK}
    figure.text(0.01, 0.955, "Reflow straightens the way from noise (black) to data (colour)", **heading)
    figure.text(0.01, 0.365, "One step of each model, over the data (grey)", **heading)

    for place, (title, states) in zip(above, paths.items(), strict=True):
        axis, colours = panel(figure, place, title, half_height=2.75), moon_colours(states[-1])
        axis.add_collection(LineCollection(list(states.transpose(0, 1).numpy()), colors=colours, lw=0.9, alpha=0.55))
        axis.scatter(*states[0].T, s=8, color=INK, lw=0, zorder=2)
        axis.scatter(*states[-1].T, s=20, c=colours, lw=0.5, edgecolor="white", zorder=3)
    for place, r in zip(below, samples, strict=True):
        axis = panel(figure, place, f"{r.name}: {r.distance:.3f} from the data", half_height=2.2)
        axis.scatter(*data[:1500].T, s=8, color=PALE, lw=0)
        axis.scatter(*r.samples[:1000].T, s=5, c=moon_colours(r.samples[:1000]), lw=0)
    figure.savefig(out, dpi=130)


def panel(figure: Figure, place: SubplotSpec, title: str, *, half_height: float) -> Axes:
    """A bare frame with the same scale on both axes."""
    axis = figure.add_subplot(place, xlim=(-3.6, 3.6), ylim=(-half_height, half_height), xticks=[], yticks=[])
    axis.set_aspect("equal")
    axis.set_title(title, fontsize=11.5, color=INK)
    axis.spines[:].set_color("#c8c8d0")
    return axis


def moon_colours(points: Tensor) -> list[str]:
    """A colour for each of (n, 2) points: which moon's arc is nearer."""
    x, y = (points / 2).T
    to_upper = (torch.hypot(x + 0.5, (y + 0.25).clamp(min=0)) - 1).abs() + (-y - 0.25).clamp(min=0)
    to_lower = (torch.hypot(x - 0.5, (y - 0.25).clamp(max=0)) - 1).abs() + (y - 0.25).clamp(min=0)
    return [UPPER if upper else LOWER for upper in (to_upper < to_lower).tolist()]


def main(argv: list[str] | None = None) -> list[Result]:
    """Train the flows and their students, print the table, save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("two_moons.png"), help="where the plot goes")
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps of a stage; a short distillation has a fortieth"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be ≥ 1, got {args.steps}")

    torch.manual_seed(0)
    began = time.perf_counter()
    one = train(Field(), random_pairs, torch.rand, args.steps)
    two = reflow(one, args.steps)
    short = math.ceil(args.steps / 40)

    x0, data = torch.randn(SAMPLES, 2), two_moons(SAMPLES)
    results = [
        measure("1-RF", one, FINE_STEPS, x0=x0, data=data),
        measure("1-RF", one, 1, x0=x0, data=data),
        measure("2-RF", two, 1, x0=x0, data=data),
    ]
    for steps in (short, args.steps):
        for teacher, field in (("1-RF", one), ("2-RF", two)):
            name = f"{teacher} distilled × {steps}"
            results.append(measure(name, distil(field, steps), 1, x0=x0, data=data, has_path=False))
    print(table(results, floor=sliced_wasserstein(two_moons(SAMPLES), data)))
    plot(one, two, results[:5], data, args.out)
    print(f"{args.out} in {time.perf_counter() - began:.0f} s")
    return results


if __name__ == "__main__":
    main()
