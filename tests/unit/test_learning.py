"""What a step learns from: the same whatever the order, cut into minibatches, with penalties, without groups that teach nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.episode import Reward, Task
from lightning_rl.errors import RecipeError
from lightning_rl.scores import CallScores
from lightning_rl.transition import Mask
from tests.unit.domain import make_call, make_episode, make_recipe
from trainers.doubts import doubts
from trainers.learning import groups_with_signal, learn_from
from trainers.loop import play_step, update
from trainers.minibatches import minibatches
from trainers.needs import calls_to_score, needs
from trainers.rollouts import tasks_from, train_starts
from trainers.step_metrics import group_counts

OBJECTIVES = ["grpo", "dapo", "reinforce++", "gspo", "rloo"]


def rollout(id, group, good, calls=((1, 2),), **values):
    """Each call extends the one before it; `calls` are their sampled ids."""
    prompt, made = [7], []
    for c, sampled in enumerate(calls):
        made.append(make_call(prompt, sampled, id=f"{id}c{c}", episode_id=id, index=c, **values))
        prompt = [*prompt, *sampled, 8]
    episode = make_episode(id, made, {"good": good})
    return structs.replace(episode, start=structs.replace(episode.start, group=group))


def scores_of(episodes, value=0.0):
    return {
        call.id: CallScores(
            old=[-0.5] * len(call.sampled_ids),
            reference=[-0.75] * len(call.sampled_ids),
            values=[value] * len(call.sampled_ids),
        )
        for episode in episodes
        for call in episode.calls
    }


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return lambda **train: make_recipe(folder, train={"steps": 3, **train})


STEP = [
    rollout("a0", "a", 1.0, [(1, 2), (3,)]),
    rollout("a1", "a", 0.0, [(1, 4)]),
    rollout("a2", "a", 0.5, [(1, 2), (5, 6)]),
    rollout("b0", "b", 1.0),
    rollout("b1", "b", 1.0, [(3, 3, 3)]),
    rollout("c0", "c", 0.0, [(9,), (9,), (9,)]),
    rollout("c1", "c", 1.0, [(9, 1)]),
    rollout("d0", "d", 0.25, [(2, 2)]),
    rollout("d1", "d", 0.75, [(2, 1)]),
]


@given(st.randoms(use_true_random=False), st.sampled_from(OBJECTIVES), st.sampled_from([1, 2]))
def test_the_order_in_which_a_store_gives_its_rows_changes_nothing(recipe_of, rng, objective, parts):
    recipe = recipe_of(objective=objective, minibatches=parts)
    shuffled = [structs.replace(e, calls=rng.sample(e.calls, len(e.calls))) for e in rng.sample(STEP, len(STEP))]
    scores = scores_of(STEP)
    mine, theirs = learn_from(recipe, STEP, scores), learn_from(recipe, shuffled, scores)
    assert mine.transitions == theirs.transitions
    assert mine.updates == theirs.updates
    assert mine.ledger == theirs.ledger


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 6), st.integers())
def test_minibatches_have_each_group_once_and_are_even(signals, others, count, seed):
    groups = [f"g{i}" for i in range(signals + others)]
    random.Random(seed).shuffle(groups)
    with_loss = set(groups[:signals])
    parts = minibatches(groups, with_loss, count, "s")
    assert len(parts) == max(1, min(count, signals))
    assert sorted(group for part in parts for group in part) == sorted(groups)
    for kind in (with_loss, {*groups} - with_loss):
        sizes = [len(kind.intersection(part)) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert parts == minibatches(groups, with_loss, count, "s")


def test_each_minibatch_has_means_of_its_own_and_the_ledger_counts_tokens_once(recipe_of):
    once = learn_from(recipe_of(), STEP)
    assert once.updates == [once.packed]
    by_token = {"name": "grpo", "aggregation": "token"}
    data = learn_from(recipe_of(objective=by_token, minibatches=3, epochs=2), STEP, scores_of(STEP))
    assert len(data.updates) == 6
    calls = [sorted(call for row in packed.rows for call in row.calls) for packed in data.updates]
    trained = sorted(t.call_id for t in data.transitions if t.masked is None)
    assert sorted([*calls[0], *calls[1], *calls[2]]) == sorted([*calls[3], *calls[4], *calls[5]]) == trained
    assert all(len({call[0] for call in part}) == 1 for part in calls), "three groups with a loss, one a minibatch"
    assert calls[:3] != calls[3:], "another epoch, another order"
    data.ledger.check("step")
    tokens = {t.call_id: len(t.sampled_ids) for t in data.transitions}
    for part, packed in zip(calls, data.updates, strict=True):
        own = {weight for row in packed.rows for weight in row.weights}
        of_group = sum(count for call, count in tokens.items() if call[0] == part[0][0])
        assert own in ({1 / of_group}, {1 / (of_group + 5)}), "group b teaches nothing, and counts in one of the means"
    assert all(row.old == [-0.5] * len(row.nodes) for packed in data.updates for row in packed.rows)
    assert all(row.old == [] for row in learn_from(recipe_of(), STEP, scores_of(STEP)).packed.rows)
    assert (needs(recipe_of()).scores, needs(recipe_of(epochs=2)).old) == (False, True)


def test_updates_are_taken_one_after_another_and_summed_up(recipe_of):
    recipe = recipe_of(minibatches=3, epochs=2)
    data = learn_from(recipe, STEP, scores_of(STEP))
    asked = []
    learner = SimpleNamespace(
        step=lambda shares, rate: (
            asked.append(shares)
            or {
                "tokens": 2.0,
                "loss": 3.0,
                "gradient_norm": len(asked),
                "critic_gradient_norm": 2 * len(asked),
            }
        )
    )
    assert update(recipe, learner, data, 0) == {
        "tokens": 12.0,
        "loss": 3.0,
        "gradient_norm": 3.5,
        "critic_gradient_norm": 7.0,
    }


def test_minibatches_without_a_loss_are_no_updates(recipe_of):
    recipe = recipe_of()
    data = learn_from(recipe, STEP)
    empty = structs.replace(data.packed, rows=[])
    padded = structs.replace(data, updates=[empty, data.packed, empty])
    learner = SimpleNamespace(step=lambda shares, rate: {"loss": 3.0})
    assert update(recipe, learner, padded, 0) == {"loss": 3.0}


KL = {"coefficient": 0.5, "estimator": "k1"}


def test_a_penalty_in_the_reward_goes_through_credit_and_baseline(recipe_of):
    objective = {"name": "rloo", "kl": KL | {"place": "reward"}}
    group = [rollout("a0", "a", 1.0, [(1, 2), (3,)]), rollout("a1", "a", 0.0, [(4,)])]
    data = learn_from(recipe_of(objective=objective), group, scores_of(group))
    # k1 = -0.5 + 0.75 = 0.25 a token; R = 1 - 3 * 0.125 and 0 - 0.125
    assert data.returns == pytest.approx({"a0": 0.625, "a1": -0.125})
    assert {t.call_id: t.advantage for t in data.transitions} == pytest.approx(
        {"a0c0": 0.75, "a0c1": 0.75, "a1c0": -0.75}
    )


def test_a_penalty_of_a_token_counts_for_the_tokens_up_to_it(recipe_of):
    objective = {"name": "rloo", "kl": KL | {"place": "token_reward"}}
    group = [rollout("a0", "a", 1.0, [(1, 2), (3,)]), rollout("a1", "a", 0.0, [(4,)])]
    data = learn_from(recipe_of(objective=objective), group, scores_of(group))
    tokens = {t.call_id: t.advantages for t in data.transitions}
    assert tokens["a0c0"] == pytest.approx([1 - 0.375, 1 - 0.25])
    assert tokens["a0c1"] == pytest.approx([1 - 0.125])
    assert tokens["a1c0"] == pytest.approx([-1 - 0.125])


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"credit": "token_gae"}, "token_gae reads a critic's values"),
        (
            {"objective": {"name": "grpo", "kl": KL | {"place": "reward"}}},
            "train.objective.kl, taken from rewards, reads",
        ),
    ],
)
def test_a_record_alone_has_no_scores(recipe_of, train, words):
    recipe = recipe_of(**train)
    with pytest.raises(RecipeError, match=words) as error:
        learn_from(recipe, STEP)
    assert "--train" in (error.value.hint or "")
    assert learn_from(recipe, [], None).transitions == []
    assert learn_from(recipe, STEP, scores_of(STEP, 0.5)).packed.rows


def test_a_long_call_is_punished(recipe_of):
    recipe = recipe_of(objective={"name": "rloo", "overlong": {"penalty": 1.0, "buffer": 1.0}})
    group = [rollout("a0", "a", 0.0, [(1,) * 256]), rollout("a1", "a", 0.0, [(2,) * 64])]
    assert learn_from(recipe, group).returns == {"a0": -1.0, "a1": -0.25}


def test_dynamic_sampling_leaves_groups_without_signal_out_of_the_means(recipe_of):
    fixed = {"name": "grpo", "aggregation": "token", "correction": {"kind": "none"}}
    kept = learn_from(recipe_of(objective=fixed), STEP)
    dropped = learn_from(recipe_of(objective=fixed | {"dynamic_sampling": 2}), STEP)
    assert groups_with_signal(recipe_of(), STEP) == {"a", "c", "d"}
    assert {t.episode_id for t in dropped.transitions if t.masked is Mask.NO_SIGNAL} == {"b0", "b1"}
    tokens = sum(len(t.sampled_ids) for t in kept.transitions)
    assert {w for row in kept.packed.rows for w in row.weights} == {1 / tokens}
    assert {w for row in dropped.packed.rows for w in row.weights} == {1 / (tokens - 5)}
    assert kept.ledger == dropped.ledger
    whitened = recipe_of(objective={"name": "reinforce++", "dynamic_sampling": 1})
    again = learn_from(whitened, STEP, scores_of(STEP))
    assert {t.episode_id for t in again.transitions if t.masked} == {"b0", "b1"}
    assert group_counts(again) == {"all": 4, "trained": 3, "no_signal": 1, "of_one": 0}


def play(recipe, tasks, teaches, stored, step=0):
    """What `play_step` asks for, as the names of its groups by round. `stored`: episode id -> episode, as a store keeps them."""
    asked = []

    def played(_title, starts, *, may_fail=False):
        assert may_fail is bool(asked)
        asked.append(list(dict.fromkeys(start.group for start in starts)))
        for start in starts:
            if start.id not in stored:
                value = float(start.sample % 2) if start.task.id in teaches else 0.0
                episode = rollout(start.id, start.group, value)
                stored[start.id] = structs.replace(episode, start=start)

    session = SimpleNamespace(recipe=recipe, play=played, episodes=lambda phase, step: list(stored.values()))
    episodes = play_step(session, tasks, step, 1)
    return asked, episodes


def test_a_step_goes_for_as_many_tasks_as_it_lacks_and_resumed_for_the_same(recipe_of):
    tasks = [Task(id=f"t{i}", input={}) for i in range(40)]
    objective = {"name": "grpo", "dynamic_sampling": 3}
    recipe = recipe_of(objective=objective, tasks_per_step=4, samples_per_task=2)
    order = [start.task.id for start in train_starts(recipe, tasks, 0, count=16)][::2]
    assert len(set(order)) == 16
    teaches = {order[0], order[2], order[5], order[9]}
    asked, episodes = play(recipe, tasks, teaches, {})
    named = [[group.removeprefix("0/") for group in groups] for groups in asked]
    assert named == [order[:4], order[4:6], order[8:9], order[12:13]], "as many as are lacking, of each round's own"
    assert len(groups_with_signal(recipe, episodes)) == 3

    cut = {e.id: e for e in episodes if e.start.group in (*asked[0], asked[1][0])}
    assert play(recipe, tasks, teaches, cut) == (asked, episodes)
    assert play(recipe, tasks, {*order}, {})[0] == asked[:1], "none is lacking"
    assert play(recipe_of(tasks_per_step=4, samples_per_task=2), tasks, set(), {})[0] == asked[:1], "never asked to"
    later = {start.task.id for start in train_starts(recipe, tasks, 1, count=16)}
    assert not later & set(order)


def test_a_rollout_of_nine_calls_moves_the_policy_as_often_as_one_of_a_single_call(recipe_of):
    group = [rollout("a0", "a", 1.0), rollout("a1", "a", 0.0, [(3, 4)] * 9)]
    for name in ("grpo", "gspo", "reinforce"):
        data = learn_from(recipe_of(objective=name), group)
        moved = {t.call_id: t.advantage for t in data.transitions}
        pulls = {"a0": 0.0, "a1": 0.0}
        for row in data.packed.rows:
            for number, weight in zip(row.sequences, row.weights, strict=True):
                pulls[row.calls[number][:2]] += weight * moved[row.calls[number]]
        assert pulls["a0"] == pytest.approx(-pulls["a1"]), name
    assert {round(advantage, 9) for advantage in moved.values()} == {0.5, -0.5}


def test_a_critic_learns_from_a_step_whose_returns_are_all_the_same(recipe_of):
    group = [rollout("a0", "a", -1.0), rollout("a1", "a", -1.0)]
    data = learn_from(recipe_of(objective="ppo"), group, scores_of(group))
    assert [t.masked for t in data.transitions] == [None, None]
    assert {target for row in data.packed.rows for target in row.value_targets} == {-1.0}
    assert {advantage for row in data.packed.rows for advantage in row.advantages} == {0.0}


def test_a_step_of_greedy_calls_has_no_values_and_teaches_nothing(recipe_of):
    group = [rollout("a0", "a", 1.0, temperature=0.0), rollout("a1", "a", 0.0, temperature=0.0)]
    for scores in (None, {}):
        data = learn_from(recipe_of(objective="ppo"), group, scores)
        assert {t.masked for t in data.transitions} == {Mask.GREEDY}


def test_a_rule_of_the_users_reads_the_critic_that_the_recipe_asks_for(recipe_of, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(group):\n    return {c.id: r.ret - r.values[c.id][0] for r in group for c in r.calls}\n"
    )
    asked = recipe_of(credit=f"{tmp_path}/mine.py:mine", critic={"hidden": 8})
    assert needs(asked).values
    assert needs(recipe_of(objective="ppo")).values
    assert not needs(recipe_of(credit=f"{tmp_path}/mine.py:mine")).values
    asked._source = tmp_path / "recipe.yaml"
    data = learn_from(asked, STEP, scores_of(STEP, 0.25))
    assert next(t.ret for t in data.transitions) == 0.75


def test_redacted_calls_are_not_scored(recipe_of):
    group = [rollout("a0", "a", 1.0, redacted=True), rollout("a1", "a", 0.0)]
    assert [call.id for call in calls_to_score(recipe_of(), group)] == ["a1c0"]


def test_staleness_is_measured_by_the_trainers_policy(recipe_of):
    recipe = recipe_of(max_staleness=1)
    group = [rollout("a0", "a", 1.0, versions=[3, 3]), rollout("a1", "a", 0.0, versions=[2, 3])]

    def stale(version):
        data = learn_from(recipe, group, version=version)
        return [t.episode_id for t in data.transitions if t.masked is Mask.STALE], doubts(recipe, data, is_first=False)

    assert [stale(version)[0] for version in (None, 3, 4, 5)] == [[], [], ["a1"], ["a0", "a1"]]
    (line,) = stale(5)[1]
    assert line == "nothing is trained: of the learner's 2 calls 2 are of policies older than train.max_staleness"


def test_a_step_that_is_restricted_throughout_is_said(recipe_of):
    recipe = recipe_of(restricted="mask")
    group = [rollout("a0", "a", 1.0, restricted=["grammar"]), rollout("a1", "a", 0.0, restricted=["grammar"])]
    (line,) = doubts(recipe, learn_from(recipe, group), is_first=False)
    assert line.startswith("nothing is trained: of the learner's 2 calls 2 were sampled under restrictions")


def test_an_agent_that_came_in_one_rollout_only_is_said(recipe_of):
    recipe = recipe_of(credit="per_agent")
    both = structs.replace(rollout("a0", "a", 1.0, [(1, 2), (3,)]))
    second = structs.replace(both.calls[1], agent="writer")
    both = structs.replace(both, calls=[both.calls[0], second])
    data = learn_from(recipe, [both, rollout("a1", "a", 0.0)])
    assert [t.masked for t in data.transitions] == [None, Mask.GROUP_OF_ONE, None]
    (line,) = doubts(recipe, data, is_first=False)
    assert line.startswith("1 of writer: calls that no other rollout of the group can be compared with")
    assert group_counts(data)["of_one"] == 0


def test_a_group_of_one_and_a_restricted_call_are_said(recipe_of):
    group = [rollout("a0", "a", 1.0), rollout("b0", "b", 1.0), rollout("b1", "b", 0.0, restricted=["top_p", "grammar"])]
    data = learn_from(recipe_of(), group)
    assert group_counts(data) == {"all": 2, "trained": 1, "no_signal": 0, "of_one": 1}
    lonely, restricted = doubts(recipe_of(), data, is_first=True)
    assert lonely == "1 of 2 groups have one rollout that counts, which cannot be compared and is not trained on: a"
    assert restricted.startswith("1 of 2 calls that are trained on were sampled under restrictions (grammar, top_p)")
    assert doubts(recipe_of(), data, is_first=False) == [lonely]
    masked = recipe_of(restricted="mask")
    assert len(doubts(masked, learn_from(masked, group), is_first=True)) == 1


def test_a_missing_reward_weight_is_still_said(recipe_of):
    odd = structs.replace(STEP[0], rewards=[Reward(episode_id="a0", name="other", value=1.0)])
    with pytest.raises(RecipeError, match="other"):
        learn_from(recipe_of(), [odd, *STEP[1:]])


def test_tasks_come_in_shuffled_epochs_and_an_epoch_is_shuffled_once(monkeypatch):
    tasks = [Task(id=f"t{i}", input={}) for i in range(5)]
    single = [tasks_from(tasks, position, 1, seed=3)[0] for position in range(20)]
    for epoch in range(4):
        assert {task.id for task in single[5 * epoch : 5 * epoch + 5]} == {task.id for task in tasks}
    assert single[:5] != single[5:10]
    made = []
    monkeypatch.setattr(
        "trainers.rollouts.random.Random", lambda seed, new=random.Random: made.append(seed) or new(seed)
    )
    assert tasks_from(tasks, 3, 14, seed=3) == single[3:17]
    assert made == ["3-0", "3-1", "3-2", "3-3"]
