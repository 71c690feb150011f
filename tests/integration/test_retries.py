"""An answer that got lost on its way is given again, not sampled again: to every SDK, in every dialect, also after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anthropic
import httpx
import openai
import pytest
from msgspec import structs

from lightning_rl.episode import Call, EpisodeStart, Task
from lightning_rl.errors import StoreError
from lightning_rl.join import EPISODE_HEADER, SPAN_HEADER
from lightning_rl.store import Store
from rollout_server import messages as m
from rollout_server.api import retries
from rollout_server.api.rendering.render import Renderer
from tests.integration.scripted_manager import one_by_one, tokens
from tests.integration.served_web import CHAT, Served, eventually, hello, never, request, served
from tests.unit.test_render import TOOL

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
END = 2
AGAIN = {"x-stainless-retry-count": "1"}


@dataclass
class House:
    """A web process that can be restarted, and before it a line that loses answers."""

    model_dir: Path
    store: Store
    store_path: Path
    renderer: Renderer
    lose: int = 0
    """Answers that will get lost, each after the server has given it whole."""
    restarts: bool = False
    """Whether the web process ends before the client hears that its answer is lost."""
    said: int = 0
    url: str = ""
    web: Served = field(init=False)
    _running: Any = None

    def start(self) -> None:
        self._running = served(self.model_dir, store=str(self.store_path))
        self.web = self._running.__enter__()
        self.web.manager.script = self.something_new

    def stop(self) -> None:
        self._running.__exit__(None, None, None)

    def restart(self) -> None:
        self.stop()
        self.start()

    def something_new(self, submit: m.Submit) -> list[m.FromManager]:
        """No two choices are alike; the second of a request is broken off by its limit."""
        choices = []
        for _ in range(submit.n):
            self.said += 1
            choices.append([*self.renderer.encode(f"answer {self.said} of many"), END])
        return [
            structs.replace(said, finish_reason="length") if said.index == 1 and said.finish_reason else said
            for said in one_by_one(submit, choices)
        ]

    def begin(self, episode: str) -> None:
        self.store.begin(EpisodeStart(id=episode, task=Task(id="t", input={}), phase="train"))

    def calls(self, episode: str) -> list[Call]:
        return self.store.episode(episode).calls

    def post(self, episode: str, body: Any = None, **headers: str) -> httpx.Response:
        given = {EPISODE_HEADER: episode, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.web.post(CHAT, hello() if body is None else body, headers=given)


@contextlib.contextmanager
def lossy_line(house: House) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = httpx.post(house.web.url + self.path, content=body, headers=headers, timeout=60)
            if house.lose:
                house.lose -= 1
                if house.restarts:
                    house.restart()
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def shared_house(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    path = tmp_path_factory.mktemp("retries") / "episodes.db"
    with Store.open(path) as store:
        house = House(tiny_llama, store, path, Renderer(tiny_llama))
        house.start()
        with lossy_line(house) as house.url:
            yield house
        house.stop()


@pytest.fixture
def house(shared_house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    for client in (openai.OpenAI, openai.AsyncOpenAI, anthropic.Anthropic):
        monkeypatch.setattr(client, "_calculate_retry_timeout", lambda *_: 0.01)
    manager = shared_house.web.manager
    manager.submitted.clear()
    manager.script = shared_house.something_new
    shared_house.lose, shared_house.restarts = 0, False
    return shared_house


def gpt(house: House, episode: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{house.url}/e/{episode}/v1", api_key="x", max_retries=2, timeout=60)


def claude(house: House, episode: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{house.url}/e/{episode}", api_key="x", max_retries=2, timeout=60)


def chat(house: House, episode: str) -> tuple[str, list[str | None]]:
    made = gpt(house, episode).chat.completions.create(
        model="tiny", messages=HELLO, n=2, extra_body={"return_token_ids": True}
    )
    ids = [choice.model_extra["token_ids"] for choice in made.choices]  # type: ignore[index]
    assert ids == [call.sampled_ids for call in house.calls(episode)]
    assert [choice.finish_reason for choice in made.choices] == ["stop", "length"]
    assert made.usage is not None
    assert made.usage.completion_tokens == sum(map(len, ids))
    assert made.created == int(house.calls(episode)[0].started_at)
    return made.id, [choice.message.content for choice in made.choices]


def streamed_chat(house: House, episode: str) -> tuple[str, list[str | None]]:
    async def read() -> tuple[str, list[str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="x", max_retries=2) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, logprobs=True, extra_headers={EPISODE_HEADER: episode}
            )
            chunks = [chunk async for chunk in stream]
        entries = [
            entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []
        ]
        (call,) = house.calls(episode)
        assert [entry.logprob for entry in entries] == call.logprobs
        return chunks[0].id, ["".join(chunk.choices[0].delta.content or "" for chunk in chunks)]

    return asyncio.run(read())


def completion(house: House, episode: str) -> tuple[str, list[str | None]]:
    made = gpt(house, episode).completions.create(model="tiny", prompt=["a b", "c"], n=2, stop="of")
    return made.id, [choice.text for choice in made.choices]


def response(house: House, episode: str) -> tuple[str, list[str | None]]:
    made = gpt(house, episode).responses.create(model="tiny", input="Hello")
    return made.id, [made.output_text]


def message(house: House, episode: str) -> tuple[str, list[str | None]]:
    made = claude(house, episode).messages.create(model="tiny", max_tokens=50, messages=HELLO)
    return made.id, ["".join(block.text for block in made.content if block.type == "text")]


def generated(house: House, episode: str) -> tuple[str, list[str | None]]:
    """By hand: whoever speaks this dialect counts for himself."""
    for attempt in range(3):
        headers = {EPISODE_HEADER: episode, "x-stainless-retry-count": str(attempt)}
        with contextlib.suppress(httpx.TransportError):
            made = httpx.post(f"{house.url}/generate", json={"text": "a b"}, headers=headers, timeout=60).json()
            return made["meta_info"]["id"], [made["text"]]
    raise AssertionError("no answer came")


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("ask", [chat, streamed_chat, completion, response, message, generated])
def test_an_answer_that_is_lost_is_given_again(
    house: House, ask: Callable[[House, str], tuple[str, list[str | None]]], restarts: bool
) -> None:
    episode = f"lost-{ask.__name__}-{restarts}"
    house.begin(episode)
    house.lose, house.restarts = 2, restarts
    before, replays = house.said, 0 if restarts else house.web.services.metrics.replays
    response_id, texts = ask(house, episode)
    recorded = house.calls(episode)
    assert house.said - before == len(texts) == len(recorded)
    assert [call.response["content"] for call in recorded] == texts
    assert {call.response_id for call in recorded} == {response_id}
    assert house.lose == 0
    replays += 1 if restarts else 2  # since the last restart
    assert f'lrl:request_replays_total{{model_name="tiny"}} {float(replays)}' in house.web.get("/metrics").text


def test_only_what_says_so_is_a_retry(house: House) -> None:
    house.begin("plain")
    texts = [
        house.post("plain", **headers).json()["choices"][0]["message"]["content"]
        for headers in ({}, {}, {"x_stainless_retry_count": "0"}, {"x_stainless_retry_count": "x"})
    ]
    assert len(set(texts)) == 4
    assert house.post("plain", hello(max_tokens=3), **AGAIN).status_code == 200  # another body
    house.begin("other")
    assert house.post("other", **AGAIN).status_code == 200  # another episode
    assert len(house.calls("plain")) == 5
    assert house.web.post(CHAT, hello(), headers=AGAIN).status_code == 200  # of no episode
    assert len(house.web.manager.submitted) == 7
    assert [call.relation for call in house.calls("plain")][:2] == ["root", "fork"]


@pytest.mark.parametrize("restarts", [False, True])
def test_alternatives_are_given_again_with_the_answer_if_they_were_kept(house: House, restarts: bool) -> None:
    episode = f"alternatives-{restarts}"
    house.begin(episode)
    body = hello(top_logprobs=1, logprobs=True)
    first = house.post(episode, body).json()["choices"][0]
    if restarts:
        house.restart()
    again = house.post(episode, body, **AGAIN).json()["choices"][0]
    assert [len(token["top_logprobs"]) for token in again["logprobs"]["content"]] == [1] * len(
        first["logprobs"]["content"]
    )
    assert again == first
    (call,) = house.calls(episode)
    assert [len(likeliest) for likeliest in call.alternatives] == [2] * len(call.sampled_ids)  # as the script has them
    assert house.web.manager.submitted == [] if restarts else len(house.web.manager.submitted) == 1


def test_an_answer_whose_alternatives_were_not_kept_is_sampled_anew(house: House) -> None:
    """As episodes are that an earlier release recorded."""
    house.begin("older")
    body = hello(top_logprobs=1, logprobs=True)
    first = house.post("older", body).json()
    with contextlib.closing(sqlite3.connect(house.store_path)) as database, database:
        database.execute("UPDATE calls SET alternatives = NULL WHERE episode_id = 'older'")
    house.restart()
    again = house.post("older", body, **AGAIN).json()
    assert again["choices"][0]["message"] != first["choices"][0]["message"]
    assert all(token["top_logprobs"] for token in again["choices"][0]["logprobs"]["content"])
    assert [call.alternatives == [] for call in house.calls("older")] == [True, False]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_key_says_which_request_is_meant(house: House, restarts: bool) -> None:
    episode = f"keys-{restarts}"
    house.begin(episode)
    first = house.post(episode, idempotency_key="one").json()
    second = house.post(episode, idempotency_key="two").json()
    if restarts:
        house.restart()
    for key, answer in (("one", first), ("two", second), ("one", first)):
        assert house.post(episode, idempotency_key=key).json() == answer
    assert house.post(episode, hello(seed=1), idempotency_key="one").json()["id"] != first["id"]
    assert house.post(episode, idempotency_key="three", **{"x-stainless-retry-count": "2"}).json()["id"] != first["id"]
    assert len(house.calls(episode)) == 4


def test_a_retry_waits_for_what_it_repeats(house: House) -> None:
    house.begin("slow")
    manager = house.web.manager
    release, say = threading.Event(), house.something_new

    def slowly(submit: m.Submit) -> list[m.FromManager]:
        release.wait(60)
        return say(submit)

    manager.script = slowly
    answers: list[Any] = []
    senders = [
        threading.Thread(target=lambda headers=headers: answers.append(house.post("slow", **headers).json()))  # type: ignore[misc]
        for headers in ({}, AGAIN)
    ]
    senders[0].start()
    eventually(lambda: len(manager.submitted) == 1)
    senders[1].start()
    time.sleep(0.1)
    assert answers == []
    release.set()
    for sender in senders:
        sender.join()
    assert answers[0] == answers[1]
    assert len(house.calls("slow")) == len(manager.submitted) == 1


def test_what_was_broken_off_is_sampled_anew(house: House) -> None:
    house.begin("broken")
    manager = house.web.manager
    manager.script = lambda submit: (
        [tokens(submit, [100])] if len(manager.submitted) == 1 else house.something_new(submit)
    )
    line = house.web.connect()
    body = json.dumps(hello()).encode()
    line.sendall(request(f"/e/broken{CHAT}", body))
    eventually(lambda: len(manager.submitted) == 1)
    time.sleep(0.1)
    line.close()
    again = house.post("broken", **AGAIN).json()
    aborted, whole = house.calls("broken")
    assert (aborted.finish_reason, whole.response["content"]) == ("abort", again["choices"][0]["message"]["content"])
    assert house.post("broken", x_stainless_retry_count="2").json() == again
    house.restart()
    assert house.post("broken", x_stainless_retry_count="3").json() == again

    house.begin("refused")
    house.web.manager.script = lambda submit: [
        m.Failed(request_id=submit.request_id, code="weights_lost", message="publish them")
    ]
    assert house.post("refused").status_code == 503
    house.web.manager.script = house.something_new
    assert house.post("refused", **AGAIN).status_code == 200
    assert [call.finish_reason for call in house.calls("refused")] == ["abort", "stop"]


def test_as_many_lost_answers_as_were_given_are_given_again(house: House) -> None:
    """Four samples for one prompt at once: their retries get four different answers, and the aborted one's a new one."""
    house.begin("vote")
    first = [house.post("vote").json()["id"] for _ in range(4)]
    again = [house.post("vote", **AGAIN).json()["id"] for _ in range(4)]
    assert sorted(first) == sorted(again)
    manager = house.web.manager
    manager.script = never
    asked = len(manager.submitted)
    with house.web.connect() as line:
        line.sendall(request(f"/e/vote{CHAT}", json.dumps(hello()).encode()))
        eventually(lambda: len(manager.submitted) > asked)
    eventually(lambda: manager.cancelled != [])
    manager.script = house.something_new
    assert house.post("vote", **AGAIN).json()["id"] not in first


