"""The grammar of calls that are JSON objects: `{"name": …, "arguments": {…}}`, whatever the second key is called."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import either, json_value
from rollout_server.api.replies.tool_formats.schemas import moved


def call_objects(rule: str, tools: Sequence[OfferedTool], key: str) -> str:
    """A rule that matches one call of one of the tools.

    Each call is a schema of its own, not a text with a schema in it: llguidance reads alternatives together only if
    all of them are schemas, and a constraint of the client's may begin like a call.
    """
    calls = []
    for tool in tools:
        members = {"name": {"const": tool.name}, key: moved(tool.schema, f"/properties/{key}")}
        call = {"type": "object", "properties": members, "required": ["name", key], "additionalProperties": False}
        calls.append(json_value(call))
    rules = [f"{rule}_{number}: {call}\n" for number, call in enumerate(calls)]
    return f"{rule}: {either([f'{rule}_{number}' for number in range(len(calls))])}\n{''.join(rules)}"
