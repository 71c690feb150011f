"""Sampled tokens follow the stated distribution, and the log-probs are that distribution's.

The oracle is written from the definitions, in float64, one row and one id at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import stats

from rollout_server.kernels import reference
from rollout_server.messages import Draw, SamplingParams
from rollout_server.worker.sampler import Sampled, sample
from rollout_server.worker.slots import SETTINGS, bias_of, settings_of

DRAWS = 100_000
BLOCK = 5000
VOCAB = 40
HISTORY, PROMPT = [3, 3, 7, 11, 7, 7, 20, 3], 3


class Case(NamedTuple):
    params: SamplingParams
    allowed: frozenset[int] | None = None


CASES = {
    "plain": Case(SamplingParams()),
    "temperature": Case(SamplingParams(temperature=0.6)),
    "hot": Case(SamplingParams(temperature=1.7)),
    "top_k": Case(SamplingParams(top_k=7)),
    "top_p": Case(SamplingParams(top_p=0.8)),
    "min_p": Case(SamplingParams(min_p=0.1)),
    "repetition": Case(SamplingParams(repetition_penalty=1.8)),
    "presence": Case(SamplingParams(presence_penalty=1.1)),
    "frequency": Case(SamplingParams(frequency_penalty=0.7)),
    "bias": Case(SamplingParams(logit_bias={0: 2.5, 7: -3.0, 39: 1.0})),
    "mask": Case(SamplingParams(), frozenset(range(3, 40, 3))),
    "top_k and top_p": Case(SamplingParams(top_k=12, top_p=0.9)),
    "all filters": Case(SamplingParams(temperature=1.4, top_p=0.9, top_k=12, min_p=0.02)),
    "penalties and filters": Case(
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2, top_p=0.7)
    ),
    "everything": Case(
        SamplingParams(
            temperature=0.8,
            top_k=15,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.2,
            presence_penalty=-0.4,
            frequency_penalty=0.3,
            logit_bias={3: 1.5, 8: 2.0, 9: -1.0},
        ),
        frozenset(range(0, 40, 2)) | {3, 7},
    ),
}


def oracle(logits: Sequence[float], case: Case, history: Sequence[int] = HISTORY, prompt: int = PROMPT) -> list[float]:
    """The probability of each id; a greedy row's are those at temperature 1."""
    p, allowed = case
    scores = [float(x) + p.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
    if p.needs_history:
        sampled = Counter(history[prompt:])
        for i in set(history):
            scores[i] = scores[i] / p.repetition_penalty if scores[i] > 0 else scores[i] * p.repetition_penalty
            scores[i] -= p.frequency_penalty * sampled[i] + p.presence_penalty * (sampled[i] > 0)
    if allowed is not None:
        scores = [x if i in allowed else -math.inf for i, x in enumerate(scores)]
    order = sorted((i for i in range(len(scores)) if scores[i] > -math.inf), key=lambda i: (-scores[i], i))
    weights = {i: math.exp((scores[i] - scores[order[0]]) / (p.temperature or 1.0)) for i in order}
    if p.temperature > 0:
        if p.top_k:
            order = order[: p.top_k]
        if p.top_p < 1:
            total, mass, kept = math.fsum(weights[i] for i in order), 0.0, []
            for i in order:
                if kept and mass >= p.top_p * total:
                    break
                kept.append(i)
                mass += weights[i]
            order = kept
        order = [i for i in order if weights[i] >= p.min_p * weights[order[0]]]
    total = math.fsum(weights[i] for i in order)
    return [weights[i] / total if i in set(order) else 0.0 for i in range(len(scores))]


def bits(allowed: frozenset[int] | None, vocab: int) -> bytes | None:
    if allowed is None:
        return None
    return np.packbits([i in allowed for i in range(vocab)], bitorder="little").tobytes()


def draw_all(logits_BV: torch.Tensor, cases: Sequence[Case], at: Sequence[int], index: Sequence[int]) -> Sampled:
    vocab = logits_BV.shape[1]
    known: dict[tuple[int, int], tuple[object, ...]] = {}
    for case, i in zip(cases, index, strict=True):
        if (id(case), i) not in known:
            known[id(case), i] = settings_of(case.params, i)
    return sample(
        logits_BV.clone(),
        np.array([known[id(case), i] for case, i in zip(cases, index, strict=True)], SETTINGS),
        [
            Draw(
                slot=row,
                at=t,
                history=HISTORY if case.params.needs_history else None,
                prompt_length=PROMPT,
                allowed=bits(case.allowed, vocab),
            )
            for row, (case, t) in enumerate(zip(cases, at, strict=True))
        ],
        {row: bias_of(case.params, vocab) for row, case in enumerate(cases) if case.params.logit_bias},
        reference,
    )


@pytest.mark.parametrize("name", CASES)
def test_chi_square(name: str) -> None:
    """1e5 draws, of many tokens and choices of one request, against the oracle."""
    case = CASES[name]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
    want = np.array(oracle(logits.tolist(), case))
    counts = np.zeros(VOCAB)
    for start in range(0, DRAWS, BLOCK):
        at = [(start + i) // 4 for i in range(BLOCK)]
        got = draw_all(logits.expand(BLOCK, -1), [case] * BLOCK, at, [i % 4 for i in range(BLOCK)])
        counts += np.bincount(got.ids.numpy(), minlength=VOCAB)
        assert np.allclose(np.exp(got.logprobs.double().numpy()), want[got.ids.numpy()], atol=1e-6)
        assert np.allclose(got.entropies.double().numpy(), stats.entropy(want), atol=1e-5)
    alive = want > 0
    assert counts[~alive].sum() == 0
    assert alive.sum() > 2
    assert stats.chisquare(counts[alive], want[alive] * DRAWS).pvalue > 0.001


def test_large_vocabulary_is_sampled_across_blocks() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for case in (Case(SamplingParams()), Case(SamplingParams(top_p=0.999)), Case(SamplingParams(min_p=1e-4))):
        ids = draw_all(logits.expand(4000, -1), [case] * 4000, range(4000), [0] * 4000).ids
        groups = np.bincount(ids.numpy() // 100, minlength=10)
        want = np.array(oracle(logits.tolist(), case)).reshape(10, 100).sum(-1) * 4000
        assert stats.chisquare(groups, want).pvalue > 0.001


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.93, 0.47, 0.13, 0.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 8, 100]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.25]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 0.5, 4.0]), max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
    top_logprobs=st.sampled_from([0, 0, 1, 5, 60]),
)
masks = st.none() | st.frozensets(st.integers(0, VOCAB - 1), min_size=1)
batches = st.lists(st.builds(Case, params, masks), min_size=1, max_size=12)


