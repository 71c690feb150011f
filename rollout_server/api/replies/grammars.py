"""What the text of a reply must be, as a grammar for llguidance: constraints of the client, calls of tools, reasoning
before both.

Pure text building: `turn_grammar` refuses what no form of calls can express, `require_servable` asks whoever compiles
grammars and names the field that is at fault. The rules of calls are the tool formats' own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rollout_server.api.errors import ApiError
from rollout_server.api.replies.reasoning import ReasoningFormat, may_reason
from rollout_server.api.replies.tool_formats.base import OfferedTool, ToolFormat
from rollout_server.api.replies.tool_formats.lark import Vocabulary, either, json_value, literal, regex
from rollout_server.api.replies.tool_formats.schemas import SchemaError, arguments_schema, check_depth, strict
from rollout_server.api.turn import Constraint, JsonSchema, OneOf, Regex, Turn
from rollout_server.manager.masking import GrammarError

_ANY_TEXT = r"/(.|\n)*/"
_ANY_OBJECT = {"type": "object"}


def turn_grammar(
    turn: Turn,
    tool_format: ToolFormat,
    reasoning: ReasoningFormat | None,
    *,
    reasoning_opened: bool,
    special_ids: Mapping[str, int] | None = None,
) -> str | None:
    """The grammar that the reply must fit, None when nothing constrains it.

    A reply that must call is nothing but calls; with a constraint and tools that may be called it is calls or what
    fits; with strict tools, a choice of tools, or one call only (in formats where no text ends a call) it is text in
    which calls fit. Reasoning may come first where the model reasons, and must end if the prompt ends inside it.
    `special_ids` are the tokenizer's special tokens: texts of formats that are among them are matched as tokens.

    Raises ApiError 400 that names the field at fault.
    """
    vocabulary = Vocabulary(special_ids or {})
    body = _body(turn, tool_format, vocabulary)
    if body is None:
        return None
    if reasoning is None or not (reasoning_opened or may_reason(turn.template_options)):
        return f"start: body\nTEXT: {_ANY_TEXT}\n{body}"
    thought = vocabulary.through("thought", "THOUGHT", reasoning.close)
    answer = r"/[ \n]{0,2}/ body"
    text = _ANY_TEXT
    if reasoning_opened:
        start = f"thought {answer}"
    else:
        start = f"body | {vocabulary.token(reasoning.open)} thought {answer}"
        if reasoning.open not in vocabulary.special:  # what begins so is reasoning, no other text
            text += rf" & ~/\s*{_escaped(reasoning.open)}(.|\n)*/"
    return f"start: {start}\n{thought}THOUGHT: {_ANY_TEXT}\nTEXT: {text}\n{body}"


def constraint_grammar(constraint: Constraint, param: str) -> str:
    """The grammar of text that is nothing but what the constraint, read from the field `param`, asks for.

    Raises ApiError 400.
    """
    return f"start: {_constrained(constraint, param)}\n"


async def require_servable(turn: Turn, grammar: str, compiled: Callable[[str], Awaitable[object]]) -> None:
    """`compiled` raises GrammarError for a grammar that cannot be served.

    Raises ApiError 400 with the field whose part of the grammar is at fault.
    """
    try:
        await compiled(grammar)
    except GrammarError as error:
        for param, part in _parts(turn):
            try:
                await compiled(part)
            except GrammarError as reason:
                raise unservable(param, str(reason)) from reason
        why = f"the constraints of this request cannot be served together: {_brief(str(error))}"
        raise ApiError(400, why, code="unsupported_schema") from error


def _body(turn: Turn, tool_format: ToolFormat, vocabulary: Vocabulary) -> str | None:
    """Rules for `body`, the reply without its reasoning; they use TEXT."""
    mode, many = turn.tool_choice.mode, turn.parallel_tool_calls
    if mode == "required":
        tools = _offered(turn, all_strict=True)
        return "body: calls\n" + tool_format.call_grammar(tools, many=many, free=False, vocabulary=vocabulary)
    if turn.constraint is not None:
        rules = f"constrained: {_constrained(turn.constraint, turn.constraint_param)}\n"
        if not turn.reads_tools:
            return f"body: constrained\n{rules}"
        tools = _offered(turn, all_strict=False)
        calls = tool_format.call_grammar(tools, many=many, free=False, vocabulary=vocabulary)
        return f"body: calls | constrained\n{rules}{calls}"
    if not turn.reads_tools:
        return None
    is_strict = any(tool["function"].get("strict") for tool in turn.tools)
    if not (is_strict or turn.tool_choice.names or (not many and tool_format.closes is None)):
        return None
    tools = _offered(turn, all_strict=False)
    return "body: calls\n" + tool_format.call_grammar(tools, many=many, free=True, vocabulary=vocabulary)


def _offered(turn: Turn, *, all_strict: bool) -> list[OfferedTool]:
    """The tools that may be called; those that need not be called as their schema says take any object."""
    names = set(turn.tool_choice.names)
    known = {tool["function"]["name"] for tool in turn.tools}
    if unknown := names - known:
        raise ApiError(
            400,
            f"tool_choice names {min(unknown)[:64]!r}, which is not among the tools",
            param="tool_choice",
            code="invalid_value",
        )
    tools = []
    for place, tool in enumerate(turn.tools):
        function, param = tool["function"], f"tools.{place}.function"
        if names and function["name"] not in names:
            continue
        offered = OfferedTool(function["name"], _ANY_OBJECT, param)
        if all_strict or function.get("strict"):
            offered = replace(offered, schema=_arguments(offered, function.get("parameters")))
        tools.append(offered)
    if not tools:
        raise ApiError(
            400, "tool_choice requires a call, and there are no tools", param="tool_choice", code="invalid_value"
        )
    return tools


def _arguments(tool: OfferedTool, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return arguments_schema(parameters)
    except SchemaError as error:
        raise tool.refusal(str(error)) from error


def _constrained(constraint: Constraint, param: str) -> str:
    match constraint:
        case JsonSchema(schema=bool() as anything):
            if not anything:
                raise unservable(param, "no reply fits the schema false")
            return json_value({})
        case JsonSchema(schema=dict() as schema):
            try:
                check_depth(schema)
            except SchemaError as error:
                raise unservable(param, str(error)) from error
            return json_value(strict(schema))
        case JsonSchema():
            raise unservable(param, "a schema is an object or a boolean")
        case Regex(pattern=pattern):
            return regex(pattern)
        case OneOf(texts=texts):
            if not texts:
                raise unservable(param, "there is nothing to choose from")
            return either([literal(text) for text in texts])


def _parts(turn: Turn) -> Iterator[tuple[str, str]]:
    """The parts of a turn that may be at fault, each as a grammar of its own."""
    if turn.constraint is not None:
        yield turn.constraint_param, constraint_grammar(turn.constraint, turn.constraint_param)
    for tool in _offered(turn, all_strict=True) if turn.tools else []:
        yield f"{tool.param}.parameters", f"start: {json_value(tool.schema)}\n"


def unservable(param: str, why: str) -> ApiError:
    """What was asked for in the field `param` cannot be a grammar."""
    return ApiError(400, f"invalid value for {param!r}: {_brief(why)}", param=param, code="unsupported_schema")


def _brief(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "it cannot be compiled"
    return line if len(line) <= 300 else f"{line[:297]}..."


def _escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$/" else char for char in text)
