"""Uniforms are uniform, independent across seeds, choices and tokens, and stay what they were for choice 0."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rollout_server.worker.uniforms import stream, uniform, uniforms

MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    """The generator's step and finaliser in plain integers (Steele, Lea & Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 123456789])
@pytest.mark.parametrize("at", [0, 1, 63, 100_000])
def test_choice_0_draws_what_the_bare_seed_draws(seed: int, at: int) -> None:
    assert uniform(seed, 0, at) == ((splitmix(splitmix(seed & MASK) ^ at) >> 11) + 0.5) / (1 << 53)


def test_uniform_and_all_different() -> None:
    streams = np.array([stream(seed, index) for seed in range(30) for index in range(20)], np.uint64)
    us = np.stack([uniforms(streams, np.full(streams.shape, at, np.uint64)) for at in range(50)])
    assert us.min() > 0
    assert us.max() < 1
    assert len(np.unique(us)) == us.size
    assert stats.kstest(us.ravel(), "uniform").pvalue > 0.001
    for axis in (us[:, :-1].ravel(), us[:, 1:].ravel()), (us[:-1].ravel(), us[1:].ravel()):
        assert abs(np.corrcoef(*axis)[0, 1]) < 0.02
