"""Routes: an agent's calls to a second server, to a scripted provider and to an adapter, as they are relayed and recorded; and
what never gets into the store. The second server is a real web process's application, in front of a scripted engine."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from lightning_rl.episode import Call, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import RecipeError, ServerError
from lightning_rl.join import encode_agent
from lightning_rl.ledger import account
from lightning_rl.redact import REDACTED, Redactor
from lightning_rl.store import Store
from lightning_rl.transition import Mask, call_masks
from rollout_server import messages as m
from rollout_server.admin_client import AdminClient
from rollout_server.api.model_names import AgentRoute
from rollout_server.api.rendering.render import Renderer
from rollout_server.api.upstreams.answers import EventReader
from rollout_server.api.upstreams.provider import Provider
from rollout_server.cli import COMMANDS, answerers
from rollout_server.launch import RolloutServer
from tests.integration.scripted_manager import one_by_one
from tests.integration.served_web import CHAT, Served, eventually, served
from tests.unit.domain import transitions_of
from tests.unit.test_render import TOOL
from trainers.packing import pack
from trainers.runner.pool import RunnerPool

END = 2
UPSTREAM_KEY = "upstream-key-7f3a91"
AGENT_KEY = "agent-key-55d0c2"
SECRET = "hunter-zebra42"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
HELLO: Any = [{"role": "user", "content": "Hello"}]


@dataclass
class Mock:
    """A provider that says what a test tells it to, byte for byte."""

    url: str = ""
    answer: Callable[[Any], None] = lambda handler: None
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    made = Mock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            made.answer(self)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def replies(status: int, body: bytes, **headers: str) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def streams(*chunks: bytes, whole: bool = True, after: Callable[[], None] = lambda: None) -> Callable[[Any], None]:
    """Chunk by chunk; `after` runs before the line is closed, half-way unless the stream is `whole`."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream; charset=utf-8")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.flush()
        after()
        if whole:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


@dataclass
class Here:
    """The server under test, with its store and the server that it routes to."""

    web: Served
    elsewhere: Served
    store: Store
    folder: Path
    renderer: Renderer

    def begin(self, episode: str) -> str:
        self.store.begin(EpisodeStart(id=episode, task=Task(id="t", input={}), phase="train", group="g"))
        return f"{self.web.url}/e/{episode}"

    def openai(self, episode: str, agent: str = "planner", **headers: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.web.url}/e/{episode}/v1",
            api_key=AGENT_KEY,
            max_retries=0,
            timeout=60,
            default_headers={"x-lrl-agent": encode_agent(agent), **headers},
        )

    def calls(self, episode: str) -> list[Call]:
        return self.store.episode(episode).calls

    def stored(self) -> bytes:
        return b"".join(file.read_bytes() for file in self.folder.glob("episodes.db*"))


def says(web: Served, renderer: Renderer, *texts: str) -> None:
    waiting = [[*renderer.encode(text), END] for text in texts]

    def script(submit: m.Submit) -> list[m.FromManager]:
        return one_by_one(submit, [waiting.pop(0) for _ in range(submit.n)])

    web.manager.script = script


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, mock: Mock) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("routes")
    with (
        served(tiny_llama, served_name="gpt-x", api_key=UPSTREAM_KEY, aliases=[]) as elsewhere,
        Store.open(folder / "episodes.db") as store,
    ):
        upstreams = {
            "elsewhere": Provider(base_url=f"{elsewhere.url}/v1", api_key=UPSTREAM_KEY, model="gpt-x"),
            "mock": Provider(base_url=f"{mock.url}/v1/", api_key=UPSTREAM_KEY),
            "gone": Provider(base_url="http://127.0.0.1:9/v1"),
        }
        to = {"plan*": "elsewhere", "mock-*": "mock", "lost": "gone", "critic": "math", "scribe": "policy"}
        settings = {
            "store": str(folder / "episodes.db"),
            "routes": [AgentRoute(match=glob, to=name) for glob, name in to.items()],
            "upstreams": upstreams,
            "redact": [r"hunter-\w+"],
        }
        with served(tiny_llama, **settings) as web:
            yield Here(web, elsewhere, store, folder, Renderer(tiny_llama))


@pytest.fixture
def here(shared: Here, mock: Mock) -> Here:
    shared.web.manager.reset()
    shared.elsewhere.manager.reset()
    mock.asked.clear()
    return shared


