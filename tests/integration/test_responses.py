"""`/v1/responses` against a scripted manager: what the openai SDK and the OpenAI Agents SDK send and get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import agents
import msgspec
import openai
import pytest
from agents import Agent, OpenAIResponsesModel, RunConfig, Runner
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
    "type": "function",
    "name": "calculator",
    "description": "Evaluates.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "strict": False,
}
UNSERVABLE = {**TOOL, "parameters": {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}, "strict": True}
UNSTREAMED = ("id", "created_at", "completed_at", "previous_response_id")
"""What differs between two equal responses."""


@pytest.fixture(scope="module")
def shared_web(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with fresh_web(Setting(tiny_llama, tmp_path_factory.mktemp("web")), Renderer(tiny_llama)) as web:
        yield web


@pytest.fixture
def web(shared_web: Web) -> Web:
    shared_web.manager.reset()
    return shared_web


def essence(response: Any) -> dict[str, Any]:
    """Without what names it and its items."""
    told = response.to_dict()
    for name in UNSTREAMED:
        told.pop(name, None)
    for item in told["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return told


def test_a_response_whole_and_streamed(web: Web) -> None:
    client = web.client()
    asked: Any = {
        "model": "gpt-5",
        "input": "Hello",
        "max_output_tokens": 50,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "extra_body": {"return_token_ids": True, "seed": 1},
    }
    web.says("Grüße 世界", "Grüße 世界")
    whole = client.responses.create(**asked)
    ids = [*web.renderer.encode("Grüße 世界"), END]
    assert whole.output_text == "Grüße 世界"
    assert (whole.status, whole.model, whole.error, whole.incomplete_details) == ("completed", "tiny", None, None)
    assert whole.usage is not None
    prompt = web.renderer.prompt([{"role": "user", "content": "Hello"}], [])
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (len(prompt), len(ids))
    assert whole.usage.total_tokens == len(prompt) + len(ids)
    extra: Any = whole.model_extra
    assert (extra["prompt_token_ids"], extra["token_ids"]) == (prompt, ids)
    logprobs = whole.output[0].content[0].logprobs
    assert [entry.logprob for entry in logprobs or []] == [-i / 1000 for i in ids]

    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    last = events[-1]
    assert last.type == "response.completed"
    assert essence(last.response) == essence(whole)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == "Grüße 世界"
    assert [entry.logprob for event in deltas for entry in event.logprobs] == [-i / 1000 for i in ids]
    assert client.responses.retrieve(whole.id).to_dict() == whole.to_dict()


def test_conversations_go_on_token_for_token(web: Web) -> None:
    """By `previous_response_id`, and by items that the client sends back."""
    client = web.begin("ep-state")
    web.says(f"Let me see. {CALL}{CALL} and", "It is 42.", "Bye.", "Ciao.")
    first = client.responses.create(model="tiny", input="6*7?", instructions="Be brief.", tools=[TOOL])
    assert [item.type for item in first.output] == ["message", "function_call", "function_call", "message"]
    calls = [item for item in first.output if item.type == "function_call"]
    assert json.loads(calls[0].arguments) == {"expression": "6*7"}
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": str(41 + number)}
        for number, call in enumerate(calls)
    ]
    common: Any = {"model": "tiny", "instructions": "Be brief.", "tools": [TOOL]}
    second = client.responses.create(**common, input=results, previous_response_id=first.id)
    assert second.output_text == "It is 42."
    assert second.previous_response_id == first.id
    client.responses.create(**common, input="Thanks.", previous_response_id=second.id)
    history: list[Any] = [{"role": "user", "content": "6*7?"}, *first.output, *results, *second.output]
    with client.responses.stream(**common, input=[*history, {"role": "user", "content": "Grazie."}]) as stream:
        assert stream.get_final_response().output_text == "Ciao."

    one, two, three, four = web.store.episode("ep-state").calls
    assert [call.parent_id for call in (one, two, three, four)] == [None, one.id, two.id, two.id]
    assert two.prompt_ids[: len(one.prompt_ids) + len(one.sampled_ids)] == one.prompt_ids + one.sampled_ids
    for later in (three, four):
        assert later.prompt_ids[: len(two.prompt_ids) + len(two.sampled_ids)] == two.prompt_ids + two.sampled_ids
    spans = web.store.episode("ep-state").spans
    assert sorted((span.name, span.attributes["result"]) for span in spans) == [
        ("calculator", "41"),
        ("calculator", "42"),
    ]


def test_instructions_hold_for_one_response(web: Web) -> None:
    client = web.client()
    web.says("a", "b")
    first = client.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    client.responses.create(model="tiny", input="Ho", previous_response_id=first.id)
    _, second = web.manager.submitted
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Ho"},
    ]
    assert web.renderer.decode(second.prompt_ids, special=True) == web.renderer.text(messages, [])


def test_what_is_not_stored_is_not_found(web: Web) -> None:
    client, episode = web.client(), web.begin("ep-forget")
    web.says("a", "b")
    kept = client.responses.create(model="tiny", input="Hi")
    unkept = client.responses.create(model="tiny", input="Hi", store=False)
    for asking, name in ((client, unkept.id), (episode, kept.id), (client, "resp_none")):
        with pytest.raises(openai.NotFoundError) as caught:
            asking.responses.create(model="tiny", input="Ho", previous_response_id=name)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "response_not_found")
        with pytest.raises(openai.NotFoundError):
            asking.responses.retrieve(name)
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(kept.id)
    assert len(web.manager.submitted) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_cut_short_is_incomplete(web: Web, stream: bool) -> None:
    web.says("one two", end=False)
    made: Any = web.client().responses.create(model="tiny", input="Hi", max_output_tokens=3, stream=stream)
    if stream:
        *_, last = made
        assert last.type == "response.incomplete"
        made = last.response
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (made.output[0].status, made.output_text) == ("incomplete", "one two")


def test_a_stream_that_breaks_ends_in_a_failed_response(tiny_llama: Path, tmp_path: Path) -> None:
    with fresh_web(Setting(tiny_llama, tmp_path), Renderer(tiny_llama)) as web:
        web.manager.script = lambda submit: [tokens(submit, web.renderer.encode("one"))]
        events = []
        for event in web.client().responses.create(model="tiny", input="Hi", stream=True):
            events.append(event)
            web.manager.stop()
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.type) == ("server_error", "engine_unavailable")
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_errors_name_the_fields_of_this_dialect(web: Web) -> None:
    client = web.client()
    for fields, param in (
        ({"input": "long " * 5000}, "input"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [UNSERVABLE]}, "tools.0.parameters"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": 5}}}}, "text.format"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": "tiny", "input": "Hi", **fields})
        assert caught.value.param == param
    assert web.manager.submitted == []


class Answer(BaseModel):
    number: int


def test_parsed_replies_are_constrained(web: Web) -> None:
    web.says('{"number": 42}', '{"number": 42}')
    client = web.client()
    parsed = client.responses.parse(model="tiny", input="6*7?", text_format=Answer)
    assert parsed.output_parsed == Answer(number=42)
    with client.responses.stream(model="tiny", input="6*7?", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(number=42)
    assert all(submit.grammar for submit in web.manager.submitted)


def test_the_async_client(web: Web) -> None:
    async def talk() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key="secret", max_retries=0) as client:
            whole = await client.responses.create(model="tiny", input="Hi")
            async with client.responses.stream(model="tiny", input="Hi") as stream:
                return whole.output_text, (await stream.get_final_response()).output_text

    web.says("one", "two")
    assert asyncio.run(talk()) == ("one", "two")


@settings(deadline=None, max_examples=25)
@given(
    said=st.lists(st.sampled_from([CALL, "So: ", "<tool_call>{oops</tool_call>", "世", "<", " \n", "e\u0301"]), max_size=6),
    cuts=st.lists(st.integers(1, 12), max_size=20),
    reason=st.sampled_from(["stop", "length"]),
)  # fmt: skip
def test_a_streamed_response_equals_the_whole_one(
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
    asked: Any = {"model": "tiny", "input": "Hi", "tools": [TOOL], "include": ["message.output_text.logprobs"]}
    whole = shared_web.client().responses.create(**asked)
    events = list(shared_web.client().responses.create(**asked, stream=True))
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert essence(last.response) == essence(whole)
    assert [item.to_dict() for item in last.response.output] == [
        event.item.to_dict() for event in events if event.type == "response.output_item.done"
    ]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_log_probs_are_of_the_message_that_their_tokens_are_in(web: Web, size: int) -> None:
    """However they come: a message's own, and those of the call behind it."""
    before, after = web.renderer.encode(f"Let me see. {CALL}"), [*web.renderer.encode(" So it is."), END]
    ids = before + after
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    web.manager.script = lambda submit: [
        tokens(submit, piece, "stop" if piece is pieces[-1] else None) for piece in pieces
    ]
    asked: Any = {"model": "tiny", "input": "Hi", "tools": [TOOL], "include": ["message.output_text.logprobs"]}
    whole = web.client().responses.create(**asked)
    assert [item.type for item in whole.output] == ["message", "function_call", "message"]
    first, _, second = whole.output
    for item, said in ((first, before), (second, after)):
        assert [entry.logprob for entry in item.content[0].logprobs] == [-i / 1000 for i in said]
    streamed: Any = list(web.client().responses.create(**asked, stream=True))
    assert essence(streamed[-1].response) == essence(whole)


