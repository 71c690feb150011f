"""The forms of tool calls by name."""

from __future__ import annotations

from rollout_server.api.replies.tool_formats.base import ToolFormat
from rollout_server.api.replies.tool_formats.hermes import Hermes
from rollout_server.api.replies.tool_formats.llama3_json import Llama3Json
from rollout_server.api.replies.tool_formats.mistral import Mistral
from rollout_server.api.replies.tool_formats.pythonic import Pythonic
from rollout_server.api.replies.tool_formats.qwen import Qwen

_ALL: tuple[ToolFormat, ...] = (Hermes(), Llama3Json(), Qwen(), Mistral(), Pythonic())

FORMATS: dict[str, ToolFormat] = {form.name: form for form in _ALL}
