"""Grammars of replies: whatever is drawn from their masks is read back as what was asked for."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rollout_server.api.errors import ApiError
from rollout_server.api.replies import grammars
from rollout_server.api.replies.grammars import require_servable, turn_grammar
from rollout_server.api.replies.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningReader
from rollout_server.api.replies.reply import Reader, Reply, gather
from rollout_server.api.replies.tool_formats import FORMATS, ToolFormat
from rollout_server.api.replies.tool_formats.mistral import Mistral
from rollout_server.api.replies.tool_formats.pythonic import Pythonic
from rollout_server.api.turn import Constraint, JsonSchema, OneOf, Regex, SamplingOptions, Tool, ToolChoice, Turn
from rollout_server.grammar import Grammars

VOCABULARY = 49_152
STOP = 2
THINK = REASONING_FORMATS["think"]
FORMS = [*FORMATS.values(), Mistral(listed=False), Pythonic("<|python_start|>")]


class Drawer:
    """Draws texts that a grammar's masks allow, each token as likely as any other."""

    def __init__(self, model_dir: Path) -> None:
        self.grammars = Grammars(model_dir, VOCABULARY)
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    async def compiled(self, grammar: str) -> None:
        self.grammars.matcher(grammar)

    def draw(self, grammar: str, seed: int, *, begin: str = "", limit: int = 600) -> str | None:
        """A text that begins with `begin` and may end where it does; None if it has not ended within the limit."""
        rng = random.Random(seed)
        matcher = self.grammars.matcher(grammar)
        ids: list[int] = []
        forced = self.tokenizer.encode(begin, add_special_tokens=False).ids[::-1] if begin else []
        while len(ids) < limit:
            bits = np.frombuffer(matcher.allowed([STOP]), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            may_end, others = STOP in allowed, allowed[allowed != STOP]
            if forced:
                token = forced.pop()
            elif may_end and (len(others) == 0 or rng.random() < 0.3):
                return str(self.tokenizer.decode(ids, skip_special_tokens=False))
            else:
                ascii_only = others[(others >= 17) & (others < 111)]
                pool = ascii_only if len(others) > 2000 and len(ascii_only) and rng.random() < 0.4 else others
                token = int(pool[rng.randrange(len(pool))])
            ids.append(token)
            matcher.take(token)
        return None

    def allows(self, grammar: str, text: str) -> bool:
        matcher = self.grammars.matcher(grammar)
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if not matcher.allowed([STOP])[token >> 3] >> (token & 7) & 1:
                return False
            matcher.take(token)
        return bool(matcher.allowed([STOP])[STOP >> 3] >> (STOP & 7) & 1)


def constraint_grammar(constraint: Constraint) -> str:
    return grammars.constraint_grammar(constraint, "response_format")


@pytest.fixture(scope="module")
def drawer(tiny_llama: Path) -> Drawer:
    return Drawer(tiny_llama)


def tool(name: str, parameters: Any, strict: bool = True) -> Tool:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [
    tool(
        "add",
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "number", "minimum": 0, "maximum": 9},
                "note": {"type": "string", "maxLength": 5},
                "on": {"type": "boolean"},
            },
            "required": ["a", "b"],
        },
    ),
    tool(
        "add_more",
        {
            "type": "object",
            "properties": {
                "kind": {"enum": ["x", "y z", 3]},
                "opt": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/T"}, "maxItems": 2},
                "where": {"type": "object", "properties": {"q": {"const": "é"}}, "required": ["q"]},
                "code": {"type": "string", "pattern": "^[a-c]/+$"},
            },
            "required": ["kind", "code"],
            "$defs": {"T": {"type": "string", "maxLength": 3}},
        },
    ),
    {"type": "function", "function": {"name": "now", "strict": True}},
]
SCHEMAS = {
    t["function"]["name"]: t["function"].get("parameters", {"type": "object", "maxProperties": 0}) for t in TOOLS
}


def turn(**fields: Any) -> Turn:
    return Turn(model="m", messages=[], sampling=SamplingOptions(), **fields)


def reply_of(text: str, form: ToolFormat, reasoning: ReasoningFormat | None = None, opened: bool = False) -> Reply:
    reader: Reader = form.parser("r", TOOLS)
    if reasoning is not None:
        reader = ReasoningReader(reader, reasoning, opened)
    return gather([*reader.feed(text), *reader.finish()])


