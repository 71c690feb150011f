"""Scenarios are what the table of docs/bench.md says, are the same for everybody, and survive the wire."""

from __future__ import annotations

import msgspec
import pytest

from rollout_server.bench.scenarios import ROUNDS, SCENARIOS, Conversation, Room, Scenario

FULL = Room(first_id=256, vocab=49152, max_positions=8192, kv_tokens=65536, quick=False)
QUICK = FULL._replace(quick=True)
SMALL = Room(first_id=256, vocab=8000, max_positions=512, kv_tokens=2048, quick=True)


def _prompts(scenario: Scenario) -> list[list[int]]:
    return [talk.turns[0].append for talk in scenario.conversations]


def _tokens(talk: Conversation) -> int:
    return sum(len(turn.append) + turn.max_tokens for turn in talk.turns)


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("room", [FULL, QUICK, SMALL])
def test_the_seed_determines_everything(name: str, room: Room) -> None:
    assert SCENARIOS[name](room, 3) == SCENARIOS[name](room, 3)
    assert SCENARIOS[name](room, 3) != SCENARIOS[name](room, 4)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("room", [FULL, QUICK, SMALL])
def test_ids_lie_in_the_vocabulary_and_contexts_fit_the_model(name: str, room: Room) -> None:
    for scenario in SCENARIOS[name](room, 0):
        ids = {i for talk in scenario.conversations for turn in talk.turns for i in turn.append}
        assert room.first_id <= min(ids) <= max(ids) < room.vocab
        assert scenario.max_context <= room.max_positions
        assert 1 <= scenario.concurrency <= len(scenario.conversations)
        assert all(turn.append and turn.max_tokens >= 2 for talk in scenario.conversations for turn in talk.turns)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("room", [FULL, QUICK, SMALL])
def test_rounds_and_levels_share_no_prefix(name: str, room: Room) -> None:
    """So that the unique tokens of a round are what an engine that ran the rounds before must compute."""
    seen: set[int] = set()
    for seed in range(-1, ROUNDS - 1):
        for scenario in SCENARIOS[name](room, seed):
            first = {prompt[0] for prompt in _prompts(scenario)}
            assert not first & seen
            seen |= first
    assert len({tuple(prompt) for prompt in _prompts(SCENARIOS["single"](room, 0)[2])}) == 64


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_survives_the_wire(name: str) -> None:
    for scenario in SCENARIOS[name](QUICK, 0):
        assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario


def test_single() -> None:
    levels = SCENARIOS["single"](FULL, 0)
    assert [s.concurrency for s in levels] == [1, 16, 64] == [len(s.conversations) for s in levels]
    for scenario in levels:
        assert {(len(t.turns), len(t.turns[0].append), t.turns[0].max_tokens) for t in scenario.conversations} == {
            (1, 128, 128)
        }
    assert len({tuple(prompt) for prompt in _prompts(levels[2])}) == 64


def test_group() -> None:
    (scenario,) = SCENARIOS["group"](FULL, 0)
    prompts = _prompts(scenario)
    assert (len(prompts), scenario.max_sequences) == (16, 256)
    assert {(talk.turns[0].n, talk.turns[0].max_tokens) for talk in scenario.conversations} == {(16, 64)}
    assert {len(prompt) for prompt in prompts} == {552}
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert max(_common(prompts[0], other) for other in prompts[1:]) < 516


def test_agents() -> None:
    (scenario,) = SCENARIOS["agents"](FULL, 0)
    assert (scenario.concurrency, len(scenario.conversations)) == (64, 64)
    assert len({tuple(prompt[:128]) for prompt in _prompts(scenario)}) == 1
    for talk in scenario.conversations:
        assert [len(turn.append) for turn in talk.turns] == [192, 60, 60, 60, 60, 60]
        assert [turn.pause_s for turn in talk.turns] == [0.0, 0.3, 0.3, 0.3, 0.3, 0.3]
        assert {turn.max_tokens for turn in talk.turns} == {48}


@pytest.mark.parametrize("room", [FULL, QUICK, SMALL])
def test_long_conversations_pass_the_cache(room: Room) -> None:
    (scenario,) = SCENARIOS["long"](room, 0)
    total = sum(_tokens(talk) for talk in scenario.conversations)
    assert scenario.concurrency == len(scenario.conversations)
    assert 1.2 * room.kv_tokens < total < 1.6 * room.kv_tokens + room.max_positions
    assert all(_tokens(talk) < room.kv_tokens for talk in scenario.conversations)


def test_long_reaches_4k() -> None:
    assert SCENARIOS["long"](FULL, 0)[0].max_context == 4096


def test_rag_shares_some_documents() -> None:
    (scenario,) = SCENARIOS["rag"](FULL, 0)
    prompts = _prompts(scenario)
    shared = [max(_common(prompt, other) for other in prompts if other is not prompt) for prompt in prompts]
    assert sum(length >= 64 + 200 for length in shared) > 40  # most documents are asked about twice
    assert min(len(prompt) for prompt in prompts) < 1000 < 2500 < max(len(prompt) for prompt in prompts)


def test_adapters_are_spread() -> None:
    (scenario,) = SCENARIOS["adapters"](FULL, 0)
    assert (len(scenario.conversations), scenario.concurrency) == (128, 64)
    assert 28 <= len(scenario.adapters) <= 32
    assert SCENARIOS["single"](FULL, 0)[0].adapters == []
