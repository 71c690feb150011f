"""Which call a reward belongs to, wherever in the agent's structure it was put."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.credit.placement import placed
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Episode, Reward, Span
from tests.unit.domain import make_call, make_episode


def span(id: str, kind: str = "agent", parent: str | None = None, **attributes) -> Span:
    return Span(id=id, episode_id="e", name=id, kind=kind, parent_id=parent, started_at=1.5, attributes=attributes)


def call(id: str, at: int, span_id: str | None = None, asks: str = ""):
    """A call at second `at`, whose reply asks for the tool of that name."""
    asked = [{"id": f"t-{id}", "function": {"name": asks, "arguments": "{}"}}] if asks else []
    return make_call(
        [1], [2], id=id, index=at, span_id=span_id, started_at=float(at), ended_at=at + 0.5, response={"tool_calls": asked}
    )  # fmt: skip


def tool(id: str, of: str, parent: str | None = None, **attributes) -> Span:
    """The run of the tool that the call `of` asked for."""
    return span(id, "tool", parent, tool_call_id=f"t-{of}", **attributes)


def episode_of(calls, spans=(), *rewards: Reward) -> Episode:
    return structs.replace(make_episode("e", calls), spans=[*spans], rewards=[*rewards])


def at_span(span_id: str, time: float = 0.0, value: float = 1.0) -> Reward:
    return Reward(episode_id="e", name="r", value=value, span_id=span_id, time=time)


def at_call(call_id: str, value: float = 1.0) -> Reward:
    return Reward(episode_id="e", name="r", value=value, call_id=call_id)


def places(calls, spans, *rewards: Reward) -> list[str | None]:
    return [call_id for _, call_id in placed(episode_of(calls, spans, *rewards))]


TWO = [call("c0", 0, "agent", asks="add"), call("c1", 2, "agent", asks="sub")]


def test_a_reward_at_a_call_is_the_calls_and_one_without_a_place_the_episodes():
    assert places(TWO, [], at_call("c0"), Reward(episode_id="e", name="r", value=1.0)) == ["c0", None]


def test_a_reward_at_a_tool_is_the_calls_that_asked_for_it_whoever_saw_the_tool_and_however_late_the_reward_came():
    spans = [
        span("agent"),
        tool("add", "c0", "agent"),
        span("server", "tool", None, tool_call_id="t-c0", call_id="c0"),
    ]
    assert places(TWO, spans, at_span("add", 9.0), at_span("server")) == ["c0", "c0"]


def test_a_tool_or_chain_inside_a_tool_is_part_of_its_run():
    spans = [
        span("agent"),
        tool("add", "c0", "agent"),
        span("retry", "tool", "add"),
        span("parse", "chain", "add"),
        span("deep", "chain", "parse"),
    ]
    assert places(TWO, spans, at_span("retry"), at_span("parse"), at_span("deep")) == ["c0", "c0", "c0"]


def test_what_an_agent_does_inside_a_tool_is_its_own():
    calls = [*TWO, call("inner", 1, "helper")]
    spans = [span("agent"), tool("add", "c0", "agent"), span("helper", "agent", "add"), span("idle", "agent", "add")]
    assert places(calls, spans, at_span("helper"), at_span("add"), at_span("idle")) == ["inner", "c0", None]


@pytest.mark.parametrize("kind", ["agent", "chain", "handoff"])
def test_a_reward_at_a_span_is_the_last_calls_that_had_begun_in_it(kind: str):
    spans = [span("outer", kind), span("agent", "agent", "outer"), span("elsewhere", kind)]
    calls = [*TWO, call("c2", 4, "elsewhere")]
    times = [0.0, 9.0, 2.0, 1.0, -1.0]
    expected = ["c1", "c1", "c1", "c0", None]
    assert places(calls, spans, *(at_span("outer", time) for time in times)) == expected
    assert places(calls, spans, at_span("agent", 1.0), at_span("elsewhere")) == ["c0", "c2"]


def test_calls_and_spans_that_nobody_knows_belong_to_nobody():
    calls = [call("c0", 0, "gone"), call("c1", 1)]
    assert places(calls, [span("a", parent="lost")], at_span("nowhere"), at_span("a"), at_span("lost")) == [None] * 3
    assert places(calls, [], at_span("gone")) == ["c0"]


def test_spans_that_go_round_in_a_circle_end_the_way_outwards():
    spans = [span("a", "chain", "b"), span("b", "chain", "a"), span("self", "tool", "self")]
    assert places([call("c0", 0, "a")], spans, at_span("b"), at_span("a"), at_span("self")) == ["c0", "c0", None]


def test_what_others_earned_is_part_of_the_outcome():
    calls = [call("own", 0, "a", asks="add"), call("others", 1, "b", asks="sub")]
    spans = [span("a"), span("b"), tool("sub", "others", "b"), tool("add", "own", "a")]
    episode = episode_of(
        calls, spans, at_call("own", 1.0), at_span("add", value=2.0), at_call("others", 4.0), at_span("sub", value=8.0),
        at_span("b", value=16.0), at_span("nowhere", value=32.0), Reward(episode_id="e", name="r", value=64.0),
    )  # fmt: skip
    rollout = rollout_of(episode, {"r": 0.5}, ["own"], shaping={"own": -0.25, "others": -9.0})
    assert [call.id for call in rollout.calls] == ["own"]
    assert rollout.earned == {"own": 1.5 - 0.25}
    assert rollout.outcome == 62.0
    assert rollout.ret == 63.25


KINDS = st.sampled_from(["agent", "chain", "tool", "handoff"])
PLACES = st.sampled_from([None, "s0", "s1", "s2", "s3", "s4", "gone"])


@given(
    st.lists(st.tuples(KINDS, PLACES), max_size=5),
    st.lists(PLACES, max_size=4),
    st.lists(st.tuples(PLACES, st.floats(0, 5), st.floats(-10, 10)), max_size=5),
)
def test_whatever_the_structure_every_reward_is_counted_once(structure, made_in, rewards):
    spans = [
        span(f"s{n}", kind, parent, tool_call_id=f"t-c{n}") for n, (kind, parent) in enumerate(structure)
    ]  # fmt: skip
    calls = [call(f"c{n}", n, span_id, asks=f"s{n}") for n, span_id in enumerate(made_in)]
    given = [Reward(episode_id="e", name="r", value=v, span_id=span_id, time=t) for span_id, t, v in rewards]
    episode = episode_of(calls, spans, *given)
    found = placed(episode)
    assert [reward for reward, _ in found] == given
    assert {call_id for _, call_id in found} <= {None, *(call.id for call in calls)}
    rollout = rollout_of(episode, {}, ["c0", "c2"])
    assert rollout.ret == pytest.approx(math.fsum(reward.value for reward in given), abs=1e-9)


def test_two_hundred_calls_deep_inside_each_other_are_placed_at_once():
    spans = [span(f"s{n}", "chain", f"s{n - 1}" if n else None) for n in range(200)]
    calls = [call(f"c{n}", n, f"s{n}") for n in range(200)]
    rewards = [at_span(f"s{n}", time=n + 0.5) for n in range(200)]
    began = time.process_time()
    assert places(calls, spans, *rewards) == [f"c{n}" for n in range(200)]
    assert time.process_time() - began < 1