def assert_calls_fit(reply: Reply) -> None:
    for call in reply.tool_calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


THOUGHT = "hm <tool_call>[{ \n</think>"


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.name}-{getattr(form, 'mark', getattr(form, 'listed', ''))}"
)
@pytest.mark.parametrize("thinks", ["no", "may", "must"])
def test_required_calls_are_read_back_and_fit_their_schemas(drawer: Drawer, form: ToolFormat, thinks: str) -> None:
    reasoning, opened = (None if thinks == "no" else THINK), thinks == "must"
    begin = {"no": "", "may": f"<think>{THOUGHT}", "must": THOUGHT}[thinks]
    for names, many in (((), True), ((), False), (("add_more",), True)):
        wanted = turn(tools=TOOLS, tool_choice=ToolChoice("required", names), parallel_tool_calls=many)
        grammar = turn_grammar(wanted, form, reasoning, reasoning_opened=opened)
        assert grammar is not None
        drawn = [drawer.draw(grammar, seed, begin=begin if seed % 2 or opened else "") for seed in range(5)]
        replies = [reply_of(text, form, reasoning, opened) for text in drawn if text is not None]
        assert replies
        for reply in replies:
            assert reply.content is None
            assert len(reply.tool_calls) >= 1
            assert many or len(reply.tool_calls) == 1
            assert not names or {call.name for call in reply.tool_calls} == set(names)
            assert_calls_fit(reply)


BEGINNINGS = {
    "hermes": "So: <tool_call>",
    "qwen": "So: <tool_call>",
    "mistral": "So: [TOOL_CALLS]",
    "llama3_json": "{",
    "pythonic": "[",
}


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.name}-{getattr(form, 'mark', getattr(form, 'listed', ''))}"
)
@pytest.mark.parametrize("thinks", ["no", "may", "must"])
def test_strict_tools_leave_text_free_and_make_calls_fit(drawer: Drawer, form: ToolFormat, thinks: str) -> None:
    reasoning, opened = (None if thinks == "no" else THINK), thinks == "must"
    thought = {"no": "", "may": f"<think>{THOUGHT}", "must": THOUGHT}[thinks]
    trigger = getattr(form, "mark", None) or BEGINNINGS[form.name]
    for many in (True, False):
        grammar = turn_grammar(turn(tools=TOOLS, parallel_tool_calls=many), form, reasoning, reasoning_opened=opened)
        assert grammar is not None
        assert drawer.allows(grammar, f"{thought}\nAny <text> [with] {{brackets}}.")
        assert drawer.allows(grammar, thought)
        calls = 0
        for seed in range(5):
            text = drawer.draw(grammar, seed, begin=thought + (trigger if seed < 4 else ""))
            if text is not None:
                reply = reply_of(text, form, reasoning, opened)
                assert_calls_fit(reply)
                assert many or len(reply.tool_calls) <= 1
                assert seed >= 4 or reply.tool_calls
                calls += len(reply.tool_calls)
        assert calls


def test_a_call_may_be_tried_again_after_text_and_nothing_else_than_a_call_follows_its_beginning(
    drawer: Drawer,
) -> None:
    grammar = turn_grammar(turn(tools=TOOLS), FORMATS["hermes"], None, reasoning_opened=False)
    assert grammar is not None
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert drawer.allows(grammar, f"One {call} two\n{call}\n{call} three <tool_cal")
    assert not drawer.allows(grammar, f"{call}<tool_call> four")
    assert not drawer.allows(grammar, '<tool_call>{"name": "sub", "arguments": {}}</tool_call>')
    assert not drawer.allows(grammar, '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')


def test_references_of_parameters_to_themselves_hold_inside_a_call(drawer: Drawer) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "n": {"const": 1}, "m": {"$ref": "#/properties/n"}}}
    wanted = turn(tools=[tool("grow", tree)], tool_choice=ToolChoice("required"))
    for name, key in (("hermes", "arguments"), ("llama3_json", "parameters")):
        grammar = turn_grammar(wanted, FORMATS[name], None, reasoning_opened=False)
        assert grammar is not None
        opening, closing = ("<tool_call>", "</tool_call>") if name == "hermes" else ("", "")
        good = {"name": "grow", key: {"left": {"left": {}, "n": 1}, "m": 1}}
        assert drawer.allows(grammar, f"{opening}{json.dumps(good)}{closing}")
        assert not drawer.allows(grammar, f"{opening}{json.dumps({'name': 'grow', key: {'m': 2}})}{closing}")


