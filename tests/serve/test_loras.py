"""LoRAs of a configured folder: by name, each at its scale, and nothing of the folder in an answer."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2 as httpx
import pytest

from instaflow.generate import InstaFlow

DRAW = "/v1/images/generations"


def test_a_request_mixes_them_by_name(serving: Callable[..., AbstractContextManager[str]], loras: Path) -> None:
    flow = InstaFlow.load(lora=sorted(loras.glob("*")))
    with serving(flow) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def draw(**lora: float) -> bytes:
            answer = client.post(DRAW, json={"prompt": "a red apple", "seed": 7, "lora": lora})
            return base64.b64decode(answer.json()["data"][0]["b64_json"])

        assert client.get("/v1/models").json()["data"][0]["instaflow"]["loras"] == ["bold", "soft"]
        assert draw() == draw(bold=0) == InstaFlow.load(engine="torch").generate("a red apple", seed=7).png()
        mixed = flow.generate("a red apple", seed=7, lora_scale=(-1, 0.5))
        assert draw(soft=0.5, bold=-1) == mixed.png() and mixed.metadata["lora"] == "bold at -1, soft at 0.5"
        assert len({draw(), draw(bold=1), draw(soft=1), draw(bold=1, soft=1)}) == 4
        for wrong in ({"none": 1}, {"../bold": 1}, {str(loras / "bold.safetensors"): 1}, {"bold": 3}, "bold", ["bold"]):
            answer = client.post(DRAW, json={"prompt": "sun", "lora": wrong})
            assert answer.status_code == 400 and str(loras) not in answer.text, answer.text


@pytest.mark.parametrize("options", [["--loras", "empty"], ["--loras", "empty", "--engine", "openvino"]])
def test_a_mistake_is_one_line(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [sys.executable, "-m", "instaflow", "serve", *options]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--loras" in done.stderr
