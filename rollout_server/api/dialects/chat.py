"""`POST /v1/chat/completions`: conversations in, messages and tool calls out, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.asking import prefixed
from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.dialects.chat_request import ChatRequest, parse_chat
from rollout_server.api.exchange import unless_gone
from rollout_server.api.front.wire import event_stream, json_body, json_response
from rollout_server.api.replies.logprobs import chat_logprobs
from rollout_server.api.replies.reply import Reasoning, ReplyEvent, ToolCall
from rollout_server.api.services import Services
from rollout_server.api.turn_run import Finished, Step, TurnRun, Usage, begin


async def chat_completions(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_chat(body)
    run = await begin(services, http, episode_id, request.turn(), body, prefixed("chatcmpl-"))
    writer = _Writer(services, request, run)
    if request.stream:
        steps = run.steps()
        first = await unless_gone(http, anext(steps))  # errors before it still get a status of their own
        return event_stream(writer.chunks(first, steps))
    return json_response(writer.whole(await run.whole()))


def openai_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


class _Writer:
    def __init__(self, services: Services, request: ChatRequest, run: TurnRun) -> None:
        self._tokenizer = services.renderer.tokenizer
        self._request, self._run = request, run
        self._calls = [0] * request.n

    def whole(self, choices: list[Finished]) -> dict[str, Any]:
        whole = {
            **self._head("chat.completion"),
            "choices": [self._choice(finished) for finished in choices],
            "usage": openai_usage(self._run.usage()),
        }
        if self._request.return_token_ids:
            whole["prompt_token_ids"] = self._run.prompt_ids
        return whole

    async def chunks(self, first: Step, rest: AsyncGenerator[Step, None]) -> AsyncGenerator[dict[str, Any], None]:
        """Of each choice its role, then what it says, then how it ended; usage last."""
        request, head = self._request, self._head("chat.completion.chunk")
        options = request.stream_options
        if options.include_usage:
            head["usage"] = None

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {**head, "usage": openai_usage(self._run.usage()), "choices": [choice]}
            return {**head, "choices": [choice]}

        async with aclosing(rest):
            for index in range(request.n):
                opening = chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
                if request.return_token_ids and index == 0:
                    opening["prompt_token_ids"] = self._run.prompt_ids
                yield opening
            for choice in self._deltas(first):
                yield chunk(choice)
            async for step in rest:
                for choice in self._deltas(step):
                    yield chunk(choice)
        if options.include_usage:
            yield {**head, "choices": [], "usage": openai_usage(self._run.usage())}

    def _head(self, kind: str) -> dict[str, Any]:
        run = self._run
        return {"id": run.response_id, "object": kind, "created": run.created, "model": run.model}

    def _choice(self, finished: Finished) -> dict[str, Any]:
        choice, request = finished.choice, self._request
        entry: dict[str, Any] = {
            "index": finished.index,
            "message": {**finished.reply.as_message(), "refusal": None},
            "finish_reason": finished.finish_reason,
            "stop_reason": finished.stop,
            "logprobs": chat_logprobs(self._tokenizer, choice.as_piece()) if request.logprobs else None,
        }
        if request.return_token_ids:
            entry |= {"token_ids": choice.ids, "weight_versions": version_spans(choice.versions)}
        return entry

    def _deltas(self, step: Step) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [self._delta(step.index, event) for event in step.events]
        extras = self._extras(step.piece) if step.piece is not None else {}
        if extras and not deltas:
            deltas = [{}]
        choices = [{"index": step.index, "delta": delta, "finish_reason": None} for delta in deltas]
        if extras:
            choices[0] |= extras
        if step.finished is not None:
            choices.append(self._last(step.finished))
        return choices

    def _last(self, finished: Finished) -> dict[str, Any]:
        last: dict[str, Any] = {
            "index": finished.index,
            "delta": {},
            "finish_reason": finished.finish_reason,
            "stop_reason": finished.stop,
        }
        if self._request.return_token_ids:
            last["weight_versions"] = version_spans(finished.choice.versions)
        return last

    def _delta(self, index: int, event: ReplyEvent) -> dict[str, Any]:
        match event:
            case ToolCall():
                self._calls[index] += 1
                return {"tool_calls": [{"index": self._calls[index] - 1, **event.as_openai()}]}
            case Reasoning():
                return {"reasoning_content": event.text}
            case _:
                return {"content": event}

    def _extras(self, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._request.logprobs:
            extras["logprobs"] = chat_logprobs(self._tokenizer, piece)
        if self._request.return_token_ids:
            extras["token_ids"] = piece.ids
        return extras