def test_tools_that_are_not_strict_are_left_alone_unless_the_choice_is_limited(drawer: Drawer) -> None:
    loose = [tool("f", {"type": "object", "properties": {"x": {"type": "integer"}}}, strict=False), TOOLS[2]]
    form = FORMATS["hermes"]
    assert turn_grammar(turn(tools=loose[:1]), form, THINK, reasoning_opened=True) is None
    assert turn_grammar(turn(tools=TOOLS, tool_choice=ToolChoice("none")), form, None, reasoning_opened=False) is None
    assert turn_grammar(turn(tools=loose[:1], parallel_tool_calls=False), form, None, reasoning_opened=False) is None
    one_only = turn_grammar(
        turn(tools=loose[:1], parallel_tool_calls=False), FORMATS["llama3_json"], None, reasoning_opened=False
    )
    assert one_only is not None
    call = '{"name": "f", "parameters": {"any": []}}'
    assert drawer.allows(one_only, call)
    assert not drawer.allows(one_only, f"{call}; {call}")
    limited = turn_grammar(
        turn(tools=loose, tool_choice=ToolChoice("auto", ("now",))), form, None, reasoning_opened=False
    )
    assert limited is not None
    assert not drawer.allows(limited, '<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert drawer.allows(limited, 'x <tool_call>{"name": "now", "arguments": {}}</tool_call>')


@pytest.mark.parametrize("name", ["mistral", "hermes", "llama3_json"])
def test_special_tokens_are_matched_by_id(drawer: Drawer, name: str) -> None:
    form = Mistral(listed=False) if name == "mistral" else FORMATS[name]
    stand_ins = {"<jupyter_start>": form.special[0], "<jupyter_text>": "[ARGS]", "<jupyter_code>": "</think>"}
    ids = {text: drawer.tokenizer.token_to_id(token) for token, text in stand_ins.items()}
    for choice in ("required", "auto"):
        wanted = turn(tools=TOOLS, tool_choice=ToolChoice(choice))  # type: ignore[arg-type]
        grammar = turn_grammar(wanted, form, THINK, reasoning_opened=True, special_ids=ids)
        assert grammar is not None
        begin = "hm <tool_call> [TOOL_CALLS]<jupyter_code>" + ("<jupyter_start>" if choice == "auto" else "")
        for seed in range(4):
            text = drawer.draw(grammar, seed, begin=begin)
            if text is not None:
                for token, meant in stand_ins.items():
                    text = text.replace(token, meant)
                reply = reply_of(text, form, THINK, opened=True)
                assert reply.reasoning == "hm <tool_call> [TOOL_CALLS]"
                assert reply.tool_calls
                assert_calls_fit(reply)


def test_no_reasoning_is_admitted_where_it_was_turned_off(drawer: Drawer) -> None:
    fields = {"tools": TOOLS, "tool_choice": ToolChoice("required", ("now",))}
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    for options, admitted in (({}, True), ({"enable_thinking": False}, False)):
        grammar = turn_grammar(
            turn(**fields, template_options=options), FORMATS["hermes"], THINK, reasoning_opened=False
        )
        assert grammar is not None
        assert drawer.allows(grammar, call)
        assert drawer.allows(grammar, f"<think>\nhm\n</think>\n\n{call}") == admitted


NAMES = [
    'quo"te',
    "back\\slash",
    "new\nline",
    "slash//#x",
    "é\N{GRINNING FACE}",
    "x" * 200,
    "%json {}",
    '"/ | /.*/ "',
    "<[1]>",
    "a'b",
]


def expressible(form: ToolFormat, name: str) -> bool:
    """JSON has escapes; the other forms have only the characters that they do not use themselves."""
    if form.name == "pythonic":
        return name.isidentifier()
    if form.name == "qwen":
        return not set(name) & set("<>\n")
    return form == FORMATS.get(form.name) or not set(name) & set(" []{}\n")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.name}-{getattr(form, 'mark', getattr(form, 'listed', ''))}"
)
def test_hostile_names_are_escaped_or_refused_by_field(drawer: Drawer, form: ToolFormat, name: str) -> None:
    tools = [tool("ok", {}), tool(name, {"type": "object", "properties": {name: {"const": 1}}, "required": [name]})]
    wanted = turn(tools=tools, tool_choice=ToolChoice("required", (name,)), parallel_tool_calls=False)
    if not expressible(form, name):
        with pytest.raises(ApiError) as refused:
            turn_grammar(wanted, form, None, reasoning_opened=False)
        assert refused.value.status == 400
        assert (refused.value.param or "").startswith("tools.1.function.")
        return
    grammar = turn_grammar(wanted, form, None, reasoning_opened=False)
    assert grammar is not None
    text = drawer.draw(grammar, 0, limit=900)
    assert text is not None
    reader = form.parser("r", tools)
    (call,) = gather([*reader.feed(text), *reader.finish()]).tool_calls
    assert (call.name, json.loads(call.arguments)) == (name, {name: 1})


