"""Llama 3's form: a reply that begins with `{"name": …, "parameters": {…}}`, several separated by `;` or white space,
each run of them optionally behind `<|python_tag|>`, which begins calls also later in a reply.

`arguments` is taken for `parameters`. White space and the separators between calls are dropped; a JSON object that is
no call is text, and so is all that follows it. Nothing marks the end of a call, so `closes` is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import Vocabulary
from rollout_server.api.replies.tool_formats.objects import call_objects
from rollout_server.api.replies.tool_formats.reader import Call, CallReader, Syntax, call_in
from rollout_server.api.replies.tool_formats.scan import JSON, Cursor, Scan, bracketed, one_of, spaces
from rollout_server.api.turn import Tool

TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Llama3Json:
    name: str = "llama3_json"
    special: tuple[str, ...] = (TAG,)
    closes: str | None = None

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader:
        return CallReader(reply_id, Syntax(_read, triggers=(TAG,), at_start="{", after_call="{;"))

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        tag = f"{vocabulary.token(TAG)}? " if TAG in vocabulary.special else ""
        run = f"{tag}object" + (r" (/; ?|\n/ object)*" if many else "")
        text = r"PROSE: TEXT & /\s*([^{\s](.|\n)*)?/" + "\n" if free else ""
        rule = f"calls: {run}" + (" | PROSE?\n" if free else "\n")
        return rule + text + call_objects("object", tools, "parameters")


def _read(cursor: Cursor) -> Scan[list[Call] | None]:
    if (yield from one_of(cursor, (TAG, ";", "{"))) == "{":
        cursor.at -= 1
    yield from spaces(cursor)
    if cursor.text[cursor.at] != "{":
        return None
    text = yield from bracketed(cursor, JSON)
    call = None if text is None else call_in(text, "parameters", "arguments")
    return None if call is None else [call]
