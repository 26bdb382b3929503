"""The default model behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn
from peft import LoraConfig

from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.lora import ADAPTER, save_lora
from instaflow.serve.app import create_app


@contextmanager
def served(flow: InstaFlow, **options: object) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(flow, **options), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[str]]:
    """A service over a model, in a thread → its address."""
    return served


@pytest.fixture(scope="session")
def flow() -> InstaFlow:
    return InstaFlow.load()


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random ones, 'bold' and 'soft'."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("bold", "soft")):
        torch.manual_seed(seed)
        bundle = Bundle.load(DEFAULT)
        names = ["to_q", "to_v"]
        bundle.unet.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False), ADAPTER)
        save_lora(bundle, folder / f"{name}.safetensors")
    return folder
