"""The API over a real socket: OpenAI's own client, the same bytes in any batch, and every kind of bad request."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from test_images import forged

from instaflow.generate import InstaFlow
from instaflow.models.hub import CONTROLS
from instaflow.models.request import Blend, Control, read_image
from instaflow.noise import Walk
from instaflow.serve.app import create_app
from instaflow.serve.orders import Limits

DRAW = "/v1/images/generations"
Serving = Callable[..., AbstractContextManager[str]]
PROMPTS = ["a red apple", "cat face", "green frog", "sun"]


@pytest.fixture(scope="module")
def url(serving: Serving, flow: InstaFlow) -> Iterator[str]:
    with serving(flow, controls={"edges": CONTROLS / "edges"}, limits=Limits(queue=400, body_bytes=10_000)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as found:
        yield found


def png(entry: dict) -> bytes:
    return base64.b64decode(entry["b64_json"])


def test_openais_own_client(url: str, flow: InstaFlow) -> None:
    quiet = httpx.Client(trust_env=False)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", http_client=quiet)
    assert [m.id for m in client.models.list()] == [flow.engine.card.name]
    answer = client.images.generate(
        model=flow.engine.card.name, prompt="a red apple", n=2, size="64x64", user="me", extra_body={"seed": 7}
    )
    drawn = [base64.b64decode(d.b64_json or "") for d in answer.data]
    assert drawn == [flow.generate("a red apple", seed=s).png() for s in (7, 8)]
    with Image.open(io.BytesIO(drawn[1])) as picture:
        assert picture.text["seed"] == "8" and picture.text["model"] == flow.engine.card.name
    by_url = client.images.generate(prompt="sun", response_format="url").data[0].url
    assert by_url.startswith("data:image/png;base64,")
    with pytest.raises(openai.BadRequestError, match="steps=2 is not allowed"):
        client.images.generate(prompt="sun", extra_body={"steps": 2})


def test_a_picture_is_the_same_alone_and_in_the_crowd(client: httpx.Client, flow: InstaFlow) -> None:
    rng = random.Random(0)
    asked = [(rng.choice(PROMPTS), rng.randrange(40), rng.choice([64, 64, 64, 32])) for _ in range(240)]

    def ask(what: tuple[str, int, int]) -> bytes:
        prompt, seed, size = what
        answer = client.post(DRAW, json={"prompt": prompt, "seed": seed, "size": f"{size}x{size}"})
        assert answer.status_code == 200, answer.text
        return png(answer.json()["data"][0])

    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(ask, asked))
    alone = {w: flow.generate(w[0], seed=w[1], size=w[2]).png() for w in set(asked)}
    assert answers == [alone[w] for w in asked]
    assert 'instaflow_batch_bucket{le="8.0"}' in client.get("/metrics").text


def test_a_walk_between_two_seeds(client: httpx.Client, flow: InstaFlow) -> None:
    def walk(mix: float) -> list[bytes]:
        asked = {"prompt": "sun", "n": 2, "seed": 7, "seed2": 30, "mix": mix}
        return [png(d) for d in client.post(DRAW, json=asked).json()["data"]]

    assert walk(0) == [flow.generate("sun", seed=s).png() for s in (7, 8)]
    assert walk(0.5) == [flow.generate("sun", seed=Walk(s, t, 0.5)).png() for s, t in ((7, 30), (8, 31))]
    assert walk(0.5) != walk(0.6)
    with Image.open(io.BytesIO(walk(0.5)[0])) as picture:
        assert (picture.text["seed"], picture.text["seed2"], picture.text["mix"]) == ("7", "30", "0.5")
    assert "needs seed2 or prompt2" in client.post(DRAW, json={"prompt": "sun", "mix": 0.5}).text


def test_a_walk_between_two_prompts(client: httpx.Client, flow: InstaFlow) -> None:
    def walk(mix: float) -> bytes:
        asked = {"prompt": "a red apple", "prompt2": "a green apple", "seed": 7, "mix": mix}
        return png(client.post(DRAW, json=asked).json()["data"][0])

    assert walk(0) == flow.generate("a red apple", seed=7).png()
    assert walk(0.5) == flow.generate(Blend("a red apple", "a green apple", 0.5), seed=7).png()
    ends = [np.array(Image.open(io.BytesIO(walk(m))), float) for m in (0, 0.5, 1)]
    assert np.abs(ends[2] - np.array(flow.generate("a green apple", seed=7).image, float)).max() <= 2
    red_less_green = [float((e[..., 0] - e[..., 1]).mean()) for e in ends]
    assert red_less_green[0] > red_less_green[1] > red_less_green[2]
    with Image.open(io.BytesIO(walk(0.5))) as picture:
        assert (picture.text["prompt2"], picture.text["prompt mix"]) == ("a green apple", "0.5")


SKETCH = Path("examples/sketch.png")


def test_a_control_is_chosen_by_name_and_shown_a_picture(client: httpx.Client, flow: InstaFlow) -> None:
    assert client.get("/v1/models").json()["data"][0]["instaflow"]["controls"] == {"edges": "edges"}
    shown = {"image": base64.b64encode(SKETCH.read_bytes()).decode(), "scale": 0.8}
    asked = {"prompt": "a blue fish", "n": 2, "seed": 7, "control": {"edges": shown}}
    drawn = [png(d) for d in client.post(DRAW, json=asked).json()["data"]]
    edges = flow.engine.load_control(CONTROLS / "edges")
    control = Control(network=edges, name="edges", image=read_image(SKETCH), scale=0.8)
    assert drawn == [flow.generate("a blue fish", seed=s, control=[control]).png() for s in (7, 8)]
    with Image.open(io.BytesIO(drawn[0])) as picture:
        assert picture.text["control"] == "edges at 0.8"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (forged(50_000, 50_000), "too large"),
        (forged(8_000, 8_000), "8000x8000"),
        (forged(1025, 8), "1025x8"),
        (forged(64, 64), "damaged"),
        (SKETCH.read_bytes()[:100], "damaged"),
        (b"GIF89a" + bytes(50), "no picture; allowed: PNG"),
        (b"", "no picture"),
    ],
)
def test_a_broken_control_picture_is_refused_before_it_is_decoded(
    client: httpx.Client, image: bytes, said: str
) -> None:
    asked = {"prompt": "sun", "control": {"edges": {"image": base64.b64encode(image).decode()}}}
    answer = client.post(DRAW, json=asked)
    assert answer.status_code == 400
    assert re.match(f"control.edges.image: .*({said})", answer.json()["error"]["message"])


def test_a_wrong_control_is_refused(client: httpx.Client) -> None:
    whole = {"image": base64.b64encode(SKETCH.read_bytes()).decode()}
    for control, said in (
        ({"../edges": whole}, "there is: edges"),
        ({"edges": {"image": "no base64!"}}, "no base64"),
        ({"edges": {"image": "ü"}}, "no base64"),
        ({"edges": {"image": "/etc/passwd"}}, "no picture|no base64"),
        ({"edges": {**whole, "scale": 3}}, "less than or equal to 2"),
        ({"edges": {**whole, "size": 3}}, "not permitted"),
    ):
        answer = client.post(DRAW, json={"prompt": "sun", "control": control})
        assert answer.status_code == 400 and re.search(said, answer.json()["error"]["message"]), answer.text
    answer = client.post(DRAW, json={"prompt": "sun", "size": "32x32", "control": {"edges": whole}})
    assert answer.status_code == 400 and "under control at 64" in answer.text


def corpus() -> list[bytes]:
    """Bodies that are no request: wrong types and ranges in every field, unknown fields, cuts, noise, depths."""
    good = {"prompt": "a red apple", "n": 1, "size": "64x64", "seed": 1, "steps": 1, "guidance": 1.0}
    strange = [
        [],
        {},
        [1],
        "",
        "x" * 5000,
        "\x00",
        -1,
        0,
        1.5,
        10**30,
        True,
        "64x32",
        "0x0",
        "99999x99999",
        "../../etc",
    ]
    sound = {
        ("seed", 0),
        ("seed2", 0),
        ("mix", 0),
        *(
            (p, v)
            for p in ("prompt", "prompt2")
            for v in strange
            if isinstance(v, str) and v.endswith(("2", "0", "9", "etc"))
        ),
    }
    found = []
    for field in [*good, "response_format", "seed2", "prompt2", "mix", "style", "lora", "control", "model", "nonsense"]:
        for value in strange:
            wrong = isinstance(value, list | dict | bool) or (field, value) not in sound
            if wrong and (field, value) not in (("guidance", True), ("lora", {}), ("control", {})):
                found.append(json.dumps({**good, field: value}).encode())
    whole = json.dumps(good).encode()
    found += [whole[:i] for i in range(0, len(whole), 4)]
    rng = random.Random(1)
    found += [rng.randbytes(50) for _ in range(50)]
    found += [
        b"[" * 9000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"guidance": NaN}',
        b"null",
        b" " * 20_000,
    ]
    return found


def test_bad_bodies_are_refused_in_one_clear_line(client: httpx.Client) -> None:
    bodies = corpus()
    assert len(bodies) >= 200
    for body in bodies:
        answer = client.post(DRAW, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (body[:200], answer.text)
        said = answer.json()["error"]["message"]
        assert said and "\n" not in said and "Traceback" not in said and "/src/" not in said
    assert client.post(DRAW, json={"prompt": "word " * 60}).json()["error"]["message"].startswith("the prompt has 62")
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_a_body_that_is_too_large_or_does_not_come(serving: Serving, flow: InstaFlow) -> None:
    with serving(flow, limits=Limits(body_bytes=1000, body_s=0.5)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stalled:
            stalled.sendall(f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{}}".encode())
            assert b" 408 " in stalled.recv(1000).splitlines()[0]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            assert client.post(DRAW, content=b" " * 2000).status_code == 413
            assert 'instaflow_requests_total{status="413"} 1.0' in client.get("/metrics").text


def test_a_full_queue_is_429_and_nothing_else(serving: Serving, flow: InstaFlow) -> None:
    with (
        serving(flow, limits=Limits(queue=2)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda i: client.post(DRAW, json={"prompt": "sun", "seed": i}), range(200)))
        assert {a.status_code for a in answers} == {200, 429}
        assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 429)
        assert client.post(DRAW, json={"prompt": "sun"}).status_code == 200


def test_a_picture_that_fails_is_500_without_its_reason(
    serving: Serving, flow: InstaFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = flow.engine.decode
    with serving(flow) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        monkeypatch.setattr(flow.engine, "decode", lambda _: (_ for _ in ()).throw(MemoryError("/secret/place")))
        answer = client.post(DRAW, json={"prompt": "sun"})
        assert answer.status_code == 500 and "secret" not in answer.text
        monkeypatch.setattr(flow.engine, "decode", whole)
        assert client.post(DRAW, json={"prompt": "sun"}).status_code == 200


def test_a_key_is_asked_for(serving: Serving, flow: InstaFlow) -> None:
    with serving(flow, api_key="k") as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for sent, status in (
            ({}, 401),
            ({"Authorization": "Bearer ü".encode()}, 401),
            ({"Authorization": "Bearer k"}, 200),
        ):
            assert client.post(DRAW, json={"prompt": "sun"}, headers=sent).status_code == status
        assert client.post(DRAW, content=b"no JSON").status_code == 401
        assert client.post(DRAW, content=b" " * 2_000_000).headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("prefix", ["/pictures", "/v1"])
def test_a_key_is_asked_for_behind_a_prefix(flow: InstaFlow, prefix: str) -> None:
    whole = FastAPI()
    whole.mount(prefix, create_app(flow, api_key="k"))
    client = TestClient(whole)
    assert client.get(f"{prefix}/v1/models").status_code == 401
    assert client.get(f"{prefix}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
    assert client.get(f"{prefix}/healthz").status_code == 200


def test_the_page_names_no_other_host(client: httpx.Client) -> None:
    for file in ("", "page/page.js", "page/page.css"):
        answer = client.get(f"/{file}")
        assert answer.status_code == 200 and "//" not in answer.text.replace("// ", "")
    for path in ("/../app.py", "/page/%2e%2e/app.py", "/page/nothing", "/nothing"):
        assert client.get(path).status_code == 404


def test_a_wrong_method_is_told_the_right_one(client: httpx.Client) -> None:
    for path, method, allowed in ((DRAW, "GET", "POST"), ("/v1/models", "DELETE", "GET"), ("/healthz", "PUT", "GET")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        assert answer.json()["error"]["message"] == "Method Not Allowed"


def test_the_schema_names_the_statuses_that_are_answered(client: httpx.Client) -> None:
    statuses = {"200", "400", "401", "404", "408", "413", "429", "500"}
    assert client.get("/openapi.json").json()["paths"][DRAW]["post"]["responses"].keys() == statuses


@pytest.mark.parametrize("options", [["--port", "0"], ["--queue", "0"], ["--api-key-file", "empty"]])
def test_a_mistake_is_one_line(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    words = [sys.executable, "-m", "instaflow", "serve", *options]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and options[0] in done.stderr


def test_sigterm_answers_what_was_asked_and_exits_0() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "instaflow", "serve", "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            for _ in range(600):
                try:
                    client.get("/readyz")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            with ThreadPoolExecutor(3) as pool:
                asked = [pool.submit(client.post, DRAW, json={"prompt": "sun", "n": 16}) for _ in range(3)]
                while "instaflow_pictures_total 0.0" in client.get("/metrics").text:
                    time.sleep(0.005)
                server.send_signal(signal.SIGTERM)
                assert [a.result().status_code for a in asked] == [200] * 3
        assert server.wait(60) == 0
        assert f" at http://127.0.0.1:{port}  openvino " in server.stdout.read()
    finally:
        server.kill()
