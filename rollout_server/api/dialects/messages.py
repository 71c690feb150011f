"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect, for harnesses that speak only that."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.asking import prefixed
from rollout_server.api.dialects.fields import renamed
from rollout_server.api.dialects.messages_request import MessagesRequest, parse_count, parse_messages
from rollout_server.api.dialects.messages_stream import (
    MessageEvents,
    anthropic_error,
    anthropic_usage,
    content_blocks,
    stop_reason,
)
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import unless_gone
from rollout_server.api.front.wire import json_body, json_response, named_event_stream
from rollout_server.api.rendering.render import RenderError
from rollout_server.api.services import Services
from rollout_server.api.turn_run import Finished, Step, TurnRun, begin

_NAMES_HERE = {
    r"^response_format$": "output_config.format",
    r"^(tools\.\d+)\.function\.parameters": r"\1.input_schema",
    r"^(tools\.\d+)\.function": r"\1",
}


async def create_message(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_messages(body)
    try:
        run = await begin(services, http, episode_id, request.turn(), body, prefixed("msg_"))
    except ApiError as error:
        raise renamed(error, _NAMES_HERE) from error
    if not request.stream:
        (finished,) = await run.whole()
        return json_response(_whole(request, run, finished))
    steps = run.steps()
    first = await unless_gone(http, anext(steps))  # errors before it still get a status of their own
    return named_event_stream(_events(request, run, first, steps), anthropic_error)


async def count_tokens(services: Services, http: Request, episode_id: str | None) -> Response:
    """Of the conversation rendered whole."""
    request = parse_count(await json_body(http))
    services.answering(http, request.model)
    await services.text_size.check_parts(http, request.model_dump(), "messages")
    messages = request.conversation()
    request.continues(messages)
    services.text_size.check_messages(len(messages))
    tools, options = request.tool_definitions(), request.template_options()
    try:
        ids = await services.renderer.patiently(lambda: services.renderer.prompt(messages, tools, options))
    except RenderError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    return json_response({"input_tokens": len(ids)})


def _whole(request: MessagesRequest, run: TurnRun, finished: Finished) -> dict[str, Any]:
    content = content_blocks(finished.reply.parts, omits_thinking=request.omits_thinking)
    return {**_message(run), "content": content, **_end(request, finished), **_told(request, run)}


def _end(request: MessagesRequest, finished: Finished) -> dict[str, Any]:
    reason, sequence = stop_reason(finished, request.stops)
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None}


def _told(request: MessagesRequest, run: TurnRun) -> dict[str, Any]:
    """What else there is to say at the end."""
    edited: dict[str, Any] = (
        {"context_management": {"applied_edits": []}} if request.context_management is not None else {}
    )
    return {"usage": anthropic_usage(run.usage()), **edited}


def _message(run: TurnRun) -> dict[str, Any]:
    """While nothing is said yet."""
    return {
        "id": run.response_id,
        "type": "message",
        "role": "assistant",
        "model": run.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
    }


async def _events(
    request: MessagesRequest, run: TurnRun, first: Step, rest: AsyncGenerator[Step, None]
) -> AsyncGenerator[dict[str, Any], None]:
    writer, finished = MessageEvents(omits_thinking=request.omits_thinking), first.finished
    async with aclosing(rest):
        yield {"type": "message_start", "message": {**_message(run), "usage": anthropic_usage(run.usage())}}
        for event in writer.step(first):
            yield event
        async for step in rest:
            for event in writer.step(step):
                yield event
            finished = step.finished
    assert finished is not None
    yield {"type": "message_delta", "delta": _end(request, finished), **_told(request, run)}
    yield {"type": "message_stop"}