@pytest.mark.parametrize("restarts", [False, True])
def test_a_conversation_goes_on_behind_a_replayed_call_of_a_tool(house: House, restarts: bool) -> None:
    episode = f"tool-{restarts}"
    house.begin(episode)
    texts = ["So: " + CALL + CALL, "It is 42."]

    def say(submit: m.Submit) -> list[m.FromManager]:
        return one_by_one(submit, [[*house.renderer.encode(texts.pop(0)), END]])

    house.web.manager.script = say
    house.lose, house.restarts = 1, restarts
    client = gpt(house, episode)
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[TOOL], extra_headers={SPAN_HEADER: "planner"}
    ) as stream:
        reply = stream.get_final_completion().choices[0].message
    house.web.manager.script = say
    told: list[Any] = [*HELLO, reply.to_dict()]
    told += [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in reply.tool_calls or []]
    client.chat.completions.create(model="tiny", messages=told, tools=[TOOL])
    assert texts == []
    found = house.store.episode(episode)
    first, second = found.calls
    assert reply.content == "So:"
    assert [call.id for call in reply.tool_calls or []] == [call["id"] for call in first.response["tool_calls"]]
    assert (second.parent_id, second.relation) == (first.id, "extension")
    assert (first.index, second.index) == (0, 1)
    assert [(span.parent_id, span.attributes["call_id"]) for span in found.spans] == [("planner", first.id)] * 2


