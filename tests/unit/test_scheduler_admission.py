"""Admission's parts against oracles: the event simulation, the length predictor."""

from __future__ import annotations

from math import sqrt

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.manager.admission import Demand, peak_pages
from rollout_server.manager.stopping import BINS, CAUTION, WINDOW, LengthPredictor

PAGE = 4


def peak_token_by_token(demands: list[Demand]) -> int:
    """The same, one pass after the other: a page stands for itself, or for the how-manieth of its sequence."""
    peak = 0
    for now in range(max((d.remaining for d in demands), default=0) + 1):
        pages: set[object] = set()
        for number, d in enumerate(demands):
            if d.remaining >= now:
                count = max(len(d.pages), -(-d.length // PAGE)) + max(
                    0, (d.length - 1 + now) // PAGE - (d.length - 1) // PAGE
                )
                pages |= set(d.pages) | {(number, at) for at in range(len(d.pages), count)}
        peak = max(peak, len(pages))
    return peak


@st.composite
def demand_lists(draw: st.DrawFn) -> list[Demand]:
    """Sequences that grow from the branches of a tree of pages."""
    fresh = iter(range(1000))
    branches: list[list[int]] = [[]]
    demands = []
    for _ in range(draw(st.integers(0, 8))):
        trunk = draw(st.sampled_from(branches))
        shared = trunk[: draw(st.integers(0, len(trunk)))]
        pages = shared + [next(fresh) for _ in range(draw(st.integers(0, 3)))]
        branches.append(pages)
        length = draw(st.integers(max(0, (len(pages) - 1) * PAGE + 1), len(pages) * PAGE + 9))
        demands.append((length, draw(st.integers(1, 30)), pages))
    holders = [page for _, _, pages in demands for page in pages]
    return [
        Demand(length, remaining, pages, sum(holders.count(page) > 1 for page in pages))
        for length, remaining, pages in demands
    ]


@given(demand_lists())
def test_the_simulated_peak_is_the_peak(demands: list[Demand]) -> None:
    assert peak_pages(demands, PAGE) == peak_token_by_token(demands)


def test_lengths_are_not_known_before_anything_has_finished() -> None:
    predictor = LengthPredictor()
    assert predictor.remaining(0, 100) == 100
    assert predictor.remaining(99, 100) == 1


@given(st.lists(st.integers(1, BINS), min_size=1, max_size=15), st.integers(0, BINS - 1))
def test_expected_length_is_the_conditional_mean_and_a_margin(lengths: list[int], progress: int) -> None:
    predictor = LengthPredictor()
    for length in lengths:
        predictor.finished(length, BINS)
    beyond = [length for length in lengths if length > progress]
    expected = float(BINS)
    if beyond:
        mean = sum(beyond) / len(beyond)
        expected = mean + CAUTION * sqrt(max(0.0, sum(x * x for x in beyond) / len(beyond) - mean * mean))
    remaining = predictor.remaining(progress, BINS)
    assert remaining >= 1
    assert abs(remaining - max(1, min(BINS, expected) - progress)) < 1.001


def test_old_lengths_are_forgotten() -> None:
    predictor = LengthPredictor()
    for length in [1000] * 100 + [10] * WINDOW:
        predictor.finished(length, 1000)
    assert predictor.remaining(0, 1000) < 60
