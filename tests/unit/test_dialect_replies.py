"""Replies in the dialects of Responses and Messages: streamed as whole, and back again as the conversation they were.

The oracles are the SDKs' own accumulators.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
from anthropic.lib.streaming import _messages as anthropic_streaming
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._models import construct_type_unchecked
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from rollout_server.api.choice import Choice, Piece
from rollout_server.api.dialects import messages_request, response_items
from rollout_server.api.dialects.messages_request import parse_messages
from rollout_server.api.dialects.messages_stream import MessageEvents, content_blocks, stop_reason
from rollout_server.api.dialects.response_items import output_items
from rollout_server.api.dialects.responses_stream import ResponseEvents
from rollout_server.api.replies.reply import Reasoning, Reply, ReplyEvent, ToolCall, gather
from rollout_server.api.turn_run import Finished, Step
from rollout_server.messages import SamplingParams

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
arguments = st.dictionaries(texts, st.one_of(st.integers(), texts, st.lists(st.booleans(), max_size=2)), max_size=3)
calls = st.builds(
    ToolCall,
    id=st.uuids().map(lambda value: f"call_{value.hex}"),
    name=texts,
    arguments=arguments.map(lambda value: json.dumps(value, ensure_ascii=False)),
)
said = st.lists(st.one_of(texts, texts.map(Reasoning), calls), max_size=8)
"""Texts and thoughts in pieces, as a reader gives them out."""
steps_of_events = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def finished(reply: Reply, reason: str, stop: str | None = None) -> Finished:
    return Finished(0, reply, reason, stop, Choice([], SamplingParams()))


def steps(events: list[ReplyEvent], cuts: list[int], reason: str) -> list[Step]:
    """`cuts` say how many events each step has; some have none."""
    made, rest = [], list(events)
    for count in cuts:
        made.append(Step(0, rest[:count], Piece("", [7], [-0.5], []), None))
        rest = rest[count:]
    return [*made, Step(0, rest, None, finished(gather(events), reason))]


@settings(deadline=None)  # the SDK builds its types on the way
@given(events=said, cuts=steps_of_events, reason=st.sampled_from(["stop", "tool_calls", "length"]))
def test_streamed_items_are_those_of_the_whole_response(events: list[ReplyEvent], cuts: list[int], reason: str) -> None:
    writer = ResponseEvents("r")
    head = {"id": "resp_r", "object": "response", "status": "in_progress", "output": [], "tools": []}
    stream = writer.opening(head)
    for step in steps(events, cuts, reason):
        stream += writer.step(step)
    complete = reason != "length"
    items = output_items("r", gather(events).parts, finished=complete)
    final = {**head, "status": "completed" if complete else "incomplete", "output": items}
    stream.append(writer.closing(final))

    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["item"] for event in stream if event["type"] == "response.output_item.done"] == items
    for kind, of in (("output_text", "message"), ("reasoning_text", "reasoning")):
        deltas = [event for event in stream if event["type"] == f"response.{kind}.delta"]
        for at, item in enumerate(items):
            if item["type"] == of:
                heard = "".join(event["delta"] for event in deltas if event["output_index"] == at)
                assert heard == item["content"][0]["text"]

    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in stream:
        state.handle_event(construct_type_unchecked(type_=ResponseStreamEvent, value=event))
    assert (state._completed_response is not None) == complete


@given(events=said)
def test_items_that_come_back_are_the_message_that_was_remembered(events: list[ReplyEvent]) -> None:
    reply = gather(events)
    user = {"role": "user", "content": "?"}
    items = [user, *output_items("r", reply.parts, finished=True), user]
    assert response_items.messages_of(items) == [user, reply.as_message(), user]


@settings(deadline=None)
@given(events=said, cuts=steps_of_events, omits_thinking=st.booleans())
def test_streamed_blocks_are_those_of_the_whole_message(
    events: list[ReplyEvent], cuts: list[int], omits_thinking: bool
) -> None:
    writer = MessageEvents(omits_thinking=omits_thinking)
    head = {"id": "msg_r", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    usage = {"input_tokens": 1, "output_tokens": 1}
    stream: list[dict[str, Any]] = [{"type": "message_start", "message": {**head, "usage": usage}}]
    for step in steps(events, cuts, "stop"):
        stream += writer.step(step)
    for before, after in pairwise(stream[1:]):
        assert (before["type"] == "content_block_stop") == (after["type"] == "content_block_start")
    snapshot, buffers = None, {}
    for event in stream:
        snapshot = anthropic_streaming.accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    blocks = json.loads(msgspec.json.encode(content_blocks(gather(events).parts, omits_thinking=omits_thinking)))
    assert snapshot is not None
    assert not omits_thinking or not any(block.get("thinking") for block in blocks)
    assert [block.to_dict() for block in snapshot.content] == blocks


@given(events=said)
def test_blocks_that_come_back_are_the_message_that_was_remembered(events: list[ReplyEvent]) -> None:
    reply = gather(events)
    blocks = json.loads(msgspec.json.encode(content_blocks(reply.parts)))
    turns = [
        messages_request._Turn(role="user", content="?"),
        messages_request._Turn(role="assistant", content=blocks),
    ]
    _, message = messages_request.messages_of(turns)
    expected = reply.as_message()
    assert [json.loads(call["function"].pop("arguments")) for call in message.get("tool_calls", [])] == [
        json.loads(call["function"].pop("arguments")) for call in expected.get("tool_calls", [])
    ]
    assert message == expected


def test_why_a_message_ended() -> None:
    request = parse_messages(
        {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "stop_sequences": ["END"]}
    )
    reply = gather(["a"])
    assert stop_reason(finished(reply, "stop", "END"), request.stops) == ("stop_sequence", "END")
    assert stop_reason(finished(reply, "stop", "</tool_call>"), request.stops) == ("end_turn", None)
    assert stop_reason(finished(reply, "length"), request.stops) == ("max_tokens", None)
    assert stop_reason(finished(reply, "tool_calls", "</tool_call>"), request.stops) == ("tool_use", None)


def test_log_probs_come_with_the_deltas_and_none_is_left_out() -> None:
    writer = ResponseEvents("r", lambda piece: [{"token": str(token)} for token in piece.ids])
    events: list[ReplyEvent] = ["one", "two"]
    stream = [
        event
        for step in (
            Step(0, [], Piece("", [1], [0.0], []), None),
            Step(0, ["one"], Piece("one", [2, 3], [0.0, 0.0], []), None),
            Step(0, ["two"], Piece("two", [4], [0.0], []), None),
            Step(0, [], Piece("", [5], [0.0], []), None),
            Step(0, [], None, finished(gather(events), "stop")),
        )
        for event in writer.step(step)
    ]
    entries = [entry for event in stream if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert [entry["token"] for entry in entries] == list("12345")
    (item,) = [event["item"] for event in stream if event["type"] == "response.output_item.done"]
    (whole,) = output_items("r", ("onetwo",), finished=True)
    whole["content"][0]["logprobs"] = entries
    assert [item] == writer.items == [whole]