def test_a_chat_of_a_routed_agent_is_answered_elsewhere_and_recorded(here: Here) -> None:
    here.begin("chat")
    client = here.openai("chat", "planner ü", **{"x-lrl-span": "span-1"})
    says(here.elsewhere, here.renderer, "Grüße 世界", "One.", "Two.")
    made = client.chat.completions.create(model="anything", messages=HELLO, temperature=0.5)
    both = client.chat.completions.create(model="anything", messages=HELLO, n=2)
    assert made.choices[0].message.content == "Grüße 世界"
    assert made.model == "gpt-x"
    assert here.web.manager.submitted == []
    call, one, two = here.calls("chat")
    assert (call.upstream, call.response_id, call.model, call.span_id) == ("elsewhere", made.id, "gpt-x", "span-1")
    assert (call.prompt_ids, call.sampled_ids, call.temperature, call.finish_reason) == ([], [], 0.5, "stop")
    assert call.request == {"model": "anything", "messages": HELLO, "temperature": 0.5}
    assert call.response["content"] == "Grüße 世界"
    assert made.usage is not None
    assert call.response["usage"]["completion_tokens"] == made.usage.completion_tokens
    assert [c.response["content"] for c in (one, two)] == [choice.message.content for choice in both.choices]
    assert [c.index for c in (call, one, two)] == [0, 1, 2]


def test_a_streamed_chat_with_tools_is_relayed_and_its_tools_become_spans(here: Here) -> None:
    here.begin("tools")
    client = here.openai("tools", **{"x-lrl-span": "plan-span"})
    says(here.elsewhere, here.renderer, f"Let me see. {CALL}", "It is 42.")
    with client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL], stream=True) as stream:
        chunks = list(stream)
    (made,) = [part for c in chunks if c.choices for part in c.choices[0].delta.tool_calls or []]
    (call,) = here.calls("tools")
    assert made.function is not None
    asked = {"name": "calculator", "arguments": made.function.arguments}
    assert call.response == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"id": made.id, "type": "function", "function": asked}],
    }
    assert (call.finish_reason, call.response_id) == ("tool_calls", chunks[0].id)
    told = [call.response, {"role": "tool", "tool_call_id": made.id, "content": "42"}]
    client.chat.completions.create(model="m", messages=[*HELLO, *told], tools=[TOOL])
    (span,) = here.store.episode("tools").spans
    assert (span.name, span.kind, span.parent_id) == ("calculator", "tool", "plan-span")
    assert span.attributes["result"] == "42"
    assert span.attributes["arguments"] == {"expression": "6*7"}
    assert span.attributes["call_id"] == call.id


def test_messages_of_anthropics_dialect_are_relayed_whole_and_streamed(here: Here) -> None:
    client = anthropic.Anthropic(
        base_url=here.begin("anthropic"),
        api_key=AGENT_KEY,
        max_retries=0,
        timeout=60,
        default_headers={"x-lrl-agent": "planner"},
    )
    tool: Any = {"name": "calculator", "input_schema": {"type": "object", "properties": {}}}
    asked: Any = {"model": "claude", "max_tokens": 50, "messages": HELLO, "tools": [tool]}
    says(here.elsewhere, here.renderer, f"Well. {CALL}", f"Well. {CALL}")
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    first, second = here.calls("anthropic")
    assert [first.response_id, second.response_id] == [whole.id, streamed.id]
    for call, made in ((first, whole), (second, streamed)):
        (used,) = [block for block in made.content if block.type == "tool_use"]
        assert call.response["content"] == "Well."
        (tool_call,) = call.response["tool_calls"]
        assert (tool_call["id"], tool_call["function"]["name"]) == (used.id, "calculator")
        assert json.loads(tool_call["function"]["arguments"]) == used.input == {"expression": "6*7"}
        assert call.response["usage"]["output_tokens"] == made.usage.output_tokens
        assert call.finish_reason == "tool_calls"
    assert client.messages.count_tokens(model="claude", messages=HELLO).input_tokens > 0
    assert len(here.calls("anthropic")) == 2


