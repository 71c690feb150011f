"""Tool calls in a reply's text, in Hermes's form: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

Fed piece by piece, the parser gives out text as soon as it cannot be part of a call, and a call when it is complete.
What looks like a call and is none stays text: a model must be able to see, and training to punish, what it got wrong.
White space around a call is dropped. How the text is cut into pieces makes no difference. Tokens are none of the
parser's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON of an object."""

    def as_openai(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class HermesParser:
    """`reply_id` gives the calls their ids: the n-th call of a reply has the same one whoever parses it."""

    def __init__(self, reply_id: str) -> None:
        self._reply_id = reply_id
        self._calls = 0
        self._held = ""
        self._after_call = False

    def feed(self, text: str) -> list[str | ToolCall]:
        self._held += text
        events: list[str | ToolCall] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[str | ToolCall]:
        """What was held back, at the end of the reply."""
        rest, self._held = self._held, ""
        if self._after_call:
            rest = rest.lstrip()
        return [rest] if rest else []

    def _step(self, events: list[str | ToolCall]) -> bool:
        """Settle the beginning of the held text; False when more text is needed for that."""
        if self._after_call:
            self._held = self._held.lstrip()
            if not self._held:
                return False
        start = self._held.find(OPEN)
        if start < 0:
            cut = _settled(self._held)
            if cut:
                self._release(self._held[:cut], events)
                self._held = self._held[cut:]
            return False
        end = self._held.find(CLOSE, start)
        before = self._held[:start]
        if end < 0:
            cut = len(before.rstrip())
            if cut:
                self._release(self._held[:cut], events)
                self._held = self._held[cut:]
            return False
        end += len(CLOSE)
        call = parse_call(self._held[start + len(OPEN) : end - len(CLOSE)])
        if call is None:
            self._release(self._held[:end], events)
        else:
            if before.strip():
                self._release(before.rstrip(), events)
            events.append(self._named(*call))
            self._after_call = True
        self._held = self._held[end:]
        return True

    def _named(self, name: str, arguments: str) -> ToolCall:
        digest = blake2b(f"{self._reply_id}/{self._calls}".encode(), digest_size=12)
        self._calls += 1
        return ToolCall(f"call_{digest.hexdigest()}", name, arguments)

    def _release(self, text: str, events: list[str | ToolCall]) -> None:
        self._after_call = False
        events.append(text)


def _settled(text: str) -> int:
    """Length of the beginning that neither starts a call nor is white space that one would swallow."""
    cut = len(text)
    for size in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if OPEN.startswith(text[-size:]):
            cut = len(text) - size
            break
    return len(text[:cut].rstrip())


def parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of the call that the text between the tags makes, None if it is malformed."""
    try:
        value = json.loads(text, parse_constant=_reject)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
        return None
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return None
    arguments = json.dumps(value["arguments"], ensure_ascii=False)
    try:
        (name + arguments).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return None
    return name, arguments


def parse_reply(text: str, reply_id: str) -> tuple[str | None, list[ToolCall]]:
    """Content and tool calls of a whole reply; content is None when there is nothing but calls."""
    parser = HermesParser(reply_id)
    events = parser.feed(text) + parser.finish()
    content = "".join(event for event in events if isinstance(event, str))
    calls = [event for event in events if isinstance(event, ToolCall)]
    return (content or (None if calls else "")), calls


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
