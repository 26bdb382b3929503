"""Recipes: a TOML file says a whole run, as a list of stages. Checked on construction, field by field.

A stage names what it reads (`model`, `pairs`: names of earlier stages, or paths) and how it trains.
Every field is documented under it. The resolved recipe is dumped beside every run.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from instaflow.errors import RecipeError

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Guidance = Annotated[float, Meta(ge=1)]
Prediction = Literal["epsilon", "v_prediction", "velocity"]
ControlKind = Literal["edges", "scribble", "colours", "inpaint"]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every part of a recipe is: frozen, no unknown fields; msgspec does not hand kw_only down."""


class Data(Spec, frozen=True, kw_only=True):
    """Which pictures."""

    source: str = "emoji"
    """'emoji' (fetched and rasterised), a .parquet file, a folder of pictures with .txt captions, or a hub id."""
    size: Annotated[int, Meta(ge=16, multiple_of=8)] = 64
    """Side of the pictures in pixels."""
    styles: tuple[str, ...] = ()
    """Keep these styles; empty keeps all."""
    limit: Annotated[int, Meta(ge=0)] = 0
    """Keep the first so many training pictures; 0 keeps all."""


class Train(Spec, frozen=True, kw_only=True):
    """How a network is trained: the same fields for every stage."""

    steps: Count
    """Optimiser steps."""
    batch_size: Count = 32
    """Samples a step, over all processes."""
    micro_batch_size: Annotated[int, Meta(ge=0)] = 0
    """Samples a forward pass of one process; gradients add up to the whole batch. 0 takes them all at once."""
    lr: Positive = 1e-4
    """Peak learning rate of AdamW."""
    lr_warmup_steps: Annotated[int, Meta(ge=0)] = 100
    """Steps of linear warm-up."""
    lr_decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after the warm-up."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    """AdamW's decoupled weight decay."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema: Fraction = 0.999
    """Decay of the weight average that is evaluated and saved; warmed up from 0."""
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Autocast type; weights and optimiser stay fp32."""
    optimiser: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw is torch's fused one; adamw-8bit keeps its moments in 8 bits (bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: a third more work, a fraction of the memory."""
    fsdp: bool = False
    """Share weights, gradients and optimiser out among the processes (FSDP2), for networks that fit no single GPU."""
    compile: bool = False
    """torch.compile the network: faster after a minute of compiling."""
    checkpoint_minutes: Positive = 3.0
    """How much work a killed run loses at most."""
    preview_every: Count = 1000
    """Steps between sample grids."""

    def __post_init__(self) -> None:
        """8-bit moments are blocks of a whole tensor."""
        if self.fsdp and self.optimiser == "adamw-8bit":
            raise ValueError("optimiser = 'adamw-8bit' does not go with fsdp, which shares the moments out already")


class Autoencoder(Spec, frozen=True, kw_only=True, tag="autoencoder", tag_field="kind"):
    """Pictures ↔ latents: a deep-compression autoencoder (DC-AE, arXiv 2410.10733), factor 8."""

    name: Name
    latent_channels: Count = 16
    widths: Annotated[tuple[Count, ...], Meta(min_length=1)] = (64, 128, 256)
    """Channels at 1/2, 1/4 and 1/8 of the picture's side; one residual block each."""
    latent_noise: Annotated[float, Meta(ge=0)] = 0.1
    """Noise on the latents in training, in their standard deviations: the decoder forgives small errors."""
    model: str = ""
    """Go on from this stage's decoder, its encoder kept as it is, so that latents stay what they are."""
    perceptual_weight: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of a feature distance (EfficientNet-Lite1) beside L1 on pixels."""
    train: Train


class Teacher(Spec, frozen=True, kw_only=True, tag="teacher", tag_field="kind"):
    """Stable Diffusion in miniature: a U-Net that denoises latents, told the prompt by cross-attention."""

    name: Name
    autoencoder: str
    """The stage (or bundle folder) whose autoencoder makes the latents."""
    model: str = ""
    """Go on from this bundle's U-Net, with its widths; empty starts from random weights."""
    styles: tuple[str, ...] = ()
    """Train on these of the data's styles; empty takes all. Later stages draw what their model knows."""
    prediction: Prediction = "v_prediction"
    """What the network predicts. v_prediction goes with the zero-terminal-SNR schedule (arXiv 2305.08891)."""
    widths: Annotated[tuple[Count, ...], Meta(min_length=1)] = (128, 320)
    """Channels at each resolution of the latents, finest first."""
    attention: tuple[bool, ...] = (False, True)
    """Cross-attention at each resolution."""
    layers: Count = 1
    """Residual blocks a resolution."""
    empty_prompts: Fraction = 0.1
    """Share of prompts dropped, so that guidance works."""
    guidance: Guidance = 5.0
    """Guidance this bundle uses by default."""
    train: Train

    def __post_init__(self) -> None:
        """Every resolution says whether it has attention."""
        if len(self.widths) != len(self.attention):
            raise ValueError(f"widths has {len(self.widths)} entries, attention {len(self.attention)}: one each")


