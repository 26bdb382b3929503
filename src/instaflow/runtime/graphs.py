"""A one-step bundle as ONNX graphs that lie beside its weights and read them: `unet/model.onnx` and so on.

    text_encoder/model.onnx   input_ids, attention_mask (B, L)                       → states (B, L, D)
    unet/model.onnx           x0 (B, C, h, w), states (B, L, D)                      → latents X̂₁ = X₀ + v(X₀, 0 | T)
    vae/model.onnx            latents (B, C, h, w)                                   → pictures (B, 3, H, W)

τ, the schedule and the step are constants of the graph. Weights are ONNX external data whose place is the bundle's own
.safetensors, so that they lie on the disk once.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.flow import unet_time
from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents
from instaflow.models.velocity import denoised
from instaflow.runtime.openvino import CONTROLLED, GRAPH, OWN_GRAPH, PARTS, load_openvino

STORED = {"F16": "float16", "BF16": "bfloat16"}  # safetensors' names
INLINE = 1 << 16  # bytes: what is no weight of the bundle and larger than this is a mistake


class TextEncoder(nn.Module):
    """Token states; Stable Diffusion shows CLIP its padding too."""

    def __init__(self, bundle: Bundle) -> None:
        """Take the bundle's encoder."""
        super().__init__()
        self.encoder, self.masked = bundle.text_encoder, bundle.masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) twice → (B, L, D)."""
        states: Tensor = self.encoder(input_ids, attention_mask=attention_mask if self.masked else None)[0]
        return states


class OneStep(nn.Module):
    """X₀ + v(X₀, 0 | T), the time and its place on the schedule being constants."""

    def __init__(self, bundle: Bundle) -> None:
        """Take the bundle's U-Net."""
        super().__init__()
        self.unet, self.prediction = bundle.unet, bundle.card.prediction
        start = torch.zeros(1)
        self.time = float(bundle.schedule.step(start) if bundle.schedule else unet_time(start))
        self.a, self.b = (float(c) for c in bundle.schedule.alpha_sigma(start)) if bundle.schedule else (0.0, 1.0)

    def forward(self, x0: Tensor, states: Tensor, *residuals: Tensor) -> Tensor:
        """(B, C, h, w), (B, L, D) and what a ControlNet found, its middle last → (B, C, h, w)."""
        found: dict[str, Any] = {}
        if residuals:
            *down, middle = residuals
            found = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        out: Tensor = self.unet(x0, self.time, states, **found).sample
        if self.prediction == "velocity":
            return x0 + out
        x1, noise = denoised(self.prediction, out, x0, self.a, self.b)
        return x0 + (x1 - noise)


class Residuals(nn.Module):
    """What a ControlNet finds at the start, the time being a constant."""

    def __init__(self, bundle: Bundle, control: nn.Module) -> None:
        """Take both."""
        super().__init__()
        self.control, self.time = control, OneStep(bundle).time

    def forward(self, x0: Tensor, states: Tensor, picture: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w), (B, L, D), (B, 3, H, W) in [0, 1] → a residual a skip connection, and the middle's."""
        down, middle = self.control(x0, self.time, states, picture, return_dict=False)
        return (*down, middle)


