import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.credit import RULES, bind
from lightning_rl.credit.records import GROUP, Credits, Term
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Reward
from lightning_rl.errors import CreditError, RecipeError
from tests.unit.domain import credits_of, make_call, make_episode
from trainers.runner.user_code import load_function

numbers = st.floats(-10, 10)


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(numbers, numbers)), st.integers(0, 4))
def test_equal_gives_every_call_the_weighted_return(rewards, count):
    calls = [make_call([1], [2], id=f"c{i}") for i in range(count)]
    episode = make_episode("e", calls, {name: value for name, (value, _) in rewards.items()})
    returns = credits_of([episode], weights={name: weight for name, (_, weight) in rewards.items()}).returns
    expected = sum(value * weight for value, weight in rewards.values())
    assert returns == {f"c{i}": pytest.approx(expected, abs=1e-9) for i in range(count)}


def test_rewards_at_calls_and_spans_are_part_of_the_return():
    episode = make_episode("e", [make_call([1], [2], id="c0"), make_call([1], [3], id="c1")])
    episode.rewards.append(Reward(episode_id="e", name="correct", value=1.0))
    episode.rewards.append(Reward(episode_id="e", name="well_formed", value=1.0, call_id="c0"))
    episode.rewards.append(Reward(episode_id="e", name="well_formed", value=1.0, span_id="s"))
    returns = credits_of([episode], weights={"correct": 1.0, "well_formed": 0.1}).returns
    assert returns == {"c0": pytest.approx(1.2), "c1": pytest.approx(1.2)}


def test_without_weights_every_reward_counts_as_it_is():
    episode = make_episode("e", [make_call([1], [2])], {"a": 1.0, "b": 2.0})
    assert credits_of([episode], weights={}).returns == {"c": 3.0}


def test_a_reward_without_a_weight_is_an_error_that_names_it():
    episode = make_episode("e", [make_call([1], [2])], {"corect": 1.0})
    with pytest.raises(RecipeError, match=r"corect.*weights are given for correct, well_formed"):
        credits_of([episode], weights={"correct": 1.0, "well_formed": 0.1})


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_had_by_name(name):
    assert credits_of([make_episode("e")], name).returns == {}


def two_rollouts():
    """`e` with the calls c0 and c1 of two tokens each, `f` with d0; all earned nothing."""
    calls = [make_call([1], [2, 3], id="c0"), make_call([1], [4, 5], id="c1")]
    episodes = [make_episode("e", calls), make_episode("f", [make_call([1], [2, 3], id="d0", episode_id="f")])]
    return [rollout_of(episode, {}, [call.id for call in episode.calls]) for episode in episodes]


RULE = """
from lightning_rl.credit.records import Credits, Term

def longest(group, *, bonus=1.0):
    return {call.id: bonus * len(rollout.calls) for rollout in group for call in rollout.calls}

def fails(group):
    return {call.id: 1 / rollout.outcome for rollout in group for call in rollout.calls}
"""


@pytest.fixture
def rules(tmp_path: Path):
    file = tmp_path / "credit.py"
    file.write_text(RULE)
    return lambda name, **arguments: bind(load_function(file, name), arguments, f"credit.py:{name}")


def test_a_rule_of_the_users_is_compared_in_the_group_rollout_by_rollout(rules):
    credits = rules("longest", bonus=2)(two_rollouts())
    assert credits.returns == {"c0": 4.0, "c1": 4.0, "d0": 2.0}
    assert credits.scopes == {GROUP: {"e": 4.0, "f": 2.0}}
    assert credits.terms["d0"] == [Term(value=2.0, scope=GROUP)]


def test_a_rule_of_the_users_that_fails_says_where(rules):
    with pytest.raises(
        CreditError, match=r"credit\.py:fails failed on the group of e, f:[^$]*line 8[^$]*ZeroDivisionError"
    ):
        rules("fails")(two_rollouts())


def test_a_parameter_that_a_rule_of_the_users_does_not_have_is_named(rules):
    with pytest.raises(CreditError, match=r"credit\.py:longest cannot be called with \(group, bonos=2\).*'bonos'"):
        rules("longest", bonos=2)


GOOD = {"c0": 1.0, "c1": 1, "d0": True}


