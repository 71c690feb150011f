import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.algorithms.aggregation import kept_tokens
from lightning_rl.episode import Outcome
from lightning_rl.errors import LedgerError
from lightning_rl.ledger import Ledger, account
from lightning_rl.token_tree import build_tree
from tests.unit.domain import make_call, make_episode, transitions_of

ids = st.lists(st.integers(0, 1), max_size=4)
temperatures = st.sampled_from([0.0, 1.0, 1.0])
call_shapes = st.tuples(ids.map(lambda prompt: [7, *prompt]), ids, temperatures)
outcomes = st.sampled_from([Outcome.COMPLETED] * 3 + [Outcome.TIMEOUT, Outcome.AGENT_ERROR, None])
attempts = st.tuples(st.sampled_from([0.0, 1.0]), outcomes, st.lists(call_shapes, max_size=3))


def step_of(groups, max_tokens=None):
    """Episodes, transitions and trees as a trainer makes them: trees hold what is not masked."""
    episodes, transitions, trees = [], [], []
    for g, group in enumerate(groups):
        counted, returns = [], {}
        for a, (value, outcome, shapes) in enumerate(group):
            name = f"g{g}a{a}"
            calls = [
                make_call(prompt, sampled, id=f"{name}c{c}", episode_id=name, temperature=temperature)
                for c, (prompt, sampled, temperature) in enumerate(shapes)
            ]
            completed = outcome is Outcome.COMPLETED
            episodes.append(make_episode(name, calls, outcome=outcome, counted=completed))
            if completed:
                counted.append(episodes[-1])
                returns |= {call.id: value for call in calls}
        made = transitions_of(counted, returns, "std")
        trained = {t.call_id for t in made if t.masked is None}
        trees.append(build_tree([c for e in counted for c in e.calls if c.id in trained], max_tokens=max_tokens))
        transitions += made
    return episodes, transitions, trees


@given(st.lists(st.lists(attempts, max_size=5), max_size=3), st.none() | st.integers(2, 8))
def test_every_sampled_token_is_accounted_for(groups, max_tokens):
    episodes, transitions, trees = step_of(groups, max_tokens)
    ledger = account(episodes, transitions, trees)
    ledger.check("step 0")
    assert ledger.sampled == sum(len(call.sampled_ids) for episode in episodes for call in episode.calls)
    if max_tokens is not None:
        kept = kept_tokens(transitions, max_tokens)
        assert all(len(tree.terms(call_id)) == kept[call_id] for tree in trees for call_id in tree.last_nodes)
    losses = sum(len(tree.terms(call_id)) for tree in trees for call_id in tree.last_nodes)
    assert ledger.trained + ledger.merged == losses


@given(st.lists(st.lists(attempts, min_size=2, max_size=5), min_size=1, max_size=3), st.data())
def test_a_lost_transition_is_noticed(groups, data):
    episodes, transitions, trees = step_of(groups)
    with_tokens = [t for t in transitions if t.sampled_ids]
    if not with_tokens:
        return
    transitions.remove(data.draw(st.sampled_from(with_tokens)))
    with pytest.raises(LedgerError):
        account(episodes, transitions, trees).check("step 0")


def test_equal_beginnings_are_merged():
    group = [(1.0, Outcome.COMPLETED, [([7], [1, 2], 1.0)]), (0.0, Outcome.COMPLETED, [([7], [1, 3], 1.0)])]
    ledger = account(*step_of([group]))
    assert (ledger.sampled, ledger.trained, ledger.merged) == (4, 3, 1)


def test_an_extension_is_not_merged_with_what_it_extends():
    calls = [([7], [1, 2], 1.0), ([7, 1, 2, 8], [3], 1.0)]
    ledger = account(*step_of([[(1.0, Outcome.COMPLETED, calls), (0.0, Outcome.COMPLETED, [([7], [4], 1.0)])]]))
    assert (ledger.sampled, ledger.trained, ledger.merged) == (4, 4, 0)


def test_reasons():
    group = [
        (1.0, Outcome.COMPLETED, [([7], [1, 2, 3], 1.0), ([7], [1], 0.0)]),
        (0.0, Outcome.COMPLETED, [([7], [2], 1.0)]),
        (0.0, Outcome.TIMEOUT, [([7], [1, 1], 1.0)]),
        (0.0, None, [([7], [1], 1.0)]),
    ]
    ledger = account(*step_of([group], max_tokens=3))
    assert ledger.to_dict() == {
        "sampled": 8,
        "trained": 3,
        "merged": 0,
        "masked": {"greedy": 1},
        "truncated": {"row_limit": 1},
        "dropped": {"running": 1, "timeout": 2},
        "by_agent": {
            "(unknown)": {
                "sampled": 8, "trained": 3, "masked/greedy": 1, "truncated/row_limit": 1, "dropped/running": 1,
                "dropped/timeout": 2,
            }
        },
    }  # fmt: skip
    doubled = ledger + ledger
    assert doubled.sampled == 16
    assert doubled.dropped == {"running": 2, "timeout": 4}
    assert Ledger.from_dict(json.loads(json.dumps(doubled.to_dict()))) == doubled


def test_a_ledger_from_before_agents_were_told_apart_goes_on():
    older = {"sampled": 5, "trained": 3, "merged": 0, "masked": {"greedy": 2}, "truncated": {}, "dropped": {}}
    read = Ledger.from_dict(older)
    assert read.by_agent == {"(unknown)": {"sampled": 5, "trained": 3, "masked/greedy": 2}}
    newer = Ledger(sampled=1, trained=1, by_agent={"writer": {"sampled": 1, "trained": 1}})
    (read + newer + Ledger()).check("a resumed run")


@pytest.mark.parametrize(
    ("by_agent", "words"),
    [
        (
            {"a": {"sampled": 3, "trained": 4}, "b": {"sampled": 2, "masked/greedy": 1}},
            "the agent a sampled 3 tokens, 4 are",
        ),
        ({"a": {"sampled": 4, "trained": 4}}, "what the agents sampled is not what was sampled in all"),
        ({"a": {"sampled": 5, "trained": 5}}, "what the agents sampled is not what was sampled in all"),
    ],
)
def test_an_imbalance_of_one_agent_is_told(by_agent, words):
    with pytest.raises(LedgerError, match=words):
        Ledger(sampled=5, trained=4, masked={"greedy": 1}, by_agent=by_agent).check("step 3")


def test_an_imbalance_is_told_with_the_table():
    with pytest.raises(
        LedgerError, match=r"(?s)step 3: 5 tokens were sampled, 4 are.*masked: greedy +1\n.*difference +1"
    ):
        Ledger(sampled=5, trained=3, masked={"greedy": 1}).check("step 3")
