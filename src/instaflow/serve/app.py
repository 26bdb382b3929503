"""The HTTP API: OpenAI's image endpoint over a loaded model.

Not covered: editing and variations of pictures, streaming, accounts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from instaflow import __version__
from instaflow.errors import DataError, PromptError
from instaflow.generate import LARGEST_SEED, Drawing, InstaFlow
from instaflow.images import read_picture
from instaflow.models.card import read_control_card
from instaflow.models.hub import CONTROLS
from instaflow.models.request import Blend, Control
from instaflow.noise import Walk
from instaflow.serve.batching import Batcher, Order, QueueFullError
from instaflow.serve.body import BodyLimit

log = logging.getLogger("instaflow")
PAGE = Path(__file__).parent / "page"
FORMATS = ("PNG", "JPEG", "WEBP")
SIZE = re.compile(r"(\d{1,5})x\1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one service takes at a time."""

    queue: int = 64
    """Pictures that wait."""
    wait_s: float = 30.0
    """Longest wait for a picture."""
    body_bytes: int = 1 << 20
    body_s: float = 10.0
    """Longest wait for a body."""
    control_pixels: int = 1024
    """A side of a control picture."""


LoRAScale = Annotated[float, Field(ge=-2, le=2, strict=True)]


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
    key = file.read_bytes().strip() if file.is_file() else b""
    if not key or not key.isascii():
        raise DataError(f"--api-key-file {file} is not allowed; it holds one key, in ASCII")
    return key.decode()


class ControlRequest(BaseModel):
    """What one of the controls is shown."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: str = Field(description="A PNG, JPEG or WebP in base64, as the control was trained to see it")
    scale: float = Field(1.0, ge=0, le=2, strict=True)


class ImageRequest(BaseModel):
    """What the OpenAI client sends, and beside it what a one-step model can be asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(max_length=4000)
    prompt2: str | None = Field(None, max_length=4000, description="Where `mix` leads from `prompt`")
    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=16, strict=True)
    size: str | None = Field(None, max_length=11, description="WIDTHxHEIGHT, square, or auto")
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: str | None = Field(None, max_length=200)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, strict=True)
    seed2: int | None = Field(None, ge=0, le=LARGEST_SEED, strict=True, description="Where `mix` leads from `seed`")
    mix: float = Field(0, ge=0, le=1, strict=True, description="0 is seed and prompt, 1 is seed2 and prompt2")
    style: str | None = Field(None, max_length=100)
    steps: int | None = Field(None, ge=1, le=1000, strict=True)
    guidance: float | None = Field(None, ge=1)
    lora: dict[str, LoRAScale] = Field({}, max_length=100, description="LoRAs by name, each with its scale")
    control: dict[str, ControlRequest] = Field({}, max_length=10, description="Controls by name")


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
    bounds = limits or Limits()
    networks = {name: flow.engine.load_control(folder) for name, folder in (controls or {}).items()}
    cards = {name: read_control_card(folder) for name, folder in (controls or {}).items()}
    kinds = {name: name if found is None else found.kind for name, found in cards.items()}
    card = flow.engine.card
    registry = CollectorRegistry()
    answers = Counter(
        "instaflow_requests", "Pictures' requests by status, and every refusal", ["status"], registry=registry
    )
    pictures = Counter("instaflow_pictures", "Pictures drawn", registry=registry)
    batches = Histogram("instaflow_batch", "Pictures a batch", buckets=(1, 2, 4, 8, 16, 32), registry=registry)
    seconds = Histogram("instaflow_request_seconds", "From request to answer", registry=registry)

    def draw(orders: Sequence[Order]) -> list[Drawing]:
        first, count = orders[0], len(orders)
        options: dict[str, Any] = {
            "style": first.style, "size": first.size, "steps": first.steps, "guidance": first.guidance
        }  # fmt: skip
        if first.control:
            options["control"], count = first.control, 1
        if first.lora:
            options["lora_scale"] = first.lora
        drawn = flow.generate_many(
            [o.prompt for o in orders], seeds=[o.seed for o in orders], together=count, **options
        )
        found = list(drawn)
        batches.observe(len(found))
        pictures.inc(len(found))
        return found

    batcher = Batcher(draw, 1, bounds.queue)
    Gauge("instaflow_waiting", "Pictures in the queue", registry=registry).set_function(lambda: batcher.waiting)

    async def prepare() -> None:
        """What draws several at a time; till then they are drawn one by one, and nobody waits for it."""
        await asyncio.to_thread(flow.engine.prepare, flow.engine.batch, card.image_size)
        batcher.batch = flow.engine.batch
        await asyncio.to_thread(flow.engine.prepare, 1, card.image_size, [*networks.values()])

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        works = [asyncio.create_task(batcher.run()), asyncio.create_task(prepare())]
        try:
            yield
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    app = FastAPI(title="InstaFlow", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    def allowed(request: Request) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        sent = sent.strip() if scheme.lower() == "bearer" else ""
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise HTTPException(401, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})

    guarded = [Depends(allowed)]

    @app.post(
        "/v1/images/generations", dependencies=guarded, responses={s: {} for s in (400, 401, 404, 408, 413, 429, 500)}
    )
    async def generations(body: ImageRequest, request: Request) -> dict[str, Any]:
        """Draw pictures."""
        begun = time.perf_counter()
        orders = _orders(flow, networks, body, bounds)
        try:
            waiting = batcher.submit(orders)
        except QueueFullError:
            raise HTTPException(429, f"{bounds.queue} pictures may wait, no more", {"Retry-After": "1"}) from None
        drawn = await _wait(request, waiting, bounds.wait_s)
        seconds.observe(time.perf_counter() - begun)
        answers.labels(200).inc()
        return {"created": int(time.time()), "data": [_answer(d, body.response_format) for d in drawn]}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """The one model, and what it can be asked for."""
        what: dict[str, Any] = {
            "kind": card.kind,
            "size": card.image_size,
            "steps": card.steps,
            "guidance": card.guidance,
        }
        what |= {"max_guidance": card.max_guidance, "styles": card.styles, "engine": flow.engine.name}
        what |= {"loras": _lora_names(flow), "controls": kinds}
        entry = {"id": card.name, "object": "model", "created": 0, "owned_by": "instaflow", "instaflow": what}
        return {"object": "list", "data": [entry]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {}})
    async def readyz() -> dict[str, str]:
        """It takes requests: the queue has room."""
        if batcher.waiting >= bounds.queue:
            raise HTTPException(503, "the queue is full")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def refuse(status: int, message: str, headers: Any = None, param: str | None = None) -> JSONResponse:
        answers.labels(status).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse(
            {"error": {"message": message, "type": kind, "param": param, "code": None}}, status, headers
        )

    def unread(status: int, message: str) -> JSONResponse:
        return refuse(status, message, {"Connection": "close"})

    app.add_middleware(BodyLimit, limit=bounds.body_bytes, wait_s=bounds.body_s, refuse=unread)

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

    app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    return app