Stack = Literal["", "features", "latents"]


class Pairs(Spec, frozen=True, kw_only=True, tag="pairs", tag_field="kind"):
    """The teacher draws (prompt, noise, latents). Only prompts are needed, no pictures."""

    name: Name
    model: str
    """The bundle that draws: a stage of this recipe or a folder."""
    count: Count
    """How many pairs."""
    steps: Count = 25
    """Sampler steps: DPM-Solver++ (2M) for a diffusion model, Euler for a rectified flow."""
    guidance: Guidance = 5.0
    """Classifier-free guidance of the teacher."""
    prompts: str = ""
    """A .txt or .parquet file of prompts, or a hub data set; empty draws them from the captions of the data."""
    mixtures: Fraction = 0.2
    """Share of prompts that join two captions, when they are drawn from captions."""
    empty_prompts: Fraction = 0.0
    """Share of pairs drawn for no prompt at all; 1 makes them of the unconditional model."""
    shard_size: Count = 512
    """Pairs a shard; a killed job loses at most one."""
    batch_size: Count = 64
    seed: Seed = 0
    """First seed: pair i uses noise from seed + i."""


class OnPairs(Spec, frozen=True, kw_only=True):
    """What the two stages that learn from pairs have in common."""

    name: Name
    model: str
    """Where the weights start."""
    pairs: str
    """A stage, a folder of pairs, or one in an object store, 's3://bucket/pairs' (fsspec)."""
    perceptual: str = ""
    """LPIPS by its VGG-16 weights, a file or a hub id ('timm/vgg16.tv_in1k'); empty takes EfficientNet-Lite1."""
    perceptual_weight: Positive = 1.0
    perceptual_crop: Annotated[int, Meta(ge=0)] = 0
    """Decode a random square of so many latents a side, for memory; 0, or more than there are, decodes all of them."""
    stack: Stack = ""
    """Start from two copies of the model in series: joined at the first's feature maps (InstaFlow-1.7B) or latents."""
    train: Train
    loss: str = "l2"

    def __post_init__(self) -> None:
        """What would do nothing is a mistake."""
        if self.loss == "l2" and (self.perceptual or self.perceptual_crop):
            raise ValueError(f"perceptual and perceptual_crop are of a perceptual loss; {self.name} has loss = 'l2'")


class Reflow(OnPairs, frozen=True, kw_only=True, tag="reflow", tag_field="kind"):
    """Text-conditioned reflow (InstaFlow, Alg. 1): regress X₁ − X₀ along straight lines between pairs."""

    init: Literal["converted", "raw"] = "converted"
    """converted: the teacher's exact velocity. raw: its weights as they are, regressing v (as published)."""
    time: Literal["uniform", "u-shaped"] = "uniform"
    """Distribution of t; u-shaped is ∝ e^{4t} + e^{4(1−t)} (arXiv 2405.20320)."""
    loss: Literal["l2", "lpips-huber"] = "l2"
    """l2 on velocities; lpips-huber adds a perceptual distance of the decoded X̂₁ (arXiv 2405.20320)."""
    empty_prompts: Fraction = 0.1
    guidance: Guidance = 1.0
    """Guidance this bundle uses by default."""


class Distil(OnPairs, frozen=True, kw_only=True, tag="distil", tag_field="kind"):
    """One-step distillation (InstaFlow, Alg. 2): X₀ + v(X₀, 0 | T) ≈ X₁, at t = 0 only."""

    loss: Literal["l2", "perceptual"] = "l2"
    """l2 on latents; perceptual adds a perceptual distance of the decoded pictures."""


