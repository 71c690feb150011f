"""Bodies in and out: JSON objects, and server-sent events that end in an error when something breaks half-way."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lightning_rl.errors import LightningError
from rollout_server.api.errors import ApiError, EngineError

log = logging.getLogger("lrl.web")


async def json_body(http: Request) -> dict[str, Any]:
    try:
        body = json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object", code="invalid_json")
    return body


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
            log.error("a defect of the server's", exc_info=error)
            return ApiError(500, "the server failed; its log has the traceback", code="internal_error")


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except Exception as error:  # the status is sent already: the stream itself must say it
            yield _event(as_api_error(error).body())
            return
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
