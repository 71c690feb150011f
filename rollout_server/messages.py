"""What web, manager and worker say to each other: one frozen type a message, msgpack on the wire.

`Submit … GetStats` go from web to manager, `Tokens … Failed` come back; `Forward … Shutdown` go from manager to
worker and `Forwarded`, `Loaded` come back. Whoever reads this file knows the whole protocol.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How one sequence is sampled. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int = 0
    """Token t is drawn with a uniform that depends on (seed, t) only, whatever else is in the batch."""
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence; the id is part of the sampled ids."""
    top_logprobs: int = 0
    """How many alternatives to return at each sampled token."""


# web -> manager ------------------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, kw_only=True, tag=True):
    """Generate from a prompt."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0


class Score(Struct, frozen=True, kw_only=True, tag=True):
    """Log-prob of ids[1:] given their prefixes, under the current policy; bypasses the prefix tree."""

    request_id: str
    ids: list[int]


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Forget a request and free its pages. Unknown ids are ignored: it may just have ended."""

    request_id: str


class UpdateWeights(Struct, frozen=True, kw_only=True, tag=True):
    """Load a policy in place. Running sequences keep their sampled tokens and re-prefill under the new weights."""

    request_id: str
    path: str
    """Directory with `adapter_model.safetensors` + `adapter_config.json`, or with `model.safetensors`."""
    version: int


class GetStats(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str


ToManager = Submit | Score | Cancel | UpdateWeights | GetStats

# manager -> web ------------------------------------------------------------------------------------------------------


class Tokens(Struct, frozen=True, kw_only=True, tag=True):
    """Newly sampled tokens of one request, in order."""

    request_id: str
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    top_logprobs: list[list[tuple[int, float]]] = []
    """Per token, (id, log-prob) of the likeliest alternatives; empty unless asked for."""
    finish_reason: str | None = None
    """`stop` or `length` on the last message of a request."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix tree (set on the first message)."""


class Scored(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    logprobs: list[float]
    version: int


class Updated(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    version: int
    checksum: str
    """Of the tensors now live in the worker, see `rollout_server.models.weights.checksum`."""


class Stats(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    values: dict[str, float]


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """A request that cannot be served. `code` becomes the OpenAI error's code."""

    request_id: str
    code: str
    """`context_length_exceeded`, `too_large`, `weights_rejected`, `worker_failed`, `shutting_down`."""
    message: str


FromManager = Tokens | Scored | Updated | Stats | Failed

# manager <-> worker --------------------------------------------------------------------------------------------------


class Row(Struct, frozen=True, kw_only=True):
    """One sequence's share of a forward pass: `ids` are computed at positions start, start+1, …"""

    sequence: int
    ids: list[int]
    start: int
    pages: list[int]
    """All pages that hold positions 0 … start+len(ids)-1."""
    sampling: SamplingParams | None = None
    """None while a prompt is only part-way prefilled: nothing is sampled."""
    draw: int = 0
    """Index of the token to be sampled within its sequence: the seed's second part."""
    targets: list[int] = []
    """Score the ids that follow each of `ids` instead of sampling; one shorter at a sequence's end."""


class Forward(Struct, frozen=True, kw_only=True, tag=True):
    step: int
    rows: list[Row]


class Load(Struct, frozen=True, kw_only=True, tag=True):
    path: str
    version: int


class Shutdown(Struct, frozen=True, kw_only=True, tag=True):
    pass


ToWorker = Forward | Load | Shutdown


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """The worker's first word: what the loaded model can do."""

    num_pages: int
    page_size: int
    max_positions: int
    vocab_size: int
    eos_ids: list[int]
    checksum: str


class Forwarded(Struct, frozen=True, kw_only=True, tag=True):
    """Results in row order; a row that sampled nothing has id -1."""

    step: int
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    scores: list[list[float]]
    seconds: float


class Loaded(Struct, frozen=True, kw_only=True, tag=True):
    version: int
    checksum: str
    error: str | None = None


FromWorker = Ready | Forwarded | Loaded

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_to_manager = msgspec.msgpack.Decoder(ToManager).decode
decode_from_manager = msgspec.msgpack.Decoder(FromManager).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
