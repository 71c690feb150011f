"""What holds for every form of tool calls: cuts, garbage, length and round trips make no difference to what is read."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollout_server.api.rendering.template import ChatTemplate
from rollout_server.api.rendering.tool_prompt import call_text
from rollout_server.api.replies.reply import Reader, ReplyEvent, ToolCall, gather
from rollout_server.api.replies.tool_formats import FORMATS, ToolFormat, detect
from rollout_server.api.replies.tool_formats.mistral import Mistral
from rollout_server.api.replies.tool_formats.pythonic import Pythonic

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}
FRAGMENTS = [
    call_text("f", {"a": 1, "b": "</tool_call>"}),
    '{"name": "f", "parameters": {"n": 1}}',
    "<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
    '[TOOL_CALLS][{"name": "f", "arguments": {}}]',
    '[TOOL_CALLS]f[ARGS]{"n": [1]}',
    "[f(n=1, s='x'), g()]",
    *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=n>", "</parameter>", "[TOOL_CALLS]"),
    *(
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<|python_start|>",
        "<|python_end|>",
        "<tool",
        "_call>",
        "<",
        "[f(",
        "f(",
    ),
    *(" ", "\n", ";", "x", '"', "'", "\\", "{", "}", "[", "]", "(", ")", ",", "=", ":", '{"name": "', "{}", "1", "é"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def in_total(events: Sequence[ReplyEvent]) -> tuple[ReplyEvent, ...]:
    return gather(events).parts


def read(reader: Reader, pieces: Sequence[str]) -> tuple[ReplyEvent, ...]:
    events: list[ReplyEvent] = []
    for piece in pieces:
        events += reader.feed(piece)
    return in_total([*events, *reader.finish()])


def cut(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@given(text=TEXTS, data=st.data())
@settings(max_examples=200)
def test_cuts_make_no_difference_and_text_without_calls_is_kept(
    form: ToolFormat, text: str, data: st.DataObject
) -> None:
    whole = read(form.parser("r", [TOOL]), [text])
    assert read(form.parser("r", [TOOL]), cut(text, data)) == whole
    assert read(form.parser("r", [TOOL]), list(text)) == whole
    if not any(isinstance(event, ToolCall) for event in whole):
        assert whole == ((text,) if text else ())


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@given(text=st.text(alphabet=st.characters()), data=st.data())
def test_nothing_that_a_model_may_write_raises(form: ToolFormat, text: str, data: st.DataObject) -> None:
    opening = data.draw(st.sampled_from(["", *FRAGMENTS]))
    assert read(form.parser("r", [TOOL]), cut(opening + text, data)) == read(form.parser("r", [TOOL]), [opening + text])


CONTROLS = ['"', "\\", "\n", "\t", "\x00", "\x7f", "\u2028", "\N{GRINNING FACE}"]
NASTY = st.lists(st.sampled_from([*FRAGMENTS, *CONTROLS]) | st.text(max_size=3), max_size=5)
STRINGS = NASTY.map("".join)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3), max_leaves=6
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("True", "False", "None")
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(STRINGS, VALUES, max_size=3)), min_size=1, max_size=3)
KEYWORD_CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)


def python_literal(value: Any) -> str:
    match value:
        case list():
            return f"[{', '.join(map(python_literal, value))}]"
        case dict():
            return "{" + ", ".join(f"{key!r}: {python_literal(inner)}" for key, inner in value.items()) + "}"
        case _:
            return repr(value)


def assert_reads(form: str, text: str, calls: list[tuple[str, Any]], tools: Sequence[Any] = ()) -> None:
    events = read(FORMATS[form].parser("r", list(tools)), [text])
    read_back = [(e.name, json.loads(e.arguments)) if isinstance(e, ToolCall) else e for e in events]
    assert read_back == calls


@given(calls=CALLS, ascii_only=st.booleans())
def test_json_calls_are_read_back_as_they_were_written(calls: list[tuple[str, Any]], ascii_only: bool) -> None:
    def written(key: str) -> list[str]:
        return [json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only) for name, arguments in calls]

    assert_reads("hermes", "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written("arguments")), calls)
    assert_reads("llama3_json", "; ".join(written("parameters")), calls)
    assert_reads("mistral", f"[TOOL_CALLS][{', '.join(written('arguments'))}]", calls)
    each = (f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, ensure_ascii=ascii_only)}" for name, arguments in calls)
    assert_reads("mistral", "".join(each), calls)


@given(calls=KEYWORD_CALLS)
def test_pythonic_calls_are_read_back_as_they_were_written(calls: list[tuple[str, Any]]) -> None:
    written = [
        f"{n}({', '.join(f'{key}={python_literal(v)}' for key, v in arguments.items())})" for n, arguments in calls
    ]
    assert_reads("pythonic", f"[{', '.join(written)}]", calls)


@given(calls=KEYWORD_CALLS)
def test_qwens_calls_are_read_back_as_they_were_written(calls: list[tuple[str, Any]]) -> None:
    kinds = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
        list: "array",
        dict: "object",
    }
    texts = [
        (key, value if isinstance(value, str) else json.dumps(value))
        for _, arguments in calls
        for key, value in arguments.items()
    ]
    # The form has no escapes: these two sequences cannot stand in a value.
    assume(not any("</parameter>" in text or "<tool_call>" in text for _, text in texts))
    assume(len({name for name, _ in calls}) == len(calls))
    tools = [
        {
            "function": {
                "name": n,
                "parameters": {"properties": {key: {"type": kinds[type(v)]} for key, v in arguments.items()}},
            }
        }
        for n, arguments in calls
    ]
    written = ""
    for name, arguments in calls:
        written += f"<tool_call>\n<function={name}>\n"
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value)
            written += f"<parameter={key}>\n{text}\n</parameter>\n"
        written += "</function>\n</tool_call>\n"
    assert_reads("qwen", written, calls, tools)


SIZE = 1_000_000
HOSTILE = {
    "prose": "word " * (SIZE // 5),
    "white space": " " * SIZE,
    "openings": "<tool_call>" * (SIZE // 11),
    "strings that never end": '<tool_call>{"k":"' * (SIZE // 17),
    "an unclosed call": '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * SIZE,
    "deep brackets": "[" * SIZE,
    "deep values": '<tool_call>{"a": ' + "[" * SIZE,
    "values that never end": "<tool_call><function=f><parameter=a>" * (SIZE // 36),
    "ends that are none": "<tool_call><function=f><parameter=a>" + "</parameter>x" * (SIZE // 13),
    "markers": "[TOOL_CALLS]" * (SIZE // 12),
    "tags": "<|python_tag|>{" * (SIZE // 15),
    "quotes": "[f(a='" + "\\'" * (SIZE // 2),
    "good calls": call_text("f", {}) * (SIZE // 53),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_megabyte_in_pieces_of_four_characters_takes_seconds_at_most(text: str) -> None:
    for form in FORMATS.values():
        for size in (4, len(text)):
            reader = form.parser("r", [])
            begin = time.process_time()
            for start in range(0, len(text), size):
                reader.feed(text[start : start + size])
            reader.finish()
            assert time.process_time() - begin < 10, form.name


def test_a_call_in_a_part_of_a_surrogate_pair_is_text() -> None:
    for form in FORMATS.values():
        assert read(form.parser("r", []), ["\ud83d"]) == ("\ud83d",)


def templates() -> Path:
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "chat_templates"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_vl", "hermes"),
        ("qwen3_instruct_2507", "hermes"),
        ("qwen3_5_think", "qwen"),
        ("qwen3_5_nothink", "qwen"),
        ("nemotron_3_nano", "qwen"),
        ("llama3_1", "llama3_json"),
        ("llama3_2", "llama3_json"),
        ("lfm2_2_5", "pythonic"),
        ("deepseek_r1_distill", "hermes"),  # knows no tools: ours
        ("gemma3", "hermes"),
        ("phi3", "hermes"),
    ],
)
def test_the_form_of_real_templates_is_recognised(name: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    file = templates() / f"{name}.jinja"
    if not file.is_file():
        pytest.skip("this version of TRL has no such template")
    assert detect(template(file.read_text())).name == expected
    assert not caplog.records


@pytest.mark.parametrize("name", ["glm4moe", "gptoss", "gemma4"])
def test_an_unknown_form_is_read_as_hermes_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    file = templates() / f"{name}.jinja"
    if not file.is_file():
        pytest.skip("this version of TRL has no such template")
    with caplog.at_level(logging.WARNING):
        assert detect(template(file.read_text())).name == "hermes"
    assert "not known" in caplog.text


FRAME = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}[/INST]
{%- if m.tool_calls %}{% for c in m.tool_calls %}CALL{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% else %}[INST]
{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[/INST]{% endif %}"""


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            '[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]',
            Mistral(listed=True),
        ),
        ("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}", Mistral(listed=False)),
        (
            "[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})]",
            Pythonic(),
        ),
        (
            "<|python_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}"
            "{% endfor %})]<|python_end|>",
            Pythonic("<|python_start|>"),
        ),
    ],
)
def test_the_variant_that_a_template_writes_is_recognised(call: str, expected: ToolFormat) -> None:
    assert detect(template(FRAME.replace("CALL", call))) == expected


def test_without_a_template_the_form_is_ours() -> None:
    assert detect(None) is FORMATS["hermes"]
