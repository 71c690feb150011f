"""What a reply says: text, reasoning, tool calls. A reader finds them in sampled text, however it is cut into pieces.

Tokens are none of a reader's business: whatever it makes of the text, record and training keep what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from rollout_server.api.turn import Message


@dataclass(frozen=True)
class Reasoning:
    """A part of what the model said to itself before it answered."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON of an object."""

    def as_openai(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


ReplyEvent = str | Reasoning | ToolCall
"""A piece of text, a piece of reasoning, or a complete call."""


class Reader(Protocol):
    """Turns text, fed piece by piece, into events; the same ones in total whatever the pieces."""

    def feed(self, text: str) -> list[ReplyEvent]: ...

    def finish(self) -> list[ReplyEvent]:
        """What was held back, at the end of the reply."""
        ...


@dataclass(frozen=True)
class Reply:
    """A whole reply. `content` is None when there is nothing but calls."""

    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    parts: tuple[ReplyEvent, ...] = field(default=(), compare=False)
    """The same in the order in which it was said, neighbours of a kind joined."""

    def as_message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_openai() for call in self.tool_calls]
        return message


class PlainReader:
    """Everything is text."""

    def feed(self, text: str) -> list[ReplyEvent]:
        return [text] if text else []

    def finish(self) -> list[ReplyEvent]:
        return []


def gather(events: Iterable[ReplyEvent]) -> Reply:
    """The reply that these events make up."""
    parts: list[ReplyEvent] = []
    for kind, run in groupby(events, type):
        if kind is str:
            parts.append("".join(str(event) for event in run))
        elif kind is Reasoning:
            parts.append(Reasoning("".join(event.text for event in run if isinstance(event, Reasoning))))
        else:
            parts += run
    content = "".join(part for part in parts if isinstance(part, str))
    calls = tuple(part for part in parts if isinstance(part, ToolCall))
    reasoning = [part.text for part in parts if isinstance(part, Reasoning)]
    return Reply(content or (None if calls else ""), calls, "".join(reasoning) if reasoning else None, tuple(parts))
