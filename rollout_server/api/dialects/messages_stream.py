"""Replies in Anthropic's dialect: content blocks, whole or as the events of a stream, and errors in its shape.

Pure: steps in, events out. Blocks come in the order in which the model said them; the blocks of a stream, put together,
are those of the whole message.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from rollout_server.api.errors import ApiError
from rollout_server.api.replies.reply import Reasoning, ReplyEvent, ToolCall
from rollout_server.api.turn_run import Finished, Step, Usage

Event = dict[str, Any]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body that Anthropic's SDK makes its exceptions of; `param` and `code` are ours."""
    kind = _ERROR_TYPES.get(error.status, "api_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.param is not None:
        told["param"] = error.param
    if error.code is not None:
        told["code"] = error.code
    return {"type": "error", "error": told}


def content_blocks(parts: Sequence[ReplyEvent], *, omits_thinking: bool = False) -> list[dict[str, Any]]:
    """Of a whole reply; one that says nothing is an empty text. `omits_thinking` leaves its blocks without their text."""
    silent = all(isinstance(part, Reasoning) for part in parts)
    shown = [Reasoning("") if omits_thinking and isinstance(part, Reasoning) else part for part in parts]
    return [_block(part) for part in ([*shown, ""] if silent else shown)]


def _block(part: ReplyEvent) -> dict[str, Any]:
    match part:
        case Reasoning(text):
            return {"type": "thinking", "thinking": text, "signature": ""}
        case ToolCall():  # numbers stay as the model wrote them
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": msgspec.Raw(part.arguments.encode())}
        case _:
            return {"type": "text", "text": part}


def stop_reason(finished: Finished, stop_sequences: Collection[str]) -> tuple[str, str | None]:
    """And the stop sequence that ended the reply."""
    match finished.finish_reason:
        case "length":
            return "max_tokens", None
        case "tool_calls":
            return "tool_use", None
    if finished.stop is not None and finished.stop in stop_sequences:
        return "stop_sequence", finished.stop
    return "end_turn", None


def anthropic_usage(usage: Usage) -> dict[str, Any]:
    """A prompt's tokens are counted apart where they were kept from earlier requests."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


class MessageEvents:
    """Of one reply, from its first block to the end of its last."""

    def __init__(self, *, omits_thinking: bool = False) -> None:
        self._omits_thinking = omits_thinking
        self._blocks = 0
        self._open: str | None = None
        """The type of the block that may grow."""
        self._said_something = False

    def step(self, step: Step) -> list[Event]:
        events = [event for said in step.events for event in self._say(said)]
        if step.finished is not None:
            if not self._said_something:
                events += self._ensure("text", {"type": "text", "text": ""})
            events += self._close()
        return events

    def _say(self, said: ReplyEvent) -> list[Event]:
        match said:
            case ToolCall():
                self._said_something = True
                opened = {"type": "tool_use", "id": said.id, "name": said.name, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": said.arguments}
                return [*self._close(), *self._ensure("tool_use", opened), self._delta(delta), *self._close()]
            case Reasoning(text):
                opened = {"type": "thinking", "thinking": "", "signature": ""}
                delta = {"type": "thinking_delta", "thinking": text}
                return [*self._ensure("thinking", opened), *([] if self._omits_thinking else [self._delta(delta)])]
            case _:
                self._said_something = True
                opened = {"type": "text", "text": ""}
                return [*self._ensure("text", opened), self._delta({"type": "text_delta", "text": said})]

    def _ensure(self, kind: str, opened: dict[str, Any]) -> list[Event]:
        if self._open == kind:
            return []
        events = self._close()
        self._open = kind
        self._blocks += 1
        return [*events, {"type": "content_block_start", "index": self._blocks - 1, "content_block": opened}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._blocks - 1}]
