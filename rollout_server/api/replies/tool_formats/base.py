"""What a tool format is: how a family of models writes its calls, as a reader of such text and as a grammar of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_server.api.errors import ApiError
from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.lark import Vocabulary
from rollout_server.api.turn import Tool


@dataclass(frozen=True)
class OfferedTool:
    """A tool that a constrained reply may call."""

    name: str
    schema: Mapping[str, Any]
    """Of its arguments; admits objects only. Strict as `schemas.py` makes it."""
    param: str
    """Where the request has it: `tools.3.function`."""

    def refusal(self, why: str) -> ApiError:
        param = f"{self.param}.parameters"
        return ApiError(400, f"invalid value for {param!r}: {why}", param=param, code="unsupported_schema")

    def name_refusal(self, why: str) -> ApiError:
        param = f"{self.param}.name"
        return ApiError(400, f"invalid value for {param!r}: {why}", param=param, code="invalid_value")


class ToolFormat(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def special(self) -> tuple[str, ...]:
        """Texts that must be in the text that a reader gets, also where a tokenizer has them as special tokens."""
        ...

    @property
    def closes(self) -> str | None:
        """A text that completes each call, and stands nowhere else but in strings. None: there is no such text."""
        ...

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader: ...

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        """Lark rules: `calls` is at least one call, or exactly one unless `many`; with `free` it is any text in which
        every call fits (at most one unless `many`, with nothing behind it). Uses the terminal TEXT for such text.

        Raises ApiError 400 that names a tool whose name or parameters the form cannot express.
        """
        ...
