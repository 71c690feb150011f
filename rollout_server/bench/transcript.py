"""What an engine did with a scenario: ids and arrival times of every request, as plain data that travels as JSON.

Times are seconds since the scenario's first request. From a transcript and its scenario everything else is computed:
prompts, waves of requests (`limits`), unique tokens (`unique_tokens`), rates and latencies (`metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from rollout_server.bench.scenarios import Scenario, Turn


class Choice(Struct, frozen=True, kw_only=True):
    ids: list[int]
    arrivals: list[float]
    """When each id reached the client; ids that came together have the same time."""


class Exchange(Struct, frozen=True, kw_only=True):
    """One turn of one conversation."""

    conversation: int
    turn: int
    submitted: float
    choices: list[Choice]

    @property
    def ended(self) -> float:
        return max(choice.arrivals[-1] for choice in self.choices)


class Transcript(Struct, frozen=True, kw_only=True):
    wall_s: float
    """From the first request to the last id."""
    exchanges: list[Exchange]
    """In the order of submission."""
    prefill_tokens: int | None
    """Prompt tokens that the engine says it computed; None if it does not say."""

    @property
    def sampled_tokens(self) -> int:
        return sum(len(choice.ids) for exchange in self.exchanges for choice in exchange.choices)


class Request(Struct, frozen=True, kw_only=True):
    """An exchange with its prompt, as the engine got it."""

    prompt: list[int]
    turn: Turn
    exchange: Exchange


def requests(scenario: Scenario, transcript: Transcript) -> Iterator[Request]:
    """In the order of submission, prompts put together from the scenario and the answers of earlier turns."""
    history: dict[int, list[int]] = {}
    for exchange in transcript.exchanges:
        turn = scenario.conversations[exchange.conversation].turns[exchange.turn]
        prompt = history.get(exchange.conversation, []) + turn.append
        history[exchange.conversation] = prompt + exchange.choices[0].ids
        yield Request(prompt=prompt, turn=turn, exchange=exchange)
