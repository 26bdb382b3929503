"""Quantise: a one-step bundle whose weights have 8 or 4 bits. NNCF does the arithmetic, OpenVINO draws.

int8 computes with 8-bit numbers in the U-Net: its activations' ranges are those of one step, τ = 1000, on calibration
prompts. w8 and w4 keep weights in 8 or 4 bits and compute as before; convolutions stay at 8, whose matrices alone can
have 4. Weights have a scale a channel (4 bits: a group of 32). Text encoder and decoder get w8 whatever the scheme.

What goes in and out of the U-Net and its time stay in 16 bits, and every block that alone would move X̂₁ by more than a
threshold; so do sums, norms and attention's products of two activations, which have no weights to make smaller.
The bundle holds OpenVINO's graphs and no safetensors, so it can no longer be trained or changed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from instaflow.errors import BundleError, PromptError
from instaflow.models.bundle import Bundle, publish
from instaflow.models.card import bundle_hash, write_card
from instaflow.noise import noise
from instaflow.runtime.graphs import traced
from instaflow.runtime.openvino import GRAPH, OWN_GRAPH, load_openvino

SCHEMES = {"int8": 3e-4, "w8": 1e-3, "w4": 1e-2}  # and the sensitivity from which a block stays in 16 bits
KEPT = ("conv_in", "conv_out", "time_embedding")  # whatever their sensitivity
GROUP = 32  # weights that share a 4-bit scale
LARGE = 1 << 16  # numbers in a constant that is kept in fp16
SAMPLES, SENSED = 128, 32  # for calibration, and of those for the sensitivities


@dataclass(frozen=True, kw_only=True)
class Layers:
    """One block of a U-Net's graph."""

    block: str
    nodes: tuple[str, ...]
    """Names of its layers in the graph."""
    parameters: int
    sensitivity: float = 0.0
    """‖ΔX̂₁‖² / ‖X̂₁‖² when this block alone is quantised."""
    kept: bool = False


def quantise(
    bundle: Bundle,
    scheme: str,
    prompts: Sequence[str],
    out: Path,
    *,
    threshold: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Layers]:
    """Write the quantised bundle, whole or not at all, and return the sensitivity table, which its card keeps too.

    Args:
        bundle: a one-step model, any LoRA merged.
        scheme: int8, w8 or w4.
        prompts: for calibration; never of concepts that it will be measured on.
        out: the folder to write.
        threshold: blocks that are more sensitive stay in 16 bits; None takes the scheme's own.
        progress: told what is being measured.

    Raises:
        BundleError: no one-step model, a LoRA on it, NNCF is missing, or it cannot be written.
        PromptError: no prompt.
    """
    if scheme not in SCHEMES:
        raise BundleError(f"unknown scheme {scheme!r}; allowed: {', '.join(SCHEMES)}")
    threshold = SCHEMES[scheme] if threshold is None else threshold
    if not prompts:
        raise PromptError("no prompt to calibrate with")
    if hasattr(bundle.unet, "peft_config"):
        raise BundleError(f"{bundle.card.name!r} has a LoRA on it: merge it before quantising")
    nncf = _load_nncf()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            table = _write(nncf, bundle, scheme, prompts, part, Path(scratch), threshold, progress)
        card = msgspec.structs.replace(
            bundle.card,
            name=f"{bundle.card.name}-{scheme}",
            quantised=scheme,
            weights=bundle_hash(part),
            lineage={
                **bundle.card.lineage,
                "quantised": {
                    "scheme": scheme,
                    "nncf": nncf.__version__,
                    "threshold": threshold,
                    "prompts": min(len(prompts), SAMPLES),
                    "sensitivity": {t.block: {"sensitivity": t.sensitivity, "kept": t.kept} for t in table},
                },
            },
            results={},
        )
        write_card(part, card)
        publish(part, out)
    except (OSError, RuntimeError) as error:
        reason = ([line for line in str(error).splitlines() if line.strip()] or ["no word"])[-1]
        raise BundleError(f"cannot write {out}: {reason[:200]}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return table


def _write(
    nncf: Any,
    bundle: Bundle,
    scheme: str,
    prompts: Sequence[str],
    folder: Path,
    scratch: Path,
    threshold: float,
    progress: Callable[[str], None],
) -> list[Layers]:
    import onnx_ir as ir

    openvino, table = load_openvino(), []
    core = openvino.Core()
    bundle.write_configs(folder)
    for part, model in traced(bundle):
        blocks = _blocks(model) if part == "unet" else []
        ir.save(model, scratch / GRAPH)
        read = lambda: core.read_model(scratch / GRAPH)  # noqa: E731 — NNCF changes what it is given
        if part == "unet":
            samples = _samples(bundle, prompts)
            table = _sensitivities(nncf, core, read, scheme, blocks, samples[:SENSED], threshold, progress)
            small = _shrink(nncf, read(), scheme, [n for t in table if t.kept for n in t.nodes], samples)
        else:
            small = _shrink(nncf, read(), "w8", [], [])
        _halve(small)
        openvino.save_model(small, folder / part / OWN_GRAPH, compress_to_fp16=False)
        del small
    return table


def _samples(bundle: Bundle, prompts: Sequence[str]) -> list[list[np.ndarray]]:
    """[x0 (1, C, h, w), states (1, L, D)] of each prompt, the first noise for the first."""
    chosen = [prompts[i % len(prompts)] for i in range(SAMPLES)]
    x0, states = noise(range(SAMPLES), bundle.latent_shape()), bundle.encode(chosen).float().cpu().numpy()
    return [[x0[i : i + 1], states[i : i + 1]] for i in range(SAMPLES)]


def _blocks(model: Any) -> list[Layers]:
    """A U-Net's graph by block: the exporter says which module each node came from."""
    found: dict[str, list[Any]] = {}
    for node in model.graph:
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.inputs[1].const_value is not None:
            scopes = node.metadata_props["pkg.torch.onnx.name_scopes"].strip("[]").replace("'", "").split(", ")
            found.setdefault(_block(scopes), []).append(node)
    return [
        Layers(block=k, nodes=tuple(n.name for n in v), parameters=sum(n.inputs[1].const_value.size for n in v))
        for k, v in found.items()
    ]


def _block(scopes: Sequence[str]) -> str:
    """'down_blocks.0.resnets.0' of its every layer, 'conv_in' of itself."""
    path = [s.removeprefix("unet.") for s in scopes if s.startswith("unet.")]
    inside = [p for p in path if p.rpartition(".")[2].isdigit() and p.count(".") >= 2]
    return inside[0] if inside else path[0]


def _shrink(nncf: Any, graph: Any, scheme: str, kept: Sequence[str], samples: list[list[np.ndarray]]) -> Any:
    """The graph with quantised weights, less those of the layers `kept`."""
    whole = {op.get_friendly_name(): op for op in graph.get_ordered_ops()}
    names = [n for n in whole if n.removesuffix("/WithoutBiases") in kept]
    if scheme == "int8":
        names += [n for n, op in whole.items() if not _has_weights(op)]
    ignored = nncf.IgnoredScope(names=names, validate=False)  # it does not know of every operation
    if scheme == "int8":
        return nncf.quantize(
            graph,
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=ignored,
        )
    if scheme == "w8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=ignored)
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP,
        ratio=1.0,
        all_layers=True,
        ignored_scope=ignored,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    )