def test_responses_are_relayed_whole_and_streamed(here: Here) -> None:
    here.begin("responses")
    client = here.openai("responses")
    says(here.elsewhere, here.renderer, "Yes.", "Yes.")
    whole = client.responses.create(model="m", input="Well?")
    events = list(client.responses.create(model="m", input="Well?", previous_response_id=whole.id, stream=True))
    assert events[-1].type == "response.completed"
    calls = here.calls("responses")
    assert [call.response_id for call in calls] == [whole.id, events[-1].response.id]
    assert [call.response["content"] for call in calls] == ["Yes.", "Yes."]
    assert [call.finish_reason for call in calls] == ["stop", "stop"]


EVENTS = (
    b'data: {"id": "c-1", "model": "mock-1", "choices": [{"index": 0, "delta": {"content": "Hel"}}]}\r\n\r',
    b'\ndata: {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": null}], "odd" : 1e0}\n\n: ping\n',
    b'\ndata: {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}\n\ndata: [DO',
    b"NE]\n\n",
)


def test_bytes_go_through_untouched_and_the_call_is_durable_before_the_last(here: Here, mock: Mock) -> None:
    mock.answer = streams(*EVENTS)
    url = here.begin("bytes") + "/v1/chat/completions?trial=1"
    sent = b'{ "model": "mock-1", "messages": [], "stream": true, "odd": [1.0, "\\u00e9"] }'
    headers = {
        "authorization": f"Bearer {AGENT_KEY}",
        "x-lrl-agent": "somebody",
        "x-lrl-span": "span-9",
        "cookie": "c=1",
        "content-type": "application/json",
        "openai-beta": "x=v2",
    }
    got = b""
    with httpx.stream("POST", url, content=sent, headers=headers, timeout=60) as answer:
        for chunk in answer.iter_raw():
            got += chunk
            if b"[DONE]" in got:
                (call,) = here.calls("bytes")
                break
    assert got == b"".join(EVENTS)
    assert (call.response, call.finish_reason) == ({"role": "assistant", "content": "Hello"}, "length")
    assert (call.model, call.response_id, call.span_id) == ("mock-1", "c-1", "span-9")
    ((path, seen, body),) = mock.asked
    assert (path, body) == ("/v1/chat/completions?trial=1", sent)
    assert seen["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert seen["openai-beta"] == "x=v2"
    assert not [name for name, value in seen.items() if name.startswith(("x-lrl", "cookie")) or AGENT_KEY in value]


def test_anthropics_upstreams_get_their_key_in_their_way(here: Here, mock: Mock) -> None:
    said = {"id": "msg_1", "model": "c", "content": [{"type": "text", "text": "Hi"}], "stop_reason": "max_tokens"}
    mock.answer = replies(200, json.dumps(said).encode())
    url = here.begin("key") + "/v1/messages"
    httpx.post(url, json={"model": "mock-1", "messages": []}, headers={"x-api-key": AGENT_KEY})
    ((path, seen, _),) = mock.asked
    assert (path, seen["x-api-key"], seen["anthropic-version"]) == ("/v1/messages", UPSTREAM_KEY, "2023-06-01")
    assert "authorization" not in seen
    (call,) = here.calls("key")
    assert (call.response, call.finish_reason) == ({"role": "assistant", "content": "Hi"}, "length")


def test_errors_are_the_upstreams_own_and_no_calls(here: Here, mock: Mock) -> None:
    url = here.begin("errors") + CHAT
    body = {"model": "mock-1", "messages": HELLO}
    mock.answer = replies(429, b'{"error": {"message": "slowly", "x": 1}}', retry_after="7", x_secret="no")
    answer = httpx.post(url, json=body)
    assert (answer.status_code, answer.content) == (429, b'{"error": {"message": "slowly", "x": 1}}')
    assert answer.headers["retry-after"] == "7"
    assert "x-secret" not in answer.headers
    mock.answer = replies(200, b"<html>")
    assert httpx.post(url, json=body).json()["error"]["code"] == "upstream_invalid"
    answer = httpx.post(url, json={**body, "model": "lost"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unavailable")
    answer = httpx.post(f"{here.web.url}/generate", json={"model": "mock-1", "text": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_route")
    assert httpx.post(url, content=b"{").json()["error"]["code"] == "invalid_json"
    assert here.calls("errors") == []


def test_a_stream_that_breaks_off_says_so_and_is_recorded_as_far_as_it_came(here: Here, mock: Mock) -> None:
    here.begin("broken")
    mock.answer = streams(*EVENTS[:2], whole=False)
    with pytest.raises(openai.APIError, match="line to the upstream 'mock' broke"):
        list(here.openai("broken", "a").chat.completions.create(model="mock-1", messages=HELLO, stream=True))
    (call,) = here.calls("broken")
    assert (call.response["content"], call.finish_reason) == ("Hello", "abort")


def test_a_client_that_leaves_a_stream_closes_the_line_behind_it(here: Here, mock: Mock) -> None:
    here.begin("left")
    left = threading.Event()

    def go_on() -> None:
        assert left.wait(10)

    mock.answer = streams(*EVENTS[:2], after=go_on)
    with here.openai("left", "a").chat.completions.create(model="mock-1", messages=HELLO, stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.content == "Hel"
    eventually(lambda: here.calls("left"))
    left.set()
    (call,) = here.calls("left")
    assert (call.response["content"], call.finish_reason) == ("Hello", "abort")


def test_routes_lead_to_the_policy_and_to_adapters_whatever_model_is_named(here: Here, tiny_llama: Path) -> None:
    here.begin("adapters")
    says(here.web, here.renderer, "Yes.", "No.")
    here.openai("adapters", "scribe").chat.completions.create(model="whatever", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="adapter 'math', which is not loaded"):
        here.openai("adapters", "critic").chat.completions.create(model="tiny", messages=HELLO)
    AdminClient(here.web.url, "admin", lambda: None).load_adapter("math", tiny_llama)
    here.openai("adapters", "critic").chat.completions.create(model="tiny", messages=HELLO)
    assert [submit.adapter for submit in here.web.manager.submitted] == ["", "math"]
    episode = here.store.episode("adapters")
    assert [call.model for call in episode.calls] == ["tiny", "math"]
    assert list(call_masks(episode, ["*"], {"math"}).values()) == [Mask.OTHER_MODEL]


def test_of_two_roles_only_the_one_that_learns_is_trained(here: Here) -> None:
    """A planner at a provider, a writer and a critic of the policy; the writer learns."""
    for number in range(2):
        name = f"team-{number}"
        here.begin(name)
        says(here.elsewhere, here.renderer, "A plan.")
        says(here.web, here.renderer, "Good text." if number else "Bad.", "I see.")
        for role in ("planner", "writer", "reviewer"):
            client = here.openai(name, role, **{"x-lrl-span": f"{name}-{role}"})
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": role}])
        spans = [
            Span(id=f"{name}-{role}", episode_id=name, name=role, kind="agent")
            for role in ("planner", "writer", "reviewer")
        ]
        here.store.end(
            name,
            Outcome.COMPLETED,
            counted=True,
            spans=spans,
            rewards=[Reward(episode_id=name, name="good", value=float(number))],
            ended_at=1.0,
        )
    episodes = [here.store.episode(f"team-{number}") for number in range(2)]
    returns = {call.id: float(e.id[-1]) for e in episodes for call in e.calls}
    transitions = transitions_of(episodes, returns, "std", learns=["writer"])
    trained = {t.call_id: 1.0 for t in transitions if t.masked is None}
    writers = [episode.calls[1] for episode in episodes]
    assert set(trained) == {call.id for call in writers}
    assert [episode.calls[0].upstream for episode in episodes] == ["elsewhere"] * 2
    assert [t.masked for t in transitions] == [Mask.OTHER_MODEL, None, Mask.NOT_LEARNING] * 2
    calls = {call.id: call for episode in episodes for call in episode.calls}
    packed = pack(transitions, {e.id: "g" for e in episodes}, trained, calls, 4096)
    ledger = account(episodes, transitions, packed.trees)
    ledger.check("the step")
    assert ledger.trained + ledger.merged == sum(len(call.sampled_ids) for call in writers)
    assert ledger.masked == {"not_learning": 2 * len(here.renderer.encode("I see.")) + 2}


def test_a_secret_is_gone_from_the_store_and_nothing_else_changes(here: Here) -> None:
    here.begin("secret")
    here.begin("clean")
    client = here.openai("secret", "writer")
    says(here.web, here.renderer, f"The word is {SECRET}. {CALL}", f"Noted {SECRET}!", "Nothing.", "Fine.")
    messages: list[Any] = [{"role": "user", "content": f"My password is {SECRET}, {UPSTREAM_KEY}."}]
    with client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], stream=True) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == f"The word is {SECRET}."
    (made,) = [part for c in chunks if c.choices for part in c.choices[0].delta.tool_calls or []]
    assert made.function is not None
    called = {"id": made.id, "type": "function", "function": made.function.model_dump()}
    messages += [
        {"role": "assistant", "content": text, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": made.id, "content": f"It was {SECRET} again"},
    ]
    client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    url = f"{here.web.url}/e/secret"
    raw = here.renderer.encode(f"raw {SECRET}")
    httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": raw}, timeout=60)
    here.openai("clean", "writer").chat.completions.create(model="tiny", messages=HELLO)
    planner = here.openai("secret", "planner").chat.completions
    says(here.elsewhere, here.renderer, f"You said {SECRET}")
    assert SECRET in str(planner.create(model="m", messages=[{"role": "user", "content": SECRET}]))

    episode = here.store.episode("secret")
    first, second, third, upstream = episode.calls
    assert [call.redacted for call in episode.calls] == [True] * 4
    assert first.response["content"].strip() == f"The word is {REDACTED}."
    assert (second.relation, second.parent_id) == ("extension", first.id)
    for call in (first, second, third):
        asked = here.web.manager.submitted[call.index].prompt_ids
        assert len(call.prompt_ids) == len(asked)
        assert here.renderer.decode(asked, special=True).count(SECRET) > 0
        assert SECRET not in here.renderer.decode([*call.prompt_ids, *call.sampled_ids], special=True)
        assert len(call.logprobs) == len(call.sampled_ids)
    assert upstream.response["content"] == f"You said {REDACTED}"
    assert [span.attributes["result"] for span in episode.spans] == [f"It was {REDACTED} again"]
    assert here.store.episode("clean").calls[0].redacted is False
    masks = call_masks(episode)
    assert list(masks.values()) == [Mask.REDACTED] * 3 + [Mask.OTHER_MODEL]
    for known in (SECRET, UPSTREAM_KEY, AGENT_KEY):
        assert known.encode() not in here.stored()


AGENT = """
    import lightning_rl as lrl

    def run(task):
        lrl.reward(1.0, name="fine")
        raise ValueError("cannot log in as hunter-zebra42 with " + task["key"])

    def reward(task, episode):
        return {"good": 1.0}
"""


def test_a_secret_in_a_traceback_is_not_stored(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(textwrap.dedent(AGENT))
    start = EpisodeStart(id="e", task=Task(id="t", input={"key": "no-secret-of-ours"}), phase="train")
    with (
        Store.open(tmp_path / "episodes.db") as store,
        RunnerPool(
            agent_function=(tmp_path / "agent.py", "run"),
            reward_function=(tmp_path / "agent.py", "reward"),
            store=store,
            server_url="http://127.0.0.1:9",
            redactor=Redactor([r"hunter-\w+"]),
        ) as pool,
    ):
        (result,) = pool.run([start])
        error = store.episode("e").error
    assert result.outcome is Outcome.AGENT_ERROR
    assert error is not None
    assert f"cannot log in as {REDACTED} with no-secret-of-ours" in error
    assert SECRET not in str(result)
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.glob("episodes.db*"))


@pytest.mark.parametrize("streamed", [False, True])
def test_of_an_upstreams_headers_ids_come_back_and_cookies_stay_nowhere(here: Here, mock: Mock, streamed: bool) -> None:
    said = {"x_request_id": "req-1", "set_cookie": "session=of-one-episode", "openai_organization": "us"}

    def answer(handler: Any) -> None:
        body = b"".join(EVENTS) if streamed else b'{"choices": []}'
        kind = "text/event-stream" if streamed else "application/json"
        replies(200, body, **{"content-type": kind}, **said)(handler)

    mock.answer = answer
    for number in range(2):
        url = here.begin(f"headers-{streamed}-{number}") + CHAT
        got = httpx.post(url, json={"model": "mock-1", "messages": []}, headers={"idempotency-key": "k"})
        assert got.headers["x-request-id"] == "req-1"
        assert "set-cookie" not in got.headers
        assert got.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")
    assert not any("cookie" in seen for _, seen, _ in mock.asked)
    assert [seen["idempotency-key"] for _, seen, _ in mock.asked] == ["k", "k"]


def test_an_upstream_is_not_asked_for_an_episode_that_has_ended(here: Here, mock: Mock) -> None:
    url = here.begin("over") + CHAT
    here.store.end("over", Outcome.COMPLETED, counted=True, ended_at=1.0)
    assert httpx.post(url, json={"model": "mock-1", "messages": [], "stream": True}).status_code == 409
    assert mock.asked == []


def test_an_agent_that_only_says_its_name_is_the_one_that_learns(here: Here) -> None:
    """No hook, no span: a request with `x-lrl-agent`."""
    here.begin("named")
    says(here.web, here.renderer, "Yes.", "No.", "Hm.")
    says(here.elsewhere, here.renderer, "Well.")
    for name in ("writer ü", "reader", "planner", SECRET):
        here.openai("named", name).chat.completions.create(model="tiny", messages=HELLO)
    episode = here.store.episode("named")
    writer, reader, planner, secret = episode.calls
    assert [call.agent for call in episode.calls] == ["writer ü", "reader", "planner", REDACTED]
    masks = {reader.id: Mask.NOT_LEARNING, planner.id: Mask.OTHER_MODEL, secret.id: Mask.NOT_LEARNING}
    assert call_masks(episode, ["writer*"]) == masks
    assert call_masks(episode, ["reader"])[writer.id] is Mask.NOT_LEARNING


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    reader, whole = EventReader(), b"".join(EVENTS)
    found = [data for at in range(0, len(whole), size) for data in reader.feed(whole[at : at + size])]
    assert [bool(re.match(rb"\{.*\}$", data)) for data in found] == [True, True, True, False]
    assert found[-1] == b"[DONE]"


def test_a_server_of_its_own_routes_and_redacts_as_it_is_started(here: Here, tiny_llama: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    COMMANDS["serve"][1](parser)
    flags = [
        "--model",
        "m",
        "--upstream",
        f"far={here.elsewhere.url}/v1,env=P2_KEY,model=gpt-x",
        "--route",
        "plan*=far",
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("P2_KEY", UPSTREAM_KEY)
        routes, upstreams = answerers(parser.parse_args(flags), "m", [])
        environment.setenv("P2_KEY", "two words")
        with pytest.raises(RecipeError, match="P2_KEY holds is no key") as failure:
            answerers(parser.parse_args(flags), "m", [])
        assert "two words" not in str(failure.value)
        with pytest.raises(RecipeError, match="is no base URL"):
            answerers(parser.parse_args(["--model", "m", "--upstream", "far=http://[x"]), "m", [])
        environment.delenv("P2_KEY")
        with pytest.raises(RecipeError, match="P2_KEY is not set"):
            answerers(parser.parse_args(flags), "m", [])
    with pytest.raises(ServerError, match="there is no 'fra'"):
        answerers(parser.parse_args(["--model", "m", "--route", "x=fra"]), "m", [])
    says(here.elsewhere, here.renderer, "From afar.")
    with (
        Store.open(tmp_path / "episodes.db") as store,
        RolloutServer(
            tiny_llama,
            "tiny",
            "float32",
            device="cpu",
            kv_tokens=8192,
            threads=1,
            log_dir=tmp_path,
            store=tmp_path / "episodes.db",
            routes=routes,
            upstreams=upstreams,
            redact=[r"hunter-\w+"],
        ) as server,
    ):
        store.begin(EpisodeStart(id="e", task=Task(id="t", input={}), phase="train"))
        for role in ("planner", "writer"):
            client = openai.OpenAI(base_url=f"{server.base_url}/e/e/v1", api_key=AGENT_KEY, max_retries=0)
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": f"I am {SECRET}"}],
                max_tokens=4,
                extra_headers={"x-lrl-agent": role},
            )
        planned, written = store.episode("e").calls
    assert (planned.upstream, planned.response["content"]) == ("far", "From afar.")
    assert (written.upstream, len(written.sampled_ids), written.redacted) == ("", 4, True)
    for file in [*tmp_path.glob("episodes.db*"), *tmp_path.glob("*.log")]:
        assert not any(known.encode() in file.read_bytes() for known in (SECRET, UPSTREAM_KEY, AGENT_KEY))