class Decoder(Spec, frozen=True, kw_only=True, tag="decoder", tag_field="kind"):
    """A tiny decoder of TAESD's architecture, distilled from a model's own: its pictures for a fraction of the work."""

    name: Name
    model: str
    """Whose decoder is learnt."""
    pairs: str
    """The latents to learn it on: a stage, a folder of pairs, or one in an object store."""
    width: Count = 64
    """Channels at every resolution."""
    blocks: Count = 3
    """Residual blocks at every resolution but the last, which has one."""
    crop: Annotated[int, Meta(ge=0)] = 0
    """Decode a random square of so many latents a side, for memory; 0, or more than there are, decodes all of them."""
    perceptual_weight: Annotated[float, Meta(ge=0)] = 0.05
    """Weight of a feature distance (EfficientNet-Lite1) beside L1 on pixels."""
    train: Train


class Personalise(Spec, frozen=True, kw_only=True, tag="personalise", tag_field="kind"):
    """A LoRA (arXiv 2106.09685) of a subject or a hand, from a few pictures, the prior preserved (arXiv 2208.12242)."""

    name: Name
    model: str
    """What learns; it stays as it is, the LoRA goes on top."""
    pictures: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Picture files, folders of them, or Parquet, whose training split counts."""
    subject: str = ""
    """The prompt of every picture, 'sks cat'; empty takes their captions, as for a hand."""
    teacher: str = ""
    """A personalised teacher that draws pairs for the pictures' prompts, in place of the pictures themselves."""
    loss: Literal["", "ordinary", "l2", "perceptual"] = ""
    """ordinary: denoising. l2, perceptual: distillation at t = 0. Empty: by the model, perceptual or ordinary."""
    perceptual_weight: Positive = 0.5
    rank: Count = 8
    """Rank of the LoRA, on every linear layer and convolution of the U-Net."""
    count: Count = 512
    """Pairs of the pictures, each with its own noise; at least one a picture."""
    prior: Annotated[int, Meta(ge=0)] = 512
    """Pairs that the model itself draws of other prompts, so that it stays what it is there."""
    prompts: str = ""
    """Those prompts: a .txt or .parquet file, or a hub data set; empty takes words of the tokenizer."""
    train: Train


class Control(Spec, frozen=True, kw_only=True, tag="control", tag_field="kind"):
    """A ControlNet for a one-step model, learnt on pictures; the model stays what it is."""

    name: Name
    model: str
    """The one-step model that it controls."""
    pairs: str = ""
    """Pairs whose pictures it learns, beside any noise; '' takes the data's pictures."""
    control: ControlKind = "edges"
    """What its pictures show of a drawing."""
    init: str = ""
    """A control of the same model to start from, in its own shape, as `generate --control` names it: a name or a
    folder; '' starts from the model's own encoder."""
    empty_prompts: Fraction = 0.5
    """Share of prompts dropped, so that the control has to say it (half of them, as in its paper)."""
    middle_attention: bool = True
    """Whether the branch copies the attention of the U-Net's middle too; without, it is smaller."""
    train: Train


class Evaluate(Spec, frozen=True, kw_only=True, tag="evaluate", tag_field="kind"):
    """Distances, retrieval, straightness and a grid of the same noises under every model named."""

    name: Name
    models: Annotated[tuple[Annotated[str, Meta(pattern=r"^[^@]+(@[1-9][0-9]*)?$")], ...], Meta(min_length=1)]
    """Stages or folders, each optionally with '@steps': 'teacher@25', 'one-step'."""
    count: Count = 5000
    """Pictures drawn for each model, of unseen concepts and as many of seen ones."""
    curve_count: Annotated[int, Meta(ge=0)] = 0
    """Pictures at each point of the curves over steps and guidance; 0 draws no curves."""
    seed: Seed = 0


Stage = Autoencoder | Decoder | Teacher | Pairs | Reflow | Distil | Control | Personalise | Evaluate


