"""OTLP read and written: beside OpenTelemetry's own protobuf classes, and what spans mean for an episode."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest as Official
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from sqlalchemy import event

from lightning_rl import otlp
from lightning_rl.episode import CallLink, Episode, Outcome, Reward, Span
from lightning_rl.otlp import JSON, MAX_VALUES, PROTOBUF, OtelEvent, OtelSpan, OtlpError, TraceRequest, decode
from lightning_rl.otlp import names as otlp_names
from lightning_rl.otlp.read import MAX_TEXT, received
from lightning_rl.otlp.write import trace_id, trace_request
from lightning_rl.store import Store
from lightning_rl.store.received import Late
from tests.unit.domain import make_call, make_start

NAME = st.text(st.characters(codec="utf-8"), max_size=8)
U64 = st.integers(0, 2**64 - 1)
VALUE = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | NAME,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=6,
)
ATTRIBUTES = st.dictionaries(NAME, VALUE, max_size=4)


def id_of(size: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=size, max_size=size).map(bytes.hex)


SPANS = st.lists(
    st.builds(
        OtelSpan,
        id=id_of(8),
        trace_id=id_of(16),
        parent_id=st.none() | id_of(8),
        name=NAME,
        kind=st.integers(0, 5),
        start_ns=U64,
        end_ns=U64,
        attributes=ATTRIBUTES,
        events=st.lists(st.builds(OtelEvent, name=NAME, time_ns=U64, attributes=ATTRIBUTES), max_size=2),
        status=st.integers(0, 2),
        status_message=NAME,
        resource=st.just({"service.name": "s"}),
    ),
    max_size=3,
)


def with_base64_ids(request: Any) -> Any:
    """OTLP's JSON as protobuf's own mapping has it, where ids are bytes."""
    for of_resource in request["resourceSpans"]:
        for of_scope in of_resource["scopeSpans"]:
            for span in of_scope["spans"]:
                for name in ("traceId", "spanId", "parentSpanId"):
                    if name in span:
                        span[name] = msgspec.json.decode(msgspec.json.encode(bytes.fromhex(span[name])))
    return request


@given(SPANS)
def test_opentelemetry_reads_what_we_write_and_we_read_what_it_writes(spans: list[OtelSpan]) -> None:
    request = TraceRequest(resource={"service.name": "s"}, scope="test", spans=spans)
    official = Official.FromString(otlp.encode(request, PROTOBUF))
    as_json = json_format.ParseDict(with_base64_ids(json.loads(otlp.encode(request, JSON))), Official())
    assert [span.name for span in official.resource_spans[0].scope_spans[0].spans] == [span.name for span in spans]
    assert decode(official.SerializeToString(), PROTOBUF) == spans
    assert decode(as_json.SerializeToString(), PROTOBUF) == spans
    assert decode(otlp.encode(request, JSON), JSON) == spans


@given(st.binary(max_size=200), st.sampled_from([PROTOBUF, JSON]))
def test_any_bytes_are_spans_or_a_typed_error(body: bytes, encoding: otlp.Encoding) -> None:
    try:
        spans = decode(body, encoding)
    except OtlpError:
        return
    if encoding == PROTOBUF and spans:
        try:
            official = Official.FromString(body)
        except DecodeError:
            return  # it refuses text that is no UTF-8
        assert len(spans) == sum(len(s.spans) for r in official.resource_spans for s in r.scope_spans)


@given(SPANS, st.data())
def test_a_damaged_request_is_spans_or_a_typed_error(spans: list[OtelSpan], data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from([PROTOBUF, JSON]))
    body = bytearray(otlp.encode(TraceRequest(resource={}, scope="", spans=spans), encoding))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = received(decode(bytes(body), encoding), "e")
    except OtlpError:
        return
    msgspec.json.encode(result)


def test_a_body_of_many_empty_messages_is_refused_before_it_is_large() -> None:
    spans = b"\x12\x00" * (MAX_VALUES + 1)
    scope = b"\x12" + _varint(len(spans)) + spans
    with pytest.raises(OtlpError, match="more than") as caught:
        decode(b"\x0a" + _varint(len(scope)) + scope, PROTOBUF)
    assert caught.value.too_large
    deep = b""
    for _ in range(40):
        inside = b"\x0a" + _varint(len(deep)) + deep
        deep = b"\x2a" + _varint(len(inside)) + inside
    pair = b"\x12" + _varint(len(deep)) + deep
    for tag in (b"\x4a", b"\x12", b"\x12", b"\x0a"):
        pair = tag + _varint(len(pair)) + pair
    with pytest.raises(OtlpError, match="deep"):
        decode(pair, PROTOBUF)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_answers_are_in_otlps_own_terms() -> None:
    told = ExportTraceServiceResponse.FromString(otlp.answer(PROTOBUF, 3, "no episode"))
    assert (told.partial_success.rejected_spans, told.partial_success.error_message) == (3, "no episode")
    assert json.loads(otlp.answer(JSON, 3, "no episode"))["partialSuccess"] == {
        "rejectedSpans": "3",
        "errorMessage": "no episode",
    }
    assert otlp.answer(PROTOBUF, 0, "") == b""
    for encoding in (PROTOBUF, JSON):
        assert otlp.refusal(otlp.answer(encoding, 3, "no episode"), encoding) == (3, "no episode")
        assert otlp.refusal(otlp.answer(encoding, 0, ""), encoding) == (0, "")


def a(number: int) -> str:
    return f"{number:016x}"


def span(number: int, parent: int | None = None, **values: Any) -> OtelSpan:
    defaults = {"name": f"span {number}", "start_ns": number * 10**9, "end_ns": (number + 1) * 10**9}
    return OtelSpan(id=a(number), parent_id=a(parent) if parent else None, **defaults | values)


@pytest.mark.parametrize(
    ("attributes", "kind", "name"),
    [
        ({"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "writer"}, "agent", "writer"),
        ({"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "sql"}, "tool", "sql"),
        ({"gen_ai.operation.name": "embeddings"}, "chain", "span 1"),
        ({"openinference.span.kind": "AGENT"}, "agent", "span 1"),
        ({"openinference.span.kind": "RETRIEVER"}, "chain", "span 1"),
        ({"openinference.span.kind": "TOOL", "tool.name": "sql"}, "tool", "sql"),
        ({"traceloop.span.kind": "workflow", "traceloop.entity.name": "plan"}, "chain", "plan"),
        ({"lrl.span.kind": "handoff"}, "handoff", "span 1"),
        ({"http.request.method": "POST"}, "chain", "span 1"),
    ],
)
def test_conventions_say_what_a_span_is(attributes: dict[str, Any], kind: str, name: str) -> None:
    (found,) = received([span(1, attributes=attributes)], "e").spans
    assert (found.kind, found.name) == (kind, name)


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.operation.name": "chat", "gen_ai.response.id": "r1"},
        {"openinference.span.kind": "LLM", "gen_ai.response.id": "r1"},
        {"llm.request.type": "chat", "gen_ai.response.id": "r1"},
    ],
)
def test_a_models_call_becomes_a_link_to_the_span_that_made_it(attributes: dict[str, Any]) -> None:
    spans = [span(4, 3), span(3, 2, attributes=attributes), span(2, 1, attributes=attributes), span(1)]
    result = received(spans, "e")
    assert {found.id: found.parent_id for found in result.spans} == {a(4): a(1), a(1): None}
    assert result.links == [CallLink(episode_id="e", response_id="r1", span_id=a(1))] * 2
    assert result.folded == {a(3): a(1), a(2): a(1)}
    later = received([span(5, 3)], "e", result.folded)
    assert later.spans[0].parent_id == a(1)


def test_the_making_of_an_agent_is_no_span() -> None:
    result = received([span(1, attributes={"gen_ai.operation.name": "create_agent"}), span(2, 1)], "e")
    assert [(one.id, one.parent_id) for one in result.spans] == [(a(2), None)]


def test_long_chains_of_calls_are_read_in_linear_time() -> None:
    call = {"gen_ai.operation.name": "chat"}
    chain = [span(1), *(span(number, number - 1, attributes=call) for number in range(2, 30_000))]
    began = time.monotonic()
    assert set(received(chain[::-1], "e").folded.values()) == {a(1)}
    assert time.monotonic() - began < 60  # minutes, if every place were looked for from the beginning
    ring = [span(1, 3, attributes=call), span(2, 1, attributes=call), span(3, 2, attributes=call), span(4, 3)]
    assert received(ring, "e").folded == dict.fromkeys((a(1), a(2), a(3)))


def test_times_that_are_none_are_sent_on_within_64_bits() -> None:
    event = OtelEvent(name="lrl.reward", time_ns=2**64 - 1, attributes={"name": "r", "value": 1})
    result = received([span(1, start_ns=2**64 - 1, end_ns=2**64 - 1, events=[event])], "e")
    late = Span(id=a(9), episode_id="e", name="n", kind="chain", started_at=math.nan, ended_at=math.inf)
    spans = [*result.spans, late]
    episode = Episode(start=make_start(started_at=-1e30), spans=spans, rewards=result.rewards, ended_at=1e30)
    for encoding in (PROTOBUF, JSON):
        assert len(decode(otlp.encode(trace_request(episode, content=True), encoding), encoding)) == 3


def test_commas_inside_text_are_no_values() -> None:
    text = '{"a\\\\": [1, 2], \\"b\\"},' * 500_000
    attribute = {"key": "gen_ai.tool.call.result", "value": {"stringValue": text}}
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": a(1), "attributes": [attribute]}]}]}]}
    assert len(text) > 10_000_000
    (found,) = decode(json.dumps(body).encode(), JSON)
    assert found.attributes["gen_ai.tool.call.result"] == text
    for hostile in (
        b'["", ' + b'{"":[]},' * MAX_VALUES,
        b'"' * 10**6 + b"," * (MAX_VALUES + 1),
        b"[" * (MAX_VALUES + 1),
    ):
        with pytest.raises(OtlpError, match="more than"):
            decode(hostile, JSON)


def test_a_tool_call_is_told_in_our_words() -> None:
    said = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.call.id": "call_1",
        "gen_ai.tool.call.arguments": '{"a": 1}',
        "gen_ai.tool.call.result": "2",
    }
    (found,) = received([span(1, attributes=said)], "e").spans
    assert found.attributes == {
        "gen_ai.operation.name": "execute_tool",
        "tool_call_id": "call_1",
        "arguments": {"a": 1},
        "result": "2",
    }


def test_failures_are_told_with_their_traceback_and_spans_without_an_end_as_such() -> None:
    exception = OtelEvent(name="exception", attributes={"exception.type": "E", "exception.message": "m"})
    traced = OtelEvent(name="exception", attributes={"exception.stacktrace": "Traceback …"})
    spans = [
        span(1, status=2, status_message="why"),
        span(2, status=2, events=[exception]),
        span(3, events=[traced]),
        span(4, status=1, events=[exception]),
        span(5, end_ns=0),
        span(6, end_ns=1),
    ]
    found = received(spans, "e").spans
    assert [one.error for one in found] == ["why", "E: m", None, None, "never ended", None]
    assert found[2].attributes["events"] == [{"name": "exception", "time": 0.0, "exception.stacktrace": "Traceback …"}]
    assert found[4].ended_at == found[4].started_at == 5.0
    assert found[5].ended_at == 6.0


def test_rewards_are_where_they_were_given_and_bad_ones_are_told_there() -> None:
    def event(**said: Any) -> OtelEvent:
        return OtelEvent(name="lrl.reward", time_ns=2 * 10**9, attributes=said)

    bad = [event(name="b", value=value) for value in ("0.5", math.nan, None, [1])] + [event(name="", value=1)]
    spans = [
        span(2, 1, name="lrl.reward", attributes={"name": "sql", "value": 1}),
        span(3, 1, name="agentlightning.annotation", attributes={"agentlightning.reward.0.value": 0.25}),
        span(1, events=[event(name="r", value=0.5), event(value=True), *bad]),
        span(4, 1, name="lrl.reward", attributes={"name": "x", "value": "much"}),
    ]
    result = received(spans, "e")
    assert result.rewards == [
        Reward(episode_id="e", name="sql", value=1.0, time=2.0, span_id=a(1)),
        Reward(episode_id="e", name="reward", value=0.25, time=3.0, span_id=a(1)),
        Reward(episode_id="e", name="r", value=0.5, time=2.0, span_id=a(1)),
        Reward(episode_id="e", name="reward", value=1.0, time=2.0, span_id=a(1)),
    ]
    told = [found for found in result.spans if found.name == "lrl.reward"]
    assert len(result.problems) == len(told) == 6
    assert result.refused == 1
    assert {found.parent_id for found in told} == {a(1)}
    assert len({found.id for found in told}) == 6
    assert told[0].error == "the reward 'b' must be a finite number, not '0.5'"
    assert received(spans, "e") == result


def test_what_is_too_long_is_cut_with_a_note_and_what_json_lacks_is_text() -> None:
    said = {"long": "x" * 10_000_000, "nan": math.nan, **{f"k{n}": "y" * 50_000 for n in range(300)}}
    (found,) = received([span(1, attributes=said)], "e").spans
    assert found.attributes["long"].endswith(f"… [the first {MAX_TEXT:,} of 10,000,000 characters]")
    assert found.attributes["nan"] == "nan"
    assert found.attributes["lrl.left_out"] == "46 more attributes"
    assert len(msgspec.json.encode(found)) < 1_100_000


def test_spans_without_a_proper_id_are_refused_and_cost_no_other() -> None:
    result = received([span(1), OtelSpan(id="00"), OtelSpan(id="0" * 16)], "e")
    assert (len(result.spans), result.refused, len(result.problems)) == (1, 2, 2)


def an_episode() -> Episode:
    spans = [
        Span(id=a(1), episode_id="e", name="team", kind="chain", started_at=1.0, ended_at=9.0),
        Span(id=a(2), episode_id="e", name="writer", kind="agent", parent_id=a(1), started_at=2.0, ended_at=8.0),
        Span(
            id="tool-call_1",
            episode_id="e",
            name="sql",
            kind="tool",
            parent_id=a(2),
            started_at=4.0,
            ended_at=5.0,
            attributes={
                "tool_call_id": "call_1",
                "call_id": "c",
                "arguments": {"q": "secret"},
                "result": "secret",
                "gen_ai.prompt.0.content": "secret",
                "note": "secret",
            },
            error="Traceback (most recent call last):\nsqlite3.Error: no such table",
        ),
        Span(id=a(3), episode_id="e", name="to editor", kind="handoff", parent_id=a(2), started_at=6.0, ended_at=7.0),
    ]
    call = make_call(
        [1, 2, 3],
        [4, 5],
        versions=[7, 8],
        span_id=a(2),
        response_id="chatcmpl-1",
        started_at=3.0,
        ended_at=4.0,
        request={"model": "gpt", "messages": [{"role": "user", "content": "secret"}], "top_p": 0.5},
        response={"content": "secret", "tool_calls": [{"id": "call_1", "function": {"name": "sql"}}]},
        cached_tokens=2,
        restricted=["grammar"],
    )
    rewards = [
        Reward(episode_id="e", name="sql", value=0.5, time=5.0, span_id="tool-call_1"),
        Reward(episode_id="e", name="solved", value=1.0, time=9.0),
        Reward(episode_id="e", name="short", value=0.25, time=4.0, call_id="c"),
    ]
    return Episode(
        start=make_start(started_at=1.0),
        calls=[call],
        spans=spans,
        rewards=rewards,
        outcome=Outcome.COMPLETED,
        counted=True,
        ended_at=10.0,
    )


def tree(spans: list[Span]) -> set[tuple[str, ...]]:
    """Every span by kinds and names from the top, and how it failed."""
    by_id = {one.id: one for one in spans}

    def path(one: Span | None) -> tuple[str, ...]:
        return () if one is None else (*path(by_id.get(one.parent_id or "")), one.kind, one.name)

    return {(*path(one), str(one.error), str(one.started_at), str(one.ended_at)) for one in spans}


@pytest.mark.parametrize("encoding", [PROTOBUF, JSON])
def test_an_episode_that_is_sent_and_read_again_has_the_same_tree(encoding: otlp.Encoding) -> None:
    episode = an_episode()
    body = otlp.encode(trace_request(episode, content=True), encoding)
    read = received(decode(body, encoding), "other")
    assert tree(read.spans) == tree(episode.spans)
    assert read.links == [CallLink(episode_id="other", response_id="chatcmpl-1", span_id=a(2))]
    tool = next(one for one in read.spans if one.kind == "tool")
    assert tool.attributes["arguments"] == {"q": "secret"}
    assert tool.attributes["result"] == "secret"
    assert {(reward.name, reward.value, reward.time, reward.span_id) for reward in read.rewards} == {
        ("sql", 0.5, 5.0, tool.id),
        ("solved", 1.0, 9.0, None),
        ("short", 0.25, 4.0, a(2)),
    }
    assert not read.problems


def test_a_trace_follows_the_conventions_and_says_nothing_that_was_said_unless_asked() -> None:
    episode = an_episode()
    request = trace_request(episode, content=False)
    assert b"secret" not in otlp.encode(request, PROTOBUF) + otlp.encode(request, JSON)
    assert request == trace_request(episode, content=False)
    assert {one.trace_id for one in request.spans} == {trace_id("e")}
    root, *_, call = request.spans
    assert root.parent_id is None
    assert all(one.parent_id for one in request.spans[1:])
    assert root.attributes["lrl.reward.solved"] == 1.0
    assert root.attributes["lrl.policy.versions"] == [7, 8]
    assert call.attributes["lrl.call.restricted"] == ["grammar"]
    assert (call.name, call.kind, call.parent_id) == ("chat gpt", otlp.CLIENT, a(2))
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lightning_rl",
        "gen_ai.request.model": "gpt",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.agent.name": "writer",
    }
    assert expected.items() <= call.attributes.items()
    said = trace_request(episode, content=True).spans[-1].attributes
    assert json.loads(said["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "secret"}]}
    ]


def test_a_span_that_is_folded_later_leaves_nothing_that_points_at_it(store_place: Any) -> None:
    with Store.open(store_place) as store:
        store.begin(make_start("e"))
        store.add_calls([make_call([1], [2], span_id=a(3), response_id="r1"), make_call([1], [3], id="d", index=1)])
        rewarded = OtelEvent(name="lrl.reward", time_ns=1, attributes={"name": "x\0", "value": 1})
        call = span(3, 2, attributes={"gen_ai.operation.name": "chat"})
        batches = [[span(4, 3, events=[rewarded, rewarded])], [call], [span(2), span(5, 2, name="lrl.reward")]]
        for known in ({}, {a(3): a(2)}):
            for spans in batches:
                assert store.add_received("e", received(spans, "e", known)) == Late()
        episode = store.episode("e")
        assert {one.id: one.parent_id for one in episode.spans if one.error is None} == {a(4): a(2), a(2): None}
        assert [call.span_id for call in episode.calls] == [a(2), None]
        assert [(reward.value, reward.span_id) for reward in episode.rewards] == [(1.0, a(4))] * 2
        store.end("e", Outcome.COMPLETED, counted=True, ended_at=1.0)
        late = OtelEvent(name="lrl.reward", time_ns=9, attributes={"name": "late", "value": 1})
        told = store.add_received("e", received([span(4, 3, events=[rewarded, rewarded, late])], "e"))
        assert (list(told.spans), list(told.rewards)) == ([], ["late"])
        assert len(store.episode("e").rewards) == 2


def test_a_reward_counts_once_though_its_place_is_known_only_later(store_place: Any) -> None:
    with Store.open(store_place) as store:
        store.begin(make_start("e"))
        child = span(3, 2, name="lrl.reward", attributes={"name": "q", "value": 0.5})
        parent = span(2, 1, attributes={"gen_ai.operation.name": "chat"})
        for batch in ([child], [parent], [child], [child, parent], [child, child]):
            store.add_received("e", received(batch, "e"))
        assert [(reward.value, reward.span_id) for reward in store.episode("e").rewards] == [(0.5, a(1))]


def test_links_leave_the_span_that_a_request_named_and_nothing_moves_after_the_end(store_place: Any) -> None:
    call = {"gen_ai.operation.name": "chat"}
    made = [("hook", "own"), ("http", a(4)), ("none", None), ("late", a(8))]
    with Store.open(store_place) as store:
        store.begin(make_start("e"))
        store.add_calls(
            [
                make_call([1], [2], id=id, index=index, span_id=span_id, response_id=id)
                for index, (id, span_id) in enumerate(made)
            ]
        )
        chats = [span(10 + n, 1, attributes={**call, "gen_ai.response.id": id}) for n, (id, _) in enumerate(made[:3])]
        store.add_received("e", received([span(4, 11), *chats, span(1)], "e"))
        expected = {"hook": "own", "http": a(1), "none": a(1), "late": a(8)}
        assert {one.id: one.span_id for one in store.episode("e").calls} == expected
        own = Span(id="own", episode_id="e", name="writer", kind="agent")
        store.end("e", Outcome.COMPLETED, counted=True, spans=[own], ended_at=1.0)
        again = [span(20, 5, attributes={**call, "gen_ai.response.id": id}) for id, _ in made]
        before = store.episode("e")
        store.add_received("e", received([*again, span(8, 5, attributes=call), span(6, 8), span(5)], "e"))
        assert store.episode("e") == before
        assert {one.id: one.span_id for one in before.calls} == expected


def test_folding_thousands_of_calls_of_a_large_episode_keeps_nobody_waiting(store_place: Any) -> None:
    with Store.open(store_place) as store:
        store.begin(make_start("e"))
        store.add_received("e", received([span(n, 100_000 + n) for n in range(1, 10_001)], "e"))
        chats = [span(100_000 + n, 1, attributes={"gen_ai.operation.name": "chat"}) for n in range(1, 2001)]
        statements: list[str] = []
        event.listen(store._transactions._writer, "before_cursor_execute", lambda *call: statements.append(call[2]))
        store.add_received("e", received(chats, "e"))
        assert len(statements) < 100, "it took several seconds, one by one"
        assert sum(one.parent_id == a(1) for one in store.episode("e").spans) == 2000


def test_our_names_are_those_of_the_conventions() -> None:
    official = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI")}
    ours = {value for name, value in vars(otlp_names).items() if isinstance(value, str) and value.startswith("gen_ai")}
    assert ours <= official
    assert len(ours) > 15
