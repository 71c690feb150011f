"""`/v1/responses`: OpenAI's Responses API, streamed or whole, with conversations that go on by `previous_response_id`.

A response that is stored keeps its conversation in messages, so that the next one extends it token for token.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.asking import prefixed
from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.dialects.fields import renamed
from rollout_server.api.dialects.response_items import Item, output_items
from rollout_server.api.dialects.responses_request import ResponsesRequest, parse_responses
from rollout_server.api.dialects.responses_stream import ResponseEvents, is_complete
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import unless_gone
from rollout_server.api.front.wire import json_body, json_response, named_event_stream
from rollout_server.api.replies.logprobs import chat_logprobs
from rollout_server.api.services import Services
from rollout_server.api.turn import Message
from rollout_server.api.turn_run import Finished, Step, TurnRun, Usage, begin

_NAMES_HERE = {
    r"^messages$": "input",
    r"^response_format$": "text.format",
    r"^max_tokens$": "max_output_tokens",
    r"^(tools\.\d+)\.function": r"\1",
}


async def create_response(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_responses(body)
    scope = episode_id or ""
    turn = request.turn(_earlier(services, scope, request.previous_response_id))
    try:
        run = await begin(services, http, episode_id, turn, body, prefixed("resp_"))
    except ApiError as error:
        raise renamed(error, _NAMES_HERE) from error
    messages = turn.messages if request.instructions is None else turn.messages[1:]
    reply = _Reply(services, request, run, scope, messages)
    if not request.stream:
        (finished,) = await run.whole()
        return json_response(reply.whole(finished))
    steps = run.steps(by_token=request.wants_logprobs)
    first = await unless_gone(http, anext(steps))  # errors before it still get a status of their own
    return named_event_stream(reply.events(first, steps), reply.failure)


async def get_response(services: Services, http: Request, episode_id: str | None) -> Response:
    for name in http.query_params:
        if name != "include":
            raise ApiError(400, f"unsupported parameter: {name!r}", param=name, code="unsupported_parameter")
    response_id = http.path_params["response_id"]
    stored = services.responses.get(episode_id or "", response_id)
    if stored is None:
        raise _unknown(response_id, "response_id")
    return json_response(stored.response)


async def delete_response(services: Services, http: Request, episode_id: str | None) -> Response:
    response_id = http.path_params["response_id"]
    if not services.responses.forget(episode_id or "", response_id):
        raise _unknown(response_id, "response_id")
    return json_response({"id": response_id, "object": "response", "deleted": True})


def _earlier(services: Services, scope: str, previous_response_id: str | None) -> list[Message]:
    if previous_response_id is None:
        return []
    stored = services.responses.get(scope, previous_response_id)
    if stored is None:
        raise _unknown(previous_response_id, "previous_response_id")
    return stored.messages


def _unknown(response_id: str, param: str) -> ApiError:
    message = f"no response {response_id[:128]!r} here: it was never stored, or is forgotten"
    return ApiError(404, message, param=param, code="response_not_found")


class _Reply:
    """`messages` are the conversation before the reply, without the instructions."""

    def __init__(
        self, services: Services, request: ResponsesRequest, run: TurnRun, scope: str, messages: list[Message]
    ) -> None:
        self._services, self._request, self._run = services, request, run
        self._scope, self._messages = scope, messages
        self._events = ResponseEvents(run.id, self._logprobs if request.wants_logprobs else None)
        self._head = _head(request, run)

    def whole(self, finished: Finished) -> dict[str, Any]:
        if self._request.wants_logprobs:  # which message a token belongs to shows while they come
            for step in self._run.retold(finished):
                self._events.step(step)
            return self._final(finished, self._events.items)
        complete = is_complete(finished.finish_reason)
        return self._final(finished, output_items(self._run.id, finished.reply.parts, finished=complete))

    def _final(self, finished: Finished, items: list[Item]) -> dict[str, Any]:
        """Stored, if the client wants that."""
        complete = is_complete(finished.finish_reason)
        response = {
            **self._head,
            "status": "completed" if complete else "incomplete",
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()) if complete else None,
            "output": items,
            "usage": _usage(self._run.usage()),
        }
        if self._request.return_token_ids:
            response |= {
                "prompt_token_ids": self._run.prompt_ids,
                "token_ids": finished.choice.ids,
                "weight_versions": version_spans(finished.choice.versions),
            }
        if self._request.stored:
            conversation = [*self._messages, finished.reply.as_message()]
            self._services.responses.keep(self._scope, response, conversation)
        return response

    async def events(self, first: Step, rest: AsyncGenerator[Step, None]) -> AsyncGenerator[dict[str, Any], None]:
        finished = first.finished
        async with aclosing(rest):
            for event in self._events.opening(self._head):
                yield event
            for event in self._events.step(first):
                yield event
            async for step in rest:
                for event in self._events.step(step):
                    yield event
                finished = step.finished
        assert finished is not None
        yield self._events.closing(self._final(finished, self._events.items))

    def failure(self, error: ApiError) -> dict[str, Any]:
        return self._events.failure(self._head, error)

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        return list(chat_logprobs(self._services.renderer.tokenizer, piece)["content"])


def _head(request: ResponsesRequest, run: TurnRun) -> dict[str, Any]:
    """The response while nothing is said yet."""
    reasoning = request.reasoning
    return {
        "id": run.response_id,
        "object": "response",
        "created_at": run.created,
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "model": run.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.stored,
        "temperature": request.temperature,
        "text": {"format": request.text.format or {"type": "text"}, "verbosity": request.text.verbosity or "medium"},
        "tool_choice": request.tool_choice,
        "tools": request.tools,
        "top_logprobs": request.top_logprobs,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
