"""The CPU engine: a one-step bundle's ONNX graphs (`graphs.py`), compiled by OpenVINO. No torch here.

A picture's bytes must not depend on what is drawn beside it. OpenVINO gives each row the same bits whatever the batch,
as long as the graph has the same constants for one row as for several; `graphs.py` sees to that, and a test to this.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from instaflow.errors import BundleError, PromptError
from instaflow.models.card import check_control, check_weights, read_card
from instaflow.models.request import Control, check_prompt, check_request

GRAPH = "model.onnx"
CONTROLLED = "controlled.onnx"  # beside the U-Net's: it under a ControlNet, whose graph lies in its own folder
OWN_GRAPH = "openvino_model.xml"  # OpenVINO's own format, with openvino_model.bin: what quantised networks are kept in
PARTS = ("text_encoder", "unet", "vae")
FILES = ("unet/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json")
SMALL = 128  # pixels a side: up to here pictures are drawn several at a time
BATCHES = (1, 16)  # rows that graphs of small models are compiled for
FILLED = 6  # rows from which on one run of sixteen is quicker than runs of one; it costs about five of those


def has_graphs(folder: Path) -> bool:
    """Whether a bundle folder carries its graphs."""
    return all(graph_of(folder, part).is_file() for part in PARTS)


def graph_of(folder: Path, part: str) -> Path:
    """The file of a part's graph, in OpenVINO's own format where it has one; a ControlNet's is in its own folder."""
    if part == "controlled":
        return folder / "unet" / CONTROLLED
    own = folder / part / OWN_GRAPH
    return own if own.is_file() else folder / part / GRAPH


def has_control_graphs(folder: Path, *controls: Path) -> bool:
    """Whether a bundle folder and these ControlNets have the graphs of a drawing under control."""
    return (folder / "unet" / CONTROLLED).is_file() and all((c / GRAPH).is_file() for c in controls)


