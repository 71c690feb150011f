"""Mistral's forms: `[TOOL_CALLS]` and then a JSON list of `{"name": …, "arguments": {…}}`, or, since its eleventh
tokenizer, `[TOOL_CALLS]name[ARGS]{…}` for each call (with `[CALL_ID]…` before `[ARGS]` in some, without `[ARGS]` in
others).

All are read wherever they stand; `listed` says which one constrained replies use. A list is taken whole or not at
all. White space around calls is dropped. Ids of calls are nine letters or digits, as Mistral's templates demand.
Nothing marks the end of a call, so `closes` is None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import Vocabulary, calls_anywhere, either, json_value, literal
from rollout_server.api.replies.tool_formats.objects import call_objects
from rollout_server.api.replies.tool_formats.reader import Call, CallReader, Syntax, as_call, parsed
from rollout_server.api.replies.tool_formats.scan import JSON, MAX_NAME, Cursor, Scan, bracketed, name, one_of, spaces
from rollout_server.api.turn import Tool

TRIGGER = "[TOOL_CALLS]"
ARGUMENTS = "[ARGS]"
ID = "[CALL_ID]"

_NAME = re.compile(r"[^\s\[\]{}]*")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Mistral:
    listed: bool = True
    name: str = "mistral"
    special: tuple[str, ...] = (TRIGGER, ARGUMENTS, ID)
    closes: str | None = None

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader:
        return CallReader(reply_id, Syntax(_read, triggers=(TRIGGER,), call_id=_call_id))

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        if self.listed:
            rest = f"/ ?/ {literal('[')} object" + (rf" ({literal(', ')} object)*" if many else "") + f" {literal(']')}"
            frame = calls_anywhere(TRIGGER, rest, "", many=False, free=free, vocabulary=vocabulary)
            return frame + call_objects("object", tools, "arguments")
        frame = calls_anywhere(TRIGGER, "named", "", many=many, free=free, vocabulary=vocabulary)
        calls = []
        arguments = []
        for number, tool in enumerate(tools):
            if not 0 < len(tool.name) <= MAX_NAME or _NAME.fullmatch(tool.name) is None:
                raise tool.name_refusal(
                    "this model's form of calls takes names of 1 to 256 characters without white space and brackets"
                )
            calls.append(f"{literal(tool.name)} {vocabulary.token(ARGUMENTS)} arguments_{number}")
            arguments.append(f"arguments_{number}: {json_value(tool.schema)}\n")
        return frame + f"named: {either(calls)}\n" + "".join(arguments)


def _read(cursor: Cursor) -> Scan[list[Call] | None]:
    if not (yield from one_of(cursor, (TRIGGER,))):
        return None
    yield from spaces(cursor)
    if cursor.text[cursor.at] == "[":
        listed = yield from bracketed(cursor, JSON)
        return None if listed is None else _calls(listed)
    called = yield from name(cursor, _NAME)
    if called is None:
        return None
    if (yield from one_of(cursor, (ID,))) and (yield from name(cursor, _NAME)) is None:
        return None
    yield from one_of(cursor, (ARGUMENTS,))
    yield from spaces(cursor)
    if cursor.text[cursor.at] != "{":
        return None
    text = yield from bracketed(cursor, JSON)
    if text is None:
        return None
    try:
        call = as_call(called, parsed(text))
    except ValueError:
        return None
    return None if call is None else [call]


def _calls(text: str) -> list[Call] | None:
    try:
        values = parsed(text)
    except ValueError:
        return None
    calls = [as_call(v.get("name"), v.get("arguments")) if isinstance(v, dict) else None for v in values]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) else None


def _call_id(digest: bytes) -> str:
    number = int.from_bytes(digest)
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)
