"""Two replicas on a local Ray: one is killed under load; OpenAI's client tries again, and no answer is wrong."""

from __future__ import annotations

import base64
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import psutil
import pytest

from instaflow.generate import InstaFlow

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray import serve  # noqa: E402

from instaflow.serve.replicas import Options, application  # noqa: E402

SEEDS, SECONDS = 8, 12


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(Options(least=2, most=2, cpus=0.5)))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list[psutil.Process]:
    found = [p for p in psutil.process_iter() if "ServeReplica" in " ".join(p.cmdline() or [""])]
    return [p for p in found if p.is_running()]


def test_one_of_two_is_killed_under_load(url: str, flow: InstaFlow) -> None:
    alone = {seed: flow.generate("sun", seed=seed).png() for seed in range(SEEDS)}
    before = {p.pid for p in replicas()}
    assert len(before) == 2
    until = time.monotonic() + SECONDS
    statuses: Counter[int] = Counter()

    def ask(seed: int) -> int:
        quiet = httpx.Client(trust_env=False, event_hooks={"response": [lambda r: statuses.update([r.status_code])]})
        client, answers = openai.OpenAI(base_url=f"{url}/v1", api_key="any", http_client=quiet), 0
        while time.monotonic() < until:
            answer = client.images.generate(prompt="sun", extra_body={"seed": seed})
            assert base64.b64decode(answer.data[0].b64_json or "") == alone[seed]
            answers += 1
        return answers

    with ThreadPoolExecutor(SEEDS) as pool:
        asking = [pool.submit(ask, seed) for seed in range(SEEDS)]
        time.sleep(SECONDS / 4)
        psutil.Process(min(before)).kill()
        answers = sum(one.result() for one in asking)
    print(statuses)
    assert answers == statuses[200] > 100 and set(statuses) <= {200, 500, 503}
    until = time.monotonic() + 60
    while len(replicas()) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert {p.pid for p in replicas()} != before and len(replicas()) == 2
