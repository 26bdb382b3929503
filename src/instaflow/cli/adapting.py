"""Verbs that fit a model to somebody: personalise, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from msgspec.structs import replace

from instaflow.cli.app import Root, app, check_free, check_writable, hush
from instaflow.errors import DataError


@app.command
def personalise(
    *pictures: str,
    subject: str = "",
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    model: str | None = None,
    teacher: str | None = None,
    steps: int | None = None,
    rank: int | None = None,
    prompts: str = "",
    root: Root = Path("runs"),
) -> None:
    """Teach a model a subject or a hand from a few pictures: a LoRA for `generate --lora`. Run again, it goes on.

    ```
    instaflow personalise examples/cat --subject "sks cat" --out cat.safetensors
    instaflow personalise data/emoji-64/noto-v1.parquet --out blobs.safetensors
    instaflow generate "sks cat" --lora cat.safetensors
    ```

    Parameters
    ----------
    pictures
        Three or more picture files, folders of them, or Parquet.
    subject
        The words that shall mean the subject; without them each picture's caption is learnt, in this hand: a .txt
        beside it.
    out
        The .safetensors file to write.
    model
        What learns: a folder or a hub id; left out, the default model.
    teacher
        A many-step model that learns the pictures first and then draws what the one-step model learns.
    steps
        Optimiser steps; a teacher takes three times as many. Left out, 100 for a subject and 1,000 for a hand.
    rank
        Of the LoRA; the file grows with it. Left out, 8 for a subject and 32 for a hand.
    prompts
        What the model must keep drawing as before: a .txt or .parquet file; left out, words of its tokenizer for a
        subject, and nothing for a hand.
    """
    if not pictures:
        raise DataError(
            'no pictures: instaflow personalise cat1.png cat2.png cat3.png --subject "sks cat" -o cat.safetensors'
        )
    if out.suffix != ".safetensors":
        raise DataError(f"--out {out}: a LoRA is written as .safetensors")
    if out.exists():
        raise DataError(f"--out {out} is there already; name another")
    if steps is None:
        steps = 100 if subject else 1000
    if rank is None:
        rank = 8 if subject else 32
    if steps < 1 or rank < 1:
        raise DataError(f"--steps={steps} --rank={rank} is not allowed; use 1 or more of each")
    hush()
    import shutil
    from hashlib import sha256

    from instaflow.data.pictures import content_hash
    from instaflow.models.card import DEFAULT, read_card
    from instaflow.models.hub import locate
    from instaflow.recipe import Personalise, Recipe, Train
    from instaflow.training.personalise import read_subject
    from instaflow.training.run import Run
    from instaflow.training.stages import LORA

    source = str(locate(DEFAULT if model is None else model).resolve())
    train = Train(steps=steps, batch_size=16, lr=1e-3, lr_warmup_steps=10, ema=0.99)
    own = Personalise(
        name="personalise", model=source, pictures=pictures, subject=subject, rank=rank, prompts=prompts, train=train
    )
    if not subject:  # a hand is for all prompts, and more to learn: recipes/personalise.toml
        count, prior = own.count if teacher else 4096, own.prior if prompts else 0
        own = replace(own, perceptual_weight=5.0, count=count, prior=prior)
    stages: tuple[Personalise, ...] = (own,)
    if teacher is not None:
        if read_card(locate(teacher)).kind == "one-step":
            raise DataError(f"--teacher {teacher} is a one-step model; use one of many steps")
        first = replace(
            own, name="teacher", model=str(locate(teacher).resolve()), train=replace(train, steps=3 * steps)
        )
        stages = (first, replace(own, teacher="teacher"))
    learnt = read_subject(pictures, subject, read_card(Path(source)).image_size)
    # other pictures under the same name are another run
    content = content_hash(learnt) + repr(stages)
    recipe = Recipe(name=f"{out.stem}-{sha256(content.encode()).hexdigest()[:8]}", stages=stages)
    check_writable(out)
    run = Run(recipe, root, cache=Path("data"))
    run.run(lambda *_: None)
    part = out.with_name(f"{out.name}.tmp")
    shutil.copyfile(run.folder / "personalise" / LORA, part)
    part.replace(out)
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB")


@app.command
def merge(
    *,
    base: str,
    tuned: str,
    into: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    scale: float = 1.0,
    vae: Literal["into", "tuned"] = "into",
    text_encoder: Literal["into", "tuned"] = "into",
) -> None:
    """Add what tuning changed in a many-step model to a one-step model made from it: into + scale·(tuned − base).

    ```
    instaflow merge --base sd15/ --tuned dreamshaper/ --into XCLiu/instaflow_0_9B_from_sd_1_5 -o merged/
    ```

    Parameters
    ----------
    base
        What the tuned model was tuned from: a folder, a hub id or a Stable Diffusion 1.x .safetensors file.
    tuned
        The tuned model.
    into
        The model to change.
    out
        The folder to write, whole or not at all.
    scale
        How much of the difference counts.
    vae
        Whose autoencoder: into or tuned.
    text_encoder
        Whose text encoder: into or tuned.
    """
    check_free(out)
    hush()
    from instaflow.models.merge import merge as add

    print(add(base, tuned, into, out, scale=scale, vae=vae, text_encoder=text_encoder))
