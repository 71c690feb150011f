"""How long a sequence will be: learnt from how much of `max_tokens` recent ones used.

As in Tokasaurus (Juravsky et al., 2025): the expectation given that a sequence has come so far already, plus a quarter of
a standard deviation. Before anything has finished, and beyond all experience, a sequence is expected to use all.
"""

from __future__ import annotations

from collections import deque
from math import ceil, sqrt

WINDOW = 2048
"""Finished sequences that are remembered."""
BINS = 64
"""Resolution of length / max_tokens."""
REFRESH = 16
"""Finished sequences between two looks at the record."""
CAUTION = 0.25
"""Standard deviations above the mean."""


class LengthPredictor:
    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._counts = [0] * (BINS + 1)
        self._expected: list[float] = [1.0] * (BINS + 1)
        self._unseen = 0

    def finished(self, length: int, max_tokens: int) -> None:
        """A sequence ended of its own accord, or at `max_tokens`."""
        bin_ = ceil(BINS * length / max_tokens)
        self._recent.append(bin_)
        self._counts[bin_] += 1
        if len(self._recent) > WINDOW:
            self._counts[self._recent.popleft()] -= 1
        self._unseen += 1
        if self._unseen >= REFRESH or len(self._recent) < REFRESH:
            self._unseen = 0
            self._expected = _expectations(self._counts)

    def remaining(self, length: int, max_tokens: int) -> int:
        """Tokens to come of a sequence that has `length`: at least 1, if it has not come to its end."""
        expected = ceil(self._expected[BINS * length // max_tokens] * max_tokens)
        return max(1, min(expected, max_tokens) - length)


def _expectations(counts: list[int]) -> list[float]:
    """For each bin, the expected final share of sequences that have come beyond it."""
    expected = [1.0] * (BINS + 1)
    number, total, squares = 0, 0.0, 0.0
    for bin_ in range(BINS, 0, -1):
        share = bin_ / BINS
        number += counts[bin_]
        total += counts[bin_] * share
        squares += counts[bin_] * share * share
        if number:
            mean = total / number
            expected[bin_ - 1] = mean + CAUTION * sqrt(max(0.0, squares / number - mean * mean))
    return expected
