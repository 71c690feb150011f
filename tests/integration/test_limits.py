"""What the server refuses because it is too much: typed, at once, and without a trace left behind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from rollout_server import messages as m
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import unless_gone
from rollout_server.api.front.endpoint import Bodies
from rollout_server.api.front.limits import Admission, Limits, Ticket
from rollout_server.api.front.patience import PatientRenderer
from rollout_server.api.front.text_size import IN_THREAD, TextSize
from rollout_server.api.front.wire import EventStream
from rollout_server.api.rendering.render import Renderer
from tests.integration.scripted_manager import tokens
from tests.integration.served_web import (
    CHAT,
    Served,
    at_once,
    eventually,
    heard,
    hello,
    never,
    request,
    served,
    status_and_error,
)

LIMITS = Limits(
    body_bytes=20_000,
    bodies_bytes=50_000,
    queued_requests=8,
    queued_tokens=400,
    flow_requests=3,
    flow_choices=12,
    connections=40,
)
HASTY = msgspec.structs.replace(LIMITS, request_timeout_s=1.0, read_timeout_s=0.6, write_timeout_s=0.6)


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_llama, limits=LIMITS) as web:
        yield web


@pytest.fixture(scope="module")
def shared_hasty(tiny_llama: Path) -> Iterator[Served]:
    with served(tiny_llama, limits=HASTY) as web:
        yield web


@pytest.fixture
def web(shared: Served) -> Iterator[Served]:
    """Where nobody's time is ever over."""
    yield from as_new(shared)


@pytest.fixture
def hasty(shared_hasty: Served) -> Iterator[Served]:
    """Where it is soon."""
    yield from as_new(shared_hasty)


def as_new(shared: Served) -> Iterator[Served]:
    """Whatever a test does, nothing of it is left."""
    shared.manager.reset()
    shared.manager.script = at_once
    yield shared
    admission, metrics = shared.services.admission, shared.services.metrics
    eventually(lambda: metrics.in_flight == 0)
    assert (admission.flows, admission.queued_requests, admission.queued_tokens, admission.running_requests) == (0,) * 4


def answer_all(web: Served, waiting: list[Future[httpx.Response]]) -> None:
    """Those who were left waiting first get what they asked for."""
    for submit in web.manager.submitted[: len(waiting)]:
        web.manager.say(*at_once(submit))
    assert {future.result().status_code for future in waiting} == {200}


