"""What the server refuses because it is too much: typed, at once, and without a trace left behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.api.errors import ApiError
from rollout_server.api.front.limits import Admission, Limits, Ticket
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
    queued_requests=4,
    queued_tokens=400,
    flow_requests=3,
    request_timeout_s=1.0,
    read_timeout_s=0.6,
    write_timeout_s=0.6,
    connections=40,
)


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_llama, limits=LIMITS) as web:
        yield web


@pytest.fixture
def web(shared: Served) -> Iterator[Served]:
    """Whatever a test does, nothing of it is left."""
    shared.manager.reset()
    shared.manager.script = at_once
    yield shared
    admission, metrics = shared.services.admission, shared.services.metrics
    eventually(lambda: metrics.in_flight == 0)
    assert (admission.flows, admission.queued_requests, admission.queued_tokens, admission.running_requests) == (0,) * 4


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

    assert error_of(httpx.post(web.url + CHAT, content=endless(), timeout=10)) == (413, "request_too_large")
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
        assert {future.result().status_code for future in waiting} == {503}  # their time was over
    assert web.post().status_code == 200


def test_a_full_queue_refuses_and_a_first_token_makes_room(web: Served) -> None:
    web.manager.script = never
    with httpx.Client(base_url=web.url, timeout=10) as client:

        def ask(number: int, **fields: object) -> httpx.Response:
            return client.post(CHAT, json=hello(**fields), headers={"authorization": f"Bearer {number}"})

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, 1, n=2), pool.submit(ask, 2, n=2)]
            eventually(lambda: len(web.manager.submitted) == 2)
            refused = ask(3)
            assert error_of(refused) == (503, "queue_full")
            assert refused.headers["retry-after"] == "1"
            assert {future.result().status_code for future in waiting} == {503}
        web.manager.script = lambda submit: [tokens(submit, [100], index=at) for at in range(submit.n)]
        with ThreadPoolExecutor(4) as pool:
            running = []
            for number in range(3):
                running.append(pool.submit(ask, number, n=4))
                eventually(lambda: web.services.admission.running_requests == 4 * len(running))
            assert web.services.admission.queued_requests == 0
            for future in running:
                future.result()


def test_queued_prompt_tokens_are_bounded_but_any_prompt_may_come_alone(web: Served) -> None:
    web.manager.script = never
    long = {"model": "tiny", "prompt": list(range(20, 520))}
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(web.post, "/v1/completions", long)
        eventually(lambda: len(web.manager.submitted) == 1)
        assert error_of(web.post("/v1/completions", long)) == (503, "queue_full")
        alone.result()


def test_a_request_that_takes_too_long_is_ended_and_frees_its_pages(web: Served) -> None:
    web.manager.script = lambda submit: [tokens(submit, [100])]
    whole = web.post()
    assert error_of(whole) == (503, "timeout")
    streamed = web.post(body=hello(stream=True))
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert '"code":"timeout"' in last
    eventually(lambda: len(web.manager.cancelled) == 2)


def test_a_client_that_vanishes_frees_its_pages(web: Served) -> None:
    """Whether it wanted to hear all at once, or bit by bit, or had asked for something else meanwhile."""
    web.manager.script = lambda submit: [tokens(submit, [100])]
    another = request("/v1/models", b"", method="GET")
    for stream, more in ((False, b""), (True, b""), (True, another)):
        with web.connect() as line:
            body = httpx.Request("POST", "http://x", json=hello(stream=stream)).content
            line.sendall(request(CHAT, body).replace(b"connection: close\r\n", b"") + more)
            eventually(lambda: web.manager.submitted)
        eventually(lambda: web.manager.cancelled, seconds=0.8)
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
def test_a_request_that_never_comes_to_its_end_is_given_up(web: Served, sent: bytes) -> None:
    began = time.monotonic()
    status, error = status_and_error(web.raw(sent))
    assert (status, error["code"]) == (408, "timeout")
    assert 0.5 < time.monotonic() - began < 3


def test_a_head_that_comes_drop_by_drop_is_given_up(web: Served) -> None:
    with web.connect() as line:
        line.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):  # closed, in whatever way
            while time.monotonic() - began < 5:
                line.sendall(b"x: y\r\n")
                time.sleep(0.05)
    assert time.monotonic() - began < 3


def test_a_connection_that_says_nothing_is_closed_without_a_word(web: Served) -> None:
    assert web.raw() == b""


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


def test_a_client_that_does_not_read_is_cut_off(web: Served) -> None:
    """It asks for much more than lies in the sockets' buffers, and takes up none of it."""
    ids = [100] * 3900
    web.manager.script = lambda submit: [tokens(submit, ids, "length", index=at) for at in range(submit.n)]
    body = httpx.Request("POST", "http://x", json=hello(n=64, stream=True, logprobs=True, top_logprobs=20)).content
    with web.connect() as line:
        line.sendall(request(CHAT, body))
        eventually(lambda: web.services.metrics.in_flight == 1)
        eventually(lambda: web.services.metrics.in_flight == 0, seconds=10)


def test_requests_on_one_connection_come_in_order_and_not_without_end(web: Served) -> None:
    first = request("/v1/models", b"", method="GET").replace(b"connection: close\r\n", b"")
    answer = web.raw(first * 5 + request("/v1/models", b"", method="GET"))
    assert answer.count(b"HTTP/1.1 200") == 6
    web.manager.script = never
    body = httpx.Request("POST", "http://x", json=hello()).content
    slow = request(CHAT, body).replace(b"connection: close\r\n", b"")
    assert web.raw(slow + first * 1000).count(b"HTTP/1.1") <= 1


def test_a_prompt_that_is_too_long_says_how_long_and_what_the_limit_is(web: Served) -> None:
    answer = web.post("/v1/completions", {"model": "tiny", "prompt": list(range(20, 270)) * 20})
    assert error_of(answer) == (400, "context_length_exceeded")
    assert "5000" in answer.json()["error"]["message"]
    assert str(web.services.context_limit) in answer.json()["error"]["message"]


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
