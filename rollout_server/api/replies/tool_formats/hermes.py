"""Hermes's form, also Qwen 2.5's and 3's, and ours for models whose template knows no tools (`tool_prompt.py`):
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere in a reply, as often as the model likes.

White space around and inside the tags is dropped. The tags in a JSON string are part of the string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import Vocabulary, calls_anywhere
from rollout_server.api.replies.tool_formats.objects import call_objects
from rollout_server.api.replies.tool_formats.reader import Call, CallReader, Syntax, call_in
from rollout_server.api.replies.tool_formats.scan import JSON, Cursor, Scan, bracketed, one_of, spaces
from rollout_server.api.turn import Tool

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True)
class Hermes:
    name: str = "hermes"
    special: tuple[str, ...] = (OPEN, CLOSE)
    closes: str | None = CLOSE

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader:
        return CallReader(reply_id, Syntax(_read, triggers=(OPEN,)))

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        rest = rf"/\n?/ object /\n?/ {vocabulary.token(CLOSE)}"
        frame = calls_anywhere(OPEN, rest, r"/\n?/", many=many, free=free, vocabulary=vocabulary)
        return frame + call_objects("object", tools, "arguments")


def _read(cursor: Cursor) -> Scan[list[Call] | None]:
    if not (yield from one_of(cursor, (OPEN,))):
        return None
    yield from spaces(cursor)
    if cursor.text[cursor.at] != "{":
        return None
    text = yield from bracketed(cursor, JSON)
    if text is None:
        return None
    yield from spaces(cursor)
    if not (yield from one_of(cursor, (CLOSE,))):
        return None
    call = call_in(text, "arguments")
    return None if call is None else [call]
