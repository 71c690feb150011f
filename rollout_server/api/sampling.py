"""What one choice is sampled with: the client's wishes, what the recipe imposes on the episode, and the seed.

Pure. An episode's temperature and top_p replace the client's; its max_tokens caps them; of its top_logprobs and the client's
the larger counts. A prompt's seed depends on nothing but the episode's (or the request's) seed, the index of the first call
and the prompt's number in the request: any process derives the same. Its choices share the seed, the engine tells them apart
by their index.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b

from lightning_rl.episode import Sampling
from rollout_server.api.errors import ApiError
from rollout_server.api.turn import SamplingOptions
from rollout_server.messages import SamplingParams


def derive_seed(seed: int, *places: int) -> int:
    """63 bits from a seed and a place (call index, prompt number)."""
    text = ",".join(str(number) for number in (seed, *places))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sampling_params(
    wanted: SamplingOptions,
    imposed: Sampling,
    *,
    prompt_tokens: int,
    context_limit: int,
    vocab_size: int,
    eos_ids: Sequence[int],
    seed: int,
    prompt_param: str = "messages",
) -> SamplingParams:
    """Raises ApiError when the prompt leaves no room for a single token, or a bias is for an id that does not exist.

    `prompt_param` is the field of the request that holds the prompt.
    """
    room = context_limit - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens, and prompt and reply together may have {context_limit}",
            param=prompt_param,
            code="context_length_exceeded",
        )
    unknown = sorted(token_id for token_id in wanted.logit_bias if token_id >= vocab_size)
    if unknown:
        raise ApiError(
            400,
            f"logit_bias: token id {unknown[0]} is not in the vocabulary of {vocab_size}",
            param="logit_bias",
            code="invalid_value",
        )
    max_tokens = min(limit for limit in (room, wanted.max_tokens, imposed.max_tokens) if limit is not None)
    return SamplingParams(
        temperature=wanted.temperature if imposed.temperature is None else imposed.temperature,
        top_p=wanted.top_p if imposed.top_p is None else imposed.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=dict(wanted.logit_bias),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(wanted.min_tokens, max_tokens),
        stop_ids=tuple(dict.fromkeys([*wanted.stop_ids, *(() if wanted.ignore_eos else eos_ids)])),
        top_logprobs=max(wanted.top_logprobs, imposed.top_logprobs or 0),
    )


def restrictions(params: SamplingParams, *, has_grammar: bool) -> list[str]:
    """What makes the distribution that is sampled from another than softmax(logits / temperature): see `Call.restricted`.

    A greedy call is not filtered. `min_tokens` needs ids that could stop it.
    """
    filters = params.temperature > 0
    found = {
        "grammar": has_grammar,
        "top_p": filters and params.top_p < 1,
        "top_k": filters and params.top_k > 0,
        "min_p": filters and params.min_p > 0,
        "penalties": params.needs_history,
        "logit_bias": any(params.logit_bias.values()),
        "min_tokens": params.min_tokens > 0 and bool(params.stop_ids),
    }
    return [name for name, applies in found.items() if applies]


def prompt_seeds(seed: int | None, imposed: int | None, index: int, count: int) -> list[int]:
    """One seed for each of `count` prompts: from the one imposed on the episode, whose call `index` this is, or else from the
    request's own, or drawn."""
    if imposed is not None:
        return [derive_seed(imposed, index, prompt) for prompt in range(count)]
    if seed is not None:
        return [derive_seed(seed, prompt) for prompt in range(count)]
    return [secrets.randbits(63) for _ in range(count)]
