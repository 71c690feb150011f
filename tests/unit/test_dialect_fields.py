"""What all dialects' fields have in common: null means absent, "off" is let through, stop strings are bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rollout_server.api.dialects.chat_request import parse_chat
from rollout_server.api.dialects.completions import parse_completion
from rollout_server.api.dialects.fields import parse
from rollout_server.api.dialects.generate import GenerateRequest
from rollout_server.api.dialects.messages_request import parse_messages
from rollout_server.api.dialects.responses_request import parse_responses
from rollout_server.api.errors import ApiError
from rollout_server.api.turn import JsonSchema, SamplingOptions

HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> SamplingOptions:
    return parse_chat({"model": "m", "messages": HELLO, **fields}).turn().sampling


def completion(**fields: Any) -> SamplingOptions:
    return parse_completion({"model": "m", "prompt": "hi", **fields}).options()


def responses(**fields: Any) -> SamplingOptions:
    return parse_responses({"model": "m", "input": "hi", **fields}).turn([]).sampling


def messages(**fields: Any) -> SamplingOptions:
    return parse_messages({"model": "m", "max_tokens": 9, "messages": HELLO, **fields}).turn().sampling


def generate(**fields: Any) -> SamplingOptions:
    return parse(GenerateRequest, {"input_ids": [1], **fields}).options()


def refused(ask: Callable[..., Any], **fields: Any) -> str | None:
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert caught.value.status == 400
    return caught.value.param


def test_null_means_absent_at_any_depth() -> None:
    assert chat(stop=None, stream_options={"include_usage": None, "continuous_usage_stats": True}) == chat()
    assert generate(sampling_params={"stop": None, "temperature": None, "n": None}, rid=None) == generate()
    assert responses(reasoning={"effort": None}, text={"format": None, "verbosity": None}) == responses()
    assert messages(thinking={"type": "adaptive", "display": None}, output_config={"effort": None}) == messages()
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turn = parse_chat({"model": "m", "messages": history}).turn()
    assert turn.messages[1]["tool_calls"][0]["id"] == ""
    assert refused(chat, messages=[{"role": None, "content": "hi"}]) == "messages.0.role"


def test_nulls_of_the_users_own_data_stay() -> None:
    schema = {"type": ["string", "null"], "default": None, "enum": ["a", None]}
    function = {"name": "f", "parameters": schema}
    turn = parse_chat(
        {
            "model": "m",
            "messages": HELLO,
            "tools": [{"type": "function", "function": function}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
            "chat_template_kwargs": {"persona": None},
        }
    ).turn()
    assert turn.constraint == JsonSchema(schema)
    assert turn.tools[0]["function"]["parameters"]["default"] is None
    assert turn.template_options == {"persona": None}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": None}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": None}
    said = [*HELLO, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    history = parse_messages({"model": "m", "max_tokens": 9, "messages": said}).turn().messages
    assert history[1]["tool_calls"][0]["function"]["arguments"] == '{"x": null}'
    assert history[2]["content"] == ""


OFF: dict[str, Any] = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "use_beam_search": False,
    "prompt_cache_retention": "24h",
    "stream_options": {"include_obfuscation": False},
}


@pytest.mark.parametrize("ask", [chat, completion, responses])
def test_values_that_ask_for_nothing_are_let_through(ask: Callable[..., SamplingOptions]) -> None:
    assert ask(**OFF) == ask()
    assert refused(ask, length_penalty=0.5) == "length_penalty"
    assert refused(ask, use_beam_search=True) == "use_beam_search"
    assert refused(ask, include_stop_str_in_output=True) == "include_stop_str_in_output"
    assert refused(ask, stream_options={"include_obfuscation": True}) == "stream_options.include_obfuscation"


def test_generate_lets_through_what_asks_for_nothing() -> None:
    params = {
        "skip_special_tokens": True,
        "spaces_between_special_tokens": False,
        "no_stop_trim": False,
        "min_new_tokens": 0,
    }
    fields = {"rid": "r", "logprob_start_len": -1, "return_text_in_logprobs": False, "return_hidden_states": False}
    assert generate(sampling_params=params, **fields) == generate()
    assert refused(generate, sampling_params={"no_stop_trim": True}) == "sampling_params.no_stop_trim"
    assert refused(generate, sampling_params={"skip_special_tokens": False}) == "sampling_params.skip_special_tokens"
    assert refused(generate, logprob_start_len=0) == "logprob_start_len"


@pytest.mark.parametrize("verbosity", ["low", "medium", "high"])
def test_verbosity_is_the_templates(verbosity: str) -> None:
    turn = parse_chat({"model": "m", "messages": HELLO, "verbosity": verbosity}).turn()
    other = parse_responses({"model": "m", "input": "hi", "text": {"verbosity": verbosity}}).turn([])
    assert turn.template_options == other.template_options == {"verbosity": verbosity}


def test_a_reply_has_no_fewer_tokens_than_are_asked_for() -> None:
    assert chat(min_tokens=3).min_tokens == 3
    assert completion(min_tokens=3, max_tokens=3).min_tokens == 3
    assert responses(min_tokens=3, max_output_tokens=9).min_tokens == 3
    assert generate(sampling_params={"min_new_tokens": 3}).min_tokens == 3
    assert refused(chat, min_tokens=3, max_completion_tokens=2) == "min_tokens"
    assert refused(completion, min_tokens=17) == "min_tokens"  # of 16
    assert refused(generate, sampling_params={"min_new_tokens": 129}) == "sampling_params.min_new_tokens"


@pytest.mark.parametrize(
    ("ask", "param", "place"),
    [
        (chat, "stop", lambda stop: {"stop": stop}),
        (completion, "stop", lambda stop: {"stop": stop}),
        (responses, "stop", lambda stop: {"stop": stop}),
        (messages, "stop_sequences", lambda stop: {"stop_sequences": [stop] if isinstance(stop, str) else stop}),
        (generate, "sampling_params.stop", lambda stop: {"sampling_params": {"stop": stop}}),
    ],
)
def test_stop_strings_are_bounded_together(
    ask: Callable[..., SamplingOptions], param: str, place: Callable[[Any], dict[str, Any]]
) -> None:
    assert ask(**place(["x" * 64] * 64)).stops == ("x" * 64,) * 64
    assert ask(**place(["", "END"])).stops == ("END",)
    for many in ("x" * 4097, ["x" * 65] * 64, ["x"] * 65):
        assert refused(ask, **place(many)) == param
