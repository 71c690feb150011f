"""What is asked of an engine: conversations of token ids, drawn from a seed and the same for every engine.

A `Scenario` is plain data that travels as JSON. A turn's prompt is all earlier prompt ids, the ids sampled for choice 0,
and what the turn appends; how long an answer gets is forced. `SCENARIOS` is the table of what can be run; each entry
makes one `Scenario` a concurrency level. Pure: no engine, no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct


class Turn(Struct, frozen=True, kw_only=True):
    append: list[int]
    """Ids after the earlier prompt and answer: a user's words, a tool's result."""
    max_tokens: int
    """Exactly this many ids are sampled: end-of-sequence does not end them."""
    pause_s: float = 0.0
    """How long the turn waits after the last answer is complete, as an agent waits for its tool."""
    n: int = 1
    adapter: str = ""


class Conversation(Struct, frozen=True, kw_only=True):
    turns: list[Turn]


class Scenario(Struct, frozen=True, kw_only=True):
    name: str
    concurrency: int
    """Conversations that are open at once; the next one opens when one has ended."""
    seed: int
    """Of the sampling; temperature is 1 and the chosen ids' log-probs are returned."""
    conversations: list[Conversation]

    @property
    def max_sequences(self) -> int:
        """Sequences that decode at once, at most."""
        return self.concurrency * max(turn.n for talk in self.conversations for turn in talk.turns)

    @property
    def max_context(self) -> int:
        """Longest prompt and answer together."""
        return max(sum(len(turn.append) + turn.max_tokens for turn in talk.turns) for talk in self.conversations)

    @property
    def adapters(self) -> list[str]:
        return sorted({turn.adapter for talk in self.conversations for turn in talk.turns} - {""})


class Room(NamedTuple):
    """What a scenario may use."""

    first_id: int
    """Ids below are special in most vocabularies and stay unused."""
    vocab: int
    max_positions: int
    kv_tokens: int
    quick: bool


Make = Callable[[Room, int], list[Scenario]]
"""(room, seed) → one scenario a concurrency level."""


ROUNDS = 16
"""Seeds that differ modulo this give prompts that differ from the first id on: nothing is found in a cache by chance."""


class _Ids:
    """Uniform random ids: no two draws share more than a chance prefix, and no two `prompt`s any."""

    def __init__(self, room: Room, seed: int) -> None:
        self._random = random.Random(f"{seed}")  # a number would lose its sign
        self._ids = range(room.first_id, room.vocab)
        own = range(room.first_id + seed % ROUNDS, room.vocab, ROUNDS)
        self._first = iter(self._random.sample(own, len(own)))

    def __call__(self, count: int) -> list[int]:
        return self._random.choices(self._ids, k=count)

    def prompt(self, count: int) -> list[int]:
        return [next(self._first), *self(count - 1)]

    def between(self, low: int, high: int) -> list[int]:
        return self(self._random.randint(low, high))

    def choice(self, count: int) -> int:
        return self._random.randrange(count)


def single(room: Room, seed: int) -> list[Scenario]:
    """Different prompts of 128, 128 out, 1, 16 and 64 at once: nothing is shared."""
    ids, prompt, answer = _Ids(room, seed), *((32, 16) if room.quick else (128, 128))
    return [
        Scenario(
            name="single",
            concurrency=batch,
            seed=seed,
            conversations=[
                Conversation(turns=[Turn(append=ids.prompt(prompt), max_tokens=answer)]) for _ in range(batch)
            ],
        )
        for batch in (1, 16, 64)
    ]


def group(room: Room, seed: int) -> list[Scenario]:
    """A training step's prompts: 16 tasks × n = 16 behind one system prompt of 512, 40 of their own, 64 out."""
    ids = _Ids(room, seed)
    tasks, n, system, own, answer = (4, 4, 128, 16, 8) if room.quick else (16, 16, 512, 40, 64)
    common = ids.prompt(system)
    talks = [Conversation(turns=[Turn(append=common + ids(own), max_tokens=answer, n=n)]) for _ in range(tasks)]
    return [Scenario(name="group", concurrency=tasks, seed=seed, conversations=talks)]


def agents(room: Room, seed: int) -> list[Scenario]:
    """64 conversations of 6 turns: system prompt of 128, 64 of their own, then 60 tool ids after 0.3 s; 48 out."""
    ids = _Ids(room, seed)
    count, turns, pause, answer = (8, 3, 0.05, 12) if room.quick else (64, 6, 0.3, 48)
    common = ids.prompt(128)
    talks = [
        Conversation(
            turns=[
                Turn(append=common + ids(64), max_tokens=answer),
                *(Turn(append=ids(60), max_tokens=answer, pause_s=pause) for _ in range(turns - 1)),
            ]
        )
        for _ in range(count)
    ]
    return [Scenario(name="agents", concurrency=count, seed=seed, conversations=talks)]


def long(room: Room, seed: int) -> list[Scenario]:
    """Conversations that grow over 8 turns to 4k (or the model's limit) and together pass the KV cache by a quarter."""
    ids, answer, turns = _Ids(room, seed), 16, 8
    context = min(1024 if room.quick else 4096, room.max_positions)
    count = -(-5 * room.kv_tokens // (4 * context))
    appended = context // turns - answer
    talks = [
        Conversation(
            turns=[
                Turn(append=ids.prompt(appended), max_tokens=answer),
                *(Turn(append=ids(appended), max_tokens=answer, pause_s=0.3) for _ in range(turns - 1)),
            ]
        )
        for _ in range(count)
    ]
    return [Scenario(name="long", concurrency=count, seed=seed, conversations=talks)]


def rag(room: Room, seed: int) -> list[Scenario]:
    """Questions about documents of 200 … 2000: one of 8 that others ask about too, then in every other case one of its
    own; an instruction of 64 before, a question of 32 behind, 32 out; 16 at once."""
    ids = _Ids(room, seed)
    questions, low, high, answer = (8, 50, 200, 8) if room.quick else (48, 200, 2000, 32)
    high = min(high, (room.max_positions - 96 - answer) // 2)
    instruction, shared = ids.prompt(64), [ids.between(low, high) for _ in range(8)]
    talks = []
    for number in range(questions):
        own = ids.between(low, high) if number % 2 else []
        prompt = instruction + shared[ids.choice(8)] + own + ids(32)
        talks.append(Conversation(turns=[Turn(append=prompt, max_tokens=answer)]))
    return [Scenario(name="rag", concurrency=min(16, questions), seed=seed, conversations=talks)]


def adapters(room: Room, seed: int) -> list[Scenario]:
    """128 requests of 128 in and 64 out, each for one of 32 LoRA adapters at random, 64 at once."""
    ids = _Ids(room, seed)
    count, requests, prompt, answer = (4, 8, 32, 8) if room.quick else (32, 128, 128, 64)
    talks = [
        Conversation(
            turns=[Turn(append=ids.prompt(prompt), max_tokens=answer, adapter=adapter_name(ids.choice(count)))]
        )
        for _ in range(requests)
    ]
    return [Scenario(name="adapters", concurrency=min(64, requests), seed=seed, conversations=talks)]


def adapter_name(number: int) -> str:
    return f"lora-{number:02d}"


SCENARIOS: dict[str, Make] = {
    "single": single,
    "group": group,
    "agents": agents,
    "long": long,
    "rag": rag,
    "adapters": adapters,
}
