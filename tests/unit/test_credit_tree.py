"""The credit rule `tree`: where it is RLOO, where it says more, and that nothing is lost on the way."""

import itertools
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.call_tree import ROOT, call_tree
from lightning_rl.credit.equal import equal
from lightning_rl.credit.gigpo import gigpo
from lightning_rl.credit.records import CreditRule, Credits, Rollout
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.credit.tree import tree, value
from lightning_rl.episode import Call, Reward
from tests.unit.domain import make_call, make_episode

Turn = tuple[int, int]
"""What the policy samples, and what it sees then."""


def conversation(rollout: str, turns: Sequence[Turn], prompt: Sequence[int] = (1, 2)) -> list[Call]:
    calls: list[Call] = []
    ids = [*prompt]
    for k, (action, observation) in enumerate(turns):
        parent = calls[-1].id if calls else None
        calls.append(make_call(ids, [action], f"{rollout}.{k}", rollout, index=k, parent_id=parent))
        ids = [*ids, action, observation]
    return calls


def rollout(calls: Sequence[Call], outcome: float, earned: dict[str, float] | None = None) -> Rollout:
    episode = make_episode(calls[0].episode_id, calls, {"r": outcome})
    rewards = [Reward(episode_id=episode.id, name="r", value=v, call_id=id) for id, v in (earned or {}).items()]
    return rollout_of(structs.replace(episode, rewards=[*episode.rewards, *rewards]), {}, [call.id for call in calls])


def advantages(
    group: Sequence[Rollout], credits: Credits, baseline: str = "leave_one_out", normalise: str = "none"
) -> dict[str, float]:
    settings = AdvantageSettings(baseline=baseline, normalise=normalise)  # type: ignore[arg-type]
    rollout_of_call = {call.id: one.id for one in group for call in one.calls}
    return {id: found.advantage for id, found in estimate(credits, settings, rollout_of_call).items()}


returns = st.floats(-3, 3).map(lambda value: round(value, 3))


@given(
    st.lists(st.tuples(st.integers(1, 4), returns, returns), min_size=2, max_size=5),
    st.sampled_from([("leave_one_out", True), ("group_mean", False)]),
    st.sampled_from(["none", "std"]),
)
def test_where_only_the_first_prompt_is_shared_it_is_rloo_or_the_group_mean(
    rollouts: list[tuple[int, float, float]], kind: tuple[str, bool], normalise: str
) -> None:
    group = [
        rollout(conversation(f"e{i}", [(10 + i, 5)] * length), outcome, {f"e{i}.0": earned})
        for i, (length, outcome, earned) in enumerate(rollouts)
    ]
    baseline, leave_one_out = kind
    got = advantages(group, tree(group, leave_one_out=leave_one_out), baseline, normalise)
    assert got == pytest.approx(advantages(group, equal(group), baseline, normalise), abs=1e-9)


@given(st.integers(0, 10**6))
def test_credits_along_a_path_sum_to_what_the_leaf_has_above_the_root(seed: int) -> None:
    """In an environment without chance: what is seen, when it ends and what it is worth are functions of the actions."""
    chance = random.Random(seed)
    group = []
    for i in range(chance.randint(2, 6)):
        turns: list[Turn] = []
        while not turns or (len(turns) < 4 and _fixed(seed, "goes on", turns) < 0.8):
            action = chance.choice([1, 1, 2])
            turns.append((action, int(10 * _fixed(seed, "seen", turns, action))))
        calls = conversation(f"e{i}", turns)
        earned = {call.id: _fixed(seed, "earned", turns[: k + 1]) for k, call in enumerate(calls)}
        group.append(rollout(calls, _fixed(seed, "outcome", turns), earned))
    got = advantages(group, tree(group, leave_one_out=False), "group_mean")
    calls_of = call_tree(group)
    outcomes = {one.id: one.outcome for one in group}
    root = value(calls_of.nodes[ROOT], outcomes)
    assert root == pytest.approx(statistics.fmean(one.ret for one in group))
    for one in group:
        met = [call.id for call in one.calls if len(calls_of.nodes[calls_of.state[call.id]].leaves) > 1]
        assert sum(got[id] for id in met) == pytest.approx(one.ret - root, abs=1e-9)
        for call in one.calls[len(met) :]:
            assert got[call.id] == pytest.approx(got[met[-1]], abs=1e-9)


