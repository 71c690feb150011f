"""`/v1/messages` against a scripted manager: what the anthropic SDK sends and gets, and what is recorded of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rollout_server import messages as m
from rollout_server.api.config import WebConfig
from rollout_server.api.rendering.render import Renderer
from tests.integration.scripted_manager import tokens
from tests.integration.test_api import END, Setting, Web, fresh_web

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
TOOL: Any = {
    "name": "calculator",
    "description": "Evaluates.",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
HELLO: Any = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def shared_web(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with fresh_web(Setting(tiny_llama, tmp_path_factory.mktemp("web")), Renderer(tiny_llama)) as web:
        yield web


@pytest.fixture
def web(shared_web: Web) -> Web:
    shared_web.manager.reset()
    return shared_web


def client_of(web: Web, episode: str | None = None) -> anthropic.Anthropic:
    if episode is not None:
        web.begin(episode)
    prefix = f"/e/{episode}" if episode else ""
    return anthropic.Anthropic(base_url=f"{web.url}{prefix}", api_key="secret", max_retries=0, timeout=60)


def essence(message: Any) -> dict[str, Any]:
    """Without what names it and its calls."""
    told = message.to_dict()
    told.pop("id")
    for block in told["content"]:
        block.pop("id", None)
    return told


def test_a_message_whole_and_streamed(web: Web) -> None:
    client = client_of(web)
    web.says("Grüße 世界", "Grüße 世界", "Grüße 世界")
    whole = client.messages.create(
        **HELLO, system="Be brief.", metadata={"user_id": "u"}, extra_body={"temperature": 0.5}
    )
    prompt = web.renderer.prompt([{"role": "system", "content": "Be brief."}, *HELLO["messages"]], [])
    ids = [*web.renderer.encode("Grüße 世界"), END]
    (asked,) = web.manager.submitted
    assert (asked.prompt_ids, asked.sampling.temperature) == (prompt, 0.5)
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": "Grüße 世界"}]
    assert (whole.role, whole.model, whole.stop_reason, whole.stop_sequence) == ("assistant", "tiny", "end_turn", None)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len(prompt), len(ids))

    with client.messages.stream(**HELLO, system="Be brief.") as stream:
        assert "".join(stream.text_stream) == "Grüße 世界"
        assert essence(stream.get_final_message()) == essence(whole)
    kinds = [event.type for event in client.messages.create(**HELLO, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    counted = client.messages.count_tokens(model="tiny", messages=HELLO["messages"], system="Be brief.")
    assert counted.input_tokens == len(prompt)


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_round_trip_and_extend(web: Web, streamed: bool) -> None:
    episode = f"ep-tools-{streamed}"
    client = client_of(web, episode)
    web.says(f"Let me see. {CALL}\n{CALL}", "It is 42.")

    def say(messages: list[Any]) -> Any:
        asked: Any = {"model": "gpt-claude", "max_tokens": 50, "tools": [TOOL], "messages": messages}
        if not streamed:
            return client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            return stream.get_final_message()

    messages: list[Any] = [{"role": "user", "content": "6*7?"}]
    first = say(messages)
    assert first.stop_reason == "tool_use"
    text, one, two = first.content
    assert (text.text, one.name, one.input) == ("Let me see.", "calculator", {"expression": "6*7"})
    results = [
        {"type": "tool_result", "tool_use_id": one.id, "content": "42"},
        {"type": "tool_result", "tool_use_id": two.id, "content": [{"type": "text", "text": "no"}], "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    assert say(messages).content[0].text == "It is 42."

    a, b = web.store.episode(episode).calls
    assert (a.parent_id, b.parent_id) == (None, a.id)
    known = a.prompt_ids + a.sampled_ids
    assert b.prompt_ids[: len(known)] == known
    assert web.renderer.decode(b.prompt_ids[len(known) :], special=True).endswith(
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>tool\nError: no<|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )
    spans = web.store.episode(episode).spans
    assert sorted((span.name, span.attributes["result"]) for span in spans) == [
        ("calculator", "42"),
        ("calculator", "Error: no"),
    ]


def test_why_a_message_ended(web: Web) -> None:
    client = client_of(web)
    web.says("one two", end=False)
    assert client.messages.create(**HELLO).stop_reason == "max_tokens"
    ids = web.renderer.encode("one two STOP three")
    web.manager.script = lambda submit: [tokens(submit, ids[:3]), tokens(submit, ids[3:])]
    stopped = client.messages.create(**HELLO, stop_sequences=["STOP"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    assert stopped.content[0].text == "one two "
    web.says(CALL + CALL)
    one = client.messages.create(**HELLO, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert (one.stop_reason, one.stop_sequence, len(one.content)) == ("tool_use", None, 1)


def test_a_reply_goes_on_with_what_the_client_began(web: Web) -> None:
    client = client_of(web, "ep-prefill")
    web.says(" 42.", "Yes.")
    question = {"role": "user", "content": "6*7?"}
    begun: list[Any] = [question, {"role": "assistant", "content": "It is"}]
    first = client.messages.create(model="tiny", max_tokens=9, messages=begun)
    assert first.content[0].text == " 42."
    whole: list[Any] = [question, {"role": "assistant", "content": "It is 42."}, {"role": "user", "content": "Sure?"}]
    client.messages.create(model="tiny", max_tokens=9, messages=whole)
    a, b = web.store.episode("ep-prefill").calls
    assert web.renderer.decode(a.prompt_ids, special=True).endswith("<|im_start|>assistant\nIt is")
    assert b.parent_id == a.id
    assert b.prompt_ids[: len(a.prompt_ids) + len(a.sampled_ids)] == a.prompt_ids + a.sampled_ids


class Reasons(Setting):
    def __call__(self, listen_fd: int) -> WebConfig:
        return msgspec.structs.replace(super().__call__(listen_fd), reasoning_parser="think")


def test_thinking_is_a_block_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    with fresh_web(Reasons(tiny_llama, tmp_path), Renderer(tiny_llama)) as web:
        client = client_of(web, "ep")
        said = f"<think>Six times seven.</think>Let me see. {CALL}"
        web.says(said, said, "42.")
        asked: Any = {"model": "tiny", "max_tokens": 50, "tools": [TOOL]}
        question = {"role": "user", "content": "6*7?"}
        first = client.messages.create(**asked, messages=[question], thinking={"type": "adaptive"})
        assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
        assert first.content[0].thinking == "Six times seven."
        with client.messages.stream(**asked, messages=[question]) as stream:
            assert essence(stream.get_final_message())["content"] == essence(first)["content"]
        result = {"type": "tool_result", "tool_use_id": first.content[2].id, "content": "42"}
        history = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        client.messages.create(**asked, messages=history)
        one, _, three = web.store.episode("ep").calls
        assert three.prompt_ids[: len(one.prompt_ids) + len(one.sampled_ids)] == one.prompt_ids + one.sampled_ids


def test_thinking_that_is_omitted_goes_on_all_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    """As harnesses ask that show no thinking and have the API clear it."""
    with fresh_web(Reasons(tiny_llama, tmp_path), Renderer(tiny_llama)) as web:
        client = client_of(web, "ep")
        said = "<think>Six times seven.</think>42."
        web.says(said, said, "Yes.")
        asked: Any = {
            "model": "tiny",
            "max_tokens": 50,
            "thinking": {"type": "adaptive", "display": "omitted"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "betas": ["context-management-2025-06-27"],
        }
        question: Any = {"role": "user", "content": "6*7?"}
        first = client.beta.messages.create(**asked, messages=[question])
        assert [(block.type, getattr(block, "thinking", None)) for block in first.content] == [
            ("thinking", ""),
            ("text", None),
        ]
        assert first.context_management is not None
        assert first.context_management.applied_edits == []
        with client.beta.messages.stream(**asked, messages=[question]) as stream:
            assert essence(stream.get_final_message()) == essence(first)
        sealed = {"type": "redacted_thinking", "data": "c2VhbGVk"}
        history: Any = [question, {"role": "assistant", "content": [sealed, *first.content]}]
        client.beta.messages.create(**asked, messages=[*history, {"role": "user", "content": "Sure?"}])
        one, _, three = web.store.episode("ep").calls
        assert three.prompt_ids[: len(one.prompt_ids) + len(one.sampled_ids)] == one.prompt_ids + one.sampled_ids


class Answer(BaseModel):
    number: int


def test_parsed_replies_and_required_tools_are_constrained(web: Web) -> None:
    client = client_of(web)
    web.says('{"number": 42}', CALL)
    assert client.messages.parse(**HELLO, output_format=Answer).parsed_output == Answer(number=42)
    client.messages.create(**HELLO, tools=[TOOL], tool_choice={"type": "tool", "name": "calculator"})
    assert all(submit.grammar for submit in web.manager.submitted)


def test_errors_have_anthropics_shape(web: Web) -> None:
    client = client_of(web)
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**HELLO, "messages": [{"role": "user", "content": "long " * 5000}]})
    assert caught.value.body["error"]["param"] == "messages"
    assert caught.value.body["type"] == "error"
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.type"):
        client.messages.create(**HELLO, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    schema: Any = {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.input_schema"):
        client.messages.create(**HELLO, tools=[{"name": "a", "input_schema": schema, "strict": True}])
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**HELLO, "model": "claude-none"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**HELLO)
    assert web.manager.submitted == []


def test_a_stream_that_breaks_ends_in_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    with fresh_web(Setting(tiny_llama, tmp_path), Renderer(tiny_llama)) as web:
        web.manager.script = lambda submit: [tokens(submit, web.renderer.encode("one"))]
        stream = client_of(web).messages.create(**HELLO, stream=True)
        heard.append(next(stream).type)
        web.manager.stop()
        with pytest.raises(anthropic.APIStatusError) as caught:
            heard += (event.type for event in stream)
    assert heard[0] == "message_start"
    assert "content_block_delta" in heard
    error: Any = caught.value.body
    assert (error["error"]["type"], error["error"]["code"]) == ("overloaded_error", "engine_unavailable")


def test_the_async_client(web: Web) -> None:
    async def talk() -> tuple[Any, Any]:
        async with anthropic.AsyncAnthropic(base_url=web.url, auth_token="secret", max_retries=0) as client:
            whole = await client.messages.create(**HELLO)
            async with client.messages.stream(**HELLO) as stream:
                return whole, await stream.get_final_message()

    web.says("one", "one")
    whole, streamed = asyncio.run(talk())
    assert essence(whole) == essence(streamed)


@settings(deadline=None, max_examples=25)
@given(
    said=st.lists(st.sampled_from([CALL, "So: ", "<tool_call>{oops</tool_call>", "世", "<", " \n", "STOP"]), max_size=6),
    cuts=st.lists(st.integers(1, 12), max_size=20),
    reason=st.sampled_from(["stop", "length"]),
)  # fmt: skip
def test_a_streamed_message_equals_the_whole_one(
    shared_web: Web, said: list[str], cuts: list[int], reason: str
) -> None:
    ids = [*shared_web.renderer.encode("".join(said)), END]

    def script(submit: m.Submit) -> list[m.FromManager]:
        pieces, rest = [], ids
        for size in cuts:
            pieces, rest = [*pieces, rest[:size]], rest[size:]
        pieces = [piece for piece in [*pieces, rest] if piece]
        last = len(pieces) - 1
        return [tokens(submit, piece, reason if at == last else None) for at, piece in enumerate(pieces)]

    shared_web.manager.script = script
    client = client_of(shared_web)
    whole = client.messages.create(**HELLO, tools=[TOOL], stop_sequences=["STOP"])
    with client.messages.stream(**HELLO, tools=[TOOL], stop_sequences=["STOP"]) as stream:
        assert essence(stream.get_final_message()) == essence(whole)
