"""What one choice is sampled with, from the client's wishes and the room that is left."""

from __future__ import annotations

import pytest

from lightning_rl.episode import Sampling
from rollout_server.api.sampling import restrictions, sampling_params
from rollout_server.api.turn import SamplingOptions
from rollout_server.messages import SamplingParams


@pytest.mark.parametrize(
    ("asked", "imposed", "given"), [(0, None, 0), (5, None, 5), (30, None, 20), (30, 8, 8), (5, 8, 5)]
)
def test_min_tokens_never_exceeds_what_may_be_sampled(asked: int, imposed: int | None, given: int) -> None:
    params = sampling_params(
        SamplingOptions(min_tokens=asked, max_tokens=40, top_logprobs=asked % 4),
        Sampling(max_tokens=imposed, top_logprobs=3),
        prompt_tokens=80,
        context_limit=100,
        vocab_size=1000,
        eos_ids=[2],
        seed=0,
    )
    assert params.min_tokens == given
    assert params.top_logprobs == 3
    assert params.stop_ids == (2,)


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({}, []),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1}, ["top_p", "top_k", "min_p"]),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1, "temperature": 0.0}, []),
        ({"repetition_penalty": 1.1}, ["penalties"]),
        ({"presence_penalty": 0.5}, ["penalties"]),
        ({"frequency_penalty": -0.5, "temperature": 0.0}, ["penalties"]),
        ({"logit_bias": {3: 1.5}}, ["logit_bias"]),
        ({"logit_bias": {3: 0.0}}, []),
        ({"min_tokens": 2, "stop_ids": (2,)}, ["min_tokens"]),
        ({"min_tokens": 2}, []),
        ({"temperature": 0.3, "seed": 1, "max_tokens": 5, "top_logprobs": 2, "stop_ids": (2,)}, []),
    ],
)
def test_what_restricts_the_distribution_that_is_sampled_from(params, found) -> None:
    asked = SamplingParams(**params)
    assert restrictions(asked, has_grammar=False) == found
    assert restrictions(asked, has_grammar=True) == ["grammar", *found]