def _fixed(*what: object) -> float:
    return random.Random(repr(what)).random()


def test_credit_of_the_branch_belongs_to_the_call_that_branches() -> None:
    """Two rollouts begin alike, then one goes right and one wrong; a third begins otherwise and fails."""
    right, wrong, other = (
        rollout(conversation("a", [(1, 5), (2, 5), (9, 5)]), 1.0),
        rollout(conversation("b", [(1, 5), (3, 5)]), 0.0),
        rollout(conversation("c", [(4, 5), (2, 5)]), 0.0),
    )
    group = [right, wrong, other]
    credits = tree(group)
    assert credits.returns == {"a.0": 0.5, "b.0": 0.5, "a.1": 1.0, "a.2": 1.0, "b.1": 0.0, "c.0": 0.0, "c.1": 0.0}
    assert advantages(group, credits) == pytest.approx(
        {"a.0": 0.5, "b.0": 0.0, "a.1": 1.0, "a.2": 1.0, "b.1": -1.0, "c.0": -0.5, "c.1": -0.5}
    )
    assert advantages(group, tree(group, leave_one_out=False)) == pytest.approx(
        {"a.0": 1 / 6, "b.0": 1 / 6, "a.1": 0.5, "a.2": 0.5, "b.1": -0.5, "c.0": -1 / 3, "c.1": -1 / 3}
    )


def test_it_is_unbiased() -> None:
    """The expected gradient of three rollouts of a policy over two steps is the true one, by enumeration of all that may happen.

    Step 1 has the actions 1 and 2 with π(1) = p; step 2, in the state after 1 as in that after 2, has the same with π(1) = q.
    """
    p, q = 0.3, 0.6
    worth = {(1, 1): 1.0, (1, 2): 0.0, (2, 1): 0.2, (2, 2): 0.5}
    chance = {path: (p, 1 - p)[path[0] - 1] * (q, 1 - q)[path[1] - 1] for path in worth}
    score = [{1: 1 - p, 2: -p}, {1: 1 - q, 2: -q}]
    true = [sum(chance[path] * worth[path] * score[k][path[k]] for path in worth) for k in (0, 1)]
    got = [0.0, 0.0]
    for first in worth:
        for second in worth:
            for third in worth:
                paths = [first, second, third]
                group = [
                    rollout(conversation(f"e{i}", [(a, 5), (b, 5)]), worth[a, b]) for i, (a, b) in enumerate(paths)
                ]
                advantage = advantages(group, tree(group))
                weight = math.prod(chance[path] for path in paths) / 3
                for i, path in enumerate(paths):
                    for k in (0, 1):
                        got[k] += weight * advantage[f"e{i}.{k}"] * score[k][path[k]]
    assert got == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("at", ["judge", ""])
def test_it_is_unbiased_where_choices_are_joined(at: str) -> None:
    """As above: two rollouts of two choices each, which a judge rewards, at its call or as the episode."""
    p = 0.3
    worth = {(1, 1): 1.0, (1, 2): 0.0, (2, 1): 0.2, (2, 2): 0.5}
    chance, score = {1: p, 2: 1 - p}, {1: 1 - p, 2: -p}
    true = sum(chance[a] * chance[b] * value * (score[a] + score[b]) for (a, b), value in worth.items())
    got = 0.0
    for drawn in itertools.product(worth, repeat=2):
        group = []
        for id, actions in zip("ab", drawn, strict=True):
            choices = [make_call([1], [a], f"{id}{i}", id, index=i, response_id=id) for i, a in enumerate(actions)]
            calls = [*choices, make_call([3, ord(id)], [4], f"{id}.judge", id, index=4)]
            reward = worth[actions]
            group.append(rollout(calls, 0.0, {f"{id}.judge": reward}) if at else rollout(calls, reward))
        advantage = advantages(group, tree(group))
        weight = math.prod(chance[a] for actions in drawn for a in actions) / 2
        for id, actions in zip("ab", drawn, strict=True):
            got += weight * sum(advantage[f"{id}{i}"] * score[a] for i, a in enumerate(actions))
    assert got == pytest.approx(true, abs=1e-12)