def test_a_failed_sending_is_tried_again_before_another_ones_answer_is_given(house: House) -> None:
    """Of two alike the first fails: its retry is no retry of the second."""
    house.begin("two")
    house.web.manager.script = lambda submit: [
        m.Failed(request_id=submit.request_id, code="weights_lost", message="publish them")
    ]
    assert house.post("two").status_code == 503
    house.web.manager.script = house.something_new
    second = house.post("two").json()["id"]
    first = house.post("two", **AGAIN).json()["id"]
    assert first != second
    assert house.post("two", x_stainless_retry_count="2").json()["id"] == first
    assert house.post("two", **AGAIN).json()["id"] == second


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("header", ["x_lrl_span", "x_lrl_agent"])
def test_a_retry_of_one_branch_never_gets_the_answer_of_another(house: House, header: str, restarts: bool) -> None:
    """The first sending of branch B never reached the server."""
    episode = f"branches-{header}-{restarts}"
    house.begin(episode)
    of_a = house.post(episode, **{header: "A"}).json()["id"]
    if restarts:
        house.restart()
    of_b = house.post(episode, **{header: "B"}, **AGAIN).json()["id"]
    assert of_a != of_b
    assert house.post(episode, **{header: "A"}, **AGAIN).json()["id"] == of_a
    if header == "x_lrl_agent":
        assert [call.agent for call in house.calls(episode)] == ["A", "B"]


