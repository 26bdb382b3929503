"""ΔW merge: what tuning changed in a many-step model, added to its one-step descendant (InstaFlow, section 5).

W = W_into + s·(W_tuned − W_base), tensor by tensor in fp32, the whole U-Net. Files are read and written a tensor at a
time, not mapped: of three networks, and of the new one, one tensor each is in memory.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from instaflow.errors import BundleError
from instaflow.models.bundle import PARTS, Bundle, publish, reading
from instaflow.models.card import CARD, bundle_hash, read_card, write_card
from instaflow.models.hub import locate

Source = Literal["into", "tuned"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights:
    """The tensors of a network's folder, by name; each is read from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of `folder`'s .safetensors: the index's shards, or the one whole file.

        Raises:
            BundleError: none there, or unreadable.
        """
        self.folder = folder
        self.places: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        with reading(folder):
            index = sorted(folder.glob("*.safetensors.index.json"))
            names = set(json.loads(index[0].read_text())["weight_map"].values()) if index else set()
            for path in sorted(folder / name for name in names) or sorted(folder.glob("*.safetensors"))[:1]:
                with path.open("rb") as file:
                    (length,) = struct.unpack("<Q", file.read(8))
                    header = json.loads(file.read(length))
                for name, entry in header.items():
                    if name != "__metadata__":
                        begin, end = entry["data_offsets"]
                        place = (path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
                        self.places[name] = place
            if not self.places:
                raise ValueError("no .safetensors with weights there")
            if strange := {dtype for _, dtype, *_ in self.places.values()} - DTYPES.keys():
                raise ValueError(f"weights of type {', '.join(sorted(strange))}; allowed: {', '.join(DTYPES)}")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, fp32."""
        path, dtype, shape, offset, length = self.places[name]
        with path.open("rb") as file:
            file.seek(offset)
            data = bytearray(file.read(length))
        if len(data) != length:
            raise BundleError(f"{path} is truncated: {name} ends beyond it")
        return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape).float() if length else torch.empty(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: shape for name, (_, _, shape, *_) in self.places.items()}


def merge(
    base: str | Path,
    tuned: str | Path,
    into: str | Path,
    out: Path,
    *,
    scale: float = 1.0,
    vae: Source = "into",
    text_encoder: Source = "into",
) -> Path:
    """Write the bundle `into` with s·(tuned − base) added to its U-Net, whole or not at all; fp16.

    Args:
        base: what `tuned` was tuned from: a folder, hub id or Stable Diffusion 1.x .safetensors file.
        tuned: the tuned model, in the same forms.
        into: the model to change; of the same architecture.
        out: the folder to write.
        scale: s; 0 gives `into` again.
        vae: whose autoencoder goes with it.
        text_encoder: whose text encoder and tokenizer go with it.

    Raises:
        BundleError: a model cannot be read, or a tensor is missing, left over or of another shape: the first is named.
    """
    if not math.isfinite(scale):
        raise BundleError(f"scale={scale} is not allowed; use a finite number")
    with ExitStack() as stack:
        folders = {k: stack.enter_context(_folder(v)) for k, v in (("base", base), ("tuned", tuned), ("into", into))}
        nets = {name: Weights(folder / "unet") for name, folder in folders.items()}
        for other in ("base", "tuned"):
            _same(nets["into"], nets[other])
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            taken = {"vae": vae, "text_encoder": text_encoder, "tokenizer": text_encoder}
            for name in (*PARTS, "model_index.json"):
                source = folders[taken.get(name, "into")] / name
                _copy(source, part / name, weights=name != "unet")
            shapes = nets["into"].shapes()

            def merged() -> Iterator[Tensor]:
                for name in shapes:
                    yield nets["into"][name] + scale * (nets["tuned"][name] - nets["base"][name])

            write_halves(part / "unet" / "diffusion_pytorch_model.safetensors", shapes, merged())
            card = read_card(folders["into"])
            lineage = {
                "merge": {k: str(v) for k, v in (("base", base), ("tuned", tuned), ("into", into))}
                | {"scale": scale, "vae": vae, "text_encoder": text_encoder},
                "parent": card.lineage,
            }
            name = f"{card.name} + {Path(tuned).stem}"
            changed = msgspec.structs.replace(
                card, name=name, licence="unknown", lineage=lineage, results={}, weights=bundle_hash(part)
            )
            write_card(part, changed)
            return publish(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _folder(source: str | Path) -> Iterator[Path]:
    """The model's folder; a single file is turned into one for as long as it is needed."""
    place = locate(source)
    if place.is_dir():
        yield place
        return
    with tempfile.TemporaryDirectory() as made:
        yield Bundle.load(place).save(Path(made) / place.stem, dtype=torch.float32)


def _same(into: Weights, other: Weights) -> None:
    """Raise BundleError, naming the first tensor that one has not or that has another shape."""
    a, b = into.shapes(), other.shapes()
    for name in [*a, *b]:
        for there, shapes in ((into, a), (other, b)):
            if name not in shapes:
                raise BundleError(f"the models are of different architectures: {there.folder} has no {name}")
        if a[name] != b[name]:
            raise BundleError(
                f"the models are of different architectures: {name} is {a[name]} in {into.folder} "
                f"and {b[name]} in {other.folder}"
            )


def _copy(source: Path, target: Path, *, weights: bool) -> None:
    """A part of a model's folder as it is; its graphs, which are of other weights, stay behind."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return
    if not source.is_dir():
        raise BundleError(f"{source.parent} has no {source.name}: it is not a whole bundle")
    left = [CARD, "*.onnx", *([] if weights else ["*.safetensors", "*.safetensors.index.json"])]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left))


def write_halves(path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[Tensor]) -> None:
    """Write fp16 .safetensors one tensor at a time; `tensors` come in the order of `shapes`.

    The library's writer wants all of them in memory.

    Raises:
        BundleError: a value that fp16 does not hold.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in zip(shapes, tensors, strict=True):
            half = tensor.half()
            if not half.isfinite().all():
                raise BundleError(f"{name} of the merged network is beyond fp16; lower the scale")
            file.write(half.contiguous().numpy().tobytes())
