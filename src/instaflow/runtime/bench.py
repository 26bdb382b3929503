"""How fast a model draws here: warm, cold, part by part, beside other ways of running it, turn by turn.

Peers draw the same picture from the same noise: `torch` (eager, fp32), `onnxruntime` (the same graphs, fp32),
`diffusers` (a Stable Diffusion folder through its pipeline's own parts, eager, fp32), and one of the same size from its
own noise: `openvino-genai` (such a folder converted for its Text2ImagePipeline, one Euler step, its own precision).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instaflow.errors import BundleError
from instaflow.noise import noise
from instaflow.runtime.engine import Engine
from instaflow.runtime.loading import exported, load_engine
from instaflow.runtime.openvino import GRAPH, PARTS, OpenVINOEngine, has_graphs, load_openvino, pick_precision

PEERS = ("torch", "onnxruntime", "diffusers", "openvino-genai")
PROMPT = "a red apple"
WARM, TURN = 2, 10  # calls not counted, and counted, of one before the next has its turn
PAUSE = 0.05  # seconds between turns: the threads of the one before go on spinning for a while
Draw = Callable[[int], Any]


def bench(
    source: Path,
    engine: Engine,
    *,
    against: Sequence[str] = (),
    runs: int = 30,
    cold_runs: int = 3,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that is printed, as a dictionary; times in milliseconds.

    Args:
        source: the model's folder.
        engine: it, loaded.
        against: peers.
        runs: pictures of each; all draw some in turn, so that a slow moment of the machine is everybody's.
        cold_runs: whole processes from start to picture.
        options: of `instaflow generate`, for those.

    Raises:
        BundleError: an unknown peer, or one that is not installed or cannot run this model.
    """
    if strange := [name for name in against if name not in PEERS]:
        raise BundleError(f"unknown peer {strange[0]!r}; allowed: {', '.join(PEERS)}")
    size = engine.card.image_size
    shape = engine.latent_shape(size)
    engine.prepare(1, size)
    states = engine.encode([PROMPT])
    latents = _step(engine, noise([0], shape), states)
    parts: dict[str, Draw] = {
        "text": lambda _: engine.encode([PROMPT]),
        "step": lambda i: _step(engine, noise([i], shape), states),
        "decode": lambda _: engine.decode(latents),
    }
    whole: dict[str, Draw] = {engine.name: lambda i: _draw(engine, [i])}
    whole |= {name: peer(name, source) for name in against}
    timed = in_turn(whole, runs)
    ours = np.array(timed[engine.name])
    report: dict[str, Any] = {
        "model": engine.card.name,
        "engine": engine.name,
        "size": size,
        "cpus": os.cpu_count(),
        "picture": {k: _spread(v) for k, v in timed.items()},
        "ratio": {k: round(float(np.median(np.array(timed[k]) / ours)), 2) for k in against},
        "parts": {k: _spread(v) for k, v in in_turn(parts, runs).items()},
    }
    if engine.batch > 1:
        [several] = in_turn({"batch": lambda i: _draw(engine, range(i, i + engine.batch))}, max(3, runs // 4)).values()
        report["batch"] = {"pictures": engine.batch, "per_picture": _spread([t / engine.batch for t in several])}
    if isinstance(engine, OpenVINOEngine):
        peak = machine_peak(engine.precision)
        counts = {part: count_flops(engine.read(part, 1, size)) for part in PARTS}
        for part, name in (("text_encoder", "text"), ("unet", "step"), ("vae", "decode")):
            reached = counts[part] / (report["parts"][name]["p50"] / 1000)
            report["parts"][name] |= {"gflop": round(counts[part] / 1e9, 2), "of_peak": round(reached / peak, 3)}
        reached = sum(counts.values()) / (report["picture"][engine.name]["p50"] / 1000)
        report["peak_gflop_s"], report["of_peak"] = round(peak / 1e9), round(reached / peak, 3)
    if cold_runs:
        started = [cold(options) for _ in range(cold_runs)]
        report["cold"] = {"seconds": round(float(np.median([s for s, _ in started])), 2)}
        report["peak_memory_mb"] = round(max(m for _, m in started) / 1e6)
    return report


def _step(engine: Engine, x0: np.ndarray, states: Any) -> np.ndarray:
    return engine.sample(x0, states, steps=1, guidance=1.0, negative="")


def _draw(engine: Engine, seeds: Sequence[int]) -> np.ndarray:
    x0 = noise(seeds, engine.latent_shape(engine.card.image_size))
    return engine.decode(_step(engine, x0, engine.encode([PROMPT] * len(seeds))))


def in_turn(draws: dict[str, Draw], runs: int) -> dict[str, list[float]]:
    """Milliseconds of `runs` calls of each, some of one and then of the next, after a warm-up at every change."""
    took: dict[str, list[float]] = {name: [] for name in draws}
    for first in range(0, runs, TURN):
        for name, draw in draws.items():
            if len(draws) > 1:
                time.sleep(PAUSE)
            for i in range(-WARM, min(TURN, runs - first)):
                begun = time.perf_counter()
                draw(first + max(i, 0))
                if i >= 0:
                    took[name].append(1000 * (time.perf_counter() - begun))
    return took


def _spread(took: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(took, [50, 95])
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "min": round(min(took), 2)}


CHILD = """
import sys
from instaflow.cli import main
try:
    main()
finally:
    from instaflow.runtime.bench import peak_memory
    print(peak_memory(), file=sys.stderr)
"""


def cold(options: Sequence[str]) -> tuple[float, int]:
    """(seconds from process start to the PNG, peak resident bytes) of `instaflow generate` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", CHILD, "generate", PROMPT, "--seed", "0", "-o", folder, *options]
        begun = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        took = time.perf_counter() - begun
    if done.returncode:
        raise BundleError(f"a process that draws one picture failed: {' '.join(done.stderr.split()[:-1])[-200:]}")
    return took, int(done.stderr.split()[-1])


def peak_memory() -> int:
    """Most resident bytes that this process had; `getrusage` would count its parent's too, before it began."""
    try:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    except OSError:  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- peers -----------------------------------------------------------------------------------------


def peer(name: str, source: Path) -> Draw:
    """Another way to draw the model's picture of a seed.

    Raises:
        BundleError: unknown, not installed, or not for this model.
    """
    try:
        match name:
            case "torch":
                eager = load_engine(source, engine="torch", safety=False)
                return lambda seed: _draw(eager, [seed])
            case "onnxruntime":
                return _onnxruntime(source)
            case "diffusers":
                return _diffusers(source)
            case "openvino-genai":
                return _genai(source)
    except ImportError as error:
        raise BundleError(f"the peer {name} is not installed: pip install {error.name}") from error
    raise BundleError(f"unknown peer {name!r}; allowed: {', '.join(PEERS)}")


def _onnxruntime(source: Path) -> Draw:
    import onnxruntime

    precision = pick_precision(load_openvino().Core(), None)
    folder = source if has_graphs(source) else exported(source, precision=precision)
    ours = OpenVINOEngine(folder, precision=precision)  # for its tokens alone
    text, unet, vae = (onnxruntime.InferenceSession(folder / p / GRAPH) for p in ("text_encoder", "unet", "vae"))
    names = {i.name for i in text.get_inputs()}

    def draw(seed: int) -> Any:
        tokens = {
            k: v for k, v in zip(("input_ids", "attention_mask"), ours.tokens([PROMPT]), strict=True) if k in names
        }
        [states] = text.run(None, tokens)
        [latents] = unet.run(None, {"x0": noise([seed], ours.latent_shape(ours.card.image_size)), "states": states})
        return vae.run(None, {"latents": latents})

    return draw


def _pipeline(source: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_pretrained(source, safety_checker=None, dtype=torch.float32)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"diffusers' pipeline cannot run {source}: {(str(error).splitlines() or [''])[0]}") from error


def _diffusers(source: Path) -> Draw:
    import torch

    pipe = _pipeline(source)
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels

    @torch.inference_mode()
    def draw(seed: int) -> Any:
        states = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        x0 = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
        latents = x0 + pipe.unet(x0, torch.tensor([1000.0]), states).sample
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample

    return draw


def _genai(source: Path) -> Draw:
    import openvino_genai

    with tempfile.TemporaryDirectory() as folder:
        side = _to_genai(source, Path(folder))
        pipe = openvino_genai.Text2ImagePipeline(folder, "CPU")
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "width": side, "height": side}
    return lambda seed: pipe.generate(PROMPT, rng_seed=seed, **settings).data.copy()


def _to_genai(source: Path, folder: Path) -> int:
    """A Stable Diffusion folder as openvino-genai reads it: optimum's layout, fp16; returns its side in pixels."""
    import openvino
    import torch
    from diffusers import EulerDiscreteScheduler
    from openvino_tokenizers import convert_tokenizer
    from torch import nn

    class Part(nn.Module):
        def __init__(self, network: Any, call: Callable[..., Any]) -> None:
            super().__init__()
            self.network, self.call = network, call

        def forward(self, *inputs: Any) -> Any:
            return self.call(*inputs)

    pipe = _pipeline(source)
    unet, vae, text, config = pipe.unet, pipe.vae, pipe.text_encoder, pipe.unet.config
    latents = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    states, tokens = torch.zeros(1, 77, config.cross_attention_dim), torch.zeros(1, 77, dtype=torch.int64)
    parts: dict[str, tuple[Any, Callable[..., Any], dict[str, Any], str]] = {
        "text_encoder": (text, lambda ids: text(ids)[0], {"input_ids": tokens}, "last_hidden_state"),
        "unet": (
            unet,
            lambda x, t, c: unet(x, t, c).sample,
            {"sample": latents, "timestep": torch.tensor([1]), "encoder_hidden_states": states},
            "out_sample",
        ),
        "vae_decoder": (vae, lambda z: vae.decode(z).sample, {"latent_sample": latents}, "sample"),
    }
    for name, (network, call, inputs, output) in parts.items():
        with torch.inference_mode():
            graph = openvino.convert_model(Part(network, call), example_input=tuple(inputs.values()))
        for port, said in zip(graph.inputs, inputs, strict=True):
            port.get_tensor().set_names({said})
        graph.outputs[0].get_tensor().set_names({output})
        openvino.save_model(graph, folder / name / "openvino_model.xml", compress_to_fp16=True)
        (network.config.save_pretrained if name == "text_encoder" else network.save_config)(folder / name)
    (folder / "tokenizer").mkdir()
    openvino.save_model(convert_tokenizer(pipe.tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml")
    EulerDiscreteScheduler.from_config(pipe.scheduler.config).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return int(config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1))


# -- what the machine could do -----------------------------------------------------------------------


def machine_peak(precision: str, side: int = 3072) -> float:
    """Operations a second that OpenVINO reaches here in one large matrix product, the best of several."""
    openvino = load_openvino()
    from openvino import opset13 as ops

    left = ops.parameter([side, side], np.float32)
    right = ops.constant(noise([0], (side, side))[0])
    graph = openvino.Model([ops.matmul(left, right, False, True)], [left])
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    x = noise([1], (side, side))[0]
    took = in_turn({"gemm": lambda _: request.infer([x])}, 10)["gemm"]
    return 2 * side**3 / (min(took) / 1000)


def count_flops(graph: Any) -> float:
    """Multiplications and additions of a static OpenVINO graph's matrix products and convolutions, for all its rows."""
    total = 0.0
    for op in graph.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in ("MatMul", "Convolution", "ConvolutionBackpropData", "GroupConvolution"):
            continue
        if kind == "ConvolutionBackpropData":  # each pixel that comes in meets the whole kernel
            total += 2.0 * math.prod(op.get_input_shape(0)) * math.prod(op.get_input_shape(1)[1:])
            continue
        out, weight = op.get_output_shape(0), op.get_input_shape(1)
        if kind == "MatMul":
            depth = op.get_input_shape(0)[-2 if op.get_attributes().get("transpose_a") else -1]
        else:
            depth = math.prod(weight[1:] if kind == "Convolution" else weight[2:])
        total += 2.0 * math.prod(out) * depth
    return total
