"""Tool uses: every real use is one record, whoever saw it, however it was written, in whatever order it came."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.episode import Episode, Span
from lightning_rl.tool_uses import same_call, tool_uses
from tests.unit.domain import make_call, make_episode


def asking(call_id: str, *asked: tuple[str, str, Any], index: int = 0, **values: Any):
    """A call whose reply asks for tools: (tool call id, name, arguments)."""
    tool_calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": args if isinstance(args, str) else json.dumps(args)}}
        for id, name, args in asked
    ]  # fmt: skip
    return make_call(
        [1], [2], id=call_id, index=index, response={"content": None, "tool_calls": tool_calls}, ended_at=float(index),
        **values,
    )  # fmt: skip


def tool_span(id: str, name: str, at: float = 0.5, error: str | None = None, **attributes: Any) -> Span:
    values = {key: value for key, value in attributes.items() if key != "parent" and value is not None}
    return Span(
        id=id, episode_id="e", name=name, kind="tool", parent_id=attributes.get("parent"), started_at=at,
        ended_at=at + 0.25, attributes=values, error=error,
    )  # fmt: skip


def servers(tool_call_id: str, name: str, arguments: Any, result: str, call_id: str, at: float = 0.5) -> Span:
    return tool_span(
        f"tool-{tool_call_id}", name, at, tool_call_id=tool_call_id, call_id=call_id, arguments=arguments, result=result
    )


def with_spans(*spans: Span, calls: list[Any]) -> Episode:
    return structs.replace(make_episode("e", calls), spans=[*spans])


def test_what_server_and_framework_saw_of_one_use_is_one_record():
    use, = tool_uses(with_spans(
        servers("t1", "add", {"a": 1}, "Error: overflow", "c"),
        tool_span("lc", "add", 0.1, error="Traceback: overflow", tool_call_id="t1", arguments="{'a': 1}"),
        calls=[asking("c", ("t1", "add", {"a": 1}))],
    ))  # fmt: skip
    assert (use.call_id, use.tool_call_id, use.span_id, use.arguments) == ("c", "t1", "lc", {"a": 1})
    assert use.result == "Error: overflow"
    assert use.error == "Traceback: overflow"
    assert use.ran
    assert use.failed
    assert (use.started_at, use.ended_at) == (0.1, 0.35)


def test_a_span_without_the_id_is_matched_by_name_and_equal_arguments():
    calls = [asking("c", ("t1", "add", {"a": 1, "b": 2.0}), ("t2", "add", {"a": 3}), ("t3", "sub", {"a": 3}))]
    spans = [tool_span("x", "sub", 0.1, arguments={"a": 3.0}), tool_span("y", "add", 0.2, arguments='{"b":2,"a":1}')]
    uses = tool_uses(with_spans(*spans, calls=calls))
    assert [(use.tool_call_id, use.span_id) for use in uses] == [("t1", "y"), ("t2", None), ("t3", "x")]


def test_equal_tool_calls_meet_equal_runs_in_order_of_time_answered_ones_first():
    calls = [asking(f"c{i}", (f"t{i}", "add", {"a": 1}), index=i) for i in range(3)]
    spans = [servers("t1", "add", {"a": 1}, "2", "c1", at=1.5), servers("t2", "add", {"a": 1}, "2", "c2", at=2.5)]
    runs = [tool_span(f"r{i}", "add", i + 0.2, arguments={"a": 1}) for i in (1, 2)]
    uses = tool_uses(with_spans(*spans, *runs, calls=calls))
    assert [(use.call_id, use.span_id) for use in uses] == [("c0", None), ("c1", "r1"), ("c2", "r2")]


def test_a_run_with_defaults_filled_in_or_values_converted_is_the_use_that_was_asked_for():
    calls = [
        asking("c", ("t1", "add", {"a": 1}), ("t2", "add", {"a": 2}), ("t3", "sub", {"a": "3"}), ("t4", "mul", {}))
    ]
    spans = [tool_span("x", "add", 0.1, arguments={"a": 2, "b": 0}), tool_span("y", "add", 0.2, arguments={"b": 0, "a": 1}),
             tool_span("z", "sub", 0.3, arguments={"a": 3}), servers("t3", "sub", {"a": "3"}, "0", "c", at=0.7),
             tool_span("late", "sub", 1.5, arguments={"a": 4}), tool_span("other", "mul", -0.5, arguments={"a": 4})]  # fmt: skip
    uses = tool_uses(with_spans(*spans, calls=calls))
    assert {use.span_id: use.tool_call_id for use in uses} == {
        "x": "t2", "y": "t1", "z": "t3", None: "t4", "late": None, "other": None,
    }  # fmt: skip


@pytest.mark.parametrize("filled_in", [{}, {"k": 3}])
def test_many_uses_take_no_more_than_their_number(filled_in: dict[str, int]):
    calls = [asking(f"c{n}", (f"t{n}", "add", {"a": n}), index=n) for n in range(800)]
    spans = [servers(f"t{n}", "add", {"a": n}, "2", f"c{n}", at=n + 0.6) for n in range(800)]
    runs = [tool_span(f"r{n}", "add", n + 0.5, arguments={"a": n} | filled_in) for n in range(800)]
    dumped = 0
    dumps = json.dumps

    def counting(*args: Any, **kwargs: Any) -> str:
        nonlocal dumped
        dumped += 1
        return dumps(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", counting)
        uses = tool_uses(with_spans(*spans, *runs, calls=calls))
    assert [use.span_id for use in uses] == [f"r{n}" for n in range(800)]
    assert dumped <= 3 * 800


def test_a_tool_that_is_tried_again_is_one_use_with_the_last_outcome():
    failed = tool_span("first", "add", 0.1, error="timeout", tool_call_id="t")
    spans = [failed, tool_span("second", "add", 0.6, tool_call_id="t", result="3")]
    use, = tool_uses(with_spans(*spans, calls=[asking("c", ("t", "add", {}))]))  # fmt: skip
    assert (use.span_id, use.error, use.result, use.failed) == ("second", None, "3", False)


def test_spans_of_two_frameworks_around_one_run_are_one_use_but_an_agent_inside_a_tool_has_its_own():
    agent = Span(
        id="agent", episode_id="e", name="helper", kind="agent", parent_id="outer", started_at=0.2, ended_at=0.6
    )
    spans = [tool_span("outer", "ask", 0.1, arguments={"q": 1}), tool_span("inner", "ask", 0.12, parent="outer")]
    inside = tool_span("own", "ask", 0.3, parent="agent")
    calls = [asking("c", ("t", "ask", {"q": 1}))]
    assert [use.span_id for use in tool_uses(with_spans(*spans, calls=calls))] == ["inner"]
    assert [use.span_id for use in tool_uses(with_spans(*spans, agent, inside, calls=calls))] == ["inner", "own"]


def test_runs_that_nobody_asked_for_stand_alone_and_tool_calls_that_never_ran_have_no_result():
    calls = [
        asking("c", ("t", "no such tool", "{broken")),
        asking("gone", ("u", "add", {}), index=1, finish_reason="abort"),
    ]
    uses = tool_uses(with_spans(tool_span("x", "lookup", 0.5, result={"error": "no such key"}), calls=calls))
    never, alone = uses
    assert (never.name, never.arguments, never.result, never.ran) == ("no such tool", "{broken", None, False)
    assert (alone.call_id, alone.span_id, alone.failed) == (None, "x", True)
    assert len(uses) == 2, "a reply that was broken off asked for nothing"


def test_what_counts_as_failed():
    def failed(result: Any, error: str | None = None) -> bool:
        (use,) = tool_uses(with_spans(tool_span("x", "f", error=error, result=result), calls=[]))
        return use.failed

    for result in (
        "Error: no",
        " ERROR",
        "error",
        '{"error": "x"}',
        {"error": {"code": 1}},
        '"error: quoted"',
        [{"type": "text", "text": "Error: no such table"}],
        {"isError": True, "content": []},
    ):
        assert failed(result), result
    for result in (
        "42",
        "no error",
        '{"error": null}',
        {"errors": []},
        "[]",
        "{broken",
        "",
        None,
        [{"type": "text", "text": "no"}],
    ):
        assert not failed(result), result
    assert failed("fine", error="raised")


arguments = st.sampled_from([{}, {"a": 1}, {"a": 1.0}, {"a": True}, {"a": [None]}, "text"])
truths = st.lists(
    st.fixed_dictionaries(
        {
            "call": st.integers(0, 3),
            "name": st.sampled_from("fg"),
            "arguments": arguments,
            "server": st.booleans(),
            "framework": st.sampled_from(["", "id", "name"]),
            "twice": st.booleans(),
        }
    ),
    max_size=8,
)


@given(truths, st.integers(0, 2), st.randoms(use_true_random=False))
def test_every_use_is_found_once_whoever_saw_it(truth: list[dict[str, Any]], strangers: int, rng: random.Random):
    asked: dict[int, list[tuple[str, str, Any]]] = {number: [] for number in range(4)}
    spans = [tool_span(f"stranger{i}", "unasked", i) for i in range(strangers)]
    for i, use in enumerate(truth):
        name, args, at = use["name"], use["arguments"], use["call"] + 0.1 + i / 100
        asked[use["call"]].append((f"t{i}", name, args))
        if use["server"]:
            spans.append(servers(f"t{i}", name, args, f"result {i}", f"c{use['call']}", at))
        if use["framework"]:
            known = f"t{i}" if use["framework"] == "id" else None
            spans.append(tool_span(f"s{i}", name, at, tool_call_id=known, arguments=args))
            if use["twice"]:
                spans.append(tool_span(f"in{i}", name, at + 0.01, parent=f"s{i}"))
    calls = [asking(f"c{number}", *tools, index=number) for number, tools in asked.items()]
    uses = tool_uses(with_spans(*spans, calls=calls))
    rng.shuffle(calls)
    rng.shuffle(spans)
    assert tool_uses(with_spans(*spans, calls=calls)) == uses, "the order of the records says nothing"

    by_id = {use.tool_call_id: use for use in uses if use.tool_call_id}
    assert len(by_id) == len(truth)
    assert len(uses) == len(truth) + strangers
    for i, use in enumerate(truth):
        found = by_id[f"t{i}"]
        assert (found.name, found.call_id) == (use["name"], f"c{use['call']}")
        assert found.result == (f"result {i}" if use["server"] else None)
        if use["framework"] == "id":
            assert found.span_id in (f"s{i}", f"in{i}")
    kinds = Counter(same_call(use["name"], use["arguments"]) for use in truth if use["framework"])
    seen = Counter(same_call(use.name, use.arguments) for use in by_id.values() if (use.span_id or "t")[0] in "si")
    assert seen == kinds, "each run met a tool call that it fits"


def test_a_handoff_is_no_tool_use():
    calls = [asking("c", ("h1", "transfer_to_billing_desk", {}), ("h2", "transfer_to_expert", {}), ("t", "add", {}))]
    spans = [
        Span(id="sdk", episode_id="e", name="from desk", kind="handoff", attributes={"to_agent": "Billing desk"}),
        Span(id="autogen", episode_id="e", name="transfer_to_expert", kind="handoff"),
        servers("h1", "transfer_to_billing_desk", {}, "{}", "c"),
        servers("t", "add", {}, "1", "c"),
    ]
    assert [use.name for use in tool_uses(with_spans(*spans, calls=calls))] == ["add"]
