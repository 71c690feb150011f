import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.ledger import account
from lightning_rl.scores import CallScores
from lightning_rl.token_tree import build_tree
from tests.unit.domain import make_call, make_episode, transitions_of
from trainers.packing import PADDING, Row, pack, row_cost, rows_to_score, share_out

tokens = st.lists(st.integers(0, 2), max_size=5)
calls = st.tuples(tokens.map(lambda prompt: [7, *prompt]), tokens, st.sampled_from([0.0, 1.0, 1.0, 0.5]))
episodes = st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.lists(calls, max_size=3))
groups = st.lists(st.lists(episodes, max_size=4), max_size=3)


def step_of(groups):
    """Episodes, transitions and what `pack` wants to know of them. The i-th sampled token of a call has log-prob -i - 1."""
    played, transitions, group_of = [], [], {}
    for g, group in enumerate(groups):
        members, returns = [], {}
        for e, (value, shapes) in enumerate(group):
            name = f"g{g}e{e}"
            made = [
                make_call(
                    prompt,
                    sampled,
                    id=f"{name}c{c}",
                    episode_id=name,
                    temperature=temperature,
                    logprobs=[-float(i + 1) for i in range(len(sampled))],
                )
                for c, (prompt, sampled, temperature) in enumerate(shapes)
            ]
            members.append(make_episode(name, made))
            returns |= {call.id: value for call in made}
            group_of[name] = f"g{g}"
        played += members
        transitions += transitions_of(members, returns, "none")
    return played, transitions, group_of


def packed_step(groups, limit):
    played, transitions, group_of = step_of(groups)
    weights = token_weights(transitions, "token", kept_tokens(transitions, limit))
    by_id = {call.id: call for episode in played for call in episode.calls}
    return played, transitions, weights, pack(transitions, group_of, weights, by_id, limit)


def prefix_in(row: Row, node: int) -> tuple[int, ...]:
    """The ids that a node sees under the row's mask, itself included."""
    return tuple(row.ids[k] for k in range(node + 1) if node < row.ends[k])


def terms_in(row: Row) -> list[tuple[object, ...]]:
    return [
        (prefix_in(row, node), *rest)
        for node, *rest in zip(
            row.nodes, row.targets, row.advantages, row.weights, row.behaviour, row.temperatures, strict=True
        )
    ]


@settings(deadline=None)
@given(groups, st.integers(2, 30))
def test_a_row_asks_for_exactly_the_terms_of_its_calls(groups, limit):
    played, transitions, weights, packed = packed_step(groups, limit)
    expected: Counter[tuple[object, ...]] = Counter()
    for t in transitions:
        sequence = (t.prompt_ids + t.sampled_ids)[:limit]
        if t.call_id in weights:
            expected.update(
                (tuple(sequence[:p]), sequence[p], t.advantage, weights[t.call_id], -float(i + 1), t.temperature)
                for i, p in enumerate(range(len(t.prompt_ids), len(sequence)))
            )
    assert Counter(term for row in packed.rows for term in terms_in(row)) == expected
    account(played, transitions, packed.trees).check("packed")


@settings(deadline=None)
@given(groups, st.integers(2, 30))
def test_rows_hold_each_needed_prefix_once_and_nothing_else(groups, limit):
    *_, packed = packed_step(groups, limit)
    for row in packed.rows:
        assert row.nodes
        assert len(row.ids) == len(row.depths) == len(row.ends) <= limit
        prefixes = [prefix_in(row, node) for node in range(len(row.ids))]
        assert len(set(prefixes)) == len(prefixes)
        assert row.depths == [len(prefix) - 1 for prefix in prefixes]
        needed = {prefixes[node][:length] for node in row.nodes for length in range(1, len(prefixes[node]) + 1)}
        assert set(prefixes) == needed


def place_of(call_id, i):
    """A number that no other token of a step has."""
    return float(int(call_id[1]) * 10_000 + int(call_id[3]) * 1000 + int(call_id[5]) * 100 + i)


