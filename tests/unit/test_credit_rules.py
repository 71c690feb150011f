"""Credit rules, each against numbers worked out by hand, and what must hold of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit import RULES, WITH_CRITIC
from lightning_rl.credit.records import Credits
from lightning_rl.episode import Episode, Reward
from lightning_rl.transition import Mask, group_transitions
from tests.unit.domain import credits_of, make_call, make_episode

WITHOUT_CRITIC = sorted({*RULES} - WITH_CRITIC)


def episode(id: str, earned: Sequence[float], outcome: float, agents: Sequence[str] = ()) -> Episode:
    """Its calls `id0`, `id1`, … earned these; each has its own prompt, which no other episode has."""
    calls = [
        make_call([*id.encode(), k], [7] * (k + 1), f"{id}{k}", id, index=k, agent=agents[k] if agents else "")
        for k in range(len(earned))
    ]
    rewards = [Reward(episode_id=id, name="r", value=v, call_id=f"{id}{k}") for k, v in enumerate(earned) if v]
    rewards.append(Reward(episode_id=id, name="correct", value=outcome))
    return structs.replace(make_episode(id, calls), rewards=rewards)


def advantages(group: Sequence[Episode], credits: Credits, **values: Any) -> dict[str, float]:
    found = estimate(credits, AdvantageSettings(**values), {c.id: e.id for e in group for c in e.calls})
    return {call_id: own.advantage for call_id, own in found.items()}


def near(expected: Mapping[str, float]) -> Any:
    return pytest.approx(dict(expected), abs=1e-9)


def test_final_gives_the_last_call_all_and_the_others_nothing():
    group = [episode("a", [1, 2], 1), episode("b", [0], 1), episode("c", [], 9)]
    credits = credits_of(group, "final")
    assert credits.returns == {"a0": 0, "a1": 4, "b0": 1}
    assert advantages(group, credits) == near({"a1": 1.5, "b0": -1.5})
    masked = {t.call_id: t.masked for t in group_transitions(group, credits, AdvantageSettings(), {})}
    assert masked == {"a0": Mask.NO_CREDIT, "a1": None, "b0": None}


def test_step_rewards_share_the_outcome_and_leave_each_call_its_own():
    group = [episode("a", [1, 2], 1), episode("b", [0], 0)]
    credits = credits_of(group, "step_rewards")
    assert credits.returns == {"a0": 1.5, "a1": 2.5, "b0": 0}
    # Call 0: 1 beside 0, call 1: 2 beside 0, the outcome: 1 beside 0, of which each of a's calls has half.
    assert advantages(group, credits) == near({"a0": 0.5 + 0.25, "a1": 1 + 0.25, "b0": -0.5 - 0.5})


def test_return_to_go_compares_what_lies_ahead_with_what_lies_ahead_at_the_same_turn():
    group = [episode("a", [1, 2], 1), episode("b", [0], 1)]
    credits = credits_of(group, "return_to_go")
    assert credits.returns == {"a0": 4, "a1": 3, "b0": 1}
    assert credits.scopes == {("call", 0): {"a": 4, "b": 1}, ("call", 1): {"a": 3, "b": 0}}
    assert advantages(group, credits) == near({"a0": 1.5, "a1": 1.5, "b0": -1.5})
    assert advantages(group, credits, baseline="leave_one_out") == near({"a0": 3, "a1": 3, "b0": -3})
    assert credits_of(group, "return_to_go", discount=0.5).returns == {"a0": 2.5, "a1": 3, "b0": 1}


def test_return_to_go_does_not_blame_a_call_for_being_late():
    group = [episode("a", [1, 1, 1], 0), episode("b", [1, 1, 1], 0)]
    assert set(advantages(group, credits_of(group, "return_to_go")).values()) == {0.0}


@settings(max_examples=40)
@given(st.integers(1, 4), st.lists(st.floats(-5, 5), min_size=2, max_size=4))
def test_return_to_go_of_an_outcome_alone_is_equal_for_rollouts_of_one_length(length, outcomes):
    group = [episode(f"e{n}-", [0] * length, outcome) for n, outcome in enumerate(outcomes)]
    to_go, equal = credits_of(group, "return_to_go"), credits_of(group, "equal")
    assert to_go.returns == equal.returns
    assert advantages(group, to_go) == near(advantages(group, equal))


def test_per_agent_neither_praises_nor_blames_an_agent_for_what_another_earned():
    agents = ["planner", "solver", "solver"]
    group = [episode("a", [0, 1, 2], 0, agents), episode("b", [0, 0, 1], 0, agents)]
    credits = credits_of(group, "per_agent")
    assert credits.returns == {"a0": 0, "a1": 3, "a2": 3, "b0": 0, "b1": 1, "b2": 1}
    assert advantages(group, credits) == near({"a0": 0, "a1": 1, "a2": 1, "b0": 0, "b1": -1, "b2": -1})


def test_per_agent_shares_the_outcome_and_reports_an_agent_that_came_once():
    group = [episode("a", [0, 0], 4, ["planner", "critic"]), episode("b", [1], 2, ["planner"]), episode("c", [], 9)]
    credits = credits_of(group, "per_agent")
    assert credits.scopes == {("agent", "planner"): {"a": 4, "b": 3}, ("agent", "critic"): {"a": 4}}
    assert advantages(group, credits) == near({"a0": 0.5, "a1": 0, "b0": -0.5})
    masked = {t.call_id: t.masked for t in group_transitions(group, credits, AdvantageSettings(), {})}
    assert masked == {"a0": None, "a1": Mask.GROUP_OF_ONE, "b0": None}


STEP = 0.5 / (math.sqrt(1 / 3) + 1e-4)
"""A 0 or 1 of (1, 1, 0, 0) beside their mean, over their unbiased standard deviation + 1e-4."""


@pytest.mark.parametrize(("normalise", "unit"), [("none", 0.5), ("std", STEP)])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_mt_grpo_of_two_turns_is_the_papers(normalise: str, unit: float, weight: float):
    """The search found something or not, the answer is right or not: A_1 = A^turn + λ A^outcome, A_2 = A^outcome."""
    found_right = {"a": (1, 1), "b": (1, 0), "c": (0, 1), "d": (0, 0)}
    group = [episode(id, [found, 0], right) for id, (found, right) in found_right.items()]
    credits = credits_of(group, "mt_grpo", weight=weight)
    turn = {"a": unit, "b": unit, "c": -unit, "d": -unit}
    outcome = {"a": unit, "b": -unit, "c": unit, "d": -unit}
    assert credits.returns == {f"{id}{k}": (f + weight * o, o)[k] for id, (f, o) in found_right.items() for k in (0, 1)}
    assert advantages(group, credits, normalise=normalise) == near(
        {f"{id}0": turn[id] + weight * outcome[id] for id in "abcd"} | {f"{id}1": outcome[id] for id in "abcd"}
    )


def test_mt_grpo_of_other_lengths_counts_the_last_call_to_the_outcome():
    group = [episode("a", [1, 2, 3], 4), episode("b", [5], 0)]
    credits = credits_of(group, "mt_grpo")
    assert credits.scopes == {"outcome": {"a": 7, "b": 5}, ("call", 0): {"a": 1, "b": 0}, ("call", 1): {"a": 2, "b": 0}}
    assert advantages(group, credits) == near({"a0": 0.5 + 1, "a1": 1 + 1, "a2": 1, "b0": -1})


numbers = st.floats(-10, 10)


@st.composite
def groups(draw: st.DrawFn, agents: Sequence[str] = ("",), smallest: int = 1) -> list[Episode]:
    """Of up to four episodes with up to four calls, rewarded at calls, at spans that nobody knows, and as a whole."""
    group = []
    for n in range(draw(st.integers(smallest, 4))):
        earned = draw(st.lists(numbers, max_size=4))
        names = [draw(st.sampled_from(agents)) for _ in earned]
        made = episode(f"e{n}-", earned, draw(numbers), names)
        made.rewards.extend(
            Reward(episode_id=made.id, name="at a span", value=value, span_id="s")
            for value in draw(st.lists(numbers, max_size=2))
        )
        group.append(made)
    return group


@settings(max_examples=40)
@given(groups(), st.sampled_from(["final", "step_rewards"]))
def test_rules_that_preserve_sums_give_each_rollout_its_return(group, rule):
    returns = credits_of(group, rule).returns
    for episode in group:
        expected = math.fsum(reward.value for reward in episode.rewards) if episode.calls else 0.0
        assert math.fsum(returns[call.id] for call in episode.calls) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40)
@given(groups())
def test_with_one_agent_per_agent_is_equal(group):
    one, other = credits_of(group, "per_agent"), credits_of(group, "equal")
    assert one.returns == near(other.returns)
    assert advantages(group, one, normalise="std") == pytest.approx(advantages(group, other, normalise="std"), abs=1e-6)


@settings(max_examples=40)
@given(groups())
def test_mt_grpo_of_an_outcome_alone_is_equal(group):
    for episode in group:
        episode.rewards[:] = [reward for reward in episode.rewards if reward.call_id is None]
    made = [episode for episode in group if episode.calls]
    assert advantages(made, credits_of(made, "mt_grpo")) == near(advantages(made, credits_of(made, "equal")))


@pytest.mark.parametrize("rule", WITHOUT_CRITIC)
@settings(max_examples=30)
@given(data=st.data())
def test_the_order_of_the_episodes_says_nothing(rule, data):
    group = data.draw(groups(agents=("a", "b")))
    shuffled = data.draw(st.permutations(group))
    one, other = credits_of(group, rule), credits_of(shuffled, rule)
    assert one.returns == near(other.returns)
    assert advantages(group, one, normalise="std") == near(advantages(shuffled, other, normalise="std"))


@pytest.mark.parametrize("rule", WITHOUT_CRITIC)
def test_of_a_group_of_one_nobody_is_praised_or_blamed(rule):
    group = [episode("a", [1, 2], 3), episode("no_calls", [], 5)]
    assert {t.masked for t in group_transitions(group, credits_of(group, rule), AdvantageSettings(), {})} <= {
        Mask.GROUP_OF_ONE, Mask.NO_CREDIT,
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["equal", "final", "step_rewards", "return_to_go", "per_agent", "mt_grpo"])
@settings(max_examples=30)
@given(
    outcomes=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), more=st.integers(1, 5),
    baseline=st.sampled_from(["group_mean", "leave_one_out"]),
)  # fmt: skip
def test_a_rollout_does_not_weigh_more_in_the_baseline_for_being_long(rule, outcomes, more, baseline):
    """The first rollout makes more calls, for the same outcome: it stays one point, and the others' advantages what they were."""
    others = [episode("b", [0], outcomes[1]), episode("c", [0], outcomes[2])]
    short, long = ([episode("a", [0] * length, outcomes[0]), *others] for length in (1, 1 + more))
    before, after = (advantages(g, credits_of(g, rule), baseline=baseline, normalise="std") for g in (short, long))
    assert (after["b0"], after["c0"]) == (before["b0"], before["c0"])
    assert all(len(points) == 3 for points in credits_of(long, rule).scopes.values())


PAID = {
    "equal": {"a0": 0.5, "a1": 0.5},
    "final": {"a1": 0.5},
    "step_rewards": {"a0": 0.5, "a1": 0.0},
    "return_to_go": {"a0": 0.5, "a1": 0.0},
    "per_agent": {"a0": 0.5, "a1": 0.5},
    "mt_grpo": {"a0": 0.5, "a1": 0.0},
}
"""What each rule makes of 1 that is earned at the first of two calls, beside a rollout that earned nothing."""


@pytest.mark.parametrize("rule", WITHOUT_CRITIC)
def test_a_step_reward_reaches_the_loss(rule):
    group = [episode("a", [1, 0], 0), episode("b", [0, 0], 0)]
    credits = credits_of(group, rule)
    if rule in PAID:
        assert {id: a for id, a in advantages(group, credits).items() if id[0] == "a"} == near(PAID[rule])
    transitions = group_transitions(group, credits, AdvantageSettings(), {})
    weights = token_weights(transitions, "token")
    assert any(weight * t.advantage for t in transitions if (weight := weights.get(t.call_id)))
