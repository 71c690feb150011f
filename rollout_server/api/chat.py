"""`POST /v1/chat/completions`: conversations in, messages and tool calls out, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import Exchange, Plan, Services, drain, finish_reason, unless_gone
from rollout_server.api.logprobs import chat_logprobs
from rollout_server.api.render import RenderError
from rollout_server.api.requests import ChatRequest, parse_chat
from rollout_server.api.tool_parsers import CLOSE, HermesParser, ToolCall, parse_reply
from rollout_server.api.tool_prompt import Message
from rollout_server.api.wire import event_stream, json_body, json_response


async def chat_completions(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_chat(body)
    messages, tools = request.conversation(), request.tool_definitions()
    log = await services.episode(episode_id)
    exchange = Exchange(services, log, request, body, lambda plan: _message(request, plan))
    try:
        prompt = services.conversations.prompt(exchange.scope, messages, tools)
    except RenderError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    one_call_only = request.parses_tools and not request.parallel_tool_calls
    exchange.admit([prompt], inclusive_stops=(CLOSE,) if one_call_only else ())
    exchange.note_tool_results(messages)
    events = _remembering(exchange, messages, tools, exchange.events(reads_along=request.stream))
    if request.stream:
        first = await unless_gone(http, anext(events))  # errors before it still get a status of their own
        return event_stream(_chunks(exchange, request, first, events))
    await unless_gone(http, drain(events))
    return json_response(_whole(exchange, request))


def _message(request: ChatRequest, plan: Plan) -> Message:
    if not request.parses_tools:
        return {"role": "assistant", "content": plan.choice.text}
    content, calls = parse_reply(plan.choice.text, plan.call_id)
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [call.as_openai() for call in calls]
    return message


async def _remembering(
    exchange: Exchange,
    messages: list[Message],
    tools: list[dict[str, Any]],
    events: AsyncIterator[tuple[Plan, Piece | None]],
) -> AsyncIterator[tuple[Plan, Piece | None]]:
    """The same events; a finished reply can be extended from the moment on that the client knows it."""
    async for plan, piece in events:
        if piece is None:
            ids = plan.choice.prompt_ids + plan.choice.ids
            reply = exchange.replies[plan.index]
            exchange.services.conversations.remember(exchange.scope, messages, reply, tools, ids, plan.call_id)
        yield plan, piece


def _head(exchange: Exchange, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{exchange.id}",
        "object": kind,
        "created": int(time.time()),
        "model": exchange.model,
    }


def _whole(exchange: Exchange, request: ChatRequest) -> dict[str, Any]:
    tokenizer = exchange.services.renderer.tokenizer
    choices = []
    for plan in exchange.plans:
        choice, reply = plan.choice, exchange.replies[plan.index]
        entry: dict[str, Any] = {
            "index": plan.index,
            "message": {**reply, "refusal": None},
            "finish_reason": finish_reason(choice, reply),
            "logprobs": chat_logprobs(tokenizer, choice.as_piece()) if request.logprobs else None,
        }
        if request.return_token_ids:
            entry |= {"token_ids": choice.ids, "weight_versions": version_spans(choice.versions)}
        choices.append(entry)
    whole = {**_head(exchange, "chat.completion"), "choices": choices, "usage": exchange.usage()}
    if request.return_token_ids:
        whole["prompt_token_ids"] = exchange.plans[0].choice.prompt_ids
    return whole


async def _chunks(
    exchange: Exchange,
    request: ChatRequest,
    first: tuple[Plan, Piece | None],
    rest: AsyncIterator[tuple[Plan, Piece | None]],
) -> AsyncIterator[dict[str, Any]]:
    head = _head(exchange, "chat.completion.chunk")
    if request.stream_options.include_usage:
        head["usage"] = None
    writers = {plan.index: _DeltaWriter(exchange, request, plan) for plan in exchange.plans}
    for plan in exchange.plans:
        opening = {"index": plan.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        chunk = {**head, "choices": [opening]}
        if request.return_token_ids and plan.index == 0:
            chunk["prompt_token_ids"] = plan.choice.prompt_ids
        yield chunk
    for choice in writers[first[0].index].write(first[1]):
        yield {**head, "choices": [choice]}
    async for plan, piece in rest:
        for choice in writers[plan.index].write(piece):
            yield {**head, "choices": [choice]}
    if request.stream_options.include_usage:
        yield {**head, "choices": [], "usage": exchange.usage()}


class _DeltaWriter:
    """Turns one choice's pieces into the choices of chunks."""

    def __init__(self, exchange: Exchange, request: ChatRequest, plan: Plan) -> None:
        self._exchange = exchange
        self._request = request
        self._plan = plan
        self._parser = HermesParser(plan.call_id) if request.parses_tools else None
        self._calls = 0

    def write(self, piece: Piece | None) -> list[dict[str, Any]]:
        if piece is None:
            return self._end()
        said = self._parser.feed(piece.text) if self._parser else [piece.text] if piece.text else []
        deltas = [self._delta(event) for event in said]
        extras = self._extras(piece)
        if not deltas and extras:
            deltas = [{}]
        choices = [{"index": self._plan.index, "delta": delta, "finish_reason": None} for delta in deltas]
        if choices:
            choices[0] |= extras
        return choices

    def _end(self) -> list[dict[str, Any]]:
        said = self._parser.finish() if self._parser else []
        index, choice = self._plan.index, self._plan.choice
        choices = [{"index": index, "delta": self._delta(event), "finish_reason": None} for event in said]
        reason = finish_reason(choice, self._exchange.replies[index])
        last: dict[str, Any] = {"index": index, "delta": {}, "finish_reason": reason}
        if self._request.return_token_ids:
            last["weight_versions"] = version_spans(choice.versions)
        return [*choices, last]

    def _delta(self, event: str | ToolCall) -> dict[str, Any]:
        if isinstance(event, str):
            return {"content": event}
        self._calls += 1
        return {"tool_calls": [{"index": self._calls - 1, **event.as_openai()}]}

    def _extras(self, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._request.logprobs:
            extras["logprobs"] = chat_logprobs(self._exchange.services.renderer.tokenizer, piece)
        if self._request.return_token_ids:
            extras["token_ids"] = piece.ids
        return extras
