"""Sampled tokens follow the stated distribution, and the log-probs are that distribution's."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from rollout_server.messages import SamplingParams
from rollout_server.worker.sampler import distribution, sample, uniform

DRAWS = 100_000
FILTERS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_p": SamplingParams(top_p=0.8),
    "top_k": SamplingParams(top_k=7),
    "min_p": SamplingParams(min_p=0.1),
    "all": SamplingParams(temperature=1.4, top_p=0.9, top_k=12, min_p=0.02),
}


def reference(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Float64, filter by filter, on sorted probabilities."""
    probs = torch.softmax(logits.double() / p.temperature, -1)
    order = probs.argsort(descending=True)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if p.top_k:
        keep[order[p.top_k :]] = False
    if p.top_p < 1:
        mass, total = 0.0, probs[keep].sum()
        for token in order.tolist():
            if not keep[token]:
                continue
            if mass >= p.top_p * total:
                keep[token] = False
            mass += probs[token].item()
    if p.min_p:
        keep &= probs >= p.min_p * probs.max()
    probs = torch.where(keep, probs, 0.0)
    return probs / probs.sum()


@pytest.mark.parametrize("name", FILTERS)
def test_chi_square(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40) * 1.5
    params = FILTERS[name]
    want = reference(logits, params)
    logprobs = distribution(logits[None], [params])
    assert torch.allclose(logprobs[0].exp().double(), want, atol=1e-6)
    counts = torch.zeros(40)
    block = 5000
    rows = logprobs.expand(block, -1)
    for start in range(0, DRAWS, block):
        ids, chosen = sample(rows, [params] * block, range(start, start + block))
        assert torch.equal(chosen, logprobs[0, ids])
        counts += torch.bincount(ids, minlength=40)
    alive = want > 0
    assert counts[~alive].sum() == 0
    assert stats.chisquare(counts[alive].double().numpy(), (want[alive] * DRAWS).numpy()).pvalue > 0.001


def test_large_vocabulary_is_sampled_across_blocks() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000)
    logprobs = distribution(logits[None], [SamplingParams()])
    ids, _ = sample(logprobs.expand(20000, -1), [SamplingParams()] * 20000, range(20000))
    groups = torch.bincount(ids // 100, minlength=10).double()
    want = logprobs[0].exp().double().view(10, 100).sum(-1) * 20000
    assert stats.chisquare(groups.numpy(), (want / want.sum() * 20000).numpy()).pvalue > 0.001


def test_greedy_beside_sampled() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=5), SamplingParams(temperature=0.0)]
    ids, chosen = sample(distribution(logits, params), params, [0, 0, 0])
    assert ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert torch.allclose(chosen, torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0])


def test_uniforms_are_uniform_and_independent_of_order() -> None:
    us = [uniform(seed, draw) for seed in range(100) for draw in range(100)]
    assert stats.kstest(us, "uniform").pvalue > 0.001
    assert len(set(us)) == len(us)
