import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.credit import RULES, credit_rule
from lightning_rl.episode import Reward
from lightning_rl.errors import RecipeError
from tests.unit.domain import make_call, make_episode

numbers = st.floats(-10, 10)


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(numbers, numbers)), st.integers(0, 4))
def test_equal_gives_every_call_the_weighted_return(rewards, count):
    calls = [make_call([1], [2], id=f"c{i}") for i in range(count)]
    episode = make_episode("e", calls, {name: value for name, (value, _) in rewards.items()})
    returns = credit_rule("equal")(episode, {name: weight for name, (_, weight) in rewards.items()})
    expected = sum(value * weight for value, weight in rewards.values())
    assert returns == {f"c{i}": pytest.approx(expected, abs=1e-9) for i in range(count)}


def test_rewards_at_calls_and_spans_are_part_of_the_return():
    episode = make_episode("e", [make_call([1], [2], id="c0"), make_call([1], [3], id="c1")])
    episode.rewards.append(Reward(episode_id="e", name="correct", value=1.0))
    episode.rewards.append(Reward(episode_id="e", name="well_formed", value=1.0, call_id="c0"))
    episode.rewards.append(Reward(episode_id="e", name="well_formed", value=1.0, span_id="s"))
    returns = credit_rule("equal")(episode, {"correct": 1.0, "well_formed": 0.1})
    assert returns == {"c0": pytest.approx(1.2), "c1": pytest.approx(1.2)}


def test_without_weights_every_reward_counts_as_it_is():
    episode = make_episode("e", [make_call([1], [2])], {"a": 1.0, "b": 2.0})
    assert credit_rule("equal")(episode, {}) == {"c": 3.0}


def test_a_reward_without_a_weight_is_an_error_that_names_it():
    episode = make_episode("e", [make_call([1], [2])], {"corect": 1.0})
    with pytest.raises(RecipeError, match=r"corect.*weights are given for correct, well_formed"):
        credit_rule("equal")(episode, {"correct": 1.0, "well_formed": 0.1})


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_had_by_name(name):
    assert credit_rule(name)(make_episode("e"), {}) == {}
