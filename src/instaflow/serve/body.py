"""No request is larger than it may be: an ASGI layer that reads a body before anything parses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


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
