"""What the viewer's server says to its page: one record an answer, JSON on the wire, and TypeScript by `viewer.typescript`.

Everything is data to be shown as text. Times are seconds since the epoch, durations are seconds. Steps count from 1 here, as people
count them; evaluations are at step 0 before the first. Lists that may be long are columns.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from lightning_rl.episode import Outcome

RunState = Literal["running", "finished", "stopped", "recorded"]
"""`running`: a process holds the run; `finished`: it has a summary; `stopped`: neither; `recorded`: episodes without a run."""


class Failure(Struct, frozen=True, kw_only=True):
    """Any answer with a status of 400 or more."""

    error: str
    hint: str = ""


class Text(Struct, frozen=True, kw_only=True):
    """Text that somebody else wrote. Of one that is very long only the beginning is here."""

    text: str
    length: int
    """Of the whole, in characters; more than `text` has if it was cut."""
    place: str = ""
    """Where the whole of a text that was cut is to be had: an argument of `/text`."""


# runs -----------------------------------------------------------------------------------------------------------------


class RunEntry(Struct, frozen=True, kw_only=True):
    """A run in the list."""

    key: str
    """Names it in addresses."""
    name: str
    path: str
    """As the user would write it, relative to where the viewer was started if it is below."""
    state: RunState
    started_at: float
    updated_at: float
    """When something was written to its figures or its store last."""
    model: str
    seed: int | None
    steps: int | None
    """As the recipe has it; None without one."""
    steps_done: int
    success: dict[str, float]
    """By policy measured: `base`, `warm_start`, `final`, …, as far as it is known."""
    success_ci95: dict[str, list[float]]
    note: str = ""
    """What cannot be read of it, and why."""


class Runs(Struct, frozen=True, kw_only=True):
    runs: list[RunEntry]
    """The latest first."""
    place: str
    """Where they were looked for."""
    chosen: str | None
    """Key of the one that the viewer was started for."""


class Evaluation(Struct, frozen=True, kw_only=True):
    step: int
    label: str
    success: float
    ci95: list[float]
    n: int


class RunDetail(Struct, frozen=True, kw_only=True):
    """A run in figures. `series` has a value, or None, for each of `steps`."""

    entry: RunEntry
    steps: list[int]
    series: dict[str, list[float | None]]
    """By the name in `metrics.jsonl`, dots for nested names: `success`, `reward.correct`, `reward_ci95.correct.0`,
    `ledger.masked.no_signal`, `seconds.rollout`, … Histograms are not here."""
    every: int
    """Only each so-manieth step is here; 1: all."""
    advantage_edges: list[float]
    advantage_counts: list[list[float] | None]
    evaluations: list[Evaluation]
    stages: dict[str, float]
    """Seconds by stage of the whole run so far."""
    recipe: dict[str, str]
    """Every field that the run's recipe resolved to, by its dotted name, as JSON; empty without one."""
    formula: str
    """The objective in words; empty without a recipe."""


# episodes -------------------------------------------------------------------------------------------------------------


class EpisodeRow(Struct, frozen=True, kw_only=True):
    id: str
    phase: str
    step: int
    task: str
    sample: int
    attempt: int
    group: str
    outcome: Outcome | None
    """None while it runs."""
    counted: bool
    rewards: dict[str, float]
    """By name; values of the same name are added up."""
    calls: int
    tokens: int
    """Sampled."""
    agents: list[str]
    versions: list[int]
    """Lowest and highest policy version that sampled a token of it; empty if none is known, or not yet."""
    started_at: float
    seconds: float | None
    """None while it runs."""


class Indexing(Struct, frozen=True, kw_only=True):
    """Agents, versions and texts of old episodes are read in the background: how many episodes are done."""

    done: int
    total: int


class EpisodePage(Struct, frozen=True, kw_only=True):
    rows: list[EpisodeRow]
    offset: int
    matched: int
    total: int
    revision: int
    """Changes whenever an episode was added or has changed."""
    indexing: Indexing


