"""What every protocol says of a model beside its pictures: straightness, latency, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from instaflow.errors import DataError
from instaflow.evaluate.drawing import Entrant, Task
from instaflow.flow import euler
from instaflow.models.bundle import Bundle
from instaflow.models.networks import decode_latents
from instaflow.models.sampling import noise, sample

SAMPLES, STEPS = 128, 25  # of straightness
WARM, TIMED = 3, 30  # pictures drawn one by one


def straightness_along(bundle: Bundle, task: Task) -> dict[str, Any]:
    """S(Z) per element with its standard error, and ‖(Z₁ − Z₀) − v(Z_t, t)‖² at each t of an Euler path, unguided."""
    n = min(SAMPLES, len(task.prompts))
    x0 = noise(task.seeds[:n], bundle.latent_shape()).to(bundle.device)
    with torch.inference_mode(), torch.autocast(bundle.device.type, torch.bfloat16):
        states = euler(bundle.velocity(bundle.encode(task.prompts[:n])), x0, STEPS, path=True)
    speeds = (states[1:] - states[:-1]).double() * STEPS
    squares = (speeds - (states[-1] - states[0])).square().flatten(2).mean(2)  # (steps, N)
    s = squares.mean(0)
    return {
        "mean": round(s.mean().item(), 5),
        "standard_error": round((s.std() / n**0.5).item(), 5) if n > 1 else 0.0,
        "along_t": [round(v, 5) for v in squares.mean(1).tolist()],
    }


def latency(bundle: Bundle, entrant: Entrant, prompt: str) -> dict[str, float]:
    """Milliseconds from text to pixels, one picture at a time, after a warm-up: median and 95th percentile."""
    took = []
    for i in range(WARM + TIMED):
        begun = time.perf_counter()
        with torch.inference_mode():
            latents = sample(bundle, [prompt], seeds=[i], steps=entrant.steps, guidance=entrant.guidance)
            decode_latents(bundle.vae, latents).cpu()
        took.append(1000 * (time.perf_counter() - begun))
    p50, p95 = np.percentile(took[WARM:], [50, 95])
    return {"p50_ms": round(float(p50), 1), "p95_ms": round(float(p95), 1)}


PROGRAM = """
import json, sys, torch
from instaflow.generate import InstaFlow
from instaflow.runtime.bench import peak_memory
model, steps, guidance, device, prompt = json.loads(sys.argv[1])
InstaFlow.load(model, device=device, safety=False, engine="torch").generate(prompt, steps=steps, guidance=guidance)
peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
print(json.dumps([peak_memory(), peak]))
"""


def peak_memory(entrant: Entrant, prompt: str, device: str) -> dict[str, float]:
    """Megabytes that a process of its own needs, at most, to load the model and draw one picture.

    Raises:
        DataError: it did not come to an end.
    """
    request = json.dumps([str(entrant.folder), entrant.steps, entrant.guidance, device, prompt])
    done = subprocess.run([sys.executable, "-c", PROGRAM, request], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise DataError(f"{entrant.label}: a process that draws one picture failed: {reason[:200]}")
    resident, gpu = json.loads(done.stdout.splitlines()[-1])
    return {"resident_mb": round(resident / 1e6), "gpu_mb": round(gpu / 1e6)}
