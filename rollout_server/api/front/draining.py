"""The door of a server that is about to end: what is under way goes on, what comes new is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.errors import ENGINE_RETRY_AFTER_S, ApiError
from rollout_server.api.front.wire import json_response

_GLANCE_S = 0.05


class Door:
    """An ASGI application around another. Single-threaded: use it from one event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._closed = False
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._closed:
            await _refuse(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1

    async def drain(self, seconds: float, impatient: Callable[[], bool]) -> None:
        """Let nobody in any more; return when all are out, after `seconds`, or as soon as `impatient` says so."""
        self._closed = True
        deadline = time.monotonic() + seconds
        while self._under_way and time.monotonic() < deadline and not impatient():
            await asyncio.sleep(_GLANCE_S)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(503, "the server is shutting down", code="shutting_down")
    response = json_response(error.body(), error.status)
    response.headers["retry-after"] = str(ENGINE_RETRY_AFTER_S)
    response.headers["connection"] = "close"
    await response(scope, receive, send)