def test_a_search_inside_one_episode_has_credit_by_its_branches() -> None:
    """Two choices of one request; each goes on, and is rewarded at its end."""
    first = make_call([1], [2], "root", "e", index=0)
    choices = [
        make_call([1, 2, 5], [6 + i], f"choice{i}", "e", index=1 + i, parent_id="root", response_id="r")
        for i in range(2)
    ]
    ends = [make_call([1, 2, 5, 6 + i, 5], [8], f"end{i}", "e", index=3 + i, parent_id=f"choice{i}") for i in range(2)]
    group = [rollout([first, *choices, *ends], 0.0, {"end0": 1.0})]
    assert call_tree(group).follows == {
        "root": (), "choice0": ("root",), "choice1": ("root",), "end0": ("choice0",), "end1": ("choice1",)
    }  # fmt: skip
    got = advantages(group, tree(group))
    assert got == {"root": 0.0, "choice0": 1.0, "end0": 1.0, "choice1": -1.0, "end1": -1.0}


def test_choices_share_the_outcome_that_they_all_led_to() -> None:
    """The outcome depends on every choice, so it is compared with other rollouts only."""
    choices = [make_call([1], [2 + i], f"a{i}", "a", index=i, response_id="r", relation="fork") for i in range(3)]
    group = [rollout(choices, 1.0), rollout(conversation("b", [(7, 5)], [1]), 0.0)]
    assert advantages(group, tree(group)) == {"a0": 1.0, "a1": 1.0, "a2": 1.0, "b.0": -1.0}


def test_conversations_of_several_agents_are_one_path_in_time() -> None:
    """A planner asks a helper, who starts anew, and goes on; the helper's call is no loose end."""
    calls = [
        make_call([1], [2], "planner0", "e", index=0),
        make_call([7], [8], "helper", "e", index=1),
        make_call([1, 2, 8], [3], "planner1", "e", index=2, parent_id="planner0", relation="extension"),
    ]
    assert call_tree([rollout(calls, 1.0)]).follows == {
        "planner0": (), "helper": ("planner0",), "planner1": ("helper",)
    }  # fmt: skip


@pytest.mark.parametrize("prompts", [[1, 3, 1], [1, 1, 1]])
def test_a_state_met_again_without_memory_is_no_alternative(prompts: list[int]) -> None:
    """An agent that is told only where it stands comes back to where it was, or stays there for a wall."""
    calls = [
        make_call([prompt], [2], f"c{k}", "e", index=k, relation="fork", started_at=k, ended_at=k + 1)
        for k, prompt in enumerate(prompts)
    ]
    assert call_tree([rollout(calls, 1.0)]).follows == {"c0": (), "c1": ("c0",), "c2": ("c1",)}


def test_the_same_prompt_asked_meanwhile_is_an_alternative() -> None:
    """Also with another call between them."""
    times = {"a0": ([1], 0.0, 3.0), "other": ([7], 1.0, 2.0), "a1": ([1], 2.5, 4.0)}
    calls = [
        make_call(prompt, [2], id, "e", index=k, started_at=start, ended_at=end)
        for k, (id, (prompt, start, end)) in enumerate(times.items())
    ]
    assert call_tree([rollout(calls, 1.0)]).follows == {"a0": (), "other": ("a0",), "a1": ()}


def judged(id: str, reward: float, at: str, first: int = 10) -> Rollout:
    """Four choices of one request, then a judge without memory; the reward is at a call, or the episode's."""
    choices = [make_call([1], [first + i], f"{id}{i}", id, index=i, response_id=f"r{id}") for i in range(4)]
    calls = [*choices, make_call([3, ord(id)], [4], f"{id}.judge", id, index=4)]
    return rollout(calls, 0.0, {f"{id}.{at}": reward}) if at else rollout(calls, reward)


