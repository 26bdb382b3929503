"""Verbs that draw and look: generate, bench, inspect."""

from __future__ import annotations

import re
import secrets
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from instaflow.cli.app import Compiled, Device, Engine, Precision, Whole, app, hush, whole
from instaflow.errors import DataError, PromptError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from instaflow.generate import Drawing, InstaFlow

SAVING = 2  # pictures written at a time
MOST = 100_000  # pictures of a prompt in one command
SUFFIXES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # of pictures that we do not write


@app.command
def generate(
    *prompts: str,
    file: Annotated[Path | None, Parameter(name=["--file", "-f"])] = None,
    number: Annotated[int, Parameter(name=["--number", "-n"], converter=whole)] = 1,
    seed: Whole | None = None,
    style: str | None = None,
    size: Whole | None = None,
    steps: Whole | None = None,
    guidance: float | None = None,
    negative: str = "",
    safety: bool = True,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    grid: bool = False,
    model: str | None = None,
    lora: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    lora_scale: float = 1.0,
    device: Device = "cpu",
    engine: Engine = None,
    precision: Precision = None,
    decoder: str | None = None,
    compiled: Compiled = False,
    control: Annotated[list[str] | None, Parameter(negative="")] = None,
    control_scale: float = 1.0,
) -> None:
    """Draw pictures from sentences.

    ```
    instaflow generate "a red apple"
    instaflow generate "a red apple" "a green tree" -n 4 --seed 7 --grid -o sheet.png
    instaflow generate "cat" --style noto
    instaflow generate --file prompts.txt -o pictures/
    instaflow generate "a blue fish" --control edges=sketch.png --control-scale 0.8
    ```

    Parameters
    ----------
    prompts
        What to draw, one picture each.
    file
        A text file with one prompt a line, or Parquet with a column prompt, text or caption.
    number
        Pictures of each prompt, with seeds seed, seed+1, …
    seed
        First seed; the same prompt and seed give the same bytes. Left out, one is drawn and printed.
    style
        A drawing style that the model knows.
    size
        Side in pixels; left out, the model's own.
    steps
        Network evaluations a picture; a one-step model takes 1.
    guidance
        Classifier-free guidance; a one-step model takes 1.
    negative
        What guidance leads away from; needs guidance above 1.
    safety
        Run the model's own safety checker, when it has one.
    out
        A .png file for one picture or a grid, or a folder.
    grid
        All pictures on one sheet, a row a prompt.
    model
        A folder, a hub id (owner/name) or a Stable Diffusion 1.x .safetensors file; left out, the default model.
    lora
        A LoRA for that model, a .safetensors file or a hub id, at a scale with '=0.7' behind it; may be repeated.
    lora_scale
        How much of the LoRAs counts, times the scale of each, usually 0 to 1.
    decoder
        A tiny decoder in place of the model's own: a folder or hub id (TAESD), or what a decoder stage made.
    control
        NAME=PICTURE: a ControlNet and what it is shown, edges=sketch.png (white lines on black); NAME is one that comes
        with the default model, a folder or a hub id. Give it again for several.
    control_scale
        How much the controls count; 0 is the model without them.
    """
    if control_scale != 1.0 and not control:
        raise PromptError(
            f"--control-scale={control_scale:g} is for a control, and there is none: --control NAME=PICTURE"
        )
    texts = [*prompts, *(_read_prompts(file) if file else [])]
    if not texts:
        raise PromptError("no prompt: say what to draw, for example instaflow generate 'a red apple'")
    if not 1 <= number <= MOST:
        raise PromptError(f"--number={number} is not allowed; use 1 to {MOST}")
    first = secrets.randbelow(2**31) if seed is None else seed
    wanted = [(text, first + i) for text in texts for i in range(number)]
    paths = _paths(wanted, out, grid)

    from instaflow.models.request import Control, read_image
    from instaflow.runtime.loading import engine_for

    shown = _read_controls(control or [])
    if shown:
        able = engine_for(model, [folder for folder, _ in shown], size)
        engine = engine or able
    options: dict[str, Any] = {"device": device, "engine": engine, "precision": precision, "compiled": compiled}
    flow = _load(model, lora=lora, safety=safety, decoder=decoder, **options)
    drawings = flow.generate_many(
        [t for t, _ in wanted],
        seeds=[s for _, s in wanted],
        style=style,
        size=size,
        steps=steps,
        guidance=guidance,
        negative=negative,
        lora_scale=lora_scale,
        control=[
            Control(
                network=flow.engine.load_control(folder),
                name=folder.name,
                image=read_image(picture),
                scale=control_scale,
            )
            for folder, picture in shown
        ],
    )
    own = flow.engine.card.image_size
    if size not in (None, own):
        print(f"note: {flow.engine.card.name} learnt at {own} pixels; at {size} it repeats itself", file=sys.stderr)
    from rich.progress import track

    quiet = len(wanted) == 1 or not sys.stderr.isatty()
    shown_on = track(drawings, "drawing", total=len(wanted), disable=quiet)
    if grid:
        _save_sheet([*shown_on], paths[0], columns=number if number > 1 else 8)
        return
    for path, drawing in _saved(shown_on, paths):
        _say(path, drawing)


