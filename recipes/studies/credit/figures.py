"""From learning curves to episodes-to-threshold, with intervals. Pure.

A training that did not reach the threshold counts as infinitely long: medians and quantiles bear that, means would not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from msgspec import Struct

WINDOW = 3
"""Steps whose episodes are averaged."""
THRESHOLD = 0.9
"""Share of right decisions in a window that counts as learned."""
RESAMPLES = 4000
COVERAGE = 0.95


class Interval(Struct, frozen=True):
    """A median with its bootstrap interval; `math.inf` stands for more than was tried."""

    median: float
    low: float
    high: float


def is_learned(curve: Sequence[float]) -> bool:
    """Whether the last `WINDOW` steps of a curve reach the threshold."""
    return len(curve) >= WINDOW and math.fsum(curve[-WINDOW:]) / WINDOW >= THRESHOLD - 1e-9


def episodes_to_threshold(curve: Sequence[float], per_step: int) -> float:
    """Episodes until the end of the first window that reaches the threshold; inf if none does. `curve`: the share of right
    decisions in each step, of `per_step` episodes each."""
    ends = (end for end in range(WINDOW, len(curve) + 1) if is_learned(curve[:end]))
    first = next(ends, None)
    return math.inf if first is None else float(first * per_step)


def median_of(values: Sequence[float]) -> Interval:
    """Percentile bootstrap over the values."""
    return _bootstrap(lambda draw: _median(draw(values)), _median(values))


def ratio_of(base: Sequence[float], values: Sequence[float]) -> Interval:
    """How many times fewer: median of `base` over median of `values`. Where both are inf, nothing is known (nan)."""
    return _bootstrap(
        lambda draw: _divided(_median(draw(base)), _median(draw(values))), _divided(_median(base), _median(values))
    )


def smoothed(curve: Sequence[float], length: int) -> list[float]:
    """Means of the last `WINDOW` steps; a training that ended stays where it ended."""
    means = []
    for end in range(1, len(curve) + 1):
        window = curve[max(0, end - WINDOW) : end]
        means.append(math.fsum(window) / len(window))
    return means + means[-1:] * (length - len(means))


def _median(values: Sequence[float]) -> float:
    return _quantile(values, 0.5)


def _divided(a: float, b: float) -> float:
    if math.isinf(b):
        return math.nan if math.isinf(a) else 0.0
    return a / b


def _bootstrap(statistic: Callable[[Callable[[Sequence[float]], list[float]]], float], point: float) -> Interval:
    chance = random.Random(0)
    drawn = [statistic(lambda values: chance.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    known = [value for value in drawn if not math.isnan(value)]
    if not known:
        return Interval(point, math.nan, math.nan)
    tail = (1 - COVERAGE) / 2
    return Interval(point, _quantile(known, tail), _quantile(known, 1 - tail))


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest; inf if the upper one is and counts."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    lower = math.floor(place)
    rest = place - lower
    if rest == 0 or ordered[lower] == ordered[math.ceil(place)]:
        return ordered[lower]
    return ordered[lower] * (1 - rest) + ordered[lower + 1] * rest
