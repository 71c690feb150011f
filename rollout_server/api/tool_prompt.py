"""Tools for models whose own chat template has none: told in the system message, called and answered as plain text.

The form is Hermes's, made short because every prompt pays for it: one JSON signature a tool between `<tools>` tags,
calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, results as messages of role `tool`. `tool_parsers.py`
reads it back.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

_INSTRUCTION = 'Call a tool by replying <tool_call>{"name": NAME, "arguments": {ARG: VALUE}}</tool_call>'
_SIMPLE = {"type", "description", "title", "enum", "default"}


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The same conversation in nothing but roles and text."""
    spoken = [_as_text(message) for message in messages]
    if not tools:
        return spoken
    block = "\n".join([_INSTRUCTION, "<tools>", *(signature(tool) for tool in tools), "</tools>"])
    if spoken and spoken[0]["role"] == "system":
        return [{"role": "system", "content": f"{spoken[0]['content']}\n\n{block}"}, *spoken[1:]]
    return [{"role": "system", "content": block}, *spoken]


def signature(tool: dict[str, Any]) -> str:
    """A tool in one line of JSON: a parameter that is described by type, choice and words becomes one string."""
    function = tool["function"]
    schema = function.get("parameters") or {}
    required = set(schema.get("required") or schema.get("properties", {}))
    line: dict[str, Any] = {"name": function["name"]}
    if function.get("description"):
        line["description"] = function["description"]
    line["parameters"] = {
        name: _brief(entry, name in required) for name, entry in (schema.get("properties") or {}).items()
    }
    return json.dumps(line, ensure_ascii=False)


def _brief(schema: dict[str, Any], required: bool) -> Any:
    if not isinstance(schema.get("type"), str) or not _SIMPLE.issuperset(schema):
        return schema if required else {**schema, "optional": True}
    choices = schema.get("enum")
    text = "|".join(str(choice) for choice in choices) if choices else schema["type"]
    if not required:
        text += ", optional"
    return f"{text}: {schema['description']}" if schema.get("description") else text


def call_text(name: str, arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def _as_text(message: Message) -> Message:
    content = message.get("content") or ""
    if message.get("tool_calls"):
        calls = [call_text(c["function"]["name"], parsed_arguments(c)) for c in message["tool_calls"]]
        content = "\n".join([content, *calls] if content else calls)
    return {"role": message["role"], "content": content}


def parsed_arguments(call: dict[str, Any]) -> Any:
    """A tool call's arguments as a value; a string that is no JSON stays the string that it is."""
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
