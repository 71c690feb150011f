"""Bodies in and out: JSON objects, and server-sent events that end in an error when something breaks half-way.

What cannot be JSON, or would cost more to look at than any sensible request, is refused before anybody works with it: not UTF-8,
lone surrogates, NaN, numbers that no float holds, thousands of brackets. Keys that come twice count once, with their last value.
Nothing of a body is ever repeated in an error or in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_rl.errors import LightningError
from rollout_server.api.errors import ApiError, EngineError

MAX_DEPTH = 100
"""Of objects and lists in one another."""
MAX_CONTAINERS = 100_000
MAX_COMMAS = 2_000_000

log = logging.getLogger("lrl.web")


async def json_body(http: Request) -> dict[str, Any]:
    """Raises ApiError: 415 for another type of content, 400 for a body that is no JSON object or a hostile one."""
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the content-type must be application/json", code="unsupported_media_type")
    return decode_object(await http.body())


def decode_object(raw: bytes) -> dict[str, Any]:
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > MAX_CONTAINERS or raw.count(b",") > MAX_COMMAS:
        raise ApiError(400, "the request body has too many values", code="invalid_json")
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the request body is no JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object", code="invalid_json")
    if containers > MAX_DEPTH and _is_deep(body):
        raise _too_deep()
    return body


def _is_deep(body: dict[str, Any]) -> bool:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _too_deep() -> ApiError:
    return ApiError(400, f"the request body is nested more than {MAX_DEPTH} deep", code="invalid_json")


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; what nobody expected is logged with its traceback."""
    match error:
        case ApiError():
            return error
        case EngineError():
            return error.to_api()
        case LightningError():
            log.error("%s: %s", type(error).__name__, error)
            return ApiError(500, f"{type(error).__name__}: {error}", code="server_error")
        case _:
            log.error("a defect of the server's: %s", where(error))
            return ApiError(500, "the server failed; its log has the traceback", code="internal_error")


def where(error: BaseException) -> str:
    """Kinds and places of an error and of those that led to it. Not what they say: that may quote a prompt."""
    told: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        told.append(type(seen).__name__ + "\n" + "".join(traceback.format_tb(seen.__traceback__)))
        seen = seen.__cause__ or seen.__context__
    return "after it ".join(reversed(told)).rstrip()


class EventStream(Response):
    """Events as they come, until the client goes away; however it ends, the generator is closed then."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None], last_words: Callable[[ApiError], bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._lines = lines
        self.last_words = last_words
        """The event that tells of an error, where the stream ends before its time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            (writing if writing.done() else leaving).result()
        finally:
            leaving.cancel()
            if not writing.done():
                writing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await writing

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._lines):
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_stream(chunks: AsyncGenerator[dict[str, Any], None]) -> EventStream:
    """`data:` events, the last one `[DONE]` unless it is an error."""

    def failed(error: ApiError) -> bytes:
        return _event(error.body())

    return EventStream(_lines(chunks, _event, failed, b"data: [DONE]\n\n"), failed)


def named_event_stream(
    events: AsyncGenerator[dict[str, Any], None], failed: Callable[[ApiError], dict[str, Any]]
) -> EventStream:
    """Events named by their `type`, the last one telling the end; `failed` makes it when something breaks."""

    def last_words(error: ApiError) -> bytes:
        return _named(failed(error))

    return EventStream(_lines(events, _named, last_words, b""), last_words)


async def _lines(
    events: AsyncGenerator[dict[str, Any], None],
    line: Callable[[dict[str, Any]], bytes],
    failed: Callable[[ApiError], bytes],
    end: bytes,
) -> AsyncGenerator[bytes, None]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield line(event)
    except Exception as error:  # the status is sent already: the stream itself must say it
        yield failed(as_api_error(error))
        return
    if end:
        yield end


def _named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + _event(event)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
