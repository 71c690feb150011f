"""Which agent learns: callers by their spans, masks of the others' calls, and a ledger that balances for any mix."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.agents import Caller, callers, fits
from lightning_rl.algorithms.aggregation import kept_tokens, token_weights
from lightning_rl.episode import Reward, Span
from lightning_rl.errors import RecipeError
from lightning_rl.ledger import account
from lightning_rl.transition import Mask, call_masks
from rollout_server.api.model_names import AgentRoute
from rollout_server.api.upstreams.provider import Provider
from tests.unit.domain import make_call, make_episode, make_recipe, transitions_of
from trainers import loop
from trainers.checkpoint import TrainState
from trainers.doubts import doubts
from trainers.learning import learn_from
from trainers.loop import update
from trainers.packing import pack
from trainers.publish import Gap
from trainers.serving import answering, redactor


def span(id, kind, name, parent=None):
    return Span(id=id, episode_id="e", name=name, kind=kind, parent_id=parent)


TEAM = [
    span("team", "agent", "team"),
    span("graph", "chain", "review", "team"),
    span("writer", "agent", "writer", "graph"),
    span("node", "chain", "draft", "writer"),
    span("look_up", "tool", "look_up", "node"),
]


def test_the_caller_is_the_innermost_agent_and_all_around_it_are_nodes():
    calls = [
        make_call([1], [2], id="deep", span_id="look_up", request={"model": "gpt-x"}),
        make_call([1], [2], id="outer", span_id="graph"),
        make_call([1], [2], id="stranger", span_id="lost"),
        make_call([1], [2], id="nobody"),
        make_call([1], [2], id="says", agent="planner"),
    ]
    found = callers(structs.replace(make_episode("e", calls), spans=TEAM))
    assert found["deep"] == Caller(agent="writer", nodes=("draft", "writer", "review", "team"), model="gpt-x")
    assert found["outer"] == Caller(agent="team", nodes=("review", "team"), model="")
    root = Caller(agent="team", nodes=("team",), model="")
    assert (found["stranger"], found["nobody"]) == (root, root), "of a thread, another process, a plain client"
    assert found["says"] == structs.replace(root, agent="planner")
    assert callers(make_episode("e", calls))["nobody"] == Caller(agent=None, nodes=(), model="")


@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("abcde"), min_size=1), st.sampled_from("abcde"))
def test_spans_in_a_circle_or_without_parents_end_the_search(parents, begin):
    spans = [span(id, "agent", id, parent) for id, parent in parents.items()]
    episode = structs.replace(make_episode("e", [make_call([1], [2], span_id=begin)]), spans=spans)
    caller = callers(episode)["c"]
    assert len(caller.nodes) == len(set(caller.nodes))
    roots = [id for id, parent in parents.items() if parent not in parents]
    assert caller.agent == (begin if begin in parents else min(roots, default=None))


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["writer"], True),
        (["rev*"], True),
        (["gpt-?"], True),
        (["Writer", "editor"], False),
        (["*"], True),
        ([], False),
    ],
)
def test_globs_are_held_against_every_name(globs, expected):
    assert fits(globs, Caller(agent="writer", nodes=("writer", "review"), model="gpt-4")) is expected


def test_a_caller_without_a_name_fits_by_its_model_or_the_glob_of_all():
    nameless = Caller(agent=None, nodes=(), model="gpt-4")
    assert [fits([glob], nameless) for glob in ("*", "gpt-*", "writer", "?riter")] == [True, True, False, False]
    assert fits(["*"], Caller(agent=None))


KINDS = ("learns", "other", "upstream", "adapter", "redacted", "greedy", "aborted")
EXPECTED = {
    "other": Mask.NOT_LEARNING,
    "upstream": Mask.OTHER_MODEL,
    "adapter": Mask.OTHER_MODEL,
    "redacted": Mask.REDACTED,
    "greedy": Mask.GREEDY,
    "aborted": Mask.ABORTED,
}
FIELDS = {
    "upstream": {"upstream": "openai"},
    "adapter": {"model": "math"},
    "redacted": {"redacted": True},
    "greedy": {"temperature": 0.0},
    "aborted": {"finish_reason": "abort"},
}
LEARNING = {"learns": ["writer"], "adapters": ["math"]}


def call_of(kind, id, episode_id, prompt=(7,), sampled=(1, 2)):
    ids = ([], []) if kind == "upstream" else (prompt, sampled)
    maker = "planner" if kind == "other" else "writer"
    return make_call(*ids, id=id, episode_id=episode_id, span_id=f"{episode_id}-{maker}", **FIELDS.get(kind, {}))


def rollout_of(name, kinds, sampled=lambda c: (1, 2)):
    calls = [call_of(kind, f"{name}c{c}", name, sampled=sampled(c)) for c, kind in enumerate(kinds)]
    spans = [Span(id=f"{name}-{who}", episode_id=name, name=who, kind="agent") for who in ("writer", "planner")]
    episode = make_episode(name, calls)
    return structs.replace(episode, spans=spans, start=structs.replace(episode.start, group="g"))


def test_each_reason_masks_its_calls():
    episode = rollout_of("e", KINDS)
    kind_of = {f"ec{c}": kind for c, kind in enumerate(KINDS)}
    masks = call_masks(episode, **LEARNING)
    assert masks == {id: EXPECTED[kind] for id, kind in kind_of.items() if kind != "learns"}


rollouts = st.lists(st.tuples(st.lists(st.sampled_from(KINDS), max_size=4), st.floats(-3, 3)), min_size=1, max_size=5)


@given(rollouts, st.sampled_from(["std", "none"]))
def test_the_learner_is_judged_as_if_nobody_else_had_been_recorded(group, normalise):
    mixed = [rollout_of(f"r{r}", kinds) for r, (kinds, _) in enumerate(group)]
    alone = [
        structs.replace(
            episode, calls=[c for c, kind in zip(episode.calls, kinds, strict=True) if kind not in KINDS[1:4]]
        )
        for episode, (kinds, _) in zip(mixed, group, strict=True)
    ]
    returns = {call.id: value for episode, (_, value) in zip(mixed, group, strict=True) for call in episode.calls}
    made = {t.call_id: t for t in transitions_of(mixed, returns, normalise, **LEARNING)}
    for expected in transitions_of(alone, returns, normalise, **LEARNING):
        transition = made.pop(expected.call_id)
        assert (transition.advantage, transition.masked) == (expected.advantage, expected.masked)
    assert all(t.masked in (Mask.OTHER_MODEL, Mask.NOT_LEARNING) for t in made.values())


sampled = st.lists(st.integers(0, 1), max_size=4)
mixes = st.lists(
    st.lists(st.lists(st.tuples(st.sampled_from(KINDS), sampled), max_size=4), min_size=1, max_size=4), max_size=3
)


@given(mixes, st.integers(2, 8))
def test_the_ledger_balances_for_any_mix(groups, max_tokens):
    episodes, transitions = [], []
    for g, group in enumerate(groups):
        made = [
            rollout_of(f"g{g}r{r}", [kind for kind, _ in calls], lambda c, calls=calls: calls[c][1])
            for r, calls in enumerate(group)
        ]
        returns = {call.id: float(r % 2) for r, episode in enumerate(made) for call in episode.calls}
        transitions += transitions_of(made, returns, "std", **LEARNING)
        episodes += made
    weights = token_weights(transitions, "token", kept_tokens(transitions, max_tokens))
    calls = {call.id: call for episode in episodes for call in episode.calls}
    packed = pack(transitions, {e.id: e.start.group for e in episodes}, weights, calls, max_tokens)
    ledger = account(episodes, transitions, packed.trees)
    ledger.check("a mix")
    assert ledger.sampled == sum(len(call.sampled_ids) for call in calls.values())
    for agent, own in (("planner", ["other"]), ("writer", [kind for kind in KINDS if kind != "other"])):
        wanted = sum(
            len(ids) for group in groups for made in group for kind, ids in made if kind in own and kind != "upstream"
        )
        assert ledger.by_agent.get(agent, {}).get("sampled", 0) == wanted
    masked = ledger.by_agent.get("planner", {}).get("masked/not_learning", 0)
    assert masked == ledger.masked.get("not_learning", 0)
    assert all(calls[id].sampled_ids for tree in packed.trees for id in tree.last_nodes if tree.sampled_counts[id])
    for reason in ("not_learning", "redacted"):
        kinds = [k for k, mask in EXPECTED.items() if mask == reason]
        wanted = sum(len(ids) for group in groups for calls in group for kind, ids in calls if kind in kinds)
        assert ledger.masked.get(reason, 0) == wanted


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return lambda **sections: make_recipe(folder, **sections)


def test_a_step_in_which_nobody_learns_says_which_names_there_are(recipe_of):
    group = [rollout_of(f"r{r}", ["other", "learns", "upstream"]) for r in range(2)]
    recipe = recipe_of(agent={"learns": ["writr"]})
    nothing = learn_from(recipe, group)
    with pytest.raises(RecipeError, match=r"agent\.learns: no call of the policy fits writr; .* planner, writer"):
        doubts(recipe, nothing, is_first=True)
    (line,) = doubts(recipe, nothing, is_first=False)
    assert line.startswith("nothing is trained: agent.learns: no call of the policy fits writr")
    assert update(recipe, None, nothing, 3) == {}, "the learner is not asked for a step"
    nothing.ledger.check("the step")
    data = learn_from(recipe_of(agent={"learns": ["writer"]}), group)
    data.ledger.check("the step")
    assert data.ledger.masked == {"no_signal": 4, "not_learning": 4}


def test_routes_of_a_recipe_lead_somewhere(recipe_of, tmp_path):
    upstreams = {"openai": {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"}}
    recipe = recipe_of(
        agent={"routes": [{"match": "plan*", "to": "openai"}, {"match": "*", "to": "policy"}]}, upstreams=upstreams
    )
    assert [route.to for route in recipe.agent.routes] == ["openai", "policy"]
    with pytest.raises(ValueError, match=r"agent\.routes\.0\.to: 'opnai' is neither .*did you mean 'openai'"):
        recipe_of(agent={"routes": [{"match": "*", "to": "opnai"}]}, upstreams=upstreams)
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="'openai' names two of"):
        recipe_of(model={"adapters": {"openai": str(tmp_path)}}, upstreams=upstreams)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        recipe_of(model={"adapters": {"math": str(tmp_path.parent)}})
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        recipe_of(recording={"redact": ["("]})


def test_a_run_takes_the_keys_of_the_upstreams_it_uses_from_its_environment(recipe_of):
    upstreams = {
        name: {"base_url": "https://api.example.org/v1", "api_key_env": f"{name.upper()}_KEY", "model": "big"}
        for name in ("used", "unused")
    }
    recipe = recipe_of(agent={"routes": [{"match": "plan*", "to": "used"}]}, upstreams=upstreams)
    with pytest.raises(RecipeError, match=r"upstreams\.used: the environment variable USED_KEY is not set"):
        answering(recipe, {})
    environment = {"USED_KEY": "a-key-of-somebody", "OTHER_API_KEY": "another-key-of-somebody"}
    given = answering(recipe, environment)
    assert given["upstreams"] == {
        "used": Provider(base_url="https://api.example.org/v1", api_key="a-key-of-somebody", model="big")
    }
    assert given["routes"] == [AgentRoute(match="plan*", to="used")]
    told = redactor(recipe, environment).text("a-key-of-somebody, another-key-of-somebody")
    assert told == "[redacted], [redacted]"
    assert "a-key-of-somebody" not in recipe.to_yaml()


def test_the_keys_of_store_and_collector_are_stored_by_neither_server_nor_runners(recipe_of):
    recipe = recipe_of(
        tracking={"otlp": {"endpoint": "http://127.0.0.1:4318", "headers_env": "COLLECTOR"}},
        recording={"store": "postgresql://me:${PASS}@host/db"},
    )
    environment = {"COLLECTOR": "x-team=the-key-of-a-collector", "PASS": "passw0rd"}
    assert "the-key-of-a-collector" in answering(recipe, environment)["known_keys"]
    told = redactor(recipe, environment).text("the-key-of-a-collector, passw0rd")
    assert told == "[redacted], [redacted]"


def test_a_weight_that_meets_no_reward_is_said_after_the_first_step(recipe_of):
    group = [
        structs.replace(one, rewards=[Reward(episode_id=one.id, name="good", value=1.0)])
        for one in (rollout_of(f"r{r}", ["learns"]) for r in range(2))
    ]
    recipe = recipe_of(reward={"weights": {"good": 1.0, "brief": 0.0}})
    assert doubts(recipe, learn_from(recipe, group), is_first=True) == []
    recipe = recipe_of(reward={"weights": {"good": 1.0, "brief": 0.0, "godo": 1.0}})
    (line,) = doubts(recipe, learn_from(recipe, group), is_first=True)
    assert line == "reward.weights: no episode of this step has a reward named godo"
    assert doubts(recipe, learn_from(recipe, group), is_first=False) == []


def paid(episode, value):
    return structs.replace(episode, rewards=[Reward(episode_id=episode.id, name="good", value=value)])


def test_a_later_step_in_which_nobody_learns_changes_no_weights_and_the_run_goes_on(recipe_of, monkeypatch):
    recipe = recipe_of(agent={"learns": ["writer"]}, train={"steps": 3})
    came = [["learns"], ["other"], ["learns"]]
    asked, said, saved = [], [], []
    learner = SimpleNamespace(
        step=lambda shares, rate: asked.append(rate) or {}, save=lambda folder, state, keep: saved.append(state)
    )
    session = SimpleNamespace(
        recipe=recipe, seconds={}, store=SimpleNamespace(starts=lambda phase: []), run=SimpleNamespace(checkpoints=None),
        console=SimpleNamespace(status=said.append, say=said.append, stage=nullcontext), timed=nullcontext,
        play=lambda title, starts: None,
        episodes=lambda phase, step: [paid(rollout_of(f"{step}-{r}", came[step]), float(r)) for r in range(2)],
    )  # fmt: skip
    monkeypatch.setattr(loop, "publish_policy", lambda *_: Gap(mean=0.0, largest=0.0, tokens=1))
    monkeypatch.setattr(loop, "train_starts", lambda *_: [])
    start = TrainState(step=0, version=1, world_size=1)
    state = loop.train(session, learner, {"train": []}, [], start)
    assert (len(asked), state.step, state.version) == (2, 3, 4)
    assert [row["policy_version"] for row in state.history] == [2, 3, 4] == [one.version for one in saved]
    assert sum("nothing is trained: agent.learns" in line for line in said) == 1
    loop.total_ledger(state.history).check("the run")
    assert loop.train(session, learner, {"train": []}, [], saved[0]).version == 4, "resumed, it goes on, too"
