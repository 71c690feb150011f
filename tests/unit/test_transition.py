import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.records import Credits, Term, compared_in_group
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Reward
from lightning_rl.transition import Mask, call_masks, group_transitions, settle
from tests.unit.domain import credits_of, make_call, make_episode, transitions_of

AGGREGATIONS = ("token", "sequence", "rollout")


def make_group(*rollouts):
    """Rollouts as (return, number of calls); the calls' returns by id."""
    group, returns = [], {}
    for i, (value, count) in enumerate(rollouts):
        calls = [make_call([1], [2] * (k + 1), id=f"e{i}c{k}", episode_id=f"e{i}") for k in range(count)]
        group.append(make_episode(f"e{i}", calls))
        returns |= {call.id: value for call in calls}
    return group, returns


@given(st.lists(st.integers(-80, 80).map(lambda sixteenths: sixteenths / 16), min_size=2, max_size=8))
def test_std_advantages_are_those_of_torch(returns):
    values = torch.tensor(returns, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    made = transitions_of(*make_group(*((value, 1) for value in returns)), "std")
    assert [t.advantage for t in made] == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 5)), min_size=2, max_size=6), st.sampled_from(["std", "none"])
)
def test_the_baseline_is_over_rollouts_however_many_calls_they_make(rollouts, normalise):
    group, returns = make_group(*rollouts)
    single, single_returns = make_group(*((value, 1) for value, _ in rollouts))
    by_rollout = {t.episode_id: t for t in transitions_of(single, single_returns, normalise)}
    for transition in transitions_of(group, returns, normalise):
        expected = by_rollout[transition.episode_id]
        assert transition.advantage == pytest.approx(expected.advantage, abs=1e-9)
        assert transition.masked == expected.masked


def test_without_normalisation_the_advantage_is_the_difference_to_the_mean():
    group, returns = make_group((1.0, 3), (0.0, 1))
    assert [t.advantage for t in transitions_of(group, returns, "none")] == [0.5, 0.5, 0.5, -0.5]


def test_a_group_of_one_is_masked():
    (transition,) = transitions_of(*make_group((1.0, 1)), "std")
    assert (transition.masked, transition.advantage) == (Mask.GROUP_OF_ONE, 0.0)


def test_an_episode_without_calls_is_no_member_of_the_group():
    (transition,) = transitions_of(*make_group((1.0, 1), (0.0, 0)), "std")
    assert transition.masked == Mask.GROUP_OF_ONE


def test_a_group_whose_returns_are_equal_has_no_signal():
    transitions = transitions_of(*make_group((0.1 + 0.2, 1), (0.3, 2)), "std")
    assert {(t.masked, t.advantage) for t in transitions} == {(Mask.NO_SIGNAL, 0.0)}


def test_a_return_at_the_mean_needs_no_gradient():
    transitions = transitions_of(*make_group((0.0, 1), (1.0, 1), (2.0, 1)), "std")
    assert [t.masked for t in transitions] == [None, Mask.ZERO_ADVANTAGE, None]


@pytest.mark.parametrize(
    ("values", "mask"), [({"temperature": 0.0}, Mask.GREEDY), ({"finish_reason": "abort"}, Mask.ABORTED)]
)
def test_calls_that_are_not_samples_are_masked(values, mask):
    group, returns = make_group((1.0, 1), (0.0, 1))
    group[0].calls.append(make_call([1], [2], id="odd", episode_id="e0", **values))
    transitions = transitions_of(group, returns | {"odd": 1.0}, "std")
    assert {t.call_id: t.masked for t in transitions} == {"e0c0": None, "odd": mask, "e1c0": None}


def test_an_intermediate_reward_reaches_the_advantage():
    group, _ = make_group((0.0, 2), (0.0, 2))
    group[0].rewards.append(Reward(episode_id="e0", name="well_formed", value=1.0, call_id="e0c0"))
    returns = credits_of(group, weights={"well_formed": 0.1}).returns
    advantages = {t.call_id: t.advantage for t in transitions_of(group, returns, "std")}
    assert advantages["e0c0"] == advantages["e0c1"] > 0 > advantages["e1c0"]


