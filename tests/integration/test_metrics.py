"""`/metrics` as Prometheus reads it: what it counts is what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from rollout_server import messages as m
from rollout_server.api.front.metrics import Histogram
from tests.integration.scripted_manager import one_by_one
from tests.integration.served_web import CHAT, Served, hello, served


@pytest.fixture
def web(tiny_llama: Path) -> Iterator[Served]:
    with served(tiny_llama) as running:
        yield running


def read(web: Served) -> dict[tuple[str, ...], float]:
    """Samples by name and labels but for the model's."""
    page = web.get("/metrics")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[sample.name, *labels] = sample.value
    return found


def test_tokens_and_times_of_requests(web: Served) -> None:
    web.manager.script = lambda submit: one_by_one(submit, [[100, 101, 102]] * submit.n)
    prompt = web.post(body=hello(n=2)).json()["usage"]["prompt_tokens"]
    web.post(body=hello(stream=True))
    assert web.post(body=hello(temperature=9)).status_code == 400
    seen = read(web)
    assert seen["lrl:prompt_tokens_total",] == 2 * prompt
    assert seen["lrl:generation_tokens_total",] == 9
    assert seen["lrl:request_success_total", "stop"] == 3
    assert seen["lrl:time_to_first_token_seconds_count",] == 3
    assert seen["lrl:inter_token_latency_seconds_count",] == 6
    assert seen["lrl:e2e_request_latency_seconds_count",] == 3
    assert seen["lrl:http_requests_total", "POST", CHAT, "200"] == 2
    assert seen["lrl:http_requests_total", "POST", CHAT, "400"] == 1
    assert seen["lrl:http_request_duration_seconds_count", CHAT] == 3
    assert seen["lrl:http_requests_in_flight",] == 1  # its own
    assert seen["lrl:num_requests_queued",] == 0


def test_routes_are_few_whatever_paths_are_tried(web: Served) -> None:
    for number in range(20):
        web.get(f"/nothing/{number}")
        web.get(f"/v1/models/m{number}")
        web.post(f"/e/episode{number}/v1/chat/completions")
    routes = {key[1:] for key in read(web) if key[0] == "lrl:http_requests_total"}
    assert routes == {
        ("GET", "unknown", "404"),
        ("GET", "/v1/models/{model}", "404"),
        ("POST", "/e/{episode}/v1/chat/completions", "404"),
    }


def test_the_engines_own_counters_by_replica(web: Served) -> None:
    web.manager.stats = {"version": 7.0, "running": 2.0, "waiting": 5.0, "pages_free": 9.0, "preemptions": 4.0}
    seen = read(web)
    assert seen["lrl:engine_up",] == 1
    assert seen["lrl:policy_version", "0"] == 7
    assert seen["lrl:num_requests_running", "0"] == 2
    assert seen["lrl:num_requests_waiting", "0"] == 5
    assert seen["lrl:engine_pages_free", "0"] == 9
    assert seen["lrl:engine_preemptions_total", "0"] == 4


def test_an_engine_that_fails_is_shown_as_down_and_the_rest_stays(web: Served) -> None:
    web.post()
    web.manager.refuses[m.GetStats] = m.Failed(request_id="", code="worker_failed", message="gone")
    seen = read(web)
    assert seen["lrl:engine_up",] == 0
    assert seen["lrl:generation_tokens_total",] == 1


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 3))))
def test_a_histogram_counts_as_prometheus_defines_it(observed: list[tuple[float, int]]) -> None:
    bounds = (0.1, 0.5, 2.0)
    histogram = Histogram(bounds)
    for value, times in observed:
        histogram.observe(value, times)
    buckets, total = histogram.samples()
    expected = [sum(times for value, times in observed if value <= bound) for bound in (*bounds, float("inf"))]
    assert [count for _, count in buckets] == expected
    assert [bound for bound, _ in buckets] == ["0.1", "0.5", "2.0", "+Inf"]
    assert total == pytest.approx(sum(value * times for value, times in observed))
