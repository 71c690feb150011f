"""What the dialects of Responses and Messages ask of the policy, and what they refuse by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.api.dialects.messages_request import parse_messages
from rollout_server.api.dialects.response_store import ResponseStore
from rollout_server.api.dialects.responses_request import parse_responses
from rollout_server.api.errors import ApiError
from rollout_server.api.turn import JsonSchema, ToolChoice, Turn

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
FUNCTION = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}


def responses(**fields: Any) -> Turn:
    return parse_responses({"model": "m", "input": "hi", **fields}).turn([])


def messages(**fields: Any) -> Turn:
    return parse_messages(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    ).turn()


def test_a_responses_conversation_in_all_its_shapes() -> None:
    turn = responses(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "calling", "annotations": [], "logprobs": []}],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}", "status": "completed"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "assistant", "content": "so"},
            {"role": "assistant", "content": "on"},
        ],
    )
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ]
    assert turn.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "calling", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": "on"},
    ]


def test_what_a_responses_request_asks_for() -> None:
    turn = responses(
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "add"},
        parallel_tool_calls=False,
        max_output_tokens=5,
        temperature=0.5,
        top_k=3,
        min_p=0.1,
        seed=7,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}},
        reasoning={"effort": "high", "summary": "auto"},
        background=False,
        truncation="disabled",
        metadata={"k": "v"},
        user=None,
    )
    sampling = turn.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.min_p) == (5, 0.5, 3, 0.1)
    assert (sampling.seed, sampling.top_logprobs, sampling.n) == (7, 2, 1)
    function = {"name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
    assert turn.tools == [{"type": "function", "function": function}]
    assert (turn.tool_choice, turn.parallel_tool_calls) == (ToolChoice("required", ("add",)), False)
    assert turn.constraint == JsonSchema(SCHEMA)
    assert turn.template_options == {"reasoning_effort": "high"}
    assert responses(text={"format": {"type": "json_object"}}).constraint == JsonSchema({"type": "object"})
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}
    assert responses(tools=[FUNCTION], tool_choice=allowed).tool_choice == ToolChoice("auto", ("add",))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"surprise": 1}, "surprise"),
        ({"n": 2}, "n"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input.0.arguments"),
        ({"input": [{"role": "king", "content": ""}]}, "input.0.role"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
        ({"text": {"verbosity": "endless"}}, "text.verbosity"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_what_responses_refuses_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        responses(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_messages_conversation_in_all_its_shapes() -> None:
    turn = messages(
        system=[{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "two"}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "I "},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"x": 1}},
                    {"type": "text", "text": "say"},
                    {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [{"type": "text", "text": "no"}]},
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
        tools=[TOOL],
    )  # fmt: skip
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "t2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ]
    assert turn.messages == [
        {"role": "system", "content": "one\ntwo"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I say", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "go on"},
    ]
    assert not turn.continues


def test_what_a_messages_request_asks_for() -> None:
    turn = messages(
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is"}],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        stop_sequences=["END", ""],
        temperature=0,
        top_k=4,
        metadata={"user_id": "u"},
        service_tier="auto",
    )
    assert turn.continues
    assert (turn.tool_choice, turn.parallel_tool_calls) == (ToolChoice("required"), False)
    assert turn.template_options == {"enable_thinking": True}
    assert turn.constraint == JsonSchema(SCHEMA)
    sampling = turn.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.stops) == (9, 0, 4, ("END",))
    function = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
    assert turn.tools == [{"type": "function", "function": function}]
    named = messages(tools=[TOOL], tool_choice={"type": "tool", "name": "add"})
    assert named.tool_choice == ToolChoice("required", ("add",))
    assert messages(thinking={"type": "disabled"}).template_options == {"enable_thinking": False}


def test_a_harness_of_anthropics_may_edit_thinking_and_send_back_what_it_was_not_shown() -> None:
    thoughts = [
        {"type": "redacted_thinking", "data": "c2VhbGVk"},
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "Hello."},
    ]
    turn = messages(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": thoughts},
            {"role": "user", "content": "?"},
        ],
        context_management={
            "edits": [
                {"type": "clear_thinking_20251015"},
                {"type": "clear_thinking_20251015", "keep": "all"},
                {"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 2}},
            ]
        },
        thinking={"type": "adaptive", "display": "omitted"},
    )
    assert turn.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "?"},
    ]
    assert turn.template_options == {}


CALL = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
            "messages.0.content.0.content.0.type",
        ),
        ({"messages": [{"role": "assistant", "content": [CALL]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, "thinking.display"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0.type"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits.0.type"),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "some"}]}},
            "context_management.edits.0.keep",
        ),
        ({"container": "c"}, "container"),
        ({"speed": "fast"}, "speed"),
    ],
)  # fmt: skip
def test_what_messages_refuses_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def with_value(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = dict(body) if isinstance(body, dict) else list(body)
    changed[path[0]] = with_value(body[path[0]], path[1:], value)
    return changed


RESPONSES_BODY = {
    "model": "m",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
    ],
    "tools": [FUNCTION],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]},
    "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
    "reasoning": {"effort": "low"},
    "include": ["message.output_text.logprobs"],
}
MESSAGES_BODY = {
    "model": "m",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, CALL]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "add"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}


@given(data=st.data(), value=json_values)
def test_any_value_anywhere_is_understood_or_refused(data: st.DataObject, value: Any) -> None:
    for body, read in ((RESPONSES_BODY, responses), (MESSAGES_BODY, messages)):
        path = data.draw(st.sampled_from(places(body)[1:]))
        try:
            messages_read = read(**with_value(body, path, value)).messages
        except ApiError as refused:
            told, messages_read = (refused.status, bool(refused.param)), []
        else:
            told = None
        assert told in (None, (400, True))
        assert all(isinstance(message["content"], str | None) for message in messages_read)


def test_a_store_forgets_the_least_recently_used_and_never_grows() -> None:
    store = ResponseStore(max_bytes=10_000)
    for number in range(1000):
        store.keep("e", {"id": f"r{number}"}, [{"role": "user", "content": "x" * 300}])
        assert store.get("e", "r0") is not None
        assert store.used_bytes <= 10_000
    assert store.get("e", "r500") is None
    assert store.get("e", "r999") is not None
    assert store.get("", "r999") is None
    store.keep("e", {"id": "huge"}, [{"role": "user", "content": "x" * 20_000}])
    assert store.get("e", "huge") is None
    assert len(store) > 5
    for number in range(1000):
        store.forget("e", f"r{number}")
    assert (len(store), store.used_bytes) == (0, 0)