def test_weights_of_each_aggregation():
    group, returns = make_group((1.0, 2), (0.0, 1))  # calls of 1, 2 and 1 tokens
    transitions = transitions_of(group, returns, "std")
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
            for t in transitions_of(group, returns, "std")
        ]
    weights = token_weights(transitions, aggregation)
    assert set(weights) == {t.call_id for t in transitions if t.masked is None}
    total = sum(weight * len(t.sampled_ids) for t in transitions if (weight := weights.get(t.call_id)))
    zero = any(t.masked in (Mask.NO_SIGNAL, Mask.ZERO_ADVANTAGE) for t in transitions)
    if weights:
        assert total < 1 if zero else total == pytest.approx(1)


def test_tokens_beyond_the_limit_have_no_weight():
    group, returns = make_group((1.0, 2), (0.0, 1))
    transitions = transitions_of(group, returns, "std")
    weights = token_weights(transitions, "token", kept={"e0c0": 1, "e0c1": 1, "e1c0": 0})
    assert weights == {"e0c0": 1 / 2, "e0c1": 1 / 2, "e1c0": 0.0}
    assert kept_tokens(transitions, 2) == {"e0c0": 1, "e0c1": 1, "e1c0": 1}
    assert kept_tokens(transitions, 1) == {"e0c0": 0, "e0c1": 0, "e1c0": 0}


# the tables -----------------------------------------------------------------------------------------------------------


def advantages(returns, **settings):
    """By `advantage.estimate`, one call a rollout."""
    group, by_call = make_group(*((value, 1) for value in returns))
    rollouts = [rollout_of(episode, {}, [call.id for call in episode.calls]) for episode in group]
    credits = compared_in_group(rollouts, by_call)
    rollout_ids = {call.id: episode.id for episode in group for call in episode.calls}
    return [own.advantage for own in estimate(credits, AdvantageSettings(**settings), rollout_ids).values()]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=16))
def test_each_baseline_and_scale_is_its_formula(returns):
    values = np.array(returns, np.float64)
    centred, size = values - values.mean(), len(values)
    others = np.array([np.delete(values, i).mean() for i in range(size)])
    std = values.std(ddof=1) + 1e-4

    def near(expected):
        return pytest.approx(list(expected), abs=1e-7)

    assert advantages(returns) == near(centred)
    assert advantages(returns, normalise="std") == near(centred / std)
    assert advantages(returns, baseline="leave_one_out") == near(values - others)
    assert advantages(returns, baseline="leave_one_out") == near(size / (size - 1) * centred)
    assert advantages(returns, baseline="leave_one_out", normalise="std") == near((values - others) / std)
    assert advantages(returns, baseline="none") == near(values)
    assert advantages(returns, baseline="none", normalise="std") == near(values / std)


def test_three_of_eight_by_hand():
    """The mean is 3/8, the unbiased variance 15/56."""
    returns = [1, 0, 0, 1, 1, 0, 0, 0]
    std = math.sqrt(15 / 56) + 1e-4
    assert advantages(returns, normalise="std")[:2] == pytest.approx([0.625 / std, -0.375 / std], rel=1e-12)
    assert advantages(returns, baseline="leave_one_out")[:2] == pytest.approx([5 / 7, -3 / 7], rel=1e-12)
    assert advantages(returns)[:2] == [0.625, -0.375]


def test_terms_add_up_and_a_centred_one_is_only_scaled():
    scopes = {"a": {"x": 0.0, "y": 4.0}, "b": {"x": 1.0}, "c": {"x": 1.0, "y": 3.0}}
    terms = {
        "both": [Term(value=4.0, scope="a"), Term(value=3.0, scope="c", weight=0.5)],
        "lonely": [Term(value=1.0, scope="b")],
        "half": [Term(value=1.0, scope="b"), Term(value=4.0, scope="a")],
        "centred": [Term(value=-2.0, scope="b", centred=True)],
        "scaled": [Term(value=-2.0, scope="c", centred=True)],
        "nothing": [],
    }
    credits = Credits(returns={}, terms=terms, scopes=scopes)
    rollouts = {"both": "y", "lonely": "x", "half": "y", "centred": "x", "scaled": "x"}
    made = estimate(credits, AdvantageSettings(), rollouts)
    assert {id: own.advantage for id, own in made.items()} == {
        "both": 2.5, "lonely": 0.0, "half": 2.0, "centred": -2.0, "scaled": -2.0
    }  # fmt: skip
    assert [id for id, own in made.items() if own.alone] == ["lonely"]
    scaled = estimate(credits, AdvantageSettings(normalise="std"), rollouts)
    assert scaled["scaled"].advantage == pytest.approx(-2.0 / (math.sqrt(2) + 1e-4))
    assert not any(own.alone for own in estimate(credits, AdvantageSettings(baseline="none"), rollouts).values())


