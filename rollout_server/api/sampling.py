"""What one choice is sampled with: the client's wishes, what the recipe imposes on the episode, and the seed.

Pure. An episode's temperature and top_p replace the client's; its max_tokens caps them. A prompt's seed depends on
nothing but the episode's (or the request's) seed, the index of the first call and the prompt's number in the request:
any process derives the same. Its choices share the seed, the engine tells them apart by their index.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import blake2b

from lightning_rl.episode import Sampling
from rollout_server.api.errors import ApiError
from rollout_server.api.requests import ChatRequest, CompletionRequest
from rollout_server.messages import SamplingParams


def derive_seed(seed: int, *places: int) -> int:
    """63 bits from a seed and a place (call index, prompt number)."""
    text = ",".join(str(number) for number in (seed, *places))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sampling_params(
    request: ChatRequest | CompletionRequest,
    imposed: Sampling,
    *,
    prompt_tokens: int,
    context_limit: int,
    vocab_size: int,
    eos_ids: Sequence[int],
    seed: int,
) -> SamplingParams:
    """Raises ApiError when the prompt leaves no room for a single token, or a bias is for an id that does not exist."""
    room = context_limit - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens, and prompt and reply together may have {context_limit}",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    unknown = sorted(token_id for token_id in request.bias if token_id >= vocab_size)
    if unknown:
        raise ApiError(
            400,
            f"logit_bias: token id {unknown[0]} is not in the vocabulary of {vocab_size}",
            param="logit_bias",
            code="invalid_value",
        )
    asked = request.limit if isinstance(request, ChatRequest) else request.max_tokens
    alternatives = request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs or 0
    return SamplingParams(
        temperature=request.temperature if imposed.temperature is None else imposed.temperature,
        top_p=request.top_p if imposed.top_p is None else imposed.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.bias,
        seed=seed,
        max_tokens=min(limit for limit in (room, asked, imposed.max_tokens) if limit is not None),
        stop_ids=tuple(dict.fromkeys([*request.stop_token_ids, *(() if request.ignore_eos else eos_ids)])),
        top_logprobs=alternatives,
    )


def prompt_seeds(request: ChatRequest | CompletionRequest, imposed: Sampling, index: int, count: int) -> list[int]:
    """One seed for each of `count` prompts; the request's first call is the episode's call `index` (0 without one)."""
    if imposed.seed is not None:
        return [derive_seed(imposed.seed, index, prompt) for prompt in range(count)]
    if request.seed is not None:
        return [derive_seed(request.seed, prompt) for prompt in range(count)]
    return [secrets.randbits(63) for _ in range(count)]
