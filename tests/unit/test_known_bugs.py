"""Defects that other projects' ways from calls to training data have had, each tried on ours: `learn_from` to rows."""

import struct

import pytest
from msgspec import structs

from lightning_rl.episode import Reward
from tests.unit.domain import make_call, make_episode, make_recipe
from trainers.learning import learn_from


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    objective = {"name": "dr_grpo", "aggregation": "token"}
    return make_recipe(tmp_path_factory.mktemp("recipe"), train={"steps": 1, "objective": objective})


def pair(calls, good=1.0):
    """A rollout of these calls with this reward, and one that answers otherwise and gets 0."""
    other = make_call(calls[0].prompt_ids, [90], id="other", episode_id="f")
    mine = make_episode("e", calls, {"good": good})
    return [mine, make_episode("f", [other], {"good": 0.0})]


def learned(recipe, episodes):
    """By call id: its targets and their weights as the rows have them."""
    found = {}
    for row in learn_from(recipe, episodes).packed.rows:
        for number, call_id in enumerate(row.calls):
            places = [place for place, own in enumerate(row.sequences) if own == number]
            found[call_id] = [(row.targets[place], row.weights[place], row.ids[row.nodes[place]]) for place in places]
    return found


@pytest.mark.parametrize("sampled", [[], [7]])
def test_a_call_without_new_tokens_does_not_train_the_prompt(recipe, sampled):
    """agent-lightning 0.3: `ids[-n:]` with n = 0 new tokens is the whole list, so that the prompt was appended once more and its
    tokens became targets."""
    first = make_call([1, 2, 3], [4, 5], id="c0")
    empty = make_call([1, 2, 3, 4, 5], sampled, id="c1", index=1)
    data = learn_from(recipe, pair([first, empty]))
    assert learned(recipe, pair([first, empty])).get("c1", []) == [(7, 1 / 4, 5)] * len(sampled)
    targets = [target for row in data.packed.rows for target in row.targets]
    assert sorted(targets) == sorted([4, 5, 90, *sampled])
    assert max(len(row.ids) for row in data.packed.rows) <= 5  # the last sampled token predicts nothing
    data.ledger.check("the step")


def test_the_end_of_a_later_prompt_is_not_trained_on(recipe):
    """agent-lightning 0.3: where calls of a rollout are merged into one sequence, the mask of a later call was counted twice, which
    moved it onto the end of the prompt: what a tool had said was trained as if the policy had."""
    first = make_call([1, 2, 3], [4, 5], id="c0")
    second = make_call([1, 2, 3, 4, 5, 60, 61, 62], [6, 7], id="c1", index=1)
    third = make_call([1, 2, 3, 4, 5, 60, 61, 62, 6, 7, 63], [8], id="c2", index=2)
    found = learned(recipe, pair([first, second, third]))
    assert {call_id: [(target, before) for target, _, before in own] for call_id, own in found.items()} == {
        "c0": [(4, 3), (5, 4)], "c1": [(6, 62), (7, 6)], "c2": [(8, 63)], "other": [(90, 3)]
    }  # fmt: skip
    assert {weight for own in found.values() for _, weight, _ in own} == {1 / 6}


@pytest.mark.parametrize("good", [1.001, 257.0, 0.30000000000000004])
def test_rewards_keep_all_their_digits(recipe, good):
    """agent-lightning 1.0: rewards were cast to bfloat16, which has 8 bits: 1.001 became 1, and 257 became 256."""
    assert as_bfloat16(good) != good
    data = learn_from(recipe, pair([make_call([1], [2], id="c0")], good))
    assert [t.ret for t in data.transitions] == [good, 0.0]
    assert [t.advantage for t in data.transitions] == [good - good / 2, -good / 2]
    assert sorted(advantage for row in data.packed.rows for advantage in row.advantages) == [-good / 2, good - good / 2]


def as_bfloat16(value):
    return struct.unpack(">f", struct.pack(">f", value)[:2] + b"\0\0")[0]


def test_what_is_learned_from_stays_as_it_was(recipe):
    """agent-lightning 1.0: lists of log-probs were cut and filled up in place, so that whoever used them next, or the same step
    again, had others."""
    calls = [make_call([1], [2, 3], id="c0", logprobs=[-0.25, -0.5]), make_call([1, 2, 3, 4], [5], id="c1", index=1)]
    episodes = pair(calls)
    episodes[0] = structs.replace(
        episodes[0], rewards=[*episodes[0].rewards, Reward(episode_id="e", name="good", value=1.0, call_id="c0")]
    )
    before = repr(episodes)
    first, again = learn_from(recipe, episodes), learn_from(recipe, episodes)
    assert repr(episodes) == before
    assert first == again
    for row in first.packed.rows:
        for values in (row.behaviour, row.advantages, row.weights, row.ids, row.targets):
            values.clear()
    assert repr(episodes) == before
    assert learn_from(recipe, episodes).packed == again.packed
