"""Each stage in a run: what it reads, what it trains, what it leaves. How it trains is in the file of its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from instaflow.data.pairs import open_pairs, read_manifest
from instaflow.data.pictures import content_hash
from instaflow.data.prompts import read_prompts
from instaflow.errors import DataError, RecipeError
from instaflow.models.bundle import Bundle, load_autoencoder, publish, save_network
from instaflow.models.card import Card, ControlCard, bundle_hash
from instaflow.models.control import build_control, load_control, save_control
from instaflow.models.hub import find_control
from instaflow.models.networks import build_scheduler, build_unet, load_minilm
from instaflow.models.stacked import StackedUNet
from instaflow.recipe import Autoencoder, Control, Decoder, Distil, Pairs, Personalise, Reflow, Stage, Teacher
from instaflow.training.autoencoder import autoencoder_stage, encode_all, finish
from instaflow.training.control import control_stage, from_pairs, from_pictures
from instaflow.training.decoder import decoder_stage
from instaflow.training.distil import distil_stage
from instaflow.training.pairs import draw_pairs, draw_prompts, drop_prompts
from instaflow.training.reflow import reflow_stage
from instaflow.training.teacher import prompt_preview, teacher_stage
from instaflow.training.trainer import train

if TYPE_CHECKING:
    from instaflow.training.run import Run

LORA = "lora.safetensors"  # what a personalise stage makes, beside a bundle with it fused


def carry_out(run: Run, stage: Stage) -> None:
    """Run one stage to its end."""
    folder = run.folder / stage.name
    match stage:
        case Autoencoder():
            _autoencoder(run, stage, folder)
        case Teacher():
            _teacher(run, stage, folder)
        case Pairs():
            _pairs(run, stage)
        case Decoder():
            _decoder(run, stage, folder)
        case Control():
            _control(run, stage, folder)
        case Reflow():
            _reflow(run, stage, folder)
        case Distil():
            _distil(run, stage, folder)
        case Personalise():
            _personalise(run, stage, folder)


def _pairs(run: Run, stage: Pairs) -> None:
    bundle, teacher = run.bundle(stage.model), bundle_hash(run.output(stage.model))
    if stage.prompts:
        prompts = read_prompts(stage.prompts, stage.count)
    else:
        prompts = draw_prompts(run.in_styles(bundle.card.styles), stage.count, stage.mixtures, stage.seed)
    prompts = drop_prompts(prompts, stage.empty_prompts, stage.seed)
    draw_pairs(stage, bundle, prompts, run.output(stage.name), teacher=teacher, workers=run.workers)


def _autoencoder(run: Run, stage: Autoencoder, folder: Path) -> None:
    size = run.recipe.data.size
    vae = load_autoencoder(run.output(stage.model), run.device) if stage.model else None
    built = autoencoder_stage(stage, run.training_pictures, size, vae=vae, device=run.device)
    network = train(built, stage.train, folder, seed=run.recipe.seed, name=stage.name)
    vae = network.vae if stage.model else finish(network, run.training_pictures, size)
    if run.processes.is_main_process:
        part = folder / "bundle.tmp"
        save_network(vae, part / "vae")
        publish(part, run.output(stage.name))


def _decoder(run: Run, stage: Decoder, folder: Path) -> None:
    bundle, pairs = run.bundle(stage.model), open_pairs(run.output(stage.pairs))
    _check_shape(run, stage, bundle)
    network: Any = train(
        decoder_stage(stage, bundle, pairs), stage.train, folder, seed=run.recipe.seed, name=stage.name
    )
    if run.processes.is_main_process:
        part = folder / "bundle.tmp"
        save_network(network.vae, part / "vae")
        publish(part, run.output(stage.name))


def _control(run: Run, stage: Control, folder: Path) -> None:
    bundle, source = run.bundle(stage.model), run.output(stage.model)
    if bundle.card.kind != "one-step":
        raise RecipeError(f"{stage.name}: {stage.model} is a {bundle.card.kind} model; control wants a one-step one")
    base = bundle_hash(source)
    torch.manual_seed(run.recipe.seed)  # the layers that read the picture start at random
    if stage.init:
        branch = load_control(find_control(stage.init), bundle, base).requires_grad_(True)
    else:
        branch = build_control(bundle, middle_attention=stage.middle_attention)
    if stage.pairs:
        _check_shape(run, stage, bundle)
        learnt, lineage = from_pairs(open_pairs(run.output(stage.pairs)), bundle), _descent(run, stage)
    else:
        size, pictures = run.recipe.data.size, run.training_pictures  # of any hand: more shapes to follow
        if bundle.card.image_size != size:
            raise DataError(f"the data's pictures are {size} px, the model's {bundle.card.image_size}")
        learnt = from_pictures(pictures, encode_all(bundle.vae, pictures, size), size)
        lineage = run.lineage(stage, parent=base, data=content_hash(pictures))
    built = control_stage(stage, bundle, branch, learnt)
    network: Any = train(built, stage.train, folder, seed=run.recipe.seed, name=stage.name)
    if run.processes.is_main_process:
        card = ControlCard(kind=stage.control, base=bundle.card.name, base_hash=base, lineage=lineage)
        save_control(network.control, card, run.output(stage.name))


def _check_shape(run: Run, stage: Reflow | Distil | Decoder | Control, bundle: Bundle) -> None:
    shape = read_manifest(run.output(stage.pairs)).shape
    if shape != bundle.latent_shape():
        raise DataError(f"{stage.pairs} has latents {shape}, the model {bundle.latent_shape()}")


def _teacher(run: Run, stage: Teacher, folder: Path) -> None:
    size, pictures = run.recipe.data.size, run.in_styles(stage.styles)
    source = run.output(stage.autoencoder)
    vae = load_autoencoder(source, run.device)
    latents = encode_all(vae, pictures, size)
    encoder, tokenizer = load_minilm()
    torch.manual_seed(run.recipe.seed)
    if stage.model:
        unet = run.bundle(stage.model).unet.requires_grad_(True)
    else:
        unet = build_unet(
            stage,
            latent_channels=latents.shape[1],
            latent_size=latents.shape[2],
            text_width=encoder.config.hidden_size,
        )
    card = Card(
        name=f"{run.recipe.name}-{stage.name}",
        kind="teacher",
        prediction=stage.prediction,
        image_size=size,
        guidance=stage.guidance,
        styles=tuple(sorted({p.style for p in pictures} - {""})),
        licence=", ".join(sorted({p.licence for p in pictures} - {""})) or "unknown",
        lineage=run.lineage(stage, autoencoder=bundle_hash(source), data=content_hash(pictures)),
    )
    bundle = Bundle(
        unet=unet,
        vae=vae,
        text_encoder=encoder.to(run.device),
        tokenizer=tokenizer,
        scheduler=build_scheduler(stage.prediction),
        card=card,
    )
    built = teacher_stage(stage, bundle, pictures, latents)
    train(built, stage.train, folder, seed=run.recipe.seed, name=stage.name)
    if run.processes.is_main_process:
        bundle.save(run.output(stage.name))


def _reflow(run: Run, stage: Reflow, folder: Path) -> None:
    bundle = run.bundle(stage.model)
    raw = stage.init == "raw"
    bundle = bundle.with_card(
        name=f"{run.recipe.name}-{stage.name}",
        kind="rectified",
        prediction="velocity" if raw else bundle.card.prediction,
        guidance=stage.guidance,
        max_guidance=2.0,
        lineage=_descent(run, stage),
        results={},
    )
    _train_on_pairs(run, stage, bundle, folder)


def _distil(run: Run, stage: Distil, folder: Path) -> None:
    bundle = run.bundle(stage.model).with_card(
        name=f"{run.recipe.name}-{stage.name}",
        kind="one-step",
        steps=1,
        guidance=1.0,
        max_guidance=1.0,
        lineage=_descent(run, stage),
        results={},
    )
    _train_on_pairs(run, stage, bundle, folder)


def _personalise(run: Run, stage: Personalise, folder: Path) -> None:
    from instaflow.models.lora import drop_lora, fuse_lora, save_lora  # peft, which no other stage needs
    from instaflow.training.personalise import add_lora, personal_pairs, personalise_stage, read_subject

    bundle, model = run.bundle(stage.model), bundle_hash(run.output(stage.model))
    pictures = read_subject(stage.pictures, stage.subject, bundle.card.image_size)
    teacher = (run.bundle(stage.teacher), bundle_hash(run.output(stage.teacher))) if stage.teacher else None
    with run.processes.main_process_first():
        pairs = personal_pairs(stage, bundle, pictures, folder, model=model, teacher=teacher)
    bundle = bundle.with_card(
        name=f"{run.recipe.name}-{stage.name}",
        lineage=run.lineage(stage, parent=model, pictures=content_hash(pictures)),
        results={},
    )
    add_lora(bundle, stage.rank, run.recipe.seed)
    train(personalise_stage(stage, bundle, pairs), stage.train, folder, seed=run.recipe.seed, name=stage.name)
    if run.processes.is_main_process:
        save_lora(bundle, folder / LORA)
        fuse_lora(bundle)
        drop_lora(bundle)
        bundle.save(run.output(stage.name))


def _descent(run: Run, stage: Reflow | Distil | Control) -> dict[str, Any]:
    manifest = msgspec.to_builtins(read_manifest(run.output(stage.pairs)))
    return run.lineage(stage, parent=bundle_hash(run.output(stage.model)), pairs=manifest)


def _train_on_pairs(run: Run, stage: Reflow | Distil, bundle: Bundle, folder: Path) -> None:
    _check_shape(run, stage, bundle)
    pairs = open_pairs(run.output(stage.pairs))
    if stage.stack:
        if isinstance(bundle.unet, StackedUNet):
            raise RecipeError(f"{stage.name}: {stage.model} is a stack of two already; leave stack out")
        bundle = replace(bundle, unet=StackedUNet.of(bundle.unet, stage.stack))
    bundle.unet.requires_grad_(True)
    built = reflow_stage(stage, bundle, pairs) if isinstance(stage, Reflow) else distil_stage(stage, bundle, pairs)
    built = replace(built, preview=prompt_preview(bundle, pairs.load(0).prompts, steps=1))
    train(built, stage.train, folder, seed=run.recipe.seed, name=stage.name)
    if run.processes.is_main_process:
        bundle.save(run.output(stage.name))
