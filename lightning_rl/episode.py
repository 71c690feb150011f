"""What one run of an agent on one task leaves behind.

These records are the contract between the rooms: the server writes calls, the runner writes spans, rewards and the outcome,
credit and the trainer only read. They are frozen; what changes over time is which records exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from msgspec import Struct, field, structs


class Outcome(StrEnum):
    """How an episode ended. A failure is not a zero reward: the recipe says what each outcome means."""

    COMPLETED = "completed"
    AGENT_ERROR = "agent_error"
    TIMEOUT = "timeout"
    INFRASTRUCTURE_ERROR = "infrastructure_error"
    CANCELLED = "cancelled"


class Task(Struct, frozen=True, kw_only=True):
    """One input for the agent."""

    id: str
    input: dict[str, Any]
    """What the agent sees, plus whatever the reward function needs (the runner hides nothing from it)."""


class Sampling(Struct, frozen=True, kw_only=True):
    """What the recipe imposes on every call of an episode; None leaves the agent's own value."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Upper bound on sampled tokens per call; an agent may ask for fewer."""
    seed: int | None = None
    """Seed of the episode; call i samples with a seed derived from (seed, i)."""
    top_logprobs: int | None = None
    """How many alternatives to each sampled token to record, whether the agent asks for any or not."""


class EpisodeStart(Struct, frozen=True, kw_only=True):
    """Everything known about an episode before its agent starts."""

    id: str
    """Unique in the store, safe in a URL path, derived from (phase, step, task, sample, attempt)."""
    task: Task
    phase: str
    """`train`, or `eval-<label>` (`eval-base`, `eval-warm_start`, `eval-final`, …)."""
    step: int = 0
    sample: int = 0
    attempt: int = 0
    group: str = ""
    """Episodes of one task under one policy share a group: the baseline's scope."""
    sampling: Sampling = field(default_factory=Sampling)
    started_at: float = 0.0
    """Seconds since the epoch."""


class Call(Struct, frozen=True, kw_only=True):
    """One request to the policy, exactly as the engine saw it."""

    id: str
    episode_id: str
    index: int
    """Order of arrival within the episode, from 0."""
    model: str
    prompt_ids: list[int]
    sampled_ids: list[int]
    """Ids as sampled, the end-of-turn token included when it was sampled."""
    logprobs: list[float]
    """Behaviour log-prob of each sampled id, under the distribution it was drawn from."""
    versions: list[int]
    """Policy version that produced each sampled id."""
    temperature: float
    """0 means greedy; such calls are never trained on."""
    finish_reason: str
    """`stop`, `length`, `tool_calls` or `abort`."""
    parent_id: str | None = None
    """The call whose prompt + sampled ids this prompt extends token for token, if the server extended one."""
    relation: str = "root"
    """How the server saw the prompt beside the earlier calls of the episode: `root`, `extension`, `fork` (another call has
    extended the same one, or the same prompt was asked before) or `edit` (history was changed)."""
    parted_at: int | None = None
    """For an edit the first prompt token that differs from the nearest earlier call's prompt + sampled ids; for a fork the
    length of the call that it extends, or of the prompt if that was asked before; None otherwise."""
    span_id: str | None = None
    """The span that made it: said by the request's headers, or by a `CallLink`; None if nobody knows."""
    agent: str = ""
    """The agent or node that made it, by the name that the request said (`x-lrl-agent`); "" if it said none."""
    response_id: str = ""
    """The id of the response that the client got; choices of one request share it."""
    upstream: str = ""
    """Name of the provider that answered in the policy's place; such a call has no ids and is never trained on."""
    redacted: bool = False
    """Whether something was taken out of it before it was stored; such a call is not trained on."""
    restricted: list[str] = field(default_factory=list)
    """What made the distribution that it was sampled from another than softmax(logits / temperature): any of `grammar`, `top_p`,
    `top_k`, `min_p`, `penalties`, `logit_bias`, `min_tokens`."""
    entropies: list[float] = field(default_factory=list)
    """In nats, of the distribution that each sampled id was drawn from (of a greedy one: at temperature 1, as its log-prob);
    empty where it was not recorded."""
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """(id, log-prob) of the likeliest at each sampled token, likeliest first, where request or recipe asked for them
    (`top_logprobs`); else empty."""
    experts: bytes | None = None
    """MoE only: expert ids, int16 [tokens, layers, top_k]."""
    cached_tokens: int = 0
    """Prompt tokens served from the prefix tree."""
    request: dict[str, Any] = field(default_factory=dict)
    """The request body as received (messages, tools, parameters)."""
    response: dict[str, Any] = field(default_factory=dict)
    """The message given back to the agent (content, tool_calls)."""
    started_at: float = 0.0
    ended_at: float = 0.0


class Span(Struct, frozen=True, kw_only=True):
    """A node of the agent's own structure, OpenTelemetry-shaped."""

    id: str
    episode_id: str
    name: str
    kind: str
    """`agent`, `chain`, `tool` or `handoff`."""
    parent_id: str | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Traceback or message when the span failed."""


class Reward(Struct, frozen=True, kw_only=True):
    """A number with a name, a time and a place: a span, a call, or (both None) the episode."""

    episode_id: str
    name: str
    value: float
    time: float = 0.0
    call_id: str | None = None
    span_id: str | None = None
    source: str = ""
    """Who gave it: "" the agent, which emitted it; `returned` the agent, as its answer; `function` the recipe's reward function;
    `automatic` its rules; `unknown` in records from before this was known."""


class CallLink(Struct, frozen=True, kw_only=True):
    """Which span made a call, said by the framework that got the response with this id."""

    episode_id: str
    response_id: str
    span_id: str


def linked(calls: Iterable[Call], links: Iterable[CallLink]) -> list[Call]:
    """The calls with the spans that the links name."""
    span_of = {link.response_id: link.span_id for link in links}
    return [
        structs.replace(call, span_id=span_of[call.response_id]) if span_of.get(call.response_id) else call
        for call in calls
    ]


class Episode(Struct, frozen=True, kw_only=True):
    """An episode as read back from the store."""

    start: EpisodeStart
    calls: list[Call] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    outcome: Outcome | None = None
    """None while the agent still runs."""
    answer: Any = None
    """What the agent returned, as JSON."""
    error: str | None = None
    """Traceback when the outcome is not `completed`."""
    counted: bool = False
    """Whether this attempt is the one that counts for its (task, sample)."""
    ended_at: float = 0.0

    @property
    def id(self) -> str:
        return self.start.id
