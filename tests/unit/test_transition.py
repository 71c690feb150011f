import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.advantage import group_baseline
from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.credit import credit_rule
from lightning_rl.episode import Reward
from lightning_rl.transition import Mask, group_transitions
from tests.unit.domain import make_call, make_episode

AGGREGATIONS = ("token", "sequence", "rollout")


def make_group(*rollouts):
    """Rollouts as (return, number of calls); the calls' returns by id."""
    group, returns = [], {}
    for i, (value, count) in enumerate(rollouts):
        calls = [make_call([1], [2] * (k + 1), id=f"e{i}c{k}", episode_id=f"e{i}") for k in range(count)]
        group.append(make_episode(f"e{i}", calls))
        returns |= {call.id: value for call in calls}
    return group, returns


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_std_advantages_are_those_of_torch(returns):
    values = torch.tensor(returns, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    baseline = group_baseline(returns, "std")
    assert [baseline.advantage(value) for value in returns] == pytest.approx(expected.tolist(), abs=1e-9)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 5)), min_size=2, max_size=6), st.sampled_from(["std", "none"])
)
def test_the_baseline_is_over_rollouts_however_many_calls_they_make(rollouts, normalise):
    group, returns = make_group(*rollouts)
    single, single_returns = make_group(*((value, 1) for value, _ in rollouts))
    by_rollout = {t.episode_id: t for t in group_transitions(single, single_returns, normalise)}
    for transition in group_transitions(group, returns, normalise):
        expected = by_rollout[transition.episode_id]
        assert transition.advantage == pytest.approx(expected.advantage, abs=1e-9)
        assert transition.masked == expected.masked


def test_without_normalisation_the_advantage_is_the_difference_to_the_mean():
    group, returns = make_group((1.0, 3), (0.0, 1))
    assert [t.advantage for t in group_transitions(group, returns, "none")] == [0.5, 0.5, 0.5, -0.5]


def test_a_group_of_one_is_masked():
    (transition,) = group_transitions(*make_group((1.0, 1)), "std")
    assert (transition.masked, transition.advantage) == (Mask.GROUP_OF_ONE, 0.0)


def test_an_episode_without_calls_is_no_member_of_the_group():
    (transition,) = group_transitions(*make_group((1.0, 1), (0.0, 0)), "std")
    assert transition.masked == Mask.GROUP_OF_ONE


def test_a_group_whose_returns_are_equal_has_no_signal():
    transitions = group_transitions(*make_group((0.1 + 0.2, 1), (0.3, 2)), "std")
    assert {(t.masked, t.advantage) for t in transitions} == {(Mask.NO_SIGNAL, 0.0)}


def test_a_return_at_the_mean_needs_no_gradient():
    transitions = group_transitions(*make_group((0.0, 1), (1.0, 1), (2.0, 1)), "std")
    assert [t.masked for t in transitions] == [None, Mask.ZERO_ADVANTAGE, None]


@pytest.mark.parametrize(
    ("values", "mask"), [({"temperature": 0.0}, Mask.GREEDY), ({"finish_reason": "abort"}, Mask.ABORTED)]
)
def test_calls_that_are_not_samples_are_masked(values, mask):
    group, returns = make_group((1.0, 1), (0.0, 1))
    group[0].calls.append(make_call([1], [2], id="odd", episode_id="e0", **values))
    transitions = group_transitions(group, returns | {"odd": 1.0}, "std")
    assert {t.call_id: t.masked for t in transitions} == {"e0c0": None, "odd": mask, "e1c0": None}


def test_an_intermediate_reward_reaches_the_advantage():
    group, _ = make_group((0.0, 2), (0.0, 2))
    group[0].rewards.append(Reward(episode_id="e0", name="well_formed", value=1.0, call_id="e0c0"))
    rule = credit_rule("equal")
    returns = {call: value for episode in group for call, value in rule(episode, {"well_formed": 0.1}).items()}
    advantages = {t.call_id: t.advantage for t in group_transitions(group, returns, "std")}
    assert advantages["e0c0"] == advantages["e0c1"] > 0 > advantages["e1c0"]


def test_weights_of_each_aggregation():
    group, returns = make_group((1.0, 2), (0.0, 1))  # calls of 1, 2 and 1 tokens
    transitions = group_transitions(group, returns, "std")
    weights = {name: token_weights(transitions, name) for name in AGGREGATIONS}
    assert weights["token"] == {"e0c0": 1 / 4, "e0c1": 1 / 4, "e1c0": 1 / 4}
    assert weights["sequence"] == {"e0c0": 1 / 3, "e0c1": 1 / 6, "e1c0": 1 / 3}
    assert weights["rollout"] == {"e0c0": 1 / 6, "e0c1": 1 / 6, "e1c0": 1 / 2}


@given(
    st.lists(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 3)), max_size=4), max_size=4),
    st.sampled_from(AGGREGATIONS),
)
def test_weights_add_up_to_one_over_all_that_was_estimated(groups, aggregation):
    transitions = []
    for g, rollouts in enumerate(groups):
        group, returns = make_group(*rollouts)
        transitions += [
            structs.replace(t, call_id=f"{g}{t.call_id}", episode_id=f"{g}{t.episode_id}")
            for t in group_transitions(group, returns, "std")
        ]
    weights = token_weights(transitions, aggregation)
    assert set(weights) == {t.call_id for t in transitions if t.masked is None}
    total = sum(weight * len(t.sampled_ids) for t in transitions if (weight := weights.get(t.call_id)))
    zero = any(t.masked in (Mask.NO_SIGNAL, Mask.ZERO_ADVANTAGE) for t in transitions)
    if weights:
        assert total < 1 if zero else total == pytest.approx(1)


def test_tokens_beyond_the_limit_have_no_weight():
    group, returns = make_group((1.0, 2), (0.0, 1))
    transitions = group_transitions(group, returns, "std")
    weights = token_weights(transitions, "token", kept={"e0c0": 1, "e0c1": 1, "e1c0": 0})
    assert weights == {"e0c0": 1 / 2, "e0c1": 1 / 2, "e1c0": 0.0}
    assert kept_tokens(transitions, 2) == {"e0c0": 1, "e0c1": 1, "e1c0": 1}
    assert kept_tokens(transitions, 1) == {"e0c0": 0, "e0c1": 0, "e1c0": 0}
