"""The Hermes parser: what is a call becomes one, everything else stays text, however it is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.api.tool_parsers import HermesParser, ToolCall, parse_call, parse_reply
from rollout_server.api.tool_prompt import call_text

GOOD = call_text("add", {"a": 1, "b": [2, "é"]})


def test_a_call_alone_has_no_content() -> None:
    content, calls = parse_reply(f" {GOOD}\n", "r")
    assert content is None
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("add", {"a": 1, "b": [2, "é"]})]


def test_text_around_calls_is_content() -> None:
    content, calls = parse_reply(f"First \n{GOOD}\n{GOOD} then.", "r")
    assert content == "Firstthen."
    assert len(calls) == 2
    assert calls[0].id != calls[1].id
    assert parse_reply(f"{GOOD}{GOOD}", "r")[1] == calls  # ids depend on reply and order only


def test_plain_text_is_left_as_it_is() -> None:
    for text in ("", " \n two words  ", "a < b <tool", "<tool_calls>", "</tool_call>"):
        assert parse_reply(text, "r") == (text, [])


@pytest.mark.parametrize(
    "inside",
    [
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
        '{"name": "add", "arguments": {"a": "\\ud83d"}}',
    ],
)
def test_malformed_calls_stay_text(inside: str) -> None:
    assert parse_call(inside) is None
    text = f"so <tool_call>{inside}</tool_call> "
    assert parse_reply(text, "r") == (text, [])


def test_an_unclosed_call_stays_text() -> None:
    text = GOOD.removesuffix("</tool_call>")
    assert parse_reply(text, "r") == (text, [])


FRAGMENTS = st.sampled_from(
    [GOOD, "<tool_call>", "</tool_call>", "<tool", "_call>", "<", " ", "\n", "x", '{"name"', "{}"]
)


@given(text=st.lists(FRAGMENTS, max_size=8).map("".join), data=st.data())
def test_cuts_make_no_difference(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = HermesParser("r")
    events: list[str | ToolCall] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += parser.feed(text[start:end])
    events += parser.finish()
    content = "".join(e for e in events if isinstance(e, str))
    expected_content, expected_calls = parse_reply(text, "r")
    assert (content or None) == (expected_content or None)
    assert [e for e in events if isinstance(e, ToolCall)] == expected_calls


def test_text_is_given_out_as_soon_as_it_is_settled() -> None:
    parser = HermesParser("r")
    assert parser.feed("a b <") == ["a b"]
    assert parser.feed("x") == [" <x"]
    assert parser.feed("<tool_call>{") == []
