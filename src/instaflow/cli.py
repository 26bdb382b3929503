"""The command line: thin, every verb binds its work when it is called. `--help` loads no torch."""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token

from instaflow import __version__
from instaflow.errors import DataError, InstaFlowError, PromptError

if TYPE_CHECKING:
    from instaflow.generate import Drawing, InstaFlow
    from instaflow.recipe import Evaluate, Recipe
    from instaflow.training.run import Run

MOST = 100_000  # pictures of a prompt in one command
SUFFIXES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # of pictures that we do not write

app = App(
    name="instaflow",
    version=__version__,
    help="Text to image in one network evaluation, and the whole way to make such a model.",
    help_format="markdown",
    help_epilogue="Start with: instaflow generate 'a red apple'",
    suppress_keyboard_interrupt=False,
)


def _whole(_type: type, tokens: Sequence[Token]) -> int:
    """The library's own reading rounds 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise PromptError(f"{tokens[0].keyword}={tokens[0].value} is not allowed; use a whole number") from None


Whole = Annotated[int, Parameter(converter=_whole)]
Root = Annotated[Path, Parameter(help="Where run folders go.")]
Cache = Annotated[Path, Parameter(help="Where data sets and fetched packages go.")]


@app.command
def generate(
    *prompts: str,
    file: Annotated[Path | None, Parameter(name=["--file", "-f"])] = None,
    number: Annotated[int, Parameter(name=["--number", "-n"], converter=_whole)] = 1,
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
    lora: str | None = None,
    lora_scale: float = 1.0,
    device: str = "cpu",
    engine: Annotated[str | None, Parameter(name=["--engine", "-e"])] = None,
    precision: str | None = None,
    decoder: str | None = None,
) -> None:
    """Draw pictures from sentences.

    ```
    instaflow generate "a red apple"
    instaflow generate "a red apple" "a green tree" -n 4 --seed 7 --grid -o sheet.png
    instaflow generate "cat" --style noto
    instaflow generate --file prompts.txt -o pictures/
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
        A LoRA for that model, a .safetensors file or a hub id.
    lora_scale
        How much of it counts, usually 0 to 1.
    device
        cpu, or where torch is to draw: cuda, mps.
    engine
        openvino (a one-step model on a CPU) or torch; left out, the faster one that can.
    precision
        Of openvino bf16 or f32, of torch float32, bfloat16 or float16; left out, the engine's own.
    decoder
        A tiny decoder in place of the model's own: a folder or hub id (TAESD), or what a decoder stage made.
    """
    texts = [*prompts, *(_read_prompts(file) if file else [])]
    if not texts:
        raise PromptError("no prompt: say what to draw, for example instaflow generate 'a red apple'")
    if not 1 <= number <= MOST:
        raise PromptError(f"--number={number} is not allowed; use 1 to {MOST}")
    first = secrets.randbelow(2**31) if seed is None else seed
    wanted = [(text, first + i) for text in texts for i in range(number)]
    paths = _paths(wanted, out, grid)

    flow = _load(model, lora=lora, safety=safety, device=device, engine=engine, precision=precision, decoder=decoder)
    drawings = flow.generate_many(
        [t for t, _ in wanted],
        seeds=[s for _, s in wanted],
        style=style,
        size=size,
        steps=steps,
        guidance=guidance,
        negative=negative,
        lora_scale=lora_scale,
    )
    own = flow.engine.card.image_size
    if size not in (None, own):
        print(f"note: {flow.engine.card.name} learnt at {own} pixels; at {size} it repeats itself", file=sys.stderr)
    from rich.progress import track

    done: list[Drawing] = []
    quiet = len(wanted) == 1 or not sys.stderr.isatty()
    for drawing in track(drawings, "drawing", total=len(wanted), disable=quiet):
        if not grid:
            path = drawing.save(paths[len(done)])
            _say(path, drawing)
        done.append(drawing)
    if grid:
        _save_sheet(done, paths[0], columns=number if number > 1 else 8)


def _hush() -> None:
    """Before they are imported, tell the libraries to keep their own bars and notes to themselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _load(model: str | None, **options: Any) -> InstaFlow:
    _hush()
    from instaflow.generate import InstaFlow

    flow = InstaFlow.load(model, **options)
    if flow.engine.card.image_size <= 128:
        flow.generate("warm up")  # so that the time printed is that of the picture, not of loading
    return flow


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
    device: str = "cpu",
    engine: Annotated[str | None, Parameter(name=["--engine", "-e"])] = None,
    precision: str | None = None,
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
        Peers that draw the same picture in turn: torch, onnxruntime, diffusers.
    runs
        Warm pictures of each.
    cold_runs
        Whole processes from start to picture; 0 measures none.
    device
        cpu, or where torch is to draw.
    engine
        openvino or torch; left out, the faster one that can.
    precision
        The engine's precision.
    out
        A .json file for the figures.
    """
    if runs < 1 or cold_runs < 0:
        raise (
            DataError(f"--runs={runs} is not allowed; use 1 or more")
            if runs < 1
            else DataError(f"--cold-runs={cold_runs} is not allowed; use 0 or more")
        )
    if out is not None and out.suffix != ".json":
        raise DataError(f"--out {out}: figures are written as .json")
    _hush()
    from instaflow.models.card import DEFAULT
    from instaflow.models.hub import locate
    from instaflow.runtime import bench as measuring
    from instaflow.runtime.loading import load_engine

    source = locate(DEFAULT if model is None else model)
    chosen: dict[str, Any] = {"device": device, "engine": engine, "precision": precision}
    loaded = load_engine(source, safety=False, **chosen)
    if loaded.card.kind != "one-step":
        raise PromptError(f"bench draws in one step, and {loaded.card.name!r} is a {loaded.card.kind} model")
    options = [word for k, v in chosen.items() if v is not None for word in (f"--{k}", v)]
    options += ["--model", str(source), "--no-safety"]
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


# -- making models ---------------------------------------------------------------------------------


@app.command
def export(model: str | None = None, *, out: Annotated[Path, Parameter(name=["--out", "-o"])]) -> None:
    """Write a one-step model with ONNX graphs beside its weights: it draws fast on a CPU, and without torch.

    ```
    instaflow export runs/emoji/one-step/bundle -o fast/
    instaflow generate "a red apple" --model fast/
    ```

    Parameters
    ----------
    model
        A folder or a hub id; left out, the default model.
    out
        The folder to write, whole or not at all.
    """
    _hush()
    from instaflow.models.card import DEFAULT
    from instaflow.models.hub import locate
    from instaflow.runtime import loading

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out} is there already; name a folder that is not")
    print(loading.export(locate(DEFAULT if model is None else model), out))


@app.command
def run(
    recipe: Path,
    *,
    dry_run: bool = False,
    gpu: str | None = None,
    root: Root = Path("runs"),
    cache: Cache = Path("data"),
) -> None:
    """Carry out all stages of a recipe; what is done is skipped, what was begun goes on.

    ```
    instaflow run recipes/smoke.toml
    instaflow run recipes/emoji.toml --dry-run
    instaflow run recipes/sd15.toml --dry-run --gpu a100
    ```

    Parameters
    ----------
    recipe
        A TOML file.
    dry_run
        Print what would run and what it costs, and stop.
    gpu
        With --dry-run, the days it takes on one: a100 (the published run's speed) or here (ten seconds of measuring).
    """
    if gpu and not dry_run:
        raise DataError("--gpu says what a run would cost; it goes with --dry-run")
    _carry_out(recipe, None, None, dry_run, root, cache, gpu)


@app.command
def train(
    recipe: Path, *, stage: str, dry_run: bool = False, root: Root = Path("runs"), cache: Cache = Path("data")
) -> None:
    """Train one stage of a recipe: autoencoder, decoder, teacher, reflow or distil, by its name or kind.

    ```
    instaflow train recipes/emoji.toml --stage teacher
    ```
    """
    _carry_out(recipe, stage, ("autoencoder", "decoder", "teacher", "reflow", "distil"), dry_run, root, cache)


@app.command
def pairs(
    recipe: Path, *, stage: str = "pairs", dry_run: bool = False, root: Root = Path("runs"), cache: Cache = Path("data")
) -> None:
    """Draw a recipe's pairs (prompt, noise, latents) with its teacher.

    ```
    instaflow pairs recipes/emoji.toml
    ```
    """
    _carry_out(recipe, stage, ("pairs",), dry_run, root, cache)


@app.command
def evaluate(
    *models: str,
    stage: str = "evaluate",
    protocol: str = "emoji-heldout",
    images: Path | None = None,
    annotations: Path | None = None,
    inception: Path | None = None,
    count: int = 5000,
    curve_count: int = 0,
    seed: int = 0,
    device: str = "cpu",
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("evaluation"),
    dry_run: bool = False,
    root: Root = Path("runs"),
    cache: Cache = Path("data"),
) -> None:
    r"""Measure models side by side: distances, retrieval, straightness, time, a grid of the same noises.

    ```
    instaflow evaluate recipes/emoji.toml
    instaflow evaluate runs/emoji/teacher/bundle@25 runs/emoji/one-step/bundle -o evaluation/
    instaflow evaluate XCLiu/instaflow_0_9B_from_sd_1_5 --protocol coco2017-5k \
        --images val2017/ --annotations annotations/captions_val2017.json
    ```

    Parameters
    ----------
    models
        A recipe, whose evaluation is carried out; or bundles and hub ids, each optionally with '@steps'.
    stage
        Which evaluation of the recipe.
    protocol
        What bundles are measured by: emoji-heldout, coco2017-5k or coco2014-30k.
    images
        The pictures of a COCO protocol: val2017/ or val2014/.
    annotations
        Their captions_val….json.
    inception
        torch-fidelity's file of Inception's weights; left out, it is downloaded once.
    count
        In emoji-heldout, pictures of each bundle: so many of unseen concepts and so many of seen ones.
    curve_count
        Pictures at each point of the curves over steps and guidance; 0 draws no curves.
    seed
        First seed of the noises.
    out
        The folder for report.md, report.json and plots; run again, it goes on.
    """
    if len(models) == 1 and models[0].endswith(".toml"):
        _carry_out(Path(models[0]), stage, ("evaluate",), dry_run, root, cache)
        return
    if not models:
        raise DataError("no model: name bundles, for example instaflow evaluate runs/emoji/one-step/bundle")
    if count < 1 or curve_count < 0:
        raise DataError(f"--count={count} --curve-count={curve_count} is not allowed; use 1 or more, and 0 or more")
    _hush()
    from instaflow.data.emoji import make_emoji
    from instaflow.data.pictures import read_pictures
    from instaflow.evaluate import protocol as measuring
    from instaflow.evaluate.coco import PROTOCOLS, coco_field
    from instaflow.evaluate.heldout import HELDOUT, heldout_field
    from instaflow.models.bundle import Bundle

    entrants = [measuring.entrant(label) for label in models]
    if protocol in PROTOCOLS:
        if images is None or annotations is None:
            raise DataError(f"--protocol {protocol} needs --images (a folder) and --annotations (captions_val….json)")
        field = coco_field(protocol, images, annotations, seed=seed, device=device, inception=inception)
    elif protocol == HELDOUT.name:
        size, styles = measuring.heldout_data(entrants[0])
        folder = make_emoji(cache / f"emoji-{size}", size=size, styles=styles, cache=cache / "npm")
        pictures = read_pictures(folder, styles=styles)
        train, test = ([p for p in pictures if p.split == split] for split in ("train", "test"))
        first = Bundle.load(entrants[0].folder, device=device)
        field = heldout_field(first, train, test, count=count, seed=seed, device=device)
    else:
        raise DataError(f"unknown protocol {protocol!r}; allowed: {', '.join([HELDOUT.name, *PROTOCOLS])}")
    measuring.evaluate(field, entrants, out, curve_count=curve_count, device=device)
    print(out / "report.md")


def _carry_out(
    path: Path,
    stage: str | None,
    kinds: tuple[str, ...] | None,
    dry_run: bool,
    root: Path,
    cache: Path,
    gpu: str | None = None,
) -> None:
    from instaflow.errors import RecipeError
    from instaflow.recipe import kind, load_recipe

    recipe = load_recipe(path)
    if stage is not None and kinds is not None:
        found = kind(recipe.stage(stage))
        if found not in kinds:
            raise RecipeError(f"stage {stage!r} is of kind {found}; this verb takes {', '.join(kinds)} ({path})")
    if dry_run:
        _print_costs(recipe, stage, gpu)
        return
    _hush()
    from instaflow.training.run import Run

    Run(recipe, root, cache=cache).run(_evaluate, stage)


def _evaluate(run: Run, stage: Evaluate) -> None:
    from instaflow.evaluate import protocol
    from instaflow.evaluate.heldout import heldout_field
    from instaflow.models.bundle import Bundle

    entrants = [protocol.entrant(label, run.output) for label in stage.models]
    first = Bundle.load(entrants[0].folder, device=run.device)
    train, test, settings = run.training_pictures, run.pictures("test"), {"count": stage.count, "seed": stage.seed}
    report = protocol.evaluate(
        heldout_field(first, train, test, **settings, device=run.device),
        entrants,
        run.folder / stage.name,
        curve_count=stage.curve_count,
        write_cards=True,
        device=run.device,
        workers=run.workers,
        wait=run.processes.wait_for_everyone,
    )
    if report:
        print(f"{run.folder / stage.name / 'report.md'}: {len(report['models'])} rows")


def _print_costs(recipe: Recipe, only: str | None, gpu: str | None) -> None:
    _hush()
    from rich.console import Console
    from rich.table import Table

    from instaflow.training.cost import bills, days, speed

    device = speed(gpu) if gpu else None
    found, assumed = bills(recipe, only)
    columns = ["stage", "images", "forwards", "FLOP", "bytes a sample", "pairs, bytes"]
    table = Table(*columns, *([f"on one {gpu}"] if gpu else []), title=f"recipe {recipe.name}: what it costs")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for b in found:
        counts = (b.images, b.forwards, b.flops, 1e6 * b.sample_mb, 1e6 * b.storage_mb)
        table.add_row(b.stage, *map(_short, counts), *([_duration(days(b, device))] if device else []))
    sums = [sum(v) for v in zip(*((b.images, b.forwards, b.flops) for b in found), strict=True)]
    stored, spent = sum(1e6 * b.storage_mb for b in found), sum(days(b, device) for b in found) if device else 0.0
    total = ["all", *map(_short, sums), "", _short(stored), *([_duration(spent)] if device else [])]
    table.add_row(*total, style="bold")
    Console().print(table)
    for name in sorted(assumed):
        print(f"{name} is not on this machine: counted as Stable Diffusion 1.5")


def _duration(days: float) -> str:
    for unit, share in (("d", 1), ("h", 24), ("min", 24 * 60)):
        if days * share >= 2 or unit == "min":
            break
    return f"{days * share:,.{0 if days * share >= 20 else 1}f} {unit}"


def _short(number: float) -> str:
    """1,600,000 → '1.6 M'; nothing for 0."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            value = number / 10**power
            return f"{value:,.0f} {letter}" if value >= 1000 else f"{value:.3g} {letter}"
    return f"{number:g}" if number else ""


@app.command
def data(
    name: str,
    *,
    size: int = 64,
    styles: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    cache: Cache = Path("data"),
) -> None:
    """Fetch and rasterise a data set: 'emoji', nine openly licensed hands, about 11,000 pictures.

    ```
    instaflow data emoji
    instaflow data emoji --size 128 --styles noto twemoji
    ```

    Parameters
    ----------
    name
        emoji.
    size
        Side of the pictures in pixels.
    styles
        These hands only.
    out
        The folder to write, a Parquet file a style.
    """
    if name != "emoji":
        raise DataError(f"unknown data set {name!r}; allowed: emoji. A folder or .parquet file needs no such step")
    if not 8 <= size <= 1024:
        raise DataError(f"--size={size} is not allowed; use 8 to 1024")
    from instaflow.data.emoji import make_emoji
    from instaflow.data.pictures import read_pictures

    folder = make_emoji(out or cache / f"emoji-{size}", size=size, styles=styles, cache=cache / "npm")
    found = read_pictures(folder, styles=styles)
    for split in ("train", "validation", "test"):
        part = [p for p in found if p.split == split]
        print(f"{split:10} {len(part):6,} pictures of {len({p.hexcode for p in part}):5,} concepts")
    print(folder)


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


DRAWING = {"torch", "diffusers", "transformers", "safetensors", "onnx_ir", "onnxscript"}


def main() -> None:
    """Run the command line: 0 good, 2 the user's mistake in one line, 1 ours, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except InstaFlowError as error:
        _fail(str(error))
    except CycloptsError as error:
        _fail(f"{error} (instaflow --help)")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("instaflow"):
            raise
        extra = "torch" if (error.name or "").split(".")[0] in DRAWING else "train,eval"
        _fail(f"this needs the package {error.name}: pip install 'instaflow[{extra}]'")
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        goes_on = sys.argv[1:2] and sys.argv[1] in ("run", "train", "pairs", "evaluate")
        print("instaflow: interrupted" + "; run the same line again to go on" * bool(goes_on), file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"instaflow: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
