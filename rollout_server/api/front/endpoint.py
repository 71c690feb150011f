"""One request's way through the server, whatever its route: let in, bounded, answered, counted.

In this order: origin and key; whose it is; a body no longer than allowed; the handler; every error in the shape of the route's
dialect. All of it within the time that a request may take. Whatever the handler took on for the request is given back when its
answer is sent or its client is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import ClientGone
from rollout_server.api.front.access import Access, Keys, Origins, flow_of
from rollout_server.api.front.joining import episode_of, span_of
from rollout_server.api.front.limits import RETRY_AFTER_S, Limits
from rollout_server.api.front.metrics import Metrics
from rollout_server.api.front.visit import Visit, leave_with
from rollout_server.api.front.wire import EventStream, as_api_error, json_response
from rollout_server.api.services import Services

Handler = Callable[[Services, Request, str | None], Awaitable[Response]]
"""Of services, request and episode. Raises ApiError."""
Shape = Callable[[ApiError], dict[str, Any]]
"""The body of an error."""

GONE = 499
"""What the metrics count a request as whose client left; nobody gets to see it."""


class Bodies:
    """Bytes of the bodies of all requests under way."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = 0

    def reader(self, scope: Scope, receive: Receive, at_end: ExitStack) -> Receive:
        """Raises ApiError 413 or 503 as soon as the body is known to be too much; not any more once it is there."""
        taken, whole = 0, False
        declared = Headers(scope=scope).get("content-length", "")
        announced = int(declared) if declared.isdecimal() and len(declared) < 20 else 0

        def give_back() -> None:
            self.held -= taken

        async def read() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            self._check(announced)
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            self.held += size
            self._check(taken)
            whole = not message.get("more_body", False)
            return message

        at_end.callback(give_back)
        return read

    def _check(self, size: int) -> None:
        limits = self._limits
        if size > limits.body_bytes:
            raise ApiError(
                413, f"the request's body is larger than {limits.body_bytes} bytes", code="request_too_large"
            )
        if self.held > limits.bodies_bytes:
            raise ApiError(
                503, "the server has too many large requests under way", code="queue_full", retry_after=RETRY_AFTER_S
            )


@dataclass(frozen=True)
class House:
    """What all endpoints share."""

    services: Services
    limits: Limits
    metrics: Metrics
    keys: Keys
    origins: Origins
    bodies: Bodies


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application for one path. `handlers` by method."""

    house: House
    name: str
    """The path as metrics show it."""
    handlers: Mapping[str, tuple[Access, Handler]]
    shape: Shape = ApiError.body
    recorded: bool = False
    """Whether its requests may belong to an episode."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        limits, metrics = self.house.limits, self.house.metrics
        metrics.in_flight += 1
        with ExitStack() as at_end:
            http = Request(scope, self.house.bodies.reader(scope, receive, at_end), send)
            answer = _Answer(send, self.house.origins.headers(http))
            try:
                try:
                    async with asyncio.timeout(self._time(http)) as limit:
                        response = await self._response(http, started, at_end)
                        answer.stream = response if isinstance(response, EventStream) else None
                        await response(scope, http.receive, answer.send)
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    raise ApiError(
                        503, f"the request took longer than {limits.request_timeout_s:g} s", code="timeout"
                    ) from error
            except (ClientGone, ClientDisconnect):
                answer.status = GONE
            except Exception as error:
                await self._say(answer, as_api_error(error), scope, receive)
            finally:
                metrics.in_flight -= 1
                metrics.answered(self.name, http.method, answer.status, time.perf_counter() - started)

    def _time(self, http: Request) -> float | None:
        """Seconds; what the administrator asks for takes as long as it takes."""
        access, _ = self._handler(http)
        return None if access == "admin" else self.house.limits.request_timeout_s

    def _handler(self, http: Request) -> tuple[Access, Handler] | tuple[None, None]:
        return self.handlers.get("GET" if http.method == "HEAD" else http.method, (None, None))

    async def _response(self, http: Request, started: float, at_end: ExitStack) -> Response:
        house = self.house
        if http.method == "OPTIONS" and "access-control-request-method" in http.headers:
            return Response(status_code=204, headers=house.origins.preflight(http))
        house.origins.check(http)
        access, handler = self._handler(http)
        if access is None or handler is None:
            raise ApiError(405, f"{http.method} is not a method of this path", code="method_not_allowed")
        house.keys.check(http, access)
        episode_id = episode_of(http, house.keys) if self.recorded else None
        span_id = span_of(http) if episode_id is not None else None
        leave_with(http, Visit(flow_of(http, episode_id), started, at_end, span_id))
        return await handler(house.services, http, episode_id)

    async def _say(self, answer: _Answer, error: ApiError, scope: Scope, receive: Receive) -> None:
        if answer.status is not None:
            await answer.break_off(error)
            return
        response = json_response(self.shape(error), error.status)
        if error.retry_after is not None:
            response.headers["retry-after"] = str(error.retry_after)
        if error.final:
            response.headers["x-should-retry"] = "false"
        if error.status == 405:
            response.headers["allow"] = ", ".join(sorted(self.handlers))
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, answer.send)


class _Answer:
    """What was sent by now."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = headers
        self._ended = False
        self.status: int | None = None
        self.stream: EventStream | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._headers:
                MutableHeaders(scope=message).update(self._headers)
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def break_off(self, error: ApiError) -> None:
        """After its head an answer can tell of an error only if it is a stream of events."""
        if self.stream is not None and not self._ended:
            await self.send({"type": "http.response.body", "body": self.stream.last_words(error), "more_body": False})