class Decoder(nn.Module):
    """Pictures of latents."""

    def __init__(self, bundle: Bundle) -> None:
        """Take the bundle's autoencoder."""
        super().__init__()
        self.vae = bundle.vae

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → (B, 3, H, W)."""
        return decode_latents(self.vae, latents)


def write_graphs(bundle: Bundle, folder: Path) -> None:
    """Add the three graphs to `folder`, where the bundle was saved.

    Raises:
        BundleError: a model of many steps, or the packages that export are missing.
    """
    for part, model in traced(bundle):
        _write(folder / part, model)


def write_control_graphs(bundle: Bundle, control: nn.Module, folder: Path, control_folder: Path) -> None:
    """Add the graphs of a drawing under a ControlNet, at the model's own size.

        control_folder/model.onnx   x0, states, picture (B, 3, H, W)   → residuals
        unet/controlled.onnx        x0, states, residuals              → latents X̂₁

    Two, since ONNX's external data may not lie outside of a graph's own folder.

    Args:
        bundle: the one-step model.
        control: its ControlNet.
        folder: where the bundle was saved, its weights as fp16.
        control_folder: where the ControlNet was.

    Raises:
        BundleError: weights are not those of the folders, or the packages that export are missing.
    """
    x0, batch, size = torch.zeros(2, *bundle.latent_shape()), {0: "batch"}, bundle.card.image_size
    with torch.inference_mode():
        states, network = bundle.encode(["", "a"]), Residuals(bundle, control)
        inputs = {"x0": x0, "states": states, "picture": torch.zeros(2, 3, size, size)}
        found = network(*inputs.values())
        names = [f"residual_{i}" for i in range(len(found))]
        with _one_time(control):
            _write(control_folder, _trace(network, inputs, names, (batch,) * 3))
        inputs = {"x0": x0, "states": states, **dict(zip(names, found, strict=True))}
        with _one_time(bundle.unet):
            graph = _trace(OneStep(bundle), inputs, ["latents"], (batch, batch, (batch,) * len(found)))
    _write(folder / "unet", graph, CONTROLLED)


def to_openvino(folder: Path) -> None:
    """Turn a folder's ONNX graphs into OpenVINO's own format, weights included; the safetensors go.

    Weights stay the fp16 that they are; what is fp32 stays that too, above all the time, which fp16 cannot tell apart.
    """
    openvino = load_openvino()
    core = openvino.Core()
    for part in PARTS:
        model = core.read_model(folder / part / GRAPH)
        openvino.save_model(model, folder / part / OWN_GRAPH, compress_to_fp16=False)
        del model
        for file in (folder / part / GRAPH, *(folder / part).glob("*.safetensors")):
            file.unlink()


def traced(bundle: Bundle) -> Iterator[tuple[str, Any]]:
    """Each part's name and its graph (onnx-ir), with its fp32 weights and a batch and size that are open.

    Raises:
        BundleError: a model of many steps, or the packages that export are missing.
    """
    if bundle.card.kind != "one-step":
        raise BundleError(f"{bundle.card.name!r} is a {bundle.card.kind} model; a graph draws in one step")
    tokens = torch.zeros(2, bundle.prompt_tokens, dtype=torch.long)
    ones, x0 = torch.ones_like(tokens), torch.zeros(2, *bundle.latent_shape())
    batch, latents = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}
    with torch.inference_mode():
        states = bundle.encode(["", "a"])
        yield "text_encoder", _trace(TextEncoder(bundle), {"input_ids": tokens, "attention_mask": ones}, ["states"],
                                     (batch, batch))  # fmt: skip
        with _one_time(bundle.unet):
            unet = _trace(OneStep(bundle), {"x0": x0, "states": states}, ["latents"], (latents, batch))
        yield "unet", unet
        yield "vae", _trace(Decoder(bundle), {"latents": x0}, ["pictures"], (latents,))


@contextmanager
def _one_time(unet: nn.Module) -> Iterator[None]:
    """The time's embedding as one row for all pictures.

    It is a constant, and with a row a picture engines would fold it into what stands before it for one picture and
    not for several: the same picture would round differently alone and among others.
    """
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (args[0][:1], *args[1:]))
        for name, module in unet.named_modules()
        if name.rpartition(".")[2] == "time_embedding"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _trace(network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], shapes: tuple[Any, ...]) -> Any:
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BundleError(f"graphs need the package {error.name}: pip install 'instaflow[torch]'") from error
    with _quiet():
        program = torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            dynamo=True,
            optimize=True,
            verbose=False,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
        )
    assert program is not None
    return program.model


def _write(folder: Path, model: Any, name: str = GRAPH) -> None:
    import onnx_ir as ir

    there = _tensors(folder)
    kinds = {np.dtype(kind) for *_, kind in there.values()}
    for value in list(model.graph.initializers.values()):
        raw = value.const_value.numpy()
        with np.errstate(over="ignore"):  # a mask's −∞, which is no weight
            halves = [raw.astype(kind) for kind in kinds] if raw.dtype == "float32" else []
        for stored, turned in ((x, turned) for half in halves for x, turned in ((half, False), (half.T, True))):
            if place := there.get(_digest(stored.tobytes())):
                _refer(ir, model.graph, value, place, stored.shape, turned=turned)  # the exporter turns some matrices
                break
        else:
            if raw.nbytes > INLINE:
                raise BundleError(f"{folder} has no weight {value.name} {raw.shape}, and the graph needs it")
            value.const_value = ir.tensor(raw, name=value.name)
    for node in model.graph:
        node.metadata_props.clear()  # where in the sources it came from, half a megabyte
    ir.save(model, folder / name)


def _refer(
    ir: Any, graph: Any, value: Any, place: tuple[str, int, int, str], shape: tuple[int, ...], *, turned: bool
) -> None:
    """Let `value` be the tensor that lies at `place`, as fp32 and turned over if it must be."""
    file, offset, length, stored = place
    name, kind = f"{value.name}.half", ir.DataType.from_numpy(np.dtype(stored))
    tensor = ir.ExternalTensor(file, offset, length, kind, shape=ir.Shape(shape), name=name)
    weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    nodes = [ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")]
    if turned:
        nodes.append(ir.node("Transpose", nodes[0].outputs, {"perm": [1, 0]}, name=f"{value.name}.turned"))
    out = nodes[-1].outputs[0]
    out.shape, out.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, out)
    del graph.initializers[value.name]
    graph.initializers[weight.name] = weight
    graph.insert_before(graph[0], nodes)


def _tensors(folder: Path) -> dict[bytes, tuple[str, int, int, str]]:
    """Digest of each tensor's bytes in a folder's .safetensors → (file, offset, length, numpy's name of its type)."""
    found: dict[bytes, tuple[str, int, int, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for entry in header.values():
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                place = path.name, 8 + size + begin, end - begin, STORED.get(entry["dtype"], "float32")
                found[_digest(file.read(end - begin))] = place
    return found


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes are for its makers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