@pytest.mark.parametrize(("baseline", "advantage"), [("leave_one_out", 2.0), ("group_mean", 2.0), ("none", 3.0)])
def test_one_other_rollout_is_company(baseline, advantage):
    """The call's own rollout has no point in the scope."""
    credits = Credits(returns={}, terms={"c": [Term(value=3.0, scope="s")]}, scopes={"s": {"f": 1.0}})
    made = estimate(credits, AdvantageSettings(baseline=baseline), {"c": "e"})["c"]
    assert (made.alone, made.advantage) == (False, advantage)


@given(st.floats(-3, 3), st.integers(2, 6))
def test_what_is_equal_up_to_rounding_has_exactly_no_advantage(value, size):
    points = {str(i): value + (i % 2) * abs(value) * 1e-15 for i in range(size)}
    terms = {id: [Term(value=point, scope="s"), Term(value=-point, scope="t")] for id, point in points.items()}
    credits = Credits(returns={}, terms=terms, scopes={"s": points, "t": {id: -p for id, p in points.items()}})
    for baseline in ("group_mean", "leave_one_out"):
        made = estimate(credits, AdvantageSettings(baseline=baseline, normalise="std"), {id: id for id in points})
        assert {own.advantage for own in made.values()} == {0.0}


@given(st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=4), min_size=2, max_size=5))
def test_calls_of_one_rollout_with_values_of_their_own_are_not_blown_up(values):
    """Rollouts whose means are nearly equal, and calls in them that are not."""
    group, returns = make_group(*((0.0, len(own)) for own in values))
    by_call = dict(zip(returns, (value for own in values for value in own), strict=True))
    made = [t.advantage for t in transitions_of(group, by_call, "std")]
    largest = max(len(values) * len(own) for own in values)
    assert all(abs(advantage) <= math.sqrt(largest) + 1e-6 for advantage in made)


def test_a_call_that_is_alone_is_masked_though_others_have_signal():
    group, _ = make_group((1.0, 2), (0.0, 1))
    points = {"e0": 1.0, "e1": 0.0}
    terms = {
        "e0c0": [Term(value=1.0, scope="all")],
        "e0c1": [Term(value=1.0, scope="late")],
        "e1c0": [Term(value=0.0, scope="all")],
    }
    credits = Credits(returns={}, terms=terms, scopes={"all": points, "late": {"e0": 1.0}})
    made = settle(group_transitions(group, credits, AdvantageSettings(), {}), {"e0": "g", "e1": "g"})
    assert [t.masked for t in made] == [None, Mask.GROUP_OF_ONE, None]
    said = Credits(returns={}, token_advantages={"e0c0": [1.0], "e1c0": [-1.0]}, alone=frozenset({"e0c0", "e0c1"}))
    made = settle(group_transitions(group, said, AdvantageSettings(), {}), {"e0": "g", "e1": "g"})
    assert [t.masked for t in made] == [Mask.GROUP_OF_ONE, Mask.GROUP_OF_ONE, None]


# fair samples ---------------------------------------------------------------------------------------------------------


def test_restricted_and_stale_calls_are_masked_where_a_recipe_says_so():
    calls = [
        make_call([1], [2, 3], id="new", versions=[4, 4]),
        make_call([1], [2, 3], id="mixed", versions=[4, 2]),
        make_call([1], [2, 3], id="old", versions=[2, 2]),
        make_call([1], [2, 3], id="grammar", versions=[4, 4], restricted=["grammar"]),
        make_call([1], [2, 3], id="both", versions=[1, 1], restricted=["top_p"]),
        make_call([1], [2, 3], id="greedy", versions=[1, 1], restricted=["top_p"], temperature=0.0),
    ]
    episode = make_episode("e", calls)
    assert call_masks(episode) == {"greedy": Mask.GREEDY}
    assert call_masks(episode, restricted="mask", newest=4) == {
        "greedy": Mask.GREEDY, "grammar": Mask.RESTRICTED, "both": Mask.RESTRICTED
    }  # fmt: skip
    stale = {"mixed": Mask.STALE, "old": Mask.STALE, "both": Mask.STALE, "greedy": Mask.GREEDY}
    assert call_masks(episode, newest=4, max_staleness=1) == stale
    assert call_masks(episode, newest=4, max_staleness=2) == {"both": Mask.STALE, "greedy": Mask.GREEDY}
