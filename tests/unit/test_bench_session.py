"""The loop that plays a scenario: prompts, pauses, concurrency and what is done with a short answer."""

from __future__ import annotations

import asyncio

import pytest

from rollout_server.bench.scenarios import Conversation, Scenario, Turn
from rollout_server.bench.session import Ask, Deliver, WrongAnswer, play
from rollout_server.bench.transcript import requests


class Simulated:
    """Answers 100, 101, … one at a time, choices in turn; remembers what it was asked."""

    def __init__(self, missing: int = 0, logprobs: bool = True) -> None:
        self.asked: list[Ask] = []
        self.running = self.most = self.prefilled = 0
        self._missing, self._logprobs = missing, logprobs

    async def prepare(self, scenario: Scenario) -> None:
        raise AssertionError("the driver prepares, before time is taken")

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        self.asked.append(ask)
        self.prefilled += len(ask.prompt)
        self.running += 1
        self.most = max(self.most, self.running)
        for step in range(ask.max_tokens - self._missing):
            await asyncio.sleep(0.001)
            for index in range(ask.n):
                deliver(index, [100 + step + 10 * index], [-1.0] if self._logprobs else [])
        self.running -= 1

    async def prefill_tokens(self) -> int | None:
        return self.prefilled


def _scenario(concurrency: int, *talks: list[Turn]) -> Scenario:
    return Scenario(
        name="t", concurrency=concurrency, seed=1, conversations=[Conversation(turns=turns) for turns in talks]
    )


def test_a_turn_continues_with_choice_0() -> None:
    engine = Simulated()
    scenario = _scenario(1, [Turn(append=[1, 2], max_tokens=2, n=2), Turn(append=[3], max_tokens=1, adapter="a")])
    transcript = asyncio.run(play(scenario, engine))
    assert [(ask.prompt, ask.n, ask.adapter) for ask in engine.asked] == [
        ([1, 2], 2, ""),
        ([1, 2, 100, 101, 3], 1, "a"),
    ]
    assert [choice.ids for choice in transcript.exchanges[0].choices] == [[100, 101], [110, 111]]
    assert [request.prompt for request in requests(scenario, transcript)] == [ask.prompt for ask in engine.asked]
    assert (transcript.sampled_tokens, transcript.prefill_tokens) == (5, 7)
    assert engine.asked[0].seed != engine.asked[1].seed


def test_a_pause_starts_when_the_answer_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sleep, pauses = Simulated(), asyncio.sleep, []

    async def pausing(seconds: float) -> None:
        if seconds == 0.1:
            pauses.append((len(engine.asked), engine.running))
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", pausing)
    scenario = _scenario(1, [Turn(append=[1], max_tokens=3), Turn(append=[2], max_tokens=1, pause_s=0.1)])
    first, second = asyncio.run(play(scenario, engine)).exchanges
    assert pauses == [(1, 0)]
    assert second.submitted - first.ended > 0.099


def test_no_more_conversations_are_open_than_allowed() -> None:
    engine = Simulated()
    talks = [[Turn(append=[number], max_tokens=3)] for number in range(10)]
    transcript = asyncio.run(play(_scenario(4, *talks), engine))
    assert engine.most == 4
    assert sorted(ask.prompt[0] for ask in engine.asked) == list(range(10))
    assert transcript.wall_s == max(exchange.ended for exchange in transcript.exchanges)
    assert [e.submitted for e in transcript.exchanges] == sorted(e.submitted for e in transcript.exchanges)


def test_conversations_run_at_the_same_time() -> None:
    engine = Simulated()
    asyncio.run(play(_scenario(20, *[[Turn(append=[1], max_tokens=20)] for _ in range(20)]), engine))
    assert engine.most == 20


@pytest.mark.parametrize("engine", [Simulated(missing=1), Simulated(logprobs=False)])
def test_an_incomplete_answer_is_an_error(engine: Simulated) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(play(_scenario(1, [Turn(append=[1], max_tokens=3)]), engine))
    assert caught.group_contains(WrongAnswer)
