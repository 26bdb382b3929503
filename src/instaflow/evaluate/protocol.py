"""`evaluate`: models side by side under one pinned protocol, as a report.

The same prompts and the same noises for every model, in the styles that the first one knows. Everything that a
number depends on stands in the protocol and is printed with it; numbers of two protocols or versions never meet
in one column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from instaflow.errors import PromptError
from instaflow.evaluate.distances import interval
from instaflow.evaluate.drawing import Entrant, Task, draw_once
from instaflow.evaluate.field import Field, Ruler
from instaflow.evaluate.heldout import STYLES
from instaflow.evaluate.profile import latency, peak_memory, straightness_along
from instaflow.evaluate.report import write
from instaflow.models.bundle import Bundle
from instaflow.models.card import read_card, write_card
from instaflow.models.hub import locate

GRID_COLUMNS = 10
CURVE_STEPS = (1, 2, 4, 8, 25)
CURVE_GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)


def entrant(label: str, find: Callable[[str], Path] = locate) -> Entrant:
    """A model as it is named, 'folder' or 'folder@steps', at its own guidance.

    Raises:
        BundleError: no such model.
        PromptError: steps that this kind of model cannot do.
    """
    name, _, steps = label.rpartition("@") if re.search(r"@[1-9][0-9]*$", label) else (label, "", "")
    folder = find(name)
    card = read_card(folder)
    if card.kind == "one-step" and steps not in ("", "1"):
        raise PromptError(f"{label}: steps={steps} is not allowed for the one-step model {card.name!r}; allowed: 1")
    shown = f"{card.name}@{steps}" if steps else card.name
    return Entrant(
        label=shown if "/" in label else label,
        folder=folder,
        steps=int(steps) if steps else card.steps,
        guidance=card.guidance,
    )


def heldout_data(first: Entrant) -> tuple[int, tuple[str, ...]]:
    """Size and styles of the pictures that `emoji-heldout` needs for models like this one."""
    card = read_card(first.folder)
    return card.image_size, tuple(sorted({*STYLES, *card.styles}))


def evaluate(
    field: Field,
    entrants: Sequence[Entrant],
    folder: Path,
    *,
    curve_count: int = 0,
    made: Path | None = None,
    device: str = "cpu",
    workers: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure models side by side and write report.json, report.md and plots into `folder`.

    Pictures already drawn are kept in `folder/drawn`; run again after an interruption and they are not drawn anew.

    Args:
        field: the protocol with its pictures.
        entrants: the models, each with steps and guidance.
        folder: where the report goes.
        curve_count: pictures at each point of the curves over steps and guidance; 0 draws no curves.
        made: where this run puts its models; figures of those go into their cards too, others are left as they are.
        device: where to draw.
        workers: (number of this process, how many there are); they share the drawing, and the first one
            measures. The others return an empty report.
        wait: returns once every process has called it.
    """
    load = lru_cache(maxsize=2)(partial(Bundle.load, device=device))
    splits, points = field.splits, curve_points(entrants) if curve_count else []
    drawn, curve_task = folder / "drawn", splits[0].part(0, curve_count)
    jobs: list[tuple[Entrant, Task]] = [(e, s) for e in entrants for s in splits]
    jobs += [(p, curve_task) for p in points]
    rank, processes = workers
    for number, (entrant, task) in enumerate(jobs):  # small tasks are one chunk: they go round
        draw_once(load(entrant.folder), entrant, task, drawn, ((rank + number) % processes, processes))
    wait()
    if rank:
        return {}

    rulers = field.rulers()
    report: dict[str, Any] = {
        "protocol": msgspec.to_builtins(field.protocol),
        "count": len(splits[0].prompts),
        "first_seed": splits[0].seeds[0],
        **field.said,
        "splits": [s.name for s in splits],
        "floor": {s.name: r.floor() for s, r in zip(splits, rulers, strict=True)},
        "models": dict(field.reference(rulers)),
    }
    rows: dict[str, np.ndarray] = {}
    features: dict[str, list[np.ndarray]] = {}
    each = GRID_COLUMNS // len(splits)
    for entrant in entrants:
        bundle = load(entrant.folder)
        pictures = [draw_once(bundle, entrant, split, drawn) for split in splits]
        features[entrant.label] = [ruler.extract(p) for ruler, p in zip(rulers, pictures, strict=True)]
        entry: dict[str, Any] = {
            "kind": bundle.card.kind,
            "steps": entrant.steps,
            "guidance": entrant.guidance,
            "straightness": straightness_along(bundle, splits[0]),
            "latency": latency(bundle, entrant, splits[0].prompts[0]),
            "memory": peak_memory(entrant, splits[0].prompts[0], device),
        }
        for split, ruler, seen, found in zip(splits, rulers, pictures, features[entrant.label], strict=True):
            entry[split.name] = ruler.measure(seen, found)
        rows[entrant.label] = np.concatenate([p[:each] for p in pictures])
        report["models"][entrant.label] = entry
        own = made is not None and entrant.folder.resolve().is_relative_to(made.resolve())
        if own and entrant.steps == bundle.card.steps:  # as it is used
            results = {"protocol": f"{field.protocol.name}, version {field.protocol.version}", **entry}
            write_card(entrant.folder, msgspec.structs.replace(read_card(entrant.folder), results=results))
    report["differences"] = differences(features, splits, rulers)
    report["curves"], report["curve_count"] = measure_curves(points, curve_task, rulers[0], drawn, load), curve_count
    write(report, rows, [p for s in splits for p in s.prompts[:each]], folder)
    return report