def error_of(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()["error"]["code"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(web: Served) -> None:
    """It announces itself, and nothing of it is ever sent."""
    with web.connect() as line:
        line.sendall(request(CHAT, b"", "content-type: application/json", length=20_001))
        answer = line.recv(65536)
    status, error = status_and_error(answer)
    assert (status, error["code"]) == (413, "request_too_large")
    assert "20000" in error["message"]


def test_a_body_that_does_not_say_how_large_it_is_is_refused_while_it_is_read(web: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 1000

    assert error_of(httpx.post(web.url + CHAT, content=endless(), timeout=60)) == (413, "request_too_large")
    assert web.post().status_code == 200


def test_large_bodies_together_are_bounded(web: Served) -> None:
    """Two that stay half-way hold room; a third finds none, until they are gone."""
    lines = [web.connect() for _ in range(3)]
    for line in lines:
        line.sendall(request(CHAT, b" " * 17_000, length=19_000))
    answer = heard(lines[2])
    status, error = status_and_error(answer)
    assert (status, error["code"]) == (503, "queue_full")
    assert b"retry-after: 1" in answer
    for line in lines:
        line.close()
    eventually(lambda: web.services.metrics.in_flight == 0)
    assert web.post(body=hello(user="u" * 19_000)).status_code == 200


def test_a_body_that_has_arrived_is_not_refused_for_those_of_others() -> None:
    """Whoever works on an answer goes on asking whether its client is there."""
    bodies = Bodies(LIMITS)

    async def heard_from(messages: list[dict[str, object]]) -> list[str]:
        arriving = iter(messages)

        async def receive() -> dict[str, object]:
            return next(arriving)

        with contextlib.ExitStack() as at_end:
            read = bodies.reader({"type": "http", "headers": []}, receive, at_end)
            first = await read()
            bodies.held += LIMITS.bodies_bytes
            return [first["type"], (await read())["type"]]

    body: dict[str, object] = {"type": "http.request", "body": b"{}"}
    assert asyncio.run(heard_from([body, {"type": "http.disconnect"}])) == ["http.request", "http.disconnect"]
    with pytest.raises(ApiError, match="too many large requests"):
        asyncio.run(heard_from([{**body, "more_body": True}, body]))


def test_a_watch_that_fails_is_an_error_and_no_client_that_left() -> None:
    async def failing() -> dict[str, object]:
        raise ApiError(503, "no more", code="queue_full")

    async def lines():  # type: ignore[no-untyped-def]
        yield b"data: 1\n\n"
        await asyncio.sleep(60)

    async def send(message: object) -> None:
        pass

    http = Request({"type": "http", "headers": []}, failing)
    with pytest.raises(ApiError, match="no more"):
        asyncio.run(unless_gone(http, asyncio.sleep(60)))
    with pytest.raises(ApiError, match="no more"):
        asyncio.run(EventStream(lines(), lambda error: b"")({"type": "http"}, failing, send))


def test_a_flow_may_have_so_much_under_way_and_others_go_on(web: Served) -> None:
    web.manager.script = never
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(web.post) for _ in range(3)]
        eventually(lambda: len(web.manager.submitted) == 3)
        web.manager.script = at_once
        refused = web.post()
        assert error_of(refused) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert web.post(headers={"authorization": "Bearer somebody else"}).status_code == 200
        answer_all(web, waiting)
    assert web.post().status_code == 200


def test_a_full_queue_refuses_and_a_first_token_makes_room(web: Served) -> None:
    web.manager.script = never
    with httpx.Client(base_url=web.url, timeout=60) as client:

        def ask(number: int, **fields: object) -> httpx.Response:
            return client.post(CHAT, json=hello(**fields), headers={"authorization": f"Bearer {number}"})

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, 1, n=4), pool.submit(ask, 2, n=4)]
            eventually(lambda: len(web.manager.submitted) == 2)
            refused = ask(3)
            assert error_of(refused) == (503, "queue_full")
            assert refused.headers["retry-after"] == "1"
            answer_all(web, waiting)
        web.manager.submitted.clear()
        web.manager.script = lambda submit: [tokens(submit, [100], index=at) for at in range(submit.n)]
        with ThreadPoolExecutor(4) as pool:
            running = []
            for number in range(3):
                running.append(pool.submit(ask, number, n=4))
                eventually(lambda: web.services.admission.running_requests == 4 * len(running))
            assert web.services.admission.queued_requests == 0
            answer_all(web, running)


