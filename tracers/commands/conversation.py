"""What was said in a call, as messages of one form, whichever API it was asked by; and what of it is new.

A message has a role, text, and the tool calls that it makes. Requests are what clients wrote: whatever is not understood is kept
as it is, never left out. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.tool_uses import parsed

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "reasoning_text": "text", "refusal": "refusal"}
"""Kinds of content that are text, and the field that has it."""


class Message(Struct, frozen=True, kw_only=True):
    role: str
    text: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    """Tool calls: name and arguments."""


class Said(NamedTuple):
    """What a request says."""

    messages: int
    """How many it has."""
    news: list[Message]
    """What no earlier call was asked or has answered; all of it if the call continues none of them."""


class Conversations:
    """The conversations of an episode's calls so far, to see what the next call adds to one of them.

    They are a tree of messages, each with a number. Messages that several requests share as one object are read once.
    """

    def __init__(self) -> None:
        self._numbers: dict[Message, int] = {}
        self._next: dict[tuple[int, int], int] = {}
        """From a place in the tree, by the number of what is said there; 0 is where all begin."""
        self._replies: dict[int, list[Message]] = {}
        """By the place that they were given at."""
        self._read: _Read = {}

    def said(self, call: Call) -> Said:
        messages = asked(call.request, self._read)
        told, at = 0, 0
        for place, message in enumerate(messages, 1):
            number = self._numbers.setdefault(message, len(self._numbers))
            at = self._next.setdefault((at, number), len(self._next) + 1)
            replies = self._replies.get(at)
            if replies is not None:
                told = place
                while told < len(messages) and messages[told].role == "reasoning":
                    told += 1
                told = told + 1 if told < len(messages) and messages[told] in replies else place
        self._replies.setdefault(at, []).append(replied(call))
        return Said(len(messages), messages[told:])


def all_said(calls: Iterable[Call]) -> dict[str, Said]:
    """By call id, beside those that began before it."""
    conversations = Conversations()
    ordered = sorted(calls, key=lambda call: (call.started_at, call.index, call.id))
    return {call.id: conversations.said(call) for call in ordered}


def replied(call: Call) -> Message:
    """The call's answer."""
    return _chat({"role": "assistant"} | call.response)[0]


_Read = dict[tuple[int, str], tuple[Any, list[Message]]]
"""Parts of requests and what they say, by the identity of their objects (kept, so that it stays theirs) and the reader."""


def asked(request: dict[str, Any], known: _Read | None = None) -> list[Message]:
    """What the request of a call says, in order. `known` is what was read before, and grows."""
    known = {} if known is None else known
    if "messages" in request:
        return [*_plain("system", request.get("system")), *_each(request["messages"], _chat, known)]
    if "input" in request:
        return [*_plain("system", request.get("instructions")), *_merged(_each(request["input"], _item, known))]
    return _each(request.get("prompt"), _user, known)


def _each(said: Any, read: Callable[[Any], list[Message]], known: _Read) -> list[Message]:
    if not isinstance(said, list):
        return _plain("user", said)
    messages: list[Message] = []
    for part in said:
        entry = known.get(key := (id(part), read.__name__))
        if entry is None:
            entry = known[key] = (part, read(part))
        messages += entry[1]
    return messages


def _plain(role: str, content: Any) -> list[Message]:
    return [Message(role=role, text=_text(content))] if content else []


def _user(text: Any) -> list[Message]:
    return _plain("user", text)


def _chat(message: Any) -> list[Message]:
    """One of Chat Completions or of Anthropic's Messages, where a user's message has the results of tools."""
    if not isinstance(message, dict):
        return _plain("?", message)
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    asked_for = message.get("tool_calls") or []
    made = [
        *(asked_for if isinstance(asked_for, list) else [asked_for]),
        *(part for part in parts if _kind(part) == "tool_use"),
    ]
    results = [Message(role="tool", text=_text(part.get("content"))) for part in parts if _kind(part) == "tool_result"]
    if parts:
        content = [part for part in parts if _kind(part) not in ("tool_use", "tool_result")]
    own = Message(role=str(message.get("role", "?")), text=_text(content), tools=tuple(map(_tool_call, made)))
    return [*results, own] if own.text or own.tools or not results else results


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _tool_call(made: Any) -> tuple[str, str]:
    """Of a chat message, a part of Anthropic's, or an item of Responses."""
    function = made.get("function", made) if isinstance(made, dict) else {}
    if not isinstance(function, dict) or "name" not in function:
        return "?", _json(made)
    return str(function["name"]), _json(parsed(function.get("arguments", function.get("input"))))


def _item(item: Any) -> list[Message]:
    """One of the Responses API."""
    if not isinstance(item, dict):
        return _plain("?", item)
    match item.get("type", "message"):
        case "message":
            return [Message(role=str(item.get("role", "?")), text=_text(item.get("content")))]
        case "function_call":
            return [Message(role="assistant", tools=(_tool_call(item),))]
        case "function_call_output":
            return [Message(role="tool", text=_text(item.get("output")))]
        case "reasoning":
            return _plain("reasoning", item.get("content") or item.get("summary"))
        case kind:
            return [Message(role=str(kind), text=_json(item))]


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Text and the tool calls after it are one reply."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and last.role == message.role == "assistant" and message.tools and not message.text:
            merged[-1] = Message(role="assistant", text=last.text, tools=last.tools + message.tools)
        else:
            merged.append(message)
    return merged


def _text(content: Any) -> str:
    """Of a content's parts, those that are text are joined, and the others are as they are."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        return "".join(map(_part, content))
    return _json(content)


def _part(part: Any) -> str:
    kind = _kind(part)
    if isinstance(kind, str) and kind in {*_TEXTS, "summary_text"}:
        return str(part.get(_TEXTS.get(kind, "text"), ""))
    return part if isinstance(part, str) else _json(part)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
