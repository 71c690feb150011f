"""Tools for models whose own chat template has none: told in the system message, called and answered as plain text.

The form is Hermes's, made short because every prompt pays for it: one JSON signature a tool between `<tools>` tags,
calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, results as messages of role `tool`. Where a template has
no system role the tools are told at the head of the first question, where it has no role `tool` the results that stand
together are one message of the user, each between `<tool_response>` tags. The Hermes parser reads calls back.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

_INSTRUCTION = 'Call a tool by replying <tool_call>{"name": NAME, "arguments": {ARG: VALUE}}</tool_call>'
_SIMPLE = {"type", "description", "title", "enum", "default"}


def with_tools(
    messages: list[Message], tools: list[dict[str, Any]], *, system: bool = True, tool_role: bool = True
) -> list[Message]:
    """The same conversation in nothing but roles and text. The flags say which roles the template knows."""
    spoken = [_as_text(message) for message in messages]
    if not tool_role:
        spoken = _results_as_questions(spoken)
    if not tools:
        return spoken
    block = "\n".join([_INSTRUCTION, "<tools>", *(signature(tool) for tool in tools), "</tools>"])
    if spoken and spoken[0]["role"] == "system":
        return [{"role": "system", "content": f"{spoken[0]['content']}\n\n{block}"}, *spoken[1:]]
    if system:
        return [{"role": "system", "content": block}, *spoken]
    if spoken and spoken[0]["role"] == "user":
        return [{"role": "user", "content": f"{block}\n\n{spoken[0]['content']}"}, *spoken[1:]]
    return [{"role": "user", "content": block}, *spoken]


def signature(tool: dict[str, Any]) -> str:
    """A tool in one line of JSON: a parameter that is described by type, choice and words becomes one string.

    Schemas that say what they mean otherwise than by an object's properties are given as they are.
    """
    function = tool["function"]
    line: dict[str, Any] = {"name": function["name"]}
    if function.get("description"):
        line["description"] = function["description"]
    schema = function.get("parameters") or {}
    properties = schema.get("properties") or {}
    names = schema.get("required") or list(properties)
    if isinstance(properties, dict) and isinstance(names, list):
        line["parameters"] = {name: _brief(entry, name in names) for name, entry in properties.items()}
    else:
        line["parameters"] = schema
    return json.dumps(line, ensure_ascii=False)


def _brief(schema: Any, required: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    if not isinstance(schema.get("type"), str) or not _SIMPLE.issuperset(schema):
        return schema if required else {**schema, "optional": True}
    choices = schema.get("enum")
    text = "|".join(str(choice) for choice in choices) if isinstance(choices, list) and choices else schema["type"]
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


def _results_as_questions(messages: list[Message]) -> list[Message]:
    """Results of tools, and the question that follows them, as one message of the user."""
    told: list[Message] = []
    after_result = False
    for message in messages:
        text = message["content"]
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{text}\n</tool_response>"
        if after_result and message["role"] in ("tool", "user"):
            told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{text}"}
        else:
            told.append({"role": "user", "content": text} if is_result else message)
        after_result = message["role"] in ("tool", "user") and (is_result or after_result)
    return told


def parsed_arguments(call: dict[str, Any]) -> Any:
    """A tool call's arguments as a value; a string that is no JSON (or nests too deeply) stays the string that it is."""
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