def test_a_flood_of_one_client_leaves_room_for_another(web: Served) -> None:
    web.manager.script = never
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(web.post, CHAT, hello(n=2)) for _ in range(2)]
        eventually(lambda: len(web.manager.submitted) == 2)
        refused = web.post(body=hello(n=2))
        assert error_of(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        web.manager.script = at_once
        assert web.post(body=hello(n=4), headers={"authorization": "Bearer somebody else"}).status_code == 200
        answer_all(web, waiting)


def test_a_client_may_have_so_many_choices_under_way(web: Served) -> None:
    web.manager.script = lambda submit: [tokens(submit, [100], index=at) for at in range(submit.n)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(web.post, CHAT, hello(n=8))
        eventually(lambda: web.services.admission.running_requests == 8)
        assert error_of(web.post(body=hello(n=8))) == (429, "rate_limit_exceeded")
        web.manager.script = at_once
        assert web.post(body=hello(n=4)).status_code == 200
        answer_all(web, [running])


@given(st.integers(1, 12), st.integers(1, 64), st.integers(1, 100_000))
def test_whoever_comes_after_floods_finds_room(floods: int, choices: int, prompt_tokens: int) -> None:
    """However many episodes send requests until they are refused, one that has sent none yet is let in."""
    admission = Admission(Limits(flow_requests=10**6, flow_choices=10**6))
    sending = [f"flood {number}" for number in range(floods)]
    refusals: list[ApiError] = []
    while sending:
        for flow in list(sending):
            try:
                admission.enter(flow, choices, prompt_tokens)
            except ApiError as error:
                refusals.append(error)
                sending.remove(flow)
    assert {error.status for error in refusals} == {429}
    admission.enter("another", choices, prompt_tokens)


def scoring(**fields: object) -> dict[str, object]:
    prompts = [[20, 21, 22], [23, 24], [25, 26]]
    return {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 0, "max_tokens": 0, **fields}


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_that_are_scored_wait_in_the_same_queue(web: Served, max_tokens: int) -> None:
    web.manager.answers_scores = False
    with ThreadPoolExecutor(2) as pool:
        somebody = {"authorization": "Bearer somebody"}
        waiting = [
            pool.submit(web.post, "/v1/completions", scoring(max_tokens=max_tokens)),
            pool.submit(web.post, "/v1/completions", scoring(max_tokens=max_tokens), headers=somebody),
        ]
        eventually(lambda: len(web.manager.scores) == 6)
        admission = web.services.admission
        assert (admission.flows, admission.queued_requests, admission.queued_tokens) == (2, 6, 14)
        other = {"authorization": "Bearer other"}
        assert error_of(web.post("/v1/completions", scoring(), headers=other)) == (503, "queue_full")
        assert len(web.manager.scores) == 6
        for score in web.manager.scores:
            web.manager.say(m.Scored(request_id=score.request_id, logprobs=[-1.0] * (len(score.ids) - 1), version=3))
        assert {future.result().status_code for future in waiting} == {200}


def test_scores_that_nobody_waits_for_are_cancelled(web: Served) -> None:
    web.manager.answers_scores = False
    with web.connect() as line:
        body = httpx.Request("POST", "http://x", json=scoring()).content
        line.sendall(request("/v1/completions", body))
        eventually(lambda: len(web.manager.scores) == 3)
    asked = {score.request_id for score in web.manager.scores}
    eventually(lambda: set(web.manager.cancelled) == asked)


def test_queued_prompt_tokens_are_bounded_but_any_prompt_may_come_alone(web: Served) -> None:
    web.manager.script = never
    long = {"model": "tiny", "prompt": list(range(20, 520))}
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(web.post, "/v1/completions", long)
        eventually(lambda: len(web.manager.submitted) == 1)
        assert error_of(web.post("/v1/completions", long)) == (503, "queue_full")
        answer_all(web, [alone])


def test_a_request_that_takes_too_long_is_ended_and_frees_its_pages(hasty: Served) -> None:
    hasty.manager.script = lambda submit: [tokens(submit, [100])]
    whole = hasty.post()
    assert error_of(whole) == (503, "timeout")
    streamed = hasty.post(body=hello(stream=True))
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert '"code":"timeout"' in last
    eventually(lambda: len(hasty.manager.cancelled) == 2)


def test_a_client_that_vanishes_frees_its_pages(web: Served) -> None:
    """Whether it wanted to hear all at once, or bit by bit, or had asked for something else meanwhile."""
    web.manager.script = lambda submit: [tokens(submit, [100])]
    another = request("/v1/models", b"", method="GET")
    for stream, more in ((False, b""), (True, b""), (True, another)):
        with web.connect() as line:
            body = httpx.Request("POST", "http://x", json=hello(stream=stream)).content
            line.sendall(request(CHAT, body).replace(b"connection: close\r\n", b"") + more)
            eventually(lambda: web.manager.submitted)
        eventually(lambda: web.manager.cancelled)
        web.manager.reset()
        web.manager.script = lambda submit: [tokens(submit, [100])]


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/chat",
        request(CHAT, b"{", length=100),
        b"POST /x HTTP/1.1\r\nhost: x\r\n",
        b"GET /health HTTP/1.1\r\nh: " + b"x" * 30,
    ],
)
def test_a_request_that_never_comes_to_its_end_is_given_up(hasty: Served, sent: bytes) -> None:
    began = time.monotonic()
    status, error = status_and_error(hasty.raw(sent))
    assert (status, error["code"]) == (408, "timeout")
    assert time.monotonic() - began > 0.5


