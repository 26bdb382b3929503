"""ASGI layers before the application: who has no key is not read, and no body is larger than it may be."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class KeyGate:
    """Answers 401 under /v1/ to who does not send the key, before anything else of the request is looked at."""

    def __init__(self, app: ASGIApp, key: str, refuse: Callable[[int, str], Response]) -> None:
        """Around `app`; `refuse` makes an answer of a status and what is said."""
        self.app, self.key, self.refuse = app, key.encode(), refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compare, in constant time, and pass on."""
        # as routes are found: behind a prefix of a balancer or another application the path begins with that
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/"):
            scheme, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
            sent = sent.strip() if scheme.lower() == "bearer" else ""
            if not hmac.compare_digest(sent.encode(), self.key):
                answer = self.refuse(401, "a valid API key is needed")
                answer.headers["WWW-Authenticate"] = "Bearer"
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, whatever its headers say, and 408 to one that does not come."""

    def __init__(self, app: ASGIApp, limit: int, wait_s: float, refuse: Callable[[int, str], Response]) -> None:
        """Around `app`; `refuse` makes an answer of a status and what is said."""
        self.app, self.limit, self.wait_s, self.refuse = app, limit, wait_s, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, count, and pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.wait_s):
                while more and len(body) <= self.limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await self.refuse(408, f"the body did not come within {self.wait_s:g} s")(scope, receive, send)
            return
        if len(body) > self.limit:
            await self.refuse(413, f"the body has more than {self.limit} bytes")(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)
