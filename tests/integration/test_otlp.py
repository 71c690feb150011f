"""Agents that are instrumented with OpenTelemetry, and collectors that take our episodes: over real sockets, in both directions."""

from __future__ import annotations

import contextvars
import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

from lightning_rl.cli import main
from lightning_rl.episode import Episode, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import LightningError
from lightning_rl.otlp import JSON, PROTOBUF, TraceRequest, encode
from lightning_rl.otlp.write import trace_request
from lightning_rl.recipe import Otlp
from lightning_rl.store import Store
from rollout_server.api.front.limits import Limits
from tests.integration.served_web import CHAT, Served, eventually, hello, served
from tests.unit.domain import make_call
from tests.unit.test_otlp import tree
from tracers.commands import otlp as otlp_export
from trainers import otlp_sink
from trainers.evaluation import score
from trainers.otlp_sink import OtlpSink, collector_of

LIMIT = 2**20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("otlp") / "episodes.db") as opened:
        yield opened


@pytest.fixture(scope="module")
def web(tiny_llama: Path, store: Store) -> Iterator[Served]:
    with served(tiny_llama, store=store.place, api_key="key", limits=Limits(body_bytes=LIMIT)) as running:
        yield running


@pytest.fixture
def begun(store: Store, request: pytest.FixtureRequest) -> str:
    """An episode of the test's own."""
    id = request.node.name.replace("[", ".").replace("]", "")
    store.begin(EpisodeStart(id=id, task=Task(id="t", input={}), phase="train", started_at=time.time()))
    return id


KEY = {"authorization": "Bearer key"}


def provider(exporter: OTLPSpanExporter, *, batch: bool = True, **resource: str) -> TracerProvider:
    made = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter) if batch else SimpleSpanProcessor(exporter))
    return made


def ask(web: Served, episode_id: str) -> str:
    """A call as an instrumented HTTP client makes it; the response's id."""
    headers = dict(KEY)
    propagate.inject(headers)
    return str(web.post(f"/e/{episode_id}{CHAT}", headers=headers).json()["id"])


