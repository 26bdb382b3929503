"""The verb that serves."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from instaflow.cli.app import Compiled, Device, Engine, Precision, Whole, app, hush
from instaflow.errors import DataError


@app.command
def serve(
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: Whole = 8000,
    queue: Whole = 64,
    api_key_file: Path | None = None,
    loras: Path | None = None,
    controls: Path | None = None,
    device: Device = "cpu",
    engine: Engine = None,
    precision: Precision = None,
    compiled: Compiled = False,
    safety: bool = True,
) -> None:
    """Serve a model over HTTP: OpenAI's image endpoint, and a page that draws while you type.

    ```
    instaflow serve
    instaflow serve --model runs/emoji/one-step/bundle --port 9000 --api-key-file key.txt
    ```

    Parameters
    ----------
    model
        A folder, a hub id or a Stable Diffusion 1.x .safetensors file; left out, the default model.
    host
        Where to listen; only this machine reaches 127.0.0.1.
    port
        1 to 65535.
    queue
        Pictures that may wait; more are answered with 429.
    api_key_file
        A file with the key that clients must send.
    loras
        A folder of .safetensors LoRAs for this model, which requests mix by name; torch draws then.
    controls
        A folder of ControlNets, each a folder, for this model, which requests choose by name; left out, those that come
        with the default model.
    safety
        Run the model's own safety checker, when it has one.
    """
    if not 1 <= port <= 65535:
        raise DataError(f"--port={port} is not allowed; use 1 to 65535")
    if queue < 1:
        raise DataError(f"--queue={queue} is not allowed; use 1 or more")
    if loras is not None and engine == "openvino":
        raise DataError("--loras needs --engine=torch: the engine openvino has its LoRAs fused")
    files = sorted(loras.glob("*.safetensors")) if loras else []
    if loras is not None and not files:
        raise DataError(f"--loras {loras} is not allowed; use a folder with .safetensors files")
    hush()
    import socket

    import uvicorn

    from instaflow.generate import InstaFlow
    from instaflow.runtime.loading import engine_for
    from instaflow.serve.app import create_app, find_controls, read_key
    from instaflow.serve.orders import Limits

    key = read_key(api_key_file) if api_key_file else None
    nets = find_controls(model, controls)
    if controls is not None:
        engine = engine or engine_for(model, [*nets.values()])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise DataError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    options: dict[str, Any] = {"device": device, "engine": engine, "precision": precision, "compiled": compiled}
    flow = InstaFlow.load(model, lora=files, safety=safety, **options)
    flow.engine.prepare(1, flow.engine.card.image_size)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains on it and then raises it again
    served = create_app(flow, controls=nets, limits=Limits(queue=queue), api_key=key)
    where = f"[{host}]" if ":" in host else host
    print(f"{flow.engine.card.name} at http://{where}:{port}  {flow.engine.name}; Ctrl-C stops it", flush=True)
    config = uvicorn.Config(served, log_level="warning", timeout_graceful_shutdown=60)
    uvicorn.Server(config).run(sockets=[listening])
