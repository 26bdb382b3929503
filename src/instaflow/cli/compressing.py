"""Verbs that make a one-step model smaller or ready to be taken elsewhere: prune, quantise, export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from instaflow.cli.app import Cache, Whole, app, check_free, hush
from instaflow.errors import DataError

if TYPE_CHECKING:
    from instaflow.compress.prune import Plan
    from instaflow.models.bundle import Bundle

Out = Annotated[Path, Parameter(name=["--out", "-o"], help="The folder to write, whole or not at all.")]


@app.command
def prune(
    model: str,
    *,
    target: str,
    pairs: Path,
    out: Out,
    width: float = 1.0,
    calibration: Whole = 128,
    images: Whole = 5920,
    batch_size: Whole = 8,
    lr: float = 2e-4,
    loss: Literal["l2", "perceptual"] = "perceptual",
    seed: Whole = 0,
    device: str = "cpu",
    dry_run: bool = False,
) -> None:
    """Drop the blocks of a one-step model's U-Net that matter least, and heal what is left.

    ```
    instaflow prune runs/emoji/one-step/bundle --target 0.5 --pairs runs/emoji/pairs/pairs --out small/
    instaflow prune InstaFlow-0.9B/ --target small --pairs pairs/ --out small/ --dry-run
    ```

    Run again after an interruption it goes on.

    Parameters
    ----------
    model
        A folder or a hub id.
    target
        Share of the U-Net's FLOPs to be rid of, 0 to 0.95; or of Stable Diffusion's base, small or tiny (BK-SDM).
    pairs
        A folder of pairs: what worth is measured on and healing learns from.
    width
        Share of the inner channels to keep everywhere, before blocks are dropped.
    calibration
        Pairs that worth is measured on.
    images
        Pictures to heal with.
    batch_size
        Pictures a step.
    lr
        Peak learning rate.
    loss
        Of the last part of healing, as a distil stage has it: l2 or perceptual.
    seed
        Of every random choice.
    device
        Where worth is measured; healing is where its launcher says.
    dry_run
        Print what would be dropped, and stop.
    """
    from instaflow.errors import RecipeError

    if not 0 < width <= 1:
        raise RecipeError(f"--width={width:g} is not allowed; use more than 0, up to 1")
    for option, value in (("calibration", calibration), ("images", images), ("batch-size", batch_size)):
        if value < 1:
            raise RecipeError(f"--{option}={value} is not allowed; use 1 or more")
    if not lr > 0:
        raise RecipeError(f"--lr={lr:g} is not allowed; use more than 0")
    if not dry_run:
        check_free(out)
    hush()
    from instaflow.compress.heal import heal
    from instaflow.compress.targets import TARGETS, named
    from instaflow.data.pairs import open_pairs
    from instaflow.models.bundle import Bundle

    share = _share(target, tuple(TARGETS))
    whole, reader = Bundle.load(model, device=device), open_pairs(pairs)
    _one_step(whole)
    if share is None:
        pruned = named(whole, target)
        _print_named(whole, pruned)
    else:
        from instaflow.compress.prune import Calibration
        from instaflow.compress.prune import plan as choose
        from instaflow.compress.prune import prune as cut

        chosen = choose(whole, Calibration.of(whole, reader, calibration), share, width)
        _print_plan(chosen, whole)
        pruned = cut(whole, chosen)
    if dry_run:
        return
    if pruned is not whole:
        work = out.with_name(out.name + ".healing")
        settings = {"images": images, "batch_size": batch_size, "lr": lr, "loss": loss, "seed": seed}
        pruned = heal(pruned, whole, reader, work, **settings)  # type: ignore[arg-type]
        from instaflow.compress.prune import card_of

        pruned = card_of(pruned, whole, model, target, pairs, settings)
    print(pruned.save(out))
    shutil.rmtree(out.with_name(out.name + ".healing"), ignore_errors=True)


def _share(target: str, names: tuple[str, ...]) -> float | None:
    """A number, or None for a name."""
    from instaflow.errors import RecipeError

    if target in names:
        return None
    try:
        share = float(target)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 0.95:
        raise RecipeError(f"--target={target} is not allowed; use a share from 0 to 0.95, or {', '.join(names)}")
    return share


def _one_step(bundle: Bundle) -> None:
    from instaflow.errors import BundleError

    if bundle.card.kind != "one-step":
        raise BundleError(f"{bundle.card.name!r} is a {bundle.card.kind} model; one-step models are made smaller here")


def _print_plan(chosen: Plan, whole: Bundle) -> None:
    from rich.console import Console
    from rich.table import Table

    before, after = chosen.flops
    title = f"{whole.card.name}: {before / 1e9:.3g} → {after / 1e9:.3g} GFLOP a picture ({after / before:.0%})"
    table = Table("block", "worth", "MFLOP", "M parameters", "", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    for b in chosen.blocks:
        numbers = (f"{b.worth:+.1%}", f"{b.flops / 1e6:.1f}", f"{b.parameters / 1e6:.2f}")
        table.add_row(b.name, *numbers, "kept" if b.kept else "dropped", style="" if b.kept else "dim")
    Console(width=110).print(table)
    if chosen.narrowed:
        print(f"{len(chosen.narrowed)} blocks narrowed to {sum(map(len, chosen.narrowed.values())):,} inner channels")


def _print_named(whole: Bundle, pruned: Bundle) -> None:
    from instaflow.compress.prune import count

    for bundle in (whole, pruned):
        size = sum(p.numel() for p in bundle.unet.parameters())
        print(f"{bundle.card.name:30} {count(bundle.unet)[0] / 1e9:8.1f} GFLOP {size / 1e6:8.1f} M parameters")


@app.command
def quantise(
    model: str,
    *,
    scheme: Literal["int8", "w8", "w4"],
    out: Out,
    prompts: str | None = None,
    threshold: float | None = None,
    lora: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    cache: Cache = Path("data"),
) -> None:
    """Write a one-step model with weights of 8 or 4 bits; OpenVINO draws with it, without torch.

    ```
    instaflow quantise small/ --scheme w8 --out smaller/
    instaflow quantise InstaFlow-0.9B/ --scheme int8 --prompts prompts.txt --out smaller/
    ```

    Parameters
    ----------
    model
        A folder or a hub id.
    scheme
        int8: weights and activations; w8 and w4: weights alone.
    prompts
        To calibrate with: a .txt or .parquet file or a hub id; left out, the emoji data's validation split.
    threshold
        Blocks that alone would move the picture's latents by more than this share of their power stay in 16 bits;
        left out, 0.0003 for int8, 0.001 for w8, 0.01 for w4.
    lora
        LoRAs to fuse first, each with '=0.7' behind it at that scale: afterwards there is no way.
    """
    if threshold is not None and not threshold >= 0:
        raise DataError(f"--threshold={threshold:g} is not allowed; use 0 or more")
    check_free(out)
    hush()
    from instaflow.compress import quantise as quantising
    from instaflow.data.prompts import read_prompts
    from instaflow.models.bundle import Bundle

    bundle = Bundle.load(model)
    _one_step(bundle)
    if lora:
        from instaflow.models.lora import merge_loras
        from instaflow.models.request import LoRA

        merge_loras(bundle, [LoRA.read(text) for text in lora])
    texts = read_prompts(prompts) if prompts is not None else _validation_prompts(bundle, cache)
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    with console.status("measuring") as status:
        table = quantising.quantise(
            bundle,
            scheme,
            texts,
            out,
            threshold=threshold,
            progress=lambda name: status.update(f"measuring {name}"),
        )
    shown = Table("block", "sensitivity", "M parameters", "", title=f"{bundle.card.name}, {scheme}")
    for t in table:
        kept = "16 bits" if t.kept else "quantised"
        shown.add_row(
            t.block, f"{t.sensitivity:.1e}", f"{t.parameters / 1e6:.2f}", kept, style="bold" if t.kept else ""
        )
    Console().print(shown)
    print(f"{out}  {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def _validation_prompts(bundle: Bundle, cache: Path) -> list[str]:
    """Names of the pictures of the emoji data's validation split: no concept of it is trained on or measured."""
    from instaflow.data.emoji import make_emoji
    from instaflow.data.pictures import read_pictures

    size, styles = bundle.card.image_size, bundle.card.styles
    if not styles:
        raise DataError(f"{bundle.card.name!r} did not learn the emoji; name prompts to calibrate with: --prompts")
    pictures = read_pictures(
        make_emoji(cache / f"emoji-{size}", size=size, styles=styles, cache=cache / "npm"), styles=styles
    )
    return [f"{p.name}, {p.style}" for p in pictures if p.split == "validation"]


@app.command
def export(
    model: str | None = None,
    *,
    to: Literal["onnx", "openvino"] = "onnx",
    lora: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    out: Out,
) -> None:
    """Write a one-step model with graphs that draw fast on a CPU, and without torch.

    ```
    instaflow export runs/emoji/one-step/bundle -o fast/
    instaflow export runs/emoji/one-step/bundle --to openvino -o fast/
    instaflow generate "a red apple" --model fast/
    ```

    Parameters
    ----------
    model
        A folder or a hub id; left out, the default model.
    to
        onnx: model.onnx in each part, beside the safetensors that it reads. openvino: openvino_model.xml and .bin.
    lora
        LoRAs to fuse into it, each with '=0.7' behind it at that scale.
    """
    hush()
    from instaflow.models.card import DEFAULT
    from instaflow.models.hub import locate
    from instaflow.models.request import LoRA
    from instaflow.runtime import loading

    check_free(out)
    loras = [LoRA.read(text) for text in lora]
    print(loading.export(locate(DEFAULT if model is None else model), out, loras=loras, to=to))