@pytest.mark.parametrize("batch", [True, False], ids=["batched", "one-by-one"])
def test_an_instrumented_agent_needs_nothing_but_an_endpoint(
    web: Served, store: Store, begun: str, batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported one by one, every span comes before the one around it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{web.url}/e/{begun}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20key")
    traced = provider(OTLPSpanExporter(compression=Compression.Gzip if batch else None), batch=batch)
    tracer = traced.get_tracer("agent")

    def call_with_response_id() -> None:
        with (
            tracer.start_as_current_span("chat tiny", attributes={"gen_ai.operation.name": "chat"}) as chat,
            tracer.start_as_current_span("POST", kind=trace.SpanKind.CLIENT),
        ):
            chat.set_attribute("gen_ai.response.id", ask(web, begun))

    def call_without() -> None:
        with tracer.start_as_current_span("LLM", attributes={"openinference.span.kind": "LLM"}):
            ask(web, begun)

    def tool() -> None:
        said = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "sql", "gen_ai.tool.call.id": "call_1"}
        with tracer.start_as_current_span("execute_tool sql", attributes=said):
            trace.get_current_span().add_event("lrl.reward", {"name": "valid", "value": 0.5})
            raise ValueError("no such table")

    def in_thread() -> None:
        worker = threading.Thread(target=contextvars.copy_context().run, args=(call_without,))
        worker.start()
        worker.join()

    with (
        tracer.start_as_current_span("workflow"),
        tracer.start_as_current_span(
            "invoke_agent writer", attributes={"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "writer"}
        ),
    ):
        call_with_response_id()
        in_thread()
        with pytest.raises(ValueError, match="no such table"):
            tool()
    traced.shutdown()

    episode = store.episode(begun)
    spans = {span.name: span for span in episode.spans}
    assert {name: span.kind for name, span in spans.items()} == {
        "workflow": "chain",
        "writer": "agent",
        "POST": "chain",
        "sql": "tool",
    }
    assert spans["workflow"].parent_id is None
    assert spans["writer"].parent_id == spans["workflow"].id
    assert spans["POST"].parent_id == spans["sql"].parent_id == spans["writer"].id
    assert spans["sql"].attributes["tool_call_id"] == "call_1"
    assert "no such table" in (spans["sql"].error or "")
    assert "Traceback" in (spans["sql"].error or "")
    assert all(span.started_at <= span.ended_at for span in episode.spans)
    assert [call.span_id for call in episode.calls] == [spans["writer"].id] * 2
    assert [(r.name, r.value, r.span_id) for r in episode.rewards] == [("valid", 0.5, spans["sql"].id)]


@pytest.mark.parametrize("way", ["header", "key", "resource", "span"])
def test_the_episode_is_said_in_one_of_four_ways(web: Served, store: Store, begun: str, way: str) -> None:
    headers = {**KEY, "x-lrl-episode": begun} if way == "header" else KEY
    if way == "key":
        headers = {"authorization": f"Bearer key/e/{begun}"}
    exporter = OTLPSpanExporter(endpoint=f"{web.url}/v1/traces", headers=headers)
    traced = provider(exporter, **({"lrl.episode": begun} if way == "resource" else {}))
    attributes = {"lrl.episode": begun} if way == "span" else {}
    with traced.get_tracer("agent").start_as_current_span("one", attributes=attributes):
        pass
    assert traced.force_flush()
    traced.shutdown()
    assert [span.name for span in store.episode(begun).spans] == ["one"]


def a(number: int) -> str:
    return f"{number:016x}"


def span(number: int, parent: int | None = None, **fields: Any) -> dict[str, Any]:
    times = {"startTimeUnixNano": str(number * 10**9), "endTimeUnixNano": str((number + 1) * 10**9)}
    above = {"parentSpanId": a(parent)} if parent else {}
    return {"traceId": "0" * 31 + "1", "spanId": a(number), **above, "name": f"s{number}", **times, **fields}


def pairs(**values: Any) -> list[dict[str, Any]]:
    kinds = {str: "stringValue", float: "doubleValue"}
    return [{"key": key.replace("__", "."), "value": {kinds[type(value)]: value}} for key, value in values.items()]


def body(*spans: dict[str, Any]) -> dict[str, Any]:
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def post(web: Served, path: str, *spans: dict[str, Any]) -> dict[str, Any]:
    answer = web.post(path, body(*spans), headers=KEY)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == JSON
    told: dict[str, Any] = answer.json()["partialSuccess"]
    return told


def test_json_written_by_hand_sent_twice_out_of_order_and_never_ended(web: Served, store: Store, begun: str) -> None:
    reward = {"name": "lrl.reward", "timeUnixNano": "1000000000", "attributes": pairs(name="r", value=0.5)}
    requests = [
        [span(4, 3), span(5, 3, events=[reward, reward])],
        [span(3, 2, attributes=pairs(gen_ai__operation__name="chat"))],
        [span(2, 1, endTimeUnixNano="0")],
    ]
    for spans in [*requests, *requests]:
        assert post(web, f"/e/{begun}/v1/traces", *spans) == {}
    episode = store.episode(begun)
    assert {s.name: (s.parent_id, s.error) for s in episode.spans} == {
        "s4": (a(2), None),
        "s5": (a(2), None),
        "s2": (a(1), "never ended"),
    }
    assert [(r.value, r.time, r.span_id) for r in episode.rewards] == [(0.5, 1.0, a(5))] * 2


def test_what_is_refused_is_counted_and_said_and_the_rest_is_kept(web: Served, store: Store, begun: str) -> None:
    def named(episode_id: str) -> list[dict[str, Any]]:
        return pairs(lrl__episode=episode_id)

    told = post(web, "/v1/traces", span(1, attributes=named(begun)), span(2, attributes=named("nobody")), span(3))
    assert told["rejectedSpans"] == "2"
    assert "'nobody'" in told["errorMessage"]
    assert "x-lrl-episode" in told["errorMessage"]
    assert post(web, "/e/nobody/v1/traces", span(1))["rejectedSpans"] == "1"
    bad = span(4, 1, name="lrl.reward", attributes=pairs(name="much", value="a lot"))
    told = post(web, f"/e/{begun}/v1/traces", bad, span(5, spanId="00"))
    assert told["rejectedSpans"] == "2"
    assert "must be a finite number, not 'a lot'" in told["errorMessage"]
    store.end(begun, Outcome.COMPLETED, counted=True, ended_at=9.0)
    good = span(6, 1, name="lrl.reward", attributes=pairs(name="late", value=1.0))
    told = post(web, f"/e/{begun}/v1/traces", good, span(7))
    assert told["rejectedSpans"] == "1"
    assert "the span 's7' came after the end" in told["errorMessage"]
    assert "the reward 'late' came after the end" in told["errorMessage"]
    episode = store.episode(begun)
    assert {s.name for s in episode.spans} == {"s1", "lrl.reward"}
    assert not episode.rewards
    assert next(s for s in episode.spans if s.name == "lrl.reward").error == (
        "the reward 'much' must be a finite number, not 'a lot'"
    )
    answer = httpx.post(
        f"{web.url}/v1/traces",
        content=ExportTraceServiceRequest.FromString(
            encode(trace_request(an_episode("x"), content=False), PROTOBUF)
        ).SerializeToString(),
        headers={**KEY, "content-type": PROTOBUF},
    )
    assert answer.headers["content-type"] == PROTOBUF
    assert ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans == 3


def test_what_is_no_request_is_answered_with_a_status(web: Served, begun: str) -> None:
    def send(content: bytes, **headers: str) -> httpx.Response:
        url = f"{web.url}/e/{begun}/v1/traces"
        return httpx.post(url, content=content, headers={**KEY, "content-type": JSON, **headers}, timeout=60)

    bomb = gzip.compress(b" " * (LIMIT + 1))
    refused = [
        (400, send(b"{")),
        (400, send(b'{"resourceSpans": 1}')),
        (400, send(b"no gzip", **{"content-encoding": "gzip"})),
        (400, send(gzip.compress(b"{}")[:-1], **{"content-encoding": "gzip"})),
        (401, send(b"{}", authorization="Bearer wrong")),
        (413, send(b" " * (LIMIT + 1))),
        (413, send(bomb, **{"content-encoding": "gzip"})),
        (415, send(b"{}", **{"content-encoding": "br"})),
        (415, send(b"{}", **{"content-type": "text/plain"})),
    ]
    for status, answer in refused:
        assert answer.status_code == status, answer.text
        assert isinstance(answer.json()["code"], int)
        assert answer.json()["message"]
    assert send(b"\xff", **{"content-type": PROTOBUF}).headers["content-type"] == PROTOBUF
    assert web.services.metrics.in_flight == 0


def test_any_bytes_are_answered(web: Served, begun: str) -> None:
    good = encode(trace_request(an_episode("x"), content=True), PROTOBUF)
    with httpx.Client(base_url=web.url, headers=KEY, timeout=60) as client:

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.binary(max_size=300)
            | st.integers(0, len(good)).flatmap(lambda at: st.just(good[:at] + b"\x7f" + good[at:])),
            st.sampled_from([PROTOBUF, JSON]),
            st.sampled_from(["identity", "gzip", "deflate"]),
        )
        def ask(content: bytes, kind: str, encoding: str) -> None:
            packed = gzip.compress(content) if encoding == "gzip" else content
            headers = {"content-type": kind, "content-encoding": encoding}
            answer = client.post(f"/e/{begun}/v1/traces", content=packed, headers=headers)
            assert answer.status_code in (200, 400), answer.text

        ask()
    assert web.post(CHAT, hello(), headers=KEY).status_code == 200