def test_all_that_has_one_key_gets_one_answer_even_if_the_first_fails(house: House) -> None:
    house.begin("crowd")
    manager, release = house.web.manager, threading.Event()

    def slowly(submit: m.Submit) -> list[m.FromManager]:
        release.wait(60)
        if len(manager.submitted) == 1:
            return [m.Failed(request_id=submit.request_id, code="weights_lost", message="publish them")]
        return house.something_new(submit)

    manager.script = slowly
    answers: list[httpx.Response] = []
    senders = [
        threading.Thread(target=lambda: answers.append(house.post("crowd", idempotency_key="k"))) for _ in range(5)
    ]
    senders[0].start()
    eventually(lambda: len(manager.submitted) == 1)
    for sender in senders[1:]:
        sender.start()
    time.sleep(0.2)
    release.set()
    for sender in senders:
        sender.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 503]
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    assert len(manager.submitted) == 2


@pytest.mark.parametrize("mark", [{"x_stainless_retry_count": "1"}, {"idempotency_key": "k"}])
def test_a_store_that_does_not_answer_costs_no_answer(
    house: House, monkeypatch: pytest.MonkeyPatch, mark: dict[str, str]
) -> None:
    episode = f"busy-{next(iter(mark))}"
    house.begin(episode)
    first = house.post(episode, **{name: value for name, value in mark.items() if name == "idempotency_key"}).json()
    with monkeypatch.context() as broken:
        broken.setattr(house.web.services.recorder, "calls", AsyncMock(side_effect=StoreError("busy")))
        assert house.post(episode, **mark).status_code >= 500
    if "x_stainless_retry_count" in mark:
        mark = {"x_stainless_retry_count": "2"}
    assert house.post(episode, **mark).json() == first
    assert len(house.calls(episode)) == 1


def test_what_this_process_has_forgotten_the_store_still_knows(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_KEPT", 2)
    house.begin("long")
    first = house.post("long").json()
    for seed in range(4):
        house.post("long", hello(seed=seed))
    assert house.post("long", **AGAIN).json() == first
    assert len(house.calls("long")) == 5
