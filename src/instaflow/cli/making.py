"""Verbs that make and measure models: data, run, train, pairs, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from instaflow.cli.app import Cache, Root, app, hush
from instaflow.errors import DataError

if TYPE_CHECKING:
    from instaflow.recipe import Evaluate, Recipe
    from instaflow.training.run import Run


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
    """Train one stage of a recipe, by its name or its kind: teacher, reflow, distil, control and so on.

    ```
    instaflow train recipes/emoji.toml --stage teacher
    ```
    """
    kinds = ("autoencoder", "decoder", "teacher", "reflow", "distil", "control", "personalise")
    _carry_out(recipe, stage, kinds, dry_run, root, cache)


@app.command
def control(
    recipe: Path,
    *,
    stage: str = "control",
    dry_run: bool = False,
    root: Root = Path("runs"),
    cache: Cache = Path("data"),
) -> None:
    """Train a recipe's ControlNet for a one-step model.

    ```
    instaflow control recipes/control-edges.toml
    ```
    """
    _carry_out(recipe, stage, ("control",), dry_run, root, cache)


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
    hush()
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
    hush()
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
        made=run.folder,
        device=run.device,
        workers=run.workers,
        wait=run.processes.wait_for_everyone,
    )
    if report:
        print(f"{run.folder / stage.name / 'report.md'}: {len(report['models'])} rows")


def _print_costs(recipe: Recipe, only: str | None, gpu: str | None) -> None:
    hush()
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
