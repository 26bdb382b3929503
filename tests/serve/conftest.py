"""The default model behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import uvicorn

from instaflow.generate import InstaFlow
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
