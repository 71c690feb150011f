"""The filters keep exactly what their definitions say, whatever part of the vocabulary they look at first."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from rollout_server.worker.filters import RUNGS, Filter, Rungs, keep, leading


def kept_ids(logits: torch.Tensor, by: Filter, rungs: Rungs) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(logits.shape[0])]
    for rows, kept in keep(logits, by, rungs):
        for i, row in enumerate(rows.tolist()):
            found[row] = kept.ids[i, : kept.counts[i]].tolist()
            assert math.isclose(float(kept.logprobs[i].exp().sum()), 1.0, abs_tol=1e-9)
            assert bool(torch.isneginf(kept.logprobs[i, kept.counts[i] :]).all())
    return found


def filter_of(rows: list[tuple[float, int, float, float]]) -> Filter:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Filter(
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
    )


rows_of_filters = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 2.0]),
        st.sampled_from([0, 1, 2, 5, 30, 1000]),
        st.sampled_from([1.0, 0.99, 0.9, 0.4, 0.0]),
        st.sampled_from([0.0, 0.01, 0.3]),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(rows=rows_of_filters, seed=st.integers(0, 10_000), step=st.sampled_from([0.0, 0.5, 2.0]), masked=st.booleans())
def test_looking_at_part_of_the_vocabulary_first_changes_nothing(
    rows: list[tuple[float, int, float, float]], seed: int, step: float, masked: bool
) -> None:
    """Also with many equal logits (rounded to `step`), and where most are impossible."""
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed)) * 2
    if step:
        logits = (logits / step).round() * step
    if masked:
        logits[:, torch.arange(300) % 37 != seed % 37] = -torch.inf
    by = filter_of(rows)
    whole = kept_ids(logits, by, ())
    for rungs in (((64, 4),), ((32, 8), (7, 40)), ((1, 299),), RUNGS):
        assert kept_ids(logits, by, rungs) == whole
    for i in range(len(rows)):
        assert kept_ids(logits[i : i + 1], filter_of(rows[i : i + 1]), ((32, 8),)) == [whole[i]]


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=1, max_size=40),
    top_p=st.floats(0.01, 0.999),
    temperature=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_top_p_keeps_the_smallest_set(logits: list[int], top_p: float, temperature: float) -> None:
    """It reaches top_p, without its last id it does not; no id left out is likelier, of equal ones the first stay."""
    scores = torch.tensor([logits], dtype=torch.float32)
    probs = torch.softmax(scores[0].double() / temperature, -1)
    (kept,) = kept_ids(scores, filter_of([(temperature, 0, top_p, 0.0)]), ((3, 2),))
    slack = 1e-6
    assert float(probs[kept].sum()) >= top_p - slack
    assert float(probs[kept[:-1]].sum()) < top_p + slack
    assert kept == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: len(kept)]


@settings(deadline=None, max_examples=60)
@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=60), count=st.integers(1, 60))
def test_leading(logits: list[int], count: int) -> None:
    count = min(count, len(logits))
    got = leading(torch.tensor([logits], dtype=torch.float32), count, ((7, 2), (1, 8)))
    assert got[0].tolist() == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]
