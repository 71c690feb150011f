"""Items of the Responses API: what clients send becomes messages, what the model says becomes items.

One reply is several items there (reasoning, messages, function calls) and one message in here: neighbouring items of
the assistant's are put together again, so that a conversation whose items come back is the one that was remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rollout_server.api.dialects.fields import Lenient, parse, unsupported
from rollout_server.api.replies.reply import Reasoning, ReplyEvent, ToolCall
from rollout_server.api.turn import Message

Item = dict[str, Any]

_TEXTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of message content that are text, and the field that has it."""
_TEXTS_KNOWN = ", ".join(map(repr, _TEXTS))


class _Message(Lenient):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]


class _FunctionCall(Lenient):
    call_id: str
    name: str
    arguments: str


class _FunctionCallOutput(Lenient):
    call_id: str
    output: str | list[dict[str, Any]]


class _ReasoningText(Lenient):
    type: Literal["reasoning_text"]
    text: str


class _Reasoning(Lenient):
    content: list[_ReasoningText] = []
    """A summary is not what the model said, and is left out."""


def messages_of(items: Sequence[Item]) -> list[Message]:
    """Raises ApiError 400 that names the item at fault."""
    messages: list[Message] = []
    text_may_follow = False  # two messages in a row are two turns; one reply's texts have calls between them
    for number, item in enumerate(items):
        at = f"input.{number}"
        match item.get("type", "message"):
            case "message":
                said = parse(_Message, item, at=at)
                content = text_of(said.content, f"{at}.content")
                if said.role == "assistant" and text_may_follow:
                    _say(messages, content)
                else:
                    role = "system" if said.role == "developer" else said.role
                    messages.append({"role": role, "content": content})
                text_may_follow = False
            case "function_call":
                call = parse(_FunctionCall, item, at=at)
                turn = _reply_in_progress(messages)
                turn["content"] = turn["content"] or None
                turn.setdefault("tool_calls", []).append(ToolCall(call.call_id, call.name, call.arguments).as_openai())
                text_may_follow = True
            case "function_call_output":
                result = parse(_FunctionCallOutput, item, at=at)
                content = text_of(result.output, f"{at}.output")
                messages.append({"role": "tool", "tool_call_id": result.call_id, "content": content})
                text_may_follow = False
            case "reasoning":
                thought = "".join(part.text for part in parse(_Reasoning, item, at=at).content)
                if thought:
                    turn = _reply_in_progress(messages)
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
                    text_may_follow = True
            case other:
                raise unsupported(f"{at}.type", other)
    return messages


def text_of(content: str | list[dict[str, Any]], at: str) -> str:
    """Raises ApiError 400 for parts that are no text."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            where = f"{at}.{number}"
            raise unsupported(where, kind, f"{_TEXTS_KNOWN} with their text")
        texts.append(text)
    return "".join(texts)


def _reply_in_progress(messages: list[Message]) -> Message:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _say(messages: list[Message], text: str) -> None:
    turn = _reply_in_progress(messages)
    turn["content"] = ((turn["content"] or "") + text) or (None if turn.get("tool_calls") else "")


def output_items(reply_id: str, parts: Sequence[ReplyEvent], *, finished: bool) -> list[Item]:
    """Items of a whole reply, without log-probs; the last one is `incomplete` unless the reply is `finished`.

    A finished reply that says nothing is an empty message.
    """
    silent = all(isinstance(part, Reasoning) for part in parts)
    said = [*parts, ""] if finished and silent else parts
    items: list[Item] = []
    for number, part in enumerate(said):
        status = "completed" if finished or number < len(said) - 1 else "incomplete"
        match part:
            case Reasoning(text):
                items.append(reasoning_item(item_id("rs", reply_id, number), text, status))
            case ToolCall():
                items.append(call_item(item_id("fc", reply_id, number), part))
            case str():
                items.append(message_item(item_id("msg", reply_id, number), part, status))
    return items


def item_id(prefix: str, reply_id: str, number: int) -> str:
    return f"{prefix}_{reply_id}_{number}"


def reasoning_item(name: str, text: str, status: str) -> Item:
    return {"id": name, "type": "reasoning", "summary": [], "content": [reasoning_part(text)], "status": status}


def message_item(name: str, text: str, status: str, logprobs: list[dict[str, Any]] | None = None) -> Item:
    part = text_part(text, logprobs)
    return {"id": name, "type": "message", "role": "assistant", "content": [part], "status": status}


def call_item(name: str, call: ToolCall) -> Item:
    return {
        "id": name,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def text_part(text: str, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
