"""How families of models write tool calls: one module a form, `FORMATS` names them, `detect` finds the one of a
template."""

from __future__ import annotations

from rollout_server.api.replies.tool_formats.base import OfferedTool, ToolFormat
from rollout_server.api.replies.tool_formats.detection import detect
from rollout_server.api.replies.tool_formats.formats import FORMATS

__all__ = ["FORMATS", "OfferedTool", "ToolFormat", "detect"]
