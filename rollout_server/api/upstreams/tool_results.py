"""The results of tools in a request to an upstream, as messages: whoever follows an episode's tools reads only these. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from rollout_server.api.turn import Message
from rollout_server.api.upstreams.provider import Dialect

_OTHER: Message = {"role": "user", "content": ""}


def tool_results(dialect: Dialect, body: dict[str, Any]) -> list[Message]:
    """The conversation with nothing in it but the tool calls of replies and their results."""
    given = body.get({"chat": "messages", "messages": "messages", "responses": "input"}.get(dialect, ""))
    told = _objects(given)
    match dialect:
        case "chat":
            return [_chat_message(message) for message in told]
        case "messages":
            return [message for block in told for message in _blocks(block)]
        case "responses":
            return [_item(item) for item in told]
        case _:
            return []


def _chat_message(message: dict[str, Any]) -> Message:
    match message.get("role"):
        case "assistant":
            return _reply(
                [_made(call, "id", call.get("function"), "arguments") for call in _objects(message.get("tool_calls"))]
            )
        case "tool":
            return _result(message.get("tool_call_id"), message.get("content"))
    return _OTHER


def _blocks(message: dict[str, Any]) -> list[Message]:
    blocks = _objects(message.get("content"))
    if message.get("role") == "assistant":
        return [_reply([_made(block, "id", block, "input") for block in blocks if block.get("type") == "tool_use"])]
    return [
        _result(block.get("tool_use_id"), block.get("content"))
        for block in blocks
        if block.get("type") == "tool_result"
    ]


def _item(item: dict[str, Any]) -> Message:
    match item.get("type", "message"):
        case "function_call_output":
            return _result(item.get("call_id"), item.get("output"))
        case "function_call":
            return _reply([_made(item, "call_id", item, "arguments")])
        case "reasoning":
            return _reply([])
    return _reply([]) if item.get("role") == "assistant" else _OTHER


def _reply(tool_calls: list[dict[str, Any]]) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def _made(call: dict[str, Any], id: str, function: Any, arguments: str) -> dict[str, Any]:
    """A tool call in chat's form; `id` and `arguments` are the names of the fields."""
    said = function if isinstance(function, dict) else {}
    call_id, name = call.get(id), said.get("name")
    return {
        "id": call_id if isinstance(call_id, str) else "",
        "function": {"name": name if isinstance(name, str) else "", "arguments": said.get(arguments)},
    }


def _objects(given: Any) -> list[dict[str, Any]]:
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


def _result(call_id: Any, content: Any) -> Message:
    return {"role": "tool", "tool_call_id": call_id if isinstance(call_id, str) else "", "content": _text_of(content)}


def _text_of(content: Any) -> str:
    """Of a text, or of parts; parts that are no text are written as JSON."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else msgspec.json.encode(content).decode()
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return "".join(
        text if isinstance(text, str) else msgspec.json.encode(part).decode()
        for text, part in zip(texts, content, strict=True)
    )
