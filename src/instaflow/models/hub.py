"""Where a model is: a folder, a single file, or an id on the Hugging Face hub. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from instaflow.errors import BundleError

CONTROLS = Path(__file__).parents[1] / "controls"  # for the default model
LORA_FILE = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
# What a bundle is made of; a repository's single-file and fp16 copies of the same weights stay where they are.
FILES = (
    "README.md",
    "model_index.json",
    "instaflow.json",
    "*/*.json",
    "*/*.txt",
    "*/model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
    "*/*-of-*.safetensors",
)


def locate(source: str | Path) -> Path:
    """The folder or .safetensors file of a model; a hub id is downloaded into the cache, or found there.

    Args:
        source: a folder, a .safetensors file or an 'owner/name' of the hub.

    Raises:
        BundleError: nothing there, a pickle, or an id that is neither cached nor to be had.
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise BundleError(f"{source} is a pickle, which can run code when it is read; convert it to .safetensors first")
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".safetensors":
            raise BundleError(f"{source} is no model; allowed: a folder, a .safetensors file or a hub id")
        return path
    if not HUB_ID.fullmatch(str(source)):
        raise BundleError(f"no such bundle folder: {str(source) or repr('')}")
    return download(str(source))


def find_decoder(source: str | Path) -> Path:
    """The folder of a decoder: a diffusers folder, a stage's output with vae/ in it, or a hub id.

    Raises:
        BundleError: nothing there.
    """
    path = Path(source)
    if not path.is_dir() and HUB_ID.fullmatch(str(source)):
        path = download(str(source), "config.json", "diffusion_pytorch_model.safetensors")
    if not path.is_dir():
        raise BundleError(f"no such decoder: {source}; it takes a folder or a hub id")
    return path / "vae" if (path / "vae").is_dir() else path


def find_control(source: str | Path) -> Path:
    """The folder of a ControlNet: the name of one that comes with the default model, a folder, or a hub id.

    Raises:
        BundleError: none of these.
    """
    if (own := CONTROLS / str(source)).is_dir():
        return own
    path = Path(source)
    if not path.is_dir() and HUB_ID.fullmatch(str(source)):
        path = download(str(source), "config.json", "diffusion_pytorch_model.safetensors")
    if not path.is_dir():
        names = ", ".join(sorted(p.name for p in CONTROLS.iterdir())) if CONTROLS.is_dir() else "none"
        raise BundleError(f"no control {source}: it takes a name ({names}), a folder or a hub id")
    return path


def download(name: str, *files: str) -> Path:
    """Snapshot folder of a hub id in the local cache, fetched when it can be: these files, or a bundle's.

    Raises:
        BundleError: not cached, and the hub cannot be reached or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files or FILES)))
    except GatedRepoError as error:
        raise BundleError(
            f"{name} asks you to accept its terms on the hub and to log in first: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise BundleError(f"no folder {name!r} here, and no model of that id on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BundleError(
            f"no folder {name!r} here, no model of that id in the local cache, and the hub cannot be reached"
        ) from error


def find_lora(source: str | Path) -> Path:
    """The file of a LoRA: a .safetensors file, or a hub id whose repository has pytorch_lora_weights.safetensors.

    Raises:
        BundleError: neither.
    """
    path = Path(source)
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = download(str(source), LORA_FILE) / LORA_FILE
    if path.suffix != ".safetensors" or not path.is_file():
        raise BundleError(f"no LoRA file {source}: it takes a .safetensors file or a hub id")
    return path
