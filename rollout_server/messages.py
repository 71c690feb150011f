"""What web, manager and worker say to each other: one frozen type a message, msgpack on the wire.

`Submit … GetStats` go from web to manager, `Tokens … Failed` come back; `Forward … Shutdown` go from manager to worker and
`Ready … Acknowledged` come back. The worker answers in order; several passes may be under way. Whoever reads this file
knows the whole protocol.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How one sequence is sampled. The defaults sample from the model's own distribution.

    In this order: bias and penalties change logits, temperature divides them, then top-k, top-p and min-p filter.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of ids in prompt or output (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from ids that were sampled before."""
    frequency_penalty: float = 0.0
    """Subtracted from an id for each time that it was sampled."""
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Token t of choice i is drawn with a uniform that depends on (seed, i, t) only, whatever else is in the batch."""
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence; the id is part of the sampled ids."""
    min_tokens: int = 0
    """The first so many tokens are drawn as if `stop_ids` had no probability; a grammar that allows nothing else goes before."""
    top_logprobs: int = 0
    """How many alternatives to return at each sampled token."""

    @property
    def needs_history(self) -> bool:
        """The distribution depends on ids already sampled: such a sequence cannot be planned ahead of its results."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


# where weights come from ---------------------------------------------------------------------------------------------


class TensorSpec(Struct, frozen=True, kw_only=True):
    """One tensor under its Hugging Face (or PEFT) name."""

    name: str
    dtype: str
    """`bfloat16`, `float16` or `float32`."""
    shape: list[int]
    offset: int = 0
    """Byte offset in the shared memory block."""


class Directory(Struct, frozen=True, kw_only=True, tag="directory"):
    path: str
    """Holds `adapter_model.safetensors` + `adapter_config.json`, or `model.safetensors` (or its shards)."""


class SharedMemory(Struct, frozen=True, kw_only=True, tag="shared_memory"):
    """A POSIX shared memory block of the same host, filled by the publisher before it asks."""

    block: str
    tensors: list[TensorSpec]
    adapter_config: dict[str, object] | None = None
    """PEFT's `adapter_config.json`; None: the tensors are base weights."""


class Broadcast(Struct, frozen=True, kw_only=True, tag="broadcast"):
    """`torch.distributed` broadcast, in the order of `tensors`, in a group made for it: publisher is rank 0."""

    init_method: str
    """`tcp://127.0.0.1:PORT`; the publisher listens."""
    world_size: int
    rank: int
    backend: str
    """`gloo` or `nccl`."""
    tensors: list[TensorSpec]
    adapter_config: dict[str, object] | None = None


WeightSource = Directory | SharedMemory | Broadcast

Running = Literal["keep", "reprefill", "abort"]
"""What an update does to sequences under way. `keep`: they go on with keys and values of the old weights, private to
them. `reprefill`: they keep their sampled tokens and compute keys and values anew. `abort`: they fail, typed."""

# web -> manager ------------------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, kw_only=True, tag=True):
    """Generate from a prompt, which is computed once for all `n` choices."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    """Lower goes first."""
    adapter: str = ""
    """A loaded adapter's name; empty: the policy itself."""
    grammar: str = ""
    """What each choice must fit, as `rollout_server.grammar` takes it; empty: anything."""
    flow: str = ""
    """Who asks: the episode, or the client's key or address. Whoever waits is served fairly between flows."""


