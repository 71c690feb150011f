"""What is put together of an upstream's stream: whole, broken off half-way, long; and the tools that a request's history tells."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from rollout_server.api.upstreams.answers import Heard, StreamedAnswer
from rollout_server.api.upstreams.provider import Dialect
from rollout_server.api.upstreams.tool_results import tool_results


def streamed(dialect: Dialect, *events: dict[str, Any]) -> Heard:
    answer = StreamedAnswer(dialect)
    for event in events:
        answer.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    return answer.heard()


def test_a_tool_call_of_messages_without_arguments_keeps_the_input_it_began_with() -> None:
    block = {"type": "tool_use", "id": "t", "name": "now", "input": {}}
    said = streamed(
        "messages",
        {"type": "message_start", "message": {"id": "m"}},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": ""}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
    )
    (made,) = said.choices[0].message["tool_calls"]
    assert made["function"] == {"name": "now", "arguments": "{}"}


def test_responses_that_break_off_keep_all_that_came() -> None:
    added, delta = "response.output_item.added", "delta"
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": ""}
    said = streamed(
        "responses",
        {"type": "response.created", "response": {"id": "r", "status": "in_progress"}},
        {"type": added, "output_index": 0, "item": {"type": "reasoning", "summary": []}},
        {"type": "response.reasoning_summary_text.delta", "output_index": 0, delta: "Let me "},
        {"type": "response.reasoning_summary_text.delta", "output_index": 0, delta: "think."},
        {"type": added, "output_index": 1, "item": {"type": "message", "content": []}},
        {"type": "response.output_text.delta", "output_index": 1, delta: "So: "},
        {"type": "response.output_text.delta", "output_index": 1, delta: "add"},
        {"type": added, "output_index": 2, "item": call},
        {"type": "response.function_call_arguments.delta", "output_index": 2, delta: '{"a"'},
        {"type": "response.function_call_arguments.delta", "output_index": 2, delta: ": 1"},
    ).choices[0]
    assert said.finish_reason == "abort"
    assert (said.message["content"], said.message["reasoning_content"]) == ("So: add", "Let me think.")
    assert said.message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1'}


def test_a_long_stream_of_responses_costs_as_much_as_it_holds() -> None:
    event = {"type": "response.output_text.delta", "output_index": 0, "delta": "word "}
    began = time.process_time()
    said = streamed("responses", *[event] * 20_000)
    assert said.choices[0].message["content"] == "word " * 20_000
    assert time.process_time() - began < 2  # a minute, if every delta is added to a copy of those before


MADE = {"id": "c", "function": {"name": "add", "arguments": {"a": 1}}}
HISTORIES: dict[Dialect, Any] = {
    "chat": [
        {"role": "assistant", "tool_calls": [{**MADE, "type": "function"}]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ],
    "messages": [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "2"}]},
    ],
    "responses": [
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": {"a": 1}},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ],
}


@pytest.mark.parametrize("dialect", HISTORIES)
def test_a_history_says_in_every_dialect_which_call_a_result_answers(dialect: Dialect) -> None:
    reply, result = tool_results(dialect, {"messages": HISTORIES[dialect], "input": HISTORIES[dialect]})
    assert reply["tool_calls"] == [MADE]
    assert result == {"role": "tool", "tool_call_id": "c", "content": "2"}
