"""Pairs on disk: (prompt, seed, X₁ as fp16) in numbered safetensors shards with a manifest.

Noise is not stored: it comes back from the seed. A shard is written whole or not at all, carries its
own checksum and is skipped when present, so a killed job loses at most the shard in hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from instaflow.errors import DataError

MANIFEST = "manifest.json"
BYTES = 2  # of a number of X₁, fp16


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a set of pairs was drawn; pairs of different manifests never mix."""

    teacher: str
    """sha256 of the weights that drew."""
    sampler: str
    steps: int
    guidance: float
    noise: str
    """The noise generator and its version."""
    prompts: str
    """sha256 of the prompt list."""
    seed: int
    count: int
    shard_size: int
    shape: tuple[int, int, int]
    """(C, h, w) of one latent."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def indices(self, shard: int) -> range:
        """Pair numbers of a shard."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))


def prompt_hash(prompts: list[str]) -> str:
    """sha256 of a prompt list."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def open_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or check that the one there is the same.

    Raises:
        DataError: the folder holds pairs drawn differently; names the first field that differs.
    """
    path = folder / MANIFEST
    if path.exists():
        there = read_manifest(folder)
        for field in manifest.__struct_fields__:
            if getattr(there, field) != getattr(manifest, field):
                raise DataError(
                    f"{folder} holds pairs with {field}={getattr(there, field)!r}, asked for "
                    f"{getattr(manifest, field)!r}; remove the folder or give the stage another name"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")  # of several workers each writes the same
    part.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    os.replace(part, path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a pairs folder; DataError when there is none or it is damaged."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {MANIFEST}: no pairs were drawn there") from error
    except msgspec.DecodeError as error:
        raise DataError(f"damaged {folder / MANIFEST}: {error}") from error


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"{shard:05d}.safetensors"


def _digest(x1: Tensor, seeds: Tensor, prompts: str) -> str:
    digest = hashlib.sha256(prompts.encode())
    digest.update(x1.contiguous().numpy().tobytes())
    digest.update(seeds.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_shard(path: Path, *, prompts: list[str], seeds: list[int], x1: Tensor) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: the shard's file.
        prompts: what was really fed to the teacher, one a pair.
        seeds: one a pair.
        x1: (N, C, h, w), stored as fp16.
    """
    latents, numbers, text = x1.half().cpu(), torch.tensor(seeds, dtype=torch.int64), json.dumps(prompts)
    part = path.with_suffix(".tmp")
    metadata = {"prompts": text, "sha256": _digest(latents, numbers, text)}
    save_file({"x1": latents, "seeds": numbers}, part, metadata=metadata)
    os.replace(part, path)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Pairs in memory: prompts, seeds and latents x1 (N, C, h, w) fp16."""

    prompts: list[str]
    seeds: list[int]
    x1: Tensor

    def __len__(self) -> int:
        """How many pairs."""
        return len(self.prompts)


def read_shard(path: Path) -> PairSet:
    """One shard, its checksum verified.

    Raises:
        DataError: missing, truncated or changed; the message names the file.
    """
    try:
        content = path.read_bytes()  # not mapped: it may be in an object store
        tensors, metadata = load(content), _metadata(content)
        x1, seeds, text = tensors["x1"], tensors["seeds"], metadata["prompts"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"damaged shard {path}: {error}; remove it and run again to draw it anew") from error
    if _digest(x1, seeds, text) != metadata.get("sha256"):
        raise DataError(f"damaged shard {path}: its checksum does not match; remove it and run again to draw it anew")
    return PairSet(prompts=json.loads(text), seeds=seeds.tolist(), x1=x1)


def _metadata(content: bytes) -> dict[str, Any]:
    """The text that a safetensors file carries beside its tensors."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata: dict[str, Any] = header["__metadata__"]
    return metadata


class PairReader:
    """Pairs in an order that is a function of (seed, step), read a window of shards at a time.

    An epoch visits every pair once: its shards are shuffled, then the pairs within each window of
    `WINDOW` shards. So memory is bounded however many pairs there are, and a run goes on anywhere.
    """

    WINDOW = 16

    def __init__(self, counts: Sequence[int], load: Callable[[int], PairSet]) -> None:
        """Shard i has counts[i] pairs and is read by load(i)."""
        self.counts, self.load, self.total = np.array(counts), load, int(sum(counts))
        self.loaded: OrderedDict[int, PairSet] = OrderedDict()
        self.windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """How many pairs."""
        return self.total

    def chosen(self, seed: int, step: int, size: int) -> list[tuple[int, int]]:
        """(shard, row) of each sample of a step's batch."""
        return [self._place(seed, *divmod(step * size + i, self.total)) for i in range(size)]

    def batch(self, seed: int, step: int, size: int, part: tuple[int, int] = (0, 1)) -> PairSet:
        """The pairs of a step's batch, or of part (i, n) of it: each n-th one from the i-th on.

        Raises:
            DataError: a shard is missing or damaged.
        """
        places = self.chosen(seed, step, size)[part[0] :: part[1]]
        shards = [(self._shard(shard), row) for shard, row in places]
        return PairSet(
            prompts=[s.prompts[row] for s, row in shards],
            seeds=[s.seeds[row] for s, row in shards],
            x1=torch.stack([s.x1[row] for s, row in shards]),
        )

    def _place(self, seed: int, epoch: int, position: int) -> tuple[int, int]:
        ends = self._remembered((seed, epoch, -2), lambda _: np.cumsum(self.counts[self._order(seed, epoch)]))
        window = int(np.searchsorted(ends, position, side="right")) // self.WINDOW
        start = int(ends[window * self.WINDOW - 1]) if window else 0
        shard, row = self._window(seed, epoch, window)[position - start]
        return int(shard), int(row)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        return self._remembered((seed, epoch, -1), lambda rng: rng.permutation(len(self.counts)))

    def _window(self, seed: int, epoch: int, window: int) -> np.ndarray:
        """(shard, row) of every pair of a window, shuffled, (N, 2)."""

        def make(rng: np.random.Generator) -> np.ndarray:
            shards = self._order(seed, epoch)[window * self.WINDOW : (window + 1) * self.WINDOW]
            rows = [
                np.stack([np.full(n, s), np.arange(n)], 1) for s, n in zip(shards, self.counts[shards], strict=True)
            ]
            return rng.permutation(np.concatenate(rows))

        return self._remembered((seed, epoch, window), make)

    def _remembered(self, key: tuple[int, int, int], make: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        if key not in self.windows:
            self.windows[key] = make(np.random.default_rng([key[0], key[1], key[2] + 2]))
            while len(self.windows) > 8:
                self.windows.popitem(last=False)
        return self.windows[key]

    def _shard(self, shard: int) -> PairSet:
        if shard not in self.loaded:
            self.loaded[shard] = self.load(shard)
            while len(self.loaded) > 2 * self.WINDOW:  # a batch may reach into the next window
                self.loaded.popitem(last=False)
        self.loaded.move_to_end(shard)
        return self.loaded[shard]


def open_pairs(folder: Path) -> PairReader:
    """A reader of a folder's pairs; each shard is verified when it is read.

    Args:
        folder: on this machine, or a `UPath` of fsspec: S3, Google storage, HTTP, …

    Raises:
        DataError: no manifest, or a shard is missing.
    """
    manifest = read_manifest(folder)
    missing = [i for i in range(manifest.shards) if not shard_path(folder, i).exists()]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of its {manifest.shards} shards, the first {missing[0]:05d}")
    return PairReader(
        [len(manifest.indices(i)) for i in range(manifest.shards)], lambda i: read_shard(shard_path(folder, i))
    )
