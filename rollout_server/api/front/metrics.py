"""What `/metrics` shows, in Prometheus' text format, with names as vLLM's but for the prefix `lrl:`.

Counted here, in the web process: requests and their status, tokens, times to the first token, between tokens, and to the
end. Fetched from the engine when somebody looks: queues, pages, versions, its own counters; an engine that does not answer
shows as `lrl:engine_up 0`. Numbers are kept in plain integers and lists, since every token passes by: they are made into
Prometheus' families only when they are read. Single-threaded: use it from one event loop.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server import messages as m
from rollout_server.api.errors import EngineError
from rollout_server.api.front.limits import Admission
from rollout_server.manager.counters import Counters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_TIMEOUT_S = 2.0

_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_WHOLE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 3600.0)

_ENGINE_GAUGES = {
    "running": ("num_requests_running", "Choices that are being computed."),
    "waiting": ("num_requests_waiting", "Choices that wait for a place."),
    "version": ("policy_version", "Version of the weights that sample."),
}
"""By the engine's own name: ours, and what it is. Others are shown as `lrl:engine_<name>`."""
_ENGINE_COUNTERS = {field.name for field in fields(Counters)} | {"worker_restarts"}


class Histogram:
    """Counts of values by upper bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound as text, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum


class Metrics:
    """`model` labels everything; `engine_stats` asks the engine (`Replicas.stats`)."""

    def __init__(
        self, model: str, admission: Admission, engine_stats: Callable[[], Awaitable[Mapping[str, float]]]
    ) -> None:
        self._model = model
        self._admission = admission
        self._engine_stats = engine_stats
        self.in_flight = 0
        """HTTP requests under way."""
        self.answers: Counter[tuple[str, str, int]] = Counter()
        """By route, method and status; status 0 is a request that never got an answer."""
        self.durations: dict[str, Histogram] = {}
        """By route, seconds to the last byte of the answer."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.replays = 0
        """Requests of an episode that were sent again and got the answer that was recorded."""
        self.finished: Counter[str] = Counter()
        self.first_token = Histogram(_FIRST)
        self.between_tokens = Histogram(_BETWEEN)
        self.whole = Histogram(_WHOLE)

    def answered(self, route: str, method: str, status: int | None, seconds: float) -> None:
        self.answers[route, method, status or 0] += 1
        histogram = self.durations.get(route)
        if histogram is None:
            histogram = self.durations[route] = Histogram(_WHOLE)
        histogram.observe(seconds)

    async def page(self) -> bytes:
        """The text that Prometheus reads."""
        try:
            engine = await asyncio.wait_for(self._engine_stats(), SCRAPE_TIMEOUT_S)
        except (TimeoutError, EngineError):
            engine = {}
        registry = CollectorRegistry()
        registry.register(_Snapshot([*self._own(), *self._engines(engine)]))
        ProcessCollector(registry=registry)
        return generate_latest(registry)

    def _own(self) -> Iterator[Metric]:
        yield self._gauge("http_requests_in_flight", "HTTP requests under way.", self.in_flight)
        yield self._gauge(
            "num_requests_queued", "Admitted requests without a first token.", self._admission.queued_requests
        )
        yield self._gauge("num_tokens_queued", "Their prompt tokens.", self._admission.queued_tokens)
        yield self._gauge("num_flows", "Clients and episodes with requests under way.", self._admission.flows)
        requests = CounterMetricFamily(
            "lrl:http_requests", "Requests by route and status.", labels=["model_name", "route", "method", "status"]
        )
        for (route, method, status), count in self.answers.items():
            requests.add_metric([self._model, route, method, str(status)], count)
        yield requests
        durations = HistogramMetricFamily(
            "lrl:http_request_duration_seconds", "To the last byte of the answer.", labels=["model_name", "route"]
        )
        for route, histogram in self.durations.items():
            durations.add_metric([self._model, route], *histogram.samples())
        yield durations
        yield self._counter("prompt_tokens", "Tokens of prompts, once for all choices.", self.prompt_tokens)
        yield self._counter("prompt_tokens_cached", "Of them, known from earlier requests.", self.cached_tokens)
        yield self._counter("generation_tokens", "Tokens sampled.", self.generation_tokens)
        yield self._counter("request_replays", "Requests sent again, answered from the record.", self.replays)
        finished = CounterMetricFamily(
            "lrl:request_success", "Choices by their end.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.finished.items():
            finished.add_metric([self._model, reason], count)
        yield finished
        yield self._histogram("time_to_first_token_seconds", "From a request's head.", self.first_token)
        yield self._histogram("inter_token_latency_seconds", "Between tokens of a choice.", self.between_tokens)
        yield self._histogram("e2e_request_latency_seconds", "From a request's head to a choice's end.", self.whole)

    def _engines(self, stats: Mapping[str, float]) -> Iterator[Metric]:
        yield self._gauge("engine_up", "1 if all replicas answer.", 1.0 if stats else 0.0)
        families: dict[str, Metric] = {}
        for replica, name, value in _by_replica(stats):
            if name not in families:
                families[name] = _engine_family(name)
            families[name].add_metric([self._model, replica], value)  # type: ignore[attr-defined]
        yield from families.values()

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"lrl:{name}", what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"lrl:{name}", what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _histogram(self, name: str, what: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"lrl:{name}", what, labels=["model_name"])
        family.add_metric([self._model], *histogram.samples())
        return family


class Clock:
    """Of one prompt and its choices: told of each message of the engine, it knows when tokens came.

    `began` is called when the first one is there.
    """

    def __init__(self, metrics: Metrics, started: float, prompt_tokens: int, began: Callable[[], None]) -> None:
        self._metrics = metrics
        self._started = started
        self._began: Callable[[], None] | None = began
        self._last: dict[int, float] = {}
        """When the last token of each choice came."""
        metrics.prompt_tokens += prompt_tokens

    def heard(self, tokens: m.Tokens) -> None:
        metrics, now, count = self._metrics, time.perf_counter(), len(tokens.ids)
        if self._began is not None:
            self._began()
            self._began = None
            metrics.cached_tokens += tokens.cached_tokens
        last = self._last.get(tokens.index)
        if last is None:
            metrics.first_token.observe(now - self._started)
        elif count:
            metrics.between_tokens.observe((now - last) / count, count)
        self._last[tokens.index] = now
        metrics.generation_tokens += count
        if tokens.finish_reason is not None:
            metrics.finished[tokens.finish_reason] += 1
            metrics.whole.observe(now - self._started)


class _Snapshot(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _engine_family(name: str) -> Metric:
    labels = ["model_name", "replica"]
    if name in _ENGINE_COUNTERS:
        return CounterMetricFamily(f"lrl:engine_{name}", "The engine's own counter of this name.", labels=labels)
    own, what = _ENGINE_GAUGES.get(name, (f"engine_{name}", "The engine's own gauge of this name."))
    return GaugeMetricFamily(f"lrl:{own}", what, labels=labels)


def _by_replica(stats: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """Replica, name and value; sums over several replicas are left to the reader."""
    several = "replicas" in stats
    for key, value in stats.items():
        head, dot, name = key.partition(".")
        if dot and head.startswith("replica_"):
            yield head.removeprefix("replica_"), name, value
        elif not several:
            yield "0", key, value
