"""No request is larger than it may be: an ASGI layer that reads a body before anything parses it."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, whatever its headers say."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        """Around `app`."""
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, count, and pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                said = f"the body has more than {self.limit} bytes"
                error = {"message": said, "type": "invalid_request_error", "param": None, "code": "too_large"}
                await JSONResponse({"error": error}, 413, {"Connection": "close"})(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)
