"""The HTTP API: OpenAI's image endpoint over a loaded model.

Not covered: editing and variations of pictures, streaming, accounts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException

from instaflow import __version__
from instaflow.errors import DataError, PromptError
from instaflow.generate import Drawing, InstaFlow
from instaflow.models.card import read_control_card
from instaflow.models.hub import CONTROLS
from instaflow.serve.batching import Batcher, Order, QueueFullError
from instaflow.serve.gates import BodyLimit, KeyGate
from instaflow.serve.orders import ImageRequest, Limits, lora_names, read_orders

log = logging.getLogger("instaflow")
PAGE = Path(__file__).parent / "page"
REFUSALS: dict[int | str, dict[str, Any]] = {s: {} for s in (400, 401, 404, 408, 413, 429, 500)}


def find_controls(model: str | None, folder: Path | None) -> dict[str, Path]:
    """The ControlNets in a folder by their own folders' names; without one, those that come with the default model.

    Raises:
        DataError: there are none in the folder.
    """
    if folder is None and model is not None:
        return {}
    found = {p.name: p for p in sorted((folder or CONTROLS).glob("*")) if (p / "config.json").is_file()}
    if folder is not None and not found:
        raise DataError(f"--controls {folder} is not allowed; use a folder with ControlNets' folders")
    return found


def read_key(file: Path) -> str:
    """The API key in a file.

    Raises:
        DataError: there is none.
    """
    if not file.is_file():
        raise DataError(f"--api-key-file {file}: no such file")
    key = file.read_bytes().strip()
    if not key or not key.isascii():
        raise DataError(f"--api-key-file {file} is not allowed; it holds one key, in ASCII")
    return key.decode()


class Service:
    """A loaded model with its controls, the queue before it, and what is counted."""

    def __init__(self, flow: InstaFlow, controls: Mapping[str, Path], limits: Limits) -> None:
        """Load the controls.

        Raises:
            BundleError: a ControlNet is not for this model or engine.
        """
        self.flow, self.limits, self.card = flow, limits, flow.engine.card
        self.networks = {name: flow.engine.load_control(folder) for name, folder in controls.items()}
        cards = {name: read_control_card(folder) for name, folder in controls.items()}
        self.kinds = {name: name if card is None else card.kind for name, card in cards.items()}
        self.batcher = Batcher(self.draw, 1, limits.queue)
        self.counted = CollectorRegistry()
        what = "Pictures' requests by status, and every refusal"
        self.answers = Counter("instaflow_requests", what, ["status"], registry=self.counted)
        self.pictures = Counter("instaflow_pictures", "Pictures drawn", registry=self.counted)
        sizes = (1, 2, 4, 8, 16, 32)
        self.batches = Histogram("instaflow_batch", "Pictures a batch", buckets=sizes, registry=self.counted)
        self.seconds = Histogram("instaflow_request_seconds", "From request to answer", registry=self.counted)
        waiting = Gauge("instaflow_waiting", "Pictures in the queue", registry=self.counted)
        waiting.set_function(lambda: self.batcher.waiting)

    def draw(self, orders: Sequence[Order]) -> list[Drawing]:
        """Pictures of orders of one kind."""
        first, together = orders[0], len(orders)
        options: dict[str, Any] = {"style": first.style, "size": first.size}
        options |= {"steps": first.steps, "guidance": first.guidance}
        if first.control:
            options["control"], together = first.control, 1
        if first.lora:
            options["lora_scale"] = first.lora
        prompts, seeds = [o.prompt for o in orders], [o.seed for o in orders]
        found = list(self.flow.generate_many(prompts, seeds=seeds, together=together, **options))
        self.batches.observe(len(found))
        self.pictures.inc(len(found))
        return found

    async def prepare(self) -> None:
        """What draws several at a time; till then they are drawn one by one, and nobody waits for it."""
        engine, size = self.flow.engine, self.card.image_size
        await asyncio.to_thread(engine.prepare, engine.batch, size)
        self.batcher.batch = engine.batch
        await asyncio.to_thread(engine.prepare, 1, size, [*self.networks.values()])

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Draws and prepares while the application runs."""
        works = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self.prepare())]
        try:
            yield
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    def refuse(self, status: int, message: str, headers: Any = None, param: str | None = None) -> JSONResponse:
        """An error in OpenAI's form, counted."""
        self.answers.labels(status).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        said = {"message": message, "type": kind, "param": param, "code": None}
        return JSONResponse({"error": said}, status, headers)