def _has_weights(op: Any) -> bool:
    """Whether it is a convolution or a product with a constant."""
    if op.get_type_name() not in ("Convolution", "MatMul"):
        return False
    weight = op.input_value(1).get_node()
    while weight.get_type_name() in ("Convert", "Transpose", "Reshape"):
        weight = weight.input_value(0).get_node()
    return bool(weight.get_type_name() == "Constant")


def _sensitivities(
    nncf: Any,
    core: Any,
    read: Callable[[], Any],
    scheme: str,
    blocks: Sequence[Layers],
    samples: list[list[np.ndarray]],
    threshold: float,
    progress: Callable[[str], None],
) -> list[Layers]:
    """Each block with what quantising it alone does."""
    wanted, table = _outputs(core, read(), samples), []
    for own in blocks:
        progress(own.block)
        others = [n for b in blocks if b is not own for n in b.nodes]
        alone = _outputs(core, _shrink(nncf, read(), scheme, others, samples), samples)
        moved = float(np.square(alone - wanted).sum() / np.square(wanted).sum())
        kept = own.block in KEPT or moved > threshold
        table.append(replace(own, sensitivity=float(f"{moved:.3g}"), kept=kept))
    return table


def _outputs(core: Any, graph: Any, samples: list[list[np.ndarray]]) -> np.ndarray:
    """X̂₁ of the samples, in fp32 but for what is quantised."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"}
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    outputs = []
    for sample in samples:
        request.infer(sample)
        outputs.append(request.get_output_tensor(0).data.copy())
    return np.concatenate(outputs)


def _halve(graph: Any) -> None:
    """Large fp32 constants as fp16; not the small ones, above all not the time, which fp16 cannot tell apart."""
    from openvino import opset13 as ops

    for op in graph.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.data.dtype == np.float32 and op.data.size >= LARGE:
            targets = op.output(0).get_target_inputs()
            half = ops.convert(ops.constant(op.data.astype(np.float16)), np.float32)
            for target in targets:
                target.replace_source_output(half.output(0))


def _load_nncf() -> Any:
    load_openvino()
    try:
        with _quiet():
            import nncf
    except ImportError as error:
        raise BundleError("quantising needs the package nncf: pip install 'instaflow[compress]'") from error
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF reports each layer that it sees."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