def _orders(flow: InstaFlow, networks: Mapping[str, Any], body: ImageRequest, limits: Limits) -> list[Order]:
    """One a picture, everything checked: what is queued can be drawn."""
    card = flow.engine.card
    if body.model not in (None, card.name):
        raise HTTPException(404, f"there is no such model here; there is: {card.name}")
    loras = _lora_names(flow)
    if body.lora.keys() - loras:
        raise PromptError(f"there is no such lora here; there is: {', '.join(loras) or 'none'}")
    size = card.image_size
    if body.size not in (None, "auto"):
        if not (found := SIZE.fullmatch(body.size or "")):
            raise PromptError(f"size={body.size!a} is not allowed; use WIDTHxHEIGHT with both the same, or auto")
        size = int(found[1])
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    if body.mix and body.seed2 is None and body.prompt2 is None:
        raise PromptError(f"mix={body.mix:g} needs seed2 or prompt2, where it leads")
    for name, number in (("seed", seed), ("seed2", body.seed2 or 0)):
        if number + body.n - 1 > LARGEST_SEED:
            raise PromptError(f"{name}={number} with n={body.n} is not allowed; the last may be {LARGEST_SEED}")
    steps = card.steps if body.steps is None else body.steps
    guidance = card.guidance if body.guidance is None else body.guidance
    options: dict[str, Any] = {"style": body.style, "size": size, "steps": steps, "guidance": guidance}
    seeds = [seed + i if body.seed2 is None else Walk(seed + i, body.seed2 + i, body.mix) for i in range(body.n)]
    prompt = body.prompt if body.prompt2 is None else Blend(body.prompt, body.prompt2, body.mix)
    options["control"] = _controls(networks, body, limits)
    flow.generate_many([prompt], seeds=seeds[:1], **options)  # it checks at once and draws when it is read
    lora = tuple(body.lora.get(name, 0.0) for name in loras)
    return [Order(prompt=prompt, seed=s, lora=lora, **options) for s in seeds]


def _controls(networks: Mapping[str, Any], body: ImageRequest, limits: Limits) -> tuple[Control, ...]:
    if body.control.keys() - networks.keys():
        raise PromptError(f"there is no such control here; there is: {', '.join(networks) or 'none'}")
    found = []
    for name, asked in body.control.items():
        try:
            data = base64.b64decode(asked.image, validate=True)
        except ValueError:
            raise PromptError(f"control.{name}.image: this is no base64") from None
        try:
            image = read_picture(data, ground="black", largest=limits.control_pixels, formats=FORMATS)
        except ValueError as error:
            raise PromptError(f"control.{name}.image: {error}; allowed: {', '.join(FORMATS)}") from None
        found.append(Control(network=networks[name], name=name, image=image, scale=asked.scale))
    return tuple(found)


def _lora_names(flow: InstaFlow) -> list[str]:
    return [Path(lora.source).stem for lora in flow.loras]


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