@settings(deadline=None)
@given(groups, st.integers(2, 30))
def test_what_is_said_about_a_token_stays_with_it(groups, limit):
    """Scores, versions, value targets, restrictions and agents, in rows with a loss and in rows to be scored."""
    played, transitions, group_of = step_of(groups)
    kept = kept_tokens(transitions, limit)
    weights = token_weights(transitions, "token", kept)
    by_id = {
        call.id: structs.replace(
            call,
            versions=[int(place_of(call.id, i)) for i in range(len(call.sampled_ids))],
            restricted=["top_p"] if call.id.endswith("1") else [],
        )
        for episode in played
        for call in episode.calls
    }
    asked = [
        structs.replace(t, value_targets=[None if i % 2 else place_of(t.call_id, i) for i in range(len(t.sampled_ids))])
        for t in transitions
    ]
    scores = {
        call_id: CallScores(
            old=[place_of(call_id, i) for i in range(kept[call_id])],
            reference=[-place_of(call_id, i) for i in range(kept[call_id])],
        )
        for call_id in by_id
    }
    agents = {call_id: f"agent of {call_id}" for call_id in by_id}
    packed = pack(asked, group_of, weights, by_id, limit, scores=scores, agent_of=agents)
    to_score = rows_to_score(list(by_id.values()), group_of, limit)
    for row in [*packed.rows, *to_score]:
        seen: Counter[str] = Counter()
        assert sorted(set(row.sequences)) == [*range(len(row.calls))]
        for term, sequence in enumerate(row.sequences):
            call_id = row.calls[sequence]
            i = seen[call_id]
            seen[call_id] += 1
            call = by_id[call_id]
            assert row.targets[term] == call.sampled_ids[i]
            assert prefix_in(row, row.nodes[term]) == tuple(call.prompt_ids + call.sampled_ids[:i])
            assert row.behaviour[term] == call.logprobs[i]
            assert row.versions[term] == int(place_of(call_id, i))
            assert row.correctable[term] == (not call.restricted)
            assert row.temperatures[term] == (call.temperature or 1.0)
            if row in packed.rows:
                assert (row.old[term], row.reference[term]) == (place_of(call_id, i), -place_of(call_id, i))
                assert row.agents[sequence] == agents[call_id]
                if i % 2 == 0:
                    assert row.value_targets[term] == place_of(call_id, i)
                assert (row.value_weights[term] > 0) == (i % 2 == 0)
        assert all(seen[call_id] == kept[call_id] for call_id in row.calls)
    shares = [weight for row in packed.rows for weight in row.value_weights]
    assert math.fsum(shares) == pytest.approx(1 if packed.rows else 0)
    scored = [call_id for row in to_score for call_id in row.calls]
    assert sorted(scored) == sorted(call_id for call_id, count in kept.items() if count)


def test_scores_of_another_length_are_refused():
    call = make_call([1, 2], [3, 4], id="a", episode_id="x")
    other = make_call([1, 2], [5], id="b", episode_id="y")
    members = [make_episode("x", [call]), make_episode("y", [other])]
    transitions = transitions_of(members, {"a": 1.0, "b": 0.0}, "none")
    scores = {"a": CallScores(old=[-1.0, -1.0]), "b": CallScores()}
    with pytest.raises(ValueError, match="call b has 1 tokens in its row and 0 scores"):
        pack(
            transitions,
            {"x": "g", "y": "g"},
            token_weights(transitions, "token"),
            {"a": call, "b": other},
            9,
            scores=scores,
        )


