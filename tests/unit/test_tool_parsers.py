"""The readers of tool calls, form by form: what is a call becomes one, everything else stays text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rollout_server.api.rendering.tool_prompt import call_text
from rollout_server.api.replies.reply import Reply, gather
from rollout_server.api.replies.tool_formats import FORMATS
from rollout_server.api.turn import Tool

GOOD = call_text("add", {"a": 1, "b": [2, "é"]})


def read(form: str, text: str, tools: Sequence[Tool] = ()) -> Reply:
    reader = FORMATS[form].parser("r", list(tools))
    return gather([*reader.feed(text), *reader.finish()])


def calls(reply: Reply) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]


def tool(name: str, **properties: Any) -> Tool:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def test_a_call_alone_has_no_content() -> None:
    reply = read("hermes", f" {GOOD}\n")
    assert reply.content is None
    assert calls(reply) == [("add", {"a": 1, "b": [2, "é"]})]


def test_text_around_calls_is_content_and_ids_depend_on_reply_and_order_only() -> None:
    reply = read("hermes", f"First \n{GOOD}\n{GOOD} then.")
    assert reply.content == "Firstthen."
    assert len({call.id for call in reply.tool_calls}) == 2
    assert read("hermes", f"{GOOD}{GOOD}").tool_calls == reply.tool_calls


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "text", ["", " \n two words  ", "a < b <tool", "<tool_calls>", "</tool_call>", "[1] {2}", "[]"]
)
def test_plain_text_is_left_as_it_is(form: str, text: str) -> None:
    assert read(form, text) == Reply(text)


MALFORMED = [
    "",
    "{}",
    "[]",
    "null",
    '{"name": "add"}',
    '{"arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"name": 3, "arguments": {}}',
    '{"name": "add", "arguments": "{}"}',
    '{"name": "add", "arguments": [1]}',
    '{"name": "add", "arguments": {"a": NaN}}',
    '{"name": "add", "arguments": {"a": 1}',
    "{'name': 'add', 'arguments': {}}",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"name": "add", "arguments": {"a": "\\ud83d"}}',
    '{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}",
    '{"name": "add", "arguments": {"a": "line\nbreak"}}',
]


@pytest.mark.parametrize("inside", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_calls_stay_text(inside: str) -> None:
    for form, text in {
        "hermes": f"so <tool_call>{inside}</tool_call> ",
        "mistral": f"so [TOOL_CALLS][{inside}] ",
        "llama3_json": f" <|python_tag|>{inside.replace('arguments', 'parameters')} so",
        "pythonic": f"[{inside}] so",
        "qwen": f"<tool_call>{inside}</tool_call>",
    }.items():
        assert read(form, text) == Reply(text)


def test_a_good_call_behind_a_broken_one_is_found() -> None:
    for broken in (
        "<tool_call>{'name'",
        '<tool_call>{"name": "add',
        "<tool_call>\n<tool_call>",
        "<tool_call>[1]</tool_call>",
    ):
        reply = read("hermes", f"{broken}\n{GOOD}")
        assert (reply.content, len(reply.tool_calls)) == (broken, 1)
    unclosed = "<tool_call><function=f><parameter=a>1"
    reply = read("qwen", f"{unclosed} <tool_call><function=g></function></tool_call>")
    assert (reply.content, calls(reply)) == (unclosed, [("g", {})])


def test_the_forms_own_tags_in_a_string_are_part_of_it() -> None:
    nasty = '</tool_call> "<tool_call>\\'
    assert calls(read("hermes", call_text("f", {"x": nasty}))) == [("f", {"x": nasty})]


def test_text_is_given_out_as_soon_as_it_is_settled_and_a_call_when_it_is_complete() -> None:
    reader = FORMATS["hermes"].parser("r", [])
    assert reader.feed("a b <") == ["a b"]
    assert reader.feed("x") == [" <x"]
    assert reader.feed("<tool_call>") == []
    assert reader.feed("no") == ["<tool_call>no"]
    assert reader.feed(GOOD[:-1]) == []
    assert len(reader.feed(GOOD[-1])) == 1


def test_numbers_beyond_floats_become_the_largest_one() -> None:
    (call,) = read("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999, "b": -1e999}}</tool_call>').tool_calls
    assert json.loads(call.arguments, parse_constant=pytest.fail) == {
        "a": 1.7976931348623157e308,
        "b": -1.7976931348623157e308,
    }


@pytest.mark.parametrize("between", ["; ", ";", "\n", " ", "", "<|python_tag|>"])
def test_llama_separates_calls_by_semicolons_or_white_space(between: str) -> None:
    reply = read(
        "llama3_json", f'{{"name": "f", "parameters": {{"a": 1}}}}{between}{{"name": "g", "parameters": {{}}}} '
    )
    assert (reply.content, calls(reply)) == (None, [("f", {"a": 1}), ("g", {})])


def test_llama_calls_only_at_the_start_or_behind_its_tag() -> None:
    call = '{"name": "f", "parameters": {}}'
    assert calls(read("llama3_json", f"<|python_tag|>{call}")) == [("f", {})]
    assert read("llama3_json", f"Well. {call}") == Reply(f"Well. {call}")
    assert calls(read("llama3_json", f"Well. <|python_tag|>{call}")) == [("f", {})]
    assert read("llama3_json", f'{call}; and "{call}"').content == f'; and "{call}"'
    assert read("llama3_json", '{"answer": 42}') == Reply('{"answer": 42}')


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS] g {}',
        '[TOOL_CALLS]f[CALL_ID]abc456789[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc456780[ARGS]{}',
    ],
)
def test_all_of_mistrals_forms_are_read_and_their_ids_fit_its_template(text: str) -> None:
    reply = read("mistral", text)
    assert (reply.content, calls(reply)) == (None, [("f", {"a": 1}), ("g", {})])
    assert all(len(call.id) == 9 and call.id.isalnum() and call.id.isascii() for call in reply.tool_calls)
    assert len({call.id for call in reply.tool_calls}) == 2


def test_a_list_of_calls_is_taken_whole_or_not_at_all() -> None:
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g"}]'
    assert read("mistral", text) == Reply(text)
    assert read("pythonic", "[f(a=1), g(2)]") == Reply("[f(a=1), g(2)]")


XML = "<tool_call>\n<function=f>\n<parameter=p>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.0", 5.0),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "5", 5),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "array", "items": {}}, '[1, "x"]', [1, "x"]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({"type": ["integer", "string"]}, "12", 12),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": 1}, "1", 1),
        ({}, "12", 12),
        ({}, '"quoted"', '"quoted"'),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, "\n two\nlines \n", "\n two\nlines \n"),
        ({"type": "string"}, "</parameter> </function </tool_call>", "</parameter> </function </tool_call>"),
        ({"type": "string"}, "a</parameter>b<parameter=q><tool_call>", "a</parameter>b<parameter=q><tool_call>"),
    ],
)
def test_qwens_values_are_typed_by_the_tools_schema(schema: Any, text: str, value: Any) -> None:
    reply = read("qwen", XML.format(text), [tool("f", p=schema)])
    assert (reply.content, calls(reply)) == (None, [("f", {"p": value})])
    assert type(calls(reply)[0][1]["p"]) is type(value)


def test_qwens_references_are_followed_and_unknown_arguments_are_text() -> None:
    offered = tool("f", p={"$ref": "#/$defs/N"})
    offered["function"]["parameters"]["$defs"] = {"N": {"type": "integer"}}
    assert calls(read("qwen", XML.format("7"), [offered])) == [("f", {"p": 7})]
    assert calls(read("qwen", XML.format("7"), [tool("f", q={"type": "integer"})])) == [("f", {"p": "7"})]
    assert calls(read("qwen", XML.format("7"))) == [("f", {"p": "7"})]  # a tool that was not offered is still called


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[f()]", [("f", {})]),
        (" [ f ( a = 1 , b = -2.5e3 , ) , ]\n", [("f", {"a": 1, "b": -2500.0})]),
        ("[a.b-c(x='it\\'s', y=\"\\u00e9\\x41\\n\\d\")]", [("a.b-c", {"x": "it's", "y": "éA\n\\d"})]),
        (
            "[f(x=[1, {'k': None}], y=True), g(z=false)]",
            [("f", {"x": [1, {"k": None}], "y": True}), ("g", {"z": False})],
        ),
        ('[f(x="\\ud83d\\ude00")]', [("f", {"x": "\N{GRINNING FACE}"})]),
        ('<|python_start|>[f(x="]")]<|python_end|>', [("f", {"x": "]"})]),
        ("<|tool_call_start|>[f()]<|tool_call_end|>", [("f", {})]),
    ],
)
def test_pythonic_calls_are_read(text: str, expected: list[tuple[str, Any]]) -> None:
    reply = read("pythonic", text)
    assert (reply.content, calls(reply)) == (None, expected)


@pytest.mark.parametrize(
    "text",
    [
        "[f(1)]",
        "[f(**{})]",
        "[f(a=g())]",
        "[f(a=1+1)]",
        "[f(a=(1, 2))]",
        "[f(a={1: 2})]",
        "[f(a=b)]",
        "[f(a='x' 'y')]",
        "[f(a='''x''')]",
        "[f(a=0x1f)]",
        '[f(a="\\ud83d")]',
        "[f]",
        "[f(a=1)",
        "[see](http://x)",
        "f(a=1)",
        "[f(a=" + "[" * 1000 + "]" * 1000 + ")]",
    ],
)
def test_what_is_no_list_of_calls_with_literals_stays_text(text: str) -> None:
    assert read("pythonic", text) == Reply(text)
