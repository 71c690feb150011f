"""`POST /v1/completions`: text or token ids in, text out, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.conversation import Prompt
from rollout_server.api.exchange import Exchange, Plan, Services, drain, finish_reason, unless_gone
from rollout_server.api.logprobs import completion_logprobs
from rollout_server.api.requests import CompletionRequest, parse_completion
from rollout_server.api.wire import event_stream, json_body, json_response


async def completions(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_completion(body)
    log = await services.episode(episode_id)
    exchange = Exchange(services, log, request, body, lambda plan: {"role": "assistant", "content": plan.choice.text})
    encode = services.renderer.encode
    exchange.admit([Prompt(encode(p) if isinstance(p, str) else p) for p in request.prompts()])
    events = exchange.events(reads_along=request.stream)
    if request.stream:
        first = await unless_gone(http, anext(events))
        return event_stream(_chunks(exchange, request, first, events))
    await unless_gone(http, drain(events))
    return json_response(_whole(exchange, request))


def _head(exchange: Exchange) -> dict[str, Any]:
    return {
        "id": f"cmpl-{exchange.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": exchange.model,
    }


def _whole(exchange: Exchange, request: CompletionRequest) -> dict[str, Any]:
    choices = []
    for plan in exchange.plans:
        entry = _entry(exchange, request, plan, plan.choice.as_piece(), 0)
        entry["finish_reason"] = finish_reason(plan.choice, exchange.replies[plan.index])
        choices.append(entry | _ids(request, plan, plan.choice.ids))
    return {**_head(exchange), "choices": choices, "usage": exchange.usage()}


async def _chunks(
    exchange: Exchange,
    request: CompletionRequest,
    first: tuple[Plan, Piece | None],
    rest: AsyncIterator[tuple[Plan, Piece | None]],
) -> AsyncIterator[dict[str, Any]]:
    head = _head(exchange)
    if request.stream_options.include_usage:
        head["usage"] = None
    offsets = dict.fromkeys(range(len(exchange.plans)), 0)

    def entry(plan: Plan, piece: Piece | None) -> dict[str, Any]:
        if piece is None:
            last = _entry(exchange, request, plan, Piece("", [], [], []), offsets[plan.index])
            last["finish_reason"] = finish_reason(plan.choice, exchange.replies[plan.index])
            return last | _ids(request, plan, [])
        made = _entry(exchange, request, plan, piece, offsets[plan.index])
        offsets[plan.index] += len(piece.text)
        return made | ({"token_ids": piece.ids} if request.return_token_ids else {})

    yield {**head, "choices": [entry(*first)]}
    async for plan, piece in rest:
        yield {**head, "choices": [entry(plan, piece)]}
    if request.stream_options.include_usage:
        yield {**head, "choices": [], "usage": exchange.usage()}


def _entry(exchange: Exchange, request: CompletionRequest, plan: Plan, piece: Piece, offset: int) -> dict[str, Any]:
    tokenizer = exchange.services.renderer.tokenizer
    wanted = request.logprobs is not None and bool(piece.ids)
    return {
        "index": plan.index,
        "text": piece.text,
        "finish_reason": None,
        "logprobs": completion_logprobs(tokenizer, piece, offset) if wanted else None,
    }


def _ids(request: CompletionRequest, plan: Plan, ids: list[int]) -> dict[str, Any]:
    if not request.return_token_ids:
        return {}
    return {
        "prompt_token_ids": plan.choice.prompt_ids,
        "token_ids": ids,
        "weight_versions": version_spans(plan.choice.versions),
    }