def create_app(
    flow: InstaFlow,
    *,
    controls: Mapping[str, Path] | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The application over one loaded model.

    Args:
        flow: the model; requests choose among its LoRAs by the names of their files.
        controls: the folders of ControlNets, by the names that requests call them.
        limits: of the service.
        api_key: what clients must send as a bearer token; None asks for none.

    Raises:
        BundleError: a ControlNet is not for this model or engine.
    """
    service = Service(flow, controls or {}, limits or Limits())
    app = FastAPI(title="InstaFlow", version=__version__, lifespan=service.running, docs_url=None, redoc_url=None)
    _for_clients(app, service)
    _for_operators(app, service)
    _refusing(app, service, api_key)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    for path in app.openapi()["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own word for what is answered by 400 here
    return app


def _for_clients(app: FastAPI, service: Service) -> None:
    """What a client speaks."""
    batcher, bounds, card = service.batcher, service.limits, service.card

    @app.post("/v1/images/generations", responses=REFUSALS)
    async def generations(body: ImageRequest, request: Request) -> dict[str, Any]:
        """Draw pictures."""
        begun = time.perf_counter()
        orders = read_orders(service.flow, service.networks, body, bounds)
        try:
            waiting = batcher.submit(orders)
        except QueueFullError:
            raise HTTPException(429, f"{bounds.queue} pictures may wait, no more", {"Retry-After": "1"}) from None
        drawn = await _wait(request, waiting, bounds.wait_s)
        service.seconds.observe(time.perf_counter() - begun)
        service.answers.labels(200).inc()
        return {"created": int(time.time()), "data": [_answer(d, body.response_format) for d in drawn]}

    @app.get("/v1/models", responses={401: {}})
    async def models() -> dict[str, Any]:
        """The one model, and what it can be asked for."""
        what: dict[str, Any] = {"kind": card.kind, "size": card.image_size, "steps": card.steps}
        what |= {"guidance": card.guidance, "max_guidance": card.max_guidance, "styles": card.styles}
        what |= {"engine": service.flow.engine.name, "loras": lora_names(service.flow), "controls": service.kinds}
        entry = {"id": card.name, "object": "model", "created": 0, "owned_by": "instaflow", "instaflow": what}
        return {"object": "list", "data": [entry]}


def _for_operators(app: FastAPI, service: Service) -> None:
    """What a balancer and a monitor ask."""

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {}})
    async def readyz() -> dict[str, str]:
        """It takes requests: the queue has room."""
        if service.batcher.waiting >= service.limits.queue:
            raise HTTPException(503, "the queue is full")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.counted), media_type=CONTENT_TYPE_LATEST)


def _refusing(app: FastAPI, service: Service, api_key: str | None) -> None:
    """Every refusal in one form, one line each; who has no key is refused before the body is read."""
    bounds, refuse = service.limits, service.refuse

    def unread(status: int, message: str) -> JSONResponse:
        return refuse(status, message, {"Connection": "close"})

    app.add_middleware(BodyLimit, limit=bounds.body_bytes, wait_s=bounds.body_s, refuse=unread)
    if api_key is not None:
        app.add_middleware(KeyGate, key=api_key, refuse=unread)

    @app.exception_handler(AnyHTTPException)
    async def on_http(_: Request, error: AnyHTTPException) -> JSONResponse:
        return refuse(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(400, "the body is no JSON")
        place = ".".join(str(p) for p in first["loc"][1:]) or "body"
        said = first["msg"]
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 2:
            said = f"there is no such field; allowed: {', '.join(ImageRequest.model_fields)}"
        return refuse(400, f"{place[:100]!a}: {said}", param=place[:100].encode("ascii", "replace").decode())

    @app.exception_handler(PromptError)
    async def on_prompt(_: Request, error: PromptError) -> JSONResponse:
        return refuse(400, str(error).encode("utf-8", "backslashreplace").decode())


async def _wait(request: Request, waiting: list[asyncio.Future[Drawing]], wait_s: float) -> list[Drawing]:
    """All of them, or none of them is wanted any more."""
    gone: asyncio.Future[None] = asyncio.create_task(_disconnected(request))
    all_of_them = asyncio.create_task(_all(waiting))
    either: set[asyncio.Future[Any]] = {gone, all_of_them}
    try:
        done, _ = await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if all_of_them in done:
            return all_of_them.result()
        if gone in done:
            raise HTTPException(499, "the client went away")
        raise HTTPException(429, f"no picture within {wait_s:g} s", {"Retry-After": "1"})
    except (HTTPException, asyncio.CancelledError):
        raise
    except Exception as error:  # its text may name paths: it is for the log
        log.error("a picture failed: %s: %s", type(error).__name__, error)
        raise HTTPException(500, "this picture could not be drawn; the service goes on") from None
    finally:
        gone.cancel()
        all_of_them.cancel()
        for answer in waiting:
            answer.cancel()


async def _all(waiting: list[asyncio.Future[Drawing]]) -> list[Drawing]:
    return [await answer for answer in waiting]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(drawing: Drawing, response_format: str) -> dict[str, Any]:
    """The picture itself, as base64 or as a data: URL; nothing is kept for a later request."""
    png = base64.b64encode(drawing.png()).decode()
    key, value = ("b64_json", png) if response_format == "b64_json" else ("url", f"data:image/png;base64,{png}")
    return {key: value, "seed": drawing.seed, "latency_ms": round(drawing.latency_ms, 2)}