def near(logprob: float, probability: float) -> bool:
    """To fp32: a bias of -100 at temperature 0.3 makes log-probs of -333, which end in steps of 3e-5."""
    return math.isclose(logprob, math.log(probability), rel_tol=1e-6, abs_tol=2e-5)


@settings(deadline=None, max_examples=60)
@given(cases=batches, seed=st.integers(0, 1000), ties=st.booleans())
def test_every_mixture_of_draws(cases: list[Case], seed: int, ties: bool) -> None:
    """Log-probs and alternatives equal the oracle's, and a draw is the same alone as in company."""
    logits = torch.randn(len(cases), VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    if ties:
        logits = logits.round()
    at = [(seed + i) % 7 for i in range(len(cases))]
    together = draw_all(logits, cases, at, [i % 3 for i in range(len(cases))])
    for i, case in enumerate(cases):
        want = oracle(logits[i].tolist(), case)
        token = int(together.ids[i])
        assert want[token] > 0
        assert near(float(together.logprobs[i]), want[token])
        assert math.isclose(float(together.entropies[i]), stats.entropy(want), abs_tol=2e-5)
        if case.params.temperature == 0:
            assert token == max(range(VOCAB), key=lambda t: (round(want[t], 7), -t))
        alone = draw_all(logits[i : i + 1], [case], [at[i]], [i % 3])
        assert alone.ids[0] == together.ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert math.isclose(alone.entropies[0], together.entropies[i], abs_tol=1e-6)
        found = together.alternatives
        if case.params.top_logprobs:
            assert found is not None
            row = found.draws.index(i)
            count = min(case.params.top_logprobs, VOCAB)
            assert found.counts[row] == count
            pairs = [
                (t, lp)
                for t, lp in zip(found.ids[row, :count].tolist(), found.logprobs[row, :count].tolist(), strict=True)
                if lp > -math.inf
            ]
            assert len(pairs) == min(count, sum(p > 0 for p in want))
            assert all(near(lp, want[t]) for t, lp in pairs)
            for (first, _), (second, _) in pairwise(pairs):
                lead = math.log(want[first]) - math.log(want[second])
                assert lead > 1e-9 or (first < second and lead > -1e-6)
        else:
            assert found is None or i not in found.draws


def test_greedy_beside_sampled() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cold = Case(SamplingParams(temperature=0.0, top_k=3))
    got = draw_all(logits, [cold, Case(SamplingParams(seed=5)), cold], [0, 0, 0], [0, 0, 0])
    assert got.ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert torch.allclose(got.logprobs, torch.log_softmax(logits, -1).gather(1, got.ids[:, None])[:, 0])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_next_to_no_temperature(top_p: float) -> None:
    """Logits over it would overflow; what is left is the largest logit, or its equals."""
    logits = torch.tensor([[1.0, 80.0, 3.0, -70.0], [5.0, -80.0, 5.0, 4.9]])
    case = Case(SamplingParams(temperature=1e-42, top_p=top_p))
    got = [draw_all(logits, [case, case], [at, at], [0, 1]) for at in range(64)]
    assert {int(each.ids[0]) for each in got} == {1}
    assert {float(each.logprobs[0]) for each in got} == {0.0}
    assert {int(each.ids[1]) for each in got} == {0, 2}
    assert {round(float(each.logprobs[1]), 5) for each in got} == {-0.69315}


def test_a_draw_that_cannot_be_made_says_why() -> None:
    logits = torch.zeros(1, VOCAB)
    with pytest.raises(ValueError, match="allow nothing"):
        draw_all(logits, [Case(SamplingParams(), frozenset())], [0], [0])
    with pytest.raises(ValueError, match="outside 0 … 39"):
        bias_of(SamplingParams(logit_bias={VOCAB: 1.0}), VOCAB)
    records = np.array([settings_of(SamplingParams(presence_penalty=1.0), 0)], SETTINGS)
    with pytest.raises(ValueError, match="no history"):
        sample(logits, records, [Draw(slot=0, at=1)], {}, reference)
    with pytest.raises(ValueError, match="outside 0 … 39"):
        sample(logits, records, [Draw(slot=0, at=1, history=[VOCAB])], {}, reference)
    with pytest.raises(ValueError, match="4 bytes"):
        sample(
            logits,
            np.array([settings_of(SamplingParams(), 0)], SETTINGS),
            [Draw(slot=0, at=0, allowed=b"1234")],
            {},
            reference,
        )
