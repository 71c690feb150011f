"""What one choice is sampled with, from the client's wishes and the room that is left."""

from __future__ import annotations

import pytest

from lightning_rl.episode import Sampling
from rollout_server.api.sampling import sampling_params
from rollout_server.api.turn import SamplingOptions


@pytest.mark.parametrize(
    ("asked", "imposed", "given"), [(0, None, 0), (5, None, 5), (30, None, 20), (30, 8, 8), (5, 8, 5)]
)
def test_min_tokens_never_exceeds_what_may_be_sampled(asked: int, imposed: int | None, given: int) -> None:
    params = sampling_params(
        SamplingOptions(min_tokens=asked, max_tokens=40),
        Sampling(max_tokens=imposed),
        prompt_tokens=80,
        context_limit=100,
        vocab_size=1000,
        eos_ids=[2],
        seed=0,
    )
    assert params.min_tokens == given
    assert params.stop_ids == (2,)