SERVED = [
    {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/B"}}, "required": ["a", "b"], "$defs": {"B": {"enum": ["x"]}}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 3, "maximum": 5}]},
    {"type": "string", "format": "date"},
    {"type": "object", "properties": {"p": {"type": "string", "format": "file-path", "maxLength": 3}}, "required": ["p"]},
    {"type": "object", "allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"required": ["b"]}], "maxProperties": 2},
]  # fmt: skip


@pytest.mark.parametrize("schema", SERVED, ids=range(len(SERVED)))
@pytest.mark.parametrize("opened", [False, True])
def test_replies_fit_a_schema(drawer: Drawer, schema: dict[str, Any], opened: bool) -> None:
    reasoning = THINK if opened else None
    grammar = turn_grammar(turn(constraint=JsonSchema(schema)), FORMATS["hermes"], reasoning, reasoning_opened=opened)
    assert grammar is not None
    drawn = [drawer.draw(grammar, seed, begin="hm</think>\n" if opened else "") for seed in range(6)]
    texts = [text.removeprefix("hm</think>\n") for text in drawn if text is not None]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


def test_objects_are_closed_unless_something_else_is_said(drawer: Drawer) -> None:
    listed = {"type": "object", "properties": {"a": {"const": 1}}}
    assert not drawer.allows(constraint_grammar(JsonSchema(listed)), '{"a": 1, "b": 2}')
    assert drawer.allows(constraint_grammar(JsonSchema({**listed, "additionalProperties": True})), '{"a": 1, "b": 2}')
    assert drawer.allows(constraint_grammar(JsonSchema({"type": "object"})), '{"a": 1, "b": [{}]}')
    assert drawer.allows(constraint_grammar(JsonSchema(True)), '[1, "x", null]')
    named_like_keywords = {"type": "object", "properties": {"format": {"const": 1}, "properties": {"const": 2}}}
    assert drawer.allows(constraint_grammar(JsonSchema(named_like_keywords)), '{"format":1,"properties":2}')


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-\d", "a/b|c", "^x+$", "(?i)yes|no", r"\/", "a#b //c", "", "line\nbreak", r"[/\]\\]{2}"]
)
def test_replies_match_a_regular_expression_as_a_whole(drawer: Drawer, pattern: str) -> None:
    grammar = constraint_grammar(Regex(pattern))
    if not pattern:
        assert "empty" in (drawer.grammars.check(grammar) or "")
        return
    for seed in range(5):
        text = drawer.draw(grammar, seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_replies_are_one_of_the_choices(drawer: Drawer) -> None:
    texts = ["yes", "yes, but", 'q"\\/', "é\n"]
    grammar = constraint_grammar(OneOf(texts))
    assert {drawer.draw(grammar, seed) for seed in range(40)} == set(texts)


def test_with_a_schema_and_tools_the_reply_is_calls_or_fits(drawer: Drawer) -> None:
    wanted = turn(
        tools=TOOLS, constraint=JsonSchema({"type": "object", "properties": {"z": {"const": 1}}, "required": ["z"]})
    )
    for form, call in (
        (FORMATS["hermes"], '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        (FORMATS["llama3_json"], '{"name": "now", "parameters": {}}'),
    ):
        grammar = turn_grammar(wanted, form, None, reasoning_opened=False)
        assert grammar is not None
        assert drawer.allows(grammar, call)
        assert drawer.allows(grammar, '{"z": 1}')
        assert not drawer.allows(grammar, "z")


def serve(drawer: Drawer, wanted: Turn, form: str) -> None:
    grammar = turn_grammar(wanted, FORMATS[form], None, reasoning_opened=False)
    asyncio.run(require_servable(wanted, grammar or "", drawer.compiled))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "constraint",
    [
        JsonSchema(False),
        JsonSchema(nested(5000)),
        JsonSchema({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}),
        JsonSchema({"type": "nonsense"}),
        JsonSchema({"$ref": "#/$defs/none"}),
        JsonSchema({"enum": []}),
        JsonSchema({"const": "\ud83d"}),
        JsonSchema({"type": "string", "pattern": "(?=x)"}),
        Regex("(?=x)"),
        Regex("("),
        OneOf([]),
    ],
    ids=range(11),
)
def test_a_constraint_that_cannot_be_served_is_refused_by_name(drawer: Drawer, constraint: Constraint) -> None:
    with pytest.raises(ApiError) as refused:
        serve(drawer, turn(constraint=constraint, tools=TOOLS), "hermes")
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    ("form", "parameters"),
    [
        ("hermes", {"type": "object", "properties": {"a": {"not": {}}}}),
        ("hermes", {"type": "string"}),
        ("hermes", nested(200)),
        ("qwen", {"type": "object", "anyOf": [{"required": ["a"]}], "properties": {"a": {}}}),
        ("qwen", {"type": "object", "properties": {"a>": {}}}),
        (
            "qwen",
            {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}]}}},
        ),
        ("qwen", {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}),
        ("pythonic", {"type": "object", "properties": {"a b": {}}}),
        ("pythonic", {"type": "object", "minProperties": 1}),
    ],
)
def test_parameters_that_cannot_be_served_are_refused_by_name(drawer: Drawer, form: str, parameters: Any) -> None:
    with pytest.raises(ApiError) as refused:
        serve(drawer, turn(tools=[tool("ok", {}), tool("f", parameters)], tool_choice=ToolChoice("required")), form)
    assert (refused.value.status, refused.value.param) == (400, "tools.1.function.parameters")