class Score(Struct, frozen=True, kw_only=True, tag=True):
    """Log-prob of ids[1:] given their prefixes, under the current policy; bypasses the prefix tree."""

    request_id: str
    ids: list[int]
    adapter: str = ""


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Forget a request, or one of its choices, and free its pages. Unknown ids are ignored: it may just have ended."""

    request_id: str
    index: int | None = None
    """Which of the `n` choices; None: all of them."""


class UpdateWeights(Struct, frozen=True, kw_only=True, tag=True):
    """Load a policy in place. A LoRA source without a name becomes the policy's own adapter, base weights replace the
    base (and the policy's adapter is gone); a LoRA source with a name is loaded beside the others."""

    request_id: str
    source: WeightSource
    version: int
    adapter: str = ""
    running: Running = "reprefill"


class UnloadAdapter(Struct, frozen=True, kw_only=True, tag=True):
    """Forget a named adapter. Its sequences under way fail, typed."""

    request_id: str
    adapter: str


class Pause(Struct, frozen=True, kw_only=True, tag=True):
    """Plan no further passes. `keep`: running sequences hold their pages until `Resume`; `reprefill`: they give them up
    and compute them again; `abort`: they fail, typed. Requests that arrive meanwhile wait."""

    request_id: str
    running: Running = "keep"


class Resume(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str


class Sleep(Struct, frozen=True, kw_only=True, tag=True):
    """Give the device's memory back: KV pages always, weights too at level 2. Pauses; sequences re-prefill later."""

    request_id: str
    level: int = 1


class Wake(Struct, frozen=True, kw_only=True, tag=True):
    """Take the memory again and resume. After a level-2 sleep the weights are those from before it."""

    request_id: str


class GetStats(Struct, frozen=True, kw_only=True, tag=True):
    """Counters and queue lengths; with `check`, page and tree integrity is verified first (`Failed` if broken)."""

    request_id: str
    check: bool = False


ToManager = Submit | Score | Cancel | UpdateWeights | UnloadAdapter | Pause | Resume | Sleep | Wake | GetStats

# manager -> web ------------------------------------------------------------------------------------------------------


class Tokens(Struct, frozen=True, kw_only=True, tag=True):
    """Newly sampled tokens of one choice of a request, in order; none in a last message that only says how it ended."""

    request_id: str
    index: int = 0
    """Which of the `n` choices."""
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    entropies: list[float] = []
    """Per token, in nats, of the distribution that it was drawn from; empty where that is not known: an answer that is given
    again may be from before they were recorded."""
    top_logprobs: list[list[tuple[int, float]]] = []
    """Per token, (id, log-prob) of the likeliest alternatives; empty unless asked for."""
    finish_reason: str | None = None
    """`stop` or `length` on the last message of a choice."""
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
    """Of the tensors now live in the worker, see `rollout_server.models.checksum`."""


class Done(Struct, frozen=True, kw_only=True, tag=True):
    """Pause, resume, sleep, wake or unload has happened."""

    request_id: str


class Stats(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    values: dict[str, float]
    checksums: dict[str, str] = {}
    """Of the weights that are live: `base`, `adapter/` (the policy's own, if it has one) and `adapter/<name>`."""


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """A request that cannot be served. `code` becomes the OpenAI error's code."""

    request_id: str
    code: str
    """`context_length_exceeded`, `too_large`, `invalid_token_ids`, `invalid_sampling`, `model_not_found` (an adapter that is
    not loaded), `invalid_grammar` (it does not compile within its limits), `grammar_failed` (it went wrong on the way, or a
    mask took too much work), `weights_rejected`, `weights_lost`, `aborted`, `worker_failed`, `shutting_down`, `integrity`."""
    message: str


FromManager = Tokens | Scored | Updated | Done | Stats | Failed

# manager <-> worker --------------------------------------------------------------------------------------------------


class Open(Struct, frozen=True, kw_only=True):
    """A sequence takes a slot of the worker's state: what stays the same over its passes is said once.

    The slot's page table is empty after it."""

    slot: int
    sampling: SamplingParams | None
    """None for a sequence that is scored."""
    index: int = 0
    """Which of its request's choices it is: part of its seed."""
    adapter: str = ""


class Draw(Struct, frozen=True, kw_only=True):
    """Sample once from the logits of a row's last token, with the parameters of `slot`, and remember the id there."""

    slot: int
    at: int
    """Index of the token within its sequence's output: the seed's last part."""
    history: list[int] | None = None
    """Prompt and sampled ids so far, for penalties that need them."""
    prompt_length: int = 0
    """How many of `history` are the prompt."""
    allowed: bytes | None = None
    """Mask of a grammar or of stop ids before `min_tokens`: bit i of byte i // 8 allows id i (least significant first)."""


class Row(Struct, frozen=True, kw_only=True):
    """One sequence's share of a forward pass: `ids` are computed at positions start, start+1, …"""

    slot: int
    ids: list[int]
    """A single id of -1 stands for the one last sampled in this slot, which the manager may not know yet."""
    start: int
    pages: list[int] = []
    """New entries of the slot's page table, which then covers positions 0 … start+len(ids)-1."""
    first_page: int = 0
    """Where in the table `pages` goes; entries before it stay as they are."""
    draws: list[Draw] = []
    """None while a prompt is only part-way computed; several when a request's choices part here."""
    targets: list[int] = []
    """Score the ids that follow each of `ids` instead of sampling; one shorter at a sequence's end."""


class Forward(Struct, frozen=True, kw_only=True, tag=True):
    """One pass. In this order: pages go to the host tier, come back from it, are copied; slots open; rows run."""

    step: int
    rows: list[Row]
    opens: list[Open] = []
    offloads: list[tuple[int, int]] = []
    """(device page, host page)."""
    restores: list[tuple[int, int]] = []
    """(host page, device page)."""
    copies: list[tuple[int, int]] = []
    """(from page, to page): a sequence goes on in the middle of a page that others share."""


class Load(Struct, frozen=True, kw_only=True, tag=True):
    source: WeightSource
    version: int
    adapter: str = ""


class Unload(Struct, frozen=True, kw_only=True, tag=True):
    adapter: str


class Release(Struct, frozen=True, kw_only=True, tag=True):
    """Free KV memory, and weights too if `weights`. No Forward comes before Reclaim."""

    weights: bool


class Reclaim(Struct, frozen=True, kw_only=True, tag=True):
    pass


class Shutdown(Struct, frozen=True, kw_only=True, tag=True):
    pass


ToWorker = Forward | Load | Unload | Release | Reclaim | Shutdown


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """The worker's first word: what the loaded model can do."""

    num_pages: int
    page_size: int
    host_pages: int
    """Pages of the host tier, 0 without one."""
    max_positions: int
    vocab_size: int
    eos_ids: list[int]
    checksum: str


class Forwarded(Struct, frozen=True, kw_only=True, tag=True):
    """Results: one entry a draw in the order of rows and their draws; one list of scores a row with targets."""

    step: int
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    """Empty when nobody asked."""
    scores: list[list[float]]
    seconds: float


class Loaded(Struct, frozen=True, kw_only=True, tag=True):
    version: int
    checksum: str
    error: str | None = None
    """Why the weights were rejected; the old ones are whole and live."""


class Acknowledged(Struct, frozen=True, kw_only=True, tag=True):
    """Unload, Release or Reclaim has happened."""

    error: str | None = None


FromWorker = Ready | Forwarded | Loaded | Acknowledged

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_to_manager = msgspec.msgpack.Decoder(ToManager).decode
decode_from_manager = msgspec.msgpack.Decoder(FromManager).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
