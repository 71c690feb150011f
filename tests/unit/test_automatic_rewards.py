"""Automatic rewards: what each rule pays for, and where it puts it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.automatic_rewards import (
    NAMES,
    AutomaticRules,
    Excess,
    automatic_rewards,
    offered_tools,
    require_free_names,
)
from lightning_rl.episode import Reward
from lightning_rl.errors import RecipeError, RewardError
from lightning_rl.recipe import AutomaticRewards, load_recipe
from tests.unit.domain import credits_of, make_call, make_episode
from tests.unit.test_tool_uses import asking, servers, tool_span, with_spans

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
DIALECTS = {
    "chat": {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    "responses": {"type": "function", "name": "add", "parameters": SCHEMA},
    "messages": {"name": "add", "input_schema": SCHEMA},
}
SLOW, SLOW_TEXT = "^(?:(?:a|aa)+)+$", "a" * 60 + "!"
SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def given_at(rewards: list[Any]) -> list[tuple[str, str | None, float]]:
    return [(reward.name, reward.call_id or reward.span_id, reward.value) for reward in rewards]


def test_the_recipe_and_the_rules_have_the_same_names():
    assert tuple(AutomaticRewards.model_fields) == NAMES
    recipe = load_recipe(SMOKE, ["reward.automatic={tool_error: -1, tokens: {limit: 5, value: -0.01}}"])
    assert recipe.reward.automatic.rules() == AutomaticRules(tool_error=-1.0, tokens=Excess(limit=5, value=-0.01))
    assert recipe.reward.automatic.rules().given == ["tool_error", "tokens"]


def test_tools_that_failed_and_that_did_not_are_paid_for_at_the_call_that_asked_else_at_the_span():
    episode = with_spans(
        servers("t1", "add", {}, "Error: no", "c0"),
        tool_span("x", "add", 0.6, tool_call_id="t2", result="3"),
        tool_span("alone", "lookup", 0.7, error="Traceback"),
        calls=[asking("c0", ("t1", "add", {}), ("t2", "add", {}), ("never", "add", {}))],
    )
    rewards = automatic_rewards(episode, AutomaticRules(tool_error=-1.0, tool_success=0.5))
    assert given_at(rewards) == [("tool_error", "c0", -1.0), ("tool_success", "c0", 0.5), ("tool_error", "alone", -1.0)]
    assert [reward.span_id for reward in rewards] == [None, None, "alone"]
    assert given_at(automatic_rewards(episode, AutomaticRules(tool_success=0.5))) == [("tool_success", "c0", 0.5)]


@pytest.mark.parametrize("tool", DIALECTS.values(), ids=DIALECTS)
def test_arguments_are_checked_by_the_schema_of_the_request_in_every_dialect(tool: dict[str, Any]):
    asked = [("1", "add", {"a": 1}), ("2", "add", {"a": "1"}), ("3", "add", "{broken"), ("4", "multiply", {"a": 1}),
             ("5", "add", {"a": 1, "b": 2}), ("6", "add", '{"a": NaN}')]  # fmt: skip
    calls = [asking(f"c{id}", (id, name, args), index=int(id), request={"tools": [tool]}) for id, name, args in asked]
    rewards = automatic_rewards(make_episode("e", calls), AutomaticRules(valid_arguments=1.0, invalid_arguments=-1.0))
    assert {reward.call_id: reward.value for reward in rewards} == {
        "c1": 1.0, "c2": -1.0, "c3": -1.0, "c4": -1.0, "c5": -1.0, "c6": -1.0,
    }  # fmt: skip
    assert offered_tools({"tools": [tool]}) == {"add": SCHEMA}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/gone"},
        {"properties": {"a": {"pattern": "("}}},
        {"$schema": 5},
        {"$schema": ["x"]},
        "x",
        [1],
    ],
)
def test_a_schema_that_cannot_be_used_is_an_error_that_names_the_tool(schema: Any):
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    episode = make_episode("e", [asking("c", ("t", "add", {"a": "x"}), request={"tools": [tool]})])
    with pytest.raises(RewardError, match="the tool 'add' cannot be checked"):
        automatic_rewards(episode, AutomaticRules(valid_arguments=1.0))


def test_whatever_else_a_request_offers_is_passed_over_and_nothing_written_is_no_arguments():
    offered = {"tools": ["web_search", {"type": "mcp"}, {"name": 5}, {"function": "x"}], "functions": [{"name": "now"}]}
    assert offered_tools(offered) == {"now": {}}
    assert offered_tools({"tools": "all"}) == {}
    needed = {"tools": [{"name": "now", "input_schema": {"type": "object", "required": ["zone"]}}]}
    calls = [asking(f"c{i}", (f"t{i}", "now", ""), index=i, request=it) for i, it in enumerate([offered, needed])]
    rewards = automatic_rewards(make_episode("e", calls), AutomaticRules(valid_arguments=1.0, invalid_arguments=-1.0))
    assert given_at(rewards) == [("valid_arguments", "c0", 1.0), ("invalid_arguments", "c1", -1.0)]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {SLOW_TEXT: {"pattern": SLOW}}},
        {"patternProperties": {SLOW: {}}},
        {"patternProperties": {SLOW: {}}, "additionalProperties": False},
        {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {SLOW_TEXT: {"pattern": SLOW}},
         "allOf": [{"$ref": "#/definitions/it"}], "definitions": {"it": {"patternProperties": {SLOW: {}}}}},
    ],
)  # fmt: skip
def test_a_pattern_that_takes_too_long_gives_neither_reward(schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning_rl.automatic_rewards.PATTERN_SECONDS", 0.05)
    tool = {"name": "add", "input_schema": schema}
    calls = [
        asking("slow", ("1", "add", {SLOW_TEXT: SLOW_TEXT}), request={"tools": [tool]}),
        asking("fast", ("2", "add", {"aa": "aa"}), index=1, request={"tools": [tool]}),
    ]
    rewards = automatic_rewards(make_episode("e", calls), AutomaticRules(valid_arguments=1.0, invalid_arguments=-1.0))
    assert given_at(rewards) == [("valid_arguments", "fast", 1.0)]


def test_patterns_in_bounded_time_say_what_jsonschema_says():
    import jsonschema

    schema = {
        "properties": {"a": {"pattern": "^x"}}, "patternProperties": {"^n_": {"type": "integer"}},
        "additionalProperties": {"type": "string", "pattern": "y$"},
    }  # fmt: skip
    for arguments in ({"a": "x"}, {"a": "y"}, {"n_1": 1}, {"n_1": "1"}, {"b": "y"}, {"b": "x"}, {"b": 1}, {"a": 1}, {}):
        fits = jsonschema.Draft202012Validator(schema).is_valid(arguments)
        request = {"tools": [{"name": "add", "parameters": schema}]}
        episode = make_episode("e", [asking("c", ("t", "add", arguments), request=request)])
        (reward,) = automatic_rewards(episode, AutomaticRules(valid_arguments=1.0, invalid_arguments=-1.0))
        assert (reward.name == "valid_arguments") == fits, arguments


def test_choices_of_one_request_are_one_turn():
    calls = [make_call([1], [2], id=f"c{i}", index=i, response_id=f"r{i // 3}") for i in range(9)]
    rewards = automatic_rewards(make_episode("e", calls), AutomaticRules(turns=Excess(limit=1, value=-1.0)))
    assert [reward.call_id for reward in rewards] == ["c3", "c6"]


def test_a_repeated_call_is_one_with_equal_arguments_however_they_are_written():
    calls = [
        asking("c0", ("1", "add", '{"a": 1, "b": 2}'), ("2", "add", '{"b":2.0,"a":1}')),
        asking("c1", ("3", "add", {"a": 1}), ("4", "sub", {"a": 1, "b": 2}), index=1),
        asking("c2", ("5", "add", {"b": 2, "a": 1}), index=2),
    ]
    rewards = automatic_rewards(make_episode("e", calls), AutomaticRules(repeated_call=-0.5))
    assert given_at(rewards) == [("repeated_call", "c0", -0.5), ("repeated_call", "c2", -0.5)]


def test_what_others_answered_earns_nothing():
    calls = [asking(f"c{i}", (f"t{i}", "add", {}), index=i, **who) for i, who in enumerate(
        [{"upstream": "openai"}, {"model": "critic"}, {}, {}]
    )]  # fmt: skip
    spans = [servers(f"t{i}", "add", {}, "3", f"c{i}") for i in range(4)]
    rules = AutomaticRules(
        tool_success=1.0, invalid_arguments=-1.0, repeated_call=-1.0, turns=Excess(limit=1, value=-2.0),
        tokens=Excess(limit=1, value=-3.0),
    )  # fmt: skip
    rewards = automatic_rewards(with_spans(*spans, calls=calls), rules, adapters=["critic"])
    assert sorted(given_at(rewards)) == [
        ("invalid_arguments", "c2", -1.0),
        ("invalid_arguments", "c3", -1.0),
        ("repeated_call", "c3", -1.0),
        ("tokens", "c3", -3.0),
        ("tool_success", "c2", 1.0),
        ("tool_success", "c3", 1.0),
        ("turns", "c3", -2.0),
    ]


@given(
    st.lists(st.integers(0, 20), max_size=6), st.integers(0, 6), st.integers(0, 60), st.randoms(use_true_random=False)
)
def test_turns_and_tokens_are_paid_for_beyond_their_limits_and_only_there(
    lengths: list[int], turns: int, tokens: int, rng: random.Random
):
    calls = [make_call([1], [2] * length, id=f"c{i}", index=i) for i, length in enumerate(lengths)]
    rules = AutomaticRules(turns=Excess(limit=turns, value=-1.0), tokens=Excess(limit=tokens, value=-1.0))
    rewards = automatic_rewards(make_episode("e", calls), rules)
    assert [r.call_id for r in rewards if r.name == "turns"] == [f"c{i}" for i in range(turns, len(lengths))]
    surplus = {r.call_id: -r.value for r in rewards if r.name == "tokens"}
    for i in range(len(lengths)):
        assert sum(surplus.get(f"c{j}", 0) for j in range(i + 1)) == max(0, sum(lengths[: i + 1]) - tokens)
    shuffled = rng.sample(calls, len(calls))
    assert automatic_rewards(make_episode("e", shuffled), rules) == rewards


def test_the_names_are_reserved():
    require_free_names([Reward(episode_id="e", name="turns", value=1.0, source="automatic")])
    with pytest.raises(RewardError, match="named turns, a name that is reserved"):
        require_free_names([Reward(episode_id="e", name="turns", value=1.0)])


def test_automatic_rewards_need_no_weight_and_may_have_one():
    episode = make_episode("e", [make_call([1], [2])], {"correct": 1.0, "tool_error": -1.0})
    assert credits_of([episode], weights={"correct": 1.0}).returns == {"c": 0.0}
    assert credits_of([episode], weights={"correct": 1.0, "tool_error": 0.5}).returns == {"c": 0.5}
    misspelt = structs.replace(episode, rewards=[structs.replace(episode.rewards[0], name="corect")])
    with pytest.raises(RecipeError, match="corect"):
        credits_of([misspelt], weights={"correct": 1.0})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reward.weights={vowels: 1.0, tool_error: 2.0}", "weights.tool_error: reward.automatic does not give it"),
        (
            "reward={automatic: {tool_error: -1.0}, weights: {vowels: 1.0, tool_eror: 2.0}}",
            "misspelling of 'tool_error'",
        ),
        ("reward.weights={vowels: 1.0, '': 2.0}", "name must not be empty"),
        ("evaluate.success=tool_success", "reward.automatic does not give tool_success"),
        ("reward.automatic={tool_errors: 1.0}", "did you mean 'tool_error'"),
        ("reward.automatic={turns: -1.0}", "turns"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_automatic_rewards(override: str, words: str):
    with pytest.raises(RecipeError, match=words):
        load_recipe(SMOKE, [override])
