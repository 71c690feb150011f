"""Reasoning is told apart from the answer wherever the text is cut, and found out from the template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rollout_server.api.rendering.tool_prompt import call_text
from rollout_server.api.replies.reasoning import (
    REASONING_FORMATS,
    ReasoningCount,
    ReasoningReader,
    detect_reasoning,
    may_reason,
)
from rollout_server.api.replies.reply import PlainReader, Reader, Reasoning, Reply, ReplyEvent, gather
from rollout_server.api.replies.tool_formats import FORMATS, ToolFormat
from tests.unit.test_tool_formats import FRAGMENTS, cut, template, templates

THINK = REASONING_FORMATS["think"]


def read(text: str, *, opened: bool, inner: Reader | None = None, pieces: Sequence[str] = ()) -> Reply:
    reader = ReasoningReader(inner or PlainReader(), THINK, opened)
    events: list[ReplyEvent] = []
    for piece in pieces or [text]:
        events += reader.feed(piece)
    return gather([*events, *reader.finish()])


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("why\n</think>\n\nso", True, "why\n", "so"),
        ("<think>\nwhy\n</think>\n\nso", False, "\nwhy\n", "so"),
        (" \n<think>why</think>so", False, "why", "so"),
        ("why", True, "why", ""),
        ("why</thi", True, "why</thi", ""),
        ("<think>why", False, "why", ""),
        ("so", False, None, "so"),
        (" so </think> so", False, None, " so </think> so"),
        ("so <think>why</think>", False, None, "so <think>why</think>"),
        (" <thin", False, None, " <thin"),
        ("</think>so</think>", True, None, "so</think>"),
        ("", True, None, ""),
        (" \n", False, None, " \n"),
    ],
)
def test_reasoning_ends_at_the_first_closing_and_begins_with_the_prompt_or_the_reply(
    text: str, opened: bool, reasoning: str | None, content: str
) -> None:
    for pieces in ([text], list(text)):
        reply = read(text, opened=opened, pieces=pieces)
        assert (reply.reasoning, reply.content) == (reasoning, content)


def test_reasoning_is_passed_on_as_it_comes() -> None:
    reader = ReasoningReader(PlainReader(), THINK, opened=False)
    assert reader.feed("<think>") == []
    assert reader.feed("because </") == [Reasoning("because ")]
    assert reader.feed("b></think>") == [Reasoning("</b>")]
    assert reader.feed("\n") == []
    assert reader.feed(" So") == ["So"]


def test_calls_are_looked_for_in_the_answer_only() -> None:
    call = call_text("f", {})
    reply = read(f"maybe {call}</think>{call}", opened=True, inner=FORMATS["hermes"].parser("r", []))
    assert (reply.reasoning, reply.content, len(reply.tool_calls)) == (f"maybe {call}", None, 1)
    start = '{"name": "f", "parameters": {}}'
    reply = read(f"<think>x</think>\n{start}", opened=False, inner=FORMATS["llama3_json"].parser("r", []))
    assert (reply.reasoning, reply.content, len(reply.tool_calls)) == ("x", None, 1)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@given(
    parts=st.lists(st.sampled_from([*FRAGMENTS, "<think>", "</think>", "</", "think>", "\n"]), max_size=10),
    opened=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100)
def test_cuts_make_no_difference_whatever_reads_the_answer(
    form: ToolFormat, parts: list[str], opened: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    whole = read(text, opened=opened, inner=form.parser("r", []))
    for pieces in (cut(text, data), list(text)):
        again = read(text, opened=opened, inner=form.parser("r", []), pieces=pieces)
        assert again.parts == whole.parts


@pytest.mark.parametrize("text", ["</thin" * 160_000, " " * 1_000_000], ids=["closings that are none", "white space"])
def test_a_megabyte_in_pieces_of_four_characters_takes_seconds_at_most(text: str) -> None:
    for opened in (True, False):
        begin = time.process_time()
        read(text, opened=opened, pieces=[text[at : at + 4] for at in range(0, len(text), 4)])
        assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("qwen3", True),
        ("qwen3_5_think", True),
        ("qwen3_5_nothink", True),
        ("deepseek_r1_distill", True),
        ("glm4moe", True),
        ("nemotron_3_nano", True),
        ("qwen2_5", False),
        ("qwen3_instruct_2507", False),
        ("llama3_2", False),
        ("phi3", False),
    ],
)
def test_reasoning_is_recognised_in_real_templates(name: str, reasons: bool) -> None:
    file = templates() / f"{name}.jinja"
    if not file.is_file():
        pytest.skip("this version of TRL has no such template")
    assert detect_reasoning(template(file.read_text())) == (THINK if reasons else None)


def test_a_prompt_opens_the_reasoning_if_it_ends_there() -> None:
    file = templates() / "qwen3_5_think.jinja"
    if file.is_file():
        prompt = template(file.read_text()).render([{"role": "user", "content": "<think>"}], [], generation_prompt=True)
        assert THINK.opened_by(prompt)
    assert not THINK.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.opened_by("<think> is a tag")
    assert detect_reasoning(None) is None
    assert [may_reason(options) for options in ({}, {"enable_thinking": True}, {"enable_thinking": False})] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "opened", "reasoning"),
    [
        ("why</think>so", True, "why</think>"),
        ("<think>why</think>so </think>", False, "<think>why</think>"),
        ("why", True, "why"),
        ("<think>why", False, "<think>why"),
        ("so</think>", False, ""),
        ("<thing>", False, ""),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_reasoning_tokens_are_counted_as_they_come(
    tiny_llama: Path, text: str, opened: bool, reasoning: str, special: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    if special:
        tokenizer.add_special_tokens(list(THINK.special))
    shown = {i for tag in THINK.special if (i := tokenizer.token_to_id(tag)) is not None}
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = ReasoningCount(tokenizer, THINK, opened, shown)
    counts = [count.of(ids[:at]) for at in range(1, len(ids) + 1)]
    assert counts == sorted(counts)
    counted = tokenizer.decode(ids[: counts[-1]], skip_special_tokens=False)
    assert counted.startswith(reasoning)
    assert len(counted) <= len(reasoning) + 1  # a token may hold the beginning of the answer
