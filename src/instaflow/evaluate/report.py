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
    metric, label = report["protocol"]["metric"], report["protocol"]["label"]
    for split in report["splits"]:
        values = {k: (m[split][metric], *m[split][f"{metric}_95"]) for k, m in report["models"].items()}
        bars(values, split.capitalize(), folder / f"fd-{split}.png", f"{label} (lower is better)")
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
    lines += [
        f"- {k.replace('_', ' ')}: {v}" for k, v in protocol.items() if k not in ("name", "version", "metric", "label")
    ]
    lines += [f"- count: {report['count']} pictures a model and split, first seed {report['first_seed']}", ""]
    for split in report["splits"]:
        lines += _distances(report, split)
    if report["differences"]:
        lines += _differences(report)
    lines += _use(report)
    for what in ("steps", "guidance"):
        lines += _curve(report, what)
    return "\n".join(lines) + "\n"


COLUMNS = {
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "r_at_1": "R@1",
    "r_at_5": "R@5",
    "clip_score": "CLIP score",
    "diversity": "diversity",
}


def _distances(report: dict[str, Any], split: str) -> list[str]:
    metric, label = report["protocol"]["metric"], report["protocol"]["label"]
    there = [k for k in COLUMNS if any(k in m[split] for m in report["models"].values())]
    lines = [f"## {split.capitalize()}", "", f"Two halves of the real pictures are {report['floor'][split]} apart in"]
    lines[-1] += f" {label}: the floor. Intervals are 95 % bootstrap."
    if "chance_r_at_5" in report:
        lines[-1] += f" Chance R@5 is {report['chance_r_at_5'][split]}."
    lines += [
        "",
        f"| model | {label} | " + " | ".join(COLUMNS[k] for k in there) + " |",
        "|---|" + "---|" * (len(there) + 1),
    ]
    for name, model in report["models"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(model[split], k) for k in (metric, *there)) + " |")
    return [*lines, ""]


def _cell(figures: dict[str, Any], key: str) -> str:
    value, ends = figures.get(key), figures.get(f"{key}_95")
    return "–" if value is None else f"{value} {_range(ends)}" if ends else f"{value}"


def _differences(report: dict[str, Any]) -> list[str]:
    label = report["protocol"]["label"]
    lines = ["## Differences", "", f"{label} of the first less that of the second, against the same real pictures.", ""]
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
    split = report["splits"][0]
    lines = [
        f"## {report['protocol']['label']} against {what}",
        "",
        f"{split}, {report['curve_count']} pictures a point.",
        "",
    ]
    lines += [f"| {what} | " + " | ".join(f"{x:g}" for x in xs) + " |", "|---|" + "---|" * len(xs)]
    for name, points in found.items():
        cells = [f"{points[x][1]} {_range(points[x][2:])}" if x in points else "" for x in xs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _range(ends: list[float]) -> str:
    return f"[{ends[0]}, {ends[1]}]"