class Reasons(Setting):
    def __call__(self, listen_fd: int) -> WebConfig:
        return msgspec.structs.replace(super().__call__(listen_fd), reasoning_parser="think")


def test_reasoning_is_an_item_of_its_own_and_may_come_back(tiny_llama: Path, tmp_path: Path) -> None:
    with fresh_web(Reasons(tiny_llama, tmp_path), Renderer(tiny_llama)) as web:
        client = web.begin("ep")
        said = f"<think>Six times seven.</think>Let me see. {CALL}"
        web.says(said, said, "42.")
        first = client.responses.create(model="tiny", input="6*7?", tools=[TOOL])
        thought, _, call = first.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Six times seven.")
        assert first.usage is not None
        assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
        events = list(client.responses.create(model="tiny", input="6*7?", tools=[TOOL], stream=True))
        heard = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert heard == "Six times seven."
        assert events[-1].type == "response.completed"
        assert essence(events[-1].response) == essence(first)
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
        history: Any = [{"role": "user", "content": "6*7?"}, *first.output, result]
        assert client.responses.create(model="tiny", input=history, tools=[TOOL]).output_text == "42."
        one, two, three = web.store.episode("ep").calls
        assert three.parent_id in (one.id, two.id)
        assert three.prompt_ids[: len(one.prompt_ids) + len(one.sampled_ids)] == one.prompt_ids + one.sampled_ids