@pytest.mark.parametrize(
    "fields",
    [{"tool_choice": ToolChoice("required")}, {"tools": TOOLS, "tool_choice": ToolChoice("required", ("sub",))}],
)
def test_a_choice_of_tools_that_are_not_there_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        turn_grammar(turn(**fields), FORMATS["hermes"], None, reasoning_opened=False)
    assert (refused.value.status, refused.value.param) == (400, "tool_choice")


WORDS = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "anyOf",
    "allOf",
    "oneOf",
    "$ref",
    "$defs",
    "enum",
    "const",
]
WORDS += ["items", "pattern", "minLength", "maxLength", "format", "minimum", "x", "not", "patternProperties", "title"]
ATOMS = st.sampled_from(
    [None, True, 0, -1, 1.5, "", "string", "object", ["object"], "#/$defs/x", "#", "^a$", "0}/ | /x", [], {}]
)
SCHEMA = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=12,
)
PARAMETERS = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(st.sampled_from(["x", "y"]), SCHEMA, max_size=2) | SCHEMA,
        "required": st.lists(st.sampled_from(["x", "y"]), max_size=2) | SCHEMA,
        "additionalProperties": SCHEMA,
        "$defs": st.dictionaries(st.just("x"), SCHEMA) | SCHEMA,
    },
)


@given(
    parameters=PARAMETERS | SCHEMA,
    form=st.sampled_from(FORMS),
    written=st.sampled_from(["1", "null", '{"x": []}', "text"]),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_schema_is_served_or_refused_by_name(
    drawer: Drawer, parameters: Any, form: ToolFormat, written: str
) -> None:
    tools = [tool("f", parameters)]
    wanted = turn(tools=tools, tool_choice=ToolChoice("required"), constraint=JsonSchema({"type": "object"}))
    try:
        grammar = turn_grammar(wanted, form, None, reasoning_opened=False)
        asyncio.run(require_servable(wanted, grammar or "", drawer.compiled))
    except ApiError as error:
        assert error.status == 400  # noqa: PT017
        assert error.param == "tools.0.function.parameters"  # noqa: PT017
    text = f"<tool_call><function=f><parameter=x>\n{written}\n</parameter></function></tool_call>"
    reader = FORMATS["qwen"].parser("r", tools)
    (call,) = gather([*reader.feed(text), *reader.finish()]).tool_calls
    assert call.name == "f"
