"""What an upstream said, as it is recorded: the message, how it ended, its usage. In every dialect, whole or streamed.

Pure. A streamed answer is put together again as the body that the whole one would have been (`MERGERS`), and bodies are read in
one way (`heard`). Nothing here can fail for what a provider sends: what is not of its API is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from rollout_server.api.turn import Message
from rollout_server.api.upstreams.provider import Dialect

Body = dict[str, Any]

END = b"[DONE]"
_FINISHES = {"length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
_STOP_REASONS = {"max_tokens": "length", "tool_use": "tool_calls"}


@dataclass(frozen=True)
class Said:
    """One choice."""

    message: Message
    finish_reason: str
    """`stop`, `length`, `tool_calls` or `abort`."""


@dataclass(frozen=True)
class Heard:
    response_id: str
    model: str
    """As the provider names itself; "" if it does not."""
    choices: list[Said]
    """At least one."""
    usage: Body | None


class Merger(Protocol):
    """Puts a stream together."""

    ended: bool
    """Whether the client may take the answer to be whole now."""

    def add(self, event: Body) -> None: ...

    def body(self) -> Body: ...


class EventReader:
    """The data of server-sent events, out of bytes however they are cut."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Of the events that are complete now."""
        *lines, rest = chunk.split(b"\n")
        found = []
        for line in lines:
            whole = bytes(self._line + line).removesuffix(b"\r")
            self._line.clear()
            if whole.startswith(b"data:"):
                self._data.append(whole[5:].removeprefix(b" "))
            elif not whole and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        self._line += rest
        return found


