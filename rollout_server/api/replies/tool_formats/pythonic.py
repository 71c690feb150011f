"""The form of Llama 3.2 and 4, and LFM2: a reply that is a Python list of calls with literals by keyword, `[f(a=1,
b="x"), g()]`, optionally between tokens that mark it, which begin calls also later in a reply.

A list is taken whole or not at all. Literals are strings (without triple quotes), numbers, lists, dictionaries with
strings as keys, and True, False, None, or JSON's words for them. White space and markers around the list are dropped;
nothing marks the end of a call, so `closes` is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import Vocabulary, calls_anywhere, either, json_value, literal
from rollout_server.api.replies.tool_formats.properties import kinds, properties
from rollout_server.api.replies.tool_formats.python_calls import parse_calls
from rollout_server.api.replies.tool_formats.reader import Call, CallReader, Syntax, as_call
from rollout_server.api.replies.tool_formats.scan import PYTHON, Cursor, Scan, bracketed, one_of, spaces
from rollout_server.api.replies.tool_formats.schemas import SchemaError
from rollout_server.api.turn import Tool

MARKS = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}

_FUNCTION = re.compile(r"[\w.-]+")
_KEYWORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Pythonic:
    mark: str | None = None
    """One of MARKS: what constrained replies begin their list with."""
    name: str = "pythonic"
    special: tuple[str, ...] = (*MARKS.keys(), *MARKS.values())
    closes: str | None = None

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader:
        return CallReader(reply_id, Syntax(_read, triggers=tuple(MARKS), at_start="[", after_call="<"))

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        functions = "".join(_function(number, tool) for number, tool in enumerate(tools))
        rules = f"function: {either([f'function_{number}' for number in range(len(tools))])}\n{functions}"
        listed = f'"[" function{" (/, ?/ function)*" if many else ""} "]"'
        if self.mark is not None:
            rest = f"{listed} {vocabulary.token(MARKS[self.mark])}"
            return calls_anywhere(self.mark, rest, "", many=False, free=free, vocabulary=vocabulary) + rules
        text = r"PROSE: TEXT & /\s*([^\[\s](.|\n)*)?/" + "\n" if free else ""
        return f"calls: {listed}" + (" | PROSE?\n" if free else "\n") + text + rules


def _read(cursor: Cursor) -> Scan[list[Call] | None]:
    mark = yield from one_of(cursor, (*MARKS, *MARKS.values(), "["))
    if mark in MARKS.values():  # behind calls: only there it is looked for
        return []
    if mark == "[":
        cursor.at -= 1
    yield from spaces(cursor)
    if cursor.text[cursor.at] != "[":
        return None
    text = yield from bracketed(cursor, PYTHON)
    found = None if text is None else parse_calls(text)
    if found is None:
        return None
    calls = [as_call(name, arguments) for name, arguments in found]
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else None


def _function(number: int, tool: OfferedTool) -> str:
    if _FUNCTION.fullmatch(tool.name) is None:
        raise tool.name_refusal("a function's name must be made of letters, digits, '_', '-' and '.'")
    try:
        arguments = properties(tool.schema)
    except SchemaError as error:
        raise tool.refusal(str(error)) from error
    rules = []
    for place, argument in enumerate(arguments.listed):
        if _KEYWORD.fullmatch(argument.name) is None:
            raise tool.refusal(f"{argument.name[:64]!r} is no name for an argument of a Python function")
        rules.append(f"argument_{number}_{place}: {literal(f'{argument.name}=')} {_value(argument.schema)}\n")
    names = [(f"argument_{number}_{place}", argument.required) for place, argument in enumerate(arguments.listed)]
    first, sequence = _sequence(f"some_{number}", names)
    if arguments.others is not None and not arguments.listed:
        first = f"others_{number}"
        sequence = (
            f"{first}: (other_{number} (/, ?/ other_{number})*)?\n"
            f'other_{number}: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ "=" {_value(arguments.others)}\n'
        )
    return f'function_{number}: {literal(f"{tool.name}(")} {first} ")"\n{sequence}{"".join(rules)}'


def _value(schema: Mapping[str, object]) -> str:
    bare = kinds(schema) == {"boolean"} and not {"const", "enum", "$ref"} & set(schema)
    return "/True|False/" if bare else json_value(schema)


def _sequence(prefix: str, names: list[tuple[str, bool]]) -> tuple[str, str]:
    """Rules for these parts in order, separated by commas, of which some may be missing: `first_n` begins with part n
    or a later one, `later_n` follows some part. Returns what stands for the whole, and the rules."""
    if not names:
        return "", ""
    rules = []
    for place, (part, required) in enumerate(names):
        last = place + 1 == len(names)
        rest = "" if last else f" {prefix}_later_{place + 1}"
        skipped_first = "" if required else ' | ""' if last else f" | {prefix}_first_{place + 1}"
        rules.append(f"{prefix}_first_{place}: {part}{rest}{skipped_first}\n")
        if place:
            skipped = "" if required else ' | ""' if last else f" | {prefix}_later_{place + 1}"
            rules.append(f"{prefix}_later_{place}: /, ?/ {part}{rest}{skipped}\n")
    return f"{prefix}_first_0", "".join(rules)