def load_openvino() -> Any:
    """The package, without the usage statistics that it would send home when it is imported.

    Raises:
        BundleError: it is missing or does not fit this machine.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it has a stub for that
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise BundleError(f"the CPU engine cannot be loaded: {error}; pip install openvino") from error
    return openvino


def pick_precision(core: Any, precision: str | None) -> str:
    """bf16 or f32: the one asked for, or bf16 where the processor computes with it.

    Raises:
        BundleError: it is not to be had here.
    """
    able = ["bf16"] * ("BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if precision is None:
        return [*able, "f32"][0]
    if precision not in (*able, "f32"):
        allowed = "bf16, f32" if able else "f32, since this processor does not compute with bf16"
        raise BundleError(f"precision {precision!r} is not to be had; allowed: {allowed}")
    return precision


class OpenVINOEngine:
    """A one-step bundle on this machine's CPU."""

    def __init__(self, folder: Path, *, precision: str | None = None) -> None:
        """Read and compile.

        Args:
            folder: a bundle with graphs.
            precision: bf16 or f32; None takes bf16 where the processor computes with it.

        Raises:
            BundleError: the package or a graph is missing, or they do not go together.
        """
        openvino = load_openvino()
        self.folder, self.card = folder, read_card(folder)
        self._read_configs()
        self._core = openvino.Core()
        self.precision = pick_precision(self._core, precision)
        self.name = " ".join(["openvino", *([self.card.quantised] if self.card.quantised else []), self.precision])
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self.precision == "f32":
            self._options["SNIPPETS_MODE"] = "DISABLE"  # of version 2026.4: its generated kernels crash in fp32
        # quantised kernels of several rows round differently from those of one
        self.batches = BATCHES if self.card.image_size <= SMALL and not self.card.quantised else (1,)
        self.batch = self.batches[-1]
        self._graphs: dict[tuple[str, int, int], Any] = {}
        self._one = Lock()  # a request computes for one thread at a time
        with ThreadPoolExecutor(len(PARTS) + 1) as pool:
            sound = pool.submit(check_weights, folder, self.card)
            graphs = [pool.submit(self._graph, part, self.batches[0], self.card.image_size) for part in PARTS]
        for result in (sound, *graphs):
            result.result()

    def _read_configs(self) -> None:
        missing = [file for file in FILES if not (self.folder / file).is_file()]
        if missing:
            raise BundleError(f"{self.folder} has no {missing[0]}: it is not a whole bundle")
        try:
            unet = json.loads((self.folder / "unet" / "config.json").read_text())
            words = json.loads((self.folder / "tokenizer" / "tokenizer_config.json").read_text())
            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer" / "tokenizer.json"))
            self._channels = int(unet["in_channels"])
            self._factor = self.card.image_size // int(unet["sample_size"])
            self._unit = self._factor * 2 ** (len(unet["block_out_channels"]) - 1)
            self._tokens = int(words["model_max_length"])
            pad = words["pad_token"]
            pad = pad if isinstance(pad, str) else pad["content"]
            pad_id = self._tokenizer.token_to_id(pad)
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"cannot load {self.folder}: {type(error).__name__}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.enable_padding(length=self._tokens, pad_id=pad_id, pad_token=pad)

    def prepare(self, count: int, size: int, networks: Sequence[Any] = ()) -> None:
        """Compile what so many pictures of this size will need, under control by these networks."""
        for batch in {self._rows(left) for left in range(1, count + 1)}:
            for part in (*PARTS, *(["controlled", *networks] if networks else [])):
                self._graph(part, batch, size)

    def _rows(self, left: int) -> int:
        """Of a graph that draws the next of so many pictures."""
        return self.batches[-1] if left >= FILLED else self.batches[0]

    # -- checks ---------------------------------------------------------------------------------

    def check(self, *, steps: int, guidance: float, size: int, negative: str, control: Sequence[Control] = ()) -> None:
        """Raise PromptError for what this model cannot do."""
        check_request(self.card, self._unit, steps=steps, guidance=guidance, size=size, negative=negative)
        if control and size != self.card.image_size:
            raise PromptError(f"size={size}: {self.name} draws under control at {self.card.image_size}; use torch")

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for a prompt that it cannot read."""

        def tokens(text: str) -> list[tuple[int, int, bool]]:
            found = self._tokenizer.encode(text)
            rows = zip(found.offsets, found.tokens, found.attention_mask, strict=True)
            return [(*place, token != "[UNK]") for place, token, real in rows if real]

        check_prompt(prompt, tokens, self._tokens)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) of one picture of `size` pixels."""
        return (self._channels, size // self._factor, size // self._factor)

    # -- the three things a runtime does --------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Token states (B, L, D); of a prompt longer than the encoder reads, the beginning."""
        return self._run("text_encoder", self.card.image_size, *self.tokens(prompts))[0]

    def tokens(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers and which of them are not padding, both (B, L)."""
        found = [(t.ids, t.attention_mask) for t in self._tokenizer.encode_batch(list(prompts))]
        last = self._tokens - 1
        cut = [(ids[:last] + ids[-1:], mask[:last] + mask[-1:]) for ids, mask in found]  # a text ends as it should
        ids, mask = (np.array(x, np.int64) for x in zip(*cut, strict=True))
        return ids, mask

    def sample(
        self,
        x0: np.ndarray,
        states: np.ndarray,
        *,
        steps: int = 1,
        guidance: float = 1.0,
        negative: str = "",
        control: Sequence[Control] = (),
    ) -> np.ndarray:
        """X₀ + v(X₀, 0 | T), (B, C, h, w); one step is all that the graph does, and all that `check` lets through."""
        size = x0.shape[-1] * self._factor
        found = [self._residuals(c, x0, states, size) for c in control if c.scale and c.start == 0]
        if not found:
            return self._run("unet", size, x0, states)[0]
        return self._run("controlled", size, x0, states, *map(_sum, zip(*found, strict=True)))[0]

    def load_control(self, folder: Path) -> str:
        """A ControlNet's folder, as `Control.network` wants it.

        Raises:
            BundleError: it or the model has no graph of it, or it was trained for another model.
        """
        check_control(folder, self.card.name, self.card.weights)
        if not has_control_graphs(self.folder, folder):
            raise BundleError(f"{self.card.name!r} and {folder} have no graphs for {self.name}; use the engine torch")
        return str(folder.resolve())

    def _residuals(self, control: Control, x0: np.ndarray, states: np.ndarray, size: int) -> list[np.ndarray]:
        pictures = np.repeat(control.pixels(size, size), len(x0), axis=0)
        return [np.float32(control.scale) * r for r in self._run(control.network, size, x0, states, pictures)]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, 3, H, W), nominally in [−1, 1]."""
        return self._run("vae", latents.shape[-1] * self._factor, latents)[0]

    def objects(self, pixels: np.ndarray) -> bool:
        """Never: a model with a safety checker that is on is torch's."""
        return False

    def _run(self, part: str, size: int, *inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs of a graph on all rows, so many at a time as it is compiled for; the last are repeated."""
        rows, start = len(inputs[0]), 0
        parts: list[list[np.ndarray]] = []
        while start < rows:
            batch = self._rows(rows - start)
            taken = [x[start : start + batch] for x in inputs]
            filled = [np.resize(x, (batch, *x.shape[1:])) for x in taken]
            request = self._graph(part, batch, size)
            with self._one:
                request.infer(filled)
                parts.append([out.data[: len(taken[0])].copy() for out in request.output_tensors])
            start += batch
        return [np.concatenate(several) for several in zip(*parts, strict=True)]

    def _graph(self, part: str, batch: int, size: int) -> Any:
        """The part compiled for so many rows of this size, once."""
        key = (part, batch, 0 if part == "text_encoder" else size)
        if key not in self._graphs:
            try:
                compiled = self._core.compile_model(self.read(part, batch, size), "CPU", self._options)
            except RuntimeError as error:
                reason = ([line for line in str(error).splitlines() if line.strip()] or ["no word"])[-1]
                raise BundleError(f"cannot compile {graph_of(self.folder, part)}: {reason[:200]}") from error
            self._graphs[key] = compiled.create_infer_request()
            _unload_mapped(graph_of(self.folder, part).parent)
        return self._graphs[key]

    def read(self, part: str, batch: int, size: int) -> Any:
        """The part as OpenVINO's model of so many rows of this size."""
        graph, side = self._core.read_model(graph_of(self.folder, part)), size // self._factor
        shapes = {}
        for port in graph.inputs:
            shape = port.partial_shape
            fixed = [int(n.get_length()) if n.is_static else side for n in shape]
            shapes[port] = [batch, *fixed[1:]]
        graph.reshape(shapes)
        if self.card.image_size > SMALL:  # small ones wait for weights, not for products
            _join_upsampling(graph, self.precision)
        (_widen if self.precision == "f32" else _keep_bf16)(graph)
        return graph


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    total: np.ndarray = np.sum(arrays, axis=0)
    return total


def _unload_mapped(folder: Path) -> None:
    """Take the weights' files out of this process' memory: what is compiled has packed them and reads them no more.

    They stay mapped, and in the system's cache: whoever does read them has them back.
    """
    if sys.platform != "linux":
        return
    libc, inside = ctypes.CDLL(None), f"{folder.resolve()}/"
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)  # place, rights, offset, device, inode, path
        if len(fields) == 6 and fields[1].startswith("r--") and fields[5].startswith(inside):
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _join_upsampling(graph: Any, precision: str) -> None:
    """Twice as large by nearest pixels, then a 3×3 convolution: one transposed convolution, 16 products for their 36.

    Its 4×4 kernel, at stride 2, is the 3×3 one convolved with a 2×2 of ones: the same sum over fewer products.
    """
    from openvino import Type
    from openvino import opset13 as ops

    for op in graph.get_ordered_ops():
        if op.get_type_name() != "Interpolate":
            continue
        which = [op.get_attributes()[k] for k in ("mode", "coordinate_transformation_mode", "nearest_mode")]
        if which != ["nearest", "asymmetric", "floor"]:  # others take another pixel
            continue
        x, users = op.input_value(0), [port.get_node() for port in op.output(0).get_target_inputs()]
        doubled = [2 * side for side in list(x.get_shape())[2:]] == list(op.get_output_shape(0))[2:]
        for user in users:
            weight = _constant(user) if user.get_type_name() == "Convolution" else None
            if not doubled or weight is None or list(weight.get_output_shape(0))[2:] != [3, 3]:
                continue
            how = user.get_attributes()
            if [how[k] for k in ("strides", "dilations", "pads_begin", "pads_end")] != [[1, 1]] * 4:
                continue
            turned = weight.get_data(dtype=np.float32)[:, :, ::-1, ::-1].swapaxes(0, 1)
            kernel = np.zeros((*turned.shape[:2], 4, 4), np.float32)
            for down in (0, 1):
                for right in (0, 1):
                    kernel[:, :, down : down + 3, right : right + 3] += turned
            joined: Any = ops.constant(kernel)
            if precision == "bf16":
                joined = ops.convert(ops.constant(kernel, Type.bf16), "f32")
            product = ops.convolution_backprop_data(
                x, joined, strides=[2, 2], pads_begin=[1, 1], pads_end=[1, 1], dilations=[1, 1]
            )
            user.output(0).replace(product.output(0))


def _constant(product: Any) -> Any | None:
    """The weights of a product, None where they are computed: of a quantised network."""
    node = product.input_value(1).get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" and node.get_element_type().is_real() else None


def _keep_bf16(graph: Any) -> None:
    """Products with weights that are bf16 on the disk, of those: else OpenVINO would keep them widened to fp32."""
    from openvino import opset13 as ops

    for op in graph.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in ("Convolution", "ConvolutionBackpropData", "MatMul"):
            continue
        weight, turned = op.input_value(1), False
        if weight.get_node().get_type_name() == "Transpose":  # of two axes
            weight, turned = weight.get_node().input_value(0), True
        if weight.get_node().get_type_name() != "Convert":
            continue
        weight = weight.get_node().input_value(0)
        if weight.get_node().get_type_name() != "Constant" or weight.get_element_type().get_type_name() != "bf16":
            continue
        x, how = ops.convert(op.input_value(0), "bf16"), op.get_attributes()
        if kind == "MatMul":
            product = ops.matmul(x, weight, how["transpose_a"], how["transpose_b"] != turned)
        elif kind == "Convolution":
            sizes = [how[k] for k in ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")]
            product = ops.convolution(x, weight, *sizes)
        else:
            strides, *sizes = [how[k] for k in ("strides", "pads_begin", "pads_end", "dilations")]
            product = ops.convolution_backprop_data(x, weight, strides, None, *sizes)
        op.output(0).replace(ops.convert(product, "f32").output(0))


def _widen(graph: Any) -> None:
    """Half-precision constants as fp32: computing in fp32, version 2026.4 overwrites those that it widens itself."""
    from openvino import opset13 as ops

    for op in graph.get_ordered_ops():
        if op.get_type_name() == "Convert" and op.input_value(0).get_node().get_type_name() == "Constant":
            half = op.input_value(0).get_node()
            if half.get_element_type().get_type_name() in ("f16", "bf16"):
                op.output(0).replace(ops.constant(half.get_data(dtype=np.float32)).output(0))
