"""The events of a streamed response: what a reply says, step by step, as items that open, grow and close.

Pure: steps in, events out. The items that close are those of the whole response (`response_items.output_items`).
Sequence numbers have no gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rollout_server.api.choice import Piece
from rollout_server.api.dialects.response_items import (
    Item,
    call_item,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
)
from rollout_server.api.errors import ApiError
from rollout_server.api.replies.reply import Reasoning, ReplyEvent, ToolCall
from rollout_server.api.turn_run import Step

Event = dict[str, Any]

_ERROR_CODES = {400: "invalid_prompt", 413: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseEvents:
    """`logprobs` are the entries of a piece's tokens, for clients that want them: each delta has those of the tokens that
    came since the last one, the last delta of a message those of a call behind it. Tokens after the last message are in none."""

    def __init__(self, reply_id: str, logprobs: Callable[[Piece], list[dict[str, Any]]] | None = None) -> None:
        self._reply_id = reply_id
        self._logprobs = logprobs
        self._sequence = -1
        self._items = 0
        self._said_something = False
        self._open: _OpenMessage | _OpenReasoning | None = None
        self._pending: list[dict[str, Any]] = []
        self.items: list[Item] = []
        """Those that are done."""

    def opening(self, response: dict[str, Any]) -> list[Event]:
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def step(self, step: Step) -> list[Event]:
        if step.piece is not None and self._logprobs is not None:
            self._pending += self._logprobs(step.piece)
        events = [event for said in step.events for event in self._say(said)]
        if step.finished is not None:
            complete = is_complete(step.finished.finish_reason)
            if complete and not self._said_something:
                events += self._ensure(_OpenMessage)
            events += self._close("completed" if complete else "incomplete")
        return events

    def closing(self, response: dict[str, Any]) -> Event:
        """`response` has its final status."""
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, response: dict[str, Any], error: ApiError) -> Event:
        return self.closing({**response, "status": "failed", "error": response_error(error)})

    def _say(self, said: ReplyEvent) -> list[Event]:
        match said:
            case ToolCall():
                self._said_something = True
                return self._close("completed") + self._call(said)
            case Reasoning(text):
                return self._ensure(_OpenReasoning) + self._delta(text)
            case _:
                self._said_something = True
                return self._ensure(_OpenMessage) + self._delta(said)

    def _call(self, call: ToolCall) -> list[Event]:
        item = call_item(item_id("fc", self._reply_id, self._items), call)
        at = {"item_id": item["id"], "output_index": self._items}
        self._items += 1
        kind = "response.function_call_arguments"
        return [
            self._item("added", at["output_index"], {**item, "arguments": "", "status": "in_progress"}),
            self._event(f"{kind}.delta", **at, delta=call.arguments),
            self._event(f"{kind}.done", **at, name=call.name, arguments=call.arguments),
            self._item("done", at["output_index"], item),
        ]

    def _ensure(self, kind: type[_OpenMessage] | type[_OpenReasoning]) -> list[Event]:
        if isinstance(self._open, kind):
            return []
        events = self._close("completed")
        self._open = opened = kind(item_id(kind.prefix, self._reply_id, self._items), self._items)
        self._items += 1
        return [
            *events,
            self._item("added", opened.index, {**opened.item("in_progress"), "content": []}),
            self._event("response.content_part.added", **opened.place, part=opened.part()),
        ]

    def _delta(self, text: str) -> list[Event]:
        opened = self._open
        assert opened is not None
        opened.text += text
        return [self._event(f"response.{opened.kind}.delta", **opened.place, delta=text, **self._extras(opened))]

    def _close(self, status: str) -> list[Event]:
        opened, self._open = self._open, None
        if opened is None:
            return []
        events = []
        if isinstance(opened, _OpenMessage) and self._pending:  # of tokens without a text, as the end of a turn
            last = self._extras(opened)
            events.append(self._event(f"response.{opened.kind}.delta", **opened.place, delta="", **last))
        extras = {"logprobs": opened.logprobs} if isinstance(opened, _OpenMessage) else {}
        return [
            *events,
            self._event(f"response.{opened.kind}.done", **opened.place, text=opened.text, **extras),
            self._event("response.content_part.done", **opened.place, part=opened.part()),
            self._item("done", opened.index, opened.item(status)),
        ]

    def _extras(self, opened: _OpenMessage | _OpenReasoning) -> dict[str, Any]:
        if isinstance(opened, _OpenReasoning):
            return {}
        entries, self._pending = self._pending, []
        opened.logprobs += entries
        return {"logprobs": entries}

    def _item(self, what: str, index: int, item: dict[str, Any]) -> Event:
        if what == "done":
            self.items.append(item)
        return self._event(f"response.output_item.{what}", output_index=index, item=item)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}


class _OpenMessage:
    prefix, kind = "msg", "output_text"

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index, self.text = name, index, ""
        self.logprobs: list[dict[str, Any]] = []
        self.place = {"item_id": name, "output_index": index, "content_index": 0}

    def part(self) -> dict[str, Any]:
        return text_part(self.text, self.logprobs)

    def item(self, status: str) -> dict[str, Any]:
        return message_item(self.name, self.text, status, self.logprobs)


class _OpenReasoning:
    prefix, kind = "rs", "reasoning_text"

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index, self.text = name, index, ""
        self.place = {"item_id": name, "output_index": index, "content_index": 0}

    def part(self) -> dict[str, Any]:
        return reasoning_part(self.text)

    def item(self, status: str) -> dict[str, Any]:
        return reasoning_item(self.name, self.text, status)


def is_complete(finish_reason: str) -> bool:
    return finish_reason != "length"


def response_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's codes are few; `type` has ours."""
    code = _ERROR_CODES.get(error.status, "server_error")
    return {"code": code, "message": error.message, "param": error.param, "type": error.code}