# The Agents SDK


def runs(web: Web, agent: Agent[Any], question: str, episode: str, streamed: bool = False) -> tuple[Any, list[str]]:
    """The final output, and the kinds of run items in order."""

    async def work() -> tuple[Any, list[str]]:
        agents.set_tracing_disabled(True)
        config = RunConfig(tracing_disabled=True)
        if streamed:
            result: Any = Runner.run_streamed(agent, question, run_config=config)
            async for _ in result.stream_events():
                pass
        else:
            result = await Runner.run(agent, question, run_config=config)
        return result.final_output, [item.type for item in result.new_items]

    web.begin(episode)
    return asyncio.run(work())


def model(web: Web, episode: str) -> OpenAIResponsesModel:
    client = openai.AsyncOpenAI(base_url=f"{web.url}/e/{episode}/v1", api_key="secret", max_retries=0)
    return OpenAIResponsesModel(model="tiny", openai_client=client)


@agents.function_tool
def calculator(expression: str) -> str:
    """Evaluates."""
    return {"6*7": "42", "6*8": "48"}[expression]


@pytest.mark.parametrize("streamed", [False, True])
def test_agents_sdk_calls_tools_and_each_turn_extends_the_last(web: Web, streamed: bool) -> None:
    episode = f"ep-agents-{streamed}"
    agent = Agent(name="Solver", instructions="Be brief.", tools=[calculator], model=model(web, episode))
    other = CALL.replace("6*7", "6*8")
    web.says(f"Both. {CALL}\n{other}", CALL, "42 and 48.")
    answer, kinds = runs(web, agent, "6*7 and 6*8?", episode, streamed)
    assert answer == "42 and 48."
    assert kinds.count("tool_call_output_item") == 3
    calls = web.store.episode(episode).calls
    assert [call.parent_id for call in calls] == [None, calls[0].id, calls[1].id]
    for before, after in pairwise(calls):
        known = before.prompt_ids + before.sampled_ids
        assert after.prompt_ids[: len(known)] == known
    assert len(web.store.episode(episode).spans) == 3


def test_agents_sdk_hands_off_and_parses_the_last_answer(web: Web) -> None:
    episode = "ep-handoff"
    served = model(web, episode)
    solver = Agent(name="Solver", instructions="Solve.", output_type=Answer, model=served)
    front = Agent(name="Front", instructions="Hand off.", handoffs=[solver], model=served)
    handoff = '<tool_call>{"name": "transfer_to_solver", "arguments": {}}</tool_call>'
    web.says(handoff, '{"number": 42}')
    answer, kinds = runs(web, front, "6*7?", episode)
    assert answer == Answer(number=42)
    assert kinds == ["handoff_call_item", "handoff_output_item", "message_output_item"]
    tools, answers = (submit.grammar for submit in web.manager.submitted)  # the SDK's tools are strict
    assert "transfer_to_solver" in tools
    assert "number" in answers
    assert "transfer_to_solver" not in answers


def test_agents_sdk_goes_on_by_previous_response_id(web: Web) -> None:
    episode = "ep-previous"
    agent = Agent(name="Solver", instructions="Be brief.", tools=[calculator], model=model(web, episode))
    web.says(CALL, "42.", "Bye.")

    async def work() -> str:
        config = RunConfig(tracing_disabled=True)
        first = await Runner.run(agent, "6*7?", run_config=config)
        again = await Runner.run(agent, "Thanks.", run_config=config, previous_response_id=first.last_response_id)
        return str(again.final_output)

    web.begin(episode)
    assert asyncio.run(work()) == "Bye."
    calls = web.store.episode(episode).calls
    assert [call.parent_id for call in calls] == [None, calls[0].id, calls[1].id]
