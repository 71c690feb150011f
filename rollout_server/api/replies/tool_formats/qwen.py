"""The XML form of Qwen3-Coder, Qwen 3.5 and Nemotron:

    <tool_call>
    <function=NAME>
    <parameter=P>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are text without escapes. One newline at each end of a value is the form's, the rest is the value's. A value is
typed by the tool's schema: where that admits another type than string and the text is JSON (or Python's True, False,
None) of that type, it is that value; else it is the text. A value ends at the first `</parameter>` that a parameter
or the end of the function follows, and contains no beginning of another call; other tags in it are part of it. White
space between tags and around calls is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.api.replies.reply import Reader
from rollout_server.api.replies.tool_formats.base import OfferedTool
from rollout_server.api.replies.tool_formats.lark import Vocabulary, calls_anywhere, either, json_value, literal, regex
from rollout_server.api.replies.tool_formats.properties import kind_of, kinds, properties, resolved
from rollout_server.api.replies.tool_formats.reader import Call, CallReader, Syntax, as_call, parsed
from rollout_server.api.replies.tool_formats.scan import MAX_NAME, Cursor, Scan, name, one_of, spaces, until
from rollout_server.api.replies.tool_formats.schemas import SchemaError
from rollout_server.api.turn import Tool

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
FUNCTION = "<function="
END_FUNCTION = "</function>"
PARAMETER = "<parameter="
END_PARAMETER = "</parameter>"

_NAME = re.compile(r"[^<>\n]*")
_WORDS = {"True": True, "False": False, "None": None}
_NO_CLOSING = r"NO_TAGS: /(.|\n)*<\/parameter>/ & ~/(.|\n)*<tool_call>(.|\n)*/" + "\n"
_NEWLINE = literal("\n")
_CLOSING_LINE = literal("\n" + END_PARAMETER)
_BARE = {"type", "title", "description", "default", "examples", "deprecated"}


@dataclass(frozen=True)
class Qwen:
    name: str = "qwen"
    special: tuple[str, ...] = (OPEN, CLOSE)
    closes: str | None = CLOSE

    def parser(self, reply_id: str, tools: list[Tool]) -> Reader:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        return CallReader(reply_id, Syntax(lambda cursor: _read(cursor, schemas), triggers=(OPEN,)))

    def call_grammar(self, tools: Sequence[OfferedTool], *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
        rest = rf"/\n?/ {literal(FUNCTION)} function {literal(END_FUNCTION)} /\n?/ {vocabulary.token(CLOSE)}"
        frame = calls_anywhere(OPEN, rest, r"/\n?/", many=many, free=free, vocabulary=vocabulary)
        functions = [_function(number, tool) for number, tool in enumerate(tools)]
        names = [f"function_{number}" for number in range(len(tools))]
        text = f"text_value[lazy]: NO_TAGS\n{_NO_CLOSING}" if any("text_value" in f for f in functions) else ""
        return frame + f"function: {either(names)}\n" + "".join(functions) + text


def _read(cursor: Cursor, schemas: Mapping[str, Any]) -> Scan[list[Call] | None]:
    if not (yield from one_of(cursor, (OPEN,))):
        return None
    yield from spaces(cursor)
    if not (yield from one_of(cursor, (FUNCTION,))):
        return None
    called = yield from name(cursor, _NAME)
    if called is None or not (yield from one_of(cursor, (">",))):
        return None
    schema = schemas.get(called)
    arguments: dict[str, Any] = {}
    yield from spaces(cursor)
    tag = yield from one_of(cursor, (PARAMETER, END_FUNCTION))
    while tag == PARAMETER:
        key = yield from name(cursor, _NAME)
        if key is None or not (yield from one_of(cursor, (">",))):
            return None
        text, tag = yield from _value(cursor)
        arguments[key] = _typed(text.removeprefix("\n").removesuffix("\n"), _schema_of(key, schema), schema)
    if tag is None:
        return None
    yield from spaces(cursor)
    if not (yield from one_of(cursor, (CLOSE,))):
        return None
    call = as_call(called, arguments)
    return None if call is None else [call]


def _value(cursor: Cursor) -> Scan[tuple[str, str | None]]:
    """A value and the tag behind its end; no tag if a call begins in it."""
    pieces = []
    while True:
        text, tag = yield from until(cursor, (END_PARAMETER, OPEN))
        pieces.append(text)
        gap = yield from spaces(cursor)
        if tag == OPEN:
            if (yield from one_of(cursor, (FUNCTION,))):
                return "", None
        elif after := (yield from one_of(cursor, (PARAMETER, END_FUNCTION))):
            return "".join(pieces), after
        pieces += [tag, gap]


def _schema_of(key: str, schema: Any) -> Any:
    """What the tool says of an argument; text is all that is known of one that it does not mention."""
    if not isinstance(schema, Mapping):
        return {"type": "string"}
    listed = schema.get("properties")
    if isinstance(listed, Mapping) and key in listed:
        return listed[key]
    others = schema.get("additionalProperties")
    return others if isinstance(others, Mapping) else {"type": "string"}


def _typed(text: str, schema: Any, root: Any) -> Any:
    admitted = kinds(schema, root)
    if admitted == {"string"}:
        return text
    word = text.strip()
    try:
        value: Any = _WORDS[word] if word in _WORDS else parsed(text)
    except ValueError:
        return text
    kind = kind_of(value)
    if kind == "number" and "integer" in admitted and value == int(value):
        return value
    return value if kind in admitted - {"string"} else text


def _function(number: int, tool: OfferedTool) -> str:
    """The rules of one tool from its name to the end of its parameters."""
    if not _is_name(tool.name):
        raise tool.name_refusal(
            "this model's form of calls takes names of 1 to 256 characters without <, > and newlines"
        )
    try:
        arguments = properties(tool.schema)
        parts = []
        rules = []
        for place, argument in enumerate(arguments.listed):
            rule = f"argument_{number}_{place}"
            parts.append(rule if argument.required else f"{rule}?")
            rules.append(_parameter(rule, _named(argument.name), argument.schema))
    except SchemaError as error:
        raise tool.refusal(str(error)) from error
    if arguments.others is not None and not arguments.listed:
        parts.append(f"others_{number}*")
        schema = arguments.others if "type" in arguments.others else {"type": "string"}
        rules.append(
            _parameter(
                f"others_{number}", f"{literal(PARAMETER)} /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {literal('>')}", schema
            )
        )
    return f"function_{number}: {literal(f'{tool.name}>')} /\\n?/ {' '.join(parts)}\n" + "".join(rules)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


def _named(name: str) -> str:
    if not _is_name(name):
        raise SchemaError(f"this model's form of calls cannot express a property of the name {name[:64]!r}")
    return literal(f"{PARAMETER}{name}>")


def _parameter(rule: str, tag: str, schema: Mapping[str, Any]) -> str:
    """The rule of a parameter from its tag on, and the terminals that it needs."""
    plain = resolved(schema, schema)
    admitted = kinds(schema)
    chosen = {"const", "enum"} & set(plain)
    terminal = ""
    if "string" not in admitted:
        words = {frozenset({"boolean"}): "/[Tt]rue|[Ff]alse/", frozenset({"null"}): "/null|None/"}
        value = json_value(schema) if chosen else words.get(admitted, json_value(schema))
        value = rf"/\n?/ {value} /\n?/ {literal(END_PARAMETER)}"
    elif chosen and set(plain) <= _BARE | {"const", "enum", "$defs", "definitions"}:
        choices = [plain["const"]] if "const" in plain else plain["enum"]
        if not isinstance(choices, list) or not choices:
            raise SchemaError("'enum' must be a list with something in it")
        texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        if any("<" in text for text in texts):
            raise SchemaError("this model's form of calls cannot express choices that contain '<'")
        value = f"{_NEWLINE} {either([literal(text) for text in texts])} {_CLOSING_LINE}"
    elif admitted == {"string"} and {"minLength", "maxLength", "pattern"} & set(plain):
        value = f"{_NEWLINE} {rule.upper()}"
        terminal = f"{rule.upper()}: ({_limited(plain)}) {_CLOSING_LINE}\n"
    elif _is_free(schema, schema):
        value = "text_value"
    else:
        raise SchemaError("this model's form of calls cannot tell strings from other values that are constrained")
    return f"{rule}: {tag} {value} /\\n?/\n{terminal}"


def _is_free(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether any text is, once typed, a value of this schema: it says nothing beyond types."""
    if not isinstance(schema, Mapping):
        return True
    plain = resolved(schema, root)
    options = plain.get("anyOf") or plain.get("oneOf") or []
    said = set(plain) - _BARE - {"anyOf", "oneOf", "$defs", "definitions", "format"}
    return not said and all(_is_free(option, root) for option in options)


def _limited(schema: Mapping[str, Any]) -> str:
    """What a string of limited length or form is made of, in a terminal; without `<`."""
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if type(low) is not int or type(high) not in (int, type(None)):
        raise SchemaError("the length of a string must be limited by whole numbers")
    regexes = [f"/[^<]{{{low},{'' if high is None else high}}}/"]
    if "pattern" in schema:
        pattern = schema["pattern"]
        if not isinstance(pattern, str):
            raise SchemaError("a pattern must be a string")
        from_start = pattern.startswith("^")
        to_end = pattern.endswith("$") and not pattern.endswith(r"\$")
        middle = pattern[from_start : len(pattern) - to_end]
        if "|" in middle and (from_start or to_end):  # the anchor may be one alternative's
            raise SchemaError("this model's form of calls cannot express a pattern with anchors and alternatives")
        regexes.append(regex(f"{'' if from_start else '(?s:.*)'}(?:{middle}){'' if to_end else '(?s:.*)'}"))
    return " & ".join(regexes)