def partly(**values: Any) -> Credits:
    parts = {"terms": {"c0": [Term(value=1.0, scope="s")]}, "scopes": {"s": {"e": 1.0}}} | values
    return Credits(returns=GOOD, **parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "gave NoneType for the group of e, f"),
        ([1.0, 2.0, 3.0], "gave list"),
        ({}, "gave nothing for call c0 of episode e, and for 2 more"),
        ({"c0": 1.0, "c1": 1.0}, "gave nothing for call d0 of episode f$"),
        (GOOD | {"x": 1.0}, "names 'x', which is no call of the learner's in the group of e, f"),
        (GOOD | {"d0": math.nan}, "gave call d0 of episode f the value nan"),
        (GOOD | {"c1": -math.inf}, "gave call c1 of episode e the value -inf"),
        (GOOD | {"c0": "1.0"}, "gave call c0 of episode e '1.0', which is no number"),
        (GOOD | {"c0": None}, "gave call c0 of episode e None, which is no number"),
        (GOOD | {"c0": Decimal(1)}, "which is no number"),
        (Credits(returns={"c0": 1.0}), "gave nothing for call c1 of episode e, and for 1 more"),
        (partly(terms={"x": []}), "names 'x'"),
        (partly(scopes={}), "compares call c0 of episode e in a scope without points: 's'"),
        (partly(scopes={"s": {"e": math.inf}}), "gave episode e in the scope 's' the value inf"),
        (partly(scopes={"s": {"c0": 1.0}}), "has a point of 'c0', which is no rollout of the group"),
        (partly(terms={"c0": [Term(value=1.0, scope="s", weight=math.nan)]}), "as its weight, the value nan"),
        (partly(token_advantages={"c0": [1.0]}), "gave 1 values for the 2 tokens of call c0 of episode e"),
        (partly(token_advantages={"c0": [1.0, math.nan]}), "gave call c0 of episode e the value nan"),
        (partly(value_targets={"c0": [None, math.inf]}), "gave call c0 of episode e the value inf"),
        (partly(token_advantages={"c0": [None, 1.0]}), "gave call c0 of episode e None, which is no number"),
        (partly(token_advantages={"c0": 1.0}), "gave call c0 of episode e 1.0, which is no list"),
        (partly(token_advantages={"c0": np.float32(1)}), "which is no list"),
        (partly(token_advantages=[1.0]), "gave list for token_advantages"),
        (partly(terms={"c0": Term(value=1.0, scope="s")}), "gave call c0 of episode e the terms Term"),
        (partly(terms={"c0": [(1.0, "s")]}), "gave call c0 of episode e the terms"),
        (partly(terms={"c0": [Term(value=1.0, scope=["s"])]}), "compares call c0 of episode e in the scope"),
        (partly(scopes={"s": 1.0}), "gave float for the points of the scope 's'"),
        (partly(alone={"x"}), "names 'x'"),
        (partly(alone="c0"), "gave 'c0' for the calls that are alone"),
        (GOOD | {"c0": 10**400}, "gave call c0 of episode e a number that is too large"),
        (GOOD | {7: 1.0}, "names 7"),
        (Credits(returns=None), "gave NoneType for returns"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_credit_is_an_error_that_names_rule_call_and_episode(given, message):
    with pytest.raises(CreditError, match=f"the credit rule my.py:rule .*{message}"):
        bind(lambda group: given, {}, "my.py:rule")(two_rollouts())


@pytest.mark.parametrize("given", [GOOD, partly(), partly(value_targets={"c0": [None, 0.5]})])
def test_what_is_credit_is_taken(given):
    assert bind(lambda group: given, {}, "my.py:rule")(two_rollouts()).returns == {"c0": 1.0, "c1": 1.0, "d0": 1.0}


def test_numbers_of_other_libraries_are_taken_for_what_they_are():
    one = np.float32(1)
    given = Credits(
        returns=dict.fromkeys(GOOD, one),
        terms={"c0": (Term(value=one, scope=("s", 1), weight=np.int64(2)),)},
        scopes={("s", 1): {"e": one}},
        alone=["c1"],
        token_advantages={"d0": np.ones(2)},
        value_targets={"d0": (None, one)},
    )
    plain = Credits(
        returns=dict.fromkeys(GOOD, 1.0),
        terms={"c0": [Term(value=1.0, scope=("s", 1), weight=2.0)]},
        scopes={("s", 1): {"e": 1.0}},
        alone=frozenset({"c1"}),
        token_advantages={"d0": [1.0, 1.0]},
        value_targets={"d0": [None, 1.0]},
    )
    taken = bind(lambda group: given, {}, "my.py:rule")(two_rollouts())
    assert taken == plain
    assert repr(taken) == repr(plain), "not only equal: floats and lists"
    of_numbers = bind(lambda group: dict.fromkeys(GOOD, one), {}, "my.py:rule")(two_rollouts())
    assert {type(value) for value in of_numbers.returns.values()} == {float}