class StreamedAnswer:
    """An answer while it comes."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect: Dialect = dialect
        self._events = EventReader()
        self._merger = MERGERS[dialect]()
        self.ended = False
        """Whether the client may take the answer to be whole now: its record must be durable by then."""

    def feed(self, chunk: bytes) -> None:
        for data in self._events.feed(chunk):
            event = _object(data)
            if event is not None:
                self._merger.add(event)
            self.ended = self.ended or data.strip() == END or self._merger.ended

    def heard(self) -> Heard:
        return heard(self._dialect, self._merger.body())


def heard(dialect: Dialect, body: Body) -> Heard:
    choices, usage = _READERS[dialect](body), body.get("usage")
    return Heard(
        response_id=_text(body, "id"),
        model=_text(body, "model"),
        choices=choices or [Said({"role": "assistant", "content": None}, "abort")],
        usage=usage if isinstance(usage, dict) else None,
    )


def _chat(body: Body) -> list[Said]:
    return [
        Said(_chat_message(_dict(choice, "message")), _finish(choice.get("finish_reason")))
        for choice in _dicts(body, "choices")
    ]


def _chat_message(told: Body) -> Message:
    message: Message = {"role": "assistant", "content": told.get("content")}
    thought = told.get("reasoning_content") or told.get("reasoning")
    calls = [
        _tool_call(
            _text(call, "id"), _text(_dict(call, "function"), "name"), _text(_dict(call, "function"), "arguments")
        )
        for call in _dicts(told, "tool_calls")
    ]
    refusal = told.get("refusal")
    return message | _some(reasoning_content=thought, tool_calls=calls, refusal=refusal)


def _completions(body: Body) -> list[Said]:
    return [
        Said({"role": "assistant", "content": choice.get("text")}, _finish(choice.get("finish_reason")))
        for choice in _dicts(body, "choices")
    ]


def _responses(body: Body) -> list[Said]:
    texts, thoughts, calls = [], [], []
    for item in _dicts(body, "output"):
        match item.get("type"):
            case "message":
                texts += [_text(part, "text") or _text(part, "refusal") for part in _dicts(item, "content")]
            case "reasoning":
                thoughts += [_text(part, "text") for part in [*_dicts(item, "content"), *_dicts(item, "summary")]]
            case "function_call":
                calls.append(_tool_call(_text(item, "call_id"), _text(item, "name"), _text(item, "arguments")))
    finish = {"completed": "tool_calls" if calls else "stop", "incomplete": "length"}.get(
        _text(body, "status"), "abort"
    )
    message: Message = {"role": "assistant", "content": "".join(texts) or None}
    return [Said(message | _some(reasoning_content="".join(thoughts), tool_calls=calls), finish)]


def _messages(body: Body) -> list[Said]:
    texts, thoughts, calls = [], [], []
    for block in _dicts(body, "content"):
        match block.get("type"):
            case "text":
                texts.append(_text(block, "text"))
            case "thinking":
                thoughts.append(_text(block, "thinking"))
            case "tool_use":
                arguments = msgspec.json.encode(block.get("input", {})).decode()
                calls.append(_tool_call(_text(block, "id"), _text(block, "name"), arguments))
    reason = body.get("stop_reason")
    finish = _STOP_REASONS.get(reason, "stop") if isinstance(reason, str) else "abort"
    message: Message = {"role": "assistant", "content": "".join(texts) or None}
    return [Said(message | _some(reasoning_content="".join(thoughts), tool_calls=calls), finish)]


_READERS: dict[Dialect, Callable[[Body], list[Said]]] = {
    "chat": _chat,
    "completions": _completions,
    "responses": _responses,
    "messages": _messages,
}


class _Choices:
    """Of chat and of completions: chunks with what is new of each choice. `[DONE]` ends them."""

    ended = False

    def __init__(self) -> None:
        self._head: Body = {}
        self._choices: dict[int, Body] = {}

    def add(self, event: Body) -> None:
        self._head |= {key: value for key, value in event.items() if key != "choices" and value is not None}
        for part in _dicts(event, "choices"):
            choice = self._choices.setdefault(
                _number(part, "index"), {"message": {}, "finish_reason": None, "text": ""}
            )
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            choice["text"] += _text(part, "text")
            self._add_delta(choice["message"], _dict(part, "delta"))

    def body(self) -> Body:
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            message = choice["message"]
            if isinstance(message.get("tool_calls"), dict):
                message["tool_calls"] = [message["tool_calls"][index] for index in sorted(message["tool_calls"])]
        return {**self._head, "choices": choices}

    def _add_delta(self, message: Body, delta: Body) -> None:
        for name in ("content", "refusal", "reasoning_content", "reasoning"):
            if text := _text(delta, name):
                message[name] = _text(message, name) + text
        for number, part in enumerate(_dicts(delta, "tool_calls")):
            calls = message.setdefault("tool_calls", {})
            empty = {"id": "", "function": {"name": "", "arguments": ""}}
            call = calls.setdefault(_number(part, "index", number), empty)
            call["id"] = call["id"] or _text(part, "id")
            for name in ("name", "arguments"):
                call["function"][name] += _text(_dict(part, "function"), name)


_RESPONSE_DELTAS = {
    "response.output_text.delta": "output_text",
    "response.refusal.delta": "refusal",
    "response.reasoning_text.delta": "reasoning_text",
    "response.reasoning_summary_text.delta": "summary_text",
    "response.function_call_arguments.delta": "arguments",
}


class _ResponseEvents:
    """The last event has the whole response; until then it is its items as far as they have come."""

    def __init__(self) -> None:
        self.ended = False
        self._response: Body = {}
        self._items: dict[int, Body] = {}
        self._deltas: dict[int, dict[str, list[str]]] = {}
        """Of the items that are not done, by what they are of."""

    def add(self, event: Body) -> None:
        kind = _text(event, "type")
        if "response" in event:
            self._response = _dict(event, "response")
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.ended = True
        at = _number(event, "output_index")
        if kind in ("response.output_item.added", "response.output_item.done"):
            self._items[at] = _dict(event, "item")
            self._deltas.pop(at, None)
        elif kind in _RESPONSE_DELTAS:
            self._deltas.setdefault(at, {}).setdefault(_RESPONSE_DELTAS[kind], []).append(_text(event, "delta"))

    def body(self) -> Body:
        if self.ended and _dicts(self._response, "output"):
            return self._response
        return {**self._response, "output": [self._item(at) for at in sorted({*self._items, *self._deltas})]}

    def _item(self, at: int) -> Body:
        said = {of: "".join(parts) for of, parts in self._deltas.get(at, {}).items()}
        item = self._items.get(at) or {
            "type": "reasoning" if said.keys() <= {"reasoning_text", "summary_text"} else "message"
        }
        if not said:
            return item
        if "arguments" in said:
            return {**item, "arguments": said["arguments"]}
        return {**item, "content": [{"type": of, "text": text} for of, text in said.items()]}


class _MessageEvents:
    def __init__(self) -> None:
        self.ended = False
        self._message: Body = {}
        self._blocks: dict[int, Body] = {}

    def add(self, event: Body) -> None:
        at = _number(event, "index")
        match event.get("type"):
            case "message_start":
                self._message = dict(_dict(event, "message"))
            case "content_block_start":
                self._blocks[at] = dict(_dict(event, "content_block"))
            case "content_block_delta":
                block, delta = self._blocks.setdefault(at, {"type": "text"}), _dict(event, "delta")
                for name in ("text", "thinking", "partial_json"):
                    if name in delta:
                        block[name] = _text(block, name) + _text(delta, name)
            case "message_delta":
                usage = _dict(self._message, "usage") | _dict(event, "usage")
                self._message |= _dict(event, "delta") | {"usage": usage}
            case "message_stop":
                self.ended = True

    def body(self) -> Body:
        blocks = [self._blocks[at] for at in sorted(self._blocks)]
        for block in blocks:
            if "partial_json" in block:
                partial = block.pop("partial_json")
                given = _object(partial.encode("utf-8", "replace"))
                if partial:  # a tool without arguments: what the block began with
                    block["input"] = given if given is not None else partial
        return {**self._message, "content": blocks}


MERGERS: dict[Dialect, Callable[[], Merger]] = {
    "chat": _Choices,
    "completions": _Choices,
    "responses": _ResponseEvents,
    "messages": _MessageEvents,
}


def _tool_call(call_id: str, name: str, arguments: str) -> Body:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _finish(reason: Any) -> str:
    return _FINISHES.get(reason, "stop") if isinstance(reason, str) else "abort"


def _some(**fields: Any) -> Body:
    return {name: value for name, value in fields.items() if value}


def _object(data: bytes) -> Body | None:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(body: Body, name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else ""


def _number(body: Body, name: str, otherwise: int = 0) -> int:
    value = body.get(name)
    return value if isinstance(value, int) else otherwise


def _dict(body: Body, name: str) -> Body:
    value = body.get(name)
    return value if isinstance(value, dict) else {}


def _dicts(body: Body, name: str) -> list[Body]:
    value = body.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