def differences(
    features: dict[str, list[np.ndarray]], splits: Sequence[Task], rulers: Sequence[Ruler]
) -> list[dict[str, Any]]:
    """Every later model against every earlier one."""
    labels = list(features)
    spread = {k: [r.replicates(f) for r, f in zip(rulers, features[k], strict=True)] for k in labels}
    pairs = []
    for i, of in enumerate(labels):
        for against in labels[:i]:
            gaps = [interval(a - b) for a, b in zip(spread[of], spread[against], strict=True)]
            found = {s.name: tuple(round(v, 2) for v in gap) for s, gap in zip(splits, gaps, strict=True)}
            pairs.append({"of": of, "against": against, **found})
    return pairs


def curve_points(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Each model once more at other steps, and at other guidance, as far as its kind allows."""
    points: dict[tuple[str, int, float], Entrant] = {}
    for entrant in {e.folder: e for e in reversed(entrants)}.values():
        card = read_card(entrant.folder)
        settings = [(card.steps, card.guidance)]
        if card.kind != "one-step":
            settings = [(s, card.guidance) for s in CURVE_STEPS]
            settings += [(card.steps, g) for g in CURVE_GUIDANCE if g <= card.max_guidance]
        for steps, guidance in settings:
            label = entrant.label.split("@")[0]
            point = Entrant(label=label, folder=entrant.folder, steps=steps, guidance=guidance)
            points[label, steps, guidance] = point
    return list(points.values())


def measure_curves(
    points: Sequence[Entrant], task: Task, ruler: Ruler, folder: Path, load: Callable[[Path], Bundle]
) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """label → 'steps' and 'guidance' → [(x, FD, low, high), …], each at the other's default."""
    curves: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for point in points:
        bundle = load(point.folder)
        value = ruler.distance(draw_once(bundle, point, task, folder))
        both = curves.setdefault(point.label, {"steps": [], "guidance": []})
        if point.guidance == bundle.card.guidance:
            both["steps"].append((point.steps, *value))
        if point.steps == bundle.card.steps:
            both["guidance"].append((point.guidance, *value))
    return {k: {what: sorted(v) for what, v in both.items()} for k, both in curves.items()}