def an_episode(id: str, **values: Any) -> Episode:
    return Episode(
        start=EpisodeStart(id=id, task=Task(id="t", input={}), phase="train", started_at=1.0),
        calls=[
            make_call([1, 2], [3], id=f"{id}-c", episode_id=id, span_id=a(1), response_id="r", request={"model": "m"})
        ],
        spans=[Span(id=a(1), episode_id=id, name="writer", kind="agent", started_at=1.0, ended_at=3.0)],
        rewards=[Reward(episode_id=id, name="solved", value=1.0, time=2.0, span_id=a(1))],
        **{"outcome": Outcome.COMPLETED, "counted": True, "ended_at": 4.0, **values},
    )


def test_an_exported_episode_can_be_sent_to_another_and_is_the_same_tree(web: Served, store: Store, begun: str) -> None:
    episode = an_episode("exported")
    traced = encode(trace_request(episode, content=True), PROTOBUF)
    headers = {**KEY, "content-type": PROTOBUF}
    answer = httpx.post(f"{web.url}/e/{begun}/v1/traces", content=traced, headers=headers)
    assert (answer.status_code, answer.content) == (200, b"")
    read = store.episode(begun)
    assert tree(read.spans) == tree(episode.spans)
    assert [(r.name, r.value, r.time, r.span_id) for r in read.rewards] == [("solved", 1.0, 2.0, a(1))]