def test_a_head_that_comes_drop_by_drop_is_given_up(hasty: Served) -> None:
    with hasty.connect() as line:
        line.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):  # closed, in whatever way
            while time.monotonic() - began < 60:
                line.sendall(b"x: y\r\n")
                time.sleep(0.05)
    assert time.monotonic() - began < 60


def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty: Served) -> None:
    assert hasty.raw() == b""


def test_a_head_without_bounds_is_refused(web: Served) -> None:
    answer = web.raw(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 40_000)
    assert status_and_error(answer)[0] == 431
    answer = web.raw(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n")
    assert status_and_error(answer)[0] == 431


def test_more_connections_than_there_is_room_for(web: Served) -> None:
    lines = [web.connect() for _ in range(LIMITS.connections + 5)]
    answer = heard(lines[-1])
    status, error = status_and_error(answer)
    assert (status, error["code"]) == (503, "queue_full")
    for line in lines:
        line.close()
    eventually(lambda: web.get("/health").status_code == 200)


def test_a_client_that_does_not_read_is_cut_off(hasty: Served) -> None:
    """It asks for much more than lies in the sockets' buffers, and takes up none of it."""
    ids = [100] * 3900
    hasty.manager.script = lambda submit: [tokens(submit, ids, "length", index=at) for at in range(submit.n)]
    body = httpx.Request("POST", "http://x", json=hello(n=64, stream=True, logprobs=True, top_logprobs=20)).content
    with hasty.connect() as line:
        line.sendall(request(CHAT, body))
        eventually(lambda: hasty.manager.submitted)
        eventually(lambda: hasty.services.metrics.in_flight == 0)


def test_requests_on_one_connection_come_in_order_and_not_without_end(web: Served, hasty: Served) -> None:
    first = request("/v1/models", b"", method="GET").replace(b"connection: close\r\n", b"")
    answer = web.raw(first * 5 + request("/v1/models", b"", method="GET"))
    assert answer.count(b"HTTP/1.1 200") == 6
    hasty.manager.script = never
    body = httpx.Request("POST", "http://x", json=hello()).content
    slow = request(CHAT, body).replace(b"connection: close\r\n", b"")
    assert hasty.raw(slow + first * 1000).count(b"HTTP/1.1") <= 1


def test_a_prompt_that_is_too_long_says_how_long_and_what_the_limit_is(web: Served) -> None:
    answer = web.post("/v1/completions", {"model": "tiny", "prompt": list(range(20, 270)) * 20})
    assert error_of(answer) == (400, "context_length_exceeded")
    assert "5000" in answer.json()["error"]["message"]
    assert str(web.services.context_limit) in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path) -> Iterator[Served]:
    """With the limits that a server has by default."""
    with served(tiny_llama) as web:
        yield web


CONVERSATIONS = [(CHAT, {}), ("/v1/messages", {"max_tokens": 1}), ("/v1/messages/count_tokens", {}), ("/tokenize", {})]


@pytest.mark.parametrize(("path", "fields"), CONVERSATIONS)
def test_more_messages_than_a_context_has_tokens_are_refused(roomy: Served, path: str, fields: dict[str, int]) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages = turns * (roomy.services.context_limit // 2) + turns[:1]
    answer = roomy.post(path, hello(messages=messages, **fields))
    assert answer.status_code == 400
    assert f"may have {roomy.services.context_limit}" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "fields"), CONVERSATIONS)
