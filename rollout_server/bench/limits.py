"""The least time that a machine needs for a scenario: bytes over bandwidth or operations over their rate, whichever is more.

Per decode step of B rows every weight and every distinct key and value is read once:

    t ≥ max( (weight bytes + distinct context · kv bytes) / bandwidth , (2·P·B + 4·L·H·Σ context) / rate(B) )

and a prefill of T tokens is bound the same way, with the head applied to each prompt's last token only. P counts the
parameters of the linear layers, L the layers, H the attention's width (heads × head dim). Norms, activations, sampling
and whatever a program adds are free. A scenario is played in waves, the requests that can be under way together: what is
unique in a wave is prefilled, then all its rows decode in step. Pauses are free. Pure arithmetic; `probe` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightning_rl.errors import ModelError
from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.transcript import Request, Transcript, requests
from rollout_server.bench.unique_tokens import Trie, new_tokens
from rollout_server.models.config import ModelConfig


class Gemm(NamedTuple):
    """A linear layer's product: [rows, k] × [k, n], `times` times a pass."""

    name: str
    k: int
    n: int
    times: int

    @property
    def parameters(self) -> int:
        return self.k * self.n * self.times


class Shape(NamedTuple):
    """What of a dense decoder the limit depends on."""

    body: tuple[Gemm, ...]
    """Once a token."""
    head: Gemm
    """Once a sampled token."""
    layers: int
    attention_width: int
    """Query heads × head dim."""
    kv_width: int
    """Key-value heads × head dim."""
    element_bytes: int
    """Of weights, keys and values."""

    @property
    def body_parameters(self) -> int:
        return sum(gemm.parameters for gemm in self.body)

    @property
    def weight_bytes(self) -> int:
        return (self.body_parameters + self.head.parameters) * self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """Of one token, over all layers."""
        return 2 * self.layers * self.kv_width * self.element_bytes


def shape_of(config: ModelConfig, element_bytes: int) -> Shape:
    """Raises ModelError for a mixture of experts, whose weights read depend on what is routed where."""
    if config.moe is not None:
        raise ModelError(
            f"the machine's limit is worked out for dense models only, not for {config.family}",
            hint="choose a dense model, such as smollm2-135m",
        )
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return Shape(
        body=(
            Gemm("qkv", config.hidden, queries + 2 * keys, config.layers),
            Gemm("out", queries, config.hidden, config.layers),
            Gemm("gate_up", config.hidden, 2 * config.intermediate, config.layers),
            Gemm("down", config.intermediate, config.hidden, config.layers),
        ),
        head=Gemm("head", config.hidden, config.vocab, 1),
        layers=config.layers,
        attention_width=queries,
        kv_width=keys,
        element_bytes=element_bytes,
    )


class Limits(NamedTuple):
    """What the machine was seen to do."""

    read_bytes_s: float
    gemm_flop_s: dict[int, float]
    """Rows → rate over the model's linear layers at that many rows."""
    prefill_flop_s: float
    """Rate of a long prompt's chunk, without the head."""

    def rate(self, rows: int) -> float:
        """At the nearest measured number of rows that is not smaller, else the largest. Few rows are bound by bytes."""
        return self.gemm_flop_s[min((r for r in self.gemm_flop_s if r >= rows), default=max(self.gemm_flop_s))]


def best(seen: Iterable[Limits]) -> Limits:
    """Each measurement is at most what the machine can do (a neighbour may be busy), so the largest counts."""
    every = list(seen)
    return Limits(
        read_bytes_s=max(limits.read_bytes_s for limits in every),
        gemm_flop_s={rows: max(limits.gemm_flop_s[rows] for limits in every) for rows in every[0].gemm_flop_s},
        prefill_flop_s=max(limits.prefill_flop_s for limits in every),
    )


class Wave(NamedTuple):
    """Requests under way together."""

    prompts: int
    prefill_tokens: int
    prefill_pairs: int
    """(query, key) pairs that the prefill's causal attention covers."""
    rows: int
    """Sequences that decode."""
    steps: int
    """Decode passes: one less than an answer's length, its first id comes from the prefill."""
    context: float
    """Mean over the steps of the rows' contexts, summed over the rows."""
    distinct_context: float
    """The same, tokens that rows share counted once."""


def prefill_s(shape: Shape, limits: Limits, wave: Wave) -> float:
    products = 2 * shape.body_parameters * wave.prefill_tokens + 2 * shape.head.parameters * wave.prompts
    attention = 4 * shape.layers * shape.attention_width * wave.prefill_pairs
    return max((products + attention) / limits.prefill_flop_s, shape.weight_bytes / limits.read_bytes_s)


def decode_step_s(shape: Shape, limits: Limits, wave: Wave) -> float:
    moved = shape.weight_bytes + wave.distinct_context * shape.kv_bytes
    products = 2 * (shape.body_parameters + shape.head.parameters) * wave.rows
    attention = 4 * shape.layers * shape.attention_width * wave.context
    return max(moved / limits.read_bytes_s, (products + attention) / limits.rate(wave.rows))


def least_seconds(shape: Shape, limits: Limits, waves: Iterable[Wave]) -> float:
    return sum(prefill_s(shape, limits, wave) + wave.steps * decode_step_s(shape, limits, wave) for wave in waves)


def waves(scenario: Scenario, transcript: Transcript) -> Iterator[Wave]:
    """Turn by turn, in the order of submission, `concurrency` requests at a time."""
    asked = list(requests(scenario, transcript))
    turns: dict[int, list[tuple[Request, int]]] = {}
    for request, new in zip(asked, new_tokens(asked), strict=True):
        turns.setdefault(request.exchange.turn, []).append((request, new))
    for _, members in sorted(turns.items()):
        for first in range(0, len(members), scenario.concurrency):
            yield _wave(members[first : first + scenario.concurrency])


def _wave(members: list[tuple[Request, int]]) -> Wave:
    trie = Trie()
    shared = sum(trie.insert(request.prompt) for request, _ in members)
    steps = max(request.turn.max_tokens for request, _ in members) - 1
    rows = sum(request.turn.n for request, _ in members)
    grown = rows * (steps + 1) / 2  # at step t of 1 … steps a row attends to t ids of its answer
    return Wave(
        prompts=len(members),
        prefill_tokens=sum(new for _, new in members),
        prefill_pairs=sum(_pairs(len(request.prompt), new) for request, new in members),
        rows=rows,
        steps=steps,
        context=sum(len(request.prompt) * request.turn.n for request, _ in members) + grown,
        distinct_context=shared + grown,
    )


def _pairs(length: int, new: int) -> int:
    """The last `new` of `length` positions, each with itself and all before it."""
    return (length * (length + 1) - (length - new) * (length - new + 1)) // 2