def test_what_has_no_loss_is_not_computed():
    good, bad = make_call([1, 2], [3, 4, 5], id="a", episode_id="x"), make_call([1, 2], [9], id="b", episode_id="y")
    greedy = make_call([8, 8, 8], [8], id="c", episode_id="y", temperature=0.0)
    members = [make_episode("x", [good]), make_episode("y", [bad, greedy])]
    transitions = transitions_of(members, {"a": 1.0, "b": 0.0, "c": 0.0}, "none")
    weights = token_weights(transitions, "token")
    packed = pack(transitions, {"x": "g", "y": "g"}, weights, {c.id: c for c in (good, bad, greedy)}, 100)
    (row,) = packed.rows
    assert row.ids == [1, 2, 3, 4]  # 5 and 9 end their sequences: they are targets only
    assert row.nodes == [1, 2, 3, 1]
    assert row.targets == [3, 4, 5, 9]
    assert row.advantages == [0.5, 0.5, 0.5, -0.5]
    assert row.weights == pytest.approx([1 / 4] * 4)


def test_a_group_that_does_not_fit_is_split_by_calls_without_losing_a_token():
    members = [
        make_episode(f"e{i}", [make_call([1] * 6, [2 + i] * 6, id=f"c{i}", episode_id=f"e{i}")]) for i in range(6)
    ]
    transitions = transitions_of(members, {f"c{i}": float(i) for i in range(6)}, "none")
    by_id = {call.id: call for episode in members for call in episode.calls}
    packed = pack(transitions, {f"e{i}": "g" for i in range(6)}, token_weights(transitions, "token"), by_id, 20)
    assert [len(row.nodes) for row in packed.rows] == [12, 12, 12]
    assert all(len(row.ids) <= 20 for row in packed.rows)
    account(members, transitions, packed.trees).check("split")


def test_one_tree_is_built_for_each_row_however_many_calls_a_group_has(monkeypatch):
    built = []
    monkeypatch.setattr("trainers.packing.build_tree", lambda *a, **k: built.append(build_tree(*a, **k)) or built[-1])
    made = [make_call([1], [2 + i] * 4, id=f"c{i}", episode_id=f"e{i % 3}") for i in range(90)]
    rows = rows_to_score(made, {f"e{e}": "g" for e in range(3)}, 41)
    assert len(rows) == len(built) == 9


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 4))
def test_ranks_get_equally_many_rows_and_every_row_once(sizes, ranks):
    rows = [
        Row(
            ids=[0] * size,
            depths=[*range(size)],
            ends=[size] * size,
            nodes=[0],
            targets=[number],
            advantages=[1.0],
            weights=[1.0],
            behaviour=[0.0],
            temperatures=[1.0],
        )
        for number, size in enumerate(sizes)
    ]
    shares = share_out(rows, ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    dealt = [row for share in shares for row in share if row is not PADDING]
    assert sorted(row.targets[0] for row in dealt) == list(range(len(sizes)))
    loads = [math.fsum(row_cost(row) for row in share if row is not PADDING) for share in shares]
    assert max(loads) - min(loads) <= max(map(row_cost, rows), default=0.0) + 1e-9
    assert share_out(rows, ranks) == shares


def two_groups():
    """One system prompt, two tasks, two episodes each."""
    members = [
        make_episode(f"e{i}", [make_call([1] * 6 + [2 + i // 2], [5 + i] * 3, id=f"c{i}", episode_id=f"e{i}")])
        for i in range(4)
    ]
    halves = [transitions_of(members[h : h + 2], {f"c{i}": float(i) for i in range(4)}, "none") for h in (0, 2)]
    transitions = halves[0] + halves[1]
    by_id = {call.id: call for episode in members for call in episode.calls}
    return transitions, {f"e{i}": f"g{i // 2}" for i in range(4)}, token_weights(transitions, "token"), by_id


def test_groups_share_a_row_and_what_their_prompts_have_in_common():
    (row,) = pack(*two_groups(), 100).rows
    assert len(row.ids) == 6 + 2 * (1 + 2 * 2)
    assert len(row.nodes) == 12


def test_groups_stay_apart_where_every_rank_needs_a_row():
    shares = share_out(pack(*two_groups(), 100, ranks=2).rows, 2)
    assert [len(share) for share in shares] == [1, 1]
    assert PADDING not in [*shares[0], *shares[1]]