class Range(Struct, frozen=True, kw_only=True):
    low: float
    high: float


class Facets(Struct, frozen=True, kw_only=True):
    """What there is to filter by."""

    phases: dict[str, int]
    """With numbers of episodes, as in the next ones."""
    outcomes: dict[str, int]
    """`running` for those without one."""
    agents: dict[str, int]
    rewards: dict[str, Range]
    steps: Range
    versions: Range | None
    calls: Range
    tokens: Range
    revision: int
    indexing: Indexing


class EpisodeQuery(Struct, frozen=True, kw_only=True):
    """Filters of `/episodes`; each narrows what the others leave. Ranges include their ends."""

    phase: tuple[str, ...] = ()
    outcome: tuple[str, ...] = ()
    """Names of outcomes, or `running`."""
    counted: bool | None = None
    agent: tuple[str, ...] = ()
    """Any of them made a call."""
    task: str = ""
    """A part of its id, in any case."""
    group: str = ""
    text: str = ""
    """Words, all of which occur in what task, agent, model and tools said; the beginning of a word is enough."""
    step: tuple[float | None, float | None] = (None, None)
    version: tuple[float | None, float | None] = (None, None)
    calls: tuple[float | None, float | None] = (None, None)
    tokens: tuple[float | None, float | None] = (None, None)
    seconds: tuple[float | None, float | None] = (None, None)
    reward: dict[str, tuple[float | None, float | None]] = {}
    sort: str = "started_at"
    """A field of EpisodeRow that has an order, or `reward.NAME`. Episodes without a value come last."""
    descending: bool = True
    offset: int = 0
    limit: int = 100


# one episode ----------------------------------------------------------------------------------------------------------


class RewardView(Struct, frozen=True, kw_only=True):
    name: str
    value: float
    weight: float
    """What the recipe multiplies it by; 1 without one."""
    source: str
    time: float


class ToolCallView(Struct, frozen=True, kw_only=True):
    name: str
    arguments: Text


class MessageView(Struct, frozen=True, kw_only=True):
    role: str
    text: Text
    tools: list[ToolCallView]


class SpanNode(Struct, frozen=True, kw_only=True, tag="span", tag_field="type"):
    """An agent, chain, tool or handoff."""

    id: str
    parent: str | None
    """Id of a node before this one."""
    depth: int
    kind: str
    name: str
    started_at: float
    ended_at: float
    arguments: Text | None
    """Of a tool, as JSON."""
    result: Text | None
    attributes: Text | None
    """What else is said of it, as JSON."""
    error: Text | None
    """Traceback or message."""
    rewards: list[RewardView]


class CallNode(Struct, frozen=True, kw_only=True, tag="call", tag_field="type"):
    id: str
    parent: str | None
    """Id of the node in which it was made."""
    depth: int
    index: int
    agent: str
    model: str
    upstream: str
    """The provider that answered in the policy's place; empty if none did."""
    redacted: bool
    restricted: list[str]
    finish_reason: str
    temperature: float
    started_at: float
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    sampled_tokens: int
    versions: list[int]
    """Lowest and highest; empty without tokens."""
    mean_logprob: float | None
    relation: str
    """`root`, `extension`, `fork` or `edit`: see `episode.Call`."""
    continues: str | None
    """Id of the call that it extends, branches from or edits."""
    parted_at: int | None
    news: list[MessageView]
    """What its request says that no earlier call of the conversation did."""
    messages: int
    """How many its request has in all."""
    reply: MessageView
    rewards: list[RewardView]


class Sibling(Struct, frozen=True, kw_only=True):
    """An episode of the same group."""

    id: str
    sample: int
    attempt: int
    outcome: Outcome | None
    counted: bool
    rewards: dict[str, float]
    total: float | None
    """Their weighted sum; None if there are none."""


