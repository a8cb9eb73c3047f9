"""What every request passes before it is read: the token, the size and the time of its body."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lora_factory.serving.forms import error_body
from lora_factory.serving.metrics import Metrics

MAX_BODY_BYTES = 1 << 20  # 64 examples of 8,000 characters fit
BODY_SECONDS = 30.0
OPEN_PATHS = ("/healthz",)  # for those who watch the server without a token

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """An ASGI application around another one that refuses requests without the token, and bodies too large or slow.

    Args:
        app: The application.
        metrics: Where requests are counted.
        routes: Its paths; requests for others are counted as "other".
        token: What clients must send as ``Authorization: Bearer …``; None: nothing.
    """

    def __init__(self, app: Any, metrics: Metrics, routes: frozenset[str], token: str | None) -> None:  # noqa: ANN401
        """Stand before the application."""
        self._app, self._metrics, self._routes = app, metrics, routes
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or pass the server's start and stop on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, counted)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request(route, status, time.monotonic() - start)

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if not self._is_allowed(scope):
            await refuse(send, 401, "give the token: Authorization: Bearer …", "invalid_api_key")
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            await refuse(send, 408, f"the body did not come within {BODY_SECONDS:g} seconds", "timeout")
            return
        if body is None:
            await refuse(send, 413, f"the body is larger than {MAX_BODY_BYTES:,} bytes", "too_large")
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return given.pop() if given else await receive()

        await self._app(scope, replay, send)

    def _is_allowed(self, scope: MutableMapping[str, Any]) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(sent) == 1 and hmac.compare_digest(sent[0], self._expected)


async def _read(receive: Receive) -> bytes | None:
    """A body; None when it is too large: it is read to its end all the same, so that the client hears the answer."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        more = message.get("more_body", False)  # none after a disconnect
    return b"".join(parts) if size <= MAX_BODY_BYTES else None


async def refuse(send: Send, status: int, message: str, code: str) -> None:
    """Send an error."""
    body = json.dumps(error_body(message, status, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