class Taken:
    """A collector that reads what it gets with OpenTelemetry's own classes."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[int] = []
        """Statuses to give before 200."""

    def episodes(self) -> list[str]:
        roots = [
            span.attributes[0].value.string_value
            for request in self.requests
            for span in request.resource_spans[0].scope_spans[0].spans
            if not span.parent_span_id
        ]
        return sorted(roots)


@contextmanager
def collecting() -> Iterator[tuple[str, Taken]]:
    taken = Taken()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"]))
            status = taken.answers.pop(0) if taken.answers else 200
            if status == 200:
                assert self.path == "/v1/traces"
                assert self.headers["content-type"] == PROTOBUF
                taken.requests.append(ExportTraceServiceRequest.FromString(gzip.decompress(sent)))
                taken.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(status)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collectors_refusal_is_told_and_keys_go_to_nobody_else(web: Served) -> None:
    collector = otlp_export.Collector(web.url, otlp_export.parse_headers("authorization=Bearer%20key"))
    with pytest.raises(otlp_export.ExportError, match="refused 3 spans: 3 spans were refused: no episode 'nobody'"):
        collector.send(trace_request(an_episode("nobody"), content=False))
    with collecting() as (url, taken):
        taken.answers, collector = [307], otlp_export.Collector(url)
        with pytest.raises(otlp_export.ExportError, match="HTTP 307"):
            collector.send(trace_request(an_episode("x"), content=False))
    with pytest.raises(LightningError, match="without a password") as caught:
        otlp_export.Collector("http://user:secret@127.0.0.1:1")
    with pytest.raises(LightningError, match="header 2 ") as also:
        otlp_export.parse_headers("a=b,secret")
    with pytest.raises(LightningError, match="that no header can have") as control:
        otlp_export.parse_headers("a=secret%0d%0ax")
    with pytest.raises(LightningError, match="that no header can have") as wide:
        otlp_export.parse_headers("a=secret\u20ac")
    refused = otlp_export.Collector(url, {"a": "secret\r\nx"})
    with pytest.raises(otlp_export.ExportError, match="ValueError") as quoted:
        refused.send(trace_request(an_episode("x"), content=False), 1)
    errors = (caught, also, control, wide, quoted)
    assert "secret" not in "".join(str(each.value) for each in errors)


def filled(path: Path) -> Store:
    store = Store.open(path)
    for id in ("one", "two"):
        store.add_episode(an_episode(id))
    store.begin(EpisodeStart(id="running", task=Task(id="t", input={}), phase="train"))
    return store


def test_a_run_sends_its_finished_episodes_behind_its_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLECTOR", "authorization=Bearer%20secret,x-team=rl")
    said: list[str] = []
    with collecting() as (url, taken), filled(tmp_path / "episodes.db") as store:
        taken.answers = [503]
        collector = collector_of(Otlp(endpoint=url, headers_env="COLLECTOR"))
        sink = OtlpSink(collector, store, False, said.append)
        sink.samples([], 1)
        sink.samples([], 1)
        sink.evaluation("base", score([1.0]), 0)
        sink.close(failed=False)
        assert taken.episodes() == ["one", "two"]
        assert said == []
        assert taken.headers[0]["authorization"] == "Bearer secret"
        assert taken.headers[0]["x-team"] == "rl"
    with pytest.raises(LightningError, match="NOT_SET is not set"):
        collector_of(Otlp(endpoint=url, headers_env="NOT_SET"))


def test_an_episode_that_cannot_be_sent_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(episode: Episode, *, content: bool) -> TraceRequest:
        if episode.id == "one":
            raise ValueError("with the content of a span")
        return trace_request(episode, content=content)

    monkeypatch.setattr(otlp_sink, "trace_request", broken)
    said: list[str] = []
    with collecting() as (url, taken), filled(tmp_path / "episodes.db") as store:
        sink = OtlpSink(otlp_export.Collector(url), store, False, said.append)
        sink.samples([], 1)
        sink.close(failed=False)
        assert taken.episodes() == ["two"]
    assert said[0].startswith("traces: one: ValueError; ")
    assert said[1] == f"traces: 1 episodes were sent to {url}, 1 were lost"


def test_a_collector_that_is_not_there_costs_the_run_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_export, "FIRST_WAIT_S", 0.01)
    said: list[str] = []
    with collecting() as (url, _):
        pass
    with filled(tmp_path / "episodes.db") as store:
        began = time.monotonic()
        collector = collector_of(Otlp(endpoint=url))
        sink = OtlpSink(collector, store, False, said.append)
        sink.samples([], 1)
        assert time.monotonic() - began < 30
        eventually(lambda: sink.lost == 2)
        assert len(said) == 1
        assert "the run goes on" in said[0]
        sink.close(failed=False)
    assert said[1:] == [f"traces: 0 episodes were sent to {url}, 2 were lost"]


def test_lrl_traces_otlp_sends_a_run_or_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database, out = tmp_path / "episodes.db", tmp_path / "traces.jsonl"
    filled(database).close()
    with collecting() as (url, taken):
        assert main(["traces", "otlp", str(database), "--endpoint", url]) == 0
        assert taken.episodes() == ["one", "two"]
        assert main(["traces", "otlp", str(database), "two", "--content", "--out", str(out)]) == 0
        taken.answers = [400]
        assert main(["traces", "otlp", str(database), "--endpoint", url]) == 2
    (line,) = out.read_text().splitlines()
    spans = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert [span["name"] for span in spans] == ["episode two", "invoke_agent writer", "chat m"]
    assert "refused a trace: HTTP 400" in capsys.readouterr().err