class Recipe(Spec, frozen=True, kw_only=True):
    """A whole run."""

    name: Name
    """The run's folder under `runs/`."""
    seed: Seed = 0
    data: Data = Data()
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Stage names are unique; what a stage reads is an earlier stage or a path."""
        seen: set[str] = set()
        for i, stage in enumerate(self.stages):
            if stage.name in seen:
                raise ValueError(f"stages[{i}].name {stage.name!r} is used twice")
            for name in inputs(stage):
                if name not in seen and "/" not in name:
                    allowed = ", ".join(sorted(seen)) or "none yet"
                    raise ValueError(f"stages[{i}] reads {name!r}, which is no earlier stage ({allowed}) and no path")
            seen.add(stage.name)

    def stage(self, name: str) -> Stage:
        """The stage of that name, or the only one of that kind."""
        found = [s for s in self.stages if s.name == name] or [s for s in self.stages if kind(s) == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise RecipeError(
                f"recipe {self.name!r} has several stages of kind {name}: {', '.join(s.name for s in found)}"
            )
        raise RecipeError(
            f"no stage {name!r} in recipe {self.name!r}; it has: {', '.join(s.name for s in self.stages)}"
        )


def kind(stage: Stage) -> str:
    """The stage's tag: autoencoder, decoder, teacher, pairs, reflow, distil, control, personalise or evaluate."""
    return str(type(stage).__struct_config__.tag)


def inputs(stage: Stage) -> tuple[str, ...]:
    """Names of the stages or folders that a stage reads."""
    match stage:
        case Autoencoder():
            return (stage.model,) if stage.model else ()
        case Teacher():
            return (stage.autoencoder, stage.model) if stage.model else (stage.autoencoder,)
        case Pairs():
            return (stage.model,)
        case Control():
            return (stage.model, stage.pairs) if stage.pairs else (stage.model,)
        case Reflow() | Distil() | Decoder():
            return (stage.model, stage.pairs)
        case Personalise():
            return (stage.model, stage.teacher) if stage.teacher else (stage.model,)
        case Evaluate():
            return tuple(name.split("@")[0] for name in stage.models)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: no such file, broken TOML, an unknown field or a value outside its range; one
            line with the value, the rule and the place.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no such recipe: {path}") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"broken TOML: {error} ({path})") from error
    try:
        return msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{_explain(str(error), raw)} ({path})") from error


def _explain(message: str, raw: dict[str, object]) -> str:
    """msgspec's 'Expected `float` > 0.0 - at `$.stages[0].train.lr`' with the value given and what is allowed."""
    text, _, place = message.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    value: object = raw
    shown: list[str] = []
    tag = ""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        tag = str(value.get("kind", tag)) if isinstance(value, dict) else tag
        try:
            value = value[int(index)] if index else value[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
        name = value.get("name") if index and isinstance(value, dict) else None
        shown.append(f"[{name or index}]" if index else f".{key}")
    where = "".join(shown).lstrip(".")
    field = where.rpartition(".")[2]
    if text.startswith("Invalid value") and field == "kind":
        return f"{where}: {value!r} is no kind of stage; allowed: {', '.join(kinds())}"
    if text.startswith("Invalid enum value"):
        return f"{where}: {value!r} is not allowed; allowed: {', '.join(_choices(field, tag))}"
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", text):
        near = difflib.get_close_matches(unknown[1], {f for s in _specs() for f in s.__struct_fields__}, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where or 'the recipe'} has no field {unknown[1]!r}{hint}"
    given = "" if isinstance(value, dict | list) else f", got {value!r}"
    text = re.sub(r", got `\w+`$", "", text) if given else text
    return f"{where}: {text}{given}" if where else f"{text}{given}"


def kinds() -> list[str]:
    """The tags of all stages."""
    return [str(s.__struct_config__.tag) for s in get_args(Stage)]


def _specs() -> list[type[Spec]]:
    return [Data, Train, Recipe, *get_args(Stage)]


def _choices(field: str, tag: str) -> list[str]:
    """What a field that takes one of several words takes, in a stage of this kind."""
    for spec in sorted(_specs(), key=lambda s: s.__struct_config__.tag != tag):
        hint = get_type_hints(spec).get(field)
        if get_origin(hint) is Literal:
            return [repr(word) for word in get_args(hint)]
    return []


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default said."""
    import tomli_w  # drawing pictures needs none

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(msgspec.to_builtins(recipe)), encoding="utf-8")
