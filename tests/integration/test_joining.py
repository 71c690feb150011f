"""Whose a call is: said by header, path or key, in every dialect, by every SDK, however many episodes share a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from lightning_rl.episode import Call, EpisodeStart, Task
from lightning_rl.join import EPISODE_HEADER, SPAN_HEADER, episode_key, episode_url
from lightning_rl.store import Store
from rollout_server import messages as m
from rollout_server.api.rendering.render import Renderer
from tests.integration.scripted_manager import one_by_one
from tests.integration.served_web import CHAT, Served, at_once, hello, served
from tests.unit.test_render import TOOL

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
END = 2


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joining") / "episodes.db"


@pytest.fixture(scope="module")
def store(store_path: Path) -> Iterator[Store]:
    with Store.open(store_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def web(tiny_llama: Path, store_path: Path) -> Iterator[Served]:
    with served(tiny_llama, store=str(store_path), api_key="KEY") as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(web: Served) -> None:
    web.manager.reset()
    web.manager.script = at_once


def begin(store: Store, *names: str) -> None:
    for name in names:
        store.begin(EpisodeStart(id=name, task=Task(id="t", input={}), phase="train"))


def calls(store: Store, episode: str) -> list[Call]:
    return store.episode(episode).calls


def test_header_path_and_key_are_the_same_to_every_sdk(web: Served, store: Store) -> None:
    ways: dict[str, dict[str, Any]] = {
        "header": {"at": web.url, "key": "KEY", "headers": {EPISODE_HEADER: "by-header"}},
        "path": {"at": episode_url(web.url, "by-path"), "key": "KEY", "headers": {}},
        "key": {"at": web.url, "key": episode_key("KEY", "by-key"), "headers": {}},
    }

    async def asynchronously(at: str, key: str, headers: dict[str, str]) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{at}/v1", api_key=key, default_headers=headers, max_retries=0
        ) as client:
            made = await client.chat.completions.create(model="tiny", messages=HELLO)
            streamed = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            return [made.id, {chunk.id async for chunk in streamed}.pop()]

    for way, how in ways.items():
        begin(store, f"by-{way}")
        at, key, headers = how["at"], how["key"], how["headers"]
        client = openai.OpenAI(base_url=f"{at}/v1", api_key=key, default_headers=headers, max_retries=0)
        ids = [client.chat.completions.create(model="tiny", messages=HELLO).id]
        ids.append(next(iter(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))).id)
        ids += asyncio.run(asynchronously(at, key, headers))
        ids += [client.completions.create(model="tiny", prompt="a", n=2).id] * 2
        ids.append(client.responses.create(model="tiny", input="a").id)
        with client.responses.stream(model="tiny", input="a") as events:
            ids.append(events.get_final_response().id)
        claude = anthropic.Anthropic(base_url=at, api_key=key, default_headers=headers, max_retries=0)
        ids.append(claude.messages.create(model="tiny", max_tokens=4, messages=HELLO).id)
        with claude.messages.stream(model="tiny", max_tokens=4, messages=HELLO) as stream:
            ids.append(stream.get_final_message().id)
        bearer = {"authorization": f"Bearer {key}", **headers}
        said = {"text": "a", "sampling_params": {"n": 2, "max_new_tokens": 4}}
        path = how["at"].removeprefix(web.url)
        ids += [entry["meta_info"]["id"] for entry in web.post(f"{path}/generate", said, headers=bearer).json()]
        assert web.post(f"{path}/generate", {"text": "a", "rid": "mine"}, headers=bearer).status_code == 200
        ids.append("mine")
        assert [call.response_id for call in calls(store, f"by-{way}")] == ids
        assert len({call.response_id.split("_")[0].split("-")[0] for call in calls(store, f"by-{way}")[:-3]}) == 4
        assert {submit.flow for submit in web.manager.submitted} == {f"e:by-{way}"}
        web.manager.submitted.clear()


def test_the_header_counts_before_the_path_and_the_path_before_the_key(web: Served, store: Store) -> None:
    begin(store, "first", "second", "third")
    key = {"authorization": f"Bearer {episode_key('KEY', 'third')}"}
    assert web.post(f"/e/second{CHAT}", headers={**key, EPISODE_HEADER: "first"}).status_code == 200
    assert web.post(f"/e/second{CHAT}", headers=key).status_code == 200
    assert web.post(CHAT, headers=key).status_code == 200
    assert [len(calls(store, name)) for name in ("first", "second", "third")] == [1, 1, 1]


def test_an_episode_opens_no_door(web: Served, store: Store, tiny_llama: Path) -> None:
    begin(store, "locked")

    def status(key: str, path: str = CHAT, **headers: str) -> tuple[int, str]:
        answer = web.post(path, headers={"authorization": f"Bearer {key}", **headers})
        return answer.status_code, answer.json().get("error", {}).get("code", "")

    for key in ("wrong", "wrong/e/locked", "/e/locked", "KEY/e/", "KEYS/e/locked", "KEY/e/x/e/locked"):
        assert status(key) == (401, "invalid_api_key")
        assert status(key, f"/e/locked{CHAT}") == (401, "invalid_api_key")
        assert status(key, **{EPISODE_HEADER: "locked"}) == (401, "invalid_api_key")
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=web.url, api_key="wrong/e/locked", max_retries=0).messages.create(
            model="tiny", max_tokens=4, messages=HELLO
        )
    assert web.post("/pause", {}, headers={"authorization": "Bearer admin/e/locked"}).status_code == 401
    assert calls(store, "locked") == []
    for unknown in (
        status("KEY", **{EPISODE_HEADER: "nobody"}),
        status("KEY", f"/e/nobody{CHAT}"),
        status("KEY/e/nobody"),
        status("KEY", f"/e/%00{CHAT}"),
    ):
        assert unknown == (404, "episode_not_found")
    assert status("KEY", **{EPISODE_HEADER: ""}) == (400, "invalid_header")
    with served(tiny_llama, api_key="own/e/key") as odd:  # a key that ends as if it said an episode
        assert odd.post(headers={"authorization": "Bearer own/e/key"}).status_code == 200
        assert odd.post(headers={"authorization": "Bearer own"}).status_code == 401
    with served(tiny_llama) as without_store:
        assert without_store.post(headers={EPISODE_HEADER: "x"}).status_code == 404
        assert without_store.get("/health", headers={EPISODE_HEADER: "x"}).status_code == 200


def test_spans_come_from_our_header_or_from_a_traceparent(web: Served, store: Store) -> None:
    begin(store, "spans")
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    given: list[tuple[dict[str, str], str | None]] = [
        ({SPAN_HEADER: "span-1"}, "span-1"),
        ({SPAN_HEADER: "span-2", "traceparent": trace}, "span-2"),
        ({"traceparent": trace}, "b" * 16),
        ({"traceparent": trace.replace("00-", "cc-", 1) + "-more"}, "b" * 16),
        ({"traceparent": trace.replace("b" * 16, "0" * 16)}, None),
        ({"traceparent": "ff" + trace[2:]}, None),
        ({}, None),
    ]
    base = {"authorization": "Bearer KEY/e/spans"}
    for headers, _ in given:
        assert web.post(headers={**base, **headers}).status_code == 200
    assert [call.span_id for call in calls(store, "spans")] == [span for _, span in given]
    for bad in ("", "a b", "x" * 129, "caf\u00e9"):
        answer = web.post(headers={**base, SPAN_HEADER: bad.encode("latin-1")})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, SPAN_HEADER)
    assert len(calls(store, "spans")) == len(given)


def test_a_tool_is_below_the_span_whose_call_asked_for_it(web: Served, store: Store, tiny_llama: Path) -> None:
    begin(store, "tools")
    renderer = Renderer(tiny_llama)
    texts = [CALL, "42."]
    web.manager.script = lambda submit: one_by_one(submit, [[*renderer.encode(texts.pop(0)), END]])
    client = openai.OpenAI(base_url=f"{web.url}/v1", api_key="KEY/e/tools", max_retries=0)
    first = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[TOOL], extra_headers={SPAN_HEADER: "planner"}
    )
    message = first.choices[0].message
    assert message.tool_calls
    told: list[Any] = [*HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}]
    client.chat.completions.create(model="tiny", messages=told, tools=[TOOL], extra_headers={SPAN_HEADER: "writer"})
    (span,) = store.episode("tools").spans
    assert (span.parent_id, span.name) == ("planner", "calculator")


def test_64_episodes_over_one_client_never_mix(web: Served, store: Store, tiny_llama: Path) -> None:
    """Each says its own name in every message, header and span; what is recorded of one names no other."""
    renderer = Renderer(tiny_llama)
    names = [f"many-{number:02}" for number in range(64)]
    begin(store, *names)

    def echo(submit: m.Submit) -> list[m.FromManager]:
        return one_by_one(submit, [[*renderer.encode(submit.flow.removeprefix("e:")), END]])

    web.manager.script = echo

    async def episode(client: openai.AsyncOpenAI, name: str) -> None:
        said: list[Any] = [{"role": "user", "content": f"I am {name}"}]
        for turn in range(3):
            made: Any = await client.chat.completions.create(
                model="tiny",
                messages=said,
                stream=turn % 2 == 1,
                extra_headers={EPISODE_HEADER: name, SPAN_HEADER: f"{name}-{turn}"},
            )
            if turn % 2:
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in made])
            else:
                text = made.choices[0].message.content
            assert text == name
            said += [{"role": "assistant", "content": text}, {"role": "user", "content": f"still {name}"}]

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key="KEY", max_retries=0) as client:
            await asyncio.gather(*(episode(client, name) for name in names))

    asyncio.run(all_of_them())
    for name in names:
        made = calls(store, name)
        assert [call.span_id for call in made] == [f"{name}-{turn}" for turn in range(3)]
        assert [call.relation for call in made] == ["root", "extension", "extension"]
        for call in made:
            others = set(json.dumps([call.request, call.response, renderer.decode(call.prompt_ids)]).split("many-")[1:])
            assert {rest[:2] for rest in others} == {name[-2:]}


def test_what_belongs_to_no_episode_is_recorded_nowhere(web: Served, store: Store) -> None:
    before = sum(summary.calls for summary in store.starts())
    assert web.post(CHAT, hello(), headers={"authorization": "Bearer KEY"}).status_code == 200
    assert sum(summary.calls for summary in store.starts()) == before
    assert web.manager.submitted[-1].flow.startswith("k:")