def _load(model: str | None, **options: Any) -> InstaFlow:
    hush()
    from instaflow.generate import InstaFlow

    flow = InstaFlow.load(model, **options)
    if flow.engine.card.image_size <= 128:
        flow.generate("warm up")  # so that the time printed is that of the picture, not of loading
    return flow


def _saved(drawings: Iterable[Drawing], paths: list[Path]) -> Iterator[tuple[Path, Drawing]]:
    """Each drawing once it is on the disk; PNGs are packed while the next are drawn."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(SAVING) as pool:
        begun: deque[tuple[Future[Path], Drawing]] = deque()
        for drawing, path in zip(drawings, paths, strict=True):
            begun.append((pool.submit(drawing.save, path), drawing))
            if len(begun) > SAVING:
                written, first = begun.popleft()
                yield written.result(), first
        for written, drawing in begun:
            yield written.result(), drawing


def _read_controls(given: list[str]) -> list[tuple[Path, str]]:
    """The folder and the picture of each."""
    from instaflow.models.hub import find_control

    found = []
    for entry in given:
        name, _, picture = entry.partition("=")
        if not (name and picture):
            raise PromptError(f"--control {entry} is not allowed; use NAME=PICTURE or FOLDER=PICTURE")
        found.append((find_control(name), picture))
    return found


def _say(path: Path, drawing: Drawing) -> None:
    note = "  blocked by the model's safety checker" if drawing.blocked else ""
    steps = f"{drawing.steps} step{'s' * (drawing.steps > 1)}"
    print(f"{path}  seed {drawing.seed}  {steps}  {drawing.latency_ms:.0f} ms  {drawing.engine}{note}")


def _save_sheet(drawings: list[Drawing], path: Path, columns: int) -> None:
    import numpy as np

    from instaflow.images import grid, save_png

    sheet = grid(np.stack([np.asarray(d.image) for d in drawings]), columns)
    prompts = " | ".join(dict.fromkeys(d.prompt for d in drawings))
    seeds = sorted({d.seed for d in drawings})
    shown = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    save_png(sheet, path, {"prompt": prompts, "seed": shown, "model": drawings[0].model})
    each = sum(d.latency_ms for d in drawings) / len(drawings)
    print(f"{path}  {len(drawings)} pictures  seed {shown}  {each:.0f} ms each  {drawings[0].engine}")


def _read_prompts(file: Path) -> list[str]:
    from instaflow.data.prompts import read_prompts

    if not file.is_file():  # elsewhere such a name may be a data set of the hub
        raise PromptError(f"cannot read prompts from {file}: no such file")
    return read_prompts(str(file))


def _paths(wanted: list[tuple[str, int]], out: Path | None, grid: bool) -> list[Path]:
    """Where each picture goes; names come from the prompts, with the seed where several would meet."""
    single = grid or len(wanted) == 1
    if out is not None and out.suffix.lower() in SUFFIXES:
        raise PromptError(f"--out {out}: pictures are written as .png")
    if out is not None and out.suffix.lower() == ".png" and not out.is_dir():
        if not single:
            raise PromptError(f"--out {out} is one file and there are {len(wanted)} pictures; give a folder or --grid")
        return [out]
    folder = out or Path()
    if single:
        return [folder / f"{_file_name(wanted[0][0])}.png"]
    names: dict[str, None] = {}
    for text, seed in wanted:
        plain = f"{_file_name(text)}-{seed}"
        free = (n for n in chain([plain], (f"{plain}-{i}" for i in count(2))) if n not in names)
        names[next(free)] = None  # 'cat' and 'Cat!' would meet
    return [folder / f"{name}.png" for name in names]


def _file_name(prompt: str) -> str:
    words = re.sub(r"^(a|an|the)\s+", "", prompt.strip().lower())
    return re.sub(r"[^\w]+", "-", words).strip("-")[:60] or "picture"


@app.command
def bench(
    model: str | None = None,
    *,
    against: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    runs: int = 30,
    cold_runs: int = 3,
    device: Device = "cpu",
    engine: Engine = None,
    precision: Precision = None,
    decoder: str | None = None,
    compiled: Compiled = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
) -> None:
    """Measure how fast a model draws here: warm, cold, part by part, and beside other ways of running it.

    ```
    instaflow bench
    instaflow bench --against torch onnxruntime -o bench.json
    instaflow bench runs/emoji/one-step/bundle --engine torch
    ```

    Parameters
    ----------
    model
        A one-step model; left out, the default one.
    against
        Peers that draw the same picture in turn: torch, onnxruntime, diffusers, openvino-genai.
    runs
        Warm pictures of each.
    cold_runs
        Whole processes from start to picture; 0 measures none.
    decoder
        A tiny decoder in place of the model's own, as `generate` takes it.
    out
        A .json file for the figures.
    """
    if runs < 1:
        raise DataError(f"--runs={runs} is not allowed; use 1 or more")
    if cold_runs < 0:
        raise DataError(f"--cold-runs={cold_runs} is not allowed; use 0 or more")
    if out is not None and out.suffix != ".json":
        raise DataError(f"--out {out}: figures are written as .json")
    hush()
    from instaflow.models.card import DEFAULT
    from instaflow.models.hub import locate
    from instaflow.runtime import bench as measuring
    from instaflow.runtime.loading import load_engine

    source = locate(DEFAULT if model is None else model)
    chosen: dict[str, Any] = {"device": device, "engine": engine, "precision": precision, "decoder": decoder}
    loaded = load_engine(source, safety=False, compiled=compiled, **chosen)
    if loaded.card.kind != "one-step":
        raise PromptError(f"bench draws in one step, and {loaded.card.name!r} is a {loaded.card.kind} model")
    options = [word for k, v in chosen.items() if v is not None for word in (f"--{k}", v)]
    options += ["--model", str(source), "--no-safety", *["--compile"] * compiled]
    report = measuring.bench(source, loaded, against=against, runs=runs, cold_runs=cold_runs, options=options)
    _print_bench(report)
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(out)


def _print_bench(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report['model']}, {report['size']} px, {report['engine']}, {report['cpus']} CPUs"
    table = Table("", "p50 ms", "p95 ms", "GFLOP", "of peak", "times ours", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, t in report["picture"].items():
        own = name == report["engine"]
        share = f"{report['of_peak']:.0%}" if own and "of_peak" in report else ""
        times = "" if own else f"{report['ratio'][name]:.2f}"
        table.add_row(name, f"{t['p50']:.2f}", f"{t['p95']:.2f}", "", share, times, style="bold" if own else "")
        if own:
            for part, p in report["parts"].items():
                counted = (f"{p['gflop']:.2f}", f"{p['of_peak']:.0%}") if "gflop" in p else ("", "")
                table.add_row(f"  {part}", f"{p['p50']:.2f}", f"{p['p95']:.2f}", *counted, "")
            if several := report.get("batch"):
                t = several["per_picture"]
                table.add_row(f"  each of {several['pictures']}", f"{t['p50']:.2f}", f"{t['p95']:.2f}", "", "", "")
    Console().print(table)
    if "cold" in report:
        print(
            f"cold, process start to PNG: {report['cold']['seconds']:.2f} s; peak memory {report['peak_memory_mb']} MB"
        )
    if "peak_gflop_s" in report:
        print(f"peak of this machine, one large matrix product: {report['peak_gflop_s']} GFLOP/s")


@app.command
def inspect(model: Path | None = None) -> None:
    """Print what a bundle is: its kind, lineage and measured results; without a path, the default model.

    ```
    instaflow inspect runs/emoji/one-step/bundle
    ```
    """
    import msgspec
    from rich import print_json

    from instaflow.models.card import DEFAULT, read_card

    print_json(msgspec.json.encode(read_card(model or DEFAULT)).decode())