class EpisodeView(Struct, frozen=True, kw_only=True):
    id: str
    phase: str
    step: int
    task: str
    task_input: Text
    sample: int
    attempt: int
    group: str
    outcome: Outcome | None
    counted: bool
    answer: Text | None
    error: Text | None
    started_at: float
    ended_at: float | None
    """None while it runs."""
    rewards: list[RewardView]
    """Of the episode as a whole; those of spans and calls are at their nodes."""
    total: float | None
    """The weighted sum of all rewards; None if there are none."""
    nodes: list[SpanNode | CallNode]
    """Depth first, each level by time: a tree with `depth` and `parent`."""
    siblings: list[Sibling]
    """The whole group, this one among them, in order of sample and attempt; empty where there is no group."""
    before: str | None
    """Ids of its neighbours in the order of the store."""
    after: str | None


# one call -------------------------------------------------------------------------------------------------------------


class Alternative(Struct, frozen=True, kw_only=True):
    id: int
    text: str
    logprob: float


class TokenColumns(Struct, frozen=True, kw_only=True):
    ids: list[int]
    texts: list[str]
    """What each id stands for; bytes that are no text on their own as `\\xe2\\x80`; empty if the tokenizer is not known."""
    special: list[int]
    """Places of special tokens (`<|im_end|>`)."""
    broken: list[int]
    """Places of tokens whose bytes are no text on their own."""


class PromptPart(Struct, frozen=True, kw_only=True):
    """Who wrote prompt tokens [start, end): an earlier call sampled them, or they came from outside (`call` is None)."""

    start: int
    end: int
    call: str | None
    index: int | None


class CallView(Struct, frozen=True, kw_only=True):
    id: str
    episode: str
    group: str
    phase: str
    step: int
    node: CallNode
    before: str | None
    """Ids of the calls before and after it in its episode."""
    after: str | None
    prompt: TokenColumns
    prompt_parts: list[PromptPart]
    sampled: TokenColumns
    logprobs: list[float | None]
    """None, here and in the next, for one that is no number."""
    versions: list[int]
    entropies: list[float | None]
    """In nats, of the distribution that each token was sampled from; empty if it was not recorded."""
    alternatives: list[list[Alternative]]
    """Of each sampled token the likeliest, where they were recorded; else empty."""
    expert_layers: int
    """How many layers have recorded experts; 0: none were recorded. They are to be had at `/experts`."""
    tokenizer: str
    """Why there are no texts; empty if there are."""
    tools: Text | None
    """The tools that the request offered, as JSON."""
    parameters: Text
    """The rest of the request without messages and tools, as JSON."""


class ExpertColumns(Struct, frozen=True, kw_only=True):
    """Of one layer: [tokens of prompt + sampled that were recorded][top k] expert ids, the first token at `start`."""

    layer: int
    layers: int
    start: int
    experts: list[list[int]]


# a group --------------------------------------------------------------------------------------------------------------


class SampleMessage(Struct, frozen=True, kw_only=True):
    call: str | None
    """The call that sampled it; None for what came from outside."""
    message: MessageView


class SampleView(Struct, frozen=True, kw_only=True):
    episode: str
    sample: int
    attempt: int
    outcome: Outcome | None
    counted: bool
    total: float | None
    rewards: dict[str, float]
    error: Text | None
    answer: Text | None
    messages: list[SampleMessage]
    """What was said after the messages that all samples share."""
    same_characters: int
    """How many characters the first of `messages` still has in common with that of the best sample; 0 for the best itself."""
    tokens: int


class GroupView(Struct, frozen=True, kw_only=True):
    group: str
    phase: str
    step: int
    task: str
    task_input: Text
    shared: list[SampleMessage]
    """How all samples begin."""
    shared_tokens: int
    """Token ids that the first calls of all samples have in common."""
    samples: list[SampleView]
    """The best first, by the weighted sum of rewards; those without any last."""
    before: str | None
    """The groups before and after it in the same step."""
    after: str | None