@pytest.mark.parametrize("at", ["judge", ""])
@pytest.mark.parametrize(("theirs", "credit"), [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
def test_what_a_judge_earns_belongs_to_all_choices_alike(at: str, theirs: float, credit: float, baseline: str) -> None:
    """Compared with other rollouts: siblings led to the same judge."""
    group = [judged("a", 1.0, at), judged("b", theirs, at, first=20)]
    for leave_one_out, scale in ((True, 1.0), (False, 0.5)):
        got = advantages(group, tree(group, leave_one_out=leave_one_out), baseline)
        assert got == pytest.approx({id: (credit if id[0] == "a" else -credit) * scale for id in got}, abs=1e-12)
        assert len(got) == 10


@pytest.mark.parametrize("reduce_extends", [None, "plan"])
def test_map_reduce(reduce_extends: str | None) -> None:
    """Workers extend the plan, one earns something itself, and a merger without memory reads them all. Then somebody extends the
    plan: what is joined is not forked again."""

    def made(id: str, own: float, at_end: float) -> Rollout:
        plan = make_call([1], [2], f"{id}plan", id, index=0)
        maps = [make_call([1, 2, 5 + i], [ord(id)], f"{id}{i}", id, index=1 + i, parent_id=plan.id) for i in range(3)]
        merge = make_call([8], [ord(id)], f"{id}merge", id, index=4)
        base = None if reduce_extends is None else plan.id
        end = make_call([1, 2, 9] if base else [9], [ord(id)], f"{id}end", id, index=5, parent_id=base)
        return rollout([plan, *maps, merge, end], 0.0, {f"{id}1": own, f"{id}end": at_end})

    group = [made("a", 0.9, 1.0), made("b", 0.9, 0.0)]
    calls = call_tree(group)
    assert calls.follows["amerge"] == ("a0", "a1", "a2")
    assert calls.follows["aend"] == ("amerge",)
    assert calls.joined == {f"{id}{i}" for id in "ab" for i in range(3)}
    got = advantages(group, tree(group))
    # Both plans were the same. Each map is compared with the one of the same prompt, and what they earned with it is equal.
    assert got == pytest.approx({id: 0.0 if id[1:] == "plan" else 1.0 if id[0] == "a" else -1.0 for id in got})
    # With nobody else there is what it earned itself, and its siblings' mean.
    credits = tree(group[:1])
    assert advantages(group[:1], credits) == pytest.approx(
        {"a0": -0.45, "a1": 0.9, "a2": -0.45} | dict.fromkeys(credits.alone, 0.0)
    )
    assert credits.alone == {"aplan", "amerge", "aend"}


def test_what_is_earned_behind_a_join_is_no_deed_of_the_last_choice() -> None:
    """A penalty for length at the judge's successor; the answers before were the same in both."""
    group = []
    for id, penalty in (("a", -1.0), ("b", 0.0)):
        choices = [make_call([1], [2 + i], f"{id}{i}", id, index=i, response_id="r") for i in range(2)]
        after = [make_call([7 + k], [ord(id)], f"{id}.{k}", id, index=2 + k) for k in range(2)]
        group.append(rollout([*choices, *after], 1.0, {f"{id}.1": penalty}))
    # Where both rollouts did the same, V is of both, and one's own is what the other has not.
    assert advantages(group, tree(group)) == pytest.approx(
        {"a0": -0.5, "a1": -0.5, "b0": 0.5, "b1": 0.5, "a.0": -1.0, "a.1": -1.0, "b.0": 1.0, "b.1": 1.0}
    )
    assert set(advantages(group, tree(group, leave_one_out=False)).values()) == {0.0, -0.5, 0.5}


@given(st.integers(0, 10**6))
def test_nothing_is_lost_in_forks_and_joins(seed: int) -> None:
    """Whatever the shape: ends are joined once, and leaves and rewards at the root are those below."""
    chance = random.Random(seed)
    calls: list[Call] = []
    for k in range(chance.randint(1, 14)):
        base = chance.choice([None, *(call.id for call in calls)])
        response = chance.choice(["", f"r{k // 3}"])
        calls.append(
            make_call([chance.randint(1, 3)], [k], f"c{k}", "e", index=k, parent_id=base, response_id=response)
        )
    one = rollout(calls, 1.0, {})
    built = call_tree([one])
    seen: dict[str, tuple[str, ...]] = {}
    for before in built.follows.values():
        for end in before:
            assert seen.setdefault(end, before) == before
    loose = [call.id for call in calls if call.id not in seen]
    assert built.nodes[ROOT].leaves["e"].count == pytest.approx(len(loose))
    for call in calls:
        parts = [built.below[other].count for other, before in built.follows.items() if call.id in before]
        shared = len(seen[call.id]) if call.id in seen else 1
        assert built.below[call.id].count == pytest.approx(sum(parts) / shared if parts else 1)
    chosen = chance.choice(calls).id
    paid = call_tree([rollout(calls, 0.0, {chosen: 1.0})])
    assert paid.nodes[ROOT].leaves["e"].earned == pytest.approx(paid.below[chosen].count)
    assert paid.below[chosen].earned == pytest.approx(paid.below[chosen].count)


def test_where_all_did_the_same_nothing_was_decided() -> None:
    group = [rollout(conversation(f"e{i}", [(1, 5), (2 + i, 5)]), float(i == 0)) for i in range(3)]
    got = advantages(group, tree(group))
    assert [got[f"e{i}.0"] for i in range(3)] == [0.0, 0.0, 0.0]
    assert got["e0.1"] == pytest.approx(1.0)


@given(st.permutations(range(4)))
def test_the_order_of_rollouts_does_not_matter(order: list[int]) -> None:
    turns = [[(1, 5), (2, 5)], [(1, 5), (3, 5)], [(1, 5), (2, 5)], [(4, 5)]]
    group = [rollout(conversation(f"e{i}", turns[i]), 0.1 * i + 0.3, {f"e{i}.0": 0.7 * i}) for i in range(4)]
    assert advantages(group, tree([group[i] for i in order])) == advantages(group, tree(group))


def test_rollouts_with_other_first_prompts_are_compared() -> None:
    group = [rollout(conversation(id, [(1, 5)], [ord(id)]), float(id == "a")) for id in "ab"]
    assert advantages(group, tree(group)) == {"a.0": 1.0, "b.0": -1.0}


def test_a_rollout_alone_has_nobody_to_compare_with() -> None:
    group = [rollout(conversation("a", [(1, 5), (2, 5)]), 1.0)]
    credits = tree(group)
    assert credits.alone == {"a.0", "a.1"}
    for baseline in ("leave_one_out", "group_mean", "none"):
        found = estimate(credits, AdvantageSettings(baseline=baseline), dict.fromkeys(["a.0", "a.1"], "a"))  # type: ignore[arg-type]
        assert [(one.alone, one.advantage) for one in found.values()] == [(True, 0.0)] * 2
    assert tree([]).terms == {}


def test_it_costs_no_more_than_reading_the_tokens() -> None:
    group = []
    for i in range(16):
        base = [*range(4000)]
        calls = [
            make_call(base + [k, i] * k, [k, i], f"{i}.{k}", f"e{i}", index=k, parent_id=f"{i}.{k - 1}" if k else None)
            for k in range(50)
        ]
        group.append(rollout(calls, float(i % 2)))
    started = time.process_time()
    tree(group)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("conversations", [1, 20, 4000])
@pytest.mark.parametrize("rule", [tree, equal, gigpo])
def test_its_cost_is_linear_in_the_number_of_calls(conversations: int, rule: CreditRule) -> None:
    """One agent with its whole conversation, many in turn, or calls without memory. Lines of Python that are run are counted."""

    def cost(count: int) -> int:
        calls = []
        for k in range(count):
            parent = f"c{k - conversations}" if k >= conversations else None
            calls.append(make_call([k], [k], f"c{k}", "e", index=k, parent_id=parent))
        group = [rollout(calls, 1.0)]
        lines = Counter[str]()

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            lines[frame.f_code.co_name] += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            rule(group)
        finally:
            sys.settrace(before)
        assert lines["ret"] < 10, "a return is a sum over all calls"
        return lines.total()

    assert cost(400) < 2.2 * cost(200)
