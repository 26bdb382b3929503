"""A report in four forms: JSON for programs, Markdown for people, plots for the eye, and the model's own card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instaflow.evaluate.plots import bars, curves, grid


def write(report: dict[str, Any], rows: Mapping[str, np.ndarray], captions: list[str], folder: Path) -> None:
    """report.json, report.md and the plots that the report has figures for; JSON last: it marks the stage as done.

    Args:
        report: what `evaluate` measured.
        rows: pictures of each model for the grid, uint8 (N, H, W, 3).
        captions: N prompts of these.
        folder: where all of it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid(rows, captions, folder / "grid.png")
    for split in report["splits"]:
        values = {k: (m[split]["fd_lite0"], *m[split]["fd_lite0_95"]) for k, m in report["models"].items()}
        bars(values, f"{split.capitalize()} concepts", folder / f"fd-{split}.png")
    label = "Fréchet distance on Lite0 features"
    for what, x in (("steps", "network evaluations"), ("guidance", "guidance")):
        found = {k: points[what] for k, points in report["curves"].items() if len(points.get(what, [])) > 0}
        if any(len(points) > 1 for points in found.values()):
            curves(found, folder / f"fd-{what}.png", x=x, y=label, logarithmic=what == "steps")
    flows = {k: m for k, m in report["models"].items() if m.get("kind") in ("teacher", "rectified")}
    along = {k.split("@")[0]: m["straightness"]["along_t"] for k, m in flows.items()}
    if along:
        series = {k: [(i / len(v), s, s, s) for i, s in enumerate(v)] for k, v in along.items()}
        curves(series, folder / "straightness.png", x="t, from noise to picture", y="‖(Z₁ − Z₀) − v(Z_t, t)‖²")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    part = folder / "report.tmp"
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "report.json")


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    protocol = report["protocol"]
    lines = [f"# {protocol['name']}, version {protocol['version']}", ""]
    lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in protocol.items() if k not in ("name", "version")]
    lines += [f"- drawn: {report['count']} pictures a model and split, first seed {report['seed']}", ""]
    for split in report["splits"]:
        lines += _distances(report, split)
    if report["differences"]:
        lines += _differences(report)
    lines += _use(report)
    for what in ("steps", "guidance"):
        lines += _curve(report, what)
    return "\n".join(lines) + "\n"


def _distances(report: dict[str, Any], split: str) -> list[str]:
    floor, chance = report["floor"][split], report["chance_r_at_5"][split]
    lines = [
        f"## {split.capitalize()} concepts",
        "",
        f"Two halves of the real pictures are {floor['fd_lite0']} apart (KID {floor['kid_lite0']}): the floor. "
        f"Chance R@5 is {chance}. Intervals are 95 % bootstrap.",
        "",
        "| model | FD-Lite0 | KID | precision / recall | R@1 / R@5 | diversity |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in report["models"].items():
        m = model[split]
        lines.append(
            f"| {name} | {m['fd_lite0']} {_range(m['fd_lite0_95'])} | {m['kid_lite0']} {_range(m['kid_lite0_95'])} "
            f"| {m['precision']} / {m['recall']} | {m['r_at_1']} / {m['r_at_5']} "
            f"| {'–' if m['diversity'] is None else m['diversity']} |"
        )
    return [*lines, ""]


def _differences(report: dict[str, Any]) -> list[str]:
    lines = ["## Differences", "", "FD-Lite0 of the first less that of the second, against the same real pictures.", ""]
    lines += ["| | " + " | ".join(report["splits"]) + " |", "|---|" + "---|" * len(report["splits"])]
    for pair in report["differences"]:
        cells = []
        for split in report["splits"]:
            value, low, high = pair[split]
            word = "no difference" if low <= 0 <= high else ("worse" if value > 0 else "better")
            cells.append(f"{value} {_range([low, high])}: {word}")
        lines.append(f"| {pair['of']} against {pair['against']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _use(report: dict[str, Any]) -> list[str]:
    lines = ["## Steps, straightness, time, memory", ""]
    lines += ["| model | steps | guidance | S(Z) | ms, p50 / p95 | MB |", "|---|---|---|---|---|---|"]
    for name, m in report["models"].items():
        if "latency" in m:
            s, t = m["straightness"], m["latency"]
            memory = m["memory"]["gpu_mb"] or m["memory"]["resident_mb"]
            lines.append(
                f"| {name} | {m['steps']} | {m['guidance']:g} | {s['mean']} ± {s['standard_error']} "
                f"| {t['p50_ms']} / {t['p95_ms']} | {memory} |"
            )
    return [*lines, ""]


def _curve(report: dict[str, Any], what: str) -> list[str]:
    found = {k: {p[0]: p for p in v[what]} for k, v in report["curves"].items() if len(v.get(what, [])) > 1}
    if not found:
        return []
    xs = sorted({x for points in found.values() for x in points})
    lines = [f"## FD-Lite0 against {what}", "", f"Unseen concepts, {report['curve_count']} pictures a point.", ""]
    lines += [f"| {what} | " + " | ".join(f"{x:g}" for x in xs) + " |", "|---|" + "---|" * len(xs)]
    for name, points in found.items():
        cells = [f"{points[x][1]} {_range(points[x][2:])}" if x in points else "" for x in xs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _range(ends: list[float]) -> str:
    return f"[{ends[0]}, {ends[1]}]"
