"""Plays a scenario against an engine and writes the transcript: the same loop for every engine, in its own process.

An engine takes a request and delivers ids as they come. Conversations open in order, `concurrency` at a
time; each turn waits for the last answer and its pause. Only msgspec is needed here: peers run it in their own
environments.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from rollout_server.bench.scenarios import Conversation, Scenario
from rollout_server.bench.transcript import Choice, Exchange, Transcript


class Ask(Struct, frozen=True, kw_only=True):
    """One request: `n` answers of exactly `max_tokens` ids at temperature 1, with their log-probs."""

    prompt: list[int]
    max_tokens: int
    n: int
    adapter: str
    seed: int


Deliver = Callable[[int, Sequence[int], Sequence[float]], None]
"""(choice, its next ids that arrived together, their log-probs). To be called in the event loop's thread."""


class Engine(Protocol):
    async def prepare(self, scenario: Scenario) -> None:
        """Called before a scenario is timed: an engine whose settings must fit the scenario sets them here."""
        ...

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        """Returns when all choices are delivered to the end."""
        ...

    async def prefill_tokens(self) -> int | None:
        """Prompt tokens computed since the engine started; None if it does not say. Raises if its state is broken."""
        ...


class WrongAnswer(Exception):
    """The engine did not deliver what was asked for: too few ids, or ids without log-probs."""


async def play(scenario: Scenario, engine: Engine) -> Transcript:
    """Raises WrongAnswer if an answer is not complete."""
    before = await engine.prefill_tokens()
    waiting = iter(enumerate(scenario.conversations))
    exchanges: list[Exchange] = []
    start = time.perf_counter()

    async def visitor() -> None:
        for number, conversation in waiting:
            await _converse(number, conversation, scenario.seed, engine, start, exchanges)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(scenario.concurrency):
            tasks.create_task(visitor())
    after = await engine.prefill_tokens()
    return Transcript(
        wall_s=max(exchange.ended for exchange in exchanges),
        exchanges=sorted(exchanges, key=lambda e: (e.submitted, e.conversation, e.turn)),
        prefill_tokens=None if before is None or after is None else after - before,
    )


async def _converse(
    number: int, conversation: Conversation, seed: int, engine: Engine, start: float, exchanges: list[Exchange]
) -> None:
    history: list[int] = []
    for turn_number, turn in enumerate(conversation.turns):
        if turn.pause_s:
            await asyncio.sleep(turn.pause_s)
        history = history + turn.append
        ask = Ask(
            prompt=history,
            max_tokens=turn.max_tokens,
            n=turn.n,
            adapter=turn.adapter,
            seed=(seed << 24 | number << 8 | turn_number) % 2**31,
        )
        submitted = time.perf_counter() - start
        choices = await _collect(ask, engine, start)
        exchanges.append(Exchange(conversation=number, turn=turn_number, submitted=submitted, choices=choices))
        history = history + choices[0].ids


async def _collect(ask: Ask, engine: Engine, start: float) -> list[Choice]:
    choices = [Choice(ids=[], arrivals=[]) for _ in range(ask.n)]
    logprobs = 0

    def deliver(index: int, ids: Sequence[int], values: Sequence[float]) -> None:
        nonlocal logprobs
        now = round(time.perf_counter() - start, 6)
        choices[index].ids.extend(ids)
        choices[index].arrivals.extend([now] * len(ids))
        logprobs += len(values)

    await engine.ask(ask, deliver)
    wanted = ask.n * ask.max_tokens
    if any(len(choice.ids) != ask.max_tokens for choice in choices) or logprobs != wanted:
        lengths = [len(choice.ids) for choice in choices]
        raise WrongAnswer(
            f"asked for {ask.n} × {ask.max_tokens} ids with log-probs, got {lengths} ids and {logprobs} log-probs"
        )
    return choices
