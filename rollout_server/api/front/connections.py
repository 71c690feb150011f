"""A client's connection, and how long and how much it may keep the server waiting.

uvicorn's protocol on httptools, with what it leaves open: a head or a body that never comes to its end, a head without
bounds, a client that does not read what it is sent, more connections than there is room for, a body that goes on after it was
refused. Refusals that come before the application are in OpenAI's error shape too. Nothing is ever upgraded to WebSockets.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from rollout_server.api.errors import ApiError
from rollout_server.api.front.limits import RETRY_AFTER_S, Limits

HEAD_BYTES = 64 * 1024
"""Of a request's line and headers; the headers of agents are a few hundred bytes."""
PIPELINED = 16
"""Requests of one connection that wait for the answer to another."""
DISCARDED_BYTES = 64 * 2**20
"""Of a body that was answered before its end: a client that is heard out reads the answer, one that is cut off may not."""


FILES_BESIDE = 256
"""Open files of the process that are no client's connection."""


def make_room(limits: Limits) -> None:
    """Let the process have a file for every connection, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + FILES_BESIDE
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def guarded(limits: Limits) -> type[HttpToolsProtocol]:
    """For `uvicorn.Config(http=…)`."""

    class Guarded(GuardedProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, limits=limits, **kwargs)

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.ws_protocol_class = None
        self._limits = limits
        self._arriving: asyncio.TimerHandle | None = None
        """Runs out when a request does not arrive whole."""
        self._stalled: asyncio.TimerHandle | None = None
        """Runs out when the client takes up nothing."""
        self._answering: RequestResponseCycle | None = None
        """What is answered now; `cycle` is the request that came last."""
        self._head_bytes = 0
        self._discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(
                ApiError(503, "the server has no more connections", code="queue_full", retry_after=RETRY_AFTER_S)
            )
            return
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_timers()
        self._desert()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.write_timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def on_message_begin(self) -> None:
        self._head_bytes = self._discarded = 0
        if self._arriving is None:
            self._await_request()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() == b"POST":  # its body would not be parsed
            self._refuse(
                ApiError(400, "this is HTTP/1.1 and no other protocol: ask for no upgrade", code="invalid_http")
            )
            raise ValueError("an upgrade")
        super().on_headers_complete()
        if self.pipeline:  # read on only when its turn has come
            self._unset_arriving()
        if len(self.pipeline) > PIPELINED:
            self._cut_off()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > DISCARDED_BYTES:
                self._cut_off()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unset_arriving()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        waited = bool(self.pipeline)
        super().on_response_complete()
        if waited and self.cycle.more_body:
            self._await_request()

    def _unsupported_upgrade_warning(self) -> None:
        """A request without a body is answered as if it had not asked."""

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _desert(self) -> None:
        """Whoever works on an answer learns that nobody will read it, also when other requests came after it."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _cut_off(self) -> None:
        self._desert()
        self.transport.abort()

    def _await_request(self) -> None:
        self._unset_arriving()
        self._arriving = self.loop.call_later(self._limits.read_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        self._arriving = None
        if self.cycle is None and not self._head_bytes:
            self.transport.close()  # it never asked for anything
            return
        self._refuse(
            ApiError(408, f"the request did not arrive within {self._limits.read_timeout_s:g} s", code="timeout")
        )

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES:
            self._refuse(ApiError(431, f"the request's head is larger than {HEAD_BYTES} bytes", code="invalid_http"))
            raise ValueError("the request's head is too large")  # the parser stops there

    def _refuse(self, error: ApiError) -> None:
        """The last thing that the client hears, unless it has heard an answer or half of one: then it is cut off."""
        self._unset_timers()
        if self.transport.is_closing():
            return
        now, last = self._answering, self.cycle
        half_said = now is not None and now.response_started and not now.response_complete
        said_early = last is not None and last.response_complete and last.more_body
        if not half_said and not said_early:
            self.transport.write(_raw(error))
        self._desert()
        self.transport.close()

    def _unset_arriving(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _unset_timers(self) -> None:
        self._unset_arriving()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _raw(error: ApiError) -> bytes:
    body = msgspec.json.encode(error.body())
    retry = b"retry-after: %d\r\n" % error.retry_after if error.retry_after is not None else b""
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    return b"".join([STATUS_LINE[error.status], head, retry, b"\r\n", body])