def test_a_long_conversation_is_not_tokenised_where_others_are_served(
    roomy: Served, path: str, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = Renderer.encode
    monkeypatch.setattr(Renderer, "encode", lambda self, text: lengths.append(len(text)) or encode(self, text))
    content = "so many words " * 5000
    answer = roomy.post(path, hello(messages=[{"role": "user", "content": content}], **fields)).json()
    assert max(lengths, default=0) < IN_THREAD
    ids = encode(roomy.services.renderer, roomy.services.renderer.text([{"role": "user", "content": content}], []))
    counted = answer["count"] if path == "/tokenize" else answer.get("input_tokens")
    if counted is None:
        assert f"the prompt has {len(ids)} tokens" in answer["error"]["message"]
    else:
        assert counted == len(ids)


@given(st.lists(st.integers(0, IN_THREAD * 2), max_size=5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_tokenised_the_loop_is_held_for_a_bounded_part_of_it(
    patient: PatientRenderer, sizes: list[int]
) -> None:
    """And the ids are those of a renderer that is in no hurry."""
    texts = [("word " * (size // 5 + 1))[:size] for size in sizes]
    turns: list[int] = []

    def work() -> list[list[int]]:
        turns.append(0)
        found = []
        for text in texts:
            ids = patient.encode(text)
            found.append(list(ids))
            ids += [0]  # what it got is its own
        return found

    tokenised = Renderer.encode

    def counting(self: Renderer, text: str) -> list[int]:
        turns[-1] += len(text)
        return tokenised(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renderer, "encode", counting)
        found = asyncio.run(patient.patiently(work))
    assert max(turns) <= IN_THREAD
    assert found == [tokenised(patient, text) for text in texts]


@pytest.fixture(scope="module")
def patient(tiny_llama: Path) -> PatientRenderer:
    return PatientRenderer(tiny_llama)


@pytest.mark.parametrize("prompts", [1, 4])
def test_long_prompts_are_tokenised_in_a_thread_also_when_there_are_many_short_ones(
    patient: PatientRenderer, prompts: int
) -> None:
    threads: set[int] = set()

    class Recording:
        def get_vocab(self) -> dict[str, int]:
            return patient.tokenizer.get_vocab()

        def encode(self, text: str, **options: bool) -> object:
            threads.add(threading.get_ident())
            return patient.tokenizer.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            threads.add(threading.get_ident())
            return patient.tokenizer.encode_batch_fast(texts, **options)

    size = TextSize(Recording(), 100_000)  # type: ignore[arg-type]
    texts = [f"{number} words " * (IN_THREAD // prompts // 8 + 1) for number in range(prompts)]
    ids = asyncio.run(size.encode(texts, add_special_tokens=True))
    assert ids == [patient.tokenizer.encode(text).ids for text in texts]
    assert threads
    assert threading.get_ident() not in threads


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 200), st.sampled_from(["enter", "began", "leave"])
        )
    )
)
def test_admission_counts_what_is_there_and_forgets_the_rest(steps: list[tuple[str, int, int, str]]) -> None:
    admission = Admission(LIMITS)
    queued: list[tuple[Ticket, int, int]] = []
    running: list[tuple[Ticket, int, int]] = []
    refusals: list[ApiError] = []
    for flow, choices, prompt_tokens, step in steps:
        match step:
            case "enter":
                try:
                    queued.append((admission.enter(flow, choices, prompt_tokens), choices, prompt_tokens))
                except ApiError as error:
                    refusals.append(error)
            case "began" if queued:
                running.append(queued.pop(0))
                running[-1][0].began()
                running[-1][0].began()
            case "leave" if running or queued:
                ticket, _, _ = (running or queued).pop()
                ticket.leave()
                ticket.leave()
        assert admission.queued_requests == sum(choices for _, choices, _ in queued)
        assert admission.queued_tokens == sum(prompt for _, _, prompt in queued)
        assert admission.running_requests == sum(choices for _, choices, _ in running)
        assert len(queued) <= 1 or admission.queued_requests <= LIMITS.queued_requests
    assert all(error.status in (429, 503) and error.retry_after for error in refusals)
    for ticket, _, _ in queued + running:
        ticket.leave()
    assert (admission.flows, admission.queued_requests, admission.running_requests) == (0, 0, 0)
