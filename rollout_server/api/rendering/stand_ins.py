"""Stand-ins for replies: messages that are rendered in their place, so that the text around a reply can be cut out.

A reply that is plain text is stood in for by two marks; one that calls tools by the same calls with a mark as their
argument, up to the end of the turn. Pure text; what to do with the pieces is left to `render.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.api.rendering.tool_prompt import Message

_SAID = "What a reply says is of no account here."


@dataclass(frozen=True)
class StandIns:
    mark: str
    """A word that no client can know."""
    turn_end: str | None
    """The special token with which the template ends what the assistant says."""

    def place(self, messages: list[Message], replies: Sequence[int], *, with_calls: bool, head: bool) -> list[Message]:
        """The conversation with stand-ins for the messages at these places; with `head` all have a mark at the start."""
        shown = list(messages)
        for number, at in enumerate(replies):
            shown[at] = self._stand_in(messages[at], number, with_calls, needs_start=head or number > 0)
        return shown

    def cut(self, text: str, calling: Sequence[bool], *, head: bool) -> list[str] | None:
        """The texts around the stand-ins; `calling` says of each whether it ends with calls. None if one is missing."""
        pieces = []
        at = 0
        for number, calls in enumerate(calling):
            start, end = text.find(self._start(number), at), text.rfind(self._end(number), at)
            needs_start = head or number > 0 or not calls
            if end < 0 or (start < 0 and needs_start) or not (calls or text.startswith(self._both(number), start)):
                return None
            pieces.append(text[at:start] if head or number > 0 else "")
            at = end + len(self._end(number))
            if calls:
                at = text.find(self.turn_end, at) if self.turn_end is not None else -1
                if at < 0:
                    return None
        return [*pieces, text[at:]]

    def _stand_in(self, message: Message, number: int, with_calls: bool, *, needs_start: bool) -> Message:
        if not with_calls or not message.get("tool_calls"):
            return said(self._both(number))
        content = self._start(number) if needs_start or message.get("content") else ""
        arguments = json.dumps({"x": self._end(number)})
        calls = [
            {**call, "function": {"name": call["function"]["name"], "arguments": arguments}}
            for call in message["tool_calls"]
        ]
        return {**said(content), "tool_calls": calls}

    def _start(self, number: int) -> str:
        return f"{self.mark}{number}A"

    def _end(self, number: int) -> str:
        return f"{self.mark}{number}Z"

    def _both(self, number: int) -> str:
        return self._start(number) + self._end(number)


def without_calls(messages: list[Message], end: int) -> list[Message]:
    """What the assistant said before `end`, as any template takes it."""
    return [said(_SAID) if at < end and m["role"] == "assistant" else m for at, m in enumerate(messages)]


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}
