"""Which form of calls a chat template uses: it renders a call, and the form whose reader gets that call back is the
one."""

from __future__ import annotations

import json
import logging
from typing import Any

from rollout_server.api.rendering.template import FAILURES, ChatTemplate
from rollout_server.api.replies.reply import ToolCall
from rollout_server.api.replies.tool_formats.base import ToolFormat
from rollout_server.api.replies.tool_formats.formats import FORMATS
from rollout_server.api.replies.tool_formats.mistral import TRIGGER, Mistral
from rollout_server.api.replies.tool_formats.pythonic import MARKS, Pythonic
from rollout_server.api.turn import Message, Tool

_log = logging.getLogger(__name__)

_NAME = "probe_tool"
_ARGUMENTS = {"probe_key": "probe value"}
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "Probe."}},
            "required": ["probe_key"],
        },
    },
}
_QUESTION: Message = {"role": "user", "content": "Probe?"}


def detect(template: ChatTemplate | None) -> ToolFormat:
    """The form of the template's calls. Hermes's where the template knows no tools, as `tool_prompt.py` then tells
    the model; also, with a warning, where the form is none that is known here."""
    if template is None or not template.takes_tools:
        return FORMATS["hermes"]
    written = _written_call(template)
    for form in FORMATS.values():
        if written is not None and _reads(form, written):
            return _as_written(form, written)
    _log.warning("the chat template's form of tool calls is not known: calls are looked for in Hermes's form")
    return FORMATS["hermes"]


def _written_call(template: ChatTemplate) -> str | None:
    """What the template writes for a call, from where the model's reply begins; None if it refuses the probe."""
    call: dict[str, Any] = {
        "id": "probe0001",
        "type": "function",
        "function": {"name": _NAME, "arguments": json.dumps(_ARGUMENTS)},
    }
    said: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        asked = template.render([_QUESTION], [_TOOL], generation_prompt=True)
        answered = template.render([_QUESTION, said], [_TOOL], generation_prompt=False)
    except FAILURES:
        return None
    return answered[_common(asked, answered) :]


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _reads(form: ToolFormat, text: str) -> bool:
    reader = form.parser("probe", [_TOOL])
    calls = [event for event in reader.feed(text) + reader.finish() if isinstance(event, ToolCall)]
    return [(call.name, json.loads(call.arguments)) for call in calls] == [(_NAME, _ARGUMENTS)]


def _as_written(form: ToolFormat, text: str) -> ToolFormat:
    """The variant of the form that constrained replies are to use."""
    if isinstance(form, Mistral):
        return Mistral(listed=not text[text.index(TRIGGER) + len(TRIGGER) :].lstrip().startswith(_NAME))
    if isinstance(form, Pythonic):
        return Pythonic(next((mark for mark in MARKS if mark in text), None))
    return form
