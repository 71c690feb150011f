"""What the runner and an episode's process say to each other, over one socket: a job, then words, each after its length.

The process speaks whenever something happens; the runner answers only `Ended`, with what the store holds of the episode.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from msgspec import Struct

from lightning_rl.automatic_rewards import AutomaticRules
from lightning_rl.episode import Call, CallLink, EpisodeStart, Outcome, Reward, Span
from tracers.plain import as_json

LENGTH = struct.Struct("!I")
FunctionAt = tuple[str, str, str]
"""File, function and module of a `recipe.functions.Reference`."""


class Command(Struct, frozen=True, kw_only=True):
    """An agent that is a program of its own."""

    words: list[str]
    folder: str
    """Where it is started."""


class Recorded(Struct, frozen=True, kw_only=True):
    """What the server recorded of an episode: its calls, the spans of tools that it saw, what came by OpenTelemetry."""

    calls: list[Call] = []
    spans: list[Span] = []
    rewards: list[Reward] = []


class Job(Struct, frozen=True, kw_only=True):
    """What an episode's process is to do."""

    start: EpisodeStart
    agent: FunctionAt | Command
    reward: FunctionAt | None
    """None: the agent gives its rewards itself, by what it returns or emits."""
    server_url: str
    api_key: str
    scored: list[Outcome]
    """The outcomes that are judged."""
    automatic: AutomaticRules = AutomaticRules()
    """Rewards that are read from the episode."""
    adapters: list[str] = []
    """Names of the models that are not the policy."""
    must_reward: bool = True
    """Whether an agent that is to give its rewards itself, and gives none, has failed."""
    reward_names: list[str] = []
    """Names of which a returned dict must have one to be rewards."""
    beat_s: float = 1.0
    """How often the process shows that it lives."""
    task_file: str = ""
    """Where a command finds its task."""
    ended: Outcome | None = None
    """Set when the agent's own process is gone and only the reward function is still to run."""
    error: str | None = None
    spans: list[Span] = []
    rewards: list[Reward] = []
    links: list[CallLink] = []
    """What the agent emitted before its process went."""
    recorded: Recorded | None = None
    """What the store holds; None while the agent is still to run."""


class Beat(Struct, frozen=True, kw_only=True, tag=True):
    """The process lives."""


class Emitted(Struct, frozen=True, kw_only=True, tag=True):
    """A span, a reward or a link, as the agent emitted it."""

    span: Span | None = None
    reward: Reward | None = None
    link: CallLink | None = None


class Ended(Struct, frozen=True, kw_only=True, tag=True):
    """The agent has ended and what the server recorded is needed: the runner answers with `Recorded`."""


class Done(Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a process."""

    outcome: Outcome
    answer: Any = None
    error: str | None = None
    rewards: list[Reward] = []
    imported: list[str] = []
    """Installed modules that the process had to import itself, for the fork server to import once and for all."""


Word = Beat | Emitted | Ended | Done
decode_word = msgspec.msgpack.Decoder(Word).decode
encode = msgspec.msgpack.Encoder().encode


def plain(recorded: Recorded) -> Recorded:
    """The same without what no message can hold: numbers of more than 64 bits, halves of characters, too deep nesting."""
    put = msgspec.structs.replace
    calls = [put(call, request=as_json(call.request), response=as_json(call.response)) for call in recorded.calls]
    spans = [put(span, attributes=as_json(span.attributes)) for span in recorded.spans]
    return Recorded(calls=calls, spans=spans, rewards=recorded.rewards)


def framed(message: Struct) -> bytes:
    payload = encode(message)
    return LENGTH.pack(len(payload)) + payload
